"""Another master key, and destroyed data keys, in a running cluster of processes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from space.content.keys import load_master_keys
from tests.cli_support import execute
from tests.cluster_support import dev, eventually, founded, running, urls

NOWHERE = Path("/nowhere")


def policy(tmp_path: Path) -> Path:
    """A policy that encrypts."""
    file = tmp_path / "policy.yaml"
    file.write_text("encryption: aes-256-gcm\n")
    return file


@pytest.mark.requires("py:space_raft_engine")
def test_every_node_of_a_cluster_has_the_new_master_key(tmp_path: Path) -> None:
    """Each node with a file of its own: the new key comes to all, the old one goes from all, also over a restart."""
    home = tmp_path / "cluster"
    directories = founded(home)
    (old,) = load_master_keys(home / "master.key")
    for directory in directories:
        shutil.copy(home / "master.key", directory / "master.key")
    source = tmp_path / "a"
    source.write_text("secret")
    with running(directories) as nodes:
        ask = ("--node", urls(nodes))
        for name in ("/a", "/b"):
            put = execute(NOWHERE, *ask, "put", source, "--name", name, "--policy-file", policy(tmp_path))
            assert put.status == 0, put.err
        done = execute(NOWHERE, *ask, "key", "rotate", "--json")
        assert done.status == 0, done.err
        assert (done.json["rewrapped"], done.json["kept"]) == (2, [])
        found = {load_master_keys(directory / "master.key") for directory in directories}
        assert len(found) == 1
        assert len(min(found)) == 1
        assert old not in min(found)
        for node in nodes:
            assert execute(NOWHERE, "--node", node.url, "get", "/a").out == "secret"
        gone = execute(NOWHERE, *ask, "key", "destroy", "/a", "--yes", "--json")
        assert gone.status == 0, gone.err
        for node in nodes:
            read = execute(NOWHERE, "--node", node.url, "get", "/a")
            assert (read.status, "was destroyed" in read.err) == (5, True)
            assert execute(NOWHERE, "--node", node.url, "get", "/b").out == "secret"
        nodes[2].stop()
        refused = execute(NOWHERE, "--node", urls(nodes[:2]), "key", "rotate")
        assert (refused.status, "every node needs the new master key" in refused.err) == (7, True)
        assert execute(NOWHERE, "--node", nodes[0].url, "get", "/b").out == "secret"
    with running(directories) as nodes:
        ask = ("--node", urls(nodes))

        def rotated() -> bool:
            return execute(NOWHERE, *ask, "key", "rotate").status == 0

        eventually("all nodes answer", rotated)  # goes on with the key that came to two of them
        assert len({load_master_keys(directory / "master.key") for directory in directories}) == 1
        for node in nodes:
            assert execute(NOWHERE, "--node", node.url, "get", "/b").out == "secret"
            assert execute(NOWHERE, "--node", node.url, "get", "/a").status == 5


@pytest.mark.requires("py:space_raft_engine")
def test_nodes_with_one_file_and_several_shards(tmp_path: Path) -> None:
    """Nodes that share a file, two shards: the old key stays in it until somebody says that nobody else needs it."""
    source = tmp_path / "a"
    source.write_text("secret")
    home = tmp_path / "cluster"
    with dev(home, "--nodes", "3", "--shards", "2") as (_, nodes):
        ask = ("--node", nodes[0]["url"])
        ids = []
        for _ in range(4):
            put = execute(NOWHERE, *ask, "put", source, "--policy-file", policy(tmp_path))
            assert put.status == 0, put.err
            ids.append(put.out.strip())
        kept = execute(NOWHERE, *ask, "key", "rotate", "--json")
        assert (kept.status, kept.json["erased"], kept.json["rewrapped"]) == (0, False, 4)
        assert len(load_master_keys(home / "master.key")) == 2
        done = execute(NOWHERE, *ask, "key", "rotate", "--sole", "--json")
        assert (done.status, done.json["erased"]) == (0, True), done.err
        assert len(load_master_keys(home / "master.key")) == 1
        for each in ids:
            assert execute(NOWHERE, "--node", nodes[1]["url"], "get", each).out == "secret"
        assert len(execute(NOWHERE, *ask, "key", "ls", "--json").json["keys"]) == 4

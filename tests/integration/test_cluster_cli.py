"""Clusters of real processes, as an operator runs them with the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest

import space
from tests.cli_support import execute, finish, keys, start
from tests.cluster_support import (
    Writer,
    agreed,
    dev,
    eventually,
    founded,
    leader,
    running,
    serve,
    status,
    urls,
)

pytestmark = pytest.mark.requires("py:space_raft_engine", "py:aiohttp")

NOWHERE: Final = Path("/nowhere")
BIG: Final = 48 << 20


def on(node: str, *arguments: str | Path) -> Any:
    """What a command prints that is asked of a node, and succeeds."""
    outcome = execute(NOWHERE, "--node", node, *arguments)
    assert outcome.status == 0, outcome.err
    return outcome


@pytest.fixture
def random_file(tmp_path: Path) -> Path:
    """Half a megabyte that cannot be compressed."""
    path = tmp_path / "random"
    path.write_bytes(os.urandom(1 << 19))
    return path


# --- a cluster to try things out -------------------------------------------------------------------


def test_dev_runs_a_cluster(tmp_path: Path, random_file: Path) -> None:
    """What is put through one node is read through every other; SIGINT ends all; the same directory goes on."""
    with dev(tmp_path / "dev", "--nodes", "3") as (_, nodes):
        assert [each["id"] for each in nodes] == [1, 2, 3]
        assert all(keys(each) == {"id", "pid", "url", "data", "http", "peer"} for each in nodes)
        content = random_file.read_bytes()
        for each in nodes:
            on(each["url"], "put", random_file, "--name", f"/from-{each['id']}")
        for each in nodes:
            for other in nodes:
                assert _fetched(each["url"], f"/from-{other['id']}", tmp_path).read_bytes() == content
            names = [entry["name"] for entry in on(each["url"], "ls", "--json").json]
            assert names == ["from-1", "from-2", "from-3"]
        policy = tmp_path / "policy.yaml"
        policy.write_text("encryption: aes-256-gcm\n")
        on(nodes[0]["url"], "put", random_file, "--policy-file", policy, "--name", "/secret")
        assert _fetched(nodes[1]["url"], "/secret", tmp_path).read_bytes() == content
        (shard,) = status(nodes[0]["url"])
        assert {"shard", "leader", "term", "nodes"} <= keys(shard)
        assert all({"id", "role", "position", "digest", "lag"} <= keys(node) for node in shard["nodes"])
        assert sorted(node["role"] for node in shard["nodes"]) == ["follower", "follower", "leader"]
        words = on(nodes[1]["url"], "cluster", "status").out
        assert "leads, term" in words
    assert not any(Path(f"/proc/{each['pid']}").exists() for each in nodes)
    with dev(tmp_path / "dev", "--nodes", "3") as (_, again):
        assert [each["peer"] for each in again] == [each["peer"] for each in nodes]
        assert len(on(again[2]["url"], "ls", "--json").json) == 4
        assert _fetched(again[2]["url"], "/secret", tmp_path).read_bytes() == content


def _fetched(node: str, path: str, directory: Path) -> Path:
    target = directory / "fetched"
    on(node, "get", path, "-o", target)
    return target


def test_dev_tells_of_deaths(tmp_path: Path) -> None:
    """A node that dies is told of, and a second one; SIGINT still ends what is left."""
    with dev(tmp_path / "dev", "--nodes", "3") as (process, nodes):
        assert process.stdout is not None
        for victim in (nodes[2], nodes[1]):
            os.kill(victim["pid"], signal.SIGKILL)
            told = json.loads(process.stdout.readline())
            assert (told["event"], told["id"], told["status"]) == ("died", victim["id"], -signal.SIGKILL)


def test_dev_ends_its_nodes_when_it_is_killed(tmp_path: Path) -> None:
    """No node outlives the command, even if it is killed."""
    home = str(tmp_path / "dev")
    process = start(tmp_path, "--json", "cluster", "dev", "--dir", home, "--nodes", "1", "--insecure")
    assert process.stdout is not None
    (node,) = json.loads(process.stdout.readline())["nodes"]
    process.kill()
    finish(process)
    eventually("the node has ended", lambda: not Path(f"/proc/{node['pid']}").exists())


def test_dev_starts_a_node_again(tmp_path: Path) -> None:
    """With --restart a node that was killed comes back, and has what was written meanwhile."""
    with dev(tmp_path / "dev", "--nodes", "3", "--restart") as (process, nodes):
        assert process.stdout is not None
        os.kill(nodes[0]["pid"], signal.SIGKILL)
        on(nodes[1]["url"] + "," + nodes[2]["url"], "mkdir", "/meanwhile")
        events = [json.loads(process.stdout.readline())["event"] for _ in range(2)]
        assert events == ["died", "started"]
        names = [entry["name"] for entry in on(nodes[0]["url"], "ls", "--json").json]
        assert names == ["meanwhile"]


# --- failures --------------------------------------------------------------------------------------


def test_a_put_survives_the_leader(tmp_path: Path) -> None:
    """The leader is killed while a put runs through another node: the put ends well, and all nodes agree in the end."""
    source = tmp_path / "big"
    source.write_bytes(os.urandom(1 << 20) * (BIG >> 20))
    with running(founded(tmp_path / "dev")) as nodes:
        first = leader(urls(nodes))
        victim = nodes[first - 1]
        others = [node for node in nodes if node is not victim]
        before = status(others[0].url)[0]["nodes"][0]["position"]
        putting = start(NOWHERE, "--node", others[0].url, "put", source, "--name", "/big")
        eventually("it is under way", lambda: status(others[1].url)[0]["nodes"][0]["position"] > before + 3)
        victim.kill()
        assert finish(putting).status == 0
        new = leader(urls(others))
        assert new != first
        found = {node["id"]: node["role"] for node in status(others[0].url)[0]["nodes"]}
        assert found[first] == "unreachable"
        nodes[first - 1] = serve(victim.data)
        eventually("all agree", lambda: agreed(others[0].url, 3))
        assert _fetched(nodes[first - 1].url, "/big", tmp_path).read_bytes() == source.read_bytes()


def test_a_put_survives_the_node_it_goes_through(tmp_path: Path) -> None:
    """The node that reads the file is killed: the command goes on with the next one, and nothing is there twice."""
    source = tmp_path / "big"
    source.write_bytes(os.urandom(1 << 20) * (BIG >> 20))
    with running(founded(tmp_path / "dev")) as nodes:
        first = nodes[leader(urls(nodes)) % 3]  # one that does not lead
        others = [node for node in nodes if node is not first]
        before = status(others[0].url)[0]["nodes"][0]["position"]
        through = ",".join(node.url for node in (first, *others))
        putting = start(NOWHERE, "--node", through, "put", source, "--name", "/big", "--json")
        eventually("it is under way", lambda: status(others[1].url)[0]["nodes"][0]["position"] > before + 3)
        first.kill()
        done = finish(putting)
        assert done.status == 0, done.err
        assert on(others[0].url, "stat", "/big", "--json").json["id"] == done.json["id"]
        assert _fetched(others[1].url, "/big", tmp_path).read_bytes() == source.read_bytes()
        eventually("the half is gone", lambda: on(others[0].url, "ls", "--unnamed", "--json").json == [])


def test_without_a_quorum(tmp_path: Path) -> None:
    """Alone of three, a node refuses writes and fresh reads with 7, and shows what it has when asked for that."""
    with running(founded(tmp_path / "dev")) as nodes:
        on(nodes[0].url, "mkdir", "/there")
        eventually("all agree", lambda: agreed(nodes[0].url, 3))
        nodes[0].kill()
        nodes[1].kill()
        alone = nodes[2].url
        writing = start(NOWHERE, "--node", alone, "mkdir", "/refused")
        reading = start(NOWHERE, "--node", alone, "ls")
        assert [entry["name"] for entry in on(alone, "ls", "--stale", "--json").json] == ["there"]
        # if it led, it takes an election's time to notice that nobody follows
        eventually("nobody leads", lambda: status(alone)[0]["leader"] is None)
        assert (finish(writing).status, finish(reading).status) == (7, 7)


# --- members ---------------------------------------------------------------------------------------


def test_members_come_and_go(tmp_path: Path) -> None:
    """A fourth node is invited, added and has everything; another is removed; leadership goes where it is told."""
    with running(founded(tmp_path / "dev")) as nodes:
        for number in range(20):
            on(nodes[0].url, "mkdir", f"/d{number}")
        data = tmp_path / "dev" / "node-4"
        invited = execute(
            nodes[0].data, "cluster", "invite", "4", "--out", data / "tls", "--host", "127.0.0.1", "--json"
        )
        assert invited.status == 0, invited.err
        fourth = serve(data, "--listen", "127.0.0.1:0")
        nodes.append(fourth)
        assert fourth.ready["node"] == 4
        on(nodes[1].url, "cluster", "add", fourth.ready["peer"], "--id", "4")
        eventually("four agree", lambda: agreed(nodes[0].url, 4))
        assert len(on(fourth.url, "ls", "--json").json) == 20
        on(nodes[2].url, "cluster", "transfer-leader", "4")
        assert leader(nodes[0].url) == 4
        on(nodes[0].url, "cluster", "remove", "3")
        assert [each["id"] for each in status(nodes[0].url)[0]["nodes"]] == [1, 2, 4]
        on(nodes[0].url, "cluster", "remove", "4")
        assert leader(nodes[0].url) in (1, 2)
        on(nodes[1].url, "mkdir", "/after")
        assert execute(NOWHERE, "--node", nodes[0].url, "cluster", "transfer-leader", "3").status == 3


def test_a_rolling_restart(tmp_path: Path) -> None:
    """All three nodes are restarted one after another under a writer of which no command fails, and none acts twice."""
    with running(founded(tmp_path / "dev")) as nodes:
        with Writer(urls(nodes), "/w") as writer:
            for number in (0, 1, 2):
                writer.wait(3)
                stopped = nodes[number].stop()
                assert stopped.status == 0
                writer.wait(3)
                nodes[number] = serve(nodes[number].data)
            writer.wait(3)
        assert writer.failed() == []
        names = [entry["name"] for entry in on(nodes[2].url, "ls", "/w", "--json").json]
        assert names == writer.written
        assert on(nodes[0].url, "ls", "--unnamed", "--json").json == []
        eventually("all agree", lambda: agreed(nodes[0].url, 3))


def test_a_store_grows_into_a_cluster(tmp_path: Path, random_file: Path) -> None:
    """A store with content becomes three nodes while a writer goes on; its content is on all of them."""
    data = tmp_path / "node-1"
    with space.open(data) as store:
        store.put(random_file.read_bytes(), name="/old/random")
    nodes = [serve(data, "--listen", "127.0.0.1:0")]
    # ports are given, not chosen anew, so that a node that starts again is found
    try:
        with Writer(nodes[0].url, "/w") as writer:
            for number in (2, 3):
                writer.wait(2)
                home = tmp_path / f"node-{number}"
                execute(data, "cluster", "invite", str(number), "--out", home / "tls", "--host", "127.0.0.1")
                nodes.append(serve(home, "--listen", "127.0.0.1:0"))
                on(nodes[0].url, "cluster", "add", nodes[-1].ready["peer"], "--id", str(number))
            writer.wait(2)
        assert writer.failed() == []
        eventually("all agree", lambda: agreed(nodes[0].url, 3))
        for node in nodes:
            assert _fetched(node.url, "/old/random", tmp_path).read_bytes() == random_file.read_bytes()
            assert [entry["name"] for entry in on(node.url, "ls", "/w", "--json").json] == writer.written
    finally:
        for node in nodes:
            node.stop()


def test_several_shards(tmp_path: Path, random_file: Path) -> None:
    """With four shards, capsules without a name are spread, found by their id through any node, and collected."""
    with running(founded(tmp_path / "dev", "--shards", "4")) as nodes:
        ids = [on(nodes[n % 3].url, "put", random_file).out.strip() for n in range(8)]
        named = on(nodes[0].url, "put", random_file, "--name", "/named").out.strip()
        for number, capsule in enumerate([*ids, named]):
            assert _fetched(nodes[number % 3].url, capsule, tmp_path).read_bytes() == random_file.read_bytes()
        unnamed = [entry["id"] for entry in on(nodes[1].url, "ls", "--unnamed", "--json").json]
        assert sorted(unnamed) == sorted(ids)
        shards = status(nodes[0].url)
        assert [shard["shard"] for shard in shards] == [0, 1, 2, 3]
        assert len({shard["nodes"][0]["position"] for shard in shards}) > 1
        for capsule in ids:
            on(nodes[2].url, "rm", capsule)
        assert on(nodes[0].url, "ls", "--unnamed", "--json").json == []
        assert on(nodes[0].url, "gc", "--dry-run", "--json").json["dry_run"] is True
        assert on(nodes[0].url, "verify", "--json").json["findings"] == []


# --- https -----------------------------------------------------------------------------------------


def test_https_asks_for_a_certificate(tmp_path: Path, random_file: Path) -> None:
    """A client of the cluster's authority can put, get and list over https; nobody else gets an answer."""
    with dev(tmp_path / "dev", "--nodes", "1") as (_, (node,)):
        mine, other = tmp_path / "mine", tmp_path / "other"
        invited = execute(Path(node["data"]), "cluster", "invite", "--client", "me", "--out", mine)
        assert invited.status == 0, invited.err
        url = node["http"]
        assert url.startswith("https://")
        put = execute(NOWHERE, "--node", url, "--certificate", mine, "put", random_file, "--name", "/r")
        assert put.status == 0, put.err
        got = execute(NOWHERE, "--node", url, "--certificate", mine, "get", "/r", "-o", tmp_path / "got")
        assert got.status == 0, got.err
        assert (tmp_path / "got").read_bytes() == random_file.read_bytes()
        listed = execute(NOWHERE, "--node", url, "--certificate", mine, "ls", "--json")
        assert [entry["name"] for entry in listed.json] == ["r"]
        again = execute(NOWHERE, "--node", url, "--certificate", mine, "put", random_file, "--name", "/r")
        assert again.status == 4
        assert execute(NOWHERE, "--node", url, "ls").status == 2
        with dev(tmp_path / "dev2", "--nodes", "1") as (_, (stranger,)):
            execute(Path(stranger["data"]), "cluster", "invite", "--client", "me", "--out", other)
        refused = execute(NOWHERE, "--node", url, "--certificate", other, "ls")
        assert refused.status == 7
        assert refused.out == ""


# --- mounts ----------------------------------------------------------------------------------------


@pytest.mark.requires("/dev/fuse", "fusermount3", "py:pyfuse3")
def test_a_mount_stays_through_a_failover(tmp_path: Path) -> None:
    """A file is written through the mount of a follower while the leader is killed: it is whole, and on all nodes."""
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    for number in range(20):
        (source / "deep" / f"f{number}").write_bytes(os.urandom(10_000))
    (source / "big").write_bytes(os.urandom(1 << 20) * (BIG >> 20))
    target = tmp_path / "mnt"
    with running(founded(tmp_path / "dev")) as nodes:
        first = leader(urls(nodes))
        follower, other = (node for node in nodes if node.ready["node"] != first)
        made = execute(follower.data, "project", "mount", "--path", "/", "--target", target, "--background")
        assert made.status == 0, made.err
        assert made.json["pid"] == follower.process.pid
        try:
            second = execute(
                follower.data, "project", "mount", "--path", "/", "--target", tmp_path / "m2", "--background"
            )
            assert second.status == 4
            copying = subprocess.Popen(["cp", "-r", f"{source}/.", target])
            eventually(
                "it is under way",
                lambda: (target / "big").exists() and (target / "big").stat().st_size > 1 << 20,
            )
            nodes[first - 1].kill()
            assert copying.wait() == 0
            subprocess.run(["diff", "-r", source, target], check=True)
            (view,) = execute(follower.data, "project", "ls", "--json").json
            assert (view["state"], view["target"]) == ("running", str(target))
            exported = tmp_path / "exported"
            on(other.url, "export", "/", exported)
            subprocess.run(["diff", "-r", source, exported], check=True)
        finally:
            ended = execute(follower.data, "project", "stop", target)
        assert ended.status == 0, ended.err
        assert follower.process.poll() is None
        assert f" {target} " not in Path("/proc/self/mountinfo").read_text()


@pytest.mark.requires("/dev/fuse", "fusermount3", "py:pyfuse3")
def test_a_node_mounts_when_it_starts(tmp_path: Path) -> None:
    """A node with --mount mounts the tree, and nothing is left mounted when the node ends."""
    target = tmp_path / "mnt"
    node = serve(tmp_path / "data", "--listen", "127.0.0.1:0", "--mount", f"{target}=/")
    try:
        (target / "made").write_text("through the mount")
        assert on(node.url, "get", "/made").out == "through the mount"
    finally:
        stopped = node.stop()
    assert stopped.status == 0
    assert f" {target} " not in Path("/proc/self/mountinfo").read_text()


# --- what a node refuses ---------------------------------------------------------------------------


def test_a_node_keeps_being_who_it_is(tmp_path: Path) -> None:
    """Options that contradict a node's directory end with 2, and its directory is not opened by two processes."""
    data = tmp_path / "data"
    node = serve(data, "--listen", "127.0.0.1:0", "--insecure")
    try:
        assert execute(data, "serve").status == 7
    finally:
        node.stop()
    assert execute(data, "serve", "--shards", "2").status == 2
    assert execute(data, "serve", "--node-id", "7").status == 2
    assert execute(tmp_path / "new", "serve", "--insecure", "--listen", "0.0.0.0:0").status == 2
    assert execute(tmp_path / "new2", "serve", "--insecure", "--http", "0.0.0.0:0").status == 2


def test_calls_end_when_the_caller_goes(tmp_path: Path) -> None:
    """A client that is killed while it follows the log leaves nothing that keeps the node from ending."""
    node = serve(tmp_path / "data", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--insecure")
    try:
        for address in (node.url, node.ready["http"]):
            following = start(NOWHERE, "--node", address, "log", "--follow", "--json")
            assert following.stdout is not None
            assert json.loads(following.stdout.readline())["position"] == 1
            following.kill()
            finish(following)
    finally:
        stopped = node.stop()
    assert stopped.status == 0

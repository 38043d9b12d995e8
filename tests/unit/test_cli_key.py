"""``space key`` in this process: words, JSON, exit statuses; and through a process that has the store open."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import space
from space import cli
from space.control import ControlServer
from space.policy.model import Policy
from tests.cli_support import Outcome, keys

Run = Callable[..., Outcome]

SECRET = Policy.from_document({"encryption": "aes-256-gcm"})


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process, on a store with one encrypted capsule, /a, and a clone of it."""
    monkeypatch.setenv("SPACE_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("SPACE_NODE", raising=False)
    monkeypatch.delenv("SPACE_MASTER_KEY_FILE", raising=False)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with space.open(tmp_path / "data") as store:
        store.put(b"secret", name="/a", policy=SECRET)
        store.clone("/a", "/copy")

    def run(*arguments: str) -> Outcome:
        capfd.readouterr()
        status = cli.run(list(arguments))
        return Outcome(status, *capfd.readouterr())

    return run


def test_keys_are_listed(run: Run) -> None:
    """Master keys with how many keys each wraps, and each data key with its state and how many capsules use it."""
    found = run("key", "ls", "--json").json
    assert keys(found) == {"position", "file", "shared", "masters", "keys"}
    (master,), (key,) = found["masters"], found["keys"]
    assert keys(master) == {"master", "current", "keys"}
    assert keys(key) == {
        "key", "version", "state", "master", "encryption", "capsule", "capsules", "zone", "created", "destroyed",
    }  # fmt: skip
    assert (key["state"], key["master"], key["capsules"]) == ("usable", master["master"], 2)
    words = run("key", "ls")
    assert words.status == 0
    assert f"master key {master['master']}  current" in words.out
    assert f"{key['key']} usable" in words.out


def test_the_master_key_is_changed(run: Run) -> None:
    """The answer has the new master key and the one before, and whether that was erased; content is read as before."""
    before = run("key", "ls", "--json").json["masters"][0]["master"]
    found = run("key", "rotate", "--json").json
    assert keys(found) == {"position", "master", "before", "rewrapped", "file", "erased", "kept"}
    assert (found["before"], found["rewrapped"], found["erased"], found["kept"]) == (before, 1, True, [])
    assert run("get", "/a").out == "secret"
    words = run("key", "rotate")
    assert words.status == 0
    assert "wraps 1 data keys now" in words.out
    assert "is erased here" in words.out
    assert "where its backup is" in words.err


def test_capsules_get_other_data_keys(run: Run) -> None:
    """A capsule is encrypted again under another key; --sole is not about that."""
    before = run("key", "ls", "--json").json["keys"]
    (done,) = run("key", "rotate", "/a", "--json").json["capsules"]
    assert keys(done) == {"capsule", "key", "before", "bytes", "position"}
    assert (done["before"], done["bytes"]) == (before[0]["key"], 6)
    assert len(run("key", "ls", "--json").json["keys"]) == 2
    assert run("get", "/a").out == run("get", "/copy").out == "secret"
    assert "encrypted again, under key" in run("key", "rotate", "/a").out
    assert run("key", "rotate", "/a", "--sole").status == 2
    assert run("key", "rotate", "/none").status == 3


def test_destroying_asks_and_names_clones(run: Run) -> None:
    """Without --yes and anybody to ask: wrong usage; a clone: refused; then content is refused, and the rest works."""
    assert "--yes" in run("key", "destroy", "/a").complaint()
    assert run("key", "destroy", "/a").status == 2
    refused = run("key", "destroy", "/a", "--yes")
    assert refused.status == 5
    assert "--with-clones" in refused.complaint()
    assert run("get", "/a").out == "secret"
    found = run("key", "destroy", "/a", "--yes", "--with-clones", "--json").json
    assert keys(found) == {
        "position", "capsules", "keys", "master", "erased", "kept", "zones", "plain",
    }  # fmt: skip
    assert (len(found["capsules"]), len(found["keys"]), found["erased"]) == (2, 1, True)
    for name in ("/a", "/copy"):
        read = run("get", name)
        assert read.status == 5
        assert "was destroyed" in read.complaint()
    for words in (("stat", "/a"), ("ls",), ("log",), ("verify",), ("replay", "--verify"), ("digest",)):
        assert run(*words).status == 0, words
    assert run("key", "destroy", "/none", "--yes").status == 3


def test_what_is_not_reached_is_said(run: Run, tmp_path: Path) -> None:
    """Content from before it was encrypted stays readable, and destroying says whose."""
    with space.open(tmp_path / "data") as store:
        store.put(b"plain", name="/p")
        store.set_policy("/p", SECRET)
        store.write(store.resolve("/p"), 0, b"S")
    assert "NOT reached: what was stored before it was encrypted" in run("key", "destroy", "/p", "--yes").out


def test_a_running_process_is_asked(run: Run, tmp_path: Path) -> None:
    """A process that has the store open changes its keys itself, and reads on."""
    with space.open(tmp_path / "data") as store, ControlServer(store):
        assert run("key", "ls", "--json").json["keys"][0]["state"] == "usable"
        assert run("key", "rotate").status == 0
        assert store.get("/a") == b"secret"
        assert run("key", "destroy", "/a", "/copy", "--yes").status == 0
        assert run("get", "/a").status == 5

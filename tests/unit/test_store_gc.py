"""What gc gives back, and what can still be done with moments whose bytes it took."""

from __future__ import annotations

from pathlib import Path

import pytest

import space
from space.events import commands as cmd
from space.events.commands import Request
from space.policy.model import parse_policy


def test_reclaimed_bytes_are_refused_not_invented(tmp_path: Path) -> None:
    """Overwritten bytes without history are given back; their moment can neither be read nor cloned."""
    with space.open(tmp_path / "data") as store:
        put = store.put(
            bytes(range(256)) * 400, name="/f", policy=parse_policy("history: none\ncompression: none")
        )
        before = f"@{store.position}"
        store.write(put.id, 0, bytes(reversed(range(256))) * 400)
        assert store.gc(dry_run=True).frames == 2
        assert store.gc().bytes_given_back > 0
        assert store.gc().frames == 0
        assert store.get("/f") == bytes(reversed(range(256))) * 400
        with store.at(before) as past, pytest.raises(space.RefusedError, match="reclaimed"):
            past.get("/f")
        with pytest.raises(space.RefusedError, match="reclaimed"):
            store.clone("/f", "/g", at=before)
        assert [entry.name for entry in store.ls("/")] == [b"f"]
        assert store.verify().findings == []


def test_history_snapshots_and_clones_keep_their_bytes(tmp_path: Path) -> None:
    """Without a history policy nothing goes; with none, a snapshot and a clone still keep what they show."""
    with space.open(tmp_path / "data") as store:
        first, second = b"1" * 5000, b"2" * 5000
        kept = store.put(first, name="/kept")
        brief = store.put(
            first + b"brief", name="/brief", policy=parse_policy("history: none\ndedupe: false")
        )
        store.snapshot("/brief", "named")
        store.clone("/brief", "/copy")
        before = f"@{store.position}"
        for capsule in (kept.id, brief.id):
            store.write(capsule, 0, second + b"fresh")
        assert store.gc().frames == 0
        with store.at(before) as past, store.at("named") as named:
            assert past.get("/kept") == first
            assert named.get("/brief") == first + b"brief"
        assert store.get("/copy") == first + b"brief"
        store.drop_snapshot("named")
        store.rm("/copy")
        assert store.gc().frames > 0
        assert store.get("/kept") == second + b"fresh"


def test_small_frames_that_share_blocks_are_refused_too(tmp_path: Path) -> None:
    """Frames packed side by side lose only whole blocks: each is refused or still itself, none taken for damage."""
    policy = parse_policy("history: none\ncompression: none")
    with space.open(tmp_path / "data") as store:
        put = store.put(b"", name="/f", policy=policy)
        pieces = [bytes([number]) * 3000 for number in range(1, 9)]
        commands = [
            command
            for at, piece in enumerate(pieces)
            for command in store.encode_extents(put.id, at * 3000, piece, policy, 0)
        ]
        store.execute_all([Request(command) for command in commands])
        before = f"@{store.position}"
        store.write(put.id, 0, bytes(range(256)) * 100)
        assert store.gc().bytes_given_back > 0
        refused = 0
        with store.at(before) as past:
            for at, piece in enumerate(pieces):
                try:
                    assert past.get("/f", at * 3000 + 1000, 10) == piece[:10]
                except space.RefusedError:
                    refused += 1
        assert refused >= 6
        assert store.get("/f") == bytes(range(256)) * 100


FORGETFUL = parse_policy("history: none\ncompression: none")
FAITHFUL = parse_policy("history: all\ncompression: none")


def test_what_was_copied_is_kept_by_the_policy_of_the_copy(tmp_path: Path) -> None:
    """A range copied from a capsule without history to one that keeps all stays readable at every moment it showed."""
    with space.open(tmp_path / "data", segment_bytes=64 << 10) as store:
        brief = store.put(b"1" * 5000 + b"2" * 5000, name="/brief", policy=FORGETFUL).id
        kept = store.put(b"0" * 9000, name="/kept", policy=FAITHFUL).id
        store.execute(cmd.CopyRange(kept, 1000, brief, 2500, 5000))
        shown = store.get("/kept")
        assert shown == b"0" * 1000 + b"1" * 2500 + b"2" * 2500 + b"0" * 3000
        moment = f"@{store.position}"
        store.write(brief, 0, b"3" * 10_000)
        assert store.gc().frames == 0
        store.write(kept, 0, b"4" * 9000)
        store.rm("/brief")
        report = store.gc()
        assert report.capsules_purged == 1
        assert report.frames == 1  # what /brief had last and nobody got
        with store.at(moment) as past:
            assert past.get("/kept") == shown
        assert store.verify().findings == []
        assert store.replay(verify=True).equal


def test_what_was_copied_to_a_capsule_without_history_goes(tmp_path: Path) -> None:
    """Stored bytes shared by copying go with the last range that shows them."""
    with space.open(tmp_path / "data", segment_bytes=64 << 10) as store:
        one = store.put(b"1" * 8192, name="/one", policy=FORGETFUL).id
        two = store.create(parent=store.root, name=b"two", policy=FORGETFUL)
        store.execute(cmd.CopyRange(two, 0, one, 4096, 4096))
        store.rm("/one")
        assert store.gc().frames == 0
        assert store.get("/two") == b"1" * 4096
        store.execute(cmd.Deallocate(two, 0, 4096))
        assert store.gc().frames == 1


def test_what_a_clone_got_is_kept_by_its_own_policy(tmp_path: Path) -> None:
    """A clone that keeps all its history keeps what it got from a source that has none any more."""
    with space.open(tmp_path / "data", segment_bytes=64 << 10) as store:
        source = store.put(b"1" * 5000, name="/source", policy=FAITHFUL).id
        clone = store.clone("/source", "/clone")
        moment = f"@{store.position}"
        store.set_policy(source, FORGETFUL)
        store.write(clone, 0, b"2" * 5000)
        store.write(source, 0, b"3" * 5000)
        store.gc()
        with store.at(moment) as past:
            assert past.get("/clone") == b"1" * 5000

"""What gc gives back, and what can still be done with moments whose bytes it took."""

from __future__ import annotations

from pathlib import Path

import pytest

import space
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

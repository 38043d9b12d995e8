"""What can happen to the disk of a node: damage to do to the directory of one that is down, and a disk without room."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

from space.wal.segment_format import RECORD_HEADER_BYTES, RECORD_PREFIX

SEGMENTS: Final = ("--segment-bytes", str(1 << 20))
"""Options of a node: small segments, so that a short run has sealed ones."""


def fill(path: Path) -> Path:
    """Takes all the room there is on the file system below ``path``; removing the result gives it back."""
    balloon = path / "balloon"
    with balloon.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue
    return balloon


def segments(home: Path) -> list[Path]:
    """Segments of a log, oldest first."""
    return sorted((home / "wal").glob("*.seg"))


def flip(path: Path, rng: random.Random, *, first: int = 0, last: int | None = None, count: int = 1) -> None:
    """Turns over single bits of a file."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        for _ in range(count):
            at = rng.randrange(first, min(size, last or size))
            file.seek(at)
            (byte,) = file.read(1)
            file.seek(at)
            file.write(bytes([byte ^ 1 << rng.randrange(8)]))


def used(path: Path) -> int:
    """Where the bytes of a segment end that is not full."""
    return len(path.read_bytes().rstrip(b"\0"))


def delete_sealed(home: Path, rng: random.Random) -> str:
    """Takes a segment in the middle away."""
    victim = rng.choice(segments(home)[1:-1])
    victim.unlink()
    return victim.name


def delete_first(home: Path, rng: random.Random) -> str:
    """Takes the first segment away."""
    victim = segments(home)[0]
    victim.unlink()
    return victim.name


def delete_last(home: Path, rng: random.Random) -> str:
    """Takes the segment away that was written to."""
    victim = segments(home)[-1]
    victim.unlink()
    return victim.name


def lose_log(home: Path, rng: random.Random) -> str:
    """Takes every segment away."""
    for victim in segments(home):
        victim.unlink()
    return "all segments"


def rot_sealed(home: Path, rng: random.Random) -> str:
    """Turns over bits all over a sealed segment."""
    victim = rng.choice(segments(home)[:-1])
    flip(victim, rng, count=20)
    return victim.name


def rot_header(home: Path, rng: random.Random) -> str:
    """Turns over a bit in the header of a segment."""
    victim = rng.choice(segments(home))
    flip(victim, rng, last=64)
    return victim.name


def rot_record(home: Path, rng: random.Random) -> str:
    """Turns over a bit in the header of a record near the end, in a segment that is sealed: only starting needs it."""
    victim = segments(home)[-2]
    at = victim.read_bytes().index(RECORD_PREFIX, 64)
    flip(victim, rng, first=at, last=at + RECORD_HEADER_BYTES)
    return victim.name


def rot_last(home: Path, rng: random.Random) -> str:
    """Turns over bits in the segment that was written to: acknowledged batches among its last ones."""
    victim = segments(home)[-1]
    flip(victim, rng, last=used(victim), count=8)
    return victim.name


def rot_state(home: Path, rng: random.Random) -> str:
    """Turns over bits in the tables."""
    victim = home / "state" / "data.mdb"
    flip(victim, rng, count=20)
    return victim.name


def lose_state(home: Path, rng: random.Random) -> str:
    """Takes the tables away."""
    shutil.rmtree(home / "state")
    return "state"


DAMAGES: Final[tuple[Callable[[Path, random.Random], str], ...]] = (
    delete_sealed,
    delete_first,
    delete_last,
    lose_log,
    rot_sealed,
    rot_header,
    rot_record,
    rot_last,
    rot_state,
    lose_state,
)

"""Stored bytes of format version 1: they must stay readable for ever."""

from __future__ import annotations

import itertools
from pathlib import Path

from space.wal.faulty_disk import FaultyDisk
from space.wal.log import Log
from space.wal.segment_format import RecordKind

GOLDEN = Path(__file__).parents[1] / "golden" / "wal_v1.hex"
STORE = bytes(range(16))
RECORDS = [
    (RecordKind.BATCH, 1, 1, b"first", b""),
    (RecordKind.HARD_STATE, 1, 2, b"term 2", b""),
    (RecordKind.BATCH, 2, 2, b"second", b"payload"),
    (RecordKind.BATCH, 3, 2, b"third", b"x" * 4096),
    (RecordKind.BATCH, 4, 3, b"", b"last"),
]


def dump(image: dict[str, bytes]) -> str:
    """Files as text: offset, 32 bytes in hexadecimal, and how often they repeat; zeros are left out."""
    lines = []
    for path, content in sorted(image.items()):
        lines.append(f"file {path} {len(content)}")
        pieces = [content[at : at + 32] for at in range(0, len(content), 32)]
        at = 0
        for piece, run in itertools.groupby(pieces):
            count = len(list(run))
            if any(piece):
                lines.append(f"{at:08x} {piece.hex()} {count}")
            at += count * 32
    return "\n".join(lines) + "\n"


def load(text: str) -> dict[str, bytes]:
    """The files that :func:`dump` wrote down."""
    image: dict[str, bytearray] = {}
    content = bytearray()
    for line in text.splitlines():
        first, second, third = line.split()
        if first == "file":
            content = image[second] = bytearray(int(third))
        else:
            data = bytes.fromhex(second) * int(third)
            content[int(first, 16) : int(first, 16) + len(data)] = data
    return {path: bytes(content) for path, content in image.items()}


def write() -> dict[str, bytes]:
    """The files of the golden log, written anew."""
    disk = FaultyDisk()
    log = Log.open(disk, "/log", store_id=STORE, segment_bytes=8192)
    for position, (kind, _, term, metadata, payload) in enumerate(RECORDS):
        log.append(metadata, [payload] if payload else [], time_ns=1000 + position, term=term, kind=kind)
        log.sync()
    log.close()
    return disk.image()


def test_version_1_stays_readable() -> None:
    """The stored log opens and holds what was written into it when the format was made."""
    log = Log.open(
        FaultyDisk.from_image(load(GOLDEN.read_text())), "/log", store_id=STORE, segment_bytes=8192
    )
    assert log.recovery.clean
    infos = list(log.records(1, every_kind=True))
    assert [(info.kind, info.index, info.term, info.metadata) for info in infos] == [
        record[:4] for record in RECORDS
    ]
    assert [info.time_ns for info in infos] == [1000, 1001, 1002, 1003, 1004]
    for kind, index, _, _, payload in RECORDS:
        if kind is RecordKind.BATCH:
            assert log.read_payload(index, 0, len(payload)) == payload
    assert list(log.verify()) == []
    assert len(log.segments()) == 2


def test_version_1_is_still_written() -> None:
    """The same calls write the same bytes: a change of the format is a new version, never an accident."""
    assert dump(write()) == GOLDEN.read_text()

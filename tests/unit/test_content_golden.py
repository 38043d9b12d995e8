"""Stored bytes of version 1 of the frame format, which every later version has to read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from space.content.frames import pack_frames, unpack_frames
from tests.content_support import KEY, Log, policy, prose, texture

GOLDEN: Final = Path(__file__).parents[1] / "golden"


def fields(file: str) -> list[list[str]]:
    """The rows of a golden file: words separated by spaces; ``#`` starts a comment."""
    lines = (GOLDEN / file).read_text().splitlines()
    return [line.split() for line in lines if line and not line.startswith("#")]


def plain(name: str) -> bytes:
    """The content a golden row names: ``prose:300``, ``texture:300`` or ``zero:300``."""
    kind, _, length = name.partition(":")
    makers: dict[str, Callable[[int], bytes]] = {"prose": prose, "texture": texture, "zero": bytes}
    return makers[kind](int(length))


RECORDS: Final = fields("frames_records.txt")
STORED: Final = fields("frames_stored.txt")


@pytest.mark.parametrize("packed, values", [(row[0], row[1:]) for row in RECORDS])
def test_record_bytes(packed: str, values: list[str]) -> None:
    """A record of version 1 has these fields, and these fields make that record."""
    (ref,) = unpack_frames(bytes.fromhex(packed))
    shown = [
        *map(str, (ref.plain_length, ref.stored_length)),
        f"{ref.crc:08x}",
        f"{ref.codec:02x}",
        *map(str, (ref.flags, ref.key_version, ref.key_id, ref.payload_offset, ref.source_position)),
        ref.hash.hex(),
    ]
    assert shown == values
    assert pack_frames([ref]).hex() == packed


@pytest.mark.parametrize("compression, encryption, dedupe, content, packed, stored, wrapped", STORED)
def test_stored_bytes(
    compression: str, encryption: str, dedupe: str, content: str, packed: str, stored: str, wrapped: str
) -> None:
    """A frame stored by version 1 is read and verified, and written alike where no codec is involved."""
    log = Log()
    log.rows[KEY] = bytes.fromhex(wrapped)
    log.batches[1] = bytes.fromhex(stored.removeprefix("-"))
    (ref,) = unpack_frames(bytes.fromhex(packed))
    assert log.reader.read_frame(ref, 1, verify=True) == plain(content)
    position, written = log.write_one(plain(content), policy(compression, encryption, dedupe == "shared"))
    assert (written.codec, written.flags, written.plain_length) == (ref.codec, ref.flags, ref.plain_length)
    if ref.compression == 0:  # a codec's output may change with its version; what it reads may not
        assert log.batches[position].hex() == stored.removeprefix("-")
        assert written == ref

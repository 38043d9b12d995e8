"""Every byte of a small log, damaged one at a time."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator

import pytest

from space._errors import CorruptionError, StorageError
from space.wal.faulty_disk import FaultyDisk
from space.wal.log import Log
from space.wal.segment_reader import Damage

STORE = b"0123456789abcdef"
BATCHES = 9
OLD = "/log/00000000000000000001.seg"
NEW = "/log/00000000000000000007.seg"


def open_log(disk: FaultyDisk, *, read_only: bool = False) -> Log:
    """The log under test, in the smallest segments."""
    return Log.open(disk, "/log", store_id=STORE, segment_bytes=8192, read_only=read_only)


def payload(index: int) -> bytes:
    """A payload that tells batches apart."""
    return b"%d" % index * 700 if index % 3 else b""


def small_log(*, clean: bool) -> dict[str, bytes]:
    """Files of a log of two segments, all of it synced, and one payload reclaimed."""
    disk = FaultyDisk()
    log = open_log(disk)
    for index in range(1, BATCHES + 1):
        log.append(b"metadata %d" % index * 8, [payload(index)], time_ns=index)
        log.sync()
    if clean:
        log.close()
    image = disk.image()
    assert {OLD, NEW} == {path for path in image if path.endswith(".seg")}
    return image


def outcome(disk: FaultyDisk, *, read_only: bool = False) -> str:
    """What opening and reading all comes to: everything is there, or where the corruption is said to be."""
    try:
        log = open_log(disk, read_only=read_only)
        infos = list(log.records(1))
        assert [info.metadata for info in infos] == [b"metadata %d" % i * 8 for i in range(1, BATCHES + 1)]
        for info in infos:
            intact = log.read_payload(info.index, 0, info.payload_length) == payload(info.index)
            assert intact == log.check_payload(info.index)
            if not intact:
                return f"payload {info.index}"
    except CorruptionError as error:
        return error.segment if error.position > 0 else "nowhere"
    return "whole"


def offsets(content: bytes) -> Iterator[int]:
    """Every offset; of long runs of zeros, where all are alike, one in 64."""
    for offset in range(len(content)):
        if any(content[max(offset - 8, 0) : offset + 9]) or offset % 64 == 0:
            yield offset


@pytest.mark.parametrize("clean", [True, False])
def test_any_flipped_byte_is_harmless_or_named(clean: bool) -> None:
    """One byte of any file is inverted: all batches are there, or the error names that very file."""
    image = small_log(clean=clean)
    outcomes: dict[str, set[str]] = {path: set() for path in image}
    for path, content in image.items():
        for offset in offsets(content):
            damaged = bytearray(content)
            damaged[offset] ^= 0xFF
            outcomes[path].add(outcome(FaultyDisk.from_image({**image, path: bytes(damaged)})))
    payloads = {f"payload {index}" for index in range(1, BATCHES + 1) if payload(index)}
    assert outcomes.pop("/log/watermark") == {"whole"}
    for path in (OLD, NEW):
        found = outcomes.pop(path)
        assert {"whole", path.removeprefix("/log/")} < found
        assert found <= {"whole", path.removeprefix("/log/"), *payloads}
    assert all(found == {"whole"} for found in outcomes.values())  # sidecars


@pytest.mark.parametrize("clean", [True, False])
def test_any_truncation_is_harmless_or_named(clean: bool) -> None:
    """Any file ends early, at any byte: all batches are there, or the error names that very file."""
    image = small_log(clean=clean)
    for path, content in image.items():
        for size in offsets(content):
            found = outcome(FaultyDisk.from_image({**image, path: content[:size]}))
            assert found in {"whole", path.removeprefix("/log/")}


@pytest.mark.parametrize("clean", [True, False])
def test_any_missing_file_is_harmless_or_named(clean: bool) -> None:
    """A segment that is gone is named; the watermark and sidecars can be missed."""
    image = small_log(clean=clean)
    for path in image:
        rest = {other: content for other, content in image.items() if other != path}
        expected = path.removeprefix("/log/") if path.endswith(".seg") else "whole"
        assert outcome(FaultyDisk.from_image(rest)) == expected
        assert outcome(FaultyDisk.from_image(rest), read_only=True) == expected
    only_watermark = {"/log/watermark": image["/log/watermark"]}
    assert outcome(FaultyDisk.from_image(only_watermark)) == OLD.removeprefix("/log/")


def test_a_flip_and_a_lost_watermark_together_lose_nothing_silently() -> None:
    """Without a watermark, any flipped byte of a record that a later one vouches for is still named."""
    image = small_log(clean=False)
    del image["/log/watermark"]
    log = open_log(FaultyDisk.from_image(image))
    first, last = log._locate(7)[1], log._locate(BATCHES)[1]
    for offset in range(first, last):
        damaged = bytearray(image[NEW])
        damaged[offset] ^= 0xFF
        found = outcome(FaultyDisk.from_image({**image, NEW: bytes(damaged)}))
        assert found in {"whole", NEW.removeprefix("/log/"), "payload 7", "payload 8"}


def test_refusing_to_open_changes_nothing() -> None:
    """A corrupt log is left exactly as it was found, for repair or a second look."""
    image = small_log(clean=False)
    damaged = bytearray(image[NEW])
    damaged[4100] ^= 1
    image[NEW] = bytes(damaged)
    disk = FaultyDisk.from_image(image)
    with pytest.raises(CorruptionError):
        open_log(disk)
    assert disk.image() == image


def test_swapped_and_foreign_segments_are_refused() -> None:
    """A segment under another's name, or from another log of the same store, is not taken for this one."""
    image = small_log(clean=False)
    other = FaultyDisk()
    log = open_log(other)
    for _ in range(5):
        log.append(b"other history", [bytes(700)], time_ns=1)
    log.close()
    old, new, gap = OLD.removeprefix("/log/"), NEW.removeprefix("/log/"), "00000000000000000005.seg"
    for damaged, named in (
        ({**image, OLD: image[NEW]}, old),
        ({**image, NEW: image[OLD]}, new),
        ({**image, OLD: other.image()[OLD]}, gap),  # the other one ends at 4
    ):
        assert outcome(FaultyDisk.from_image(damaged)) == named


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_every_single_operation_may_fail(number: int) -> None:
    """Operation by operation: the error is ours, and what was synced before or after it stays."""
    total = None
    at = 0
    while total is None or at <= total:
        at += 1
        disk = FaultyDisk(random.Random(at))
        disk.fail_at, disk.fail_with = at, number
        durable = 0
        try:
            log = open_log(disk)
            for index in range(1, BATCHES + 1):
                log.append(b"metadata %d" % index * 8, [payload(index)], time_ns=index)
                log.sync()
                durable = index
            log.punch(1, 0, 1)
            log.truncate_after(7)
            durable = min(durable, 7)
            log.close()
        except StorageError:
            durable = min(durable, 7)
        else:
            total = total or disk.operations
        for stop in (disk.kill, disk.crash):
            stop()
            log = open_log(disk)
            assert log.last_index >= durable
            assert [info.index for info in log.records(1)] == list(range(1, log.last_index + 1))
            durable = log.append(b"more", time_ns=100)
            log.sync()
        log = open_log(disk)
        assert {finding.what for finding in log.verify()} <= {Damage.PAYLOAD}
    assert total > 50

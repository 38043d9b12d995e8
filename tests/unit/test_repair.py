"""Damaged logs, healed from a peer's, on disks that lose power and fail."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from space._errors import CorruptionError, SpaceError, StorageError, UnavailableError
from space.wal import repair
from space.wal.disk import RealDisk
from space.wal.faulty_disk import FaultyDisk
from space.wal.log import Log
from space.wal.repair import RepairReport, SegmentHealth, heal, survey
from space.wal.segment_format import RecordInfo
from space.wal.segment_reader import Damage
from space.wal.shipping import Chunk, DivergenceError, GapError, read_chunk
from space.wal.watermark import WatermarkFile, WatermarkFlag

STORE = b"0123456789abcdef"
SEGMENT_BYTES = 16_384
LAST = 40


class PowerLossError(Exception):
    """The machine stops here."""


def open_log(disk: FaultyDisk, *, store_id: bytes = STORE) -> Log:
    """The log under test, in small segments."""
    return Log.open(disk, "/log", store_id=store_id, segment_bytes=SEGMENT_BYTES)


def fill(log: Log, count: int, seed: int = 1) -> None:
    """Appends batches of many sizes, synced now and then."""
    rng = random.Random(seed)
    for _ in range(count):
        payload = rng.randbytes(rng.choice((0, 1, 700, 700, 3000, 4096, 5000)))
        log.append(rng.randbytes(rng.randint(0, 200)), [payload], time_ns=log.last_time_ns + 2, term=3)
        if rng.random() < 0.3:
            log.sync()
    log.sync()


def log_image(*, clean: bool = True, count: int = LAST) -> dict[str, bytes]:
    """Files of a log that every replica has."""
    disk = FaultyDisk()
    log = open_log(disk)
    fill(log, count)
    log.close(clean=clean)
    return disk.image()


PEER = open_log(FaultyDisk.from_image(log_image()))
SEGMENTS = [f"/log/{segment.name}" for segment in PEER.segments()]
assert len(SEGMENTS) >= 5


def fetch(first: int, last: int, peer: Log = PEER) -> Iterator[Chunk]:
    """What a peer sends, in small chunks."""
    while first <= last:
        chunk = read_chunk(peer, first, stop=last + 1, bytes_max=6000, reclaimed=lambda _info, _payload: True)
        yield chunk
        first = chunk.last_index + 1


def never(first: int, last: int) -> Iterator[Chunk]:
    """A peer that must not be asked."""
    raise AssertionError((first, last))


def mend(disk: FaultyDisk, last: int = LAST, segment_bytes: int = SEGMENT_BYTES) -> RepairReport:
    """Heals from the peer."""
    return heal(disk, "/log", STORE, fetch, last=last, segment_bytes=segment_bytes)


def look(disk: FaultyDisk) -> list[SegmentHealth]:
    """Surveys the log."""
    return survey(disk, "/log", STORE)


def assert_whole(disk: FaultyDisk, peer: Log = PEER) -> None:
    """The log opens, is the peer's, and nothing is wrong with it."""
    assert all(not each.damage for each in look(disk))
    log = open_log(disk)
    assert (log.last_index, log.last_chain) == (peer.last_index, peer.last_chain)
    assert list(log.verify()) == []
    assert list(log.batches(1)) == list(peer.batches(1))
    log.append(b"next", time_ns=log.last_time_ns)
    log.sync()
    log.close()
    assert open_log(disk).last_index == peer.last_index + 1


def damaged(image: dict[str, bytes], path: str, offset: int) -> dict[str, bytes]:
    """The same files with one byte inverted."""
    content = bytearray(image[path])
    content[offset] ^= 0xFF
    return {**image, path: bytes(content)}


def zeroed(image: dict[str, bytes], path: str, start: int, end: int) -> dict[str, bytes]:
    """The same files with a range of one that reads as zeros."""
    content = bytearray(image[path])
    content[start:end] = bytes(len(content[start:end]))
    return {**image, path: bytes(content)}


def without(image: dict[str, bytes], *paths: str) -> dict[str, bytes]:
    """The same files but these."""
    return {path: content for path, content in image.items() if path not in paths}


@pytest.mark.parametrize("clean", [True, False])
def test_a_whole_log_is_left_alone(clean: bool) -> None:
    """A survey finds nothing, healing asks nobody and changes nothing."""
    image = log_image(clean=clean)
    disk = FaultyDisk.from_image(image)
    found = look(disk)
    assert [each.name for each in found] == [path.removeprefix("/log/") for path in SEGMENTS]
    assert [each.last_index for each in found[:-1]] == [each.first_index - 1 for each in found[1:]]
    assert all(each.present and not each.damage and each.header and each.good for each in found)
    report = heal(disk, "/log", STORE, never, last=LAST, segment_bytes=SEGMENT_BYTES)
    assert report == RepairReport((), (), LAST, LAST)
    assert disk.image() == image


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("number", range(len(SEGMENTS)))
def test_damage_anywhere_in_a_segment_is_found_and_healed(number: int, clean: bool) -> None:
    """Headers, records, payload and seals of first, middle and last segments; the damaged file is kept."""
    image, path = log_image(clean=clean), SEGMENTS[number]
    used = PEER.segments()[number].size
    rng = random.Random(number)
    offsets = {0, 16, 50, 4096, 4200, used - 120, used - 1, *(rng.randrange(4096, used) for _ in range(25))}
    healed = 0
    for offset in sorted(offsets):
        broken = damaged(image, path, offset)
        disk = FaultyDisk.from_image(broken)
        sick = [each for each in look(disk) if each.damage]
        assert {f"/log/{each.name}" for each in sick} <= {path}
        report = mend(disk)
        assert_whole(disk)
        if sick:
            healed += 1
            assert report.kept == (f"damaged/{path.removeprefix('/log/')}.damaged-1",)
            assert disk.image()[f"/log/{report.kept[0]}"] == broken[path]
        else:
            assert report.rebuilt == report.kept == ()  # padding
    assert healed >= 15


@pytest.mark.parametrize("mark", ["whole", "damaged", "missing"])
@pytest.mark.parametrize("gone", [[0], [2], [-1], [1, 2], [-2, -1], [0, 2, 4], range(len(SEGMENTS))])
def test_missing_segments_are_named_and_rebuilt(gone: list[int], mark: str) -> None:
    """One, several in a row, the last, all of them; with the watermark or without it."""
    image = without(log_image(), *(SEGMENTS[number] for number in gone))
    if mark == "damaged":
        image["/log/watermark"] = bytes(8192)
    elif mark == "missing":
        del image["/log/watermark"]
    disk = FaultyDisk.from_image({**image, "/log/other": b"not ours"})
    names = {f"/log/{each.name}" for each in look(disk) if Damage.MISSING in {d.what for d in each.damage}}
    assert names <= {SEGMENTS[number] for number in gone}
    assert names
    report = mend(disk)
    assert {f"/log/{name}" for name in report.rebuilt} >= names
    assert report.kept == ()
    assert_whole(disk)


def test_any_mixture_of_damage_is_healed() -> None:
    """Flipped, zeroed, cut, missing files in any number, the watermark and sidecars among them."""
    for seed in range(150):
        rng = random.Random(seed)
        image = log_image(clean=rng.random() < 0.5)
        for path in rng.sample(sorted(image), rng.randint(1, 6)):
            size = len(image[path])
            start = rng.randrange(size)
            choice = rng.choice(("flip", "zero", "header", "cut", "gone"))
            if choice == "flip":
                image = damaged(image, path, start)
            elif choice == "zero":
                image = zeroed(image, path, start, rng.randint(start, size))
            elif choice == "header":
                image = zeroed(image, path, 0, 4096)
            elif choice == "cut":
                image[path] = image[path][:start]
            else:
                del image[path]
        disk = FaultyDisk.from_image({**image, "/log/other": b""}, rng)
        report = mend(disk, segment_bytes=rng.choice((SEGMENT_BYTES, SEGMENT_BYTES, 10_000, 100_000)))
        assert report.last_index == LAST
        assert_whole(disk)
        for path in report.kept:
            name = path.removeprefix("damaged/")[:24]
            assert disk.image()[f"/log/{path}"] == image[f"/log/{name}"]


def test_a_log_that_is_only_too_short_is_refilled() -> None:
    """``last`` is reached, whatever the reason why the log ends before it; nothing of it is asked for again."""
    disk = FaultyDisk.from_image(log_image(count=25))
    asked = []

    def ask(first: int, last: int) -> Iterator[Chunk]:
        asked.append((first, last))
        return fetch(first, last)

    heal(disk, "/log", STORE, ask, last=LAST, segment_bytes=SEGMENT_BYTES)
    assert asked == [(26, LAST)]
    assert_whole(disk)


def test_a_last_segment_keeps_what_is_good_of_it() -> None:
    """Only what comes after the damage is fetched, and a log that had more than was asked for says so."""
    first = PEER.segments()[-1].first_index
    assert first < LAST - 2
    broken = damaged(log_image(), SEGMENTS[-1], PEER._locate(first + 2)[1] + 50)
    asked = []

    def ask(start: int, last: int) -> Iterator[Chunk]:
        asked.append((start, last))
        return fetch(start, last)

    disk = FaultyDisk.from_image(broken)
    report = heal(disk, "/log", STORE, ask, last=first + 2, segment_bytes=SEGMENT_BYTES)
    assert asked == [(first + 2, first + 2)]
    assert (report.last_index, report.promised) == (first + 2, LAST)
    log = open_log(disk)
    assert log.last_index == first + 2
    assert list(log.verify()) == []


def test_a_torn_tail_is_no_damage() -> None:
    """What was never acknowledged is left to the opening of the log."""
    disk = FaultyDisk(random.Random(3))
    log = open_log(disk)
    fill(log, 20)
    log.append(b"torn", [b"x" * 3000], time_ns=10**6)
    path, end = f"/log/{log.segments()[-1].name}", log.segments()[-1].size
    image = zeroed(disk.image(), path, end - 1000, end)
    disk = FaultyDisk.from_image(image)
    assert all(not each.damage for each in look(disk))
    assert heal(disk, "/log", STORE, never, last=20, segment_bytes=SEGMENT_BYTES).rebuilt == ()
    assert open_log(disk).last_index == 20


def test_an_interrupted_cut_stays_decided() -> None:
    """What a cut had dropped is not brought back as what the log holds; healing may reach beyond it."""
    image = log_image(clean=False)
    source = open_log(FaultyDisk.from_image(image))
    for keep in (PEER.segments()[2].first_index + 1, PEER.segments()[2].first_index - 1):
        end = source._end_after(keep)
        disk = FaultyDisk.from_image(image)
        mark = WatermarkFile(disk.open("/log/watermark"), STORE)
        mark.write(keep, end.segment, end.end, end.chain, WatermarkFlag.CUTTING)
        cut = disk.image()
        found = look(disk)
        assert found[-1].good is not None
        assert found[-1].good.first_index == keep + 1
        assert not any(each.damage for each in found)
        for last in (keep, LAST):
            disk = FaultyDisk.from_image(damaged(cut, f"/log/{found[-1].name}", 4150))
            assert mend(disk, last).last_index == last
            log = open_log(disk)
            assert log.last_index == last
            assert list(log.verify()) == []


# -- payload that was reclaimed ------------------------------------------------------------------------


def test_reclaimed_payload_is_no_damage_to_who_knows() -> None:
    """With a judge such segments are whole; without one they are rebuilt, and holes of the peer stay holes."""
    disk, peer_disk = FaultyDisk(), FaultyDisk()
    logs = [open_log(disk), open_log(peer_disk)]
    payload = random.Random(1).randbytes(9000)
    for log in logs:
        for _ in range(8):
            log.append(b"meta", [payload], time_ns=1)
        for index in (1, 5, 8):
            log.punch(index, 0, 4096)
        log.close()
    peer = open_log(peer_disk)

    def judge(info: RecordInfo, left: bytes) -> bool:
        return info.index in {1, 5, 8} and left[4096:] == payload[4096:]

    def ask(first: int, last: int) -> Iterator[Chunk]:
        return fetch(first, last, peer)

    assert [each.first_index for each in look(disk) if each.damage] == [1, 5, 8]
    assert not any(each.damage for each in survey(disk, "/log", STORE, reclaimed=judge))
    image = disk.image()
    heal(disk, "/log", STORE, never, last=8, segment_bytes=SEGMENT_BYTES, reclaimed=judge)
    assert disk.image() == image
    # A lost watermark would make an opening take the last payload for torn.
    disk.unlink("/log/watermark")
    heal(disk, "/log", STORE, never, last=8, segment_bytes=SEGMENT_BYTES, reclaimed=judge)
    for path in ("/log/00000000000000000001.seg", f"/log/{peer.segments()[-1].name}"):
        disk.flip(path, 4120, 1)
    report = heal(disk, "/log", STORE, ask, last=8, segment_bytes=SEGMENT_BYTES, reclaimed=judge)
    assert len(report.rebuilt) == 2
    log = open_log(disk)
    assert log.last_chain == peer.last_chain
    assert list(log.stored(1)) == list(peer.stored(1))
    assert sorted({finding.index for finding in log.verify()}) == [1, 5, 8]


# -- peers that are no help ----------------------------------------------------------------------------


def other_history() -> Log:
    """A log with other batches from the tenth on."""
    log = open_log(FaultyDisk.from_image(log_image()))
    log.truncate_after(9)
    fill(log, 40, seed=5)
    return log


@pytest.mark.parametrize("number", [0, 2, len(SEGMENTS) - 1])
def test_a_peer_with_another_history_changes_nothing(number: int) -> None:
    """Batches that do not come out at what is whole here are refused, and nothing is replaced or left behind."""
    peer = other_history()
    first = PEER.segments()[number].first_index
    broken = damaged(log_image(), SEGMENTS[number], PEER._locate(max(first, 11) if number else 3)[1] + 50)
    disk = FaultyDisk.from_image(broken)
    if number == 0:
        assert PEER.segments()[0].last_index < 9
        peer.truncate_after(1)
        fill(peer, 40, seed=6)
    with pytest.raises(DivergenceError):
        heal(disk, "/log", STORE, lambda a, b: fetch(a, b, peer), last=LAST, segment_bytes=SEGMENT_BYTES)
    assert disk.image() == broken
    with pytest.raises(CorruptionError):
        list(open_log(disk).batches(1))


def test_a_peer_that_ends_too_early_skips_or_is_lost_changes_nothing() -> None:
    """Each has its own error; the log is as it was."""
    broken = without(log_image(), SEGMENTS[1])
    first = PEER.segments()[1].first_index

    def lost(_first: int, _last: int) -> Iterator[Chunk]:
        raise ConnectionResetError(errno.ECONNRESET, "gone")

    for ask, error in (
        (lambda a, b: fetch(a, b - 1), UnavailableError),
        (lambda _a, _b: iter(()), UnavailableError),
        (lambda a, b: fetch(a + 1, b), GapError),
        (lambda a, b: fetch(a - 1, b), GapError),
        (lost, UnavailableError),
    ):
        disk = FaultyDisk.from_image(broken)
        with pytest.raises(error):
            heal(disk, "/log", STORE, ask, last=LAST, segment_bytes=SEGMENT_BYTES)
        assert disk.image() == broken
    assert first > 1


def test_another_stores_log_is_not_touched() -> None:
    """A sound segment of another store means a wrong directory, not damage."""
    image = log_image()
    disk = FaultyDisk.from_image(image)
    for action in (survey, lambda d, w, s: heal(d, w, s, never, last=9, segment_bytes=SEGMENT_BYTES)):
        with pytest.raises(CorruptionError, match="another store"):
            action(disk, "/log", bytes(16))
    assert disk.image() == image


# -- disks that are no help ----------------------------------------------------------------------------

SCENES = {
    "sealed": lambda image: damaged(image, SEGMENTS[1], 4150),
    "missing": lambda image: without(image, SEGMENTS[1], SEGMENTS[2]),
    "last": lambda image: damaged(image, SEGMENTS[-1], 4150),
    "last two": lambda image: damaged(without(image, SEGMENTS[-1]), SEGMENTS[-2], 4150),
    "end without watermark": lambda image: without(image, SEGMENTS[-1], SEGMENTS[-2], "/log/watermark"),
    "end that looks torn": lambda image: damaged(
        without(image, SEGMENTS[1], "/log/watermark"), SEGMENTS[-1], PEER._locate(LAST)[1] + 50
    ),
    "headers": lambda image: damaged(damaged(image, SEGMENTS[2], 20), SEGMENTS[3], 20),
}


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("segment_bytes", [SEGMENT_BYTES, 10_000])
def test_a_power_loss_at_any_operation_leaves_a_log_that_can_be_healed(
    scene: str, segment_bytes: int
) -> None:
    """And until it is healed, opening it refuses: no acknowledged batch is ever missing from a log that opens."""
    broken = SCENES[scene](log_image(clean=False))
    at, done, refused = 0, False, 0
    while not done:
        at += 1
        rng = random.Random(at)
        disk = FaultyDisk.from_image(broken, rng)

        def hook(_operation: str, _path: str, disk: FaultyDisk = disk, at: int = at) -> None:
            if disk.operations == at:
                raise PowerLossError

        disk.hook = hook
        try:
            mend(disk, segment_bytes=segment_bytes)
            done = True
        except PowerLossError:
            pass
        disk.hook = None
        disk.crash()
        try:
            log = open_log(FaultyDisk.from_image(disk.image()))
            assert log.last_index == LAST
        except CorruptionError:
            refused += 1
            assert not done
        mend(disk, segment_bytes=segment_bytes)
        disk.crash()
        assert_whole(disk)
    assert at > 30
    assert refused > 0 or scene == "sealed"


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("scene", SCENES)
def test_any_operation_may_fail(scene: str, error: int) -> None:
    """A failing operation is one reported error, or damage like any other; healing again succeeds."""
    broken = SCENES[scene](log_image(clean=False))
    at, failed, done = 0, 0, False
    while not done:
        at += 1
        disk = FaultyDisk.from_image(broken, random.Random(at))
        disk.fail_at, disk.fail_with = at, error
        try:
            mend(disk)
            done = disk.operations < at
        except StorageError:
            failed += 1
        disk.fail_at = None
        mend(disk)
        assert_whole(disk)
    assert failed > 10


def test_unreadable_blocks_are_damage() -> None:
    """A file the disk cannot read any more is rebuilt, and what can be read of it is kept."""
    disk = FaultyDisk.from_image(log_image())

    def hook(operation: str, path: str) -> None:
        if operation == "pread" and path == SEGMENTS[1]:
            raise OSError(errno.EIO, "bad sector")

    disk.hook = hook
    assert [each.name for each in look(disk) if each.damage] == [SEGMENTS[1].removeprefix("/log/")]
    report = mend(disk)
    assert len(report.kept) == 1
    disk.hook = None
    assert_whole(disk)


def test_copies_of_damaged_files_are_never_overwritten() -> None:
    """Each healing keeps its own."""
    disk = FaultyDisk.from_image(log_image())
    kept = []
    for offset in (4150, 4160, 4170):
        disk.flip(SEGMENTS[1], offset, 1)
        before = disk.image()[SEGMENTS[1]]
        kept.append((mend(disk).kept[0], before))
    assert [path[-2:] for path, _ in kept] == ["-1", "-2", "-3"]
    for path, content in kept:
        assert disk.image()[f"/log/{path}"] == content


def test_a_real_disk_is_healed_too(tmp_path: Path) -> None:
    """The same on files of this machine, from nothing but an empty directory, and after damage."""
    where = str(tmp_path / "log")
    for step in range(3):
        if step == 1:
            (tmp_path / "log" / Path(SEGMENTS[0]).name).unlink()
        elif step == 2:
            with (tmp_path / "log" / Path(SEGMENTS[2]).name).open("r+b") as file:
                file.seek(4200)
                file.write(b"damage")
        report = heal(RealDisk(), where, STORE, fetch, last=LAST, segment_bytes=SEGMENT_BYTES)
        assert (len(report.rebuilt), len(report.kept)) == ((len(SEGMENTS), 0), (1, 0), (1, 1))[step]
        log = Log.open(RealDisk(), where, store_id=STORE, segment_bytes=SEGMENT_BYTES)
        assert (log.last_index, log.last_chain, list(log.verify())) == (LAST, PEER.last_chain, [])
        log.close()


def test_every_error_of_healing_is_one_users_meet() -> None:
    """Nothing but the project's own errors comes out, whatever the files are."""
    for seed in range(60):
        rng = random.Random(seed)
        image = {path: rng.randbytes(rng.randint(0, 9000)) for path in (*SEGMENTS[:3], "/log/watermark")}
        disk = FaultyDisk.from_image(image)
        try:
            mend(disk)
        except SpaceError:
            continue
        assert_whole(disk)


def test_the_names_of_unfinished_segments_are_no_segments() -> None:
    """What a healing was writing when it was interrupted is never read, and removed by the next."""
    image = {**log_image(), SEGMENTS[1] + repair._NEW: b"half", "/log/notes.new": b"not ours"}
    disk = FaultyDisk.from_image(image)
    assert open_log(disk).last_index == LAST
    mend(disk)
    assert SEGMENTS[1] + repair._NEW not in disk.image()
    assert "/log/notes.new" in disk.image()

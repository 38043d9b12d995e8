from __future__ import annotations

import errno
import itertools
import os
import random
import threading
from pathlib import Path

import pytest
from crc32c import crc32c

from space._errors import (
    ConflictError,
    CorruptionError,
    DiskFullError,
    NotFoundError,
    RefusedError,
    StorageError,
    UsageError,
)
from space.wal.disk import Disk, RealDisk
from space.wal.faulty_disk import FaultyDisk
from space.wal.log import Log
from space.wal.segment_format import METADATA_BYTES_MAX, RecordKind
from space.wal.segment_reader import Damage

STORE = b"0123456789abcdef"
SMALL = 16_384


@pytest.fixture(params=["real", "faulty"])
def disk(request: pytest.FixtureRequest) -> Disk:
    """Each implementation of the Protocol."""
    return RealDisk() if request.param == "real" else FaultyDisk()


@pytest.fixture
def where(disk: Disk, tmp_path: Path) -> str:
    """A directory that does not exist yet, on that disk."""
    return "/log" if isinstance(disk, FaultyDisk) else str(tmp_path / "log")


def open_log(disk: Disk, where: str = "/log", segment_bytes: int = SMALL, *, read_only: bool = False) -> Log:
    """The log under test, in small segments."""
    return Log.open(disk, where, store_id=STORE, segment_bytes=segment_bytes, read_only=read_only)


def fill(log: Log, count: int, payload_bytes: int = 600) -> None:
    """Append batches ``m1``, ``m2``, ... with a payload each, one every 10 ns."""
    for index in range(log.last_index + 1, log.last_index + 1 + count):
        log.append(b"m%d" % index, [bytes([index % 251]) * payload_bytes], time_ns=index * 10)


def test_a_new_log_is_empty(disk: Disk, where: str) -> None:
    """The first batch will be 1, linked to nothing."""
    log = open_log(disk, where)
    assert (log.first_index, log.last_index, log.durable_index, log.last_time_ns) == (1, 0, 0, 0)
    assert log.last_chain == bytes(32)
    assert list(log.records(1)) == []
    assert log.index_at_time(10**18) == 0
    log.close()


def test_batches_come_back_over_many_segments_and_openings(disk: Disk, where: str) -> None:
    """What was appended is read back, before and after closing, in any order."""
    log = open_log(disk, where)
    fill(log, 100)
    assert len(log.segments()) > 3
    log.close()
    log = open_log(disk, where)
    assert log.recovery.clean
    assert (log.last_index, log.durable_index) == (100, 100)
    fill(log, 20)
    assert [info.metadata for info in log.records(1)] == [b"m%d" % index for index in range(1, 121)]
    assert [info.index for info in log.records(31, 64)] == list(range(31, 64))
    for index in (1, 120, 60, 2, 100, 101):
        info = log.read(index)
        assert (info.index, info.time_ns, info.metadata) == (index, index * 10, b"m%d" % index)
        assert log.read_payload(index, 10, 5) == bytes([index % 251]) * 5
        assert log.check_payload(index)
    assert list(log.verify()) == []
    log.close()


def test_segments_tell_what_they_hold(disk: Disk, where: str) -> None:
    """Segments are contiguous, only the last is unsealed, and their sizes are on the disk."""
    log = open_log(disk, where)
    fill(log, 100)
    segments = log.segments()
    assert segments[0].first_index == 1
    assert segments[-1].last_index == 100
    for before, after in itertools.pairwise(segments):
        assert before.last_index + 1 == after.first_index
    assert [segment.sealed for segment in segments] == [True] * (len(segments) - 1) + [False]
    assert {segment.name for segment in segments} < set(disk.listdir(where))
    assert log.bytes_on_disk() >= sum(segment.size for segment in segments)


def test_large_payloads_start_at_a_block(tmp_path: Path) -> None:
    """A payload of a block or more is aligned in the file, and its location is where its bytes are."""
    log = open_log(RealDisk(), str(tmp_path / "log"))
    small, large = b"s" * 4095, random.Random(0).randbytes(50_000)
    log.append(b"x", [small], time_ns=1)
    log.append(b"y" * 5000, [large[:7], bytearray(large[7:40_000]), memoryview(large)[40_000:]], time_ns=1)
    assert log.payload_location(1)[1] % 8 == 0
    for index, content in ((1, small), (2, large)):
        descriptor, offset, length = log.payload_location(index)
        assert length == len(content)
        assert os.pread(descriptor, length, offset) == content
    assert log.payload_location(2)[1] % 4096 == 0


def test_wide_views_are_counted_in_bytes(disk: Disk, where: str) -> None:
    """A buffer whose items are wider than a byte is stored whole."""
    log = open_log(disk, where)
    log.append(b"", [memoryview(bytes(range(16))).cast("I")], time_ns=1)
    log.append(b"next", time_ns=1)
    assert log.read_payload(1, 0, 16) == bytes(range(16))
    assert log.read(2).metadata == b"next"


def test_a_record_larger_than_a_segment_gets_one_of_its_own(disk: Disk, where: str) -> None:
    """No size below the documented limit is refused."""
    log = open_log(disk, where)
    fill(log, 2)
    big = random.Random(1).randbytes(5 * SMALL)
    log.append(big, [big], time_ns=100)
    log.append(b"after", time_ns=100)
    log.close(clean=False)
    log = open_log(disk, where)
    assert log.read(3).metadata == big
    assert log.read_payload(3, 0, len(big)) == big
    assert log.read(4).metadata == b"after"


def test_marks_take_no_index(disk: Disk, where: str) -> None:
    """Other kinds lie between batches, are read on request, and fill segments without batches too."""
    log = open_log(disk, where)
    for number in range(60):
        log.append(b"%d" % number, [b"x" * 400], time_ns=1, kind=RecordKind.HARD_STATE)
    assert log.append(b"batch", time_ns=2) == 1
    assert log.append(b"mark", time_ns=3, kind=RecordKind.HARD_STATE, term=7) == 1
    assert log.last_term == 0
    log.close(clean=False)
    log = open_log(disk, where)
    assert [info.metadata for info in log.records(1)] == [b"batch"]
    infos = list(log.records(1, every_kind=True))
    assert [info.metadata for info in infos] == [b"%d" % number for number in range(60)] + [b"batch", b"mark"]
    assert (infos[-1].kind, infos[-1].term, infos[-1].index) == (RecordKind.HARD_STATE, 7, 1)


def test_wrong_appends_are_refused_and_change_nothing() -> None:
    """Time that goes back, sizes and numbers out of range, seals: an error, and the log as before."""
    log = open_log(FaultyDisk())
    fill(log, 3)
    with pytest.raises(ValueError, match="before"):
        log.append(b"", time_ns=29)
    for bad in (
        lambda: log.append(bytes(METADATA_BYTES_MAX + 1), time_ns=30),
        lambda: log.append(b"", [bytes(2**20)] * 257, time_ns=30),
        lambda: log.append(b"", time_ns=2**63),
        lambda: log.append(b"", time_ns=30, term=-1),
        lambda: log.append(b"", time_ns=30, kind=RecordKind.SEAL),
        lambda: log.sync(4),
        lambda: log.read_payload(3, 500, 101),
        lambda: log.read_payload(3, -1, 1),
        lambda: log.punch(3, 0, 10**9),
        lambda: Log.open(FaultyDisk(), "/x", store_id=b"short"),
        lambda: open_log(FaultyDisk(), segment_bytes=100),
        lambda: open_log(FaultyDisk(), segment_bytes=2**40),
    ):
        with pytest.raises(UsageError):
            bad()
    assert log.last_index == 3
    assert list(log.verify()) == []


def test_positions_outside_the_log_are_not_found() -> None:
    """Each read of a position that is not there says so; a range after the end is empty."""
    log = open_log(FaultyDisk())
    fill(log, 3)
    for index in (0, -1, 4):
        for read in (log.read, log.check_payload, log.time_ns, log.payload_location):
            with pytest.raises(NotFoundError):
                read(index)
    with pytest.raises(NotFoundError):
        log.records(0)
    with pytest.raises(NotFoundError):
        log.truncate_after(4)
    assert list(log.records(4)) == []
    assert list(log.records(3, 2)) == []


def test_index_at_time_finds_the_last_batch_not_after_it(disk: Disk, where: str) -> None:
    """Agrees with a linear search at and around every time, with several batches at one moment."""
    log = open_log(disk, where)
    times = sorted(random.Random(3).choices(range(100, 200), k=120))
    for time_ns in times:
        log.append(b"x" * 700, time_ns=time_ns)
    for moment in range(99, 202):
        assert log.index_at_time(moment) == sum(time_ns <= moment for time_ns in times)


def test_a_cut_log_goes_on_from_there(disk: Disk, where: str) -> None:
    """At any length: the rest is gone, also after opening, and new batches take its place."""
    for keep in (99, 60, 37, 36, 35, 1, 0):
        log = open_log(disk, where)
        log.truncate_after(0)
        fill(log, 100)
        chain = log.read(keep).chain if keep else bytes(32)
        log.truncate_after(keep)
        assert (log.last_index, log.durable_index, log.last_chain) == (keep, keep, chain)
        assert log.append(b"new", time_ns=log.last_time_ns) == keep + 1
        log.close(clean=keep % 2 == 0)
        log = open_log(disk, where)
        assert [info.metadata for info in log.records(1)] == [
            *(b"m%d" % index for index in range(1, keep + 1)),
            b"new",
        ]
        assert list(log.verify()) == []
        log.close()


def test_a_reader_under_way_is_told_of_a_cut() -> None:
    """An iteration that reaches what was cut ends in a conflict, not in a report of corruption."""
    log = open_log(FaultyDisk())
    fill(log, 100)
    reader = log.records(1)
    assert next(reader).index == 1
    log.truncate_after(10)
    with pytest.raises(ConflictError):
        list(reader)


def test_punching_gives_blocks_back_and_nothing_moves(disk: Disk, where: str) -> None:
    """Whole blocks of a payload become zeros; metadata, chain and neighbours stay verifiable."""
    log = open_log(disk, where)
    fill(log, 5, payload_bytes=20_000)
    before = log.bytes_on_disk()
    assert log.punch(2, 100, 19_000) == 3 * 4096
    assert log.punch(3, 0, 4000) == 0
    assert log.bytes_on_disk() == before - 3 * 4096
    assert log.read_payload(2, 4096, 12_288) == bytes(12_288)
    assert log.read_payload(2, 0, 4096) == b"\2" * 4096
    assert [log.check_payload(index) for index in range(1, 6)] == [True, False, True, True, True]
    assert [(finding.index, finding.what) for finding in log.verify()] == [(2, Damage.PAYLOAD)]
    log.close(clean=False)
    assert open_log(disk, where).last_index == 5


def test_a_punched_payload_is_not_mistaken_for_a_torn_one() -> None:
    """However old the watermark is after a power loss, reclaimed batches stay."""
    for seed in range(100):
        disk = FaultyDisk(random.Random(seed))
        log = open_log(disk, segment_bytes=2**17)
        fill(log, 5, payload_bytes=9000)
        log.punch(4, 0, 9000)
        disk.crash()
        assert open_log(disk).last_index >= 4


def test_a_read_only_log_changes_nothing(tmp_path: Path) -> None:
    """It reads past a torn tail without cutting it, refuses to write, and makes no log."""
    disk = RealDisk()
    where = str(tmp_path / "log")
    with pytest.raises(NotFoundError):
        open_log(disk, where, read_only=True)
    log = open_log(disk, where)
    fill(log, 3)
    log.close(clean=False)
    with (tmp_path / "log" / log.segments()[0].name).open("r+b") as file:
        file.seek(log.segments()[0].size)
        file.write(b"torn")
    before = {path: path.read_bytes() for path in (tmp_path / "log").iterdir()}
    log = open_log(disk, where, read_only=True)
    assert log.last_index == 3
    assert log.recovery.torn_bytes == 4
    for write in (
        lambda: log.append(b"", time_ns=99),
        log.sync,
        lambda: log.truncate_after(1),
        lambda: log.punch(1, 0, 1),
    ):
        with pytest.raises(RefusedError):
            write()
    log.close()
    assert {path: path.read_bytes() for path in (tmp_path / "log").iterdir()} == before


def test_a_torn_tail_is_cut_and_reported() -> None:
    """An unsynced record with a damaged byte is dropped with all after it, and the report says where."""
    disk = FaultyDisk()
    log = open_log(disk)
    fill(log, 3, payload_bytes=10)
    log.sync()
    end = log.segments()[0].size
    fill(log, 3, payload_bytes=10)
    disk.kill()
    disk.flip("/log/00000000000000000001.seg", end + 105, 0)
    log = open_log(disk)
    assert log.last_index == 3
    assert not log.recovery.clean
    assert (log.recovery.watermark, log.recovery.batches, log.recovery.torn_offset) == (3, 3, end)
    assert log.recovery.torn_segment == "00000000000000000001.seg"
    assert log.recovery.torn_bytes > 0
    assert disk.image()["/log/00000000000000000001.seg"][end:].count(0) == SMALL - end


def test_later_headers_prove_what_a_lost_watermark_cannot() -> None:
    """Without a watermark, damage below what a later record knew to be durable is still corruption."""
    disk = FaultyDisk()
    log = open_log(disk)
    fill(log, 5, payload_bytes=10)
    log.sync()
    second = log._place(2)[1].offset
    fill(log, 1, payload_bytes=10)
    disk.kill()
    disk.unlink("/log/watermark")
    disk.flip("/log/00000000000000000001.seg", second - 20, 3)
    with pytest.raises(CorruptionError) as caught:
        open_log(disk)
    assert (caught.value.segment, caught.value.position) == ("00000000000000000001.seg", 2)


def test_corruption_says_where_and_what_to_do() -> None:
    """The error names segment, offset and position, and a next step."""
    disk = FaultyDisk()
    log = open_log(disk)
    fill(log, 100)
    offset = log._locate(2)[1]
    log.close()
    disk.flip("/log/00000000000000000001.seg", offset + 3, 0)
    log = open_log(disk)
    with pytest.raises(CorruptionError) as caught:
        list(log.records(1))
    error = caught.value
    assert (error.segment, error.offset, error.position) == ("00000000000000000001.seg", offset, 2)
    assert "space verify" in str(error)


def test_verify_goes_on_after_damage() -> None:
    """Each damaged record, payload, seal and header is found in one pass, and progress is told."""
    disk = FaultyDisk()
    log = open_log(disk)
    fill(log, 100)
    places = {index: log._locate(index) for index in (2, 30, 31, 60)}
    log.sync()
    for index, inside in ((2, 3), (30, 60), (31, 106)):
        span, offset = places[index]
        disk.flip(f"/log/{span.segment.name}", offset + inside, 5)
    disk.flip(f"/log/{places[60][0].segment.name}", log._place(60)[1].offset + 5, 1)
    sealed = log.segments()[-2]
    disk.flip(f"/log/{sealed.name}", sealed.size - 50, 1)
    disk.flip(f"/log/{sealed.name}", 20, 1)
    steps: list[tuple[int, int]] = []
    found = [
        (finding.index, finding.what) for finding in log.verify(on_progress=lambda *step: steps.append(step))
    ]
    assert found == [
        (2, Damage.HEADER),
        (30, Damage.HEADER),
        (31, Damage.METADATA),
        (60, Damage.PAYLOAD),
        (sealed.first_index, Damage.SEGMENT_HEADER),
        (sealed.last_index, Damage.SEAL),
    ]
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1]


def test_a_missing_sidecar_is_rebuilt_silently(disk: Disk, where: str) -> None:
    """Sidecars are disposable: without or with garbage in them every read works, and they come back."""
    log = open_log(disk, where)
    fill(log, 100)
    log.close()
    names = [name for name in disk.listdir(where) if name.endswith(".idx")]
    assert len(names) == len(log.segments())
    for number, name in enumerate(names):
        if number % 2:
            disk.unlink(f"{where}/{name}")
        else:
            disk.open(f"{where}/{name}").pwritev([b"garbage"], 40)
    log = open_log(disk, where)
    assert [log.read(index).metadata for index in range(1, 101)] == [b"m%d" % i for i in range(1, 101)]
    log.close()
    assert sorted(name for name in disk.listdir(where) if name.endswith(".idx")) == sorted(names)


def test_a_store_refuses_another_stores_log(disk: Disk, where: str) -> None:
    """Segments carry the id of their store."""
    log = open_log(disk, where)
    fill(log, 3)
    log.close()
    with pytest.raises(CorruptionError, match="another store"):
        Log.open(disk, where, store_id=bytes(16), segment_bytes=SMALL)


def test_a_full_disk_stops_nothing_but_the_append() -> None:
    """ENOSPC is reported, earlier batches stand, and the log goes on once there is room."""
    disk = FaultyDisk(capacity=5 * SMALL)
    log = open_log(disk)
    with pytest.raises(DiskFullError):
        fill(log, 1000)
    count = log.last_index
    assert disk.free_bytes("/") < SMALL // 2  # although no whole segment fitted any more
    log.sync()
    assert log.durable_index == count
    with pytest.raises(DiskFullError):
        fill(log, 1000)
    assert [info.index for info in log.records(1)] == list(range(1, log.last_index + 1))
    disk.capacity *= 2
    fill(log, 30)
    log.close(clean=False)
    log = open_log(disk)
    assert log.last_index == count + 30
    assert list(log.verify()) == []


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_an_append_that_fails_leaves_the_log_as_it_was(number: int) -> None:
    """Whatever part was written: appending works afterwards, and no crash brings the failed one back."""
    disk = FaultyDisk(random.Random(5))
    log = open_log(disk)
    fill(log, 3)
    log.sync()
    for _ in range(5):
        disk.fail_at, disk.fail_with = disk.operations + 1, number
        with pytest.raises(DiskFullError if number == errno.ENOSPC else StorageError):
            log.append(b"refused", [b"r" * 3000], time_ns=99)
        assert log.last_index == 3
    fill(log, 1)
    log.sync()
    disk.crash()
    assert [info.metadata for info in open_log(disk).records(1)] == [b"m1", b"m2", b"m3", b"m4"]


def test_a_failed_sync_is_final() -> None:
    """After a failed fdatasync nothing is acknowledged any more until the log is opened again."""
    survivors = set()
    for seed in range(30):
        disk = FaultyDisk(random.Random(seed))
        log = open_log(disk)
        fill(log, 2)
        log.sync()
        fill(log, 2)
        disk.fail_at = disk.operations + 1
        with pytest.raises(StorageError):
            log.sync()
        for index in (None, 1):
            with pytest.raises(StorageError, match="reopen"):
                log.sync(index)
        with pytest.raises(StorageError, match="reopen"):
            log.append(b"", time_ns=10**6)
        assert log.durable_index == 2
        assert [info.index for info in log.records(1)] == [1, 2, 3, 4]
        log.close()
        log = open_log(disk)
        assert log.last_index == log.durable_index
        survivors.add(log.last_index)
        disk.crash()
        assert open_log(disk).last_index == log.last_index
    assert min(survivors) == 2
    assert max(survivors) == 4


def test_waiters_share_a_sync() -> None:
    """Threads that wait while one fdatasync runs are served by the next one, together."""
    disk = FaultyDisk()
    log = open_log(disk, segment_bytes=2**20)
    entered, proceed = threading.Event(), threading.Event()
    syncs = 0

    def hook(operation: str, path: str) -> None:
        nonlocal syncs
        if operation == "fdatasync" and path.endswith(".seg"):
            syncs += 1
            entered.set()
            assert proceed.wait(60)

    disk.hook = hook
    fill(log, 1)
    threads = [threading.Thread(target=log.sync)]
    threads[0].start()
    assert entered.wait(60)
    fill(log, 31)
    threads += [threading.Thread(target=log.sync, args=(index,)) for index in range(2, 33)]
    for thread in threads[1:]:
        thread.start()
    assert log.durable_index == 0
    proceed.set()
    for thread in threads:
        thread.join()
    assert log.durable_index == 32
    assert syncs == 2


def test_a_failed_sync_fails_all_who_wait_for_it() -> None:
    """Nobody is told durable when the shared fdatasync failed, neither its leader nor its followers."""
    disk = FaultyDisk()
    log = open_log(disk, segment_bytes=2**20)
    entered, proceed = threading.Event(), threading.Event()

    def hook(operation: str, _path: str) -> None:
        if operation == "fdatasync":
            entered.set()
            assert proceed.wait(60)
            raise OSError(errno.EIO, "test")

    failures: list[str] = []

    def wait() -> None:
        try:
            log.sync()
        except StorageError as error:
            failures.append(str(error))

    fill(log, 1)
    disk.hook = hook
    threads = [threading.Thread(target=wait) for _ in range(8)]
    threads[0].start()
    assert entered.wait(60)
    for thread in threads[1:]:
        thread.start()
    proceed.set()
    for thread in threads:
        thread.join()
    assert len(failures) == 8


def test_readers_and_syncers_run_beside_the_writer(tmp_path: Path) -> None:
    """One appending thread, many syncing and reading ones, over rotations: all see whole, linked batches."""
    log = open_log(RealDisk(), str(tmp_path / "log"), segment_bytes=2**16)
    done = threading.Event()
    problems: list[BaseException] = []

    def guard(work: object) -> threading.Thread:
        def run() -> None:
            rng = random.Random(0)
            try:
                while not done.is_set():
                    assert callable(work)
                    work(rng)
            except BaseException as problem:  # noqa: BLE001 - reported by the main thread
                problems.append(problem)

        return threading.Thread(target=run)

    def sync(rng: random.Random) -> None:
        index = rng.randint(0, log.last_index)
        log.sync(index)
        assert log.durable_index >= index

    def read(rng: random.Random) -> None:
        last = log.last_index
        if last:
            index = rng.randint(1, last)
            assert log.read(index).metadata == b"m%d" % index
            assert log.read_payload(index, 0, 600) == bytes([index % 251]) * 600

    def walk(_rng: random.Random) -> None:
        last = log.last_index
        assert [info.index for info in log.records(1, last + 1)] == list(range(1, last + 1))

    threads = [guard(work) for work in (sync, sync, sync, read, read, walk)]
    for thread in threads:
        thread.start()
    fill(log, 1500)
    done.set()
    for thread in threads:
        thread.join()
    assert problems == []
    assert len(log.segments()) > 10
    log.close()


def test_an_unused_rotation_leaves_nothing_behind() -> None:
    """A segment made by a rotation that then failed is removed, whichever step failed."""
    for step in range(1, 12):
        disk = FaultyDisk(random.Random(step))
        log = open_log(disk)
        while log.segments()[-1].size < SMALL - 800:
            fill(log, 1)
        log.sync()
        count = log.last_index
        disk.fail_at = disk.operations + step
        try:
            fill(log, 1)
        except StorageError:
            assert log.last_index == count
            fill_or_reopen(disk, log)
        disk.fail_at = None
        disk.crash()
        log = open_log(disk)
        assert log.last_index >= count
        fill(log, 40)
        names = [segment.name for segment in log.segments()]
        assert sorted(name for name in disk.listdir("/log") if name.endswith(".seg")) == names


def fill_or_reopen(disk: FaultyDisk, log: Log) -> None:
    """Append once more, as a store would after an error: here, or in a log opened again."""
    try:
        fill(log, 1)
    except StorageError:
        disk.kill()
        fill(open_log(disk), 1)


def test_open_files_are_bounded(tmp_path: Path) -> None:
    """Reading more segments than may be open at once works, with a bounded number of descriptors."""
    log = open_log(RealDisk(), str(tmp_path / "log"), segment_bytes=8192)
    fill(log, 600, payload_bytes=4000)
    assert len(log.segments()) == 300
    for index in [*range(1, 601), *range(600, 0, -1)]:
        assert log.read(index).index == index
    assert len(list(Path("/proc/self/fd").iterdir())) < 200
    log.close()


def test_a_closed_log_takes_nothing() -> None:
    """Closing twice is harmless; afterwards writing is refused."""
    log = open_log(FaultyDisk())
    fill(log, 1)
    log.close()
    log.close()
    with pytest.raises(RefusedError):
        log.append(b"", time_ns=100)


def test_a_disk_that_keeps_nothing_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where written bytes do not come back no log can be made; that is said, not tried for ever."""
    monkeypatch.setattr("space.wal.faulty_disk.FaultyFile.pwritev", lambda *_arguments: None)
    with pytest.raises(CorruptionError):
        open_log(FaultyDisk())


def refuse(disk: FaultyDisk, operations: set[str], name: str) -> None:
    """From now on, let these operations on this file fail."""

    def hook(operation: str, path: str) -> None:
        if operation in operations and path.endswith(name):
            raise OSError(errno.EIO, "test")

    disk.hook = hook


def test_leftovers_of_a_failed_append_are_zeroed_before_the_next() -> None:
    """Even if zeroing them at once failed as well, nothing lies after the tail once an append succeeds."""
    leftovers = 0
    for seed in range(20):
        disk = FaultyDisk(random.Random(seed))
        log = open_log(disk)
        fill(log, 3)
        name = log.segments()[0].name
        refuse(disk, {"pwritev", "zero_range"}, name)
        with pytest.raises(StorageError):
            log.append(b"refused", [b"r" * 3000], time_ns=99)
        leftovers += any(disk.image()[f"/log/{name}"][log.segments()[0].size :])
        disk.hook = None
        log.append(b"short", time_ns=99)
        assert not any(disk.image()[f"/log/{name}"][log.segments()[0].size :])
    assert leftovers > 10


def test_a_seal_proves_nothing_until_its_rotation_is_finished() -> None:
    """When its fdatasync failed it may have reached the disk without the records before it: they are cut."""
    kept = set()
    for seed in range(60):
        disk = FaultyDisk(random.Random(seed))
        log = open_log(disk)
        fill(log, 5)
        log.sync()
        refuse(disk, {"fdatasync"}, log.segments()[0].name)
        with pytest.raises(StorageError):
            fill(log, 20)
        disk.hook = None
        disk.kill()
        log = open_log(disk)
        kept.add(log.last_index)
        assert log.last_index >= 5
        assert [info.index for info in log.records(1)] == list(range(1, log.last_index + 1))
        assert list(log.verify()) == []
        fill(log, 20)
        log.sync()
        disk.crash()
        assert open_log(disk).last_index == log.last_index
    assert len(kept) > 3


def test_the_last_term_is_known_wherever_the_log_ends(disk: Disk, where: str) -> None:
    """After appends, rotations, cuts and openings, also if the last segment holds no batch."""
    log = open_log(disk, where)
    assert log.last_term == 0
    for index in range(1, 61):
        log.append(b"m", [b"p" * 600], time_ns=index, term=index // 7)
        assert log.last_term == index // 7
    first = log.segments()[-1].first_index
    assert first > 2
    for clean in (True, False):
        log.close(clean=clean)
        log = open_log(disk, where)
        assert log.last_term == 60 // 7
    assert [log.term(index) for index in range(1, 61)] == [index // 7 for index in range(1, 61)]
    for keep in (59, first, first - 1, first - 2, 1, 0):
        log.truncate_after(keep)
        assert log.last_term == keep // 7
        assert (log.last_index, log.durable_index) == (keep, keep)
        log.close()
        log = open_log(disk, where)
        assert log.last_term == keep // 7
    with pytest.raises(NotFoundError):
        log.term(1)


def test_the_last_term_is_read_from_the_segment_before_an_empty_one() -> None:
    """A last segment whose only batches were torn away has no term of its own."""
    disk = FaultyDisk()
    log = open_log(disk)
    while len(log.segments()) < 3:
        log.append(b"m", [b"p" * 600], time_ns=1, term=9)
    first = log.segments()[-1].first_index
    image = disk.image()
    path = f"/log/{log.segments()[-1].name}"
    image[path] = image[path][:4096].ljust(len(image[path]), b"\0")
    log = open_log(FaultyDisk.from_image(image))
    assert (log.last_index, log.last_term) == (first - 1, 9)
    log.append(b"next", time_ns=1, term=10)
    assert log.last_term == 10


def test_batches_come_with_their_payload(disk: Disk, where: str) -> None:
    """One, or many, with payload, are what was appended; a range ends where records() would."""
    log = open_log(disk, where)
    sizes = [0, 1, 700, 4095, 4096, 9000, 40_000] * 4
    rng = random.Random(4)
    payloads = [rng.randbytes(size) for size in sizes]
    for index, payload in enumerate(payloads, 1):
        log.append(b"m%d" % index, [payload], time_ns=index, term=2)
    found = list(log.batches(1))
    assert [payload for _, payload in found] == payloads
    assert [info for info, _ in found] == list(log.records(1))
    assert [info.index for info, _ in log.batches(5, 9)] == [5, 6, 7, 8]
    for index in (1, 28, 12):
        assert log.read_batch(index) == (log.read(index), payloads[index - 1])
    for stored, payload in zip(log.stored(1), payloads, strict=True):
        assert (stored.payload, stored.payload_crc, stored.intact) == (payload, crc32c(payload), True)
    for missing in (0, 29):
        with pytest.raises(NotFoundError):
            log.read_batch(missing)
    with pytest.raises(NotFoundError):
        log.batches(0)


def test_no_flipped_byte_of_a_batch_is_handed_out() -> None:
    """Every byte that a batch says something with is checked when it is read with its payload."""
    disk = FaultyDisk()
    log = open_log(disk)
    for index in (1, 2, 3):
        log.append(b"meta", [b"payload%d" % index], time_ns=index, term=1)
    log.sync()
    path = f"/log/{log.segments()[0].name}"
    offset = log._locate(2)[1]
    used = {*range(offset, offset + 108), *range(offset + 112, offset + 120)}
    for at in used:
        disk.flip(path, at, 3)
        with pytest.raises(CorruptionError):
            log.read_batch(2)
        with pytest.raises(CorruptionError):
            list(log.batches(1))
        disk.flip(path, at, 3)
    assert log.read_batch(2)[1] == b"payload2"
    disk.flip(path, offset + 115, 0)
    assert [batch.intact for batch in log.stored(1)] == [True, False, True]


def test_reclaimed_payload_is_refused_or_marked() -> None:
    """A payload with a hole is never handed out as whole; ``stored`` gives what is left of it, and says so."""
    log = open_log(FaultyDisk(), segment_bytes=2**20)
    payload = random.Random(2).randbytes(20_000)
    log.append(b"m", [payload], time_ns=1)
    log.append(b"n", [payload], time_ns=1)
    log.punch(1, 4000, 9000)
    with pytest.raises(CorruptionError):
        log.read_batch(1)
    left = payload[:4096] + bytes(8192) + payload[12288:]
    assert [(batch.payload, batch.intact) for batch in log.stored(1)] == [(left, False), (payload, True)]


def with_holes(log: Log, payload: bytes, time_ns: int) -> bytes:
    """Appends what reclaiming the middle of a payload leaves of it, and returns that."""
    left = payload[:4096] + bytes(8192) + payload[12288:]
    log.append(b"holes", [left], time_ns=time_ns, payload_crc=crc32c(payload), holes=[(4096, 8192)])
    return left


def test_a_payload_can_be_stored_with_its_holes(disk: Disk, where: str) -> None:
    """The record is the one of the whole payload, link for link, and its holes take no space."""
    payload = random.Random(3).randbytes(20_000)
    whole, holed = open_log(disk, where, 2**20), open_log(disk, where + "2", 2**20)
    for number in range(3):
        whole.append(b"holes", [payload], time_ns=number)
        left = with_holes(holed, payload, number)
        assert holed.last_chain == whole.last_chain
        assert next(holed.stored(number + 1)) == (holed.read(number + 1), left, crc32c(payload), False)
    # The file system may need a block of its own to remember holes.
    assert holed.bytes_on_disk() <= whole.bytes_on_disk() - 2 * 8192
    holed.close()
    holed = open_log(disk, where + "2", 2**20)
    assert [finding.what for finding in holed.verify()] == [Damage.PAYLOAD] * 3


def test_synced_payloads_with_holes_are_not_taken_for_torn_ones() -> None:
    """Once synced they survive every power loss, also one that brings back the oldest watermark it may."""
    payload = random.Random(3).randbytes(20_000)
    for seed in range(100):
        rng = random.Random(seed)
        disk = FaultyDisk(rng)
        log = open_log(disk, segment_bytes=2**17)
        synced = 0
        for number in range(rng.randint(1, 12)):
            if rng.random() < 0.4:
                log.append(b"whole", [payload], time_ns=number)
            else:
                with_holes(log, payload, number)
            if rng.random() < 0.5:
                log.sync()
                synced = log.last_index
            if rng.random() < 0.1:
                synced = rng.randint(0, log.last_index - 1)
                log.truncate_after(synced)
        disk.crash()
        log = open_log(disk, segment_bytes=2**17)
        assert log.last_index >= synced
        assert {finding.what for finding in log.verify()} <= {Damage.PAYLOAD}


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.EIO])
def test_holes_that_cannot_be_punched(error: int) -> None:
    """Where the disk cannot, the zeros take space; where it fails, nothing was appended."""
    disk = FaultyDisk()
    log = open_log(disk, segment_bytes=2**20)
    payload = random.Random(3).randbytes(20_000)

    def hook(operation: str, path: str) -> None:
        if operation == "punch_hole":
            raise OSError(error, "no")

    disk.hook = hook
    if error == errno.EIO:
        with pytest.raises(StorageError):
            with_holes(log, payload, 1)
        assert log.last_index == 0
    else:
        left = with_holes(log, payload, 1)
        assert next(log.stored(1)).payload == left
    disk.hook = None
    log.append(b"after", time_ns=1)
    log.sync()
    log.close(clean=False)
    assert [info.metadata for info in open_log(disk, segment_bytes=2**20).records(1)][-1] == b"after"

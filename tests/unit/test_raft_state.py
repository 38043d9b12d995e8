"""The file that keeps a replica's term, vote and members, on disks that lose power, fail and rot."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import attrs
import pytest
from crc32c import crc32c

from space._errors import CorruptionError, DiskFullError, RefusedError, StorageError, UsageError
from space.wal.disk import Disk, RealDisk
from space.wal.faulty_disk import FaultyDisk
from space.wal.raft_state import (
    Configuration,
    RaftState,
    RaftStateFile,
    decode_raft_state,
    encode_raft_state,
    read_raft_state,
)
from tests.unit.test_wal_golden import dump, load

STORE = b"0123456789abcdef"
GOLDEN = Path(__file__).parents[1] / "golden" / "raft_state_v1.hex"
STATE = RaftState(2, 7, 3, 100, Configuration((1, 2, 3), (4,), (1, 2), (5,), auto_leave=True), 90)
PATH = "/log/raft"


class PowerLossError(Exception):
    """The machine stops here."""


def open_file(disk: Disk, where: str = "/log") -> RaftStateFile:
    """The file under test."""
    return RaftStateFile.open(disk, where, store_id=STORE)


def empty_disk(rng: random.Random | None = None) -> FaultyDisk:
    """A disk with the directory, durably."""
    disk = FaultyDisk(rng)
    disk.mkdir("/log")
    disk.sync_dir("/")
    return disk


def states(count: int, rng: random.Random) -> list[tuple[RaftState, bool]]:
    """Saves as a replica makes them, each with whether it is synced: it is if term or vote change."""
    # A slot of many members spans sectors, so that a power loss can tear it.
    out, state = [], RaftState(1, 1, 0, 0, Configuration(tuple(range(rng.choice((3, 200, 900))))))
    for _ in range(count):
        change = rng.choice(("term", "vote", "commit", "commit", "commit", "members"))
        sync = change != "commit" or rng.random() < 0.2
        if change == "term":
            state = attrs.evolve(state, term=state.term + rng.randint(1, 3), vote=0)
        elif change == "vote" and state.vote == 0:
            state = attrs.evolve(state, vote=rng.randint(1, 3))
        elif change == "members":
            members = Configuration(tuple(range(1, rng.randint(2, 200))))
            state = attrs.evolve(state, configuration=members, configuration_index=state.commit)
        else:
            state = attrs.evolve(state, commit=state.commit + 1)
        out.append((state, sync))
    return out


@pytest.mark.parametrize("kind", ["real", "faulty"])
def test_what_was_saved_comes_back(kind: str, tmp_path: Path) -> None:
    """There is nothing, and no file, before the first save; then the newest, at every opening."""
    disk: Disk = RealDisk() if kind == "real" else empty_disk()
    where = str(tmp_path) if kind == "real" else "/log"
    assert open_file(disk, where).state is None
    assert read_raft_state(disk, where, store_id=STORE) is None
    assert disk.listdir(where) == []
    file = open_file(disk, where)
    for number in range(5):
        state = attrs.evolve(STATE, commit=STATE.commit + number)
        file.save(state, sync=number % 2 == 0)
        assert file.state == state
        assert read_raft_state(disk, where, store_id=STORE) == state
        file.close()
        file = open_file(disk, where)
        assert file.state == state
    file.close()
    assert disk.listdir(where) == ["raft"]


def test_reading_changes_nothing() -> None:
    """A look from outside only opens, reads and closes."""
    disk = empty_disk()
    open_file(disk).save(STATE, sync=True)
    seen: list[str] = []
    disk.hook = lambda operation, _path: seen.append(operation)
    assert read_raft_state(disk, "/log", store_id=STORE) == STATE
    assert set(seen) <= {"exists", "open", "pread"}


def test_an_opening_in_a_directory_that_is_not_there_yet() -> None:
    """Without a directory there is no state, and no error."""
    assert open_file(FaultyDisk(), "/none").state is None


def run_until(disk: FaultyDisk, saves: list[tuple[RaftState, bool]], stop_at: int) -> tuple[int, int]:
    """Saves until operation ``stop_at``, where the power goes; how many were synced, and how many begun."""

    def hook(_operation: str, _path: str) -> None:
        if disk.operations == stop_at:
            raise PowerLossError

    disk.hook = hook
    synced = begun = 0
    try:
        file = open_file(disk)
        for number, (state, sync) in enumerate(saves, 1):
            begun = number
            file.save(state, sync=sync)
            if sync or number == 1:
                synced = number
            if disk.rng.random() < 0.1:  # a process that dies leaves what it wrote in the cache only
                disk.kill()
                file = open_file(disk)
                synced = number
    except PowerLossError:
        pass
    disk.hook = None
    return synced, begun


def test_a_power_loss_anywhere_keeps_what_was_synced_and_its_term_and_vote() -> None:
    """What comes back is a state that was saved, no older than the last synced one, whichever operation was last."""
    outcomes = set()
    for seed in range(400):
        rng = random.Random(seed)
        disk = empty_disk(rng)
        saves = states(rng.randint(1, 25), rng)
        synced, begun = run_until(disk, saves, rng.randint(1, 100))
        disk.crash()
        state = open_file(disk).state
        possible = [each for each, _ in saves[max(synced - 1, 0) : begun]]
        if synced == 0:
            assert state is None or state in possible
            outcomes.add("nothing yet" if state is None else "first")
        else:
            assert state in possible
            outcomes.add("newest" if state == possible[-1] else "older")
        again = open_file(disk)
        again.save(attrs.evolve(STATE, node=1, term=1000), sync=True)
        disk.crash()
        assert open_file(disk).state == again.state
    assert outcomes == {"nothing yet", "first", "newest", "older"}


def test_unsynced_saves_never_touch_the_durable_slot() -> None:
    """However many unsynced saves follow, also after a restart, tearing all of them leaves the synced one."""
    disk = empty_disk()
    file = open_file(disk)
    file.save(STATE, sync=True)
    synced = attrs.evolve(STATE, term=8, vote=0)
    file.save(synced, sync=True)
    for number in range(5):
        file.save(attrs.evolve(synced, commit=200 + number), sync=False)
    content = bytearray(disk.image()[PATH])
    slots = [decode_raft_state(bytes(content[at : at + 4096]), crc32c(STORE)) for at in (0, 4096)]
    newest = max(slots, key=lambda slot: slot[0] if slot else 0)
    at = 4096 * slots.index(newest)
    content[at + 30] ^= 1
    assert open_file(FaultyDisk.from_image({PATH: bytes(content)})).state == synced


def test_a_state_that_was_only_in_the_cache_is_durable_once_it_was_read() -> None:
    """After a kill the newest state counts, so opening makes it durable before the other slot is written."""
    for seed in range(50):
        disk = empty_disk(random.Random(seed))
        file = open_file(disk)
        file.save(STATE, sync=True)
        file.save(attrs.evolve(STATE, commit=101), sync=False)
        disk.kill()
        file = open_file(disk)
        assert file.state is not None
        assert file.state.commit == 101
        file.save(attrs.evolve(STATE, commit=102), sync=False)
        disk.crash()
        found = open_file(disk).state
        assert found is not None
        assert found.commit in {101, 102}


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_any_failing_operation_is_reported_and_final(error: int) -> None:
    """A save the disk refuses raises, every later one too, and opening again has all that was synced."""
    saves = states(12, random.Random(3))
    refusal = DiskFullError if error == errno.ENOSPC else StorageError
    for at in range(1, 60):
        disk = empty_disk(random.Random(at))
        disk.fail_at, disk.fail_with = disk.operations + at, error
        file, done = None, 0
        try:
            file = open_file(disk)
            for done, (state, sync) in enumerate(saves):  # noqa: B007 - where it stopped is the point
                file.save(state, sync=sync)
        except refusal:
            if file is not None:
                with pytest.raises(StorageError, match="has failed"):
                    file.save(saves[-1][0], sync=True)
                file.close()
        disk.fail_at = None
        disk.crash()
        synced = max((n for n in range(done) if n == 0 or saves[n][1]), default=-1)
        found = open_file(disk).state
        assert found in [each for each, _ in saves[max(synced, 0) : done + 1]] or (
            synced < 0 and found is None
        )


def test_damage_is_refused_never_taken_for_a_new_replica() -> None:
    """With a file but no sound slot it raises; one flipped bit anywhere leaves at least an older sound slot."""
    disk = empty_disk()
    file = open_file(disk)
    file.save(STATE, sync=True)
    file.save(attrs.evolve(STATE, commit=101), sync=True)
    whole = disk.image()[PATH]
    used = len(encode_raft_state(STATE, 1, 0))
    for offset in (*range(used), *range(4096, 4096 + used)):
        damaged = bytearray(whole)
        damaged[offset] ^= 0x10
        state = open_file(FaultyDisk.from_image({PATH: bytes(damaged)})).state
        assert state == (STATE if offset >= 4096 else attrs.evolve(STATE, commit=101))
        damaged[offset ^ 4096] ^= 0x10
        broken = FaultyDisk.from_image({PATH: bytes(damaged)})
        for look in (open_file, lambda disk: read_raft_state(disk, "/log", store_id=STORE)):
            with pytest.raises(CorruptionError) as caught:
                look(broken)
            assert caught.value.segment == "raft"
    for content in (b"", bytes(8192), whole[:10]):
        with pytest.raises(CorruptionError):
            open_file(FaultyDisk.from_image({PATH: content}))


def test_another_stores_state_is_refused() -> None:
    """The slots are seeded with the store's id."""
    disk = empty_disk()
    open_file(disk).save(STATE, sync=True)
    with pytest.raises(CorruptionError):
        RaftStateFile.open(disk, "/log", store_id=bytes(16))


def test_term_and_vote_never_go_back() -> None:
    """A save that breaks a promise of Raft is a bug, and stopped before it is written."""
    file = open_file(empty_disk())
    file.save(STATE, sync=True)
    for wrong in (
        attrs.evolve(STATE, term=6),
        attrs.evolve(STATE, vote=1),
        attrs.evolve(STATE, vote=0),
        attrs.evolve(STATE, node=3),
    ):
        with pytest.raises(AssertionError):
            file.save(wrong, sync=True)
    with pytest.raises(AssertionError):
        file.save(attrs.evolve(STATE, term=8), sync=False)
    assert file.state == STATE
    file.save(attrs.evolve(STATE, term=8, vote=0), sync=True)
    file.save(attrs.evolve(STATE, term=8, vote=1), sync=True)


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    """Too many members and numbers out of range are the caller's error; the file works on."""
    file = open_file(empty_disk())
    file.save(STATE, sync=True)
    crowd = Configuration(tuple(range(2**40, 2**40 + 1000)))
    for wrong in (
        attrs.evolve(STATE, configuration=crowd),
        attrs.evolve(STATE, commit=-1),
        attrs.evolve(STATE, commit=2**64),
    ):
        with pytest.raises(UsageError):
            file.save(wrong, sync=True)
    most = attrs.evolve(STATE, configuration=Configuration(tuple(range(2**40, 2**40 + 440))))
    file.save(most, sync=True)
    assert file.state == most
    file.close()
    file.close()
    with pytest.raises(RefusedError):
        file.save(STATE, sync=True)


def test_a_term_can_be_raised_before_entries_of_it_arrive() -> None:
    """A higher term is durable without a vote in it; one that is not higher changes nothing."""
    disk = empty_disk()
    file = open_file(disk)
    file.save(STATE, sync=True)
    file.raise_term(STATE.term)
    assert file.state == STATE
    file.raise_term(STATE.term + 3)
    disk.crash()
    assert open_file(disk).state == attrs.evolve(STATE, term=STATE.term + 3, vote=0)


def write_golden() -> dict[str, bytes]:
    """The files of the stored example, written anew: a joint change, then a commit that is not synced."""
    disk = empty_disk()
    file = open_file(disk)
    file.save(STATE, sync=True)
    file.save(attrs.evolve(STATE, commit=2**40), sync=False)
    return disk.image()


def test_version_1_stays_readable_and_is_still_written() -> None:
    """The stored bytes are read as when the format was made, and the same calls write the same bytes."""
    disk = FaultyDisk.from_image(load(GOLDEN.read_text()))
    assert open_file(disk).state == attrs.evolve(STATE, commit=2**40)
    assert dump(write_golden()) == GOLDEN.read_text()

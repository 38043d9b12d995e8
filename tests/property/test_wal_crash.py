"""The log on a disk that loses power, dies, fills up and fails, against a list."""

from __future__ import annotations

import contextlib
import errno
import random

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from space._errors import CorruptionError, SpaceError, StorageError
from space.wal.faulty_disk import FaultyDisk
from space.wal.log import Log
from space.wal.segment_format import RecordKind

STORE = b"0123456789abcdef"
SEGMENT_BYTES = 16_384


class PowerLossError(Exception):
    """The machine stops here."""


@attrs.frozen
class Entry:
    """A record as it was given to the log."""

    kind: RecordKind
    metadata: bytes
    payload: bytes


@attrs.define
class Model:
    """What the log must hold: everything appended, how much of it is synced, what was reclaimed."""

    entries: list[Entry] = attrs.field(factory=list)
    durable: int = 0  # entries
    floor: int = 0  # entries an unfinished cut leaves, if it is below durable
    doubtful: Entry | None = None  # an append that failed and may or may not be there
    punched: set[int] = attrs.field(factory=set)
    time_ns: int = 0

    def batches(self) -> list[Entry]:
        """Those that have an index."""
        return [entry for entry in self.entries if entry.kind is RecordKind.BATCH]

    def length_after(self, index: int) -> int:
        """Entries up to and including a batch."""
        seen = [0, *(at for at, entry in enumerate(self.entries, 1) if entry.kind is RecordKind.BATCH)]
        return seen[index]

    def all_durable(self) -> None:
        """A sync has succeeded."""
        self.durable = self.floor = len(self.entries)


def open_log(disk: FaultyDisk) -> Log:
    """The log under test, in small segments."""
    return Log.open(disk, "/log", store_id=STORE, segment_bytes=SEGMENT_BYTES)


def check(log: Log, model: Model) -> int:
    """The log holds a prefix of the model, all of its durable part, and nothing else; returns how much."""
    expected = model.entries + ([model.doubtful] if model.doubtful else [])
    infos = list(log.records(1, every_kind=True))
    assert len(infos) >= model.durable or len(infos) == model.floor
    chain, index = bytes(32), 0
    for info, entry in zip(infos, expected[: len(infos)], strict=True):
        index += info.kind is RecordKind.BATCH
        assert (info.index, info.previous_chain) == (index, chain)
        assert (info.kind, info.metadata, info.payload_length) == (
            entry.kind,
            entry.metadata,
            len(entry.payload),
        )
        chain = info.chain
        if info.kind is RecordKind.BATCH:
            assert log.read(index) == info
            if index not in model.punched:
                assert log.read_payload(index, 0, len(entry.payload)) == entry.payload
                assert log.check_payload(index)
    assert (log.last_index, log.last_chain) == (index, chain)
    assert [finding for finding in log.verify() if finding.index not in model.punched] == []
    return len(infos)


def reopen(disk: FaultyDisk, model: Model) -> Log:
    """Open after something went wrong and check what is there: that is the model now, and durable."""
    log = open_log(disk)
    kept = check(log, model)
    if model.doubtful and kept > len(model.entries):
        model.entries.append(model.doubtful)
    del model.entries[kept:]
    model.doubtful = None
    model.all_durable()
    model.time_ns = log.last_time_ns
    model.punched = {index for index in model.punched if index <= log.last_index}
    assert log.durable_index == log.last_index
    return log


def payload_of(rng: random.Random, size: int) -> list[bytes]:
    """A payload in two pieces, or none."""
    data = rng.randbytes(size)
    cut = rng.randint(0, size)
    return [data[:cut], data[cut:]] if size else []


def act(log: Log, model: Model, action: str, size: int, rng: random.Random) -> None:
    """One step on the log, recorded in the model."""
    if action in {"append", "mark"}:
        model.time_ns += rng.randint(0, 3)
        kind = RecordKind.BATCH if action == "append" else RecordKind.HARD_STATE
        metadata, payload = rng.randbytes(rng.randint(0, 300)), payload_of(rng, size)
        model.doubtful = Entry(kind, metadata, b"".join(payload))
        index = log.append(metadata, payload, time_ns=model.time_ns, kind=kind)
        model.entries.append(model.doubtful)
        model.doubtful = None
        assert index == len(model.batches())
    elif action == "sync":
        log.sync()
        model.all_durable()
    elif action == "cut":
        keep = rng.randint(0, len(model.batches()))
        model.floor = model.length_after(keep)
        log.truncate_after(keep)
        del model.entries[model.floor :]
        model.durable = min(model.durable, model.floor)
        model.floor = model.durable
        model.punched = {index for index in model.punched if index <= keep}
        model.time_ns = log.last_time_ns
    elif action == "punch" and model.batches():
        index = rng.randint(1, len(model.batches()))
        model.punched.add(index)
        log.punch(index, 0, len(model.batches()[index - 1].payload))


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(
            ["append"] * 6 + ["mark", "sync", "sync", "cut", "punch", "crash", "crash", "kill", "close"]
        ),
        st.sampled_from([0, 0, 1, 100, 700, 4095, 4096, 5000, 9000, 20_000]),
    ),
    max_size=40,
)


@given(actions=ACTIONS, seed=st.integers(0, 2**32))
def test_what_was_synced_survives_power_loss_and_the_rest_is_a_prefix(
    actions: list[tuple[str, int]], seed: int
) -> None:
    """Any mixture of work and crashes: synced records stay, survivors are a prefix, never garbage."""
    rng = random.Random(seed)
    disk, model = FaultyDisk(rng), Model()
    log = open_log(disk)
    for action, size in [*actions, ("crash", 0), ("crash", 0)]:
        if action in {"crash", "kill", "close"}:
            stop(disk, log, model, action)
            log = reopen(disk, model)
        else:
            act(log, model, action, size, rng)
    check(log, model)


def stop(disk: FaultyDisk, log: Log, model: Model, how: str) -> None:
    """The process ends in one of three ways; only a power loss loses anything."""
    if how == "close":
        log.close()
    if how == "crash":
        disk.crash()
    else:
        disk.kill()
        model.all_durable()


@given(actions=ACTIONS, seed=st.integers(0, 2**32), at=st.integers(1, 400))
def test_power_loss_in_the_middle_of_any_operation(
    actions: list[tuple[str, int]], seed: int, at: int
) -> None:
    """The power may also go at any single operation of the disk: inside a rotation, a cut or an opening."""
    rng = random.Random(seed)
    disk, model = FaultyDisk(rng), Model()

    def hook(_operation: str, _path: str) -> None:
        if disk.operations == at:
            raise PowerLossError

    disk.hook = hook
    with contextlib.suppress(PowerLossError):
        log = open_log(disk)
        for action, size in actions:
            if action in {"crash", "kill", "close"}:
                stop(disk, log, model, "close")
                log = reopen(disk, model)
            else:
                act(log, model, action, size, rng)
    disk.hook = None
    disk.crash()
    reopen(disk, model)


@given(
    actions=ACTIONS,
    seed=st.integers(0, 2**32),
    at=st.integers(1, 400),
    error=st.sampled_from([errno.EIO, errno.ENOSPC]),
)
def test_any_operation_may_fail(actions: list[tuple[str, int]], seed: int, at: int, error: int) -> None:
    """A failing operation is one reported error: what was synced stands; the log works on or says reopen."""
    rng = random.Random(seed)
    disk, model = FaultyDisk(rng), Model()
    disk.fail_at, disk.fail_with = at, error
    log: Log | None = None
    for action, size in actions:
        try:
            log = log or reopen(disk, model)
            if action in {"crash", "kill", "close"}:
                stop(disk, log, model, "close")
                log = reopen(disk, model)
            else:
                act(log, model, action, size, rng)
        except StorageError:
            if log is None or not is_usable(log):
                disk.kill()
                log = None
            model.doubtful = model.doubtful if log is None else None
    disk.fail_at = None
    disk.crash()
    reopen(disk, model)


def is_usable(log: Log) -> bool:
    """Whether the log still takes records; what it refused is then gone for good."""
    try:
        log.sync()
    except SpaceError:
        return False
    return True


@given(
    sizes=st.lists(st.sampled_from([0, 50, 700, 4096, 9000]), min_size=1, max_size=30),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_rot_is_found_or_harmless(sizes: list[int], seed: int, data: st.DataObject) -> None:
    """One flipped bit anywhere, after a kill or a clean stop: all is recovered, or it is named corruption."""
    rng = random.Random(seed)
    disk, model = FaultyDisk(rng), Model()
    log = open_log(disk)
    for size in sizes:
        act(log, model, "append", size, rng)
        if rng.random() < 0.7:
            act(log, model, "sync", 0, rng)
    act(log, model, "sync", 0, rng)
    stop(disk, log, model, rng.choice(("close", "kill")))
    path = data.draw(st.sampled_from(sorted(disk.image())))
    offset = data.draw(st.integers(0, len(disk.image()[path]) - 1))
    disk.flip(path, offset, rng.randint(0, 7))
    if error := damage_met(disk, model):
        assert path.endswith(error.segment)
        assert error.position >= 0


def damage_met(disk: FaultyDisk, model: Model) -> CorruptionError | None:
    """The error that opening and reading everything runs into, if any; else all of it is as written."""
    try:
        log = open_log(disk)
        infos = list(log.records(1))
    except CorruptionError as error:
        return error
    assert [info.metadata for info in infos] == [entry.metadata for entry in model.batches()]
    for info, entry in zip(infos, model.batches(), strict=True):
        stored = log.read_payload(info.index, 0, info.payload_length)
        assert (stored == entry.payload) == log.check_payload(info.index)
    return None


def test_the_model_is_no_bystander() -> None:
    """A log that loses a synced batch is caught by the check all of these tests rest on."""
    disk, model = FaultyDisk(), Model()
    log = open_log(disk)
    for _ in range(3):
        act(log, model, "append", 100, random.Random(1))
    act(log, model, "sync", 0, random.Random(1))
    log.truncate_after(2)
    with pytest.raises(AssertionError):
        check(log, model)

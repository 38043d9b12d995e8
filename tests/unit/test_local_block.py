"""The block model over a store: what each operation does, what it costs the log, and what happens beside it."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import space
from space._errors import ConflictError, NotFoundError, RefusedError, Status, UsageError
from space._node.local_block import (
    WRITE_BYTES_MAX,
    BlockWriter,
    LocalBlockDevice,
    known_number,
    namespace_identity,
    namespace_number,
)
from space._node.store import Store
from space.events import commands as cmd
from space.events.commands import Request
from space.events.ids import AtPosition, CapsuleId
from space.events.types import COPY_BYTES_MAX
from space.policy.model import Policy
from space.projections.block import BlockDevice
from tests.store_support import texture

SIZE = 4 << 20
RAW = Policy.from_document({"compression": "none", "dedupe": False, "history": "none"})
NQN = "nqn.2014-08.org.example:store"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A new store in small segments."""
    with Store(tmp_path / "data", segment_bytes=1 << 20) as opened:
        yield opened


def make(store: Store, *, size: int = SIZE, block_size: int = 4096, policy: Policy = RAW) -> CapsuleId:
    """A block capsule."""
    return store.create(size=size, block_size=block_size, policy=policy)


@asynccontextmanager
async def device(store: Store, capsule: CapsuleId) -> AsyncIterator[LocalBlockDevice]:
    """A device that can be written to, for as long as the block lasts."""
    writer = BlockWriter(store)
    opened = LocalBlockDevice(store, capsule, writer=writer)
    try:
        yield opened
    finally:
        opened.close()
        await writer.close()


def on(store: Store, capsule: CapsuleId, work: Callable[[LocalBlockDevice], Awaitable[None]]) -> None:
    """Runs something on a device in a loop of its own."""

    async def run() -> None:
        async with device(store, capsule) as opened:
            await work(opened)

    asyncio.run(run())


async def held(opened: BlockDevice, offset: int = 0, length: int = SIZE) -> bytes:
    """The bytes of a range."""
    return b"".join(await opened.read(offset, length))


def test_a_device_says_what_it_is(store: Store) -> None:
    """Sizes are whole blocks, of the capsule or of 512 bytes; what was written is allocated, and a change is told."""

    async def work(opened: LocalBlockDevice) -> None:
        before = opened.info()
        assert (before.size, before.block_size, before.allocated, before.read_only) == (8192, 4096, 0, False)
        await opened.write(4096, texture(4096), durable=False, actor="host")
        after = opened.info()
        assert (after.allocated, after.change) == (4096, store.position)
        assert before.change < after.change
        store.resize(capsule, 12_288)
        assert opened.info().size == 12_288

    capsule = make(store, size=8192)
    on(store, capsule, work)
    file = store.put(texture(1300), name="/f").id
    info = LocalBlockDevice(store, file).info()
    assert (info.size, info.block_size, info.allocated, info.read_only) == (1024, 512, 1024, True)


def test_bytes_come_back_as_they_were_written(store: Store) -> None:
    """Short and long writes, over each other and over blocks never written, read back whole and in parts."""

    async def work(opened: LocalBlockDevice) -> None:
        model = bytearray(SIZE)
        for number, (offset, length) in enumerate([(0, 4096), (8192, 1 << 20), (4096, 8192), (16_384, 4096)]):
            data = texture(length, number)
            await opened.write(offset, data, durable=number == 1, actor="host")
            model[offset : offset + length] = data
        assert await held(opened) == model
        for offset in range(0, 65_536, 4096):
            assert await held(opened, offset, 8192) == model[offset : offset + 8192]

    on(store, make(store), work)


@pytest.mark.parametrize("compression", ["auto", "zstd"])
@pytest.mark.parametrize("encryption", ["none", "aes-256-gcm"])
def test_every_policy_serves_blocks(store: Store, compression: str, encryption: str) -> None:
    """Compressed, encrypted and deduplicated capsules are block devices too, copies inside them included."""
    policy = Policy.from_document({"compression": compression, "encryption": encryption, "dedupe": True})
    block = b"the same again " * 273 + b"!"

    async def work(opened: LocalBlockDevice) -> None:
        for at in range(0, 65_536, 4096):
            await opened.write(at, block, durable=False, actor="host")
        await opened.copy([(0, 8192)], 65_536, durable=True, actor="host")
        assert await held(opened, 0, 81_920) == block * 18 + bytes(8192)

    on(store, make(store, policy=policy), work)


def test_one_write_is_one_event(store: Store) -> None:
    """The longest write is one command and so whole after a crash; a longer one is refused, as is none at all."""

    async def work(opened: LocalBlockDevice) -> None:
        before = store.position
        await opened.write(0, texture(WRITE_BYTES_MAX), durable=False, actor="host")
        assert [(event.position, event.actor) for event in store.log(start=before + 1)] == [
            (before + 1, "host")
        ]
        for length in (0, WRITE_BYTES_MAX + 4096):
            with pytest.raises(UsageError) as refused:
                await opened.write(0, bytes(length), durable=False, actor="host")
            assert refused.value.status is Status.TOO_LARGE

    on(store, make(store), work)


def test_nothing_happens_beyond_the_end(store: Store) -> None:
    """A file does not grow under a device: writes and copies that end beyond it are refused."""
    capsule = store.put(texture(1300), name="/f").id

    async def work(opened: LocalBlockDevice) -> None:
        before = store.digest()
        with pytest.raises(UsageError) as refused:
            await opened.write(512, bytes(1024), durable=False, actor="host")
        assert refused.value.status is Status.NO_SPACE
        with pytest.raises(UsageError):
            await opened.copy([(0, 1024)], 512, durable=False, actor="host")
        with pytest.raises(UsageError):
            await opened.compare_and_write(1024, bytes(512), bytes(512), durable=False, actor="host")
        assert store.digest() == before

    on(store, capsule, work)


def test_commands_of_one_turn_are_one_batch(store: Store) -> None:
    """Thirty-two writes, to two devices of a store, begun in the same turn of the loop cost one record of the log."""
    one, other = make(store), make(store)

    async def run() -> None:
        writer = BlockWriter(store)
        devices = [LocalBlockDevice(store, capsule, writer=writer) for capsule in (one, other)]
        before = store.position
        await asyncio.gather(
            *(
                devices[number % 2].write(number * 4096, texture(4096, number), durable=False, actor="host")
                for number in range(32)
            )
        )
        assert store.position == before + 1
        assert await held(devices[1], 31 * 4096, 4096) == texture(4096, 31)
        for each in devices:
            each.close()
        await writer.close()

    asyncio.run(run())


def test_durable_writes_share_syncs(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Durable writes begun together wait for one sync; flushes share one too; one with nothing to do makes none."""
    syncs: list[int] = []
    sync = store.sync

    def counted() -> None:
        syncs.append(store.position)
        sync()

    monkeypatch.setattr(store, "sync", counted)

    async def work(opened: LocalBlockDevice) -> None:
        writes = (opened.write(at * 4096, texture(4096, at), durable=True, actor="h") for at in range(16))
        await asyncio.gather(*writes)
        assert store.wal.durable_index == store.position
        assert len(syncs) == 1
        await opened.flush()
        assert len(syncs) == 1
        await opened.write(0, bytes(4096), durable=False, actor="host")
        assert store.wal.durable_index < store.position
        await asyncio.gather(*(opened.flush() for _ in range(8)))
        assert store.wal.durable_index == store.position
        assert len(syncs) == 2

    on(store, make(store), work)


def test_deallocated_ranges_give_their_space_back(store: Store) -> None:
    """Many ranges in one batch read as zeros, are no longer allocated, and gc returns their blocks to the disk."""

    async def work(opened: LocalBlockDevice) -> None:
        for at in range(0, SIZE, 1 << 20):
            await opened.write(at, texture(1 << 20, at), durable=True, actor="host")
        before, position = store.wal.bytes_on_disk(), store.position
        ranges = [(at, 1 << 19) for at in range(0, SIZE, 1 << 20)]
        await opened.deallocate([*ranges, (0, 0)], actor="host")
        assert store.position == position + 1
        assert opened.info().allocated == SIZE // 2
        await opened.write_zeroes(3 << 19, 1 << 19, deallocate=True, durable=True, actor="host")
        assert store.wal.durable_index == store.position
        model = b"".join(
            bytes(1 << 19) + (bytes(1 << 19) if at == 1 << 20 else texture(1 << 20, at)[1 << 19 :])
            for at in range(0, SIZE, 1 << 20)
        )
        assert await held(opened) == model
        given = store.gc().bytes_given_back
        assert given == before - store.wal.bytes_on_disk() >= 5 << 19
        assert await held(opened) == model

    on(store, make(store), work)


def test_copies_move_no_bytes(store: Store) -> None:
    """Copied ranges, one after the other, also onto themselves shifted, add no payload to the log and outlive gc."""

    async def work(opened: LocalBlockDevice) -> None:
        data = texture(1 << 20)
        await opened.write(0, data, durable=False, actor="host")
        before = store.position
        await opened.copy([(0, 8192), (65_536 - 4096, 12_288)], 2 << 20, durable=True, actor="host")
        await opened.copy([(4096, 262_144)], 8192, durable=False, actor="host")
        await opened.copy([(2 << 20, 4096), (3 << 20, 4096)], 0, durable=False, actor="host")
        payload = sum(record.payload_length for record in store.wal.records(before + 1))
        assert payload == 0
        expected = bytearray(data.ljust(SIZE, b"\0"))
        expected[2 << 20 : (2 << 20) + 20_480] = data[:8192] + data[61_440:73_728]
        expected[8192 : 8192 + 262_144] = data[4096 : 4096 + 262_144]
        expected[0:8192] = data[:4096] + bytes(4096)
        assert await held(opened) == expected
        await opened.deallocate([(0, 1 << 20)], actor="host")
        store.gc()
        expected[0 : 1 << 20] = bytes(1 << 20)
        assert await held(opened) == expected
        assert store.verify().findings == []

    on(store, make(store), work)


def test_a_copy_longer_than_a_command_reads_before_it_overwrites(store: Store) -> None:
    """A long copy over itself, up or down, is cut into commands so ordered that none destroys another's source."""
    length = 2 * COPY_BYTES_MAX
    capsule = make(store, size=2 * length)
    marks = [at * (COPY_BYTES_MAX // 4) for at in range(8)]

    async def work(opened: LocalBlockDevice) -> None:
        for mark in marks:
            await opened.write(mark, texture(4096, mark), durable=False, actor="host")
        for source, target in ((0, 8192), (8192, 4096)):
            await opened.copy([(source, length)], target, durable=False, actor="host")
            for mark in marks:
                assert await held(opened, target + mark, 4096) == texture(4096, mark)

    on(store, capsule, work)


def test_compare_and_write_writes_only_over_what_was_expected(store: Store) -> None:
    """The first byte that differs is named and nothing written; what is equal is replaced, as durable as asked."""

    async def work(opened: LocalBlockDevice) -> None:
        first, second = texture(8192, 1), texture(8192, 2)
        assert await opened.compare_and_write(4096, bytes(8192), first, durable=True, actor="host") == -1
        assert store.wal.durable_index == store.position
        for at in (0, 1, 4095, 8191):
            wrong = bytearray(first)
            wrong[at] ^= 1
            before = store.position
            differs = await opened.compare_and_write(4096, bytes(wrong), second, durable=False, actor="host")
            assert (differs, store.position) == (at, before)
        assert await opened.compare_and_write(4096, first, second, durable=False, actor="host") == -1
        assert await held(opened, 0, 16_384) == bytes(4096) + second + bytes(4096)
        with pytest.raises(UsageError):
            await opened.compare_and_write(0, bytes(512), bytes(4096), durable=False, actor="host")

    on(store, make(store), work)


def test_of_many_who_compare_one_wins_each_round(store: Store) -> None:
    """A counter raised by concurrent compare-and-writes, on two devices beside other writers, loses nothing."""
    capsule = make(store)
    rounds, tasks = 5, 8

    async def count(opened: LocalBlockDevice) -> None:
        for _ in range(rounds):
            while True:
                now = await held(opened, 0, 4096)
                later = (int.from_bytes(now, "little") + 1).to_bytes(4096, "little")
                if await opened.compare_and_write(0, now, later, durable=False, actor="host") < 0:
                    break

    async def noise(opened: LocalBlockDevice) -> None:
        for number in range(100):
            await opened.write(8192 + number * 4096, bytes(4096), durable=False, actor="host")

    async def run() -> None:
        writer = BlockWriter(store)
        devices = [LocalBlockDevice(store, capsule, writer=writer) for _ in range(2)]
        await asyncio.gather(*(count(devices[each % 2]) for each in range(tasks)), noise(devices[0]))
        assert int.from_bytes(await held(devices[0], 0, 4096), "little") == rounds * tasks
        for each in devices:
            each.close()
        await writer.close()

    asyncio.run(run())


def test_nothing_comes_between_comparing_and_writing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write on another path after the range was read makes the compare begin anew, and it then sees that write."""
    capsule = make(store)
    begin = store.execute_all
    interfered: list[int] = []

    def meddling(requests: list[Request], **options: object) -> object:
        if isinstance(requests[0].command, cmd.WriteExtent) and requests[0].command.change and not interfered:
            interfered.append(1)
            store.write(capsule, 0, b"x" * 4096)
        return begin(requests, **options)  # type: ignore[arg-type]

    async def work(opened: LocalBlockDevice) -> None:
        monkeypatch.setattr(store, "execute_all", meddling)
        differs = await opened.compare_and_write(0, bytes(4096), texture(4096), durable=False, actor="host")
        assert differs == 0
        assert await held(opened, 0, 4096) == b"x" * 4096

    on(store, capsule, work)
    assert interfered


def test_a_capsule_that_never_stands_still_ends_in_an_error(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare-and-write gives up, with status STALE, when something always writes to the capsule in between."""
    capsule = make(store)
    begin = store.execute_all

    def meddling(requests: list[Request], **options: object) -> object:
        begin([Request(cmd.Deallocate(capsule, 8192, 4096))])
        return begin(requests, **options)  # type: ignore[arg-type]

    async def work(opened: LocalBlockDevice) -> None:
        monkeypatch.setattr(store, "execute_all", meddling)
        with pytest.raises(ConflictError) as given_up:
            await opened.compare_and_write(0, bytes(4096), texture(4096), durable=False, actor="host")
        assert given_up.value.status is Status.STALE

    on(store, capsule, work)


def test_the_loop_goes_on_while_somebody_else_holds_the_store(store: Store) -> None:
    """While another thread has the store for itself, as gc does, reads are answered; writes are once they may be."""
    capsule = make(store)
    holding, release = threading.Event(), threading.Event()

    def hold() -> None:
        with store.alone():
            holding.set()
            release.wait(60)

    async def work(opened: LocalBlockDevice) -> None:
        holder = threading.Thread(target=hold)
        holder.start()
        holding.wait(60)
        writes = [
            asyncio.ensure_future(opened.write(at * 4096, texture(4096, at), durable=False, actor="host"))
            for at in range(2)
        ]
        await asyncio.sleep(0.01)
        late = asyncio.ensure_future(opened.write(0, texture(4096, 9), durable=False, actor="host"))
        assert await held(opened, 0, 8192) == bytes(8192)
        assert not any(write.done() for write in (*writes, late))
        release.set()
        await asyncio.gather(*writes, late)
        holder.join()
        assert await held(opened, 0, 8192) == texture(4096, 9) + texture(4096, 1)

    on(store, capsule, work)


def test_a_cancelled_write_is_settled_when_it_returns(store: Store) -> None:
    """Cancelled before it left, a write does not happen; cancelled later, it ends no sooner than its buffer is free."""
    capsule = make(store)
    holding, release = threading.Event(), threading.Event()

    def hold() -> None:
        with store.alone():
            holding.set()
            release.wait(60)

    async def work(opened: LocalBlockDevice) -> None:
        early = asyncio.ensure_future(opened.write(0, b"e" * 4096, durable=False, actor="host"))
        await asyncio.sleep(0)
        early.cancel()
        await asyncio.wait([early])
        assert await held(opened, 0, 4096) == bytes(4096)
        holder = threading.Thread(target=hold)
        holder.start()
        holding.wait(60)
        buffer = bytearray(b"l" * 4096)
        late = asyncio.ensure_future(opened.write(0, buffer, durable=False, actor="host"))
        await asyncio.sleep(0.01)
        late.cancel()
        await asyncio.sleep(0.01)
        assert not late.done()
        release.set()
        await asyncio.wait([late])
        buffer[:] = bytes(4096)
        holder.join()
        assert late.cancelled()
        assert await held(opened, 0, 4096) == b"l" * 4096

    on(store, capsule, work)


def test_a_past_moment_is_a_device_that_never_changes(store: Store) -> None:
    """A device of a moment shows its bytes and its size whatever happens later, and refuses every mutation."""
    capsule = make(store, size=8192)
    store.write(capsule, 0, texture(8192))
    moment = f"@{store.position}"
    store.write(capsule, 0, bytes(8192))
    store.resize(capsule, 16_384)

    async def run() -> None:
        with store.at(moment) as past:
            opened = LocalBlockDevice(past, capsule)
            info = opened.info()
            assert (info.size, info.read_only) == (8192, True)
            assert await held(opened, 0, 8192) == texture(8192)
            await opened.flush()
            mutations: list[Awaitable[object]] = [
                opened.write(0, bytes(4096), durable=False, actor="host"),
                opened.write_zeroes(0, 4096, deallocate=True, durable=False, actor="host"),
                opened.deallocate([(0, 4096)], actor="host"),
                opened.copy([(0, 4096)], 4096, durable=False, actor="host"),
                opened.compare_and_write(0, bytes(4096), bytes(4096), durable=False, actor="host"),
            ]
            for mutation in mutations:
                with pytest.raises(RefusedError) as refused:
                    await mutation
                assert refused.value.status is Status.READ_ONLY
            with pytest.raises(UsageError):
                LocalBlockDevice(past, capsule, writer=BlockWriter(store))

    asyncio.run(run())


def test_only_files_are_devices(store: Store) -> None:
    """A directory is refused, and so is what is not there."""
    with pytest.raises(UsageError):
        LocalBlockDevice(store, store.root)
    with pytest.raises(NotFoundError):
        LocalBlockDevice(store, CapsuleId(bytes(16)))


def test_gc_leaves_a_served_capsule_alone(store: Store) -> None:
    """A deleted capsule without history stays while it is served, and goes when nobody serves it any more."""
    capsule = store.create(size=SIZE, block_size=512, parent=store.root, name=b"v", policy=RAW)

    async def work(opened: LocalBlockDevice) -> None:
        await opened.write(0, texture(4096), durable=False, actor="host")
        store.rm("/v")
        assert store.gc().capsules_purged == 0
        assert await held(opened, 0, 4096) == texture(4096)

    on(store, capsule, work)
    assert store.gc().capsules_purged == 1


def test_damage_is_told_and_named(store: Store) -> None:
    """Rotten bytes under a device are an error that names segment and offset, for short reads as for long ones."""
    capsule = make(store)

    async def work(opened: LocalBlockDevice) -> None:
        await opened.write(0, texture(1 << 20), durable=True, actor="host")
        segment = max((store.path / "wal").glob("*.seg"))
        raw = bytearray(segment.read_bytes())
        at = raw.index(texture(1 << 20)[:64])
        with segment.open("r+b") as file:
            os.pwrite(file.fileno(), bytes([raw[at] ^ 1]), at)
        for length in (4096, 1 << 20):
            with pytest.raises(space.CorruptionError, match=segment.name):
                await opened.read(0, length)

    on(store, capsule, work)


def test_copying_needs_the_same_key_and_room(store: Store) -> None:
    """Ranges are shared between capsules of one key only, inside the source, and inside a block capsule's size."""
    secret = Policy.from_document({"encryption": "aes-256-gcm"})
    plain, other = store.put(texture(9000), name="/plain").id, store.put(texture(9000, 1), name="/other").id
    hidden = store.put(texture(9000, 2), name="/hidden", policy=secret).id
    store.clone("/hidden", "/twin")
    blocks = make(store, size=8192)
    refusals = [
        (cmd.CopyRange(plain, 0, hidden, 0, 10), Status.NOT_PERMITTED),
        (cmd.CopyRange(hidden, 0, plain, 0, 10), Status.NOT_PERMITTED),
        (cmd.CopyRange(plain, 0, other, 8999, 2), Status.INVALID),
        (cmd.CopyRange(plain, 0, other, -1, 2), Status.INVALID),
        (cmd.CopyRange(plain, 0, other, 0, 0), Status.INVALID),
        (cmd.CopyRange(plain, 0, other, 0, COPY_BYTES_MAX + 1), Status.INVALID),
        (cmd.CopyRange(plain, (1 << 63) - 1, other, 0, 2), Status.TOO_LARGE),
        (cmd.CopyRange(blocks, 0, plain, 0, 9000), Status.NO_SPACE),
        (cmd.CopyRange(store.root, 0, plain, 0, 1), Status.IS_DIRECTORY),
        (cmd.CopyRange(plain, 0, bytes(16), 0, 1), Status.NOT_FOUND),
    ]
    for command, status in refusals:
        with pytest.raises(space.SpaceError) as refused:
            store.execute(command)
        assert refused.value.status is status, command
    position = store.position
    assert store.execute(cmd.CopyRange(plain, 5, plain, 5, 10)).position == position  # nothing to change
    store.execute(cmd.CopyRange(plain, 20_000, other, 10, 100))
    assert store.get("/plain") == texture(9000) + bytes(11_000) + texture(9000, 1)[10:110]
    store.execute(cmd.CopyRange(store.resolve("/twin"), 0, hidden, 4000, 1000))
    assert store.get("/twin") == texture(9000, 2)[4000:5000] + texture(9000, 2)[1000:]


# --- reservations

HOSTS = [bytes([number]) * 16 for number in (1, 2)]
Work = Callable[[LocalBlockDevice], Awaitable[object]]


def test_reservations_are_rows_of_the_log(store: Store) -> None:
    """They outlive the process, are in the digest, change nothing of the capsule, and are refused by their rules."""
    one, two = HOSTS
    capsule = make(store)
    before = store.stat(capsule)

    async def work(opened: LocalBlockDevice) -> None:
        keeper = opened.reservations
        await keeper.change(cmd.RegisterReservation(capsule, one, 0, 0, 7), actor="host")
        with pytest.raises(RefusedError) as refused:
            await keeper.change(cmd.AcquireReservation(capsule, two, 0, 1, 0), actor="host")
        assert refused.value.status is Status.NOT_PERMITTED
        await keeper.change(cmd.AcquireReservation(capsule, one, 0, 1, 7), actor="host")
        assert keeper.state.position == store.position
        assert store.wal.durable_index == store.position

    on(store, capsule, work)
    after = store.stat(capsule)
    assert (after.change, after.mtime, after.ctime) == (before.change, before.mtime, before.ctime)
    assert store.replay(verify=True).equal
    events = [event for event in store.log() if event.kind in {"RegistrantsChanged", "ReservationChanged"}]
    assert [event.detail["registered"] for event in events[:1]] == ["24 bytes"]
    path = store.path
    store.close()

    async def again(opened: LocalBlockDevice) -> None:
        state = opened.reservations.state
        assert (state.keys, state.holder, state.generation) == ({one: 7}, one, 1)
        assert (state.allows(one, writes=True), state.allows(two, writes=True)) == (True, False)
        assert state.allows(two, writes=False)

    with Store(path) as reopened:
        on(reopened, capsule, again)


@pytest.mark.parametrize(
    "late",
    [
        lambda opened: opened.write(0, texture(4096, 1), durable=False, actor="host"),
        lambda opened: opened.write_zeroes(0, 4096, deallocate=True, durable=False, actor="host"),
        lambda opened: opened.deallocate([(0, 4096)], actor="host"),
        lambda opened: opened.copy([(0, 4096)], 8192, durable=False, actor="host"),
        lambda opened: opened.compare_and_write(
            0, texture(4096), texture(4096, 1), durable=False, actor="host"
        ),
    ],
    ids=["write", "write_zeroes", "deallocate", "copy", "compare_and_write"],
)
def test_a_command_that_was_checked_too_early_is_not_carried_out(store: Store, late: Work) -> None:
    """A host is preempted between the check and the write: the write is refused, worth a retry, and changes nothing."""
    capsule = make(store)

    async def work(opened: LocalBlockDevice) -> None:
        await opened.write(0, texture(4096), durable=False, actor="host")
        before = await held(opened)
        checked = opened.reservations.state
        assert checked.kind is None
        store.execute(cmd.RegisterReservation(capsule, HOSTS[0], 0, 0, 7))  # by another node
        store.execute(cmd.AcquireReservation(capsule, HOSTS[0], 0, 1, 7))
        with pytest.raises(ConflictError) as refused:
            await late(opened)
        assert refused.value.status is Status.EXISTS
        assert await held(opened) == before
        assert (
            opened.reservations.state.position > checked.position
        )  # what the next attempt is checked against
        await late(opened)
        assert await held(opened) != before

    on(store, capsule, work)


def test_numbers_of_namespaces_are_for_ever(store: Store) -> None:
    """Who asks first gets the next number of a subsystem; restarts and deletions change none, none is given twice."""
    one, two, three = (CapsuleId(bytes([number]) * 16) for number in (1, 2, 3))
    assert known_number(store, NQN, one) is None
    assert [namespace_number(store, NQN, each) for each in (one, two, one)] == [1, 2, 1]
    assert namespace_number(store, f"{NQN}2", two) == 1
    assert store.replay(verify=True).equal
    path = store.path
    store.close()
    with Store(path) as again:
        assert [known_number(again, NQN, each) for each in (one, two, three)] == [1, 2, None]
        before = again.position
        assert namespace_number(again, NQN, three) == 3
        assert again.position == before + 1
        for name in ("", "x" * 224, "nqn\n", "é"):
            with pytest.raises(UsageError):
                namespace_number(again, name, one)
        assert [event.kind for event in again.log(start=before + 1)] == ["NamespaceAssigned"]


def test_an_identity_belongs_to_a_capsule_and_a_moment() -> None:
    """The bytes hosts know a namespace by never change, differ for every moment, and claim nobody's vendor number."""
    capsule = CapsuleId.parse("01890a5d-ac96-774b-bcce-b302099a8057")
    now = namespace_identity(capsule)
    assert now.uuid == capsule
    assert now.nguid.hex() == "5b2edf980407558b7aaccbe003c581e6"
    assert now.eui64.hex() == "eac7a0dcaed47fed"
    moments = [None, AtPosition(1), AtPosition(2), AtPosition(1, 0), AtPosition(1, 1)]
    found = [namespace_identity(capsule, moment) for moment in moments]
    for field in ("uuid", "nguid", "eui64"):
        assert len({getattr(each, field) for each in found}) == len(moments)
    for each in found:
        assert (each.nguid[8] & 3, each.eui64[0] & 3) == (2, 2)
    assert str(found[1].uuid)[14] == "8"

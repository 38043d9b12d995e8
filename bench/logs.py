"""Logs to measure with, made by the store's own code: commands are decided, logged and applied as in daily life.

Everything is drawn from a seed, so that two runs measure the same events.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from space._errors import SpaceError
from space._node.store import Store
from space.events import commands as cmd
from space.events.commands import Command, Durability, Request
from space.events.ids import CapsuleId
from space.events.types import Kind

SEED: Final = 20_240_229
SMALL_WRITE_BYTES: Final = 512
DIRECTORY_ENTRIES: Final = 1000
BATCH_COMMANDS: Final = (64, 512)
"""Fewest and most commands a batch: what group commit makes of many writers."""

Generator = Callable[[Store, int], Iterator[Command]]
"""``(store, events)`` → commands that make about as many events."""


class Ids:
    """Fresh capsule ids as the store draws them, from a seed."""

    def __init__(self, seed: int = SEED) -> None:
        self._random = random.Random(seed)
        self._time_ns = 1_700_000_000_000_000_000

    def __call__(self) -> CapsuleId:
        self._time_ns += 250_000
        return CapsuleId.new(self._time_ns, self._random.randbytes)


def submit(store: Store, commands: Iterable[Command], seed: int = SEED) -> None:
    """Carries out commands in batches of 64 to 512.

    Raises:
        SpaceError: one was refused.
    """
    sizes = random.Random(seed)
    source = iter(commands)
    while batch := list(itertools.islice(source, sizes.randint(*BATCH_COMMANDS))):
        outcomes = store.execute_all(
            [Request(each, "bench") for each in batch], durability=Durability.BUFFERED
        )
        for outcome in outcomes:
            if isinstance(outcome, SpaceError):
                raise outcome


def creations(count: int, root: CapsuleId, ids: Callable[[], CapsuleId]) -> Iterator[cmd.CreateCapsule]:
    """Directories of 1000 files each, ``count`` files in all; two events a command."""
    directory = root
    for number in range(count):
        if number % DIRECTORY_ENTRIES == 0:
            directory = ids()
            yield cmd.CreateCapsule(
                directory, Kind.DIRECTORY, 0o755, 0, 0, root, b"d%06d" % (number // DIRECTORY_ENTRIES)
            )
        yield cmd.CreateCapsule(ids(), Kind.FILE, 0o644, 0, 0, directory, b"file-%08d" % number)


def small_writes(store: Store, count: int) -> Iterator[Command]:
    """512 B at the end of one of many files (a hundredth as many), as loggers do; one event a command."""
    return _writes(store, count, lambda written, _: written)


def random_writes(store: Store, count: int) -> Iterator[Command]:
    """512 B anywhere in the first MiB of one of many files, as databases do; one event a command."""
    return _writes(store, count, lambda _, chance: chance.randrange((1 << 20) // SMALL_WRITE_BYTES))


def _writes(store: Store, count: int, block: Callable[[int, random.Random], int]) -> Iterator[Command]:
    made = list(creations(max(1, count // 100), store.root, Ids()))
    yield from made
    files = [each.capsule for each in made if each.kind is Kind.FILE]
    written = dict.fromkeys(files, 0)
    chance = random.Random(SEED)
    for _ in range(count - 2 * len(made)):
        capsule = chance.choice(files)
        yield small_write(store, capsule, block(written[capsule], chance) * SMALL_WRITE_BYTES, chance)
        written[capsule] += 1


def small_write(store: Store, capsule: bytes, offset: int, chance: random.Random) -> Command:
    """One small write, encoded as the store would: stored as it is, without dedupe."""
    data = chance.randbytes(SMALL_WRITE_BYTES)
    (command,) = store.encode_extents(CapsuleId(capsule), offset, data, store.policy(store.root), 0)
    return command


def creations_with_attributes(store: Store, count: int) -> Iterator[Command]:
    """Files made, then given mode, owner and times, as an import does; three events a file."""
    for each in creations(count // 3, store.root, Ids()):
        yield each
        yield cmd.SetAttributes(
            each.capsule, 0o600, 1000, 1000, 1_700_000_000_000_000_000, 1_700_000_000_000_000_000
        )


def mixed(store: Store, count: int) -> Iterator[Command]:
    """A day of a file server; of a hundred commands 50 write, 20 create, 15 set attributes, 5 rename, 5 resize,
    3 set an xattr, 2 unlink.
    """
    chance, ids = random.Random(SEED), Ids()
    fresh = creations(count, store.root, ids)
    alive: list[tuple[bytes, bytes, bytes]] = []  # capsule, directory, name
    events = 0
    while events < count:
        draw = chance.randrange(100) if len(alive) > 100 else 60
        at = chance.randrange(len(alive)) if alive else 0
        events += 1
        if 50 <= draw < 70:
            made = next(fresh)
            yield made
            events += 1
            if made.kind is Kind.FILE:
                alive.append((made.capsule, made.parent, made.name))
            continue
        capsule, directory, name = alive[at]
        if draw < 50:
            yield small_write(store, capsule, chance.randrange(256) * SMALL_WRITE_BYTES, chance)
        elif draw < 85:
            yield cmd.SetAttributes(capsule, mtime=1_700_000_000_000_000_000 + events)
        elif draw < 90:
            renamed = b"moved-%09d" % events
            yield cmd.Rename(directory, name, directory, renamed)
            alive[at] = (capsule, directory, renamed)
        elif draw < 95:
            yield cmd.Resize(capsule, chance.randrange(1 << 17))
        elif draw < 98:
            yield cmd.SetXattr(capsule, b"user.note", b"%d" % events)
        else:
            yield cmd.Unlink(directory, name)
            alive[at] = alive[-1]
            alive.pop()

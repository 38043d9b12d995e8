"""Concurrent clients of a simulated cluster: real commands, linearizable reads, retries, and what they saw.

A client does one thing after the other.  It asks any node; told that another one leads, or told nothing, it asks
again elsewhere with the same client id and sequence, and gives up after a while: then its operation
stays open for ever, because it may still happen.  Two kinds of objects are watched by the checker of
:mod:`tests.chaos.linearizability`: registers (an extended attribute, the size and the mode of a file) and a directory.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from random import Random
from typing import Any, Final

import attrs
from crc32c import crc32c

from space._errors import SpaceError, Status
from space.content.frames import FrameRef, pack_frames
from space.events import commands as cmd
from space.events.commands import Command, Receipt
from space.events.ids import ID_BYTES, ROOT
from space.statemachine.tables import CAPSULE, ENTRY, XATTR, CapsuleRow, EntryRow
from tests.chaos.linearizability import (
    ABSENT,
    DIRECTORY,
    OK,
    PRESENT,
    REGISTER,
    Model,
    Operation,
    Outcome,
    check,
)
from tests.state_support import MemoryWriter

FILES: Final = tuple(b"file%012d" % number for number in range(2))
XATTRS: Final = (b"user.a", b"user.b")
NAMES: Final = (b"a", b"b", b"c")

Read = Callable[[MemoryWriter], Any]
FIRST_MODE: Final = 0o644


@attrs.frozen
class Task:
    """Something to do: for the checker ``call`` on ``key``, for the cluster a command or a read."""

    key: Hashable
    call: tuple[Any, ...]
    command: Command | None
    read: Read | None = None


def draw_task(rng: Random, fresh: int) -> Task:
    """A task; ``fresh`` is a number that no other task of the run has, for values that tell where they are from."""
    reads = rng.random() < 0.4
    kind = rng.randrange(10)
    if kind < 4:
        return _xattr_task(rng, fresh, reads=reads)
    if kind < 6:
        return _number_task(rng, fresh, reads=reads)
    if kind < 7:
        return draw_write(rng, fresh)
    return _directory_task(rng, fresh, reads=reads)


def _xattr_task(rng: Random, fresh: int, *, reads: bool) -> Task:
    capsule, name = rng.choice(FILES), rng.choice(XATTRS)
    key = ("xattr", capsule, name)
    if reads:
        return Task(key, ("read",), None, lambda rows: rows.get(XATTR, capsule + name))
    value = b"%d" % fresh
    kind = rng.choice(("set", "create", "replace", "remove"))
    if kind == "remove":
        return Task(key, (kind,), cmd.RemoveXattr(capsule, name))
    command = cmd.SetXattr(capsule, name, value, create=kind == "create", replace=kind == "replace")
    return Task(key, (kind, value), command)


def _number_task(rng: Random, fresh: int, *, reads: bool) -> Task:
    capsule = rng.choice(FILES)
    field = rng.choice(("size", "mode"))
    key = (field, capsule)
    if reads:
        return Task(key, ("read",), None, lambda rows: _field(rows, capsule, field))
    if field == "size":
        size = (1 << 20) + fresh
        command: Command = cmd.Resize(capsule, size) if fresh % 2 else cmd.SetAttributes(capsule, size=size)
        return Task(key, ("set", size), command)
    mode = 0o1000 + fresh % 0o6000  # never what it was created with
    return Task(key, ("set", mode), cmd.SetAttributes(capsule, mode=mode))


def _field(rows: MemoryWriter, capsule: bytes, field: str) -> Any:
    data = rows.get(CAPSULE, capsule)
    value = None if data is None else getattr(CapsuleRow.decode(data), field)
    return None if value in {0, FIRST_MODE} else value  # as it was created: the register holds nothing yet


def draw_write(rng: Random, fresh: int) -> Task:
    """Writes bytes, so that batches have payload; inside the first MiB, so that the size, which is watched, stays."""
    capsule = rng.choice(FILES)
    data = b"%d " % fresh * rng.choice((1, 8, 300))
    frame = FrameRef(len(data), len(data), crc32c(data), 0, 0, 0, 0, 0, 0, bytes(16))
    stored = cmd.StoredFrame(pack_frames([frame]), data)
    return Task(None, (), cmd.WriteExtent(_scratch_of(capsule), 0, len(data), [stored]))


def _scratch_of(capsule: bytes) -> bytes:
    return b"data" + capsule[4:]


def _directory_task(rng: Random, fresh: int, *, reads: bool) -> Task:
    key, parent = ("directory",), bytes(ROOT)
    name, other = rng.sample(NAMES, 2)
    if reads:
        return Task(key, ("lookup", name), None, lambda rows: _lookup(rows, name))
    kind = rng.choice(("create", "create", "unlink", "rename", "rename", "exchange"))
    if kind == "create":
        capsule = b"made%012d" % fresh
        return Task(key, (kind, name, capsule), cmd.CreateCapsule(capsule, parent=parent, name=name))
    if kind == "unlink":
        return Task(key, (kind, name), cmd.Unlink(parent, name))
    if kind == "exchange":
        return Task(key, (kind, name, other), cmd.Rename(parent, name, parent, other, exchange=True))
    replace = rng.random() < 0.5
    return Task(key, (kind, name, other, replace), cmd.Rename(parent, name, parent, other, replace=replace))


def _lookup(rows: MemoryWriter, name: bytes) -> bytes | None:
    data = rows.get(ENTRY, bytes(ROOT) + name)
    return None if data is None else EntryRow.decode(data).capsule


def first_commands() -> list[Command]:
    """What is in the store before it becomes a cluster."""
    files = [
        cmd.CreateCapsule(capsule, mode=FIRST_MODE) for each in FILES for capsule in (each, _scratch_of(each))
    ]
    return [cmd.InitialiseStore(b"s" * ID_BYTES, 0o755, 0, 0), *files]


_REFUSALS: Final = {Status.EXISTS: PRESENT, Status.NOT_FOUND: ABSENT, Status.NO_ATTRIBUTE: ABSENT}


def result_of(outcome: Receipt | SpaceError) -> Any:
    """What the checker calls an outcome; None if it is no answer but a reason to ask again."""
    return OK if isinstance(outcome, Receipt) else _REFUSALS.get(outcome.status)


@attrs.define
class Client:
    """One caller: what it is doing, and what it saw."""

    number: int
    sequence: int = 0
    attempts: int = 0
    attempt: int = 0  # number of the attempt that counts; what belongs to earlier ones is ignored
    started: int = 0
    task: Task | None = None

    @property
    def id(self) -> bytes:
        """Client id of its commands."""
        return b"client%010d" % self.number


def check_history(history: list[Operation]) -> list[Outcome]:
    """The verdicts over what all clients saw."""
    watched = [operation for operation in history if operation.key is not None]
    names = [operation for operation in watched if operation.key == ("directory",)]
    registers = [operation for operation in watched if operation.key != ("directory",)]
    pairs: list[tuple[list[Operation], Model[Any]]] = [(names, DIRECTORY), (registers, REGISTER)]
    return [check(part, model, configurations_max=20_000) for part, model in pairs]

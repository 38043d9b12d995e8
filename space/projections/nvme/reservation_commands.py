"""Reservation Register, Acquire, Release and Report (Base Specification 2.0, sections 7.5 to 7.8).

What a field may hold is checked here; whether a host may is decided by the namespace's keeper.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Final

from space._errors import SpaceError, Status
from space.events import commands as cmd
from space.projections.nvme import reservations
from space.projections.nvme.pdu import Command
from space.projections.nvme.reply import DONE, Reply
from space.projections.nvme.status import CommandError, NvmeStatus
from space.projections.nvme.target import Namespace, Subsystem

if TYPE_CHECKING:
    import asyncio

    from space.projections.nvme.queue import Queue

_KEYS: Final = struct.Struct("<QQ")
_KEY: Final = struct.Struct("<Q")
_PERSISTENCE_RESERVED, _PERSISTENCE_ON = 1, 3
"""Values of CPTPL beside 0, no change, and 2, reservations end with the loss of power."""

_STATUS: Final = {
    Status.NOT_PERMITTED: NvmeStatus.RESERVATION_CONFLICT,
    Status.NO_SPACE: NvmeStatus.INTERNAL_ERROR,
}
"""What a keeper's refusals are here; other errors are what they are for every command."""


def _payload(command: Command, layout: struct.Struct) -> tuple[int, ...]:
    if command.sgl_length != layout.size or command.data is None:
        raise CommandError(NvmeStatus.SGL_LENGTH_INVALID, location=32)
    return layout.unpack(command.data)


def _subsystem(queue: Queue) -> Subsystem:
    assert queue.controller is not None
    return queue.controller.subsystem


def _host(queue: Queue) -> bytes:
    assert queue.controller is not None
    return queue.controller.host_id


async def _change(queue: Queue, namespace: Namespace, command: reservations.Command) -> Reply:
    assert queue.controller is not None
    try:
        await namespace.reservations.change(command, actor=queue.controller.actor)
    except SpaceError as error:
        status = _STATUS.get(error.status)
        if status is None:
            raise
        raise CommandError(status) from None
    _subsystem(queue).tell_reservations(namespace)
    return DONE


def register(queue: Queue, namespace: Namespace, command: Command) -> Coroutine[Any, Any, Reply]:
    """Reservation Register."""
    current, new = _payload(command, _KEYS)
    persistence = command.cdw10 >> 30
    if persistence == _PERSISTENCE_RESERVED or (
        persistence and (persistence == _PERSISTENCE_ON) != namespace.reservations.persistent
    ):
        raise CommandError(NvmeStatus.INVALID_FIELD, location=43)
    if command.cdw10 & 7 > 2:
        raise CommandError(NvmeStatus.INVALID_FIELD, location=40)
    wanted = cmd.RegisterReservation(
        namespace.uuid,
        _host(queue),
        command.cdw10 & 7,
        current,
        new,
        ignore=bool(command.cdw10 >> 3 & 1),
    )
    return _change(queue, namespace, wanted)


def _check_action(command: Command, actions: int) -> None:
    """Actions are numbers below ``actions``; keys that exist are never ignored here (IEKEY)."""
    if command.cdw10 >> 3 & 1 or command.cdw10 & 7 >= actions:
        raise CommandError(NvmeStatus.INVALID_FIELD, location=40)


def acquire(queue: Queue, namespace: Namespace, command: Command) -> Coroutine[Any, Any, Reply]:
    """Reservation Acquire: acquires or preempts."""
    current, preempted = _payload(command, _KEYS)
    _check_action(command, 3)
    wanted = cmd.AcquireReservation(
        namespace.uuid, _host(queue), command.cdw10 & 7, command.cdw10 >> 8 & 0xFF, current, preempted
    )
    carry_out = _preempt_and_abort if wanted.action == 2 else _change
    return carry_out(queue, namespace, wanted)


async def _preempt_and_abort(queue: Queue, namespace: Namespace, command: reservations.Command) -> Reply:
    """Answered when nothing of the preempted hosts is under way here: writes are waited for, they cannot be undone.

    What they have under way through other nodes was decided before, or is refused (``reserved`` of a write).
    """
    before = namespace.reservations.state.keys
    await _change(queue, namespace, command)
    gone = before.keys() - namespace.reservations.state.keys.keys()
    for controller in list(_subsystem(queue).controllers.values()):
        if controller.host_id in gone and controller.mutations:
            idle = queue.shell.future()
            controller.when_idle(functools.partial(_wake, idle))
            await idle
    return DONE


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def release(queue: Queue, namespace: Namespace, command: Command) -> Coroutine[Any, Any, Reply]:
    """Reservation Release: releases, or clears."""
    (current,) = _payload(command, _KEY)
    _check_action(command, 2)
    wanted = cmd.ReleaseReservation(
        namespace.uuid, _host(queue), command.cdw10 & 7, command.cdw10 >> 8 & 0xFF, current
    )
    return _change(queue, namespace, wanted)


def report(queue: Queue, namespace: Namespace, command: Command) -> Coroutine[Any, Any, Reply]:
    """Reservation Report; host ids have 128 bits here, so only the extended form can tell them."""
    if not command.cdw11 & 1:
        raise CommandError(NvmeStatus.HOST_ID_INCONSISTENT)
    length = (command.cdw10 + 1) * 4
    if length != command.sgl_length:
        raise CommandError(NvmeStatus.SGL_LENGTH_INVALID, location=32)
    return _report(_subsystem(queue), namespace.reservations, length)


async def _report(subsystem: Subsystem, keeper: reservations.Keeper, length: int) -> Reply:
    await keeper.confirm()
    controllers = {each.host_id: each.number for each in subsystem.controllers.values()}
    data = reservations.report(keeper.state, controllers, persists=keeper.persistent)
    return Reply([data[:length].ljust(length, b"\0")], length)

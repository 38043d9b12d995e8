"""Fabrics commands: Connect, Property Get and Set, Authentication, Disconnect (Base Specification 2.0, section 6)."""

from __future__ import annotations

import struct
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Final

from space._errors import SpaceError
from space.projections.nvme.auth import MESSAGE_BYTES_MAX, SECP, Authentication
from space.projections.nvme.controller import QUEUE_ENTRIES_MAX, Controller
from space.projections.nvme.pdu import Command
from space.projections.nvme.reply import DONE, Reply
from space.projections.nvme.status import CommandError, NvmeStatus
from space.projections.nvme.target import NQN_BYTES_MAX, Subsystem, check_nqn

if TYPE_CHECKING:
    from space.projections.nvme.queue import Handler, Queue

PROPERTY_SET: Final = 0x00
CONNECT: Final = 0x01
PROPERTY_GET: Final = 0x04
AUTHENTICATION_SEND: Final = 0x05
AUTHENTICATION_RECEIVE: Final = 0x06
DISCONNECT: Final = 0x08
AUTHENTICATING: Final = frozenset({CONNECT, AUTHENTICATION_SEND, AUTHENTICATION_RECEIVE})
_AUTHENTICATION_REQUIRED: Final = 1 << 17
"""ATR, in the completion of Connect (figure 384)."""

DYNAMIC: Final = 0xFFFF
"""Any controller: the only thing a host may ask for where controllers are made as hosts connect."""
_DATA: Final = struct.Struct("<16sH238x256s256s256x")
assert _DATA.size == 1024
_NO_FLOW_CONTROL: Final = 1 << 2
_FLUSH_TRIES: Final = 3
"""A shutdown tries to flush each namespace so often; what stays volatile was never promised."""


def handler(queue: Queue, command: Command) -> Handler | None:
    """What carries out a fabrics command on a queue; None if the queue does not take it."""
    kind = command.nsid & 0xFF
    if kind == CONNECT:
        return connect
    if queue.authentication is not None and kind == AUTHENTICATION_SEND:
        return authentication_send
    if queue.authentication is not None and kind == AUTHENTICATION_RECEIVE:
        return authentication_receive
    if queue.number:
        return disconnect if kind == DISCONNECT else None
    return {PROPERTY_GET: property_get, PROPERTY_SET: property_set}.get(kind)


def _invalid(offset: int, *, in_data: bool) -> CommandError:
    """Connect Invalid Parameters, with the offset of the parameter (figure 383)."""
    return CommandError(NvmeStatus.CONNECT_INVALID, result=offset | in_data << 16, location=offset)


def connect(queue: Queue, command: Command) -> Reply:
    """Makes the connection a queue: of a new controller (queue 0), or one more of a controller there is."""
    if queue.controller is not None:
        raise CommandError(NvmeStatus.COMMAND_SEQUENCE_ERROR, location=0)
    if command.cdw10 & 0xFFFF:
        raise CommandError(NvmeStatus.CONNECT_FORMAT, location=40)
    if command.sgl_length != _DATA.size or command.data is None:
        raise CommandError(NvmeStatus.SGL_LENGTH_INVALID, location=32)
    host_id, controller_id, subsystem_field, host_field = _DATA.unpack(command.data)
    number, entries = command.cdw10 >> 16, (command.cdw11 & 0xFFFF) + 1
    if not 2 <= entries <= QUEUE_ENTRIES_MAX:
        raise _invalid(44, in_data=False)
    if host_id == bytes(16):
        raise _invalid(0, in_data=True)
    subsystem = queue.target.find(_name(subsystem_field, 256))
    host_nqn = _name(host_field, 512)
    if subsystem is None:
        raise _invalid(256, in_data=True)
    if not subsystem.admits(host_nqn):
        raise CommandError(NvmeStatus.CONNECT_HOST)
    if number:
        controller = _existing(subsystem, controller_id, host_nqn, host_id, number)
    else:
        controller = _new(queue, subsystem, controller_id, host_nqn, host_id, command.cdw12)
    flow_control = not command.cdw11 >> 16 & _NO_FLOW_CONTROL
    queue.connected(controller, number, entries, flow_control=flow_control)
    credentials = subsystem.credentials.get(host_nqn)
    if credentials is None:
        return Reply(result=controller.number)
    queue.authentication = Authentication(
        credentials, host_nqn=host_nqn, subsystem_nqn=subsystem.nqn, random=queue.shell.random
    )
    return Reply(result=controller.number | _AUTHENTICATION_REQUIRED)


def _check_security(command: Command) -> None:
    if command.cdw10 >> 8 != SECP << 16 | 0x0101:
        raise CommandError(NvmeStatus.INVALID_FIELD, location=41)
    if command.cdw11 != command.sgl_length or not 0 < command.cdw11 <= MESSAGE_BYTES_MAX:
        raise CommandError(NvmeStatus.INVALID_FIELD, location=44)


def authentication_send(queue: Queue, command: Command) -> Reply:
    """A message of the host."""
    assert queue.authentication is not None
    _check_security(command)
    queue.authentication.receive(bytes(command.data or b""))
    return DONE


def authentication_receive(queue: Queue, command: Command) -> Reply:
    """The message for the host; after a failure the connection closes."""
    assert queue.authentication is not None
    _check_security(command)
    message = queue.authentication.take()
    if message is None:
        raise CommandError(NvmeStatus.COMMAND_SEQUENCE_ERROR)
    if len(message) > command.sgl_length:
        raise CommandError(NvmeStatus.INVALID_FIELD, location=44)
    if queue.authentication.failed:
        queue.close("the host did not prove who it is")
    return Reply([message.ljust(command.sgl_length, b"\0")], command.sgl_length)


def _name(field: bytes, offset: int) -> str:
    text, terminator, _ = field.partition(b"\0")
    try:
        if terminator and len(text) <= NQN_BYTES_MAX:
            return check_nqn(text.decode())
    except (UnicodeDecodeError, SpaceError):
        pass
    raise _invalid(offset, in_data=True)


def _new(
    queue: Queue, subsystem: Subsystem, controller_id: int, host_nqn: str, host_id: bytes, keep_alive_ms: int
) -> Controller:
    if controller_id != DYNAMIC:
        raise _invalid(16, in_data=True)
    number = subsystem.free_controller_id()
    if number is None:
        raise CommandError(NvmeStatus.CONNECT_BUSY, retry=True)
    controller = Controller(
        queue.target,
        subsystem,
        number,
        host_nqn=host_nqn,
        host_id=host_id,
        keep_alive_ms=keep_alive_ms,
        limits=queue.connection.limits,
        now=queue.now,
    )
    subsystem.controllers[number] = controller
    return controller


def _existing(
    subsystem: Subsystem, controller_id: int, host_nqn: str, host_id: bytes, number: int
) -> Controller:
    controller = subsystem.controllers.get(controller_id)
    if (
        controller is None
        or controller.is_discovery
        or (controller.host_nqn, controller.host_id) != (host_nqn, host_id)
    ):
        raise _invalid(16, in_data=True)
    if not controller.ready:
        raise CommandError(NvmeStatus.COMMAND_SEQUENCE_ERROR, location=0)
    agreed = controller.features.queues or subsystem.queues_max
    if number > agreed or number in controller.queues:
        raise _invalid(42, in_data=False)
    return controller


def _property_size(command: Command) -> int:
    size = {0: 4, 1: 8}.get(command.cdw10 & 7)
    if size is None:
        raise CommandError(NvmeStatus.INVALID_FIELD, location=40)
    return size


def property_get(queue: Queue, command: Command) -> Reply:
    """Reads a property."""
    assert queue.controller is not None
    return Reply(result=queue.controller.get_property(command.cdw11, _property_size(command)))


def property_set(queue: Queue, command: Command) -> Reply | Coroutine[Any, Any, Reply]:
    """Writes a property; a shutdown is complete when every cache is flushed."""
    assert queue.controller is not None
    value = command.cdw12 | command.cdw13 << 32
    if queue.controller.set_property(command.cdw11, _property_size(command), value):
        return _shut_down(queue.controller)
    return DONE


async def _shut_down(controller: Controller) -> Reply:
    for namespace in list(controller.subsystem.namespaces.values()):
        for _ in range(_FLUSH_TRIES):
            try:
                await namespace.device.flush()
            except SpaceError:
                continue
            break
    controller.shut_down()
    return DONE


def disconnect(queue: Queue, command: Command) -> Reply:
    """Deletes an I/O queue: the connection closes once this is answered."""
    if command.cdw10 & 0xFFFF:
        raise CommandError(NvmeStatus.CONNECT_FORMAT, location=40)
    queue.close("the host disconnected the queue")
    return DONE

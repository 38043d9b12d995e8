"""Get Features and Set Features (Base Specification 2.0, sections 5.15 and 5.27).

Nothing is saved: a controller lives as long as its connection, and its features with it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import attrs

from space.projections.nvme.controller import EVENT_BITS, Controller, Event
from space.projections.nvme.pdu import Command
from space.projections.nvme.reply import DONE, Reply
from space.projections.nvme.status import CommandError, NvmeStatus
from space.projections.nvme.target import ALL_NAMESPACES

if TYPE_CHECKING:
    from space.projections.nvme.queue import Queue

_TIMESTAMP: Final = struct.Struct("<Q")
_SMART_EVENTS: Final = 0x1F
IO_EVENTS: Final = _SMART_EVENTS | EVENT_BITS[Event.NAMESPACE_CHANGED] | EVENT_BITS[Event.ANA_CHANGED]
DISCOVERY_EVENTS: Final = EVENT_BITS[Event.DISCOVERY_CHANGED]
_NOTICE_BITS: Final = 0b1110


@attrs.frozen
class _Feature:
    """How one feature is read and set; ``set`` None: it cannot be.

    ``data`` is the length of its data structure, 0 where its value is dword 0 of the completion.
    """

    get: Callable[[Queue, Command], int | bytes]
    set: Callable[[Queue, Command], int] | None = None
    default: int | bytes = 0
    data: int = 0
    per_namespace: bool = False


def _controller(queue: Queue) -> Controller:
    assert queue.controller is not None
    return queue.controller


def _invalid() -> CommandError:
    return CommandError(NvmeStatus.INVALID_FIELD, location=44)


def _payload(command: Command, size: int) -> bytes:
    if command.sgl_length != size or command.data is None:
        raise CommandError(NvmeStatus.SGL_LENGTH_INVALID, location=32)
    return bytes(command.data)


def _get_arbitration(queue: Queue, command: Command) -> int:
    return _controller(queue).features.arbitration


def _set_arbitration(queue: Queue, command: Command) -> int:
    _controller(queue).features.arbitration = command.cdw11 & 0xFFFF_FF07
    return 0


def _get_power(queue: Queue, command: Command) -> int:
    return 0


def _set_power(queue: Queue, command: Command) -> int:
    if command.cdw11 & 0x1F:
        raise _invalid()  # there is one power state
    return 0


def _threshold(command: Command) -> bool:
    """Whether it is the upper threshold of the composite temperature; there are no other sensors."""
    kind = command.cdw11 >> 20 & 3
    if command.cdw11 >> 16 & 15 not in {0, 15} or kind > 1:
        raise _invalid()
    return kind == 0


def _get_temperature(queue: Queue, command: Command) -> int:
    features = _controller(queue).features
    return features.over_temperature if _threshold(command) else features.under_temperature


def _set_temperature(queue: Queue, command: Command) -> int:
    features = _controller(queue).features
    if _threshold(command):
        features.over_temperature = command.cdw11 & 0xFFFF
    else:
        features.under_temperature = command.cdw11 & 0xFFFF
    return 0


def _get_recovery(queue: Queue, command: Command) -> int:
    return _controller(queue).features.error_recovery


def _set_recovery(queue: Queue, command: Command) -> int:
    if command.cdw11 >> 16 & 1:
        raise _invalid()  # reading what was deallocated is no error here
    _controller(queue).features.error_recovery = command.cdw11 & 0xFFFF
    return 0


def _get_cache(queue: Queue, command: Command) -> int:
    return int(_controller(queue).features.write_cache)


def _set_cache(queue: Queue, command: Command) -> int:
    _controller(queue).features.write_cache = bool(command.cdw11 & 1)
    return 0


def _get_queues(queue: Queue, command: Command) -> int:
    controller = _controller(queue)
    count = (controller.features.queues or controller.subsystem.queues_max) - 1
    return count | count << 16


def _set_queues(queue: Queue, command: Command) -> int:
    controller = _controller(queue)
    submission, completion = command.cdw11 & 0xFFFF, command.cdw11 >> 16
    if 0xFFFF in {submission, completion}:
        raise _invalid()
    if len(controller.queues) > 1:
        raise CommandError(NvmeStatus.COMMAND_SEQUENCE_ERROR)
    controller.features.queues = min(submission + 1, completion + 1, controller.subsystem.queues_max)
    return _get_queues(queue, command)


def _get_atomicity(queue: Queue, command: Command) -> int:
    return _controller(queue).features.write_atomicity


def _set_atomicity(queue: Queue, command: Command) -> int:
    _controller(queue).features.write_atomicity = command.cdw11 & 1
    return 0


def _get_events(queue: Queue, command: Command) -> int:
    return _controller(queue).features.events


def _set_events(queue: Queue, command: Command) -> int:
    controller = _controller(queue)
    if command.cdw11 & ~(DISCOVERY_EVENTS if controller.is_discovery else IO_EVENTS):
        raise _invalid()
    controller.features.events = command.cdw11
    return 0


def _get_timestamp(queue: Queue, command: Command) -> bytes:
    features = _controller(queue).features
    elapsed = max(int((queue.now - features.timestamp_at) * 1000), 0)
    milliseconds = (features.timestamp_ms + elapsed) & 0xFFFF_FFFF_FFFF
    return _TIMESTAMP.pack(milliseconds | features.timestamp_origin << 49)


def _set_timestamp(queue: Queue, command: Command) -> int:
    features = _controller(queue).features
    (value,) = _TIMESTAMP.unpack(_payload(command, _TIMESTAMP.size))
    features.timestamp_ms = value & 0xFFFF_FFFF_FFFF
    features.timestamp_origin = 1  # set by a host
    features.timestamp_at = queue.now
    return 0


def _get_keep_alive(queue: Queue, command: Command) -> int:
    return _controller(queue).keep_alive_ms


def _set_keep_alive(queue: Queue, command: Command) -> int:
    _controller(queue).set_keep_alive(command.cdw11, queue.now)
    return 0


def _get_behavior(queue: Queue, command: Command) -> bytes:
    return _controller(queue).features.host_behavior


def _set_behavior(queue: Queue, command: Command) -> int:
    _controller(queue).features.host_behavior = _payload(command, 512)
    return 0


def _get_profile(queue: Queue, command: Command) -> int:
    return 0


def _set_profile(queue: Queue, command: Command) -> int:
    if command.cdw11 & 0x1FF:
        raise _invalid()  # there is one combination of command sets
    return 0


def _get_host_id(queue: Queue, command: Command) -> bytes:
    if not command.cdw11 & 1:
        raise CommandError(NvmeStatus.HOST_ID_INCONSISTENT)  # over fabrics it has 128 bits
    return _controller(queue).host_id


def _namespaces(queue: Queue, command: Command) -> list[int]:
    existing = _controller(queue).subsystem.namespaces
    if command.nsid == ALL_NAMESPACES:
        return list(existing)
    if command.nsid not in existing:
        raise CommandError(NvmeStatus.INVALID_NAMESPACE, location=4)
    return [command.nsid]


def _get_masks(queue: Queue, command: Command) -> int:
    if command.nsid == ALL_NAMESPACES:
        raise CommandError(NvmeStatus.INVALID_NAMESPACE, location=4)
    (nsid,) = _namespaces(queue, command)
    return _controller(queue).features.reservation_masks.get(nsid, 0)


def _set_masks(queue: Queue, command: Command) -> int:
    if command.cdw11 & ~_NOTICE_BITS:
        raise _invalid()
    masks = _controller(queue).features.reservation_masks
    masks.update(dict.fromkeys(_namespaces(queue, command), command.cdw11))
    return 0


def _get_persistence(queue: Queue, command: Command) -> int:
    if command.nsid == ALL_NAMESPACES:
        raise CommandError(NvmeStatus.INVALID_NAMESPACE, location=4)
    (nsid,) = _namespaces(queue, command)
    return int(_controller(queue).subsystem.namespaces[nsid].reservations.persistent)


def _set_persistence(queue: Queue, command: Command) -> int:
    wanted = bool(command.cdw11 & 1)
    namespaces = _controller(queue).subsystem.namespaces
    for nsid in _namespaces(queue, command):
        if namespaces[nsid].reservations.persistent != wanted:
            raise _invalid()  # where reservations are kept is not the host's choice
    return 0


_EVENTS: Final = _Feature(_get_events, _set_events)
_KEEP_ALIVE: Final = _Feature(_get_keep_alive, _set_keep_alive)
FEATURES: Final[dict[int, _Feature]] = {
    0x01: _Feature(_get_arbitration, _set_arbitration, default=7),
    0x02: _Feature(_get_power, _set_power),
    0x04: _Feature(_get_temperature, _set_temperature, default=0xFFFF),
    0x05: _Feature(_get_recovery, _set_recovery),
    0x06: _Feature(_get_cache, _set_cache, default=1),
    0x07: _Feature(_get_queues, _set_queues),
    0x0A: _Feature(_get_atomicity, _set_atomicity),
    0x0B: _EVENTS,
    0x0E: _Feature(_get_timestamp, _set_timestamp, default=bytes(8), data=8),
    0x0F: _KEEP_ALIVE,
    0x16: _Feature(_get_behavior, _set_behavior, default=bytes(512), data=512),
    0x19: _Feature(_get_profile, _set_profile),
    0x81: _Feature(_get_host_id, default=bytes(16), data=16),
    0x82: _Feature(_get_masks, _set_masks, per_namespace=True),
    0x83: _Feature(_get_persistence, _set_persistence, per_namespace=True),
}
"""Of I/O controllers, by feature identifier (figure 317)."""
DISCOVERY_FEATURES: Final[dict[int, _Feature]] = {0x0B: _EVENTS, 0x0F: _KEEP_ALIVE}


def _find(queue: Queue, command: Command) -> _Feature:
    table = DISCOVERY_FEATURES if _controller(queue).is_discovery else FEATURES
    feature = table.get(command.cdw10 & 0xFF)
    if feature is None:
        raise CommandError(NvmeStatus.INVALID_FIELD, location=40)
    return feature


def get_features(queue: Queue, command: Command) -> Reply:
    """The current value (also the saved one, as nothing is), the default, or what may be done with a feature."""
    feature = _find(queue, command)
    select = command.cdw10 >> 8 & 7
    if select > 3:
        raise CommandError(NvmeStatus.INVALID_FIELD, location=41)
    if select == 3:
        return Reply(result=(feature.set is not None) << 2 | feature.per_namespace << 1)
    value = feature.default if select in {1, 2} else feature.get(queue, command)
    if isinstance(value, int):
        return Reply(result=value)
    if command.sgl_length != feature.data:
        raise CommandError(NvmeStatus.SGL_LENGTH_INVALID, location=32)
    return Reply([value], len(value))


def set_features(queue: Queue, command: Command) -> Reply:
    """Sets a value, until the controller is reset or gone."""
    feature = _find(queue, command)
    if command.cdw10 >> 31:
        raise CommandError(NvmeStatus.FEATURE_NOT_SAVEABLE)
    if feature.set is None:
        raise CommandError(NvmeStatus.FEATURE_NOT_CHANGEABLE)
    if not feature.per_namespace and command.nsid not in {0, ALL_NAMESPACES}:
        raise CommandError(NvmeStatus.FEATURE_NOT_PER_NAMESPACE)
    result = feature.set(queue, command)
    return Reply(result=result) if result else DONE

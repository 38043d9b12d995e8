"""Admin commands by opcode (Base Specification 2.0, section 5); the large ones have modules of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from space.projections.nvme.features import get_features, set_features
from space.projections.nvme.identify import identify
from space.projections.nvme.logs import get_log_page
from space.projections.nvme.pdu import Command
from space.projections.nvme.reply import DONE, Reply

if TYPE_CHECKING:
    from space.projections.nvme.queue import Handler, Queue

GET_LOG_PAGE: Final = 0x02
IDENTIFY: Final = 0x06
ABORT: Final = 0x08
SET_FEATURES: Final = 0x09
GET_FEATURES: Final = 0x0A
ASYNC_EVENT_REQUEST: Final = 0x0C
KEEP_ALIVE: Final = 0x18

NOT_ABORTED: Final = Reply(result=1)


def abort(queue: Queue, command: Command) -> Reply:
    """Abort: best effort.  What may still take effect is not aborted, so that a host may rely on what it is told."""
    assert queue.controller is not None
    number, cid = command.cdw10 & 0xFFFF, command.cdw10 >> 16
    if number == 0:
        request = queue.controller.cancel_request(cid)
        if request is not None:
            queue.abort_request(request)
            return DONE
    other = queue.controller.queues.get(number)
    if other is None or not other.abort(cid):
        return NOT_ABORTED
    other.shell.wake()
    return DONE


def async_event_request(queue: Queue, command: Command) -> None:
    """Asynchronous Event Request: answered when there is an event."""
    assert queue.controller is not None
    queue.controller.request_event(command)


def keep_alive(queue: Queue, command: Command) -> Reply:
    """Keep Alive: that it came is all there is to it."""
    return DONE


HANDLERS: Final[dict[int, Handler]] = {
    GET_LOG_PAGE: get_log_page,
    IDENTIFY: identify,
    ABORT: abort,
    SET_FEATURES: set_features,
    GET_FEATURES: get_features,
    ASYNC_EVENT_REQUEST: async_event_request,
    KEEP_ALIVE: keep_alive,
}
DISCOVERY_HANDLERS: Final[dict[int, Handler]] = {
    opcode: HANDLERS[opcode]
    for opcode in (GET_LOG_PAGE, IDENTIFY, SET_FEATURES, GET_FEATURES, ASYNC_EVENT_REQUEST, KEEP_ALIVE)
}

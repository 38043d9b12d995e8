"""Commands in, batches out: decides concurrent commands in one order and groups them.

Each command is decided against state plus everything decided before it in the same batch, so a batch
is as if its commands had come one after the other; all of them then share one log record and one
fdatasync.  A command with a client id that was applied before is answered from the reply rows instead
of being applied again.

Pure: the caller logs the batch and then calls :meth:`Prepared.flush`, or drops it if the log refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import attrs

from space._errors import SpaceError, rejection
from space.events.codec import EVENTS_MAX, NO_LINK, Entry, chain_link, encode_batch, encode_event
from space.events.commands import REPLIES_KEPT_PER_CLIENT, Buffer, Receipt, Request
from space.events.types import Event
from space.statemachine.apply import Context, apply
from space.statemachine.decide import PayloadPlacer, Rejected, decide
from space.statemachine.tables import REPLY, U64, Overlay, Reader

COMMANDS_MAX: Final = 4096
PAYLOAD_BYTES_MAX: Final = 32 << 20


@attrs.define
class Prepared:
    """A decided batch, not yet logged.

    Attributes:
        outcomes: one per request in order: what its caller gets once the batch is logged.
        entries: the accepted commands' events; empty when there is nothing to log.
        payload: buffers of the payload area, in order.
        overlay: the state's rows after the batch.
        taken: how many of the requests were decided; the rest did not fit.
    """

    position: int
    time_ns: int
    outcomes: list[Receipt | SpaceError]
    entries: list[Entry]
    payload: list[Buffer]
    overlay: Overlay
    taken: int
    events: int = 0

    def metadata(self) -> bytes:
        return encode_batch(self.entries)

    def linked(self) -> list[tuple[Context, bytes, Event]]:
        """Every event with its context, for folding into views."""
        flat = []
        number = 0
        for entry in self.entries:
            for link, event in entry.events:
                flat.append((Context(self.position, number, entry.time_ns), link, event))
                number += 1
        return flat


def prepare(state: Reader | Overlay, requests: Sequence[Request], *, position: int, time_ns: int) -> Prepared:
    """Decides ``requests`` as the batch at ``position``.

    ``time_ns`` must not be before the time of the batch before.
    """
    overlay = Overlay(state)
    payload = PayloadPlacer()
    batch = Prepared(position, time_ns, [], [], payload.buffers, overlay, 0)
    for request in requests[:COMMANDS_MAX]:
        if batch.taken and (payload.length >= PAYLOAD_BYTES_MAX or batch.events >= EVENTS_MAX // 2):
            break
        batch.outcomes.append(_one(batch, request, payload))
        batch.taken += 1
    return batch


def _one(batch: Prepared, request: Request, payload: PayloadPlacer) -> Receipt | SpaceError:
    overlay = batch.overlay
    reply_key = request.client + U64.pack(request.sequence) if request.client else b""
    if reply_key and (answered := overlay.get(REPLY, reply_key)) is not None:
        return Receipt(U64.unpack(answered)[0], repeated=True)
    mark = payload.mark()
    events = decide(overlay, request.command, payload)
    if isinstance(events, Rejected):
        payload.rewind(mark)
        return rejection(events.status, events.message)
    linked = []
    for event in events:
        row = overlay.capsule(event.capsule)
        link = chain_link(row.link if row else NO_LINK, encode_event(event))
        apply(overlay, Context(batch.position, batch.events, batch.time_ns), link, event)
        linked.append((link, event))
        batch.events += 1
    if linked:
        record_reply(overlay, request.client, request.sequence, batch.position)
        entry = Entry(request.client, request.sequence, batch.time_ns, request.actor[:255], tuple(linked))
        batch.entries.append(entry)
        return Receipt(batch.position)
    return Receipt(batch.position - 1)  # nothing to change: true as of the batch before


def record_reply(overlay: Overlay, client: bytes, sequence: int, position: int) -> None:
    """Remembers that a client's command was answered at ``position``; forgets the oldest."""
    if client:
        overlay.put(REPLY, client + U64.pack(sequence), U64.pack(position))
        if sequence >= REPLIES_KEPT_PER_CLIENT:
            overlay.delete(REPLY, client + U64.pack(sequence - REPLIES_KEPT_PER_CLIENT))

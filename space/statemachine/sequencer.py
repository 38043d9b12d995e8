"""Commands in, batches out: decides concurrent commands in one order and groups them.

Each command is decided against state plus everything decided before it in the same batch, so a batch
is as if its commands had come one after the other; all of them then share one log record and one
fdatasync.  A command with a client id that was answered before is answered from the reply rows instead
of being decided again, refusals included: they are events (:class:`space.events.types.CommandRefused`), so that no
attempt that was delayed on its way is carried out after its caller was told that it was refused.

What comes from another zone happened when it happened there: the time of such an entry is the home's.

Pure: the caller logs the batch and then calls :meth:`Prepared.flush`, or drops it if the log refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import attrs

from space._errors import SpaceError, Status, UsageError, rejection
from space.events.codec import (
    ACTOR_CHARACTERS_MAX,
    EVENTS_MAX,
    METADATA_BYTES_MAX,
    NO_LINK,
    Entry,
    chain_link,
    encode_entry,
    encode_event,
    encode_linked,
    join_entries,
)
from space.events.commands import Buffer, Receipt, ReceiveShipment, Request
from space.events.ids import CLUSTER, ID_BYTES
from space.events.registry import U63_MAX
from space.events.types import REFUSAL_BYTES_MAX, CommandRefused, Event
from space.statemachine import replies
from space.statemachine.apply import Context, apply
from space.statemachine.decide import decide
from space.statemachine.decision import PayloadPlacer, Rejected
from space.statemachine.tables import Overlay, Reader

COMMANDS_MAX: Final = 4096
PAYLOAD_BYTES_MAX: Final = 32 << 20
_ENTRY_BYTES: Final = 4 * ACTOR_CHARACTERS_MAX + 64
_EVENT_BYTES: Final = 64
"""More than an entry or an event takes beside the event's own bytes."""


@attrs.define
class Prepared:
    """A decided batch, not yet logged.

    Attributes:
        outcomes: one per request in order: what its caller gets once the batch is logged.
        entries: the accepted commands' events; empty when there is nothing to log.
        payload: buffers of the payload area, in order.
        overlay: the state's rows after the batch.
        taken: how many of the requests were decided; the rest did not fit.
        receipt: what all those get whose commands are carried out here.
        encoded: the entries' bytes.
    """

    position: int
    time_ns: int
    outcomes: list[Receipt | SpaceError]
    entries: list[Entry]
    payload: list[Buffer]
    overlay: Overlay
    taken: int
    receipt: Receipt
    events: int = 0
    metadata_bytes: int = 0
    encoded: list[bytes] = attrs.field(factory=list)

    def metadata(self) -> bytes:
        return join_entries(self.encoded)

    def add(self, entry: Entry, linked: list[bytes]) -> None:
        """Takes the events of one command; ``linked`` are their bytes."""
        self.entries.append(entry)
        self.encoded.append(encode_entry(entry, linked))

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
    batch = Prepared(position, time_ns, [], [], payload.buffers, overlay, 0, Receipt(position))
    for request in requests[:COMMANDS_MAX]:
        if batch.taken and (payload.length >= PAYLOAD_BYTES_MAX or batch.events >= EVENTS_MAX // 2):
            break
        mark = payload.mark()
        outcome = _one(batch, request, payload)
        if outcome is None:
            payload.rewind(mark)
            break
        if isinstance(outcome, SpaceError):
            payload.rewind(mark)
        batch.outcomes.append(outcome)
        batch.taken += 1
    return batch


def _one(batch: Prepared, request: Request, payload: PayloadPlacer) -> Receipt | SpaceError | None:
    """What becomes of a command; None if its events do not fit into the batch any more."""
    overlay = batch.overlay
    if (problem := _unusable(request)) is not None:
        return problem
    if request.client and (answered := replies.find(overlay, request.client, request.sequence)) is not None:
        return _answer(*answered)
    guard = request.guard
    if guard is not None and overlay.counter(guard.name) != guard.value:
        taken = rejection(Status.UNAVAILABLE, "somebody else has taken over meanwhile")
        return _refuse(batch, request, taken)
    events = decide(overlay, request.command, payload)
    if isinstance(events, Rejected):
        return _refuse(batch, request, rejection(events.status, events.message))
    if not events and isinstance(request.command, ReceiveShipment):
        return Receipt(batch.position - 1, repeated=True)
    try:
        encoded = [encode_event(event) for event in events]
    except UsageError as error:
        return _refuse(batch, request, error)
    if not _fits(batch, encoded):
        if batch.entries:
            return None
        return UsageError(f"one command of more than {METADATA_BYTES_MAX} bytes of events")
    linked = []
    rows = []
    time_ns = request.command.time_ns if isinstance(request.command, ReceiveShipment) else batch.time_ns
    for event, raw in zip(events, encoded, strict=True):
        row = overlay.capsule(event.capsule)
        link = chain_link(row.link if row else NO_LINK, raw)
        apply(overlay, Context(batch.position, batch.events, time_ns), link, event)
        linked.append((link, event))
        rows.append(encode_linked(raw, link))
        batch.events += 1
    if not linked and not request.client:
        return Receipt(batch.position - 1)  # nothing to change: true as of the batch before
    replies.keep(overlay, request.client, request.sequence, batch.position)
    actor = request.actor[:ACTOR_CHARACTERS_MAX]
    batch.add(Entry(request.client, request.sequence, time_ns, actor, tuple(linked)), rows)
    return batch.receipt


def _fits(batch: Prepared, encoded: list[bytes]) -> bool:
    """Whether the events of one more command fit into the batch; counts them if so."""
    size = _ENTRY_BYTES + sum(map(len, encoded)) + _EVENT_BYTES * len(encoded)
    if batch.metadata_bytes + size > METADATA_BYTES_MAX:
        return False
    batch.metadata_bytes += size
    return True


def _answer(position: int, refusal: replies.Refusal | None) -> Receipt | SpaceError:
    """What the first attempt of a command was told."""
    if refusal is None:
        return Receipt(position, repeated=True)
    status, message = refusal
    return rejection(Status[status], message)


def _refuse(batch: Prepared, request: Request, error: SpaceError) -> SpaceError | None:
    """Refuses a command; of a client that may try again, as an event, so that every attempt is told the same."""
    if not request.client:
        return error
    message = Exception.__str__(error).encode(errors="replace")[:REFUSAL_BYTES_MAX].decode(errors="ignore")
    event = CommandRefused(CLUSTER, request.client, request.sequence, error.status.name, message)
    raw = encode_event(event)
    if not _fits(batch, [raw]):
        return None
    link = chain_link(NO_LINK, raw)
    apply(batch.overlay, Context(batch.position, batch.events, batch.time_ns), link, event)
    batch.events += 1
    actor = request.actor[:ACTOR_CHARACTERS_MAX]
    batch.add(Entry(b"", 0, batch.time_ns, actor, ((link, event),)), [encode_linked(raw, link)])
    return error


def _unusable(request: Request) -> UsageError | None:
    """Why a request cannot be logged whatever it asks for, or None."""
    if len(request.client) not in (0, ID_BYTES) or not 0 <= request.sequence <= U63_MAX:
        return UsageError(
            f"not a client id of {ID_BYTES} bytes and a number: {request.client!r}, {request.sequence}"
        )
    if not request.actor.isascii() and any("\ud800" <= character <= "\udfff" for character in request.actor):
        return UsageError(f"not an actor: {request.actor!r}")
    return None

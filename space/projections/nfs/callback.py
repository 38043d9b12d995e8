"""The way back: calls of the server to its clients (RFC 8881 §2.10.3, §20), over the connections they opened; no I/O.

A call takes a slot of a session's back channel, is sent on one of the session's connections and answered there.  A
connection that breaks takes nothing with it: the call is sent again, same slot and number, on the next one the client
offers; with a session that is destroyed it moves to another session.  A client that has no connection for our calls,
or does not answer them, is told so by SEQUENCE, and whoever wanted the call learns that nothing came of it.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import attrs

from space.projections.nfs import rpc
from space.projections.nfs.compound import Stateid
from space.projections.nfs.nfs4 import CALLBACK_VERSION, SESSION_ID_BYTES, Attr, CbOp, NfsStatus, SequenceFlag
from space.projections.nfs.sessions import Client, Connection, Session
from space.projections.nfs.xdr import Reader, Writer, XdrError

if TYPE_CHECKING:
    from space.projections.nfs.service import Service

CALLS_PER_CLIENT_MAX: Final = 8192
"""Waiting ones: as many as a client may hold delegations, should all be wanted at once."""
RETRY_SECONDS: Final = 1.0
TAG: Final = b""
_CB_COMPOUND: Final = 1
_SEQUENCE: Final = struct.Struct(">5I")


@attrs.define(eq=False)
class _Call:
    """One operation for a client; ``deadline`` is set by the first tick that sees it.

    When it is ``done`` with status OK, ``result`` stands at what the operation gave.
    """

    client: Client
    operation: CbOp
    arguments: bytes
    done: Callable[[int | None, float], None]
    deadline: float | None = None
    not_before: float = 0.0
    result: Reader | None = None


@attrs.define(eq=False)
class _Sent:
    """A call in a slot, sent or to be sent again."""

    call: _Call
    session: Session
    slot: int
    connection: Connection | None = None
    xid: int = 0


class Callbacks:
    """Calls to clients, waiting and under way."""

    def __init__(self, service: Service) -> None:
        """Calls for the clients of a service."""
        self._service = service
        self._waiting: dict[Client, deque[_Call]] = {}
        self._sent: dict[Session, list[_Sent]] = {}

    # --- what others want ------------------------------------------------------------------------

    def recall(self, client: Client, stateid: Stateid, handle: bytes, *, truncate: bool, now: float) -> None:
        """CB_RECALL: wants a delegation back.

        What comes of it: the client returns it by DELEGRETURN, or ``state.recall_failed(client, stateid, now)`` is
        called, because nobody could be asked or the answer was no.
        """
        out = Writer()
        _write_stateid(out, stateid)
        out.boolean(truncate)
        out.opaque(handle)

        def done(status: int | None, when: float) -> None:
            if status != NfsStatus.OK:
                self._service.state.recall_failed(client, stateid, when)

        self._call(_Call(client, CbOp.RECALL, out.bytes(), done), now)

    def getattr(
        self, client: Client, handle: bytes, told: Callable[[tuple[int, int] | None], None], *, now: float
    ) -> None:
        """CB_GETATTR (RFC 8881 §20.1): asks the holder of a write delegation for change and size of the file.

        ``told`` is called with both; None: they cannot be had.
        """
        out = Writer()
        out.opaque(handle)
        out.bitmap(1 << Attr.CHANGE | 1 << Attr.SIZE)
        call = _Call(
            client, CbOp.GETATTR, out.bytes(), lambda status, _: told(_change_and_size(status, call.result))
        )
        self._call(call, now)

    def notify_lock(self, client: Client, handle: bytes, owner: bytes) -> None:
        """CB_NOTIFY_LOCK: a lock the owner was denied may be free now; only a hint, so nothing comes back."""
        out = Writer()
        out.opaque(handle)
        out.u64(client.id)
        out.opaque(owner)
        self._call(_Call(client, CbOp.NOTIFY_LOCK, out.bytes(), _nothing), 0.0)

    def offload_done(
        self, client: Client, stateid: Stateid, handle: bytes, *, status: int, count: int, stable: int
    ) -> None:
        """CB_OFFLOAD (RFC 7862 §16.1): an asynchronous copy has ended, with ``count`` bytes done."""
        out = Writer()
        out.opaque(handle)
        _write_stateid(out, stateid)
        out.u32(status)
        if status == NfsStatus.OK:
            out.u32(0)
            out.u64(count)
            out.u32(stable)
            out.fixed(self._service.write_verifier)
        else:
            out.u64(count)
        self._call(_Call(client, CbOp.OFFLOAD, out.bytes(), _nothing), 0.0)

    # --- connections and sessions come and go ------------------------------------------------------

    def reachable(self, client: Client) -> bool:
        """Whether there is a connection to call a client on, and nothing wrong with it."""
        return any(session.connections and not session.back_fault for session in client.sessions.values())

    def flags(self, session: Session) -> SequenceFlag:
        """What SEQUENCE says of the way back; nothing to a client that never offered one."""
        found = SequenceFlag(0)
        if session.back_fault:
            found |= SequenceFlag.BACKCHANNEL_FAULT
        if session.back_offered and not session.connections:
            found |= SequenceFlag.CB_PATH_DOWN_SESSION
            if not self.reachable(session.client):
                found |= SequenceFlag.CB_PATH_DOWN
        return found

    def bind(self, session: Session, connection: Connection, now: float) -> None:
        """Calls of a session may use a connection from now on."""
        session.back_fault = False
        session.back_offered = True
        if connection not in session.connections:
            session.connections.append(connection)
            connection.back.add(session)
        for sent in self._sent.get(session, ()):
            if sent.connection is None:
                self._send(sent)
        self._pump(session.client, now)

    def lost(self, connection: Connection) -> None:
        """A connection has ended."""
        for session in list(connection.back):
            session.unbind(connection)
            for sent in self._sent.get(session, ()):
                if sent.connection is connection:
                    sent.connection = None
                    self._send(sent)
        connection.waiting.clear()

    def session_ended(self, session: Session) -> None:
        """What was under way in a session goes to another one."""
        for connection in list(session.connections):
            session.unbind(connection)
        for sent in self._sent.pop(session, ()):
            self._abandon(sent)
            self._call(sent.call, sent.call.not_before)

    def client_ended(self, client: Client) -> None:
        """Nobody is left to be called."""
        self._waiting.pop(client, None)

    def reply(self, connection: Connection, reply: rpc.Reply, now: float) -> None:
        """An answer has arrived; one that nobody waits for means nothing."""
        waiting = connection.waiting.pop(reply.xid, None)
        if waiting is not None:
            waiting(reply.results if reply.accepted else None, now)

    def tick(self, now: float) -> None:
        """Sends again what had to wait, and gives up what nobody answers."""
        patience = self._service.config.lease_seconds
        for session, sent in list(self._sent.items()):
            for each in list(sent):
                if each.call.deadline is None:
                    each.call.deadline = now + patience
                elif each.call.deadline <= now:
                    session.back_fault = True  # its slot stays taken: what the client made of it is not known
                    sent.remove(each)
                    self._abandon(each)
                    each.call.done(None, now)
        for client, waiting in list(self._waiting.items()):
            for call in list(waiting):
                if call.deadline is None:
                    call.deadline = now + patience
                elif call.deadline <= now:
                    waiting.remove(call)
                    call.done(None, now)
            self._pump(client, now)

    # --- how a call goes ---------------------------------------------------------------------------

    def _call(self, call: _Call, now: float) -> None:
        waiting = self._waiting.setdefault(call.client, deque())
        if len(waiting) >= CALLS_PER_CLIENT_MAX:
            call.done(None, now)
            return
        waiting.append(call)
        self._pump(call.client, now)

    def _pump(self, client: Client, now: float) -> None:
        """Puts waiting calls into free slots."""
        waiting = self._waiting.get(client)
        while waiting:
            call = next((each for each in waiting if each.not_before <= now), None)
            if call is None:
                return
            place = self._free_slot(client)
            if place is None:
                return
            waiting.remove(call)
            session, slot = place
            session.back_busy.add(slot)
            session.back_sequences[slot] = session.back_sequences[slot] + 1 & 0xFFFFFFFF
            sent = _Sent(call, session, slot)
            self._sent.setdefault(session, []).append(sent)
            self._send(sent)
        self._waiting.pop(client, None)

    def _free_slot(self, client: Client) -> tuple[Session, int] | None:
        for session in client.sessions.values():
            if session.connections and not session.back_fault:
                for slot in range(session.back.slots):
                    if slot not in session.back_busy:
                        return session, slot
        return None

    def _send(self, sent: _Sent) -> None:
        """Sends a call on the newest connection of its session, if there is one."""
        session = sent.session
        if not session.connections:
            return
        connection = sent.connection = session.connections[-1]
        connection.xid = sent.xid = connection.xid + 1 & 0xFFFFFFFF
        out = Writer()
        out.raw(
            rpc.call(
                sent.xid,
                session.program,
                CALLBACK_VERSION,
                _CB_COMPOUND,
                session.credentials,
            )
        )
        out.opaque(TAG)
        out.u32(session.minor)
        out.u32(0)  # callback_ident: of minor version 0
        out.u32(2)
        out.u32(CbOp.SEQUENCE)
        out.fixed(session.id)
        last = session.back.slots - 1
        out.raw(_SEQUENCE.pack(session.back_sequences[sent.slot], sent.slot, last, 0, 0))
        out.u32(sent.call.operation)
        out.raw(sent.call.arguments)
        connection.waiting[sent.xid] = lambda results, now: self._answered(sent, results, now)
        connection.sender.send(rpc.framed(out.pieces()))

    def _answered(self, sent: _Sent, results: Reader | None, now: float) -> None:
        session, call = sent.session, sent.call
        sequence, status = _statuses(results)
        self._sent[session].remove(sent)
        if not self._sent[session]:
            del self._sent[session]
        if sequence in {NfsStatus.OK, NfsStatus.DELAY}:
            session.back_busy.discard(sent.slot)
            if sequence == NfsStatus.DELAY:  # the slot has not moved on
                session.back_sequences[sent.slot] -= 1
        else:
            # Slot and number are not as the client has them, or it knows neither session nor program.
            session.back_fault = True
        if sequence != NfsStatus.OK or status in _LATER[call.operation]:
            call.not_before = now + RETRY_SECONDS
            self._call(call, now)
        else:
            call.result = results
            call.done(status, now)
            self._pump(call.client, now)

    @staticmethod
    def _abandon(sent: _Sent) -> None:
        if sent.connection is not None:
            sent.connection.waiting.pop(sent.xid, None)


_LATER: Final[dict[CbOp, frozenset[int | None]]] = {
    CbOp.GETATTR: frozenset(),
    # A recall can overtake the answer that gave the delegation: then the client does not know it yet (§10.4.3).
    CbOp.RECALL: frozenset({NfsStatus.DELAY, NfsStatus.BAD_STATEID, NfsStatus.BADHANDLE}),
    CbOp.NOTIFY_LOCK: frozenset({NfsStatus.DELAY}),
    CbOp.OFFLOAD: frozenset({NfsStatus.DELAY, NfsStatus.BAD_STATEID}),
}


def _statuses(results: Reader | None) -> tuple[int | None, int | None]:
    """Statuses of CB_SEQUENCE and of the operation behind it, None where there is none (CB_COMPOUND4res)."""
    if results is None:
        return None, None
    try:
        overall = results.u32()
        results.opaque_view(rpc.RECORD_BYTES_MAX)
        count = results.count(2)
        if not count:
            return overall or None, None
        results.u32()
        sequence = results.u32()
        if sequence != NfsStatus.OK:
            return sequence, None
        results.view(SESSION_ID_BYTES + 16)
        if count == 1:
            return sequence, overall
        results.u32()
        return sequence, results.u32()
    except XdrError:
        return None, None


def _change_and_size(status: int | None, result: Reader | None) -> tuple[int, int] | None:
    """What a client answered to CB_GETATTR; whatever else it tells comes after these two."""
    if status != NfsStatus.OK or result is None:
        return None
    try:
        told = result.bitmap()
        values = Reader(result.opaque_view(rpc.RECORD_BYTES_MAX))
        if not (told >> Attr.CHANGE & 1 and told >> Attr.SIZE & 1) or told & (1 << Attr.CHANGE) - 1:
            return None
        return values.u64(), values.u64()
    except XdrError:
        return None


def _write_stateid(out: Writer, stateid: Stateid) -> None:
    out.u32(stateid.seqid)
    out.fixed(stateid.other)


def _nothing(status: int | None, now: float) -> None:
    """Of a hint nothing comes back."""

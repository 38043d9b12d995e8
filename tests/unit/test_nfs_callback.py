"""Calls to clients: which slot and number they have, and what becomes of them when nobody answers."""

from __future__ import annotations

import struct
from typing import Final

import attrs
import pytest

from space.projections.nfs import rpc
from space.projections.nfs.compound import Stateid
from space.projections.nfs.nfs4 import CbOp, NfsStatus, Op
from space.projections.nfs.sessions import Client, Connection
from space.projections.nfs.xdr import Reader
from tests.nfs_session_support import LEASE, OWNER, Pipe, World, create_session, op

pytestmark = pytest.mark.unit

HELD: Final = Stateid(1, b"a delegation")
BACK: Final = 2  # CREATE_SESSION4_FLAG_CONN_BACK_CHAN


@attrs.frozen
class Called:
    """A call as the client reads it."""

    xid: int
    credentials: rpc.Credentials
    session: bytes
    number: int
    slot: int
    operation: int
    rest: bytes

    @classmethod
    def of(cls, record: bytes) -> Called:
        assert struct.unpack_from(">I", record) == (0x80000000 | len(record) - 4,)
        reader = Reader(record, 4)
        xid, kind, version, program, number, procedure = (reader.u32() for _ in range(6))
        assert (kind, version, program, number, procedure) == (0, 2, 0x40000001, 1, 1)
        flavor, body = reader.u32(), reader.opaque(400)
        assert (reader.u32(), reader.u32()) == (0, 0)
        credentials = rpc.Credentials()
        if flavor == rpc.AUTH_SYS:
            inside = Reader(body, 4)
            machine = inside.opaque(255).decode()
            credentials = rpc.Credentials(inside.u32(), inside.u32(), (), machine, flavor)
        assert reader.opaque(10) == b""
        assert (reader.u32(), reader.u32(), reader.u32()) == (1, 0, 2)
        assert reader.u32() == CbOp.SEQUENCE
        session, sequence, slot = reader.fixed(16), reader.u32(), reader.u32()
        assert reader.u32() >= slot
        assert (reader.u32(), reader.u32()) == (0, 0)
        return cls(xid, credentials, session, sequence, slot, reader.u32(), bytes(reader.rest()))


@attrs.define(eq=False)
class Scene:
    """A client with a session that can be called back."""

    world: World = attrs.field(factory=World)
    failed: list[Stateid] = attrs.field(factory=list)
    session: bytes = b""

    def __attrs_post_init__(self) -> None:
        self.session = self.world.session(flags=BACK)
        setattr(self.world.service.state, "recall_failed", self._failed)  # noqa: B010 - mypy forbids the plain way

    def _failed(self, client: Client, stateid: Stateid, now: float) -> None:
        self.failed.append(stateid)

    @property
    def client(self) -> Client:
        return self.world.service.confirmed[OWNER]

    def recall(self, stateid: Stateid = HELD) -> None:
        self.world.service.callbacks.recall(
            self.client, stateid, b"handle", truncate=False, now=self.world.now
        )

    def calls(self, connection: Connection | None = None) -> list[Called]:
        """What was sent since the last look."""
        pipe = (connection or self.world.connection).sender
        assert isinstance(pipe, Pipe)
        found = [Called.of(each) for each in pipe.sent]
        pipe.sent.clear()
        return found

    def answer(
        self,
        called: Called,
        status: int = NfsStatus.OK,
        *,
        sequence: int = NfsStatus.OK,
        connection: Connection | None = None,
    ) -> None:
        head = struct.pack(">IIIIII", called.xid, 1, 0, 0, 0, 0)
        if sequence:
            body = struct.pack(">IIIII", sequence, 0, 1, CbOp.SEQUENCE, sequence)
        else:
            body = struct.pack(">IIIII", status, 0, 2, CbOp.SEQUENCE, 0) + called.session
            body += struct.pack(">IIII", called.number, called.slot, 0, 0) + struct.pack(
                ">II", called.operation, status
            )
        self.raw(head + body, connection)

    def raw(self, record: bytes, connection: Connection | None = None) -> None:
        found = rpc.message(record)
        assert isinstance(found, rpc.Reply)
        self.world.service.callbacks.reply(connection or self.world.connection, found, self.world.now)

    def later(self, seconds: float) -> None:
        self.world.now += seconds
        self.world.service.callbacks.tick(self.world.now)


def test_a_recall_names_the_delegation() -> None:
    """CB_RECALL carries the stateid, whether to truncate, and the handle; an answer of OK ends it."""
    scene = Scene()
    scene.recall()
    (called,) = scene.calls()
    assert (called.session, called.number, called.slot, called.operation) == (
        scene.session,
        1,
        0,
        CbOp.RECALL,
    )
    assert called.rest == struct.pack(">I", 1) + HELD.other + struct.pack(">II", 0, 6) + b"handle\0\0"
    scene.answer(called)
    scene.later(10 * LEASE)
    assert not scene.calls()
    assert not scene.failed


def test_slots_are_used_again_with_the_next_number() -> None:
    """Calls under way have a slot each; an answered one leaves its slot to the next call, which counts on."""
    scene = Scene()
    scene.recall()
    scene.recall(Stateid(2, HELD.other))
    first, second = scene.calls()
    assert (first.slot, first.number, second.slot, second.number) == (0, 1, 1, 1)
    scene.answer(first)
    scene.recall(Stateid(3, HELD.other))
    (third,) = scene.calls()
    assert (third.slot, third.number) == (0, 2)


def test_calls_wait_for_a_slot() -> None:
    """No more are sent than the client said it takes; the rest follows as slots become free."""
    scene = Scene()
    for number in range(6):
        scene.recall(Stateid(number, HELD.other))
    sent = scene.calls()
    assert len(sent) == 4
    scene.answer(sent[2])
    (next_one,) = scene.calls()
    assert next_one.slot == 2


def test_a_recall_can_overtake_the_delegation() -> None:
    """A client that does not know the stateid yet is asked again; only when the lease is over it has failed."""
    scene = Scene()
    scene.recall()
    (called,) = scene.calls()
    scene.later(0)
    scene.answer(called, NfsStatus.BAD_STATEID)
    assert not scene.calls()
    scene.later(1.5)
    (again,) = scene.calls()
    assert again.number == 2
    scene.answer(again, NfsStatus.BADHANDLE)
    scene.later(LEASE)
    assert scene.failed == [HELD]


def test_other_errors_end_a_recall() -> None:
    """Whoever wanted it is told."""
    scene = Scene()
    scene.recall()
    scene.answer(scene.calls()[0], NfsStatus.SERVERFAULT)
    assert scene.failed == [HELD]


def test_a_broken_connection_loses_no_call() -> None:
    """It is sent again on the next connection, in the same slot with the same number."""
    scene = Scene()
    scene.recall()
    (called,) = scene.calls()
    scene.world.service.callbacks.lost(scene.world.connection)
    fresh = scene.world.connect()
    bind = op(Op.BIND_CONN_TO_SESSION) + scene.session + struct.pack(">II", 3, 0)
    assert scene.world.call(bind, connection=fresh).status == NfsStatus.OK
    (again,) = scene.calls(fresh)
    assert (again.slot, again.number) == (called.slot, called.number)
    scene.answer(again, connection=fresh)
    scene.later(10 * LEASE)
    assert not scene.failed


def test_a_destroyed_session_leaves_its_calls_to_the_next_one() -> None:
    """A call without an answer is made anew in another session of the client."""
    scene = Scene()
    scene.recall()
    (called,) = scene.calls()
    scene.world.call(op(Op.DESTROY_SESSION) + scene.session)
    assert not scene.calls()
    found = scene.world.call(create_session(scene.client.id, 2, flags=BACK))
    (again,) = scene.calls()
    assert (again.session, again.number) == (found.body[:16], 1)
    scene.answer(called)  # too late: nobody waits for it any more
    scene.answer(again)
    scene.later(10 * LEASE)
    assert not scene.failed


def test_silence_is_a_failure() -> None:
    """Who does not answer within a lease has not been reached, and hears of it."""
    scene = Scene()
    scene.recall()
    scene.later(0)
    scene.later(LEASE)
    assert scene.failed == [HELD]
    assert scene.world.service.sessions[scene.session].back_fault
    assert not scene.world.service.callbacks.reachable(scene.client)


def test_nobody_to_call_is_a_failure_too() -> None:
    """A client without a way back is waited for as long."""
    scene = Scene()
    scene.world.service.callbacks.lost(scene.world.connection)
    scene.recall()
    scene.later(0)
    assert not scene.failed
    scene.later(LEASE)
    assert scene.failed == [HELD]


@pytest.mark.parametrize("sequence", [NfsStatus.BADSESSION, NfsStatus.SEQ_MISORDERED])
def test_a_client_that_does_not_know_the_session(sequence: int) -> None:
    """Then there is something wrong with the way back: the client is told, and asked in another session."""
    scene = Scene()
    scene.recall()
    (called,) = scene.calls()
    scene.answer(called, sequence=sequence)
    assert scene.world.service.sessions[scene.session].back_fault
    scene.world.call(create_session(scene.client.id, 2, flags=BACK))
    scene.later(1.5)
    (again,) = scene.calls()
    assert again.session != scene.session


def test_a_busy_client_is_asked_again_with_the_same_number() -> None:
    """A CB_SEQUENCE that is put off has not used up its number."""
    scene = Scene()
    scene.recall()
    (called,) = scene.calls()
    scene.answer(called, sequence=NfsStatus.DELAY)
    scene.later(1.5)
    (again,) = scene.calls()
    assert (again.slot, again.number) == (called.slot, called.number)


@pytest.mark.parametrize(
    "body", [b"", bytes(3), struct.pack(">III", 0, 0, 9), struct.pack(">IIIII", 0, 0, 2, 11, 0)]
)
def test_nonsense_is_an_answer_of_no_use(body: bytes) -> None:
    """Results that cannot be read break nothing: the session is at fault, the call tried again."""
    scene = Scene()
    scene.recall()
    (called,) = scene.calls()
    scene.raw(struct.pack(">IIIIII", called.xid, 1, 0, 0, 0, 0) + body)
    assert scene.world.service.sessions[scene.session].back_fault
    scene.raw(struct.pack(">IIIIII", 12345, 1, 0, 0, 0, 0) + body)


def test_hints_and_results_go_the_same_way() -> None:
    """CB_NOTIFY_LOCK names the lock-owner, CB_OFFLOAD the copy and how far it came."""
    scene = Scene()
    callbacks = scene.world.service.callbacks
    callbacks.notify_lock(scene.client, b"hand", b"owner")
    callbacks.offload_done(scene.client, HELD, b"hand", status=0, count=77, stable=2)
    callbacks.offload_done(scene.client, HELD, b"hand", status=NfsStatus.NOSPC, count=5, stable=2)
    notice, done, failed = scene.calls()
    handle, stateid = struct.pack(">I", 4) + b"hand", struct.pack(">I", 1) + HELD.other
    assert notice.operation == CbOp.NOTIFY_LOCK
    assert notice.rest == handle + struct.pack(">QI", scene.client.id, 5) + b"owner\0\0\0"
    assert done.operation == failed.operation == CbOp.OFFLOAD
    verifier = scene.world.service.write_verifier
    assert done.rest == handle + stateid + struct.pack(">IIQI", 0, 0, 77, 2) + verifier
    assert failed.rest == handle + stateid + struct.pack(">IQ", NfsStatus.NOSPC, 5)


def test_calls_say_who_they_are_as_the_client_wants_it() -> None:
    """The first flavor of the client's list that there is; BACKCHANNEL_CTL changes it (RFC 8881 §18.33)."""
    scene = Scene()
    machine = struct.pack(">II", 1, 4) + b"host" + struct.pack(">III", 17, 19, 0)
    gss = struct.pack(">IIII", 6, 1, 0, 0)
    security = struct.pack(">I", 2) + gss + struct.pack(">I", 1) + machine
    session = scene.world.session(b"another", flags=BACK, security=security)
    other = scene.world.service.confirmed[b"another"]
    scene.world.service.callbacks.notify_lock(other, b"h", b"o")
    (called,) = scene.calls()
    assert called.session == session
    assert called.credentials == rpc.Credentials(17, 19, (), "host", rpc.AUTH_SYS)
    control = op(Op.BACKCHANNEL_CTL, 0x40000001)
    sequence = op(Op.SEQUENCE) + session + struct.pack(">IIII", 2, 0, 0, 0)
    found = scene.world.call(sequence, control + struct.pack(">I", 1) + gss)
    assert found.status == NfsStatus.NOENT
    sequence = op(Op.SEQUENCE) + session + struct.pack(">IIII", 3, 0, 0, 0)
    assert scene.world.call(sequence, control + struct.pack(">II", 1, 0)).status == NfsStatus.OK
    scene.world.service.callbacks.notify_lock(other, b"h", b"o")
    (called,) = scene.calls()
    assert called.credentials.flavor == rpc.AUTH_NONE

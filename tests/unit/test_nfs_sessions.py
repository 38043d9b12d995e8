"""Clients, sessions and slots: who is who after a restart, and that nothing is done twice."""

from __future__ import annotations

import asyncio
import struct

import pytest

from space.projections.nfs import service as module
from space.projections.nfs.compound import Compound
from space.projections.nfs.nfs4 import NfsStatus, Op, SequenceFlag
from space.projections.nfs.rpc import AUTH_SYS, Credentials
from space.projections.nfs.service import Config
from space.projections.nfs.session_ops import CONFIRMED, UPDATE
from space.projections.nfs.sessions import SESSIONS_PER_CLIENT_MAX, Client
from space.projections.nfs.xdr import Reader, Writer
from tests.nfs_session_support import LEASE, OWNER, ROOT, World, create_session, exchange_id, op, sequence

pytestmark = pytest.mark.unit

OTHER = Credentials(1, 1, (), "other", AUTH_SYS)


def counting(world: World) -> list[int]:
    """Makes ACCESS count how often it is carried out, and answer with that."""
    done: list[int] = []

    def access(ctx: Compound, args: Reader, out: Writer) -> int:
        done.append(1)
        out.u32(len(done))
        return NfsStatus.OK

    world.service.operations[Op.ACCESS] = access
    return done


# --- EXCHANGE_ID: the cases of RFC 8881 §18.35.4 ----------------------------------------------------


def test_an_unconfirmed_client_is_replaced_by_whoever_comes_next() -> None:
    """Until CREATE_SESSION a client id is worth nothing: each EXCHANGE_ID makes another one (case 4)."""
    world = World()
    first = world.introduce()
    for verifier, credentials in ((b"verifier", OTHER), (b"another!", OTHER), (b"another!", ROOT)):
        second = world.introduce(verifier=verifier, credentials=credentials)
        assert second != first
        assert first not in world.service.clients
        first = second


def test_the_same_start_of_a_client_is_the_same_client() -> None:
    """A confirmed client that introduces itself again keeps everything, and is told that it is known (case 2)."""
    world = World()
    world.session()
    before = next(iter(world.service.clients))
    found = world.call(exchange_id())
    client, number, flags = struct.unpack_from(">QII", found.body)
    assert (client, number, bool(flags & CONFIRMED)) == (before, 2, True)


def test_a_client_that_started_again_is_confirmed_before_its_past_is_forgotten() -> None:
    """Sessions of the earlier start work until the new one makes its first (case 5)."""
    world = World()
    old = world.session()
    client = world.introduce(verifier=b"another!")
    assert world.call(sequence(old, 2)).status == NfsStatus.OK
    assert world.call(create_session(client, 1)).status == NfsStatus.OK
    assert world.call(sequence(old, 3)).status == NfsStatus.BADSESSION
    assert list(world.service.clients) == [client]
    assert world.journal.told[-1] == ("forget", OWNER)


def test_somebody_else_cannot_take_a_name_that_is_in_use() -> None:
    """A name is its first user's as long as a session of theirs has a lease (case 3)."""
    world = World()
    session = world.session()
    assert world.call(exchange_id(), credentials=OTHER).status == NfsStatus.CLID_INUSE
    world.now += LEASE + 1
    assert world.call(exchange_id(), credentials=OTHER).status == NfsStatus.OK
    assert world.call(sequence(session, 2)).status == NfsStatus.BADSESSION


def test_updating_needs_the_very_client() -> None:
    """Updating a client that is not there, another start of it, or somebody else's has an error each (6 to 9)."""
    world = World()
    update = exchange_id(flags=UPDATE)
    assert world.call(update).status == NfsStatus.NOENT
    world.introduce()
    assert world.call(update).status == NfsStatus.NOENT
    world.session()
    assert world.call(exchange_id(verifier=b"another!", flags=UPDATE)).status == NfsStatus.NOT_SAME
    assert world.call(update, credentials=OTHER).status == NfsStatus.PERM
    assert world.call(update).status == NfsStatus.OK


def test_flags_nobody_knows_are_refused() -> None:
    """So are the one only a server sets, and in minor version 1 those of version 2."""
    for flags in (CONFIRMED, 0x8, 0x100000):
        assert World().call(exchange_id(flags=flags), minor=2).status == NfsStatus.INVAL
    assert World().call(exchange_id(flags=4)).status == NfsStatus.INVAL


# --- CREATE_SESSION ---------------------------------------------------------------------------------


def test_a_session_is_made_once() -> None:
    """The same CREATE_SESSION again gets the same answer; other numbers are out of order (§18.36.4)."""
    world = World()
    client = world.introduce()
    assert world.call(create_session(client, 0)).status == NfsStatus.SEQ_MISORDERED
    first = world.call(create_session(client, 1))
    assert first.status == NfsStatus.OK
    assert world.call(create_session(client, 1)).body == first.body
    assert len(world.service.sessions) == 1
    for number in (0, 3):
        assert world.call(create_session(client, number)).status == NfsStatus.SEQ_MISORDERED
    assert world.call(create_session(client, 2)).body != first.body


def test_who_confirms_a_client_is_who_introduced_it() -> None:
    """Before confirmation another user is refused, afterwards anybody may make sessions."""
    world = World()
    client = world.introduce()
    assert world.call(create_session(client, 1), credentials=OTHER).status == NfsStatus.CLID_INUSE
    assert world.call(create_session(client, 1)).status == NfsStatus.OK
    assert world.call(create_session(client, 2), credentials=OTHER).status == NfsStatus.OK
    assert world.call(create_session(99, 1)).status == NfsStatus.STALE_CLIENTID


def test_limits_of_a_session_are_the_smaller_ones() -> None:
    """Nobody gets more than there is, and sizes no message fits in are refused, without using up the number."""
    world = World()
    client = world.introduce()
    for fore, back in (
        ((0, 8192, 0, 8, 8), (8192, 8192, 0, 8, 8)),
        ((8192, 20, 0, 8, 8), (8192, 8192, 0, 8, 8)),
        ((8192, 8192, 0, 8, 8), (10, 8192, 0, 8, 8)),
        ((8192, 8192, 0, 8, 8), (8192, 8192, 0, 1, 8)),
    ):
        assert world.call(create_session(client, 1, fore=fore, back=back)).status == NfsStatus.TOOSMALL
    big = (1 << 30, 1 << 30, 1 << 30, 1000, 1000)
    found = world.call(create_session(client, 1, fore=big, back=big))
    granted = struct.unpack_from(">7I", found.body, 24)
    assert granted[1] < 2 << 20
    assert granted[5] <= 64


def test_sessions_and_their_memory_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client gets so many sessions; where there is little memory for answers, a session has few slots."""
    world = World()
    client = world.introduce()
    for number in range(1, SESSIONS_PER_CLIENT_MAX + 1):
        assert world.call(create_session(client, number)).status == NfsStatus.OK
    assert world.call(create_session(client, number + 1)).status == NfsStatus.NOSPC
    monkeypatch.setattr(module, "REPLIES_BYTES_MAX", 0)
    session = world.session(b"another")
    assert world.service.sessions[session].fore.slots == 1
    world.call(op(Op.DESTROY_SESSION) + session)
    monkeypatch.setattr(module, "SESSIONS_MAX", SESSIONS_PER_CLIENT_MAX)
    client = world.introduce(b"a third")
    assert world.call(create_session(client, 1)).status == NfsStatus.DELAY


def test_clients_are_bounded() -> None:
    """Beyond the limit those go that hold nothing; where all are at work the next has to wait."""
    world = World(config=Config(lease_seconds=LEASE, clients_max=2))
    world.introduce(b"1")
    world.session(b"2")
    world.session(b"3")
    assert {each.owner for each in world.service.clients.values()} == {b"2", b"3"}
    assert world.call(exchange_id(b"4")).status == NfsStatus.DELAY


# --- SEQUENCE ---------------------------------------------------------------------------------------


def test_a_retry_gets_the_answer_of_before() -> None:
    """The same number in a slot is carried out once, whoever's connection the retry comes on."""
    world = World()
    session = world.session()
    done = counting(world)
    first = world.call(sequence(session, 2, cached=True), op(Op.ACCESS))
    again = world.call(sequence(session, 2, cached=True), op(Op.ACCESS), connection=world.connect())
    assert again.data == first.data
    assert len(done) == 1
    assert world.call(sequence(session, 3), op(Op.ACCESS)).status == NfsStatus.OK
    assert len(done) == 2


def test_a_retry_of_what_was_not_to_be_kept() -> None:
    """Then the client learns that it was carried out, not with what result; SEQUENCE alone can be said again."""
    world = World()
    session = world.session()
    done = counting(world)
    world.call(sequence(session, 2), op(Op.ACCESS))
    again = world.call(sequence(session, 2), op(Op.ACCESS))
    assert (again.status, again.operations) == (NfsStatus.RETRY_UNCACHED_REP, 2)
    assert len(done) == 1
    alone = world.call(sequence(session, 3))
    assert world.call(sequence(session, 3)).data == alone.data


def test_another_request_is_no_retry() -> None:
    """The number of before with something else in it, or somebody else's, is refused (RFC 8881 §2.10.6.1.3.1)."""
    world = World()
    session = world.session()
    done = counting(world)
    world.call(sequence(session, 2, cached=True), op(Op.ACCESS))
    other = world.call(sequence(session, 2, cached=True), op(Op.RECLAIM_COMPLETE, 0))
    assert other.status == NfsStatus.SEQ_FALSE_RETRY
    other = world.call(sequence(session, 2, cached=True), op(Op.ACCESS), credentials=OTHER)
    assert other.status == NfsStatus.SEQ_FALSE_RETRY
    assert len(done) == 1


def test_numbers_go_up_by_one() -> None:
    """Other numbers are out of order, in each slot by itself; the number after the last is 0."""
    world = World()
    session = world.session()
    for number in (0, 3, 2**32 - 1):
        assert world.call(sequence(session, number)).status == NfsStatus.SEQ_MISORDERED
    assert world.call(sequence(session, 2)).status == NfsStatus.OK
    assert world.call(sequence(session, 1, 1)).status == NfsStatus.OK
    world.service.sessions[session].slots[1].sequence = 2**32 - 1
    assert world.call(sequence(session, 0, 1)).status == NfsStatus.OK


def test_slots_sizes_and_counts_are_those_of_the_session() -> None:
    """What breaks the limits of a session is refused, and the slot is as before."""
    world = World()
    session = world.session()
    assert world.call(sequence(bytes(16), 2)).status == NfsStatus.BADSESSION
    assert world.call(sequence(session, 2, 4)).status == NfsStatus.BADSLOT
    low = op(Op.SEQUENCE) + session + struct.pack(">IIII", 2, 1, 0, 0)
    assert world.call(low).status == NfsStatus.BAD_HIGH_SLOT
    assert world.call(sequence(session, 2), *[op(Op.ACCESS)] * 8).status == NfsStatus.TOO_MANY_OPS
    assert world.call(sequence(session, 2), bytes(8200)).status == NfsStatus.REQ_TOO_BIG
    assert world.call(sequence(session, 2)).status == NfsStatus.OK


def test_a_retry_waits_for_the_original() -> None:
    """A request sent again while the first is at work is answered with it, not refused and not done twice.

    Another one with its number learns then that it is another one; and the lease does not end meanwhile.
    """
    world = World()
    session = world.session()
    done = []

    async def scenario() -> None:
        go = asyncio.Event()

        async def slow(ctx: Compound, args: Reader, out: Writer) -> int:
            await go.wait()
            done.append(1)
            return NfsStatus.OK

        world.service.operations[Op.ACCESS] = slow
        request = sequence(session, 2, cached=True), op(Op.ACCESS)
        tasks = [asyncio.ensure_future(world.begin(*request)) for _ in range(3)]
        probe = asyncio.ensure_future(world.begin(sequence(session, 2)))
        await asyncio.sleep(0)
        busy = await world.begin(sequence(session, 3), op(Op.ACCESS))
        assert busy.status == NfsStatus.SEQ_MISORDERED
        kept = await world.begin(op(Op.DESTROY_SESSION) + session)
        assert kept.status == NfsStatus.DELAY
        world.now += 2 * LEASE
        world.service.tick(world.now)
        assert not any(each.done() for each in (*tasks, probe))
        go.set()
        answers = await asyncio.gather(*tasks)
        assert {each.data for each in answers} == {answers[0].data}
        assert (await probe).status == NfsStatus.SEQ_FALSE_RETRY

    asyncio.run(scenario())
    assert done == [1]


# --- ends -------------------------------------------------------------------------------------------


def test_sessions_are_destroyed_once_and_last() -> None:
    """A session that is destroyed is unknown; in its own COMPOUND that comes last (§18.37.3)."""
    world = World()
    session = world.session()
    destroy = op(Op.DESTROY_SESSION) + session
    assert world.call(sequence(session, 2), destroy, op(Op.ACCESS)).status == NfsStatus.NOT_ONLY_OP
    assert world.call(sequence(session, 3), destroy).status == NfsStatus.OK
    assert world.call(sequence(session, 4)).status == NfsStatus.BADSESSION
    assert world.call(destroy).status == NfsStatus.BADSESSION


def test_a_client_is_destroyed_when_it_has_nothing_left() -> None:
    """With sessions it is busy, and afterwards nobody knows it (§18.50)."""
    world = World()
    session = world.session()
    client = next(iter(world.service.clients))
    destroy = op(Op.DESTROY_CLIENTID) + struct.pack(">Q", client)
    assert world.call(destroy).status == NfsStatus.CLIENTID_BUSY
    world.call(op(Op.DESTROY_SESSION) + session)
    assert world.call(destroy).status == NfsStatus.OK
    assert world.call(destroy).status == NfsStatus.STALE_CLIENTID
    assert world.journal.told == [("record", OWNER), ("forget", OWNER)]


def test_reclaiming_is_complete_once() -> None:
    """RECLAIM_COMPLETE makes the client known to the next start of the server, and comes once (§18.51)."""
    world = World()
    session = world.session()
    assert world.journal.told == [("record", OWNER)]
    assert not world.journal.dirty
    assert world.call(sequence(session, 2), op(Op.RECLAIM_COMPLETE, 0)).status == NfsStatus.COMPLETE_ALREADY
    one = world.call(sequence(session, 3), op(Op.RECLAIM_COMPLETE, 1))
    assert one.status == NfsStatus.NOFILEHANDLE


def test_leases_end() -> None:
    """A client that is silent for longer than its lease and holds nothing is forgotten; one that speaks is not."""
    world = World()
    silent, alive = world.session(b"silent"), world.session(b"alive")
    unconfirmed = world.introduce(b"unconfirmed")
    world.now += LEASE - 1
    assert world.call(sequence(alive, 2)).status == NfsStatus.OK
    world.service.tick(world.now)
    assert unconfirmed in world.service.clients
    world.now += 2
    world.service.tick(world.now)
    assert world.call(sequence(silent, 2)).status == NfsStatus.BADSESSION
    assert world.call(create_session(unconfirmed, 1)).status == NfsStatus.STALE_CLIENTID
    assert world.call(sequence(alive, 3)).status == NfsStatus.OK
    assert ("forget", b"silent") in world.journal.told


def test_what_a_silent_client_holds_is_kept_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as nobody wants it, and no longer than the courtesy lasts; it is there when the client speaks again."""
    world = World()
    session = world.session()
    client = next(iter(world.service.clients.values()))
    monkeypatch.setattr(world.service.state, "has_state", lambda each: each is client)
    world.now += LEASE + 1
    world.service.tick(world.now)
    silent = client.courtesy
    assert world.call(sequence(session, 2)).status == NfsStatus.OK
    assert (silent, client.courtesy) == (True, False)
    world.now += LEASE + world.service.config.courtesy_seconds
    world.service.tick(world.now)
    assert not world.service.clients


def test_who_ends_at_work_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a request gets for a client that has ended meanwhile is taken back with its answer."""
    world = World()
    session = world.session()
    released: list[Client] = []

    async def scenario() -> None:
        go = asyncio.Event()

        async def slow(ctx: Compound, args: Reader, out: Writer) -> int:
            await go.wait()
            return NfsStatus.OK

        world.service.operations[Op.OPEN] = slow
        task = asyncio.ensure_future(world.begin(sequence(session, 2), op(Op.OPEN)))
        await asyncio.sleep(0)
        client = next(iter(world.service.clients.values()))
        world.service.remove(client)
        monkeypatch.setattr(world.service.state, "release_client", released.append)
        go.set()
        await task
        assert released == [client]

    asyncio.run(scenario())


# --- restarts ---------------------------------------------------------------------------------------


def test_grace_lasts_until_everybody_has_come_back() -> None:
    """Those that held state may reclaim; when the last of them has, the grace period is over early."""
    world = World({b"1": b"verifier", b"2": b"verifier"})
    first, second = world.bare_session(b"1"), world.bare_session(b"2")
    assert all(each.may_reclaim for each in world.service.clients.values())
    world.call(sequence(first, 1), op(Op.RECLAIM_COMPLETE, 0))
    assert world.service.in_grace(world.now)
    world.call(sequence(second, 1), op(Op.RECLAIM_COMPLETE, 0))
    assert not world.service.in_grace(world.now)


def test_grace_ends_for_those_who_do_not_come() -> None:
    """Who has not come by then is forgotten durably: its locks may be given to others."""
    world = World({b"1": b"verifier"})
    world.service.tick(world.now)
    assert world.service.in_grace(world.now)
    world.now += LEASE
    world.service.tick(world.now)
    assert not world.service.in_grace(world.now)
    assert world.journal.told == [("forget", b"1")]
    late = world.introduce(b"1")
    assert not world.service.clients[late].may_reclaim


def test_another_start_of_a_client_has_nothing_to_reclaim() -> None:
    """A client that was restarted too has lost its locks: nobody has to wait for it."""
    world = World({b"1": b"previous"})
    client = world.introduce(b"1", b"verifier")
    assert not world.service.clients[client].may_reclaim
    assert world.service.in_grace(world.now)
    world.call(create_session(client, 1))
    assert not world.service.in_grace(world.now)


def test_without_anybody_to_wait_for_there_is_no_grace() -> None:
    """A server nobody held anything on gives new state at once."""
    world = World()
    assert not world.service.in_grace(world.now)
    assert world.session()


def test_epochs_are_told_apart() -> None:
    """Sessions and clients of another epoch are never taken for one's own."""
    world = World()
    session = world.session()
    assert session[:4] == struct.pack(">I", world.service.epoch)
    assert next(iter(world.service.clients)) >> 32 == world.service.epoch
    assert world.service.write_verifier[:4] == session[:4]


def test_sequence_tells_of_the_way_back() -> None:
    """A client whose connection for our calls is gone learns that from SEQUENCE; one that never had any does not."""
    world = World()
    with_back, without = world.session(flags=2), world.session(b"another")
    way_back = world.connection
    plain = world.connect()

    def flags(session: bytes, number: int) -> int:
        found = world.call(sequence(session, number), connection=plain)
        return int(struct.unpack(">I", found.body[-4:])[0])

    assert flags(with_back, 2) == 0
    world.service.callbacks.lost(way_back)
    assert flags(with_back, 3) == SequenceFlag.CB_PATH_DOWN | SequenceFlag.CB_PATH_DOWN_SESSION
    assert flags(without, 2) == 0
    bind = op(Op.BIND_CONN_TO_SESSION) + with_back + struct.pack(">II", 7, 0)
    assert world.call(bind, connection=world.connect()).status == NfsStatus.OK
    assert flags(with_back, 4) == 0

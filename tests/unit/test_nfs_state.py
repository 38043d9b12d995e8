"""What clients hold: who is refused, who is asked to give something back, and what a restart leaves."""

from __future__ import annotations

import asyncio
import functools
from typing import Final

import attrs
import pytest

from space.projections.nfs import state as module
from space.projections.nfs.compound import ANONYMOUS, CURRENT, INVALID, READ_BYPASS, Stateid
from space.projections.nfs.delegations import Delegation, Report
from space.projections.nfs.locks import Range
from space.projections.nfs.nfs4 import NfsStatus, SequenceFlag, Share, Want, WhyNone
from space.projections.nfs.opens import Mode
from space.projections.nfs.state import REPORT_SECONDS
from tests.nfs_state_support import LEASE, Service, World, refused

pytestmark = pytest.mark.unit

READS: Final = Mode(Share.READ, Share.NONE)
WRITES: Final = Mode(Share.WRITE, Share.NONE)
BOTH: Final = Mode(Share.BOTH, Share.NONE)
DENIES_WRITE: Final = Mode(Share.READ, Share.WRITE)


def delegated(world: World, mode: Mode = READS, want: Want = Want.ANY) -> Delegation:
    """A delegation of a new client."""
    client = world.service.client()
    world.state.open(client, world.node(), b"o", mode, 0)
    given = world.state.offer(client, world.node(), mode.access, want, 0)
    assert isinstance(given, Delegation)
    return given


def test_an_open_owner_has_one_open_of_a_file() -> None:
    """Opening again adds to the same stateid, and grows its number (RFC 8881 §18.16.3)."""
    world = World()
    client = world.service.client()
    first = world.state.open(client, world.node(), b"o", READS, 0)
    before = first.stateid
    second = world.state.open(client, world.node(), b"o", WRITES, 0)
    assert second is first
    assert second.stateid == Stateid(2, before.other)
    assert second.mode == BOTH
    assert world.state.open_count(world.node()) == 1
    other = world.state.open(client, world.node(), b"p", READS, 0)
    assert other.stateid.seqid == 1
    assert other.stateid.other != before.other


def test_share_reservations_bind_other_owners() -> None:
    """A denial refuses other owners, of the same client too, and goes with the open."""
    world = World()
    one, two = world.service.client(), world.service.client()
    held = world.state.open(one, world.node(), b"o", DENIES_WRITE, 0)
    assert refused(world.state.open, one, world.node(), b"p", WRITES, 0) == NfsStatus.SHARE_DENIED
    assert refused(world.state.open, two, world.node(), b"o", BOTH, 0) == NfsStatus.SHARE_DENIED
    world.state.open(one, world.node(), b"o", WRITES, 0)
    world.state.open(two, world.node(2), b"o", BOTH, 0)
    world.state.close(held)
    world.state.open(two, world.node(), b"o", BOTH, 0)


def test_a_file_is_held_as_long_as_anything_is_held_on_it() -> None:
    """Open files keep their bytes: one hold until the last open and delegation are gone."""
    world = World()
    given = delegated(world)
    second = world.state.open(given.client, world.node(), b"p", READS, 0)
    assert world.files.held[world.node().id] == 1
    world.state.close(second)
    world.state.close(world.state.open(given.client, world.node(), b"o", READS, 0))
    assert world.files.held[world.node().id] == 1
    world.state.forget_delegation(given)
    assert world.files.held[world.node().id] == 0
    assert not world.state.has_state(given.client)


def test_stateids_say_what_is_wrong_with_them() -> None:
    """OLD_STATEID, BAD_STATEID and STALE_STATEID are told apart, and seqid 0 is the latest (RFC 8881 §8.2.4)."""
    world = World()
    one, two = world.service.client(), world.service.client()
    held = world.state.open(one, world.node(), b"o", READS, 0)
    old = held.stateid
    world.state.open(one, world.node(), b"o", READS, 0)
    test = world.state.test
    assert test(one, old) == NfsStatus.OLD_STATEID
    assert test(one, held.stateid) == NfsStatus.OK
    assert test(one, attrs.evolve(old, seqid=0)) == NfsStatus.OK
    assert test(one, attrs.evolve(old, seqid=3)) == NfsStatus.BAD_STATEID
    assert test(two, held.stateid) == NfsStatus.BAD_STATEID
    for special in (ANONYMOUS, READ_BYPASS, CURRENT, INVALID):
        assert test(one, special) == NfsStatus.BAD_STATEID
    world.state.close(held)
    assert test(one, held.stateid) == NfsStatus.BAD_STATEID
    later = World(Service(epoch=8))
    assert later.state.test(later.service.client(), old) == NfsStatus.STALE_STATEID
    earlier = World(Service(epoch=6))
    assert earlier.state.test(earlier.service.client(), old) == NfsStatus.BAD_STATEID


def test_a_seqid_that_wraps_is_still_told_from_old_ones() -> None:
    """After 2**32 - 1 comes 1, never 0, and the one before is old (RFC 8881 §8.2.2)."""
    world = World()
    client = world.service.client()
    held = world.state.open(client, world.node(), b"o", READS, 0)
    held.seqid = 0xFFFF_FFFF
    assert held.changed().seqid == 1
    assert world.state.test(client, Stateid(0xFFFF_FFFF, held.other)) == NfsStatus.OLD_STATEID
    assert world.state.test(client, Stateid(2, held.other)) == NfsStatus.BAD_STATEID


def test_reading_and_writing_need_an_open_for_it() -> None:
    """Writing needs an open for writing of that very file; reading is let pass with either (RFC 8881 §9.1.2)."""
    world = World()
    client = world.service.client()
    state, node = world.state, world.node()
    reader = state.open(client, node, b"r", READS, 0)
    writer = state.open(client, node, b"w", WRITES, 0)
    ctx = world.request(client)
    assert state.check_io(ctx, node, reader.stateid, write=False)
    assert refused(state.check_io, ctx, node, reader.stateid, write=True) == NfsStatus.OPENMODE
    assert state.check_io(ctx, node, writer.stateid, write=True)
    assert state.check_io(ctx, node, writer.stateid, write=False)
    assert refused(state.check_io, ctx, world.node(2), writer.stateid, write=True) == NfsStatus.BAD_STATEID
    lock = state.lock_owner(writer, b"l")
    state.lock(lock, Range(0, 1, write=True))
    assert state.check_io(ctx, node, lock.stateid, write=True)
    ctx = world.request(client, stateid=writer.stateid)
    assert state.check_io(ctx, node, CURRENT, write=True)
    assert refused(state.check_io, world.request(client), node, CURRENT, write=False) == NfsStatus.BAD_STATEID


def test_special_stateids_respect_what_others_deny() -> None:
    """Without an open a file is read and written unless somebody denies it; READ with all ones is never refused."""
    world = World()
    one, two = world.service.client(), world.service.client()
    state, node, ctx = world.state, world.node(), world.request(two)
    assert not state.check_io(ctx, node, ANONYMOUS, write=True)
    held = state.open(one, node, b"o", Mode(Share.READ, Share.BOTH), 0)
    assert refused(state.check_io, ctx, node, ANONYMOUS, write=True) == NfsStatus.LOCKED
    assert refused(state.check_io, ctx, node, ANONYMOUS, write=False) == NfsStatus.LOCKED
    assert refused(state.check_io, ctx, node, READ_BYPASS, write=True) == NfsStatus.LOCKED
    assert not state.check_io(ctx, node, READ_BYPASS, write=False)
    state.close(held)
    world.service.grace = True
    assert refused(state.check_io, ctx, node, ANONYMOUS, write=False) == NfsStatus.GRACE


def test_closing_releases_locks_and_tells_who_waits() -> None:
    """CLOSE takes the locks along, and the owner who was denied hears of it (RFC 8881 §18.2.3, §20.11)."""
    world = World()
    one, two = world.service.client(), world.service.client()
    state, node = world.state, world.node()
    held = state.open(one, node, b"o", BOTH, 0)
    lock = state.lock_owner(held, b"l")
    state.lock(lock, Range(0, 10, write=True))
    state.open(two, node, b"o", BOTH, 0)
    wanted = Range(5, 6, write=True)
    conflict = state.lock_conflict(node, (two, b"m"), wanted, 0)
    assert conflict == ((one, b"l"), Range(0, 10, write=True))
    state.wait(node, (two, b"m"), wanted)
    state.close(held)
    assert world.service.callbacks.notices == [(two, b"m")]
    assert state.lock_conflict(node, (two, b"m"), wanted, 0) is None
    assert state.test(one, lock.stateid) == NfsStatus.BAD_STATEID


def test_freeing_stateids() -> None:
    """FREE_STATEID is for locks that are gone and delegations that were revoked; all else is held (§18.38)."""
    world = World()
    client = world.service.client()
    state, ctx = world.state, world.request(client)
    held = state.open(client, world.node(), b"o", BOTH, 0)
    assert state.free(ctx, held.stateid) == NfsStatus.LOCKS_HELD
    lock = state.lock_owner(held, b"l")
    state.lock(lock, Range(0, 10, write=True))
    assert state.free(ctx, lock.stateid) == NfsStatus.LOCKS_HELD
    state.unlock(lock, 0, 10)
    assert state.free(ctx, lock.stateid) == NfsStatus.OK
    assert state.test(client, lock.stateid) == NfsStatus.BAD_STATEID
    assert refused(state.free, ctx, lock.stateid) == NfsStatus.BAD_STATEID


def test_a_courtesy_client_keeps_what_nobody_wants() -> None:
    """After its lease a client loses everything at the first conflict, and nothing before (RFC 8881 §8.4.2.4)."""
    world = World()
    late, prompt = world.service.client(expiry=5), world.service.client()
    state, node = world.state, world.node()
    held = state.open(late, node, b"o", DENIES_WRITE, 0)
    state.lock(state.lock_owner(held, b"l"), Range(0, 10, write=False))
    state.open(late, world.node(2), b"o", BOTH, 0)
    assert refused(state.open, prompt, node, b"o", WRITES, 4) == NfsStatus.SHARE_DENIED
    state.open(prompt, node, b"o", READS, 6)
    assert world.service.expired == []
    state.open(prompt, node, b"p", WRITES, 6)
    assert world.service.expired == [late]
    assert not state.has_state(late)
    assert state.open_count(world.node(2)) == 0


def test_a_lock_of_a_courtesy_client_gives_way() -> None:
    """A lock whose holder's lease has ended is in nobody's way."""
    world = World()
    late, prompt = world.service.client(expiry=5), world.service.client()
    state, node = world.state, world.node()
    held = state.open(late, node, b"o", BOTH, 0)
    state.lock(state.lock_owner(held, b"l"), Range(0, 10, write=True))
    wanted = Range(0, 1, write=True)
    assert state.lock_conflict(node, (prompt, b"m"), wanted, 4) is not None
    assert state.lock_conflict(node, (prompt, b"m"), wanted, 5) is None
    assert world.service.expired == [late]


@pytest.mark.parametrize(
    "mode, want, created, expected",
    [
        (READS, Want.NO_PREFERENCE, False, "read"),
        (READS, Want.NO_PREFERENCE, True, None),
        (READS, Want.READ, True, "read"),
        (READS, Want.WRITE, False, "read"),
        (BOTH, Want.NO_PREFERENCE, False, "write"),
        (BOTH, Want.WRITE, True, "write"),
        (BOTH, Want.READ, False, "read"),
        (WRITES, Want.NO_PREFERENCE, False, None),
        (BOTH, Want.NONE, False, WhyNone.NOT_WANTED),
        (BOTH, Want.CANCEL, False, WhyNone.CANCELLED),
    ],
)
def test_what_is_delegated(mode: Mode, want: Want, created: bool, expected: object) -> None:
    """A delegation is given where it is asked for, or likely to last; a reason where one was asked."""
    world = World()
    client = world.service.client()
    world.state.open(client, world.node(), b"o", mode, 0)
    given = world.state.offer(client, world.node(), mode.access, want, 0, created=created)
    if isinstance(given, Delegation):
        assert expected == ("write" if given.write else "read")
        assert given.stateid.seqid == 1
    else:
        assert given == expected


def test_no_delegation_beside_a_conflicting_open() -> None:
    """Who has a file open for writing keeps others from any delegation, who reads it from one for writing."""
    world = World()
    one, two = world.service.client(), world.service.client()
    state, node = world.state, world.node()
    held = state.open(one, node, b"o", READS, 0)
    state.open(two, node, b"o", BOTH, 0)
    assert state.offer(two, node, Share.BOTH, Want.WRITE, 0) == WhyNone.CONTENTION
    assert state.offer(two, node, Share.BOTH, Want.NO_PREFERENCE, 0) is None
    assert state.offer(one, node, Share.READ, Want.READ, 0) == WhyNone.CONTENTION
    state.close(held)
    assert isinstance(state.offer(two, node, Share.BOTH, Want.WRITE, 0), Delegation)


def test_no_delegation_to_who_cannot_be_asked_for_it() -> None:
    """A client without a way back gets none: it could never be recalled (RFC 8881 §10.2.1)."""
    world = World()
    client = world.service.client()
    world.service.callbacks.unreachable.add(client)
    world.state.open(client, world.node(), b"o", READS, 0)
    assert world.state.offer(client, world.node(), Share.READ, Want.READ, 0) == WhyNone.RESOURCE


def test_a_conflicting_open_waits_for_the_delegation() -> None:
    """Others are told to come again until it is returned, and its holder is asked once (RFC 8881 §10.4.5)."""
    world = World()
    given = delegated(world)
    other = world.service.client()
    state, node = world.state, world.node()
    state.open(other, node, b"o", READS, 0)
    assert world.service.callbacks.recalls == []
    for _ in range(3):
        assert refused(state.open, other, node, b"o", WRITES, 1) == NfsStatus.DELAY
    assert world.service.callbacks.recalls == [(given.client, given.stateid, False)]
    state.open(given.client, node, b"own", WRITES, 1)  # its holder does as it likes
    state.forget_delegation(given)
    state.open(other, node, b"o", WRITES, 1)
    assert state.offer(given.client, node, Share.READ, Want.NO_PREFERENCE, 2) is None


def test_a_delegation_given_back_is_not_given_at_once() -> None:
    """A client that returns one was in its own way: for a lease it gets another only if it asks for it."""
    world = World()
    given = delegated(world)
    state, node = world.state, world.node()
    state.return_delegation(given, 1)
    assert state.offer(given.client, node, Share.READ, Want.NO_PREFERENCE, LEASE) is None
    again = state.offer(given.client, node, Share.READ, Want.READ, LEASE)
    assert isinstance(again, Delegation)
    state.forget_delegation(again)
    assert isinstance(state.offer(given.client, node, Share.READ, Want.NO_PREFERENCE, LEASE + 1), Delegation)


def test_a_write_delegation_is_recalled_by_readers() -> None:
    """Only its holder knows what is in the file, so reading waits too, also without an open."""
    world = World()
    given = delegated(world, BOTH)
    assert given.write
    other = world.service.client()
    state, node = world.state, world.node()
    assert state.delegated_for_writing(node, other) is given
    assert state.delegated_for_writing(node, given.client) is None
    assert refused(state.open, other, node, b"o", READS, 0) == NfsStatus.DELAY
    assert refused(state.check_io, world.request(other), node, READ_BYPASS, write=False) == NfsStatus.DELAY
    assert refused(state.before_change, world.request(other), node) == NfsStatus.DELAY
    state.before_change(world.request(given.client), node)


async def asked(world: World, given: Delegation, answer: object, others: int = 2) -> list[object]:
    """What some clients learn who ask for attributes at once; ``answer`` is called when the holder was asked."""
    tasks = [asyncio.create_task(world.state.ask(given, 1)) for _ in range(others)]
    await asyncio.sleep(0)
    assert len(world.service.callbacks.questions) == 1
    assert callable(answer)
    answer()
    return await asyncio.gather(*tasks, return_exceptions=True)


def test_the_holder_of_a_write_delegation_is_asked_for_attributes() -> None:
    """One question for all who want to know; its answer counts when the holder has changed something (§10.4.3)."""
    for change, expected in ((100, None), (101, Report(101, 5))):
        world = World()
        given = delegated(world, BOTH)
        answer = functools.partial(world_answers, world, (change, 5))
        assert asyncio.run(asked(world, given, answer)) == [expected, expected]
        assert world.service.callbacks.recalls == []


def world_answers(world: World, found: tuple[int, int] | None) -> None:
    """The holder answers the question it was asked."""
    world.service.callbacks.questions[0](found)


def test_a_holder_that_does_not_say_loses_its_delegation() -> None:
    """Refused or not answered in time: the delegation is recalled, and whoever asks comes again."""
    for answer in ("refused", "late"):
        world = World()
        given = delegated(world, BOTH)
        says = functools.partial(world_answers, world, None)
        found = asyncio.run(
            asked(
                world,
                given,
                says if answer == "refused" else lambda w=world: w.state.tick(1 + REPORT_SECONDS),
            )
        )
        assert [getattr(each, "status", None) for each in found] == [NfsStatus.DELAY] * 2
        assert len(world.service.callbacks.recalls) == 1


def test_a_delegation_returned_meanwhile_leaves_nothing_to_ask() -> None:
    """The holder gives it back, or is gone, while it is asked: what the server knows is right."""
    for leave in ("return", "remove"):
        world = World()
        given = delegated(world, BOTH)
        if leave == "return":
            answer = functools.partial(world.state.forget_delegation, given)
        else:
            answer = functools.partial(world.service.remove, given.client)
        assert asyncio.run(asked(world, given, answer)) == [None, None]
        assert world.service.callbacks.recalls == []


def test_denying_others_to_read_recalls_a_read_delegation() -> None:
    """The holder may have the file open for reading without anybody knowing."""
    world = World()
    given = delegated(world)
    world.state.close(world.state.open(given.client, world.node(), b"o", READS, 0))
    other = world.service.client()
    mode = Mode(Share.READ, Share.READ)
    assert refused(world.state.open, other, world.node(), b"o", mode, 0) == NfsStatus.DELAY


def test_a_delegation_that_is_not_returned_is_revoked() -> None:
    """One lease after the recall it is gone; its holder learns of it until it frees the stateid (§10.4.6, §18.38)."""
    world = World()
    given = delegated(world)
    other = world.service.client()
    state, node = world.state, world.node()
    assert refused(state.open, other, node, b"o", WRITES, 1) == NfsStatus.DELAY
    assert refused(state.open, other, node, b"o", WRITES, LEASE) == NfsStatus.DELAY
    state.open(other, node, b"o", WRITES, 1 + LEASE)
    ctx = world.request(given.client, now=1 + LEASE)
    assert refused(state.check_io, ctx, node, given.stateid, write=False) == NfsStatus.DELEG_REVOKED
    assert state.test(given.client, given.stateid) == NfsStatus.DELEG_REVOKED
    assert state.sequence_flags(given.client) == SequenceFlag.RECALLABLE_STATE_REVOKED
    assert state.free(ctx, given.stateid) == NfsStatus.OK
    assert not state.sequence_flags(given.client)
    assert state.test(given.client, given.stateid) == NfsStatus.BAD_STATEID


def test_a_delegation_nobody_waits_for_is_revoked_as_well() -> None:
    """Somebody changed the file through another view and does not come back: time alone revokes."""
    world = World()
    given = delegated(world)
    world.state.changed_elsewhere(world.node().id, 1)
    assert [each[0] for each in world.service.callbacks.recalls] == [given.client]
    world.state.tick(LEASE)
    assert not given.revoked
    world.state.tick(1 + LEASE)
    assert given.revoked


def test_a_recall_that_failed_is_sent_again() -> None:
    """A client that could not be reached, or did not know the delegation yet, is asked again a little later."""
    world = World()
    given = delegated(world)
    ctx = world.request(world.service.client(), now=1)
    assert refused(world.state.before_change, ctx, world.node()) == NfsStatus.DELAY
    world.state.recall_failed(given.client, given.stateid, 1)
    for now, asked in ((1.5, 1), (2, 2), (2.5, 2)):
        ctx.now = now
        assert refused(world.state.before_change, ctx, world.node()) == NfsStatus.DELAY
        assert len(world.service.callbacks.recalls) == asked
    world.state.recall_failed(given.client, Stateid(1, bytes(12)), 2)


def test_a_delegation_of_a_vanished_client_is_not_waited_for() -> None:
    """A client whose lease has ended is not asked: it loses the delegation alone, and cannot claim it again."""
    world = World()
    given = delegated(world)
    given.client.expiry = 5
    world.state.before_change(world.request(world.service.client(), now=5), world.node())
    assert given.revoked
    assert not world.service.callbacks.recalls
    assert not world.service.expired
    assert given.client.forgotten
    assert world.state.open_count(world.node()) == 1


def test_no_changes_of_names_while_delegations_may_be_claimed() -> None:
    """In the grace period only who has claimed an open may change a file: somebody else may have a delegation."""
    world = World()
    one, two = world.service.client(), world.service.client()
    world.service.grace = True
    world.state.open(one, world.node(), b"o", BOTH, 0)
    world.state.before_change(world.request(one), world.node())
    assert refused(world.state.before_change, world.request(two), world.node()) == NfsStatus.GRACE


def test_claims_of_delegations_after_a_restart() -> None:
    """A delegation comes back unless what others claimed is against it."""
    world = World()
    one, two = world.service.client(), world.service.client()
    state, node = world.state, world.node()
    assert state.may_reclaim_delegation(one, node, write=True)
    state.open(one, node, b"o", READS, 0)
    assert not state.may_reclaim_delegation(two, node, write=True)
    assert state.may_reclaim_delegation(two, node, write=False)
    state.delegate(two, node, write=False)
    assert state.may_reclaim_delegation(one, node, write=False)
    assert not state.may_reclaim_delegation(one, node, write=True)


def test_a_past_moment_is_another_file() -> None:
    """What is held on a file of a past moment has nothing to do with the file of now."""
    world, past = World(), World()
    past.files.immutable = True
    state = world.state
    one, two = world.service.client(), world.service.client()
    state.open(one, world.node(), b"o", Mode(Share.READ, Share.BOTH), 0)
    state.open(two, past.node(), b"o", READS, 0)
    assert state.open_count(past.node()) == state.open_count(world.node()) == 1


def test_two_exports_that_show_one_file_share_its_locks() -> None:
    """A file is what is stored, however a client got there."""
    world, elsewhere = World(), World()
    state = world.state
    one, two = world.service.client(), world.service.client()
    held = state.open(one, world.node(), b"o", DENIES_WRITE, 0)
    assert refused(state.open, two, elsewhere.node(), b"o", WRITES, 0) == NfsStatus.SHARE_DENIED
    assert state.check_io(world.request(one), elsewhere.node(), held.stateid, write=False)


def test_what_a_client_may_hold_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client with too many opens or locks is told to come again; others are not."""
    monkeypatch.setattr(module, "HELD_PER_CLIENT_MAX", 2)
    world = World()
    one, two = world.service.client(), world.service.client()
    state = world.state
    held = state.open(one, world.node(1), b"o", BOTH, 0)
    state.lock_owner(held, b"l")
    assert refused(state.open, one, world.node(2), b"o", READS, 0) == NfsStatus.DELAY
    assert refused(state.lock_owner, held, b"m") == NfsStatus.DELAY
    assert state.offer(one, world.node(1), Share.READ, Want.READ, 0) == WhyNone.RESOURCE
    state.open(two, world.node(2), b"o", READS, 0)


def test_a_client_that_is_gone_gets_nothing() -> None:
    """A request still at work when its client was forgotten leaves nothing behind."""
    world = World()
    client = world.service.client()
    world.service.remove(client)
    assert refused(world.state.open, client, world.node(), b"o", READS, 0) == NfsStatus.STALE_CLIENTID
    assert refused(world.state.delegate, client, world.node(), write=False) == NfsStatus.STALE_CLIENTID
    assert not world.state.has_state(client)
    assert not +world.files.held

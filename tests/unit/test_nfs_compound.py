"""The loop over a COMPOUND: where it stops, what it keeps of an operation that failed, and when it answers."""

from __future__ import annotations

import struct

import attrs
import pytest

from space._errors import DiskFullError, NotFoundError
from space.projections.nfs.compound import Compound, NfsError, Operation
from space.projections.nfs.nfs4 import NfsStatus, Op
from space.projections.nfs.xdr import Reader, Writer, XdrError
from tests.nfs_session_support import World, exchange_id, op, sequence

pytestmark = pytest.mark.unit


def world(**operations: Operation) -> tuple[World, bytes]:
    """A world with operations of the test's own, and a session in it."""
    made = World()
    session = made.session()
    for name, operation in operations.items():
        made.service.operations[Op[name]] = operation
    return made, session


def fails_with(error: Exception) -> Operation:
    """An operation that writes something, then raises."""

    def operation(ctx: Compound, args: Reader, out: Writer) -> int:
        out.u32(1234)
        raise error

    return operation


def results(*pairs: tuple[int, int]) -> bytes:
    """Operations and their statuses, as in an answer."""
    return b"".join(struct.pack(">II", *each) for each in pairs)


def test_only_two_minor_versions_are_served() -> None:
    """Another minor version is refused before anything is looked at, with the tag given back (RFC 8881 §16.2.3)."""
    for minor in (0, 3, 50):
        found = World().call(op(Op.ILLEGAL), minor=minor, tag=b"tag")
        assert (found.status, found.tag, found.operations) == (NfsStatus.MINOR_VERS_MISMATCH, b"tag", 0)


def test_no_operations_are_carried_out_well() -> None:
    """A COMPOUND of nothing is right, in both versions."""
    for minor in (1, 2):
        assert World().call(minor=minor).status == NfsStatus.OK


def test_it_stops_at_the_first_operation_that_fails() -> None:
    """What comes after it has no result; its own is there, with everything before."""
    made, session = world(
        ACCESS=lambda ctx, args, out: NfsStatus.OK, GETFH=fails_with(NfsError(NfsStatus.IO))
    )
    found = made.call(sequence(session, 2), op(Op.ACCESS), op(Op.GETFH), op(Op.ACCESS))
    assert (found.status, found.operations) == (NfsStatus.IO, 3)
    assert found.results.endswith(results((Op.ACCESS, 0), (Op.GETFH, NfsStatus.IO)))


@pytest.mark.parametrize(
    "error,status",
    [
        (NfsError(NfsStatus.DELAY), NfsStatus.DELAY),
        (XdrError("short"), NfsStatus.BADXDR),
        (NotFoundError("none"), NfsStatus.NOENT),
        (DiskFullError("full"), NfsStatus.NOSPC),
        (ZeroDivisionError(), NfsStatus.SERVERFAULT),
    ],
)
def test_errors_are_statuses(error: Exception, status: NfsStatus) -> None:
    """Whatever an operation raises becomes its status, and what it had written is gone."""
    made, session = world(GETFH=fails_with(error))
    found = made.call(sequence(session, 2), op(Op.GETFH))
    assert found.status == status
    assert found.results.endswith(results((Op.GETFH, status)))


@pytest.mark.parametrize(
    "minor,number,shown,status",
    [
        (1, 2, Op.ILLEGAL, NfsStatus.OP_ILLEGAL),
        (1, Op.SEEK, Op.ILLEGAL, NfsStatus.OP_ILLEGAL),
        (2, 76, Op.ILLEGAL, NfsStatus.OP_ILLEGAL),
        (2, Op.ILLEGAL, Op.ILLEGAL, NfsStatus.OP_ILLEGAL),
        (1, Op.RENEW, Op.RENEW, NfsStatus.NOTSUPP),
        (1, Op.SETCLIENTID, Op.SETCLIENTID, NfsStatus.NOTSUPP),
        (1, Op.SEQUENCE, Op.SEQUENCE, NfsStatus.SEQUENCE_POS),
        (1, Op.BIND_CONN_TO_SESSION, Op.BIND_CONN_TO_SESSION, NfsStatus.NOT_ONLY_OP),
    ],
)
def test_operations_that_must_not_be(minor: int, number: int, shown: int, status: NfsStatus) -> None:
    """Unknown operations, those of another minor version, and those in the wrong place have their own errors."""
    made, session = world()
    found = made.call(sequence(session, 2), op(number), minor=minor)
    assert found.status == status
    assert found.results.endswith(results((shown, status)))


def test_without_a_session_there_is_one_operation() -> None:
    """Most operations need SEQUENCE before them; those that do not are alone (RFC 8881 §2.10.5)."""
    assert World().call(op(Op.PUTROOTFH)).status == NfsStatus.OP_NOT_IN_SESSION
    assert World().call(exchange_id(), op(Op.PUTROOTFH)).status == NfsStatus.NOT_ONLY_OP


def test_arguments_that_end_are_the_error_of_their_operation() -> None:
    """A request that ends inside an operation has carried out all those before it, and the last result says so."""
    made, session = world(ACCESS=lambda ctx, args, out: NfsStatus.OK)
    found = made.call(sequence(session, 2), op(Op.ACCESS), op(Op.RECLAIM_COMPLETE))
    assert (found.status, found.operations) == (NfsStatus.BADXDR, 3)
    assert found.results.endswith(results((Op.ACCESS, 0), (Op.RECLAIM_COMPLETE, NfsStatus.BADXDR)))


def test_an_operation_without_a_number_has_a_result() -> None:
    """Where the request ends before its number it is OP_ILLEGAL's, with the COMPOUND's status (RFC 8881 §15.2)."""
    made, session = world(ACCESS=lambda ctx, args, out: NfsStatus.OK)
    for missing in (b"", b"\0\0\0"):
        found = made.call(sequence(session, 2), op(Op.ACCESS), missing)
        assert (found.status, found.operations) == (NfsStatus.BADXDR, 3)
        assert found.results.endswith(results((Op.ACCESS, 0), (Op.ILLEGAL, NfsStatus.BADXDR)))
        made, session = world(ACCESS=lambda ctx, args, out: NfsStatus.OK)
    found = made.call(b"")
    assert (found.status, found.results) == (NfsStatus.BADXDR, results((Op.ILLEGAL, NfsStatus.BADXDR)))


SETATTR_FAILURES = [NfsError(NfsStatus.IO), XdrError("short"), NotFoundError("none"), ZeroDivisionError()]


@pytest.mark.parametrize("error", SETATTR_FAILURES)
def test_setattr_says_what_was_set_whatever_went_wrong(error: Exception) -> None:
    """The result of SETATTR has a bitmap also when it failed (RFC 8881 §18.30.2): an empty one."""
    made, session = world(SETATTR=fails_with(error))
    found = made.call(sequence(session, 2), op(Op.SETATTR))
    assert found.results.endswith(results((Op.SETATTR, found.status)) + bytes(4))
    found = made.call(op(Op.SETATTR))
    assert found.results == results((Op.SETATTR, NfsStatus.OP_NOT_IN_SESSION)) + bytes(4)


def test_a_request_that_ends_before_its_operations_is_no_request() -> None:
    """Then there is nothing to answer but that it cannot be read."""
    with pytest.raises(XdrError):
        World().call(tag=bytes(2000))


@attrs.define(eq=False)
class Disk:
    """Something that can be made durable, or not."""

    error: Exception | None = None
    synced: int = 0

    async def sync(self) -> None:
        if self.error is not None:
            raise self.error
        self.synced += 1


def changes(disk: Disk) -> Operation:
    """An operation that promises something durable."""

    def operation(ctx: Compound, args: Reader, out: Writer) -> int:
        ctx.unsynced.add(disk)
        out.u32(1)
        return NfsStatus.OK

    return operation


def test_one_barrier_for_all_operations() -> None:
    """What several operations promise is waited for once, after the last of them."""
    disk = Disk()
    made, session = world(SETATTR=changes(disk))
    before = made.barriers
    assert made.call(sequence(session, 2), op(Op.SETATTR), op(Op.SETATTR)).status == NfsStatus.OK
    assert (disk.synced, made.barriers - before) == (1, 1)


def test_a_promise_that_cannot_be_kept_is_taken_back() -> None:
    """Where the disk refuses, the first operation that promised fails, and nothing after it has a result."""
    made, session = world(
        SETATTR=changes(Disk(DiskFullError("full"))), ACCESS=lambda ctx, args, out: NfsStatus.OK
    )
    found = made.call(sequence(session, 2), op(Op.ACCESS), op(Op.SETATTR), op(Op.ACCESS))
    assert (found.status, found.operations) == (NfsStatus.NOSPC, 3)
    assert found.results.endswith(results((Op.ACCESS, 0), (Op.SETATTR, NfsStatus.NOSPC)) + bytes(4))


def test_what_must_be_remembered_is_before_any_answer() -> None:
    """As long as the recovery journal is not durable no COMPOUND is answered well."""
    made, session = world(ACCESS=lambda ctx, args, out: NfsStatus.OK)
    made.journal.forget(b"another")
    assert made.call(sequence(session, 2), op(Op.ACCESS)).status == NfsStatus.OK
    assert not made.journal.dirty
    made.journal.forget(b"one more")
    made.journal.fails = DiskFullError("full")
    assert made.call(sequence(session, 3), op(Op.ACCESS)).status == NfsStatus.NOSPC


def writes(count: int) -> Operation:
    """An operation with a result of that many bytes."""

    def operation(ctx: Compound, args: Reader, out: Writer) -> int:
        out.fixed(bytes(count))
        return NfsStatus.OK

    return operation


def test_an_answer_that_is_too_big_says_so() -> None:
    """A result beyond what the session takes is not sent, and its operation has that as its error."""
    made, session = world(READLINK=writes(9000))
    found = made.call(sequence(session, 2), op(Op.READLINK))
    assert found.status == NfsStatus.REP_TOO_BIG
    found = made.call(sequence(session, 3, cached=True), op(Op.READLINK))
    assert found.status == NfsStatus.REP_TOO_BIG_TO_CACHE
    assert found.results.endswith(results((Op.READLINK, NfsStatus.REP_TOO_BIG_TO_CACHE)))


def test_what_cannot_be_answered_is_not_done() -> None:
    """An operation that changes something is not begun where its result might not fit."""
    done = []

    def remove(ctx: Compound, args: Reader, out: Writer) -> int:
        done.append(1)
        return NfsStatus.OK

    made, session = world(READLINK=writes(8000), REMOVE=remove)
    found = made.call(sequence(session, 2), op(Op.READLINK), op(Op.REMOVE))
    assert found.status == NfsStatus.REP_TOO_BIG
    assert not done
    assert made.call(sequence(session, 3), op(Op.REMOVE)).status == NfsStatus.OK
    assert done

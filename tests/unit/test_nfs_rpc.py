"""Records and calls: what bytes of a peer mean, and what is said to those that mean nothing."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from space.projections.nfs import rpc
from space.projections.nfs.rpc import Call, Credentials, RecordError, Records, Refused, Reply

pytestmark = pytest.mark.unit


def fragment(data: bytes, *, last: bool = True) -> bytes:
    """A piece of a record."""
    return struct.pack(">I", last << 31 | len(data)) + data


def everything(records: Records, pieces: list[bytes]) -> list[bytes]:
    """All records that come of pieces of a stream."""
    found = []
    for piece in pieces:
        records.feed(piece)
        while (record := records.next()) is not None:
            found.append(bytes(record))
    return found


@given(
    st.lists(
        st.lists(st.binary(max_size=20), min_size=1, max_size=4).filter(lambda each: each[-1]), max_size=5
    ),
    st.lists(st.integers(0, 40), max_size=12),
)
def test_records_are_the_same_however_they_arrive(records: list[list[bytes]], cuts: list[int]) -> None:
    """Any records in any fragments, cut anywhere, come out whole and in order."""
    stream = b"".join(
        fragment(each, last=index + 1 == len(pieces))
        for pieces in records
        for index, each in enumerate(pieces)
    )
    pieces, at = [], 0
    for cut in cuts:
        pieces.append(stream[at : at + cut])
        at += cut
    reader = Records()
    assert everything(reader, [*pieces, stream[at:]]) == [b"".join(each) for each in records]
    assert not reader.partial


def test_a_record_has_a_greatest_size() -> None:
    """A record that is too large is refused by its header, before any of it is kept; so is one in too many pieces."""
    reader = Records(100)
    reader.feed(fragment(bytes(60), last=False) + struct.pack(">I", 1 << 31 | 41))
    with pytest.raises(RecordError, match="101 bytes"):
        reader.next()
    reader = Records(100)
    reader.feed(fragment(b"", last=False) * (rpc.FRAGMENTS_MAX + 1))
    with pytest.raises(RecordError, match="pieces"):
        reader.next()


def test_a_record_with_nothing_in_it_is_refused() -> None:
    """The last fragment of a record is not empty."""
    reader = Records()
    reader.feed(fragment(b""))
    with pytest.raises(RecordError, match="empty"):
        reader.next()


def test_what_is_held_of_a_record_is_known() -> None:
    """A record that has begun is partial, and as large as what has arrived of it."""
    reader = Records()
    assert not reader.partial
    reader.feed(fragment(bytes(1000))[:504])
    assert reader.next() is None
    assert (reader.partial, reader.held) == (True, 500)


CREDENTIALS = struct.pack(">II", 5, 4) + b"host" + struct.pack(">IIIII", 1000, 100, 2, 4, 24)


def call(
    *, version: int = 2, program: int = 100003, number: int = 4, procedure: int = 1, flavor: int = 1,
    body: bytes = CREDENTIALS, verifier: int = 0,
) -> bytes:  # fmt: skip
    """A COMPOUND of a user, or something that is nearly one."""
    head = struct.pack(">IIIIIIII", 9, 0, version, program, number, procedure, flavor, len(body))
    return head + body + struct.pack(">II", verifier, 0) + b"arguments..."


def test_a_call_says_who_calls_and_leaves_its_arguments() -> None:
    """AUTH_SYS is taken apart; the stamp means nothing; the arguments stand where the procedure takes them."""
    found = rpc.message(call())
    assert isinstance(found, Call)
    assert (found.xid, found.procedure) == (9, 1)
    assert found.credentials == Credentials(1000, 100, (4, 24), "host", rpc.AUTH_SYS)
    assert found.arguments.fixed(12) == b"arguments..."
    other = rpc.message(call(body=struct.pack(">I", 6) + CREDENTIALS[4:]))
    assert isinstance(other, Call)
    assert other.credentials is found.credentials
    nobody = rpc.message(call(flavor=0, body=b""))
    assert isinstance(nobody, Call)
    assert nobody.credentials.uid == rpc.NOBODY


@pytest.mark.parametrize(
    "message,reply",
    [
        (call(version=3), (1, 0, 2, 2)),  # MSG_DENIED, RPC_MISMATCH, from 2 to 2
        (call(program=100005), (0, 0, 0, 1)),  # MSG_ACCEPTED, no verifier, PROG_UNAVAIL
        (call(number=3), (0, 0, 0, 2, 4, 4)),  # PROG_MISMATCH, from 4 to 4
        (call(procedure=2), (0, 0, 0, 3)),  # PROC_UNAVAIL
        (call(flavor=6), (1, 1, 1)),  # MSG_DENIED, AUTH_ERROR, AUTH_BADCRED
        (call(body=CREDENTIALS[:-4]), (1, 1, 1)),
        (call(body=CREDENTIALS + bytes(4)), (1, 1, 1)),
        (call(verifier=1), (1, 1, 3)),  # AUTH_BADVERF
        (call()[:30], (0, 0, 0, 4)),  # GARBAGE_ARGS
        (call(body=bytes(401)), (0, 0, 0, 4)),
    ],
)
def test_what_there_is_not_is_refused(message: bytes, reply: tuple[int, ...]) -> None:
    """Calls that are not for us, or not of somebody, get the answer of RFC 5531 §9."""
    found = rpc.message(message)
    assert isinstance(found, Refused)
    assert found.reply == struct.pack(f">{2 + len(reply)}I", 9, 1, *reply)


def test_replies_to_our_calls() -> None:
    """A reply says whether the call was carried out, and leaves its results."""
    found = rpc.message(struct.pack(">IIIIIII", 3, 1, 0, 0, 0, 0, 77))
    assert isinstance(found, Reply)
    assert (found.xid, found.accepted, found.results.u32()) == (3, True, 77)
    for refused in ((3, 1, 1, 1, 1), (3, 1, 0, 0, 0, 2, 1, 1)):
        found = rpc.message(struct.pack(f">{len(refused)}I", *refused))
        assert isinstance(found, Reply)
        assert not found.accepted


def test_our_calls_are_calls() -> None:
    """What we send says who we are as the client wanted it."""
    sent = rpc.call(5, 100003, 4, 1, CREDENTIALS)
    found = rpc.message(sent)
    assert isinstance(found, Call)
    assert found.credentials.machine == "host"
    assert rpc.message(rpc.call(5, 100003, 4, 1, b"")) != found


@given(st.binary(max_size=120) | st.binary(max_size=80).map(lambda tail: call()[:40] + tail))
def test_any_bytes_are_a_message_or_one_error(data: bytes) -> None:
    """Whatever a peer sends is a call, a reply, or refused; nothing else happens."""
    try:
        found = rpc.message(data)
    except RecordError:
        return
    assert isinstance(found, Call | Reply | Refused)

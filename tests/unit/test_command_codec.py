"""Requests as plain data: what a follower hands to the leader."""

from __future__ import annotations

import attrs
import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from space._errors import UsageError
from space.events import commands as cmd
from space.events.command_codec import _CLASSES, decode_requests, encode_requests
from space.events.commands import Request
from space.events.types import Kind, ZoneKind

pytestmark = pytest.mark.unit

A, B = bytes(15) + b"\1", bytes(15) + b"\2"

SAMPLES: list[cmd.Command] = [
    cmd.InitialiseStore(A, 0o755, 1, 2),
    cmd.CreateCapsule(
        A, Kind.DIRECTORY, 0o755, 1, 2, B, b"name", 3, 4, 512, b"", b"policy", cmd.NewKey(1, 1, b"k")
    ),
    cmd.CreateCapsule(A),
    cmd.Link(A, B, b"n"),
    cmd.Unlink(A, b"n", directory=None, recursive=True),
    cmd.DeleteCapsule(A),
    cmd.Rename(A, b"a", B, b"b", replace=False, exchange=True),
    cmd.WriteExtent(A, 10, 20, [cmd.StoredFrame(b"r" * 48, b"stored"), cmd.StoredFrame(b"q" * 48, None)]),
    cmd.WriteExtent(A, 10, 20, [], change=7),
    cmd.CopyRange(A, 1, B, 2, 3),
    cmd.Deallocate(A, 1, 2, extend=True),
    cmd.Resize(A, 5),
    cmd.SetAttributes(A, mode=0o600, mtime=7),
    cmd.SetXattr(A, b"user.x", b"v", create=True),
    cmd.RemoveXattr(A, b"user.x"),
    cmd.SetPolicy(A, b"p", None),
    cmd.TakeSnapshot(A, "snap"),
    cmd.DropSnapshot("snap"),
    cmd.Clone(A, B, A, b"c", 4, b"m"),
    cmd.Undelete(A, B, b"n"),
    cmd.ReclaimPayload([(1, 2, 3), (4, 5, 6)]),
    cmd.PurgeCapsules([A, B]),
    cmd.ForgetReplies([A, B]),
    cmd.RewrapKeys(7, [(5, 1, b"row"), (6, 2, b"")], True, 6),
    cmd.DestroyKeys(A, [5, 6]),
    cmd.AssignNamespace("nqn.2014-08.org.example:store", A),
    cmd.RegisterReservation(A, B, 2, 2**64 - 1, 1, ignore=True),
    cmd.AcquireReservation(A, B, 1, 3, 1, 2),
    cmd.RecordNfsClient("space:a", b"client", b"verifier"),
    cmd.ForgetNfsClient("space:a", b"client"),
    cmd.StartNfsServer("space:a"),
    cmd.ReleaseReservation(A, B, 0, 3, 1),
    cmd.DefineZone(A, "here", ZoneKind.METRO, "https://a:1", b"pem", b"s" * 32),
    cmd.AddZone(B, "there", ZoneKind.EDGE, "https://b:1", b"pem", b"s" * 32),
    cmd.ChangeZone(B, ZoneKind.GEO, "https://b:2", b"pem", b"s" * 32),
    cmd.RemoveZone(B),
    cmd.Copied(A, 5, 0, True, [cmd.CreateCapsule(A)], (1, 2, 3, -4)),
    cmd.WithdrawCapsule(A),
    cmd.SweepReplicas(3),
    cmd.GiveHomes(B, [A]),
    cmd.TakeHome(A, b"policy", 3, 1, 7),
    cmd.DeclineHomes(B, 7),
    cmd.KeepHomes(B, [A], 7),
    cmd.PlaceCapsule(A, [(B, b"n")], [(A, b"old")]),
    cmd.ReceiveShipment(
        B,
        1,
        2,
        3,
        4,
        5,
        [
            cmd.WriteExtent(A, 10, 20, [cmd.StoredFrame(b"r" * 48, b"first")]),
            cmd.Copied(
                A, 5, 1, False, [cmd.WriteExtent(A, 0, 1, [cmd.StoredFrame(b"r" * 48, b"second")])], (0,) * 4
            ),
        ],
        through_step=1,
        resume=b"note",
    ),
    cmd.RecordShipment(B, 0, 1, 2, 3, 4, [(A, 3), (B, 2)], 100, [A]),
    cmd.RecordRefusal(A, "view", "nfs", "sovereignty: local"),
    cmd.RecordAction(A, "Federate", "paris", "federation.targets: paris"),
    cmd.RecordRpo(B, 0, 1, 2, 10**9, kept=False),
    cmd.SetArrivalPolicy(b"policy", cmd.NewKey(1, 1, b"k")),
    cmd.PromoteZone(B, [(0, 1, 7, 2)], [A], again=True),
    cmd.LoseHome(
        B, 1, 9, [(0, 1, 7)], [cmd.Clone(A, B, A, b"c"), cmd.Resize(B, 1)], [A], [(B, (1, 2, 3, 4))], 8, [B]
    ),
    cmd.FollowHeir(B, A, 1, 9, [A], [cmd.Unlink(A, b"c")], [(B, (1, 2, 3, 4))], [A], 8, True, [B]),
    cmd.Together(
        [
            cmd.CreateCapsule(A, Kind.DIRECTORY, parent=B, name=b"d", key=cmd.NewKey(1, 1, b"k")),
            cmd.Clone(A, B, A, b"c"),
            cmd.SetXattr(A, b"x", b"v"),
        ]
    ),
]


def test_every_command_travels_and_comes_out_equal() -> None:
    """Each command of the model, with an attachment where it has bytes, is the same after the journey."""
    assert {type(each) for each in SAMPLES} == set(_CLASSES.values())
    requests = [Request(command, "uid:0", b"c" * 16, n) for n, command in enumerate(SAMPLES)]
    document, attachments = encode_requests(requests)
    carried = msgpack.unpackb(msgpack.packb(document))
    assert decode_requests(carried, attachments) == requests
    assert attachments == [b"stored", b"first", b"second"]


JSONISH = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.binary(max_size=20) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=6),
    max_leaves=20,
)


@given(JSONISH)
def test_anything_else_is_refused(document: object) -> None:
    """A document that is not a list of requests gets an error and nothing else."""
    try:
        assert decode_requests(document, []) == []
    except UsageError:
        return


@given(st.sampled_from(SAMPLES), st.integers(0, 12), JSONISH)
def test_a_field_of_another_type_is_refused_or_of_its_type(
    command: cmd.Command, at: int, value: object
) -> None:
    """One field replaced by anything: an error, or a command whose fields have the types they are declared with."""
    document, attachments = encode_requests([Request(command, "x", b"", 0)])
    fields = document[0][4]
    fields[at % len(fields)] = value
    try:
        (made,) = decode_requests(document, attachments)
    except UsageError:
        return
    for field in attrs.fields(type(made.command)):
        kind = type(getattr(made.command, field.name)).__name__
        assert kind in {
            "int",
            "bytes",
            "bool",
            "NoneType",
            "str",
            "list",
            "Kind",
            "ZoneKind",
            "NewKey",
            "tuple",
        }


@pytest.mark.parametrize("command", [cmd.Resize(A, 5), SAMPLES[7]])
def test_a_guard_goes_with_its_request(command: cmd.Command) -> None:
    """The condition arrives with the command; without one the row is as nodes that know none expect it."""
    guarded, plain = Request(command, "a", b"c", 1, cmd.Guard(b"counter", 7)), Request(command, "a", b"c", 1)
    document, attachments = encode_requests([guarded, plain])
    assert [len(row) for row in document] == [6, 5]
    found = decode_requests(msgpack.unpackb(msgpack.packb(document)), attachments)
    assert [each.guard for each in found] == [cmd.Guard(b"counter", 7), None]
    for wrong in (None, [], [b"c"], ["c", 1], [b"c", "1"], [b"c", True], [b"c", 1, 2]):
        with pytest.raises(UsageError):
            decode_requests([[*document[1], wrong]], attachments)

"""OPEN, LOCK and their like as a client sees them, over a store; requests and results by the judge's own codec."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import attrs
import pytest

from space._node.store import Store
from space.projections.nfs.compound import Stateid
from space.projections.nfs.nfs4 import Attr, Op
from space.projections.nfs.rpc import Credentials
from space.projections.nfs.sessions import Client
from space.projections.nfs.state import RECALL_RETRY_SECONDS
from tests import nfs_client as nfs
from tests.nfs_files_support import (
    OTHER,
    ROOT,
    USER,
    Request,
    World,
    open_store,
    served,
    string,
    u32,
    u64,
)

pytestmark = pytest.mark.unit
READ, WRITE, BOTH = 1, 2, 3
WANT_READ, WANT_WRITE, WANT_NONE = 0x100, 0x200, 0x400
END: Final = (1 << 64) - 1
CURRENT: Final = nfs.Stateid(1, bytes(12))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A new store."""
    with open_store(tmp_path / "data") as opened:
        yield opened


@pytest.fixture
def world(store: Store) -> World:
    """It, served without squash, to clients that can all be called back."""
    made = served(store)
    made.service.callbacks.reachable = lambda client: True  # type: ignore[method-assign]
    return made


@attrs.define
class Caller:
    """A client, and one user of it."""

    world: World
    client: Client
    who: Credentials = ROOT
    now: float = 1.0

    def request(self) -> Request:
        made = self.world.request(self.who)
        made.ctx.client, made.ctx.now = self.client, self.now
        return made

    def do(self, *operations: bytes) -> list[nfs.Result]:
        """A COMPOUND at the root, up to the first operation that fails."""
        request, results = self.request(), []
        for operation in operations:
            results.append(perform(request, operation))
            if results[-1].status != "OK":
                break
        return results

    def one(self, *operations: bytes) -> Any:
        """What the last operation of a COMPOUND gave; all must succeed."""
        results = self.do(*operations)
        assert results[-1].status == "OK", results
        return results[-1].value

    def fails(self, *operations: bytes) -> str:
        """The status a COMPOUND ends with."""
        return self.do(*operations)[-1].status

    def open(
        self, name: bytes = b"f", share: int = BOTH, deny: int = 0, *, owner: bytes = b"o"
    ) -> nfs.Opened:
        """Opens a file in the root, without a delegation unless one is wished for."""
        share |= 0 if share & 0xFF00 else WANT_NONE
        found = self.one(nfs.open_(0, owner, nfs.claim_null(name), share=share, deny=deny))
        assert isinstance(found, nfs.Opened)
        return found


def perform(request: Request, operation: bytes) -> nfs.Result:
    """Carries out an operation."""
    number = Op(int.from_bytes(operation[:4], "big"))
    status, result = request(number, operation[4:])
    take = nfs.Unpacker(u32(number) + u32(status) + bytes(result.rest()))
    found = nfs._result(take)
    assert not take.left
    return found


def caller(world: World, name: bytes = b"", who: Credentials = ROOT) -> Caller:
    """The first client, or one more."""
    if not name:
        return Caller(world, world.client, who)
    client = world.service.introduce(name, bytes(8), (1, 0), 0.0)
    world.service.confirm(client, 0.0)
    world.service.reclaimed(client)
    return Caller(world, client, who)


def make(world: World, name: bytes = b"f", mode: int = 0o644) -> None:
    """A new file of the superuser's, open nowhere."""
    first = caller(world)
    how = nfs.created(nfs.GUARDED, mode=mode)
    share = BOTH | WANT_NONE
    first.one(
        nfs.open_(0, b"maker", nfs.claim_null(name), share=share, how=how),
        nfs.close(nfs.Stateid(1, bytes(12))),
    )


def node(name: bytes = b"f") -> bytes:
    """Moves to a file."""
    return nfs.lookup(name)


# --- OPEN -------------------------------------------------------------------------------------------


def test_the_three_ways_to_create(world: World) -> None:
    """UNCHECKED takes what is there, GUARDED does not, EXCLUSIVE only what it made itself (RFC 8881 §18.16.3)."""
    one = caller(world)

    def attempt(how: bytes, name: bytes = b"f") -> str:
        return one.fails(nfs.open_(0, b"o", nfs.claim_null(name), how=how))

    assert attempt(nfs.created(nfs.GUARDED, mode=0o600)) == "OK"
    assert attempt(nfs.created(nfs.GUARDED, mode=0o600)) == "EXIST"
    assert attempt(nfs.created(nfs.UNCHECKED, mode=0o600)) == "OK"
    assert attempt(nfs.created(nfs.EXCLUSIVE_1, b"verifier"), b"g") == "OK"
    assert attempt(nfs.created(nfs.EXCLUSIVE_1, b"verifier"), b"g") == "OK"
    assert attempt(nfs.created(nfs.EXCLUSIVE_1, b"another!"), b"g") == "EXIST"
    assert attempt(u32(1) + u32(4), b"h") == "BADXDR"


def test_what_creating_says(world: World) -> None:
    """A new file has the attributes it was given, the directory has changed, and the new handle is the current one."""
    one = caller(world)
    root = world.exports.root
    before = root.export.files.attributes(root.id).change
    request = one.request()
    how = nfs.created(nfs.GUARDED, mode=0o640, size=10)
    made = perform(request, nfs.open_(0, b"o", nfs.claim_null(b"f"), how=how)).value
    after = root.export.files.attributes(root.id).change
    assert made.change == nfs.ChangeInfo(True, before, after)
    assert after > before
    assert set(made.attributes) == {Attr.MODE, Attr.SIZE}
    assert made.stateid.seqid == 1
    found = root.export.files.lookup(root.id, b"f")
    assert request.ctx.node().id == found.id
    assert (found.mode & 0o777, found.size) == (0o640, 10)
    assert root.export.files in request.ctx.unsynced


def test_unchecked_only_cuts_what_is_there(world: World) -> None:
    """Of the attributes of an UNCHECKED create an existing file takes a size of zero, and nothing else."""
    make(world, mode=0o644)
    one, root = caller(world), world.exports.root
    held = one.open()
    one.one(node(), nfs.write(held.stateid, 0, b"x" * 9, nfs.FILE_SYNC))

    def again(**values: Any) -> list[int]:
        made = one.one(nfs.open_(0, b"o", nfs.claim_null(b"f"), how=nfs.created(nfs.UNCHECKED, **values)))
        return list(made.attributes)

    assert again(mode=0o600, size=4) == []
    found = root.export.files.lookup(root.id, b"f")
    assert (found.mode & 0o777, found.size) == (0o644, 9)
    assert again(size=0) == [Attr.SIZE]
    assert root.export.files.lookup(root.id, b"f").size == 0


def test_only_files_are_opened(world: World) -> None:
    """A directory, a symbolic link and anything else are each told apart, and so is nothing (RFC 8881 §18.16.4)."""
    one = caller(world)
    one.one(nfs.create(2, b"d", mode=0o755))
    one.one(nfs.create(nfs.LNK, b"l", target=b"f", mode=0o777))
    one.one(nfs.create(7, b"p", mode=0o600))
    make(world)
    expected = {b"d": "ISDIR", b"l": "SYMLINK", b"p": "WRONG_TYPE", b"x": "NOENT", b"f": "OK"}
    for name, status in expected.items():
        assert one.fails(nfs.open_(0, b"o", nfs.claim_null(name))) == status
    assert one.fails(node(), nfs.open_(0, b"o", nfs.claim_null(b"x"))) == "NOTDIR"


@pytest.mark.parametrize(
    "share, deny, status",
    [
        (0, 0, "INVAL"),
        (4, 0, "INVAL"),
        (1, 4, "INVAL"),
        (0x601, 0, "INVAL"),
        (0x30501, 0, "OK"),
        (0x80000001, 0, "INVAL"),
    ],
)
def test_shares_there_cannot_be(world: World, share: int, deny: int, status: str) -> None:
    """An open for nothing, a denial of something else, and wishes there are none of are refused."""
    make(world)
    assert caller(world).fails(nfs.open_(0, b"o", nfs.claim_null(b"f"), share=share, deny=deny)) == status


def test_permission_is_asked_at_open(world: World) -> None:
    """Others need the mode's leave, the maker of a read-only file writes it, and what executes is read to do so."""
    for name, mode in ((b"private", 0o600), (b"program", 0o711), (b"public", 0o644)):
        make(world, name, mode)
    user = caller(world, who=USER)

    def attempt(name: bytes, share: int) -> str:
        return user.fails(nfs.open_(0, b"u", nfs.claim_null(name), share=share))

    assert attempt(b"private", READ) == "ACCESS"
    assert attempt(b"program", READ) == "OK"
    assert attempt(b"program", BOTH) == "ACCESS"
    assert attempt(b"public", READ) == "OK"
    assert attempt(b"public", WRITE) == "ACCESS"
    how = nfs.created(nfs.UNCHECKED, size=0)
    assert user.fails(nfs.open_(0, b"u", nfs.claim_null(b"public"), share=READ, how=how)) == "ACCESS"
    world.exports.root.export.read_only = True
    assert caller(world).fails(nfs.open_(0, b"o", nfs.claim_null(b"public"), share=WRITE)) == "ROFS"
    assert caller(world).fails(nfs.open_(0, b"o", nfs.claim_null(b"public"), share=READ)) == "OK"


def test_who_makes_a_file_may_write_it_whatever_its_mode(world: World) -> None:
    """Permission for a new file comes from its directory."""
    one = caller(world)
    one.one(nfs.create(2, b"d", mode=0o777))
    user = caller(world, who=OTHER)
    how = nfs.created(nfs.GUARDED, mode=0o400)
    made = user.one(nfs.lookup(b"d"), nfs.open_(0, b"u", nfs.claim_null(b"f"), how=how))
    user.one(nfs.lookup(b"d"), node(), nfs.write(made.stateid, 0, b"x", nfs.FILE_SYNC))


def test_opening_by_handle(world: World) -> None:
    """CLAIM_FH opens the current file itself, and cannot create (RFC 8881 §18.16.3)."""
    make(world)
    one = caller(world)
    opened = one.one(node(), nfs.open_(0, b"o", nfs.claim_fh()))
    assert opened.stateid.seqid == 1
    assert one.fails(node(), nfs.open_(0, b"o", nfs.claim_fh(), how=nfs.created(nfs.GUARDED))) == "INVAL"
    for claim in (u32(3) + string(b"f"), u32(6)):
        assert one.fails(nfs.open_(0, b"o", claim)) == "NOTSUPP"
    assert one.fails(nfs.open_(0, b"o", u32(7))) == "BADXDR"


def test_share_denied_leaves_the_file_as_it_is(world: World) -> None:
    """An open that is refused does not cut the file first."""
    make(world)
    one, two = caller(world), caller(world, b"two")
    held = one.open(deny=WRITE)
    one.one(node(), nfs.write(held.stateid, 0, b"xyz", nfs.FILE_SYNC))
    how = nfs.created(nfs.UNCHECKED, size=0)
    assert two.fails(nfs.open_(0, b"o", nfs.claim_null(b"f"), how=how)) == "SHARE_DENIED"
    root = world.exports.root
    assert root.export.files.lookup(root.id, b"f").size == 3


def test_downgrade_and_close(world: World) -> None:
    """A downgrade goes to what was opened; after CLOSE the stateid names nothing (RFC 8881 §18.2, §18.18)."""
    make(world)
    one, two = caller(world), caller(world, b"two")
    one.open(share=READ)
    held = one.open(share=BOTH, deny=WRITE)
    assert one.fails(node(), nfs.open_downgrade(held.stateid, WRITE)) == "INVAL"
    assert two.fails(nfs.open_(0, b"o", nfs.claim_null(b"f"), share=WRITE)) == "SHARE_DENIED"
    less = one.one(node(), nfs.open_downgrade(held.stateid, READ))
    assert less.seqid == 3
    two.open(share=WRITE)
    assert one.fails(node(), nfs.close(held.stateid)) == "OLD_STATEID"
    assert one.fails(nfs.close(less)) == "BAD_STATEID"
    assert one.one(node(), nfs.close(less)) == nfs.Stateid(0xFFFFFFFF, bytes(12))
    assert one.fails(node(), nfs.close(less)) == "BAD_STATEID"


# --- locks ------------------------------------------------------------------------------------------


def test_locks_and_who_is_in_the_way(world: World) -> None:
    """A lock is had through an open, its stateid counts, and who is refused learns of the other (RFC 8881 §18.10)."""
    make(world)
    one, two = caller(world), caller(world, b"two")
    mine, other = one.open(), two.open()
    held = one.one(node(), nfs.lock_first(2, 10, 10, mine.stateid, 0, b"l"))
    assert held.seqid == 1
    refused = two.do(node(), nfs.lock_first(1, 15, 1, other.stateid, 0, b"m"))[-1]
    assert refused.status == "DENIED"
    assert (refused.value.offset, refused.value.length, refused.value.kind) == (10, 10, 2)
    assert (refused.value.client, refused.value.owner) == (one.client.id, b"l")
    assert two.fails(node(), nfs.lockt(1, 0, END, 0, b"m")) == "DENIED"
    assert one.fails(node(), nfs.lockt(2, 0, END, 0, b"l")) == "OK"
    more = one.one(node(), nfs.lock_more(2, 20, END, held))
    assert more.seqid == 2
    assert one.fails(node(), nfs.lock_more(2, 0, 1, held)) == "OLD_STATEID"
    less = one.one(node(), nfs.locku(2, 0, 30, more))
    assert two.fails(node(), nfs.lock_first(1, 15, 15, other.stateid, 0, b"m")) == "OK"
    refused = two.do(node(), nfs.lock_first(1, 15, END, other.stateid, 0, b"m"))[-1]
    assert (refused.value.offset, refused.value.length) == (30, END)
    assert one.fails(node(), nfs.free_stateid(less)) == "LOCKS_HELD"
    one.one(node(), nfs.locku(2, 0, END, less))
    assert one.fails(nfs.free_stateid(nfs.Stateid(0, less.other))) == "OK"
    assert one.one(nfs.test_stateid(mine.stateid, less)) == [0, 10025]


@pytest.mark.parametrize(
    "kind, offset, length, status",
    [
        (2, 0, 0, "INVAL"),
        (2, END, 2, "INVAL"),
        (2, 1, END - 1, "OK"),
        (2, END, END, "OK"),
        (2, END, 1, "OK"),
        (5, 0, 1, "BADXDR"),
        (0, 0, 1, "BADXDR"),
    ],
)
def test_ranges_there_cannot_be(world: World, kind: int, offset: int, length: int, status: str) -> None:
    """A lock of nothing or beyond 2**64 is refused; all ones reaches to the end (RFC 8881 §18.10.3)."""
    make(world)
    one = caller(world)
    mine = one.open()
    assert one.fails(node(), nfs.lock_first(kind, offset, length, mine.stateid, 0, b"l")) == status


def test_a_lock_needs_an_open_for_it(world: World) -> None:
    """Who opened a file to read cannot lock it for writing, nor the other way round."""
    make(world)
    one = caller(world)
    reads, writes = one.open(share=READ), one.open(share=WRITE, owner=b"w")
    assert one.fails(node(), nfs.lock_first(2, 0, 1, reads.stateid, 0, b"l")) == "OPENMODE"
    assert one.fails(node(), nfs.lock_first(1, 0, 1, writes.stateid, 0, b"l")) == "OPENMODE"
    assert one.fails(node(), nfs.lock_first(4, 0, 1, writes.stateid, 0, b"l")) == "OK"


# --- grace ------------------------------------------------------------------------------------------


def test_claims_after_a_restart(world: World) -> None:
    """In the grace period those who held state get it back, and nobody gets anything new (RFC 8881 §8.4.2.1)."""
    make(world)
    one, two = caller(world), caller(world, b"two")
    world.service.grace_end = 100.0
    for each, may in ((one, True), (two, False)):
        each.client.reclaim_complete, each.client.may_reclaim = False, may
    claim = nfs.open_(0, b"o", nfs.claim_previous())
    assert two.fails(node(), claim) == "RECLAIM_BAD"
    opened = one.one(node(), claim)
    assert one.fails(node(), nfs.lock_first(2, 0, 9, opened.stateid, 0, b"l")) == "GRACE"
    assert one.fails(node(), nfs.lock_first(2, 0, 9, opened.stateid, 0, b"l", reclaim=True)) == "OK"
    assert one.fails(nfs.open_(0, b"o", nfs.claim_null(b"f"))) == "GRACE"
    two.client.may_reclaim = True
    denied = nfs.open_(0, b"o", nfs.claim_previous(), deny=WRITE)
    assert two.fails(node(), denied) == "RECLAIM_CONFLICT"
    also = two.one(node(), claim)
    lock = nfs.lock_first(1, 0, 1, also.stateid, 0, b"m", reclaim=True)
    assert two.fails(node(), lock) == "RECLAIM_CONFLICT"
    one.client.reclaim_complete = True
    assert one.fails(node(), claim) == "NO_GRACE"
    world.service.grace_end = 0.0
    assert two.fails(node(), claim) == "NO_GRACE"
    assert two.fails(nfs.open_(0, b"o", nfs.claim_null(b"f"))) == "GRACE"
    assert one.fails(nfs.open_(0, b"o", nfs.claim_null(b"f"))) == "OK"


def test_the_grace_period_goes_on_while_claims_come(world: World) -> None:
    """A client with many files is not cut off in the middle; but the period at most doubles."""
    names = [b"f%d" % number for number in range(30)]
    for name in names:
        make(world, name)
    one = caller(world)
    one.client.reclaim_complete, one.client.may_reclaim = False, True
    service = world.service
    service.grace_end, service._grace_limit = 10.0, 20.0
    claimed = []
    for number, name in enumerate(names):
        one.now = 1.0 + number
        claimed.append(one.fails(nfs.lookup(name), nfs.open_(0, b"o", nfs.claim_previous())))
    assert claimed == ["OK"] * 19 + ["NO_GRACE"] * 11


def test_delegations_are_claimed_with_an_open(world: World) -> None:
    """CLAIM_PREVIOUS says which delegation was held, and gets it back unless somebody else is in the way."""
    make(world)
    one, two = caller(world), caller(world, b"two")
    world.service.grace_end = 100.0
    for each in (one, two):
        each.client.reclaim_complete, each.client.may_reclaim = False, True
    first = one.one(node(), nfs.open_(0, b"o", nfs.claim_previous(1), share=READ))
    assert first.delegation.kind == 1
    assert first.delegation.recalled
    refused = nfs.open_(0, b"o", nfs.claim_previous(2))
    assert two.fails(node(), refused) == "RECLAIM_CONFLICT"
    assert not world.service.state.has_state(two.client)
    second = two.one(node(), nfs.open_(0, b"o", nfs.claim_previous(1), share=READ))
    assert second.delegation.kind == 1


def test_a_claimed_delegation_is_wanted_back(world: World) -> None:
    """Nobody told its holder what was changed without a server: it is asked, too, and loses it after a lease."""
    make(world)
    one = caller(world)
    asked: list[bytes] = []

    def recall(client: Client, stateid: Stateid, handle: bytes, *, truncate: bool, now: float) -> None:
        asked.append(stateid.other)

    world.service.callbacks.recall = recall  # type: ignore[method-assign]
    world.service.grace_end = 100.0
    one.client.reclaim_complete, one.client.may_reclaim = False, True
    stateid = one.one(node(), nfs.open_(0, b"o", nfs.claim_previous(1), share=READ)).delegation.stateid
    world.service.state.tick(1.5)
    assert asked == []
    world.service.state.tick(1.0 + RECALL_RETRY_SECONDS)
    assert asked == [stateid.other]
    one.client.expiry = 1000.0
    world.service.state.tick(1.0 + world.service.config.lease_seconds)
    assert one.fails(node(), nfs.delegreturn(stateid)) == "DELEG_REVOKED"


# --- delegations ------------------------------------------------------------------------------------


def test_delegations_are_given_used_and_returned(world: World) -> None:
    """A wish is granted; opens claimed under the delegation pass while it is recalled; others wait (§10.4)."""
    make(world)
    one, two = caller(world), caller(world, b"two")
    given = one.open(share=READ | WANT_READ).delegation
    assert given.kind == 1
    assert one.open(share=READ | WANT_NONE, owner=b"n").delegation == nfs.Delegation(3, None, 0)
    assert two.fails(nfs.open_(0, b"o", nfs.claim_null(b"f"), share=WRITE)) == "DELAY"
    stateid = given.stateid
    assert stateid is not None
    current = u32(2) + stateid.xdr() + string(b"f")
    assert one.fails(nfs.open_(0, b"p", current, share=READ)) == "OK"
    assert one.fails(node(), nfs.open_(0, b"p", u32(5) + stateid.xdr(), share=READ)) == "OK"
    assert one.fails(node(), nfs.open_(0, b"p", u32(5) + stateid.xdr(), share=BOTH)) == "OPENMODE"
    assert two.fails(node(), nfs.open_(0, b"p", u32(5) + stateid.xdr(), share=READ)) == "BAD_STATEID"
    assert one.fails(node(), nfs.delegreturn(stateid)) == "OK"
    assert one.fails(node(), nfs.delegreturn(stateid)) == "BAD_STATEID"
    assert two.open(share=WRITE).stateid.seqid == 1


def test_no_change_passes_a_delegation(world: World) -> None:
    """Every operation that changes a file or one of its names asks its delegations back first (RFC 8881 §10.4.2)."""
    make(world)
    make(world, b"g")
    one, two = caller(world), caller(world, b"two")
    one.open(share=READ | WANT_READ)
    user_xattr = string(b"name") + string(b"value")
    attempts = {
        "setattr": [node(), nfs.setattr_(mode=0o600)],
        "write": [node(), nfs.write(nfs.ANONYMOUS, 0, b"x")],
        "remove": [nfs.remove(b"f")],
        "rename": [nfs.savefh(), nfs.rename(b"f", b"h")],
        "replace": [nfs.savefh(), nfs.rename(b"g", b"f")],
        "link": [node(), nfs.savefh(), nfs.op("putrootfh"), nfs.link(b"h")],
        "xattr": [node(), nfs.op("setxattr", u32(0), user_xattr)],
        "open": [nfs.open_(0, b"o", nfs.claim_null(b"f"), share=WRITE)],
        "allocate": [node(), nfs.op("allocate", nfs.ANONYMOUS.xdr(), u64(0), u64(1))],
    }
    for name, operations in attempts.items():
        assert two.fails(*operations) == "DELAY", name
    assert two.fails(node(), nfs.getattr_("size")) == "OK"
    assert one.fails(node(), nfs.setattr_(mode=0o600)) == "OK"


def test_attributes_of_a_file_another_client_writes(world: World) -> None:
    """GETATTR asks the holder of a write delegation; READDIR says that the entry's attributes come later."""
    make(world)
    one, two = caller(world), caller(world, b"two")
    assert one.open(share=BOTH | WANT_WRITE).delegation.kind == 2
    questions: list[Any] = []

    def getattr_(client: Client, handle: bytes, told: Any, *, now: float) -> None:
        questions.append(client)
        told((1 << 60, 5))

    world.service.callbacks.getattr = getattr_  # type: ignore[method-assign]
    root = world.exports.root
    change = root.export.files.lookup(root.id, b"f").change
    assert two.one(node(), nfs.getattr_("size", "change")) == {"size": 5, "change": change + 1}
    assert two.one(node(), nfs.getattr_("mode"))["mode"] & 0o777 == 0o644
    assert one.one(node(), nfs.getattr_("size"))["size"] == 0
    assert questions == [one.client]
    listing = two.one(nfs.readdir(0, bytes(8), "rdattr_error", "size"))
    assert [entry.attributes for entry in listing.entries] == [{"rdattr_error": 10008}]
    assert two.fails(node(), nfs.lockt(1, 0, 1, 0, b"l")) == "DELAY"


def test_wanting_a_delegation_later(world: World) -> None:
    """WANT_DELEGATION gives one for a file that is open already, or says why not (RFC 8881 §18.49)."""
    make(world)
    one, two = caller(world), caller(world, b"two")
    one.open(share=READ | WANT_NONE)

    def want(who: Caller, wish: int, claim: bytes = u32(4)) -> tuple[str, int, int]:
        request = who.request()
        perform(request, node())
        status, result = request(Op.WANT_DELEGATION, u32(wish) + claim)
        if status:
            return nfs.status_name(status), 0, 0
        kind = result.u32()
        return "OK", kind, result.u32() if kind == 3 else 0

    assert want(one, WANT_READ) == ("OK", 1, 0)
    assert want(two, WANT_WRITE) == ("OK", 3, 1)
    assert want(one, 0x700)[0] == "INVAL"
    assert want(one, WANT_READ, u32(1) + u32(1))[0] == "NO_GRACE"
    assert want(one, WANT_READ, u32(6))[0] == "NOTSUPP"
    assert want(one, WANT_READ, u32(0))[0] == "BADXDR"
    assert one.request()(Op.WANT_DELEGATION, u32(WANT_READ) + u32(4))[0] == 21


def test_a_stateid_that_an_operation_before_gave(world: World) -> None:
    """The current stateid is the one of OPEN, LOCK and their like, until another file is current (§16.2.3.1.2)."""
    one, current = caller(world), CURRENT
    how = nfs.created(nfs.GUARDED, mode=0o600)
    create = nfs.open_(0, b"o", nfs.claim_null(b"f"), how=how)
    assert (
        one.fails(create, nfs.write(current, 0, b"x", nfs.FILE_SYNC), nfs.free_stateid(current))
        == "LOCKS_HELD"
    )
    again = nfs.open_(0, b"o", nfs.claim_null(b"f"))
    assert one.fails(again, nfs.op("putrootfh"), nfs.close(current)) == "BAD_STATEID"
    assert one.fails(again, nfs.savefh(), nfs.op("putrootfh"), nfs.restorefh(), nfs.close(current)) == "OK"
    assert one.fails(node(), nfs.close(current)) == "BAD_STATEID"


def test_what_there_is_not(world: World) -> None:
    """Layouts and delegations of directories are refused as features that are not there (RFC 8881 §17)."""
    request = caller(world).request()
    for op in (Op.LAYOUTGET, Op.GETDEVICEINFO, Op.GET_DIR_DELEGATION, Op.DELEGPURGE, Op.LAYOUTSTATS):
        assert request.fails(op) == "NOTSUPP", op.name

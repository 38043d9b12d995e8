"""Any bytes, any damage to real requests and any COMPOUND over real sockets, judged by a decoder of its own.

Whatever comes, the server answers with what RFC 8881 allows or ends that connection: it logs no error of its own,
answers nothing that cannot be decoded, and what the caller may not touch stays as it was.
"""

from __future__ import annotations

import itertools
import select
import struct
from collections.abc import Iterator
from typing import Any, Final, cast

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from tests import nfs_client as nfs
from tests.nfs_client import Client, Stateid, opaque, u32, u64
from tests.nfs_support import Threaded

UID: Final = 1000
EDGES: Final = (0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
EDGES_64: Final = (0, 1, 4096, 1 << 20, 1 << 40, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1)
QUIET_SECONDS: Final = 0.2
"""After which a server that says nothing waits for the rest of a record; nothing depends on it."""
UNANSWERABLE: Final = {"SERVERFAULT"}


class Target:
    """A served store: what the fuzzer works with, and what it must not change.

    Attributes:
        client: the fuzzer's, who is not root.
        handles: it may name these.
        stateids: some of them its own.
    """

    def __init__(self, served: Threaded) -> None:
        self.served = served
        self.root = Client(served.address, minor=2)
        self.root.mkdir("open", 0o777)
        self.root.mkdir("closed", 0o700)
        self.secret = self.root.create("closed/secret", mode=0o600)
        self.secret.write(0, b"secret" * 1000)
        self.credential = nfs.auth_sys(UID, UID)
        self.anew()
        home = self.client.handle("open")
        self.handles = [home, self.file.handle, self.secret.handle, self.client.handle(""), b"", bytes(128)]
        self.state = self.witness()

    def anew(self) -> None:
        """A new client with an open file and a lock, for one that was fuzzed to death."""
        self.client = Client(self.served.address, minor=2, credential=self.credential)
        self.file = self.client.open("open/file", how=nfs.created(nfs.UNCHECKED, mode=0o666))
        self.lock = self.file.lock(nfs.WRITE_LOCK, 0, 10)
        self.stateids = [
            self.file.stateid, self.lock, self.secret.stateid, nfs.ANONYMOUS, nfs.CURRENT, nfs.BYPASS,
            Stateid(0, self.file.stateid.other), Stateid(7, self.lock.other), Stateid(0xFFFFFFFF, bytes(12)),
        ]  # fmt: skip

    def witness(self) -> dict[str, Any]:
        """What must not change."""
        found: dict[str, Any] = self.secret.do(
            nfs.getattr_("change", "size", "mode", "owner", "ctime", "nlink")
        )
        return {**found, "data": self.secret.read(0, 10_000)}

    def check(self) -> None:
        """The server is whole: it serves another client, kept what it had to keep, and found no fault of its own."""
        assert self.witness() == self.state
        assert self.served.errors == []

    def judge(self, message: bytes) -> None:
        """An answer to a call is one that RFC 5531 and RFC 8881 know."""
        take = nfs.Unpacker(message)
        take.u32()
        assert take.u32() == 1, "a call to somebody without a back channel"
        if take.u32():
            event("denied")
            return
        take.fixed(8)
        accepted = take.u32()
        assert accepted <= 4, "a system error"
        if accepted:
            event("not accepted")
            return
        if take.left:
            answer = nfs.take_answer(message[take.at :])
            assert answer.status not in UNANSWERABLE, answer
            event(f"{answer.results[-1].name if answer.results else 'nothing'}: {answer.status}")

    def close(self) -> None:
        self.client.close()
        self.root.close()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """A store that is served as long as the module's tests run."""
    served = Threaded(tmp_path_factory.mktemp("nfs") / "data")
    try:
        found = Target(served)
        yield found
        found.close()
    finally:
        served.close()


def send(target: Target, stream: bytes) -> None:
    """Sends bytes and a NULL call, and judges what comes back: until that is answered, or nothing more comes."""
    rpc = nfs.Rpc(target.served.address, target.credential)
    try:
        rpc.socket.sendall(stream + nfs.record(nfs.call(1, 0, b"", None)))
        while select.select([rpc.socket], [], [], QUIET_SECONDS)[0]:
            message = rpc.receive()
            target.judge(message)
            if message[:4] == u32(1):
                break
    except (nfs.RpcError, OSError):
        event("the connection was ended")
    finally:
        rpc.close()
    target.check()


# --- streams


def messages(target: Target) -> list[bytes]:
    """Calls as they are on the wire, one of each kind."""
    session = target.client.session.id
    sequence = nfs.op("sequence", session, u32(1, 0, 0, 0))
    bodies = [
        nfs.compound_body([nfs.op("exchange_id", bytes(8) + opaque(b"owner") + u32(0, 0, 0))], 1),
        nfs.compound_body([sequence, nfs.putrootfh(), nfs.getattr_("type", "size")], 1),
        nfs.compound_body(
            [sequence, nfs.putfh(target.handles[1]), nfs.write(nfs.ANONYMOUS, 0, b"x" * 100)], 2
        ),
        nfs.compound_body([nfs.op("bind_conn_to_session", session, u32(3, 0))], 1),
        nfs.compound_body(
            [nfs.op("create_session", u64(1) + u32(1, 0) + nfs.Channel().xdr() * 2 + u32(1, 0))], 1
        ),
    ]
    return [nfs.call(7, 1, body, target.credential) for body in bodies]


@given(st.binary(max_size=4096), st.booleans())
def test_any_bytes(target: Target, data: bytes, framed: bool) -> None:
    """Bytes that are nothing end their connection or are refused, in a record and without one."""
    send(target, nfs.record(data) if framed else data)


@given(st.data(), st.integers(0, 4))
def test_damaged_calls(target: Target, data: st.DataObject, which: int) -> None:
    """A call with bytes changed, taken out or put in gets an answer that can be decoded, or none."""
    send(target, nfs.record(damaged(data, messages(target)[which])))


@given(st.data(), st.integers(0, 4), st.lists(st.integers(0, 300), max_size=12))
def test_any_fragments(target: Target, data: st.DataObject, which: int, cuts: list[int]) -> None:
    """A call in any fragments, also empty ones and with damaged marks, is one call or the end of the connection."""
    message = messages(target)[which]
    edges = sorted({0, len(message), *(min(cut, len(message)) for cut in cuts)})
    marks = [end - start | (end == len(message)) << 31 for start, end in itertools.pairwise(edges)]
    if data.draw(st.booleans()):
        marks[data.draw(st.integers(0, len(marks) - 1))] = data.draw(
            st.sampled_from([0, 1 << 31, 2**32 - 1, 2**31 - 1])
        )
    pieces = (message[start:end] for start, end in itertools.pairwise(edges))
    send(target, b"".join(u32(mark) + piece for mark, piece in zip(marks, pieces, strict=True)))


def damaged(data: st.DataObject, message: bytes) -> bytes:
    """A message with a few changes, mostly of whole words, as what means something is made of them."""
    found = bytearray(message)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, max(0, len(found) // 4 - 1))) * 4
        how = data.draw(st.sampled_from(["word", "word", "byte", "cut", "insert", "end"]))
        if how == "word":
            found[at : at + 4] = struct.pack(
                ">I", data.draw(st.sampled_from(EDGES) | st.integers(0, 2**32 - 1))
            )
        elif how == "byte" and found:
            found[min(at, len(found) - 1)] ^= 1 << data.draw(st.integers(0, 7))
        elif how == "cut":
            del found[at : at + 4 * data.draw(st.integers(1, 8))]
        elif how == "insert":
            found[at:at] = data.draw(st.binary(min_size=1, max_size=32))
        else:
            del found[at:]
    return bytes(found)


# --- COMPOUNDs in a session

NAMES: Final = st.sampled_from(
    [b"file", b"other", b"..", b".", b"", b"a/b", b"\xff\xfe", b"\0", b"x" * 255, b"x" * 256, b"dir"]
)
OFFSETS: Final = st.sampled_from(EDGES_64) | st.integers(0, 2**64 - 1)
COUNTS: Final = st.sampled_from((0, 1, 4096, 1 << 20, 1 << 24, *EDGES)) | st.integers(0, 2**32 - 1)
DATA: Final = st.binary(max_size=100)
BITMAPS: Final = st.lists(st.integers(0, 95), max_size=20).map(nfs.bitmap)
KINDS: Final = st.integers(0, 9)


def settable() -> st.SearchStrategy[bytes]:
    """A fattr4: one that makes sense, or any."""
    sensible = st.fixed_dictionaries(
        {},
        optional={
            "mode": st.integers(0, 0o7777),
            "size": st.sampled_from([0, 1, 100_000, 2**63 - 1, 2**64 - 1]),
            "owner": st.sampled_from(["0", "1000", "nobody", "", "-1", "root@x", "4294967296"]),
            "mtime": st.sampled_from([-1, 0, 10**9 - 1, 2**63 - 1]),
        },
    ).map(lambda values: nfs.settable(**cast("dict[str, Any]", values)))
    return sensible | st.tuples(BITMAPS, st.binary(max_size=40)).map(lambda two: two[0] + opaque(two[1]))


@st.composite
def operations(draw: st.DrawFn, target: Target) -> bytes:
    """One operation with arguments of the right shape and of any sense."""
    stateid = draw(st.sampled_from(target.stateids)).xdr()
    other = draw(st.sampled_from(target.stateids)).xdr()
    client = target.client.identity.client
    name, offset, length, count = draw(NAMES), draw(OFFSETS), draw(OFFSETS), draw(COUNTS)
    owner = u64(draw(st.sampled_from([client, 0, client + 1]))) + opaque(
        draw(st.sampled_from([b"owner", b"", b"x" * 1024]))
    )
    bitmap = draw(BITMAPS)
    kind = draw(KINDS)
    arguments = {
        "access": u32(count), "close": u32(0) + stateid, "commit": u64(offset) + u32(count),
        "create": u32(kind) + (opaque(name) if kind == 5 else u32(1, 2) if kind in {3, 4} else b"") + opaque(name),
        "delegreturn": stateid, "getattr": bitmap, "getfh": b"", "link": opaque(name),
        "lock": u32(kind, 0) + u64(offset, length) + u32(1, 0) + stateid + u32(0) + owner,
        "lockt": u32(kind) + u64(offset, length) + owner, "locku": u32(kind, 0) + stateid + u64(offset, length),
        "lookup": opaque(name), "lookupp": b"", "open_downgrade": stateid + u32(0, kind, count & 3),
        "putfh": opaque(draw(st.sampled_from(target.handles) | st.binary(max_size=130))), "putrootfh": b"",
        "putpubfh": b"", "read": stateid + u64(offset) + u32(count),
        "readdir": u64(offset) + bytes(8) + u32(count, draw(COUNTS)) + bitmap, "readlink": b"",
        "remove": opaque(name), "rename": opaque(name) + opaque(draw(NAMES)), "restorefh": b"", "savefh": b"",
        "secinfo": opaque(name), "secinfo_no_name": u32(kind), "free_stateid": stateid,
        "test_stateid": u32(2) + stateid + other, "write": stateid + u64(offset) + u32(kind) + opaque(draw(DATA)),
        "allocate": stateid + u64(offset, length), "deallocate": stateid + u64(offset, length),
        "seek": stateid + u64(offset) + u32(kind), "read_plus": stateid + u64(offset) + u32(count),
        "copy": stateid + other + u64(offset, length, draw(OFFSETS)) + u32(1, kind & 1, 0),
        "clone": stateid + other + u64(offset, length, draw(OFFSETS)), "offload_status": stateid,
        "offload_cancel": stateid, "io_advise": stateid + u64(offset, length) + bitmap,
        "getxattr": opaque(name), "setxattr": u32(kind) + opaque(name) + opaque(draw(DATA)),
        "listxattrs": u64(offset) + u32(count), "removexattr": opaque(name),
    }  # fmt: skip
    chosen = draw(st.sampled_from([*arguments, "setattr", "verify", "nverify", "open", "number"]))
    if chosen == "number":
        return u32(
            draw(st.integers(0, 80) | st.sampled_from(EDGES)), *draw(st.lists(st.integers(0, 99), max_size=8))
        )
    if chosen == "open":
        how = draw(
            st.sampled_from([u32(0), u32(1, 0), u32(1, 1), u32(1, 2) + bytes(8), u32(1, 3) + bytes(8)])
        )
        body = draw(settable()) if how[:4] == u32(1) and how[4:8] != u32(2) else b""
        claim = draw(st.sampled_from([u32(0) + opaque(name), u32(1, 0), u32(2) + stateid + opaque(name), u32(4),
                                      u32(5) + stateid, u32(3) + opaque(name), u32(6)]))  # fmt: skip
        share = draw(st.sampled_from([0, 1, 2, 3, 4, 0x103, 0x203, 0x403, 0xFFFFFFFF]))
        return nfs.op("open", u32(0, share, count & 3) + owner + how + body + claim)
    if chosen in {"setattr", "verify", "nverify"}:
        return nfs.op(chosen, stateid if chosen == "setattr" else b"", draw(settable()))
    return nfs.op(chosen, arguments[chosen], draw(settable()) if chosen == "create" else b"")


DEAD: Final = {"BADSESSION", "DEADSESSION", "STALE_CLIENTID"}


def carry_out(target: Target, body: list[bytes], damage: st.DataObject | None = None) -> None:
    """Sends a COMPOUND in the fuzzer's session and judges its answer."""
    client = target.client
    rest = b"".join(body)
    message = (
        opaque(b"") + u32(2, len(body) + 1) + client.sequence() + (damaged(damage, rest) if damage else rest)
    )
    try:
        client.rpc.submit(1, message)
        answer = client.rpc.receive()
    except (nfs.RpcError, OSError) as error:
        pytest.fail(f"the connection was ended: {error}")
    target.judge(answer)
    results = nfs.take_answer(answer[24:]).results if answer[20:24] == u32(0) else []
    if results and results[0].status in DEAD:
        client.vanish()
        target.anew()
    elif not results or results[0].status != "OK":  # the slot does not count what SEQUENCE has not seen
        client.sequences[0] -= 1
    target.check()


@given(st.data())
def test_any_compound(target: Target, data: st.DataObject) -> None:
    """Operations in any order with any arguments have results that decode, and none is a fault of the server's."""
    body = data.draw(st.lists(operations(target), min_size=1, max_size=6))
    carry_out(target, [nfs.putfh(data.draw(st.sampled_from(target.handles[:4]))), *body])


@given(st.data())
def test_damaged_compounds(target: Target, data: st.DataObject) -> None:
    """The same where bytes of the operations are damaged."""
    body = data.draw(st.lists(operations(target), min_size=1, max_size=3))
    carry_out(target, [nfs.putfh(target.handles[0]), *body], data)

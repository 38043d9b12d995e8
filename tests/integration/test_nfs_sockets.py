"""``space project --view nfs`` over TCP, judged by a client that shares nothing with it (tests/nfs_client.py)."""

from __future__ import annotations

import importlib
import os
import threading
from pathlib import Path
from typing import Final

import pytest

import space
from tests import nfs_client as nfs
from tests.nfs_client import Client, File, NfsError
from tests.nfs_support import LEASE_SECONDS, Serve

MIB: Final = 1 << 20


def status(client: Client, *operations: bytes) -> str:
    """How a COMPOUND ends."""
    return client.attempt(*operations).status


# --- sessions


def test_minor_versions(serve: Serve) -> None:
    """Minor versions 1 and 2 are served, and any other is refused as RFC 8881 §16.2.3 says."""
    view = serve()
    for minor in (1, 2):
        with Client(view.address, minor=minor) as client:
            assert client.stat("")["type"] == nfs.DIR
            for other in (0, 3):
                client.minor = other
                answer = client.bare(nfs.putrootfh())
                assert (answer.status, answer.results) == ("MINOR_VERS_MISMATCH", [])
                client.minor = minor


def test_a_request_sent_twice_is_carried_out_once(serve: Serve) -> None:
    """A request that is repeated, also on another connection, gets the answer it had, byte by byte."""
    view = serve()
    with Client(view.address) as client:
        operations = [nfs.putrootfh(), nfs.create(nfs.DIR, b"d", mode=0o755), nfs.getfh()]
        body = nfs.compound_body((client.sequence(cache=True), *operations), 1)
        first = client.rpc.call(1, body)
        assert nfs.take_answer(first).status == "OK"
        assert client.rpc.call(1, body) == first
        client.reconnect()
        assert client.rpc.call(1, body) == first
        assert status(client, *operations) == "EXIST"


def test_slots_are_strict(serve: Serve) -> None:
    """Sequence ids, slots and sessions that cannot be are refused, and the session goes on."""
    view = serve()
    with Client(view.address) as client:
        client.compound(nfs.putrootfh())

        def sequence(session: bytes, number: int, slot: int) -> str:
            return client.bare(
                nfs.op("sequence", session, nfs.u32(number, slot, 0, 0)), nfs.putrootfh()
            ).status

        at = client.sequences[0]
        for session, number, slot, wanted in (
            (client.session.id, at + 2, 0, "SEQ_MISORDERED"),
            (client.session.id, at - 1, 0, "SEQ_MISORDERED"),
            (client.session.id, 1, client.session.fore.requests, "BADSLOT"),
            (bytes(16), 1, 0, "BADSESSION"),
        ):
            assert sequence(session, number, slot) == wanted
        assert client.attempt(nfs.putrootfh(), client.sequence(advance=False)).status == "SEQUENCE_POS"
        assert client.bare(nfs.putrootfh()).status == "OP_NOT_IN_SESSION"
        assert status(client, *[nfs.putrootfh()] * client.session.fore.operations) == "TOO_MANY_OPS"
        assert status(client, nfs.u32(99999)) == "OP_ILLEGAL"
        assert status(client, nfs.putrootfh(), nfs.u32(46, 0, 0, 0, 0, 0, 0, 0, 0)) != "OP_ILLEGAL"
        assert status(client, nfs.putrootfh()) == "OK"


def test_a_client_that_starts_anew_loses_what_it_had(serve: Serve) -> None:
    """A new verifier of the same owner means that the client was rebooted: its old opens are in nobody's way."""
    view = serve()
    first = Client(view.address, owner=b"rebooted")
    first.create("f", deny=nfs.BOTH)
    with Client(view.address) as other:
        with pytest.raises(NfsError, match="SHARE_DENIED"):
            other.open("f")
        first.vanish()
        with Client(view.address, owner=b"rebooted"):
            other.open("f").close()


# --- bytes


def test_bytes_come_back(serve: Serve, data: Path) -> None:
    """What is written in any of the three ways is read, ends at the file's end, and is in the store afterwards."""
    view = serve()
    with Client(view.address) as client:
        file = client.create("f")
        pieces = [os.urandom(length) for length in (1, 4095, 65536, MIB)]
        at = 0
        for number, piece in enumerate(pieces):
            written = file.write(at, piece, stable=number % 3)
            assert written.count == len(piece)
            assert written.committed >= number % 3
            at += len(piece)
        file.commit()
        whole = b"".join(pieces)
        assert file.read(0, MIB) == whole[:MIB]
        assert file.read(at - 10, 4096) == whole[-10:]
        assert file.read(at + 10, 4096) == b""
        assert file.do(nfs.read(file.stateid, at - 10, 10)).eof
        file.close()
    view.stop()
    with space.open(data) as store:
        assert store.read(store.resolve("/f")) == whole


def test_what_was_acknowledged_outlives_kills(serve: Serve) -> None:
    """FILE_SYNC, COMMIT, names and attributes that were acknowledged are there after each of several kill -9."""
    view = serve()
    for turn in range(4):
        client = Client(view.address)
        for earlier in range(turn):
            assert client.stat(f"d{earlier}/moved", "size", "mode") == {"size": 20_000, "mode": 0o600}
            file = client.open(f"d{earlier}/moved", share=nfs.READ)
            assert file.read(0, 20_000) == bytes([earlier]) * 20_000
            file.close()
        client.mkdir(f"d{turn}")
        file = client.create(f"d{turn}/f")
        verifier = file.write(0, bytes([turn]) * 10_000, nfs.UNSTABLE).verifier
        assert file.commit() == verifier
        file.write(10_000, bytes([turn]) * 10_000, nfs.FILE_SYNC)
        file.do(nfs.setattr_(file.stateid, mode=0o600))
        home = nfs.putfh(client.handle(f"d{turn}"))
        client.compound(home, nfs.savefh(), home, nfs.rename(b"f", b"moved"))
        view.again()
        client.vanish()
        with Client(view.address) as after:
            probe = after.open(f"d{turn}/moved")
            assert probe.write(0, bytes([turn]), nfs.UNSTABLE).verifier != verifier
            probe.close()


def test_sparse_files_copies_and_clones(serve: Serve) -> None:
    """Holes are found, made and given back; COPY and CLONE leave what was asked for."""
    view = serve()
    with Client(view.address, minor=2) as client:
        file = client.create("f")
        file.write(1 << 20, b"x" * 65536)
        assert file.do(nfs.seek(file.stateid, 0, nfs.SEEK_DATA)) == (False, 1 << 20)
        assert file.do(nfs.seek(file.stateid, 1 << 20, nfs.SEEK_HOLE))[1] == (1 << 20) + 65536
        assert (
            client.attempt(nfs.putfh(file.handle), nfs.seek(file.stateid, 1 << 30, nfs.SEEK_DATA)).status
            == "NXIO"
        )
        found, eof = bytearray(), False
        while not eof:
            eof, segments = file.do(nfs.read_plus(file.stateid, len(found), 2 << 20))
            assert segments or eof
            for each in segments:
                assert each.offset == len(found)
                found += bytes(each.length) if each.data is None else each.data
        assert found == bytes(1 << 20) + b"x" * 65536
        before = file.do(nfs.getattr_("space_used"))["space_used"]
        file.do(nfs.deallocate(file.stateid, 1 << 20, 32768))
        assert file.do(nfs.getattr_("space_used"))["space_used"] < before
        assert file.read(1 << 20, 65536) == bytes(32768) + b"x" * 32768
        file.do(nfs.allocate(file.stateid, 0, 3 << 20))
        assert file.size() == 3 << 20

        for name, how in (("clone", nfs.clone), ("copy", nfs.copy)):
            target = client.create(name)
            asked = how(file.stateid, target.stateid, 0, 0, 0)  # nothing: to the end
            client.compound(nfs.putfh(file.handle), nfs.savefh(), nfs.putfh(target.handle), asked)
            target.write(0, b"changed")
            assert target.size() == 3 << 20
            assert target.read(1 << 20, 65536) == bytes(32768) + b"x" * 32768
            assert file.read(0, 7) == bytes(7)


def test_small_holes_are_not_told(serve: Serve) -> None:
    """READ_PLUS gives a hole smaller than a block as zeros: Linux cannot take an answer with such a hole apart."""
    view = serve()
    with Client(view.address, minor=2) as client:
        file = client.create("f")
        for at, length in ((0, 3073), (3105, 13279), (40_001, 5)):
            file.write(at, b"x" * length)
        _, segments = file.do(nfs.read_plus(file.stateid, 0, 65536))
        assert [(each.offset, each.length) for each in segments if each.data is None] == [(16384, 20480)]
        assert segments[0].data == b"x" * 3073 + bytes(32) + b"x" * 13279


def test_a_copy_may_go_on_after_its_answer(serve: Serve) -> None:
    """A COPY that need not be synchronous ends, and is said to: in its answer, or by CB_OFFLOAD."""
    view = serve()
    with Client(view.address, minor=2) as client:
        source, target = client.create("source"), client.create("target")
        piece = os.urandom(MIB)
        for at in range(24):
            source.write(at * MIB, piece, nfs.UNSTABLE)
        source.commit()
        asked = nfs.copy(source.stateid, target.stateid, 0, 0, 24 * MIB, synchronous=False)
        *_, found = client.compound(nfs.putfh(source.handle), nfs.savefh(), nfs.putfh(target.handle), asked)
        if found.offload is None:
            assert found.count == 24 * MIB
        else:
            handle, stateid, ended, done = client.wait_for("offload")
            assert (handle, stateid, ended) == (target.handle, found.offload, "OK")
            assert done.count == 24 * MIB
        target.commit()
        assert all(target.read(at * MIB, MIB) == piece for at in range(24))


def test_extended_attributes(serve: Serve) -> None:
    """Extended attributes are set as asked, listed in pages, and removed; each change changes the file."""
    view = serve()
    with Client(view.address, minor=2) as client:
        file = client.create("f")
        for name in (b"one", b"two", b"three"):
            change = file.do(nfs.setxattr(name, name * 100, 1))
            assert change.after > change.before
        assert status(client, nfs.putfh(file.handle), nfs.setxattr(b"one", b"", 1)) == "EXIST"
        assert status(client, nfs.putfh(file.handle), nfs.setxattr(b"none", b"", 2)) == "NOXATTR"
        assert file.do(nfs.getxattr(b"two")) == b"two" * 100
        names: list[bytes] = []
        cookie, eof = 0, False
        while not eof:
            cookie, found, eof = file.do(nfs.listxattrs(cookie, 40))
            names += found
        assert sorted(names) == [b"one", b"three", b"two"]
        file.do(nfs.removexattr(b"two"))
        assert status(client, nfs.putfh(file.handle), nfs.getxattr(b"two")) == "NOXATTR"


def test_listings_go_on_after_a_restart(serve: Serve) -> None:
    """A cookie is good after a kill and after changes of the directory: nothing repeated, nothing missed."""
    view = serve()
    with Client(view.address) as client:
        client.mkdir("d")
        home = nfs.putfh(client.handle("d"))
        names = [f"name{number}".encode() for number in range(300)]
        for at in range(0, 300, 20):
            made = [
                op for name in names[at : at + 20] for op in (home, nfs.create(nfs.DIR, name, mode=0o755))
            ]
            client.compound(*made)
        *_, page = client.compound(home, nfs.readdir(0, bytes(8), "fileid", count=2000))
    assert not page.eof
    seen = [each.name for each in page.entries]
    view.again()
    with Client(view.address) as client:
        client.compound(home, nfs.remove(seen[-1]), home, nfs.remove(seen[0]))
        client.compound(home, nfs.create(nfs.DIR, b"new", mode=0o755))
        while not page.eof:
            *_, page = client.compound(
                home, nfs.readdir(page.entries[-1].cookie, page.verifier, "fileid", count=2000)
            )
            seen += [each.name for each in page.entries]
        assert sorted(each for each in seen if each != b"new") == sorted(names)


# --- opens, locks, delegations


def test_share_reservations(serve: Serve) -> None:
    """What an open denies others do not get, and what one has cannot be denied; closing ends it."""
    view = serve()
    with Client(view.address) as one, Client(view.address) as two:
        held = one.create("f", share=nfs.READ, deny=nfs.WRITE)
        for share, deny in ((nfs.WRITE, 0), (nfs.BOTH, 0), (nfs.READ, nfs.READ)):
            with pytest.raises(NfsError, match="SHARE_DENIED"):
                two.open("f", share=share, deny=deny)
        reader = two.open("f", share=nfs.READ)
        assert status(two, nfs.putfh(reader.handle), nfs.write(reader.stateid, 0, b"x")) in {
            "OPENMODE",
            "LOCKED",
        }
        reader.close()
        held.close()
        two.open("f", share=nfs.WRITE).close()
        assert status(one, nfs.putfh(held.handle), nfs.read(held.stateid, 0, 1)) == "BAD_STATEID"


def test_byte_ranges(serve: Serve) -> None:
    """Locks conflict by range and kind and between owners alone; unlocking a part leaves the rest."""
    view = serve()
    with Client(view.address) as one, Client(view.address) as two:
        mine = one.create("f")
        yours = two.open("f")
        held = mine.lock(nfs.WRITE_LOCK, 0, 100)

        def busy(kind: int, offset: int, length: int) -> bool:
            test = nfs.lockt(kind, offset, length, two.identity.client, b"you")
            answer = two.attempt(nfs.putfh(yours.handle), test)
            assert answer.status in {"OK", "DENIED"}
            return answer.status == "DENIED"

        assert busy(nfs.READ_LOCK, 99, 1)
        assert not busy(nfs.WRITE_LOCK, 100, nfs.TO_END)
        held = mine.do(nfs.locku(nfs.WRITE_LOCK, 40, 20, held))
        assert [busy(nfs.WRITE_LOCK, at, 1) for at in (39, 40, 59, 60)] == [True, False, False, True]
        held = mine.do(nfs.lock_more(nfs.READ_LOCK, 0, 40, held))
        assert not busy(nfs.READ_LOCK, 0, 40)
        assert busy(nfs.WRITE_LOCK, 0, 40)
        with pytest.raises(NfsError, match="LOCKS_HELD"):
            mine.do(nfs.free_stateid(held))
        mine.close()
        assert not busy(nfs.WRITE_LOCK, 0, nfs.TO_END)


def delegated(client: Client, path: str, share: int) -> File:
    """An open that brought a delegation; the server may be in no hurry to give one."""
    for _ in range(20):
        file = client.open(path, share=share, delegation=True)
        if file.opened.delegation.stateid is not None:
            return file
        file.close()
    pytest.fail("no delegation in twenty opens")


@pytest.mark.parametrize("share", [nfs.READ, nfs.BOTH])
def test_a_delegation_is_recalled(serve: Serve, share: int) -> None:
    """Who opens what another client holds a delegation of gets it once that was returned, not before."""
    view = serve()
    with Client(view.address) as one, Client(view.address) as two:
        one.create("f").close()
        file = delegated(one, "f", share)
        delegation = file.opened.delegation.stateid
        assert delegation is not None
        home = nfs.open_(
            two.identity.client, b"owner", nfs.claim_null(b"f"), share=nfs.WRITE | nfs.WANT_NO_DELEGATION
        )
        assert status(two, nfs.putrootfh(), home) == "DELAY"
        stateid, handle = one.wait_for("recall")
        assert (stateid, handle) == (delegation, file.handle)
        assert status(two, nfs.putrootfh(), home) == "DELAY"
        file.do(nfs.delegreturn(delegation))
        two.open("f", share=nfs.WRITE).close()


def test_a_delegation_that_is_not_returned_is_revoked(serve: Serve) -> None:
    """Who keeps a recalled delegation loses it after the lease and is told so until it gives the stateid up."""
    view = serve()
    with Client(view.address) as one, Client(view.address) as two:
        one.create("f").close()
        file = delegated(one, "f", nfs.READ)
        delegation = file.opened.delegation.stateid
        assert delegation is not None
        renewing = threading.Event()

        def renew() -> None:
            while not renewing.wait(0.5):
                one.attempt(nfs.putrootfh())

        thread = threading.Thread(target=renew)
        thread.start()
        try:
            two.open("f", share=nfs.WRITE).close()
        finally:
            renewing.set()
            thread.join()
        one.attempt(nfs.putrootfh())
        assert one.flags & 0x40  # SEQ4_STATUS_RECALLABLE_STATE_REVOKED
        assert status(one, nfs.putfh(file.handle), nfs.read(delegation, 0, 1)) == "DELEG_REVOKED"
        one.compound(nfs.free_stateid(delegation))
        one.attempt(nfs.putrootfh())
        assert not one.flags & 0x40


def test_a_lease_ends(serve: Serve) -> None:
    """A client that says nothing keeps its locks until another wants them after its lease; then its session is gone."""
    view = serve()
    quiet = Client(view.address)
    quiet.create("f").lock(nfs.WRITE_LOCK, 0, 100)
    with Client(view.address) as other:
        file = other.open("f")
        wanted = nfs.lock_first(nfs.WRITE_LOCK, 0, 1, file.stateid, other.identity.client, b"me")
        assert other.attempt(nfs.putfh(file.handle), wanted).status == "DENIED"
        tries = 8 * LEASE_SECONDS
        while other.attempt(nfs.putfh(file.handle), wanted).status != "OK":
            tries -= 1
            assert tries, "the lock of a silent client is held for ever"
            other.rpc.serve(0.5)
    # courtesy may have kept the rest of it, but not the lock
    assert quiet.attempt(nfs.putrootfh()).status in {"OK", "BADSESSION"}
    quiet.vanish()


# --- restarts


def test_what_was_held_is_reclaimed(serve: Serve) -> None:
    """After a kill nobody gets what another client held before that one could reclaim it."""
    view = serve()
    one, two = Client(view.address, owner=b"one"), Client(view.address, owner=b"two")
    file = one.create("f", deny=nfs.WRITE)
    file.lock(nfs.WRITE_LOCK, 0, 100)
    old = file.stateid
    handle = file.handle
    view.again()
    for client in (one, two):
        client.rpc.close()
        client.rpc = nfs.Rpc(view.address)
        assert client.bare(client.sequence(), nfs.putrootfh()).status == "BADSESSION"
        client.vanish()
    one = Client(view.address, owner=b"one", verifier=one.verifier, reclaim_complete=False)
    two = Client(view.address, owner=b"two", verifier=two.verifier, reclaim_complete=False)
    opening = nfs.open_(
        two.identity.client, b"o", nfs.claim_null(b"f"), share=nfs.READ | nfs.WANT_NO_DELEGATION
    )
    assert status(two, nfs.putrootfh(), opening) == "GRACE"
    assert status(one, nfs.putfh(handle), nfs.read(old, 0, 1)) in {"STALE_STATEID", "BAD_STATEID"}
    again = nfs.open_(one.identity.client, b"owner", nfs.claim_previous(), share=nfs.BOTH, deny=nfs.WRITE)
    _, opened = one.compound(nfs.putfh(handle), again)
    file = File(one, handle, opened)
    file.lock(nfs.WRITE_LOCK, 0, 100, reclaim=True)
    for client in (one, two):
        client.compound(nfs.reclaim_complete())
    assert status(one, nfs.putfh(handle), again) == "NO_GRACE"
    with pytest.raises(NfsError, match="SHARE_DENIED"):
        two.open("f", share=nfs.WRITE)
    reader = two.open("f", share=nfs.READ)
    test = nfs.lockt(nfs.READ_LOCK, 0, 1, two.identity.client, b"two")
    assert status(two, nfs.putfh(reader.handle), test) == "DENIED"
    one.close()
    two.close()


def test_a_stranger_cannot_reclaim(serve: Serve) -> None:
    """Who had nothing before the restart reclaims nothing, and a handle from before it is good."""
    view = serve()
    with Client(view.address) as client:
        handle = client.create("f").handle
    view.again()
    client = Client(view.address, reclaim_complete=False)
    claim = nfs.open_(client.identity.client, b"o", nfs.claim_previous(), share=nfs.READ)
    assert status(client, nfs.putfh(handle), claim) in {"NO_GRACE", "RECLAIM_BAD"}
    client.compound(nfs.reclaim_complete())
    assert client.compound(nfs.putfh(handle), nfs.getattr_("size"))[-1] == {"size": 0}
    client.close()


# --- exports


def test_several_exports_are_below_one_root(serve: Serve, data: Path) -> None:
    """A tree and a single capsule in one server: the way from the root leads to each, and no further."""
    with space.open(data) as store:
        store.mkdir("/a")
        store.mkdir("/a/b")
        store.put(b"inside", name="/a/b/f")
        store.put(b"single", name="/single")
        store.put(b"hidden", name="/hidden")
    view = serve("--path", "/a/b", "--path", "/single", "--squash", "none")
    found: dict[str, str] = {}

    def look(path: str) -> None:
        for entry in list(client.listing(path, "type", "fsid")):
            below = f"{path}/{entry.name.decode()}"
            if entry.attributes["type"] == nfs.DIR:
                look(below)
            else:
                file = client.open(below, share=nfs.READ)
                found[below] = file.read(0, 100).decode()
                file.close()

    with Client(view.address) as client:
        look("")
    assert sorted(found.values()) == ["inside", "single"]
    assert not any("hidden" in each for each in found)


def test_a_read_only_export(serve: Serve, data: Path) -> None:
    """Nothing changes through an export that is served to be read."""
    with space.open(data) as store:
        store.put(b"content", name="/f")
    view = serve("--path", "/", "--read-only", "--squash", "none")
    with Client(view.address, minor=2) as client:
        root = nfs.putrootfh()
        file = client.open("f", share=nfs.READ)
        assert file.read(0, 7) == b"content"
        for operation in (
            nfs.create(nfs.DIR, b"d", mode=0o755), nfs.remove(b"f"), nfs.setattr_(mode=0o777),
            nfs.setxattr(b"x", b"y"),
        ):  # fmt: skip
            assert status(client, root, operation) == "ROFS"
        with pytest.raises(NfsError, match="ROFS"):
            client.open("f", share=nfs.BOTH)


def test_the_end_is_clean(serve: Serve) -> None:
    """SIGTERM with clients connected ends the server at once, and all descriptors of gone clients were closed."""
    view = serve()
    with Client(view.address) as client:
        client.create("f").close()
        before = view.descriptors()
        for _ in range(30):
            Client(view.address).close()
        client.compound(nfs.putrootfh())
        assert view.descriptors() <= before + 2  # a connection that ended may still be on its way out
        view.stop()


@pytest.mark.requires("py:nfs_rs")
def test_another_client(serve: Serve) -> None:
    """nfs-rs, a client of somebody else's, makes, writes, reads, lists, renames and removes as it expects to."""
    nfs_rs = importlib.import_module("nfs_rs")
    view = serve()
    with nfs_rs.Client.connect(
        f"nfs://127.0.0.1/?nfsport={view.port}", versions=["4.1"], noresvport=True
    ) as client:
        content = os.urandom(3 * MIB + 5)
        client.mkdir("d")
        with client.open("d/f", "wb") as file:
            assert sum(
                file.write_at(content[at : at + MIB], at) for at in range(0, len(content), MIB)
            ) == len(content)
        assert client.stat("d/f").size == len(content)
        client.rename("d/f", "d/g")
        client.link("d/g", "d/h")
        client.symlink("g", "d/s")
        client.chmod("d/g", 0o600)
        with client.open("d/h", "rb") as file:
            assert b"".join(file.read_at(at, MIB) for at in range(0, len(content), MIB)) == content
        assert (client.stat("d/h").mode & 0o777, client.readlink("d/s")) == (0o600, "g")
        client.truncate("d/g", 10)
        assert client.stat("d/h").size == 10
        assert sorted(client.listdir("d")) == ["g", "h", "s"]
        for name in ("d/g", "d/h", "d/s"):
            client.remove(name)
        client.rmdir("d")
        assert not client.exists("d")

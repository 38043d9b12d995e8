"""Clients that want too much, in number and in size, take a bounded part of the server and nothing from the others."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

import space
from tests import nfs_client as nfs
from tests.nfs_client import Client, u32
from tests.nfs_support import View

MIB: Final = 1 << 20
SESSIONS: Final = 10_000
CONNECTIONS: Final = 1000
STATES: Final = 3000
GROWTH_MAX: Final = 192 * MIB
"""What a server may hold more than before: far less than what the clients here ask it to."""


@pytest.fixture
def view(tmp_path: Path) -> Iterator[View]:
    """A served store with a file of 8 MiB."""
    data = tmp_path / "data"
    with space.open(data) as store:
        store.put(os.urandom(8 * MIB), name="/large")
    view = View(data, ["--path", "/", "--squash", "none"])
    view.start()
    yield view
    view.stop()


@pytest.fixture
def other(view: View) -> Iterator[Client]:
    """A well-behaved client, which must not be harmed: it has a file open and locked."""
    with Client(view.address, owner=b"well-behaved") as client:
        file = client.create("held")
        held = file.lock(nfs.WRITE_LOCK, 0, 10)
        file.write(0, b"content")
        yield client
        assert file.read(0, 7) == b"content"
        file.do(nfs.locku(nfs.WRITE_LOCK, 0, 10, held))
        file.close()


def use(client: Client) -> None:
    """A round of ordinary work."""
    client.create("f", how=nfs.UNCHECKED).close()
    assert client.stat("f")["size"] == 0
    client.remove("f")


def test_ten_thousand_sessions(view: View, other: Client) -> None:
    """Ten thousand CREATE_SESSIONs of one client, and as many EXCHANGE_IDs, are refused or forgotten."""
    before = view.memory()
    with Client(view.address) as client:
        sequence = client.session.sequence
        statuses = set()
        for number in range(SESSIONS):
            sequence += 1
            arguments = nfs.u64(client.identity.client) + u32(sequence, 0)
            channels = nfs.Channel().xdr() + nfs.Channel(0, 4096, 4096, 0, 2, 1).xdr()
            made = client.bare(
                nfs.op("create_session", arguments + channels + u32(nfs.CALLBACK_PROGRAM, 1, 0))
            )
            statuses.add(made.status)
            if made.status != "OK":
                sequence -= 1
            if number % 500 == 0:
                client.compound(nfs.putrootfh())  # a lease is renewed by sessions, not by making them
                use(other)
        assert statuses - {"OK", "DELAY", "NOSPC"} == set()
        rpc = nfs.Rpc(view.address)
        for number in range(SESSIONS):
            owner = bytes(8) + nfs.opaque(b"stranger %d" % number) + u32(0, 0, 0)
            body = nfs.compound_body([nfs.op("exchange_id", owner)], 1)
            assert nfs.take_answer(rpc.call(1, body)).status in {"OK", "DELAY"}
        rpc.close()
        use(other)
    assert view.memory() - before < GROWTH_MAX


def test_records_without_end(view: View, other: Client) -> None:
    """Records too large, in too many pieces, or begun and never ended are not collected in memory."""
    before = view.memory()
    for first in (0x7FFFFFFF, 0xFFFFFFFF, 64 * MIB):
        with socket.create_connection(view.address, 30) as sock, contextlib.suppress(OSError):
            sock.sendall(u32(first))
            for _ in range(64):
                sock.sendall(bytes(MIB))
            assert sock.recv(1) == b""
    with socket.create_connection(view.address, 30) as sock, contextlib.suppress(OSError):
        for _ in range(100_000):
            sock.sendall(u32(4) + b"abcd")
        assert sock.recv(1) == b""
    begun = [socket.create_connection(view.address, 30) for _ in range(200)]
    for sock in begun:
        sock.sendall(u32(1 << 31 | MIB) + bytes(MIB - 1))
    use(other)
    assert view.memory() - before < GROWTH_MAX + 200 * MIB
    for sock in begun:
        sock.close()
    use(other)


def test_answers_nobody_takes(view: View, other: Client) -> None:
    """Who asks for gigabytes and reads none of it is not read on; the server holds no more than a few answers."""
    before = view.memory()
    greedy = [Client(view.address) for _ in range(8)]
    for client in greedy:
        file = client.open("large", share=nfs.READ)
        client.rpc.socket.setblocking(False)
        request = nfs.compound_body([nfs.putfh(file.handle), nfs.read(file.stateid, 0, MIB)], 1)
        with contextlib.suppress(BlockingIOError):
            for slot in range(1, len(client.sequences)):
                sequence = client.sequence(slot)
                body = nfs.opaque(b"") + u32(1, 3) + sequence + request[12:]
                client.rpc.socket.sendall(nfs.record(nfs.call(slot, 1, body, client.rpc.credential)))
        use(other)
    assert view.memory() - before < GROWTH_MAX
    for client in greedy:
        client.vanish()
    use(other)


def test_a_thousand_connections(view: View, other: Client) -> None:
    """A thousand connections are served side by side, some of them slow or half open; more are turned away."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    before = view.memory()
    try:
        sockets = [socket.create_connection(view.address, 30) for _ in range(CONNECTIONS)]
        call = nfs.record(nfs.call(1, 0, b"", None))
        for number, sock in enumerate(sockets):
            if number % 3 == 0:
                sock.sendall(call[: 1 + number % (len(call) - 1)])  # a slow one: it never ends
            elif number % 3 == 1:
                sock.sendall(call)
        for sock in sockets[1::3]:
            assert struct.unpack(">7I", sock.recv(28))[1:] == (1, 1, 0, 0, 0, 0)
        for sock in sockets[::10]:
            sock.shutdown(socket.SHUT_WR)  # half open
        use(other)
        for sock in sockets:
            sock.close()
        use(other)
        assert view.memory() - before < GROWTH_MAX
        assert view.descriptors() < CONNECTIONS // 2
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_state_without_end(view: View, other: Client) -> None:
    """A client that opens and locks on and on is refused at some number, or the server holds it well."""
    before = view.memory()
    with Client(view.address) as client:
        file = client.open("large", share=nfs.READ)
        refused = None
        for number in range(STATES):
            owner = b"owner %d" % number
            opening = nfs.open_(
                client.identity.client, owner, nfs.claim_fh(), share=nfs.READ | nfs.WANT_NO_DELEGATION
            )
            locking = nfs.lock_first(nfs.READ_LOCK, number, 1, nfs.CURRENT, client.identity.client, owner)
            answer = client.attempt(nfs.putfh(file.handle), opening, locking)
            if answer.status != "OK":
                refused = answer.status
                break
            if number % 500 == 0:
                use(other)
        assert refused in {None, "DELAY", "NOSPC", "DENIED"}
        use(other)
    assert view.memory() - before < GROWTH_MAX

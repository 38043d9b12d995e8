"""What NFS clients hold, under any order of opens, locks, delegations, lost leases and restarts of clients."""

from __future__ import annotations

from typing import Final

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from space.projections.nfs.delegations import Delegation
from space.projections.nfs.locks import Range
from space.projections.nfs.nfs4 import NfsStatus, Share, Want
from space.projections.nfs.opens import Mode
from space.projections.nfs.sessions import Client
from space.projections.nfs.state import Lock, Open
from tests.nfs_state_support import LEASE, World, refused

pytestmark = pytest.mark.property

CLIENTS: Final = 3
FILES: Final = 2
clients = st.integers(0, CLIENTS - 1)
nodes = st.integers(1, FILES)
owners = st.sampled_from([b"o", b"p"])
modes = st.builds(Mode, st.sampled_from([Share.READ, Share.WRITE, Share.BOTH]), st.sampled_from(list(Share)))
ranges = st.builds(
    lambda start, length, write: Range(start, start + length, write),
    st.integers(0, 8),
    st.integers(1, 4),
    st.booleans(),
)


class Clients(RuleBasedStateMachine):
    """Three clients and two files; whatever is refused changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.now = 0.0
        self.clients: list[Client] = []
        self.gone: list[Open | Lock | Delegation] = []
        for _ in range(CLIENTS):
            self.clients.append(self.world.service.client(expiry=LEASE))

    def client(self, number: int) -> Client:
        """A client that is alive: every request renews its lease, and one that was forgotten comes anew."""
        client = self.clients[number]
        if client.id not in self.world.service.clients:
            client = self.clients[number] = self.world.service.client()
        client.expiry = self.now + LEASE
        return client

    def held(self, kind: type) -> list[Open | Lock | Delegation]:
        """Everything of a kind that somebody holds."""
        found: list[Open | Lock | Delegation] = []
        for number in range(1, FILES + 1):
            file = self.world.state.file(self.world.node(number))
            if file is not None:
                found += [*file.opens.values(), *file.lock_owners.values(), *file.delegations.values()]
        return [each for each in found if isinstance(each, kind)]

    @rule(seconds=st.integers(1, LEASE))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds

    @rule(number=clients, node=nodes, owner=owners, mode=modes, want=st.sampled_from(Want))
    def open(self, number: int, node: int, owner: bytes, mode: Mode, want: Want) -> None:
        client, where, state = self.client(number), self.world.node(node), self.world.state
        status = refused(state.open, client, where, owner, mode, self.now)
        assert status in {NfsStatus.OK, NfsStatus.SHARE_DENIED, NfsStatus.DELAY}
        if status == NfsStatus.OK:
            state.offer(client, where, mode.access, want, self.now)

    @precondition(lambda self: self.held(Open))
    @rule(data=st.data(), mode=modes)
    def downgrade(self, data: st.DataObject, mode: Mode) -> None:
        opened = data.draw(st.sampled_from(self.held(Open)))
        assert isinstance(opened, Open)
        before = opened.stateid
        status = refused(self.world.state.downgrade, opened, mode)
        if status == NfsStatus.OK:
            assert opened.stateid.seqid == before.seqid + 1
            assert opened.mode == mode
        else:
            assert status == NfsStatus.INVAL
            assert opened.stateid == before

    @precondition(lambda self: self.held(Open))
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        opened = data.draw(st.sampled_from(self.held(Open)))
        assert isinstance(opened, Open)
        self.gone += [opened, *opened.locks.values()]
        self.world.state.close(opened)

    @precondition(lambda self: self.held(Open))
    @rule(data=st.data(), owner=owners, wanted=ranges, waits=st.booleans())
    def lock(self, data: st.DataObject, owner: bytes, wanted: Range, waits: bool) -> None:
        opened = data.draw(st.sampled_from(self.held(Open)))
        assert isinstance(opened, Open)
        client, state, node = opened.client, self.world.state, opened.file.node
        client.expiry = self.now + LEASE
        if state.lock_conflict(node, (client, owner), wanted, self.now):
            if waits:
                state.wait(node, (client, owner), wanted)
        else:
            state.lock(state.lock_owner(opened, owner), wanted)

    @precondition(lambda self: self.held(Lock))
    @rule(data=st.data(), where=ranges, free=st.booleans())
    def unlock(self, data: st.DataObject, where: Range, free: bool) -> None:
        held = data.draw(st.sampled_from(self.held(Lock)))
        assert isinstance(held, Lock)
        before = held.stateid
        assert self.world.state.unlock(held, where.start, where.end).seqid == before.seqid + 1
        if (
            free
            and self.world.state.free(self.world.request(held.client, self.now), held.stateid) == NfsStatus.OK
        ):
            self.gone.append(held)

    @precondition(lambda self: self.held(Delegation))
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from(self.held(Delegation)))
        assert isinstance(held, Delegation)
        self.gone.append(held)
        self.world.state.forget_delegation(held)

    @rule(number=clients, node=nodes)
    def change(self, number: int, node: int) -> None:
        client, where = self.client(number), self.world.node(node)
        status = refused(self.world.state.before_change, self.world.request(client, self.now), where)
        if status != NfsStatus.OK:
            assert status == NfsStatus.DELAY
            return
        assert all(each.client is client for each in self.held(Delegation) if each.file.node == where)

    @rule(number=clients)
    def start_anew(self, number: int) -> None:
        self.world.service.remove(self.client(number))

    @rule()
    def tick(self) -> None:
        self.world.state.tick(self.now)

    @invariant()
    def opens_are_compatible(self) -> None:
        """No two opens of a file deny what the other does."""
        opens = [each for each in self.held(Open) if isinstance(each, Open)]
        for one in opens:
            for two in opens:
                assert one is two or one.file is not two.file or not one.mode.conflicts(two.mode)

    @invariant()
    def locks_are_compatible(self) -> None:
        """No two owners hold conflicting ranges, and every range belongs to a stateid of an open file."""
        locks = [each for each in self.held(Lock) if isinstance(each, Lock)]
        for one in locks:
            assert one.open.locks[one.owner] is one
            assert one.file.opens[one.open.client, one.open.owner] is one.open
            for two in locks:
                if one is not two and one.file is two.file:
                    mine = one.file.locks.held((one.client, one.owner))
                    others = two.file.locks.held((two.client, two.owner))
                    assert not any(each.conflicts(other) for each in mine for other in others)

    @invariant()
    def delegations_are_safe(self) -> None:
        """Beside one for writing nobody has the file open; beside one for reading nobody has it open for writing."""
        for each in self.held(Delegation):
            assert isinstance(each, Delegation)
            others = each.file.opened_by(each.client, others=True)
            assert not others & (Share.BOTH if each.write else Share.WRITE)
            assert not each.revoked

    @invariant()
    def books_agree(self) -> None:
        """A stateid is good exactly while what it names is held; files are held exactly while anything is."""
        state = self.world.state
        everything = [*self.held(Open), *self.held(Lock), *self.held(Delegation)]
        for each in everything:
            assert state.test(each.client, each.stateid) == NfsStatus.OK
            assert each.client.id in self.world.service.clients
        for each in self.gone:
            assert state.test(each.client, each.stateid) == NfsStatus.BAD_STATEID
        for number in range(1, FILES + 1):
            node = self.world.node(number)
            assert self.world.files.held[node.id] == (state.file(node) is not None)
            assert state.open_count(node) == sum(each.file.node == node for each in self.held(Open))
        holders = {each.client for each in everything}
        for client in self.clients:
            revoked = bool(state.sequence_flags(client))
            assert state.has_state(client) == (client in holders or revoked)


TestClients = Clients.TestCase

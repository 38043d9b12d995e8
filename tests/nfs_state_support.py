"""A service, clients and files as far as what clients hold needs them: everything recorded, nothing sent."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Final, cast

import attrs

from space.events.ids import CapsuleId
from space.projections.nfs.compound import Compound, NfsError, Stateid
from space.projections.nfs.exports import Export, Node
from space.projections.nfs.nfs4 import NfsStatus
from space.projections.nfs.service import Config
from space.projections.nfs.sessions import Client
from space.projections.nfs.state import State

LEASE: Final = 10


@attrs.define(eq=False)
class Files:
    """Files that count who has them open."""

    immutable: bool = False
    read_only: bool = False
    change: int = 100
    held: Counter[CapsuleId] = attrs.field(factory=Counter)

    def attributes(self, node: CapsuleId) -> Any:
        return SimpleNamespace(change=self.change)

    def hold(self, node: CapsuleId) -> None:
        self.held[node] += 1

    def drop(self, node: CapsuleId) -> None:
        self.held[node] -= 1
        assert self.held[node] >= 0


@attrs.define(eq=False)
class Callbacks:
    """Records what clients would be told."""

    recalls: list[tuple[Client, Stateid, bool]] = attrs.field(factory=list)
    notices: list[tuple[Client, bytes]] = attrs.field(factory=list)
    questions: list[Callable[[tuple[int, int] | None], None]] = attrs.field(factory=list)
    unreachable: set[Client] = attrs.field(factory=set)

    def recall(self, client: Client, stateid: Stateid, handle: bytes, *, truncate: bool, now: float) -> None:
        self.recalls.append((client, stateid, truncate))

    def notify_lock(self, client: Client, handle: bytes, owner: bytes) -> None:
        self.notices.append((client, owner))

    def getattr(
        self, client: Client, handle: bytes, told: Callable[[tuple[int, int] | None], None], *, now: float
    ) -> None:
        self.questions.append(told)

    def reachable(self, client: Client) -> bool:
        return client not in self.unreachable


@attrs.define(eq=False)
class Service:
    """What :class:`State` needs of the service."""

    epoch: int = 7
    config: Config = attrs.field(factory=lambda: Config(lease_seconds=LEASE))
    callbacks: Callbacks = attrs.field(factory=Callbacks)
    clients: dict[int, Client] = attrs.field(factory=dict)
    expired: list[Client] = attrs.field(factory=list)
    grace: bool = False
    made: int = 0
    shell: Any = attrs.field(factory=lambda: SimpleNamespace(event=asyncio.Event))
    state: State = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.state = State(cast("Any", self))

    def in_grace(self, now: float) -> bool:
        return self.grace

    def expire_client(self, client: Client) -> None:
        self.expired.append(client)
        self.remove(client)

    def forget_claims(self, client: Client) -> None:
        client.forgotten = True

    def remove(self, client: Client) -> None:
        del self.clients[client.id]
        self.state.release_client(client)

    def client(self, *, expiry: float = 1e9) -> Client:
        """One more client."""
        self.made += 1
        number = self.made
        made = Client(number, b"client %d" % number, bytes(8), cast("Any", (1, 0)), expiry)
        made.reclaim_complete = True
        self.clients[number] = made
        return made


@attrs.define(eq=False)
class World:
    """A service with one export."""

    service: Service = attrs.field(factory=Service)
    files: Files = attrs.field(factory=Files)
    export: Export = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.export = Export(1, (), cast("Any", self.files))
        self.export.key = bytes(32)

    @property
    def state(self) -> State:
        return self.service.state

    def node(self, number: int = 1) -> Node:
        """A file."""
        return Node(self.export, CapsuleId(bytes([number]) * 16))

    def request(self, client: Client, now: float = 0.0, stateid: Stateid | None = None) -> Compound:
        """A COMPOUND of a client, after SEQUENCE."""
        made = Compound(cast("Any", self.service), cast("Any", None), cast("Any", None), 1, now)
        made.client, made.stateid = client, stateid
        return made


def refused(call: Any, *args: Any, **options: Any) -> NfsStatus:
    """The status a call fails with."""
    try:
        call(*args, **options)
    except NfsError as error:
        return error.status
    return NfsStatus.OK

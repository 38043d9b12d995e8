"""The NFS view of a running node: all nodes that are told to serve are one server, of which one listens at a time.

Handles, file numbers, change attributes and the server's name follow from the store, and are the same everywhere.
Opens and locks are in the memory of the node that serves (:mod:`space._node.nfs_tenure`).  The others stand by and do
not listen: they look whether a member says that it serves in the last epoch, and when none does, one of them begins
the next.  Clients find it as they find a server that was restarted, and claim what they held.

That nobody serves is a guess, which may be wrong where a member does not answer; then the older server finds itself
replaced, and nothing else happens.  A node that was replaced, or knows no quorum for a lease, stands by again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from space._errors import ConflictError, SpaceError, UnavailableError, UsageError
from space._node import views
from space._node.caller import Document
from space._node.member_vfs import MemberFileSystem
from space._node.nfs_recovery import epoch_of
from space._node.nfs_tenure import Tenure, TenureRecovery
from space._node.nfs_view import Options, document_of, exports_of, listening, server_name, server_of
from space._node.nfs_watch import Watch
from space._node.node_views import NodeViews, Running, ask_others
from space.events.ids import CapsuleId

if TYPE_CHECKING:
    from space._node.cluster import ClusterNode
    from space._node.member import Member
    from space.projections.nfs.exports import Export

LOOK_SECONDS: Final = 0.5
"""How often a node that stands by looks whether somebody serves, and one that serves whether it still does."""

SILENT_SECONDS: Final = 3.0
"""How long a member may not answer before it is taken for dead if it served; a few times what an answer may take."""

LED_ELSEWHERE_SECONDS: Final = 1.0
"""How much longer a node waits that does not lead: commands have no other node to go to where the leader serves."""

REPLACED_SECONDS: Final = 10.0
"""How long a node that was replaced stands back: two that do not hear each other do not take turns faster."""

CONFIRM_SECONDS: Final = 2.0

METHOD: Final = "nfs"
"""What other nodes are asked by (see :attr:`space.replication.node.Node.on_call`)."""

ADDRESS_CHARACTERS_MAX: Final = 255

log: Final = logging.getLogger("space.nfs")


@attrs.frozen
class NfsOptions:
    """A view of a node: what to serve (paths or ids), where, and how."""

    sources: tuple[str, ...]
    listen: tuple[str, int]
    offer: Options


@attrs.frozen
class Claim:
    """What a node says of itself: that it serves, in which epoch and where."""

    epoch: int
    address: str


def parse_claim(answer: Any) -> Claim | None:
    """Another node's answer; None: it does not serve, or is of another kind."""
    if type(answer) is not list or len(answer) != 2:
        return None
    epoch, address = answer
    if type(epoch) is not int or type(address) is not str or len(address) > ADDRESS_CHARACTERS_MAX:
        return None
    return Claim(epoch, address)


@attrs.define
class Standby:
    """Decides when a node may begin the next epoch; ``now`` in seconds of any steady clock."""

    vacant_since: float | None = None
    not_before: float = 0.0

    def may_begin(self, now: float, *, served: bool, silent: bool, leads: bool) -> bool:
        """Whether now; told after each look.

        ``served``: a member says that it serves in the last epoch; ``silent``: one that may do so did not answer.
        """
        if served:
            self.vacant_since = None
            return False
        if self.vacant_since is None:
            self.vacant_since = now
        patience = SILENT_SECONDS if silent else 0.0
        patience += 0.0 if leads else LED_ELSEWHERE_SECONDS
        return now >= max(self.vacant_since + patience, self.not_before)

    def was_replaced(self, now: float) -> None:
        """Another node has begun the next epoch."""
        self.vacant_since = None
        self.not_before = now + REPLACED_SECONDS


def server_now(claims: Mapping[int, Claim | None], epoch: int) -> tuple[int, Claim] | None:
    """The node that serves in the last epoch known here, or in a later one."""
    found = [(node, each) for node, each in claims.items() if each is not None and each.epoch >= epoch > 0]
    return max(found, key=lambda each: each[1].epoch, default=None)


class NfsViews(NodeViews[NfsOptions]):
    """The NFS view of a node; there is one at a time, as all of it is one server."""

    protocol = "NFS"
    log = log

    def __init__(self, home: Path, node: ClusterNode, store_of: Callable[[str], Member]) -> None:
        """The view of a node, with its directory and the shard each source is in."""
        super().__init__()
        self._home = home
        self._node = node
        self._store_of = store_of
        self._claim: Claim | None = None

    def claim(self) -> list[Any] | None:
        """Whether this node serves, for its peers: its epoch and where."""
        claim = self._claim
        return None if claim is None else [claim.epoch, claim.address]

    async def _serve(self, running: Running[NfsOptions]) -> None:
        over, standby = running.told_to_end(), Standby()
        with self._node.store.stale():  # looks of this thread; who serves confirms them
            while not over.is_set():
                epoch = await self._turn(running, over, standby)
                if epoch is None:
                    return
                await self._office(running, over, epoch + 1)
                standby.was_replaced(time.monotonic())
                if not over.is_set() and not running.again:
                    raise UnavailableError("another node serves NFS now, or no quorum is reached")

    # --- standing by

    async def _turn(self, running: Running[NfsOptions], over: asyncio.Event, standby: Standby) -> int | None:
        """Waits until it is this node's turn: the epoch to follow; None: it was told to end.

        Raises:
            ConflictError: another node serves, and this one was not told to wait.
        """
        at_once = not running.again
        while not over.is_set():
            try:
                epoch, claims = await asyncio.to_thread(self._look)
            except UnavailableError as error:
                log.debug("NFS waits: %s", error)
            else:
                serving = server_now(claims, epoch)
                if serving is not None and at_once:
                    node, claim = serving
                    raise ConflictError(
                        f"node {node} serves NFS at {claim.address or 'an address'} already",
                        hint="one node does at a time: space project stop there, or views: in the file of space serve",
                    )
                silent = bool(self._others() - claims.keys())
                leads = self._node.store.group.replica.leads()
                if standby.may_begin(
                    time.monotonic(), served=serving is not None, silent=silent, leads=leads or at_once
                ):
                    return epoch
            await _wait(over, LOOK_SECONDS)
        return None

    def _look(self) -> tuple[int, dict[int, Claim | None]]:
        """The last epoch, and what the members that answer say; blocks."""
        store = self._node.store
        store.group.barrier(seconds=CONFIRM_SECONDS)
        with store.stale():
            epoch = epoch_of(store, server_name(store))
        _, answers = ask_others(self._node, METHOD)
        return epoch, {node: parse_claim(each) for node, each in answers.items()}

    def _others(self) -> set[int]:
        return set(self._node.store.members()) - {self._node.config.node}

    # --- serving

    async def _office(self, running: Running[NfsOptions], over: asyncio.Event, epoch: int) -> None:
        """Begins an epoch and serves until that is over; returns at once if another node was faster.

        Raises:
            SpaceError: what is to be served is not there, or the address is not free.
        """
        begun = time.monotonic()
        options, store = running.options, self._node.store
        tenure = Tenure(store, server_name(store), epoch)
        found = self._exports(tenure, options)
        await asyncio.to_thread(check_free, options.listen)
        if not await tenure.begin():
            return
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._resign)
            self._claim = Claim(epoch, "")
            config = attrs.evolve(options.offer.config(), delegations=False)
            server = server_of(store, found, TenureRecovery(tenure), config, options.offer.referrals)
            stack.push_async_callback(server.close)
            watch = Watch(server.service.state, now=server.now)
            store.watchers.append(watch)
            stack.callback(store.watchers.remove, watch)
            host, port = await listening(server, options.listen)
            document = document_of(host, port, found, options.sources, server.service)
            running.view = self._view(document, options)
            self._claim = Claim(epoch, str(running.view["target"]))
            stack.enter_context(views.registered(self._home, running.view))
            if not running.ready.done():
                ready_ms = round((time.monotonic() - begun) * 1000, 1)
                running.ready.set_result({**running.view, "ready_ms": ready_ms})
            log.info("NFS is served at %s in epoch %d", running.view["target"], epoch)
            await until_over(tenure, over, config.lease_seconds)
            running.view = {}

    def _resign(self) -> None:
        self._claim = None

    def _exports(self, tenure: Tenure, options: NfsOptions) -> list[Export]:
        store = tenure.member
        for source in options.sources:
            if self._store_of(source) is not store:
                raise UsageError(
                    f"{source} is in another shard than the tree",
                    hint="NFS serves the tree, and what has a name",
                )

        def opened(root: CapsuleId) -> MemberFileSystem:
            files = MemberFileSystem(store, root, tenure.guard, read_only=options.offer.read_only)
            files.limit("nfs", options.listen[0])
            return files

        return exports_of(store, options.sources, options.offer, opened)

    @staticmethod
    def _view(document: Document, options: NfsOptions) -> Document:
        return {
            "view": "nfs",
            "name": f"nfs-{os.getpid()}",
            "source": ", ".join(options.sources),
            "at": None,
            "target": document["address"],
            **document,
            "pid": os.getpid(),
            "started_ns": time.time_ns(),
            "node": True,
        }


async def until_over(tenure: Tenure, over: asyncio.Event, lease_seconds: float) -> None:
    """Returns when this is no longer the server, or cannot know for as long as a lease, or is told to end."""
    while not await _wait(over, LOOK_SECONDS):
        if tenure.is_over:
            log.warning("epoch %d of NFS is over: another node serves", tenure.epoch)
            return
        try:
            await tenure.confirm()
        except SpaceError as error:
            if time.monotonic() - tenure.confirmed > lease_seconds:
                log.warning("NFS is not served any more: %s", error)
                return


async def _wait(over: asyncio.Event, seconds: float) -> bool:
    """Whether it was told to end within that time."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(over.wait(), seconds)
    return over.is_set()


def check_free(listen: tuple[str, int]) -> None:
    """Finds out whether an address can be listened at, before anybody else stops serving for it.

    Raises:
        UnavailableError: it cannot.
    """
    host, port = listen
    try:
        places: Sequence[Any] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        for family, kind, protocol, _, address in places:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
    except OSError as error:
        raise UnavailableError(
            f"cannot listen at {host}:{port}: {error.strerror or error}",
            hint="say another --listen HOST:PORT",
        ) from None

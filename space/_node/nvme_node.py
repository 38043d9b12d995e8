"""The NVMe view of a running node: one subsystem through every node of a cluster, each with a path of its own.

All nodes use the name, serial, NSIDs and identities that follow from the cluster and its log.  Each has numbers of
its own for controllers and ports, and tells the ANA state of its path: a shard is a group, optimized where it is led,
not optimized where commands go to the leader, inaccessible where no leader is known any more.  A command that is
refused there goes by another path of the host; one that was let in before waits for the next leader.

Each node asks the others a few times a minute where they serve the same subsystem, and hosts are told of all of it.

The view has a thread with a loop of its own: the node's loop has a consensus to keep.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from space._errors import SpaceError, UnavailableError, UsageError
from space._node import views
from space._node.caller import Document
from space._node.local_block import BlockWriter, namespace_number
from space._node.node_views import NodeViews, Running, ask_others
from space._node.nvme_tree import Source
from space._node.nvme_view import Home, View, subsystem_name
from space.events.ids import CapsuleId
from space.projections.nvme.auth import ANYBODY, Access
from space.projections.nvme.target import (
    CONTROLLER_IDS,
    CONTROLLERS_MAX,
    AnaState,
    Port,
    Referral,
)

if TYPE_CHECKING:
    from space._node.cluster import ClusterNode
    from space._node.member import Member

LEADER_LOOK_SECONDS: Final = 0.05
"""How often it is looked who leads: a few attributes, and hosts learn of it that much later."""

LEADERLESS_SECONDS: Final = 1.0
"""An election is over by then; a node that still knows of no leader sends hosts to another path."""

PORTALS_SECONDS: Final = 2.0
"""How often the others are asked where they serve."""

CONFIRM_SECONDS: Final = 2.0
"""How long a view that begins waits for a leader, to know what is newest; then it shows what is here."""

PORTS_MAX: Final = 16
"""Of one other node: what it says is not believed beyond that."""

ADDRESS_CHARACTERS_MAX: Final = 255
"""TRADDR has 256 bytes (Base Specification 2.0, figure 290)."""

PORTS_OF_A_NODE: Final = 2
"""For I/O, and for discovery."""

SLOTS: Final = len(CONTROLLER_IDS) // CONTROLLERS_MAX
"""Nodes that can serve one subsystem: each has numbers for as many controllers as there may be."""

METHOD: Final = "nvme"
"""What other nodes are asked by (see :attr:`space.replication.node.Node.on_call`)."""

log: Final = logging.getLogger("space.nvme")


@attrs.frozen
class NvmeOptions:
    """A view of a node: what to serve (ids or paths), where, and to whom."""

    sources: tuple[str, ...]
    listen: tuple[str, int]
    read_only: bool = False
    access: Access = ANYBODY


# --- numbers and states ----------------------------------------------------------------------------


def slot_of(node: int) -> int:
    """Which share of the numbers for controllers and ports a node has."""
    return (node - 1) % SLOTS


def controller_ids(node: int) -> range:
    """The numbers a node gives to controllers."""
    first = CONTROLLER_IDS.start + slot_of(node) * CONTROLLERS_MAX
    return range(first, first + CONTROLLERS_MAX)


def first_port(node: int) -> int:
    """The number of a node's first port."""
    return 1 + slot_of(node) * PORTS_OF_A_NODE


def check_apart(nodes: Sequence[int]) -> None:
    """Whether all members of a cluster have numbers of their own.

    Raises:
        UsageError: two have the same.
    """
    by_slot: dict[int, int] = {}
    for node in sorted(nodes):
        other = by_slot.setdefault(slot_of(node), node)
        if other != node:
            raise UsageError(
                f"nodes {other} and {node} would give the same numbers to NVMe controllers",
                hint=f"the number of a node that serves NVMe differs from others' by no multiple of {SLOTS}",
            )


def ana_state(*, leads: bool, leader: int, leaderless_seconds: float, usable: bool) -> AnaState:
    """How a shard is reached through a node.

    ``usable`` is whether the node's replica takes part; ``leaderless_seconds`` how long it has known no leader.
    """
    if not usable or (not leader and leaderless_seconds >= LEADERLESS_SECONDS):
        return AnaState.INACCESSIBLE
    return AnaState.OPTIMIZED if leads else AnaState.NON_OPTIMIZED


class Leadership:
    """Follows who leads the shards of a node."""

    def __init__(self, stores: Sequence[Member]) -> None:
        self._stores = stores
        self._led = [0.0] * len(stores)

    def states(self, now: float) -> list[AnaState]:
        """The state of each shard; ``now`` in seconds of any steady clock."""
        found = []
        for number, store in enumerate(self._stores):
            group = store.group
            driver = group.replica.driver
            leader, members = driver.leader, driver.state.configuration
            is_member = driver.node in (*members.voters, *members.learners, *members.voters_outgoing)
            if leader:
                self._led[number] = now
            found.append(
                ana_state(
                    leads=group.replica.leads(),
                    leader=leader,
                    leaderless_seconds=now - self._led[number],
                    usable=group.failure is None and not group.stopped and is_member,
                )
            )
        return found


# --- what is served --------------------------------------------------------------------------------


class NodePlace:
    """The shards of a node, as the view's :class:`space._node.nvme_view.Place`.

    What is looked at is what is here, however old: hosts find out the sizes of devices, and devices confirm what is
    read and written by themselves.
    """

    moment = None

    def __init__(
        self, node: ClusterNode, store_of: Callable[[str], Member], writers: dict[int, BlockWriter]
    ) -> None:
        """``writers`` by shard: none for a view that is read-only."""
        self._node = node
        self._store_of = store_of
        self._writers = writers

    @property
    def read_only(self) -> bool:
        return not self._writers

    def name(self) -> CapsuleId:
        return subsystem_name(self._node.config.cluster)

    def controller_ids(self) -> range:
        return controller_ids(self._node.config.node)

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for store in self._node.stores:
                stack.enter_context(store.stale())
            yield

    def source(self, text: str) -> Source:
        return Source(self._store_of(text), text)

    def home(self, capsule: CapsuleId) -> Home:
        store = self._store_of(str(capsule))
        number = store.group.number
        return Home(store, self._writers.get(number), number + 1)

    def number(self, subsystem: str, namespace: CapsuleId) -> int | None:
        """Numbers of one subsystem are all in one shard, whose counter gives none twice."""
        return namespace_number(self._node.store, subsystem, namespace)


# --- where the others serve ------------------------------------------------------------------------


def parse_portals(answer: Any, host: str) -> tuple[Port, ...]:
    """The ports in another node's answer, numbered from 1; nothing of one that is malformed.

    ``host`` is where the node is reached: what a port that listens everywhere is told as.
    """
    found: list[Port] = []
    try:
        for address, service, discovery_only in answer[:PORTS_MAX]:
            usable = type(address) is str and address.isascii() and len(address) <= ADDRESS_CHARACTERS_MAX
            if not usable or type(service) is not int or not 0 < service <= 0xFFFF:
                return ()
            told = host if address in ("0.0.0.0", "::", "") else address  # noqa: S104 - not bound to
            found.append(Port(len(found) + 1, told, service, bool(discovery_only)))
    except (TypeError, ValueError):
        return ()
    return tuple(found)


@attrs.define(eq=False)
class Portals:
    """Where the other members serve the same subsystem, as they last said.

    A member that does not answer is where it was: it may be back before hosts have noticed.
    """

    known: dict[int, tuple[Port, ...]] = attrs.field(factory=dict)

    def learn(self, members: dict[int, str], answers: dict[int, Any]) -> None:
        """Takes note of ``answers``, by node; ``members`` are all the others with the hosts they are at."""
        for node in self.known.keys() - members.keys():
            del self.known[node]
        for node, answer in answers.items():
            first = first_port(node)
            ports = parse_portals(answer, members[node])
            self.known[node] = tuple(attrs.evolve(each, number=first + each.number - 1) for each in ports)

    def told(self) -> tuple[list[Port], list[Referral]]:
        """Their ports, and a discovery service of each."""
        ports = [port for _, each in sorted(self.known.items()) for port in each]
        last = [each[-1] for _, each in sorted(self.known.items()) if each]
        referrals = [Referral(each.address, each.service, number=each.number, same=True) for each in last]
        return ports, referrals


# --- the view --------------------------------------------------------------------------------------


class NvmeViews(NodeViews[NvmeOptions]):
    """The NVMe view of a node; there is one at a time, as all of it is one subsystem."""

    protocol = "NVMe"
    log = log

    def __init__(self, home: Path, node: ClusterNode, store_of: Callable[[str], Member]) -> None:
        """The views of a node, with its directory and the shard each source is in."""
        super().__init__()
        self._home = home
        self._node = node
        self._store_of = store_of
        self._portals: list[list[Any]] = []

    def portals(self) -> list[list[Any]]:
        """Where this node serves, for its peers: address, port and whether it is for discovery alone."""
        running = self._running
        return list(self._portals) if running is not None and running.is_alive() else []

    async def _serve(self, running: Running[NvmeOptions]) -> None:
        begun = time.monotonic()
        over = running.told_to_end()
        self._portals = []
        if over.is_set():
            return
        options = running.options
        async with contextlib.AsyncExitStack() as stack:
            await asyncio.to_thread(self._settle)
            writers: dict[int, BlockWriter] = {}
            if not options.read_only:
                for number, store in enumerate(self._node.stores):
                    writers[number] = BlockWriter(store)
                    stack.push_async_callback(writers[number].close)
            place = NodePlace(self._node, self._store_of, writers)
            view = await View.open(place, options.sources, options.access)
            stack.push_async_callback(view.close)
            leadership = Leadership(self._node.stores)
            _tell_leaders(view, leadership)
            await view.listen(options.listen, first_port=first_port(self._node.config.node))
            self._portals = [[each.address, each.service, each.discovery_only] for each in view.ports]
            running.view = self._view(view, options)
            stack.enter_context(views.registered(self._home, running.view))
            for work in (_follow_leaders(view, leadership), self._follow_portals(view)):
                stack.push_async_callback(_cancelled, asyncio.create_task(work))
            if not running.ready.done():
                ready_ms = round((time.monotonic() - begun) * 1000, 1)
                running.ready.set_result({**running.view, "ready_ms": ready_ms})
            log.info("NVMe is served at %s", running.view["target"])
            await view.follow(over)

    def _settle(self) -> None:
        """Waits a little for a leader, to begin with what is newest; what is here has to do without one."""
        check_apart([self._node.config.node, *self._node.store.members()])
        for store in self._node.stores:
            with contextlib.suppress(UnavailableError):
                store.group.barrier(seconds=CONFIRM_SECONDS)

    def _view(self, view: View, options: NvmeOptions) -> Document:
        document = view.document()
        return {
            "view": "nvme",
            "name": f"nvme-{os.getpid()}",
            "source": ", ".join(options.sources),
            "at": None,
            "target": document["address"],
            **document,
            "pid": os.getpid(),
            "started_ns": time.time_ns(),
            "node": True,
        }

    async def _follow_portals(self, view: View) -> None:
        """Tells hosts where the other nodes serve."""
        portals = Portals()
        while True:
            try:
                members, answers = await asyncio.to_thread(ask_others, self._node, METHOD)
            except SpaceError as error:
                log.debug("where others serve: %s", error)
            else:
                portals.learn(members, answers)
                view.target.set_others(*portals.told())
            await asyncio.sleep(PORTALS_SECONDS)


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _tell_leaders(view: View, leadership: Leadership) -> None:
    for number, state in enumerate(leadership.states(time.monotonic())):
        view.subsystem.set_ana(number + 1, state)


async def _follow_leaders(view: View, leadership: Leadership) -> None:
    """Tells hosts when a shard is led by another node, or by none."""
    while True:
        _tell_leaders(view, leadership)
        await asyncio.sleep(LEADER_LOOK_SECONDS)

"""A node as who carries out calls: what it answers beside the operations of a store, and which shard answers those.

With several shards a call goes to the shard of its capsule, and to the one with the tree if it names a path or
nothing.  A call is one look: one ReadIndex at its beginning serves all of it.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from space._errors import NotFoundError, NotLeaderError, UnavailableError, UsageError
from space._node.caller import Caller, Document, Terms
from space._node.enrolment import INVITATION
from space._node.keys_calls import NodeKeyCalls
from space._node.keys_nodes import METHOD as KEYS_METHOD
from space._node.keys_nodes import answer
from space._node.mounts import Mounts
from space._node.nfs_node import METHOD as NFS_METHOD
from space._node.nfs_node import NfsOptions, NfsViews
from space._node.nvme_node import METHOD as NVME_METHOD
from space._node.nvme_node import NvmeOptions, NvmeViews
from space._node.policy_calls import plan_document
from space._node.service import Service, methods
from space.events.ids import CapsuleId

if TYPE_CHECKING:
    from space._node.cluster import ClusterNode
    from space._node.csi_cluster import CsiNode
    from space._node.member import Member

LEADER_SECONDS: Final = 30.0
CALL_SECONDS: Final = 3600.0
"""A collection on the leader reads its whole log."""

PROGRESS_SECONDS: Final = 0.5
CSI: Final = "csi"
"""How calls about volumes begin, and what nodes ask each other about them."""


class NodeService(NodeKeyCalls):
    """What can be asked of a node beyond the operations of a store; arguments and results are plain data."""

    def __init__(self, target: NodeTarget, caller: Caller) -> None:
        self._target = target
        self._node = target.node
        self._caller = caller

    def owner(self) -> Document:
        """The process, its node and its data directory; answered without asking another node."""
        node = self._node
        return {
            "pid": os.getpid(),
            "data": str(node.home.absolute()),
            "position": node.store.applied_now.position,
            "node": node.config.node,
            "cluster": str(uuid.UUID(bytes=node.config.cluster)),
            "shards": node.config.shards,
            "nvme": self._target.nvme.target(),
            "nfs": self._target.nfs.target(),
        }

    def cluster_status(self) -> Document:
        """Shards with leader, term and nodes; what the nodes of the cluster that answer say."""
        return self._node.status()

    def cluster_add(self, *, node: int, address: str) -> Document:
        """Adds a node; done when it votes in every shard."""
        from space.replication.node import parse_address

        parse_address(address)
        self._change("add", node, address)
        return {"node": node, "address": address}

    def cluster_remove(self, *, node: int) -> Document:
        """Removes a node from every shard."""
        self._change("remove", node, "")
        return {"node": node}

    def cluster_lead(self, *, node: int, shard: int | None = None) -> Document:
        """Lets a node lead one shard, or all."""
        if shard is not None and shard not in range(self._node.config.shards):
            raise NotFoundError(f"no shard {shard}", hint=f"there are {self._node.config.shards}, from 0")
        self._change("lead", node, "", shard)
        return {"node": node, "shard": shard}

    def policy_plan(self, *, since: int = 0) -> Document:
        """What the policies ask for now, of zones and of nodes."""
        from space._node import federation_actions as actions

        store = self._node.store
        planned = actions.plan(store, _Nodes(self), since=since)
        return plan_document(store, [actions.describe(store, each.action) for each in planned])

    def policy_apply(self, *, since: int = 0) -> Document:
        """Does what the policies ask for now, of zones and of nodes."""
        from space._node import federation_actions as actions

        return plan_document(self._node.store, actions.apply(self._node.store, _Nodes(self), since=since))

    def _change(self, what: str, node: int, address: str, shard: int | None = None) -> None:
        """Carries a change out beside this thread, which tells how far it is."""
        failed: list[BaseException] = []

        def work() -> None:
            try:
                self._node.change_members(what, node, address, shard)
            except BaseException as error:  # noqa: BLE001 - raised again below, in the caller's thread
                failed.append(error)

        thread = threading.Thread(target=work, name="space-change", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(PROGRESS_SECONDS)
            if thread.is_alive() and what == "add":
                self._tell(node)
        if failed:
            raise failed[0]

    def _tell(self, node: int) -> None:
        """How far a new node is."""
        with contextlib.suppress(UnavailableError):
            for shard in self._node.status()["shards"]:
                found = next((each for each in shard["nodes"] if each["id"] == node), None)
                if found is not None and found["position"] is not None:
                    position = found["position"]
                    self._caller.progress({"position": position, "last": position + found["lag"]})

    def cluster_invite(
        self, *, target: str, node: int | None = None, client: str | None = None, hosts: str = ""
    ) -> Document:
        """Writes the certificate of a node to be, or of a client, below the absolute path ``target``."""
        from datetime import UTC, datetime

        from space._node.cluster import AUTHORITY, TLS, invite
        from space.replication.certificates import issue_client

        home, config = self._node.home, self._node.config
        if (node is None) == (client is None):
            raise UsageError("either a node or a client is invited")
        if client is not None:
            authority = home / TLS / AUTHORITY
            if not authority.exists():
                raise NotFoundError(
                    f"no authority at {authority}", hint="ask the node that founded the cluster"
                )
            issue_client(authority, Path(target), client, now=datetime.now(UTC))
            return {"client": client, "directory": target}
        invite(home, int(node or 0), Path(target), hosts=hosts.split())
        peers = {**config.peers, config.node: self._node.node.address}
        document = {"shards": config.shards, "peers": {str(each): peers[each] for each in sorted(peers)}}
        (Path(target) / INVITATION).write_text(json.dumps(document))
        return {"node": node, "directory": target}

    def gc(self, *, dry_run: bool = False) -> Document:
        """Gives back what no kept moment can reach, in every shard, on its leader."""
        reports = [
            self._target.on_leader(number, dry_run=dry_run) for number in range(self._node.config.shards)
        ]
        return _sum(reports, ("bytes_given_back", "frames", "capsules_purged", "clients_forgotten"))

    def verify(self, *, repair: bool = False) -> Document:
        """Checks every checksum, chain link and reference of every shard, on this node."""
        reports = []
        for store in self._node.stores:
            with store.relaxed(math.inf):
                store.confirm()
                reports.append(Service(store, self._caller).verify(repair=repair))
        totals = _sum(reports, ("segments", "batches", "events", "payload_bytes", "repaired", "destroyed"))
        return {**totals, "findings": [each for report in reports for each in report["findings"]]}

    def unnamed(self, *, at: str | None = None) -> Iterator[Document]:
        """Capsules no path leads to, in all shards."""
        return itertools.chain.from_iterable(
            self._target.stream(store, Terms(), Service(store, self._caller).unnamed(at=at))
            for store in self._node.stores
        )

    def mount(self, *, source: str, target: str, read_only: bool = False) -> Document:
        """Mounts a tree or capsule in the node's own process."""
        return self._target.mounts.mount(self._target.reading_for, source, target, read_only=read_only)

    def serve_nvme(
        self,
        *,
        sources: list[str],
        listen: str,
        read_only: bool = False,
        hosts: list[str] | None = None,
        host_keys: list[str] | None = None,
        controller_key: str | None = None,
    ) -> Document:
        """Serves capsules (ids or paths) to NVMe/TCP hosts in the node's own process."""
        from space._node.nvme_access import parse_access
        from space._node.nvme_view import parse_listen

        access = parse_access(hosts or [], host_keys or [], controller_key)
        options = NvmeOptions(tuple(sources), parse_listen(listen), read_only, access)
        return self._target.nvme.serve(options)

    def serve_nfs(
        self,
        *,
        sources: list[str],
        listen: str,
        read_only: bool = False,
        squash: str = "root",
        clients: list[str] | None = None,
        lease: int | None = None,
        grace: int | None = None,
        refer: list[str] | None = None,
    ) -> Document:
        """Exports trees and capsules (paths or ids) to NFS clients in the node's own process."""
        from space._node.nfs_view import parse_options
        from space._node.nvme_view import parse_listen

        offer = parse_options(
            read_only=read_only,
            squash=squash,
            clients=clients or [],
            lease=lease,
            grace=grace,
            refer=refer or [],
        )
        return self._target.nfs.serve(NfsOptions(tuple(sources), parse_listen(listen), offer))

    def unmount(self, *, target: str) -> Document:
        """Ends a view of the node (a mount, or what is served at an address) and waits until it is gone."""
        node = self._target
        ended = node.nvme.end(target) or node.nfs.end(target) or node.end_csi(target)
        return ended or node.mounts.end(target)


class _Nodes:
    """The cluster as the policy compiler's :class:`space._node.federation_actions.Nodes`."""

    def __init__(self, service: NodeService) -> None:
        self._service = service

    def status(self) -> Document:
        return self._service.cluster_status()

    def lead(self, shard: int, node: int) -> None:
        self._service.cluster_lead(node=node, shard=shard)


def _sum(reports: list[Document], names: tuple[str, ...]) -> Document:
    """The first report, with the numbers of all."""
    total = dict(reports[0])
    for name in names:
        total[name] = sum(report[name] for report in reports)
    return total


NODE_METHODS: Final[Mapping[str, Callable[..., Any]]] = {
    name: method
    for made in (NodeKeyCalls, NodeService)
    for name, method in vars(made).items()
    if callable(method) and name[0] != "_"
}


class NodeTarget:
    """A node with its shards, as who carries out calls."""

    def __init__(self, node: ClusterNode, mounts: Mounts) -> None:
        self.node = node
        self.mounts = mounts
        self.nvme = NvmeViews(node.home, node, self.reading_for)
        self.nfs = NfsViews(node.home, node, self.reading_for)
        self._csi: CsiNode | None = None
        self._csi_lock = threading.Lock()
        self.calls = 0
        node.node.on_call = self._for_a_peer

    @property
    def path(self) -> Path:
        return self.node.home

    def find(self, method: str) -> Callable[..., Any] | None:
        if method.startswith(CSI):
            return self.csi.find(method)
        return NODE_METHODS.get(method) or methods().get(method)

    def call(self, method: str, arguments: Document, caller: Caller, terms: Terms) -> Any:
        self.calls += 1
        if method.startswith(CSI):
            return self.csi.call(method, arguments, terms)
        if (own := NODE_METHODS.get(method)) is not None:
            return own(NodeService(self, caller), **arguments)
        store = self._store_for(method, arguments, terms)
        work = methods()[method]
        if inspect.isgeneratorfunction(work):
            return self.stream(store, terms, work(Service(store, caller, terms), **arguments))
        with _looking(store, terms):
            return work(Service(store, caller, terms), **arguments)

    # --- volumes -------------------------------------------------------------------------------------

    @property
    def csi(self) -> CsiNode:
        """Volumes for the CSI driver, from the first use on: they need packages of their own.

        Raises:
            UnavailableError: those are not installed.
        """
        with self._csi_lock:
            if self._csi is None:
                try:
                    from space._node.csi_cluster import CsiNode
                except ModuleNotFoundError as error:
                    raise UnavailableError(
                        f"volumes of the CSI driver need the Python package {error.name}",
                        hint="pip install 'space-store[csi]'",
                    ) from None

                self._csi = CsiNode(self.node.home, self.node)
            return self._csi

    def end_csi(self, target: str) -> Document | None:
        """Ends volumes being served at an address."""
        return None if self._csi is None else self._csi.end(target)

    def retire(self, seconds: float) -> None:
        """No view takes more, and what is under way may end so long."""
        for each in (self.nvme, self.nfs, self._csi):
            if each is not None:
                each.retire(seconds)

    def close(self) -> None:
        """Waits until all views have ended; the node has stopped."""
        for each in (self.nvme, self.nfs, self._csi):
            if each is not None:
                each.close()

    def stream(self, store: Member, terms: Terms, items: Iterator[Any]) -> Iterator[Any]:
        """Items of one look at a store, taken by one thread."""
        with _looking(store, terms):
            yield from items

    # --- placement -----------------------------------------------------------------------------------

    def _store_for(self, method: str, arguments: Document, terms: Terms) -> Member:
        """The shard of the capsule a call is about; the one with the tree for a path, or for nothing."""
        tree = self.node.store
        if self.node.config.shards == 1:
            return tree
        if method in ("put", "create") and arguments.get("name") is None:
            arguments.setdefault("id", str(tree.new_id()))
            return self.node.store_of(CapsuleId.parse(arguments["id"]))
        named = [arguments.get(each) for each in ("capsule", "path", "source")]
        text = next((each for each in named if isinstance(each, str)), None)
        if text is None or text.startswith("/"):
            return tree
        store = self._holder(CapsuleId.parse(text), terms)
        if (
            store is not tree
            and method in ("clone", "undelete")
            and (arguments.get("to") or arguments.get("target"))
        ):
            raise UsageError(
                f"capsule {text} is not in the shard of the tree, and gets no name there",
                hint="put or copy its bytes",
            )
        return store

    def _holder(self, capsule: CapsuleId, terms: Terms) -> Member:
        """Where a capsule is: the shard its id is placed in, or, if it was given a name, the one with the tree."""
        store = self.node.store_of(capsule)
        if store is not self.node.store:
            with _looking(store, terms), contextlib.suppress(NotFoundError):
                store.stat(capsule)
                return store
            with _looking(self.node.store, terms), contextlib.suppress(NotFoundError):
                self.node.store.stat(capsule)
                return self.node.store
        return store

    def reading_for(self, source: str) -> Member:
        """The store a view of ``source`` reads."""
        return self.node.store if source.startswith("/") else self._holder(CapsuleId.parse(source), Terms())

    # --- what only a leader can ----------------------------------------------------------------------

    def on_leader(self, shard: int, *, dry_run: bool) -> Document:
        """Has the leader of a shard, wherever it is, collect its garbage."""
        deadline = time.monotonic() + LEADER_SECONDS
        method = "gc dry" if dry_run else "gc"
        while True:
            try:
                return self._ask_leader(shard, method)
            except NotLeaderError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(PROGRESS_SECONDS / 5)

    def _ask_leader(self, shard: int, method: str) -> Document:
        leader = self.node.stores[shard].group.replica.driver.leader
        if leader == self.node.config.node:
            return self._collect(shard, method)
        if not leader:
            raise NotLeaderError(f"shard {shard} has no leader now", hint="space cluster status")

        def ask(node: Any) -> Any:
            return node.transport.request(leader, "call", [shard, method], timeout=CALL_SECONDS)

        answer, _ = self.node.call(ask, seconds=CALL_SECONDS)
        if not isinstance(answer, dict):
            raise UnavailableError(f"node {leader} gave a malformed answer", hint="is it older or newer?")
        return answer

    def _for_a_peer(self, shard: int, method: str) -> Any:
        if method == NVME_METHOD:
            return self.nvme.portals()
        if method == NFS_METHOD:
            return self.nfs.claim()
        if method.startswith(CSI):
            return None if self._csi is None else self._csi.answer(method)
        if method.startswith(KEYS_METHOD):
            return answer(self.node.stores, shard, method)
        if method not in ("gc", "gc dry"):
            raise UsageError(f"no such operation for a leader: {method!r:.40}", hint="is this node older?")
        return self._collect(shard, method)

    def _collect(self, shard: int, method: str) -> Document:
        return Service(self.node.stores[shard], Caller()).gc(dry_run=method == "gc dry")


@contextlib.contextmanager
def _looking(store: Member, terms: Terms) -> Iterator[None]:
    """One look: what was acknowledged before it began is seen, at the cost of one question to the leader."""
    if terms.stale:
        with store.stale():
            yield
    else:
        with store.relaxed(math.inf):
            store.confirm()
            yield

"""A node in the foreground: what ``space serve`` runs, and what it answers beside the operations of a store.

A directory decides what becomes of it: one with ``node.json`` goes on as the node it is; an empty one with a
certificate (or told which cluster to join) waits to be added; any other becomes the first node of a cluster.
Without the consensus engine a store is served alone.

With several shards a call goes to the shard of its capsule, and to the one with the tree if it names a path or
nothing.  A call is one look: one ReadIndex at its beginning serves all of it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import itertools
import json
import logging
import math
import os
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import attrs

from space._errors import (
    CorruptionError,
    NotFoundError,
    NotLeaderError,
    UnavailableError,
    UsageError,
)
from space._node.caller import Caller, Document, Terms
from space._node.calls import StoreTarget, Target
from space._node.mounts import Mounts
from space._node.service import Service, methods
from space.events.ids import CapsuleId

if TYPE_CHECKING:
    from space._node.cluster import ClusterNode, NodeConfig
    from space._node.http import HttpServer
    from space._node.member import Member
    from space._node.store import Store

INVITATION: Final = "invitation.json"
"""Beside the certificate of a node that was invited: how many shards there are, and where its peers are."""

RETIRE_SECONDS: Final = 2.0
"""How long calls that are being answered may take to end when the node stops: callers try another node after that."""

WATCH_SECONDS: Final = 0.2
LEADER_SECONDS: Final = 30.0
CALL_SECONDS: Final = 3600.0
"""A collection on the leader reads its whole log."""

PROGRESS_SECONDS: Final = 0.5
CONTROL_SOCKET: Final = "control.sock"
ENGINE_HINT: Final = "pip install 'space-store[cluster]', or tools/setup in a checkout"

log: Final = logging.getLogger("space.serve")


def has_engine() -> bool:
    """Whether the consensus engine is installed."""
    return importlib.util.find_spec("space_raft_engine") is not None


@attrs.frozen
class ServeOptions:
    """What a node is told when it starts; what is None is as it was, or the default.

    Attributes:
        listen: HOST:PORT for its peers.
        advertise: HOST:PORT under which peers reach it, if another one.
        shards: how many shards a new cluster gets, or the one to join has.
        http: HOST:PORT for metrics, the status page and calls; none without.
        join: id of the cluster to wait for; the certificate knows it too.
        node: id of a node that joins without a certificate.
        tls: where its certificate is, if not in the data directory.
        insecure: no certificates; only on addresses of this machine.
        mounts: ``(target, path)`` to mount when it is ready.
    """

    listen: str | None = None
    advertise: str | None = None
    shards: int | None = None
    http: str | None = None
    join: str | None = None
    node: int | None = None
    tls: Path | None = None
    insecure: bool = False
    mounts: tuple[tuple[str, str], ...] = ()


# --- who a directory is ----------------------------------------------------------------------------


def prepare(home: Path, options: ServeOptions) -> NodeConfig:
    """The node a directory is, or becomes.

    Raises:
        UsageError: the options contradict each other or the directory.
    """
    from space._node.cluster import NodeConfig

    found = NodeConfig.load(home)
    if found is None:
        return _new_node(home, options)
    _refuse_change("--shards", options.shards, found.shards)
    _refuse_change("--node-id", options.node, found.node)
    _refuse_change(
        "--join", options.join and str(uuid.UUID(options.join)), str(uuid.UUID(bytes=found.cluster))
    )
    _refuse_change("--insecure", options.insecure or None, not found.tls)
    if options.tls is not None:
        _take_certificate(options.tls, home)
    changed = attrs.evolve(
        found,
        listen=options.listen or found.listen,
        advertise=found.advertise if options.advertise is None else options.advertise,
    )
    if changed != found:
        changed.save(home)
    return changed


def _refuse_change(flag: str, wanted: object, is_: object) -> None:
    if wanted is not None and wanted != is_:
        raise UsageError(f"{flag} {wanted}: this node has {is_}", hint=f"leave {flag} out")


def _new_node(home: Path, options: ServeOptions) -> NodeConfig:
    from space._node import cluster

    listen, advertise = options.listen or cluster.LISTEN, options.advertise or ""
    certificate = home / cluster.TLS
    if options.tls is not None:
        _take_certificate(options.tls, home)
    if options.insecure and options.join:
        if options.node is None:
            raise UsageError("--join with --insecure needs to know which node this is", hint="--node-id N")
        return cluster.join(
            home,
            node=options.node,
            cluster=_cluster_id(options.join),
            listen=listen,
            advertise=advertise,
            shards=options.shards or 1,
            tls=False,
        )
    if (
        not options.insecure
        and (certificate / "node.pem").exists()
        and not (certificate / cluster.AUTHORITY).exists()
    ):
        return _invited(home, certificate, options, listen, advertise)
    if options.join:
        raise UsageError(
            f"no certificate in {certificate}",
            hint="space cluster invite N --out DIR on the first node makes one",
        )
    _refuse_change("--node-id", options.node, 1)
    return cluster.found(
        home,
        listen=listen,
        advertise=advertise,
        shards=1 if options.shards is None else options.shards,
        tls=not options.insecure,
    )


def _invited(home: Path, certificate: Path, options: ServeOptions, listen: str, advertise: str) -> NodeConfig:
    from space._node import cluster
    from space.replication.certificates import Tls

    identity = Tls.load(certificate).identity
    if not identity.node:
        raise UsageError(f"the certificate in {certificate} is a client's, not a node's")
    _refuse_change("--node-id", options.node, identity.node)
    if options.join is not None and _cluster_id(options.join) != identity.cluster:
        raise UsageError(
            f"the certificate in {certificate} is of cluster {uuid.UUID(bytes=identity.cluster)}"
        )
    shards, peers = _read_invitation(certificate / INVITATION)
    _refuse_change("--shards", options.shards if shards else None, shards)
    return cluster.join(
        home,
        node=identity.node,
        cluster=identity.cluster,
        listen=listen,
        advertise=advertise,
        shards=shards or options.shards or 1,
        peers=peers,
    )


def _read_invitation(path: Path) -> tuple[int, dict[int, str]]:
    try:
        document = json.loads(path.read_text())
        return int(document["shards"]), {int(node): str(each) for node, each in document["peers"].items()}
    except FileNotFoundError:
        return 0, {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptionError(f"{path} is damaged: {error!r:.100}", segment=path.name) from None


def _cluster_id(text: str) -> bytes:
    try:
        return uuid.UUID(text).bytes
    except ValueError:
        raise UsageError(
            f"not the id of a cluster: {text!r:.60}", hint="space cluster status shows it"
        ) from None


def _take_certificate(source: Path, home: Path) -> None:
    """Copies certificate, key and authority into the data directory."""
    from space._node.cluster import TLS
    from space.replication.certificates import AUTHORITY_FILE, CERTIFICATE_FILE, KEY_FILE

    target = home / TLS
    if source.resolve() == target.resolve():
        return
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    target.mkdir(mode=0o700, exist_ok=True)
    for name in (AUTHORITY_FILE, CERTIFICATE_FILE, KEY_FILE, INVITATION):
        try:
            shutil.copy(source / name, target / name)
        except FileNotFoundError:
            if name != INVITATION:
                raise NotFoundError(f"{source / name} is missing") from None
        except OSError as error:
            raise UsageError(f"cannot copy {source / name}: {error.strerror}") from None


# --- what a node answers ---------------------------------------------------------------------------


class NodeService:
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
        totals = _sum(reports, ("segments", "batches", "events", "payload_bytes", "repaired"))
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

    def unmount(self, *, target: str) -> Document:
        """Ends a mount of the node and waits until it is gone."""
        return self._target.mounts.end(target)


def _sum(reports: list[Document], names: tuple[str, ...]) -> Document:
    """The first report, with the numbers of all."""
    total = dict(reports[0])
    for name in names:
        total[name] = sum(report[name] for report in reports)
    return total


NODE_METHODS: Final[Mapping[str, Callable[..., Any]]] = {
    name: method for name, method in vars(NodeService).items() if callable(method) and name[0] != "_"
}


class NodeTarget:
    """A node with its shards, as who carries out calls."""

    def __init__(self, node: ClusterNode, mounts: Mounts) -> None:
        self.node = node
        self.mounts = mounts
        self.calls = 0
        node.node.on_call = self._for_a_peer

    @property
    def path(self) -> Path:
        return self.node.home

    def find(self, method: str) -> Callable[..., Any] | None:
        return NODE_METHODS.get(method) or methods().get(method)

    def call(self, method: str, arguments: Document, caller: Caller, terms: Terms) -> Any:
        self.calls += 1
        if (own := NODE_METHODS.get(method)) is not None:
            return own(NodeService(self, caller), **arguments)
        store = self._store_for(method, arguments, terms)
        work = methods()[method]
        if inspect.isgeneratorfunction(work):
            return self.stream(store, terms, work(Service(store, caller, terms), **arguments))
        with _looking(store, terms):
            return work(Service(store, caller, terms), **arguments)

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
            return self._for_a_peer(shard, method)
        if not leader:
            raise NotLeaderError(f"shard {shard} has no leader now", hint="space cluster status")

        def ask(node: Any) -> Any:
            return node.transport.request(leader, "call", [shard, method], timeout=CALL_SECONDS)

        answer, _ = self.node.call(ask, seconds=CALL_SECONDS)
        if not isinstance(answer, dict):
            raise UnavailableError(f"node {leader} gave a malformed answer", hint="is it older or newer?")
        return answer

    def _for_a_peer(self, shard: int, method: str) -> Document:
        if method not in ("gc", "gc dry"):
            raise UsageError(f"no such operation for a leader: {method!r:.40}", hint="is this node older?")
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


# --- in the foreground -----------------------------------------------------------------------------


class Listener(Protocol):
    """The control socket of a target."""

    def retire(self, seconds: float) -> None:
        """Takes no more calls, and ends those being answered."""

    def close(self) -> None:
        """Waits until they have ended."""


def serve(
    home: Path,
    options: ServeOptions,
    *,
    listen: Callable[[Target], Listener],
    announce: Callable[[Document, str], None],
) -> None:
    """Runs a node until SIGTERM or SIGINT, or until it fails.  Call it from the main thread.

    ``listen`` opens the control socket; ``announce`` is called once when the node answers, with what it is and a
    notice for people, if there is one.

    Raises:
        SpaceError: it cannot start, or had to stop.
    """
    over = _signalled()
    if has_engine():
        with _stopping(Running(home, options, listen)) as running:
            announce(running.document(), "")
            running.wait(over)
    else:
        with _stopping(RunningAlone(home, options, listen)) as alone:
            announce(
                alone.document(),
                f"one node, which cannot grow: the consensus engine is missing; {ENGINE_HINT}",
            )
            over.wait()


def _signalled() -> threading.Event:
    """Set by the first SIGTERM or SIGINT."""
    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: over.set())
    return over


class _Stoppable(Protocol):
    def stop(self) -> None:
        """Ends everything, in order."""


_S = TypeVar("_S", bound=_Stoppable)


@contextlib.contextmanager
def _stopping(running: _S) -> Iterator[_S]:
    try:
        yield running
    finally:
        running.stop()


class Running:
    """A node with its ways in."""

    def __init__(self, home: Path, options: ServeOptions, listen: Callable[[Target], Listener]) -> None:
        """Starts everything.

        Raises:
            SpaceError: it cannot; then nothing is left running.
        """
        from space._node.cluster import ClusterNode

        self._listener: Listener | None = None
        self._http: HttpServer | None = None
        self._mounts = Mounts(home)
        self.node = ClusterNode(home, prepare(home, options))
        try:
            self._target = NodeTarget(self.node, self._mounts)
            if options.http is not None:
                self._http = _http(self._target, options, self.node)
            self._listener = listen(self._target)
            for target, path in options.mounts:
                self._mounts.mount(self._target.reading_for, path, target, read_only=False)
        except BaseException:
            self.stop()
            raise

    def document(self) -> Document:
        """What the command prints when the node is ready."""
        config = self.node.config
        return {
            "node": config.node,
            "cluster": str(uuid.UUID(bytes=config.cluster)),
            "shards": config.shards,
            "peer": self.node.node.address,
            **_where(self.node.home, self._http),
        }

    def wait(self, over: threading.Event) -> None:
        """Returns when it is told to end.

        Raises:
            SpaceError: the node had to stop.
        """
        while not over.wait(WATCH_SECONDS):
            if self.node.ended.is_set():
                raise self.node.failure or UnavailableError(f"node {self.node.config.node} has stopped")

    def stop(self) -> None:
        """Hands over, ends what is being answered, and closes; callers go on with another node."""
        if self._listener is not None:
            self._listener.retire(RETIRE_SECONDS)
        if self._http is not None:
            self._http.retire(RETIRE_SECONDS)
        self._mounts.close()
        self.node.stop()
        if self._http is not None:
            self._http.close()
        if self._listener is not None:
            self._listener.close()
        self.node.close()


class RunningAlone:
    """A single-node store with its ways in, where there is no engine."""

    def __init__(self, home: Path, options: ServeOptions, listen: Callable[[Target], Listener]) -> None:
        """Starts everything.

        Raises:
            UsageError: an option needs the engine.
            SpaceError: the store cannot be opened.
        """
        from space._node.store import Store

        wanted = {"--join": options.join, "--node-id": options.node, "--shards": options.shards}
        for flag, value in wanted.items():
            if value is not None:
                raise UnavailableError(f"{flag} needs the consensus engine", hint=ENGINE_HINT)
        if options.mounts:
            raise UnavailableError("--mount of a node needs the consensus engine", hint="space project mount")
        self._http: HttpServer | None = None
        self._store: Store = Store(home)
        try:
            target = StoreTarget(self._store)
            self._http = _http(target, options, None) if options.http is not None else None
            self._listener = listen(target)
        except BaseException:
            if self._http is not None:
                self._http.retire(0)
                self._http.close()
            self._store.close()
            raise

    def document(self) -> Document:
        """What the command prints when the store answers."""
        alone = {"node": None, "cluster": None, "shards": 1, "peer": None}
        return {**alone, **_where(self._store.path, self._http)}

    def stop(self) -> None:
        """Ends what is being answered, and closes."""
        self._listener.retire(RETIRE_SECONDS)
        if self._http is not None:
            self._http.retire(RETIRE_SECONDS)
            self._http.close()
        self._listener.close()
        self._store.close()


def _where(home: Path, http: HttpServer | None) -> Document:
    """Where a process answers."""
    return {
        "url": f"unix://{home.absolute() / CONTROL_SOCKET}",
        "http": None if http is None else http.url,
        "pid": os.getpid(),
        "data": str(home.absolute()),
    }


def _http(target: Target, options: ServeOptions, node: ClusterNode | None) -> HttpServer:
    """Begins to answer over HTTP.

    Raises:
        UnavailableError: aiohttp is not installed.
        UsageError: the address is of another machine's reach, and there is no certificate.
    """
    if importlib.util.find_spec("aiohttp") is None:
        raise UnavailableError(
            "--http needs the Python package aiohttp", hint="pip install 'space-store[cluster]'"
        )
    from space._node.http import HttpServer

    return HttpServer(target, str(options.http), node=node)

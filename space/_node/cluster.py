"""A running node of a cluster: its identity, its shards, its loop's thread, and how it joins and is healed.

A data directory of a node is that of a single store (shard 0) with three things more: ``node.json`` (who it is
and where its peers were last), ``wal/raft`` (its Raft state) and ``tls/`` (its certificate), and
``shards/NNNN/`` for further shards.  A store that was alone becomes the first node of a cluster by one record
in its log, which names it as the only voter; nothing is copied.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import random
import ssl
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

import attrs
from blake3 import blake3

from space._errors import (
    CorruptionError,
    NotFoundError,
    SpaceError,
    StorageError,
    UnavailableError,
    UsageError,
)
from space._node.caller import Document
from space._node.federation_nodes import METHODS, ClusterNodes, answer
from space._node.loops import run_loop
from space._node.member import HEAL_FILE, Member, MemberMachine
from space._node.store import FORMAT_FILE, WAL, Store, clear_errors, read_format
from space.events.ids import ROOT, CapsuleId
from space.replication.certificates import Tls, create_authority, issue
from space.replication.driver import Settings
from space.replication.group import Group
from space.replication.node import Node, parse_address
from space.replication.replica import Replica, encode_change_batch, encode_change_context
from space.replication.transport import Transport
from space.statemachine.tables import format_digest
from space.wal.disk import RealDisk
from space.wal.log import Log
from space.wal.raft_state import Configuration, RaftState, RaftStateFile, read_raft_state
from space.wal.shipping import Chunk, decode_chunk

NODE_FILE: Final = "node.json"
SHARDS: Final = "shards"
TLS: Final = "tls"
AUTHORITY: Final = "authority"
LISTEN: Final = "127.0.0.1:7420"
SHARDS_MAX: Final = 256
HEAL_SECONDS: Final = 60.0
CHUNK_SECONDS: Final = 10.0
HEAL_RETRY_SECONDS: Final = 0.2
READY_SECONDS: Final = 30.0
REMEMBER_SECONDS: Final = 0.2
"""How soon a new member knows in its file where the others are: without, it cannot heal."""


log: Final = logging.getLogger("space.cluster")


@attrs.frozen
class NodeConfig:
    """Who a node is: what ``node.json`` holds.

    Attributes:
        node: its id, from 1.
        cluster: id of the cluster, which is the id of its first shard's log.
        shards: how many shards the cluster has; fixed when it is founded.
        listen: HOST:PORT for its peers.
        advertise: HOST:PORT under which peers reach it, if another one.
        tls: whether peers prove who they are by certificate; without, only addresses of this machine are allowed.
        peers: node id → address, as last known: for healing, when the state cannot be read.
    """

    node: int
    cluster: bytes
    shards: int = 1
    listen: str = LISTEN
    advertise: str = ""
    tls: bool = True
    peers: dict[int, str] = attrs.field(factory=dict)

    def save(self, home: Path) -> None:
        """Writes ``node.json``, whole or not at all."""
        document = attrs.asdict(self)
        document["cluster"] = str(uuid.UUID(bytes=self.cluster))
        document["peers"] = {str(node): address for node, address in self.peers.items()}
        temporary = home / (NODE_FILE + ".new")
        with temporary.open("w") as file:
            json.dump(document, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(home / NODE_FILE)

    @classmethod
    def load(cls, home: Path) -> NodeConfig | None:
        """What ``node.json`` says; None if there is none.

        Raises:
            CorruptionError: it is damaged.
        """
        try:
            document = json.loads((home / NODE_FILE).read_text())
            return cls(
                node=int(document["node"]),
                cluster=uuid.UUID(document["cluster"]).bytes,
                shards=int(document["shards"]),
                listen=str(document["listen"]),
                advertise=str(document["advertise"]),
                tls=bool(document["tls"]),
                peers={int(node): str(address) for node, address in document["peers"].items()},
            )
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptionError(
                f"{home / NODE_FILE} is damaged: {error!r:.100}",
                segment=NODE_FILE,
                hint="write it anew: node id, cluster id, shards, listen, advertise, tls, peers",
            ) from None


def shard_home(home: Path, number: int) -> Path:
    """The directory of a shard."""
    return home if number == 0 else home / SHARDS / f"{number:04d}"


def shard_store(cluster: bytes, number: int) -> bytes:
    """The id of a shard's log."""
    if number == 0:
        return cluster
    return blake3(cluster + number.to_bytes(4, "big"), derive_key_context="space shard log v1").digest(16)


def tree_shard(count: int) -> int:
    """The shard that holds the tree of paths."""
    return ROOT.shard_keys(count)


def found(
    home: Path, *, listen: str = LISTEN, advertise: str = "", shards: int = 1, tls: bool = True
) -> NodeConfig:
    """Makes the store at ``home`` (a new one, if there is none) the only node of a cluster.

    Raises:
        UsageError: shards or address are unusable.
        UnavailableError: the store is in use.
    """
    parse_address(listen)
    if not 1 <= shards <= SHARDS_MAX:
        raise UsageError(f"a cluster has 1 to {SHARDS_MAX} shards, not {shards}")
    if shards > 1 and (home / FORMAT_FILE).exists():
        raise UsageError(
            f"{home} holds a store already, which is one shard", hint="a cluster of several begins empty"
        )
    Store(home).close()
    cluster = read_format(home / FORMAT_FILE)
    if cluster is None:
        raise CorruptionError(f"{home / FORMAT_FILE} is damaged", segment=FORMAT_FILE)
    config = NodeConfig(1, cluster, shards, listen, advertise, tls)
    if tls:
        authority = home / TLS / AUTHORITY
        if not authority.exists():
            create_authority(authority, cluster, now=datetime.now(UTC))
        issue(authority, home / TLS, 1, [parse_address(advertise or listen)[0]], now=datetime.now(UTC))
    for number in range(shards):
        _found_shard(shard_home(home, number), shard_store(cluster, number), advertise or listen)
    config.save(home)
    return config


def _found_shard(home: Path, store: bytes, address: str) -> None:
    from space_raft_engine import encode_change

    disk = RealDisk()
    directory = str(home / WAL)
    if read_raft_state(disk, directory, store_id=store) is not None:
        return
    if not (home / FORMAT_FILE).exists():
        from space._node.store import write_format

        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_format(home / FORMAT_FILE, store)
        (home / FORMAT_FILE).rename(home / (FORMAT_FILE + ".new"))
        Store(home).close()
    wal = Log.open(disk, directory, store_id=store)
    try:
        now = max(time.time_ns(), wal.last_time_ns)
        term = wal.last_term + 1
        change = encode_change([("add", 1)], context=encode_change_context(now, {1: address}))
        index = wal.append(encode_change_batch(change, now), time_ns=now, term=term)
        wal.sync()
        file = RaftStateFile.open(disk, directory, store_id=store)
        file.save(RaftState(1, term, 1, index, Configuration((1,)), index), sync=True)
        file.close()
    finally:
        wal.close()


def invite(home: Path, node: int, target: Path, *, hosts: list[str]) -> None:
    """Writes the certificate with which ``node`` can join: to be carried to its directory's ``tls``.

    Raises:
        NotFoundError: this node does not hold the cluster's authority.
    """
    config = NodeConfig.load(home)
    authority = home / TLS / AUTHORITY
    if config is None or not authority.exists():
        raise NotFoundError(
            f"no authority at {authority}", hint="invite on the node that founded the cluster"
        )
    issue(authority, target, node, hosts, now=datetime.now(UTC))


def join(
    home: Path,
    *,
    node: int,
    cluster: bytes,
    listen: str,
    advertise: str = "",
    shards: int = 1,
    tls: bool = True,
    peers: dict[int, str] | None = None,
) -> NodeConfig:
    """Prepares an empty directory for a node that will be added to a cluster.

    Raises:
        UsageError: it is not empty.
    """
    parse_address(listen)
    if (home / FORMAT_FILE).exists() or (home / WAL).exists():
        raise UsageError(
            f"{home} holds a store already", hint="a node that joins begins with an empty directory"
        )
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    config = NodeConfig(node, cluster, shards, listen, advertise, tls, peers or {})
    config.save(home)
    return config


class ClusterNode:
    """A running node: stores by shard, the loop's thread, and what people ask of the cluster."""

    def __init__(
        self,
        home: Path,
        config: NodeConfig,
        *,
        settings: Settings | None = None,
        tick_seconds: float | None = None,
        on_progress: Callable[[Any], None] | None = None,
    ) -> None:
        """Opens every shard (healing a damaged log from the peers), and starts.

        Raises:
            SpaceError: it cannot.
        """
        self.home = home
        self.config = config
        self._settings = settings or Settings()
        self._tick_seconds = tick_seconds
        self._tls = Tls.load(home / TLS) if config.tls else None
        if not config.tls:
            _check_local(config.listen)
        try:
            self._open_all(on_progress)
        except CorruptionError:
            # opening a log does not look at all of it: what starting needed of it, and was damaged, is noted
            if not config.peers or not any(self._noted(number) for number in range(config.shards)):
                raise
            self._open_all(on_progress)

    def _open_all(self, on_progress: Callable[[Any], None] | None) -> None:
        self.stores: list[Member] = []
        self.failure: SpaceError | None = None
        self.ended = threading.Event()
        self._started = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        try:
            with clear_errors(self.home):
                for number in range(self.config.shards):
                    self.stores.append(self._open(number, on_progress))
            self.store.nodes = ClusterNodes(self)
            self._start()
        except BaseException:
            self._close_stores()
            raise

    def _noted(self, number: int) -> bool:
        """Whether damage was met in a shard's log after it had been opened."""
        return (shard_home(self.home, number) / HEAL_FILE).exists()

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="space-node", daemon=True)
        self._thread.start()
        self._started.wait()  # set also when it breaks
        if self.failure is not None:
            self._thread.join()  # who closes the stores next does it after the loop's own threads have ended
            raise self.failure

    def _open(self, number: int, on_progress: Callable[[Any], None] | None) -> Member:
        home = shard_home(self.home, number)
        store = shard_store(self.config.cluster, number)

        def open_() -> Member:
            ships = number == tree_shard(self.config.shards)
            return Member(home, node=self.config.node, store=store, ships=ships, on_progress=on_progress)

        try:
            if not self.config.peers or not self._noted(number):
                return open_()
            error = CorruptionError(f"damage was found in {home} when it was last open")
        except CorruptionError as found_:
            error = found_
        if not self.config.peers:
            raise error  # nobody to ask
        log.warning(
            "shard %d of node %d is damaged (%s): fetching it from its peers",
            number,
            self.config.node,
            error,
        )
        try:
            asyncio.run(_heal(self, number, home, store))
        except UnavailableError as nobody:
            if not self._noted(number):
                raise
            # A log with damage that opens has all it acknowledged: nobody would lead if each waited for the others.
            log.warning("shard %d of node %d starts with its damage: %s", number, self.config.node, nobody)
            try:
                return open_()
            except CorruptionError:
                raise nobody from None
        (home / HEAL_FILE).unlink(missing_ok=True)
        return open_()

    @property
    def node(self) -> Node:
        """The node in the loop."""
        return self.stores[0].node

    @property
    def store(self) -> Member:
        """The shard with the tree."""
        return self.stores[tree_shard(self.config.shards)]

    def store_of(self, capsule: CapsuleId) -> Member:
        """The shard a capsule is placed in."""
        return self.stores[capsule.shard_keys(self.config.shards)]

    # --- the loop's thread -----------------------------------------------------------------------

    def _run(self) -> None:
        try:
            run_loop(self._main())
        except SpaceError as error:
            self.failure = self.failure or error
        except Exception as error:
            log.exception("node %d broke", self.config.node)
            self.failure = self.failure or StorageError(f"node {self.config.node} met {error!r}")
        finally:
            self._started.set()
            self.ended.set()

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        options: dict[str, Any] = {} if self._tick_seconds is None else {"tick_seconds": self._tick_seconds}
        node = Node(
            id=self.config.node,
            cluster=self.config.cluster,
            listen=parse_address(self.config.listen),
            advertise=self.config.advertise,
            tls=self._tls,
            random=random.Random(),
            on_fatal=self._failed,
            **options,
        )
        for number, store in enumerate(self.stores):
            try:
                replica = Replica(
                    log=store.wal,
                    state_file=store.state_file,
                    machine=MemberMachine(store),
                    settings=self._settings,
                    random=random.Random(),
                    incarnation=time.time_ns(),
                )
            except CorruptionError:
                store.heal_later()
                raise
            group = Group(node, number, replica, random_bytes=os.urandom, refuse=store.refuse)
            store.attach(node, group)
            node.add(group, store)
        node.answers |= {each: partial(answer, self.store, each) for each in METHODS}
        for peer, address in self.config.peers.items():
            if peer != self.config.node:
                node.transport.set_peer(peer, *parse_address(address))
        await node.start()
        remembering = asyncio.create_task(self._remember_peers(node))
        self._started.set()
        await self._stop.wait()
        remembering.cancel()
        await node.stop()

    async def _remember_peers(self, node: Node) -> None:
        """Keeps ``node.json`` up to date with where the peers are."""
        told = ""
        while True:
            await asyncio.sleep(REMEMBER_SECONDS)
            found_: dict[int, str] = {}
            for store in self.stores:
                with contextlib.suppress(SpaceError):
                    found_ |= {id_: address for id_, (_, address) in store.members().items() if address}
            found_.pop(node.id, None)
            if found_ and found_ != self.config.peers:
                config = attrs.evolve(self.config, peers=found_)
                try:
                    await asyncio.to_thread(config.save, self.home)
                except OSError as error:  # a full disk: there will be room again
                    if str(error) != told:
                        told = str(error)
                        log.warning("node %d cannot note where its peers are: %s", node.id, told)
                else:
                    self.config = config

    def _failed(self, error: SpaceError) -> None:
        """A replica that cannot go on ends its node: the next start recovers, and heals what is damaged."""
        self.failure = error
        if self._stop is not None:
            self._stop.set()

    def call(self, work: Callable[[Node], Any], *, seconds: float) -> Any:
        """Runs a coroutine of the node in its loop and waits for it.

        Raises:
            UnavailableError: it takes longer, or the node has ended.
        """
        if self._loop is None or self.ended.is_set():
            raise self.failure or UnavailableError(f"node {self.config.node} has stopped")
        return self.node.run(work(self.node), seconds=seconds)

    # --- what people ask ---------------------------------------------------------------------------

    def status(self) -> Document:
        """The cluster as this node sees it: shards with leader, term and nodes."""
        found_ = self.call(lambda node: node.cluster_status(), seconds=READY_SECONDS)
        return status_document(self.config, found_)

    def local_status(self) -> Document:
        """The node's own ``status`` and what it knows of its ``peers``, without asking anybody."""

        async def look(node: Node) -> Document:
            peers = {
                number: {**attrs.asdict(peer, recurse=False), "queued_bytes": _by_name(peer.queued_bytes)}
                for number, peer in node.transport.peers().items()
            }
            return {"status": node.status(), "peers": peers}

        found_: Document = self.call(look, seconds=READY_SECONDS)
        return found_

    @property
    def server_tls(self) -> ssl.SSLContext | None:
        """For connections of clients; None without certificates."""
        return None if self._tls is None else self._tls.server

    def change_members(self, what: str, node: int, address: str = "", shard: int | None = None) -> None:
        """Adds, removes, or lets lead; see :meth:`space.replication.node.Node.change_members`."""
        self.call(lambda found_: found_.change_members(what, node, address, shard), seconds=900.0)

    def stop(self) -> None:
        """Hands leadership over and stops the loop: whoever waits for a group is told so."""
        loop, stop = self._loop, self._stop
        if loop is not None and stop is not None and not self.ended.is_set():
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(stop.set)
        self._thread.join()

    def close(self) -> None:
        """Stops, and closes the stores; closing twice does nothing."""
        self.stop()
        self._close_stores()

    def _close_stores(self) -> None:
        for store in self.stores:
            with contextlib.suppress(SpaceError):
                store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _by_name(queued: Mapping[Any, int]) -> dict[str, int]:
    return {lane.name.lower(): size for lane, size in queued.items()}


def _check_local(listen: str) -> None:
    host, _ = parse_address(listen)
    if host not in ("127.0.0.1", "::1", "localhost"):
        raise UsageError(
            f"{listen} is reachable from other machines, and peers would not be authenticated",
            hint="leave TLS on, or listen on 127.0.0.1",
        )


def status_document(config: NodeConfig, nodes: list[dict[str, Any]]) -> Document:
    """The status of a cluster from that of the nodes that answered."""
    shards: list[Document] = []
    for number in range(config.shards):
        seen = {
            each["node"]: next((s for s in each["shards"] if s["shard"] == number), None) for each in nodes
        }
        answered = {node: shard for node, shard in seen.items() if shard is not None}
        if not answered:
            continue
        latest = max(answered.values(), key=lambda shard: (shard["term"], shard["commit"]))
        leaders = [
            node
            for node, shard in answered.items()
            if shard["role"] == "leader" and shard["term"] == latest["term"]
        ]
        everybody = sorted({*latest["voters"], *latest["learners"], *answered})
        furthest = max(shard["position"] for shard in answered.values())
        addresses = {each["node"]: each["address"] for each in nodes} | {
            node: address for node, address in config.peers.items() if node not in answered
        }
        shards.append(
            {
                "shard": number,
                "leader": leaders[0] if leaders else None,
                "term": latest["term"],
                "nodes": [
                    _node_document(node, answered.get(node), furthest, addresses.get(node, ""))
                    for node in everybody
                ],
            }
        )
    differences = [text for each in nodes for text in each.get("differences", ())]
    return {"cluster": str(uuid.UUID(bytes=config.cluster)), "shards": shards, "differences": differences}


def _node_document(node: int, shard: dict[str, Any] | None, furthest: int, address: str) -> Document:
    if shard is None:
        return {
            "id": node,
            "role": "unreachable",
            "position": None,
            "digest": None,
            "lag": None,
            "address": address,
        }
    return {
        "id": node,
        "role": shard["role"],
        "position": shard["position"],
        "digest": format_digest(int.from_bytes(shard["digest"], "big")),
        "lag": furthest - shard["position"],
        "address": address,
        "failure": shard["failure"],
    }


# --- healing ---------------------------------------------------------------------------------------


class _Deaf:
    """Answers nothing while a node heals: to its peers it is down."""

    def on_raft(self, sender: int, group: int, message: bytes, blobs: list[Any]) -> None:
        """Not now."""

    async def on_request(
        self, sender: int, method: str, body: Any, attachments: list[Any]
    ) -> tuple[Any, list[Any]]:
        """Not now."""
        raise UnavailableError("this node is healing its log")

    def on_unreachable(self, node: int) -> None:
        """Expected."""


async def _heal(node: ClusterNode, number: int, home: Path, store: bytes) -> None:
    """Fetches what is damaged in a shard's log from its leader, up to all that may have been acknowledged here.

    The leader's commit index, confirmed by a quorum without this node, covers every entry this node ever
    helped to commit.  Until the log reaches it, this node does not take part.

    Raises:
        UnavailableError: no leader among the peers answers in time.
    """
    from space.wal.repair import heal

    config = node.config
    transport = Transport(
        node=config.node,
        cluster=config.cluster,
        listen=parse_address(config.listen),
        handler=_Deaf(),
        tls=node._tls,
    )
    await transport.start()
    try:
        for peer, address in config.peers.items():
            if peer != config.node:
                transport.set_peer(peer, *parse_address(address))
        leader, last = await _find_leader(transport, config, number)
        loop = asyncio.get_running_loop()
        state_file = RaftStateFile.open(RealDisk(), str(home / WAL), store_id=store)

        def fetch(first: int, stop: int) -> Iterator[Chunk]:
            at = first
            while at <= stop:
                asked = asyncio.run_coroutine_threadsafe(
                    _fetch_chunk(transport, [leader, *config.peers], [number, at, stop]), loop
                )
                chunk = asked.result()
                state_file.raise_term(chunk.batches[-1].term)
                yield chunk
                at = chunk.last_index + 1

        with contextlib.closing(state_file):
            report = await asyncio.to_thread(
                heal, RealDisk(), str(home / WAL), store, fetch, last=last, segment_bytes=64 << 20
            )
        log.warning("shard %d of node %d: healed: %s", number, config.node, report)
    finally:
        await transport.close()


async def _fetch_chunk(transport: Transport, peers: Sequence[int], asked: list[int]) -> Chunk:
    """Batches of a shard from the first peer that has them; a peer may end, be too busy for a while, or be damaged too.

    Which one does not matter: what comes has to fit the chain.

    Raises:
        UnavailableError, CorruptionError: none has them in time.
    """
    deadline = time.monotonic() + HEAL_SECONDS
    for peer in itertools.cycle(each for each in dict.fromkeys(peers) if each != transport.node):
        try:
            _, pieces = await transport.request(peer, "chunk", asked, timeout=CHUNK_SECONDS)
        except (UnavailableError, CorruptionError):
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(HEAL_RETRY_SECONDS)
        else:
            return decode_chunk(b"".join(pieces))
    raise UnavailableError("no peer is known")


async def _find_leader(transport: Transport, config: NodeConfig, number: int) -> tuple[int, int]:
    """The leader of a shard and an index at or above everything committed before now."""
    deadline = time.monotonic() + HEAL_SECONDS
    while time.monotonic() < deadline:
        for peer in config.peers:
            if peer == config.node:
                continue
            with contextlib.suppress(SpaceError):
                answer, _ = await transport.request(peer, "confirmed", [number], timeout=5.0)
                if answer is not None:
                    return peer, int(answer)
        await asyncio.sleep(HEAL_RETRY_SECONDS)
    raise UnavailableError(
        "the log is damaged, and no leader among the peers answers",
        hint="start the other nodes of the cluster first",
    )

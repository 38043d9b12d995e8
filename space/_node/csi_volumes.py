"""Volumes and snapshots in the tree of a store: what :class:`space.projections.csi.model.Volumes` says, synchronously.

Everything is in the log, in this shape::

    /csi/volumes/ID/data     a directory, or a block capsule; ID is a UUID made with it
    /csi/snapshots/ID/data   a clone of a volume's data
    /csi/groups/ID/          of snapshots
    /csi/nodes/KEY/          a node that can have volumes
    /csi/names/KEY           symbolic link: the orchestrator's name, hashed, → ID

What is known about one of them is in the extended attribute ``csi.about`` of its directory, which no workload ever
sees: only ``data`` is shown.  To make one is one command, so there is never half of one.

What a mount holds back of acknowledged writes is settled before every clone, in the mount's own thread (``cut``), and
nothing is written between that and the clone: a snapshot has every write acknowledged before it and none after, over
all volumes it is of.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Protocol

import attrs
import msgpack
from blake3 import blake3

from space._errors import (
    ConflictError,
    CorruptionError,
    NotFoundError,
    RefusedError,
    SpaceError,
    Status,
    UsageError,
)
from space._node import csi_ranges
from space._node.caller import Document
from space._node.reading import Reading
from space._node.store import Store, pack_policy
from space.events import commands as cmd
from space.events.commands import Durability, Receipt, Request
from space.events.ids import CapsuleId
from space.events.types import Kind
from space.policy.model import Encryption, Policy, Sovereignty
from space.projections import content_map
from space.projections.csi import check
from space.projections.csi.model import (
    NETWORK,
    TRANSPORT,
    TRANSPORTS,
    Published,
    Reach,
    Snapshot,
    Volume,
    Wanted,
    node_address,
)
from space.statemachine.apply import tree_nodes
from space.statemachine.tables import Overlay

TOP: Final = "/csi"
VOLUMES: Final = "volumes"
SNAPSHOTS: Final = "snapshots"
GROUPS: Final = "groups"
NODES: Final = "nodes"
NAMES: Final = "names"
DATA: Final = b"data"

ABOUT: Final = b"csi.about"
ON_NODE: Final = b"csi.on."
HAS_VOLUME: Final = b"csi.has."

ROOT_MODE: Final = 0o777
"""Of a new tree: workloads run as any user; a claim with fsGroup narrows it."""

ATTEMPTS: Final = 4
"""How often a name is looked up again when somebody else took or freed it meanwhile."""

PAGE: Final = 256
"""Volumes looked at in one go."""

POLICY_NODES: Final = 512
ACTOR: Final = "csi"

log: Final = logging.getLogger("space.csi")


class Cut(Protocol):
    """Does something while no write is held back and none is taken."""

    def __call__(self, work: Callable[[], list[Receipt | SpaceError]]) -> list[Receipt | SpaceError]:
        """What ``work`` gives."""


class Accounts(Protocol):
    """Who knows what trees take."""

    def usage(self, volume: str) -> tuple[int, int]:
        """Bytes and files."""


class Network(Protocol):
    """Who serves volumes over the network (:class:`space._node.csi_servers.Servers`)."""

    def check(self, transport: str) -> None:
        """Refuses a transport that is not served."""

    def allow(self, transport: str, data: CapsuleId) -> None:
        """Refuses what a policy keeps from where the transport can be reached."""

    def offer(self, volume: Volume, data: CapsuleId) -> Reach:
        """Lets the nodes reach a volume that it is published on."""

    def withdraw(self, volume: str) -> None:
        """Lets nobody reach a volume."""

    def forget(self, volume: str) -> None:
        """A volume is deleted."""


class VolumeTree:
    """Volumes of one store.  From any thread."""

    def __init__(
        self,
        store: Store,
        *,
        cut: Cut = lambda work: work(),
        accounts: Accounts | None = None,
        network: Network | None = None,
    ) -> None:
        """Makes the tree's directories where they are missing."""
        self._store = store
        self._cut = cut
        self._accounts = accounts
        self._network = network
        self._publishing = threading.Lock()
        self._homes = {
            name: store.mkdir(f"{TOP}/{name}", parents=True)
            for name in (VOLUMES, SNAPSHOTS, GROUPS, NODES, NAMES)
        }

    @property
    def volumes_home(self) -> CapsuleId:
        """The directory of all volumes."""
        return self._homes[VOLUMES]

    # --- records ---------------------------------------------------------------------------------

    def _directory(self, kind: str, id_: str) -> CapsuleId:
        """The directory of one of them.

        Raises:
            NotFoundError: there is none, or no id looks like that.
        """
        if not check.is_id(id_):
            raise NotFoundError(f"no {kind[:-1]} {id_!r:.100}")
        try:
            return self._store.lookup(self._homes[kind], id_.encode())
        except NotFoundError:
            raise NotFoundError(f"no {kind[:-1]} {id_}") from None

    def _about(self, directory: CapsuleId) -> Document:
        about: Document = msgpack.unpackb(self._store.xattr(directory, ABOUT))
        return about

    def _data(self, kind: str, id_: str) -> CapsuleId:
        return self._store.lookup(self._directory(kind, id_), DATA)

    def volume(self, volume: str) -> Volume:
        """A volume."""
        return self._volume_at(volume, self._directory(VOLUMES, volume))

    def _volume_at(self, volume: str, directory: CapsuleId) -> Volume:
        published = {}
        about: Document | None = None
        for name, value in self._store.xattrs(directory).items():
            if name == ABOUT:
                about = msgpack.unpackb(value)
            elif name.startswith(ON_NODE):
                node, readonly, mode = msgpack.unpackb(value)
                published[node] = Published(readonly, mode)
        if about is None:
            raise CorruptionError(
                f"volume {volume} has lost what is known about it", hint="run: space verify"
            )
        created = self._store.stat(directory).btime
        return Volume(volume, created_ns=created, published=published, **about)

    def volumes(self, after: str, limit: int) -> list[Volume]:
        """Volumes in order of their ids."""
        return [self._volume_at(*each) for each in self._listed(VOLUMES, after, limit)]

    def _listed(self, kind: str, after: str, limit: int) -> Iterator[tuple[str, CapsuleId]]:
        for entry in self._store.entries(self._homes[kind], after=after.encode(), limit=limit):
            yield entry.name.decode(), entry.id

    # --- names -----------------------------------------------------------------------------------

    def _by_name(self, kind: str, name: str) -> str | None:
        """The id that has a name; a name that leads nowhere is taken away."""
        key = _name_key(kind, name)
        try:
            link = self._store.lookup(self._homes[NAMES], key)
            found = self._store.readlink(link).decode()
        except NotFoundError:
            return None
        try:
            self._directory(kind, found)
        except NotFoundError:
            # Removing is two commands of one batch; only a disk that was too full between them leaves this.
            self._all([cmd.Unlink(self._homes[NAMES], key)])
            return None
        return found

    def _made(self, kind: str, name: str, make: Callable[[], None], fits: Callable[[str], bool]) -> str:
        """The id of what has a name, made if nothing has it yet.

        Raises:
            ConflictError: the name is that of another kind of thing.
        """
        for _ in range(ATTEMPTS):
            found = self._by_name(kind, name)
            if found is not None:
                if not fits(found):
                    raise ConflictError(f"{kind[:-1]} {name!r:.100} exists, and is another one: {found}")
                return found
            try:
                make()
            except ConflictError as error:
                if error.status is not Status.EXISTS:
                    raise
        raise UsageError(f"the name {name!r:.100} is taken and freed all the time", status=Status.STALE)

    def _record(self, kind: str, id_: CapsuleId, text: str, name: str, about: Document) -> list[cmd.Command]:
        """Commands for the directory of a record, with what is known about it and its name."""
        home = self._homes[kind]
        return [
            self._store.create_command(Kind.DIRECTORY, id=id_, parent=home, name=text.encode(), mode=0o700),
            cmd.SetXattr(id_, ABOUT, msgpack.packb(about)),
            self._store.create_command(
                Kind.SYMLINK, parent=self._homes[NAMES], name=_name_key(kind, name), target=text.encode()
            ),
        ]

    # --- commands --------------------------------------------------------------------------------

    def _one(self, commands: Sequence[cmd.Command]) -> Receipt:
        """Carries commands out as one; durable when it returns."""
        return self._all([cmd.Together(commands)])[0]

    def _all(self, commands: Sequence[cmd.Command]) -> list[Receipt]:
        requests = [Request(each, ACTOR) for each in commands]
        return _accepted(self._store.execute_all(requests, durability=Durability.DURABLE))

    def _at_once(self, commands: Sequence[cmd.Command]) -> Receipt:
        """Carries commands out as one, with every write acknowledged before and none after."""
        request = Request(cmd.Together(commands), ACTOR)
        (receipt,) = _accepted(
            self._cut(lambda: self._store.execute_all([request], durability=Durability.BUFFERED))
        )
        self._store.sync()
        return receipt

    # --- volumes ---------------------------------------------------------------------------------

    def create(self, wanted: Wanted) -> Volume:
        """Makes a volume, or finds the one of that name."""
        return self.volume(
            self._made(
                VOLUMES,
                wanted.name,
                lambda: self._make_volume(wanted),
                lambda found: _same_volume(self.volume(found), wanted),
            )
        )

    def _check_transport(self, transport: str) -> None:
        """Refuses a transport that nobody serves.

        Raises:
            RefusedError: this one.
        """
        if transport not in NETWORK:
            return
        if self._network is None:
            raise RefusedError(f"nobody serves {transport} here", status=Status.NOT_PERMITTED)
        self._network.check(transport)

    def published(self) -> Iterator[tuple[Volume, CapsuleId]]:
        """Volumes over the network that are published, with their data."""
        after = ""
        while page := list(self._listed(VOLUMES, after, PAGE)):
            for id_, directory in page:
                try:
                    found = self._volume_at(id_, directory)
                    if found.published and found.transport in NETWORK:
                        yield found, self._store.lookup(directory, DATA)
                except SpaceError as error:
                    log.warning("volume %s: %s", id_, error)
            after = page[-1][0]

    def _make_volume(self, wanted: Wanted) -> None:
        self._check_transport(check.transport(wanted.parameters, block=wanted.block))
        id_, data = self._store.new_id(), self._store.new_id()
        text = wanted.id or str(id_)
        about = {
            "name": wanted.name,
            "capacity": wanted.capacity,
            "block": wanted.block,
            "source": wanted.source,
            "moment": wanted.moment,
            "zone": wanted.zone,
            "ephemeral": bool(wanted.id),
            "parameters": dict(wanted.parameters),
            "mutable": dict(wanted.mutable),
        }
        record = self._record(VOLUMES, id_, text, wanted.name, about)
        policy = _policy({**wanted.parameters, **wanted.mutable})
        if wanted.source:
            self._at_once([*record, *self._restored(wanted, id_, data, policy)])
            return
        self._one([*record, self._empty(wanted, id_, data, policy)])

    def _empty(
        self, wanted: Wanted, directory: CapsuleId, data: CapsuleId, policy: Policy | None
    ) -> cmd.CreateCapsule:
        """The command for a volume's data, empty; without a policy it follows the one of all volumes."""
        packed = None if policy is None else pack_policy(policy)
        if not wanted.block:
            return cmd.CreateCapsule(
                data, Kind.DIRECTORY, ROOT_MODE, parent=directory, name=DATA, policy=packed
            )
        key = self._store.new_key(policy or self._store.policy(self._homes[VOLUMES]))
        return cmd.CreateCapsule(
            data,
            Kind.FILE,
            0o600,
            parent=directory,
            name=DATA,
            size=wanted.capacity,
            block_size=check.BLOCK_BYTES,
            policy=packed,
            key=key,
        )

    def _restored(
        self, wanted: Wanted, directory: CapsuleId, data: CapsuleId, policy: Policy | None
    ) -> list[cmd.Command]:
        """Commands that make a volume's data what its source is or was."""
        kind, _, id_ = wanted.source.partition("/")
        home = SNAPSHOTS if kind == "snapshot" else VOLUMES
        if wanted.moment:
            with self._store.at(wanted.moment) as past:
                from space._node.past import manifest

                about, source, size = _look(past, home, id_)
                clone = cmd.Clone(data, source, directory, DATA, past.position, manifest(past, source))
        else:
            self._directory(home, id_)  # says what is missing in words of ours
            about, source, size = _look(self._store, home, id_)
            clone = cmd.Clone(data, source, directory, DATA)
        if about["block"] != wanted.block:
            kinds = ("a tree", "a block device")
            raise UsageError(f"{kind} {id_} is {kinds[about['block']]}, not {kinds[wanted.block]}")
        least = size if wanted.block else about.get("capacity", about.get("size", 0))
        if wanted.capacity < int(least or 0):
            raise UsageError(
                f"{kind} {id_} has {least} bytes, which {wanted.capacity} do not hold",
                status=Status.TOO_LARGE,
            )
        commands: list[cmd.Command] = [clone]
        if wanted.block and wanted.capacity > size:
            commands.append(cmd.Resize(data, wanted.capacity))
        if policy is not None:
            _refuse_encryption(policy)
            commands.append(cmd.SetPolicy(data, pack_policy(policy)))
        return commands

    def delete(self, volume: str) -> None:
        """Removes a volume; one that is not there is no error."""
        try:
            found = self.volume(volume)
        except NotFoundError:
            return
        with self._publishing:
            if found.published:
                raise RefusedError(
                    f"volume {volume} is published on {', '.join(sorted(found.published))}",
                    status=Status.NOT_PERMITTED,
                )
            self._remove([(VOLUMES, volume, found.name)])
            if self._network is not None and found.transport in NETWORK:
                self._network.forget(volume)

    def _remove(self, records: Sequence[tuple[str, str, str]]) -> None:
        """Takes records and their names away: one batch, and of commands that a full disk takes too."""
        commands = []
        for kind, id_, name in records:
            commands.append(cmd.Unlink(self._homes[kind], id_.encode(), directory=True, recursive=True))
            if self._by_name(kind, name) == id_:
                commands.append(cmd.Unlink(self._homes[NAMES], _name_key(kind, name)))
        outcomes = self._store.execute_all([Request(each, ACTOR) for each in commands])
        for outcome in outcomes:
            if isinstance(outcome, SpaceError) and not isinstance(outcome, NotFoundError):
                raise outcome  # what is gone already, somebody else removed meanwhile

    def expand(self, volume: str, capacity: int, limit: int) -> Volume:
        """Makes a volume at least so large."""
        directory = self._directory(VOLUMES, volume)
        found = self._volume_at(volume, directory)
        if limit and found.capacity > limit:
            raise UsageError(
                f"volume {volume} has {found.capacity} bytes already, more than {limit}",
                status=Status.TOO_LARGE,
            )
        if capacity <= found.capacity:
            return found
        about = {**self._about(directory), "capacity": capacity}
        commands: list[cmd.Command] = [cmd.SetXattr(directory, ABOUT, msgpack.packb(about))]
        if found.block:
            commands.append(cmd.Resize(self._store.lookup(directory, DATA), capacity))
        self._one(commands)
        return self._volume_at(volume, directory)

    def modify(self, volume: str, mutable: Mapping[str, str]) -> None:
        """Lets a volume, and everything in it, follow another policy from now on.

        Raises:
            RefusedError: it would forbid what the volume is published for.
        """
        directory = self._directory(VOLUMES, volume)
        about = self._about(directory)
        about["mutable"] = {**about["mutable"], **mutable}
        policy = _policy({**about["parameters"], **about["mutable"]})
        if policy is None:
            return
        known = self.volume(volume)
        if policy.sovereignty is Sovereignty.LOCAL and known.published and known.transport in NETWORK:
            raise RefusedError(
                f"volume {volume} is served over the network, and sovereignty: local keeps it on its node",
                hint="end its publications first",
                status=Status.NOT_PERMITTED,
            )
        packed = pack_policy(policy)
        pending: list[cmd.Command] = []
        data = self._store.lookup(directory, DATA)
        with self._store._read() as txn:
            nodes = [(node.capsule, node.row.kind, node.row.key) for node in tree_nodes(Overlay(txn), data)]
        for capsule, kind, had in nodes:
            if kind not in (Kind.FILE, Kind.DIRECTORY):
                continue
            key = self._store.new_key(policy) if kind == Kind.FILE and not had else None
            pending.append(cmd.SetPolicy(capsule, packed, key))
            if len(pending) == POLICY_NODES:
                self._tolerant(pending)
                pending = []
        self._tolerant(pending)
        self._one([cmd.SetXattr(directory, ABOUT, msgpack.packb(about))])

    def _tolerant(self, commands: Sequence[cmd.Command]) -> None:
        """Carries out commands about files that a workload may remove meanwhile."""
        for outcome in self._store.execute_all([Request(each, ACTOR) for each in commands]):
            if isinstance(outcome, SpaceError) and not isinstance(outcome, NotFoundError):
                raise outcome

    def usage(self, volume: str) -> Document:
        """Bytes used, capacity, and files."""
        found = self.volume(volume)
        if found.block:
            data = self._store.stat(self._data(VOLUMES, volume))
            return {"used": data.allocated, "capacity": found.capacity, "files": 0}
        if self._accounts is None:
            used, files = tree_usage(self._store, self._data(VOLUMES, volume))
        else:
            used, files = self._accounts.usage(volume)
        return {"used": used, "capacity": found.capacity, "files": files}

    # --- where volumes are published -------------------------------------------------------------

    def register(self, node: str, zone: str, limit: int) -> None:
        """Notes a node."""
        about = msgpack.packb({"id": node, "zone": zone, "limit": limit})
        try:
            directory = self._node(node)
        except NotFoundError:
            made = self._store.new_id()
            create = self._store.create_command(
                Kind.DIRECTORY, id=made, parent=self._homes[NODES], name=_key(node), mode=0o700
            )
            try:
                self._one([create, cmd.SetXattr(made, ABOUT, about)])
            except ConflictError:
                directory = self._node(node)
            else:
                return
        if self._store.xattr(directory, ABOUT) != about:
            self._one([cmd.SetXattr(directory, ABOUT, about)])

    def _node(self, node: str) -> CapsuleId:
        try:
            return self._store.lookup(self._homes[NODES], _key(node))
        except NotFoundError:
            raise NotFoundError(f"no node {node!r:.100}") from None

    def publish(self, volume: str, node: str, published: Published) -> Reach | None:
        """Notes that a volume is published on a node; how that reaches it, if over the network.

        A node that has no store tells nobody of itself: it is known from now on.
        """
        with self._publishing:
            directory = self._directory(VOLUMES, volume)
            known = self._volume_at(volume, directory)
            remote = node_address(node) is not None
            if remote and known.transport not in NETWORK:
                raise RefusedError(
                    f"volume {volume} is seen through {known.transport}, where the store is, and {node} has none",
                    hint=f"a StorageClass with {TRANSPORT}: {TRANSPORTS[known.block][1]} reaches every node",
                    status=Status.NOT_PERMITTED,
                )
            self._check_transport(known.transport)
            if self._network is not None and known.transport in NETWORK:
                self._network.allow(known.transport, self._store.lookup(directory, DATA))
            if remote and self._node_or_none(node) is None:
                self.register(node, "", 0)
            self._note_published(directory, known, node, published)
            if self._network is None or known.transport not in NETWORK:
                return None
            return self._network.offer(
                self._volume_at(volume, directory), self._store.lookup(directory, DATA)
            )

    def _note_published(self, directory: CapsuleId, known: Volume, node: str, published: Published) -> None:
        volume, found, at = known.id, known.published, self._node(node)
        if node in found:
            if found[node] != published:
                raise ConflictError(f"volume {volume} is published on {node} in another way")
            return
        others = sorted(set(found) - {node})
        if others and (why := _exclusive(found, published)):
            raise RefusedError(
                f"volume {volume} is published on {', '.join(others)}, and {why}",
                status=Status.NOT_PERMITTED,
            )
        limit = self._about(at)["limit"]
        has = sum(name.startswith(HAS_VOLUME) for name in self._store.xattrs(at))
        if limit and has >= limit:
            raise UsageError(f"node {node} has {has} volumes, as many as it may", status=Status.NO_SPACE)
        value = msgpack.packb([node, published.readonly, published.mode])
        self._one(
            [
                cmd.SetXattr(directory, ON_NODE + _key(node), value),
                cmd.SetXattr(at, HAS_VOLUME + volume.encode(), b""),
            ]
        )

    def unpublish(self, volume: str, node: str) -> None:
        """Notes that it is not any more, wherever it was if no node is named; neither has to be there still."""
        with self._publishing:
            try:
                directory = self._directory(VOLUMES, volume)
            except NotFoundError:
                return
            found = self._volume_at(volume, directory).published
            commands: list[cmd.Command] = []
            for each in [node] if node else sorted(found):
                if each in found:
                    commands.append(cmd.RemoveXattr(directory, ON_NODE + _key(each)))
                at = self._node_or_none(each)
                name = HAS_VOLUME + volume.encode()
                if at is not None and name in self._store.xattrs(at):
                    commands.append(cmd.RemoveXattr(at, name))
            if commands:
                self._one(commands)
            self._shut_out(volume, directory)

    def _shut_out(self, volume: str, directory: CapsuleId) -> None:
        """Lets no node reach a volume any more that it is not published on."""
        left = self._volume_at(volume, directory)
        if self._network is None or left.transport not in NETWORK:
            return
        if left.published:
            self._network.offer(left, self._store.lookup(directory, DATA))
        else:
            self._network.withdraw(volume)

    def _node_or_none(self, node: str) -> CapsuleId | None:
        try:
            return self._node(node)
        except NotFoundError:
            return None

    # --- snapshots -------------------------------------------------------------------------------

    def snapshot(self, volume: str, name: str) -> Snapshot:
        """Takes a snapshot, or finds the one of that name."""
        return self.find_snapshot(
            self._made(
                SNAPSHOTS,
                name,
                lambda: self._make_snapshot(volume, name),
                lambda found: self.find_snapshot(found).volume == volume,
            )
        )

    def _make_snapshot(self, volume: str, name: str) -> None:
        id_ = self._store.new_id()
        about, clone = self._snapshot_of(volume, id_, name, "")
        self._at_once([*self._record(SNAPSHOTS, id_, str(id_), name, about), clone])

    def _snapshot_of(
        self, volume: str, directory: CapsuleId, name: str, group: str
    ) -> tuple[Document, cmd.Command]:
        found = self.volume(volume)
        about = {
            "name": name,
            "volume": volume,
            "size": found.capacity,
            "block": found.block,
            "group": group,
        }
        clone = cmd.Clone(self._store.new_id(), self._data(VOLUMES, volume), directory, DATA)
        return about, clone

    def find_snapshot(self, snapshot: str) -> Snapshot:
        """A snapshot."""
        return self._snapshot_at(snapshot, self._directory(SNAPSHOTS, snapshot))

    def _snapshot_at(self, snapshot: str, directory: CapsuleId) -> Snapshot:
        created = self._store.stat(directory).btime
        return Snapshot(snapshot, created_ns=created, **self._about(directory))

    def snapshots(self, after: str, limit: int, volume: str) -> list[Snapshot]:
        """Snapshots in order of their ids, of one volume if one is named."""
        found: list[Snapshot] = []
        while len(found) < limit:
            page = [self._snapshot_at(*each) for each in self._listed(SNAPSHOTS, after, limit)]
            if not page:
                break
            found += [each for each in page if not volume or each.volume == volume]
            after = page[-1].id
        return found[:limit]

    def delete_snapshot(self, snapshot: str) -> None:
        """Removes a snapshot; one that is not there is no error."""
        try:
            found = self.find_snapshot(snapshot)
        except NotFoundError:
            return
        self._remove([(SNAPSHOTS, snapshot, found.name)])

    # --- groups ----------------------------------------------------------------------------------

    def snapshot_group(self, name: str, volumes: Sequence[str]) -> Document:
        """Takes snapshots of several volumes at one position, or finds the group of that name."""
        return self.group(
            self._made(
                GROUPS,
                name,
                lambda: self._make_group(name, volumes),
                lambda found: (
                    sorted(self._about(self._directory(GROUPS, found))["volumes"]) == sorted(volumes)
                ),
            )
        )

    def _make_group(self, name: str, volumes: Sequence[str]) -> None:
        id_ = self._store.new_id()
        snapshots = [self._store.new_id() for _ in volumes]
        about = {"name": name, "volumes": list(volumes), "snapshots": [str(each) for each in snapshots]}
        commands = self._record(GROUPS, id_, str(id_), name, about)
        for volume, snapshot in zip(volumes, snapshots, strict=True):
            known, clone = self._snapshot_of(volume, snapshot, "", str(id_))
            commands += [
                self._store.create_command(
                    Kind.DIRECTORY,
                    id=snapshot,
                    parent=self._homes[SNAPSHOTS],
                    name=str(snapshot).encode(),
                    mode=0o700,
                ),
                cmd.SetXattr(snapshot, ABOUT, msgpack.packb(known)),
                clone,
            ]
        self._at_once(commands)

    def group(self, group: str) -> Document:
        """A group, with those of its snapshots that were not removed one by one."""
        directory = self._directory(GROUPS, group)
        about = self._about(directory)
        found = []
        for snapshot in about["snapshots"]:
            try:
                found.append(attrs.asdict(self.find_snapshot(snapshot)))
            except NotFoundError:
                continue
        created = self._store.stat(directory).btime
        return {"id": group, "name": about["name"], "created_ns": created, "snapshots": found}

    def delete_group(self, group: str) -> None:
        """Removes a group with its snapshots; one that is not there is no error."""
        try:
            found = self.group(group)
        except NotFoundError:
            return
        members = [(SNAPSHOTS, each["id"], each["name"]) for each in found["snapshots"]]
        self._remove([*members, (GROUPS, group, found["name"])])

    # --- ranges ----------------------------------------------------------------------------------

    def allocated(self, snapshot: str, offset: int) -> Document:
        """See :func:`space._node.csi_ranges.allocated`."""
        return csi_ranges.allocated(self._store, self._data(SNAPSHOTS, snapshot), offset)

    def changed(self, base: str, target: str, offset: int) -> Document:
        """See :func:`space._node.csi_ranges.changed`."""
        before, after = self._data(SNAPSHOTS, base), self._data(SNAPSHOTS, target)
        return csi_ranges.changed(self._store, before, after, offset)


def _key(text: str) -> bytes:
    """A name of any length and characters as one of a file."""
    return blake3(text.encode(errors="surrogatepass")).digest(16).hex().encode()


def _name_key(kind: str, name: str) -> bytes:
    return f"{kind}-".encode() + _key(name)


def _look(reading: Reading, home: str, id_: str) -> tuple[Document, CapsuleId, int]:
    """What is known about a volume or snapshot, its data, and the size of a block device's."""
    directory = reading.resolve(f"{TOP}/{home}/{id_}")
    data = reading.lookup(directory, DATA)
    return msgpack.unpackb(reading.xattr(directory, ABOUT)), data, reading.stat(data).size


def _accepted(outcomes: Sequence[Receipt | SpaceError]) -> list[Receipt]:
    receipts = []
    for outcome in outcomes:
        if isinstance(outcome, SpaceError):
            raise outcome
        receipts.append(outcome)
    return receipts


def _policy(parameters: Mapping[str, str]) -> Policy | None:
    """The policy parameters ask for; None where they ask for none.

    Raises:
        UsageError: a value is none.
    """
    document: dict[str, Any] = check.policy_document(parameters)
    return Policy.from_document(document) if document else None


def _refuse_encryption(policy: Policy) -> None:
    if policy.encryption is not Encryption.NONE:
        raise UsageError(
            "what a volume begins as keeps the encryption it has",
            hint="leave encryption out of the parameters of a restored volume",
        )


def _same_volume(found: Volume, wanted: Wanted) -> bool:
    """Whether a volume is what somebody wanted under its name."""
    return (
        found.block == wanted.block
        and found.capacity >= wanted.capacity
        and not (wanted.limit and found.capacity > wanted.limit)
        and (found.source, found.moment) == (wanted.source, wanted.moment)
        and dict(found.parameters) == dict(wanted.parameters)
    )


def _exclusive(found: Mapping[str, Published], wanted: Published) -> str:
    """Why a volume published on other nodes cannot be on one more; empty if it can."""
    modes = {each.mode for each in found.values()} | {wanted.mode}
    if modes & check.SINGLE_NODE:
        return "it is for one node at a time"
    mode = check.MULTI_NODE_SINGLE_WRITER
    if mode in modes and not wanted.readonly and not all(each.readonly for each in found.values()):
        return "one node writes already"
    return ""


def tree_usage(reading: Reading, data: CapsuleId) -> tuple[int, int]:
    """Bytes that are not holes, and files, of a tree at one moment; a file with several names counts once."""
    used = files = 0
    with reading._read() as txn:
        for node in tree_nodes(Overlay(txn), data):
            files += 1
            mapped = content_map.map_row(txn, node.capsule) if node.row.kind == Kind.FILE else None
            used += min(mapped.allocated, node.row.size) if mapped else 0
    return used, files

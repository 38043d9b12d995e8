"""Volumes and snapshots in the tree of a store: what :class:`space.projections.csi.model.Volumes` says, synchronously.

Everything is in the log, in this shape::

    /csi/volumes/ID/data     a directory, or a block capsule; ID is a UUID made with it
    /csi/snapshots/ID/data   a clone of a volume's data
    /csi/groups/ID/          of snapshots
    /csi/nodes/KEY/          a node that can have volumes
    /csi/names/KEY           symbolic link: the orchestrator's name, hashed, → ID

What is known about one of them is in the extended attribute ``csi.about`` of its directory, which no workload ever
sees: only ``data`` is shown.  To make one is one command, so there is never half of one.

Several nodes of a cluster may be asked at once, and one of them twice.  So a volume has a *turn*, an attribute whose
name says how often it was changed: whoever changes what is known about it takes the turn on, in the same command, from
the one it has looked at.  Of two that looked at the same one is refused, and looks again.

What a mount holds back of acknowledged writes is settled before every clone, in the mount's own thread (``cut``), and
nothing is written between that and the clone: a snapshot has every write acknowledged before it and none after, over
all volumes it is of.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Protocol, TypeVar

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
    NFS,
    NVME,
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
TURN: Final = b"csi.turn."
TURNED: Final = b"csi.turned"
SERVES: Final = b"csi.serves."
"""Of the directory of all nodes, with the number of a member of the cluster: where that one serves volumes."""

ROOT_MODE: Final = 0o777
"""Of a new tree: workloads run as any user; a claim with fsGroup narrows it."""

ATTEMPTS: Final = 4
"""How often a name is looked up again when somebody else took or freed it meanwhile."""

TURNS: Final = 32
"""How often a change is begun anew because others change the same volume: each time one of them got on."""

CALL_COMMANDS: Final = 8
"""Attempts of one call that have numbers of their own: it takes a second one where somebody else interferes."""

CALLS_MAX: Final = 1 << 59

PAGE: Final = 256
"""Volumes looked at in one go."""

POLICY_NODES: Final = 512
ACTOR: Final = "csi"

_T = TypeVar("_T")

log: Final = logging.getLogger("space.csi")


class OvertakenError(Exception):
    """Somebody else has changed a volume since it was looked at."""


@attrs.frozen
class _Known:
    """A volume, its directory, and in which turn it was so."""

    volume: Volume
    directory: CapsuleId
    turn: int

    def next_turn(self) -> list[cmd.Command]:
        """Commands that are refused unless the volume is as it was looked at."""
        named = [TURN + str(number).encode() for number in (self.turn, self.turn + 1)]
        if self.turn:
            before: cmd.Command = cmd.RemoveXattr(self.directory, named[0])
        else:  # what the first turn sets stays: who looked before it cannot take it once more when it has gone
            before = cmd.SetXattr(self.directory, TURNED, b"", create=True)
        return [before, cmd.SetXattr(self.directory, named[1], b"", create=True)]


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

    def settle(self) -> None:
        """Returns once all who serve do so as they were last told."""


class VolumeTree:
    """Volumes of one store.  From any thread."""

    def __init__(
        self,
        store: Store,
        *,
        cut: Cut = lambda work: work(),
        accounts: Accounts | None = None,
        network: Network | None = None,
        look_again: Callable[[], None] = lambda: None,
        shown: bool = True,
    ) -> None:
        """Makes the tree's directories where they are missing.

        ``look_again`` returns once what is read next has everything that others were told by now.  ``shown`` is
        whether volumes are seen where the store is, or over the network alone.
        """
        self._store = store
        self._shown = shown
        self._look_again = look_again
        self._local = threading.local()
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
        return self._known(volume).volume

    def _known(self, volume: str) -> _Known:
        return self._known_at(volume, self._directory(VOLUMES, volume))

    def _known_at(self, volume: str, directory: CapsuleId) -> _Known:
        published, turn = {}, 0
        about: Document | None = None
        for name, value in self._store.xattrs(directory).items():
            if name == ABOUT:
                about = msgpack.unpackb(value)
            elif name.startswith(ON_NODE):
                node, readonly, mode = msgpack.unpackb(value)
                published[node] = Published(readonly, mode)
            elif name.startswith(TURN):
                turn = int(name.removeprefix(TURN))
        if about is None:
            raise CorruptionError(
                f"volume {volume} has lost what is known about it", hint="run: space verify"
            )
        created = self._store.stat(directory).btime
        return _Known(Volume(volume, created_ns=created, published=published, **about), directory, turn)

    def volumes(self, after: str, limit: int) -> list[Volume]:
        """Volumes in order of their ids."""
        return [self._known_at(*each).volume for each in self._listed(VOLUMES, after, limit)]

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
            # Removing was two commands once, and a disk that was too full between them left this.  The attribute is
            # refused if the name is another one by now.
            with contextlib.suppress(NotFoundError):
                self._beside([cmd.SetXattr(link, ABOUT, b""), cmd.Unlink(self._homes[NAMES], key)])
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
                self._look_again()
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
        """Carries out as one command what a call is for; durable when it returns."""
        request = self._request(cmd.Together(commands))
        (receipt,) = _accepted(self._store.execute_all([request], durability=Durability.DURABLE))
        return self._noted(receipt)

    def _noted(self, receipt: Receipt) -> Receipt:
        """A call has one command: if an earlier attempt at it was carried out, no other one will be."""
        if receipt.repeated:
            self._local.signatures = None
        return receipt

    def _beside(self, commands: Sequence[cmd.Command]) -> Receipt:
        """As :meth:`_one`, of what harms nobody if it is carried out late or again."""
        request = Request(cmd.Together(commands), ACTOR)
        return _accepted(self._store.execute_all([request], durability=Durability.DURABLE))[0]

    @contextlib.contextmanager
    def signed(self, client: bytes, call: int) -> Iterator[None]:
        """In this thread, the one command that a call is for belongs to a client's call of that number.

        Another attempt at the same call, through whatever node and however late, does not carry it out again.
        """
        if not 0 <= call < CALLS_MAX:
            raise UsageError(f"not the number of a call: {call}")
        first = call * CALL_COMMANDS
        self._local.signatures = iter([(client, first + each) for each in range(CALL_COMMANDS)])
        try:
            yield
        finally:
            del self._local.signatures

    def _request(self, command: cmd.Command) -> Request:
        """A command with a number of the call under way, if that has some left.

        Raises:
            ConflictError: an earlier attempt at the call was carried out; status STALE.
        """
        signatures = getattr(self._local, "signatures", iter(()))
        if signatures is None:
            raise ConflictError("this was done, and has been undone since", status=Status.STALE)
        return Request(command, ACTOR, *next(signatures, (b"", 0)))

    def _changed(self, known: _Known, commands: Sequence[cmd.Command]) -> None:
        """Changes a volume that was looked at.

        Raises:
            OvertakenError: somebody else has changed it since.
        """
        try:
            self._one([*known.next_turn(), *commands])
        except SpaceError as error:
            if error.status in {Status.EXISTS, Status.NO_ATTRIBUTE}:
                raise OvertakenError from None
            raise

    def _in_turn(self, work: Callable[[], _T]) -> _T:
        """What ``work`` gives, which looks at a volume and changes it; begun anew when it is overtaken.

        Raises:
            ConflictError: others change it all the time; status STALE.
        """
        for _ in range(TURNS):
            try:
                return work()
            except OvertakenError:
                self._look_again()
        raise ConflictError("others change the volume all the time", status=Status.STALE)

    def _at_once(self, commands: Sequence[cmd.Command]) -> Receipt:
        """Carries commands out as one, with every write acknowledged before and none after."""
        request = self._request(cmd.Together(commands))
        (receipt,) = _accepted(
            self._cut(lambda: self._store.execute_all([request], durability=Durability.BUFFERED))
        )
        self._store.sync()
        return self._noted(receipt)

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
            if self._shown:
                return
            raise RefusedError(
                f"no node of the cluster serves volumes through {transport}",
                hint=f"a StorageClass with {TRANSPORT}: {NFS} or {NVME}",
                status=Status.NOT_PERMITTED,
            )
        if self._network is None:
            raise RefusedError(f"nobody serves {transport} here", status=Status.NOT_PERMITTED)
        self._network.check(transport)

    def published(self) -> Iterator[tuple[Volume, CapsuleId]]:
        """Volumes over the network that are published, with their data."""
        after = ""
        while page := list(self._listed(VOLUMES, after, PAGE)):
            for id_, directory in page:
                try:
                    found = self._known_at(id_, directory).volume
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
        with self._publishing:
            self._in_turn(lambda: self._delete(volume))

    def _delete(self, volume: str) -> None:
        try:
            known = self._known(volume)
        except NotFoundError:
            return
        found = known.volume
        if found.published:
            raise RefusedError(
                f"volume {volume} is published on {', '.join(sorted(found.published))}",
                status=Status.NOT_PERMITTED,
            )
        with contextlib.suppress(NotFoundError):
            self._changed(known, self._removal(VOLUMES, volume, found.name))
        if self._network is not None and found.transport in NETWORK:
            self._network.forget(volume)

    def _removal(self, kind: str, id_: str, name: str) -> list[cmd.Command]:
        """Commands that take a record and its name away, which a full disk takes too; refused if it is gone already."""
        found: list[cmd.Command] = [
            cmd.Unlink(self._homes[kind], id_.encode(), directory=True, recursive=True)
        ]
        if self._by_name(kind, name) == id_:
            found.append(cmd.Unlink(self._homes[NAMES], _name_key(kind, name)))
        return found

    def expand(self, volume: str, capacity: int, limit: int) -> Volume:
        """Makes a volume at least so large."""
        return self._in_turn(lambda: self._expand(volume, capacity, limit))

    def _expand(self, volume: str, capacity: int, limit: int) -> Volume:
        known = self._known(volume)
        found, directory = known.volume, known.directory
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
        self._changed(known, commands)
        return attrs.evolve(found, capacity=capacity)

    def modify(self, volume: str, mutable: Mapping[str, str]) -> None:
        """Lets a volume, and everything in it, follow another policy from now on.

        Raises:
            RefusedError: it would forbid what the volume is published for.
        """
        self._in_turn(lambda: self._modify(volume, mutable))

    def _modify(self, volume: str, mutable: Mapping[str, str]) -> None:
        looked_at = self._known(volume)
        known, directory = looked_at.volume, looked_at.directory
        about = self._about(directory)
        about["mutable"] = {**about["mutable"], **mutable}
        policy = _policy({**about["parameters"], **about["mutable"]})
        if policy is None:
            return
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
        self._changed(looked_at, [cmd.SetXattr(directory, ABOUT, msgpack.packb(about))])

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

    # --- the members of a cluster that serve ------------------------------------------------------

    def serve_at(self, member: int, transport: str, listen: str, told: str) -> None:
        """Notes that a member of the cluster serves a transport: where it listens, and where nodes reach that."""
        home = self._homes[NODES]
        name = SERVES + f"{member}.{transport}".encode()
        value = msgpack.packb([listen, told])
        if self._store.xattrs(home).get(name) != value:
            self._beside([cmd.SetXattr(home, name, value)])

    def served_at(self, transport: str) -> dict[int, tuple[str, str]]:
        """By member, where it serves a transport: as in :meth:`serve_at`."""
        found = {}
        for name, value in self._store.xattrs(self._homes[NODES]).items():
            member, _, kind = name.removeprefix(SERVES).decode(errors="replace").partition(".")
            if name.startswith(SERVES) and kind == transport:
                listen, told = msgpack.unpackb(value)
                found[int(member)] = (listen, told)
        return found

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
                self._beside([create, cmd.SetXattr(made, ABOUT, about)])
            except ConflictError:
                self._look_again()
                directory = self._node(node)
            else:
                return
        if self._store.xattr(directory, ABOUT) != about:
            self._beside([cmd.SetXattr(directory, ABOUT, about)])

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
            reach = self._in_turn(lambda: self._publish(volume, node, published))
        if self._network is not None and reach is not None:
            self._network.settle()
        return reach

    def _publish(self, volume: str, node: str, published: Published) -> Reach | None:
        looked_at = self._known(volume)
        known, directory = looked_at.volume, looked_at.directory
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
        self._note_published(looked_at, node, published)
        if self._network is None or known.transport not in NETWORK:
            return None
        return self._network.offer(
            self._known_at(volume, directory).volume, self._store.lookup(directory, DATA)
        )

    def _note_published(self, known: _Known, node: str, published: Published) -> None:
        volume, found, at = known.volume.id, known.volume.published, self._node(node)
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
        self._changed(
            known,
            [
                cmd.SetXattr(known.directory, ON_NODE + _key(node), value),
                cmd.SetXattr(at, HAS_VOLUME + volume.encode(), b""),
            ],
        )

    def unpublish(self, volume: str, node: str) -> None:
        """Notes that it is not any more, wherever it was if no node is named; neither has to be there still."""
        with self._publishing:
            served = self._in_turn(lambda: self._unpublish(volume, node))
        if self._network is not None and served:
            self._network.settle()

    def _unpublish(self, volume: str, node: str) -> bool:
        """Whether the volume is one that is served."""
        try:
            known = self._known(volume)
        except NotFoundError:
            return False
        found = known.volume.published
        commands: list[cmd.Command] = []
        for each in [node] if node else sorted(found):
            if each in found:
                commands.append(cmd.RemoveXattr(known.directory, ON_NODE + _key(each)))
            at = self._node_or_none(each)
            name = HAS_VOLUME + volume.encode()
            if at is not None and name in self._store.xattrs(at):
                commands.append(cmd.RemoveXattr(at, name))
        if commands:
            self._changed(known, commands)
        self._shut_out(volume, known.directory)
        return known.volume.transport in NETWORK

    def _shut_out(self, volume: str, directory: CapsuleId) -> None:
        """Lets no node reach a volume any more that it is not published on."""
        left = self._known_at(volume, directory).volume
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
        with contextlib.suppress(NotFoundError):  # or somebody else removes it meanwhile
            found = self.find_snapshot(snapshot)
            self._one(self._removal(SNAPSHOTS, snapshot, found.name))

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
        for _ in range(TURNS):
            try:
                found = self.group(group)
            except NotFoundError:
                return
            commands = self._removal(GROUPS, group, found["name"])
            for each in found["snapshots"]:
                commands += self._removal(SNAPSHOTS, each["id"], each["name"])
            with contextlib.suppress(NotFoundError):  # one of them is removed meanwhile
                self._one(commands)
            self._look_again()
        raise ConflictError(f"others remove snapshots of group {group}", status=Status.STALE)

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

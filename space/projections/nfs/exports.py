"""What clients may see: exports, the pseudo file system that leads to them, and the nodes of both.

An :class:`Export` is a file system of its own to the client (its fsid), whatever store it comes from.  One export may
be the root of the server; several hang in a *pseudo file system* (RFC 8881 §7.3) made of the names on their paths.
Where a name leads from it into an export the client sees the export's root, with the number of the directory beneath
as its ``mounted_on_fileid``.

A :class:`Node` is what a filehandle stands for.  It says nothing of how the client got there, so permission to use an
export is asked for each time (:mod:`space.projections.nfs.access`).
"""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Sequence
from typing import Final

import attrs
from blake3 import blake3

from space._errors import NotFoundError, RefusedError, Status, UsageError
from space.events.commands import Buffer
from space.events.fast import fast_frozen
from space.events.ids import ID_BYTES, CapsuleId
from space.events.types import Kind
from space.projections.nfs.referrals import Referral
from space.projections.vfs import (
    AttributeChange,
    Attributes,
    Caller,
    Entries,
    FileSystem,
    Listed,
    Space,
)

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

PSEUDO_NUMBER: Final = 0
"""The pseudo file system's number, in handles and as fsid."""

EXPORTS_MAX: Final = 1024
_SEEN_MAX: Final = 4096
"""Addresses whose permissions are remembered: more clients than one server has at a time."""


class Squash(enum.Enum):
    """Whose requests are carried out as nobody's: the superuser's, everybody's, or no one's."""

    ROOT = "root"
    ALL = "all"
    NONE = "none"


@attrs.frozen
class Rule:
    """Clients of these addresses may use an export; ``read_only``: only to read."""

    network: Network
    read_only: bool = False


def parse_rule(text: str) -> Rule:
    """The rule written as ``ADDRESS[/BITS][:ro|:rw]``; an IPv6 network may stand in brackets.

    Raises:
        UsageError: it is none.
    """
    address, mode = text, "rw"
    for ending in ("ro", "rw"):
        if text.endswith(f":{ending}"):
            address, mode = text.removesuffix(f":{ending}"), ending
    try:
        network = ipaddress.ip_network(address.replace("[", "").replace("]", ""), strict=False)
    except ValueError:
        raise UsageError(
            f"not a network: {text!r}", hint="write ADDRESS/BITS, and :ro to let it only read"
        ) from None
    return Rule(network, read_only=mode == "ro")


@attrs.define(eq=False)
class Export:
    """A file system that is served.

    Attributes:
        number: 64 bits that are its own for ever, on every node: they are in its handles, and its fsid.
        path: names in the pseudo file system that lead to it; none for an export that is the root itself.
        rules: who may use it, the first that fits; none: everybody who can connect.
        referral: where it is instead of here; then ``files`` are those of the export its directory is in.
        key: makes its handles (:mod:`space.projections.nfs.handles`); ``handles`` are those given out lately.
    """

    number: int
    path: tuple[bytes, ...]
    files: FileSystem
    read_only: bool = False
    squash: Squash = Squash.ROOT
    rules: tuple[Rule, ...] = ()
    referral: Referral | None = None
    key: bytes = attrs.field(default=b"", init=False, repr=False)
    handles: dict[bytes, bytes] = attrs.field(factory=dict, init=False, repr=False)
    _seen: dict[str, Rule | None] = attrs.field(factory=dict, init=False)

    def allow(self, rules: tuple[Rule, ...]) -> None:
        """Who may use it from now on; who may not any more is refused with the next operation."""
        self.rules = rules
        self._seen.clear()

    @property
    def root(self) -> Node:
        """Where it begins."""
        return Node(self, self.files.root)

    def rule(self, address: str) -> Rule | None:
        """The rule for a client; None where it has no business."""
        if address in self._seen:
            return self._seen[address]
        if len(self._seen) >= _SEEN_MAX:
            self._seen.clear()
        found = self._seen[address] = self._rule(address)
        return found

    def _rule(self, address: str) -> Rule | None:
        if not self.rules:
            return _ANYBODY
        try:
            known = ipaddress.ip_address(address.partition("%")[0])
        except ValueError:
            return None
        known = getattr(known, "ipv4_mapped", None) or known
        return next((rule for rule in self.rules if known in rule.network), None)


_ANYBODY: Final = Rule(ipaddress.ip_network("0.0.0.0/0"))


def export_number(store: bytes, root: bytes, moment: str = "") -> int:
    """The number of the export of ``root`` of a store, now or at a past moment: the same on every node of a cluster."""
    digest = blake3(store + root + moment.encode(), derive_key_context="space nfs export v1").digest(8)
    return int.from_bytes(digest, "big") | 1


@fast_frozen
class Node:
    """A file, directory or other object of an export."""

    export: Export
    id: CapsuleId


class Exports:
    """All that a server offers, and the handles clients know it by."""

    def __init__(self, exports: Sequence[Export], *, key: bytes, time_ns: int = 0) -> None:
        """Serves ``exports``.

        ``key`` (32 bytes, the same on every node and after a restart) makes handles that nobody can guess; ``time_ns``
        is the time the directories of the pseudo file system show.

        Raises:
            UsageError: two of them are at one place, or one is inside another.
        """
        if not exports or len(exports) > EXPORTS_MAX:
            raise UsageError(f"{len(exports)} exports; from 1 to {EXPORTS_MAX} are served at a time")
        self.key = key
        self.nodes: dict[bytes, Node] = {}
        self._places: dict[CapsuleId, Export] = {}
        self._referrals: dict[Node, Export] = {}
        if len(exports) == 1 and not exports[0].path:
            self.root = exports[0].root
            self._numbers = {exports[0].number: exports[0]}
            exports[0].key = key
            return
        pseudo = Export(
            PSEUDO_NUMBER, (), _PseudoFiles([each.path for each in exports], time_ns), read_only=True
        )
        self.root = pseudo.root
        self._numbers = {PSEUDO_NUMBER: pseudo} | {each.number: each for each in exports}
        if len(self._numbers) <= len(exports):
            raise UsageError("the same tree twice: a tree is exported once")
        self._places = {_place(each.path): each for each in exports}
        for each in self._numbers.values():
            each.key = key

    def export(self, number: int) -> Export | None:
        """The export of that number."""
        return self._numbers.get(number)

    def entered(self, node: Node) -> Node:
        """The node itself, or the root of the export that hangs there, or what stands for one that is elsewhere."""
        if self._referrals:
            absent = self._referrals.get(node)
            if absent is not None and absent.referral is not None and absent.referral.elsewhere():
                return Node(absent, node.id)
        if self._places and node.export.number == PSEUDO_NUMBER and node.id in self._places:
            return self._places[node.id].root
        return node

    def refer(self, node: Node, number: int, referral: Referral) -> None:
        """Sends clients that come to a directory of an export elsewhere; ``number`` is as for :class:`Export`.

        Filehandles of what is below it are good as before; no others are given out.
        """
        here = node.export
        self._referrals[node] = Export(
            number, (), here.files, here.read_only, here.squash, here.rules, referral=referral
        )

    def above(self, export: Export) -> Node | None:
        """The directory of the pseudo file system that an export's root lies in; None above the server's root."""
        if not export.path:
            return None
        return Node(self.root.export, _place(export.path[:-1]))

    def mounted_on(self, node: Node, attributes: Attributes) -> int:
        """The number a node would have if nothing hung there: ``mounted_on_fileid``."""
        export = node.export
        if export.path and node.id == export.files.root:
            return self.root.export.files.attributes(_place(export.path)).ino
        return attributes.ino


def _place(path: Sequence[bytes]) -> CapsuleId:
    """The node of a directory of the pseudo file system: its path decides it, so that handles outlive a restart."""
    return CapsuleId(
        blake3(b"/".join(path), derive_key_context="space nfs pseudo directory v1").digest(ID_BYTES)
    )


def _shown(path: Sequence[bytes]) -> str:
    return "/" + b"/".join(path).decode(errors="backslashreplace")


_REFUSED: Final = "the directories above exports are read-only"


class _PseudoFiles:
    """The read-only :class:`FileSystem` of the names that lead to exports."""

    read_only = True
    immutable = False

    def __init__(self, paths: Sequence[tuple[bytes, ...]], time_ns: int) -> None:
        self._time = time_ns
        self._entries: dict[CapsuleId, dict[bytes, CapsuleId]] = {_place(()): {}}
        self._parents: dict[CapsuleId, CapsuleId] = {_place(()): _place(())}
        for path in paths:
            if not path or sum(path == other[: len(path)] for other in paths) > 1:
                raise UsageError(
                    f"an export at or below {_shown(path)} already: they neither share a path nor lie in each other"
                )
            for depth in range(len(path)):
                here, below = _place(path[:depth]), _place(path[: depth + 1])
                self._entries[here][path[depth]] = below
                self._entries.setdefault(below, {})
                self._parents[below] = here

    @property
    def root(self) -> CapsuleId:
        return _place(())

    def _names(self, node: CapsuleId) -> dict[bytes, CapsuleId]:
        found = self._entries.get(node)
        if found is None:
            raise NotFoundError("no such directory any more", status=Status.STALE)
        return found

    def attributes(self, node: CapsuleId) -> Attributes:
        names, now = self._names(node), self._time
        number = int.from_bytes(node[:7], "big") | 1
        return Attributes(
            *(node, Kind.DIRECTORY, 0o555, 2 + len(names), 0, 0, 0, 0, 0, number, self._parents[node]),
            *(now, now, now, now, now),
        )

    def stamp(self) -> int:
        return 0

    def permissions(self, node: CapsuleId) -> Attributes:
        return self.attributes(node)

    def lookup(self, directory: CapsuleId, name: bytes) -> Attributes:
        found = self._names(directory).get(name)
        if found is None:
            raise NotFoundError(f"no entry {name!r}")
        return self.attributes(found)

    def entries(self, directory: CapsuleId, *, after: bytes, limit: int) -> list[tuple[bytes, Attributes]]:
        names = sorted(each for each in self._names(directory).items() if each[0] > after)
        return [(name, self.attributes(node)) for name, node in names[:limit]]

    async def listing(self, directory: CapsuleId, *, after: int, limit: int) -> Entries:
        names = sorted((self.attributes(node).ino, name) for name, node in self._names(directory).items())
        left = [each for each in names if each[0] > after]
        listed = [Listed(cookie, name, self.lookup(directory, name)) for cookie, name in left[:limit]]
        return Entries(listed, len(left) <= limit)

    def hold(self, node: CapsuleId) -> None:
        """They are always there."""

    def drop(self, node: CapsuleId) -> None:
        """They are always there."""

    def readlink(self, node: CapsuleId) -> bytes:
        raise UsageError("a directory is no symbolic link")

    def read(self, node: CapsuleId, offset: int, length: int) -> bytes:
        raise UsageError("a directory holds no bytes", status=Status.IS_DIRECTORY)

    def seek(self, node: CapsuleId, offset: int, *, data: bool) -> int | None:
        raise UsageError("a directory holds no bytes", status=Status.IS_DIRECTORY)

    def xattr(self, node: CapsuleId, name: bytes) -> bytes:
        raise NotFoundError(f"no attribute {name!r}", status=Status.NO_ATTRIBUTE)

    def xattr_names(self, node: CapsuleId) -> list[bytes]:
        return []

    def space(self) -> Space:
        return Space(4096, 0, 0, 0, 0, 0)

    async def sync(self) -> None:
        """Nothing ever changes."""

    async def commit(self, node: CapsuleId) -> None:
        """Nothing ever changes."""

    async def create(
        self, directory: CapsuleId, name: bytes, kind: Kind, caller: Caller, **_: object
    ) -> Attributes:
        raise RefusedError(_REFUSED)

    async def link(self, node: CapsuleId, directory: CapsuleId, name: bytes, caller: Caller) -> Attributes:
        raise RefusedError(_REFUSED)

    async def remove(self, directory: CapsuleId, name: bytes, caller: Caller, *, is_directory: bool) -> None:
        raise RefusedError(_REFUSED)

    async def rename(self, *_: object, **__: object) -> None:
        raise RefusedError(_REFUSED)

    async def write(self, node: CapsuleId, offset: int, data: Buffer, caller: Caller) -> None:
        raise RefusedError(_REFUSED)

    async def set_attributes(self, node: CapsuleId, change: AttributeChange, caller: Caller) -> Attributes:
        raise RefusedError(_REFUSED)

    async def set_xattr(self, *_: object, **__: object) -> None:
        raise RefusedError(_REFUSED)

    async def remove_xattr(self, node: CapsuleId, name: bytes, caller: Caller) -> None:
        raise RefusedError(_REFUSED)

    async def allocate(self, node: CapsuleId, offset: int, length: int, caller: Caller) -> None:
        raise RefusedError(_REFUSED)

    async def deallocate(self, node: CapsuleId, offset: int, length: int, caller: Caller) -> None:
        raise RefusedError(_REFUSED)

    async def copy(self, *_: object, **__: object) -> None:
        raise RefusedError(_REFUSED)


class _UnlistedNames(_PseudoFiles):
    """Names below the root that come and go, and are found only by who knows them."""

    def __init__(self, time_ns: int) -> None:
        super().__init__([], time_ns)

    def put(self, name: bytes, time_ns: int) -> None:
        """There is this name from now on."""
        below = _place((name,))
        self._entries[self.root][name] = below
        self._entries[below] = {}
        self._parents[below] = self.root
        self._changed(time_ns)

    def take(self, name: bytes, time_ns: int) -> None:
        """There is this name no longer."""
        below = self._entries[self.root].pop(name)
        del self._entries[below], self._parents[below]
        self._changed(time_ns)

    def _changed(self, time_ns: int) -> None:
        # The change attribute grows also where the clock does not: clients remember names that were not there.
        self._time = max(time_ns, self._time + 1)

    async def listing(self, directory: CapsuleId, *, after: int, limit: int) -> Entries:
        return Entries([], complete=True)

    def entries(self, directory: CapsuleId, *, after: bytes, limit: int) -> list[tuple[bytes, Attributes]]:
        return []


class ChangingExports(Exports):
    """Exports that come and go, each at one name below the root; who does not know a name is not told it.

    So clients of different exports are apart whatever their rules are: the root lists nothing.
    """

    def __init__(self, *, key: bytes, time_ns: int) -> None:
        """None yet; ``key`` and ``time_ns`` are as for :class:`Exports`."""
        self.key = key
        self.nodes = {}
        self._names = _UnlistedNames(time_ns)
        self._places = {}
        self._referrals = {}
        pseudo = Export(PSEUDO_NUMBER, (), self._names, read_only=True)
        pseudo.key = key
        self.root = pseudo.root
        self._numbers = {PSEUDO_NUMBER: pseudo}

    def add(self, export: Export, time_ns: int) -> None:
        """Offers one more; one that is offered already is no error.

        Raises:
            UsageError: there are too many; status NO_SPACE.
        """
        (name,) = export.path
        if export.number in self._numbers:
            return
        if len(self._numbers) > EXPORTS_MAX:
            raise UsageError(f"{EXPORTS_MAX} exports are offered already", status=Status.NO_SPACE)
        export.key = self.key
        self._numbers[export.number] = self._places[_place(export.path)] = export
        self._names.put(name, time_ns)

    def remove(self, export: Export, time_ns: int) -> None:
        """Offers one no longer: its handles are stale until it is offered again.  One that is not is no error."""
        (name,) = export.path
        if self._numbers.pop(export.number, None) is None:
            return
        del self._places[_place(export.path)]
        self.nodes.clear()  # it has nodes of this export
        self._names.take(name, time_ns)

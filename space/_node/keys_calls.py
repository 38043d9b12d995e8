"""What can be asked of a store, and of a node with its shards, about keys, as plain data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from space._errors import UsageError
from space._node.caller import Caller, Document
from space.events.ids import CapsuleId

if TYPE_CHECKING:
    from space._node.node_target import NodeTarget
    from space._node.store import Store

CAPSULES_MAX = 1000
"""Capsules of one call: their keys are destroyed in one go, and the answer names all of them."""


class KeyCalls:
    """A part of :class:`space._node.service.Service`."""

    store: Store
    _caller: Caller

    def keys(self) -> Document:
        """Master keys and data keys."""
        from space._node.keys import listing

        return listing(self.store, self._key_progress)

    def keys_rotate(self, *, sole: bool = False) -> Document:
        """Another master key, by which every data key is wrapped."""
        from space._node.keys import Nobody, rotate

        return rotate([self.store], Nobody(), sole=sole)

    def keys_renew(self, *, capsule: str) -> Document:
        """Another data key for a capsule, under which its present content is encrypted again."""
        from space._node.keys_data import rekey

        return rekey(
            self.store, self.store.resolve(capsule), lambda done: self._caller.progress({"bytes": done})
        )

    def keys_destroy(self, *, capsules: list[str], with_clones: bool = False, sole: bool = False) -> Document:
        """Destroys the data keys of capsules."""
        from space._node.keys import Nobody, destroy

        found = [self._ever(each) for each in checked(capsules)]
        return destroy(
            self.store,
            [self.store],
            Nobody(),
            found,
            with_clones=with_clones,
            sole=sole,
            on_progress=self._key_progress,
        )

    def _ever(self, capsule: str) -> CapsuleId:
        raise NotImplementedError

    def _key_progress(self, progress: Any) -> None:
        last = max(self.store.last, 1)
        self._caller.progress({"position": progress.position, "last": last, "events": progress.events})


def checked(capsules: list[str]) -> list[str]:
    """Capsules as they were named.

    Raises:
        UsageError: they are not, or are too many.
    """
    if not 0 < len(capsules) <= CAPSULES_MAX or not all(isinstance(each, str) for each in capsules):
        raise UsageError(f"not the names of 1 to {CAPSULES_MAX} capsules")
    return capsules


class NodeKeyCalls:
    """A part of :class:`space._node.node_target.NodeService`."""

    _target: NodeTarget
    _caller: Caller

    def keys(self) -> Document:
        """Master keys and data keys of every shard."""
        from space._node.service import Service

        found = [self._looked(store, Service(store, self._caller).keys) for store in self._target.node.stores]
        total = found[0]
        for each in found[1:]:
            total["keys"] += each["keys"]
            total["masters"] += [master for master in each["masters"] if master not in total["masters"]]
        return total

    def keys_rotate(self, *, sole: bool = False) -> Document:
        """Another master key for every shard, on every node."""
        from space._node.keys import rotate
        from space._node.keys_nodes import OtherNodes

        return rotate(self._target.node.stores, OtherNodes(self._target.node), sole=sole)

    def keys_destroy(self, *, capsules: list[str], with_clones: bool = False, sole: bool = False) -> Document:
        """Destroys the data keys of capsules of one shard, on every node."""
        from space._node.keys import destroy
        from space._node.keys_nodes import OtherNodes
        from space._node.service import Service

        checked(capsules)
        stores = {id(store): store for store in map(self._target.reading_for, capsules)}
        if len(stores) > 1:
            raise UsageError("these capsules are in different shards", hint="destroy their keys one by one")
        (store,) = stores.values()
        service = Service(store, self._caller)
        return destroy(
            store,
            self._target.node.stores,
            OtherNodes(self._target.node),
            [service._ever(each) for each in capsules],
            with_clones=with_clones,
            sole=sole,
            on_progress=service._key_progress,
        )

    def _looked(self, store: Any, ask: Any) -> Document:
        store.confirm()
        with store.stale():
            found: Document = ask()
        return found

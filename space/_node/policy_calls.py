"""What can be asked of a store about what its policies want done, where to read, and shards, as plain data."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

import attrs

from space._errors import NotFoundError
from space._node.caller import Caller, Document
from space.events.ids import CapsuleId

if TYPE_CHECKING:
    from space._node.store import Store
    from space.federation.parity import Layout


class PolicyCalls:
    """A part of :class:`space._node.service.Service`."""

    store: Store
    _caller: Caller

    def policy_plan(self, *, since: int = 0) -> Document:
        """What the policies ask for now."""
        from space._node import federation_actions as actions

        planned = actions.plan(self.store, since=since)
        return plan_document(self.store, [actions.describe(self.store, each.action) for each in planned])

    def policy_apply(self, *, since: int = 0) -> Document:
        """Does what the policies ask for now."""
        from space._node import federation_actions as actions

        return plan_document(self.store, actions.apply(self.store, since=since))

    def replicas(self, *, capsule: str) -> Document:
        """Zones a capsule can be read from, nearest first."""
        found = self.store.resolve(capsule)
        replicas = [attrs.asdict(each) for each in self.store.replicas(found)]
        return {"id": str(found), "replicas": replicas}

    def shards(self) -> list[Document]:
        """Capsules that this zone has a layout of."""
        from space._node.federation_shelf import StoreShelf
        from space._node.federation_zones import Zones

        zones = Zones(self.store)
        own = zones.own()
        if own is None:
            return []
        names = {zone.id: zone.name for zone in (own, *zones.others())}
        layouts = StoreShelf(self.store, own.id).layouts()
        return [_layout_document(layout, names) for layout in sorted(layouts, key=lambda each: each.capsule)]

    def shards_get(self, *, capsule: str, descriptor: int, replace: bool = False) -> Document:
        """Writes what the shards of a capsule give to ``descriptor``."""
        from space._node.federation_shards import collect, shard_zones
        from space._node.service import Sink

        found = self._sharded(capsule)
        with shard_zones(self.store) as zones:
            collected = collect(self.store, zones, found)
            sink = Sink(descriptor, self._caller, replace=replace)
            size = 0
            for piece in collected.content:
                sink.write(bytes(piece))
                size += len(piece)
                self._caller.progress({"bytes": size})
            sink.finish()
        return {"id": str(found), "size": size, "position": collected.layout.position}

    def shards_mend(self, *, capsule: str) -> Document:
        """Looks whether every zone has its shards of a capsule of this one, and makes anew those that are lost."""
        from space._node.federation_shards import mend, shard_zones
        from space._node.federation_shelf import StoreShelf
        from space._node.federation_zones import Zones

        found = self._sharded(capsule)
        own = Zones(self.store).own()
        layouts = [] if own is None else StoreShelf(self.store, own.id).layouts()
        mine = [layout for layout in layouts if own and (layout.home, layout.capsule) == (own.id, found)]
        if not mine:
            raise NotFoundError(f"no shards of capsule {capsule} are this zone's to mend")
        with shard_zones(self.store) as zones:
            return {"id": str(found), **attrs.asdict(mend(zones, mine[0]))}

    def _sharded(self, capsule: str) -> CapsuleId:
        """The id of a capsule that need not be here: its shards may be."""
        if capsule.startswith("/"):
            return self.store.resolve(capsule)
        return CapsuleId.parse(capsule)


def plan_document(store: Store, actions: list[Document]) -> Document:
    """A plan, or what came of it, as of the position it was made at."""
    return {"position": store.position, "actions": actions}


def _layout_document(layout: Layout, names: dict[bytes, str]) -> Document:
    def name(zone: bytes) -> str:
        return names.get(zone) or str(uuid.UUID(bytes=zone))

    document: dict[str, Any] = {
        "id": str(CapsuleId(layout.capsule)),
        "name": layout.name.decode(errors="backslashreplace"),
        "home": name(layout.home),
        "position": layout.position,
        "size": layout.size,
        "data": layout.scheme.data,
        "parity": layout.scheme.parity,
        "zones": [name(zone) for zone in layout.zones],
        "stripes": len(layout.stripes),
    }
    return document

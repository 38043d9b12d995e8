"""How far each zone has come, as documents: of links that are at work, or of what was known when they last were."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from space._node.caller import Document
from space._node.federation_arrival import describe, sealed_keys
from space._node.federation_keys import ZONE
from space._node.federation_nodes import OFFICE, links_elsewhere, merged
from space.events.codec import batch_rows
from space.statemachine import zones as rows
from space.statemachine.tables import Overlay

if TYPE_CHECKING:
    from space._node.federation_zones import Zone
    from space._node.store import Store
    from space.wal.segment_format import RecordInfo

NOTES_FILE: Final = "links.json"
"""What was last known of the other zones; only shown, and made anew where it is lost."""

MARK_EVERY: Final = 256
"""Batches from one sum to the next: what is counted again for one question."""


class Amount(NamedTuple):
    """A part of the log."""

    events: int
    bytes: int


class Records(Protocol):
    """What is needed of the log."""

    def records(self, start: int, stop: int | None = None) -> Iterable[RecordInfo]:
        """Records from a position on, up to but not including another one."""


class Backlog:
    """How much log there is between two positions; sums of every few hundred batches are counted once."""

    def __init__(self, log: Records) -> None:
        self._log = log
        self._lock = threading.Lock()
        self._first = 0
        self._events = array("Q", [0])
        self._bytes = array("Q", [0])

    def after(self, position: int, last: int) -> Amount:
        """Events and bytes (metadata and payload) of the batches after ``position`` up to ``last``."""
        if position >= last:
            return Amount(0, 0)
        with self._lock:
            if not 0 < self._first <= max(1, position):
                self._first = max(1, position)
                self._events, self._bytes = array("Q", [0]), array("Q", [0])
            end, begin = self._upto(last), self._upto(position)
        return Amount(end.events - begin.events, end.bytes - begin.bytes)

    def _upto(self, position: int) -> Amount:
        """The sum of all batches from the first that is counted up to ``position``, which is included."""
        marks = max(0, position - self._first + 1) // MARK_EVERY
        while len(self._events) <= marks:
            at = self._first + (len(self._events) - 1) * MARK_EVERY
            more = _count(self._log.records(at, at + MARK_EVERY))
            self._events.append(self._events[-1] + more.events)
            self._bytes.append(self._bytes[-1] + more.bytes)
        at = self._first + marks * MARK_EVERY
        rest = _count(self._log.records(at, position + 1)) if at <= position else Amount(0, 0)
        return Amount(self._events[marks] + rest.events, self._bytes[marks] + rest.bytes)


def _count(records: Iterable[RecordInfo]) -> Amount:
    events = size = 0
    for record in records:
        size += len(record.metadata) + record.payload_length
        events += sum(len(row[4]) for row in batch_rows(record.metadata))
    return Amount(events, size)


def load_notes(home: Path) -> dict[str, Document]:
    """What was last known of each zone, by the id of the zone; nothing if that is lost."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((home / ZONE / NOTES_FILE).read_bytes())
        if isinstance(found, dict):
            return {key: each for key, each in found.items() if isinstance(each, dict)}
    return {}


def save_notes(home: Path, notes: Mapping[str, Document]) -> None:
    """Keeps what is known of each zone."""
    path = home / ZONE / NOTES_FILE
    made = path.with_suffix(".new")
    with contextlib.suppress(OSError):
        made.write_text(json.dumps(notes))
        made.replace(path)


def heard_note(store: Store, zone: Zone) -> Document:
    """What a zone last said of itself, to whichever node of this one."""
    running = store.federation
    heard = load_notes(store.path).get(_text(zone), {})
    if running is not None:
        heard = {**heard, **running.heard_of(zone.id)}
    if store.nodes is None:
        return heard
    return merged({_text(zone): heard}, store.nodes.ask(OFFICE)[0])[_text(zone)]


def _links(store: Store) -> tuple[int, dict[bytes, Document]]:
    """Which node of a cluster ships (0: there is no cluster, or none does), and how the connections are."""
    running = store.federation
    if running is not None and running.ships:
        return running.sender, running.link_documents()
    return links_elsewhere(store)


def status(store: Store, *, capsules: bool = False) -> Document:
    """How far each zone has come, and what came of each: see ``docs/cli.md`` for the keys."""
    from space._node.federation_zones import Zones

    zones = Zones(store)
    own = zones.own()
    running = store.federation
    sender, live = _links(store)
    notes = load_notes(store.path)
    backlog = Backlog(store.wal) if running is None else running.backlog
    now_ns = time.time_ns()
    return {
        "zone": None if own is None else own.name,
        "running": running is not None,
        "node": None if store.nodes is None else store.nodes.number,
        "sender": sender or None,
        "listen": None if running is None else running.url,
        "position": store.position,
        "arrival": describe(store),
        "zones": [
            _zone(
                store, zone, live.get(zone.id), notes.get(_text(zone), {}), backlog, now_ns, capsules=capsules
            )
            for zone in zones.others()
        ],
    }


def _zone(
    store: Store,
    zone: Zone,
    live: Document | None,
    note: Document,
    backlog: Backlog,
    now_ns: int,
    *,
    capsules: bool,
) -> Document:
    last = store.position
    link = _quiet(store, note) if live is None else dict(live)
    waiting, position = link.pop("waiting"), link.pop("position")
    lag = backlog.after(position, last) if waiting and position is not None else Amount(0, 0)
    oldest_ns, rpo_ns = link.pop("oldest_ns"), link.pop("rpo_ns")
    lag_ns = max(0, now_ns - oldest_ns) if waiting and oldest_ns else 0
    listed = link.pop("capsules")
    return {
        "zone": zone.name,
        "id": _text(zone),
        "kind": zone.kind.name.lower(),
        "url": zone.url,
        "position": position,
        "lag_events": lag.events,
        "lag_bytes": lag.bytes,
        "lag_seconds": round(lag_ns / 1e9, 3),
        "rpo_seconds": None if rpo_ns is None else rpo_ns / 1e9,
        "rpo_ok": link.pop("rpo_ok"),
        **link,
        "moving": _moving(store, zone),
        "received": _received(store, zone, note),
        **({"capsules": listed} if capsules else {}),
    }


def _moving(store: Store, zone: Zone) -> int:
    """Capsules whose home was given to a zone that has told of none of them since."""
    with store._read() as txn:
        return len(rows.given_to(Overlay(txn), zone.id))


def _quiet(store: Store, note: Document) -> Document:
    """What can be said of a zone while nothing is shipped to it."""
    position: int | None = note.get("position")
    behind = position is not None and position < store.position
    return {
        "connected": False,
        "at": "",
        "error": "not running: space federation serve",
        "position": position,
        "waiting": behind,
        "oldest_ns": store.wal.time_ns(position + 1) if position is not None and behind else 0,
        "rpo_ns": None,
        "rpo_ok": False,
        "remark": "",
        "streams": [],
        "capsules": [],
    }


def _received(store: Store, zone: Zone, note: Document) -> Document:
    """What came of a zone here."""
    with store._read() as txn:
        streams = rows.cursors(txn, zone.id)
        sealed = sealed_keys(txn, zone.id)
        known = rows.zones(txn)
    heir = known.get(known[zone.id].heir)
    position = max((cursor.position for _, _, cursor in streams), default=0)
    return {
        "position": position,
        "heard_position": note.get("heard_position"),
        "heard_ns": note.get("heard_ns"),
        "sealed_keys": sealed,
        "heir": None if heir is None else heir.name,
        "streams": [
            {"shard": shard, "lane": lane, "position": cursor.position, "step": cursor.step}
            for shard, lane, cursor in streams
        ],
    }


def _text(zone: Zone) -> str:
    return str(uuid.UUID(bytes=zone.id))


Sample = tuple[str, dict[str, Any], float]


def samples(found: Document) -> Iterator[Sample]:
    """A status as samples for a monitoring system; on every node of a cluster those of the one that ships."""
    if found["node"] is not None:
        yield "space_federation_sender", {}, float(found["node"] == found["sender"])
    for zone in found["zones"]:
        labels = {"zone": zone["zone"]}
        yield "space_federation_connected", labels, float(zone["connected"])
        for name in ("lag_events", "lag_bytes", "lag_seconds"):
            yield f"space_federation_{name}", labels, zone[name]
        yield "space_federation_rpo_ok", labels, float(zone["rpo_ok"])
        if zone["position"] is not None:
            yield "space_federation_position", labels, zone["position"]
        yield "space_federation_received_position", labels, zone["received"]["position"]
        for name in ("sent_bytes", "shipments"):
            if name in zone:
                yield f"space_federation_{name}_total", labels, zone[name]
        if zone.get("rtt_seconds") is not None:
            yield "space_federation_rtt_seconds", labels, zone["rtt_seconds"]

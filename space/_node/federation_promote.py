"""Taking another zone's place: what would be lost, the promotion, and what the zone it replaces asks about it.

A home says with every pulse what it has that did not come here yet (:meth:`ZoneSource.pulse`), so what a promotion
loses is known before it, as of the last pulse.  The promotion itself is one event; how the old home gives way is in
:mod:`space._node.federation_follow`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import attrs

from space._errors import ConflictError, NotFoundError, RefusedError, Status, UnavailableError
from space._node.caller import Document
from space._node.federation_home import Walk
from space._node.federation_status import heard_note
from space.events import commands as cmd
from space.events.ids import BRANCHES, ID_BYTES, CapsuleId, format_time
from space.events.types import Kind
from space.statemachine import zones as rows
from space.statemachine.tables import CAPSULE, ENTRY, HOME, CapsuleRow, EntryRow, Overlay, Reader

if TYPE_CHECKING:
    from space._node.federation_zones import Zone, Zones
    from space._node.store import Store

ATTEMPTS: Final = 20
"""How often more may come from the zone while its place is taken; it stops when the connection does."""

ASKED_MAX: Final = 10_000
"""Capsules one question is about: 350 KB."""

WHOLE: Final = (1 << 63) - 1
"""What a capsule is said to have come to whose home came from the zone that asks: all there is."""

PARTS_TOLD: Final = 500
CAPSULES_TOLD: Final = 1000
"""What a pulse says in detail of what did not come; beyond that only that there is more."""


def predict(store: Store, zone: Zone) -> Document:
    """What is lost if this zone takes the place of another one now, as far as that one has said what it has.

    ``capsules`` is in detail what did not come: each with the latest position of a change of it, and bytes as they
    would have been shipped.  ``unknown`` are positions of which the zone said only that they are there.
    """
    with store._read() as txn:
        row = rows.zone_row(txn, zone.id)
        streams = rows.cursors(txn, zone.id)
        incomplete = _incomplete(txn, zone.id) if any(cursor.resume for _, _, cursor in streams) else []
    heard = _heard(store, zone)
    reached = {lane: cursor.position - bool(cursor.resume) for _, lane, cursor in streams}
    missing = [part for part in heard["parts"] if part["position"] > reached.get(part["lane"], 0)]
    capsules: dict[str, Document] = {}
    for part in missing:
        for capsule in part["capsules"]:
            capsules[capsule] = {"capsule": capsule, "lane": part["lane"], "position": part["position"]}
    unknown = max(0, heard["position"] - max(heard["read"], *reached.values(), 0))
    return {
        "zone": zone.name,
        "epoch": (0 if row is None else row.epoch) + 1,
        "heard": None if not heard["time_ns"] else format_time(heard["time_ns"]),
        "heard_seconds": None
        if not heard["time_ns"]
        else round((time.time_ns() - heard["time_ns"]) / 1e9, 3),
        "heard_position": heard["position"],
        "streams": [
            {"shard": shard, "lane": lane, "position": cursor.position, "step": cursor.step}
            for shard, lane, cursor in streams
        ],
        "positions": len({part["position"] for part in missing}),
        "changes": sum(part["changes"] for part in missing),
        "bytes": sum(part["bytes"] for part in missing),
        "capsules": list(capsules.values()),
        "unknown": unknown,
        "more": heard["more"],
        "incomplete": [str(CapsuleId(each)) for each in incomplete],
    }


def _heard(store: Store, zone: Zone) -> dict[str, Any]:
    """What a zone last said of itself, checked: it is another's word, and was kept in a file."""
    note = heard_note(store, zone)
    missing = note.get("missing")
    missing = missing if isinstance(missing, dict) else {}
    parts = [
        {
            "lane": part[0],
            "position": part[1],
            "changes": part[2],
            "bytes": part[3],
            "capsules": [str(CapsuleId(bytes.fromhex(each))) for each in part[4]],
        }
        for part in _list(missing.get("parts"))[:PARTS_TOLD]
        if _is_part(part)
    ]
    return {
        "position": _count(note.get("heard_position")),
        "time_ns": _count(note.get("heard_ns")),
        "read": _count(missing.get("read")),
        "parts": parts,
        "more": missing.get("more") is True,
    }


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _count(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 1 << 63 else 0


def _is_part(part: Any) -> bool:
    return (
        isinstance(part, list)
        and len(part) == 5
        and all(type(each) is int and 0 <= each < 1 << 63 for each in part[:4])
        and isinstance(part[4], list)
        and len(part[4]) <= CAPSULES_TOLD
        and all(isinstance(each, str) and _is_id(each) for each in part[4])
    )


def _is_id(text: str) -> bool:
    try:
        return len(bytes.fromhex(text)) == ID_BYTES
    except ValueError:
        return False


def _incomplete(txn: Reader, zone: bytes) -> list[bytes]:
    """Replicas of a zone of which a copy is under way."""
    found = ((capsule, rows.HomeRow.decode(value)) for capsule, value in txn.scan(HOME, b""))
    return [capsule for capsule, home in found if home.zone == zone and home.copy]


def promote(store: Store, zones: Zones, name: str, *, again: bool = False) -> Document:
    """Takes the place of a zone: what came from it has its home here from now on, and can be changed.

    Args:
        again: though it was done before: raises the epoch once more, so that this side wins where both were promoted.

    Returns:
        What :func:`predict` said of the very moment it happened at, and ``position``, where the log says so.

    Raises:
        NotFoundError: no such zone, or nothing came from it.
        ConflictError: this was done before; or more and more comes from the zone.
    """
    zone = zones.find(name)
    for _ in range(ATTEMPTS):
        expected = predict(store, zone)
        if not (expected["streams"] or again or _is_lost(store, zone)):
            raise NotFoundError(
                f"nothing has come from zone {name}, so there is nothing to be taken over",
                hint="space federation status shows what came from where",
            )
        cursors = [
            (each["shard"], each["lane"], each["position"], each["step"]) for each in expected["streams"]
        ]
        incomplete = [bytes(CapsuleId.parse(each)) for each in expected["incomplete"]]
        command = cmd.PromoteZone(zone.id, cursors, incomplete, again=again)
        try:
            receipt = store.execute(command)
        except ConflictError as error:
            if error.status is not Status.STALE:
                raise
            continue
        return {**expected, "position": receipt.position}
    raise ConflictError(
        f"zone {name} ships faster than its place can be taken",
        hint="stop space federation serve there first",
    )


def _is_lost(store: Store, zone: Zone) -> bool:
    """Whether a zone has taken this one's place."""
    with store._read() as txn:
        row = rows.zone_row(txn, zone.id)
    return row is not None and row.lost > 0


@attrs.frozen
class Arrival:
    """How a capsule of another zone is here.

    Attributes:
        position: of that zone's log, to which it has come.
        there: whether it is here at all.
        mtime, ctime: its times, nanoseconds.
    """

    position: int = 0
    there: bool = True
    mtime: int = 0
    ctime: int = 0


def arrivals(store: Store, zone: bytes, capsules: Sequence[bytes]) -> list[Arrival]:
    """How some capsules of another zone are here.

    What another zone has as its own by now, after this one took the first one's place, is as it was when it did.

    Raises:
        RefusedError: the log does not reach back there.
    """
    with store._read() as txn:
        row = rows.zone_row(txn, zone)
        state = Overlay(txn)
        found = {each: _arrival(state, zone, row, each) for each in capsules}
        further = [
            each for each in found if row is not None and row.taken and _is_anothers(state, zone, each)
        ]
    if row is not None and further:
        try:
            with Walk(store, row.promoted) as walk:
                was = Overlay(walk.now.state)
                found |= {each: _arrival(was, zone, rows.zone_row(was, zone), each) for each in further}
        except NotFoundError:
            raise RefusedError(
                f"{row} was replaced at position {row.promoted}, and the log begins at {store.wal.first_index}: how "
                "far what came from it had come is not known any more"
            ) from None
    return [found[each] for each in capsules]


def _is_anothers(state: Overlay, zone: bytes, capsule: bytes) -> bool:
    """Whether a third zone brought a capsule after a zone did."""
    home = rows.home_row(state, capsule)
    return home is not None and home.zone != zone


def _arrival(state: Overlay, number: bytes, zone: rows.ZoneRow | None, capsule: bytes) -> Arrival:
    row = state.capsule(capsule)
    if row is None or zone is None:
        return Arrival(there=False)
    home = rows.home_row(state, capsule)
    if home is not None and home.zone != number and rows.home_of(state, capsule, row) == home.zone:
        return Arrival(there=False)  # what that zone's heir has not brought yet
    if row.deleted and home is not None and home.zone == number and not (home.position or home.moved):
        return Arrival(there=False)  # withdrawn when that zone's heir was followed, which had none
    if home is not None and home.moved:
        # What was taken here has all there was, unless that zone took this one's place since; what went there again has
        # what had come until then.
        whole = home.here and home.moved > zone.parted
        return Arrival(WHOLE if whole else home.position or home.came, True, row.mtime, row.ctime)
    return Arrival(rows.reached(state, number, zone, capsule), True, row.mtime, row.ctime)


def parse_arrivals(document: Document, count: int) -> list[Arrival]:
    """What another zone answered about so many capsules.

    Raises:
        UnavailableError: it is nothing of the kind.
    """
    found = document.get("capsules")
    if not isinstance(found, list) or len(found) != count or not all(map(_is_arrival, found)):
        raise UnavailableError("the zone answers something else than was asked", hint="is it newer?")
    return [Arrival(*each) for each in found]


def _is_arrival(row: Any) -> bool:
    return (
        isinstance(row, list)
        and [type(each) for each in row] == [int, bool, int, int]
        and 0 <= row[0] < 1 << 63
        and all(-(1 << 63) <= each < 1 << 63 for each in row[2:])
    )


# --- branches --------------------------------------------------------------------------------------


def branches(store: Store) -> list[Document]:
    """What homes that were lost had not shipped, oldest epoch first: a directory each."""
    with store._read() as txn:
        found = [
            (key[ID_BYTES:], EntryRow.decode(value).capsule)
            for key, value in txn.scan(ENTRY, bytes(BRANCHES))
        ]
        return [_branch(txn, name, capsule) for name, capsule in found]


def _branch(txn: Reader, name: bytes, capsule: bytes) -> Document:
    text = name.decode(errors="replace")
    zone, _, epoch = text.rpartition("-")
    data = txn.get(CAPSULE, capsule)
    made = None if data is None else CapsuleRow.decode(data)
    files = list(_files(txn, capsule, b""))
    return {
        "branch": text,
        "path": f"/zones/.branches/{text}",
        "zone": zone,
        "epoch": int(epoch) if epoch.isdecimal() else None,
        "time": None if made is None else format_time(made.btime),
        "capsules": len(files),
        "bytes": sum(row.size for _, row in files),
        "files": [
            {"path": path.decode(errors="replace"), "size": row.size} for path, row in files[:CAPSULES_TOLD]
        ],
    }


def _files(txn: Reader, directory: bytes, path: bytes) -> list[tuple[bytes, CapsuleRow]]:
    """What is in a branch and is no directory, with its path there."""
    found: list[tuple[bytes, CapsuleRow]] = []
    todo = [(directory, path)]
    while todo:
        parent, above = todo.pop()
        for key, value in txn.scan(ENTRY, parent):
            entry, name = EntryRow.decode(value), key[ID_BYTES:]
            here = above + b"/" + name if above else name
            data = txn.get(CAPSULE, entry.capsule)
            row = None if data is None else CapsuleRow.decode(data)
            if entry.kind == Kind.DIRECTORY:
                todo.append((entry.capsule, here))
            elif row is not None:
                found.append((here, row))
    return sorted(found, key=lambda each: each[0])

"""Looking after a store: the event log as users see it, replay, verify, gc."""

from __future__ import annotations

import itertools
import shutil
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

import attrs
import msgpack
from blake3 import blake3

from space._errors import CorruptionError, UsageError
from space._node import history
from space.content.frames import FRAME_RECORD_BYTES, stored_ranges, unpack_frames
from space.content.keys import master_name
from space.events import commands as cmd
from space.events import types as ev
from space.events.codec import NO_LINK, chain_link, decode_batch, encode_event
from space.events.commands import Durability
from space.events.ids import CLUSTER, ID_BYTES, AtPosition, CapsuleId, format_time, parse_moment
from space.events.registry import BY_CLASS
from space.events.types import Kind
from space.projections import content_map
from space.projections.contract import View
from space.projections.feed import Progress, fold
from space.statemachine import replies
from space.statemachine.apply import clone_id, manifest_nodes
from space.statemachine.store import STATE_VIEW, Applied, ReadTransaction, read_seal
from space.statemachine.tables import (
    CAPSULE,
    ENTRY,
    KEY,
    RECLAIMED,
    REPLY,
    TABLES,
    U32,
    U64,
    CapsuleRow,
    EntryRow,
    format_digest,
    table_digest,
)
from space.wal.segment_reader import Damage

if TYPE_CHECKING:
    from space._node.store import Store

FOLLOW_SECONDS: Final = 0.1
LET_PASS_SECONDS: Final = 0.0002
RECLAIM_RANGES_MAX: Final = 50_000
PURGE_MAX: Final = 50_000
BLOCK: Final = 4096
RETRY_NS: Final = 24 * 3600 * 10**9
"""How long a client may stay silent and still retry its last commands without their being carried out twice."""

_EVER: Final = 1 << 62

SERVED_FROM: Final = dict.fromkeys(
    ("fuse", "vfs", "tree", "nfs", "nvme", "csi", "block"), (STATE_VIEW, "content")
)
"""Protocol views have no rows of their own: they are served from these."""

_ID: Final = struct.Struct(f"{ID_BYTES}s")
_ZONE_KINDS: Final = (ev.ZoneDefined, ev.ZoneAdded, ev.ZoneChanged)

OnProgress = Callable[[Progress], None]


# --- the log as users see it -----------------------------------------------------------------------


@attrs.frozen
class LogEvent:
    """One event with its place, its time and who caused it."""

    position: int
    event: int
    time_ns: int
    actor: str
    kind: str
    capsule: CapsuleId
    detail: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """A JSON-able object: ids as UUIDs, time as ISO-8601 and as nanoseconds."""
        return {
            "position": self.position,
            "event": self.event,
            "time": format_time(self.time_ns),
            "time_ns": self.time_ns,
            "actor": self.actor,
            "kind": self.kind,
            "capsule": str(self.capsule),
            "detail": self.detail,
        }


def log_events(
    store: Store,
    *,
    capsule: CapsuleId | None = None,
    start: int = 1,
    stop: int | None = None,
    follow: bool = False,
) -> Iterator[LogEvent]:
    """Events from batch ``start`` to batch ``stop``, oldest first; with ``follow``, waits for more.

    Raises:
        CorruptionError: the log is damaged there.
    """
    at = max(start, store.wal.first_index, 1)
    while True:
        last = store.last if stop is None else min(stop, store.last)
        for record in store.wal.records(at, last + 1) if at <= last else ():
            yield from _record_events(record.index, record.metadata, capsule)
            at = record.index + 1
        if not follow or (stop is not None and at > stop):
            return
        time.sleep(FOLLOW_SECONDS)


def _record_events(position: int, metadata: bytes, capsule: CapsuleId | None) -> Iterator[LogEvent]:
    number = 0
    for entry in decode_batch(metadata):
        for _, event in entry.events:
            if capsule is None or _concerns(event, capsule):
                about = CapsuleId(event.capsule)
                kind = type(event).__name__
                yield LogEvent(position, number, entry.time_ns, entry.actor, kind, about, detail_of(event))
            number += 1


def _concerns(event: ev.Event, capsule: CapsuleId) -> bool:
    if isinstance(event, ev.ShipmentReceived | ev.ShipmentSent):
        unit = ev.SHIPPED.size if isinstance(event, ev.ShipmentSent) else ID_BYTES
        return any(event.capsules.startswith(capsule, at) for at in range(0, len(event.capsules), unit))
    return any(getattr(event, field, None) == capsule for field in ("capsule", "other", "replaced", "source"))


def detail_of(event: ev.Event) -> dict[str, Any]:
    """The fields of an event but its capsule, as JSON-able values."""
    detail: dict[str, Any] = {}
    for field in BY_CLASS[type(event)].fields:
        value = getattr(event, field)
        if field == "capsule" or value is None or value == b"":
            continue
        detail[field] = _shown(event, field, value)
    return detail


def _shown(event: ev.Event, field: str, value: Any) -> Any:
    if field == "kind":
        kinds = ev.ZoneKind if isinstance(event, _ZONE_KINDS) else Kind
        return kinds(value).name.lower() if value in list(kinds) else value
    if field in {"master", "before"}:
        return master_name(value)
    if not isinstance(value, bytes):
        return value
    if field == "frames":
        stored = sum(length for _, _, length in stored_ranges(value))
        return {"count": len(value) // FRAME_RECORD_BYTES, "stored_bytes": stored}
    if field == "document":
        return msgpack.unpackb(value)
    if field == "source_link":
        return value.hex()
    if field in {"capsules", "withdrawn", "cursors"}:
        return _packed(event, field, value)
    if field in {"sealing", "authorities"}:
        return f"blake3:{blake3(value).hexdigest(16)}"
    if field == "resume":
        return value.hex()
    if field in {
        "wrapped",
        "rows",
        "manifest",
        "members",
        "ranges",
        "purged",
        "registered",
        "removed",
        "told",
    }:
        return f"{len(value)} bytes"
    if len(value) == ID_BYTES and field in {
        "store",
        "parent",
        "new_parent",
        "replaced",
        "other",
        "other_parent",
        "source",
        "namespace",
        "holder",
        "zone",
    }:
        return str(CapsuleId(value))
    return value.decode(errors="backslashreplace")


def _packed(event: ev.Event, field: str, value: bytes) -> Any:
    """Capsules and streams of a shipment or promotion, one by one; what is not whole as its length."""
    unit = ev.CURSOR if field == "cursors" else ev.SHIPPED
    if field == "withdrawn" or (field == "capsules" and isinstance(event, ev.ShipmentReceived)):
        unit = _ID
    if len(value) % unit.size:
        return f"{len(value)} bytes"
    rows = list(unit.iter_unpack(value))
    if unit is ev.CURSOR:
        return [dict(zip(("shard", "lane", "position"), row, strict=True)) for row in rows]
    if unit is _ID:
        return [str(CapsuleId(capsule)) for (capsule,) in rows]
    return [{"capsule": str(CapsuleId(capsule)), "position": position} for capsule, position in rows]


# --- replay ----------------------------------------------------------------------------------------


@attrs.frozen
class ReplayResult:
    """A rebuild: which views, how much, how fast, and whether the rows came out the same.

    ``digests`` maps a view to its digest before and after; filled in when the caller asked to verify.
    """

    views: list[str]
    events: int
    seconds: float
    events_per_second: float
    position: int
    digests: dict[str, dict[str, str]]
    equal: bool


def replay(
    store: Store,
    *,
    view: str | None = None,
    to: str | None = None,
    verify: bool = False,
    on_progress: OnProgress | None = None,
) -> ReplayResult:
    """Drops and rebuilds views from the log; readers see the old rows until the new ones are complete.

    With ``to``, the rebuild ends at that moment and is thrown away after it was measured (and, with
    ``verify``, compared with the tables a checkpoint leads to).

    Raises:
        UsageError: no such view; not a moment.
        CorruptionError: with ``verify``, rows differed (the rebuilt ones are kept); or the log is damaged.
    """
    names = _view_names(store, view)
    started = time.perf_counter()
    if to is not None:
        return _replay_to(store, names, to, verify, on_progress, started)
    with store._rebuilding:
        return _rebuild(store, names, verify, on_progress, started)


def _rebuild(
    store: Store, names: list[str], verify: bool, on_progress: OnProgress | None, started: float
) -> ReplayResult:
    folded = [each for each in store.views if each.name in names]
    with_state = STATE_VIEW in names
    before: dict[str, str] = {}
    after: dict[str, str] = {}
    tables = store._tables
    handles = tables.shadow(names)
    at = _fold(store, folded, with_state, handles, Applied(), on_progress)
    with store.still():
        store._follow()
        at = _fold(store, folded, with_state, handles, at, on_progress)
        seconds = time.perf_counter() - started
        if verify:
            with tables.read() as live:
                before = _digests(store, live, names)
                after = _digests(store, ReadTransaction(live._txn, handles), names)
        state_equal = not with_state or at.digest == store._applied.digest
        with tables.write() as txn:
            if with_state:
                store._applied = at
                txn.set_applied(at)
            tables.promote(txn, names)
        tables.adopt(handles)
    equal = before == after and state_equal
    if verify and not equal:
        wrong = [name for name in names if before.get(name) != after.get(name)] or [STATE_VIEW]
        raise CorruptionError(
            f"rows of {', '.join(wrong)} were not what the log says",
            segment=history.LIVE,
            position=at.position,
            hint="they have been rebuilt from the log",
        )
    digests = {name: {"before": before[name], "after": after[name]} for name in before}
    return ReplayResult(
        names, at.events, seconds, at.events / max(seconds, 1e-9), at.position, digests, equal
    )


def _view_names(store: Store, view: str | None) -> list[str]:
    known = [STATE_VIEW, *(each.name for each in store.views)]
    if view is None:
        return known
    if view in SERVED_FROM:
        return [name for name in SERVED_FROM[view] if name in known]
    if view not in known:
        raise UsageError(f"no view {view!r}", hint=f"views: {', '.join([*known, *SERVED_FROM])}")
    return [view]


def _fold(
    store: Store,
    views: list[View],
    with_state: bool,
    handles: dict[int, Any],
    at: Applied,
    on_progress: OnProgress | None,
) -> Applied:
    last = store.last
    if at.position >= last:
        return at
    records = store.wal.records(at.position + 1, last + 1)

    def let_pass(progress: Progress) -> None:
        while store.wanted:
            time.sleep(LET_PASS_SECONDS)
        if on_progress is not None:
            on_progress(progress)

    return fold(
        store._tables,
        views,
        records,
        start=at,
        with_state=with_state,
        handles=handles,
        on_progress=let_pass,
        wanted=lambda: store.wanted,
    )


def _digests(store: Store, txn: ReadTransaction, names: list[str]) -> dict[str, str]:
    digests = {}
    for name in names:
        tables = TABLES if name == STATE_VIEW else store._tables.layout.tables[name]
        digests[name] = format_digest(sum(table_digest(txn, table) for table in tables))
    return digests


def _replay_to(
    store: Store, names: list[str], to: str, verify: bool, on_progress: OnProgress | None, started: float
) -> ReplayResult:
    target = history.locate(store.wal, parse_moment(to, now_ns=store._clock()), store.last)
    scratch = store.path / history.SCRATCH
    tables = history.build(
        store.path,
        store.wal,
        store.views,
        scratch / "replay",
        target,
        use_checkpoints=False,
        on_progress=on_progress,
    )
    seconds = time.perf_counter() - started
    digests: dict[str, dict[str, str]] = {}
    try:
        applied = tables.applied
        if verify:
            with (
                tables.read() as txn,
                store.at(AtPosition(target.position, target.event)) as past,
                past._read() as other,
            ):
                after, before = _digests(store, txn, names), _digests(store, other, names)
            digests = {name: {"before": before[name], "after": after[name]} for name in names}
            if before != after:
                raise CorruptionError(
                    f"tables at {to} differ from what the log says",
                    segment=history.CHECKPOINTS,
                    position=target.position,
                )
    finally:
        tables.close(seal=False)
    return ReplayResult(
        names, applied.events, seconds, applied.events / max(seconds, 1e-9), applied.position, digests, True
    )


# --- verify ----------------------------------------------------------------------------------------


@attrs.define
class VerifyReport:
    """What was looked at, and what is wrong with it: ``{segment, offset, position, what}`` each.

    ``destroyed`` counts capsules that cannot be read because their data key was destroyed, which is nothing wrong.
    """

    segments: int = 0
    batches: int = 0
    events: int = 0
    payload_bytes: int = 0
    repaired: int = 0
    destroyed: int = 0
    findings: list[dict[str, Any]] = attrs.field(factory=list)

    def add(self, what: str, *, segment: str = "", offset: int = -1, position: int = -1) -> None:
        self.findings.append({"segment": segment, "offset": offset, "position": position, "what": what})


def verify(store: Store, *, repair: bool = False, on_progress: OnProgress | None = None) -> VerifyReport:
    """Checks every checksum, chain link and reference; with ``repair``, rebuilds what the log can rebuild."""
    report = VerifyReport(segments=len(store.wal.segments()))
    reclaimed = _reclaimed(store)
    damaged_payload = {}
    for finding in store.wal.verify():
        if finding.what is Damage.PAYLOAD:
            declared = any(position == finding.index for position, _ in reclaimed)
            if repair and not declared and store.restore(finding.index):
                report.repaired += 1
                continue
            damaged_payload[finding.index] = finding
        else:
            report.add(
                finding.what.value, segment=finding.segment, offset=finding.offset, position=finding.index
            )
    try:
        _verify_events(store, report, damaged_payload, reclaimed, on_progress)
    except CorruptionError as error:
        if not any(finding["position"] == error.position for finding in report.findings):
            report.add(str(error), segment=error.segment, offset=error.offset, position=error.position)
    if not report.findings:
        _verify_tables(store, report, repair)
    elif repair:
        store.heal_later()
    report.destroyed = _destroyed(store)
    return report


def _destroyed(store: Store) -> int:
    """Capsules whose data key was destroyed."""
    with store._read() as txn:
        keys = {key[: U32.size] for key, row in txn.scan(KEY, b"") if not row}
        if not keys:
            return 0
        rows = (CapsuleRow.decode(value) for _, value in txn.scan(CAPSULE, b""))
        return sum(U32.pack(row.key) in keys for row in rows)


def _reclaimed(store: Store) -> set[tuple[int, int]]:
    with store._read() as txn:
        return {(U64.unpack(key[:8])[0], U32.unpack(key[8:])[0]) for key, _ in txn.scan(RECLAIMED, b"")}


def _verify_events(
    store: Store,
    report: VerifyReport,
    damaged: dict[int, Any],
    reclaimed: set[tuple[int, int]],
    on_progress: OnProgress | None,
) -> None:
    from crc32c import crc32c

    links: dict[bytes, bytes] = {}
    progress = Progress()
    for record in store.wal.records(max(1, store.wal.first_index), store.last + 1):
        report.batches += 1
        report.payload_bytes += record.payload_length
        for entry in decode_batch(record.metadata):
            for link, event in entry.events:
                report.events += 1
                before = NO_LINK if event.capsule == CLUSTER else links.get(event.capsule, NO_LINK)
                if link != chain_link(before, encode_event(event)):
                    report.add(
                        f"chain of capsule {CapsuleId(event.capsule)} is broken", position=record.index
                    )
                if isinstance(event, ev.RangeCopied) and event.source_link != links.get(
                    event.source, NO_LINK
                ):
                    report.add(
                        f"capsule {CapsuleId(event.capsule)} got bytes of another {CapsuleId(event.source)}",
                        position=record.index,
                    )
                _follow_links(links, link, event)
                if isinstance(event, ev.ExtentWritten) and record.index in damaged:
                    _verify_frames(store, report, damaged, record.index, event, reclaimed, crc32c)
        progress.position, progress.events = record.index, report.events
        if on_progress is not None and record.index % 256 == 0:
            on_progress(progress)


def _follow_links(links: dict[bytes, bytes], link: bytes, event: ev.Event) -> None:
    """Heads of the capsules' chains after an event."""
    if isinstance(event, ev.CapsuleCloned):
        members: Iterable[bytes] = (node.capsule for node, _ in manifest_nodes(event.manifest))
        if not event.manifest:
            members = _ids(event.members)
        for member in members:
            links[clone_id(event.capsule, event.source, member)] = chain_link(link, member)
    elif isinstance(event, ev.CapsulesPurged):
        for capsule in _ids(event.purged):
            links.pop(capsule, None)
    links[event.capsule] = link


def _ids(packed: bytes) -> Iterator[bytes]:
    return (packed[at : at + ID_BYTES] for at in range(0, len(packed), ID_BYTES))


def _verify_frames(
    store: Store,
    report: VerifyReport,
    damaged: dict[int, Any],
    position: int,
    event: ev.ExtentWritten,
    reclaimed: set[tuple[int, int]],
    crc32c: Callable[[bytes], int],
) -> None:
    """A payload area whose checksum is off may have lost reclaimed frames only."""
    for frame in unpack_frames(event.frames):
        if frame.source_position or not frame.stored_length or (position, frame.payload_offset) in reclaimed:
            continue
        if crc32c(store.wal.read_payload(position, frame.payload_offset, frame.stored_length)) != frame.crc:
            finding = damaged[position]
            report.add(
                f"stored bytes of capsule {CapsuleId(event.capsule)} are damaged (frame at payload offset "
                f"{frame.payload_offset})",
                segment=finding.segment,
                offset=finding.offset,
                position=position,
            )


def _verify_tables(store: Store, report: VerifyReport, repair: bool) -> None:
    with store._read() as txn:
        applied = txn.applied
        digest = sum(table_digest(txn, table) for table in TABLES) % (1 << 256)
        if digest != applied.digest:
            report.add(
                "state rows do not add up to the state digest",
                segment=history.LIVE,
                position=applied.position,
            )
        for extent in content_map.all_extents(txn):
            _verify_extent(store, report, extent, applied.position)
    for path in history.checkpoints(store.path):
        found = read_seal(path, store._tables.layout)
        if found is None or not history.fits(store.wal, found):
            report.add(
                "checkpoint is damaged", segment=f"{history.CHECKPOINTS}/{path.name}", position=int(path.name)
            )
            if repair:
                shutil.rmtree(path, ignore_errors=True)
    if report.findings and repair:
        report.repaired = len(report.findings)
        report.findings.clear()
        replay(store)
        _verify_tables(store, report, repair=False)


def _verify_extent(store: Store, report: VerifyReport, extent: content_map.Extent, last: int) -> None:
    for source, offset, length in stored_ranges(extent.frames):
        position = source or extent.position
        if not 0 < position <= last:
            report.add(
                f"the content map points to position {position}", segment=history.LIVE, position=position
            )
            continue
        try:
            store.wal.read_payload(position, offset + length, 0)  # looks up the place, reads nothing
        except UsageError:
            report.add("the content map points past a payload", segment=history.LIVE, position=position)


# --- gc --------------------------------------------------------------------------------------------


@attrs.frozen
class GcReport:
    """What was (or, dry, would be) given back."""

    bytes_given_back: int
    frames: int
    capsules_purged: int
    clients_forgotten: int
    dry_run: bool
    position: int


def gc(store: Store, *, dry_run: bool = False, on_progress: OnProgress | None = None) -> GcReport:
    """Reclaims payload that no present row, snapshot, clone or kept history can reach.

    Replies kept for the retries of clients that have been silent for a day go as well.

    What each capsule's ``history`` policy keeps counts from now.  The declaration is logged and durable before
    the first block is punched out of a segment, so a crash in between loses nothing but the space, which the
    next run gives back.
    """
    with store.alone():
        store._follow()
        horizons = _Horizons(store)
        purge = horizons.purgeable()
        keep = _kept(store, horizons, set(purge))
        dead = _dead_pieces(store, keep, on_progress)
        declared = _reclaimed(store)
        ranges = [
            (piece.position, piece.offset, piece.length)
            for piece in dead
            if (piece.position, piece.offset) not in declared
        ]
        silent = _silent_clients(store)
        if dry_run:
            total = sum(length for _, _, length in ranges)
            return GcReport(total, len(ranges), len(purge), len(silent), True, store.last)
        for at in range(0, len(silent), PURGE_MAX):
            store.execute(cmd.ForgetReplies(silent[at : at + PURGE_MAX]), durability=Durability.BUFFERED)
        for at in range(0, len(purge), PURGE_MAX):
            store.execute(cmd.PurgeCapsules(purge[at : at + PURGE_MAX]), durability=Durability.BUFFERED)
        for at in range(0, len(ranges), RECLAIM_RANGES_MAX):
            store.execute(
                cmd.ReclaimPayload(ranges[at : at + RECLAIM_RANGES_MAX]), durability=Durability.BUFFERED
            )
        store.sync()
        store._cache.clear()
        before = store.wal.bytes_on_disk()
        for position, offset, length in _runs(dead):
            store.wal.punch(position, offset, length)
        given = max(0, before - store.wal.bytes_on_disk())
        return GcReport(given, len(ranges), len(purge), len(silent), False, store.last)


def _silent_clients(store: Store) -> list[bytes]:
    """Clients whose last command is so old that nobody retries it any more."""
    newest: dict[bytes, int] = {}
    with store._read() as txn:
        for key, value in txn.scan(REPLY, b""):
            client = key[:ID_BYTES]
            newest[client] = max(newest.get(client, 0), replies.newest(value))
    before = store._clock() - RETRY_NS
    return [client for client, position in newest.items() if store.wal.time_ns(position) < before]


class _Horizons:
    """From which position on each capsule's history has to be kept."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._now = store._clock()
        self._by_policy: dict[int, int] = {}
        self._of: dict[bytes, int] = {}

    def of(self, capsule: bytes) -> int:
        """Position up to which overwritten content of a capsule may go; 0: none may, _EVER: all may."""
        known = self._of.get(capsule)
        if known is None:
            with self._store._read() as txn:
                data = txn.get(CAPSULE, capsule)
            known = self._of[capsule] = self._policy(CapsuleRow.decode(data).policy) if data else _EVER
        return known

    def _policy(self, number: int) -> int:
        if number not in self._by_policy:
            with self._store._read() as txn:
                history_ns = self._store._policy(txn, number).history_ns
            if history_ns is None:
                horizon = 0
            elif history_ns == 0:
                horizon = _EVER
            else:
                horizon = self._store.wal.index_at_time(self._now - history_ns)
            self._by_policy[number] = horizon
        return self._by_policy[number]

    def distinct(self) -> list[int]:
        return sorted({horizon for horizon in self._of.values() if 0 < horizon < _EVER})

    def purgeable(self) -> list[bytes]:
        """Deleted capsules past their horizon, subtrees only as a whole."""
        store, purge = self._store, []
        with store._read() as txn:
            deleted = [
                (key, row)
                for key, value in txn.scan(CAPSULE, b"")
                if (row := CapsuleRow.decode(value)).deleted
            ]
            for key, row in deleted:
                members = _subtree(txn, key)
                if all(row.deleted <= self.of(member) and member not in store.pinned for member in members):
                    purge += members
        return list(dict.fromkeys(purge))


def _subtree(txn: ReadTransaction, root: bytes) -> list[bytes]:
    found = [root]
    for capsule in found:
        data = txn.get(CAPSULE, capsule)
        if data is None or CapsuleRow.decode(data).kind != Kind.DIRECTORY:
            continue
        for _, value in txn.scan(ENTRY, capsule):
            row = EntryRow.decode(value)
            child = txn.get(CAPSULE, row.capsule)
            if row.kind == Kind.DIRECTORY or (child is not None and CapsuleRow.decode(child).nlink <= 1):
                found.append(row.capsule)
    return found


def _kept(store: Store, horizons: _Horizons, purge: set[bytes]) -> set[int]:
    """Stored frames (position << 32 | offset) that something can still reach."""
    keep: set[int] = set()
    with store._read() as txn:
        for capsule, _ in txn.scan(content_map.MAP, b""):
            horizons.of(capsule)
            if capsule not in purge:
                _keep_capsule(keep, txn, capsule)
    _keep_shared(store, _keep_events(store, horizons, purge, keep), keep)
    moments: list[tuple[int, int | None, CapsuleId | None]] = [
        (horizon, None, None) for horizon in horizons.distinct()
    ]
    moments += [(each.position, each.event, each.id) for each in store.snapshots()]
    for position, event, snapshot in moments:
        with store.at(AtPosition(position, event)) as past, past._read() as txn:
            if snapshot is not None:
                for capsule in _subtree(txn, snapshot):
                    _keep_capsule(keep, txn, capsule)
                continue
            for capsule, _ in txn.scan(content_map.MAP, b""):
                if horizons.of(capsule) == position and capsule not in purge:
                    _keep_capsule(keep, txn, capsule)
    return keep


def _keep_capsule(keep: set[int], txn: ReadTransaction, capsule: bytes) -> None:
    for extent in content_map.extents(txn, capsule, 0, content_map.OFFSET_MAX):
        _keep_frames(keep, extent.position, extent.frames)


def _keep_frames(keep: set[int], position: int, frames: bytes) -> None:
    for source, offset, _ in stored_ranges(frames):
        keep.add((source or position) << 32 | offset)


def _keep_events(store: Store, horizons: _Horizons, purge: set[bytes], keep: set[int]) -> list[int]:
    """Everything written after its capsule's horizon: some kept moment can see it.

    Returns:
        batches in which a capsule got content of another that does not keep it as long.
    """
    shared: list[int] = []
    for record in store.wal.records(max(1, store.wal.first_index)):
        for entry in decode_batch(record.metadata):
            for _, event in entry.events:
                if isinstance(event, ev.ExtentWritten):
                    if record.index > horizons.of(event.capsule) and event.capsule not in purge:
                        _keep_frames(keep, record.index, event.frames)
                elif isinstance(event, ev.CapsuleCloned) and event.manifest:
                    for _, parts in manifest_nodes(event.manifest):
                        for _, _, _, position, frames in parts:
                            if record.index > horizons.of(event.capsule):
                                _keep_frames(keep, position, frames)
                elif _outlives(horizons, purge, record.index, event) and record.index not in shared[-1:]:
                    shared.append(record.index)
    return shared


def _keep_shared(store: Store, batches: list[int], keep: set[int]) -> None:
    """Content that one capsule got from another which remembers less: kept for the one, whatever the other keeps.

    What was shared is not in the events but in the map of that moment, so tables follow the log from one such batch
    to the next.  Within a batch the order is not looked at: everything its giving capsules had before it is kept, and
    everything written in it.
    """
    if not batches:
        return
    scratch = history.past_directory(store.path)
    tables = history.build(store.path, store.wal, store.views, scratch, history.Target(batches[0] - 1))
    try:
        for position in batches:
            history.catch_up(tables, store.wal, store.views, history.Target(position - 1))
            with tables.read() as txn:
                for entry in decode_batch(store.wal.read(position).metadata):
                    for _, event in entry.events:
                        _keep_given(keep, txn, position, event)
    finally:
        tables.close(seal=False)
        shutil.rmtree(scratch, ignore_errors=True)


def _keep_given(keep: set[int], txn: ReadTransaction, position: int, event: ev.Event) -> None:
    if isinstance(event, ev.ExtentWritten):
        _keep_frames(keep, position, event.frames)
    elif isinstance(event, ev.RangeCopied):
        for extent in content_map.extents(txn, event.source, event.source_offset, event.length):
            _keep_frames(keep, extent.position, extent.frames)
    elif isinstance(event, ev.CapsuleCloned):
        for member in _ids(event.members):
            _keep_capsule(keep, txn, member)


def _outlives(horizons: _Horizons, purge: set[bytes], position: int, event: ev.Event) -> bool:
    """Whether an event gave bytes to a capsule whose history reaches back to it, from one whose does not."""
    if isinstance(event, ev.RangeCopied):
        pairs: Iterable[tuple[bytes, bytes]] = [(event.capsule, event.source)]
    elif isinstance(event, ev.CapsuleCloned):
        pairs = ((clone_id(event.capsule, event.source, each), each) for each in _ids(event.members))
    else:
        return False
    return any(
        got not in purge and horizons.of(got) < position and (gave in purge or horizons.of(gave) >= position)
        for got, gave in pairs
    )


@attrs.frozen
class _Piece:
    """A stored frame nothing reaches; ``room`` is its length with the padding up to its neighbour."""

    position: int
    offset: int
    length: int
    room: int


def _dead_pieces(store: Store, keep: set[int], on_progress: OnProgress | None) -> list[_Piece]:
    dead: list[_Piece] = []
    progress = Progress()
    for record in store.wal.records(max(1, store.wal.first_index)):
        if record.payload_length:
            dead += _dead_in(record.index, record.metadata, record.payload_length, keep)
        progress.position = record.index
        if on_progress is not None and record.index % 256 == 0:
            on_progress(progress)
    return dead


def _dead_in(position: int, metadata: bytes, payload_length: int, keep: set[int]) -> Iterator[_Piece]:
    pieces = {
        offset: length
        for entry in decode_batch(metadata)
        for _, event in entry.events
        if isinstance(event, ev.ExtentWritten)
        for source, offset, length in stored_ranges(event.frames)
        if not source
    }
    for offset, following in itertools.pairwise([*sorted(pieces), payload_length]):
        if position << 32 | offset not in keep:
            padded = -(-(offset + pieces[offset]) // BLOCK) * BLOCK
            yield _Piece(position, offset, pieces[offset], min(padded, following) - offset)


def _runs(pieces: list[_Piece]) -> Iterator[tuple[int, int, int]]:
    """Neighbouring pieces of one batch as one range: blocks they share can go too."""
    for position, group in itertools.groupby(pieces, key=lambda piece: piece.position):
        start = end = -1
        for piece in group:
            if piece.offset != end:
                if end > start:
                    yield position, start, end - start
                start = piece.offset
            end = piece.offset + piece.room
        if end > start:
            yield position, start, end - start

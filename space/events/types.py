"""The facts: every mutation of anything in a store is one or more of these.

An event says what changed, with everything needed to fold it and nothing that could differ between
two machines: times, ids and nonces were chosen by the proposer.  The time of an event and its actor
belong to the command it came from (:class:`space.events.codec.Entry`), as all events of one command
happen at once.

``capsule`` always names the capsule whose chain the event belongs to.
"""

from __future__ import annotations

import enum
import struct
from typing import Final, final

from space.events.registry import (
    DOCUMENT_BYTES_MAX,
    FRAMES_BYTES_MAX,
    LINK_BYTES,
    MANIFEST_BYTES_MAX,
    PATH_BYTES_MAX,
    XATTR_BYTES_MAX,
    blob,
    entry_name,
    event,
    i64_or_none,
    identifier,
    optional_identifier,
    text,
    u32,
    u32_or_none,
    u63,
    upcaster,
)


@final
class Kind(enum.IntEnum):
    """What a capsule is in a tree.  A block volume is a FILE with a block size."""

    FILE = 1
    DIRECTORY = 2
    SYMLINK = 3
    FIFO = 4
    SOCKET = 5
    CHARACTER_DEVICE = 6
    BLOCK_DEVICE = 7


REFUSAL_BYTES_MAX: Final = 1024
"""Longest message of a refusal that is kept."""

EXTENT_BYTES_MAX: Final = 1 << 20
"""Longest extent one ExtentWritten may carry: bounds what one read must look at and one batch must hold."""

COPY_BYTES_MAX: Final = 256 << 20
"""Longest range one RangeCopied may share: folding it takes a row for each extent, 65,536 where all have 4 KiB."""

SUBSYSTEM_CHARACTERS_MAX: Final = 223
"""Longest NVMe qualified name (NVM Express Base 2.0 §4.5)."""


@final
class ZoneKind(enum.IntEnum):
    """How far away a zone is, and so what links to it are like."""

    METRO = 1
    GEO = 2
    EDGE = 3


ZONE_CHARACTERS_MAX: Final = 63
"""Longest name of a zone: what a policy may name."""

URL_CHARACTERS_MAX: Final = 2048
SEALING_KEY_BYTES: Final = 32
"""An X25519 public key (RFC 7748 §5)."""

RESUME_BYTES_MAX: Final = 256
"""Longest note a home leaves in its cursor: enough for a capsule, a position and an offset."""

SHIPPED_BYTES_MAX: Final = 3 << 20
"""Capsules one shipment names: as many as a batch has events, 24 bytes each."""

ARGUMENT_CHARACTERS_MAX: Final = 4096
"""Longest argument of an action: the names of as many zones as a policy may name."""

CURSOR: Final = struct.Struct("<IIQ")
"""A stream and a position in it (shard, lane, position), as ZonePromoted and HomeLost hold them."""

SHIPPED: Final = struct.Struct("<16sQ")
"""A capsule and as of which position of the log it was sent, as ShipmentSent holds them."""

WRAPPED_BYTES: Final = 60
TAGGED_BYTES: Final = 68
"""A wrapped data key, without and with the fingerprint of its master key behind it (docs/formats/frames.md)."""

REWRAPPED: Final = struct.Struct(f"<II{TAGGED_BYTES}s")
"""A data key and the row that holds it from now on, as KeysRewrapped holds them."""

NFS_SERVER_CHARACTERS_MAX: Final = 255
NFS_OWNER_BYTES_MAX: Final = 1024
"""Longest name an NFS client gives itself (RFC 8881 §3.3.10: NFS4_OPAQUE_LIMIT)."""
NFS_VERIFIER_BYTES: Final = 8

REGISTRANTS_MAX: Final = 1024
"""Hosts registered with one block device: each costs a row of the report, which must fit one NVMe transfer."""


@event(1)
class StoreInitialised:
    """The first event of a log: the root directory exists."""

    capsule: bytes = identifier()
    store: bytes = identifier()
    mode: int = u32()
    uid: int = u32()
    gid: int = u32()


@event(2, version=2)
class CapsuleCreated:
    """A capsule exists, not yet named anywhere.

    ``policy`` and ``key`` are row numbers (0: default policy, no encryption); version 2 added ``key``.
    """

    capsule: bytes = identifier()
    kind: int = u32()
    mode: int = u32()
    uid: int = u32()
    gid: int = u32()
    rdev: int = u32()
    size: int = u63()
    block_size: int = u32()
    policy: int = u32()
    key: int = u32()
    target: bytes = blob(PATH_BYTES_MAX)


@upcaster(2, 1)
def _created_without_key(fields: list[object]) -> list[object]:
    *head, target = fields
    return [*head, 0, target]


@event(3)
class NameLinked:
    """A directory entry ``name`` of ``parent`` leads to the capsule."""

    capsule: bytes = identifier()
    parent: bytes = identifier()
    name: bytes = entry_name()


@event(4)
class NameUnlinked:
    """The entry is gone; a capsule (or a whole subtree) whose last name went can be undeleted until gc."""

    capsule: bytes = identifier()
    parent: bytes = identifier()
    name: bytes = entry_name()


@event(5)
class CapsuleRenamed:
    """An entry moved; ``replaced`` is the capsule that had the new name, if any."""

    capsule: bytes = identifier()
    parent: bytes = identifier()
    name: bytes = entry_name()
    new_parent: bytes = identifier()
    new_name: bytes = entry_name()
    replaced: bytes = optional_identifier()


@event(6)
class NamesExchanged:
    """Two entries swapped what they lead to (``renameat2`` RENAME_EXCHANGE)."""

    capsule: bytes = identifier()
    parent: bytes = identifier()
    name: bytes = entry_name()
    other: bytes = identifier()
    other_parent: bytes = identifier()
    other_name: bytes = entry_name()


@event(7)
class ExtentWritten:
    """``length`` bytes at ``offset`` are now what ``frames`` (packed, docs/formats/frames.md) hold."""

    capsule: bytes = identifier()
    offset: int = u63()
    length: int = u32()
    frames: bytes = blob(FRAMES_BYTES_MAX)


@event(8)
class RangeDeallocated:
    """The range reads as zeros and holds no space; the size is unchanged."""

    capsule: bytes = identifier()
    offset: int = u63()
    length: int = u63()


@event(9)
class CapsuleResized:
    """The size is now ``size``: bytes beyond are gone, new bytes are zeros."""

    capsule: bytes = identifier()
    size: int = u63()


@event(10)
class AttributesChanged:
    """Mode, owner or times (nanoseconds) were set; None leaves one as it is."""

    capsule: bytes = identifier()
    mode: int | None = u32_or_none()
    uid: int | None = u32_or_none()
    gid: int | None = u32_or_none()
    atime: int | None = i64_or_none()
    mtime: int | None = i64_or_none()


@event(11)
class XattrSet:
    """An extended attribute has this value."""

    capsule: bytes = identifier()
    name: bytes = entry_name()
    value: bytes = blob(XATTR_BYTES_MAX)


@event(12)
class XattrRemoved:
    """An extended attribute is gone."""

    capsule: bytes = identifier()
    name: bytes = entry_name()


@event(13)
class PolicyDefined:
    """A policy document (canonical msgpack) got a row number; ``capsule`` is the first to use it."""

    capsule: bytes = identifier()
    policy: int = u32()
    document: bytes = blob(DOCUMENT_BYTES_MAX)


@event(14)
class PolicyChanged:
    """The capsule follows another policy from now on."""

    capsule: bytes = identifier()
    policy: int = u32()


@event(15)
class KeyCreated:
    """A data key, wrapped by the master key, exists for the capsule."""

    capsule: bytes = identifier()
    key: int = u32()
    version: int = u32()
    wrapped: bytes = blob(1024)


@event(16)
class SnapshotTaken:
    """The moment right after this event has a name, for this capsule or tree."""

    capsule: bytes = identifier()
    snapshot: str = text(255)


@event(17)
class SnapshotDropped:
    """The name is gone; nothing is reclaimed before gc."""

    capsule: bytes = identifier()
    snapshot: str = text(255)


@event(18)
class CapsuleCloned:
    """``capsule`` is a copy of ``source`` (a file or a whole tree), sharing its bytes, linked at ``parent``/``name``.

    An empty ``manifest`` copies the source as it is now, and ``members`` are the ids (16 bytes each) of
    all that is in it; otherwise the manifest (docs/formats/events.md) is the source as it was at batch ``at``.
    """

    capsule: bytes = identifier()
    source: bytes = identifier()
    parent: bytes = identifier()
    name: bytes = entry_name()
    at: int = u63()
    members: bytes = blob(MANIFEST_BYTES_MAX)
    manifest: bytes = blob(MANIFEST_BYTES_MAX)


@event(19)
class CapsuleUndeleted:
    """A capsule (or subtree) that had lost its last name has one again."""

    capsule: bytes = identifier()
    parent: bytes = identifier()
    name: bytes = entry_name()


@event(20)
class PayloadReclaimed:
    """Payload bytes no longer reachable: ranges as packed (position u64, offset u32, length u32), little-endian.

    The event is durable before any block is punched out, so a missing payload is never a mystery.
    """

    capsule: bytes = identifier()
    ranges: bytes = blob(FRAMES_BYTES_MAX)


@event(21)
class CapsulesPurged:
    """Deleted capsules past their retention horizon are gone for good: ids, 16 bytes each."""

    capsule: bytes = identifier()
    purged: bytes = blob(FRAMES_BYTES_MAX)


@event(22)
class CapsuleDeleted:
    """A capsule that had no name is deleted; it can be undeleted until gc."""

    capsule: bytes = identifier()


@event(23)
class MembershipChanged:
    """The members of the Raft group that replicates this log changed: the batch is the Raft entry of the change.

    ``change`` is the engine's ConfChangeV2 (empty where the engine made the entry to leave a joint configuration),
    ``members`` what it means, as canonical msgpack: ``[[node id, "voter" | "learner" | "removed", address], …]``.
    It belongs to no capsule: its link starts from nothing every time.
    """

    capsule: bytes = identifier()
    change: bytes = blob(DOCUMENT_BYTES_MAX)
    members: bytes = blob(DOCUMENT_BYTES_MAX)


@event(24)
class RepliesForgotten:
    """Clients that have not been heard of for long: a retry of theirs would be taken for a new command.

    ``clients`` are their ids, 16 bytes each.
    """

    capsule: bytes = identifier()
    clients: bytes = blob(FRAMES_BYTES_MAX)


@event(25)
class RangeCopied:
    """``length`` bytes at ``offset`` are now those that ``source`` had at ``source_offset``, holes included.

    The stored frames are shared.  Where both ranges are of one capsule and overlap, the source was read first.
    ``source_link`` is the head of the source's chain at that moment: through it the capsule's own chain covers
    the bytes it got.
    """

    capsule: bytes = identifier()
    offset: int = u63()
    length: int = u63()
    source: bytes = identifier()
    source_offset: int = u63()
    source_link: bytes = blob(LINK_BYTES)


@event(26)
class NamespaceAssigned:
    """In the NVMe subsystem of that name, a namespace (its 128-bit id) has this number (NSID), for ever."""

    capsule: bytes = identifier()
    subsystem: str = text(SUBSYSTEM_CHARACTERS_MAX)
    namespace: bytes = identifier()
    nsid: int = u32()


@event(27)
class CommandRefused:
    """A command with a client id was decided against: whatever attempt of it comes later gets the same answer.

    Without it a delayed attempt could be carried out after its caller was told that it was refused.  ``status`` is
    the name of a :class:`space._errors.Status`.  It belongs to no capsule: its link starts from nothing.
    """

    capsule: bytes = identifier()
    client: bytes = identifier()
    sequence: int = u63()
    status: str = text(32)
    message: str = text(REFUSAL_BYTES_MAX)


@event(28)
class RegistrantsChanged:
    """Hosts registered with a block device for reservations, replaced their keys, or are not registered any more.

    NVM Express Base 2.0 §8.19.  ``registered`` are hosts with their keys from now on (16 bytes, u64 little-endian,
    repeated), ``removed`` those that are not registered any more (16 bytes each), ``told`` whom a notice is for
    (16 bytes, u8: 1 registration preempted, 2 reservation released, 3 reservation preempted).  ``generation``
    counts these changes, modulo 2**32.
    """

    capsule: bytes = identifier()
    generation: int = u32()
    registered: bytes = blob(24 * REGISTRANTS_MAX)
    removed: bytes = blob(16 * REGISTRANTS_MAX)
    told: bytes = blob(17 * REGISTRANTS_MAX)


@event(29)
class ReservationChanged:
    """A block device is reserved from now on (type 1 to 6) by a host, or by nobody (0).

    ``told`` as in :class:`RegistrantsChanged`, of which a change of both is the second half.
    """

    capsule: bytes = identifier()
    reservation: int = u32()
    holder: bytes = optional_identifier()
    told: bytes = blob(17 * REGISTRANTS_MAX)


@event(30)
class NfsClientRecorded:
    """A client of an NFS server may hold opens and locks from now on, and claim them again after a restart of it.

    ``owner`` is the name the client gives itself, ``verifier`` which of its starts it is (RFC 8881 §8.4.2.1).
    """

    capsule: bytes = identifier()
    server: str = text(NFS_SERVER_CHARACTERS_MAX)
    owner: bytes = blob(NFS_OWNER_BYTES_MAX)
    verifier: bytes = blob(NFS_VERIFIER_BYTES)


@event(31)
class NfsClientForgotten:
    """A client of an NFS server holds nothing any more: what it held may have been given to others."""

    capsule: bytes = identifier()
    server: str = text(NFS_SERVER_CHARACTERS_MAX)
    owner: bytes = blob(NFS_OWNER_BYTES_MAX)


@event(32)
class NfsServerStarted:
    """An NFS server has started for the ``epoch``-th time: what it gives out is told from what it gave before."""

    capsule: bytes = identifier()
    server: str = text(NFS_SERVER_CHARACTERS_MAX)
    epoch: int = u32()


@event(33)
class KeysRewrapped:
    """Data keys are wrapped by another master key: (key u32, version u32, 68 bytes as wrapped) little-endian, repeated.

    ``master`` is the fingerprint of that master key.  About the root directory, as all about the master key.
    """

    capsule: bytes = identifier()
    master: int = u63()
    rows: bytes = blob(FRAMES_BYTES_MAX)


@event(34)
class MasterKeyChanged:
    """Every data key that can be opened here is wrapped by master key ``master``; what ``before`` wraps is refused."""

    capsule: bytes = identifier()
    master: int = u63()
    before: int = u63()


@event(35)
class KeyDestroyed:
    """A data key the capsule has or had is gone: nothing that was stored under it can be read any more."""

    capsule: bytes = identifier()
    key: int = u32()


@event(50)
class ZoneDefined:
    """The store belongs to a zone from now on; ``zone`` is its id, ``kind`` a :class:`ZoneKind`.

    ``authorities`` are the PEM certificates of those who sign for the zone, ``sealing`` its X25519 public key: keys of
    shipped content are sealed for it.  Events about zones have the root directory as ``capsule``.
    """

    capsule: bytes = identifier()
    zone: bytes = identifier()
    name: str = text(ZONE_CHARACTERS_MAX)
    kind: int = u32()
    url: str = text(URL_CHARACTERS_MAX)
    authorities: bytes = blob(DOCUMENT_BYTES_MAX)
    sealing: bytes = blob(SEALING_KEY_BYTES)


@event(51)
class ZoneAdded:
    """Another zone is known: what policies name it may be shipped there, and what it ships is taken."""

    capsule: bytes = identifier()
    zone: bytes = identifier()
    name: str = text(ZONE_CHARACTERS_MAX)
    kind: int = u32()
    url: str = text(URL_CHARACTERS_MAX)
    authorities: bytes = blob(DOCUMENT_BYTES_MAX)
    sealing: bytes = blob(SEALING_KEY_BYTES)


@event(52)
class ZoneChanged:
    """A zone, this store's own or another, has these properties now."""

    capsule: bytes = identifier()
    zone: bytes = identifier()
    kind: int = u32()
    url: str = text(URL_CHARACTERS_MAX)
    authorities: bytes = blob(DOCUMENT_BYTES_MAX)
    sealing: bytes = blob(SEALING_KEY_BYTES)


@event(53)
class ZoneRemoved:
    """Nothing is shipped to a zone or taken from it any more; its replicas stay as they are until they are removed."""

    capsule: bytes = identifier()
    zone: bytes = identifier()


@event(54)
class ShipmentReceived:
    """All other events of this entry are what a zone's log held after ``from_position``, up to ``through_position``.

    The entry's time is the home's.  The cursor of the stream (``zone``, ``shard``, ``lane``) is now at
    ``through_position`` and ``step`` parts of copies beyond it; ``resume`` is the home's own note of how to go on.
    ``capsules`` are the replicas that have come to ``through_position`` by it (16 bytes each).
    """

    capsule: bytes = identifier()
    zone: bytes = identifier()
    shard: int = u32()
    lane: int = u32()
    from_position: int = u63()
    through_position: int = u63()
    step: int = u32()
    resume: bytes = blob(RESUME_BYTES_MAX)
    capsules: bytes = blob(SHIPPED_BYTES_MAX)


@event(55)
class CapsuleHomed:
    """The capsule is a replica: its home is ``zone``, and it is as it was at ``position`` of the log there.

    While a copy of it is under way, ``copy`` is the position it was begun for and ``step`` how many parts of it have
    come; else both are 0.  Times that are given are the capsule's from now on.  With this store's own zone the capsule
    is none: it has its home here.
    """

    capsule: bytes = identifier()
    zone: bytes = identifier()
    position: int = u63()
    copy: int = u63()
    step: int = u32()
    atime: int | None = i64_or_none()
    mtime: int | None = i64_or_none()
    ctime: int | None = i64_or_none()
    btime: int | None = i64_or_none()


@event(56)
class CapsuleWithdrawn:
    """Its home ships the replica no longer: it is deleted, and only its home can bring it back."""

    capsule: bytes = identifier()
    zone: bytes = identifier()
    position: int = u63()


@event(57)
class ShipmentSent:
    """So much of the log goes to a zone: written before the zone's answer counts.

    ``capsules`` is all that is in it, each with the position as of which it is sent (16 bytes, u64 little-endian,
    repeated), ``withdrawn`` what the zone is told to delete (16 bytes each); ``sent_bytes`` the bytes of the shipment.
    """

    capsule: bytes = identifier()
    zone: bytes = identifier()
    shard: int = u32()
    lane: int = u32()
    from_position: int = u63()
    through_position: int = u63()
    step: int = u32()
    capsules: bytes = blob(SHIPPED_BYTES_MAX)
    sent_bytes: int = u63()
    withdrawn: bytes = blob(SHIPPED_BYTES_MAX)


@event(58)
class PolicyRefused:
    """A policy forbade something: ``action`` what ("view", "shipment"), ``target`` to whom (a view, a zone)."""

    capsule: bytes = identifier()
    action: str = text(32)
    target: str = text(255)
    reason: str = text(REFUSAL_BYTES_MAX)


@event(59)
class RpoBroken:
    """A stream lags further behind than a policy in it promises; the zone has what there was at ``position``."""

    capsule: bytes = identifier()
    zone: bytes = identifier()
    shard: int = u32()
    lane: int = u32()
    position: int = u63()
    lag_ns: int = u63()


@event(60)
class RpoKept:
    """A stream that had broken its promise keeps it again."""

    capsule: bytes = identifier()
    zone: bytes = identifier()
    shard: int = u32()
    lane: int = u32()
    position: int = u63()
    lag_ns: int = u63()


@event(61)
class ZonePromoted:
    """What had its home in ``zone`` has it here from now on, as of ``cursors`` (shard, lane: u32, position: u64)."""

    capsule: bytes = identifier()
    zone: bytes = identifier()
    epoch: int = u32()
    cursors: bytes = blob(DOCUMENT_BYTES_MAX)


@event(62)
class HomeLost:
    """What had its home here and was shipped to ``zone`` has it there from now on.

    ``cursors`` is where the histories part, in this log; ``position`` where the zone's goes on, in its own.
    """

    capsule: bytes = identifier()
    zone: bytes = identifier()
    epoch: int = u32()
    position: int = u63()
    cursors: bytes = blob(DOCUMENT_BYTES_MAX)


@event(63)
class ActionTaken:
    """The policy compiler's ``action`` is carried out: on the capsule, or, if that is the root directory, on nodes.

    ``argument`` says where to (zones, a node); ``reason`` which key of the policy and what that was noticed led to it.
    """

    capsule: bytes = identifier()
    action: str = text(32)
    argument: str = text(ARGUMENT_CHARACTERS_MAX)
    reason: str = text(REFUSAL_BYTES_MAX)


@event(64)
class HomeGiven:
    """The capsule's home is given to ``zone``, which takes it as it is now: nothing here changes it any more."""

    capsule: bytes = identifier()
    zone: bytes = identifier()


@event(65)
class HomeTaken:
    """The capsule has its home here from now on; ``zone`` gave it away at ``position`` of its log."""

    capsule: bytes = identifier()
    zone: bytes = identifier()
    position: int = u63()


@event(66)
class HomesDeclined:
    """No home that ``zone`` gave away up to ``position`` of its log is taken here any more, if it has not been."""

    capsule: bytes = identifier()
    zone: bytes = identifier()
    position: int = u63()


@event(67)
class HeirFollowed:
    """What had its home in ``zone``, and is here as it is there, has it in ``heir`` now, which took that one's place.

    ``epoch`` is the one in which it did, ``position`` where in its log.
    """

    capsule: bytes = identifier()
    zone: bytes = identifier()
    heir: bytes = identifier()
    epoch: int = u32()
    position: int = u63()


Event = (
    StoreInitialised
    | CapsuleCreated
    | NameLinked
    | NameUnlinked
    | CapsuleRenamed
    | NamesExchanged
    | ExtentWritten
    | RangeDeallocated
    | CapsuleResized
    | AttributesChanged
    | XattrSet
    | XattrRemoved
    | PolicyDefined
    | PolicyChanged
    | KeyCreated
    | SnapshotTaken
    | SnapshotDropped
    | CapsuleCloned
    | CapsuleUndeleted
    | PayloadReclaimed
    | CapsulesPurged
    | CapsuleDeleted
    | MembershipChanged
    | RepliesForgotten
    | RangeCopied
    | NamespaceAssigned
    | CommandRefused
    | RegistrantsChanged
    | ReservationChanged
    | NfsClientRecorded
    | NfsClientForgotten
    | NfsServerStarted
    | KeysRewrapped
    | MasterKeyChanged
    | KeyDestroyed
    | ZoneDefined
    | ZoneAdded
    | ZoneChanged
    | ZoneRemoved
    | ShipmentReceived
    | CapsuleHomed
    | CapsuleWithdrawn
    | ShipmentSent
    | PolicyRefused
    | RpoBroken
    | RpoKept
    | ZonePromoted
    | HomeLost
    | ActionTaken
    | HomeGiven
    | HomeTaken
    | HomesDeclined
    | HeirFollowed
)

"""Requests, in the imperative: what a caller wants to happen.

A command carries everything that is chosen and not computed (ids, keys, stored frames), so that
deciding it is pure.  :class:`Submit` is how every view hands one in.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Final, Protocol, final

import attrs

from space.events.fast import fast_frozen
from space.events.types import Kind, ZoneKind

Buffer = bytes | bytearray | memoryview


@final
class Durability(enum.Enum):
    """What an acknowledgement promises.

    BUFFERED: written to the operating system (survives kill -9).
    DURABLE: fdatasync done (survives power loss); in a cluster, on a quorum.
    """

    BUFFERED = "buffered"
    DURABLE = "durable"


@fast_frozen
class Receipt:
    """A command was accepted: ``position`` is its batch, ``repeated`` that an earlier attempt had been applied."""

    position: int
    repeated: bool = False


@attrs.frozen
class InitialiseStore:
    """Makes the root directory of a new store."""

    store: bytes
    mode: int
    uid: int
    gid: int


@attrs.frozen
class NewKey:
    """A wrapped data key to be recorded with the capsule it is for."""

    key: int
    version: int
    wrapped: bytes


@attrs.frozen
class CreateCapsule:
    """A new capsule, linked at ``parent``/``name`` unless both are empty.

    ``policy`` is a canonical policy document, or None to inherit the parent's.
    """

    capsule: bytes
    kind: Kind = Kind.FILE
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    parent: bytes = b""
    name: bytes = b""
    rdev: int = 0
    size: int = 0
    block_size: int = 0
    target: bytes = b""
    policy: bytes | None = None
    key: NewKey | None = None


@attrs.frozen
class Link:
    """Gives a capsule one more name."""

    capsule: bytes
    parent: bytes
    name: bytes


@attrs.frozen
class Unlink:
    """Removes a name.

    ``directory`` True wants an empty directory (rmdir), False anything else (unlink), None either;
    ``recursive`` detaches a directory with all that is in it, as one event.
    """

    parent: bytes
    name: bytes
    directory: bool | None = False
    recursive: bool = False


@attrs.frozen
class DeleteCapsule:
    """Deletes a capsule that has no name."""

    capsule: bytes


@attrs.frozen
class Rename:
    """Moves an entry, replacing what is there unless ``replace`` is False; ``exchange`` swaps both."""

    parent: bytes
    name: bytes
    new_parent: bytes
    new_name: bytes
    replace: bool = True
    exchange: bool = False


@fast_frozen
class StoredFrame:
    """One encoded frame: its packed record, and its stored bytes unless they are in the log already.

    ``record`` is the 48-byte frame record (docs/formats/frames.md); where ``stored`` is given, deciding
    fills in the payload offset.
    """

    record: bytes
    stored: Buffer | None


@fast_frozen
class WriteExtent:
    """Bytes for one range; ``frames`` cover exactly ``length`` bytes.  An empty sequence writes zeros (a hole).

    With ``change``, only if the last event that touched the capsule was at that position: what its bytes were
    then, they still are.  With ``reserved``, only if its reservations last changed at that position (0: never):
    whoever was allowed to write then still is.
    """

    capsule: bytes
    offset: int
    length: int
    frames: Sequence[StoredFrame]
    change: int | None = None
    reserved: int | None = None


@attrs.frozen
class CopyRange:
    """Lets a range have the bytes another one of the same or of another capsule has, sharing what is stored.

    The range may lie beyond the end, which then moves, as for a write; the source's may not.  ``reserved`` as for
    :class:`WriteExtent`.
    """

    capsule: bytes
    offset: int
    source: bytes
    source_offset: int
    length: int
    reserved: int | None = None


@attrs.frozen
class Deallocate:
    """Punches a hole; with ``extend`` the size grows to cover the range (fallocate without KEEP_SIZE).

    ``reserved`` as for :class:`WriteExtent`.
    """

    capsule: bytes
    offset: int
    length: int
    extend: bool = False
    reserved: int | None = None


@attrs.frozen
class Resize:
    """Sets the size of a file: cut off, or zeros added."""

    capsule: bytes
    size: int


@attrs.frozen
class SetAttributes:
    """None leaves one as it is; times are nanoseconds."""

    capsule: bytes
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    atime: int | None = None
    mtime: int | None = None
    size: int | None = None


@attrs.frozen
class SetXattr:
    """``create``: it must not exist; ``replace``: it must."""

    capsule: bytes
    name: bytes
    value: bytes
    create: bool = False
    replace: bool = False


@attrs.frozen
class RemoveXattr:
    """Removes an extended attribute."""

    capsule: bytes
    name: bytes


@attrs.frozen
class SetPolicy:
    """``key`` gives the capsule a data key when the policy begins to encrypt it."""

    capsule: bytes
    policy: bytes
    key: NewKey | None = None


@attrs.frozen
class TakeSnapshot:
    """Names the present moment of a capsule or tree."""

    capsule: bytes
    snapshot: str


@attrs.frozen
class DropSnapshot:
    """Forgets the name of a moment."""

    snapshot: str


@attrs.frozen
class Clone:
    """``manifest`` is the source as it was at batch ``at``; empty for the source as it is."""

    capsule: bytes
    source: bytes
    parent: bytes
    name: bytes
    at: int = 0
    manifest: bytes = b""


@attrs.frozen
class Undelete:
    """Gives a deleted capsule or subtree a name again."""

    capsule: bytes
    parent: bytes
    name: bytes


@attrs.frozen
class ReclaimPayload:
    """Declares payload ranges unreachable: ``(position, offset, length)`` each; punched after it is durable."""

    ranges: Sequence[tuple[int, int, int]]


@attrs.frozen
class PurgeCapsules:
    """Forgets deleted capsules for good."""

    capsules: Sequence[bytes]


@attrs.frozen
class ForgetReplies:
    """Forgets the replies kept for the retries of these clients (16 bytes each)."""

    clients: Sequence[bytes]


@attrs.frozen
class AssignNamespace:
    """Gives a namespace a number in an NVMe subsystem, unless it has one."""

    subsystem: str
    namespace: bytes


@attrs.frozen
class RegisterReservation:
    """A host (16 bytes) registers with a block device, unregisters, or replaces its key (NVM Express Base 2.0 §7.6).

    ``action``: 0 registers ``new_key``, 1 unregisters, 2 replaces ``key`` by ``new_key``; with ``ignore`` whatever
    key the host has.
    """

    capsule: bytes
    host: bytes
    action: int
    key: int
    new_key: int
    ignore: bool = False


@attrs.frozen
class AcquireReservation:
    """A registered host reserves a block device (action 0), or preempts others (1; and aborts, 2) (§7.5)."""

    capsule: bytes
    host: bytes
    action: int
    kind: int
    key: int
    preempted: int = 0


@attrs.frozen
class ReleaseReservation:
    """A registered host releases its reservation (action 0), or clears everything (1) (§7.7)."""

    capsule: bytes
    host: bytes
    action: int
    kind: int
    key: int


@attrs.frozen
class RecordNfsClient:
    """Keeps, over restarts of an NFS server, that this start of a client may hold state there."""

    server: str
    owner: bytes
    verifier: bytes


@attrs.frozen
class ForgetNfsClient:
    """A client holds nothing at an NFS server any more, and must not claim it again."""

    server: str
    owner: bytes


@attrs.frozen
class StartNfsServer:
    """Counts one more start of an NFS server."""

    server: str


@attrs.frozen
class RewrapKeys:
    """Lets data keys have these rows (key, version, wrapped), which master key ``master`` (a fingerprint) wraps.

    With ``last``, that is the master key from then on: refused (STALE) while a row is wrapped by another one.
    Refused as well where the master key is not ``before`` any more: one change of it at a time.
    """

    master: int
    rows: Sequence[tuple[int, int, bytes]]
    last: bool = False
    before: int = 0


@attrs.frozen
class DestroyKeys:
    """Destroys data keys that the capsule has or had; of those that are destroyed already nothing is said."""

    capsule: bytes
    keys: Sequence[int]


@attrs.frozen
class Together:
    """Several commands as one: decided in order, each on what those before it did; all of them or none.

    Only commands about names, attributes, clones and writes: their decisions do not depend on where in the log they
    stand.
    """

    commands: Sequence[Command]


@attrs.frozen
class DefineZone:
    """Says which zone this store belongs to; ``authorities`` as PEM, ``sealing`` an X25519 public key (32 bytes)."""

    zone: bytes
    name: str
    kind: ZoneKind
    url: str
    authorities: bytes
    sealing: bytes


@attrs.frozen
class AddZone:
    """Makes another zone known, or one that was removed known again."""

    zone: bytes
    name: str
    kind: ZoneKind
    url: str
    authorities: bytes
    sealing: bytes


@attrs.frozen
class ChangeZone:
    """Gives a zone, also this store's own, other properties."""

    zone: bytes
    kind: ZoneKind
    url: str
    authorities: bytes
    sealing: bytes


@attrs.frozen
class RemoveZone:
    """Ends shipping to and from a zone; its replicas stay, and may be removed but not changed."""

    zone: bytes


@attrs.frozen
class Copied:
    """One part of a copy of a capsule, as it was at ``position`` of its home; only in a :class:`ReceiveShipment`.

    Parts are numbered by ``step`` from 0, and the last one says so.  Part 0 makes the capsule, or takes back whatever
    an older replica of it holds: its first command is the capsule's :class:`CreateCapsule`, without a name.  A part
    that is not the next one of the copy under way, because a newer state has come by another way, is passed over.
    ``times`` are the capsule's atime, mtime, ctime and btime after it.
    """

    capsule: bytes
    position: int
    step: int
    last: bool
    commands: Sequence[Command]
    times: tuple[int, int, int, int]


@attrs.frozen
class PlaceCapsule:
    """Lets a replica have exactly these names (parent, name); only in a :class:`ReceiveShipment`.

    What else leads to the capsule is unlinked, what else has one of the names loses it (unless it has come further
    than this shipment).  For a parent that is not here, and where there is no name, the capsule is named by its id in
    the directory for those (:func:`space.events.ids.zone_capsules`).  ``gone`` are names it is known to have had:
    where they are all there is, nothing has to be searched for others.
    """

    capsule: bytes
    names: Sequence[tuple[bytes, bytes]]
    gone: Sequence[tuple[bytes, bytes]] = ()


@attrs.frozen
class WithdrawCapsule:
    """Takes a replica's names away and deletes it; only in a :class:`ReceiveShipment`."""

    capsule: bytes


@attrs.frozen
class SweepReplicas:
    """Deletes what a first copy did not name, once all of it is there; only in a :class:`ReceiveShipment`.

    That is every replica of the zone that has come less far than the copy's position.  Those the zone took over from
    this store are among them if ``epoch`` is still that of the two zones: at the copy's position they were its own.
    """

    epoch: int


@attrs.frozen
class ReceiveShipment:
    """What the log of another zone held after ``from_position`` and up to ``through_position``, as commands.

    All of them or none, in order, and only on capsules whose home is ``zone``, on new ones, and on names in
    ``/zones/NAME``.  Exactly once: the cursor of the stream (``zone``, ``shard``, ``lane``) has to be at
    ``from_position`` and ``from_step``; if it is at or beyond ``through_position`` and ``through_step`` nothing
    happens and the receipt says repeated.  A step counts shipments, of parts of copies, that do not move the position.

    A command on a capsule that has already come to ``through_position`` is passed over.  ``time_ns`` is when the home
    did it; ``resume`` is the home's own note in its cursor; ``epoch`` how often, as the home knows, one of the two
    zones was promoted in the other's place.
    """

    zone: bytes
    shard: int
    lane: int
    from_position: int
    through_position: int
    time_ns: int
    commands: Sequence[Command]
    from_step: int = 0
    through_step: int = 0
    resume: bytes = b""
    epoch: int = 0


@attrs.frozen
class RecordShipment:
    """Says what goes to a zone: ``capsules`` with the position each is sent as of; ``withdrawn`` are taken back."""

    zone: bytes
    shard: int
    lane: int
    from_position: int
    through_position: int
    step: int
    capsules: Sequence[tuple[bytes, int]]
    sent_bytes: int
    withdrawn: Sequence[bytes] = ()


@attrs.frozen
class RecordRefusal:
    """Says what a policy forbade: ``action`` "view" or "shipment", ``target`` the view or zone."""

    capsule: bytes
    action: str
    target: str
    reason: str


@attrs.frozen
class RecordAction:
    """Says that an action of the policy compiler is carried out; ``capsule`` is the root if it is about nodes."""

    capsule: bytes
    action: str
    argument: str
    reason: str


@attrs.frozen
class RecordRpo:
    """Says that a stream lags further behind than promised, or (``kept``) does so no longer."""

    zone: bytes
    shard: int
    lane: int
    position: int
    lag_ns: int
    kept: bool


@attrs.frozen
class SetArrivalPolicy:
    """Says how content that other zones ship is encoded here: a document of a few keys; none: as it comes.

    It is the policy of the directory /zones, which is made if need be, and ``key`` that directory's data key.
    """

    policy: bytes
    key: NewKey | None = None


@attrs.frozen
class PromoteZone:
    """Makes this store the home of what had its home in ``zone``, as far as it has come.

    ``cursors`` (shard, lane, position, step) is how far that is believed to be: if more has come since, nothing
    happens.  ``incomplete`` are replicas of which a copy was under way: half of one is no capsule, and it is purged.
    ``again`` raises the epoch though this store took the zone's place before: when the zone took this one's as well.
    """

    zone: bytes
    cursors: Sequence[tuple[int, int, int, int]] | None = None
    incomplete: Sequence[bytes] = ()
    again: bool = False


@attrs.frozen
class LoseHome:
    """Gives up the home of what was shipped to ``zone``, which was promoted with ``epoch`` (:class:`PromoteZone`).

    ``cursors`` (shard, lane, position) is what the zone had come to, ``position`` the one of its log at which it was
    promoted.  ``commands`` are decided first: they keep what had not been shipped, as clones in ``/zones/.branches``,
    and take the capsules back to what the zone has.  ``kept`` stay at home here though their policy names the zone,
    because they never came there.  ``times`` (atime, mtime, ctime, btime) are those capsules had that are taken back.
    ``seen`` is the position of this log the commands were made for: if anything the zone was sent has changed since,
    nothing happens.  ``given`` are those of them whose home was given to the zone before, which had not come as far.
    """

    zone: bytes
    epoch: int
    position: int
    cursors: Sequence[tuple[int, int, int]]
    commands: Sequence[Command]
    kept: Sequence[bytes]
    times: Sequence[tuple[bytes, tuple[int, int, int, int]]] = ()
    seen: int | None = None
    given: Sequence[bytes] = ()


@attrs.frozen
class FollowHeir:
    """Follows ``heir``, which took the place of ``zone`` (:class:`PromoteZone`) with ``epoch`` at ``position``.

    Both are other zones.  ``same`` are replicas of the zone that are here as they were there: their home is the heir.
    ``gone`` are those that are not there; ``commands`` first keep, as clones in a branch, what came here and not there.
    ``waiting`` are those that are otherwise there, and wait for the heir to ship them.  What waits like that since the
    zone took the heir's place, which takes it back, may be gone too.
    ``times`` (atime, mtime, ctime, btime) are those that directories keep.  Unless it is ``done``, more of the same
    comes.  ``seen`` is the position of this log it was made for: if any replica of the zone has changed since, nothing
    happens.
    """

    zone: bytes
    heir: bytes
    epoch: int
    position: int
    same: Sequence[bytes]
    commands: Sequence[Command] = ()
    times: Sequence[tuple[bytes, tuple[int, int, int, int]]] = ()
    gone: Sequence[bytes] = ()
    seen: int = 0
    done: bool = False
    waiting: Sequence[bytes] = ()


@attrs.frozen
class GiveHomes:
    """Gives the home of capsules to ``zone``, which has them: they can be changed nowhere until it has taken it.

    A directory is given with all that is in it, named here like everything else.
    """

    zone: bytes
    capsules: Sequence[bytes]


@attrs.frozen
class TakeHome:
    """The capsule's home is this store from now on; only in a :class:`ReceiveShipment`, from the home it has had.

    ``policy`` is its policy from then on, ``key`` the number of its data key (0: none); its home was given away at
    position ``given``, in that ``epoch``.  It is passed over where key or epoch are others here, where the capsule is
    not wholly here, and where the store has taken or declined (:class:`DeclineHomes`) what was given then.
    """

    capsule: bytes
    policy: bytes
    key: int
    epoch: int
    given: int


@attrs.frozen
class DeclineHomes:
    """Takes no home any more that ``zone`` gave away up to ``position`` of its log; what was taken stays here."""

    zone: bytes
    position: int


@attrs.frozen
class KeepHomes:
    """Takes back the home of capsules that was given to ``zone``, which has declined those up to ``position``."""

    zone: bytes
    capsules: Sequence[bytes]
    position: int


Command = (
    InitialiseStore
    | CreateCapsule
    | Link
    | Unlink
    | DeleteCapsule
    | Rename
    | WriteExtent
    | CopyRange
    | Deallocate
    | Resize
    | SetAttributes
    | SetXattr
    | RemoveXattr
    | SetPolicy
    | TakeSnapshot
    | DropSnapshot
    | Clone
    | Undelete
    | ReclaimPayload
    | PurgeCapsules
    | ForgetReplies
    | AssignNamespace
    | RegisterReservation
    | AcquireReservation
    | ReleaseReservation
    | RecordNfsClient
    | ForgetNfsClient
    | StartNfsServer
    | RewrapKeys
    | DestroyKeys
    | Together
    | DefineZone
    | AddZone
    | ChangeZone
    | RemoveZone
    | Copied
    | PlaceCapsule
    | WithdrawCapsule
    | SweepReplicas
    | ReceiveShipment
    | RecordShipment
    | RecordRefusal
    | RecordAction
    | RecordRpo
    | SetArrivalPolicy
    | PromoteZone
    | LoseHome
    | FollowHeir
    | GiveHomes
    | TakeHome
    | DeclineHomes
    | KeepHomes
)


@fast_frozen
class Guard:
    """A condition on a request: the counter ``name`` of the state is still at ``value``.

    Whoever may ask for something only as long as nobody has taken over carries the number under which it may: a
    request of before that is decided after it is refused (status UNAVAILABLE), however long it was on its way.
    """

    name: bytes
    value: int


@fast_frozen
class Request:
    """A command with who asks for it.

    ``client`` (16 bytes) and ``sequence`` make a retry harmless: the command is applied once and every
    retry gets the same receipt.
    """

    command: Command
    actor: str = ""
    client: bytes = b""
    sequence: int = 0
    guard: Guard | None = None


class Submit(Protocol):
    """How views hand commands in; the node implements it."""

    async def submit(self, request: Request, durability: Durability) -> Receipt:
        """Decides, logs and applies one command.

        Raises:
            SpaceError: it was rejected, or could not be logged; then nothing changed.
        """


REPLIES_KEPT_PER_CLIENT: Final = 256
"""How many commands a client may have in flight and still retry any of them safely."""

"""Portable commands: what a change of one log means in any other.

Nothing in them depends on the log they come from: policies are documents, data keys sealed for the receiver,
directories those of the receiver, and written bytes the frames as they are stored, fetched when they are about to be
sent.  Until then a frame is where it is and how long: a day of changes fits into memory that could not hold an hour of
content.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, Protocol

import attrs

from space._errors import RefusedError, Status
from space.content.frames import (
    FRAME_RECORD_BYTES,
    FrameRef,
    frame_at,
    pack_frames,
    plain_length,
    stored_ranges,
)
from space.events import commands as cmd
from space.events.commands import Buffer, StoredFrame
from space.events.types import Kind
from space.federation.scope import DIRECTORY, Extent, Moment, Scope, Slot
from space.federation.selection import Selection
from space.policy.model import Encryption, Policy
from space.statemachine.tables import KEY, POLICY, U32, CapsuleRow

PART_BYTES: Final = 4 << 20
"""Stored bytes after which a part of a copy is full.  Part of the protocol: both ends of a broken copy count alike."""

COMMAND_BYTES: Final = 128
"""More than a command without content takes in a document, and a frame beside its stored bytes."""

SEALS_KEPT: Final = 1024
"""Sealed keys remembered: a clone tree names one again and again."""


_KEY_AT: Final = 16  # key id inside a frame record (docs/formats/frames.md)
_NO_KEY: Final = bytes(4)


class Content(Protocol):
    """Stored bytes of the home."""

    def stored(self, frame: FrameRef, position: int) -> Buffer | None:
        """The stored bytes of a frame, checked; ``position`` is the batch it came with.  None: they were reclaimed."""

    def recut(self, extent: Extent, policy: Policy, key: int) -> list[StoredFrame] | None:
        """Frames for exactly what an extent shows, as content of a capsule of that policy and key.  None: as above."""


@attrs.frozen
class Piece:
    """A write: what an extent shows, at its offset, for a capsule of a policy and with a key (0: none)."""

    capsule: bytes
    extent: Extent
    policy: Policy
    key: int

    @property
    def size(self) -> int:
        """Bytes it takes to send, about."""
        frames = self.extent.frames
        stored = sum(length for _, _, length in stored_ranges(frames))
        return COMMAND_BYTES * (1 + len(frames) // FRAME_RECORD_BYTES) + stored

    def command(self, content: Content) -> cmd.WriteExtent:
        """The command, with the stored bytes.

        Frames under a key that is not the capsule's were encrypted anew when they came from another zone, and the
        receiver knows that key as little as that zone: they are encoded as the capsule's are.  Bytes that were
        reclaimed come as zeros: at home no moment shows them any more, nor does any later position.
        """
        extent = self.extent
        whole = not extent.skip and plain_length(extent.frames) == extent.length and self._knows_keys()
        frames = self._whole(content) if whole else content.recut(extent, self.policy, self.key)
        return cmd.WriteExtent(self.capsule, extent.offset, extent.length, frames or ())

    def _knows_keys(self) -> bool:
        frames, known = self.extent.frames, (_NO_KEY, self.key.to_bytes(4, "little"))
        keys = (frames[at : at + len(_NO_KEY)] for at in range(_KEY_AT, len(frames), FRAME_RECORD_BYTES))
        return all(key in known for key in keys)

    def _whole(self, content: Content) -> list[StoredFrame] | None:
        found: list[StoredFrame] = []
        known: dict[
            tuple[int, int], Buffer
        ] = {}  # equal frames of one extent are one buffer, and placed once
        for index in range(len(self.extent.frames) // FRAME_RECORD_BYTES):
            frame = frame_at(self.extent.frames, index)
            if frame.is_zero:
                found.append(StoredFrame(pack_frames([frame]), None))
                continue
            position = frame.source_position or self.extent.position
            place = (position, frame.payload_offset)
            stored = known.get(place) or content.stored(frame, position)
            if stored is None:
                return None
            known[place] = stored
            moved = attrs.evolve(frame, payload_offset=0, source_position=0)
            found.append(StoredFrame(pack_frames([moved]), stored))
        return found


@attrs.frozen
class Copy:
    """A part of a copy of a capsule: :class:`space.events.commands.Copied` before its content is fetched."""

    capsule: bytes
    position: int
    step: int
    last: bool
    commands: Sequence[cmd.Command | Piece]
    times: tuple[int, int, int, int]

    @property
    def size(self) -> int:
        return sum(map(size, self.commands), COMMAND_BYTES)


Portable = cmd.Command | Piece | Copy


def size(command: Portable) -> int:
    """Bytes a command takes to send, about."""
    if isinstance(command, Piece | Copy):
        return command.size
    if isinstance(command, cmd.SetXattr):
        return COMMAND_BYTES + len(command.value)
    if isinstance(command, cmd.CreateCapsule | cmd.SetPolicy):
        return 2 * COMMAND_BYTES + len(command.policy or b"")
    return COMMAND_BYTES


def fetched(commands: Iterable[Portable], content: Content) -> list[cmd.Command]:
    """Commands as they are sent, with the stored bytes of frames."""
    found: list[cmd.Command] = []
    for each in commands:
        if isinstance(each, Piece):
            found.append(each.command(content))
        elif isinstance(each, Copy):
            inner = fetched(each.commands, content)
            found.append(cmd.Copied(each.capsule, each.position, each.step, each.last, inner, each.times))
        else:
            found.append(each)
    return found


Seal = Callable[[int, int, bytes, bool], bytes]
"""(key id, version, wrapped row, whether for the home only) → the key as it may leave; see space.federation.sealing."""


class Copier:
    """Makes copies of capsules as they were at one moment.

    Args:
        seal: seals data keys.
        selection: what policies say about the zone.
    """

    def __init__(self, seal: Seal, selection: Selection) -> None:
        self._seal = seal
        self._selection = selection
        self._sealed: dict[tuple[int, bool], cmd.NewKey] = {}

    def policy(self, scope: Scope, number: int) -> bytes:
        """The document of a policy; none for the default."""
        return scope.state.get(POLICY, U32.pack(number)) or b""

    def encoding(self, scope: Scope, row: CapsuleRow) -> Policy:
        """The policy new frames of a capsule follow: without a key, content is what it was before it encrypted."""
        policy = self._selection.policy(scope.state, row.policy)
        if row.key or policy.encryption is Encryption.NONE:
            return policy
        return attrs.evolve(policy, encryption=Encryption.NONE, federation_sealed=False)

    def key(self, scope: Scope, row: CapsuleRow) -> cmd.NewKey | None:
        """The data key of a capsule, as it may leave."""
        if not row.key:
            return None
        for_home = self._selection.sealed(scope.state, row.policy)
        found = self._sealed.get((row.key, for_home))
        if found is None:
            if len(self._sealed) >= SEALS_KEPT:
                self._sealed.clear()
            found = self._sealed[row.key, for_home] = self._sealed_key(scope, row.key, for_home)
        return found

    def _sealed_key(self, scope: Scope, number: int, for_home: bool) -> cmd.NewKey:
        for key, wrapped in scope.state.scan(KEY, U32.pack(number)):
            version = int(U32.unpack(key[U32.size :])[0])
            sealed = self._seal(number, version, wrapped, for_home) if wrapped else b""  # destroyed stays so
            return cmd.NewKey(number, version, sealed)
        raise RefusedError(f"key {number} is missing from the state", status=Status.NOT_PERMITTED)

    def pieces(
        self, scope: Scope, moment: Moment, capsule: bytes, offset: int, length: int
    ) -> Iterator[Piece]:
        """Writes that make a range what it is."""
        row = scope.row(capsule)
        policy = self.encoding(scope, row)
        for extent in moment.extents(capsule, offset, length):
            if extent.frames:
                yield Piece(capsule, extent, policy, row.key)

    def copy(
        self,
        scope: Scope,
        moment: Moment,
        capsule: bytes,
        position: int,
        names: Sequence[Slot],
        *,
        hide: bool = False,
    ) -> Iterator[Copy]:
        """The parts of a copy, each but the last about :data:`PART_BYTES` long; the last one gives it its ``names``.

        ``hide`` takes the names of an older replica away while the copy is on its way.
        """
        row = scope.row(capsule)
        times = (row.atime, row.mtime, row.ctime, row.btime)
        commands: list[cmd.Command | Piece] = [self._create(scope, capsule, row)]
        total, step = 0, 0
        if hide:
            commands.append(cmd.PlaceCapsule(capsule, ()))
            yield Copy(capsule, position, step, False, commands, times)
            commands, step = [], 1
        for each in self._filling(scope, moment, capsule, row):
            length = size(each)
            if total and total + length > PART_BYTES and row.kind != DIRECTORY:
                yield Copy(capsule, position, step, False, commands, times)
                commands, total, step = [], 0, step + 1
            commands.append(each)
            total += length
        if names:
            commands.append(cmd.PlaceCapsule(capsule, names))
        elif row.nlink:
            commands.append(cmd.PlaceCapsule(capsule, ()))
        yield Copy(capsule, position, step, True, commands, times)

    def _filling(
        self, scope: Scope, moment: Moment, capsule: bytes, row: CapsuleRow
    ) -> Iterator[cmd.Command | Piece]:
        for name, value in scope.xattrs(capsule):
            yield cmd.SetXattr(capsule, name, value)
        if row.kind == Kind.FILE:
            yield from self.pieces(scope, moment, capsule, 0, row.size)

    def _create(self, scope: Scope, capsule: bytes, row: CapsuleRow) -> cmd.CreateCapsule:
        return cmd.CreateCapsule(
            capsule,
            Kind(row.kind),
            row.mode,
            row.uid,
            row.gid,
            rdev=row.rdev,
            size=row.size if row.kind != DIRECTORY else 0,
            block_size=row.block_size,
            target=row.target,
            policy=self.policy(scope, row.policy),
            key=self.key(scope, row),
        )

"""Raft's hard state: a small file beside the segments, so that logs of replicas stay equal byte for byte.

Two slots of one block each, and one rule: *a write never touches the slot that was last made durable*.  A
synced save goes to the other slot and, once it is on the disk, that one is the durable slot.  Unsynced saves
go to the other slot as well, one over the other, and keep the term and vote of the durable one.  So
whatever a power loss leaves of unsynced writes, one slot still has the newest term and vote that a
caller was told are safe; only a newer commit index can be lost, and the leader tells it again.

The file gets its name when its first slot is durable: if it is there, it was whole once, and no sound slot in
it is damage.  Forgetting a vote would let two leaders into one term, so that is refused, never repaired.
"""

from __future__ import annotations

import contextlib
import posixpath
import struct
from collections.abc import Iterator
from typing import Any, Final, NoReturn, Self, final

import attrs
import msgpack
from crc32c import crc32c

from space._errors import CorruptionError, RefusedError, StorageError, UsageError
from space.wal.disk import Disk, File
from space.wal.recovery import storage_error, storage_errors
from space.wal.segment_format import BLOCK_BYTES, CRC, FORMAT_VERSION

RAFT_STATE_NAME: Final = "raft"
_UNFINISHED_NAME: Final = "raft.new"
_FILE_BYTES: Final = 2 * BLOCK_BYTES  # a slot per block: a torn block takes one slot at most
_MAGIC: Final = b"SPACERFT"
_SLOT: Final = struct.Struct("<8sIIQ")  # magic, version, bytes of the body, sequence
_BODY_AT: Final = _SLOT.size + CRC.size
_BODY_BYTES_MAX: Final = BLOCK_BYTES - _BODY_AT  # some 400 members: more than a group can work with
_NUMBER_MAX: Final = 2**64 - 1


@attrs.frozen
class Configuration:
    """Who takes part in the group, in the words of Raft; node ids.

    Attributes:
        voters: those whose majority decides.
        learners: those that are sent the log without a vote.
        voters_outgoing: the voters before a joint change, whose majority is needed too until it is left.
        learners_next: outgoing voters that become learners when the joint change is left.
        auto_leave: the joint change is left without being asked.
    """

    voters: tuple[int, ...] = ()
    learners: tuple[int, ...] = ()
    voters_outgoing: tuple[int, ...] = ()
    learners_next: tuple[int, ...] = ()
    auto_leave: bool = False


@attrs.frozen
class RaftState:
    """What a replica must not forget, beside its log (Ongaro, *Consensus*, figure 3.1).

    Attributes:
        node: this replica's own id.
        term: latest term seen; never goes back.
        vote: who got this replica's vote in that term, 0 for nobody.
        commit: a position known to be committed.
        configuration: the members in effect.
        configuration_index: position of the entry that made it, 0 if none did.
    """

    node: int
    term: int
    vote: int
    commit: int
    configuration: Configuration = Configuration()
    configuration_index: int = 0


def encode_raft_state(state: RaftState, sequence: int, seed: int) -> bytes:
    """A slot's bytes; ``seed`` is the CRC32C of the store's id, so that another store's is refused.

    Raises:
        UsageError: it has more members than fit, or a number is out of range.
    """
    members = state.configuration
    try:
        body: bytes = msgpack.packb(
            [
                state.node, state.term, state.vote, state.commit,
                members.voters, members.learners, members.voters_outgoing, members.learners_next,
                members.auto_leave, state.configuration_index,
            ]
        )  # fmt: skip
    except (OverflowError, ValueError) as error:
        raise UsageError(f"Raft state has a number that is out of range: {state}") from error
    if len(body) > _BODY_BYTES_MAX or _decode_body(body) != state:
        raise UsageError(f"Raft state has up to {_BODY_BYTES_MAX} bytes and numbers from 0: {state}")
    fields = _SLOT.pack(_MAGIC, FORMAT_VERSION, len(body), sequence)
    return fields + CRC.pack(crc32c(body, crc32c(fields, seed))) + body


def decode_raft_state(slot: bytes, seed: int) -> tuple[int, RaftState] | None:
    """Sequence and state in a slot, or None if there is no valid one."""
    if len(slot) < _BODY_AT:
        return None
    magic, version, length, sequence = _SLOT.unpack_from(slot)
    if (magic, version) != (_MAGIC, FORMAT_VERSION) or length > len(slot) - _BODY_AT:
        return None
    body = slot[_BODY_AT : _BODY_AT + length]
    if CRC.unpack_from(slot, _SLOT.size)[0] != crc32c(body, crc32c(slot[: _SLOT.size], seed)):
        return None
    state = _decode_body(body)
    return None if state is None else (sequence, state)


def _decode_body(body: bytes) -> RaftState | None:
    try:
        fields = msgpack.unpackb(body, use_list=False)
    except (ValueError, msgpack.UnpackException):
        return None
    if type(fields) is not tuple or len(fields) != 10:
        return None
    node, term, vote, commit, *groups, auto_leave, made_at = fields
    sound = (
        _are_numbers((node, term, vote, commit, made_at))
        and all(type(group) is tuple and _are_numbers(group) for group in groups)
        and type(auto_leave) is bool
    )
    if not sound:
        return None
    voters, learners, outgoing, learners_next = groups
    members = Configuration(voters, learners, outgoing, learners_next, auto_leave)
    return RaftState(node, term, vote, commit, members, made_at)


def _are_numbers(values: tuple[Any, ...]) -> bool:
    return all(type(value) is int and 0 <= value <= _NUMBER_MAX for value in values)


@final
class RaftStateFile:
    """Keeps a replica's :class:`RaftState`.  Made by :meth:`open`; one caller at a time.

    Attributes:
        state: what was saved last, or None if nothing ever was.
    """

    def __init__(self, disk: Disk, directory: str, store_id: bytes) -> None:
        self._disk = disk
        self._directory = directory
        self._seed = crc32c(store_id)
        self._file: File | None = None
        self._sequence = 0
        self._durable_slot = 0  # file offset of the slot that no write may touch
        self._failure = ""
        self._closed = False
        self.state: RaftState | None = None

    @classmethod
    def open(cls, disk: Disk, directory: str, *, store_id: bytes) -> Self:
        """Read what was saved in ``directory``; makes nothing before the first save.

        Raises:
            CorruptionError: the file is there, and neither slot is sound.
            StorageError: the disk refused.
        """
        self = cls(disk, directory, store_id)
        path = self._path(RAFT_STATE_NAME)
        with storage_errors("cannot open the Raft state"):
            if disk.exists(path):
                self._adopt(disk.open(path))
        return self

    def _path(self, name: str) -> str:
        return posixpath.join(self._directory, name)

    def _adopt(self, file: File) -> None:
        """Start from what the disk holds, which after a failed sync may not be what its cache shows."""
        try:
            # What was saved unsynced may count now, so it must be durable before the other slot is written.
            file.fdatasync()
            file.drop_cache()
            self._sequence, self.state, self._durable_slot = _newest(file, self._seed)
        except BaseException:
            file.close()
            raise
        self._file = file

    def save(self, state: RaftState, *, sync: bool) -> None:
        """Put ``state`` in place of what was saved before; the first save is durable in any case.

        Args:
            sync: return when it is durable.  Without it a power loss may bring back an older state, never one
                with another term or vote: a change of those has to be synced.

        Raises:
            StorageError: the disk refused, now or earlier: open the file again.
            UsageError: it has more members than fit.
        """
        if self._failure:
            raise StorageError(
                f"the Raft state in {self._directory} has failed ({self._failure})",
                hint="reopen the store to recover",
            )
        if self._closed:
            raise RefusedError(f"the Raft state in {self._directory} is closed")
        _assert_follows(self.state, state, sync=sync)
        raw = encode_raft_state(state, self._sequence + 1, self._seed)
        with self._failing_for_good("cannot save the Raft state"):
            if self._file is None:
                self._file = self._create(raw)
            else:
                self._write(self._file, raw, sync=sync)
        self._sequence += 1
        self.state = state

    def raise_term(self, term: int) -> None:
        """Make ``term`` durable, without a vote in it, before a peer's entries of it are written to the log.

        Raises:
            StorageError: as for :meth:`save`.
        """
        if self.state is not None and term > self.state.term:
            self.save(attrs.evolve(self.state, term=term, vote=0), sync=True)

    def _write(self, file: File, raw: bytes, *, sync: bool) -> None:
        slot = BLOCK_BYTES - self._durable_slot
        file.pwritev([raw], slot)
        if sync:
            file.fdatasync()
            self._durable_slot = slot

    def _create(self, raw: bytes) -> File:
        """The file with its first slot, under its name only when that is durable."""
        file = self._disk.open(self._path(_UNFINISHED_NAME), create=True)
        try:
            file.truncate(0)  # left over from an attempt that failed
            file.allocate(0, _FILE_BYTES)  # so that a full disk cannot stop a later save
            file.pwritev([raw], 0)
            file.fdatasync()
            self._disk.rename(self._path(_UNFINISHED_NAME), self._path(RAFT_STATE_NAME))
            self._disk.sync_dir(self._directory)
        except BaseException:
            file.close()
            raise
        return file

    @contextlib.contextmanager
    def _failing_for_good(self, doing: str) -> Iterator[None]:
        """Nobody knows what the disk holds after these fail, so no more is saved."""
        try:
            yield
        except OSError as error:
            self._failure = f"{doing}: {error.strerror or error}"
            raise storage_error(doing, error) from error

    def close(self) -> None:
        """Close the file, without a sync.  Idempotent."""
        self._closed = True
        if self._file is not None:
            self._file.close()


def read_raft_state(disk: Disk, directory: str, *, store_id: bytes) -> RaftState | None:
    """What was saved last in ``directory``, None if nothing ever was; changes nothing on the disk.

    Raises:
        CorruptionError: the file is there, and neither slot is sound.
        StorageError: the disk refused.
    """
    path = posixpath.join(directory, RAFT_STATE_NAME)
    with storage_errors("cannot read the Raft state"):
        if not disk.exists(path):
            return None
        with contextlib.closing(disk.open(path)) as file:
            return _newest(file, crc32c(store_id))[1]


def _newest(file: File, seed: int) -> tuple[int, RaftState, int]:
    """Sequence, state and offset of the valid slot that was written last."""
    found = [
        (*decoded, at)
        for at in (0, BLOCK_BYTES)
        if (decoded := decode_raft_state(file.pread(BLOCK_BYTES, at), seed)) is not None
    ]
    return max(found, key=lambda slot: slot[0]) if found else _refuse()


def _refuse() -> NoReturn:
    raise CorruptionError(
        f"file {RAFT_STATE_NAME}: neither of its slots holds the Raft state of this store",
        segment=RAFT_STATE_NAME,
        offset=0,
        hint="without it this replica might vote twice in a term: remove it from its group, and add it anew",
    )


def _assert_follows(before: RaftState | None, after: RaftState, *, sync: bool) -> None:
    if before is None:
        return
    assert after.node == before.node, "a replica never takes another's id"
    assert after.term >= before.term, "a term never goes back"
    assert after.configuration_index >= before.configuration_index, "members never go back"
    if after.term == before.term:
        assert before.vote in {0, after.vote}, "a vote is never taken back"
    assert sync or (after.term, after.vote) == (before.term, before.vote), "a term or vote must be durable"

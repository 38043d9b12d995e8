"""Volumes seen on this machine: bind mounts of directories and of loop devices, and a note of each.

A note (one small file a path) says what belongs at a path and how far that is, and is written before anything is done:

* ``mounting``: it is being mounted.  A driver killed there leaves it mounted or not; the orchestrator asks again, and
  what is there is taken away and made anew.
* ``mounted``: it was.  If the owner of the store ended, the mount is dead ("Transport endpoint is not connected").
* ``replacing``: a dead mount is being exchanged for a live one; whoever finds that note goes on with it.

So after any death of any process :meth:`LinuxHost.repair` puts back what was there, where it was, once.  A path that
was ``mounted`` and has nothing mounted any more is left alone: the machine was started anew, or somebody took it away,
and the orchestrator says what it wants.

A workload that has a file of a dead mount open has lost it; it sees the new mount if it was given mounts to come
(HostToContainer), or is started anew.  A block device whose last user is still there keeps its dead loop device: the
path gets another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import json
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import attrs

from space._errors import (
    ConflictError,
    NotFoundError,
    RefusedError,
    SpaceError,
    Status,
    StorageError,
    UnavailableError,
    UsageError,
)
from space._node import csi_mounts as kernel
from space.projections.csi import check
from space.projections.csi.model import Mounting, Volume
from space.projections.csi.pb import csi_pb2 as pb

STAGED: Final = "staged"
PUBLISHED: Final = "published"
MOUNTING: Final = "mounting"
MOUNTED: Final = "mounted"
REPLACING: Final = "replacing"

KIND: Final = "fuse.space"
SOURCE: Final = "space:/csi/volumes"
"""How mountinfo names the mount of all volumes."""

LAYERS_MAX: Final = 16
"""Mounts taken away from one path: more than that nobody of ours ever put there."""

THREADS: Final = 16
LOCKS: Final = 64
GROWN_SECONDS: Final = 5.0
GROWN_POLL_SECONDS: Final = 0.02
NOTE_BYTES_MAX: Final = 1 << 16
DIRECTORY_MODE: Final = 0o750  # as kubelet makes its own

_SINGLE_WRITER: Final = pb.VolumeCapability.AccessMode.SINGLE_NODE_SINGLE_WRITER

log: Final = logging.getLogger("space.csi")


@attrs.frozen
class Note:
    """What belongs at a path.

    Attributes:
        role: staged or published.
        loop: the loop device made for this path alone; empty if there is none.
    """

    volume: str
    path: str
    role: str
    block: bool
    phase: str
    readonly: bool = False
    flags: tuple[str, ...] = ()
    group: int | None = None
    mode: int = 0
    loop: str = ""


class Notes:
    """Notes in a directory, each whole or not there."""

    def __init__(self, home: Path) -> None:
        self._home = home
        home.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _file(self, path: str) -> Path:
        return self._home / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"

    def find(self, path: str) -> Note | None:
        """The note for a path."""
        return _read_note(self._file(path))

    def keep(self, note: Note) -> None:
        """Writes a note.  Without fsync: after a power failure nothing is mounted, and no note is needed."""
        file = self._file(note.path)
        new = file.with_suffix(f".{threading.get_ident()}")
        new.write_text(json.dumps(attrs.asdict(note), ensure_ascii=True))
        new.rename(file)

    def drop(self, path: str) -> None:
        """Forgets a path."""
        self._file(path).unlink(missing_ok=True)

    def all(self) -> list[Note]:
        """All notes, staged volumes first: what is published may need them."""
        found = [note for file in self._home.glob("*.json") if (note := _read_note(file)) is not None]
        return sorted(found, key=lambda note: (note.role != STAGED, note.path))


def _read_note(file: Path) -> Note | None:
    try:
        with file.open("rb") as source:
            document: dict[str, Any] = json.loads(source.read(NOTE_BYTES_MAX))
        document["flags"] = tuple(document["flags"])
        return Note(**document)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError):
        log.warning("%s is no note of ours: left alone", file)
        return None


class LinuxHost:
    """:class:`space.projections.csi.model.Host` of this machine."""

    def __init__(self, home: Path, shown: Callable[[], str], *, forbidden: Sequence[Path] = ()) -> None:
        """Keeps notes in ``home``; ``shown`` says where all volumes are mounted.

        No path of a caller may be inside of ``forbidden``.
        """
        self._notes = Notes(home)
        self._shown = shown
        self._forbidden = [os.path.realpath(each) for each in forbidden]
        self._locks = [threading.Lock() for _ in range(LOCKS)]
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="space-csi-host")

    def close(self) -> None:
        """Waits for what is under way."""
        self._threads.shutdown()

    async def _run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    async def stage(self, volume: Volume, path: str, how: Mounting) -> None:
        await self._run(self._stage, volume, path, how)

    async def unstage(self, volume: str, path: str) -> None:
        await self._run(self._unstage, volume, path)

    async def publish(self, volume: Volume, staging: str, target: str, how: Mounting) -> None:
        await self._run(self._publish, volume, staging, target, how)

    async def unpublish(self, volume: str, target: str) -> None:
        await self._run(self._unpublish, volume, target)

    async def condition(self, volume: str, path: str) -> str:
        found: str = await self._run(self._condition, volume, path)
        return found

    async def expand(self, volume: Volume, path: str) -> None:
        await self._run(self._expand, volume)

    # --- paths -----------------------------------------------------------------------------------

    def _point(self, path: str) -> str:
        """A caller's path as mountinfo has it.

        Raises:
            UsageError: it is a symbolic link, or inside of what is ours.
        """
        point = kernel.real_point(path)
        if os.path.islink(point):
            raise UsageError(f"{path} is a symbolic link", hint="a target is a directory or a file")
        for ours in self._forbidden:
            if point == ours or point.startswith(ours + "/") or ours.startswith(point + "/"):
                raise UsageError(f"{path} is where this driver keeps what is its own")
        return point

    @contextlib.contextmanager
    def _alone(self, point: str) -> Iterator[None]:
        """Nobody else does anything with a path meanwhile."""
        with self._locks[hash(point) % LOCKS]:
            yield

    def _source(self, volume: str) -> str:
        return f"{self._shown()}/{volume}/data"

    # --- stage and publish -----------------------------------------------------------------------

    def _stage(self, volume: Volume, path: str, how: Mounting) -> None:
        point = self._point(path)
        note = _note(volume, point, STAGED, how)
        with self._alone(point), _clear_errors(point):
            if volume.block:
                os.makedirs(point, DIRECTORY_MODE, exist_ok=True)
                self._notes.keep(
                    attrs.evolve(note, phase=MOUNTED, loop=self._device(volume.id, "", readonly=False))
                )
                return
            self._show(note)

    def _publish(self, volume: Volume, staging: str, target: str, how: Mounting) -> None:
        point = self._point(target)
        if staging:
            staged = self._notes.find(self._point(staging))
            if staged is None or staged.volume != volume.id:
                raise RefusedError(
                    f"volume {volume.id} is not staged at {staging}", status=Status.NOT_PERMITTED
                )
        if how.mode == _SINGLE_WRITER:
            for other in self._notes.all():
                if (other.volume, other.role) == (volume.id, PUBLISHED) and other.path != point:
                    raise RefusedError(
                        f"volume {volume.id} is for one workload, and published at {other.path}",
                        status=Status.NOT_PERMITTED,
                    )
        with self._alone(point), _clear_errors(point):
            self._show(_note(volume, point, PUBLISHED, how))

    def _show(self, note: Note) -> None:
        """Mounts what a note says, unless it is there."""
        before = self._notes.find(note.path)
        there = self._mounts(note.path)
        if (
            before is not None
            and before.phase == MOUNTED
            and len(there) == 1
            and self._is_live(before, there[0])
        ):
            if (before.volume, before.readonly) != (note.volume, note.readonly):
                how = "read-only" if before.readonly else "for writing"
                raise ConflictError(f"{note.path} shows volume {before.volume} already, {how}")
            return
        self._clear(note.path, there)
        if before is not None and before.loop:
            self._let_go(before)
        self._notes.keep(note)
        self._mount(note)

    def _mount(self, note: Note) -> None:
        """Makes the path and mounts on it; the note says so when it is done."""
        if note.block:
            device = self._device(note.volume, note.path, readonly=note.readonly)
            if note.readonly:
                note = attrs.evolve(note, loop=device)
                self._notes.keep(note)
            _make_file(note.path)
            kernel.bind(device, note.path)
        else:
            source = self._source(note.volume)
            if note.group is not None and not note.readonly:
                give_to_group(source, note.group)
            os.makedirs(note.path, DIRECTORY_MODE, exist_ok=True)
            kernel.bind(source, note.path, flags=note.flags, readonly=note.readonly)
        self._notes.keep(attrs.evolve(note, phase=MOUNTED))

    def _mounts(self, point: str) -> list[kernel.Mount]:
        return kernel.mounts_at(point)

    def _is_live(self, note: Note, there: kernel.Mount) -> bool:
        """Whether what is mounted is what a note says, and answers."""
        if not note.block:
            return (
                _is_ours(there)
                and there.root == f"/{note.volume}/data"
                and there.readonly == note.readonly
                and not kernel.is_dead(note.path)
            )
        device = "/dev" + there.root
        return device in kernel.loops_over(f"/{note.volume}/data") and self._answers(note.volume, device)

    def _answers(self, volume: str, device: str) -> bool:
        """Whether a loop device is over the file as it is shown now, and not as it was by an owner that ended."""
        try:
            found = os.stat(self._source(volume))
        except OSError:
            return False
        return kernel.loop_backing(device) == (found.st_dev, found.st_ino)

    def _clear(self, point: str, there: list[kernel.Mount]) -> None:
        """Takes away whatever of ours is mounted at a path.

        Raises:
            ConflictError: something else is mounted there.
            RefusedError: it is in use.
        """
        for _ in range(LAYERS_MAX):
            if not there:
                return
            top = there[-1]
            if not _is_ours(top):
                raise ConflictError(f"{point} has a {top.kind} mounted on it that is not ours")
            try:
                kernel.unmount(point, detach=kernel.is_dead(point))
            except OSError as error:
                if error.errno == errno.EBUSY:
                    raise RefusedError(f"{point} is in use", status=Status.NOT_PERMITTED) from None
                raise
            there = self._mounts(point)
        raise ConflictError(f"{point} has more than {LAYERS_MAX} mounts on it")

    # --- devices ---------------------------------------------------------------------------------

    def _device(self, volume: str, path: str, *, readonly: bool) -> str:
        """The loop device of a volume, made if there is none that answers; a read-only one is for ``path`` alone."""
        readers = {note.loop for note in self._notes.all() if note.loop and note.role == PUBLISHED}
        if not readonly:
            for device in kernel.loops_over(f"/{volume}/data"):
                if device not in readers and self._answers(volume, device):
                    return device
        return kernel.attach_loop(self._source(volume), block_bytes=check.BLOCK_BYTES, readonly=readonly)

    def _let_go(self, note: Note) -> None:
        """Detaches the device that was made for one path, if it still is that volume's."""
        if note.loop in kernel.loops_over(f"/{note.volume}/data"):
            kernel.detach_loop(note.loop)

    # --- the other way ---------------------------------------------------------------------------

    def _unpublish(self, volume: str, target: str) -> None:
        point = self._point(target)
        with self._alone(point), _clear_errors(point):
            note = self._notes.find(point)
            if note is not None and note.volume != volume:
                raise ConflictError(f"{target} shows volume {note.volume}, not {volume}")
            self._clear(point, self._mounts(point))
            if note is not None and note.loop:
                self._let_go(note)
            _remove(point)
            self._forget(volume, point)

    def _unstage(self, volume: str, path: str) -> None:
        point = self._point(path)
        with self._alone(point), _clear_errors(point):
            note = self._notes.find(point)
            if note is not None and note.volume != volume:
                raise ConflictError(f"{path} is of volume {note.volume}, not {volume}")
            self._clear(point, self._mounts(point))
            self._forget(volume, point)

    def _forget(self, volume: str, point: str) -> None:
        """Drops the note of a path; with the last one of a volume go its devices."""
        others = any(note.volume == volume and note.path != point for note in self._notes.all())
        if check.is_id(volume) and not others:
            for device in kernel.loops_over(f"/{volume}/data"):
                kernel.detach_loop(device)
        self._notes.drop(point)

    # --- looking and growing ---------------------------------------------------------------------

    def _condition(self, volume: str, path: str) -> str:
        point = self._point(path)
        note = self._notes.find(point)
        if note is None or note.volume != volume:
            raise NotFoundError(f"volume {volume} is not seen at {path}")
        if note.block and note.role == STAGED:
            return "" if self._answers(volume, note.loop) else "the device is gone: it is made anew"
        there = self._mounts(point)
        if not there:
            raise NotFoundError(f"nothing is mounted at {path}")
        if len(there) > 1:
            return f"{len(there)} mounts are at {path}"
        return "" if self._is_live(note, there[0]) else "the store was started anew; the mount is replaced"

    def _expand(self, volume: Volume) -> None:
        if not volume.block:
            return
        deadline = time.monotonic() + GROWN_SECONDS
        while (
            os.stat(self._source(volume.id)).st_size < volume.capacity
        ):  # the kernel may know it for a second
            if time.monotonic() > deadline:
                raise StorageError(f"volume {volume.id} is not seen at its new size")
            time.sleep(GROWN_POLL_SECONDS)
        for device in kernel.loops_over(f"/{volume.id}/data"):
            kernel.grow_loop(device)

    # --- after a death ---------------------------------------------------------------------------

    async def repair(self) -> int:
        """Exchanges every dead mount for a live one; how many there were."""
        found: int = await self._run(self._repair)
        return found

    def _repair(self) -> int:
        repaired = 0
        for seen in self._notes.all():
            with self._alone(seen.path):
                note = self._notes.find(seen.path)  # it may have gone meanwhile
                if note is None or note.phase == MOUNTING:
                    continue
                try:
                    repaired += self._repair_one(note)
                except (SpaceError, OSError) as error:
                    log.warning("%s, where volume %s belongs: %s", note.path, note.volume, error)
        return repaired

    def _repair_one(self, note: Note) -> bool:
        if note.block and note.role == STAGED:
            if self._answers(note.volume, note.loop):
                return False
            self._let_go(note)
            device = self._device(note.volume, "", readonly=False)
            self._notes.keep(attrs.evolve(note, loop=device))
            return True
        there = self._mounts(note.path)
        if note.phase == MOUNTED:
            if not there:
                self._notes.drop(note.path)  # see above: nobody's any more
                return False
            if len(there) == 1 and self._is_live(note, there[0]):
                return False
        note = attrs.evolve(note, phase=REPLACING)
        self._notes.keep(note)
        for _ in there:
            kernel.unmount(note.path, detach=True)
        if note.loop:
            self._let_go(note)
        self._mount(note)
        log.warning("replaced the dead mount of volume %s at %s", note.volume, note.path)
        return True


def _is_ours(there: kernel.Mount) -> bool:
    """Whether a mount is of a volume."""
    if there.kind == KIND:
        return there.source == SOURCE
    return there.kind == "devtmpfs" and there.root.startswith("/loop")


def _note(volume: Volume, point: str, role: str, how: Mounting) -> Note:
    return Note(
        volume.id,
        point,
        role,
        volume.block,
        MOUNTING,
        how.readonly,
        tuple(how.flags),
        how.group,
        how.mode,
    )


@contextlib.contextmanager
def _clear_errors(point: str) -> Iterator[None]:
    """What the kernel refuses, in words of ours."""
    try:
        yield
    except OSError as error:
        kind = UnavailableError if error.errno in kernel.DEAD else StorageError
        raise kind(f"{point}: {error.strerror or error}") from None


def _make_file(path: str) -> None:
    os.makedirs(os.path.dirname(path), DIRECTORY_MODE, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))


def _remove(point: str) -> None:
    """Removes what was made to be mounted on; never anything that has something in it."""
    try:
        mode = os.lstat(point).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        os.rmdir(point)
    elif stat.S_ISREG(mode) and os.path.getsize(point) == 0:
        os.unlink(point)
    else:
        raise UsageError(f"{point} is nothing this driver made")


def give_to_group(root: str, group: int) -> None:
    """Lets a group read and write a tree, and own what is made in it; one that has it already costs one look.

    As kubelet's fsGroup does it with fsGroupChangePolicy OnRootMismatch.
    """
    wanted = stat.S_ISGID | 0o070
    found = os.stat(root)
    if found.st_gid == group and found.st_mode & wanted == wanted:
        return
    for directory, names, files in os.walk(root, topdown=False):
        for name in files:
            _give(os.path.join(directory, name), group, 0o060)
        for name in names:
            path = os.path.join(directory, name)
            if os.path.islink(path):
                os.chown(path, -1, group, follow_symlinks=False)
        # the directory after what is in it, the root last of all: an interrupted walk is begun anew
        _give(directory, group, wanted)


def _give(path: str, group: int, bits: int) -> None:
    with contextlib.suppress(FileNotFoundError):  # a workload that is there already may remove it
        found = os.lstat(path)
        os.chown(path, -1, group, follow_symlinks=False)
        if not stat.S_ISLNK(found.st_mode):
            os.chmod(path, stat.S_IMODE(found.st_mode) | bits)

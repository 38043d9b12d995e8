"""Volumes seen on this machine: bind mounts of directories and of devices, and a note of each.

What is bound follows from the volume's transport.  Where the store is: a directory of the one FUSE mount, or a loop
device over a file of it.  Anywhere: the volume's own NFS mount, which is what staging makes, or its NVMe device.

A note (one small file a path) says what belongs at a path and how far that is, and is written before anything is done:

* ``mounting``: it is being mounted.  A driver killed there leaves it mounted or not; the orchestrator asks again, and
  what is there is taken away and made anew.
* ``mounted``: it was.  If the owner of the store ended, the mount is dead ("Transport endpoint is not connected").
* ``replacing``: a dead mount is being exchanged for a live one; whoever finds that note goes on with it.

So after any death of any process :meth:`LinuxHost.repair` puts back what was there, where it was, once.  A path that
was ``mounted`` and has nothing mounted any more is left alone: the machine was started anew, or somebody took it away,
and the orchestrator says what it wants.

NFS mounts and NVMe devices do not die with the owner: whoever uses them waits, and goes on when it is back.  So there
is nothing to repair; nor are they ever looked into here, which would be to wait with them.  Where several servers are,
paths of a device that are missing are connected now and then, and mounts go through a relay of this driver
(:mod:`space._node.csi_relay`), which is at the noted port again after a restart.

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
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar

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
from space._node import csi_network as network
from space.projections.csi import check
from space.projections.csi.model import (
    NETWORK,
    NFS,
    NVME,
    TRANSPORT,
    TRANSPORTS,
    Mounting,
    Reach,
    Usage,
    Volume,
    host_nqn,
    host_uuid,
)
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
TURN_SECONDS: Final = 20.0
"""A call for a path waits so long for an earlier one, which an NFS server that does not answer may be holding up."""

STATS_SECONDS: Final = 5.0
GROWN_SECONDS: Final = 5.0
GROWN_POLL_SECONDS: Final = 0.02
NOTE_BYTES_MAX: Final = 1 << 16
DIRECTORY_MODE: Final = 0o750  # as kubelet makes its own

_SINGLE_WRITER: Final = pb.VolumeCapability.AccessMode.SINGLE_NODE_SINGLE_WRITER

log: Final = logging.getLogger("space.csi")

_T = TypeVar("_T")


@attrs.frozen
class Note:
    """What belongs at a path.

    Attributes:
        role: staged or published.
        loop: the loop device made for this path alone; empty if there is none.
        backing: what that is over, if not a file of the FUSE mount.
        transport: empty in notes from before there were several.
        options: of the NFS client.
        reach: of a volume over the network.
        staging: where the NFS mount is that a published path shows.
        relay: the port of this machine that an NFS mount goes through; 0 for none.
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
    backing: str = ""
    transport: str = ""
    options: tuple[str, ...] = ()
    reach: Reach | None = None
    staging: str = ""
    relay: int = 0

    @property
    def way(self) -> str:
        """How the volume is seen."""
        return self.transport or TRANSPORTS[self.block][0]

    @property
    def export(self) -> Reach:
        """How a volume over the network is reached."""
        assert self.reach is not None
        return self.reach


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
        for name in ("flags", "options"):
            document[name] = tuple(document.get(name, ()))
        if document.get("reach") is not None:
            document["reach"] = Reach(**document["reach"])
        return Note(**document)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError):
        log.warning("%s is no note of ours: left alone", file)
        return None


class LinuxHost:
    """:class:`space.projections.csi.model.Host` of this machine."""

    def __init__(
        self,
        home: Path,
        shown: Callable[[], str],
        node: str,
        *,
        relay: Callable[[Sequence[str]], int],
        forbidden: Sequence[Path] = (),
    ) -> None:
        """Keeps notes in ``home``; ``shown`` says where all volumes are mounted, and ``node`` is this machine's id.

        ``relay`` gives the port of this machine that leads to whichever of several NFS servers serves; asked from
        any thread but the loop's.  No path of a caller may be inside of ``forbidden``.
        """
        self._relay = relay
        self._notes = Notes(home)
        self._shown = shown
        self._host = network.Host(host_nqn(node), host_uuid(node))
        self._asking: dict[str, threading.Thread] = {}
        self._forbidden = [os.path.realpath(each) for each in forbidden]
        self._locks = [threading.Lock() for _ in range(LOCKS)]
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="space-csi-host")

    def close(self) -> None:
        """Waits for what is under way."""
        self._threads.shutdown()

    async def _run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    async def stage(self, volume: Volume, path: str, how: Mounting, reach: Reach | None = None) -> None:
        await self._run(self._stage, volume, path, how, reach)

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

    async def seen(self, volume: str, path: str) -> Volume:
        found: Volume = await self._run(self._seen, volume, path)
        return found

    async def usage(self, volume: str, path: str) -> Usage:
        found: Usage = await self._run(self._usage, volume, path)
        return found

    # --- paths -----------------------------------------------------------------------------------

    def _point(self, path: str) -> str:
        """A caller's path as mountinfo has it.

        Raises:
            UsageError: it is a symbolic link, or inside of what is ours.
        """
        point = kernel.real_point(path)
        # what is mounted on is none, and a look at it may have to wait for a server
        if not kernel.mounts_at(point) and os.path.islink(point):
            raise UsageError(f"{path} is a symbolic link", hint="a target is a directory or a file")
        for ours in self._forbidden:
            if point == ours or point.startswith(ours + "/") or ours.startswith(point + "/"):
                raise UsageError(f"{path} is where this driver keeps what is its own")
        return point

    @contextlib.contextmanager
    def _alone(self, point: str) -> Iterator[None]:
        """Nobody else does anything with a path meanwhile.

        Raises:
            ConflictError: an earlier call does not end; status STALE.
        """
        lock = self._locks[hash(point) % LOCKS]
        if not lock.acquire(timeout=TURN_SECONDS):
            raise ConflictError(f"{point}: an earlier call is still under way", status=Status.STALE)
        try:
            yield
        finally:
            lock.release()

    def _source(self, volume: str) -> str:
        return f"{self._shown()}/{volume}/data"

    # --- stage and publish -----------------------------------------------------------------------

    def _stage(self, volume: Volume, path: str, how: Mounting, reach: Reach | None) -> None:
        point = self._point(path)
        note = _note(volume, point, STAGED, how, reach)
        with self._alone(point), _clear_errors(point):
            if not volume.block:
                if note.way == NFS and len(note.export.servers) > 1:
                    note = attrs.evolve(note, relay=self._relay(note.export.servers))
                self._show(note)
                return
            os.makedirs(point, DIRECTORY_MODE, exist_ok=True)
            if note.way == NVME:
                self._notes.keep(note)
                network.connect(note.export, self._host)
            else:
                note = attrs.evolve(note, loop=self._loop(volume.id))
            self._notes.keep(attrs.evolve(note, phase=MOUNTED))

    def _publish(self, volume: Volume, staging: str, target: str, how: Mounting) -> None:
        point = self._point(target)
        note = _note(volume, point, PUBLISHED, how, None)
        if staging:
            staged = self._notes.find(self._point(staging))
            if staged is None or staged.volume != volume.id or (staged.way, staged.phase) == (NFS, MOUNTING):
                raise RefusedError(
                    f"volume {volume.id} is not staged at {staging}", status=Status.NOT_PERMITTED
                )
            note = attrs.evolve(note, reach=staged.reach, staging=staged.path)
        if how.mode == _SINGLE_WRITER:
            for other in self._notes.all():
                if (other.volume, other.role) == (volume.id, PUBLISHED) and other.path != point:
                    raise RefusedError(
                        f"volume {volume.id} is for one workload, and published at {other.path}",
                        status=Status.NOT_PERMITTED,
                    )
        with self._alone(point), _clear_errors(point):
            self._show(note)

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
        self._clear(note.volume, note.path, there)
        if before is not None and before.loop:
            self._let_go(before)
        self._notes.keep(note)
        self._mount(note)

    def _mount(self, note: Note) -> None:
        """Makes the path and mounts on it; the note says so when it is done."""
        if note.block:
            note = self._mount_device(note)
        else:
            self._mount_tree(note)
        self._notes.keep(attrs.evolve(note, phase=MOUNTED))

    def _mount_tree(self, note: Note) -> None:
        os.makedirs(note.path, DIRECTORY_MODE, exist_ok=True)
        group = None if note.readonly else note.group
        if note.way == NFS and note.role == STAGED:
            network.mount_nfs(
                note.export, note.path, options=note.options, readonly=note.readonly, relay=note.relay
            )
            if group is not None:
                give_to_group(note.path, group)
            return
        source = note.staging if note.way == NFS else self._source(note.volume)
        if group is not None:
            give_to_group(source, group)
        kernel.bind(source, note.path, flags=note.flags, readonly=note.readonly)

    def _mount_device(self, note: Note) -> Note:
        """Binds a device's node; a path that is read-only has a loop device of its own over what the others use."""
        if note.way == NVME:
            device = backing = network.connect(note.export, self._host)
        else:
            device, backing = "" if note.readonly else self._loop(note.volume), self._source(note.volume)
        if note.readonly:
            device = kernel.attach_loop(backing, block_bytes=check.BLOCK_BYTES, readonly=True)
            note = attrs.evolve(note, loop=device, backing=backing if note.way == NVME else "")
            self._notes.keep(note)
        _make_file(note.path)
        kernel.bind(device, note.path)
        return note

    def _mounts(self, point: str) -> list[kernel.Mount]:
        return kernel.mounts_at(point)

    def _is_live(self, note: Note, there: kernel.Mount) -> bool:
        """Whether what is mounted is what a note says, and answers."""
        if note.way == NFS:
            same = there.source == network.nfs_source(note.export)
            return same and there.kind == "nfs4" and there.readonly == note.readonly
        if note.way == NVME:
            return self._is_live_device(note, "/dev" + there.root)
        if not note.block:
            return (
                _is_ours(note.volume, there)
                and there.root == f"/{note.volume}/data"
                and there.readonly == note.readonly
                and not kernel.is_dead(note.path)
            )
        device = "/dev" + there.root
        return device in kernel.loops_over(f"/{note.volume}/data") and self._answers(note.volume, device)

    def _is_live_device(self, note: Note, shown: str) -> bool:
        """Whether a device is that of an NVMe namespace, or the loop device over it that a read-only path has."""
        device = network.find_device(note.export)
        if not note.readonly:
            return device == shown
        return device == note.backing and shown == note.loop and shown in kernel.loops_over(note.backing)

    def _answers(self, volume: str, device: str) -> bool:
        """Whether a loop device is over the file as it is shown now, and not as it was by an owner that ended."""
        try:
            found = os.stat(self._source(volume))
        except OSError:
            return False
        return kernel.loop_backing(device) == (found.st_dev, found.st_ino)

    def _clear(self, volume: str, point: str, there: list[kernel.Mount]) -> None:
        """Takes away whatever of ours is mounted at a path.

        Raises:
            ConflictError: something else is mounted there.
            RefusedError: it is in use.
        """
        for _ in range(LAYERS_MAX):
            if not there:
                return
            top = there[-1]
            if not _is_ours(volume, top):
                raise ConflictError(f"{point} has a {top.kind} mounted on it that is not ours")
            try:
                kernel.unmount(point, detach=top.kind == KIND and kernel.is_dead(point))
            except OSError as error:
                if error.errno == errno.EBUSY:
                    raise RefusedError(f"{point} is in use", status=Status.NOT_PERMITTED) from None
                raise
            there = self._mounts(point)
        raise ConflictError(f"{point} has more than {LAYERS_MAX} mounts on it")

    # --- devices ---------------------------------------------------------------------------------

    def _loop(self, volume: str) -> str:
        """The loop device of a volume, made if there is none that answers."""
        readers = {note.loop for note in self._notes.all() if note.loop and note.role == PUBLISHED}
        for device in kernel.loops_over(f"/{volume}/data"):
            if device not in readers and self._answers(volume, device):
                return device
        return kernel.attach_loop(self._source(volume), block_bytes=check.BLOCK_BYTES)

    def _let_go(self, note: Note) -> None:
        """Detaches the device that was made for one path, if it still is that volume's."""
        if note.loop in kernel.loops_over(note.backing or f"/{note.volume}/data"):
            kernel.detach_loop(note.loop)

    # --- the other way ---------------------------------------------------------------------------

    def _unpublish(self, volume: str, target: str) -> None:
        point = self._point(target)
        with self._alone(point), _clear_errors(point):
            note = self._notes.find(point)
            if note is not None and note.volume != volume:
                raise ConflictError(f"{target} shows volume {note.volume}, not {volume}")
            self._clear(volume, point, self._mounts(point))
            if note is not None and note.loop:
                self._let_go(note)
            _remove(point)
            self._forget(volume, point, note)

    def _unstage(self, volume: str, path: str) -> None:
        point = self._point(path)
        with self._alone(point), _clear_errors(point):
            note = self._notes.find(point)
            if note is not None and note.volume != volume:
                raise ConflictError(f"{path} is of volume {note.volume}, not {volume}")
            self._clear(volume, point, self._mounts(point))
            self._forget(volume, point, note)

    def _forget(self, volume: str, point: str, note: Note | None) -> None:
        """Drops the note of a path; with the last one of a volume go its devices."""
        others = any(each.volume == volume and each.path != point for each in self._notes.all())
        if check.is_id(volume) and not others:
            self._detach(volume, note)
        self._notes.drop(point)

    def _detach(self, volume: str, note: Note | None) -> None:
        """Lets all devices of a volume go."""
        backing = f"/{volume}/data"
        if note is not None and note.way == NVME:
            backing = network.find_device(note.export) or backing
        for device in kernel.loops_over(backing):
            kernel.detach_loop(device)
        if note is not None and note.way == NVME:
            network.disconnect(note.export.nqn, self._host)

    # --- looking and growing ---------------------------------------------------------------------

    def _condition(self, volume: str, path: str) -> str:
        note = self._noted(volume, path)
        point = note.path
        if note.way == NVME and not network.is_live(note.export.nqn, self._host):
            return f"{note.export.server} does not answer; I/O waits for it"
        if note.block and note.role == STAGED:
            live = note.way == NVME or self._answers(volume, note.loop)
            return "" if live else "the device is gone: it is made anew"
        there = self._mounts(point)
        if not there:
            raise NotFoundError(f"nothing is mounted at {path}")
        if len(there) > 1:
            return f"{len(there)} mounts are at {path}"
        return "" if self._is_live(note, there[0]) else "the store was started anew; the mount is replaced"

    def _expand(self, volume: Volume) -> None:
        if not volume.block:
            return
        device = self._nvme_device(volume)
        backing = device or self._source(volume.id)
        deadline = time.monotonic() + GROWN_SECONDS
        # the kernel may know it for a second, or has to be told by its target first
        while (network.device_size(device) if device else os.stat(backing).st_size) < volume.capacity:
            if time.monotonic() > deadline:
                raise StorageError(f"volume {volume.id} is not seen at its new size")
            time.sleep(GROWN_POLL_SECONDS)
        for each in kernel.loops_over(device or f"/{volume.id}/data"):
            kernel.grow_loop(each)

    def _nvme_device(self, volume: Volume) -> str:
        """The device of a volume over NVMe; empty for others.

        Raises:
            UnavailableError: it is not there.
        """
        if volume.transport != NVME:
            return ""
        for note in self._notes.all():
            if note.volume == volume.id and (device := network.find_device(note.export)):
                return device
        raise UnavailableError(f"volume {volume.id} is not connected")

    def _seen(self, volume: str, path: str) -> Volume:
        note = self._noted(volume, path)
        device = network.find_device(note.export) if note.way == NVME else None
        capacity = network.device_size(device) if device else 0
        return Volume(volume, "", capacity, note.block, 0, parameters={TRANSPORT: note.way})

    def _noted(self, volume: str, path: str) -> Note:
        note = self._notes.find(self._point(path))
        if note is None or note.volume != volume:
            raise NotFoundError(f"volume {volume} is not seen at {path}")
        return note

    def _usage(self, volume: str, path: str) -> Usage:
        note = self._noted(volume, path)
        if note.way == NFS:
            # where it is staged: a question that is not answered would keep the pod's path in use
            return _space_of(self._asked(volume, lambda: os.statvfs(note.staging or note.path)))
        device = network.find_device(note.export)
        if device is None:
            raise UnavailableError(f"volume {volume} is not connected")
        used = self._asked(volume, lambda: network.namespace_used(device))
        return Usage(used, network.device_size(device))

    def _asked(self, volume: str, question: Callable[[], _T]) -> _T:
        """What the volume's server says.

        Nobody can take back what the kernel waits for: so it is a thread of its own that does, one for each volume.

        Raises:
            UnavailableError: it says nothing, or is still asked from before.
            OSError: it refuses.
        """
        if (asking := self._asking.get(volume)) is not None and asking.is_alive():
            raise UnavailableError(f"the server of volume {volume} does not answer")
        answer: Future[_T] = Future()

        def ask() -> None:
            try:
                answer.set_result(question())
            except OSError as error:
                answer.set_exception(error)

        self._asking[volume] = thread = threading.Thread(target=ask, name="space-csi-stats", daemon=True)
        thread.start()
        try:
            return answer.result(STATS_SECONDS)
        except TimeoutError:
            raise UnavailableError(f"the server of volume {volume} does not answer") from None
        except OSError as error:
            raise UnavailableError(f"volume {volume} says nothing of its use: {error.strerror}") from None

    # --- several servers -------------------------------------------------------------------------

    def relays(self) -> dict[tuple[str, ...], int]:
        """The ports that mounts go through, by the servers they lead to."""
        return {note.export.servers: note.relay for note in self._notes.all() if note.relay}

    async def complete(self) -> None:
        """Connects paths of devices that are missing: their servers did not answer, or are new."""
        await self._run(self._complete)

    def _complete(self) -> None:
        for seen in self._notes.all():
            if not (seen.way == NVME and seen.role == STAGED and len(seen.export.servers) > 1):
                continue
            with contextlib.suppress(SpaceError, OSError), self._alone(seen.path):
                note = self._notes.find(seen.path)  # it may have gone meanwhile
                if note is not None and note.phase == MOUNTED:
                    network.complete(note.export, self._host)

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
        if note.way in NETWORK:
            if not self._is_there(note):
                self._notes.drop(note.path)
            return False
        if note.block and note.role == STAGED:
            if self._answers(note.volume, note.loop):
                return False
            self._let_go(note)
            self._notes.keep(attrs.evolve(note, loop=self._loop(note.volume)))
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

    def _is_there(self, note: Note) -> bool:
        """Whether anything is left of what was made for a path."""
        if note.block and note.role == STAGED:
            return network.find_device(note.export) is not None
        return bool(self._mounts(note.path))


def _is_ours(volume: str, there: kernel.Mount) -> bool:
    """Whether a mount is of a volume; over NFS, of this one."""
    if there.kind == KIND:
        return there.source == SOURCE
    if there.kind == "devtmpfs":
        return there.root.startswith("/loop") or network.is_device(there.root)
    return network.is_nfs_of(there, volume)


def _space_of(found: os.statvfs_result) -> Usage:
    """What the server of an export says: a volume's capacity and use."""
    unit = found.f_frsize
    return Usage((found.f_blocks - found.f_bfree) * unit, found.f_blocks * unit)


def _note(volume: Volume, point: str, role: str, how: Mounting, reach: Reach | None) -> Note:
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
        transport=volume.transport,
        options=tuple(how.options),
        reach=reach,
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

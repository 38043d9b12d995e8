"""The process that owns a store with volumes, and shows them: a mount of all volumes, and calls on the control socket.

It is apart from the driver, which answers gRPC: whatever becomes of the driver, no workload notices.  Beside what every
store answers, it answers the calls of :class:`VolumeCalls`.  If it is told to, it serves volumes to other machines too
(:mod:`space._node.csi_servers`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import attrs

from space._errors import SpaceError, UsageError
from space._node import views
from space._node.caller import Caller, Document, Terms
from space._node.calls import StoreTarget
from space._node.csi_files import VolumeFiles
from space._node.csi_servers import Listening, Servers
from space._node.csi_volumes import TOP, VOLUMES, VolumeTree
from space._node.store import Store
from space.projections.csi.model import Published, Wanted
from space.projections.feed import Progress

VIEW: Final = "csi"
SOURCE: Final = "space:/csi/volumes"
"""How the mount of all volumes is named in mountinfo."""


log: Final = logging.getLogger("space.csi")


class VolumeCalls:
    """What the driver asks, as plain data: each public method is one call, named ``csi_`` and its name."""

    def __init__(self, volumes: VolumeTree, room: Callable[[], int], mount: str) -> None:
        self._volumes = volumes
        self._room = room
        self._mount = mount
        # not its id: in a container of its own each has the same
        self._incarnation = os.urandom(8).hex()

    def about(self) -> Document:
        """The process, which start of it this is, and where it shows the volumes."""
        return {"pid": os.getpid(), "incarnation": self._incarnation, "mount": self._mount}

    def create(self, *, wanted: Document) -> Document:
        """See :meth:`VolumeTree.create`."""
        try:
            asked = Wanted(**wanted)
        except TypeError:
            raise UsageError("not a volume to be made", hint="is the driver older or newer?") from None
        return attrs.asdict(self._volumes.create(asked))

    def delete(self, *, volume: str) -> None:
        """See :meth:`VolumeTree.delete`."""
        self._volumes.delete(volume)

    def volume(self, *, volume: str) -> Document:
        """See :meth:`VolumeTree.volume`."""
        return attrs.asdict(self._volumes.volume(volume))

    def volumes(self, *, after: str, limit: int) -> list[Document]:
        """See :meth:`VolumeTree.volumes`."""
        return [attrs.asdict(each) for each in self._volumes.volumes(after, limit)]

    def publish(self, *, volume: str, node: str, readonly: bool, mode: int) -> Document:
        """See :meth:`VolumeTree.publish`; empty where nothing is to be told."""
        reach = self._volumes.publish(volume, node, Published(readonly, mode))
        return attrs.asdict(reach) if reach else {}

    def unpublish(self, *, volume: str, node: str) -> None:
        """See :meth:`VolumeTree.unpublish`."""
        self._volumes.unpublish(volume, node)

    def expand(self, *, volume: str, capacity: int, limit: int) -> Document:
        """See :meth:`VolumeTree.expand`."""
        return attrs.asdict(self._volumes.expand(volume, capacity, limit))

    def modify(self, *, volume: str, mutable: Document) -> None:
        """See :meth:`VolumeTree.modify`."""
        self._volumes.modify(volume, mutable)

    def room(self) -> int:
        """Bytes there is room for on the disk of the log."""
        return self._room()

    def usage(self, *, volume: str) -> Document:
        """See :meth:`VolumeTree.usage`."""
        return self._volumes.usage(volume)

    def snapshot(self, *, volume: str, name: str) -> Document:
        """See :meth:`VolumeTree.snapshot`."""
        return attrs.asdict(self._volumes.snapshot(volume, name))

    def delete_snapshot(self, *, snapshot: str) -> None:
        """See :meth:`VolumeTree.delete_snapshot`."""
        self._volumes.delete_snapshot(snapshot)

    def find_snapshot(self, *, snapshot: str) -> Document:
        """See :meth:`VolumeTree.find_snapshot`."""
        return attrs.asdict(self._volumes.find_snapshot(snapshot))

    def snapshots(self, *, after: str, limit: int, volume: str) -> list[Document]:
        """See :meth:`VolumeTree.snapshots`."""
        return [attrs.asdict(each) for each in self._volumes.snapshots(after, limit, volume)]

    def snapshot_group(self, *, name: str, volumes: list[Any]) -> Document:
        """See :meth:`VolumeTree.snapshot_group`."""
        return self._volumes.snapshot_group(name, volumes)

    def group(self, *, group: str) -> Document:
        """See :meth:`VolumeTree.group`."""
        return self._volumes.group(group)

    def delete_group(self, *, group: str) -> None:
        """See :meth:`VolumeTree.delete_group`."""
        self._volumes.delete_group(group)

    def allocated(self, *, snapshot: str, offset: int) -> Document:
        """See :meth:`VolumeTree.allocated`."""
        return self._volumes.allocated(snapshot, offset)

    def changed(self, *, base: str, target: str, offset: int) -> Document:
        """See :meth:`VolumeTree.changed`."""
        return self._volumes.changed(base, target, offset)

    def register(self, *, node: str, zone: str, limit: int) -> None:
        """See :meth:`VolumeTree.register`."""
        self._volumes.register(node, zone, limit)


PREFIX: Final = "csi_"
_METHODS: Final = {
    PREFIX + name: method for name, method in vars(VolumeCalls).items() if callable(method) and name[0] != "_"
}


class VolumeTarget:
    """A store with volumes, as who carries out calls."""

    def __init__(self, store: Store, calls: VolumeCalls) -> None:
        self._store = StoreTarget(store)
        self._calls = calls

    @property
    def path(self) -> Path:
        return self._store.path

    def find(self, method: str) -> Callable[..., Any] | None:
        return _METHODS.get(method) or self._store.find(method)

    def call(self, method: str, arguments: Document, caller: Caller, terms: Terms) -> Any:
        found = _METHODS.get(method)
        if found is not None:
            return found(self._calls, **arguments)
        return self._store.call(method, arguments, caller, terms)


class _OverError(Exception):
    """A collection is given up, because the owner ends."""


@contextlib.contextmanager
def collecting(store: Store, seconds: float) -> Iterator[None]:
    """Gives back what deleted volumes and snapshots held, every so often while it is entered; 0 is never.

    Nobody writes while that goes on, which is as long as it takes to read the metadata of the log.
    """
    over = threading.Event()

    def told(_: Progress) -> None:
        if over.is_set():
            raise _OverError

    def work() -> None:
        while not over.wait(seconds):
            try:
                report = store.gc(on_progress=told)
                log.info(
                    "gave back %d bytes; %d capsules purged", report.bytes_given_back, report.capsules_purged
                )
            except SpaceError as error:
                log.warning("nothing was given back: %s", error)
            except _OverError:
                return

    thread = threading.Thread(target=work, name="space-csi-gc")
    if seconds:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if seconds:
            thread.join()


def serve(
    data: Path,
    target: str,
    store_of: Callable[[contextlib.ExitStack], Store],
    control: Callable[[VolumeTarget], contextlib.AbstractContextManager[object]],
    ready: Callable[[Document], None],
    *,
    where: Listening | None = None,
    collect_seconds: float = 0,
) -> None:
    """Opens the store, shows its volumes at ``target``, and answers until it is told to end.

    Raises:
        SpaceError: the store cannot be opened, or not mounted, or an address of ``where`` cannot be listened at.
    """
    from space.projections.fuse import mount as fuse

    fuse.check_available()
    with contextlib.ExitStack() as stack:
        store = store_of(stack)
        stack.enter_context(collecting(store, collect_seconds))
        path = os.path.realpath(target)
        home = VolumeTree(store).volumes_home
        files = VolumeFiles(store, home)
        servers = Servers(store, files, where or Listening())
        volumes = VolumeTree(store, cut=files.cut, accounts=files, network=servers)
        calls = VolumeCalls(volumes, lambda: _room(data), path)

        async def mounted(found: fuse.Ready) -> None:
            files.begun()
            async with servers.serving(volumes.published()):
                # The calls are answered only now: whoever gets an answer finds the mount, and the servers.
                announce(found)
                await asyncio.Event().wait()  # for the end: then this is cancelled

        def announce(found: fuse.Ready) -> None:
            stack.enter_context(control(VolumeTarget(store, calls)))
            view = {
                "view": VIEW,
                "name": f"{VIEW}-{os.getpid()}",
                "source": f"{TOP}/{VOLUMES}",
                "target": found.target,
                "address": found.target,
                "pid": os.getpid(),
                "started_ns": time.time_ns(),
            }
            stack.enter_context(views.registered(data, view))
            ready({**view, "notices": list(found.notices)})

        try:
            fuse.serve(files, path, fsname=SOURCE, allow_other=True, on_ready=mounted)
        finally:
            files.ended()


def _room(data: Path) -> int:
    found = os.statvfs(data)
    return found.f_bavail * found.f_frsize

"""Bytes and trees in and out: put, import, export.  Nothing is ever held whole.

A put streams into a capsule that has no name yet and links it at the end, so a name never shows half a
file and an interrupted put leaves nothing to be seen.  Writes go to the log as they come; one fdatasync at
the end makes all of it durable.  What is less than an extent is one command, and one position of the log.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import stat as statmod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

import attrs
from blake3 import blake3

from space._errors import (
    ConflictError,
    ErrorKind,
    NotFoundError,
    SpaceError,
    Status,
    StorageError,
    UsageError,
)
from space._node.reading import Reading, Stat, split_path
from space.events import commands as cmd
from space.events.commands import Buffer, Command, Durability, Receipt, Request
from space.events.ids import CapsuleId
from space.events.types import EXTENT_BYTES_MAX, Kind
from space.policy.model import Policy

if TYPE_CHECKING:
    from space._node.store import Store

WINDOW: Final = 4
"""Extents being encoded while earlier ones are logged: bounds the memory of a put of any size."""

BATCH_COMMANDS: Final = 512
BATCH_BYTES: Final = 8 << 20
SPARSE_BYTES_MIN: Final = 64 << 10

_KINDS: Final = {
    statmod.S_IFREG: Kind.FILE,
    statmod.S_IFDIR: Kind.DIRECTORY,
    statmod.S_IFLNK: Kind.SYMLINK,
    statmod.S_IFIFO: Kind.FIFO,
    statmod.S_IFSOCK: Kind.SOCKET,
    statmod.S_IFCHR: Kind.CHARACTER_DEVICE,
    statmod.S_IFBLK: Kind.BLOCK_DEVICE,
}
KIND_MODES: Final = {kind: mode for mode, kind in _KINDS.items()}


@attrs.frozen
class PutResult:
    """A stored capsule; ``digest`` is ``blake3:`` and the BLAKE3 of the content in hexadecimal."""

    id: CapsuleId
    position: int
    size: int
    stored_bytes: int
    digest: str


@attrs.define
class TransferResult:
    """What an import or export carried."""

    files: int = 0
    directories: int = 0
    others: int = 0
    bytes: int = 0
    position: int = 0


OnBytes = Callable[[int], None]
OnTree = Callable[[int, int], None]


def put(
    store: Store,
    source: Buffer | BinaryIO,
    *,
    name: str | bytes | None = None,
    id: CapsuleId | None = None,  # noqa: A002 - the public word
    policy: Policy | None = None,
    on_progress: OnBytes | None = None,
) -> PutResult:
    """Stores the bytes of ``source`` as a new capsule; with ``name``, at that path, making missing parents.

    Raises:
        ConflictError: the name or id exists already.
        SpaceError: the name is unusable, or the disk refuses; then no name leads to the capsule.
    """
    parent, last = (None, b"") if name is None else _place(store, name)
    stream: BinaryIO = source if hasattr(source, "read") else io.BytesIO(source)  # type: ignore[assignment]
    effective = policy or (store.policy(parent) if parent is not None else None)
    create = store.create_command(Kind.FILE, id=id, parent=parent, policy=policy)
    if parent is not None and policy is None and effective is not None:
        from space._node.store import pack_policy
        from space.policy.model import DEFAULT_POLICY

        if effective != DEFAULT_POLICY:
            create = attrs.evolve(create, policy=pack_policy(effective))
    create = attrs.evolve(create, parent=b"", name=b"")
    capsule = CapsuleId(create.capsule)
    pieces = _pieces(stream)
    first = next(pieces, b"")
    link = None if parent is None else cmd.Link(capsule, parent, last)
    if len(first) < EXTENT_BYTES_MAX and (put := _put_at_once(store, create, first, link, effective)):
        if on_progress is not None and first:
            on_progress(len(first))
        return put
    receipt = store.execute(create, durability=Durability.BUFFERED)
    try:
        size, digest = _stream_in(
            store, capsule, itertools.chain([first] if first else [], pieces), on_progress
        )
        if link is not None:
            receipt = store.execute(link, durability=Durability.BUFFERED)
        if store.policy(capsule).durability.value == Durability.DURABLE.value:
            store.sync()
    except BaseException:
        with contextlib.suppress(SpaceError):
            store.execute(cmd.DeleteCapsule(capsule), durability=Durability.BUFFERED)
        raise
    stat = store.stat(capsule)
    return PutResult(capsule, max(receipt.position, stat.change), size, stat.stored, f"blake3:{digest}")


def _put_at_once(
    store: Store, create: cmd.CreateCapsule, content: bytes, link: cmd.Link | None, policy: Policy | None
) -> PutResult | None:
    """A capsule of at most one extent, as one position of the log: all of it or nothing.

    None if that is refused, as nothing has happened then; or if content is encrypted, with a key that is not there yet.
    """
    if create.key is not None:
        return None
    from space.policy.model import DEFAULT_POLICY

    capsule, policy = CapsuleId(create.capsule), policy or DEFAULT_POLICY
    writes = store.encode_extents(capsule, 0, content, policy, 0) if content else []
    together = cmd.Together([create, *writes, *([] if link is None else [link])])
    try:
        receipt = store.execute(together, durability=Durability.BUFFERED)
    except SpaceError as error:
        if error.kind in {ErrorKind.UNAVAILABLE, ErrorKind.FAILED}:
            raise
        return None
    if policy.durability.value == Durability.DURABLE.value:
        store.sync()
    stat = store.stat(capsule)
    digest = f"blake3:{blake3(content).hexdigest()}"
    return PutResult(capsule, max(receipt.position, stat.change), len(content), stat.stored, digest)


def _place(store: Store, name: str | bytes) -> tuple[CapsuleId, bytes]:
    """Parent directory (made if missing) and last name of a path that must be free."""
    names = split_path(name)
    if isinstance(name, str) and not name.startswith("/"):
        raise UsageError(f"not a path: {name!r}", hint="a path begins with /")
    if not names or names[-1] == b"..":
        raise UsageError(f"not a name for a capsule: {name!r}")
    check_names(names)
    parent = make_directories(store, names[:-1])
    try:
        store.lookup(parent, names[-1])
    except NotFoundError:
        return parent, names[-1]
    raise ConflictError(f"exists already: {os.fsdecode(name)}")


def check_names(names: list[bytes]) -> None:
    """Refuses a path that no directory could hold, before anything is made for it.

    Raises:
        UsageError: a name is too long, not UTF-8, or ``..``.
    """
    from space._errors import rejection
    from space.statemachine.decide import check_name

    for each in names:
        if refused := check_name(each):
            raise rejection(refused.status, refused.message)


def put_again(
    store: Store,
    source: BinaryIO,
    capsule: CapsuleId,
    *,
    name: str | bytes | None = None,
    on_progress: OnBytes | None = None,
) -> PutResult:
    """Stores the same bytes once more in the capsule of an attempt that was cut off, and names it.

    Whatever of it is there already is written over with the same.

    Raises:
        ConflictError: the name is taken, by this capsule too.
        SpaceError: as for :func:`put`; the capsule stays as far as it is.
    """
    size, digest = _stream_in(store, capsule, _pieces(source), on_progress)
    if store.stat(capsule).size > size:
        store.resize(capsule, size)
    if name is not None:
        parent, last = _place(store, name)
        store.execute(cmd.Link(capsule, parent, last), durability=Durability.BUFFERED)
    store.sync()
    stat = store.stat(capsule)
    return PutResult(capsule, stat.change, stat.size, stat.stored, f"blake3:{digest}")


def put_result(store: Store, capsule: CapsuleId) -> PutResult:
    """The result of a put that is over: its digest is computed from what is stored."""
    hasher = blake3()
    for piece in store.stream(capsule, 0, None):
        hasher.update(piece)
    stat = store.stat(capsule)
    return PutResult(capsule, stat.change, stat.size, stat.stored, f"blake3:{hasher.hexdigest()}")


def make_directories(store: Store, names: list[bytes]) -> CapsuleId:
    """The directory at a path, made with all its parents where missing.

    Raises:
        ConflictError: something on the way is not a directory.
    """
    check_names([name for name in names if name != b".."])
    at = store.root
    for depth, name in enumerate(names):
        try:
            at = store.resolve(b"/" + b"/".join(names[: depth + 1]))
        except SpaceError as error:
            if error.status is not Status.NOT_FOUND:
                raise
            at = store.create(Kind.DIRECTORY, parent=at, name=name, durability=Durability.BUFFERED)
    if store.stat(at).kind != Kind.DIRECTORY:
        raise ConflictError(
            f"not a directory: /{b'/'.join(names).decode(errors='replace')}", status=Status.NOT_DIRECTORY
        )
    return at


def _stream_in(
    store: Store, capsule: CapsuleId, pieces: Iterable[bytes], on_progress: OnBytes | None
) -> tuple[int, str]:
    stat = store.stat(capsule)
    policy = store.policy(capsule)
    hasher = blake3()
    pending: deque[Future[list[Command]]] = deque()
    writing: deque[Future[list[Receipt | SpaceError]]] = deque()
    size = 0

    def log_oldest() -> None:
        commands = pending.popleft().result()
        writing.append(store.begin([Request(command, store.actor) for command in commands]))
        while len(writing) > WINDOW:
            _last_position(store.wait(writing.popleft()))

    with ThreadPoolExecutor(1, "space-put") as pool:
        for piece in pieces:
            hasher.update(piece)
            pending.append(pool.submit(store.encode_extents, capsule, size, piece, policy, stat.key))
            size += len(piece)
            if len(pending) >= WINDOW:
                log_oldest()
            if on_progress is not None:
                on_progress(size)
        while pending:
            log_oldest()
    for future in writing:
        _last_position(store.wait(future))
    return size, hasher.hexdigest()


def _pieces(stream: BinaryIO) -> Iterator[bytes]:
    """Whole extents, however short the stream's reads are."""
    while True:
        try:
            piece = stream.read(EXTENT_BYTES_MAX)
            while (
                piece
                and len(piece) < EXTENT_BYTES_MAX
                and (more := stream.read(EXTENT_BYTES_MAX - len(piece)))
            ):
                piece += more
        except OSError as error:
            raise StorageError(f"cannot read the source: {error.strerror or error}") from None
        if not piece:
            return
        yield piece


def run(store: Store, commands: list[Command], durability: Durability = Durability.BUFFERED) -> int:
    """Carries out commands in order and returns the last position; raises the first that was refused."""
    return _last_position(
        store.execute_all([Request(command, store.actor) for command in commands], durability=durability)
    )


def _last_position(outcomes: list[Receipt | SpaceError]) -> int:
    position = 0
    for outcome in outcomes:
        if isinstance(outcome, SpaceError):
            raise outcome
        if isinstance(outcome, Receipt):
            position = outcome.position
    return position


# --- trees ---------------------------------------------------------------------------------------


def import_tree(
    store: Store,
    source: str | Path,
    path: str = "/",
    *,
    policy: Policy | None = None,
    on_progress: OnTree | None = None,
) -> TransferResult:
    """Copies a directory tree of this machine into the store: modes, owners, times, links, xattrs, holes.

    Directories that exist already are merged into; a file that exists already ends the import.

    Raises:
        UsageError: the source is not a directory.
        ConflictError: a name is taken by something else; what was imported before it stays.
        StorageError: the source cannot be read.
    """
    root = os.fsencode(source)
    if not os.path.isdir(root):
        raise UsageError(f"not a directory: {os.fsdecode(root)}", status=Status.NOT_DIRECTORY)
    target = make_directories(store, split_path(path))
    if policy is not None:
        from space._node.store import pack_policy

        store.execute(cmd.SetPolicy(target, pack_policy(policy)), durability=Durability.BUFFERED)
    importer = _Importer(store, on_progress)
    try:
        importer.directory(root, target, store.stat(target).entries > 0)
        importer.finish()
    except OSError as error:
        raise StorageError(f"cannot read {error.filename!r}: {error.strerror}") from None
    store.sync()
    importer.result.position = store.position
    return importer.result


class _Importer:
    def __init__(self, store: Store, on_progress: OnTree | None) -> None:
        self.store = store
        self.result = TransferResult()
        self._on_progress = on_progress
        self._commands: list[Command] = []
        self._bytes = 0
        self._links: dict[tuple[int, int], CapsuleId] = {}
        self._late: list[Command] = []  # directory times, which later entries would change again

    def directory(self, source: bytes, target: CapsuleId, merging: bool) -> None:
        todo = [(source, target, merging)]
        while todo:
            here, into, merge = todo.pop()
            policy = self.store.policy(into) if merge or here == source else self._policy
            self._policy: Policy = policy
            with os.scandir(here) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
            for entry in entries:
                info = entry.stat(follow_symlinks=False)
                check_names([entry.name])
                if statmod.S_ISDIR(info.st_mode):
                    todo.append(self._subdirectory(entry, info, into, merge))
                else:
                    self._leaf(entry, info, into)
            self._attributes(here, os.stat(here), into, late=True)

    def _subdirectory(
        self, entry: os.DirEntry[bytes], info: os.stat_result, parent: CapsuleId, merging: bool
    ) -> tuple[bytes, CapsuleId, bool]:
        if merging:
            with contextlib.suppress(SpaceError):
                found = self.store.lookup_stat(parent, entry.name)
                if found.kind == Kind.DIRECTORY:
                    return entry.path, found.id, True
        capsule = self._create(Kind.DIRECTORY, info, parent, entry.name)
        self.result.directories += 1
        return entry.path, capsule, False

    def _create(
        self, kind: Kind, info: os.stat_result, parent: CapsuleId, name: bytes, target: bytes = b""
    ) -> CapsuleId:
        key = self.store.new_key(self._policy) if kind == Kind.FILE else None
        device = info.st_rdev if kind in (Kind.CHARACTER_DEVICE, Kind.BLOCK_DEVICE) else 0
        capsule = self.store.new_id()
        self._add(
            cmd.CreateCapsule(
                capsule,
                kind,
                statmod.S_IMODE(info.st_mode),
                info.st_uid,
                info.st_gid,
                parent,
                name,
                device,
                target=target,
                key=key,
            )
        )
        self._key = key.key if key else 0
        return capsule

    def _leaf(self, entry: os.DirEntry[bytes], info: os.stat_result, parent: CapsuleId) -> None:
        seen = self._links.get((info.st_dev, info.st_ino)) if info.st_nlink > 1 else None
        if seen is not None:
            self._add(cmd.Link(seen, parent, entry.name))
            return
        kind = _KINDS[statmod.S_IFMT(info.st_mode)]
        target = os.readlink(entry.path) if kind == Kind.SYMLINK else b""
        capsule = self._create(kind, info, parent, entry.name, target)
        if info.st_nlink > 1:
            self._links[info.st_dev, info.st_ino] = capsule
        if kind == Kind.FILE:
            self._content(entry.path, info, capsule)
            self.result.files += 1
        else:
            self.result.others += 1
        self._attributes(entry.path, info, capsule)
        if self._on_progress is not None:
            self._on_progress(self.result.files, self.result.bytes)

    def _content(self, path: bytes, info: os.stat_result, capsule: CapsuleId) -> None:
        with open(path, "rb", buffering=0) as file:
            end = 0
            for start, stop in _data_ranges(file.fileno(), info):
                file.seek(start)
                end = start
                # An empty read: it shrank while it was read.
                while end < stop and (data := file.read(min(EXTENT_BYTES_MAX, stop - end))):
                    for command in self.store.encode_extents(capsule, end, data, self._policy, self._key):
                        self._add(command, len(data))
                    end += len(data)
                    self.result.bytes += len(data)
            if info.st_size > end:
                self._add(cmd.Resize(capsule, info.st_size))

    def _attributes(
        self, path: bytes, info: os.stat_result, capsule: CapsuleId, *, late: bool = False
    ) -> None:
        command = cmd.SetAttributes(capsule, atime=info.st_atime_ns, mtime=info.st_mtime_ns)
        if late:
            mode = statmod.S_IMODE(info.st_mode)
            command = attrs.evolve(command, mode=mode, uid=info.st_uid, gid=info.st_gid)
        for name in _xattr_names(path):
            value = os.getxattr(path, name, follow_symlinks=False)
            self._add(cmd.SetXattr(capsule, os.fsencode(name), value))
        if late:
            self._late.append(command)
        else:
            self._add(command)

    def _add(self, command: Command, size: int = 0) -> None:
        self._commands.append(command)
        self._bytes += size
        if len(self._commands) >= BATCH_COMMANDS or self._bytes >= BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        commands, self._commands, self._bytes = self._commands, [], 0
        run(self.store, commands)

    def finish(self) -> None:
        for command in reversed(self._late):
            self._add(command)
        self._flush()


def _xattr_names(path: bytes) -> list[str]:
    try:
        return os.listxattr(path, follow_symlinks=False)
    except OSError:
        return []  # a file system without them


def _data_ranges(descriptor: int, info: os.stat_result) -> Iterator[tuple[int, int]]:
    """The parts of a file that are not holes."""
    if info.st_size < SPARSE_BYTES_MIN or info.st_blocks * 512 >= info.st_size:
        yield 0, info.st_size
        return
    at = 0
    while at < info.st_size:
        try:
            start = os.lseek(descriptor, at, os.SEEK_DATA)
            at = os.lseek(descriptor, start, os.SEEK_HOLE)
        except OSError:
            return  # nothing but a hole to the end
        yield start, at


def export_tree(
    reading: Reading, path: str, target: str | Path, *, on_progress: OnTree | None = None
) -> TransferResult:
    """Writes a tree of the store into a directory of this machine, which must be missing or empty.

    Raises:
        NotFoundError: no such path.
        ConflictError: the target holds something already.
        StorageError: the target cannot be written.
        CorruptionError: stored bytes are damaged; nothing is written in their place.
    """
    capsule = reading.resolve(path)
    root = os.fsencode(target)
    try:
        if os.path.lexists(root) and not (os.path.isdir(root) and not os.listdir(root)):
            raise ConflictError(f"not empty: {os.fsdecode(root)}", hint="export into a new directory")
        exporter = _Exporter(reading, on_progress)
        exporter.tree(capsule, root)
    except OSError as error:
        raise StorageError(f"cannot write {error.filename!r}: {error.strerror}") from None
    exporter.result.position = reading.position
    return exporter.result


class _Exporter:
    def __init__(self, reading: Reading, on_progress: OnTree | None) -> None:
        self._reading = reading
        self._on_progress = on_progress
        self._links: dict[CapsuleId, bytes] = {}
        self._owner = os.geteuid() == 0
        self.result = TransferResult()

    def tree(self, capsule: CapsuleId, root: bytes) -> None:
        directories = []
        for relative, stat in self._reading.walk(capsule):
            path = root + b"/" + relative if relative else root
            if stat.kind == Kind.DIRECTORY:
                os.makedirs(path, mode=0o700, exist_ok=True)
                directories.append((path, stat))
                self.result.directories += 1
            else:
                self._leaf(path, stat)
        for path, stat in reversed(directories):
            self._attributes(path, stat)

    def _leaf(self, path: bytes, stat: Stat) -> None:
        first = self._links.get(stat.id) if stat.nlink > 1 else None
        if first is not None:
            os.link(first, path, follow_symlinks=False)
            return
        if stat.nlink > 1:
            self._links[stat.id] = path
        if stat.kind == Kind.FILE:
            self._file(path, stat)
            self.result.files += 1
        else:
            if stat.kind == Kind.SYMLINK:
                os.symlink(stat.target, path)
            else:
                os.mknod(path, KIND_MODES[stat.kind] | 0o600, stat.rdev)
            self.result.others += 1
        self._attributes(path, stat)
        if self._on_progress is not None:
            self._on_progress(self.result.files, self.result.bytes)

    def _file(self, path: bytes, stat: Stat) -> None:
        with open(path, "xb", buffering=0) as file:
            for start, end in self._reading.data_ranges(stat.id):
                file.seek(start)
                for piece in self._reading.stream(stat.id, start, end - start):
                    _write_all(file, piece)
                    self.result.bytes += len(piece)
            file.truncate(stat.size)

    def _attributes(self, path: bytes, stat: Stat) -> None:
        if self._owner:
            os.chown(path, stat.uid, stat.gid, follow_symlinks=False)
        for name, value in self._reading.xattrs(stat.id).items():
            with contextlib.suppress(
                OSError
            ):  # a target file system without them keeps the bytes all the same
                os.setxattr(path, name, value, follow_symlinks=False)
        if stat.kind != Kind.SYMLINK:
            os.chmod(path, stat.mode)
        os.utime(path, ns=(stat.atime, stat.mtime), follow_symlinks=False)


def _write_all(file: io.RawIOBase | BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) or 0 :]

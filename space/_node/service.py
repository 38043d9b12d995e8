"""Every operation a program outside can ask of a store: plain data in, plain data out.

The command line uses a :class:`Service` on the store it opened itself; :mod:`space.control` carries the same
calls over a socket to the process that owns the store.  So arguments and results are what msgpack and JSON
can carry, file bytes travel as open file descriptors, and whatever takes long asks its :class:`Caller`
now and then whether anybody still waits for it.

The public methods of :class:`Service` are the whole of what can be asked for; generators are streams.
"""

from __future__ import annotations

import os
import stat as statmod
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, BinaryIO, Final, cast

import attrs

from space._errors import ConflictError, NotFoundError, SpaceError, Status, StorageError, UsageError
from space._node import maintenance, transfer
from space._node.caller import CHUNK_BYTES, Caller, Document, Terms
from space._node.federation_calls import FederationCalls
from space._node.keys_calls import KeyCalls
from space._node.policy_calls import PolicyCalls
from space._node.reading import split_path
from space.events.codec import decode_batch
from space.events.commands import Receipt
from space.events.ids import NIL, AtPosition, CapsuleId, format_time, parse_moment
from space.events.types import Kind

if TYPE_CHECKING:
    from space._node.reading import Reading, Stat
    from space._node.store import Store
    from space.policy.model import Policy

PAGE: Final = 1024
FOLLOW_SECONDS: Final = 0.1
_ZEROS: Final = bytes(CHUNK_BYTES)


@attrs.frozen
class _Done:
    """What came of a command: where it is in the log, and the capsule it made, if it made one."""

    position: int
    capsule: CapsuleId

    def document(self) -> Document:
        return {"id": str(self.capsule), "position": self.position}


class Service(FederationCalls, PolicyCalls, KeyCalls):
    """The operations on one store, for one caller."""

    def __init__(self, store: Store, caller: Caller, terms: Terms = Terms()) -> None:  # noqa: B008 - frozen
        self.store = store
        self._caller = caller
        self._terms = terms

    # --- calls that are repeated -------------------------------------------------------------------

    def _once(self, work: Callable[[], Receipt | CapsuleId]) -> _Done:
        """Carries out a call's one command, once however often the call is repeated."""
        if not self._terms.client:
            found = work()
        else:
            if (done := self._answered()) is not None:
                return done
            with self.store.signed(self._terms.client, self._terms.sequence):
                found = work()
            if (done := self._answered()) is not None:
                return done  # of the first attempt, if that one came to its end meanwhile
        if isinstance(found, Receipt):
            return _Done(found.position, CapsuleId(NIL))
        return _Done(self.store.position, found)

    def _answered(self) -> _Done | None:
        """What came of this call before; the log knows which capsule it made."""
        client, sequence = self._terms.client, self._terms.sequence
        position = self.store.answered(client, sequence) if client else None
        if position is None:
            return None
        for entry in decode_batch(self.store.wal.read(position).metadata):
            if (entry.client, entry.sequence) == (client, sequence):
                return _Done(position, CapsuleId(entry.events[0][1].capsule))
        raise AssertionError(f"no entry at {position}")

    @contextmanager
    def _reading(self, at: str | None) -> Iterator[Reading]:
        """The present, or a past moment for as long as it is looked at."""
        if at is None:
            yield self.store
        else:
            with self.store.at(at) as past:
                yield past

    # --- bytes in and out ------------------------------------------------------------------------

    def put(
        self,
        *,
        descriptor: int,
        name: str | None = None,
        id: str | None = None,  # noqa: A002 - the public word
        policy: Document | None = None,
        earlier: str = "",
    ) -> Document:
        """Stores what ``descriptor`` yields until its end as a new capsule.

        ``earlier`` are the ids of attempts at the same put whose outcome the caller did not learn: one that
        has the name is the answer; the others are taken away, unless ``id`` says to go on with it.
        """
        before = [CapsuleId.parse(each) for each in earlier.split()]
        try:
            done = self._done_before(name, before)
            result = done or self._put(
                descriptor, name, None if id is None else CapsuleId.parse(id), policy, before
            )
        except ConflictError:
            done = self._done_before(name, before)  # an attempt came to its end meanwhile
            if done is None:
                raise
            result = done
        for each in before:
            if each != result.id:
                self._take_away(each)
        return {**attrs.asdict(result), "id": str(result.id)}

    def _put(
        self,
        descriptor: int,
        name: str | None,
        id: CapsuleId | None,  # noqa: A002 - the public word
        policy: Document | None,
        before: list[CapsuleId],
    ) -> transfer.PutResult:
        source = cast("BinaryIO", _Source(descriptor, self._caller))

        def told(size: int) -> None:
            self._caller.progress({"bytes": size})

        if id is not None and id in before and self._exists(id):
            return transfer.put_again(self.store, source, id, name=name, on_progress=told)
        return self.store.put(source, name=name, id=id, policy=_policy(policy), on_progress=told)

    def _done_before(self, name: str | None, before: list[CapsuleId]) -> transfer.PutResult | None:
        """The result of an earlier attempt that has the name."""
        if name is None or not before:
            return None
        try:
            found = self.store.resolve(name, follow=False)
        except NotFoundError:
            return None
        return transfer.put_result(self.store, found) if found in before else None

    def _exists(self, capsule: CapsuleId) -> bool:
        try:
            self.store.stat(capsule)
        except NotFoundError:
            return False
        return True

    def _take_away(self, attempt: CapsuleId) -> None:
        with suppress(SpaceError):
            if not self.store.paths_of(attempt):
                self.store.rm(attempt)

    def get(
        self,
        *,
        capsule: str,
        descriptor: int,
        offset: int = 0,
        length: int | None = None,
        at: str | None = None,
        replace: bool = False,
    ) -> Document:
        """Writes the bytes of a capsule to ``descriptor``; with ``replace``, to a file, instead of its own."""
        _check_range(offset, length)
        size = 0
        with self._reading(at) as reading:
            found = reading.resolve(capsule)
            if reading.stat(found).kind == Kind.DIRECTORY:
                raise ConflictError(
                    f"a directory: {capsule}",
                    status=Status.IS_DIRECTORY,
                    hint="space export takes directories",
                )
            sink = Sink(descriptor, self._caller, replace=replace)
            for piece in reading.stream(found, offset, length):
                sink.write(piece)
                size += len(piece)
                self._caller.progress({"bytes": size})
            sink.finish()
            return {"id": str(found), "size": size, "position": reading.position}

    def import_tree(self, *, source: str, path: str = "/", policy: Document | None = None) -> Document:
        """Copies the directory tree at the absolute path ``source`` into the store."""
        found = _policy(policy)
        return attrs.asdict(
            transfer.import_tree(self.store, source, path, policy=found, on_progress=self._tree_progress)
        )

    def export_tree(self, *, path: str, target: str, at: str | None = None) -> Document:
        """Writes a tree of the store below the absolute path ``target``."""
        with self._reading(at) as reading:
            return attrs.asdict(transfer.export_tree(reading, path, target, on_progress=self._tree_progress))

    def _tree_progress(self, files: int, size: int) -> None:
        self._caller.progress({"files": files, "bytes": size})

    # --- names -----------------------------------------------------------------------------------

    def create(
        self,
        *,
        size: int = 0,
        block_size: int = 0,
        name: str | None = None,
        id: str | None = None,  # noqa: A002 - the public word
        policy: Document | None = None,
    ) -> Document:
        """Makes an empty capsule of ``size`` bytes that all read as zeros."""
        parent, last = (None, b"") if name is None else self._place(name)
        made = self._once(
            lambda: self.store.create(
                Kind.FILE,
                parent=parent,
                name=last,
                id=None if id is None else CapsuleId.parse(id),
                size=size,
                block_size=block_size,
                policy=_policy(policy),
            )
        )
        stat = self.store.stat(made.capsule)
        return {
            "id": str(made.capsule),
            "size": stat.size,
            "block_size": stat.block_size,
            "position": stat.change,
        }

    def _place(self, name: str) -> tuple[CapsuleId, bytes]:
        names = split_path(name)
        if not name.startswith("/") or not names:
            raise UsageError(f"not a path: {name!r}", hint="a path begins with /")
        transfer.check_names(names)
        return transfer.make_directories(self.store, names[:-1]), names[-1]

    def resize(self, *, capsule: str, size: int) -> Document:
        """Sets the size of a capsule."""
        return {"position": self._once(lambda: self.store.resize(capsule, size)).position}

    def mkdir(self, *, path: str, parents: bool = False) -> Document:
        """Makes a directory."""
        if parents:  # as many commands as directories, and none of them matters twice
            return {"id": str(self.store.mkdir(path, parents=True)), "position": self.store.position}
        return self._once(lambda: self.store.mkdir(path)).document()

    def rm(self, *, capsule: str, recursive: bool = False) -> Document:
        """Removes a path, or a capsule with all its names."""
        if not capsule.startswith("/") and self._answered() is None:
            for path in self.store.paths_of(self.store.resolve(capsule))[1:]:
                self.store.rm(path, recursive=recursive)
        return {"position": self._once(lambda: self.store.rm(capsule, recursive=recursive)).position}

    def mv(self, *, source: str, target: str) -> Document:
        """Renames a path."""
        return {"position": self._once(lambda: self.store.mv(source, target)).position}

    def ls(self, *, path: str = "/", recursive: bool = False, at: str | None = None) -> Iterator[Document]:
        """What a directory holds, in byte order; a file lists itself."""
        with self._reading(at) as reading:
            top = reading.stat(reading.resolve(path))
            base = _written(path) if path.startswith("/") else _first_path(reading, top.id)
            if top.kind != Kind.DIRECTORY:
                yield _entry_document(base, top)
            elif recursive:
                for relative, stat in reading.walk(top.id):
                    if relative:
                        yield _entry_document(base + b"/" + relative, stat)
            else:
                yield from _listing(reading, top.id, base)

    def unnamed(self, *, at: str | None = None) -> Iterator[Document]:
        """Capsules no path leads to: what put makes without a name."""
        with self._reading(at) as reading:
            for stat in reading.unnamed():
                yield _entry_document(b"", stat)

    def stat(self, *, capsule: str, at: str | None = None) -> Document:
        """Everything known about a capsule but its bytes."""
        with self._reading(at) as reading:
            stat = reading.stat(reading.resolve(capsule, follow=False))
            document = _stat_document(stat)
            document["paths"] = [shown(path) for path in reading.paths_of(stat.id)]
            document["policy"] = reading.policy(stat.id).to_document()
            document["xattrs"] = {shown(key): shown(value) for key, value in reading.xattrs(stat.id).items()}
            document["position"] = reading.position
            return document

    # --- moments ---------------------------------------------------------------------------------

    def snapshot(self, *, capsule: str, name: str) -> Document:
        """Names the present moment of a capsule or tree."""
        return {"name": name, "position": self._once(lambda: self.store.snapshot(capsule, name)).position}

    def snapshots(self) -> Iterator[Document]:
        """All snapshots, by name."""
        for each in self.store.snapshots():
            yield {
                "name": shown(each.name.encode()),
                "id": str(each.id),
                "moment": str(AtPosition(each.position, each.event)),
                "position": each.position,
                "event": each.event,
                **_time("time", each.time_ns),
            }

    def drop_snapshot(self, *, name: str) -> Document:
        """Forgets the name of a moment."""
        return {"name": name, "position": self._once(lambda: self.store.drop_snapshot(name)).position}

    def clone(self, *, source: str, target: str, at: str | None = None) -> Document:
        """Copies a file or tree at a moment, sharing every stored byte."""
        return self._once(lambda: self.store.clone(source, target, at=at)).document()

    def undelete(self, *, capsule: str, to: str | None = None) -> Document:
        """Brings a deleted capsule back."""
        return self._once(lambda: self.store.undelete(capsule, to)).document()

    def deleted(self) -> Iterator[Document]:
        """What :meth:`undelete` can bring back."""
        for each in self.store.deleted():
            parents = self.store.paths_of(each.parent) if each.parent is not None else []
            path = parents[0].rstrip(b"/") + b"/" + each.name if parents else each.name
            stat = self.store.stat(each.id)
            yield {
                "id": str(each.id),
                "path": shown(path),
                "kind": stat.kind.name.lower(),
                "size": stat.size,
                "position": each.position,
                **_time("time", self.store.wal.time_ns(each.position)),
            }

    def digest(self, *, at: str | None = None) -> Document:
        """Position and state digest."""
        with self._reading(at) as reading:
            position, digest = reading.digest()
            return {"position": position, "digest": digest}

    # --- the log and upkeep ----------------------------------------------------------------------

    def log(
        self,
        *,
        capsule: str | None = None,
        start: str | None = None,
        stop: str | None = None,
        follow: bool = False,
    ) -> Iterator[Document]:
        """Events, oldest first, of batches ``start`` to ``stop`` (positions or moments)."""
        about = None if capsule is None else self._ever(capsule)
        at = 1 if start is None else self._batch(start, after=True)
        last = None if stop is None else self._batch(stop, after=False)
        while True:
            end = self.store.last if last is None else min(last, self.store.last)
            for event in maintenance.log_events(self.store, capsule=about, start=at, stop=end):
                yield event.to_json()
            at = max(at, end + 1)
            if not follow or (last is not None and at > last):
                return
            self._caller.idle(FOLLOW_SECONDS)

    def _ever(self, capsule: str) -> CapsuleId:
        """The id of a capsule that exists, was deleted, or was forgotten since: the log knows them all."""
        if not capsule.startswith("/"):
            return CapsuleId.parse(capsule)
        try:
            return self.store.resolve(capsule, follow=False)
        except NotFoundError:
            found = [each for each in self.deleted() if each["path"] == capsule]
            if not found:
                raise
            return CapsuleId.parse(found[-1]["id"])

    def _batch(self, text: str, *, after: bool) -> int:
        """The batch a position or moment means: for a time, the first after it or the last not later."""
        if text.isascii() and text.isdecimal() and len(text) < 20:
            return int(text)
        moment = parse_moment(text, now_ns=time.time_ns())
        if isinstance(moment, AtPosition):
            return moment.position
        return self.store.wal.index_at_time(moment.time_ns) + after

    def replay(self, *, view: str | None = None, to: str | None = None, verify: bool = False) -> Document:
        """Drops views and rebuilds them from the log."""
        return attrs.asdict(
            self.store.replay(view=view, to=to, verify=verify, on_progress=self._log_progress)
        )

    def _log_progress(self, progress: Any) -> None:
        done = {"events": progress.events, "position": progress.position, "last": self.store.last}
        self._caller.progress(done)

    def verify(self, *, repair: bool = False) -> Document:
        """Checks every checksum, chain link and reference."""
        return attrs.asdict(self.store.verify(repair=repair, on_progress=self._log_progress))

    def gc(self, *, dry_run: bool = False) -> Document:
        """Gives back what no kept moment can reach."""
        return attrs.asdict(self.store.gc(dry_run=dry_run, on_progress=self._log_progress))

    # --- policy and process ----------------------------------------------------------------------

    def policy(self, *, capsule: str) -> Document:
        """The policy a capsule follows, every key."""
        return self.store.policy(self.store.resolve(capsule)).to_document()

    def set_policy(self, *, capsule: str, policy: Document) -> Document:
        """Lets a capsule follow another policy from now on."""
        from space.policy.model import Policy

        wanted = Policy.from_document(policy)
        return {"position": self._once(lambda: self.store.set_policy(capsule, wanted)).position}

    def owner(self) -> Document:
        """The process that has the store open, and where the store is."""
        return {"pid": os.getpid(), "data": str(self.store.path.absolute()), "position": self.store.position}


# --- documents -----------------------------------------------------------------------------------


def shown(name: bytes) -> str:
    """Bytes as text; what is not UTF-8 as backslash escapes."""
    return name.decode(errors="backslashreplace")


def _policy(document: Document | None) -> Policy | None:
    from space.policy.model import Policy

    return None if document is None else Policy.from_document(document)


def _check_range(offset: int, length: int | None) -> None:
    if offset < 0 or (length is not None and length < 0):
        raise UsageError(f"not a range of bytes: offset {offset}, length {length}")


def _time(name: str, time_ns: int) -> Document:
    return {name: format_time(time_ns), f"{name}_ns": time_ns}


def _stat_document(stat: Stat) -> Document:
    document: Document = {
        "id": str(stat.id),
        "kind": stat.kind.name.lower(),
        "size": stat.size,
        "allocated": stat.allocated,
        "stored": stat.stored,
        "block_size": stat.block_size,
        "mode": stat.mode,
        "permissions": permissions(stat),
        "nlink": stat.nlink,
        "uid": stat.uid,
        "gid": stat.gid,
        "rdev": stat.rdev,
        "ino": stat.ino,
        "entries": stat.entries,
        "parent": str(stat.parent) if any(stat.parent) else None,
        "change": stat.change,
        "deleted": stat.deleted,
        "encrypted": bool(stat.key),
    }
    for name in ("atime", "mtime", "ctime", "btime"):
        document |= _time(name, getattr(stat, name))
    if stat.kind == Kind.SYMLINK:
        document["target"] = shown(stat.target)
    return document


def _entry_document(path: bytes, stat: Stat) -> Document:
    return {"name": shown(path.rpartition(b"/")[2]), "path": shown(path), **_stat_document(stat)}


def permissions(stat: Stat) -> str:
    """Kind and mode as ``ls -l`` shows them."""
    return statmod.filemode(transfer.KIND_MODES[stat.kind] | stat.mode)


def _listing(reading: Reading, directory: CapsuleId, base: bytes) -> Iterator[Document]:
    after = b""
    while page := reading.entries_stat(directory, after=after, limit=PAGE):
        for name, stat in page:
            yield _entry_document(base + b"/" + name, stat)
        after = page[-1][0]


def _written(path: str) -> bytes:
    """A path as its names, without what means nothing."""
    return b"".join(b"/" + name for name in split_path(path))


def _first_path(reading: Reading, capsule: CapsuleId) -> bytes:
    paths = reading.paths_of(capsule)
    return paths[0].rstrip(b"/") if paths else str(capsule).encode()


# --- descriptors ---------------------------------------------------------------------------------


class _Source:
    """Reads a borrowed descriptor, as long as somebody waits for the result."""

    def __init__(self, descriptor: int, caller: Caller) -> None:
        self._descriptor = descriptor
        self._caller = caller

    def read(self, size: int, /) -> bytes:
        piece = os.read(self._descriptor, min(size, self._caller.wait(self._descriptor, writing=False)))
        if not piece:
            self._caller.ended()
        return piece


class Sink:
    """Writes a borrowed descriptor as long as somebody waits for the result.

    With ``replace``, a regular file loses what it held when the first bytes come, and gets holes for zeros.
    """

    def __init__(self, descriptor: int, caller: Caller, *, replace: bool) -> None:
        self._descriptor = descriptor
        self._caller = caller
        self._replace = replace and statmod.S_ISREG(os.fstat(descriptor).st_mode)
        self._size = 0

    def write(self, data: bytes) -> None:
        try:
            if self._replace:
                self._caller.wait(self._descriptor, writing=True)
                if self._size == 0:
                    os.ftruncate(self._descriptor, 0)
            self._size += len(data)
            if self._replace and data == (_ZEROS if len(data) == len(_ZEROS) else _ZEROS[: len(data)]):
                os.lseek(self._descriptor, len(data), os.SEEK_CUR)
            else:
                self._write_all(memoryview(data))
        except BrokenPipeError:
            raise
        except OSError as error:
            raise StorageError(f"cannot write the output: {error.strerror or error}") from None

    def _write_all(self, view: memoryview) -> None:
        while view:
            room = self._caller.wait(self._descriptor, writing=True)
            view = view[os.write(self._descriptor, view[:room]) :]

    def finish(self) -> None:
        """Ends a file whose last part is a hole, or that is empty."""
        if self._replace:
            self._caller.wait(self._descriptor, writing=True)
            os.ftruncate(self._descriptor, self._size)


def methods() -> dict[str, Callable[..., Any]]:
    """What can be asked for: the public methods of :class:`Service`, by name."""
    found = {**vars(FederationCalls), **vars(PolicyCalls), **vars(KeyCalls), **vars(Service)}
    return {name: method for name, method in found.items() if callable(method) and name[0] != "_"}


__all__ = ["Caller", "Document", "Service", "methods", "permissions", "shown"]

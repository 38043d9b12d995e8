"""Mounting, serving and unmounting a file system: everything about FUSE that is not a request.

One process serves one mount (libfuse's Python binding keeps one session a process).  The end has a fixed
order: take no more requests, let those in flight finish, make everything durable, unmount, remove the
directory if it was made for the mount.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import attrs

from space._errors import (
    ConflictError,
    CorruptionError,
    ErrorKind,
    NotFoundError,
    RefusedError,
    SpaceError,
    Status,
    UnavailableError,
    UsageError,
)

if TYPE_CHECKING:
    from space.projections.vfs import FileSystem

SYNC_SECONDS: Final = 1.0
"""How often all that was acknowledged is made durable unasked: what a power failure can take."""

DEVICE: Final = "/dev/fuse"
REPORT_BYTES_MAX: Final = 1 << 16
DEAD_MOUNTS_MAX: Final = 16
"""Dead mounts cleared from one directory: each one mounted over another left one."""

log: Final = logging.getLogger("space.fuse")
Report = dict[str, Any]


@attrs.frozen
class Ready:
    """The mount answers, ``ready_ms`` after :func:`serve` was called; ``notices`` say what was done."""

    target: str
    ready_ms: float
    notices: tuple[str, ...] = ()


# --- what the machine has ----------------------------------------------------------------------------


def check_available() -> None:
    """Whether this machine can mount at all.

    Raises:
        UnavailableError: naming what is missing and how to get it.
    """
    if find_spec("pyfuse3") is None:
        raise UnavailableError(
            "the Python package pyfuse3 is not installed",
            hint="apt install fuse3 libfuse3-dev pkg-config gcc python3-dev; pip install 'space-store[fuse]'",
        )
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        raise UnavailableError(
            f"{DEVICE} is not there, or not for this user",
            hint="modprobe fuse; chmod 666 /dev/fuse; in a container: --device /dev/fuse",
        )
    if shutil.which("fusermount3") is None:
        raise UnavailableError("the program fusermount3 is not installed", hint="apt install fuse3")


def _load_pyfuse3() -> Any:
    """pyfuse3 on asyncio.

    Its first line asks for trio, whose import takes twice as long as all the rest and which is not used on
    asyncio: while that line runs, an empty module answers, and nobody else ever sees it.
    """
    trio = sys.modules.get("trio")
    sys.modules["trio"] = trio or types.ModuleType("trio")
    try:
        import pyfuse3
    finally:
        if trio is None:
            del sys.modules["trio"]
    import pyfuse3.asyncio

    device = _Device()
    shim = types.SimpleNamespace(**vars(pyfuse3.asyncio))
    shim.open_nursery = _nursery
    shim.lowlevel = types.SimpleNamespace(**vars(pyfuse3.asyncio))
    shim.lowlevel.wait_readable = device.wait_readable
    shim.lowlevel.notify_closing = device.notify_closing
    vars(pyfuse3)["trio"] = shim  # what pyfuse3.asyncio.enable() does, with a better way to wait
    return pyfuse3


def _nursery() -> Any:
    """pyfuse3's nursery, with workers that do not end when a request was taken back before it could be read.

    The kernel takes a waiting request back when who made it is killed; libfuse then reads again, from a device that
    has nothing and does not block: EAGAIN.  pyfuse3 lets it end the worker, which it goes on to count as one of the
    99 there may be: after as many a mount would answer nobody.
    """
    import pyfuse3.asyncio

    nursery: Any = pyfuse3.asyncio.open_nursery()
    start_soon = nursery.start_soon

    def lasting(
        worker: Callable[..., Coroutine[Any, Any, None]], *args: Any, name: str | None = None
    ) -> None:
        async def work() -> None:
            while True:
                with contextlib.suppress(BlockingIOError):
                    return await worker(*args)

        start_soon(work, name=name)

    nursery.start_soon = lasting
    return nursery


class _Device:
    """Waits for requests of the kernel.

    pyfuse3's own way adds a reader to the loop and takes it away for every request, and under load the reader
    is called once more in between, on a future that is done.  Here it stays while there is work to do.
    """

    def __init__(self) -> None:
        self._waiter: asyncio.Future[None] | None = None

    async def wait_readable(self, descriptor: int) -> None:
        loop = asyncio.get_running_loop()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        while True:
            self._waiter = waiter = loop.create_future()
            # In place of the reader before, which is thereby cancelled: no call of it can come late.
            loop.add_reader(descriptor, self._readable, loop, descriptor, waiter)
            await waiter
            if poll.poll(0):  # else it was taken back since: each time that is read in vain costs a buffer
                return

    def _readable(
        self, loop: asyncio.AbstractEventLoop, descriptor: int, waiter: asyncio.Future[None]
    ) -> None:
        if waiter.done():
            loop.remove_reader(descriptor)  # all are at work: the next to wait adds it again
        else:
            waiter.set_result(None)

    def notify_closing(self, descriptor: int) -> None:
        import pyfuse3.asyncio

        asyncio.get_running_loop().remove_reader(descriptor)
        if self._waiter and not self._waiter.done():
            self._waiter.set_exception(pyfuse3.asyncio.ClosedResourceError())


# --- the target directory ----------------------------------------------------------------------------


def mounted_at(target: str, mountinfo: str = "/proc/self/mountinfo") -> list[str]:
    """Types of the file systems mounted at a directory, in the order they were."""
    found = []
    with Path(mountinfo).open(encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            fields, _, rest = line.partition(" - ")
            if _unescaped(fields.split(" ")[4]) == target:
                found.append(rest.split(" ")[0])
    return found


def _unescaped(text: str) -> str:
    """A path as the kernel writes it in mountinfo: blanks, tabs, newlines and backslashes in octal."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text


def is_dead(target: str) -> bool:
    """Whether the directory is a mount whose server is gone ("Transport endpoint is not connected")."""
    try:
        os.statvfs(target)  # not stat, which the kernel may still answer from its cache
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def unmount(target: str) -> None:
    """Detaches what is mounted at a directory; open files on it go on working until they are closed.

    Raises:
        SpaceError: fusermount3 refuses.
    """
    done = subprocess.run(["fusermount3", "-u", "-z", target], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SpaceError(f"cannot unmount {target}: {done.stderr.strip()}")


def prepare_target(target: str) -> tuple[str, list[Path], list[str]]:
    """Makes a directory ready to be mounted on: its real path, directories made for it, and notices.

    A dead mount there is cleared away; a directory that is missing is made.

    Raises:
        ConflictError: something is mounted there, or it has something in it, or is no directory.
    """
    path = os.path.realpath(target)
    notices = []
    for _ in range(DEAD_MOUNTS_MAX):
        if not is_dead(path):
            break
        unmount(path)
        notices.append(f"replaced a dead mount at {path}")
    made = _make_directories(path)
    if made:
        notices.append(f"made the directory {path}")
    if types := mounted_at(path):
        raise ConflictError(
            f"{path} has a {types[-1]} mounted on it already", hint=f"unmount it: fusermount3 -u {path}"
        )
    try:
        if any(Path(path).iterdir()):
            raise ConflictError(
                f"{path} is not empty", hint="mount on an empty directory", status=Status.NOT_EMPTY
            )
    except NotADirectoryError:
        raise ConflictError(f"{path} is not a directory", status=Status.NOT_DIRECTORY) from None
    except OSError as error:
        raise UsageError(f"cannot mount on {path}: {error.strerror}") from None
    return path, made, notices


def _make_directories(path: str) -> list[Path]:
    """Makes a directory with those above it; the ones made, deepest first."""
    wanted = Path(path)
    missing = [each for each in (wanted, *wanted.parents) if not os.path.lexists(each)]
    try:
        wanted.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        return []  # no directory: said by who looks into it
    except OSError as error:
        raise UsageError(f"cannot make the directory {path}: {error.strerror}") from None
    return missing


# --- serving -----------------------------------------------------------------------------------------


class Ending:
    """Ends a mount that is served by another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._end: Callable[[], object] | None = None
        self._wanted = False

    def end(self) -> None:
        """Takes no more requests: :func:`serve` returns soon.  From any thread, at any time."""
        with self._lock:
            self._wanted = True
            if self._end is not None:
                self._end()

    def begun(self, loop: asyncio.AbstractEventLoop, terminate: Callable[[], None]) -> None:
        """The mount is served by ``loop``, and ``terminate``, called there, ends it."""
        with self._lock:
            self._end = lambda: loop.call_soon_threadsafe(terminate)
            if self._wanted:
                self._end()

    def over(self) -> None:
        """There is nothing to end any more."""
        with self._lock:
            self._end = None


def serve(
    files: FileSystem,
    target: str,
    *,
    fsname: str = "space",
    allow_other: bool = False,
    on_ready: Callable[[Ready], Awaitable[None] | None] = lambda _: None,
    ending: Ending | None = None,
) -> None:
    """Mounts ``files`` at ``target`` and serves it until it is unmounted, or told to end.

    That is SIGTERM or SIGINT, and then this is called from the main thread; with ``ending`` it is that alone, and
    any thread will do.  A read-only file system is mounted so.  On return everything is durable and nothing is
    left mounted.

    What ``on_ready`` returns, if it can be awaited, is at work as long as the mount is served: then it is cancelled,
    and has ended before everything is made durable.  If it fails, so does the mount.

    Raises:
        UnavailableError: something is missing on this machine, or the kernel refuses.
        ConflictError, UsageError: the target cannot be mounted on.
        StorageError: the last changes could not be made durable.
    """
    started = time.monotonic()
    check_available()
    path, made, notices = prepare_target(target)
    try:
        pyfuse3 = _load_pyfuse3()
        from space.projections.fuse.ops import Operations

        def ready() -> Awaitable[None] | None:
            return on_ready(Ready(path, (time.monotonic() - started) * 1000, tuple(notices)))

        begun = asyncio.Event()
        with _mounted(
            pyfuse3, Operations(files, begun.set), path, _options(files, fsname, allow_other=allow_other)
        ):
            _run(_serve(pyfuse3, files, begun, ready, ending))
    finally:
        with contextlib.suppress(OSError):
            for each in made:
                each.rmdir()


def _options(files: FileSystem, fsname: str, *, allow_other: bool) -> set[str]:
    plain = "".join(c if c.isascii() and c.isprintable() and c not in ',\\"' else "_" for c in fsname)
    options = {f"fsname={plain}", "subtype=space", "default_permissions"}
    if files.read_only:
        options.add("ro")
    if allow_other:
        options.add("allow_other")
    return options


@contextlib.contextmanager
def _mounted(pyfuse3: Any, operations: Any, path: str, options: set[str]) -> Iterator[None]:
    try:
        pyfuse3.init(operations, path, options)
    except RuntimeError:
        raise UnavailableError(
            f"the kernel refused the mount at {path}",
            hint="the line above says why"
            + ("; allow_other needs user_allow_other in /etc/fuse.conf" if "allow_other" in options else ""),
        ) from None
    try:
        yield
    finally:
        pyfuse3.close(unmount=True)


def _run(main: Coroutine[Any, Any, None]) -> None:
    """Runs the loop: uvloop's where it is installed."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
    else:
        uvloop.run(main)


async def _serve(
    pyfuse3: Any,
    files: FileSystem,
    begun: asyncio.Event,
    ready: Callable[[], Awaitable[None] | None],
    ending: Ending | None,
) -> None:
    loop = asyncio.get_running_loop()
    if ending is None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, pyfuse3.terminate)
    else:
        ending.begun(loop, pyfuse3.terminate)
    serving = asyncio.create_task(pyfuse3.main())
    syncing = asyncio.create_task(_sync_now_and_then(files))
    announcing = asyncio.create_task(_announce(begun, ready, pyfuse3))
    try:
        await serving
    finally:
        if ending is not None:
            ending.over()
        for task in (syncing, announcing):
            task.cancel()
        results = await asyncio.gather(syncing, announcing, return_exceptions=True)
        await files.sync()
    for result in results:
        if isinstance(result, Exception):
            raise result


async def _announce(begun: asyncio.Event, ready: Callable[[], Awaitable[None] | None], pyfuse3: Any) -> None:
    await begun.wait()
    try:
        work = ready()
        if work is not None:
            await work
    except asyncio.CancelledError:
        raise
    except BaseException:
        pyfuse3.terminate()
        raise


async def _sync_now_and_then(files: FileSystem) -> None:
    said = ""
    while True:
        await asyncio.sleep(SYNC_SECONDS)
        try:
            await files.sync()
        except SpaceError as error:
            if str(error) != said:  # a disk that stays broken is one line, not one a second
                said = str(error)
                log.error("%s", said)  # noqa: TRY400 - for the operator; who calls fsync gets the error too


# --- in the background -------------------------------------------------------------------------------


def daemonize(run: Callable[[Callable[[Report], None]], int], *, log_file: Path | None = None) -> Report:
    """Runs ``run`` in a process of its own, detached from the terminal; returns what it reports when ready.

    ``run`` gets a function to call once with its report; what it returns is that process's exit status.
    Until then its standard error is ours; after that it goes to ``log_file``, or nowhere.
    Call it before any thread is started or any store opened: neither survives a fork.

    Raises:
        SpaceError: of the kind, and with the words, of the one ``run`` failed with before it was ready.
    """
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _detached(run, writer, log_file)
    os.close(writer)
    with os.fdopen(reader, "rb") as report:
        text = report.read(REPORT_BYTES_MAX)
    os.waitpid(child, 0)
    return _understood(text)


def _detached(run: Callable[[Callable[[Report], None]], int], writer: int, log_file: Path | None) -> NoReturn:
    status = 1
    try:
        os.setsid()
        if os.fork():
            os._exit(0)  # the first child only makes the second one nobody's: no terminal can come back
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)

        def ready(report: Report) -> None:
            os.write(writer, json.dumps({"ready": report}).encode())
            os.close(writer)
            os.dup2(os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) if log_file else null, 2)

        status = run(ready)
    except SpaceError as error:
        status = error.kind.exit_status
        _report_failure(writer, str(error), error.kind)
    except BaseException as error:  # noqa: BLE001 - nothing above could tell anyone
        _report_failure(writer, f"{type(error).__name__}: {error}", ErrorKind.FAILED)
    finally:
        os._exit(status)


def _report_failure(writer: int, message: str, kind: ErrorKind) -> None:
    try:
        os.write(
            writer, json.dumps({"failed": message[: REPORT_BYTES_MAX // 8], "kind": kind.label}).encode()
        )
    except OSError:  # it was ready before: the parent is gone
        sys.stderr.write(f"space: {message}\n")


_ERRORS: Final[dict[str, type[SpaceError]]] = {
    each.kind.label: each
    for each in (
        SpaceError,
        UsageError,
        NotFoundError,
        ConflictError,
        RefusedError,
        CorruptionError,
        UnavailableError,
    )
}


def _understood(text: bytes) -> Report:
    try:
        report: Report = json.loads(text)
    except ValueError:
        raise SpaceError("the background process ended before it was ready") from None
    if "failed" in report:
        raise _ERRORS[report["kind"]](report["failed"])
    ready: Report = report["ready"]
    return ready

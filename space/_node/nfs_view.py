"""Trees and capsules as exports of an NFSv4.1/4.2 server, served until the process is told to end.

What clients remember is the same after every restart: the server's name and the key of its filehandles come from the
store, an export's number from its root (and moment).  Opens and locks are not kept, but who held some is; those
clients may claim them again in the grace period.  A past moment cannot log anything: it has no locks to lose.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import secrets
import signal
import time
from collections.abc import Callable, Sequence
from typing import Final

import attrs
from blake3 import blake3

from space._errors import UnavailableError, UsageError
from space._node.beside import PastBeside
from space._node.caller import Document
from space._node.local_vfs import LocalFileSystem
from space._node.loops import run_loop
from space._node.nfs_recovery import StoreRecovery
from space._node.nfs_referrals import add_referrals
from space._node.nfs_watch import Watch
from space._node.store import Store
from space.events.ids import CapsuleId
from space.projections.nfs.exports import Export, Exports, Rule, Squash, export_number, parse_rule
from space.projections.nfs.nfs4 import PORT
from space.projections.nfs.referrals import Location, parse_referral
from space.projections.nfs.server import Clock, Listener, Server, Tasks, make_shell
from space.projections.nfs.service import Config, Recovery, Service

LISTEN_DEFAULT: Final = f"127.0.0.1:{PORT}"
LEASE_SECONDS: Final = 45
LEASE_SECONDS_MIN: Final = 5
LEASE_SECONDS_MAX: Final = 90
GRACE_SECONDS_MAX: Final = 600
MINOR_VERSION: Final = 2


@attrs.frozen
class Options:
    """How exports are offered; lengths of time in seconds, ``grace_seconds`` None for one lease.

    ``referrals``: zones, and where they serve themselves.
    """

    read_only: bool = False
    squash: Squash = Squash.ROOT
    rules: tuple[Rule, ...] = ()
    lease_seconds: int = LEASE_SECONDS
    grace_seconds: int | None = None
    referrals: tuple[tuple[str, Location], ...] = ()

    def config(self) -> Config:
        """The same, for the service."""
        grace = self.lease_seconds if self.grace_seconds is None else self.grace_seconds
        return Config(lease_seconds=self.lease_seconds, grace_seconds=grace)


def parse_options(
    *,
    read_only: bool,
    squash: str,
    clients: Sequence[str],
    lease: int | None,
    grace: int | None,
    refer: Sequence[str] = (),
) -> Options:
    """The options of a command line.

    Raises:
        UsageError: one of them is not what it should be.
    """
    if squash not in [each.value for each in Squash]:
        raise UsageError(f"no such squash: {squash!r}", hint="root, all or none")
    lease = LEASE_SECONDS if lease is None else lease
    if not LEASE_SECONDS_MIN <= lease <= LEASE_SECONDS_MAX:
        raise UsageError(
            f"a lease of {lease} s", hint=f"from {LEASE_SECONDS_MIN} to {LEASE_SECONDS_MAX} seconds"
        )
    if grace is not None and not 0 <= grace <= GRACE_SECONDS_MAX:
        raise UsageError(f"a grace period of {grace} s", hint=f"from 0 to {GRACE_SECONDS_MAX} seconds")
    rules = tuple(parse_rule(each) for each in clients)
    return Options(
        read_only, Squash(squash), rules, lease, grace, tuple(parse_referral(each) for each in refer)
    )


def serve(
    reading: Store | PastBeside,
    sources: Sequence[str],
    *,
    listen: tuple[str, int],
    options: Options,
    ready: Callable[[Document], None],
) -> None:
    """Serves trees and capsules (paths or ids) until SIGTERM or SIGINT; then everything acknowledged is durable.

    A single source is the root of the server; several are found below it by their paths, capsules by their ids.
    ``ready`` is told once clients can connect: ``address``, ``read_only``, ``exports``, ``lease_seconds``, ``epoch``
    and the command ``mount``.

    Raises:
        NotFoundError: there is no such capsule.
        UsageError: it is neither a directory nor a file, or sources lie in each other.
        UnavailableError: the address cannot be listened at.
    """
    run_loop(_serve(reading, sources, listen, options, ready))


async def _serve(
    reading: Store | PastBeside,
    sources: Sequence[str],
    listen: tuple[str, int],
    options: Options,
    ready: Callable[[Document], None],
) -> None:
    over = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, over.set)
    if options.referrals and not isinstance(reading, Store):
        raise UsageError("a past moment is shown whole: it refers to nobody", hint="leave out --refer")
    found = _exports(reading, sources, options, listen[0])
    if isinstance(reading, Store):
        recovery: Recovery = await asyncio.to_thread(StoreRecovery, reading, server_name(reading))
    else:
        recovery = Recovery(secrets.randbits(32))
    server = server_of(reading, found, recovery, options.config(), options.referrals)
    service = server.service
    async with contextlib.AsyncExitStack() as stack:
        for each in found:
            stack.push_async_callback(each.files.sync)
        stack.push_async_callback(server.close)
        if isinstance(reading, Store):
            watch = Watch(service.state, now=server.now)
            reading.watchers.append(watch)
            stack.callback(reading.watchers.remove, watch)
        host, port = await listening(server, listen)
        ready(document_of(host, port, found, sources, service))
        await over.wait()


def server_name(reading: Store | PastBeside) -> str:
    """What a server calls itself: the same after every restart, and on every node of a cluster."""
    return f"space:{CapsuleId(_store_id(reading)).derive(b'nfs server' + _moment(reading).encode())}"


def server_of(
    reading: Store | PastBeside,
    exports: Sequence[Export],
    recovery: Recovery,
    config: Config,
    referrals: Sequence[tuple[str, Location]] = (),
) -> Server:
    """A server on the running loop; it does not listen yet.

    Raises:
        NotFoundError, UsageError: it is to refer to a zone that is not known, or not below an export.
    """
    offered = Exports(exports, key=handle_key(reading), time_ns=time.time_ns())
    if isinstance(reading, Store):
        add_referrals(reading, exports, offered, referrals)
    return server_over(reading, offered, recovery, config)


def server_over(reading: Store | PastBeside, exports: Exports, recovery: Recovery, config: Config) -> Server:
    """As :func:`server_of`, of exports that are there already."""
    tasks, clock = Tasks(), Clock(asyncio.get_running_loop().time)
    service = Service(
        exports,
        make_shell(tasks),
        recovery,
        name=server_name(reading).encode(),
        now=clock(),
        config=config,
    )
    return Server(service, tasks, clock)


def _store_id(reading: Store | PastBeside) -> bytes:
    return reading.id if isinstance(reading, Store) else reading._store_id


def _moment(reading: Store | PastBeside) -> str:
    """Which past it is; empty for the present."""
    return "" if isinstance(reading, Store) else f"{reading.target.position}.{reading.target.event}"


def handle_key(reading: Store | PastBeside) -> bytes:
    """The key that makes filehandles that only who knows the store can make; clients are not told its id."""
    return blake3(_store_id(reading), derive_key_context="space nfs handles v1").digest()


def _exports(
    reading: Store | PastBeside, sources: Sequence[str], options: Options, host: str
) -> list[Export]:
    files: LocalFileSystem | None = None

    def opened(root: CapsuleId) -> LocalFileSystem:
        nonlocal files
        files = LocalFileSystem(reading, root, read_only=options.read_only, beside=files)
        files.limit("nfs", host)
        return files

    return exports_of(reading, sources, options, opened)


def exports_of(
    reading: Store | PastBeside,
    sources: Sequence[str],
    options: Options,
    opened: Callable[[CapsuleId], LocalFileSystem],
) -> list[Export]:
    """What ``sources`` (paths or ids) stand for, each with the file system that ``opened`` gives for its root.

    Raises:
        NotFoundError: there is no such capsule.
        UsageError: it is neither a directory nor a file.
    """
    exports: list[Export] = []
    for source in sources:
        root = reading.resolve(source)
        files = opened(root)
        exports.append(
            Export(
                export_number(_store_id(reading), root, _moment(reading)),
                _place(source) if len(sources) > 1 else (),
                files,
                read_only=files.read_only,
                squash=options.squash,
                rules=options.rules,
            )
        )
    return exports


def _place(source: str) -> tuple[bytes, ...]:
    """Where one of several exports is found: at its path in the tree, or under its id."""
    return tuple(part.encode() for part in source.split("/") if part)


async def listening(server: Server, listen: tuple[str, int]) -> tuple[str, int]:
    """Has a server listen, and says at which host and port.

    Raises:
        UnavailableError: the address is in use, or not this machine's.
    """
    host, port = listen
    try:
        return await server.start(Listener(host, port))
    except OSError as error:
        raise UnavailableError(
            f"cannot listen at {_joined(host, port)}: {error.strerror or error}",
            hint="say another --listen HOST:PORT",
        ) from None


def _joined(host: str, port: int) -> str:
    return f"{_bracketed(host)}:{port}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def document_of(
    host: str, port: int, exports: Sequence[Export], sources: Sequence[str], service: Service
) -> Document:
    """What is told of a server that listens."""
    shown = host
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_unspecified:
            shown = "SERVER"
    return {
        "address": _joined(host, port),
        "read_only": all(each.read_only for each in exports),
        "exports": [
            {"path": "/" + b"/".join(each.path).decode(), "source": source, "squash": each.squash.value}
            for each, source in zip(exports, sources, strict=True)
        ],
        "lease_seconds": service.config.lease_seconds,
        "epoch": service.epoch,
        "mount": f"mount -t nfs4 -o vers=4.{MINOR_VERSION},port={port} {_bracketed(shown)}:/ DIR",
    }

"""A node in the foreground: what ``space serve`` runs.

Without the consensus engine a store is served alone.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from space._errors import UnavailableError
from space._node.caller import Document
from space._node.calls import StoreTarget, Target
from space._node.enrolment import ServeOptions, prepare
from space._node.federation_calls import KeptFederation, begin_federation
from space._node.mounts import Mounts
from space._node.node_target import NodeTarget

if TYPE_CHECKING:
    from space._node.cluster import ClusterNode
    from space._node.http import HttpServer
    from space._node.store import Store

RETIRE_SECONDS: Final = 2.0
"""How long calls that are being answered may take to end when the node stops: callers try another node after that."""

WATCH_SECONDS: Final = 0.2
CONTROL_SOCKET: Final = "control.sock"
ENGINE_HINT: Final = "pip install 'space-store[cluster]', or tools/setup in a checkout"


def has_engine() -> bool:
    """Whether the consensus engine is installed."""
    return importlib.util.find_spec("space_raft_engine") is not None


class Listener(Protocol):
    """The control socket of a target."""

    def retire(self, seconds: float) -> None:
        """Takes no more calls, and ends those being answered."""

    def close(self) -> None:
        """Waits until they have ended."""


def serve(
    home: Path,
    options: ServeOptions,
    *,
    listen: Callable[[Target], Listener],
    announce: Callable[[Document, str], None],
) -> None:
    """Runs a node until SIGTERM or SIGINT, or until it fails.  Call it from the main thread.

    ``listen`` opens the control socket; ``announce`` is called once when the node answers, with what it is and a
    notice for people, if there is one.

    Raises:
        SpaceError: it cannot start, or had to stop.
    """
    over = _signalled()
    if has_engine():
        with _stopping(Running(home, options, listen)) as running:
            announce(running.document(), "")
            running.wait(over)
    else:
        with _stopping(RunningAlone(home, options, listen)) as alone:
            announce(
                alone.document(),
                f"one node, which cannot grow: the consensus engine is missing; {ENGINE_HINT}",
            )
            over.wait()


def _signalled() -> threading.Event:
    """Set by the first SIGTERM or SIGINT."""
    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: over.set())
    return over


class _Stoppable(Protocol):
    def stop(self) -> None:
        """Ends everything, in order."""


_S = TypeVar("_S", bound=_Stoppable)


@contextlib.contextmanager
def _stopping(running: _S) -> Iterator[_S]:
    try:
        yield running
    finally:
        running.stop()


class Running:
    """A node with its ways in."""

    def __init__(self, home: Path, options: ServeOptions, listen: Callable[[Target], Listener]) -> None:
        """Starts everything.

        Raises:
            SpaceError: it cannot; then nothing is left running.
        """
        from space._node.cluster import ClusterNode

        self._listener: Listener | None = None
        self._http: HttpServer | None = None
        self._federation: KeptFederation | None = None
        self._target: NodeTarget | None = None
        self._mounts = Mounts(home)
        self.node = ClusterNode(home, prepare(home, options))
        try:
            node = self._target = NodeTarget(self.node, self._mounts)
            if options.http is not None:
                self._http = _http(node, options, self.node)
            self._listener = listen(node)
            for target, path in options.mounts:
                self._mounts.mount(node.reading_for, path, target, read_only=False)
            for view in options.nvme:
                node.nvme.keep_serving(view)
            for offered in options.nfs:
                node.nfs.keep_serving(offered)
            for volumes in options.csi:
                node.csi.keep_serving(volumes)
            if options.federation is not None:
                self._federation = KeptFederation(self.node.store, options.federation)
        except BaseException:
            self.stop()
            raise

    def document(self) -> Document:
        """What the command prints when the node is ready."""
        config = self.node.config
        return {
            "node": config.node,
            "cluster": str(uuid.UUID(bytes=config.cluster)),
            "shards": config.shards,
            "peer": self.node.node.address,
            **_where(self.node.home, self._http),
        }

    def wait(self, over: threading.Event) -> None:
        """Returns when it is told to end.

        Raises:
            SpaceError: the node had to stop.
        """
        while not over.wait(WATCH_SECONDS):
            if self.node.ended.is_set():
                raise self.node.failure or UnavailableError(f"node {self.node.config.node} has stopped")

    def stop(self) -> None:
        """Hands over, ends what is being answered, and closes; callers go on with another node."""
        if self._federation is not None:
            self._federation.retire(RETIRE_SECONDS)
        if self.node.store.federation is not None:  # begun by space federation serve
            self.node.store.federation.close()
        if self._listener is not None:
            self._listener.retire(RETIRE_SECONDS)
        if self._http is not None:
            self._http.retire(RETIRE_SECONDS)
        if self._target is not None:
            self._target.retire(RETIRE_SECONDS)
        self._mounts.close()
        self.node.stop()
        if self._federation is not None:
            self._federation.close()
        if self._target is not None:
            self._target.close()
        if self._http is not None:
            self._http.close()
        if self._listener is not None:
            self._listener.close()
        self.node.close()


class RunningAlone:
    """A single-node store with its ways in, where there is no engine."""

    def __init__(self, home: Path, options: ServeOptions, listen: Callable[[Target], Listener]) -> None:
        """Starts everything.

        Raises:
            UsageError: an option needs the engine.
            SpaceError: the store cannot be opened.
        """
        from space._node.store import Store

        wanted = {"--join": options.join, "--node-id": options.node, "--shards": options.shards}
        for flag, value in wanted.items():
            if value is not None:
                raise UnavailableError(f"{flag} needs the consensus engine", hint=ENGINE_HINT)
        if options.mounts:
            raise UnavailableError("--mount of a node needs the consensus engine", hint="space project mount")
        kinds = {"nvme": options.nvme, "nfs": options.nfs, "csi": options.csi}
        if kind := next((kind for kind, views in kinds.items() if views), None):
            raise UnavailableError(
                "views of a node need the consensus engine", hint=f"space project --view {kind}"
            )
        self._http: HttpServer | None = None
        self._listener: Listener | None = None
        self._store: Store = Store(home)
        try:
            target = StoreTarget(self._store)
            self._http = _http(target, options, None) if options.http is not None else None
            self._listener = listen(target)
            if options.federation is not None:
                begin_federation(self._store, options.federation)
        except BaseException:
            if self._listener is not None:
                self._listener.close()
            if self._http is not None:
                self._http.retire(0)
                self._http.close()
            self._store.close()
            raise

    def document(self) -> Document:
        """What the command prints when the store answers."""
        alone = {"node": None, "cluster": None, "shards": 1, "peer": None}
        return {**alone, **_where(self._store.path, self._http)}

    def stop(self) -> None:
        """Ends what is being answered, and closes."""
        if self._listener is not None:
            self._listener.retire(RETIRE_SECONDS)
        if self._http is not None:
            self._http.retire(RETIRE_SECONDS)
            self._http.close()
        if self._listener is not None:
            self._listener.close()
        self._store.close()


def _where(home: Path, http: HttpServer | None) -> Document:
    """Where a process answers."""
    return {
        "url": f"unix://{home.absolute() / CONTROL_SOCKET}",
        "http": None if http is None else http.url,
        "pid": os.getpid(),
        "data": str(home.absolute()),
    }


def _http(target: Target, options: ServeOptions, node: ClusterNode | None) -> HttpServer:
    """Begins to answer over HTTP.

    Raises:
        UnavailableError: aiohttp is not installed.
        UsageError: the address is of another machine's reach, and there is no certificate.
    """
    if importlib.util.find_spec("aiohttp") is None:
        raise UnavailableError(
            "--http needs the Python package aiohttp", hint="pip install 'space-store[cluster]'"
        )
    from space._node.http import HttpServer

    return HttpServer(target, str(options.http), node=node)

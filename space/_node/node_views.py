"""Views that a running node serves over sockets: one of a kind at a time, in a thread with a loop of its own.

The node's loop has a consensus to keep; what a view waits for must not keep it from that.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, TypeVar

import attrs

from space._errors import ConflictError, SpaceError, UnavailableError
from space._node.caller import Document
from space._node.loops import run_loop
from space.replication.node import parse_address

if TYPE_CHECKING:
    from space._node.cluster import ClusterNode

AGAIN_SECONDS: Final = 1.0
READY_SECONDS: Final = 60.0
END_SECONDS: Final = 60.0

ASK_SECONDS: Final = 1.0
"""How long another node may take to say what it serves."""


V = TypeVar("V")
"""What a view serves, where, and how."""


@attrs.define(eq=False)
class Running(Generic[V]):
    """A view in its thread; with ``again`` it is served as soon as that is possible, else at once or not at all."""

    options: V
    ready: Future[Document]
    again: bool
    over: threading.Event = attrs.field(factory=threading.Event)
    thread: threading.Thread | None = None
    wake: Callable[[], None] = attrs.field(default=lambda: None)
    view: Document = attrs.field(factory=dict)

    def end(self) -> None:
        """Tells it to end."""
        self.over.set()
        self.wake()

    def join(self, seconds: float) -> None:
        """Waits for its thread."""
        if self.thread is not None:
            self.thread.join(seconds)

    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self.thread is not None and self.thread.is_alive()

    def told_to_end(self) -> asyncio.Event:
        """Set in the running loop when it is told to end."""
        loop, over = asyncio.get_running_loop(), asyncio.Event()
        self.wake = lambda: _call(loop, over.set)
        if self.over.is_set():
            over.set()
        return over


class NodeViews(Generic[V]):
    """The view of one kind that a node serves."""

    protocol: ClassVar[str]
    log: ClassVar[logging.Logger]

    def __init__(self) -> None:
        """Nothing is served yet."""
        self._lock = threading.Lock()
        self._running: Running[V] | None = None
        self._closed = False

    async def _serve(self, running: Running[V]) -> None:
        """Serves until it is told to end.

        Raises:
            SpaceError: it cannot.
        """
        raise NotImplementedError

    def serve(self, options: V) -> Document:
        """Serves, and says where and what.

        Raises:
            ConflictError: this node serves already.
            SpaceError: it cannot be served.
        """
        running = self._begin(options, again=False)
        try:
            return running.ready.result(READY_SECONDS)
        except TimeoutError:
            running.end()
            raise UnavailableError("the view is not ready", hint="space cluster status") from None

    def keep_serving(self, options: V) -> None:
        """Serves as soon as it can: what is to be served may only come with the log, and a quorum with time."""
        self._begin(options, again=True)

    def _begin(self, options: V, *, again: bool) -> Running[V]:
        running = Running(options, Future(), again)
        with self._lock:
            if self._closed:
                raise UnavailableError("this node is stopping")
            if self._running is not None and self._running.is_alive():
                at = self._running.view.get("target")
                how = "its configuration says so" if at is None else f"space project stop {at}, then again"
                raise ConflictError(
                    f"this node serves {self.protocol} at {at or 'an address'} already", hint=how
                )
            self._running = running
            running.thread = threading.Thread(
                target=self._run, args=(running,), name=f"space-{self.protocol.lower()}", daemon=True
            )
            running.thread.start()
        return running

    def target(self) -> str | None:
        """The address that is served at, if there is one."""
        running = self._running
        return running.view.get("target") if running is not None and running.is_alive() else None

    def end(self, target: str) -> Document | None:
        """Ends the view at an address and waits until it is gone; None: there is none at that address.

        Raises:
            UnavailableError: it has not ended yet.
        """
        running = self._running
        if running is None or not running.is_alive() or running.view.get("target") != target:
            return None
        document = dict(running.view)
        running.end()
        running.join(END_SECONDS)
        if running.is_alive():
            raise UnavailableError(f"the view at {target} has not ended yet")
        return document

    def retire(self, seconds: float) -> None:
        """Takes no more, and lets what is under way end so long."""
        with self._lock:
            self._closed = True
        if self._running is not None:
            self._running.end()
            self._running.join(seconds)

    def close(self) -> None:
        """Waits until the view has ended; the node has stopped, so that nothing under way waits for a leader."""
        if self._running is not None:
            self._running.join(END_SECONDS)

    # --- its thread --------------------------------------------------------------------------------

    def _run(self, running: Running[V]) -> None:
        said = ""
        while not running.over.is_set():
            try:
                run_loop(self._serve(running))
            except SpaceError as error:
                if not running.again:
                    self._failed(running, error)
                    return
                if str(error) != said:
                    self.log.warning("%s is not served: %s", self.protocol, error)
                    said = str(error)
                running.over.wait(AGAIN_SECONDS)
            except Exception as error:
                self.log.exception("the %s view broke", self.protocol)
                self._failed(running, SpaceError(f"{type(error).__name__}: {error}"))
                return
        if not running.ready.done():
            running.ready.set_exception(UnavailableError("this node is stopping"))

    def _failed(self, running: Running[V], error: SpaceError) -> None:
        if running.ready.done():
            self.log.error("the %s view ended: %s", self.protocol, error)
        else:
            running.ready.set_exception(error)


def ask_others(node: ClusterNode, method: str) -> tuple[dict[int, str], dict[int, Any]]:
    """The other members with their hosts, and what those say that answer (see ``Node.on_call``); blocks.

    Raises:
        SpaceError: this node takes no part.
    """
    members = {
        number: parse_address(address)[0]
        for number, (_, address) in node.store.members().items()
        if address and number != node.config.node
    }

    async def ask(running: Any) -> dict[int, Any]:
        async def one(peer: int) -> tuple[int, Any]:
            answer, _ = await running.transport.request(peer, "call", [0, method], timeout=ASK_SECONDS)
            return peer, answer

        found = await asyncio.gather(*(one(peer) for peer in members), return_exceptions=True)
        return dict(each for each in found if not isinstance(each, BaseException))

    answers: dict[int, Any] = node.call(ask, seconds=2 * ASK_SECONDS)
    return members, answers


def _call(loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> None:
    with contextlib.suppress(RuntimeError):  # it has ended
        loop.call_soon_threadsafe(function)

"""The driver: gRPC on a socket, the volumes asked of the store's owner, kept alive where that is its work.

A driver of a machine without a store has neither volumes to ask nor an owner: what it has to know comes with the calls.

The owner (:mod:`space._node.csi_owner`) is another process, in a session of its own: it goes on when the driver is
killed, and a driver started again finds it.  When the owner was started anew, by whomever, the mounts of this machine
are put right (:class:`space._node.csi_host.LinuxHost`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Final

import attrs

from space._errors import RefusedError, SpaceError, Status, UnavailableError, UsageError
from space._node.caller import Document
from space._node.csi_client import Ask, RemoteVolumes
from space._node.csi_host import LinuxHost
from space._node.csi_relay import Relays
from space.projections.csi.controller import Controller
from space.projections.csi.group import GroupController
from space.projections.csi.identity import Identity
from space.projections.csi.metadata import SnapshotMetadata
from space.projections.csi.model import Node
from space.projections.csi.node import NodeService
from space.projections.csi.server import Counts, serving

MODES: Final = ("all", "controller", "node", "store")
WATCH_SECONDS: Final = 0.5
STARTING_SECONDS: Final = 0.1
"""As the one above while an owner starts: whoever uses a volume waits for it."""

START_SECONDS: Final = 60.0
AGAIN_SECONDS: Final = 2.0
"""Between two starts of an owner that never answered: why it cannot start is in its log, and not twice a second."""

COMPLETE_SECONDS: Final = 5.0
"""How often paths that are missing are looked for."""

RELAY_SECONDS: Final = 10.0

REQUEST_BYTES_MAX: Final = 8192  # a scraper's request

log: Final = logging.getLogger("space.csi")


@attrs.frozen
class Config:
    """What a driver is to be.

    Attributes:
        mode: ``all``, ``controller`` or ``node``.
        endpoint: path or ``unix://`` address of the socket.
        node: this machine, where volumes are seen on it.
        state: directory for notes of what is mounted, and for the mount of all volumes.
        data: directory of the store: no target may be in it.
        metrics: HOST:PORT to answer ``/metrics`` on; empty for nowhere.
        remote: this machine has no store.
    """

    mode: str
    endpoint: str
    node: Node
    state: Path
    data: Path
    version: str
    metrics: str = ""
    remote: bool = False


class Driver:
    """One driver; ``spawn`` starts an owner where this driver is the one to do that."""

    def __init__(
        self, config: Config, ask: Ask | None, spawn: Callable[[], subprocess.Popen[bytes]] | None
    ) -> None:
        """``ask`` is how the owner is asked; None where there is no store."""
        self._config = config
        self._spawn = spawn
        self._volumes = None if ask is None else RemoteVolumes(ask)
        self._counts = Counts()
        self._relays: Relays | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._owner = ""
        self._mount = ""
        self._start_after = 0.0
        self._child: subprocess.Popen[bytes] | None = None
        self._repaired = asyncio.Event()
        self._host: LinuxHost | None = None
        if config.mode != "controller":
            forbidden = (config.state,) if config.remote else (config.data, config.state)
            self._host = LinuxHost(
                config.state / "notes", self._shown, config.node.id, relay=self._relay, forbidden=forbidden
            )

    async def run(self, ready: Callable[[Document], None]) -> None:
        """Serves until SIGTERM or SIGINT; ``ready`` is called once calls are answered.

        Raises:
            SpaceError: the socket cannot be made; the owner does not start.
        """
        over = asyncio.Event()
        self._loop, self._relays = asyncio.get_running_loop(), Relays()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, over.set)
        watching = asyncio.create_task(self._watch())
        completing = asyncio.create_task(self._complete())
        try:
            await self._first(watching)
            async with self._metrics(), serving(self._config.endpoint, self._services(), self._counts):
                ready({"endpoint": self._config.endpoint, "mode": self._config.mode})
                await self._until(over, watching)
        finally:
            for each in (watching, completing):
                each.cancel()
            await asyncio.gather(watching, completing, return_exceptions=True)
            await asyncio.to_thread(self._close)
            await self._relays.close()

    def _shown(self) -> str:
        """Where all volumes are mounted.

        Raises:
            RefusedError: nowhere, as there is no store.
            UnavailableError: the owner has not been asked yet.
        """
        if self._volumes is None:
            raise RefusedError("this node has no store", status=Status.NOT_PERMITTED)
        if not self._mount:
            raise UnavailableError("the owner of the store has not answered yet", hint="try again")
        return self._mount

    def _close(self) -> None:
        if self._volumes is not None:
            self._volumes.close()
        if self._host is not None:
            self._host.close()

    async def _until(self, over: asyncio.Event, watching: asyncio.Task[None]) -> None:
        """Waits until it is over, or nobody watches the owner any more."""
        waiting = asyncio.create_task(over.wait())
        await asyncio.wait({waiting, watching}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if watching.done():
            watching.result()

    async def _first(self, watching: asyncio.Task[None]) -> None:
        """Waits for the owner, where this driver starts it: a call that comes before would only fail."""
        if self._spawn is None and self._volumes is not None:
            return
        waiting = asyncio.create_task(self._repaired.wait())
        done, _ = await asyncio.wait(
            {waiting, watching}, timeout=START_SECONDS, return_when=asyncio.FIRST_COMPLETED
        )
        waiting.cancel()
        if watching in done:
            watching.result()
        if not done:
            raise UnavailableError(
                "the owner of the store does not answer", hint=f"its words are in {self._config.state}"
            )

    def _services(self) -> list[tuple[str, object]]:
        config = self._config
        controller = config.mode in {"all", "controller"}
        found: list[tuple[str, object]] = [
            ("Identity", Identity(config.version, controller=controller, ready=self._ready))
        ]
        if controller and self._volumes is not None:
            found += [
                ("Controller", Controller(self._volumes, zone=config.node.zone)),
                ("GroupController", GroupController(self._volumes)),
                ("SnapshotMetadata", SnapshotMetadata(self._volumes)),
            ]
        if self._host is not None:
            found.append(("Node", NodeService(self._volumes, self._host, config.node)))
        return found

    async def _ready(self) -> bool:
        if self._volumes is not None:
            try:
                await self._volumes.about()
            except UnavailableError:
                return False
        return self._repaired.is_set()

    # --- several servers -------------------------------------------------------------------------

    def _relay(self, servers: Sequence[str]) -> int:
        """See :class:`LinuxHost`.

        Raises:
            UnavailableError: there is none, or not now.
        """
        if self._loop is None or self._relays is None:
            raise UnavailableError("the driver does not run yet", hint="try again")
        port = asyncio.run_coroutine_threadsafe(self._relays.port(servers), self._loop)
        try:
            return port.result(RELAY_SECONDS)
        except TimeoutError:
            raise UnavailableError("the driver is busy", hint="try again") from None

    async def _complete(self) -> None:
        """Has the relays of mounts from before where they were, and connects paths that are missing, now and then."""
        if self._host is None or self._relays is None:
            return
        said: set[str] = set()
        while True:
            for servers, port in (await asyncio.to_thread(self._host.relays)).items():
                try:
                    await self._relays.port(servers, port)
                except UnavailableError as error:
                    if str(error) not in said:
                        log.warning("mounts of volumes wait: %s", error)
                    said.add(str(error))
            await self._host.complete()
            await asyncio.sleep(COMPLETE_SECONDS)

    # --- the owner -------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Notices a new owner and puts the mounts right; starts one where there is none."""
        if self._volumes is None:
            await self._alone()
            return
        said = ""
        while True:
            pause = WATCH_SECONDS
            try:
                await self._look(self._volumes)
                said = ""
            except UnavailableError as error:
                self._repaired.clear()
                self._start()
                pause = STARTING_SECONDS if self._starting() else WATCH_SECONDS
                if str(error) != said:
                    said = str(error)
                    log.warning("%s", said)
            except UsageError:
                raise UnavailableError(
                    f"the process that owns {self._config.data} shows no volumes",
                    hint="stop it, or start it as: space csi --mode store",
                ) from None
            except SpaceError as error:
                log.warning("%s", error)
            await asyncio.sleep(pause)

    async def _alone(self) -> None:
        """What there is to be done without an owner: once, to see what is left from before."""
        if self._host is not None:
            await self._host.repair()
        self._repaired.set()
        await asyncio.Event().wait()

    async def _look(self, volumes: RemoteVolumes) -> None:
        about = await volumes.about()
        self._start_after = 0.0  # it could start, and if it dies it can again
        if about["incarnation"] != self._owner or not self._repaired.is_set():
            self._mount = about["mount"]
            if self._host is not None:
                await volumes.register(self._config.node)
                await self._host.repair()
            self._owner = about["incarnation"]
            self._repaired.set()

    def _start(self) -> None:
        if self._spawn is None or self._starting():
            return
        now = asyncio.get_running_loop().time()
        if now >= self._start_after:
            self._start_after = now + AGAIN_SECONDS
            self._child = self._spawn()

    def _starting(self) -> bool:
        return self._child is not None and self._child.poll() is None

    # --- metrics ---------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _metrics(self) -> AsyncIterator[None]:
        """Answers ``GET /metrics`` while it is entered."""
        if not self._config.metrics:
            yield
            return
        host, _, port = self._config.metrics.rpartition(":")
        if not (port.isascii() and port.isdecimal() and int(port) < 1 << 16):
            raise UsageError(f"not an address: {self._config.metrics!r}", hint="--metrics HOST:PORT")
        server = await asyncio.start_server(
            self._scraped, host.strip("[]") or "127.0.0.1", int(port), limit=REQUEST_BYTES_MAX
        )
        async with server:
            yield

    async def _scraped(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(
            OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError
        ):
            async with asyncio.timeout(10.0):
                request = await reader.readuntil(b"\r\n\r\n")
                found = request.startswith(b"GET /metrics ")
                text = self._text().encode() if found else b"there is /metrics\n"
                status = b"200 OK" if found else b"404 Not Found"
                kind = b"Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n"
                length = b"Content-Length: %d\r\n" % len(text)
                writer.write(
                    b"HTTP/1.1 " + status + b"\r\n" + kind + length + b"Connection: close\r\n\r\n" + text
                )
                await writer.drain()
        writer.close()

    def _text(self) -> str:
        ready = f"# TYPE csi_owner_ready gauge\ncsi_owner_ready {int(self._repaired.is_set())}\n"
        return ready + self._counts.text()

"""One address on this machine for an NFS server that one of several nodes is: connections lead to whichever serves now.

The kernel's NFS client knows one address for a mount, and keeps to it.  Of a cluster's nodes one serves at a time, and
the others do not listen.  So the kernel is given an address here, whose connections are carried on to the node that
answers.  When that one is gone they end, and the kernel connects again, as it does after any restart of a server.

A node that takes connections and says nothing (it is stopped, or cut off) is left as soon as another one answers.

Nothing is kept but bytes on their way.  An address is the same again after a restart, or mounts would not find it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Final

import attrs

from space._errors import UnavailableError
from space._node.csi_network import NULL_CALL, NULL_REPLY
from space.projections.csi import check

HOST: Final = "127.0.0.1"

ANSWER_SECONDS: Final = 2.0
"""A server that takes longer to say anything is passed over."""

FIND_SECONDS: Final = 60.0
"""How long a connection is kept while no server answers: a kernel whose connection ends waits longer each time."""

AGAIN_SECONDS: Final = 0.2
WATCH_SECONDS: Final = 2.0
"""How often it is asked whether the server still answers, while there are connections."""

CONNECTIONS_MAX: Final = 256
"""Of one address: a kernel has one, or as many as nconnect says (16 at most) for each set of options."""

BUFFER_BYTES: Final = 256 << 10
"""Held in each direction of a connection before its sender has to wait."""

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

log: Final = logging.getLogger("space.csi")


async def answering(server: str) -> Streams:
    """A connection to an NFS server that has answered on it.

    Raises:
        UnavailableError: it has not.
    """
    host, port = check.server(server)
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            reader, writer = await asyncio.open_connection(host, port, limit=BUFFER_BYTES)
            try:
                writer.write(NULL_CALL)
                if await reader.readexactly(len(NULL_REPLY)) == NULL_REPLY:
                    return reader, writer
            except BaseException:
                writer.close()
                raise
            writer.close()
    except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
        raise UnavailableError(f"{server} does not answer: {error}") from None
    raise UnavailableError(f"{server} is no NFSv4 server")


@attrs.define(eq=False)
class Relay:
    """An address of this machine for several servers.

    Attributes:
        current: the server that connections lead to now; empty as long as none has answered.
    """

    servers: tuple[str, ...]
    current: str = ""
    _listening: asyncio.Server | None = None
    _tasks: set[asyncio.Task[None]] = attrs.field(factory=set)
    _writers: set[asyncio.StreamWriter] = attrs.field(factory=set)
    _watching: asyncio.Task[None] | None = None

    async def listen(self, port: int) -> int:
        """Takes connections at a port, 0 for any; returns which.

        Raises:
            UnavailableError: it is in use.
        """
        try:
            self._listening = await asyncio.start_server(self._accepted, HOST, port, limit=BUFFER_BYTES)
        except OSError as error:
            raise UnavailableError(f"cannot listen at {HOST}:{port}: {error.strerror or error}") from None
        self._watching = asyncio.create_task(self._watch())
        return int(self._listening.sockets[0].getsockname()[1])

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._tasks) >= CONNECTIONS_MAX:
            writer.close()
            return
        self._tasks.add(task)
        try:
            with contextlib.suppress(UnavailableError, OSError):
                await self._carry(reader, writer)
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await self._found()
        both = {writer, far_writer}
        self._writers |= both
        try:
            ways = [
                asyncio.create_task(_copied(*way)) for way in ((reader, far_writer), (far_reader, writer))
            ]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for each in ways:
                each.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
        finally:
            self._writers -= both
            far_writer.close()

    async def _found(self) -> Streams:
        """A connection to the server that answers, waited for.

        Raises:
            UnavailableError: for as long as that may take none does.
        """
        deadline = asyncio.get_running_loop().time() + FIND_SECONDS
        while True:
            for server in sorted(self.servers, key=lambda each: each != self.current):
                with contextlib.suppress(UnavailableError):
                    found = await answering(server)
                    self._lead_to(server)
                    return found
            if asyncio.get_running_loop().time() > deadline:
                raise UnavailableError(f"none of {', '.join(self.servers)} answers")
            await asyncio.sleep(AGAIN_SECONDS)

    def _lead_to(self, server: str) -> None:
        """Connections lead there from now on; those that lead elsewhere end."""
        if self.current == server:
            return
        if self.current:
            log.info("volumes over NFS are reached at %s", server)
        self.current = server
        for each in list(self._writers):
            each.transport.abort()

    async def _watch(self) -> None:
        """Leaves a server that says nothing for another one that does."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if not self._writers or await _answers(self.current):
                continue
            for server in self.servers:
                if server != self.current and await _answers(server):
                    self._lead_to(server)
                    break

    async def close(self) -> None:
        """Ends it, and its connections."""
        if self._listening is not None:
            self._listening.close()
        tasks = [*self._tasks, *([] if self._watching is None else [self._watching])]
        for each in tasks:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _answers(server: str) -> bool:
    try:
        _, writer = await answering(server)
    except UnavailableError:
        return False
    writer.close()
    return True


async def _copied(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Carries bytes on until their end."""
    with contextlib.suppress(OSError):
        while data := await reader.read(BUFFER_BYTES):
            writer.write(data)
            await writer.drain()


class Relays:
    """The relays of this machine, one for each set of servers.  In one loop."""

    def __init__(self) -> None:
        """None yet."""
        self._relays: dict[tuple[str, ...], tuple[Relay, int]] = {}
        self._making = asyncio.Lock()

    async def port(self, servers: Sequence[str], wanted: int = 0) -> int:
        """The port of this machine that leads to servers; a new one is at ``wanted``, if that is not 0.

        Raises:
            UnavailableError: it is in use.
        """
        key = tuple(servers)
        async with self._making:
            if key not in self._relays:
                relay = Relay(key)
                self._relays[key] = relay, await relay.listen(wanted)
            return self._relays[key][1]

    async def close(self) -> None:
        """Ends all of them."""
        for relay, _ in self._relays.values():
            await relay.close()
        self._relays.clear()

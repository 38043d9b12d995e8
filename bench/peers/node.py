"""One of our nodes in a process of its own, with a client of the library beside it.

What to do comes as lines of JSON on standard input, ``[method, argument…]``; each gets one line, ``{"result": …}`` or
``{"error": text}``.  The node ends with its input.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import attrs
import crc32c
from blake3 import blake3

from bench.peers.load import ClosedLoop, Load, Measured, first_acknowledged, measured, run
from space._errors import SpaceError
from space._node.cluster import ClusterNode, NodeConfig
from space._node.store import Store
from space.aio import AsyncStore
from space.content.frames import HASH_BYTES, FrameRef, pack_frames
from space.events.commands import Receipt, Request, StoredFrame, WriteExtent
from space.events.ids import CapsuleId

CAPSULES: Final = 64
_ACTOR: Final = "bench"


def frame(size: int) -> StoredFrame:
    """Content that is stored as it is."""
    data = bytes(range(256)) * (size // 256)
    digest = blake3(data).digest(HASH_BYTES)
    record = FrameRef(size, size, crc32c.crc32c(data), 0, 0, 0, 0, 0, 0, digest)
    return StoredFrame(pack_frames([record]), data)


class Callbacks:
    """The library for programs without tasks: what one turn of the loop submits is handed in at once."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._loop = asyncio.get_running_loop()
        self._waiting: list[tuple[Request, Callable[[bool], None]]] = []

    def submit(self, request: Request, done: Callable[[bool], None]) -> None:
        """Calls back with whether the command was carried out."""
        if not self._waiting:
            self._loop.call_soon(self._hand_in)
        self._waiting.append((request, done))

    def _hand_in(self) -> None:
        waiting, self._waiting = self._waiting, []
        begun = self._store.begin([request for request, _ in waiting])

        def settle() -> None:
            for (_, done), outcome in zip(waiting, begun.result(), strict=True):
                done(isinstance(outcome, Receipt))

        begun.add_done_callback(lambda _: self._loop.call_soon_threadsafe(settle))


class Server:
    """What can be asked of the process."""

    def __init__(self, home: Path) -> None:
        config = NodeConfig.load(home)
        assert config is not None
        self._node = ClusterNode(home, config)
        self._store = self._node.store
        self._client = AsyncStore(self._store)
        self._offset = 0

    def leads(self) -> bool:
        """Whether this node leads."""
        return self._leader() == self._node.config.node

    def leader(self) -> int:
        """Who leads, as far as this node knows; 0 for nobody."""
        return self._leader()

    def _leader(self) -> int:
        return self._store.group.replica.driver.leader

    def voters(self) -> int:
        """How many members vote."""
        return len(self._store.group.replica.driver.configuration.voters)

    def add(self, node: int, address: str) -> None:
        """Takes another node in."""
        self._node.change_members("add", node, address)

    def lead(self) -> None:
        """Makes this node the leader."""
        self._node.change_members("lead", self._node.config.node)

    def state(self) -> list[Any]:
        """Position, digest and events of the state, once it has everything acknowledged before now."""
        self._store.confirm()
        applied = self._store.applied_now
        return [applied.position, f"{applied.digest:x}", applied.events]

    def create(self, label: str) -> list[str]:
        """Empty files to be written."""
        root = self._store.root
        return [
            str(self._store.create(parent=root, name=f"{label}-{number}".encode()))
            for number in range(CAPSULES)
        ]

    def load(self, capsules: list[str], load: dict[str, Any], tasks: bool) -> dict[str, Any]:
        """Writes at the ends of files, one event of one frame for each operation."""
        work = self._load_by_tasks if tasks else self._load_by_callbacks
        return attrs.asdict(run(work([CapsuleId.parse(name) for name in capsules], Load(**load))))

    async def _load_by_callbacks(self, capsules: list[CapsuleId], load: Load) -> Measured:
        frames = [frame(load.size)]
        client = Callbacks(self._store)

        def issue(number: int, done: Callable[[bool], None]) -> None:
            turn, at = divmod(number, CAPSULES)
            command = WriteExtent(capsules[at], turn * load.size, load.size, frames)
            client.submit(Request(command, _ACTOR), done)

        return await ClosedLoop(issue, load).run()

    async def _load_by_tasks(self, capsules: list[CapsuleId], load: Load) -> Measured:
        frames = [frame(load.size)]
        latencies: list[float] = []
        number = 0

        async def write() -> None:
            nonlocal number
            while (began := time.perf_counter()) < until:
                turn, at = divmod(number, CAPSULES)
                number += 1
                command = WriteExtent(capsules[at], turn * load.size, load.size, frames)
                await self._client.submit(Request(command, _ACTOR))
                latencies.append(time.perf_counter() - began)

        started = time.perf_counter()
        until = started + load.seconds
        await asyncio.gather(*[write() for _ in range(load.in_flight)])
        return measured(latencies, time.perf_counter() - started)

    def next_acknowledged(self, capsules: list[str]) -> float:
        """When the first of many writes, one begun every 20 ms, was acknowledged."""
        return float(run(self._next_acknowledged([CapsuleId.parse(name) for name in capsules])))

    async def _next_acknowledged(self, capsules: list[CapsuleId]) -> float:
        frames = [frame(256)]
        tasks: set[asyncio.Task[None]] = set()

        async def write(number: int, done: Callable[[bool], None]) -> None:
            try:
                command = WriteExtent(capsules[number % CAPSULES], 0, 256, frames)
                await self._client.submit(Request(command, _ACTOR))
            except SpaceError:
                done(False)
            else:
                done(True)

        def issue(number: int, done: Callable[[bool], None]) -> None:
            tasks.add(asyncio.create_task(write(number, done)))

        found = await first_acknowledged(issue)
        await asyncio.gather(*tasks)
        return found

    def close(self) -> None:
        """Ends the node."""
        self._node.close()


def main(home: str) -> None:
    """Serves until the input ends."""
    server = Server(Path(home))
    try:
        print(json.dumps({"result": "ready"}), flush=True)
        for line in sys.stdin:
            method, *arguments = json.loads(line)
            try:
                answer = {"result": getattr(server, method)(*arguments)}
            except (SpaceError, RuntimeError) as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), flush=True)
    finally:
        server.close()


if __name__ == "__main__":
    main(sys.argv[1])

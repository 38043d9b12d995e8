"""NATS JetStream as a peer: a stream of three file replicas with ``sync_interval: always``.

The client speaks the text protocol (docs.nats.io/reference/reference-protocols/nats-protocol) over one
connection to the leader of the stream: PUB with a reply subject, and an acknowledgement with a sequence for each.
A leader answers when a quorum has stored the message; with ``sync_interval: always`` storing ends in an fsync.
"""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from bench.peers.load import ClosedLoop, Load, Measured, first_acknowledged, run
from bench.peers.programs import HOST, Program, find, free_ports, wait_for

PROGRAM: Final = "nats-server"
_NODES: Final = 3
_STREAM: Final = "bench"
_CALL_SECONDS: Final = 10.0
_CONFIG: Final = """\
server_name: n{number}
listen: "{host}:{client}"
http: "{host}:{monitor}"
max_payload: 8MB
jetstream {{ store_dir: "{home}", sync_interval: always }}
cluster {{ name: bench, listen: "{host}:{peer}", routes: [{routes}] }}
"""

Done = Callable[[bytes], None]


class Client(asyncio.Protocol):
    """One connection; :meth:`request` publishes with a reply subject and calls back with the answer."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._out: list[bytes] = []
        self._calls: dict[bytes, Done] = {}
        self._number = 0

    def connection_made(self, transport: Any) -> None:
        """Introduces itself, and listens to its inbox."""
        self._transport = transport
        transport.write(
            b'CONNECT {"verbose":false,"pedantic":false,"lang":"bench","version":"1","protocol":1}\r\n'
            b"SUB _INBOX.bench.* 1\r\n"
        )

    def connection_lost(self, exc: Exception | None) -> None:
        """Whatever was published gets no answer any more."""
        self._transport = None

    def request(self, subject: bytes, payload: bytes, done: Done) -> None:
        """Publishes."""
        self._number += 1
        number = b"%d" % self._number
        self._calls[number] = done
        if not self._out:
            asyncio.get_running_loop().call_soon(self._flush)
        self._out += (
            b"PUB %b _INBOX.bench.%b %d\r\n" % (subject, number, len(payload)),
            payload,
            b"\r\n",
        )

    def _flush(self) -> None:
        out, self._out = self._out, []
        if self._transport is not None:
            self._transport.writelines(out)

    def data_received(self, data: bytes) -> None:
        """Takes whole protocol messages off what came."""
        buffer = self._buffer
        buffer += data
        at = 0
        while (end := buffer.find(b"\r\n", at)) >= 0:
            if not buffer.startswith(b"MSG ", at):
                if buffer.startswith(b"PING", at) and self._transport is not None:
                    self._transport.write(b"PONG\r\n")
                at = end + 2
                continue
            words = bytes(buffer[at:end]).split(b" ")
            stop = end + 2 + int(words[-1])
            if len(buffer) < stop + 2:
                break
            done = self._calls.pop(words[1].rpartition(b".")[2], None)
            if done is not None:
                done(bytes(buffer[end + 2 : stop]))
            at = stop + 2
        del buffer[:at]

    def close(self) -> None:
        """Ends the connection."""
        if self._transport is not None:
            self._transport.close()


async def _connect(port: int) -> Client:
    _, protocol = await asyncio.get_running_loop().create_connection(Client, HOST, port)
    return protocol


async def _ask(port: int, subject: str, body: Any) -> dict[str, Any]:
    connection = await _connect(port)
    future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    connection.request(
        subject.encode(),
        json.dumps(body).encode() if body is not None else b"",
        lambda answer: None if future.done() else future.set_result(answer),
    )
    try:
        found: dict[str, Any] = json.loads(await asyncio.wait_for(future, _CALL_SECONDS))
    except TimeoutError:
        raise RuntimeError(f"no answer to {subject}") from None
    finally:
        connection.close()
    if "error" in found:
        raise RuntimeError(f"{subject}: {found['error']}")
    return found


class Nats:
    """Three servers on this machine, and one stream."""

    name: Final = "NATS"

    def __init__(self, home: Path) -> None:
        program = find(PROGRAM)
        assert program is not None
        ports = free_ports(3 * _NODES)
        self._clients, self._monitors, peers = ports[:_NODES], ports[_NODES : 2 * _NODES], ports[2 * _NODES :]
        self._homes = [home / f"nats{number}" for number in range(_NODES)]
        self._commands: list[list[str]] = []
        routes = ", ".join(f'"nats://{HOST}:{port}"' for port in peers)
        for number in range(_NODES):
            config = home / f"nats{number}.conf"
            config.write_text(
                _CONFIG.format(
                    number=number,
                    host=HOST,
                    client=self._clients[number],
                    monitor=self._monitors[number],
                    peer=peers[number],
                    home=self._homes[number],
                    routes=routes,
                )
            )
            self._commands.append([program, "--config", str(config)])
        self._programs = [self._start(number) for number in range(_NODES)]
        self._published = 0
        try:
            wait_for("a NATS stream", self._create)
            wait_for("a NATS stream with three replicas", self._is_whole)
        except BaseException:
            self.close()
            raise

    def _start(self, number: int) -> Program:
        return Program(self._commands[number], self._homes[number])

    def _create(self) -> bool:
        wanted = {"name": _STREAM, "subjects": [_STREAM], "num_replicas": _NODES, "storage": "file"}
        run(_ask(self._clients[0], f"$JS.API.STREAM.CREATE.{_STREAM}", wanted))
        return True

    def _leader(self) -> int:
        for port in self._clients:
            try:
                found = run(_ask(port, f"$JS.API.STREAM.INFO.{_STREAM}", None))
            except (OSError, RuntimeError):
                continue
            leader = found["cluster"].get("leader", "")
            if leader:
                return int(leader[1:])
        raise RuntimeError("no NATS server leads the stream")

    def _stored(self, monitor: int) -> int:
        """Messages a server has of the stream."""
        with urllib.request.urlopen(
            f"http://{HOST}:{monitor}/jsz?streams=true", timeout=_CALL_SECONDS
        ) as answer:
            document = json.loads(answer.read())
        (account,) = document["account_details"]
        (stream,) = account["stream_detail"]
        return int(stream["state"]["messages"])

    def _is_whole(self) -> bool:
        self._leader()
        counts = {self._stored(monitor) for monitor in self._monitors}
        if len(counts) > 1:
            raise RuntimeError(f"servers have {sorted(counts)} messages")
        return counts.pop() >= self._published

    def load(self, load: Load) -> Measured:
        """Publishes at the leader of the stream; checks afterwards that every server has all of it."""
        found: Measured = run(self._load(self._clients[self._leader()], load))
        self._published += found.operations
        self.check()
        return found

    async def _load(self, port: int, load: Load) -> Measured:
        connection = await _connect(port)
        payload = bytes(range(256)) * (load.size // 256)

        def issue(_: int, done: Callable[[bool], None]) -> None:
            connection.request(_STREAM.encode(), payload, lambda answer: done(_acknowledged(answer)))

        try:
            return await ClosedLoop(issue, load).run()
        finally:
            connection.close()

    def check(self) -> None:
        """Every acknowledged message is on every server.

        Raises:
            RuntimeError: one is not.
        """
        wait_for("equal NATS servers with every acknowledged message", self._is_whole)

    def failover(self) -> float:
        """Seconds from kill -9 of the stream's leader to the next acknowledged message; it is back afterwards."""
        leader = self._leader()
        survivors = [port for number, port in enumerate(self._clients) if number != leader]
        killed = self._programs[leader].kill()
        acknowledged: float = run(self._next_acknowledged(survivors))
        self._programs[leader] = self._start(leader)
        wait_for("the return of a NATS server", self._is_whole)
        return acknowledged - killed

    async def _next_acknowledged(self, ports: list[int]) -> float:
        connections = [await _connect(port) for port in ports]

        def issue(_: int, done: Callable[[bool], None]) -> None:
            for connection in connections:
                connection.request(_STREAM.encode(), bytes(256), lambda answer: done(_acknowledged(answer)))

        try:
            return await first_acknowledged(issue)
        finally:
            for connection in connections:
                connection.close()

    def close(self) -> None:
        """Ends the servers."""
        for program in self._programs:
            program.end()


def _acknowledged(answer: bytes) -> bool:
    return b'"seq"' in answer and b'"error"' not in answer

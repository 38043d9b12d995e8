"""Others that carry the same files: rsync to a daemon, and a NATS JetStream mirror over a leaf node's connection."""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any, Final

from bench.federation.child import Child
from bench.federation.line import Route
from bench.measure import run_command
from bench.peers import nats
from bench.peers.load import run
from bench.peers.programs import Program, find, free_ports, wait_for

RSYNC: Final = "rsync"
NATS: Final = nats.PROGRAM
_STREAM: Final = "bench"
_MIRROR: Final = "mirror"
MESSAGE_BYTES_MAX: Final = 1 << 20
"""What is larger is published in pieces: NATS advises against more in a message."""

_BOUND: Final = ("setpriv", "--pdeathsig", "TERM", "--")
"""What runs a server so that it ends with a benchmark that is killed."""

_IN_FLIGHT: Final = 64
_CALL_SECONDS: Final = 60.0
_STALL_SECONDS: Final = 300.0
_CONFIG: Final = """\
server_name: {name}
listen: "{address}:{port}"
max_payload: 8MB
jetstream {{ store_dir: "{home}", domain: {name}, sync_interval: always }}
leafnodes {{ {leaf} }}
"""
_RSYNC_CONFIG: Final = """\
use chroot = no
max connections = 4
[data]
path = {path}
read only = no
uid = {uid}
gid = {gid}
"""


class Rsync:
    """A daemon at the target; each run is a client at home."""

    def __init__(self, home: Path, route: Route) -> None:
        program = find(RSYNC)
        assert program is not None
        self._program = program
        self._route = route
        self._port = free_ports(1)[0]
        self._files = home / "rsync-files"
        self._files.mkdir(parents=True)
        config = home / "rsyncd.conf"
        config.write_text(_RSYNC_CONFIG.format(path=self._files, uid=os.getuid(), gid=os.getgid()))
        target = route.target
        daemon = [program, "--daemon", "--no-detach", f"--address={target.address}", f"--port={self._port}"]
        self._daemon = Program([*target.prefix, *_BOUND, *daemon, f"--config={config}"], home / "rsyncd")
        self._runs = 0
        try:
            wait_for("an rsync daemon", self._answers)
        except BaseException:
            self.close()
            raise

    def _url(self) -> str:
        return f"rsync://{self._route.target.address}:{self._port}/data/"

    def _answers(self) -> bool:
        run_command([*self._route.home.prefix, self._program, self._url()])
        return True

    def send(self, directory: Path) -> float:
        """Seconds to bring a directory over, each file with an fsync."""
        self._runs += 1
        options = ["--archive", "--whole-file", "--inplace", "--fsync"]
        url = f"{self._url()}run{self._runs}/"
        return run_command([*self._route.home.prefix, self._program, *options, f"{directory}/", url])

    def close(self) -> None:
        """Ends the daemon."""
        self._daemon.end()


class Jetstream:
    """A server at each end, with streams of one file replica, ``sync_interval: always``."""

    def __init__(self, home: Path, route: Route) -> None:
        program = find(NATS)
        assert program is not None
        ports, leaf = free_ports(2), free_ports(1)[0]
        leaves = {
            "home": f'listen: "{route.home.address}:{leaf}"',
            "target": f'remotes: [{{ urls: ["nats://{route.home.address}:{leaf}"] }}]',
        }
        self._servers: list[Program] = []
        self._clients: list[Child] = []
        sides = {"home": route.home, "target": route.target}
        try:
            for (name, side), port in zip(sides.items(), ports, strict=True):
                config = home / f"nats-{name}.conf"
                config.write_text(
                    _CONFIG.format(
                        name=name,
                        address=side.address,
                        port=port,
                        home=home / f"nats-{name}",
                        leaf=leaves[name],
                    )
                )
                self._servers.append(
                    Program([*side.prefix, *_BOUND, program, "--config", str(config)], home / f"nats-{name}")
                )
                self._clients.append(
                    Child(
                        home / f"nats-client-{name}",
                        "bench.federation.peers:Client",
                        side.address,
                        port,
                        prefix=side.prefix,
                    )
                )
            for client in self._clients:
                client.ask("ready")
            # A mirror is refused, or waits seconds before it tries again, while the line is not up.
            self._clients[1].ask("reach", "home")
        except BaseException:
            self.close()
            raise

    def send(self, directory: Path) -> float:
        """Seconds from asking for a mirror until it has every message; publishing them is not in it."""
        home, target = self._clients
        count = home.ask("publish", str(directory))
        try:
            return float(target.ask("mirror", count))
        finally:
            target.ask("remove", _MIRROR)
            home.ask("remove", _STREAM)

    def close(self) -> None:
        """Ends the servers."""
        for client in self._clients:
            client.close()
        for server in self._servers:
            server.end()


class Client:
    """What is asked of one server, in a process beside it."""

    def __init__(self, address: str, port: int) -> None:
        self._at = address, port

    def ready(self) -> None:
        """Returns when JetStream answers."""
        wait_for("a NATS server", lambda: run(self._ask("$JS.API.INFO")))

    def reach(self, domain: str) -> None:
        """Returns when JetStream of another domain answers."""
        wait_for("a NATS leaf node", lambda: run(self._ask(f"$JS.{domain}.API.INFO", seconds=2.0)))

    def publish(self, directory: str) -> int:
        """Makes a stream of all files of a directory; how many messages that is."""
        return int(run(self._publish(sorted(Path(directory).iterdir()))))

    async def _publish(self, paths: list[Path]) -> int:
        await self._ask(f"$JS.API.STREAM.CREATE.{_STREAM}", {"name": _STREAM, "subjects": [_STREAM]})
        connection = await self._connect()
        limit, count = asyncio.Semaphore(_IN_FLIGHT), 0
        answers: list[asyncio.Future[bytes]] = []
        try:
            for path in paths:
                with path.open("rb") as file:
                    while piece := file.read(MESSAGE_BYTES_MAX):
                        await limit.acquire()
                        answers.append(_request(connection, _STREAM, piece))
                        answers[-1].add_done_callback(lambda _: limit.release())
                        count += 1
            for answer in await asyncio.gather(*answers):
                _understood(_STREAM, answer)
        finally:
            connection.close()
        return count

    def mirror(self, count: int) -> float:
        """Seconds until a new mirror has so many messages."""
        return float(run(self._mirror(count)))

    async def _mirror(self, count: int) -> float:
        wanted = {"name": _MIRROR, "mirror": {"name": _STREAM, "external": {"api": "$JS.home.API"}}}
        connection = await self._connect()
        began = time.monotonic()
        try:
            answer = await _request(
                connection, f"$JS.API.STREAM.CREATE.{_MIRROR}", json.dumps(wanted).encode()
            )
            _understood("mirror", answer)
            while time.monotonic() < began + _STALL_SECONDS:
                answer = await _request(connection, f"$JS.API.STREAM.INFO.{_MIRROR}", b"")
                if _understood("mirror", answer)["state"]["messages"] >= count:
                    return time.monotonic() - began
                await asyncio.sleep(0.005)
        finally:
            connection.close()
        raise RuntimeError("a NATS mirror does not come to its end")

    def remove(self, stream: str) -> None:
        """Removes a stream and what is in it."""
        run(self._ask(f"$JS.API.STREAM.DELETE.{stream}"))

    async def _connect(self) -> nats.Client:
        _, protocol = await asyncio.get_running_loop().create_connection(nats.Client, *self._at)
        return protocol

    async def _ask(self, subject: str, body: Any = None, seconds: float = _CALL_SECONDS) -> dict[str, Any]:
        connection = await self._connect()
        try:
            data = b"" if body is None else json.dumps(body).encode()
            answer = await asyncio.wait_for(_request(connection, subject, data), seconds)
        except TimeoutError:
            raise RuntimeError(f"no answer to {subject}") from None
        finally:
            connection.close()
        return _understood(subject, answer)

    def close(self) -> None:
        """Nothing stays."""


def _request(connection: nats.Client, subject: str, data: bytes) -> asyncio.Future[bytes]:
    future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    connection.request(
        subject.encode(), data, lambda answer: None if future.done() else future.set_result(answer)
    )
    return future


def _understood(subject: str, answer: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(answer)
    if "error" in found:
        raise RuntimeError(f"{subject}: {found['error']}")
    return found

"""Zones for tests: stores that know each other, and a link between them that can be cut."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Self

import space
from space._node.federation import Federation
from space._node.federation_zones import Zones
from space._node.store import Store
from space.policy.model import Policy, Sovereignty

PROGRAM: Final = "import sys; from space.cli import main; sys.exit(main())"
PATIENCE_SECONDS: Final = 120.0
"""After which something that was waited for is taken not to come: hangs only."""


def shared(*targets: str, priority: int = 0, **keys: Any) -> Policy:
    """A policy that ships to zones."""
    return Policy(
        sovereignty=Sovereignty.GLOBAL, federation_targets=targets, federation_priority=priority, **keys
    )


def until(holds: Callable[[], Any], what: str = "") -> Any:
    """Waits for something that comes, and returns it."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (found := holds()):
        assert time.monotonic() < deadline, f"never: {what or holds}"
        time.sleep(0.02)
    return found


def introduce(home: Store, target: Store, url: str) -> None:
    """Lets ``home`` know a zone, without asking it."""
    keys = Zones(target).keys()
    Zones(home).add(keys.identity.name, url, keys.authority.pem, None, offline=True)


class Link:
    """A TCP relay: where zones are reached in spite of restarts, and where their connections are cut."""

    def __init__(self) -> None:
        self.target: tuple[str, int] | None = None
        self.limit: Callable[[], int] = lambda: 1 << 62
        """Bytes from the client after which a connection is cut."""
        self.flip: Callable[[int], bool] = lambda _: False
        """Whether a bit of a piece that ends there is flipped."""
        self.carried = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def cut(self) -> None:
        """Hangs up on everybody, and lets nobody through."""
        self.target = None
        with self._lock:
            for each in self._open:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def heal(self, port: int) -> None:
        """Lets connections through to a port of this machine."""
        self.target = ("127.0.0.1", port)

    def _accept(self) -> None:
        while True:
            try:
                stream, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._relay, args=(stream,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _relay(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            if self.target is None:
                return
            with socket.create_connection(self.target) as server:
                with self._lock:
                    self._open |= {client, server}
                try:
                    self._pass(client, server)
                finally:
                    with self._lock:
                        self._open -= {client, server}

    def _pass(self, client: socket.socket, server: socket.socket) -> None:
        left, done = self.limit(), 0
        while left > 0:
            ready, _, _ = select.select([client, server], [], [])
            for source in ready:
                piece = source.recv(min(1 << 16, left))
                if not piece:
                    return
                if source is client:
                    left -= len(piece)
                    done += len(piece)
                    self.carried += len(piece)
                    if self.flip(done):
                        piece = piece[:-1] + bytes([piece[-1] ^ 0x10])
                (server if source is client else client).sendall(piece)

    def close(self) -> None:
        self.cut()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Two:
    """Two zones in this process, ``oslo`` and ``paris``, which know each other; links lead to both."""

    def __init__(self, path: Path, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self.paths = {name: path / name for name in ("oslo", "paris")}
        self.links = {name: stack.enter_context(Link()) for name in self.paths}
        self.stores: dict[str, Store] = {}
        for name, kind in (("oslo", "metro"), ("paris", "geo")):
            store = self._open(name)
            Zones(store).init(name, kind, self.links[name].url)
        introduce(self.oslo, self.paris, self.links["paris"].url)
        introduce(self.paris, self.oslo, self.links["oslo"].url)

    def _open(self, name: str) -> Store:
        store = self.stores[name] = space.open(self.paths[name])
        self._stack.callback(store.close)
        return store

    @property
    def oslo(self) -> Store:
        return self.stores["oslo"]

    @property
    def paris(self) -> Store:
        return self.stores["paris"]

    def serve(self, *names: str, **options: Any) -> None:
        """Has zones ship and listen."""
        for name in names or self.paths:
            running = Federation(self.stores[name], "127.0.0.1:0", chance=lambda: 0.0, **options)
            self.links[name].heal(running.port)

    def reopen(self, name: str) -> Store:
        """Closes a store and opens it again, shipping nothing yet."""
        self.links[name].cut()
        self.stores[name].close()
        return self._open(name)

    def in_step(self, home: str = "oslo", target: str = "paris") -> None:
        """Waits until a zone has all it is to have."""

        def arrived() -> bool:
            (zone,) = [each for each in self.status(home)["zones"] if each["zone"] == target]
            return bool(zone["connected"] and not zone["lag_events"] and zone["position"] >= wanted)

        wanted = self.stores[home].position
        until(arrived, f"{target} in step with {home}: {self.status(home)}")

    def status(self, name: str) -> dict[str, Any]:
        """What ``space federation status --json`` prints there."""
        from space._node.federation_status import status

        return status(self.stores[name], capsules=True)


@contextlib.contextmanager
def two_zones(path: Path) -> Iterator[Two]:
    """Two zones in this process."""
    with contextlib.ExitStack() as stack:
        yield Two(path, stack)


def space_command(*arguments: str | Path, status: int = 0, text: str = "") -> str:
    """What a command prints; with ``status`` that it has to end with."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        input=text,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == status, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout if status == 0 else done.stderr


class Served:
    """A process that serves a zone."""

    def __init__(self, data: Path, *options: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "--data", str(data), "--json", "federation", "serve", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        self.ready: dict[str, Any] = json.loads(self.process.stdout.readline())
        self.port = int(self.ready["listen"].rpartition(":")[2])

    def kill(self) -> None:
        """Ends it without giving it a chance."""
        os.kill(self.process.pid, signal.SIGKILL)
        self._wait()

    def stop(self) -> None:
        """Lets it end."""
        if self.process.poll() is None:
            self.process.terminate()
        self._wait()

    def _wait(self) -> None:
        self.process.wait(PATIENCE_SECONDS)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def served_zones(home: Path, stack: contextlib.ExitStack) -> tuple[dict[str, Path], dict[str, Served], Path]:
    """Two zones that commands made and told of each other, each served by a process.

    Returns:
        The data directories of ``oslo`` and ``paris``, what serves them, and a policy file that ships to ``paris``.
    """
    data = {name: home / name for name in ("oslo", "paris")}
    for name, path in data.items():
        space_command("--data", path, "zone", "init", name)
        (home / f"{name}.pem").write_text(space_command("--data", path, "zone", "ca"))
    at = {name: stack.enter_context(Served(path, "--listen", "127.0.0.1:0")) for name, path in data.items()}
    for name, other in (("oslo", "paris"), ("paris", "oslo")):
        reached = ("--url", f"https://127.0.0.1:{at[other].port}", "--ca", home / f"{other}.pem")
        assert other in space_command("--data", data[name], "zone", "add", other, *reached)
    policy = home / "shared.yaml"
    policy.write_text("sovereignty: global\nfederation:\n  targets: [paris]\n")
    return data, at, policy


def content_at(data: Path, path: str) -> str | None:
    """What a file of a zone is, by command; None while it cannot be had."""
    try:
        return space_command("--data", data, "get", path)
    except AssertionError:
        return None

"""A cluster of real processes whose nodes are all told to serve NFS, and an address that follows whoever does."""

from __future__ import annotations

import contextlib
import functools
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import attrs

from space._node import views
from tests.cli_support import execute
from tests.cluster_support import Node, dev, eventually, leader, serve, status
from tests.nvme_cluster import free_port

LEASE_SECONDS: Final = 5
CONFIG: Final = """views:
- view: nfs
  sources: [/]
  listen: 127.0.0.1:{port}
  squash: none
  lease: {lease}
"""


class Forwarder:
    """A TCP address whose connections lead to ``port``: a floating address, as clients know it."""

    def __init__(self) -> None:
        self.port = 0
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._lock = threading.Lock()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = ("127.0.0.1", int(self._listening.getsockname()[1]))
        threading.Thread(target=self._accept, daemon=True).start()

    def lead_to(self, port: int) -> None:
        """New connections go there, and those there are end: the address has moved."""
        with self._lock:
            self.port, pairs, self._pairs = port, self._pairs, []
        for pair in pairs:
            _end(*pair)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self.port))
                except OSError:
                    near.close()
                    continue
                threading.Thread(target=self._join, args=(near, far), daemon=True).start()

    def _join(self, near: socket.socket, far: socket.socket) -> None:
        """Two connections as one, until one of them ends."""
        with near, far:
            with self._lock:
                self._pairs.append((near, far))
            back = threading.Thread(target=_copy, args=(far, near, self.answered), daemon=True)
            back.start()
            _copy(near, far, self.asked)
            back.join()
            with self._lock, contextlib.suppress(ValueError):
                self._pairs.remove((near, far))

    def asked(self, data: bytes) -> bool:
        """Whether these bytes of a client go on; if not, the connection ends."""
        return True

    def answered(self, data: bytes) -> bool:
        """The same of bytes to a client."""
        return True

    def close(self) -> None:
        """Ends it, and its connections."""
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self.lead_to(0)


def _copy(one: socket.socket, other: socket.socket, passes: Callable[[bytes], bool]) -> None:
    with contextlib.suppress(OSError):
        while (data := one.recv(1 << 16)) and passes(data):
            other.sendall(data)
    _end(one, other)


def _end(*ends: socket.socket) -> None:
    for end in ends:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def _stands_still(pid: int) -> bool:
    """Whether every thread of a process is stopped (state T in proc(5))."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return all((each / "stat").read_text().rpartition(")")[2].split()[0] == "T" for each in threads)


@attrs.define
class Cluster:
    """Three nodes that are told to serve the tree, each at a port of its own; ``nodes`` are those that run."""

    directories: dict[int, Path]
    ports: dict[int, int]
    floating: Forwarder
    nodes: dict[int, Node] = attrs.field(factory=dict)
    stopped: set[int] = attrs.field(factory=set)

    def start(self, *numbers: int) -> None:
        """Starts nodes, all at once."""

        def one(number: int) -> None:
            config = self.directories[number].with_suffix(".yaml")
            config.write_text(CONFIG.format(port=self.ports[number], lease=LEASE_SECONDS))
            self.nodes[number] = serve(self.directories[number], "--config", config)

        threads = [threading.Thread(target=one, args=(number,)) for number in numbers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def kill(self, number: int) -> None:
        """Ends a node as a power failure does."""
        self.nodes.pop(number).kill()

    def pause(self, number: int) -> None:
        """Stops a node's process as it stands; it does nothing any more when this returns."""
        process = self.nodes[number].process
        process.send_signal(signal.SIGSTOP)
        self.stopped.add(number)
        eventually("all its threads stand still", functools.partial(_stands_still, process.pid))

    def resume(self, number: int) -> None:
        """Lets it go on."""
        self.nodes[number].process.send_signal(signal.SIGCONT)
        self.stopped.discard(number)

    def epoch(self, number: int) -> int:
        """The epoch in which a node says that it serves; 0: it does not."""
        pid = self.nodes[number].process.pid
        listed = views.listed(self.directories[number])
        return next((int(each["epoch"]) for each in listed if each["pid"] == pid), 0)

    def serving(self, *, after: int = 0) -> int:
        """The node that serves, once one does in an epoch behind ``after``; the address is there then."""

        def found() -> int:
            epochs = {each: self.epoch(each) for each in self.nodes.keys() - self.stopped}
            return next((each for each, epoch in epochs.items() if epoch > after), 0)

        number = eventually("a node serves", found)
        if self.floating.port != self.ports[number]:
            self.floating.lead_to(self.ports[number])
        return number

    def leader(self) -> int:
        """Who leads, when there is one that the running nodes agree on."""
        return leader(self._any().url)

    def lead(self, number: int) -> None:
        """Lets a node lead."""
        url = self._any().url
        outcome = execute(Path("/nowhere"), "--node", url, "cluster", "transfer-leader", str(number))
        assert outcome.status == 0, outcome.err
        eventually(f"{number} leads", lambda: status(url)[0]["leader"] == number)

    def _any(self) -> Node:
        return next(node for number, node in self.nodes.items() if number not in self.stopped)

    def url(self, number: int) -> str:
        """Where a node is asked."""
        return self.nodes[number].url

    def listens(self, number: int) -> bool:
        """Whether a node takes connections of clients."""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.ports[number])):
            return True
        return False

    def close(self) -> None:
        """Ends all of it."""
        for number in list(self.stopped):
            self.resume(number)
        for node in self.nodes.values():
            node.stop()
        self.floating.close()


@contextlib.contextmanager
def founding(home: Path) -> Iterator[Cluster]:
    """A new cluster of three; none of its nodes runs yet."""
    with dev(home, "--nodes", "3", "--insecure") as (_, found):
        directories = {each["id"]: Path(each["data"]) for each in found}
    cluster = Cluster(directories, {number: free_port() for number in directories}, Forwarder())
    try:
        yield cluster
    finally:
        cluster.close()


@functools.cache
def piece(number: int, length: int = 4096) -> bytes:
    """Bytes that no other number has."""
    return number.to_bytes(8, "big") * (length // 8)

"""A cluster of real processes for tests: started, killed, stopped, cut off from each other; ended whatever happens.

Nodes run :mod:`tests.chaos.node_process`, on loopback, or each in a network namespace of its own (joined by a bridge
in one more namespace, so that nothing of the machine's own network is touched), where packets between any two
of them can be dropped in one or both directions.  Control sockets are files: they reach across namespaces, so the
test's clients are never cut off, only nodes from each other.

The kernel ends a node when the test is gone, also when that was killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Self, TypeVar

import attrs
import pytest

from space._errors import CorruptionError, SpaceError, StorageError, UnavailableError
from space._node.cluster import NodeConfig, found, invite, join
from space.control import RemoteService, _address

ROOT: Final = Path(__file__).absolute().parents[2]
LONG: Final = os.environ.get("SPACE_CHAOS_LONG") == "1"
"""The long profile: more rounds of everything."""

HANG_SECONDS: Final = 120.0
"""A cluster that is whole again and does not go on within this time never will."""

CLIENT_SECONDS: Final = 4.0
"""How long a client waits for a node before it asks another one: longer than an election, shorter than a test."""

TROUBLE: Final = re.compile(
    r"Traceback|never retrieved|never awaited|Exception ignored|ResourceWarning|Fatal Python"
)
"""What no node says that is well, whatever is done to it."""

PEER_PORT: Final = 7420
NETWORK: Final = "10.77.0."
T = TypeVar("T")


class Client(RemoteService):
    """A control socket whose caller does not wait for ever: a stopped process answers nothing."""

    _seconds: float = CLIENT_SECONDS

    def __init__(self, path: Path, seconds: float = CLIENT_SECONDS) -> None:
        self._seconds = seconds
        super().__init__(path)

    def _connect(self) -> socket.socket:
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        stream.settimeout(self._seconds)  # also for connecting: a stopped process does not accept
        try:
            with _address(self._path) as address:
                stream.connect(address)
        except (OSError, UnavailableError) as error:
            stream.close()
            raise UnavailableError(f"nothing answers at {self._path}: {error}") from None
        return stream


_given: Final[set[int]] = set()


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on, nor is about to: each is given once."""
    found: list[int] = []
    while len(found) < count:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port not in _given:
            _given.add(port)
            found.append(port)
    return found


def run(*command: str) -> str:
    """Runs a program that has to succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def report(line: str) -> None:
    """A line for whoever reads the output of a run."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def eventually(what: str, question: Callable[[], T], seconds: float = HANG_SECONDS) -> T:
    """The first true answer to a question that is asked again and again; nodes that do not answer are no answer."""
    deadline = time.monotonic() + seconds
    last: object = None
    while time.monotonic() < deadline:
        try:
            if answer := question():
                return answer
            last = answer
        except UnavailableError as error:
            last = error
        time.sleep(0.05)
    raise AssertionError(f"still not after {seconds:.0f} s: {what}; last: {last!r}")


class Network:
    """Namespaces for nodes, and a bridge between them."""

    def __init__(self, nodes: Sequence[int]) -> None:
        self._prefix = f"spc{uuid.uuid4().hex[:6]}"
        self._made: list[str] = []
        try:
            self._hub = self._namespace("hub")
            run("ip", "-n", self._hub, "link", "add", "br0", "type", "bridge")
            run("ip", "-n", self._hub, "link", "set", "br0", "up")
            for node in nodes:
                self._plug(node)
        except BaseException:
            self.close()
            raise

    def _namespace(self, name: str) -> str:
        full = f"{self._prefix}{name}"
        run("ip", "netns", "add", full)
        self._made.append(full)
        run("ip", "-n", full, "link", "set", "lo", "up")
        return full

    def _plug(self, node: int) -> None:
        name, port = self._namespace(str(node)), f"port{node}"
        run("ip", "-n", self._hub, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
        run("ip", "-n", self._hub, "link", "set", port, "master", "br0", "up")
        run("ip", "-n", name, "addr", "add", f"{self.address(node)}/24", "dev", "eth0")
        run("ip", "-n", name, "link", "set", "eth0", "up")

    @staticmethod
    def address(node: int) -> str:
        """Address of a node."""
        return f"{NETWORK}{node}"

    def inside(self, node: int) -> list[str]:
        """How a command is run in a node's namespace."""
        return ["ip", "netns", "exec", f"{self._prefix}{node}"]

    def deafen(self, node: int, others: Sequence[int]) -> None:
        """Packets from ``others`` do not reach ``node`` any more; those of ``node`` still reach them."""
        for other in others:
            run(*self.inside(node), "iptables", "-A", "INPUT", "-s", self.address(other), "-j", "DROP")

    def part(self, ones: Sequence[int], others: Sequence[int]) -> None:
        """Nothing passes between the two sides."""
        for one in ones:
            self.deafen(one, others)
        for other in others:
            self.deafen(other, ones)

    def impair(self, node: int, loss: float) -> None:
        """Loses that share of the packets that reach a node: late and in bursts, as TCP then brings them."""
        rule = ["-m", "statistic", "--mode", "random", "--probability", str(loss), "-j", "DROP"]
        run(*self.inside(node), "iptables", "-A", "INPUT", "-i", "eth0", *rule)

    def heal(self) -> None:
        """Everything passes again."""
        for name in self._made[1:]:
            run("ip", "netns", "exec", name, "iptables", "-F", "INPUT")

    def close(self) -> None:
        """Takes the namespaces away, with all that is in them."""
        for name in reversed(self._made):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        self._made.clear()


@attrs.define
class Process:
    """One node: its directory, and its process if it runs."""

    node: int
    home: Path
    address: str
    child: subprocess.Popen[bytes] | None = None
    ended: bool = False
    """Whether its end was wanted."""

    @property
    def log(self) -> Path:
        """What it says on standard error."""
        return self.home.parent / f"node{self.node}.log"

    @property
    def told(self) -> Path:
        """What it says on standard output: its JSON lines."""
        return self.home.parent / f"node{self.node}.out"

    @property
    def runs(self) -> bool:
        """Whether its process is there."""
        return self.child is not None and self.child.poll() is None

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self.child is not None
        return self.child.pid

    def last_words(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-3000:] if self.log.exists() else ""


class Cluster:
    """Nodes 1 to ``count``, all voters, when the constructor returns."""

    def __init__(
        self,
        base: Path,
        count: int = 3,
        *,
        namespaces: bool = False,
        homes: dict[int, Path] | None = None,
        options: Sequence[str] = (),
        shards: int = 1,
        tls: bool = False,
        options_of: Callable[[int], Sequence[str]] = lambda _: (),
    ) -> None:
        """``options`` are for every node, ``options_of`` for one; in namespaces there are always certificates."""
        self._options_of = options_of
        self.base = base
        self._shards = shards
        self._options = list(options)
        self._homes = homes or {}
        self.nodes: dict[int, Process] = {}
        self.network = Network(range(1, count + 1)) if namespaces else None
        try:
            first = self._place(1)
            first.home.mkdir(parents=True, exist_ok=True)
            self.config = found(first.home, listen=first.address, tls=tls or namespaces, shards=shards)
            self.start(1)
            others = range(2, count + 1)
            for node in others:
                self._join(node)
                self.start(node, wait=False)
            for node in others:
                self.ready(node)
                self.change("add", node, self.nodes[node].address)
        except BaseException:
            self.show()
            self.close()
            raise

    # --- nodes -------------------------------------------------------------------------------------

    def _place(self, node: int) -> Process:
        home = self._homes.get(node, self.base / str(node))
        host, port = (
            ("127.0.0.1", free_ports(1)[0]) if self.network is None else (Network.address(node), PEER_PORT)
        )
        self.nodes[node] = Process(node, home, f"{host}:{port}")
        return self.nodes[node]

    def add(self, node: int) -> None:
        """A new node joins, and is a voter when this returns."""
        self._join(node)
        self.start(node)
        self.change("add", node, self.nodes[node].address)

    def _join(self, node: int) -> None:
        """The directory of a new node."""
        process = self._place(node)
        if self.config.tls:
            host = process.address.rpartition(":")[0]
            invite(self.nodes[1].home, node, process.home / "tls", hosts=[host])
        join(
            process.home,
            node=node,
            cluster=self.config.cluster,
            listen=process.address,
            shards=self._shards,
            tls=self.config.tls,
        )

    def change(self, what: str, node: int, address: str = "") -> None:
        """Changes the members through any node that answers."""

        def asked() -> bool:
            self.any(lambda client: client.probe_members(what=what, node=node, address=address), seconds=60.0)
            return True

        eventually(f"{what} {node}", asked)

    def start(self, node: int, *, wait: bool = True) -> None:
        """Starts a node's process; waits until it is ready (or says why it is not: an error)."""
        process = self.nodes[node]
        assert not process.runs
        process.ended = False
        process.told.unlink(missing_ok=True)
        inside = self.network.inside(node) if self.network is not None else []
        options = [*self._options, *self._options_of(node)]
        command = [sys.executable, "-m", "tests.chaos.node_process", str(process.home), *options]
        with process.told.open("wb") as told, process.log.open("ab") as log:
            process.child = subprocess.Popen(
                [*inside, *command],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "always::ResourceWarning"},
                stdin=subprocess.DEVNULL,
                stdout=told,
                stderr=log,
            )
        if wait:
            self.ready(node)

    def ready(self, node: int) -> None:
        """Waits until a started node answers."""
        first = self.first_words(node)
        if "failed" in first:
            self.reap(node)
            document = first["failed"]
            raise CorruptionError(f"node {node} does not start: {document}")

    def first_words(self, node: int) -> dict[str, Any]:
        """What a started node says first: that it is ready, or why it failed."""
        process = self.nodes[node]

        def heard() -> dict[str, Any] | None:
            ran = process.runs  # asked first: one that ends says why before it does
            lines = process.told.read_text().splitlines()
            if not lines:
                assert ran, f"node {node} died: {process.last_words()}"
                return None
            found_: dict[str, Any] = json.loads(lines[0])
            return found_

        found = eventually(f"node {node} is ready", heard)
        assert found is not None
        return found

    def _signal(self, node: int, number: int) -> None:
        process = self.nodes[node]
        assert process.child is not None
        process.child.send_signal(number)

    def kill(self, node: int) -> None:
        """SIGKILL."""
        self.nodes[node].ended = True
        self._signal(node, signal.SIGKILL)
        self.reap(node)

    def stop(self, node: int) -> None:
        """SIGTERM, and waits for a clean end."""
        process = self.nodes[node]
        process.ended = True
        self._signal(node, signal.SIGTERM)
        assert process.child is not None
        try:
            status = process.child.wait(HANG_SECONDS)
        except subprocess.TimeoutExpired:
            self._signal(node, signal.SIGUSR1)  # what its threads are at
            time.sleep(1.0)
            raise AssertionError(f"node {node} does not end: {process.last_words()}") from None
        self.reap(node)
        assert status == 0, (
            f"node {node} ended with {status}: {process.told.read_text()} {process.last_words()}"
        )

    def pause(self, node: int) -> None:
        """SIGSTOP: it stands still and does not know it."""
        self._signal(node, signal.SIGSTOP)

    def resume(self, node: int) -> None:
        """SIGCONT."""
        self._signal(node, signal.SIGCONT)

    def reap(self, node: int) -> None:
        """Waits for a process that has ended or is about to."""
        process = self.nodes[node]
        if process.child is not None:
            process.child.wait(HANG_SECONDS)
            process.child = None

    def forget(self, node: int) -> None:
        """A node that ended for good, with all it had."""
        process = self.nodes.pop(node)
        assert process.child is None
        for each in list(process.home.iterdir()):
            shutil.rmtree(each) if each.is_dir() else each.unlink()

    @property
    def up(self) -> list[int]:
        """Nodes whose process runs."""
        return [node for node, process in self.nodes.items() if process.runs]

    def check_alive(self) -> None:
        """Every node that was not ended by the test runs."""
        for node, process in self.nodes.items():
            if process.child is not None and process.child.poll() is not None and not process.ended:
                told = process.told.read_text()
                raise AssertionError(
                    f"node {node} ended with {process.child.returncode}: {told}\n{process.last_words()}"
                )

    # --- asking ----------------------------------------------------------------------------------

    def client(self, node: int, seconds: float = CLIENT_SECONDS) -> Any:
        """The control socket of a node."""
        process = self.nodes.get(node)
        if process is None:
            raise UnavailableError(f"node {node} is gone")
        return Client(process.home / "control.sock", seconds)

    def any(self, ask: Callable[[Any], T], *, seconds: float = CLIENT_SECONDS) -> T:
        """The answer of the first node that has one."""
        last: SpaceError = UnavailableError("no node runs")
        for node in list(self.nodes):
            try:
                return ask(self.client(node, seconds))
            except UnavailableError as error:
                last = error
        raise last

    def here(self, node: int, seconds: float = CLIENT_SECONDS) -> dict[str, Any]:
        """What a node says of itself; one that is about to end because of its disk says nothing that counts."""
        try:
            found_: dict[str, Any] = self.client(node, seconds).probe_here()
        except StorageError as error:
            raise UnavailableError(str(error)) from None
        return found_

    def position_of(self, node: int) -> int | None:
        """Where a node stands; None if it does not answer."""
        try:
            return int(self.here(node)["position"])
        except UnavailableError:
            return None

    def furthest(self, *, but: int = 0) -> int:
        """The highest position of the nodes that run, once all of them say theirs; without ``but``."""
        return eventually(
            "every node says where it stands",
            lambda: max(int(self.here(node)["position"]) for node in self.up if node != but),
        )

    def leader(self, *, but: int = 0) -> int:
        """The node that leads, once there is one; not ``but``."""

        def asked() -> int:
            best = (0, 0)
            for node in self.up:
                with contextlib.suppress(UnavailableError):
                    state = self.here(node, 1.0)
                    if state["role"] == "leader" and node != but:
                        best = max(best, (state["term"], node))
            return best[1]

        return eventually("somebody leads", asked)

    def followers(self) -> list[int]:
        """The nodes that run and do not lead."""
        leader = self.leader()
        return [node for node in self.up if node != leader]

    def settle(self) -> dict[str, Any]:
        """Waits until all nodes stand at one position; their digests must be equal there."""

        def asked() -> list[dict[str, Any]] | None:
            self.check_alive()
            states = [self.here(node) for node in self.nodes]
            quiet = len({state["position"] for state in states}) == 1 and not any(
                s["stopped"] for s in states
            )
            return states if quiet and any(state["role"] == "leader" for state in states) else None

        states = eventually("all nodes at one position", asked)
        assert states is not None
        assert len({state["digest"] for state in states}) == 1, states
        return states[0]

    def settle_one(self, node: int) -> None:
        """Waits until a node has all that is committed now and takes part."""
        goal = self.furthest()

        def asked() -> bool:
            self.check_alive()
            state = self.here(node)
            return state["position"] >= goal and not state["stopped"]

        eventually(f"node {node} at {goal}", asked)

    # --- the end ---------------------------------------------------------------------------------

    def show(self) -> None:
        """What the nodes said, for whoever looks for the reason of a failure."""
        for process in self.nodes.values():
            report(f"--- node {process.node}: {process.told.read_text() if process.told.exists() else ''}")
            report(process.last_words())

    def close(self) -> None:
        """Ends every process, at once, and takes the network away."""
        for process in self.nodes.values():
            if process.child is not None:
                with contextlib.suppress(ProcessLookupError):
                    process.child.kill()
        for node in list(self.nodes):
            self.reap(node)
        if self.network is not None:
            self.network.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            if error[0] is not None:
                self.show()
        finally:
            self.close()
        if error[0] is None:
            self.check_words()

    def check_words(self) -> None:
        """No node said what only a fault of the program makes it say."""
        for node, process in self.nodes.items():
            words = process.log.read_text(errors="replace")
            found_ = TROUBLE.search(words)
            assert found_ is None, f"node {node} said: {words[max(0, found_.start() - 500) :][:3000]}"


@contextlib.contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    """A file system of its own with little room."""
    path.mkdir(parents=True)
    run("mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(path))
    try:
        yield path
    finally:
        run("umount", "-l", str(path))


needs_network: Final = pytest.mark.requires("ip", "iptables")

__all__ = [
    "Client",
    "Cluster",
    "Network",
    "NodeConfig",
    "Process",
    "eventually",
    "needs_network",
    "report",
    "small_disk",
]

"""``space cluster dev``: a cluster on one machine, to try things out: a process for each node.

Its directory has a data directory and a log file for each node, and ``dev.json`` with the ports, which are chosen
once: started again on the same directory, it is the same cluster.  The nodes end with this process, however it
ends: each watches a pipe that this process holds open.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any, Final

import attrs

from space._errors import ConflictError, CorruptionError, SpaceError, UnavailableError, UsageError
from space._node.caller import Document
from space.control import SocketEndpoint
from space.remote import Nodes

DEV_FILE: Final = "dev.json"
MASTER_KEY_FILE: Final = "master.key"
MASTER_KEY_ENVIRONMENT: Final = "SPACE_MASTER_KEY_FILE"
_NOT_FOR_NODES: Final = ("SPACE_NODE", "SPACE_DATA", "SPACE_CERTIFICATE")
WATCH_SECONDS: Final = 0.2
START_SECONDS: Final = 120.0
"""How long the first answer of a node may take: it may have to recover or heal its log."""

END_SECONDS: Final = 40.0
RESTART_SECONDS: Final = 1.0
"""Before a node that died is started again: one that dies at once does not keep the machine busy."""

READY_BYTES_MAX: Final = 1 << 16


class Events:
    """What people, or a program, are told."""

    def ready(self, found: list[Document]) -> None:
        """All nodes vote."""

    def happened(self, event: str, node: Document, text: str) -> None:
        """A node has died or was started again; or there is something to say."""


@attrs.frozen
class _Plan:
    """What ``dev.json`` holds: ports by node."""

    peers: dict[int, int]
    http: dict[int, int]
    shards: int
    insecure: bool

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(attrs.asdict(self), indent=1))

    @classmethod
    def load(cls, path: Path) -> _Plan | None:
        try:
            found = json.loads(path.read_text())
            ports = [{int(node): int(port) for node, port in found[key].items()} for key in ("peers", "http")]
            return cls(ports[0], ports[1], int(found["shards"]), bool(found["insecure"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptionError(f"{path} is damaged: {error!r:.100}", segment=DEV_FILE) from None


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on."""
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in found:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in found]


@attrs.define
class _Child:
    """The process of a node."""

    number: int
    process: subprocess.Popen[str]
    ready: Document | None = None
    died: float = 0.0

    def document(self) -> Document:
        found = self.ready or {}
        return {"id": self.number, "pid": self.process.pid} | {
            key: found.get(key) for key in ("url", "data", "http", "peer")
        }


class DevCluster:
    """See the module's text."""

    def __init__(
        self, home: Path | None, *, nodes: int, shards: int | None, insecure: bool, restart: bool
    ) -> None:
        """``home``: where the nodes live; none for a directory that is removed at the end."""
        self._temporary = home is None
        self._home = Path(tempfile.mkdtemp(prefix="space-dev-")) if home is None else home.absolute()
        self._nodes, self._shards, self._insecure = nodes, shards, insecure
        self._restart = restart
        self._children: dict[int, _Child] = {}
        self._over = threading.Event()
        self._events = Events()

    def run(self, events: Events) -> None:
        """Starts everything, and watches it until SIGINT or SIGTERM.

        Raises:
            SpaceError: the cluster cannot be started.
        """
        self._events = events
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._over.set())
        try:
            if self._temporary:
                events.happened("note", {}, f"in {self._home}, which is removed at the end: --dir D keeps it")
            plan = self._planned()
            self._make_master_key()
            if self._begin(plan):
                events.ready([child.document() for child in self._children.values()])
                self._watch(plan)
        finally:
            self._end()
            if self._temporary:
                shutil.rmtree(self._home, ignore_errors=True)

    # --- starting --------------------------------------------------------------------------------------

    def _planned(self) -> _Plan:
        """The plan of the directory, or a new one."""
        try:
            self._home.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot make the directory {self._home}: {error.strerror}") from None
        path = self._home / DEV_FILE
        if (plan := _Plan.load(path)) is not None:
            self._check(plan)
            if len(plan.peers) >= self._nodes:
                return plan
        elif any(self._home.iterdir()):
            raise ConflictError(f"{self._home} is not empty, and holds no cluster of this kind")
        plan = self._extended(plan)
        plan.save(path)
        return plan

    def _make_master_key(self) -> None:
        """One master key for all nodes: what is encrypted through one is read through every other."""
        from space.content.keys import generate_master_key

        with contextlib.suppress(FileExistsError):
            descriptor = os.open(self._home / MASTER_KEY_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(generate_master_key(os.urandom).hex().encode() + b"\n")

    def _check(self, plan: _Plan) -> None:
        if self._shards not in (None, plan.shards):
            raise UsageError(f"--shards {self._shards}: this cluster has {plan.shards}")
        if self._insecure and not plan.insecure:
            raise UsageError("--insecure: this cluster has certificates")
        if len(plan.peers) > self._nodes:
            raise UsageError(
                f"--nodes {self._nodes}: this cluster has {len(plan.peers)}",
                hint="space cluster remove takes one away",
            )

    def _extended(self, plan: _Plan | None) -> _Plan:
        """A plan with ports for as many nodes as are wanted."""
        before = plan or _Plan({}, {}, self._shards or 1, self._insecure)
        new = [number for number in range(1, self._nodes + 1) if number not in before.peers]
        ports = free_ports(2 * len(new))
        peers, http = ports[: len(new)], ports[len(new) :]
        return attrs.evolve(
            before,
            peers=before.peers | dict(zip(new, peers, strict=True)),
            http=before.http | dict(zip(new, http, strict=True)),
        )

    def _begin(self, plan: _Plan) -> bool:
        """Starts all nodes and waits until they vote; False if it was told to end before."""
        known = [number for number in plan.peers if (self._data(number) / "node.json").exists()]
        for number in {1, *known}:
            self._start(plan, number)
        for number in {1, *known}:
            if not self._await_ready(self._children[number]):
                return False
        new = [number for number in plan.peers if number not in {1, *known}]
        for number in new:
            self._invite(plan, number)
            self._start(plan, number)
        for number in plan.peers:
            if number in new and not self._await_ready(self._children[number]):
                return False
            if number != 1 and not self._add(plan, number):
                return False
        return True

    def _data(self, number: int) -> Path:
        return self._home / f"node-{number}"

    def _start(self, plan: _Plan, number: int) -> None:
        data = self._data(number)
        command = [sys.executable, "-m", "space.cli", "--json", "--data", str(data), "serve", "--with-parent"]
        command += ["--listen", f"127.0.0.1:{plan.peers[number]}", "--http", f"127.0.0.1:{plan.http[number]}"]
        if not (data / "node.json").exists():
            if number == 1:
                command += ["--shards", str(plan.shards)]
            if plan.insecure:
                command.append("--insecure")
                if number != 1:
                    command += [
                        "--join",
                        self._cluster(),
                        "--node-id",
                        str(number),
                        "--shards",
                        str(plan.shards),
                    ]
        environment = {key: value for key, value in os.environ.items() if key not in _NOT_FOR_NODES}
        environment.setdefault(MASTER_KEY_ENVIRONMENT, str(self._home / MASTER_KEY_FILE))
        with (self._home / f"node-{number}.log").open("ab") as errors:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                process_group=0,  # Ctrl-C is for this process, which ends them in order
            )
        self._children[number] = _Child(number, process)

    def _cluster(self) -> str:
        ready = self._children[1].ready
        assert ready is not None
        return str(ready["cluster"])

    def _await_ready(self, child: _Child) -> bool:
        """Waits for the first line of a node; False if it was told to end before.

        Raises:
            UnavailableError: the node ended, or does not answer.
        """
        stream = child.process.stdout
        assert stream is not None
        lines: list[str] = []
        reader = threading.Thread(target=lambda: lines.append(_first_line(stream)), daemon=True)
        reader.start()
        deadline = time.monotonic() + START_SECONDS
        while reader.is_alive():
            reader.join(WATCH_SECONDS)
            if self._over.is_set():
                return False
            if time.monotonic() > deadline:
                raise UnavailableError(f"node {child.number} is not ready", hint=self._hint(child.number))
        try:
            child.ready = json.loads(lines[0])
        except ValueError:
            raise UnavailableError(
                f"node {child.number} ended before it was ready: {self._last_words(child.number)}",
                hint=self._hint(child.number),
            ) from None
        return True

    def _hint(self, number: int) -> str:
        return f"see {self._home / f'node-{number}.log'}"

    def _last_words(self, number: int) -> str:
        with contextlib.suppress(OSError):
            lines = (self._home / f"node-{number}.log").read_text(errors="replace").split("\n")
            return next((line for line in reversed(lines) if line), "")
        return ""

    def _invite(self, plan: _Plan, number: int) -> None:
        target = self._data(number) / "tls"
        if not plan.insecure and not (target / "node.pem").exists():
            self._ask(1).cluster_invite(target=str(target), node=number, hosts="127.0.0.1 localhost")

    def _add(self, plan: _Plan, number: int) -> bool:
        """Makes a node vote; False if it was told to end before."""
        if number in self._voters():
            return True
        failed: list[SpaceError] = []

        def work() -> None:
            try:
                self._ask(1).cluster_add(node=number, address=f"127.0.0.1:{plan.peers[number]}")
            except SpaceError as error:
                failed.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(WATCH_SECONDS)
            if self._over.is_set():
                return False
            if (dead := self._dead()) is not None:
                raise UnavailableError(f"node {dead.number} died", hint=self._hint(dead.number))
        if failed:
            raise failed[0]
        return True

    def _voters(self) -> set[int]:
        """Nodes that vote in every shard, as far as anybody knows."""
        with contextlib.suppress(SpaceError):
            shards = self._ask(1).cluster_status()["shards"]
            sets = [
                {n["id"] for n in shard["nodes"] if n["role"] in ("leader", "follower")} for shard in shards
            ]
            return set.intersection(*sets) if sets else set()
        return set()

    def _ask(self, number: int) -> Any:
        return Nodes([SocketEndpoint(self._data(number) / "control.sock")])

    # --- watching --------------------------------------------------------------------------------------

    def _dead(self) -> _Child | None:
        return next((each for each in self._children.values() if each.process.poll() is not None), None)

    def _watch(self, plan: _Plan) -> None:
        while not self._over.wait(WATCH_SECONDS):
            for child in list(self._children.values()):
                if child.process.poll() is None:
                    continue
                if not child.died:
                    child.died = time.monotonic()
                    self._tell_death(child)
                elif self._restart and time.monotonic() - child.died > RESTART_SECONDS:
                    self._revive(plan, child.number)

    def _tell_death(self, child: _Child) -> None:
        status = child.process.returncode
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with {status}"
        words = self._last_words(child.number) if status > 0 else ""
        self._events.happened(
            "died",
            {**child.document(), "status": status},
            f"node {child.number} (pid {child.process.pid}) {how}{': ' if words else ''}{words}",
        )

    def _revive(self, plan: _Plan, number: int) -> None:
        _close(self._children[number].process)
        self._start(plan, number)
        child = self._children[number]
        try:
            if self._await_ready(child):
                self._events.happened(
                    "started", child.document(), f"node {number} is pid {child.process.pid} now"
                )
        except UnavailableError as error:
            self._events.happened("note", {}, str(error))

    # --- ending ----------------------------------------------------------------------------------------

    def _end(self) -> None:
        """Ends all nodes, each cleanly if it can."""
        running = [child.process for child in self._children.values()]
        for process in running:
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + END_SECONDS
        for process in running:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            _close(process)


def _first_line(stream: IO[str]) -> str:
    try:
        return stream.readline(READY_BYTES_MAX)
    except (OSError, ValueError):
        return ""


def _close(process: subprocess.Popen[str]) -> None:
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()

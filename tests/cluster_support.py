"""Running clusters of real nodes: as ``cluster dev`` makes them, and a process for each node."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Self, TypeVar

import attrs

from tests.cli_support import Outcome, command, environment, execute, finish, start

HANG_SECONDS: Final = 120.0
"""What has not come by then never will."""

T = TypeVar("T")


def eventually(what: str, question: Callable[[], T]) -> T:
    """The first true answer to a question that is asked again and again."""
    deadline = time.monotonic() + HANG_SECONDS
    last: object = None
    while time.monotonic() < deadline:
        if answer := question():
            return answer
        last = answer
        time.sleep(0.05)
    raise AssertionError(f"still not: {what}; last: {last!r}")


@attrs.define
class Node:
    """A node as a process of this test's."""

    data: Path
    process: subprocess.Popen[str]
    ready: dict[str, Any]

    @property
    def url(self) -> str:
        return str(self.ready["url"])

    def stop(self) -> Outcome:
        """Ends it as an operator does."""
        self.process.terminate()
        return finish(self.process)

    def kill(self) -> None:
        """Ends it as a power failure does."""
        self.process.kill()
        finish(self.process)


def serve(data: Path, *arguments: str | Path) -> Node:
    """A running node; its log goes to a file beside its directory."""
    with data.with_suffix(".log").open("ab") as errors:
        process = start(
            data, "--json", "serve", "--with-parent", *arguments, stdin=subprocess.PIPE, stderr=errors
        )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, data.with_suffix(".log").read_text()[-2000:]
    return Node(data, process, json.loads(line))


@contextlib.contextmanager
def dev(home: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], list[dict[str, Any]]]]:
    """A cluster as ``cluster dev`` makes it, with what its first line says."""
    process = subprocess.Popen(
        command("--json", "cluster", "dev", "--dir", home, *arguments),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(home / "nowhere"),
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise AssertionError(f"no cluster: {finish(process).err}")
        yield process, json.loads(line)["nodes"]
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        outcome = finish(process)
    assert outcome.status == 0, outcome.err


def founded(home: Path, *arguments: str) -> list[Path]:
    """The directories of a cluster of three that was made and has ended."""
    with dev(home, "--nodes", "3", *arguments) as (_, nodes):
        return [Path(each["data"]) for each in nodes]


@contextlib.contextmanager
def running(directories: list[Path]) -> Iterator[list[Node]]:
    """A process for each directory; those that still run at the end are ended."""
    nodes: list[Node] = []
    try:
        # all at once: none gets ready before a quorum is there, nor needs to
        threads = [threading.Thread(target=lambda d=d: nodes.append(serve(d))) for d in directories]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(nodes) == len(directories)
        nodes.sort(key=lambda node: int(node.ready["node"]))
        yield nodes
    finally:
        for node in nodes:
            if node.process.poll() is None:
                node.stop()


def urls(nodes: list[Node]) -> str:
    """All nodes, for --node."""
    return ",".join(node.url for node in nodes)


def status(node: str) -> list[dict[str, Any]]:
    """Shards as ``cluster status`` shows them."""
    outcome = execute(Path("/nowhere"), "--node", node, "cluster", "status", "--json")
    assert outcome.status == 0, outcome.err
    found: list[dict[str, Any]] = outcome.json["shards"]
    return found


def leader(node: str) -> int:
    """Who leads the first shard."""
    return int(eventually("somebody leads", lambda: status(node)[0]["leader"]))


def agreed(node: str, count: int) -> bool:
    """Whether so many nodes are at the same position with the same digest."""
    found = [(each["position"], each["digest"]) for each in status(node)[0]["nodes"]]
    return len(found) == count and len(set(found)) == 1 and found[0][0] is not None


class Writer:
    """Commands one after another through any node, until told to end; every outcome is kept."""

    def __init__(self, node: str, folder: str) -> None:
        self._node = node
        self._folder = folder
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._write)
        self.outcomes: list[Outcome] = []
        self.written: list[str] = []

    def _write(self) -> None:
        source = Path(__file__)
        number = 0
        while not self._over.is_set():
            number += 1
            name = f"{self._folder}/{number:04d}"
            steps = [("put", source, "--name", f"{name}.new"), ("mv", f"{name}.new", name)]
            for step in steps:
                outcome = execute(Path("/nowhere"), "--node", self._node, *step)
                self.outcomes.append(outcome)
            self.written.append(Path(name).name)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def wait(self, count: int) -> None:
        """Returns when that many more commands have ended."""
        wanted = len(self.outcomes) + count
        eventually(f"{count} more commands", lambda: len(self.outcomes) >= wanted)

    def failed(self) -> list[str]:
        """What went wrong."""
        return [each.err for each in self.outcomes if each.status]

"""A cluster of real processes whose nodes all serve one NVMe subsystem."""

from __future__ import annotations

import contextlib
import functools
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import attrs

from space._node import views
from tests.cli_support import execute
from tests.cluster_support import Node, dev, eventually, leader, serve, status
from tests.nvme_initiator import Host

BLOCK: Final = 4096


def free_port() -> int:
    """A port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@attrs.define
class Cluster:
    """Three nodes that serve /disk, each at a port of its own; ``nodes`` are those that run."""

    directories: dict[int, Path]
    ports: dict[int, int]
    nodes: dict[int, Node] = attrs.field(factory=dict)

    def start(self, *numbers: int) -> None:
        """Starts nodes, all at once."""

        def one(number: int) -> None:
            config = self.directories[number].with_suffix(".yaml")
            config.write_text(
                f"views:\n- view: nvme\n  sources: [/disk]\n  listen: 127.0.0.1:{self.ports[number]}\n"
            )
            self.nodes[number] = serve(self.directories[number], "--config", config)

        threads = [threading.Thread(target=one, args=(number,)) for number in numbers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for number in numbers:
            eventually(f"node {number} serves", functools.partial(self.nqn, number))

    def kill(self, *numbers: int) -> None:
        """Ends nodes as a power failure does."""
        for number in numbers:
            self.nodes.pop(number).kill()

    def nqn(self, number: int) -> str:
        """The subsystem a node serves; empty until it does."""
        pid = self.nodes[number].process.pid
        listed = views.listed(self.directories[number])
        return next((str(each["nqn"]) for each in listed if each["pid"] == pid), "")

    def leader(self) -> int:
        """Who leads, when there is one that all running nodes agree on."""
        return leader(next(iter(self.nodes.values())).url)

    def lead(self, number: int) -> None:
        """Lets a node lead."""
        node = next(iter(self.nodes.values())).url
        outcome = execute(Path("/nowhere"), "--node", node, "cluster", "transfer-leader", str(number))
        assert outcome.status == 0, outcome.err
        eventually(f"{number} leads", lambda: status(node)[0]["leader"] == number)

    async def connect(self, number: int, **options: Any) -> Host:
        """A host's path through a node."""
        return await Host.connect(self.ports[number], self.nqn(1), **options)


@contextlib.contextmanager
def founding(home: Path, *, size: str) -> Iterator[Cluster]:
    """A new cluster of three with a block device /disk; none of its nodes runs yet."""
    with dev(home, "--nodes", "3", "--insecure") as (_, found):
        directories = {each["id"]: Path(each["data"]) for each in found}
        made = execute(
            Path("/nowhere"), "--node", found[0]["url"],
            "create", "--size", size, "--block-size", str(BLOCK), "--name", "/disk",
        )  # fmt: skip
        assert made.status == 0, made.err
    cluster = Cluster(directories, {number: free_port() for number in directories})
    try:
        yield cluster
    finally:
        for node in cluster.nodes.values():
            node.stop()

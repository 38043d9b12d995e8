"""A cluster of real processes that owns volumes, with a controller that asks it, and what an orchestrator does."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import attrs

from space._node import views
from space._node.caller import Caller
from space.projections.csi.pb import csi_pb2 as pb
from space.remote import connect
from tests.cli_support import command, environment, execute
from tests.cluster_support import Node, dev, eventually, leader, serve, status
from tests.csi_client import Client, device, tree
from tests.nvme_cluster import free_port

LEASE_SECONDS: Final = 5
CONFIG: Final = """views:
- view: csi
  nvme: 127.0.0.1:{nvme}
  nfs: 127.0.0.1:{nfs}
  advertise: {advertise}
  lease: {lease}
"""
MANY: Final = pb.VolumeCapability.AccessMode.MULTI_NODE_MULTI_WRITER


@attrs.define
class Cluster:
    """Three nodes that serve volumes, each at ports of its own; ``nodes`` are those that run."""

    home: Path
    directories: dict[int, Path]
    ports: dict[int, tuple[int, int]]
    advertise: str
    nodes: dict[int, Node] = attrs.field(factory=dict)
    _controller: subprocess.Popen[bytes] | None = None
    _client: Client | None = None

    # --- nodes -------------------------------------------------------------------------------------

    def start(self, *numbers: int) -> None:
        """Starts nodes, all at once, and waits until their devices are served."""

        def one(number: int) -> None:
            nvme, nfs = self.ports[number]
            config = self.directories[number].with_suffix(".yaml")
            told = {"nvme": nvme, "nfs": nfs, "advertise": self.advertise, "lease": LEASE_SECONDS}
            config.write_text(CONFIG.format(**told))
            self.nodes[number] = serve(self.directories[number], "--config", config)

        threads = [threading.Thread(target=one, args=(number,)) for number in numbers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for number in numbers:
            eventually(f"node {number} serves", functools.partial(self.views, number, "nvme"))

    def views(self, number: int, transport: str) -> list[dict[str, Any]]:
        """What a node serves over a transport now."""
        pid = self.nodes[number].process.pid
        name = f"csi-{transport}-{pid}"
        return [each for each in views.listed(self.directories[number]) if each["name"] == name]

    def kill(self, number: int) -> None:
        """Ends a node as a power failure does."""
        self.nodes.pop(number).kill()

    def leader(self) -> int:
        """Who leads, when there is one that the running nodes agree on."""
        return leader(self._any())

    def lead(self, number: int) -> None:
        """Lets a node lead."""
        outcome = execute(Path("/nowhere"), "--node", self._any(), "cluster", "transfer-leader", str(number))
        assert outcome.status == 0, outcome.err
        eventually(f"{number} leads", lambda: status(self._any())[0]["leader"] == number)

    def serving(self, *, after: int = 0) -> int:
        """The node that serves trees, once one does in an epoch behind ``after``."""
        return eventually(
            "a node serves trees", lambda: next((each for each in self.nodes if self.epoch(each) > after), 0)
        )

    def epoch(self, number: int) -> int:
        """The epoch in which a node says that it serves trees; 0: it does not."""
        return next((int(each["epoch"]) for each in self.views(number, "nfs")), 0)

    def _any(self) -> str:
        return next(iter(self.nodes.values())).url

    def ask(self, *numbers: int) -> Any:
        """The calls of nodes, of all of them if none is named; a caller has one at a time, so each thread its own."""
        chosen = [f"unix://{self.directories[each]}/control.sock" for each in numbers or self.directories]
        return connect(",".join(chosen), caller=Caller())

    # --- the controller ------------------------------------------------------------------------------

    @property
    def socket(self) -> Path:
        """Where the controller answers."""
        return self.home / "controller.sock"

    @property
    def client(self) -> Client:
        """The controller's calls."""
        if self._client is None:
            with (self.home / "controller.log").open("ab") as log:
                self._controller = subprocess.Popen(
                    command(
                        *(
                            "--node",
                            ",".join(f"unix://{each}/control.sock" for each in self.directories.values()),
                        ),
                        *("csi", "--mode", "controller", "--endpoint", f"unix://{self.socket}"),
                    ),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=environment(self.home / "nowhere"),
                )
            assert self._controller.stdout is not None
            assert self._controller.stdout.readline(), (self.home / "controller.log").read_text()
            self._client = Client(self.socket, seconds=120.0)
        return self._client

    def create(self, name: str, transport: str, size: int, **more: Any) -> pb.Volume:
        """Makes a volume."""
        kind = tree if transport == "nfs" else device
        made: pb.Volume = self.client.CreateVolume(
            name=name,
            capacity_range=pb.CapacityRange(required_bytes=size),
            volume_capabilities=[kind()],
            parameters={"transport": transport},
            **more,
        ).volume
        return made

    def attach(self, volume: pb.Volume, node: str) -> dict[str, str]:
        """Publishes a volume on a node; what that node is told."""
        how = (tree if volume.volume_context["transport"] == "nfs" else device)(MANY)
        answer = self.client.ControllerPublishVolume(
            volume_id=volume.volume_id, node_id=node, volume_capability=how
        )
        return dict(answer.publish_context)

    def detach(self, volume: pb.Volume, node: str) -> None:
        """Takes it away again."""
        self.client.ControllerUnpublishVolume(volume_id=volume.volume_id, node_id=node)

    def close(self) -> None:
        """Ends all of it."""
        if self._client is not None:
            self._client.close()
        if self._controller is not None:
            self._controller.terminate()
            self._controller.communicate()
        for node in self.nodes.values():
            node.stop()


@contextlib.contextmanager
def founding(home: Path, *, advertise: str = "127.0.0.1") -> Iterator[Cluster]:
    """A new cluster of three; all of its nodes run."""
    with dev(home / "nodes", "--nodes", "3", "--insecure") as (_, found):
        directories = {each["id"]: Path(each["data"]) for each in found}
    ports = {number: (free_port(), free_port()) for number in directories}
    cluster = Cluster(home, directories, ports, advertise)
    try:
        cluster.start(*directories)
        cluster.leader()
        yield cluster
    finally:
        cluster.close()

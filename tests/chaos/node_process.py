"""One node of a test's cluster, as a process of its own, with what a test needs beside the operations of users.

``python -m tests.chaos.node_process HOME [--retained N] [--segment-bytes N] [--checkpoint-gain N]
[--federation HOST:PORT]`` runs the node whose directory is HOME until SIGTERM, or until the test is gone.  It prints
one JSON line when it is ready, and one if it fails.

The control socket answers everything :class:`space._node.service.Service` has, and the methods of :class:`Probe`:
raw commands with the client's own id and sequence (so that a retry on another node can be told from a new
command), what the store holds as digests, what the log holds, and ways to do damage.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import functools
import json
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from blake3 import blake3

import space._node.cluster as cluster_module
import space.replication.node as node_module
from space._errors import NotFoundError, SpaceError, error_document
from space._node.cluster import ClusterNode, NodeConfig
from space._node.federation_calls import KeptFederation
from space._node.member import Member
from space._node.mounts import Mounts
from space._node.node_target import NodeTarget
from space._node.serve import RETIRE_SECONDS
from space._node.service import Service
from space.control import ControlServer
from space.events.codec import decode_batch
from space.events.command_codec import decode_requests
from space.events.commands import Receipt, Request
from space.events.ids import CapsuleId
from space.events.types import Kind, ShipmentReceived
from space.replication.driver import Settings
from space.statemachine.tables import CAPSULE, CapsuleRow

PR_SET_PDEATHSIG: Final = 1  # prctl(2)
Document = dict[str, Any]
running: list[ClusterNode] = []


class Probe(Service):
    """What tests ask of a node; its methods are lent to :class:`Service` in this process."""

    store: Member

    def probe_execute(self, *, requests: list[Any]) -> Document:
        """Carries out encoded requests under the client ids they carry; an outcome for each."""
        return {"outcomes": _outcomes(self.store, decode_requests(requests, []))}

    def probe_write(
        self, *, descriptor: int, capsule: str, offset: int, client: bytes, sequence: int
    ) -> Document:
        """Writes what ``descriptor`` holds at an offset; extent n of it has sequence + n."""
        # where the file stands is shared with a node that was asked before, and given up
        data = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
        found = CapsuleId.parse(capsule)
        with self.store.relaxed(math.inf):
            key, policy = self.store.stat(found).key, self.store.policy(found)
            commands = self.store.encode_extents(found, offset, data, policy, key)
        requests = [Request(each, "chaos", client, sequence + n) for n, each in enumerate(commands)]
        return {"outcomes": _outcomes(self.store, requests)}

    def probe_status(self) -> Document:
        """The cluster as this node sees it."""
        return running[0].status()

    def probe_members(self, *, what: str, node: int, address: str = "") -> Document:
        """Adds, removes, or lets lead."""
        running[0].change_members(what, node, address)
        return {}

    def probe_here(self) -> Document:
        """Position and digest of the state as it stands here, and what this node is; asks nobody."""
        applied = self.store.applied_now
        group = self.store.group
        return {
            "position": applied.position,
            "digest": f"{applied.digest:064x}",
            "role": group.replica.role.value,
            "leader": group.replica.driver.leader,
            "term": group.replica.driver.term,
            "stopped": group.stopped,
            "differences": list(running[0].node.differences),
        }

    def probe_inventory(self) -> Iterator[Document]:
        """Everything below the root as it stands here, file bytes as digests."""
        with self.store.stale():
            for path, stat in self.store.walk(self.store.resolve("/")):
                document: Document = {"path": path.decode(), "id": str(stat.id), "kind": stat.kind.name}
                document["xattrs"] = {k.decode(): v.decode() for k, v in self.store.xattrs(stat.id).items()}
                if stat.kind == Kind.FILE:
                    hasher = blake3()
                    for piece in self.store.stream(stat.id):
                        hasher.update(piece)
                    document |= {"size": stat.size, "digest": hasher.hexdigest()}
                yield document

    def probe_audit(self) -> Iterator[Document]:
        """For each applied batch its chain link, and client id and sequence of each command in it."""
        last = self.store.applied_now.position
        for record in self.store.wal.records(max(1, self.store.wal.first_index), last + 1):
            done = [[entry.client, entry.sequence] for entry in decode_batch(record.metadata) if entry.client]
            yield {"position": record.index, "chain": record.chain, "term": record.term, "commands": done}

    def probe_shipments(self) -> Iterator[Document]:
        """What came from other zones, as the log here has it: where each stream stood before, and after."""
        last = self.store.applied_now.position
        for record in self.store.wal.records(max(1, self.store.wal.first_index), last + 1):
            for entry in decode_batch(record.metadata):
                for _, event in entry.events:
                    if isinstance(event, ShipmentReceived):
                        yield {
                            "stream": [event.zone, event.shard, event.lane],
                            "from": event.from_position,
                            "through": [event.through_position, event.step],
                            "position": record.index,
                        }

    def probe_checkpoint(self) -> Document:
        """Makes a checkpoint now."""
        self.store.checkpoint()
        return {}

    def probe_rot(self, *, capsule: str) -> Document:
        """Changes the row of a capsule behind everybody's back, as bad memory would."""
        found = CapsuleId.parse(capsule)
        with self.store._tables.write() as txn:
            raw = txn.get(CAPSULE, found)
            if raw is None:
                raise NotFoundError(f"no capsule {capsule}")
            row = CapsuleRow.decode(raw)
            row.uid ^= 4
            txn.put(CAPSULE, found, row.encode())
        return {}


def _outcomes(store: Member, requests: list[Request]) -> list[Any]:
    return [
        [each.position, each.repeated] if isinstance(each, Receipt) else error_document(each)
        for each in store.execute_all(requests)
    ]


def lend_probes() -> None:
    """Makes the methods of :class:`Probe` callable through the control socket of this process."""
    for name, method in vars(Probe).items():
        if name.startswith("probe_"):
            setattr(Service, name, method)


def tell(document: Document) -> None:
    """A line for the test."""
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


def end_with_parent() -> None:
    """Has the kernel kill this process when the thread that started it is gone: also while it is stopped."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> int:
    """Runs the node."""
    parser = argparse.ArgumentParser()
    parser.add_argument("home", type=Path)
    parser.add_argument("--retained", type=int, default=Settings().retained)
    parser.add_argument("--segment-bytes", type=int, default=0)
    parser.add_argument("--checkpoint-gain", type=int, default=0)
    parser.add_argument("--federation", default="")
    options = parser.parse_args()
    end_with_parent()
    faulthandler.register(signal.SIGUSR1)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    if options.segment_bytes:
        vars(cluster_module)["Member"] = functools.partial(Member, segment_bytes=options.segment_bytes)
    if options.checkpoint_gain:
        vars(node_module)["CHECKPOINT_GAIN"] = options.checkpoint_gain
    lend_probes()
    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    config = NodeConfig.load(options.home)
    assert config is not None
    try:
        node = ClusterNode(options.home, config, settings=Settings(retained=options.retained))
    except SpaceError as error:
        tell({"failed": error_document(error)})
        return 1
    running.append(node)
    mounts = Mounts(options.home)
    federation = KeptFederation(node.store, options.federation) if options.federation else None
    with ControlServer(NodeTarget(node, mounts)) as server, node, contextlib.closing(mounts):
        tell({"ready": config.node, "pid": os.getpid(), "position": node.store.applied_now.position})
        while not over.wait(0.05) and not node.ended.is_set():
            pass
        if federation is not None:
            federation.retire(RETIRE_SECONDS)
        server.retire(RETIRE_SECONDS)  # calls that wait for a leader end with the node, not before it
    if federation is not None:
        federation.close()
    if node.failure is not None and not over.is_set():
        tell({"failed": error_document(node.failure)})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Our cluster: three nodes, each in a process of its own (:mod:`bench.peers.node`).

A write is acknowledged when its batch is committed, which is on a quorum with fdatasync, and applied where the
client is.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

import attrs

from bench.peers.load import Load, Measured
from bench.peers.programs import HOST, Asked, Program, free_ports, wait_for
from space._node.cluster import TLS, NodeConfig, found, invite, join

_NODES: Final = 3


class _Member(Asked):
    """One node's process, and how to talk to it."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self.program = self._start()
        self.answer()

    def _start(self) -> Program:
        return Program([sys.executable, "-m", "bench.peers.node", str(self._home)], self._home, talk=True)

    def restart(self) -> None:
        """Starts it again after it was killed."""
        self.program = self._start()
        self.answer()


class Ours:
    """Three of our nodes on this machine."""

    def __init__(self, home: Path, *, tls: bool = False) -> None:
        homes = [home / f"{'tls' if tls else 'plain'}{number}" for number in range(1, _NODES + 1)]
        addresses = [f"{HOST}:{port}" for port in free_ports(_NODES)]
        first: NodeConfig = found(homes[0], listen=addresses[0], tls=tls)
        self._members = [_Member(homes[0])]
        self._labels = 0
        try:
            for node in range(2, _NODES + 1):
                path, address = homes[node - 1], addresses[node - 1]
                if tls:
                    invite(homes[0], node, path / TLS, hosts=[HOST])
                join(path, node=node, cluster=first.cluster, listen=address, tls=tls)
                self._members.append(_Member(path))
                self._members[0].ask("add", node, address)
            self._probes = self._members[self._leading()].ask("create", "probe")
        except BaseException:
            self.close()
            raise

    def _leading(self) -> int:
        def find() -> list[int]:
            return [number for number, member in enumerate(self._members) if member.ask("leads")]

        found_ = wait_for("a leader of ours", find)
        return int(found_[0])

    def load(self, load: Load, *, follower: bool = False, tasks: bool = False) -> Measured:
        """Writes from a client in the leader's process or in a follower's; checks every node afterwards.

        The client works with callbacks, as those of the peers do, or with a task for each operation in flight.
        """
        leader = self._leading()
        client = self._members[(leader + 1) % _NODES if follower else leader]
        self._labels += 1
        capsules = client.ask("create", f"load{self._labels}")
        before = self._states()[0][2]
        figures = Measured(**client.ask("load", capsules, attrs.asdict(load), tasks))
        after = self._states()[0][2]
        if after - before != figures.operations:
            raise RuntimeError(f"{figures.operations} acknowledged writes, and {after - before} events")
        return figures

    def _states(self) -> list[list[Any]]:
        """Position, digest and events of each node.

        Raises:
            RuntimeError: they are not the same.
        """
        states = wait_for("equal positions", self._at_one_position)
        if any(state != states[0] for state in states):
            raise RuntimeError(f"nodes differ: {states}")
        return list(states)

    def _at_one_position(self) -> list[list[Any]]:
        states = [member.ask("state") for member in self._members]
        return states if len({state[0] for state in states}) == 1 else []

    def failover(self) -> float:
        """Seconds from kill -9 of the leader to the next acknowledged write; the node is back afterwards."""
        leader = self._leading()
        killed = self._members[leader].program.kill()
        survivors = [member for number, member in enumerate(self._members) if number != leader]
        for member in survivors:
            member.tell("next_acknowledged", self._probes)
        acknowledged = min(member.answer() for member in survivors)
        self._members[leader].restart()
        self._states()
        return float(acknowledged) - killed

    def close(self) -> None:
        """Ends the nodes."""
        for member in self._members:
            member.program.end()

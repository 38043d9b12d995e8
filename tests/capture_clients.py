"""Clients of a zone's views, inside the namespace whose traffic is captured.

    python -m tests.capture_clients < PLAN

The plan is JSON: ``before`` and ``after`` (commands), and in between ``nfs`` (port, and files with the content to be
written there) and ``nvme`` (port, subsystem and, for each namespace, content).  Everything is read back, and the last
line is ``done``.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any, Final

from space.cli import run
from tests.nfs_client import Client
from tests.nvme_initiator import Host

BLOCK_BYTES: Final = 4096


def by_command(commands: list[list[str]]) -> None:
    """What users type, in one process: to start one for each takes longer than all they do."""
    for command in commands:
        status = run(command)
        assert status == 0, command


def over_nfs(plan: dict[str, Any]) -> None:
    """Writes and reads files."""
    with Client(("127.0.0.1", plan["port"])) as client:
        for path, content in plan["files"].items():
            data = bytes.fromhex(content)
            file = client.create(path)
            for at in range(0, len(data), 1 << 15):
                file.write(at, data[at : at + (1 << 15)])
            assert b"".join(file.read(at, 1 << 15) for at in range(0, len(data), 1 << 15)) == data
            file.close()


async def over_nvme(plan: dict[str, Any]) -> None:
    """Writes and reads blocks."""
    async with await Host.connect(plan["port"], plan["subsystem"]) as host:
        for nsid, content in plan["namespaces"].items():
            data = bytes.fromhex(content)
            for at in range(0, len(data), 8 * BLOCK_BYTES):
                piece = data[at : at + 8 * BLOCK_BYTES]
                lba, count = at // BLOCK_BYTES, len(piece) // BLOCK_BYTES
                await host.queues[0].write(int(nsid), lba, piece, BLOCK_BYTES)
                assert await host.queues[0].read(int(nsid), lba, count, BLOCK_BYTES) == piece
            await host.queues[0].flush(int(nsid))


if __name__ == "__main__":
    wanted = json.load(sys.stdin)
    by_command(wanted["before"])
    over_nfs(wanted["nfs"])
    asyncio.run(over_nvme(wanted["nvme"]))
    by_command(wanted["after"])
    sys.stdout.write("done\n")

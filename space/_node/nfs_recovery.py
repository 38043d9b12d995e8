"""What an NFS server has to remember over a restart, in the log of the store it serves.

Who holds opens and locks is known to everybody who replays the log, so whichever node serves the store next knows
whom to let claim them again (RFC 8881 §8.4.2.1), and in which epoch.
"""

from __future__ import annotations

import asyncio

from space._errors import SpaceError
from space._node.store import Store
from space.events import commands as cmd
from space.events.commands import Request
from space.projections.nfs.service import Recovery
from space.statemachine.apply import nfs_epoch_counter, nfs_server_key
from space.statemachine.tables import COUNTER, NFS_CLIENT, U64

ACTOR = "nfs"
_VERIFIER_BYTES = 8


def epoch_of(store: Store, server: str) -> int:
    """In which epoch a server is: how often it was started."""
    with store._read() as txn:
        (epoch,) = U64.unpack(txn.get(COUNTER, nfs_epoch_counter(server)) or bytes(U64.size))
    return int(epoch)


def recorded_clients(store: Store, server: str) -> dict[bytes, bytes]:
    """Who may claim state of a server: the owner's verifier by owner."""
    with store._read() as txn:
        rows = [bytes(row) for _, row in txn.scan(NFS_CLIENT, nfs_server_key(server))]
    return {row[_VERIFIER_BYTES:]: row[:_VERIFIER_BYTES] for row in rows}


class StoreRecovery(Recovery):
    """The recovery journal of one server of a store."""

    def __init__(self, store: Store, server: str) -> None:
        """Begins the server's next epoch; blocks until that is durable: not for a loop.

        Raises:
            SpaceError: it could not be logged.
        """
        self._store = store
        self._server = server
        self._queued: list[cmd.Command] = []
        store.execute(cmd.StartNfsServer(server), actor=ACTOR)
        super().__init__(epoch_of(store, server), recorded_clients(store, server))

    @property
    def dirty(self) -> bool:
        """Whether something waits to be durable, or is on its way."""
        return bool(self._queued)

    def record(self, owner: bytes, verifier: bytes) -> None:
        """A client may hold state from now on."""
        self._queued.append(cmd.RecordNfsClient(self._server, owner, verifier))

    def forget(self, owner: bytes) -> None:
        """What a client held is gone."""
        self._queued.append(cmd.ForgetNfsClient(self._server, owner))

    async def sync(self) -> None:
        """Makes all of it durable; what cannot be logged now is tried again the next time.

        Raises:
            SpaceError: it could not be logged.
        """
        requests = [Request(each, ACTOR) for each in self._queued]
        if not requests:
            return
        for outcome in await asyncio.to_thread(self._store.execute_all, requests):
            if isinstance(outcome, SpaceError):
                raise outcome
        del self._queued[
            : len(requests)
        ]  # only now: until then nobody must think that there is nothing to wait for

"""The way back: calls of the server to its clients (RFC 8881 §2.10.3, §20), over the connections they opened; no I/O.

A call takes a slot of a session's back channel, is sent on one of the session's connections and answered there.  A
connection that breaks takes nothing with it: the call is sent again, same slot and number, on the next one.  What a
client does not answer in time is reported to it in SEQUENCE (the path is down) and to whoever wanted the call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from space.projections.nfs.compound import Stateid

if TYPE_CHECKING:
    from space.projections.nfs.service import Service
    from space.projections.nfs.sessions import Client


class Callbacks:
    """Calls to clients, waiting and under way."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def recall(self, client: Client, stateid: Stateid, handle: bytes, *, truncate: bool, now: float) -> None:
        """CB_RECALL: wants a delegation back.

        What comes of it: the client returns it by DELEGRETURN, or ``state.recall_failed(client, stateid, now)`` is
        called, because nobody could be asked or the answer was no.
        """

    def notify_lock(self, client: Client, handle: bytes, owner: bytes, *, now: float) -> None:
        """CB_NOTIFY_LOCK: a lock the client's owner was denied may be free now; only a hint, so nothing comes back."""

    def offload_done(
        self, client: Client, stateid: Stateid, handle: bytes, *, status: int, count: int, stable: int, now: float
    ) -> None:
        """CB_OFFLOAD: an asynchronous COPY has ended, with ``count`` bytes done of it so far."""

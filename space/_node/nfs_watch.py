"""Tells an NFS server what others change in its store, so that clients give back delegations of it.

Others are whoever is not a client of that server: a mount, a block device, a program that uses the store, another
node.  They do not wait: a change is seen here as soon as it is in the log, and the recall follows it.  So a client
with a delegation may serve what it knows for as long as the recall is on its way, as it may without a delegation for
as long as it caches attributes.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Final

from space.events import types as ev
from space.events.codec import Entry
from space.events.ids import CapsuleId
from space.projections.nfs.state import State

_CHANGES: Final = (
    *(ev.ExtentWritten, ev.RangeDeallocated, ev.RangeCopied, ev.CapsuleResized, ev.AttributesChanged),
    *(ev.XattrSet, ev.XattrRemoved, ev.NameLinked, ev.NameUnlinked, ev.CapsuleRenamed, ev.NamesExchanged),
    ev.CapsuleDeleted,
)
"""Events that a client with a delegation must hear of."""

NFS_ACTOR: Final = "nfs:"


class Watch:
    """A watcher of a store (:attr:`space._node.store.Store.watchers`) on behalf of a server.

    What is waiting to be told is bounded by the number of delegations: nothing else is kept.
    """

    def __init__(
        self,
        state: State,
        *,
        own: Callable[[Entry], bool] | None = None,
        now: Callable[[], float] | None = None,
    ) -> None:
        """Watches for the server of ``state``, on the running loop.

        ``own`` says whether the server itself asked for a change; it has recalled what that conflicts with already.
        ``now`` is the server's clock.
        """
        self._state = state
        self._own = own or (lambda entry: entry.actor.startswith(NFS_ACTOR))
        self._loop = asyncio.get_running_loop()
        self._now = now or self._loop.time
        self._lock = threading.Lock()
        self._changed: set[bytes] = set()

    def __call__(self, entries: Sequence[Entry]) -> None:
        found = {
            capsule
            for entry in entries
            if not self._own(entry)
            for _, event in entry.events
            for capsule in _changed(event)
            if self._state.is_delegated(capsule)
        }
        if not found:
            return
        with self._lock:
            scheduled = bool(self._changed)
            self._changed |= found
        if not scheduled and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._tell)

    def _tell(self) -> None:
        with self._lock:
            changed, self._changed = self._changed, set()
        for capsule in changed:
            self._state.changed_elsewhere(CapsuleId(capsule), self._now())


def _changed(event: ev.Event) -> Sequence[bytes]:
    """The files an event changes, or one of their names."""
    if not isinstance(event, _CHANGES):
        return ()
    if isinstance(event, ev.CapsuleRenamed):
        return event.capsule, event.replaced
    if isinstance(event, ev.NamesExchanged):
        return event.capsule, event.other
    return (event.capsule,)

"""Views and policies: what must not be seen from where a view can be reached is not shown, and the log says so."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

from space._errors import RefusedError, SpaceError, Status
from space.events import commands as cmd
from space.events.commands import Durability
from space.events.ids import CapsuleId
from space.policy.enforce import Reach, reach_of, view_refusal
from space.policy.model import Sovereignty
from space.statemachine.tables import POLICY, U32

if TYPE_CHECKING:
    from collections.abc import Iterable

    from space._node.reading import Reading

NOTED_MAX: Final = 1024
"""Refusals one view puts into the log: once for each capsule, and no more if there are ever so many."""


class ViewPolicy:
    """What one view may show.

    Args:
        reading: the store, or a past moment of it.
        view: "nfs", "nvme", …
        host: where it listens; None: on this machine alone.
    """

    def __init__(self, reading: Reading, view: str, host: str | None) -> None:
        self._reading = reading
        self._view = view
        self._reach = Reach.MACHINE if host is None else reach_of(host)
        self._noted: set[CapsuleId] = set()

    def check(self, capsule: CapsuleId) -> None:
        """Refuses a capsule the view must not show.

        Raises:
            RefusedError: its policy forbids it; the log says so from now on.
        """
        if reason := self.refusal(capsule):
            self._note(capsule, reason)
            raise RefusedError(
                f"the view {self._view} must not show {capsule}: {reason}",
                hint="listen on 127.0.0.1, or space policy set",
                status=Status.NOT_PERMITTED,
            )

    def refusal(self, capsule: CapsuleId) -> str:
        """Why the view must not show a capsule; empty if it may."""
        if self._reach is Reach.MACHINE:
            return ""
        return view_refusal(self._reading.policy(capsule), self._reach)

    def check_tree(self, root: CapsuleId) -> None:
        """Refuses a tree with anything in it that the view must not show.

        A store without any such policy is not walked.

        Raises:
            RefusedError: as for :meth:`check`.
        """
        if self._reach is Reach.MACHINE or not self._any_local():
            return
        self.check(root)
        for _, stat in self._reading.walk(root):
            self.check(stat.id)

    def _any_local(self) -> bool:
        with self._reading._read() as txn:
            numbers = [U32.unpack(key)[0] for key, _ in txn.scan(POLICY, b"")]
            policies = (self._reading._policy(txn, number) for number in numbers)
            return any(policy.sovereignty is Sovereignty.LOCAL for policy in policies)

    def _note(self, capsule: CapsuleId, reason: str) -> None:
        """Puts the refusal into the log, where there is one to write to."""
        from space._node.store import Store

        if capsule in self._noted or len(self._noted) >= NOTED_MAX:
            return
        self._noted.add(capsule)
        if isinstance(self._reading, Store):
            with contextlib.suppress(SpaceError):  # it is refused all the same
                self._reading.execute(
                    cmd.RecordRefusal(capsule, "view", self._view, reason), durability=Durability.BUFFERED
                )


def enforce_view_policy(
    reading: Reading, roots: Iterable[CapsuleId], view: str, host: str | None
) -> ViewPolicy:
    """What a view of some capsules or trees may show; made before it can be reached.

    Raises:
        RefusedError: there is something in them that it must not.
    """
    found = ViewPolicy(reading, view, host)
    for root in roots:
        found.check_tree(root)
    return found

"""Replies kept for retries: how long, and that they go."""

from __future__ import annotations

from pathlib import Path

import pytest

from space._node.maintenance import RETRY_NS
from space._node.store import Store
from space.events import commands as cmd
from space.events.commands import REPLIES_KEPT_PER_CLIENT
from space.events.ids import ROOT
from space.statemachine.replies import SLOTS
from space.statemachine.tables import REPLY

pytestmark = pytest.mark.unit

CLIENT, OTHER = b"c" * 16, b"d" * 16


def replies(store: Store) -> set[bytes]:
    """Clients that have replies."""
    with store._read() as txn:
        return {key[:16] for key, _ in txn.scan(REPLY, b"")}


def set_mode(mode: int) -> cmd.SetAttributes:
    """Something to do."""
    return cmd.SetAttributes(bytes(ROOT), mode=mode)


def test_gc_forgets_clients_that_were_silent_for_a_day_and_no_others(tmp_path: Path) -> None:
    """After a day of silence a client's replies go with gc, as an event; those of one heard of since stay."""
    now = 10**18
    with Store(tmp_path, clock=lambda: now) as store:
        for sequence in range(3):
            store.execute(set_mode(0o700 + sequence), client=CLIENT, sequence=sequence)
        now += RETRY_NS // 2
        store.execute(set_mode(0o755), client=OTHER, sequence=1)
        assert store.gc().clients_forgotten == 0
        now += RETRY_NS // 2 + 1
        assert store.gc(dry_run=True).clients_forgotten == 1
        assert replies(store) == {CLIENT, OTHER}
        assert store.gc().clients_forgotten == 1
        assert replies(store) == {OTHER}
        assert "RepliesForgotten" in [event.kind for event in store.log()]
        assert store.execute(set_mode(0o750), client=OTHER, sequence=1).repeated
        digest = store.digest()
        assert store.replay(verify=True).equal
        assert store.digest() == digest


def test_a_client_keeps_as_many_replies_as_it_may_have_commands_under_way(tmp_path: Path) -> None:
    """The oldest replies go, a row at a time, when the client is that many sequences further, and not before."""
    with Store(tmp_path) as store:
        for sequence in range(REPLIES_KEPT_PER_CLIENT):
            store.execute(set_mode(0o700), client=CLIENT, sequence=sequence)
        assert store.execute(set_mode(0o711), client=CLIENT, sequence=0).repeated
        store.execute(set_mode(0o700), client=CLIENT, sequence=REPLIES_KEPT_PER_CLIENT)
        assert store.execute(set_mode(0o711), client=CLIENT, sequence=1).repeated
        store.execute(set_mode(0o700), client=CLIENT, sequence=REPLIES_KEPT_PER_CLIENT + SLOTS)
        assert store.execute(set_mode(0o711), client=CLIENT, sequence=SLOTS + 1).repeated
        assert not store.execute(set_mode(0o711), client=CLIENT, sequence=0).repeated

"""What a member of a group looks for in the batches it folds."""

from __future__ import annotations

import pytest

from space._node.member import _RECLAIM_MARK
from space.events.codec import NO_LINK, Entry, encode_batch
from space.events.ids import CLUSTER
from space.events.registry import BY_CLASS
from space.events.types import CapsuleDeleted, PayloadReclaimed

pytestmark = pytest.mark.unit


def test_a_batch_that_reclaims_payload_is_recognised_without_decoding_it() -> None:
    """The bytes looked for are in every batch with such an event, whatever is before it, and not in one without."""
    deleted = (NO_LINK, CapsuleDeleted(CLUSTER))
    reclaimed = (NO_LINK, PayloadReclaimed(CLUSTER, bytes(16)))
    for before in (0, 1, 20):
        entries = [Entry(b"", 0, 7, "gc", (deleted,))] * before
        assert _RECLAIM_MARK not in encode_batch(entries)
        assert _RECLAIM_MARK in encode_batch([*entries, Entry(b"", 0, 7, "gc", (deleted, reclaimed))])


def test_the_mark_is_of_every_version_of_the_event() -> None:
    """A new version of the event begins with other bytes, which a member has to look for too."""
    assert BY_CLASS[PayloadReclaimed].version == 1

"""Another data key for a capsule: what it holds at present is encrypted again under it.

The capsule gets the key as when a policy begins to encrypt it, and from then on everything is written under it.  What
is there already is read and written again, a piece at a time, each only if nobody wrote meanwhile; so it can be used
all the time, and killed in between it is read as before, some of it under either key.  Past moments keep the key they
had.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import attrs

from space._errors import NotFoundError, RefusedError, SpaceError, Status, UnavailableError, UsageError
from space._node.keys import frame_keys
from space.events import commands as cmd
from space.events.commands import Durability, Request
from space.events.ids import CapsuleId
from space.events.types import EXTENT_BYTES_MAX, Kind
from space.policy.model import Encryption, Policy
from space.projections import content_map

if TYPE_CHECKING:
    from space._node.caller import Document
    from space._node.store import Store

ATTEMPTS_MAX: Final = 64
"""How often a piece is read again because somebody wrote to the capsule: who writes all the time has to pause."""


def rekey(store: Store, capsule: CapsuleId, told: Callable[[int], None] | None = None) -> Document:
    """Gives a capsule another data key; ``told`` is told how many bytes were encrypted again.

    Raises:
        NotFoundError: it has no data key.
        RefusedError: another zone is its home, or it is shipped to others.
        UsageError: its policy does not encrypt any more.
        UnavailableError: it is being written all the time.
    """
    stat, policy = store.stat(capsule), store.policy(capsule)
    if stat.kind != Kind.FILE or not stat.key:
        raise NotFoundError(f"capsule {capsule} has no data key: it was never encrypted")
    if policy.federation_targets:
        raise RefusedError(
            f"capsule {capsule} is shipped to zones, which take content under one key only",
            hint="take federation.targets out of its policy first, and put them back then",
            status=Status.NOT_PERMITTED,
        )
    if policy.encryption is Encryption.NONE:
        raise UsageError(
            f"the policy of capsule {capsule} does not encrypt any more", hint="space policy set"
        )
    key = _pending(store, capsule, stat.key) or _give(store, capsule, policy)
    done = 0
    for offset in range(0, stat.size, EXTENT_BYTES_MAX):
        done += _encrypted_again(store, capsule, offset, policy, key)
        if told is not None:
            told(done)
    store.sync()
    return {
        "capsule": str(capsule),
        "key": key,
        "before": stat.key,
        "bytes": done,
        "position": store.position,
    }


def _pending(store: Store, capsule: CapsuleId, key: int) -> int:
    """The key of a capsule of which some is under another one still: a run that was killed goes on with it."""
    with store._read() as txn:
        found = content_map.extents(txn, capsule, 0, content_map.OFFSET_MAX)
        under = set().union(*(frame_keys(extent.frames) for extent in found))
    return key if key in under and under - {key, 0} else 0


def _give(store: Store, capsule: CapsuleId, policy: Policy) -> int:
    from space._node.store import pack_policy

    new = store.new_key(policy)
    assert new is not None  # the policy encrypts
    store.execute(cmd.SetPolicy(capsule, pack_policy(policy), new))
    return new.key


def _encrypted_again(store: Store, capsule: CapsuleId, offset: int, policy: Policy, key: int) -> int:
    """Writes what is under another key in one piece of a capsule again; how many bytes that were."""
    done = failed = 0
    while failed < ATTEMPTS_MAX:
        with store._read() as txn:
            row = store._row(txn, capsule)
            extents = content_map.extents(txn, capsule, offset, min(EXTENT_BYTES_MAX, row.size - offset))
            found = next((extent for extent in extents if frame_keys(extent.frames) - {key}), None)
        if row.key != key:
            raise UnavailableError(f"capsule {capsule} got yet another key meanwhile", hint="try again later")
        if found is None:
            return done
        data = store.read(capsule, found.offset, found.length)
        # A frame that was found again may be gone by now; not when it is stored anew.
        encoding = attrs.evolve(policy, dedupe=False) if failed else policy
        (command,) = store.encode_extents(capsule, found.offset, data, encoding, key)
        assert isinstance(command, cmd.WriteExtent)
        request = Request(attrs.evolve(command, change=row.change), store.actor)
        (outcome,) = store.execute_all([request], durability=Durability.BUFFERED)
        if not isinstance(outcome, SpaceError):
            done, failed = done + found.length, 0
        elif outcome.status is Status.STALE:
            failed += 1
        else:
            raise outcome
    raise UnavailableError(
        f"capsule {capsule} is being written all the time", hint="pause that, or try again later"
    )

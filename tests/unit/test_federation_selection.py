from __future__ import annotations

from typing import Any

import msgpack
import pytest

from space.federation.selection import Selection
from space.policy.model import Encryption, Policy, Shards, Sovereignty
from space.statemachine.tables import POLICY, U32
from tests.federation_zone import Tables, pack_policy

pytestmark = pytest.mark.unit


def with_policy(document: bytes) -> Tables:
    """A state with one policy, number 1."""
    tables = Tables()
    tables.put(POLICY, U32.pack(1), document)
    return tables


def shipped(*targets: str, **keys: Any) -> Policy:
    """A policy that ships."""
    return Policy(sovereignty=Sovereignty.GLOBAL, federation_targets=targets, **keys)


@pytest.mark.parametrize(
    "policy, lane",
    [
        (Policy(), None),
        (Policy(sovereignty=Sovereignty.LOCAL), None),
        (Policy(sovereignty=Sovereignty.GLOBAL), None),
        (shipped("rome"), None),
        (shipped("oslo"), 0),
        (shipped("rome", "oslo", federation_priority=100), 100),
        (shipped("oslo", "rome", "bern", federation_shards=Shards(2, 1)), None),
        (Policy(sovereignty=Sovereignty.GLOBAL, federation_candidates=("oslo",)), None),
    ],
)
def test_only_a_target_of_a_global_policy_gets_replicas(policy: Policy, lane: int | None) -> None:
    """A lane is there exactly where the policy is global, names the zone, and does not cut content into shards."""
    assert Selection("oslo").lane(with_policy(pack_policy(policy)), 1) == lane


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"\xc1",
        b"one",
        msgpack.packb([1]),
        msgpack.packb({"sovereignty": "global", "federation": {"targets": ["oslo"]}, "new": 1}),
        msgpack.packb({"sovereignty": "galactic", "federation": {"targets": ["oslo"]}}),
    ],
)
def test_what_is_not_understood_stays(document: bytes) -> None:
    """A document that is no policy, or has keys of another program, allows nothing."""
    assert Selection("oslo").lane(with_policy(document), 1) is None


def test_numbers_without_a_document_stay() -> None:
    """The default policy and a number nobody defined allow nothing."""
    tables = with_policy(pack_policy(shipped("oslo")))
    selection = Selection("oslo")
    assert [selection.lane(tables, number) for number in (0, 1, 2)] == [None, 0, None]


def test_sealed_is_asked_for() -> None:
    """Only a policy that says so seals keys for the home."""
    sealed = shipped("oslo", encryption=Encryption.AES_256_GCM, federation_sealed=True)
    assert Selection("oslo").sealed(with_policy(pack_policy(sealed)), 1)
    assert not Selection("oslo").sealed(with_policy(pack_policy(shipped("oslo"))), 1)

from __future__ import annotations

import attrs
import msgpack
import pytest

from space.events import commands as cmd
from space.federation.sovereignty import Audit, Finding
from space.policy.model import Policy, Shards, Sovereignty
from tests.zone_support import State, made, zone_commands
from tests.zone_support import capsule as capsule_id

CAPSULE = capsule_id(1)
SHARDED = Policy(
    sovereignty=Sovereignty.GLOBAL, federation_targets=("paris", "oslo"), federation_shards=Shards(2, 1)
)


def findings(policy: Policy, argument: str, action: str = "ShardEC") -> list[Finding]:
    """What an audit finds in a log in which that was done with a capsule of that policy."""
    state = State(zone_commands())
    state.done(attrs.evolve(made(1), policy=msgpack.packb(policy.to_document())))
    audit = Audit()
    before = state.rows
    events = state.prepare(cmd.RecordAction(CAPSULE, action, argument, "why")).linked()
    audit.batch(before, state.position, [event for _, _, event in events])
    return audit.findings


@pytest.mark.parametrize(
    "policy, argument, reason",
    [
        (SHARDED, "here paris oslo data 2 parity 1", ""),
        (SHARDED, "here paris lima data 2 parity 1", "to paris, oslo"),
        (attrs.evolve(SHARDED, federation_shards=None), "here paris oslo data 2 parity 1", "no shards"),
        (Policy(sovereignty=Sovereignty.LOCAL), "here paris oslo data 2 parity 1", "sovereignty local"),
    ],
)
def test_shards_are_audited(policy: Policy, argument: str, reason: str) -> None:
    """Shards that went where the policy allowed are no finding; each that went elsewhere is one, with the policy."""
    found = findings(policy, argument)
    if not reason:
        assert found == []
    else:
        assert found
        assert {each.capsule for each in found} == {CAPSULE}
        assert all(reason in str(each) for each in found)
        assert "here" not in {each.zone for each in found}


def test_other_actions_send_nothing_by_themselves() -> None:
    """An action that only changes a policy or a stream is no finding: what follows it is audited as a shipment."""
    assert findings(Policy(), "paris", "Replicate") == []

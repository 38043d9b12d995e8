from __future__ import annotations

from collections.abc import Sequence

import pytest

from space.events import commands as cmd
from space.events.ids import ROOT
from space.federation.sovereignty import FINDINGS_MAX, Audit
from space.policy.model import Policy, Sovereignty
from tests.federation_zone import MemoryZone, pack_policy

pytestmark = pytest.mark.unit

CAPSULE = b"c" * 16
SHIPPED = pack_policy(Policy(sovereignty=Sovereignty.GLOBAL, federation_targets=("oslo",)))
ELSEWHERE = pack_policy(Policy(sovereignty=Sovereignty.GLOBAL, federation_targets=("rome",)))
HERE = pack_policy(Policy())


class Log:
    """A home whose log says whatever a test wants."""

    def __init__(self) -> None:
        self.zone, self.oslo = MemoryZone("paris", 1), MemoryZone("oslo", 1)
        self.zone.add_zone(self.oslo)

    def create(self, policy: bytes) -> int:
        """The capsule; its position."""
        return self.zone.must(cmd.CreateCapsule(CAPSULE, parent=bytes(ROOT), name=b"f", policy=policy))

    def says(self, *capsules: tuple[bytes, int]) -> int:
        """A record that capsules were sent; its position."""
        return self.zone.must(cmd.RecordShipment(self.oslo.id, 0, 0, 0, self.zone.position, 0, capsules, 1))

    def audit(self) -> Audit:
        """What an audit of the whole log finds."""
        found = Audit()
        for logged in self.zone.log:
            found.batch(self.zone.moments[logged.position - 1].state, logged.position, logged.events)
        return found


def reasons(found: Audit) -> Sequence[str]:
    """Why things were not allowed."""
    return [finding.reason for finding in found.findings]


def test_what_was_allowed_then_is_no_finding() -> None:
    """The policy at the position something is sent as of counts, not the one when it is sent."""
    log = Log()
    position = log.create(SHIPPED)
    log.zone.must(cmd.SetPolicy(CAPSULE, HERE))
    log.says((CAPSULE, position))
    found = log.audit()
    assert found.findings == []
    assert (found.shipments, found.capsules) == (1, 1)


@pytest.mark.parametrize("policy", [HERE, ELSEWHERE])
def test_what_was_not_allowed_is_found(policy: bytes) -> None:
    """A capsule that was to stay, or to go to another zone, is found with all there is to say about it."""
    log = Log()
    position = log.create(policy)
    said = log.says((CAPSULE, position))
    (finding,) = log.audit().findings
    assert (finding.position, finding.capsule, finding.zone, finding.sent_as_of) == (
        said,
        CAPSULE,
        "oslo",
        position,
    )
    assert str(finding).startswith(
        f"position {said}: capsule 63636363-6363-6363-6363-636363636363 was sent to"
    )
    assert "its policy said" in finding.reason


def test_a_policy_that_opened_later_allows_nothing_before() -> None:
    """What is sent as of before the policy allowed it is found; as of after, it is not."""
    log = Log()
    before = log.create(HERE)
    after = log.zone.must(cmd.SetPolicy(CAPSULE, SHIPPED))
    log.says((CAPSULE, after))
    assert log.audit().findings == []
    log.says((CAPSULE, before))
    assert len(log.audit().findings) == 1


def test_a_policy_that_changed_twice_is_known_at_every_position() -> None:
    """Open, shut and open again: each position is judged by what held there."""
    log = Log()
    first = log.create(SHIPPED)
    shut = log.zone.must(cmd.SetPolicy(CAPSULE, HERE))
    again = log.zone.must(cmd.SetPolicy(CAPSULE, SHIPPED))
    log.says((CAPSULE, first), (CAPSULE, shut), (CAPSULE, again))
    assert [finding.sent_as_of for finding in log.audit().findings] == [shut]


def test_what_is_gone_for_good_is_judged_all_the_same() -> None:
    """A capsule that was purged before its shipment was recorded is judged by the policy it had."""
    for policy, allowed in ((SHIPPED, True), (HERE, False)):
        log = Log()
        position = log.create(policy)
        log.zone.must(cmd.Unlink(bytes(ROOT), b"f"))
        log.zone.must(cmd.PurgeCapsules([CAPSULE]))
        log.says((CAPSULE, position))
        assert (log.audit().findings == []) == allowed


def test_what_never_was_and_what_was_not_yet_is_found() -> None:
    """An id nobody had, and a position that was still to come, are findings."""
    log = Log()
    log.create(SHIPPED)
    said = log.says((b"x" * 16, 2), (CAPSULE, log.zone.position + 1))
    assert reasons(log.audit()) == ["there was no such capsule", "that is not before it was sent"]
    assert said == log.zone.position


def test_findings_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log full of them is read to its end, and the rest are counted."""
    monkeypatch.setattr("space.federation.sovereignty.FINDINGS_MAX", 2)
    assert FINDINGS_MAX == 1000
    log = Log()
    position = log.create(HERE)
    log.says(*[(CAPSULE, position)] * 5)
    found = log.audit()
    assert (len(found.findings), found.missed) == (2, 3)

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from space.federation.mesh import ZoneState
from space.federation.resolve import Replica, Resolver
from space.policy.model import Policy, Shards, Sovereignty

NAMES = ["berlin", "lima", "oslo", "paris"]
HERE = "berlin"


@st.composite
def tables(draw: st.DrawFn) -> list[ZoneState]:
    """Any table of zones; this one may be in it."""
    names = draw(st.lists(st.sampled_from(NAMES), unique=True))
    rtt = st.none() | st.integers(1, 10)
    return [ZoneState(name, "geo", draw(st.booleans()), draw(rtt)) for name in names]


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    """Any policy, as far as it says where content may be."""
    sovereignty = draw(st.sampled_from(Sovereignty))
    if sovereignty is not Sovereignty.GLOBAL:
        return Policy(sovereignty=sovereignty)
    targets = tuple(draw(st.lists(st.sampled_from([*NAMES, "nowhere"]), unique=True)))
    shards = Shards(2, len(targets) - 2) if len(targets) >= 3 and draw(st.booleans()) else None
    return Policy(sovereignty=sovereignty, federation_targets=targets, federation_shards=shards)


@given(tables(), policies(), st.sampled_from(NAMES), st.booleans())
def test_only_zones_that_may_hold_it_are_named(
    table: list[ZoneState], policy: Policy, home: str, here: bool
) -> None:
    """Beside this zone, where it is known, and the home, only targets of a global policy are named, each once."""
    found = Resolver(HERE, table).rank(home, policy, here=here)
    names = [each.zone for each in found]
    assert len(set(names)) == len(names)
    assert (HERE in names) == here
    whole = policy.sovereignty is Sovereignty.GLOBAL and policy.federation_shards is None
    targets = set(policy.federation_targets) if whole else set()
    known = {zone.name for zone in table} - {HERE}
    assert set(names) - {HERE} == ({home} | targets) & known


@given(tables(), policies(), st.sampled_from(NAMES))
def test_the_nearest_is_first(table: list[ZoneState], policy: Policy, home: str) -> None:
    """What is held here is read here; then by distance, and zones that do not answer come last."""
    found = Resolver(HERE, table).rank(home, policy, here=True)
    assert found[0] == Replica(HERE, local=True, home=home == HERE, reachable=True, rtt_ns=0)
    far = 1 << 62
    order = [(not each.reachable, far if each.rtt_ns is None else each.rtt_ns) for each in found]
    assert order == sorted(order)
    assert [each.zone for each in found if each.home] == [home] * (home in {each.zone for each in found})


def test_a_new_table_counts_at_once() -> None:
    """An answer that was given before does not outlive the table it was made from."""
    policy = Policy(sovereignty=Sovereignty.GLOBAL, federation_targets=("paris", "oslo"))
    resolver = Resolver(HERE, [ZoneState("paris", rtt_ns=5), ZoneState("oslo", rtt_ns=9)])
    assert [each.zone for each in resolver.rank("oslo", policy, here=False)] == ["paris", "oslo"]
    resolver.update([ZoneState("paris", reachable=False, rtt_ns=5), ZoneState("oslo", rtt_ns=9)])
    assert [each.zone for each in resolver.rank("oslo", policy, here=False)] == ["oslo", "paris"]

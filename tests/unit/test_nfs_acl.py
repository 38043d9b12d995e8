from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from space.projections.nfs import acl
from space.projections.nfs.acl import ALLOW, DENY, Ace
from space.projections.nfs.xdr import Reader

DATA = {4: 0x1, 2: 0x2 | 0x4, 1: 0x20}


@pytest.mark.parametrize("directory", [False, True])
def test_every_mode_has_a_list_that_means_it(directory: bool) -> None:
    """Each of the 512 modes comes back from the list made of it, through the wire."""
    for mode in range(512):
        entries = acl.of_mode(mode, directory=directory)
        decoded = acl.decode(Reader(acl.encode(entries)))
        assert decoded == entries
        assert acl.to_mode(decoded) == mode


def may(entries: list[Ace], bit: int, *, owner: bool, group: bool) -> bool:
    """Whether somebody may, as RFC 8881 §6.2.1 decides it: bit by bit, the first entry that says anything."""
    for wanted in [1 << number for number in range(7) if DATA[bit] >> number & 1]:
        for entry in entries:
            applies = {b"OWNER@": owner, b"GROUP@": group, b"EVERYONE@": True}[entry.who]
            if applies and entry.mask & wanted:
                if entry.type == DENY:
                    return False
                break
        else:
            return False
    return True


ENTRIES = st.lists(
    st.builds(
        Ace,
        st.sampled_from([ALLOW, DENY]),
        st.just(0),
        st.integers(0, 7).map(lambda bits: sum(DATA[bit] for bit in DATA if bits & bit)),
        st.sampled_from([b"OWNER@", b"GROUP@", b"EVERYONE@"]),
    ),
    max_size=6,
)


@given(ENTRIES)
def test_a_list_that_is_taken_means_the_mode_to_everybody(entries: list[Ace]) -> None:
    """Where a list is turned into a mode, nobody may more or less by the one than by the other."""
    mode = acl.to_mode(entries)
    if mode is None:
        assert any(
            may(entries, bit, owner=True, group=True) != may(entries, bit, owner=True, group=False)
            for bit in DATA
        )
        return
    for bit in DATA:
        for group in (False, True):
            assert may(entries, bit, owner=True, group=group) == bool(mode >> 6 & bit)
        assert may(entries, bit, owner=False, group=True) == bool(mode >> 3 & bit)
        assert may(entries, bit, owner=False, group=False) == bool(mode & bit)


@pytest.mark.parametrize(
    "entry",
    [
        Ace(ALLOW, 0, 0x1, b"1000"),
        Ace(2, 0, 0x1, b"OWNER@"),
        Ace(ALLOW, 0x1, 0x1, b"OWNER@"),
        Ace(ALLOW, 0, 0x2, b"OWNER@"),
        Ace(ALLOW, 0, 0x40000, b"EVERYONE@"),
        Ace(DENY, 0, 0x20000, b"EVERYONE@"),
    ],
    ids=["user", "audit", "inherited", "half of writing", "gives away the list", "hides the list"],
)
def test_what_no_mode_says_is_not_taken(entry: Ace) -> None:
    """A list with an entry that a mode has no bits for is no mode."""
    assert acl.to_mode([entry]) is None

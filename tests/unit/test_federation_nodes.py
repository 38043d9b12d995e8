"""The nodes of a zone: which of them ships, what they tell each other, and how keys get from one to another."""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import pytest

import space
from space._errors import RefusedError, SpaceError, UnavailableError, UsageError
from space._node.federation_keys import ZONE, ZoneAuthority, ZoneKeys, proves, settle
from space._node.federation_nodes import (
    KEYS,
    LINKS,
    OFFICE,
    answer,
    chosen,
    links_elsewhere,
    links_in,
    merged,
)
from space._node.federation_zones import Zones, check_url
from space.federation.exchange import ADDRESSES_MAX, addresses

NOW: Final = datetime.now(UTC).replace(microsecond=0)
OSLO: Final = bytes(range(16))


# --- who ships --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "leader, federating, before, ships",
    [
        (2, {1, 2, 3}, 0, 2),  # who leads
        (2, {1, 3}, 0, 1),  # who leads does not federate
        (0, {1, 2, 3}, 2, 2),  # nobody leads for a moment
        (0, {1, 3}, 2, 1),  # and who did before does not federate any more
        (3, {1, 2, 3}, 2, 3),  # another one leads
        (1, set(), 1, 0),
    ],
)
def test_one_node_ships(leader: int, federating: set[int], before: int, ships: int) -> None:
    """Nodes that know the same choose the same one: who leads, if it federates, else the first."""
    assert chosen(leader, federating, before) == ships


def test_what_others_know_better() -> None:
    """How far a zone is comes from who ships, what it said from who heard it last; malformed answers are none."""
    mine = {"a": {"position": 3, "heard_position": 10, "heard_ns": 100}}
    offices = {
        1: {"ships": False, "notes": {"a": {"position": 1, "heard_position": 12, "heard_ns": 200}}},
        2: {
            "ships": True,
            "notes": {"a": {"position": 7, "broken": [0], "heard_ns": 50}, "b": {"position": 1}},
        },
        3: None,
        4: {"ships": True, "notes": [1]},
        5: {"ships": True, "notes": {1: {}, "c": 7}},
    }
    assert merged(mine, offices) == {
        "a": {"position": 7, "broken": [0], "heard_position": 12, "heard_ns": 200},
        "b": {"position": 1},
    }
    assert mine == {"a": {"position": 3, "heard_position": 10, "heard_ns": 100}}


class Others:
    """Other nodes that answer what they are told to."""

    number = 1
    leader = 1

    def __init__(self, answers: dict[str, dict[int, Any]], *, proved: bool = True) -> None:
        self.proved = proved
        self._answers = answers

    def ask(self, method: str, *, seconds: float = 0.0) -> tuple[dict[int, Any], dict[int, SpaceError]]:
        return self._answers.get(method, {}), {}


def test_the_links_of_who_ships(tmp_path: Path) -> None:
    """A node that does not ship shows the links of the one that does; a malformed answer has none."""
    link = {"connected": True}
    with space.open(tmp_path) as store:
        assert links_elsewhere(store) == (0, {})
        store.nodes = Others({LINKS: {2: None, 3: {OSLO.hex(): link}}})
        assert links_elsewhere(store) == (3, {OSLO: link})
        store.nodes = Others({LINKS: {2: None}})
        assert links_elsewhere(store) == (0, {})
        for malformed in ({"x": link}, {OSLO.hex(): 7}, {7: link}):
            store.nodes = Others({LINKS: {2: malformed}})
            assert links_elsewhere(store) == (2, {})


def test_how_far_zones_are_is_told_to_who_does_not_ship() -> None:
    """It is in what the node that ships says every second; from anything else nothing is learnt."""
    far = {"connected": True, "rtt_seconds": 0.25}
    assert links_in({"ships": True, "notes": {}, "links": {OSLO.hex(): far}}) == {OSLO: far}
    for malformed in (None, 7, {}, {"links": 7}, {"links": {"x": far}}, {"links": {OSLO.hex(): 7}}):
        assert links_in(malformed) == {}


def test_a_node_that_does_not_federate_says_so(tmp_path: Path) -> None:
    """It is in no office, has no links, and knows no other questions."""
    with space.open(tmp_path) as store:
        assert answer(store, OFFICE) is None
        assert answer(store, LINKS) is None
        with pytest.raises(UnavailableError):
            answer(store, "zone secrets")


# --- keys --------------------------------------------------------------------------------------------


def keys_of(path: Path) -> ZoneKeys:
    """The keys of a zone."""
    return ZoneKeys.create(path, "oslo", "metro", OSLO, now=NOW)


def known(*authorities: ZoneAuthority) -> ZoneAuthority:
    """What the log says of the zone, newest first."""
    return ZoneAuthority.parse(b"".join(each.pem for each in authorities))


def nobody() -> Iterable[object]:
    """Other nodes, none of which is to be asked."""
    raise AssertionError("asked, though everything is here")


def files(home: Path) -> dict[str, bytes]:
    """The files of a zone's keys."""
    return {str(p.relative_to(home / ZONE)): p.read_bytes() for p in (home / ZONE).rglob("*.pem")}


def test_a_node_gets_the_keys_of_its_zone(tmp_path: Path) -> None:
    """It keeps them for its owner only, and shows a certificate of its own that the zone's authority issued."""
    first = keys_of(tmp_path / "1")
    got = settle(tmp_path / "2", first.authority, lambda: [first.bundle()], now=NOW)
    assert got.authority == first.authority
    assert got.sealing.private_bytes_raw() == first.sealing.private_bytes_raw()
    assert ZoneKeys.load(tmp_path / "2").authority == first.authority
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "2").rglob("*"))
    ours, theirs = files(tmp_path / "1"), files(tmp_path / "2")
    assert ours["certificate.pem"] != theirs["certificate.pem"]
    shown = theirs["certificate.pem"][theirs["certificate.pem"].index(b"-----BEGIN CERTIFICATE") :]
    assert proves(first.authority, ssl.PEM_cert_to_DER_cert(shown.decode()))
    assert settle(tmp_path / "2", first.authority, nobody, now=NOW).authority == first.authority


def test_only_the_keys_the_log_speaks_of_are_taken(tmp_path: Path) -> None:
    """Keys of another authority, of another sealing key, of two nodes mixed, and no keys at all: nothing is kept."""
    first, other = keys_of(tmp_path / "1"), keys_of(tmp_path / "other")
    mixed = {"authority": first.bundle()["authority"], "sealing": other.bundle()["sealing"]}
    wrong: list[object] = [
        None, 7, [], {}, {"authority": b"", "sealing": b""}, {"authority": "x", "sealing": "y"},
        {**first.bundle(), "authority": first.bundle()["sealing"]},
        {**first.bundle(), "sealing": first.bundle()["authority"]},
        {**first.bundle(), "next": b"-----BEGIN"}, {**first.bundle(), "authority": b"x" * 100_000},
        other.bundle(), mixed,
    ]  # fmt: skip
    with pytest.raises(UnavailableError, match="not on this node"):
        settle(tmp_path / "2", first.authority, lambda: wrong, now=NOW)
    assert not (tmp_path / "2" / ZONE).exists()
    settle(tmp_path / "2", first.authority, lambda: [*wrong, first.bundle()], now=NOW)


def test_a_rollover_reaches_every_node(tmp_path: Path) -> None:
    """The next authority is fetched when the log names it, and used when the log names nothing else."""
    first = keys_of(tmp_path / "1")
    homes = [tmp_path / "2", tmp_path / "3"]
    for home in homes:
        settle(home, first.authority, lambda: [first.bundle()], now=NOW)
    first.begin_rollover(now=NOW)
    both = ZoneAuthority.parse(first.offer()[0])
    old = first.authority
    second = settle(homes[0], both, lambda: [first.bundle()], now=NOW)
    assert second.rolling
    assert second.authority == old
    assert set(ZoneAuthority.parse(second.offer()[0]).fingerprints) == set(both.fingerprints)
    assert settle(homes[0], both, nobody, now=NOW).rolling
    first = first.finish_rollover()
    assert settle(tmp_path / "1", both, nobody, now=NOW).authority == first.authority
    second = settle(homes[0], first.authority, nobody, now=NOW)
    assert (second.authority, second.rolling) == (first.authority, False)
    third = settle(homes[1], first.authority, lambda: [second.bundle()], now=NOW)  # it slept all the while
    assert third.authority == first.authority
    for home in homes:
        assert set(files(home)) == {"authority.pem", "certificate.pem", "sealing.pem"}


def test_a_rollover_that_was_given_up_is_forgotten(tmp_path: Path) -> None:
    """A node that began one the log does not speak of takes the one that was gone on with elsewhere."""
    first = keys_of(tmp_path / "1")
    second = settle(tmp_path / "2", first.authority, lambda: [first.bundle()], now=NOW)
    second.begin_rollover(now=NOW)
    first.begin_rollover(now=NOW)
    both = ZoneAuthority.parse(first.offer()[0])
    settle(tmp_path / "2", both, lambda: [first.bundle()], now=NOW)
    assert files(tmp_path / "2")["next/authority.pem"] == files(tmp_path / "1")["next/authority.pem"]
    first = first.finish_rollover()
    second.begin_rollover(now=NOW)
    third = settle(tmp_path / "3", first.authority, lambda: [first.bundle()], now=NOW)
    assert not third.rolling


def test_keys_of_another_zone_stay_what_they_are(tmp_path: Path) -> None:
    """A node whose directory has another zone's keys refuses to be of this one, and keeps them."""
    first = keys_of(tmp_path / "1")
    ZoneKeys.create(tmp_path / "2", "paris", "geo", bytes(16), now=NOW)
    before = files(tmp_path / "2")
    with pytest.raises(RefusedError, match="another zone"):
        settle(tmp_path / "2", first.authority, lambda: [first.bundle()], now=NOW)
    assert files(tmp_path / "2") == before


def test_nodes_give_keys_to_whom_they_know(tmp_path: Path) -> None:
    """Without certificates a node could be anybody: then keys are given to nobody."""
    with space.open(tmp_path) as store:
        Zones(store).init("oslo", "metro", "")
        store.nodes = Others({})
        assert answer(store, KEYS) == ZoneKeys.load(tmp_path).bundle()
        store.nodes = Others({}, proved=False)
        with pytest.raises(RefusedError, match="without certificates"):
            answer(store, KEYS)


def test_a_store_asks_the_others_for_its_keys(tmp_path: Path) -> None:
    """What needs the keys gets them when it needs them: here, the file for other zones."""
    with space.open(tmp_path / "1") as store:
        zones = Zones(store)
        zones.init("oslo", "metro", "")
        bundle = zones.keys().bundle()
        for path in (tmp_path / "1" / ZONE).glob("*.pem"):
            path.unlink()
        store.nodes = Others({KEYS: {2: "nothing", 3: bundle}})
        assert zones.keys().bundle() == bundle


# --- addresses ---------------------------------------------------------------------------------------


def test_a_zone_has_as_many_addresses_as_nodes() -> None:
    """Addresses with commas between them are each one; one that is none, and too many, are refused."""
    assert addresses("") == []
    assert addresses("https://a:1") == ["https://a:1"]
    assert addresses("https://a:1,https://[::1]:2") == ["https://a:1", "https://[::1]:2"]
    check_url("https://a:1,https://[::1]:2/")
    check_url(",".join(f"https://node{n}:7441" for n in range(ADDRESSES_MAX)))
    for wrong in (
        "https://a:1,", ",https://a:1", "https://a:1,http://b:2", "https://a:1, https://b:2 ",
        ",".join(f"https://node{n}:7441" for n in range(ADDRESSES_MAX + 1)), f"https://{'a' * 3000}:1",
    ):  # fmt: skip
        with pytest.raises(UsageError):
            check_url(wrong)

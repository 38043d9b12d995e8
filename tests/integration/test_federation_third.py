"""A third zone follows the one that took its home's place: all of it once, nothing twice, nothing lost."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

import space
from space._errors import NotFoundError, RefusedError, SpaceError
from space._node import federation_heir
from space._node.federation_audit import audit
from space._node.federation_home import Walk
from space._node.federation_promote import branches
from space._node.federation_status import status
from space.events import commands as cmd
from tests.federation_support import Served, content_at, shared, space_command, until
from tests.federation_third import Several, several
from tests.property.test_federation_follow import below, seen

pytestmark = pytest.mark.requires("py:aiohttp")

TOP: Final = {"oslo": "/all", "paris": "/zones/oslo/all", "lima": "/zones/oslo/all"}


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Several]:
    """Three zones; ``paris`` and ``lima`` have a tree of ``oslo``."""
    with several(tmp_path) as zones:
        oslo = zones.stores["oslo"]
        oslo.mkdir("/all")
        oslo.set_policy("/all", shared("paris", "lima"))
        for number in range(10):
            oslo.put(os.urandom(1000), name=f"/all/f{number}")
        oslo.put(b"deep", name="/all/deep/g")
        zones.settle()
        yield zones


def alike(zones: Several) -> dict[str, tuple[Any, ...]]:
    """What all zones that are there have of the tree, which is the same."""
    found = [seen(zones.stores[name], top) for name, top in TOP.items() if name not in zones.away]
    assert all(each == found[0] for each in found)
    for name in TOP:
        assert not zones.stores[name].verify().findings
        assert not audit(zones.stores[name])["findings"]
    return found[0]


def files(zones: Several, name: str) -> dict[str, list[str]]:
    """The branches of a zone, each with what is in it."""
    return {each["branch"]: [file["path"] for file in each["files"]] for each in branches(zones.stores[name])}


def test_who_has_the_same_follows_and_nothing_of_it_moves(three: Several) -> None:
    """A third zone that has what the new home has gets what that one does from then on, and no more."""
    oslo, paris, lima = three.stores.values()
    big = os.urandom(8 << 20)
    oslo.put(big, name="/all/big")
    three.settle()
    three.away = {"oslo"}
    three.promote("paris", "oslo")
    paris.write(paris.resolve("/zones/oslo/all/f1"), 0, b"by paris")
    paris.put(b"new", name="/zones/oslo/all/new")
    before = sum(pump.shipped_bytes for pump in three.pumps.values())
    three.settle()
    assert sum(pump.shipped_bytes for pump in three.pumps.values()) - before < 20_000
    alike(three)
    assert lima.get("/zones/oslo/all/f1").startswith(b"by paris")
    assert lima.get("/zones/oslo/all/big") == big
    assert files(three, "lima") == {}
    assert {each["zone"]: each["received"]["heir"] for each in status(lima)["zones"]} == {
        "oslo": "paris",
        "paris": None,
    }
    with pytest.raises(RefusedError, match="paris"):
        lima.write(lima.resolve("/zones/oslo/all/f1"), 0, b"x")
    three.away = set()
    three.settle()
    alike(three)


def test_who_was_behind_gets_the_difference(three: Several) -> None:
    """What the new home had and the third zone had not comes from the new home."""
    oslo, _, lima = three.stores.values()
    oslo.write(oslo.resolve("/all/f1"), 0, b"more")
    oslo.put(b"late", name="/all/deep/late")
    oslo.rm("/all/f2")
    oslo.mv("/all/f3", "/all/deep/f3")
    three.ship(("oslo", "paris"))
    three.away = {"oslo"}
    three.promote("paris", "oslo")
    three.settle()
    assert lima.get("/zones/oslo/all/deep/late") == b"late"
    assert files(three, "lima") == {}
    alike(three)
    three.away = set()
    three.settle()
    alike(three)


def test_who_was_ahead_keeps_it_in_a_branch(three: Several) -> None:
    """What only the third zone had of the old home is a branch there, and else it is as the new home has it."""
    oslo, paris, lima = three.stores.values()
    was = oslo.get("/all/f1")
    oslo.write(oslo.resolve("/all/f1"), 0, b"more")
    oslo.put(b"late", name="/all/deep/late")
    oslo.put(b"later", name="/all/fresh/later")
    oslo.rm("/all/f2")
    oslo.mv("/all/f3", "/all/deep/f3")
    three.ship(("oslo", "lima"))
    three.away = {"oslo"}
    three.promote("paris", "oslo")
    three.settle()
    assert lima.get("/zones/oslo/all/f1") == was
    assert files(three, "lima") == {
        "oslo+paris-1": ["all/deep/f3", "all/deep/late", "all/f1", "all/fresh/later"]
    }
    assert lima.get("/zones/.branches/oslo+paris-1/all/f1") == b"more" + was[4:]
    alike(three)
    three.away = set()
    three.settle()
    alike(three)
    paris.put(b"x", name="/zones/oslo/all/late")
    three.settle()
    alike(three)


def test_an_old_home_is_fenced_by_the_third_zone_too(three: Several) -> None:
    """Who follows the new home takes nothing of the old one, until that one has learnt that it lost its place."""
    oslo, _, lima = three.stores.values()
    three.promote("paris", "oslo")
    three.away = {"oslo"}
    three.settle()
    three.away = {"paris"}
    oslo.put(b"fenced", name="/all/fenced")
    with pytest.raises(RefusedError, match="has not learnt that yet"):
        three.pumps["oslo", "lima"].connect()
    outgoing = three.pumps["oslo", "lima"].source.next()
    assert outgoing is not None
    received = three.pumps["oslo", "lima"].receiver.receive(three.pumps["oslo", "lima"].peer, [outgoing.body])
    assert "took the place of zone oslo" in str(received.error)
    with pytest.raises(SpaceError):
        lima.resolve("/zones/oslo/all/fenced")
    three.away = set()
    three.settle()
    alike(three)
    assert files(three, "oslo") == {"paris-1": ["all/fenced"]}


def test_what_the_new_home_may_not_have_stays_the_old_ones(three: Several) -> None:
    """What policy keeps from the new home is not told of there, and goes on coming from the old one."""
    oslo, paris, lima = three.stores.values()
    made = oslo.put(b"for lima", name="/lima", policy=shared("lima"))
    three.settle()
    three.promote("paris", "oslo")
    three.settle()
    assert lima.get("/zones/oslo/lima") == b"for lima"
    with pytest.raises(SpaceError):
        paris.stat(made.id)
    oslo.write(made.id, 0, b"FOR")
    oslo.put(b"too", name="/lima2", policy=shared("lima"))
    three.settle()
    assert lima.get("/zones/oslo/lima") == b"FOR lima"
    assert lima.get("/zones/oslo/lima2") == b"too"
    alike(three)


def test_moments_of_before_can_be_read(three: Several) -> None:
    """What had been shipped can be read as it was at every position of the old home, after another one is followed."""
    oslo, paris, lima = three.stores.values()
    position = oslo.position
    was = lima.get("/zones/oslo/all/f1")
    oslo.write(oslo.resolve("/all/f1"), 0, b"later")
    three.settle()
    three.away = {"oslo"}
    three.promote("paris", "oslo")
    paris.write(paris.resolve("/zones/oslo/all/f1"), 0, b"after")
    three.settle()
    with lima.at(f"oslo@{position}") as past:
        assert past.get("/zones/oslo/all/f1") == was
    assert lima.get("/zones/oslo/all/f1") == b"after" + was[5:]


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_break_in_the_middle_changes_nothing(tmp_path: Path, cut: int) -> None:
    """Broken off after any shipment, and with all that the sender knew forgotten, the copies of what differed go on."""
    with several(tmp_path) as zones:
        oslo = zones.stores["oslo"]
        oslo.mkdir("/all")
        oslo.set_policy("/all", shared("paris", "lima"))
        oslo.put(b"both", name="/all/both")
        zones.settle()
        for number in range(3):
            oslo.put(os.urandom(6 << 20), name=f"/all/large{number}")
        zones.ship(("oslo", "paris"))
        zones.away = {"oslo"}
        zones.promote("paris", "oslo")
        for _ in range(4):
            zones.ship(("paris", "lima"), cut)
            zones.restart("paris")
        zones.settle()
        alike(zones)
        zones.away = set()
        zones.settle()
        alike(zones)


def test_the_third_zone_takes_over_in_turn(three: Several) -> None:
    """Who followed a new home can take its place, and is followed by it and by the first home."""
    oslo, paris, lima = three.stores.values()
    three.away = {"oslo"}
    three.promote("paris", "oslo")
    paris.put(b"of paris", name="/zones/oslo/all/p")
    three.settle()
    three.away = {"oslo", "paris"}
    three.promote("lima", "paris")
    lima.put(b"of lima", name="/zones/oslo/all/l")
    lima.put(b"at the top", name="/zones/oslo/top", policy=shared("paris", "lima"))
    three.away = set()
    three.settle()
    assert alike(three)["/l"][3] == b"of lima"
    assert oslo.get("/all/p") == b"of paris"
    assert paris.get("/zones/oslo/top") == b"at the top"


def test_two_zones_that_took_the_same_place_do_not_mix(three: Several) -> None:
    """Where both were promoted neither takes anything of the other one's, and the reason is said."""
    _, paris, lima = three.stores.values()
    three.away = {"oslo"}
    three.promote("paris", "oslo")
    three.promote("lima", "oslo")
    paris.write(paris.resolve("/zones/oslo/all/f1"), 0, b"by paris")
    with pytest.raises(SpaceError, match="and so did this one"):
        three.pumps["paris", "lima"].connect()
    assert not lima.get("/zones/oslo/all/f1").startswith(b"by paris")


def test_three_processes(tmp_path: Path) -> None:
    """By commands: the home is killed, one zone takes over, the other one follows, and the old home when it is back."""
    names = ("oslo", "paris", "lima")
    data = {name: tmp_path / name for name in names}
    for name, path in data.items():
        space_command("--data", path, "zone", "init", name)
        (tmp_path / f"{name}.pem").write_text(space_command("--data", path, "zone", "ca"))
    policy = tmp_path / "shared.yaml"
    policy.write_text("sovereignty: global\nfederation:\n  targets: [paris, lima]\n")
    with contextlib.ExitStack() as stack:
        at = {name: stack.enter_context(Served(data[name], "--listen", "127.0.0.1:0")) for name in names}
        for name, other in itertools.permutations(names, 2):
            url, pem = f"https://127.0.0.1:{at[other].port}", tmp_path / f"{other}.pem"
            space_command("--data", data[name], "zone", "add", other, "--url", url, "--ca", pem)

        def put(zone: str, path: str, text: str) -> None:
            space_command("--data", data[zone], "put", "-", "--name", path, text=text)

        def comes(zone: str, path: str, text: str) -> None:
            until(lambda: content_at(data[zone], path) == text, f"{path} in {zone}")

        space_command("--data", data["oslo"], "mkdir", "/dir")
        space_command("--data", data["oslo"], "policy", "set", "/dir", policy)
        put("oslo", "/dir/file", "one")
        for zone in ("paris", "lima"):
            comes(zone, "/zones/oslo/dir/file", "one")
        at["oslo"].kill()
        with space.open(data["oslo"]) as store:
            store.write(store.resolve("/dir/file"), 0, b"ONE")
        space_command("--data", data["paris"], "zone", "promote", "oslo", "--yes")
        put("paris", "/zones/oslo/dir/more", "two")
        comes("lima", "/zones/oslo/dir/more", "two")
        assert "paris" in space_command("--data", data["lima"], "rm", "/zones/oslo/dir/file", status=5)
        stack.enter_context(Served(data["oslo"], "--listen", f"127.0.0.1:{at['oslo'].port}"))
        comes("oslo", "/dir/more", "two")
        comes("oslo", "/dir/file", "one")
        put("paris", "/zones/oslo/dir/last", "three")
        for zone, name in (("oslo", "/dir/last"), ("lima", "/zones/oslo/dir/last")):
            comes(zone, name, "three")
        for path in data.values():
            assert "0 not allowed" in space_command("--data", path, "verify", "--sovereignty")


def test_a_copy_anew_has_what_another_zone_took_over(three: Several) -> None:
    """A home that lost its place tells a zone that does not follow the new one yet all as it was before that."""
    oslo, _, lima = three.stores.values()
    oslo.put(b"own", name="/own", policy=shared("lima"))
    three.settle()
    had = set(seen(lima, "/zones/oslo"))
    oslo.write(oslo.resolve("/all/f1"), 0, b"more")
    oslo.put(b"late", name="/all/deep/late")
    three.ship(("oslo", "paris"))
    three.promote("paris", "oslo")
    three.ship(("paris", "oslo"))
    three.ship(("oslo", "paris"))
    three.forget("lima", "oslo")
    assert three.ship(("oslo", "lima"))
    assert set(seen(lima, "/zones/oslo")) == had | {"/all/deep/late"}
    three.settle()
    assert lima.get("/zones/oslo/all/f1").startswith(b"more")
    alike(three)


def test_a_copy_anew_waits_where_the_log_does_not_reach_back(
    three: Several, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A home whose log begins after it lost its place says so to who does not follow the new one, and goes on then."""
    oslo, _, lima = three.stores.values()
    three.promote("paris", "oslo")
    three.ship(("paris", "oslo"))
    three.ship(("oslo", "paris"))
    oslo.put(b"own", name="/own", policy=shared("lima"))
    monkeypatch.setattr(oslo, "wal", _Later(oslo.wal, oslo.last))
    three.forget("lima", "oslo")
    with pytest.raises(RefusedError, match="zone lima has to follow that one first"):
        three.pumps["oslo", "lima"].connect()
    three.settle()
    assert lima.get("/zones/oslo/own") == b"own"
    monkeypatch.undo()
    alike(three)


def test_a_copy_anew_of_now_where_the_log_does_not_reach_back(
    three: Several, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A zone that follows a home gets everything as it is now, and the directories of both homes stay."""
    _, paris, lima = three.stores.values()
    three.promote("paris", "oslo")
    three.settle()
    paris.put(b"new", name="/zones/oslo/all/new")
    paris.rm("/zones/oslo/all/f1")
    three.settle()
    paris.rm("/zones/oslo/all/f2")
    monkeypatch.setattr(paris, "wal", _Later(paris.wal, paris.last))
    three.forget("lima", "paris")
    three.settle()
    monkeypatch.undo()
    assert lima.get("/zones/oslo/all/new") == b"new"
    alike(three)


class _Later:
    """A log that says that it begins later than it does."""

    def __init__(self, log: Any, begins: int) -> None:
        self._log = log
        self.first_index = begins

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)


def test_a_copy_anew_deletes_what_had_been_taken_over_from_another_zone(three: Several) -> None:
    """What a zone took over, and lost in turn, goes from there with all else the new home has no more."""
    _, _, lima = three.stores.values()
    three.promote("paris", "oslo")
    three.settle()
    three.promote("lima", "paris")
    lima.rm("/zones/oslo/all/deep", recursive=True)
    three.forget("paris", "lima")
    three.settle()
    assert "/deep/g" not in alike(three)


def test_who_took_over_and_forgot_the_old_home_gets_what_is_still_that_ones(three: Several) -> None:
    """A home that lost its place to a zone does not tell that one anew what it had taken over itself before."""
    _, paris, lima = three.stores.values()
    three.promote("lima", "oslo")
    three.settle()
    three.promote("paris", "lima")
    three.settle()
    lima.put(b"own", name="/own", policy=shared("paris"))
    three.forget("paris", "lima")
    three.settle()
    assert paris.get(lima.resolve("/own")) == b"own"
    alike(three)


def test_a_home_that_is_one_again_deletes_nothing_it_took_back(three: Several) -> None:
    """What it had lost to another zone, and has again, stays in a third one that was told of neither, at every step."""
    paris = three.stores["paris"]
    had = seen(paris, TOP["paris"])
    three.away = {"paris"}
    three.promote("lima", "oslo")
    three.settle()
    three.promote("oslo", "lima")
    three.settle()
    three.away = {"lima"}
    while three.ship(("oslo", "paris"), 1):
        assert seen(paris, TOP["paris"]) == had
    three.away = set()
    three.settle()
    assert alike(three) == had


def test_what_waited_for_a_home_goes_with_it(three: Several) -> None:
    """What a third zone had otherwise than a home it got nothing of goes when the one before, home again, has none."""
    oslo, paris, lima = three.stores.values()
    tree = TOP["lima"]
    three.promote("lima", "oslo")
    for name in ("gone", "stays", "dir/inside"):
        lima.put(b"one", name=f"{tree}/{name}")
    lima.execute(cmd.SetAttributes(lima.resolve(tree), mode=0o711))
    three.settle()
    for name in ("gone", "stays", "dir"):
        lima.execute(cmd.SetAttributes(lima.resolve(f"{tree}/{name}"), mode=0o700))
    lima.write(lima.resolve(f"{tree}/gone"), 0, b"two")
    three.ship(("lima", "paris"))
    three.promote("oslo", "lima")
    three.pumps["oslo", "paris"].connect()  # it follows, and nothing is shipped
    three.pumps["lima", "oslo"].connect()
    oslo.mv("/all/dir/inside", "/all/inside")
    oslo.rm("/all/dir", recursive=True)
    oslo.rm("/all/gone")
    three.ship(("oslo", "lima"))
    three.away = {"oslo"}
    three.promote("lima", "oslo")
    three.settle()
    assert {"/inside", "/stays"} <= alike(three).keys()
    assert "/gone" not in alike(three)
    assert paris.get("/zones/.branches/lima+oslo-2/all/gone") == b"two"
    three.away = set()
    three.settle()
    alike(three)


def test_what_a_new_home_withdrew_stays_in_the_branch_of_the_old_one(three: Several) -> None:
    """What a zone deleted as the home it followed had none does not come back where that zone takes over in turn."""
    oslo, paris, _ = three.stores.values()
    three.away = {"paris"}
    oslo.put(b"ahead", name="/all/ahead")
    three.settle()
    three.away = {"oslo"}
    three.promote("paris", "oslo")
    for _, each in below(paris, TOP["paris"]):  # all of it is the same in all zones, as of what paris did
        paris.execute(cmd.SetAttributes(each.id, mode=0o700))
    three.settle()
    three.away = {"lima"}
    three.settle()
    three.promote("oslo", "paris")
    three.away = set()
    three.pumps["oslo", "lima"].connect()  # it follows, and nothing is shipped
    three.promote("lima", "oslo")
    three.settle()
    assert "/ahead" not in alike(three)
    assert oslo.get("/zones/.branches/paris-1/all/ahead") == b"ahead"


def test_a_new_home_whose_log_does_not_reach_back_ships_what_it_still_has(
    three: Several, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third zone follows it all the same: it gets everything as it is now, and what only it has stays."""
    oslo, paris, lima = three.stores.values()
    oslo.write(oslo.resolve("/all/f1"), 0, b"seen by lima alone")
    three.ship(("oslo", "lima"))
    three.promote("paris", "oslo")
    three.away = {"lima"}
    three.settle()
    paris.put(b"new", name="/zones/oslo/all/new")
    paris.write(paris.resolve("/zones/oslo/all/f2"), 0, b"changed")
    paris.rm("/zones/oslo/all/f3")
    begins = paris.last
    monkeypatch.setattr(paris, "wal", _Later(paris.wal, begins))
    monkeypatch.setattr(federation_heir, "Walk", _short(begins))
    three.away = set()
    three.settle()
    monkeypatch.undo()
    assert lima.get("/zones/oslo/all/new") == b"new"
    tree = alike(three)
    assert "/f3" not in tree
    assert {"all/f1", "all/f3"} <= set(files(three, "lima")["oslo+paris-1"])
    assert lima.get("/zones/.branches/oslo+paris-1/all/f1").startswith(b"seen by lima alone")
    paris.put(b"later", name="/zones/oslo/all/later")
    three.settle()
    assert lima.get("/zones/oslo/all/later") == b"later"
    alike(three)


def _short(begins: int) -> type[Walk]:
    """Walks that cannot begin earlier than a log says it does."""

    class Short(Walk):
        def __init__(self, store: Any, position: int) -> None:
            if position + 1 < begins:
                raise NotFoundError(f"the log begins at {begins}")
            super().__init__(store, position)

    return Short

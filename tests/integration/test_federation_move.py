"""The home of single capsules goes to another zone: in agreement, once, at one position, wherever it is broken off."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import space
from space._errors import ConflictError, NotFoundError, RefusedError, SpaceError, UnavailableError, UsageError
from space._node.federation_arrival import set_policy as set_arrival
from space._node.federation_audit import audit
from space._node.federation_move import Residence, hand_over, move, parse_residences, take_back
from space._node.federation_promote import branches, promote
from space._node.federation_status import status
from space._node.federation_zones import Zones
from space.events import commands as cmd
from space.federation.server import _given
from space.policy.model import ArrivalPolicy, Encryption, Policy, Sovereignty
from space.statemachine import zones as rows
from space.statemachine.tables import Overlay
from tests.federation_pump import Pumped, pumped
from tests.federation_support import Served, introduce, served_zones, shared, space_command, two_zones, until

pytestmark = pytest.mark.requires("py:aiohttp")

THERE = "/zones/oslo"


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Pumped]:
    """Two zones with a directory of ``oslo`` that ``paris`` has."""
    with pumped(tmp_path) as zones:
        filled(zones)
        yield zones


def filled(zones: Pumped) -> None:
    """Two files in a directory, and a directory in it."""
    zones.oslo.mkdir("/all")
    zones.oslo.set_policy("/all", shared("paris"))
    zones.oslo.put(b"one", name="/all/f")
    zones.oslo.put(b"two", name="/all/dir/g")
    zones.settle()


def given(zones: Pumped, path: str, *, back: bool = False) -> dict[str, Any]:
    """Gives a home away, to ``paris`` or ``back``; what is left is not shipped yet."""
    store, pump, name = (zones.paris, zones.back, "oslo") if back else (zones.oslo, zones.there, "paris")
    return move(store, Zones(store), path, name, wait_seconds=0, asked=pump.homes)


def given_ahead(zones: Pumped) -> None:
    """Gives ``/all`` to ``paris``; the file in it has come there, by a lane of its own, and the directory not yet."""
    zones.oslo.set_policy("/all/f", shared("paris", priority=50))
    zones.settle()
    given(zones, "/all")
    zones.there.run(1)


def homes(zones: Pumped, path: str) -> list[str]:
    """The zones that say they are the home of what has a path in ``oslo``."""
    capsule = zones.oslo.resolve(path)
    found = []
    for name, store in (("oslo", zones.oslo), ("paris", zones.paris)):
        with store._read() as txn:
            state = Overlay(txn)
            row = state.capsule(capsule)
            if row is not None and rows.home_of(state, capsule, row) is None:
                found.append(name)
    return found


def both(zones: Pumped, path: str) -> list[bytes]:
    """Content of a file in both zones."""
    return [zones.oslo.get(path), zones.paris.get(THERE + path)]


def sound(zones: Pumped) -> None:
    """Both logs prove what they sent, and are sound."""
    for store in (zones.oslo, zones.paris):
        assert audit(store)["findings"] == []
        assert store.verify().findings == []


def test_a_file_has_its_home_elsewhere(two: Pumped) -> None:
    """It is written in the new zone at the path it has there, and followed at the old one at the one it always had."""
    big = bytes(range(256)) * 20_000
    two.oslo.put(big, name="/all/big")
    two.settle()
    two.oslo.write(two.oslo.resolve("/all/big"), 0, b"the last of oslo")
    given(two, "/all/big")
    assert homes(two, "/all/big") == []
    for store, path in ((two.oslo, "/all/big"), (two.paris, f"{THERE}/all/big")):
        with pytest.raises(RefusedError, match="its home is zone"):
            store.write(store.resolve(path), 0, b"x")
    two.there.run()
    assert homes(two, "/all/big") == ["paris"]
    shipped = two.back.shipped_bytes
    two.paris.write(two.paris.resolve(f"{THERE}/all/big"), 0, b"the first of paris")
    two.settle()
    assert two.back.shipped_bytes - shipped < 10_000
    assert both(two, "/all/big") == [b"the first of paris" + big[18:]] * 2
    with pytest.raises(RefusedError, match="its home is zone paris, https://paris:1"):
        two.oslo.write(two.oslo.resolve("/all/big"), 0, b"x")
    with pytest.raises(RefusedError, match="its home is zone paris"):
        two.oslo.rm("/all", recursive=True)
    two.oslo.put(b"goes on", name="/all/f2")
    assert two.oslo.policy(two.oslo.resolve("/all/big")).federation_targets == ("oslo",)
    two.settle()
    assert both(two, "/all/f2") == [b"goes on"] * 2
    sound(two)


def test_a_directory_moves_with_all_in_it(two: Pumped) -> None:
    """What is in it can be made, renamed and removed in the new zone, and is the same in the old one."""
    given(two, "/all/dir")
    two.settle()
    two.paris.put(b"new", name=f"{THERE}/all/dir/new")
    two.paris.mv(f"{THERE}/all/dir/g", f"{THERE}/all/dir/h")
    two.paris.mkdir(f"{THERE}/all/dir/deeper")
    two.paris.mv(f"{THERE}/all/dir/new", f"{THERE}/all/dir/deeper/new")
    two.paris.put(b"short", name=f"{THERE}/all/dir/short")
    two.paris.rm(f"{THERE}/all/dir/short")
    two.oslo.mv("/all", "/renamed")
    two.settle()
    for store, path in ((two.oslo, "/renamed"), (two.paris, f"{THERE}/renamed")):
        found = {name.decode() for name, _ in store.walk(store.resolve(path))}
        assert found == {"", "f", "dir", "dir/h", "dir/deeper", "dir/deeper/new"}
    with pytest.raises(RefusedError):
        two.oslo.put(b"x", name="/renamed/dir/x")
    sound(two)


def test_there_and_back_again(two: Pumped) -> None:
    """A home that moves to and fro carries all that was done in both zones; so do clones, under the same key."""
    secret = shared("paris", encryption=Encryption.AES_256_GCM)
    two.oslo.put(b"in oslo", name="/all/secret", policy=secret)
    two.settle()
    for number in range(3):
        given(two, "/all/secret")
        two.settle()
        two.paris.write(two.paris.resolve(f"{THERE}/all/secret"), number, b"P")
        given(two, f"{THERE}/all/secret", back=True)
        two.settle()
        two.oslo.write(two.oslo.resolve("/all/secret"), number + 3, b"O")
        two.settle()
    assert both(two, "/all/secret") == [b"PPPOOOo"] * 2
    two.oslo.clone("/all/secret", "/all/clone")
    two.settle()
    assert both(two, "/all/clone") == [b"PPPOOOo"] * 2
    assert two.oslo.policy(two.oslo.resolve("/all/secret")).federation_targets == ("paris",)
    sound(two)


def test_what_arrived_encrypted_moves(two: Pumped) -> None:
    """What is encrypted anew where it arrives moves there and back, and is read in both zones all the time."""
    secret = shared("paris", encryption=Encryption.AES_256_GCM)
    for store in (two.oslo, two.paris):
        set_arrival(store, ArrivalPolicy(encryption=Encryption.AES_256_GCM))
    two.oslo.put(b"in oslo", name="/all/secret", policy=secret)
    two.oslo.put(b"in oslo", name="/all/plain")
    two.settle()
    for path in ("/all/secret", "/all/plain"):
        given(two, path)
        two.settle()
        two.paris.write(two.paris.resolve(THERE + path), 3, b"PARIS")
        two.settle()
        assert both(two, path) == [b"in PARIS"] * 2
        given(two, THERE + path, back=True)
        two.settle()
        two.oslo.write(two.oslo.resolve(path), 0, b"IN")
        two.settle()
        assert both(two, path) == [b"IN PARIS"] * 2
        assert homes(two, path) == ["oslo"]
    sound(two)


def test_a_copy_of_what_moved_is_written_over_it(two: Pumped) -> None:
    """A stream that begins anew copies what moved over what the old home has, under its own key and name."""
    two.oslo.put(b"in oslo", name="/all/e", policy=shared("paris", encryption=Encryption.AES_256_GCM))
    two.settle()
    given(two, "/all/e")
    given(two, "/all/dir")
    two.settle()
    two.paris.write(two.paris.resolve(f"{THERE}/all/e"), 0, b"IN PARIS")
    two.paris.put(b"more", name=f"{THERE}/all/dir/more")
    oslo = two.back.zone.id
    two.oslo.execute(cmd.RemoveZone(two.there.zone.id))  # forgets how far paris had come
    (paris,) = [two.there.zone]
    two.oslo.execute(
        cmd.AddZone(paris.id, paris.name, paris.kind, paris.url, paris.authorities, paris.sealing)
    )
    two.restart("paris")
    two.settle()
    assert oslo != paris.id
    assert both(two, "/all/e") == [b"IN PARIS"] * 2
    assert both(two, "/all/dir/more") == [b"more"] * 2
    assert both(two, "/all/dir/g") == [b"two"] * 2
    sound(two)


def test_a_first_copy_gives_what_was_given(two: Pumped) -> None:
    """A stream that begins after a home was given away copies the capsule, and gives its home then."""
    given(two, "/all")
    two.there.run()
    two.paris.write(two.paris.resolve(f"{THERE}/all/f"), 0, b"in paris alone")
    given(two, f"{THERE}/all/f", back=True)
    assert homes(two, "/all/f") == []
    two.restart("paris")  # it has shipped nothing yet, and has to copy all it may
    two.settle()
    assert homes(two, "/all/f") == ["oslo"]
    assert homes(two, "/all") == homes(two, "/all/dir/g") == ["paris"]
    assert both(two, "/all/f") == [b"in paris alone"] * 2
    two.oslo.write(two.oslo.resolve("/all/f"), 0, b"IN OSLO")
    two.settle()
    assert both(two, "/all/f") == [b"IN OSLOs alone"] * 2
    sound(two)


@pytest.mark.parametrize("stop", range(7))
def test_it_goes_on_wherever_it_stops(tmp_path: Path, stop: int) -> None:
    """Processes end after any step: there is never more than one home, and in the end there is exactly one."""
    steps = 0

    with contextlib.ExitStack() as stack:
        zones = [stack.enter_context(pumped(tmp_path))]
        filled(zones[0])

        def ends() -> None:
            """Both processes end here, if it is the step at which they do."""
            nonlocal steps
            assert len(homes(zones[0], "/all/f")) < 2
            if steps == stop:
                zones[0].reopen()
            steps += 1

        zones[0].oslo.write(zones[0].oslo.resolve("/all/f"), 0, b"the last  of oslo")
        ends()
        given(zones[0], "/all/f")
        ends()
        zones[0].there.connect()
        outgoing = zones[0].there.source.next()  # recorded as sent, and lost
        assert outgoing is not None
        ends()
        zones[0].restart("oslo")
        zones[0].there.connect()
        while (outgoing := zones[0].there.source.next()) is not None:
            received = zones[0].there.receiver.receive(zones[0].there.peer, [outgoing.body])
            assert received.error is None
            ends()  # before it is heard that it came
            if steps > stop:
                break
        zones[0].settle()
        assert homes(zones[0], "/all/f") == ["paris"]
        ends()
        zones[0].paris.write(zones[0].paris.resolve(f"{THERE}/all/f"), 0, b"THE FIRST")
        ends()
        zones[0].settle()
        ends()
        assert steps > stop
        assert both(zones[0], "/all/f") == [b"THE FIRST of oslo"] * 2
        assert homes(zones[0], "/all/f") == ["paris"]
        sound(zones[0])


def test_what_is_taken_back_is_never_taken(two: Pumped) -> None:
    """Once the other zone has declined, what is still on its way to it takes no home, and both go on as before."""
    two.oslo.write(two.oslo.resolve("/all/f"), 0, b"ONE")
    given(two, "/all/f")
    late = two.there.source.next()
    assert late is not None
    assert status(two.oslo)["zones"][0]["moving"] == 1
    assert take_back(two.oslo, Zones(two.oslo), "paris", asked=two.there.homes)["capsules"] == 1
    two.oslo.write(two.oslo.resolve("/all/f"), 3, b" again in oslo")
    assert two.there.receiver.receive(two.there.peer, [late.body]).error is None
    assert homes(two, "/all/f") == ["oslo"]
    two.restart("oslo")
    two.settle()
    assert homes(two, "/all/f") == ["oslo"]
    assert both(two, "/all/f") == [b"ONE again in oslo"] * 2
    assert status(two.oslo)["zones"][0]["moving"] == 0
    given(two, "/all/f")
    two.settle()
    assert homes(two, "/all/f") == ["paris"]
    sound(two)


def test_what_was_taken_is_not_taken_back(two: Pumped) -> None:
    """A home the other zone has, or had and gave back, stays where it is; without its answer nothing is taken back."""
    given(two, "/all/f")
    two.there.run()

    def silent(*_: Any) -> list[Residence]:
        raise UnavailableError("no answer")

    with pytest.raises(UnavailableError):
        take_back(two.oslo, Zones(two.oslo), "paris", asked=silent)
    told = take_back(two.oslo, Zones(two.oslo), "paris", asked=two.there.homes)
    assert (told["capsules"], told["taken"]) == (0, 1)
    assert homes(two, "/all/f") == ["paris"]
    given(two, f"{THERE}/all/f", back=True)
    told = take_back(two.oslo, Zones(two.oslo), "paris", asked=two.there.homes)
    assert (told["capsules"], told["taken"]) == (0, 1)
    two.settle()
    assert homes(two, "/all/f") == ["oslo"]
    sound(two)


def test_what_cannot_move_stays(two: Pumped) -> None:
    """A home moves only to a zone that has the whole capsule, may have it, and can read it."""
    here = Policy(sovereignty=Sovereignty.ZONE)
    two.oslo.put(b"x", name="/all/private", policy=here)
    with pytest.raises(RefusedError, match="does not let zone paris hold it"):
        given(two, "/all/private")
    with pytest.raises(RefusedError, match="does not let zone paris hold it"):
        given(two, "/all")
    two.oslo.rm("/all/private")
    two.oslo.put(b"late", name="/all/late")
    with pytest.raises(UnavailableError, match="is not in zone paris yet"):
        given(two, "/all/late")
    sealed = shared("paris", encryption=Encryption.AES_256_GCM, federation_sealed=True)
    two.oslo.put(b"sealed", name="/all/sealed", policy=sealed)
    two.settle()
    with pytest.raises(RefusedError, match="not read it"):
        given(two, "/all/sealed")
    with pytest.raises(NotFoundError):
        given(two, "/nothing")
    with pytest.raises(NotFoundError):
        move(two.oslo, Zones(two.oslo), "/all/f", "rome", wait_seconds=0, asked=two.there.homes)
    lima = two.back.zone
    two.oslo.execute(
        cmd.AddZone(bytes(16)[:-1] + b"l", "lima", lima.kind, "", lima.authorities, lima.sealing)
    )
    two.oslo.set_policy("/all/f", shared("paris", "lima"))
    with pytest.raises(RefusedError, match="lets zone lima have it as well"):
        given(two, "/all/f")
    two.oslo.set_policy("/all/f", shared("paris"))
    given(two, "/all/f")
    with pytest.raises(RefusedError, match="its home is zone paris"):
        given(two, "/all/f")
    assert Zones(two.oslo).replicas(two.there.zone) == 1
    with pytest.raises(UnavailableError, match="nothing ships"):
        hand_over(two.oslo, Zones(two.oslo), "/all/dir/g", "paris")


def test_new_names_in_a_directory_that_moves_are_seen(two: Pumped) -> None:
    """What came into the directory after somebody looked, and is not given with it, keeps it from being given."""
    directory = two.oslo.resolve("/all/dir")
    inside = two.oslo.resolve("/all/dir/g")
    two.oslo.put(b"new", name="/all/dir/new")
    with pytest.raises(ConflictError, match="look again"):
        two.oslo.execute(cmd.GiveHomes(two.there.zone.id, [directory, inside]))
    assert homes(two, "/all/dir") == ["oslo"]


def test_the_new_home_is_taken_over_in_turn(two: Pumped) -> None:
    """The old home takes the place of the new one: it has what had come, and the rest is a branch there."""
    given(two, "/all/f")
    two.settle()
    two.paris.write(two.paris.resolve(f"{THERE}/all/f"), 0, b"came ")
    two.settle()
    two.paris.write(two.paris.resolve(f"{THERE}/all/f"), 5, b"and this did not")
    promote(two.oslo, Zones(two.oslo), "paris")
    assert homes(two, "/all/f") == ["oslo", "paris"]  # until paris hears of it
    two.oslo.write(two.oslo.resolve("/all/f"), 5, b"by oslo")
    two.settle()
    assert homes(two, "/all/f") == ["oslo"]
    assert both(two, "/all/f") == [b"came by oslo"] * 2
    (branch,) = branches(two.paris)
    assert [each["size"] for each in branch["files"]] == [21]
    sound(two)


def test_a_zone_that_gave_a_home_away_is_taken_over(two: Pumped) -> None:
    """Whether the other zone had taken a home or not, it is the home after it took that one's place."""
    given(two, "/all/f")
    two.settle()
    two.paris.write(two.paris.resolve(f"{THERE}/all/f"), 0, b"by paris")
    two.oslo.write(two.oslo.resolve("/all/dir/g"), 0, b"not shipped")
    given(two, "/all/dir/g")
    promote(two.paris, Zones(two.paris), "oslo")
    two.settle()
    assert homes(two, "/all/f") == homes(two, "/all/dir/g") == ["paris"]
    assert both(two, "/all/f") == [b"by paris"] * 2
    assert both(two, "/all/dir/g") == [b"two"] * 2
    (branch,) = branches(two.oslo)
    assert two.oslo.get(f"{branch['path']}/all/dir/g") == b"not shipped"
    promote(two.oslo, Zones(two.oslo), "paris")
    two.settle()
    assert homes(two, "/all/f") == homes(two, "/all/dir/g") == ["oslo"]
    sound(two)


def test_a_home_is_not_taken_after_a_promotion(two: Pumped) -> None:
    """A home that was given away and not taken is at home again in the zone that took the other one's place."""
    two.oslo.write(two.oslo.resolve("/all/f"), 0, b"not shipped")
    given(two, "/all/f")
    with pytest.raises(NotFoundError):
        promote(two.oslo, Zones(two.oslo), "paris")  # nothing had come from there
    two.paris.mkdir("/mine")
    two.paris.set_policy("/mine", shared("oslo"))
    two.back.run()
    promote(two.oslo, Zones(two.oslo), "paris")
    two.oslo.write(two.oslo.resolve("/all/f"), 0, b"NOT")
    two.settle()
    assert homes(two, "/all/f") == ["oslo"]
    assert both(two, "/all/f") == [b"NOT shipped"] * 2
    sound(two)


def test_what_was_done_to_a_home_that_was_given_back_is_set_aside(two: Pumped) -> None:
    """What a zone did to a home it took and gave back, none of which came, is a branch when its place is taken."""
    two.paris.mkdir("/mine")
    two.paris.set_policy("/mine", shared("oslo"))
    two.back.run()
    given(two, "/all/f")
    two.there.run()
    paris = two.paris
    paris.write(paris.resolve(f"{THERE}/all/f"), 0, b"not shipped")
    paris.execute(cmd.SetXattr(paris.resolve(f"{THERE}/all/f"), b"user.x", b"not shipped"))
    given(two, f"{THERE}/all/f", back=True)
    promote(two.oslo, Zones(two.oslo), "paris")
    two.settle()
    assert homes(two, "/all/f") == ["oslo"]
    assert both(two, "/all/f") == [b"one"] * 2
    assert list(paris.xattrs(paris.resolve(f"{THERE}/all/f"))) == []
    assert paris.policy(paris.resolve(f"{THERE}/all/f")).federation_targets == ("paris",)
    (branch,) = branches(paris)
    assert [each["path"] for each in branch["files"]] == ["all/f"]
    assert paris.get(f"{branch['path']}/all/f") == b"not shipped"
    sound(two)


def test_what_was_taken_before_a_promotion_is_not_set_aside(two: Pumped) -> None:
    """Where a zone gave back what it has not told of, and the other one had taken all of it, nothing is set aside."""
    two.paris.mkdir("/mine")
    two.paris.set_policy("/mine", shared("oslo", priority=50))
    two.back.run()
    for _ in range(2):
        given(two, "/all/f")
        two.there.run()
        two.paris.write(two.paris.resolve(f"{THERE}/all/f"), 0, b"PARIS")
        given(two, f"{THERE}/all/f", back=True)
        two.back.run()
    given(two, "/all/f")
    promote(two.oslo, Zones(two.oslo), "paris")
    two.settle()
    assert homes(two, "/all/f") == ["oslo"]
    assert both(two, "/all/f") == [b"PARIS"] * 2
    assert branches(two.paris) == []
    sound(two)


def test_what_came_of_a_home_before_a_promotion_is_not_set_aside(two: Pumped) -> None:
    """What the other zone did to a home it took is its own, though it gave the home back before a promotion."""
    given(two, "/all/f")
    two.there.run()
    two.paris.write(two.paris.resolve(f"{THERE}/all/f"), 0, b"PARIS")
    two.back.run()
    given(two, f"{THERE}/all/f", back=True)
    promote(two.paris, Zones(two.paris), "oslo")
    two.settle()
    assert homes(two, "/all/f") == ["paris"]
    assert both(two, "/all/f") == [b"PARIS"] * 2
    assert branches(two.oslo) == []
    sound(two)


def test_what_came_of_a_home_that_was_taken_back_is_not_set_aside(two: Pumped) -> None:
    """What a zone told of a home it got back, gave away and took back is its own when it takes the other's place."""
    two.paris.mkdir("/mine")
    two.paris.set_policy("/mine", shared("oslo", priority=50))
    given(two, "/all/f")
    two.settle()
    two.paris.write(two.paris.resolve(f"{THERE}/all/f"), 0, b"PARIS")
    given(two, f"{THERE}/all/f", back=True)
    two.settle()
    given(two, "/all/f")
    assert take_back(two.oslo, Zones(two.oslo), "paris", asked=two.there.homes)["capsules"] == 1
    two.oslo.write(two.oslo.resolve("/all/f"), 0, b"OSLO")
    two.there.run()
    promote(two.oslo, Zones(two.oslo), "paris")
    two.settle()
    assert homes(two, "/all/f") == ["oslo"]
    assert both(two, "/all/f") == [b"OSLOS"] * 2
    assert branches(two.paris) == []
    sound(two)


def test_a_home_that_was_taken_back_is_given_again(two: Pumped) -> None:
    """A zone that took a home, gave it, took it back and gave it again had taken it, and keeps what it did to it."""
    oslo, paris = two.oslo, two.paris
    given(two, "/all/f")
    two.there.run()
    given(two, f"{THERE}/all/f", back=True)
    assert take_back(paris, Zones(paris), "oslo", asked=two.back.homes)["capsules"] == 1
    paris.write(paris.resolve(f"{THERE}/all/f"), 0, b"PARIS")
    given(two, f"{THERE}/all/f", back=True)
    told = take_back(oslo, Zones(oslo), "paris", asked=two.there.homes)
    assert (told["capsules"], told["taken"]) == (0, 1)
    two.settle()
    assert homes(two, "/all/f") == ["oslo"]
    assert both(two, "/all/f") == [b"PARIS"] * 2
    sound(two)


@pytest.mark.parametrize("told", [False, True], ids=["", "told"])
def test_what_was_taken_before_both_zones_were_taken_over_is_as_far_as_it_came(
    two: Pumped, told: bool
) -> None:
    """A zone that had taken a home, lost it to a promotion and takes over in turn has no more than what came since."""
    oslo, paris = two.oslo, two.paris
    given(two, "/all/f")
    two.settle()
    promote(oslo, Zones(oslo), "paris")
    two.settle()
    given(two, "/all/f")
    assert take_back(oslo, Zones(oslo), "paris", asked=two.there.homes)["capsules"] == 1
    if told:  # that it was given, and no more
        two.there.run()
    oslo.write(oslo.resolve("/all/f"), 0, b"OSLO")
    promote(paris, Zones(paris), "oslo")
    two.settle()
    assert homes(two, "/all/f") == ["paris"]
    assert both(two, "/all/f") == [b"one"] * 2
    assert [oslo.get(f"{each['path']}/all/f") for each in branches(oslo)] == [b"OSLO"]
    sound(two)


@pytest.mark.parametrize("write", [False, True], ids=["", "written"])
def test_a_home_that_is_taken_back_is_known_to_have_come_from_there(two: Pumped, write: bool) -> None:
    """A zone that got a home back, gave it again and took that back sets aside what it did since, and no more."""
    oslo, paris = two.oslo, two.paris
    given(two, "/all/f")
    two.settle()
    paris.write(paris.resolve(f"{THERE}/all/f"), 0, b"PARIS")
    given(two, f"{THERE}/all/f", back=True)
    two.settle()
    given(two, "/all/f")
    assert take_back(oslo, Zones(oslo), "paris", asked=two.there.homes)["capsules"] == 1
    if write:
        oslo.write(oslo.resolve("/all/f"), 0, b"OSLO")
    promote(paris, Zones(paris), "oslo")
    two.settle()
    assert homes(two, "/all/f") == ["paris"]
    assert both(two, "/all/f") == [b"PARIS"] * 2
    assert [oslo.get(f"{each['path']}/all/f") for each in branches(oslo)] == [b"OSLOS"] * write
    sound(two)


@pytest.mark.parametrize("write", [False, True], ids=["", "written"])
def test_a_home_that_is_taken_back_untold_is_known_to_have_come_from_there(two: Pumped, write: bool) -> None:
    """So is one of which that zone was told nothing between; its policy is as that zone has it."""
    oslo, paris = two.oslo, two.paris
    paris.mkdir("/mine")
    paris.set_policy("/mine", shared("oslo", priority=50))
    two.settle()
    given(two, "/all/f")
    two.there.run()
    given(two, f"{THERE}/all/f", back=True)
    assert take_back(paris, Zones(paris), "oslo", asked=two.back.homes)["capsules"] == 1
    if write:
        paris.write(paris.resolve(f"{THERE}/all/f"), 0, b"paris")
    promote(oslo, Zones(oslo), "paris")
    two.settle()
    assert homes(two, "/all/f") == ["oslo"]
    assert both(two, "/all/f") == [b"one"] * 2
    assert [paris.get(f"{each['path']}/all/f") for each in branches(paris)] == [b"paris"] * write
    if write:
        policies = [oslo.policy(oslo.resolve("/all/f")), paris.policy(paris.resolve(f"{THERE}/all/f"))]
        assert [each.federation_targets for each in policies] == [("paris",)] * 2
    sound(two)


def test_a_first_copy_under_way_says_nothing_of_what_is_not_in_it_yet(two: Pumped) -> None:
    """A zone's place is taken while its first copy is under way: what it did to a home it took is set aside."""
    given(two, "/all/f")
    two.there.run()
    paris = two.paris
    paris.write(paris.resolve(f"{THERE}/all/f"), 0, b"not shipped")
    for number in range(3):  # more than goes at once
        paris.put(random.Random(number).randbytes(12 << 20), name=f"/large{number}", policy=shared("oslo"))
    given(two, f"{THERE}/all/f", back=True)
    two.restart("paris")  # it has shipped nothing yet, and has to copy all it may
    two.back.connect()
    two.back.run(1)
    promote(two.oslo, Zones(two.oslo), "paris")
    two.settle()
    assert homes(two, "/all/f") == ["oslo"]
    assert both(two, "/all/f") == [b"one"] * 2
    (branch,) = branches(paris)
    assert paris.get(f"{branch['path']}/all/f") == b"not shipped"
    sound(two)


@pytest.mark.parametrize("again", [False, True], ids=["", "removed and added"])
def test_a_first_copy_under_way_is_finished_after_a_promotion(two: Pumped, again: bool) -> None:
    """A zone takes the other one's place while its first copy goes there: that one gets the rest, and all that is new.

    Also if it forgets, between the two, how far the copy had come.
    """
    paris = two.paris
    large = {
        f"/large{number}": random.Random(number).randbytes(9 << 20)  # more than goes at once
        for number in range(3)
    }
    for name, content in large.items():
        paris.put(content, name=name, policy=shared("oslo", priority=50 * (name == "/large1")))
    two.back.connect()
    two.back.run(3)  # both lanes are open, and half of a file is there
    promote(paris, Zones(paris), "oslo")
    paris.write(paris.resolve(f"{THERE}/all/f"), 0, b"ONE")
    two.there.connect()
    if again:
        Zones(two.oslo).remove("paris", sure=True)
        introduce(two.oslo, paris, "https://paris:1")
        two.reopen()
    two.settle()
    assert {name: two.oslo.get(f"/zones/paris{name}") for name in large} == large
    assert both(two, "/all/f") == [b"ONE"] * 2
    assert both(two, "/all/dir/g") == [b"two"] * 2
    sound(two)


def test_what_was_removed_in_a_directory_stays_removed(two: Pumped) -> None:
    """A zone that is told anew that a directory is gone, which it removed itself, has nothing of it back."""
    oslo, paris = two.oslo, two.paris
    promote(paris, Zones(paris), "oslo")
    paris.put(b"new", name=f"{THERE}/all/dir/new")
    two.settle()
    paris.rm(f"{THERE}/all/dir", recursive=True)
    two.settle()
    promote(oslo, Zones(oslo), "paris")
    oslo.write(oslo.resolve("/all/f"), 0, b"ONE")
    two.settle()
    Zones(paris).remove("oslo", sure=True)
    introduce(paris, oslo, "https://oslo:1")
    two.reopen()
    two.settle()
    assert two.paris.ls(f"{THERE}/.capsules") == []
    assert both(two, "/all/f") == [b"ONE"] * 2
    sound(two)


def test_new_names_of_a_home_that_moved_are_set_aside(two: Pumped) -> None:
    """A name in a directory of its own that a zone gave to what it had got goes when its place is taken."""
    two.paris.mkdir("/mine")
    two.paris.set_policy("/mine", shared("oslo"))
    given(two, "/all/f")
    two.settle()
    parent, name = two.paris._parent_of("/mine/f")
    two.paris.execute(cmd.Link(two.paris.resolve(f"{THERE}/all/f"), parent, name))
    promote(two.oslo, Zones(two.oslo), "paris")
    two.settle()
    assert [path for path, _ in two.paris.walk(two.paris.resolve("/mine"))] == [b""]
    assert both(two, "/all/f") == [b"one"] * 2
    sound(two)


def test_names_in_a_deleted_directory_keep_nobody_from_following(two: Pumped) -> None:
    """A zone follows though what it gave away has a name in a directory it deleted, beside something it restores."""
    oslo = two.oslo
    oslo.mkdir("/all/gone")
    for name in ("f", "dir/g"):
        parent, link = oslo._parent_of(f"/all/gone/{name[-1]}")
        oslo.execute(cmd.Link(oslo.resolve(f"/all/{name}"), parent, link))
    two.settle()
    oslo.rm("/all/gone", recursive=True)
    two.settle()
    given(two, "/all/dir/g")
    oslo.write(oslo.resolve("/all/f"), 0, b"not shipped")
    promote(two.paris, Zones(two.paris), "oslo")
    two.settle()
    assert homes(two, "/all/f") == homes(two, "/all/dir/g") == ["paris"]
    assert both(two, "/all/f") == [b"one"] * 2
    assert both(two, "/all/dir/g") == [b"two"] * 2
    sound(two)


def test_a_directory_that_is_taken_back_keeps_what_came_back_before(two: Pumped) -> None:
    """Lanes overtake each other: a file that was at home again is not lost with an older copy of its directory."""
    given_ahead(two)
    assert homes(two, "/all/f") == ["paris"]
    assert take_back(two.oslo, Zones(two.oslo), "paris", asked=two.there.homes)["capsules"] == 3
    given(two, f"{THERE}/all/f", back=True)
    two.back.run()
    two.settle()
    assert homes(two, "/all/f") == homes(two, "/all") == ["oslo"]
    assert both(two, "/all/f") == [b"one"] * 2
    assert both(two, "/all/dir/g") == [b"two"] * 2
    sound(two)


def test_a_directory_that_is_taken_back_keeps_what_is_on_its_way_back(two: Pumped) -> None:
    """A file that was given back keeps its name in a directory of which a copy comes before the file was taken."""
    given_ahead(two)
    given(two, f"{THERE}/all/f", back=True)
    assert take_back(two.oslo, Zones(two.oslo), "paris", asked=two.there.homes)["capsules"] == 3
    two.there.run()
    assert homes(two, "/all/f") == []
    assert both(two, "/all/f") == [b"one"] * 2
    two.settle()
    assert homes(two, "/all/f") == homes(two, "/all") == ["oslo"]
    assert both(two, "/all/f") == [b"one"] * 2
    sound(two)


def test_a_directory_that_is_taken_back_keeps_what_the_other_zone_took_back(two: Pumped) -> None:
    """Each zone takes back what it gave to the other one: a directory, and a file in it that is at home elsewhere."""
    given_ahead(two)
    given(two, f"{THERE}/all/f", back=True)
    assert take_back(two.paris, Zones(two.paris), "oslo", asked=two.back.homes)["capsules"] == 1
    two.paris.write(two.paris.resolve(f"{THERE}/all/f"), 0, b"PARIS")
    assert take_back(two.oslo, Zones(two.oslo), "paris", asked=two.there.homes)["capsules"] == 3
    two.settle()
    assert homes(two, "/all/f") == ["paris"]
    assert homes(two, "/all") == ["oslo"]
    assert both(two, "/all/f") == [b"PARIS"] * 2
    assert both(two, "/all/dir/g") == [b"two"] * 2
    sound(two)


def test_a_directory_is_taken_back_by_a_zone_that_was_taken_over(two: Pumped) -> None:
    """What is copied to a zone that took the other one's place gets its names there, and no others."""
    two.paris.mkdir("/mine")
    two.paris.set_policy("/mine", shared("oslo"))
    two.settle()
    promote(two.oslo, Zones(two.oslo), "paris")
    two.settle()
    given(two, "/all")
    two.there.run()
    given(two, f"{THERE}/all", back=True)
    assert take_back(two.paris, Zones(two.paris), "oslo", asked=two.back.homes)["capsules"] == 4
    two.settle()
    assert homes(two, "/all/dir/g") == ["paris"]
    assert both(two, "/all/f") == [b"one"] * 2
    assert both(two, "/all/dir/g") == [b"two"] * 2
    assert two.oslo.ls("/zones/paris/.capsules") == []
    sound(two)


def test_a_home_takes_nobody_elses(two: Pumped) -> None:
    """A zone can give away the home of its own replicas only, and a store that is the home itself is asked in vain."""
    mine = two.paris.put(b"of paris", name="/mine").id
    assert two.there.homes({bytes(mine): 5}, 0) == [Residence.HOME]
    assert two.there.homes({bytes(16): 5}, 0) == [Residence.ABSENT]
    with pytest.raises(SpaceError, match="shipment only"):
        two.paris.execute(cmd.TakeHome(mine, b"", 0, 0, 1))
    oslo = two.back.zone.id
    take = cmd.TakeHome(bytes(mine), b"", 0, 0, 1)
    cursor = two.there.receiver.cursors(two.there.peer)["cursors"][0]
    at = (cursor["position"], cursor["position"] + 1)
    two.paris.execute(cmd.ReceiveShipment(oslo, 0, cursor["lane"], *at, 0, [take], cursor["step"]))
    with two.paris._read() as txn:
        assert rows.home_row(txn, mine) is None
    with pytest.raises(SpaceError):
        two.oslo.execute(cmd.GiveHomes(two.there.zone.id, []))
    with pytest.raises(SpaceError):
        two.oslo.execute(cmd.GiveHomes(two.there.zone.id, [bytes(16)]))


def test_over_the_network(tmp_path: Path) -> None:
    """Two zones at work: a home is handed over while somebody waits; and stays where it is while they are apart."""
    with two_zones(tmp_path) as zones:
        oslo, paris = zones.oslo, zones.paris
        oslo.mkdir("/all")
        oslo.set_policy("/all", shared("paris"))
        oslo.put(b"one", name="/all/a")
        oslo.put(b"two", name="/all/b")
        zones.serve()
        zones.in_step()
        done = hand_over(oslo, Zones(oslo), "/all/a", "paris")
        assert done["capsules"] == 1
        paris.write(paris.resolve(f"{THERE}/all/a"), 0, b"by paris")
        until(lambda: oslo.get("/all/a") == b"by paris")
        assert [each.home for each in oslo.replicas(oslo.resolve("/all/a")) if each.zone == "paris"] == [True]
        zones.links["paris"].cut()
        until(lambda: not zones.status("oslo")["zones"][0]["connected"])
        with pytest.raises(UnavailableError):
            hand_over(oslo, Zones(oslo), "/all/b", "paris")
        oslo.write(oslo.resolve("/all/b"), 0, b"not given away without an answer")


def test_by_commands(tmp_path: Path) -> None:
    """``space zone move`` and ``take-back`` say what they did, and a killed zone goes on with what it was told."""
    with contextlib.ExitStack() as stack:
        data, at, policy = served_zones(tmp_path, stack)
        space_command("--data", data["oslo"], "put", "-", "--name", "/f", "--policy-file", policy, text="one")

        def has_come() -> bool:
            listed = json.loads(space_command("--data", data["oslo"], "--json", "federation", "status"))
            (zone,) = listed["zones"]
            return bool(zone["connected"] and zone["position"] and not zone["lag_events"])

        until(has_come)
        told = json.loads(space_command("--data", data["oslo"], "--json", "zone", "move", "/f", "paris"))
        assert told["capsules"] == 1
        assert "its home is zone paris" in space_command("--data", data["oslo"], "rm", "/f", status=5)
        at["paris"].kill()
        with space.open(data["paris"]) as store:
            store.write(store.resolve("/zones/oslo/f"), 0, b"two, in paris")
        stack.enter_context(Served(data["paris"], "--listen", f"127.0.0.1:{at['paris'].port}"))
        until(lambda: space_command("--data", data["oslo"], "get", "/f") == "two, in paris")
        assert "0 capsules" in space_command("--data", data["oslo"], "zone", "take-back", "paris")
        for path in data.values():
            assert "0 not allowed" in space_command("--data", path, "verify", "--sovereignty")


@pytest.mark.parametrize(
    "asked", [None, 5, "x", ["00" * 16], [["00" * 16]], [["00" * 16, -1]], [[5, 5]], [[1, True]]]
)
def test_bad_questions(asked: Any) -> None:
    """What is no question about homes is refused, whatever it is."""
    with pytest.raises(UsageError, match="not a question about capsules"):
        _given(asked)


@pytest.mark.parametrize(
    "answer", [{}, {"capsules": 1}, {"capsules": [1]}, {"capsules": [1, 7]}, {"capsules": [1, "2"]}]
)
def test_bad_answers(answer: dict[str, Any]) -> None:
    """A zone that answers something else about two capsules has not answered."""
    with pytest.raises(UnavailableError):
        parse_residences(answer, 2)

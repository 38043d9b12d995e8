"""A zone that takes another one's place: what is lost, what the old home keeps and how it follows, and the way back."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import space
from space._errors import ConflictError, NotFoundError, RefusedError, SpaceError
from space._node.federation_audit import audit
from space._node.federation_promote import branches, predict, promote
from space._node.federation_zones import Zones
from space._node.store import Store
from space.events import commands as cmd
from space.events.types import Kind
from space.policy.model import Encryption
from tests.federation_pump import Pumped, pumped
from tests.federation_support import (
    Served,
    Two,
    content_at,
    served_zones,
    shared,
    space_command,
    two_zones,
    until,
)

pytestmark = pytest.mark.requires("py:aiohttp")


@pytest.fixture
def zones(tmp_path: Path) -> Iterator[Two]:
    """Two zones that know each other."""
    with two_zones(tmp_path) as two:
        yield two


def tree(store: Store, path: str) -> dict[str, Any]:
    """What is below a path: content of files, None for directories; replicas without a place apart."""
    root = store.resolve(path)
    return {
        name.decode(): store.get(stat.id) if stat.kind == Kind.FILE else None
        for name, stat in store.walk(root)
        if name and not name.startswith(b".capsules")
    }


def attributes(store: Store, path: str) -> dict[str, tuple[Any, ...]]:
    """Attributes of all below a path that both zones have to have alike."""
    root = store.resolve(path)
    return {
        name.decode(): (stat.id, stat.mode, stat.uid, stat.gid, stat.size, stat.mtime, stat.ctime, stat.btime)
        for name, stat in store.walk(root)
    }


def shipping(zones: Two) -> None:
    """A tree of ``oslo`` that ``paris`` has, both at work."""
    oslo = zones.oslo
    made = oslo.mkdir("/all")
    oslo.set_policy(made, shared("paris"))
    oslo.put(b"one", name="/all/a")
    oslo.put(b"two" * 50_000, name="/all/deep/b")
    oslo.put(b"three", name="/all/deep/c")
    oslo.put(b"four", name="/all/d")
    zones.serve()
    zones.in_step()


def apart(zones: Two) -> None:
    """Cuts both ways."""
    for link in zones.links.values():
        link.cut()
    until(lambda: not zones.status("oslo")["zones"][0]["connected"])


def together(zones: Two) -> None:
    """Heals both ways."""
    for name, link in zones.links.items():
        running = zones.stores[name].federation
        assert running is not None
        link.heal(running.port)


def settled(zones: Two, loser: str, winner: str) -> None:
    """Waits until the zone that lost has all of the other one."""
    until(lambda: branches(zones.stores[loser]) or zones.status(winner)["zones"][0]["connected"])
    zones.in_step(winner, loser)


def test_a_zone_takes_over_and_the_old_home_follows(zones: Two) -> None:
    """What the old home had not shipped is a branch there; else it is what the new home has, and follows it."""
    shipping(zones)
    oslo, paris = zones.oslo, zones.paris
    apart(zones)
    oslo.write(oslo.resolve("/all/a"), 0, b"ONE here")
    oslo.write(oslo.resolve("/all/deep/b"), 100, b"changed in the middle")
    oslo.put(b"new here", name="/all/deep/new")
    oslo.mv("/all/d", "/all/deep/moved")
    oslo.rm("/all/deep/c")
    was = {path: oslo.get(oslo.resolve(path)) for path in ("/all/a", "/all/deep/b", "/all/deep/new")}

    with pytest.raises(RefusedError):
        paris.write(paris.resolve("/zones/oslo/all/a"), 0, b"x")
    told = promote(paris, Zones(paris), "oslo")
    assert told["epoch"] == 1
    paris.write(paris.resolve("/zones/oslo/all/a"), 0, b"one there")
    paris.put(b"made there", name="/zones/oslo/all/deep/there")
    paris.rm("/zones/oslo/all/d")

    together(zones)
    until(lambda: branches(oslo))
    zones.in_step("paris", "oslo")
    assert (
        tree(oslo, "/all")
        == tree(paris, "/zones/oslo/all")
        == {
            "a": b"one there",
            "deep": None,
            "deep/b": b"two" * 50_000,
            "deep/c": b"three",
            "deep/there": b"made there",
        }
    )
    assert attributes(oslo, "/all") == attributes(paris, "/zones/oslo/all")
    (branch,) = branches(oslo)
    assert branch["path"] == "/zones/.branches/paris-1"
    kept = {path: content for path, content in tree(oslo, branch["path"]).items() if content is not None}
    assert kept == {path.removeprefix("/"): content for path, content in was.items()}
    with pytest.raises(RefusedError, match="paris"):
        oslo.write(oslo.resolve("/all/a"), 0, b"x")
    oslo.verify()
    paris.verify()


def test_and_back_again(zones: Two) -> None:
    """Promoted in turn, the old home is the home again, with what was done in between; the other one follows again."""
    test_a_zone_takes_over_and_the_old_home_follows(zones)
    oslo, paris = zones.oslo, zones.paris
    apart(zones)
    paris.put(b"late there", name="/zones/oslo/all/late")
    paris.write(paris.resolve("/zones/oslo/all/deep/b"), 0, b"LATE")
    assert promote(oslo, Zones(oslo), "paris")["epoch"] == 2
    oslo.write(oslo.resolve("/all/deep/c"), 0, b"THREE again")
    oslo.put(b"again", name="/all/again")
    together(zones)
    until(lambda: branches(paris))
    zones.in_step("oslo", "paris")
    assert tree(oslo, "/all") == tree(paris, "/zones/oslo/all")
    assert attributes(oslo, "/all") == attributes(paris, "/zones/oslo/all")
    assert oslo.get(oslo.resolve("/all/a")) == b"one there"
    (branch,) = branches(paris)
    assert branch["path"] == "/zones/.branches/oslo-2"
    kept = {path: content for path, content in tree(paris, branch["path"]).items() if content is not None}
    assert kept == {"all/late": b"late there", "all/deep/b": b"LATE" + (b"two" * 50_000)[4:]}
    oslo.write(oslo.resolve("/all/a"), 0, b"ours")
    zones.in_step("oslo", "paris")
    assert tree(oslo, "/all") == tree(paris, "/zones/oslo/all")
    oslo.verify()
    paris.verify()


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Pumped]:
    """Two zones without a network between them; ``paris`` has a tree of ``oslo``."""
    with pumped(tmp_path) as found:
        found.oslo.mkdir("/all")
        found.oslo.set_policy("/all", shared("paris"))
        for number in range(20):
            found.oslo.put(os.urandom(1000), name=f"/all/f{number}")
        found.settle()
        yield found


def promoted(store: Store, zone: str, **options: Any) -> dict[str, Any]:
    """What a promotion said."""
    return promote(store, Zones(store), zone, **options)


def test_what_is_lost_was_predicted(two: Pumped) -> None:
    """What a home said is missing, less what came after it said so, is what its branch has when it comes back."""
    for number in (3, 5, 7):
        two.oslo.write(two.oslo.resolve(f"/all/f{number}"), 0, os.urandom(500))
    two.oslo.put(b"new", name="/all/new")
    two.there.pulse()
    told = two.predicted()
    assert told["positions"] == 4
    assert told["unknown"] == 0
    assert not told["more"]
    expected = {str(two.oslo.resolve(f"/all/{name}")) for name in ("f3", "f5", "f7", "new")}
    assert {each["capsule"] for each in told["capsules"]} == expected
    assert told["bytes"] >= 1503
    assert promoted(two.paris, "oslo")["capsules"] == told["capsules"]
    two.settle()
    (branch,) = branches(two.oslo)
    assert {each["path"] for each in branch["files"]} == {"all/f3", "all/f5", "all/f7", "all/new"}


def test_only_the_difference_moves(two: Pumped) -> None:
    """Following again ships what the new home did since, and 1 % more at most; what was set aside stays where it is."""
    big = os.urandom(40 << 20)
    two.oslo.put(big, name="/all/big")
    two.settle()
    two.oslo.write(two.oslo.resolve("/all/big"), 0, os.urandom(10 << 20))
    promoted(two.paris, "oslo")
    changed = os.urandom(4 << 20)
    two.paris.write(two.paris.resolve("/zones/oslo/all/big"), 20 << 20, changed)
    before = two.there.shipped_bytes + two.back.shipped_bytes
    two.settle()
    moved = two.there.shipped_bytes + two.back.shipped_bytes - before
    assert two.oslo.get("/all/big") == two.paris.get("/zones/oslo/all/big")
    assert two.oslo.get("/all/big") == big[: 20 << 20] + changed + big[24 << 20 :]
    assert len(changed) <= moved <= len(changed) * 1.01


def test_a_zone_is_promoted_once(two: Pumped) -> None:
    """A second promotion is refused; so is one over a zone nothing came from, and of one that is not known."""
    promoted(two.paris, "oslo")
    with pytest.raises(ConflictError, match="since epoch 1"):
        promoted(two.paris, "oslo")
    with pytest.raises(NotFoundError, match="nothing has come"):
        promoted(two.oslo, "paris")
    with pytest.raises(NotFoundError):
        promoted(two.oslo, "rome")


def test_both_take_each_others_place(two: Pumped) -> None:
    """Where both sides were promoted nothing is shipped and both say why, until one is promoted again and wins."""
    two.paris.mkdir("/mine")
    two.paris.set_policy("/mine", shared("oslo"))
    two.paris.put(b"of paris", name="/mine/file")
    two.settle()
    promoted(two.paris, "oslo")
    promoted(two.oslo, "paris")
    two.oslo.put(b"o", name="/all/o")
    two.paris.put(b"p", name="/zones/oslo/all/p")
    for pump in (two.there, two.back):
        with pytest.raises(RefusedError, match="both took each other's place in epoch 1"):
            pump.connect()
    assert promoted(two.oslo, "paris", again=True)["epoch"] == 2
    two.settle()
    assert tree(two.oslo, "/all") == tree(two.paris, "/zones/oslo/all")
    assert two.oslo.get("/zones/paris/mine/file") == b"of paris"
    assert two.oslo.get("/all/o") == b"o"
    (branch,) = branches(two.paris)
    assert [each["path"] for each in branch["files"]] == ["all/p"]
    with pytest.raises(RefusedError):
        two.paris.put(b"x", name="/zones/oslo/all/x")


def test_the_higher_epoch_wins(two: Pumped) -> None:
    """A side that was promoted in an epoch the other has left behind gives way, whatever it took."""
    two.paris.mkdir("/mine")
    two.paris.set_policy("/mine", shared("oslo"))
    two.paris.put(b"of paris", name="/mine/file")
    two.settle()
    promoted(two.oslo, "paris")
    promoted(two.paris, "oslo")
    promoted(two.paris, "oslo", again=True)
    two.oslo.write(two.oslo.resolve("/zones/paris/mine/file"), 0, b"by oslo")
    two.settle()
    assert two.oslo.get("/zones/paris/mine/file") == two.paris.get("/mine/file") == b"of paris"
    (branch,) = branches(two.oslo)
    assert branch["path"] == "/zones/.branches/paris-2"
    assert [each["path"] for each in branch["files"]] == ["mine/file"]


def test_half_of_a_copy_is_no_capsule(two: Pumped) -> None:
    """What was being copied when the place was taken is dropped there; the old home has all of it in its branch."""
    big = os.urandom(20 << 20)
    made = two.oslo.put(big, name="/big")
    two.oslo.set_policy("/big", shared("paris"))
    two.there.run(2)
    assert two.paris.stat(made.id).nlink == 0
    assert two.predicted()["incomplete"] == [str(made.id)]
    promoted(two.paris, "oslo")
    with pytest.raises(NotFoundError):
        two.paris.stat(made.id)
    assert two.paris.verify().findings == []
    two.settle()
    assert two.oslo.resolve("/zones/.branches/paris-1/big") == made.id
    assert two.oslo.get(made.id) == big
    two.oslo.write(made.id, 0, b"ours still")


def test_encrypted_content_comes_back_under_its_key(two: Pumped) -> None:
    """An encrypted file is taken back, changed by the new home, cloned there, and read at the old one."""
    two.oslo.put(b"secret", name="/all/e", policy=shared("paris", encryption=Encryption.AES_256_GCM))
    two.settle()
    two.oslo.write(two.oslo.resolve("/all/e"), 0, b"SECRET")
    promoted(two.paris, "oslo")
    two.paris.write(two.paris.resolve("/zones/oslo/all/e"), 6, b" there")
    two.paris.clone("/zones/oslo/all/e", "/zones/oslo/all/copy")
    two.settle()
    assert two.oslo.get("/all/e") == two.oslo.get("/all/copy") == b"secret there"
    (branch,) = branches(two.oslo)
    assert two.oslo.get(f"{branch['path']}/all/e") == b"SECRET"


def test_the_branch_stays_where_it_is(two: Pumped) -> None:
    """Nothing of a branch is shipped, though it is of files that were; and it can be changed and removed."""
    two.oslo.write(two.oslo.resolve("/all/f1"), 0, b"kept aside")
    assert Zones(two.oslo).replicas(two.there.zone) == 0
    promoted(two.paris, "oslo")
    two.settle()
    assert Zones(two.oslo).replicas(two.there.zone) == 21
    path = "/zones/.branches/paris-1"
    aside = two.oslo.resolve(f"{path}/all/f1")
    two.oslo.write(aside, 0, b"changed")
    two.settle()
    with pytest.raises(NotFoundError):
        two.paris.stat(aside)
    two.oslo.rm(path, recursive=True)
    assert branches(two.oslo) == []


def test_the_log_proves_where_things_went(two: Pumped) -> None:
    """Every shipment of both zones was allowed; one that a log tells of and was not is found, and where."""
    two.oslo.put(b"mine", name="/mine")
    promoted(two.paris, "oslo")
    two.paris.put(b"more", name="/zones/oslo/all/more")
    two.settle()
    for store in (two.oslo, two.paris):
        report = audit(store)
        assert report["shipments"] > 0
        assert report["findings"] == []
    mine = two.oslo.resolve("/mine")
    position = two.oslo.position
    paris = two.there.zone.id
    two.oslo.execute(cmd.RecordShipment(paris, 0, 0, position, position, 0, [(bytes(mine), position)], 100))
    (finding,) = audit(two.oslo)["findings"]
    assert (finding["position"], finding["capsule"], finding["zone"]) == (position + 1, str(mine), "paris")
    assert "sovereignty" in finding["reason"]


def test_a_forged_shipment_is_damage_for_people(tmp_path: Path) -> None:
    """``space verify --sovereignty`` ends with status 6 and names capsule, position and policy."""
    path = tmp_path / "oslo"
    with pumped(tmp_path) as two:
        two.oslo.put(b"mine", name="/mine")
        position = two.oslo.position
        mine = two.oslo.resolve("/mine")
        clean = [(bytes(mine), position)]
    assert "0 not allowed" in space_command("--data", path, "verify", "--sovereignty")
    with space.open(path) as store:
        (paris,) = Zones(store).others()
        store.execute(cmd.RecordShipment(paris.id, 0, 0, position, position, 0, clean, 100))
    told = space_command("--data", path, "verify", "--sovereignty", status=6)
    for part in (str(mine), f"position {position + 1}", "sovereignty zone"):
        assert part in told
    assert "--repair" in space_command("--data", path, "verify", "--sovereignty", "--repair", status=2)


def test_what_a_home_said_outlives_who_heard_it(zones: Two) -> None:
    """What is missing is still known when the process that was told has ended and the home is gone for good."""
    shipping(zones)
    (oslo,) = Zones(zones.paris).others()
    heard = until(lambda: predict(zones.paris, oslo)["heard_position"])
    running = zones.paris.federation
    assert running is not None
    running._look_at_links()
    zones.oslo.close()
    zones.reopen("paris")
    zones.serve("paris")
    running = zones.paris.federation
    assert running is not None
    running._look_at_links()
    assert predict(zones.paris, oslo)["heard_position"] == heard


def test_two_processes_to_and_fro(tmp_path: Path) -> None:
    """By commands: the home is killed, the other zone takes over, the home follows; and the other way round."""
    with contextlib.ExitStack() as stack:
        data, at, policy = served_zones(tmp_path, stack)

        def put(zone: str, path: str, text: str) -> None:
            space_command("--data", data[zone], "put", "-", "--name", path, text=text)

        def comes(zone: str, path: str, text: str) -> None:
            until(lambda: content_at(data[zone], path) == text, f"{path} in {zone}")

        def up(zone: str) -> None:
            at[zone] = stack.enter_context(Served(data[zone], "--listen", f"127.0.0.1:{at[zone].port}"))

        def change_alone(zone: str, path: str, text: str) -> None:
            """What nobody ships: the process is gone."""
            at[zone].kill()
            with space.open(data[zone]) as store:
                store.write(store.resolve(path), 0, text.encode())

        space_command("--data", data["oslo"], "mkdir", "/dir")
        space_command("--data", data["oslo"], "policy", "set", "/dir", policy)
        put("oslo", "/dir/file", "one, in oslo")
        comes("paris", "/zones/oslo/dir/file", "one, in oslo")
        change_alone("oslo", "/dir/file", "two, in oslo")
        assert "--yes" in space_command("--data", data["paris"], "zone", "promote", "oslo", status=2)
        told = json.loads(
            space_command("--data", data["paris"], "--json", "zone", "promote", "oslo", "--yes")
        )
        assert told["epoch"] == 1
        put("paris", "/zones/oslo/dir/more", "three, in paris")
        up("oslo")
        comes("oslo", "/dir/more", "three, in paris")
        comes("oslo", "/dir/file", "one, in oslo")
        (branch,) = json.loads(space_command("--data", data["oslo"], "--json", "zone", "branches"))
        space_command("--data", data["oslo"], "export", branch["path"], tmp_path / "exported")
        assert (tmp_path / "exported" / "dir" / "file").read_text() == "two, in oslo"

        change_alone("paris", "/zones/oslo/dir/more", "THREE")
        space_command("--data", data["oslo"], "zone", "promote", "paris", "--yes")
        put("oslo", "/dir/again", "four, in oslo again")
        up("paris")
        comes("paris", "/zones/oslo/dir/again", "four, in oslo again")
        comes("paris", "/zones/oslo/dir/more", "three, in paris")
        assert "oslo" in space_command("--data", data["paris"], "rm", "/zones/oslo/dir/file", status=5)
        (branch,) = json.loads(space_command("--data", data["paris"], "--json", "zone", "branches"))
        assert [each["path"] for each in branch["files"]] == ["dir/more"]
        for path in data.values():
            assert "0 not allowed" in space_command("--data", path, "verify", "--sovereignty")


@pytest.mark.requires("/dev/fuse", "fusermount3", "py:pyfuse3")
def test_the_demonstration_of_the_manual() -> None:
    """``examples/two_zones.sh`` shows what it says it shows."""
    root = Path(__file__).parents[2]
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [str(root / "examples" / "two_zones.sh")],
        env={**os.environ, "PATH": programs},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "== Done" in done.stdout


def test_what_is_sealed_goes_back_sealed(two: Pumped) -> None:
    """A zone that cannot read what it took over can name, clone and remove it, and its home reads it afterwards."""
    sealed = shared("paris", encryption=Encryption.AES_256_GCM, federation_sealed=True)
    two.oslo.put(b"for oslo alone", name="/all/s", policy=sealed)
    two.settle()
    promoted(two.paris, "oslo")
    with pytest.raises(RefusedError):
        two.paris.get("/zones/oslo/all/s")
    two.paris.clone("/zones/oslo/all/s", "/zones/oslo/all/clone")
    two.paris.mv("/zones/oslo/all/s", "/zones/oslo/all/moved")
    two.settle()
    assert two.oslo.get("/all/moved") == two.oslo.get("/all/clone") == b"for oslo alone"


def test_what_was_never_shipped_comes_after_a_promotion(two: Pumped) -> None:
    """What a zone has of its own for the old home goes there once that follows, also if nothing ever went before."""
    two.paris.put(b"of paris", name="/own", policy=shared("oslo"))
    two.paris.write(two.paris.resolve("/own"), 3, b"PARIS")
    promoted(two.paris, "oslo")
    two.paris.write(two.paris.resolve("/zones/oslo/all/f1"), 0, b"x")
    two.settle()
    assert two.oslo.get("/zones/paris/own") == b"of PARIS"
    assert two.oslo.get("/all/f1") == two.paris.get("/zones/oslo/all/f1")
    assert two.back.shipped_bytes < 10_000  # nothing it had comes again


def test_a_home_that_is_written_to_gives_way(two: Pumped) -> None:
    """Writes that come while what was not shipped is set aside are in the branch, or refused; none is lost."""
    done = threading.Event()
    written: list[int] = []
    refused: list[str] = []

    def write() -> None:
        number = 0
        while not refused and not done.is_set():
            try:
                two.oslo.write(two.oslo.resolve("/all/f1"), number * 10, b"%09d\n" % number)
                written.append(number)
            except RefusedError as error:
                refused.append(str(error))
            number += 1

    promoted(two.paris, "oslo")
    thread = threading.Thread(target=write)
    thread.start()
    until(lambda: len(written) > 20)
    two.there.connect()
    until(lambda: refused)
    done.set()
    thread.join()
    assert "paris" in refused[0]
    kept = two.oslo.get("/zones/.branches/paris-1/all/f1")
    assert [int(line) for line in kept[: 10 * len(written)].split()] == written
    two.settle()
    assert two.oslo.get("/all/f1") == two.paris.get("/zones/oslo/all/f1")


def test_a_home_that_cannot_be_taken_back_stays_fenced(two: Pumped) -> None:
    """Where bytes of the fork were given back nothing changes, and the reason is told."""
    two.oslo.set_policy("/all/f2", shared("paris", history_ns=0))
    two.settle()
    two.oslo.write(two.oslo.resolve("/all/f2"), 0, os.urandom(1000))
    assert two.oslo.gc().frames > 0
    promoted(two.paris, "oslo")
    before = two.oslo.digest()
    with pytest.raises(RefusedError, match="reclaimed"):
        two.there.connect()
    assert two.oslo.digest() == before
    two.paris.write(two.paris.resolve("/zones/oslo/all/f2"), 0, b"x")
    with pytest.raises(SpaceError, match="not learnt"):
        two.back.connect()

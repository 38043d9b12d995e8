"""Two zones: what is shipped, read there, refused there, and what happens when the link or a side goes away."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from space._errors import ConflictError, NotFoundError, RefusedError
from space._node.federation_zones import Zones
from space._node.store import Store
from space.events.types import Kind
from space.federation import exchange, shipper
from space.policy.model import Compression, Encryption, Policy, Sovereignty
from tests.federation_support import (
    Served,
    Two,
    introduce,
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


def tree(store: Store, path: str) -> dict[str, bytes]:
    """Files below a path, by relative path."""
    root = store.resolve(path)
    return {
        name.decode(): store.get(stat.id)
        for name, stat in store.walk(root)
        if stat.kind == Kind.FILE and not name.startswith(b".capsules")
    }


def test_what_is_put_is_read_there(zones: Two) -> None:
    """Files, directories, links and attributes of a shipped tree are in the target as at home; nothing else is."""
    home = zones.oslo.mkdir("/all")
    zones.oslo.set_policy(home, shared("paris"))
    zones.oslo.put(b"before", name="/all/early.txt")
    zones.serve()
    zones.oslo.put(b"hello", name="/all/deep/er/hello.txt")
    zones.oslo.put(b"not for you", name="/mine.txt")
    big = os.urandom(9 << 20)
    zones.oslo.put(big, name="/all/big")
    zones.in_step()
    assert tree(zones.paris, "/zones/oslo/all") == {
        "early.txt": b"before",
        "deep/er/hello.txt": b"hello",
        "big": big,
    }
    here, there = (
        store.stat(store.resolve(path))
        for store, path in (
            (zones.oslo, "/all/deep/er/hello.txt"),
            (zones.paris, "/zones/oslo/all/deep/er/hello.txt"),
        )
    )
    assert (here.id, here.mode, here.uid, here.size) == (there.id, there.mode, there.uid, there.size)
    assert (here.mtime, here.btime) == (there.mtime, there.btime)
    with pytest.raises(NotFoundError):
        zones.paris.resolve("/zones/oslo/mine.txt")
    status = zones.status("oslo")["zones"][0]
    assert (status["lag_events"], status["lag_bytes"], status["lag_seconds"]) == (0, 0, 0)


def test_replicas_are_changed_by_their_home_only(zones: Two) -> None:
    """Every change in the target is refused with the home's name and address; the home's next change comes."""
    made = zones.oslo.put(b"one", name="/a", policy=shared("paris"))
    zones.serve()
    zones.in_step()
    paris, url = zones.paris, zones.links["oslo"].url
    for change in (
        lambda: paris.write(made.id, 0, b"x"),
        lambda: paris.resize(made.id, 0),
        lambda: paris.rm("/zones/oslo/a"),
        lambda: paris.mv("/zones/oslo/a", "/b"),
        lambda: paris.set_policy(made.id, Policy()),
        lambda: paris.put(b"x", name="/zones/oslo/new"),
        lambda: paris.mkdir("/zones/rome"),
    ):
        with pytest.raises(RefusedError) as refused:
            change()
        assert "oslo" in str(refused.value) or "/zones" in str(refused.value)
    with pytest.raises(RefusedError, match=url):
        paris.write(made.id, 0, b"x")
    zones.oslo.write(made.id, 3, b" two")
    zones.in_step()
    assert paris.get(made.id) == b"one two"
    copy = paris.clone("/zones/oslo/a", "/copy")
    paris.write(copy, 0, b"ONE")
    assert paris.get(copy) == b"ONE two"


def test_both_directions_at_once(zones: Two) -> None:
    """Each zone is home and target: both ship, and neither sends back what came."""
    zones.serve()
    for number in range(20):
        zones.oslo.put(b"o%d" % number, name=f"/o{number}", policy=shared("paris"))
        zones.paris.put(b"p%d" % number, name=f"/p{number}", policy=shared("oslo"))
    zones.in_step()
    zones.in_step("paris", "oslo")
    assert tree(zones.paris, "/zones/oslo") == {f"o{n}": b"o%d" % n for n in range(20)}
    assert tree(zones.oslo, "/zones/paris") == {f"p{n}": b"p%d" % n for n in range(20)}
    quiet = [store.position for store in (zones.oslo, zones.paris)]
    until(lambda: zones.status("oslo")["zones"][0]["rtt_seconds"] is not None)
    assert [store.position for store in (zones.oslo, zones.paris)] == quiet


def test_lag_grows_while_the_link_is_cut_and_falls_to_nothing(zones: Two) -> None:
    """Without a link nothing is lost: the lag says what waits, and is none when the link is there again."""
    zones.oslo.put(b"0", name="/f0", policy=shared("paris"))
    zones.serve()
    zones.in_step()
    zones.links["paris"].cut()
    until(lambda: not zones.status("oslo")["zones"][0]["connected"])
    for number in range(1, 30):
        zones.oslo.put(b"%d" % number, name=f"/f{number}", policy=shared("paris"))
    zones.oslo.put(b"secret", name="/secret")

    def waiting() -> bool:
        found = zones.status("oslo")["zones"][0]
        return bool(
            found["lag_events"] >= 29 and found["lag_bytes"] and found["lag_seconds"] > 0 and found["error"]
        )

    until(waiting)
    zones.links["paris"].heal(zones.paris.federation.port)  # type: ignore[union-attr]
    zones.in_step()
    assert tree(zones.paris, "/zones/oslo") == {f"f{n}": b"%d" % n for n in range(30)}


def test_every_shipped_moment_can_be_read(zones: Two) -> None:
    """``oslo@P`` in paris shows what oslo held at P, for every P that was shipped."""
    made = zones.oslo.put(b"0", name="/a", policy=shared("paris"))
    zones.serve()
    zones.in_step()
    wanted = {zones.oslo.position: b"0"}
    for number in range(1, 40):
        wanted[zones.oslo.write(made.id, 0, b"%d" % number).position] = b"%d" % number
        if number % 10 == 0:
            zones.in_step()
    zones.in_step()
    for position, content in wanted.items():
        with zones.paris.at(f"oslo@{position}") as past:
            assert past.get(made.id) == content
    with pytest.raises(NotFoundError, match="up to position"):
        zones.paris.at(f"oslo@{zones.oslo.position + 1000}")
    with pytest.raises(NotFoundError, match="no zone rome"):
        zones.paris.at("rome@1")
    with zones.paris.at(f"paris@{zones.paris.position}") as past:
        assert past.position == zones.paris.position


def test_a_link_that_breaks_and_lies_changes_nothing(zones: Two) -> None:
    """Cut after every so many bytes, and with flipped bits, everything arrives as it was put."""
    chance = random.Random(11)
    cuts = iter([*range(0, 8000, 250), *(chance.randrange(400_000) for _ in range(25))])
    zones.links["paris"].limit = lambda: next(cuts, 1 << 62)
    zones.links["paris"].flip = lambda _: chance.random() < 0.01 and next(flips, False)
    flips = iter([True] * 5)
    files = {f"f{n}": chance.randbytes(chance.randrange(200_000)) for n in range(30)}
    for name, content in files.items():
        zones.oslo.put(content, name=f"/{name}", policy=shared("paris", compression=Compression.NONE))
    zones.serve()
    zones.in_step()
    assert tree(zones.paris, "/zones/oslo") == files
    zones.paris.verify()


def test_priorities_go_first(zones: Two) -> None:
    """What has a higher priority arrives before what was put earlier with a lower one."""
    for number in range(12):
        zones.oslo.put(os.urandom(1 << 20), name=f"/slow{number}", policy=shared("paris"))
    zones.oslo.put(b"now", name="/urgent", policy=shared("paris", priority=9))
    zones.serve(bandwidth=8 << 20)
    until(lambda: "urgent" in (tree(zones.paris, "/zones/oslo") if _there(zones) else {}))
    assert len(tree(zones.paris, "/zones/oslo")) < 13
    zones.in_step()
    assert len(tree(zones.paris, "/zones/oslo")) == 13


def _there(zones: Two) -> bool:
    with contextlib.suppress(NotFoundError):
        zones.paris.resolve("/zones/oslo")
        return True
    return False


@pytest.mark.parametrize("side", ["oslo", "paris"])
def test_a_store_that_is_closed_in_the_middle_goes_on(zones: Two, side: str) -> None:
    """Either side may be closed and opened again at any time."""
    zones.serve()
    writing = threading.Event()

    def write() -> None:
        for number in range(60):
            zones.oslo.put(b"%d" % number * 1000, name=f"/f{number}", policy=shared("paris"))
            if number == 20:
                writing.set()

    if side == "paris":
        thread = threading.Thread(target=write)
        thread.start()
        writing.wait()
        zones.reopen("paris")
        thread.join()
    else:
        write()
        zones.reopen("oslo")
    zones.serve(side)
    zones.in_step()
    assert tree(zones.paris, "/zones/oslo") == {f"f{n}": b"%d" % n * 1000 for n in range(60)}


def test_encrypted_content_can_be_read_there(zones: Two) -> None:
    """Data keys are sealed for the target, which wraps them by its own master key; or it holds, and cannot read."""
    secret = zones.oslo.put(
        b"secret" * 1000, name="/s", policy=shared("paris", encryption=Encryption.AES_256_GCM)
    )
    closed = zones.oslo.put(
        b"closed" * 1000,
        name="/c",
        policy=shared("paris", encryption=Encryption.AES_256_GCM, federation_sealed=True),
    )
    zones.serve()
    zones.in_step()
    assert (zones.oslo.path / "master.key").read_bytes() != (zones.paris.path / "master.key").read_bytes()
    assert zones.paris.get(secret.id) == b"secret" * 1000
    with pytest.raises(RefusedError, match="sealed for its home"):
        zones.paris.get(closed.id)


def test_policies_are_followed_when_they_change(zones: Two) -> None:
    """What becomes shared is copied as it is, what ceases to be is withdrawn, and a later target gets all of it."""
    content = os.urandom(6 << 20)
    made = zones.oslo.put(content, name="/a")
    zones.serve()
    zones.in_step()
    assert not _there(zones)
    zones.oslo.set_policy(made.id, shared("paris"))
    zones.in_step()
    assert tree(zones.paris, "/zones/oslo") == {"a": content}
    zones.oslo.set_policy(made.id, Policy(sovereignty=Sovereignty.ZONE))
    zones.in_step()
    assert tree(zones.paris, "/zones/oslo") == {}
    with pytest.raises(NotFoundError):
        zones.paris.resolve("/zones/oslo/a")


def test_nothing_forbidden_leaves(zones: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    """In all that a zone sends there is no byte, name or id of what is local, of the zone, or for others."""
    sent = bytearray()
    frame = exchange.frame

    def tapped(kind: int, body: bytes) -> tuple[bytes, bytes]:
        sent.extend(body)
        return frame(kind, body)

    monkeypatch.setattr(shipper, "frame", tapped)
    zones.serve()
    plain: dict[str, Any] = {"compression": Compression.NONE, "dedupe": False}
    hidden = {
        "local": Policy(sovereignty=Sovereignty.LOCAL, **plain),
        "zone": Policy(sovereignty=Sovereignty.ZONE, **plain),
        "rome": shared("rome", **plain),
    }
    forbidden: list[bytes] = []
    for number in range(15):
        for kind, policy in hidden.items():
            marker = f"FORBIDDEN-{kind}-{number}-".encode() + os.urandom(16)
            parent = zones.oslo.mkdir(f"/dir-{kind}-{number}")
            zones.oslo.set_policy(parent, policy)
            found = zones.oslo.put(marker * 50, name=f"/dir-{kind}-{number}/name-{kind}-{number}")
            inside = zones.oslo.put(
                b"ALLOWED-%d" % number * 20, name=f"/dir-{kind}-{number}/ok", policy=shared("paris", **plain)
            )
            forbidden += [
                marker,
                bytes(parent),
                bytes(found.id),
                f"dir-{kind}-{number}".encode(),
                f"name-{kind}".encode(),
            ]
            if number % 3 == 0:
                zones.oslo.mv(f"/dir-{kind}-{number}/ok", f"/moved-{kind}-{number}")
            if number % 4 == 0:
                zones.oslo.set_policy(inside.id, policy)
                zones.oslo.write(inside.id, 0, marker)
    zones.in_step()
    assert b"ALLOWED-" in sent
    for each in forbidden:
        assert each not in sent


def test_a_zone_is_not_believed_about_others(zones: Two, tmp_path: Path) -> None:
    """A zone that was not added reaches nothing; one that was removed is refused from then on."""
    zones.oslo.put(b"1", name="/a", policy=shared("paris"))
    zones.serve()
    zones.in_step()
    Zones(zones.paris).remove("oslo", sure=True)
    zones.oslo.put(b"2", name="/b", policy=shared("paris"))
    until(
        lambda: (
            "added" in zones.status("oslo")["zones"][0]["error"]
            or "removed" in zones.status("oslo")["zones"][0]["error"]
        )
    )
    assert tree(zones.paris, "/zones/oslo") == {"a": b"1"}
    introduce(zones.paris, zones.oslo, zones.links["oslo"].url)
    zones.in_step()
    assert tree(zones.paris, "/zones/oslo") == {"a": b"1", "b": b"2"}


def test_keys_are_rolled_over_while_shipping_goes_on(zones: Two) -> None:
    """A new certificate, and then a new authority, interrupt nothing; the old authority is not trusted any more."""
    zones.oslo.put(b"0", name="/f0", policy=shared("paris"))
    zones.serve()
    zones.in_step()
    before = Zones(zones.paris).find("oslo").authorities
    Zones(zones.oslo).renew()
    zones.oslo.federation.reload()  # type: ignore[union-attr]
    zones.oslo.put(b"1", name="/f1", policy=shared("paris"))
    zones.in_step()
    rolled = Zones(zones.oslo).roll_over(force=False)
    zones.oslo.federation.reload()  # type: ignore[union-attr]
    assert rolled["without"] == rolled["trusting_the_old"] == []
    zones.oslo.put(b"2", name="/f2", policy=shared("paris"))
    zones.in_step()
    after = Zones(zones.paris).find("oslo").authorities
    assert before not in after
    assert tree(zones.paris, "/zones/oslo") == {f"f{n}": b"%d" % n for n in range(3)}


def test_promises_are_watched(zones: Two) -> None:
    """A promise (rpo) that is broken, and kept again, is in the log once each time."""
    zones.oslo.put(b"0", name="/a", policy=shared("paris", rpo_ns=50_000_000))
    zones.serve()
    zones.in_step()
    assert zones.status("oslo")["zones"][0]["rpo_ok"]
    zones.links["paris"].cut()
    until(lambda: not zones.status("oslo")["zones"][0]["connected"])
    zones.oslo.put(b"1", name="/b", policy=shared("paris", rpo_ns=50_000_000))
    until(lambda: not zones.status("oslo")["zones"][0]["rpo_ok"])
    until(lambda: [each.kind for each in zones.oslo.log() if each.kind.startswith("Rpo")] == ["RpoBroken"])
    zones.links["paris"].heal(zones.paris.federation.port)  # type: ignore[union-attr]
    until(
        lambda: (
            [each.kind for each in zones.oslo.log() if each.kind.startswith("Rpo")]
            == ["RpoBroken", "RpoKept"]
        )
    )
    assert zones.status("oslo")["zones"][0]["rpo_ok"]


def test_adding_a_zone_asks_it_first(zones: Two, tmp_path: Path) -> None:
    """A zone is added on both sides in any order; a wrong authority, address or name adds nothing."""
    zones.serve("paris")
    with Store(tmp_path / "rome") as rome:
        own = Zones(rome)
        own.init("rome", "edge", "")
        there = Zones(zones.paris)
        url, authority = zones.links["paris"].url, there.keys().authority.pem
        with pytest.raises(RefusedError, match="who answers at"):
            own.add("oslo", url, Zones(zones.oslo).keys().authority.pem, None, offline=False)
        with pytest.raises(ConflictError, match="oslo"):
            Zones(zones.oslo).init("rome", "metro", "")
        assert not own.others()
        first = own.add("paris", url, authority, None, offline=False)
        assert first["knows_us"] is False
        assert "space zone add rome" in first["notice"]
        there.add("rome", "https://127.0.0.1:1", own.keys().authority.pem, "metro", offline=True)
        until(lambda: own.add("paris", url, authority, None, offline=False)["knows_us"])
        assert [zone.name for zone in own.others()] == ["paris"]


# --- processes -------------------------------------------------------------------------------------------


def test_two_processes_by_the_commands_of_the_manual(tmp_path: Path) -> None:
    """init, ca, add, serve, put, get, log, status: as docs/federation.md says; kill -9 of either side loses nothing."""
    with contextlib.ExitStack() as stack:
        data, at, policy = served_zones(tmp_path, stack)
        a, b = data.values()
        one, two = at.values()
        space_command("--data", a, "put", "-", "--name", "/first", "--policy-file", policy, text="first")
        _wait_for(b, "/zones/oslo/first", "first")
        refused = space_command("--data", b, "rm", "/zones/oslo/first", status=5)
        assert "oslo" in refused

        two.kill()
        space_command("--data", a, "put", "-", "--name", "/second", "--policy-file", policy, text="second")
        stack.enter_context(Served(b, "--listen", f"127.0.0.1:{two.port}"))
        _wait_for(b, "/zones/oslo/second", "second")
        space_command("--data", a, "put", "-", "--name", "/third", "--policy-file", policy, text="third")
        one.kill()
        stack.enter_context(Served(a, "--listen", f"127.0.0.1:{one.port}"))
        _wait_for(b, "/zones/oslo/third", "third")


def _wait_for(data: Path, path: str, text: str) -> None:
    def there() -> bool:
        with contextlib.suppress(AssertionError):
            return space_command("--data", data, "get", path) == text
        return False

    until(there, f"{path} in {data}")


@pytest.mark.requires("/dev/fuse", "py:pyfuse3")
def test_a_mount_in_the_target_shows_replicas(tmp_path: Path) -> None:
    """The process of a mount ships and takes shipments too; through it replicas are read, and not written."""
    with two_zones(tmp_path) as zones:
        zones.oslo.put(b"through the kernel", name="/a", policy=shared("paris"))
        zones.serve("oslo")
        zones.links["paris"].cut()
        zones.paris.close()
        target = tmp_path / "mnt"
        target.mkdir()
        data = zones.paths["paris"]
        space_command("--data", data, "project", "mount", "--path", "/", "--target", target, "--background")
        try:
            with Served(data, "--listen", "127.0.0.1:0") as served:
                zones.links["paris"].heal(served.port)
                replica = target / "zones/oslo/a"
                until(replica.exists)
                assert until(replica.read_bytes) == b"through the kernel"
                with pytest.raises(OSError, match="Read-only file system"):
                    replica.write_bytes(b"x")
                with pytest.raises(OSError, match="Read-only file system"):
                    replica.unlink()
                assert replica.read_bytes() == b"through the kernel"
        finally:
            space_command("--data", data, "project", "stop", target)

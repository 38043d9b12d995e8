"""Shards over zones with real stores and real connections: what is sent, kept, lost, read back and mended."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from blake3 import blake3

import space
from space._errors import ConflictError, CorruptionError, NotFoundError, RefusedError, UnavailableError
from space._node.federation_keys import ZoneAuthority, trust
from space._node.federation_receive import ZoneReceiver
from space._node.federation_shards import collect, mend, shard_zones, spread
from space._node.federation_shelf import StoreShelf
from space._node.federation_zones import Zone, Zones
from space._node.loops import run_loop
from space.events.ids import CapsuleId
from space.federation.parity import Layout, decode_layout, encode_layout
from space.federation.server import FederationServer
from space.federation.shelf import Held, ZoneClient
from space.policy.model import Encryption, Policy, Shards, Sovereignty

pytestmark = pytest.mark.requires("py:pyeclib", "py:aiohttp")

NAMES = ("berlin", "lima", "oslo", "paris")
SCHEME = Shards(2, 2)
POLICY = Policy(sovereignty=Sovereignty.GLOBAL, federation_targets=NAMES[1:], federation_shards=SCHEME)


class RunningZone:
    """A store in a zone, answering other zones from a thread of its own."""

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        self.store = space.open(path / name)
        self.zones = Zones(self.store)
        self.zones.init(name, "geo", "")
        self.tls = self.zones.keys().server_context()
        self.shelf = StoreShelf(self.store, self.me.id)
        self.loop: asyncio.AbstractEventLoop | None = None
        self.port = 0
        self.begin()

    @property
    def me(self) -> Zone:
        """As others know it."""
        own = self.zones.own()
        assert own is not None
        return own

    def meet(self, other: RunningZone) -> None:
        """Adds another zone."""
        pem = other.zones.keys().offer()[0]
        self.zones.add(other.name, f"https://127.0.0.1:{other.port}", pem, None, offline=True)
        trust(self.tls, ZoneAuthority.parse(pem))

    def begin(self) -> None:
        """Answers, on the same port as before if there was one."""
        ready = threading.Event()

        async def main() -> None:
            server = FederationServer(
                ZoneReceiver(self.store, self.zones), self.tls, shipment_bytes_max=1 << 20, shelf=self.shelf
            )
            self.loop, self.stop = asyncio.get_running_loop(), asyncio.Event()
            self.port = await server.start("127.0.0.1", self.port)
            ready.set()
            await self.stop.wait()
            await server.close()

        self.thread = threading.Thread(target=lambda: run_loop(main()))
        self.thread.start()
        assert ready.wait(60)

    def end(self) -> None:
        """Answers no longer."""
        if self.loop is not None:
            self.loop.call_soon_threadsafe(self.stop.set)
            self.thread.join()
            self.loop = None

    def shard_names(self) -> list[bytes]:
        """The paths of all shards that are kept here."""
        root = self.store.resolve("/.shards")
        names = [path for path, stat in self.store.walk(root) if path.count(b"/") == 2]
        return [name for name in names if not name.endswith(b"layout")]

    def close(self) -> None:
        """Ends all of it."""
        self.end()
        self.store.close()


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[dict[str, RunningZone]]:
    """Four zones that know each other."""
    found = {name: RunningZone(tmp_path, name) for name in NAMES}
    for one in found.values():
        for other in found.values():
            if one is not other:
                one.meet(other)
    yield found
    for zone in found.values():
        zone.close()


@pytest.fixture
def closing() -> Iterator[contextlib.ExitStack]:
    """Closes at the end what a test opened."""
    with contextlib.ExitStack() as stack:
        yield stack


def asked(zone: RunningZone, name: str, at: contextlib.ExitStack) -> ZoneClient:
    """Another zone, as this one asks it."""
    return next(each.client for each in at.enter_context(shard_zones(zone.store)) if each.name == name)


def content(size: int, seed: int = 0) -> bytes:
    """Bytes that do not compress."""
    return random.Random(seed).randbytes(size)


def spread_from(zone: RunningZone, capsule: CapsuleId) -> Any:
    """Shards for all four zones."""
    with shard_zones(zone.store) as zones:
        return spread(zone.store, zone.me, zones, capsule, SCHEME)


def read_in(zone: RunningZone, capsule: CapsuleId) -> bytes:
    """What the shards give there."""
    with shard_zones(zone.store) as zones:
        return b"".join(bytes(piece) for piece in collect(zone.store, zones, capsule).content)


@pytest.mark.parametrize("encryption", list(Encryption))
def test_any_two_zones_may_be_gone(mesh: dict[str, RunningZone], encryption: Encryption) -> None:
    """With two of four zones gone, the home among them, the others give back every byte; with three, a clear error."""
    home = mesh["berlin"]
    policy = attrs.evolve(POLICY, encryption=encryption, dedupe=False)
    data = content(40_000_000)
    capsule = home.store.put(data, name="/film", policy=policy).id
    home.store.resize(capsule, len(data) + 5_000_000)
    done = spread_from(home, capsule)
    assert done.sent == 3 * 4
    assert all(len(zone.shard_names()) == 3 for zone in mesh.values())
    for gone in (("berlin", "lima"), ("berlin", "paris")):
        for name in gone:
            mesh[name].end()
        assert read_in(mesh["oslo"], capsule) == data + bytes(5_000_000)
        for name in gone:
            mesh[name].begin()
    for name in ("berlin", "lima", "paris"):
        mesh[name].end()
    with pytest.raises(UnavailableError, match="1 of the 4 shards of a stripe"):
        read_in(mesh["oslo"], capsule)


def test_nothing_readable_leaves_encrypted_content(mesh: dict[str, RunningZone], tmp_path: Path) -> None:
    """Of an encrypted capsule no zone holds a piece of the content, though its shards hold all of it."""
    home = mesh["berlin"]
    policy = attrs.evolve(POLICY, encryption=Encryption.AES_256_GCM, dedupe=False)
    data = b"nobody may read this " * 50_000
    capsule = home.store.put(data, name="/secret", policy=policy).id
    spread_from(home, capsule)
    for name in NAMES[1:]:
        mesh[name].store.sync()
        for segment in (tmp_path / name / "wal").iterdir():
            assert b"nobody may read" not in segment.read_bytes()
    assert read_in(mesh["lima"], capsule) == data


def test_sealed_for_the_home(mesh: dict[str, RunningZone]) -> None:
    """A zone that is to hold and not to read has the shards, and is told so when it reads; the home reads them."""
    home = mesh["berlin"]
    policy = attrs.evolve(POLICY, encryption=Encryption.AES_256_GCM, dedupe=False, federation_sealed=True)
    capsule = home.store.put(b"sealed" * 10_000, name="/sealed", policy=policy).id
    spread_from(home, capsule)
    with pytest.raises(RefusedError, match="sealed for its home zone"):
        read_in(mesh["lima"], capsule)
    assert read_in(home, capsule) == b"sealed" * 10_000


def test_only_what_changed_travels_again(mesh: dict[str, RunningZone]) -> None:
    """After a small write only the shards of its stripe go, the old ones are dropped, readers get the new content."""
    home = mesh["berlin"]
    data = bytearray(content(50_000_000))
    capsule = home.store.put(bytes(data), name="/film", policy=POLICY).id
    before = spread_from(home, capsule)
    home.store.write(capsule, 20_000_000, b"changed")
    data[20_000_000:20_000_007] = b"changed"
    after = spread_from(home, capsule)
    assert (before.sent, after.sent) == (4 * 3, 4)
    assert spread_from(home, capsule).sent == 0
    assert all(len(zone.shard_names()) == 3 for zone in mesh.values())
    home.end()
    assert read_in(mesh["paris"], capsule) == bytes(data)


def test_a_lost_or_damaged_shard_is_mended(mesh: dict[str, RunningZone]) -> None:
    """Shards that a zone has lost, or that are not what they were, are found out and made anew from the others."""
    home = mesh["berlin"]
    data = content(3_000_000)
    capsule = home.store.put(data, name="/film", policy=POLICY).id
    layout = spread_from(home, capsule).layout
    lima, oslo = mesh["lima"], mesh["oslo"]
    lima.store.rm(b"/.shards/" + lima.shard_names()[0])
    path = b"/.shards/" + oslo.shard_names()[0]
    oslo.store.write(oslo.store.resolve(path), 5, b"damage")
    assert read_in(mesh["paris"], capsule) == data
    with shard_zones(home.store) as zones:
        found = mend(zones, layout)
        assert (found.shards, found.lost, found.mended) == (4, 2, 2)
        assert mend(zones, layout) == attrs.evolve(found, lost=0, mended=0)


def test_a_zone_that_does_not_answer_leaves_what_there_was(mesh: dict[str, RunningZone]) -> None:
    """If a zone is gone while shards are made, the shards of before stay valid everywhere."""
    home = mesh["berlin"]
    data = content(2_000_000)
    capsule = home.store.put(data, name="/film", policy=POLICY).id
    spread_from(home, capsule)
    home.store.write(capsule, 0, b"newer")
    mesh["paris"].end()
    with pytest.raises(UnavailableError, match="zone paris does not answer"):
        spread_from(home, capsule)
    assert read_in(mesh["oslo"], capsule) == data
    mesh["paris"].begin()
    spread_from(home, capsule)
    home.end()
    assert read_in(mesh["oslo"], capsule) == b"newer" + data[5:]


def test_sparse_and_empty_capsules(mesh: dict[str, RunningZone]) -> None:
    """Holes cost no shards, however large; a capsule of nothing has a layout and no shards."""
    home = mesh["berlin"]
    sparse = home.store.put(b"", name="/disk", policy=POLICY).id
    done = spread_from(home, sparse)
    assert (done.layout.size, done.layout.stripes) == (0, ())
    assert read_in(mesh["lima"], sparse) == b""
    home.store.resize(sparse, 1 << 50)
    home.store.write(sparse, 1 << 49, b"in the middle")
    done = spread_from(home, sparse)
    assert (len(done.layout.stripes), done.layout.size) == (1, 1 << 50)


def test_a_strange_zone_gets_and_puts_nothing(
    mesh: dict[str, RunningZone], closing: contextlib.ExitStack
) -> None:
    """A zone reaches its own shards on a shelf, and those of layouts it is in; anything else is refused."""
    home, lima, paris = mesh["berlin"], mesh["lima"], mesh["paris"]
    policy = attrs.evolve(POLICY, federation_targets=("lima", "oslo"), federation_shards=Shards(2, 1))
    capsule = home.store.put(b"for two zones and the home" * 9, name="/film", policy=policy).id
    with shard_zones(home.store) as zones:
        three = [zone for zone in zones if zone.name != "paris"]
        layout = spread(home.store, home.me, three, capsule, Shards(2, 1)).layout
    (stripe,) = layout.stripes
    at_lima = asked(paris, "lima", closing)
    place = layout.zones.index(lima.me.id)
    with pytest.raises(NotFoundError):
        at_lima.get_shard(home.me.id, bytes(capsule), stripe.shards[place])
    with pytest.raises(NotFoundError):
        at_lima.get_layout(home.me.id, bytes(capsule))
    with pytest.raises(CorruptionError, match="not the one it is called"):
        at_lima.put_shard(bytes(capsule), stripe.shards[place], b"other bytes")
    with pytest.raises(RefusedError, match="of another zone's capsule"):
        at_lima.put_layout(bytes(capsule), Held(encode_layout(layout)))
    at_lima.delete(bytes(capsule))
    lima.end()
    assert read_in(mesh["oslo"], capsule) == b"for two zones and the home" * 9
    lima.begin()
    at_lima = asked(home, "lima", closing)
    older = attrs.evolve(layout, position=layout.position - 1)
    with pytest.raises(ConflictError, match="shards as of"):
        at_lima.put_layout(bytes(capsule), Held(encode_layout(older)))
    assert at_lima.get_shard(home.me.id, bytes(capsule), stripe.shards[place])


def test_what_the_policy_does_not_ask_for_is_refused(mesh: dict[str, RunningZone]) -> None:
    """No shard goes to a zone that the policy does not name, and none of a capsule that has no shards."""
    home = mesh["berlin"]
    elsewhere = attrs.evolve(POLICY, federation_targets=("lima", "oslo", "madrid"))
    for policy, why in (
        (elsewhere, "no shards in zone paris"),
        (Policy(sovereignty=Sovereignty.LOCAL), "no shards in zone lima"),
        (attrs.evolve(POLICY, federation_shards=None), "other shards, or none"),
    ):
        capsule = home.store.put(b"stays", policy=policy).id
        with pytest.raises(RefusedError, match=why):
            spread_from(home, capsule)
    assert all(not zone.store.ls("/") for zone in mesh.values() if zone is not home)


def test_a_layout_waits_for_its_shards(mesh: dict[str, RunningZone], closing: contextlib.ExitStack) -> None:
    """A zone takes no layout whose shards it lacks: it says which, and goes on with the one before."""
    home, lima = mesh["berlin"], mesh["lima"]
    capsule = home.store.put(b"one" * 999, name="/film", policy=POLICY).id
    layout = spread_from(home, capsule).layout
    stripe = layout.stripes[0]
    place = layout.zones.index(lima.me.id)
    absent = blake3(b"not there").digest()
    shards = (*stripe.shards[:place], absent, *stripe.shards[place + 1 :])
    later = attrs.evolve(layout, position=layout.position + 1, stripes=(attrs.evolve(stripe, shards=shards),))
    at_lima = asked(home, "lima", closing)
    assert at_lima.put_layout(bytes(capsule), Held(encode_layout(later))) == [absent]
    assert kept(lima, home, capsule) == layout


def kept(zone: RunningZone, home: RunningZone, capsule: CapsuleId) -> Layout:
    """The layout a zone has."""
    return decode_layout(zone.shelf.get_layout(zone.me.id, home.me.id, bytes(capsule)).layout)


def test_the_shelf_is_nobody_elses_business(mesh: dict[str, RunningZone]) -> None:
    """Where shards are kept is the owner's directory alone, and never leaves the zone itself."""
    home, lima = mesh["berlin"], mesh["lima"]
    capsule = home.store.put(b"content", name="/film", policy=POLICY).id
    spread_from(home, capsule)
    directory = lima.store.resolve("/.shards")
    assert lima.store.stat(directory).mode & 0o777 == 0o700
    for _, stat in lima.store.walk(directory):
        assert lima.store.policy(stat.id).sovereignty is Sovereignty.ZONE


def test_a_capsule_without_shards(mesh: dict[str, RunningZone]) -> None:
    """A capsule nobody made shards of is not found."""
    capsule = mesh["berlin"].store.put(b"alone", name="/alone").id
    with pytest.raises(NotFoundError, match="has no shards of capsule"):
        read_in(mesh["lima"], capsule)

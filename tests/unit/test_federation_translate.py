"""What one zone is told of single changes; any mixture of them is the simulation's (tests/chaos/federation_sim.py)."""

from __future__ import annotations

from typing import Any

import pytest

from space._errors import RefusedError
from space.events import commands as cmd
from space.events.ids import ROOT, zone_capsules, zone_root
from space.events.types import Kind
from space.federation import portable, translate
from space.policy.model import Compression, Encryption, Policy, Sovereignty
from space.statemachine.tables import ENTRY, SNAPSHOT, XATTR, EntryRow
from tests.federation_zone import MemoryZone, Route, Seen, pack_policy

pytestmark = pytest.mark.unit

PLAIN = Policy(compression=Compression.NONE, dedupe=False)


def shipped(*targets: str, **keys: Any) -> Policy:
    """A policy that ships."""
    return Policy(
        compression=Compression.NONE,
        dedupe=False,
        sovereignty=Sovereignty.GLOBAL,
        federation_targets=targets or ("oslo",),
        **keys,
    )


HERE, THERE = pack_policy(PLAIN), pack_policy(shipped())


class World:
    """Two zones, and short words for what tests do in the first."""

    def __init__(self) -> None:
        self.home, self.zone = MemoryZone("paris", 1), MemoryZone("oslo", 1)
        self.home.add_zone(self.zone)
        self.zone.add_zone(self.home)
        self.route = Route(self.home, self.zone)
        self.root = bytes(zone_root(self.home.id))
        self.apart = bytes(zone_capsules(self.home.id))
        self._made = 0

    def make(
        self,
        name: str,
        policy: bytes = THERE,
        *,
        kind: Kind = Kind.FILE,
        parent: bytes = bytes(ROOT),
        key: cmd.NewKey | None = None,
        **keys: Any,
    ) -> bytes:
        """A capsule, in a batch of its own."""
        self._made += 1
        capsule = self._made.to_bytes(16, "big")[1:] + b"\x99"
        self.home.must(
            cmd.CreateCapsule(
                capsule, kind, parent=parent, name=name.encode(), policy=policy, key=key, **keys
            )
        )
        return capsule

    def write(
        self, capsule: bytes, data: bytes, offset: int = 0, policy: Policy = PLAIN, key: int = 0
    ) -> None:
        """Some bytes, in a batch of their own."""
        self.home.must(cmd.WriteExtent(capsule, offset, len(data), self.home.encode(data, policy, key)))

    def there(self, capsule: bytes) -> bytes | None:
        """The content of a capsule in the other zone; None if it is not there, or deleted."""
        row = Seen(self.zone.tables).row(capsule)
        return None if row is None or row.deleted else self.zone.read(Seen(self.zone.tables), capsule)

    def names(self, directory: bytes) -> dict[bytes, bytes]:
        """Names in a directory of the other zone."""
        found = self.zone.tables.scan(ENTRY, directory)
        return {key[16:]: EntryRow.decode(value).capsule for key, value in found if key[16:] != b".capsules"}


@pytest.fixture
def world() -> World:
    """Two zones that know each other, nothing shipped yet."""
    return World()


def kinds(commands: list[cmd.Command]) -> list[str]:
    """Names of commands, those in copies behind them."""
    found = []
    for each in commands:
        found.append(type(each).__name__)
        if isinstance(each, cmd.Copied):
            found += [f"  {type(inner).__name__}" for inner in each.commands]
    return found


def test_a_write_travels_as_a_write(world: World) -> None:
    """A changed range of what the zone has costs that range, with its frames as they are stored."""
    capsule = world.make("f")
    world.write(capsule, b"a" * 2000)
    world.route.run()
    world.write(capsule, b"b" * 100, 700)
    (write,) = world.route.commands()
    assert isinstance(write, cmd.WriteExtent)
    assert (write.offset, write.length) == (700, 100)
    assert [bytes(frame.stored or b"") for frame in write.frames] == [b"b" * 100]
    assert world.there(capsule) == b"a" * 700 + b"b" * 100 + b"a" * 1200


def test_what_may_not_leave_is_not_told(world: World) -> None:
    """Changes of capsules that stay at home mean nothing to another zone, however many there are."""
    world.route.run()
    capsule = world.make("secret", HERE)
    world.write(capsule, b"hidden")
    world.home.must(cmd.SetXattr(capsule, b"user.x", b"hidden"))
    world.home.must(cmd.Rename(bytes(ROOT), b"secret", bytes(ROOT), b"other"))
    assert world.route.read() == []


def test_a_capsule_whose_directory_stays_hangs_apart(world: World) -> None:
    """Neither name nor id of a directory that is not shipped leaves with what is in it."""
    directory = world.make("private", HERE, kind=Kind.DIRECTORY)
    capsule = world.make("inner", parent=directory)
    bodies = [repr(command) for command in world.route.commands()]
    assert list(world.names(world.apart).values()) == [capsule]
    assert not world.names(world.root)
    for body in bodies:
        assert "private" not in body
        assert "inner" not in body
        assert repr(directory) not in body


def test_what_begins_to_be_shipped_is_copied_as_it_is(world: World) -> None:
    """A policy that opens brings content, names and attributes, and nothing that was overwritten before."""
    capsule = world.make("f", HERE)
    world.write(capsule, b"SECRET" * 100)
    world.write(capsule, b"public" * 60)
    world.home.must(cmd.Resize(capsule, 360), cmd.SetXattr(capsule, b"user.x", b"v"))
    world.route.run()
    assert world.there(capsule) is None
    world.home.must(cmd.SetPolicy(capsule, THERE))
    shipments = world.route.run()
    assert world.there(capsule) == b"public" * 60
    assert world.names(world.root) == {b"f": capsule}
    assert world.zone.tables.get(XATTR, capsule + b"user.x") == b"v"
    assert b"SECRET" not in repr(shipments).encode()
    stored = [f.stored for s in shipments for e in s.entries for c in e.commands for f in _frames(c)]
    assert all(b"SECRET" not in bytes(each or b"") for each in stored)


def _frames(command: cmd.Command) -> list[cmd.StoredFrame]:
    if isinstance(command, cmd.WriteExtent):
        return list(command.frames)
    if isinstance(command, cmd.Copied):
        return [frame for each in command.commands for frame in _frames(each)]
    return []


def test_what_is_shipped_no_longer_is_withdrawn(world: World) -> None:
    """A policy that closes takes the capsule away there, and one that opens again brings it back as it is then."""
    capsule = world.make("f")
    world.write(capsule, b"one")
    world.route.run()
    world.home.must(cmd.SetPolicy(capsule, HERE))
    assert kinds(world.route.commands()) == ["WithdrawCapsule"]
    assert world.there(capsule) is None
    world.write(capsule, b"two")
    assert world.route.read() == []
    world.home.must(cmd.SetPolicy(capsule, THERE))
    world.route.run()
    assert world.there(capsule) == b"two"


def test_directories_take_what_is_in_them_along(world: World) -> None:
    """One event deletes a tree, one command does there; what was brought back comes back whole."""
    directory = world.make("d", kind=Kind.DIRECTORY)
    capsule = world.make("f", parent=directory)
    world.write(capsule, b"content")
    world.route.run()
    world.home.must(cmd.Unlink(bytes(ROOT), b"d", directory=None, recursive=True))
    assert kinds(world.route.commands()) == ["Unlink"]
    assert not world.names(world.root)
    world.home.must(cmd.Undelete(directory, bytes(ROOT), b"again"))
    world.route.run()
    assert world.names(world.root) == {b"again": directory}
    assert world.names(directory) == {b"f": capsule}
    assert world.there(capsule) == b"content"


def test_a_rename_over_another_is_one_moment(world: World) -> None:
    """Written aside and renamed into place: the zone has the old bytes or the new ones under the name, never none."""
    old = world.make("f")
    world.write(old, b"old")
    world.route.run()
    new = world.make("f.tmp")
    world.write(new, b"new")
    world.home.must(cmd.Rename(bytes(ROOT), b"f.tmp", bytes(ROOT), b"f"))
    seen = []
    for shipment in world.route.run():
        del shipment
        seen.append(world.names(world.root))
    assert world.names(world.root) == {b"f": new}
    assert world.there(new) == b"new"
    assert world.there(old) is None
    assert all(b"f" in each for each in seen)


def test_names_that_change_places_do(world: World) -> None:
    """An exchange, and directories that swap who is inside whom, end as at home."""
    one, two = world.make("1", kind=Kind.DIRECTORY), world.make("2", kind=Kind.DIRECTORY)
    inner = world.make("inner", kind=Kind.DIRECTORY, parent=one)
    world.route.run()
    world.home.must(
        cmd.Rename(bytes(ROOT), b"1", bytes(ROOT), b"2", exchange=True),
        cmd.Rename(one, b"inner", bytes(ROOT), b"top"),
        cmd.Rename(bytes(ROOT), b"2", inner, b"deep"),
    )
    world.route.run()
    assert world.names(world.root) == {b"1": two, b"top": inner}
    assert world.names(inner) == {b"deep": one}
    assert world.names(one) == {}


def test_clones_and_copied_ranges_share_where_the_source_is(world: World) -> None:
    """What shares bytes at home shares them there, and comes as bytes where the source stays at home."""
    source = world.make("source")
    world.write(source, b"s" * 1024)
    hidden = world.make("hidden", HERE)
    world.write(hidden, b"h" * 1024)
    target = world.make("target")
    world.route.run()
    world.home.must(cmd.Clone(b"c" * 16, source, bytes(ROOT), b"clone"))
    assert kinds(world.route.commands()) == ["Clone", "PlaceCapsule"]
    world.home.must(cmd.CopyRange(target, 0, source, 512, 512))
    assert kinds(world.route.commands()) == ["CopyRange"]
    world.home.must(cmd.CopyRange(target, 512, hidden, 0, 100))
    assert "WriteExtent" in kinds(world.route.commands())
    assert world.there(b"c" * 16) == b"s" * 1024
    assert world.there(target) == b"s" * 512 + b"h" * 100


def test_a_clone_of_a_tree_is_one_command(world: World) -> None:
    """A tree that is there whole is cloned there, hard links and all; its copies can be changed afterwards."""
    directory = world.make("d", kind=Kind.DIRECTORY)
    capsule = world.make("f", parent=directory)
    world.write(capsule, b"content")
    world.home.must(cmd.Link(capsule, directory, b"g"))
    world.route.run()
    world.home.must(cmd.Clone(b"c" * 16, directory, bytes(ROOT), b"copy"))
    assert kinds(world.route.commands()) == ["Clone", "PlaceCapsule"]
    names = world.names(b"c" * 16)
    assert names.keys() == {b"f", b"g"}
    assert len(set(names.values())) == 1
    world.write(names[b"f"], b"changed")
    world.route.run()
    assert world.there(names[b"f"]) == b"changed"
    assert world.there(capsule) == b"content"


def test_keys_are_for_the_zone_or_for_the_home(world: World) -> None:
    """Encrypted content is read there with a key of its own; sealed, it is held and cannot be read."""
    for name, keys in (("open", {}), ("sealed", {"federation_sealed": True})):
        policy = shipped(encryption=Encryption.AES_256_GCM, **keys)
        key = world.home.new_key()
        capsule = world.make(name, pack_policy(policy), key=key)
        world.write(capsule, b"content", policy=policy, key=key.key)
        shipments = world.route.run()
        assert key.wrapped not in repr(shipments).encode()
        if name == "open":
            assert world.there(capsule) == b"content"
        else:
            with pytest.raises(RefusedError):
                world.there(capsule)


def test_a_large_capsule_comes_in_parts_and_is_seen_when_it_is_whole(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of more than one entry has no name before its last part, and goes on where it was broken off."""
    monkeypatch.setattr(portable, "PART_BYTES", 2000)
    monkeypatch.setattr(translate, "PART_BYTES", 2000)
    monkeypatch.setattr("space.federation.stream.SHIPMENT_BYTES", 1)
    capsule = world.make("big", HERE)
    for block in range(8):
        world.write(capsule, bytes([block]) * 1024, 1024 * block)
    world.route.run()
    world.home.must(cmd.SetPolicy(capsule, THERE))
    world.route.read()
    streams = world.route.streams
    assert streams is not None
    sent = 0
    while not world.names(world.root):
        outgoing = streams.next(world.home, 0.0)
        assert outgoing is not None
        for command in outgoing.shipment.received():
            world.zone.must(command)
        sent += 1
        if sent % 2:  # the link breaks: nothing of the sender is left
            streams = world.route.connect()
            world.route.read()
        else:
            streams.acknowledge(outgoing.shipment.lane, *outgoing.shipment.through)
    assert sent > 4
    world.route.run()
    assert world.there(capsule) == b"".join(bytes([block]) * 1024 for block in range(8))


def test_what_was_reclaimed_comes_as_zeros(world: World) -> None:
    """Frames that were overwritten and given back at home are a hole there, until the write that came over them."""
    capsule = world.make("f")
    world.route.run()
    world.write(capsule, b"a" * 512)
    first = world.home.position
    world.write(capsule, b"b" * 512)
    world.home.must(cmd.ReclaimPayload([(first, 0, 512)]))
    holes, write = [c for c in world.route.commands() if isinstance(c, cmd.WriteExtent)]
    assert not holes.frames
    assert len(write.frames) == 1
    assert world.there(capsule) == b"b" * 512


def test_attributes_are_the_homes(world: World) -> None:
    """Times, owner and mode are those of the home, also where only names that stay at home changed."""
    directory = world.make("d", kind=Kind.DIRECTORY)
    capsule = world.make("f", parent=directory)
    world.route.run()
    world.home.must(cmd.SetAttributes(capsule, mode=0o640, uid=7, gid=8, atime=9, mtime=10))
    world.make("hidden", HERE, parent=directory)
    world.route.run()
    for each in (directory, capsule):
        here = world.home.moments[-1].row(each)
        there = Seen(world.zone.tables).row(each)
        assert here is not None
        assert there is not None
        for field in ("mode", "uid", "gid", "atime", "mtime", "ctime", "btime"):
            assert getattr(here, field) == getattr(there, field), field


def test_a_snapshot_has_a_name_there_that_nobody_else_has(world: World) -> None:
    """Taking, dropping and taking the same name again are three moments of the home and two names there."""
    capsule = world.make("f")
    world.route.run()
    world.home.must(cmd.TakeSnapshot(capsule, "daily"))
    world.home.must(cmd.DropSnapshot("daily"))
    world.home.must(cmd.TakeSnapshot(capsule, "daily"))
    world.route.run()
    names = [key for key, _ in world.zone.tables.scan(SNAPSHOT, b"")]
    assert len(names) == 2
    assert all(name.startswith(b"paris:daily@") for name in names)


def test_a_batch_with_too_much_content_copies_what_it_is_in(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch over the limit of an entry is told by copies of its capsules, as they are after it."""
    capsule, other = world.make("f"), world.make("g")
    world.route.run()
    monkeypatch.setattr(translate, "MAIN_BYTES", 1000)
    frames = world.home.encode(b"x" * 2048, PLAIN, 0)
    world.home.must(cmd.WriteExtent(capsule, 0, 2048, frames), cmd.Resize(other, 5))
    world.route.run()
    assert world.there(capsule) == b"x" * 2048
    assert world.there(other) == bytes(5)
    assert world.names(world.root) == {b"f": capsule, b"g": other}


def test_what_was_purged_unnoticed_is_withdrawn(world: World) -> None:
    """A capsule whose last names went with a deleted directory, unseen, is deleted there when it is purged here."""
    directory = world.make("d", kind=Kind.DIRECTORY)
    capsule = world.make("f", parent=directory)
    world.home.must(cmd.Link(capsule, bytes(ROOT), b"g"))
    world.route.run()
    position = world.home.position
    world.home.must(cmd.RecordShipment(world.zone.id, 0, 0, 0, position, 0, [(capsule, position)], 1))
    world.home.must(cmd.Unlink(bytes(ROOT), b"g"))
    world.home.must(cmd.Unlink(bytes(ROOT), b"d", directory=None, recursive=True))
    world.home.must(cmd.PurgeCapsules([capsule]))
    world.route.run()
    assert world.there(capsule) is None

"""What a zone makes of content that other zones ship to it: its arrival policy, with real stores on both sides."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import attrs
import pytest

from space._errors import CorruptionError, NotFoundError, RefusedError, SpaceError
from space._node.federation_arrival import ShipmentKeys, describe, recoder, set_policy
from space._node.federation_audit import audit
from space._node.federation_promote import promote
from space._node.federation_status import status
from space._node.federation_zones import Zones
from space._node.store import Store
from space.content.cache import FrameCache
from space.content.frames import EncryptionCode, FrameRef, unpack_frames
from space.content.keys import Keyring
from space.content.pipeline import ContentReader
from space.events import commands as cmd
from space.events.ids import ZONES, CapsuleId
from space.federation.sealing import seal_key
from space.policy.model import ArrivalPolicy, Compression, Encryption, Policy
from space.projections import content_map
from tests.federation_pump import Pumped, pumped
from tests.federation_support import shared, space_command
from tests.property.test_federation_follow import some_acts, taken_over

pytestmark = pytest.mark.requires("py:aiohttp")

TEXT: Final = b"".join(b"%08d the quick brown fox jumps over dogs\n" % line for line in range(4000))
GCM: Final = ArrivalPolicy(encryption=Encryption.AES_256_GCM)


@pytest.fixture
def zones(tmp_path: Path) -> Iterator[Pumped]:
    """Two zones that know each other."""
    with pumped(tmp_path) as two:
        yield two


def frames(store: Store, capsule: CapsuleId) -> list[tuple[FrameRef, int]]:
    """The frames of a file, with the position of the batch each came with."""
    with store._read() as txn:
        return [
            (frame, extent.position)
            for extent in content_map.extents(txn, capsule, 0, content_map.OFFSET_MAX)
            for frame in unpack_frames(extent.frames)
        ]


def records(store: Store, capsule: CapsuleId) -> list[FrameRef]:
    """The frames of a file."""
    return [frame for frame, _ in frames(store, capsule)]


def put(zones: Pumped, policy: Policy, content: bytes = TEXT, name: str = "/file") -> CapsuleId:
    """A file of ``oslo`` that ``paris`` is shipped."""
    return zones.oslo.put(content, name=name, policy=policy).id


def log_bytes(store: Store) -> bytes:
    """All of a log, as it is on the disk."""
    store.sync()
    return b"".join(path.read_bytes() for path in sorted((store.path / "wal").glob("*.seg")))


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd:19", "brotli:5", "auto"])
@pytest.mark.parametrize("encryption", list(Encryption))
def test_content_is_compressed_as_the_zone_wants(
    zones: Pumped, compression: str, encryption: Encryption
) -> None:
    """Frames have the codec of the arrival policy and the cipher they came with, and hold what they held."""
    set_policy(zones.paris, ArrivalPolicy.from_document({"compression": compression}))
    file = put(zones, shared("paris", compression=Compression.LZ4, encryption=encryption))
    zones.settle()
    wanted = {"none": 0, "lz4": 1, "zstd:19": 2, "brotli:5": 3, "auto": 2}[compression]
    there = records(zones.paris, file)
    assert {frame.compression for frame in there} == {wanted}
    home = records(zones.oslo, file)
    assert [frame.encryption for frame in there] == [frame.encryption for frame in home]
    assert [frame.key_id for frame in there] == [frame.key_id for frame in home]
    assert zones.paris.get(file) == TEXT
    assert not zones.paris.verify().findings


@pytest.mark.parametrize("cipher", [Encryption.AES_256_GCM, Encryption.AES_256_XTS])
@pytest.mark.parametrize("before", list(Encryption))
def test_content_is_encrypted_with_a_key_of_the_zone(
    zones: Pumped, cipher: Encryption, before: Encryption
) -> None:
    """Everything that arrives lies under a key that was made there; what was shipped is not on its disk as it was."""
    set_policy(zones.paris, ArrivalPolicy(encryption=cipher))
    file = put(zones, shared("paris", compression=Compression.NONE, encryption=before))
    zones.settle()
    there = records(zones.paris, file)
    key = describe(zones.paris)["key"]
    assert {(frame.key_id, frame.key_version) for frame in there} == {(key, 1)}
    code = EncryptionCode.AES_256_GCM if cipher is Encryption.AES_256_GCM else EncryptionCode.AES_256_XTS
    assert {frame.encryption for frame in there} == {code}
    assert zones.paris.get(file) == TEXT
    assert TEXT[:64] not in log_bytes(zones.paris)
    assert (TEXT[:64] in log_bytes(zones.oslo)) == (before is Encryption.NONE)
    assert zones.paris.stat(file).key == zones.oslo.stat(file).key, "whose key it is stays"


def test_the_key_of_the_home_opens_the_replica_no_more(zones: Pumped) -> None:
    """Whoever has every data key of the home reads its own log with them, and nothing of the replica's."""
    set_policy(zones.paris, GCM)
    file = put(zones, shared("paris", encryption=Encryption.AES_256_GCM))
    zones.settle()
    assert read_with_keys_of(zones.oslo, zones.oslo, file) == TEXT
    with pytest.raises(SpaceError):
        read_with_keys_of(zones.oslo, zones.paris, file)
    assert read_with_keys_of(zones.paris, zones.paris, file) == TEXT


def read_with_keys_of(thief: Store, store: Store, file: CapsuleId) -> bytes:
    """A file as somebody reads it who has the log of one store, and the data keys of another one."""
    reader = ContentReader(
        fetch=store.wal.read_payload,
        keyring=thief._keyring,
        cache=FrameCache(1 << 20),
        hash_key=store._hash_key,
    )
    # Also under the number the frames of the replica have: what if the keys were the same?
    (home_key,) = {frame.key_id for frame in records(thief, file)}
    opened = thief._keyring.frame_key(home_key, 1)
    names = {(frame.key_id, frame.key_version) for frame in records(store, file)}
    pretended: Any = _Pretending(thief._keyring, dict.fromkeys(names, opened))
    reader._keyring = pretended
    return b"".join(bytes(reader.read_frame(frame, at, verify=True)) for frame, at in frames(store, file))


@attrs.frozen
class _Pretending:
    """A keyring that shows its keys under other numbers too."""

    keyring: Keyring
    others: dict[tuple[int, int], Any]

    def frame_key(self, number: int, version: int) -> Any:
        """The key, or one that is shown for it."""
        found = self.others.get((number, version))
        if found is None:
            return self.keyring.frame_key(number, version)
        return type(found)(number, version, found._data_key)


def test_equal_content_is_stored_once_where_the_zone_says_so(zones: Pumped) -> None:
    """With dedupe in the arrival policy, what a capsule brings that another one brought takes no room."""
    chance = random.Random(3)
    content = chance.randbytes(1 << 20)
    set_policy(zones.paris, attrs.evolve(GCM, dedupe=True))
    first = put(zones, shared("paris", dedupe=False), content, "/first")
    zones.settle()
    second = put(zones, shared("paris", encryption=Encryption.AES_256_GCM, dedupe=False), content, "/second")
    zones.settle()
    assert {frame.source_position for frame in records(zones.paris, first)} == {0}
    assert 0 not in {frame.source_position for frame in records(zones.paris, second)}
    assert zones.paris.get(first) == zones.paris.get(second) == content
    set_policy(zones.paris, ArrivalPolicy(dedupe=False))
    zones.paris.put(content)
    third = put(zones, shared("paris"), content, "/third")
    zones.settle()
    assert {frame.source_position for frame in records(zones.paris, third)} == {0}
    assert not zones.paris.verify().findings


def test_what_is_here_already_stays_as_it_is(zones: Pumped) -> None:
    """Content this store has already is named by where that is, whatever the arrival policy would have made of it."""
    own = zones.paris.put(TEXT, policy=Policy(compression=Compression.NONE)).id
    set_policy(zones.paris, ArrivalPolicy(compression=Compression.ZSTD, compression_level=19))
    file = put(zones, shared("paris"))
    zones.settle()
    assert [(f.codec, f.stored_length) for f in records(zones.paris, file)] == [
        (f.codec, f.stored_length) for f in records(zones.paris, own)
    ]
    assert {frame.source_position for frame in records(zones.paris, file)} != {0}


def test_what_is_sealed_stays_as_it_came(zones: Pumped) -> None:
    """Content whose key is sealed for its home is kept as it is, and the status says that there is some."""
    set_policy(zones.paris, ArrivalPolicy(encryption=Encryption.AES_256_GCM, compression=Compression.ZSTD))
    policy = shared(
        "paris", encryption=Encryption.AES_256_GCM, federation_sealed=True, compression=Compression.NONE
    )
    file = put(zones, policy)
    open_file = put(zones, shared("paris"), b"readable" * 100, "/open")
    zones.settle()
    home, there = frames(zones.oslo, file), frames(zones.paris, file)
    assert [stored(zones.paris, each) for each in there] == [stored(zones.oslo, each) for each in home]
    with pytest.raises(RefusedError, match="sealed for its home"):
        zones.paris.get(file)
    assert zones.paris.get(open_file) == b"readable" * 100
    (zone,) = status(zones.paris)["zones"]
    assert zone["received"]["sealed_keys"] == 1
    assert status(zones.paris)["arrival"]["policy"] == {"compression": "zstd", "encryption": "aes-256-gcm"}


def stored(store: Store, frame: tuple[FrameRef, int]) -> bytes:
    """The stored bytes of a frame."""
    ref, position = frame
    return bytes(
        store.wal.read_payload(ref.source_position or position, ref.payload_offset, ref.stored_length)
    )


def test_a_policy_holds_for_what_comes_after_it(zones: Pumped) -> None:
    """What came before stays as it is; what comes after another policy, or none, is as that says, all readable."""
    files = []
    for number, policy in enumerate((ArrivalPolicy(), GCM, GCM, ArrivalPolicy())):
        set_policy(zones.paris, policy)
        files.append(put(zones, shared("paris"), TEXT + b"%d" % number, f"/{number}"))
        zones.settle()
    keys = [{frame.key_id for frame in records(zones.paris, file)} for file in files]
    assert keys[0] == keys[3] == {0}
    assert 0 not in keys[1] | keys[2]
    assert keys[1] != keys[2], "each time it is set, there is a fresh key"
    for number, file in enumerate(files):
        assert zones.paris.get(file) == TEXT + b"%d" % number
    assert describe(zones.paris) == {"policy": None, "key": None}
    assert zones.paris.replay(verify=True).equal


def test_what_comes_twice_is_there_once(zones: Pumped) -> None:
    """A shipment that is delivered again is not encoded into the log again, though it would be other bytes."""
    set_policy(zones.paris, GCM)
    file = put(zones, shared("paris"))
    pump = zones.there
    pump.connect()
    while (outgoing := pump.source.next()) is not None:
        received = pump.receiver.receive(pump.peer, [outgoing.body])
        before = zones.paris.position, frames(zones.paris, file)
        again = pump.receiver.receive(pump.peer, [outgoing.body, outgoing.body])
        assert again.error is None
        assert list(again.cursors) == [*received.cursors] * 2
        assert (zones.paris.position, frames(zones.paris, file)) == before
        pump.source.acknowledged(outgoing, received.cursors[0])
    assert zones.paris.get(file) == TEXT


@pytest.mark.parametrize("oslo, paris", list(itertools.product([None, "zstd:19", "gcm"], repeat=2))[1:])
@pytest.mark.parametrize("encrypted", [False, True])
def test_homes_go_to_and_fro(
    zones: Pumped,
    oslo: str | None,
    paris: str | None,
    encrypted: bool,
) -> None:
    """With arrival policies on either side or both, both zones are alike after each promotion, whatever was done."""
    arrival = {"zstd:19": ArrivalPolicy(compression=Compression.ZSTD, compression_level=19), "gcm": GCM}
    for store, wanted in ((zones.oslo, oslo), (zones.paris, paris)):
        if wanted is not None:
            set_policy(store, arrival[wanted])
    chance = random.Random(f"{oslo} {paris} {encrypted}")
    cipher = Encryption.AES_256_GCM if encrypted else Encryption.NONE
    zones.oslo.mkdir("/all")
    zones.oslo.set_policy("/all", shared("paris", encryption=cipher))
    some_acts(zones.oslo, "/all", chance, 30)
    zones.settle()
    for winner in ("paris", "oslo", "paris"):
        taken_over(zones, chance, winner)
    for store in (zones.oslo, zones.paris):
        assert not store.verify().findings
        assert not audit(store)["findings"]


@pytest.mark.parametrize("cipher", list(Encryption))
def test_what_a_new_home_copies_is_readable_at_the_old_one(zones: Pumped, cipher: Encryption) -> None:
    """What lies under the key of a zone that took over goes back under the capsule's own, or none if it has none."""
    set_policy(zones.paris, GCM)
    zones.oslo.mkdir("/all")
    zones.oslo.set_policy("/all", shared("paris", encryption=cipher))
    zones.oslo.put(TEXT, name="/all/file")
    zones.oslo.put(TEXT, name="/all/closed")
    zones.settle()
    moment = f"@{zones.paris.position}"
    promote(zones.paris, Zones(zones.paris), "oslo")
    top = "/zones/oslo/all"
    closed = zones.paris.resolve(f"{top}/closed")
    policy = zones.paris.policy(closed)
    zones.paris.clone(f"{top}/file", f"{top}/past", at=moment)
    zones.paris.set_policy(closed, Policy(encryption=cipher))
    zones.settle()
    with pytest.raises(NotFoundError):
        zones.oslo.resolve("/all/closed")
    zones.paris.set_policy(closed, policy)
    zones.paris.write(closed, 100, b"written there")
    zones.settle()
    for name, content in (("past", TEXT), ("closed", TEXT[:100] + b"written there" + TEXT[113:])):
        there, here = zones.paris.resolve(f"{top}/{name}"), zones.oslo.resolve(f"/all/{name}")
        assert zones.paris.get(there) == zones.oslo.get(here) == content
        assert {frame.key_id for frame in records(zones.oslo, here)} <= {0, zones.oslo.stat(here).key}
        assert describe(zones.paris)["key"] in {frame.key_id for frame in records(zones.paris, there)}
    assert not zones.oslo.verify().findings


# --- refused -----------------------------------------------------------------------------------------


def test_a_key_that_does_not_open_refuses_the_shipment(
    zones: Pumped, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the master key nothing arrives, the stream stays where it is, and goes on when the key is there."""
    set_policy(zones.paris, GCM)
    file = put(zones, shared("paris"))
    keyring = zones.paris._keyring
    locked = Keyring(zones.paris._wrapped_key, store_key=zones.paris._store_key)
    zones.there.connect()
    cursor = zones.there.receiver.cursors(zones.there.peer)
    with monkeypatch.context() as patch:
        patch.setattr(zones.paris, "_keyring", locked)
        with pytest.raises(RefusedError, match="locked"):
            zones.there.run()
        assert zones.there.receiver.cursors(zones.there.peer) == cursor
        with pytest.raises(NotFoundError):
            zones.paris.stat(file)
    assert zones.paris._keyring is keyring
    zones.settle()
    assert zones.paris.get(file) == TEXT


def test_a_frame_of_another_key_refuses_the_shipment(zones: Pumped, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame that its key does not open never gets into the log: here the data key that came with it is another."""
    set_policy(zones.paris, GCM)
    file = put(zones, shared("paris", encryption=Encryption.AES_256_GCM))

    def other(data_key: bytes, *arguments: Any, **options: Any) -> bytes:
        return seal_key(bytes(len(data_key)), *arguments, **options)

    monkeypatch.setattr("space._node.federation_home.seal_key", other)
    stands(zones, file, CorruptionError, "does not read")


def stands(zones: Pumped, file: CapsuleId, error: type[SpaceError], message: str) -> None:
    """Whatever is tried, what a file holds is refused, and the stream stays where it is."""
    cursors = []
    for _ in range(3):
        zones.there.connect()
        with pytest.raises(error, match=message):
            zones.there.run()
        cursors.append(zones.there.receiver.cursors(zones.there.peer))
    assert cursors[0] == cursors[1] == cursors[2]
    assert records(zones.paris, file) == []


class Installed:
    """An entry point as a package would bring it."""

    def __init__(self, function: Callable[[bytes, bytes], Any]) -> None:
        self._function = function

    def load(self) -> Callable[[bytes, bytes], Any]:
        return self._function


def install(monkeypatch: pytest.MonkeyPatch, **functions: Callable[[bytes, bytes], Any]) -> None:
    """Functions for transforms, as packages bring them."""

    def entry_points(*, group: str, name: str) -> list[Installed]:
        found = functions.get(name) if group == "space.arrival" else None
        return [] if found is None else [Installed(found)]

    monkeypatch.setattr("space._node.federation_arrival.entry_points", entry_points)


def test_functions_of_the_owner_see_what_arrives(zones: Pumped, monkeypatch: pytest.MonkeyPatch) -> None:
    """Content goes through the functions that the policy names, in order; what they return is kept."""
    seen = []

    def blank(capsule: bytes, content: bytes) -> bytes:
        seen.append(capsule)
        return content.replace(b"fox", b"---")

    install(monkeypatch, blank=blank, shout=lambda _, content: content.upper())
    set_policy(zones.paris, ArrivalPolicy(transform=("blank", "shout"), encryption=Encryption.AES_256_GCM))
    file = put(zones, shared("paris", encryption=Encryption.AES_256_GCM))
    zones.settle()
    assert zones.paris.get(file) == TEXT.replace(b"fox", b"---").upper()
    assert set(seen) == {bytes(file)}


def fails(_: bytes, content: bytes) -> bytes:
    """Raises what anybody's function may raise."""
    raise ZeroDivisionError("a mistake")


def refuses(_: bytes, content: bytes) -> bytes:
    """Says no."""
    raise RefusedError("a virus")


@pytest.mark.parametrize(
    "function, message",
    [
        (fails, "transform mine failed: ZeroDivisionError"),
        (refuses, "a virus"),
        (lambda _, content: content[1:], "transform mine made other than"),
        (lambda _, content: None, "transform mine made other than"),
    ],
)
def test_a_function_that_fails_refuses_the_shipment(
    zones: Pumped, monkeypatch: pytest.MonkeyPatch, function: Callable[[bytes, bytes], Any], message: str
) -> None:
    """Nothing of the shipment arrives, the stream stays, and goes on once the function does."""
    install(monkeypatch, mine=function)
    set_policy(zones.paris, ArrivalPolicy(transform=("mine",)))
    file = put(zones, shared("paris"))
    stands(zones, file, RefusedError, message)
    install(monkeypatch, mine=lambda _, content: content)
    zones.settle()
    assert zones.paris.get(file) == TEXT


def test_a_function_that_is_not_there_is_refused(zones: Pumped, monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy that names it is refused; one that did, when it was there, refuses what arrives."""
    with pytest.raises(RefusedError, match="transform mine, which is not installed"):
        set_policy(zones.paris, ArrivalPolicy(transform=("mine",)))
    with monkeypatch.context() as patch:
        install(patch, mine=lambda _, content: content)
        set_policy(zones.paris, ArrivalPolicy(transform=("mine",)))
    assert not list(importlib.metadata.entry_points(group="space.arrival", name="mine"))
    put(zones, shared("paris"))
    zones.there.connect()
    with pytest.raises(RefusedError, match="not installed"):
        zones.there.run()


@pytest.mark.parametrize("policy", [GCM, ArrivalPolicy(compression=Compression.ZSTD), ArrivalPolicy()])
def test_numbers_of_keys_are_drawn_without_asking(
    zones: Pumped, monkeypatch: pytest.MonkeyPatch, policy: ArrivalPolicy
) -> None:
    """A key of the home with the number of the zone's own is another key, and arrives as any other does."""
    set_policy(zones.paris, GCM)
    number = describe(zones.paris)["key"]
    assert number is not None
    set_policy(zones.paris, policy)
    with monkeypatch.context() as patch:
        key = cmd.NewKey(number, 1, zones.oslo.wrap_key(number, 1, bytes(range(32))))
        patch.setattr(zones.oslo, "new_key", lambda _: key)
        file = put(zones, shared("paris", encryption=Encryption.AES_256_GCM))
    zones.settle()
    assert zones.oslo.stat(file).key == number
    assert zones.paris.stat(file).key != number
    assert zones.paris.get(file) == TEXT
    promote(zones.paris, Zones(zones.paris), "oslo")
    zones.paris.write(file, 0, b"written there, and back")
    zones.settle()
    assert zones.oslo.get(file) == zones.paris.get(file) == b"written there, and back" + TEXT[23:]
    assert zones.oslo.stat(file).key == number
    for store in (zones.oslo, zones.paris):
        assert not store.verify().findings


@pytest.mark.parametrize("policy", [GCM, ArrivalPolicy(compression=Compression.ZSTD), ArrivalPolicy()])
def test_nobody_ships_frames_under_the_key_of_the_zone(zones: Pumped, policy: ArrivalPolicy) -> None:
    """A frame under the number of that key, without a key of the home's of that number, is refused; also afterwards."""
    set_policy(zones.paris, GCM)
    number = describe(zones.paris)["key"]
    assert number is not None
    if policy.encryption is None:
        set_policy(zones.paris, policy)
    recode = recoder(zones.paris, ShipmentKeys(zones.paris, zones.there.peer.id))
    encrypting = Policy(encryption=Encryption.AES_256_GCM)
    (frame,) = zones.paris._writer.encode(TEXT[:100], encrypting, (number, 1))
    assert frame.stored is not None
    with pytest.raises(RefusedError, match="this zone's own"):
        recode(bytes(16), frame.ref, frame.stored)


# --- setting it --------------------------------------------------------------------------------------


def test_a_store_without_a_zone_has_no_arrival_policy(tmp_path: Path) -> None:
    """Nothing arrives there, and setting one says so."""
    with Store(tmp_path / "store") as store, pytest.raises(NotFoundError, match="space zone init"):
        set_policy(store, GCM)


def test_nobody_else_changes_the_directory_it_is_kept_in(zones: Pumped) -> None:
    """/zones has the arrival policy as its own, and takes no other one."""
    set_policy(zones.paris, GCM)
    assert zones.paris.policy(ZONES).encryption is Encryption.AES_256_GCM
    with pytest.raises(RefusedError):
        zones.paris.set_policy(ZONES, Policy())
    before = zones.paris.position
    zones.paris.close()
    with Store(zones.paris.path) as again:
        assert again.position == before
        assert describe(again)["policy"] == {"encryption": "aes-256-gcm"}
        assert again.replay(verify=True).equal


def test_by_command(tmp_path: Path) -> None:
    """The command sets, shows and clears the policy; what is wrong with a file is said with its line, as 2."""
    data = ("--data", tmp_path / "store")
    space_command(*data, "zone", "init", "oslo")
    file = tmp_path / "arrival.yaml"
    file.write_text("compression: zstd:19\nencryption: aes-256-gcm\n")
    assert json.loads(space_command("--json", *data, "zone", "arrival")) == {"policy": None, "key": None}
    found = json.loads(space_command("--json", *data, "zone", "arrival", "--policy-file", file))
    assert found["policy"] == {"compression": "zstd:19", "encryption": "aes-256-gcm"}
    shown = space_command(*data, "zone", "arrival")
    assert "compression: zstd:19, encryption: aes-256-gcm, key" in shown
    assert shown.strip() in space_command(*data, "federation", "status")
    for text, message in (
        ("compression: lz4\nsovereignty: global\n", "arrival.yaml:2: sovereignty: means nothing on arrival"),
        ("encryption: none\n", "arrival.yaml:1: encryption: what comes encrypted stays encrypted"),
        ("\ncompresion: lz4\n", "arrival.yaml:2: compresion: unknown key"),
        ("compression: zstd:40\n", "arrival.yaml:1: compression: zstd has levels"),
    ):
        file.write_text(text)
        assert message in space_command(*data, "zone", "arrival", "--policy-file", file, status=2)
    file.write_text("transform: [mine]\n")
    assert "not installed" in space_command(*data, "zone", "arrival", "--policy-file", file, status=5)
    space_command(*data, "zone", "arrival", "--clear", "--policy-file", file, status=2)
    assert "stays as it comes" in space_command(*data, "zone", "arrival", "--clear")

"""Changing the master key, destroying data keys, and listing both, on a store."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import space
from space._errors import ConflictError, NotFoundError, RefusedError, UnavailableError
from space._node import keys, keys_data
from space._node.beside import open_beside
from space._node.keys_data import rekey
from space._node.keys_file import MASTER_KEY_ENVIRONMENT, MasterFile
from space._node.store import Store
from space.content.keys import load_master_keys, master_fingerprint
from space.events import commands as cmd
from space.events.ids import CapsuleId
from space.policy.model import Policy
from space.projections import content_map
from tests.store_support import texture

SECRET = Policy.from_document({"encryption": "aes-256-gcm", "compression": "none"})
XTS = Policy.from_document({"encryption": "aes-256-xts"})


class Killed(BaseException):
    """The process is gone."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store with two encrypted capsules and a plain one."""
    with space.open(tmp_path / "store") as opened:
        opened.put(b"first secret", name="/a", policy=SECRET)
        opened.put(b"second secret", name="/b", policy=XTS)
        opened.put(b"for everybody", name="/plain")
        yield opened


def rotate(store: Store) -> dict[str, Any]:
    """Another master key."""
    return keys.rotate([store], keys.Nobody())


def destroy(store: Store, *names: str, **options: Any) -> dict[str, Any]:
    """Destroys the keys of what has these names."""
    return keys.destroy(store, [store], keys.Nobody(), [store.resolve(name) for name in names], **options)


def masters(store: Store) -> tuple[bytes, ...]:
    """What is in the file."""
    return load_master_keys(store.master_file.path)


def every_byte(directory: Path) -> bytes:
    """Every byte of every file of a store."""
    return b"".join(path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file())


def reads(store: Store, name: str) -> bytes:
    """The content of a name."""
    return store.get(name)


def test_another_master_key_and_everything_is_read(store: Store) -> None:
    """After a change of the master key only the new one is in the file; content is read, now and after a restart."""
    (old,) = masters(store)
    done = rotate(store)
    (new,) = masters(store)
    assert new != old
    assert (done["rewrapped"], done["erased"], done["kept"]) == (2, True, [])
    assert int(done["master"], 16) == master_fingerprint(new) == store.master
    assert [reads(store, name) for name in ("/a", "/b")] == [b"first secret", b"second secret"]
    store.put(b"third secret", name="/c", policy=SECRET)
    rotate(store)
    store.close()
    with space.open(store.path) as again:
        assert [reads(again, n) for n in ("/a", "/b", "/c")] == [
            b"first secret",
            b"second secret",
            b"third secret",
        ]
        assert again.verify().findings == []
        assert again.replay(verify=True).equal
    assert old.hex().encode() not in every_byte(store.path)
    assert old not in every_byte(store.path)


def test_a_past_moment_is_read_with_the_keys_of_the_present(store: Store) -> None:
    """Content of a moment before the master key was changed is read, here and beside; destroyed content is not."""
    moment = f"@{store.position}"
    rotate(store)
    with store.at(moment) as past, open_beside(store.path, moment) as beside:
        assert past.get("/a") == beside.get("/a") == b"first secret"
    destroy(store, "/a")
    with store.at(moment) as past, open_beside(store.path, moment) as beside:
        for reading in (past, beside):
            with pytest.raises(RefusedError, match="was destroyed"):
                reading.get("/a")
            assert reading.get("/b") == b"second secret"


def test_destroyed_is_gone_from_the_disk(store: Store) -> None:
    """No file of the directory has a master key that opens any row a destroyed key ever had, nor the key itself."""
    store.checkpoint()
    number = store.stat(store.resolve("/a")).key
    row = store._wrapped_key(number, 1)
    assert row is not None
    data_key = store._keyring.unwrap(number, 1, row)
    had = [*masters(store)]
    rotate(store)
    rows: list[bytes | None] = [row, store._wrapped_key(number, 1)]
    had += masters(store)
    done = destroy(store, "/a")
    assert (done["keys"], done["erased"], done["zones"], done["plain"]) == ([number], True, [], [])
    for _ in range(2):
        with pytest.raises(RefusedError, match="was destroyed") as refused:
            store.get("/a")
        assert refused.value.kind.exit_status == 5
        with pytest.raises(RefusedError):
            store.write(store.resolve("/a"), 0, b"more")
        assert reads(store, "/b") == b"second secret"
        assert store.stat(store.resolve("/a")).size == len(b"first secret")
        assert (store.verify().findings, store.verify().destroyed) == ([], 1)
        assert store.replay(verify=True).equal
        content = every_byte(store.path)
        for each in (data_key, *had):
            assert each not in content
            assert each.hex().encode() not in content
        for wrapped in rows:
            assert wrapped is not None
            assert store._keyring.wrapped_by(number, 1, wrapped) == 0
        store.close()
        store = space.open(store.path)
    store.close()


def test_destroyed_in_memory_as_well(store: Store) -> None:
    """What had been read a moment before is not read from memory once its key is destroyed."""
    assert reads(store, "/a") == b"first secret"
    destroy(store, "/a")
    with pytest.raises(RefusedError, match="was destroyed"):
        store.get("/a")


def test_clones_share_the_fate_or_refuse_it(store: Store) -> None:
    """A capsule whose key a clone has, of now or of a past moment, is destroyed only together with the clone."""
    before = f"@{store.position}"
    store.clone("/a", "/copy")
    store.clone("/a", "/earlier", at=before)
    with pytest.raises(RefusedError, match=f"{store.resolve('/copy')}.*--with-clones"):
        destroy(store, "/a", "/earlier")
    assert reads(store, "/a") == b"first secret"
    done = destroy(store, "/a", with_clones=True)
    assert {CapsuleId.parse(each) for each in done["capsules"]} == {
        store.resolve(name) for name in ("/a", "/copy", "/earlier")
    }
    for name in ("/a", "/copy", "/earlier"):
        with pytest.raises(RefusedError, match="was destroyed"):
            store.get(name)


def test_what_was_plain_before_is_said(store: Store) -> None:
    """Content stored before a capsule was encrypted has no key to destroy, and the answer says whose."""
    store.set_policy("/plain", SECRET)
    store.write(store.resolve("/plain"), 0, b"FOR")
    assert destroy(store, "/plain")["plain"] == [str(store.resolve("/plain"))]


def test_never_encrypted_has_nothing_to_destroy(store: Store) -> None:
    """A capsule without a key is an error, and nothing happens."""
    before = store.position
    with pytest.raises(NotFoundError, match="never encrypted"):
        destroy(store, "/a", "/plain")
    assert store.position == before
    assert reads(store, "/a") == b"first secret"


def test_destroyed_twice_is_destroyed(store: Store) -> None:
    """Destroying again changes the master key again and says the same."""
    first, second = destroy(store, "/a"), destroy(store, "/a")
    assert first["keys"] == second["keys"]
    assert first["master"] != second["master"]


def test_listing_says_what_became_of_keys(store: Store) -> None:
    """Keys are usable, then erased; one whose master key is missing is locked; the current master key counts them."""
    moment = store.position
    store.clone("/a", "/copy")
    found = keys.listing(store)
    assert [(each["state"], each["encryption"], each["capsules"]) for each in found["keys"]] == [
        ("usable", "aes-256-gcm", 2),
        ("usable", "aes-256-xts", 1),
    ]
    assert all(0 < each["created"]["position"] < moment for each in found["keys"])
    assert [(each["current"], each["keys"]) for each in found["masters"]] == [(True, 2)]
    destroy(store, "/b")
    found = keys.listing(store)
    gone = found["keys"][1]
    assert (gone["state"], gone["destroyed"]["actor"], gone["master"]) == ("erased", store.actor, None)
    assert found["masters"][0]["keys"] == 1
    store.master_file.path.write_bytes(b"\x07" * 32)
    assert keys.listing(store)["keys"][0]["state"] == "locked"


def test_without_a_master_key_there_is_none_to_change(tmp_path: Path) -> None:
    """A store that never encrypted anything lists nothing and has nothing to change."""
    with space.open(tmp_path / "store") as store:
        assert keys.listing(store)["masters"] == keys.listing(store)["keys"] == []
        with pytest.raises(NotFoundError, match="no master key yet"):
            rotate(store)


def test_a_shared_file_keeps_its_old_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stores use one file: changing one's master key leaves the other's, and destroying wants to be told."""
    file = tmp_path / "shared.key"
    file.write_bytes(b"\x05" * 32)
    file.chmod(0o600)
    monkeypatch.setenv(MASTER_KEY_ENVIRONMENT, str(file))
    with space.open(tmp_path / "one") as one, space.open(tmp_path / "two") as two:
        for store in (one, two):
            store.put(b"secret", name="/a", policy=SECRET)
        assert rotate(one)["erased"] is False
        assert len(load_master_keys(file)) == 2
        with pytest.raises(RefusedError, match="other stores may use"):
            destroy(one, "/a")
    with space.open(tmp_path / "one") as one, space.open(tmp_path / "two") as two:
        assert one.get("/a") == two.get("/a") == b"secret"
        assert rotate(two)["master"] == keys.listing(one)["masters"][1]["master"]
        assert keys.rotate([two], keys.Nobody(), sole=True)["erased"] is True
        assert len(load_master_keys(file)) == 1


def test_a_file_that_only_its_owner_changes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file cannot be written, a line added by hand is the new key, and what is to be taken out is said."""
    (old,) = masters(store)

    def refuse(*_: object) -> None:
        raise RefusedError("the file cannot be changed")

    monkeypatch.setattr(MasterFile, "replace", refuse)
    with pytest.raises(RefusedError, match="cannot be changed"):
        rotate(store)
    assert store.master == 0
    new = bytes(range(32))
    store.master_file.path.write_text(f"{old.hex()}\n{new.hex()}\n")
    done = rotate(store)
    assert done["erased"] is False
    assert "take out the lines before the last" in done["kept"][0]
    assert store.master == master_fingerprint(new)
    store.master_file.path.write_text(f"{new.hex()}\n")
    assert reads(store, "/a") == b"first secret"


def test_one_change_at_a_time(store: Store) -> None:
    """While keys are being changed, another change is not available."""
    with store.changing_keys, pytest.raises(UnavailableError, match="changed already"):
        rotate(store)


def test_a_key_wrapped_before_the_change_is_refused_after_it(store: Store) -> None:
    """Who wrapped by the old master key and comes late is told to try again: its content would be lost."""
    late = store.new_key(SECRET)
    rotate(store)
    with pytest.raises(ConflictError, match="master key was changed meanwhile"):
        store.execute(cmd.CreateCapsule(store.new_id(), policy=b"", key=late))
    assert store.new_key(SECRET) is not None


def test_destroyed_meanwhile_does_not_come_back(store: Store) -> None:
    """A row that was read before its key was destroyed cannot be put back wrapped anew."""
    number = store.stat(store.resolve("/a")).key
    store.execute(cmd.DestroyKeys(store.resolve("/a"), [number]))
    with pytest.raises(ConflictError, match="changed meanwhile"):
        store.execute(cmd.RewrapKeys(7, [(number, 1, bytes(60) + (7).to_bytes(8, "little"))]))


@pytest.mark.parametrize("what", ["rotate", "destroy"])
@pytest.mark.parametrize("at", range(8))
@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_step(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, at: int, after: bool
) -> None:
    """Killed before or after any step, all that is not destroyed is read, and the next run comes to the end."""
    left = [at]

    def dying(work: Any) -> Any:
        def step(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] < 0 and not after:
                raise Killed
            result = work(*arguments, **options)
            if left[0] < 0:
                raise Killed
            return result

        return step

    for owner, name in (
        (MasterFile, "replace"),
        (Store, "execute"),
        (Store, "execute_all"),
        (Store, "forget_keys"),
    ):
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))
    (old,) = masters(store)
    try:
        rotate(store) if what == "rotate" else destroy(store, "/a")
    except Killed:
        pass
    else:
        assert left[0] >= 0
    monkeypatch.undo()
    killed = tmp_path / "killed"
    shutil.copytree(store.path, killed)  # nothing is under way: these are the bytes a kill would leave
    with space.open(killed) as again:
        assert reads(again, "/b") == b"second secret"
        if what == "rotate":
            assert reads(again, "/a") == b"first secret"
            rotate(again)
            assert reads(again, "/a") == b"first secret"
        else:
            destroy(again, "/a")
            with pytest.raises(RefusedError, match="was destroyed"):
                again.get("/a")
        assert reads(again, "/b") == b"second secret"
        assert again.replay(verify=True).equal
        assert len(masters(again)) == 1
    assert old.hex().encode() not in every_byte(killed)


# --- another data key --------------------------------------------------------------------------------


def test_another_data_key_encrypts_the_present_again(store: Store) -> None:
    """Content is the same under another key, holes are holes; the past and a clone have the old one; both go."""
    size = 3 << 20
    content = bytearray(texture(size))
    capsule = store.put(bytes(content), name="/big", policy=SECRET).id
    store.execute(cmd.Deallocate(capsule, 1 << 20, 1 << 20))
    store.write(capsule, (1 << 20) + 100, bytes(8192) + b"after zeros")
    store.clone("/big", "/copy")
    old, moment, before = store.stat(capsule).key, f"@{store.position}", store.get("/big")
    seen: list[int] = []
    done = rekey(store, capsule, seen.append)
    new = store.stat(capsule).key
    assert (done["key"], done["before"]) == (new, old)
    assert new != old
    assert seen[-1] == done["bytes"] < size - (1 << 20) + (16 << 10)
    assert store.get("/big") == store.get("/copy") == before
    assert keys_in_use(store, "/big") == {new}
    assert keys_in_use(store, "/copy") == {old}
    with store.at(moment) as past:
        assert past.get("/big") == before
    store.rm("/copy")
    assert destroy(store, "/big", with_clones=True)["keys"] == sorted([old, new])
    with store.at(moment) as past, pytest.raises(RefusedError, match="was destroyed"):
        past.get("/big")


def keys_in_use(store: Store, name: str) -> set[int]:
    """Keys of the frames a capsule is made of now."""
    with store._read() as txn:
        found = content_map.extents(txn, store.resolve(name), 0, content_map.OFFSET_MAX)
        return set().union(*(keys.frame_keys(extent.frames) for extent in found))


def test_what_was_plain_is_encrypted(store: Store) -> None:
    """Content from before the policy encrypted is under the key afterwards; the past of it stays plain."""
    store.set_policy("/plain", SECRET)
    rekey(store, store.resolve("/plain"))
    assert 0 not in keys_in_use(store, "/plain")
    assert store.get("/plain") == b"for everybody"


def test_another_data_key_while_it_is_written(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who writes between a look and the rewriting wins, and it is looked again; who does so for ever has to pause."""
    capsule = store.resolve("/a")
    read, writes = store.read, [3]

    def raced(*arguments: Any) -> bytes:
        found = read(*arguments)
        if writes[0]:
            writes[0] -= 1
            store.write(capsule, 0, b"F%d" % writes[0])
        return found

    monkeypatch.setattr(store, "read", raced)
    rekey(store, capsule)
    assert store.get("/a") == b"F0rst secret"
    assert keys_in_use(store, "/a") == {store.stat(capsule).key}
    writes[0] = 1000
    capsule = store.resolve("/b")
    monkeypatch.setattr("space._node.keys_data.ATTEMPTS_MAX", 3)
    with pytest.raises(UnavailableError, match="all the time"):
        rekey(store, capsule)


def test_another_data_key_after_a_kill(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the first of two pieces, the next run goes on with the same key and leaves nothing under the old."""
    capsule = store.put(texture(2 << 20), name="/big", policy=SECRET).id
    first = keys_data._encrypted_again

    def dies(*arguments: Any) -> int:
        if arguments[2]:
            raise Killed
        return first(*arguments)

    monkeypatch.setattr(keys_data, "_encrypted_again", dies)
    with pytest.raises(Killed):
        rekey(store, capsule)
    monkeypatch.undo()
    assert len(keys_in_use(store, "/big")) == 2
    assert store.get("/big") == texture(2 << 20)
    half = store.stat(capsule).key
    assert rekey(store, capsule)["key"] == half
    assert keys_in_use(store, "/big") == {half}
    assert rekey(store, capsule)["key"] != half


def test_what_cannot_get_another_data_key(store: Store) -> None:
    """A capsule without a key, and one that is shipped to zones, are refused, and nothing happens."""
    before = store.position
    with pytest.raises(NotFoundError, match="never encrypted"):
        rekey(store, store.resolve("/plain"))
    assert store.position == before
    store.set_policy("/a", Policy.from_document(
        {"encryption": "aes-256-gcm", "sovereignty": "global", "federation": {"targets": ["paris"]}}
    ))  # fmt: skip
    with pytest.raises(RefusedError, match="shipped to zones"):
        rekey(store, store.resolve("/a"))


def test_layouts_of_shards_are_said(store: Store) -> None:
    """Keys sealed in a layout of shards are not reached by changing the master key: the answer says it is not gone."""
    capsule = store.resolve("/a")
    store.mkdir(f"/.shards/{CapsuleId(bytes(16))}/{capsule}", parents=True)
    done = destroy(store, "/a")
    assert done["erased"] is False
    (kept,) = done["kept"]
    assert str(capsule) in kept
    assert destroy(store, "/b")["erased"] is True

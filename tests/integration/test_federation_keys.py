"""Data keys between zones: numbers that are taken, the master key of either side changed, keys destroyed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from space._errors import RefusedError
from space._node import keys
from space._node.store import Store
from space.events import commands as cmd
from space.events.ids import CapsuleId
from space.policy.model import Encryption
from tests.federation_support import Two, shared, two_zones

pytestmark = pytest.mark.requires("py:aiohttp")

SECRET = shared("paris", encryption=Encryption.AES_256_GCM)


@pytest.fixture
def zones(tmp_path: Path) -> Iterator[Two]:
    """Two zones that know each other; nothing is served yet."""
    with two_zones(tmp_path) as two:
        yield two


def occupy(store: Store, number: int) -> CapsuleId:
    """Gives a number to another key of a store."""
    key = cmd.NewKey(number, 1, store.wrap_key(number, 1, os.urandom(32)))
    made = store.new_id()
    store.execute(cmd.CreateCapsule(made, parent=store.root, name=b"own", policy=b"", key=key))
    return made


@pytest.mark.parametrize("cipher", [Encryption.AES_256_GCM, Encryption.AES_256_XTS])
def test_a_number_that_is_taken_there(zones: Two, cipher: Encryption) -> None:
    """A key whose number another key has in the target gets another one there; all is read, written later too."""
    content = os.urandom(200_000)
    secret = zones.oslo.put(content, name="/s", policy=shared("paris", encryption=cipher))
    number = zones.oslo.stat(secret.id).key
    own = occupy(zones.paris, number)
    zones.serve()
    zones.in_step()
    assert zones.paris.get(secret.id) == content
    there = zones.paris.stat(secret.id).key
    assert there != number
    zones.oslo.write(secret.id, 1000, b"later" * 1000)
    zones.oslo.clone("/s", "/copy")
    zones.oslo.put(b"another", name="/t", policy=shared("paris", encryption=cipher))
    zones.in_step()
    later = content[:1000] + b"later" * 1000 + content[6000:]
    assert zones.paris.get(secret.id) == zones.paris.get(zones.oslo.resolve("/copy")) == later
    assert zones.paris.get(zones.oslo.resolve("/t")) == b"another"
    assert zones.paris.stat(secret.id).key == there
    assert zones.paris.stat(own).key == number
    assert zones.paris.verify().findings == []


def test_master_keys_are_changed_while_zones_ship(zones: Two) -> None:
    """What was written before the home changed its master key is shipped after it, and read after the target did."""
    before = zones.oslo.put(b"before" * 1000, name="/before", policy=SECRET)
    keys.rotate([zones.oslo], keys.Nobody())
    after = zones.oslo.put(b"after" * 1000, name="/after", policy=SECRET)
    zones.serve()
    zones.in_step()
    keys.rotate([zones.paris], keys.Nobody())
    zones.oslo.write(before.id, 0, b"BEFORE")
    last = zones.oslo.put(b"last", name="/last", policy=SECRET)
    zones.in_step()
    assert zones.paris.get(before.id) == b"BEFORE" + b"before" * 999
    assert zones.paris.get(after.id) == b"after" * 1000
    assert zones.paris.get(last.id) == b"last"


def test_destroyed_at_home_and_there(zones: Two) -> None:
    """Destroying at home names the zone that has the key; the stream goes on; the key is destroyed there as well."""
    gone = zones.oslo.put(b"gone" * 1000, name="/gone", policy=SECRET)
    zones.serve()
    zones.in_step()
    done = keys.destroy(zones.oslo, [zones.oslo], keys.Nobody(), [gone.id])
    assert done["zones"] == ["paris"]
    assert zones.paris.get(gone.id) == b"gone" * 1000
    zones.oslo.mv("/gone", "/moved")
    unread = zones.oslo.put(b"never read", name="/unread", policy=SECRET)
    keys.destroy(zones.oslo, [zones.oslo], keys.Nobody(), [unread.id])
    stays = zones.oslo.put(b"stays", name="/stays", policy=SECRET)
    zones.in_step()
    assert zones.paris.get(stays.id) == b"stays"
    assert keys.destroy(zones.paris, [zones.paris], keys.Nobody(), [gone.id])["zones"] == ["oslo"]
    for store in (zones.oslo, zones.paris):
        with pytest.raises(RefusedError, match="was destroyed"):
            store.get(gone.id)
        assert store.replay(verify=True).equal

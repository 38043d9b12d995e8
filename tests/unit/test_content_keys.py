from __future__ import annotations

from pathlib import Path

import pytest

from space._errors import NotFoundError, RefusedError, UsageError
from space.content.keys import (
    DESTROYED,
    KEY_BYTES,
    SEALED_BYTES,
    WRAPPED_BYTES,
    Keyring,
    content_hash,
    generate_master_key,
    load_master_keys,
    parse_master_keys,
)
from tests.content_support import MASTER_KEY, STORE_KEY, Log, counted_bytes


def keyring(rows: dict[tuple[int, int], bytes], master_key: bytes | None = MASTER_KEY) -> Keyring:
    """A keyring over ``rows`` with reproducible randomness."""
    return Keyring(
        lambda key_id, version: rows.get((key_id, version)),
        store_key=STORE_KEY,
        master_keys=() if master_key is None else (master_key,),
        random_bytes=counted_bytes(),
    )


def test_wrapped_key_comes_back() -> None:
    """A row opens to the key that was wrapped, and shows nothing of it."""
    ring, data_key = keyring({}), b"d" * KEY_BYTES
    row = ring.wrap(1, 0, data_key)
    assert len(row) == WRAPPED_BYTES
    assert data_key not in row
    assert ring.unwrap(1, 0, row) == data_key


def test_wrapping_twice_gives_different_rows() -> None:
    """Equal keys cannot be told from their rows."""
    ring = keyring({})
    assert ring.wrap(1, 0, bytes(KEY_BYTES)) != ring.wrap(1, 0, bytes(KEY_BYTES))


@pytest.mark.parametrize("at", range(WRAPPED_BYTES))
def test_damaged_row_does_not_open(at: int) -> None:
    """A row with any byte changed is refused."""
    ring = keyring({})
    row = bytearray(ring.wrap(1, 0, bytes(KEY_BYTES)))
    row[at] ^= 1
    with pytest.raises(RefusedError, match="key 1 version 0 does not open"):
        ring.unwrap(1, 0, bytes(row))


@pytest.mark.parametrize("size", [1, 7, 8, 11, 12, 27, 28, 59, 61])
def test_row_of_another_length_does_not_open(size: int) -> None:
    """A cut or grown row is refused like a damaged one."""
    ring = keyring({})
    with pytest.raises(RefusedError, match="does not open"):
        ring.unwrap(1, 0, (ring.wrap(1, 0, bytes(KEY_BYTES)) + b"x")[:size])


def test_row_sealed_for_another_zone_says_so() -> None:
    """What was sent by a zone that alone can open it is refused by that name."""
    with pytest.raises(RefusedError, match="key 1 version 0 is sealed for the zone it comes from"):
        keyring({}).unwrap(1, 0, bytes(SEALED_BYTES))


@pytest.mark.parametrize("number", [(2, 1), (1, 2)])
def test_row_moved_to_another_number_does_not_open(number: tuple[int, int]) -> None:
    """A row only opens as the key id and version it was wrapped for."""
    ring = keyring({})
    with pytest.raises(RefusedError, match="does not open"):
        ring.unwrap(*number, ring.wrap(1, 1, bytes(KEY_BYTES)))


def test_another_master_key_does_not_open() -> None:
    """With another master key the error says so."""
    row = keyring({}).wrap(1, 0, bytes(KEY_BYTES))
    with pytest.raises(RefusedError, match="another master key"):
        keyring({}, b"x" * KEY_BYTES).unwrap(1, 0, row)


def test_no_master_key_is_said() -> None:
    """Without a master key, wrapping and opening are refused with what to do."""
    row = keyring({}).wrap(4, 2, bytes(KEY_BYTES))
    locked = r"key 4 version 2 is locked.*give the master key"
    with pytest.raises(RefusedError, match=locked):
        keyring({}, None).unwrap(4, 2, row)
    with pytest.raises(RefusedError, match=locked):
        keyring({}, None).wrap(4, 2, bytes(KEY_BYTES))


def test_missing_key_is_not_found() -> None:
    """A key without a row does not exist."""
    with pytest.raises(NotFoundError, match="key 3 version 1 does not exist"):
        keyring({}).frame_key(3, 1)


def test_destroyed_key_is_refused() -> None:
    """A key whose row was destroyed is told apart from one that never was."""
    with pytest.raises(RefusedError, match="key 3 version 1 was destroyed"):
        keyring({(3, 1): DESTROYED}).frame_key(3, 1)


def test_forgotten_key_is_looked_up_again() -> None:
    """After a key is destroyed and forgotten, memory does not open its frames either."""
    log = Log()
    log.keyring.frame_key(3, 1)
    log.rows[3, 1] = DESTROYED
    log.keyring.forget(3, 1)
    with pytest.raises(RefusedError, match="destroyed"):
        log.keyring.frame_key(3, 1)


def test_opened_keys_are_bounded() -> None:
    """The keyring remembers at most so many keys and drops the least recently used."""
    rows: dict[tuple[int, int], bytes] = {}
    asked: list[int] = []

    def row(key_id: int, version: int) -> bytes | None:
        asked.append(key_id)
        return rows.get((key_id, version))

    ring = Keyring(row, store_key=STORE_KEY, master_keys=(MASTER_KEY,), keys_max=2)
    for key_id in (1, 2, 3):
        rows[key_id, 0] = ring.wrap(key_id, 0, ring.new_data_key())
    for key_id in (1, 2, 1, 3, 1, 2):
        ring.frame_key(key_id, 0)
    assert asked == [1, 2, 3, 2]


def test_derived_keys_are_all_different() -> None:
    """No two uses of a data key, or of two data keys, share key bytes."""
    log = Log()
    log.add_key(3, 2)
    first, second = log.keyring.frame_key(3, 1), log.keyring.frame_key(3, 2)
    derived = [first.hash_key, first.xts_key[:32], first.xts_key[32:], second.hash_key, second.xts_key[:32]]
    derived += [log.keyring.hash_key(), log.keyring.hash_key("other")]
    assert len(set(derived)) == len(derived)


def test_convergent_keys_follow_content() -> None:
    """Frames with one hash get one key; another hash gets another."""
    key = Log().keyring.frame_key(3, 1)
    sealed = [key.convergent(h).encrypt(bytes(12), b"x", b"") for h in (b"a" * 16, b"a" * 16, b"b" * 16)]
    assert sealed[0] == sealed[1] != sealed[2]


def test_hash_key_is_the_same_in_every_process() -> None:
    """Hash keys depend on the store key and the tenant alone, or dedup would forget at each start."""
    assert keyring({}).hash_key("a").hex() == keyring({}, None).hash_key("a").hex()


@pytest.mark.parametrize("nonce", [b"", b"n" * 12])
def test_content_hash_is_keyed(nonce: bytes) -> None:
    """The hash depends on key, content and nonce, and has 128 bits."""
    base = content_hash(bytes(32), b"content", nonce)
    others = [content_hash(b"k" * 32, b"content", nonce), content_hash(bytes(32), b"c0ntent", nonce)]
    others += [content_hash(bytes(32), b"content", nonce + b"x")]
    assert len(base) == 16
    assert base not in others


@pytest.mark.parametrize("key_id, version", [(0, 0), (-1, 0), (2**32, 0), (1, 2**16), (1, -1)])
def test_number_the_record_cannot_hold_is_refused(key_id: int, version: int) -> None:
    """Key ids and versions outside the frame record's fields are a usage error."""
    with pytest.raises(UsageError):
        keyring({}).wrap(key_id, version, bytes(KEY_BYTES))


def test_key_of_another_length_is_refused() -> None:
    """Master, store and data keys have 32 bytes or are refused."""
    with pytest.raises(UsageError, match="data key has 32"):
        keyring({}).wrap(1, 0, bytes(31))
    with pytest.raises(UsageError, match="master key has 32"):
        keyring({}, b"short")
    with pytest.raises(UsageError, match="store key has 32"):
        Keyring(lambda _id, _version: None, store_key=b"")


def test_repr_shows_no_key() -> None:
    """Printing a keyring or a key never shows key bytes."""
    log = Log()
    shown = repr(log.keyring) + repr(log.keyring.frame_key(3, 1)) + repr(vars(log.writer).keys())
    assert MASTER_KEY.hex() not in shown
    assert repr(MASTER_KEY) not in shown


@pytest.mark.parametrize(
    "content", [MASTER_KEY, MASTER_KEY.hex().encode(), MASTER_KEY.hex().upper().encode() + b"\n"]
)
def test_master_key_file_is_raw_or_hexadecimal(tmp_path: Path, content: bytes) -> None:
    """Both spellings of a master key file give the same key."""
    path = tmp_path / "master.key"
    path.touch(mode=0o600)
    path.write_bytes(content)
    assert load_master_keys(path) == (MASTER_KEY,)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o777, 0o610])
def test_master_key_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    """A key file others could read is refused with the command that mends it."""
    path = tmp_path / "master.key"
    path.write_bytes(MASTER_KEY)
    path.chmod(mode)
    with pytest.raises(RefusedError, match="chmod 600"):
        load_master_keys(path)


@pytest.mark.parametrize(
    "content", [b"", b"x" * 31, b"x" * 33, b"zz" * 32, b"ab" * 31, b"ab" * 33, b"\xff" * 64]
)
def test_what_is_no_master_key_is_refused(content: bytes) -> None:
    """Anything but 32 bytes or 64 digits is a usage error."""
    with pytest.raises(UsageError, match="not a master key"):
        parse_master_keys(content)


def test_missing_or_unreadable_key_file_is_said(tmp_path: Path) -> None:
    """No file, or a directory in its place, gives a clear error."""
    with pytest.raises(NotFoundError, match="does not exist"):
        load_master_keys(tmp_path / "none")
    with pytest.raises(RefusedError):
        load_master_keys(tmp_path)


def test_generated_master_key_is_random() -> None:
    """Two generated keys differ and have 32 bytes."""
    assert len(generate_master_key()) == KEY_BYTES
    assert generate_master_key() != generate_master_key()

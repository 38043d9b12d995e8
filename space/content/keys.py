"""Keys: one master key wraps data keys, a data key opens the frames of one encryption domain.

::

    master keys (a file of the operator, never stored; more than one while it is changed)
      └─ wrap   data key (key id, version): row of 60 or 68 bytes in the state
           ├─ frame keys   AES-256-GCM, XTS-AES-256; one per content hash for shared frames
           └─ hash key     content hashes of its frames
    store key (in the store, made with it)
      └─ hash key per tenant: content hashes of frames that are not encrypted

A wrapped row is ``nonce (12) | AES-256-GCM(data key) (32) | tag (16)`` with ``key id u32 | version u16``
(little-endian) as associated data, so a row moved to another number does not open.  Once a store's master key
has been changed, ``fingerprint u64`` of the master key that wraps follows it.  Every other key is
derived with the BLAKE3 key derivation mode under its own context string.

Everything a frame reveals without its data key, its hash included, is keyed by that data key: when the row
is destroyed (crypto-shredding), no guess about the content can be confirmed any more.
"""

from __future__ import annotations

import os
import stat
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final, final

from blake3 import blake3

from space._errors import NotFoundError, RefusedError, Status, UsageError
from space.content.frames import HASH_BYTES, Buffer

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

RandomBytes = Callable[[int], bytes]

KEY_BYTES: Final = 32
NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16
WRAPPED_BYTES: Final = NONCE_BYTES + KEY_BYTES + TAG_BYTES
FINGERPRINT: Final = struct.Struct("<Q")
TAGGED_BYTES: Final = WRAPPED_BYTES + FINGERPRINT.size
"""A row that names the master key it is wrapped by: all rows are such from the first change of the master key on."""

SEALED_BYTES: Final = 1 + 32 + KEY_BYTES + TAG_BYTES
"""A row as another zone sent it, sealed for itself (docs/formats/shipment.md): kept, and not to be opened here."""

DESTROYED: Final = b""
"""The row of a key that was destroyed: it never comes back, unlike one that is missing."""

KEY_ID_MAX: Final = 0xFFFF_FFFF
KEY_VERSION_MAX: Final = 0xFFFF
_ROW_CONTEXT: Final = struct.Struct("<IH")
MASTER_KEYS_MAX: Final = 16
"""Keys in one file: one is used, one may be on its way, the others belong to stores that share the file."""

_MASTER_FILE_BYTES_MAX: Final = MASTER_KEYS_MAX * (2 * KEY_BYTES + 2)  # hexadecimal and a line end


def generate_master_key(random_bytes: RandomBytes = os.urandom) -> bytes:
    """A new master key of 32 random bytes."""
    return random_bytes(KEY_BYTES)


def master_fingerprint(master_key: bytes) -> int:
    """What a master key is called: 63 bits derived from it, never 0, which say nothing of it."""
    derived = blake3(master_key, derive_key_context="space master key fingerprint v1").digest(
        FINGERPRINT.size
    )
    return int(FINGERPRINT.unpack(derived)[0]) >> 1 or 1


def load_master_keys(path: str | Path) -> tuple[bytes, ...]:
    """The master keys in the file at ``path``: 32 raw bytes, or lines of 64 hexadecimal digits, oldest first.

    Raises:
        NotFoundError: no such file.
        RefusedError: others than the owner may read it, or it cannot be read.
        UsageError: the content is no master key.
    """
    try:
        with Path(path).open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(_MASTER_FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        raise NotFoundError(f"master key file {path} does not exist") from None
    except OSError as error:
        raise RefusedError(
            f"master key file {path}: {error.strerror or error}", status=Status.NOT_PERMITTED
        ) from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise RefusedError(
            f"master key file {path} is open to others (mode {stat.S_IMODE(mode):04o})",
            hint=f"chmod 600 {path}",
            status=Status.NOT_PERMITTED,
        )
    return parse_master_keys(content, source=f"master key file {path}")


def parse_master_keys(content: bytes, *, source: str = "master key") -> tuple[bytes, ...]:
    """The master keys ``content`` spells: 32 raw bytes, or lines of 64 hexadecimal digits.

    Raises:
        UsageError: it is neither, or there are too many.
    """
    if len(content) == KEY_BYTES:
        return (content,)
    keys = tuple(_hexadecimal(line) for line in content.splitlines())
    if not 0 < len(keys) <= MASTER_KEYS_MAX or any(len(key) != KEY_BYTES for key in keys):
        raise UsageError(
            f"{source}: not a master key",
            hint=f"32 raw bytes, or 1 to {MASTER_KEYS_MAX} lines of 64 hexadecimal digits",
        )
    return tuple(dict.fromkeys(keys))


def _hexadecimal(line: bytes) -> bytes:
    try:
        return bytes.fromhex(line.decode("ascii"))
    except ValueError:
        return b""


def content_hash(key: bytes, data: Buffer, nonce: bytes = b"") -> bytes:
    """First 128 bits of the BLAKE3 of ``data`` and then ``nonce``, keyed with ``key`` (32 bytes)."""
    hasher = blake3(data, key=key)
    if nonce:
        hasher.update(nonce)
    return hasher.digest(HASH_BYTES)


@final
class FrameKey:
    """What the frames of one data key are opened with; thread-safe, and never shown by ``repr``."""

    def __init__(self, key_id: int, version: int, data_key: bytes) -> None:
        self.key_id: Final = key_id
        self.version: Final = version
        self._data_key: Final = data_key
        self.hash_key: Final = _derive(data_key, "space frame hash key v1")

    @cached_property
    def gcm(self) -> AESGCM:
        """AES-256-GCM for frames that are not shared."""
        return _aes_gcm(_derive(self._data_key, "space frame gcm key v1"))

    @cached_property
    def xts_key(self) -> bytes:
        """The 64 bytes XTS-AES-256 needs."""
        return _derive(self._data_key, "space frame xts key v1", 64)

    def convergent(self, frame_hash: bytes) -> AESGCM:
        """AES-256-GCM for the shared frame with this content hash: the same content, the same key."""
        return _aes_gcm(_derive(self._data_key + frame_hash, "space convergent frame key v1"))


@final
class Keyring:
    """Master keys, and the data keys they open; thread-safe.

    Args:
        rows: the wrapped row of (key id, version); None: there is none; :data:`DESTROYED`: destroyed.
        store_key: 32 bytes kept by the store; hashes of content that is not encrypted are keyed by it.
        master_keys: 32 bytes each, oldest first; none: encrypted content can be neither read nor written.
        current: fingerprint of the master key that wraps by now; 0: the first one does, which was never changed.
        random_bytes: source of data keys and nonces.
        keys_max: how many opened data keys are remembered.
    """

    def __init__(
        self,
        rows: Callable[[int, int], bytes | None],
        *,
        store_key: bytes,
        master_keys: Sequence[bytes] = (),
        current: Callable[[], int] = lambda: 0,
        random_bytes: RandomBytes = os.urandom,
        keys_max: int = 1024,
    ) -> None:
        for what, key in (("store key", store_key), *(("master key", each) for each in master_keys)):
            if len(key) != KEY_BYTES:
                raise UsageError(f"a {what} has {KEY_BYTES} bytes, not {len(key)}")
        self._rows = rows
        self._store_key = store_key
        self._master_keys = {master_fingerprint(key): key for key in master_keys}
        self._current = current
        self._random_bytes = random_bytes
        self._keys_max = keys_max
        self._opened: OrderedDict[tuple[int, int], FrameKey] = OrderedDict()
        self._lock = threading.Lock()

    def new_data_key(self) -> bytes:
        """32 random bytes, to be wrapped and recorded."""
        return self._random_bytes(KEY_BYTES)

    @property
    def masters(self) -> tuple[int, ...]:
        """Fingerprints of the master keys there are, oldest first."""
        return tuple(self._master_keys)

    def use(self, master_keys: Sequence[bytes]) -> None:
        """Has these master keys from now on, oldest first."""
        self._master_keys = {master_fingerprint(key): key for key in master_keys}

    def wrap(self, key_id: int, version: int, data_key: bytes, *, master: int | None = None) -> bytes:
        """The row that holds ``data_key`` as (key_id, version), by the current master key, or by ``master``.

        Raises:
            UsageError: a number out of range (ids start at 1), or not a 32-byte key.
            RefusedError: the master key is not there.
        """
        if not 1 <= key_id <= KEY_ID_MAX or not 0 <= version <= KEY_VERSION_MAX:
            raise UsageError(f"{_name(key_id, version)}: ids are 1 to 2^32-1, versions 0 to 2^16-1")
        if len(data_key) != KEY_BYTES:
            raise UsageError(f"a data key has {KEY_BYTES} bytes, not {len(data_key)}")
        current = self._current() if master is None else master
        keys = self._master_keys
        key = keys.get(current) if current else next(iter(keys.values()), None)
        if key is None:
            raise _locked(key_id, version, current)
        nonce = self._random_bytes(NONCE_BYTES)
        row = nonce + _aes_gcm(key).encrypt(nonce, data_key, _ROW_CONTEXT.pack(key_id, version))
        return row + FINGERPRINT.pack(current) if current else row

    def unwrap(self, key_id: int, version: int, row: bytes) -> bytes:
        """The data key in ``row``.

        Raises:
            RefusedError: destroyed, no master key, or the row does not open with it.
        """
        name = _name(key_id, version)
        if row == DESTROYED:
            raise RefusedError(
                f"{name} was destroyed: content under it cannot be read any more", status=Status.NOT_PERMITTED
            )
        if len(row) == SEALED_BYTES:
            raise RefusedError(
                f"{name} is sealed for the zone it comes from: content under it is kept here, and can be read there",
                status=Status.NOT_PERMITTED,
            )
        opened = self._opened_by(key_id, version, row)
        if opened is None:
            raise RefusedError(
                f"{name} does not open: it was wrapped by another master key, or its row is damaged",
                status=Status.NOT_PERMITTED,
            )
        return opened[1]

    def wrapped_by(self, key_id: int, version: int, row: bytes) -> int:
        """Fingerprint of the master key that opens ``row``; 0 if none here does."""
        try:
            opened = self._opened_by(key_id, version, row)
        except RefusedError:
            return 0
        return 0 if opened is None else opened[0]

    def _opened_by(self, key_id: int, version: int, row: bytes) -> tuple[int, bytes] | None:
        """The master key that opens a row, and the data key in it.

        Raises:
            RefusedError: there is no master key that could.
        """
        from cryptography.exceptions import InvalidTag

        keys, tag = self._master_keys, row_master(row)
        candidates = [(each, key) for each, key in keys.items() if not tag or each == tag]
        if not candidates:
            raise _locked(key_id, version, tag)
        for each, key in candidates:
            try:
                body = row[NONCE_BYTES:WRAPPED_BYTES] if tag else row[NONCE_BYTES:]
                return each, _aes_gcm(key).decrypt(
                    row[:NONCE_BYTES], body, _ROW_CONTEXT.pack(key_id, version)
                )
            except (InvalidTag, ValueError):  # ValueError: too short for a nonce
                continue
        return None

    def frame_key(self, key_id: int, version: int) -> FrameKey:
        """What opens the frames of (key_id, version).

        Raises:
            NotFoundError: there is no such key.
            RefusedError: see :meth:`unwrap`.
        """
        number = (key_id, version)
        with self._lock:
            if opened := self._opened.get(number):
                self._opened.move_to_end(number)
                return opened
        row = self._rows(key_id, version)
        if row is None:
            raise NotFoundError(f"{_name(key_id, version)} does not exist")
        opened = FrameKey(key_id, version, self.unwrap(key_id, version, row))
        with self._lock:
            self._opened[number] = opened
            if len(self._opened) > self._keys_max:
                self._opened.popitem(last=False)
        return opened

    def forget(self, key_id: int, version: int) -> None:
        """Drop the opened key from memory; to be called once its row is destroyed or replaced."""
        with self._lock:
            self._opened.pop((key_id, version), None)

    def forget_all(self) -> None:
        """Drop every opened key from memory."""
        with self._lock:
            self._opened.clear()

    def hash_key(self, tenant: str = "") -> bytes:
        """32 bytes that key the content hashes of a tenant's plain frames: tenants share nothing."""
        return _derive(self._store_key + tenant.encode(), "space tenant hash key v1")


def row_master(row: bytes) -> int:
    """Fingerprint of the master key a row says it is wrapped by; 0 if it does not say."""
    return int(FINGERPRINT.unpack_from(row, WRAPPED_BYTES)[0]) if len(row) == TAGGED_BYTES else 0


def master_name(fingerprint: int) -> str:
    """A fingerprint as users see it."""
    return f"{fingerprint:016x}"


def _locked(key_id: int, version: int, master: int) -> RefusedError:
    if master:
        return RefusedError(
            f"{_name(key_id, version)} is locked: master key {master_name(master)} is missing here",
            hint="add it to the master key file, as a line",
            status=Status.NOT_PERMITTED,
        )
    return RefusedError(
        f"{_name(key_id, version)} is locked: no master key was given",
        hint="give the master key the store was created with",
        status=Status.NOT_PERMITTED,
    )


def _aes_gcm(key: bytes) -> AESGCM:
    # Imported on first use: cryptography takes longer to load than most commands take to run.
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(key)


def _derive(material: bytes, context: str, length: int = KEY_BYTES) -> bytes:
    return blake3(material, derive_key_context=context).digest(length)


def _name(key_id: int, version: int) -> str:
    return f"key {key_id} version {version}"

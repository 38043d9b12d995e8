"""What becomes of a put, by how much it brings."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import space
from space._errors import ConflictError, StorageError
from space._node.store import Store
from space.events.types import EXTENT_BYTES_MAX
from space.policy.model import Compression, Encryption, Policy

pytestmark = pytest.mark.unit


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A store with one file, ``/there``."""
    with space.open(tmp_path / "store") as found:
        found.put(b"there", name="/there")
        yield found


@pytest.mark.parametrize("size", [0, 1, 5000, EXTENT_BYTES_MAX - 1])
def test_what_is_less_than_an_extent_is_one_position(store: Store, size: int) -> None:
    """It is made, written and named at once: no moment shows half of it."""
    content, before, told = os.urandom(size), store.position, list[int]()
    put = store.put(io.BytesIO(content), name="/small", on_progress=told.append)
    assert store.position == put.position == before + 1
    assert (store.get("/small"), put.size, told) == (content, size, [size] if size else [])


@pytest.mark.parametrize("size", [EXTENT_BYTES_MAX, EXTENT_BYTES_MAX + 1])
def test_what_is_more_is_named_at_its_end(store: Store, size: int) -> None:
    """Its name comes after its content."""
    content, before = os.urandom(size), store.position
    put = store.put(content, name="/large", policy=Policy(compression=Compression.NONE))
    assert put.position > before + 2
    assert store.get("/large") == content


def test_another_capsule_with_that_id_stays_as_it_is(store: Store) -> None:
    """A put under an id that is taken changes neither that capsule nor the tree."""
    there = store.resolve("/there")
    with pytest.raises(ConflictError):
        store.put(b"other", id=there, name="/other")
    assert store.get(there) == b"there"
    assert [each.name for each in store.ls("/")] == [b"there"]


def test_nothing_is_left_where_the_source_cannot_be_read(store: Store) -> None:
    """A small put whose source fails leaves no trace in the log."""

    class Failing(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def read(self, size: int = -1) -> bytes:
            raise OSError("gone")

    before = store.position
    with pytest.raises(StorageError):
        store.put(Failing(), name="/none")  # type: ignore[arg-type]
    assert store.position == before


def test_content_that_is_encrypted_is_put_as_well(store: Store) -> None:
    """Its key is made before it is written."""
    store.put(b"secret", name="/secret", policy=Policy(encryption=Encryption.AES_256_GCM))
    assert store.get("/secret") == b"secret"

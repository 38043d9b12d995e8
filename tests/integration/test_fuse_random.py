from __future__ import annotations

import mmap
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuse_support import NEEDS_FUSE, Mount, opened

pytestmark = NEEDS_FUSE

SIZE_MAX = 400_000
STEPS = 1500


class Exerciser:
    """One file under random operations through several descriptors, and the bytes it has to have.

    As fsx of the Linux test projects does: it finds what caches of kernel and mount, held-back writes, truncation
    and mappings do to each other.
    """

    def __init__(self, path: Path, seed: int) -> None:
        self.path = path
        self.random = random.Random(seed)
        self.expected = bytearray()
        path.touch()
        self.descriptors = [os.open(path, os.O_RDWR) for _ in range(3)]

    def step(self) -> None:
        action = self.random.choice(
            [self.write, self.write, self.go_on, self.read, self.read, self.cut, self.map]
        )
        action(self.random.choice(self.descriptors))
        if self.random.random() < 0.05:
            self.reopen()
        if self.random.random() < 0.02:
            os.fsync(self.descriptors[0])

    def place(self) -> tuple[int, int]:
        offset = self.random.randrange(SIZE_MAX)
        return offset, self.random.randrange(
            1, min(self.random.choice([50, 5000, 150_000]), SIZE_MAX - offset + 2)
        )

    def put(self, descriptor: int, offset: int, data: bytes) -> None:
        assert os.pwrite(descriptor, data, offset) == len(data)
        self.expected.extend(bytes(max(0, offset - len(self.expected))))
        self.expected[offset : offset + len(data)] = data

    def write(self, descriptor: int) -> None:
        offset, length = self.place()
        self.put(descriptor, offset, self.random.randbytes(length))

    def go_on(self, descriptor: int) -> None:
        offset, _ = self.place()
        for _ in range(self.random.randrange(2, 9)):
            data = self.random.randbytes(self.random.randrange(1, 9000))
            self.put(descriptor, offset, data)
            offset += len(data)

    def read(self, descriptor: int) -> None:
        offset, length = self.place()
        assert os.pread(descriptor, length, offset) == self.expected[offset : offset + length]
        assert os.fstat(descriptor).st_size == len(self.expected)

    def cut(self, descriptor: int) -> None:
        size, _ = self.place()
        os.ftruncate(descriptor, size)
        del self.expected[size:]
        self.expected.extend(bytes(size - len(self.expected)))

    def map(self, descriptor: int) -> None:
        if not self.expected:
            return
        with mmap.mmap(descriptor, len(self.expected)) as view:
            offset = self.random.randrange(len(self.expected))
            assert view[offset : offset + 5000] == self.expected[offset : offset + 5000]
            data = self.random.randbytes(min(3000, len(self.expected) - offset))
            view[offset : offset + len(data)] = data
            self.expected[offset : offset + len(data)] = data

    def reopen(self) -> None:
        os.close(self.descriptors.pop(0))
        self.descriptors.append(os.open(self.path, os.O_RDWR))

    def close(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """A writable mount of a new store."""
    with Mount(tmp_path / "data", tmp_path / "mnt") as mounted:
        yield mounted


@pytest.mark.parametrize("seed", range(3))
def test_random_operations(mount: Mount, seed: int) -> None:
    """After every one of many random operations a file reads as it should, and so it does from the store."""
    exerciser = Exerciser(mount.target / "f", seed)
    try:
        for _ in range(STEPS):
            exerciser.step()
    finally:
        exerciser.close()
    assert (mount.target / "f").read_bytes() == exerciser.expected
    mount.stop()
    with opened(mount.data) as store:
        assert store.read(store.resolve("/f")) == exerciser.expected

"""One file under random operations through several descriptors, as fsx of the Linux test projects does it.

Arguments: file, seed, seconds, and the words of what is wanted beside reading, writing, cutting and mapping: ``holes``
(allocate, punch, seek), ``copy`` (copy_file_range and clones).  What the file has to hold is kept in memory; after
every step it must be that.
"""
# ruff: noqa: T201  a program, and its output is read

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import random
import struct
import sys
import time

SIZE_MAX = 300_000
LENGTHS = (50, 5000, 100_000)
PUNCH, KEEP_SIZE = 2, 1
FICLONERANGE = 0x4020940D
BLOCK = 4096
UNDER = "/tmp/under"
"""As long as it is there the job's test has something in mind that must happen under the load."""

_libc = ctypes.CDLL(None, use_errno=True)


class Exerciser:
    """The file, and the bytes it has to have."""

    def __init__(self, path: str, seed: int, wanted: list[str]) -> None:
        self.path = path
        self.random = random.Random(seed)
        self.expected = bytearray()
        self.descriptors = [os.open(path, os.O_RDWR | os.O_CREAT) for _ in range(3)]
        self.actions = [self.write, self.write, self.read, self.read, self.cut, self.map]
        self.actions += [self.allocate, self.punch, self.seek] if "holes" in wanted else []
        self.actions += [self.copy, self.clone] if "copy" in wanted else []

    def step(self) -> None:
        """One operation, and now and then another descriptor or an fsync."""
        self.random.choice(self.actions)(self.random.choice(self.descriptors))
        chance = self.random.random()
        if chance < 0.05:
            os.close(self.descriptors.pop(0))
            self.descriptors.append(os.open(self.path, os.O_RDWR))
        elif chance < 0.1:
            os.fsync(self.descriptors[0])
        size = os.fstat(self.descriptors[0]).st_size
        assert size == len(self.expected), f"{size} bytes instead of {len(self.expected)}"

    def place(self) -> tuple[int, int]:
        """An offset and a length, mostly small."""
        offset = self.random.randrange(SIZE_MAX)
        return offset, self.random.randrange(1, min(self.random.choice(LENGTHS), SIZE_MAX - offset + 2))

    def put(self, offset: int, data: bytes) -> None:
        """What the file holds from now on."""
        self.expected.extend(bytes(max(0, offset - len(self.expected))))
        self.expected[offset : offset + len(data)] = data

    def write(self, descriptor: int) -> None:
        """Bytes anywhere."""
        offset, length = self.place()
        data = self.random.randbytes(length)
        assert os.pwrite(descriptor, data, offset) == length
        self.put(offset, data)

    def read(self, descriptor: int) -> None:
        """Bytes from anywhere, once in a while from the server instead of the cache."""
        offset, length = self.place()
        if self.random.random() < 0.3:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        found = os.pread(descriptor, length, offset)
        assert found == self.expected[offset : offset + length], f"wrong bytes at {offset}, {length} of them"

    def cut(self, descriptor: int) -> None:
        """A new size."""
        size, _ = self.place()
        os.ftruncate(descriptor, size)
        del self.expected[size:]
        self.expected.extend(bytes(size - len(self.expected)))

    def map(self, descriptor: int) -> None:
        """Bytes through a mapping."""
        if not self.expected:
            return
        with mmap.mmap(descriptor, len(self.expected)) as view:
            offset = self.random.randrange(len(self.expected))
            assert view[offset : offset + 5000] == self.expected[offset : offset + 5000]
            data = self.random.randbytes(min(3000, len(self.expected) - offset))
            view[offset : offset + len(data)] = data
            self.put(offset, data)

    def allocate(self, descriptor: int) -> None:
        """Room, which reads as zeros where nothing was."""
        offset, length = self.place()
        os.posix_fallocate(descriptor, offset, length)
        self.expected.extend(bytes(max(0, offset + length - len(self.expected))))

    def punch(self, descriptor: int) -> None:
        """A hole; the size stays."""
        offset, length = self.place()
        arguments = (ctypes.c_int(descriptor), ctypes.c_int(PUNCH | KEEP_SIZE))
        if _libc.fallocate(*arguments, ctypes.c_long(offset), ctypes.c_long(length)):
            raise OSError(ctypes.get_errno(), "punch")
        end = min(offset + length, len(self.expected))
        self.expected[offset:end] = bytes(max(0, end - offset))

    def seek(self, descriptor: int) -> None:
        """Between the beginning of a hole and the next data there is nothing but zeros."""
        if not self.expected:
            return
        hole = os.lseek(descriptor, self.random.randrange(len(self.expected)), os.SEEK_HOLE)
        try:
            data = os.lseek(descriptor, hole, os.SEEK_DATA)
        except OSError:  # no data after it
            data = len(self.expected)
        assert not any(self.expected[hole:data]), f"bytes between {hole} and {data}, called a hole"

    def copy(self, descriptor: int) -> None:
        """A range of the file to another place in it."""
        length = self.random.randrange(1, 50_000)
        if len(self.expected) <= length:
            return
        source = self.random.randrange(len(self.expected) - length)
        target = self.random.randrange(SIZE_MAX)
        if abs(source - target) < length:
            return
        done = os.copy_file_range(descriptor, descriptor, length, source, target)
        self.put(target, bytes(self.expected[source : source + done]))

    def clone(self, descriptor: int) -> None:
        """The same, as a clone of whole blocks."""
        length = self.random.randrange(1, 12) * BLOCK
        if len(self.expected) <= length:
            return
        source = self.random.randrange((len(self.expected) - length) // BLOCK + 1) * BLOCK
        target = self.random.randrange(SIZE_MAX // BLOCK) * BLOCK
        if abs(source - target) < length:
            return
        fcntl.ioctl(descriptor, FICLONERANGE, struct.pack("qQQQ", descriptor, source, length, target))
        self.put(target, bytes(self.expected[source : source + length]))

    def close(self) -> None:
        """Lets go of the file."""
        for descriptor in self.descriptors:
            os.close(descriptor)


def main() -> None:
    """Steps until the time is over; then the file must hold what it should, also once nothing is cached."""
    path, seed, seconds, *wanted = sys.argv[1:]
    exerciser = Exerciser(path, int(seed), wanted)
    end = time.monotonic() + float(seconds)
    steps = 0
    while time.monotonic() < end or os.path.exists(UNDER):
        try:
            exerciser.step()
        except Exception:
            print(f"step {steps} of seed {seed}", flush=True)
            raise
        steps += 1
    exerciser.close()
    with open("/proc/sys/vm/drop_caches", "w") as caches:
        caches.write("3")
    with open(path, "rb") as file:
        assert file.read() == exerciser.expected, "wrong bytes in the end"
    print(f"steps={steps}")


if __name__ == "__main__":
    main()

"""A small store that has seen everything, what it must still hold, and how to look at all of it."""

from __future__ import annotations

import atexit
import functools
import itertools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import attrs
from blake3 import blake3

import space
from space._node.maintenance import LogEvent
from space._node.reading import Reading
from space._node.store import Store
from space.events import commands as cmd
from space.events.types import Kind
from space.policy.model import Policy

SEGMENT_BYTES: Final = 48 << 10
PLAIN: Final = Policy.from_document({"compression": "none", "dedupe": False})
PACKED: Final = Policy.from_document({"compression": "lz4"})
FORGETFUL: Final = Policy.from_document({"compression": "none", "history": "none"})
VARIANTS: Final = ("closed", "killed", "checkpointed", "checkpointed-killed")


def texture(length: int, seed: int = 0) -> bytes:
    """``length`` bytes that no codec can make smaller."""
    return blake3(seed.to_bytes(8, "little")).digest(length)


def steady_clock() -> Callable[[], int]:
    """A clock that ticks a second a look, the same in every run."""
    ticks = itertools.count(1_700_000_000)
    return lambda: next(ticks) * 10**9


def steady_bytes() -> Callable[[int], bytes]:
    """Bytes that look random and are the same in every run."""
    numbers = itertools.count()
    return lambda count: blake3(b"drawn %d" % next(numbers)).digest(count)


def open_store(path: Path) -> Store:
    """The store in small segments."""
    return space.open(path, segment_bytes=SEGMENT_BYTES)


@attrs.frozen
class View:
    """All that can be read of a store at one moment."""

    position: int
    digest: str
    files: dict[bytes, tuple[object, ...]]


def look(reading: Reading) -> View:
    """Every name, attribute and byte of a reading."""
    files: dict[bytes, tuple[object, ...]] = {}
    for path, stat in reading.walk(reading.root):
        content = reading.read(stat.id) if stat.kind == Kind.FILE else stat.target
        xattrs = tuple(sorted(reading.xattrs(stat.id).items()))
        files[path] = (stat.id, stat.kind, stat.mode, stat.nlink, stat.size, stat.mtime, xattrs, content)
    return View(*reading.digest(), files)


@attrs.frozen
class Template:
    """A data directory to be copied and damaged, and what was acknowledged as durable in it."""

    path: Path
    present: View
    past: dict[int, View]
    log: list[LogEvent]

    def copy(self, target: Path) -> Path:
        """A copy of it."""
        shutil.copytree(self.path, target)
        return target


def busy(store: Store) -> list[int]:
    """A history with one of everything; returns moments worth remembering."""
    moments = []
    store.put(texture(9000), name="/raw", policy=PLAIN)
    store.put(b"the quick brown fox " * 700, name="/packed", policy=PACKED)
    store.put(b"", name="/empty")
    store.mkdir("/d/e", parents=True)
    store.put(b"small", name="/d/small")
    moments.append(store.position)
    raw = store.resolve("/raw")
    store.execute(cmd.Link(raw, store.resolve("/d"), b"hard"))
    store.execute(cmd.SetXattr(raw, b"user.x", b"value"))
    store.create(Kind.SYMLINK, parent=store.root, name=b"link", target=b"d/small")
    store.write(raw, 4000, texture(3000, 1))
    store.snapshot("/", "before")
    store.clone("/d", "/copy")
    moments.append(store.position)
    store.write(store.resolve("/copy/small"), 2, b"changed")
    store.put(texture(70_000, 2), name="/big", policy=PLAIN)
    store.resize("/packed", 5000)
    store.execute(cmd.Deallocate(raw, 0, 4096))
    store.put(texture(20_000, 3), name="/gone", policy=FORGETFUL)
    store.rm("/gone")
    store.gc()
    moments.append(store.position)
    store.mv("/d/e", "/e2")
    store.rm("/empty")
    return moments


@functools.cache
def template(variant: str) -> Template:
    """The template of a variant: closed in order or as kill -9 leaves it, with or without a checkpoint."""
    directory = Path(tempfile.mkdtemp(prefix=f"space-{variant}-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    home, work = directory / "store", directory / "work"
    store = space.open(
        work, segment_bytes=SEGMENT_BYTES, clock=steady_clock(), random_bytes=steady_bytes(), actor="test"
    )
    moments = busy(store)
    if variant.startswith("checkpointed"):
        store.checkpoint()
    store.put(texture(6000, 4), name="/last", policy=PLAIN)
    present = look(store)
    past = {}
    for moment in moments:
        with store.at(f"@{moment}") as reading:
            past[moment] = look(reading)
    log = list(store.log())
    if variant.endswith("killed"):
        shutil.copytree(work, home)  # nothing is under way: these are the bytes a kill would leave
        store.close()
    else:
        store.close()
        shutil.copytree(work, home)
    return Template(home, present, past, log)


def files_of(path: Path) -> list[str]:
    """Every file below a directory, relative to it."""
    return sorted(str(found.relative_to(path)) for found in path.rglob("*") if found.is_file())

"""What this machine can do for a store, and what to do about what it cannot.

Everything is tried, nothing assumed: a file is written and synced, a hole is punched.
"""

from __future__ import annotations

import ctypes
import errno
import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import attrs

from space._errors import SpaceError
from space._node.caller import Document
from space.policy.units import format_size

LIBRARIES: Final = (
    "attrs",
    "blake3",
    "brotli",
    "crc32c",
    "cryptography",
    "lmdb",
    "lz4",
    "msgpack",
    "pyyaml",
    "typer",
    "zstandard",
)
PYTHON_MIN: Final = (3, 11)
SYNCS: Final = 16
FREE_BYTES_MIN: Final = 64 << 20
FILES_MIN: Final = 256
ENGINE_HINT: Final = (
    "a cluster needs it: tools/setup in a checkout, or pip install ./raft-engine (needs Rust)"
)
FUSE_PACKAGES: Final = "apt install fuse3 libfuse3-dev pkg-config gcc python3-dev"

_KEEP_SIZE: Final = 1  # linux/falloc.h
_PUNCH_HOLE: Final = 2


@attrs.frozen
class Check:
    """One thing looked at; ``needed``: without it a single node does not work."""

    name: str
    ok: bool
    value: str
    needed: bool = True
    hint: str = ""


def examine(data: Path) -> list[Document]:
    """All checks, those of the disk on the one that holds (or would hold) ``data``."""
    directory = _nearest(data)
    checks = [_python(), _kernel(), *map(_library, LIBRARIES), _data(data, directory), *_disk(directory)]
    checks += [_file_limit(), _device(), _program("fusermount3", FUSE_PACKAGES), _pyfuse3()]
    checks += [
        _extra("space-raft-engine", ENGINE_HINT),
        _extra("aiohttp", "pip install 'space-store[cluster]'"),
    ]
    checks += _certificate(data)
    return [attrs.asdict(check) for check in checks]


def _python() -> Check:
    value = f"{platform.python_version()} {sys.executable}"
    return Check("python", sys.version_info[:2] >= PYTHON_MIN, value, hint="Python 3.11 or later")


def _kernel() -> Check:
    name = f"{platform.system()} {platform.release()} {platform.machine()}"
    return Check("kernel", platform.system() == "Linux", name, hint="a store needs Linux")


def _library(name: str) -> Check:
    try:
        return Check(name, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check(name, False, "not installed", hint=f"pip install {name}")


def _nearest(data: Path) -> Path:
    """The directory itself, or the closest one above it that exists."""
    path = data.absolute()
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def _data(data: Path, directory: Path) -> Check:
    usage = shutil.disk_usage(directory)
    value = f"{data}: {_file_system(directory)}, {format_size(usage.free)} free of {format_size(usage.total)}"
    if not os.access(directory, os.W_OK):
        return Check(
            "data", False, f"{value}, not writable", hint=f"make {directory} writable, or use --data"
        )
    return Check("data", usage.free >= FREE_BYTES_MIN, value, hint="free some space")


def _file_system(directory: Path) -> str:
    """Type of the file system a directory is on: its longest mount point's (proc(5), mountinfo)."""
    best, kind = "", "unknown"
    with Path("/proc/self/mountinfo").open(errors="surrogateescape") as lines:
        for line in lines:
            fields, _, rest = line.partition(" - ")
            point = fields.split(" ")[4]
            if directory.is_relative_to(point) and len(point) >= len(best):
                best, kind = point, rest.split(" ")[0]
    return kind


def _disk(directory: Path) -> list[Check]:
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            return [_sync(file.fileno()), _holes(file.fileno())]
    except OSError as error:
        return [Check("fdatasync", False, error.strerror or str(error), hint=f"{directory} must be writable")]


def _sync(descriptor: int) -> Check:
    times = []
    for _ in range(SYNCS):
        os.write(descriptor, bytes(4096))
        started = time.perf_counter()
        os.fdatasync(descriptor)
        times.append((time.perf_counter() - started) * 1000)
    return Check(
        "fdatasync", True, f"{statistics.median(times):.2f} ms; slowest of {SYNCS}: {max(times):.2f} ms"
    )


def _holes(descriptor: int) -> Check:
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (ctypes.c_int(_KEEP_SIZE | _PUNCH_HOLE), ctypes.c_int64(0), ctypes.c_int64(4096))
    if libc.fallocate(ctypes.c_int(descriptor), *arguments) == 0:
        return Check("hole punching", True, "works", needed=False)
    reason = errno.errorcode.get(ctypes.get_errno(), "fails")
    return Check("hole punching", False, reason, needed=False, hint="space gc gives nothing back here")


def _file_limit() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Check("open files", soft >= FILES_MIN, f"{soft}, at most {hard}", hint=f"ulimit -n {FILES_MIN}")


def _device() -> Check:
    usable = os.access("/dev/fuse", os.R_OK | os.W_OK)
    hint = "modprobe fuse; in a container: --device /dev/fuse --cap-add SYS_ADMIN"
    return Check("/dev/fuse", usable, "usable" if usable else "not usable", needed=False, hint=hint)


def _program(name: str, hint: str) -> Check:
    path = shutil.which(name)
    if path is None:
        return Check(name, False, "not found", needed=False, hint=hint)
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return Check(name, done.returncode == 0, f"{path} {done.stdout.strip()}", needed=False, hint=hint)


def _pyfuse3() -> Check:
    hint = f"{FUSE_PACKAGES}; pip install 'space-store[fuse]'"
    if importlib.util.find_spec("pyfuse3") is None:
        return Check("pyfuse3", False, "not installed", needed=False, hint=hint)
    try:
        importlib.import_module("pyfuse3")
    except ImportError as error:
        return Check("pyfuse3", False, str(error), needed=False, hint=hint)
    return Check("pyfuse3", True, importlib.metadata.version("pyfuse3"), needed=False)


def _extra(name: str, hint: str) -> Check:
    """A package that only clusters need."""
    try:
        return Check(name, True, importlib.metadata.version(name), needed=False)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, False, "not installed", needed=False, hint=hint)


def _certificate(data: Path) -> list[Check]:
    """The certificate of the node whose directory this is; nothing for a store that is none."""
    directory = data / "tls"
    if not directory.is_dir():
        return []
    from space.replication.certificates import WARNING_DAYS, Tls, days_left

    hint = "space cluster invite N --out DIR makes a new one"
    try:
        found = Tls.load(directory)
    except SpaceError as error:
        return [Check("certificate", False, str(error), needed=False, hint=hint)]
    days = days_left(found.expires, now=datetime.now(UTC))
    value = f"{found.identity}, {days} days left"
    return [Check("certificate", days >= WARNING_DAYS, value, needed=False, hint=hint)]

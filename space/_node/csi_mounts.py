"""The kernel's part of showing volumes: what is mounted where, bind mounts, loop devices.  No policy.

A bind mount is made whole before it is put in its place (open_tree(2), mount_setattr(2), move_mount(2); Linux 5.12):
at no moment does a read-only one let anybody write.  What is mounted is read from ``mountinfo``, because a bind mount
within one file system cannot be told by device numbers, which is what ``os.path.ismount`` compares.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import attrs

from space._errors import StorageError, UnavailableError

MOUNTINFO: Final = "/proc/self/mountinfo"
DEAD: Final = frozenset({errno.ENOTCONN, errno.ECONNABORTED})
"""What every look into a mount says whose server is gone."""

_AT_FDCWD: Final = -100
_AT_EMPTY_PATH: Final = 0x1000
_OPEN_TREE_CLONE: Final = 1
_OPEN_TREE_CLOEXEC: Final = os.O_CLOEXEC
_MOVE_MOUNT_F_EMPTY_PATH: Final = 4
_UMOUNT_NOFOLLOW: Final = 8
_MNT_DETACH: Final = 2
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_MOUNT_SETATTR = (
    428,
    429,
    442,
)  # the same on every architecture since 5.2
_MOUNT_ATTR: Final = struct.Struct("=QQQQ")  # attr_set, attr_clr, propagation, userns_fd

READONLY: Final = 0x1
_ATTRIBUTES: Final = {
    "ro": READONLY,
    "nosuid": 0x2,
    "nodev": 0x4,
    "noexec": 0x8,
    "noatime": 0x10,
    "strictatime": 0x20,
    "nodiratime": 0x80,
}
_ATIME: Final = 0x70

_LOOP_SET_CAPACITY: Final = 0x4C07
_LOOP_CLR_FD: Final = 0x4C01
_LOOP_GET_STATUS64: Final = 0x4C05
_LOOP_CONFIGURE: Final = 0x4C0A
_LOOP_CTL_GET_FREE: Final = 0x4C82
_LOOP_MAJOR: Final = 7
_LO_FLAGS_READ_ONLY: Final = 1
_LO_FLAGS_DIRECT_IO: Final = 16
_LOOP_INFO64: Final = struct.Struct("=QQQQQIIII64s64s32sQQ")
_LOOP_CONFIG: Final = struct.Struct("=II232s8Q")
_LOOP_TRIES: Final = 64
"""Another program may take the free device that was just named: with fewer, many at once could miss."""

_libc: Final = ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: object) -> int:
    found = int(_libc.syscall(ctypes.c_long(number), *arguments))
    if found < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return found


# --- what is mounted ---------------------------------------------------------------------------------


@attrs.frozen
class Mount:
    """A line of mountinfo: ``root`` is what of the file system is shown at ``point``."""

    root: str
    point: str
    options: frozenset[str]
    kind: str
    source: str
    device: str

    @property
    def readonly(self) -> bool:
        """Whether nobody can write through it."""
        return "ro" in self.options


def parse_mountinfo(lines: Iterator[str] | Sequence[str]) -> list[Mount]:
    """What is mounted, in the order it was (proc_pid_mountinfo(5))."""
    found = []
    for line in lines:
        fields, _, rest = line.rstrip("\n").partition(" - ")
        _, _, device, root, point, options = fields.split(" ")[:6]
        kind, source = rest.split(" ")[:2]
        found.append(
            Mount(_plain(root), _plain(point), frozenset(options.split(",")), kind, _plain(source), device)
        )
    return found


def _plain(text: str) -> str:
    """A path as the kernel writes it: blanks, tabs, newlines, hashes and backslashes in octal."""
    for code in ("\\040", "\\011", "\\012", "\\043", "\\134"):
        text = text.replace(code, chr(int(code[1:], 8)))
    return text


def mounts_at(point: str) -> list[Mount]:
    """What is mounted at a path, the visible one last."""
    with open(MOUNTINFO, encoding="utf-8", errors="surrogateescape") as lines:
        return [each for each in parse_mountinfo(lines) if each.point == point]


def is_dead(path: str) -> bool:
    """Whether a path leads into a mount whose server is gone."""
    try:
        os.statvfs(path)
    except OSError as error:
        return error.errno in DEAD
    return False


def real_point(path: str) -> str:
    """A path as mountinfo has it: its directory without symbolic links, its last name as it is."""
    directory, name = os.path.split(path)
    return os.path.join(os.path.realpath(directory), name)


# --- bind mounts -------------------------------------------------------------------------------------


def attributes_of(flags: Sequence[str], *, readonly: bool) -> tuple[int, int]:
    """Attributes of a mount to set, and to clear, for mount flags."""
    wanted = READONLY if readonly else 0
    clear = 0
    for flag in flags:
        bit = _ATTRIBUTES.get(flag, 0)
        wanted |= bit
        if bit & _ATIME:
            clear = _ATIME  # one of several values, not a bit of its own (mount_setattr(2))
    return wanted, clear


def bind(source: str, target: str, *, flags: Sequence[str] = (), readonly: bool = False) -> None:
    """Shows ``source`` at ``target``, which exists and has nothing mounted on it.

    Raises:
        OSError: the kernel refuses; then nothing is mounted.
    """
    tree = _call(
        _SYS_OPEN_TREE,
        ctypes.c_int(_AT_FDCWD),
        ctypes.c_char_p(os.fsencode(source)),
        ctypes.c_uint(_OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC),
    )
    try:
        wanted, clear = attributes_of(flags, readonly=readonly)
        if wanted:
            packed = _MOUNT_ATTR.pack(wanted, clear, 0, 0)
            _call(
                _SYS_MOUNT_SETATTR,
                ctypes.c_int(tree),
                ctypes.c_char_p(b""),
                ctypes.c_uint(_AT_EMPTY_PATH),
                ctypes.c_char_p(packed),
                ctypes.c_size_t(len(packed)),
            )
        _call(
            _SYS_MOVE_MOUNT,
            ctypes.c_int(tree),
            ctypes.c_char_p(b""),
            ctypes.c_int(_AT_FDCWD),
            ctypes.c_char_p(os.fsencode(target)),
            ctypes.c_uint(_MOVE_MOUNT_F_EMPTY_PATH),
        )
    finally:
        os.close(tree)


def unmount(target: str, *, detach: bool = False) -> None:
    """Takes the visible mount at a path away; with ``detach`` also one that is in use.

    Raises:
        OSError: EBUSY: it is in use.
    """
    flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if detach else 0)
    if _libc.umount2(os.fsencode(target), flags) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), target)


# --- loop devices ------------------------------------------------------------------------------------


def attach_loop(backing: str, *, block_bytes: int, readonly: bool = False) -> str:
    """A loop device over a file, as ``/dev/loopN``; I/O goes past the page cache of the file where that can be.

    Raises:
        UnavailableError: there is no loop driver, or no free device.
        StorageError: the file cannot be a device.
    """
    try:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise UnavailableError(
            f"no loop devices: {error.strerror}",
            hint="modprobe loop; in a container: privileged, /dev mounted",
        ) from None
    try:
        with contextlib.ExitStack() as stack:
            file = os.open(backing, (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC)
            stack.callback(os.close, file)
            for _ in range(_LOOP_TRIES):
                number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
                if _configure(number, file, block_bytes, readonly=readonly):
                    return f"/dev/loop{number}"
    except OSError as error:
        raise StorageError(f"cannot make {backing} a device: {error.strerror}") from None
    finally:
        os.close(control)
    raise UnavailableError("no free loop device")


def _configure(number: int, file: int, block_bytes: int, *, readonly: bool) -> bool:
    """Whether a free device could be taken for a file."""
    path = f"/dev/loop{number}"
    if not os.path.exists(path):
        with contextlib.suppress(FileExistsError):  # without udev nobody else makes it
            os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(_LOOP_MAJOR, number))
    device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        flags = _LO_FLAGS_DIRECT_IO | (_LO_FLAGS_READ_ONLY if readonly else 0)
        info = _LOOP_INFO64.pack(0, 0, 0, 0, 0, 0, 0, 0, flags, b"", b"", b"", 0, 0)
        fcntl.ioctl(device, _LOOP_CONFIGURE, _LOOP_CONFIG.pack(file, block_bytes, info, *[0] * 8))
    except OSError as error:
        if error.errno == errno.EBUSY:
            return False
        raise
    finally:
        os.close(device)
    return True


def detach_loop(device: str) -> None:
    """Lets a loop device go; one still open goes with its last user.  One that is free already is no error."""
    try:
        descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.ioctl(descriptor, _LOOP_CLR_FD)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
    finally:
        os.close(descriptor)


def grow_loop(device: str) -> None:
    """Lets a loop device have the size its file has by now."""
    descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, _LOOP_SET_CAPACITY)
    finally:
        os.close(descriptor)


def loop_backing(device: str) -> tuple[int, int] | None:
    """Device and inode number of the file behind a loop device; None if it is free."""
    try:
        descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        info = bytearray(_LOOP_INFO64.size)
        fcntl.ioctl(descriptor, _LOOP_GET_STATUS64, info)
    except OSError:
        return None  # free; or its file answers nothing any more
    finally:
        os.close(descriptor)
    found = _LOOP_INFO64.unpack(info)
    return found[0], found[1]


def loops_over(suffix: str) -> list[str]:
    """Loop devices over a file whose path ends so, whether it can still be reached or not."""
    found = []
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if (
                path.read_text(errors="surrogateescape")
                .rstrip("\n")
                .removesuffix(" (deleted)")
                .endswith(suffix)
            ):
                found.append(f"/dev/{path.parent.parent.name}")
    return sorted(found)

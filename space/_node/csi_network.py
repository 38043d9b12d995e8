"""The kernel's clients of volumes that a server has: NFS mounts and NVMe/TCP hosts.  No policy, and no helper programs.

Nothing here looks into a mounted file system: while its server does not answer, whoever looks is held up for as long.
What is connected is read from sysfs, and a device is found by what it is (subsystem and UUID), never by its number.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import socket
import stat
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import attrs

from space._errors import RefusedError, Status, UnavailableError, UsageError
from space._node.csi_mounts import Mount
from space.projections.csi import check
from space.projections.csi.model import Reach

ANSWER_SECONDS: Final = 5.0
"""A server that takes longer is not asked by the kernel, which waits for minutes."""

OTHER_SECONDS: Final = 1.0
"""As long for a further path to a device that one leads to already: it is tried again later."""

DEVICE_SECONDS: Final = 20.0
DEVICE_POLL_SECONDS: Final = 0.02

NFS_OPTIONS: Final = ("vers=4.2", "proto=tcp", "hard", "timeo=600", "retrans=2", "noresvport")
"""As mount.nfs has them, and from any port: privileged ones are few, and the server asks for none."""

_NVME_OPTIONS: Final = "nr_io_queues=1,keep_alive_tmo=5,reconnect_delay=1,ctrl_loss_tmo=-1"
"""One queue a volume, as a server with many volumes has many connections; and I/O waits for a server that is away
however long that takes, as it does over NFS: only who unstages the volume gives up."""

FABRICS: Final = "/dev/nvme-fabrics"
_CONTROLLERS: Final = Path("/sys/class/nvme")
_BLOCK: Final = Path("/sys/block")
_DEVICE: Final = re.compile(r"nvme\d+n\d+", re.ASCII)
_SECTOR_BYTES: Final = 512  # of sizes in sysfs, whatever the device has

_MS_RDONLY: Final = 1
_ADMIN_COMMAND: Final = struct.Struct("=BBHIIIQQIIIIIIIIII")
assert _ADMIN_COMMAND.size == 72, "struct nvme_admin_cmd (linux/nvme_ioctl.h)"
_IOCTL_ADMIN: Final = 0xC0484E41
_IDENTIFY: Final = 0x06
_IDENTIFY_BYTES: Final = 4096

_libc: Final = ctypes.CDLL(None, use_errno=True)


def _reached(
    server: str, question: bytes = b"", answer: bytes = b"", *, seconds: float = ANSWER_SECONDS
) -> tuple[str, int]:
    """The address at which a server takes connections, and has the right answer to a question.

    Raises:
        UnavailableError: it has not.
    """
    host, port = check.server(server)
    try:
        with socket.create_connection((host, port), seconds) as connected:
            connected.sendall(question)
            found = b""
            while len(found) < len(answer) and (data := connected.recv(len(answer) - len(found))):
                found += data
            if found != answer:
                raise UnavailableError(f"{server} is no NFSv4 server")
            return str(connected.getpeername()[0]), port
    except OSError as error:
        raise UnavailableError(f"{server} does not answer: {error}") from None


# --- NFS -------------------------------------------------------------------------------------------


_XID: Final = 1
NULL_CALL: Final = struct.pack(">11I", 0x8000_0028, _XID, 0, 2, 100_003, 4, 0, 0, 0, 0, 0)
NULL_REPLY: Final = struct.pack(">7I", 0x8000_0018, _XID, 1, 0, 0, 0, 0)
"""NFSPROC4_NULL without credentials, and that it was carried out (RFC 5531 section 9, RFC 8881 section 16.1)."""


def nfs_source(reach: Reach) -> str:
    """How mountinfo names the mount of an export, whichever of its servers serves it."""
    host, _ = check.server(reach.servers[0])
    return f"[{host}]:{reach.share}" if ":" in host else f"{host}:{reach.share}"


def is_nfs_of(there: Mount, volume: str) -> bool:
    """Whether a mount is of a volume over NFS, whatever its server."""
    return there.kind == "nfs4" and there.source.endswith(f":/{volume}")


def mount_nfs(
    reach: Reach, point: str, *, options: Sequence[str] = (), readonly: bool = False, relay: int = 0
) -> None:
    """Mounts an export at a directory; later options prevail.

    ``relay`` is the port of this machine that leads to whichever of several servers serves.

    Raises:
        RefusedError: this kernel has no NFS client, or the server refuses.
        UsageError: an option is none of this kernel's.
        UnavailableError: the server does not answer: it is asked first, as the kernel would wait for minutes.
        OSError: anything else the kernel says.
    """
    server = f"127.0.0.1:{relay}" if relay else reach.server
    address, port = _reached(server, NULL_CALL, NULL_REPLY)
    data = ",".join([*NFS_OPTIONS, *options, f"port={port}", f"addr={address}"])
    try:
        _mount(nfs_source(reach), point, "nfs4", _MS_RDONLY if readonly else 0, data)
    except OSError as error:
        raise _explained(reach, error) from None


def _explained(reach: Reach, error: OSError) -> Exception:
    if error.errno == errno.ENODEV:
        return RefusedError(
            "this kernel has no NFS client", hint="modprobe nfsv4", status=Status.NOT_PERMITTED
        )
    if error.errno == errno.EINVAL:
        return UsageError("this kernel's NFS client refuses the mount flags", hint="dmesg says which")
    if error.errno in {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ESTALE}:
        return RefusedError(
            f"{reach.server} does not offer {reach.share} to this machine: {error.strerror}",
            hint="is the volume attached to this node, and is --node-address what the server sees of it?",
            status=Status.NOT_PERMITTED,
        )
    if error.errno in {errno.ETIMEDOUT, errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EIO}:
        return UnavailableError(f"{reach.server} does not answer: {error.strerror}")
    return error


def _mount(source: str, point: str, kind: str, flags: int, data: str) -> None:
    if _libc.mount(os.fsencode(source), os.fsencode(point), kind.encode(), flags, data.encode()) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), point)


# --- NVMe/TCP --------------------------------------------------------------------------------------


@attrs.frozen
class Host:
    """Who this machine is for NVMe targets."""

    nqn: str
    uuid: str


def connect(reach: Reach, host: Host) -> str:
    """The device of a namespace, connected to if need be; connections to other servers of it are ended.

    Each of several servers is a path; one is enough, and the others are :func:`complete`'s.

    Raises:
        RefusedError: this kernel is no NVMe/TCP host, or the target refuses.
        UnavailableError: no target answers, or none shows the namespace.
    """
    complete(reach, host)
    deadline = time.monotonic() + DEVICE_SECONDS
    while (device := find_device(reach)) is None:
        if time.monotonic() > deadline:
            raise UnavailableError(f"{reach.nqn} at {reach.server} does not show the namespace {reach.uuid}")
        time.sleep(DEVICE_POLL_SECONDS)
    return device


def complete(reach: Reach, host: Host) -> None:
    """Connects the paths to a namespace that are missing, as far as their servers answer.

    Raises:
        RefusedError: this kernel is no NVMe/TCP host.
        UnavailableError: there is no path at all.
    """
    before = list(_controllers(reach.nqn, host))
    places, known, failed = set(), False, UnavailableError(f"nothing leads to {reach.nqn}")
    for server in reach.servers:
        try:
            place = _place(server)
            places.add(place)
            if not any(_is_at(each, place) for each in before):
                _reached(server, seconds=OTHER_SECONDS if known else ANSWER_SECONDS)
                _connect(reach.nqn, place, host)
            known = True
        except UnavailableError as error:
            failed = error
    if not known:
        raise failed
    if len(places) == len(reach.servers):
        for each in before:
            if not any(_is_at(each, place) for place in places):
                _delete(each)


def _is_at(controller: Path, place: str) -> bool:
    """Whether a controller was connected to an address; the kernel shows more behind it."""
    return f"{_text(controller / 'address')},".startswith(f"{place},")


def _place(server: str) -> str:
    """How the kernel names the address of a server.

    Raises:
        UnavailableError: there is none of that name.
    """
    host, port = check.server(server)
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise UnavailableError(f"{server} is not found: {error}") from None
    return f"traddr={address},trsvcid={port}"


def _connect(nqn: str, place: str, host: Host) -> None:
    _ask_fabrics(f"nqn={nqn},transport=tcp,{place},hostnqn={host.nqn},hostid={host.uuid},{_NVME_OPTIONS}")


def _ask_fabrics(options: str) -> None:
    try:
        descriptor = os.open(FABRICS, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise _no_host(f"{FABRICS}: {error.strerror}") from None
    try:
        os.write(descriptor, options.encode())
    except OSError as error:
        if error.errno == errno.EALREADY:
            return  # somebody else was faster
        if error.errno == errno.EINVAL:
            raise _no_host(f"{FABRICS} refuses the transport tcp") from None
        raise UnavailableError(
            f"not connected to an NVMe target: {error.strerror}", hint="dmesg says more"
        ) from None
    finally:
        os.close(descriptor)


def _no_host(why: str) -> RefusedError:
    return RefusedError(
        f"this kernel is no NVMe/TCP host ({why})", hint="modprobe nvme-tcp", status=Status.NOT_PERMITTED
    )


def _controllers(nqn: str, host: Host) -> Iterator[Path]:
    """Controllers of this host in a subsystem, in sysfs."""
    for each in sorted(_CONTROLLERS.glob("nvme*")):
        if _text(each / "subsysnqn") == nqn and _text(each / "hostnqn") == host.nqn:
            yield each


def is_live(nqn: str, host: Host) -> bool:
    """Whether a subsystem is connected."""
    return any(_text(each / "state") == "live" for each in _controllers(nqn, host))


def disconnect(nqn: str, host: Host) -> None:
    """Ends every connection of this host to a subsystem; its devices are gone then."""
    for each in list(_controllers(nqn, host)):
        _delete(each)


def _delete(controller: Path) -> None:
    try:
        (controller / "delete_controller").write_text("1")
    except FileNotFoundError:
        return  # it is going


def find_device(reach: Reach) -> str | None:
    """The device node of a namespace, as ``/dev/nvmeXnY``; None if it is not connected."""
    for each in sorted(_BLOCK.glob("nvme*n*")):
        if not _DEVICE.fullmatch(each.name):
            continue  # one path of several to a namespace
        if _text(each / "device" / "subsysnqn") == reach.nqn and _text(each / "uuid") == reach.uuid:
            return _node(each)
    return None


def _node(found: Path) -> str:
    """The node of a block device, made where nothing else makes it."""
    path = f"/dev/{found.name}"
    if not os.path.exists(path) and (number := _text(found / "dev")):
        major, minor = map(int, number.split(":"))
        with contextlib.suppress(FileExistsError):
            os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(major, minor))
    return path


def is_device(root: str) -> bool:
    """Whether this is how mountinfo shows a bind mount of an NVMe device's node, of one that has gone too."""
    return _DEVICE.fullmatch(root.removeprefix("/").removesuffix("//deleted")) is not None


def device_size(device: str) -> int:
    """Bytes of a device as the kernel knows it now; 0 if it is gone."""
    return int(_text(_BLOCK / os.path.basename(device) / "size") or 0) * _SECTOR_BYTES


def namespace_used(device: str) -> int:
    """Bytes of a namespace that are allocated: NUSE of Identify Namespace (NVM Command Set 1.0, section 4.1.5).

    Waits for the target.

    Raises:
        OSError: it does not say.
    """
    name = os.path.basename(device)
    nsid = int(_text(_BLOCK / name / "nsid") or 0)
    page = ctypes.create_string_buffer(_IDENTIFY_BYTES)
    data = ctypes.addressof(page), 0, _IDENTIFY_BYTES
    command = bytearray(_ADMIN_COMMAND.pack(_IDENTIFY, 0, 0, nsid, 0, 0, 0, *data, *[0] * 8))
    descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, _IOCTL_ADMIN, command)
    finally:
        os.close(descriptor)
    (blocks,) = struct.unpack_from("<Q", page, 16)
    return int(blocks) * int(_text(_BLOCK / name / "queue" / "logical_block_size"))


def _text(path: Path) -> str:
    """A value of sysfs; empty if it is gone."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""

"""What a request has to be before anything is done for it: pure, and with an error that names the field.

Ids and paths come from outside and end up in names of files: an id is looked up only if it has the form of one that
could have been given out, and a path is used only as the orchestrator could have meant it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from typing import Any, Final
from uuid import UUID

import attrs

from space._errors import NotFoundError, RefusedError, Status, UsageError
from space.projections.csi.model import (
    EPHEMERAL_ID_PREFIX,
    NETWORK,
    NFS,
    TRANSPORT,
    TRANSPORTS,
    Mounting,
    Published,
    Reach,
    Volume,
    node_address,
)
from space.projections.csi.pb import csi_pb2 as pb

DEFAULT_BYTES: Final = 1 << 30
CAPACITY_MAX: Final = 1 << 62
BLOCK_BYTES: Final = 4096
"""Block volumes are whole blocks of this."""

NAME_BYTES_MAX: Final = 1024
PATH_BYTES_MAX: Final = 4096 - 1  # PATH_MAX with its NUL
MAP_BYTES_MAX: Final = 64 << 10
"""All keys and values of a map: the specification asks callers for 4 KiB, and kubelet sends a token more."""

MOUNT_FLAGS_BYTES_MAX: Final = 4096  # the specification's
PAGE_MAX: Final = 1000
"""Entries of one answer where the caller sets no bound: larger messages would meet gRPC's limit of 4 MiB."""

MOUNT_FLAGS: Final = frozenset(
    {
        "defaults",
        "rw",
        "ro",
        "suid",
        "nosuid",
        "dev",
        "nodev",
        "exec",
        "noexec",
        "atime",
        "noatime",
        "diratime",
        "nodiratime",
        "relatime",
        "strictatime",
        "bind",
    }
)
"""What a bind mount can have of its own (mount(2), MS_BIND with MS_REMOUNT)."""

NFS_FLAGS: Final = frozenset(
    {
        *("hard", "soft", "softerr", "softreval"),
        *("ac", "noac", "sync", "async", "cto", "nocto", "lock", "rdirplus", "nordirplus"),
        *("resvport", "noresvport", "sharecache", "nosharecache", "lookupcache", "vers", "nfsvers"),
        *("timeo", "retrans", "rsize", "wsize", "nconnect", "actimeo"),
        *("acregmin", "acregmax", "acdirmin", "acdirmax"),
    }
)
"""Names of options of the kernel's NFS client that decide nothing but how it works (nfs(5)); some have a value."""

_NFS_FLAG: Final = re.compile(r"([a-z]+)(=[a-z0-9.]{1,16})?", re.ASCII)
_NFS_VERSIONS: Final = frozenset({"4.1", "4.2"})

SERVERS_MAX: Final = 64
"""That lead to one volume: as many nodes as a list of them may have."""

_MODE: Final = pb.VolumeCapability.AccessMode
READERS: Final = frozenset({_MODE.SINGLE_NODE_READER_ONLY, _MODE.MULTI_NODE_READER_ONLY})
MULTI_NODE_SINGLE_WRITER: Final = _MODE.MULTI_NODE_SINGLE_WRITER
SINGLE_NODE: Final = frozenset(
    {
        _MODE.SINGLE_NODE_WRITER,
        _MODE.SINGLE_NODE_READER_ONLY,
        _MODE.SINGLE_NODE_SINGLE_WRITER,
        _MODE.SINGLE_NODE_MULTI_WRITER,
    }
)

KIND: Final = "type"
KINDS: Final = ("tree", "block")
"""In a volume's context; the second one is a block device."""

ORCHESTRATOR_PREFIX: Final = "csi.storage.k8s.io/"
POLICY_PARAMETERS: Final = frozenset(
    {"compression", "encryption", "dedupe", "history", "durability", "latency_target", "sovereignty"}
)
PARAMETERS: Final = POLICY_PARAMETERS | {"moment", "source-volume", TRANSPORT}

_ID: Final = re.compile(
    rf"[0-9a-f]{{8}}(-[0-9a-f]{{4}}){{3}}-[0-9a-f]{{12}}|{EPHEMERAL_ID_PREFIX}[0-9a-f]{{64}}", re.ASCII
)
NODE_NAME: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,189}[A-Za-z0-9])?", re.ASCII)
NODE_ID_CHARACTERS_MAX: Final = 192
"""As long as kubelets take them."""

_NODE: Final = re.compile(NODE_NAME.pattern + r"(@[0-9A-Fa-f.:]{0,39})?", re.ASCII)
_SERVER: Final = re.compile(
    r"(?:\[([0-9A-Fa-f:.]{2,39})\]|([A-Za-z0-9][A-Za-z0-9._-]{0,252})):([0-9]{1,5})", re.ASCII
)
_SHARE: Final = re.compile(r"/[0-9a-z-]{1,68}", re.ASCII)
_NQN: Final = re.compile(r"nqn\.[A-Za-z0-9.:_-]{1,219}", re.ASCII)
_KEY: Final = re.compile(r"[A-Za-z0-9._/-]{1,253}", re.ASCII)


@attrs.frozen
class Capability:
    """How a volume is to be used."""

    block: bool
    mode: int
    flags: tuple[str, ...] = ()
    group: int | None = None
    options: tuple[str, ...] = ()

    @property
    def readonly(self) -> bool:
        """Whether nobody may write."""
        return self.mode in READERS

    def published(self, *, readonly: bool) -> Published:
        """The same for whoever keeps where a volume is published."""
        return Published(readonly or self.readonly, self.mode)

    def mounting(self, *, readonly: bool = False) -> Mounting:
        """The same for the host."""
        readonly = readonly or self.readonly or "ro" in self.flags
        flags = tuple(flag for flag in self.flags if flag not in {"ro", "rw", "bind", "defaults"})
        return Mounting(readonly, flags, self.group, self.mode, self.options)


def required(value: str, field: str) -> str:
    """A field that has to be there.

    Raises:
        UsageError: it is empty, too long, or has control characters.
    """
    if not value:
        raise UsageError(f"{field} is missing")
    if len(value.encode(errors="surrogatepass")) > NAME_BYTES_MAX:
        raise UsageError(f"{field} is longer than {NAME_BYTES_MAX} bytes")
    # the banned ones of the specification are category Cc without tab, line feed and carriage return
    if any(unicodedata.category(c) == "Cc" and c not in "\t\n\r" for c in value):
        raise UsageError(f"{field} has control characters")
    return value


def known_id(value: str, field: str) -> str:
    """An id that may have been given out.

    Raises:
        UsageError: it is missing.
        NotFoundError: no id ever looked like that.
    """
    if not _ID.fullmatch(required(value, field)):
        raise NotFoundError(f"no {field} {value!r:.100}")
    return value


def is_id(value: str) -> bool:
    """Whether an id may have been given out."""
    return bool(_ID.fullmatch(value))


def ephemeral_id(value: str) -> str:
    """The id a kubelet drew for an inline volume.

    Raises:
        UsageError: it has not the form of one.
    """
    if not (_ID.fullmatch(required(value, "volume_id")) and value.startswith(EPHEMERAL_ID_PREFIX)):
        raise UsageError(f"not the id of an inline volume: {value!r:.100}")
    return value


def node_id(value: str) -> str:
    """The id of a node.

    Raises:
        UsageError: it is missing.
        NotFoundError: no node can have it.
    """
    if not _NODE.fullmatch(required(value, "node_id")) or len(value) > NODE_ID_CHARACTERS_MAX:
        raise NotFoundError(f"no node {value!r:.100}")
    if address := node_address(value):
        try:
            ip_address(address)
        except ValueError:
            raise NotFoundError(f"no node {value!r:.100}") from None
    return value


def path(value: str, field: str) -> str:
    """An absolute path that means what it says.

    Raises:
        UsageError: it is missing, relative, too long, or goes up or in circles.
    """
    raw = value.encode(errors="surrogatepass")
    if not value:
        raise UsageError(f"{field} is missing")
    if not value.startswith("/") or "\0" in value or len(raw) > PATH_BYTES_MAX:
        raise UsageError(f"{field} is not an absolute path: {value!r:.100}")
    parts = value.strip("/").split("/")
    if parts == [""] or any(part in {".", ".."} or len(part.encode()) > 255 for part in parts):
        raise UsageError(f"{field} is not a plain path: {value!r:.100}")
    return "/" + "/".join(part for part in parts if part)


def seen_path(value: str, field: str) -> str:
    """A path something is said to be seen at.

    Raises:
        UsageError: it is missing.
        NotFoundError: nothing was ever shown at a path like that.
    """
    if not value:
        raise UsageError(f"{field} is missing")
    try:
        return path(value, field)
    except UsageError as error:
        raise NotFoundError(str(error)) from None


def mapping(values: Mapping[str, str], field: str) -> dict[str, str]:
    """A map of a request (secrets among them: an error never shows a value).

    Raises:
        UsageError: it is too large, or a key is not one.
    """
    if sum(len(key.encode()) + len(value.encode()) for key, value in values.items()) > MAP_BYTES_MAX:
        raise UsageError(f"{field} has more than {MAP_BYTES_MAX} bytes")
    for key in values:
        if not _KEY.fullmatch(key):
            raise UsageError(f"{field} has a key that is none: {key!r:.100}")
    return dict(values)


def parameters(values: Mapping[str, str], *, field: str = "parameters") -> dict[str, str]:
    """Parameters of a class, without the orchestrator's own.

    Raises:
        UsageError: one is not known.
    """
    allowed = PARAMETERS if field == "parameters" else POLICY_PARAMETERS
    found = {k: v for k, v in mapping(values, field).items() if not k.startswith(ORCHESTRATOR_PREFIX)}
    if unknown := sorted(found.keys() - allowed):
        raise UsageError(
            f"{field}: no such parameter: {unknown[0]!r:.100}", hint=f"there is: {', '.join(sorted(allowed))}"
        )
    return found


def no_parameters(values: Mapping[str, str]) -> None:
    """Refuses parameters of a snapshot class, beside the orchestrator's own: a snapshot has none.

    Raises:
        UsageError: there is one.
    """
    if own := [key for key in mapping(values, "parameters") if not key.startswith(ORCHESTRATOR_PREFIX)]:
        raise UsageError(f"a snapshot has no parameter {own[0]!r:.100}")


def policy_document(values: Mapping[str, str]) -> dict[str, Any]:
    """What of parameters belongs to a policy, as a document of one."""
    found: dict[str, Any] = {key: value for key, value in values.items() if key in POLICY_PARAMETERS}
    if "dedupe" in found:
        found["dedupe"] = {"true": True, "false": False}.get(found["dedupe"], found["dedupe"])
    return found


def capacity(wanted: pb.CapacityRange, *, block: bool) -> tuple[int, int]:
    """Bytes a volume is to have, and at most (0: any).

    Raises:
        UsageError: there is no such size; status TOO_LARGE.
    """
    least, most = wanted.required_bytes, wanted.limit_bytes
    if least < 0 or most < 0 or (most and least > most):
        raise UsageError(f"not a range of sizes: {least} to {most} bytes", status=Status.TOO_LARGE)
    size = least or min(DEFAULT_BYTES, most or DEFAULT_BYTES)
    if block:
        size = -(-size // BLOCK_BYTES) * BLOCK_BYTES
        if most and size > most:
            size = most // BLOCK_BYTES * BLOCK_BYTES
    if not max(1, least) <= size <= CAPACITY_MAX:
        raise UsageError(
            f"no size from {least} to {most} bytes"
            + (f" is whole blocks of {BLOCK_BYTES}" if block else f", or above {CAPACITY_MAX}"),
            status=Status.TOO_LARGE,
        )
    return size, most


def capability(wanted: pb.VolumeCapability) -> Capability:
    """One capability.

    Raises:
        UsageError: it is not whole, or asks for what there is not.
    """
    kind = wanted.WhichOneof("access_type")
    if kind is None:
        raise UsageError("volume_capability has no access type: block or mount")
    mode = wanted.access_mode.mode
    if mode == _MODE.UNKNOWN or mode not in _MODE.Mode.values():
        raise UsageError("volume_capability has no access mode")
    if kind == "block":
        return Capability(block=True, mode=mode)
    flags = tuple(wanted.mount.mount_flags)
    if sum(map(len, flags)) > MOUNT_FLAGS_BYTES_MAX:
        raise UsageError(f"mount_flags of more than {MOUNT_FLAGS_BYTES_MAX} bytes")
    options = tuple(flag for flag in flags if flag not in MOUNT_FLAGS)
    for each in options:
        _check_option(each)
    flags = tuple(flag for flag in flags if flag in MOUNT_FLAGS)
    return Capability(False, mode, flags, _group(wanted.mount.volume_mount_group), options)


def _check_option(text: str) -> None:
    """Refuses what is no option of the kernel's NFS client, or none that a claim may set.

    Raises:
        UsageError: it is none.
    """
    found = _NFS_FLAG.fullmatch(text)
    if found is None or found[1] not in NFS_FLAGS:
        there = ", ".join(sorted(MOUNT_FLAGS))
        raise UsageError(
            f"no such mount flag: {text!r:.40}",
            hint=f"there is: {there}; over NFS: {', '.join(sorted(NFS_FLAGS))}",
        )
    if found[1] in {"vers", "nfsvers"} and (found[2] or "")[1:] not in _NFS_VERSIONS:
        raise UsageError(f"{text!r:.40}: versions are {', '.join(sorted(_NFS_VERSIONS))}")


def _group(text: str) -> int | None:
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= 10 and int(text) < (1 << 32) - 1):
        raise UsageError(f"volume_mount_group is not the number of a group: {text!r:.40}")
    return int(text)


def capabilities(wanted: Sequence[pb.VolumeCapability]) -> list[Capability]:
    """All capabilities a volume must have.

    Raises:
        UsageError: there are none, or no volume can have them all.
    """
    if not wanted:
        raise UsageError("volume_capabilities are missing")
    found = [capability(each) for each in wanted]
    if len({each.block for each in found}) > 1:
        raise UsageError("a volume is a block device or a tree, not both")
    return found


def page(token: str, entries: int) -> tuple[str, int]:
    """Where a listing goes on, and how many entries it may have.

    Raises:
        UsageError: a negative number.
        ConflictError: a token never given out; status STALE, so that the caller begins anew.
    """
    if entries < 0:
        raise UsageError(f"max_entries is {entries}")
    if token and not is_id(token):
        raise UsageError("starting_token is none of ours: begin anew", status=Status.STALE)
    return token, min(entries or PAGE_MAX, PAGE_MAX)


# --- over the network ------------------------------------------------------------------------------


def transport(values: Mapping[str, str], *, block: bool) -> str:
    """How a volume of these parameters is seen.

    Raises:
        UsageError: there is no such transport, or it is not one for that kind of volume.
    """
    found = values.get(TRANSPORT, TRANSPORTS[block][0])
    if found not in TRANSPORTS[block]:
        kind = "block devices" if block else "trees"
        raise UsageError(
            f"no transport {found!r:.40} of {kind}", hint=f"there is: {', '.join(TRANSPORTS[block])}"
        )
    return found


def fits(volume: Volume, wanted: Capability) -> None:
    """Refuses to use a volume as what it is not.

    Raises:
        UsageError: it is a device where a tree is wanted, or the other way; mount flags of another transport.
    """
    if volume.block != wanted.block:
        kinds = ("a tree", "a block device")
        raise UsageError(f"volume {volume.id} is {kinds[volume.block]}, not {kinds[wanted.block]}")
    check_options(volume.transport, wanted)


def check_options(way: str, wanted: Capability) -> None:
    """Refuses options of the NFS client where there is none.

    Raises:
        UsageError: there is one.
    """
    if wanted.options and way != NFS:
        raise UsageError(f"the mount flag {wanted.options[0]!r:.40} is for volumes over NFS, not over {way}")


def server(text: str) -> tuple[str, int]:
    """Host and port of a server.

    Raises:
        UsageError: it is not HOST:PORT.
    """
    found = _SERVER.fullmatch(text)
    if found is None or not 0 < int(found[3]) < 1 << 16:
        raise UsageError(f"not HOST:PORT: {text!r:.100}")
    return found[1] or found[2], int(found[3])


def reach(context: Mapping[str, str], volume: Volume) -> Reach | None:
    """How a volume is reached, from its publish_context; None for one that is seen where the store is.

    Raises:
        UsageError: the context is not what a publication gives.
    """
    if volume.transport not in NETWORK:
        return None
    values = mapping(context, "publish_context")
    found = Reach(*(values.get(each.name, "") for each in attrs.fields(Reach)))
    if found.transport != volume.transport:
        raise UsageError(
            f"publish_context says nothing of {volume.transport}, through which volume {volume.id} is seen",
            hint="ControllerPublishVolume gives it",
        )
    if len(found.servers) > SERVERS_MAX:
        raise UsageError(f"publish_context names more than {SERVERS_MAX} servers")
    for each in found.servers:
        server(each)
    if volume.transport == NFS:
        whole = _SHARE.fullmatch(found.share)
    else:
        whole = _NQN.fullmatch(found.nqn) if _is_uuid(found.uuid) else None
    if not whole:
        raise UsageError(f"publish_context is not one of {volume.transport}")
    return found


def _is_uuid(text: str) -> bool:
    try:
        return str(UUID(text)) == text
    except ValueError:
        return False


def told(volume: str, context: Mapping[str, str]) -> Volume:
    """A volume as a node without a store knows it: from its volume_context.

    Raises:
        UsageError: the context is not what making a volume gives.
        RefusedError: it is not seen over the network.
    """
    values = mapping(context, "volume_context")
    kind = values.get(KIND, "")
    if kind not in KINDS:
        raise UsageError(f"volume_context has no {KIND} ({' or '.join(KINDS)})")
    block = kind == KINDS[True]
    way = transport(values, block=block)
    if way not in NETWORK:
        other = TRANSPORTS[block][1]
        raise RefusedError(
            f"volume {volume} is seen through {way}, where the store is; this node has none",
            hint=f"a StorageClass with {TRANSPORT}: {other} reaches every node",
            status=Status.NOT_PERMITTED,
        )
    return Volume(volume, "", 0, block, 0, parameters={TRANSPORT: way})


def volume_context(volume: Volume) -> dict[str, str]:
    """What :func:`told` reads."""
    return {KIND: KINDS[volume.block], TRANSPORT: volume.transport}

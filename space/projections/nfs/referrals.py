"""Referrals (RFC 8881 §11): directories of an export whose content another server has; no I/O.

A client that comes to one finds a file system that is *absent* here.  It can look the name up and ask where the file
system is (``fs_locations``, ``fs_locations_info``); everything else is answered NFS4ERR_MOVED, and the client mounts
the other server at that place.  A server is told as RFC 8881 §11.16 has it: a host's name, or an address, followed by
the two bytes of its port where that is not 2049.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from typing import Final

import attrs

from space._errors import UsageError
from space.projections.nfs.nfs4 import PORT
from space.projections.nfs.xdr import Writer

SERVER_BYTES_MAX: Final = 255
PATH_BYTES_MAX: Final = 4096
"""Of a path on another server; the longest a client would look up."""

_CURRENCY_UNKNOWN: Final = -1
_INFO_BYTES: Final = 12  # FSLI4BX_*: no flags, no classes in common with anybody, no ranks

_FORM: Final = "write NAME=HOST[:PORT][:/PATH]; an IPv6 address stands in brackets"


@attrs.frozen
class Location:
    """Where a file system is: the server as ``fs_location4`` names it, and the path there."""

    server: bytes
    path: tuple[bytes, ...] = ()


@attrs.frozen(eq=False)
class Referral:
    """A directory that stands for a file system of another server.

    Attributes:
        place: names that lead to it from the root of this server.
        elsewhere: whether that is so now; else the directory is what it would be without a referral.
    """

    location: Location
    place: tuple[bytes, ...]
    elsewhere: Callable[[], bool]


def parse_referral(text: str) -> tuple[str, Location]:
    """The name and the location written as ``NAME=HOST[:PORT][:/PATH]``.

    Raises:
        UsageError: it is none, or names a port of a host that is not an address (which cannot be said to clients).
    """
    name, equals, rest = text.partition("=")
    server, _, path = rest.partition(":/")
    names = tuple(part.encode() for part in path.split("/") if part)
    if not name or not equals or len(path.encode()) > PATH_BYTES_MAX or {b".", b".."} & set(names):
        raise UsageError(f"not a referral: {text!r}", hint=_FORM)
    return name, Location(_server(server, text), names)


def _server(server: str, text: str) -> bytes:
    host, port = server, PORT
    if server.startswith("["):
        host, bracket, behind = server[1:].partition("]")
        if not bracket or behind[:1] not in ("", ":"):
            raise UsageError(f"not a referral: {text!r}", hint=_FORM)
        port = _port(behind[1:], text) if behind else PORT
    elif ":" in server:
        host, _, number = server.rpartition(":")
        port = _port(number, text)
    try:
        address = str(ipaddress.ip_address(host))
    except ValueError:
        named = host.encode("ascii", "replace")
        if (
            not host.replace("-", "").replace(".", "").isalnum()
            or b"?" in named
            or len(named) > SERVER_BYTES_MAX
        ):
            raise UsageError(f"not a referral: {text!r}", hint=_FORM) from None
        if port != PORT:
            raise UsageError(
                f"a referral to port {port} of {host}", hint=f"say its address: for names clients use {PORT}"
            ) from None
        return named
    return (address if port == PORT else f"{address}.{port >> 8}.{port & 255}").encode()


def _port(number: str, text: str) -> int:
    if not number.isdecimal() or not 0 < int(number) < 65536:
        raise UsageError(f"not a referral: {text!r}", hint=_FORM)
    return int(number)


def encode_locations(referral: Referral | None, root: tuple[bytes, ...]) -> bytes:
    """fs_locations4 (§11.16) of a file system whose root is at ``root``; one that is here names no others."""
    out = Writer()
    _path(out, root)
    out.u32(referral is not None)
    if referral is not None:
        out.u32(1)
        out.opaque(referral.location.server)
        _path(out, referral.location.path)
    return out.bytes()


def encode_locations_info(referral: Referral | None, root: tuple[bytes, ...], valid_seconds: int) -> bytes:
    """fs_locations_info4 (§11.17), the same with more about each server, of which nothing is known."""
    out = Writer()
    out.u32(0)
    out.u32(valid_seconds)
    _path(out, root)
    out.u32(referral is not None)
    if referral is not None:
        out.u32(1)
        out.i32(_CURRENCY_UNKNOWN)
        out.opaque(bytes(_INFO_BYTES))
        out.opaque(referral.location.server)
        _path(out, referral.location.path)
    return out.bytes()


def _path(out: Writer, names: tuple[bytes, ...]) -> None:
    """pathname4."""
    out.u32(len(names))
    for name in names:
        out.opaque(name)

"""Strategies over a small world of ids and names, so that commands meet each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import attrs
from hypothesis import strategies as st

from space.events import types as ev
from space.events.ids import ROOT
from space.events.registry import BY_NUMBER, LINK_BYTES, U32_MAX, U63_MAX

IDS: Final = [bytes([number]) * 16 for number in range(1, 7)]
NAMES: Final = [b"a", b"b", "é".encode()]

ids = st.sampled_from([bytes(ROOT), *IDS])
names = st.sampled_from(NAMES)
u32 = st.integers(0, 3) | st.integers(0, U32_MAX)
u63 = st.integers(0, 9000) | st.integers(0, U63_MAX)
links = st.binary(min_size=LINK_BYTES, max_size=LINK_BYTES)

_BY_NAME: Final[Mapping[str, st.SearchStrategy[Any]]] = {
    "capsule": ids,
    "store": ids,
    "parent": ids,
    "new_parent": ids,
    "other": ids,
    "other_parent": ids,
    "source": ids,
    "replaced": ids | st.just(b""),
    "holder": ids | st.just(b""),
    "reservation": st.integers(0, 6) | u32,
    "registered": st.lists(st.tuples(ids, st.binary(min_size=8, max_size=8)), max_size=3).map(
        lambda rows: b"".join(host + key for host, key in rows)
    )
    | st.binary(max_size=60),
    "removed": st.lists(ids, max_size=3).map(b"".join) | st.binary(max_size=40),
    "told": st.lists(ids, max_size=3).map(lambda hosts: b"".join(host + b"\1" for host in hosts))
    | st.binary(max_size=40),
    "name": names,
    "new_name": names,
    "other_name": names,
    "kind": st.sampled_from([int(kind) for kind in ev.Kind]) | u32,
    "size": u63,
    "offset": u63,
    "source_offset": u63,
    "source_link": links,
    "namespace": ids,
    "subsystem": st.sampled_from(["nqn.2014-08.org.example:a", "nqn.2014-08.org.example:b"])
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=223),
    "at": u63,
    "client": ids,
    "sequence": u63,
    "status": st.sampled_from(["EXISTS", "NOT_FOUND"])
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=32),
    "message": st.text(st.characters(exclude_categories=["Cs"]), max_size=200),
    "server": st.sampled_from(["a", "b"]) | st.text(st.characters(exclude_categories=["Cs"]), max_size=255),
    "owner": st.sampled_from([b"x", b"y"]) | st.binary(max_size=1024),
    "verifier": st.binary(min_size=8, max_size=8) | st.binary(max_size=8),
    "zone": ids,
    "heir": ids,
    "sealing": st.binary(max_size=32),
    "from_position": u63,
    "through_position": u63,
    "position": u63,
    "copy": u63,
    "sent_bytes": u63,
    "lag_ns": u63,
    "capsules": st.lists(ids, max_size=3).map(b"".join) | st.binary(max_size=60),
    "withdrawn": st.lists(ids, max_size=3).map(b"".join) | st.binary(max_size=40),
    "atime": st.none() | st.integers(-(2**63), 2**63 - 1),
    "mtime": st.none() | st.integers(-(2**63), 2**63 - 1),
    "ctime": st.none() | st.integers(-(2**63), 2**63 - 1),
    "btime": st.none() | st.integers(-(2**63), 2**63 - 1),
    "snapshot": st.sampled_from(["s", "t"]) | st.text(st.characters(exclude_categories=["Cs"]), max_size=255),
    "frames": st.integers(0, 3).flatmap(lambda count: st.binary(min_size=48 * count, max_size=48 * count))
    | st.binary(max_size=200),
    "members": st.lists(ids, max_size=3).map(b"".join) | st.binary(max_size=40),
    "purged": st.lists(ids, max_size=3).map(b"".join) | st.binary(max_size=40),
    "ranges": st.lists(st.binary(min_size=16, max_size=16), max_size=3).map(b"".join)
    | st.binary(max_size=40),
}
_OPTIONAL_U32: Final = {("AttributesChanged", field) for field in ("mode", "uid", "gid")}
_TEXTS: Final = {"subsystem", "status", "message", "server", "snapshot"}


def _field(cls: type[Any], name: str, annotation: str) -> st.SearchStrategy[Any]:
    if name == "length":
        return u32 if cls is ev.ExtentWritten else u63
    if (cls.__name__, name) in _OPTIONAL_U32:
        return st.none() | u32
    if annotation == "str" and name not in _TEXTS:
        return st.sampled_from(["a", "b"]) | st.text(st.characters(exclude_categories=["Cs"]), max_size=32)
    if name in _BY_NAME:
        return _BY_NAME[name]
    return st.binary(max_size=100) if annotation == "bytes" else u32


def events_of(cls: type[Any]) -> st.SearchStrategy[ev.Event]:
    """Events of one class with any values its fields may have."""
    return st.builds(
        cls, **{field.name: _field(cls, field.name, str(field.type)) for field in attrs.fields(cls)}
    )


events = st.one_of([events_of(schema.cls) for schema in BY_NUMBER.values()])

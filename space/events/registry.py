"""Which number stands for which event, and how old bytes become today's events.

A stored event names its kind by a number that is never reused and a schema version; Python names
never reach the disk, so classes may be renamed and moved.  When an event's fields change, its
version is raised and an *upcaster* is registered that turns the field list of the version before
into the next one; bytes of every version ever written stay in ``tests/golden``.

Field kinds are declared with the helpers below; from them one checking constructor per class is
generated (as attrs generates ``__init__``), because replay decodes millions of events: the
generated code builds an unfrozen twin with the same slots and then gives it its real class, which
costs half of a frozen ``__init__``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Final, TypeVar, dataclass_transform

import attrs

from space._errors import EventDecodeError, UsageError

U32_MAX: Final = 2**32 - 1
U63_MAX: Final = 2**63 - 1
NAME_BYTES_MAX: Final = 255
PATH_BYTES_MAX: Final = 4095
XATTR_BYTES_MAX: Final = 65536
FRAMES_BYTES_MAX: Final = 1 << 20
MANIFEST_BYTES_MAX: Final = 32 << 20
DOCUMENT_BYTES_MAX: Final = 1 << 16
LINK_BYTES: Final = 16

E = TypeVar("E")
Upcaster = Callable[[list[Any]], list[Any]]

_KIND: Final = "check"


def _field(check: str, **kwargs: Any) -> Any:
    return attrs.field(metadata={_KIND: check}, **kwargs)


def identifier() -> Any:
    """A 128-bit id as 16 raw bytes."""
    return _field("type({0}) is bytes and len({0}) == 16")


def optional_identifier() -> Any:
    """A 128-bit id, or empty bytes for none."""
    return _field("type({0}) is bytes and len({0}) in (0, 16)")


def u32() -> Any:
    """An integer from 0 to 2**32 - 1."""
    return _field(f"type({{0}}) is int and 0 <= {{0}} <= {U32_MAX}")


def u63() -> Any:
    """An integer from 0 to 2**63 - 1: sizes, offsets, positions (the range of ``off_t``)."""
    return _field(f"type({{0}}) is int and 0 <= {{0}} <= {U63_MAX}")


def i64_or_none() -> Any:
    """A signed 64-bit integer (a time in nanoseconds), or None for "unchanged"."""
    return _field("({0} is None or type({0}) is int and -(1 << 63) <= {0} < 1 << 63)")


def u32_or_none() -> Any:
    """An integer from 0 to 2**32 - 1, or None for "unchanged"."""
    return _field(f"({{0}} is None or type({{0}}) is int and 0 <= {{0}} <= {U32_MAX})")


def blob(limit: int) -> Any:
    """Bytes, at most ``limit`` of them."""
    return _field(f"type({{0}}) is bytes and len({{0}}) <= {limit}")


def entry_name() -> Any:
    """A name in a directory: 1 to 255 bytes."""
    return _field(f"type({{0}}) is bytes and 0 < len({{0}}) <= {NAME_BYTES_MAX}")


def text(limit: int) -> Any:
    """A string of at most ``limit`` characters."""
    return _field(f"type({{0}}) is str and len({{0}}) <= {limit}")


@attrs.frozen
class Schema:
    """What the registry knows of one event class.

    Attributes:
        number: stable number on disk.
        version: schema version written today.
        fields: field names in wire order.
        upcasters: version → function from that version's fields to the next one's.
    """

    number: int
    version: int
    cls: type[Any]
    fields: tuple[str, ...]
    upcasters: dict[int, Upcaster] = attrs.field(factory=dict)

    @cached_property
    def write(self) -> Callable[[Any], list[Any]]:
        """Event → row ``[number, version, field…]`` to be stored; raises UsageError when a field is out of range."""
        return self._codecs[0]

    @cached_property
    def make(self) -> Callable[[list[Any]], Any]:
        """Fields in wire order → event; raises EventDecodeError."""
        return self._codecs[1]

    @cached_property
    def read(self) -> Callable[[list[Any]], tuple[bytes, Any]]:
        """Stored row ``[number, version, link, field…]`` → ``(link, event)``; raises EventDecodeError."""
        return self._codecs[2]

    @cached_property
    def _codecs(self) -> tuple[Callable[[Any], Any], Callable[[Any], Any], Callable[[Any], Any]]:
        # Compiled when first needed: a command that reads no events should not wait for it.
        return _codecs(self.number, self.version, self.cls, self._read_other)

    def _read_other(self, row: list[Any]) -> tuple[bytes, Any]:
        """A row that is not plainly one of the current version: an older one, or none at all."""
        if len(row) < 3 or type(row[2]) is not bytes or len(row[2]) != LINK_BYTES:
            raise EventDecodeError(f"{self.cls.__name__} without its chain link")
        return row[2], self.make(upcast(self, row[1], row[3:]))


BY_NUMBER: Final[dict[int, Schema]] = {}
BY_CLASS: Final[dict[type[Any], Schema]] = {}


@dataclass_transform(
    frozen_default=True,
    field_specifiers=(
        identifier,
        optional_identifier,
        u32,
        u63,
        i64_or_none,
        u32_or_none,
        blob,
        entry_name,
        text,
    ),
)
def event(number: int, *, version: int = 1) -> Callable[[type[E]], type[E]]:
    """Class decorator: a frozen event with its stable number and current schema version."""

    def register(cls: type[E]) -> type[E]:
        frozen: type[Any] = attrs.frozen(weakref_slot=False)(cls)
        if number in BY_NUMBER:
            raise ValueError(f"event number {number} is taken by {BY_NUMBER[number].cls.__name__}")
        fields = tuple(field.name for field in attrs.fields(frozen))
        schema = Schema(number, version, frozen, fields)
        BY_NUMBER[number] = BY_CLASS[frozen] = schema
        return frozen

    return register


def upcaster(number: int, from_version: int) -> Callable[[Upcaster], Upcaster]:
    """Registers how fields of ``from_version`` become those of the next version."""

    def register(function: Upcaster) -> Upcaster:
        BY_NUMBER[number].upcasters[from_version] = function
        return function

    return register


def upcast(schema: Schema, version: int, fields: list[Any]) -> list[Any]:
    """``fields`` of an older version as today's.

    Raises:
        EventDecodeError: the version is from the future or has no upcaster.
    """
    if type(version) is not int or not 0 < version <= schema.version:
        raise EventDecodeError(
            f"{schema.cls.__name__} has schema version {version!r}, this program knows up to {schema.version}",
            hint="upgrade space to read this log",
        )
    for step in range(version, schema.version):
        try:
            fields = schema.upcasters[step](fields)
        except (KeyError, ValueError, TypeError, IndexError):
            raise EventDecodeError(f"{schema.cls.__name__} version {version} has wrong fields") from None
    return fields


def _codecs(
    number: int, version: int, cls: type[Any], other: Callable[[list[Any]], tuple[bytes, Any]]
) -> tuple[Callable[[Any], Any], Callable[[Any], Any], Callable[[Any], Any]]:
    fields = attrs.fields(cls)
    names = [field.name for field in fields]
    templates = [(field.metadata[_KIND], field.name) for field in fields]
    checks = " and ".join(template.format(name) for template, name in templates)
    # Ids in memory are of a subclass of bytes; decoded ones are plain bytes, where the exact type is quicker to check.
    loose = [
        (template.replace("type({0}) is bytes", "isinstance({0}, bytes)"), name)
        for template, name in templates
    ]
    fit = " and ".join(template.format(name) for template, name in loose)
    twin = type(f"_{cls.__name__}", (), {"__slots__": tuple(names)})
    # Names of the generated code begin with an underscore: no field's does.
    build = [
        " _event = _new(_twin)",
        *(f" _event.{field} = {field}" for field in names),
        " _event.__class__ = _cls",
    ]
    lines = [
        "def write(_event):",
        *(f" {field} = _event.{field}" for field in names),
        f" if not ({fit}):",
        "  raise _unfit(_event)",
        f" return [{number}, {version}, {', '.join(names)}]",
        "def make(_row):",
        " try:",
        f"  {', '.join(names)}, = _row",
        " except (ValueError, TypeError):",
        "  raise _wrong(_cls, _row) from None",
        f" if not ({checks}):",
        "  raise _wrong(_cls, _row)",
        *build,
        " return _event",
        "def read(_row):",
        " try:",
        f"  _number, _version, _link, {', '.join(names)}, = _row",
        " except ValueError:",
        "  return _other(_row)",
        f" if not (_version == {version} and type(_link) is bytes and len(_link) == {LINK_BYTES} and {checks}):",
        "  return _other(_row)",
        *build,
        " return _link, _event",
    ]
    scope: dict[str, Any] = {
        "_new": object.__new__,
        "_twin": twin,
        "_cls": cls,
        "_other": other,
        "_wrong": _wrong,
        "_unfit": _unfit,
    }
    exec("\n".join(lines), scope)  # noqa: S102 - generated from field declarations above, as attrs does
    return scope["write"], scope["make"], scope["read"]


def _wrong(cls: type[Any], values: object) -> EventDecodeError:
    return EventDecodeError(f"not a {cls.__name__}: {_shortened(values)}")


def _unfit(event: object) -> UsageError:
    return UsageError(f"a value is out of its range: {_shortened(event)}")


def _shortened(value: object) -> str:
    shown = repr(value)
    return f"{shown[:120]}…" if len(shown) > 120 else shown

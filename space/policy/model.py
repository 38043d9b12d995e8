"""What a capsule's owner asks for, as one immutable value, its document form and its YAML form.

There is one way in for all three: :meth:`Policy.from_document` checks a plain dictionary (what an event
holds) and names the key at fault; :func:`parse_policy` turns YAML into such a dictionary, remembering the
line of every key, and puts the line in front of the same message.  The YAML accepted is the plain subset:
no anchors, aliases, tags or merge keys, so a document cannot expand beyond its own size.

``dedupe`` defaults to true for plain content only: with encryption it shows who stores equal frames, so it
has to be asked for.  ``docs/policy.md`` describes every key for users.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, final

import attrs

from space._errors import NotFoundError, PolicyFileError, UsageError
from space.policy.units import format_duration, parse_duration

if TYPE_CHECKING:
    import yaml

POLICY_BYTES_MAX: Final = 64 * 1024  # a policy is a page of text; more is a mistake or an attack
_DEPTH_MAX: Final = 4  # the deepest valid path is federation → targets → name, or → shards → data
_NAMES_MAX: Final = 64  # zones or transforms in one policy
_PRIORITY_MAX: Final = 100
SHARDS_MAX: Final = 32  # the most the erasure code computes with at once
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}", re.ASCII)


@final
class Compression(enum.StrEnum):
    """How frames are compressed.  ``auto`` chooses per frame and never the slow codec."""

    AUTO = "auto"
    NONE = "none"
    LZ4 = "lz4"
    ZSTD = "zstd"
    BROTLI = "brotli"


@final
class Encryption(enum.StrEnum):
    """How frames are encrypted."""

    NONE = "none"
    AES_256_GCM = "aes-256-gcm"
    AES_256_XTS = "aes-256-xts"


@final
class Sovereignty(enum.StrEnum):
    """How far content may travel: this node's zone storage, the zone, or the federation targets."""

    LOCAL = "local"
    ZONE = "zone"
    GLOBAL = "global"


@final
class Durability(enum.StrEnum):
    """What an acknowledged write survives: ``buffered`` a killed process, ``durable`` a power cut."""

    BUFFERED = "buffered"
    DURABLE = "durable"


LEVELS: Final[Mapping[Compression, range]] = {
    Compression.LZ4: range(1, 13),
    Compression.ZSTD: range(1, 23),
    Compression.BROTLI: range(12),
}


@final
class _InvalidKeyError(Exception):
    """A value at fault, and the path of keys that leads to it."""

    def __init__(self, message: str, *path: str) -> None:
        super().__init__(message)
        self.path = path


@final
class _ContradictionError(UsageError):
    """Values that are fine alone and cannot hold together; ``path`` leads to the key to change."""

    def __init__(self, reason: str, *path: str) -> None:
        super().__init__(f"policy: {'.'.join(path)}: {reason}")
        self.reason = reason
        self.path = path


@final
@attrs.frozen
class Shards:
    """How a payload is erasure-coded over zones: any ``data`` of ``data + parity`` shards give it back."""

    data: int
    parity: int

    @property
    def total(self) -> int:
        """Zones it takes."""
        return self.data + self.parity


def _dedupe_unless_encrypted(policy: Policy) -> bool:
    return policy.encryption is Encryption.NONE


@final
@attrs.frozen(kw_only=True, cache_hash=True)
class Policy:
    """Everything the owner of a capsule asks of the store.

    Attributes:
        compression: codec family; ``compression_level`` is its level, or None for the codec's default.
        encryption: cipher of the frames.
        dedupe: equal frames are stored once; with encryption this shows which frames are equal.
        transform: names of stream codecs, first applied first.
        rpo_ns: how far a federation target may lag behind, in nanoseconds; None: no promise.
        latency_target_ns: wanted latency of one operation, in nanoseconds; None: no promise.
        sovereignty: how far content may travel.
        federation_targets: zones that receive it; ``federation_priority`` 0-100 orders capsules, high first.
        federation_sealed: those zones hold encrypted content without being able to read it.
        federation_candidates: zones that may be made targets when there is reason to.
        federation_shards: the zones get one shard each instead of a replica; None: replicas.
        history_ns: how long overwritten content stays readable, in nanoseconds; None: for ever.
        durability: what an acknowledgement means.
        block_size: logical block size of block views, in bytes: 512 or 4096.

    Raises:
        UsageError: the values contradict each other.
    """

    compression: Compression = Compression.AUTO
    compression_level: int | None = None
    encryption: Encryption = Encryption.NONE
    dedupe: bool = attrs.Factory(_dedupe_unless_encrypted, takes_self=True)
    transform: tuple[str, ...] = ()
    rpo_ns: int | None = None
    latency_target_ns: int | None = None
    sovereignty: Sovereignty = Sovereignty.ZONE
    federation_targets: tuple[str, ...] = ()
    federation_priority: int = 0
    federation_sealed: bool = False
    federation_candidates: tuple[str, ...] = ()
    federation_shards: Shards | None = None
    history_ns: int | None = None
    durability: Durability = Durability.DURABLE
    block_size: int = 4096

    def __attrs_post_init__(self) -> None:
        for path, message in _contradictions(self):
            raise _ContradictionError(message, *path)

    def to_document(self) -> dict[str, Any]:
        """The canonical document: every key, always in this order, in the spelling of a policy file.

        Keys that came later are in it only where they say something: what was recorded before keeps its bytes.
        """
        level = "" if self.compression_level is None else f":{self.compression_level}"
        return {
            "compression": f"{self.compression.value}{level}",
            "dedupe": self.dedupe,
            "encryption": self.encryption.value,
            "transform": list(self.transform),
            "rpo": _duration_document(self.rpo_ns),
            "latency_target": _duration_document(self.latency_target_ns),
            "sovereignty": self.sovereignty.value,
            "federation": _federation_document(self),
            "history": _history_document(self.history_ns),
            "durability": self.durability.value,
            "block_size": self.block_size,
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Policy:
        """The policy a document means; absent keys take their defaults.

        Raises:
            UsageError: an unknown key, a wrong type or value, or a contradiction; the message names the key.
        """
        try:
            return _policy_of(_checked_mapping(document))
        except _InvalidKeyError as error:
            raise UsageError(": ".join(filter(None, ("policy", ".".join(error.path), str(error))))) from None


def parse_policy(text: str | bytes, *, source: str = "policy") -> Policy:
    """The policy written in YAML in ``text``; an empty document is the default policy.

    Args:
        text: the file's text or bytes (UTF-8), at most 64 KiB.
        source: name of the file, for messages.

    Raises:
        PolicyFileError: anything wrong, as ``SOURCE:LINE: what and where``.
    """
    return _parse(text, source, _policy_of)


_Parsed = TypeVar("_Parsed")


def _parse(text: str | bytes, source: str, read: Callable[[Mapping[str, Any]], _Parsed]) -> _Parsed:
    decoded = _decode(text, source)
    nodes = _compose(decoded, source)
    lines: dict[tuple[str, ...], int] = {}
    try:
        document = {} if nodes is None else _plain(nodes, (), lines)
        return read(_checked_mapping(document))
    except _InvalidKeyError as error:
        line = next(lines[error.path[:n]] for n in range(len(error.path), -1, -1) if error.path[:n] in lines)
        where = f"{'.'.join(error.path)}: " if error.path else ""
        raise PolicyFileError(f"{source}:{line}: {where}{error}") from None


def load_policy(path: str | Path) -> Policy:
    """The policy in the file at ``path``.

    Raises:
        NotFoundError: no such file.
        PolicyFileError: it cannot be read, or :func:`parse_policy` refuses it.
    """
    return _load(path, _policy_of)


def _load(path: str | Path, read: Callable[[Mapping[str, Any]], _Parsed]) -> _Parsed:
    try:
        with Path(path).open("rb") as file:
            return _parse(file.read(POLICY_BYTES_MAX + 1), str(path), read)
    except FileNotFoundError:
        raise NotFoundError(f"policy file {path} does not exist") from None
    except OSError as error:
        raise PolicyFileError(f"{path}: cannot be read: {error.strerror or error}") from None


@final
@attrs.frozen(kw_only=True)
class ArrivalPolicy:
    """How a zone encodes what other zones ship to it; what is None stays as it comes.

    Attributes:
        compression, compression_level: as in :class:`Policy`.
        encryption: cipher of the frames, under a data key of the zone's own; never ``none``: what came encrypted is
            not to lie there readable.
        dedupe: whether equal frames are stored once; None: as they come, and not at all where ``encryption`` is given.
        transform: names of functions that content goes through, first applied first.
    """

    compression: Compression | None = None
    compression_level: int | None = None
    encryption: Encryption | None = None
    dedupe: bool | None = None
    transform: tuple[str, ...] = ()

    def to_document(self) -> dict[str, Any]:
        """What was given, in the spelling of a policy file."""
        whole = self.frame_policy(Compression.NONE, Encryption.NONE, shared=False).to_document()
        given = (self.compression, self.encryption, self.dedupe, self.transform or None)
        found = {
            key: whole[key] for key, value in zip(_ARRIVAL_KEYS, given, strict=True) if value is not None
        }
        return found | ({"transform": list(self.transform)} if self.transform else {})

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> ArrivalPolicy:
        """The policy a document means.

        Raises:
            UsageError: a key that does not count on arrival, or a wrong value; the message names the key.
        """
        try:
            return _arrival_of(_checked_mapping(document))
        except _InvalidKeyError as error:
            raise UsageError(": ".join(filter(None, ("policy", ".".join(error.path), str(error))))) from None

    def frame_policy(self, compression: Compression, encryption: Encryption, *, shared: bool) -> Policy:
        """What is done with a frame that came so compressed, so encrypted, and ``shared`` or not."""
        cipher = self.encryption or encryption
        dedupe = (shared and self.encryption is None) if self.dedupe is None else self.dedupe
        return Policy(
            compression=self.compression or compression,
            compression_level=self.compression_level,
            encryption=cipher,
            dedupe=dedupe and cipher is not Encryption.AES_256_XTS,
        )


_ARRIVAL_KEYS: Final = ("compression", "encryption", "dedupe", "transform")


def parse_arrival_policy(text: str | bytes, *, source: str = "policy") -> ArrivalPolicy:
    """The arrival policy written in YAML in ``text``; an empty document lets everything be as it comes.

    Raises:
        PolicyFileError: anything wrong, as ``SOURCE:LINE: what and where``.
    """
    return _parse(text, source, _arrival_of)


def load_arrival_policy(path: str | Path) -> ArrivalPolicy:
    """The arrival policy in the file at ``path``.

    Raises:
        NotFoundError: no such file.
        PolicyFileError: it cannot be read, or :func:`parse_arrival_policy` refuses it.
    """
    return _load(path, _arrival_of)


# --- document → Policy ------------------------------------------------------------------------------


def _policy_of(document: Mapping[str, Any]) -> Policy:
    _refuse_unknown(document, _READERS)
    values: dict[str, Any] = {}
    for key, value in document.items():
        values |= _READERS[key](value, key)
    try:
        return Policy(**values)
    except _ContradictionError as error:
        raise _InvalidKeyError(error.reason, *error.path) from None


def _arrival_of(document: Mapping[str, Any]) -> ArrivalPolicy:
    for key in document:
        if key in _READERS and key not in _ARRIVAL_KEYS:
            counting = ", ".join(_ARRIVAL_KEYS)
            raise _InvalidKeyError(f"means nothing on arrival, where only {counting} count", key)
    _policy_of(document)  # what is wrong with any policy
    values: dict[str, Any] = {}
    for key, value in document.items():
        values |= _READERS[key](value, key)
    if values.get("encryption") is Encryption.NONE:
        reason = "what comes encrypted stays encrypted; leave it out to let everything be as it comes"
        raise _InvalidKeyError(reason, "encryption")
    return ArrivalPolicy(**values)


def _contradictions(policy: Policy) -> Iterator[tuple[tuple[str, ...], str]]:
    """Pairs of (key, reason) that keep this from being a policy."""
    level, levels = policy.compression_level, LEVELS.get(policy.compression)
    if level is not None and levels is None:
        yield ("compression",), f"{policy.compression.value} takes no level"
    elif level is not None and levels is not None and level not in levels:
        wanted = f"{levels.start} to {levels.stop - 1}"
        yield ("compression",), f"{policy.compression.value} has levels {wanted}, not {level}"
    if policy.encryption is Encryption.AES_256_XTS and policy.dedupe:
        yield ("dedupe",), "aes-256-xts frames cannot be deduplicated; use aes-256-gcm or dedupe: false"
    if policy.federation_targets and policy.sovereignty is not Sovereignty.GLOBAL:
        limit = policy.sovereignty.value
        yield ("federation", "targets"), f"need sovereignty: global; {limit} content must not leave its zone"
    if not policy.federation_targets and policy.federation_priority:
        yield ("federation", "priority"), "means nothing without federation.targets"
    if policy.federation_sealed and not policy.federation_targets:
        yield ("federation", "sealed"), "means nothing without federation.targets"
    elif policy.federation_sealed and policy.encryption is Encryption.NONE:
        yield ("federation", "sealed"), "needs encryption: what is stored as it is can be read wherever it is"
    if not policy.federation_targets and policy.rpo_ns is not None:
        yield ("rpo",), "means nothing without federation.targets: there is no second zone to lag behind"
    yield from _shards_contradictions(policy)
    if policy.federation_candidates and policy.sovereignty is not Sovereignty.GLOBAL:
        limit = policy.sovereignty.value
        yield (
            ("federation", "candidates"),
            f"need sovereignty: global; {limit} content must not leave its zone",
        )
    for name in policy.federation_candidates:
        if name in policy.federation_targets:
            yield ("federation", "candidates"), f"zone {name} is a target already"
    if policy.block_size not in (512, 4096):
        yield ("block_size",), f"must be 512 or 4096, not {policy.block_size}"


def _shards_contradictions(policy: Policy) -> Iterator[tuple[tuple[str, ...], str]]:
    shards, targets = policy.federation_shards, len(policy.federation_targets)
    if shards is None:
        return
    path = ("federation", "shards")
    if targets not in (shards.total, shards.total - 1):
        wanted = f"{shards.total} targets, or {shards.total - 1} and this zone"
        yield path, f"data: {shards.data} and parity: {shards.parity} need {wanted}, and there are {targets}"
    if policy.rpo_ns is not None:
        yield ("rpo",), "means nothing with federation.shards: they are made anew when the policy is applied"
    if policy.federation_candidates:
        yield ("federation", "candidates"), "mean nothing with federation.shards: every zone has its own"


def _compression(value: object, key: str) -> dict[str, Any]:
    name, separator, level = _text(value, key).partition(":")
    if separator and not (level.isascii() and level.isdecimal() and len(level) <= 2):
        raise _InvalidKeyError(f"the level must be a number, as in zstd:3, not {_shown(level)}", key)
    codec = _member(Compression, name, key)
    return {"compression": codec, "compression_level": int(level) if separator else None}


_Member = TypeVar("_Member", bound=enum.StrEnum)


def _member(members: type[_Member], value: object, key: str) -> _Member:
    text = _text(value, key)
    try:
        return members(text)
    except ValueError:
        names = [member.value for member in members]
        raise _InvalidKeyError(
            f"must be one of {', '.join(names)}, not {_shown(text)}{_nearest(text, names)}", key
        ) from None


def _choice(name: str, members: type[enum.StrEnum]) -> Callable[[object, str], dict[str, Any]]:
    return lambda value, key: {name: _member(members, value, key)}


def _flag(value: object, key: str) -> dict[str, Any]:
    return {key: _boolean(value, key)}


def _boolean(value: object, *path: str) -> bool:
    if not isinstance(value, bool):
        raise _InvalidKeyError(f"must be true or false, not {_shown(value)}", *path)
    return value


def _duration(value: object, *path: str) -> int:
    try:
        # An unquoted number reaches here as int: as text it gets the message about the missing unit.
        duration_ns = parse_duration(str(value) if type(value) is int else _text(value, *path))
    except UsageError as error:
        raise _InvalidKeyError(str(error), *path) from None
    return duration_ns


def _promise(value: object, key: str) -> dict[str, Any]:
    duration_ns = None if value is None else _duration(value, key)
    if duration_ns == 0:
        raise _InvalidKeyError("must be more than 0; leave it out to promise nothing", key)
    return {f"{key}_ns": duration_ns}


def _history(value: object, key: str) -> dict[str, Any]:
    if value in ("all", "none"):
        return {"history_ns": None if value == "all" else 0}
    return {"history_ns": _duration(value, key)}


def _federation(value: object, key: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise _InvalidKeyError(f"must be a mapping with targets and priority, not {_shown(value)}", key)
    _refuse_unknown(value, ("targets", "priority", "sealed", "candidates", "shards"), key)
    priority = _number(value.get("priority", 0), 0, _PRIORITY_MAX, key, "priority")
    return {
        "federation_targets": _zones(value.get("targets", []), key, "targets"),
        "federation_priority": priority,
        "federation_sealed": _boolean(value.get("sealed", False), key, "sealed"),
        "federation_candidates": _zones(value.get("candidates", []), key, "candidates"),
        "federation_shards": _shards(value.get("shards"), key, "shards"),
    }


def _zones(value: object, *path: str) -> tuple[str, ...]:
    zones = _names(value, *path)
    for index, name in enumerate(zones):
        if name in zones[:index]:
            raise _InvalidKeyError(f"zone {name} is listed twice", *path, str(index))
    return zones


def _shards(value: object, *path: str) -> Shards | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise _InvalidKeyError(f"must be a mapping with data and parity, not {_shown(value)}", *path)
    _refuse_unknown(value, ("data", "parity"), *path)
    for key in ("data", "parity"):
        if key not in value:
            raise _InvalidKeyError(f"lacks {key}", *path)
    data = _number(value["data"], 2, SHARDS_MAX - 1, *path, "data")
    return Shards(data, _number(value["parity"], 1, SHARDS_MAX - data, *path, "parity"))


def _number(value: object, low: int, high: int, *path: str) -> int:
    if type(value) is not int or not low <= value <= high:
        raise _InvalidKeyError(f"must be a whole number from {low} to {high}, not {_shown(value)}", *path)
    return value


def _transform(value: object, key: str) -> dict[str, Any]:
    return {"transform": _names(value, key)}


def _names(value: object, *path: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise _InvalidKeyError(f"must be a list of names, like [a, b], not {_shown(value)}", *path)
    if len(value) > _NAMES_MAX:
        raise _InvalidKeyError(f"holds {len(value)} names; {_NAMES_MAX} at most", *path)
    for index, name in enumerate(value):
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise _InvalidKeyError(
                f"{_shown(name)} is not a name: lower-case letters, digits, '.', '_' and '-', at most 63",
                *path,
                str(index),
            )
    return tuple(value)


def _block_size(value: object, key: str) -> dict[str, Any]:
    if type(value) is not int:
        raise _InvalidKeyError(f"must be 512 or 4096, not {_shown(value)}", key)
    return {key: value}


_READERS: Final[Mapping[str, Callable[[object, str], dict[str, Any]]]] = {
    "compression": _compression,
    "dedupe": _flag,
    "encryption": _choice("encryption", Encryption),
    "transform": _transform,
    "rpo": _promise,
    "latency_target": _promise,
    "sovereignty": _choice("sovereignty", Sovereignty),
    "federation": _federation,
    "history": _history,
    "durability": _choice("durability", Durability),
    "block_size": _block_size,
}


def _text(value: object, *path: str) -> str:
    if not isinstance(value, str):
        raise _InvalidKeyError(f"must be text, not {_shown(value)}", *path)
    return value


def _refuse_unknown(document: Mapping[str, Any], known: Iterable[str], *path: str) -> None:
    for key in document:
        if key not in known:
            raise _InvalidKeyError(f"unknown key{_nearest(str(key), known)}", *path, str(key))


def _nearest(text: str, known: Iterable[str]) -> str:
    from difflib import get_close_matches

    matches = get_close_matches(text[:64].lower(), list(known), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


def _shown(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 64 else text[:64] + "…"


def _duration_document(duration_ns: int | None) -> str | None:
    return None if duration_ns is None else format_duration(duration_ns)


def _federation_document(policy: Policy) -> dict[str, Any]:
    document: dict[str, Any] = {
        "targets": list(policy.federation_targets),
        "priority": policy.federation_priority,
    }
    if policy.federation_sealed:
        document["sealed"] = True
    if policy.federation_candidates:
        document["candidates"] = list(policy.federation_candidates)
    if policy.federation_shards is not None:
        document["shards"] = attrs.asdict(policy.federation_shards)
    return document


def _history_document(history_ns: int | None) -> str:
    if history_ns is None:
        return "all"
    return format_duration(history_ns) if history_ns else "none"


# --- YAML → document --------------------------------------------------------------------------------


def _decode(text: str | bytes, source: str) -> str:
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(data) > POLICY_BYTES_MAX:
        raise PolicyFileError(f"{source}:1: longer than {POLICY_BYTES_MAX} bytes: not a policy file")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PolicyFileError(f"{source}:{line}: byte 0x{data[error.start]:02x} is not UTF-8 text") from None


def _compose(text: str, source: str) -> yaml.Node | None:
    """The document's node tree, or None when it is empty."""
    import yaml

    try:
        _refuse_hostile(text, source)
        return yaml.compose(text, yaml.SafeLoader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, int(error.position)) + 1
        character = ord(error.character) if isinstance(error.character, str) else error.character
        raise PolicyFileError(f"{source}:{line}: the character U+{character:04X} is not allowed") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise PolicyFileError(f"{source}:{line}: not valid YAML: {error.problem or error.context}") from None


def _refuse_hostile(text: str, source: str) -> None:
    """Refuse what could expand or overflow the stack, before any tree is built (events come lazily)."""
    import yaml

    depth = documents = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        line = event.start_mark.line + 1
        documents += isinstance(event, yaml.DocumentStartEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise PolicyFileError(f"{source}:{line}: anchors and aliases are not allowed in a policy")
        if isinstance(event, yaml.NodeEvent) and getattr(event, "tag", None):
            raise PolicyFileError(f"{source}:{line}: tags are not allowed in a policy")
        if depth > _DEPTH_MAX:
            raise PolicyFileError(f"{source}:{line}: nested deeper than {_DEPTH_MAX} levels")
        if documents > 1:
            raise PolicyFileError(f"{source}:{line}: a second document; one policy a file")


def _plain(node: yaml.Node, path: tuple[str, ...], lines: dict[tuple[str, ...], int]) -> object:
    """The node as plain values; ``lines`` gets the line of every key and list item."""
    import yaml

    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, path)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*path, str(index)), lines) for index, item in enumerate(node.value)]
    document: dict[str, object] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise _at(key_node, lines, (*path, "?"), "a key must be plain text")
        key = key_node.value
        if key in document:
            raise _at(key_node, lines, (*path, key), f"given twice; first on line {lines[(*path, key)]}")
        lines[(*path, key)] = key_node.start_mark.line + 1
        document[key] = _plain(value_node, (*path, key), lines)
    return document


def _at(
    node: yaml.Node, lines: dict[tuple[str, ...], int], path: tuple[str, ...], why: str
) -> _InvalidKeyError:
    lines[path] = node.start_mark.line + 1
    return _InvalidKeyError(why, *path)


def _scalar(node: yaml.ScalarNode, path: tuple[str, ...]) -> object:
    text: str = node.value
    kind = node.tag.rpartition(":")[2]
    if kind == "null" and not path:
        return {}  # "---" and nothing more
    if kind == "null":
        raise _InvalidKeyError("has no value", *path)
    if kind == "bool":
        return text.lower() in ("true", "yes", "on")
    if kind == "int" and re.fullmatch(r"[+-]?(0|[1-9][0-9]{0,17})", text):
        return int(text)
    return text


def _checked_mapping(document: object) -> Mapping[str, Any]:
    if not isinstance(document, Mapping):
        raise _InvalidKeyError(f"a policy is a mapping of keys to values, not {_shown(document)}")
    return document


DEFAULT_POLICY: Final = Policy()

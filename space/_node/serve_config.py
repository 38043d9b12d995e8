"""The configuration file of ``space serve``: YAML with the options of the command as keys, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from space._errors import NotFoundError, UsageError
from space._node.caller import Document

CONFIG_BYTES_MAX: Final = 64 * 1024
"""A configuration is a page of text; more is a mistake."""

MOUNTS_MAX: Final = 64

KEYS: Final[dict[str, type]] = {
    "listen": str,
    "advertise": str,
    "shards": int,
    "http": str,
    "join": str,
    "node-id": int,
    "tls": str,
    "insecure": bool,
    "mount": list,
}
_NAMES: Final = {str: "a text", int: "a number", bool: "true or false", list: "a list of texts"}


def load(path: str) -> Document:
    """What a file says, by key; only keys that are in it.

    Raises:
        NotFoundError: there is no such file.
        UsageError: it is wrong; the message names the line.
    """
    try:
        with Path(path).open("rb") as file:
            raw = file.read(CONFIG_BYTES_MAX + 1)
    except FileNotFoundError:
        raise NotFoundError(f"{path}: no such file or directory") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    if len(raw) > CONFIG_BYTES_MAX:
        raise UsageError(f"{path}: more than {CONFIG_BYTES_MAX} bytes")
    try:
        return parse(raw.decode(), path)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}:{raw.count(10, 0, error.start) + 1}: not UTF-8 text") from None


def parse(text: str, source: str) -> Document:
    """As :func:`load`, of a text."""
    import yaml

    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UsageError(
            f"{source}:{mark.line + 1 if mark else 1}: not valid YAML: {error.problem or error.context}"
        ) from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{source}: not valid YAML: {error!s:.120}") from None
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(f"{source}:{root.start_mark.line + 1}: not a list of keys and values")
    found: Document = {}
    for key_node, value_node in root.value:
        where = f"{source}:{key_node.start_mark.line + 1}"
        key = key_node.value
        if not isinstance(key, str) or key not in KEYS:
            raise UsageError(f"{where}: unknown key {key!r:.60}", hint=f"there are: {', '.join(KEYS)}")
        if key in found:
            raise UsageError(f"{where}: {key} is given twice")
        found[key] = _value(value_node, KEYS[key], f"{where}: {key}")
    return found


def _value(node: Any, wanted: type, where: str) -> Any:
    import yaml

    if wanted is list:
        if not isinstance(node, yaml.SequenceNode) or len(node.value) > MOUNTS_MAX:
            raise UsageError(f"{where} is {_NAMES[wanted]}")
        return [_value(each, str, where) for each in node.value]
    if not isinstance(node, yaml.ScalarNode):
        raise UsageError(f"{where} is {_NAMES[wanted]}")
    if wanted is str:
        return node.value
    value = yaml.SafeLoader("").construct_object(node)
    if type(value) is not wanted:
        raise UsageError(f"{where} is {_NAMES[wanted]}, not {node.value!r:.60}")
    return value

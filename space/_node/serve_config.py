"""The configuration file of ``space serve``: YAML with the options of the command as keys, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from space._errors import NotFoundError, UsageError
from space._node.caller import Document

if TYPE_CHECKING:
    from space._node.csi_servers import Listening
    from space._node.nfs_node import NfsOptions
    from space._node.nvme_node import NvmeOptions

CONFIG_BYTES_MAX: Final = 64 * 1024
"""A configuration is a page of text; more is a mistake."""

MOUNTS_MAX: Final = 64


@attrs.frozen
class View:
    """An NVMe, NFS or CSI view that a node serves, with its keys, as ``space project`` has its options."""

    kind: str
    keys: Document

    def nvme(self) -> NvmeOptions:
        """As the node takes it.

        Raises:
            UsageError: an address, a name or a secret is wrong.
        """
        from space._node.nvme_access import parse_access
        from space._node.nvme_node import NvmeOptions
        from space._node.nvme_view import parse_listen

        keys = self.keys
        access = parse_access(keys.get("hosts", ()), keys.get("host-keys", ()), keys.get("controller-key"))
        listen = parse_listen(keys["listen"])
        return NvmeOptions(tuple(keys["sources"]), listen, keys.get("read-only", False), access)

    def nfs(self) -> NfsOptions:
        """As the node takes it.

        Raises:
            UsageError: an address, a network, or a length of time is wrong.
        """
        from space._node.nfs_node import NfsOptions
        from space._node.nfs_view import parse_options
        from space._node.nvme_view import parse_listen

        keys = self.keys
        offer = parse_options(
            read_only=keys.get("read-only", False),
            squash=keys.get("squash", "root"),
            clients=keys.get("clients", ()),
            lease=keys.get("lease"),
            grace=keys.get("grace"),
            refer=keys.get("refer", ()),
        )
        return NfsOptions(tuple(keys["sources"]), parse_listen(keys["listen"]), offer)

    def csi(self) -> Listening:
        """As the node takes it.

        Raises:
            UsageError: an address, a network, or a length of time is wrong; or there is nothing to serve.
        """
        from space._node.csi_servers import Listening
        from space._node.nfs_view import parse_options
        from space._node.nvme_view import joined, parse_listen

        keys = self.keys
        nfs, nvme = (parse_listen(keys[each]) if each in keys else None for each in ("nfs", "nvme"))
        if nfs is None and nvme is None:
            raise UsageError("a csi view serves nfs, nvme, or both", hint="nfs: HOST:PORT, nvme: HOST:PORT")
        offer = parse_options(
            read_only=False,
            squash="none",
            clients=keys.get("clients", ()),
            lease=keys.get("lease"),
            grace=None,
        )
        leads = joined(*parse_listen(keys["nfs-address"])) if "nfs-address" in keys else ""
        return Listening(nfs, nvme, keys.get("advertise", ""), offer.rules, offer.lease_seconds, leads)


KEYS: Final[dict[str, type]] = {
    "listen": str,
    "advertise": str,
    "shards": int,
    "http": str,
    "federation": str,
    "join": str,
    "node-id": int,
    "tls": str,
    "insecure": bool,
    "mount": list,
    "views": View,
}
_ANY_VIEW: Final[dict[str, type]] = {"view": str, "sources": list, "listen": str, "read-only": bool}
VIEW_KEYS: Final[dict[str, dict[str, type]]] = {
    "nvme": {**_ANY_VIEW, "hosts": list, "host-keys": list, "controller-key": str},
    "nfs": {**_ANY_VIEW, "squash": str, "clients": list, "lease": int, "grace": int, "refer": list},
    "csi": {"view": str, "nfs": str, "nvme": str, "advertise": str, "nfs-address": str}
    | {"clients": list, "lease": int},
}
_NAMES: Final = {
    str: "a text",
    int: "a number",
    bool: "true or false",
    list: "a list of texts",
    View: "a list of views",
}


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
    return {} if root is None else _mapping(root, KEYS, source)


def _mapping(root: Any, keys: dict[str, type], source: str) -> Document:
    """The keys and values of a mapping; only keys that are known."""
    import yaml

    if not isinstance(root, yaml.MappingNode):
        raise UsageError(f"{source}:{root.start_mark.line + 1}: not a list of keys and values")
    found: Document = {}
    for key_node, value_node in root.value:
        where = f"{source}:{key_node.start_mark.line + 1}"
        key = key_node.value
        if not isinstance(key, str) or key not in keys:
            raise UsageError(f"{where}: unknown key {key!r:.60}", hint=f"there are: {', '.join(keys)}")
        if key in found:
            raise UsageError(f"{where}: {key} is given twice")
        if keys[key] is View:
            found[key] = [_view(each, source) for each in _items(value_node, f"{where}: {key}", View)]
        else:
            found[key] = _value(value_node, keys[key], f"{where}: {key}")
    return found


def _view(node: Any, source: str) -> View:
    where = f"{source}:{node.start_mark.line + 1}"
    kind = _kind(node, source)
    if kind not in VIEW_KEYS:
        raise UsageError(
            f"{where}: a view is {' or '.join(VIEW_KEYS)}, not {kind!r:.60}", hint="mounts have the key mount"
        )
    found = _mapping(node, VIEW_KEYS[kind], source)
    for key in ("sources", "listen"):
        if key in VIEW_KEYS[kind] and not found.get(key):
            raise UsageError(f"{where}: an {kind} view needs {key}")
    return View(kind, found)


def _kind(node: Any, source: str) -> str | None:
    """Which view it is, which says what other keys there are."""
    import yaml

    if not isinstance(node, yaml.MappingNode):
        raise UsageError(f"{source}:{node.start_mark.line + 1}: not a list of keys and values")
    return next((value.value for key, value in node.value if key.value == "view"), None)


def _items(node: Any, where: str, wanted: type) -> list[Any]:
    import yaml

    if not isinstance(node, yaml.SequenceNode) or len(node.value) > MOUNTS_MAX:
        raise UsageError(f"{where} is {_NAMES[wanted]}")
    return list(node.value)


def _value(node: Any, wanted: type, where: str) -> Any:
    import yaml

    if wanted is list:
        return [_value(each, str, where) for each in _items(node, where, list)]
    if not isinstance(node, yaml.ScalarNode):
        raise UsageError(f"{where} is {_NAMES[wanted]}")
    if wanted is str:
        return node.value
    value = yaml.SafeLoader("").construct_object(node)
    if type(value) is not wanted:
        raise UsageError(f"{where} is {_NAMES[wanted]}, not {node.value!r:.60}")
    return value

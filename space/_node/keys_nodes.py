"""Another master key on all nodes of a cluster: each has it in its file before the log knows of it.

A node asks the others over their own connections, in whose TLS both sides prove themselves.  Every member has to
answer: one that is down would come back to rows it cannot open, and its file would keep the old key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from space._errors import RefusedError, SpaceError, Status, UnavailableError, UsageError
from space._node.keys import add_key, erase_old
from space._node.keys_file import FILES
from space.content.keys import KEY_BYTES, master_fingerprint

if TYPE_CHECKING:
    from space._node.cluster import ClusterNode
    from space._node.store import Store

METHOD: Final = "keys"
"""How what nodes ask each other about keys begins (see ``Node.on_call``)."""

_TAKE: Final = f"{METHOD} take "
_DROP: Final = f"{METHOD} drop"
_DROP_SOLE: Final = f"{METHOD} drop sole"

ASK_SECONDS: Final = 30.0
"""A node answers after it has written a file."""

KNOWN_SECONDS: Final = 10.0
"""What a node has it says at once: one that does not is down, and nobody has to wait longer to hear that."""


class OtherNodes:
    """The other members of a cluster, as :class:`space._node.keys.Others`."""

    def __init__(self, node: ClusterNode) -> None:
        self._node = node

    def take(self, shard: int, key: bytes) -> None:
        """Gives the others a master key, unless they have it.

        Raises:
            UnavailableError: one does not answer.
            RefusedError: one cannot change its file, or there is no TLS between nodes.
        """
        number = master_fingerprint(key)
        for node in self._others():
            known = self._ask(node, shard, METHOD, KNOWN_SECONDS)
            if not isinstance(known, list):
                raise UnavailableError(f"node {node} gave a malformed answer", hint="is it older or newer?")
            if number in known:
                continue
            if self._node.server_tls is None:
                raise RefusedError(
                    f"node {node} has not the new master key, and nodes speak without TLS here",
                    hint="add the last line of this node's master key file to that node's, and run it again",
                    status=Status.NOT_PERMITTED,
                )
            self._ask(node, shard, _TAKE + key.hex())

    def drop(self, *, sole: bool) -> list[str]:
        kept = []
        for node in self._others():
            try:
                self._ask(node, 0, _DROP_SOLE if sole else _DROP)
            except SpaceError as error:
                kept.append(f"node {node}: {error}")
        return kept

    def _others(self) -> list[int]:
        store = self._node.store
        return sorted(number for number in store.members() if number != self._node.config.node)

    def _ask(self, node: int, shard: int, method: str, seconds: float = ASK_SECONDS) -> Any:
        async def ask(running: Any) -> Any:
            answer, _ = await running.transport.request(node, "call", [shard, method], timeout=seconds)
            return answer

        try:
            return self._node.call(ask, seconds=2 * seconds)
        except UnavailableError as error:
            raise UnavailableError(
                f"node {node} does not answer, and every node needs the new master key: {Exception.__str__(error)}",
                hint="start it, or take it out of the cluster: space cluster remove",
            ) from None
        except UsageError as error:
            raise RefusedError(
                f"node {node}: {error}", hint="is it older?", status=Status.NOT_PERMITTED
            ) from None


def answer(stores: Sequence[Store], shard: int, method: str) -> Any:
    """What another node is told about this node's master keys.

    Raises:
        SpaceError: the file cannot be changed.
        UsageError: the question is not known.
    """
    store = stores[shard]
    if method == METHOD:
        store.load_master_keys()
        return list(store._keyring.masters)
    if method.startswith(_TAKE):
        _take(store, method.removeprefix(_TAKE))
    elif method in (_DROP, _DROP_SOLE):
        if store.master_file.shared and method != _DROP_SOLE:
            raise RefusedError(
                f"other stores may use {store.master_file.path}",
                hint="--sole if none does",
                status=Status.NOT_PERMITTED,
            )
        for each in stores:
            with each._read():
                pass  # what was decided before is applied here by now
        erase_old(stores)
    else:
        raise UsageError("not a question about keys", hint="is that node newer?")
    return None


def _take(store: Store, text: str) -> None:
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise UsageError("not a master key")
    with FILES:
        keys = store.master_file.load()
        if not keys:
            raise RefusedError(
                f"there is no master key at {store.master_file.path}, and this cluster has one",
                hint="give the node the cluster's master key first",
                status=Status.NOT_PERMITTED,
            )
        if key not in keys:
            add_key(store, keys, key)
    store.load_master_keys()

"""What a source of the NVMe view means: one capsule, or the block devices of a tree as they come and go.

Block devices of a tree are the files in it that were made with a block size: others may lie beside them.  A tree is
looked at again when one of its directories has changed, or a device that had not one block yet; that is cheap to find
out, so that writes to the devices, which move the store's position all the time, cost no walk.

Everything here blocks: not for a loop.
"""

from __future__ import annotations

from typing import Final

from space._errors import NotFoundError, UsageError
from space._node.reading import Reading, Stat
from space.events.ids import CapsuleId
from space.events.types import Kind

TREE_NAMES_MAX: Final = 4096
"""Names in a tree, of whatever kind: each directory is looked at several times a second."""


class Source:
    """A source as the user has named it."""

    def __init__(self, reading: Reading, text: str) -> None:
        """What ``text`` (an id or a path) leads to now.

        Raises:
            NotFoundError, UsageError: it leads nowhere.
        """
        self.text = text
        self._reading = reading
        self._capsule = reading.resolve(text)
        self.is_tree = reading.stat(self._capsule).kind == Kind.DIRECTORY
        self._watched: dict[CapsuleId, int] = {}

    def capsules(self) -> dict[CapsuleId, str]:
        """The capsules to serve, and what to call each.

        Raises:
            UsageError: the tree is too large to be followed.
        """
        if not self.is_tree:
            return {self._capsule: self.text}
        self._watched = {}
        found = {}
        for number, (path, stat) in enumerate(self._reading.walk(self._capsule)):
            if number > TREE_NAMES_MAX:
                raise UsageError(
                    f"{self.text} has more than {TREE_NAMES_MAX} names",
                    hint="keep block devices in a tree of their own",
                )
            whole = _is_device(stat) and stat.size >= stat.block_size
            if whole and stat.id not in found:
                name = path.decode(errors="backslashreplace")
                found[stat.id] = f"{self.text.rstrip('/')}/{name}"
            elif stat.kind == Kind.DIRECTORY or _is_device(stat):
                self._watched[stat.id] = stat.change
        return found

    def changed(self) -> bool:
        """Whether :meth:`capsules` may find something else than the last time."""
        return any(self._change(each) != change for each, change in self._watched.items())

    def _change(self, capsule: CapsuleId) -> int | None:
        try:
            return self._reading.stat(capsule).change
        except NotFoundError:
            return None


def _is_device(stat: Stat) -> bool:
    return stat.kind == Kind.FILE and stat.block_size > 0

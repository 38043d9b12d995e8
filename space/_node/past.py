"""A past moment as a reading: throw-away tables from the nearest checkpoint and the log."""

from __future__ import annotations

import os
import shutil
import uuid
from typing import TYPE_CHECKING

from space._node import history
from space._node.reading import Reading
from space.events.ids import Moment, parse_moment

if TYPE_CHECKING:
    from space._node.store import Store


class Past(Reading):
    """The store right after a moment; read-only, and independent of what happens meanwhile."""

    def __init__(self, store: Store, moment: str | Moment) -> None:
        """Builds the tables.

        Raises:
            NotFoundError: the log does not reach the moment.
            UsageError: not a moment.
        """
        found = parse_moment(moment, now_ns=store._clock()) if isinstance(moment, str) else moment
        self.target = history.locate(store.log, found)
        self._scratch = store.path / history.SCRATCH / f"past-{os.getpid()}-{uuid.uuid4().hex[:12]}"
        tables = history.build(store.path, store.log, store.views, self._scratch, self.target)
        super().__init__(tables, store._content)

    def close(self) -> None:
        """Removes the tables; closing twice does nothing."""
        if self._scratch.exists():
            self._tables.close(seal=False)
            shutil.rmtree(self._scratch, ignore_errors=True)

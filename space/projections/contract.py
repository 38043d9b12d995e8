"""What a view must provide, and the registry of views.

A view is a read model in tables of its own.  It is folded from events alone: it never reads another
view's tables or the state's, so that any one of them can be dropped and rebuilt by itself, and two
folds of the same events give the same rows.  ``tests/property/test_view_contract.py`` holds every
registered view to that.

Views from outside this package are found through the entry point group ``space.views``: each entry
point names a :class:`View` object.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any, Final, Protocol

from space._errors import UsageError
from space.statemachine.apply import Context
from space.statemachine.tables import Writer

FIRST_VIEW_TABLE: Final = 32
FIRST_OUTSIDE_TABLE: Final = 128
LAST_TABLE: Final = 255

Handler = Callable[[Context, Any], None]


class Folder(Protocol):
    """One run of a view's fold within one transaction."""

    @property
    def handlers(self) -> Mapping[type[Any], Handler]:
        """Event class → what it does to the view; classes not named do nothing."""

    def flush(self) -> None:
        """Writes everything still held back into the transaction; called once, at its end."""


class View(Protocol):
    """A projection of the event stream.

    Attributes:
        name: what ``space replay --view`` calls it.
        version: raised when the rows change; an older view is rebuilt when the store is opened.
        tables: table number (unique over all views, 32 to 255) → table name.
    """

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int: ...

    @property
    def tables(self) -> Mapping[int, str]: ...

    def folder(self, txn: Writer) -> Folder:
        """A fold that continues from what ``txn`` holds."""


def builtin_views() -> list[View]:
    """The views this package comes with."""
    from space.projections.content_map import ContentMapView
    from space.projections.dedup import DedupView

    return [ContentMapView(), DedupView()]


def registered_views() -> list[View]:
    """All views: our own and those other packages registered.

    Raises:
        UsageError: a registered view is unusable or collides with another.
    """
    views = builtin_views()
    for point in entry_points(group="space.views"):
        view: View = point.load()
        if any(not FIRST_OUTSIDE_TABLE <= table <= LAST_TABLE for table in view.tables):
            raise UsageError(
                f"view {view.name} ({point.value}) uses tables outside {FIRST_OUTSIDE_TABLE}–{LAST_TABLE}"
            )
        views.append(view)
    names = [view.name for view in views]
    tables = [table for view in views for table in view.tables]
    if len(set(names)) < len(names) or len(set(tables)) < len(tables):
        raise UsageError(f"two views share a name or a table number: {names}")
    return views

"""What several files of this tier begin with; a file that wants another store or view says so itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import space
from tests.nfs_support import Serve, View


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A new store."""
    path = tmp_path / "data"
    space.open(path).close()
    return path


@pytest.fixture
def serve(data: Path) -> Iterator[Serve]:
    """Starts NFS views of the store, and ends those that still run."""
    views: list[View] = []

    def started(*arguments: str) -> View:
        view = View(data, [*(arguments or ("--path", "/", "--squash", "none"))])
        views.append(view)
        view.start()
        return view

    yield started
    for view in views:
        if view.process.poll() is None:
            view.stop()

"""Which processes serve views of a store: one small file each in ``DIR/views``, while its process lives.

The files are notes for ``space project ls`` and ``stop``, and nothing depends on them: one that is damaged,
or left by a killed process, is shown as dead or not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from space._errors import NotFoundError, RefusedError, UnavailableError
from space._node.caller import Document

VIEWS: Final = "views"
STOP_SECONDS: Final = 10.0
STOP_POLL_SECONDS: Final = 0.01
NOTE_BYTES_MAX: Final = 1 << 16


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot (proc(5)); 0 if there is none.

    It tells a process from a later one with the same id.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return 0
    state, fields = stat.rpartition(") ")[2][0], stat.rpartition(") ")[2].split()
    return 0 if state == "Z" else int(fields[19])


@contextlib.contextmanager
def registered(home: Path, view: Document) -> Iterator[None]:
    """Notes ``view`` (with its ``name`` and ``target``) as served by this process, until the end."""
    directory = home / VIEWS
    directory.mkdir(exist_ok=True)
    for old in listed(home):
        if old["target"] == view["target"]:
            _forget(home, old["name"])
    note = {**view, "pid": os.getpid(), "process_start": start_time(os.getpid())}
    path = directory / f"{view['name']}.json"
    path.write_text(json.dumps(note, ensure_ascii=True))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _forget(home: Path, name: str) -> None:
    (home / VIEWS / f"{name}.json").unlink(missing_ok=True)


def listed(home: Path) -> list[Document]:
    """All views noted, oldest first, each with its ``state``: running or dead."""
    found = []
    with contextlib.suppress(OSError):
        for path in (home / VIEWS).glob("*.json"):
            note = _read_note(path)
            if note is not None:
                alive = 0 < start_time(note["pid"]) == note["process_start"]
                found.append({**note, "state": "running" if alive else "dead"})
    return sorted(found, key=lambda note: (note["started_ns"], note["name"]))


def _read_note(path: Path) -> Document | None:
    """A note, if it is whole."""
    try:
        with path.open("rb") as file:
            note = json.loads(file.read(NOTE_BYTES_MAX))
        types = {"target": str, "view": str, "pid": int, "process_start": int, "started_ns": int}
        whole = all(type(note[key]) is kind for key, kind in types.items()) and note["pid"] > 0
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return {**note, "name": path.stem} if whole else None


def find(home: Path, wanted: str) -> Document:
    """The view with that name or target.

    Raises:
        NotFoundError: there is none.
    """
    names = {wanted, os.path.realpath(wanted)}  # an address is a target as well as a directory is
    found = [note for note in listed(home) if wanted == note["name"] or note["target"] in names]
    if not found:
        raise NotFoundError(f"no view {wanted}", hint="space project ls shows what there is")
    return found[-1]


def stop(home: Path, wanted: str) -> Document:
    """Ends the view with that name or target and waits until it is gone.

    A view whose process was killed only leaves a dead mount, which is cleared away.

    Raises:
        NotFoundError: there is none.
        RefusedError: its process is another user's.
        UnavailableError: it has not ended yet.
    """
    note = find(home, wanted)
    if note["state"] == "running":
        _end(note)
    else:
        _clear(note)
        _forget(home, note["name"])
    return note


def _end(note: Document) -> None:
    pid = note["pid"]
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        return
    except PermissionError:
        raise RefusedError(f"process {pid} that serves {note['target']} is another user's") from None
    deadline = time.monotonic() + STOP_SECONDS
    while start_time(pid) == note["process_start"]:
        if time.monotonic() > deadline:
            raise UnavailableError(
                f"process {pid} that serves {note['target']} has not ended yet",
                hint="programs may be using it",
            )
        time.sleep(STOP_POLL_SECONDS)


def _clear(note: Document) -> None:
    from space.projections.fuse import mount

    if note["view"] in {"fuse", "csi"} and mount.is_dead(note["target"]):
        mount.unmount(note["target"])

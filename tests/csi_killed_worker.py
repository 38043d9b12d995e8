"""The driver, with a step at which somebody is killed: it counts the steps of staging and publishing as it takes them.

``CSI_STEPS`` names a file.  While it is there, steps are counted in it, and it says who dies before which: with
``3 driver 5`` three were taken, and this process is killed before the fifth; ``owner`` owns the store.  Steps are
the calls that change something: notes kept and dropped, calls of the kernel, files made and removed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from space._node import csi_host, csi_mounts, csi_network
from space._node.views import start_time
from space.cli import main

_LOCK = threading.Lock()
_ARMED = Path(os.environ["CSI_STEPS"])


def _step() -> None:
    with _LOCK:
        if not _ARMED.exists():
            return
        count, who, number = _ARMED.read_text().split()
        taken = int(count) + 1
        _ARMED.write_text(f"{taken} {who} {number}")
        if taken == int(number):
            _kill(who)


def _kill(who: str) -> None:
    if who == "driver":
        os.kill(os.getpid(), signal.SIGKILL)
    data = Path(sys.argv[sys.argv.index("--data") + 1])
    for note in (data / "views").glob("csi-*.json"):
        found = json.loads(note.read_text())
        if start_time(found["pid"]) == found["process_start"]:
            os.kill(found["pid"], signal.SIGKILL)


def _counted(work: Callable[..., Any], *, ends: bool) -> Callable[..., Any]:
    """``work`` with a step before it, and one after it where that may be the last thing a call does."""

    @functools.wraps(work)
    def run(*arguments: Any, **more: Any) -> Any:
        _step()
        found = work(*arguments, **more)
        if ends:
            _step()
        return found

    return run


def watch() -> None:
    """Counts from now on."""
    for owner, names in (
        (csi_mounts, ("_call", "unmount", "_configure", "detach_loop")),
        (csi_network, ("_mount", "_ask_fabrics", "_delete")),
        (csi_host, ("_make_file", "_remove", "give_to_group")),
        (csi_host.Notes, ("keep", "drop")),
    ):
        for name in names:
            setattr(owner, name, _counted(getattr(owner, name), ends=owner is csi_host.Notes))


if __name__ == "__main__":
    watch()
    with contextlib.suppress(KeyboardInterrupt):
        main()

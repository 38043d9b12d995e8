"""Mounts that a running node serves itself, each in a thread with a loop of its own.

They stay while leaders change: what a program asks of the mount meanwhile waits for the next leader.  A look
through the mount is at most :data:`LOOK_SECONDS` old; what was written through it is seen at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs

from space._errors import ConflictError, NotFoundError, SpaceError, UnavailableError
from space._node import views
from space._node.caller import Document
from space._node.local_vfs import LocalFileSystem

if TYPE_CHECKING:
    from concurrent.futures import Future

    from space._node.member import Member
    from space.projections.fuse.mount import Ending, Ready

LOOK_SECONDS: Final = 0.05
"""How old a look through a mount may be: a question to the leader for each of a program's calls would be slow."""

READY_SECONDS: Final = 60.0
END_SECONDS: Final = 60.0

log: Final = logging.getLogger("space.fuse")


@attrs.define
class _Mount:
    """One mount and its thread."""

    view: Document
    ending: Ending
    thread: threading.Thread


class Mounts:
    """The mount of a node: pyfuse3 keeps one session a process."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._lock = threading.Lock()
        self._mount: _Mount | None = None
        self._closed = False

    def mount(
        self, store_of: Callable[[str], Member], source: str, target: str, *, read_only: bool
    ) -> Document:
        """Mounts a tree or capsule at ``target``; returns when it answers.

        Raises:
            ConflictError: this process has a mount already.
            SpaceError: it cannot be mounted.
        """
        from concurrent.futures import Future

        from space.projections.fuse import mount as fuse

        fuse.check_available()
        ready: Future[Document] = Future()
        with self._lock:
            if self._closed:
                raise UnavailableError("this node is stopping")
            if self._mount is not None and self._mount.thread.is_alive():
                raise ConflictError(
                    f"this node serves a mount at {self._mount.view['target']} already",
                    hint="a node has one at a time: space project stop, or mount on another node",
                )
            view = self._view(source, target, read_only=read_only)
            ending = fuse.Ending()
            thread = threading.Thread(
                target=self._serve, args=(store_of, view, ending, ready), name="space-mount", daemon=True
            )
            self._mount = _Mount(view, ending, thread)
            thread.start()
        try:
            return ready.result(READY_SECONDS)
        except TimeoutError:
            ending.end()
            raise UnavailableError(f"the mount at {target} is not ready") from None

    def _view(self, source: str, target: str, *, read_only: bool) -> Document:
        return {
            "view": "fuse",
            "name": f"fuse-{os.getpid()}",
            "source": source,
            "at": None,
            "read_only": read_only,
            "target": target,
            "address": target,
            "pid": os.getpid(),
            "started_ns": time.time_ns(),
            "node": True,
        }

    def _serve(
        self, store_of: Callable[[str], Member], view: Document, ending: Ending, ready: Future[Document]
    ) -> None:
        """The mount's thread."""
        from space.projections.fuse import mount as fuse

        begun = time.monotonic()
        try:
            store = store_of(view["source"])
            with contextlib.ExitStack() as stack:
                stack.enter_context(store.relaxed(LOOK_SECONDS))
                files = LocalFileSystem(store, store.resolve(view["source"]), read_only=view["read_only"])

                def on_ready(found: Ready) -> None:
                    view.update(target=found.target, address=found.target)
                    stack.enter_context(views.registered(self._home, view))
                    ready_ms = round((time.monotonic() - begun) * 1000, 1)
                    ready.set_result({**view, "ready_ms": ready_ms, "notices": list(found.notices)})

                fuse.serve(
                    files, view["target"], fsname=f"space:{view['source']}", on_ready=on_ready, ending=ending
                )
        except SpaceError as error:
            self._ended(error, view, ready)
        except Exception as error:
            log.exception("the mount at %s broke", view["target"])
            self._ended(SpaceError(f"{type(error).__name__}: {error}"), view, ready)

    def _ended(self, error: SpaceError, view: Document, ready: Future[Document]) -> None:
        if ready.done():
            log.error("the mount at %s: %s", view["target"], error)
        else:
            ready.set_exception(error)

    def end(self, target: str) -> Document:
        """Ends the mount at ``target`` and waits until it is gone.

        Raises:
            NotFoundError: there is none.
            UnavailableError: it has not ended yet.
        """
        with self._lock:
            found = self._mount
        if found is None or not found.thread.is_alive() or found.view["target"] != os.path.realpath(target):
            raise NotFoundError(f"this node serves no mount at {target}", hint="space project ls")
        found.ending.end()
        found.thread.join(END_SECONDS)
        if found.thread.is_alive():
            raise UnavailableError(
                f"the mount at {target} has not ended yet", hint="programs may be using it"
            )
        return dict(found.view)

    def close(self) -> None:
        """Ends what is mounted, and takes no more."""
        with self._lock:
            self._closed = True
            found = self._mount
        if found is not None:
            found.ending.end()
            found.thread.join(END_SECONDS)

"""Runs ``space`` with the secrets of its TLS connections written down, so that a test can read what it sends.

    python -m tests.keylogging FILE [--unfiltered] ARGUMENTS…

Nothing in the program itself can do that.  ``--unfiltered`` breaks the promise of federation: everything is taken to be
allowed everywhere.  A test that then sees nothing does not look.
"""

from __future__ import annotations

import ssl
import sys
from typing import Any


def keep_secrets(file: str) -> None:
    """Writes the secrets of every connection of this process to a file."""
    plain = ssl.SSLContext.__new__

    def made(cls: type[ssl.SSLContext], *arguments: Any, **options: Any) -> ssl.SSLContext:
        context: ssl.SSLContext = plain(cls, *arguments, **options)
        context.keylog_filename = file
        return context

    ssl.SSLContext.__new__ = made  # type: ignore[assignment]


def allow_everything() -> None:
    """Lets every capsule go everywhere."""
    from space.federation.selection import Selection

    Selection.lane = lambda *_: 0  # type: ignore[method-assign]


if __name__ == "__main__":
    _, secrets, *rest = sys.argv
    keep_secrets(secrets)
    if rest[0] == "--unfiltered":
        allow_everything()
        rest = rest[1:]
    from space.cli import main

    sys.argv = ["space", *rest]
    sys.exit(main())

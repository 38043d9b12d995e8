"""A process that a benchmark asks for things, anywhere it can run a command: in a network namespace, say.

What to do comes as lines of JSON on standard input, ``[method, argument…]``; each gets one line, ``{"result": …}`` or
``{"error": text}``.  The process ends with its input, so none stays behind a benchmark that was killed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.peers.programs import Asked, Program
from space._errors import SpaceError


class Child(Asked):
    """Such a process, from outside."""

    def __init__(self, home: Path, server: str, *arguments: Any, prefix: Sequence[str] = ()) -> None:
        """Starts one.

        Args:
            home: a directory of its own; what it complains about is in a file beside it.
            server: ``module:Class`` of what answers, with ``close``.
            arguments: of the class; they pass as JSON.
            prefix: a command that runs what follows it.

        Raises:
            RuntimeError: it does not come up.
        """
        command = [*prefix, sys.executable, "-m", "bench.federation.child", server, json.dumps(arguments)]
        self.program = Program(command, home, talk=True)
        try:
            self.answer()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends it."""
        with contextlib.suppress(OSError):
            self.program.input.close()
        self.program.end()


def main(server: str, arguments: str) -> None:
    """Answers until the input ends."""
    module, name = server.split(":")
    with contextlib.closing(
        getattr(importlib.import_module(module), name)(*json.loads(arguments))
    ) as answers:
        print(json.dumps({"result": "ready"}), flush=True)
        for line in sys.stdin:
            method, *given = json.loads(line)
            try:
                answer = {"result": getattr(answers, method)(*given)}
            except (SpaceError, OSError, RuntimeError) as error:
                answer = {"error": f"{name}.{method}: {type(error).__name__}: {error}"}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])

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

from bench.peers.programs import Program
from space._errors import SpaceError


class Child:
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

    def tell(self, method: str, *arguments: Any) -> None:
        """Asks for something; the answer is taken later."""
        self.program.input.write(json.dumps([method, *arguments]).encode() + b"\n")
        self.program.input.flush()

    def answer(self) -> Any:
        """The answer to the oldest question.

        Raises:
            RuntimeError: it is an error, or the process has ended.
        """
        line = self.program.output.readline()
        if not line:
            raise RuntimeError(f"a process of the benchmark ended: {self.program.last_words()}")
        document = json.loads(line)
        if "error" in document:
            raise RuntimeError(document["error"])
        return document["result"]

    def ask(self, method: str, *arguments: Any) -> Any:
        """Asks, and waits for the answer."""
        self.tell(method, *arguments)
        return self.answer()

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

"""Server programs under a benchmark: started in a directory of their own, ended by their process id."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Final

END_SECONDS: Final = 20.0
WAIT_SECONDS: Final = 60.0
POLL_SECONDS: Final = 0.02
_LOG_TAIL: Final = 400

HOST: Final = "127.0.0.1"


def find(program: str) -> str | None:
    """Where a program is: beside the interpreter (from a package of the virtual environment), or on PATH."""
    beside = Path(sys.executable).parent / program
    return str(beside) if os.access(beside, os.X_OK) else shutil.which(program)


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((HOST, 0))
        return [int(each.getsockname()[1]) for each in sockets]


class Program:
    """A running program; its output goes to a file in its directory, unless it is talked to."""

    def __init__(self, command: Sequence[str], home: Path, *, talk: bool = False) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self._log = home.parent / f"{home.name}.log"
        with self._log.open("ab") as output:
            self.process: subprocess.Popen[bytes] = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if talk else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talk else output,
                stderr=output,
                cwd=Path(__file__).resolve().parents[2],
            )

    @property
    def input(self) -> IO[bytes]:
        """What it reads."""
        assert self.process.stdin is not None
        return self.process.stdin

    @property
    def output(self) -> IO[bytes]:
        """What it prints."""
        assert self.process.stdout is not None
        return self.process.stdout

    def last_words(self) -> str:
        """The end of what it complained about."""
        return self._log.read_text(errors="replace").strip()[-_LOG_TAIL:]

    def kill(self) -> float:
        """Ends it with SIGKILL; says when, by ``time.monotonic``."""
        killed = time.monotonic()
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self._close()
        return killed

    def end(self) -> None:
        """Ends it politely, or, if that takes too long, otherwise."""
        self.process.terminate()
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._close()

    def _close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def wait_for(what: str, question: Callable[[], Any], seconds: float = WAIT_SECONDS) -> Any:
    """Asks until the answer is true, and gives it; errors count as not yet.

    Raises:
        RuntimeError: it takes too long.
    """
    deadline = time.monotonic() + seconds
    problem = ""
    while time.monotonic() < deadline:
        try:
            if answer := question():
                return answer
        except (OSError, RuntimeError, ValueError, LookupError) as error:
            problem = f": {error}"
        time.sleep(POLL_SECONDS)
    raise RuntimeError(f"{what} did not happen within {seconds:.0f} s{problem}")


class Asked:
    """Whoever has a program that is talked to: lines of JSON, each question with one answer, in order."""

    program: Program

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

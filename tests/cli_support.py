"""Running the command line, in this process and in others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import attrs

ROOT: Final = Path(__file__).parents[1]


@attrs.frozen
class Outcome:
    """What a command left: its exit status and what it printed."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def complaint(self) -> str:
        """The one line on stderr that a refused command leaves."""
        assert self.err.startswith("space: "), self.err
        assert self.err.count("\n") == 1, self.err
        assert "Traceback" not in self.err
        return self.err


def environment(data: Path) -> dict[str, str]:
    """What a command of the user's sees."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SPACE_")}
    return {**kept, "SPACE_DATA": str(data), "PYTHONPATH": str(ROOT)}


def command(*arguments: str | Path) -> list[str]:
    """The command line as a process of its own."""
    return [sys.executable, "-m", "space.cli", *map(str, arguments)]


def start(data: Path, *arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    """A command that goes on running."""
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(command(*arguments), text=True, env=environment(data), **options)


def finish(process: subprocess.Popen[str]) -> Outcome:
    """The outcome of a started command."""
    out, err = process.communicate()
    return Outcome(process.returncode, out, err)


def execute(data: Path, *arguments: str | Path, **options: Any) -> Outcome:
    """A whole command in a process of its own."""
    return finish(start(data, *arguments, **options))


def keys(document: Mapping[str, Any]) -> set[str]:
    """The names in a JSON object."""
    return set(document)

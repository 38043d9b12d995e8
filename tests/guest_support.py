"""Jobs in a throw-away guest, where the Linux kernel is the host (tests/guest/guest.sh)."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from tests.cli_support import ROOT

GUEST: Final = ROOT / "tests" / "guest"
GUEST_SECONDS: Final = 500
"""Where a guest that hangs is given up; software emulation takes minutes for what User-Mode Linux does in seconds."""
POLL_SECONDS: Final = 0.05


def run(
    arguments: Sequence[str], prelude: str, body: str, tmp_path: Path, **answers: Callable[..., object]
) -> str:
    """What a job prints in a guest, which must end well; ``answers`` are what it can ask for.

    The job is a file of tests/guest that all its kind begin with, and ``body``.
    """
    share = tmp_path / "share"
    share.mkdir(exist_ok=True)
    job = tmp_path / "job.sh"
    job.write_text((GUEST / prelude).read_text() + body)
    guest: list[str | Path] = [GUEST / "guest.sh", "-c", "4", "-t", str(GUEST_SECONDS), "-s", share, job]
    output = tmp_path / "output"
    with output.open("w") as file:
        process = subprocess.Popen([*guest, *arguments], stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        try:
            while process.poll() is None:
                _answer(share, answers)
                time.sleep(POLL_SECONDS)
        finally:
            process.terminate()
            process.wait()
    text = output.read_text(errors="replace")
    assert process.returncode == 0, text
    return text


def _answer(share: Path, answers: dict[str, Callable[..., object]]) -> None:
    asked = share / "ask"
    if asked.exists():
        name, *arguments = asked.read_text().split()
        (share / "answer").write_text(f"{answers[name](*arguments)}\n")
        asked.unlink()


def facts(text: str) -> dict[str, str]:
    """The lines ``name=value`` of an output."""
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line.partition(" ")[0])

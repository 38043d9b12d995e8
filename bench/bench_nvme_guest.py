"""``nvme_guest``: the kernel's own NVMe/TCP target over a RAM disk beside ours, both in a guest, to the kernel's host.

The guest is that of the tests (``tests/guest/guest.sh``; see docs/nvme.md), so this runs only where SPACE_GUEST=1 asks
for it.  It has one processor.  The kernel's target makes no system calls there, ours pays for each:
a few microseconds to tens of them under User-Mode Linux and under emulation.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Final

from bench.measure import ROOT, Row, Scale
from bench.nvme.cases import BLOCK, CASES, Case

AIM_SMALL: Final = 0.25
AIM_SEQUENTIAL: Final = 0.5
GUEST_SECONDS_MAX: Final = 1800
_JOB: Final = ROOT / "bench" / "nvme" / "guest.sh"
_GUEST: Final = ROOT / "tests" / "guest" / "guest.sh"


def run(scale: Scale) -> list[Row]:
    """Commands and megabytes a second in the guest; nothing where no guest is asked for."""
    if os.environ.get("SPACE_GUEST") != "1":
        scale.note("nvme_guest: boots a virtual machine: set SPACE_GUEST=1 (docs/nvme.md)")
        return []
    with tempfile.TemporaryDirectory() as share:
        _share(Path(share))
        output = _guest(Path(share), scale)
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for line in output.splitlines():
        words = line.split()
        if len(words) == 4 and words[1] in {"ours", "nvmet"}:
            found.setdefault((words[0], words[1]), []).append((float(words[2]), float(words[3])))
    return [row for number, case in enumerate(CASES) for row in _rows(case, found, str(number))]


def _rows(case: Case, found: dict[tuple[str, str], list[tuple[float, float]]], key: str) -> list[Row]:
    factor, unit = (1.0, "commands/s") if case.size == BLOCK else (case.size / 1e6, "MB/s")
    (ours, ours_p99), (nvmet, nvmet_p99) = (
        [statistics.median(values) for values in zip(*found[key, name], strict=True)]
        for name in ("ours", "nvmet")
    )
    return [
        Row(case.name, unit, ours * factor, "nvmet", nvmet * factor),
        Row(f"{case.name}: p99", "us", ours_p99 / 1e3, "nvmet", nvmet_p99 / 1e3),
    ]


def _guest(share: Path, scale: Scale) -> str:
    """What the job prints; the guest has one of this machine's processors.

    Raises:
        RuntimeError: it failed.
    """
    cases = [f"{number}:{case.operation}:{case.size}:{case.depth}" for number, case in enumerate(CASES)]
    rounds, seconds = (1, 1) if scale.quick else (3, 4)
    span = scale.pick(128 << 20, 16 << 20)
    processor = max(os.sched_getaffinity(0))
    kernel = os.environ.get("SPACE_GUEST_KERNEL")
    options = [*(("-k", kernel) if kernel else ()), "-c", "1", "-m", "3072", "-t", str(GUEST_SECONDS_MAX)]
    command = [
        "taskset",
        "-c",
        str(processor),
        _GUEST,
        *options,
        "-s",
        share,
        _JOB,
        str(seconds),
        str(rounds),
    ]
    done = subprocess.run(
        [*command, str(span), *cases], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the guest ended with {done.returncode}: {(done.stdout + done.stderr)[-1000:]}")
    return done.stdout


def _share(share: Path) -> None:
    """The sources and the packages they need, for an interpreter of the same version."""
    shutil.copytree(ROOT / "space", share / "source" / "space", ignore=shutil.ignore_patterns("__pycache__"))
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    todo, seen = [*map(_name, wanted), "uvloop"], set[str]()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # wanted under conditions that are not ours, or uvloop, without which it works
        todo += [_name(each) for each in distribution.requires or () if "extra ==" not in each]
        for file in distribution.files or ():
            if ".." not in file.parts and "__pycache__" not in file.parts:
                target = share / "packages" / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(str(distribution.locate_file(file)), target)


def _name(requirement: str) -> str:
    """The name at the beginning of a requirement."""
    end = next((at for at, each in enumerate(requirement) if not (each.isalnum() or each in "-_.")), None)
    return requirement[:end]

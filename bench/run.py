"""Runs benchmarks and prints ours, the peer and the ratio: ``python -m bench.run [NAME…] [--json]``.

It works from a checkout, where this directory is; the installed package does not carry it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json as jsonlib
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from bench.measure import DATA, Row, Scale
from space._errors import SpaceError, UsageError

NAMES: Final = (
    "wal",
    "replay",
    "putget",
    "open",
    "view",
    "cluster",
    "nvme",
    "nvme_guest",
    "nfs",
    "csi",
    "resolve",
    "federation",
)
"""In the order they run when none is named."""


def main(
    names: Sequence[str],
    *,
    json: bool = False,
    quick: bool = False,
    factor: float = 1.0,
    directory: str | Path | None = None,
) -> int:
    """Runs the named benchmarks (none: all), prints a table each, or with ``json`` one document at the end.

    Args:
        quick: smoke sizes.
        factor: multiplies full sizes.
        directory: where data goes and is removed from; it should be on the disk to be measured.

    Returns:
        0, or 1 if one could not be run; the others are run all the same.

    Raises:
        UsageError: no such benchmark.
    """
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise UsageError(f"no benchmark {unknown[0]!r}", hint=f"there are: {', '.join(NAMES)}")
    home = Path(directory or DATA).resolve()
    scale = Scale(quick, factor, home, _note)
    document: dict[str, Any] = {"machine": machine(), "quick": quick, "scale": factor, "benchmarks": {}}
    failed = 0
    for name in names or NAMES:
        started = time.perf_counter()
        found: dict[str, Any] = {"rows": []}
        try:
            rows = _runner(name)(scale)
            found["rows"] = [row.to_json() for row in rows]
        except (SpaceError, OSError, RuntimeError, ImportError) as error:
            failed = 1
            rows = []
            found["error"] = str(error)
            print(f"{name}: could not be run: {error}", file=sys.stderr)
        found["seconds"] = time.perf_counter() - started
        document["benchmarks"][name] = found
        if rows and not json:
            print(f"{name} ({found['seconds']:.0f} s)\n{table(rows)}\n", flush=True)
    with contextlib.suppress(OSError):
        home.rmdir()
    if json:
        print(jsonlib.dumps(document, indent=1))
    return failed


def _runner(name: str) -> Callable[[Scale], list[Row]]:
    run: Callable[[Scale], list[Row]] = importlib.import_module(f"bench.bench_{name}").run
    return run


def machine() -> dict[str, Any]:
    """Where it ran."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
    }


def table(rows: Sequence[Row]) -> str:
    """Rows as aligned text.  A ratio above 1 means ours is better."""
    lines = [("case", "unit", "ours", "peer", "its value", "ratio")]
    lines += [
        (row.case, row.unit, number(row.ours), row.peer, number(row.value), number(row.ratio)) for row in rows
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(6)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in (2, 4, 5) else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def number(value: float | None) -> str:
    """Three significant digits, thousands apart; nothing for None."""
    if value is None:
        return ""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _note(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description="Benchmarks against baselines.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which ones: {', '.join(NAMES)}")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of tables")
    parser.add_argument("--quick", action="store_true", help="smoke sizes: shows that it works, no more")
    parser.add_argument("--scale", type=float, default=1.0, metavar="X", help="multiply full sizes")
    parser.add_argument("--directory", metavar="DIR", help=f"where data goes (default: {DATA})")
    return parser.parse_args()


if __name__ == "__main__":
    given = _arguments()
    try:
        status = main(
            given.names, json=given.json, quick=given.quick, factor=given.scale, directory=given.directory
        )
    except SpaceError as problem:
        print(f"bench: {problem}", file=sys.stderr)
        status = problem.kind.exit_status
    sys.exit(status)

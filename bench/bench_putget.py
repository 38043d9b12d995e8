"""``putget``: a large file into the store and out of it, against ``cp`` and against restic and borg.

Half of the file is text that compresses, half random bytes, in turns of 1 MiB.  Everything ends with the bytes
synced.  ``cp`` neither hashes nor compresses; restic and borg hash, deduplicate and compress (and restic
encrypts), from Debian's packages ``restic`` and ``borgbackup``; where one is missing, its row says so.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from bench.measure import ROOT, Row, Scale, in_child, in_turn, run_command
from space._node.store import Store

FILE_BYTES: Final = 2 << 30
RSS_MIB_AIM: Final = 300
_PIECE: Final = 1 << 20
_NAME: Final = "/large"
_CLI: Final = (sys.executable, "-c", "from space.cli import main; main()")
_PACKAGES: Final = {"restic": "restic", "borg": "borgbackup"}
_SECRET: Final = {"RESTIC_PASSWORD": "bench", "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes"}


def run(scale: Scale) -> list[Row]:
    """Seconds a put and a get take, and the peak memory of both."""
    size = scale.pick(FILE_BYTES, 32 << 20)
    with scale.workspace("putget") as home:
        source = home / "source"
        generate(source, size)
        contest = _Contest(home, source)
        puts, gets = in_turn(contest.puts()), in_turn(contest.gets())
        contest.check()
        memory = {"put": contest.put_rss, "get": contest.get_rss}
    rows = []
    for action, seconds in (("put", puts), ("get", gets)):
        rows += _compared(f"{action} {size >> 20} MiB", seconds)
    return rows + [
        Row(f"{action}, peak memory", "MiB", rss / 2**20, "aim", RSS_MIB_AIM)
        for action, rss in memory.items()
    ]


def _compared(case: str, seconds: dict[str, float]) -> list[Row]:
    rows = [
        Row(f"{case} ({how})", "s", seconds[how], peer, value)
        for how in ("library", "CLI")
        for peer, value in seconds.items()
        if peer not in {"library", "CLI"}
    ]
    missing = [name for name in _PACKAGES if name not in seconds]
    rows += [
        Row(case, "s", seconds["library"], f"{name}: not here (apt: {_PACKAGES[name]})") for name in missing
    ]
    return rows


def generate(path: Path, size: int, seed: int = 1) -> None:
    """A file of text and random bytes in turns, always the same; no piece of it comes twice."""
    chance = random.Random(seed)
    words = [chance.randbytes(chance.randint(2, 6)).hex().encode() for _ in range(4096)]
    text = b" ".join(chance.choices(words, k=1 << 20))
    with path.open("wb", buffering=0) as file:
        for number in range(-(-size // _PIECE)):
            length = min(_PIECE, size - number * _PIECE)
            if number % 2:
                at = chance.randrange(len(text) - _PIECE)
                file.write(text[at : at + length])
            else:
                file.write(chance.randbytes(length))
        os.fsync(file.fileno())


class _Contest:
    """Every method puts the file into a place of its own once a round, and gets it from there."""

    def __init__(self, home: Path, source: Path) -> None:
        self._home = home
        self._source = source
        self.put_rss = 0
        self.get_rss = 0

    def puts(self) -> dict[str, Callable[[], float]]:
        known = {
            "library": self._put,
            "CLI": self._put_cli,
            "cp": self._cp,
            "restic": self._restic,
            "borg": self._borg,
        }
        return {name: call for name, call in known.items() if name not in _PACKAGES or shutil.which(name)}

    def gets(self) -> dict[str, Callable[[], float]]:
        known = {
            "library": self._get,
            "CLI": self._get_cli,
            "cp": self._cp_back,
            "restic": self._restic_back,
            "borg": self._borg_back,
        }
        return {name: call for name, call in known.items() if name not in _PACKAGES or shutil.which(name)}

    def check(self) -> None:
        """Raises RuntimeError if what came back is not what went in."""
        for name in ("out-library", "out-cli"):
            if subprocess.run(["cmp", self._source, self._home / name], check=False).returncode:
                raise RuntimeError(f"{name} differs from the source")

    def _fresh(self, name: str) -> Path:
        path = self._home / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        os.sync()
        return path

    def _out(self, name: str) -> Path:
        path = self._home / name
        path.unlink(missing_ok=True)
        os.sync()
        return path

    def _put(self) -> float:
        child = in_child("bench.bench_putget:put", str(self._fresh("library")), str(self._source))
        self.put_rss = max(self.put_rss, child.rss_bytes)
        return child.seconds

    def _get(self) -> float:
        child = in_child("bench.bench_putget:get", str(self._home / "library"), str(self._out("out-library")))
        self.get_rss = max(self.get_rss, child.rss_bytes)
        return child.seconds

    def _space(self, *arguments: str | Path) -> float:
        command = (*_CLI, "--data", self._home / "cli", *arguments)
        return run_command(command, PYTHONPATH=str(ROOT))

    def _put_cli(self) -> float:
        self._fresh("cli")
        return self._space("put", self._source, "--name", _NAME)

    def _get_cli(self) -> float:
        out = self._out("out-cli")
        return self._space("get", _NAME, "-o", out) + run_command(("sync", out))

    def _copy(self, source: Path, target: Path) -> float:
        return run_command(("cp", source, target)) + run_command(("sync", target))

    def _cp(self) -> float:
        return self._copy(self._source, self._fresh("cp") / "large")

    def _cp_back(self) -> float:
        return self._copy(self._home / "cp" / "large", self._out("out-cp"))

    def _restic(self) -> float:
        repository = self._fresh("restic")
        run_command(("restic", "-q", "-r", repository, "init"), **_SECRET)
        return run_command(("restic", "-q", "-r", repository, "backup", self._source), **_SECRET)

    def _restic_back(self) -> float:
        out = self._fresh("out-restic")
        return run_command(
            ("restic", "-q", "-r", self._home / "restic", "restore", "latest", "--target", out), **_SECRET
        ) + run_command(("sync", "-f", out))

    def _borg(self) -> float:
        repository = self._fresh("borg")
        run_command(("borg", "init", "-e", "none", repository), **_SECRET)
        return run_command(("borg", "create", f"{repository}::a", self._source), **_SECRET)

    def _borg_back(self) -> float:
        out = self._out("out-borg")
        with out.open("wb") as file:
            name = str(self._source).lstrip("/")
            return run_command(
                ("sh", "-c", 'borg extract --stdout "$0" "$1" > "$2" && sync "$2"',
                 f"{self._home / 'borg'}::a", name, file.name), **_SECRET,
            )  # fmt: skip


def put(home: str, source: str) -> int:
    """The library's put, from a file."""
    with Store(home) as store, open(source, "rb", buffering=0) as file:
        return store.put(file, name=_NAME).size


def get(home: str, target: str) -> int:
    """The library's reading of a capsule into a file, synced."""
    with Store(home) as store, open(target, "wb", buffering=0) as file:
        file.writelines(store.stream(store.resolve(_NAME)))
        os.fsync(file.fileno())
        return file.tell()

"""A log opened for reading while another process writes it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from space.wal.disk import RealDisk
from space.wal.log import Log

ROOT = Path(__file__).parents[2]
STORE = b"0123456789abcdef"

WRITER = """
import os, random, sys, threading
from space.wal.disk import RealDisk
from space.wal.log import Log

log = Log.open(RealDisk(), sys.argv[1], store_id=b"0123456789abcdef", segment_bytes=int(sys.argv[2]))
rng = random.Random(5)
while True:
    index = log.last_index + 1
    size = rng.choice((0, 0, 100, 4096, 9000))
    log.append(b"m%d:%d" % (index, size), [bytes([index % 251]) * size], time_ns=index)
    if rng.random() < 0.5:
        log.sync(index)
    if size == 9000 and rng.random() < 0.2:
        log.punch(index, 0, size)
    os.pwrite(1, b"%20d" % index, 0)
"""


@pytest.fixture(params=[2**14, 2**20], ids=["rotating", "appending"])
def writer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A process that appends without a pause, and notes what it has appended."""
    note = tmp_path / "appended"
    with note.open("w") as out:
        command = [sys.executable, "-c", WRITER, str(tmp_path / "log"), str(request.param)]
        process = subprocess.Popen(command, stdout=out, cwd=ROOT)
    while not note.read_text():
        assert process.poll() is None
    yield tmp_path
    assert process.poll() is None
    process.kill()
    process.wait()


def test_a_log_is_read_while_it_is_written(writer: Path) -> None:
    """However appends, rotations, seals and punched payloads fall, all that was appended before is read, in order."""
    for _ in range(150):
        appended = int((writer / "appended").read_text())
        log = Log.open(RealDisk(), str(writer / "log"), store_id=STORE, read_only=True)
        assert log.last_index >= appended
        start = max(1, log.last_index - 50)
        texts = [record.metadata.split(b":")[0] for record in log.records(start)]
        assert texts == [b"m%d" % index for index in range(start, log.last_index + 1)]
        log.close()


def _rotate(log: Log) -> None:
    for index in range(4, 60):
        log.append(b"m%d" % index, [bytes(1000)], time_ns=index)


@pytest.mark.parametrize(
    "happens",
    [lambda log: log.punch(3, 0, 9000), lambda log: log.append(b"m4", time_ns=4), _rotate],
    ids=["punch", "append", "rotate"],
)
def test_what_happens_between_two_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, happens: Callable[[Log], object]
) -> None:
    """A payload reclaimed, a record appended or segments begun after the first look hide nothing that was there."""
    directory = str(tmp_path / "log")
    log = Log.open(RealDisk(), directory, store_id=STORE, segment_bytes=2**16)
    for index in (1, 2, 3):
        log.append(b"m%d" % index, [bytes([index]) * 9000], time_ns=index)
    look, waiting = RealDisk.listdir, [happens]

    def look_and_wait(disk: RealDisk, path: str) -> list[str]:
        names = look(disk, path)
        if waiting:
            waiting.pop()(log)
        return names

    monkeypatch.setattr(RealDisk, "listdir", look_and_wait)
    reader = Log.open(RealDisk(), directory, store_id=STORE, read_only=True)
    assert not waiting
    assert reader.last_index >= 3
    assert [record.metadata for record in reader.records(1, 4)] == [b"m1", b"m2", b"m3"]
    reader.close()
    log.close()

"""A log opened for reading while another process writes it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
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

"""A real process on a real disk, killed while it appends."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from space.wal.disk import RealDisk
from space.wal.log import Log

ROOT = Path(__file__).parents[2]
STORE = b"0123456789abcdef"

WRITER = """
import random, sys, threading
from space.wal.disk import RealDisk
from space.wal.log import Log

log = Log.open(RealDisk(), sys.argv[1], store_id=b"0123456789abcdef", segment_bytes=2**17)
rng = random.Random(int(sys.argv[2]))
lock = threading.Lock()

def work():
    while True:
        with lock:
            index = log.last_index + 1
            size = rng.choice((0, 100, 4096, 20_000))
            log.append(b"m%d:%d" % (index, size), [bytes([index % 251]) * size], time_ns=index)
        log.sync(index)
        with lock:
            sys.stdout.write(f"{index}\\n")
            sys.stdout.flush()

for _ in range(4):
    threading.Thread(target=work).start()
"""


def killed_after(directory: str, seed: int, acknowledgements: int) -> int:
    """Run a writer, kill -9 it after some acknowledgements; returns the highest it gave."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, directory, str(seed)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as writer:
        assert writer.stdout is not None
        lines = [writer.stdout.readline() for _ in range(acknowledgements)]
        writer.kill()
        lines += writer.stdout.readlines()
    return max(int(line) for line in lines if re.fullmatch(r"\d+\n", line))


@pytest.mark.parametrize("seed", range(4))
def test_acknowledged_batches_survive_kill_9(tmp_path: Path, seed: int) -> None:
    """Killed again and again under load: every acknowledged batch is there, whole and in order."""
    directory = str(tmp_path / "log")
    rng = random.Random(seed)
    for round_ in range(4):
        acknowledged = killed_after(directory, round_, rng.randint(1, 120))
        log = Log.open(RealDisk(), directory, store_id=STORE)
        assert log.recovery.watermark <= log.last_index
        assert log.last_index >= acknowledged
        for expected, info in enumerate(log.records(1), 1):
            index, size = map(int, info.metadata[1:].split(b":"))
            assert (info.index, index, info.payload_length) == (expected, expected, size)
            assert log.read_payload(index, 0, size) == bytes([index % 251]) * size
        assert list(log.verify()) == []
        log.close(clean=round_ % 2 == 0)

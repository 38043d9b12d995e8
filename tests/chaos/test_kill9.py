"""kill -9 at any moment: every acknowledged command is there, once; nothing else is."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Final

import attrs
import pytest
from hypothesis import settings

import space
from space._node.store import Store
from space.events.commands import Receipt
from space.events.types import Kind
from tests.chaos.kill9_worker import SEGMENT_BYTES, Model, Step, claim_of, script

ROOT: Final = Path(__file__).parents[2]
ROUNDS: Final = 300 if settings.default is not None and settings.default.max_examples > 1000 else 24


@attrs.define
class Life:
    """What one process reported until it was killed: per directory, how many steps are done."""

    lines: list[str] = attrs.field(factory=list)
    done: dict[str, int] = attrs.field(factory=dict)

    def hear(self, line: str) -> None:
        """One report."""
        self.lines.append(line)
        words = line.split()
        if words[0] == "done":
            self.done[words[1]] = max(int(words[2]), self.done.get(words[1], 0))
        assert words[0] != "failed", line


def live_and_die(home: Path, seed: str, rng: random.Random) -> Life:
    """Starts a worker and kills it: while it opens, soon after, or later."""
    lives = rng.choice(["one", "many"])
    trigger, longest = rng.choice([("opening", 0.1), ("done", 0.2), ("done", 0.8), ("closing", 0.05)])
    if lives == "one" and trigger == "closing":
        trigger = "done"
    command = [sys.executable, "-m", "tests.chaos.kill9_worker", str(home), seed, lives]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    life = Life()
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        for line in child.stdout:
            life.hear(line.decode().strip())
            if life.lines[-1].startswith(trigger):
                break
        time.sleep(rng.uniform(0, longest))
        child.send_signal(signal.SIGKILL)
        for line in child.stdout:
            life.hear(line.decode().strip())
        assert child.wait() == -signal.SIGKILL, life.lines
    return life


def steps_of(directory: str, done: int) -> tuple[list[Step], list[Model]]:
    """The steps reported as done and the one that may have been under way; the models before and after it."""
    drawn = list(islice(script(directory), done + 1))
    models: list[Model] = [{}, *(model for _, model in drawn)]
    return [step for step, _ in drawn], models[done : done + 2]


def listing(store: Store, directory: str) -> Model:
    """Names and bytes of the files in a directory."""
    return {
        name.decode(): store.read(stat.id)
        for name, stat in store.walk(store.resolve("/" + directory))
        if stat.kind == Kind.FILE
    }


def check(store: Store, life: Life, kept: dict[str, Model]) -> None:
    """All acknowledged steps are there, at most one more, and retrying a claim does nothing."""
    for directory, done in life.done.items():
        steps, (before, after) = steps_of(directory, done)
        found = listing(store, directory)
        assert found in (before, after), f"{directory} after {done} steps"
        for step in [step for step in steps[:-1] if step.verb == "claim"][-3:]:
            (outcome,) = store.execute_all([claim_of(store, directory, step)])
            assert isinstance(outcome, Receipt)
            assert outcome.repeated
        if steps[-1].verb == "claim":
            (outcome,) = store.execute_all([claim_of(store, directory, steps[-1])])
            assert isinstance(outcome, Receipt)
            assert outcome.repeated == (found == after)
            found = after
        kept[directory] = found
    for directory, model in kept.items():
        assert listing(store, directory) == model


def report(line: str) -> None:
    """A line for whoever reads the output of a run: the seed that repeats it, what it did."""
    sys.stdout.write(f"{line}\n")


def test_every_acknowledged_command_survives_kill_9(tmp_path: Path) -> None:
    """Killed again and again, at random moments of whatever it does, a store keeps what it promised."""
    seed = os.environ.get("SPACE_SEED", "1" if ROUNDS < 100 else str(random.SystemRandom().getrandbits(32)))
    report(f"SPACE_SEED={seed}")
    rng = random.Random(seed)
    kept: dict[str, Model] = {}
    acknowledged = 0
    for number in range(ROUNDS):
        life = live_and_die(tmp_path / "store", f"{number:03d}", rng)
        acknowledged += sum(life.done.values())
        with space.open(tmp_path / "store", segment_bytes=SEGMENT_BYTES) as store:
            check(store, life, kept)
            if number % 4 == 0:
                assert store.replay(verify=True).equal
                assert store.verify().findings == []
        while len(kept) > 30:
            del kept[next(iter(kept))]
    report(f"{ROUNDS} kills, {acknowledged} acknowledged commands")
    assert acknowledged > ROUNDS


def test_the_check_notices_a_lost_command(tmp_path: Path) -> None:
    """A store that lost one acknowledged step does not pass."""
    with space.open(tmp_path / "store") as store:
        store.mkdir("/d")
        with pytest.raises(AssertionError, match="d after 2 steps"):
            check(store, Life(done={"d": 2}), {})


HOLDER = """
import sys, space
with space.open(sys.argv[1]):
    print("open", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_told_that_the_directory_is_in_use(tmp_path: Path) -> None:
    """Of two processes on one directory the second gets UnavailableError, exit 7, until the first is gone."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "store")]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"open\n"
        with pytest.raises(space.UnavailableError, match=str(child.pid)) as caught:
            space.open(tmp_path / "store")
        assert caught.value.kind.exit_status == 7
        child.send_signal(signal.SIGKILL)
    with space.open(tmp_path / "store") as store:
        assert store.position == 1

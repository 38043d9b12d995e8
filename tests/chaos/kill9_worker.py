"""A store under load, to be killed: tells on a pipe what it has been promised.

Every thread follows a script that its seed decides, in a directory of its own, and reports after each
step that was acknowledged as durable; a reader of the reports computes from the script what must be there.
"""

from __future__ import annotations

import os
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import attrs

import space
from space._node.store import Store
from space.events import commands as cmd
from space.events.ids import CapsuleId
from space.policy.model import Policy

SEGMENT_BYTES: Final = 256 << 10
THREADS: Final = 3
STEPS_A_LIFE: Final = 8
POLICIES: Final = (
    Policy.from_document({"compression": "none", "history": "none"}),
    Policy.from_document({"compression": "lz4"}),
    Policy.from_document({"compression": "none", "dedupe": False}),
)


@attrs.frozen
class Step:
    """One command of a script, its number in it from 1."""

    number: int
    verb: str
    name: str
    other: str = ""
    offset: int = 0
    data: bytes = b""


Model = dict[str, bytes]


def script(seed: str) -> Iterator[tuple[Step, Model]]:
    """Endless steps, each with what the directory holds after it."""
    rng, model, number = random.Random(seed), Model(), 0
    while True:
        number += 1
        step = _draw(rng, model, number)
        _play(model, step)
        yield step, dict(model)


def _draw(rng: random.Random, model: Model, number: int) -> Step:
    verb = rng.choice(["put", "put", "write", "write", "resize", "rm", "mv", "claim", "clone"])
    data = rng.randbytes(rng.choice([0, 10, 600, 5000, 70_000]))
    if not model or verb == "put":
        return Step(number, "put", f"f{number}", data=data)
    if verb == "claim":
        return Step(number, "claim", f"c{number}")
    name = rng.choice(sorted(model))
    if verb in {"mv", "clone"}:
        return Step(number, verb, name, f"{verb}{number}")
    size = len(model[name])
    if verb == "resize":
        return Step(number, verb, name, offset=rng.randint(0, size + 5000))
    return Step(number, verb, name, offset=rng.randint(0, size + 100), data=data[:6000] or b"x")


def _play(model: Model, step: Step) -> None:
    if step.verb in {"put", "claim"}:
        model[step.name] = step.data
    elif step.verb == "rm":
        del model[step.name]
    elif step.verb == "mv":
        model[step.other] = model.pop(step.name)
    elif step.verb == "clone":
        model[step.other] = model[step.name]
    elif step.verb == "resize":
        model[step.name] = model[step.name][: step.offset].ljust(step.offset, b"\0")
    else:
        old = model[step.name].ljust(step.offset, b"\0")
        model[step.name] = old[: step.offset] + step.data + old[step.offset + len(step.data) :]


def client_of(directory: str) -> bytes:
    """The client id of whoever works in a directory."""
    return directory.encode().ljust(16, b"_")


def claim_of(store: Store, directory: str, step: Step) -> cmd.Request:
    """The request of a "claim": an empty file made under a client's protection, to be retried at will."""
    parent = store.resolve("/" + directory)
    fresh = CapsuleId(client_of(f"{directory}.{step.number}"))
    create = cmd.CreateCapsule(fresh, parent=parent, name=step.name.encode())
    return cmd.Request(create, "worker", client_of(directory), step.number)


def carry_out(store: Store, directory: str, step: Step) -> None:
    """One step, acknowledged as durable when this returns."""
    path = f"/{directory}/{step.name}"
    if step.verb == "put":
        store.put(step.data, name=path, policy=POLICIES[step.number % len(POLICIES)])
    elif step.verb == "claim":
        (outcome,) = store.execute_all([claim_of(store, directory, step)])
        if isinstance(outcome, space.SpaceError):
            raise outcome
    elif step.verb == "write":
        store.write(store.resolve(path), step.offset, step.data)
    elif step.verb == "resize":
        store.resize(path, step.offset)
    elif step.verb == "rm":
        store.rm(path)
    elif step.verb == "mv":
        store.mv(path, f"/{directory}/{step.other}")
    else:
        store.clone(path, f"/{directory}/{step.other}")


def tell(line: str) -> None:
    """A line on stdout, whole or not at all."""
    os.write(1, f"{line}\n".encode())


def work(store: Store, directory: str, steps: Iterator[tuple[Step, Model]], count: int) -> None:
    """``count`` steps of a script, each told when it is durable; an error ends the process."""
    try:
        for _, (step, _model) in zip(range(count), steps, strict=False):
            carry_out(store, directory, step)
            tell(f"done {directory} {step.number}")
    except BaseException as error:  # noqa: BLE001 - the parent must hear of anything
        tell(f"failed {directory} {type(error).__name__}: {error}")
        os._exit(3)


def upkeep(store: Store, rng: random.Random) -> None:
    """One long operation that a kill should meet."""
    what = rng.choice(["replay", "checkpoint", "gc", "verify", "past", "nothing"])
    if what == "replay":
        store.replay()
    elif what == "checkpoint":
        store.checkpoint()
    elif what == "gc":
        store.gc()
    elif what == "verify":
        if findings := store.verify().findings:
            raise AssertionError(findings)
    elif what == "past":
        with store.at(f"@{rng.randint(1, store.position)}") as past:
            past.ls("/")


def main(home: str, seed: str, lives: str) -> None:
    """Works in ``home`` until killed: in one long life, or in many short ones that end with a close."""
    rng = random.Random(seed + "upkeep")
    directories = [f"{seed}.{number}" for number in range(THREADS)]
    scripts = {directory: script(directory) for directory in directories}
    while True:
        tell("opening")
        with space.open(Path(home), segment_bytes=SEGMENT_BYTES) as store:
            tell("open")
            for directory in directories:
                store.mkdir("/" + directory, parents=True)
                tell(f"done {directory} 0")
            count = 1 << 60 if lives == "one" else STEPS_A_LIFE
            threads = [
                threading.Thread(target=work, args=(store, directory, scripts[directory], count))
                for directory in directories
            ]
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                try:
                    upkeep(store, rng)
                except BaseException as error:
                    tell(f"failed upkeep {type(error).__name__}: {error}")
                    raise
                threads[0].join(0.02)
            tell("closing")


if __name__ == "__main__":
    main(*sys.argv[1:])

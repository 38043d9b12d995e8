"""Coverage-guided fuzzing of the NFS server, connections and COMPOUNDs: ``tools/fuzz nfs [SECONDS]``.

What atheris invents is a conversation (tests/nfs_conversation.py), beginning with those of the Linux kernel's client
and of pynfs in tests/golden/nfs.  It changes steps and puts conversations together, so that most of what it says is
still understood.  Whatever comes, each answer can be decoded and is none of a fault, and nothing is left at the end.

``python -m tests.fuzz_nfs FILE…`` says again what stopped a run.
"""

from __future__ import annotations

import asyncio
import random
import sys
from typing import Final

import atheris

with atheris.instrument_imports(include=["space.projections.nfs"]):
    from tests.nfs_conversation import (
        ANSWERS,
        CONNECTIONS,
        HANG_UP,
        IN_ORDER,
        RECORD,
        STEP_BYTES_MAX,
        TIME,
        Step,
        converse,
        parse,
    )

WORDS: Final = (0, 1, 2, 3, 7, 8, 0xFF, 0x1000, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
LOOP: Final = asyncio.new_event_loop()


def one(data: bytes) -> None:
    """One conversation."""
    converse(data, LOOP)


# --- changing


def change(data: bytes, size_max: int, seed: int) -> bytes:
    """A conversation a little different."""
    chance, steps = random.Random(seed), parse(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.randrange(len(steps)) if steps else 0
        how = chance.randrange(10)
        if not steps or how == 0:
            steps.insert(at, _step(chance))
        elif how == 1:
            del steps[at]
        elif how == 2:
            steps.insert(chance.randrange(len(steps) + 1), steps[at])
        elif how == 3:
            steps[at] = Step(steps[at].what ^ 1 << chance.randrange(8), steps[at].data)
        else:
            steps[at] = Step(steps[at].what, _changed(chance, steps[at].data))
    return b"".join(each.encode() for each in steps)[:size_max]


def _step(chance: random.Random) -> Step:
    what = chance.choice((TIME, HANG_UP, ANSWERS, RECORD | IN_ORDER))
    data = bytes(atheris.Mutate(b"", 40)) if what == RECORD | IN_ORDER else bytes([chance.randrange(20)])
    return Step(what | chance.randrange(CONNECTIONS), data)


def _changed(chance: random.Random, data: bytes) -> bytes:
    """Bytes with a word changed, taken out or put in, as what means something is made of words; or anything."""
    words, at = len(data) // 4, 4 * chance.randrange(len(data) // 4 + 1)
    how = chance.randrange(6)
    if how == 0:
        return bytes(atheris.Mutate(data, min(len(data) + 64, STEP_BYTES_MAX)))
    if how == 1:
        return data[:at] + data[at + 4 * chance.randint(1, 4) :]
    if how == 2:
        other = 4 * chance.randrange(words + 1)
        return (data[:at] + data[other : other + 4 * chance.randint(1, 12)] + data[at:])[:STEP_BYTES_MAX]
    word = (
        chance.choice(WORDS) if how < 5 else int.from_bytes(data[at : at + 4], "big") + chance.choice((-1, 1))
    )
    return data[:at] + (word & 0xFFFFFFFF).to_bytes(4, "big") + data[at + 4 :]


def join(one_data: bytes, other_data: bytes, size_max: int, seed: int) -> bytes:
    """The beginning of one conversation, and some of another."""
    chance, steps, others = random.Random(seed), parse(one_data), parse(other_data)
    begin = chance.randrange(len(others) + 1)
    found = steps[: chance.randrange(len(steps) + 1)] + others[begin : begin + chance.randint(1, 20)]
    return b"".join(each.encode() for each in found)[:size_max]


if __name__ == "__main__":
    atheris.Setup(sys.argv, one, custom_mutator=change, custom_crossover=join)
    atheris.Fuzz()

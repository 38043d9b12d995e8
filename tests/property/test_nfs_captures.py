"""What the Linux kernel's client and pynfs said to a server once, said again: as it was, and damaged.

``python -m tests.property.test_nfs_captures`` writes the golden answers anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.nfs_conversation import ANSWERS, CONNECTIONS, HANG_UP, TIME, Step, converse, parse

GOLDEN: Final = Path(__file__).parent.parent / "golden"
CAPTURES: Final = sorted((GOLDEN / "nfs").iterdir())
ANSWERED: Final = GOLDEN / "nfs_answered.txt"
WORDS: Final = (0, 1, 2, 7, 0xFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """For all conversations."""
    made = asyncio.new_event_loop()
    yield made
    made.close()


def answered(loop: asyncio.AbstractEventLoop, capture: Path) -> str:
    """How a capture is shown in the golden file."""
    return "".join(f"{line}\n" for line in (f"# {capture.name}", *converse(capture.read_bytes(), loop)))


@pytest.mark.golden
@pytest.mark.parametrize("capture", CAPTURES, ids=lambda each: each.name)
def test_captures_are_answered_as_ever(loop: asyncio.AbstractEventLoop, capture: Path) -> None:
    """The same requests have the same results; each answer can be decoded, and nothing is left at the end."""
    assert answered(loop, capture) in ANSWERED.read_text()


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A capture with some steps changed, left out, said twice or at another place, or something between them."""
    steps = parse(draw(st.sampled_from(CAPTURES)).read_bytes())
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(steps) - 1))
        how = draw(
            st.sampled_from(["word", "word", "word", "cut", "insert", "drop", "again", "between", "what"])
        )
        what, data = steps[at].what, steps[at].data
        word = 4 * draw(st.integers(0, max(0, len(data) // 4 - 1)))
        if how == "word":
            value = draw(st.sampled_from(WORDS) | st.integers(0, 0xFFFFFFFF))
            steps[at] = Step(what, data[:word] + value.to_bytes(4, "big") + data[word + 4 :])
        elif how == "cut":
            steps[at] = Step(what, data[:word] + data[word + 4 * draw(st.integers(1, 8)) :])
        elif how == "insert":
            steps[at] = Step(what, data[:word] + draw(st.binary(min_size=1, max_size=32)) + data[word:])
        elif how == "drop" and len(steps) > 1:
            del steps[at]
        elif how == "again":
            steps.insert(draw(st.integers(0, len(steps))), steps[at])
        elif how == "between":
            kind = draw(st.sampled_from([TIME, HANG_UP, ANSWERS])) | draw(st.integers(0, CONNECTIONS - 1))
            steps.insert(at, Step(kind, bytes([draw(st.integers(0, 20))])))
        elif how == "what":
            steps[at] = Step(what ^ 1 << draw(st.integers(0, 7)), data)
    return b"".join(each.encode() for each in steps)


@pytest.mark.property
@given(damaged())
def test_damaged_captures(loop: asyncio.AbstractEventLoop, said: bytes) -> None:
    """Whatever becomes of a capture, answers can be decoded, the server finds no fault of its own, and forgets all."""
    converse(said, loop)


if __name__ == "__main__":
    _loop = asyncio.new_event_loop()
    ANSWERED.write_text("\n".join(answered(_loop, each) for each in CAPTURES))
    _loop.close()

"""How a driver looks after the owner of its store; the programs are in tests/integration/test_csi_driver.py."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from space._errors import UnavailableError
from space._node import csi_driver
from space.projections.csi.model import Node

pytestmark = [pytest.mark.unit, pytest.mark.requires("py:google.protobuf", "py:grpc")]

LOOKS = 50


class Owner:
    """An owner of which every process dies when it has answered ``answers`` times.

    Attributes:
        started: how many processes there were.
        asked: how often one was asked, answering or not.
    """

    def __init__(self, answers: int) -> None:
        self._answers = answers
        self._left = 0
        self.started = 0
        self.asked = 0

    def spawn(self) -> subprocess.Popen[bytes]:
        """Starts one."""
        self.started += 1
        self._left = self._answers
        return cast("subprocess.Popen[bytes]", self)

    def poll(self) -> int | None:
        """As a process has it."""
        return None if self._left else 1

    def ask(self, method: str, arguments: dict[str, Any]) -> Any:
        """As a store is asked."""
        self.asked += 1
        if not self._left:
            raise UnavailableError("nobody answers")
        self._left -= 1
        return {"incarnation": str(self.started), "mount": ""}


async def watched(owner: Owner, tmp_path: Path, enough: Callable[[], bool]) -> None:
    """A driver watches until it is enough."""
    loop, over = asyncio.get_running_loop(), asyncio.Event()

    def ask(method: str, arguments: dict[str, Any]) -> Any:
        if enough():
            loop.call_soon_threadsafe(over.set)
        return owner.ask(method, arguments)

    config = csi_driver.Config("controller", "", Node("here", "", 0), tmp_path, tmp_path, "1")
    watching = asyncio.create_task(csi_driver.Driver(config, ask, owner.spawn)._watch())
    await over.wait()
    watching.cancel()
    await asyncio.wait([watching])


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csi_driver, "WATCH_SECONDS", 0.0)
    monkeypatch.setattr(csi_driver, "STARTING_SECONDS", 0.0)
    monkeypatch.setattr(csi_driver, "AGAIN_SECONDS", 3600.0)


def test_an_owner_that_answered_is_replaced_at_once(tmp_path: Path) -> None:
    """An owner that dies right after it began to answer is followed by another one, without a pause between."""
    owner = Owner(answers=2)
    asyncio.run(watched(owner, tmp_path, lambda: owner.started == 5))


def test_an_owner_that_never_answers_is_not_started_over_and_over(tmp_path: Path) -> None:
    """However often is looked, an owner that ends without an answer is started again only after the pause."""
    owner = Owner(answers=0)
    asyncio.run(watched(owner, tmp_path, lambda: owner.asked > LOOKS))
    assert owner.started == 1

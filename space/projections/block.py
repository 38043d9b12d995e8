"""What "block device" means here: the one model that NVMe, raw CSI volumes and every later block protocol serve.

A :class:`BlockDevice` is the bytes of one capsule, of the present or of a past moment, in blocks of 512 or 4096
bytes.  Protocols bring addresses and status codes of their own; offsets and lengths here are bytes, multiples of
the block size, and inside the device: whoever calls has checked that.

Ordering and durability:

* A mutation is acknowledged when every later read of the device sees it, on whatever path it comes.
* It is *durable* (on disk; in a cluster on a quorum) when it was asked to be, or when a later :meth:`BlockDevice.flush`
  has returned.  What was acknowledged survives the end of the process in any case.
* Mutations that overlap and are under way at the same time may be carried out in any order; each one is whole.

Errors are :class:`space.SpaceError` with a neutral ``status``; each protocol has one complete table for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import attrs

from space._errors import SpaceError
from space.events.commands import Buffer
from space.events.ids import CapsuleId


@attrs.frozen
class BlockInfo:
    """What a device is; sizes in bytes.

    Attributes:
        size: a multiple of ``block_size``.
        allocated: what is not a hole.
        change: grows with every change of the capsule: the position of the last one.
    """

    id: CapsuleId
    size: int
    block_size: int
    allocated: int
    read_only: bool
    change: int


class BlockDevice(Protocol):
    """One device.  Every method raises SpaceError; mutations of a read-only one with status READ_ONLY."""

    def info(self) -> BlockInfo:
        """What it is now: a resize shows here."""

    async def read(self, offset: int, length: int) -> Sequence[Buffer]:
        """The bytes of a range, as buffers to be sent one after the other; holes read as zeros."""

    def peek(self, offset: int, length: int) -> Sequence[Buffer] | None:
        """What :meth:`read` would return, if that is at hand: as of :meth:`info`, asked for in the same turn.

        None: not at hand.  Here and in :meth:`begin_write` nothing is waited for: a protocol that serves many small
        commands spares itself a coroutine each.
        """

    def begin_write(
        self, offset: int, data: Buffer, *, actor: str, done: Callable[[SpaceError | None], None]
    ) -> bool:
        """Begins :meth:`write`, not durable; a later turn of the loop calls ``done``, once, with the error if any.

        Returns:
            Whether it was begun; otherwise :meth:`write` has to be used.
        """

    async def write(self, offset: int, data: Buffer, *, durable: bool, actor: str) -> None:
        """Replaces the bytes of a range, as one: a crash leaves all of them or none."""

    async def write_zeroes(
        self, offset: int, length: int, *, deallocate: bool, durable: bool, actor: str
    ) -> None:
        """Makes a range read as zeros; here it is always a hole, so ``deallocate`` costs nothing more."""

    async def deallocate(self, ranges: Sequence[tuple[int, int]], *, actor: str) -> None:
        """Gives ranges (offset, length) back: they read as zeros and take no space."""

    async def copy(
        self, ranges: Sequence[tuple[int, int]], target: int, *, durable: bool, actor: str
    ) -> None:
        """Copies ranges (offset, length), one after the other, to ``target``; stored bytes are shared, not moved."""

    async def compare_and_write(
        self, offset: int, expected: Buffer, data: Buffer, *, durable: bool, actor: str
    ) -> int:
        """Writes ``data`` if the range holds ``expected``, with nothing in between.

        Returns:
            -1, or the offset in the range of the first byte that differs; then nothing was written.
        """

    async def flush(self) -> None:
        """Makes everything acknowledged before durable."""

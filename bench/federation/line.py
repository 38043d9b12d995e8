"""A long line between two network namespaces: every packet takes its time, and some never arrive.

Each namespace has one end, a TUN device; this process carries packets from one to the other.  What is delayed and
lost are packets, under the kernel's own TCP, so what loss does to a connection is real.  ``tc netem`` would do the
same where a kernel has it; many do not, and this one's losses can be had again by their seed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import select
import shutil
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import attrs

from bench.peers.programs import HOST, Program, wait_for

TUN: Final = Path("/dev/net/tun")
ADDRESSES: Final = ("10.77.0.1", "10.77.0.2")
_TUNSETIFF: Final = 0x400454CA
_IFF_TUN_NO_PI: Final = 0x1001
_PACKETS_MAX: Final = 20_000
"""Under way in one direction, 30 MB: what a line holds; what comes on top is lost, as in any router."""

_PACKETS_AT_ONCE: Final = 64
_PACKET_BYTES: Final = 1 << 16


@attrs.frozen
class Side:
    """Where one of two zones runs: a command that runs others there, and the address it has."""

    prefix: tuple[str, ...] = ()
    address: str = HOST


@attrs.frozen
class Route:
    """Two places and what is between them."""

    label: str
    home: Side = attrs.field(factory=Side)
    target: Side = attrs.field(factory=Side)


def missing() -> str:
    """Why no line can be made here; empty if one can."""
    if os.geteuid():
        return "needs root"
    if not os.access(TUN, os.R_OK | os.W_OK):
        return f"needs {TUN}"
    programs = [name for name in ("ip", "nsenter", "unshare") if shutil.which(name) is None]
    return f"needs {programs[0]}" if programs else ""


@contextlib.contextmanager
def line(home: Path, label: str, *, rtt_seconds: float, loss: float, seed: int = 1) -> Iterator[Route]:
    """Two namespaces and the line between them; all of it goes with the processes that hold it.

    Args:
        home: where the processes' output goes.
        label: what it is called.
        rtt_seconds: of a packet and its answer.
        loss: share of packets of each direction that do not arrive.
        seed: of which.

    Raises:
        RuntimeError: the kernel refuses.
    """
    names = [f"spb{os.getpid()}{end}" for end in "ab"]
    with contextlib.ExitStack() as stack:
        holders = [held(home / f"namespace{end}", stack) for end in "ab"]
        command = [sys.executable, "-m", "bench.federation.line", *names]
        carrier = Program([*command, str(rtt_seconds / 2), str(loss), str(seed)], home / "line", talk=True)
        stack.callback(_let_go, carrier)
        if not carrier.output.readline():
            raise RuntimeError(f"no line: {carrier.last_words()}")
        sides = []
        for number, (name, holder) in enumerate(zip(names, holders, strict=True)):
            here, there = ADDRESSES[number], ADDRESSES[1 - number]
            sides.append(Side(connected(name, holder, here, there), here))
        yield Route(label, *sides)


def held(home: Path, stack: contextlib.ExitStack) -> int:
    """A process in a namespace of its own that lives as long as its input."""
    holder = Program(["unshare", "--net", "--", "cat"], home, talk=True)
    stack.callback(_let_go, holder)
    own = os.readlink("/proc/self/ns/net")
    pid = holder.process.pid
    wait_for("a network namespace", lambda: os.readlink(f"/proc/{pid}/ns/net") != own)
    return pid


def connected(device: str, holder: int, here: str, there: str) -> tuple[str, ...]:
    """A device and its addresses in the namespace of a process; a command before a command that runs it there."""
    inside = ("nsenter", f"--net=/proc/{holder}/ns/net", "--")
    _run("ip", "link", "set", device, "netns", str(holder))
    _run(*inside, "ip", "link", "set", "lo", "up")
    _run(*inside, "ip", "address", "add", here, "peer", there, "dev", device)
    _run(*inside, "ip", "link", "set", device, "up")
    return inside


def _let_go(program: Program) -> None:
    program.input.close()
    program.end()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


# --- the process that carries ------------------------------------------------------------------------


def tun(name: str) -> int:
    """A TUN device that goes when it is closed, whatever namespace it is in by then."""
    device = os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN_NO_PI))
    return device


def packets(device: int) -> Iterator[bytes]:
    """What waits at an end, some of it."""
    for _ in range(_PACKETS_AT_ONCE):
        try:
            yield os.read(device, _PACKET_BYTES)
        except OSError:  # none, or the device is not up yet
            return


def carry(devices: Sequence[int], one_way_seconds: float, loss: float, chance: random.Random) -> None:
    """Carries packets until standard input ends."""
    under_way: tuple[deque[tuple[float, bytes]], ...] = (deque(), deque())
    while True:
        now = time.monotonic()
        due = min((each[0][0] for each in under_way if each), default=now + 1)
        ready, _, _ = select.select([*devices, sys.stdin], [], [], max(0.0, due - now))
        if sys.stdin in ready:
            return
        now = time.monotonic()
        for end, queue in enumerate(under_way):
            for packet in packets(devices[end]) if devices[end] in ready else ():
                if chance.random() >= loss and len(queue) < _PACKETS_MAX:
                    queue.append((now + one_way_seconds, packet))
            while queue and queue[0][0] <= now:
                with contextlib.suppress(OSError):  # the device is not up yet, or full: lost
                    os.write(devices[1 - end], queue.popleft()[1])


if __name__ == "__main__":
    opened = [tun(name) for name in sys.argv[1:3]]
    print("ready", flush=True)
    carry(opened, float(sys.argv[3]), float(sys.argv[4]), random.Random(int(sys.argv[5])))

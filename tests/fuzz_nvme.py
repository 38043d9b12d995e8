"""Coverage-guided fuzzing of the NVMe target's connections and commands: ``tools/fuzz nvme [SECONDS]``.

The bytes that atheris invents are read as a conversation: raw bytes, commands with any field, data for what was asked
for.  Whatever comes, the target must answer with well-formed PDUs, never with success for an opcode there is not,
never with an internal error, never touch the device outside its blocks, and hold no more than its sums allow.
"""

from __future__ import annotations

import struct
import sys
from typing import Any, Final

import atheris

with atheris.instrument_imports(include=["space.projections.nvme"]):
    from space.projections.nvme import admin, io, queue
    from tests.nvme_support import Host, MemoryDevice, admin_queue, capsule, h2c_data, io_queue, target_with
    from tests.nvme_support import namespace as namespace_of

STEPS_MAX: Final = 24
BLOCKS: Final = 64
BLOCK: Final = 512
DATA_MAX: Final = 4096
INTERNAL_ERROR: Final = 0x006
FABRICS: Final = 0x7F
OPCODES: Final = sorted({*io.HANDLERS, *admin.HANDLERS, FABRICS})
WORDS: Final = (0, 1, 7, BLOCKS - 1, BLOCKS, 0xFFFF, 0x10000, 0xFFFF_FFFF)


class Device(MemoryDevice):
    """A device that knows where it ends."""

    async def _enter(self, *call: Any) -> None:
        name, *rest = call
        if name in {"read", "write", "write_zeroes", "compare_and_write"}:
            self._inside(rest[0], rest[1])
        elif name == "deallocate":
            for offset, length in rest[0]:
                self._inside(offset, length)
        elif name == "copy":
            for offset, length in rest[0]:
                self._inside(offset, length)
            self._inside(rest[1], sum(length for _, length in rest[0]))

    def _inside(self, offset: int, length: int) -> None:
        size = BLOCKS * BLOCK
        if offset % BLOCK or length % BLOCK or not 0 <= offset <= offset + length <= size:
            raise AssertionError(f"{offset}+{length} of {size} bytes")


class Conversation:
    """A host that says what it is told to, on one queue."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self._device = Device(BLOCKS, BLOCK)
        target, _ = target_with(namespace_of(1, self._device))
        options = {"digests": source.ConsumeIntInRange(0, 3), "maxr2t": source.ConsumeIntInRange(0, 3)}
        self._admin = admin_queue(target, **(options if source.ConsumeBool() else {}))
        on_io = source.ConsumeBool()
        self._host: Host = io_queue(self._admin, target, **options) if on_io else self._admin
        self._known = set(io.HANDLERS if on_io else admin.HANDLERS) | {FABRICS}
        self._sent: dict[int, tuple[int, int]] = {}
        self._asked: list[tuple[int, ...]] = []

    def run(self) -> None:
        """Until the input or the connection ends."""
        for _ in range(STEPS_MAX):
            if not self._source.remaining_bytes() or not self._host.open:
                break
            stream = self._step()
            for pdu in self._host.send(stream, step=self._source.ConsumeIntInRange(1, 4096)):
                self._judge(pdu)
            self._bounded()
        self._host.queue.lost()
        self._admin.queue.lost()
        sums = self._host.queue._pools
        if sums.fetched.used or sums.executing.used:
            raise AssertionError(f"{sums} after the end of the connection")

    def _step(self) -> bytes:
        source = self._source
        kind = source.ConsumeIntInRange(0, 9)
        if kind == 0:
            self._sent.clear()  # whatever these bytes are, their command ids are not known
            return bytes(source.ConsumeBytes(source.ConsumeIntInRange(0, 200)))
        if kind <= 3 and self._asked:
            return self._answer()
        return self._command()

    def _answer(self) -> bytes:
        """Data for an R2T, right or a little wrong."""
        source = self._source
        cid, tag, offset, length = self._asked.pop(0)
        size = length if source.ConsumeBool() else source.ConsumeIntInRange(0, DATA_MAX)
        last = source.ConsumeIntInRange(0, 7) != 0
        offset += 0 if source.ConsumeIntInRange(0, 7) else 512
        return h2c_data(cid, tag, offset, bytes(min(size, 1 << 20)), last=last, digests=self._host.digests)

    def _word(self) -> int:
        source = self._source
        if source.ConsumeBool():
            return WORDS[source.ConsumeIntInRange(0, len(WORDS) - 1)]
        return int(source.ConsumeIntInRange(0, 0xFFFF_FFFF))

    def _command(self) -> bytes:
        source = self._source
        known = source.ConsumeIntInRange(0, 7)
        index = source.ConsumeIntInRange(0, 255)
        opcode = OPCODES[index % len(OPCODES)] if known else index
        nsid = 1 if source.ConsumeBool() else self._word()
        words = [self._word() for _ in range(6)]
        in_capsule = source.ConsumeBool()
        length = source.ConsumeIntInRange(0, 8) * BLOCK if source.ConsumeBool() else self._word()
        data = bytes(min(length, DATA_MAX)) if in_capsule else b""
        kind = 0x01 if in_capsule else 0x5A
        if not source.ConsumeIntInRange(0, 15):
            kind = source.ConsumeIntInRange(0, 255)
        cid = self._host.next_cid() if source.ConsumeIntInRange(0, 15) else 1
        if cid in self._sent:
            self._sent.clear()
        self._sent[cid] = (opcode, length)
        flags = (0x40, 0x41, 0x42, 0x40)[source.ConsumeIntInRange(0, 3)]
        address = 0 if source.ConsumeIntInRange(0, 15) else self._word()
        entry = struct.pack("<BBHIQQQI3xB", opcode, flags, cid, nsid, 0, 0, address, length, kind)
        return capsule(entry + struct.pack("<6I", *words), data, digests=self._host.digests)

    def _judge(self, pdu: Any) -> None:
        if pdu.kind == 9:
            self._asked.append(pdu.fields)
            _, _, offset, length = pdu.fields
            if not length or offset + length > queue.CONNECTION_BYTES:
                raise AssertionError(f"asked for {offset}+{length}")
            return
        if pdu.kind not in {3, 5, 7}:
            raise AssertionError(f"a PDU of type {pdu.kind}")
        opcode, length = self._sent.get(pdu.cid, (None, 0)) if pdu.kind != 3 else (None, 0)
        if opcode is None:
            return
        if pdu.kind == 7:
            if len(pdu.data) != length:
                raise AssertionError(f"{len(pdu.data)} bytes where {length} are wanted")
        elif pdu.status == INTERNAL_ERROR:
            raise AssertionError(f"opcode {opcode:#x} met an internal error")
        elif not pdu.status and opcode not in self._known:
            raise AssertionError(f"success for opcode {opcode:#x}")

    def _bounded(self) -> None:
        pools = self._host.queue._pools
        if pools.fetched.used > queue.CONNECTION_BYTES + (1 << 20):
            raise AssertionError(f"{pools.fetched.used} bytes fetched")


def one(data: bytes) -> None:
    """One conversation."""
    Conversation(atheris.FuzzedDataProvider(data)).run()


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()

"""A queue pair over one connection: commands in, completions out, in whatever order they finish.

A command is checked, its data fetched if it travels apart, then handled.  A handler answers at once, or is a
coroutine: that runs here until it waits for the first time, so that what is local and quick never costs a task; what
waits is handed to the shell, which has the event loop.  A device must not ask which task it runs in before that.

Memory is bounded by two sums, each for one connection and for the whole server:

* *fetched*: data asked for with R2T.  Where it would grow too large, commands wait and their data stays with the host.
* *executing*: other data of commands that wait for the device.  While it is too large nothing more is read from the
  connection (:attr:`Queue.blocked`); that always passes, because devices finish without the host's help.

One command of each connection is let through whatever the sums, so that a host that holds much does not stop the
others.
"""

from __future__ import annotations

import functools
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any, Final, Protocol

import attrs

from space._errors import SpaceError, Status
from space.projections.nvme import admin, fabrics, io
from space.projections.nvme.auth import Authentication
from space.projections.nvme.connection import Connection
from space.projections.nvme.controller import QUEUE_ENTRIES_MAX, Controller
from space.projections.nvme.pdu import FABRICS, SGL_IN_CAPSULE, SGL_TRANSPORT, Command
from space.projections.nvme.reply import DONE, Reply
from space.projections.nvme.status import DNR, CommandError, NvmeStatus, status_of
from space.projections.nvme.target import Target

if TYPE_CHECKING:
    import asyncio

CONNECTION_BYTES: Final = 8 << 20
"""Of each sum, for one connection: eight transfers of the largest size keep a disk and a network busy."""
SERVER_BYTES: Final = 256 << 20
"""Of each sum, for all connections together."""
SILENCE_SECONDS: Final = 30.0
"""How long a host may take to introduce itself, to send the rest of a PDU, or data it was asked for."""

log: Final = logging.getLogger("space.nvme")


class Pool:
    """A sum of bytes over all connections."""

    def __init__(self, bytes_max: int = SERVER_BYTES) -> None:
        """A sum that is full at ``bytes_max``."""
        self.bytes_max = bytes_max
        self.used = 0
        self._waiting: deque[Callable[[], None]] = deque()

    @property
    def full(self) -> bool:
        """Whether no more should be added."""
        return self.used >= self.bytes_max

    def give(self, count: int) -> None:
        """Takes bytes out of the sum, and wakes who waits for that."""
        self.used -= count
        if self._waiting and not self.full:
            waiting, self._waiting = self._waiting, deque()
            for wake in waiting:
                wake()

    def wait(self, wake: Callable[[], None]) -> None:
        """Calls ``wake`` once the sum is not full any more."""
        if wake not in self._waiting:
            self._waiting.append(wake)


class Handle(Protocol):
    """A coroutine that runs: an asyncio task."""

    def cancel(self) -> object:
        """Ends it at its next await."""

    def result(self) -> Reply:
        """What came of it, once it is done; or raises what it raised."""

    def add_done_callback(self, done: Callable[[Any], None], /) -> object:
        """Calls ``done`` with this handle when it is done."""


class Shell(Protocol):
    """What a queue needs of whoever has the event loop."""

    @property
    def local_address(self) -> str:
        """The address the host has reached."""

    def random(self, count: int) -> bytes:
        """Bytes nobody can foresee."""

    def future(self) -> asyncio.Future[None]:
        """Something to wait for."""

    def spawn(self, coroutine: Coroutine[Any, Any, Reply]) -> Handle:
        """Runs a coroutine to its end."""

    def wake(self) -> None:
        """There is output, or the queue is not blocked any more."""

    def close(self, reason: str) -> None:
        """Sends what is to be sent, and closes the connection."""


@attrs.define
class Pools:
    """The two sums of a server."""

    fetched: Pool = attrs.field(factory=Pool)
    executing: Pool = attrs.field(factory=Pool)


_Held = tuple[int, Controller | None]
"""What a command that waits is counted with: bytes, and the controller that waits for mutations to end."""


class _Started:
    """A coroutine that has run up to its first wait, to be awaited from there on."""

    def __init__(self, coroutine: Coroutine[Any, Any, Reply], waits_for: Any) -> None:
        self._coroutine = coroutine
        self._waits_for = waits_for

    def __await__(self) -> Generator[Any, Any, Reply]:
        waits_for = self._waits_for
        while True:
            try:
                try:
                    sent = yield waits_for
                except BaseException as error:  # noqa: BLE001 - cancellation among them goes where it belongs
                    waits_for = self._coroutine.throw(error)
                else:
                    waits_for = self._coroutine.send(sent)
            except StopIteration as done:
                reply: Reply = done.value
                return reply


async def _finish(coroutine: Coroutine[Any, Any, Reply], waits_for: Any) -> Reply:
    """The rest of a command that had to wait."""
    return await _Started(coroutine, waits_for)


class Queue:
    """A queue pair, and the commands outstanding on it.

    Attributes:
        controller: None until a Connect succeeded; then ``number`` and ``entries`` are the queue's.
        authentication: what the host has to prove on this queue, if anything.
        now: the time, set by the shell before it hands over commands.
    """

    def __init__(
        self, target: Target, connection: Connection, shell: Shell, pools: Pools, now: float
    ) -> None:
        """A queue of a connection just accepted."""
        self.target = target
        self.connection = connection
        self.shell = shell
        self.controller: Controller | None = None
        self.number = 0
        self.entries = QUEUE_ENTRIES_MAX
        self.flow_control = True
        self.authentication: Authentication | None = None
        self.now = now
        self.gone = False
        self._pools = pools
        self._handlers: dict[int, Handler] = {}
        self._sqhd = 0
        self._outstanding: dict[int, Command] = {}
        self._running: dict[int, tuple[Handle | None, bool]] = {}
        self._fused: Command | None = None
        self._pairs: dict[int, tuple[Command, Command]] = {}
        self._deferred: deque[Command] = deque()
        self._fetching: set[int] = set()
        self._fetched = self._executing = 0
        self._heard = now

    # --- commands in

    @property
    def blocked(self) -> bool:
        """Whether nothing more should be read for now; :meth:`Shell.wake` is called when that ends."""
        if self._executing >= CONNECTION_BYTES:
            return True
        if self._executing and self._pools.executing.full:
            self._pools.executing.wait(self.shell.wake)
            return True
        return False

    def accept(self, command: Command) -> None:
        """A command arrived, or the data of one that was here before."""
        cid = command.cid
        known = self._outstanding.get(cid)
        if known is None:
            if len(self._outstanding) >= QUEUE_ENTRIES_MAX:
                self.close("more commands outstanding than a queue has entries")
                return
            self._outstanding[cid] = command
            self._sqhd = (self._sqhd + 1) % self.entries
            if self.controller is not None:
                self.controller.active = True
            refusal = self._refusal(command)
            if self._fused is not None or command.flags & 3:
                self._fuse(command, refusal)
            elif refusal is not None:
                self._fail(command, refusal)
            elif command.data is None and command.sgl_length and command.sends:
                self._defer(command)
            else:
                self._begin(command)
        elif known is command and cid in self._fetching:
            self._fetching.discard(cid)
            self._data_arrived(command)
        else:
            self._sqhd = (self._sqhd + 1) % self.entries
            self._send(cid, NvmeStatus.COMMAND_ID_CONFLICT | DNR)

    def _refusal(self, command: Command) -> CommandError | None:
        """What is wrong with a command as a whole, before its data is fetched; else its handler is set."""
        opcode, controller = command.opcode, self.controller
        if controller is None:
            if opcode != FABRICS or command.nsid & 0xFF != fabrics.CONNECT:
                return CommandError(NvmeStatus.COMMAND_SEQUENCE_ERROR, location=0)
        elif not controller.ready and opcode != FABRICS:
            return CommandError(NvmeStatus.COMMAND_SEQUENCE_ERROR, location=0)
        if opcode == FABRICS:
            command.handler = fabrics.handler(self, command)
        else:
            command.handler = self._handlers.get(opcode)
        if command.handler is None:
            return CommandError(NvmeStatus.INVALID_OPCODE, location=0)
        if (
            self.authentication is not None
            and not self.authentication.authenticated
            and (opcode != FABRICS or command.nsid & 0xFF not in fabrics.AUTHENTICATING)
        ):
            return CommandError(NvmeStatus.AUTHENTICATION_REQUIRED)
        return self._data_refusal(command) if command.sgl_length else None

    def _data_refusal(self, command: Command) -> CommandError | None:
        """What is wrong with the data pointer of a command."""
        direction = (command.nsid if command.opcode == FABRICS else command.opcode) & 3
        if direction not in {1, 2}:
            return None
        if command.opcode != FABRICS and not 0 < command.flags >> 6 < 3:
            return CommandError(NvmeStatus.INVALID_FIELD, location=1)  # PRPs, which fabrics do not have
        if command.sgl_length > self.connection.limits.transfer_bytes:
            return CommandError(NvmeStatus.INVALID_FIELD, location=32)
        if command.sgl_type == SGL_TRANSPORT:
            return None
        if command.sgl_type != SGL_IN_CAPSULE or direction == 2:
            return CommandError(NvmeStatus.SGL_TYPE_INVALID, location=39)
        return self._in_capsule(command)

    def _in_capsule(self, command: Command) -> CommandError | None:
        """Narrows the data of a capsule to what the descriptor says."""
        data = command.data or b""
        begin, end = command.sgl_address, command.sgl_address + command.sgl_length
        if begin > len(data) or (begin and not data):
            return CommandError(NvmeStatus.SGL_OFFSET_INVALID, location=24)
        if end > len(data):
            return CommandError(NvmeStatus.SGL_LENGTH_INVALID, location=32)
        if end - begin < len(data):
            command.data = memoryview(data)[begin:end]
        return None

    # --- data that travels apart

    def _defer(self, command: Command) -> None:
        self._deferred.append(command)
        self._grant()

    def _grant(self) -> None:
        """Fetches data for commands in their order, as far as memory allows."""
        while self._deferred:
            length = self._deferred[0].sgl_length
            if self._fetched:
                if self._fetched + length > CONNECTION_BYTES:
                    return
                if self._pools.fetched.full:
                    self._pools.fetched.wait(self._grant_later)
                    return
            command = self._deferred.popleft()
            self._fetched += length
            self._pools.fetched.used += length
            self._fetching.add(command.cid)
            command.fetched = True
            self.connection.fetch(command)

    def _grant_later(self) -> None:
        if not self.gone:
            self._grant()
            self.shell.wake()

    def _data_arrived(self, command: Command) -> None:
        if command.cid in self._pairs:
            self._begin_pair(command.cid)
        else:
            self._begin(command)

    # --- fused operations (Compare and Write)

    def _fuse(self, command: Command, refusal: CommandError | None) -> None:
        first, self._fused = self._fused, None
        kind = command.flags & 3
        if first is not None and kind != 2:
            self._fail(first, CommandError(NvmeStatus.FUSED_MISSING, location=1))
        if kind == 0:
            if refusal is not None:
                self._fail(command, refusal)
            elif command.data is None and command.sgl_length and command.sends:
                self._defer(command)
            else:
                self._begin(command)
        elif kind == 3 or (refusal is None and not self.number):
            self._fail(command, CommandError(NvmeStatus.INVALID_FIELD, location=1))
        elif kind == 1:
            if refusal is None and command.opcode != io.COMPARE:
                refusal = CommandError(NvmeStatus.INVALID_FIELD, location=1)
            if refusal is not None:
                self._fail(command, refusal)
            else:
                self._fused = command
        elif first is None:
            self._fail(command, CommandError(NvmeStatus.FUSED_MISSING, location=1))
        elif refusal is not None or (command.opcode, _blocks(command)) != (io.WRITE, _blocks(first)):
            self._fail(first, CommandError(NvmeStatus.FUSED_FAILED))
            self._fail(command, refusal or CommandError(NvmeStatus.INVALID_FIELD, location=1))
        else:
            self._pair(first, command)

    def _pair(self, first: Command, second: Command) -> None:
        for command in (first, second):
            self._pairs[command.cid] = (first, second)
        for command in (first, second):
            if command.data is None and command.sgl_length:
                self._defer(command)
        self._begin_pair(first.cid)

    def _begin_pair(self, cid: int) -> None:
        first, second = self._pairs[cid]
        if any(each.data is None and each.sgl_length for each in (first, second)):
            return
        del self._pairs[first.cid], self._pairs[second.cid]
        if first.damaged or second.damaged:
            for command in (first, second):
                self._fail(command, CommandError(NvmeStatus.TRANSIENT_TRANSPORT_ERROR, retry=True))
            return
        self._drive(second, io.compare_and_write(self, first, second))

    def fused_done(self, first: Command, error: CommandError | None) -> None:
        """How the first half of a fused operation ended; it is told before the second."""
        if error is None:
            self.complete(first, DONE)
        else:
            self._fail(first, error)

    # --- execution

    def _begin(self, command: Command) -> None:
        if command.damaged:
            self._fail(command, CommandError(NvmeStatus.TRANSIENT_TRANSPORT_ERROR, retry=True))
            return
        try:
            outcome = command.handler(self, command)
        except Exception as error:  # noqa: BLE001 - whatever happens is this command's status, nobody else's
            self._fail(command, self.error_of(error))
            return
        if outcome.__class__ is Reply:
            self.complete(command, outcome)
        elif outcome is not None:
            self._drive(command, outcome)

    def _drive(self, command: Command, coroutine: Coroutine[Any, Any, Reply]) -> None:
        """Runs a coroutine as far as it goes without waiting."""
        try:
            waits_for = coroutine.send(None)
        except StopIteration as done:
            self.complete(command, done.value)
        except Exception as error:  # noqa: BLE001 - see _begin
            self._fail(command, self.error_of(error))
        else:
            self._suspend(command, coroutine, waits_for)

    def _suspend(self, command: Command, coroutine: Coroutine[Any, Any, Reply], waits_for: Any) -> None:
        held = self._hold(command)
        handle = self.shell.spawn(_finish(coroutine, waits_for))
        self._running[command.cid] = (handle, bool(self.number) and command.opcode in io.MUTATIONS)
        handle.add_done_callback(functools.partial(self._finished, command, held))

    def begun(self, command: Command) -> _Held:
        """A mutation that the device carries out by itself: :meth:`ended` is to be called when it has."""
        self._running[command.cid] = (None, True)
        return self._hold(command)

    def ended(self, command: Command, held: _Held, error: Exception | None) -> None:
        """A mutation that was :meth:`begun` is done."""
        self._release(command, held)
        if error is None:
            self.complete(command, DONE)
        else:
            self._fail(command, self.error_of(error))
        self.shell.wake()

    def _hold(self, command: Command) -> _Held:
        """Counts a command that has to wait."""
        length = 0 if command.fetched else command.sgl_length
        writing = self.controller if self.number and command.opcode in io.WRITING else None
        self._executing += length
        self._pools.executing.used += length
        if writing is not None:
            writing.mutations += 1
        return length, writing

    def _release(self, command: Command, held: _Held) -> None:
        length, writing = held
        del self._running[command.cid]
        if writing is not None:
            writing.mutation_done()
        self._executing -= length
        self._pools.executing.give(length)

    def _finished(self, command: Command, held: _Held, handle: Handle) -> None:
        """A command that had to wait is done, or was cancelled (perhaps before it could go on at all)."""
        self._release(command, held)
        try:
            self.complete(command, handle.result())
        except Exception as error:  # noqa: BLE001 - see _begin
            self._fail(command, self.error_of(error))
        except BaseException:  # noqa: BLE001 - cancelled; nothing else gets out of a task
            self._fail(command, CommandError(NvmeStatus.ABORT_REQUESTED))
        self.shell.wake()

    @staticmethod
    def error_of(error: Exception) -> CommandError:
        if isinstance(error, CommandError):
            return error
        if isinstance(error, SpaceError):
            if error.status in {Status.CORRUPT, Status.IO, Status.UNAVAILABLE}:
                log.error("%s", error)
            status = status_of(error)
            return CommandError(NvmeStatus(status & ~DNR), retry=not status & DNR)
        log.error("unexpected error in a command", exc_info=error)
        return CommandError(NvmeStatus.INTERNAL_ERROR)

    def abort(self, cid: int) -> bool:
        """Ends a command if nothing of it can take effect any more; a mutation under way goes on."""
        if self._fused is not None and self._fused.cid == cid:
            first, self._fused = self._fused, None
            self._fail(first, CommandError(NvmeStatus.ABORT_REQUESTED))
            return True
        for command in self._deferred:
            if command.cid == cid and cid not in self._pairs:
                self._deferred.remove(command)
                self._fail(command, CommandError(NvmeStatus.ABORT_REQUESTED))
                return True
        handle, mutates = self._running.get(cid, (None, True))
        if handle is None or mutates:
            return False
        handle.cancel()
        return True

    # --- completions out

    def complete(self, command: Command, reply: Reply) -> None:
        """A command succeeded."""
        if not self._settle(command):
            return
        if reply.data:
            success = not self.flow_control and not reply.result
            self.connection.send_data(command.cid, reply.data, reply.length, success=success)
            if success:
                return
        self._send(command.cid, 0, reply.result)

    def _fail(self, command: Command, error: CommandError) -> None:
        if not self._settle(command):
            return
        if self.controller is not None and error.status & ~DNR != NvmeStatus.ABORT_REQUESTED:
            self.controller.log_error(self.number, command, error.status, error.location)
        self._send(command.cid, error.status, error.result)

    def _settle(self, command: Command) -> bool:
        """The command is not outstanding any more; whether the host is still there to be told."""
        if self._outstanding.get(command.cid) is not command:
            return False  # the half of a fused operation whose connection was lost meanwhile
        del self._outstanding[command.cid]
        if command.fetched:
            self._fetched -= command.sgl_length
            self._pools.fetched.give(command.sgl_length)
            if self._deferred:
                self._grant()
        return not self.gone

    def _send(self, cid: int, status: int, result: int = 0) -> None:
        self.connection.respond(cid, status, result, self._sqhd if self.flow_control else 0)

    def answer_event(self, request: Command, event: int) -> None:
        """Completes an Asynchronous Event Request."""
        self.complete(request, Reply(result=event))
        self.shell.wake()

    def abort_request(self, request: Command) -> None:
        """Completes an Asynchronous Event Request that was aborted."""
        self._fail(request, CommandError(NvmeStatus.ABORT_REQUESTED))

    def forget(self, command: Command) -> None:
        """A command will never be answered: the controller was reset under it."""
        self._outstanding.pop(command.cid, None)

    # --- life

    def connected(self, controller: Controller, number: int, entries: int, *, flow_control: bool) -> None:
        """A Connect succeeded."""
        self.controller = controller
        self.number = number
        self.entries = entries
        self.flow_control = flow_control
        if number:
            self._handlers = io.HANDLERS
        else:
            self._handlers = admin.DISCOVERY_HANDLERS if controller.is_discovery else admin.HANDLERS
        self._sqhd = 1 % entries  # the Connect itself
        controller.queues[number] = self
        if number:
            self.connection.use_io_buffers()

    def heard(self, now: float) -> None:
        """Bytes came."""
        self.now = self._heard = now

    def tick(self, now: float) -> None:
        """Time has passed: a host that owes us something is not waited for for ever."""
        self.now = now
        if self.controller is not None and not self.connection.waiting:
            self._heard = now
        elif now - self._heard >= SILENCE_SECONDS and not self.blocked:
            self.close("the host was silent in the middle of something")

    def close(self, reason: str) -> None:
        """Ends the connection."""
        self.shell.close(reason)

    def lost(self) -> None:
        """The connection has ended.  Reads are given up; what changes a namespace is carried out to its end."""
        self.gone = True
        for handle, mutates in list(self._running.values()):
            if handle is not None and not mutates:
                handle.cancel()
        running = [self._outstanding[cid] for cid in self._running if cid in self._outstanding]
        for command in [each for each in self._outstanding.values() if each not in running]:
            self._settle(command)
        self._deferred.clear()
        self._fused = None
        controller = self.controller
        if controller is not None and controller.queues.get(self.number) is self:
            del controller.queues[self.number]
            if not self.number:
                controller.end("its admin queue was closed")


Handler = Callable[[Queue, Command], Reply | Coroutine[Any, Any, Reply] | None]
"""Carries a command out: an answer, a coroutine that has one, or None where the answer comes by another way."""


def _blocks(command: Command) -> tuple[int, int, int, int]:
    """Namespace, first block and number of blocks."""
    return command.nsid, command.cdw10, command.cdw11, command.cdw12 & 0xFFFF

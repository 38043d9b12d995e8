"""A store's state with zones in it, and shipments into it, without a store."""

from __future__ import annotations

from collections.abc import Sequence

from space._errors import SpaceError
from space.events import commands as cmd
from space.events.commands import Receipt, Request
from space.events.ids import ROOT, zone_root
from space.events.types import Event, Kind, ZoneKind
from space.statemachine.sequencer import Prepared, prepare
from space.statemachine.tables import Overlay
from tests.state_support import Batch, MemoryWriter

ROOT_ID = bytes(ROOT)
HERE, HOME, OTHER = (bytes([number]) * 16 for number in (0xA1, 0xA2, 0xA3))
"""Ids of the zone of the state, of the one that ships to it, and of a third."""

KEY = bytes(32)


def capsule(number: int) -> bytes:
    """An id."""
    return bytes(8) + b"capsule" + bytes([number])


def frame(content: bytes, *, key: int = 0) -> cmd.StoredFrame:
    """Content as one frame that is stored as it is; its checksums are nobody's business here."""
    record = len(content).to_bytes(4, "little") * 2 + bytes(8) + key.to_bytes(4, "little") + bytes(28)
    return cmd.StoredFrame(record, content)


def write(number: int, offset: int, content: bytes, *, key: int = 0) -> cmd.WriteExtent:
    """A write of one frame."""
    return cmd.WriteExtent(capsule(number), offset, len(content), [frame(content, key=key)])


def zone_commands() -> list[cmd.Command]:
    """A root directory, this store's zone, and the two it knows."""
    return [
        cmd.InitialiseStore(bytes(16), 0o755, 0, 0),
        cmd.DefineZone(HERE, "here", ZoneKind.METRO, "https://here:1", b"pem", KEY),
        cmd.AddZone(HOME, "paris", ZoneKind.GEO, "https://paris:1", b"pem", KEY),
        cmd.AddZone(OTHER, "oslo", ZoneKind.EDGE, "https://oslo:1", b"pem", KEY),
    ]


class State:
    """Rows and the log that led to them."""

    def __init__(self, commands: Sequence[cmd.Command] = ()) -> None:
        self.rows = MemoryWriter()
        self.batches: list[Batch] = []
        self.time_ns = 0
        for command in commands:
            self.done(command)

    @property
    def position(self) -> int:
        """The last batch."""
        return len(self.batches)

    @property
    def overlay(self) -> Overlay:
        """For looking at rows."""
        return Overlay(self.rows)

    def prepare(self, *commands: cmd.Command) -> Prepared:
        """Decides commands as the next batch and, if there is anything to log, takes it."""
        self.time_ns += 10
        requests = [Request(each, "test") for each in commands]
        batch = prepare(self.rows, requests, position=self.position + 1, time_ns=self.time_ns)
        if batch.entries:
            self.batches.append(Batch.of(batch))
            batch.overlay.flush(self.rows)
        return batch

    def outcome(self, command: cmd.Command) -> Receipt | SpaceError:
        """What becomes of a command."""
        return self.prepare(command).outcomes[0]

    def done(self, command: cmd.Command) -> list[Event]:
        """The events of a command that is accepted."""
        batch = self.prepare(command)
        assert isinstance(batch.outcomes[0], Receipt), batch.outcomes[0]
        return [event for _, _, event in batch.linked()]

    def refused(self, command: cmd.Command) -> SpaceError:
        """Why a command is refused; nothing changes by it."""
        before = dict(self.rows.rows)
        outcome = self.outcome(command)
        assert isinstance(outcome, SpaceError), outcome
        assert self.rows.rows == before
        return outcome


def shipment(
    from_position: int,
    through_position: int,
    *commands: cmd.Command,
    zone: bytes = HOME,
    shard: int = 0,
    lane: int = 0,
    time_ns: int = 7,
    steps: tuple[int, int] = (0, 0),
    resume: bytes = b"",
    epoch: int = 0,
) -> cmd.ReceiveShipment:
    """A shipment, by default of the first stream of HOME."""
    return cmd.ReceiveShipment(
        zone, shard, lane, from_position, through_position, time_ns, commands, *steps, resume, epoch
    )


def made(number: int, kind: Kind = Kind.FILE, *, name: bytes = b"", parent: bytes = b"") -> cmd.CreateCapsule:
    """A creation, by default of a file, in the shipping zone's root directory where it has a name."""
    return cmd.CreateCapsule(
        capsule(number),
        kind,
        parent=(parent or zone_root(HOME)) if name else b"",
        name=name,
        policy=b"policy",
    )

"""What is offered: subsystems with namespaces, the ports they are reached at, and who is told when that changes.

A :class:`Target` has subsystems; a :class:`Subsystem` has namespaces and the controllers hosts have made; all of it
may change while hosts are connected.  Every change reaches the hosts as an asynchronous event: a namespace that came,
went or was resized, an ANA group whose state changed, a subsystem or referral in the discovery log.

Nothing here does I/O; sockets are the server's, devices are :class:`space.projections.block.BlockDevice`.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import attrs

from space._errors import ConflictError, NotFoundError, UsageError
from space.projections.block import BlockDevice, BlockInfo
from space.projections.nvme.auth import Credentials
from space.projections.nvme.reservations import Keeper, MemoryKeeper

if TYPE_CHECKING:
    from space.projections.nvme.controller import Controller

DISCOVERY_NQN: Final = "nqn.2014-08.org.nvmexpress.discovery"
"""The well-known name of every discovery service (Base Specification 2.0, section 4.5)."""
DISCOVERY_PORT: Final = 8009
IO_PORT: Final = 4420
NQN_BYTES_MAX: Final = 223
NAMESPACES_MAX: Final = 1024
"""NN and MNAN: as many as the changed namespace list can name."""
ALL_NAMESPACES: Final = 0xFFFF_FFFF
"""Where a command may mean all of them."""
ANA_GROUPS_MAX: Final = 256
"""A group for each shard of a cluster."""
CONTROLLER_IDS: Final = range(1, 0xFFF0)
"""What a controller may be numbered (section 3.1.3)."""
CONTROLLERS_MAX: Final = 1024
"""Controllers of one subsystem at a time: each has a connection and a few kilobytes."""
BLOCK_SIZES: Final = (512, 4096)


class AnaState(enum.IntEnum):
    """How a namespace is reached through this node (section 8.1)."""

    OPTIMIZED = 1
    NON_OPTIMIZED = 2
    INACCESSIBLE = 3
    PERSISTENT_LOSS = 4
    CHANGE = 15


def check_nqn(text: str) -> str:
    """The name, if it is a well-formed NVMe Qualified Name (section 4.5).

    Raises:
        UsageError: it is not.
    """
    if not text.startswith("nqn.") or not 5 <= len(text.encode()) <= NQN_BYTES_MAX or "\0" in text:
        raise UsageError(f"not an NVMe Qualified Name: {text!r}", hint="such as nqn.2024-01.org.example:name")
    return text


@attrs.define
class Counters:
    """What hosts did with a namespace; bytes and commands."""

    bytes_read: int = 0
    bytes_written: int = 0
    reads: int = 0
    writes: int = 0


@attrs.define(eq=False)
class Namespace:
    """A block device under a number; its identities are the same for ever.

    Attributes:
        nsid: from 1.
        eui64, nguid, uuid: 8, 16 and 16 bytes; ``uuid`` tells one device from another on every path.
        read_only: hosts see a write-protected namespace; so they do when the device says so.
        ana_group: from 1; its state is the subsystem's business.
        noticed: how many of its reservations' notices hosts were told; those from before are nobody's any more.
    """

    nsid: int
    device: BlockDevice
    uuid: bytes
    nguid: bytes = bytes(16)
    eui64: bytes = bytes(8)
    read_only: bool = False
    ana_group: int = 1
    reservations: Keeper = attrs.field(factory=MemoryKeeper)
    counters: Counters = attrs.field(factory=Counters)
    noticed: int = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        if not 1 <= self.nsid <= NAMESPACES_MAX:
            raise UsageError(f"a namespace id is 1 to {NAMESPACES_MAX}, not {self.nsid}")
        if not 1 <= self.ana_group <= ANA_GROUPS_MAX:
            raise UsageError(f"an ANA group is 1 to {ANA_GROUPS_MAX}, not {self.ana_group}")
        if (len(self.uuid), len(self.nguid), len(self.eui64)) != (16, 16, 8):
            raise UsageError("a namespace has a UUID of 16, an NGUID of 16 and an EUI64 of 8 bytes")
        if self.device.info().block_size not in BLOCK_SIZES:
            raise UsageError(f"a block has 512 or 4096 bytes, not {self.device.info().block_size}")
        self.noticed = self.reservations.state.noticed

    def info(self) -> BlockInfo:
        """The device as it is now."""
        return self.device.info()

    @property
    def protected(self) -> bool:
        """Whether every write is refused."""
        return self.read_only or self.info().read_only


@attrs.define(eq=False)
class Subsystem:
    """Namespaces under one name, and the controllers through which hosts use them.

    Attributes:
        nqn: its name.
        serial, model, firmware: at most 20, 40 and 8 ASCII characters.
        hosts: the names of the hosts that may connect; None means any.
        controller_ids: numbers this node gives to controllers; nodes that serve the same name need ranges apart,
            because a host refuses two controllers of one subsystem with one number.
        queues_max: I/O queues of one controller.
        credentials: by the name of a host; one that is named here has to authenticate on every queue.
    """

    nqn: str
    serial: str
    model: str = "space"
    firmware: str = "1"
    hosts: frozenset[str] | None = None
    controller_ids: range = CONTROLLER_IDS
    queues_max: int = 64
    credentials: dict[str, Credentials] = attrs.field(factory=dict, repr=False)
    namespaces: dict[int, Namespace] = attrs.field(factory=dict, init=False)
    controllers: dict[int, Controller] = attrs.field(factory=dict, init=False)
    ana_states: dict[int, AnaState] = attrs.field(factory=dict, init=False)
    ana_changes: dict[int, int] = attrs.field(factory=dict, init=False)
    _next_controller: int = attrs.field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        check_nqn(self.nqn)
        for text, size in ((self.serial, 20), (self.model, 40), (self.firmware, 8)):
            if not text.isascii() or not text.isprintable() or len(text) > size:
                raise UsageError(f"{text!r} is not at most {size} printable ASCII characters")

    def add(self, namespace: Namespace) -> None:
        """Offers a namespace; connected hosts are told.

        Raises:
            ConflictError: its number is taken.
        """
        if namespace.nsid in self.namespaces:
            raise ConflictError(f"{self.nqn} has a namespace {namespace.nsid} already")
        self.namespaces[namespace.nsid] = namespace
        self._group(namespace.ana_group)
        self.changed(namespace.nsid)

    def remove(self, nsid: int) -> Namespace:
        """Offers it no longer; connected hosts are told, and their commands to it are refused.

        Raises:
            NotFoundError: there is none.
        """
        namespace = self.namespaces.pop(nsid, None)
        if namespace is None:
            raise NotFoundError(f"{self.nqn} has no namespace {nsid}")
        self.changed(nsid)
        return namespace

    def tell_reservations(self, namespace: Namespace) -> None:
        """Connected hosts get the notices about a namespace's reservations that came since this was last asked."""
        state = namespace.reservations.state
        for host, notice in state.noticed_since(namespace.noticed):
            for controller in list(self.controllers.values()):
                if controller.host_id == host:
                    controller.reservation_notice(namespace.nsid, notice)
        namespace.noticed = state.noticed

    def changed(self, nsid: int) -> None:
        """A namespace has another size, or is read-only (no longer): hosts are told to look."""
        for controller in list(self.controllers.values()):
            controller.namespace_changed(nsid)

    def set_ana(self, group: int, state: AnaState) -> None:
        """How the namespaces of a group are reached from now on; connected hosts are told."""
        self._group(group)
        if self.ana_states[group] == state:
            return
        self.ana_states[group] = state
        self.ana_changes[group] += 1
        for controller in list(self.controllers.values()):
            controller.ana_changed()

    def _group(self, group: int) -> None:
        self.ana_states.setdefault(group, AnaState.OPTIMIZED)
        self.ana_changes.setdefault(group, 0)

    def admits(self, host_nqn: str) -> bool:
        """Whether a host may connect."""
        return self.hosts is None or host_nqn in self.hosts

    def free_controller_id(self) -> int | None:
        """A number no controller has, the one free for longest first; None: there are too many."""
        if len(self.controllers) >= min(CONTROLLERS_MAX, len(self.controller_ids)):
            return None
        while True:
            number = self.controller_ids[self._next_controller % len(self.controller_ids)]
            self._next_controller += 1
            if number not in self.controllers:
                return number


@attrs.frozen
class Port:
    """Where hosts connect; an address of a wildcard is told as the one the host has reached."""

    number: int
    address: str
    service: int
    discovery_only: bool = False


@attrs.frozen
class Referral:
    """Another discovery service."""

    address: str
    service: int = DISCOVERY_PORT
    nqn: str = DISCOVERY_NQN
    number: int = 0
    same: bool = False  # whether it tells what this one does


class Target:
    """All that one server offers.

    Attributes:
        subsystems: by name.
        discovery: the subsystem of discovery controllers; it has no namespaces.
        ports, others: where it is reached, and where the same subsystems are on other nodes.
        generation: of the discovery log.
    """

    def __init__(self, *, serial: str = "space") -> None:
        self.subsystems: dict[str, Subsystem] = {}
        self.discovery = Subsystem(DISCOVERY_NQN, serial)
        self.ports: list[Port] = []
        self.others: list[Port] = []
        self.referrals: list[Referral] = []
        self.generation = 0

    def add(self, subsystem: Subsystem) -> None:
        """Offers a subsystem.

        Raises:
            ConflictError: there is one of that name.
        """
        if subsystem.nqn in self.subsystems or subsystem.nqn == DISCOVERY_NQN:
            raise ConflictError(f"a subsystem named {subsystem.nqn} is there already")
        self.subsystems[subsystem.nqn] = subsystem
        self.discovery_changed()

    def remove(self, nqn: str) -> Subsystem:
        """Offers it no longer: its controllers are ended.

        Raises:
            NotFoundError: there is none.
        """
        subsystem = self.subsystems.pop(nqn, None)
        if subsystem is None:
            raise NotFoundError(f"there is no subsystem {nqn}")
        for controller in list(subsystem.controllers.values()):
            controller.end("its subsystem is gone")
        self.discovery_changed()
        return subsystem

    def set_hosts(self, nqn: str, hosts: frozenset[str] | None) -> None:
        """Who may connect from now on; controllers of hosts that may not any more are ended.

        Raises:
            NotFoundError: there is no such subsystem.
        """
        subsystem = self.subsystems.get(nqn)
        if subsystem is None:
            raise NotFoundError(f"there is no subsystem {nqn}")
        subsystem.hosts = hosts
        for controller in list(subsystem.controllers.values()):
            if not subsystem.admits(controller.host_nqn):
                controller.end("its host may not use the subsystem any more")
        self.discovery_changed()

    def set_ports(self, ports: list[Port]) -> None:
        """Where it is reached."""
        self.ports = ports
        self.discovery_changed()

    def set_referrals(self, referrals: list[Referral]) -> None:
        """Which other discovery services hosts are told of."""
        self.set_others(self.others, referrals)

    def set_others(self, ports: list[Port], referrals: list[Referral]) -> None:
        """Where other nodes serve the same subsystems, and which other discovery services there are."""
        if (ports, referrals) != (self.others, self.referrals):
            self.others, self.referrals = ports, referrals
            self.discovery_changed()

    def discovery_changed(self) -> None:
        """Connected discovery controllers tell their hosts."""
        self.generation = (self.generation + 1) & 0xFFFF_FFFF_FFFF_FFFF
        for controller in list(self.discovery.controllers.values()):
            controller.discovery_changed()

    def find(self, nqn: str) -> Subsystem | None:
        """The subsystem of a name, the discovery service among them."""
        return self.discovery if nqn == DISCOVERY_NQN else self.subsystems.get(nqn)

    def controllers(self) -> Iterator[Controller]:
        """All controllers there are."""
        for subsystem in [self.discovery, *self.subsystems.values()]:
            yield from list(subsystem.controllers.values())

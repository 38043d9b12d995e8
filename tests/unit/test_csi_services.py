"""Requests of the CSI specification checked, errors put into its codes, and its methods answered by name."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import attrs
import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from space._errors import NotFoundError, SpaceError, Status, UnavailableError, UsageError
from space.projections.csi import check
from space.projections.csi.controller import Controller, volume_message
from space.projections.csi.group import GroupController
from space.projections.csi.identity import Identity
from space.projections.csi.metadata import SnapshotMetadata
from space.projections.csi.model import (
    TOPOLOGY_ZONE,
    TRANSPORTS,
    Mounting,
    Node,
    Published,
    Reach,
    Usage,
    Volume,
    Wanted,
    host_nqn,
    host_uuid,
    node_address,
)
from space.projections.csi.node import NodeService, _Turn
from space.projections.csi.pb import csi_pb2 as pb
from space.projections.csi.server import Counts, generic_handler, method_name
from space.projections.csi.status import CODES, code_of

pytestmark = [pytest.mark.unit, pytest.mark.requires("py:grpc", "py:google.protobuf")]

_MODE = pb.VolumeCapability.AccessMode
SERVICES = {
    "Identity": Identity,
    "Controller": Controller,
    "GroupController": GroupController,
    "SnapshotMetadata": SnapshotMetadata,
    "Node": NodeService,
}
BLOCK = check.BLOCK_BYTES


def test_every_status_has_a_code() -> None:
    """The table is total, and what nobody foresaw is INTERNAL."""
    assert set(CODES) == set(Status)
    assert code_of(ValueError()) is grpc.StatusCode.INTERNAL
    assert code_of(NotFoundError("x")) is grpc.StatusCode.NOT_FOUND


def test_every_method_of_the_specification_is_answered() -> None:
    """Each of the 32 methods has one of that name in the class for its service, and no service is left out."""
    services = pb.DESCRIPTOR.services_by_name
    assert set(services) == set(SERVICES)
    names = [(name, method.name) for name, found in services.items() for method in found.methods]
    assert len(names) == 32
    for service, name in names:
        assert callable(getattr(SERVICES[service], method_name(name)))


def test_a_handler_knows_the_methods_of_its_service() -> None:
    """The table made from the descriptor leads to a method by its path, and to nothing by another one."""

    class Details:
        def __init__(self, method: str) -> None:
            self.method = method

    handler = generic_handler("Identity", Identity("1", controller=True, ready=ready), Counts())
    assert handler.service(Details("/csi.v1.Identity/Probe")) is not None
    assert handler.service(Details("/csi.v1.Identity/Nothing")) is None


async def ready() -> bool:
    """It is."""
    return True


@pytest.mark.parametrize(
    "value",
    ["01a1fe63-dbce-75ac-b31e-5202410d9ac4", "csi-" + "0a" * 32],
)
def test_ids_that_may_have_been_given_out(value: str) -> None:
    """UUIDs in their one spelling, and the ids kubelets draw, may be somebody's."""
    assert check.known_id(value, "volume") == value


@given(st.text(max_size=64))
def test_no_other_text_is_an_id(value: str) -> None:
    """Anything else is nobody's, and has neither a slash nor a dot that could lead anywhere."""
    try:
        found = check.known_id(value, "volume")
    except (UsageError, NotFoundError):
        return
    assert "/" not in found
    assert "." not in found


@given(st.text(max_size=40) | st.text(alphabet="/.a", max_size=20))
def test_a_path_means_what_it_says(value: str) -> None:
    """A path that is taken is absolute and has no part that leads up or stays."""
    try:
        found = check.path(value, "target_path")
    except UsageError:
        return
    assert found.startswith("/")
    assert not {"", ".", ".."} & set(found[1:].split("/"))


@pytest.mark.parametrize(
    "required, limit, block, found",
    [
        (0, 0, False, check.DEFAULT_BYTES),
        (0, 100, False, 100),
        (5, 0, False, 5),
        (5, 0, True, BLOCK),
        (BLOCK + 1, 2 * BLOCK, True, 2 * BLOCK),
        (0, BLOCK + 1, True, BLOCK),
    ],
)
def test_capacity(required: int, limit: int, block: bool, found: int) -> None:
    """The smallest size in the range is taken; of a block device, in whole blocks."""
    wanted = pb.CapacityRange(required_bytes=required, limit_bytes=limit)
    assert check.capacity(wanted, block=block) == (found, limit)


@pytest.mark.parametrize(
    "required, limit, block",
    [(-1, 0, False), (2, 1, False), (BLOCK + 1, BLOCK + 2, True), ((1 << 63) - 1, 0, False), (0, 1, True)],
)
def test_capacities_there_are_not(required: int, limit: int, block: bool) -> None:
    """A range nothing is in is OUT_OF_RANGE."""
    with pytest.raises(SpaceError) as caught:
        check.capacity(pb.CapacityRange(required_bytes=required, limit_bytes=limit), block=block)
    assert code_of(caught.value) is grpc.StatusCode.OUT_OF_RANGE


@pytest.mark.parametrize(
    "wanted",
    [
        pb.VolumeCapability(),
        pb.VolumeCapability(block=pb.VolumeCapability.BlockVolume()),
        pb.VolumeCapability(access_mode=_MODE(mode=_MODE.SINGLE_NODE_WRITER)),
        pb.VolumeCapability(
            mount=pb.VolumeCapability.MountVolume(mount_flags=["upperdir=/"]),
            access_mode=_MODE(mode=_MODE.SINGLE_NODE_WRITER),
        ),
        pb.VolumeCapability(
            mount=pb.VolumeCapability.MountVolume(volume_mount_group="-1"),
            access_mode=_MODE(mode=_MODE.SINGLE_NODE_WRITER),
        ),
    ],
)
def test_capabilities_that_are_not_whole(wanted: pb.VolumeCapability) -> None:
    """Without a type, without a mode, with flags or groups there are not, a capability is an invalid argument."""
    with pytest.raises(UsageError):
        check.capability(wanted)


def test_readers_mount_read_only() -> None:
    """Where the access mode only reads, the mount is read-only, whatever else is asked."""
    mount = pb.VolumeCapability.MountVolume(mount_flags=["rw", "noexec"])
    mode = _MODE(mode=_MODE.MULTI_NODE_READER_ONLY)
    found = check.capability(pb.VolumeCapability(mount=mount, access_mode=mode))
    assert (found.mounting().readonly, found.mounting().flags) == (True, ("noexec",))
    assert found.published(readonly=False).readonly


def test_parameters_are_known_or_refused() -> None:
    """The orchestrator's own are left out, a policy's kept, others refused; mutable ones are of a policy only."""
    given = {"csi.storage.k8s.io/pvc/name": "x", "compression": "zstd", "moment": "-1h"}
    assert check.parameters(given) == {"compression": "zstd", "moment": "-1h"}
    for wrong, field in (({"speed": "high"}, "parameters"), ({"moment": "-1h"}, "mutable_parameters")):
        with pytest.raises(UsageError):
            check.parameters(wrong, field=field)


@pytest.mark.parametrize("token, entries", [("x", 0), ("", -1), ("../", 1)])
def test_pages_nobody_gave_out(token: str, entries: int) -> None:
    """A token that is none of ours, or a negative number, is refused."""
    with pytest.raises(UsageError):
        check.page(token, entries)


def test_a_volume_says_where_it_can_be_reached() -> None:
    """The message has the zone, and the source it began as."""
    source = "01a1fe63-dbce-75ac-b31e-5202410d9ac4"
    found = volume_message(
        Volume("id", "n", 5, block=True, created_ns=0, zone="z", source=f"snapshot/{source}")
    )
    assert found.accessible_topology[0].segments[TOPOLOGY_ZONE] == "z"
    assert found.content_source.snapshot.snapshot_id == source


def test_counts_are_prometheus_text() -> None:
    """Each method and code has a line, in order."""
    counts = Counts()
    counts.add("Probe", grpc.StatusCode.OK, 0.25)
    counts.add("Probe", grpc.StatusCode.OK, 0.25)
    assert 'csi_operations_total{method="Probe",code="OK"} 2' in counts.text().splitlines()
    assert 'csi_operations_seconds_total{method="Probe"} 0.500000' in counts.text().splitlines()


def test_turns_come_one_after_the_other_and_are_forgotten() -> None:
    """Calls for one volume never overlap, those for others do, and a cancelled one leaves nothing behind."""
    locks: dict[str, tuple[asyncio.Lock, int]] = {}
    inside: list[str] = []

    async def turn(volume: str) -> None:
        async with _Turn(locks, volume):
            assert volume not in inside
            inside.append(volume)
            await asyncio.sleep(0)
            inside.remove(volume)

    async def main() -> None:
        tasks = [asyncio.create_task(turn(volume)) for volume in "aabbab" * 4]
        await asyncio.sleep(0)
        tasks[-1].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())
    assert locks == {}


# --- over the network ------------------------------------------------------------------------------

ID = "01a1fe63-dbce-75ac-b31e-5202410d9ac4"
NFS = Reach("nfs", "store:2049", share=f"/{ID}")
NVME = Reach("nvme", "[2001:db8::1]:4420", nqn="nqn.2014-08.org.nvmexpress:uuid:x", uuid=ID)


def network_volume(transport: str) -> Volume:
    """A volume of a transport."""
    block = transport in TRANSPORTS[True]
    return Volume(ID, "n", 5, block, 0, parameters={"transport": transport})


def capability(*, block: bool, flags: list[str] | None = None) -> pb.VolumeCapability:
    """A writer's."""
    mode = _MODE(mode=_MODE.MULTI_NODE_MULTI_WRITER)
    if block:
        return pb.VolumeCapability(block=pb.VolumeCapability.BlockVolume(), access_mode=mode)
    return pb.VolumeCapability(
        mount=pb.VolumeCapability.MountVolume(mount_flags=flags or []), access_mode=mode
    )


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """What it gives."""
    return asyncio.run(work)


def failing(work: Coroutine[Any, Any, Any]) -> grpc.StatusCode:
    """The code of what has to fail."""
    with pytest.raises(SpaceError) as caught:
        run(work)
    return code_of(caught.value)


@pytest.mark.parametrize("way", ["nfs", "nvme"])
def test_contexts_say_what_a_node_has_to_know(way: str) -> None:
    """From what making and publishing a volume give, a node without a store has its kind, transport and reach."""
    volume, reach = network_volume(way), NFS if way == "nfs" else NVME
    known = check.told(ID, check.volume_context(volume))
    assert (known.id, known.block, known.transport) == (ID, volume.block, way)
    assert check.reach(reach.context(), known) == reach


@pytest.mark.parametrize(
    "context",
    [
        {},
        {"transport": "nvme"},
        {"transport": "nfs", "server": "store:2049"},
        {"transport": "nfs", "server": "store", "share": f"/{ID}"},
        {"transport": "nfs", "server": "store:0", "share": f"/{ID}"},
        {"transport": "nfs", "server": "store:2049,vers=3", "share": f"/{ID}"},
        {"transport": "nfs", "server": "store:2049", "share": "/x,vers=3"},
        {"transport": "nfs", "server": "store:2049", "share": "/../etc"},
        {"transport": "nfs", "server": "store:2049", "share": ID},
    ],
)
def test_reaches_that_are_none(context: dict[str, str]) -> None:
    """Whatever could be another option of a mount, or another path, or is not whole, is refused."""
    with pytest.raises(UsageError):
        check.reach(context, network_volume("nfs"))


@pytest.mark.parametrize(
    "field, value", [("nqn", "nqn.x,hostnqn=y"), ("nqn", ""), ("uuid", "x"), ("server", "h")]
)
def test_targets_that_are_none(field: str, value: str) -> None:
    """Nothing that could be another option of a connection is taken for a name."""
    with pytest.raises(UsageError):
        check.reach({**NVME.context(), field: value}, network_volume("nvme"))


@pytest.mark.parametrize("context", [{}, {"type": "x"}, {"type": "tree", "transport": "nvme"}])
def test_volume_contexts_that_are_none(context: dict[str, str]) -> None:
    """Without a kind, or with a transport of the other kind, nothing is known."""
    with pytest.raises(UsageError):
        check.told(ID, context)


def test_flags_of_the_nfs_client_are_for_nfs() -> None:
    """Its options reach it, in order, and only where it is; the rest is a bind mount's; no server is named so."""
    found = check.capability(capability(block=False, flags=["noatime", "hard", "nconnect=4", "vers=4.1"]))
    mounting = found.mounting()
    assert (tuple(mounting.flags), tuple(mounting.options)) == (
        ("noatime",),
        ("hard", "nconnect=4", "vers=4.1"),
    )
    check.fits(network_volume("nfs"), found)
    with pytest.raises(UsageError, match="over NFS, not over fuse"):
        check.fits(network_volume("fuse"), found)
    for flag in (
        "addr=1.2.3.4",
        "port=1",
        "vers=3",
        "sec=krb5",
        "nconnect=4,port=1",
        "xprtsec=tls",
        "clientaddr=x",
    ):
        with pytest.raises(UsageError):
            check.capability(capability(block=False, flags=[flag]))


@pytest.mark.parametrize(
    "value, address",
    [("a", None), ("a@", ""), ("a@192.0.2.1", "192.0.2.1"), ("a@2001:db8::1", "2001:db8::1")],
)
def test_ids_of_nodes(value: str, address: str | None) -> None:
    """One without a store has an @, and its address behind that."""
    assert check.node_id(value) == value
    assert node_address(value) == address


@pytest.mark.parametrize("value", ["a@x", "a@1.2.3.4.5", "a@:", "@1.2.3.4", "a@b@", "a" * 193])
def test_ids_no_node_has(value: str) -> None:
    """Anything else is nobody's."""
    with pytest.raises(NotFoundError):
        check.node_id(value)


def test_a_node_is_one_host() -> None:
    """The name of a node as an NVMe host has its identifier in it, and is no other node's."""
    assert host_nqn("a@") == f"nqn.2014-08.org.nvmexpress:uuid:{host_uuid('a@')}"
    assert host_uuid("a@") != host_uuid("a")


class OneVolume:
    """A controller's volumes: one, published nowhere."""

    def __init__(self, volume: Volume, reach: Reach | None) -> None:
        self.known = volume
        self.reach = reach
        self.wanted: list[Wanted] = []

    async def create(self, wanted: Wanted) -> Volume:
        """Made."""
        self.wanted.append(wanted)
        return attrs.evolve(self.known, zone=wanted.zone)

    async def volume(self, volume: str) -> Volume:
        """It."""
        return self.known

    async def publish(self, volume: str, node: str, published: Published) -> Reach | None:
        """Everywhere."""
        return self.reach


@pytest.mark.parametrize("way, zone", [("nfs", ""), ("nvme", ""), ("fuse", "here"), ("loop", "here")])
def test_volumes_over_the_network_are_in_no_zone(way: str, zone: str) -> None:
    """They can be made for any topology and are reached from all; others only where the store is."""
    volumes = OneVolume(network_volume(way), None)
    controller = Controller(volumes, zone="here")  # type: ignore[arg-type]
    request = pb.CreateVolumeRequest(
        name="n",
        volume_capabilities=[capability(block=network_volume(way).block)],
        parameters={"transport": way},
        accessibility_requirements=pb.TopologyRequirement(
            requisite=[pb.Topology(segments={TOPOLOGY_ZONE: "elsewhere"})]
        ),
    )
    if zone:
        assert failing(controller.create_volume(request)) is grpc.StatusCode.RESOURCE_EXHAUSTED
        request.accessibility_requirements.requisite[0].segments[TOPOLOGY_ZONE] = zone
    made = run(controller.create_volume(request)).volume
    assert [dict(each.segments) for each in made.accessible_topology] == (
        [{TOPOLOGY_ZONE: zone}] if zone else []
    )
    assert made.volume_context["transport"] == way
    assert volumes.wanted[0].zone == zone


def test_a_transport_is_of_one_kind_of_volume() -> None:
    """A tree over NVMe, a device over NFS, or a transport there is not, is an invalid argument."""
    controller = Controller(OneVolume(network_volume("nfs"), None), zone="here")  # type: ignore[arg-type]
    for way, block in (("nvme", False), ("nfs", True), ("smb", False)):
        wanted = [capability(block=block)]
        request = pb.CreateVolumeRequest(name="n", volume_capabilities=wanted, parameters={"transport": way})
        assert failing(controller.create_volume(request)) is grpc.StatusCode.INVALID_ARGUMENT


def test_publishing_tells_how_to_reach_a_volume() -> None:
    """The publish_context is the reach of a volume over the network, and empty for others."""
    for way, reach in (("nfs", NFS), ("fuse", None)):
        controller = Controller(OneVolume(network_volume(way), reach), zone="here")  # type: ignore[arg-type]
        request = pb.ControllerPublishVolumeRequest(
            volume_id=ID, node_id="a@", volume_capability=capability(block=False)
        )
        answer = run(controller.controller_publish_volume(request))
        assert dict(answer.publish_context) == (reach.context() if reach else {})


class OneHost:
    """A machine that notes what is staged, and whose server may be silent."""

    def __init__(self) -> None:
        self.staged: list[tuple[Volume, Reach | None]] = []
        self.grown: list[int] = []
        self.silent = False

    async def stage(self, volume: Volume, path: str, how: Mounting, reach: Reach | None = None) -> None:
        """Noted."""
        self.staged.append((volume, reach))

    async def seen(self, volume: str, path: str) -> Volume:
        """A device of four bytes."""
        return attrs.evolve(network_volume("nvme"), capacity=4)

    async def condition(self, volume: str, path: str) -> str:
        """Fine."""
        return ""

    async def usage(self, volume: str, path: str) -> Usage:
        """One of four."""
        if self.silent:
            raise UnavailableError("it does not answer")
        return Usage(1, 4)

    async def expand(self, volume: Volume, path: str) -> None:
        """Noted."""
        self.grown.append(volume.capacity)


@pytest.fixture
def host() -> OneHost:
    """A machine."""
    return OneHost()


@pytest.fixture
def remote(host: OneHost) -> NodeService:
    """The service of a machine without a store."""
    return NodeService(None, host, Node("a@", "a", 0))  # type: ignore[arg-type]


def staging(way: str, reach: Reach | None) -> pb.NodeStageVolumeRequest:
    """A request to stage."""
    volume = network_volume(way)
    return pb.NodeStageVolumeRequest(
        volume_id=ID,
        staging_target_path="/s",
        volume_capability=capability(block=volume.block),
        volume_context=check.volume_context(volume),
        publish_context=reach.context() if reach else {},
    )


def test_a_node_without_a_store_stages_what_it_is_told(remote: NodeService, host: OneHost) -> None:
    """Volume and reach come from the contexts; without them, nothing is done."""
    for way, reach in (("nfs", NFS), ("nvme", NVME)):
        run(remote.node_stage_volume(staging(way, reach)))
    assert [(volume.transport, reach) for volume, reach in host.staged] == [("nfs", NFS), ("nvme", NVME)]
    assert failing(remote.node_stage_volume(staging("nfs", None))) is grpc.StatusCode.INVALID_ARGUMENT
    assert failing(remote.node_stage_volume(staging("nfs", NVME))) is grpc.StatusCode.INVALID_ARGUMENT
    assert len(host.staged) == 2


@pytest.mark.parametrize("way", ["fuse", "loop"])
def test_a_node_without_a_store_says_what_it_cannot_have(remote: NodeService, way: str) -> None:
    """A volume that is seen where the store is fails with the transport that would do in the words."""
    with pytest.raises(SpaceError) as caught:
        run(remote.node_stage_volume(staging(way, None)))
    assert code_of(caught.value) is grpc.StatusCode.FAILED_PRECONDITION
    assert f"transport: {'nfs' if way == 'fuse' else 'nvme'}" in caught.value.hint
    inline = pb.NodePublishVolumeRequest(
        volume_id="csi-" + "0a" * 32,
        target_path="/t",
        volume_capability=capability(block=False),
        volume_context={"csi.storage.k8s.io/ephemeral": "true"},
    )
    assert failing(remote.node_publish_volume(inline)) is grpc.StatusCode.FAILED_PRECONDITION


def test_what_a_server_says_of_a_volume(remote: NodeService, host: OneHost) -> None:
    """Statistics are the server's; one that does not answer is a condition of the volume, not a failed call."""
    request = pb.NodeGetVolumeStatsRequest(volume_id=ID, volume_path="/t")
    answer = run(remote.node_get_volume_stats(request))
    assert [(each.used, each.total, each.available) for each in answer.usage] == [(1, 4, 3)]
    host.silent = True
    answer = run(remote.node_get_volume_stats(request))
    assert (list(answer.usage), answer.volume_condition.abnormal) == ([], True)


def test_growth_is_waited_for_without_a_store(remote: NodeService, host: OneHost) -> None:
    """The size to wait for is the request's, in whole blocks, or the one there is."""
    wanted = pb.CapacityRange(required_bytes=BLOCK + 1)
    request = pb.NodeExpandVolumeRequest(volume_id=ID, volume_path="/t", capacity_range=wanted)
    assert run(remote.node_expand_volume(request)).capacity_bytes == 2 * BLOCK
    request.ClearField("capacity_range")
    assert run(remote.node_expand_volume(request)).capacity_bytes == 4
    assert host.grown == [2 * BLOCK, 4]

"""Requests of the CSI specification checked, errors put into its codes, and its methods answered by name."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from space._errors import NotFoundError, SpaceError, Status, UsageError
from space.projections.csi import check
from space.projections.csi.controller import Controller, volume_message
from space.projections.csi.group import GroupController
from space.projections.csi.identity import Identity
from space.projections.csi.metadata import SnapshotMetadata
from space.projections.csi.model import TOPOLOGY_ZONE, Volume
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

"""Any request of the CSI specification is answered or refused in words of ours, whatever its fields hold."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from space._errors import SpaceError
from space._node.caller import Caller
from space._node.calls import carry_out
from space._node.csi_client import RemoteVolumes
from space._node.csi_owner import VolumeCalls, VolumeTarget
from space._node.csi_volumes import VolumeTree
from space._node.store import Store
from space.events.ids import CapsuleId
from space.projections.csi.controller import Controller
from space.projections.csi.group import GroupController
from space.projections.csi.metadata import SnapshotMetadata
from space.projections.csi.model import Mounting, Node, Reach, Usage, Volume, Wanted
from space.projections.csi.node import NodeService
from space.projections.csi.pb import csi_pb2 as pb
from space.projections.csi.server import STREAMING, message_class, method_name

pytestmark = [pytest.mark.property, pytest.mark.requires("py:grpc", "py:google.protobuf")]

MIB: Final = 1 << 20
INLINE: Final = "csi-" + "0a" * 32
METHODS: Final = [
    (service.name, method)
    for service in pb.DESCRIPTOR.services_by_name.values()
    for method in service.methods
    if service.name != "Identity"
]


class NoHost:
    """A machine on which everything is done at once and nothing is seen."""

    async def stage(self, volume: Volume, path: str, how: Mounting, reach: Reach | None = None) -> None:
        """Done."""

    async def unstage(self, volume: str, path: str) -> None:
        """Done."""

    async def publish(self, volume: Volume, staging: str, target: str, how: Mounting) -> None:
        """Done."""

    async def unpublish(self, volume: str, target: str) -> None:
        """Done."""

    async def condition(self, volume: str, path: str) -> str:
        """Fine."""
        return ""

    async def expand(self, volume: Volume, path: str) -> None:
        """Done."""

    async def seen(self, volume: str, path: str) -> Volume:
        """A tree."""
        return Volume(volume, "", 0, False, 0, parameters={"transport": "nfs"})

    async def usage(self, volume: str, path: str) -> Usage:
        """Nothing."""
        return Usage(0, MIB)


class Network:
    """Serves everything, to nobody."""

    def check(self, transport: str) -> None:
        """It is served."""

    def allow(self, transport: str, data: CapsuleId) -> None:
        """It may be."""

    def offer(self, volume: Volume, data: CapsuleId) -> Reach:
        """Somewhere."""
        return Reach(volume.transport, "server:1", share=f"/{volume.id}")

    def withdraw(self, volume: str) -> None:
        """Done."""

    def forget(self, volume: str) -> None:
        """Done."""

    def settle(self) -> None:
        """Done."""


class World:
    """All services over a store with a tree, a device, and a snapshot of each."""

    def __init__(self, home: Path) -> None:
        self.store = Store(home)
        tree = VolumeTree(self.store, network=Network())
        target = VolumeTarget(self.store, VolumeCalls(tree, lambda: MIB, "/mount"))
        self.volumes = RemoteVolumes(
            lambda method, arguments: carry_out(
                target, {"method": method, "arguments": arguments}, Caller(), None
            )
        )
        self.services = {
            "Controller": Controller(self.volumes, zone="z"),
            "GroupController": GroupController(self.volumes),
            "SnapshotMetadata": SnapshotMetadata(self.volumes),
            "Node": NodeService(self.volumes, NoHost(), Node("n", "z", 2)),
            "RemoteNode": NodeService(None, NoHost(), Node("r@", "r", 0)),
        }
        tree.register("n", "z", 2)
        volumes = [tree.create(Wanted(f"v{n}", MIB, 0, block=bool(n))).id for n in range(2)]
        volumes.append(tree.create(Wanted("n", MIB, 0, False, parameters={"transport": "nfs"})).id)
        snapshots = [tree.snapshot(each, f"s{n}").id for n, each in enumerate(volumes)]
        self.known = [*volumes, *snapshots, tree.snapshot_group("g", volumes)["id"], INLINE]

    def close(self) -> None:
        """Closes the store."""
        self.volumes.close()
        self.store.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One world for all requests: what one leaves, the next one meets."""
    made = World(tmp_path_factory.mktemp("csi") / "data")
    yield made
    made.close()


def texts(known: list[str]) -> st.SearchStrategy[str]:
    """Ids there are, paths, names, and anything."""
    likely = [
        *known,
        "",
        "n",
        "/a/b",
        "/a/../b",
        "..",
        "v0",
        "s1",
        "1",
        "ro",
        "true",
        "-1h",
        "@3",
        "zstd",
        "x" * 2000,
        *("r@", "r@192.0.2.1", "r@x", "nfs", "nvme", "fuse", "tree", "block", "h:1", "hard", "vers=4.2"),
    ]
    return st.sampled_from(likely) | st.text(max_size=20)


def numbers() -> st.SearchStrategy[int]:
    """Sizes and counts, small and at the edges."""
    return st.sampled_from([0, 1, -1, MIB, 2 * MIB, (1 << 31) - 1]) | st.integers(-5, 1 << 22)


KEYS: Final = st.sampled_from(
    [
        *("compression", "history", "moment", "source-volume", "csi.storage.k8s.io/ephemeral", "size", "a b"),
        *("transport", "type", "server", "share", "nqn", "uuid"),
    ]
) | st.text(max_size=5)


def messages(descriptor: Any, known: list[str], depth: int = 0) -> st.SearchStrategy[Any]:
    """Messages of a type with any of their fields set."""
    fields = {}
    for field in descriptor.fields:
        found = values(field, known, depth)
        if found is not None:
            fields[field.name] = found
    chosen = st.fixed_dictionaries({}, optional=fields)
    return chosen.map(lambda picked: build(descriptor, picked))


def build(descriptor: Any, picked: dict[str, Any]) -> Any:
    """A message; of fields that exclude each other the last one stays."""
    message = message_class(descriptor)()
    for name, value in picked.items():
        message.MergeFrom(message_class(descriptor)(**{name: value}))
    return message


def values(field: Any, known: list[str], depth: int) -> st.SearchStrategy[Any] | None:
    """Values of a field; None for what lies too deep."""
    repeated = str(getattr(field, "is_repeated", None)) == "True" or (
        not hasattr(type(field), "is_repeated") and field.label == 3
    )
    one: st.SearchStrategy[Any]
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return st.dictionaries(KEYS, texts(known), max_size=3)
    if field.message_type is not None:
        if depth >= 4:
            return None
        one = messages(field.message_type, known, depth + 1)
    elif field.enum_type is not None:
        one = st.sampled_from([each.number for each in field.enum_type.values])
    elif field.cpp_type == field.CPPTYPE_STRING:
        one = texts(known)
    elif field.cpp_type == field.CPPTYPE_BOOL:
        one = st.booleans()
    else:
        one = numbers()
    return st.lists(one, max_size=3) if repeated else one


@settings(suppress_health_check=list(HealthCheck), max_examples=300)
@given(data=st.data())
def test_any_request_is_answered_or_refused(world: World, data: st.DataObject) -> None:
    """Each method, with any fields, gives its answer or an error with a status; nothing else ever comes out."""
    service, method = data.draw(st.sampled_from(METHODS), label="method")
    request = data.draw(messages(method.input_type, world.known), label="request")
    remote = service == "Node" and data.draw(st.booleans(), label="remote")
    work = getattr(world.services["RemoteNode" if remote else service], method_name(method.name))

    async def ask() -> None:
        try:
            if method.name in STREAMING:
                answers: AsyncIterator[Any] = work(request)
                async for answer in answers:
                    assert isinstance(answer, message_class(method.output_type))
            else:
                assert isinstance(await work(request), message_class(method.output_type))
        except SpaceError as error:
            assert str(error)  # noqa: PT017 - either is an answer

    asyncio.run(ask())

"""``space project --view nvme`` as the command line has it, with a host in user space."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

import space
from space._errors import UsageError
from space._node.nvme_view import parse_listen
from tests.cli_support import execute, finish, keys, start
from tests.nvme_initiator import FailedError, Host

WRITE_PROTECTED: Final = 0x020
READY: Final = {
    "view", "name", "source", "at", "target", "address", "read_only", "nqn", "nsid", "namespaces", "hosts", "discover",
    "connect", "pid", "started_ns", "ready_ms",
}  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A store with two block devices of 1 MiB, in blocks of 512 bytes."""
    path = tmp_path / "data"
    for name in ("/one", "/two"):
        assert execute(path, "create", "--size", "1MiB", "--block-size", "512", "--name", name).status == 0
    return path


class Views:
    """Processes that serve views of a store."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.running: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str) -> dict[str, Any]:
        """Serves, and what the command said when hosts could connect."""
        listen = () if "--listen" in arguments else ("--listen", "127.0.0.1:0")
        process = start(self.data, "project", "--view", "nvme", *arguments, *listen)
        self.running.append(process)
        assert process.stdout is not None
        ready: dict[str, Any] = json.loads(process.stdout.readline())
        return ready

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ends the one started last, cleanly."""
        process = self.running.pop()
        process.send_signal(number)
        outcome = finish(process)
        assert outcome.status == 0, outcome.err


@pytest.fixture
def views(data: Path) -> Iterator[Views]:
    """Views that end with the test."""
    served = Views(data)
    yield served
    while served.running:
        served.end()


async def connected(view: dict[str, Any], **options: Any) -> Host:
    """A host of a view."""
    return await Host.connect(int(view["address"].rpartition(":")[2]), view["nqn"], **options)


async def written(view: dict[str, Any], lba: int, content: bytes, *, nsid: int = 1) -> None:
    """Writes and flushes."""
    async with await connected(view) as host:
        await host.queues[0].write(nsid, lba, content, 512)
        await host.queues[0].flush(nsid)


async def held(view: dict[str, Any], lba: int, blocks: int, *, nsid: int = 1) -> bytes:
    """Reads."""
    async with await connected(view) as host:
        return await host.queues[0].read(nsid, lba, blocks, 512)


def test_one_line_says_all_and_what_was_written_stays(data: Path, views: Views) -> None:
    """The line has what scripts need; the view is listed; commands see what hosts wrote, then and after its end."""
    view = views.start("--path", "/one")
    assert keys(view) == READY
    (namespace,) = view["namespaces"]
    assert keys(namespace) == {"nsid", "source", "id", "uuid", "size", "block_size"}
    assert (namespace["nsid"], namespace["size"], namespace["block_size"]) == (1, 1 << 20, 512)
    port = view["address"].rpartition(":")[2]
    assert view["connect"] == f"nvme connect -t tcp -a 127.0.0.1 -s {port} -n {view['nqn']}"
    assert view["discover"] == f"nvme discover -t tcp -a 127.0.0.1 -s {port}"
    asyncio.run(written(view, 2, b"x" * 1024))
    read = ("get", "/one", "--offset", "1024", "--length", "1024")
    assert execute(data, *read).out == "x" * 1024
    (listed,) = execute(data, "project", "ls", "--json").json
    assert keys(listed) == READY - {"ready_ms"} | {"process_start", "state"}
    assert execute(data, "project", "stop", view["address"]).status == 0
    assert finish(views.running.pop()).status == 0
    assert execute(data, *read).out == "x" * 1024
    assert execute(data, "project", "ls", "--json").json == []
    assert not (data / "control.sock").exists()


def test_hosts_know_a_namespace_again(views: Views) -> None:
    """Subsystem, number and identity are a capsule's for ever, whatever is served beside it and in what order."""
    first = views.start("--path", "/one")
    views.end()
    both = views.start("--id", first["namespaces"][0]["id"], "--path", "/two")
    views.end()
    second = views.start("--path", "/two")
    assert first["nqn"] == both["nqn"] == second["nqn"]
    assert both["namespaces"][0] == {**first["namespaces"][0], "source": both["namespaces"][0]["source"]}
    assert both["namespaces"][1] == second["namespaces"][0]
    assert (first["nsid"], second["nsid"]) == (1, 2)


def test_an_interrupt_ends_it_under_a_host(data: Path, views: Views) -> None:
    """With a host connected and its write not flushed, SIGINT ends the view cleanly, and the write is there."""
    view = views.start("--path", "/one")

    async def use() -> None:
        async with await connected(view, queues=4) as host:
            await host.queues[3].write(1, 0, b"kept" * 128, 512)
            await asyncio.to_thread(views.end, signal.SIGINT)
            await host.admin.ended()

    asyncio.run(use())
    assert execute(data, "get", "/one", "--length", "512").out == "kept" * 128


def test_a_resize_reaches_the_host(data: Path, views: Views) -> None:
    """A command resizes a served capsule: the host gets an event, and the size it then asks for is the new one."""
    view = views.start("--path", "/one")

    async def use() -> int:
        async with await connected(view) as host:
            await host.admin.set_feature(0x0B, 0x100)
            event = host.admin.event()
            resized = await asyncio.to_thread(execute, data, "resize", "/one", "2MiB")
            assert resized.status == 0
            assert (await event).checked().result >> 16 & 0xFF == 0x04  # the changed namespace list
            return int.from_bytes((await host.admin.identify(0, nsid=1))[:8], "little")

    assert asyncio.run(use()) == (2 << 20) // 512


def test_a_deleted_capsule_stays_while_it_is_served(data: Path, views: Views) -> None:
    """As an open file does: what is deleted and collected under a host can be written and read until the end."""
    view = views.start("--path", "/one")
    asyncio.run(written(view, 0, b"a" * 512))
    assert execute(data, "rm", "/one").status == 0
    assert execute(data, "gc").status == 0
    asyncio.run(written(view, 1, b"b" * 512))
    assert asyncio.run(held(view, 0, 2)) == b"a" * 512 + b"b" * 512


def test_a_past_moment_beside_its_owner(data: Path, views: Views) -> None:
    """A moment is another subsystem with another identity, the same each time, read and never written."""
    now = views.start("--path", "/one")
    asyncio.run(written(now, 0, b"before".ljust(512)))
    moment = f"@{execute(data, 'digest', '--json').json['position']}"
    asyncio.run(written(now, 0, b"after".ljust(512)))
    past, again = (views.start("--path", "/one", "--at", moment) for _ in range(2))
    assert (past["at"], past["read_only"]) == (moment, True)
    assert past["nqn"] == again["nqn"] != now["nqn"]
    assert past["namespaces"] == again["namespaces"]
    assert past["namespaces"][0]["uuid"] != now["namespaces"][0]["uuid"]
    assert asyncio.run(held(past, 0, 1)) == b"before".ljust(512)
    assert asyncio.run(held(now, 0, 1)) == b"after".ljust(512)
    with pytest.raises(FailedError) as refused:
        asyncio.run(written(past, 0, b"never".ljust(512)))
    assert refused.value.status == WRITE_PROTECTED


def test_the_present_read_only(data: Path, views: Views) -> None:
    """With --read-only hosts see the same namespace, and cannot change it."""
    writable = views.start("--path", "/one")
    views.end()
    view = views.start("--path", "/one", "--read-only")
    assert (view["read_only"], view["nqn"], view["namespaces"]) == (
        True,
        writable["nqn"],
        writable["namespaces"],
    )
    with pytest.raises(FailedError) as refused:
        asyncio.run(written(view, 0, bytes(512)))
    assert refused.value.status == WRITE_PROTECTED


def test_a_second_owner_is_told_how(views: Views) -> None:
    """The present is one process's: the second view is refused with 7 and told what works beside the first."""
    view = views.start("--path", "/one")
    outcome = execute(views.data, "project", "--view", "nvme", "--path", "/two")
    assert outcome.status == 7
    complaint = outcome.complaint()
    assert f"in use by process {view['pid']}, which serves nvme at {view['address']}" in complaint
    assert "--at" in complaint


def test_what_cannot_be_served_is_refused(data: Path, views: Views) -> None:
    """Each mistake has its exit status and one line, and leaves the store free."""
    with space.open(data) as store:
        store.put(b"short", name="/short")
    execute(data, "mkdir", "/directory")
    moment = f"@{execute(data, 'digest', '--json').json['position']}"
    taken = views.start("--path", "/one", "--at", moment)["address"]
    for arguments, status in (
        ((), 2),
        (("--path", "/nothing"), 3),
        (("--path", "/directory", "--at", moment), 2),
        (("--path", "/short"), 2),
        (("--id", "zzz"), 2),
        (("--id", "/one", "--path", "/one"), 2),
        (("--path", "/one", "--listen", "nowhere"), 2),
        (("--path", "/one", "--listen", taken), 7),
        (("--path", "/one", "--listen", "192.0.2.1:0"), 7),
        (("--path", "/one", "--at", "@99999"), 3),
        (("--path", "/one", "--target", "/tmp/never"), 2),
        (("--path", "/one", "--background"), 2),
        (("--path", "/one", "--host", "somebody"), 2),
        (("--path", "/one", "--host-key", "nqn.2024-01.org.example:h"), 2),
    ):
        outcome = execute(data, "project", "--view", "nvme", *arguments)
        assert outcome.status == status, (arguments, outcome.err)
        outcome.complaint()
    for option in (("--listen", "127.0.0.1:0"), ("--host", "nqn.x"), ("--host-key", "a=b"), ("--controller-key", "f")):
        assert execute(data, "project", "--view", "fuse", "--path", "/", *option).status == 2
    assert [each["at"] for each in execute(data, "project", "ls", "--json").json] == [moment]


def test_addresses() -> None:
    """HOST:PORT and [IPV6]:PORT are addresses to listen at; nothing else is."""
    assert parse_listen("0.0.0.0:4420") == ("0.0.0.0", 4420)
    assert parse_listen("a-host.example:0") == ("a-host.example", 0)
    assert parse_listen("[::1]:65535") == ("::1", 65535)
    for wrong in (
        "",
        "host",
        ":1",
        "host:",
        "::1:4420",
        "[::1]",
        "a..b:1",
        "a b:1",
        "h:65536",
        "h:-1",
        "h:\u0661",
    ):
        with pytest.raises(UsageError):
            parse_listen(wrong)

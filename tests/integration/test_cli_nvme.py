"""``space project --view nvme`` as the command line has it, with a host in user space."""

from __future__ import annotations

import asyncio
import base64
import json
import signal
import struct
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

import space
from space._errors import UsageError
from space._node.nvme_view import parse_listen
from tests.cli_support import execute, finish, keys, start
from tests.nvme_initiator import HOST_NQN, FailedError, Host, NotProvedError, status_of

WRITE_PROTECTED: Final = 0x020
CONNECT_INVALID_HOST: Final = 0x184
AUTHENTICATION_REQUIRED: Final = 0x191
OTHER_NQN: Final = "nqn.2024-01.org.example:other"
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


async def held(view: dict[str, Any], lba: int, blocks: int, *, nsid: int = 1, **options: Any) -> bytes:
    """Reads."""
    async with await connected(view, **options) as host:
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


def secret(content: bytes, number: int = 1) -> str:
    """A secret in the form of ``nvme gen-dhchap-key``."""
    return f"DHHC-1:{number:02}:{base64.b64encode(content + zlib.crc32(content).to_bytes(4, 'little')).decode()}:"


HOST_SECRET: Final = secret(bytes(range(32)))
CONTROLLER_SECRET: Final = secret(bytes(range(48)), 2)


def test_only_hosts_that_are_named_may_connect(views: Views) -> None:
    """With --host a host of another name is refused, and the lines for hosts say which name to use."""
    view = views.start("--path", "/one", "--host", HOST_NQN, "--host", OTHER_NQN)
    assert view["hosts"] == [{"nqn": each, "authenticates": False} for each in sorted((HOST_NQN, OTHER_NQN))]
    assert view["connect"].endswith(f"-n {view['nqn']} -q HOST_NQN")
    assert view["discover"].endswith("-q HOST_NQN")
    for name in (HOST_NQN, OTHER_NQN):
        assert asyncio.run(held(view, 0, 1, host=name)) == bytes(512)
    with pytest.raises(FailedError) as refused:
        asyncio.run(held(view, 0, 1, host="nqn.2024-01.org.example:stranger"))
    assert refused.value.status == CONNECT_INVALID_HOST


def test_hosts_prove_who_they_are(data: Path, views: Views, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with a key gets in with the secret alone, both sides prove themselves, and no secret is shown anywhere."""
    (data.parent / "host").write_text(HOST_SECRET + "\n")
    monkeypatch.setenv("CONTROLLER_SECRET", CONTROLLER_SECRET)
    key, answer = f"{HOST_NQN}={data.parent / 'host'}", "env:CONTROLLER_SECRET"
    view = views.start("--path", "/one", "--host-key", key, "--controller-key", answer)
    assert view["hosts"] == [{"nqn": HOST_NQN, "authenticates": True}]
    assert view["connect"].endswith(f"-q {HOST_NQN} -S HOST_SECRET [-C CONTROLLER_SECRET]")
    for answered in (None, CONTROLLER_SECRET):
        assert asyncio.run(held(view, 0, 1, secrets=(HOST_SECRET, answered))) == bytes(512)
    for secrets in ((CONTROLLER_SECRET, None), (HOST_SECRET, HOST_SECRET)):
        with pytest.raises(NotProvedError):
            asyncio.run(held(view, 0, 1, secrets=secrets))
    with pytest.raises(FailedError) as refused:
        asyncio.run(held(view, 0, 1))
    assert refused.value.status == AUTHENTICATION_REQUIRED
    with pytest.raises(FailedError) as refused:
        asyncio.run(held(view, 0, 1, host=OTHER_NQN))
    assert refused.value.status == CONNECT_INVALID_HOST
    arguments = Path(f"/proc/{view['pid']}/cmdline").read_bytes()
    assert b"DHHC" not in arguments + json.dumps(view).encode()


def test_a_secret_is_never_an_argument(data: Path, tmp_path: Path) -> None:
    """Each mistake with hosts and keys has one line that names it and the way out, and repeats no secret."""
    (tmp_path / "host").write_text(HOST_SECRET)
    (tmp_path / "garbage").write_text("DHHC-1:01:garbage:")
    (tmp_path / "long").write_bytes(bytes(5000))
    good = f"{HOST_NQN}={tmp_path / 'host'}"
    for options, words in (
        (("--host-key", f"{HOST_NQN}={HOST_SECRET}"), "everybody on this machine can read arguments"),
        (
            ("--host-key", good, "--controller-key", HOST_SECRET),
            "everybody on this machine can read arguments",
        ),
        (("--host-key", HOST_SECRET), "--host-key has no '=': a secret"),
        (("--host-key", HOST_NQN), "--host-key NQN=FILE"),
        (("--host-key", f"{HOST_NQN}={tmp_path / 'none'}"), "No such file"),
        (("--host-key", f"{HOST_NQN}={tmp_path / 'garbage'}"), "not a DH-HMAC-CHAP secret"),
        (("--host-key", f"{HOST_NQN}={tmp_path / 'long'}"), "too long to be a secret"),
        (("--host-key", f"{HOST_NQN}=env:SPACE_NO_SUCH"), "no environment variable 'SPACE_NO_SUCH'"),
        (("--host-key", good, "--host-key", good), "two keys"),
        (("--host-key", f"somebody={tmp_path / 'host'}"), "not an NVMe Qualified Name"),
        (("--controller-key", str(tmp_path / "host")), "hosts that authenticate; there are none"),
        (("--host", "somebody"), "not an NVMe Qualified Name"),
    ):
        outcome = execute(data, "project", "--view", "nvme", "--path", "/one", *options)
        assert (outcome.status, outcome.out) == (2, ""), options
        assert words in outcome.complaint()
        assert HOST_SECRET.split(":")[2] not in outcome.err


def test_a_tree_is_followed(data: Path, views: Views) -> None:
    """Devices that come, go and move in a served tree are namespaces at once; hosts are told, numbers stay."""
    for arguments in (
        ("mkdir", "/pool"),
        ("mkdir", "/pool/deep"),
        ("create", "--size", "4MiB", "--name", "/pool/a-file"),
        ("mv", "/one", "/pool/one"),
    ):
        assert execute(data, *arguments).status == 0
    view = views.start("--path", "/pool")
    assert [each["source"] for each in view["namespaces"]] == ["/pool/one"]

    async def use() -> None:
        async with await connected(view) as host:
            await host.admin.set_feature(0x0B, 0x100)

            async def after(*arguments: str) -> list[int]:
                """The active namespaces once a command has changed which there are."""
                event = host.admin.event()
                done = await asyncio.to_thread(execute, data, *arguments)
                assert done.status == 0, done.err
                assert (await event).checked().result >> 16 & 0xFF == 0x04
                await host.admin.log(0x04, 4096)
                active = struct.unpack("<1024I", await host.admin.identify(2))
                return [each for each in active if each]

            await host.queues[0].write(1, 0, b"before".ljust(512), 512)
            assert await after("clone", "/pool/one", "/pool/deep/clone") == [1, 2]
            await host.queues[0].write(1, 0, b"source".ljust(512), 512)
            await host.queues[0].write(2, 1, b"clone.".ljust(512), 512)
            assert await host.queues[0].read(1, 0, 2, 512) == b"source".ljust(512) + bytes(512)
            assert await host.queues[0].read(2, 0, 2, 512) == b"before".ljust(512) + b"clone.".ljust(512)
            assert await after("mv", "/two", "/pool/two") == [1, 2, 3]
            assert await after("rm", "/pool/deep/clone") == [1, 3]
            assert await status_of(host.queues[0].read(2, 0, 1, 512)) != 0
            assert await after("mv", "/pool/two", "/two") == [1]
            assert await after("mv", "/two", "/pool/deep/again") == [1, 3]
            await host.queues[0].write(3, 0, bytes(512), 512)

    asyncio.run(use())


def test_a_clone_of_a_moment_is_a_namespace(data: Path, views: Views) -> None:
    """A moment of a device, cloned under a host, is another device that can be written while the first goes on."""
    assert execute(data, "mkdir", "/pool").status == 0
    assert execute(data, "mv", "/one", "/pool/one").status == 0
    view = views.start("--path", "/pool")
    asyncio.run(written(view, 0, b"then".ljust(512)))
    assert execute(data, "snapshot", "/pool/one", "then").status == 0
    asyncio.run(written(view, 0, b"now".ljust(512)))

    async def use() -> None:
        async with await connected(view) as host:
            await host.admin.set_feature(0x0B, 0x100)
            event = host.admin.event()
            cloned = await asyncio.to_thread(
                execute, data, "clone", "/pool/one", "/pool/then", "--at", "then"
            )
            assert cloned.status == 0, cloned.err
            await event
            assert await host.queues[0].read(2, 0, 1, 512) == b"then".ljust(512)
            await host.queues[0].write(2, 0, b"else".ljust(512), 512)
            assert await host.queues[0].read(1, 0, 1, 512) == b"now".ljust(512)

    asyncio.run(use())


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
    for option in (
        ("--listen", "127.0.0.1:0"),
        ("--host", "nqn.x"),
        ("--host-key", "a=b"),
        ("--controller-key", "f"),
    ):
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

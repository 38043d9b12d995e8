"""The kernel's NFS and NVMe clients as the driver asks them: with words of theirs that tests put into their mouths."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from space._errors import ConflictError, RefusedError, SpaceError, Status, UnavailableError, UsageError
from space._node import csi_host, csi_network
from space._node.csi_host import LinuxHost, Note, Notes
from space._node.csi_mounts import Mount
from space.projections.csi import check
from space.projections.csi.model import Mounting, Reach, Volume

pytestmark = [pytest.mark.unit, pytest.mark.requires("py:google.protobuf")]

ID = "01a1fe63-dbce-75ac-b31e-5202410d9ac4"
HOST = csi_network.Host("nqn.host", "00000000-0000-4000-8000-000000000000")


class Server:
    """A socket that answers whoever connects with a few bytes, or with nothing."""

    def __init__(self, answer: bytes) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._answer = answer
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        self.name = f"127.0.0.1:{self._listening.getsockname()[1]}"

    def _serve(self) -> None:
        while True:
            connection, _ = self._listening.accept()
            with connection:
                if connection.recv(64) == b"end":
                    return
                connection.sendall(self._answer)

    def close(self) -> None:
        """Ends it."""
        with socket.create_connection(self._listening.getsockname()) as last:
            last.sendall(b"end")
        self._thread.join()
        self._listening.close()


@pytest.fixture
def server() -> Iterator[Server]:
    """A server that says it is one of NFS."""
    made = Server(csi_network.NULL_REPLY)
    yield made
    made.close()


@pytest.mark.parametrize(
    "number, kind, words",
    [
        (errno.ENODEV, RefusedError, "no NFS client"),
        (errno.ENOENT, RefusedError, "does not offer"),
        (errno.EACCES, RefusedError, "does not offer"),
        (errno.EINVAL, UsageError, "mount flags"),
        (errno.ETIMEDOUT, UnavailableError, "does not answer"),
    ],
)
def test_what_the_nfs_client_refuses(
    server: Server, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[SpaceError], words: str
) -> None:
    """A kernel without NFS and a server that refuses are preconditions; a server that is away may be back."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(csi_network, "_mount", refuse)
    with pytest.raises(kind, match=words) as caught:
        csi_network.mount_nfs(Reach("nfs", server.name, share=f"/{ID}"), "/nowhere")
    wanted = {RefusedError: Status.NOT_PERMITTED, UsageError: Status.INVALID}
    assert caught.value.status is wanted.get(kind, Status.UNAVAILABLE)


def test_a_mount_names_its_server_by_address(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel gets the address that answered, the port, and the claim's options after the driver's."""
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(csi_network, "_mount", lambda *arguments: asked.append(arguments))
    _, _, port = server.name.partition(":")
    reach = Reach("nfs", f"localhost:{port}", share=f"/{ID}")
    csi_network.mount_nfs(reach, "/point", options=["soft", "vers=4.1"], readonly=True)
    ((source, point, kind, flags, options),) = asked
    assert (source, point, kind, flags) == (f"localhost:/{ID}", "/point", "nfs4", 1)
    words = str(options).split(",")
    assert words.index("soft") > words.index("hard")
    assert {"addr=127.0.0.1", f"port={port}"} <= set(words)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_the_kernel_is_not_sent_to_who_is_no_nfs_server(
    answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that hangs up, or speaks something else, is found before the kernel waits for it."""
    monkeypatch.setattr(csi_network, "_mount", lambda *_: pytest.fail("it was asked"))
    made = Server(answer)
    try:
        with pytest.raises(UnavailableError):
            csi_network.mount_nfs(Reach("nfs", made.name, share=f"/{ID}"), "/nowhere")
    finally:
        made.close()


def test_nobody_there() -> None:
    """A port nobody listens at is unavailable."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        name = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(UnavailableError, match="does not answer"):
        csi_network.mount_nfs(Reach("nfs", name, share=f"/{ID}"), "/nowhere")


# --- NVMe ------------------------------------------------------------------------------------------


class Sysfs:
    """What the kernel shows of controllers and devices."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.controllers, self.block = home / "class", home / "block"
        for each in (self.controllers, self.block):
            each.mkdir()
        monkeypatch.setattr(csi_network, "_CONTROLLERS", self.controllers)
        monkeypatch.setattr(csi_network, "_BLOCK", self.block)
        monkeypatch.setattr(csi_network, "_node", lambda found: f"/dev/{found.name}")

    def controller(
        self, name: str, nqn: str, address: str, *, host: str = HOST.nqn, state: str = "live"
    ) -> Path:
        """One controller."""
        return write(
            self.controllers / name,
            subsysnqn=nqn,
            hostnqn=host,
            address=address,
            state=state,
            delete_controller="",
        )

    def device(self, name: str, nqn: str, uuid: str) -> None:
        """One device."""
        write(self.block / name, uuid=uuid, size="8")
        write(self.block / name / "device", subsysnqn=nqn)


def write(directory: Path, **values: str) -> Path:
    """Attributes."""
    directory.mkdir()
    for name, value in values.items():
        (directory / name).write_text(f"{value}\n")
    return directory


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sysfs:
    """Nothing connected yet."""
    return Sysfs(tmp_path, monkeypatch)


def reach(server: Server) -> Reach:
    """A namespace at a server."""
    return Reach("nvme", server.name, nqn="nqn.ours", uuid=ID)


def test_a_device_is_found_by_what_it_is(sysfs: Sysfs, server: Server) -> None:
    """Subsystem and UUID decide, whatever the numbers are; a path of several to a device is none."""
    sysfs.device("nvme0n1", "nqn.other", ID)
    sysfs.device("nvme1n1", "nqn.ours", "another")
    sysfs.device("nvme2c0n1", "nqn.ours", ID)
    assert csi_network.find_device(reach(server)) is None
    sysfs.device("nvme3n7", "nqn.ours", ID)
    assert csi_network.find_device(reach(server)) == "/dev/nvme3n7"
    assert csi_network.device_size("/dev/nvme3n7") == 4096
    assert csi_network.device_size("/dev/nvme9n1") == 0


def test_what_is_connected_is_not_connected_again(
    sysfs: Sysfs, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second call finds the device; a controller of another host, or of another subsystem, is not ours."""
    asked: list[str] = []

    def ask(options: str) -> None:
        asked.append(options)
        host, port = server.name.split(":")
        sysfs.controller("nvme4", "nqn.ours", f"traddr={host},trsvcid={port},src_addr={host}")
        sysfs.device("nvme4n1", "nqn.ours", ID)

    monkeypatch.setattr(csi_network, "_ask_fabrics", ask)
    theirs = sysfs.controller("nvme0", "nqn.ours", "traddr=x", host="nqn.theirs")
    old = sysfs.controller("nvme1", "nqn.ours", "traddr=192.0.2.1,trsvcid=4420", state="connecting")
    assert not csi_network.is_live("nqn.ours", HOST)
    for _ in range(2):
        assert csi_network.connect(reach(server), HOST) == "/dev/nvme4n1"
    assert len(asked) == 1
    assert {"nqn=nqn.ours", f"hostnqn={HOST.nqn}", "ctrl_loss_tmo=-1"} <= set(asked[0].split(","))
    assert (old / "delete_controller").read_text() == "1"  # the target has moved
    assert csi_network.is_live("nqn.ours", HOST)
    csi_network.disconnect("nqn.ours", HOST)
    assert (sysfs.controllers / "nvme4" / "delete_controller").read_text() == "1"
    assert (theirs / "delete_controller").read_text() == "\n"


def test_every_server_is_a_path(sysfs: Sysfs, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several servers those that answer are connected, the others later; one that is not named any more is left."""
    asked: list[str] = []

    def ask(options: str) -> None:
        asked.append(next(each for each in options.split(",") if each.startswith("trsvcid=")))
        place = f"traddr=127.0.0.1,{asked[-1]},src_addr=127.0.0.1"
        sysfs.controller(f"nvme{len(asked)}", "nqn.ours", place)
        if len(asked) == 1:
            sysfs.device("nvme1n1", "nqn.ours", ID)

    monkeypatch.setattr(csi_network, "_ask_fabrics", ask)
    left = sysfs.controller("nvme9", "nqn.ours", "traddr=192.0.2.1,trsvcid=4420")
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    other = Server(b"")
    ports = [f"trsvcid={each.name.split(':')[1]}" for each in (server, other)]
    everywhere = Reach("nvme", f"127.0.0.1:{port},{server.name},{other.name}", nqn="nqn.ours", uuid=ID)
    assert csi_network.connect(everywhere, HOST) == "/dev/nvme1n1"
    assert asked == ports
    assert (left / "delete_controller").read_text() == "1"
    csi_network.complete(everywhere, HOST)
    assert asked == ports
    back = socket.create_server(("127.0.0.1", port))
    csi_network.complete(everywhere, HOST)
    assert asked == [*ports, f"trsvcid={port}"]
    back.close()
    other.close()
    nowhere = Reach("nvme", f"127.0.0.1:{port},127.0.0.1:{port}", nqn="nqn.another", uuid=ID)
    with pytest.raises(UnavailableError, match="does not answer"):
        csi_network.connect(nowhere, HOST)


def test_missing_paths_are_connected_now_and_then(
    tmp_path: Path, sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Devices that are staged get the paths they lack; those of one server, and those being staged, are left alone."""
    completed: list[Reach] = []
    monkeypatch.setattr(csi_network, "complete", lambda reach, host: completed.append(reach))
    host = LinuxHost(tmp_path / "notes", lambda: "", "a@", relay=lambda _: 0)
    notes = Notes(tmp_path / "notes")
    several = Reach("nvme", "h:1,i:1", nqn="nqn.ours", uuid=ID)
    for path, phase, role, reach in (
        ("/p", "mounted", "staged", several),
        ("/q", "mounting", "staged", several),
        ("/r", "mounted", "published", several),
        ("/s", "mounted", "staged", Reach("nvme", "h:1", nqn="nqn.ours", uuid=ID)),
    ):
        notes.keep(Note(ID, path, role, True, phase, transport="nvme", reach=reach))
    host._complete()
    assert completed == [several]
    host.close()


def test_a_kernel_that_is_no_host(
    sysfs: Sysfs, server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without the device to ask, or the transport, what is missing is said, and that it is to be loaded."""
    monkeypatch.setattr(csi_network, "FABRICS", str(tmp_path / "none"))
    with pytest.raises(RefusedError, match="no NVMe/TCP host") as caught:
        csi_network.connect(reach(server), HOST)
    assert "modprobe nvme-tcp" in caught.value.hint
    assert caught.value.status is Status.NOT_PERMITTED


@pytest.mark.parametrize(
    "root, device",
    [("/nvme0n1", True), ("/nvme12n3//deleted", True), ("/nvme0", False), ("/loop0", False), ("/", False)],
)
def test_device_nodes_in_mountinfo(root: str, device: bool) -> None:
    """A bind mount of a device's node is known by its root, also when the device has gone."""
    assert csi_network.is_device(root) is device


def test_mounts_of_a_volume_over_nfs() -> None:
    """A mount is a volume's by the name of its export, wherever the server is by now."""

    def there(kind: str, source: str) -> Mount:
        return Mount("/", "/p", frozenset(), kind, source, "0:1")

    assert csi_network.is_nfs_of(there("nfs4", f"[2001:db8::1]:/{ID}"), ID)
    assert not csi_network.is_nfs_of(there("nfs4", "host:/other"), ID)
    assert not csi_network.is_nfs_of(there("nfs4", f"host:/x/{ID}"), ID)
    assert not csi_network.is_nfs_of(there("ext4", f"host:/{ID}"), ID)
    assert csi_network.nfs_source(Reach("nfs", "[2001:db8::1]:2049", share="/x")) == "[2001:db8::1]:/x"


# --- notes -----------------------------------------------------------------------------------------


def test_notes_come_back(tmp_path: Path) -> None:
    """A note with all there is to say is read as it was written; one from before there were transports, too."""
    notes = Notes(tmp_path)
    reach = Reach("nfs", "h:1", share=f"/{ID}")
    note = Note(
        ID, "/p", "staged", False, "mounted", True, ("ro",), 5, 6, "", "", "nfs", ("hard",), reach, "/s", 7
    )
    notes.keep(note)
    assert notes.find("/p") == note
    old = Note(ID, "/q", "staged", True, "mounted", loop="/dev/loop0")
    notes.keep(old)
    (file,) = [each for each in tmp_path.glob("*.json") if "/q" in each.read_text()]
    words = file.read_text().split(', "backing"')[0] + "}"
    file.write_text(words)
    assert notes.find("/q") == old
    assert old.way == "loop"


def test_what_the_machine_has_forgotten_is_forgotten(tmp_path: Path, sysfs: Sysfs) -> None:
    """After a restart of the machine nothing is mounted or connected, and no note says that it was."""
    home = tmp_path / "notes"
    host = LinuxHost(home, lambda: "", "a@", relay=lambda _: 0)
    notes = Notes(home)
    for path, block, reach in (
        ("/p", False, Reach("nfs", "h:1", share=f"/{ID}")),
        ("/q", True, Reach("nvme", "h:1", nqn="nqn.ours", uuid=ID)),
    ):
        notes.keep(Note(ID, path, "staged", block, "mounted", transport=reach.transport, reach=reach))
    assert host._repair() == 0
    assert notes.all() == []
    host.close()


def test_a_call_that_is_held_up_holds_up_no_other(
    tmp_path: Path, sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the kernel does not come back from one call for a path, the next one is told to come again."""
    monkeypatch.setattr(csi_host, "TURN_SECONDS", 0.01)
    host = LinuxHost(tmp_path / "notes", lambda: "", "a@", relay=lambda _: 0)
    with host._alone("/p"), pytest.raises(ConflictError) as caught:
        host._unstage(ID, "/p")
    assert caught.value.status is Status.STALE
    host._unstage(ID, "/p")
    host.close()


def test_a_silent_server_is_asked_once(tmp_path: Path, sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often statistics are wanted, one thread waits for the server of a volume; then it is asked again."""
    monkeypatch.setattr(csi_host, "STATS_SECONDS", 0.01)
    host = LinuxHost(tmp_path / "notes", lambda: "", "a@", relay=lambda _: 0)
    speech = threading.Event()
    before = threading.active_count()
    for _ in range(3):
        with pytest.raises(UnavailableError, match="does not answer"):
            host._asked(ID, speech.wait)
    assert threading.active_count() == before + 1
    speech.set()
    host._asking[ID].join()
    monkeypatch.setattr(csi_host, "STATS_SECONDS", 60)
    assert host._asked(ID, lambda: 5) == 5
    host.close()


def test_a_tree_of_several_servers_is_mounted_through_a_relay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mount goes to the port of this machine that leads to all servers, which is noted; that of one goes to it."""
    mounted: list[tuple[tuple[str, ...], int]] = []

    def mount(reach: Reach, point: str, *, relay: int, **_: object) -> None:
        mounted.append((reach.servers, relay))

    monkeypatch.setattr(csi_network, "mount_nfs", mount)
    ports: dict[tuple[str, ...], int] = {("h:1", "i:1"): 4711}
    host = LinuxHost(tmp_path / "notes", lambda: "", "a@", relay=lambda servers: ports[tuple(servers)])
    for name, servers in (("several", "h:1,i:1"), ("one", "h:1")):
        volume = Volume(ID, "", 0, False, 0, parameters={"transport": "nfs"})
        host._stage(volume, str(tmp_path / name), Mounting(), Reach("nfs", servers, share=f"/{ID}"))
    assert mounted == [(("h:1", "i:1"), 4711), (("h:1",), 0)]
    assert host.relays() == ports
    host.close()


def test_servers_in_a_publish_context() -> None:
    """Each server of a list is an address; one that is none, or more than a cluster has, is refused."""
    volume = Volume(ID, "", 0, False, 0, parameters={"transport": "nfs"})

    def servers(text: str) -> tuple[str, ...]:
        found = check.reach({"transport": "nfs", "server": text, "share": f"/{ID}"}, volume)
        assert found is not None
        return found.servers

    assert servers("h:1") == ("h:1",)
    assert servers("h:1,[::1]:2,i:3") == ("h:1", "[::1]:2", "i:3")
    for wrong in ("h:1,", ",h:1", "h:1,,i:1", "h:1, i:1", "h:1,i", ",".join(["h:1"] * 65)):
        with pytest.raises(UsageError):
            servers(wrong)

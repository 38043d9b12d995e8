"""Two zones with an NFS server each: clients of one are sent to the other, and read its replicas if they are not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import attrs
import pytest

import space
from space._node.federation_promote import promote
from space._node.federation_zones import Zones
from tests.federation_support import shared, two_zones
from tests.integration.test_nfs_kernel import run
from tests.nfs_client import BOTH, Client, NfsError, getattr_, getfh
from tests.nfs_support import View

pytestmark = pytest.mark.requires("py:aiohttp")

CONTENT: Final = b"of oslo " * 1000
PLACE: Final = "zones/oslo/dir/file"


@attrs.frozen
class Pair:
    """The directories of two zones; oslo has shipped a file to paris. ``started`` are the views."""

    oslo: Path
    paris: Path
    started: list[View] = attrs.field(factory=list)

    def serve(self, data: Path, *options: str) -> View:
        view = View(data, ["--path", "/", "--squash", "none", *options])
        self.started.append(view)
        view.start()
        return view


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    """Two zones, nobody serving yet."""
    with two_zones(tmp_path) as zones:
        zones.oslo.set_policy(zones.oslo.mkdir("/dir"), shared("paris"))
        zones.oslo.put(CONTENT, name="/dir/file")
        zones.serve()
        zones.in_step()
        made = Pair(zones.paths["oslo"], zones.paths["paris"])
    yield made
    for view in made.started:
        if view.process.poll() is None:
            view.stop()


def where(client: Client, path: str) -> tuple[str, int, str]:
    """Host, port and path that a client is told for a name that has moved."""
    with pytest.raises(NfsError) as raised:
        client.compound(*client.walk(path), getfh())
    assert raised.value.status == "MOVED"
    found = client.compound(*client.walk(path), getattr_("fs_locations", "fsid", "fs_locations_info"))[-1]
    root, locations = found["fs_locations"]
    assert found["fs_locations_info"] == (root, locations)
    assert b"/".join(root).decode() == path
    ((servers, there),) = locations
    (server,) = servers
    host, high, low = server.decode().rsplit(".", 2)
    return host, int(high) << 8 | int(low), b"/".join(there).decode()


def read(client: Client, path: str) -> bytes:
    """The content of a file."""
    file = client.open(path, share=1)
    content = file.read(0, 1 << 20)
    file.close()
    return content


def test_a_client_is_sent_to_the_zone_that_has_the_file(pair: Pair) -> None:
    """What it does there is done at home; the rest of the tree is served here."""
    home = pair.serve(pair.oslo)
    here = pair.serve(pair.paris, "--refer", f"oslo=127.0.0.1:{home.port}:/dir")
    with Client(here.address) as client:
        host, port, path = where(client, "zones/oslo")
        assert (host, port, path) == ("127.0.0.1", home.port, "dir")
        names = {each.name for each in client.listing("zones", "rdattr_error", "mounted_on_fileid")}
        assert b"oslo" in names
        client.create("mine").write(0, b"here")
    with Client((host, port)) as client:
        assert read(client, f"{path}/file") == CONTENT
        client.open(f"{path}/file", share=BOTH).write(0, b"written")
        assert read(client, f"{path}/file").startswith(b"written")


def test_replicas_are_read_here_unless_clients_are_sent_away(pair: Pair) -> None:
    """Without a referral they are what a view shows, and refuse to be changed."""
    here = pair.serve(pair.paris)
    with Client(here.address) as client:
        assert read(client, PLACE) == CONTENT
        with pytest.raises(NfsError, match="ROFS"):
            client.open(PLACE, share=BOTH).write(0, b"x")


def test_a_zone_that_took_over_sends_nobody_away(pair: Pair) -> None:
    """After a promotion the file is served, and written, here, with the same command line."""
    with space.open(pair.paris) as paris:
        promote(paris, Zones(paris), "oslo")
    here = pair.serve(pair.paris, "--refer", "oslo=192.0.2.7")
    with Client(here.address) as client:
        assert read(client, PLACE) == CONTENT
        client.open(PLACE, share=BOTH).write(0, b"written")
        assert read(client, PLACE).startswith(b"written")


@pytest.mark.skipif(
    os.environ.get("SPACE_GUEST") != "1", reason="boots a virtual machine: set SPACE_GUEST=1 (docs/nfs.md)"
)
@pytest.mark.parametrize("version", ["4.1", "4.2"])
def test_the_kernel_mounts_the_other_server(pair: Pair, tmp_path: Path, version: str) -> None:
    """Going to a referral mounts the zone's own server, and what is written there is in the zone's own store.

    The kernel goes to port 2049 whatever it is told, so the guest has a relay there.
    """
    home = pair.serve(pair.oslo)
    here = pair.serve(pair.paris, "--refer", "oslo=127.0.0.1:/dir")
    job = f"""
    ip link set lo up
    python3 - <<'EOF' &
import socket, threading
def pass_on(source, target):
    while data := source.recv(1 << 16): target.sendall(data)
    target.shutdown(socket.SHUT_WR)
server = socket.create_server(("127.0.0.1", 2049))
while True:
    client, _ = server.accept()
    there = socket.create_connection(("10.0.2.2", {home.port}))
    for ends in ((client, there), (there, client)): threading.Thread(target=pass_on, args=ends, daemon=True).start()
EOF
    relay=$!; until (exec 3<>/dev/tcp/127.0.0.1/2049) 2>/dev/null; do sleep 0.1; done
    mounted {version}; echo mine >/n/mine; ls -l /n/zones >/tmp/listed; has oslo /tmp/listed
    [ "$(head -c 8 /n/zones/oslo/file)" = "of oslo " ]; ls /n/zones/oslo | has -x file
    has "^127.0.0.1:/dir /n/zones/oslo nfs4 .*addr=127.0.0.1" /proc/mounts
    echo written >/n/zones/oslo/new; mv /n/zones/oslo/new /n/zones/oslo/newer
    [ "$(stat -c %d /n/zones/oslo/file)" != "$(stat -c %d /n/mine)" ]
    umount /n/zones/oslo; umount /n; kill $relay; echo done=yes
    """
    assert run(here, job, tmp_path)["done"] == "yes"
    home.stop()
    with space.open(pair.oslo) as oslo:
        assert oslo.get(oslo.resolve("/dir/newer")) == b"written\n"

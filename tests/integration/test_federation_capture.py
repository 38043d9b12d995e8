"""Sovereignty, proven on the wire: every packet that leaves a zone is kept, opened, and searched.

A zone ships to another one, serves NFS and NVMe/TCP views, and is written to in every way, all in a network namespace
with one way out (tests/capture_support.py).  What its policies keep at home must not be in any packet: neither content
nor ids nor names, neither in the clear nor enciphered nor compressed nor as stored.  What may leave has to be found
there by the same search, and with the filter of the sender broken the rest has to be found as well: who finds nothing
then does not see.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import attrs
import pytest

import space
from space._node.federation_zones import Zones
from space._node.store import Store
from space.content import codecs
from space.content.frames import unpack_frames
from space.events import commands as cmd
from space.events.ids import CapsuleId
from space.events.types import Kind
from space.federation.exchange import FRAME, PULSE, SHIP, SHIPMENT
from space.federation.shipment import decode_shipment
from space.policy.model import Policy, Sovereignty
from space.projections import content_map
from tests import capture_support as capture
from tests.capture_support import HOME_ADDRESS, OTHER_ADDRESS, Line
from tests.federation_support import PROGRAM, introduce, shared, until

ROOT: Final = Path(__file__).parents[2]
SPACE: Final = [sys.executable, "-c", PROGRAM]
HOME_PORT, OTHER_PORT, NFS_PORT, NVME_PORT = 7441, 7442, 2049, 4420
NODE: Final = f"""federation: {HOME_ADDRESS}:{HOME_PORT}
listen: 127.0.0.1:7400
views:
- view: nfs
  sources: [/]
  listen: 127.0.0.1:{NFS_PORT}
  squash: none
- view: nvme
  sources: [{{devices}}]
  listen: 127.0.0.1:{NVME_PORT}
"""
ALLOWED: Final = {f"IPv6 protocol 58 type {each}" for each in (133, 135, 143)}
"""What a kernel says of itself where there is IPv6: router and neighbour solicitations, multicast listener reports."""

ENCODINGS: Final = (
    "compression: none",
    "compression: lz4",
    "compression: zstd",
    "compression: brotli",
    "encryption: aes-256-gcm",
)
CONTENT_BYTES: Final = 1 << 15

pytestmark = [
    pytest.mark.requires("py:aiohttp", "py:space_raft_engine", "/dev/net/tun", "ip", "nsenter", "unshare"),
    pytest.mark.skipif(os.geteuid() != 0 and os.environ.get("CI") != "true", reason="needs root"),
]


@attrs.define
class Secret:
    """A capsule, and everything of it that could be recognised."""

    path: str
    content: bytes
    marks: list[bytes]
    name: bytes
    id: bytes = b""
    stored: list[bytes] = attrs.field(factory=list)
    removed: bool = False
    encrypted: bool = False

    @property
    def parts(self) -> set[str]:
        """What is to be seen of it where it is: of what is encrypted, what is stored."""
        content = "stored" if self.encrypted else "content"
        return {f"{self.path} {part}" for part in (content, "name", "id")}


class Plan:
    """What is written, and where."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self.secrets: dict[str, list[Secret]] = {"local": [], "zone": [], "global": []}
        self.directories = {kind: self.name() for kind in self.secrets}

    def name(self) -> str:
        """One that is nowhere by chance."""
        return f"name-{self._chance.randbytes(9).hex()}"

    def secret(self, kind: str, path: str = "") -> Secret:
        """Something to be written: marks that are nowhere by chance, in text that every codec makes smaller."""
        marks = [self._chance.randbytes(12).hex().encode() for _ in range(8)]
        piece = CONTENT_BYTES // len(marks)
        parts = [(mark + b" is written here, and here again: " * 200)[:piece].ljust(piece) for mark in marks]
        name = self.name()
        found = Secret(path or f"/{self.directories[kind]}/{name}", b"".join(parts), marks, name.encode())
        self.secrets[kind].append(found)
        return found

    def policy(self, kind: str, **keys: Any) -> Policy:
        """A policy of each kind."""
        if kind == "global":
            return shared("paris", **keys)
        return Policy(sovereignty=Sovereignty(kind), **keys)


class Home:
    """The captured zone and its target, as processes in their namespaces."""

    def __init__(self, path: Path, line: Line, stack: contextlib.ExitStack, *options: str) -> None:
        self.path, self._line, self._stack = path, line, stack
        self._command = [sys.executable, "-m", "tests.keylogging", str(path / "secrets"), *options]

    def _where(self, data: str) -> list[str]:
        return ["--data", str(self.path / data), "--json"]

    def start(self, data: str, *arguments: str) -> dict[str, Any]:
        """A process of one of the zones; what it says when it is ready."""
        inside, command = self._line.other, SPACE
        if data == "oslo":
            inside, command = self._line.home, self._command
        process = subprocess.Popen(
            [*inside, *command, *self._where(data), *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._stack.callback(_ended, process)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"{arguments} did not begin"
        found: dict[str, Any] = json.loads(line)
        return found

    def run(self, data: str, *arguments: str | Path, text: str = "") -> Any:
        """What a command prints, run where its zone is."""
        inside = self._line.home if data == "oslo" else self._line.other
        command = [
            sys.executable,
            "-c",
            "from space.cli import main; main()",
            "--data",
            str(self.path / data),
            "--json",
        ]
        return json.loads(self._run([*inside, *command, *map(str, arguments)], text))

    def command(self, *arguments: str) -> list[str]:
        """A command of the captured zone, for its clients."""
        return ["--data", str(self.path / "oslo"), *arguments]

    def put(self, secret: Secret, *options: str) -> list[str]:
        """The command that stores something."""
        source = self.path / f"source-{secret.name.decode()}"
        source.write_bytes(secret.content)
        return self.command("put", str(source), "--name", secret.path, *options)

    def served(self, *kinds: str) -> dict[str, Any]:
        """The views of the captured zone, by kind, when they are all there."""
        found = {each["view"]: each for each in self.run("oslo", "project", "ls")}
        return found if set(kinds) <= set(found) else {}

    def clients(self, plan: Mapping[str, Any]) -> None:
        """Has clients of the views do something, where they are."""
        command = [*self._line.home, sys.executable, "-m", "tests.capture_clients"]
        assert self._run(command, json.dumps(plan)).endswith("\ndone\n")

    def _run(self, command: list[str], text: str) -> str:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, check=False, cwd=ROOT, timeout=120
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout


def _ended(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    assert process.stdout is not None
    process.stdout.close()


def prepare(path: Path, plan: Plan) -> tuple[str, str]:
    """Two zones that know each other; directories of each kind, and a block device of two; the paths of those."""
    with space.open(path / "oslo") as oslo, space.open(path / "paris") as paris:
        for store, name, address, port in (
            (oslo, "oslo", HOME_ADDRESS, HOME_PORT),
            (paris, "paris", OTHER_ADDRESS, OTHER_PORT),
        ):
            Zones(store).init(name, "metro", f"https://{address}:{port}")
        introduce(oslo, paris, f"https://{OTHER_ADDRESS}:{OTHER_PORT}")
        introduce(paris, oslo, f"https://{HOME_ADDRESS}:{HOME_PORT}")
        devices = []
        for kind, name in plan.directories.items():
            made = oslo.mkdir(f"/{name}")
            oslo.set_policy(made, plan.policy(kind))
        for kind in ("zone", "global"):
            secret = plan.secret(kind)
            parent, last = oslo._parent_of(secret.path)
            oslo.create(
                Kind.FILE,
                parent=parent,
                name=last,
                size=CONTENT_BYTES,
                block_size=4096,
                policy=plan.policy(kind),
            )
            devices.append(secret.path)
        for kind in plan.directories:  # what was there before anything was shipped
            secret = plan.secret(kind)
            oslo.put(secret.content, name=secret.path)
    return devices[0], devices[1]


def written(home: Home, plan: Plan, devices: tuple[str, str], nvme: Mapping[str, Any]) -> None:
    """Writes in every way: commands with policies of their own, NFS and NVMe clients, renames, attributes, removals."""
    files: dict[str, str] = {}
    before: list[list[str]] = []
    after: list[list[str]] = []
    for kind in plan.directories:
        for number, encoding in enumerate(ENCODINGS):
            secret = plan.secret(kind)
            secret.encrypted = "encryption" in encoding
            policy = home.path / f"{kind}-{number}.yaml"
            policy.write_text(policy_text(kind, encoding))
            before.append(home.put(secret, "--policy-file", str(policy)))
        written_there = [plan.secret(kind), plan.secret(kind)]
        files |= {secret.path: secret.content.hex() for secret in written_there}
        moved, gone = written_there[-1], plan.secret(kind)
        was, moved.path = moved.path, f"/{plan.directories[kind]}/{plan.name()}"
        gone.removed = True
        after += [
            home.command("mv", was, moved.path),
            home.put(gone),
            home.command("rm", gone.path),
            home.command("resolve", moved.path),
        ]
    by_path = {secret.path: secret for some in plan.secrets.values() for secret in some}
    blocks = {
        str(each["nsid"]): by_path[path].content.hex()
        for path, each in zip(devices, nvme["namespaces"], strict=True)
    }
    home.clients(
        {
            "before": before,
            "nfs": {"port": NFS_PORT, "files": files},
            "nvme": {"port": NVME_PORT, "subsystem": nvme["nqn"], "namespaces": blocks},
            "after": after,
        }
    )


def policy_text(kind: str, encoding: str) -> str:
    """A policy file."""
    targets = "federation:\n  targets: [paris]\n" if kind == "global" else ""
    return f"sovereignty: {kind}\n{encoding}\n{targets}"


def in_step(home: Home) -> None:
    """Waits until the target has all it is to have, and has been told so by a pulse."""

    def shipped() -> bool:
        (zone,) = home.run("oslo", "federation", "status")["zones"]
        return bool(zone["connected"] and not zone["lag_events"])

    until(shipped, "all is shipped")
    last = home.run("oslo", "federation", "status")["position"]

    def heard() -> bool:
        (zone,) = home.run("paris", "federation", "status")["zones"]
        return bool((zone["received"]["heard_position"] or 0) >= last)

    until(heard, "a pulse")


def learn(store: Store, secret: Secret) -> None:
    """Id of a capsule, and slices of what is stored of it."""
    if secret.removed:
        (lost,) = [each for each in store.deleted() if each.name == secret.name]
        secret.id = bytes(lost.id)
    else:
        secret.id = bytes(store.resolve(secret.path))
    with store._read() as txn:
        for extent in content_map.extents(txn, secret.id, 0, content_map.OFFSET_MAX):
            for frame in unpack_frames(extent.frames):
                position = frame.source_position or extent.position
                if frame.stored_length >= 64 and frame.codec:  # what is stored plain has its marks
                    stored = bytes(
                        store.wal.read_payload(position, frame.payload_offset, frame.stored_length)
                    )
                    secret.stored.append(stored[16:48])


def places(line: Line, secrets: str) -> dict[str, bytes]:
    """All that went either way, opened as far as it can be opened; nothing of it is not understood.

    Raises:
        AssertionError: there is something else than shipping between the two zones.
    """
    sent, rest = capture.streams(line.sent)
    answered, _ = capture.streams(line.received)
    others = [each for each in rest if each.partition(" to ")[0] not in ALLOWED]
    assert not others, f"something else left: {others}"
    found = {"packets": b"\0\0\0\0".join([*line.sent, *line.received])}
    known = capture.secrets(secrets)
    for number, (flow, bytes_) in enumerate(sent.items()):
        source, port, target, there = flow
        assert (source, target) == (HOME_ADDRESS, OTHER_ADDRESS), f"it went to {target}"
        assert there == OTHER_PORT or port == HOME_PORT, f"it went from port {port} to port {there}"
        back = answered.get((target, there, source, port), b"")
        ours, theirs = (bytes_, back) if there == OTHER_PORT else (back, bytes_)
        found[f"stream {number}"] = bytes_ + bytes(4) + back
        for who, side in zip(("client", "server"), capture.opened(ours, theirs, known), strict=True):
            found[f"{who} {number}"] = side.data + bytes(4) + side.handshake
            for at, (head, body) in enumerate(capture.bodies(side.data)):
                found[f"{who} {number} body {at}"] = body
                if head.startswith(f"POST {SHIP} ".encode()):
                    found[f"{who} {number} content {at}"] = shipped_content(body)
    return found


def shipped_content(body: bytes) -> bytes:
    """Content of the frames that a stream of shipments brings, decompressed; whatever it is that it brings."""
    pieces, at = [], 0
    while at + FRAME.size <= len(body):
        kind, length = FRAME.unpack_from(body, at)
        at += FRAME.size
        assert kind in (SHIPMENT, PULSE)
        if at + length > len(body):
            break  # the end of the connection
        if kind == SHIPMENT:
            for entry in decode_shipment(body[at : at + length]).entries:
                pieces += [content for command in entry.commands for content in command_content(command)]
        at += length
    return bytes(4).join(pieces)


def command_content(command: Any) -> Iterator[bytes]:
    """Content of the frames in a command."""
    for inner in getattr(command, "commands", ()):
        yield from command_content(inner)
    for frame in command.frames if isinstance(command, cmd.WriteExtent) else ():
        (ref,) = unpack_frames(frame.record)
        if frame.stored is not None and not ref.encryption:
            yield bytes(codecs.decompress(ref.compression, frame.stored, ref.plain_length))


def recognised(plan: Plan, found: Mapping[str, bytes]) -> dict[str, set[tuple[str, str]]]:
    """For each kind, what is seen of its capsules (path and which part), and in how many places."""
    seen: dict[str, set[tuple[str, str]]] = {}
    for kind, secrets in plan.secrets.items():
        wanted = {}
        for secret in secrets:
            wanted[f"{secret.path} content"] = secret.marks
            wanted[f"{secret.path} stored"] = secret.stored
            wanted[f"{secret.path} name"] = [secret.name]
            wanted[f"{secret.path} id"] = [secret.id]
        wanted[f"/{plan.directories[kind]} name"] = [plan.directories[kind].encode()]
        seen[kind] = capture.seen(wanted, found)
    return seen


def captured(tmp_path: Path, *options: str) -> tuple[Plan, dict[str, bytes]]:
    """A zone at work, and everything that left it."""
    plan = Plan(seed=1)
    devices = prepare(tmp_path, plan)
    with Line(tmp_path) as line:
        with contextlib.ExitStack() as stack:
            home = Home(tmp_path, line, stack, *options)
            config = tmp_path / "oslo.yaml"
            config.write_text(NODE.format(devices=", ".join(devices)))
            home.start("oslo", "serve", "--insecure", "--config", str(config))
            home.start("paris", "federation", "serve", "--listen", f"{OTHER_ADDRESS}:{OTHER_PORT}")
            served = until(lambda: home.served("nvme", "nfs"), "views")
            written(home, plan, devices, served["nvme"])
            in_step(home)
        found_line = line
    with space.open(tmp_path / "oslo") as oslo:
        for some in plan.secrets.values():
            for secret in some:
                learn(oslo, secret)
    with space.open(tmp_path / "paris") as paris:
        for secret in plan.secrets["global"]:
            assert secret.removed or paris.get(CapsuleId(secret.id)) == secret.content
    return plan, places(found_line, (tmp_path / "secrets").read_text())


def test_nothing_that_is_to_stay_leaves(tmp_path: Path) -> None:
    """Of local and zone capsules nothing is in anything that leaves; of global ones everything is, enciphered."""
    plan, found = captured(tmp_path)
    seen = recognised(plan, found)
    assert seen["local"] == set()
    assert seen["zone"] == set()
    parts = {what for what, _ in seen["global"]}
    assert set().union(*(secret.parts for secret in plan.secrets["global"])) <= parts
    assert not {place for _, place in seen["global"] if place == "packets" or place.startswith("stream")}


def test_who_ships_everything_is_caught(tmp_path: Path) -> None:
    """With a sender that takes everything to be allowed, all of what has to stay is found outside, by the same look."""
    plan, found = captured(tmp_path, "--unfiltered")
    seen = recognised(plan, found)
    for kind in ("local", "zone"):
        parts = {what for what, _ in seen[kind]}
        assert set().union(*(secret.parts for secret in plan.secrets[kind])) <= parts


def test_another_way_out_is_caught(tmp_path: Path) -> None:
    """What goes to anybody but the other zone, by whatever protocol and to whatever port, is seen and refused."""
    programs = {
        "udp": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('8.8.8.8', 53))",
        "tcp": f"socket.socket().connect_ex(('{OTHER_ADDRESS}', 9))",
        "far": "s = socket.socket(); s.settimeout(0.2); s.connect_ex(('192.0.2.1', 443))",
    }
    for what, program in programs.items():
        with Line(tmp_path / what) as line:
            subprocess.run(
                [*line.home, sys.executable, "-c", f"import socket; {program}"], check=True, timeout=60
            )
            until(lambda: any(packet[0] >> 4 == 4 for packet in line.sent), what)
        with pytest.raises(AssertionError, match=r"something else left|it went"):
            places(line, "")

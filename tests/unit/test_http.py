"""HTTP: the same answers as in the process, and nothing for requests that are not meant for it."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

import space
from space._errors import ErrorKind, NotFoundError, UnavailableError, UsageError
from space._node import pages
from space._node.calls import StoreTarget
from space._node.messages import REQUEST_BYTES_MAX, pack
from space._node.store import Store
from space.remote import HttpEndpoint, Nodes

pytestmark = pytest.mark.requires("py:aiohttp")

JSON: Final = "application/json"
CONTENT: Final = bytes(range(256)) * 5000


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store with a file and a directory."""
    with space.open(tmp_path_factory.mktemp("http") / "data") as opened:
        opened.put(CONTENT, name="/a/content")
        yield opened


@pytest.fixture(scope="module")
def url(store: Store) -> Iterator[str]:
    """Where it answers over HTTP."""
    from space._node.http import HttpServer

    server = HttpServer(StoreTarget(store), "127.0.0.1:0", node=None)
    yield server.url
    server.retire(0)
    server.close()


@pytest.fixture
def nodes(url: str) -> Any:
    """Its operations, as the command line asks for them."""
    return Nodes([HttpEndpoint(url, None)])


def port_of(url: str) -> int:
    """The port in a URL."""
    return int(url.rpartition(":")[2])


def ask(
    url: str,
    path: str,
    body: bytes | None = None,
    kind: str | None = JSON,
    host: str | None = None,
) -> tuple[int, str, bytes]:
    """One request: its status, the type of the answer, and the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port_of(url), timeout=60)
    headers = {} if kind is None else {"Content-Type": kind}
    if host is not None:
        headers["Host"] = host
    try:
        connection.request("GET" if body is None else "POST", path, body=body, headers=headers)
        response = connection.getresponse()
        return response.status, response.headers.get_content_type(), response.read()
    finally:
        connection.close()


def raw(url: str, data: bytes) -> bytes:
    """What comes back for bytes that are sent as they are, until the other side hangs up."""
    with socket.create_connection(("127.0.0.1", port_of(url)), timeout=60) as stream:
        stream.sendall(data)
        stream.shutdown(socket.SHUT_WR)
        said = b""
        try:
            while piece := stream.recv(65536):
                said += piece
        except ConnectionResetError:
            pass
        return said


def eventually(question: Callable[[], bool]) -> None:
    """Returns when something is so."""
    while not question():
        time.sleep(0.005)


# --- calls -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, arguments",
    [
        ("ls", {"path": "/", "recursive": True}),
        ("stat", {"capsule": "/a/content"}),
        ("snapshots", {}),
        ("digest", {}),
        ("log", {"start": "1", "stop": "3"}),
        ("owner", {}),
    ],
)
def test_answers_are_the_same(store: Store, nodes: Any, method: str, arguments: dict[str, Any]) -> None:
    """A call over HTTP answers what the same call in the process does."""
    from space._node.caller import Caller
    from space._node.service import Service

    here, there = (getattr(each, method)(**arguments) for each in (Service(store, Caller()), nodes))
    if isinstance(here, Iterator):
        here, there = list(here), list(there)
    assert here == there


def test_bytes_come_and_go(store: Store, nodes: Any, tmp_path: Path) -> None:
    """A file that is put over HTTP is got back over HTTP, whole and in part."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(CONTENT * 3)
    with source.open("rb") as file:
        done = nodes.put(descriptor=file.fileno(), name="/put")
    assert done["size"] == len(CONTENT) * 3
    with target.open("wb") as file:
        nodes.get(capsule="/put", descriptor=file.fileno())
    assert target.read_bytes() == CONTENT * 3
    with target.open("wb") as file:
        nodes.get(capsule=done["id"], descriptor=file.fileno(), offset=100, length=1000)
    assert target.read_bytes()[:1000] == (CONTENT * 3)[100:1100]


def test_errors_keep_their_kind(nodes: Any, tmp_path: Path) -> None:
    """What a call fails with in the process it fails with over HTTP."""
    with pytest.raises(NotFoundError, match="/nothing"):
        nodes.stat(capsule="/nothing")
    with pytest.raises(UsageError, match="no such operation"):
        nodes.nothing()
    with pytest.raises(UsageError, match="control socket"):
        nodes.mount(source="/", target="/tmp")
    with pytest.raises(UsageError, match="not carried over HTTP"):
        nodes.import_tree(source=str(tmp_path))


def test_json_for_everybody(url: str) -> None:
    """With JSON a result is a document, a stream is a line each, and bytes are bytes."""
    status, kind, body = ask(url, "/v1/call/stat", b'{"arguments": {"capsule": "/a/content"}}')
    assert (status, kind, json.loads(body)["size"]) == (200, JSON, len(CONTENT))
    status, kind, body = ask(url, "/v1/call/ls", b"{}")
    assert (status, kind) == (200, "application/x-ndjson")
    assert "a" in [json.loads(line)["name"] for line in body.splitlines()]
    status, kind, body = ask(url, "/v1/call/snapshots", b"")
    assert (status, kind, body) == (200, "application/x-ndjson", b"")
    status, kind, body = ask(url, "/v1/call/get", b'{"arguments": {"capsule": "/a/content"}}')
    assert (status, kind, body) == (200, "application/octet-stream", CONTENT)


def test_put_takes_a_plain_body(store: Store, url: str) -> None:
    """A put whose body is the file and whose arguments are in the query needs no protocol of ours."""
    path = "/v1/call/put?name=/plain&policy=%7B%22compression%22%3A%22none%22%7D"
    status, _, body = ask(url, path, b"plain bytes", "application/octet-stream")
    assert status == 200, body
    assert store.get("/plain") == b"plain bytes"
    status, _, body = ask(url, path, b"others", "application/octet-stream")
    assert (status, json.loads(body)["kind"]) == (409, "ConflictError")


# --- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, body, kind, status",
    [
        ("/v1/call/stat", b"{", JSON, 400),
        ("/v1/call/stat", b"[]", JSON, 400),
        ("/v1/call/stat", b"[" * 100_000, JSON, 400),
        ("/v1/call/stat", b'{"arguments": {}}', JSON, 400),
        ("/v1/call/stat", b'{"arguments": {"capsule": 7}}', JSON, 400),
        ("/v1/call/stat", b'{"arguments": {"capsule": "/nothing"}}', JSON, 404),
        ("/v1/call/stat", b'{"arguments": {"capsule": "/a"}, "stale": 1}', JSON, 400),
        ("/v1/call/rm", b'{"arguments": {"capsule": "/a"}, "client": "xyz"}', JSON, 400),
        ("/v1/call/put", b'{"arguments": {"descriptor": 3}}', JSON, 400),
        ("/v1/call/_put", b"{}", JSON, 400),
        ("/v1/call/ls", b" " * (REQUEST_BYTES_MAX + 1), JSON, 400),
        ("/v1/call/ls", b"{}", "text/plain", 400),
        ("/v1/call/ls", b"{}", "application/x-www-form-urlencoded", 400),
        ("/v1/call/ls", b"", "application/octet-stream", 400),
        ("/v1/call/ls", b"\xff\xff\xff\xff", "application/x-space-messages", 400),
        ("/v1/call/ls", b"\0\0\0\4nope", "application/x-space-messages", 400),
        ("/v1/call/ls", b"\0\0", "application/x-space-messages", 400),
    ],
)
def test_malformed_requests(url: str, path: str, body: bytes, kind: str, status: int) -> None:
    """A request that is malformed, too long, or not for this server is refused with a document that says why."""
    found, answered, said = ask(url, path, body, kind)
    assert (found, answered) == (status, JSON), said
    assert json.loads(said)["message"]


def test_other_hosts_are_refused(url: str) -> None:
    """A name that somebody's DNS points at this machine does not open it to web pages."""
    assert ask(url, "/v1/status", host="evil.example:80")[0] == 400
    assert ask(url, "/v1/status", host="localhost:80")[0] == 200
    assert ask(url, "/v1/status", host="[::1]:80")[0] == 200


@pytest.mark.parametrize(
    "data", [b"", b"nonsense\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", bytes(100_000), b"GET /" + b"x" * 100_000]
)
def test_garbage_is_survived(url: str, data: bytes) -> None:
    """Bytes that are no request end their connection and nothing else."""
    raw(url, data)
    assert ask(url, "/v1/status")[0] == 200


@pytest.mark.parametrize("chunk", [b"", b"400\r\nhalf of what was announced"])
def test_half_a_put_leaves_nothing(store: Store, url: str, chunk: bytes) -> None:
    """A client that goes away in the middle of a put leaves neither a name nor a capsule."""
    before = {stat.id for stat in store.unnamed()}
    request = pack({"method": "put", "arguments": {"name": "/half"}}, 1 << 16)
    head = (
        b"POST /v1/call/put HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n"
        b"Content-Type: application/x-space-messages\r\n\r\n"
    )
    raw(url, head + f"{len(request):x}\r\n".encode() + request + b"\r\n" + chunk)
    eventually(lambda: {stat.id for stat in store.unnamed()} == before)
    with pytest.raises(NotFoundError):
        store.stat(store.resolve("/half"))


def test_a_follower_that_goes_ends_its_call(store: Store, url: str) -> None:
    """Nothing goes on following the log for a client that has gone."""
    import threading

    events = Nodes([HttpEndpoint(url, None)]).log(follow=True)
    assert next(events)["position"] == 1
    events.close()
    eventually(lambda: not any(each.name == "space-http-call" for each in threading.enumerate()))


def test_only_this_machine_without_certificates(store: Store) -> None:
    """Without certificates an address that others can reach is refused, by the server and by the client."""
    from space._node.http import HttpServer

    for address in ("0.0.0.0:0", "example.net:80", "[::]:0"):
        with pytest.raises(UsageError, match="reachable from other machines"):
            HttpServer(StoreTarget(store), address, node=None)
    for address in ("", "localhost", "localhost:x", "localhost:99999"):
        with pytest.raises(UsageError, match="not an address"):
            HttpServer(StoreTarget(store), address, node=None)
    with pytest.raises(UsageError, match="use https"):
        HttpEndpoint("http://192.0.2.1:80", None)


def test_a_taken_port_is_an_error(store: Store, url: str) -> None:
    """Where somebody else listens, the server says so."""
    from space._node.http import HttpServer

    with pytest.raises(UnavailableError, match="cannot listen"):
        HttpServer(StoreTarget(store), url.removeprefix("http://"), node=None)


def test_every_kind_of_error_has_a_status() -> None:
    """The table of HTTP statuses is total."""
    from space._node.http import STATUSES

    assert set(STATUSES) == set(ErrorKind)


# --- pages -----------------------------------------------------------------------------------------


def test_metrics_and_pages(url: str) -> None:
    """Metrics are in Prometheus' format, the page loads nothing, and the status is JSON."""
    status, kind, body = ask(url, "/metrics")
    assert (status, kind) == (200, "text/plain")
    lines = body.decode().splitlines()
    assert any(line.startswith("process_resident_memory_bytes ") for line in lines)
    assert all(line.startswith("#") or len(line.split(" ")) == 2 for line in lines)
    status, kind, body = ask(url, "/")
    assert (status, kind) == (200, "text/html")
    assert b"src=" not in body
    assert b"href=" not in body
    assert json.loads(ask(url, "/v1/status")[2])["shards"][0]["nodes"][0]["role"] == "alone"


def test_what_is_shown_is_escaped() -> None:
    """Text of a peer neither becomes markup of the page nor breaks a line of the metrics."""
    node = {
        "id": 1,
        "role": "<b>",
        "position": 1,
        "lag": 0,
        "digest": "x",
        "address": "<script>",
        "failure": "&",
    }
    shown = pages.page(
        "t", {"cluster": "c", "shards": [{"shard": 0, "leader": 1, "term": 1, "nodes": [node]}]}
    )
    assert "<script>" not in shown
    assert "<b>" not in shown
    assert (
        pages.metrics([("space_up", {"shard": 'a"\n\\'}, 1.0)]).splitlines()[-1]
        == 'space_up{shard="a\\"\\n\\\\"} 1.0'
    )


def test_samples_of_a_node() -> None:
    """A node's status and what it knows of its peers become samples by shard, peer and lane."""
    shard = {"shard": 2, "position": 7, "commit": 8, "term": 3, "role": "leader", "failure": ""}
    peer = {"connected": True, "rtt_seconds": 0.5, "queued_bytes": {"log": 9}, "certificate_days": 40}
    silent: dict[str, Any] = {
        "connected": False,
        "rtt_seconds": None,
        "queued_bytes": {},
        "certificate_days": None,
    }
    found = [
        *pages.shard_samples({"shards": [shard]}),
        *pages.peer_samples({"2": peer, "3": silent}),
    ]
    assert ("space_position", {"shard": 2}, 7) in found
    assert ("space_leader", {"shard": 2, "role": "leader"}, 1.0) in found
    assert ("space_peer_queued_bytes", {"peer": "2", "lane": "log"}, 9) in found
    assert ("space_peer_connected", {"peer": "3"}, 0.0) in found
    assert not any(name == "space_peer_rtt_seconds" and labels == {"peer": "3"} for name, labels, _ in found)
    assert pages.metrics(found).count("# TYPE space_peer_connected gauge") == 1

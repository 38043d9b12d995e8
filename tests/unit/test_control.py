"""The control socket: the same answers as in the process, and nothing else from anybody else."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import socket
import stat
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import space
from space import _errors, control
from space._errors import CorruptionError, Status, UnavailableError, UsageError
from space._node import messages
from space._node.caller import Caller
from space._node.calls import check_arguments, hints_of
from space._node.service import Service, methods
from space._node.store import Store
from space.control import ControlServer, RemoteService

ERRORS: Final = [
    each for each in vars(_errors).values() if isinstance(each, type) and issubclass(each, space.SpaceError)
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store with a file and a directory, answering on its socket."""
    with space.open(tmp_path_factory.mktemp("store") / "data") as opened:
        opened.put(b"hello", name="/a/hello.txt")
        with ControlServer(opened):
            yield opened


@pytest.fixture
def remote(store: Store) -> Service:
    """The store's operations through the socket."""
    return control.connect(store.path / control.SOCKET)


def connection(store: Store) -> socket.socket:
    """A raw connection to the socket."""
    stream = socket.socket(socket.AF_UNIX)
    stream.settimeout(30)
    with control._address(store.path / control.SOCKET) as address:
        stream.connect(address)
    return stream


def everything_sent(stream: socket.socket) -> bytes:
    """What the other side says until it hangs up, cleanly or not."""
    said = b""
    try:
        while piece := stream.recv(65536):
            said += piece
    except ConnectionResetError:
        pass
    return said


def calls_end() -> None:
    """Returns when no call is being answered any more."""
    while any(each.name == "space-call" for each in threading.enumerate()):
        time.sleep(0.001)


# --- the same operations ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, arguments",
    [
        ("ls", {"path": "/", "recursive": True}),
        ("ls", {"path": "/a"}),
        ("stat", {"capsule": "/a/hello.txt"}),
        ("unnamed", {}),
        ("snapshots", {}),
        ("deleted", {}),
        ("digest", {}),
        ("digest", {"at": "@2"}),
        ("log", {}),
        ("log", {"start": "2", "stop": "3"}),
        ("policy", {"capsule": "/a"}),
        ("owner", {}),
        ("verify", {}),
        ("gc", {"dry_run": True}),
    ],
)
def test_answers_are_the_same(store: Store, remote: Service, method: str, arguments: dict[str, Any]) -> None:
    """A call through the socket answers what the same call in the process does."""
    here = getattr(Service(store, Caller()), method)(**arguments)
    there = getattr(remote, method)(**arguments)
    if isinstance(here, Iterator):
        here, there = list(here), list(there)
    assert here == there


def test_every_operation_can_be_checked() -> None:
    """All public methods of the service take keywords only, of types the socket can check, and say what comes."""
    assert len(methods()) > 20
    for name, method in methods().items():
        parameters = list(inspect.signature(method).parameters.values())[1:]
        assert all(each.kind is each.KEYWORD_ONLY for each in parameters), name
        hints = hints_of(method)
        assert set(hints) == {each.name for each in parameters}
        assert {kind for kinds in hints.values() for kind in kinds} <= {
            str,
            int,
            bool,
            list,
            dict,
            type(None),
        }
        returned = inspect.signature(method).return_annotation
        assert returned in {"Document", "list[Document]", "Iterator[Document]"}, name


def test_bytes_travel_by_descriptor(store: Store, remote: Service, tmp_path: Path) -> None:
    """Put reads and get writes the caller's own open files, from where they stand."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"skipped" + os.urandom(3 << 20))
    with source.open("rb") as file:
        os.lseek(file.fileno(), 7, os.SEEK_SET)
        made = remote.put(descriptor=file.fileno(), name="/by/descriptor")
    assert made["size"] == 3 << 20
    with target.open("wb") as file:
        remote.get(capsule=made["id"], descriptor=file.fileno())
    assert target.read_bytes() == source.read_bytes()[7:]
    store.rm("/by/descriptor")


def test_bytes_travel_through_pipes(remote: Service) -> None:
    """Put reads a pipe to its end; get fills a pipe somebody reads slowly."""
    content = os.urandom(300_000)
    reader, writer = os.pipe()

    def write() -> None:
        with os.fdopen(writer, "wb") as file:
            file.write(content)

    writing = threading.Thread(target=write)
    writing.start()
    made = remote.put(descriptor=reader)
    writing.join()
    os.close(reader)
    reader, writer = os.pipe()
    got: list[bytes] = []

    def read() -> None:
        with os.fdopen(reader, "rb") as file:
            got.append(file.read())

    reading = threading.Thread(target=read)
    reading.start()
    remote.get(capsule=made["id"], descriptor=writer)
    os.close(writer)
    reading.join()
    assert got == [content]


def test_a_closed_pipe_is_the_readers_business(remote: Service) -> None:
    """When nobody reads the output any more, the caller learns exactly that."""
    reader, writer = os.pipe()
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        remote.get(capsule="/a/hello.txt", descriptor=writer)
    os.close(writer)


def test_progress_comes_through(remote: Service, store: Store, tmp_path: Path) -> None:
    """A long operation tells its caller how far it is."""
    seen: list[dict[str, Any]] = []

    class Watching(Caller):
        def progress(self, done: dict[str, Any]) -> None:
            seen.append(done)

    source = tmp_path / "source"
    source.write_bytes(bytes(3 << 20))
    with source.open("rb") as file:
        control.connect(store.path / control.SOCKET, caller=Watching()).put(descriptor=file.fileno())
    assert seen
    assert seen[0]["bytes"] > 0


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_keep_their_kind(kind: type[space.SpaceError]) -> None:
    """Class, message, hint and status of every error survive the way through the socket."""
    sent = kind("what failed", hint="what to do")
    if isinstance(sent, CorruptionError):
        sent.segment, sent.offset, sent.position = "segment", 7, 8
    else:
        sent.status = Status.STALE
    message = msgpack.unpackb(msgpack.packb(_errors.error_document(sent)))
    got = _errors.error_of(message)
    assert (type(got), str(got), got.hint) == (kind, str(sent), sent.hint)
    assert got.status is sent.status
    if isinstance(got, CorruptionError):
        assert (got.segment, got.offset, got.position) == ("segment", 7, 8)


@pytest.mark.parametrize("kind", ["NoSuchError", "Final", "ErrorKind", 5, None])
def test_unknown_errors_are_errors_still(kind: object) -> None:
    """An error of a class this program lacks, or that is none, arrives as a SpaceError."""
    got = _errors.error_of({"kind": kind, "message": "what failed", "status": "NO_SUCH"})
    assert (type(got), str(got)) == (space.SpaceError, "what failed")


def test_an_error_of_a_stream_ends_it(remote: Service) -> None:
    """Errors reach the caller of a streaming call as well."""
    with pytest.raises(space.NotFoundError):
        list(remote.ls(path="/nothing"))


# --- nothing else ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", ["_reading", "__init__", "__class__", "store", "no_such", "", "put.__globals__", "close"]
)
def test_only_public_operations_are_called(store: Store, method: str) -> None:
    """Anything but a public method of the service is refused."""
    with connection(store) as stream:
        stream.sendall(messages.pack({"method": method, "arguments": {}}, 1000))
        answer = everything_sent(stream)
    assert msgpack.unpackb(answer[4:])["error"]["kind"] == "UsageError"


@pytest.mark.parametrize(
    "method, arguments",
    [
        ("ls", {"path": 5}),
        ("ls", {"path": None}),
        ("ls", {"recursive": 1}),
        ("ls", {"depth": 1}),
        ("ls", {"self": "x"}),
        ("stat", {}),
        ("get", {"capsule": "/a", "descriptor": "1"}),
        ("get", {"capsule": "/a", "descriptor": 1, "offset": True}),
        ("get", {"capsule": "/a", "descriptor": 1, "offset": "0"}),
        ("set_policy", {"capsule": "/a", "policy": []}),
    ],
)
def test_arguments_have_their_types(method: str, arguments: dict[str, Any]) -> None:
    """A missing, unknown or mistyped argument is refused before the operation sees it."""
    with pytest.raises(UsageError):
        check_arguments(methods()[method], arguments)


def test_a_number_is_not_a_descriptor(store: Store) -> None:
    """A descriptor is passed by the kernel; a number in the arguments cannot name one of the owner's."""
    with connection(store) as stream:
        request = {"method": "get", "arguments": {"capsule": "/a/hello.txt", "descriptor": 1}}
        stream.sendall(messages.pack(request, 1000))
        answer = everything_sent(stream)
    assert msgpack.unpackb(answer[4:])["error"]["kind"] == "UsageError"


@pytest.mark.parametrize("uid, heard", [(0, True), (os.geteuid(), True), (54321, False)])
def test_only_the_same_user_and_root_are_heard(uid: int, heard: bool) -> None:
    """The kernel's word about the other end decides."""

    class Stream:
        def getsockopt(self, level: int, option: int, size: int) -> bytes:
            assert (level, option) == (socket.SOL_SOCKET, socket.SO_PEERCRED)
            return struct.pack("3i", 1, uid, 1)

    stream: Any = Stream()
    assert control._peer_is_ours(stream) is heard


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\0",
        b"\0\0\0",
        b"\0\0\0\0",
        b"\xff\xff\xff\xff",
        struct.pack(">I", messages.REQUEST_BYTES_MAX + 1),
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0\0\0\1\xc1",
        b"\0\0\0\1\x05",
        b"\0\0\0\5\xdd\xff\xff\xff\xff",
        b"\0\0\0\2\x80",
        messages.pack({}, 10),
        messages.pack({"method": "ls"}, 100),
        messages.pack({"method": ["ls"], "arguments": {}}, 100),
        messages.pack({"method": "ls", "arguments": {1: 2}}, 100),
    ],
)
def test_garbage_is_hung_up_on(store: Store, remote: Service, garbage: bytes) -> None:
    """Nonsense gets at most an error, its connection is closed, and the next caller is served."""
    with connection(store) as stream:
        stream.sendall(garbage)
        stream.shutdown(socket.SHUT_WR)
        said = everything_sent(stream)
    assert not said or "error" in msgpack.unpackb(said[4:])
    assert remote.owner()["pid"] == os.getpid()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    garbage=st.binary(max_size=200)
    | st.builds(lambda body: struct.pack(">I", len(body)) + body, st.binary(max_size=200))
    | st.builds(
        lambda method, arguments: messages.pack({"method": method, "arguments": arguments}, 1 << 20),
        st.sampled_from(sorted(set(methods()) - {"replay", "verify", "gc", "log", "import_tree", "export_tree"})),
        st.dictionaries(
            st.sampled_from(["path", "capsule", "name", "at", "offset", "size", "policy", "to", "id", "x"]),
            st.none() | st.booleans() | st.integers(-(1 << 63), 1 << 63) | st.text(max_size=20)
            | st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2),
            max_size=4,
        ),
    )
)  # fmt: skip
def test_no_bytes_end_the_server(store: Store, garbage: bytes) -> None:
    """Whatever is sent, the connection ends, no defect is reported, and the server answers the next call."""
    with connection(store) as stream:
        stream.sendall(garbage)
        stream.shutdown(socket.SHUT_WR)
        said = everything_sent(stream)
    while said:
        (length,) = struct.unpack(">I", said[:4])
        message = msgpack.unpackb(said[4 : 4 + length])
        assert message.get("error", {}).get("kind") != "SpaceError", message
        said = said[4 + length :]
    assert RemoteService(store.path / control.SOCKET).owner()["pid"] == os.getpid()


# --- coming and going ------------------------------------------------------------------------------


def test_a_caller_that_goes_leaves_no_name(store: Store) -> None:
    """A put whose caller is gone, with its source still open or ended without a word, names nothing."""
    for close_source_first in (False, True):
        reader, writer = os.pipe()
        stream = connection(store)
        request = messages.pack({"method": "put", "arguments": {"name": "/half"}}, 1000)
        socket.send_fds(stream, [request], [reader])
        os.close(reader)
        os.write(writer, b"half of it")
        if close_source_first:
            os.close(writer)
            assert msgpack.unpackb(stream.recv(1000)[4:]) in ({"ended": True}, {"progress": {"bytes": 10}})
            stream.close()
        else:
            stream.close()
        calls_end()
        if not close_source_first:
            os.close(writer)
        with pytest.raises(space.NotFoundError):
            store.resolve("/half")


@pytest.mark.parametrize("size", [0, 10, 100_000])
def test_a_caller_that_goes_has_its_file_left_alone(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """A get that is answered only when its caller has gone, to ask elsewhere perhaps, does not touch the file."""
    store.put(io.BytesIO(bytes(range(1, 11)) * (size // 10)), name=f"/wanted{size}")
    asked, gone = threading.Event(), threading.Event()
    resolve = Store.resolve

    def late(*arguments: Any, **options: Any) -> Any:
        asked.set()
        gone.wait()
        return resolve(*arguments, **options)

    monkeypatch.setattr(Store, "resolve", late)
    with (tmp_path / "file").open("w+b") as file:
        file.write(b"of somebody else")
        file.flush()
        stream = connection(store)
        arguments = {"capsule": f"/wanted{size}", "replace": True}
        socket.send_fds(
            stream, [messages.pack({"method": "get", "arguments": arguments}, 1000)], [file.fileno()]
        )
        asked.wait()
        stream.close()
        gone.set()
        calls_end()
        file.seek(0)
        assert file.read() == b"of somebody else"


def test_a_follower_ends_with_its_server(tmp_path: Path) -> None:
    """When the owner of the store closes, whoever follows its log is told so."""
    with space.open(tmp_path / "data") as store:
        server = ControlServer(store)
        events = control.connect(store.path / control.SOCKET).log(follow=True)
        assert next(events)["kind"] == "StoreInitialised"
        server.close()
        with pytest.raises(UnavailableError):
            list(events)


def test_a_server_at_work_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that has nothing to say for longer than a client listens goes on: its server says that it is at work."""
    monkeypatch.setattr(control, "ALIVE_SECONDS", 0.05)
    monkeypatch.setattr(control, "SILENCE_SECONDS", 1.0)
    with space.open(tmp_path / "data") as store, ControlServer(store):
        events = control.connect(store.path / control.SOCKET).log(follow=True)
        assert next(events)["kind"] == "StoreInitialised"
        threading.Timer(2.0, lambda: store.mkdir("/late")).start()
        assert next(events)["kind"] == "CapsuleCreated"


def test_a_server_that_says_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that takes a call and is stopped then is an error, and not an endless wait."""
    monkeypatch.setattr(control, "SILENCE_SECONDS", 0.2)
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(control.BrokenError, match="said nothing"):
            RemoteService(path).owner()


def test_the_socket_is_private_and_goes(tmp_path: Path) -> None:
    """The socket can be used by its owner only, replaces a stale one, and is removed at the end."""
    with space.open(tmp_path / "data") as store:
        path = store.path / control.SOCKET
        stale = socket.socket(socket.AF_UNIX)
        stale.bind(str(path))
        stale.close()
        with pytest.raises(UnavailableError):
            RemoteService(path)
        with ControlServer(store):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert RemoteService(path).owner()["data"] == str(store.path)
        assert not path.exists()
        with pytest.raises(UnavailableError):
            RemoteService(path)


def test_long_paths_have_sockets_too(tmp_path: Path) -> None:
    """A data directory whose path is longer than a socket address works like any other."""
    long = tmp_path / ("x" * 120) / ("y" * 120)
    with space.open(long) as store, ControlServer(store):
        assert RemoteService(long / control.SOCKET).owner()["data"] == str(long)


def test_callers_are_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the limit a caller is told to try again, and is served once others have gone."""
    monkeypatch.setattr(control, "CONNECTIONS_MAX", 2)
    path = store.path / control.SOCKET
    waiting = [connection(store) for _ in range(2)]
    asked = connection(store)
    answer = everything_sent(asked)
    asked.close()
    assert msgpack.unpackb(answer[4:])["error"]["kind"] == "UnavailableError"
    for each in waiting:
        each.close()
    calls_end()
    assert RemoteService(path).owner()["pid"] == os.getpid()


def test_no_room_for_a_thread(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no thread can be started the caller is told to try again, and later is served."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with connection(store) as stream:
            answer = everything_sent(stream)
    assert msgpack.unpackb(answer[4:])["error"]["kind"] == "UnavailableError"
    assert RemoteService(store.path / control.SOCKET).owner()["pid"] == os.getpid()


def test_too_much_is_refused_before_it_is_sent(remote: Service) -> None:
    """A request above the limit, or with a number no message can carry, is the caller's error."""
    with pytest.raises(UsageError):
        remote.mkdir(path="/" + "x" * (2 << 20))
    with pytest.raises(UsageError):
        remote.resize(capsule="/a/hello.txt", size=1 << 70)


def test_a_server_that_talks_nonsense_is_unavailable(tmp_path: Path) -> None:
    """A client gets one clear error from a socket that answers something else, or nothing."""
    for answer in (b"", b"HTTP/1.1 200 OK\r\n\r\n", b"\0\0\0\1\xc1", b"\0\0\0\1\x05"):
        path = tmp_path / "control.sock"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()

            def answer_once(stream: socket.socket = listener, answer: bytes = answer) -> None:
                for _ in range(2):
                    peer, _address = stream.accept()
                    with peer, contextlib.suppress(BrokenPipeError):
                        peer.sendall(answer)

            serving = threading.Thread(target=answer_once)
            serving.start()
            with pytest.raises(UnavailableError):
                RemoteService(path).owner()
            serving.join()
        path.unlink()

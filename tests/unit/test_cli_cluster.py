"""Commands for clusters, as far as no cluster has to run for it; and calls that are repeated."""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

import space
from space import cli, cli_cluster, cli_dev, remote
from space._errors import (
    ConflictError,
    CorruptionError,
    NotFoundError,
    SpaceError,
    StorageError,
    UnavailableError,
    UsageError,
)
from space._node import enrolment, serve, serve_config
from space._node.caller import Caller, Document, Terms
from space._node.calls import StoreTarget, carry_out, terms_of
from space._node.service import Service
from space._node.store import Store
from space.control import BrokenError, NoAnswerError
from space.remote import Nodes, endpoints

CLIENT: Final = bytes(range(16))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A new store."""
    with space.open(tmp_path / "data") as opened:
        yield opened


# --- a call that is made twice ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, arguments",
    [
        ("create", {"name": "/made", "size": 10}),
        ("mkdir", {"path": "/made"}),
        ("mv", {"source": "/a", "target": "/d"}),
        ("mv", {"source": "/d", "target": "/e"}),
        ("rm", {"capsule": "/a"}),
        ("snapshot", {"capsule": "/d", "name": "s"}),
        ("clone", {"source": "/d", "target": "/clone"}),
        ("resize", {"capsule": "/a", "size": 99}),
        ("set_policy", {"capsule": "/a", "policy": {"compression": "none"}}),
    ],
)
def test_a_repeated_call_is_carried_out_once(store: Store, method: str, arguments: dict[str, Any]) -> None:
    """The same call with the same client and number answers the same again, and adds nothing to the log."""
    store.put(b"a", name="/a")
    store.mkdir("/d")
    terms = Terms(client=CLIENT, sequence=1)
    first = getattr(Service(store, Caller(), terms), method)(**arguments)
    last = store.last
    assert getattr(Service(store, Caller(), terms), method)(**arguments) == first
    assert store.last == last
    fresh = Terms(client=CLIENT, sequence=2)
    if method not in ("resize", "set_policy"):
        with pytest.raises((ConflictError, NotFoundError)):
            getattr(Service(store, Caller(), fresh), method)(**arguments)


def test_a_repeated_removal_by_id(store: Store) -> None:
    """A capsule with several names loses all of them, and the call may be repeated after that."""
    capsule = store.put(b"a", name="/a").id
    store.execute(space_link(store, capsule, b"b"))
    service = Service(store, Caller(), Terms(client=CLIENT, sequence=1))
    done = service.rm(capsule=str(capsule))
    assert service.rm(capsule=str(capsule)) == done
    with pytest.raises(NotFoundError):
        store.resolve("/b")


def space_link(store: Store, capsule: Any, name: bytes) -> Any:
    """The command that gives a capsule one more name."""
    from space.events import commands as cmd

    return cmd.Link(capsule, store.root, name)


def put(store: Store, content: bytes, **arguments: Any) -> Document:
    """A put of bytes as a service does it."""
    reader, writer = os.pipe()
    os.write(writer, content)
    os.close(writer)
    try:
        return Service(store, Caller()).put(descriptor=reader, **arguments)
    finally:
        os.close(reader)


def test_a_put_that_was_done_is_the_answer(store: Store) -> None:
    """The second attempt at a put whose first came to its end names that one, and stores nothing."""
    first = put(store, b"content", name="/n")
    second = put(store, b"content", name="/n", earlier=first["id"])
    assert second == first
    with pytest.raises(ConflictError):
        put(store, b"content", name="/n")


def test_a_put_takes_away_what_was_left(store: Store) -> None:
    """An attempt that was cut off leaves a capsule without a name; the next one removes it."""
    left = put(store, b"cont")
    done = put(store, b"content", name="/n", earlier=left["id"])
    assert done["id"] != left["id"]
    assert list(store.unnamed()) == []
    assert store.get("/n") == b"content"


@pytest.mark.parametrize("name", [None, "/n"])
@pytest.mark.parametrize("left", [b"", b"cont", b"content", b"content and more"])
def test_a_put_goes_on_with_its_id(store: Store, left: bytes, name: str | None) -> None:
    """With an id of the caller's, the same capsule is written again, whatever of it was there."""
    first = put(store, left)
    done = put(store, b"content", id=first["id"], name=name, earlier=first["id"])
    assert done["id"] == first["id"]
    assert store.get(first["id"]) == b"content"
    assert done["size"] == 7
    if name is not None:
        assert store.get(name) == b"content"


@pytest.mark.parametrize(
    "request_",
    [
        {"stale": 1},
        {"client": "00"},
        {"client": 5},
        {"client": "zz" * 16},
        {"sequence": -1},
        {"sequence": True},
        {"sequence": 1 << 63},
    ],
)
def test_malformed_terms(request_: Document) -> None:
    """Terms of a call that are not what they should be are refused."""
    with pytest.raises(UsageError):
        terms_of(request_)
    assert terms_of({"client": "00" * 16, "sequence": 4, "stale": True}) == Terms(True, bytes(16), 4)


# --- one node after another ------------------------------------------------------------------------


class Fake:
    """A node that answers as it was told: each step is an error to raise, or answers."""

    def __init__(self, *steps: Any) -> None:
        self.steps = list(steps)
        self.requests: list[Document] = []

    def ask(self, request: Document, descriptor: int | None) -> Iterator[Document]:
        self.requests.append(request)
        step = self.steps.pop(0) if self.steps else NoAnswerError("down")
        if isinstance(step, Exception):
            raise step
        if callable(step):
            step = step(request, descriptor)
        for message in step:
            if isinstance(message, Exception):
                raise message
            yield message


def done(result: Any = None) -> list[Document]:
    """A call that succeeds."""
    return [{"result": {"position": 1} if result is None else result}]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here gets better by waiting."""
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.0)


def test_the_next_node_is_asked() -> None:
    """A node that does not answer is passed over, and the one that did is asked first the next time."""
    one, two = Fake(NoAnswerError("down")), Fake(done(), done())
    nodes = Nodes([one, two])
    assert nodes.mkdir(path="/a") == {"position": 1}
    assert nodes.stat(capsule="/a") == {"position": 1}
    assert (len(one.requests), len(two.requests)) == (1, 2)


def test_nobody_there_is_said_at_once() -> None:
    """When no node is there at all, each is asked once."""
    fakes = [Fake(), Fake()]
    with pytest.raises(NoAnswerError):
        Nodes(fakes).ls(path="/")
    assert [len(each.requests) for each in fakes] == [1, 1]


@pytest.mark.parametrize("method", sorted(remote.ONCE))
def test_mutations_carry_their_number(method: str) -> None:
    """Every attempt at a mutation has the same client and number, and the next call another one."""
    fake = Fake(BrokenError("gone"), UnavailableError("no leader"), done(), done())
    nodes = Nodes([fake])
    getattr(nodes, method)()
    getattr(nodes, method)()
    signs = [(request["client"], request["sequence"]) for request in fake.requests]
    assert signs[0] == signs[1] == signs[2] != signs[3]
    assert len(bytes.fromhex(signs[0][0])) == 16
    assert signs[0][0] == signs[3][0]


@pytest.mark.parametrize("method", sorted(remote.UNREPEATABLE))
def test_what_cannot_be_repeated_is_not(method: str) -> None:
    """A tree of this machine that was being carried when the connection broke is not carried twice."""
    fake = Fake(BrokenError("gone"), done())
    with pytest.raises(BrokenError):
        getattr(Nodes([fake]), method)()
    assert len(fake.requests) == 1


def test_an_answer_is_an_answer() -> None:
    """An error that another attempt would only meet again is not tried again."""
    fake = Fake([{"error": {"kind": "NotFoundError", "message": "no", "status": "NOT_FOUND"}}], done())
    with pytest.raises(NotFoundError):
        Nodes([fake]).stat(capsule="/a")
    assert len(fake.requests) == 1


def test_trying_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster without a leader is given up at some time, with what it said last."""
    monkeypatch.setattr(remote, "TRY_SECONDS", 0.05)
    fake = Fake(*[UnavailableError("no leader")] * 1_000_000)
    with pytest.raises(UnavailableError, match="no leader"):
        Nodes([fake]).ls()


def test_the_owner_of_a_directory_is_asked_once() -> None:
    """Without --node nothing is tried again, and requests are as they always were."""
    fake = Fake(BrokenError("gone"), done())
    with pytest.raises(BrokenError):
        Nodes([fake], retry=False).mkdir(path="/a")
    assert fake.requests == [{"method": "mkdir", "arguments": {"path": "/a"}}]


def test_stale_reads_say_so() -> None:
    """With --stale every request says that it may be answered from what is there."""
    fake = Fake(done())
    Nodes([fake], stale=True).stat(capsule="/a")
    assert fake.requests[0]["stale"] is True


def test_the_log_goes_on() -> None:
    """After a break the log goes on behind the last event that was shown."""
    events = [{"position": p, "event": e} for p in (1, 2) for e in (0, 1)]
    broken = [{"item": events[0]}, {"item": events[1]}, {"item": events[2]}, BrokenError("gone")]
    rest = [{"item": event} for event in events[2:]] + [{"result": None}]
    fake = Fake(broken, rest)
    assert list(Nodes([fake]).log(start="1")) == events
    assert [request["arguments"]["start"] for request in fake.requests] == ["1", "2"]


def test_other_lists_do_not_begin_anew() -> None:
    """A listing that has shown something and breaks is an error, not a second listing."""
    fake = Fake([{"item": 1}, BrokenError("gone")], done())
    items = Nodes([fake]).ls()
    assert next(items) == 1
    with pytest.raises(BrokenError):
        next(items)


def test_a_put_is_tried_under_a_new_id(tmp_path: Path) -> None:
    """Each attempt reads the file from where it stood, has an id of its own, and names the attempts before."""
    seen: list[bytes] = []

    def read(request: Document, descriptor: int | None) -> list[Any]:
        assert descriptor is not None
        seen.append(os.read(descriptor, 3))
        return [BrokenError("gone")]

    fake = Fake(read, NoAnswerError("down"), read, done())
    path = tmp_path / "file"
    path.write_bytes(b"skipped0123456789")
    with path.open("rb") as file:
        os.lseek(file.fileno(), 7, os.SEEK_SET)
        Nodes([fake]).put(descriptor=file.fileno(), name="/n")
    assert seen == [b"012", b"012"]
    ids = [request["arguments"]["id"] for request in fake.requests]
    assert len(set(ids)) == 4
    assert fake.requests[3]["arguments"]["earlier"].split() == [ids[0], ids[2]]


def test_a_put_of_a_pipe_is_not_repeated() -> None:
    """What was read from a pipe cannot be read again; a node that was not reached has read nothing."""
    reader, writer = os.pipe()
    try:
        fake = Fake(BrokenError("gone"), done())
        with pytest.raises(BrokenError):
            Nodes([fake]).put(descriptor=reader)
        assert Nodes([Fake(), Fake(done())]).put(descriptor=reader) == {"position": 1}
    finally:
        os.close(reader)
        os.close(writer)


def writes(data: bytes, *then: Any) -> Callable[[Document, int | None], list[Any]]:
    """A node that writes these bytes of a get, and then answers."""

    def write(request: Document, descriptor: int | None) -> list[Any]:
        assert descriptor is not None
        os.write(descriptor, data)
        return list(then)

    return write


def got(*fakes: Fake, **arguments: Any) -> tuple[bytes, Any]:
    """What a get writes to a pipe, and its result."""
    reader, writer = os.pipe()
    try:
        result = Nodes(list(fakes)).get(capsule="/a", descriptor=writer, **arguments)
    finally:
        os.close(writer)
        with os.fdopen(reader, "rb") as file:
            data = file.read()
    return data, result


def test_bytes_go_on_where_they_stopped() -> None:
    """A get to a pipe that breaks goes on at another node behind the last byte written."""
    stat = done({"change": 5})
    one = Fake(stat, writes(b"01234", BrokenError("gone")))
    two = Fake(stat, writes(b"56789", {"result": {"id": "x", "size": 5, "position": 9}}))
    data, result = got(one, two, offset=100, length=10)
    assert (data, result["size"]) == (b"0123456789", 10)
    second = two.requests[-1]["arguments"]
    assert (second["offset"], second["length"]) == (105, 5)


def test_bytes_of_two_versions_are_not_mixed() -> None:
    """A get whose capsule changed while it was broken ends with an error."""
    one = Fake(done({"change": 5}), writes(b"01234", BrokenError("gone")))
    two = Fake(done({"change": 6}))
    with pytest.raises(StorageError, match="changed while it was read"):
        got(one, two)


def test_a_file_is_got_anew(tmp_path: Path) -> None:
    """A get to a file begins at the beginning again."""
    fake = Fake(writes(b"0123456789", BrokenError("gone")), writes(b"abc", {"result": {}}))
    with (tmp_path / "out").open("wb") as file:
        Nodes([fake]).get(capsule="/a", descriptor=file.fileno(), replace=True)
    assert (tmp_path / "out").read_bytes().startswith(b"abc")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "unix://",
        "here",
        "ftp://host:1",
        "unix:///a,,unix:///b",
        "https://host",
        "http://10.0.0.1:80",
        "https://h:1/path",
    ],
)
def test_addresses_that_are_none(text: str) -> None:
    """What is not a list of nodes' addresses is refused."""
    with pytest.raises(UsageError):
        endpoints(text, None)


def test_many_addresses_are_refused() -> None:
    """A list of nodes is bounded."""
    assert len(endpoints(",".join(["unix:///a"] * 64), None)) == 64
    with pytest.raises(UsageError, match="at most 64"):
        endpoints(",".join(["unix:///a"] * 65), None)


# --- serve: options and directories ----------------------------------------------------------------


def test_a_configuration_has_the_options_as_keys(tmp_path: Path) -> None:
    """The file's values are taken, and those of the command line in their place."""
    path = tmp_path / "serve.yaml"
    path.write_text(
        "listen: 127.0.0.1:1\nhttp: 127.0.0.1:2\nshards: 4\ninsecure: true\nmount: [/mnt=/a, /mnt2]\n"
    )
    given = {"http": "127.0.0.1:3", "shards": None}
    options = cli_cluster._options(str(path), given)
    assert options == enrolment.ServeOptions(
        listen="127.0.0.1:1",
        http="127.0.0.1:3",
        shards=4,
        insecure=True,
        mounts=(("/mnt", "/a"), ("/mnt2", "/")),
    )
    assert cli_cluster._options(None, {}) == enrolment.ServeOptions()


@pytest.mark.parametrize(
    "text, line, why",
    [
        ("listen: a\nshard: 4\n", 2, "unknown key 'shard'"),
        ("\n\nshards: many\n", 3, "a number"),
        ("shards: true\n", 1, "a number"),
        ("insecure: 1\n", 1, "true or false"),
        ("listen: [a]\n", 1, "a text"),
        ("mount: /mnt\n", 1, "a list"),
        ("mount: [[a]]\n", 1, "a text"),
        ("http: a\nhttp: b\n", 2, "given twice"),
        ("- a\n", 1, "keys and values"),
        ("a: [\n", 2, "not valid YAML"),
        ("? [a]\n: b\n", 1, "unknown key"),
        ("views: nvme\n", 1, "a list of views"),
        ("views:\n- nvme\n", 2, "keys and values"),
        ("views:\n- view: fuse\n", 2, "a view is nvme or nfs or csi"),
        ("views:\n- view: csi\n  sources: [/a]\n", 3, "unknown key 'sources'"),
        ("views:\n- view: nfs\n  sources: [/a]\n  hosts: []\n", 4, "unknown key 'hosts'"),
        ("views:\n- view: nfs\n  listen: a:1\n", 2, "an nfs view needs sources"),
        ("views:\n- view: nvme\n  sources: [/a]\n", 2, "needs listen"),
        ("views:\n- view: nvme\n  listen: a:1\n  sources: []\n", 2, "needs sources"),
        ("views:\n- view: nvme\n  port: 1\n", 3, "unknown key 'port'"),
        ("a: *b\n", 1, "not valid YAML"),
    ],
)
def test_a_wrong_configuration_names_the_line(text: str, line: int, why: str) -> None:
    """A key that is unknown, or has a value of another kind, is an error that names its line."""
    with pytest.raises(UsageError) as caught:
        serve_config.parse(text, "f.yaml")
    assert str(caught.value).startswith(f"f.yaml:{line}: ")
    assert why in str(caught.value)


def test_a_view_in_a_configuration() -> None:
    """What is to be served, where and to whom, as the node takes it; a wrong address is refused."""
    text = "views:\n- view: nvme\n  sources: [/d, /e]\n  listen: 127.0.0.1:4421\n  read-only: true\n"
    text += "  hosts: [nqn.2024-01.a:b]\n"
    (view,) = serve_config.parse(text, "f.yaml")["views"]
    options = view.nvme()
    assert (options.sources, options.listen, options.read_only) == (("/d", "/e"), ("127.0.0.1", 4421), True)
    assert options.access.hosts == {"nqn.2024-01.a:b"}
    (wrong,) = serve_config.parse(text.replace("127.0.0.1:", ""), "f.yaml")["views"]
    with pytest.raises(UsageError, match="not an address"):
        wrong.nvme()


@pytest.mark.requires("py:google.protobuf")
def test_a_csi_view_in_a_configuration() -> None:
    """Where volumes are served is as it is written: by one transport or both; by none, or at no address, is refused."""
    text = "views:\n- view: csi\n  nvme: 127.0.0.1:4420\n  nfs: 0.0.0.0:2049\n  advertise: one\n  lease: 10\n"
    (view,) = serve_config.parse(text, "f.yaml")["views"]
    where = view.csi()
    assert (where.nvme, where.nfs, where.lease_seconds) == (("127.0.0.1", 4420), ("0.0.0.0", 2049), 10)
    assert (where.told(("0.0.0.0", 2049)), where.nfs_address) == ("one:2049", "")
    (view,) = serve_config.parse(f"{text}  nfs-address: '[::1]:2049'\n  clients: [192.0.2.0/24]\n", "f.yaml")[
        "views"
    ]
    assert (view.csi().nfs_address, len(view.csi().rules)) == ("[::1]:2049", 1)
    for wrong, words in (
        ("advertise: one", "serves nfs, nvme, or both"),
        ("nvme: 127.0.0.1", "not an address"),
        ("nfs: 0.0.0.0:1", "where nodes reach it"),
        ("{nfs: 127.0.0.1:1, nfs-address: one}", "not an address"),
        ("{nfs: 127.0.0.1:1, lease: 1}", "a lease of 1 s"),
    ):
        keys = wrong.strip("{}").replace(", ", "\n  ")
        (view,) = serve_config.parse(f"views:\n- view: csi\n  {keys}\n", "f.yaml")["views"]
        with pytest.raises(UsageError, match=words):
            view.csi()


def test_an_nfs_view_in_a_configuration() -> None:
    """What is exported, where and how, as the node takes it; what cannot be is refused."""
    text = "views:\n- view: nfs\n  sources: [/a]\n  listen: 127.0.0.1:2049\n  squash: none\n  lease: 10\n"
    text += "  clients: [10.0.0.0/8:ro]\n  refer: [oslo=192.0.2.7]\n"
    (view,) = serve_config.parse(text, "f.yaml")["views"]
    options = view.nfs()
    assert (view.kind, options.sources, options.listen) == ("nfs", ("/a",), ("127.0.0.1", 2049))
    assert (options.offer.squash.value, options.offer.config().grace_seconds) == ("none", 10)
    assert options.offer.rules[0].read_only
    assert [name for name, _ in options.offer.referrals] == ["oslo"]
    wrongs = (("none", "some"), ("10\n", "1\n"), ("10.0.0.0", "10.0.0"), ("127.0.0.1:", ""), ("oslo=", ""))
    for old, new in wrongs:
        (wrong,) = serve_config.parse(text.replace(old, new, 1), "f.yaml")["views"]
        with pytest.raises(UsageError):
            wrong.nfs()


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    """A file that is missing, too long or not text is refused."""
    path = tmp_path / "f"
    with pytest.raises(NotFoundError):
        serve_config.load(str(path))
    path.write_bytes(b"listen: a\nhttp: \xff\n")
    with pytest.raises(UsageError, match=":2: not UTF-8"):
        serve_config.load(str(path))
    path.write_bytes(b"#" * (serve_config.CONFIG_BYTES_MAX + 1))
    with pytest.raises(UsageError, match="more than"):
        serve_config.load(str(path))
    path.write_bytes(b"")
    assert serve_config.load(str(path)) == {}


@pytest.mark.parametrize("text", ["=", "=/a", "/mnt=a"])
def test_mounts_that_are_none(text: str) -> None:
    """A mount is a target, and a path if it is not all."""
    with pytest.raises(UsageError):
        cli_cluster._mount(text)


@pytest.mark.requires("py:space_raft_engine")
def test_what_becomes_of_a_directory(tmp_path: Path) -> None:
    """A directory becomes the first node, an invited one, or one that waits; and stays what it became."""
    from space._node.cluster import invite

    first = enrolment.prepare(tmp_path / "one", enrolment.ServeOptions(shards=2))
    assert (first.node, first.shards, first.tls) == (1, 2, True)
    assert enrolment.prepare(tmp_path / "one", enrolment.ServeOptions()) == first
    moved = enrolment.prepare(tmp_path / "one", enrolment.ServeOptions(listen="127.0.0.1:1"))
    assert moved.listen == "127.0.0.1:1"
    invite(tmp_path / "one", 2, tmp_path / "carried", hosts=["127.0.0.1"])
    (tmp_path / "carried" / enrolment.INVITATION).write_text(
        json.dumps({"shards": 2, "peers": {"1": "127.0.0.1:1"}})
    )
    second = enrolment.prepare(tmp_path / "two", enrolment.ServeOptions(tls=tmp_path / "carried"))
    assert (second.node, second.cluster, second.shards) == (2, first.cluster, 2)
    assert second.peers == {1: "127.0.0.1:1"}
    joining = enrolment.ServeOptions(join=str(uuid.UUID(bytes=first.cluster)), node=3, insecure=True)
    third = enrolment.prepare(tmp_path / "three", joining)
    assert (third.node, third.cluster, third.tls) == (3, first.cluster, False)


@pytest.mark.requires("py:space_raft_engine")
@pytest.mark.parametrize(
    "options, error",
    [
        (enrolment.ServeOptions(join="nonsense", node=2, insecure=True), UsageError),
        (enrolment.ServeOptions(join="00000000-0000-0000-0000-000000000001", insecure=True), UsageError),
        (enrolment.ServeOptions(join="00000000-0000-0000-0000-000000000001"), UsageError),
        (enrolment.ServeOptions(node=2), UsageError),
        (enrolment.ServeOptions(tls=Path("/nowhere")), NotFoundError),
        (enrolment.ServeOptions(listen="nonsense"), UsageError),
        (enrolment.ServeOptions(shards=0), UsageError),
        (enrolment.ServeOptions(shards=1000), UsageError),
    ],
)
def test_options_that_do_not_fit(
    tmp_path: Path, options: enrolment.ServeOptions, error: type[SpaceError]
) -> None:
    """Options that contradict each other end with an error that says so, and leave no node behind."""
    with pytest.raises(error):
        enrolment.prepare(tmp_path / "data", options)
    assert not (tmp_path / "data" / "node.json").exists()


def test_a_damaged_invitation(tmp_path: Path) -> None:
    """An invitation that is not whole is named; none is no harm."""
    path = tmp_path / enrolment.INVITATION
    assert enrolment._read_invitation(path) == (0, {})
    for text in ("", "[]", "{}", '{"shards": "x", "peers": {}}', '{"shards": 1, "peers": []}'):
        path.write_text(text)
        with pytest.raises(CorruptionError, match="damaged"):
            enrolment._read_invitation(path)


class Listener:
    """A control socket that nobody asks."""

    def __init__(self, target: Any) -> None:
        self.target = target
        self.ended: list[str] = []

    def retire(self, seconds: float) -> None:
        self.ended.append("retired")

    def close(self) -> None:
        self.ended.append("closed")


def test_without_the_engine_a_store_is_served_alone(tmp_path: Path) -> None:
    """Without the consensus engine the store answers, and what needs the engine says how to get it."""
    listeners: list[Listener] = []

    def listen(target: Any) -> Listener:
        listeners.append(Listener(target))
        return listeners[-1]

    alone = serve.RunningAlone(tmp_path / "data", enrolment.ServeOptions(), listen)
    document = alone.document()
    assert (document["node"], document["pid"], document["http"]) == (None, os.getpid(), None)
    target = listeners[0].target
    made = carry_out(target, {"method": "mkdir", "arguments": {"path": "/a"}}, Caller(), None)
    assert made["position"] > 0
    alone.stop()
    assert listeners[0].ended == ["retired", "closed"]
    for options in (
        enrolment.ServeOptions(join="x"),
        enrolment.ServeOptions(shards=2),
        enrolment.ServeOptions(mounts=(("/m", "/"),)),
    ):
        with pytest.raises(UnavailableError, match="consensus engine"):
            serve.RunningAlone(tmp_path / "data", options, listen)


def test_the_notice_without_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serving without the engine says that the store cannot grow, and how to change that."""
    monkeypatch.setattr(serve, "has_engine", lambda: False)
    over = threading.Event()
    monkeypatch.setattr(serve, "_signalled", lambda: over)
    told: list[tuple[Document, str]] = []

    def announce(ready: Document, notice: str) -> None:
        told.append((ready, notice))
        over.set()

    serve.serve(tmp_path / "data", enrolment.ServeOptions(), listen=Listener, announce=announce)
    ((ready, notice),) = told
    assert ready["cluster"] is None
    assert "cannot grow" in notice
    assert "space-store[cluster]" in notice


def test_a_target_answers_only_what_it_has(store: Store) -> None:
    """Names that are no operations, and private ones, are refused."""
    target = StoreTarget(store)
    for method in ("_put", "__init__", "nothing", "", None, 5, "cluster_status"):
        with pytest.raises(UsageError, match="no such operation"):
            carry_out(target, {"method": method, "arguments": {}}, Caller(), None)
    with pytest.raises(UsageError, match="no such operation"):
        carry_out(target, {"method": "ls", "arguments": []}, Caller(), None)


# --- words -----------------------------------------------------------------------------------------

LEADER: Final = {"id": 1, "role": "leader", "position": 9, "digest": "blake3-add:" + "a" * 64, "lag": 0}
FAILED: Final = {"id": 3, "role": "failed", "position": 8, "digest": "x", "lag": 1}
NODES: Final = [
    {**LEADER, "address": "h:1", "failure": ""},
    {"id": 2, "role": "unreachable", "position": None, "digest": None, "lag": None, "address": "h:2"},
    {**FAILED, "address": "", "failure": "disk\x1b[2J"},
]
STATUS: Final = {
    "cluster": "c",
    "shards": [
        {"shard": 0, "leader": 1, "term": 7, "nodes": NODES},
        {"shard": 1, "leader": None, "term": 2, "nodes": []},
    ],
    "differences": ["first in table x"],
}


def test_a_status_is_a_table() -> None:
    """People see every node, who leads, what failed and what differed; nothing of it moves their cursor."""
    text = "\n".join(cli_cluster.status_lines(STATUS))
    assert "shard 0: node 1 leads, term 7" in text
    assert "shard 1: nobody leads, term 2" in text
    assert "unreachable" in text
    assert "disk" in text
    assert "\x1b" not in text
    assert "difference: first in table x" in text


@pytest.mark.parametrize(
    "arguments, status",
    [
        (["cluster", "status"], 7),
        (["cluster", "add", "h:1", "--id", "2"], 7),
        (["cluster", "add", "h:1"], 2),
        (["cluster", "add", "h:1", "--id", "x"], 2),
        (["cluster", "invite", "--out", "d"], 2),
        (["cluster", "invite", "2", "--client", "me", "--out", "d"], 2),
        (["cluster", "invite", "2"], 2),
        (["cluster", "dev", "--nodes", "0"], 2),
        (["cluster", "dev", "--nodes", "10"], 2),
        (["cluster", "nothing"], 2),
        (["serve", "--node", "unix:///x/control.sock"], 2),
        (["serve", "--config", "/nowhere.yaml"], 3),
        (["serve", "--mount", "=x"], 2),
        (["ls", "--node", "https://127.0.0.1:1"], 2),
        (["ls", "--node", "http://127.0.0.1:1"], 7),
        (["ls", "--node", "https://127.0.0.1:1", "--certificate", "/nowhere"], 2),
        (["ls", "--node", "unix:///nowhere/a.sock,unix:///nowhere/b.sock"], 7),
    ],
)
def test_bad_input_is_refused_on_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], status: int
) -> None:
    """What cannot work ends with its status and one line that says why."""
    assert cli.run(["--data", str(tmp_path / "data"), *arguments]) == status
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("space: ")
    assert err.count("\n") == 1


# --- dev -------------------------------------------------------------------------------------------


def test_dev_keeps_its_plan(tmp_path: Path) -> None:
    """Ports are chosen once for a directory; more nodes get more of them, and other options are refused."""

    def planned(**options: Any) -> cli_dev._Plan:
        wanted: dict[str, Any] = {"nodes": 3, "shards": None, "insecure": False, "restart": False, **options}
        return cli_dev.DevCluster(tmp_path / "dev", **wanted)._planned()

    first = planned()
    assert len({*first.peers.values(), *first.http.values()}) == 6
    assert planned() == first
    more = planned(nodes=4)
    assert {number: more.peers[number] for number in (1, 2, 3)} == first.peers
    for options in ({"shards": 2, "nodes": 4}, {"insecure": True, "nodes": 4}, {"nodes": 3}):
        with pytest.raises(UsageError):
            planned(**options)
    (tmp_path / "dev" / cli_dev.DEV_FILE).write_text("{")
    with pytest.raises(CorruptionError):
        planned()


def test_dev_takes_no_strange_directory(tmp_path: Path) -> None:
    """A directory with something else in it is not made a cluster."""
    (tmp_path / "photo.jpg").touch()
    cluster = cli_dev.DevCluster(tmp_path, nodes=3, shards=None, insecure=False, restart=False)
    with pytest.raises(ConflictError, match="not empty"):
        cluster.run(cli_dev.Events())
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]

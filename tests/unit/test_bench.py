from __future__ import annotations

import asyncio
import json
import os
import statistics
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench import bench_cluster, bench_nvme, bench_putget, logs, measure, run
from bench.bench_open import make
from bench.measure import Row, Scale, in_child, in_turn
from bench.nvme import cases
from bench.peers import etcd, nats
from bench.peers.load import ClosedLoop, Load, Measured, first_acknowledged, measured
from bench.peers.ours import Ours
from bench.peers.programs import Program, find, wait_for
from space._errors import UnavailableError, UsageError
from space._node.store import Store
from space.events.commands import Command


@pytest.mark.parametrize(
    "unit, ours, value, ratio",
    [
        ("appends/s", 200.0, 100.0, 2.0),
        ("s", 2.0, 1.0, 0.5),
        ("MiB", 100.0, 300.0, 3.0),
        ("s", 2.0, None, None),
    ],
)
def test_ratio(unit: str, ours: float, value: float | None, ratio: float | None) -> None:
    """A ratio above 1 means that ours is better, for rates and for costs, and there is none without a peer."""
    assert Row("case", unit, ours, "peer", value).ratio == ratio


def test_in_turn() -> None:
    """Cases run in turn, and the median of each case's own rounds counts."""
    order: list[str] = []
    values = {"a": iter([9.0, 1.0, 2.0]), "b": iter([5.0, 5.0, 4.0])}

    def case(name: str) -> float:
        order.append(name)
        return next(values[name])

    assert in_turn({"a": lambda: case("a"), "b": lambda: case("b")}) == {"a": 2.0, "b": 5.0}
    assert order == ["a", "b"] * 3


def test_workspace(tmp_path: Path) -> None:
    """A workspace is an empty directory below the one asked for, and gone afterwards with all in it."""
    with Scale(True, 1, tmp_path / "data").workspace("x") as path:
        assert path.parent == tmp_path / "data"
        (path / "file").write_bytes(b"x")
    assert not path.exists()


def test_scale(tmp_path: Path) -> None:
    """A quick run has its own sizes; a full run has full sizes times the factor, and never nothing."""
    assert Scale(True, 0.5, tmp_path).pick(1000, 7) == 7
    assert Scale(False, 0.5, tmp_path).pick(1000, 7) == 500
    assert Scale(False, 0.0001, tmp_path).pick(1000, 7) == 1


def allocate(size: int) -> int:
    """Touches that many bytes; called in a child process."""
    return sum(bytearray(b"x") * size) // ord("x")


def test_child_reports_its_own_memory() -> None:
    """A child's peak memory holds what it touched, and nothing of what its parent holds."""
    ballast = bytearray(os.urandom(1)) * (256 << 20)
    small = in_child("tests.unit.test_bench:allocate", 1)
    large = in_child("tests.unit.test_bench:allocate", 64 << 20)
    assert small.result == 1
    assert large.rss_bytes - small.rss_bytes > 60 << 20
    assert small.rss_bytes < len(ballast)


def test_child_that_fails() -> None:
    """A child's exception arrives as an error that names it."""
    with pytest.raises(RuntimeError, match="TypeError"):
        in_child("tests.unit.test_bench:allocate", "x")


def test_unknown_name() -> None:
    """An unknown benchmark is refused with the names there are, before anything runs."""
    with pytest.raises(UsageError, match="replay"):
        run.main(["wal", "no-such"])


def test_table_and_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows come out as one table a benchmark or as one JSON document, and nothing is left on the disk."""
    rows = [Row("small", "appends/s", 12345.6, "limit", 20000.0), Row("alone", "MiB", 1.5)]
    monkeypatch.setattr(run, "_runner", lambda name: lambda scale: rows)
    home = tmp_path / "data"
    home.mkdir()
    assert run.main(["wal"], directory=home) == 0
    table = capsys.readouterr().out
    assert "12,346" in table
    assert "0.617" in table
    home.mkdir()
    assert run.main(["wal", "open"], json=True, quick=True, directory=home) == 0
    document = json.loads(capsys.readouterr().out)
    assert list(document["benchmarks"]) == ["wal", "open"]
    assert document["benchmarks"]["wal"]["rows"][0]["ratio"] == pytest.approx(0.61728)
    assert not home.exists()


def test_one_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A benchmark that cannot be run is reported and makes the status 1; the others run all the same."""

    def broken(scale: Scale) -> list[Row]:
        raise OSError("no such disk")

    monkeypatch.setattr(
        run, "_runner", lambda name: broken if name == "wal" else lambda scale: [Row("x", "s", 1)]
    )
    assert run.main(["wal", "open"], json=True, directory=tmp_path) == 1
    document = json.loads(capsys.readouterr().out)["benchmarks"]
    assert document["wal"]["error"] == "no such disk"
    assert document["open"]["rows"][0]["ours"] == 1


@pytest.mark.parametrize(
    "kind", [logs.small_writes, logs.random_writes, logs.creations_with_attributes, logs.mixed]
)
def test_generated_logs(tmp_path: Path, kind: logs.Generator) -> None:
    """Every generated log is accepted command by command, has about the events asked for, and replays to itself."""
    with Store(tmp_path / "store") as store:
        commands: list[Command] = list(kind(store, 3000))
        logs.submit(store, commands)
        assert 2900 < store.applied().events < 3100
        assert store.replay(verify=True).equal


def test_synthesised_log(tmp_path: Path) -> None:
    """The log made for opening is one the store itself could have written: it verifies and replays to itself."""
    make(str(tmp_path / "store"), 50, 1000)
    with Store(tmp_path / "store", create=False) as store:
        assert store.applied().events == 1000
        assert store.verify().findings == []
        assert store.replay(verify=True).equal
        assert len(store.ls("/d000000")) == 50


def test_generated_file(tmp_path: Path) -> None:
    """The file to be put is the same every time, has the size asked for, and half of it compresses."""
    import zlib

    one, other = tmp_path / "one", tmp_path / "other"
    for path in (one, other):
        bench_putget.generate(path, (2 << 20) + 5)
    data = one.read_bytes()
    assert data == other.read_bytes()
    assert len(data) == (2 << 20) + 5
    assert len(zlib.compress(data[: 1 << 20], 1)) > 1 << 20
    assert len(zlib.compress(data[1 << 20 : 2 << 20], 1)) < 3 << 18


def test_peak_memory_of_this_process() -> None:
    """Peak memory is in bytes: more than an interpreter's few MiB."""
    assert measure.peak_rss_bytes() > 5 << 20


# --- the cluster and its peers ---------------------------------------------------------------------


def test_figures_of_a_run() -> None:
    """Percentiles are of the latencies in order, and the rate is what was acknowledged over the time it took."""
    found = measured([each / 1000 for each in range(101, 0, -1)], 2.0)
    assert (found.operations, found.rate) == (101, 50.5)
    assert (round(found.p50_ms), round(found.p99_ms)) == (51, 100)
    with pytest.raises(RuntimeError, match="not one"):
        measured([], 1.0)


def test_closed_loop_keeps_as_many_in_flight_as_asked_and_counts_what_was_acknowledged() -> None:
    """Each acknowledgement begins the next operation; refusals are not counted, and nothing is left open at the end."""
    flying = most = refused = issued = 0

    def issue(number: int, done: Callable[[bool], None]) -> None:
        nonlocal flying, most, issued
        flying += 1
        issued += 1
        most = max(most, flying)

        def answer() -> None:
            nonlocal flying, refused
            flying -= 1
            refused += number % 10 == 0
            done(number % 10 != 0)

        asyncio.get_running_loop().call_soon(answer)

    found = asyncio.run(ClosedLoop(issue, Load(256, 7, 0.05)).run())
    assert most == 7
    assert flying == 0
    assert found.operations == issued - refused


def test_closed_loop_gives_up_on_a_system_that_refuses_everything() -> None:
    """A system that answers nothing but errors ends the run with an error, not with a rate."""

    def issue(number: int, done: Callable[[bool], None]) -> None:
        asyncio.get_running_loop().call_soon(done, False)

    with pytest.raises(UnavailableError, match="fail"):
        asyncio.run(ClosedLoop(issue, Load(256, 2, 30.0)).run())


def test_first_acknowledged_write_after_failures() -> None:
    """Writes go on until one is acknowledged, however many were refused before."""
    begun: list[int] = []

    def issue(number: int, done: Callable[[bool], None]) -> None:
        begun.append(number)
        asyncio.get_running_loop().call_soon(done, number == 3)

    assert asyncio.run(first_acknowledged(issue)) > 0
    assert begun == [0, 1, 2, 3]


def test_protobuf() -> None:
    """Numbers and bytes of messages come back as they went, and an unknown wire type is refused."""
    message = etcd.field(1, b"key") + etcd.field(4, 300) + etcd.field(9, 1) + etcd.field(2, b"x" * 200)
    assert etcd.fields(message) == {1: b"key", 4: 300, 9: 1, 2: b"x" * 200}
    assert etcd.varint(300) == b"\xac\x02"
    with pytest.raises(ValueError, match="wire type"):
        etcd.fields(etcd.varint(1 << 3 | 5) + bytes(4))


class Transport:
    """Keeps what was written."""

    def __init__(self) -> None:
        self.written = b""

    def write(self, data: bytes) -> None:
        self.written += data

    def writelines(self, pieces: list[bytes]) -> None:
        self.written += b"".join(pieces)

    def frames(self) -> Iterator[tuple[int, int, int, bytes]]:
        """Type, flags, stream and body of each HTTP/2 frame since the last look."""
        data, self.written = self.written.removeprefix(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), b""
        while data:
            high, low, kind, flags, stream = struct.unpack_from(">HBBBI", data)
            end = 9 + (high << 8 | low)
            yield kind, flags, stream, data[9:end]
            data = data[end:]


def http2(kind: int, flags: int, stream: int, body: bytes = b"") -> bytes:
    """A frame of HTTP/2."""
    return struct.pack(">HBBBI", len(body) >> 8, len(body) & 0xFF, kind, flags, stream) + body


def test_http2_counts_answers_and_not_refusals() -> None:
    """A call with a message in its answer is acknowledged, one with trailers only is not; any split will do."""

    async def script() -> list[tuple[int, bytes | None]]:
        client, transport = etcd.Http2(), Transport()
        client.connection_made(transport)
        answers: list[tuple[int, bytes | None]] = []
        for number in (1, 2):
            client.call(b"", b"put", lambda answer, number=number: answers.append((number, answer)))  # type: ignore[misc]
        await asyncio.sleep(0)
        sent = [(kind, stream) for kind, _, stream, _ in transport.frames()]
        assert sent[2:] == [(1, 1), (0, 1), (1, 3), (0, 3)]
        came = (
            http2(4, 0, 0)
            + http2(6, 0, 0, b"12345678")
            + http2(1, 4, 1)
            + http2(0, 0, 1, b"\0\0\0\0\x02ok")
            + http2(1, 5, 3)
            + http2(1, 5, 1)
        )
        for at in range(len(came)):
            client.data_received(came[at : at + 1])
        await asyncio.sleep(0)
        assert [(kind, flags) for kind, flags, _, _ in transport.frames()] == [(4, 1), (6, 1)]
        return answers

    assert asyncio.run(script()) == [(2, None), (1, b"ok")]


def test_http2_sends_no_more_than_the_windows_allow() -> None:
    """A large message leaves in pieces as the server makes room, and arrives whole and in order."""

    async def script() -> None:
        client, transport = etcd.Http2(), Transport()
        client.connection_made(transport)
        message = bytes(range(256)) * 800
        client.call(b"", message, lambda _: None)
        got = b""
        for _ in range(20):
            await asyncio.sleep(0)
            pieces = [body for kind, _, _, body in transport.frames() if kind == 0]
            assert all(len(piece) <= 16_384 for piece in pieces)
            assert sum(map(len, pieces)) <= 65_535
            got += b"".join(pieces)
            room = sum(map(len, pieces)).to_bytes(4, "big")
            client.data_received(http2(8, 0, 0, room) + http2(8, 0, 1, room))
        assert got == b"\0" + len(message).to_bytes(4, "big") + message

    asyncio.run(script())


def test_nats_client_takes_any_split_of_answers() -> None:
    """Each acknowledgement finds the publication it is for, a ping is answered, and an error is no acknowledgement."""

    async def script() -> None:
        client, transport = nats.Client(), Transport()
        client.connection_made(transport)
        answers: dict[str, bytes] = {}
        for name in ("one", "two"):
            client.request(b"s", b"payload", lambda found, name=name: answers.update({name: found}))  # type: ignore[misc]
        await asyncio.sleep(0)
        assert transport.written.endswith(b"PUB s _INBOX.bench.2 7\r\npayload\r\n")
        came = b'INFO {}\r\nPING\r\nMSG _INBOX.bench.2 1 9\r\n{"seq":1}\r\nMSG _INBOX.bench.1 1 2\r\n\r\n\r\n'
        for at in range(len(came)):
            client.data_received(came[at : at + 1])
        assert transport.written.endswith(b"PONG\r\n")
        assert answers == {"two": b'{"seq":1}', "one": b"\r\n"}

    asyncio.run(script())


def test_a_missing_peer_is_named() -> None:
    """A peer that is not installed has its rows, without a value; a peer that ran is compared figure by figure."""
    ours = Measured(1000, 1.0, 5.0, 10.0)
    found = dict.fromkeys(("leader", "tasks", "follower", "TLS"), ours) | {
        "etcd": Measured(500, 1.0, 20.0, 40.0)
    }
    rows = bench_cluster.compare("256 B", 256, found)
    assert {row.peer for row in rows} == {"etcd", "NATS (not installed)"}
    assert [row.ratio for row in rows if row.peer == "etcd"] == [2.0, 4.0, 4.0] * 4
    assert all(row.value is None for row in rows if row.peer != "etcd")


def test_rounds_in_turn_take_the_median_of_each_figure() -> None:
    """Systems run one after the other, round by round, and each figure's own median counts."""
    order: list[str] = []
    runs = {
        "a": iter([Measured(100, 1.0, 3.0, 9.0), Measured(300, 1.0, 1.0, 8.0), Measured(200, 1.0, 2.0, 7.0)]),
        "b": iter([Measured(10, 1.0, 1.0, 1.0)] * 3),
    }

    def case(name: str) -> Callable[[Load], Measured]:
        def run_(load: Load) -> Measured:
            order.append(name)
            return next(runs[name])

        return run_

    found = bench_cluster.in_turn({name: case(name) for name in runs}, Load(256, 1, 1.0))
    assert order == ["a", "b"] * 3
    assert (found["a"].rate, found["a"].p50_ms, found["a"].p99_ms) == (200, 2.0, 8.0)
    assert statistics.median([100, 300, 200]) == found["a"].operations


def test_waiting_names_what_did_not_happen() -> None:
    """What never comes true ends in an error with the last reason."""

    def never() -> bool:
        raise ValueError("no leader yet")

    with pytest.raises(RuntimeError, match=r"a cluster did not happen .* no leader yet"):
        wait_for("a cluster", never, seconds=0.05)


def test_a_program_that_ends_at_once_leaves_its_last_words(tmp_path: Path) -> None:
    """The end of a program's output can be shown, and ending it a second time does no harm."""
    shell = find("sh")
    assert shell is not None
    program = Program([shell, "-c", "echo no such disk"], tmp_path / "home")
    program.process.wait()
    assert program.last_words() == "no such disk"
    program.end()


@pytest.mark.requires("py:space_raft_engine")
def test_our_cluster_under_load_and_a_kill(tmp_path: Path) -> None:
    """Loads from the leader's and a follower's process and a killed leader leave three equal nodes with every event."""
    ours = Ours(tmp_path)
    try:
        assert ours.load(Load(256, 8, 0.2)).operations > 0
        assert ours.load(Load(256, 8, 0.2), follower=True).operations > 0
        assert ours.load(Load(256, 8, 0.2), tasks=True).operations > 0
        assert ours.failover() > 0
        assert ours.load(Load(1 << 20, 2, 0.1), follower=True).operations > 0
    finally:
        ours.close()


@pytest.mark.requires("etcd")
def test_etcd_under_load(tmp_path: Path) -> None:
    """The client's puts are on all three members, small and large."""
    cluster = etcd.Etcd(tmp_path)
    try:
        assert cluster.load(Load(256, 8, 0.2)).operations > 0
        assert cluster.load(Load(1 << 20, 2, 0.1)).operations > 0
    finally:
        cluster.close()


def test_nats_under_load(tmp_path: Path) -> None:
    """The client's messages are on all three servers, small and large."""
    cluster = nats.Nats(tmp_path)
    try:
        assert cluster.load(Load(256, 8, 0.2)).operations > 0
        assert cluster.load(Load(1 << 20, 2, 0.1)).operations > 0
    finally:
        cluster.close()


def test_the_nvme_client_gets_the_same_answers_from_both(tmp_path: Path) -> None:
    """Every case runs against our view and the echo server: as many bytes as asked for, no status but success."""
    span = cases.make(str(tmp_path / "data"), 1 << 20, 4096)
    with bench_nvme.ours(tmp_path / "data") as ours, bench_nvme.echo() as echo:
        for case in cases.CASES:
            for server in (ours, echo):
                found = bench_nvme.measured(server, case, span, 0.05)
                assert found["per_second"] > 0
                assert 0 < found["p50_us"] <= found["p99_us"]


def test_a_namespace_is_ready_and_cloned(tmp_path: Path) -> None:
    """The first block of a sparse 1 GiB is read by a host once it is served, and a clone of it can be made."""
    cases.make(str(tmp_path / "data"), 1 << 30, 512)
    assert in_child("bench.bench_nvme:ready", str(tmp_path / "data")).result > 0
    assert bench_nvme.clone(str(tmp_path / "clone"), 1 << 30) > 0

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from bench import bench_putget, logs, measure, run
from bench.bench_open import make
from bench.measure import Row, Scale, in_child, in_turn
from space._errors import UsageError
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

"""The command line in this process: words, JSON, exit statuses."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

import space
from space import cli, cli_cluster, cli_project, cli_session
from space._node import doctor, views
from space._node.caller import Caller
from space._node.service import Service
from tests.cli_support import ROOT, Outcome, keys

Run = Callable[..., Outcome]

STAT: Final = {
    "id", "kind", "size", "allocated", "stored", "block_size", "mode", "permissions", "nlink", "uid", "gid",
    "rdev", "ino", "entries", "parent", "change", "deleted", "encrypted",
    "atime", "atime_ns", "mtime", "mtime_ns", "ctime", "ctime_ns", "btime", "btime_ns",
}  # fmt: skip
POLICY: Final = {
    "compression", "dedupe", "encryption", "transform", "rpo", "latency_target", "sovereignty", "federation",
    "history", "durability", "block_size",
}  # fmt: skip
NO_SUCH_ID: Final = "01a1fd03-71c6-7a06-8734-3d687a1675dd"
ROOT_ID: Final = "00000000-0000-0000-0000-000000000001"


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data directory commands use unless told otherwise; nothing is there yet."""
    path = tmp_path / "data"
    monkeypatch.setenv("SPACE_DATA", str(path))
    monkeypatch.delenv("SPACE_NODE", raising=False)
    return path


@pytest.fixture
def run(data: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process."""

    def run(*arguments: str | Path) -> Outcome:
        capfd.readouterr()
        status = cli.run([str(argument) for argument in arguments])
        return Outcome(status, *capfd.readouterr())

    return run


@pytest.fixture
def hello(tmp_path: Path) -> Path:
    """A small file."""
    path = tmp_path / "hello.txt"
    path.write_text("hello")
    return path


@pytest.fixture
def stored(run: Run, hello: Path) -> str:
    """The id of a capsule stored at /a/hello.txt."""
    result = run("put", hello, "--name", "/a/hello.txt")
    assert (result.status, result.err) == (0, "")
    return result.out.strip()


@pytest.fixture(scope="module")
def same_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with /a/hello.txt for tests that change nothing."""
    path = tmp_path_factory.mktemp("same") / "data"
    with space.open(path) as store:
        store.put(b"hello", name="/a/hello.txt")
    return path


# --- JSON shapes -----------------------------------------------------------------------------------


def test_put_says_what_it_stored(run: Run, hello: Path) -> None:
    """The JSON of put names id, position, size, stored bytes and the content's digest."""
    result = run("put", hello, "--json").json
    assert keys(result) == {"id", "position", "size", "stored_bytes", "digest"}
    assert result["size"] == 5
    assert result["digest"].startswith("blake3:")


def test_put_takes_an_id_and_a_policy(run: Run, hello: Path, tmp_path: Path) -> None:
    """A capsule gets the id that was asked for and follows the policy file."""
    policy = tmp_path / "policy.yaml"
    policy.write_text("compression: zstd:3\n")
    assert run("put", hello, "--id", NO_SUCH_ID, "--policy-file", policy).out == NO_SUCH_ID + "\n"
    assert run("policy", "show", NO_SUCH_ID, "--json").json["compression"] == "zstd:3"


def test_get_writes_bytes_or_a_file(run: Run, stored: str, tmp_path: Path) -> None:
    """Get writes exactly the asked range to stdout, and whole content to a file with a JSON report."""
    assert run("get", stored).out == "hello"
    assert run("get", "/a/hello.txt", "--offset", "1", "--length", "3").out == "ell"
    assert run("get", stored, "--offset", "7EiB").out == ""
    target = tmp_path / "out"
    report = run("get", stored, "-o", target, "--json").json
    assert keys(report) == {"id", "size", "position", "file"}
    assert target.read_text() == "hello"


def test_get_leaves_holes(run: Run, tmp_path: Path) -> None:
    """A sparse capsule becomes a sparse file of the same size."""
    run("create", "--size", "64MiB", "--name", "/sparse")
    target = tmp_path / "sparse"
    assert run("get", "/sparse", "-o", target).status == 0
    assert target.stat().st_size == 64 << 20
    assert target.stat().st_blocks * 512 < 1 << 20


def test_a_refused_get_makes_no_file(run: Run, stored: str, tmp_path: Path) -> None:
    """Where there is nothing to get, the output file is neither made nor emptied."""
    missing, there = tmp_path / "missing", tmp_path / "there"
    there.write_text("precious")
    for target in (missing, there):
        assert run("get", "/none", "-o", target).status == 3
        assert run("get", "/a", "-o", target).status == 4
    assert not missing.exists()
    assert there.read_text() == "precious"


def test_create_and_resize(run: Run) -> None:
    """An empty block capsule has its size and block size, and can be resized."""
    made = run("create", "--size", "1MiB", "--block-size", "512", "--name", "/disk", "--json").json
    assert keys(made) == {"id", "size", "block_size", "position"}
    assert (made["size"], made["block_size"]) == (1 << 20, 512)
    assert keys(run("resize", "/disk", "2MiB", "--json").json) == {"position", "size"}
    assert run("stat", "/disk", "--json").json["size"] == 2 << 20


def test_ls_lists(run: Run, stored: str) -> None:
    """The JSON of ls is a list of objects with name, path and attributes, in the order of names."""
    assert [each["name"] for each in run("ls", "--json").json] == ["a"]
    assert [each["path"] for each in run("ls", "-r", "--json").json] == ["/a", "/a/hello.txt"]
    (entry,) = run("ls", "/a", "--json").json
    assert keys(entry) == STAT | {"name", "path"}
    assert (entry["id"], entry["kind"], entry["size"]) == (stored, "file", 5)
    assert run("ls", "/a/hello.txt", "--json").json == [entry]
    assert [each["path"] for each in run("ls", entry["parent"], "--json").json] == ["/a/hello.txt"]


def test_ls_writes_paths_plainly(run: Run, stored: str) -> None:
    """Paths come without doubled and trailing slashes however the directory was written."""
    assert [each["path"] for each in run("ls", "//a/./", "--json").json] == ["/a/hello.txt"]
    assert [each["path"] for each in run("ls", "/", "--json").json] == ["/a"]


def test_deep_trees(run: Run, data: Path) -> None:
    """A tree deeper than Python's stack is listed, described and removed."""
    deep = "/d" * 1100
    assert run("mkdir", "-p", deep).status == 0
    assert run("ls", "-r", "--json").json[-1]["path"] == deep
    assert run("stat", deep, "--json").json["paths"] == [deep]
    assert run("rm", "-r", "/d").status == 0
    assert run("ls", "--json").json == []


def test_ls_of_nothing_is_an_empty_list(run: Run, stored: str) -> None:
    """An empty listing is still one JSON document."""
    run("mkdir", "/empty")
    assert run("ls", "/empty", "--json").json == []
    assert run("ls", "--unnamed", "--json").json == []


def test_ls_shows_what_has_no_name(run: Run, hello: Path) -> None:
    """Capsules stored without a name are listed by id."""
    made = run("put", hello).out.strip()
    assert [each["id"] for each in run("ls", "--unnamed", "--json").json] == [made]
    assert made in run("ls", "--unnamed").out


def test_stat_shows_everything(run: Run, stored: str) -> None:
    """The JSON of stat has every attribute, all paths, the policy and extended attributes."""
    document = run("stat", stored, "--json").json
    assert keys(document) == STAT | {"paths", "policy", "xattrs", "position"}
    assert document["paths"] == ["/a/hello.txt"]
    assert keys(document["policy"]) == POLICY
    assert document["mtime"].endswith("Z")
    assert "paths: /a/hello.txt" in run("stat", stored).out


def test_changing_names(run: Run, stored: str) -> None:
    """Mkdir, mv and rm are quiet, and report positions as JSON."""
    assert run("mkdir", "/b").out == ""
    assert keys(run("mkdir", "-p", "/b/c/d", "--json").json) == {"id", "position"}
    assert keys(run("mv", "/a/hello.txt", "/b", "--json").json) == {"position"}
    assert [keys(each) for each in run("rm", "/b/hello.txt", "/b/c/d", "--json").json] == [
        {"capsule", "position"}
    ] * 2
    assert run("rm", "/b").complaint().startswith("space: directory not empty")
    assert run("rm", "-r", "/b").status == 0
    assert [each["path"] for each in run("ls", "-r", "--json").json] == ["/a"]


def test_snapshots(run: Run, stored: str) -> None:
    """A snapshot is taken, listed in two ways, usable as a moment, and dropped."""
    assert keys(run("snapshot", "/a", "before", "--json").json) == {"name", "position"}
    run("rm", "/a/hello.txt")
    (listed,) = run("snapshots", "--json").json
    assert run("snapshot", "--json").json == [listed]
    assert keys(listed) == {"name", "id", "moment", "position", "event", "time", "time_ns"}
    assert run("get", "/a/hello.txt", "--at", "before").out == "hello"
    assert run("get", "/a/hello.txt", "--at", listed["moment"]).out == "hello"
    assert run("snapshot", "--drop", "before").status == 0
    assert run("snapshots", "--json").json == []


def test_clone_and_undelete(run: Run, stored: str) -> None:
    """A clone has its own id; what is removed is listed and brought back, there or elsewhere."""
    clone = run("clone", "/a", "/b", "--json").json
    assert keys(clone) == {"id", "position"}
    run("rm", "/b/hello.txt")
    (lost,) = run("undelete", "--json").json
    assert keys(lost) == {"id", "path", "kind", "size", "position", "time", "time_ns"}
    assert lost["path"] == "/b/hello.txt"
    assert keys(run("undelete", "/b/hello.txt", "--json").json) == {"id", "position"}
    run("rm", "/b/hello.txt")
    assert run("undelete", lost["id"], "--to", "/back").out.strip() == lost["id"]
    assert run("get", "/back").out == "hello"


def test_clone_of_a_past_moment(run: Run, stored: str) -> None:
    """What was removed can be cloned as it was."""
    position = run("digest", "--json").json["position"]
    run("rm", "-r", "/a")
    assert run("clone", "/a", "/again", "--at", f"@{position}").status == 0
    assert run("get", "/again/hello.txt").out == "hello"


def test_digest(run: Run, stored: str) -> None:
    """Position and digest, the same again at that moment after something else happened."""
    before = run("digest", "--json").json
    assert keys(before) == {"position", "digest"}
    run("mkdir", "/other")
    assert run("digest", "--at", f"@{before['position']}", "--json").json == before
    assert run("digest", "--json").json["digest"] != before["digest"]


def test_log_is_one_object_a_line(run: Run, stored: str) -> None:
    """Events come oldest first, whole, and can be narrowed to a capsule and a range."""
    events = [json.loads(line) for line in run("log", "--json").out.splitlines()]
    assert events[0]["kind"] == "StoreInitialised"
    for event in events:
        assert keys(event) == {"position", "event", "time", "time_ns", "actor", "kind", "capsule", "detail"}
    places = [(event["position"], event["event"]) for event in events]
    assert places == sorted(set(places))
    own = [
        json.loads(line)["kind"]
        for line in run("log", "--json", "--capsule", "/a/hello.txt").out.splitlines()
    ]
    assert own == ["CapsuleCreated", "ExtentWritten", "NameLinked"]
    narrowed = [
        json.loads(line) for line in run("log", "--json", "--from", "@2", "--to", "3").out.splitlines()
    ]
    assert narrowed == [event for event in events if 2 <= event["position"] <= 3]
    assert run("log", "--from", "2999-01-01").out == ""
    assert run("log", "--to", "1999-01-01").out == ""
    assert len(run("log", "--from", "1999-01-01").out.splitlines()) == len(events)


def test_log_of_a_removed_path(run: Run, stored: str) -> None:
    """The history of what was at a path can be asked for after it was removed."""
    run("rm", "/a/hello.txt")
    assert "NameUnlinked" in run("log", "--capsule", "/a/hello.txt").out


def test_upkeep(run: Run, stored: str) -> None:
    """Replay, verify and gc report what documentation says they do, and find a good store good."""
    replayed = run("replay", "--verify", "--json").json
    names = {"views", "events", "seconds", "events_per_second", "position", "digests", "equal"}
    assert keys(replayed) == names
    assert replayed["equal"] is True
    assert keys(run("replay", "--view", "content", "--json").json) == names
    verified = run("verify", "--json").json
    assert keys(verified) == {
        "segments", "batches", "events", "payload_bytes", "repaired", "destroyed", "findings",
    }  # fmt: skip
    assert (verified["destroyed"], verified["findings"]) == (0, [])
    freed = run("gc", "--dry-run", "--json").json
    assert keys(freed) == {
        "bytes_given_back",
        "frames",
        "capsules_purged",
        "clients_forgotten",
        "dry_run",
        "position",
    }
    assert run("gc").status == 0


def test_trees(run: Run, tmp_path: Path) -> None:
    """A directory tree comes out as it went in."""
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "file").write_bytes(os.urandom(100_000))
    (source / "link").symlink_to("sub/file")
    imported = run("import", source, "/tree", "--json").json
    assert keys(imported) == {"files", "directories", "others", "bytes", "position"}
    assert (imported["files"], imported["directories"], imported["others"]) == (1, 1, 1)
    exported = run("export", "/tree", target, "--json").json
    assert keys(exported) == keys(imported)
    assert (target / "sub" / "file").read_bytes() == (source / "sub" / "file").read_bytes()
    assert (target / "link").readlink() == Path("sub/file")


def test_policies(run: Run, stored: str, tmp_path: Path) -> None:
    """A policy file is checked and shown whole, set, and a wrong one is refused naming the line."""
    file = tmp_path / "policy.yaml"
    file.write_text("compression: lz4\nhistory: 30d\n")
    assert keys(run("policy", "check", file, "--json").json) == POLICY
    assert keys(run("policy", "set", "/a", file, "--json").json) == {"position"}
    assert run("policy", "show", "/a", "--json").json["history"] == "30d"
    file.write_text("compression: lz4\nhistroy: 30d\n")
    refused = run("policy", "check", file)
    assert refused.status == 2
    assert f"{file}:2: histroy: unknown key; did you mean history?" in refused.complaint()


# --- exit statuses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, status",
    [
        (["get", "/nothing"], 3),
        (["get", "/a"], 4),
        (["get", NO_SUCH_ID], 3),
        (["get", "no-path"], 2),
        (["get", "zzzzzzzz-71c6-7a06-8734-3d687a1675dd"], 2),
        (["get", "/a/hello.txt", "--offset", "-1"], 2),
        (["get", "/a/hello.txt", "--offset", "99999999999999999999999"], 2),
        (["get", "/a/hello.txt", "--length", "4K"], 2),
        (["get", "/a/hello.txt", "--at", "yesterday"], 2),
        (["get", "/a/hello.txt", "--at", "@99999"], 3),
        (["get", "/a/hello.txt", "--at", "@99999999999999999999"], 2),
        (["get", "/a/hello.txt", "--at", "1999-01-01"], 3),
        (["get", "/a/hello.txt", "--at", "-9999999w"], 3),
        (["get", "/a/hello.txt", "-o", "/dev/full"], 1),
        (["get", "/a/hello.txt", "-o", "/nowhere/out"], 3),
        (["get", "/a/hello.txt", "-o", "/"], 2),
        (["get", "/" + "x" * 10_000], 3),
        (["get", "/a/hello.txt/deeper"], 4),
        (["put", "/nowhere/file"], 3),
        (["put", "/"], 2),
        (["put", "FILE", "--name", "/a/hello.txt"], 4),
        (["put", "FILE", "--name", "relative"], 2),
        (["put", "FILE", "--name", "/"], 2),
        (["put", "FILE", "--name", "/a/.."], 2),
        (["put", "FILE", "--name", "/a/../.."], 2),
        (["put", "FILE", "--name", "/" + "x" * 10_000], 2),
        (["put", "FILE", "--name", "/" + "x/" * 40_000], 2),
        (["put", "FILE", "--name", os.fsdecode(b"/bad\xff")], 2),
        (["put", "FILE", "--name", os.fsdecode(b"/bad\xff/deeper")], 2),
        (["put", "FILE", "--id", "1234"], 2),
        (["put", "FILE", "--policy-file", "/nowhere/policy"], 3),
        (["create", "--size", "1KB"], 2),
        (["create", "--size", "16EiB"], 2),
        (["create", "--size", "-1"], 2),
        (["create", "--block-size", "1000"], 2),
        (["create", "--size", "1000", "--block-size", "512"], 2),
        (["create", "--name", "/a/hello.txt/deeper"], 4),
        (["create", "--name", "/a/.."], 2),
        (["resize", "/a", "1"], 4),
        (["resize", "/a/hello.txt", "lots"], 2),
        (["mkdir", "/a"], 4),
        (["mkdir", "/x/y"], 3),
        (["mkdir", "/" + "x" * 256], 2),
        (["mkdir", os.fsdecode(b"/\xfe")], 2),
        (["mkdir", "relative"], 2),
        (["mv", "/nothing", "/b"], 3),
        (["mv", "/a", "/a/b"], 2),
        (["rm", "/"], 2),
        (["rm", ROOT_ID], 5),
        (["rm", "/a"], 4),
        (["rm"], 2),
        (["ls", "/nothing"], 3),
        (["stat", "/nothing"], 3),
        (["import", "/nowhere"], 3),
        (["import", "FILE"], 2),
        (["export", "/nothing", "/tmp/never"], 3),
        (["export", "/a", "/usr"], 4),
        (["snapshot", "/a"], 2),
        (["snapshot", "/a", "bad/name"], 2),
        (["snapshot", "/a", ""], 2),
        (["snapshot", "--drop", "none"], 3),
        (["snapshot", "/a", "--drop", "none"], 2),
        (["clone", "/nothing", "/b"], 3),
        (["clone", "/a", "/a"], 4),
        (["undelete", "/a/hello.txt"], 3),
        (["undelete", NO_SUCH_ID], 3),
        (["undelete", "nonsense"], 2),
        (["log", "--from", "soon"], 2),
        (["log", "--capsule", "/nothing"], 3),
        (["replay", "--view", "no-such-view"], 2),
        (["replay", "--to", "@99999"], 3),
        (["digest", "--at", "@0"], 3),
        (["policy", "check", "/nowhere/policy"], 3),
        (["policy", "show", "/nothing"], 3),
        (["project", "mount", "--target", "/tmp/never"], 2),
        (["project", "mount", "--path", "/"], 2),
        (["project", "mount", "--path", "/", "--id", ROOT_ID, "--target", "/tmp/never"], 2),
        (["project", "mount", "--path", "/nothing", "--target", "/tmp/never"], 3),
        (["project", "mount", "--path", "/", "--at", "soon", "--target", "/tmp/never"], 2),
        (["project", "--view", "nvme"], 2),
        (["project", "--view", "teapot"], 2),
        (["project", "--view", "fuse", "--id", "a", "--id", "b", "--target", "/tmp/never"], 2),
        (["project"], 2),
        (["project", "stop", "nothing"], 3),
        (["bench", "no-such-benchmark"], 2),
        (["ls", "--node", "https://example.net"], 2),
        (["ls", "--node", "unix:///nowhere/control.sock"], 7),
        (["ls", "--node", "teapot"], 2),
        (["no-such-command"], 2),
        (["ls", "--no-such-flag"], 2),
        (["ls", "too", "many"], 2),
    ],
)  # fmt: skip
def test_bad_input_is_refused_on_one_line(
    run: Run,
    same_store: Path,
    hello: Path,
    arguments: list[str],
    status: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each wrong request has its exit status and one line of complaint, and changes nothing."""
    monkeypatch.setenv("SPACE_DATA", str(same_store))
    before = run("digest").out
    outcome = run(*[str(hello) if each == "FILE" else each for each in arguments])
    assert outcome.status == status, outcome.err
    assert outcome.out == ""
    assert len(outcome.complaint()) < 70_000
    assert run("digest").out == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["ls"],
        ["get", "/x"],
        ["stat", "/x"],
        ["rm", "/x"],
        ["digest"],
        ["log"],
        ["verify"],
        ["replay"],
        ["gc"],
        ["undelete"],
    ],
)
def test_reading_makes_no_store(run: Run, data: Path, arguments: list[str]) -> None:
    """Where there is no store, commands that only look or change say so and make none."""
    assert run(*arguments).status == 3
    assert not (data / "wal").exists()


def test_a_missing_source_makes_no_store(run: Run, data: Path) -> None:
    """A put or import that cannot begin leaves no directory behind."""
    assert run("put", "/nowhere").status == 3
    assert run("import", "/nowhere").status == 3
    assert not data.exists()


def test_names_no_argument_can_carry(data: Path) -> None:
    """NUL in a name, which only a program can send, is refused like any other bad name."""
    with space.open(data) as store:
        service = Service(store, Caller())
        for call in (service.mkdir, service.ls, service.get):
            arguments: dict[str, Any] = (
                {"capsule": "/a\0b", "descriptor": 1} if call == service.get else {"path": "/a\0b"}
            )
            with pytest.raises((space.UsageError, space.NotFoundError)):
                list(call(**arguments))


def test_a_damaged_store_is_told(run: Run, data: Path, tmp_path: Path) -> None:
    """A flipped payload byte makes get and verify end with 6, naming segment, offset and position."""
    content = os.urandom(8192)
    source = tmp_path / "random"
    source.write_bytes(content)
    run("put", source, "--name", "/r")
    (segment,) = [path for path in (data / "wal").iterdir() if content[:64] in path.read_bytes()]
    raw = bytearray(segment.read_bytes())
    raw[raw.index(content[:64])] ^= 1
    segment.write_bytes(raw)
    assert run("get", "/r", "-o", tmp_path / "out").status == 6
    assert not (tmp_path / "out").exists()
    report = run("verify", "--json")
    assert report.status == 6
    assert segment.name in report.complaint()
    (finding,) = report.json["findings"]
    assert keys(finding) == {"segment", "offset", "position", "what"}
    assert finding["segment"] == segment.name


def test_a_store_in_use_is_told(run: Run, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While another keeps the directory and does not answer, a command waits a little and ends with 7."""
    monkeypatch.setattr(cli_session, "IN_USE_SECONDS", 0.05)
    with space.open(data):
        outcome = run("ls")
    assert outcome.status == 7
    assert f"in use by process {os.getpid()}" in outcome.complaint()
    assert run("ls").status == 0


def test_defects_are_one_line_too(run: Run, stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What should not happen is one line and status 1; with --debug it is a traceback."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("sky\nfell")

    monkeypatch.setattr(Service, "digest", broken)
    outcome = run("digest")
    assert outcome.status == 1
    assert "RuntimeError: sky\\nfell" in outcome.complaint()
    with pytest.raises(RuntimeError):
        run("digest", "--debug")


def test_errors_with_debug_show_where(run: Run, data: Path) -> None:
    """With --debug an error keeps its traceback."""
    with pytest.raises(space.NotFoundError):
        run("--debug", "ls")


def test_an_interrupt_is_quiet(run: Run, stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends a command with 130 and no words."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Service, "digest", interrupted)
    assert run("digest") == Outcome(130, "", "")


# --- global options --------------------------------------------------------------------------------


def test_global_options_stand_anywhere(run: Run, stored: str, tmp_path: Path) -> None:
    """--data and --json mean the same before, inside and after a command."""
    other = str(tmp_path / "other")
    assert run("mkdir", "/there", "--data", other).status == 0
    for arguments in (
        ["--json", "--data", other, "ls"],
        ["ls", f"--data={other}", "--json"],
        ["ls", "--json", "/", "--data", other],
    ):
        assert [each["name"] for each in run(*arguments).json] == ["there"]


def test_what_follows_two_dashes_is_a_name(run: Run, stored: str) -> None:
    """After -- nothing is an option."""
    assert run("ls", "--", "--json").complaint().startswith("space: neither an id nor a path: '--json'")


def test_data_on_the_command_line_outranks_a_node(
    run: Run, stored: str, monkeypatch: pytest.MonkeyPatch, data: Path
) -> None:
    """SPACE_NODE is asked, unless the command names a directory."""
    monkeypatch.setenv("SPACE_NODE", "unix:///nowhere/control.sock")
    assert run("ls").status == 7
    assert run("ls", "--data", data).status == 0


def test_the_default_directory_follows_xdg(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hello: Path
) -> None:
    """Without --data and SPACE_DATA the store is in the user's data directory."""
    monkeypatch.delenv("SPACE_DATA")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    assert run("put", hello, "--name", "/x").status == 0
    assert (tmp_path / "xdg" / "space" / "wal").is_dir()


def test_help_and_version(run: Run) -> None:
    """Help and version go to stdout with status 0; no arguments at all show the help with status 2."""
    assert "Commands:" in run("--help").out
    assert "Usage: space put" in run("put", "-h").out
    assert run("--version").out.startswith("space ")
    bare = run()
    assert (bare.status, bare.out) == (2, "")
    assert "Commands:" in bare.err


def test_names_cannot_break_lines(run: Run, hello: Path) -> None:
    """Control characters in names are shown as escapes to people and exactly to programs."""
    run("put", hello, "--name", "/two\nlines\x1b[2J")
    assert "two\\nlines\\x1b[2J" in run("ls").out
    assert run("ls", "--json").json[0]["name"] == "two\nlines\x1b[2J"


# --- progress, views, doctor ----------------------------------------------------------------------


def test_progress_is_shown_on_a_terminal_only(run: Run, hello: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal a long put shows a line and takes it away again; elsewhere nothing is written."""
    monkeypatch.setattr(cli_session, "PROGRESS_AFTER_SECONDS", 0.0)
    assert run("put", hello).err == ""
    monkeypatch.setattr(cli_session, "is_terminal", lambda: True)
    shown = run("put", hello).err
    assert "5 B (" in shown
    assert shown.endswith("\r\x1b[K")


@pytest.mark.parametrize(
    "done, text",
    [
        ({"bytes": 2048}, "2 KiB (1 KiB/s)"),
        ({"files": 3, "bytes": 0}, "3 files, 0 B (0 B/s)"),
        ({"events": 1000, "position": 5, "last": 10}, "50 %, 1000 events (500/s)"),
    ],
)
def test_progress_says_how_far_and_how_fast(done: dict[str, int], text: str) -> None:
    """Each kind of progress has its words."""
    assert cli_session.progress_text(done, 2.0) == text


def test_no_views_is_an_empty_list(run: Run, data: Path) -> None:
    """Where nothing is served, project ls prints an empty list."""
    assert run("project", "ls", "--json").json == []


def test_views_of_killed_processes_are_dead(run: Run, data: Path) -> None:
    """A note whose process is gone is shown as dead and can be ended; damaged notes are passed over."""
    note = {
        "view": "fuse", "name": "fuse-1", "source": "/", "at": None, "read_only": False, "target": "/nowhere",
        "address": "/nowhere", "pid": os.getpid(), "process_start": 1, "started_ns": 5,
    }  # fmt: skip
    (data / views.VIEWS).mkdir(parents=True)
    (data / views.VIEWS / "fuse-1.json").write_text(json.dumps(note))
    for number, text in enumerate(
        ["", "{", "[]", "{}", '{"target": 5}', "\0" * 10, json.dumps({**note, "pid": -1})]
    ):
        (data / views.VIEWS / f"damaged-{number}.json").write_text(text)
    (listed,) = run("project", "ls", "--json").json
    assert listed == {**note, "state": "dead"}
    assert run("project", "stop", "fuse-1").status == 0
    assert run("project", "ls", "--json").json == []


def test_doctor_looks_at_everything(run: Run, data: Path) -> None:
    """Doctor reports each check with a value and finds what a store needs on this machine."""
    checks = run("doctor", "--json")
    assert checks.status == 0
    assert {"python", "kernel", "lmdb", "blake3", "data", "fdatasync", "hole punching", "open files", "/dev/fuse",
            "fusermount3", "pyfuse3"} <= {check["name"] for check in checks.json}  # fmt: skip
    for check in checks.json:
        assert keys(check) == {"name", "ok", "value", "needed", "hint"}
    assert not data.exists()


def test_doctor_fails_when_something_needed_is_missing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that is not there makes doctor end with 1 and say how to get it."""
    monkeypatch.setattr(doctor, "LIBRARIES", ("attrs", "no-such-library"))
    outcome = run("doctor")
    assert outcome.status == 1
    assert "no-such-library" in outcome.complaint()
    assert "pip install no-such-library" in outcome.out


def test_every_command_is_documented() -> None:
    """The page about the command line names every command there is."""
    page = (ROOT / "docs" / "cli.md").read_text()
    for prefix, application in (
        ("", cli.app),
        ("policy ", cli.policy_app),
        ("project ", cli_project.project_app),
        ("cluster ", cli_cluster.cluster_app),
    ):
        for each in application.registered_commands:
            assert each.callback is not None
            assert f"`{prefix}{each.name or each.callback.__name__}" in page

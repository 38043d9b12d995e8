"""Several processes and one store: who gets it, who asks whom, and how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import space
from space import control
from tests.cli_support import command, environment, execute, finish, start

KEEPER = "import space, sys; store = space.open(sys.argv[1]); print('open', flush=True); sys.stdin.read()"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A store with one file in it that nobody has open."""
    path = tmp_path / "data"
    with space.open(path) as store:
        store.put(b"hello", name="/hello.txt")
    return path


@pytest.fixture
def follower(data: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that owns the store, follows its log and answers on its socket."""
    process = start(data, "log", "--follow", "--json")
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["kind"] == "StoreInitialised"
    yield process
    process.kill()
    finish(process)


def test_a_library_process_keeps_its_store(data: Path) -> None:
    """While a program has the store open and answers nobody, commands end with 7 naming it; then they work."""
    keeper = subprocess.Popen(
        [sys.executable, "-c", KEEPER, str(data)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(data),
    )  # fmt: skip
    with keeper:
        assert keeper.stdout is not None
        keeper.stdout.readline()
        outcome = execute(data, "ls")
        keeper.communicate()
    assert outcome.status == 7
    assert f"in use by process {keeper.pid}" in outcome.complaint()
    assert execute(data, "get", "/hello.txt").out == "hello"


def test_a_killed_owner_keeps_nothing(data: Path, follower: subprocess.Popen[str]) -> None:
    """After kill -9 of the process that answered, the next command opens the store itself."""
    follower.kill()
    follower.wait()
    assert (data / control.SOCKET).exists()
    assert execute(data, "get", "/hello.txt").out == "hello"


def test_commands_started_together_take_turns(data: Path) -> None:
    """Short commands that meet at one directory wait for each other and all succeed."""
    running = [start(data, "mkdir", f"/made-{number}") for number in range(4)]
    outcomes = [finish(each) for each in running]
    assert [each.status for each in outcomes] == [0] * 4, outcomes
    names = [each["name"] for each in json.loads(execute(data, "ls", "--json").out)]
    assert names == ["hello.txt", "made-0", "made-1", "made-2", "made-3"]


def test_commands_go_through_the_owner(data: Path, follower: subprocess.Popen[str], tmp_path: Path) -> None:
    """While one process owns the store, commands of all kinds work at once, and the owner sees every event."""
    source = tmp_path / "source"
    source.write_bytes(os.urandom(2 << 20))
    running = [start(data, "put", source, "--name", f"/in/{number}", "--json") for number in range(6)]
    made = {json.loads(finish(each).out)["id"] for each in running}
    assert len(made) == 6
    assert execute(data, "get", "/in/3", "-o", tmp_path / "out").status == 0
    assert (tmp_path / "out").read_bytes() == source.read_bytes()
    assert execute(data, "get", "/nothing").status == 3
    assert execute(data, "put", source, "--name", "/in/3").status == 4
    assert execute(data, "import", tmp_path / "data" / "wal", "/wal").status == 0
    assert execute(data, "verify").status == 0
    node = f"unix://{data / control.SOCKET}"
    elsewhere = execute(tmp_path / "elsewhere", "digest", "--node", node)
    assert elsewhere.out == execute(data, "digest").out
    assert not (tmp_path / "elsewhere").exists()
    execute(data, "mkdir", "/last")
    assert follower.stdout is not None
    seen = set()
    for line in follower.stdout:
        event = json.loads(line)
        seen.add(event["capsule"])
        if event["kind"] == "NameLinked" and event["detail"]["name"] == "last":
            break
    assert made <= seen


def test_a_second_follower_follows_the_first(data: Path, follower: subprocess.Popen[str]) -> None:
    """Several processes follow one log; when its owner is told to end, all of them end."""
    second = start(data, "log", "--follow", "--from", "2")
    assert second.stdout is not None
    assert "CapsuleCreated" in second.stdout.readline()
    execute(data, "mkdir", "/seen")
    while "name=seen" not in second.stdout.readline():
        pass
    follower.terminate()
    assert follower.wait() == 128 + signal.SIGTERM
    outcome = finish(second)
    assert outcome.status == 7
    assert "has ended" in outcome.complaint()


@pytest.mark.parametrize("owned", [False, True])
def test_nobody_reads_on(data: Path, owned: bool, request: pytest.FixtureRequest) -> None:
    """A reader that has seen enough ends a command without a word."""
    if owned:
        request.getfixturevalue("follower")
    script = f"{sys.executable} -m space.cli log --json | head -n 1"
    done = subprocess.run(
        ["sh", "-c", script], capture_output=True, text=True, env=environment(data), check=True
    )
    assert json.loads(done.stdout)["kind"] == "StoreInitialised"
    assert done.stderr == ""


@pytest.mark.parametrize("owned", [False, True])
def test_a_full_disk_for_output(data: Path, owned: bool, request: pytest.FixtureRequest) -> None:
    """Output that cannot be written is an error, not a traceback, wherever the store is open."""
    if owned:
        request.getfixturevalue("follower")
    for arguments in (["get", "/hello.txt"], ["ls"], ["log", "--json"]):
        with Path("/dev/full").open("w") as full:
            outcome = execute(data, *arguments, stdout=full)
        assert outcome.status == 1
        assert "No space left on device" in outcome.err
        assert "Traceback" not in outcome.err


def test_a_command_ends_without_a_look_for_garbage(data: Path) -> None:
    """What a command leaves ends with its process: the interpreter does not go through it once more."""
    frozen = "atexit.register(lambda: print(gc.get_freeze_count() > 0))"
    program = f"import atexit, gc; from space.cli import main; {frozen}; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "stat", "/hello.txt"],
        env=environment(data), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "True"


def test_closed_standard_streams(data: Path) -> None:
    """With its standard streams closed a command works, and no file of the store takes their place."""
    script = f"{sys.executable} -m space.cli {{}} <&- >&- 2>&-"
    for arguments, status in (("mkdir /made", 0), ("put - --name /empty", 0), ("ls", 0), ("ls /nothing", 3)):
        done = subprocess.run(["sh", "-c", script.format(arguments)], env=environment(data), check=False)
        assert done.returncode == status
    assert [each["name"] for each in json.loads(execute(data, "ls", "--json").out)] == [
        "empty",
        "hello.txt",
        "made",
    ]
    assert execute(data, "verify").status == 0


@pytest.mark.parametrize("owned", [False, True])
def test_standard_input_is_stored(data: Path, owned: bool, request: pytest.FixtureRequest) -> None:
    """What a pipe brings is stored to its last byte, wherever the store is open."""
    if owned:
        request.getfixturevalue("follower")
    content = os.urandom(3_000_000)
    done = subprocess.run(
        command("put", "-", "--name", "/piped"),
        input=content,
        capture_output=True,
        env=environment(data),
        check=True,
    )
    assert done.stderr == b""
    got = subprocess.run(command("get", "/piped"), capture_output=True, env=environment(data), check=True)
    assert got.stdout == content


@pytest.mark.parametrize("owned", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_put_names_nothing(
    data: Path, owned: bool, number: signal.Signals, request: pytest.FixtureRequest
) -> None:
    """A put that is told to end while its source is still open says nothing and leaves no name."""
    if owned:
        request.getfixturevalue("follower")
    reader, writer = os.pipe()
    process = start(data, "put", "-", "--name", "/half", stdin=reader)
    os.close(reader)
    feeding = threading.Thread(target=_feed, args=(writer,))
    feeding.start()
    feeding.join()
    process.send_signal(number)
    outcome = finish(process)
    os.close(writer)
    assert (outcome.status, outcome.out, outcome.err) == (128 + number, "", "")
    assert execute(data, "stat", "/half").status == 3


def _feed(writer: int) -> None:
    """More than a pipe holds: when it is written, somebody has begun to read."""
    os.write(writer, bytes(1 << 20))

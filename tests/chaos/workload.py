"""Clients that use a cluster through all its nodes, remember what they were promised, and check it afterwards.

Each worker owns a directory and draws operations in it from its seed; what the directory must hold is a model in
memory.  Two kinds of operations, told apart by what a lost answer means:

* *signed* ones carry the worker's client id and a sequence, and are tried on one node after the other until there is an
  outcome: so each has one, is in the log once, and the model is exact;
* a *put* through :meth:`space._node.service.Service.put` is many commands under ids of the node's own.  Without an
  answer its outcome is unknown: afterwards its name is absent, or leads to all of its bytes.

In ``/shared`` workers race: for *claims* (one name, created by one of them at most) and on *registers* (one
attribute, written and read by all), whose history goes to the checker of linearizability.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Self

import attrs
from blake3 import blake3

from space._errors import SpaceError, StorageError, UnavailableError, error_of
from space.events import commands as cmd
from space.events.command_codec import encode_requests
from space.events.commands import Request
from space.events.ids import CapsuleId
from space.events.types import Kind
from tests.chaos.linearizability import Model, Operation, Verdict, check
from tests.chaos.processes import HANG_SECONDS, Cluster, eventually, report

SHARED: Final = "shared"
EXTENT: Final = 1 << 20
PUT_SIZES: Final = (1, 100, 4096, 65_537, 300_000, 1 << 20, 4 << 20)
PUT_WEIGHTS: Final = (6, 6, 6, 4, 3, 2, 1)
FILES_MAX: Final = 24
"""Files of one worker: more than that and it removes some, so that a run is bounded by its time, not its bytes."""

REGISTER_CALLS: Final = 60
"""Calls after which the next register is used: the checker's work grows with the length of one history."""

RETRY_SECONDS: Final = 0.02
SUSPECTED_SECONDS: Final = 5.0


@attrs.define
class File:
    """What a file of a worker must be."""

    id: bytes
    data: bytearray
    xattrs: dict[str, str] = attrs.field(factory=dict)


@attrs.define
class Counts:
    """What happened, for the report."""

    acknowledged: Counter[str] = attrs.field(factory=Counter)
    refused: Counter[str] = attrs.field(factory=Counter)
    unknown: Counter[str] = attrs.field(factory=Counter)
    repeated: int = 0
    retries: int = 0


class GaveUpError(Exception):
    """The cluster did not go on although it should."""


class Worker(threading.Thread):
    """One client.  ``stop`` lets it finish the operation it is at."""

    def __init__(self, load: Workload, number: int, seed: str) -> None:
        super().__init__(name=f"worker-{number}", daemon=True)
        self.load = load
        self.number = number
        self.home = f"w{number}"
        self.home_id = b""
        self.rng = random.Random(seed)
        self.client = self.rng.randbytes(16)
        self.sequence = 0
        self.files: dict[str, File] = {}
        self.directories: dict[str, bytes] = {}
        self.maybe: dict[str, bytes] = {}
        self.snapshots: dict[str, tuple[bytes, bytes]] = {}
        self.signed: dict[tuple[bytes, int], int] = {}
        """(client, sequence) → position, of what was acknowledged."""
        self.tried: set[tuple[bytes, int]] = set()
        self.claims: dict[str, bytes] = {}
        self.counts = Counts()
        self.last_acknowledged = 0.0
        self.failure: BaseException | None = None
        self._stop_wanted = threading.Event()
        self._names = itertools.count()
        self._suspected: dict[int, float] = {}
        self._asked = 0

    # --- asking ----------------------------------------------------------------------------------

    def client_of_any(self) -> Any:
        """Some node, drawn anew for every attempt; rarely one that did not answer a moment ago."""
        nodes = sorted(self.load.cluster.nodes)
        trusted = [node for node in nodes if self._suspected.get(node, 0.0) < time.monotonic()]
        self._asked = self.rng.choice(trusted or nodes)
        return self.load.cluster.client(self._asked)

    def suspect(self) -> None:
        """The node asked last gave no answer."""
        self._suspected[self._asked] = time.monotonic() + SUSPECTED_SECONDS

    def insist(self, ask: Callable[[Any], Any]) -> Any:
        """Asks one node after the other until one answers; errors that are an answer are raised."""
        deadline = time.monotonic() + HANG_SECONDS + self.load.patience
        while True:
            try:
                return ask(self.client_of_any())
            except (UnavailableError, StorageError) as error:
                last: SpaceError = error
            self.suspect()
            self.counts.retries += 1
            if time.monotonic() > deadline or self.load.failed:
                raise GaveUpError(f"{self.name}: no node answers: {last}")
            time.sleep(RETRY_SECONDS + self.rng.random() * RETRY_SECONDS)

    def sign(self, count: int = 1) -> tuple[bytes, int]:
        """A client id and the first of ``count`` sequences."""
        first = self.sequence + 1
        self.sequence += count
        self.tried |= {(self.client, first + n) for n in range(count)}
        return self.client, first

    def signed_call(
        self, what: str, ask: Callable[[Any], Any], client: bytes, first: int
    ) -> SpaceError | None:
        """A signed operation: None if it was done, else why it was refused."""
        tries = 0

        def attempt(service: Any) -> list[Any]:
            nonlocal tries
            tries += 1
            outcomes: list[Any] = ask(service)["outcomes"]
            for each in outcomes:
                if isinstance(each, dict):
                    error = error_of(each)
                    if isinstance(error, UnavailableError | StorageError):
                        raise error
            return outcomes

        outcomes = self.insist(attempt)
        if tries > 1:
            # An attempt that nobody waits for may be decided later: the reply to it is kept for a number of
            # commands, not for ever, so the id it came with is not used for many more.
            self.client, self.sequence = self.rng.randbytes(16), 0
        for n, each in enumerate(outcomes):
            if isinstance(each, dict):
                self.counts.refused[what] += 1
                return error_of(each)
            self.signed[client, first + n] = each[0]
            self.counts.repeated += bool(each[1])
        self.acknowledge(what)
        return None

    def acknowledge(self, what: str) -> None:
        """Counts."""
        self.counts.acknowledged[what] += 1
        self.last_acknowledged = time.monotonic()

    def command(self, what: str, command: cmd.Command) -> SpaceError | None:
        """One signed command."""
        client, sequence = self.sign()
        requests, _ = encode_requests([Request(command, "chaos", client, sequence)])
        return self.signed_call(
            what, lambda service: service.probe_execute(requests=requests), client, sequence
        )

    def must(self, what: str, command: cmd.Command) -> None:
        """One signed command that nothing can be wrong with."""
        refused = self.command(what, command)
        if refused is not None:
            raise AssertionError(f"{self.name}: {what} was refused: {refused!r}; {command!r:.200}")

    def fresh(self) -> CapsuleId:
        """An id for a new capsule."""
        return CapsuleId(self.rng.randbytes(16))

    # --- operations ------------------------------------------------------------------------------

    def begin(self) -> None:
        """Makes the worker's directory."""
        self.home_id = self.fresh()
        self.must("mkdir", _directory(self.home_id, self.load.root, self.home))
        self.directories[self.home] = self.home_id

    def parent(self) -> tuple[str, bytes]:
        """A directory of its own."""
        path = self.rng.choice(sorted(self.directories))
        return path, self.directories[path]

    def new_name(self, prefix: str) -> str:
        """A name never used before."""
        return f"{prefix}{next(self._names)}"

    def put(self) -> None:
        """Stores a file through the operation users have."""
        size = self.rng.choices(PUT_SIZES, PUT_WEIGHTS)[0]
        data = (
            self.rng.randbytes(size) if self.rng.random() < 0.7 else bytes([self.rng.randrange(256)]) * size
        )
        path = f"{self.home}/{self.new_name('p')}"
        self.maybe[path] = data
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.seek(0)
            try:
                done = self.client_of_any().put(descriptor=file.fileno(), name=f"/{path}")
            except (UnavailableError, StorageError):
                self.suspect()
                self.counts.unknown["put"] += 1
                return
        del self.maybe[path]
        assert done["size"] == size
        assert done["digest"] == f"blake3:{blake3(data).hexdigest()}"
        self.files[path] = File(CapsuleId.parse(done["id"]), bytearray(data))
        self.acknowledge("put")

    def create(self) -> None:
        """An empty file, signed."""
        directory, parent = self.parent()
        path, fresh = f"{directory}/{self.new_name('c')}", self.fresh()
        self.must("create", cmd.CreateCapsule(fresh, parent=parent, name=_last(path)))
        self.files[path] = File(fresh, bytearray())

    def write(self) -> None:
        """Overwrites in the middle, or appends."""
        path = self.rng.choice(sorted(self.files))
        file = self.files[path]
        size = self.rng.choice((1, 50, 5000, 70_000, EXTENT, EXTENT + 10))
        offset = len(file.data) if self.rng.random() < 0.5 else self.rng.randint(0, len(file.data))
        data = self.rng.randbytes(size)
        client, first = self.sign((size + EXTENT - 1) // EXTENT)
        with tempfile.TemporaryFile() as source:

            def ask(service: Any) -> Any:
                return service.probe_write(
                    descriptor=source.fileno(),
                    capsule=str(CapsuleId(file.id)),
                    offset=offset,
                    client=client,
                    sequence=first,
                )

            source.write(data)
            source.flush()
            refused = self.signed_call("write", ask, client, first)
        if refused is not None:
            raise AssertionError(f"{self.name}: a write was refused: {refused!r}")
        file.data[offset : offset + size] = data

    def resize(self) -> None:
        """Cuts off or adds zeros."""
        file = self.files[self.rng.choice(sorted(self.files))]
        size = self.rng.randint(0, len(file.data) + 10_000)
        self.must("resize", cmd.Resize(file.id, size))
        file.data = file.data[:size].ljust(size, b"\0")

    def mkdir(self) -> None:
        """A directory below one of its own."""
        directory, parent = self.parent()
        path, fresh = f"{directory}/{self.new_name('d')}", self.fresh()
        self.must("mkdir", _directory(fresh, parent, path.rpartition("/")[2]))
        self.directories[path] = fresh

    def rename(self) -> None:
        """A file to a new name, sometimes over another one."""
        source = self.rng.choice(sorted(self.files))
        directory, parent = self.parent()
        over = [path for path in self.files if path.rpartition("/")[0] == directory and path != source]
        target = (
            self.rng.choice(sorted(over))
            if over and self.rng.random() < 0.3
            else f"{directory}/{self.new_name('r')}"
        )
        at = self.directories[source.rpartition("/")[0]]
        self.must("rename", cmd.Rename(at, _last(source), parent, _last(target)))
        self.files[target] = self.files.pop(source)

    def unlink(self) -> None:
        """Removes a file."""
        path = self.rng.choice(sorted(self.files))
        self.must("unlink", cmd.Unlink(self.directories[path.rpartition("/")[0]], _last(path)))
        del self.files[path]

    def rmtree(self) -> None:
        """Removes a directory with all that is in it."""
        found = [path for path in self.directories if path != self.home]
        if not found:
            return
        path = self.rng.choice(sorted(found))
        directory, _, name = path.rpartition("/")
        command = cmd.Unlink(self.directories[directory], name.encode(), directory=True, recursive=True)
        self.must("rmtree", command)
        for kept in (self.files, self.directories):
            for each in [each for each in kept if (each + "/").startswith(path + "/")]:
                del kept[each]

    def xattr(self) -> None:
        """Sets an attribute."""
        file = self.files[self.rng.choice(sorted(self.files))]
        name, value = f"user.{self.rng.randrange(4)}", self.new_name("v")
        self.must("xattr", cmd.SetXattr(file.id, name.encode(), value.encode()))
        file.xattrs[name] = value

    def snapshot(self) -> None:
        """Names the moment of a file."""
        if len(self.snapshots) >= 6:
            return
        file = self.files[self.rng.choice(sorted(self.files))]
        name = f"{self.home}-{self.new_name('s')}"
        self.must("snapshot", cmd.TakeSnapshot(file.id, name))
        self.snapshots[name] = (file.id, bytes(file.data))

    def read_back(self) -> None:
        """What it was promised is there at once, on whatever node it asks."""
        path = self.rng.choice(sorted(self.files))
        file = self.files[path]
        data = b""

        def ask(service: Any) -> Any:
            nonlocal data
            # one for each: a node that was given up may still be writing
            with tempfile.TemporaryFile() as target:
                answer = service.get(capsule=f"/{path}", descriptor=target.fileno(), replace=True)
                target.seek(0)
                data = target.read()
            return answer

        self.insist(ask)
        assert data == bytes(file.data), (
            f"{self.name}: {path} has {len(data)} other bytes than {len(file.data)}"
        )
        self.acknowledge("read")

    def claim(self) -> None:
        """Races for a name."""
        name, fresh = f"claim{next(self.load.claim_numbers) // 3}", self.fresh()
        command = cmd.CreateCapsule(fresh, parent=self.load.shared, name=name.encode())
        refused = self.command("claim", command)
        if refused is None:
            self.claims[name] = fresh

    def register(self) -> None:
        """Writes or reads what all workers write and read."""
        key, register = self.load.register()
        start = self.load.tick()
        if self.rng.random() < 0.5:
            value = f"{self.number}.{self.new_name('')}"
            self.must("set", cmd.SetXattr(register, key.encode(), value.encode()))
            done = Operation(key, ("set", value), None, start, self.load.tick())
        else:
            try:
                found = self.client_of_any().stat(capsule=str(register))["xattrs"].get(key)
            except (UnavailableError, StorageError):
                self.suspect()
                return
            done = Operation(key, ("get",), found, start, self.load.tick())
            self.acknowledge("look")
        self.load.history.append(done)

    def run(self) -> None:
        """Works until it is stopped."""
        try:
            if not self.home_id:
                self.begin()
            while not self._stop_wanted.is_set():
                self.step()
        except BaseException as error:  # noqa: BLE001 - raised in the test's thread
            self.failure = error

    def step(self) -> None:
        """One operation."""
        free = [self.put, self.put, self.create, self.mkdir, self.claim, self.register, self.register]
        if self.files:
            free += [self.write, self.write, self.write, self.resize, self.rename, self.xattr, self.read_back]
            free += [self.unlink, self.snapshot]
        if self.rng.random() < 0.02:
            free = [self.rmtree]
        if len(self.files) > FILES_MAX:
            free = [self.unlink]
        self.rng.choice(free)()

    def end(self, *, quietly: bool) -> None:
        """Lets it finish what it is at, and raises what went wrong, unless the test has failed already."""
        self._stop_wanted.set()
        self.join(HANG_SECONDS * 2)
        assert not self.is_alive(), f"{self.name} hangs"
        if self.failure is not None and not quietly:
            raise self.failure


def _directory(capsule: bytes, parent: bytes, name: str) -> cmd.CreateCapsule:
    return cmd.CreateCapsule(capsule, Kind.DIRECTORY, 0o755, parent=parent, name=name.encode())


def _last(path: str) -> bytes:
    return path.rpartition("/")[2].encode()


def _step_register(state: str | None, call: tuple[str, ...]) -> tuple[str | None, str | None]:
    return (None, call[1]) if call[0] == "set" else (state, state)


class Workload:
    """Workers on one cluster, from a seed; and the check of all they were promised."""

    def __init__(self, cluster: Cluster, *, workers: int = 3, seed: str = "1", patience: float = 0.0) -> None:
        """``patience`` is how much longer than usual the cluster may stand still, seconds."""
        self.cluster = cluster
        self.patience = patience
        self.root = CapsuleId(bytes(15) + b"\1")
        self.history: list[Operation] = []
        self.claim_numbers = itertools.count()
        self._ticks = itertools.count()
        self._register_calls = itertools.count()
        self.workers = [Worker(self, number, f"{seed}.{number}") for number in range(workers)]
        first = self.workers[0]
        self.shared, self._register = first.fresh(), first.fresh()
        first.must("mkdir", _directory(self.shared, self.root, SHARED))
        first.must("create", cmd.CreateCapsule(self._register, parent=self.shared, name=b"register"))
        self._samples: dict[int, str] = {}
        self._sampling = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self.disagreement = ""
        self.failed = False
        self.expect_disagreement = False
        """Set by a test that makes digests differ: then they are not compared while the load runs."""

    def tick(self) -> int:
        """A number that grows."""
        return next(self._ticks)

    def register(self) -> tuple[str, CapsuleId]:
        """The register of now: an attribute of one file."""
        return f"user.r{next(self._register_calls) // REGISTER_CALLS}", self._register

    def __enter__(self) -> Self:
        for worker in self.workers:
            worker.start()
        self._sampler.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.failed = error[0] is not None
        for worker in self.workers:
            worker._stop_wanted.set()
        self._sampling.set()
        self._sampler.join()
        for worker in self.workers:
            worker.end(quietly=self.failed)

    def _sample(self) -> None:
        """Digests at equal positions are equal, all the time."""
        while not self._sampling.wait(0.1):
            for node in list(self.cluster.nodes):
                try:
                    state = self.cluster.here(node, 1.0)
                except UnavailableError:
                    continue
                known = self._samples.setdefault(state["position"], state["digest"])
                if known != state["digest"] and not self.expect_disagreement:
                    self.disagreement = f"node {node} at {state['position']}: {state['digest']}, not {known}"

    # --- while it runs -----------------------------------------------------------------------------

    @property
    def acknowledged(self) -> int:
        """Mutations acknowledged until now."""
        return sum(
            count
            for worker in self.workers
            for what, count in worker.counts.acknowledged.items()
            if what not in {"read", "look"}
        )

    def progress(self, count: int = 20) -> None:
        """Waits until that many more mutations are acknowledged."""
        goal = self.acknowledged + count

        def enough() -> bool:
            for worker in self.workers:
                if worker.failure is not None:
                    raise worker.failure
            self.cluster.check_alive()
            return self.acknowledged >= goal

        eventually(f"{count} more acknowledgements", enough, HANG_SECONDS + self.patience)

    @contextlib.contextmanager
    def tolerating(self, node: int) -> Iterator[None]:
        """Within the block, that node may end by itself."""
        process = self.cluster.nodes[node]
        process.ended = True
        try:
            yield
        finally:
            process.ended = False

    # --- afterwards ----------------------------------------------------------------------------------

    def check(self, *, nodes: Sequence[int] | None = None) -> str:
        """Everything that was promised holds on every node; a line about the run."""
        assert not self.disagreement, self.disagreement
        state = self.cluster.settle()
        chosen = list(self.cluster.nodes) if nodes is None else list(nodes)
        audits = [self._audit(node) for node in chosen]
        for position in set.intersection(*(set(audit) for audit in audits)):
            assert len({audit[position] for audit in audits}) == 1, f"logs differ at {position}"
        for node in chosen:
            self._check_inventory(node)
            report_ = self.cluster.client(node, HANG_SECONDS).verify()
            assert report_["findings"] == [], f"node {node}: {report_['findings']}"
        self._check_snapshots(chosen[-1])
        outcome = check(self.history, Model(None, _step_register))
        assert outcome.verdict is not Verdict.VIOLATION, outcome
        return self._summary(state, len(outcome.unknown))

    def _audit(self, node: int) -> dict[int, tuple[bytes, int]]:
        """A node's log: each signed command that was acknowledged is in it once, the others at most once."""
        found: dict[tuple[bytes, int], int] = {}
        links: dict[int, tuple[bytes, int]] = {}
        for batch in self.cluster.client(node, HANG_SECONDS).probe_audit():
            links[batch["position"]] = batch["chain"], batch["term"]
            for client, sequence in batch["commands"]:
                assert (client, sequence) not in found, f"applied twice: {client.hex()} {sequence}"
                found[client, sequence] = batch["position"]
        for worker in self.workers:
            for key, position in worker.signed.items():
                assert found.get(key) == position, (
                    f"node {node}: acknowledged {key} at {position}: {found.get(key)}"
                )
        return links

    def _check_inventory(self, node: int) -> None:
        entries = {each["path"]: each for each in self.cluster.client(node, HANG_SECONDS).probe_inventory()}
        for worker in self.workers:
            below = {path for path in entries if path == worker.home or path.startswith(worker.home + "/")}
            for path, file in worker.files.items():
                _check_file(f"node {node}: {path}", entries.get(path), file)
            for path, capsule in worker.directories.items():
                assert entries[path]["id"] == str(CapsuleId(capsule)), f"node {node}: {path}"
            for path, data in worker.maybe.items():
                if path in entries:
                    assert entries[path]["digest"] == blake3(data).hexdigest(), (
                        f"node {node}: half a put: {path}"
                    )
            extra = below - set(worker.files) - set(worker.directories) - set(worker.maybe)
            assert not extra, f"node {node}: nobody made {sorted(extra)}"
        self._check_claims(node, entries)

    def _check_claims(self, node: int, entries: dict[str, Any]) -> None:
        won = Counter(name for worker in self.workers for name in worker.claims)
        assert all(count == 1 for count in won.values()), f"claimed by several: {won}"
        for worker in self.workers:
            for name, capsule in worker.claims.items():
                assert entries[f"{SHARED}/{name}"]["id"] == str(CapsuleId(capsule)), f"node {node}: {name}"
        found = {path for path in entries if path.startswith(f"{SHARED}/claim")}
        assert found == {f"{SHARED}/{name}" for name in won}, f"node {node}: claims nobody won"

    def _check_snapshots(self, node: int) -> None:
        """What a moment showed is still what it was; on one node, and a few of them: each is a rebuild."""
        service = self.cluster.client(node, HANG_SECONDS)
        named = {each["name"]: each["id"] for each in service.snapshots()}
        for worker in self.workers:
            for number, (name, (capsule, data)) in enumerate(worker.snapshots.items()):
                assert named[name] == str(CapsuleId(capsule))
                if number == 0:
                    with tempfile.TemporaryFile() as target:
                        service.get(capsule=named[name], descriptor=target.fileno(), at=name)
                        target.seek(0)
                        assert target.read() == data, f"node {node}: snapshot {name}"

    def _summary(self, state: dict[str, Any], unknown_registers: int) -> str:
        total = Counts()
        for worker in self.workers:
            total.acknowledged += worker.counts.acknowledged
            total.refused += worker.counts.refused
            total.unknown += worker.counts.unknown
            total.repeated += worker.counts.repeated
            total.retries += worker.counts.retries
        done = ", ".join(f"{count} {what}" for what, count in sorted(total.acknowledged.items()))
        return (
            f"position {state['position']}, digest {state['digest'][:16]}… on {len(self.cluster.nodes)} nodes; "
            f"acknowledged {done}; unknown {sum(total.unknown.values())}, refused {dict(total.refused)}; "
            f"{total.retries} retries, {total.repeated} answered from the reply cache; "
            f"{len(self.history)} register operations"
            + (f", {unknown_registers} registers undecided" if unknown_registers else "")
        )


def _check_file(where: str, entry: dict[str, Any] | None, file: File) -> None:
    assert entry is not None, f"{where} is missing"
    assert entry["id"] == str(CapsuleId(file.id)), f"{where} is another one"
    assert entry["size"] == len(file.data), f"{where} has {entry['size']} bytes, not {len(file.data)}"
    assert entry["digest"] == blake3(file.data).hexdigest(), f"{where} has other bytes"
    assert entry["xattrs"] == file.xattrs, f"{where}: {entry['xattrs']}"


def seed_of(what: str) -> str:
    """The seed of a run, printed: SPACE_SEED repeats its choices (not the machine's timing)."""
    seed = os.environ.get("SPACE_SEED", str(random.SystemRandom().getrandbits(32)))
    report(f"{what}: SPACE_SEED={seed}")
    return seed

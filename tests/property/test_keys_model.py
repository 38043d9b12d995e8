"""Any order of writing, cloning, changing the master key, destroying keys, and being killed, against a model."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import space
from space._errors import RefusedError
from space._node import keys
from space._node.keys_data import rekey
from space._node.keys_file import MasterFile
from space._node.store import Store
from space.content.keys import load_master_keys
from space.policy.model import Policy
from space.projections import content_map

SECRET = Policy.from_document({"encryption": "aes-256-gcm", "compression": "none"})
SHARED = Policy.from_document({"encryption": "aes-256-gcm", "dedupe": True, "compression": "none"})

DEPTH = 12
"""Steps of a change of keys after which a kill comes too late."""

STEPS = st.one_of(
    st.tuples(st.just("put"), st.booleans()),
    st.tuples(st.sampled_from(("clone", "write", "read past")), st.integers(0, 7)),
    st.tuples(st.sampled_from(("destroy", "renew")), st.integers(0, 7), st.integers(0, 2 * DEPTH)),
    st.tuples(st.just("rotate"), st.integers(0, 2 * DEPTH)),
    st.tuples(st.sampled_from(("close", "kill", "checkpoint", "replay"))),
)


class Killed(BaseException):
    """The process is gone."""


class Machine:
    """A store, what it must hold, and what must be gone."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._runs = 0
        self.store: Store = space.open(home / "0")
        self.content: dict[str, bytes] = {}
        self.moments: dict[str, int] = {}
        self.domain: dict[str, set[int]] = {}  # keys of what is there, by name
        self.then: dict[str, set[int]] = {}  # and at the moment that is remembered
        self.ever: dict[str, set[int]] = {}
        self.gone: set[int] = set()
        self.data_keys: dict[int, bytes] = {}
        self.masters: set[bytes] = set()

    def _named(self, number: int) -> str | None:
        names = sorted(self.content)
        return names[number % len(names)] if names else None

    def do(self, step: tuple[Any, ...]) -> None:
        """One step, and a look at everything."""
        verb, *arguments = step
        steps: dict[str, Callable[..., object]] = {
            "put": self.put,
            "clone": self.clone,
            "write": self.write,
            "read past": self.read_past,
            "destroy": self.destroy,
            "renew": self.renew,
            "rotate": self.rotate,
            "close": self.close,
            "kill": self.kill,
            "checkpoint": self.checkpoint,
            "replay": lambda: self.store.replay(verify=True),
        }
        steps[verb](*arguments)
        self.look()

    def put(self, shared: bool) -> None:
        name = f"/{len(self.content):02d}"
        content = f"secret of {name} ".encode() * 300
        self.store.put(content, name=name, policy=SHARED if shared else SECRET)
        key = self.store.stat(self.store.resolve(name)).key
        row = self.store._wrapped_key(key, 1)
        assert row is not None
        self.data_keys[key] = self.store._keyring.unwrap(key, 1, row)
        self.content[name] = content
        self.domain[name], self.ever[name] = {key}, {key}
        self._remember(name)
        self.masters.update(load_master_keys(self.store.master_file.path))

    def clone(self, number: int) -> None:
        if (source := self._named(number)) is not None:
            name = f"/{len(self.content):02d}"
            self.store.clone(source, name)
            self.content[name] = self.content[source]
            self.domain[name], self.ever[name] = set(self.domain[source]), set(self.ever[source])
            self._remember(name)

    def write(self, number: int) -> None:
        name = self._named(number)
        if name is not None and self.store.stat(self.store.resolve(name)).key not in self.gone:
            self.store.write(self.store.resolve(name), 3, b"OVERWRITTEN")
            self.content[name] = self.content[name][:3] + b"OVERWRITTEN" + self.content[name][14:]
            self._learn(name)
            self._remember(name)

    def _remember(self, name: str) -> None:
        self.moments[name], self.then[name] = self.store.position, set(self.domain[name])

    def _learn(self, name: str) -> None:
        """Which keys the content of a name is under by now."""
        with self.store._read() as txn:
            found = content_map.extents(txn, self.store.resolve(name), 0, content_map.OFFSET_MAX)
            self.domain[name] = set().union(*(keys.frame_keys(extent.frames) for extent in found))
        self.ever[name] |= self.domain[name] | {self.store.stat(self.store.resolve(name)).key}

    def renew(self, number: int, kill_at: int) -> None:
        name = self._named(number)
        if name is None or self.domain[name] & self.gone:
            return
        if self.store.stat(self.store.resolve(name)).key in self.gone:
            return
        with contextlib.suppress(Killed):
            self._dying(kill_at, lambda: rekey(self.store, self.store.resolve(name)))
        self._learn(name)

    def read_past(self, number: int) -> None:
        if (name := self._named(number)) is not None:
            with self.store.at(f"@{self.moments[name]}") as past:
                self._check(past, name, self.then[name])

    def rotate(self, kill_at: int) -> None:
        with contextlib.suppress(Killed):
            if self.content:
                self._dying(kill_at, lambda: keys.rotate([self.store], keys.Nobody()))

    def destroy(self, number: int, kill_at: int) -> None:
        name = self._named(number)
        if name is None:
            return
        found = [self.store.resolve(name)]

        def work() -> None:
            keys.destroy(self.store, [self.store], keys.Nobody(), found, with_clones=True)

        try:
            self._dying(kill_at, work)
        except Killed:
            self.gone.update(key for key in self.ever[name] if self.store._wrapped_key(key, 1) == b"")
            return
        self.gone |= self.ever[name]
        self.hunt()

    def _dying(self, kill_at: int, work: Any) -> None:
        """Does it, unless killed before or after one of its steps; then the next process begins."""
        left = [kill_at]

        def mortal(step: Any) -> Any:
            def wrapped(*arguments: Any, **options: Any) -> Any:
                left[0] -= 2
                if left[0] == -2:
                    raise Killed
                result = step(*arguments, **options)
                if left[0] == -1:
                    raise Killed
                return result

            return wrapped

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MasterFile, "replace", mortal(MasterFile.replace))
            patch.setattr(Store, "execute_all", mortal(Store.execute_all))
            try:
                work()
            except Killed:
                patch.undo()
                self.kill()
                raise
            finally:
                self.masters.update(load_master_keys(self.store.master_file.path))

    def checkpoint(self) -> None:
        self.store.checkpoint()

    def close(self) -> None:
        self.store.close()
        self.store = space.open(self.store.path)

    def kill(self) -> None:
        self._runs += 1
        target = self._home / str(self._runs)
        shutil.copytree(
            self.store.path, target
        )  # nothing is under way: these are the bytes a kill would leave
        if self.store.master_file.path.exists():
            self.masters.update(load_master_keys(self.store.master_file.path))
        self.store.close()
        shutil.rmtree(self.store.path)
        self.store = space.open(target)

    def look(self) -> None:
        """What is not destroyed is read, what is destroyed is refused."""
        for name in self.content:
            self._check(self.store, name, self.domain[name])

    def _check(self, reading: Any, name: str, under: set[int]) -> None:
        if under & self.gone:
            with pytest.raises(RefusedError, match="was destroyed"):
                reading.get(name)
        else:
            assert reading.get(name) == self.content[name]

    def hunt(self) -> None:
        """No file has a master key but the current one, and that opens no row a destroyed key ever had."""
        (current,) = load_master_keys(self.store.master_file.path)
        content = b"".join(path.read_bytes() for path in self.store.path.rglob("*") if path.is_file())
        hidden = [
            *(self.masters - {current}),
            *(self.data_keys[key] for key in self.gone & set(self.data_keys)),
        ]
        for each in hidden:
            assert each not in content
            assert each.hex().encode() not in content
        for key in self.gone:
            for at in _everywhere(content, key, self.store):
                assert self.store._keyring.wrapped_by(key, 1, at) == 0


def _everywhere(content: bytes, key: int, store: Store) -> list[bytes]:
    """Every row the log ever had for a key."""
    from space.events import types as ev
    from space.events.codec import decode_batch

    rows = []
    for record in store.wal.records(1, store.last + 1):
        for entry in decode_batch(record.metadata):
            for _, event in entry.events:
                if isinstance(event, ev.KeyCreated) and event.key == key:
                    rows.append(event.wrapped)
                elif isinstance(event, ev.KeysRewrapped):
                    rows += [row for number, _, row in ev.REWRAPPED.iter_unpack(event.rows) if number == key]
    assert rows
    assert all(row in content for row in rows)
    return rows


@settings(max_examples=15)
@given(st.lists(STEPS, min_size=3, max_size=14))
def test_readable_until_destroyed_and_never_again(steps: list[tuple[Any, ...]]) -> None:
    """Whatever happens in whatever order, content is read until its key is destroyed, and from then on by nobody."""
    with tempfile.TemporaryDirectory(prefix="space-keys-") as home:
        machine = Machine(Path(home))
        try:
            machine.do(("put", False))
            machine.do(("put", True))
            for step in steps:
                machine.do(step)
        finally:
            machine.store.close()

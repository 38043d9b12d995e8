"""decide and apply against a plain model of a POSIX tree, and every way to fold a history against every other."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Final

import attrs
from hypothesis import given
from hypothesis import strategies as st

from space._errors import SpaceError
from space._node.history import layout_of
from space.events import commands as cmd
from space.events.codec import encode_batch
from space.events.commands import Command, Receipt, Request
from space.events.ids import ROOT
from space.events.types import Kind
from space.projections.contract import builtin_views
from space.projections.feed import fold
from space.statemachine.apply import clone_id
from space.statemachine.sequencer import prepare
from space.statemachine.store import Applied, Store
from space.statemachine.tables import CAPSULE, ENTRY, TABLES, CapsuleRow, EntryRow, table_digest
from tests.property.strategies import IDS, NAMES
from tests.state_support import Batch, MemoryWriter, fold_state

MODULUS: Final = 1 << 256
ROOT_ID: Final = bytes(ROOT)


@attrs.define
class Node:
    """A capsule of the model."""

    kind: Kind
    size: int = 0
    xattrs: dict[bytes, bytes] = attrs.field(factory=dict)
    children: dict[bytes, bytes] = attrs.field(factory=dict)
    deleted: bool = False


class Tree:
    """A tree by the rules of POSIX, written from them alone; every method returns whether it was allowed."""

    def __init__(self) -> None:
        self.nodes = {ROOT_ID: Node(Kind.DIRECTORY)}

    def directory(self, capsule: bytes) -> Node | None:
        """The node if it is a directory that is not deleted itself."""
        node = self.nodes.get(capsule)
        return node if node and node.kind == Kind.DIRECTORY and not node.deleted else None

    def names(self, capsule: bytes) -> list[tuple[bytes, bytes]]:
        """Where a capsule is linked."""
        return [(p, n) for p, node in self.nodes.items() for n, c in node.children.items() if c == capsule]

    def inside(self, directory: bytes, ancestor: bytes) -> bool:
        """Whether a directory is another or below it."""
        below, todo = set(), [ancestor]
        while todo:
            at = todo.pop()
            below.add(at)
            todo += [c for c in self.nodes[at].children.values() if self.nodes[c].kind == Kind.DIRECTORY]
        return directory in below

    def create(self, command: cmd.CreateCapsule) -> bool:
        """A new capsule, named or not."""
        if command.capsule in self.nodes or (command.kind == Kind.DIRECTORY and not command.parent):
            return False
        if command.parent:
            parent = self.directory(command.parent)
            if parent is None or command.name in parent.children:
                return False
            parent.children[command.name] = command.capsule
        self.nodes[command.capsule] = Node(command.kind, command.size)
        return True

    def link(self, command: cmd.Link) -> bool:
        """Another name for what is no directory and not deleted."""
        node, parent = self.nodes.get(command.capsule), self.directory(command.parent)
        if node is None or node.kind == Kind.DIRECTORY or node.deleted:
            return False
        if parent is None or command.name in parent.children:
            return False
        parent.children[command.name] = command.capsule
        return True

    def unlink(self, command: cmd.Unlink) -> bool:
        """A name goes; without any the capsule is deleted."""
        parent = self.directory(command.parent)
        if parent is None or command.name not in parent.children:
            return False
        capsule = parent.children[command.name]
        node = self.nodes[capsule]
        is_directory = node.kind == Kind.DIRECTORY
        if command.directory is not None and command.directory != is_directory:
            return False
        if is_directory and node.children and not command.recursive:
            return False
        self.remove(command.parent, command.name)
        return True

    def remove(self, parent: bytes, name: bytes) -> None:
        """Takes a name away."""
        capsule = self.nodes[parent].children.pop(name)
        self.nodes[capsule].deleted = not self.names(capsule)

    def delete(self, command: cmd.DeleteCapsule) -> bool:
        """What has no name can be deleted once."""
        node = self.nodes.get(command.capsule)
        if node is None or node.deleted or command.capsule == ROOT_ID or self.names(command.capsule):
            return False
        node.deleted = True
        return True

    def rename(self, command: cmd.Rename) -> bool:
        """Moves a name, with RENAME_NOREPLACE and RENAME_EXCHANGE of renameat2."""
        old, new = self.directory(command.parent), self.directory(command.new_parent)
        if old is None or new is None or command.name not in old.children:
            return False
        capsule, there = old.children[command.name], new.children.get(command.new_name)
        node = self.nodes[capsule]
        if node.kind == Kind.DIRECTORY and self.inside(command.new_parent, capsule):
            return False
        if command.exchange:
            return self.exchange(command, old, new, capsule, there)
        if there is not None:
            target = self.nodes[there]
            if not command.replace:
                return False
            if there == capsule:
                return True
            if (target.kind == Kind.DIRECTORY) != (node.kind == Kind.DIRECTORY) or target.children:
                return False
            self.remove(command.new_parent, command.new_name)
        del old.children[command.name]
        new.children[command.new_name] = capsule
        return True

    def exchange(
        self, command: cmd.Rename, old: Node, new: Node, capsule: bytes, there: bytes | None
    ) -> bool:
        """Two names swap what they lead to."""
        if there is None:
            return False
        if self.nodes[there].kind == Kind.DIRECTORY and self.inside(command.parent, there):
            return False
        old.children[command.name], new.children[command.new_name] = there, capsule
        return True

    def resize(self, command: cmd.Resize) -> bool:
        """Only files have a size."""
        node = self.nodes.get(command.capsule)
        if node is None or node.kind != Kind.FILE:
            return False
        node.size = command.size
        return True

    def set_xattr(self, command: cmd.SetXattr) -> bool:
        """setxattr(2), with XATTR_CREATE and XATTR_REPLACE."""
        node = self.nodes.get(command.capsule)
        if node is None or (command.create and command.name in node.xattrs):
            return False
        if command.replace and command.name not in node.xattrs:
            return False
        node.xattrs[command.name] = command.value
        return True

    def undelete(self, command: cmd.Undelete) -> bool:
        """What lost its last name gets one, but not inside itself."""
        node, parent = self.nodes.get(command.capsule), self.directory(command.parent)
        if node is None or not node.deleted or parent is None or command.name in parent.children:
            return False
        if node.kind == Kind.DIRECTORY and self.inside(command.parent, command.capsule):
            return False
        parent.children[command.name] = command.capsule
        node.deleted = False
        return True

    def clone(self, command: cmd.Clone) -> bool:
        """A copy of a file or tree; hard links inside it stay hard links."""
        source, parent = self.nodes.get(command.source), self.directory(command.parent)
        if command.capsule in self.nodes or source is None or source.deleted or parent is None:
            return False
        if command.name in parent.children:
            return False
        if source.kind == Kind.DIRECTORY and self.inside(command.parent, command.source):
            return False
        copies: dict[bytes, bytes] = {}
        self.copy(command.source, command.capsule, copies, command)
        parent.children[command.name] = command.capsule
        return True

    def copy(self, source: bytes, target: bytes, copies: dict[bytes, bytes], command: cmd.Clone) -> None:
        """Copies a node and all below it."""
        copies[source] = target
        node = self.nodes[source]
        copy = self.nodes[target] = Node(node.kind, node.size, dict(node.xattrs))
        for name, child in node.children.items():
            if child not in copies:
                self.copy(child, clone_id(command.capsule, command.source, child), copies, command)
            copy.children[name] = copies[child]

    def do(self, command: Command) -> bool:
        """Any of these."""
        return bool(
            {
                cmd.CreateCapsule: self.create,
                cmd.Link: self.link,
                cmd.Unlink: self.unlink,
                cmd.DeleteCapsule: self.delete,
                cmd.Rename: self.rename,
                cmd.Resize: self.resize,
                cmd.SetXattr: self.set_xattr,
                cmd.Undelete: self.undelete,
                cmd.Clone: self.clone,
            }[type(command)](command)  # type: ignore[operator]
        )


A, B, C, D = IDS[:4]
START: Final[list[Command]] = [
    cmd.CreateCapsule(A, Kind.DIRECTORY, parent=ROOT_ID, name=NAMES[0]),
    cmd.CreateCapsule(B, Kind.DIRECTORY, parent=A, name=NAMES[1]),
    cmd.CreateCapsule(C, Kind.FILE, parent=ROOT_ID, name=NAMES[1]),
    cmd.CreateCapsule(D, Kind.FILE, parent=B, name=NAMES[0]),
    cmd.Link(D, ROOT_ID, NAMES[2]),
]
"""A tree with something of each kind in it, so that few commands miss."""

ids = st.sampled_from([ROOT_ID, ROOT_ID, A, A, B, *IDS])
new_ids = st.sampled_from(IDS)
names = st.sampled_from(NAMES)
booleans = st.booleans()
commands: st.SearchStrategy[Command] = st.one_of(
    st.builds(
        cmd.CreateCapsule,
        new_ids,
        st.sampled_from([Kind.FILE, Kind.DIRECTORY, Kind.DIRECTORY]),
        parent=ids,
        name=names,
    ),
    st.builds(cmd.CreateCapsule, new_ids, size=st.integers(0, 9)),
    st.builds(cmd.Link, ids, ids, names),
    st.builds(cmd.Unlink, ids, names, st.none() | booleans, booleans),
    st.builds(cmd.DeleteCapsule, new_ids),
    st.builds(cmd.Rename, ids, names, ids, names, booleans, booleans),
    st.builds(cmd.Resize, ids, st.integers(0, 99)),
    st.builds(cmd.SetXattr, ids, names, st.binary(max_size=2), booleans, booleans),
    st.builds(cmd.Undelete, ids, ids, names),
    st.builds(cmd.Clone, new_ids, ids, ids, names),
)
histories = st.lists(st.lists(commands, min_size=1, max_size=4), min_size=1, max_size=20).map(
    lambda groups: [START, *groups]
)


def run(history: list[list[Command]], writer: MemoryWriter, tree: Tree | None = None) -> list[Batch]:
    """Decides a history batch by batch, each outcome held against the model; the logged batches."""
    batches: list[Batch] = []
    start: list[list[Command]] = [[cmd.InitialiseStore(bytes(16), 0o755, 0, 0)]]
    for group in [*start, *history]:
        prepared = prepare(
            writer,
            [Request(command) for command in group],
            position=len(batches) + 1,
            time_ns=len(batches),
        )
        for command, outcome in zip(group, prepared.outcomes, strict=True):
            if tree is not None and not isinstance(command, cmd.InitialiseStore):
                allowed = tree.do(command)
                assert isinstance(outcome, Receipt) == allowed, (command, outcome)
        if prepared.entries:
            prepared.overlay.flush(writer)
            batches.append(Batch.of(prepared))
    return batches


def compare(writer: MemoryWriter, tree: Tree) -> None:
    """Rows and model say the same of every capsule."""
    found = {key: CapsuleRow.decode(value) for key, value in writer.scan(CAPSULE, b"")}
    assert set(found) == set(tree.nodes)
    for capsule, node in tree.nodes.items():
        row = found[capsule]
        entries = {key[16:]: EntryRow.decode(value).capsule for key, value in writer.scan(ENTRY, capsule)}
        assert entries == node.children
        assert (row.kind, row.size, bool(row.deleted), row.entries) == (
            node.kind,
            node.size,
            node.deleted,
            len(entries),
        )
        subdirectories = sum(tree.nodes[child].kind == Kind.DIRECTORY for child in entries.values())
        if node.kind == Kind.DIRECTORY:
            assert row.nlink == (0 if node.deleted else 2 + subdirectories)
        else:
            assert row.nlink == len(tree.names(capsule))


@given(history=histories)
def test_decide_and_apply_follow_the_rules_of_a_tree(history: list[list[Command]]) -> None:
    """What is accepted, what is refused and what comes of it is what an independent model says."""
    writer, tree = MemoryWriter(), Tree()
    run(history, writer, tree)
    compare(writer, tree)


@given(history=histories)
def test_a_history_folds_to_the_same_rows_however_it_is_split(history: list[list[Command]]) -> None:
    """Decided live, folded whole, and folded in two at every point: the same rows and the same digest."""
    live = MemoryWriter()
    batches = run(history, live)
    whole = MemoryWriter()
    digest = fold_state(batches, whole) % MODULUS
    assert whole.rows == live.rows
    assert digest == sum(table_digest(whole, table) for table in TABLES) % MODULUS
    for cut in range(len(batches) + 1):
        pieces = MemoryWriter()
        first = fold_state(batches[:cut], pieces)
        assert (first + fold_state(batches[cut:], pieces)) % MODULUS == digest
        assert pieces.rows == whole.rows


@attrs.frozen
class Record:
    """A batch as the feed wants it."""

    index: int
    time_ns: int
    metadata: bytes
    chain: bytes = bytes(32)


@given(history=histories)
def test_lmdb_holds_the_same_as_a_map_in_memory(history: list[list[Command]]) -> None:
    """The fold on LMDB and the fold in memory end with equal rows and digest."""
    memory = MemoryWriter()
    batches = run(history, memory)
    with tempfile.TemporaryDirectory() as scratch:
        views = builtin_views()
        store = Store(Path(scratch), layout_of(views))
        records = [Record(batch.position, batch.position - 1, batch.metadata) for batch in batches]
        applied = fold(store, views, records, start=Applied())
        with store.read() as txn:
            rows = {(table, key): value for table in TABLES for key, value in txn.scan(table, b"")}
        store.close(seal=False)
    assert rows == memory.rows
    assert applied.digest == sum(table_digest(memory, table) for table in TABLES) % MODULUS


@given(
    asked=st.lists(
        st.tuples(st.sampled_from([b"one" * 5 + b"!", b"two" * 5 + b"!"]), st.integers(0, 5)), max_size=30
    )
)
def test_a_retried_command_is_applied_once(asked: list[tuple[bytes, int]]) -> None:
    """Of one client and number only the first attempt counts; the rest get its receipt, also after a replay."""
    writer = MemoryWriter()
    batches = run([], writer)
    answered: dict[tuple[bytes, int], int] = {}
    for client, sequence in asked:
        fresh = bytes([len(batches)]) * 16
        command = cmd.CreateCapsule(fresh, parent=ROOT_ID, name=b"%d" % len(batches))
        prepared = prepare(
            writer,
            [Request(command, "", client, sequence)],
            position=len(batches) + 1,
            time_ns=len(batches),
        )
        (outcome,) = prepared.outcomes
        assert not isinstance(outcome, SpaceError)
        assert outcome.repeated == ((client, sequence) in answered)
        assert outcome.position == answered.setdefault((client, sequence), len(batches) + 1)
        if prepared.entries:
            batches.append(Batch(prepared.position, encode_batch(prepared.entries)))
            rebuilt = MemoryWriter()
            fold_state(batches, rebuilt)
            writer = rebuilt
    assert len(batches) == 1 + len(answered)

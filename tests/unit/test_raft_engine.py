from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import pytest
from attrs import define, field
from hypothesis import given, settings
from hypothesis import strategies as st

with contextlib.suppress(ImportError):  # the marker below says what happens without it
    import space_raft_engine as engine

if TYPE_CHECKING:
    from space_raft_engine import Change, ConfState, Entry, Message, Node, Transition

pytestmark = pytest.mark.requires("py:space_raft_engine")

THREE: ConfState = ([1, 2, 3], [], [], [], False)
ELECTION = 10
FUZZ = settings(
    max_examples=max(500, settings().max_examples)
)  # cheap ones: more than the short profile asks for


@define
class Disk:
    """What one node has made durable."""

    conf_state: ConfState = THREE
    hard_state: tuple[int, int, int] = (0, 0, 0)
    applied: int = 0
    before: tuple[int, int] = (0, 0)
    entries: list[tuple[int, int, int, bytes]] = field(factory=list)

    def open(self, node: int, **options: Any) -> Node:
        """The node as a restart finds it."""
        term, vote, commit = self.hard_state
        defaults = {
            "election_tick": ELECTION,
            "heartbeat_tick": 1,
            "max_message_bytes": 1 << 20,
            "max_inflight": 64,
        }
        return engine.Node(
            id=node,
            conf_state=self.conf_state,
            term=term,
            vote=vote,
            commit=commit,
            applied=self.applied,
            before=self.before,
            entries=self.entries,
            **(defaults | options),
        )

    def append(self, entries: list[Entry]) -> None:
        """Takes entries, which replace those from the first one's index on."""
        for index, term, kind, size, data in entries:
            del self.entries[index - self.before[0] - 1 :]
            self.entries.append((term, kind, size, data))

    def compact(self, index: int) -> None:
        """Forgets entries up to and including ``index``."""
        forgotten = index - self.before[0]
        self.before = (index, self.entries[forgotten - 1][0])
        del self.entries[:forgotten]


@define
class Cluster:
    """Nodes that persist and apply at once, and a network that delivers in order, but not to or from ``away``."""

    disks: dict[int, Disk]
    options: dict[str, Any] = field(factory=dict)
    nodes: dict[int, Node] = field(init=False)
    away: set[int] = field(factory=set)
    sent: list[tuple[int, Message]] = field(factory=list)
    reads: list[tuple[int, int, bytes]] = field(factory=list)
    applied: dict[int, list[Entry]] = field(factory=dict)
    changed: list[tuple[int, int, ConfState]] = field(factory=list)
    offers: list[bytes] = field(factory=list)

    def __attrs_post_init__(self) -> None:
        self.nodes = {node: disk.open(node, **self.options) for node, disk in self.disks.items()}

    def reopen(self, node: int) -> Node:
        """Drops a node and starts it from its disk."""
        self.nodes[node] = self.disks[node].open(node, **self.options)
        return self.nodes[node]

    def run(self) -> None:
        """Until nobody has anything to do or to say."""
        on_the_way: deque[tuple[int, Message]] = deque()
        while True:
            for node in self.nodes:
                on_the_way.extend((node, message) for message in self.handle(node))
            if not on_the_way:
                return
            sender, message = on_the_way.popleft()
            self.sent.append((sender, message))
            if message.to not in self.nodes or {sender, message.to} & self.away:
                continue
            if message.kind == "MsgSnapshot":
                self.offers.append(message.data)
            else:
                self.nodes[message.to].step(message.data)

    def handle(self, node: int) -> list[Message]:
        """Does what the node's Readies say; the messages to send."""
        out: list[Message] = []
        while self.nodes[node].has_ready():
            ready = self.nodes[node].ready()
            disk = self.disks[node]
            disk.append(ready.entries)
            disk.hard_state = ready.hard_state or disk.hard_state
            self.nodes[node].on_persist_ready(ready.number)
            out += [*ready.messages, *ready.persisted_messages]
            self.reads += [(node, *read) for read in ready.reads]
            for entry in ready.committed:
                self.apply(node, entry)
        return out

    def apply(self, node: int, entry: Entry) -> None:
        """Applies one committed entry; an impossible change changes nothing."""
        index, _, kind, _, data = entry
        self.applied.setdefault(node, []).append(entry)
        if kind == 2:
            with contextlib.suppress(engine.RaftError):
                self.disks[node].conf_state = self.nodes[node].apply_change(index, data)
                self.changed.append((node, index, self.nodes[node].conf_state))
        self.nodes[node].advance_apply_to(index)
        self.disks[node].applied = index

    def elect(self, node: int) -> Node:
        """Makes a node the leader."""
        for _ in range(ELECTION):  # so that no other still counts on a leader
            for each in self.nodes.values():
                if each.role != "leader":
                    each.set_election_timeout(2 * ELECTION - 1)
                    each.tick()
        self.nodes[node].campaign()
        self.run()
        assert self.nodes[node].role == "leader"
        return self.nodes[node]

    def beat(self) -> None:
        """One heartbeat of whoever leads."""
        for node in self.nodes.values():
            if node.role == "leader":
                node.tick()
        self.run()


def three(**options: Any) -> Cluster:
    """Three voters with empty logs."""
    return Cluster({node: Disk() for node in (1, 2, 3)}, options)


def sizes(entries: Iterable[Entry]) -> list[int]:
    """Sizes of the entries that have payload."""
    return [size for _, _, _, size, _ in entries if size]


# --- replication ------------------------------------------------------------------------------------


def test_elects_and_replicates() -> None:
    """Three nodes elect one leader, and every entry it takes is applied by all, in order, with its size."""
    cluster = three()
    leader = cluster.elect(2)
    assert [leader.propose([5, 1]), leader.propose([2**32 - 1])] == [2, 4]
    cluster.run()
    roles = {node: each.role for node, each in cluster.nodes.items()}
    assert roles == {1: "follower", 2: "leader", 3: "follower"}
    for node, each in cluster.nodes.items():
        assert (each.id, each.term, each.vote, each.commit, each.applied) == (node, 1, 2, 4, 4)
        assert (each.leader_id, each.first_index, each.last_index) == (2, 1, 4)
        assert cluster.applied[node] == [
            (1, 1, 0, 0, b""),
            (2, 1, 0, 5, b""),
            (3, 1, 0, 1, b""),
            (4, 1, 0, 2**32 - 1, b""),
        ]


def test_describes_what_travels_with_an_append() -> None:
    """The leader's message and the receiver's description of it name the same entries, with their terms and sizes."""
    cluster = three()
    cluster.elect(1).propose([7, 8])
    ready = cluster.nodes[1].ready()
    assert ready.must_sync
    assert {message.to for message in ready.messages} == {2, 3}
    for message in ready.messages:
        assert (message.kind, message.first, message.entries) == ("MsgAppend", 2, [(1, 7), (1, 8)])
        told = engine.describe(message.data)
        assert (told.kind, told.sender, told.to, told.term) == ("MsgAppend", 1, message.to, 1)
        assert (told.first, told.entries, told.snapshot) == (2, message.entries, None)


def test_status_of_leader_and_follower() -> None:
    """The leader knows how far each member is; a follower knows of itself only."""
    cluster = three()
    cluster.elect(1).propose([9])
    cluster.run()
    leader, follower = cluster.nodes[1].status(), cluster.nodes[2].status()
    assert (leader.role, leader.term, leader.vote, leader.leader_id) == ("leader", 1, 1, 1)
    assert (leader.commit, leader.applied, leader.last_index) == (2, 2, 2)
    assert sorted(leader.progress) == [1, 2, 3]
    assert leader.progress[2] == (2, 3, "replicate", True, 0)
    assert (follower.role, follower.commit, follower.progress) == ("follower", 2, {})


def test_nothing_is_committed_before_it_is_durable_here() -> None:
    """A group of one commits an entry only after its Ready was reported persisted."""
    node = Disk(([1], [], [], [], False)).open(1)
    node.campaign()
    node.on_persist_ready(node.ready().number)
    node.propose([3])
    ready = node.ready()
    assert (sizes(ready.entries), node.commit) == ([3], 1)
    assert not node.has_ready()
    node.on_persist_ready(ready.number)
    assert sizes(node.ready().committed) == [3]


def test_restart_keeps_everything() -> None:
    """Nodes opened from hard state and entries are where they were, and the group goes on."""
    cluster = three()
    cluster.elect(1).propose([10, 20])
    cluster.run()
    cluster.away = {2, 3}
    cluster.nodes[1].propose([30])  # durable here, and nowhere else
    cluster.run()

    def facts(node: Node) -> list[object]:
        terms = [node.term_at(index) for index in range(6)]
        return [node.term, node.vote, node.commit, node.applied, node.last_index, node.conf_state, terms]

    was = {node: facts(each) for node, each in cluster.nodes.items()}
    for node in cluster.nodes:
        cluster.reopen(node)
    assert {node: facts(each) for node, each in cluster.nodes.items()} == was
    assert was[1][-1] == [0, 1, 1, 1, 1, None]
    cluster.away = set()
    cluster.elect(1)
    assert [sizes(cluster.applied[node]) for node in (1, 2, 3)] == [[10, 20, 30]] * 3


def test_a_lost_leader_s_tail_is_replaced() -> None:
    """Entries a leader could not commit, a change among them, give way to those of the next leader, on its disk too."""
    cluster = three()
    cluster.elect(1)
    cluster.away = {1}
    cluster.nodes[1].propose_change(engine.encode_change([("learner", 4)]))
    cluster.nodes[1].propose([1, 2, 3])
    cluster.run()
    cluster.elect(2).propose([4])
    cluster.run()
    cluster.away = set()
    cluster.beat()
    assert sizes(cluster.applied[1]) == [4]
    assert cluster.applied[1] == cluster.applied[2]
    assert [size for _, _, size, _ in cluster.disks[1].entries if size] == [4]
    assert cluster.nodes[1].role == "follower"


# --- limits in real bytes -----------------------------------------------------------------------------


@pytest.mark.parametrize("again", [False, True], ids=["at once", "from the storage"])
def test_messages_are_limited_by_real_bytes(again: bool) -> None:
    """An append carries at most the limit of payload, or one entry, whether or not a Ready handed it out before."""
    cluster = three(max_message_bytes=100)
    leader = cluster.elect(1)
    cluster.away = {3} if again else set()
    proposed = [60, 60, 30, 200, 10, 10, 10, 70, 1, 100, 100]
    leader.propose(proposed)
    cluster.run()
    cluster.sent, cluster.away = [], set()
    if not again:
        leader.propose(proposed)
    cluster.beat()
    cluster.beat()
    parcels = [
        [size for _, size in message.entries]
        for _, message in cluster.sent
        if message.kind == "MsgAppend" and message.to == 3 and message.entries
    ]
    assert all(sum(parcel) <= 100 or len(parcel) == 1 for parcel in parcels)
    assert max(len(parcel) for parcel in parcels) > 1
    assert sizes(cluster.applied[3]) == proposed * (1 if again else 2)


def test_committed_entries_come_in_parts() -> None:
    """After a restart, what is committed and not applied comes in parts of 64 MiB, and all of it comes."""
    size = 30 << 20
    disk = Disk(hard_state=(1, 0, 5), entries=[(1, 0, size, b"")] * 5)
    node = disk.open(1)
    parts = []
    while node.has_ready():
        ready = node.ready()
        node.on_persist_ready(ready.number)
        parts.append([entry[0] for entry in ready.committed])
    assert parts == [[1, 2], [3, 4], [5]]


def test_uncommitted_bytes_are_limited() -> None:
    """A leader takes payload up to the limit beyond commit, always one proposal, and more once that is committed."""
    cluster = three(max_uncommitted_bytes=100)
    leader = cluster.elect(1)
    assert leader.propose([500]) == 2
    with pytest.raises(engine.Dropped, match="500 bytes wait"):
        leader.propose([1])
    cluster.run()
    leader.propose([60])
    leader.ready()  # handed out or not, it counts
    leader.propose([40])
    with pytest.raises(engine.Dropped):
        leader.propose([1])
    assert leader.last_index == 4


def test_without_a_limit_everything_is_taken() -> None:
    """max_uncommitted_bytes=0 means no limit."""
    leader = three().elect(1)
    leader.propose([2**32 - 1] * 1000)
    leader.propose([2**32 - 1] * 1000)
    assert leader.last_index == 2001


# --- proposals ----------------------------------------------------------------------------------------


def test_only_a_leader_takes_proposals() -> None:
    """A follower drops entries and changes instead of forwarding them."""
    cluster = three()
    cluster.elect(1)
    with pytest.raises(engine.Dropped, match="follower, not leader"):
        cluster.nodes[2].propose([1])
    with pytest.raises(engine.Dropped):
        cluster.nodes[2].propose_change(engine.encode_change([("learner", 4)]))
    assert not cluster.nodes[2].has_ready()


@pytest.mark.parametrize("wrong", [[], [0], [1, 0]])
def test_a_proposal_has_bytes(wrong: list[int]) -> None:
    """No entry, or one without bytes, is refused: that is how the engine's own entries look."""
    leader = three().elect(1)
    with pytest.raises(engine.RaftError, match="one byte or more"):
        leader.propose(wrong)
    assert leader.last_index == 1


# --- members ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, transition, after",
    [
        ([("learner", 4)], "auto", ([1, 2, 3], [4], [], [], False)),
        ([("add", 4)], "auto", ([1, 2, 3, 4], [], [], [], False)),
        ([("remove", 3)], "auto", ([1, 2], [], [], [], False)),
        ([("learner", 3)], "auto", ([1, 2], [3], [], [], False)),
        ([("add", 4), ("remove", 3)], "auto", ([1, 2, 4], [], [1, 2, 3], [], True)),
        ([("add", 4)], "implicit", ([1, 2, 3, 4], [], [1, 2, 3], [], True)),
        ([("learner", 3), ("add", 4)], "explicit", ([1, 2, 4], [], [1, 2, 3], [3], False)),
    ],
)
def test_preview_equals_apply(
    changes: list[tuple[Change, int]], transition: Transition, after: ConfState
) -> None:
    """A preview gives what applying gives, and changes nothing."""
    cluster = three()
    leader = cluster.elect(1)
    change = engine.encode_change(changes, transition=transition)
    assert leader.preview_change(change) == after
    assert leader.conf_state == THREE
    index = leader.propose_change(change)
    assert leader.has_pending_change
    cluster.run()
    assert {(1, index), (2, index)} <= {row[:2] for row in cluster.changed}
    assert all(members == after for _, _, members in cluster.changed)


@pytest.mark.parametrize(
    "changes, transition",
    [
        ([("remove", 1), ("remove", 2), ("remove", 3)], "explicit"),
        ([("learner", 1), ("learner", 2), ("learner", 3)], "auto"),
        ([], "auto"),
    ],
)
def test_impossible_changes_are_refused(changes: list[tuple[Change, int]], transition: Transition) -> None:
    """A change that leaves no voter, or leaves what is not joint, fails alike in preview and apply, without effect."""
    cluster = three()
    leader = cluster.elect(1)
    change = engine.encode_change(changes, transition=transition)
    leader.propose([1])
    ready = leader.ready()
    leader.on_persist_ready(ready.number)
    for message in ready.messages:
        cluster.nodes[message.to].step(message.data)
    for answer in cluster.handle(2):
        leader.step(answer.data)
    assert leader.commit == 2
    for attempt in (leader.preview_change, lambda data: leader.apply_change(2, data)):
        with pytest.raises(engine.RaftError) as caught:
            attempt(change)
        assert caught.type is engine.RaftError
    assert leader.conf_state == THREE


def test_a_joint_configuration_is_left() -> None:
    """While joint only leaving is taken, and once; afterwards leaving is not."""
    cluster = three()
    leader = cluster.elect(1)
    leave = engine.encode_change([])
    with pytest.raises(engine.Dropped, match="no joint configuration"):
        leader.propose_change(leave)
    leader.propose_change(engine.encode_change([("remove", 3), ("add", 4)], transition="explicit"))
    with pytest.raises(engine.Dropped, match="another membership change"):
        leader.propose_change(engine.encode_change([("learner", 5)]))
    cluster.run()
    assert leader.conf_state == ([1, 2, 4], [], [1, 2, 3], [], False)
    with pytest.raises(engine.Dropped, match="must be left first"):
        leader.propose_change(engine.encode_change([("learner", 5)]))
    leader.propose_change(leave)
    cluster.run()
    for node in (1, 2):
        assert cluster.nodes[node].conf_state == ([1, 2, 4], [], [], [], False)
        assert cluster.applied[node][-1] == (3, 1, 2, 0, leave)


def test_the_engine_leaves_by_itself() -> None:
    """After several changes at once the leader itself proposes to leave, and the next heartbeat brings it about."""
    cluster = three()
    cluster.elect(1).propose_change(engine.encode_change([("remove", 3), ("learner", 4)]))
    cluster.run()
    assert cluster.nodes[1].conf_state == ([1, 2], [4], [1, 2, 3], [], True)
    cluster.beat()
    assert cluster.applied[1][-1] == (3, 1, 2, 0, b"")
    assert cluster.nodes[2].conf_state == ([1, 2], [4], [], [], False)


def test_a_change_survives_in_the_log() -> None:
    """A change that is durable and not committed is sent, byte for byte, after a restart of its leader."""
    cluster = three()
    change = engine.encode_change([("learner", 4)], context=b"who asked")
    cluster.elect(1)
    cluster.away = {2, 3}
    cluster.nodes[1].propose_change(change)
    cluster.run()
    cluster.reopen(1)
    cluster.away = set()
    cluster.elect(1)
    assert [data for _, _, kind, _, data in cluster.applied[3] if kind == 2] == [change]
    assert cluster.nodes[3].conf_state == ([1, 2, 3], [4], [], [], False)


def test_changes_are_applied_in_turn() -> None:
    """A change applies at a committed index after the last applied one, before that index counts as applied."""
    cluster = three()
    leader = cluster.elect(1)
    change = engine.encode_change([("learner", 4)])
    for index in (0, 1, 2):  # 1 is applied, 2 is not there
        with pytest.raises(engine.RaftError, match="not between"):
            leader.apply_change(index, change)
    assert leader.conf_state == THREE


def test_a_learner_joins_and_is_promoted() -> None:
    """A node that knows nobody is taught by a leader that adds it, and votes when it is made a voter."""
    cluster = three()
    leader = cluster.elect(1)
    cluster.disks[4] = Disk()  # the members the log starts from
    cluster.reopen(4)
    leader.propose_change(engine.encode_change([("learner", 4)]))
    cluster.run()
    leader.propose_change(engine.encode_change([("add", 4)]))
    cluster.run()
    assert {node.conf_state[0] == [1, 2, 3, 4] for node in cluster.nodes.values()} == {True}
    assert leader.status().progress[4][:3] == (3, 4, "replicate")


# --- reads and leadership -------------------------------------------------------------------------------


@pytest.mark.parametrize("asks", [1, 2])
def test_read_index(asks: int) -> None:
    """Leader and follower alike learn the commit index under the context they asked with."""
    cluster = three()
    cluster.elect(1).propose([1])
    cluster.run()
    cluster.nodes[asks].read_index(b"question 1")
    cluster.run()
    assert cluster.reads == [(asks, 2, b"question 1")]


def test_a_read_needs_a_quorum() -> None:
    """A leader without followers answers no read; with them again, it does at the next heartbeat."""
    cluster = three()
    leader = cluster.elect(1)
    cluster.away = {2, 3}
    leader.read_index(b"q")
    cluster.run()
    assert cluster.reads == []
    cluster.away = {3}
    cluster.beat()
    assert cluster.reads == [(1, 1, b"q")]


def test_a_read_needs_a_context() -> None:
    """An empty context, whose answer the engine would drop, is refused."""
    with pytest.raises(engine.RaftError, match="needs a context"):
        three().elect(1).read_index(b"")


def test_leadership_is_transferred() -> None:
    """The named voter leads the next term, and nothing is proposed in between."""
    cluster = three()
    leader = cluster.elect(1)
    leader.transfer_leader(3)
    with pytest.raises(engine.Dropped):
        leader.propose([1])
    cluster.run()
    assert [node.role for node in cluster.nodes.values()] == ["follower", "follower", "leader"]
    assert {node.term for node in cluster.nodes.values()} == {2}
    assert cluster.nodes[3].propose([1]) == 3


def test_only_voters_campaign() -> None:
    """A learner and a stranger cannot stand for election."""
    members: list[ConfState] = [([1], [2], [], [], False), ([1], [], [], [], False), ([], [], [], [], False)]
    for conf_state in members:
        node = Disk(conf_state).open(2)
        with pytest.raises(engine.RaftError, match="only a voter"):
            node.campaign()
        assert node.role == "follower"


def test_the_election_timeout_is_exact() -> None:
    """A node without a leader campaigns after exactly the ticks it was given, every time, until given others."""
    node = Disk().open(1, pre_vote=False)
    campaigns = []
    for tick, timeout in enumerate([13] * 39 + [17] * 34, 1):
        node.set_election_timeout(timeout)
        before = node.term
        node.tick()
        if node.term != before:
            campaigns.append(tick)
    assert campaigns == [13, 26, 39, 56, 73]


def test_a_timeout_holds_through_changes_of_role() -> None:
    """A time-out set once holds however often the node follows a leader and stands for election."""
    node = Disk().open(2, pre_vote=False)
    node.set_election_timeout(11)
    for term in range(1, 40, 2):
        node.step(other(8, _4=term))  # a heartbeat: whatever it was, it follows
        for _ in range(10):
            node.tick()
        assert (node.role, node.term) == ("follower", term)
        node.tick()
        assert (node.role, node.term) == ("candidate", term + 1)


@pytest.mark.parametrize("ticks", [0, ELECTION - 1, 2 * ELECTION, 2**63])
def test_election_timeouts_have_bounds(ticks: int) -> None:
    """Less than the configured time-out would break leases, twice as much the engine does not allow."""
    with pytest.raises(engine.RaftError, match=r"not within 10\.\.20"):
        Disk().open(1).set_election_timeout(ticks)


# --- compaction and snapshots -------------------------------------------------------------------------


def test_a_follower_behind_the_log_is_offered_the_applied_state() -> None:
    """It is told index, term and members as applied, opens from that, and gets the rest as entries."""
    cluster = three()
    leader = cluster.elect(1)
    cluster.away = {3}
    leader.propose([1, 2])
    leader.propose_change(engine.encode_change([("learner", 4)]))
    leader.propose([3])
    cluster.run()
    leader.compact(4)
    assert (leader.first_index, leader.term_at(4), leader.term_at(3)) == (5, 1, None)
    cluster.away = set()
    cluster.beat()
    cluster.beat()
    told = engine.describe(cluster.offers[0])
    members: ConfState = ([1, 2, 3], [4], [], [], False)
    assert (told.kind, told.sender, told.to, told.entries) == ("MsgSnapshot", 1, 3, [])
    assert told.snapshot == (5, 1, members)
    assert leader.status().progress[3][2:] == ("snapshot", True, 5)

    with pytest.raises(engine.RaftError, match="opening a node"):
        cluster.nodes[3].step(cluster.offers[0])
    cluster.disks[3] = Disk(members, (1, 1, 5), applied=5, before=(5, 1))
    cluster.reopen(3)
    leader.report_snapshot(3, ok=True)
    leader.propose([4])
    cluster.run()
    cluster.beat()
    assert cluster.applied[3][-1] == (6, 1, 0, 4, b"")
    assert cluster.nodes[3].conf_state == members


def test_a_failed_snapshot_is_offered_again() -> None:
    """After a failed installation the leader tries once more; a peer out of reach is probed first."""
    cluster = three()
    leader = cluster.elect(1)
    cluster.away = {3}
    leader.propose([1])
    cluster.run()
    leader.report_unreachable(3)
    assert leader.status().progress[3][2] == "probe"
    leader.compact(2)
    cluster.away = set()
    cluster.beat()
    cluster.beat()
    assert len(cluster.offers) == 1
    cluster.beat()
    assert len(cluster.offers) == 1
    leader.report_snapshot(3, ok=False)
    cluster.beat()
    assert len(cluster.offers) == 2


def test_a_snapshot_has_the_members_of_its_index() -> None:
    """Between applying a change and counting it as applied, a snapshot is of the change's index, and stays so."""
    cluster = Cluster({1: Disk(([1], [], [], [], False))})
    leader = cluster.elect(1)
    leader.propose([1])
    leader.propose_change(engine.encode_change([("learner", 2)]))
    leader.on_persist_ready(leader.ready().number)
    committed = leader.ready().committed
    assert [entry[0] for entry in committed] == [2, 3]
    leader.apply_change(3, committed[1][4])
    leader.advance_apply_to(2)
    leader.compact(2)
    leader.ready()
    cluster.nodes[2] = Disk(([], [], [], [], False)).open(2)
    cluster.disks[2] = Disk(([], [], [], [], False))
    cluster.beat()
    cluster.beat()
    assert engine.describe(cluster.offers[0]).snapshot == (3, 1, ([1], [2], [], [], False))


def test_compaction_keeps_what_is_not_applied() -> None:
    """Compacting past the applied index is refused; compacting again does nothing."""
    cluster = three()
    leader = cluster.elect(1)
    leader.propose([1, 2, 3])
    cluster.run()
    leader.compact(3)
    leader.compact(3)
    leader.compact(1)
    with pytest.raises(engine.RaftError, match="not applied yet"):
        leader.compact(5)
    assert [leader.term_at(index) for index in range(2, 6)] == [None, 1, 1, None]
    leader.propose([4])
    cluster.run()
    assert sizes(cluster.applied[2]) == [1, 2, 3, 4]


# --- what the caller may get wrong ------------------------------------------------------------------------


def test_progress_is_reported_in_order() -> None:
    """A Ready not handed out, and an index not committed or already left behind, are refused without harm."""
    cluster = three()
    leader = cluster.elect(1)
    with pytest.raises(engine.RaftError, match="was not handed out"):
        leader.on_persist_ready(1 << 40)
    for index in (0, 2, 1 << 63):
        with pytest.raises(engine.RaftError, match="is not between"):
            leader.advance_apply_to(index)
    leader.propose([1])
    cluster.run()
    assert leader.applied == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"id": 0},
        {"conf_state": ([0], [], [], [], False)},
        {"conf_state": ([1, 1], [], [], [], False)},
        {"conf_state": ([1], [1], [], [], False)},
        {"conf_state": ([], [1], [], [], False)},
        {"conf_state": ([], [], [1], [], True)},
        {"conf_state": ([1], [2], [2], [], False)},
        {"conf_state": ([1], [], [2], [3], False)},
        {"conf_state": ([1], [], [1], [1], False)},
        {"conf_state": ([1], [], [], [2], False)},
        {"conf_state": ([1], [], [], [], True)},
        {"term": 1},
        {"term": 2**63},
        {"commit": 4},
        {"commit": 1},
        {"commit": 7},
        {"applied": 4},
        {"applied": 2**64 - 1},
        {"before": (5, 0)},
        {"before": (0, 1)},
        {"before": (2**64 - 1, 1)},
        {"before": (5, 3)},
        {"entries": [(2, 0, 1, b""), (1, 0, 1, b"")]},
        {"entries": [(0, 0, 1, b"")]},
        {"entries": [(2, 0, 4, b"four")]},
        {"entries": [(2, 1, 0, b"")]},
        {"entries": [(2, 2, 1, b"")]},
        {"entries": [(2, 2, 0, b"\xff")]},
        {"election_tick": 1},
        {"election_tick": 2**63},
        {"heartbeat_tick": 0},
        {"max_inflight": 0},
        {"max_inflight": 2**63},
    ],
    ids=repr,
)
def test_a_node_opens_only_from_what_fits_together(wrong: dict[str, Any]) -> None:
    """Arguments that contradict each other are refused before the engine sees them."""
    right: dict[str, Any] = {
        "id": 1,
        "conf_state": ([1, 2], [3], [2, 4], [4], True),
        "term": 2,
        "vote": 0,
        "commit": 6,
        "applied": 5,
        "before": (5, 1),
        "entries": [(2, 0, 1, b"")],
        "election_tick": 10,
        "heartbeat_tick": 1,
        "max_message_bytes": 1,
        "max_inflight": 1,
    }
    assert engine.Node(**right).conf_state == right["conf_state"]
    with pytest.raises(engine.RaftError) as caught:
        engine.Node(**(right | wrong))
    assert caught.type is engine.RaftError


def test_a_broken_invariant_poisons_the_node(capfd: pytest.CaptureFixture[str]) -> None:
    """A node that lost what it had acknowledged says so when told of its commit, and from then on to every call."""
    cluster = three()
    cluster.elect(1).propose([1])
    cluster.run()
    disk = cluster.disks[2]
    disk.entries, disk.hard_state, disk.applied = disk.entries[:1], (1, 1, 1), 1
    node = cluster.reopen(2)
    cluster.nodes[1].tick()
    (heartbeat,) = (message for message in cluster.handle(1) if message.to == 2)
    with pytest.raises(engine.Panic, match="to_commit 2 is out of range"):
        node.step(heartbeat.data)
    calls: list[Callable[[], object]] = [
        node.tick,
        node.has_ready,
        node.ready,
        node.status,
        node.campaign,
        lambda: node.term,
        lambda: node.step(b""),
        lambda: node.set_election_timeout(ELECTION),
    ]
    for call in calls:
        with pytest.raises(engine.Panic, match=r"unusable since .* to_commit 2"):
            call()
    assert disk.open(2).last_index == 1
    assert capfd.readouterr() == ("", "")


# --- bytes from outside ---------------------------------------------------------------------------------


def protobuf(**fields: int | bytes | list[bytes]) -> bytes:
    """An eraftpb message from its fields, named by number: ``_1=3`` is field 1, a list repeats it."""
    out = b""
    for name, value in fields.items():
        number = int(name[1:])
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, int):
                out += varint(number << 3) + varint(each)
            else:
                out += varint(number << 3 | 2) + varint(len(each)) + each
    return out


def varint(value: int) -> bytes:
    """Protocol Buffers' base-128 encoding."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def entry(index: int, term: int = 1, kind: int = 0, data: bytes = b"\1\0\0\0", context: bytes = b"") -> bytes:
    """An eraftpb entry."""
    return protobuf(_1=kind, _2=term, _3=index, _4=data, _6=context)


def append(entries: list[bytes], **fields: int | bytes) -> bytes:
    """A MsgAppend of node 1 to node 2 in term 1, after entry (1, 1)."""
    return protobuf(**({"_1": 3, "_2": 2, "_3": 1, "_4": 1, "_5": 1, "_6": 1} | fields), _7=entries)


def other(kind: int, **fields: int | bytes | list[bytes]) -> bytes:
    """Any other message of node 1 to node 2 in term 1."""
    return protobuf(**({"_1": kind, "_2": 2, "_3": 1, "_4": 1} | fields))


def snapshot(index: int, term: int, voters: bytes = b"\1", data: bytes = b"") -> bytes:
    """An eraftpb snapshot."""
    return protobuf(_1=data, _2=protobuf(_1=protobuf(_1=voters), _2=index, _3=term))


BAD = {
    "nothing": b"",
    "no protobuf": b"\xff\xff",
    "unknown type": other(19),
    "negative type": other(2**64 - 1),
    "no sender": append([], _3=0),
    "no addressee": append([], _2=0),
    "no term": append([], _4=0),
    "hup": other(0),
    "beat": other(1),
    "proposal": other(2, _7=[entry(0, 0)]),
    "unreachable": other(10),
    "snapshot status": other(11),
    "check quorum": other(12),
    "gap": append([entry(3)]),
    "gap within": append([entry(2), entry(4)]),
    "repetition": append([entry(2), entry(2)]),
    "entry of term 0": append([entry(1, 0)], _5=0, _6=0),
    "term falls": append([entry(2, 2), entry(3, 1)], _4=2),
    "entry from the future": append([entry(2, 2)]),
    "after an entry of term 0": append([entry(2)], _5=0),
    "after entry 0 of term 1": append([entry(1)], _6=0),
    "index beyond all": append([entry(2**63 + 1)], _6=2**63),
    "term beyond all": append([], _4=2**63),
    "short descriptor": append([entry(2, data=b"\1\0\0")]),
    "long descriptor": append([entry(2, data=b"\1\0\0\0\0")]),
    "descriptor of nothing": append([entry(2, data=bytes(4))]),
    "entry with context": append([entry(2, context=b"x")]),
    "old change": append([entry(2, kind=1)]),
    "unknown kind": append([entry(2, kind=3)]),
    "malformed change": append([entry(2, kind=2, data=b"\xff")]),
    "change of nobody": append([entry(2, kind=2, data=protobuf(_2=[protobuf(_1=0)]))]),
    "unknown change": append([entry(2, kind=2, data=protobuf(_2=[protobuf(_1=9, _2=4)]))]),
    "unknown transition": append([entry(2, kind=2, data=protobuf(_1=9))]),
    "heartbeat with entries": other(8, _7=[entry(2)]),
    "append with snapshot": append([], _9=snapshot(1, 1)),
    "snapshot without one": other(7),
    "snapshot of nothing": other(7, _9=snapshot(0, 1)),
    "snapshot of term 0": other(7, _9=snapshot(1, 0)),
    "snapshot from the future": other(7, _9=snapshot(1, 2)),
    "snapshot with data": other(7, _9=snapshot(1, 1, data=b"x")),
    "snapshot of no members": other(7, _9=snapshot(1, 1, voters=b"\0")),
    "snapshot on request": other(4, _13=1),
    "read without context": other(15, _4=0),
    "read with empty context": other(15, _4=0, _7=[b""]),
    "two reads": other(15, _4=0, _7=[entry(0), entry(0)]),
    "read with a term": other(15, _7=[entry(0)]),
    "answer without context": other(16),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD.keys())
def test_bad_messages_are_refused(data: bytes) -> None:
    """What no honest peer sends is refused by describe and step alike, and the node is as before."""
    cluster = three()
    cluster.elect(1)
    node = cluster.nodes[2]
    for take in (engine.describe, node.step):
        with pytest.raises(engine.RaftError) as caught:
            take(data)
        assert caught.type is engine.RaftError
    assert not node.has_ready()
    cluster.nodes[1].propose([1])
    cluster.run()
    assert sizes(cluster.applied[2]) == [1]


def test_the_messages_above_are_bad_for_one_reason() -> None:
    """The same hand-made messages without a fault are taken."""
    cluster = three()
    cluster.elect(1)
    cluster.nodes[2].step(append([entry(2), entry(3, kind=2, data=protobuf(_2=[protobuf(_1=2, _2=4)]))]))
    cluster.nodes[2].step(other(8))
    cluster.nodes[2].step(other(15, _4=0, _7=[entry(0)]))
    assert [size for _, _, _, size, _ in cluster.nodes[2].ready().entries] == [1, 0]
    assert engine.describe(other(7, _9=snapshot(1, 1))).snapshot == (1, 1, ([1], [], [], [], False))


def test_messages_go_astray() -> None:
    """A message for another node is refused; an answer of a stranger, or a transfer asked of a follower, is ignored."""
    cluster = three()
    cluster.elect(1)
    with pytest.raises(engine.RaftError, match="node 2 came to node 3"):
        cluster.nodes[3].step(append([]))
    cluster.nodes[2].step(other(4, _3=9))
    cluster.nodes[2].step(other(13, _3=3))
    assert not cluster.nodes[2].has_ready()


def real_messages() -> list[bytes]:
    """Messages of an election, of replication, of a change and of reads."""
    cluster = three()
    cluster.elect(1).propose([1, 2])
    cluster.nodes[1].propose_change(engine.encode_change([("learner", 4)]))
    cluster.run()
    cluster.nodes[2].read_index(b"q")
    cluster.beat()
    cluster.nodes[1].transfer_leader(2)
    cluster.run()
    return sorted({message.data for _, message in cluster.sent})


@given(st.data())
@FUZZ
def test_garbage_is_an_error(data: st.DataObject) -> None:
    """Any bytes, and real messages with bytes changed, are taken or refused; nothing else comes out."""
    if data.draw(st.booleans()):
        message = data.draw(st.binary(max_size=200))
    else:
        changed = bytearray(data.draw(st.sampled_from(real_messages())))
        for _ in range(data.draw(st.integers(1, 3))):
            changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
        message = bytes(changed[: data.draw(st.integers(0, len(changed)))])
    with contextlib.suppress(engine.RaftError):
        engine.describe(message)
    cluster = three()
    cluster.elect(1)
    for node in cluster.nodes.values():
        with contextlib.suppress(engine.RaftError):
            node.step(message)
            while node.has_ready():
                node.on_persist_ready(node.ready().number)


# --- the codec of changes ---------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.sampled_from(["add", "learner", "remove"]), st.integers(1, 2**64 - 1)), max_size=9),
    st.sampled_from(["auto", "implicit", "explicit"]),
    st.binary(max_size=40),
)
def test_changes_survive_the_wire(
    changes: list[tuple[Change, int]], transition: Transition, context: bytes
) -> None:
    """A change decodes to what was encoded."""
    data = engine.encode_change(changes, transition=transition, context=context)
    assert engine.decode_change(data) == (changes, transition, context)


def test_leaving_is_no_bytes() -> None:
    """The change that leaves a joint configuration is empty, as the engine writes it itself."""
    assert engine.encode_change([]) == b""
    assert engine.decode_change(b"") == ([], "auto", b"")


@pytest.mark.parametrize(
    "changes, transition", [([("add", 0)], "auto"), ([("grow", 1)], "auto"), ([], "now")]
)
def test_changes_have_words(changes: Any, transition: Any) -> None:
    """Node 0 and words that mean nothing are refused."""
    with pytest.raises(engine.RaftError):
        engine.encode_change(changes, transition=transition)


@given(st.binary(max_size=100))
@FUZZ
def test_garbage_is_no_change(data: bytes) -> None:
    """Any bytes are a change that survives the wire, or an error."""
    with contextlib.suppress(engine.RaftError):
        changes, transition, context = engine.decode_change(data)
        again = engine.encode_change(changes, transition=transition, context=context)
        assert engine.decode_change(again) == (changes, transition, context)


def test_the_engine_has_a_version() -> None:
    """The version names the crate's release."""
    assert engine.ENGINE_VERSION.startswith("raft-rs 0.7.0, ")

# ruff: noqa: PYI021  (this is the interface's only documentation)
# ruff: noqa: N818    (Dropped and Panic are what happened, and Raft's words)
# ruff: noqa: A002    (id is Raft's word for a node's number)
"""Crate raft 0.7.0 (TiKV's consensus core) for Python: one `Node` is one replica of one Raft group.

Sans-I/O: a node has no thread, clock, disk or network.  Calls go in, a `Ready` comes out, and the caller
sends, persists and applies what it says, in this order:

1. `ready()`; send `messages` at once, unless the Ready changes term or vote (`hard_state` with another term
   or vote than before): then persist first.
2. Persist `hard_state` and `entries`, in the order of the Readies (fsync if `must_sync`);
   `on_persist_ready(number)`.
3. Send `persisted_messages`, in order.
4. Apply `committed`; for a membership change `apply_change`, once commit, index and members are durable;
   then `advance_apply_to`.

Entries carry no payload.  A normal entry is the size of bytes that travel and are kept elsewhere; the node
keeps term and size of each, and the few bytes of membership changes.

Every error is a `RaftError`.  What does not fit an argument's type or range (a size of 2^32, an id below
zero) is Python's TypeError or OverflowError.  A node may be used from any thread, by one at a time.

Sources: Ongaro, "Consensus: Bridging Theory and Practice" (2014), sections 3 (Raft), 3.10 (leadership
transfer), 4.3 (joint consensus), 6.4 (reads), 9.6 (PreVote), 10.2.1 (writing in parallel).
"""

from collections.abc import Sequence
from typing import Final, Literal, TypeAlias, final

# The aliases are words for type checkers: import them under TYPE_CHECKING.

ConfState: TypeAlias = tuple[list[int], list[int], list[int], list[int], bool]
"""Members, each list sorted when it comes from here: voters, learners, voters_outgoing, learners_next, auto_leave.
The configuration is joint while voters_outgoing is not empty.
"""

Entry: TypeAlias = tuple[int, int, int, int, bytes]
"""Index, term, kind, size, data.  Kind 0 is a normal entry of `size` bytes (0: what a new leader proposes) with
data b""; kind 2 is a membership change with size 0 and data for `decode_change` (b"": leave joint).
"""

Role: TypeAlias = Literal["follower", "precandidate", "candidate", "leader"]
Transition: TypeAlias = Literal["auto", "implicit", "explicit"]
Change: TypeAlias = Literal["add", "learner", "remove"]

ENGINE_VERSION: Final[str]
"""Version of the crate and of this binding, for people."""

class RaftError(Exception):
    """The call was refused and changed nothing: a wrong argument, or bytes no honest peer sends."""

class Dropped(RaftError):
    """A proposal was not taken: not leader, too much uncommitted, a change pending, a transfer in progress."""

class Panic(RaftError):
    """The engine found an invariant broken, and says which; the Node raises this for ever after.
    Nothing it had not handed out counts: open a new one from the log.
    """

@final
class Message:
    """A message to send."""

    @property
    def to(self) -> int:
        """Node it is for."""
    @property
    def kind(self) -> str:
        """Raft's name for it, "MsgAppend"."""
    @property
    def data(self) -> bytes:
        """What `describe` and `step` take on the other side (eraftpb.Message)."""
    @property
    def first(self) -> int:
        """Index of the first of `entries`, were there one; 0 unless a MsgAppend."""
    @property
    def entries(self) -> list[tuple[int, int]]:
        """Term and size of each entry of a MsgAppend: the payload that must travel with it."""

@final
class Ready:
    """What has to be done now."""

    @property
    def number(self) -> int:
        """For `on_persist_ready`; counts from 1."""
    @property
    def must_sync(self) -> bool:
        """False: nothing in it needs an fsync before `on_persist_ready`."""
    @property
    def hard_state(self) -> tuple[int, int, int] | None:
        """Term, vote and commit to persist, if one of them changed."""
    @property
    def entries(self) -> list[Entry]:
        """To persist; they replace everything from the first one's index on."""
    @property
    def messages(self) -> list[Message]:
        """To send at once."""
    @property
    def persisted_messages(self) -> list[Message]:
        """To send after this Ready is durable."""
    @property
    def committed(self) -> list[Entry]:
        """To apply.  At most 64 MiB of payload, or one entry: `has_ready` says if there is more."""
    @property
    def reads(self) -> list[tuple[int, bytes]]:
        """Index and context of each confirmed read: it may be answered once that index is applied."""
    @property
    def soft_state(self) -> tuple[int, Role] | None:
        """Leader (0: unknown) and role, if one of them changed; not to be persisted."""

@final
class Status:
    """A node at this moment."""

    @property
    def role(self) -> Role: ...
    @property
    def term(self) -> int: ...
    @property
    def vote(self) -> int: ...
    @property
    def commit(self) -> int: ...
    @property
    def applied(self) -> int: ...
    @property
    def last_index(self) -> int: ...
    @property
    def leader_id(self) -> int: ...
    @property
    def progress(self) -> dict[int, tuple[int, int, Literal["probe", "replicate", "snapshot"], bool, int]]:
        """Of each member, as the leader knows it ({} elsewhere): match, next, state, recent_active,
        pending_snapshot (index, 0 if none).
        """

@final
class Description:
    """A message from outside, checked: `step` takes it unless it is a MsgSnapshot or for another node."""

    @property
    def kind(self) -> str: ...
    @property
    def sender(self) -> int:
        """Node it is from.  A leadership transfer that was asked of a follower names the future leader here,
        and a forwarded read the node that wants to read.
        """
    @property
    def to(self) -> int: ...
    @property
    def term(self) -> int:
        """Of the sender; 0 for a forwarded read."""
    @property
    def first(self) -> int:
        """As in `Message`."""
    @property
    def entries(self) -> list[tuple[int, int]]:
        """As in `Message`."""
    @property
    def snapshot(self) -> tuple[int, int, ConfState] | None:
        """Of a MsgSnapshot: index, term and members of the state the leader offers."""

@final
class Node:
    """One replica of one group, opened from what is durable.

    id                     this node, not 0
    conf_state             members as of `applied`; four empty lists for a node that is still to be told
    term, vote, commit     the last durable hard state; term is not below the last entry's
    applied                last applied index, before[0] <= applied <= commit <= last index
    before                 index and term of the entry before the first retained one; (0, 0) for none
    entries                term, kind, size and data of each retained entry, from before[0] + 1 on
    election_tick          ticks without a leader until an election: up to twice that, drawn by the engine
    heartbeat_tick         ticks between heartbeats, less than election_tick
    max_message_bytes      limit of the payload of one MsgAppend, or one entry; also of its encoded entries
    max_inflight           MsgAppends to one peer without an answer, at most 65,536
    max_uncommitted_bytes  payload a leader takes beyond commit, or one proposal; 0 for no limit
    pre_vote, check_quorum  sections 9.6 and 6.4 of the dissertation
    batch_append  joins append messages; 0.7.0 breaks with it when messages are reordered: for tests that show so

    Raises RaftError if these do not fit together.
    """

    def __new__(
        cls,
        *,
        id: int,
        conf_state: ConfState,
        term: int,
        vote: int,
        commit: int,
        applied: int,
        before: tuple[int, int],
        entries: Sequence[tuple[int, int, int, bytes]],
        election_tick: int,
        heartbeat_tick: int,
        max_message_bytes: int,
        max_inflight: int,
        max_uncommitted_bytes: int = 0,
        pre_vote: bool = True,
        check_quorum: bool = True,
        batch_append: bool = False,
    ) -> Node: ...
    def tick(self) -> None:
        """One tick of the caller's clock has passed."""
    def set_election_timeout(self, ticks: int) -> None:
        """From the next tick on exactly `ticks` without a leader start an election, whatever role comes between.
        Raises RaftError outside election_tick <= ticks < 2 * election_tick.
        """
    def step(self, message: bytes) -> None:
        """Takes a message from a peer.  An answer of a node that is no member is ignored.
        Raises RaftError for bytes that are no message, for one no honest peer sends, for another node's, and for
        proposals and snapshots: the latter are installed by opening a new Node.
        """
    def propose(self, sizes: Sequence[int]) -> int:
        """Proposes normal entries of these sizes in bytes, all or none; the index of the first.
        Raises Dropped unless leader and within the limit, RaftError for no sizes or one of 0.
        """
    def propose_change(self, change: bytes) -> int:
        """Proposes a membership change of `encode_change`; its index.  Look with `preview_change` first: what is
        impossible is taken, and must then be skipped by everyone.
        Raises Dropped unless leader, while another change may be unapplied, for anything but leaving while the
        configuration is joint, and for leaving while it is not.
        """
    def preview_change(self, change: bytes) -> ConfState:
        """The members `apply_change` would give; changes nothing.  Raises RaftError if the change is impossible."""
    def apply_change(self, index: int, change: bytes) -> ConfState:
        """Switches to the members after the committed change at `index`, and returns them; a snapshot is of
        `index` from now on.  Before `advance_apply_to(index)`, and before any later change.  A leader that removes
        itself is to be reopened at once: its next call may Panic.
        Raises RaftError if the change is impossible (skip it: it is then a no-op everywhere) or out of turn.
        """
    def read_index(self, context: bytes) -> None:
        """Asks for the index a linearizable read now has to wait for; it comes in `Ready.reads` under `context`,
        which must be unique in the group.  Or it never comes (no leader, or a message was lost): ask again.
        Raises RaftError for an empty context.
        """
    def campaign(self) -> None:
        """Starts an election now.  Raises RaftError unless a voter."""
    def transfer_leader(self, id: int) -> None:
        """Hands leadership to a voter, within an election time-out or not at all; no proposals meanwhile.
        A follower passes this on to the leader.
        """
    def report_unreachable(self, id: int) -> None:
        """The last message to this peer was lost: the leader probes before it streams again."""
    def report_snapshot(self, id: int, ok: bool) -> None:
        """The snapshot of a MsgSnapshot was installed, or failed; until then the peer gets no entries."""
    def has_ready(self) -> bool:
        """Whether `ready` has something to do."""
    def ready(self) -> Ready:
        """Takes everything that is to do.  Its entries count as stored from now on, as durable only after
        `on_persist_ready`.
        """
    def on_persist_ready(self, number: int) -> None:
        """Tells that this Ready and all before it are durable.  Raises RaftError for one not handed out yet."""
    def advance_apply_to(self, index: int) -> None:
        """Everything up to `index` is applied; a snapshot is of `index` from now on.
        Raises RaftError if that is backwards, not committed or not durable.
        """
    def compact(self, index: int) -> None:
        """Forgets retained entries up to and including `index`; followers behind it get a MsgSnapshot.
        Raises RaftError if it is not applied.
        """
    def term_at(self, index: int) -> int | None:
        """Term of an entry, the one before the first retained included; None outside of these."""
    def status(self) -> Status:
        """The node at this moment, and its peers if it leads."""
    @property
    def id(self) -> int: ...
    @property
    def term(self) -> int: ...
    @property
    def vote(self) -> int:
        """Candidate that got this node's vote in `term`; 0 for none."""
    @property
    def commit(self) -> int: ...
    @property
    def applied(self) -> int: ...
    @property
    def last_index(self) -> int: ...
    @property
    def first_index(self) -> int:
        """The first retained entry's; last_index + 1 if none is."""
    @property
    def leader_id(self) -> int:
        """The leader of `term`; 0 if unknown."""
    @property
    def role(self) -> Role: ...
    @property
    def conf_state(self) -> ConfState:
        """Members after the last applied change."""
    @property
    def has_pending_change(self) -> bool:
        """Whether a change may be proposed but not applied; a new leader says so of its whole log."""

def describe(message: bytes) -> Description:
    """What a message from outside is about.  Raises RaftError for whatever `step` would refuse in any node."""

def encode_change(
    changes: Sequence[tuple[Change, int]], *, transition: Transition = "auto", context: bytes = b""
) -> bytes:
    """A membership change (eraftpb.ConfChangeV2): what becomes of which node.  No changes: leave joint.
    "auto" goes through a joint configuration only if there are several; "implicit" and "explicit" always do, and
    the former (like "auto") leaves it by itself.  Raises RaftError for node 0 and unknown words.
    """

def decode_change(data: bytes) -> tuple[list[tuple[Change, int]], Transition, bytes]:
    """The changes, transition and context of a membership change.  Raises RaftError if it is none."""

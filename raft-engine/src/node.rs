//! The engine behind one door: every call goes through `Node::enter`, which catches its panics.

use std::cell::Cell;
use std::panic::{catch_unwind, AssertUnwindSafe};

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList};
use raft::eraftpb::{ConfState, Entry, HardState, Message, MessageType};
use raft::{Changer, Config, RawNode, SnapshotStatus, StateRole};

use crate::storage::{self, change, normal, size_of, Store};
use crate::values::{self, entry_list, role_name, Ready, Status};
use crate::wire::{
    check_members, decode_change, decode_message, members_to_python, members_to_raft, refuse, split_append,
    Members, NUMBER_MAX,
};
use crate::{Dropped, Panic, RaftError};

/// Real bytes of committed entries in one `Ready`: after a restart the whole unapplied log is committed at
/// once, and this keeps the list of it short.  The next `Ready` has the rest.
const COMMITTED_BYTES_PER_READY: u64 = 64 << 20;
/// The engine allocates this many slots for every peer up front.
const INFLIGHT_MAX: usize = 1 << 16;
/// Ticks above this mean a mistaken unit, and twice that must not overflow.
const TICKS_MAX: usize = 1 << 20;

type Raw = RawNode<Store>;

thread_local! {
    static LAST_PANIC: Cell<Option<String>> = const { Cell::new(None) };
}

/// Panics become the text of a Python exception instead of lines on standard error.
pub fn keep_panics_quiet() {
    std::panic::set_hook(Box::new(|info| {
        let place = info.location().map_or_else(String::new, |at| {
            let file = at.file().rsplit('/').next().unwrap_or_default();
            format!(" ({file}:{})", at.line())
        });
        let payload = info.payload();
        let text = payload
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| payload.downcast_ref::<&str>().copied())
            .unwrap_or("panic without a message");
        LAST_PANIC.set(Some(format!("{text}{place}")));
    }));
}

fn caught<R>(call: impl FnOnce() -> R) -> Result<R, String> {
    catch_unwind(AssertUnwindSafe(call))
        .map_err(|_| LAST_PANIC.take().unwrap_or_else(|| "panic without a message".to_owned()))
}

fn drop_it<T>(why: impl Into<String>) -> PyResult<T> {
    Err(Dropped::new_err(why.into()))
}

fn engine_error(error: raft::Error) -> PyErr {
    match error {
        raft::Error::ProposalDropped => Dropped::new_err(error.to_string()),
        _ => RaftError::new_err(error.to_string()),
    }
}

/// `(term, kind, size, data)` from Python, from index `before + 1` on, as the engine's entries.
fn retained(before: (u64, u64), term: u64, entries: Vec<(u64, i32, u32, Vec<u8>)>) -> PyResult<Vec<Entry>> {
    let mut term_before = before.1;
    let entries = (before.0 + 1..)
        .zip(entries)
        .map(|(index, (term, kind, size, data))| {
            if term < term_before.max(1) {
                return refuse(format!("entry {index} of term {term} after one of term {term_before}"));
            }
            term_before = term;
            match kind {
                0 if data.is_empty() => Ok(normal(index, term, size)),
                2 if size == 0 => decode_change(&data).map(|_| change(index, term, data)),
                _ => {
                    refuse(format!("entry {index} of kind {kind} with size {size} and {} bytes", data.len()))
                }
            }
        })
        .collect::<PyResult<_>>()?;
    if term < term_before {
        return refuse(format!("term {term} is older than the last entry's, {term_before}"));
    }
    Ok(entries)
}

/// Every position in its place, or the engine would panic while it opens.
fn check_positions(hard_state: &HardState, applied: u64, before: (u64, u64), count: usize) -> PyResult<()> {
    if (before.0 == 0) != (before.1 == 0) {
        return refuse(format!("the entry before the first is {before:?}: only index 0 has term 0"));
    }
    if [before.0, before.1, hard_state.term].iter().any(|number| *number > NUMBER_MAX) {
        return refuse("a term or index beyond 2^62");
    }
    let (last, commit) = (before.0 + count as u64, hard_state.commit);
    if !(before.0 <= applied && applied <= commit && commit <= last) {
        return refuse(format!(
            "not in order: before {} <= applied {applied} <= commit {commit} <= last {last}",
            before.0,
        ));
    }
    Ok(())
}

#[pyclass(module = "space_raft_engine")]
pub struct Node {
    /// The engine, or why it is gone.
    raw: Result<Box<Raw>, String>,
    max_message_bytes: u64,
    max_uncommitted_bytes: u64,
    election_timeout: Option<usize>,
    last_ready: u64,
}

impl Node {
    fn enter<R>(&mut self, call: impl FnOnce(&mut Raw) -> PyResult<R>) -> PyResult<R> {
        let raw = match &mut self.raw {
            Ok(raw) => raw,
            Err(why) => return Err(Panic::new_err(format!("unusable since the engine broke: {why}"))),
        };
        caught(|| call(raw)).unwrap_or_else(|why| {
            let error = Panic::new_err(format!("the engine broke an invariant: {why}"));
            self.raw = Err(why);
            Err(error)
        })
    }

    fn run<R>(&mut self, call: impl FnOnce(&mut Raw) -> R) -> PyResult<R> {
        self.enter(|raw| Ok(call(raw)))
    }
}

fn must_lead(raw: &Raw) -> PyResult<()> {
    match raw.raft.state {
        StateRole::Leader => Ok(()),
        role => drop_it(format!("this node is {}, not leader", role_name(role))),
    }
}

/// Proposes entries; the engine numbers them from the index that is returned.
fn propose_entries(raw: &mut Raw, entries: Vec<Entry>) -> PyResult<u64> {
    let first = raw.raft.raft_log.last_index() + 1;
    let mut message = Message { from: raw.raft.id, entries, ..Message::default() };
    message.set_msg_type(MessageType::MsgPropose);
    raw.step(message).map_err(engine_error)?;
    Ok(first)
}

/// What the engine itself would count, were its entries as large as what they stand for.
fn check_uncommitted(raw: &Raw, proposed: u64, max: u64) -> PyResult<()> {
    let log = &raw.raft.raft_log;
    let unstable: u64 = log.unstable_entries().iter().map(|entry| u64::from(size_of(entry))).sum();
    let waiting = raw.store().bytes_after(log.committed) + unstable;
    if max > 0 && waiting > 0 && waiting + proposed > max {
        return drop_it(format!("{waiting} bytes wait to be committed, {proposed} more would exceed {max}"));
    }
    Ok(())
}

/// The members after a change to the present ones, as `Raft::apply_conf_change` computes them.
fn changed_members(raw: &Raw, data: &[u8]) -> PyResult<ConfState> {
    let change = decode_change(data)?;
    let mut changer = Changer::new(raw.raft.prs());
    let changed = if change.leave_joint() {
        changer.leave_joint()
    } else if let Some(auto_leave) = change.enter_joint() {
        changer.enter_joint(auto_leave, &change.changes)
    } else {
        changer.simple(&change.changes)
    };
    changed.map(|(members, _)| members.to_conf_state()).map_err(engine_error)
}

fn message_list(py: Python<'_>, messages: Vec<Message>, max: u64) -> PyResult<Py<PyList>> {
    let list = PyList::empty(py);
    for message in messages {
        for part in split_append(message, max) {
            list.append(values::Message::new(py, &part)?)?;
        }
    }
    Ok(list.unbind())
}

#[pymethods]
impl Node {
    #[new]
    #[pyo3(signature = (*, id, conf_state, term, vote, commit, applied, before, entries, election_tick,
        heartbeat_tick, max_message_bytes, max_inflight, max_uncommitted_bytes=0, pre_vote=true,
        check_quorum=true, batch_append=false))]
    #[allow(clippy::too_many_arguments)] // all by name, and all of them are one node's start
    fn new(
        id: u64,
        conf_state: Members,
        term: u64,
        vote: u64,
        commit: u64,
        applied: u64,
        before: (u64, u64),
        entries: Vec<(u64, i32, u32, Vec<u8>)>,
        election_tick: usize,
        heartbeat_tick: usize,
        max_message_bytes: u64,
        max_inflight: usize,
        max_uncommitted_bytes: u64,
        pre_vote: bool,
        check_quorum: bool,
        batch_append: bool,
    ) -> PyResult<Self> {
        if election_tick > TICKS_MAX || max_inflight > INFLIGHT_MAX {
            return refuse(format!("more than {TICKS_MAX} ticks or {INFLIGHT_MAX} messages in flight"));
        }
        let members = members_to_raft(conf_state);
        check_members(&members)?;
        let hard_state = HardState { term, vote, commit };
        check_positions(&hard_state, applied, before, entries.len())?;
        let entries = retained(before, term, entries)?;
        let config = Config {
            id,
            election_tick,
            heartbeat_tick,
            applied,
            max_size_per_msg: max_message_bytes,
            max_inflight_msgs: max_inflight,
            check_quorum,
            pre_vote,
            batch_append,
            max_committed_size_per_ready: COMMITTED_BYTES_PER_READY,
            ..Config::default()
        };
        config.validate().map_err(engine_error)?;
        let store = Store::new(hard_state, members, before, &entries, applied);
        let logger = slog::Logger::root(slog::Discard, slog::o!());
        let raw = caught(|| RawNode::new(&config, store, &logger)).map_err(Panic::new_err)?;
        Ok(Self {
            raw: Ok(Box::new(raw.map_err(engine_error)?)),
            max_message_bytes,
            max_uncommitted_bytes,
            election_timeout: None,
            last_ready: 0,
        })
    }

    fn tick(&mut self) -> PyResult<()> {
        let timeout = self.election_timeout;
        self.enter(|raw| {
            // The engine draws a new time-out at every change of role, and reads it here only.
            if let Some(ticks) = timeout {
                raw.raft.set_randomized_election_timeout(ticks);
            }
            raw.tick();
            Ok(())
        })
    }

    fn set_election_timeout(&mut self, ticks: usize) -> PyResult<()> {
        let base = self.run(|raw| raw.raft.election_timeout())?;
        if !(base..2 * base).contains(&ticks) {
            return refuse(format!("{ticks} ticks are not within {base}..{}", 2 * base));
        }
        self.election_timeout = Some(ticks);
        Ok(())
    }

    fn step(&mut self, message: &[u8]) -> PyResult<()> {
        self.enter(|raw| {
            let message = decode_message(message)?;
            let kind = message.get_msg_type();
            if message.to != raw.raft.id {
                return refuse(format!("a message for node {} came to node {}", message.to, raw.raft.id));
            }
            if kind == MessageType::MsgSnapshot {
                return refuse("a snapshot is installed by opening a node from it, not by a message");
            }
            // A follower would pass it on with the term it came with, which the engine takes for a bug.
            if kind == MessageType::MsgTransferLeader && raw.raft.state != StateRole::Leader {
                return Ok(());
            }
            match raw.step(message) {
                Ok(()) | Err(raft::Error::StepPeerNotFound) => Ok(()),
                Err(error) => Err(engine_error(error)),
            }
        })
    }

    fn propose(&mut self, sizes: Vec<u32>) -> PyResult<u64> {
        let max = self.max_uncommitted_bytes;
        self.enter(|raw| {
            if sizes.is_empty() || sizes.contains(&0) {
                return refuse("a proposal is of one entry or more, each of one byte or more");
            }
            must_lead(raw)?;
            check_uncommitted(raw, sizes.iter().map(|size| u64::from(*size)).sum(), max)?;
            propose_entries(raw, sizes.into_iter().map(|size| normal(0, 0, size)).collect())
        })
    }

    fn propose_change(&mut self, change: Vec<u8>) -> PyResult<u64> {
        self.enter(|raw| {
            let leave = decode_change(&change)?.changes.is_empty();
            must_lead(raw)?;
            // Each of these the engine would turn into an empty entry, silently.
            if raw.raft.has_pending_conf() {
                return drop_it("another membership change may not be applied yet");
            }
            if leave == raw.raft.prs().conf().to_conf_state().voters_outgoing.is_empty() {
                return drop_it(match leave {
                    true => "there is no joint configuration to leave",
                    false => "the joint configuration must be left first",
                });
            }
            propose_entries(raw, vec![storage::change(0, 0, change)])
        })
    }

    fn preview_change(&mut self, change: &[u8]) -> PyResult<Members> {
        self.enter(|raw| changed_members(raw, change).map(|members| members_to_python(&members)))
    }

    fn apply_change(&mut self, index: u64, change: &[u8]) -> PyResult<Members> {
        self.enter(|raw| {
            let (done, commit) = (raw.store().snapshot_index(), raw.raft.raft_log.committed);
            if index <= done || index > commit.min(raw.raft.raft_log.persisted) {
                return refuse(format!("change {index} is not between applied {done} and commit {commit}"));
            }
            let change = decode_change(change)?;
            let members = raw.apply_conf_change(&change).map_err(engine_error)?;
            let sorted = members_to_python(&members);
            raw.mut_store().change_members(index, members_to_raft(sorted.clone()));
            Ok(sorted)
        })
    }

    fn read_index(&mut self, context: Vec<u8>) -> PyResult<()> {
        if context.is_empty() {
            return refuse("a read needs a context: without one its answer is never recognized");
        }
        self.run(|raw| raw.read_index(context))
    }

    fn campaign(&mut self) -> PyResult<()> {
        self.enter(|raw| {
            // The engine checks this for elections by time-out only.
            if !raw.raft.promotable() {
                return refuse("only a voter can stand for election");
            }
            raw.campaign().map_err(engine_error)
        })
    }

    fn transfer_leader(&mut self, id: u64) -> PyResult<()> {
        self.run(|raw| raw.transfer_leader(id))
    }

    fn report_unreachable(&mut self, id: u64) -> PyResult<()> {
        self.run(|raw| raw.report_unreachable(id))
    }

    fn report_snapshot(&mut self, id: u64, ok: bool) -> PyResult<()> {
        let status = if ok { SnapshotStatus::Finish } else { SnapshotStatus::Failure };
        self.run(|raw| raw.report_snapshot(id, status))
    }

    fn has_ready(&mut self) -> PyResult<bool> {
        self.run(|raw| raw.has_ready())
    }

    fn ready(&mut self, py: Python<'_>) -> PyResult<Ready> {
        let max = self.max_message_bytes;
        let ready = self.enter(|raw| {
            let mut ready = raw.ready();
            assert!(ready.snapshot().is_empty(), "a snapshot got past step()");
            let entries = ready.take_entries();
            // Before the engine lets go of them: from then on it reads them here.
            raw.mut_store().append(&entries);
            let reads = PyList::empty(py);
            for read in ready.take_read_states() {
                reads.append((read.index, PyBytes::new(py, &read.request_ctx)))?;
            }
            let value = Ready {
                number: ready.number(),
                must_sync: ready.must_sync(),
                hard_state: ready.hs().map(|hard| (hard.term, hard.vote, hard.commit)),
                entries: entry_list(py, &entries)?,
                messages: message_list(py, ready.take_messages(), max)?,
                persisted_messages: message_list(py, ready.take_persisted_messages(), max)?,
                committed: entry_list(py, ready.committed_entries())?,
                reads: reads.unbind(),
                soft_state: ready.ss().map(|soft| (soft.leader_id, role_name(soft.raft_state))),
            };
            raw.advance_append_async(ready);
            Ok(value)
        })?;
        self.last_ready = ready.number;
        Ok(ready)
    }

    fn on_persist_ready(&mut self, number: u64) -> PyResult<()> {
        let last = self.last_ready;
        self.enter(|raw| {
            if number > last {
                return refuse(format!("ready {number} was not handed out, the last one was {last}"));
            }
            raw.on_persist_ready(number);
            Ok(())
        })
    }

    fn advance_apply_to(&mut self, index: u64) -> PyResult<()> {
        self.enter(|raw| {
            let log = &raw.raft.raft_log;
            let (applied, end) = (log.applied, log.committed.min(log.persisted));
            if index < applied || index > end {
                return refuse(format!("applied {index} is not between {applied} and {end}"));
            }
            raw.mut_store().move_snapshot(index);
            raw.advance_apply_to(index);
            Ok(())
        })
    }

    fn compact(&mut self, index: u64) -> PyResult<()> {
        self.enter(|raw| {
            let applied = raw.raft.raft_log.applied;
            if index > applied {
                return refuse(format!("entry {index} is not applied yet, the last applied is {applied}"));
            }
            raw.mut_store().compact(index);
            Ok(())
        })
    }

    fn term_at(&mut self, index: u64) -> PyResult<Option<u64>> {
        self.run(|raw| {
            let log = &raw.raft.raft_log;
            let retained = log.first_index() - 1..=log.last_index();
            retained.contains(&index).then(|| log.term(index).ok()).flatten()
        })
    }

    fn status(&mut self, py: Python<'_>) -> PyResult<Status> {
        self.enter(|raw| Status::new(py, raw))
    }

    #[getter]
    fn id(&mut self) -> PyResult<u64> {
        self.run(|raw| raw.raft.id)
    }

    #[getter]
    fn term(&mut self) -> PyResult<u64> {
        self.run(|raw| raw.raft.term)
    }

    #[getter]
    fn vote(&mut self) -> PyResult<u64> {
        self.run(|raw| raw.raft.vote)
    }

    #[getter]
    fn commit(&mut self) -> PyResult<u64> {
        self.run(|raw| raw.raft.raft_log.committed)
    }

    #[getter]
    fn applied(&mut self) -> PyResult<u64> {
        self.run(|raw| raw.raft.raft_log.applied)
    }

    #[getter]
    fn last_index(&mut self) -> PyResult<u64> {
        self.run(|raw| raw.raft.raft_log.last_index())
    }

    #[getter]
    fn first_index(&mut self) -> PyResult<u64> {
        self.run(|raw| raw.raft.raft_log.first_index())
    }

    #[getter]
    fn leader_id(&mut self) -> PyResult<u64> {
        self.run(|raw| raw.raft.leader_id)
    }

    #[getter]
    fn role(&mut self) -> PyResult<&'static str> {
        self.run(|raw| role_name(raw.raft.state))
    }

    #[getter]
    fn conf_state(&mut self) -> PyResult<Members> {
        self.run(|raw| members_to_python(&raw.raft.prs().conf().to_conf_state()))
    }

    #[getter]
    fn has_pending_change(&mut self) -> PyResult<bool> {
        self.run(|raw| raw.raft.has_pending_conf())
    }
}

//! What Python gets to see: frozen values, built once, their lists included.

use prost::Message as _;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList};
use raft::eraftpb::{self, Entry, MessageType};
use raft::{ProgressState, RawNode, StateRole};

use crate::storage::{size_of, Store};
use crate::wire::{members_to_python, Members};

pub fn role_name(role: StateRole) -> &'static str {
    match role {
        StateRole::Follower => "follower",
        StateRole::PreCandidate => "precandidate",
        StateRole::Candidate => "candidate",
        StateRole::Leader => "leader",
    }
}

/// Entries as (index, term, kind, size, data).
pub fn entry_list(py: Python<'_>, entries: &[Entry]) -> PyResult<Py<PyList>> {
    let nothing = PyBytes::new(py, b"");
    let list = PyList::empty(py);
    for entry in entries {
        let data = match entry.entry_type {
            0 => nothing.clone(),
            _ => PyBytes::new(py, &entry.data),
        };
        list.append((entry.index, entry.term, entry.entry_type, size_of(entry), data))?;
    }
    Ok(list.unbind())
}

/// Entries of an append as (term, size); other messages have none to speak of.
fn append_list(py: Python<'_>, message: &eraftpb::Message) -> PyResult<(u64, Py<PyList>)> {
    let list = PyList::empty(py);
    if message.get_msg_type() != MessageType::MsgAppend {
        return Ok((0, list.unbind()));
    }
    for entry in &message.entries {
        list.append((entry.term, size_of(entry)))?;
    }
    Ok((message.index + 1, list.unbind()))
}

#[pyclass(frozen, get_all, module = "space_raft_engine")]
pub struct Ready {
    pub number: u64,
    pub must_sync: bool,
    pub hard_state: Option<(u64, u64, u64)>,
    pub entries: Py<PyList>,
    pub messages: Py<PyList>,
    pub persisted_messages: Py<PyList>,
    pub committed: Py<PyList>,
    pub reads: Py<PyList>,
    pub soft_state: Option<(u64, &'static str)>,
}

#[pyclass(frozen, get_all, module = "space_raft_engine")]
pub struct Message {
    to: u64,
    kind: &'static str,
    data: Py<PyBytes>,
    first: u64,
    entries: Py<PyList>,
}

impl Message {
    pub fn new(py: Python<'_>, message: &eraftpb::Message) -> PyResult<Self> {
        let (first, entries) = append_list(py, message)?;
        let data = PyBytes::new_with(py, message.encoded_len(), |mut buffer| {
            message.encode(&mut buffer).expect("the buffer has the length that was asked for");
            Ok(())
        })?;
        let kind = message.get_msg_type().as_str_name();
        Ok(Self { to: message.to, kind, data: data.unbind(), first, entries })
    }
}

#[pyclass(frozen, get_all, module = "space_raft_engine")]
pub struct Description {
    kind: &'static str,
    sender: u64,
    to: u64,
    term: u64,
    first: u64,
    entries: Py<PyList>,
    snapshot: Option<(u64, u64, Members)>,
}

impl Description {
    pub fn new(py: Python<'_>, message: &eraftpb::Message) -> PyResult<Self> {
        let (first, entries) = append_list(py, message)?;
        let snapshot = message.snapshot.as_ref().map(|snapshot| {
            let metadata = snapshot.get_metadata();
            (metadata.index, metadata.term, members_to_python(metadata.get_conf_state()))
        });
        let kind = message.get_msg_type().as_str_name();
        Ok(Self { kind, sender: message.from, to: message.to, term: message.term, first, entries, snapshot })
    }
}

#[pyclass(frozen, get_all, module = "space_raft_engine")]
pub struct Status {
    role: &'static str,
    term: u64,
    vote: u64,
    commit: u64,
    applied: u64,
    last_index: u64,
    leader_id: u64,
    progress: Py<PyDict>,
}

impl Status {
    pub fn new(py: Python<'_>, raw: &RawNode<Store>) -> PyResult<Self> {
        let raft = &raw.raft;
        let progress = PyDict::new(py);
        if raft.state == StateRole::Leader {
            for (id, peer) in raft.prs().iter() {
                let state = match peer.state {
                    ProgressState::Probe => "probe",
                    ProgressState::Replicate => "replicate",
                    ProgressState::Snapshot => "snapshot",
                };
                let row = (peer.matched, peer.next_idx, state, peer.recent_active, peer.pending_snapshot);
                progress.set_item(id, row)?;
            }
        }
        Ok(Self {
            role: role_name(raft.state),
            term: raft.term,
            vote: raft.vote,
            commit: raft.raft_log.committed,
            applied: raft.raft_log.applied,
            last_index: raft.raft_log.last_index(),
            leader_id: raft.leader_id,
            progress: progress.unbind(),
        })
    }
}

//! Bytes from outside: decoded, and refused unless the engine can take them without breaking an invariant.
//!
//! The engine trusts its peers: an unknown enumerator, a gap between entries or a request without its entry
//! would panic inside it.  All of that is an error of the sender here, before the engine sees the message.

use std::collections::HashSet;

use prost::Message as _;
use pyo3::PyResult;
use raft::eraftpb::{
    ConfChangeSingle, ConfChangeTransition, ConfChangeType, ConfChangeV2, ConfState, Entry, EntryType,
    Message, MessageType,
};

use crate::storage::size_of;
use crate::RaftError;

/// Python's view of the members: voters, learners, voters_outgoing, learners_next, auto_leave.
pub type Members = (Vec<u64>, Vec<u64>, Vec<u64>, Vec<u64>, bool);

/// Terms and indexes above this are refused: sums of a few of those below cannot overflow.
pub const NUMBER_MAX: u64 = 1 << 62;

/// Refuses, with a sentence that says why.
pub fn refuse<T>(why: impl Into<String>) -> PyResult<T> {
    Err(RaftError::new_err(why.into()))
}

pub fn decode_message(data: &[u8]) -> PyResult<Message> {
    let message = match Message::decode(data) {
        Ok(message) => message,
        Err(error) => return refuse(format!("not a raft message: {error}")),
    };
    check_message(&message)?;
    Ok(message)
}

fn check_message(message: &Message) -> PyResult<()> {
    use MessageType::*;
    let kind = match MessageType::from_i32(message.msg_type) {
        Some(MsgHup | MsgBeat | MsgUnreachable | MsgSnapStatus | MsgCheckQuorum) => {
            return refuse("a message that never leaves its node came from outside");
        }
        // The engine would forward it, and with it the question of who retries.
        Some(MsgPropose) => return refuse("proposals are taken by the leader only, never from the network"),
        Some(kind) => kind,
        None => return refuse(format!("message type {} is unknown", message.msg_type)),
    };
    if message.from == 0 || message.to == 0 {
        return refuse("a message without a sender or an addressee");
    }
    // Term 0 means "from this very node" to the engine; only a forwarded read has none on the wire.
    if (message.term == 0) != (kind == MsgReadIndex) {
        return refuse(format!("{} with term {}", kind.as_str_name(), message.term));
    }
    let numbers = [
        message.term,
        message.log_term,
        message.index,
        message.commit,
        message.commit_term,
        message.reject_hint,
    ];
    if numbers.iter().any(|number| *number > NUMBER_MAX) {
        return refuse("a term or index beyond 2^62");
    }
    if message.request_snapshot != 0 {
        return refuse("snapshots on request are not part of this protocol");
    }
    if (kind == MsgSnapshot) != message.snapshot.is_some() {
        return refuse(format!("{} with or without a snapshot", kind.as_str_name()));
    }
    match kind {
        MsgAppend => check_append(message),
        MsgSnapshot => check_snapshot(message),
        MsgReadIndex | MsgReadIndexResp => check_read(message),
        _ => Ok(()),
    }?;
    if !message.entries.is_empty() && !matches!(kind, MsgAppend | MsgReadIndex | MsgReadIndexResp) {
        return refuse(format!("{} with entries", kind.as_str_name()));
    }
    Ok(())
}

fn check_append(message: &Message) -> PyResult<()> {
    // The engine takes any index beyond its log for one of term 0, so (5, 0) would fit an empty log.
    if (message.index == 0) != (message.log_term == 0) {
        return refuse("an append after an entry that cannot exist");
    }
    let (mut index, mut term) = (message.index, message.log_term);
    for entry in &message.entries {
        if entry.index != index + 1 || entry.term < term.max(1) || entry.term > message.term {
            return refuse(format!(
                "entry ({}, {}) of term {} after ({index}, {term})",
                entry.index, entry.term, message.term,
            ));
        }
        check_entry(entry)?;
        (index, term) = (entry.index, entry.term);
    }
    Ok(())
}

fn check_entry(entry: &Entry) -> PyResult<()> {
    if !entry.context.is_empty() {
        return refuse(format!("entry {} with a context", entry.index));
    }
    match EntryType::from_i32(entry.entry_type) {
        Some(EntryType::EntryNormal) if entry.data.is_empty() || size_of(entry) > 0 => Ok(()),
        Some(EntryType::EntryNormal) => refuse(format!("entry {} without a descriptor", entry.index)),
        Some(EntryType::EntryConfChangeV2) => decode_change(&entry.data).map(|_| ()),
        _ => refuse(format!("entry {} of kind {}", entry.index, entry.entry_type)),
    }
}

fn check_snapshot(message: &Message) -> PyResult<()> {
    let snapshot = message.get_snapshot();
    let metadata = snapshot.get_metadata();
    if !snapshot.data.is_empty() || metadata.index == 0 || metadata.term == 0 {
        return refuse("a snapshot with data, or of nothing");
    }
    if metadata.index > NUMBER_MAX || metadata.term > message.term {
        return refuse(format!("a snapshot of ({}, {})", metadata.index, metadata.term));
    }
    check_members(metadata.get_conf_state())
}

fn check_read(message: &Message) -> PyResult<()> {
    match &message.entries[..] {
        [entry] if entry.entry_type == 0 && !entry.data.is_empty() => Ok(()),
        _ => refuse("a read without its one context"),
    }
}

/// Members that can be: each once in its role, and joint or not joint as a whole.
pub fn check_members(members: &ConfState) -> PyResult<()> {
    let lists = [&members.voters, &members.learners, &members.voters_outgoing, &members.learners_next];
    let [voters, learners, outgoing, next] = lists.map(|ids| ids.iter().copied().collect::<HashSet<u64>>());
    if lists.iter().any(|ids| ids.contains(&0)) {
        return refuse("node id 0 stands for nobody");
    }
    if lists.iter().map(|ids| ids.len()).sum::<usize>()
        != voters.len() + learners.len() + outgoing.len() + next.len()
    {
        return refuse("a member is named twice in one role");
    }
    if voters.is_empty() && !(learners.is_empty() && outgoing.is_empty()) {
        return refuse("members without a voter");
    }
    if !learners.is_disjoint(&voters) || !learners.is_disjoint(&outgoing) {
        return refuse("a learner that is a voter too");
    }
    if !next.is_subset(&outgoing) || !next.is_disjoint(&voters) {
        return refuse("a learner-to-be that is not an outgoing voter only");
    }
    if outgoing.is_empty() && members.auto_leave {
        return refuse("members that leave a joint configuration without being in one");
    }
    Ok(())
}

pub fn members_to_raft((voters, learners, voters_outgoing, learners_next, auto_leave): Members) -> ConfState {
    ConfState { voters, learners, voters_outgoing, learners_next, auto_leave }
}

/// Sorted: the engine keeps sets, whose order says nothing.
pub fn members_to_python(members: &ConfState) -> Members {
    let sorted = |ids: &Vec<u64>| {
        let mut ids = ids.clone();
        ids.sort_unstable();
        ids
    };
    (
        sorted(&members.voters),
        sorted(&members.learners),
        sorted(&members.voters_outgoing),
        sorted(&members.learners_next),
        members.auto_leave,
    )
}

pub fn decode_change(data: &[u8]) -> PyResult<ConfChangeV2> {
    let change = match ConfChangeV2::decode(data) {
        Ok(change) => change,
        Err(error) => return refuse(format!("not a membership change: {error}")),
    };
    if ConfChangeTransition::from_i32(change.transition).is_none() {
        return refuse(format!("membership change with transition {}", change.transition));
    }
    for single in &change.changes {
        if single.node_id == 0 || ConfChangeType::from_i32(single.change_type).is_none() {
            return refuse(format!("membership change {} of node {}", single.change_type, single.node_id));
        }
    }
    Ok(change)
}

pub fn encode_change(changes: &[(String, u64)], transition: &str, context: Vec<u8>) -> PyResult<Vec<u8>> {
    let transition = match transition {
        "auto" => ConfChangeTransition::Auto,
        "implicit" => ConfChangeTransition::Implicit,
        "explicit" => ConfChangeTransition::Explicit,
        _ => return refuse(format!("transition {transition:?} is none of auto, implicit, explicit")),
    } as i32;
    let changes = changes
        .iter()
        .map(|(what, node_id)| {
            let change_type = match what.as_str() {
                _ if *node_id == 0 => return refuse("node id 0 stands for nobody"),
                "add" => ConfChangeType::AddNode,
                "learner" => ConfChangeType::AddLearnerNode,
                "remove" => ConfChangeType::RemoveNode,
                _ => return refuse(format!("change {what:?} is none of add, learner, remove")),
            } as i32;
            Ok(ConfChangeSingle { change_type, node_id: *node_id })
        })
        .collect::<PyResult<_>>()?;
    Ok(ConfChangeV2 { transition, changes, context }.encode_to_vec())
}

/// What `encode_change` was given.
pub fn explain_change(change: &ConfChangeV2) -> (Vec<(&'static str, u64)>, &'static str) {
    let changes = change.changes.iter().map(|single| {
        let what = match single.get_change_type() {
            ConfChangeType::AddNode => "add",
            ConfChangeType::AddLearnerNode => "learner",
            ConfChangeType::RemoveNode => "remove",
        };
        (what, single.node_id)
    });
    let transition = match change.get_transition() {
        ConfChangeTransition::Auto => "auto",
        ConfChangeTransition::Implicit => "implicit",
        ConfChangeTransition::Explicit => "explicit",
    };
    (changes.collect(), transition)
}

/// The same append as messages of at most `max` real bytes each, or one entry.
///
/// The engine asks the storage for entries with this limit, but takes those that no `Ready` has handed out
/// yet from its own memory, where they weigh four bytes each.  A cut append is two appends: the second
/// follows the first one's last entry, as if the engine had sent them one after the other.
pub fn split_append(mut message: Message, max: u64) -> Vec<Message> {
    let mut parts = Vec::with_capacity(1);
    while let Some(cut) = cut_point(&message.entries, max) {
        let entries = message.entries.split_off(cut);
        let last = &message.entries[cut - 1];
        let next = Message {
            msg_type: message.msg_type,
            to: message.to,
            from: message.from,
            term: message.term,
            commit: message.commit,
            index: last.index,
            log_term: last.term,
            entries,
            ..Message::default()
        };
        parts.push(std::mem::replace(&mut message, next));
    }
    parts.push(message);
    parts
}

fn cut_point(entries: &[Entry], max: u64) -> Option<usize> {
    let mut bytes = 0;
    entries.iter().enumerate().position(|(at, entry)| {
        bytes += u64::from(size_of(entry));
        at > 0 && bytes > max
    })
}

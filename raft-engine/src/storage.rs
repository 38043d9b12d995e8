//! What the engine may ask of the log: terms, sizes and membership changes, all in memory.
//!
//! The bytes of an entry live in the write-ahead log; here a normal entry is its term and the size of those
//! bytes.  Entries are made up again when the engine asks for them, with the size (u32, little-endian) as
//! their data.  Limits given in bytes count those sizes, not the few bytes the entry has on the wire.

use std::collections::{BTreeMap, VecDeque};

use raft::eraftpb::{ConfState, Entry, EntryType, HardState, Snapshot};
use raft::{Error, GetEntriesContext, RaftState, Result, Storage, StorageError};

/// Size of the bytes an entry stands for: 0 for what a new leader proposes and for membership changes.
pub fn size_of(entry: &Entry) -> u32 {
    if entry.entry_type != EntryType::EntryNormal as i32 {
        return 0;
    }
    <[u8; 4]>::try_from(&entry.data[..]).map_or(0, u32::from_le_bytes)
}

/// A normal entry that stands for `size` bytes, or the empty one for 0.
pub fn normal(index: u64, term: u64, size: u32) -> Entry {
    let data = if size == 0 { Vec::new() } else { size.to_le_bytes().to_vec() };
    Entry { index, term, data, ..Entry::default() }
}

/// A membership change.
pub fn change(index: u64, term: u64, data: Vec<u8>) -> Entry {
    Entry { entry_type: EntryType::EntryConfChangeV2 as i32, index, term, data, ..Entry::default() }
}

struct Slot {
    term: u64,
    /// Bytes of all entries up to and including this one, from an origin nobody asks for: the bytes of any
    /// range are one subtraction.
    through: u64,
}

pub struct Store {
    hard_state: HardState,
    conf_state: ConfState,
    before: (u64, u64),
    before_through: u64,
    slots: VecDeque<Slot>,
    changes: BTreeMap<u64, Vec<u8>>,
    snapshot: (u64, u64),
}

impl Store {
    pub fn new(
        hard_state: HardState,
        conf_state: ConfState,
        before: (u64, u64),
        entries: &[Entry],
        applied: u64,
    ) -> Self {
        let mut store = Self {
            hard_state,
            conf_state,
            before,
            before_through: 0,
            slots: VecDeque::with_capacity(entries.len()),
            changes: BTreeMap::new(),
            snapshot: before,
        };
        store.append(entries);
        store.move_snapshot(applied);
        store
    }

    pub fn first(&self) -> u64 {
        self.before.0 + 1
    }

    pub fn last(&self) -> u64 {
        self.before.0 + self.slots.len() as u64
    }

    pub fn snapshot_index(&self) -> u64 {
        self.snapshot.0
    }

    /// Real bytes of the stored entries after `index`.
    pub fn bytes_after(&self, index: u64) -> u64 {
        self.through(self.last()) - self.through(index.clamp(self.before.0, self.last()))
    }

    /// Takes entries, which replace those stored from their first index on.
    pub fn append(&mut self, entries: &[Entry]) {
        let Some(first) = entries.first() else { return };
        assert!(
            (self.first()..=self.last() + 1).contains(&first.index),
            "entry {} does not follow {}..={}",
            first.index,
            self.first(),
            self.last(),
        );
        self.slots.truncate((first.index - self.first()) as usize);
        self.changes.split_off(&first.index);
        for entry in entries {
            let through = self.through(self.last()) + u64::from(size_of(entry));
            self.slots.push_back(Slot { term: entry.term, through });
            if entry.entry_type == EntryType::EntryConfChangeV2 as i32 {
                self.changes.insert(entry.index, entry.data.clone());
            }
        }
    }

    /// Forgets entries up to and including `index`, except the last one's term.
    pub fn compact(&mut self, index: u64) {
        if index < self.first() {
            return;
        }
        let forgotten = (index - self.before.0) as usize;
        let last = self.slots.drain(..forgotten).next_back().expect("index is retained");
        self.before = (index, last.term);
        self.before_through = last.through;
        self.changes = self.changes.split_off(&(index + 1));
    }

    /// A snapshot is of `index` from now on.  Never backwards: an older index would not fit the members.
    pub fn move_snapshot(&mut self, index: u64) {
        if index > self.snapshot.0 {
            self.snapshot = (index, self.term_of(index).expect("what is applied is retained"));
        }
    }

    /// The members changed at `index`, which is what a snapshot is of from now on.
    pub fn change_members(&mut self, index: u64, conf_state: ConfState) {
        self.move_snapshot(index);
        self.conf_state = conf_state;
    }

    fn slot(&self, index: u64) -> Option<&Slot> {
        self.slots.get(index.checked_sub(self.first())? as usize)
    }

    fn through(&self, index: u64) -> u64 {
        self.slot(index).map_or(self.before_through, |slot| slot.through)
    }

    fn term_of(&self, index: u64) -> Option<u64> {
        if index == self.before.0 {
            Some(self.before.1)
        } else {
            self.slot(index).map(|slot| slot.term)
        }
    }

    fn entry(&self, index: u64, slot: &Slot) -> Entry {
        match self.changes.get(&index) {
            Some(data) => change(index, slot.term, data.clone()),
            None => normal(index, slot.term, (slot.through - self.through(index - 1)) as u32),
        }
    }
}

impl Storage for Store {
    fn initial_state(&self) -> Result<RaftState> {
        Ok(RaftState::new(self.hard_state.clone(), self.conf_state.clone()))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _context: GetEntriesContext,
    ) -> Result<Vec<Entry>> {
        if low < self.first() {
            return Err(Error::Store(StorageError::Compacted));
        }
        if high > self.last() + 1 {
            return Err(Error::Store(StorageError::Unavailable));
        }
        let max = max_size.into().unwrap_or(u64::MAX);
        let start = self.through(low - 1);
        let range = (low - self.first()) as usize..(high - self.first()) as usize;
        Ok((low..)
            .zip(self.slots.range(range))
            .take_while(|(index, slot)| *index == low || slot.through - start <= max)
            .map(|(index, slot)| self.entry(index, slot))
            .collect())
    }

    fn term(&self, index: u64) -> Result<u64> {
        let missing = if index < self.before.0 { StorageError::Compacted } else { StorageError::Unavailable };
        self.term_of(index).ok_or(Error::Store(missing))
    }

    fn first_index(&self) -> Result<u64> {
        Ok(self.first())
    }

    fn last_index(&self) -> Result<u64> {
        Ok(self.last())
    }

    /// Describes the state as applied, with the members of that index; the state itself travels elsewhere.
    fn snapshot(&self, request_index: u64, _to: u64) -> Result<Snapshot> {
        if self.snapshot.0 == 0 || self.snapshot.0 < request_index {
            return Err(Error::Store(StorageError::SnapshotTemporarilyUnavailable));
        }
        let mut snapshot = Snapshot::default();
        let metadata = snapshot.mut_metadata();
        (metadata.index, metadata.term) = self.snapshot;
        metadata.set_conf_state(self.conf_state.clone());
        Ok(snapshot)
    }
}

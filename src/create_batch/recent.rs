//! What this gateway has lately learned about external ids: Catalog may not
//! show a new batch at once. Bounded in number, size and time.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use prost::Message;
use tokio::time::Instant;

use crate::{
    call::{attempt::Attempt, external_id::ExternalId},
    proto::v1::Batch,
};

/// How long something is remembered. Nothing documents how far Catalog lags.
const REMEMBERED: Duration = Duration::from_secs(10 * 60);

/// The most that is remembered, in bytes, roughly.
const CAPACITY: usize = 16 * 1024 * 1024;

/// What the maps themselves take for an entry, roughly.
const OVERHEAD: usize = 256;

/// How the last call with an external id ended here.
#[derive(Clone, Debug)]
pub(super) enum LastResult {
    /// It made this batch.
    Created {
        /// The batch.
        batch: Arc<Batch>,
        /// For whom: [`crate::credentials::principal`].
        principal: u64,
    },
    /// This attempt created nothing, and no earlier attempt can still do so.
    NotApplied(Attempt),
    /// It may have made one, until this moment.
    Unknown(Instant),
}

/// The memory.
#[derive(Debug, Default)]
pub(super) struct RecentResults(Mutex<Entries>);

#[derive(Debug, Default)]
struct Entries {
    known: HashMap<ExternalId, (LastResult, u64)>,
    /// The oldest first; an entry that was renewed has a newer number.
    order: VecDeque<(Instant, ExternalId, u64, usize)>,
    next: u64,
    size: usize,
}

impl RecentResults {
    /// Remembers how a call ended.
    pub(super) fn insert(&self, id: ExternalId, known: LastResult) {
        let size = OVERHEAD
            + 2 * (id.organization.len() + id.sandbox.len() + id.id.len())
            + match &known {
                LastResult::Created { batch, .. } => 2 * batch.encoded_len(),
                _ => 0,
            };
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let number = entries.next;
        entries.next += 1;
        entries.size += size;
        entries.known.insert(id.clone(), (known, number));
        let now = Instant::now();
        entries
            .order
            .push_back((now + REMEMBERED, id, number, size));
        entries.evict(now);
    }

    /// How the last call with this id ended.
    pub(super) fn get(&self, id: &ExternalId) -> Option<LastResult> {
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        entries.evict(Instant::now());
        entries.known.get(id).map(|(known, _)| known.clone())
    }
}

impl Entries {
    /// Drops what is too old or too much.
    fn evict(&mut self, now: Instant) {
        while let Some((until, _, _, _)) = self.order.front() {
            if *until > now && self.size <= CAPACITY {
                return;
            }
            if let Some((_, id, number, size)) = self.order.pop_front() {
                self.size -= size;
                if self
                    .known
                    .get(&id)
                    .is_some_and(|(_, newest)| *newest == number)
                {
                    self.known.remove(&id);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(id: &str) -> ExternalId {
        ExternalId {
            organization: b"org".to_vec(),
            sandbox: b"prod".to_vec(),
            id: id.to_owned(),
        }
    }

    fn created(batch: Batch) -> LastResult {
        let batch = Arc::new(batch);
        LastResult::Created {
            batch,
            principal: 0,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_newest_counts_and_time_ends_it() {
        let recent = RecentResults::default();
        recent.insert(id("a"), LastResult::NotApplied(Attempt::default()));
        tokio::time::advance(REMEMBERED / 2).await;
        recent.insert(id("a"), created(Batch::default()));
        tokio::time::advance(REMEMBERED / 2).await;
        assert!(matches!(
            recent.get(&id("a")),
            Some(LastResult::Created { .. })
        ));
        assert!(recent.get(&id("b")).is_none());
        tokio::time::advance(REMEMBERED / 2).await;
        assert!(recent.get(&id("a")).is_none());
        assert_eq!(recent.0.lock().expect("a lock").size, 0);
    }

    #[tokio::test]
    async fn it_is_bounded() {
        let recent = RecentResults::default();
        let large = Batch {
            id: "x".repeat(512 * 1024),
            ..Default::default()
        };
        for number in 0..100 {
            recent.insert(id(&number.to_string()), created(large.clone()));
        }
        let entries = recent.0.lock().expect("a lock");
        assert!(entries.size <= CAPACITY);
        assert!(entries.known.len() < 20);
        assert_eq!(entries.known.len(), entries.order.len());
    }
}

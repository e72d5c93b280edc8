//! What this gateway has lately learned about external ids: Catalog may not
//! show a new batch at once. Bounded in number, size and time.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use prost::Message;
use tokio::time::Instant;

use crate::{attempts::Attempt, proto::v1::Batch};

/// How long something is remembered. Nothing documents how far Catalog lags.
const REMEMBERED: Duration = Duration::from_secs(10 * 60);

/// The most that is remembered, in bytes, roughly.
const CAPACITY: usize = 16 * 1024 * 1024;

/// What the maps themselves take for an entry, roughly.
const OVERHEAD: usize = 256;

/// An external id, and where it counts.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ExternalId {
    /// `x-gw-ims-org-id`.
    pub organization: Vec<u8>,
    /// `x-sandbox-name`.
    pub sandbox: Vec<u8>,
    /// The id.
    pub id: String,
}

/// How the last call with an external id ended here.
#[derive(Clone, Debug)]
pub enum Known {
    /// It made this batch.
    Created {
        /// The batch.
        batch: Arc<Batch>,
        /// For whom: [`crate::credentials::fingerprint`].
        caller: u64,
    },
    /// It made none, in this try, and no earlier try of the call was under way.
    NotCreated(Attempt),
    /// It may have made one, until this moment.
    Unknown(Instant),
}

/// The memory.
#[derive(Debug, Default)]
pub struct Recent(Mutex<Entries>);

#[derive(Debug, Default)]
struct Entries {
    known: HashMap<ExternalId, (Known, u64)>,
    /// The oldest first; an entry that was renewed has a newer number.
    order: VecDeque<(Instant, ExternalId, u64, usize)>,
    next: u64,
    size: usize,
}

impl Recent {
    /// Remembers how a call ended.
    pub fn remember(&self, id: ExternalId, known: Known) {
        let size = OVERHEAD
            + 2 * (id.organization.len() + id.sandbox.len() + id.id.len())
            + match &known {
                Known::Created { batch, .. } => 2 * batch.encoded_len(),
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
        entries.forget(now);
    }

    /// How the last call with this id ended.
    pub fn get(&self, id: &ExternalId) -> Option<Known> {
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        entries.forget(Instant::now());
        entries.known.get(id).map(|(known, _)| known.clone())
    }
}

impl Entries {
    /// Drops what is too old or too much.
    fn forget(&mut self, now: Instant) {
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

    fn created(batch: Batch) -> Known {
        let batch = Arc::new(batch);
        Known::Created { batch, caller: 0 }
    }

    #[tokio::test(start_paused = true)]
    async fn the_newest_counts_and_time_ends_it() {
        let recent = Recent::default();
        recent.remember(id("a"), Known::NotCreated(Attempt::default()));
        tokio::time::advance(REMEMBERED / 2).await;
        recent.remember(id("a"), created(Batch::default()));
        tokio::time::advance(REMEMBERED / 2).await;
        assert!(matches!(recent.get(&id("a")), Some(Known::Created { .. })));
        assert!(recent.get(&id("b")).is_none());
        tokio::time::advance(REMEMBERED / 2).await;
        assert!(recent.get(&id("a")).is_none());
        assert_eq!(recent.0.lock().expect("a lock").size, 0);
    }

    #[tokio::test]
    async fn it_is_bounded() {
        let recent = Recent::default();
        let large = Batch {
            id: "x".repeat(512 * 1024),
            ..Default::default()
        };
        for number in 0..100 {
            recent.remember(id(&number.to_string()), created(large.clone()));
        }
        let entries = recent.0.lock().expect("a lock");
        assert!(entries.size <= CAPACITY);
        assert!(entries.known.len() < 20);
        assert_eq!(entries.known.len(), entries.order.len());
    }
}

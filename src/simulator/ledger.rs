//! The batches that were created.

use std::collections::{HashMap, VecDeque};

use serde_json::Value;
use tokio::time::Instant;

use super::REMEMBERED;

#[derive(Debug, Default)]
pub(super) struct Ledger {
    /// With the moment from which Catalog shows them.
    batches: VecDeque<(Instant, Value)>,
    /// How many were forgotten: the number of the first in `batches`.
    forgotten: usize,
    /// The numbers of the batches with an external id: a look-up does not pass
    /// through all of them.
    by_external_id: HashMap<String, Vec<usize>>,
}

impl Ledger {
    pub(super) fn add(&mut self, visible: Instant, batch: Value) {
        if self.batches.len() == REMEMBERED {
            self.forget_the_oldest();
        }
        let number = self.forgotten + self.batches.len();
        if let Some(id) = batch["externalId"].as_str() {
            self.by_external_id
                .entry(id.to_owned())
                .or_default()
                .push(number);
        }
        self.batches.push_back((visible, batch));
    }

    fn forget_the_oldest(&mut self) {
        let Some((_, batch)) = self.batches.pop_front() else {
            return;
        };
        let id = batch["externalId"].as_str().unwrap_or_default();
        if let Some(numbers) = self.by_external_id.get_mut(id) {
            numbers.retain(|number| *number != self.forgotten);
            if numbers.is_empty() {
                self.by_external_id.remove(id);
            }
        }
        self.forgotten += 1;
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Value> {
        self.batches.iter().map(|(_, batch)| batch)
    }

    /// What Catalog shows now; with an external id, only batches that have it.
    pub(super) fn visible(&self, external_id: Option<&str>) -> Vec<&Value> {
        let now = Instant::now();
        let stored: Vec<_> = match external_id {
            None => self.batches.iter().collect(),
            Some(id) => {
                let numbers = self.by_external_id.get(id).into_iter().flatten();
                numbers
                    .filter_map(|number| self.batches.get(number - self.forgotten))
                    .collect()
            }
        };
        let visible = stored.into_iter().filter(|(from, _)| *from <= now);
        visible.map(|(_, batch)| batch).collect()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_batch_is_found_by_its_external_id_until_it_is_forgotten() {
        let mut ledger = Ledger::default();
        let now = Instant::now();
        for number in 0..REMEMBERED + 3 {
            let id = (number / 2).to_string(); // each id twice
            ledger.add(now, json!({ "externalId": id, "number": number }));
        }
        let found = |id: &str| ledger.visible(Some(id)).len();
        assert_eq!(["0", "1", "2", "unknown"].map(found), [0, 1, 2, 0]);
        assert_eq!(ledger.all().count(), REMEMBERED);
        assert_eq!(ledger.by_external_id.len(), REMEMBERED / 2 + 1);

        let later = now + std::time::Duration::from_secs(60);
        ledger.add(later, json!({ "externalId": "later" }));
        assert!(ledger.visible(Some("later")).is_empty());
    }
}

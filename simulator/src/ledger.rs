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
    /// The numbers of the batches by id and by external id, so that lookups do
    /// not pass through all of them.
    by_id: HashMap<String, usize>,
    by_external_id: HashMap<String, Vec<usize>>,
}

impl Ledger {
    pub(super) fn add(&mut self, visible: Instant, batch: Value) {
        if self.batches.len() == REMEMBERED {
            self.forget_the_oldest();
        }
        let number = self.forgotten + self.batches.len();
        if let Some(id) = batch["id"].as_str() {
            self.by_id.insert(id.to_owned(), number);
        }
        self.index(number, &batch);
        self.batches.push_back((visible, batch));
    }

    /// Changes a batch as a JSON merge patch says (RFC 7396), but not its id.
    pub(super) fn patch(&mut self, id: &str, changes: &Value) -> Option<&Value> {
        let number = *self.by_id.get(id)?;
        let (visible, mut batch) = self.batches.get(number - self.forgotten)?.clone();
        self.remove_from_index(number, &batch);
        merge(&mut batch, changes);
        batch["id"] = id.into();
        self.index(number, &batch);
        let place = self.batches.get_mut(number - self.forgotten)?;
        *place = (visible, batch);
        Some(&place.1)
    }

    fn forget_the_oldest(&mut self) {
        let Some((_, batch)) = self.batches.pop_front() else {
            return;
        };
        if let Some(id) = batch["id"].as_str() {
            self.by_id.remove(id);
        }
        self.remove_from_index(self.forgotten, &batch);
        self.forgotten += 1;
    }

    fn index(&mut self, number: usize, batch: &Value) {
        if let Some(id) = batch["externalId"].as_str() {
            let numbers = self.by_external_id.entry(id.to_owned()).or_default();
            numbers.push(number);
        }
    }

    fn remove_from_index(&mut self, number: usize, batch: &Value) {
        let id = batch["externalId"].as_str().unwrap_or_default();
        if let Some(numbers) = self.by_external_id.get_mut(id) {
            numbers.retain(|other| *other != number);
            if numbers.is_empty() {
                self.by_external_id.remove(id);
            }
        }
    }

    pub(super) fn all(&self) -> impl DoubleEndedIterator<Item = &Value> {
        self.batches.iter().map(|(_, batch)| batch)
    }

    /// What Catalog shows now; with an external id, only batches that have it.
    pub(super) fn visible(&self, external_id: Option<&str>) -> Vec<&Value> {
        match external_id {
            None => self.batches.iter().filter_map(shown).collect(),
            Some(id) => {
                let numbers = self.by_external_id.get(id).into_iter().flatten();
                numbers.filter_map(|number| self.shown(*number)).collect()
            }
        }
    }

    /// The batch with this id, if Catalog shows it now.
    pub(super) fn with_id(&self, id: &str) -> Option<&Value> {
        self.shown(*self.by_id.get(id)?)
    }

    fn shown(&self, number: usize) -> Option<&Value> {
        shown(self.batches.get(number - self.forgotten)?)
    }
}

fn shown((visible, batch): &(Instant, Value)) -> Option<&Value> {
    (*visible <= Instant::now()).then_some(batch)
}

fn merge(target: &mut Value, changes: &Value) {
    let Value::Object(changes) = changes else {
        *target = changes.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Default::default());
    }
    for (name, change) in changes {
        match (target.as_object_mut(), change) {
            (Some(members), Value::Null) => drop(members.remove(name)),
            _ => merge(&mut target[name], change),
        }
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
        assert!(ledger.by_id.is_empty());
        assert_eq!(ledger.by_external_id.len(), REMEMBERED / 2 + 1);

        let later = now + std::time::Duration::from_secs(60);
        ledger.add(later, json!({ "externalId": "later" }));
        assert!(ledger.visible(Some("later")).is_empty());
    }

    #[test]
    fn a_patch_changes_what_it_names() {
        let mut ledger = Ledger::default();
        let batch = json!({ "id": "b", "externalId": "x", "status": "loading", "m": { "a": 1 } });
        ledger.add(Instant::now(), batch);
        let changes =
            json!({ "id": "c", "externalId": "y", "status": null, "m": { "b": 2 }, "new": [1] });
        let expected = json!({ "id": "b", "externalId": "y", "m": { "a": 1, "b": 2 }, "new": [1] });
        assert_eq!(ledger.patch("b", &changes), Some(&expected));
        assert_eq!(ledger.with_id("b"), Some(&expected));
        assert_eq!(ledger.patch("c", &changes), None);
        assert!(ledger.visible(Some("x")).is_empty());
        assert_eq!(ledger.visible(Some("y")), [&expected]);
    }
}

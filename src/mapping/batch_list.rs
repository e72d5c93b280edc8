//! `ListBatches`: the query for Catalog's `GET /batches`, and its pages.
//!
//! Catalog pages by offset (`start`), which skips or repeats batches when others
//! are added or, where a filter looks at what changes, leave the list meanwhile.
//! A walk from the newest to the oldest batch therefore goes on from where it
//! was, not from a number: the next page asks for batches that were created
//! before the end of the last batch's millisecond. Those of that millisecond
//! that were returned already come again; the token names them, and they are
//! left out.

use prost::Message;
use prost_types::Timestamp;

use super::{
    batch::status_word,
    catalog::{bare, properties, special_character},
};
use crate::{
    failure::Violation,
    proto::v1::{Batch, ListBatchesRequest, ListBatchesResponse},
};

/// Catalog's default, and the most that it lists ("Filter Catalog data using
/// query parameters: Limit returned objects").
const DEFAULT_PAGE_SIZE: usize = 20;
const MAX_PAGE_SIZE: usize = 100;

/// The form of page tokens. A token of another form is refused.
const VERSION: u8 = 1;

/// A query for `GET /batches`.
#[derive(Clone, Debug, PartialEq)]
pub struct ListQuery {
    pairs: Vec<(&'static str, String)>,
    page_size: usize,
    limit: usize,
    position: Position,
    /// The request's filters, as bytes that tell them from others.
    filters: Vec<u8>,
}

impl ListQuery {
    /// The names and values of the query.
    pub fn pairs(&self) -> &[(&'static str, String)] {
        &self.pairs
    }
}

/// Where a page begins.
#[derive(Clone, PartialEq, Message)]
struct Position {
    /// Only batches that were created before this Unix time, in milliseconds.
    #[prost(int64, optional, tag = "1")]
    before: Option<i64>,
    /// The fingerprints of the batches of the last millisecond before it that
    /// were returned already.
    #[prost(fixed64, repeated, tag = "2")]
    returned: Vec<u64>,
    /// How many more are left out: where batches have no time of creation, and
    /// where more than a page of them has the same, Catalog's offset must do.
    #[prost(uint32, tag = "3")]
    start: u32,
}

/// The query for a request, or all that is wrong with the request.
pub fn list_query(request: &ListBatchesRequest) -> Result<ListQuery, Vec<Violation>> {
    let mut violations = Vec::new();
    let mut pairs = Vec::new();

    let ids = [
        (
            "dataset_id",
            "dataSet",
            request.dataset_id.as_deref().map(bare),
        ),
        ("external_id", "externalId", request.external_id.as_deref()),
    ];
    for (field, name, id) in ids {
        let Some(id) = id else { continue };
        if id.is_empty() {
            violations.push(Violation::new(field, "must not be empty"));
        } else if let Some(character) = special_character(id) {
            let problem =
                format!("has {character:?}, which Catalog's filters do not take literally");
            violations.push(Violation::new(field, &problem));
        }
        pairs.push((name, id.to_owned()));
    }

    let mut words = Vec::new();
    for (index, status) in request.statuses.iter().enumerate() {
        match status_word(*status) {
            Some(word) => words.push(word),
            None => violations.push(Violation::new(
                &format!("statuses[{index}]"),
                "must be a known status",
            )),
        }
    }
    if !words.is_empty() {
        pairs.push(("status", words.join(",")));
    }

    let mut time = |field: &str, time: &Option<Timestamp>| {
        let time = time.as_ref()?;
        let milliseconds = unix_milliseconds(time).filter(|milliseconds| *milliseconds >= 0);
        if milliseconds.is_none() {
            violations.push(Violation::new(field, "must be a time from 1970 to 9999"));
        }
        milliseconds
    };
    let after = time("created_after", &request.created_after);
    let before = time("created_before", &request.created_before);

    let page_size = match usize::try_from(request.page_size) {
        Ok(0) => DEFAULT_PAGE_SIZE,
        Ok(size) if size <= MAX_PAGE_SIZE => size,
        _ => {
            let problem = "must be from 1 to 100, or 0 for the default of 20";
            violations.push(Violation::new("page_size", problem));
            DEFAULT_PAGE_SIZE
        }
    };

    let filters = filters_of(request);
    let position = match request.page_token.as_str() {
        "" => Position::default(),
        token => position_of(token, &filters).unwrap_or_else(|| {
            let problem = "must be a next_page_token that a call with the same filters returned";
            violations.push(Violation::new("page_token", problem));
            Position::default()
        }),
    };
    if !violations.is_empty() {
        return Err(violations);
    }

    let limit = MAX_PAGE_SIZE.min(page_size + position.returned.len());
    let before = before.into_iter().chain(position.before).min();
    pairs.extend(after.map(|after| ("createdAfter", after.to_string())));
    pairs.extend(before.map(|before| ("createdBefore", before.to_string())));
    pairs.push(("limit", limit.to_string()));
    if position.start > 0 {
        pairs.push(("start", position.start.to_string()));
    }
    pairs.push(("orderBy", "desc:created".to_owned()));
    pairs.push(("properties", properties().to_owned()));
    Ok(ListQuery {
        pairs,
        page_size,
        limit,
        position,
        filters,
    })
}

/// The page of the batches that Catalog listed for a query.
pub fn page(listed: Vec<Batch>, query: &ListQuery) -> ListBatchesResponse {
    let position = &query.position;
    let received = listed.len();
    let mut passed = 0;
    let mut batches = Vec::new();
    for batch in listed {
        if batches.len() == query.page_size {
            break;
        }
        passed += 1;
        if !position
            .returned
            .contains(&fingerprint(batch.id.as_bytes()))
        {
            batches.push(batch);
        }
    }
    // Fewer than the limit are the last ones.
    let next_page_token = match passed < received || received >= query.limit {
        true => token_of(&position.next(&batches, passed), &query.filters),
        false => String::new(),
    };
    ListBatchesResponse {
        batches,
        next_page_token,
    }
}

impl Position {
    /// Where the next page begins, after a page with these batches; `passed` are
    /// they and the ones that were left out.
    fn next(&self, batches: &[Batch], passed: usize) -> Position {
        let mut next = self.clone();
        match batches.last().and_then(created) {
            Some(last) => {
                let before = Some(last.saturating_add(1));
                if before != self.before {
                    next = Position {
                        before,
                        ..Default::default()
                    };
                }
                let same_time = batches.iter().filter(|b| created(b) == Some(last));
                next.returned
                    .extend(same_time.map(|batch| fingerprint(batch.id.as_bytes())));
            }
            None => {
                let newest = batches.first().and_then(created);
                next.before = next.before.or(newest.map(|time| time.saturating_add(1)));
                next.start = next.start.saturating_add(passed as u32);
            }
        }
        next
    }
}

/// A token is the version, a fingerprint of all the rest and of the filters, and
/// the position, in hexadecimal.
fn token_of(position: &Position, filters: &[u8]) -> String {
    let position = position.encode_to_vec();
    let seal = seal(&position, filters).to_be_bytes();
    let bytes = [&[VERSION][..], &seal, &position].concat();
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn position_of(token: &str, filters: &[u8]) -> Option<Position> {
    let pairs = token.as_bytes().chunks(2);
    let bytes: Vec<u8> = pairs
        .map(|pair| match pair {
            [high, low] => Some(hex_digit(*high)? << 4 | hex_digit(*low)?),
            _ => None,
        })
        .collect::<Option<_>>()?;
    let (version, rest) = bytes.split_first()?;
    let (found, position) = rest.split_at_checked(8)?;
    if *version != VERSION || found != seal(position, filters).to_be_bytes() {
        return None;
    }
    Position::decode(position).ok()
}

fn hex_digit(character: u8) -> Option<u8> {
    char::from(character).to_digit(16).map(|digit| digit as u8)
}

fn seal(position: &[u8], filters: &[u8]) -> u64 {
    fingerprint(&[position, filters].concat())
}

/// The request without what may differ from page to page.
fn filters_of(request: &ListBatchesRequest) -> Vec<u8> {
    let mut filters = ListBatchesRequest {
        page_size: 0,
        page_token: String::new(),
        ..request.clone()
    };
    filters.statuses.sort_unstable();
    filters.encode_to_vec()
}

/// FNV-1a, which, unlike the standard library's hasher, is the same in every
/// version.
fn fingerprint(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

fn created(batch: &Batch) -> Option<i64> {
    batch.created.as_ref().and_then(unix_milliseconds)
}

/// Unix time in milliseconds, of a valid time until the year 9999.
fn unix_milliseconds(time: &Timestamp) -> Option<i64> {
    const LAST_SECOND: i64 = 253_402_300_799;
    ((..=LAST_SECOND).contains(&time.seconds) && (0..1_000_000_000).contains(&time.nanos))
        .then(|| {
            time.seconds
                .checked_mul(1000)?
                .checked_add(i64::from(time.nanos / 1_000_000))
        })
        .flatten()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::proto::v1::BatchStatus;

    fn at(seconds: i64, nanos: i32) -> Option<Timestamp> {
        Some(Timestamp { seconds, nanos })
    }

    fn text(text: &str) -> Option<String> {
        Some(text.to_owned())
    }

    /// The pairs of a query, without those that are always the same.
    fn query(request: &ListBatchesRequest) -> String {
        let query = list_query(request).expect("a good request");
        let last = format!("&orderBy=desc:created&properties={}", properties());
        let pairs = query.pairs().iter();
        let pairs: Vec<_> = pairs
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        let pairs = pairs.join("&");
        pairs.strip_suffix(&last).expect(&pairs).to_owned()
    }

    #[test]
    fn every_filter_becomes_a_pair() {
        let none = ListBatchesRequest::default();
        let table = [
            (none.clone(), "limit=20"),
            (
                ListBatchesRequest {
                    page_size: 1,
                    ..none.clone()
                },
                "limit=1",
            ),
            (
                ListBatchesRequest {
                    page_size: 100,
                    ..none.clone()
                },
                "limit=100",
            ),
            (
                ListBatchesRequest {
                    dataset_id: text("@/dataSets/5c8c"),
                    external_id: text("a b&c"),
                    ..none.clone()
                },
                "dataSet=5c8c&externalId=a b&c&limit=20",
            ),
            (
                ListBatchesRequest {
                    statuses: vec![10, 9],
                    ..none.clone()
                },
                "status=success,active&limit=20",
            ),
            (
                ListBatchesRequest {
                    created_after: at(1_552_694_873, 602_999_999),
                    created_before: at(0, 0),
                    ..none
                },
                "createdAfter=1552694873602&createdBefore=0&limit=20",
            ),
        ];
        for (request, expected) in table {
            assert_eq!(query(&request), expected);
        }
    }

    #[test]
    fn all_that_is_wrong_is_named() {
        let bad = ListBatchesRequest {
            dataset_id: text(""),
            statuses: vec![1, 0, 18, 19],
            external_id: text("a,b"),
            created_after: at(-1, 999_999_999),
            created_before: at(0, 1_000_000_000),
            page_size: 101,
            page_token: "00".to_owned(),
        };
        let violations = list_query(&bad).expect_err("a bad request");
        let fields: Vec<_> = violations.iter().map(|v| v.field.as_str()).collect();
        let expected = [
            "dataset_id",
            "external_id",
            "statuses[1]",
            "statuses[3]",
            "created_after",
            "created_before",
            "page_size",
            "page_token",
        ];
        assert_eq!(fields, expected);
        for size in [-1, i32::MIN, i32::MAX] {
            let bad = ListBatchesRequest {
                page_size: size,
                ..Default::default()
            };
            assert!(list_query(&bad).is_err(), "{size}");
        }
        for time in [
            at(253_402_300_800, 0),
            at(i64::MIN, 0),
            at(i64::MAX, -1),
            at(1, i32::MIN),
        ] {
            let bad = ListBatchesRequest {
                created_after: time,
                ..Default::default()
            };
            assert!(list_query(&bad).is_err(), "{time:?}");
        }
    }

    /// A batch of Catalog's: its number, time of creation and status.
    type Stored = (u32, Option<i64>, BatchStatus);

    /// What Catalog lists for a query.
    fn listed(catalog: &[Stored], query: &ListQuery) -> Vec<Batch> {
        let number = |name: &str| {
            let pair = query.pairs().iter().find(|(known, _)| *known == name);
            pair.map(|(_, value)| value.parse::<i64>().expect("a number"))
        };
        let status = query.pairs().iter().find(|(name, _)| *name == "status");
        let before = number("createdBefore").unwrap_or(i64::MAX);
        let mut found: Vec<_> = catalog
            .iter()
            .filter(|(_, created, _)| created.unwrap_or(0) < before)
            .filter(|(_, _, stored)| {
                status.is_none_or(|(_, word)| status_word(*stored as i32) == Some(word))
            })
            .collect();
        found.sort_by_key(|(number, created, _)| std::cmp::Reverse((*created, *number)));
        let limit = number("limit").expect("a limit") as usize;
        (found
            .into_iter()
            .skip(number("start").unwrap_or(0) as usize)
            .take(limit))
        .map(|(number, created, status)| Batch {
            id: number.to_string(),
            created: created.and_then(super::super::batch::instant_of),
            status: (*status).into(),
            ..Default::default()
        })
        .collect()
    }

    /// Walks through all pages; `between` changes Catalog after each of them.
    fn walk(
        catalog: &mut Vec<Stored>,
        mut request: ListBatchesRequest,
        sizes: &[i32],
        mut between: impl FnMut(&mut Vec<Stored>),
    ) -> Vec<u32> {
        let mut seen = Vec::new();
        for number in 0.. {
            assert!(number < 1000, "a walk without an end");
            request.page_size = sizes[number % sizes.len()];
            let query = list_query(&request).expect("a good request");
            let page = page(listed(catalog, &query), &query);
            assert!(page.batches.len() <= request.page_size as usize);
            let ids = page
                .batches
                .iter()
                .map(|batch| batch.id.parse().expect("a number"));
            seen.extend(ids.collect::<Vec<u32>>());
            if page.next_page_token.is_empty() {
                break;
            }
            request.page_token = page.next_page_token;
            between(catalog);
        }
        seen
    }

    proptest! {
        /// Whatever is added or changed between two pages: what was there from the
        /// beginning to the end is returned once, and nothing twice.
        #[test]
        fn a_walk_neither_skips_nor_repeats(
            times in vec(0..8_i64, 0..40),
            added in vec(0..9_i64, 0..40),
            sizes in vec(1..6_i32, 1..4),
            filtered in any::<bool>(),
        ) {
            let batch = |(number, time): (usize, &i64)| {
                (number as u32, Some(*time), BatchStatus::Loading)
            };
            let mut catalog: Vec<_> = times.iter().enumerate().map(batch).collect();
            let mut added = added.iter().enumerate();
            let mut changed = BTreeSet::new();
            let request = ListBatchesRequest {
                statuses: Vec::from_iter(filtered.then_some(BatchStatus::Loading as i32)),
                ..Default::default()
            };
            let mut seen = walk(&mut catalog, request, &sizes, |catalog| {
                if let Some((number, time)) = added.next() {
                    let index = (number * 7) % catalog.len();
                    catalog[index].2 = BatchStatus::Loaded;
                    changed.insert(catalog[index].0);
                    catalog.push(batch((1000 + number, time)));
                }
            });
            let count = seen.len();
            seen.sort_unstable();
            seen.dedup();
            prop_assert_eq!(seen.len(), count, "something came twice");
            for number in 0..times.len() as u32 {
                let must = !filtered || !changed.contains(&number);
                prop_assert!(!must || seen.contains(&number), "{} is missing", number);
            }
        }

        #[test]
        fn no_token_does_harm(token in "[0-9a-f+é]{0,80}", bytes in vec(any::<u8>(), 0..60)) {
            let mut request = ListBatchesRequest { page_token: token, ..Default::default() };
            prop_assert_eq!(list_query(&request).is_err(), !request.page_token.is_empty());
            // With a good seal, any position.
            let filters = filters_of(&request);
            let seal = seal(&bytes, &filters).to_be_bytes();
            let token = [&[VERSION][..], &seal, &bytes].concat();
            request.page_token = token.iter().map(|byte| format!("{byte:02x}")).collect();
            if let Ok(query) = list_query(&request) {
                let batch = Batch { created: at(253_402_300_799, 0), ..Default::default() };
                page(vec![batch; 101], &query);
            }
        }
    }

    #[test]
    fn many_batches_of_one_millisecond_or_of_none_are_walked_by_offset() {
        for created in [Some(7), None] {
            let stored = (0..250).map(|number| (number, created, BatchStatus::Active));
            let mut seen = walk(&mut stored.collect(), Default::default(), &[100, 7], |_| ());
            seen.sort_unstable();
            assert!(seen.into_iter().eq(0..250), "{created:?}");
        }
    }

    #[test]
    fn a_token_is_for_its_filters_alone() {
        let request = ListBatchesRequest {
            statuses: vec![1, 2],
            page_size: 1,
            ..Default::default()
        };
        let first = list_query(&request).expect("a good request");
        let batch = Batch {
            id: "b".to_owned(),
            created: at(1, 0),
            ..Default::default()
        };
        let token = page(vec![batch], &first).next_page_token;
        assert_eq!(page(Vec::new(), &first).next_page_token, "");

        let same = ListBatchesRequest {
            statuses: vec![2, 1],
            page_size: 30,
            page_token: token.clone(),
            ..Default::default()
        };
        assert_eq!(
            query(&same),
            "status=loaded,loading&createdBefore=1001&limit=31"
        );
        let others = [
            ListBatchesRequest {
                statuses: vec![1],
                ..same.clone()
            },
            ListBatchesRequest {
                external_id: text("x"),
                ..same.clone()
            },
            ListBatchesRequest {
                created_before: at(9, 0),
                ..same.clone()
            },
            ListBatchesRequest {
                page_token: format!("{token}00"),
                ..same.clone()
            },
            ListBatchesRequest {
                page_token: token[..token.len() - 2].to_owned(),
                ..same.clone()
            },
            ListBatchesRequest {
                page_token: format!("02{}", &token[2..]),
                ..same.clone()
            },
        ];
        for other in others {
            let violations = list_query(&other).expect_err("another walk's token");
            assert_eq!(violations[0].field, "page_token");
        }
    }
}

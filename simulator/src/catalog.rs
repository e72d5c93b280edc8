//! Catalog's `GET /batches` and `GET /batches/{id}`, with the filter language
//! that its documentation describes ("Filter Catalog data using query
//! parameters", and the Catalog Service API reference).

use std::{borrow::Cow, cmp::Ordering};

use regex_lite::Regex;
use serde_json::Value;
use url::Url;

/// What a query asks for. The values of `Err` are for the caller to read.
pub(super) struct Query {
    filters: Vec<Filter>,
    order: Vec<(Direction, String)>,
    start: usize,
    limit: usize,
    properties: Option<Vec<String>>,
}

enum Filter {
    /// `name=value`, `name=a,b`, `name=!a,b`.
    Simple {
        name: String,
        values: Vec<String>,
        not: bool,
    },
    /// `property=…`.
    Property(Property),
    /// `tags=name:value`: all of them must hold.
    Tag {
        name: String,
        value: String,
    },
    CreatedAfter(i64),
    CreatedBefore(i64),
}

enum Property {
    Exists(String),
    Lacks(String),
    Matches(String, Regex),
    Compares(String, fn(Ordering) -> bool, String),
    Equals(String, String),
    Differs(String, String),
}

/// The simple filters ("List batches" of the Catalog Service API reference).
const FILTERS: [&str; 17] = [
    "batch",
    "completed",
    "created",
    "createdClient",
    "createdUser",
    "dataSet",
    "externalId",
    "failedRecordCount",
    "imsOrg",
    "name",
    "recordCount",
    "size",
    "started",
    "status",
    "updated",
    "updatedUser",
    "version",
];

#[derive(Clone, Copy)]
enum Direction {
    Ascending,
    Descending,
}

impl Query {
    pub(super) fn of(url: &Url) -> Result<Self, String> {
        let mut query = Query {
            filters: Vec::new(),
            order: Vec::new(),
            start: 0,
            limit: 20,
            properties: None,
        };
        for (name, value) in url.query_pairs() {
            let list = || value.split(',').map(str::to_owned);
            let instant = || number::<i64>(&name, &value);
            match &*name {
                "limit" => {
                    query.limit = number(&name, &value)?;
                    if !(1..=100).contains(&query.limit) {
                        return Err("limit must be from 1 to 100".to_owned());
                    }
                }
                "start" => query.start = number(&name, &value)?,
                "properties" => query.properties = Some(list().collect()),
                "orderBy" | "sort" => query.order = list().map(direction).collect(),
                "property" => query.filters.push(Filter::Property(property(&value)?)),
                "createdAfter" => query.filters.push(Filter::CreatedAfter(instant()?)),
                "createdBefore" => query.filters.push(Filter::CreatedBefore(instant()?)),
                "tags" => {
                    for tag in list() {
                        let (name, value) = tag
                            .split_once(':')
                            .ok_or("tags must be pairs of name:value")?;
                        let (name, value) = (name.to_owned(), value.to_owned());
                        query.filters.push(Filter::Tag { name, value });
                    }
                }
                // Catalog ignores what it does not know, such as `offset`.
                name if !FILTERS.contains(&name) => {}
                _ => {
                    let (not, values) = match value.strip_prefix('!') {
                        Some(values) => (true, values),
                        None => (false, &*value),
                    };
                    query.filters.push(Filter::Simple {
                        name: name.into_owned(),
                        values: values.split(',').map(str::to_owned).collect(),
                        not,
                    });
                }
            }
        }
        Ok(query)
    }

    /// What is found among batches that stand in the order of their creation:
    /// an object with the batches by id, in the order that was asked for. Which
    /// order holds where none was asked for is not documented. Each batch passes
    /// through `edit` before it is shown.
    pub(super) fn response<'a>(
        &self,
        batches: impl DoubleEndedIterator<Item = &'a Value>,
        edit: impl Fn(&mut Value),
    ) -> String {
        let mut found: Vec<_> = batches
            .rev()
            .filter(|batch| self.filters.iter().all(|filter| filter.takes(batch)))
            .collect();
        found.sort_by(|a, b| self.compare(a, b));
        let members = found.into_iter().skip(self.start).take(self.limit);
        let members: Vec<_> = members
            .map(|batch| {
                let mut shown = self.shown(batch);
                edit(&mut shown);
                format!("{}:{shown}", batch["id"])
            })
            .collect();
        format!("{{{}}}", members.join(","))
    }

    /// The external id that all that is found has, if the query says so in the
    /// simplest way.
    pub(super) fn external_id(&self) -> Option<&str> {
        self.filters.iter().find_map(|filter| match filter {
            Filter::Simple {
                name,
                values,
                not: false,
            } if name == "externalId" => match &**values {
                [id] if !id.contains('*') => Some(&**id),
                _ => None,
            },
            _ => None,
        })
    }

    fn compare(&self, a: &Value, b: &Value) -> Ordering {
        let orders = self.order.iter().map(|(direction, name)| {
            let order = ordered(&text(&a[name]), &text(&b[name]));
            match direction {
                Direction::Ascending => order,
                Direction::Descending => order.reverse(),
            }
        });
        orders.fold(Ordering::Equal, Ordering::then)
    }

    fn shown(&self, batch: &Value) -> Value {
        let mut batch = batch.clone();
        if let (Some(names), Some(members)) = (&self.properties, batch.as_object_mut()) {
            members.retain(|name, _| names.contains(name));
        }
        batch
    }
}

impl Filter {
    fn takes(&self, batch: &Value) -> bool {
        let created = || batch["created"].as_i64().unwrap_or_default();
        match self {
            Filter::Simple { name, values, not } => {
                let held = held(batch, name);
                let any = |value: &String| held.iter().any(|held| is_like(value, held));
                values.iter().any(any) != *not
            }
            Filter::Property(property) => property.takes(batch),
            Filter::Tag { name, value } => {
                let held = batch["tags"][name].as_array();
                held.is_some_and(|held| held.iter().any(|held| is_like(value, &text(held))))
            }
            Filter::CreatedAfter(instant) => created() > *instant,
            Filter::CreatedBefore(instant) => created() < *instant,
        }
    }
}

impl Property {
    fn takes(&self, batch: &Value) -> bool {
        match self {
            Property::Exists(name) => !batch[name].is_null(),
            Property::Lacks(name) => batch[name].is_null(),
            Property::Matches(name, regex) => {
                batch[name].as_str().is_some_and(|v| regex.is_match(v))
            }
            Property::Compares(name, holds, than) => {
                !batch[name].is_null() && holds(ordered(&text(&batch[name]), than))
            }
            Property::Equals(name, value) => {
                !batch[name].is_null() && is_like(value, &text(&batch[name]))
            }
            Property::Differs(name, value) => !is_like(value, &text(&batch[name])),
        }
    }
}

/// The value of `property`. The leftmost operator counts: which one does in a
/// value that holds several is not documented.
fn property(condition: &str) -> Result<Property, String> {
    if let Some(name) = condition.strip_prefix('!') {
        return Ok(Property::Lacks(name.to_owned()));
    }
    let Some(at) = condition.find(['~', '=', '!', '<', '>']) else {
        return Ok(Property::Exists(condition.to_owned()));
    };
    let (name, rest) = condition.split_at(at);
    let (name, after) = (name.to_owned(), |operator: &str| {
        rest.strip_prefix(operator).map(str::to_owned)
    });
    Ok(if let Some(value) = after("==") {
        Property::Equals(name, value)
    } else if let Some(value) = after("!=") {
        Property::Differs(name, value)
    } else if let Some(value) = after("<=") {
        Property::Compares(name, Ordering::is_le, value)
    } else if let Some(value) = after(">=") {
        Property::Compares(name, Ordering::is_ge, value)
    } else if let Some(value) = after("<") {
        Property::Compares(name, Ordering::is_lt, value)
    } else if let Some(value) = after(">") {
        Property::Compares(name, Ordering::is_gt, value)
    } else if let Some(regex) = after("~") {
        let regex = Regex::new(&regex).map_err(|error| error.to_string())?;
        Property::Matches(name, regex)
    } else {
        return Err(format!("property has no operator: {condition}"));
    })
}

/// `asc:created`, `desc:created`, or `created`.
fn direction(by: String) -> (Direction, String) {
    match by.split_once(':') {
        Some(("desc", name)) => (Direction::Descending, name.to_owned()),
        Some(("asc", name)) => (Direction::Ascending, name.to_owned()),
        _ => (Direction::Ascending, by),
    }
}

fn number<T: std::str::FromStr>(name: &str, value: &str) -> Result<T, String> {
    value
        .parse()
        .map_err(|_| format!("{name} is no number in its range"))
}

/// What a simple filter of that name compares with.
fn held<'a>(batch: &'a Value, name: &str) -> Vec<Cow<'a, str>> {
    match name {
        "batch" => vec![text(&batch["id"])],
        "dataSet" => {
            let objects = batch["relatedObjects"].as_array().into_iter().flatten();
            let datasets = objects.filter(|object| object["type"] == "dataSet");
            datasets.map(|dataset| text(&dataset["id"])).collect()
        }
        _ => vec![text(&batch[name])],
    }
}

fn text(value: &Value) -> Cow<'_, str> {
    match value {
        Value::String(text) => text.into(),
        Value::Null => "".into(),
        other => other.to_string().into(),
    }
}

/// Whether a value is what a filter says: `*` stands for any text, `**` for an
/// asterisk. That is documented for the property `name`, and nothing is said of
/// others: they are taken to be alike, which is what a client must reckon with.
fn is_like(filter: &str, value: &str) -> bool {
    fn rest(filter: &[u8], value: &[u8]) -> bool {
        match filter {
            [b'*', b'*', filter @ ..] => value.first() == Some(&b'*') && rest(filter, &value[1..]),
            [b'*', filter @ ..] => (0..=value.len()).any(|skipped| rest(filter, &value[skipped..])),
            [byte, filter @ ..] => value.first() == Some(byte) && rest(filter, &value[1..]),
            [] => value.is_empty(),
        }
    }
    rest(filter.as_bytes(), value.as_bytes())
}

/// Numbers and versions by their value, all else as text.
fn ordered(a: &str, b: &str) -> Ordering {
    let numbers = |text: &str| -> Option<Vec<u64>> {
        text.split('.').map(|part| part.parse().ok()).collect()
    };
    match (numbers(a), numbers(b)) {
        (Some(a), Some(b)) => a.cmp(&b),
        _ => a.cmp(b),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The ids that a query finds, in its order.
    fn found(query: &str) -> Result<String, String> {
        let batch = |id: &str, external_id: &str, created: u64, version: &str| {
            json!({
                "id": id, "externalId": external_id, "created": created, "version": version,
                "relatedObjects": [{ "type": "dataSet", "id": "d" }, { "type": "batch", "id": "x" }],
                "tags": { "day": ["monday"] },
            })
        };
        let mut batches = [
            batch("1", "a", 10, "1.0.9"),
            batch("2", "b", 20, "1.0.10"),
            batch("3", "a,b", 30, "2.0.0"),
            batch("4", "!a", 30, "2.0.0"),
            batch("5", "a*", 40, "2.0.0"),
        ];
        batches[4]["failedRecordCount"] = 7.into();
        let url = Url::parse(&format!("http://simulator/batches?{query}")).expect(query);
        let response = Query::of(&url)?.response(batches.iter(), |_| ());
        // Not read as JSON: the order of an object's members counts.
        let ids = response
            .split(":{")
            .filter_map(|part| part.rsplit('"').nth(1));
        let ids: String = ids.filter(|id| "12345".contains(id)).collect();
        let read: Value = serde_json::from_str(&response).expect("JSON");
        assert_eq!(
            read.as_object().map(|map| map.len()),
            Some(ids.len()),
            "{response}"
        );
        Ok(ids)
    }

    #[test]
    fn the_filter_language_is_the_documented_one() {
        for (query, ids) in [
            ("properties=size", "54321"),
            // Simple filters: any of, not, and neither of.
            ("externalId=a&properties=size", "1"),
            ("externalId=a,b&properties=size", "21"),
            ("externalId=!a&properties=size", "5432"),
            ("externalId=!a,b&properties=size", "543"),
            ("externalId=%21a&properties=size", "5432"),
            ("externalId=none&properties=size", ""),
            ("externalId=a*&properties=size", "531"),
            ("externalId=a**&properties=size", "5"),
            ("dataSet=d&batch=2,3&properties=size", "32"),
            ("dataSet=x&properties=size", ""),
            // `property`: the value is one string.
            ("property=externalId==a&properties=size", "1"),
            ("property=externalId==a,b&properties=size", "3"),
            ("property=externalId==!a&properties=size", "4"),
            ("property=externalId!=a&properties=size", "5432"),
            ("property=externalId~^[ab]$&properties=size", "21"),
            ("property=failedRecordCount&properties=size", "5"),
            ("property=!failedRecordCount&properties=size", "4321"),
            ("property=version%3E1.0.9&properties=size", "5432"),
            ("property=version%3E=1.0.10&properties=size", "5432"),
            ("property=version%3C1.0.10&properties=size", "1"),
            ("property=created%3C=20&properties=size", "21"),
            // Several conditions: all of them.
            ("property=created%3E10&externalId=a,b&properties=size", "2"),
            ("tags=day:mon*&properties=size", "54321"),
            ("tags=day:tuesday&properties=size", ""),
            ("createdAfter=10&createdBefore=40&properties=size", "432"),
            ("orderBy=asc:created&properties=size", "12435"),
            ("orderBy=created&limit=2&properties=size", "12"),
            ("orderBy=version,desc:created&properties=size", "12543"),
            ("orderBy=desc:created&start=1&limit=2&properties=size", "43"),
            ("sort=asc:created&limit=2&properties=size", "12"),
            ("offset=3&aggregate=true&properties=size", "54321"),
        ] {
            assert_eq!(found(query).as_deref(), Ok(ids), "{query}");
        }
        for bad in [
            "limit=0",
            "limit=101",
            "limit=x",
            "start=-1",
            "property=externalId=a",
            "property=a~(",
            "tags=a",
        ] {
            assert!(found(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn properties_are_those_that_were_asked_for() {
        let batch = json!({ "id": "1", "status": "active", "size": 3 });
        let response = |query: &str| {
            let url = Url::parse(&format!("http://simulator/batches?{query}")).expect(query);
            let query = Query::of(&url).expect(query);
            query.response([&batch].into_iter(), |_| ())
        };
        assert_eq!(response("properties=size,created"), r#"{"1":{"size":3}}"#);
        assert_eq!(response("properties=created"), r#"{"1":{}}"#);
    }
}

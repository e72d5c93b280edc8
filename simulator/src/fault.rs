//! The faults that can be injected, by name.

use std::{fmt, str::FromStr, time::Duration};

use http::StatusCode;

use super::intermediary::Intermediary;

/// The operations of the API that are simulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// `POST /batches`.
    Create,
    /// Catalog's `GET /batches/{id}`.
    Get,
    /// Catalog's `GET /batches`.
    List,
}

const OPERATIONS: [(&str, Operation); 3] = [
    ("create", Operation::Create),
    ("get", Operation::Get),
    ("list", Operation::List),
];

/// A fault, and the operation whose next request meets it: `get:status-503`.
/// Without an operation it is a create: `status-503`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Injection {
    /// The operation.
    pub operation: Operation,
    /// The fault.
    pub fault: Fault,
}

/// What goes wrong with one request. "Before" and "after" say whether it is
/// processed: whether a create makes a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// `status-NNN`: the API's own error of this status.
    Status(StatusCode),
    /// `proxy-NNN`: a proxy sends HTML with this status; the request is
    /// ignored.
    Proxy(StatusCode),
    /// `lost-NNN`: the batch is created, but a proxy sends HTML with this
    /// status.
    Lost(StatusCode),
    /// `varnish-503`, `varnish-503-after` and so on: an intermediary
    /// responds; whether after processing.
    Intermediary(&'static Intermediary, bool),
    /// `gzip-NNN`, `bom-NNN` and so on: the API's own error of this status, in
    /// a form that is hard to read.
    Garbled(Garbling, StatusCode),
    /// `delay-NNN`: the request takes that many milliseconds more.
    Delay(Duration),
    /// `reset-before-read`: the next connection is reset as soon as it exists.
    ResetBeforeRead,
    /// `reset-before`: the connection is reset, the request is ignored.
    ResetBefore,
    /// `reset-after`: the connection is reset instead of a response.
    ResetAfter,
    /// `close-before`: the connection is closed, the request is ignored.
    CloseBefore,
    /// `close-after`: the connection is closed instead of a response.
    CloseAfter,
    /// `timeout-before`: the request is ignored and no response comes.
    TimeoutBefore,
    /// `timeout-after`: no response comes.
    TimeoutAfter,
    /// `half-response`: the connection closes in the middle of the response.
    HalfResponse,
    /// `stale`: a good response; the next request on its connection meets a
    /// reset.
    Stale,
    /// `refused-stream`: HTTP/2 REFUSED_STREAM; over HTTP/1.1 a close.
    RefusedStream,
    /// `redirect`: 307 to another host.
    Redirect,
    /// `empty-response`: a good status without a body.
    EmptyResponse,
    /// `html-response`: 200 with HTML.
    HtmlResponse,
    /// `no-id-response`: a batch that has no member `id`.
    NoIdResponse,
    /// `huge-response`: a batch of a mebibyte.
    HugeResponse,
    /// `catalog-response`: the form of a create that Catalog documents,
    /// `["@/batches/{id}"]`.
    CatalogResponse,
    /// `gzip-response`: a good response, compressed, though nobody asked for
    /// that.
    GzipResponse,
    /// `many-headers-response`: a good response with 120 header lines more.
    ManyHeadersResponse,
    /// `unfinished-response`: the whole body, but it has no length, and the
    /// connection closes where the last chunk should be.
    UnfinishedResponse,
    /// `empty`: Catalog shows `{}`, no batch at all.
    Empty,
}

/// What is odd about the bytes of an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Garbling {
    /// `gzip-NNN`: compressed, though nobody asked for that.
    Gzip,
    /// `bom-NNN`: begins with a byte order mark.
    ByteOrderMark,
    /// `latin1-NNN`: ISO 8859-1 instead of UTF-8.
    Latin1,
    /// `surrogate-NNN`: half a surrogate pair, escaped.
    Surrogate,
    /// `overflow-NNN`: a number that no double holds.
    Overflow,
}

const GARBLINGS: [(&str, Garbling); 5] = [
    ("gzip", Garbling::Gzip),
    ("bom", Garbling::ByteOrderMark),
    ("latin1", Garbling::Latin1),
    ("surrogate", Garbling::Surrogate),
    ("overflow", Garbling::Overflow),
];

/// The faults without a number.
const NAMED: [(&str, Fault); 20] = [
    ("reset-before-read", Fault::ResetBeforeRead),
    ("reset-before", Fault::ResetBefore),
    ("reset-after", Fault::ResetAfter),
    ("close-before", Fault::CloseBefore),
    ("close-after", Fault::CloseAfter),
    ("timeout-before", Fault::TimeoutBefore),
    ("timeout-after", Fault::TimeoutAfter),
    ("half-response", Fault::HalfResponse),
    ("stale", Fault::Stale),
    ("refused-stream", Fault::RefusedStream),
    ("redirect", Fault::Redirect),
    ("empty-response", Fault::EmptyResponse),
    ("html-response", Fault::HtmlResponse),
    ("no-id-response", Fault::NoIdResponse),
    ("huge-response", Fault::HugeResponse),
    ("catalog-response", Fault::CatalogResponse),
    ("gzip-response", Fault::GzipResponse),
    ("many-headers-response", Fault::ManyHeadersResponse),
    ("unfinished-response", Fault::UnfinishedResponse),
    ("empty", Fault::Empty),
];

impl Fault {
    /// The names of an operation's faults; `NNN` stands for a status.
    pub fn names(operation: Operation) -> impl Iterator<Item = String> {
        let numbered = ["status-NNN", "proxy-NNN", "lost-NNN", "delay-MILLISECONDS"];
        let garbled = GARBLINGS.iter().map(|(name, _)| format!("{name}-NNN"));
        let named = NAMED.iter().map(|(name, _)| *name);
        (numbered.into_iter().chain(named).map(str::to_owned))
            .chain(garbled)
            .chain(Intermediary::names())
            .filter(move |name| match operation {
                Operation::Create => name != "empty",
                _ => !matches!(&**name, "lost-NNN" | "catalog-response"),
            })
    }

    fn applies_to(&self, operation: Operation) -> bool {
        match self {
            Fault::Lost(_) | Fault::CatalogResponse => operation == Operation::Create,
            Fault::Empty => operation != Operation::Create,
            _ => true,
        }
    }
}

impl Injection {
    /// Every name; `NNN` stands for a status.
    pub fn names() -> impl Iterator<Item = String> {
        OPERATIONS.iter().flat_map(|(prefix, operation)| {
            Fault::names(*operation).map(move |name| match operation {
                Operation::Create => name,
                _ => format!("{prefix}:{name}"),
            })
        })
    }
}

impl From<Fault> for Injection {
    fn from(fault: Fault) -> Self {
        Injection {
            operation: Operation::Create,
            fault,
        }
    }
}

impl FromStr for Injection {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let name = name.replace("lookup-", "list:status-"); // an older name
        let (operation, fault) = match name.split_once(':') {
            Some((prefix, fault)) => {
                let known = OPERATIONS.iter().find(|(known, _)| *known == prefix);
                let (_, operation) = known.ok_or_else(|| unknown(&name))?;
                (*operation, fault)
            }
            None => (Operation::Create, &*name),
        };
        let fault: Fault = fault.parse()?;
        match fault.applies_to(operation) {
            true => Ok(Injection { operation, fault }),
            false => Err(unknown(&name)),
        }
    }
}

impl fmt::Display for Injection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Operation::Get | Operation::List = self.operation {
            let known = OPERATIONS
                .iter()
                .find(|(_, known)| *known == self.operation);
            write!(f, "{}:", known.map_or("", |(name, _)| name))?;
        }
        self.fault.fmt(f)
    }
}

fn unknown(name: &str) -> String {
    let names: Vec<_> = Injection::names().collect();
    format!("unknown fault {name:?}; known faults: {}", names.join(", "))
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        // Older and shorter names.
        let current = name.strip_suffix("-create").unwrap_or(name);
        let current = current.replace("silence", "timeout");
        let current = match &*current.replace("-answer", "-response") {
            short @ ("reset" | "close" | "timeout") => format!("{short}-before"),
            current => current.to_owned(),
        };
        if let Some((_, fault)) = NAMED.iter().find(|(known, _)| *known == current) {
            return Ok(fault.clone());
        }
        if let Some((form, after)) = Intermediary::named(name) {
            return Ok(Fault::Intermediary(form, after));
        }
        let numbered = name.split_once('-').and_then(|(kind, number)| {
            let status = || StatusCode::from_bytes(number.as_bytes()).ok();
            match kind {
                "status" => status().map(Fault::Status),
                "proxy" => status().map(Fault::Proxy),
                "lost" => status().map(Fault::Lost),
                "delay" => Some(Fault::Delay(Duration::from_millis(number.parse().ok()?))),
                _ => {
                    let (_, garbling) = GARBLINGS.iter().find(|(name, _)| *name == kind)?;
                    status().map(|status| Fault::Garbled(*garbling, status))
                }
            }
        });
        numbered.ok_or_else(|| unknown(name))
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Status(status) => write!(f, "status-{}", status.as_str()),
            Fault::Proxy(status) => write!(f, "proxy-{}", status.as_str()),
            Fault::Lost(status) => write!(f, "lost-{}", status.as_str()),
            Fault::Intermediary(form, after) => {
                let after = if *after { "-after" } else { "" };
                write!(f, "{}{after}", form.name)
            }
            Fault::Garbled(garbling, status) => {
                let found = GARBLINGS.iter().find(|(_, known)| known == garbling);
                let name = found.map_or("garbled", |(name, _)| name);
                write!(f, "{name}-{}", status.as_str())
            }
            Fault::Delay(delay) => write!(f, "delay-{}", delay.as_millis()),
            named => {
                let found = NAMED.iter().find(|(_, fault)| fault == named);
                f.write_str(found.map_or("fault", |(name, _)| name))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::intermediary::{FORMS, When},
        *,
    };

    #[test]
    fn every_name_is_read_back() {
        for name in Injection::names() {
            let name = name.replace("NNN", "403").replace("MILLISECONDS", "20");
            let injection: Injection = name.parse().expect(&name);
            assert_eq!(injection.to_string(), name);
        }
        for (other, name) in [
            ("create:reset-after", "reset-after"),
            ("reset-after-create", "reset-after"),
            ("silence-before-create", "timeout-before"),
            ("no-id-answer", "no-id-response"),
            ("lookup-503", "list:status-503"),
            ("list:timeout", "list:timeout-before"),
            ("get:reset", "get:reset-before"),
        ] {
            let injection: Injection = other.parse().expect(other);
            assert_eq!(injection.to_string(), name);
        }
        for odd in [
            "",
            "status",
            "status-x",
            "status-99",
            "delay-",
            "melt-1",
            "nginx-413-after",
            "filter-201",
            "empty",
            "get:lost-503",
            "put:status-503",
            "get:",
        ] {
            let error = odd.parse::<Injection>().expect_err(odd);
            assert!(error.contains("list:varnish-503-after"), "{error}");
        }
    }

    #[test]
    fn every_name_is_documented() {
        let page = include_str!("../../docs/simulator.md");
        let rows = FORMS.iter().map(|form| {
            let when = match form.when {
                When::Before => "before",
                When::After => "after",
                When::Either => "either",
            };
            format!(
                "| `{}` | {when} | {} | {} |",
                form.name, form.status, form.who
            )
        });
        let names = Fault::names(Operation::Create).chain(["empty".to_owned()]);
        let others = names.filter(|name| Intermediary::named(name).is_none());
        for row in rows.chain(others.map(|name| format!("| `{name}` | "))) {
            assert!(page.contains(&row), "docs/simulator.md lacks {row}");
        }
    }
}

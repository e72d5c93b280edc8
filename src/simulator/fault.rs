//! The faults that a create can meet, by name.

use std::{fmt, str::FromStr, time::Duration};

use http::StatusCode;

use super::intermediary::Intermediary;

/// What goes wrong with one create. "Before" and "after" say whether a batch
/// comes to exist.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// `status-NNN`: the API's own error of this status.
    Status(StatusCode),
    /// `proxy-NNN`: a proxy answers HTML with this status; nothing is created.
    Proxy(StatusCode),
    /// `lost-NNN`: the batch is created, but a proxy answers HTML with this
    /// status.
    Lost(StatusCode),
    /// `varnish-503`, `varnish-503-after` and so on: somebody between the
    /// gateway and the API answers; whether after processing.
    Between(&'static Intermediary, bool),
    /// `gzip-NNN`, `bom-NNN` and so on: the API's own error of this status, in
    /// a form that is hard to read.
    Garbled(Garbling, StatusCode),
    /// `lookup-NNN`: the next look-up, not a create, gets the API's own error
    /// of this status.
    LookUp(StatusCode),
    /// `delay-NNN`: the create takes that many milliseconds more.
    Delay(Duration),
    /// `reset-before-read`: the next connection is reset as soon as it exists.
    ResetBeforeRead,
    /// `reset-before-create`: the connection is reset, the request is ignored.
    ResetBeforeCreate,
    /// `reset-after-create`: the connection is reset instead of an answer.
    ResetAfterCreate,
    /// `close-before-create`: the connection is closed, the request ignored.
    CloseBeforeCreate,
    /// `close-after-create`: the connection is closed instead of an answer.
    CloseAfterCreate,
    /// `silence-before-create`: nothing is created and no answer comes.
    SilenceBeforeCreate,
    /// `silence-after-create`: no answer comes.
    SilenceAfterCreate,
    /// `half-answer`: the connection closes in the middle of the answer.
    HalfAnswer,
    /// `stale`: a good answer; the next request on its connection meets a reset.
    Stale,
    /// `refused-stream`: HTTP/2 REFUSED_STREAM; over HTTP/1.1 a close.
    RefusedStream,
    /// `redirect`: 307 to another host.
    Redirect,
    /// `empty-answer`: 201 without a body.
    EmptyAnswer,
    /// `html-answer`: 200 with HTML.
    HtmlAnswer,
    /// `no-id-answer`: 201 with a batch that has no id.
    NoIdAnswer,
    /// `huge-answer`: 201 with a batch of a mebibyte.
    HugeAnswer,
    /// `catalog-answer`: the form that Catalog documents, `["@/batches/{id}"]`.
    CatalogAnswer,
    /// `gzip-answer`: a good answer, compressed, though nobody asked for that.
    GzipAnswer,
    /// `many-headers-answer`: a good answer with 120 header lines more.
    ManyHeadersAnswer,
    /// `unfinished-answer`: the whole batch, but the answer has no length, and
    /// the connection closes where the last chunk should be.
    UnfinishedAnswer,
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
const NAMED: [(&str, Fault); 19] = [
    ("reset-before-read", Fault::ResetBeforeRead),
    ("reset-before-create", Fault::ResetBeforeCreate),
    ("reset-after-create", Fault::ResetAfterCreate),
    ("close-before-create", Fault::CloseBeforeCreate),
    ("close-after-create", Fault::CloseAfterCreate),
    ("silence-before-create", Fault::SilenceBeforeCreate),
    ("silence-after-create", Fault::SilenceAfterCreate),
    ("half-answer", Fault::HalfAnswer),
    ("stale", Fault::Stale),
    ("refused-stream", Fault::RefusedStream),
    ("redirect", Fault::Redirect),
    ("empty-answer", Fault::EmptyAnswer),
    ("html-answer", Fault::HtmlAnswer),
    ("no-id-answer", Fault::NoIdAnswer),
    ("huge-answer", Fault::HugeAnswer),
    ("catalog-answer", Fault::CatalogAnswer),
    ("gzip-answer", Fault::GzipAnswer),
    ("many-headers-answer", Fault::ManyHeadersAnswer),
    ("unfinished-answer", Fault::UnfinishedAnswer),
];

impl Fault {
    /// Every name; `NNN` stands for a status.
    pub fn names() -> impl Iterator<Item = String> {
        let numbered = [
            "status-NNN",
            "proxy-NNN",
            "lost-NNN",
            "lookup-NNN",
            "delay-MILLISECONDS",
        ];
        let garbled = GARBLINGS.iter().map(|(name, _)| format!("{name}-NNN"));
        let named = NAMED.iter().map(|(name, _)| *name);
        (numbered.into_iter().chain(named).map(str::to_owned))
            .chain(garbled)
            .chain(Intermediary::names())
    }
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        if let Some((_, fault)) = NAMED.iter().find(|(known, _)| *known == name) {
            return Ok(fault.clone());
        }
        if let Some((form, after)) = Intermediary::named(name) {
            return Ok(Fault::Between(form, after));
        }
        let numbered = name.split_once('-').and_then(|(kind, number)| {
            let status = || StatusCode::from_bytes(number.as_bytes()).ok();
            match kind {
                "status" => status().map(Fault::Status),
                "proxy" => status().map(Fault::Proxy),
                "lost" => status().map(Fault::Lost),
                "lookup" => status().map(Fault::LookUp),
                "delay" => Some(Fault::Delay(Duration::from_millis(number.parse().ok()?))),
                _ => {
                    let (_, garbling) = GARBLINGS.iter().find(|(name, _)| *name == kind)?;
                    status().map(|status| Fault::Garbled(*garbling, status))
                }
            }
        });
        numbered.ok_or_else(|| {
            format!(
                "no fault is called {name:?}; there are {}",
                Fault::names().collect::<Vec<_>>().join(", ")
            )
        })
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Status(status) => write!(f, "status-{}", status.as_str()),
            Fault::Proxy(status) => write!(f, "proxy-{}", status.as_str()),
            Fault::Lost(status) => write!(f, "lost-{}", status.as_str()),
            Fault::Between(form, after) => {
                let after = if *after { "-after" } else { "" };
                write!(f, "{}{after}", form.name)
            }
            Fault::Garbled(garbling, status) => {
                let found = GARBLINGS.iter().find(|(_, known)| known == garbling);
                let name = found.map_or("garbled", |(name, _)| name);
                write!(f, "{name}-{}", status.as_str())
            }
            Fault::LookUp(status) => write!(f, "lookup-{}", status.as_str()),
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
        for name in Fault::names() {
            let name = name.replace("NNN", "403").replace("MILLISECONDS", "20");
            let fault: Fault = name.parse().expect(&name);
            assert_eq!(fault.to_string(), name);
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
        ] {
            let error = odd.parse::<Fault>().expect_err(odd);
            assert!(error.contains("varnish-503-after"), "{error}");
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
        let others = Fault::names().filter(|name| Intermediary::named(name).is_none());
        for row in rows.chain(others.map(|name| format!("| `{name}` | "))) {
            assert!(page.contains(&row), "docs/simulator.md lacks {row}");
        }
    }
}

//! The faults that a create can meet, by name.

use std::{fmt, str::FromStr, time::Duration};

use http::StatusCode;

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
}

/// The faults without a number.
const NAMED: [(&str, Fault); 16] = [
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
];

impl FromStr for Fault {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        if let Some((_, fault)) = NAMED.iter().find(|(known, _)| *known == name) {
            return Ok(fault.clone());
        }
        let numbered = name.split_once('-').and_then(|(kind, number)| {
            let status = || StatusCode::from_bytes(number.as_bytes()).ok();
            match kind {
                "status" => status().map(Fault::Status),
                "proxy" => status().map(Fault::Proxy),
                "lost" => status().map(Fault::Lost),
                "lookup" => status().map(Fault::LookUp),
                "delay" => Some(Fault::Delay(Duration::from_millis(number.parse().ok()?))),
                _ => None,
            }
        });
        numbered.ok_or_else(|| {
            let named: Vec<_> = NAMED.iter().map(|(name, _)| *name).collect();
            format!(
                "no fault is called {name:?}; there are status-NNN, proxy-NNN, lost-NNN, lookup-NNN, \
                 delay-MILLISECONDS, {}",
                named.join(", ")
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
    use super::*;

    #[test]
    fn every_name_is_read_back() {
        let numbered = [
            "status-403",
            "proxy-502",
            "lost-504",
            "lookup-403",
            "delay-20",
        ];
        for name in NAMED.map(|(name, _)| name).iter().chain(&numbered) {
            let fault: Fault = name.parse().expect(name);
            assert_eq!(fault.to_string(), *name);
        }
        for odd in ["", "status", "status-x", "status-99", "delay-", "melt-1"] {
            assert!(odd.parse::<Fault>().is_err(), "{odd}");
        }
    }
}

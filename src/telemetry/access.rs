//! The access line of a call.

use std::{io::Write, time::SystemTime};

use tracing::Level;

use super::{log_queue, logs::LogFormat};

/// By which `--log-level` and readers of logs know the line.
pub(super) const TARGET: &str = "access";

/// What the line says of its call.
pub(super) struct AccessLine<'a> {
    pub(super) method: &'a str,
    pub(super) code: &'static str,
    pub(super) outcome: Option<&'static str>,
    pub(super) reason: Option<&'static str>,
    pub(super) http_status: Option<u16>,
    pub(super) batch_id: Option<&'a str>,
    pub(super) request_id: &'a str,
    pub(super) trace_id: Option<String>,
    pub(super) client: Option<&'a str>,
    pub(super) milliseconds: f64,
    pub(super) upstream_milliseconds: f64,
    pub(super) upstream_requests: u32,
}

/// What a member of the line is.
enum Value<'a> {
    /// A word of ours, which needs no escapes in JSON.
    Word(&'static str),
    Text(&'a str),
    Count(u32),
    Milliseconds(f64),
}

impl Value<'_> {
    fn write_json(&self, json: &mut Vec<u8>) {
        // A Vec takes all that is written.
        let _ = match self {
            Value::Word(word) => {
                json.push(b'"');
                json.extend_from_slice(word.as_bytes());
                json.push(b'"');
                return;
            }
            Value::Text(text) => serde_json::to_writer(json, text),
            Value::Count(count) => serde_json::to_writer(json, count),
            Value::Milliseconds(time) => serde_json::to_writer(json, time),
        };
    }
}

impl AccessLine<'_> {
    fn members(&self) -> [(&'static str, Option<Value<'_>>); 12] {
        use Value::{Count, Milliseconds, Text, Word};
        [
            ("method", Some(Text(self.method))),
            ("code", Some(Word(self.code))),
            ("outcome", self.outcome.map(Word)),
            ("reason", self.reason.map(Word)),
            (
                "http_status",
                self.http_status.map(|status| Count(status.into())),
            ),
            ("batch_id", self.batch_id.map(Text)),
            ("request_id", Some(Text(self.request_id))),
            ("trace_id", self.trace_id.as_deref().map(Text)),
            ("client", self.client.map(Text)),
            ("milliseconds", Some(Milliseconds(self.milliseconds))),
            (
                "upstream_milliseconds",
                Some(Milliseconds(self.upstream_milliseconds)),
            ),
            ("upstream_requests", Some(Count(self.upstream_requests))),
        ]
    }

    /// Writes the line, unless the log level leaves it out.
    pub(super) fn write(&self, format: LogFormat, failed: bool) {
        let (level, message, wanted) = match failed {
            false => (
                "INFO",
                "call ended",
                tracing::enabled!(target: TARGET, Level::INFO),
            ),
            true => (
                "WARN",
                "call failed",
                tracing::enabled!(target: TARGET, Level::WARN),
            ),
        };
        match format {
            _ if !wanted => {}
            LogFormat::Json => log_queue::push(&self.json(level, message)),
            LogFormat::Text if failed => {
                tracing::warn!(target: TARGET, "{message}{}", self.text())
            }
            LogFormat::Text => tracing::info!(target: TARGET, "{message}{}", self.text()),
        }
    }

    /// The line as tracing would write it. Not by tracing, which takes more than
    /// five times the instructions, and there is one for each call; nor by serde,
    /// which looks for escapes in every name: 1,700 instructions more.
    fn json(&self, level: &str, message: &str) -> Vec<u8> {
        let mut json = Vec::with_capacity(512);
        let now = humantime::format_rfc3339_micros(SystemTime::now());
        let begin = r#"{"timestamp":""#;
        let _ = write!(
            json,
            r#"{begin}{now}","level":"{level}","message":"{message}""#
        );
        for (name, value) in self.members() {
            if let Some(value) = value {
                json.extend_from_slice(b",\"");
                json.extend_from_slice(name.as_bytes());
                json.extend_from_slice(b"\":");
                value.write_json(&mut json);
            }
        }
        let _ = writeln!(json, r#","target":"{TARGET}"}}"#);
        json
    }

    /// ` name=value …`
    fn text(&self) -> String {
        let mut text = Vec::new();
        for (name, value) in self.members() {
            if let Some(value) = value {
                let _ = write!(text, " {name}=");
                value.write_json(&mut text);
            }
        }
        String::from_utf8(text).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const LINE: AccessLine<'_> = AccessLine {
        method: "CreateBatch",
        code: "OK",
        outcome: Some("APPLIED"),
        reason: Some("CREATED"),
        http_status: None,
        batch_id: Some("5d01\"\n"),
        request_id: "7",
        trace_id: None,
        client: Some("spiffe://mesh/a\\b"),
        milliseconds: 1.25,
        upstream_milliseconds: 1.0,
        upstream_requests: 1,
    };

    #[test]
    fn json_is_one_line_that_says_all() {
        let bytes = LINE.json("INFO", "call ended");
        let (last, line) = bytes.split_last().unwrap();
        assert_eq!(*last, b'\n');
        assert!(!line.contains(&b'\n'));
        let mut line: serde_json::Value = serde_json::from_slice(line).unwrap();
        let timestamp = line.as_object_mut().unwrap().remove("timestamp").unwrap();
        assert!(humantime::parse_rfc3339(timestamp.as_str().unwrap()).is_ok());
        let expected = json!({
            "level": "INFO", "message": "call ended", "method": "CreateBatch", "code": "OK",
            "outcome": "APPLIED", "reason": "CREATED", "batch_id": "5d01\"\n", "request_id": "7",
            "client": "spiffe://mesh/a\\b", "milliseconds": 1.25, "upstream_milliseconds": 1.0,
            "upstream_requests": 1, "target": "access",
        });
        assert_eq!(line, expected);
    }

    #[test]
    fn text_is_one_line_that_says_all() {
        assert_eq!(
            LINE.text(),
            r#" method="CreateBatch" code="OK" outcome="APPLIED" reason="CREATED""#.to_owned()
                + r#" batch_id="5d01\"\n" request_id="7" client="spiffe://mesh/a\\b""#
                + r#" milliseconds=1.25 upstream_milliseconds=1.0 upstream_requests=1"#
        );
    }
}

//! The access line of a call.

use std::{fmt::Write, time::SystemTime};

use serde::Serialize;
use serde_json::Value;
use tracing::Level;

use super::logs::{self, LogFormat};

/// By which `--log-level` and readers of logs know the line.
const TARGET: &str = "access";

/// What the line says of its call.
#[derive(Serialize)]
pub(super) struct AccessLine<'a> {
    pub(super) method: &'static str,
    pub(super) code: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) outcome: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) http_status: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) batch_id: Option<&'a str>,
    pub(super) request_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) trace_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) client: Option<&'a str>,
    pub(super) milliseconds: f64,
    pub(super) upstream_milliseconds: f64,
    pub(super) upstream_requests: u32,
}

/// The line as tracing would write it. Not by tracing: there is one for each
/// call, and this takes a fifth of the instructions.
#[derive(Serialize)]
struct JsonLine<'a> {
    timestamp: String,
    level: &'static str,
    message: &'static str,
    #[serde(flatten)]
    line: &'a AccessLine<'a>,
    target: &'static str,
}

impl AccessLine<'_> {
    /// Writes the line, unless the log level leaves it out.
    pub(super) fn write(&self, failed: bool) {
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
        match logs::format().filter(|_| wanted) {
            Some(LogFormat::Json) => logs::write_soon(&JsonLine {
                timestamp: humantime::format_rfc3339_micros(SystemTime::now()).to_string(),
                level,
                message,
                line: self,
                target: TARGET,
            }),
            Some(LogFormat::Text) if failed => {
                tracing::warn!(target: TARGET, "{message}{}", self.text())
            }
            Some(LogFormat::Text) => tracing::info!(target: TARGET, "{message}{}", self.text()),
            None => {}
        }
    }

    /// ` name=value …`
    fn text(&self) -> String {
        let mut text = String::new();
        if let Ok(Value::Object(members)) = serde_json::to_value(self) {
            for (name, value) in members {
                let _ = write!(text, " {name}={value}");
            }
        }
        text
    }
}

//! One request to the API: counted, timed and traced, however it ends.

use std::sync::Arc;

use http::{HeaderMap, StatusCode};
use opentelemetry::{
    KeyValue,
    trace::{SpanKind, Status, TraceContextExt, Tracer},
};
use tokio::time::Instant;

use super::{
    call::CallRecord,
    metrics::{AnsweredLabels, ErrorType, RestLabels},
    trace::TraceContext,
};
use crate::{outcome::Failure, status};

/// A documented call of the API.
#[derive(Clone, Copy, Debug)]
pub enum RestCall {
    /// Batch Ingestion's `POST /batches`.
    Create,
    /// Catalog's `GET /batches`.
    LookUp,
}

impl RestCall {
    pub(super) const ALL: [RestCall; 2] = [RestCall::Create, RestCall::LookUp];

    fn method(self) -> &'static str {
        match self {
            RestCall::Create => "POST",
            RestCall::LookUp => "GET",
        }
    }

    fn template(self) -> &'static str {
        match self {
            RestCall::Create => "/batches",
            RestCall::LookUp => "/catalog/batches",
        }
    }

    /// As spans are named: method and template.
    fn span(self) -> &'static str {
        match self {
            RestCall::Create => "POST /batches",
            RestCall::LookUp => "GET /catalog/batches",
        }
    }

    pub(super) fn labels(self) -> RestLabels {
        RestLabels {
            http_request_method: self.method(),
            url_template: self.template(),
        }
    }

    pub(super) fn answered(self, status: Option<u16>, error_type: ErrorType) -> AnsweredLabels {
        AnsweredLabels {
            http_request_method: self.method(),
            url_template: self.template(),
            http_response_status_code: status,
            error_type,
        }
    }
}

/// One request, from its begin to its end.
#[derive(Debug)]
pub struct RestRequest {
    call: RestCall,
    record: Arc<CallRecord>,
    trace: TraceContext,
    started: Instant,
    status: Option<StatusCode>,
    /// What it ends as if its future is dropped: it was called back.
    error: ErrorType,
}

impl RestRequest {
    pub(super) fn begin(call: RestCall, host: Option<&str>, record: Arc<CallRecord>) -> Self {
        let telemetry = &record.telemetry;
        telemetry.metrics.active_requests(call).inc();
        let trace = match (&telemetry.tracer, &record.trace.context) {
            (Some(tracer), Some(parent)) => {
                let mut attributes = vec![
                    KeyValue::new("http.request.method", call.method()),
                    KeyValue::new("url.template", call.template()),
                ];
                if let Some(host) = host {
                    attributes.push(KeyValue::new("server.address", host.to_owned()));
                }
                let span = tracer
                    .span_builder(call.span())
                    .with_kind(SpanKind::Client)
                    .with_attributes(attributes)
                    .start_with_context(tracer, parent);
                record.trace.at(parent.with_span(span))
            }
            _ => record.trace.clone(),
        };
        RestRequest {
            call,
            record,
            trace,
            started: Instant::now(),
            status: None,
            error: ErrorType::Word("CANCELED"),
        }
    }

    /// Puts the trace into the headers of the request.
    pub fn inject(&self, headers: &mut HeaderMap) {
        self.trace.inject(headers);
    }

    /// The status line has arrived.
    pub fn answered(&mut self, status: StatusCode) {
        self.status = Some(status);
    }

    /// The request ends so.
    pub fn ends<T>(mut self, result: &Result<T, Failure>) {
        self.error = match (self.status, result) {
            (_, Ok(_)) => ErrorType::None,
            (Some(status), Err(_)) if status.as_u16() >= 400 => ErrorType::Status(status.as_u16()),
            (_, Err(failure)) => ErrorType::Word(status::row(failure).reason),
        };
    }
}

impl Drop for RestRequest {
    fn drop(&mut self) {
        let took = self.started.elapsed();
        let status = self.status.map(|status| status.as_u16());
        self.record.request_ended(took);

        let metrics = &self.record.telemetry.metrics;
        metrics.active_requests(self.call).dec();
        let answered = self.call.answered(status, self.error);
        let seconds = metrics.request_seconds.get_or_create(&answered);
        seconds.observe(took.as_secs_f64());

        if self.record.telemetry.tracer.is_some()
            && let Some(context) = &self.trace.context
        {
            let span = context.span();
            if let Some(status) = status {
                let key = "http.response.status_code";
                span.set_attribute(KeyValue::new(key, i64::from(status)));
            }
            if self.error != ErrorType::None {
                span.set_attribute(KeyValue::new("error.type", self.error.to_string()));
                span.set_status(Status::error(""));
            }
            span.end();
        }
    }
}

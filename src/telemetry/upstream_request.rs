//! One request to the API: counted, timed and traced, however it ends.

use std::sync::Arc;

use http::{HeaderMap, StatusCode};
use opentelemetry::{
    KeyValue,
    trace::{SpanKind, Status, TraceContextExt, Tracer},
};
use prometheus_client::metrics::gauge::Gauge;
use tokio::time::Instant;

use super::{
    call::CallRecord,
    metrics::{ErrorType, ResponseLabels, RouteLabels},
    trace::TraceContext,
};
use crate::{api::Route, failure::Failure};

impl RouteLabels {
    pub(super) fn of(route: Route) -> Self {
        RouteLabels {
            http_request_method: route.method,
            url_template: route.template,
        }
    }
}

impl ResponseLabels {
    pub(super) fn of(route: Route, status: Option<u16>, error_type: ErrorType) -> Self {
        ResponseLabels {
            http_request_method: route.method,
            url_template: route.template,
            http_response_status_code: status,
            error_type,
        }
    }
}

/// One request, from its start to its end.
#[derive(Debug)]
pub struct UpstreamRequest {
    route: Route,
    record: Arc<CallRecord>,
    /// Counts it while it is under way.
    active: Gauge,
    trace: TraceContext,
    started: Instant,
    status: Option<StatusCode>,
    /// What it ends as if its future is dropped: it was cancelled.
    error: ErrorType,
}

impl UpstreamRequest {
    pub(super) fn begin(route: Route, host: Option<&str>, record: Arc<CallRecord>) -> Self {
        let telemetry = &record.telemetry;
        let active = &telemetry.metrics.active_requests;
        let active = active.get_or_create_owned(&RouteLabels::of(route));
        active.inc();
        let trace = match (&telemetry.tracer, &record.trace.context) {
            (Some(tracer), Some(parent)) => {
                let mut attributes = vec![
                    KeyValue::new("http.request.method", route.method),
                    KeyValue::new("url.template", route.template),
                ];
                if let Some(host) = host {
                    attributes.push(KeyValue::new("server.address", host.to_owned()));
                }
                let span = tracer
                    .span_builder(route.span)
                    .with_kind(SpanKind::Client)
                    .with_attributes(attributes)
                    .start_with_context(tracer, parent);
                record.trace.at(parent.with_span(span))
            }
            _ => record.trace.clone(),
        };
        UpstreamRequest {
            route,
            record,
            active,
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
    pub fn responded(&mut self, status: StatusCode) {
        self.status = Some(status);
    }

    /// The request ends with this result.
    pub fn completed<T>(mut self, result: &Result<T, Failure>) {
        self.error = match (self.status, result) {
            (_, Ok(_)) => ErrorType::None,
            (Some(status), Err(_)) if status.as_u16() >= 400 => ErrorType::Status(status.as_u16()),
            (_, Err(failure)) => ErrorType::Word(failure.reason().as_str()),
        };
    }
}

impl Drop for UpstreamRequest {
    fn drop(&mut self) {
        let took = self.started.elapsed();
        let status = self.status.map(|status| status.as_u16());
        self.record.request_ended(took);

        self.active.dec();
        let metrics = &self.record.telemetry.metrics;
        let response = ResponseLabels::of(self.route, status, self.error);
        let seconds = metrics.request_seconds.get_or_create(&response);
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

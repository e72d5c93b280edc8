//! The metrics, and where they are registered. docs/operations.md explains
//! each.
//!
//! Names follow go-grpc-middleware (`grpc_server_…`), gRFC A66 (message sizes)
//! and OpenTelemetry's semantic conventions (`http_client_…`). What can be
//! counted is there from the start, at zero: the first failure of a kind must
//! not be invisible to `rate()`.

use std::fmt::{self, Write};

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder},
    metrics::{
        counter::Counter, exemplar::HistogramWithExemplars, family::Family, gauge::Gauge,
        histogram::Histogram, info::Info,
    },
    registry::{Registry, Unit},
};
use tonic::Code;

use super::{BATCH_SERVICE, log_queue, process::Process};
use crate::{
    api::{self, Method, ROUTES, Safety},
    failure::{Effect, Reason},
};

/// Seconds: 1 ms to 30 s, with the default of `--request-timeout`.
const LATENCY: [f64; 15] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0,
];

/// Bytes: 64 to 256 Ki, the largest message.
const SIZE: [f64; 7] = [64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0, 262_144.0];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MethodLabels {
    grpc_type: &'static str,
    grpc_service: &'static str,
    grpc_method: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct HandledLabels {
    grpc_type: &'static str,
    grpc_service: &'static str,
    grpc_method: &'static str,
    grpc_code: &'static str,
}

/// The reason of a success that has no other.
pub(super) const SUCCESS: &str = "OK";

/// One label.
macro_rules! label {
    ($type:ident, $name:ident) => {
        #[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
        pub(super) struct $type {
            pub(super) $name: &'static str,
        }
    };
}
label!(ResultLabel, result);
label!(ReasonLabel, reason);

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ReasonLabels {
    pub(super) grpc_method: &'static str,
    /// Empty for calls that change nothing.
    pub(super) outcome: &'static str,
    pub(super) reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct OutcomeLabels {
    pub(super) grpc_method: &'static str,
    pub(super) outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct RouteLabels {
    pub(super) http_request_method: &'static str,
    pub(super) url_template: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ResponseLabels {
    pub(super) http_request_method: &'static str,
    pub(super) url_template: &'static str,
    pub(super) http_response_status_code: Option<u16>,
    pub(super) error_type: ErrorType,
}

/// OpenTelemetry's `error.type`: an HTTP status, or a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum ErrorType {
    None,
    Status(u16),
    Word(&'static str),
}

impl fmt::Display for ErrorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ErrorType::None => Ok(()),
            ErrorType::Status(status) => status.fmt(f),
            ErrorType::Word(word) => f.write_str(word),
        }
    }
}

impl EncodeLabelValue for ErrorType {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        write!(encoder, "{self}")
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct TraceLabel {
    pub(super) trace_id: String,
}

/// The metrics of one gRPC method.
#[derive(Debug)]
pub(super) struct MethodMetrics {
    pub(super) started: Counter,
    handled: [Counter; 17],
    pub(super) seconds: HistogramWithExemplars<TraceLabel>,
    pub(super) received: Histogram,
    pub(super) sent: Histogram,
}

impl MethodMetrics {
    pub(super) fn handled(&self, code: Code) -> &Counter {
        &self.handled[code as usize]
    }
}

#[derive(Debug)]
pub(super) struct Metrics {
    methods: Vec<MethodMetrics>,
    pub(super) calls_in_flight: Gauge,
    pub(super) executions_in_flight: Gauge,
    pub(super) max_in_flight: Gauge,
    pub(super) outcomes: Family<ReasonLabels, Counter>,
    pub(super) abandoned: Family<OutcomeLabels, Counter>,
    pub(super) lookups: Family<ResultLabel, Counter>,
    pub(super) retries: Counter,
    pub(super) request_seconds: Family<ResponseLabels, Histogram>,
    pub(super) active_requests: Family<RouteLabels, Gauge>,
    pub(super) connects: Family<ResultLabel, Counter>,
    pub(super) connect_seconds: Histogram,
    pub(super) connections: Gauge,
    pub(super) max_connections: Gauge,
    pub(super) accepted_connections: Counter,
    pub(super) refused_connections: Family<ReasonLabel, Counter>,
    pub(super) ready: Gauge,
    /// There only with TLS, and so is the next.
    pub(super) tls_not_before: Family<[(&'static str, &'static str); 0], Gauge>,
    pub(super) tls_not_after: Family<[(&'static str, &'static str); 0], Gauge>,
    pub(super) tls_reloads: Family<ResultLabel, Counter>,
}

impl Metrics {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let metrics = Metrics {
            methods: method_metrics(registry),
            calls_in_flight: registered(
                registry,
                "aep_gateway_calls_in_flight",
                "Calls that have started and not ended",
            ),
            executions_in_flight: registered(
                registry,
                "aep_gateway_executions_in_flight",
                "Calls that are worked on, also creates whose caller has left",
            ),
            max_in_flight: registered(
                registry,
                "aep_gateway_max_in_flight",
                "How many calls may be in flight (--max-in-flight)",
            ),
            outcomes: registered(
                registry,
                "aep_gateway_outcomes",
                "Calls that completed, by outcome and reason",
            ),
            abandoned: registered(
                registry,
                "aep_gateway_abandoned_calls",
                "Calls that completed after the client had disconnected",
            ),
            lookups: registered(
                registry,
                "aep_gateway_lookups",
                "Lookups by external id, by what came of them",
            ),
            retries: registered(
                registry,
                "aep_gateway_retries",
                "Requests to the API that were sent again",
            ),
            request_seconds: Family::new_with_constructor(|| Histogram::new(LATENCY)),
            active_requests: registered(
                registry,
                "http_client_active_requests",
                "Requests to the API that have no response yet",
            ),
            connects: registered(
                registry,
                "aep_gateway_upstream_connects",
                "Connections to the API that were opened, or failed to open",
            ),
            connect_seconds: Histogram::new(LATENCY),
            connections: registered(
                registry,
                "aep_gateway_connections",
                "Connections of callers that are open",
            ),
            max_connections: registered(
                registry,
                "aep_gateway_max_connections",
                "How many connections of callers may be open (--max-connections)",
            ),
            accepted_connections: registered(
                registry,
                "aep_gateway_accepted_connections",
                "Connections of callers that were accepted",
            ),
            refused_connections: registered(
                registry,
                "aep_gateway_refused_connections",
                "Connections of callers that were closed before they made a call",
            ),
            ready: registered(
                registry,
                "aep_gateway_ready",
                "1 if /readyz says so, 0 while the gateway drains",
            ),
            tls_not_before: Family::default(),
            tls_not_after: Family::default(),
            tls_reloads: registered(
                registry,
                "aep_gateway_tls_reloads",
                "Changed certificates that were taken over, or could not be",
            ),
        };
        registry.register_with_unit(
            "aep_gateway_tls_certificate_not_before",
            "When the gateway's certificate begins, since the epoch",
            Unit::Seconds,
            metrics.tls_not_before.clone(),
        );
        registry.register_with_unit(
            "aep_gateway_tls_certificate_not_after",
            "When the gateway's certificate ends, since the epoch",
            Unit::Seconds,
            metrics.tls_not_after.clone(),
        );
        registry.register_with_unit(
            "http_client_request_duration",
            "How long requests to the API took",
            Unit::Seconds,
            metrics.request_seconds.clone(),
        );
        registry.register_with_unit(
            "aep_gateway_upstream_connect",
            "How long it took to open connections to the API, TLS included",
            Unit::Seconds,
            metrics.connect_seconds.clone(),
        );
        registry.register(
            "aep_gateway_build",
            "The build that is running",
            Info::new([("version", env!("CARGO_PKG_VERSION"))]),
        );
        registry.register(
            "aep_gateway_log_lines_lost",
            "Log lines that were dropped because standard error was not read",
            log_queue::LOST.clone(),
        );
        registry.register_collector(Box::new(Process::default()));
        metrics.begin_at_zero();
        metrics
    }

    /// Makes every combination of labels that is known beforehand.
    fn begin_at_zero(&self) {
        for method in api::methods().iter().filter(|method| method.is_known()) {
            let grpc_method = &*method.name;
            let count = |outcome, reason| {
                let labels = ReasonLabels {
                    grpc_method,
                    outcome,
                    reason,
                };
                let _ = self.outcomes.get_or_create(&labels);
            };
            let has_outcome = method.safety != Safety::Safe;
            for reason in Reason::ALL {
                let outcome = has_outcome.then(|| reason.effect().as_str());
                count(outcome.unwrap_or_default(), reason.as_str());
            }
            if !has_outcome {
                count("", SUCCESS);
                continue;
            }
            for origin in ["CREATED", "FOUND", "RECOVERED"] {
                count(Effect::Applied.as_str(), origin);
            }
            for outcome in Effect::ALL.map(Effect::as_str) {
                let labels = OutcomeLabels {
                    grpc_method,
                    outcome,
                };
                let _ = self.abandoned.get_or_create(&labels);
            }
        }
        for result in ["found", "nothing", "failed"] {
            let _ = self.lookups.get_or_create(&ResultLabel { result });
        }
        for result in ["ok", "failed"] {
            let _ = self.connects.get_or_create(&ResultLabel { result });
            let _ = self.tls_reloads.get_or_create(&ResultLabel { result });
        }
        for reason in ["accept", "limit", "silent", "tls"] {
            let _ = (self.refused_connections).get_or_create(&ReasonLabel { reason });
        }
        for route in ROUTES {
            let _ = (self.active_requests).get_or_create(&RouteLabels::of(*route));
            let response = ResponseLabels::of(*route, Some(200), ErrorType::None);
            let _ = self.request_seconds.get_or_create(&response);
        }
    }

    pub(super) fn method(&self, method: &Method) -> &MethodMetrics {
        &self.methods[method.index]
    }
}

fn registered<M>(registry: &mut Registry, name: &str, help: &str) -> M
where
    M: prometheus_client::registry::Metric + Clone + Default,
{
    let metric = M::default();
    registry.register(name, help, metric.clone());
    metric
}

/// One for each of [`api::methods`], so that what a call counts needs no lookup
/// by labels.
fn method_metrics(registry: &mut Registry) -> Vec<MethodMetrics> {
    let started: Family<MethodLabels, Counter> =
        registered(registry, "grpc_server_started", "Calls that were started");
    let handled: Family<HandledLabels, Counter> =
        registered(registry, "grpc_server_handled", "Calls that ended, by code");
    let seconds: Family<MethodLabels, HistogramWithExemplars<TraceLabel>> =
        Family::new_with_constructor(|| HistogramWithExemplars::new(LATENCY.into_iter()));
    registry.register_with_unit(
        "grpc_server_handling",
        "How long calls took",
        Unit::Seconds,
        seconds.clone(),
    );
    let mut sizes = |name, help| {
        let family: Family<MethodLabels, Histogram> =
            Family::new_with_constructor(|| Histogram::new(SIZE));
        registry.register_with_unit(name, help, Unit::Bytes, family.clone());
        family
    };
    let received = sizes(
        "grpc_server_call_rcvd_total_compressed_message_size",
        "Bytes of messages that a call received, compressed where they were",
    );
    let sent = sizes(
        "grpc_server_call_sent_total_compressed_message_size",
        "Bytes of messages that a call sent",
    );
    let metrics = |method: &'static Method| {
        let (grpc_type, grpc_service) = (method.grpc_type(), BATCH_SERVICE);
        let grpc_method = &*method.name;
        let labels = MethodLabels {
            grpc_type,
            grpc_service,
            grpc_method,
        };
        MethodMetrics {
            started: started.get_or_create_owned(&labels),
            handled: std::array::from_fn(|code| {
                handled.get_or_create_owned(&HandledLabels {
                    grpc_type,
                    grpc_service,
                    grpc_method,
                    grpc_code: grpc_code(Code::from_i32(code as i32)),
                })
            }),
            seconds: seconds.get_or_create_owned(&labels),
            received: received.get_or_create_owned(&labels),
            sent: sent.get_or_create_owned(&labels),
        }
    };
    api::methods().iter().map(metrics).collect()
}

/// The spelling that go-grpc-middleware has made common in this label.
fn grpc_code(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "Canceled",
        Code::Unknown => "Unknown",
        Code::InvalidArgument => "InvalidArgument",
        Code::DeadlineExceeded => "DeadlineExceeded",
        Code::NotFound => "NotFound",
        Code::AlreadyExists => "AlreadyExists",
        Code::PermissionDenied => "PermissionDenied",
        Code::ResourceExhausted => "ResourceExhausted",
        Code::FailedPrecondition => "FailedPrecondition",
        Code::Aborted => "Aborted",
        Code::OutOfRange => "OutOfRange",
        Code::Unimplemented => "Unimplemented",
        Code::Internal => "Internal",
        Code::Unavailable => "Unavailable",
        Code::DataLoss => "DataLoss",
        Code::Unauthenticated => "Unauthenticated",
    }
}

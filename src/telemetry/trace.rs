//! Traces: where they go, and the context that calls bring and requests carry.

use std::{env, time::Duration};

use http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::{
    Context,
    propagation::TextMapPropagator,
    trace::{SpanContext, TraceContextExt, TracerProvider},
};
use opentelemetry_http::{HeaderExtractor, HeaderInjector};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::{
    Resource,
    propagation::TraceContextPropagator,
    trace::{SdkTracer, SdkTracerProvider},
};

use reqwest::{blocking, redirect};

use super::b3;
use crate::proxies::Proxies;

const NAME: &str = "aep-batch-gateway";

const TRACE_STATE: HeaderName = HeaderName::from_static("tracestate");

/// How long the last spans may take to leave when the gateway stops.
const LAST_SPANS: Duration = Duration::from_secs(2);

/// Sends spans to a collector, from a thread of its own.
#[derive(Debug)]
pub struct Tracing(SdkTracerProvider);

impl Tracing {
    /// Traces if OpenTelemetry's environment variables ask for them
    /// ("OTLP Exporter Configuration"). Fails with what is wrong with those.
    pub fn from_environment(proxies: &Proxies) -> Result<Option<Self>, String> {
        let variable = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
        if !is_wanted(variable)? {
            return Ok(None);
        }
        let client = client(variable, proxies)
            .map_err(|error| format!("OTEL_EXPORTER_OTLP_…: {error:?}"))?;
        let exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(client)
            .with_protocol(Protocol::HttpBinary)
            .build()
            .map_err(|error| format!("OTEL_EXPORTER_OTLP_…: {error}"))?;
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_resource(resource())
            .build();
        Ok(Some(Tracing(provider)))
    }

    /// Makes spans.
    pub fn tracer(&self) -> SdkTracer {
        self.0.tracer(NAME)
    }

    /// Sends what has not been sent. Not for asynchronous code: it waits.
    pub fn stop(&self) {
        if let Err(error) = self.0.shutdown_with_timeout(LAST_SPANS) {
            tracing::warn!(%error, "the last spans were not sent");
        }
    }
}

/// Sends spans to the collector and to nobody else: it follows no redirect. Certificate
/// authorities are read only where TLS is spoken.
fn client(
    variable: impl Fn(&str) -> Option<String>,
    proxies: &Proxies,
) -> reqwest::Result<blocking::Client> {
    const DEFAULT: Duration = Duration::from_secs(10);
    let of_traces = |name: &str| {
        variable(&format!("OTEL_EXPORTER_OTLP_TRACES_{name}"))
            .or_else(|| variable(&format!("OTEL_EXPORTER_OTLP_{name}")))
    };
    // Milliseconds ("OTLP Exporter Configuration").
    let timeout = of_traces("TIMEOUT").and_then(|text| text.parse().ok());
    let client = blocking::Client::builder()
        .redirect(redirect::Policy::none())
        .referer(false)
        .timeout(timeout.map_or(DEFAULT, Duration::from_millis));
    let client = match proxies.is_empty() {
        true => client.no_proxy(),
        false => client.proxy(proxies.clone().for_client()),
    };
    let endpoint = of_traces("ENDPOINT").and_then(|url| url.parse().ok());
    match endpoint.is_some_and(|url| proxies.need_tls(&url)) {
        true => client.build(),
        false => client.tls_certs_only([]).build(),
    }
}

/// Whether spans are to be sent.
fn is_wanted(variable: impl Fn(&str) -> Option<String>) -> Result<bool, String> {
    let is_disabled = variable("OTEL_SDK_DISABLED").is_some_and(|v| v.eq_ignore_ascii_case("true"));
    let exporter = variable("OTEL_TRACES_EXPORTER");
    let endpoint = variable("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
        .or_else(|| variable("OTEL_EXPORTER_OTLP_ENDPOINT"));
    if is_disabled {
        return Ok(false);
    }
    match exporter.as_deref() {
        Some("none") => return Ok(false),
        None if endpoint.is_none() => return Ok(false),
        None | Some("otlp") => {}
        Some(other) => {
            return Err(format!(
                "OTEL_TRACES_EXPORTER is {other:?}: there are otlp and none"
            ));
        }
    }
    let protocol = variable("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
        .or_else(|| variable("OTEL_EXPORTER_OTLP_PROTOCOL"));
    match protocol.as_deref() {
        None | Some("http/protobuf") => Ok(true),
        Some(other) => Err(format!(
            "OTEL_EXPORTER_OTLP_PROTOCOL is {other:?}: there is http/protobuf \
             (collectors take it on port 4318)"
        )),
    }
}

/// The variables name the service; else it has the program's name.
fn resource() -> Resource {
    let named = env::var_os("OTEL_SERVICE_NAME").is_some()
        || env::var("OTEL_RESOURCE_ATTRIBUTES").is_ok_and(|all| all.contains("service.name="));
    let version = opentelemetry::KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
    let resource = Resource::builder().with_attribute(version);
    match named {
        true => resource.build(),
        false => resource.with_service_name(NAME).build(),
    }
}

/// The trace that a call belongs to.
#[derive(Clone, Debug, Default)]
pub(super) struct TraceContext {
    /// With the span that the next one is below. None: no trace.
    pub(super) context: Option<Context>,
    b3: Option<b3::Form>,
    /// The caller has no trace, and says that none is to begin here.
    pub(super) is_declined: bool,
}

impl TraceContext {
    /// The caller's: W3C's, else B3's.
    pub(super) fn of_caller(headers: &HeaderMap) -> Self {
        let b3 = b3::extract(headers);
        let remote = match headers.contains_key("traceparent") {
            true => w3c(headers),
            false => None,
        };
        let form = b3.as_ref().map(|(_, form)| *form);
        let remote = remote.or_else(|| b3.map(|(context, _)| context));
        TraceContext {
            is_declined: remote.is_none() && b3::declines(headers),
            context: remote.map(|remote| Context::new().with_remote_span_context(remote)),
            b3: form,
        }
    }

    /// The same trace, at another span.
    pub(super) fn at(&self, context: Context) -> Self {
        TraceContext {
            context: Some(context),
            ..*self
        }
    }

    /// Puts the context into the headers of a request: W3C's form, and B3 as it
    /// came. W3C's baggage stays here: it may hold what is nobody's business.
    pub(super) fn inject(&self, headers: &mut HeaderMap) {
        let Some(context) = &self.context else {
            return;
        };
        TraceContextPropagator::new().inject_context(context, &mut HeaderInjector(headers));
        // The propagator writes it even if the caller sent none.
        if headers.get(TRACE_STATE).is_some_and(HeaderValue::is_empty) {
            headers.remove(TRACE_STATE);
        }
        if let Some(form) = self.b3 {
            b3::inject(form, context.span().span_context(), headers);
        }
    }

    pub(super) fn trace_id(&self) -> Option<String> {
        let context = self.context.as_ref()?;
        Some(context.span().span_context().trace_id().to_string())
    }

    /// The trace's id, if somebody keeps the trace.
    pub(super) fn sampled_id(&self) -> Option<String> {
        let context = self.context.as_ref()?;
        let is_sampled = context.span().span_context().is_sampled();
        is_sampled.then(|| self.trace_id()).flatten()
    }
}

/// `traceparent` and `tracestate`.
fn w3c(headers: &HeaderMap) -> Option<SpanContext> {
    let context = TraceContextPropagator::new()
        .extract_with_context(&Context::new(), &HeaderExtractor(headers));
    let remote = context.span().span_context().clone();
    remote.is_valid().then_some(remote)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traces_are_sent_if_the_variables_say_so() {
        let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318");
        for (variables, wanted) in [
            (&[][..], Ok(false)),
            (&[endpoint], Ok(true)),
            (
                &[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://c")],
                Ok(true),
            ),
            (&[("OTEL_TRACES_EXPORTER", "otlp")], Ok(true)),
            (&[endpoint, ("OTEL_TRACES_EXPORTER", "none")], Ok(false)),
            (&[endpoint, ("OTEL_SDK_DISABLED", "true")], Ok(false)),
            (&[endpoint, ("OTEL_TRACES_EXPORTER", "zipkin")], Err(())),
            (
                &[endpoint, ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")],
                Err(()),
            ),
            (
                &[
                    endpoint,
                    ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
                    ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf"),
                ],
                Ok(true),
            ),
        ] {
            let variable = |name: &str| {
                let found = variables.iter().find(|(known, _)| *known == name);
                found.map(|(_, value)| (*value).to_owned())
            };
            assert_eq!(is_wanted(variable).map_err(|_| ()), wanted, "{variables:?}");
        }
    }

    #[test]
    fn a_context_is_passed_on_as_it_came() {
        let came = [
            (
                "traceparent",
                "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            ),
            ("tracestate", "congo=t61rcWkgMzE"),
            ("b3", "80f198ee56343ba864fe8b2a57d3eff7-e457b5a2e4d86bd1-1"),
            ("baggage", "user=alice"),
        ];
        let mut headers = HeaderMap::new();
        for (name, value) in came {
            headers.insert(name, http::HeaderValue::from_static(value));
        }
        let trace = TraceContext::of_caller(&headers);
        let id = "4bf92f3577b34da6a3ce929d0e0e4736";
        assert_eq!(trace.trace_id().as_deref(), Some(id));
        let mut sent = HeaderMap::new();
        trace.inject(&mut sent);
        assert_eq!(sent["traceparent"], came[0].1);
        assert_eq!(sent["tracestate"], came[1].1);
        // Both headers carry the one trace that the spans belong to.
        assert_eq!(sent["b3"], format!("{id}-00f067aa0ba902b7-1"));
        assert!(!sent.contains_key("baggage"));
    }

    #[test]
    fn without_a_good_context_nothing_is_sent() {
        for bad in [
            "",
            "00-0-0-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        ] {
            let mut headers = HeaderMap::new();
            headers.insert("traceparent", http::HeaderValue::from_static(bad));
            let mut sent = HeaderMap::new();
            let trace = TraceContext::of_caller(&headers);
            trace.inject(&mut sent);
            assert!(sent.is_empty() && trace.trace_id().is_none(), "{bad}");
        }
    }
}

//! B3 propagation, which meshes with a Zipkin tracer use: the header `b3`, or
//! several `x-b3-…` (github.com/openzipkin/b3-propagation).

use http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::trace::{SpanContext, SpanId, TraceFlags, TraceId, TraceState};

const SINGLE: HeaderName = HeaderName::from_static("b3");
const TRACE_ID: HeaderName = HeaderName::from_static("x-b3-traceid");
const SPAN_ID: HeaderName = HeaderName::from_static("x-b3-spanid");
const SAMPLED: HeaderName = HeaderName::from_static("x-b3-sampled");
const FLAGS: HeaderName = HeaderName::from_static("x-b3-flags");

/// In which of its two forms a context came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    Single,
    Multi,
}

/// Whether a call without ids says that it is not to be traced.
pub(super) fn declines(headers: &HeaderMap) -> bool {
    [SINGLE, SAMPLED].iter().any(|name| {
        let value = headers.get(name).map(HeaderValue::as_bytes);
        matches!(value, Some(b"0" | b"false"))
    })
}

/// The context that a call carries.
pub(super) fn extract(headers: &HeaderMap) -> Option<(SpanContext, Form)> {
    let text = |name: &HeaderName| headers.get(name)?.to_str().ok();
    if let Some(value) = text(&SINGLE) {
        // {trace id}-{span id}[-{sampled}[-{parent span id}]]
        let mut parts = value.split('-');
        let (trace, span) = (parts.next()?, parts.next()?);
        let sampled = parts.next().is_none_or(is_sampled);
        return Some((context(trace, span, sampled)?, Form::Single));
    }
    let (trace, span) = (text(&TRACE_ID)?, text(&SPAN_ID)?);
    let is_debug = text(&FLAGS) == Some("1");
    let sampled = is_debug || text(&SAMPLED).is_none_or(is_sampled);
    Some((context(trace, span, sampled)?, Form::Multi))
}

/// Debug (`d`) implies it.
fn is_sampled(text: &str) -> bool {
    matches!(text, "1" | "d" | "true")
}

fn context(trace: &str, span: &str, sampled: bool) -> Option<SpanContext> {
    let is_hex = |text: &str| text.bytes().all(|b| b.is_ascii_hexdigit());
    if !matches!(trace.len(), 16 | 32) || span.len() != 16 || !is_hex(trace) || !is_hex(span) {
        return None;
    }
    let context = SpanContext::new(
        TraceId::from_hex(trace).ok()?,
        SpanId::from_hex(span).ok()?,
        TraceFlags::default().with_sampled(sampled),
        true,
        TraceState::default(),
    );
    context.is_valid().then_some(context)
}

/// Puts a context into the headers of a request.
pub(super) fn inject(form: Form, context: &SpanContext, headers: &mut HeaderMap) {
    let sampled = if context.is_sampled() { "1" } else { "0" };
    let (trace, span) = (context.trace_id(), context.span_id());
    let mut insert = |name, text: String| {
        if let Ok(value) = HeaderValue::try_from(text) {
            headers.insert(name, value);
        }
    };
    match form {
        Form::Single => insert(SINGLE, format!("{trace}-{span}-{sampled}")),
        Form::Multi => {
            insert(TRACE_ID, trace.to_string());
            insert(SPAN_ID, span.to_string());
            insert(SAMPLED, sampled.to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let pairs = pairs.iter().map(|(name, value)| {
            let name = HeaderName::from_static(name);
            (name, HeaderValue::from_static(value))
        });
        pairs.collect()
    }

    const TRACE: &str = "80f198ee56343ba864fe8b2a57d3eff7";
    const SPAN: &str = "e457b5a2e4d86bd1";

    #[test]
    fn both_forms_are_read_and_written_as_they_came() {
        for (form, sampled, pairs) in [
            (
                Form::Single,
                true,
                &[("b3", "80f198ee56343ba864fe8b2a57d3eff7-e457b5a2e4d86bd1-1")][..],
            ),
            (
                Form::Single,
                false,
                &[("b3", "80f198ee56343ba864fe8b2a57d3eff7-e457b5a2e4d86bd1-0")],
            ),
            (
                Form::Multi,
                true,
                &[
                    ("x-b3-traceid", TRACE),
                    ("x-b3-spanid", SPAN),
                    ("x-b3-sampled", "1"),
                ],
            ),
        ] {
            let came = headers(pairs);
            let (context, got) = extract(&came).expect("a context");
            assert_eq!((got, context.is_sampled()), (form, sampled));
            assert_eq!(context.trace_id().to_string(), TRACE);
            assert_eq!(context.span_id().to_string(), SPAN);
            let mut sent = HeaderMap::new();
            inject(form, &context, &mut sent);
            assert_eq!(sent, came);
        }
    }

    #[test]
    fn short_ids_debug_and_parents_are_known() {
        for (value, sampled) in [
            ("64fe8b2a57d3eff7-e457b5a2e4d86bd1", true),
            ("64fe8b2a57d3eff7-e457b5a2e4d86bd1-d", true),
            (
                "64fe8b2a57d3eff7-e457b5a2e4d86bd1-0-05e3ac9a4f6e3b90",
                false,
            ),
        ] {
            let (context, _) = extract(&headers(&[("b3", value)])).expect(value);
            let id = context.trace_id().to_string();
            assert_eq!(id, "000000000000000064fe8b2a57d3eff7");
            assert_eq!(context.is_sampled(), sampled, "{value}");
        }
    }

    #[test]
    fn garbage_is_ignored() {
        for value in [
            "",
            "0",
            "-",
            "é",
            "64fe8b2a57d3eff7",
            "64fe8b2a57d3eff7-e457",
            "+4fe8b2a57d3eff7-e457b5a2e4d86bd1",
            "0000000000000000-e457b5a2e4d86bd1",
        ] {
            let mut map = HeaderMap::new();
            let value = HeaderValue::from_bytes(value.as_bytes()).expect("bytes");
            map.insert(SINGLE, value.clone());
            assert!(extract(&map).is_none(), "{value:?}");
        }
        assert!(extract(&headers(&[("x-b3-traceid", TRACE)])).is_none());
    }

    #[test]
    fn a_call_can_decline_to_be_traced() {
        for (name, value, declined) in [
            ("b3", "0", true),
            ("b3", "1", false),
            ("x-b3-sampled", "0", true),
            ("x-b3-sampled", "1", false),
        ] {
            let headers = headers(&[(name, value)]);
            assert!(extract(&headers).is_none());
            assert_eq!(declines(&headers), declined, "{name}: {value}");
        }
    }
}

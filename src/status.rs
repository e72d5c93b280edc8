//! A failure → the gRPC status that tells the truth about it. It decides
//! nothing: what happened, what it changed and whether it may be repeated is
//! known from [`crate::failure`] and [`crate::api`].
//!
//! Two rules carry the table:
//!
//! 1. UNAVAILABLE, which meshes and clients retry, only where repeating the call
//!    does no harm; UNKNOWN, which no mesh can be told to retry, where a call
//!    that is not idempotent may have changed something.
//! 2. A failure that must not be repeated is sent so that it cannot be: see
//!    `server::response`.
//!
//! This is the only file that makes a `tonic::Status`.

use std::{collections::HashMap, time::Duration};

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use tokio::time::Instant;
use tonic::{Code, Status, metadata::MetadataMap};
use tonic_types::{ErrorDetails, StatusExt};

use crate::{
    api::{Method, Safety},
    call::CallContext,
    failure::{ApiError, Effect, Failure, Kind, NotSent, Reason, Retry, Violation},
    headers::REQUEST_ID,
};

/// `ErrorInfo.domain` of every failure.
pub const DOMAIN: &str = "aep-batch-gateway";

/// Carries the outcome in plain metadata.
pub const OUTCOME: HeaderName = HeaderName::from_static("aep-batch-outcome");

/// On failures that may be sent again without harm, and on no others: what a
/// mesh can be told to retry (Envoy's `retriable-headers`). Not the code, which
/// sidecars use too when they lose a call.
const RETRY: HeaderName = HeaderName::from_static("aep-batch-retry");

/// Tells gRPC clients when to try again (gRFC A6).
const RETRY_PUSHBACK: HeaderName = HeaderName::from_static("grpc-retry-pushback-ms");

/// Keeps Envoy from retrying what another gateway would be told as well.
const ENVOY_RATE_LIMITED: HeaderName = HeaderName::from_static("x-envoy-ratelimited");

/// "Experience Platform troubleshooting guide: API status codes".
const API_HELP: &str =
    "https://experienceleague.adobe.com/docs/experience-platform/landing/troubleshooting.html";

/// The code for a reason. A failure with an unknown outcome is UNKNOWN where a
/// repetition may do harm, and otherwise UNAVAILABLE, or INTERNAL where a
/// repetition would not help.
pub fn code(reason: Reason, safety: Safety) -> Code {
    match reason {
        Reason::InvalidRequest | Reason::ApiInvalidRequest => Code::InvalidArgument,
        Reason::CredentialsMissing | Reason::ApiUnauthenticated => Code::Unauthenticated,
        Reason::ClientNotAllowed | Reason::LookupForbidden | Reason::ApiPermissionDenied => {
            Code::PermissionDenied
        }
        Reason::BatchNotFound | Reason::ApiNotFound => Code::NotFound,
        Reason::ExternalIdTaken | Reason::ApiConflict => Code::AlreadyExists,
        Reason::ApiPreconditionFailed | Reason::ApiRefused | Reason::ApiRedirected => {
            Code::FailedPrecondition
        }
        Reason::Unsupported | Reason::NotOneMessage | Reason::ApiNotImplemented => {
            Code::Unimplemented
        }
        Reason::InvalidFraming => Code::Internal,
        Reason::MessageTooLarge | Reason::ApiRateLimited => Code::ResourceExhausted,
        Reason::MessageTimeout
        | Reason::DeadlineBeforeSending
        | Reason::DeadlineAfterSending
        | Reason::DeadlineUnsettled => Code::DeadlineExceeded,
        Reason::GatewayOverloaded
        | Reason::GatewayStopping
        | Reason::LookupFailed
        | Reason::UpstreamDnsFailed
        | Reason::UpstreamConnectFailed
        | Reason::UpstreamConnectTimeout
        | Reason::UpstreamTlsFailed
        | Reason::UpstreamUnprocessed
        | Reason::ApiUnavailable => Code::Unavailable,
        Reason::UpstreamFailed
        | Reason::UpstreamUnproven
        | Reason::AnswerUnproven
        | Reason::ConnectionLost
        | Reason::UpstreamTimeout
        | Reason::LookupUnsettled
        | Reason::GatewayStopped => match safety {
            Safety::NotIdempotent => Code::Unknown,
            Safety::Safe | Safety::Idempotent => Code::Unavailable,
        },
        Reason::GatewayFailed | Reason::AnswerUnusable => match safety {
            Safety::NotIdempotent => Code::Unknown,
            Safety::Safe | Safety::Idempotent => Code::Internal,
        },
    }
}

/// The outcome that a failed call tells: none where it could not change
/// anything.
pub fn outcome(failure: &Failure, method: &Method) -> Option<Effect> {
    (method.safety != Safety::Safe).then_some(failure.effect)
}

/// The status for a failed call, with its details. All of its metadata
/// together is below 8 KiB: some clients turn more into an error of their own.
pub fn of_call(failure: &Failure, call: &CallContext, external_id: Option<&str>) -> Status {
    let about = About {
        method: Some(call.method()),
        request_id: Some(call.request_id()),
        external_id,
        deadline: call.deadline,
    };
    of_failure(failure, about)
}

/// What of a call its status tells.
#[derive(Clone, Copy, Debug, Default)]
pub struct About<'a> {
    /// The method of `BatchService`. Calls of other services have no outcome.
    pub method: Option<&'a Method>,
    /// `x-request-id`, ours or the caller's.
    pub request_id: Option<&'a HeaderValue>,
    /// `external_id` of the request.
    pub external_id: Option<&'a str>,
    /// When the caller stops waiting.
    pub deadline: Option<Instant>,
}

/// The status for a failed call of any service.
pub fn of_failure(failure: &Failure, about: About<'_>) -> Status {
    let reason = failure.reason();
    let safety = about.method.map_or(Safety::Safe, |method| method.safety);
    let code = code(reason, safety);
    let outcome = about.method.and_then(|method| outcome(failure, method));
    let mut info = HashMap::new();
    let mut tell = |key: &str, value: Option<&str>, longest: usize| {
        if let Some(value) = value.filter(|value| !value.is_empty()) {
            info.insert(key.to_owned(), truncate(value, longest).to_owned());
        }
    };
    let mut details = ErrorDetails::new();
    let mut metadata = HeaderMap::new();

    tell("outcome", outcome.map(Effect::as_str), 32);
    tell("externalId", about.external_id, 256);
    let request = match &failure.kind {
        Kind::Lookup(cause) => &cause.kind,
        kind => kind,
    };
    match request {
        Kind::ExternalIdTaken { batch_id } => tell("batchId", Some(batch_id), 128),
        Kind::InvalidRequest(violations) | Kind::CredentialsMissing(violations) => {
            for Violation { field, description } in violations {
                details.add_bad_request_violation(field, format!("{field} {description}"));
            }
        }
        Kind::Api(error) => {
            let body = &error.body;
            tell("httpStatus", Some(error.status.as_str()), 3);
            tell("upstreamErrorCode", body.code.as_deref(), 64);
            tell("upstreamTitle", body.title.as_deref(), 128);
            tell("upstreamDetail", body.detail.as_deref(), 600);
            tell("upstreamReport", body.report.as_deref(), 600);
            tell("upstreamRequestId", error.request_id.as_deref(), 128);
            tell("redirectHost", error.redirect_host.as_deref(), 253);
            if error.status == StatusCode::TOO_MANY_REQUESTS {
                metadata.insert(ENVOY_RATE_LIMITED, HeaderValue::from_static("true"));
                details.add_quota_failure_violation(
                    "x-gw-ims-org-id",
                    "The API accepts 138 batches per minute and user.",
                );
            }
            if reason.effect() == Effect::NotApplied {
                details.add_help_link("Experience Platform API status codes", API_HELP);
            }
        }
        Kind::InvalidResponse(response) => {
            tell("httpStatus", Some(response.status.as_str()), 3);
            tell("batchId", response.batch_id.as_deref(), 128);
            tell("location", response.location.as_deref(), 512);
            tell("upstreamDetail", Some(&response.beginning), 600);
            tell("upstreamRequestId", response.request_id.as_deref(), 128);
        }
        _ => {}
    }
    if let Some(delay) = retry_delay(reason, code, failure.retry) {
        details.set_retry_info(Some(delay));
        // A pushback orders a retry whatever the client's service config says (grpc-java), so it
        // goes only with the code that is meant to be retried.
        if code == Code::Unavailable && matches!(failure.retry, Retry::After(_)) {
            metadata.insert(RETRY_PUSHBACK, pushback(delay, about.deadline));
        }
    }
    details.set_error_info(reason.as_str(), DOMAIN, info);
    if let Some(id) = about.request_id {
        details.set_request_info(id.to_str().unwrap_or_default(), "");
        metadata.insert(REQUEST_ID, id.clone());
    }
    if let Some(outcome) = outcome {
        metadata.insert(OUTCOME, HeaderValue::from_static(outcome.as_str()));
    }
    if code == Code::Unavailable {
        metadata.insert(RETRY, HeaderValue::from_static("safe"));
    }
    build(code, &message(failure, outcome), details, metadata)
}

/// Why the server refuses a call before its service sees it, by tonic's status.
pub fn refused_by_tonic(status: &Status) -> Failure {
    let reason = match status.code() {
        Code::Unimplemented => Reason::Unsupported,
        // Other gRPC libraries say RESOURCE_EXHAUSTED of a message that is too large.
        Code::OutOfRange | Code::ResourceExhausted => Reason::MessageTooLarge,
        _ => Reason::InvalidRequest,
    };
    let message = match status.message() {
        "" => "The method is not known",
        message => message,
    };
    Failure::refused(Kind::RefusedByServer(reason, message.to_owned()))
}

#[expect(
    clippy::disallowed_methods,
    reason = "the one place that makes a Status"
)]
fn build(code: Code, message: &str, details: ErrorDetails, metadata: HeaderMap) -> Status {
    Status::with_error_details_and_metadata(
        code,
        truncate(message, 600),
        details,
        MetadataMap::from_headers(metadata),
    )
}

/// When the caller may try again, where that may help.
fn retry_delay(reason: Reason, code: Code, retry: Retry) -> Option<Duration> {
    let unstated = match code {
        Code::Unavailable => Duration::from_secs(1),
        // The API's limit is one per minute, and it may not say how much of it is over.
        _ if reason == Reason::ApiRateLimited => Duration::from_secs(5),
        _ => return None,
    };
    Some(match retry {
        Retry::After(delay) => delay,
        Retry::Never | Retry::Backoff => unstated,
    })
}

/// A client library that retries waits for that long even if its own deadline
/// comes first, and then never tells what we said. So where there is no time
/// for another attempt it is told not to try (gRFC A6).
fn pushback(delay: Duration, deadline: Option<Instant>) -> HeaderValue {
    match deadline {
        Some(deadline) if deadline <= Instant::now() + delay => HeaderValue::from_static("-1"),
        _ => (delay.as_millis() as u64).into(),
    }
}

/// What happened and what to do, in a sentence or two.
fn message(failure: &Failure, outcome: Option<Effect>) -> String {
    let what = what_happened(failure);
    let what = truncate(what.trim_end_matches(['.', ' ']), 480);
    match outcome {
        None => format!("{what}."),
        Some(Effect::NotApplied) => format!("{what}. No batch was created."),
        Some(Effect::Unknown) => {
            format!("{what}. A batch may have been created: look for it before you try again.")
        }
        Some(Effect::Applied) => {
            format!("{what}. The batch was created: do not create it again.")
        }
    }
}

fn what_happened(failure: &Failure) -> String {
    match &failure.kind {
        Kind::InvalidRequest(violations) | Kind::CredentialsMissing(violations) => violations
            .iter()
            .map(|violation| format!("{} {}", violation.field, violation.description))
            .collect::<Vec<_>>()
            .join("; "),
        Kind::RefusedByServer(_, message) => message.clone(),
        Kind::NotSent(not_sent) => match not_sent {
            NotSent::Dns(cause) => format!("The API's host name could not be resolved: {cause}"),
            NotSent::Connect(cause) => format!("The API could not be reached: {cause}"),
            NotSent::ConnectTimeout => "The API did not accept a connection in time".to_owned(),
            NotSent::Tls(cause) => format!("The TLS handshake with the API failed: {cause}"),
            NotSent::Unprocessed(cause) => {
                format!("The API returned the request unprocessed: {cause}")
            }
            NotSent::ShuttingDown => "The gateway is shutting down".to_owned(),
            NotSent::TooManyFiles => {
                "The gateway has no file descriptor left for a connection to the API".to_owned()
            }
            NotSent::Overloaded => {
                "The gateway has too many calls, or bytes of calls, in flight".to_owned()
            }
        },
        Kind::DeadlineBeforeSending => "The deadline passed before the request was sent".to_owned(),
        Kind::DeadlineAfterSending => "The deadline passed before the API responded".to_owned(),
        Kind::UpstreamTimeout(limit) => format!("The API did not respond within {limit:?}"),
        Kind::ConnectionLost(cause) => {
            format!("The connection broke before the API responded: {cause}")
        }
        Kind::ShutDown => "The gateway stopped before the API responded".to_owned(),
        Kind::Internal => "The gateway failed".to_owned(),
        Kind::DeadlineUnsettled => {
            "The deadline passed while an earlier attempt may still create the batch".to_owned()
        }
        Kind::ExternalIdTaken { batch_id } => {
            format!("The external id belongs to batch {batch_id}, which has other content")
        }
        Kind::BatchNotFound => "There is no such batch, or Catalog does not show it yet".to_owned(),
        Kind::Lookup(cause) => {
            let what = what_happened(cause);
            format!("The lookup by external id failed: {what}")
        }
        Kind::Api(error) => api_error(error),
        Kind::InvalidResponse(response) => {
            let status = response.status.as_u16();
            let who = match response.reason {
                Reason::AnswerUnusable => "The API",
                _ => "The API, or a proxy in between,",
            };
            let problem = &response.problem;
            format!("{who} responded with HTTP {status}, but the response {problem}")
        }
    }
}

fn api_error(error: &ApiError) -> String {
    let status = error.status.as_u16();
    if error.status.is_redirection() {
        let host = error.redirect_host.as_deref().unwrap_or("nowhere");
        return format!("HTTP {status} redirects to {host}: check the upstream URL");
    }
    let who = match error.reason.effect() {
        Effect::NotApplied => "The API",
        _ => "The API, or a proxy in between,",
    };
    format!("{who} responded with HTTP {status}{}", api_text(error))
}

/// `" (403010): Oauth token is missing"`, as far as the API said it.
fn api_text(error: &ApiError) -> String {
    let body = &error.body;
    let code = body.code.as_deref().map(|code| format!(" ({code})"));
    let text = body.detail.as_deref().or(body.title.as_deref());
    let text = text.map(|text| format!(": {text}"));
    code.unwrap_or_default() + &text.unwrap_or_default()
}

/// At most `longest` bytes of a text.
fn truncate(text: &str, longest: usize) -> &str {
    &text[..text.floor_char_boundary(longest)]
}

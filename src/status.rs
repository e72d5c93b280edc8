//! A failure → the gRPC status that tells the truth about it.
//!
//! A create is not idempotent, so the code says what may have happened
//! upstream, not what the HTTP number alone would suggest. Two rules carry the
//! table:
//!
//! 1. UNAVAILABLE, which meshes and clients retry, only when certainly nothing
//!    was created; UNKNOWN, which no mesh can be told to retry, whenever
//!    something may have been.
//! 2. A failure that must not be repeated is sent so that it cannot be: see
//!    `server::answer`.
//!
//! This is the only file that makes a `tonic::Status`.

use std::{collections::HashMap, time::Duration};

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use tonic::{Code, Status, metadata::MetadataMap};
use tonic_types::{ErrorDetails, StatusExt};

use crate::{
    credentials::REQUEST_ID,
    outcome::{Failure, LookUpFailure, NeverSent, Outcome, Refusal, Violation},
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

/// One row of the table of statuses: a reason, and what it means.
#[derive(Debug, PartialEq, Eq)]
pub struct Row {
    /// `ErrorInfo.reason`.
    pub reason: &'static str,
    /// The gRPC code.
    pub code: Code,
    /// Whether the batch exists.
    pub outcome: Outcome,
}

macro_rules! table {
    ($($reason:ident: $code:ident, $outcome:ident;)*) => {
        $(pub(crate) const $reason: Row = Row {
            reason: stringify!($reason),
            code: Code::$code,
            outcome: Outcome::$outcome,
        };)*
        /// Every row, for the documentation.
        pub const TABLE: &[&Row] = &[$(&$reason),*];
    };
}

table! {
    INVALID_REQUEST: InvalidArgument, NotApplied;
    CLIENT_NOT_ALLOWED: PermissionDenied, NotApplied;
    CREDENTIALS_MISSING: Unauthenticated, NotApplied;
    UNSUPPORTED: Unimplemented, NotApplied;
    INVALID_FRAMING: Internal, NotApplied;
    NOT_ONE_MESSAGE: Unimplemented, NotApplied;
    MESSAGE_TOO_LARGE: ResourceExhausted, NotApplied;
    MESSAGE_TIMEOUT: DeadlineExceeded, NotApplied;
    GATEWAY_OVERLOADED: Unavailable, NotApplied;
    GATEWAY_STOPPING: Unavailable, NotApplied;
    EXTERNAL_ID_TAKEN: AlreadyExists, NotApplied;
    LOOKUP_FAILED: Unavailable, NotApplied;
    LOOKUP_FORBIDDEN: PermissionDenied, NotApplied;
    DEADLINE_BEFORE_SENDING: DeadlineExceeded, NotApplied;
    UPSTREAM_DNS_FAILED: Unavailable, NotApplied;
    UPSTREAM_CONNECT_FAILED: Unavailable, NotApplied;
    UPSTREAM_CONNECT_TIMEOUT: Unavailable, NotApplied;
    UPSTREAM_TLS_FAILED: Unavailable, NotApplied;
    UPSTREAM_UNPROCESSED: Unavailable, NotApplied;
    API_INVALID_REQUEST: InvalidArgument, NotApplied;
    API_UNAUTHENTICATED: Unauthenticated, NotApplied;
    API_PERMISSION_DENIED: PermissionDenied, NotApplied;
    API_NOT_FOUND: NotFound, NotApplied;
    API_CONFLICT: AlreadyExists, NotApplied;
    API_PRECONDITION_FAILED: FailedPrecondition, NotApplied;
    API_NOT_IMPLEMENTED: Unimplemented, NotApplied;
    API_RATE_LIMITED: ResourceExhausted, NotApplied;
    API_REFUSED: FailedPrecondition, NotApplied;
    API_UNAVAILABLE: Unavailable, NotApplied;
    API_REDIRECTED: FailedPrecondition, NotApplied;
    UPSTREAM_FAILED: Unknown, Unknown;
    UPSTREAM_UNPROVEN: Unknown, Unknown;
    ANSWER_UNPROVEN: Unknown, Unknown;
    CONNECTION_LOST: Unknown, Unknown;
    UPSTREAM_TIMEOUT: Unknown, Unknown;
    DEADLINE_AFTER_SENDING: DeadlineExceeded, Unknown;
    DEADLINE_UNSETTLED: DeadlineExceeded, Unknown;
    LOOKUP_UNSETTLED: Unknown, Unknown;
    GATEWAY_STOPPED: Unknown, Unknown;
    GATEWAY_FAILED: Unknown, Unknown;
    ANSWER_UNUSABLE: Unknown, Applied;
}

/// The row for a failure.
pub fn row(failure: &Failure) -> &'static Row {
    match failure {
        Failure::Invalid(_) => &INVALID_REQUEST,
        Failure::NoCredentials(_) => &CREDENTIALS_MISSING,
        Failure::NeverSent(NeverSent::Dns(_)) => &UPSTREAM_DNS_FAILED,
        Failure::NeverSent(NeverSent::Connect(_)) => &UPSTREAM_CONNECT_FAILED,
        Failure::NeverSent(NeverSent::ConnectTimeout) => &UPSTREAM_CONNECT_TIMEOUT,
        Failure::NeverSent(NeverSent::Tls(_)) => &UPSTREAM_TLS_FAILED,
        Failure::NeverSent(NeverSent::Unprocessed(_)) => &UPSTREAM_UNPROCESSED,
        Failure::NeverSent(NeverSent::Overloaded | NeverSent::TooManyFiles) => &GATEWAY_OVERLOADED,
        Failure::NeverSent(NeverSent::Stopping) => &GATEWAY_STOPPING,
        Failure::Stopped => &GATEWAY_STOPPED,
        Failure::DeadlineBeforeSending => &DEADLINE_BEFORE_SENDING,
        Failure::DeadlineAfterSending => &DEADLINE_AFTER_SENDING,
        Failure::TimedOut(_) => &UPSTREAM_TIMEOUT,
        Failure::ConnectionLost(_) => &CONNECTION_LOST,
        Failure::DeadlineUnsettled => &DEADLINE_UNSETTLED,
        Failure::LookUp(look_up) => look_up_failed(look_up),
        Failure::ExternalIdTaken { .. } => &EXTERNAL_ID_TAKEN,
        Failure::Panicked => &GATEWAY_FAILED,
        Failure::Refused(refusal) => refused(refusal),
        Failure::Unusable(answer) if answer.outcome == Outcome::Unknown => &ANSWER_UNPROVEN,
        Failure::Unusable(_) => &ANSWER_UNUSABLE,
    }
}

/// A failed look-up creates nothing, but an earlier try may have.
fn look_up_failed(look_up: &LookUpFailure) -> &'static Row {
    if look_up.is_retry {
        return &LOOKUP_UNSETTLED;
    }
    match &look_up.cause {
        Failure::Refused(refusal) => match refused(refusal) {
            row @ &(API_UNAUTHENTICATED | API_RATE_LIMITED) => row,
            &API_PERMISSION_DENIED => &LOOKUP_FORBIDDEN,
            _ => &LOOKUP_FAILED,
        },
        _ => &LOOKUP_FAILED,
    }
}

/// What a proven refusal is called. Who says it is not known: the API, or
/// something in front of it that did not let the request through.
fn refused(refusal: &Refusal) -> &'static Row {
    let status = refusal.status.as_u16();
    if refusal.outcome != Outcome::NotApplied {
        return match status {
            408 | 499 | 500..=599 => &UPSTREAM_FAILED,
            _ => &UPSTREAM_UNPROVEN,
        };
    }
    match refusal.error.code.as_deref() {
        Some(code) if means_no_credentials(code) => return &API_UNAUTHENTICATED,
        Some(code) if means_unavailable(code) => return &API_UNAVAILABLE,
        _ => {}
    }
    match status {
        307 | 308 => &API_REDIRECTED,
        400 | 411 | 413 | 414 | 415 | 422 | 431 => &API_INVALID_REQUEST,
        401 => &API_UNAUTHENTICATED,
        403 => &API_PERMISSION_DENIED,
        404 => &API_NOT_FOUND,
        405 | 501 => &API_NOT_IMPLEMENTED,
        409 => &API_CONFLICT,
        412 => &API_PRECONDITION_FAILED,
        429 => &API_RATE_LIMITED,
        _ => &API_REFUSED,
    }
}

/// The codes of Adobe's API gateway that say "no or bad token or key"
/// (adobe-apiplatform/api-gateway-request-validation). 403025 says that the
/// token is good but has no right, and is not one of them.
fn means_no_credentials(code: &str) -> bool {
    matches!(
        code,
        "403000" | "403003" | "403010" | "403020" | "401013" | "401014" | "401015"
    )
}

/// The codes of Adobe's API gateway that say that it could not validate the
/// key, the token, its profile or a signature just now. (The third comes with
/// HTTP 403.)
fn means_unavailable(code: &str) -> bool {
    matches!(code, "503000" | "503010" | "503020" | "503030")
}

/// What of a call its status needs.
#[derive(Clone, Copy, Debug)]
pub struct CallNames<'a> {
    /// `x-request-id`, ours or the caller's.
    pub request_id: &'a http::HeaderValue,
    /// `external_id` of the request.
    pub external_id: Option<&'a str>,
    /// How long the caller still waits, if it set a deadline.
    pub time_left: Option<Duration>,
}

/// The status for a failed call, with its details. All of its metadata
/// together is below 8 KiB: some clients turn more into an error of their own.
pub fn from_failure(failure: &Failure, call: CallNames<'_>) -> Status {
    let row = row(failure);
    let mut info = HashMap::from([("outcome".to_owned(), row.outcome.to_string())]);
    let mut tell = |key: &str, value: Option<&str>, longest: usize| {
        if let Some(value) = value.filter(|value| !value.is_empty()) {
            info.insert(key.to_owned(), cut(value, longest).to_owned());
        }
    };
    let mut details = ErrorDetails::new();
    let mut metadata = HeaderMap::new();

    tell("externalId", call.external_id, 256);
    let request = match failure {
        Failure::LookUp(look_up) => &look_up.cause,
        _ => failure,
    };
    match request {
        Failure::ExternalIdTaken { batch_id } => tell("batchId", Some(batch_id), 128),
        Failure::Invalid(violations) | Failure::NoCredentials(violations) => {
            for Violation { field, description } in violations {
                details.add_bad_request_violation(field, format!("{field} {description}"));
            }
        }
        Failure::Refused(refusal) => {
            let error = &refusal.error;
            tell("httpStatus", Some(refusal.status.as_str()), 3);
            tell("upstreamErrorCode", error.code.as_deref(), 64);
            tell("upstreamTitle", error.title.as_deref(), 128);
            tell("upstreamDetail", error.detail.as_deref(), 600);
            tell("upstreamReport", error.report.as_deref(), 600);
            tell("upstreamRequestId", refusal.request_id.as_deref(), 128);
            tell("redirectHost", refusal.redirect_host.as_deref(), 253);
            if refusal.status == StatusCode::TOO_MANY_REQUESTS {
                metadata.insert(ENVOY_RATE_LIMITED, HeaderValue::from_static("true"));
                details.add_quota_failure_violation(
                    "x-gw-ims-org-id",
                    "The API accepts 138 batches per minute and user.",
                );
            }
            if row.outcome == Outcome::NotApplied {
                details.add_help_link("Experience Platform API status codes", API_HELP);
            }
        }
        Failure::Unusable(answer) => {
            tell("httpStatus", Some(answer.status.as_str()), 3);
            tell("batchId", answer.batch_id.as_deref(), 128);
            tell("location", answer.location.as_deref(), 512);
            tell("upstreamDetail", Some(&answer.beginning), 600);
            tell("upstreamRequestId", answer.request_id.as_deref(), 128);
        }
        _ => {}
    }
    if let Some(delay) = retry_delay(row, failure) {
        details.set_retry_info(Some(delay));
        // A pushback orders a retry whatever the client's service config says (grpc-java), so it
        // goes only with the code that is meant to be retried.
        if row.code == Code::Unavailable && retry_after(failure).is_some() {
            metadata.insert(RETRY_PUSHBACK, pushback(delay, call.time_left));
        }
    }
    details.set_error_info(row.reason, DOMAIN, info);
    details.set_request_info(call.request_id.to_str().unwrap_or_default(), "");
    metadata.insert(REQUEST_ID, call.request_id.clone());
    build(row, &sentence(failure), details, metadata)
}

/// The row for a call that the gRPC layer ended before it reached the service,
/// by tonic's code.
pub fn protocol_row(code: Code) -> &'static Row {
    match code {
        Code::Unimplemented => &UNSUPPORTED,
        // Other gRPC libraries say RESOURCE_EXHAUSTED of a message that is too large.
        Code::OutOfRange | Code::ResourceExhausted => &MESSAGE_TOO_LARGE,
        _ => &INVALID_REQUEST,
    }
}

/// The status for such a call, with tonic's message.
pub fn from_protocol_error(row: &Row, message: &str, request_id: Option<&HeaderValue>) -> Status {
    let message = match message {
        "" => "The method is not known",
        message => message.trim_end_matches('.'),
    };
    refused_before_service(row, message, request_id)
}

/// The status for every call of a client whose certificate is not on the list.
pub fn client_not_allowed(identity: Option<&str>, request_id: Option<&HeaderValue>) -> Status {
    let message = match identity {
        Some(name) => format!(
            "The client certificate names {}: it must name one of --tls-allowed-clients, and one alone",
            cut(name, 256)
        ),
        None => "The client certificate names no URI and no host".to_owned(),
    };
    refused_before_service(&CLIENT_NOT_ALLOWED, &message, request_id)
}

fn refused_before_service(row: &Row, message: &str, request_id: Option<&HeaderValue>) -> Status {
    let info = HashMap::from([("outcome".to_owned(), row.outcome.to_string())]);
    let mut details = ErrorDetails::new();
    details.set_error_info(row.reason, DOMAIN, info);
    let mut metadata = HeaderMap::new();
    if let Some(id) = request_id {
        details.set_request_info(id.to_str().unwrap_or_default(), "");
        metadata.insert(REQUEST_ID, id.clone());
    }
    let sentence = format!("{message}. No batch was created.");
    build(row, &sentence, details, metadata)
}

/// The status for a call of a service that this server does not have.
pub fn unknown_service() -> Status {
    from_protocol_error(&UNSUPPORTED, "The service is not known", None)
}

#[expect(
    clippy::disallowed_methods,
    reason = "the one place that makes a Status"
)]
fn build(row: &Row, sentence: &str, details: ErrorDetails, mut metadata: HeaderMap) -> Status {
    metadata.insert(OUTCOME, HeaderValue::from_static(row.outcome.as_str()));
    if row.code == Code::Unavailable {
        metadata.insert(RETRY, HeaderValue::from_static("safe"));
    }
    Status::with_error_details_and_metadata(
        row.code,
        cut(sentence, 600),
        details,
        MetadataMap::from_headers(metadata),
    )
}

/// When the call may be tried again, where that may help.
fn retry_delay(row: &Row, failure: &Failure) -> Option<Duration> {
    match row.code {
        Code::Unavailable => Some(retry_after(failure).unwrap_or(Duration::from_secs(1))),
        // The API's limit is one per minute, and it may not say how much of it is over.
        Code::ResourceExhausted => Some(retry_after(failure).unwrap_or(Duration::from_secs(5))),
        _ => None,
    }
}

/// A client library that retries waits for that long even if its own deadline
/// comes first, and then never tells what we said. So where there is no time
/// for another try it is told not to try (gRFC A6).
fn pushback(delay: Duration, time_left: Option<Duration>) -> http::HeaderValue {
    match time_left {
        Some(left) if left <= delay => http::HeaderValue::from_static("-1"),
        _ => (delay.as_millis() as u64).into(),
    }
}

/// `Retry-After`, if the API said so.
pub fn retry_after(failure: &Failure) -> Option<Duration> {
    match failure {
        Failure::Refused(refusal) => refusal.retry_after,
        Failure::LookUp(look_up) => retry_after(&look_up.cause),
        _ => None,
    }
}

/// What happened and what to do, in a sentence or two.
fn sentence(failure: &Failure) -> String {
    let what = what_happened(failure);
    let what = cut(what.trim_end_matches(['.', ' ']), 480);
    let outcome = match row(failure).outcome {
        Outcome::NotApplied => "No batch was created",
        Outcome::Unknown => "A batch may have been created: look for it before you try again",
        Outcome::Applied => "The batch was created: do not create it again",
    };
    format!("{what}. {outcome}.")
}

fn what_happened(failure: &Failure) -> String {
    match failure {
        Failure::Invalid(violations) | Failure::NoCredentials(violations) => violations
            .iter()
            .map(|violation| format!("{} {}", violation.field, violation.description))
            .collect::<Vec<_>>()
            .join("; "),
        Failure::NeverSent(never_sent) => match never_sent {
            NeverSent::Dns(cause) => format!("The API's host name was not resolved: {cause}"),
            NeverSent::Connect(cause) => format!("The API could not be reached: {cause}"),
            NeverSent::ConnectTimeout => "The API did not accept a connection in time".to_owned(),
            NeverSent::Tls(cause) => format!("TLS with the API failed: {cause}"),
            NeverSent::Unprocessed(cause) => {
                format!("The API gave the request back unprocessed: {cause}")
            }
            NeverSent::Stopping => "The gateway is stopping".to_owned(),
            NeverSent::TooManyFiles => {
                "The gateway has as many files open as it may, and none for a connection to the API"
                    .to_owned()
            }
            NeverSent::Overloaded => {
                "The gateway has as many calls, or bytes of them, as it may have".to_owned()
            }
        },
        Failure::DeadlineBeforeSending => {
            "The deadline passed before the request was sent".to_owned()
        }
        Failure::DeadlineAfterSending => "The deadline passed before the API answered".to_owned(),
        Failure::TimedOut(limit) => format!("The API did not answer within {limit:?}"),
        Failure::ConnectionLost(cause) => {
            format!("The connection broke before the API answered: {cause}")
        }
        Failure::Stopped => "The gateway stopped before the API answered".to_owned(),
        Failure::Panicked => "The gateway failed".to_owned(),
        Failure::DeadlineUnsettled => {
            "The deadline passed while an earlier try may still create the batch".to_owned()
        }
        Failure::ExternalIdTaken { batch_id } => {
            format!("The external id belongs to batch {batch_id}, which has other content")
        }
        Failure::LookUp(look_up) => {
            let what = what_happened(&look_up.cause);
            format!("The look-up by external id failed: {what}")
        }
        Failure::Refused(refusal) if refusal.status.is_redirection() => {
            let host = refusal.redirect_host.as_deref().unwrap_or("nowhere");
            let status = refusal.status.as_u16();
            format!("HTTP {status} redirects to {host}: check the upstream URL")
        }
        Failure::Refused(refusal) => {
            let status = refusal.status.as_u16();
            let who = match refusal.outcome {
                Outcome::NotApplied => "The API",
                _ => "The API, or something in between,",
            };
            format!("{who} answered HTTP {status}{}", api_text(refusal))
        }
        Failure::Unusable(answer) => {
            let status = answer.status.as_u16();
            let who = match answer.outcome {
                Outcome::Applied => "The API",
                _ => "The API, or something in between,",
            };
            format!(
                "{who} answered HTTP {status}, but the answer {}",
                answer.problem
            )
        }
    }
}

/// `" (403010): Oauth token is missing"`, as far as the API said it.
fn api_text(refusal: &Refusal) -> String {
    let error = &refusal.error;
    let code = error.code.as_deref().map(|code| format!(" ({code})"));
    let text = error.detail.as_deref().or(error.title.as_deref());
    let text = text.map(|text| format!(": {text}"));
    code.unwrap_or_default() + &text.unwrap_or_default()
}

/// At most `longest` bytes of a text.
fn cut(text: &str, longest: usize) -> &str {
    &text[..text.floor_char_boundary(longest)]
}

//! Why a call failed, what it changed, and whether it may be sent again:
//! decided where it is known, presented by [`crate::status`].

use std::{fmt, time::Duration};

use http::StatusCode;

/// What a call changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Effect {
    /// Certainly nothing.
    NotApplied,
    /// Nobody knows.
    Unknown,
    /// What it was to change.
    Applied,
}

impl Effect {
    /// All of them.
    pub const ALL: [Effect; 3] = [Effect::NotApplied, Effect::Unknown, Effect::Applied];

    /// The word that callers, logs and metrics see as the outcome.
    pub fn as_str(self) -> &'static str {
        match self {
            Effect::NotApplied => "NOT_APPLIED",
            Effect::Unknown => "UNKNOWN",
            Effect::Applied => "APPLIED",
        }
    }
}

/// Whether and when the gateway itself may send the request again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// It must not, or it would not help.
    Never,
    /// After the time that the response asks for.
    After(Duration),
    /// After a pause.
    Backoff,
}

/// Why a call did not succeed.
///
/// No text in it holds a credential; what came from upstream has been cut and
/// redacted.
#[derive(Clone, Debug)]
pub struct Failure {
    /// What happened.
    pub kind: Kind,
    /// What the call changed. Calls that change nothing have
    /// [`Effect::NotApplied`].
    pub effect: Effect,
    /// Whether the gateway itself may try again.
    pub retry: Retry,
}

impl Failure {
    /// Certainly nothing was changed, and trying again would not help.
    pub fn refused(kind: Kind) -> Self {
        Failure {
            kind,
            effect: Effect::NotApplied,
            retry: Retry::Never,
        }
    }

    /// Certainly nothing was changed, and trying again may help.
    pub fn transient(kind: Kind) -> Self {
        Failure {
            retry: Retry::Backoff,
            ..Failure::refused(kind)
        }
    }

    /// Something may have been changed.
    pub fn unknown(kind: Kind) -> Self {
        Failure {
            effect: Effect::Unknown,
            ..Failure::refused(kind)
        }
    }

    /// Fields of the message or metadata are bad.
    pub fn invalid(violations: Vec<Violation>) -> Self {
        Failure::refused(Kind::InvalidRequest(violations))
    }

    /// The stable word for what happened.
    pub fn reason(&self) -> Reason {
        match &self.kind {
            Kind::InvalidRequest(_) => Reason::InvalidRequest,
            Kind::CredentialsMissing(_) => Reason::CredentialsMissing,
            Kind::RefusedByServer(reason, _) => *reason,
            Kind::NotSent(not_sent) => match not_sent {
                NotSent::Dns(_) => Reason::UpstreamDnsFailed,
                NotSent::Connect(_) => Reason::UpstreamConnectFailed,
                NotSent::ConnectTimeout => Reason::UpstreamConnectTimeout,
                NotSent::Tls(_) => Reason::UpstreamTlsFailed,
                NotSent::Unprocessed(_) => Reason::UpstreamUnprocessed,
                NotSent::Overloaded | NotSent::TooManyFiles => Reason::GatewayOverloaded,
                NotSent::ShuttingDown => Reason::GatewayStopping,
            },
            Kind::DeadlineBeforeSending => Reason::DeadlineBeforeSending,
            Kind::DeadlineAfterSending => Reason::DeadlineAfterSending,
            Kind::DeadlineUnsettled => Reason::DeadlineUnsettled,
            Kind::UpstreamTimeout(_) => Reason::UpstreamTimeout,
            Kind::ConnectionLost(_) => Reason::ConnectionLost,
            Kind::Lookup(cause) => match (self.effect, cause.reason()) {
                // A lookup creates nothing, but an earlier attempt may have.
                (Effect::Unknown | Effect::Applied, _) => Reason::LookupUnsettled,
                (_, reason @ (Reason::ApiUnauthenticated | Reason::ApiRateLimited)) => reason,
                (_, Reason::ApiPermissionDenied) => Reason::LookupForbidden,
                _ => Reason::LookupFailed,
            },
            Kind::ExternalIdTaken { .. } => Reason::ExternalIdTaken,
            Kind::BatchNotFound => Reason::BatchNotFound,
            Kind::ShutDown => Reason::GatewayStopped,
            Kind::Internal => Reason::GatewayFailed,
            Kind::Api(error) => error.reason,
            Kind::InvalidResponse(response) => response.reason,
        }
    }

    /// The HTTP status of the response that tells of the failure.
    pub fn http_status(&self) -> Option<StatusCode> {
        match &self.kind {
            Kind::Api(error) => Some(error.status),
            Kind::InvalidResponse(response) => Some(response.status),
            Kind::Lookup(cause) => cause.http_status(),
            _ => None,
        }
    }

    /// The batch that the failure is about.
    pub fn batch_id(&self) -> Option<&str> {
        match &self.kind {
            Kind::InvalidResponse(response) => response.batch_id.as_deref(),
            Kind::ExternalIdTaken { batch_id } => Some(batch_id),
            _ => None,
        }
    }
}

/// What is wrong with one field of the message or one key of the metadata.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The protobuf path of the field, or the metadata key.
    pub field: String,
    /// What is wrong, as the end of a sentence that begins with the field.
    pub description: String,
}

impl Violation {
    /// A violation of `field`.
    pub fn new(field: &str, description: &str) -> Self {
        Violation {
            field: field.to_owned(),
            description: description.to_owned(),
        }
    }
}

/// What happened.
#[derive(Clone, Debug)]
pub enum Kind {
    /// The message or the metadata is bad.
    InvalidRequest(Vec<Violation>),
    /// The call has no credentials.
    CredentialsMissing(Vec<Violation>),
    /// The server refused the call before its service saw it.
    RefusedByServer(Reason, String),
    /// The request was never sent.
    NotSent(NotSent),
    /// The call's deadline passed before anything was sent.
    DeadlineBeforeSending,
    /// The call's deadline passed while the request was under way.
    DeadlineAfterSending,
    /// The call's deadline passed before this attempt sent anything, while an
    /// earlier one may still create the batch.
    DeadlineUnsettled,
    /// The gateway's own limit passed while the request was under way.
    UpstreamTimeout(Duration),
    /// The connection broke while the request was under way.
    ConnectionLost(String),
    /// The lookup by external id, before anything was sent, failed.
    Lookup(Box<Failure>),
    /// A batch with the same external id and other content exists.
    ExternalIdTaken {
        /// That batch.
        batch_id: String,
    },
    /// Catalog shows no such batch.
    BatchNotFound,
    /// The gateway stopped while the request was under way.
    ShutDown,
    /// The gateway itself failed while the request was under way.
    Internal,
    /// The response is no success.
    Api(Box<ApiError>),
    /// The response has a 2xx status, but cannot be used.
    InvalidResponse(Box<InvalidResponse>),
}

/// Why a request was never sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotSent {
    /// The API's host name could not be resolved.
    Dns(String),
    /// No connection could be opened.
    Connect(String),
    /// No connection could be opened in time.
    ConnectTimeout,
    /// The TLS handshake failed.
    Tls(String),
    /// The API returned the request unprocessed (HTTP/2 REFUSED_STREAM or
    /// GOAWAY).
    Unprocessed(String),
    /// The gateway has as many calls in flight as are allowed.
    Overloaded,
    /// The gateway has as many files open as are allowed.
    TooManyFiles,
    /// The gateway is shutting down.
    ShuttingDown,
}

/// A response whose status is no 2xx, from the API or a proxy.
#[derive(Clone, Debug)]
pub struct ApiError {
    /// What it means.
    pub reason: Reason,
    /// The HTTP status.
    pub status: StatusCode,
    /// What the body says.
    pub body: ErrorBody,
    /// The API's own id of the request.
    pub request_id: Option<String>,
    /// The host in `Location` of a redirect, which is never followed.
    pub redirect_host: Option<String>,
}

/// What the body of an error says, in any of the documented shapes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ErrorBody {
    /// Whether only Adobe writes such a body.
    pub is_adobes: bool,
    /// The API's own code, such as `403010` or `invalid_client`.
    pub code: Option<String>,
    /// The title of a problem document.
    pub title: Option<String>,
    /// What went wrong, for people. For an undocumented body, its beginning.
    pub detail: Option<String>,
    /// The report of a problem document, as JSON.
    pub report: Option<String>,
}

/// A 2xx response whose body is not what it should be.
#[derive(Clone, Debug)]
pub struct InvalidResponse {
    /// What it means.
    pub reason: Reason,
    /// The HTTP status.
    pub status: StatusCode,
    /// What is wrong with the body, as the end of a sentence.
    pub problem: String,
    /// The beginning of the body.
    pub beginning: String,
    /// `Location`.
    pub location: Option<String>,
    /// The batch id, from `Location` or the beginning of the body.
    pub batch_id: Option<String>,
    /// The API's own id of the request.
    pub request_id: Option<String>,
}

macro_rules! reasons {
    ($($name:ident $word:literal $effect:ident $meaning:literal,)*) => {
        /// Why a call failed, as a stable word: `ErrorInfo.reason`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Reason {
            $(#[doc = $meaning] $name,)*
        }

        impl Reason {
            /// All reasons, in the order of the documentation.
            pub const ALL: &[Reason] = &[$(Reason::$name),*];

            /// The word.
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Reason::$name => $word,)*
                }
            }

            /// What a call that fails so has changed, if it could change anything.
            pub fn effect(self) -> Effect {
                match self {
                    $(Reason::$name => Effect::$effect,)*
                }
            }

            /// What it means, in a sentence for the documentation.
            pub fn meaning(self) -> &'static str {
                match self {
                    $(Reason::$name => $meaning,)*
                }
            }
        }
    };
}

reasons! {
    InvalidRequest "INVALID_REQUEST" NotApplied
        "The message or the metadata is bad; `BadRequest` names the field",
    ClientNotAllowed "CLIENT_NOT_ALLOWED" NotApplied
        "The client's TLS certificate is not among `--tls-allowed-clients`",
    CredentialsMissing "CREDENTIALS_MISSING" NotApplied
        "The call lacks one of the four credentials; `BadRequest` names it",
    Unsupported "UNSUPPORTED" NotApplied
        "No such method or service, or an unknown compression",
    InvalidFraming "INVALID_FRAMING" NotApplied
        "The call breaks the gRPC protocol: it ends within its message, or the message cannot be decompressed",
    NotOneMessage "NOT_ONE_MESSAGE" NotApplied
        "The call has no message, or more than one",
    MessageTooLarge "MESSAGE_TOO_LARGE" NotApplied
        "The message is larger than 256 KiB",
    MessageTimeout "MESSAGE_TIMEOUT" NotApplied
        "The message did not arrive within 10 s",
    GatewayOverloaded "GATEWAY_OVERLOADED" NotApplied
        "`--max-in-flight` calls are in flight, or as many calls, message bytes or open files as are allowed",
    GatewayStopping "GATEWAY_STOPPING" NotApplied
        "The gateway is shutting down, and the request was not sent",
    ExternalIdTaken "EXTERNAL_ID_TAKEN" NotApplied
        "A batch with this external id has other content; `batchId` names it",
    BatchNotFound "BATCH_NOT_FOUND" NotApplied
        "Catalog shows no batch with this id; it may show a new one after some time",
    LookupFailed "LOOKUP_FAILED" NotApplied
        "The lookup by external id failed, so nothing was sent",
    LookupForbidden "LOOKUP_FORBIDDEN" NotApplied
        "The credential may not read Catalog; see `--lookup`",
    DeadlineBeforeSending "DEADLINE_BEFORE_SENDING" NotApplied
        "The call's deadline passed before anything was sent",
    UpstreamDnsFailed "UPSTREAM_DNS_FAILED" NotApplied
        "The API's host name could not be resolved",
    UpstreamConnectFailed "UPSTREAM_CONNECT_FAILED" NotApplied
        "No connection to the API could be opened",
    UpstreamConnectTimeout "UPSTREAM_CONNECT_TIMEOUT" NotApplied
        "No connection to the API could be opened within `--connect-timeout`",
    UpstreamTlsFailed "UPSTREAM_TLS_FAILED" NotApplied
        "The TLS handshake with the API failed; see `--upstream-ca-file`",
    UpstreamUnprocessed "UPSTREAM_UNPROCESSED" NotApplied
        "HTTP/2 REFUSED_STREAM, or GOAWAY before this request",
    ApiInvalidRequest "API_INVALID_REQUEST" NotApplied
        "HTTP 400, 411, 413, 414, 415, 422, 431",
    ApiUnauthenticated "API_UNAUTHENTICATED" NotApplied
        "HTTP 401, or a code of Adobe's API gateway that means no or a bad token or key",
    ApiPermissionDenied "API_PERMISSION_DENIED" NotApplied
        "HTTP 403 with a body that only Adobe writes",
    ApiNotFound "API_NOT_FOUND" NotApplied
        "HTTP 404",
    ApiConflict "API_CONFLICT" NotApplied
        "HTTP 409 with a body that only Adobe writes",
    ApiPreconditionFailed "API_PRECONDITION_FAILED" NotApplied
        "HTTP 412 with a body that only Adobe writes",
    ApiNotImplemented "API_NOT_IMPLEMENTED" NotApplied
        "HTTP 405, 501",
    ApiRateLimited "API_RATE_LIMITED" NotApplied
        "HTTP 429; `RetryInfo` says when to come back",
    ApiRefused "API_REFUSED" NotApplied
        "HTTP 402, 407, 410, 417, 421, 426, 428, 505, 511",
    ApiUnavailable "API_UNAVAILABLE" NotApplied
        "Adobe's API gateway could not check the key or token just now (its codes 503000, 503010, 503020, 503030)",
    ApiRedirected "API_REDIRECTED" NotApplied
        "HTTP 307, 308: the upstream URL is probably wrong",
    UpstreamFailed "UPSTREAM_FAILED" Unknown
        "HTTP 408, 499, 5xx: from the API, or from a proxy that may have lost its response",
    UpstreamUnproven "UPSTREAM_UNPROVEN" Unknown
        "Any other HTTP status: it does not prove that the request was refused",
    AnswerUnproven "ANSWER_UNPROVEN" Unknown
        "HTTP 2xx other than 201 without the expected content: a page, an error, nothing",
    ConnectionLost "CONNECTION_LOST" Unknown
        "The connection broke after the request was sent",
    UpstreamTimeout "UPSTREAM_TIMEOUT" Unknown
        "No response within `--request-timeout`",
    DeadlineAfterSending "DEADLINE_AFTER_SENDING" Unknown
        "The call's deadline passed after the request was sent",
    DeadlineUnsettled "DEADLINE_UNSETTLED" Unknown
        "The deadline passed while an earlier attempt may still create the batch",
    LookupUnsettled "LOOKUP_UNSETTLED" Unknown
        "The lookup failed, and an earlier attempt may have created the batch",
    GatewayStopped "GATEWAY_STOPPED" Unknown
        "The gateway stopped after the request was sent",
    GatewayFailed "GATEWAY_FAILED" Unknown
        "A bug in the gateway; please report it",
    AnswerUnusable "ANSWER_UNUSABLE" Applied
        "HTTP 201, or another 2xx that names the batch, but the response cannot be used; `batchId` where it is known",
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

//! What may have happened upstream: the vocabulary that the REST client, the
//! statuses and the telemetry share.

use std::{fmt, sync::Arc, time::Duration};

use http::StatusCode;

use crate::proto::v1::{Batch, BatchOrigin};

/// Whether the batch of a failed call exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// Certainly no batch was created.
    NotApplied,
    /// A batch may have been created.
    Unknown,
    /// The batch was created.
    Applied,
}

impl Outcome {
    /// The word that callers, logs and metrics see.
    pub fn as_str(self) -> &'static str {
        match self {
            Outcome::NotApplied => "NOT_APPLIED",
            Outcome::Unknown => "UNKNOWN",
            Outcome::Applied => "APPLIED",
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
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

/// Why a call did not end with a batch. Which outcome and gRPC code follows is
/// the table in [`crate::status`].
///
/// No variant holds a credential, and every text that came from upstream has
/// been cut and redacted.
#[derive(Clone, Debug)]
pub enum Failure {
    /// The message or the metadata is bad.
    Invalid(Vec<Violation>),
    /// The call has no credentials.
    NoCredentials(Vec<Violation>),
    /// The request never reached the API.
    NeverSent(NeverSent),
    /// The call's deadline passed before anything was sent.
    DeadlineBeforeSending,
    /// The call's deadline passed while the request was under way.
    DeadlineAfterSending,
    /// The gateway's own limit passed while the request was under way.
    TimedOut(Duration),
    /// The connection broke while the request was under way.
    ConnectionLost(String),
    /// The look-up by external id, before anything was sent, failed.
    LookUp(Box<LookUpFailure>),
    /// A batch with the same external id and other content exists.
    ExternalIdTaken {
        /// That batch.
        batch_id: String,
    },
    /// The call's deadline passed before this try sent anything, while an
    /// earlier try may still create the batch.
    DeadlineUnsettled,
    /// The gateway ended while the request was under way.
    Stopped,
    /// The gateway itself failed while the request was under way.
    Panicked,
    /// The answer is no success.
    Refused(Box<Refusal>),
    /// The answer has a 2xx status, but cannot be used.
    Unusable(Box<UnusableAnswer>),
}

/// Why a request never reached the API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NeverSent {
    /// The API's host name could not be resolved.
    Dns(String),
    /// No connection came about.
    Connect(String),
    /// No connection came about in time.
    ConnectTimeout,
    /// TLS could not be agreed on.
    Tls(String),
    /// The API gave the request back unprocessed (HTTP/2 REFUSED_STREAM or
    /// GOAWAY).
    Unprocessed(String),
    /// The gateway has as many calls in flight as it may have.
    Overloaded,
    /// The gateway has as many files open as it may have.
    TooManyFiles,
    /// The gateway is about to end.
    Stopping,
}

/// A look-up that failed.
#[derive(Clone, Debug)]
pub struct LookUpFailure {
    /// What happened to the look-up's request.
    pub cause: Failure,
    /// Whether an earlier try of the call may have created the batch.
    pub is_retry: bool,
}

/// An answer whose status is no 2xx, whoever wrote it.
#[derive(Clone, Debug)]
pub struct Refusal {
    /// The HTTP status.
    pub status: StatusCode,
    /// Whether it proves that nothing was created: `NotApplied`, or `Unknown`.
    pub outcome: Outcome,
    /// What the body says.
    pub error: ApiError,
    /// `Retry-After`.
    pub retry_after: Option<Duration>,
    /// The API's own id of the request.
    pub request_id: Option<String>,
    /// The host in `Location` of a redirect, which is never followed.
    pub redirect_host: Option<String>,
}

/// What the body of an error says, in any of the shapes that are documented.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ApiError {
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

/// A 2xx answer whose body is not what it should be.
#[derive(Clone, Debug)]
pub struct UnusableAnswer {
    /// The HTTP status.
    pub status: StatusCode,
    /// Whether it proves the batch all the same: `Created`, or `Unknown`.
    pub outcome: Outcome,
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

/// A batch, and how it came to be known.
#[derive(Clone, Debug)]
pub struct Settled {
    /// The batch.
    pub batch: Arc<Batch>,
    /// How it came to be known.
    pub origin: BatchOrigin,
}

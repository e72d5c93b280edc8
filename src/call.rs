//! What is known of one gRPC call, for all who work on it.

pub mod attempt;
pub mod deadline;
pub mod early_headers;
pub mod external_id;
pub mod idempotency_key;
pub mod request_id;

use std::sync::Arc;

use http::{HeaderMap, HeaderValue};
use tokio::time::Instant;

use self::{attempt::Attempt, early_headers::EarlyHeaders};
use crate::{api::Method, telemetry::CallRecord};

/// One call of `BatchService`. Made once, when the call arrives.
#[derive(Clone, Debug)]
pub struct CallContext {
    /// Where the call is counted, logged and traced.
    pub record: Arc<CallRecord>,
    /// When the caller must have its response.
    pub deadline: Option<Instant>,
    /// Which attempt this is, as far as clients and meshes say so.
    pub attempt: Attempt,
    /// The headers of the call's response.
    pub early_headers: EarlyHeaders,
}

impl CallContext {
    /// A call with this metadata and deadline.
    pub fn new(record: Arc<CallRecord>, metadata: &HeaderMap, deadline: Option<Instant>) -> Self {
        CallContext {
            record,
            deadline,
            attempt: Attempt::of_call(metadata),
            early_headers: EarlyHeaders::default(),
        }
    }

    /// The method that is called.
    pub fn method(&self) -> &'static Method {
        self.record.method()
    }

    /// The call's `x-request-id`, the caller's or a new one.
    pub fn request_id(&self) -> &HeaderValue {
        self.record.request_id()
    }

    /// Whether the caller must have its response before this moment.
    pub fn ends_before(&self, moment: Instant) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= moment)
    }
}

//! What a client of the gateway needs besides tonic.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};
use tonic::{Code, Status};
use tonic_types::StatusExt;

pub mod v1 {
    tonic::include_proto!("aep.ingestion.v1");
}

const TRIES: u32 = 3;

/// Makes a call with a deadline, and again if it is certain that nothing was created. tonic has no
/// retries of its own and knows no service config.
pub async fn retrying<T, F>(
    time: Duration,
    mut call: impl FnMut(Duration) -> F,
) -> Result<T, Status>
where
    F: Future<Output = Result<T, Status>>,
{
    let deadline = Instant::now() + time;
    let mut pause = Duration::from_millis(500);
    for tries_left in (0..TRIES).rev() {
        let left = deadline.saturating_duration_since(Instant::now());
        // tonic only tells the deadline to the server.
        let Ok(answer) = timeout_at(deadline, call(left)).await else {
            break;
        };
        let Err(error) = answer else { return answer };
        let asked = error
            .get_details_retry_info()
            .and_then(|info| info.retry_delay);
        pause = pause.max(asked.unwrap_or_default());
        let again = error.code() == Code::Unavailable && outcome(&error) == "NOT_APPLIED";
        if !again || tries_left == 0 || Instant::now() + pause >= deadline {
            return Err(error);
        }
        sleep(pause).await;
        pause *= 2;
    }
    Err(Status::deadline_exceeded("no answer in time"))
}

/// Whether a batch exists. A retry of your own repeats only what is NOT_APPLIED: an error without
/// the gateway's ErrorInfo comes from the library or from somebody in between, and whatever its
/// code is, it proves nothing.
pub fn outcome(error: &Status) -> String {
    error
        .get_details_error_info()
        .filter(|info| info.domain == "aep-batch-gateway")
        .and_then(|info| info.metadata.get("outcome").cloned())
        .unwrap_or_else(|| "UNKNOWN".to_owned())
}

/// The name of a code that all gRPC libraries know.
pub fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

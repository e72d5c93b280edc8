//! Which failed requests the gateway sends again, and when.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;
use tower::retry::budget::{Budget, TpsBudget};

use crate::{
    call::CallContext,
    failure::{Failure, Retry},
    telemetry::Telemetry,
};

/// How often a request is sent at most.
const ATTEMPTS: u32 = 3;

/// The pause before the second attempt; it doubles, and is jittered.
const FIRST_PAUSE: Duration = Duration::from_millis(50);

/// The longest `Retry-After` that is waited for here; longer ones are the
/// caller's.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Retries per call. Calls of the last 10 s count, so that over any minute of
/// an outage at most 0.07 × 70 / 60 = 0.082 retries per call are made; with the
/// lookups that a create may add for 1 s of it, less than 0.1.
const RETRIES_PER_CALL: f32 = 0.07;

/// The one budget for the retries of all methods.
#[derive(Debug)]
pub struct Retries {
    budget: TpsBudget,
    telemetry: Arc<Telemetry>,
}

impl Retries {
    /// Counts retries there.
    pub fn new(telemetry: Arc<Telemetry>) -> Self {
        Retries {
            budget: TpsBudget::new(Duration::from_secs(10), 0, RETRIES_PER_CALL),
            telemetry,
        }
    }

    /// A call begins, which earns a part of a retry.
    pub fn deposit(&self) {
        self.budget.deposit();
    }

    /// How long to wait until the request that failed so is sent again. `None`:
    /// it would not help, would outlast the call, or the budget is spent.
    pub fn pause(&self, failure: &Failure, attempt: u32, call: &CallContext) -> Option<Duration> {
        let pause = match failure.retry {
            Retry::Never => return None,
            Retry::After(delay) => delay,
            Retry::Backoff => jittered(FIRST_PAUSE * (1 << (attempt - 1).min(8))),
        };
        let may = attempt < ATTEMPTS
            && pause <= LONGEST_PAUSE
            && !call.ends_before(Instant::now() + pause)
            && self.budget.withdraw();
        if may {
            self.telemetry.retry();
        }
        may.then_some(pause)
    }
}

/// Half to all of a pause.
pub fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(0.5 + fastrand::f64() / 2.0)
}

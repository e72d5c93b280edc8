//! Creates in flight: bounded in number and time, and finished even when
//! their caller has left.
//!
//! A create runs in a task of its own. Its caller waits for the answer until
//! its deadline. When the caller leaves, or its time is over, the request is
//! called back if no connection has taken it yet. Otherwise a batch may come
//! to exist, so the task goes on, and the log says what became of it.

use std::{sync::Arc, time::Duration};

use http::HeaderValue;
use tokio::{
    sync::{Semaphore, oneshot},
    task::AbortHandle,
    time::{Instant, timeout, timeout_at},
};
use tokio_util::task::TaskTracker;

use crate::{
    outcome::{Failure, NeverSent},
    proto::v1::Batch,
    telemetry::Metrics,
    upstream::Handover,
};

type CreateResult = Result<Batch, Failure>;

/// The creates that this gateway has in flight.
#[derive(Clone, Debug)]
pub struct InFlight {
    slots: Arc<Semaphore>,
    tasks: TaskTracker,
    longest: Duration,
    metrics: Arc<Metrics>,
}

impl InFlight {
    /// At most `slots` creates at a time, each of at most `longest`.
    pub fn new(slots: usize, longest: Duration, metrics: Arc<Metrics>) -> Self {
        InFlight {
            slots: Arc::new(Semaphore::new(slots)),
            tasks: TaskTracker::new(),
            longest,
            metrics,
        }
    }

    /// Runs a create and waits for its result until the caller's deadline.
    /// `create` sends its request with `handover`.
    pub async fn run(
        &self,
        request_id: HeaderValue,
        handover: Handover,
        deadline: Option<Instant>,
        create: impl Future<Output = CreateResult> + Send + 'static,
    ) -> CreateResult {
        if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            return Err(Failure::DeadlineBeforeSending);
        }
        let Ok(slot) = self.slots.clone().try_acquire_owned() else {
            return Err(Failure::NeverSent(NeverSent::Overloaded));
        };
        let (deliver, delivery) = oneshot::channel();
        let (longest, metrics) = (self.longest, self.metrics.clone());
        let sent = handover.clone();
        let task = self.tasks.spawn(async move {
            let _slot = slot;
            let result = match timeout(longest, create).await {
                Ok(result) => result,
                Err(_) if sent.revoke() => Err(Failure::NeverSent(NeverSent::ConnectTimeout)),
                Err(_) => Err(Failure::TimedOut(longest)),
            };
            // With nobody to deliver to it is dropped, and thereby recorded.
            let _ = deliver.send(Delivery {
                result: Some(result),
                request_id,
                metrics,
            });
        });
        let caller = Caller {
            handover,
            task: task.abort_handle(),
        };
        let delivered = match deadline {
            Some(deadline) => match timeout_at(deadline, delivery).await {
                Ok(delivered) => delivered,
                Err(_) if caller.leave() => return Err(Failure::DeadlineBeforeSending),
                Err(_) => return Err(Failure::DeadlineAfterSending),
            },
            None => delivery.await,
        };
        match delivered {
            Ok(delivery) => delivery.take(),
            Err(_) => Err(Failure::Panicked),
        }
    }

    /// Waits until no create is in flight. For the end of the process: new
    /// ones may still start meanwhile.
    pub async fn finished(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// How many creates are in flight.
    pub fn len(&self) -> usize {
        self.tasks.len()
    }

    /// Whether no create is in flight.
    pub fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }
}

/// The caller of a create, who may leave at any time.
struct Caller {
    handover: Handover,
    task: AbortHandle,
}

impl Caller {
    /// Calls the request back. True: it was not sent, and never will be.
    fn leave(&self) -> bool {
        let not_sent = self.handover.revoke();
        if not_sent {
            self.task.abort();
        }
        not_sent
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        self.leave();
    }
}

/// The result of a create on its way to the caller. Recorded where it does not
/// get there.
struct Delivery {
    result: Option<CreateResult>,
    request_id: HeaderValue,
    metrics: Arc<Metrics>,
}

impl Delivery {
    fn take(mut self) -> CreateResult {
        self.result.take().unwrap_or(Err(Failure::Panicked))
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        if let Some(result) = self.result.take() {
            let request_id = self.request_id.to_str().unwrap_or_default();
            self.metrics.abandoned(request_id, &result);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use super::*;

    fn in_flight(slots: usize, longest: Duration) -> InFlight {
        InFlight::new(slots, longest, Arc::new(Metrics::new()))
    }

    fn id() -> HeaderValue {
        HeaderValue::from_static("r")
    }

    const LONG: Duration = Duration::from_secs(60);

    /// What a connection does: it takes the body.
    async fn send(handover: Handover) {
        use http_body_util::BodyExt;
        let _ = handover.body(Vec::new()).collect().await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_deadline_tells_sent_from_not_sent() {
        let creates = in_flight(1, LONG);
        let soon = Some(Instant::now() + Duration::from_secs(1));

        let waiting = creates
            .run(id(), Handover::default(), soon, pending())
            .await;
        assert!(matches!(waiting, Err(Failure::DeadlineBeforeSending)));
        creates.finished().await; // aborted: no request is left behind

        let soon = Some(Instant::now() + Duration::from_secs(1));
        let handover = Handover::default();
        let sent = handover.clone();
        let create = async {
            send(sent).await;
            pending().await
        };
        let waiting = creates.run(id(), handover, soon, create).await;
        assert!(matches!(waiting, Err(Failure::DeadlineAfterSending)));
        assert_eq!(creates.len(), 1);
        creates.finished().await; // goes on until the gateway's own limit

        let past = Some(Instant::now());
        let late = creates
            .run(id(), Handover::default(), past, pending())
            .await;
        assert!(matches!(late, Err(Failure::DeadlineBeforeSending)));
    }

    #[tokio::test(start_paused = true)]
    async fn the_own_limit_tells_sent_from_not_sent() {
        let creates = in_flight(1, Duration::from_secs(1));
        let waiting = creates
            .run(id(), Handover::default(), None, pending())
            .await;
        assert!(matches!(
            waiting,
            Err(Failure::NeverSent(NeverSent::ConnectTimeout))
        ));

        let handover = Handover::default();
        let sent = handover.clone();
        let create = async {
            send(sent).await;
            pending().await
        };
        let waiting = creates.run(id(), handover, None, create).await;
        assert!(matches!(waiting, Err(Failure::TimedOut(_))));
    }

    #[tokio::test(start_paused = true)]
    async fn a_create_outlives_its_caller_only_if_it_was_sent() {
        let creates = in_flight(2, LONG);
        let left = creates.run(id(), Handover::default(), None, pending());
        assert!(timeout(Duration::from_secs(1), left).await.is_err());
        creates.finished().await;

        let handover = Handover::default();
        let sent = handover.clone();
        let create = async move {
            send(sent).await;
            tokio::time::sleep(Duration::from_secs(5)).await;
            Ok(Batch::default())
        };
        let left = creates.run(id(), handover, None, create);
        assert!(timeout(Duration::from_secs(1), left).await.is_err());
        assert_eq!(creates.len(), 1);
        creates.finished().await;
        let text = creates.metrics.encode();
        assert!(
            text.contains(r#"aep_gateway_abandoned_creates_total{outcome="CREATED"} 1"#),
            "{text}"
        );
    }

    #[tokio::test]
    async fn too_many_are_refused_at_once() {
        let creates = in_flight(1, LONG);
        let first = creates.run(id(), Handover::default(), None, pending());
        tokio::pin!(first);
        assert!(timeout(Duration::from_millis(1), &mut first).await.is_err());
        let second = creates
            .run(id(), Handover::default(), None, pending())
            .await;
        assert!(matches!(
            second,
            Err(Failure::NeverSent(NeverSent::Overloaded))
        ));
    }

    #[tokio::test]
    async fn a_panic_is_a_failure_with_an_unknown_outcome() {
        let creates = in_flight(1, LONG);
        let create = async { panic!("on purpose") };
        let result = creates.run(id(), Handover::default(), None, create).await;
        assert!(matches!(result, Err(Failure::Panicked)));
    }
}

//! Calls in flight: bounded in number, shared where they are equal, and finished
//! even when their caller has left.
//!
//! A create runs as an execution: a task of its own, for which its callers wait
//! until it completes or their deadline passes. Equal calls with the same
//! external id share one execution. When the last caller detaches, the create is
//! cancelled if nothing of it was sent. Otherwise a batch may come to exist, so
//! the execution goes on, and the log says how it ended. A call that changes
//! nothing needs none of that: it ends with its caller.

mod send_state;

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, SetOnce},
    task::AbortHandle,
    time::{Instant, sleep_until},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use self::send_state::SendState;
use crate::{
    call::{CallContext, external_id::ExternalId},
    failure::{Failure, Kind, NotSent},
    telemetry::{Completion, Telemetry},
};

/// How long to wait for the response to a create with an external id before the
/// response headers are sent to its caller. Once a client has them it no longer
/// retries by itself; refusals that it may retry come faster than that. (A create
/// without an external id has its headers sent before anything else.)
const EARLY_HEADERS_AFTER: Duration = Duration::from_millis(100);

/// With a short deadline they leave halfway: Envoy's time for a try, which it
/// tells as a deadline, is over for it once it has the headers.
fn early_headers_after(deadline: Option<Instant>) -> Duration {
    let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
    left.map_or(EARLY_HEADERS_AFTER, |left| {
        EARLY_HEADERS_AFTER.min(left / 2)
    })
}

/// The calls in flight of this gateway. Executions that are shared have results
/// of type `T`.
#[derive(Debug)]
pub struct Executor<T>(Arc<Inner<T>>);

impl<T> Clone for Executor<T> {
    fn clone(&self) -> Self {
        Executor(self.0.clone())
    }
}

#[derive(Debug)]
struct Inner<T> {
    slots: Arc<Semaphore>,
    tasks: TaskTracker,
    shared: Mutex<HashMap<ExternalId, Arc<Execution<T>>>>,
    shutdown: CancellationToken,
    completion: CompletionOf<T>,
    telemetry: Arc<Telemetry>,
}

/// How a result is logged that no caller waits for any more.
type CompletionOf<T> = fn(&CallContext, &Result<T, Failure>) -> Completion;

impl<T> Inner<T> {
    fn shared(&self) -> MutexGuard<'_, HashMap<ExternalId, Arc<Execution<T>>>> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// By what calls share an execution.
#[derive(Clone, Debug)]
pub struct DedupKey {
    /// What the calls are known by. Only one execution at a time has it.
    pub external_id: ExternalId,
    /// What is to be done and for whom, hashed: equal calls share an execution,
    /// others wait for its end.
    pub request_hash: u64,
}

/// One call that is worked on.
#[derive(Debug)]
struct Execution<T> {
    call: CallContext,
    dedup: Option<DedupKey>,
    send_state: SendState,
    waiters: AtomicUsize,
    result: SetOnce<Result<T, Failure>>,
    delivered: AtomicBool,
    completion: CompletionOf<T>,
    task: OnceLock<AbortHandle>,
}

impl<T> Drop for Execution<T> {
    /// Nobody is left who could still take the result.
    fn drop(&mut self) {
        if let (Some(result), false) = (self.result.get(), *self.delivered.get_mut()) {
            let completion = (self.completion)(&self.call, result);
            self.call.record.abandoned(&completion);
        }
    }
}

/// The result of admission.
enum Admission<T> {
    /// A place among the callers of an execution.
    Admitted(Waiter<T>),
    /// Another call with the same key is being worked on: wait for its end.
    Conflict(Arc<Execution<T>>),
}

impl<T: Clone + Send + Sync + 'static> Executor<T> {
    /// At most `max_in_flight` calls at a time.
    pub fn new(
        max_in_flight: usize,
        completion: CompletionOf<T>,
        telemetry: Arc<Telemetry>,
    ) -> Self {
        telemetry.set_max_in_flight(max_in_flight);
        Executor(Arc::new(Inner {
            slots: Arc::new(Semaphore::new(max_in_flight)),
            tasks: TaskTracker::new(),
            shared: Mutex::default(),
            shutdown: CancellationToken::new(),
            completion,
            telemetry,
        }))
    }

    /// Runs a call that changes nothing, until its caller's deadline.
    pub async fn run_safe<R>(
        &self,
        call: &CallContext,
        operation: impl Future<Output = Result<R, Failure>>,
    ) -> Result<R, Failure> {
        if call.ends_before(Instant::now()) {
            return Err(Failure::refused(Kind::DeadlineBeforeSending));
        }
        let _slot = (self.admit()?, self.0.telemetry.execution_in_flight());
        match self.wait(call, operation).await {
            Ok(result) => result,
            Err(WaitError::Deadline) => Err(Failure::refused(Kind::DeadlineAfterSending)),
            Err(WaitError::Shutdown) => Err(Failure::transient(Kind::ShutDown)),
        }
    }

    /// Runs a call that may change something, or waits for the execution of an
    /// equal one, until the caller's deadline.
    pub async fn run<F: Future<Output = Result<T, Failure>> + Send + 'static>(
        &self,
        call: &CallContext,
        dedup: Option<&DedupKey>,
        operation: impl Fn(SendState) -> F,
    ) -> Result<T, Failure> {
        loop {
            if call.ends_before(Instant::now()) {
                return Err(Failure::refused(Kind::DeadlineBeforeSending));
            }
            match self.admit_shared(call, dedup, &operation)? {
                Admission::Admitted(waiter) => return waiter.wait(call).await,
                Admission::Conflict(other) => match self.wait(call, other.result.wait()).await {
                    Ok(_) => {}
                    // That may be an earlier attempt of this call, with a newer token.
                    Err(WaitError::Deadline) => {
                        return Err(Failure::unknown(Kind::DeadlineUnsettled));
                    }
                    Err(WaitError::Shutdown) => return Err(Failure::unknown(Kind::ShutDown)),
                },
            }
        }
    }

    fn admit(&self) -> Result<OwnedSemaphorePermit, Failure> {
        let slot = self.0.slots.clone().try_acquire_owned();
        slot.map_err(|_| Failure::transient(Kind::NotSent(NotSent::Overloaded)))
    }

    fn admit_shared<F: Future<Output = Result<T, Failure>> + Send + 'static>(
        &self,
        call: &CallContext,
        dedup: Option<&DedupKey>,
        operation: impl Fn(SendState) -> F,
    ) -> Result<Admission<T>, Failure> {
        let mut shared = dedup.map(|dedup| (dedup, self.0.shared()));
        if let Some((dedup, in_flight)) = &shared
            && let Some(execution) = in_flight.get(&dedup.external_id)
        {
            let other = execution.dedup.as_ref();
            if other.is_none_or(|other| other.request_hash != dedup.request_hash) {
                return Ok(Admission::Conflict(execution.clone()));
            }
            execution.waiters.fetch_add(1, Ordering::AcqRel);
            return Ok(Admission::Admitted(Waiter::new(self, execution.clone())));
        }

        let slot = self.admit()?;
        let execution = Arc::new(Execution {
            call: call.clone(),
            dedup: dedup.cloned(),
            send_state: SendState::default(),
            waiters: AtomicUsize::new(1),
            result: SetOnce::new(),
            delivered: AtomicBool::new(false),
            completion: self.0.completion,
            task: OnceLock::new(),
        });
        if let Some((dedup, in_flight)) = &mut shared {
            in_flight.insert(dedup.external_id.clone(), execution.clone());
        }
        drop(shared);

        let guard = CompletionGuard {
            executor: self.clone(),
            execution: execution.clone(),
        };
        // Boxed: it is large, and would be moved into the task several times.
        let operation = Box::pin(operation(execution.send_state.clone()));
        let counted = self.0.telemetry.execution_in_flight();
        let task = self.0.tasks.spawn(async move {
            let _slot = (slot, counted);
            guard.complete(operation.await);
        });
        let _ = execution.task.set(task.abort_handle());
        Ok(Admission::Admitted(Waiter::new(self, execution)))
    }

    /// Waits for a value, until the call's deadline or the gateway's shutdown.
    async fn wait<V>(
        &self,
        call: &CallContext,
        value: impl Future<Output = V>,
    ) -> Result<V, WaitError> {
        let deadline = async {
            match call.deadline {
                Some(deadline) => sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            value = value => Ok(value),
            () = deadline => Err(WaitError::Deadline),
            () = self.0.shutdown.cancelled() => Err(WaitError::Shutdown),
        }
    }

    /// The gateway ends: every caller gets its response now.
    pub fn shut_down(&self) {
        self.0.shutdown.cancel();
    }

    /// Waits until no execution is in flight. For the end of the process: new
    /// ones may still start meanwhile.
    pub async fn finished(&self) {
        self.0.tasks.close();
        self.0.tasks.wait().await;
    }

    /// How many executions are in flight.
    pub fn in_flight(&self) -> usize {
        self.0.tasks.len()
    }
}

/// Why a caller does not wait any longer.
enum WaitError {
    Deadline,
    Shutdown,
}

/// Completes an execution, however it ends.
struct CompletionGuard<T> {
    executor: Executor<T>,
    execution: Arc<Execution<T>>,
}

impl<T> CompletionGuard<T> {
    fn complete(&self, result: Result<T, Failure>) {
        // First of all no longer in flight: a call that comes after the result makes its own.
        if self.execution.dedup.is_some() {
            remove(&mut self.executor.0.shared(), &self.execution);
        }
        // Fails only if it has completed before.
        let _ = self.execution.result.set(result);
    }
}

impl<T> Drop for CompletionGuard<T> {
    fn drop(&mut self) {
        if !self.execution.result.initialized() {
            self.complete(Err(Failure::unknown(Kind::Internal)));
        }
    }
}

/// Removes an execution, if it is the one that is in flight.
fn remove<T>(
    in_flight: &mut HashMap<ExternalId, Arc<Execution<T>>>,
    execution: &Arc<Execution<T>>,
) {
    if let Some(dedup) = &execution.dedup
        && in_flight
            .get(&dedup.external_id)
            .is_some_and(|other| Arc::ptr_eq(other, execution))
    {
        in_flight.remove(&dedup.external_id);
    }
}

/// A caller of an execution, who may leave at any time.
struct Waiter<T> {
    executor: Executor<T>,
    execution: Arc<Execution<T>>,
    active: bool,
}

impl<T> Waiter<T> {
    fn new(executor: &Executor<T>, execution: Arc<Execution<T>>) -> Self {
        Waiter {
            executor: executor.clone(),
            execution,
            active: true,
        }
    }

    /// True: nothing of the call was sent, and nothing will be.
    fn detach(&mut self) -> bool {
        self.active = false;
        // No caller can join while this is locked.
        let mut shared = (self.execution.dedup.is_some()).then(|| self.executor.0.shared());
        let was_last = self.execution.waiters.fetch_sub(1, Ordering::AcqRel) == 1;
        let cancelled =
            was_last && !self.execution.result.initialized() && self.execution.send_state.cancel();
        if cancelled {
            if let Some(in_flight) = &mut shared {
                remove(in_flight, &self.execution);
            }
            drop(shared);
            if let Some(task) = self.execution.task.get() {
                task.abort();
            }
            // An abort is nothing that anybody needs to hear of.
            self.execution.delivered.store(true, Ordering::Release);
        }
        cancelled
    }
}

impl<T: Clone + Send + Sync + 'static> Waiter<T> {
    /// Waits until the execution completes, the deadline passes or the gateway
    /// shuts down.
    async fn wait(mut self, call: &CallContext) -> Result<T, Failure> {
        let (executor, execution) = (self.executor.clone(), self.execution.clone());
        let completed = executor.wait(call, execution.result.wait());
        let takes_long = async {
            let longest = early_headers_after(call.deadline);
            execution.send_state.sent_for(longest).await;
            call.early_headers.request();
        };
        tokio::pin!(completed);
        let completed = tokio::select! {
            biased;
            completed = &mut completed => completed,
            () = takes_long, if execution.dedup.is_some() => completed.await,
        };
        let error = match completed {
            Ok(result) => {
                execution.delivered.store(true, Ordering::Release);
                return result.clone();
            }
            Err(error) => error,
        };
        let is_pending = execution.send_state.previous_attempt_pending();
        Err(match (error, self.detach()) {
            (WaitError::Deadline, true) if is_pending => Failure::unknown(Kind::DeadlineUnsettled),
            (WaitError::Deadline, true) => Failure::refused(Kind::DeadlineBeforeSending),
            (WaitError::Deadline, false) => Failure::unknown(Kind::DeadlineAfterSending),
            (WaitError::Shutdown, true) if is_pending => Failure::unknown(Kind::ShutDown),
            (WaitError::Shutdown, true) => Failure::transient(Kind::NotSent(NotSent::ShuttingDown)),
            (WaitError::Shutdown, false) => Failure::unknown(Kind::ShutDown),
        })
    }
}

impl<T> Drop for Waiter<T> {
    fn drop(&mut self) {
        if self.active {
            self.detach();
        }
    }
}
#[cfg(test)]
mod tests {
    use std::{future::pending, time::Duration};

    use http::{HeaderMap, HeaderValue};
    use http_body_util::BodyExt;
    use tokio::time::sleep;

    use super::*;
    use crate::{api::Method, failure::Effect};

    const SECOND: Duration = Duration::from_secs(1);

    type Calls = Executor<()>;

    fn executor(max_in_flight: usize) -> Calls {
        let completion = |_: &CallContext, result: &Result<(), Failure>| Completion {
            outcome: Some(
                result
                    .as_ref()
                    .map_or_else(|f| f.effect, |_| Effect::Applied),
            ),
            ..Default::default()
        };
        Executor::new(max_in_flight, completion, Arc::default())
    }

    /// A caller, with the telemetry where its call is counted.
    fn caller_of(
        telemetry: Arc<Telemetry>,
        dedup: Option<(&str, u64)>,
        deadline: Option<Duration>,
    ) -> (CallContext, Option<DedupKey>) {
        let method = Method::named("CreateBatch");
        let (id, headers) = (HeaderValue::from_static("r"), HeaderMap::new());
        let record = telemetry.call(method, id, &headers, None).record().clone();
        let deadline = deadline.map(|deadline| Instant::now() + deadline);
        let call = CallContext::new(record, &headers, deadline);
        let dedup = dedup.map(|(id, request_hash)| DedupKey {
            external_id: ExternalId::new(id, &headers),
            request_hash,
        });
        (call, dedup)
    }

    fn caller(
        dedup: Option<(&str, u64)>,
        deadline: Option<Duration>,
    ) -> (CallContext, Option<DedupKey>) {
        caller_of(Arc::default(), dedup, deadline)
    }

    async fn run<F: Future<Output = Result<(), Failure>> + Send + 'static>(
        executor: &Calls,
        (call, dedup): &(CallContext, Option<DedupKey>),
        operation: impl Fn(SendState) -> F,
    ) -> Result<(), Kind> {
        let result = executor.run(call, dedup.as_ref(), operation).await;
        result.map_err(|failure| failure.kind)
    }

    /// What a connection does: it takes the body.
    async fn send(state: &SendState) {
        let guard = state.begin().expect("not cancelled");
        let _ = guard.body(Vec::new(), None).collect().await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_deadline_tells_sent_from_not_sent() {
        let executor = executor(1);
        let caller_now = || caller_of(executor.0.telemetry.clone(), None, Some(SECOND));
        let result = run(&executor, &caller_now(), |_| pending()).await;
        assert!(matches!(result, Err(Kind::DeadlineBeforeSending)));

        tokio::task::yield_now().await; // the aborted task gives its slot back
        let sent = |state: SendState| async move {
            send(&state).await;
            sleep(5 * SECOND).await;
            Ok(())
        };
        let result = run(&executor, &caller_now(), sent).await;
        assert!(matches!(result, Err(Kind::DeadlineAfterSending)));
        assert_eq!(executor.in_flight(), 1);
        executor.finished().await;
        let text = executor.0.telemetry.encode();
        let line =
            r#"aep_gateway_abandoned_calls_total{grpc_method="CreateBatch",outcome="APPLIED"} 1"#;
        assert!(text.contains(line), "{text}");

        let late = caller(None, Some(Duration::ZERO));
        let result = run(&executor, &late, |_| pending()).await;
        assert!(matches!(result, Err(Kind::DeadlineBeforeSending)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_stays_once_its_call_was_sent_and_takes_its_time() {
        let executor = executor(2);
        let waits = caller(Some(("waits", 0)), Some(SECOND));
        let requested = tokio::select! {
            _ = run(&executor, &waits, |_| pending()) => false,
            () = waits.0.early_headers.requested() => true,
        };
        assert!(!requested);

        let sent = caller(Some(("sent", 0)), Some(SECOND));
        let operation = |state: SendState| async move {
            send(&state).await;
            pending().await
        };
        let begin = Instant::now();
        let committed = async {
            sent.0.early_headers.requested().await;
            assert_eq!(begin.elapsed(), EARLY_HEADERS_AFTER);
        };
        let _ = tokio::join!(run(&executor, &sent, operation), committed);

        let short = caller(Some(("short", 0)), Some(SECOND / 20));
        let begin = Instant::now();
        let committed = async {
            short.0.early_headers.requested().await;
            assert_eq!(begin.elapsed(), SECOND / 40);
        };
        let _ = tokio::join!(run(&executor, &short, operation), committed);
    }

    #[tokio::test(start_paused = true)]
    async fn at_the_end_every_caller_gets_its_answer() {
        let executor = executor(2);
        let sent = |state: SendState| async move {
            send(&state).await;
            pending().await
        };
        let (first, second) = (caller(None, None), caller(None, None));
        let (waiting, upstream, ()) = tokio::join!(
            run(&executor, &first, |_| pending()),
            run(&executor, &second, sent),
            async {
                sleep(SECOND).await;
                executor.shut_down();
            }
        );
        assert!(matches!(waiting, Err(Kind::NotSent(NotSent::ShuttingDown))));
        assert!(matches!(upstream, Err(Kind::ShutDown)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_create_outlives_its_caller_only_if_it_was_sent() {
        let executor = executor(2);
        let endless = caller(None, None);
        let left = run(&executor, &endless, |_| pending());
        assert!(tokio::time::timeout(SECOND, left).await.is_err());
        tokio::task::yield_now().await;
        assert_eq!(executor.in_flight(), 0);
        let sent = |state: SendState| async move {
            send(&state).await;
            sleep(5 * SECOND).await;
            Ok(())
        };
        let left = run(&executor, &endless, sent);
        assert!(tokio::time::timeout(SECOND, left).await.is_err());
        assert_eq!(executor.in_flight(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn equal_calls_share_a_flight_that_lasts_until_the_last_leaves() {
        let executor = executor(1);
        let slow = |_| async {
            sleep(3 * SECOND).await;
            Ok(())
        };
        let short = caller(Some(("x", 7)), Some(SECOND));
        let long = caller(Some(("x", 7)), None);
        let (short, long) = tokio::join!(
            run(&executor, &short, slow),
            run(&executor, &long, |_| pending())
        );
        // The other caller goes on, so the create may still be sent.
        assert!(matches!(short, Err(Kind::DeadlineAfterSending)));
        assert!(long.is_ok());
        assert!(executor.0.shared().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn others_with_the_same_id_wait_for_their_turn() {
        let executor = executor(1);
        let slow = |_| async {
            sleep(3 * SECOND).await;
            Err(Failure::unknown(Kind::DeadlineUnsettled))
        };
        let begin = Instant::now();
        let (mine, theirs) = (caller(Some(("x", 1)), None), caller(Some(("x", 2)), None));
        let (first, second) = tokio::join!(run(&executor, &mine, slow), async {
            sleep(SECOND).await;
            let result = run(&executor, &theirs, |_| async { Ok(()) }).await;
            assert_eq!(begin.elapsed(), 3 * SECOND);
            result
        });
        assert!(matches!(first, Err(Kind::DeadlineUnsettled)));
        assert!(second.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_another_flight_does_not_know_what_it_makes() {
        let executor = executor(1);
        let slow = |state: SendState| async move {
            send(&state).await;
            sleep(3 * SECOND).await;
            Ok(())
        };
        let (mine, newer_token) = (
            caller(Some(("x", 1)), None),
            caller(Some(("x", 2)), Some(SECOND)),
        );
        let (first, second) = tokio::join!(
            run(&executor, &mine, slow),
            run(&executor, &newer_token, |_| pending())
        );
        assert!(first.is_ok());
        assert!(matches!(second, Err(Kind::DeadlineUnsettled)));
    }

    #[tokio::test]
    async fn too_many_are_refused_at_once() {
        let executor = executor(1);
        let caller = caller(None, None);
        let first = run(&executor, &caller, |_| pending());
        tokio::pin!(first);
        let polled = tokio::time::timeout(Duration::from_millis(1), &mut first).await;
        assert!(polled.is_err());
        let second = run(&executor, &caller, |_| pending()).await;
        assert!(matches!(second, Err(Kind::NotSent(NotSent::Overloaded))));
    }

    #[tokio::test]
    async fn a_panic_is_a_failure_with_an_unknown_outcome() {
        let executor = executor(1);
        let caller = caller(Some(("x", 0)), None);
        let result = run(&executor, &caller, |_| async { panic!("on purpose") }).await;
        assert!(matches!(result, Err(Kind::Internal)));
        assert!(executor.0.shared().is_empty());
    }
}

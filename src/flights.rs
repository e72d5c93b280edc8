//! Calls in flight: bounded in number, shared where they are the same, and
//! finished even when their caller has left.
//!
//! A flight is one create on its way to a settled end, in a task of its own.
//! Callers ride on it until it lands or their deadline passes. Equal calls with
//! the same external id ride together. When the last rider leaves, the create
//! is called back if nothing of it was sent. Otherwise a batch may come to
//! exist, so the flight goes on, and the log says what became of it.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Semaphore, SetOnce},
    task::AbortHandle,
    time::{Instant, sleep, sleep_until},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    early_headers::EarlyHeaders,
    outcome::{Failure, NeverSent, Settled},
    recent::ExternalId,
    telemetry::{CallRecord, Telemetry},
    upstream::Sending,
};

/// How long an answer to a create with an external id may take before its
/// headers leave. Refusals that a caller may retry come faster than that. (Those
/// of a create without one leave before it is sent.)
const EARLY_HEADERS_AFTER: Duration = Duration::from_millis(100);

/// With a short deadline they leave halfway: Envoy's time for a try, which it
/// tells as a deadline, is over for it once it has the headers.
fn early_headers_after(deadline: Option<Instant>) -> Duration {
    let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
    left.map_or(EARLY_HEADERS_AFTER, |left| {
        EARLY_HEADERS_AFTER.min(left / 2)
    })
}

type CreateResult = Result<Settled, Failure>;

/// The calls in flight of this gateway.
#[derive(Clone, Debug)]
pub struct Flights(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    slots: Arc<Semaphore>,
    tasks: TaskTracker,
    shared: Mutex<HashMap<ExternalId, Arc<Flight>>>,
    stopping: CancellationToken,
    telemetry: Arc<Telemetry>,
}

impl Inner {
    fn shared(&self) -> MutexGuard<'_, HashMap<ExternalId, Arc<Flight>>> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a caller says at the gate.
#[derive(Clone, Debug)]
pub struct Ticket {
    /// What is known of the call.
    pub record: Arc<CallRecord>,
    /// By what it may share a flight, where it has an external id.
    pub shared: Option<SharedBy>,
    /// When the caller must have its answer.
    pub deadline: Option<Instant>,
    /// The headers of the call's response.
    pub early_headers: EarlyHeaders,
}

/// What calls that ride together have in common.
#[derive(Clone, Debug)]
pub struct SharedBy {
    /// The external id.
    pub external_id: ExternalId,
    /// What is to be done and for whom, hashed.
    pub purpose: u64,
}

/// One create on its way.
#[derive(Debug)]
struct Flight {
    ticket: Ticket,
    sending: Sending,
    riders: AtomicUsize,
    landed: SetOnce<CreateResult>,
    delivered: AtomicBool,
    task: OnceLock<AbortHandle>,
}

impl Drop for Flight {
    /// Nobody is left who could still take the result.
    fn drop(&mut self) {
        if let (Some(result), false) = (self.landed.get(), *self.delivered.get_mut()) {
            self.ticket.record.abandoned(result);
        }
    }
}

/// What a call finds when it comes to the gate.
enum Gate {
    /// A seat on a flight.
    Board(Rider),
    /// Another caller's flight with the same external id: wait for its end.
    Wait(Arc<Flight>),
    /// No slot is free.
    Full,
}

impl Flights {
    /// At most `slots` flights at a time.
    pub fn new(slots: usize, telemetry: Arc<Telemetry>) -> Self {
        telemetry.set_max_creates(slots);
        Flights(Arc::new(Inner {
            slots: Arc::new(Semaphore::new(slots)),
            tasks: TaskTracker::new(),
            shared: Mutex::default(),
            stopping: CancellationToken::new(),
            telemetry,
        }))
    }

    /// Settles a create, or rides along with an equal one, until the caller's
    /// deadline.
    pub async fn ride<S: Future<Output = CreateResult> + Send + 'static>(
        &self,
        ticket: &Ticket,
        settle: impl Fn(Sending) -> S,
    ) -> CreateResult {
        loop {
            if ticket
                .deadline
                .is_some_and(|deadline| deadline <= Instant::now())
            {
                return Err(Failure::DeadlineBeforeSending);
            }
            match self.gate(ticket, &settle) {
                Gate::Board(rider) => return rider.ride(ticket).await,
                Gate::Wait(flight) => match self.wait(ticket, flight.landed.wait()).await {
                    Ok(_) => {}
                    // That flight may be an earlier try of this call, with a newer token.
                    Err(Left::Deadline) => return Err(Failure::DeadlineUnsettled),
                    Err(Left::Stop) => return Err(Failure::Stopped),
                },
                Gate::Full => return Err(Failure::NeverSent(NeverSent::Overloaded)),
            }
        }
    }

    fn gate<S: Future<Output = CreateResult> + Send + 'static>(
        &self,
        ticket: &Ticket,
        settle: impl Fn(Sending) -> S,
    ) -> Gate {
        let mut board = ticket.shared.as_ref().map(|by| (by, self.0.shared()));
        if let Some((by, board)) = &board
            && let Some(flight) = board.get(&by.external_id)
        {
            let there = flight.ticket.shared.as_ref();
            if there.is_none_or(|there| there.purpose != by.purpose) {
                return Gate::Wait(flight.clone());
            }
            flight.riders.fetch_add(1, Ordering::AcqRel);
            return Gate::Board(Rider::new(self, flight.clone()));
        }

        let Ok(slot) = self.0.slots.clone().try_acquire_owned() else {
            return Gate::Full;
        };
        let flight = Arc::new(Flight {
            ticket: ticket.clone(),
            sending: Sending::default(),
            riders: AtomicUsize::new(1),
            landed: SetOnce::new(),
            delivered: AtomicBool::new(false),
            task: OnceLock::new(),
        });
        if let Some((by, board)) = &mut board {
            board.insert(by.external_id.clone(), flight.clone());
        }
        drop(board);

        let landing = Landing {
            flights: self.clone(),
            flight: flight.clone(),
        };
        // Boxed: it is large, and would be moved into the task some times over.
        let settled = Box::pin(settle(flight.sending.clone()));
        let counted = self.0.telemetry.create_in_flight();
        let task = self.0.tasks.spawn(async move {
            let _slot = (slot, counted);
            landing.lands(settled.await);
        });
        let _ = flight.task.set(task.abort_handle());
        Gate::Board(Rider::new(self, flight))
    }

    /// Waits for a value, until the call's deadline or the gateway's end.
    async fn wait<T>(&self, ticket: &Ticket, value: impl Future<Output = T>) -> Result<T, Left> {
        let deadline = async {
            match ticket.deadline {
                Some(deadline) => sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            value = value => Ok(value),
            () = deadline => Err(Left::Deadline),
            () = self.0.stopping.cancelled() => Err(Left::Stop),
        }
    }

    /// The gateway ends: every caller gets its answer now.
    pub fn stop(&self) {
        self.0.stopping.cancel();
    }

    /// Waits until no call is in flight. For the end of the process: new ones
    /// may still start meanwhile.
    pub async fn finished(&self) {
        self.0.tasks.close();
        self.0.tasks.wait().await;
    }

    /// How many calls are in flight.
    pub fn count(&self) -> usize {
        self.0.tasks.len()
    }
}

/// Why a caller does not wait any longer.
enum Left {
    Deadline,
    Stop,
}

/// The end of a flight, however it comes.
struct Landing {
    flights: Flights,
    flight: Arc<Flight>,
}

impl Landing {
    fn lands(&self, result: CreateResult) {
        // Off the board first: who comes after the result makes a call of its own.
        if self.flight.ticket.shared.is_some() {
            take_off(&mut self.flights.0.shared(), &self.flight);
        }
        // Fails only if it has landed before.
        let _ = self.flight.landed.set(result);
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        if !self.flight.landed.initialized() {
            self.lands(Err(Failure::Panicked));
        }
    }
}

/// Takes a flight off the board, if it is the one that is there.
fn take_off(board: &mut HashMap<ExternalId, Arc<Flight>>, flight: &Arc<Flight>) {
    if let Some(by) = &flight.ticket.shared
        && board
            .get(&by.external_id)
            .is_some_and(|there| Arc::ptr_eq(there, flight))
    {
        board.remove(&by.external_id);
    }
}

/// A caller on a flight, who may leave at any time.
struct Rider {
    flights: Flights,
    flight: Arc<Flight>,
    seated: bool,
}

impl Rider {
    fn new(flights: &Flights, flight: Arc<Flight>) -> Self {
        Rider {
            flights: flights.clone(),
            flight,
            seated: true,
        }
    }

    /// Waits until the flight lands, the deadline passes or the gateway ends.
    async fn ride(mut self, ticket: &Ticket) -> CreateResult {
        let (flights, flight) = (self.flights.clone(), self.flight.clone());
        let landed = flights.wait(ticket, flight.landed.wait());
        let takes_its_time = async {
            let longest = early_headers_after(ticket.deadline);
            let mut pause = longest;
            loop {
                sleep(pause).await;
                pause = match flight.sending.upstream_for() {
                    Some(time) if time >= longest => break,
                    Some(time) => longest - time,
                    None => longest / 4,
                };
            }
            ticket.early_headers.request();
        };
        tokio::pin!(landed);
        let landed = tokio::select! {
            biased;
            landed = &mut landed => landed,
            () = takes_its_time, if ticket.shared.is_some() => landed.await,
        };
        let left = match landed {
            Ok(result) => {
                flight.delivered.store(true, Ordering::Release);
                return result.clone();
            }
            Err(left) => left,
        };
        let unsettled = flight.sending.earlier_try_is_open();
        Err(match (left, self.leave()) {
            (Left::Deadline, true) if unsettled => Failure::DeadlineUnsettled,
            (Left::Deadline, true) => Failure::DeadlineBeforeSending,
            (Left::Deadline, false) => Failure::DeadlineAfterSending,
            (Left::Stop, true) if unsettled => Failure::Stopped,
            (Left::Stop, true) => Failure::NeverSent(NeverSent::Stopping),
            (Left::Stop, false) => Failure::Stopped,
        })
    }

    /// True: nothing of the call was sent, and nothing will be.
    fn leave(&mut self) -> bool {
        self.seated = false;
        // Nobody can board while the board is locked.
        let mut board = (self.flight.ticket.shared.is_some()).then(|| self.flights.0.shared());
        let was_last = self.flight.riders.fetch_sub(1, Ordering::AcqRel) == 1;
        let called_back =
            was_last && !self.flight.landed.initialized() && self.flight.sending.call_back();
        if called_back {
            if let Some(board) = &mut board {
                take_off(board, &self.flight);
            }
            drop(board);
            if let Some(task) = self.flight.task.get() {
                task.abort();
            }
            // An abort is nothing that anybody needs to hear of.
            self.flight.delivered.store(true, Ordering::Release);
        }
        called_back
    }
}

impl Drop for Rider {
    fn drop(&mut self) {
        if self.seated {
            self.leave();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{future::pending, time::Duration};

    use http::HeaderMap;
    use http_body_util::BodyExt;
    use tokio::time::sleep;

    use super::*;
    use crate::{proto::v1::BatchOrigin, telemetry::Method};

    const SECOND: Duration = Duration::from_secs(1);

    fn flights(slots: usize) -> Flights {
        Flights::new(slots, Arc::default())
    }

    fn record(telemetry: &Arc<Telemetry>) -> Arc<CallRecord> {
        let call = telemetry.call(Method::CreateBatch, &HeaderMap::new(), None);
        call.record().clone()
    }

    fn ticket(external_id: Option<&str>, purpose: u64, deadline: Option<Duration>) -> Ticket {
        Ticket {
            record: record(&Arc::default()),
            shared: external_id.map(|id| SharedBy {
                external_id: ExternalId {
                    organization: Vec::new(),
                    sandbox: Vec::new(),
                    id: id.to_owned(),
                },
                purpose,
            }),
            deadline: deadline.map(|deadline| Instant::now() + deadline),
            early_headers: EarlyHeaders::default(),
        }
    }

    fn settled() -> CreateResult {
        Ok(Settled {
            batch: Arc::default(),
            origin: BatchOrigin::Created,
        })
    }

    /// What a connection does: it takes the body.
    async fn send(sending: &Sending) {
        let handover = sending.begin().expect("not called back");
        let _ = handover.body(Vec::new(), None).collect().await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_deadline_tells_sent_from_not_sent() {
        let flights = flights(1);
        let record = record(&flights.0.telemetry);
        let ticket_now = || Ticket {
            record: record.clone(),
            ..ticket(None, 0, Some(SECOND))
        };
        let result = flights.ride(&ticket_now(), |_| pending()).await;
        assert!(matches!(result, Err(Failure::DeadlineBeforeSending)));

        tokio::task::yield_now().await; // the aborted task gives its slot back
        let sent = |sending: Sending| async move {
            send(&sending).await;
            sleep(5 * SECOND).await;
            settled()
        };
        let result = flights.ride(&ticket_now(), sent).await;
        assert!(matches!(result, Err(Failure::DeadlineAfterSending)));
        assert_eq!(flights.count(), 1);
        flights.finished().await;
        let text = flights.0.telemetry.encode();
        let line = r#"aep_gateway_abandoned_creates_total{outcome="APPLIED"} 1"#;
        assert!(text.contains(line), "{text}");

        let late = ticket(None, 0, Some(Duration::ZERO));
        let result = flights.ride(&late, |_| pending()).await;
        assert!(matches!(result, Err(Failure::DeadlineBeforeSending)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_stays_once_its_call_was_sent_and_takes_its_time() {
        let flights = flights(2);
        let waits = ticket(Some("waits"), 0, Some(SECOND));
        let requested = tokio::select! {
            _ = flights.ride(&waits, |_| pending()) => false,
            () = waits.early_headers.requested() => true,
        };
        assert!(!requested);

        let sent = ticket(Some("sent"), 0, Some(SECOND));
        let settle = |sending: Sending| async move {
            send(&sending).await;
            pending().await
        };
        let begin = Instant::now();
        let committed = async {
            sent.early_headers.requested().await;
            assert_eq!(begin.elapsed(), EARLY_HEADERS_AFTER);
        };
        let _ = tokio::join!(flights.ride(&sent, settle), committed);

        let short = ticket(Some("short"), 0, Some(SECOND / 20));
        let begin = Instant::now();
        let committed = async {
            short.early_headers.requested().await;
            assert_eq!(begin.elapsed(), SECOND / 40);
        };
        let _ = tokio::join!(flights.ride(&short, settle), committed);
    }

    #[tokio::test(start_paused = true)]
    async fn at_the_end_every_caller_gets_its_answer() {
        let flights = flights(2);
        let sent = |sending: Sending| async move {
            send(&sending).await;
            pending().await
        };
        let (first, second) = (ticket(None, 0, None), ticket(None, 0, None));
        let (waiting, upstream, ()) = tokio::join!(
            flights.ride(&first, |_| pending()),
            flights.ride(&second, sent),
            async {
                sleep(SECOND).await;
                flights.stop();
            }
        );
        assert!(matches!(
            waiting,
            Err(Failure::NeverSent(NeverSent::Stopping))
        ));
        assert!(matches!(upstream, Err(Failure::Stopped)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_create_outlives_its_caller_only_if_it_was_sent() {
        let flights = flights(2);
        let endless = ticket(None, 0, None);
        let left = flights.ride(&endless, |_| pending());
        assert!(tokio::time::timeout(SECOND, left).await.is_err());
        tokio::task::yield_now().await;
        assert_eq!(flights.count(), 0);
        let sent = |sending: Sending| async move {
            send(&sending).await;
            sleep(5 * SECOND).await;
            settled()
        };
        let left = flights.ride(&endless, sent);
        assert!(tokio::time::timeout(SECOND, left).await.is_err());
        assert_eq!(flights.count(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn equal_calls_share_a_flight_that_lasts_until_the_last_leaves() {
        let flights = flights(1);
        let slow = |_| async {
            sleep(3 * SECOND).await;
            settled()
        };
        let short = ticket(Some("x"), 7, Some(SECOND));
        let long = ticket(Some("x"), 7, None);
        let (short, long) = tokio::join!(
            flights.ride(&short, slow),
            flights.ride(&long, |_| pending())
        );
        // The other caller goes on, so the create may still be sent.
        assert!(matches!(short, Err(Failure::DeadlineAfterSending)));
        assert!(long.is_ok());
        assert!(flights.0.shared().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn others_with_the_same_id_wait_for_their_turn() {
        let flights = flights(1);
        let slow = |_| async {
            sleep(3 * SECOND).await;
            Err(Failure::DeadlineUnsettled)
        };
        let begin = Instant::now();
        let (mine, theirs) = (ticket(Some("x"), 1, None), ticket(Some("x"), 2, None));
        let (first, second) = tokio::join!(flights.ride(&mine, slow), async {
            sleep(SECOND).await;
            let result = flights.ride(&theirs, |_| async { settled() }).await;
            assert_eq!(begin.elapsed(), 3 * SECOND);
            result
        });
        assert!(matches!(first, Err(Failure::DeadlineUnsettled)));
        assert!(second.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_another_flight_does_not_know_what_it_makes() {
        let flights = flights(1);
        let slow = |sending: Sending| async move {
            send(&sending).await;
            sleep(3 * SECOND).await;
            settled()
        };
        let (mine, newer_token) = (
            ticket(Some("x"), 1, None),
            ticket(Some("x"), 2, Some(SECOND)),
        );
        let (first, second) = tokio::join!(
            flights.ride(&mine, slow),
            flights.ride(&newer_token, |_| pending())
        );
        assert!(first.is_ok());
        assert!(matches!(second, Err(Failure::DeadlineUnsettled)));
    }

    #[tokio::test]
    async fn too_many_are_refused_at_once() {
        let flights = flights(1);
        let ticket = ticket(None, 0, None);
        let first = flights.ride(&ticket, |_| pending());
        tokio::pin!(first);
        let polled = tokio::time::timeout(Duration::from_millis(1), &mut first).await;
        assert!(polled.is_err());
        let second = flights.ride(&ticket, |_| pending()).await;
        assert!(matches!(
            second,
            Err(Failure::NeverSent(NeverSent::Overloaded))
        ));
    }

    #[tokio::test]
    async fn a_panic_is_a_failure_with_an_unknown_outcome() {
        let flights = flights(1);
        let ticket = ticket(Some("x"), 0, None);
        let result = flights
            .ride(&ticket, |_| async { panic!("on purpose") })
            .await;
        assert!(matches!(result, Err(Failure::Panicked)));
        assert!(flights.0.shared().is_empty());
    }
}

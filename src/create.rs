//! One create, from the first look to a settled end: look the external id up,
//! send, send again only what was certainly not created, and look again where
//! the outcome is unknown.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use clap::ValueEnum;
use http::HeaderMap;
use tokio::time::{Instant, sleep};
use tonic::Code;
use tower::retry::budget::{Budget, TpsBudget};

use crate::{
    attempts::Attempt,
    early_headers::EarlyHeaders,
    mapping,
    outcome::{Failure, LookUpFailure, Outcome, Settled},
    proto::v1::{Batch, BatchOrigin, CreateBatchRequest},
    recent::{ExternalId, Known, Recent},
    status,
    telemetry::{CallRecord, Telemetry},
    upstream::{Sending, Upstream},
};

/// When external ids are looked up before a create.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LookUp {
    /// Always.
    Always,
    /// Where the call is known to be a retry.
    OnRetry,
    /// Never, also not after an unknown outcome.
    Never,
}

/// How often a request is sent at most.
const ATTEMPTS: u32 = 3;

/// The pause before the second attempt; it doubles, and is jittered.
const FIRST_PAUSE: Duration = Duration::from_millis(50);

/// The longest `Retry-After` that is waited for here; longer ones are the
/// caller's.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// The pauses between look-ups that find nothing.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
const LOOK_AGAIN_AT_MOST: Duration = Duration::from_secs(2);

/// Retries per call. Calls of the last 10 s count, so that over any minute of
/// an outage at most 0.07 × 70 / 60 = 0.082 retries per call are made; with the
/// look-ups that `proven` allows for 1 s of it, less than 0.1.
const RETRIES_PER_CALL: f32 = 0.07;

/// A create that a caller asks for.
#[derive(Debug)]
pub struct CreateCall {
    /// What it carries upstream.
    pub headers: HeaderMap,
    /// The message as JSON.
    pub body: Bytes,
    /// Its external id, if it has one.
    pub external: Option<External>,
    /// Which try this is, as far as the caller's side says so.
    pub attempt: Attempt,
    /// When the caller must have its answer.
    pub deadline: Option<Instant>,
    /// The headers of its response.
    pub early_headers: EarlyHeaders,
    /// What is known of the call.
    pub record: Arc<CallRecord>,
}

/// What a create is known by, and compared by with the batch that has its name.
#[derive(Debug)]
pub struct External {
    /// The external id.
    pub id: ExternalId,
    /// Whether nobody can have used it before.
    pub is_new: bool,
    /// The message.
    pub message: CreateBatchRequest,
    /// For whom: [`crate::credentials::fingerprint`].
    pub caller: u64,
}

impl CreateCall {
    /// A repetition of a create without an external id makes a second batch, so
    /// nobody may repeat it by himself once anything can exist.
    fn headers_that_leave_first(&self) -> Option<&EarlyHeaders> {
        match self.external {
            None => Some(&self.early_headers),
            Some(_) => None,
        }
    }

    /// Whether a pause would outlast the caller.
    fn ends_within(&self, pause: Duration) -> bool {
        self.deadline
            .is_some_and(|deadline| Instant::now() + pause >= deadline)
    }
}

/// Settles creates by one client of the API.
#[derive(Debug)]
pub struct Creator {
    upstream: Upstream,
    shared: Arc<Shared>,
}

/// What all clients of the API have in common.
#[derive(Debug)]
pub struct Shared {
    look_up: LookUp,
    /// How long one request may take.
    longest: Duration,
    recent: Recent,
    budget: TpsBudget,
    /// One for each answer of the last second: the API is up.
    proven: TpsBudget,
    telemetry: Arc<Telemetry>,
}

impl Shared {
    /// Each request may take `longest`.
    pub fn new(look_up: LookUp, longest: Duration, telemetry: Arc<Telemetry>) -> Self {
        let budget = TpsBudget::new(Duration::from_secs(10), 0, RETRIES_PER_CALL);
        Shared {
            look_up,
            longest,
            recent: Recent::default(),
            budget,
            proven: TpsBudget::new(Duration::from_secs(1), 0, 1.0),
            telemetry,
        }
    }
}

impl Creator {
    /// Settles creates by `upstream`.
    pub fn new(upstream: Upstream, shared: Arc<Shared>) -> Self {
        Creator { upstream, shared }
    }

    /// Whether external ids are looked up at all.
    pub fn looks_up(&self) -> bool {
        self.shared.look_up != LookUp::Never
    }

    /// Settles one create. `sending` tells whoever else holds it what may be
    /// upstream.
    pub async fn settle(&self, call: &CreateCall, sending: Sending) -> Result<Settled, Failure> {
        self.shared.budget.deposit();
        let Some(external) = &call.external else {
            return self.create(call, &sending).await;
        };

        let external_id = &external.id;
        let known = self.shared.recent.get(external_id);
        let open_until = self.earlier_try_ends(call, known.as_ref());
        sending.set_earlier_try_is_open(open_until.is_some());
        let looked = self
            .look_before(call, external, known.as_ref(), open_until)
            .await;
        match looked {
            Ok(Some(batch)) => return found(call, external, batch),
            Ok(None) => sending.set_earlier_try_is_open(false),
            Err(failure) => {
                let is_created = matches!(known, Some(Known::Created { .. }));
                if !is_created && open_until.is_none() {
                    let nothing = Known::NotCreated(call.attempt);
                    self.shared.recent.remember(external_id.clone(), nothing);
                }
                return Err(failure);
            }
        }

        let result = self.create(call, &sending).await;
        let known = match &result {
            Ok(settled) => Known::Created {
                batch: settled.batch.clone(),
                caller: external.caller,
            },
            Err(Failure::ExternalIdTaken { .. }) => return result,
            Err(failure) => match status::row(failure).outcome {
                Outcome::NotApplied => Known::NotCreated(call.attempt),
                _ => Known::Unknown(Instant::now() + self.shared.longest),
            },
        };
        self.shared.recent.remember(external_id.clone(), known);
        match result {
            Err(failure) => self.recover(call, external, failure).await,
            settled => settled,
        }
    }

    /// Until when an earlier try of this call may still create the batch: a
    /// try's request takes no longer than `longest`.
    fn earlier_try_ends(&self, call: &CreateCall, known: Option<&Known>) -> Option<Instant> {
        match known {
            Some(Known::Unknown(until)) => Some(*until),
            // The try before this one was made here, and is over.
            Some(Known::NotCreated(earlier)) if call.attempt.follows(*earlier) => None,
            _ if call.attempt.is_retry() => Some(Instant::now() + self.shared.longest),
            _ => None,
        }
    }

    /// Looks for the batch before anything is sent, and goes on looking while
    /// an earlier try may still create it.
    async fn look_before(
        &self,
        call: &CreateCall,
        external: &External,
        known: Option<&Known>,
        open_until: Option<Instant>,
    ) -> Result<Option<Arc<Batch>>, Failure> {
        let look = match self.shared.look_up {
            LookUp::Always => !external.is_new,
            LookUp::OnRetry => open_until.is_some() || call.attempt.is_retry(),
            LookUp::Never => false,
        };
        let mut pauses = Pauses::default();
        let mut attempts = 0;
        loop {
            let mut failure = None;
            if look {
                attempts += 1;
                match self.look_up_once(call, &external.id).await {
                    Ok(Some(batch)) => return Ok(Some(batch)),
                    Ok(None) => {}
                    Err(cause) => failure = Some(cause),
                }
            }
            let Some(cause) = failure else {
                // A look-up that was answered shows that this caller may hear of another's batch.
                if let Some(Known::Created { batch, caller }) = known
                    && (look || *caller == external.caller)
                {
                    return Ok(Some(batch.clone()));
                }
                match open_until {
                    Some(until) if look && Instant::now() < until => pauses.sleep().await,
                    _ => return Ok(None),
                }
                continue;
            };
            let is_open = open_until.is_some_and(|until| Instant::now() < until);
            if is_open && may_pass(&cause) {
                self.sleep_until_proven(&mut pauses, open_until).await;
            } else if may_pass(&cause) && attempts < ATTEMPTS && self.may_retry(call, LOOK_AGAIN) {
                pauses.sleep().await;
            } else {
                let is_retry = open_until.is_some();
                let failure = LookUpFailure { cause, is_retry };
                return Err(Failure::LookUp(Box::new(failure)));
            }
        }
    }

    /// After a create with an unknown outcome: looks for the batch until it is
    /// there, or its request's time would be over.
    async fn recover(
        &self,
        call: &CreateCall,
        external: &External,
        failure: Failure,
    ) -> Result<Settled, Failure> {
        let lost = status::row(&failure).outcome != Outcome::NotApplied;
        if !lost || !self.looks_up() {
            return Err(failure);
        }
        let longest = Instant::now() + self.shared.longest;
        let until = call
            .deadline
            .map_or(longest, |deadline| longest.min(deadline));
        let mut pauses = Pauses::default();
        loop {
            match self.look_up_once(call, &external.id).await {
                Ok(Some(batch)) if mapping::is_same_content(&external.message, &batch) => {
                    let known = Known::Created {
                        batch: batch.clone(),
                        caller: external.caller,
                    };
                    self.shared.recent.remember(external.id.clone(), known);
                    return Ok(Settled {
                        batch,
                        origin: BatchOrigin::Recovered,
                    });
                }
                Ok(Some(_)) => return Err(failure), // somebody else's
                Ok(None) => pauses.sleep().await,
                Err(cause) if may_pass(&cause) => {
                    self.sleep_until_proven(&mut pauses, Some(until)).await;
                }
                Err(_) => return Err(failure),
            }
            if Instant::now() + pauses.next >= until {
                return Err(failure);
            }
        }
    }

    /// Pauses until the API has answered somebody, so that one that is down is
    /// not asked again and again, or until that has no use any more.
    async fn sleep_until_proven(&self, pauses: &mut Pauses, until: Option<Instant>) {
        loop {
            pauses.sleep().await;
            if self.shared.proven.withdraw() || until.is_none_or(|until| Instant::now() >= until) {
                return;
            }
        }
    }

    /// Whether a request may be repeated after a pause.
    fn may_retry(&self, call: &CreateCall, pause: Duration) -> bool {
        let may = !call.ends_within(pause) && self.shared.budget.withdraw();
        if may {
            self.shared.telemetry.retry();
        }
        may
    }

    async fn look_up_once(
        &self,
        call: &CreateCall,
        external_id: &ExternalId,
    ) -> Result<Option<Arc<Batch>>, Failure> {
        let found = self
            .upstream
            .find_batches(&call.headers, &external_id.id, &call.record)
            .await;
        self.shared.telemetry.look_up(&found);
        if found.is_ok() {
            self.shared.proven.deposit();
        }
        Ok(found?.into_iter().next().map(Arc::new))
    }

    /// `POST /batches`, repeated only where it is proven that nothing was
    /// created, and with an external id only after one more look-up.
    async fn create(&self, call: &CreateCall, sending: &Sending) -> Result<Settled, Failure> {
        let mut attempt = 1;
        loop {
            let Some(handover) = sending.begin() else {
                return Err(Failure::DeadlineBeforeSending);
            };
            let result = self
                .upstream
                .create_batch(
                    &call.headers,
                    call.body.clone(),
                    &handover,
                    call.headers_that_leave_first(),
                    &call.record,
                )
                .await;
            let failure = match result {
                Ok(batch) => {
                    self.shared.proven.deposit();
                    return Ok(created(batch));
                }
                Err(failure) => failure,
            };
            if status::row(&failure).outcome != Outcome::NotApplied {
                return Err(failure);
            }
            sending.nothing_was_created();
            let Some(pause) = pause_before_retry(&failure, attempt) else {
                return Err(failure);
            };
            if attempt == ATTEMPTS || !self.may_retry(call, pause) {
                return Err(failure);
            }
            sleep(pause).await;
            if let Some(external) = &call.external
                && self.looks_up()
            {
                match self.look_up_once(call, &external.id).await {
                    Ok(None) => {}
                    Ok(Some(batch)) => return found(call, external, batch),
                    Err(_) => return Err(failure),
                }
            }
            attempt += 1;
        }
    }
}

/// Whether a look-up that failed so may succeed later.
fn may_pass(cause: &Failure) -> bool {
    !matches!(cause, Failure::Refused(refusal) if refusal.status.is_client_error())
}

/// The pauses between look-ups: longer and longer, and jittered.
struct Pauses {
    next: Duration,
}

impl Default for Pauses {
    fn default() -> Self {
        Pauses { next: LOOK_AGAIN }
    }
}

impl Pauses {
    async fn sleep(&mut self) {
        sleep(jittered(self.next)).await;
        self.next = (self.next * 3 / 2).min(LOOK_AGAIN_AT_MOST);
    }
}

/// How long to wait before a failed attempt is repeated; `None` where that
/// would not help, or would take longer than a call should hang.
fn pause_before_retry(failure: &Failure, attempt: u32) -> Option<Duration> {
    let stated = status::retry_after(failure);
    let pause = match status::row(failure).code {
        Code::Unavailable => stated.unwrap_or_else(|| jittered(FIRST_PAUSE * (1 << (attempt - 1)))),
        Code::ResourceExhausted => stated?,
        _ => return None,
    };
    (pause <= LONGEST_PAUSE).then_some(pause)
}

/// Half to all of a pause.
fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(0.5 + fastrand::f64() / 2.0)
}

fn created(batch: Arc<Batch>) -> Settled {
    Settled {
        batch,
        origin: BatchOrigin::Created,
    }
}

fn found(call: &CreateCall, external: &External, batch: Arc<Batch>) -> Result<Settled, Failure> {
    if mapping::is_same_content(&external.message, &batch) {
        Ok(Settled {
            batch,
            origin: BatchOrigin::Found,
        })
    } else {
        let batch_id = call.record.quote().id(&batch.id);
        Err(Failure::ExternalIdTaken { batch_id })
    }
}

//! One create, from the first lookup to a known end: look for the external id,
//! send, send again only what certainly changed nothing, and look again where
//! the outcome is unknown.

mod recent;
#[cfg(test)]
mod tests;

use std::{
    hash::{BuildHasher, RandomState},
    sync::{Arc, LazyLock},
    time::Duration,
};

use bytes::Bytes;
use clap::ValueEnum;
use http::HeaderMap;
use tokio::time::{Instant, sleep};
use tower::retry::budget::{Budget, TpsBudget};

use self::recent::{LastResult, RecentResults};
use crate::{
    call::{CallContext, early_headers::EarlyHeaders, external_id::ExternalId},
    execution::SendState,
    failure::{Effect, Failure, Kind, Retry},
    mapping,
    proto::v1::{Batch, BatchOrigin, CreateBatchRequest},
    retry::{Retries, jittered},
    telemetry::Telemetry,
    upstream::{SendGuard, Upstream},
};

/// When external ids are looked up before a create.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LookupPolicy {
    /// Always.
    Always,
    /// Where the call is known to be a retry.
    OnRetry,
    /// Never, also not after an unknown outcome.
    Never,
}

/// The pauses between lookups that find nothing.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
const LOOK_AGAIN_AT_MOST: Duration = Duration::from_secs(2);

/// What of the API a create needs.
pub trait BatchApi: Send + Sync {
    /// `POST /batches`: see [`Upstream::post_batch`].
    fn create_batch(
        &self,
        create: &Create,
        guard: &SendGuard,
    ) -> impl Future<Output = Result<Batch, Failure>> + Send;

    /// The batches with this external id, the oldest first: see
    /// [`Upstream::batches_with_external_id`].
    fn find_batches(
        &self,
        create: &Create,
        external_id: &str,
    ) -> impl Future<Output = Result<Vec<Batch>, Failure>> + Send;
}

impl BatchApi for Upstream {
    async fn create_batch(&self, create: &Create, guard: &SendGuard) -> Result<Batch, Failure> {
        let (body, first) = (create.body.clone(), create.headers_that_leave_first());
        self.post_batch(&create.call, &create.headers, body, guard, first)
            .await
    }

    async fn find_batches(
        &self,
        create: &Create,
        external_id: &str,
    ) -> Result<Vec<Batch>, Failure> {
        self.batches_with_external_id(&create.call, &create.headers, external_id)
            .await
    }
}

/// A create that a caller asks for.
#[derive(Debug)]
pub struct Create {
    /// The call.
    pub call: CallContext,
    /// What it carries upstream.
    pub headers: HeaderMap,
    /// The message as JSON.
    pub body: Bytes,
    /// What makes it idempotent, if it has an external id.
    pub idempotent: Option<IdempotentCreate>,
}

/// What a create is known by, and compared by with the batch of that name.
#[derive(Debug)]
pub struct IdempotentCreate {
    /// The external id.
    pub id: ExternalId,
    /// Whether nobody can have used it before.
    pub is_new: bool,
    /// The message.
    pub message: CreateBatchRequest,
    /// For whom: [`crate::credentials::principal`].
    pub principal: u64,
}

impl IdempotentCreate {
    /// Tells creates apart by their caller and body, within this process only.
    pub fn request_hash(&self, body: &[u8]) -> u64 {
        static HASHER: LazyLock<RandomState> = LazyLock::new(RandomState::new);
        HASHER.hash_one((self.principal, body))
    }
}

impl Create {
    /// A repetition of a create without an external id makes a second batch, so
    /// nobody may repeat it unasked once anything can exist.
    fn headers_that_leave_first(&self) -> Option<&EarlyHeaders> {
        match self.idempotent {
            None => Some(&self.call.early_headers),
            Some(_) => None,
        }
    }
}

/// A batch, and how it came to be known.
#[derive(Clone, Debug)]
pub struct CreatedBatch {
    /// The batch.
    pub batch: Arc<Batch>,
    /// How it came to be known.
    pub origin: BatchOrigin,
}

/// Creates batches with one client of the API.
#[derive(Debug)]
pub struct BatchCreator<Api = Upstream> {
    api: Api,
    state: Arc<CreateState>,
}

/// What all clients of the API have in common.
#[derive(Debug)]
pub struct CreateState {
    lookup: LookupPolicy,
    /// How long one request may take.
    request_timeout: Duration,
    recent: RecentResults,
    retries: Arc<Retries>,
    /// One token per successful response of the last second; spending one means
    /// that the API is up.
    recent_successes: TpsBudget,
    telemetry: Arc<Telemetry>,
}

impl CreateState {
    /// Nothing is known yet.
    pub fn new(
        lookup: LookupPolicy,
        request_timeout: Duration,
        retries: Arc<Retries>,
        telemetry: Arc<Telemetry>,
    ) -> Self {
        CreateState {
            lookup,
            request_timeout,
            recent: RecentResults::default(),
            retries,
            recent_successes: TpsBudget::new(Duration::from_secs(1), 0, 1.0),
            telemetry,
        }
    }
}

impl<Api: BatchApi> BatchCreator<Api> {
    /// Creates batches by `api`.
    pub fn new(api: Api, state: Arc<CreateState>) -> Self {
        BatchCreator { api, state }
    }

    /// Whether external ids are looked up at all.
    pub fn uses_lookups(&self) -> bool {
        self.state.lookup != LookupPolicy::Never
    }

    /// Creates the batch, or finds the one with this external id. `send_state`
    /// shows the waiting caller whether a request may have been sent.
    pub async fn create_or_find(
        &self,
        create: &Create,
        send_state: SendState,
    ) -> Result<CreatedBatch, Failure> {
        self.state.retries.deposit();
        let Some(idempotent) = &create.idempotent else {
            return self.create(create, &send_state).await;
        };

        let id = &idempotent.id;
        let last = self.state.recent.get(id);
        let pending_until = self.previous_attempt_pending_until(create, last.as_ref());
        send_state.set_previous_attempt_pending(pending_until.is_some());
        let existing = self
            .find_existing(create, idempotent, last.as_ref(), pending_until)
            .await;
        match existing {
            Ok(Some(batch)) => return found(create, idempotent, batch),
            Ok(None) => send_state.set_previous_attempt_pending(false),
            Err(failure) => {
                let is_created = matches!(last, Some(LastResult::Created { .. }));
                if !is_created && pending_until.is_none() {
                    let nothing = LastResult::NotApplied(create.call.attempt);
                    self.state.recent.insert(id.clone(), nothing);
                }
                return Err(failure);
            }
        }

        let result = self.create(create, &send_state).await;
        let last = match &result {
            Ok(created) => LastResult::Created {
                batch: created.batch.clone(),
                principal: idempotent.principal,
            },
            Err(Failure {
                kind: Kind::ExternalIdTaken { .. },
                ..
            }) => return result,
            Err(failure) => match failure.effect {
                Effect::NotApplied => LastResult::NotApplied(create.call.attempt),
                Effect::Unknown | Effect::Applied => {
                    LastResult::Unknown(Instant::now() + self.state.request_timeout)
                }
            },
        };
        self.state.recent.insert(id.clone(), last);
        match result {
            Err(failure) => self.recover(create, idempotent, failure).await,
            created => created,
        }
    }

    /// Until when an earlier attempt of this call may still create the batch: a
    /// request takes no longer than `request_timeout`.
    fn previous_attempt_pending_until(
        &self,
        create: &Create,
        last: Option<&LastResult>,
    ) -> Option<Instant> {
        let attempt = create.call.attempt;
        match last {
            Some(LastResult::Unknown(until)) => Some(*until),
            // The attempt before this one was made here, and is over.
            Some(LastResult::NotApplied(earlier)) if attempt.follows(*earlier) => None,
            _ if attempt.is_retry() => Some(Instant::now() + self.state.request_timeout),
            _ => None,
        }
    }

    /// Looks for the batch before anything is sent, and goes on looking while
    /// an earlier attempt may still create it.
    async fn find_existing(
        &self,
        create: &Create,
        idempotent: &IdempotentCreate,
        last: Option<&LastResult>,
        pending_until: Option<Instant>,
    ) -> Result<Option<Arc<Batch>>, Failure> {
        let uses_lookups = match self.state.lookup {
            LookupPolicy::Always => !idempotent.is_new,
            LookupPolicy::OnRetry => pending_until.is_some() || create.call.attempt.is_retry(),
            LookupPolicy::Never => false,
        };
        let is_pending = || pending_until.is_some_and(|until| Instant::now() < until);
        let mut backoff = Backoff::default();
        let mut attempt = 0;
        loop {
            attempt += 1;
            let looked_up = match uses_lookups {
                true => self.find_by_external_id(create, &idempotent.id).await,
                false => Ok(None),
            };
            match looked_up {
                Ok(Some(batch)) => return Ok(Some(batch)),
                Ok(None) => {
                    // A lookup that succeeded shows that this caller may hear of another's batch.
                    if let Some(LastResult::Created { batch, principal }) = last
                        && (uses_lookups || *principal == idempotent.principal)
                    {
                        return Ok(Some(batch.clone()));
                    }
                    if !uses_lookups || !is_pending() {
                        return Ok(None);
                    }
                    backoff.sleep().await;
                }
                Err(cause) if is_pending() && is_transient(&cause) => {
                    self.wait_for_recovery(&mut backoff, pending_until).await;
                }
                Err(cause) => match self.state.retries.pause(&cause, attempt, &create.call) {
                    Some(pause) => sleep(pause).await,
                    None => return Err(lookup_failed(cause, pending_until.is_some())),
                },
            }
        }
    }

    /// After a create with an unknown outcome: looks for the batch until it is
    /// there, or its request's time would be over.
    async fn recover(
        &self,
        create: &Create,
        idempotent: &IdempotentCreate,
        failure: Failure,
    ) -> Result<CreatedBatch, Failure> {
        if failure.effect == Effect::NotApplied || !self.uses_lookups() {
            return Err(failure);
        }
        let longest = Instant::now() + self.state.request_timeout;
        let until = create.call.deadline.map_or(longest, |d| longest.min(d));
        let mut backoff = Backoff::default();
        loop {
            match self.find_by_external_id(create, &idempotent.id).await {
                Ok(Some(batch)) if mapping::is_same_content(&idempotent.message, &batch) => {
                    let created = LastResult::Created {
                        batch: batch.clone(),
                        principal: idempotent.principal,
                    };
                    self.state.recent.insert(idempotent.id.clone(), created);
                    return Ok(CreatedBatch {
                        batch,
                        origin: BatchOrigin::Recovered,
                    });
                }
                Ok(Some(_)) => return Err(failure), // somebody else's
                Ok(None) => backoff.sleep().await,
                Err(cause) if is_transient(&cause) => {
                    self.wait_for_recovery(&mut backoff, Some(until)).await;
                }
                Err(_) => return Err(failure),
            }
            if Instant::now() + backoff.next >= until {
                return Err(failure);
            }
        }
    }

    /// Waits until the API has responded to somebody, so that one that is down
    /// is not asked again and again, or until waiting has no use any more.
    async fn wait_for_recovery(&self, backoff: &mut Backoff, until: Option<Instant>) {
        loop {
            backoff.sleep().await;
            let is_up = self.state.recent_successes.withdraw();
            if is_up || until.is_none_or(|until| Instant::now() >= until) {
                return;
            }
        }
    }

    async fn find_by_external_id(
        &self,
        create: &Create,
        id: &ExternalId,
    ) -> Result<Option<Arc<Batch>>, Failure> {
        let found = self.api.find_batches(create, &id.id).await;
        self.state.telemetry.lookup(&found);
        if found.is_ok() {
            self.state.recent_successes.deposit();
        }
        Ok(found?.into_iter().next().map(Arc::new))
    }

    /// `POST /batches`, repeated only where it is proven that nothing was
    /// created, and with an external id only after one more lookup.
    async fn create(
        &self,
        create: &Create,
        send_state: &SendState,
    ) -> Result<CreatedBatch, Failure> {
        let mut attempt = 1;
        loop {
            let Some(guard) = send_state.begin() else {
                return Err(Failure::refused(Kind::DeadlineBeforeSending));
            };
            let result = self.api.create_batch(create, &guard).await;
            let failure = match result {
                Ok(batch) => {
                    self.state.recent_successes.deposit();
                    return Ok(CreatedBatch {
                        batch: Arc::new(batch),
                        origin: BatchOrigin::Created,
                    });
                }
                Err(failure) => failure,
            };
            if failure.effect != Effect::NotApplied {
                return Err(failure);
            }
            send_state.set_not_applied();
            match self.state.retries.pause(&failure, attempt, &create.call) {
                Some(pause) => sleep(pause).await,
                None => return Err(failure),
            }
            if let Some(idempotent) = &create.idempotent
                && self.uses_lookups()
            {
                match self.find_by_external_id(create, &idempotent.id).await {
                    Ok(None) => {}
                    Ok(Some(batch)) => return found(create, idempotent, batch),
                    Err(_) => return Err(failure),
                }
            }
            attempt += 1;
        }
    }
}

/// Whether a lookup that failed so may succeed soon.
fn is_transient(cause: &Failure) -> bool {
    let is_client_error = cause.http_status().is_some_and(|s| s.is_client_error());
    cause.retry != Retry::Never && !is_client_error
}

/// A lookup before a create failed. It created nothing, but an earlier attempt
/// of the call may have.
fn lookup_failed(cause: Failure, previous_attempt_pending: bool) -> Failure {
    let retry = cause.retry;
    let kind = Kind::Lookup(Box::new(cause));
    match previous_attempt_pending {
        true => Failure::unknown(kind),
        false => Failure {
            retry,
            ..Failure::refused(kind)
        },
    }
}

/// The pauses between lookups: longer and longer, and jittered.
struct Backoff {
    next: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Backoff { next: LOOK_AGAIN }
    }
}

impl Backoff {
    async fn sleep(&mut self) {
        sleep(jittered(self.next)).await;
        self.next = (self.next * 3 / 2).min(LOOK_AGAIN_AT_MOST);
    }
}

fn found(
    create: &Create,
    idempotent: &IdempotentCreate,
    batch: Arc<Batch>,
) -> Result<CreatedBatch, Failure> {
    if mapping::is_same_content(&idempotent.message, &batch) {
        Ok(CreatedBatch {
            batch,
            origin: BatchOrigin::Found,
        })
    } else {
        let batch_id = create.call.record.redactor().id(&batch.id);
        Err(Failure::refused(Kind::ExternalIdTaken { batch_id }))
    }
}

//! Under a paused clock, with a fake API: time passes only where something
//! waits for it.

use std::{collections::VecDeque, sync::Mutex};

use http::HeaderValue;
use tokio::time::timeout;

use super::*;
use crate::{
    api::Method,
    failure::{ApiError, ErrorBody, InvalidResponse, NotSent, Reason},
};

const SECOND: Duration = Duration::from_secs(1);

/// How long one request may take.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// What the API responds, and what it was asked when.
#[derive(Debug)]
struct FakeApi {
    began: Instant,
    creates: Mutex<VecDeque<Result<Batch, Failure>>>,
    /// What lookups end with before they show the batch below.
    lookups: Mutex<VecDeque<Result<(), Failure>>>,
    /// A batch, and from when on Catalog shows it.
    shown: Mutex<Option<(Instant, Batch)>>,
    asked: Mutex<Vec<(Duration, &'static str)>>,
}

impl FakeApi {
    fn ask(&self, what: &'static str) {
        let at = self.began.elapsed();
        self.asked.lock().expect("no panic").push((at, what));
    }

    /// What it was asked, such as `GET POST`.
    fn asked(&self) -> String {
        let asked = self.asked.lock().expect("no panic");
        let words: Vec<_> = asked.iter().map(|(_, what)| *what).collect();
        words.join(" ")
    }
}

impl BatchApi for Arc<FakeApi> {
    async fn create_batch(&self, create: &Create, guard: &SendGuard) -> Result<Batch, Failure> {
        use http_body_util::BodyExt;
        self.ask("POST");
        let _ = guard.body(create.body.clone(), None).collect().await;
        let next = self.creates.lock().expect("no panic").pop_front();
        next.unwrap_or_else(|| Ok(batch("new", "d")))
    }

    async fn find_batches(&self, _: &Create, _: &str) -> Result<Vec<Batch>, Failure> {
        self.ask("GET");
        let next = self.lookups.lock().expect("no panic").pop_front();
        next.unwrap_or(Ok(()))?;
        let shown = self.shown.lock().expect("no panic");
        let shown = shown.iter().filter(|(from, _)| *from <= Instant::now());
        Ok(shown.map(|(_, batch)| batch.clone()).collect())
    }
}

fn batch(id: &str, dataset: &str) -> Batch {
    let text =
        format!(r#"{{"id":"{id}","relatedObjects":[{{"type":"dataSet","id":"{dataset}"}}]}}"#);
    mapping::batch_from_json(text.as_bytes()).expect("a batch")
}

/// One replica of the gateway.
struct Replica {
    api: Arc<FakeApi>,
    creator: BatchCreator<Arc<FakeApi>>,
}

fn replica_of(api: &Arc<FakeApi>, lookup: LookupPolicy) -> Replica {
    let telemetry = Arc::<Telemetry>::default();
    let retries = Arc::new(Retries::new(telemetry.clone()));
    for _ in 0..100 {
        retries.deposit(); // enough for 7 retries
    }
    let state = CreateState::new(lookup, REQUEST_TIMEOUT, retries, telemetry);
    Replica {
        api: api.clone(),
        creator: BatchCreator::new(api.clone(), Arc::new(state)),
    }
}

fn replica(lookup: LookupPolicy) -> Replica {
    let api = FakeApi {
        began: Instant::now(),
        creates: Mutex::default(),
        lookups: Mutex::default(),
        shown: Mutex::default(),
        asked: Mutex::default(),
    };
    replica_of(&Arc::new(api), lookup)
}

impl Replica {
    /// The next requests to create end so.
    fn creates(&self, results: impl IntoIterator<Item = Failure>) {
        let mut creates = self.api.creates.lock().expect("no panic");
        creates.extend(results.into_iter().map(Err));
    }

    /// The next lookups end so.
    fn lookups(&self, results: impl IntoIterator<Item = Failure>) {
        let mut lookups = self.api.lookups.lock().expect("no panic");
        lookups.extend(results.into_iter().map(Err));
    }

    /// Catalog shows this batch after a while.
    fn shows(&self, batch: Batch, after: Duration) {
        *self.api.shown.lock().expect("no panic") = Some((Instant::now() + after, batch));
    }

    async fn create(&self, create: &Create) -> Result<BatchOrigin, Reason> {
        let result = self.creator.create_or_find(create, SendState::default());
        let created = result.await.map_err(|failure| failure.reason());
        created.map(|created| created.origin)
    }
}

fn call(attempt: &[(&'static str, &'static str)], deadline: Option<Duration>) -> CallContext {
    let mut metadata = HeaderMap::new();
    for (name, value) in attempt {
        metadata.insert(*name, HeaderValue::from_static(value));
    }
    let (method, id) = (Method::named("CreateBatch"), HeaderValue::from_static("r"));
    let telemetry = Arc::<Telemetry>::default();
    let record = telemetry.call(method, id, &metadata, None).record().clone();
    let deadline = deadline.map(|deadline| Instant::now() + deadline);
    CallContext::new(record, &metadata, deadline)
}

fn create(call: CallContext, external_id: Option<&str>, principal: u64) -> Create {
    let headers = HeaderMap::new();
    Create {
        call,
        body: Bytes::new(),
        idempotent: external_id.map(|id| IdempotentCreate {
            id: ExternalId::new(id, &headers),
            is_new: false,
            message: CreateBatchRequest {
                dataset_id: "d".to_owned(),
                external_id: Some(id.to_owned()),
                ..Default::default()
            },
            principal,
        }),
        headers,
    }
}

const RETRY: &[(&str, &str)] = &[("grpc-previous-rpc-attempts", "1")];

fn first() -> Create {
    create(call(&[], None), Some("x"), 0)
}

fn retry() -> Create {
    create(call(RETRY, None), Some("x"), 0)
}

fn lost() -> Failure {
    Failure::unknown(Kind::ConnectionLost(String::new()))
}

fn not_sent() -> Failure {
    Failure::transient(Kind::NotSent(NotSent::ConnectTimeout))
}

fn lookup_lost() -> Failure {
    Failure::transient(Kind::ConnectionLost(String::new()))
}

fn api_error(status: u16, reason: Reason, retry: Retry) -> Failure {
    let error = ApiError {
        reason,
        status: http::StatusCode::from_u16(status).expect("a status"),
        body: ErrorBody::default(),
        request_id: None,
        redirect_host: None,
    };
    Failure {
        retry,
        ..Failure::refused(Kind::Api(Box::new(error)))
    }
}

fn rate_limited(after: Duration) -> Failure {
    api_error(429, Reason::ApiRateLimited, Retry::After(after))
}

#[tokio::test(start_paused = true)]
async fn only_what_certainly_changed_nothing_is_sent_again() {
    let anonymous = || create(call(&[], None), None, 0);
    for (failures, result, asked) in [
        (vec![], Ok(BatchOrigin::Created), "POST"),
        (vec![not_sent()], Ok(BatchOrigin::Created), "POST POST"),
        (
            vec![not_sent(), not_sent(), not_sent()],
            Err(Reason::UpstreamConnectTimeout),
            "POST POST POST",
        ),
        (vec![lost()], Err(Reason::ConnectionLost), "POST"),
        (
            vec![not_sent(), lost()],
            Err(Reason::ConnectionLost),
            "POST POST",
        ),
        (
            vec![api_error(400, Reason::ApiInvalidRequest, Retry::Never)],
            Err(Reason::ApiInvalidRequest),
            "POST",
        ),
    ] {
        let replica = replica(LookupPolicy::Always);
        replica.creates(failures);
        assert_eq!(replica.create(&anonymous()).await, result);
        assert_eq!(replica.api.asked(), asked);
    }
}

#[tokio::test(start_paused = true)]
async fn retry_after_is_obeyed_within_bounds() {
    for (after, deadline, result) in [
        (2 * SECOND, None, Ok(BatchOrigin::Created)),
        (6 * SECOND, None, Err(Reason::ApiRateLimited)),
        (2 * SECOND, Some(SECOND), Err(Reason::ApiRateLimited)),
    ] {
        let replica = replica(LookupPolicy::Always);
        replica.creates([rate_limited(after)]);
        let begin = Instant::now();
        let create = create(call(&[], deadline), None, 0);
        assert_eq!(
            replica.create(&create).await,
            result,
            "{after:?} {deadline:?}"
        );
        let waited = result.is_ok();
        assert_eq!(begin.elapsed() >= after, waited, "{after:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_budget_bounds_the_retries_of_an_outage() {
    let replica = replica(LookupPolicy::Always);
    for _ in 0..200 {
        replica.creates([not_sent(), not_sent(), not_sent()]);
        let _ = replica.create(&create(call(&[], None), None, 0)).await;
        replica.api.creates.lock().expect("no panic").clear();
    }
    let retries = replica.api.asked().matches("POST").count() - 200;
    // 7 for the 100 calls before, and 7 for each 100 since.
    assert!((14..=21).contains(&retries), "{retries}");
}

#[tokio::test(start_paused = true)]
async fn the_batch_that_is_there_is_the_answer() {
    let replica = replica(LookupPolicy::Always);
    replica.shows(batch("old", "d"), Duration::ZERO);
    assert_eq!(replica.create(&first()).await, Ok(BatchOrigin::Found));
    replica.shows(batch("old", "other"), Duration::ZERO);
    assert_eq!(replica.create(&first()).await, Err(Reason::ExternalIdTaken));
    assert_eq!(replica.api.asked(), "GET GET");
}

#[tokio::test(start_paused = true)]
async fn before_a_second_post_comes_one_more_lookup() {
    let found = replica(LookupPolicy::Always);
    found.creates([not_sent()]);
    found.shows(batch("by another", "d"), Duration::from_millis(10));
    assert_eq!(found.create(&first()).await, Ok(BatchOrigin::Found));
    assert_eq!(found.api.asked(), "GET POST GET");

    let failed = replica(LookupPolicy::Never);
    failed.creates([not_sent()]);
    assert_eq!(failed.create(&first()).await, Ok(BatchOrigin::Created));
    assert_eq!(failed.api.asked(), "POST POST");

    let failed = replica(LookupPolicy::OnRetry);
    failed.creates([not_sent()]);
    failed.lookups([lookup_lost()]);
    let refused = failed.create(&first()).await;
    assert_eq!(refused, Err(Reason::UpstreamConnectTimeout));
    assert_eq!(failed.api.asked(), "POST GET");
}

#[tokio::test(start_paused = true)]
async fn a_lost_response_is_looked_for_until_the_requests_time_is_over() {
    let shown = replica(LookupPolicy::Always);
    shown.creates([lost()]);
    shown.shows(batch("lost", "d"), 20 * SECOND);
    let begin = Instant::now();
    assert_eq!(shown.create(&first()).await, Ok(BatchOrigin::Recovered));
    assert!(begin.elapsed() < 23 * SECOND, "{:?}", begin.elapsed());
    let lookups = shown.api.asked().matches("GET").count();
    assert!((10..40).contains(&lookups), "{lookups}");

    let never_shown = replica(LookupPolicy::Always);
    never_shown.creates([lost()]);
    let begin = Instant::now();
    let unknown = never_shown.create(&first()).await;
    assert_eq!(unknown, Err(Reason::ConnectionLost));
    let took = begin.elapsed();
    assert!(took > REQUEST_TIMEOUT - 3 * SECOND && took <= REQUEST_TIMEOUT);

    // Nor longer than the caller waits.
    let hurried = replica(LookupPolicy::Always);
    hurried.creates([lost()]);
    let begin = Instant::now();
    let create = create(call(&[], Some(5 * SECOND)), Some("x"), 0);
    assert_eq!(hurried.create(&create).await, Err(Reason::ConnectionLost));
    assert!(begin.elapsed() <= 5 * SECOND);

    // Another's batch with this id is not what was lost.
    let others = replica(LookupPolicy::Always);
    others.creates([lost()]);
    others.shows(batch("another", "other"), SECOND);
    assert_eq!(others.create(&first()).await, Err(Reason::ConnectionLost));

    let without = replica(LookupPolicy::Never);
    without.creates([lost()]);
    assert_eq!(without.create(&first()).await, Err(Reason::ConnectionLost));
    assert_eq!(without.api.asked(), "POST");
}

#[tokio::test(start_paused = true)]
async fn an_unusable_response_is_recovered_too() {
    let replica = replica(LookupPolicy::Always);
    replica.creates([Failure {
        effect: Effect::Applied,
        ..Failure::refused(Kind::InvalidResponse(Box::new(InvalidResponse {
            reason: Reason::AnswerUnusable,
            status: http::StatusCode::CREATED,
            problem: String::new(),
            beginning: String::new(),
            location: None,
            batch_id: None,
            request_id: None,
        })))
    }]);
    replica.shows(batch("made", "d"), SECOND);
    assert_eq!(replica.create(&first()).await, Ok(BatchOrigin::Recovered));
}

#[tokio::test(start_paused = true)]
async fn a_retry_waits_for_an_attempt_in_another_replica() {
    // It finds what the other attempt created …
    let found = replica(LookupPolicy::Always);
    found.shows(batch("by the first", "d"), 12 * SECOND);
    assert_eq!(found.create(&retry()).await, Ok(BatchOrigin::Found));
    assert!(!found.api.asked().contains("POST"));

    // … or creates, when the other can create nothing any more.
    let created = replica(LookupPolicy::Always);
    let begin = Instant::now();
    assert_eq!(created.create(&retry()).await, Ok(BatchOrigin::Created));
    let took = begin.elapsed();
    assert!(took >= REQUEST_TIMEOUT && took < REQUEST_TIMEOUT + 3 * SECOND);
    assert!(created.api.asked().ends_with("GET POST"));

    // Until then it tells its waiting caller so.
    let (replica, state) = (replica(LookupPolicy::Always), SendState::default());
    let create = retry();
    let waits = replica.creator.create_or_find(&create, state.clone());
    assert!(timeout(SECOND, waits).await.is_err());
    assert!(state.previous_attempt_pending());
}

#[tokio::test(start_paused = true)]
async fn a_retry_goes_on_at_once_after_an_attempt_that_ended_here() {
    for refused_by_lookup in [true, false] {
        let replica = replica(LookupPolicy::Always);
        match refused_by_lookup {
            true => replica.lookups([api_error(403, Reason::ApiPermissionDenied, Retry::Never)]),
            false => replica.creates([api_error(400, Reason::ApiInvalidRequest, Retry::Never)]),
        }
        assert!(replica.create(&first()).await.is_err());
        let begin = Instant::now();
        assert_eq!(replica.create(&retry()).await, Ok(BatchOrigin::Created));
        assert_eq!(begin.elapsed(), Duration::ZERO);
    }

    // But not after one that was not the attempt just before.
    let replica = replica(LookupPolicy::Always);
    replica.creates([api_error(400, Reason::ApiInvalidRequest, Retry::Never)]);
    assert!(replica.create(&first()).await.is_err());
    let third = create(
        call(&[("grpc-previous-rpc-attempts", "2")], None),
        Some("x"),
        0,
    );
    let begin = Instant::now();
    assert_eq!(replica.create(&third).await, Ok(BatchOrigin::Created));
    assert!(begin.elapsed() >= REQUEST_TIMEOUT);
}

#[tokio::test(start_paused = true)]
async fn after_an_unknown_outcome_everybody_waits_here_marked_or_not() {
    let replica = replica(LookupPolicy::Always);
    replica.creates([lost()]);
    let hurried = create(call(&[], Some(SECOND)), Some("x"), 0);
    assert_eq!(replica.create(&hurried).await, Err(Reason::ConnectionLost));
    let begin = Instant::now();
    assert_eq!(replica.create(&first()).await, Ok(BatchOrigin::Created));
    assert!(begin.elapsed() >= REQUEST_TIMEOUT - 2 * SECOND);
}

#[tokio::test(start_paused = true)]
async fn what_catalog_does_not_show_yet_is_remembered() {
    for lookup in [LookupPolicy::Always, LookupPolicy::Never] {
        let replica = replica(lookup);
        assert_eq!(replica.create(&first()).await, Ok(BatchOrigin::Created));
        assert_eq!(replica.create(&first()).await, Ok(BatchOrigin::Found));
        // Another caller hears of it only where a lookup shows that it may.
        let other = create(call(&[], None), Some("x"), 1);
        let expected = match lookup {
            LookupPolicy::Never => BatchOrigin::Created,
            _ => BatchOrigin::Found,
        };
        assert_eq!(replica.create(&other).await, Ok(expected), "{lookup:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_failed_lookup_sends_nothing() {
    let forbidden = || api_error(403, Reason::ApiPermissionDenied, Retry::Never);
    for (create, failures, reason, effect, asked) in [
        (
            first(),
            vec![forbidden()],
            Reason::LookupForbidden,
            Effect::NotApplied,
            "GET",
        ),
        (
            retry(),
            vec![forbidden()],
            Reason::LookupUnsettled,
            Effect::Unknown,
            "GET",
        ),
        (
            first(),
            vec![lookup_lost(), lookup_lost(), lookup_lost()],
            Reason::LookupFailed,
            Effect::NotApplied,
            "GET GET GET",
        ),
    ] {
        let replica = replica(LookupPolicy::Always);
        replica.lookups(failures);
        let result = replica
            .creator
            .create_or_find(&create, SendState::default());
        let failure = result.await.expect_err("a failure");
        assert_eq!((failure.reason(), failure.effect), (reason, effect));
        assert_eq!(replica.api.asked(), asked);
    }
}

#[tokio::test(start_paused = true)]
async fn a_retry_outlasts_an_outage_of_catalog() {
    let replica = replica(LookupPolicy::Always);
    replica.lookups((0..3).map(|_| lookup_lost()));
    replica.shows(batch("by the first", "d"), Duration::ZERO);
    let create = retry();
    let waits = replica.create(&create);
    let others_succeed = async {
        loop {
            sleep(SECOND).await;
            replica.creator.state.recent_successes.deposit();
        }
    };
    let result = tokio::select! {
        result = waits => result,
        () = others_succeed => Err(Reason::GatewayFailed),
    };
    assert_eq!(result, Ok(BatchOrigin::Found));
    // An API that is down is not asked again and again.
    let silent = self::replica(LookupPolicy::Always);
    silent.lookups((0..1000).map(|_| lookup_lost()));
    let unsettled = silent.create(&retry()).await;
    assert_eq!(unsettled, Err(Reason::LookupUnsettled));
    let lookups = silent.api.asked().matches("GET").count();
    assert!(lookups < 6, "{lookups}");
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_call_sends_nothing() {
    let (replica, state) = (replica(LookupPolicy::Always), SendState::default());
    assert!(state.cancel());
    let result = replica.creator.create_or_find(&first(), state).await;
    let reason = result.expect_err("cancelled").reason();
    assert_eq!(reason, Reason::DeadlineBeforeSending);
    assert_eq!(replica.api.asked(), "GET");
}

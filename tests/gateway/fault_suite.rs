//! Many creates against an upstream that misbehaves in 40 % of them, by
//! clients that retry UNAVAILABLE: no duplicate, no false answer.
//!
//! `FAULT_SUITE_CREATES` and `FAULT_SUITE_SEED` say how many creates in all,
//! and which faults; docs/faults.md has the figures of a long run.

#![expect(clippy::print_stdout, reason = "the table is for people")]

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use aep_batch_gateway::{
    proto::v1::{
        CreateBatchRequest, CreateBatchResponse, TagValues,
        batch_service_client::BatchServiceClient,
    },
    simulator::{Fault, Simulator, SimulatorOptions},
};
use tokio::sync::Semaphore;
use tonic::{Code, Status, transport::Channel};
use tonic_types::StatusExt;

use crate::support::{CREDENTIALS, Gateway, TlsFront, certificate, request, simulator_with};

const FAULTS: [&str; 24] = [
    "status-400",
    "status-401",
    "status-429",
    "status-500",
    "status-503",
    "proxy-408",
    "proxy-502",
    "proxy-503",
    "proxy-504",
    "lost-502",
    "lost-503",
    "lost-504",
    "reset-before-create",
    "reset-after-create",
    "close-before-create",
    "close-after-create",
    "silence-before-create",
    "silence-after-create",
    "half-answer",
    "empty-answer",
    "html-answer",
    "no-id-answer",
    "refused-stream",
    "stale",
];

/// How a client makes its calls, and the gateway its requests.
struct Way {
    name: &'static str,
    flags: &'static [&'static str],
    tls: Option<&'static str>,
    proxy: bool,
    /// Calls at a time. Few over HTTP/2: a reset hits all that share the connection.
    at_a_time: usize,
}

const WAYS: [Way; 5] = [
    Way {
        name: "HTTP/1.1",
        flags: &[],
        tls: None,
        proxy: false,
        at_a_time: 100,
    },
    Way {
        name: "HTTP/2",
        flags: &["--upstream-http=2"],
        tls: None,
        proxy: false,
        at_a_time: 5,
    },
    Way {
        name: "HTTP/1.1, TLS",
        flags: &[],
        tls: Some("http/1.1"),
        proxy: false,
        at_a_time: 100,
    },
    Way {
        name: "HTTP/2, TLS",
        flags: &[],
        tls: Some("h2"),
        proxy: false,
        at_a_time: 5,
    },
    Way {
        name: "HTTP/1.1, proxy",
        flags: &[],
        tls: None,
        proxy: true,
        at_a_time: 100,
    },
];

fn setting(name: &str, default: u64) -> u64 {
    let set = std::env::var(name).ok();
    set.map_or(default, |set| set.parse().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_duplicate_and_no_false_answer_under_faults() {
    let creates = setting("FAULT_SUITE_CREATES", 1500);
    let seed = setting("FAULT_SUITE_SEED", 1);
    let each = creates.div_ceil(2 * WAYS.len() as u64);
    println!("{} creates, seed {seed}", each * 2 * WAYS.len() as u64);
    println!(
        "{:16} {:12} {:>6} {:>6} {:>12} {:>8} {:>8} {:>9} {:>10} {:>8} {:>5} {:>9} {:>7}",
        "upstream",
        "external_id",
        "calls",
        "OK",
        "not created",
        "unknown",
        "created",
        "deadline",
        "duplicates",
        "false OK",
        "wrong",
        "unsettled",
        "seconds"
    );
    let mut bad = 0;
    for way in &WAYS {
        for with_id in [false, true] {
            bad += run(way, with_id, each, seed).await;
        }
    }
    assert_eq!(bad, 0, "see the table");
}

/// Makes calls and compares what was told with the ledger; the number of lies.
async fn run(way: &Way, with_id: bool, calls: u64, seed: u64) -> u64 {
    let begin = Instant::now();
    let upstream = simulator_with(SimulatorOptions {
        faults: FAULTS
            .iter()
            .map(|name| name.parse::<Fault>().unwrap())
            .collect(),
        share: 0.4,
        seed,
        catalog_lag: Duration::from_millis(100),
        ..Default::default()
    })
    .await;
    let gateway = gateway(way, &upstream).await;
    let channels: Vec<_> = (0..4).map(|_| gateway.channel()).collect();
    let at_a_time = Arc::new(Semaphore::new(way.at_a_time));
    let mut tasks = Vec::new();
    for number in 0..calls {
        let permit = at_a_time.clone().acquire_owned().await.unwrap();
        let channel = channels[number as usize % channels.len()].clone();
        tasks.push(tokio::spawn(async move {
            let result = call(channel, number, with_id).await;
            drop(permit);
            result
        }));
    }
    let mut told = Vec::new();
    for task in tasks {
        told.push(task.await.unwrap());
    }

    let mut ledger: HashMap<String, Vec<String>> = HashMap::new();
    for batch in upstream.batches() {
        let call = batch["tags"]["call"][0].as_str().unwrap().to_owned();
        let id = batch["id"].as_str().unwrap().to_owned();
        ledger.entry(call).or_default().push(id);
    }
    let mut count: BTreeMap<&str, u64> = BTreeMap::new();
    let (mut duplicates, mut false_ok, mut wrong, mut unsettled) = (0, 0, 0, 0);
    for (number, result) in told.iter().enumerate() {
        let made = ledger
            .get(&number.to_string())
            .map_or(&[][..], Vec::as_slice);
        duplicates += u64::from(made.len() > 1);
        match result {
            Ok(answer) => {
                *count.entry("OK").or_default() += 1;
                let id = &answer.batch.as_ref().unwrap().id;
                false_ok += u64::from(!made.contains(id));
            }
            Err(status) => {
                let info = status.get_details_error_info();
                let outcome = info.map_or("none".to_owned(), |i| i.metadata["outcome"].clone());
                wrong += u64::from(match outcome.as_str() {
                    "NOT_CREATED" => !made.is_empty(),
                    "UNKNOWN" => status.code() == Code::Unavailable,
                    "CREATED" => made.is_empty(),
                    _ => true,
                });
                let name = match (status.code(), outcome.as_str()) {
                    (Code::DeadlineExceeded, _) => "deadline",
                    (_, "NOT_CREATED") => "not created",
                    (_, "CREATED") => "created",
                    _ => "unknown",
                };
                *count.entry(name).or_default() += 1;
                // Catalog shows it within the deadline, so it could be settled.
                unsettled += u64::from(with_id && !made.is_empty());
            }
        }
    }
    let column = |name| count.get(name).copied().unwrap_or_default();
    println!(
        "{:16} {:12} {:>6} {:>6} {:>12} {:>8} {:>8} {:>9} {:>10} {:>8} {:>5} {:>9} {:>7.1}",
        way.name,
        with_id,
        calls,
        column("OK"),
        column("not created"),
        column("unknown"),
        column("created"),
        column("deadline"),
        duplicates,
        false_ok,
        wrong,
        unsettled,
        begin.elapsed().as_secs_f64()
    );
    // A reset of an HTTP/2 connection hits all of its calls, but not all calls.
    assert!(
        column("OK") > calls / 5,
        "too few succeed to prove anything"
    );
    duplicates + false_ok + wrong + unsettled
}

async fn gateway(way: &Way, upstream: &Simulator) -> Gateway {
    let flags = [&["--request-timeout=1s", "--log-level=error"], way.flags].concat();
    if way.proxy {
        // The simulator takes the requests that a proxy would get.
        let mut arguments = vec![
            "serve",
            "--listen=127.0.0.1:0",
            "--admin-listen=127.0.0.1:0",
            "--upstream-url=http://api.invalid/data/foundation/import",
            "--catalog-url=http://api.invalid/data/foundation/catalog",
        ];
        arguments.extend(&flags);
        let mut command = Gateway::command(&arguments);
        command.env("HTTP_PROXY", format!("http://{}", upstream.address()));
        return Gateway::spawn(command).await;
    }
    let Some(alpn) = way.tls else {
        return Gateway::before(upstream, &flags).await;
    };
    let (config, ca) = certificate(&format!("fault_suite_{}.pem", alpn.replace('/', "_")));
    let front = TlsFront::start(config, &[alpn], upstream.address()).await;
    let ca = format!("--upstream-ca-file={}", ca.display());
    let catalog = front.url().replace("/import", "/catalog");
    let catalog = format!("--catalog-url={catalog}");
    let flags = [&[ca.as_str(), catalog.as_str()], flags.as_slice()].concat();
    Gateway::start(&front.url(), &flags).await
}

/// One call, as a gRPC client with a retry policy for UNAVAILABLE makes it.
async fn call(channel: Channel, number: u64, with_id: bool) -> Result<CreateBatchResponse, Status> {
    let call = number.to_string();
    let message = CreateBatchRequest {
        external_id: with_id.then(|| format!("external-{call}")),
        tags: [("call".to_owned(), TagValues { values: vec![call] })].into(),
        ..request()
    };
    let mut client = BatchServiceClient::new(channel);
    for attempt in 0..3 {
        let mut request = tonic::Request::new(message.clone());
        let metadata = request.metadata_mut();
        for (name, value) in CREDENTIALS {
            metadata.insert(name, value.parse().unwrap());
        }
        metadata.insert("grpc-timeout", "10S".parse().unwrap());
        if attempt > 0 {
            metadata.insert("grpc-previous-rpc-attempts", attempt.into());
        }
        match client.create_batch(request).await {
            Ok(answer) => return Ok(answer.into_inner()),
            Err(status) if status.code() == Code::Unavailable && attempt < 2 => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(status) => return Err(status),
        }
    }
    unreachable!("the last attempt returns")
}

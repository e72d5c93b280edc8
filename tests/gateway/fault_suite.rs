//! Many creates against an upstream that misbehaves in 40 % of them, by
//! clients that retry UNAVAILABLE, also behind a mesh that retries: no
//! duplicate, no false answer.
//!
//! `FAULT_SUITE_CREATES` and `FAULT_SUITE_SEED` say how many creates each way,
//! and which faults; docs/faults.md has the figures of a long run.

#![expect(clippy::print_stdout, reason = "the table is for people")]

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use aep_batch_gateway::proto::v1::{CreateBatchRequest, CreateBatchResponse, TagValues};
use aep_simulator::{Fault, Injection, Operation, Simulator, SimulatorOptions};
use prost::Message;
use tokio::{net::TcpStream, sync::Semaphore};
use tonic::Code;

use crate::support::{
    CREATE, CREDENTIALS, Client, Gateway, RawAnswer, TlsFront, certificate, frame, request,
    simulator_with,
};

/// What the API itself and the connections do wrong.
const OWN_FAULTS: [&str; 34] = [
    "status-400",
    "status-401",
    "status-403",
    "status-429",
    "status-500",
    "status-503",
    "gzip-503",
    "bom-403",
    "latin1-403",
    "surrogate-403",
    "overflow-403",
    "proxy-408",
    "proxy-502",
    "proxy-503",
    "proxy-504",
    "lost-408",
    "lost-502",
    "lost-503",
    "lost-504",
    "reset-before",
    "reset-after",
    "close-before",
    "close-after",
    "timeout-before",
    "timeout-after",
    "half-response",
    "unfinished-response",
    "gzip-response",
    "many-headers-response",
    "empty-response",
    "html-response",
    "no-id-response",
    "refused-stream",
    "stale",
];

/// These, and everybody in between: each about half of the faults.
fn faults() -> Vec<Fault> {
    let between = Fault::names(Operation::Create).filter_map(|name| name.parse().ok());
    let between: Vec<_> = between
        .filter(|fault| matches!(fault, Fault::Intermediary(..)))
        .collect();
    let own = OWN_FAULTS.map(|name| name.parse().unwrap());
    let times = between.len() / own.len();
    own.iter()
        .cycle()
        .take(times * own.len())
        .cloned()
        .chain(between)
        .collect()
}

/// How a client makes its calls, and the gateway its requests.
struct Way {
    name: &'static str,
    flags: &'static [&'static str],
    tls: Option<&'static str>,
    proxy: bool,
    /// Calls at a time. Few over HTTP/2: a reset hits all that share the connection.
    at_a_time: usize,
}

/// What a lost answer can be settled by.
#[derive(Clone, Copy, PartialEq)]
enum Key {
    None,
    /// The caller's external id.
    External,
    /// The gateway's own external id.
    Generated,
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
    let each = setting("FAULT_SUITE_CREATES", 50);
    let seed = setting("FAULT_SUITE_SEED", 1);
    println!("{each} creates each way, seed {seed}");
    println!(
        "{:16} {:9} {:>8} {:>6} {:>6} {:>12} {:>8} {:>8} {:>9} {:>10} {:>8} {:>5} {:>9} {:>7}",
        "upstream",
        "key",
        "replicas",
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
    // They mostly wait. A long run shall not make a gateway late by too much load.
    let lanes = Arc::new(Semaphore::new(if each > 100 { 3 } else { 6 }));
    let mut runs = Vec::new();
    for way in &WAYS {
        for key in [Key::None, Key::External, Key::Generated] {
            for replicas in [1, 2] {
                // Other faults each way, though the calls are alike.
                let seed = 1000 * seed + runs.len() as u64;
                let lanes = lanes.clone();
                runs.push(tokio::spawn(async move {
                    let _permit = lanes.acquire().await.unwrap();
                    run(way, key, replicas, each, seed).await
                }));
            }
        }
    }
    let mut bad = 0;
    for run in runs {
        let (row, lies) = run.await.unwrap();
        println!("{row}");
        bad += lies;
    }
    assert_eq!(bad, 0, "see the table");
}

/// Makes calls and compares what was told with the ledger; a row of the table,
/// and the number of lies.
async fn run(way: &Way, key: Key, replicas: usize, calls: u64, seed: u64) -> (String, u64) {
    let begin = Instant::now();
    let upstream = simulator_with(SimulatorOptions {
        faults: faults().into_iter().map(Injection::from).collect(),
        share: 0.4,
        seed,
        catalog_lag: Duration::from_millis(100),
        ..Default::default()
    })
    .await;
    let mut gateways = Vec::new();
    for _ in 0..replicas {
        let gateway = gateway(way, key, &upstream, seed).await;
        fill_the_retry_budget(&gateway, &upstream).await;
        gateways.push(gateway);
    }
    let mut connections = Vec::new();
    for number in 0..4 {
        let address = &gateways[number % replicas].listen;
        let stream = TcpStream::connect(address).await.unwrap();
        connections.push(Client::over(stream).await.unwrap());
    }
    let at_a_time = Arc::new(Semaphore::new(way.at_a_time));
    let mut tasks = Vec::new();
    for number in 0..calls {
        let permit = at_a_time.clone().acquire_owned().await.unwrap();
        // The mesh tries the replicas in turn.
        connections.rotate_left(1);
        let connections = connections.clone();
        let mesh = replicas > 1;
        tasks.push(tokio::spawn(async move {
            let result = call(connections, mesh, number, key).await;
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
        if let Some(call) = batch["tags"]["call"][0].as_str() {
            let id = batch["id"].as_str().unwrap().to_owned();
            ledger.entry(call.to_owned()).or_default().push(id);
        }
    }
    let mut count: BTreeMap<&str, u64> = BTreeMap::new();
    let (mut duplicates, mut false_ok, mut wrong, mut unsettled) = (0, 0, 0, 0);
    for (number, answer) in told.iter().enumerate() {
        let made = ledger
            .get(&number.to_string())
            .map_or(&[][..], Vec::as_slice);
        duplicates += u64::from(made.len() > 1);
        if answer.code() == Code::Ok {
            *count.entry("OK").or_default() += 1;
            let message = CreateBatchResponse::decode(&answer.message[5..]).unwrap();
            false_ok += u64::from(!made.contains(&message.batch.unwrap().id));
            continue;
        }
        wrong += u64::from(match answer.outcome() {
            "NOT_APPLIED" => !made.is_empty(),
            "UNKNOWN" => may_be_retried(answer),
            "APPLIED" => made.is_empty() || may_be_retried(answer),
            _ => true,
        });
        let name = match (answer.code(), answer.outcome()) {
            (Code::DeadlineExceeded, _) => "deadline",
            (_, "NOT_APPLIED") => "not created",
            (_, "APPLIED") => "created",
            _ => "unknown",
        };
        *count.entry(name).or_default() += 1;
        // Catalog shows it within the deadline, so it could be settled.
        unsettled += u64::from(key != Key::None && !made.is_empty());
    }
    let column = |name| count.get(name).copied().unwrap_or_default();
    let row = format!(
        "{:16} {:9} {:>8} {:>6} {:>6} {:>12} {:>8} {:>8} {:>9} {:>10} {:>8} {:>5} {:>9} {:>7.1}",
        way.name,
        match key {
            Key::None => "none",
            Key::External => "external",
            Key::Generated => "generated",
        },
        replicas,
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
    (row, duplicates + false_ok + wrong + unsettled)
}

/// 20 good calls, so that the gateway may repeat requests.
async fn fill_the_retry_budget(gateway: &Gateway, upstream: &Simulator) {
    for _ in 0..20 {
        upstream.inject(Fault::Delay(Duration::ZERO));
        gateway.create(request()).await.unwrap();
    }
}

async fn gateway(way: &Way, key: Key, upstream: &Simulator, seed: u64) -> Gateway {
    let mut flags = [&["--request-timeout=2s", "--log-level=error"], way.flags].concat();
    if key == Key::Generated {
        flags.push("--generate-external-ids");
    }
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
    let (config, ca) = certificate(&format!("fault_suite_{seed}.pem"));
    let front = TlsFront::start(config, &[alpn], upstream.address()).await;
    let ca = format!("--upstream-ca-file={}", ca.display());
    let catalog = front.url().replace("/import", "/catalog");
    let catalog = format!("--catalog-url={catalog}");
    let flags = [&[ca.as_str(), catalog.as_str()], flags.as_slice()].concat();
    Gateway::start(&front.url(), &flags).await
}

/// Whether a client or a mesh would send the call again (gRFC A6; Istio's
/// default retries).
fn may_be_retried(answer: &RawAnswer) -> bool {
    answer.trailers_only && matches!(answer.code(), Code::Unavailable | Code::Cancelled)
}

/// One call, as a gRPC client with a retry policy for UNAVAILABLE makes it, at
/// the first of the connections, or through a mesh.
async fn call(mut connections: Vec<Client>, mesh: bool, number: u64, key: Key) -> RawAnswer {
    let call = number.to_string();
    let message = frame(&CreateBatchRequest {
        external_id: (key == Key::External).then(|| format!("external-{call}")),
        tags: [("call".to_owned(), TagValues { values: vec![call] })].into(),
        ..request()
    });
    let mut attempt = 0;
    loop {
        let attempts = attempt.to_string();
        let mut metadata = [&CREDENTIALS[..], &[("grpc-timeout", "10S")]].concat();
        if attempt > 0 {
            metadata.push(("grpc-previous-rpc-attempts", &attempts));
        }
        let answer = match mesh {
            true => through_a_mesh(&mut connections, &metadata, &message).await,
            false => connections[0]
                .call(CREATE, &metadata, &message)
                .await
                .unwrap(),
        };
        if !may_be_retried(&answer) || attempt == 2 {
            return answer;
        }
        attempt += 1;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Istio's defaults: twice again, each time at another replica, with the same
/// request id.
async fn through_a_mesh(
    connections: &mut [Client],
    metadata: &[(&str, &str)],
    message: &[u8],
) -> RawAnswer {
    let request_id = uuid::Uuid::from_u128(fastrand::u128(..)).to_string();
    for attempt in 1.. {
        let count = attempt.to_string();
        let marks = [
            ("x-request-id", &*request_id),
            ("x-envoy-attempt-count", &count),
        ];
        let metadata = [metadata, &marks].concat();
        let answer = connections[0]
            .call(CREATE, &metadata, message)
            .await
            .unwrap();
        if !may_be_retried(&answer) || attempt == 3 {
            return answer;
        }
        connections.rotate_left(1);
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    unreachable!("the last attempt returns")
}

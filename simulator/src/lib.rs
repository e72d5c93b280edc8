//! The simulated upstream: the documented REST API in memory, with a ledger
//! of what it created, and faults on request. For `demo`, `simulate` and the
//! tests; the gateway itself never uses it.

mod catalog;
mod fault;
mod intermediary;
mod ledger;
mod response;
mod rest;
mod wire;

use std::{
    collections::{HashMap, VecDeque},
    hash::{DefaultHasher, Hash, Hasher},
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use http::HeaderMap;
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use serde_json::Value;
use tokio::{net::TcpListener, task::JoinHandle};

use self::ledger::Ledger;
use self::wire::{Connection, FaultyStream};
pub use self::{
    fault::{Fault, Garbling, Injection, Operation},
    intermediary::Intermediary,
};

/// How many requests and batches are remembered.
const REMEMBERED: usize = 100_000;

/// What a simulator does by itself.
#[derive(Clone, Debug, Default)]
pub struct SimulatorOptions {
    /// The faults of which each request may meet one of its operation's.
    pub faults: Vec<Injection>,
    /// The share of these requests that meet one, 0 to 1.
    pub share: f64,
    /// Makes the faults the same in every run: which fault a request meets
    /// follows from the seed, its content and how often that came before.
    pub seed: u64,
    /// How long each create takes.
    pub latency: Duration,
    /// How long it takes until Catalog shows a new batch.
    pub catalog_lag: Duration,
}

/// A request as it arrived.
#[derive(Clone, Debug)]
pub struct Received {
    /// The method.
    pub method: http::Method,
    /// Path and query.
    pub path: String,
    /// The headers, credentials included.
    pub headers: HeaderMap,
    /// The body.
    pub body: bytes::Bytes,
}

/// A running simulator. Stops when it is dropped.
#[derive(Debug)]
pub struct Simulator {
    address: SocketAddr,
    state: Arc<State>,
    accepting: JoinHandle<()>,
}

#[derive(Debug)]
struct State {
    address: SocketAddr,
    options: SimulatorOptions,
    memory: Mutex<Memory>,
}

#[derive(Debug)]
struct Memory {
    /// How often a request came, by the hash of its content.
    seen: HashMap<u64, u32>,
    next_faults: VecDeque<Injection>,
    received: VecDeque<Received>,
    ledger: Ledger,
}

impl State {
    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The fault for a request of an operation with this content.
    fn next_fault(&self, operation: Operation, content: &[u8]) -> Option<Fault> {
        let memory = &mut *self.memory();
        let mut next = memory.next_faults.iter();
        if let Some(index) = next.position(|next| next.operation == operation) {
            return memory.next_faults.remove(index).map(|next| next.fault);
        }
        let faults = self.options.faults.iter();
        let faults = faults.filter(|fault| fault.operation == operation);
        let faults: Vec<_> = faults.map(|injection| &injection.fault).collect();
        if faults.is_empty() {
            return None;
        }
        if memory.seen.len() == REMEMBERED {
            memory.seen.clear();
        }
        let mut hasher = DefaultHasher::new();
        content.hash(&mut hasher);
        let times = memory.seen.entry(hasher.finish()).or_default();
        *times += 1;
        (self.options.seed, times).hash(&mut hasher);
        let mut random = fastrand::Rng::with_seed(hasher.finish());
        match random.f64() < self.options.share {
            true => random.choice(faults).cloned(),
            false => None,
        }
    }
}

impl Memory {
    /// Whether the connection that has just begun is to be reset.
    fn resets_connection(&mut self) -> bool {
        let next = self.next_faults.front();
        let resets = next.is_some_and(|next| next.fault == Fault::ResetBeforeRead);
        if resets {
            self.next_faults.pop_front();
        }
        resets
    }
}

fn new_id() -> uuid::Uuid {
    uuid::Builder::from_random_bytes(fastrand::u128(..).to_ne_bytes()).into_uuid()
}

fn remember<T>(memory: &mut VecDeque<T>, item: T) {
    if memory.len() == REMEMBERED {
        memory.pop_front();
    }
    memory.push_back(item);
}

impl Simulator {
    /// Listens on `address` (port 0: any free port) and serves requests from now on.
    pub async fn start(address: SocketAddr, options: SimulatorOptions) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let state = Arc::new(State {
            address,
            memory: Mutex::new(Memory {
                seen: HashMap::new(),
                next_faults: VecDeque::new(),
                received: VecDeque::new(),
                ledger: Ledger::default(),
            }),
            options,
        });
        let accepting = tokio::spawn(accept(listener, state.clone()));
        Ok(Simulator {
            address,
            state,
            accepting,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The base URL of the Batch Ingestion API.
    pub fn import_url(&self) -> String {
        format!("http://{}{}", self.address, rest::IMPORT)
    }

    /// The base URL of the Catalog API.
    pub fn catalog_url(&self) -> String {
        format!("http://{}{}", self.address, rest::CATALOG)
    }

    /// The operation's next request meets this fault, after those that wait
    /// already.
    pub fn inject(&self, fault: impl Into<Injection>) {
        self.state.memory().next_faults.push_back(fault.into());
    }

    /// Changes a batch, as a JSON merge patch says (RFC 7396).
    pub fn patch(&self, id: &str, changes: &Value) {
        self.state.memory().ledger.patch(id, changes);
    }

    /// Every request so far.
    pub fn received(&self) -> Vec<Received> {
        self.state.memory().received.iter().cloned().collect()
    }

    /// Every batch that was created, as the API would show it.
    pub fn batches(&self) -> Vec<Value> {
        self.state.memory().ledger.all().cloned().collect()
    }
}

impl Drop for Simulator {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn accept(listener: TcpListener, state: Arc<State>) {
    let mut connections = tokio::task::JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        let connection = Connection::default();
        if state.memory().resets_connection() {
            wire::reset(stream);
            continue;
        }
        let _ = stream.set_nodelay(true);
        let stream = TokioIo::new(FaultyStream::new(stream, connection.clone()));
        let state = state.clone();
        connections.spawn(async move {
            let service = hyper::service::service_fn(move |request| {
                rest::handle(state.clone(), connection.clone(), request)
            });
            // A connection that ends badly is what the faults are for.
            let _ = auto::Builder::new(TokioExecutor::new())
                .serve_connection(stream, service)
                .await;
        });
    }
}

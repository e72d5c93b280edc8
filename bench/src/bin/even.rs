//! Calls that come evenly, each connection's turn after the other's. h2load's own
//! `--rps` makes them in bunches: of 20 on one connection, of all at once on 1,000.
//!
//! `even URL CONNECTIONS CALLS_PER_SECOND WARM_UP_MS MS MESSAGE_FILE NAME:VALUE…`
//! prints `open` when all connections are, and at the end
//! `{"calls":…,"failed":…,"bytes":…,"latencies_us":[…]}`: all calls, those that failed,
//! the messages' bytes, and the latencies, from when a call should have begun, of those
//! after the warm-up.

use std::{
    cell::RefCell,
    env,
    error::Error,
    fs,
    rc::Rc,
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, Method, Request, Uri};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde::Serialize;
use tokio::{net::TcpStream, sync::mpsc, task::LocalSet};

type AnyError = Box<dyn Error>;
type Connection = SendRequest<Full<Bytes>>;

#[derive(Default, Serialize)]
struct Seen {
    calls: u64,
    failed: u64,
    bytes: usize,
    latencies_us: Vec<u128>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), AnyError> {
    let arguments: Vec<_> = env::args().skip(1).collect();
    let [
        url,
        connections,
        rate,
        warm_up,
        measured,
        message,
        headers @ ..,
    ] = &arguments[..]
    else {
        return Err("see the source for the arguments".into());
    };
    let url: Uri = url.parse()?;
    let message = Bytes::from(fs::read(message)?);
    let headers = headers_of(headers)?;
    let gap = Duration::from_secs(1) / rate.parse()?;
    let warm_up = Duration::from_millis(warm_up.parse()?);
    let end = warm_up + Duration::from_millis(measured.parse()?);

    let mut open = Vec::new();
    for _ in 0..connections.parse()? {
        open.push(connect(&url).await?);
    }
    println!("open");
    let seen = Rc::new(RefCell::new(Seen::default()));
    let tasks = LocalSet::new();
    let (due, mut calls) = mpsc::unbounded_channel();
    let began = Instant::now();
    // A thread of its own: tokio's timers know whole milliseconds only.
    thread::spawn(move || {
        let mut at = Duration::ZERO;
        while at < end {
            thread::sleep((began + at).saturating_duration_since(Instant::now()));
            if due.send(at).is_err() {
                return;
            }
            at += gap;
        }
    });
    let turns = (0..open.len()).cycle();
    let making = async {
        for turn in turns {
            let Some(at) = calls.recv().await else { return };
            let mut request = Request::new(Full::new(message.clone()));
            *request.method_mut() = Method::POST;
            *request.uri_mut() = url.clone();
            *request.headers_mut() = headers.clone();
            let (connection, seen) = (open[turn].clone(), seen.clone());
            tokio::task::spawn_local(async move {
                let answer = call(connection, request).await;
                let mut seen = seen.borrow_mut();
                seen.calls += 1;
                match answer {
                    Ok(bytes) => seen.bytes += bytes,
                    Err(_) => seen.failed += 1,
                }
                if at >= warm_up {
                    let latency = began.elapsed().saturating_sub(at);
                    seen.latencies_us.push(latency.as_micros());
                }
            });
        }
    };
    tasks.run_until(making).await;
    tasks.await; // the last answers
    println!("{}", serde_json::to_string(&*seen.borrow())?);
    Ok(())
}

fn headers_of(arguments: &[String]) -> Result<HeaderMap, AnyError> {
    let mut headers = HeaderMap::new();
    for argument in arguments {
        let (name, value) = argument.split_once(':').ok_or("NAME:VALUE")?;
        headers.insert(name.parse::<HeaderName>()?, value.trim().parse()?);
    }
    Ok(headers)
}

async fn connect(url: &Uri) -> Result<Connection, AnyError> {
    let address = url.authority().ok_or("a URL with a host")?.as_str();
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let (sender, connection) = handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    Ok(sender)
}

/// How long the message is that came, if the call's status is OK.
async fn call(
    mut connection: Connection,
    request: Request<Full<Bytes>>,
) -> Result<usize, AnyError> {
    let answer = connection.send_request(request).await?.into_body();
    let answer = answer.collect().await?;
    let status = answer.trailers().and_then(|t| t.get("grpc-status"));
    match status.is_some_and(|status| status == "0") {
        true => Ok(answer.to_bytes().len()),
        false => Err("another status".into()),
    }
}

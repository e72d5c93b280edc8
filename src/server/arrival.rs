//! Receives a call's request message, within bounds.
//!
//! Any client that can connect can begin calls and never end them, without credentials. So calls
//! whose message has not arrived completely are bounded in time, in number, and in bytes over all
//! connections, and the rest of a call that is known to be invalid is not read. Nearly all
//! messages are small and arrive together with their metadata; these never wait.

use std::{future::poll_fn, io::Read, pin::pin, sync::Arc, task::Poll, time::Duration};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use flate2::read::GzDecoder;
use http::{HeaderMap, request::Parts};
use http_body_util::{BodyExt, Full};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout_at},
};
use tonic::{Code, body::Body};

use crate::failure::{Failure, Kind, NotSent, Reason};

/// The largest request message, in bytes.
pub(super) const MAX_MESSAGE: usize = 256 * 1024;

/// How long a message may take to arrive.
const ARRIVAL_TIMEOUT: Duration = Duration::from_secs(10);

/// How many calls may use [`ARRIVAL_TIMEOUT`]. All others get [`SHORT_TIMEOUT`], so that clients
/// that never finish their calls leave room for others.
const MAX_SLOW_CALLS: usize = 2048;

const SHORT_TIMEOUT: Duration = Duration::from_secs(1);

/// The least limit on open calls. It is higher if more creates may be in flight, since several
/// callers can share one create.
const MIN_CALL_LIMIT: usize = 4096;

/// Bytes of each call that are not counted: metadata and message of an ordinary call.
const EXEMPT: usize = 16 * 1024;

/// The limit on counted bytes of all calls. A compressed message counts twice: compressed and
/// decompressed.
const MAX_BYTES: usize = 60 * 1024 * 1024;

/// Memory that metadata takes per byte of it, measured.
const METADATA_FACTOR: usize = 3;

/// gRPC's prefix of a message: the compressed flag and the length.
const PREFIX: usize = 5;

/// The limits that the calls of all connections share.
#[derive(Clone, Debug)]
pub(super) struct Bounds {
    calls: Arc<Semaphore>,
    others: Arc<Semaphore>,
    arriving: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
}

impl Bounds {
    /// Limits for this many creates in flight and connections.
    pub(super) fn new(max_in_flight: usize, max_connections: usize) -> Self {
        let max_calls = MIN_CALL_LIMIT.max(max_in_flight.saturating_mul(2));
        let semaphore =
            |permits: usize| Arc::new(Semaphore::new(permits.min(Semaphore::MAX_PERMITS)));
        Bounds {
            calls: semaphore(max_calls),
            others: semaphore(max_connections),
            arriving: semaphore(MAX_SLOW_CALLS),
            bytes: semaphore(MAX_BYTES),
        }
    }

    /// Admits a call of `BatchService` with this metadata.
    pub(super) fn open(&self, metadata: &HeaderMap) -> Result<Open, Failure> {
        self.open_as(&self.calls, metadata)
    }

    /// Admits a call of health or reflection. These may last long, about one per connection.
    pub(super) fn open_other(&self, metadata: &HeaderMap) -> Result<Open, Failure> {
        self.open_as(&self.others, metadata)
    }

    fn open_as(&self, kind: &Arc<Semaphore>, metadata: &HeaderMap) -> Result<Open, Failure> {
        let fields = metadata.iter();
        let size = fields.map(|(name, value)| name.as_str().len() + value.len());
        let mut open = Open {
            _call: take(kind, 1)?,
            bounds: self.clone(),
            size: METADATA_FACTOR * size.sum::<usize>(),
            held: None,
        };
        open.grow(0)?;
        Ok(open)
    }
}

fn take(of: &Arc<Semaphore>, permits: usize) -> Result<OwnedSemaphorePermit, Failure> {
    let permits = u32::try_from(permits).ok();
    let taken = permits.and_then(|permits| of.clone().try_acquire_many_owned(permits).ok());
    taken.ok_or_else(|| Failure::transient(Kind::NotSent(NotSent::Overloaded)))
}

/// A call's share of the limits, until this is dropped.
#[derive(Debug)]
pub(super) struct Open {
    _call: OwnedSemaphorePermit,
    bounds: Bounds,
    size: usize,
    held: Option<OwnedSemaphorePermit>,
}

impl Open {
    /// Counts this many more bytes.
    fn grow(&mut self, bytes: usize) -> Result<(), Failure> {
        self.size += bytes;
        let held = self
            .held
            .as_ref()
            .map_or(0, OwnedSemaphorePermit::num_permits);
        let more = self.size.saturating_sub(EXEMPT + held);
        if more > 0 {
            let more = take(&self.bounds.bytes, more)?;
            match &mut self.held {
                Some(held) => held.merge(more),
                held => *held = Some(more),
            }
        }
        Ok(())
    }
}

/// Why a call is refused before its service sees it.
#[derive(Debug)]
pub(super) enum Refusal {
    Failed(Failure),
    /// The client has gone.
    Gone,
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Self {
        Refusal::Failed(failure)
    }
}

/// Receives the only message of a call, and the end of the request. If these have not arrived
/// yet, `check` runs first and may refuse the call. `received` gets the number of bytes
/// as they arrive.
pub(super) async fn message(
    body: Body,
    head: &Parts,
    open: &mut Open,
    (begin, deadline): (Instant, Option<Instant>),
    received: impl Fn(usize),
    check: impl FnOnce() -> Result<(), Failure>,
) -> Result<Full<Bytes>, Refusal> {
    let arriving = open.bounds.arriving.clone();
    let mut whole = pin!(whole(body, &head.headers, open, received));
    let at_once = poll_fn(|context| Poll::Ready(whole.as_mut().poll(context)));
    if let Poll::Ready(message) = at_once.await {
        return message;
    }
    check().map_err(Refusal::Failed)?;
    let arriving = take(&arriving, 1);
    let longest = begin + arriving.as_ref().map_or(SHORT_TIMEOUT, |_| ARRIVAL_TIMEOUT);
    let until = deadline.unwrap_or(longest).min(longest);
    match timeout_at(until, whole).await {
        Ok(message) => message,
        Err(_) if until < longest => {
            let failure = Failure::refused(Kind::DeadlineBeforeSending);
            Err(Refusal::Failed(failure))
        }
        Err(_) => Err(arriving.err().map(Refusal::Failed).unwrap_or_else(|| {
            refused(
                Reason::MessageTimeout,
                "The message did not arrive within 10 s",
            )
        })),
    }
}

async fn whole(
    mut body: Body,
    metadata: &HeaderMap,
    open: &mut Open,
    received: impl Fn(usize),
) -> Result<Full<Bytes>, Refusal> {
    let mut bytes = BytesMut::new();
    let mut prefix = None;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| match error.code() {
            Code::Internal => broken("The request's body is malformed"), // such as bad base64
            _ => Refusal::Gone,
        })?;
        let Ok(mut data) = frame.into_data() else {
            continue; // request trailers mean nothing in gRPC
        };
        received(data.remaining());
        let length = match prefix {
            Some(Prefix { length, .. }) => length,
            None => {
                let missing = (PREFIX - bytes.len()).min(data.remaining());
                bytes.put(data.copy_to_bytes(missing));
                let Some(found) = Prefix::of(&bytes, metadata)? else {
                    continue;
                };
                open.grow(found.length)?;
                bytes.reserve(found.length);
                prefix.insert(found).length
            }
        };
        if data.remaining() > PREFIX + length - bytes.len() {
            return Err(not_one(
                "The call has more than one message, or more bytes than the length in its prefix",
            ));
        }
        bytes.put(data);
    }
    match prefix {
        None if bytes.is_empty() => Err(not_one("The call has no message")),
        Some(Prefix { length, .. }) if bytes.len() == PREFIX + length => {
            let compressed = prefix.is_some_and(|prefix| prefix.is_compressed);
            Ok(Full::new(match compressed {
                true => inflate(&bytes[PREFIX..], open)?,
                false => bytes.freeze(),
            }))
        }
        _ => Err(broken(
            "The message is shorter than the length in its prefix",
        )),
    }
}

fn refused(reason: Reason, what: &str) -> Refusal {
    Refusal::Failed(Failure::refused(Kind::RefusedByServer(
        reason,
        what.to_owned(),
    )))
}

fn not_one(what: &str) -> Refusal {
    refused(Reason::NotOneMessage, what)
}

fn broken(what: &str) -> Refusal {
    refused(Reason::InvalidFraming, what)
}

fn too_large() -> Refusal {
    refused(
        Reason::MessageTooLarge,
        "The message is larger than 256 KiB",
    )
}

#[derive(Clone, Copy)]
struct Prefix {
    is_compressed: bool,
    length: usize,
}

impl Prefix {
    fn of(bytes: &[u8], metadata: &HeaderMap) -> Result<Option<Self>, Refusal> {
        let &[flag, a, b, c, d] = bytes else {
            return Ok(None);
        };
        let is_compressed = match flag {
            0 => false,
            1 if encoding(metadata).is_some() => true,
            1 => {
                return Err(broken(
                    "The message is compressed, but the call has no grpc-encoding",
                ));
            }
            _ => {
                return Err(broken(
                    "The compressed flag of the message is neither 0 nor 1",
                ));
            }
        };
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        match length > MAX_MESSAGE {
            true => Err(too_large()),
            false => Ok(Some(Prefix {
                is_compressed,
                length,
            })),
        }
    }
}

/// Whether a call's messages can be read, compressed or not.
pub(super) fn can_read(metadata: &HeaderMap) -> bool {
    encoding(metadata).is_none_or(|encoding| encoding == b"gzip")
}

/// The compression of a call's messages, if any.
fn encoding(metadata: &HeaderMap) -> Option<&[u8]> {
    let encoding = metadata.get("grpc-encoding")?.as_bytes();
    (encoding != b"identity").then_some(encoding)
}

/// The decompressed message, with the prefix of an uncompressed one.
fn inflate(compressed: &[u8], open: &mut Open) -> Result<Bytes, Refusal> {
    let mut message = vec![0; PREFIX];
    let mut plain = GzDecoder::new(compressed).take(MAX_MESSAGE as u64 + 1);
    let length = plain
        .read_to_end(&mut message)
        .map_err(|_| broken("The message cannot be decompressed"))?;
    if length > MAX_MESSAGE {
        return Err(too_large());
    }
    open.grow(length)?;
    message[1..PREFIX].copy_from_slice(&(length as u32).to_be_bytes());
    Ok(message.into())
}

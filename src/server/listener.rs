//! Connections in: TCP or a Unix socket, with or without TLS, each served as
//! HTTP/2 or HTTP/1.1 until it ends or the server drains.

use std::{
    fs, io,
    net::{self, SocketAddr},
    os::unix::{self, fs::FileTypeExt},
    path::Path,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpSocket, TcpStream, UnixListener, UnixSocket, UnixStream},
    sync::Semaphore,
    time::{Instant, sleep, sleep_until},
};
use tokio_rustls::server::TlsStream;
use tokio_util::{either::Either, sync::CancellationToken, task::TaskTracker};
use tracing::field::display;

use super::{
    authority::{Authorities, Refused},
    router::GrpcServices,
    tls::Tls,
    workers::Worker,
    writes::Writes,
};
use crate::{
    certificates::Peer,
    config::Listen,
    telemetry::{Telemetry, Throttle},
};

/// A bound listener.
pub(super) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    /// Binds, and tells where: port 0 has become a real one.
    pub(super) async fn bind(listen: &Listen) -> io::Result<(Self, Listen)> {
        match listen {
            Listen::Tcp(address) => {
                let socket = match address {
                    SocketAddr::V4(_) => TcpSocket::new_v4()?,
                    SocketAddr::V6(_) => TcpSocket::new_v6()?,
                };
                socket.set_reuseaddr(true)?;
                socket.bind(*address)?;
                let listener = socket.listen(BACKLOG)?;
                let address = listener.local_addr()?;
                Ok((Listener::Tcp(listener), Listen::Tcp(address)))
            }
            Listen::Unix(path) => {
                remove_stale(path)?;
                let socket = UnixSocket::new_stream()?;
                socket.bind(path)?;
                let listener = socket.listen(BACKLOG)?;
                Ok((Listener::Unix(listener), Listen::Unix(path.clone())))
            }
        }
    }
}

/// Removes a socket that a process left behind, but not one that is in use.
fn remove_stale(path: &Path) -> io::Result<()> {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
    if is_socket && unix::net::UnixStream::connect(path).is_err() {
        fs::remove_file(path)?;
    }
    Ok(())
}

/// What ends connections.
#[derive(Clone, Default)]
pub(super) struct Stop {
    /// No new connections; those that exist finish their calls.
    pub(super) drain: CancellationToken,
    /// Everything ends now.
    pub(super) kill: CancellationToken,
    /// The connections that exist.
    pub(super) connections: TaskTracker,
}

/// How many connections there may be, and how long each may last.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) connections: usize,
    pub(super) age: Duration,
}

/// A year, to be told from "for ever" by nobody.
const LONGEST_AGE: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// How long a connection may take to agree on TLS, then to begin with HTTP/2, or
/// to send the head of an HTTP/1.1 request.
const OPENING: Duration = Duration::from_secs(10);

/// How long the calls of a connection may go on after GOAWAY. No create takes
/// that long; a Health/Watch would stay for ever.
const LAST_CALLS: Duration = Duration::from_secs(5 * 60);

/// How many connections may wait to be accepted: past that, a client that connects waits a
/// second for its next try. The system may allow fewer (net.core.somaxconn).
const BACKLOG: u32 = 4096;

/// The first bytes of HTTP/2 (RFC 9113, section 3.4).
const PREFACE: usize = 24;

/// All that connections need.
pub(super) struct Server {
    http: auto::Builder<TokioExecutor>,
    tls: Option<Tls>,
    limits: Limits,
    telemetry: Arc<Telemetry>,
    stop: Stop,
}

impl Server {
    pub(super) fn new(
        tls: Option<Tls>,
        limits: Limits,
        telemetry: Arc<Telemetry>,
        stop: Stop,
    ) -> Self {
        telemetry.set_max_connections(limits.connections);
        let age = limits.age.min(LONGEST_AGE); // what a clock can still count to
        let limits = Limits { age, ..limits };
        Server {
            http: http_server(),
            tls,
            limits,
            telemetry,
            stop,
        }
    }

    /// Takes connections until the server drains, and hands each to the worker
    /// that has the fewest.
    pub(super) async fn accept(
        self,
        listener: Listener,
        workers: Vec<(Worker, Arc<GrpcServices>)>,
    ) {
        let server = Arc::new(self);
        let Server {
            limits,
            telemetry,
            stop,
            ..
        } = &*server;
        let slots = Arc::new(Semaphore::new(limits.connections));
        loop {
            let accepted = tokio::select! {
                () = stop.drain.cancelled() => return,
                accepted = accept_one(&listener) => accepted,
            };
            let stream = match accepted {
                Ok(stream) => stream,
                Err(error) => {
                    // Such as too many open files: trying again at once would only burn time.
                    telemetry.connection_refused("accept");
                    static THROTTLE: Throttle = Throttle::new();
                    if let Some(suppressed) = THROTTLE.permit() {
                        tracing::warn!(%error, suppressed, "no connection was accepted");
                    }
                    sleep(Duration::from_millis(20)).await;
                    continue;
                }
            };
            let Ok(slot) = slots.clone().try_acquire_owned() else {
                telemetry.connection_refused("limit");
                static THROTTLE: Throttle = Throttle::new();
                if let Some(suppressed) = THROTTLE.permit() {
                    tracing::warn!(
                        suppressed,
                        "a connection was closed: there are as many as there may be"
                    );
                }
                continue;
            };
            let least = workers
                .iter()
                .min_by_key(|(worker, _)| worker.connections());
            let Some((worker, services)) = least else {
                return; // there is always one
            };
            let until_it_ends = (slot, telemetry.connection(), worker.place());
            if let Err(error) = server.open(stream, worker, services, until_it_ends) {
                tracing::warn!(%error, "a connection was lost");
            }
        }
    }

    /// Hands a connection to a worker. `until_it_ends` lasts as long as the
    /// connection.
    fn open(
        self: &Arc<Self>,
        stream: Accepted,
        worker: &Worker,
        services: &Arc<GrpcServices>,
        until_it_ends: impl Send + 'static,
    ) -> io::Result<()> {
        let _worker = worker.runtime().enter(); // the stream becomes its own
        let (stream, from) = match stream {
            Accepted::Tcp(stream, from) => {
                let stream = TcpStream::from_std(stream)?;
                let _ = stream.set_nodelay(true);
                (Plain::Left(stream), Some(from))
            }
            Accepted::Unix(stream) => (Plain::Right(UnixStream::from_std(stream)?), None),
        };
        let (server, services) = (self.clone(), services.clone());
        let connections = &self.stop.connections;
        if self.tls.is_some() {
            connections.spawn(server.serve_tls(stream, from, services, until_it_ends));
        } else {
            let (stream, peer) = (Stream::Left(stream), Peer::of(None, &[]));
            connections.spawn(server.serve(stream, from, services, peer, until_it_ends));
        }
        Ok(())
    }

    async fn serve_tls(
        self: Arc<Self>,
        stream: Plain,
        from: Option<SocketAddr>,
        services: Arc<GrpcServices>,
        until_it_ends: impl Send + 'static,
    ) {
        let Some(tls) = &self.tls else { return };
        let accepted = tokio::select! {
            accepted = tls.accept(stream) => accepted,
            () = sleep(OPENING) => return self.telemetry.connection_refused("silent"),
            // No call can be on it yet.
            () = self.stop.drain.cancelled() => return,
        };
        let shown = from.map(display);
        match accepted {
            Ok((stream, peer)) => {
                if !peer.authorized {
                    self.telemetry.connection_refused("tls");
                    static THROTTLE: Throttle = Throttle::new();
                    if let Some(suppressed) = THROTTLE.permit() {
                        let identity = peer.identity.as_deref();
                        tracing::warn!(
                            from = shown,
                            identity,
                            suppressed,
                            "a client is not among --tls-allowed-clients"
                        );
                    }
                }
                let (server, stream) = (self.clone(), Stream::Right(Box::new(stream)));
                server
                    .serve(stream, from, services, peer, until_it_ends)
                    .await;
            }
            Err(error) => match error.kind() {
                // A probe of the port.
                io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => {
                    self.telemetry.connection_refused("silent");
                }
                _ => {
                    self.telemetry.connection_refused("tls");
                    static THROTTLE: Throttle = Throttle::new();
                    if let Some(suppressed) = THROTTLE.permit() {
                        tracing::warn!(from = shown, %error, suppressed, "TLS was not agreed on");
                    }
                }
            },
        }
    }

    /// Thousands of connections may be idle. So this is a task's own future, but
    /// for TLS, and a block, since an `async fn` has room for its arguments twice.
    fn serve(
        self: Arc<Self>,
        stream: Stream,
        from: Option<SocketAddr>,
        services: Arc<GrpcServices>,
        peer: Peer,
        until_it_ends: impl Send + 'static,
    ) -> impl Future<Output = ()> + Send {
        let (received, writes) = (Arc::new(AtomicUsize::new(0)), Arc::new(Writes::default()));
        let services = services.for_connection(peer, writes.clone());
        let stream = Watched {
            stream,
            received: received.clone(),
            writes,
            refused: Refused::default(),
            authorities: from.is_none().then(Box::default),
        };
        async move {
            let _until_it_ends = &until_it_ends;
            let has_begun = || received.load(Ordering::Relaxed) >= PREFACE;
            let mut connection = pin!(self.http.serve_connection(TokioIo::new(stream), services));
            let begin = Instant::now();
            let retires = begin + self.limits.age.mul_f64(0.9 + fastrand::f64() / 5.0);
            let mut clock = pin!(sleep_until(retires.min(begin + OPENING)));
            let mut stop = pin!(self.stop.drain.cancelled());
            let mut is_leaving = false;
            let ended = loop {
                tokio::select! {
                    biased;
                    ended = connection.as_mut() => break ended,
                    () = stop.as_mut() => {}
                    () = clock.as_mut() => match Instant::now() {
                        _ if is_leaving => return,
                        _ if !has_begun() => return self.telemetry.connection_refused("silent"),
                        now if now < retires => {
                            clock.as_mut().reset(retires);
                            continue;
                        }
                        _ => {}
                    }
                }
                // Where nothing has begun, hyper would wait for the beginning.
                if is_leaving || !has_begun() {
                    return;
                }
                is_leaving = true;
                connection.as_mut().graceful_shutdown(); // GOAWAY
                stop.set(self.stop.kill.cancelled());
                clock.as_mut().reset(Instant::now() + LAST_CALLS);
            };
            if let Err(error) = ended {
                tracing::debug!(%error, "connection ended");
            }
        }
    }
}

/// A connection without TLS.
type Plain = Either<TcpStream, UnixStream>;

/// A connection. One type for all kinds: what serves it is large, and would be
/// there four times.
type Stream = Either<Plain, Box<TlsStream<Plain>>>;

/// A connection on its way to a worker.
enum Accepted {
    Tcp(net::TcpStream, SocketAddr),
    Unix(unix::net::UnixStream),
}

async fn accept_one(listener: &Listener) -> io::Result<Accepted> {
    Ok(match listener {
        Listener::Tcp(listener) => {
            let (stream, from) = listener.accept().await?;
            Accepted::Tcp(stream.into_std()?, from)
        }
        Listener::Unix(listener) => Accepted::Unix(listener.accept().await?.0.into_std()?),
    })
}

fn http_server() -> auto::Builder<TokioExecutor> {
    let mut http = auto::Builder::new(TokioExecutor::new());
    http.http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(256)
        // 16 KiB of metadata, and what HTTP/2 counts for each name (RFC 9113, section 6.5.2).
        .max_header_list_size(32 * 1024)
        // A proxy may send all that waits for a connection before it has heard of that limit.
        // Each stream that is refused counts, and past this many the connection would be cut,
        // with the calls that were taken. It bounds what a rapid reset costs (CVE-2023-44487).
        .max_local_error_reset_streams(10_000)
        .initial_stream_window_size(256 * 1024)
        .initial_connection_window_size(4 * 1024 * 1024)
        .keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(10));
    http.http1()
        .timer(TokioTimer::new())
        .max_buf_size(20 * 1024)
        .header_read_timeout(OPENING)
        // One call each: browsers send a POST again by themselves when a connection breaks that
        // has served them before.
        .keep_alive(false);
    http
}

/// Counts what a connection has received, tells when what it sends has left, and looks at
/// what h2 would say nothing of.
///
/// It offers no vectored writes, although it could: without them h2 puts an
/// answer of up to 1 KiB into one write with its headers and trailers, which
/// halves the writes of a call.
struct Watched {
    stream: Stream,
    received: Arc<AtomicUsize>,
    writes: Arc<Writes>,
    refused: Refused,
    /// On a Unix socket.
    authorities: Option<Box<Authorities>>,
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        let read = &mut buffer.filled_mut()[before..];
        self.received.fetch_add(read.len(), Ordering::Relaxed);
        if let Some(authorities) = &mut self.authorities {
            authorities.mend(read);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.writes.written();
        let sent = ready!(Pin::new(&mut self.stream).poll_write(cx, bytes))?;
        if self.refused.is_in(&bytes[..sent]) {
            tell_refused();
        }
        Poll::Ready(Ok(sent))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
        self.writes.flushed();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

fn tell_refused() {
    static THROTTLE: Throttle = Throttle::new();
    if let Some(suppressed) = THROTTLE.permit() {
        tracing::warn!(
            suppressed,
            "a call was reset with PROTOCOL_ERROR before it reached a service: its HTTP/2 is \
             malformed. If its :authority is no host name, such as a name with / or |, set \
             another at the client or proxy"
        );
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use http::Response;
    use hyper::service::service_fn;
    use tokio::time::timeout;
    use tonic::body::Body;

    use super::*;

    /// The clock of this test jumps whenever nothing else is to be done.
    #[tokio::test(start_paused = true)]
    async fn a_dead_peer_is_let_go() {
        let (peer, stream) = tokio::io::duplex(1024 * 1024);
        let service = service_fn(async |_| Ok::<_, Infallible>(Response::new(Body::empty())));
        let http = http_server();
        let served = http.serve_connection(TokioIo::new(stream), service);
        let mut served = tokio::spawn(served.into_owned());
        let (_client, connection) = h2::client::handshake(peer).await.unwrap();
        let mut connection = pin!(connection);

        let while_it_answers = tokio::select! {
            ended = timeout(Duration::from_secs(300), connection.as_mut()) => ended.is_ok(),
            _ = &mut served => true,
        };
        assert!(!while_it_answers, "a peer that answers pings may be idle");
        let begin = Instant::now();
        let error = served.await.unwrap().unwrap_err();
        let error = error.downcast_ref::<hyper::Error>().unwrap();
        assert!(error.is_timeout(), "{error}");
        assert!(begin.elapsed() <= Duration::from_secs(40));
    }
}

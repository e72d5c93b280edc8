//! One connection: TLS, then HTTP/2 or HTTP/1.1, until it ends, gets too old, or the gateway
//! drains.

use std::{
    io,
    net::SocketAddr,
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
    net::{TcpStream, UnixStream},
    time::{Instant, sleep, sleep_until},
};
use tokio_rustls::server::TlsStream;
use tokio_util::{either::Either, sync::CancellationToken, task::TaskTracker};
use tracing::field::display;

use super::{
    authority::{Authorities, ProtocolErrors},
    listener::Accepted,
    router::GrpcServices,
    tls::Tls,
    workers::Worker,
    writes::Writes,
};
use crate::{certificates::Peer, telemetry::Telemetry};

/// The clock overflows with "no limit". A year is as good.
const MAX_AGE: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// How long a client may take for the TLS handshake, then for the HTTP/2 preface or the headers
/// of an HTTP/1.1 request.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the calls of a connection may continue after GOAWAY. No unary call takes that long; a
/// Health/Watch would stay forever.
const GOAWAY_GRACE: Duration = Duration::from_secs(5 * 60);

/// The length of the HTTP/2 client preface (RFC 9113, section 3.4).
const PREFACE: usize = 24;

/// Ends connections.
#[derive(Clone, Default)]
pub(super) struct Shutdown {
    /// Accept no new connections; open ones finish their calls.
    pub(super) drain: CancellationToken,
    /// Close everything now.
    pub(super) kill: CancellationToken,
    /// The open connections.
    pub(super) connections: TaskTracker,
}

/// Serves connections.
pub(super) struct ConnectionServer {
    http: auto::Builder<TokioExecutor>,
    tls: Option<Tls>,
    max_age: Duration,
    pub(super) telemetry: Arc<Telemetry>,
    pub(super) shutdown: Shutdown,
}

impl ConnectionServer {
    pub(super) fn new(
        tls: Option<Tls>,
        max_age: Duration,
        telemetry: Arc<Telemetry>,
        shutdown: Shutdown,
    ) -> Self {
        ConnectionServer {
            http: http_server(),
            tls,
            max_age: max_age.min(MAX_AGE),
            telemetry,
            shutdown,
        }
    }

    /// Serves a connection on a worker. `guard` lives as long as the connection.
    pub(super) fn spawn(
        self: &Arc<Self>,
        stream: Accepted,
        worker: &Worker,
        services: &Arc<GrpcServices>,
        guard: impl Send + 'static,
    ) -> io::Result<()> {
        let _worker = worker.runtime().enter(); // registers the stream with its runtime
        let (stream, from) = match stream {
            Accepted::Tcp(stream, from) => {
                let stream = TcpStream::from_std(stream)?;
                let _ = stream.set_nodelay(true);
                (Plain::Left(stream), Some(from))
            }
            Accepted::Unix(stream) => (Plain::Right(UnixStream::from_std(stream)?), None),
        };
        let (server, services) = (self.clone(), services.clone());
        let connections = &self.shutdown.connections;
        if self.tls.is_some() {
            connections.spawn(server.serve_tls(stream, from, services, guard));
        } else {
            let (stream, peer) = (Stream::Left(stream), Peer::of(None, &[]));
            connections.spawn(server.serve(stream, from, services, peer, guard));
        }
        Ok(())
    }

    async fn serve_tls(
        self: Arc<Self>,
        stream: Plain,
        from: Option<SocketAddr>,
        services: Arc<GrpcServices>,
        guard: impl Send + 'static,
    ) {
        let Some(tls) = &self.tls else { return };
        let accepted = tokio::select! {
            accepted = tls.accept(stream) => accepted,
            () = sleep(HANDSHAKE_TIMEOUT) => return self.telemetry.connection_refused("silent"),
            () = self.shutdown.drain.cancelled() => return, // it has no calls yet
        };
        let shown = from.map(display);
        match accepted {
            Ok((stream, peer)) => {
                if !peer.authorized {
                    self.telemetry.connection_refused("tls");
                    let identity = peer.identity.as_deref();
                    warn_throttled!(
                        from = shown,
                        identity,
                        "client not in --tls-allowed-clients"
                    );
                }
                let (server, stream) = (self.clone(), Stream::Right(Box::new(stream)));
                server.serve(stream, from, services, peer, guard).await;
            }
            Err(error) => match error.kind() {
                // A port check.
                io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => {
                    self.telemetry.connection_refused("silent");
                }
                _ => {
                    self.telemetry.connection_refused("tls");
                    warn_throttled!(from = shown, %error, "TLS handshake failed");
                }
            },
        }
    }

    /// Not an `async fn`, which would store its arguments twice: thousands of connections may be
    /// idle, and each has such a future.
    fn serve(
        self: Arc<Self>,
        stream: Stream,
        from: Option<SocketAddr>,
        services: Arc<GrpcServices>,
        peer: Peer,
        guard: impl Send + 'static,
    ) -> impl Future<Output = ()> + Send {
        let (received, writes) = (Arc::new(AtomicUsize::new(0)), Arc::new(Writes::default()));
        let services = services.for_connection(peer, writes.clone());
        let stream = ConnectionIo {
            stream,
            received: received.clone(),
            writes,
            resets: ProtocolErrors::default(),
            authorities: from.is_none().then(Box::default),
        };
        async move {
            let _guard = &guard;
            let preface_received = || received.load(Ordering::Relaxed) >= PREFACE;
            let mut connection = pin!(self.http.serve_connection(TokioIo::new(stream), services));
            let started = Instant::now();
            // ±10 %: connections that were opened together do not all reconnect together.
            let too_old = started + self.max_age.mul_f64(0.9 + fastrand::f64() / 5.0);
            let mut timer = pin!(sleep_until(too_old.min(started + HANDSHAKE_TIMEOUT)));
            let mut shutdown = pin!(self.shutdown.drain.cancelled());
            let mut goaway_sent = false;
            let result = loop {
                tokio::select! {
                    biased;
                    result = connection.as_mut() => break result,
                    () = shutdown.as_mut() => {}
                    () = timer.as_mut() => match Instant::now() {
                        _ if goaway_sent => return,
                        _ if !preface_received() => {
                            return self.telemetry.connection_refused("silent");
                        }
                        now if now < too_old => {
                            timer.as_mut().reset(too_old);
                            continue;
                        }
                        _ => {}
                    }
                }
                // Without a preface, hyper's graceful shutdown would wait for one.
                if goaway_sent || !preface_received() {
                    return;
                }
                goaway_sent = true;
                connection.as_mut().graceful_shutdown();
                shutdown.set(self.shutdown.kill.cancelled());
                timer.as_mut().reset(Instant::now() + GOAWAY_GRACE);
            };
            if let Err(error) = result {
                tracing::debug!(%error, "connection failed");
            }
        }
    }
}

/// A connection without TLS.
type Plain = Either<TcpStream, UnixStream>;

/// Any connection. One type for all kinds, so that the large code that serves them is compiled
/// once.
type Stream = Either<Plain, Box<TlsStream<Plain>>>;

fn http_server() -> auto::Builder<TokioExecutor> {
    let mut http = auto::Builder::new(TokioExecutor::new());
    http.http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(256)
        // 16 KiB of metadata plus HTTP/2's overhead for each field (RFC 9113, section 6.5.2).
        .max_header_list_size(32 * 1024)
        // A proxy may send all its queued calls before it receives the limit on streams. Each
        // refused stream counts, and beyond this number h2 closes the connection together with
        // the calls that it accepted. The bound limits rapid resets (CVE-2023-44487).
        .max_local_error_reset_streams(10_000)
        .initial_stream_window_size(256 * 1024)
        .initial_connection_window_size(4 * 1024 * 1024)
        .keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(10));
    http.http1()
        .timer(TokioTimer::new())
        .max_buf_size(20 * 1024)
        .header_read_timeout(HANDSHAKE_TIMEOUT)
        // One call per connection: when a reused connection breaks, browsers repeat a POST on
        // their own.
        .keep_alive(false);
    http
}

/// A connection's stream, as hyper sees it. It counts received bytes, tracks writes, reports
/// protocol errors that h2 does not, and rewrites what h2 would refuse.
///
/// It offers no vectored writes on purpose: without them h2 sends a response of up to 1 KiB in
/// one write with its headers and trailers, which halves the writes of a call.
struct ConnectionIo {
    stream: Stream,
    received: Arc<AtomicUsize>,
    writes: Arc<Writes>,
    resets: ProtocolErrors,
    /// Only on a Unix socket.
    authorities: Option<Box<Authorities>>,
}

impl AsyncRead for ConnectionIo {
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
            authorities.rewrite(read);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for ConnectionIo {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.writes.wrote();
        let sent = ready!(Pin::new(&mut self.stream).poll_write(cx, bytes))?;
        if self.resets.found_in(&bytes[..sent]) {
            warn_throttled!(
                "a call was reset with PROTOCOL_ERROR: its HTTP/2 is malformed. If its :authority \
                 is not a host name, such as a name with / or |, set another one at the client or \
                 proxy"
            );
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

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use http::Response;
    use hyper::service::service_fn;
    use tokio::time::timeout;
    use tonic::body::Body;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_dead_peer_is_disconnected() {
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

//! Connections in: TCP or a Unix socket, with or without TLS, each served as
//! HTTP/2 until it ends or the server drains.

use std::{
    fs, io,
    net::SocketAddr,
    os::unix::fs::FileTypeExt,
    path::Path,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::Semaphore,
    time::{Instant, sleep, sleep_until},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::field::display;

use super::{grpc::GrpcServices, tls::Tls};
use crate::{certificates::Peer, config::Listen, telemetry::Telemetry};

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
                let listener = TcpListener::bind(address).await?;
                let address = listener.local_addr()?;
                Ok((Listener::Tcp(listener), Listen::Tcp(address)))
            }
            Listen::Unix(path) => {
                remove_stale(path)?;
                let listener = UnixListener::bind(path)?;
                Ok((Listener::Unix(listener), Listen::Unix(path.clone())))
            }
        }
    }
}

/// Removes a socket that a process left behind, but not one that is in use.
fn remove_stale(path: &Path) -> io::Result<()> {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
    if is_socket && std::os::unix::net::UnixStream::connect(path).is_err() {
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

/// How long a connection may take to begin with HTTP/2, its TLS included.
const OPENING: Duration = Duration::from_secs(10);

/// How long the calls of a connection may go on after GOAWAY. No create takes
/// that long; a Health/Watch would stay for ever.
const LAST_CALLS: Duration = Duration::from_secs(5 * 60);

/// The first bytes of HTTP/2 (RFC 9113, section 3.4).
const PREFACE: usize = 24;

/// All that a connection needs.
#[derive(Clone)]
pub(super) struct Server {
    http2: http2::Builder<TokioExecutor>,
    services: GrpcServices,
    tls: Option<Tls>,
    limits: Limits,
    telemetry: Arc<Telemetry>,
    stop: Stop,
}

impl Server {
    pub(super) fn new(
        services: GrpcServices,
        tls: Option<Tls>,
        limits: Limits,
        telemetry: Arc<Telemetry>,
        stop: Stop,
    ) -> Self {
        telemetry.set_max_connections(limits.connections);
        Server {
            http2: http2_server(),
            services,
            tls,
            limits,
            telemetry,
            stop,
        }
    }

    /// Takes connections until the server drains.
    pub(super) async fn accept(self, listener: Listener) {
        let slots = Arc::new(Semaphore::new(self.limits.connections));
        loop {
            let accepted = tokio::select! {
                () = self.stop.drain.cancelled() => return,
                accepted = accept_one(&listener) => accepted,
            };
            let stream = match accepted {
                Ok(stream) => stream,
                Err(error) => {
                    // Such as too many open files: trying again at once would only burn time.
                    tracing::warn!(%error, "no connection was accepted");
                    sleep(Duration::from_millis(20)).await;
                    continue;
                }
            };
            let Ok(slot) = slots.clone().try_acquire_owned() else {
                self.telemetry.connection_refused("limit");
                tracing::warn!("a connection was closed: there are as many as there may be");
                continue;
            };
            let open = self.telemetry.connection();
            let server = self.clone();
            self.stop.connections.spawn(async move {
                let _until_it_ends = (slot, open);
                match stream {
                    Stream::Tcp(stream, from) => {
                        let _ = stream.set_nodelay(true);
                        server.open(stream, Some(from)).await;
                    }
                    Stream::Unix(stream) => server.open(stream, None).await,
                }
            });
        }
    }

    /// Serves a connection, inside TLS if that is on.
    async fn open(
        self,
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        from: Option<SocketAddr>,
    ) {
        let opening = Instant::now() + OPENING;
        let Some(tls) = self.tls.clone() else {
            return self.serve(stream, Peer::of(None, &[]), opening).await;
        };
        let accepted = tokio::select! {
            accepted = tls.accept(stream) => accepted,
            () = sleep_until(opening) => return self.telemetry.connection_refused("silent"),
            // No call can be on it yet.
            () = self.stop.drain.cancelled() => return,
        };
        let from = from.map(display);
        match accepted {
            Ok((stream, peer)) => {
                if !peer.allowed {
                    self.telemetry.connection_refused("tls");
                    let identity = peer.identity.as_deref();
                    tracing::warn!(
                        from,
                        identity,
                        "a client is not among --tls-allowed-clients"
                    );
                }
                self.serve(stream, peer, opening).await;
            }
            Err(error) => {
                self.telemetry.connection_refused("tls");
                match error.kind() {
                    // A probe of the port.
                    io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => {
                        tracing::debug!(from, %error, "TLS was not agreed on");
                    }
                    _ => tracing::warn!(from, %error, "TLS was not agreed on"),
                }
            }
        }
    }

    async fn serve(
        self,
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        peer: Peer,
        opening: Instant,
    ) {
        let received = Arc::new(AtomicUsize::new(0));
        let has_begun = || received.load(Ordering::Relaxed) >= PREFACE;
        let stream = Counted {
            stream,
            received: received.clone(),
        };
        let services = self.services.for_peer(peer);
        let connection = self.http2.serve_connection(TokioIo::new(stream), services);
        tokio::pin!(connection);
        let silent = async {
            sleep_until(opening).await;
            // hyper itself would wait for ever.
            if has_begun() {
                std::future::pending::<()>().await;
            }
        };
        let age = self.limits.age.mul_f64(0.9 + fastrand::f64() / 5.0);
        let (drain, kill) = (&self.stop.drain, &self.stop.kill);
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = silent => return self.telemetry.connection_refused("silent"),
            () = kill.cancelled() => return,
            () = first(drain.cancelled(), sleep(age)) => {
                if !has_begun() {
                    return; // hyper would wait for the beginning
                }
                connection.as_mut().graceful_shutdown(); // GOAWAY
                tokio::select! {
                    ended = connection.as_mut() => ended,
                    () = first(kill.cancelled(), sleep(LAST_CALLS)) => return,
                }
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "connection ended");
        }
    }
}

enum Stream {
    Tcp(TcpStream, SocketAddr),
    Unix(UnixStream),
}

async fn accept_one(listener: &Listener) -> io::Result<Stream> {
    Ok(match listener {
        Listener::Tcp(listener) => {
            let (stream, from) = listener.accept().await?;
            Stream::Tcp(stream, from)
        }
        Listener::Unix(listener) => Stream::Unix(listener.accept().await?.0),
    })
}

fn http2_server() -> http2::Builder<TokioExecutor> {
    let mut http2 = http2::Builder::new(TokioExecutor::new());
    http2
        .timer(TokioTimer::new())
        .max_concurrent_streams(256)
        // 16 KiB of metadata, and what HTTP/2 counts for each name (RFC 9113, section 6.5.2).
        .max_header_list_size(32 * 1024)
        .initial_stream_window_size(256 * 1024)
        .initial_connection_window_size(4 * 1024 * 1024)
        .keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(10));
    http2
}

async fn first(one: impl Future<Output = ()>, other: impl Future<Output = ()>) {
    tokio::select! {
        () = one => {}
        () = other => {}
    }
}

/// Counts what a connection has received.
struct Counted<S> {
    stream: S,
    received: Arc<AtomicUsize>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Counted<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        let read = buffer.filled().len() - before;
        self.received.fetch_add(read, Ordering::Relaxed);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counted<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

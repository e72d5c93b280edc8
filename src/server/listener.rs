//! Connections in: TCP or a Unix socket, each served as HTTP/2 until it ends
//! or the server drains.

use std::{fs, io, os::unix::fs::FileTypeExt, path::Path, time::Duration};

use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::grpc::GrpcServices;
use crate::config::Listen;

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

/// Takes connections until the server drains.
pub(super) async fn accept(listener: Listener, services: GrpcServices, stop: Stop) {
    let http2 = http2_server();
    loop {
        let accepted = tokio::select! {
            () = stop.drain.cancelled() => return,
            accepted = accept_one(&listener) => accepted,
        };
        match accepted {
            Ok(Stream::Tcp(stream)) => {
                let _ = stream.set_nodelay(true);
                let serve = serve(http2.clone(), stream, services.clone(), stop.clone());
                stop.connections.spawn(serve);
            }
            Ok(Stream::Unix(stream)) => {
                let serve = serve(http2.clone(), stream, services.clone(), stop.clone());
                stop.connections.spawn(serve);
            }
            Err(error) => {
                // Such as too many open files: trying again at once would only burn time.
                tracing::warn!(%error, "no connection was accepted");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
}

enum Stream {
    Tcp(tokio::net::TcpStream),
    Unix(tokio::net::UnixStream),
}

async fn accept_one(listener: &Listener) -> io::Result<Stream> {
    Ok(match listener {
        Listener::Tcp(listener) => Stream::Tcp(listener.accept().await?.0),
        Listener::Unix(listener) => Stream::Unix(listener.accept().await?.0),
    })
}

fn http2_server() -> http2::Builder<TokioExecutor> {
    let mut http2 = http2::Builder::new(TokioExecutor::new());
    http2
        .timer(TokioTimer::new())
        .max_concurrent_streams(1000)
        // 16 KiB of metadata, and what HTTP/2 counts for each name (RFC 9113, section 6.5.2).
        .max_header_list_size(32 * 1024)
        .initial_stream_window_size(256 * 1024)
        .initial_connection_window_size(4 * 1024 * 1024)
        .keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(10));
    http2
}

async fn serve(
    http2: http2::Builder<TokioExecutor>,
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    services: GrpcServices,
    stop: Stop,
) {
    let connection = http2.serve_connection(TokioIo::new(stream), services);
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.drain.cancelled() => {
            connection.as_mut().graceful_shutdown(); // GOAWAY
            tokio::select! {
                ended = connection.as_mut() => ended,
                () = stop.kill.cancelled() => return,
            }
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "connection ended");
    }
}

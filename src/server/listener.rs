//! The gRPC listener: binds a TCP port or a Unix socket, accepts connections up to the limit,
//! and hands each to the worker that has the fewest.

use std::{
    fs, io,
    net::{self, SocketAddr},
    os::unix::{self, fs::FileTypeExt},
    path::Path,
    sync::Arc,
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpSocket, UnixListener, UnixSocket},
    sync::Semaphore,
    time::sleep,
};

use super::{connection::ConnectionServer, router::GrpcServices, workers::Worker};
use crate::config::Listen;

/// How many connections may wait to be accepted. With a full backlog, a client retries after a
/// second. The system may allow fewer (net.core.somaxconn).
const BACKLOG: u32 = 4096;

/// Pause after a failed accept: with no file descriptor left, an immediate retry would only burn
/// processor time.
const ACCEPT_RETRY: Duration = Duration::from_millis(20);

/// A bound listener.
pub(super) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// A connection that no runtime polls yet.
pub(super) enum Accepted {
    Tcp(net::TcpStream, SocketAddr),
    Unix(unix::net::UnixStream),
}

impl Listener {
    /// Binds. Returns the real address too: port 0 means any free port.
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

    /// Serves connections on these workers until the gateway drains.
    pub(super) async fn serve(
        self,
        server: Arc<ConnectionServer>,
        workers: Vec<(Worker, Arc<GrpcServices>)>,
        max_connections: usize,
    ) {
        let slots = Arc::new(Semaphore::new(max_connections));
        let telemetry = &server.telemetry;
        loop {
            let accepted = tokio::select! {
                () = server.shutdown.drain.cancelled() => return,
                accepted = self.accept() => accepted,
            };
            let stream = match accepted {
                Ok(stream) => stream,
                Err(error) => {
                    telemetry.connection_refused("accept");
                    warn_throttled!(%error, "cannot accept connections");
                    sleep(ACCEPT_RETRY).await;
                    continue;
                }
            };
            let Ok(slot) = slots.clone().try_acquire_owned() else {
                telemetry.connection_refused("limit");
                warn_throttled!("connection limit reached (--max-connections)");
                continue;
            };
            let least_busy = workers
                .iter()
                .min_by_key(|(worker, _)| worker.connections());
            let Some((worker, services)) = least_busy else {
                return; // there is always one
            };
            let guard = (slot, telemetry.connection(), worker.connection_guard());
            if let Err(error) = server.spawn(stream, worker, services, guard) {
                tracing::warn!(%error, "cannot serve a connection");
            }
        }
    }

    async fn accept(&self) -> io::Result<Accepted> {
        Ok(match self {
            Listener::Tcp(listener) => {
                let (stream, from) = listener.accept().await?;
                Accepted::Tcp(stream.into_std()?, from)
            }
            Listener::Unix(listener) => Accepted::Unix(listener.accept().await?.0.into_std()?),
        })
    }
}

/// Removes a socket that an earlier process left behind, but not one that is in use.
fn remove_stale(path: &Path) -> io::Result<()> {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
    if is_socket && unix::net::UnixStream::connect(path).is_err() {
        fs::remove_file(path)?;
    }
    Ok(())
}

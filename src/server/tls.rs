//! TLS on the gRPC listener: the handshake, and reloading certificates.

use std::{io, sync::Arc, time::Duration};

use rustls::ServerConfig;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
    time::{sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use crate::{
    certificates::{Loaded, Peer, Pem, TlsFiles, TlsOptions},
    telemetry::Telemetry,
};

/// How often the files are read. Kubernetes replaces them by swapping the symbolic link of
/// their folder, so only their contents show a change.
const POLL: Duration = Duration::from_secs(10);

/// How long sending the alert may take after a failed handshake.
const ALERT_FLUSH: Duration = Duration::from_secs(1);

/// Accepts TLS connections with the current certificates.
#[derive(Clone)]
pub(super) struct Tls {
    current: watch::Receiver<Arc<ServerConfig>>,
    allowed_clients: Arc<[String]>,
}

impl Tls {
    /// Loads the certificates, and reloads them when they change or on SIGHUP.
    pub(super) fn start(
        options: TlsOptions,
        alpn: &'static [&'static str],
        telemetry: Arc<Telemetry>,
    ) -> Result<Self, Vec<String>> {
        let TlsOptions {
            files,
            allowed_clients,
        } = options;
        let pem = files.read()?;
        let loaded = files.parse(&pem)?;
        let hangup = signal(SignalKind::hangup()).map_err(|error| vec![error.to_string()])?;
        telemetry.tls_validity(&loaded.validity);
        let (sender, current) = watch::channel(server(loaded, alpn));
        let reload = Reload {
            files,
            pem,
            alpn,
            current: sender,
            telemetry,
        };
        tokio::spawn(reload.run(hangup));
        Ok(Tls {
            current,
            allowed_clients,
        })
    }

    /// Accepts a connection and identifies the client.
    pub(super) async fn accept<S>(&self, stream: S) -> io::Result<(TlsStream<S>, Peer)>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let server = self.current.borrow().clone();
        let accepted = TlsAcceptor::from(server).accept(stream).into_fallible();
        let stream = match accepted.await {
            Ok(stream) => stream,
            Err((error, stream)) => {
                let _ = timeout(ALERT_FLUSH, close(stream)).await;
                return Err(error);
            }
        };
        let presented = stream.get_ref().1.peer_certificates();
        let peer = Peer::of(presented.and_then(<[_]>::first), &self.allowed_clients);
        Ok((stream, peer))
    }
}

/// Closes so that the alert, which says why, arrives: closing with unread data would reset the
/// connection.
async fn close(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    stream.shutdown().await?;
    let mut unread = stream.take(64 * 1024);
    tokio::io::copy(&mut unread, &mut tokio::io::sink()).await?;
    Ok(())
}

fn server(loaded: Loaded, alpn: &[&str]) -> Arc<ServerConfig> {
    let mut server = loaded.server;
    server.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    Arc::new(server)
}

/// Reloads the files. New connections use the new certificates; open ones keep theirs.
struct Reload {
    files: TlsFiles,
    /// The current contents.
    pem: Pem,
    alpn: &'static [&'static str],
    current: watch::Sender<Arc<ServerConfig>>,
    telemetry: Arc<Telemetry>,
}

impl Reload {
    async fn run(mut self, mut hangup: Signal) {
        loop {
            tokio::select! {
                () = sleep(POLL) => {}
                _ = hangup.recv() => {}
            }
            let files = self.files.clone();
            let Ok(read) = tokio::task::spawn_blocking(move || files.read()).await else {
                continue;
            };
            if read.as_ref().is_ok_and(|pem| *pem == self.pem) {
                continue;
            }
            let parsed = read.and_then(|pem| Ok((self.files.parse(&pem)?, pem)));
            self.telemetry.tls_reload(parsed.is_ok());
            match parsed {
                Ok((loaded, pem)) => {
                    let not_after = loaded.validity.end;
                    self.telemetry.tls_validity(&loaded.validity);
                    self.current.send_replace(server(loaded, self.alpn));
                    self.pem = pem;
                    tracing::info!(not_after, "TLS certificates reloaded");
                }
                // Perhaps half written: the next poll finds the rest.
                Err(problems) => {
                    let problems = problems.join("; ");
                    tracing::warn!(
                        problems,
                        "TLS certificates not reloaded, keeping the current ones"
                    );
                }
            }
        }
    }
}

//! TLS on the gRPC listener: the handshake, and certificates that change.

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

/// How often the files are read. Kubernetes replaces them by swapping symbolic
/// links of folders, so what they hold is compared: nothing else is certain.
const POLL: Duration = Duration::from_secs(10);

/// How long a client whose handshake failed may take to hear why.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Opens TLS connections with the certificates in force.
#[derive(Clone)]
pub(super) struct Tls {
    in_force: watch::Receiver<Arc<ServerConfig>>,
    allowed: Arc<[String]>,
}

impl Tls {
    /// Loads the certificates, and again when they change or SIGHUP comes.
    pub(super) fn start(
        options: TlsOptions,
        alpn: &'static [&'static str],
        telemetry: Arc<Telemetry>,
    ) -> Result<Self, Vec<String>> {
        let TlsOptions { files, allowed } = options;
        let pem = files.read()?;
        let loaded = files.parse(&pem)?;
        let hangup = signal(SignalKind::hangup()).map_err(|error| vec![error.to_string()])?;
        telemetry.tls_validity(&loaded.validity);
        let (sender, in_force) = watch::channel(server(loaded, alpn));
        let reload = Reload {
            files,
            pem,
            alpn,
            in_force: sender,
            telemetry,
        };
        tokio::spawn(reload.run(hangup));
        Ok(Tls { in_force, allowed })
    }

    /// Opens a connection, and tells who is at its other end.
    pub(super) async fn accept<S>(&self, stream: S) -> io::Result<(TlsStream<S>, Peer)>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let server = self.in_force.borrow().clone();
        let accepted = TlsAcceptor::from(server).accept(stream).into_fallible();
        let stream = match accepted.await {
            Ok(stream) => stream,
            Err((error, stream)) => {
                let _ = timeout(LAST_WORDS, close(stream)).await;
                return Err(error);
            }
        };
        let shown = stream.get_ref().1.peer_certificates();
        let peer = Peer::of(shown.and_then(<[_]>::first), &self.allowed);
        Ok((stream, peer))
    }
}

/// Closes so that the alert, which says why, arrives: what is left unread
/// would reset the connection.
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

/// Follows the files. New connections get what they hold; those that exist
/// keep what they were opened with.
struct Reload {
    files: TlsFiles,
    /// What is in force.
    pem: Pem,
    alpn: &'static [&'static str],
    in_force: watch::Sender<Arc<ServerConfig>>,
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
                    self.in_force.send_replace(server(loaded, self.alpn));
                    self.pem = pem;
                    tracing::info!(not_after, "TLS certificates reloaded");
                }
                // Half written, perhaps: the next look finds the rest.
                Err(problems) => {
                    let problems = problems.join("; ");
                    tracing::warn!(problems, "TLS certificates not reloaded: the old ones stay");
                }
            }
        }
    }
}

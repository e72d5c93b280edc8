//! Assembles the gateway from its configuration, and stops it gracefully.

mod admin;
mod answer;
mod grpc;
mod listener;

use std::{fmt, io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic_health::{ServingStatus, server::HealthReporter};

use self::{
    grpc::GrpcServices,
    listener::{Listener, Stop},
};
use crate::{
    config::{Config, Listen},
    in_flight::InFlight,
    proto::v1::batch_service_server::SERVICE_NAME,
    service::Gateway,
    telemetry::Metrics,
    upstream::Upstream,
};

/// Why the gateway did not start.
#[derive(Debug)]
pub enum StartError {
    /// An address could not be listened on.
    Listen(String, io::Error),
    /// The HTTP client could not be made.
    Client(reqwest::Error),
    /// The built-in descriptors are broken.
    Reflection(tonic_reflection::server::Error),
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StartError::Listen(place, error) => write!(f, "cannot listen on {place}: {error}"),
            StartError::Client(error) => write!(f, "cannot make an HTTP client: {error:?}"),
            StartError::Reflection(error) => write!(f, "cannot serve reflection: {error}"),
        }
    }
}

impl std::error::Error for StartError {}

/// A gateway that takes calls.
pub struct Running {
    listen: Listen,
    admin: SocketAddr,
    health: HealthReporter,
    not_ready: CancellationToken,
    stop: Stop,
    in_flight: InFlight,
    drain_delay: Duration,
    drain_timeout: Duration,
}

/// Starts the gateway. When this returns, calls are taken.
pub async fn start(config: Config) -> Result<Running, StartError> {
    let cannot_listen = |place: String| move |error| StartError::Listen(place, error);
    let (listener, listen) = Listener::bind(&config.listen)
        .await
        .map_err(cannot_listen(config.listen.to_string()))?;
    let admin_listener = TcpListener::bind(config.admin_listen)
        .await
        .map_err(cannot_listen(config.admin_listen.to_string()))?;
    let admin = admin_listener
        .local_addr()
        .map_err(cannot_listen(config.admin_listen.to_string()))?;

    let metrics = Arc::new(Metrics::new());
    let in_flight = InFlight::new(
        config.max_in_flight,
        config.request_timeout,
        metrics.clone(),
    );
    let gateway = Gateway {
        credentials: config.credentials,
        upstream: Upstream::new(config.upstream).map_err(StartError::Client)?,
        in_flight: in_flight.clone(),
        metrics: metrics.clone(),
    };
    let health = HealthReporter::new();
    set_health(&health, ServingStatus::Serving).await;
    let services = GrpcServices::new(gateway, health.clone()).map_err(StartError::Reflection)?;

    let stop = Stop::default();
    let not_ready = CancellationToken::new();
    tokio::spawn(admin::serve(admin_listener, metrics, not_ready.clone()));
    tokio::spawn(listener::accept(listener, services, stop.clone()));
    Ok(Running {
        listen,
        admin,
        health,
        not_ready,
        stop,
        in_flight,
        drain_delay: config.drain_delay,
        drain_timeout: config.drain_timeout,
    })
}

async fn set_health(health: &HealthReporter, status: ServingStatus) {
    for service in ["", SERVICE_NAME] {
        health.set_service_status(service, status).await;
    }
}

impl Running {
    /// Where gRPC calls are taken.
    pub fn listen(&self) -> &Listen {
        &self.listen
    }

    /// Where the admin pages are.
    pub fn admin(&self) -> SocketAddr {
        self.admin
    }

    /// Stops: says so, waits until callers have heard, tells connections to go
    /// away, lets calls in flight finish, and ends the rest after a while.
    pub async fn drain(mut self) {
        tracing::info!(creates_in_flight = self.in_flight.len(), "draining");
        self.not_ready.cancel();
        set_health(&self.health, ServingStatus::NotServing).await;
        tokio::time::sleep(self.drain_delay).await;

        for service in ["", SERVICE_NAME] {
            self.health.clear_service_status(service).await; // ends Health/Watch streams
        }
        self.stop.drain.cancel();
        self.stop.connections.close();
        let finished = async {
            self.stop.connections.wait().await;
            self.in_flight.finished().await;
        };
        if tokio::time::timeout(self.drain_timeout, finished)
            .await
            .is_err()
        {
            tracing::warn!(
                connections = self.stop.connections.len(),
                creates_in_flight = self.in_flight.len(),
                "drain timeout: what is in flight ends now, and its outcome is unknown"
            );
            self.stop.kill.cancel();
        }
        if let Listen::Unix(path) = &self.listen {
            let _ = std::fs::remove_file(path);
        }
        tracing::info!("stopped");
    }
}

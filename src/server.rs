//! Assembles the gateway from its configuration, and stops it gracefully.

mod admin;
mod arrival;
mod authority;
mod body;
mod descriptors;
mod grpc_web;
mod health;
mod listener;
mod response;
mod router;
mod tls;
mod workers;
mod writes;

use std::{fmt, io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic_health::{ServingStatus, server::HealthReporter};

use self::{
    admin::Admin,
    arrival::Bounds,
    grpc_web::Web,
    listener::{Limits, Listener, Server, Stop},
    router::GrpcServices,
    tls::Tls,
};
use crate::{
    config::{Config, Listen},
    create_batch::{BatchCreator, CreateState, CreatedBatch},
    execution::Executor,
    http_client,
    operations::read::Reader,
    proto::v1::batch_service_server::SERVICE_NAME,
    retry::Retries,
    service::{self, Gateway},
    telemetry::{LogLevel, Telemetry},
    upstream::Upstream,
};

/// How long the last answers may take to leave.
const LAST_ANSWERS: Duration = Duration::from_millis(500);

/// Why the gateway did not start.
#[derive(Debug)]
pub enum StartError {
    /// An address could not be listened on.
    Listen(String, io::Error),
    /// The certificates do not hold any more.
    Tls(Vec<String>),
    /// The threads could not be started.
    Threads(io::Error),
    /// There is nobody whom connections to the API could trust.
    Trust(rustls::Error),
    /// The HTTP client could not be made.
    Client(reqwest::Error),
    /// The built-in descriptors are broken.
    Reflection(tonic_reflection::server::Error),
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StartError::Listen(place, error) => write!(f, "cannot listen on {place}: {error}"),
            StartError::Tls(problems) => write!(f, "{}", problems.join("; ")),
            StartError::Threads(error) => write!(f, "cannot start threads: {error}"),
            StartError::Trust(error) => write!(f, "{}: {error}", http_client::NO_TRUSTED_CA),
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
    executor: Executor<CreatedBatch>,
    telemetry: Arc<Telemetry>,
    drain_delay: Duration,
    drain_timeout: Duration,
}

/// Starts the gateway. When this returns, calls are taken.
pub async fn start(
    config: Config,
    telemetry: Arc<Telemetry>,
    log_level: LogLevel,
) -> Result<Running, StartError> {
    let settings = &config.settings;
    let max_connections = descriptors::make_room(settings.max_connections, settings.max_in_flight);
    let cannot_listen = |place: String| move |error| StartError::Listen(place, error);
    let (listener, listen) = Listener::bind(&settings.listen)
        .await
        .map_err(cannot_listen(settings.listen.to_string()))?;
    let admin_listener = TcpListener::bind(settings.admin_listen)
        .await
        .map_err(cannot_listen(settings.admin_listen.to_string()))?;
    let admin = admin_listener
        .local_addr()
        .map_err(cannot_listen(settings.admin_listen.to_string()))?;

    let executor = Executor::new(
        settings.max_in_flight,
        service::create_completion,
        telemetry.clone(),
    );
    let web = settings.grpc_web.then(|| Web {
        origins: settings.grpc_web_origins.clone(),
        metadata: config.credentials.forward.clone(),
    });
    let web = web.map(Arc::new);
    // The HTTP versions that are agreed on in TLS (RFC 7301).
    let alpn: &[&str] = match web {
        Some(_) => &["h2", "http/1.1"],
        None => &["h2"],
    };
    let tls = config
        .tls
        .map(|tls| Tls::start(tls, alpn, telemetry.clone()));
    let tls = tls.transpose().map_err(StartError::Tls)?;
    let retries = Arc::new(Retries::new(telemetry.clone()));
    let create_state = Arc::new(CreateState::new(
        settings.lookup,
        settings.request_timeout,
        retries.clone(),
        telemetry.clone(),
    ));
    let health = HealthReporter::new();
    set_health(&health, ServingStatus::Serving).await;
    let not_ready = CancellationToken::new();
    let stop = Stop::default();
    let upstream_tls = http_client::tls(&config.upstream).map_err(StartError::Trust)?;
    // A worker has a client of its own: a connection to the API lives on one thread too.
    let bounds = Bounds::new(settings.max_in_flight, max_connections);
    let services = || {
        let upstream = Upstream::new(&config.upstream, upstream_tls.clone(), telemetry.clone());
        let upstream = upstream.map_err(StartError::Client)?;
        let gateway = Gateway {
            credentials: config.credentials.clone(),
            creator: Arc::new(BatchCreator::new(upstream.clone(), create_state.clone())),
            reader: Reader {
                upstream: Arc::new(upstream),
                retries: retries.clone(),
            },
            generate_external_ids: settings.generate_external_ids,
            executor: executor.clone(),
            telemetry: telemetry.clone(),
        };
        let (health, web) = (health.clone(), web.clone());
        let (draining, ending) = (not_ready.clone(), stop.drain.clone());
        let options = router::Options {
            with_reflection: settings.reflection,
            web,
            bounds: bounds.clone(),
            draining,
            ending,
        };
        GrpcServices::new(gateway, health, options).map_err(StartError::Reflection)
    };
    let workers = workers::start().map_err(StartError::Threads)?;
    let pulse = workers::Pulse::of(&workers);
    let workers: Vec<_> = workers
        .into_iter()
        .map(|worker| Ok((worker, Arc::new(services()?))))
        .collect::<Result<_, StartError>>()?;

    let admin_pages = Admin {
        telemetry: telemetry.clone(),
        log_level,
        draining: not_ready.clone(),
        workers: pulse,
    };
    tokio::spawn(admin::serve(admin_listener, admin_pages));
    let limits = Limits {
        connections: max_connections,
        age: settings.max_connection_age,
    };
    let server = Server::new(tls, limits, telemetry.clone(), stop.clone());
    tokio::spawn(server.accept(listener, workers));
    telemetry.set_ready(true);
    Ok(Running {
        listen,
        admin,
        health,
        not_ready,
        stop,
        executor,
        telemetry,
        drain_delay: settings.drain_delay,
        drain_timeout: settings.drain_timeout,
    })
}

async fn set_health(health: &HealthReporter, status: ServingStatus) {
    for service in ["", SERVICE_NAME] {
        health.set_service_status(service, status).await;
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Listen::Unix(path) = &self.listen {
            let _ = std::fs::remove_file(path);
        }
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
        tracing::info!(calls_in_flight = self.executor.in_flight(), "draining");
        self.not_ready.cancel();
        self.telemetry.set_ready(false);
        set_health(&self.health, ServingStatus::NotServing).await;
        tokio::time::sleep(self.drain_delay).await;

        for service in ["", SERVICE_NAME] {
            self.health.clear_service_status(service).await; // ends Health/Watch streams
        }
        self.stop.drain.cancel();
        self.stop.connections.close();
        let finished = async {
            self.stop.connections.wait().await;
            self.executor.finished().await;
        };
        if tokio::time::timeout(self.drain_timeout, finished)
            .await
            .is_err()
        {
            tracing::warn!(
                connections = self.stop.connections.len(),
                calls_in_flight = self.executor.in_flight(),
                "drain timeout: calls in flight are answered now"
            );
            self.executor.shut_down();
            let told = tokio::time::timeout(LAST_ANSWERS, self.stop.connections.wait());
            let _ = told.await;
            self.stop.kill.cancel();
        }
        tracing::info!("stopped");
    }
}

//! Assembles the gateway from its configuration, and stops it gracefully.

/// Logs a warning that a peer can cause at will: at most one line a second, with the number of
/// lines suppressed since the last one.
macro_rules! warn_throttled {
    ($($arguments:tt)+) => {{
        static THROTTLE: crate::telemetry::Throttle = crate::telemetry::Throttle::new();
        if let Some(suppressed) = THROTTLE.permit() {
            tracing::warn!(suppressed, $($arguments)+);
        }
    }};
}

mod admin;
mod arrival;
mod authority;
mod body;
mod connection;
mod grpc_web;
mod health;
mod listener;
mod open_files;
mod response;
mod router;
mod tls;
mod workers;
mod writes;

use std::{fmt, io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{net::TcpListener, sync::Semaphore, time::timeout};
use tokio_util::sync::CancellationToken;
use tonic_health::{ServingStatus, server::HealthReporter};

use self::{
    admin::Admin,
    arrival::Bounds,
    connection::{ConnectionServer, Shutdown},
    grpc_web::Web,
    listener::Listener,
    router::GrpcServices,
    tls::Tls,
    workers::WorkerCheck,
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
    upstream::{MAX_READ_BYTES, Upstream},
};

/// After the drain timeout: how long connections may take to send the last responses.
const FINAL_FLUSH: Duration = Duration::from_millis(500);

/// The names in health checks: the empty one is the server as a whole.
const HEALTH_SERVICES: [&str; 2] = ["", SERVICE_NAME];

/// Why the gateway did not start.
#[derive(Debug)]
pub enum StartError {
    /// The gateway cannot listen on an address.
    Listen(String, io::Error),
    /// The certificates are no longer valid.
    Tls(Vec<String>),
    /// The threads could not be started.
    Threads(io::Error),
    /// There is no certificate authority to trust for connections to the API.
    Trust(rustls::Error),
    /// The HTTP client could not be made.
    Client(reqwest::Error),
    /// The built-in descriptors are malformed.
    Reflection(tonic_reflection::server::Error),
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StartError::Listen(place, error) => write!(f, "cannot listen on {place}: {error}"),
            StartError::Tls(problems) => write!(f, "{}", problems.join("; ")),
            StartError::Threads(error) => write!(f, "cannot start threads: {error}"),
            StartError::Trust(error) => write!(f, "{}: {error}", http_client::NO_TRUSTED_CA),
            StartError::Client(error) => write!(f, "cannot create an HTTP client: {error:?}"),
            StartError::Reflection(error) => write!(f, "cannot serve reflection: {error}"),
        }
    }
}

impl std::error::Error for StartError {}

/// A gateway that serves calls.
pub struct Running {
    listen: Listen,
    admin: SocketAddr,
    shutdown: Shutdown,
    shared: Shared,
}

/// What the workers share.
struct Shared {
    config: Config,
    upstream_tls: rustls::ClientConfig,
    executor: Executor<CreatedBatch>,
    retries: Arc<Retries>,
    read_bytes: Arc<Semaphore>,
    create_state: Arc<CreateState>,
    health: HealthReporter,
    options: router::Options,
    telemetry: Arc<Telemetry>,
}

/// Starts the gateway. It serves calls when this returns.
pub async fn start(
    mut config: Config,
    telemetry: Arc<Telemetry>,
    log_level: LogLevel,
) -> Result<Running, StartError> {
    let settings = &config.settings;
    let max_connections = open_files::raise_limit(settings.max_connections, settings.max_in_flight);
    telemetry.set_max_connections(max_connections);
    let (listener, listen) = Listener::bind(&settings.listen)
        .await
        .map_err(|error| StartError::Listen(settings.listen.to_string(), error))?;
    let cannot_listen = |error| StartError::Listen(settings.admin_listen.to_string(), error);
    let admin_listener = TcpListener::bind(settings.admin_listen)
        .await
        .map_err(cannot_listen)?;
    let admin = admin_listener.local_addr().map_err(cannot_listen)?;
    let max_age = settings.max_connection_age;
    let tls = start_tls(&mut config, &telemetry)?;

    let shutdown = Shutdown::default();
    let shared = Shared::new(config, &shutdown, max_connections, telemetry.clone())?;
    set_health(&shared.health, ServingStatus::Serving).await;
    let workers = workers::start().map_err(StartError::Threads)?;
    let worker_check = WorkerCheck::new(&workers);
    let workers: Vec<_> = workers
        .into_iter()
        .map(|worker| Ok((worker, Arc::new(shared.services()?))))
        .collect::<Result<_, StartError>>()?;

    let admin_pages = Admin {
        telemetry: telemetry.clone(),
        log_level,
        draining: shared.options.draining.clone(),
        workers: worker_check,
    };
    tokio::spawn(admin::serve(admin_listener, admin_pages));
    let server = ConnectionServer::new(tls, max_age, telemetry.clone(), shutdown.clone());
    tokio::spawn(listener.serve(Arc::new(server), workers, max_connections));
    telemetry.set_ready(true);
    Ok(Running {
        listen,
        admin,
        shutdown,
        shared,
    })
}

fn start_tls(config: &mut Config, telemetry: &Arc<Telemetry>) -> Result<Option<Tls>, StartError> {
    // The protocols to negotiate in the handshake (RFC 7301).
    let alpn: &[&str] = match config.settings.grpc_web {
        true => &["h2", "http/1.1"],
        false => &["h2"],
    };
    let tls = config.tls.take();
    let tls = tls.map(|tls| Tls::start(tls, alpn, telemetry.clone()));
    tls.transpose().map_err(StartError::Tls)
}

impl Shared {
    fn new(
        config: Config,
        shutdown: &Shutdown,
        max_connections: usize,
        telemetry: Arc<Telemetry>,
    ) -> Result<Self, StartError> {
        let settings = &config.settings;
        let retries = Arc::new(Retries::new(telemetry.clone()));
        let web = settings.grpc_web.then(|| {
            Arc::new(Web {
                origins: settings.grpc_web_origins.clone(),
                metadata: config.credentials.forward.clone(),
            })
        });
        Ok(Shared {
            upstream_tls: http_client::tls(&config.upstream).map_err(StartError::Trust)?,
            executor: Executor::new(
                settings.max_in_flight,
                service::create_completion,
                telemetry.clone(),
            ),
            create_state: Arc::new(CreateState::new(
                settings.lookup,
                settings.request_timeout,
                retries.clone(),
                telemetry.clone(),
            )),
            retries,
            read_bytes: Arc::new(Semaphore::new(MAX_READ_BYTES)),
            health: HealthReporter::new(),
            options: router::Options {
                with_reflection: settings.reflection,
                web,
                bounds: Bounds::new(settings.max_in_flight, max_connections),
                draining: CancellationToken::new(),
                ending: shutdown.drain.clone(),
            },
            telemetry,
            config,
        })
    }

    /// The services of one worker. Each worker has its own HTTP client, so that a call and its
    /// connection to the API stay on one thread.
    fn services(&self) -> Result<GrpcServices, StartError> {
        let (config, telemetry) = (&self.config, self.telemetry.clone());
        let upstream = Upstream::new(
            &config.upstream,
            self.upstream_tls.clone(),
            telemetry.clone(),
            self.read_bytes.clone(),
        )
        .map_err(StartError::Client)?;
        let gateway = Gateway {
            credentials: config.credentials.clone(),
            creator: Arc::new(BatchCreator::new(
                upstream.clone(),
                self.create_state.clone(),
            )),
            reader: Reader {
                upstream: Arc::new(upstream),
                retries: self.retries.clone(),
            },
            generate_external_ids: config.settings.generate_external_ids,
            executor: self.executor.clone(),
            telemetry,
        };
        GrpcServices::new(gateway, self.health.clone(), self.options.clone())
            .map_err(StartError::Reflection)
    }
}

async fn set_health(health: &HealthReporter, status: ServingStatus) {
    for service in HEALTH_SERVICES {
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
    /// The address that serves gRPC.
    pub fn listen(&self) -> &Listen {
        &self.listen
    }

    /// The address of the admin pages.
    pub fn admin(&self) -> SocketAddr {
        self.admin
    }

    /// Stops: reports NOT_SERVING, waits until load balancers have noticed, sends GOAWAY, lets
    /// calls in flight finish, and ends the rest after the drain timeout.
    pub async fn drain(self) {
        let Shared {
            config: Config { settings, .. },
            executor,
            health,
            options,
            telemetry,
            ..
        } = &self.shared;
        let connections = &self.shutdown.connections;
        tracing::info!(calls_in_flight = executor.in_flight(), "draining");
        options.draining.cancel();
        telemetry.set_ready(false);
        set_health(health, ServingStatus::NotServing).await;
        tokio::time::sleep(settings.drain_delay).await;

        let mut health = health.clone();
        for service in HEALTH_SERVICES {
            health.clear_service_status(service).await; // ends Health/Watch streams
        }
        self.shutdown.drain.cancel();
        connections.close();
        let finished = async {
            connections.wait().await;
            executor.finished().await;
        };
        if timeout(settings.drain_timeout, finished).await.is_err() {
            tracing::warn!(
                connections = connections.len(),
                calls_in_flight = executor.in_flight(),
                "drain timeout: ending the calls in flight"
            );
            executor.shut_down();
            let _ = timeout(FINAL_FLUSH, connections.wait()).await;
            self.shutdown.kill.cancel();
        }
        tracing::info!("stopped");
    }
}

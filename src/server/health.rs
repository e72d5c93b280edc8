//! `grpc.health.v1`.

use std::pin::Pin;

use tokio::sync::mpsc;
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status};
use tonic_health::{
    pb::{
        HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus,
        health_server,
    },
    server::{HealthReporter, HealthService},
};

/// tonic-health, except for `Watch` of an unknown service: the protocol requires SERVICE_UNKNOWN
/// and an open stream, where tonic-health returns NOT_FOUND.
#[derive(Debug)]
pub(super) struct Health {
    services: HealthService,
    ending: CancellationToken,
}

impl Health {
    /// Streams end when `ending` is cancelled.
    pub(super) fn new(reporter: HealthReporter, ending: CancellationToken) -> Self {
        let services = HealthService::from_health_reporter(reporter);
        Health { services, ending }
    }
}

#[tonic::async_trait]
impl health_server::Health for Health {
    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        self.services.check(request).await
    }

    type WatchStream =
        Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send + 'static>>;

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        match self.services.watch(request).await {
            Ok(known) => Ok(known.map(|statuses| Box::pin(statuses) as Self::WatchStream)),
            Err(status) if status.code() == Code::NotFound => {
                let (sender, unknown) = mpsc::channel(1);
                let status = ServingStatus::ServiceUnknown.into();
                let _ = sender.try_send(Ok(HealthCheckResponse { status })); // the channel is empty
                let ending = self.ending.clone();
                tokio::spawn(async move {
                    tokio::select! {
                        () = sender.closed() => {}
                        () = ending.cancelled() => {}
                    }
                });
                Ok(Response::new(Box::pin(ReceiverStream::new(unknown))))
            }
            Err(status) => Err(status),
        }
    }
}

//! `demo`: a simulated API for the gateway, and one call through both.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use http::Uri;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
};
use tonic::{Request, metadata::MetadataValue};

use super::{eprint, print};
use crate::{
    config::{Config, Listen},
    headers,
    proto::v1::{Batch, CreateBatchRequest, batch_service_client::BatchServiceClient},
};
use aep_simulator::{Simulator, SimulatorOptions};

/// The dataset of the documentation's own example.
const DATASET: &str = "5c8c3c555033b814b69f947f";

/// The credentials of the demo's calls, in the order of [`headers::CREDENTIALS`].
const CREDENTIALS: [&str; 4] = ["Bearer demo", "demo", "demo@AdobeOrg", "prod"];

/// Where the simulated API listens, if it can: a port that the documentation can name.
const SIMULATOR: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8080);

/// Starts the simulated API and points the gateway at it.
pub(super) async fn simulator(config: &mut Config) -> io::Result<Simulator> {
    let start = |address| Simulator::start(address, SimulatorOptions::default());
    let simulator = match start(SIMULATOR).await {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            let simulator = start((Ipv4Addr::LOCALHOST, 0).into()).await?;
            let address = simulator.address();
            eprint(&format!(
                "{SIMULATOR} is in use: the simulated API listens on {address}"
            ));
            simulator
        }
        started => started?,
    };
    config.upstream.import_url = simulator.import_url().parse().map_err(io::Error::other)?;
    config.upstream.catalog_url = simulator.catalog_url().parse().map_err(io::Error::other)?;
    Ok(simulator)
}

/// Makes one call through the gateway, and prints how to make another.
pub(super) async fn show(listen: &Listen, simulator: &Simulator) -> io::Result<()> {
    let message = CreateBatchRequest {
        dataset_id: DATASET.to_owned(),
        ..Default::default()
    };
    let mut request = Request::new(message);
    for (name, value) in headers::CREDENTIALS.iter().zip(CREDENTIALS) {
        let value = MetadataValue::from_static(value);
        request.metadata_mut().insert(name.as_str(), value);
    }
    let batch = match listen {
        Listen::Tcp(address) => create_batch(TcpStream::connect(address).await?, request).await?,
        Listen::Unix(path) => create_batch(UnixStream::connect(path).await?, request).await?,
    };
    let id = &batch.id;
    let status = batch.status().as_str_name();
    let created = batch.created.unwrap_or_default();

    let headers: String = headers::CREDENTIALS
        .iter()
        .zip(CREDENTIALS)
        .map(|(name, value)| format!("  -H '{name}: {value}' \\\n"))
        .collect();
    let target = match listen {
        Listen::Tcp(address) => address.to_string(),
        Listen::Unix(path) => format!("-unix {}", path.display()),
    };
    let upstream = simulator.address();
    print(&format!(
        "CreateBatch created a batch for dataset {DATASET}:\n\n  \
         id       {id}\n  status   {status}\n  created  {created}\n\n\
         Try it in another terminal:\n\n\
         grpcurl -plaintext \\\n{headers}  -d '{{\"dataset_id\": \"{DATASET}\"}}' \\\n  \
         {target} aep.ingestion.v1.BatchService/CreateBatch\n\n\
         To see a lost response, run this before the next call:\n\n\
         curl -d reset-after http://{upstream}/_simulator/faults\n\n\
         Serving until Ctrl-C."
    ))
}

/// One call over a connection of its own.
async fn create_batch<S>(stream: S, request: Request<CreateBatchRequest>) -> io::Result<Batch>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let connected = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await;
    let (sender, connection) = connected.map_err(io::Error::other)?;
    tokio::spawn(connection);
    let service = tower::service_fn(move |request| sender.clone().send_request(request));
    let mut client = BatchServiceClient::with_origin(service, Uri::from_static("http://localhost"));
    let response = client
        .create_batch(request)
        .await
        .map_err(io::Error::other)?;
    Ok(response
        .into_inner()
        .batch
        .map(|batch| *batch)
        .unwrap_or_default())
}

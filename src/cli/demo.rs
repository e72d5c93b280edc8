//! `demo`: the gateway on a simulated upstream, and one call to show it.

use std::io;

use http::{HeaderMap, HeaderValue};
use tonic::metadata::MetadataMap;

use super::{connect, say};
use crate::{
    config::{Config, Listen},
    headers,
    proto::v1::{CreateBatchRequest, batch_service_client::BatchServiceClient},
    simulator::{Simulator, SimulatorOptions},
};

/// The dataset of the documentation's own example.
const DATASET: &str = "5c8c3c555033b814b69f947f";

/// What the demo's calls say of themselves, in the order of
/// [`headers::CREDENTIALS`].
const CREDENTIALS: [&str; 4] = ["Bearer demo", "demo", "demo@AdobeOrg", "prod"];

/// Starts a simulated upstream and makes the gateway use it.
pub(super) async fn simulator(config: &mut Config) -> io::Result<Simulator> {
    let simulator =
        Simulator::start(([127, 0, 0, 1], 0).into(), SimulatorOptions::default()).await?;
    config.upstream.import_url = simulator.import_url().parse().map_err(io::Error::other)?;
    config.upstream.catalog_url = simulator.catalog_url().parse().map_err(io::Error::other)?;
    Ok(simulator)
}

/// Makes one call through the whole gateway, and says how to make another.
pub(super) async fn show(listen: &Listen, simulator: &Simulator) -> io::Result<()> {
    let mut client = BatchServiceClient::new(connect(listen)?);
    let message = CreateBatchRequest {
        dataset_id: DATASET.to_owned(),
        ..Default::default()
    };
    let mut metadata = HeaderMap::new();
    for (name, value) in headers::CREDENTIALS.iter().zip(CREDENTIALS) {
        metadata.insert(name, HeaderValue::from_static(value));
    }
    let metadata = MetadataMap::from_headers(metadata);
    let request = tonic::Request::from_parts(metadata, Default::default(), message);
    let answer = client
        .create_batch(request)
        .await
        .map_err(io::Error::other)?;
    let batch = answer.into_inner().batch.unwrap_or_default();
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
    say(&format!(
        "CreateBatch for dataset {DATASET} made a batch:\n\n  \
         id       {id}\n  status   {status}\n  created  {created}\n\n\
         Now you, in another terminal:\n\n\
         grpcurl -plaintext \\\n{headers}  -d '{{\"dataset_id\": \"{DATASET}\"}}' \\\n  \
         {target} aep.ingestion.v1.BatchService/CreateBatch\n\n\
         What a lost answer looks like: run this before the next call.\n\n\
         curl -d reset-after-create http://{upstream}/_simulator/faults\n\n\
         Serving until Ctrl-C."
    ))
}

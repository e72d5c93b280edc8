//! The floor: the least that a gRPC server (tonic) in front of a REST API
//! (reqwest) can do. It decodes the message, posts it as JSON with the caller's
//! four credentials, reads the answer and encodes it. No checks, no errors that
//! say what happened, no metrics, no logs, no deadline, no limit.
//!
//! `bridge LISTEN BASE_URL THREADS 1|2 [CA_FILE]`

#![expect(
    clippy::disallowed_methods,
    reason = "the gateway's house rules, which its floor does without"
)]

use std::{borrow::Cow, collections::BTreeMap, env, error::Error, fs, net::SocketAddr};

use http::{HeaderMap, HeaderName, header};
use prost_types::Timestamp;
use reqwest::{Client, Url};
use serde::{Deserialize, Serialize};
use tonic::{Request, Response, Status, transport::Server};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

mod proto {
    #![allow(clippy::doc_lazy_continuation)]
    tonic::include_proto!("aep.ingestion.v1");
}
use proto::{
    Batch, BatchOrigin, BatchStatus, CreateBatchRequest, CreateBatchResponse, InputFormat,
    RelatedObject, TagValues,
    batch_service_server::{BatchService, BatchServiceServer},
};

const CREDENTIALS: [HeaderName; 4] = [
    header::AUTHORIZATION,
    HeaderName::from_static("x-api-key"),
    HeaderName::from_static("x-gw-ims-org-id"),
    HeaderName::from_static("x-sandbox-name"),
];

/// The members of the request that the benchmark sends.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct RequestJson<'a> {
    dataset_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    external_id: Option<&'a str>,
}

/// The members of the answer that the benchmark gets.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct BatchJson<'a> {
    id: String,
    ims_org: Option<String>,
    updated: Option<i64>,
    created: Option<i64>,
    #[serde(borrow)]
    status: Cow<'a, str>,
    related_objects: Vec<RelatedJson>,
    version: Option<String>,
    tags: BTreeMap<String, Vec<String>>,
    created_user: Option<String>,
    updated_user: Option<String>,
    external_id: Option<String>,
    created_client: Option<String>,
    input_format: Option<FormatJson>,
}

#[derive(Deserialize)]
struct RelatedJson {
    r#type: Option<String>,
    id: Option<String>,
}

#[derive(Deserialize)]
struct FormatJson {
    format: Option<String>,
}

impl From<BatchJson<'_>> for Batch {
    fn from(json: BatchJson<'_>) -> Self {
        Batch {
            id: json.id,
            ims_org: json.ims_org,
            updated: json.updated.map(instant),
            created: json.created.map(instant),
            status: match &*json.status {
                "loading" => BatchStatus::Loading.into(),
                _ => BatchStatus::Unspecified.into(),
            },
            related_objects: (json.related_objects.into_iter())
                .map(|object| RelatedObject {
                    r#type: object.r#type,
                    id: object.id,
                    ..Default::default()
                })
                .collect(),
            version: json.version,
            tags: (json.tags.into_iter())
                .map(|(name, values)| (name, TagValues { values }))
                .collect(),
            created_user: json.created_user,
            updated_user: json.updated_user,
            external_id: json.external_id,
            created_client: json.created_client,
            input_format: json.input_format.map(|format| InputFormat {
                format: format.format,
                ..Default::default()
            }),
            ..Default::default()
        }
    }
}

fn instant(milliseconds: i64) -> Timestamp {
    Timestamp {
        seconds: milliseconds.div_euclid(1000),
        nanos: milliseconds.rem_euclid(1000) as i32 * 1_000_000,
    }
}

struct Bridge {
    client: Client,
    batches: Url,
}

impl Bridge {
    async fn bridge(
        &self,
        metadata: &HeaderMap,
        message: &CreateBatchRequest,
    ) -> Result<Batch, Box<dyn Error + Send + Sync>> {
        let mut headers = HeaderMap::with_capacity(8);
        for name in CREDENTIALS {
            if let Some(value) = metadata.get(&name) {
                headers.insert(name, value.clone());
            }
        }
        let json = header::HeaderValue::from_static("application/json");
        headers.insert(header::CONTENT_TYPE, json);
        let body = serde_json::to_vec(&RequestJson {
            dataset_id: &message.dataset_id,
            external_id: message.external_id.as_deref(),
        })?;
        let request = self.client.post(self.batches.clone()).headers(headers);
        let answer = request.body(body).send().await?.bytes().await?;
        let batch: BatchJson<'_> = serde_json::from_slice(&answer)?;
        Ok(batch.into())
    }
}

#[tonic::async_trait]
impl BatchService for Bridge {
    async fn create_batch(
        &self,
        request: Request<CreateBatchRequest>,
    ) -> Result<Response<CreateBatchResponse>, Status> {
        let (metadata, _, message) = request.into_parts();
        let batch = self.bridge(metadata.as_ref(), &message).await;
        let batch = batch.map_err(|error| Status::unknown(error.to_string()))?;
        Ok(Response::new(CreateBatchResponse {
            batch: Some(batch),
            origin: BatchOrigin::Created.into(),
        }))
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<_> = env::args().skip(1).collect();
    let [listen, base, threads, http, ca_file @ ..] = args.as_slice() else {
        return Err("usage: bridge LISTEN BASE_URL THREADS 1|2 [CA_FILE]".into());
    };
    let listen: SocketAddr = listen.parse()?;
    let mut client = Client::builder().no_proxy();
    if let [ca_file] = ca_file {
        let ca = reqwest::Certificate::from_pem(&fs::read(ca_file)?)?;
        client = client.tls_certs_only([ca]);
    }
    if http == "2" {
        client = client.http2_prior_knowledge();
    }
    let mut runtime = match threads.as_str() {
        "1" => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    let runtime = runtime
        .worker_threads(threads.parse()?)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let bridge = Bridge {
            client: client.build()?,
            batches: format!("{base}/batches").parse()?,
        };
        let server = Server::builder().add_service(BatchServiceServer::new(bridge));
        Ok(server.serve(listen).await?)
    })
}

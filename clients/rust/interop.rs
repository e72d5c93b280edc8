//! Makes the calls that tests/e2e/clients asks for: a line of JSON in, a line out.

use std::{cell::RefCell, collections::HashMap, error::Error, future::Future, time::Duration};

use create_batch::{
    code_name, retrying,
    v1::{
        CreateBatchRequest, CreateBatchResponse, GetBatchRequest, GetBatchResponse,
        ListBatchesRequest, ListBatchesResponse,
    },
};
use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage};
use serde_json::{Map, Value, json};
use tokio::{
    io::{AsyncBufReadExt, BufReader, stdin},
    time::timeout,
};
use tokio_stream::iter;
use tonic::{
    Request, Status,
    client::Grpc,
    codec::CompressionEncoding,
    metadata::{AsciiMetadataKey, KeyAndValueRef, MetadataMap},
    transport::{Channel, Endpoint},
};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse, health_client::HealthClient};
use tonic_prost::ProstCodec;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

struct Client {
    pool: DescriptorPool,
    channels: HashMap<String, Channel>,
}

impl Client {
    fn channel(&mut self, order: &Value) -> Result<Channel> {
        let (address, keepalive) = (text(&order["address"]), &order["keepalive"]);
        let key = format!("{address} {keepalive}");
        if !self.channels.contains_key(&key) {
            let mut endpoint = Endpoint::from_shared(format!("http://{address}"))?;
            if !keepalive.is_null() {
                endpoint = endpoint
                    .http2_keep_alive_interval(seconds(keepalive))
                    .keep_alive_while_idle(true);
            }
            self.channels.insert(key.clone(), endpoint.connect_lazy());
        }
        Ok(self.channels[&key].clone())
    }

    fn json(&self, name: &str, message: &[u8]) -> Result<Value> {
        let descriptor = self
            .pool
            .get_message_by_name(name)
            .ok_or("no such message")?;
        Ok(serde_json::to_value(DynamicMessage::decode(
            descriptor, message,
        )?)?)
    }

    async fn call<Q, A>(&mut self, order: &Value) -> Result<Value>
    where
        Q: Message + Default + Clone + 'static,
        A: Message + Default + 'static,
    {
        let channel = self.channel(order)?;
        let name = format!("aep.ingestion.v1.{}", text(&order["method"]));
        let descriptor = self.pool.get_message_by_name(&format!("{name}Request"));
        let message =
            DynamicMessage::deserialize(descriptor.ok_or("no request")?, &order["request"])?;
        let message: Q = message.transcode_to()?;
        let mut metadata = MetadataMap::new();
        for pair in order["metadata"].as_array().ok_or("no metadata")? {
            let name = AsciiMetadataKey::from_bytes(text(&pair[0]).as_bytes())?;
            metadata.append(name, text(&pair[1]).parse()?);
        }
        let path = match order["path"].as_str() {
            Some(path) => path.to_owned(),
            None => format!("/aep.ingestion.v1.BatchService/{}", text(&order["method"])),
        };

        // A unary call, read like a stream: tonic else joins headers and trailers.
        let headers = RefCell::new(MetadataMap::new());
        let call = retrying(seconds(&order["seconds"]), |left| {
            let mut request =
                Request::from_parts(metadata.clone(), Default::default(), message.clone());
            request.set_timeout(left);
            let (channel, headers, path) = (channel.clone(), &headers, &path);
            async move {
                let mut client = Grpc::new(channel);
                if order["compression"] == "gzip" {
                    client = client.send_compressed(CompressionEncoding::Gzip);
                }
                client
                    .ready()
                    .await
                    .map_err(|error| Status::unavailable(error.to_string()))?;
                let codec = ProstCodec::<Q, A>::default();
                let path = path.parse().map_err(|_| Status::internal("a bad path"))?;
                headers.take();
                let mut answer = client.server_streaming(request, path, codec).await?;
                headers.replace(answer.metadata().clone());
                let message = answer.get_mut().message().await?;
                let message = message.ok_or_else(|| Status::internal("no message"))?;
                let trailers = answer.get_mut().trailers().await?.unwrap_or_default();
                Ok((message, trailers))
            }
        });
        let ended = match order["cancelAfter"].is_null() {
            true => call.await,
            false => match timeout(seconds(&order["cancelAfter"]), call).await {
                Ok(ended) => ended,
                Err(_) => Err(Status::cancelled("")),
            },
        };
        let mut told = match ended {
            Ok((message, trailers)) => json!({
                "code": "OK",
                "message": "",
                "answer": self.json(&format!("{name}Response"), &message.encode_to_vec())?,
                "trailers": all_text(&trailers),
            }),
            Err(status) => {
                let mut told = failed(&status);
                told["trailers"] = all_text(status.metadata());
                if !status.details().is_empty() {
                    told["status"] = self.json("google.rpc.Status", status.details())?;
                }
                told
            }
        };
        told["headers"] = all_text(&headers.borrow());
        Ok(told)
    }

    fn health(&mut self, order: &Value) -> Result<(HealthClient<Channel>, HealthCheckRequest)> {
        let service = text(&order["service"]).to_owned();
        Ok((
            HealthClient::new(self.channel(order)?),
            HealthCheckRequest { service },
        ))
    }

    async fn check(&mut self, order: &Value) -> Result<Value> {
        let (mut client, request) = self.health(order)?;
        Ok(serving(&client.check(request).await?.into_inner()))
    }

    async fn watch(&mut self, order: &Value) -> Result<Value> {
        let (mut client, request) = self.health(order)?;
        let mut answers = client.watch(request).await?.into_inner();
        Ok(serving(&answers.message().await?.unwrap_or_default()))
    }

    async fn reflect(&mut self, order: &Value) -> Result<Value> {
        let (channel, service) = (self.channel(order)?, text(&order["service"]).to_owned());
        // Both versions have the same messages, but types of their own.
        macro_rules! ask {
            ($version:ident) => {{
                use tonic_reflection::pb::$version::{
                    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
                    server_reflection_request::MessageRequest,
                    server_reflection_response::MessageResponse,
                };
                let requests = [
                    MessageRequest::ListServices("*".to_owned()),
                    MessageRequest::FileContainingSymbol(service),
                ];
                let requests = requests.map(|request| ServerReflectionRequest {
                    host: String::new(),
                    message_request: Some(request),
                });
                let mut client = ServerReflectionClient::new(channel);
                let mut answers = client
                    .server_reflection_info(iter(requests))
                    .await?
                    .into_inner();
                let (mut services, mut files) = (Vec::new(), Vec::new());
                while let Some(answer) = answers.message().await? {
                    match answer.message_response {
                        Some(MessageResponse::ListServicesResponse(list)) => {
                            services.extend(list.service.into_iter().map(|service| service.name));
                        }
                        Some(MessageResponse::FileDescriptorResponse(found)) => {
                            files.extend(found.file_descriptor_proto);
                        }
                        other => return Err(format!("{other:?}").into()),
                    }
                }
                (services, files)
            }};
        }
        let (services, files) = match text(&order["version"]) {
            "v1" => ask!(v1),
            _ => ask!(v1alpha),
        };
        let mut methods = Vec::new();
        for file in files {
            for service in prost_types::FileDescriptorProto::decode(&file[..])?.service {
                methods.extend(
                    service
                        .method
                        .into_iter()
                        .map(|method| method.name().to_owned()),
                );
            }
        }
        Ok(json!({ "services": services, "methods": methods }))
    }
}

fn serving(answer: &HealthCheckResponse) -> Value {
    json!({ "status": answer.status().as_str_name() })
}

fn failed(status: &Status) -> Value {
    json!({ "code": code_name(status.code()), "message": status.message() })
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn seconds(value: &Value) -> Duration {
    Duration::from_secs_f64(value.as_f64().unwrap_or_default())
}

fn all_text(metadata: &MetadataMap) -> Value {
    let pairs = metadata.iter().filter_map(|pair| match pair {
        KeyAndValueRef::Ascii(name, value) => Some((name.to_string(), value.to_str().ok()?.into())),
        KeyAndValueRef::Binary(..) => None,
    });
    Value::Object(pairs.collect::<Map<_, _>>())
}

/// Any call's error as it is told.
async fn told(call: impl Future<Output = Result<Value>>) -> Result<Value> {
    call.await.or_else(|error| {
        Ok(failed(
            error.downcast_ref::<Status>().ok_or(error.to_string())?,
        ))
    })
}

#[tokio::main]
async fn main() -> Result<()> {
    let descriptors = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
    let pool = DescriptorPool::decode(&descriptors[..])?;
    let mut client = Client {
        pool,
        channels: HashMap::new(),
    };
    let mut lines = BufReader::new(stdin()).lines();
    while let Some(line) = lines.next_line().await? {
        let order: Value = serde_json::from_str(&line)?;
        let result = match (text(&order["do"]), text(&order["method"])) {
            ("call", "GetBatch") => {
                told(client.call::<GetBatchRequest, GetBatchResponse>(&order)).await
            }
            ("call", "ListBatches") => {
                told(client.call::<ListBatchesRequest, ListBatchesResponse>(&order)).await
            }
            ("call", _) => {
                told(client.call::<CreateBatchRequest, CreateBatchResponse>(&order)).await
            }
            ("check", _) => told(client.check(&order)).await,
            ("watch", _) => told(client.watch(&order)).await,
            _ => told(client.reflect(&order)).await,
        };
        println!("{}", result?);
    }
    Ok(())
}

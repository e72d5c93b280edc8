//! The gateway as a user has it: the binary, its flags, and a gRPC client.

use std::{
    process::{ExitStatus, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use aep_batch_gateway::proto::v1::{
    Batch, CreateBatchRequest, CreateBatchResponse, GetBatchRequest, ListBatchesRequest,
    ListBatchesResponse, batch_service_client::BatchServiceClient,
};
use aep_simulator::Simulator;
use bytes::{BufMut, Bytes};
use h2::client::SendRequest;
use http::{HeaderMap, HeaderValue};
use prost::Message;
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, BufReader},
    net::TcpStream,
    process::{Child, Command},
    task::JoinHandle,
    time::timeout,
};
use tonic::{
    Code, Request, Status,
    metadata::MetadataMap,
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt;

/// What nothing here may take longer than.
const LONG: Duration = Duration::from_secs(20);

pub(crate) const CREDENTIALS: [(&str, &str); 4] = [
    ("authorization", "Bearer s3cret-token"),
    ("x-api-key", "s3cret-key"),
    ("x-gw-ims-org-id", "5C1328435BF324E90A49402A@AdobeOrg"),
    ("x-sandbox-name", "prod"),
];

pub(crate) const CREATE: &str = "/aep.ingestion.v1.BatchService/CreateBatch";
pub(crate) const GET: &str = "/aep.ingestion.v1.BatchService/GetBatch";
pub(crate) const LIST: &str = "/aep.ingestion.v1.BatchService/ListBatches";

/// A request with only a dataset.
pub(crate) fn request() -> CreateBatchRequest {
    CreateBatchRequest {
        dataset_id: "5c8c3c555033b814b69f947f".to_owned(),
        ..Default::default()
    }
}

/// A request with a dataset and an external id.
pub(crate) fn with_id(external_id: &str) -> CreateBatchRequest {
    CreateBatchRequest {
        external_id: Some(external_id.to_owned()),
        ..request()
    }
}

/// A request for a batch.
pub(crate) fn get_request(id: &str) -> GetBatchRequest {
    GetBatchRequest {
        batch_id: id.to_owned(),
    }
}

/// A running gateway. Killed when it is dropped.
pub(crate) struct Gateway {
    child: Child,
    /// Where it takes gRPC calls.
    pub(crate) listen: String,
    /// Where its admin pages are.
    pub(crate) admin: String,
    log: Arc<Mutex<String>>,
    log_reader: JoinHandle<()>,
}

impl Gateway {
    /// The program, with nothing of this machine's environment that matters.
    pub(crate) fn command(arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_aep-batch-gateway"));
        for name in ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"] {
            command.env_remove(name).env_remove(name.to_lowercase());
        }
        command.args(arguments).kill_on_drop(true);
        command
    }

    /// `serve` on free ports, in front of `upstream`.
    pub(crate) async fn start(upstream: &str, flags: &[&str]) -> Self {
        let mut arguments = vec![
            "serve",
            "--listen=127.0.0.1:0",
            "--admin-listen=127.0.0.1:0",
            "--upstream-url",
            upstream,
        ];
        arguments.extend(flags);
        Self::spawn(Self::command(&arguments)).await
    }

    /// `serve` in front of a simulated upstream, with its Catalog.
    pub(crate) async fn before(upstream: &Simulator, flags: &[&str]) -> Self {
        let catalog = format!("--catalog-url={}", upstream.catalog_url());
        let flags = [&[catalog.as_str()], flags].concat();
        Self::start(&upstream.import_url(), &flags).await
    }

    pub(crate) async fn spawn(mut command: Command) -> Self {
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Arc::new(Mutex::new(String::new()));
        let mut stderr = BufReader::new(child.stderr.take().unwrap()).lines();
        let log_reader = tokio::spawn({
            let log = log.clone();
            async move {
                while let Ok(Some(line)) = stderr.next_line().await {
                    let mut log = log.lock().unwrap();
                    log.push_str(&line);
                    log.push('\n');
                }
            }
        });
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        timeout(LONG, stdout.read_line(&mut line))
            .await
            .unwrap()
            .unwrap();
        let line: Value = serde_json::from_str(&line)
            .unwrap_or_else(|_| panic!("no first line: {}", log.lock().unwrap()));
        // The pipe must stay open, or the next line ends the gateway.
        tokio::spawn(async move { stdout.read_to_end(&mut Vec::new()).await });
        Gateway {
            child,
            listen: line["listen"].as_str().unwrap().to_owned(),
            admin: line["admin"].as_str().unwrap().to_owned(),
            log,
            log_reader,
        }
    }

    pub(crate) fn channel(&self) -> Channel {
        let target = match self.listen.starts_with("unix:") {
            true => self.listen.clone(),
            false => format!("http://{}", self.listen),
        };
        Endpoint::from_shared(target).unwrap().connect_lazy()
    }

    /// `CreateBatch` with good credentials.
    pub(crate) async fn create(&self, message: CreateBatchRequest) -> Result<Batch, Status> {
        let answer = self.create_with(message, &[]).await?;
        Ok(*answer.batch.unwrap())
    }

    /// `CreateBatch` with good credentials, or with others of the same name.
    pub(crate) async fn create_with(
        &self,
        message: CreateBatchRequest,
        more: &[(&'static str, &'static str)],
    ) -> Result<CreateBatchResponse, Status> {
        let request = with_credentials(message, more);
        let mut client = BatchServiceClient::new(self.channel());
        let answer = timeout(LONG, client.create_batch(request)).await.unwrap()?;
        Ok(answer.into_inner())
    }

    /// `GetBatch` with good credentials.
    pub(crate) async fn get(&self, id: &str) -> Result<Batch, Status> {
        let mut client = BatchServiceClient::new(self.channel());
        let request = with_credentials(get_request(id), &[]);
        let response = timeout(LONG, client.get_batch(request)).await.unwrap()?;
        Ok(response.into_inner().batch.unwrap())
    }

    /// `ListBatches` with good credentials.
    pub(crate) async fn list(
        &self,
        message: ListBatchesRequest,
    ) -> Result<ListBatchesResponse, Status> {
        let mut client = BatchServiceClient::new(self.channel());
        let request = with_credentials(message, &[]);
        let response = timeout(LONG, client.list_batches(request)).await.unwrap()?;
        Ok(response.into_inner())
    }

    /// `CreateBatch` frame by frame, with good credentials and more metadata.
    pub(crate) async fn raw(&self, metadata: &[(&str, &str)]) -> RawAnswer {
        let metadata = [&CREDENTIALS, metadata].concat();
        self.raw_call(CREATE, &metadata, &frame(&request())).await
    }

    /// Like `raw`, with an external id.
    pub(crate) async fn raw_with_id(&self, id: &str, metadata: &[(&str, &str)]) -> RawAnswer {
        let metadata = [&CREDENTIALS, metadata].concat();
        self.raw_call(CREATE, &metadata, &frame(&with_id(id))).await
    }

    /// Any call, frame by frame.
    pub(crate) async fn raw_call(
        &self,
        path: &str,
        metadata: &[(&str, &str)],
        body: &[u8],
    ) -> RawAnswer {
        let stream = TcpStream::connect(&self.listen).await.unwrap();
        let mut client = Client::over(stream).await.unwrap();
        client.call(path, metadata, body).await.unwrap()
    }

    /// A page of the admin listener: status and text.
    pub(crate) async fn page(&self, path: &str) -> (u16, String) {
        let url = format!("http://{}{path}", self.admin);
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let answer = client.get(url).send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    }

    /// What it has logged so far.
    pub(crate) fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// The value of a line of `/metrics`.
    pub(crate) async fn metric(&self, name: &str) -> String {
        let (_, metrics) = self.page("/metrics").await;
        let mut lines = metrics.lines();
        let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value
            .unwrap_or_else(|| panic!("no {name} in {metrics}"))
            .to_owned()
    }

    /// Waits until a line of `/metrics` has this value.
    pub(crate) async fn counts(&self, name: &str, value: &str) {
        let becomes = async {
            while self.metric(name).await != value {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        if timeout(LONG, becomes).await.is_err() {
            panic!("{name} is {}", self.metric(name).await);
        }
    }

    /// Waits until its log has `text`.
    pub(crate) async fn logs(&self, text: &str) {
        let appears = async {
            while !self.log().contains(text) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        if timeout(LONG, appears).await.is_err() {
            panic!("{text} is not in {}", self.log());
        }
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id().unwrap()
    }

    /// Sends SIGTERM.
    pub(crate) fn terminate(&self) {
        self.signal("-TERM");
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: &str) {
        let pid = self.pid().to_string();
        let sent = std::process::Command::new("kill")
            .args([signal, &pid])
            .status();
        assert!(sent.unwrap().success());
    }

    /// Waits for its end: how it ended, and all that it logged.
    pub(crate) async fn ended(mut self) -> (ExitStatus, String) {
        let status = timeout(LONG, self.child.wait()).await.unwrap().unwrap();
        timeout(LONG, self.log_reader).await.unwrap().unwrap();
        let log = self.log.lock().unwrap().clone();
        (status, log)
    }
}

/// A call with good credentials, or with others of the same name.
fn with_credentials<T>(message: T, more: &[(&'static str, &'static str)]) -> Request<T> {
    let mut metadata = HeaderMap::new();
    for (name, value) in CREDENTIALS.iter().chain(more) {
        metadata.insert(*name, HeaderValue::from_static(value));
    }
    let metadata = MetadataMap::from_headers(metadata);
    Request::from_parts(metadata, Default::default(), message)
}

/// A message in gRPC's framing.
pub(crate) fn frame(message: &impl Message) -> Vec<u8> {
    let mut framed = vec![0];
    framed.put_u32(message.encoded_len() as u32);
    message.encode(&mut framed).unwrap();
    framed
}

/// One connection, frame by frame.
#[derive(Clone)]
pub(crate) struct Client {
    sender: SendRequest<Bytes>,
}

impl Client {
    pub(crate) async fn over<S>(stream: S) -> Result<Self, h2::Error>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (sender, connection) = h2::client::handshake(stream).await?;
        tokio::spawn(connection);
        Ok(Client { sender })
    }

    /// `CreateBatch` with good credentials.
    pub(crate) async fn create(&mut self) -> Result<RawAnswer, h2::Error> {
        self.call(CREATE, &CREDENTIALS, &frame(&request())).await
    }

    /// Any call.
    pub(crate) async fn call(
        &mut self,
        path: &str,
        metadata: &[(&str, &str)],
        body: &[u8],
    ) -> Result<RawAnswer, h2::Error> {
        let request = post(path, metadata);
        timeout(LONG, self.exchange(request, body)).await.unwrap()
    }

    /// The response headers of any call.
    pub(crate) async fn head(
        &mut self,
        path: &str,
        metadata: &[(&str, &str)],
        body: &[u8],
    ) -> Result<http::response::Parts, h2::Error> {
        let mut sender = self.sender.clone().ready().await?;
        let (response, mut sender) = sender.send_request(post(path, metadata), false)?;
        sender.send_data(Bytes::copy_from_slice(body), true)?;
        let response = timeout(LONG, response).await.unwrap()?;
        Ok(response.into_parts().0)
    }

    async fn exchange(
        &mut self,
        request: http::Request<()>,
        body: &[u8],
    ) -> Result<RawAnswer, h2::Error> {
        let mut sender = self.sender.clone().ready().await?;
        let (response, mut sender) = sender.send_request(request, false)?;
        sender.send_data(Bytes::copy_from_slice(body), true)?;
        let begin = Instant::now();
        let response = response.await?;
        let headers_after = begin.elapsed();
        let (head, mut body) = response.into_parts();
        let trailers_only = body.is_end_stream();
        let mut message = Vec::new();
        while let Some(data) = body.data().await {
            let data = data?;
            message.extend_from_slice(&data);
            let _ = body.flow_control().release_capacity(data.len());
        }
        let trailers = match trailers_only {
            true => head.headers.clone(),
            false => body.trailers().await?.unwrap_or_default(),
        };
        Ok(RawAnswer {
            http_status: head.status.as_u16(),
            trailers_only,
            headers: head.headers,
            headers_after,
            message,
            trailers,
            ended_after: begin.elapsed(),
        })
    }
}

fn post(path: &str, metadata: &[(&str, &str)]) -> http::Request<()> {
    let mut request =
        http::Request::post(format!("http://localhost{path}")).header("te", "trailers");
    if !metadata.iter().any(|(name, _)| *name == "content-type") {
        request = request.header("content-type", "application/grpc");
    }
    for (name, value) in metadata {
        request = request.header(*name, *value);
    }
    request.body(()).unwrap()
}

/// An answer as it stood on the wire.
#[derive(Debug)]
pub(crate) struct RawAnswer {
    pub(crate) http_status: u16,
    /// Whether all was one HEADERS frame, which clients and meshes may retry.
    pub(crate) trailers_only: bool,
    pub(crate) headers: HeaderMap,
    pub(crate) headers_after: Duration,
    pub(crate) message: Vec<u8>,
    pub(crate) trailers: HeaderMap,
    pub(crate) ended_after: Duration,
}

impl RawAnswer {
    pub(crate) fn status(&self) -> Status {
        Status::from_header_map(&self.trailers).expect("a grpc-status")
    }

    pub(crate) fn code(&self) -> Code {
        self.status().code()
    }

    /// `aep-batch-outcome`, from where the form of the answer has it.
    pub(crate) fn outcome(&self) -> &str {
        self.trailers["aep-batch-outcome"].to_str().unwrap()
    }

    /// What stands in both headers and trailers: Connect joins them, and would
    /// tell it twice.
    pub(crate) fn told_twice(&self) -> Vec<&str> {
        let twice = |name: &&str| !self.trailers_only && self.headers.contains_key(*name);
        let names = self.trailers.keys().map(|name| name.as_str());
        names.filter(twice).collect()
    }

    /// `ErrorInfo`: the reason, and one value of its metadata.
    pub(crate) fn reason(&self) -> String {
        let status = self.status();
        let info = status.get_details_error_info().expect("an ErrorInfo");
        assert_eq!(info.domain, "aep-batch-gateway");
        let outcome = self.trailers.get("aep-batch-outcome");
        let outcome = outcome.map(|outcome| outcome.to_str().unwrap());
        assert_eq!(info.metadata.get("outcome").map(String::as_str), outcome);
        info.reason
    }

    /// That it is the failure of a read: it may be repeated, and changed nothing
    /// whose outcome could be told.
    pub(crate) fn is_failed_read(&self, code: Code, reason: &str, case: &str) {
        assert_eq!((self.code(), &*self.reason()), (code, reason), "{case}");
        assert!(self.trailers_only, "{case}");
        assert!(!self.trailers.contains_key("aep-batch-outcome"), "{case}");
        let retry = self.status().get_details_retry_info();
        let may_help = matches!(code, Code::Unavailable | Code::ResourceExhausted);
        assert_eq!(retry.is_some(), may_help, "{case}: {retry:?}");
        let is_safe = self.trailers.contains_key("aep-batch-retry");
        assert_eq!(is_safe, code == Code::Unavailable, "{case}");
    }

    pub(crate) fn info(&self, key: &str) -> Option<String> {
        let info = self.status().get_details_error_info()?;
        info.metadata.get(key).cloned()
    }

    /// What HTTP/2 counts for the metadata (RFC 9113, section 6.5.2).
    pub(crate) fn metadata_size(&self) -> usize {
        let size = |map: &HeaderMap| -> usize {
            map.iter()
                .map(|(name, value)| name.as_str().len() + value.len() + 32)
                .sum()
        };
        match self.trailers_only {
            true => size(&self.headers),
            false => size(&self.headers) + size(&self.trailers),
        }
    }
}

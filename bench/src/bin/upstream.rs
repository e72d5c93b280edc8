//! The API of the benchmark: answers every create with the documented batch, as
//! cheaply as hyper can, so that the machine's time is left to who is measured.
//!
//! `upstream CA_FILE` prints where it listens: without TLS and with it, HTTP/1.1
//! and HTTP/2 on both. `GET /_set/6/50` makes answers of 6 KB after 50 ms from
//! then on; `GET /_creates` says how many creates have come in.

use std::{
    convert::Infallible,
    env, fs, io,
    io::Write,
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use rcgen::{CertifiedKey, generate_simple_self_signed};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpSocket},
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
    },
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The documented answer ("Create a batch" in the Catalog guide).
const BATCH: &str = r#"{"id":"5d01230fc78a4e4f8c0c6b387b4b8d1c","imsOrg":"{ORG_ID}","updated":1552694873602,"status":"loading","created":1552694873602,"relatedObjects":[{"type":"dataSet","id":"5c8c3c555033b814b69f947f"}],"version":"1.0.0","tags":{"acp_producer":["{CREATED_CLIENT}"],"acp_stagePath":["{CREATED_CLIENT}/stage/5d01230fc78a4e4f8c0c6b387b4b8d1c"],"use_plan_b_batch_status":["false"]},"createdUser":"{CREATED_BY}","updatedUser":"{CREATED_BY}","externalId":"5d01230fc78a4e4f8c0c6b387b4b8d1c","createdClient":"{CREATED_CLIENT}","inputFormat":{"format":"parquet"}}"#;

/// What larger answers have more of.
const RELATED: &str = r#"{"type":"dataSetFile","id":"5d01230fc78a4e4f8c0c6b387b4b8d1c"},"#;

struct Api {
    answers: [(&'static str, Bytes); 3],
    answer: AtomicUsize,
    latency: AtomicU64,
    creates: AtomicU64,
}

fn answer_of(bytes: usize) -> Bytes {
    let (begin, end) = BATCH.split_at(BATCH.find("{\"type\"").expect("related objects"));
    let more = bytes.saturating_sub(BATCH.len()) / RELATED.len();
    format!("{begin}{}{end}", RELATED.repeat(more)).into()
}

impl Api {
    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let path = request.uri().path();
        if path == "/_creates" {
            return Response::new(self.creates.load(Relaxed).to_string().into());
        }
        if let Some(settings) = path.strip_prefix("/_set/") {
            return self.set(settings);
        }
        self.creates.fetch_add(1, Relaxed);
        let _ = request.into_body().collect().await;
        let latency = self.latency.load(Relaxed);
        if latency > 0 {
            tokio::time::sleep(Duration::from_millis(latency)).await;
        }
        let (_, answer) = &self.answers[self.answer.load(Relaxed)];
        let mut response = Response::new(Full::new(answer.clone()));
        *response.status_mut() = StatusCode::CREATED;
        let json = HeaderValue::from_static("application/json");
        response.headers_mut().insert(header::CONTENT_TYPE, json);
        response
    }

    fn set(&self, settings: &str) -> Response<Full<Bytes>> {
        let (size, latency) = settings.split_once('/').unwrap_or_default();
        let answer = self.answers.iter().position(|(name, _)| *name == size);
        match (answer, latency.parse()) {
            (Some(answer), Ok(latency)) => {
                self.answer.store(answer, Relaxed);
                self.latency.store(latency, Relaxed);
                Response::new(Full::default())
            }
            _ => {
                let mut response = Response::new(Full::default());
                *response.status_mut() = StatusCode::NOT_FOUND;
                response
            }
        }
    }
}

async fn serve(api: Arc<Api>, stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) {
    let service = service_fn(|request| {
        let api = api.clone();
        async move { Ok::<_, Infallible>(api.answer(request).await) }
    });
    let mut server = auto::Builder::new(TokioExecutor::new());
    server.http2().max_concurrent_streams(10_000);
    // A connection that breaks is the benchmark's to notice, by its calls.
    let _ = server.serve_connection(TokioIo::new(stream), service).await;
}

async fn accept(api: Arc<Api>, listener: TcpListener, tls: Option<TlsAcceptor>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            continue;
        };
        let _ = stream.set_nodelay(true);
        let (api, tls) = (api.clone(), tls.clone());
        tokio::spawn(async move {
            match tls {
                None => serve(api, stream).await,
                Some(tls) => {
                    if let Ok(stream) = tls.accept(stream).await {
                        serve(api, stream).await;
                    }
                }
            }
        });
    }
}

/// With a queue for thousands of connections that come at once.
fn listen() -> io::Result<TcpListener> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((Ipv4Addr::LOCALHOST, 0).into())?;
    socket.listen(16 * 1024)
}

/// TLS with a certificate of its own, which goes to a file for clients to trust.
fn tls(ca_file: &str) -> Result<TlsAcceptor, Box<dyn std::error::Error>> {
    let names = ["127.0.0.1".to_owned(), "localhost".to_owned()];
    let CertifiedKey { cert, signing_key } = generate_simple_self_signed(names)?;
    fs::write(ca_file, cert.pem())?;
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(signing_key.serialize_der()));
    let mut config = ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![cert.der().clone()], key)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let ca_file = env::args().nth(1).ok_or("usage: upstream CA_FILE")?;
    let api = Arc::new(Api {
        answers: [("0.6", 0), ("6", 6_000), ("60", 60_000)]
            .map(|(name, bytes)| (name, answer_of(bytes))),
        answer: AtomicUsize::new(0),
        latency: AtomicU64::new(0),
        creates: AtomicU64::new(0),
    });
    let (plain, secure) = (listen()?, listen()?);
    let (plain_at, secure_at) = (plain.local_addr()?, secure.local_addr()?);
    tokio::spawn(accept(api.clone(), plain, None));
    let secure = tokio::spawn(accept(api, secure, Some(tls(&ca_file)?)));
    let mut out = io::stdout().lock();
    writeln!(out, r#"{{"plain":"{plain_at}","tls":"{secure_at}"}}"#)?;
    drop(out);
    Ok(secure.await?)
}

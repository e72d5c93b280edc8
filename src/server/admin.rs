//! The admin listener: `/metrics`, `/livez`, `/readyz`, over plain HTTP.

use std::{convert::Infallible, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::telemetry::Metrics;

/// Serves the admin pages until the process ends. `drain`: no longer ready.
pub(super) async fn serve(listener: TcpListener, metrics: Arc<Metrics>, drain: CancellationToken) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        let (metrics, drain) = (metrics.clone(), drain.clone());
        let service = service_fn(move |request: Request<Incoming>| {
            let page = page(&request, &metrics, drain.is_cancelled());
            async move { Ok::<_, Infallible>(page) }
        });
        tokio::spawn(async move {
            // A client that goes away is no event here.
            let _ = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(Duration::from_secs(10))
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

fn page(request: &Request<Incoming>, metrics: &Metrics, draining: bool) -> Response<Full<Bytes>> {
    const TEXT: &str = "text/plain; charset=utf-8";
    const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    let (status, kind, text) = match (request.method(), request.uri().path()) {
        (&Method::GET, "/metrics") => (StatusCode::OK, OPEN_METRICS, metrics.encode()),
        // Alive means: able to answer this. Never: the API is up.
        (&Method::GET, "/livez") => (StatusCode::OK, TEXT, "ok\n".to_owned()),
        (&Method::GET, "/readyz") if draining => {
            let text = "draining\n".to_owned();
            (StatusCode::SERVICE_UNAVAILABLE, TEXT, text)
        }
        (&Method::GET, "/readyz") => (StatusCode::OK, TEXT, "ok\n".to_owned()),
        _ => {
            let text = "There are GET /metrics, /livez and /readyz.\n".to_owned();
            (StatusCode::NOT_FOUND, TEXT, text)
        }
    };
    let mut response = Response::new(Full::new(text.into()));
    *response.status_mut() = status;
    let kind = HeaderValue::from_static(kind);
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

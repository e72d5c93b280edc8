//! The Batch Ingestion API.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, header};

use super::{SendGuard, Upstream, failure_of, request};
use crate::{
    api::{POST_BATCHES, Safety},
    call::{CallContext, early_headers::EarlyHeaders},
    failure::{Failure, Kind, NotSent},
    proto::v1::Batch,
    redact::Redactor,
};

impl Upstream {
    /// `POST /batches` (Batch Ingestion API reference, "Create a new batch").
    ///
    /// `headers` are the call's own; `guard` tells, now and to anybody else who
    /// holds it, whether the request may have been sent. `first` are on the
    /// caller's connection before it is.
    pub async fn post_batch(
        &self,
        call: &CallContext,
        headers: &HeaderMap,
        body: Bytes,
        guard: &SendGuard,
        first: Option<&EarlyHeaders>,
    ) -> Result<Batch, Failure> {
        let mut observed = call.record.request(POST_BATCHES, self.batches.host_str());
        let longest = self.request_timeout;
        let sent = {
            let mut request = request(Method::POST, self.batches.clone(), headers);
            let json = HeaderValue::from_static("application/json");
            request.headers_mut().insert(header::CONTENT_TYPE, json);
            *request.body_mut() = Some(reqwest::Body::wrap(guard.body(body, first)));
            self.send(request, Safety::NotIdempotent, longest, &mut observed)
        };
        let result = match sent.await {
            Ok(Ok(response)) => response.batch(&Redactor::without_secrets_of(headers)),
            Ok(Err(error)) => Err(failure_of(&error, !guard.cancel(), Failure::unknown)),
            Err(_) if guard.cancel() => {
                Err(Failure::transient(Kind::NotSent(NotSent::ConnectTimeout)))
            }
            Err(_) => Err(Failure::unknown(Kind::UpstreamTimeout(longest))),
        };
        observed.completed(&result);
        result
    }
}

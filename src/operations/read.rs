//! `GetBatch` and `ListBatches`: reads, repeated where that may help.

use std::sync::Arc;

use http::HeaderMap;
use tokio::time::sleep;

use crate::{
    call::CallContext,
    failure::Failure,
    mapping,
    proto::v1::{GetBatchRequest, GetBatchResponse, ListBatchesRequest, ListBatchesResponse},
    retry::Retries,
    upstream::Upstream,
};

/// What reads need.
#[derive(Clone, Debug)]
pub struct Reader {
    /// The API.
    pub upstream: Arc<Upstream>,
    /// The budget for repeated requests.
    pub retries: Arc<Retries>,
}

impl Reader {
    /// Gets a batch.
    pub async fn get_batch(
        self,
        call: CallContext,
        headers: HeaderMap,
        request: GetBatchRequest,
    ) -> Result<GetBatchResponse, Failure> {
        let id = &request.batch_id;
        mapping::check_batch_id(id).map_err(Failure::invalid)?;
        let batch = self
            .repeat(&call, || self.upstream.get_batch(&call, &headers, id))
            .await?;
        Ok(GetBatchResponse { batch: Some(batch) })
    }

    /// Lists a page of batches.
    pub async fn list_batches(
        self,
        call: CallContext,
        headers: HeaderMap,
        request: ListBatchesRequest,
    ) -> Result<ListBatchesResponse, Failure> {
        let query = mapping::list_query(&request).map_err(Failure::invalid)?;
        let listed = self
            .repeat(&call, || {
                (self.upstream).list_batches(&call, &headers, query.pairs())
            })
            .await?;
        Ok(mapping::page(listed, &query))
    }

    /// Sends a request, again where that may help.
    async fn repeat<T, F: Future<Output = Result<T, Failure>>>(
        &self,
        call: &CallContext,
        request: impl Fn() -> F,
    ) -> Result<T, Failure> {
        self.retries.deposit();
        let mut attempt = 1;
        loop {
            match request().await {
                Err(failure) => match self.retries.pause(&failure, attempt, call) {
                    Some(pause) => sleep(pause).await,
                    None => return Err(failure),
                },
                success => return success,
            }
            attempt += 1;
        }
    }
}

//! The Catalog Service API.

use std::time::Duration;

use http::HeaderMap;
use reqwest::Url;

use super::Upstream;
use crate::{
    api::{GET_CATALOG_BATCH, GET_CATALOG_BATCHES},
    call::CallContext,
    failure::{Failure, Kind, Reason},
    mapping::{self, ParseError},
    proto::v1::Batch,
};

/// How long a lookup by external id may take.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);

/// How many batches a lookup lists: Catalog's default ("Filter Catalog data
/// using query parameters"). A filter that holds lists one.
const LOOKUP_LIMIT: usize = 20;

impl Upstream {
    /// `GET /batches/{id}` (Catalog Service API reference, "Get a batch").
    pub async fn get_batch(
        &self,
        call: &CallContext,
        headers: &HeaderMap,
        id: &str,
    ) -> Result<Batch, Failure> {
        let mut url = self.catalog_batches.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.push(id);
        }
        let request = (GET_CATALOG_BATCH, url);
        self.read(
            call,
            headers,
            request,
            self.request_timeout,
            |response, redactor| {
                let batch = response.success(redactor, |body| mapping::batch_with_id(body, id))?;
                batch.ok_or_else(|| Failure::refused(Kind::BatchNotFound))
            },
        )
        .await
        .map_err(about_the_batch)
    }

    /// `GET /batches` (Catalog Service API reference, "List batches"), in the
    /// order of the response.
    pub async fn list_batches(
        &self,
        call: &CallContext,
        headers: &HeaderMap,
        query: &[(&'static str, String)],
    ) -> Result<Vec<Batch>, Failure> {
        let request = (GET_CATALOG_BATCHES, self.list_url(query));
        self.read(
            call,
            headers,
            request,
            self.request_timeout,
            |response, redactor| response.batches(redactor),
        )
        .await
    }

    /// The batches with this external id, the oldest first.
    ///
    /// A list proves by equality alone. It proves that there is no such batch
    /// only if it shows what it was asked for, and all of it.
    pub async fn batches_with_external_id(
        &self,
        call: &CallContext,
        headers: &HeaderMap,
        external_id: &str,
    ) -> Result<Vec<Batch>, Failure> {
        let url = self.list_url(&[
            ("externalId", external_id.to_owned()),
            ("orderBy", "asc:created".to_owned()),
            // Unfiltered lists can reach gigabytes: both are always sent.
            ("limit", LOOKUP_LIMIT.to_string()),
            ("properties", mapping::properties().to_owned()),
        ]);
        let request = (GET_CATALOG_BATCHES, url);
        self.read(
            call,
            headers,
            request,
            LOOKUP_TIMEOUT,
            |response, redactor| {
                let listed = response.batches(redactor)?;
                with_external_id(listed, external_id)
                    .ok_or_else(|| response.invalid(redactor, ParseError::OtherBatches))
            },
        )
        .await
    }

    fn list_url(&self, query: &[(&'static str, String)]) -> Url {
        let mut url = self.catalog_batches.clone();
        url.query_pairs_mut().extend_pairs(query);
        url
    }
}

/// A 404 that only Adobe writes is about the batch; any other may be about the
/// URL.
fn about_the_batch(mut failure: Failure) -> Failure {
    if let Kind::Api(error) = &mut failure.kind
        && error.reason == Reason::ApiNotFound
        && error.body.is_adobes
    {
        error.reason = Reason::BatchNotFound;
    }
    failure
}

/// The batches of a list that have this external id; `None` where there is none
/// and the list does not prove it: it is full, or it shows batches without the
/// member that was asked for.
fn with_external_id(mut listed: Vec<Batch>, external_id: &str) -> Option<Vec<Batch>> {
    let is_proof = listed.len() < LOOKUP_LIMIT && listed.iter().all(|b| b.external_id.is_some());
    listed.retain(|batch| batch.external_id.as_deref() == Some(external_id));
    listed.sort_by_key(|batch| batch.created.map(|t| (t.seconds, t.nanos)));
    (is_proof || !listed.is_empty()).then_some(listed)
}

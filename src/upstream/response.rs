//! The response to a request: read within bounds, then judged.

use std::{io::Read, mem, sync::Arc, time::Duration};

use flate2::read::MultiGzDecoder;
use http::{HeaderMap, StatusCode, header};
use reqwest::Url;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{
    error_body,
    proof::{self, Proves},
};
use crate::{
    api::Safety,
    failure::{
        ApiError, Effect, ErrorBody, Failure, InvalidResponse, Kind, NotSent, Reason, Retry,
    },
    headers::REQUEST_ID,
    mapping::{self, ParseError},
    proto::v1::Batch,
    redact::Redactor,
};

/// The most that is read of the response to a create. A list of numbers grows
/// eleven times on its way into protobuf when it stands in a field and in
/// `extra`, and gRPC clients take 4 MiB by default.
const LARGEST_SUCCESS: usize = 256 * 1024;

/// The most that is read of the response to a read: a page of Catalog may have
/// 100 batches.
const LARGEST_READ: usize = 1024 * 1024;

/// Bytes of a response to a read that are not counted: most pages.
const UNCOUNTED: usize = 64 * 1024;

/// The most that all responses to reads may have beyond that, in bytes, until
/// their callers have taken them.
pub const MAX_READ_BYTES: usize = 16 * 1024 * 1024;

/// The most that is read of an error.
const LARGEST_ERROR: usize = 64 * 1024;

/// How much of an unusable body is quoted, in bytes.
const QUOTED: usize = 512;

/// A response as it came.
pub(super) struct Response {
    status: StatusCode,
    headers: HeaderMap,
    /// What repeating the request may do.
    safety: Safety,
    /// As much of it as is read of such a response, decompressed.
    body: Vec<u8>,
    end: BodyEnd,
    /// What of [`MAX_READ_BYTES`] it takes.
    pub(super) held: Option<OwnedSemaphorePermit>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum BodyEnd {
    Complete,
    TooLarge,
    /// All responses to reads have as many bytes as are allowed.
    Overloaded,
    /// The connection ended otherwise than HTTP says that it must.
    Broken,
}

impl Response {
    pub(super) async fn read(
        response: &mut reqwest::Response,
        safety: Safety,
        read_bytes: &Arc<Semaphore>,
    ) -> Self {
        let status = response.status();
        let headers = mem::take(response.headers_mut());
        let mut body = Vec::new();
        let largest = match (status.is_success(), safety) {
            (false, _) => LARGEST_ERROR,
            (true, Safety::Safe) => LARGEST_READ,
            (true, _) => LARGEST_SUCCESS,
        };
        let mut held = None;
        let mut may_hold =
            |length: usize| safety != Safety::Safe || hold(&mut held, length, read_bytes);
        let end = loop {
            if status.is_redirection() {
                break BodyEnd::Complete; // it says nothing
            }
            match response.chunk().await {
                Ok(Some(chunk)) if body.len() + chunk.len() > largest => {
                    body.extend_from_slice(&chunk[..largest - body.len()]);
                    break BodyEnd::TooLarge;
                }
                Ok(Some(chunk)) if !may_hold(body.len() + chunk.len()) => {
                    break BodyEnd::Overloaded;
                }
                Ok(Some(chunk)) => body.extend_from_slice(&chunk),
                Ok(None) => break BodyEnd::Complete,
                Err(_) => break BodyEnd::Broken,
            }
        };
        let (body, mut end) = match is_gzip(&headers) {
            true => gunzip(&body, end, largest),
            false => (body, end),
        };
        if !may_hold(body.len()) {
            end = BodyEnd::Overloaded;
        }
        Response {
            status,
            headers,
            safety,
            body,
            end,
            held,
        }
    }

    /// The batch that the response to `POST /batches` names.
    pub(super) fn batch(&self, redactor: &Redactor<'_>) -> Result<Batch, Failure> {
        // An error, or a page: somebody in between may answer 200 with it, but never 201.
        let may_be_an_error = proof::proves(self.status) == Proves::AppliedIfNamed;
        self.success(redactor, |body| {
            match may_be_an_error && error_body::is_error(body) {
                true => Err(ParseError::IsError),
                false => mapping::batch_from_json(body),
            }
        })
    }

    /// The batches that Catalog lists. An error of a proxy, told with 200, would
    /// be a batch with an id such as `fault`.
    pub(super) fn batches(&self, redactor: &Redactor<'_>) -> Result<Vec<Batch>, Failure> {
        self.success(redactor, |body| match error_body::is_error(body) {
            true => Err(ParseError::IsError),
            false => mapping::batches_from_json(body),
        })
    }

    /// Reads a success. JSON that is whole needs no proper end of the body.
    pub(super) fn success<T>(
        &self,
        redactor: &Redactor<'_>,
        read: impl FnOnce(&[u8]) -> Result<T, ParseError>,
    ) -> Result<T, Failure> {
        match self.status.is_success() {
            _ if self.end == BodyEnd::Overloaded => {
                Err(Failure::transient(Kind::NotSent(NotSent::Overloaded)))
            }
            true => read(&self.body).map_err(|error| self.invalid(redactor, error)),
            false => Err(self.error(redactor)),
        }
    }

    fn error(&self, redactor: &Redactor<'_>) -> Failure {
        let body = match self.body.is_empty() {
            true => ErrorBody::default(),
            false => error_body::read(&self.body, redactor),
        };
        let effect = proof::effect_of_error(self.status, &body);
        let reason = proof::reason(self.status, &body, effect);
        let is_transient = match reason {
            Reason::ApiUnavailable => true,
            Reason::ApiRateLimited => retry_after(&self.headers).is_some(),
            _ => self.safety == Safety::Safe && !self.status.is_client_error(),
        };
        Failure {
            effect: self.effect(effect),
            retry: match retry_after(&self.headers) {
                _ if !is_transient => Retry::Never,
                Some(delay) => Retry::After(delay),
                None => Retry::Backoff,
            },
            kind: Kind::Api(Box::new(ApiError {
                reason,
                status: self.status,
                body,
                request_id: self.text_of(&REQUEST_ID, redactor),
                redirect_host: match self.status.is_redirection() {
                    true => self.redirect_host(redactor),
                    false => None,
                },
            })),
        }
    }

    /// What the response proves to have been changed. A read changes nothing.
    fn effect(&self, proven: Effect) -> Effect {
        match self.safety {
            Safety::Safe => Effect::NotApplied,
            Safety::Idempotent | Safety::NotIdempotent => proven,
        }
    }

    /// A success that cannot be read. It may prove the batch all the same.
    pub(super) fn invalid(&self, redactor: &Redactor<'_>, error: ParseError) -> Failure {
        let location = self.text_of(&header::LOCATION, redactor);
        let located = location.as_deref().and_then(batch_id_of).map(str::to_owned);
        let shown = || match error {
            ParseError::IsError => None,
            _ => mapping::batch_id_in_beginning(&self.body),
        };
        let batch_id = located.or_else(shown).map(|id| redactor.id(&id));
        let is_applied = match self.safety {
            // It would be as large the next time.
            Safety::Safe => self.end == BodyEnd::TooLarge,
            _ => proof::proves(self.status) == Proves::Applied || batch_id.is_some(),
        };
        let (reason, effect, retry) = match is_applied {
            true => (Reason::AnswerUnusable, Effect::Applied, Retry::Never),
            false => (Reason::AnswerUnproven, Effect::Unknown, Retry::Backoff),
        };
        Failure {
            effect: self.effect(effect),
            retry: match self.safety {
                Safety::NotIdempotent => Retry::Never,
                Safety::Safe | Safety::Idempotent => retry,
            },
            kind: Kind::InvalidResponse(Box::new(InvalidResponse {
                reason,
                status: self.status,
                problem: match self.end {
                    BodyEnd::Complete | BodyEnd::Overloaded => error.to_string(),
                    BodyEnd::TooLarge => format!("is larger than {} bytes", self.body.len()),
                    BodyEnd::Broken => "is incomplete".to_owned(),
                },
                beginning: redactor.bytes(&self.body, QUOTED),
                location,
                batch_id,
                request_id: self.text_of(&REQUEST_ID, redactor),
            })),
        }
    }

    fn text_of(&self, name: &header::HeaderName, redactor: &Redactor<'_>) -> Option<String> {
        Some(redactor.bytes(self.headers.get(name)?.as_bytes(), QUOTED))
    }

    fn redirect_host(&self, redactor: &Redactor<'_>) -> Option<String> {
        let location = self.text_of(&header::LOCATION, redactor)?;
        Some(Url::parse(&location).ok()?.host_str()?.to_owned())
    }
}

/// Whether a response may have this many bytes, as far as others leave room.
fn hold(held: &mut Option<OwnedSemaphorePermit>, length: usize, from: &Arc<Semaphore>) -> bool {
    let has = held.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
    let more = length.saturating_sub(UNCOUNTED + has);
    let more = u32::try_from(more).unwrap_or(u32::MAX);
    match from.clone().try_acquire_many_owned(more) {
        _ if more == 0 => true,
        Ok(permit) => {
            match held {
                Some(held) => held.merge(permit),
                held => *held = Some(permit),
            }
            true
        }
        Err(_) => false,
    }
}

/// Requests ask for no compression, but some servers compress all the same.
fn is_gzip(headers: &HeaderMap) -> bool {
    let coding = headers.get(header::CONTENT_ENCODING);
    let coding = coding.map(|coding| coding.as_bytes().trim_ascii());
    coding.is_some_and(|coding| {
        coding.eq_ignore_ascii_case(b"gzip") || coding.eq_ignore_ascii_case(b"x-gzip")
    })
}

/// At most `largest` bytes of what was compressed. A body that breaks off is
/// decompressed as far as it goes.
fn gunzip(body: &[u8], mut end: BodyEnd, largest: usize) -> (Vec<u8>, BodyEnd) {
    let mut text = Vec::new();
    let mut decoder = MultiGzDecoder::new(body).take(largest as u64 + 1);
    let read = decoder.read_to_end(&mut text);
    if text.len() > largest {
        text.truncate(largest);
        end = BodyEnd::TooLarge;
    } else if read.is_err() && end == BodyEnd::Complete {
        end = BodyEnd::Broken;
    }
    (text, end)
}

/// `Retry-After`: seconds, or a date (RFC 9110, section 10.2.3).
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);
    let value = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    let delay = match value.parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => httpdate::parse_http_date(value)
            .ok()?
            .duration_since(std::time::SystemTime::now())
            .unwrap_or_default(),
    };
    Some(delay.min(LONGEST))
}

/// `…/batches/{id}` → `{id}`.
fn batch_id_of(location: &str) -> Option<&str> {
    let (_, id) = location.split_once("/batches/")?;
    let id = id.split(['?', '#']).next()?.trim_end_matches('/');
    (!id.is_empty() && !id.contains('/')).then_some(id)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::{Compression, write::GzEncoder};

    use super::*;

    #[test]
    fn retry_after_in_both_forms() {
        let of = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("retry-after", value.parse().expect("a value"));
            retry_after(&headers)
        };
        assert_eq!(of("7"), Some(Duration::from_secs(7)));
        assert_eq!(of("99999999999"), Some(Duration::from_secs(86400)));
        assert_eq!(of("Wed, 21 Oct 2015 07:28:00 GMT"), Some(Duration::ZERO));
        let soon = std::time::SystemTime::now() + Duration::from_secs(60);
        let delay = of(&httpdate::fmt_http_date(soon)).expect("a date");
        assert!((58..=60).contains(&delay.as_secs()), "{delay:?}");
        for odd in ["", "-1", "soon"] {
            assert_eq!(of(odd), None, "{odd}");
        }
    }

    #[test]
    fn the_batch_id_in_a_location() {
        for (location, id) in [
            ("/data/foundation/catalog/batches/5d01", Some("5d01")),
            ("https://host/batches/5d01/?x=1", Some("5d01")),
            ("/batches/", None),
            ("/batches/5d01/files", None),
            ("/other", None),
        ] {
            assert_eq!(batch_id_of(location), id, "{location}");
        }
    }

    fn zipped(text: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(text).expect("a vector takes it");
        encoder.finish().expect("a vector takes it")
    }

    #[test]
    fn gzip_is_read_as_far_as_it_goes_and_within_bounds() {
        let text = br#"{"id":"b","padding":"0123456789abcdefghijklmnopqrstuvwxyz"}"#;
        let whole = zipped(text);
        let (body, end) = gunzip(&whole, BodyEnd::Complete, 1024);
        assert!(body == text && end == BodyEnd::Complete);

        let (body, end) = gunzip(&whole[..whole.len() - 12], BodyEnd::Complete, 1024);
        assert!(text.starts_with(&body) && end == BodyEnd::Broken);

        let bomb = zipped(&vec![b' '; 1024 * 1024]);
        let (body, end) = gunzip(&bomb, BodyEnd::Complete, 1000);
        assert!(body.len() == 1000 && end == BodyEnd::TooLarge);

        let (body, end) = gunzip(b"no gzip", BodyEnd::Complete, 1000);
        assert!(body.is_empty() && end == BodyEnd::Broken);
    }
}

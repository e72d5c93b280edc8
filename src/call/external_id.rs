//! An external id, and where it counts.

use http::{HeaderMap, HeaderValue};

use crate::headers::CREDENTIALS;

/// An external id counts within its organization and sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ExternalId {
    /// `x-gw-ims-org-id`.
    pub organization: Vec<u8>,
    /// `x-sandbox-name`.
    pub sandbox: Vec<u8>,
    /// The id.
    pub id: String,
}

impl ExternalId {
    /// The external id of a call that carries these headers upstream.
    pub fn new(id: &str, headers: &HeaderMap) -> Self {
        let header = |name| {
            let value = headers.get(name);
            value.map_or(Vec::new(), |value: &HeaderValue| value.as_bytes().to_vec())
        };
        let [_, _, organization, sandbox] = &CREDENTIALS;
        ExternalId {
            organization: header(organization),
            sandbox: header(sandbox),
            id: id.to_owned(),
        }
    }
}

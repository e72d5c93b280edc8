//! Protobuf ↔ the JSON of the REST API. Pure functions: no I/O, no clock.
//!
//! Both directions keep to the promise that nothing is lost: a request field
//! that is not set is not sent, and whatever an answer holds that its message
//! cannot hold is kept in `Batch.extra`.

mod batch;
mod catalog;
pub(crate) mod json;
#[cfg(test)]
mod properties;
mod request;

pub use batch::{NoBatch, batch_from_json, batch_id_in_beginning};
pub use catalog::{batches_from_json, is_same_content, special_character};
pub use request::create_batch_json;

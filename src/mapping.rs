//! Protobuf ↔ the JSON of the REST API. Pure functions: no I/O, no clock.
//!
//! Both directions keep to the promise that nothing is lost: a request field
//! that is not set is not sent, and whatever an answer holds that its message
//! cannot hold is kept in `Batch.extra`.

mod batch;
mod batch_list;
mod catalog;
pub(crate) mod json;
#[cfg(test)]
mod properties;
mod request;

pub use batch::{ParseError, batch_from_json, batch_id_in_beginning};
pub use batch_list::{ListQuery, list_query, page};
pub use catalog::{
    batch_with_id, batches_from_json, check_batch_id, is_same_content, properties,
    special_character,
};
pub use request::create_batch_json;

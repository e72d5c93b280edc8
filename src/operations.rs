//! What each rpc does that is not `CreateBatch`.

pub mod read;

//! The code that is generated from `proto/`, and its descriptors.

/// Package `aep.ingestion.v1`.
#[allow(missing_docs, clippy::all, reason = "generated")]
pub mod v1 {
    tonic::include_proto!("aep.ingestion.v1");
}

/// What a client needs to read every answer: the `FileDescriptorSet` of the API
/// and of the details of errors (`google.rpc`), with imports and comments.
pub const DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptor.bin"));

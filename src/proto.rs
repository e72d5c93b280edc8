//! The code that is generated from `proto/`, and its descriptors.

/// Package `aep.ingestion.v1`.
#[allow(missing_docs, clippy::all, reason = "generated")]
pub mod v1 {
    tonic::include_proto!("aep.ingestion.v1");
}

/// The `FileDescriptorSet` of the API with its imports and comments.
pub const DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptor.bin"));

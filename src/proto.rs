//! The code that is generated from `proto/`, and its descriptors.

/// Package `aep.ingestion.v1`.
#[allow(missing_docs, clippy::all, reason = "generated")]
pub mod v1 {
    tonic::include_proto!("aep.ingestion.v1");
}

/// The `FileDescriptorSet` of the API with its imports and comments.
pub const DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptor.bin"));

/// What a client needs to read every answer: the API, and the details of
/// errors (`google.rpc`). Descriptor sets are joined by appending one to the
/// other (Protocol Buffers encoding, "Last One Wins": repeated fields).
pub fn full_descriptor_set() -> Vec<u8> {
    [DESCRIPTOR_SET, tonic_types::pb::FILE_DESCRIPTOR_SET].concat()
}

//! `proto/` → Rust code and the `FileDescriptorSet`. Nothing else.

use std::{env, error::Error, fs, path::PathBuf};

use protox::prost::Message;

/// The details of errors, and the API.
const DETAILS: &str = "google/rpc/error_details.proto";
const FILES: [&str; 3] = [
    "google/rpc/status.proto",
    DETAILS,
    "aep/ingestion/v1/batch_service.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    // protox is a protobuf compiler in Rust: no protoc is needed.
    let mut compiler = protox::Compiler::new(["proto"])?;
    compiler
        .include_imports(true)
        .include_source_info(true)
        .open_files(FILES)?;
    println!("cargo::rerun-if-changed=proto");

    let out = PathBuf::from(env::var("OUT_DIR")?);
    let mut set = compiler.file_descriptor_set();
    tonic_prost_build::configure()
        .build_transport(false)
        .boxed(".aep.ingestion.v1.CreateBatchResponse.batch") // tonic moves responses around
        .btree_map(".") // the order of keys in a REST body is then the same in every run
        .compile_fds(set.clone())?;

    // grpcui decodes the details of errors only if the API's file imports them. The source
    // does not: every client's code would then need google.rpc, and protoc would warn.
    if let Some(api) = set.file.last_mut() {
        api.dependency.push(DETAILS.to_owned());
    }
    fs::write(out.join("descriptor.bin"), set.encode_to_vec())?;
    Ok(())
}

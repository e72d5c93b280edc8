//! `proto/` → Rust code and the `FileDescriptorSet`. Nothing else.

use std::{env, error::Error, fs, path::PathBuf};

const PROTO: &str = "aep/ingestion/v1/batch_service.proto";

fn main() -> Result<(), Box<dyn Error>> {
    // protox is a protobuf compiler in Rust: no protoc is needed.
    let mut compiler = protox::Compiler::new(["proto"])?;
    compiler
        .include_imports(true)
        .include_source_info(true)
        .open_files([PROTO])?;
    println!("cargo::rerun-if-changed=proto");

    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(
        out.join("descriptor.bin"),
        compiler.encode_file_descriptor_set(),
    )?;

    tonic_prost_build::configure()
        .build_transport(false)
        .boxed(".aep.ingestion.v1.CreateBatchResponse.batch") // tonic moves responses around
        .btree_map(".") // the order of keys in a REST body is then the same in every run
        .compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}

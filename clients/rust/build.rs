//! The proto → Rust code, and descriptors for the interop tests.

use std::{env, error::Error, fs, path::Path};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=../../proto");
    let mut compiler = protox::Compiler::new(["../../proto"])?;
    compiler.include_imports(true);
    compiler.open_file("aep/ingestion/v1/batch_service.proto")?;
    tonic_prost_build::configure()
        .build_server(false)
        .compile_fds(compiler.file_descriptor_set())?;

    compiler.open_files(["google/rpc/status.proto", "google/rpc/error_details.proto"])?;
    let file = Path::new(&env::var("OUT_DIR")?).join("descriptors.bin");
    fs::write(file, compiler.encode_file_descriptor_set())?;
    Ok(())
}

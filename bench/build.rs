//! The gateway's proto → Rust code for the bridge.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = protox::compile(["aep/ingestion/v1/batch_service.proto"], ["../proto"])?;
    tonic_prost_build::configure()
        .btree_map(".")
        .generate_default_stubs(true) // the floor only creates batches
        .compile_fds(files)?;
    println!("cargo::rerun-if-changed=../proto");
    Ok(())
}

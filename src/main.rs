//! `aep-batch-gateway`: see README.md.

use std::process::ExitCode;

/// A call makes some 200 allocations: glibc's took a fifth of its time, and
/// musl's lock is worse (docs/benchmark.md).
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    aep_batch_gateway::cli::run()
}

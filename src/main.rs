//! `aep-batch-gateway`: see README.md.

use std::process::ExitCode;

fn main() -> ExitCode {
    aep_batch_gateway::cli::run()
}

//! `descriptor`: the schema, and the service config, as files.

use std::{
    fs,
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use clap::Args;

use super::exit_code;
use crate::{api, proto::DESCRIPTOR_SET};

#[derive(Args)]
pub(super) struct Descriptor {
    /// The file to write. Default: standard output.
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Writes the gRPC service config for clients instead (JSON). It retries UNAVAILABLE only.
    #[arg(long)]
    service_config: bool,
}

impl Descriptor {
    pub(super) fn run(self) -> ExitCode {
        let content = match self.service_config {
            true => format!("{:#}\n", api::service_config()).into_bytes(),
            false => DESCRIPTOR_SET.to_vec(),
        };
        let written = match &self.output {
            Some(file) => fs::write(file, &content),
            None => io::stdout().write_all(&content),
        };
        exit_code(written.map(|()| ExitCode::SUCCESS))
    }
}

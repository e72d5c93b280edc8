//! The commands. Each file runs one; this is the table.

mod config;
mod demo;
mod descriptor;
mod healthcheck;
mod serve;
mod signals;
mod simulate;

use std::{
    env,
    io::{self, Write},
    process::ExitCode,
};

use clap::{Command, CommandFactory, FromArgMatches, Parser, Subcommand};
use tokio::runtime;

use self::{descriptor::Descriptor, healthcheck::Healthcheck, simulate::Simulate};
use crate::config::{Given, Settings, with_variables};

/// A gRPC gateway for the batch ingestion REST API of Adobe Experience Platform.
#[derive(Parser)]
#[command(name = "aep-batch-gateway", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Commands,
}

#[derive(Subcommand)]
enum Commands {
    /// Runs the gateway.
    Serve(Settings),
    /// Runs the gateway with a simulated API and makes one call. Needs no Adobe account.
    Demo(Settings),
    /// Runs the simulated API alone: the documented REST API, in memory.
    Simulate(Simulate),
    /// Checks whether a running gateway is ready. Exits with 0 if it is, with 1 otherwise.
    Healthcheck(Healthcheck),
    /// Writes the FileDescriptorSet of the gRPC API (for grpcurl -protoset, Envoy or buf), or
    /// the service config for clients.
    Descriptor(Descriptor),
    /// Checks the configuration and prints it. Secrets are redacted.
    Config(Settings),
}

/// The exit code for bad flags and invalid configuration; clap uses the same.
const USAGE: u8 = 2;

/// Runs the program with the arguments of this process.
pub fn run() -> ExitCode {
    let arguments: Vec<_> = env::args_os().collect();
    let given = match Given::read(&command(), &arguments) {
        Ok(given) => given,
        Err(problems) => return refuse(&problems),
    };
    let cli = Cli::from_arg_matches(&given.matches).unwrap_or_else(|error| error.exit());
    match cli.command {
        Commands::Serve(settings) => serve::run(settings, &given, false),
        Commands::Demo(settings) => serve::run(settings, &given, true),
        Commands::Simulate(simulate) => simulate.run(),
        Commands::Healthcheck(healthcheck) => healthcheck.run(),
        Commands::Descriptor(descriptor) => descriptor.run(),
        Commands::Config(settings) => config::run(settings, &given),
    }
}

/// The command line. Every setting is an environment variable too.
pub fn command() -> Command {
    let cli = ["serve", "demo", "config"]
        .into_iter()
        .fold(Cli::command(), |cli, name| {
            cli.mut_subcommand(name, with_variables)
        });
    cli.mut_subcommand("demo", |demo| {
        demo.mut_arg("log_format", |arg| arg.default_value("text"))
    })
}

fn run_on(
    mut runtime: runtime::Builder,
    work: impl Future<Output = io::Result<ExitCode>>,
) -> ExitCode {
    exit_code(runtime.enable_all().build().and_then(|runtime| {
        let result = runtime.block_on(work);
        // A create that is still in flight has had its time.
        runtime.shutdown_background();
        result
    }))
}

fn exit_code(result: io::Result<ExitCode>) -> ExitCode {
    result.unwrap_or_else(|error| {
        eprint(&format!("error: {error}"));
        ExitCode::FAILURE
    })
}

/// Writes a line to standard output.
fn print(line: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()
}

/// Writes a line to standard error, if it is open.
fn eprint(line: &str) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

fn refuse(problems: &[String]) -> ExitCode {
    eprint("error: invalid configuration:");
    for problem in problems {
        eprint(&format!("  {problem}"));
    }
    ExitCode::from(USAGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        command().debug_assert();
    }
}

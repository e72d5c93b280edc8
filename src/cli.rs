//! The commands and their flags.

mod demo;
mod settings_file;

use std::{
    collections::BTreeSet,
    env, fs,
    io::{self, Write},
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use clap::{
    ArgMatches, Args, Command, CommandFactory, FromArgMatches, Parser, Subcommand,
    parser::ValueSource,
};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    runtime,
    signal::unix::{Signal, SignalKind, signal},
};
use tonic::transport::{Channel, Endpoint};

use crate::{
    config::{Config, Listen, Problems, Settings},
    proto::{DESCRIPTOR_SET, SERVICE_CONFIG},
    proxies::Proxies,
    server::{self, Running},
    simulator::{Injection, Simulator, SimulatorOptions},
    telemetry::{self, Telemetry, Tracing},
};

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
    /// Runs the gateway on a simulated upstream, and makes one call to show it. Needs no account.
    Demo(Settings),
    /// Runs the simulated upstream alone: the documented REST API in memory.
    Simulate(Simulate),
    /// Asks a running gateway whether it is ready; exits with 0 if it is, else with 1.
    Healthcheck(Healthcheck),
    /// Writes the FileDescriptorSet of the API, for grpcurl -protoset, Envoy or buf; or the
    /// service config for clients.
    Descriptor(Descriptor),
    /// Checks the configuration and prints it, with secrets redacted.
    Config(Settings),
}

#[derive(Args)]
struct Simulate {
    /// Where REST calls are taken. Port 0 picks a free port.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8080")]
    listen: SocketAddr,
    /// A fault that creates may meet, such as reset-after-create or status-503. Can be repeated.
    #[arg(long = "fault", value_name = "NAME")]
    faults: Vec<Injection>,
    /// The share of creates that meet a fault.
    #[arg(long, value_name = "SHARE", default_value = "1")]
    share: f64,
    /// Makes the faults the same in every run.
    #[arg(long, value_name = "NUMBER", default_value = "0")]
    seed: u64,
    /// How long each create takes.
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = humantime::parse_duration)]
    latency: Duration,
    /// How long it takes until Catalog shows a new batch.
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = humantime::parse_duration)]
    catalog_lag: Duration,
}

#[derive(Args)]
struct Healthcheck {
    /// The admin listener of the gateway. An unspecified IP address means this machine.
    #[arg(
        long,
        value_name = "ADDRESS",
        env = "AEP_GATEWAY_ADMIN_LISTEN",
        default_value = "127.0.0.1:9464"
    )]
    address: SocketAddr,
}

#[derive(Args)]
struct Descriptor {
    /// The file to write; standard output by default.
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Writes the gRPC service config for clients instead: retries of UNAVAILABLE alone (JSON).
    #[arg(long)]
    service_config: bool,
}

/// The commands that take the gateway's settings.
const WITH_SETTINGS: [&str; 3] = ["serve", "demo", "config"];

/// Exit code for bad flags and bad configuration, as clap's own.
const USAGE: u8 = 2;

/// Runs the program with the arguments of this process.
pub fn run() -> ExitCode {
    let (cli, matches) = match parse() {
        Ok(parsed) => parsed,
        Err(code) => return code,
    };
    match cli.command {
        Commands::Serve(settings) => run_gateway(settings, false),
        Commands::Demo(settings) => run_gateway(settings, true),
        Commands::Simulate(simulate) => run_async(run_simulator(simulate)),
        Commands::Healthcheck(healthcheck) => run_async(check_health(healthcheck)),
        Commands::Descriptor(descriptor) => write_descriptor(descriptor),
        Commands::Config(settings) => print_config(&settings, &matches),
    }
}

/// The command line. Every setting is an environment variable too.
pub fn command() -> Command {
    WITH_SETTINGS.into_iter().fold(Cli::command(), |cli, name| {
        cli.mut_subcommand(name, |command| {
            let command = command.args_override_self(true).mut_args(|arg| {
                let variable = format!("AEP_GATEWAY_{}", arg.get_id()).to_ascii_uppercase();
                arg.env(variable)
            });
            match name {
                "demo" => command.mut_arg("log_format", |arg| arg.default_value("text")),
                _ => command,
            }
        })
    })
}

/// Parses twice where there is a settings file: its values become the defaults
/// of the flags.
fn parse() -> Result<(Cli, ArgMatches), ExitCode> {
    let matches = command().get_matches();
    let Some((name, file)) = settings_file::of(&matches) else {
        return from_matches(matches);
    };
    let with_file =
        settings_file::apply(command(), &name, &file).map_err(|problems| refuse(&problems))?;
    from_matches(with_file.get_matches())
}

fn from_matches(matches: ArgMatches) -> Result<(Cli, ArgMatches), ExitCode> {
    match Cli::from_arg_matches(&matches) {
        Ok(cli) => Ok((cli, matches)),
        Err(error) => error.exit(),
    }
}

/// Runs `serve` and `demo`.
fn run_gateway(settings: Settings, demo: bool) -> ExitCode {
    let proxies = match demo {
        true => Ok(Proxies::default()), // it calls nobody but this machine
        false => Proxies::from_environment(),
    };
    let (logs, mut config) = match (settings.logs(), checked(&settings, proxies)) {
        (Ok(logs), Ok(config)) => (logs, config),
        (_, checked) => return refuse(&checked.err().unwrap_or_default()),
    };
    if demo && config.tls.is_some() {
        let problem = "demo calls itself without TLS: use serve, or leave --tls-… out".to_owned();
        return refuse(&[problem]);
    }
    let tracing = match Tracing::from_environment(&config.upstream.proxies) {
        Ok(tracing) => tracing,
        Err(problem) => return refuse(&[problem]),
    };
    let log_level = match telemetry::start_logs(logs.format, logs.filter) {
        Ok(log_level) => log_level,
        Err(error) => return exit_code(Err(error)),
    };
    for problem in unknown_variables() {
        tracing::warn!("{problem}");
    }
    let telemetry = Arc::new(Telemetry::new(tracing.as_ref().map(Tracing::tracer)));
    // This thread accepts connections; the gateway has others that serve them.
    let ended = run_on(runtime::Builder::new_current_thread(), async move {
        let mut signals = StopSignals::listen()?;
        heed_hangup(config.tls.is_some())?;
        let simulator = match demo {
            true => Some(demo::simulator(&mut config).await?),
            false => None,
        };
        let running = server::start(config, telemetry, log_level)
            .await
            .map_err(io::Error::other)?;
        announce(&running)?;
        if let Some(simulator) = &simulator {
            demo::show(running.listen(), simulator).await?;
        }
        signals.stop().await;
        tokio::select! {
            () = running.drain() => Ok(ExitCode::SUCCESS),
            () = signals.stop() => {
                tracing::warn!("a second signal to stop: calls in flight are given up");
                Ok(ExitCode::FAILURE)
            }
        }
    });
    if let Some(tracing) = tracing {
        tracing.stop();
    }
    telemetry::write_last_lines();
    ended
}

/// Variables that are named as settings are and set nothing, a sentence each.
fn unknown_variables() -> Vec<String> {
    let command = command();
    let args = command.get_subcommands().flat_map(Command::get_arguments);
    let known: BTreeSet<&str> = args.filter_map(|arg| arg.get_env()?.to_str()).collect();
    let likeness = |name: &str, other: &str| strsim::normalized_levenshtein(name, other);
    env::vars_os()
        .filter_map(|(name, _)| name.into_string().ok())
        .filter(|name| name.starts_with("AEP_GATEWAY_") && !is_of_kubernetes(name))
        .filter(|name| !known.contains(name.as_str()))
        .map(|name| {
            let nearest = known
                .iter()
                .max_by(|a, b| likeness(&name, a).total_cmp(&likeness(&name, b)));
            let nearest = nearest.copied().unwrap_or_default();
            format!("{name} sets nothing: there is no such setting. The nearest is {nearest}")
        })
        .collect()
}

/// Whether Kubernetes makes this variable for a Service (Kubernetes, "Accessing the
/// Service", and Docker's links, whose names it took over): one named `aep-gateway`
/// has names like ours.
fn is_of_kubernetes(variable: &str) -> bool {
    variable.ends_with("_SERVICE_HOST")
        || variable.contains("_SERVICE_PORT")
        || variable.ends_with("_PORT")
        || ["_TCP", "_UDP", "_SCTP"].iter().any(|protocol| {
            let (before, after) = variable.rsplit_once(protocol).unwrap_or_default();
            let is_link = matches!(after, "" | "_PROTO" | "_PORT" | "_ADDR");
            is_link
                && before
                    .trim_end_matches(|c: char| c.is_ascii_digit())
                    .ends_with("_PORT_")
        })
}

/// The settings that hold, with these proxies; or all that is wrong with both.
fn checked(settings: &Settings, proxies: Result<Proxies, Problems>) -> Result<Config, Problems> {
    match (settings.check(), proxies) {
        (Ok(mut config), Ok(proxies)) => {
            config.upstream.proxies = proxies;
            Ok(config)
        }
        (config, proxies) => {
            let problems = [config.err(), proxies.err()];
            Err(problems.into_iter().flatten().flatten().collect())
        }
    }
}

/// The first line on standard output: where the gateway listens.
fn announce(running: &Running) -> io::Result<()> {
    let line = json!({
        "listen": running.listen().to_string(),
        "admin": running.admin().to_string(),
    });
    say(&line.to_string())
}

async fn run_simulator(simulate: Simulate) -> io::Result<ExitCode> {
    let options = SimulatorOptions {
        faults: simulate.faults,
        share: simulate.share,
        seed: simulate.seed,
        latency: simulate.latency,
        catalog_lag: simulate.catalog_lag,
    };
    let simulator = Simulator::start(simulate.listen, options).await?;
    let line = json!({
        "listen": simulator.address().to_string(),
        "upstream_url": simulator.import_url(),
        "catalog_url": simulator.catalog_url(),
    });
    say(&line.to_string())?;
    StopSignals::listen()?.stop().await;
    Ok(ExitCode::SUCCESS)
}

/// Asks the admin listener, which answers whatever TLS callers have to speak.
async fn check_health(healthcheck: Healthcheck) -> io::Result<ExitCode> {
    const LONGEST: Duration = Duration::from_secs(3);
    let mut address = healthcheck.address;
    if address.ip().is_unspecified() {
        // Not localhost: a bare container has no file of host names.
        address.set_ip(Ipv4Addr::LOCALHOST.into());
    }
    let ask = async {
        let mut stream = TcpStream::connect(address).await?;
        let request =
            format!("GET /readyz HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.take(64 * 1024).read_to_string(&mut answer).await?;
        Ok(answer)
    };
    let answer = tokio::time::timeout(LONGEST, ask)
        .await
        .unwrap_or_else(|_| Err(io::Error::other("no answer in time")))?;
    say(answer.lines().last().unwrap_or_default())?;
    Ok(match answer.starts_with("HTTP/1.1 200 ") {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// A client for a gateway on this machine.
fn connect(listen: &Listen) -> io::Result<Channel> {
    let target = match listen {
        Listen::Tcp(address) if address.ip().is_unspecified() => {
            // Not localhost: a bare container has no file of host names.
            format!("http://127.0.0.1:{}", address.port())
        }
        Listen::Tcp(address) => format!("http://{address}"),
        Listen::Unix(path) => format!("unix://{}", path.display()),
    };
    let endpoint = Endpoint::from_shared(target).map_err(io::Error::other)?;
    Ok(endpoint.connect_lazy())
}

fn write_descriptor(descriptor: Descriptor) -> ExitCode {
    let content = match descriptor.service_config {
        true => SERVICE_CONFIG.as_bytes(),
        false => DESCRIPTOR_SET,
    };
    let written = match &descriptor.output {
        Some(file) => fs::write(file, content),
        None => io::stdout().write_all(content),
    };
    exit_code(written.map(|()| ExitCode::SUCCESS))
}

fn print_config(settings: &Settings, matches: &ArgMatches) -> ExitCode {
    let upstream = match checked(settings, Proxies::from_environment()) {
        Ok(config) => config.upstream,
        Err(problems) => return refuse(&problems),
    };
    unknown_variables().iter().for_each(|problem| tell(problem));
    let Some((name, matches)) = matches.subcommand() else {
        return ExitCode::from(USAGE);
    };
    let from_file = settings_file::keys(matches);
    let mut lines = Vec::new();
    for arg in command()
        .find_subcommand(name)
        .into_iter()
        .flat_map(Command::get_arguments)
    {
        let key = arg.get_id().as_str();
        let source = match matches.value_source(key) {
            Some(ValueSource::CommandLine) => "flag",
            Some(ValueSource::EnvVariable) => "environment",
            Some(_) if from_file.iter().any(|known| known == key) => "file",
            _ => "default",
        };
        let value = match matches.get_raw(key).and_then(|mut values| values.next()) {
            Some(_) if key == "default_api_key" => "\"[redacted]\"".to_owned(),
            Some(value) => json!(value.to_string_lossy()).to_string(),
            None => {
                lines.push(format!("# {key} is not set"));
                continue;
            }
        };
        lines.push(format!("{key} = {value} # {source}"));
    }
    for (key, url) in [
        ("upstream_url", &upstream.import_url),
        ("catalog_url", &upstream.catalog_url),
    ] {
        lines.push(match upstream.proxies.of(url) {
            Some(proxy) => format!("# {key} is reached through the proxy {proxy}"),
            None => format!("# {key} is reached without a proxy"),
        });
    }
    exit_code(say(&lines.join("\n")).map(|()| ExitCode::SUCCESS))
}

fn run_async(work: impl Future<Output = io::Result<ExitCode>>) -> ExitCode {
    run_on(runtime::Builder::new_multi_thread(), work)
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
        tell(&format!("error: {error}"));
        ExitCode::FAILURE
    })
}

/// What asks the program to stop: SIGTERM and Ctrl-C.
struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignals {
    fn listen() -> io::Result<Self> {
        Ok(StopSignals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// Waits for the next.
    async fn stop(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// SIGHUP means "read your files again" to some, and never "end". With TLS the server
/// reads its files; without there are none.
fn heed_hangup(with_tls: bool) -> io::Result<()> {
    let mut hangup = signal(SignalKind::hangup())?;
    if !with_tls {
        tokio::spawn(async move {
            while hangup.recv().await.is_some() {
                tracing::info!("SIGHUP: without TLS there are no files to read again");
            }
        });
    }
    Ok(())
}

/// Writes a line to standard output.
fn say(line: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()
}

/// Writes a line to standard error, where there is one.
fn tell(line: &str) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

fn refuse(problems: &[String]) -> ExitCode {
    tell("error: the configuration is bad:");
    for problem in problems {
        tell(&format!("  {problem}"));
    }
    ExitCode::from(USAGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_of_kubernetes_are_known() {
        for (name, is_known) in [
            ("AEP_GATEWAY_SERVICE_HOST", true),
            ("AEP_GATEWAY_SERVICE_PORT", true),
            ("AEP_GATEWAY_SERVICE_PORT_GRPC_ADMIN", true),
            ("AEP_GATEWAY_PORT", true),
            ("AEP_GATEWAY_PORT_50051_TCP", true),
            ("AEP_GATEWAY_PORT_50051_TCP_PROTO", true),
            ("AEP_GATEWAY_PORT_50051_TCP_PORT", true),
            ("AEP_GATEWAY_PORT_50051_TCP_ADDR", true),
            ("AEP_GATEWAY_ADMIN_PORT_9464_UDP_ADDR", true),
            ("AEP_GATEWAY_LISTN", false),
            ("AEP_GATEWAY_TCP", false),
            ("AEP_GATEWAY_PORTS", false),
        ] {
            assert_eq!(is_of_kubernetes(name), is_known, "{name}");
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        command().debug_assert();
    }
}

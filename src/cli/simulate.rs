//! `simulate`: the simulated API alone.

use std::{io, net::SocketAddr, process::ExitCode, time::Duration};

use clap::Args;
use serde_json::json;
use tokio::runtime;

use super::{print, run_on, signals::StopSignals};
use aep_simulator::{Injection, Simulator, SimulatorOptions};

#[derive(Args)]
pub(super) struct Simulate {
    /// The address for REST requests. Port 0 picks a free port.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8080")]
    listen: SocketAddr,
    /// A fault to inject, such as reset-after or list:status-503. Can be repeated.
    #[arg(long = "fault", value_name = "NAME")]
    faults: Vec<Injection>,
    /// The share of requests that get a fault, from 0 to 1.
    #[arg(long, value_name = "SHARE", default_value = "1")]
    share: f64,
    /// The seed of the random choice of faults: the same seed, the same faults.
    #[arg(long, value_name = "NUMBER", default_value = "0")]
    seed: u64,
    /// How long each create takes.
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = humantime::parse_duration)]
    latency: Duration,
    /// How long until Catalog shows a new batch.
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = humantime::parse_duration)]
    catalog_lag: Duration,
}

impl Simulate {
    pub(super) fn run(self) -> ExitCode {
        run_on(runtime::Builder::new_multi_thread(), self.serve())
    }

    async fn serve(self) -> io::Result<ExitCode> {
        let options = SimulatorOptions {
            faults: self.faults,
            share: self.share,
            seed: self.seed,
            latency: self.latency,
            catalog_lag: self.catalog_lag,
        };
        let simulator = Simulator::start(self.listen, options).await?;
        let line = json!({
            "listen": simulator.address().to_string(),
            "upstream_url": simulator.import_url(),
            "catalog_url": simulator.catalog_url(),
        });
        print(&line.to_string())?;
        StopSignals::listen()?.next().await;
        Ok(ExitCode::SUCCESS)
    }
}

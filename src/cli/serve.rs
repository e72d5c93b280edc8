//! `serve`: the gateway. `demo` runs it too, with a simulated API.

use std::{io, process::ExitCode, sync::Arc};

use serde_json::json;
use tokio::runtime;

use super::{
    config::unknown_variables,
    demo, exit_code, print, refuse, run_on,
    signals::{StopSignals, handle_hangup},
};
use crate::{
    config::{Given, Settings},
    proxies::Proxies,
    server::{self, Running},
    telemetry::{self, Telemetry, Tracing},
};

/// Runs `serve` or `demo` until a signal.
pub(super) fn run(settings: Settings, given: &Given, demo: bool) -> ExitCode {
    let proxies = match demo {
        true => Ok(Proxies::default()), // it calls only this machine
        false => Proxies::from_environment(),
    };
    let mut config = match settings.check(&given.bad_values, proxies) {
        Ok(config) => config,
        Err(problems) => return refuse(&problems),
    };
    if demo && config.tls.is_some() {
        let problem = "demo calls itself without TLS: remove --tls-…, or use serve".to_owned();
        return refuse(&[problem]);
    }
    let tracing = match Tracing::from_environment(&config.upstream.proxies) {
        Ok(tracing) => tracing,
        Err(problem) => return refuse(&[problem]),
    };
    let logs = telemetry::start_logs(
        config.settings.log_format,
        config.settings.log_level.clone(),
    );
    let log_level = match logs {
        Ok(log_level) => log_level,
        Err(error) => return exit_code(Err(error)),
    };
    for problem in unknown_variables() {
        tracing::warn!("{problem}");
    }
    let telemetry = Arc::new(Telemetry::new(
        tracing.as_ref().map(Tracing::tracer),
        config.settings.log_format,
    ));
    // This thread accepts connections; the gateway has others that serve them.
    let result = run_on(runtime::Builder::new_current_thread(), async move {
        let mut signals = StopSignals::listen()?;
        handle_hangup(config.tls.is_some())?;
        let simulator = match demo {
            true => Some(demo::simulator(&mut config).await?),
            false => None,
        };
        let running = server::start(config, telemetry, log_level)
            .await
            .map_err(io::Error::other)?;
        print_addresses(&running)?;
        if let Some(simulator) = &simulator {
            demo::show(running.listen(), simulator).await?;
        }
        signals.next().await;
        tokio::select! {
            () = running.drain() => Ok(ExitCode::SUCCESS),
            () = signals.next() => {
                tracing::warn!("second stop signal: calls in flight are aborted");
                Ok(ExitCode::FAILURE)
            }
        }
    });
    if let Some(tracing) = tracing {
        tracing.stop();
    }
    telemetry::write_last_lines();
    result
}

/// The first line on standard output: where the gateway listens.
fn print_addresses(running: &Running) -> io::Result<()> {
    let line = json!({
        "listen": running.listen().to_string(),
        "admin": running.admin().to_string(),
    });
    print(&line.to_string())
}

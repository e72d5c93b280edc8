//! `healthcheck`: whether a running gateway is ready.

use std::{
    error::Error,
    io,
    net::{Ipv4Addr, SocketAddr},
    process::ExitCode,
    time::Duration,
};

use clap::Args;
use reqwest::{StatusCode, blocking::Client};

use super::{exit_code, print};

const TIMEOUT: Duration = Duration::from_secs(3);

#[derive(Args)]
pub(super) struct Healthcheck {
    /// The gateway's --admin-listen address. `0.0.0.0` and `[::]` mean this machine.
    #[arg(
        long,
        value_name = "ADDRESS",
        env = "AEP_GATEWAY_ADMIN_LISTEN",
        default_value = "127.0.0.1:9464"
    )]
    address: SocketAddr,
}

impl Healthcheck {
    pub(super) fn run(self) -> ExitCode {
        exit_code(self.check())
    }

    /// Plain HTTP, whatever TLS gRPC callers use, so no certificate authorities are needed.
    fn check(mut self) -> io::Result<ExitCode> {
        if self.address.ip().is_unspecified() {
            // Not localhost: a bare container has no hosts file.
            self.address.set_ip(Ipv4Addr::LOCALHOST.into());
        }
        let client = Client::builder()
            .no_proxy()
            .timeout(TIMEOUT)
            .tls_certs_only([]);
        let client = client.build().map_err(root_cause)?;
        let page = client.get(format!("http://{}/readyz", self.address)).send();
        let page = page.map_err(root_cause)?;
        let code = match page.status() == StatusCode::OK {
            true => ExitCode::SUCCESS,
            false => ExitCode::FAILURE,
        };
        print(page.text().map_err(root_cause)?.trim_end())?;
        Ok(code)
    }
}

/// The last cause: the others only say that a request failed.
fn root_cause(error: reqwest::Error) -> io::Error {
    let mut cause: &dyn Error = &error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    io::Error::other(cause.to_string())
}

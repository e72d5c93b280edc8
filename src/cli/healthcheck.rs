//! `healthcheck`: whether a running gateway is ready.

use std::{
    error::Error,
    io,
    net::{Ipv4Addr, SocketAddr},
    process::ExitCode,
    time::Duration,
};

use clap::Args;
use reqwest::blocking::Client;

use super::{exit_code, print};

const TIMEOUT: Duration = Duration::from_secs(3);

#[derive(Args)]
pub(super) struct Healthcheck {
    /// The gateway's --admin-listen address. 0.0.0.0 and [::] mean this machine.
    #[arg(
        long,
        value_name = "ADDRESS",
        env = "AEP_GATEWAY_ADMIN_LISTEN",
        default_value = "127.0.0.1:9464"
    )]
    address: SocketAddr,
}

impl Healthcheck {
    pub(super) fn run(mut self) -> ExitCode {
        if self.address.ip().is_unspecified() {
            // Not localhost: a bare container has no hosts file.
            self.address.set_ip(Ipv4Addr::LOCALHOST.into());
        }
        exit_code(match self.page() {
            Ok((is_ready, text)) => print(text.trim_end()).map(|()| match is_ready {
                true => ExitCode::SUCCESS,
                false => ExitCode::FAILURE,
            }),
            Err(error) => Err(io::Error::other(root_cause(&error))),
        })
    }

    /// Whether the gateway says that it is ready, and its words. Plain HTTP, whatever TLS
    /// gRPC callers use, so no certificate authorities are needed.
    fn page(&self) -> reqwest::Result<(bool, String)> {
        let client = Client::builder()
            .no_proxy()
            .timeout(TIMEOUT)
            .tls_certs_only([])
            .build()?;
        let response = client
            .get(format!("http://{}/readyz", self.address))
            .send()?;
        Ok((response.status() == 200, response.text()?))
    }
}

/// The last cause: the others only say that a request failed.
fn root_cause(error: &dyn Error) -> String {
    match error.source() {
        Some(cause) => root_cause(cause),
        None => error.to_string(),
    }
}

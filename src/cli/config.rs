//! `config`: checks the settings and prints each with its source.

use std::{collections::BTreeSet, env, process::ExitCode};

use clap::Command;
use serde_json::json;

use super::{command, eprint, exit_code, print, refuse};
use crate::{
    config::{Given, Settings},
    proxies::Proxies,
};

/// Prints the configuration as TOML.
pub(super) fn run(settings: Settings, given: &Given) -> ExitCode {
    let upstream = match settings.check(&given.bad_values, Proxies::from_environment()) {
        Ok(config) => config.upstream,
        Err(problems) => return refuse(&problems),
    };
    unknown_variables()
        .iter()
        .for_each(|problem| eprint(problem));
    let mut lines = Vec::new();
    let command = command();
    if let Some((name, values)) = given.matches.subcommand() {
        let subcommand = command.find_subcommand(name).into_iter();
        for arg in subcommand.flat_map(Command::get_arguments) {
            let key = arg.get_id().as_str();
            let value = values.get_raw(key).and_then(|mut values| values.next());
            let value = value.map(|value| match arg.is_hide_env_values_set() {
                true => json!("[redacted]"),
                false => json!(value.to_string_lossy()),
            });
            lines.push(match value {
                Some(value) => format!("{key} = {value} # {}", given.source(key)),
                None => format!("# {key} is not set"),
            });
        }
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
    exit_code(print(&lines.join("\n")).map(|()| ExitCode::SUCCESS))
}

/// Warnings about variables that look like settings and are none.
pub(super) fn unknown_variables() -> Vec<String> {
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
            format!("{name} is not a setting and has no effect. Did you mean {nearest}?")
        })
        .collect()
}

/// Whether Kubernetes sets this variable for a Service (Kubernetes, "Accessing the Service",
/// and Docker's links, whose names it kept). Those of a Service called `aep-gateway` begin like
/// ours.
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
}

//! The settings, typed by clap. Each is a flag, an environment variable and a key of the
//! settings file. `sources` reads them; `rules` holds what no single value shows.

mod rules;
mod sources;

use std::{fmt, net::SocketAddr, path::PathBuf, str::FromStr, time::Duration};

use clap::{ArgAction, Args, Command, builder::RangedU64ValueParser};
use http::{HeaderName, HeaderValue};
use reqwest::Url;
use rustls::pki_types::DnsName;

pub use self::{
    rules::Config,
    sources::{BadValue, Given},
};
use crate::{
    certificates,
    create_batch::LookupPolicy,
    credentials, headers,
    http_client::HttpVersion,
    telemetry::{LogFilter, LogFormat},
};

/// What is wrong, a sentence each.
pub type Problems = Vec<String>;

/// Values separated by commas. An alias, because clap takes a field of type `Vec` for a flag
/// that can be repeated.
pub type List<T> = Vec<T>;

/// The settings of the gateway.
#[derive(Args, Clone, Debug)]
pub struct Settings {
    /// A TOML file with settings.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// The address for gRPC calls, or `unix:/path` for a Unix socket. Port 0 picks a free port.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:50051")]
    pub listen: Listen,

    /// The address for /metrics, /livez and /readyz over plain HTTP.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9464")]
    pub admin_listen: SocketAddr,

    /// Serves the schema by server reflection.
    #[arg(long, action = ArgAction::Set, default_value = "true")]
    pub reflection: bool,

    /// A PEM file with the server certificate and its chain; turns on TLS for gRPC calls.
    /// The TLS files are reloaded when they change.
    #[arg(long, value_name = "FILE")]
    pub tls_cert_file: Option<PathBuf>,

    /// A PEM file with the private key of the server certificate.
    #[arg(long, value_name = "FILE")]
    pub tls_key_file: Option<PathBuf>,

    /// A PEM file with certificate authorities. Clients must then present a certificate that
    /// one of them issued (mTLS).
    #[arg(long, value_name = "FILE")]
    pub tls_client_ca_file: Option<PathBuf>,

    /// Clients that may call, separated by commas: URIs or DNS names (subject alternative names)
    /// such as `spiffe://cluster.local/ns/a/sa/b`. A certificate must contain exactly one of
    /// them. Empty: all clients.
    #[arg(long, value_name = "NAMES", default_value = "", value_parser = list(client_name))]
    pub tls_allowed_clients: List<String>,

    /// Accepts gRPC-Web calls from browsers, over HTTP/1.1 and HTTP/2 on the same port.
    #[arg(long, action = ArgAction::Set, default_value = "false")]
    pub grpc_web: bool,

    /// Origins of the web pages that may call (CORS), separated by commas, such as
    /// `https://app.example.com`.
    #[arg(long, value_name = "ORIGINS", default_value = "", value_parser = list(origin))]
    pub grpc_web_origins: List<HeaderValue>,

    /// The base URL of the Batch Ingestion API.
    #[arg(
        long,
        value_name = "URL",
        default_value = "https://platform.adobe.io/data/foundation/import",
        value_parser = base_url
    )]
    pub upstream_url: Url,

    /// The base URL of the Catalog API, where batches are looked up by external ID.
    #[arg(
        long,
        value_name = "URL",
        default_value = "https://platform.adobe.io/data/foundation/catalog",
        value_parser = base_url
    )]
    pub catalog_url: Url,

    /// A PEM file with certificate authorities to trust in addition to the system's.
    #[arg(long, value_name = "FILE")]
    pub upstream_ca_file: Option<PathBuf>,

    /// The HTTP version for requests to the API. With HTTP/2 all calls share one connection: if
    /// it breaks, all of them have an unknown outcome.
    #[arg(long, value_name = "VERSION", default_value = "auto")]
    pub upstream_http: HttpVersion,

    /// How long connecting to the API may take, including TLS.
    #[arg(long, value_name = "DURATION", default_value = "2s", value_parser = time_limit)]
    pub connect_timeout: Duration,

    /// How long one REST request may take, from sending it to the end of the response.
    #[arg(long, value_name = "DURATION", default_value = "20s", value_parser = time_limit)]
    pub request_timeout: Duration,

    /// When to look up an external ID before creating a batch.
    #[arg(long, value_name = "WHEN", default_value = "always")]
    pub lookup: LookupPolicy,

    /// Adds an external ID to creates that have none, so that a lookup can settle a lost
    /// response. The batch then has a field that the caller did not send.
    #[arg(long, action = ArgAction::Set, default_value = "false")]
    pub generate_external_ids: bool,

    /// How many creates may be in flight. More are refused with UNAVAILABLE.
    #[arg(long, value_name = "NUMBER", default_value = "1000", value_parser = limit())]
    pub max_in_flight: usize,

    /// How many client connections may be open. More are closed at once.
    #[arg(long, value_name = "NUMBER", default_value = "10000", value_parser = limit())]
    pub max_connections: usize,

    /// How old a client connection may get before it receives a GOAWAY, give or take 10%.
    #[arg(long, value_name = "DURATION", default_value = "30m", value_parser = time_limit)]
    pub max_connection_age: Duration,

    /// A file with the access token for calls without `authorization`. Read at start.
    #[arg(long, value_name = "FILE")]
    pub default_token_file: Option<PathBuf>,

    /// The `x-api-key` for calls without one.
    #[arg(long, value_name = "KEY", hide_env_values = true, value_parser = credential::<1>)]
    pub default_api_key: Option<HeaderValue>,

    /// The `x-gw-ims-org-id` for calls without one.
    #[arg(long, value_name = "ID", value_parser = credential::<2>)]
    pub default_org_id: Option<HeaderValue>,

    /// The `x-sandbox-name` for calls without one.
    #[arg(long, value_name = "NAME", value_parser = credential::<3>)]
    pub default_sandbox_name: Option<HeaderValue>,

    /// Refuses calls that send a value other than the default.
    #[arg(long, action = ArgAction::Set, default_value = "false")]
    pub fixed_defaults: bool,

    /// Confirms that something in front of the gateway authenticates callers. Required with
    /// --default-token-file unless --tls-allowed-clients is set, because everyone who can reach
    /// the gateway then acts with that token.
    #[arg(long, action = ArgAction::Set, default_value = "false")]
    pub callers_are_authenticated: bool,

    /// Names of further metadata to forward to the API, separated by commas. Refused are names
    /// that the gateway sets itself, that belong to a connection (`te`, `via`), or that change
    /// the response (`accept-…`, `content-…`, `if-…`, `range`).
    #[arg(long, value_name = "NAMES", default_value = "", value_parser = list(forwardable))]
    pub forward_metadata: List<HeaderName>,

    /// How long to keep serving after SIGTERM before connections receive a GOAWAY.
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = duration)]
    pub drain_delay: Duration,

    /// How long calls in flight may take to finish after that.
    #[arg(long, value_name = "DURATION", default_value = "25s", value_parser = duration)]
    pub drain_timeout: Duration,

    /// The format of log lines. The default of `demo` is text.
    #[arg(long, value_name = "FORMAT", default_value = "json")]
    pub log_format: LogFormat,

    /// Which log lines to write: off, error, warn, info, debug, trace, or directives such as
    /// `info,h2=debug`. Libraries log errors only, unless the level is debug or trace.
    #[arg(long, value_name = "FILTER", default_value = "info")]
    pub log_level: LogFilter,
}

/// The first setting of each part of `--help`.
const HEADINGS: [(&str, &str); 9] = [
    ("listen", "Listeners"),
    ("tls_cert_file", "TLS"),
    ("grpc_web", "Browsers"),
    ("upstream_url", "Adobe's API"),
    ("lookup", "Creating batches"),
    ("max_in_flight", "Limits"),
    ("default_token_file", "Credentials and metadata"),
    ("drain_delay", "Shutdown"),
    ("log_format", "Logs"),
];

/// Gives the settings of a command what they have in common: a heading, an environment
/// variable, and for booleans the flag alone, which means true.
pub fn with_variables(command: Command) -> Command {
    let mut heading = None;
    command.args_override_self(true).mut_args(|arg| {
        let starts = HEADINGS.iter().find(|(first, _)| arg.get_id() == first);
        heading = starts.map(|(_, heading)| *heading).or(heading);
        let variable = format!("AEP_GATEWAY_{}", arg.get_id()).to_ascii_uppercase();
        let is_boolean = arg
            .get_possible_values()
            .iter()
            .any(|value| value.matches("true", false));
        let arg = arg.env(variable).help_heading(heading);
        match is_boolean {
            true => arg
                .value_name("BOOL")
                .num_args(0..=1)
                .default_missing_value("true"),
            false => arg,
        }
    })
}

/// Where gRPC calls are accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// An IP address and port.
    Tcp(SocketAddr),
    /// A Unix socket.
    Unix(PathBuf),
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Listen::Tcp(address) => write!(f, "{address}"),
            Listen::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("unix:") {
            Some("") => Err("no path after unix:".to_owned()),
            Some(path) => Ok(Listen::Unix(path.into())),
            None => text
                .parse()
                .map(Listen::Tcp)
                .map_err(|_| "neither an IP address with a port nor unix:/path".to_owned()),
        }
    }
}

/// Reads values separated by commas, and names every one that is invalid.
fn list<T>(
    read: impl Fn(&str) -> Result<T, String> + Copy,
) -> impl Fn(&str) -> Result<List<T>, String> + Clone {
    move |text| {
        let words = text
            .split(',')
            .map(str::trim)
            .filter(|word| !word.is_empty());
        let (good, bad): (Vec<_>, Vec<_>) = words.map(read).partition(Result::is_ok);
        let bad: Vec<_> = bad.into_iter().filter_map(Result::err).collect();
        match bad.is_empty() {
            // An empty list can mean "all", and a comma does not say that.
            true if good.is_empty() && !text.is_empty() => Err("it contains no names".to_owned()),
            true => Ok(good.into_iter().flatten().collect()),
            false => Err(bad.join("; ")),
        }
    }
}

/// Refuses what no certificate can contain, and wildcards, which would match only themselves.
fn client_name(name: &str) -> Result<String, String> {
    match certificates::is_uri(name) || DnsName::try_from(name).is_ok() {
        true => Ok(name.to_owned()),
        false => Err(format!("{name:?} is neither a URI nor a DNS name")),
    }
}

/// An origin as browsers write it. No `*`: any page could then call with the default
/// credentials.
fn origin(text: &str) -> Result<HeaderValue, String> {
    let bad = || format!("{text:?} is not an origin such as https://app.example.com");
    let url = Url::parse(text).map_err(|_| bad())?;
    let canonical = url.origin().ascii_serialization();
    match HeaderValue::from_str(text) {
        Ok(value) if canonical == text && matches!(url.scheme(), "http" | "https") => Ok(value),
        _ => Err(bad()),
    }
}

fn base_url(text: &str) -> Result<Url, String> {
    let url = Url::parse(text).map_err(|error| format!("not a URL: {error}"))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err("it must begin with https:// or http://".to_owned());
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("it must not contain a user name or password".to_owned());
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err("it must not contain a query or fragment".to_owned());
    }
    Ok(url)
}

/// A default for the header with this number in [`headers::CREDENTIALS`].
fn credential<const HEADER: usize>(text: &str) -> Result<HeaderValue, String> {
    let name = &headers::CREDENTIALS[HEADER];
    let bad = |problem: &str| format!("it {problem} (it is sent as {name})");
    let mut value = HeaderValue::from_str(text).map_err(|_| bad("is not a header value"))?;
    value.set_sensitive(headers::is_secret(name));
    credentials::check(name, &value).map_err(bad)?;
    Ok(value)
}

fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text)
        .map_err(|_| format!("{text:?} is not a duration such as 500ms, 30s or 2m"))
}

fn time_limit(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        Duration::ZERO => Err("it must be more than zero".to_owned()),
        limit => Ok(limit),
    }
}

fn limit() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..=1_000_000)
}

/// Headers that are never forwarded, and why. A name that ends in `-` stands for all names
/// that begin with it.
const NOT_FORWARDABLE: [(&str, &str); 4] = [
    (
        "the gateway sets it itself",
        "accept authorization cookie user-agent x-api-key x-gw-ims-org-id x-request-id \
         x-sandbox-name",
    ),
    (
        "it belongs to a connection, not to a call",
        "connection expect forwarded host http2-settings keep-alive max-forwards proxy- \
         te trailer transfer-encoding upgrade via",
    ),
    (
        "it describes the body, which the gateway writes",
        "content- digest repr-digest want-",
    ),
    (
        "it changes the API's response, which the gateway must be able to read",
        "a-im accept- if- prefer range x-http-method x-http-method-override \
         x-method-override",
    ),
];

/// The name of a header that may be forwarded.
fn forwardable(name: &str) -> Result<HeaderName, String> {
    let parsed: HeaderName = name
        .parse()
        .map_err(|_| format!("{name:?} is not a metadata name"))?;
    let lower = parsed.as_str();
    if lower.starts_with("grpc-") || lower.ends_with("-bin") {
        return Err(format!("{lower} cannot be forwarded: gRPC reserves it"));
    }
    let is_named = |never: &str| match never.ends_with('-') {
        true => lower.starts_with(never),
        false => lower == never,
    };
    let refused = NOT_FORWARDABLE
        .iter()
        .find(|(_, names)| names.split(' ').any(is_named));
    match refused {
        Some((why, _)) => Err(format!("{lower} cannot be forwarded: {why}")),
        None => Ok(parsed),
    }
}
#[cfg(test)]
mod tests {
    use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

    use super::*;
    use crate::proxies::Proxies;

    #[derive(Parser)]
    struct Line {
        #[command(subcommand)]
        command: Serve,
    }

    #[derive(Subcommand)]
    enum Serve {
        Serve(Settings),
    }

    pub(super) fn check(flags: &[&str]) -> Result<Config, Problems> {
        let command = Line::command().mut_subcommand("serve", with_variables);
        let line = ["gateway", "serve"].iter().chain(flags);
        let line: Vec<_> = line.map(|word| word.into()).collect();
        let given = Given::read(&command, &line)?;
        let Serve::Serve(settings) = Line::from_arg_matches(&given.matches).unwrap().command;
        settings.check(&given.bad_values, Ok(Proxies::default()))
    }

    #[test]
    fn the_defaults_are_valid() {
        let config = check(&[]).expect("defaults");
        assert_eq!(
            config.settings.listen,
            Listen::Tcp(([127, 0, 0, 1], 50051).into())
        );
        assert_eq!(config.settings.request_timeout, Duration::from_secs(20));
    }

    #[test]
    fn all_problems_are_reported_at_once() {
        let problems = check(&[
            "--listen=nowhere",
            "--admin-listen=9464",
            "--reflection=2",
            "--grpc-web=2",
            "--grpc-web-origins=https://ok.example,*",
            "--upstream-url=ftp://host",
            "--catalog-url=https://user:hunter2@host",
            "--upstream-ca-file=/nowhere",
            "--upstream-http=3",
            "--lookup=sometimes",
            "--connect-timeout=0s",
            "--request-timeout=soon",
            "--max-in-flight=0",
            "--default-token-file=/nowhere",
            "--default-api-key=sec ret",
            "--fixed-defaults=maybe",
            "--forward-metadata=x-ok,authorization,grpc-timeout",
            "--drain-timeout=-1s",
            "--log-format=xml",
            "--log-level=a=b=c",
        ])
        .expect_err("problems");
        let flags: Vec<_> = problems
            .iter()
            .filter_map(|problem| {
                problem
                    .split([' ', '\'', ':'])
                    .find(|word| word.starts_with("--"))
            })
            .collect();
        assert_eq!(
            flags,
            [
                "--listen",
                "--admin-listen",
                "--reflection",
                "--grpc-web",
                "--grpc-web-origins",
                "--upstream-url",
                "--catalog-url",
                "--upstream-http",
                "--lookup",
                "--connect-timeout",
                "--request-timeout",
                "--max-in-flight",
                "--default-api-key",
                "--fixed-defaults",
                "--forward-metadata",
                "--drain-timeout",
                "--log-format",
                "--log-level",
                "--upstream-ca-file",
                "--default-token-file",
                "--default-token-file",
            ]
        );
        let problems = problems.join("\n");
        assert!(!problems.contains("sec ret") && !problems.contains("hunter2"));
        for part in [
            "invalid value 'xml' for '--log-format <FORMAT>' [possible values: json, text]",
            "authorization cannot be forwarded: the gateway sets it itself; grpc-timeout cannot",
            "\"soon\" is not a duration",
            "0 is not in 1..=1000000",
        ] {
            assert!(problems.contains(part), "{part} is not in {problems}");
        }
    }

    #[test]
    fn a_rule_does_not_judge_a_value_that_is_invalid() {
        for (flags, problem) in [
            (
                ["--grpc-web=2", "--grpc-web-origins=https://a.example"],
                "--grpc-web ",
            ),
            (["--generate-external-ids", "--lookup=x"], "--lookup "),
        ] {
            let problems = check(&flags).expect_err("problems");
            assert_eq!(problems.len(), 1, "{problems:?}");
            assert!(problems[0].contains(problem), "{problems:?}");
        }
    }

    #[test]
    fn origins_are_written_as_browsers_write_them() {
        for (origins, good) in [
            ("https://app.example.com", true),
            ("http://localhost:3000,https://app.example.com:8443", true),
            ("http://[::1]:3000", true),
            ("*", false),
            ("null", false),
            ("app.example.com", false),
            ("https://app.example.com/", false),
            ("https://app.example.com/page", false),
            ("https://app.example.com:443", false),
            ("https://App.example.com", false),
            ("https://user@app.example.com", false),
            ("file:///page", false),
        ] {
            let origins = format!("--grpc-web-origins={origins}");
            let checked = check(&["--grpc-web", &origins]);
            assert_eq!(checked.is_ok(), good, "{origins}");
        }
        let settings = check(&["--grpc-web"]).expect("no origin").settings;
        assert!(settings.grpc_web && settings.grpc_web_origins.is_empty());
        assert!(check(&["--grpc-web-origins=https://app.example.com"]).is_err());
    }

    #[test]
    fn forwarded_metadata_is_a_list() {
        let config = check(&["--forward-metadata", "x-a, X-B"]).expect("names");
        assert_eq!(config.credentials.forward, ["x-a", "x-b"]);
        for name in [
            "Accept-Encoding",
            "accept-language",
            "content-encoding",
            "content-range",
            "range",
            "if-none-match",
            "if-match",
            "if-modified-since",
            "if-range",
            "prefer",
            "proxy-authorization",
            "x-http-method-override",
            "x-method-override",
            "te",
            "authorization",
            "x-api-key",
            "x-request-id",
            "grpc-timeout",
            "x-trace-bin",
            "b@d",
        ] {
            let flag = format!("--forward-metadata=x-ok,{name}");
            let problems = check(&[&flag]).expect_err(name);
            let lower = name.to_ascii_lowercase();
            assert!(
                problems.len() == 1 && problems[0].contains(&lower),
                "{problems:?}"
            );
        }
        for own in headers::CREDENTIALS.iter() {
            assert!(forwardable(own.as_str()).is_err(), "{own}");
        }
    }
}

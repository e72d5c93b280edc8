//! What the operator says, typed and checked. All problems are told at once.

use std::{
    collections::BTreeSet, fmt, fs, net::SocketAddr, path::PathBuf, str::FromStr, time::Duration,
};

use clap::Args;
use http::{HeaderName, HeaderValue};
use reqwest::Url;
use rustls::pki_types::{CertificateDer, DnsName};

use crate::{
    certificates::{self, TlsFiles, TlsOptions},
    create_batch::LookupPolicy,
    credentials::{self, Credentials},
    headers::{self, CREDENTIALS},
    http_client::{HttpVersion, UpstreamOptions},
    proxies::Proxies,
    telemetry::{LogFilter, LogFormat},
};

/// The settings of the gateway, as they were given. Each is a flag, an
/// environment variable (`AEP_GATEWAY_` and the flag in capitals) and a key of
/// the TOML file (the flag with underscores). Flags win over the environment,
/// and the environment wins over the file.
#[derive(Args, Clone, Debug)]
pub struct Settings {
    /// A TOML file with settings.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Where gRPC calls are taken: an address, or `unix:/path`. Port 0 picks a free port.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:50051")]
    pub listen: String,

    /// Where /metrics, /livez and /readyz are served over plain HTTP.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9464")]
    pub admin_listen: String,

    /// Whether server reflection tells the schema to callers (true or false).
    #[arg(
        long,
        value_name = "BOOL",
        default_value = "true",
        num_args = 0..=1,
        default_missing_value = "true"
    )]
    pub reflection: String,
    /// A PEM file with the gateway's certificate and its chain: TLS where gRPC calls are taken.
    /// This and the next two files are read again when they change.
    #[arg(long, value_name = "FILE")]
    pub tls_cert_file: Option<String>,

    /// A PEM file with the key of that certificate.
    #[arg(long, value_name = "FILE")]
    pub tls_key_file: Option<String>,

    /// A PEM file with certificate authorities: clients must show a certificate of one (mTLS).
    #[arg(long, value_name = "FILE")]
    pub tls_client_ca_file: Option<String>,

    /// The clients that may call: URIs or DNS names in their certificates (subject alternative
    /// names), separated by commas, like `spiffe://cluster.local/ns/a/sa/b`. A certificate must
    /// hold one of them, and one alone. All by default.
    #[arg(long, value_name = "NAMES", default_value = "")]
    pub tls_allowed_clients: String,

    /// Whether browsers may call: gRPC-Web over HTTP/1.1 and HTTP/2 (true or false).
    #[arg(
        long,
        value_name = "BOOL",
        default_value = "false",
        num_args = 0..=1,
        default_missing_value = "true"
    )]
    pub grpc_web: String,

    /// Origins whose web pages may call, like `https://app.example.com`, separated by commas.
    #[arg(long, value_name = "ORIGINS", default_value = "")]
    pub grpc_web_origins: String,

    /// The base URL of the Batch Ingestion API.
    #[arg(
        long,
        value_name = "URL",
        default_value = "https://platform.adobe.io/data/foundation/import"
    )]
    pub upstream_url: String,

    /// The base URL of the Catalog API, where batches are looked up by their external id.
    #[arg(
        long,
        value_name = "URL",
        default_value = "https://platform.adobe.io/data/foundation/catalog"
    )]
    pub catalog_url: String,

    /// A PEM file with certificate authorities to trust besides the platform's.
    #[arg(long, value_name = "FILE")]
    pub upstream_ca_file: Option<String>,

    /// The HTTP version to speak upstream: auto, 1 or 2 (2 without TLS: by prior knowledge).
    #[arg(long, value_name = "VERSION", default_value = "auto")]
    pub upstream_http: String,

    /// When external ids are looked up before a create: always, on-retry or never.
    #[arg(long, value_name = "WHEN", default_value = "always")]
    pub look_up: String,

    /// Whether a create without an external id gets one, so that a lost answer can be settled by a
    /// look-up (true or false). It adds a field that the caller did not send.
    #[arg(
        long,
        value_name = "BOOL",
        default_value = "false",
        num_args = 0..=1,
        default_missing_value = "true"
    )]
    pub generate_external_ids: String,

    /// How long a connection to the API may take to come about.
    #[arg(long, value_name = "DURATION", default_value = "2s")]
    pub connect_timeout: String,

    /// How long one REST request may take in all.
    #[arg(long, value_name = "DURATION", default_value = "20s")]
    pub request_timeout: String,

    /// How many creates may be in flight; more are refused with UNAVAILABLE.
    #[arg(long, value_name = "NUMBER", default_value = "1000")]
    pub max_in_flight: String,

    /// How many connections there may be; more are closed at once.
    #[arg(long, value_name = "NUMBER", default_value = "10000")]
    pub max_connections: String,

    /// How long a connection may last before it is told to go away, less or more a tenth.
    #[arg(long, value_name = "DURATION", default_value = "30m")]
    pub max_connection_age: String,

    /// A file with the access token of calls that send no `authorization`. Read at start.
    #[arg(long, value_name = "FILE")]
    pub default_token_file: Option<String>,

    /// `x-api-key` of calls that send none.
    #[arg(long, value_name = "KEY", hide_env_values = true)]
    pub default_api_key: Option<String>,

    /// `x-gw-ims-org-id` of calls that send none.
    #[arg(long, value_name = "ID")]
    pub default_org_id: Option<String>,

    /// `x-sandbox-name` of calls that send none.
    #[arg(long, value_name = "NAME")]
    pub default_sandbox_name: Option<String>,

    /// Refuses calls that send another value than a default (true or false).
    #[arg(
        long,
        value_name = "BOOL",
        default_value = "false",
        num_args = 0..=1,
        default_missing_value = "true"
    )]
    pub fixed_defaults: String,

    /// Says that something in front of the gateway authenticates callers: needed with a default
    /// token and without --tls-allowed-clients, because whoever reaches the gateway then acts
    /// with that token (true or false).
    #[arg(
        long,
        value_name = "BOOL",
        default_value = "false",
        num_args = 0..=1,
        default_missing_value = "true"
    )]
    pub callers_are_authenticated: String,

    /// Further metadata of a call to pass on to the API, by name, separated by commas.
    #[arg(long, value_name = "NAMES", default_value = "")]
    pub forward_metadata: String,

    /// How long to go on after SIGTERM before connections are told to go away.
    #[arg(long, value_name = "DURATION", default_value = "0s")]
    pub drain_delay: String,

    /// How long calls in flight may take to finish after that.
    #[arg(long, value_name = "DURATION", default_value = "25s")]
    pub drain_timeout: String,

    /// How log lines look: json or text.
    #[arg(long, value_name = "FORMAT", default_value = "json")]
    pub log_format: String,

    /// Which log lines are written: a level, or directives like `info,h2=debug`. A level is
    /// the gateway's own; libraries tell errors alone, unless it is debug or trace.
    #[arg(long, value_name = "FILTER", default_value = "info")]
    pub log_level: String,
}

/// Where calls are taken.
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
            Some("") => Err("the path after unix: is missing".to_owned()),
            Some(path) => Ok(Listen::Unix(path.into())),
            None => text
                .parse()
                .map(Listen::Tcp)
                .map_err(|_| "is neither an IP address with a port nor unix:/path".to_owned()),
        }
    }
}

/// Settings that hold.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where gRPC calls are taken.
    pub listen: Listen,
    /// Where the admin pages are served.
    pub admin_listen: SocketAddr,
    /// Whether server reflection tells the schema.
    pub reflection: bool,
    /// TLS where gRPC calls are taken.
    pub tls: Option<TlsOptions>,
    /// The origins whose web pages may call, if gRPC-Web is on.
    pub grpc_web: Option<Vec<HeaderValue>>,
    /// How the API is reached.
    pub upstream: UpstreamOptions,
    /// When external ids are looked up.
    pub look_up: LookupPolicy,
    /// Whether a create without an external id gets one.
    pub generate_external_ids: bool,
    /// How long one REST request may take in all.
    pub request_timeout: Duration,
    /// How many creates may be in flight.
    pub max_in_flight: usize,
    /// How many connections there may be.
    pub max_connections: usize,
    /// How long a connection may last.
    pub max_connection_age: Duration,
    /// Which headers calls carry.
    pub credentials: Credentials,
    /// How long to go on after the signal to stop.
    pub drain_delay: Duration,
    /// How long calls in flight may take to finish after that.
    pub drain_timeout: Duration,
}

/// How logs are written.
#[derive(Debug)]
pub struct LogConfig {
    /// How lines look.
    pub format: LogFormat,
    /// Which lines are written.
    pub filter: LogFilter,
}

/// All that is wrong with the settings, a sentence each.
pub type Problems = Vec<String>;

/// Collects what is wrong; a value that cannot be read is replaced by one that
/// nobody gets to see.
#[derive(Default)]
struct Check {
    problems: Problems,
}

impl Check {
    fn read<T>(
        &mut self,
        flag: &str,
        text: &str,
        read: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        match read(text) {
            Ok(value) => Some(value),
            Err(problem) => {
                self.problems.push(format!("--{flag} {problem}"));
                None
            }
        }
    }

    /// A default credential. Its value is not quoted: it may be a secret.
    fn credential(&mut self, flag: &str, name: &HeaderName, text: &str) -> Option<HeaderValue> {
        self.read(flag, text, |text| {
            let bad = |description: &str| format!("{description} (it becomes {name})");
            let mut value = HeaderValue::from_str(text).map_err(|_| bad("is no header value"))?;
            value.set_sensitive(headers::is_secret(name));
            credentials::check(name, &value).map_err(bad)?;
            Ok(value)
        })
    }
}

impl Settings {
    /// How logs are written.
    pub fn logs(&self) -> Result<LogConfig, Problems> {
        let mut check = Check::default();
        let format = check.read("log-format", &self.log_format, |text| match text {
            "json" => Ok(LogFormat::Json),
            "text" => Ok(LogFormat::Text),
            other => Err(format!("is {other:?}: there are json and text")),
        });
        let filter = check.read("log-level", &self.log_level, str::parse);
        match (format, filter) {
            (Some(format), Some(filter)) => Ok(LogConfig { format, filter }),
            _ => Err(check.problems),
        }
    }

    /// The settings that hold, or all that is wrong with them.
    pub fn check(&self) -> Result<Config, Problems> {
        let mut check = Check {
            problems: self.logs().err().unwrap_or_default(),
        };
        let listen = check.read("listen", &self.listen, str::parse);
        let admin_listen = check.read("admin-listen", &self.admin_listen, |text| {
            text.parse()
                .map_err(|_| format!("is {text:?}: not an IP address with a port"))
        });
        let reflection = check.read("reflection", &self.reflection, boolean);
        let tls = self.tls(&mut check);
        let grpc_web = self.grpc_web(&mut check);
        let import_url = check.read("upstream-url", &self.upstream_url, base_url);
        let catalog_url = check.read("catalog-url", &self.catalog_url, base_url);
        let extra_ca = match &self.upstream_ca_file {
            Some(file) => check.read("upstream-ca-file", file, authorities),
            None => Some(Vec::new()),
        };
        let http = check.read("upstream-http", &self.upstream_http, |text| match text {
            "auto" => Ok(HttpVersion::Auto),
            "1" => Ok(HttpVersion::Http1),
            "2" => Ok(HttpVersion::Http2),
            other => Err(format!("is {other:?}: there are auto, 1 and 2")),
        });
        let look_up = check.read("look-up", &self.look_up, |text| match text {
            "always" => Ok(LookupPolicy::Always),
            "on-retry" => Ok(LookupPolicy::OnRetry),
            "never" => Ok(LookupPolicy::Never),
            other => Err(format!(
                "is {other:?}: there are always, on-retry and never"
            )),
        });
        let generate_external_ids = check.read(
            "generate-external-ids",
            &self.generate_external_ids,
            boolean,
        );
        if generate_external_ids == Some(true) && look_up == Some(LookupPolicy::Never) {
            let problem = "--generate-external-ids has no use with --look-up never";
            check.problems.push(problem.to_owned());
        }
        let connect_timeout = check.read("connect-timeout", &self.connect_timeout, time_limit);
        let request_timeout = check.read("request-timeout", &self.request_timeout, time_limit);
        let max_in_flight = check.read("max-in-flight", &self.max_in_flight, limit);
        let max_connections = check.read("max-connections", &self.max_connections, limit);
        let max_connection_age =
            check.read("max-connection-age", &self.max_connection_age, time_limit);
        let allow_list = tls.as_ref().is_some_and(|tls| !tls.allowed.is_empty());
        let credentials = self.credentials(&mut check, allow_list);
        let drain_delay = check.read("drain-delay", &self.drain_delay, duration);
        let drain_timeout = check.read("drain-timeout", &self.drain_timeout, duration);

        let config = || {
            let (max_in_flight, request_timeout) = (max_in_flight?, request_timeout?);
            Some(Config {
                listen: listen?,
                admin_listen: admin_listen?,
                reflection: reflection?,
                tls,
                grpc_web,
                upstream: UpstreamOptions {
                    import_url: import_url?,
                    catalog_url: catalog_url?,
                    extra_ca: extra_ca?,
                    http: http?,
                    connect_timeout: connect_timeout?,
                    request_timeout,
                    proxies: Proxies::default(),
                    idle_connections: max_in_flight,
                },
                look_up: look_up?,
                generate_external_ids: generate_external_ids?,
                request_timeout,
                max_in_flight,
                max_connections: max_connections?,
                max_connection_age: max_connection_age?,
                credentials,
                drain_delay: drain_delay?,
                drain_timeout: drain_timeout?,
            })
        };
        match config() {
            Some(config) if check.problems.is_empty() => Ok(config),
            _ => Err(check.problems),
        }
    }

    fn tls(&self, check: &mut Check) -> Option<TlsOptions> {
        let client_ca = self.tls_client_ca_file.as_deref();
        let allowed: BTreeSet<_> = list(&self.tls_allowed_clients)
            .filter_map(|name| check.read("tls-allowed-clients", name, client_name))
            .collect();
        let allowed = allowed.into_iter().collect();
        if !self.tls_allowed_clients.is_empty() && list(&self.tls_allowed_clients).count() == 0 {
            let nobody = "--tls-allowed-clients names nobody".to_owned();
            check.problems.push(nobody); // an empty list would let all in
        }
        if client_ca.is_none() && !self.tls_allowed_clients.is_empty() {
            check.problems.push(
                "--tls-allowed-clients needs --tls-client-ca-file: without it no client shows a \
                 certificate"
                    .to_owned(),
            );
        }
        let (cert, key) = match (&self.tls_cert_file, &self.tls_key_file) {
            (Some(cert), Some(key)) => (cert, key),
            (cert, key) => {
                let needs = match (cert, key) {
                    (Some(_), _) => Some("--tls-cert-file needs --tls-key-file"),
                    (_, Some(_)) => Some("--tls-key-file needs --tls-cert-file"),
                    _ => client_ca.map(|_| "--tls-client-ca-file needs --tls-cert-file"),
                };
                check.problems.extend(needs.map(str::to_owned));
                return None;
            }
        };
        let files = TlsFiles {
            cert: cert.into(),
            key: key.into(),
            client_ca: client_ca.map(PathBuf::from),
        };
        if let Err(problems) = files.read().and_then(|pem| files.parse(&pem)) {
            check.problems.extend(problems);
        }
        Some(TlsOptions { files, allowed })
    }

    fn grpc_web(&self, check: &mut Check) -> Option<Vec<HeaderValue>> {
        let on = check.read("grpc-web", &self.grpc_web, boolean);
        let origins: Vec<_> = list(&self.grpc_web_origins)
            .filter_map(|text| check.read("grpc-web-origins", text, origin))
            .collect();
        if on == Some(false) && !origins.is_empty() {
            let problem = "--grpc-web-origins has no use without --grpc-web";
            check.problems.push(problem.to_owned());
        }
        on.filter(|on| *on).map(|_| origins)
    }

    fn credentials(&self, check: &mut Check, allow_list: bool) -> Credentials {
        let token = self.default_token_file.as_ref().and_then(|file| {
            check.read("default-token-file", file, |file| {
                let held = fs::read(file).map_err(|error| unreadable(file, &error))?;
                let token = access_token(&held).map_err(|what| {
                    format!("{what}: it should hold the access token alone: {file}")
                })?;
                Ok(format!("Bearer {token}"))
            })
        });
        let given = [
            ("default-token-file", &token),
            ("default-api-key", &self.default_api_key),
            ("default-org-id", &self.default_org_id),
            ("default-sandbox-name", &self.default_sandbox_name),
        ];
        let mut credentials = Credentials::default();
        for (i, (flag, text)) in given.into_iter().enumerate() {
            if let Some(text) = text {
                let name = &CREDENTIALS[i];
                credentials.defaults[i] = check.credential(flag, name, text);
            }
        }
        credentials.defaults_are_fixed = check
            .read("fixed-defaults", &self.fixed_defaults, boolean)
            .unwrap_or_default();
        let authenticated = check.read(
            "callers-are-authenticated",
            &self.callers_are_authenticated,
            boolean,
        );
        if self.default_token_file.is_some() && authenticated == Some(false) && !allow_list {
            check.problems.push(
                "--default-token-file lets whoever reaches the gateway act with that token: \
                 let in --tls-allowed-clients only, or say --callers-are-authenticated if \
                 something in front of it checks callers"
                    .to_owned(),
            );
        }
        credentials.forward = list(&self.forward_metadata)
            .filter_map(|name| check.read("forward-metadata", name, forwardable))
            .collect();
        credentials
    }
}

/// Refuses what no certificate can hold, and wildcards, which would not be one.
fn client_name(name: &str) -> Result<String, String> {
    match certificates::is_uri(name) || DnsName::try_from(name).is_ok() {
        true => Ok(name.to_owned()),
        false => Err(format!("has {name:?}: neither a URI nor a DNS name")),
    }
}

fn list(text: &str) -> impl Iterator<Item = &str> {
    let words = text.split(',').map(str::trim);
    words.filter(|word| !word.is_empty())
}

/// An origin as browsers write it. No `*`: any page could then call with what
/// the gateway's defaults may do.
fn origin(text: &str) -> Result<HeaderValue, String> {
    let bad = || format!("has {text:?}: not an origin like https://app.example.com");
    let url = Url::parse(text).map_err(|_| bad())?;
    let canonical = url.origin().ascii_serialization();
    match HeaderValue::from_str(text) {
        Ok(value) if canonical == text && matches!(url.scheme(), "http" | "https") => Ok(value),
        _ => Err(bad()),
    }
}

fn base_url(text: &str) -> Result<Url, String> {
    let url = Url::parse(text).map_err(|error| format!("is no URL: {error}"))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err("must begin with https:// or http://".to_owned());
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("must not hold a user name or password".to_owned());
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err("must not hold a query or fragment".to_owned());
    }
    Ok(url)
}

fn authorities(file: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let pem = fs::read(file).map_err(|error| unreadable(file, &error))?;
    certificates::certificates(&pem).map_err(|what| format!("{what}: {file}"))
}

/// The access token that a file holds; or what it holds instead, without
/// quoting it. Adobe's tokens are Bearer tokens (RFC 6750, section 2.1).
fn access_token(held: &[u8]) -> Result<&str, &'static str> {
    let Ok(text) = str::from_utf8(held) else {
        return Err("is not UTF-8 (PowerShell's > writes UTF-16)");
    };
    let text = text.trim_start_matches('\u{feff}').trim();
    let lower = text.to_ascii_lowercase();
    if text.is_empty() {
        Err("is empty")
    } else if text.starts_with(['{', '[']) {
        Err("holds JSON (Adobe IMS answers so, with the token as its access_token)")
    } else if lower.starts_with("authorization") {
        Err("holds a whole header")
    } else if lower.split_whitespace().next() == Some("bearer") {
        Err("has the word Bearer before the token")
    } else if text.starts_with(['"', '\'', '`']) {
        Err("has quotation marks around the token")
    } else if text.contains(char::is_whitespace) {
        Err("holds more than one word")
    } else if text.trim_end_matches('=').contains('=') {
        Err("has a name before the token")
    } else if text.contains(|c: char| !c.is_ascii_alphanumeric() && !"-._~+/=".contains(c)) {
        Err("has a character that no access token has")
    } else {
        Ok(text)
    }
}

fn unreadable(file: &str, error: &std::io::Error) -> String {
    format!("cannot be read: {file}: {error}")
}

fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text)
        .map_err(|_| format!("is {text:?}: not a duration like 500ms, 30s or 2m"))
}

fn time_limit(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        Duration::ZERO => Err("must be more than zero".to_owned()),
        limit => Ok(limit),
    }
}

fn limit(text: &str) -> Result<usize, String> {
    const MOST: usize = 1_000_000;
    match text.parse() {
        Ok(number) if (1..=MOST).contains(&number) => Ok(number),
        _ => Err(format!("is {text:?}: not a number from 1 to {MOST}")),
    }
}

fn boolean(text: &str) -> Result<bool, String> {
    text.parse()
        .map_err(|_| format!("is {text:?}: there are true and false"))
}

/// Headers that no call may have passed on, and why. A name that ends in `-` stands for
/// all that begin so.
const NOT_FORWARDABLE: [(&str, &[&str]); 4] = [
    (
        "the gateway decides about it",
        &[
            "accept",
            "authorization",
            "cookie",
            "user-agent",
            "x-api-key",
            "x-gw-ims-org-id",
            "x-request-id",
            "x-sandbox-name",
        ],
    ),
    (
        "it belongs to a connection, not to a call",
        &[
            "connection",
            "expect",
            "forwarded",
            "host",
            "http2-settings",
            "keep-alive",
            "max-forwards",
            "proxy-",
            "te",
            "trailer",
            "transfer-encoding",
            "upgrade",
            "via",
        ],
    ),
    (
        "it describes the body, which is not the caller's",
        &["content-", "digest", "repr-digest", "want-"],
    ),
    (
        "it changes what the API does or answers, and the gateway could not read that",
        &[
            "a-im",
            "accept-",
            "if-",
            "prefer",
            "range",
            "x-http-method",
            "x-http-method-override",
            "x-method-override",
        ],
    ),
];

/// Refuses what is no name of a header that can be passed on.
fn forwardable(name: &str) -> Result<HeaderName, String> {
    let parsed: HeaderName = name
        .parse()
        .map_err(|_| format!("is no metadata name: {name:?}"))?;
    let lower = parsed.as_str();
    if lower.starts_with("grpc-") || lower.ends_with("-bin") {
        return Err(format!("cannot name {lower}: it is gRPC's own"));
    }
    let is_named = |never: &&str| match never.ends_with('-') {
        true => lower.starts_with(never),
        false => lower == *never,
    };
    let refused = NOT_FORWARDABLE
        .iter()
        .find(|(_, names)| names.iter().any(is_named));
    match refused {
        Some((why, _)) => Err(format!("cannot name {lower}: {why}")),
        None => Ok(parsed),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        settings: Settings,
    }

    fn check(flags: &[&str]) -> Result<Config, Problems> {
        let flags = std::iter::once("gateway").chain(flags.iter().copied());
        Flags::parse_from(flags).settings.check()
    }

    #[test]
    fn the_defaults_hold() {
        let config = check(&[]).expect("defaults");
        assert_eq!(config.listen, Listen::Tcp(([127, 0, 0, 1], 50051).into()));
        assert_eq!(config.request_timeout, Duration::from_secs(20));
    }

    #[test]
    fn every_problem_is_told_at_once() {
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
            "--look-up=sometimes",
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
            .map(|problem| problem.split(' ').next().unwrap_or_default())
            .collect();
        assert_eq!(
            flags,
            [
                "--log-format",
                "--log-level",
                "--listen",
                "--admin-listen",
                "--reflection",
                "--grpc-web",
                "--grpc-web-origins",
                "--upstream-url",
                "--catalog-url",
                "--upstream-ca-file",
                "--upstream-http",
                "--look-up",
                "--connect-timeout",
                "--request-timeout",
                "--max-in-flight",
                "--default-token-file",
                "--default-api-key",
                "--fixed-defaults",
                "--default-token-file",
                "--forward-metadata",
                "--forward-metadata",
                "--drain-timeout",
            ]
        );
        assert!(!problems.join("\n").contains("sec ret"));
        assert!(!problems.join("\n").contains("hunter2"));
    }

    #[test]
    fn tls_problems_are_told_at_once() {
        let told = |flags: &[&str]| check(flags).expect_err("problems").join("\n");
        assert_eq!(
            told(&["--tls-cert-file=x", "--tls-allowed-clients=a"]),
            "--tls-allowed-clients needs --tls-client-ca-file: without it no client shows a \
             certificate\n--tls-cert-file needs --tls-key-file"
        );
        let needs = "--tls-key-file needs --tls-cert-file";
        assert_eq!(told(&["--tls-key-file=x"]), needs);
        assert!(told(&["--tls-allowed-clients=,"]).contains("names nobody"));
        let needs = "--tls-client-ca-file needs --tls-cert-file";
        assert_eq!(told(&["--tls-client-ca-file=x"]), needs);
        let all = told(&[
            "--tls-cert-file=/nowhere/c",
            "--tls-key-file=/nowhere/k",
            "--tls-client-ca-file=/nowhere/a",
            "--tls-allowed-clients=*.example,CN=x,ok.example,spiffe://ok,urn:uuid:1",
        ]);
        let flags: Vec<_> = all
            .lines()
            .filter_map(|line| line.split(' ').next())
            .collect();
        assert_eq!(
            flags,
            [
                "--tls-allowed-clients",
                "--tls-allowed-clients",
                "--tls-cert-file",
                "--tls-key-file",
                "--tls-client-ca-file",
            ]
        );
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
        let config = check(&["--grpc-web"]).expect("no origin");
        assert_eq!(config.grpc_web, Some(Vec::new()));
        assert!(check(&["--grpc-web-origins=https://app.example.com"]).is_err());
    }

    #[test]
    fn a_token_file_holds_a_token_alone() {
        for held in [
            "abc.def-_~+/==",
            " abc \r\n",
            "\u{feff}abc\n",
            "\u{feff}\u{feff} abc",
        ] {
            let token = access_token(held.as_bytes()).expect(held);
            assert!(token.starts_with("abc"), "{token:?}");
        }
        for (held, what) in [
            ("", "is empty"),
            ("\u{feff}\n", "is empty"),
            (r#"{"access_token":"s3cret"}"#, "holds JSON"),
            ("\u{feff} [\"s3cret\"]", "holds JSON"),
            ("Bearer s3cret", "has the word Bearer"),
            ("bearer\ts3cret", "has the word Bearer"),
            ("Bearer", "has the word Bearer"),
            ("Authorization: Bearer s3cret", "holds a whole header"),
            ("\"s3cret\"", "has quotation marks"),
            ("s3cret s3cret", "holds more than one word"),
            ("s3cret\ns3cret", "holds more than one word"),
            ("TOKEN=s3cret", "has a name before"),
            ("s3cr\u{e9}t", "has a character"),
            ("s3\0cret", "has a character"),
            ("s3cret,", "has a character"),
        ] {
            let told = access_token(held.as_bytes()).expect_err(held);
            assert!(told.starts_with(what), "{held}: {told}");
        }
        assert!(access_token(b"\xff\xfea\0b\0").is_err());
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
        for own in CREDENTIALS.iter() {
            assert!(forwardable(own.as_str()).is_err(), "{own}");
        }
    }
}

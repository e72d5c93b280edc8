//! Rules between settings, and the files that they name.

use std::{collections::BTreeSet, fs, path::Path};

use http::HeaderValue;
use rustls::pki_types::CertificateDer;

use super::{BadValue, Problems, Settings};
use crate::{
    certificates::{self, TlsFiles, TlsOptions},
    create_batch::LookupPolicy,
    credentials::Credentials,
    http_client::UpstreamOptions,
    proxies::Proxies,
};

/// A valid configuration: the settings, and what follows from several of them or from files.
#[derive(Clone, Debug)]
pub struct Config {
    /// The settings as given.
    pub settings: Settings,
    /// TLS for gRPC calls.
    pub tls: Option<TlsOptions>,
    /// How to reach the API.
    pub upstream: UpstreamOptions,
    /// Which headers calls carry.
    pub credentials: Credentials,
}

impl Settings {
    /// Applies the rules. Returns all problems at once: those of single values, which come
    /// with their defaults, those of the rules, and those of the proxies.
    pub fn check(
        self,
        bad_values: &[BadValue],
        proxies: Result<Proxies, Problems>,
    ) -> Result<Config, Problems> {
        let mut broken = Problems::new();
        let tls = self.tls(&mut broken);
        if !self.grpc_web && !self.grpc_web_origins.is_empty() {
            broken.push("--grpc-web-origins has no effect without --grpc-web".to_owned());
        }
        if self.generate_external_ids && self.lookup == LookupPolicy::Never {
            let problem = "--generate-external-ids has no effect with --lookup never";
            broken.push(problem.to_owned());
        }
        let mut noted = |flag, problem| broken.push(format!("{flag}: {problem}"));
        let extra_ca = self
            .upstream_ca_file
            .as_deref()
            .map(authorities)
            .transpose();
        let extra_ca = extra_ca.map_err(|problem| noted("--upstream-ca-file", problem));
        let token = self
            .default_token_file
            .as_deref()
            .map(access_token)
            .transpose();
        let token = token.map_err(|problem| noted("--default-token-file", problem));
        if self.default_token_file.is_some()
            && !self.callers_are_authenticated
            && self.tls_allowed_clients.is_empty()
        {
            let problem = "--default-token-file lets everyone who can reach the gateway act with \
                that token: set --tls-allowed-clients, or --callers-are-authenticated if \
                something in front of the gateway authenticates callers";
            broken.push(problem.to_owned());
        }
        // A rule that names an invalid value has judged its default instead.
        broken.retain(|rule| !bad_values.iter().any(|bad| rule.contains(&bad.flag)));
        let mut problems: Problems = bad_values.iter().map(|bad| bad.problem.clone()).collect();
        problems.append(&mut broken);
        match (extra_ca, token, proxies) {
            (Ok(extra_ca), Ok(token), Ok(proxies)) if problems.is_empty() => Ok(Config {
                tls,
                upstream: UpstreamOptions {
                    import_url: self.upstream_url.clone(),
                    catalog_url: self.catalog_url.clone(),
                    extra_ca: extra_ca.unwrap_or_default(),
                    http: self.upstream_http,
                    connect_timeout: self.connect_timeout,
                    request_timeout: self.request_timeout,
                    proxies,
                    idle_connections: self.max_in_flight,
                },
                credentials: Credentials {
                    defaults: [
                        token,
                        self.default_api_key.clone(),
                        self.default_org_id.clone(),
                        self.default_sandbox_name.clone(),
                    ],
                    defaults_are_fixed: self.fixed_defaults,
                    forward: self.forward_metadata.clone(),
                },
                settings: self,
            }),
            (_, _, proxies) => {
                problems.extend(proxies.err().unwrap_or_default());
                Err(problems)
            }
        }
    }

    fn tls(&self, problems: &mut Problems) -> Option<TlsOptions> {
        let client_ca = self.tls_client_ca_file.as_ref();
        if client_ca.is_none() && !self.tls_allowed_clients.is_empty() {
            let problem = "--tls-allowed-clients needs --tls-client-ca-file: without it clients \
                present no certificate";
            problems.push(problem.to_owned());
        }
        let needs = match (&self.tls_cert_file, &self.tls_key_file) {
            (Some(cert), Some(key)) => {
                let files = TlsFiles {
                    cert: cert.clone(),
                    key: key.clone(),
                    client_ca: client_ca.cloned(),
                };
                if let Err(bad) = files.read().and_then(|pem| files.parse(&pem)) {
                    problems.extend(bad);
                }
                let allowed: BTreeSet<_> = self.tls_allowed_clients.iter().cloned().collect();
                return Some(TlsOptions {
                    files,
                    allowed_clients: allowed.into_iter().collect(),
                });
            }
            (Some(_), None) => Some("--tls-cert-file needs --tls-key-file"),
            (None, Some(_)) => Some("--tls-key-file needs --tls-cert-file"),
            (None, None) => client_ca.map(|_| "--tls-client-ca-file needs --tls-cert-file"),
        };
        problems.extend(needs.map(str::to_owned));
        None
    }
}

fn authorities(file: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let shown = file.display();
    let pem = fs::read(file).map_err(|error| format!("{shown}: cannot be read: {error}"))?;
    certificates::certificates(&pem).map_err(|problem| format!("{shown}: {problem}"))
}

/// The `authorization` header with the token in a file. Adobe's tokens are Bearer tokens
/// (RFC 6750, section 2.1).
fn access_token(file: &Path) -> Result<HeaderValue, String> {
    let shown = file.display();
    let content = fs::read(file).map_err(|error| format!("{shown}: cannot be read: {error}"))?;
    let token = token_in(&content).map_err(|problem| {
        format!("{shown}: {problem}; it must contain nothing but the access token")
    })?;
    let header = HeaderValue::from_str(&format!("Bearer {token}"));
    let mut header = header.map_err(|error| format!("{shown}: {error}"))?;
    header.set_sensitive(true);
    Ok(header)
}

/// The access token in a file, or what the file contains instead, without quoting it.
fn token_in(content: &[u8]) -> Result<&str, &'static str> {
    let Ok(text) = str::from_utf8(content) else {
        return Err("not UTF-8 (PowerShell's > writes UTF-16)");
    };
    let text = text.trim_start_matches('\u{feff}').trim();
    let lower = text.to_ascii_lowercase();
    if text.is_empty() {
        Err("empty")
    } else if text.starts_with(['{', '[']) {
        Err("contains JSON (Adobe IMS responds with JSON; the token is its access_token)")
    } else if lower.starts_with("authorization") {
        Err("contains a whole header")
    } else if lower.split_whitespace().next() == Some("bearer") {
        Err("the word Bearer stands before the token")
    } else if text.starts_with(['"', '\'', '`']) {
        Err("quotation marks around the token")
    } else if text.contains(char::is_whitespace) {
        Err("contains more than one word")
    } else if text.trim_end_matches('=').contains('=') {
        Err("a name before the token")
    } else if text.contains(|c: char| !c.is_ascii_alphanumeric() && !"-._~+/=".contains(c)) {
        Err("a character that is not valid in an access token")
    } else {
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::check, *};

    #[test]
    fn tls_problems_are_reported_at_once() {
        let problems = |flags: &[&str]| check(flags).expect_err("problems").join("\n");
        assert_eq!(
            problems(&["--tls-cert-file=x", "--tls-allowed-clients=a"]),
            "--tls-allowed-clients needs --tls-client-ca-file: without it clients \
             present no certificate\n--tls-cert-file needs --tls-key-file"
        );
        let needs = "--tls-key-file needs --tls-cert-file";
        assert_eq!(problems(&["--tls-key-file=x"]), needs);
        assert!(problems(&["--tls-allowed-clients=,"]).contains("it contains no names"));
        let needs = "--tls-client-ca-file needs --tls-cert-file";
        assert_eq!(problems(&["--tls-client-ca-file=x"]), needs);
        let all = problems(&[
            "--tls-cert-file=/nowhere/c",
            "--tls-key-file=/nowhere/k",
            "--tls-client-ca-file=/nowhere/a",
            "--tls-allowed-clients=*.example,CN=x,ok.example,spiffe://ok,urn:uuid:1",
        ]);
        for (line, start) in all.lines().zip([
            "invalid value for '--tls-allowed-clients <NAMES>': \"*.example\" is neither",
            "TLS certificate /nowhere/c: cannot be read",
            "TLS private key /nowhere/k: cannot be read",
            "TLS client CA /nowhere/a: cannot be read",
        ]) {
            assert!(line.starts_with(start), "{line}");
        }
        assert!(
            all.contains("\"CN=x\" is neither") && !all.contains("ok"),
            "{all}"
        );
        assert_eq!(all.lines().count(), 4, "{all}");
    }

    #[test]
    fn a_token_file_contains_nothing_but_a_token() {
        for held in [
            "abc.def-_~+/==",
            " abc \r\n",
            "\u{feff}abc\n",
            "\u{feff}\u{feff} abc",
        ] {
            let token = token_in(held.as_bytes()).expect(held);
            assert!(token.starts_with("abc"), "{token:?}");
        }
        for (held, what) in [
            ("", "empty"),
            ("\u{feff}\n", "empty"),
            (r#"{"access_token":"s3cret"}"#, "contains JSON"),
            ("\u{feff} [\"s3cret\"]", "contains JSON"),
            ("Bearer s3cret", "the word Bearer"),
            ("bearer\ts3cret", "the word Bearer"),
            ("Bearer", "the word Bearer"),
            ("Authorization: Bearer s3cret", "contains a whole header"),
            ("\"s3cret\"", "quotation marks"),
            ("s3cret s3cret", "contains more than one word"),
            ("s3cret\ns3cret", "contains more than one word"),
            ("TOKEN=s3cret", "a name before"),
            ("s3cr\u{e9}t", "a character"),
            ("s3\0cret", "a character"),
            ("s3cret,", "a character"),
        ] {
            let problem = token_in(held.as_bytes()).expect_err(held);
            assert!(problem.starts_with(what), "{held}: {problem}");
        }
        assert!(token_in(b"\xff\xfea\0b\0").is_err());
    }
}

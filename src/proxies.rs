//! The proxies from the environment. They are read once, at start, and an invalid one is
//! refused; the HTTP client would ignore it silently.

use std::{env, ffi::OsString, fmt};

use http::Uri;
use hyper_util::client::proxy::matcher::Matcher;
use reqwest::Url;

/// Which proxy to use for which URL. None by default.
#[derive(Clone, Debug, Default)]
pub struct Proxies {
    http: Option<Proxy>,
    https: Option<Proxy>,
    /// The entries of `NO_PROXY`.
    direct: Vec<String>,
}

/// A proxy. Displayed without user and password.
#[derive(Clone)]
pub struct Proxy {
    /// The variable that sets it.
    variable: &'static str,
    url: Url,
}

impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let has_user = !self.url.username().is_empty() || self.url.password().is_some();
        let user = if has_user { "[redacted]@" } else { "" };
        let (scheme, host) = (self.url.scheme(), self.url.host_str().unwrap_or_default());
        write!(f, "{scheme}://{user}{host}")?;
        if let Some(port) = self.url.port() {
            write!(f, ":{port}")?;
        }
        write!(f, " ({})", self.variable)
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Proxies {
    /// The proxies from this process's environment, or all that is wrong with them.
    pub fn from_environment() -> Result<Self, Vec<String>> {
        Self::read(|name| env::var_os(name))
    }

    /// As in curl: an empty variable counts as unset, `ALL_PROXY` is the default of the other
    /// two, and both cases are read (upper case first).
    fn read(variable: impl Fn(&str) -> Option<OsString>) -> Result<Self, Vec<String>> {
        let mut problems = Vec::new();
        let mut text = |name: &'static str| {
            let value = variable(name).filter(|value| !value.is_empty())?;
            let text = value.into_string();
            text.map_err(|_| problems.push(format!("{name} is not UTF-8")))
                .ok()
        };
        let named = [
            ["HTTP_PROXY", "http_proxy"],
            ["HTTPS_PROXY", "https_proxy"],
            ["ALL_PROXY", "all_proxy"],
        ]
        .map(|names| names.map(|name| (name, text(name))));
        let direct = text("NO_PROXY").or_else(|| text("no_proxy"));
        let mut proxy = |names: [(&'static str, Option<String>); 2]| {
            let [upper, lower] = names.map(|(variable, text)| match proxy_url(&text?) {
                Ok(url) => Some(Proxy { variable, url }),
                Err(problem) => {
                    problems.push(format!("{variable} {problem}"));
                    None
                }
            });
            upper.or(lower)
        };
        let [http, https, all] = named.map(&mut proxy);
        if !problems.is_empty() {
            return Err(problems);
        }
        let words = direct.as_deref().unwrap_or_default();
        let words = words.split(|c: char| c == ',' || c.is_whitespace());
        Ok(Proxies {
            http: http.or_else(|| all.clone()),
            https: https.or(all),
            direct: words
                .filter(|word| !word.is_empty())
                .map(str::to_owned)
                .collect(),
        })
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.http.is_none() && self.https.is_none()
    }

    /// For the HTTP client.
    pub fn for_client(self) -> reqwest::Proxy {
        reqwest::Proxy::custom(move |url| self.of(url).map(|proxy| proxy.url.clone()))
    }

    /// Whether requests to this URL use TLS, to its host or to a proxy.
    pub fn need_tls(&self, url: &Url) -> bool {
        let proxy = self.of(url).map(|proxy| &proxy.url);
        let mut spoken_with = [Some(url), proxy].into_iter().flatten();
        spoken_with.any(|url| url.scheme() == "https")
    }

    /// The proxy for this URL. `None`: direct.
    pub fn of(&self, url: &Url) -> Option<&Proxy> {
        let proxy = match url.scheme() {
            "http" => self.http.as_ref(),
            "https" => self.https.as_ref(),
            _ => None,
        }?;
        let direct: Option<Vec<_>> = self
            .direct
            .iter()
            .map(|entry| match entry.as_str() {
                "*" => None,
                entry => Some(without_port(entry, url)),
            })
            .collect();
        let matcher = Matcher::builder()
            .all("http://proxy")
            .no(direct?.join(","))
            .build();
        let uri: Uri = url.as_str().parse().ok()?;
        matcher.intercept(&uri).map(|_| proxy)
    }
}

/// An entry of `NO_PROXY` for this URL, as the HTTP client's matcher reads it: it supports no
/// port, no brackets and no `*.`. Empty if the port differs.
fn without_port<'a>(entry: &'a str, url: &Url) -> &'a str {
    let entry = match entry.strip_prefix('*') {
        Some(domain) if domain.starts_with('.') => domain,
        _ => entry,
    };
    let (host, port) = match entry.rsplit_once(':') {
        // Without brackets, more than one colon means an IPv6 address.
        Some((host, port)) if !host.contains(':') || host.ends_with(']') => (host, Some(port)),
        _ => (entry, None),
    };
    if port.is_some_and(|port| port.parse().ok() != url.port_or_known_default()) {
        return "";
    }
    host.trim_start_matches('[').trim_end_matches(']')
}

/// Does not quote an invalid URL: it may contain a password.
fn proxy_url(text: &str) -> Result<Url, String> {
    if text.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return Err(
            "contains a space or a line break (write a space in a password as %20)".to_owned(),
        );
    }
    let url = match text.contains("://") {
        true => Url::parse(text),
        false => Url::parse(&format!("http://{text}")),
    };
    let url = url.map_err(|error| format!("is not a proxy URL: {error}"))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(
            "must begin with http:// or https://; other proxies are not supported".to_owned(),
        );
    }
    let after_host = [Some(url.path()), url.query(), url.fragment()];
    if after_host.iter().flatten().any(|part| part.contains('@')) {
        return Err(
            "has an @ after its host (write /, ? and # in a password as %2F, %3F and %23)"
                .to_owned(),
        );
    }
    Ok(url)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Proxies, Vec<String>> {
        Proxies::read(|name| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| (*value).into())
        })
    }

    #[test]
    fn a_variable_that_cannot_be_read_is_named_and_not_quoted() {
        let names = [
            "HTTP_PROXY",
            "http_proxy",
            "HTTPS_PROXY",
            "https_proxy",
            "ALL_PROXY",
            "all_proxy",
        ];
        for value in [
            "http://user:s3c ret@proxy:3128",
            "http://user:s3cret@proxy:3128\n",
            " http://user:s3cret@proxy:3128",
            "http://user:s3c\tret@proxy:3128",
            "http://user:s3c/ret@proxy:3128",
            "http://user:s3c#ret@proxy:3128",
            "http://user:7?s3cret@proxy:3128",
            "http://user:7/s3cret@proxy:3128",
            "http://user:s3cret@proxy:port",
            "http://user:s3cret@",
            "http://user:s3cret@pro<xy",
            "socks5://user:s3cret@proxy:1080",
            "s3cret://",
            "http://",
        ] {
            for name in names {
                let problems = read(&[(name, value)]).expect_err(value);
                assert_eq!(problems.len(), 1, "{problems:?}");
                assert!(problems[0].starts_with(name), "{problems:?}");
                assert!(!problems[0].contains("ret"), "{problems:?}");
            }
        }
        let all = names.map(|name| (name, "http://a b"));
        assert_eq!(read(&all).expect_err("all").len(), names.len());
    }

    #[test]
    fn the_proxy_of_a_url() {
        let shown = |variables: &[(&str, &str)], url: &str| {
            let proxies = read(variables).expect("good");
            let proxy = proxies.of(&url.parse().expect(url));
            proxy.map(ToString::to_string)
        };
        let (plain, tls) = ("http://api.example", "https://api.example");
        let http = ("HTTP_PROXY", "proxy:3128");
        let expected = Some("http://proxy:3128 (HTTP_PROXY)".to_owned());
        assert_eq!(shown(&[http], plain), expected);
        assert_eq!(shown(&[http], tls), None);
        assert_eq!(shown(&[("HTTP_PROXY", "")], plain), None);
        let secret = ("https_proxy", "https://user:s3cr%20et@[::1]");
        let expected = Some("https://[redacted]@[::1] (https_proxy)".to_owned());
        assert_eq!(shown(&[secret], tls), expected);
        let all = ("all_proxy", "http://all");
        let expected = Some("http://all (all_proxy)".to_owned());
        assert_eq!(shown(&[all, secret], plain), expected);
        assert!(!format!("{:?}", read(&[secret])).contains("s3cr"));
    }

    #[test]
    fn what_no_proxy_means() {
        for (direct, url, proxied) in [
            ("", "http://api.example", true),
            ("*", "http://api.example", false),
            ("*", "http://127.0.0.1:8080", false),
            ("*", "http://[::1]:8080", false),
            ("x.example, *", "http://10.0.0.1", false),
            ("api.example", "http://api.example:8080", false),
            ("example", "http://api.example", false),
            (".example", "http://api.example", false),
            ("*.example", "http://api.example", false),
            ("xample", "http://api.example", true),
            ("api.example:8080", "http://api.example:8080", false),
            ("api.example:8080", "http://api.example:8081", true),
            ("api.example:80", "http://api.example", false),
            ("api.example:443", "http://api.example", true),
            ("127.0.0.1:8080", "http://127.0.0.1:8080", false),
            ("127.0.0.1:8080", "http://127.0.0.1:9090", true),
            ("[::1]:8080", "http://[::1]:8080", false),
            ("[::1]:8080", "http://[::1]:8081", true),
            ("[::1]", "http://[::1]:8081", false),
            ("::1", "http://[::1]:8081", false),
            ("10.0.0.0/8", "http://10.1.2.3:1", false),
            ("10.0.0.0/8", "http://11.1.2.3:1", true),
            ("localhost x.example\n", "http://x.example", false),
            (":80,:,[,]", "http://api.example", true),
        ] {
            for name in ["NO_PROXY", "no_proxy"] {
                let proxies = read(&[(name, direct), ("ALL_PROXY", "p")]).expect(direct);
                let proxy = proxies.of(&url.parse().expect(url));
                assert_eq!(proxy.is_some(), proxied, "{direct} {url}");
            }
        }
    }
}

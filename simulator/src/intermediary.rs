//! The intermediaries between the gateway and the API: caches, proxies, load
//! balancers, CDNs, filters and login portals, with the responses that they are
//! publicly known for. Statuses, headers and the shape of the bodies are theirs,
//! the words are ours.
//!
//! Sources: Varnish `builtin.vcl`; nginx `ngx_http_special_response.c`; Envoy
//! "Response flags" and its integration tests; HAProxy manual, `errorfile`;
//! AWS "Troubleshoot your Application Load Balancers"; Squid `ERR_…` pages;
//! Cloudflare "5xx errors" and "1xxx errors"; Akamai pages as reports of their
//! users show them; RFC 6585 (511), RFC 9457 (problem documents).

use http::{HeaderName, HeaderValue, Response, StatusCode, header};

/// When an intermediary responds: before the API has processed the request,
/// after that, or either. A status that means "refused before processing" never
/// comes after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum When {
    Before,
    After,
    Either,
}

/// One response of an intermediary.
#[derive(Debug, PartialEq, Eq)]
pub struct Intermediary {
    /// The name of the fault; after processing, it ends in `-after`.
    pub(super) name: &'static str,
    /// Who sends it, and why.
    pub(super) who: &'static str,
    pub(super) status: u16,
    pub(super) when: When,
    media_type: &'static str,
    headers: &'static [(&'static str, &'static str)],
    body: &'static str,
}

impl Intermediary {
    /// The response of this name, and whether it comes after processing.
    pub(super) fn named(name: &str) -> Option<(&'static Self, bool)> {
        let (name, after) = match name.strip_suffix("-after") {
            Some(name) => (name, true),
            None => (name, false),
        };
        let not = if after { When::Before } else { When::After };
        let form = FORMS.iter().find(|form| form.name == name)?;
        (form.when != not).then_some((form, after))
    }

    /// The names of all faults of this kind.
    pub(super) fn names() -> impl Iterator<Item = String> {
        FORMS.iter().flat_map(|form| {
            let before = (form.when != When::After).then(|| form.name.to_owned());
            let after = (form.when != When::Before).then(|| format!("{}-after", form.name));
            before.into_iter().chain(after)
        })
    }

    /// The response as it is sent.
    pub(super) fn response(&self) -> Response<&'static str> {
        let mut response = Response::new(self.body);
        *response.status_mut() = StatusCode::from_u16(self.status).unwrap_or_default();
        let headers = response.headers_mut();
        if !self.media_type.is_empty() {
            let media_type = HeaderValue::from_static(self.media_type);
            headers.insert(header::CONTENT_TYPE, media_type);
        }
        for (name, value) in self.headers {
            let name = HeaderName::from_static(name);
            headers.append(name, HeaderValue::from_static(value));
        }
        response
    }
}

const NO_MEDIA_TYPE: &str = "";
const HTML: &str = "text/html";
const HTML_UTF8: &str = "text/html; charset=utf-8";
const TEXT: &str = "text/plain";
const JSON: &str = "application/json";
const PROBLEM: &str = "application/problem+json";

/// The page of somebody who shows the status in a title and a headline.
macro_rules! page {
    ($headline:literal, $signature:literal) => {
        concat!(
            "<html>\r\n<head><title>",
            $headline,
            "</title></head>\r\n<body>\r\n<center><h1>",
            $headline,
            "</h1></center>\r\n",
            $signature,
            "</body>\r\n</html>\r\n"
        )
    };
}

macro_rules! nginx {
    ($headline:literal) => {
        page!($headline, "<hr><center>nginx</center>\r\n")
    };
}

macro_rules! haproxy {
    ($headline:literal, $text:literal) => {
        concat!(
            "<html><body><h1>",
            $headline,
            "</h1>\n",
            $text,
            "\n</body></html>\n"
        )
    };
}

macro_rules! squid {
    ($text:literal) => {
        concat!(
            "<!DOCTYPE html>\n<html><head><title>ERROR</title></head><body>\n",
            "<h1>ERROR</h1><h2>The requested URL could not be had</h2>\n<p>",
            $text,
            "</p>\n</body></html>\n"
        )
    };
}

const VARNISH: &str = "<!DOCTYPE html>\n<html>\n  <head>\n    <title>503 Backend fetch failed</title>\n  \
    </head>\n  <body>\n    <h1>Error 503 Backend fetch failed</h1>\n    <p>Backend fetch failed</p>\n    \
    <h3>Guru Meditation:</h3>\n    <p>XID: 32770</p>\n    <hr>\n    <p>Varnish cache server</p>\n  \
    </body>\n</html>\n";
const AKAMAI_DENIED: &str = "<HTML><HEAD>\n<TITLE>Access Denied</TITLE>\n</HEAD><BODY>\n\
    <H1>Access Denied</H1>\n\nThe resource is not for you on this server.<P>\n\
    Reference&#32;&#35;18&#46;5e2a1702&#46;1700000000&#46;2b6a23ca\n</BODY>\n</HTML>\n";
const AKAMAI_UNAVAILABLE: &str = "<HTML><HEAD><TITLE>Service Unavailable</TITLE></HEAD><BODY>\n\
    <H1>Service Unavailable - Zero size object</H1>\nThe server cannot serve the request for now.<P>\n\
    Reference&#32;&#35;15&#46;5e2a1702&#46;1700000000&#46;1a2b3c\n</BODY></HTML>\n";
const AKAMAI_TIMEOUT: &str = "<HTML><HEAD><TITLE>Gateway Timeout - In read</TITLE></HEAD><BODY>\n\
    <H1>Gateway Timeout</H1>\nThe origin did not respond in time.<P>\n\
    Reference&#32;&#35;1&#46;5e2a1702&#46;1700000000&#46;1a2b3d\n</BODY></HTML>\n";
const CLOUDFLARE_PAGE: &str = "<!DOCTYPE html>\n<html lang=\"en-US\">\n<head><title>api | Error at the host\
    </title></head>\n<body><div id=\"cf-wrapper\"><div id=\"cf-error-details\">\n\
    <span>Browser: working</span> <span>Cloudflare: working</span> <span>Host: error</span>\n\
    <p>Cloudflare Ray ID: <strong>8f2a1b3c4d5e6f70</strong></p>\n</div></div></body>\n</html>\n";
const CLOUDFLARE_CHALLENGE: &str = "<!DOCTYPE html><html lang=\"en-US\"><head><title>Just a moment\
    </title></head><body><noscript>Scripts and cookies are needed to go on</noscript></body></html>";
const FASTLY: &str = "<?xml version=\"1.0\" encoding=\"utf-8\"?>\n<html>\n  <head><title>503 first byte timeout\
    </title></head>\n  <body>\n    <h1>Error 503 first byte timeout</h1>\n    <h3>Error 54113</h3>\n    \
    <p>Details: cache-fra-etou8220058-FRA 1700000000 1234567890</p>\n    <hr>\n    <p>Varnish cache server</p>\n  \
    </body>\n</html>\n";
const BLOCKED: &str = "<!DOCTYPE html>\n<html><head><title>Web page blocked</title></head>\n<body>\
    <h1>Web filter violation</h1><p>The page that you asked for has been blocked by your organization. \
    Category: cloud storage.</p></body></html>\n";
const DATA_LOSS: &str = "<html><head><title>Content blocked</title></head><body><h1>Content blocked</h1>\
    <p>The site's response broke a rule on data protection. Incident 4711.</p></body></html>\n";
const SIGN_IN: &str = "<!DOCTYPE html>\n<html><head><title>Sign in</title>\
    <meta http-equiv=\"refresh\" content=\"0; url=https://login.invalid/\"></head>\n\
    <body><form method=\"post\" action=\"https://login.invalid/\"><input name=\"user\">\
    <input name=\"password\" type=\"password\"></form></body></html>\n";
const MOVED: &str = page!("302 Found", "");

const CF: &[(&str, &str)] = &[
    ("server", "cloudflare"),
    ("cf-ray", "8f2a1b3c4d5e6f70-FRA"),
    ("cache-control", "private, no-store"),
];
const AKAMAI: &[(&str, &str)] = &[("server", "AkamaiGHost"), ("mime-version", "1.0")];
const NGINX: &[(&str, &str)] = &[("server", "nginx")];
const ENVOY: &[(&str, &str)] = &[("server", "envoy")];
const HAPROXY: &[(&str, &str)] = &[("cache-control", "no-cache")];
const ALB: &[(&str, &str)] = &[("server", "awselb/2.0")];
const AWS: &[(&str, &str)] = &[
    ("x-amzn-requestid", "5a1c"),
    ("x-amzn-errortype", "ServiceException"),
];
const NO_HEADERS: &[(&str, &str)] = &[];
const LOGIN: &[(&str, &str)] = &[
    ("location", "https://login.invalid/?next=api"),
    ("cache-control", "no-store"),
];

macro_rules! forms {
    ($($name:literal $when:ident $status:literal $media_type:ident $headers:expr, $who:literal: $body:expr;)*) => {
        /// Every form.
        pub(super) const FORMS: &[Intermediary] = &[$(Intermediary {
            name: $name,
            who: $who,
            status: $status,
            when: When::$when,
            media_type: $media_type,
            headers: $headers,
            body: $body,
        }),*];
    };
}

const NONE: &str = "";

forms! {
    // Caches
    "varnish-503" Either 503 HTML_UTF8 &[("server", "Varnish"), ("retry-after", "5"), ("x-varnish", "32770")],
        "Varnish, fetch from the backend failed; Retry-After": VARNISH;
    "fastly-503" Either 503 HTML_UTF8 &[("retry-after", "0"), ("x-served-by", "cache-fra-etou8220058-FRA"), ("via", "1.1 varnish")],
        "Fastly, first byte timeout; Retry-After: 0": FASTLY;
    "squid-403" Before 403 HTML &[("server", "squid/6.9"), ("x-squid-error", "ERR_ACCESS_DENIED 0")],
        "Squid, denied by a rule": squid!("Access denied.");
    "squid-407" Before 407 HTML &[("server", "squid/6.9"), ("proxy-authenticate", "Basic realm=\"proxy\""), ("x-squid-error", "ERR_CACHE_ACCESS_DENIED 0")],
        "Squid, proxy authentication required": squid!("Cache access denied.");
    "squid-500" Either 500 HTML &[("server", "squid/6.9"), ("x-squid-error", "ERR_ICAP_FAILURE 0")],
        "Squid, its content filter (ICAP) failed on the request or the response": squid!("ICAP protocol error.");
    "squid-502" Either 502 HTML &[("server", "squid/6.9"), ("x-squid-error", "ERR_ZERO_SIZE_OBJECT 0")],
        "Squid, the server closed without a response": squid!("Zero sized reply.");
    "squid-503" Before 503 HTML &[("server", "squid/6.9"), ("x-squid-error", "ERR_CONNECT_FAIL 111")],
        "Squid, no connection": squid!("Connection to the server failed.");
    "squid-504" Either 504 HTML &[("server", "squid/6.9"), ("x-squid-error", "ERR_READ_TIMEOUT 0")],
        "Squid, no response in time": squid!("Read timeout.");

    // Reverse proxies
    "nginx-400" Before 400 HTML NGINX, "nginx, plain HTTP on a TLS port": nginx!("400 The plain HTTP request was sent to HTTPS port");
    "nginx-403" Before 403 HTML NGINX, "nginx, denied by a rule": nginx!("403 Forbidden");
    "nginx-405" Before 405 HTML NGINX, "nginx, POST to a static place": nginx!("405 Not Allowed");
    "nginx-413" Before 413 HTML NGINX, "nginx, the body is too large": nginx!("413 Request Entity Too Large");
    "nginx-414" Before 414 HTML NGINX, "nginx, the URL is too long": nginx!("414 Request-URI Too Large");
    "nginx-429" Before 429 HTML NGINX, "nginx, `limit_req` with its own status": nginx!("429 Too Many Requests");
    "nginx-444" Either 444 HTML NGINX, "nginx, connection closed without a response, as a proxy in front of it reports": NONE;
    "nginx-494" Before 494 HTML NGINX, "nginx, a header is too large": nginx!("400 Request Header Or Cookie Too Large");
    "nginx-495" Before 495 HTML NGINX, "nginx, bad client certificate": nginx!("400 The SSL certificate error");
    "nginx-497" Before 497 HTML NGINX, "nginx, plain HTTP on a TLS port": nginx!("400 The plain HTTP request was sent to HTTPS port");
    "nginx-499" Either 499 HTML NGINX, "nginx, Traefik, Skipper: the client closed the connection": NONE;
    "nginx-502" Either 502 HTML NGINX, "nginx, the upstream closed, or cannot be reached": nginx!("502 Bad Gateway");
    "nginx-503" Either 503 HTML NGINX, "nginx, limited or in maintenance": nginx!("503 Service Temporarily Unavailable");
    "nginx-504" Either 504 HTML NGINX, "nginx, no response in time": nginx!("504 Gateway Time-out");
    "maintenance-503" Either 503 HTML &[("server", "nginx"), ("retry-after", "1")],
        "a maintenance page; Retry-After": page!("We will be back soon", "");
    "modsecurity-403" Either 403 HTML &[("server", "Apache")],
        "ModSecurity, a rule on the request or on the response": page!("403 Forbidden", "");
    "modsecurity-406" Either 406 HTML &[("server", "Apache")],
        "ModSecurity, the same with another status": page!("406 Not Acceptable", "");

    // Meshes
    "envoy-403" Before 403 TEXT ENVOY, "Envoy, refused by a policy": "RBAC: access denied";
    "envoy-408" Either 408 TEXT ENVOY, "Envoy, the stream was idle too long": "stream timeout";
    "envoy-413" Before 413 TEXT ENVOY, "Envoy, the body is larger than its buffer": "Payload Too Large";
    "envoy-426" Before 426 TEXT ENVOY, "Envoy, HTTP/1.0": NONE;
    "envoy-429" Before 429 TEXT &[("server", "envoy"), ("x-envoy-ratelimited", "true")], "Envoy, rate limit": "local_rate_limited";
    "envoy-500" Either 500 TEXT ENVOY, "Envoy, the response is larger than its buffer, or a filter failed": "Internal Server Error";
    "envoy-502" Either 502 TEXT ENVOY, "Envoy, the upstream broke the protocol (UPE)":
        "upstream connect error or disconnect/reset before headers. reset reason: protocol error";
    "envoy-503-connect" Before 503 TEXT ENVOY, "Envoy, no connection (UF)":
        "upstream connect error or disconnect/reset before headers. reset reason: remote connection failure, transport failure reason: delayed connect error: Connection refused";
    "envoy-503-reset" Either 503 TEXT ENVOY, "Envoy, the connection broke (UC)":
        "upstream connect error or disconnect/reset before headers. reset reason: connection termination";
    "envoy-503-no-host" Before 503 TEXT ENVOY, "Envoy, no host is healthy (UH)": "no healthy upstream";
    "envoy-503-overloaded" Before 503 TEXT &[("server", "envoy"), ("x-envoy-overloaded", "true")],
        "Envoy, circuit breaker (UO)": "upstream connect error or disconnect/reset before headers. reset reason: overflow";
    "envoy-504" Either 504 TEXT ENVOY, "Envoy, no response in time (UT)": "upstream request timeout";

    // Load balancers
    "haproxy-400" Before 400 HTML HAPROXY, "HAProxy, bad request": haproxy!("400 Bad request", "The request could not be read.");
    "haproxy-403" Either 403 HTML HAPROXY, "HAProxy, `http-request deny` or `http-response deny`": haproxy!("403 Forbidden", "A rule forbids this request.");
    "haproxy-408" Either 408 HTML HAPROXY, "HAProxy, the request took too long": haproxy!("408 Request Time-out", "The request did not come in time.");
    "haproxy-429" Before 429 HTML HAPROXY, "HAProxy, too many requests": haproxy!("429 Too Many Requests", "Too many requests came in a given time.");
    "haproxy-502" Either 502 HTML HAPROXY, "HAProxy, the server's response was bad or empty": haproxy!("502 Bad Gateway", "The server's response was invalid or incomplete.");
    "haproxy-503" Either 503 HTML HAPROXY, "HAProxy, no server, also after its own retries": haproxy!("503 Service Unavailable", "No server is available to handle this request.");
    "haproxy-504" Either 504 HTML HAPROXY, "HAProxy, no response in time": haproxy!("504 Gateway Time-out", "The server did not respond in time.");
    "alb-403" Before 403 HTML ALB, "AWS load balancer, refused by WAF": page!("403 Forbidden", "");
    "alb-460" Either 460 HTML ALB, "AWS load balancer, the client closed the connection": NONE;
    "alb-463" Before 463 HTML ALB, "AWS load balancer, more than 30 addresses in X-Forwarded-For": NONE;
    "alb-464" Before 464 HTML ALB, "AWS load balancer, HTTP versions do not match": NONE;
    "alb-502" Either 502 HTML ALB, "AWS load balancer, the target closed": page!("502 Bad Gateway", "");
    "alb-503" Before 503 HTML ALB, "AWS load balancer, no target": page!("503 Service Temporarily Unavailable", "");
    "alb-504" Either 504 HTML ALB, "AWS load balancer, no response in time": page!("504 Gateway Time-out", "");
    "alb-561" Before 561 HTML ALB, "AWS load balancer, the identity provider failed": page!("561 Authentication Error", "");
    "apigateway-403" Either 403 JSON AWS, "AWS API Gateway, refused": r#"{"message":"Forbidden"}"#;
    "apigateway-429" Before 429 JSON AWS, "AWS API Gateway, throttled": r#"{"message":"Too Many Requests"}"#;
    "apigateway-500" Either 500 JSON AWS, "AWS API Gateway, its own error": r#"{"message":"Internal server error"}"#;
    "apigateway-503" Either 503 JSON AWS, "AWS API Gateway, no integration": r#"{"message":"Service Unavailable"}"#;
    "apigateway-504" Either 504 JSON AWS, "AWS API Gateway, the integration took too long": r#"{"message":"Endpoint request timed out"}"#;

    // CDNs
    "akamai-403" Either 403 HTML AKAMAI, "Akamai, access denied": AKAMAI_DENIED;
    "akamai-503" Either 503 HTML AKAMAI, "Akamai, the origin sent nothing": AKAMAI_UNAVAILABLE;
    "akamai-504" Either 504 HTML AKAMAI, "Akamai, no response in time": AKAMAI_TIMEOUT;
    "cdn-problem-403" Either 403 PROBLEM AKAMAI, "a CDN's problem document: denied":
        r#"{"type":"https://problems.cdn.invalid/denied","title":"Forbidden","status":403,"instance":"18.5e2a1702.1700000000.2b6a"}"#;
    "cdn-problem-409" Either 409 PROBLEM CF, "a CDN's problem document: the host's address is prohibited":
        r#"{"type":"https://problems.cdn.invalid/1001","title":"DNS points to a prohibited address","status":409,"detail":"1001"}"#;
    "cdn-problem-412" Either 412 PROBLEM AKAMAI, "a CDN's problem document: a condition does not hold":
        r#"{"type":"about:blank","title":"Precondition Failed","status":412}"#;
    "cdn-problem-500" Either 500 PROBLEM AKAMAI, "a CDN's problem document: its own error":
        r#"{"type":"about:blank","title":"Internal Server Error","status":500}"#;
    "cdn-problem-503" Either 503 PROBLEM &[("server", "AkamaiGHost"), ("retry-after", "1")],
        "a CDN's problem document: no response; Retry-After":
        r#"{"type":"https://problems.cdn.invalid/origin","title":"Service Unavailable","status":503,"detail":"The origin did not respond","instance":"15.5e2a1702"}"#;
    "cdn-problem-504" Either 504 PROBLEM CF, "a CDN's problem document: no response in time":
        r#"{"type":"https://problems.cdn.invalid/504","title":"Gateway time-out","status":504,"detail":"The origin did not respond in time","retryable":true}"#;
    "cloudflare-403" Before 403 HTML_UTF8 &[("server", "cloudflare"), ("cf-ray", "8f2a1b3c4d5e6f70-FRA"), ("cf-mitigated", "challenge")],
        "Cloudflare, a challenge for browsers": CLOUDFLARE_CHALLENGE;
    "cloudflare-409" Before 409 TEXT CF, "Cloudflare 1001, the host's address is prohibited": "error code: 1001";
    "cloudflare-429" Before 429 TEXT CF, "Cloudflare 1015, rate limit": "error code: 1015";
    "cloudflare-502" Either 502 TEXT CF, "Cloudflare, in place of the origin's own 502": "error code: 502";
    "cloudflare-504" Either 504 TEXT CF, "Cloudflare, in place of the origin's own 504": "error code: 504";
    "cloudflare-520" Either 520 HTML_UTF8 CF, "Cloudflare, the origin's response cannot be understood": CLOUDFLARE_PAGE;
    "cloudflare-521" Before 521 HTML_UTF8 CF, "Cloudflare, the origin refuses connections": CLOUDFLARE_PAGE;
    "cloudflare-522" Either 522 HTML_UTF8 CF, "Cloudflare, the connection timed out": CLOUDFLARE_PAGE;
    "cloudflare-523" Before 523 HTML_UTF8 CF, "Cloudflare, the origin is unreachable": CLOUDFLARE_PAGE;
    "cloudflare-524" Either 524 HTML_UTF8 CF, "Cloudflare, no response in time": CLOUDFLARE_PAGE;
    "cloudflare-525" Before 525 HTML_UTF8 CF, "Cloudflare, the TLS handshake failed": CLOUDFLARE_PAGE;
    "cloudflare-526" Before 526 HTML_UTF8 CF, "Cloudflare, the certificate is invalid": CLOUDFLARE_PAGE;
    "cloudflare-527" Either 527 HTML_UTF8 CF, "Cloudflare, Railgun was interrupted": CLOUDFLARE_PAGE;
    "cloudflare-530" Before 530 TEXT CF, "Cloudflare 1016, the origin has no address": "error code: 1016";

    // Filters
    "filter-200" Either 200 HTML NO_HEADERS, "a web filter, a block page with 200": BLOCKED;
    "filter-201" After 201 HTML NO_HEADERS, "a filter that puts its page in place of the body": DATA_LOSS;
    "filter-204" Either 204 NO_MEDIA_TYPE NO_HEADERS, "a web filter, nothing in place of the page": NONE;
    "filter-403" Either 403 HTML NO_HEADERS, "a web filter, a block page of the request or of the response": DATA_LOSS;
    "filter-451" Either 451 HTML NO_HEADERS, "a web filter, for legal reasons": BLOCKED;
    "filter-503" Either 503 HTML &[("retry-after", "2")], "a web filter that cannot scan now; Retry-After": DATA_LOSS;
    "error-200" Either 200 JSON NO_HEADERS, "a proxy that sends an error with 200":
        r#"{"error_code":"403010","message":"Oauth token is missing."}"#;
    "problem-200" Either 200 PROBLEM NO_HEADERS, "a proxy that sends a problem document with 200":
        r#"{"type":"about:blank","title":"Service Unavailable","status":503}"#;
    "json-200" Either 200 JSON NO_HEADERS, "a health page in place of the API": r#"{"status":"ok"}"#;

    // Login portals
    "portal-200" Either 200 HTML_UTF8 NO_HEADERS, "a login page with 200": SIGN_IN;
    "portal-302" Either 302 HTML LOGIN, "a login page elsewhere": MOVED;
    "portal-303" Either 303 HTML LOGIN, "a login page elsewhere, to be read with GET": MOVED;
    "portal-307" Before 307 HTML LOGIN, "a login page elsewhere, before anything was passed on": MOVED;
    "portal-401" Before 401 HTML &[("www-authenticate", "Negotiate")], "a proxy that requires Kerberos": SIGN_IN;
    "portal-511" Before 511 HTML_UTF8 NO_HEADERS, "a captive portal (RFC 6585)": SIGN_IN;
}

//! TLS for callers: what the PEM files hold, and whom a client certificate names.

use std::{
    fmt, fs,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use der::{
    AnyRef, Decode, SliceReader, Tag, Tagged,
    asn1::{GeneralizedTime, UtcTime},
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{RootCertStore, ServerConfig};
use webpki::EndEntityCert;

use crate::redact::Redactor;

/// TLS for callers.
#[derive(Clone, Debug)]
pub struct TlsOptions {
    /// Where the certificates are.
    pub files: TlsFiles,
    /// The clients that may call, by a name in their certificate. Empty: all clients.
    pub allowed_clients: Arc<[String]>,
}

/// The PEM files.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// The gateway's certificate and its chain.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// The authorities of client certificates. Without it, clients present none.
    pub client_ca: Option<PathBuf>,
}

/// What the files contained when they were read.
#[derive(PartialEq, Eq)]
pub struct Pem {
    cert: Vec<u8>,
    key: Vec<u8>,
    client_ca: Option<Vec<u8>>,
}

/// Valid certificates.
pub struct Loaded {
    /// How to accept connections with them. ALPN is left to the caller.
    pub server: ServerConfig,
    /// When the gateway's certificate begins and ends, in Unix seconds.
    pub validity: Range<i64>,
}

impl TlsFiles {
    /// Reads the files. Names each one that cannot be read.
    pub fn read(&self) -> Result<Pem, Vec<String>> {
        let mut problems = Vec::new();
        let mut read = |file, path: &PathBuf| {
            fs::read(path).unwrap_or_else(|error| {
                problems.push(problem(file, path, format_args!("cannot be read: {error}")));
                Vec::new()
            })
        };
        let pem = Pem {
            cert: read(CERT, &self.cert),
            key: read(KEY, &self.key),
            client_ca: self.client_ca.as_ref().map(|path| read(CLIENT_CA, path)),
        };
        match problems.is_empty() {
            true => Ok(pem),
            false => Err(problems),
        }
    }

    /// Parses the files, and checks that certificate and key belong together.
    pub fn parse(&self, pem: &Pem) -> Result<Loaded, Vec<String>> {
        let chain = certificates(&pem.cert).map_err(|why| problem(CERT, &self.cert, why));
        let key = PrivateKeyDer::from_pem_slice(&pem.key)
            .map_err(|_| problem(KEY, &self.key, "contains no PEM key"));
        let client_ca = self.client_ca.as_deref().zip(pem.client_ca.as_deref());
        let trusted = client_ca
            .map(|(path, pem)| certificates(pem).map_err(|why| problem(CLIENT_CA, path, why)))
            .transpose();
        let (chain, key, trusted) = match (chain, key, trusted) {
            (Ok(chain), Ok(key), Ok(trusted)) => (chain, key, trusted),
            (chain, key, trusted) => {
                let problems = [chain.err(), key.err(), trusted.err()];
                return Err(problems.into_iter().flatten().collect());
            }
        };
        let validity = validity(&chain[0]).map_err(|why| vec![problem(CERT, &self.cert, why)])?;
        let builder = ServerConfig::builder();
        let builder = match (trusted, &self.client_ca) {
            (Some(trusted), Some(path)) => {
                let mut roots = RootCertStore::empty();
                roots.add_parsable_certificates(trusted);
                let verifier = WebPkiClientVerifier::builder(Arc::new(roots)).build();
                let verifier = verifier.map_err(|why| vec![problem(CLIENT_CA, path, why)])?;
                builder.with_client_cert_verifier(verifier)
            }
            _ => builder.with_no_client_auth(),
        };
        let mut server = builder
            .with_single_cert(chain, key)
            .map_err(|why| vec![problem(KEY, &self.key, why)])?;
        // Every connection presents its certificate: a resumed one would not be checked again.
        // (Early data, which could be replayed, is off by default.)
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        Ok(Loaded { server, validity })
    }
}

const CERT: &str = "TLS certificate";
const KEY: &str = "TLS private key";
const CLIENT_CA: &str = "TLS client CA";

fn problem(file: &str, path: &Path, why: impl fmt::Display) -> String {
    format!("{file} {}: {why}", path.display())
}

/// The certificates in a PEM file, or what is wrong with it. The library's own iterator reads a
/// certificate without its END line and the next one as one.
pub fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    const BEGIN: &str = "-----BEGIN ";
    const LABEL: &str = "CERTIFICATE";
    let text = String::from_utf8_lossy(pem);
    let ends = |section: &str| section.matches("-----END ").count();
    let mut good = Vec::new();
    let bad = |number: usize, why: &str| Err(format!("certificate {number} is invalid: {why}"));
    let mut sections = text.split(BEGIN);
    if sections.next().is_some_and(|comment| ends(comment) > 0) {
        return bad(1, "it has no BEGIN line");
    }
    for section in sections {
        let number = good.len() + 1;
        let label = section.split(['-', '\r', '\n']).next().unwrap_or_default();
        // The file may contain other things too, such as a key.
        if LABEL.starts_with(label.trim_end()) {
            if ends(section) == 0 {
                return bad(number, "it has no END line");
            }
            let certificate =
                CertificateDer::from_pem_slice(format!("{BEGIN}{section}").as_bytes());
            let certificate = certificate
                .ok()
                .filter(|certificate| RootCertStore::empty().add(certificate.clone()).is_ok());
            match certificate {
                Some(certificate) => good.push(certificate),
                None => return bad(number, "it is cut or damaged"),
            }
        }
        if ends(section) > 1 {
            return bad(good.len() + 1, "it has no BEGIN line");
        }
    }
    match good.is_empty() {
        true => Err("contains no PEM certificate".to_owned()),
        false => Ok(good),
    }
}

/// `tbsCertificate.validity` (RFC 5280, section 4.1), in Unix seconds. A whole X.509 parser
/// would be two dozen crates.
fn validity(certificate: &CertificateDer<'_>) -> der::Result<Range<i64>> {
    let mut certificate = SliceReader::new(AnyRef::from_der(certificate)?.value())?;
    let mut fields = SliceReader::new(AnyRef::decode(&mut certificate)?.value())?;
    // The version, which may be missing, the serial number, the signature's algorithm, the issuer.
    if Tag::peek(&fields)? != Tag::Integer {
        AnyRef::decode(&mut fields)?;
    }
    for _ in 0..3 {
        AnyRef::decode(&mut fields)?;
    }
    let mut validity = SliceReader::new(AnyRef::decode(&mut fields)?.value())?;
    let not_before = time(AnyRef::decode(&mut validity)?)?;
    let not_after = time(AnyRef::decode(&mut validity)?)?;
    Ok(not_before..not_after)
}

fn time(value: AnyRef<'_>) -> der::Result<i64> {
    let since_epoch = match value.tag() {
        Tag::UtcTime => value.decode_as::<UtcTime>()?.to_unix_duration(),
        _ => value.decode_as::<GeneralizedTime>()?.to_unix_duration(),
    };
    Ok(i64::try_from(since_epoch.as_secs()).unwrap_or(i64::MAX))
}

/// The client at the other end of a connection.
#[derive(Clone, Debug)]
pub struct Peer {
    /// The allowed name in its certificate, or else the first name. If several are allowed,
    /// all of them.
    pub identity: Option<Arc<str>>,
    /// Whether it may call.
    pub authorized: bool,
}

impl Peer {
    /// The client that has presented a certificate, already verified, or none.
    ///
    /// An authority that is limited to one domain can still issue any URI, so an allowed name
    /// is compared only with names of its own kind. A certificate with several allowed names
    /// identifies no client, and neither does a SPIFFE certificate with a second URI
    /// (X.509-SVID, section 2: exactly one).
    pub fn of(certificate: Option<&CertificateDer<'_>>, allowed: &[String]) -> Self {
        const LONGEST: usize = 256;
        let certificate = certificate.and_then(|der| EndEntityCert::try_from(der).ok());
        let certificate = certificate.as_ref();
        let uris: Vec<&str> = certificate.map_or_else(Vec::new, |c| c.valid_uri_names().collect());
        let dns: Vec<&str> = certificate.map_or_else(Vec::new, |c| c.valid_dns_names().collect());
        let is_spiffe = uris.iter().any(|uri| uri.starts_with("spiffe://"));
        let listed = allowed.iter().map(String::as_str).filter(|name| {
            let same_kind = if is_uri(name) { &uris } else { &dns };
            same_kind.contains(name)
        });
        let mut names: Vec<&str> = listed.collect();
        let authorized = allowed.is_empty() || (names.len() == 1 && !(is_spiffe && uris.len() > 1));
        if names.is_empty() {
            names.extend(uris.iter().chain(&dns).next());
        }
        // For logs: whoever issues certificates chose the names.
        let shown = Redactor::default().text(&names.join(" and "), LONGEST);
        Peer {
            identity: (!names.is_empty()).then(|| shown.into()),
            authorized,
        }
    }
}

/// Whether an allowed name is a URI, and not a DNS name.
pub fn is_uri(name: &str) -> bool {
    name.contains(':')
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, SanType, date_time_ymd};

    use super::*;

    fn certificate(names: &[&str], year: i32) -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        params.not_before = date_time_ymd(2001, 9, 9);
        params.not_after = date_time_ymd(year, 2, 3);
        params.subject_alt_names = names
            .iter()
            .map(|name| match name.contains("://") {
                true => SanType::URI((*name).try_into().unwrap()),
                false => SanType::DnsName((*name).try_into().unwrap()),
            })
            .collect();
        let key = KeyPair::generate().unwrap();
        params.self_signed(&key).unwrap().der().clone()
    }

    #[test]
    fn a_bad_certificate_in_a_file_is_named() {
        let pem = |name: &str| {
            let key = KeyPair::generate().unwrap();
            let params = CertificateParams::new([name.to_owned()]).unwrap();
            (params.self_signed(&key).unwrap().pem(), key.serialize_pem())
        };
        let [(a, key), (b, _), (c, _)] = ["a.example", "b.example", "c.example"].map(pem);
        let lines = |pem: &str, some: std::ops::Range<usize>| {
            let lines: Vec<_> = pem.lines().skip(some.start).take(some.len()).collect();
            lines.join("\n") + "\n"
        };
        let all = b.lines().count();
        let cut_at = |byte: usize| b[..byte].to_owned();
        let without_end = lines(&b, 0..all - 1);
        let without_begin = lines(&b, 1..all);
        let a_line_less = lines(&b, 0..2) + &lines(&b, 3..all);
        let damaged = b.replacen("MII", "M!I", 1);
        for (cut, why) in [
            (&without_end, "it has no END line"),
            (&without_begin, "it has no BEGIN line"),
            (&a_line_less, "it is cut or damaged"),
            (&damaged, "it is cut or damaged"),
            (&cut_at(15), "it has no END line"),
            (&cut_at(100), "it has no END line"),
            (&cut_at(b.len() - 12), "it is cut or damaged"),
        ] {
            for (pem, number) in [
                (format!("{cut}\n{a}"), 1),
                (format!("# a\n{a}{key}{cut}\n{c}"), 2),
                (format!("{a}{c}\r\n{cut}"), 3),
            ] {
                let told = certificates(pem.as_bytes()).unwrap_err();
                let expected = format!("certificate {number} is invalid: {why}");
                assert_eq!(told, expected, "{pem}");
            }
        }
        let good = format!("caf\u{e9}\n{a}{key}\n{b}").replace('\n', "\r\n");
        assert_eq!(certificates(good.as_bytes()).unwrap().len(), 2);
        for none in ["", "nothing", &key] {
            let told = certificates(none.as_bytes()).unwrap_err();
            assert_eq!(told, "contains no PEM certificate");
        }
    }

    #[test]
    fn the_begin_and_end_of_a_certificate() {
        // Up to 2049 and after it, certificates have two forms of time.
        for (year, seconds) in [(2031, 1_927_843_200), (2061, 2_874_614_400)] {
            let expected = 999_993_600..seconds;
            assert_eq!(validity(&certificate(&[], year)).unwrap(), expected);
        }
        assert!(validity(&CertificateDer::from_slice(b"0\x03abc")).is_err());
    }

    #[test]
    fn a_peer_is_who_its_certificate_names() {
        const BOTH: &str = "b.example and spiffe://td/ns/a/sa/b";
        let shown = certificate(&["a.example", "spiffe://td/ns/a/sa/b", "b.example"], 2031);
        for (allowed, identity, may) in [
            (&[][..], "spiffe://td/ns/a/sa/b", true),
            (&["b.example"], "b.example", true),
            (&["spiffe://td/ns/a/sa"], "spiffe://td/ns/a/sa/b", false),
            (&["example", "B.example"], "spiffe://td/ns/a/sa/b", false),
            (&["b.example", "spiffe://td/ns/a/sa/b"], BOTH, false),
        ] {
            let allowed: Vec<_> = allowed.iter().map(|name| name.to_string()).collect();
            let peer = Peer::of(Some(&shown), &allowed);
            assert_eq!(peer.identity.as_deref(), Some(identity), "{allowed:?}");
            assert_eq!(peer.authorized, may, "{allowed:?}");
        }
        // Each kind in the other's clothes.
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![
            SanType::URI("a.example".try_into().unwrap()),
            SanType::DnsName("spiffe://td/a".try_into().unwrap()),
        ];
        let key = KeyPair::generate().unwrap();
        let disguised = params.self_signed(&key).unwrap();
        for allowed in ["a.example", "spiffe://td/a"] {
            let peer = Peer::of(Some(disguised.der()), &[allowed.to_owned()]);
            assert!(!peer.authorized, "{allowed}");
        }
        let two = certificate(&["spiffe://td/a", "spiffe://td/b"], 2031);
        assert!(!Peer::of(Some(&two), &["spiffe://td/a".to_owned()]).authorized);
        let odd = certificate(&[&format!("x://\n{}", "y".repeat(10_000))], 2031);
        let identity = Peer::of(Some(&odd), &[]).identity.unwrap();
        assert!(identity.len() < 300 && !identity.contains('\n'));
        for nameless in [None, Some(&certificate(&[], 2031))] {
            let peer = Peer::of(nameless, &["a".to_owned()]);
            assert!(peer.identity.is_none() && !peer.authorized);
            assert!(Peer::of(nameless, &[]).authorized);
        }
    }
}

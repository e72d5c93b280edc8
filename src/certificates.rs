//! TLS where calls are taken: what its PEM files say, and whom the certificate
//! of a client names.

use std::{fs, ops::Range, path::PathBuf, sync::Arc};

use der::{
    AnyRef, Decode, SliceReader, Tag, Tagged,
    asn1::{GeneralizedTime, UtcTime},
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{RootCertStore, ServerConfig};
use webpki::EndEntityCert;

/// How TLS is spoken where calls are taken.
#[derive(Clone, Debug)]
pub struct TlsOptions {
    /// Where the certificates are.
    pub files: TlsFiles,
    /// The clients that may call, by a name in their certificate. All, if it is empty.
    pub allowed: Arc<[String]>,
}

/// The PEM files.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// The gateway's certificate and its chain.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// The authorities of clients' certificates. Without it, clients show none.
    pub client_ca: Option<PathBuf>,
}

/// What the files held when they were read.
#[derive(PartialEq, Eq)]
pub struct Pem {
    cert: Vec<u8>,
    key: Vec<u8>,
    client_ca: Option<Vec<u8>>,
}

/// Certificates that hold.
pub struct Loaded {
    /// How connections are opened with them. Which protocol is spoken inside is left open.
    pub server: ServerConfig,
    /// When the gateway's certificate begins and ends, in Unix seconds.
    pub validity: Range<i64>,
}

impl TlsFiles {
    /// Reads the files, or tells which of them cannot be read.
    pub fn read(&self) -> Result<Pem, Vec<String>> {
        let mut problems = Vec::new();
        let mut read = |flag, path: &PathBuf| {
            fs::read(path).unwrap_or_else(|error| {
                let path = path.display();
                problems.push(format!("--tls-{flag}-file cannot be read: {path}: {error}"));
                Vec::new()
            })
        };
        let pem = Pem {
            cert: read("cert", &self.cert),
            key: read("key", &self.key),
            client_ca: self.client_ca.as_ref().map(|path| read("client-ca", path)),
        };
        match problems.is_empty() {
            true => Ok(pem),
            false => Err(problems),
        }
    }

    /// Parses what was read, and checks that certificate and key belong together.
    pub fn parse(&self, pem: &Pem) -> Result<Loaded, Vec<String>> {
        let mut problems = Vec::new();
        let mut problem = |flag, path: &PathBuf, what: &str| {
            problems.push(format!("--tls-{flag}-file {what}: {}", path.display()));
        };
        let chain = certificates(&pem.cert);
        if chain.is_none() {
            problem("cert", &self.cert, "has no PEM certificate");
        }
        let key = PrivateKeyDer::from_pem_slice(&pem.key).ok();
        if key.is_none() {
            problem("key", &self.key, "has no PEM key");
        }
        let mut roots = None;
        if let (Some(path), Some(pem)) = (&self.client_ca, &pem.client_ca) {
            roots = authorities(pem);
            if roots.is_none() {
                problem("client-ca", path, "has no PEM certificate of an authority");
            }
        }
        let (Some(chain), Some(key), true) = (chain, key, problems.is_empty()) else {
            return Err(problems);
        };
        let bad = |flag: &str, path: &PathBuf, error: String| {
            vec![format!(
                "--tls-{flag}-file is bad: {}: {error}",
                path.display()
            )]
        };
        let validity =
            validity(&chain[0]).map_err(|error| bad("cert", &self.cert, error.to_string()))?;
        let builder = ServerConfig::builder();
        let builder = match roots {
            None => builder.with_no_client_auth(),
            Some(roots) => builder.with_client_cert_verifier(
                WebPkiClientVerifier::builder(Arc::new(roots))
                    .build()
                    .map_err(|error| vec![format!("--tls-client-ca-file is bad: {error}")])?,
            ),
        };
        let mut server = builder
            .with_single_cert(chain, key)
            .map_err(|error| bad("key", &self.key, error.to_string()))?;
        // Every connection shows its certificate: a resumed one would not be checked again.
        // (Early data, which could be replayed, is off by default.)
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        Ok(Loaded { server, validity })
    }
}

fn certificates(pem: &[u8]) -> Option<Vec<CertificateDer<'static>>> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    all.ok().filter(|all| !all.is_empty())
}

fn authorities(pem: &[u8]) -> Option<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(pem)? {
        roots.add(certificate).ok()?;
    }
    Some(roots)
}

/// `tbsCertificate.validity` (RFC 5280, section 4.1), in Unix seconds.
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

/// Who is at the other end of a connection.
#[derive(Clone, Debug)]
pub struct Peer {
    /// A name in its certificate: the first that is on the list, or the first.
    pub identity: Option<Arc<str>>,
    /// Whether it may call.
    pub allowed: bool,
}

impl Peer {
    /// Who has shown a certificate, which has been verified, or none.
    pub fn of(certificate: Option<&CertificateDer<'_>>, allowed: &[String]) -> Self {
        let names = certificate.map(names).unwrap_or_default();
        let listed = names.iter().find(|name| allowed.contains(name));
        Peer {
            identity: listed.or(names.first()).map(|name| name.as_str().into()),
            allowed: allowed.is_empty() || listed.is_some(),
        }
    }
}

/// The URIs and DNS names among the subject alternative names.
fn names(certificate: &CertificateDer<'_>) -> Vec<String> {
    let Ok(certificate) = EndEntityCert::try_from(certificate) else {
        return Vec::new();
    };
    let uris = certificate.valid_uri_names();
    let names = uris.chain(certificate.valid_dns_names());
    names.map(str::to_owned).collect()
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
        let shown = certificate(&["a.example", "spiffe://td/ns/a/sa/b", "b.example"], 2031);
        for (allowed, identity, may) in [
            (&[][..], "spiffe://td/ns/a/sa/b", true),
            (&["b.example"], "b.example", true),
            (&["spiffe://td/ns/a/sa"], "spiffe://td/ns/a/sa/b", false),
            (&["example", "B.example"], "spiffe://td/ns/a/sa/b", false),
        ] {
            let allowed: Vec<_> = allowed.iter().map(|name| name.to_string()).collect();
            let peer = Peer::of(Some(&shown), &allowed);
            assert_eq!(peer.identity.as_deref(), Some(identity), "{allowed:?}");
            assert_eq!(peer.allowed, may, "{allowed:?}");
        }
        for nameless in [None, Some(&certificate(&[], 2031))] {
            let peer = Peer::of(nameless, &["a".to_owned()]);
            assert!(peer.identity.is_none() && !peer.allowed);
            assert!(Peer::of(nameless, &[]).allowed);
        }
    }
}

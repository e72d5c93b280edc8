//! TLS in front of an upstream, and TLS clients of the gateway.

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, CertifiedKey, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyPair, SanType, generate_simple_self_signed,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{
    TlsAcceptor, TlsConnector,
    client::TlsStream,
    rustls::{
        ClientConfig, RootCertStore, ServerConfig,
        pki_types::{
            CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, pem::PemObject,
        },
    },
};

/// A self-signed certificate for `localhost`, and the PEM file to trust it by.
pub(crate) fn certificate(file_name: &str) -> (ServerConfig, PathBuf) {
    let CertifiedKey { cert, signing_key } =
        generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let file = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(file_name);
    std::fs::write(&file, cert.pem()).unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(signing_key.serialize_der()));
    let config = ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![cert.der().clone()], key)
        .unwrap();
    (config, file)
}

/// Takes TLS connections and passes them on in plain text.
pub(crate) struct TlsFront {
    port: u16,
}

impl TlsFront {
    pub(crate) async fn start(mut config: ServerConfig, alpn: &[&str], target: SocketAddr) -> Self {
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let acceptor = acceptor.clone();
                tokio::spawn(async move {
                    let Ok(mut inside) = acceptor.accept(stream).await else {
                        return;
                    };
                    let mut outside = TcpStream::connect(target).await.unwrap();
                    let _ = tokio::io::copy_bidirectional(&mut inside, &mut outside).await;
                });
            }
        });
        TlsFront { port }
    }

    pub(crate) fn url(&self) -> String {
        format!("https://localhost:{}/data/foundation/import", self.port)
    }
}

/// An authority that issues certificates.
pub(crate) struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate and its key.
#[derive(Clone)]
pub(crate) struct Issued {
    pub(crate) cert: String,
    pub(crate) key: String,
}

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        Authority(CertifiedIssuer::self_signed(params, key).unwrap())
    }

    pub(crate) fn pem(&self) -> String {
        self.0.pem()
    }

    /// A certificate with these URIs and DNS names.
    pub(crate) fn issue(&self, names: &[&str]) -> Issued {
        self.issue_with(names, |_| {})
    }

    /// The same, with other parameters.
    pub(crate) fn issue_with(
        &self,
        names: &[&str],
        change: impl FnOnce(&mut CertificateParams),
    ) -> Issued {
        let mut params = CertificateParams::default();
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let name = |name: &&str| match name.contains("://") {
            true => SanType::URI((*name).try_into().unwrap()),
            false => SanType::DnsName((*name).try_into().unwrap()),
        };
        params.subject_alt_names = names.iter().map(name).collect();
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.0).unwrap();
        Issued {
            cert: cert.pem(),
            key: key.serialize_pem(),
        }
    }

    pub(crate) fn roots(&self) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        roots.add(self.0.der().clone()).unwrap();
        roots
    }

    /// A TLS client that trusts this authority, and shows a certificate.
    pub(crate) fn client(&self, shows: Option<&Issued>) -> ClientConfig {
        let config = ClientConfig::builder().with_root_certificates(self.roots());
        let mut config = match shows {
            None => config.with_no_client_auth(),
            Some(shows) => {
                let key = PrivateKeyDer::from_pem_slice(shows.key.as_bytes()).unwrap();
                config
                    .with_client_auth_cert(vec![shows.der()], key)
                    .unwrap()
            }
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        config
    }
}

impl Issued {
    pub(crate) fn der(&self) -> CertificateDer<'static> {
        CertificateDer::from_pem_slice(self.cert.as_bytes()).unwrap()
    }
}

/// A folder with the gateway's `tls.crt`, `tls.key` and `ca.crt`, as in a
/// Kubernetes secret.
pub(crate) struct TlsFolder(PathBuf);

impl TlsFolder {
    pub(crate) fn new(name: &str, server: &Issued, clients: &Authority) -> Self {
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir(&folder).unwrap();
        let folder = TlsFolder(folder);
        folder.put(server);
        folder.write("ca.crt", &clients.pem());
        folder
    }

    pub(crate) fn put(&self, server: &Issued) {
        self.write("tls.crt", &server.cert);
        self.write("tls.key", &server.key);
    }

    pub(crate) fn write(&self, file: &str, text: &str) {
        fs::write(self.0.join(file), text).unwrap();
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// The flags for TLS.
    pub(crate) fn tls(&self) -> [String; 2] {
        [("cert", "tls.crt"), ("key", "tls.key")].map(|(flag, file)| self.flag(flag, file))
    }

    /// The flags for mTLS.
    pub(crate) fn mtls(&self) -> [String; 3] {
        let [cert, key] = self.tls();
        [cert, key, self.flag("client-ca", "ca.crt")]
    }

    fn flag(&self, flag: &str, file: &str) -> String {
        format!("--tls-{flag}-file={}", self.0.join(file).display())
    }
}

/// Opens TLS as a client does.
pub(crate) async fn handshake<S>(stream: S, client: ClientConfig) -> io::Result<TlsStream<S>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let name = ServerName::try_from("localhost").unwrap();
    TlsConnector::from(Arc::new(client))
        .connect(name, stream)
        .await
}

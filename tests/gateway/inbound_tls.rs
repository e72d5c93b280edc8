//! TLS where calls are taken: who gets in, and certificates that change.

use std::{
    fs,
    os::unix::fs::symlink,
    time::{Duration, Instant},
};

use aep_simulator::Simulator;
use rcgen::{SanType, date_time_ymd};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UnixStream},
    time::timeout,
};
use tokio_rustls::rustls::{ClientConfig, pki_types::CertificateDer};
use tonic::Code;

use crate::support::{
    Authority, CREATE, CREDENTIALS, Client, Gateway, Issued, RawAnswer, TlsFolder, frame,
    handshake, request, simulator,
};

const LISTED: &str = "spiffe://cluster.local/ns/a/sa/b";
const REFUSED: &str = r#"aep_gateway_refused_connections_total{reason="tls"}"#;
const RELOADED: &str = r#"aep_gateway_tls_reloads_total{result="ok"}"#;
const NOT_RELOADED: &str = r#"aep_gateway_tls_reloads_total{result="failed"}"#;

async fn start(upstream: &Simulator, flags: &[impl AsRef<str>], more: &[&str]) -> Gateway {
    let flags: Vec<_> = flags.iter().map(AsRef::as_ref).collect();
    Gateway::before(upstream, &[&flags[..], more].concat()).await
}

/// A client on a new connection, and the certificate that the gateway showed.
async fn connect(
    gateway: &Gateway,
    config: ClientConfig,
) -> Result<(Client, CertificateDer<'static>), String> {
    let stream = TcpStream::connect(&gateway.listen).await.unwrap();
    let stream = handshake(stream, config).await.map_err(|e| e.to_string())?;
    let shown = stream.get_ref().1.peer_certificates().unwrap()[0].clone();
    let client = Client::over(stream).await.map_err(|e| e.to_string())?;
    Ok((client, shown))
}

/// One `CreateBatch` on a connection of its own. In TLS 1.3 a client learns
/// only after its own handshake that it was refused.
async fn create(gateway: &Gateway, config: ClientConfig) -> Result<RawAnswer, String> {
    let (mut client, _) = connect(gateway, config).await?;
    client.create().await.map_err(|e| format!("{e:?}"))
}

/// `config` with flags: the problems it tells, a line each.
async fn problems(flags: &[impl AsRef<str>], more: &[&str]) -> Vec<String> {
    let flags = flags.iter().map(AsRef::as_ref);
    let flags: Vec<_> = ["config"].into_iter().chain(flags).collect();
    let checked = Gateway::command(&[&flags[..], more].concat())
        .output()
        .await;
    let told = String::from_utf8(checked.unwrap().stderr).unwrap();
    told.lines()
        .skip(1)
        .map(|line| line.trim().to_owned())
        .collect()
}

#[tokio::test]
async fn files_that_do_not_hold_are_refused_at_start() {
    let ca = Authority::new("ca");
    let folder = TlsFolder::new("bad", &ca.issue(&["localhost"]), &ca);
    assert!(problems(&folder.mtls(), &[]).await.is_empty());

    let Issued { key, .. } = ca.issue(&["localhost"]);
    folder.write("tls.key", &key);
    let told = problems(&folder.mtls(), &[]).await;
    assert_eq!(told.len(), 1);
    assert!(
        told[0].starts_with("TLS private key ") && told[0].contains("tls.key: "),
        "{told:?}"
    );

    let cut: String = ca.pem().lines().take(4).collect::<Vec<_>>().join("\n");
    folder.write("ca.crt", &(ca.pem() + &cut + "\n" + &ca.pem()));
    let upstream_ca = format!("--upstream-ca-file={}/ca.crt", folder.path().display());
    let told = problems(&folder.mtls(), &[&upstream_ca]).await;
    for file in ["TLS client CA ", "--upstream-ca-file: "] {
        let why = "ca.crt: certificate 2 is invalid: it has no END line";
        let is_told = |line: &String| line.starts_with(file) && line.ends_with(why);
        assert!(told.iter().any(is_told), "{told:?}");
    }

    for file in ["tls.crt", "tls.key", "ca.crt"] {
        folder.write(file, "nothing");
    }
    let told = problems(&folder.mtls(), &["--request-timeout=soon"]).await;
    assert_eq!(told.len(), 4, "{told:?}");
    let listed = format!("--tls-allowed-clients={LISTED}");
    let told = problems(&folder.tls(), &[&listed]).await;
    assert!(told[0].contains("needs --tls-client-ca-file"), "{told:?}");

    let demo = ["demo", "--tls-cert-file=x", "--tls-key-file=y"];
    let demo = Gateway::command(&demo).output().await.unwrap();
    assert_eq!(demo.status.code(), Some(2));
}

#[tokio::test]
async fn a_default_token_needs_an_allow_list_or_a_word() {
    let ca = Authority::new("ca");
    let folder = TlsFolder::new("token", &ca.issue(&["localhost"]), &ca);
    folder.write("token", "s3cret-token");
    let token = format!("--default-token-file={}/token", folder.path().display());
    let told = problems(&folder.mtls(), &[&token]).await;
    assert!(
        told[0].starts_with("--default-token-file lets everyone"),
        "{told:?}"
    );
    let listed = format!("--tls-allowed-clients={LISTED}");
    assert!(
        problems(&folder.mtls(), &[&token, &listed])
            .await
            .is_empty()
    );
    let said = [&token, "--callers-are-authenticated"];
    assert!(problems(&folder.mtls(), &said).await.is_empty());
}

#[tokio::test]
async fn tls_is_spoken_and_nothing_else() {
    let (upstream, ca) = (simulator().await, Authority::new("ca"));
    let folder = TlsFolder::new("tls-only", &ca.issue(&["localhost"]), &ca);
    let gateway = start(&upstream, &folder.tls(), &[]).await;

    let answer = create(&gateway, ca.client(None)).await.unwrap();
    assert_eq!(answer.code(), Code::Ok);
    let old =
        ClientConfig::builder_with_protocol_versions(&[&tokio_rustls::rustls::version::TLS12]);
    let mut old = old.with_root_certificates(ca.roots()).with_no_client_auth();
    old.alpn_protocols = vec![b"h2".to_vec()];
    assert_eq!(create(&gateway, old).await.unwrap().code(), Code::Ok);
    gateway.counts(REFUSED, "0").await;

    let mut http1 = ca.client(None);
    http1.alpn_protocols = vec![b"http/1.1".to_vec()];
    let refused = connect(&gateway, http1).await.err().unwrap();
    assert!(refused.contains("NoApplicationProtocol"), "{refused}");
    let stranger = Authority::new("stranger").client(None);
    let refused = connect(&gateway, stranger).await.err().unwrap();
    assert!(refused.contains("UnknownIssuer"), "{refused}");

    let mut plain = TcpStream::connect(&gateway.listen).await.unwrap();
    plain
        .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        .await
        .unwrap();
    let mut told = Vec::new();
    let closed = timeout(Duration::from_secs(5), plain.read_to_end(&mut told)).await;
    closed.expect("closed at once").unwrap();
    assert_eq!(told[0], 21, "a TLS alert");
    gateway.counts(REFUSED, "3").await;
    gateway.logs("InvalidContentType").await;

    // The admin pages stay plain HTTP, for probes that have no certificate.
    assert_eq!(gateway.page("/readyz").await.0, 200);
    let healthy = Gateway::command(&["healthcheck", "--address", &gateway.admin]);
    assert!({ healthy }.status().await.unwrap().success());
    assert!(!gateway.log().contains("PRIVATE KEY"));
}

#[tokio::test]
async fn a_client_without_a_good_certificate_gets_no_connection() {
    let (upstream, ca) = (simulator().await, Authority::new("ca"));
    let folder = TlsFolder::new("mtls", &ca.issue(&["localhost"]), &ca);
    let gateway = start(&upstream, &folder.mtls(), &[]).await;
    let good = ca.issue(&[LISTED]);
    let answer = create(&gateway, ca.client(Some(&good))).await.unwrap();
    assert_eq!(answer.code(), Code::Ok);

    let over = ca.issue_with(&[LISTED], |params| {
        params.not_after = date_time_ymd(2020, 1, 1);
    });
    let for_servers = ca.issue_with(&[LISTED], |params| {
        params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    });
    let of_another = Authority::new("another").issue(&[LISTED]);
    for (shown, why) in [
        (None, "CertificateRequired"),
        (Some(&over), "CertificateExpired"),
        (Some(&of_another), "UnknownCA"),
        (Some(&for_servers), "UnsupportedCertificate"),
    ] {
        let refused = create(&gateway, ca.client(shown)).await.unwrap_err();
        assert!(refused.contains(why), "{refused} is not {why}");
    }
    gateway.counts(REFUSED, "4").await;
    assert_eq!(upstream.batches().len(), 1);
}

#[tokio::test]
async fn only_clients_on_the_list_may_call() {
    let (upstream, ca) = (simulator().await, Authority::new("ca"));
    let folder = TlsFolder::new("allowed", &ca.issue(&["localhost"]), &ca);
    let list = format!("--tls-allowed-clients={LISTED}, client.example");
    let gateway = start(&upstream, &folder.mtls(), &[&list]).await;
    for names in [&[LISTED][..], &["other.example", "client.example"]] {
        let listed = ca.client(Some(&ca.issue(names)));
        let answer = create(&gateway, listed).await.unwrap();
        assert_eq!(answer.code(), Code::Ok, "{names:?}");
    }
    gateway.counts(REFUSED, "0").await;

    let forged = format!("By=spiffe://x;URI={LISTED};DNS=client.example");
    let metadata = [
        &CREDENTIALS[..],
        &[("x-forwarded-client-cert", forged.as_str())],
    ]
    .concat();
    for names in [
        &["spiffe://cluster.local/ns/a/sa/bb"][..],
        &["spiffe://cluster.local/ns/a/sa"],
        &["x.client.example", "spiffe://cluster.local/ns/A/sa/b"],
        &["client.example", LISTED],
        &[LISTED, "spiffe://cluster.local/ns/a/sa/c"],
        &[],
    ] {
        let unlisted = ca.client(Some(&ca.issue(names)));
        let (mut client, _) = connect(&gateway, unlisted).await.unwrap();
        // In gRPC's own words: a client without a connection would try for ever.
        let answer = client.call(CREATE, &metadata, &frame(&request())).await;
        let answer = answer.unwrap();
        assert_eq!(answer.code(), Code::PermissionDenied, "{names:?}");
        assert_eq!(answer.reason(), "CLIENT_NOT_ALLOWED");
        assert!(answer.trailers_only);
        let health = "/grpc.health.v1.Health/Check";
        let answer = client.call(health, &[], &[0; 5]).await.unwrap();
        assert_eq!(answer.code(), Code::PermissionDenied, "{names:?}");
    }
    // DNS names in the clothes of URIs, and the reverse.
    for name in [
        SanType::URI("client.example".try_into().unwrap()),
        SanType::DnsName(LISTED.try_into().unwrap()),
    ] {
        let disguised = ca.issue_with(&[], |params| params.subject_alt_names = vec![name.clone()]);
        let answer = create(&gateway, ca.client(Some(&disguised))).await.unwrap();
        assert_eq!(answer.code(), Code::PermissionDenied, "{name:?}");
    }
    gateway.counts(REFUSED, "8").await;
    gateway.logs("spiffe://cluster.local/ns/a/sa/bb").await;
    assert_eq!(upstream.batches().len(), 2);
}

#[tokio::test]
async fn changed_certificates_are_used_and_no_connection_is_dropped() {
    let (upstream, ca) = (simulator().await, Authority::new("ca"));
    let first = ca.issue(&["localhost"]);
    let folder = TlsFolder::new("reload", &first, &ca);
    let gateway = start(&upstream, &folder.mtls(), &[]).await;
    let client = ca.issue(&[LISTED]);
    let (mut old, shown) = connect(&gateway, ca.client(Some(&client))).await.unwrap();
    assert_eq!(shown, first.der());
    let mut stays = async || assert_eq!(old.create().await.unwrap().code(), Code::Ok);
    stays().await;

    // Half written: the new certificate, and still the old key. Then neither is PEM.
    let second = ca.issue_with(&["localhost"], |params| {
        params.not_after = date_time_ymd(2031, 2, 3);
    });
    let mut failed = 0;
    for (cert, key) in [(&second.cert, &first.key), (&first.key, &String::new())] {
        let (cert, key) = (cert.clone(), key.clone());
        folder.put(&Issued { cert, key });
        gateway.signal("-HUP");
        failed += 1;
        gateway.counts(NOT_RELOADED, &failed.to_string()).await;
        let (_, shown) = connect(&gateway, ca.client(Some(&client))).await.unwrap();
        assert_eq!(shown, first.der());
    }
    gateway.logs("tls.key: keys may not be consistent").await;
    gateway.logs("tls.crt: contains no PEM certificate").await;

    folder.put(&second);
    gateway.signal("-HUP");
    gateway.counts(RELOADED, "1").await;
    let (_, shown) = connect(&gateway, ca.client(Some(&client))).await.unwrap();
    assert_eq!(shown, second.der());
    let not_after = "aep_gateway_tls_certificate_not_after_seconds{}";
    assert_eq!(gateway.metric(not_after).await, "1927843200");
    stays().await;

    // The authority of clients changes: first both, then the new one alone.
    let new_ca = Authority::new("new");
    let new_client = new_ca.issue(&[LISTED]);
    for (authorities, old_may) in [(ca.pem() + &new_ca.pem(), true), (new_ca.pem(), false)] {
        folder.write("ca.crt", &authorities);
        gateway.signal("-HUP");
        gateway
            .counts(RELOADED, if old_may { "2" } else { "3" })
            .await;
        let new = create(&gateway, ca.client(Some(&new_client))).await;
        assert_eq!(new.unwrap().code(), Code::Ok);
        let old = create(&gateway, ca.client(Some(&client))).await;
        assert_eq!(old.is_ok(), old_may, "{old:?}");
    }
    stays().await;
}

#[tokio::test]
async fn certificates_are_followed_as_kubernetes_swaps_them() {
    let (upstream, ca) = (simulator().await, Authority::new("ca"));
    let (first, second) = (ca.issue(&["localhost"]), ca.issue(&["localhost"]));
    let folder = TlsFolder::new("kubernetes", &first, &ca);
    let path = folder.path();
    for (version, issued) in [("..1", &first), ("..2", &second)] {
        fs::create_dir(path.join(version)).unwrap();
        fs::write(path.join(version).join("tls.crt"), &issued.cert).unwrap();
        fs::write(path.join(version).join("tls.key"), &issued.key).unwrap();
    }
    symlink("..1", path.join("..data")).unwrap();
    for file in ["tls.crt", "tls.key"] {
        fs::remove_file(path.join(file)).unwrap();
        symlink(format!("..data/{file}"), path.join(file)).unwrap();
    }
    let gateway = start(&upstream, &folder.tls(), &[]).await;
    let (_, shown) = connect(&gateway, ca.client(None)).await.unwrap();
    assert_eq!(shown, first.der());

    symlink("..2", path.join("..data_tmp")).unwrap();
    fs::rename(path.join("..data_tmp"), path.join("..data")).unwrap();
    gateway.counts(RELOADED, "1").await; // without a signal
    let (_, shown) = connect(&gateway, ca.client(None)).await.unwrap();
    assert_eq!(shown, second.der());
}

#[tokio::test]
async fn connections_that_have_not_begun_do_not_delay_the_end() {
    let (upstream, ca) = (simulator().await, Authority::new("ca"));
    let folder = TlsFolder::new("drain", &ca.issue(&["localhost"]), &ca);
    let gateway = start(&upstream, &folder.mtls(), &[]).await;
    let _silent = TcpStream::connect(&gateway.listen).await.unwrap();
    let client = ca.client(Some(&ca.issue(&[LISTED])));
    let stream = TcpStream::connect(&gateway.listen).await.unwrap();
    let _no_http2 = handshake(stream, client.clone()).await.unwrap();
    let (mut idle, _) = connect(&gateway, client).await.unwrap();
    assert_eq!(idle.create().await.unwrap().code(), Code::Ok);

    gateway.counts("aep_gateway_connections", "3").await;
    let begin = Instant::now();
    gateway.terminate();
    let (status, log) = gateway.ended().await;
    assert!(status.success() && !log.contains("drain timeout"), "{log}");
    assert!(begin.elapsed() < Duration::from_secs(5), "{log}");
}

#[tokio::test]
async fn tls_on_a_unix_socket() {
    let (upstream, ca) = (simulator().await, Authority::new("ca"));
    let folder = TlsFolder::new("unix", &ca.issue(&["localhost"]), &ca);
    let listen = format!("--listen=unix:{}/gateway.sock", folder.path().display());
    let gateway = start(&upstream, &folder.mtls(), &[&listen]).await;
    let path = gateway.listen.strip_prefix("unix:").unwrap();
    let client = ca.client(Some(&ca.issue(&[LISTED])));
    let stream = UnixStream::connect(path).await.unwrap();
    let stream = handshake(stream, client).await.unwrap();
    let answer = Client::over(stream).await.unwrap().create().await;
    assert_eq!(answer.unwrap().code(), Code::Ok);
}

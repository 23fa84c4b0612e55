//! TLS, with certificates of the openssl command.

use std::{fs, path::Path, process::Command, sync::Arc};

use sha2::{Digest, Sha256};
use stave_streaming::{Config, Error, Server, Streams, TlsFiles};
use tempfile::TempDir;
use tokio::{
    net::TcpStream,
    time::{Duration, sleep, timeout},
};
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{
        ClientConfig, RootCertStore,
        crypto::aws_lc_rs,
        pki_types::{CertificateDer, ServerName, pem::PemObject as _},
    },
};
use tokio_tungstenite::tungstenite::{Message, client::IntoClientRequest as _};

use crate::{
    backend::{Running, Shell, serve_config},
    client::{Client, LIMIT, request, split},
};

const IN_OUT: Streams = Streams { stdin: true, stdout: true, stderr: false, tty: false };
const V4: &str = "v4.channel.k8s.io";
/// Longer than the server waits between two looks at the files.
const LOOK: Duration = Duration::from_millis(3200);

/// Makes `NAME.crt` and `NAME.key`: a self-signed certificate for 127.0.0.1.
fn certificate(dir: &Path, name: &str) -> CertificateDer<'static> {
    let file = |suffix: &str| dir.join(format!("{name}.{suffix}"));
    let config = "[req]\ndistinguished_name = dn\nx509_extensions = v3\nprompt = no\n[dn]\nCN = test\n\
                  [v3]\nbasicConstraints = critical,CA:FALSE\nsubjectAltName = IP:127.0.0.1\n";
    fs::write(file("cnf"), config).unwrap();
    let made = Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "2",
        ])
        .arg("-config")
        .arg(file("cnf"))
        .arg("-out")
        .arg(file("crt"))
        .arg("-keyout")
        .arg(file("key"))
        .output()
        .expect("these tests need the openssl command");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    CertificateDer::from_pem_file(file("crt")).unwrap()
}

fn files(dir: &Path, name: &str) -> TlsFiles {
    TlsFiles { certificate: dir.join(format!("{name}.crt")), key: dir.join(format!("{name}.key")) }
}

fn config(tls: TlsFiles) -> Config {
    Config { tls: Some(tls), ..Config::new([127, 0, 0, 1].into(), 0) }
}

/// A server with the certificate `used`, which is in the answer.
async fn serve() -> (TempDir, CertificateDer<'static>, Running) {
    let dir = tempfile::tempdir().unwrap();
    let used = certificate(dir.path(), "used");
    let running = serve_config(config(files(dir.path(), "used"))).await;
    (dir, used, running)
}

/// Connects as a client that trusts `root` alone.
async fn connect(url: &str, root: &CertificateDer<'static>) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(root.clone()).unwrap();
    let mut config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    // As Go's clients of an upgrade.
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let stream = TcpStream::connect(split(url).0).await.unwrap();
    let name = ServerName::try_from("127.0.0.1").unwrap();
    timeout(LIMIT, TlsConnector::from(Arc::new(config)).connect(name, stream)).await.unwrap()
}

#[tokio::test]
async fn handshake_with_the_certificate_alone() {
    let (dir, used, running) = serve().await;
    let url = running.server.exec(Shell::new("true"), IN_OUT).unwrap();
    assert!(url.starts_with("https://127.0.0.1:"), "{url}");
    let stream = connect(&url, &used).await.unwrap();
    assert_eq!(stream.get_ref().1.peer_certificates().unwrap(), std::slice::from_ref(&used));
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
    assert_eq!(told(&running).await, used);
    let other = certificate(dir.path(), "other");
    assert!(
        connect(&url, &other).await.is_err(),
        "the client must refuse a certificate that it doesn't trust"
    );
}

/// The certificate that the server says it has.
async fn told(running: &Running) -> CertificateDer<'static> {
    let pem = running.server.certificate().await.unwrap();
    assert!(pem.lines().all(|line| line.len() <= 64), "{pem}");
    CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()
}

#[tokio::test]
async fn plain_http_is_not_answered() {
    let (_dir, _, running) = serve().await;
    let url = running.server.exec(Shell::new("true"), IN_OUT).unwrap();
    let answer = tokio::spawn(async move { request("GET", &url, &[]).await.0 }).await;
    assert!(answer.is_err(), "{answer:?}");
}

/// More than TLS and the sockets buffer, in both directions at once.
#[tokio::test]
async fn exec_over_spdy() {
    let (_dir, used, running) = serve().await;
    let url = running.server.exec(Shell::new("cat; exit 3"), IN_OUT).unwrap();
    let mut client = Client::connect_on(connect(&url, &used).await.unwrap(), &url, V4).await;
    let ids = client.open_command("eio").await;
    let (mut sent, mut got) = (Sha256::new(), Sha256::new());
    let mut length = 0;
    for round in 0..256u32 {
        let chunk: Vec<u8> = (0..16384u32).map(|at| (at.wrapping_mul(round + 7) >> 3) as u8).collect();
        sent.update(&chunk);
        client.data(ids[&'i'], &chunk).await;
        // What is sent comes back, before more is sent.
        while length < 16384 * (round as usize + 1) {
            if let stave_streaming::spdy::Frame::Data { bytes, .. } = client.next().await.unwrap() {
                length += bytes.len();
                got.update(&bytes);
            }
        }
    }
    client.fin(ids[&'i']).await;
    let (rest, _, error) = client.finish(&ids).await;
    assert!(rest.is_empty());
    assert_eq!(sent.finalize(), got.finalize());
    assert!(error.contains("\"message\":\"3\""), "{error}");
}

#[tokio::test]
async fn exec_over_websocket() {
    use futures::{SinkExt as _, StreamExt as _};
    let (_dir, used, running) = serve().await;
    let url = running.server.exec(Shell::new("cat"), IN_OUT).unwrap();
    let stream = connect(&url, &used).await.unwrap();
    let mut request =
        format!("wss://{}", url.strip_prefix("https://").unwrap()).into_client_request().unwrap();
    request.headers_mut().insert("Sec-WebSocket-Protocol", "v5.channel.k8s.io".parse().unwrap());
    let (mut socket, _) = tokio_tungstenite::client_async(request, stream).await.unwrap();
    socket.send(Message::binary(b"\0hello".to_vec())).await.unwrap();
    socket.send(Message::binary(vec![255, 0])).await.unwrap();
    let (mut out, mut status) = (Vec::new(), Vec::new());
    while let Some(Ok(message)) = timeout(LIMIT, socket.next()).await.unwrap() {
        if let Message::Binary(bytes) = message {
            match bytes[0] {
                1 => out.extend_from_slice(&bytes[1..]),
                3 => status.extend_from_slice(&bytes[1..]),
                _ => {}
            }
        }
    }
    assert_eq!(out, b"hello");
    assert!(String::from_utf8(status).unwrap().contains("Success"));
}

/// The process ends with a client that leaves.
#[tokio::test]
async fn a_client_that_vanishes() {
    let (_dir, used, running) = serve().await;
    let shell = Shell::new("sleep 1000");
    let group = shell.group();
    let url = running.server.exec(shell, IN_OUT).unwrap();
    let mut client = Client::connect_on(connect(&url, &used).await.unwrap(), &url, V4).await;
    client.open_command("eio").await;
    while !group.started() {
        sleep(Duration::from_millis(5)).await;
    }
    drop(client);
    group.gone().await;
}

#[tokio::test]
async fn new_certificate_and_broken_ones() {
    let (dir, used, running) = serve().await;
    let dir = dir.path();
    let url = running.server.base_url().to_owned() + "/";
    let copy =
        |from: &str| fs::copy(dir.join(from), dir.join(format!("used.{}", &from[from.len() - 3..]))).unwrap();
    let other = certificate(dir, "other");
    connect(&url, &used).await.unwrap();
    // A key that isn't the certificate's: the old pair stays.
    copy("other.key");
    sleep(LOOK).await;
    connect(&url, &used).await.unwrap();
    // Nor do garbage and missing files change anything.
    fs::write(dir.join("used.crt"), "garbage").unwrap();
    fs::remove_file(dir.join("used.key")).unwrap();
    sleep(LOOK).await;
    connect(&url, &used).await.unwrap();
    // The new pair is whole.
    copy("other.crt");
    copy("other.key");
    sleep(LOOK).await;
    assert_eq!(told(&running).await, other);
    connect(&url, &other).await.unwrap();
    assert!(connect(&url, &used).await.is_err(), "the old certificate is still in use");
}

#[tokio::test]
async fn broken_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    certificate(dir, "good");
    certificate(dir, "other");
    let good = files(dir, "good");
    fs::write(dir.join("empty.crt"), "").unwrap();
    fs::write(dir.join("half.key"), &fs::read(&good.key).unwrap()[..60]).unwrap();
    fs::write(dir.join("large.crt"), vec![b'x'; (1 << 20) + 1]).unwrap();
    let der = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    fs::write(dir.join("der.crt"), der).unwrap();
    nix::unistd::mkfifo(&dir.join("fifo.crt"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    for (certificate, key, named, reason) in [
        ("missing.crt", "good.key", "missing.crt", "No such file"),
        ("empty.crt", "good.key", "empty.crt", "no certificate"),
        ("large.crt", "good.key", "large.crt", "larger than"),
        ("der.crt", "good.key", "der.crt", "invalid"),
        ("fifo.crt", "good.key", "fifo.crt", "no regular file"),
        (".", "good.key", "", "no regular file"),
        ("good.crt", "missing.key", "missing.key", "No such file"),
        ("good.crt", "half.key", "half.key", "private key"),
        ("good.crt", "good.crt", "good.crt", "private key"),
        ("good.crt", "other.key", "other.key", "not the key of the certificate in"),
    ] {
        let tls = TlsFiles { certificate: dir.join(certificate), key: dir.join(key) };
        match Server::bind(config(tls)).await.map(|_| ()) {
            Err(Error::Tls(error)) => {
                assert_eq!(error.path, dir.join(if named.is_empty() { "." } else { named }));
                assert!(error.reason.contains(reason), "{certificate} {key}: {error}");
            }
            other => panic!("{certificate} {key}: {other:?}"),
        }
    }
    Server::bind(config(good)).await.unwrap();
}

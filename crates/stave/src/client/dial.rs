//! The connection to the daemon's streaming server: TCP, or TLS with the very certificate that the daemon names over its socket.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use stave_cri_proto::v1::StatusRequest;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject as _},
};

use super::connection::{Client, plain};

/// For a connection and its handshake; the daemon is on this machine, or near.
const LIMIT: Duration = Duration::from_secs(30);

/// A connection, whatever carries it.
pub(super) trait Transport: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Transport for T {}

/// What a URL of the streaming server says. The path has a token, which is a secret: it is in no message.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Location<'a> {
    tls: bool,
    /// `ADDRESS:PORT`
    pub(super) authority: &'a str,
    /// Begins with a slash.
    pub(super) path: &'a str,
}

impl<'a> Location<'a> {
    pub(super) fn of(url: &'a str) -> anyhow::Result<Self> {
        let (scheme, rest) = url.split_once("://").context("the daemon's answer is no URL")?;
        let tls = match scheme {
            "http" => false,
            "https" => true,
            _ => bail!("the daemon's streaming server speaks {scheme:?}, which this client doesn't"),
        };
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        Ok(Self { tls, authority, path: if path.is_empty() { "/" } else { path } })
    }
}

/// Connects to a URL of the streaming server.
pub(super) async fn dial(client: &mut Client, location: &Location<'_>) -> anyhow::Result<Box<dyn Transport>> {
    let context = || format!("the daemon's streaming server {}", location.authority);
    if !location.tls {
        return Ok(Box::new(tcp(location).await.with_context(context)?));
    }
    let mut again = true;
    loop {
        let certificate = certificate(client).await?;
        match Box::pin(handshake(location, certificate)).await {
            // It was exchanged in between.
            Err(error) if again && is_other_certificate(&error) => again = false,
            result => return result.with_context(context),
        }
    }
}

async fn tcp(location: &Location<'_>) -> anyhow::Result<TcpStream> {
    let tcp =
        tokio::time::timeout(LIMIT, TcpStream::connect(location.authority)).await.context("no answer")??;
    tcp.set_nodelay(true)?;
    Ok(tcp)
}

async fn handshake(
    location: &Location<'_>,
    certificate: CertificateDer<'static>,
) -> anyhow::Result<Box<dyn Transport>> {
    let provider = aws_lc_rs::default_provider();
    let algorithms = provider.signature_verification_algorithms;
    let mut config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Pinned { certificate, algorithms }))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let host = location.authority.rsplit_once(':').map_or(location.authority, |(host, _)| host);
    let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned())?;
    let tcp = tcp(location).await?;
    let connecting = TlsConnector::from(Arc::new(config)).connect(name, tcp);
    Ok(Box::new(tokio::time::timeout(LIMIT, connecting).await.context("no TLS handshake")??))
}

/// That of the streaming server, from the daemon itself: its socket belongs to root alone.
async fn certificate(client: &mut Client) -> anyhow::Result<CertificateDer<'static>> {
    let answer = client.runtime.status(StatusRequest { verbose: true }).await.map_err(plain)?.into_inner();
    let known: serde_json::Value =
        answer.info.get("streaming").and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
    let pem = known["certificate"].as_str().context("the daemon does not say which certificate it has")?;
    CertificateDer::from_pem_slice(pem.as_bytes()).context("the daemon's certificate")
}

fn is_other_certificate(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<std::io::Error>().and_then(|error| error.get_ref());
    let error = error.and_then(|error| error.downcast_ref::<Error>());
    matches!(error, Some(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)))
}

/// Accepts one certificate: who signed it, for which name and until when is the business of those who don't know it.
#[derive(Debug)]
struct Pinned {
    certificate: CertificateDer<'static>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if *end_entity == self.certificate {
            return Ok(ServerCertVerified::assertion());
        }
        Err(CertificateError::ApplicationVerificationFailure.into())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations() {
        let location = Location { tls: false, authority: "[::1]:80", path: "/exec/x" };
        assert_eq!(Location::of("http://[::1]:80/exec/x").unwrap(), location);
        let location = Location { tls: true, authority: "127.0.0.1:80", path: "/" };
        assert_eq!(Location::of("https://127.0.0.1:80").unwrap(), location);
        for bad in ["ftp://127.0.0.1/exec/secret", "//127.0.0.1/exec/secret", ""] {
            let error = format!("{:#}", Location::of(bad).unwrap_err());
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn no_other_certificate_will_do() {
        let algorithms = aws_lc_rs::default_provider().signature_verification_algorithms;
        let pinned = Pinned { certificate: CertificateDer::from(vec![1, 2, 3]), algorithms };
        let name = ServerName::try_from("127.0.0.1").unwrap();
        let check = |bytes: &[u8]| {
            pinned.verify_server_cert(&CertificateDer::from(bytes), &[], &name, &[], UnixTime::now())
        };
        check(&[1, 2, 3]).unwrap();
        let error = std::io::Error::other(check(&[1, 2, 3, 4]).unwrap_err());
        assert!(is_other_certificate(&anyhow::Error::from(error)));
        assert!(!is_other_certificate(&anyhow::anyhow!("refused")));
    }
}

//! TLS: the certificate and its key, from files that may change.

use std::{
    fs::{self, File},
    io::Read as _,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        self, ServerConfig,
        crypto::aws_lc_rs,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    },
};
use tracing::{info, warn};

/// How often the files are looked at, at most.
const CHECK: Duration = Duration::from_secs(3);
/// Bytes of a file; a long chain has some 10 KiB.
const MAX_FILE: u64 = 1 << 20;

/// The files of the server's certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The certificate chain in PEM, the server's own certificate first.
    pub certificate: PathBuf,
    /// Its private key in PEM (PKCS #8, PKCS #1 or SEC 1).
    pub key: PathBuf,
}

/// A file of [`TlsFiles`] that can't be used.
#[derive(Debug, thiserror::Error)]
#[error("TLS of the streaming server: {}: {reason}", path.display())]
pub struct TlsError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub reason: String,
}

/// Tells a file from its successor: change time in seconds and nanoseconds, inode, size. `None` if it isn't there.
type Stamp = Option<(i64, i64, u64, u64)>;

struct Current {
    config: Arc<ServerConfig>,
    certificate: CertificateDer<'static>,
    stamps: [Stamp; 2],
    checked: Instant,
}

/// The pair in use.
pub(crate) struct Tls {
    files: TlsFiles,
    check: Duration,
    current: Mutex<Current>,
}

impl Tls {
    pub(crate) fn load(files: TlsFiles) -> Result<Self, TlsError> {
        Self::load_with(files, CHECK)
    }

    fn load_with(files: TlsFiles, check: Duration) -> Result<Self, TlsError> {
        // Before reading: a change meanwhile is then seen at the next look.
        let stamps = files.stamps();
        let (config, certificate) = files.read()?;
        let current = Mutex::new(Current { config, certificate, stamps, checked: Instant::now() });
        Ok(Self { files, check, current })
    }

    /// For a new connection. Looks at the files now and then, and takes a new pair over; a broken one is logged once
    /// and the old one stays. Blocks.
    pub(crate) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.current().config.clone())
    }

    /// The server's own certificate as PEM: what the next client gets, unless the files change first. Blocks.
    pub(crate) fn certificate(&self) -> String {
        let base64 = STANDARD.encode(&self.current().certificate);
        // RFC 7468: lines of 64 characters.
        let mut pem = "-----BEGIN CERTIFICATE-----\n".to_owned();
        for line in base64.as_bytes().chunks(64) {
            pem.extend(line.iter().map(|byte| char::from(*byte)));
            pem.push('\n');
        }
        pem + "-----END CERTIFICATE-----\n"
    }

    fn current(&self) -> MutexGuard<'_, Current> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.checked.elapsed() >= self.check {
            current.checked = Instant::now();
            let stamps = self.files.stamps();
            if stamps != current.stamps {
                current.stamps = stamps;
                let certificate = self.files.certificate.display();
                match self.files.read() {
                    Ok((config, leaf)) => {
                        (current.config, current.certificate) = (config, leaf);
                        info!(%certificate, "streaming server: new certificate");
                    }
                    // Also between the writes of the two files; the second write changes the stamps again.
                    Err(error) => {
                        warn!(%certificate, %error, "the old certificate stays in use");
                    }
                }
            }
        }
        current
    }
}

impl TlsFiles {
    fn stamps(&self) -> [Stamp; 2] {
        [&self.certificate, &self.key].map(|path| {
            // Follows links: a mounted Secret is exchanged by its link.
            let file = fs::metadata(path).ok()?;
            // The change time moves with the modification time, and where a tool sets that one back.
            Some((file.ctime(), file.ctime_nsec(), file.ino(), file.size()))
        })
    }

    fn read(&self) -> Result<(Arc<ServerConfig>, CertificateDer<'static>), TlsError> {
        let error = |path: &Path, reason: String| TlsError { path: path.to_owned(), reason };
        let pem = read(&self.certificate)?;
        let chain = CertificateDer::pem_slice_iter(&pem)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|reason| error(&self.certificate, format!("no PEM: {reason}")))?;
        let Some(leaf) = chain.first().cloned() else {
            return Err(error(&self.certificate, "has no certificate in PEM".to_owned()));
        };
        let key = PrivateKeyDer::from_pem_slice(&read(&self.key)?)
            .map_err(|reason| error(&self.key, format!("no private key in PEM: {reason}")))?;
        let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|reason| error(&self.certificate, reason.to_string()))?
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .map_err(|reason| match reason {
                rustls::Error::InconsistentKeys(_) => error(
                    &self.key,
                    format!("is not the key of the certificate in {}", self.certificate.display()),
                ),
                rustls::Error::InvalidCertificate(_) => error(&self.certificate, reason.to_string()),
                reason => error(&self.key, reason.to_string()),
            })?;
        // The upgrades are of HTTP/1.1; a client that could do HTTP/2 as well shall not choose it.
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok((Arc::new(config), leaf))
    }
}

/// A regular file of at most [`MAX_FILE`] bytes.
fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    let error = |reason: String| TlsError { path: path.to_owned(), reason };
    // A FIFO would block at its opening.
    let kind = fs::metadata(path).map_err(|source| error(source.to_string()))?;
    if !kind.is_file() {
        return Err(error("is no regular file".to_owned()));
    }
    let file = File::open(path).map_err(|source| error(source.to_string()))?;
    let mut bytes = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(|source| error(source.to_string()))?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(error(format!("is larger than {MAX_FILE} bytes")));
    }
    Ok(bytes)
}

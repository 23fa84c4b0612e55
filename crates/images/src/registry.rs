//! Conversation with one host.
//!
//! oci-client does the authentication. The downloads are our own requests: oci-client reads manifests
//! and the bodies of errors into memory whatever their size, and can't send headers of hosts.toml.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use oci_distribution::client::{Certificate, CertificateEncoding, ClientConfig, ClientProtocol};
use oci_distribution::errors::OciDistributionError;
use oci_distribution::secrets::RegistryAuth;
use oci_distribution::{Reference as OciReference, RegistryOperation};
use reqwest::header::{
    ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RANGE,
    WWW_AUTHENTICATE,
};
use reqwest::{Response, StatusCode};
use stave_layers::Digest;
use tokio::sync::Mutex;
use tokio::time::timeout;

use crate::hosts::Host;
use crate::{Auth, ErrorKind, ImageError, Reference};

/// How long to wait for a registry, and how often.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Patience {
    /// To connect.
    pub connect: Duration,
    /// For the headers of an answer, and for a whole login.
    pub response: Duration,
    /// A download that brings fewer than `stall_bytes` in this time is given up.
    pub stall: Duration,
    /// See `stall`.
    pub stall_bytes: u64,
    /// Tries with one host before the next one has its turn.
    pub attempts: u32,
    /// Before the second try; doubled before each further one.
    pub backoff: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Patience {
            connect: Duration::from_secs(10),
            response: Duration::from_secs(30),
            stall: Duration::from_secs(30),
            stall_bytes: 64 << 10,
            attempts: 3,
            backoff: Duration::from_millis(300),
        }
    }
}

/// Bytes of an error's body that are read for the message.
const MAX_ERROR_BODY: usize = 4 << 10;
const USER_AGENT: &str = concat!("stave/", env!("CARGO_PKG_VERSION"));

/// A host, set up for one repository and one set of credentials.
pub(crate) struct Registry {
    host: Host,
    http: reqwest::Client,
    login: oci_distribution::Client,
    credentials: RegistryAuth,
    repository: String,
    patience: Arc<Patience>,
    /// The `Authorization` in use; `None` before the first login.
    authorization: Mutex<Option<Option<HeaderValue>>>,
}

fn unavailable(what: impl Into<String>) -> ImageError {
    ImageError::new(ErrorKind::RegistryUnavailable, what)
}

/// All causes of an error in one line: those of reqwest hide the one that counts.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

impl Registry {
    pub(crate) fn new(
        host: Host,
        reference: &Reference,
        auth: Option<&Auth>,
        patience: Arc<Patience>,
    ) -> Result<Registry, ImageError> {
        let credentials = match auth {
            Some(auth) => auth.for_host(&host, reference.domain())?,
            None => RegistryAuth::Anonymous,
        };
        let fail = |what: String| ImageError::new(ErrorKind::Configuration, format!("{}: {what}", host.url));
        let mut http = reqwest::Client::builder()
            .user_agent(USER_AGENT)
            .connect_timeout(patience.connect)
            .tls_danger_accept_invalid_certs(host.skip_verify)
            .redirect(reqwest::redirect::Policy::custom(redirect))
            .default_headers(headers(&host)?);
        let mut login = ClientConfig {
            protocol: if host.url.scheme() == "http" { ClientProtocol::Http } else { ClientProtocol::Https },
            accept_invalid_certificates: host.skip_verify,
            connect_timeout: Some(patience.connect),
            read_timeout: Some(patience.response),
            user_agent: USER_AGENT,
            ..ClientConfig::default()
        };
        for path in &host.ca {
            let data = std::fs::read(path).map_err(|e| fail(format!("ca {}: {e}", path.display())))?;
            let certificates = reqwest::Certificate::from_pem_bundle(&data)
                .map_err(|e| fail(format!("ca {}: {}", path.display(), causes(&e))))?;
            http = http.tls_certs_merge(certificates);
            login.extra_root_certificates.push(Certificate { encoding: CertificateEncoding::Pem, data });
        }
        let http = http.build().map_err(|e| fail(causes(&e)))?;
        let login = oci_distribution::Client::try_from(login).map_err(|e| fail(causes(&e)))?;
        let repository = reference.path().to_owned();
        Ok(Registry { host, http, login, credentials, repository, patience, authorization: Mutex::default() })
    }

    pub(crate) fn host(&self) -> &Host {
        &self.host
    }

    /// Downloads a small document, at most `max` bytes, and its `Content-Type`.
    pub(crate) async fn document(
        &self,
        kind: &str,
        what: &str,
        accept: &str,
        max: u64,
    ) -> Result<(Vec<u8>, Option<String>), ImageError> {
        let mut response = self.get(kind, what, accept, 0).await?;
        let url = response.url().to_string();
        let too_large =
            || ImageError::new(ErrorKind::InvalidImage, format!("{url}: larger than {max} bytes"));
        if response.content_length().is_some_and(|length| length > max) {
            return Err(too_large());
        }
        let content_type =
            response.headers().get(CONTENT_TYPE).and_then(|v| v.to_str().ok()).map(str::to_owned);
        let mut body = Vec::new();
        let mut watch = Watch::new(&self.patience);
        while let Some(chunk) = watch.chunk(&mut response).await? {
            if (body.len() + chunk.len()) as u64 > max {
                return Err(too_large());
            }
            body.extend_from_slice(&chunk);
        }
        Ok((body, content_type))
    }

    /// Begins to download a blob at `offset`.
    pub(crate) async fn blob(&self, digest: &Digest, offset: u64) -> Result<Download<'_>, ImageError> {
        let response = self.get("blobs", &digest.to_string(), "*/*", offset).await?;
        // A server may ignore the range and send all of it.
        let skip = if response.status() == StatusCode::PARTIAL_CONTENT { 0 } else { offset };
        Ok(Download { response, watch: Watch::new(&self.patience), skip })
    }

    async fn get(&self, kind: &str, what: &str, accept: &str, offset: u64) -> Result<Response, ImageError> {
        let url = self.host.endpoint(&self.repository, kind, what);
        let mut relogin = true;
        loop {
            let mut request = self.http.get(&url).header(ACCEPT, accept).header(ACCEPT_ENCODING, "identity");
            let authorization = self.authorize().await.map_err(|e| e.context(&self.host.url))?;
            let had_token = authorization.is_some();
            if let Some(value) = authorization {
                request = request.header(AUTHORIZATION, value);
            }
            if offset > 0 {
                request = request.header(RANGE, format!("bytes={offset}-"));
            }
            let response = match timeout(self.patience.response, request.send()).await {
                Err(_) => {
                    return Err(unavailable(format!("{url}: no answer in {:?}", self.patience.response)));
                }
                Ok(Err(e)) => return Err(unavailable(causes(&e))),
                Ok(Ok(response)) => response,
            };
            let status = response.status();
            if matches!(status, StatusCode::OK) || (offset > 0 && status == StatusCode::PARTIAL_CONTENT) {
                return Ok(response);
            }
            if status == StatusCode::UNAUTHORIZED && relogin {
                relogin = false;
                if self.answer(&response, had_token).await {
                    continue;
                }
            }
            return Err(self.refusal(response, &url).await);
        }
    }

    /// The `Authorization` to send; logs in on first use.
    async fn authorize(&self) -> Result<Option<HeaderValue>, ImageError> {
        let mut authorization = self.authorization.lock().await;
        if let Some(value) = authorization.as_ref() {
            return Ok(value.clone());
        }
        let tag = "latest".to_owned();
        let image = OciReference::with_tag(self.host.authority(), self.repository.clone(), tag);
        let login = self.login.auth(&image, &self.credentials, RegistryOperation::Pull);
        let token = match timeout(self.patience.response, login).await {
            Err(_) => return Err(unavailable(format!("no login in {:?}", self.patience.response))),
            Ok(Ok(token)) => token,
            Ok(Err(OciDistributionError::AuthenticationFailure(reason))) => {
                let reason: String = reason.chars().take(256).collect();
                return Err(ImageError::new(ErrorKind::Unauthorized, format!("login failed: {reason}")));
            }
            Ok(Err(e)) => return Err(unavailable(causes(&e))),
        };
        let value = match token {
            None => None,
            Some(token) => {
                let mut value = HeaderValue::from_str(&format!("Bearer {token}"))
                    .map_err(|_| unavailable("the token that it gave is malformed"))?;
                value.set_sensitive(true);
                Some(value)
            }
        };
        *authorization = Some(value.clone());
        Ok(value)
    }

    /// Prepares a second try after a 401: a new token for one that ran out, or the password where the
    /// host asks for it. `false` if there is nothing to try.
    async fn answer(&self, response: &Response, had_token: bool) -> bool {
        let mut authorization = self.authorization.lock().await;
        if had_token {
            *authorization = None;
            return true;
        }
        let asks_basic = response
            .headers()
            .get_all(WWW_AUTHENTICATE)
            .iter()
            .any(|v| v.as_bytes().get(..5).is_some_and(|scheme| scheme.eq_ignore_ascii_case(b"basic")));
        let RegistryAuth::Basic(user, password) = &self.credentials else { return false };
        if !asks_basic {
            return false;
        }
        // reqwest encodes it; the header is taken from a request that is never sent.
        let built = self.http.get(self.host.url.clone()).basic_auth(user, Some(password)).build();
        match built.ok().and_then(|request| request.headers().get(AUTHORIZATION).cloned()) {
            Some(value) => {
                *authorization = Some(Some(value));
                true
            }
            None => false,
        }
    }

    async fn refusal(&self, mut response: Response, url: &str) -> ImageError {
        let status = response.status();
        let mut body = Vec::new();
        let read = async {
            while body.len() < MAX_ERROR_BODY {
                match response.chunk().await {
                    Ok(Some(chunk)) => {
                        body.extend_from_slice(&chunk[..chunk.len().min(MAX_ERROR_BODY - body.len())])
                    }
                    _ => break,
                }
            }
        };
        // A body that does not come is no reason to keep the status back.
        let _ = timeout(Duration::from_secs(2), read).await;
        #[derive(serde::Deserialize)]
        struct Errors {
            errors: Vec<OneError>,
        }
        #[derive(serde::Deserialize)]
        struct OneError {
            code: Option<String>,
            message: Option<String>,
        }
        let reason = match serde_json::from_slice::<Errors>(&body) {
            Ok(Errors { errors }) => errors
                .iter()
                .map(|e| {
                    format!("{} {}", e.code.as_deref().unwrap_or(""), e.message.as_deref().unwrap_or(""))
                })
                .collect::<Vec<_>>()
                .join("; "),
            Err(_) => String::new(),
        };
        let kind = match status {
            StatusCode::NOT_FOUND => ErrorKind::NotFound,
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => ErrorKind::Unauthorized,
            _ => ErrorKind::RegistryUnavailable,
        };
        ImageError::new(kind, format!("{url}: {status} {reason}").trim_end())
    }
}

/// Redirects never lead from https to http. reqwest drops credentials when the host changes.
fn redirect(attempt: reqwest::redirect::Attempt<'_>) -> reqwest::redirect::Action {
    let secure = attempt.previous().iter().any(|url| url.scheme() == "https");
    if secure && attempt.url().scheme() != "https" {
        return attempt.error("redirected from https to http");
    }
    if attempt.previous().len() >= 10 {
        return attempt.error("more than 10 redirects");
    }
    attempt.follow()
}

fn headers(host: &Host) -> Result<HeaderMap, ImageError> {
    let mut headers = HeaderMap::new();
    for (name, value) in &host.headers {
        let bad = |_| {
            ImageError::new(ErrorKind::Configuration, format!("{}: header {name:?} is malformed", host.url))
        };
        let value = HeaderValue::from_str(value).map_err(|e| bad(e.to_string()))?;
        headers.append(HeaderName::from_bytes(name.as_bytes()).map_err(|e| bad(e.to_string()))?, value);
    }
    Ok(headers)
}

/// A blob on its way.
pub(crate) struct Download<'a> {
    response: Response,
    watch: Watch<'a>,
    skip: u64,
}

impl Download<'_> {
    /// The next bytes; `None` at the end.
    pub(crate) async fn chunk(&mut self) -> Result<Option<Bytes>, ImageError> {
        loop {
            let Some(mut chunk) = self.watch.chunk(&mut self.response).await? else { return Ok(None) };
            let skipped = self.skip.min(chunk.len() as u64);
            self.skip -= skipped;
            let rest = chunk.split_off(skipped as usize);
            if !rest.is_empty() {
                return Ok(Some(rest));
            }
        }
    }
}

/// Gives up on downloads that stall or trickle.
struct Watch<'a> {
    patience: &'a Patience,
    deadline: tokio::time::Instant,
    bytes: u64,
}

impl<'a> Watch<'a> {
    fn new(patience: &'a Patience) -> Self {
        Watch { patience, deadline: tokio::time::Instant::now() + patience.stall, bytes: 0 }
    }

    async fn chunk(&mut self, response: &mut Response) -> Result<Option<Bytes>, ImageError> {
        // The consumer's own time does not count: the clock runs while we wait for the network.
        let waited_from = tokio::time::Instant::now();
        let remaining = self.deadline.saturating_duration_since(waited_from);
        match timeout(remaining, response.chunk()).await {
            Err(_) => Err(unavailable(format!(
                "{}: stalled: {} bytes in {:?}",
                response.url(),
                self.bytes,
                self.patience.stall
            ))),
            Ok(Err(e)) => Err(unavailable(format!("{}: {}", response.url(), causes(&e)))),
            Ok(Ok(chunk)) => {
                self.bytes += chunk.as_ref().map_or(0, |c| c.len() as u64);
                if self.bytes >= self.patience.stall_bytes {
                    self.bytes = 0;
                    self.deadline = tokio::time::Instant::now() + self.patience.stall;
                }
                Ok(chunk)
            }
        }
    }

    /// Grants the time that was spent elsewhere.
    fn pause(&mut self, spent: Duration) {
        self.deadline += spent;
    }
}

impl Download<'_> {
    /// Tells that the bytes could not be taken for a while: no fault of the network.
    pub(crate) fn pause(&mut self, spent: Duration) {
        self.watch.pause(spent);
    }
}

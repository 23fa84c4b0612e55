//! The connection to the daemon's CRI socket, and its errors in plain words.

use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow};
use hyper_util::rt::TokioIo;
use stave_cri_proto::v1::image_service_client::ImageServiceClient;
use stave_cri_proto::v1::runtime_service_client::RuntimeServiceClient;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

/// Above the 16 MiB of an ExecSync answer and of what `crictl` and the kubelet receive.
const MAX_MESSAGE: usize = 40 << 20;

/// The two services of one daemon.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    pub(crate) runtime: RuntimeServiceClient<Channel>,
    pub(crate) images: ImageServiceClient<Channel>,
}

/// The socket that somebody named: as given, or `$STAVE_ADDRESS`.
pub(crate) fn named(given: Option<PathBuf>) -> Option<PathBuf> {
    let given = given.or_else(|| {
        std::env::var_os("STAVE_ADDRESS").filter(|address| !address.is_empty()).map(PathBuf::from)
    });
    given.map(|address| match address.to_str().and_then(|text| text.strip_prefix("unix://")) {
        Some(path) => PathBuf::from(path),
        None => address,
    })
}

/// The socket to talk to: [`named`], or where the configuration says.
pub(crate) fn address(given: Option<PathBuf>) -> anyhow::Result<PathBuf> {
    match named(given) {
        Some(address) => Ok(address),
        None => Ok(stave_config::load(None)
            .context(
                "where does the daemon listen? name its socket with --address, or mend the configuration",
            )?
            .listen),
    }
}

impl Client {
    /// Connects, and says plainly why not.
    pub(crate) async fn connect(address: &Path) -> anyhow::Result<Self> {
        // Tried once by hand: the error inside tonic's would be hard to tell.
        UnixStream::connect(address).await.map_err(|error| cannot_connect(address, &error))?;
        let path = address.to_owned();
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        // The authority must not be the socket's path: HTTP/2 refuses it.
        let channel = Endpoint::from_static("http://localhost")
            .connect_with_connector(connector)
            .await
            .with_context(|| format!("{}: whoever listens there does not speak CRI", address.display()))?;
        Ok(Self {
            runtime: RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE),
            images: ImageServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE),
        })
    }
}

fn cannot_connect(address: &Path, error: &io::Error) -> anyhow::Error {
    let path = address.display();
    match error.kind() {
        io::ErrorKind::NotFound => anyhow!(
            "no daemon at {path}: start it with `stave serve`, or name its socket with --address or STAVE_ADDRESS"
        ),
        io::ErrorKind::ConnectionRefused => {
            anyhow!("nobody listens on {path} any more: start the daemon with `stave serve`")
        }
        io::ErrorKind::PermissionDenied => anyhow!("{path}: permission denied: only root may use the daemon"),
        _ => anyhow!("{path}: {error}"),
    }
}

/// The daemon's refusal in its own words, which name the field and the value; and for the codes
/// whose meaning is not the daemon's, what happened.
pub(crate) fn plain(status: Status) -> anyhow::Error {
    let message = status.message().trim();
    match status.code() {
        Code::Unavailable => {
            anyhow!("the daemon does not answer: {}", or(message, "the connection was lost"))
        }
        Code::Cancelled => anyhow!("the call was cancelled: {}", or(message, "no reason given")),
        Code::Unimplemented => anyhow!("this daemon can't do that: {}", or(message, "not implemented")),
        Code::OutOfRange if message.contains("message length") => anyhow!("the answer is too big: {message}"),
        code => anyhow!("{}", or(message, code.description())),
    }
}

fn or<'a>(message: &'a str, fallback: &'a str) -> &'a str {
    if message.is_empty() { fallback } else { message }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_may_have_the_scheme_of_crictl() {
        assert_eq!(address(Some("unix:///run/x.sock".into())).unwrap(), Path::new("/run/x.sock"));
        assert_eq!(address(Some("/run/x.sock".into())).unwrap(), Path::new("/run/x.sock"));
    }

    #[tokio::test]
    async fn a_socket_that_is_not_there_is_told() {
        let error = Client::connect(Path::new("/nonexistent/stave.sock")).await.unwrap_err().to_string();
        assert!(error.contains("/nonexistent/stave.sock") && error.contains("stave serve"), "{error}");
    }

    #[test]
    fn refusals_are_one_plain_line() {
        assert_eq!(plain(Status::not_found("image \"x\": not found")).to_string(), "image \"x\": not found");
        assert_eq!(plain(Status::new(Code::Internal, "")).to_string(), Code::Internal.description());
    }
}

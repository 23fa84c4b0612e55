use std::path::{Path, PathBuf};

use hyper_util::rt::TokioIo;
use prost::Message;
use stave_cri_proto::v1::runtime_service_client::RuntimeServiceClient;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tower::service_fn;

/// A client made from the project's own definition of the CRI, for calls and fields that came after the version
/// that `k8s-cri` knows.
pub async fn newer_client(socket: &Path) -> RuntimeServiceClient<Channel> {
    let socket: PathBuf = socket.to_owned();
    let connector = service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(socket).await?)) }
    });
    let channel = Endpoint::from_static("http://localhost").connect_with_connector(connector).await;
    RuntimeServiceClient::new(channel.expect("a connection to the daemon"))
}

/// The same message in the other definition.
pub fn translate<To: Message + Default>(message: &impl Message) -> To {
    To::decode(message.encode_to_vec().as_slice()).expect("one wire format for both definitions")
}

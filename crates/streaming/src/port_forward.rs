//! Port-forward: connections of the client and TCP connections into the pod.

use std::{io, sync::Arc, time::Duration};

use bytes::{BufMut, Bytes, BytesMut};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    select,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use crate::{
    PortForwardSession, SessionError,
    backlog::Inbound,
    link::{Activity, CHUNK, Channel, Outbound},
};

/// How long a connection into the pod may take.
const CONNECT: Duration = Duration::from_secs(30);
/// Once one direction has ended: how long the other may be silent. TCP has no limit; but a client whose local peer has
/// gone altogether looks the same as one that has half-closed.
const HALF_CLOSED: Duration = Duration::from_secs(120);
/// How long what the client sent before it left may take to be delivered.
const LEFT_OVER: Duration = Duration::from_secs(5);

/// One connection of the client.
pub(crate) struct Forward {
    pub(crate) session: Arc<dyn PortForwardSession>,
    pub(crate) port: u16,
    pub(crate) data: Channel,
    pub(crate) error: Outbound,
    /// Cancelled when the client has gone.
    pub(crate) gone: CancellationToken,
}

/// What is told to the client on the error channel. Any byte there makes Kubernetes' client end all its connections,
/// so it is for what the user must know.
pub(crate) fn error_text(session: &dyn PortForwardSession, port: u16, error: &SessionError) -> Bytes {
    format!("error forwarding port {port} to pod {}, uid : {error}", session.pod()).into()
}

impl Forward {
    /// Connects and copies until both directions have ended.
    pub(crate) async fn run(self) {
        let Self { session, port, data: Channel { inbound, outbound, reset }, error, gone } = self;
        let left = async {
            select! {
                () = reset.cancelled() => {}
                () = gone.cancelled() => {}
            }
        };
        tokio::pin!(left);
        let connected = select! {
            connected = timeout(CONNECT, session.connect(port)) => connected,
            () = &mut left => {
                let _ = error.end().await;
                return;
            }
        };
        let connected =
            connected.unwrap_or_else(|_| Err(SessionError::new(format!("no answer in {CONNECT:?}"))));
        let stream = match connected {
            Ok(stream) => stream,
            Err(failure) => {
                let _ = error.write(error_text(session.as_ref(), port, &failure)).await;
                let _ = error.reset().await;
                let _ = outbound.reset().await;
                return;
            }
        };
        // Small messages of interactive protocols shall not wait for each other.
        let _ = stream.set_nodelay(true);
        copy(stream, inbound, &outbound, left).await;
        let _ = error.end().await;
    }
}

/// Carries bytes and half-closes both ways.
async fn copy(
    stream: TcpStream,
    inbound: Inbound,
    outbound: &Outbound,
    mut left: std::pin::Pin<&mut impl Future<Output = ()>>,
) {
    let (from_pod, to_pod) = stream.into_split();
    let activity = Activity::new();
    let upload = upload(inbound, to_pod, &activity);
    let download = download(from_pod, outbound, &activity);
    tokio::pin!(upload, download);
    let (mut uploading, mut downloading) = (true, true);
    while uploading || downloading {
        select! {
            () = &mut upload, if uploading => {
                uploading = false;
                activity.touch();
            }
            result = &mut download, if downloading => {
                downloading = false;
                activity.touch();
                let _ = match result {
                    Ok(()) => outbound.end().await,
                    // A connection that breaks is an end for the client; text would cost it all the others.
                    Err(_) => outbound.reset().await,
                };
            }
            () = &mut left => {
                if uploading {
                    let _ = timeout(LEFT_OVER, &mut upload).await;
                }
                return;
            }
            () = activity.idle(HALF_CLOSED), if uploading != downloading => {
                let _ = outbound.reset().await;
                return;
            }
        }
    }
}

/// Client to pod. Where the pod's side takes no more, what comes is discarded, as the backlog is dropped.
async fn upload(mut inbound: Inbound, mut to_pod: OwnedWriteHalf, activity: &Activity) {
    while let Some(bytes) = inbound.next().await {
        if to_pod.write_all(&bytes).await.is_err() {
            return;
        }
        activity.touch();
    }
    let _ = to_pod.shutdown().await;
}

/// Pod to client.
async fn download(mut from_pod: OwnedReadHalf, outbound: &Outbound, activity: &Activity) -> io::Result<()> {
    let mut buffer = BytesMut::new();
    loop {
        if buffer.capacity() < 4096 {
            buffer.reserve(CHUNK);
        }
        if from_pod.read_buf(&mut (&mut buffer).limit(CHUNK)).await? == 0 {
            return Ok(());
        }
        if outbound.write(buffer.split().freeze()).await.is_err() {
            return Ok(());
        }
        activity.touch();
    }
}

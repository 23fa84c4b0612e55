//! Port-forward over WebSocket: for port number i of the CRI request, data on channel 2i and errors on 2i + 1. One
//! connection a port.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{select, task::JoinSet, time::timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    PortForwardSession, Timeouts, negotiate::Encoding, port_forward::Forward, socket::Socket, websocket,
};

/// Ports of one request: their channels stay below the end of ASCII in the base64 form.
pub(crate) const MAX_PORTS: usize = 32;
/// How long connections may take to end by themselves once the client has gone.
const WIND_UP: Duration = Duration::from_secs(6);

/// Serves one client.
pub(crate) async fn run(
    socket: Socket,
    encoding: Encoding,
    session: Arc<dyn PortForwardSession>,
    ports: Vec<u16>,
    timeouts: Timeouts,
    stopping: CancellationToken,
) {
    let count = 2 * ports.len().min(MAX_PORTS) as u8;
    let (channels, link) = websocket::start(socket, encoding, false, count).await;
    let gone = CancellationToken::new();
    let mut forwards = JoinSet::new();
    let mut channels = channels.into_iter();
    for port in ports {
        let (Some(data), Some(error)) = (channels.next(), channels.next()) else { break };
        let error = error.outbound;
        let label = Bytes::copy_from_slice(&port.to_le_bytes());
        let (session, gone) = (session.clone(), gone.clone());
        forwards.spawn(async move {
            for output in [&data.outbound, &error] {
                if output.write(label.clone()).await.is_err() {
                    return;
                }
            }
            Forward { session, port, data, error, gone }.run().await;
        });
    }
    select! {
        () = async { while forwards.join_next().await.is_some() {} } => return link.finish(timeouts.close).await,
        () = link.gone() => {}
        () = link.idle(timeouts.idle) => return link.finish(Duration::ZERO).await,
        () = stopping.cancelled() => return link.finish(Duration::ZERO).await,
    }
    gone.cancel();
    let _ = timeout(WIND_UP, async { while forwards.join_next().await.is_some() {} }).await;
}

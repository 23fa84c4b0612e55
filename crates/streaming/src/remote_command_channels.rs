//! Exec and attach over WebSocket: five channels with fixed numbers.

use bytes::Bytes;

use crate::{
    Streams,
    link::{Channel, Link},
    negotiate::{Encoding, Version},
    remote_command::CommandChannels,
    socket::Socket,
    websocket,
};

/// Opens the channels of the CRI request; what comes on others is discarded. An empty message tells the client that it
/// is connected.
pub(crate) async fn open(
    socket: Socket,
    version: Version,
    encoding: Encoding,
    wanted: Streams,
) -> Option<(CommandChannels, Link)> {
    let (channels, link) = websocket::start(socket, encoding, version >= Version::V5, 5).await;
    let [stdin, stdout, stderr, error, resize] = <[Channel; 5]>::try_from(channels).ok()?;
    let channels = CommandChannels {
        version,
        error: error.outbound,
        stdin: wanted.stdin.then_some(stdin),
        stdout: wanted.stdout.then_some(stdout.outbound),
        stderr: wanted.stderr.then_some(stderr.outbound),
        resize: wanted.tty.then_some(resize),
    };
    let first = channels.stdout.as_ref().or(channels.stderr.as_ref()).unwrap_or(&channels.error);
    first.write(Bytes::new()).await.ok()?;
    Some((channels, link))
}

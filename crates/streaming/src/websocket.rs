//! The WebSocket transport: messages of numbered channels.

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::{BufMut, Bytes, BytesMut};
use futures::{
    SinkExt, StreamExt,
    stream::{SplitSink, SplitStream},
};
use tokio::{select, sync::mpsc};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        self, Message,
        protocol::{CloseFrame, Role, WebSocketConfig, frame::coding::CloseCode},
    },
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tracing::debug;

use crate::{
    backlog::{Budget, Feed},
    link::{Activity, Channel, GoneGuard, Link, Outbound, Outgoing, QUEUE},
    negotiate::Encoding,
    socket::{Hangup, Socket},
};

/// Bytes of a message from the client, all its frames together. Clients send some 32 KiB, but for simple ones that put
/// all their input into one message.
const MAX_MESSAGE: usize = 4 << 20;
/// Output that waits inside the WebSocket; small, so that a pong overtakes most of it.
const WRITE_BUFFER: usize = 64 * 1024;
/// The channel whose message says that another has ended.
const CLOSE_CHANNEL: u8 = 255;

/// Takes over a connection that is upgraded.
pub(crate) async fn accept(socket: Socket) -> WebSocketStream<Socket> {
    let config = WebSocketConfig::default()
        .read_buffer_size(64 * 1024)
        .write_buffer_size(WRITE_BUFFER)
        .max_write_buffer_size(8 * MAX_MESSAGE)
        .max_message_size(Some(MAX_MESSAGE))
        .max_frame_size(Some(MAX_MESSAGE));
    WebSocketStream::from_raw_socket(socket, Role::Server, Some(config)).await
}

/// Starts to serve `count` channels. `closes`: the protocol has messages that end a channel.
pub(crate) async fn start(
    socket: Socket,
    encoding: Encoding,
    closes: bool,
    count: u8,
) -> (Vec<Channel>, Link) {
    let hangup = socket.hangup();
    let (sink, source) = accept(socket).await.split();
    let (queue, outgoing) = mpsc::channel(QUEUE);
    let activity = Activity::new();
    let gone = CancellationToken::new();
    let budget = Budget::new();
    let (feeds, channels): (Vec<_>, Vec<_>) = (0..u32::from(count))
        .map(|channel| {
            let (feed, inbound) = budget.backlog();
            let outbound = Outbound::new(channel, queue.clone());
            (feed, Channel { inbound, outbound, reset: CancellationToken::new() })
        })
        .unzip();

    let guard = GoneGuard(gone.clone());
    let reader = Reader { source, hangup, encoding, closes, feeds, activity: activity.clone() };
    let reading = tokio::spawn(async move {
        let _guard = guard;
        reader.run().await;
    });
    let guard = GoneGuard(gone.clone());
    let writer = Writer { sink, encoding, activity: activity.clone() };
    let writing = tokio::spawn(async move {
        let _guard = guard;
        if let Err(error) = writer.run(outgoing).await {
            debug!(%error, "WebSocket is broken");
        }
    });
    let tasks = vec![AbortOnDropHandle::new(reading), AbortOnDropHandle::new(writing)];
    (channels, Link::new(gone, activity, queue, tasks))
}

struct Reader {
    source: SplitStream<WebSocketStream<Socket>>,
    hangup: Hangup,
    encoding: Encoding,
    closes: bool,
    feeds: Vec<Feed>,
    activity: Activity,
}

impl Reader {
    async fn run(mut self) {
        while let Some(message) = self.source.next().await {
            let payload = match message {
                Ok(Message::Binary(payload)) => payload,
                Ok(Message::Text(text)) => Bytes::from(text),
                Ok(_) => continue,
                Err(error) => {
                    debug!(%error, "WebSocket ended");
                    return;
                }
            };
            self.activity.touch();
            match parse(payload, self.encoding, self.closes) {
                Parsed::Data(channel, bytes) if !bytes.is_empty() => {
                    if let Some(feed) = self.feeds.get(usize::from(channel)) {
                        select! {
                            biased;
                            () = feed.push(bytes) => {}
                            () = self.hangup.wait() => return,
                        }
                    }
                }
                Parsed::Data(..) => {}
                Parsed::End(channel) => match self.feeds.get(usize::from(channel)) {
                    Some(feed) => feed.end(),
                    None => return,
                },
                Parsed::Bad => return,
            }
        }
    }
}

/// A message from the client.
#[derive(Debug, Eq, PartialEq)]
pub(crate) enum Parsed {
    Data(u8, Bytes),
    End(u8),
    Bad,
}

/// Takes a message apart.
pub(crate) fn parse(mut payload: Bytes, encoding: Encoding, closes: bool) -> Parsed {
    if payload.is_empty() {
        return Parsed::Data(0, Bytes::new());
    }
    let channel = payload.split_to(1)[0];
    match encoding {
        Encoding::Binary if closes && channel == CLOSE_CHANNEL => match payload[..] {
            [ended] => Parsed::End(ended),
            _ => Parsed::Bad,
        },
        Encoding::Binary => Parsed::Data(channel, payload),
        Encoding::Base64 => match (channel.checked_sub(b'0'), STANDARD.decode(&payload)) {
            (Some(channel), Ok(bytes)) => Parsed::Data(channel, bytes.into()),
            _ => Parsed::Bad,
        },
    }
}

struct Writer {
    sink: SplitSink<WebSocketStream<Socket>, Message>,
    encoding: Encoding,
    activity: Activity,
}

impl Writer {
    async fn run(mut self, mut outgoing: mpsc::Receiver<Outgoing>) -> Result<(), tungstenite::Error> {
        while let Some(item) = outgoing.recv().await {
            if !self.send(item).await? {
                return Ok(());
            }
            while let Ok(item) = outgoing.try_recv() {
                if !self.send(item).await? {
                    return Ok(());
                }
            }
            self.sink.flush().await?;
            self.activity.touch();
        }
        Ok(())
    }

    /// Answers whether the connection goes on.
    async fn send(&mut self, item: Outgoing) -> Result<bool, tungstenite::Error> {
        match item {
            Outgoing::Data { channel, bytes } => {
                self.sink.feed(message(channel as u8, &bytes, self.encoding)).await?;
            }
            Outgoing::End { .. } | Outgoing::Reset { .. } => {}
            // Any other code, or none, is an error to Kubernetes' client.
            Outgoing::Finished => {
                let close = CloseFrame { code: CloseCode::Normal, reason: Default::default() };
                self.sink.feed(Message::Close(Some(close))).await?;
            }
            Outgoing::Close => return Ok(false),
        }
        Ok(true)
    }
}

fn message(channel: u8, bytes: &[u8], encoding: Encoding) -> Message {
    match encoding {
        Encoding::Binary => {
            let mut payload = BytesMut::with_capacity(1 + bytes.len());
            payload.put_u8(channel);
            payload.put_slice(bytes);
            Message::Binary(payload.freeze())
        }
        Encoding::Base64 => {
            let mut text = String::with_capacity(2 + bytes.len() * 4 / 3 + 4);
            text.push(char::from(b'0' + channel));
            STANDARD.encode_string(bytes, &mut text);
            Message::text(text)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages() {
        let parse = |bytes: &'static [u8], encoding, closes| {
            super::parse(Bytes::from_static(bytes), encoding, closes)
        };
        let data = |channel, bytes: &'static [u8]| Parsed::Data(channel, Bytes::from_static(bytes));
        assert_eq!(parse(b"\x00hello", Encoding::Binary, true), data(0, b"hello"));
        assert_eq!(parse(b"\x04", Encoding::Binary, true), data(4, b""));
        assert_eq!(parse(b"\xff\x00", Encoding::Binary, true), Parsed::End(0));
        assert_eq!(parse(b"\xff\x00", Encoding::Binary, false), data(255, b"\0"));
        assert_eq!(parse(b"\xff", Encoding::Binary, true), Parsed::Bad);
        assert_eq!(parse(b"\xff\x00\x00", Encoding::Binary, true), Parsed::Bad);
        assert_eq!(parse(b"0aGVsbG8=", Encoding::Base64, false), data(0, b"hello"));
        assert_eq!(parse(b"0", Encoding::Base64, false), data(0, b""));
        assert_eq!(parse(b"0a", Encoding::Base64, false), Parsed::Bad);
        assert_eq!(parse(b"\x00aGVsbG8=", Encoding::Base64, false), Parsed::Bad);
        assert_eq!(message(1, b"hello", Encoding::Base64), Message::text("1aGVsbG8="));
        assert_eq!(message(3, b"x", Encoding::Binary), Message::binary(&b"\x03x"[..]));
    }
}

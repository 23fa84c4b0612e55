//! A small SPDY client.

use std::collections::HashMap;

use bytes::{Bytes, BytesMut};
use stave_streaming::spdy::{Decoder, Encoder, Frame, Headers};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    time::{Duration, timeout},
};

/// Longer than anything here takes.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// Splits a URL into address and path.
pub(crate) fn split(url: &str) -> (&str, &str) {
    let (_, rest) = url.split_once("://").unwrap();
    rest.split_at(rest.find('/').unwrap())
}

/// Sends a request; answers with the head, the first bytes after it and the connection.
pub(crate) async fn request(
    method: &str,
    url: &str,
    headers: &[(&str, &str)],
) -> (String, BytesMut, TcpStream) {
    let stream = TcpStream::connect(split(url).0).await.unwrap();
    stream.set_nodelay(true).unwrap();
    request_on(stream, method, url, headers).await
}

/// As [`request`], on a connection to the URL's server.
pub(crate) async fn request_on<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    method: &str,
    url: &str,
    headers: &[(&str, &str)],
) -> (String, BytesMut, S) {
    let (address, path) = split(url);
    let mut text = format!("{method} {path} HTTP/1.1\r\nHost: {address}\r\nContent-Length: 0\r\n");
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    text.push_str("\r\n");
    stream.write_all(text.as_bytes()).await.unwrap();
    stream.flush().await.unwrap();
    let mut buffer = BytesMut::new();
    loop {
        if let Some(end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
            let head = buffer.split_to(end + 4);
            return (String::from_utf8(head.to_vec()).unwrap(), buffer, stream);
        }
        assert_ne!(timeout(LIMIT, stream.read_buf(&mut buffer)).await.unwrap().unwrap(), 0, "{buffer:?}");
    }
}

pub(crate) struct Client<S = TcpStream> {
    stream: S,
    encoder: Encoder,
    decoder: Decoder,
    buffer: BytesMut,
    next_id: u32,
    early: Vec<Frame>,
    /// What may be sent on each stream, less what was: by those who keep to it.
    pub(crate) windows: HashMap<u32, i64>,
    /// `next` gives WINDOW_UPDATE of streams, and does not only count it.
    pub(crate) tells_windows: bool,
}

impl Client {
    pub(crate) async fn connect(url: &str, version: &str) -> Self {
        let stream = TcpStream::connect(split(url).0).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Self::connect_on(stream, url, version).await
    }

    /// Closing will break the connection.
    pub(crate) fn reset_on_close(&self) {
        rustix::net::sockopt::set_socket_linger(&self.stream, Some(Duration::ZERO)).unwrap();
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Client<S> {
    /// On a connection to the URL's server.
    pub(crate) async fn connect_on(stream: S, url: &str, version: &str) -> Self {
        let headers =
            [("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1"), ("X-Stream-Protocol-Version", version)];
        let (head, buffer, stream) = request_on(stream, "POST", url, &headers).await;
        assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
        let chosen = format!("x-stream-protocol-version: {}\r\n", version.split(',').next().unwrap());
        assert!(head.to_ascii_lowercase().contains(&chosen), "{head}");
        assert!(buffer.is_empty(), "nothing comes before the first frame");
        let (encoder, decoder) = Default::default();
        Self {
            stream,
            encoder,
            decoder,
            buffer,
            next_id: 1,
            early: Vec::new(),
            windows: HashMap::new(),
            tells_windows: false,
        }
    }

    pub(crate) async fn send(&mut self, frame: Frame) {
        let mut out = BytesMut::new();
        self.encoder.encode(&frame, &mut out).unwrap();
        timeout(LIMIT, self.stream.write_all(&out)).await.unwrap().unwrap();
        // TLS holds bytes back otherwise.
        timeout(LIMIT, self.stream.flush()).await.unwrap().unwrap();
    }

    pub(crate) async fn send_raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    /// The next frame; `None` at the end of the connection.
    pub(crate) async fn next(&mut self) -> Option<Frame> {
        if !self.early.is_empty() {
            return Some(self.early.remove(0));
        }
        self.receive().await
    }

    async fn receive(&mut self) -> Option<Frame> {
        loop {
            match self.decoder.decode(&mut self.buffer).unwrap() {
                Some(Frame::WindowUpdate { id, delta }) => {
                    *self.windows.entry(id).or_insert(64 << 10) += i64::from(delta);
                    if id != 0 && self.tells_windows {
                        return Some(Frame::WindowUpdate { id, delta });
                    }
                    continue;
                }
                Some(frame) => return Some(frame),
                None => {}
            }
            self.buffer.reserve(64 * 1024);
            match timeout(LIMIT, self.stream.read_buf(&mut self.buffer)).await.expect("no frame came") {
                Ok(0) | Err(_) => return None,
                Ok(_) => {}
            }
        }
    }

    /// Opens a stream without waiting.
    pub(crate) async fn syn(&mut self, headers: Headers, fin: bool) -> u32 {
        let id = self.next_id;
        self.next_id += 2;
        self.send(Frame::SynStream { id, fin, headers }).await;
        id
    }

    /// Opens a stream and waits for its answer, as Go does.
    pub(crate) async fn open(&mut self, headers: Headers, fin: bool) -> u32 {
        let id = self.syn(headers, fin).await;
        loop {
            match self.receive().await.expect("an answer") {
                Frame::SynReply { id: answered, .. } if answered == id => return id,
                Frame::Reset { id: reset, status } if reset == id => {
                    panic!("stream {id} was reset: {status}")
                }
                frame => self.early.push(frame),
            }
        }
    }

    /// Opens the streams of an exec: `e` error, `i` stdin, `o` stdout, `E` stderr, `r` resize.
    pub(crate) async fn open_command(&mut self, streams: &str) -> HashMap<char, u32> {
        let mut ids = HashMap::new();
        for stream in streams.chars() {
            let name = match stream {
                'e' => "error",
                'i' => "stdin",
                'o' => "stdout",
                'E' => "stderr",
                'r' => "resize",
                other => panic!("{other}"),
            };
            ids.insert(stream, self.open(Headers::from([("streamType", name)]), false).await);
        }
        ids
    }

    pub(crate) async fn data(&mut self, id: u32, bytes: &[u8]) {
        self.send(Frame::Data { id, fin: false, bytes: Bytes::copy_from_slice(bytes) }).await;
    }

    pub(crate) async fn fin(&mut self, id: u32) {
        self.send(Frame::Data { id, fin: true, bytes: Bytes::new() }).await;
    }

    /// Reads until each of `ids` has ended, by FIN or reset; answers with what came on each.
    pub(crate) async fn collect(&mut self, ids: &[u32]) -> HashMap<u32, Vec<u8>> {
        let mut open: Vec<_> = ids.to_vec();
        let mut got: HashMap<u32, Vec<u8>> = ids.iter().map(|id| (*id, Vec::new())).collect();
        while !open.is_empty() {
            match self.next().await.unwrap_or_else(|| panic!("the connection ended before streams {open:?}"))
            {
                Frame::Data { id, fin, bytes } => {
                    got.entry(id).or_default().extend_from_slice(&bytes);
                    if fin {
                        open.retain(|known| *known != id);
                    }
                }
                Frame::Reset { id, .. } => open.retain(|known| *known != id),
                _ => {}
            }
        }
        got
    }

    /// Everything of an exec: output, error output, the error stream.
    pub(crate) async fn finish(&mut self, ids: &HashMap<char, u32>) -> (Vec<u8>, Vec<u8>, String) {
        let wanted: Vec<_> = ['o', 'E', 'e'].iter().filter_map(|stream| ids.get(stream).copied()).collect();
        let mut got = self.collect(&wanted).await;
        let mut take = |stream| ids.get(&stream).and_then(|id| got.remove(id)).unwrap_or_default();
        (take('o'), take('E'), String::from_utf8(take('e')).unwrap())
    }
}

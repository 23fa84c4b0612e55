//! The client's connection after its upgrade: TCP, or TLS over it.

use std::{
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::server::TlsStream;

/// The TCP connection. Clones share it; only one reads and one writes.
#[derive(Clone, Debug)]
pub(crate) struct Tcp(Arc<TcpStream>);

impl Tcp {
    pub(crate) fn new(stream: TcpStream) -> Self {
        Self(Arc::new(stream))
    }
}

/// What carries a connection's bytes.
#[derive(Clone, Debug)]
enum Transport {
    Plain(Tcp),
    /// Both directions share TLS's state, which is locked for a poll and never longer.
    Tls(Tcp, Arc<Mutex<TlsStream<Tcp>>>),
}

/// A connection whose first bytes may have been read already. Writers share it; only the first reads.
#[derive(Debug)]
pub(crate) struct Socket {
    early: Bytes,
    transport: Transport,
}

impl Socket {
    /// Takes the connection back from the HTTP server.
    pub(crate) fn from_upgraded(upgraded: hyper::upgrade::Upgraded) -> io::Result<Self> {
        let upgraded = match upgraded.downcast::<TokioIo<TcpStream>>() {
            Ok(parts) => {
                let transport = Transport::Plain(Tcp::new(parts.io.into_inner()));
                return Ok(Self { early: parts.read_buf, transport });
            }
            Err(upgraded) => upgraded,
        };
        let parts = upgraded
            .downcast::<TokioIo<TlsStream<Tcp>>>()
            .map_err(|_| io::Error::other("the connection is neither TCP nor TLS"))?;
        let stream = parts.io.into_inner();
        let tcp = stream.get_ref().0.clone();
        Ok(Self { early: parts.read_buf, transport: Transport::Tls(tcp, Arc::new(Mutex::new(stream))) })
    }

    /// A second handle, to write with.
    pub(crate) fn writer(&self) -> Self {
        Self { early: Bytes::new(), transport: self.transport.clone() }
    }

    pub(crate) fn hangup(&self) -> Hangup {
        match &self.transport {
            Transport::Plain(tcp) | Transport::Tls(tcp, _) => Hangup(tcp.0.clone()),
        }
    }
}

/// Tells of a client that has gone while its input isn't read. An end that stands behind more input than our receive
/// buffer holds is only seen when the client's kernel gives up on sending it, after a minute or two.
#[derive(Clone)]
pub(crate) struct Hangup(Arc<TcpStream>);

impl Hangup {
    /// Resolves when the client has closed its side or the connection is broken.
    pub(crate) async fn wait(&self) {
        // EPOLLRDHUP counts as read-closed, and of the interests only PRIORITY comes with that but without "readable".
        // Nobody sends urgent data; where it does come, the connection counts as broken.
        let _ = self.0.ready(Interest::PRIORITY | Interest::ERROR).await;
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.early.is_empty() {
            let length = self.early.len().min(buf.remaining());
            buf.put_slice(&self.early[..length]);
            self.early.advance(length);
            return Poll::Ready(Ok(()));
        }
        match &mut self.transport {
            Transport::Plain(tcp) => Pin::new(tcp).poll_read(cx, buf),
            Transport::Tls(_, stream) => Pin::new(&mut *lock(stream)).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.transport {
            Transport::Plain(tcp) => Pin::new(tcp).poll_write_vectored(cx, bufs),
            Transport::Tls(_, stream) => Pin::new(&mut *lock(stream)).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.transport {
            Transport::Plain(tcp) => Pin::new(tcp).poll_flush(cx),
            Transport::Tls(_, stream) => Pin::new(&mut *lock(stream)).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.transport {
            Transport::Plain(tcp) => Pin::new(tcp).poll_shutdown(cx),
            // Says goodbye; TCP stays as it is, see below.
            Transport::Tls(_, stream) => Pin::new(&mut *lock(stream)).poll_shutdown(cx),
        }
    }
}

fn lock(stream: &Mutex<TlsStream<Tcp>>) -> MutexGuard<'_, TlsStream<Tcp>> {
    stream.lock().unwrap_or_else(PoisonError::into_inner)
}

impl AsyncRead for Tcp {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.0.poll_read_ready(cx))?;
            match self.0.try_read(buf.initialize_unfilled()) {
                Ok(length) => {
                    buf.advance(length);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for Tcp {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.0.poll_write_ready(cx))?;
            match self.0.try_write_vectored(bufs) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return Poll::Ready(result),
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The kubelet's proxy ends both directions when one does: TCP is never half-closed. Dropping closes.
        Poll::Ready(Ok(()))
    }
}

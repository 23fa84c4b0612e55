//! The client's TCP connection after its upgrade.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::TcpStream,
};

/// A connection whose first bytes may have been read already. Clones share it; only the first reads.
#[derive(Debug)]
pub(crate) struct Socket {
    early: Bytes,
    stream: Arc<TcpStream>,
}

impl Socket {
    /// Takes the connection back from the HTTP server.
    pub(crate) fn from_upgraded(upgraded: hyper::upgrade::Upgraded) -> io::Result<Self> {
        let parts = upgraded
            .downcast::<TokioIo<TcpStream>>()
            .map_err(|_| io::Error::other("the connection is not a TCP stream"))?;
        Ok(Self { early: parts.read_buf, stream: Arc::new(parts.io.into_inner()) })
    }

    /// A second handle, to write with.
    pub(crate) fn writer(&self) -> Self {
        Self { early: Bytes::new(), stream: self.stream.clone() }
    }

    pub(crate) fn hangup(&self) -> Hangup {
        Hangup(self.stream.clone())
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
        loop {
            ready!(self.stream.poll_read_ready(cx))?;
            match self.stream.try_read(buf.initialize_unfilled()) {
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

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.stream.poll_write_ready(cx))?;
            match self.stream.try_write_vectored(bufs) {
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

//! The master of a process's terminal on tokio's reactor.

use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use rustix::fs::OFlags;
use rustix::termios::Winsize;
use stave_streaming::Resize;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

/// The master. One copy may be read and one written at a time: there is one waker for each.
#[derive(Clone)]
pub(crate) struct Console(Arc<AsyncFd<OwnedFd>>);

impl Console {
    pub(crate) fn new(master: OwnedFd) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&master)?;
        rustix::fs::fcntl_setfl(&master, flags | OFlags::NONBLOCK)?;
        Ok(Self(Arc::new(crate::fd::watch(master, Interest::READABLE | Interest::WRITABLE)?)))
    }

    /// Sets the terminal's size.
    pub(crate) fn resize(&self) -> Resize {
        let console = self.clone();
        Box::new(move |width, height| {
            let size = Winsize { ws_row: height, ws_col: width, ws_xpixel: 0, ws_ypixel: 0 };
            // EIO: the terminal is gone, as its process is.
            if let Err(error) = rustix::termios::tcsetwinsize(console.0.get_ref(), size) {
                tracing::debug!(%error, width, height, "size of a terminal");
            }
        })
    }
}

impl AsyncRead for Console {
    /// EIO is how a terminal says that no process has it open any more.
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(cx))?;
            let space = buf.initialize_unfilled();
            match guard.try_io(|fd| Ok(rustix::io::retry_on_intr(|| rustix::io::read(fd, &mut *space))?)) {
                Ok(read) => {
                    buf.advance(read?);
                    return Poll::Ready(Ok(()));
                }
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for Console {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(cx))?;
            match guard.try_io(|fd| Ok(rustix::io::retry_on_intr(|| rustix::io::write(fd, bytes))?)) {
                Ok(written) => return Poll::Ready(written),
                Err(_would_block) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// A terminal has no end of input but what its line discipline makes of ^D, which is the client's to send.
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    #[tokio::test]
    async fn reads_writes_and_resizes_until_the_terminal_is_gone() {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        unlockpt(&master).unwrap();
        let terminal = ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        let mut console = Console::new(master).unwrap();
        console.resize()(120, 40);
        let size = rustix::termios::tcgetwinsize(&terminal).unwrap();
        assert_eq!((size.ws_col, size.ws_row), (120, 40));

        let mut reader = console.clone();
        let waiting = tokio::spawn(async move {
            let mut text = [0; 7];
            reader.read_exact(&mut text).await.unwrap();
            (reader, text)
        });
        tokio::task::yield_now().await;
        rustix::io::write(&terminal, b"hello").unwrap();
        console.write_all(b"in\n").await.unwrap();
        let mut line = [0; 16];
        assert_eq!(rustix::io::read(&terminal, &mut line).unwrap(), 3);
        let (mut reader, text) = waiting.await.unwrap();
        assert_eq!(&text, b"helloin", "output, and the echo of input");
        drop(terminal);
        let mut rest = Vec::new();
        let error = reader.read_to_end(&mut rest).await.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()));
        console.resize()(1, 1);
    }
}

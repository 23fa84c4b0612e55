//! Netlink connections into the network namespace of the host.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use rtnetlink::Handle;

use crate::NetworkError;

/// Before a connection that has ended is opened again.
const PAUSE: Duration = Duration::from_millis(100);

type Running = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A netlink connection into the network namespace of the thread that opened it, on a thread of its own: the kernel works
/// inside `send`, and takes some 20 ms to remove an interface. One that ends is opened again: rtnetlink gives up on the
/// first message that can't be sent, for lack of memory, say. A request that is under way then gets no answer, which rtnetlink
/// takes for success: that there is no interface shows in the next step.
#[derive(Debug)]
pub(crate) struct Connection(Arc<RwLock<Handle>>);

impl Connection {
    pub(crate) async fn open() -> Result<Self, NetworkError> {
        Self::open_by(|| {
            let (connection, handle, messages) = rtnetlink::new_connection()?;
            // The connection ends only if nobody wants unsolicited messages. (`_` would not drop them here.)
            drop(messages);
            Ok((Box::pin(connection), handle))
        })
        .await
    }

    async fn open_by(
        open: impl Fn() -> io::Result<(Running, Handle)> + Send + 'static,
    ) -> Result<Self, NetworkError> {
        let (send, receive) = tokio::sync::oneshot::channel();
        let failed = |source| NetworkError::Netlink { what: "open a netlink socket".into(), source };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let serve = async move {
            let (mut running, current) = match open() {
                Ok((running, handle)) => (running, Arc::new(RwLock::new(handle))),
                Err(error) => {
                    let _ = send.send(Err(error));
                    return;
                }
            };
            let handle = Arc::downgrade(&current);
            // If nobody waits any more, the handle is dropped, and the connection ends at once.
            let _ = send.send(Ok(Self(current)));
            loop {
                running.await;
                running = loop {
                    if handle.strong_count() == 0 {
                        return;
                    }
                    tokio::time::sleep(PAUSE).await;
                    match (open(), handle.upgrade()) {
                        (_, None) => return,
                        (Ok((next, new)), Some(handle)) => {
                            tracing::warn!("a netlink connection had ended, and is opened again");
                            *handle.write().unwrap_or_else(PoisonError::into_inner) = new;
                            break next;
                        }
                        (Err(error), _) => tracing::error!(%error, "opening a netlink connection again"),
                    }
                };
            }
        };
        std::thread::Builder::new()
            .name("rtnetlink".into())
            .spawn(move || runtime.block_on(serve))
            .map_err(|e| NetworkError::Worker(e.to_string()))?;
        receive.await.map_err(|_| NetworkError::Worker("the netlink thread died".into()))?.map_err(failed)
    }

    /// To be taken anew for each piece of work.
    pub(crate) fn handle(&self) -> Handle {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    #[cfg(test)]
    pub(crate) fn of(handle: Handle) -> Self {
        Self(Arc::new(RwLock::new(handle)))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::link;

    #[tokio::test]
    async fn one_that_ends_is_opened_again() {
        let opened = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&opened);
        let connection = Connection::open_by(move || {
            let (connection, handle, messages) = rtnetlink::new_connection()?;
            drop(messages);
            match count.fetch_add(1, Ordering::SeqCst) {
                0 => Ok((Box::pin(async move { drop(connection) }), handle)),
                1 => Err(io::ErrorKind::OutOfMemory.into()),
                _ => Ok((Box::pin(connection), handle)),
            }
        })
        .await
        .unwrap();
        let there = async || matches!(link::find(&connection.handle(), "lo").await, Ok(Some(_)));
        assert!(!there().await);
        let works = async {
            while !there().await {
                tokio::time::sleep(PAUSE).await;
            }
        };
        tokio::time::timeout(PAUSE * 100, works).await.unwrap();
        // With its user it ends.
        drop(connection);
        let ends = async {
            while Arc::strong_count(&opened) > 1 {
                tokio::time::sleep(PAUSE).await;
            }
        };
        tokio::time::timeout(PAUSE * 100, ends).await.unwrap();
        assert_eq!(opened.load(Ordering::SeqCst), 3);
    }
}

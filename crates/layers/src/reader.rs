//! The stream below the tar parser: hashes, counts, and stops what goes on for too long.

use std::cell::Cell;
use std::io::{self, Read};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use sha2::{Digest as _, Sha256};

use crate::Digest;

/// Tells an unpacking that nobody wants it any more. Clones are one flag.
#[derive(Debug, Clone, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// A flag that is not set.
    pub fn new() -> Cancel {
        Cancel::default()
    }

    /// Sets the flag. The unpacking ends with [`crate::LayerError::Cancelled`] at its next read.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether the flag is set.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// What stopped the stream, beside errors of the reader below.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    Cancelled,
    /// The tar parser read more than its allowance: an endless extension header.
    Header,
    /// The whole stream is longer than allowed.
    Total,
}

/// Shared between the stream and the loop over the entries.
#[derive(Default)]
pub(crate) struct Gauge {
    /// Bytes that may be read before the loop grants more.
    allowance: Cell<u64>,
    stop: Cell<Option<Stop>>,
    /// The error came from below: the download, or bad compressed data.
    below: Cell<bool>,
}

impl Gauge {
    pub(crate) fn allow(&self, bytes: u64) {
        self.allowance.set(bytes);
    }

    pub(crate) fn stop(&self) -> Option<Stop> {
        self.stop.get()
    }

    pub(crate) fn failed_below(&self) -> bool {
        self.below.get()
    }
}

/// Hashes all that passes.
pub(crate) struct Metered<R> {
    inner: R,
    hasher: Sha256,
    left: u64,
    gauge: Rc<Gauge>,
    cancel: Cancel,
}

impl<R: Read> Metered<R> {
    pub(crate) fn new(inner: R, total: u64, gauge: Rc<Gauge>, cancel: Cancel) -> Self {
        Metered { inner, hasher: Sha256::new(), left: total, gauge, cancel }
    }

    /// The digest of all bytes read.
    pub(crate) fn finish(self) -> Digest {
        Digest::from_hasher(self.hasher)
    }

    fn refuse(&self, stop: Stop) -> io::Error {
        self.gauge.stop.set(Some(stop));
        io::Error::other("stopped")
    }
}

impl<R: Read> Read for Metered<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.cancel.is_cancelled() {
            return Err(self.refuse(Stop::Cancelled));
        }
        let allowance = self.gauge.allowance.get();
        let room = allowance.saturating_add(1).min(self.left.saturating_add(1)).min(buf.len() as u64);
        let n = self.inner.read(&mut buf[..room as usize]).inspect_err(|e| {
            if e.kind() != io::ErrorKind::Interrupted {
                self.gauge.below.set(true);
            }
        })?;
        // One byte more than allowed is asked for, so that a stream that ends just there is fine.
        let read = n as u64;
        if read > self.left {
            return Err(self.refuse(Stop::Total));
        }
        if read > allowance {
            return Err(self.refuse(Stop::Header));
        }
        self.left -= read;
        self.gauge.allowance.set(allowance - read);
        self.hasher.update(&buf[..n]);
        Ok(n)
    }
}

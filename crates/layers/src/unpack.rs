//! From a stream of bytes to a staged tree.

use std::io::{self, Read};
use std::rc::Rc;

use crate::entry::{Action, action, meta, shown};
use crate::reader::{Gauge, Metered, Stop};
use crate::tree::Tree;
use crate::{Cancel, Digest, LayerError, Limits};

/// How a layer is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Plain tar.
    None,
    /// One or several gzip members.
    Gzip,
}

impl Compression {
    /// The compression of a layer's media type (OCI image spec, media-types.md; Docker's schema 2).
    pub fn from_media_type(media_type: &str) -> Result<Compression, LayerError> {
        let refuse = |what: &str| Err(LayerError::Unsupported(format!("{what}, media type {media_type:?}")));
        match media_type {
            "application/vnd.oci.image.layer.v1.tar"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar"
            | "application/vnd.docker.image.rootfs.diff.tar" => Ok(Compression::None),
            "application/vnd.oci.image.layer.v1.tar+gzip"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
            | "application/vnd.docker.image.rootfs.diff.tar.gzip"
            | "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip" => Ok(Compression::Gzip),
            zstd if zstd.ends_with("+zstd") || zstd.ends_with(".zstd") => {
                refuse("zstd compression is not supported yet")
            }
            encrypted if encrypted.ends_with("+encrypted") => refuse("encrypted layers are not supported"),
            _ => refuse("unknown kind of layer"),
        }
    }
}

/// Bytes that the parser may read past an entry: padding, the end of the archive.
const PADDING: u64 = 64 << 10;

/// Unpacks a whole stream into `tree` and returns the digest of the uncompressed bytes, those after
/// the end of the archive included.
pub(crate) fn unpack(
    reader: impl Read,
    compression: Compression,
    limits: &Limits,
    cancel: &Cancel,
    tree: &mut Tree,
) -> Result<Digest, LayerError> {
    match compression {
        Compression::None => unpack_tar(reader, limits, cancel, tree),
        Compression::Gzip => {
            let buffered = io::BufReader::with_capacity(128 << 10, reader);
            unpack_tar(flate2::bufread::MultiGzDecoder::new(buffered), limits, cancel, tree)
        }
    }
}

fn unpack_tar(
    reader: impl Read,
    limits: &Limits,
    cancel: &Cancel,
    tree: &mut Tree,
) -> Result<Digest, LayerError> {
    let gauge = Rc::new(Gauge::default());
    let metered = Metered::new(reader, limits.total_bytes, gauge.clone(), cancel.clone());
    // The parser reads by 512 bytes.
    let mut stream = Buffered::new(metered);
    let mut last = Vec::new();
    let result = entries(&mut stream, limits, &gauge, tree, &mut last);
    let result = result.and_then(|()| {
        // diffIDs cover whatever follows the archive; the digest of the blob wants its end too.
        gauge.allow(u64::MAX - 1);
        let mut sink = vec![0; 64 << 10];
        loop {
            match stream.read(&mut sink) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(LayerError::Read(e)),
            }
        }
    });
    let entry = shown(&last);
    match (result, gauge.stop()) {
        (_, Some(Stop::Cancelled)) => Err(LayerError::Cancelled),
        (_, Some(Stop::Header)) => Err(LayerError::Limit {
            entry,
            limit: format!("header larger than {} bytes", limits.header_bytes),
        }),
        (_, Some(Stop::Total)) => Err(LayerError::Limit {
            entry,
            limit: format!("archive larger than {} bytes", limits.total_bytes),
        }),
        // An error that only went through the tar parser: a cut connection, bad gzip data.
        (Err(LayerError::Read(e)), None) if !gauge.failed_below() => {
            Err(LayerError::BadArchive { entry, reason: e.to_string() })
        }
        (Err(e), None) => Err(e),
        (Ok(()), None) => Ok(stream.into_inner().finish()),
    }
}

fn entries<R: Read>(
    stream: &mut R,
    limits: &Limits,
    gauge: &Gauge,
    tree: &mut Tree,
    last: &mut Vec<u8>,
) -> Result<(), LayerError> {
    gauge.allow(limits.header_bytes + PADDING);
    let mut archive = tar::Archive::new(stream);
    let mut count = 0u64;
    let mut iterator = archive.entries().map_err(LayerError::Read)?;
    loop {
        gauge.allow(limits.header_bytes + PADDING);
        let mut entry = match iterator.next() {
            None => return Ok(()),
            Some(entry) => entry.map_err(LayerError::Read)?,
        };
        *last = entry.path_bytes().into_owned();
        count += 1;
        if count > limits.entries {
            let limit = format!("more than {} entries", limits.entries);
            return Err(LayerError::Limit { entry: shown(last), limit });
        }
        let todo = action(&entry, limits)?;
        gauge.allow(entry.size().saturating_add(PADDING));
        match todo {
            Action::Skip => {}
            Action::Whiteout { parent, name } => tree.whiteout(&parent, &name)?,
            Action::Opaque(path) => tree.opaque(&path)?,
            Action::Create { path, node } => {
                let meta = meta(&mut entry, limits)?;
                tree.create(&path, &node, &meta, &mut entry)?;
            }
        }
        // What is left of the content, so that the next allowance is for headers only.
        io::copy(&mut entry, &mut io::sink()).map_err(LayerError::Read)?;
    }
}

/// A read buffer for small reads that lets large ones through.
struct Buffered<R> {
    inner: R,
    buffer: Vec<u8>,
    at: usize,
    end: usize,
}

impl<R: Read> Buffered<R> {
    fn new(inner: R) -> Self {
        Buffered { inner, buffer: vec![0; 32 << 10], at: 0, end: 0 }
    }

    fn into_inner(self) -> R {
        self.inner
    }
}

impl<R: Read> Read for Buffered<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.at == self.end {
            if buf.len() >= self.buffer.len() {
                return self.inner.read(buf);
            }
            self.end = self.inner.read(&mut self.buffer)?;
            self.at = 0;
        }
        let n = buf.len().min(self.end - self.at);
        buf[..n].copy_from_slice(&self.buffer[self.at..self.at + n]);
        self.at += n;
        Ok(n)
    }
}

//! Header blocks: names and values, compressed with one zlib stream a direction for the connection's life.

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

use super::{FrameError, dictionary::DICTIONARY};

/// Headers in one block.
const MAX_HEADERS: usize = 64;
/// Bytes of one name or one value.
const MAX_FIELD: usize = 8 * 1024;
/// Bytes of one block, inflated.
const MAX_BLOCK: usize = 128 * 1024;
/// Headers that SPDY forbids, as HTTP/1 connections alone have a use for them.
const FORBIDDEN: [&str; 5] = ["connection", "host", "keep-alive", "proxy-connection", "transfer-encoding"];

/// The headers of a stream, in the order of the wire. Names are in lower case.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Headers(Vec<(String, String)>);

impl Headers {
    /// The value of a header; the name in any case. Several values of one name are joined by NUL.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    #[cfg(test)]
    pub(super) fn from_pairs(pairs: Vec<(String, String)>) -> Self {
        Self(pairs)
    }

    fn parse(block: &[u8]) -> Result<Self, FrameError> {
        let mut rest = block;
        let count = take_length(&mut rest)?;
        if count > MAX_HEADERS {
            return Err(FrameError::TooManyHeaders(count));
        }
        let mut headers: Vec<(String, String)> = Vec::with_capacity(count);
        for _ in 0..count {
            let name = take_field(&mut rest)?;
            let value = take_field(&mut rest)?;
            let bad = name.is_empty()
                || name.bytes().any(|byte| byte.is_ascii_uppercase())
                || FORBIDDEN.contains(&name.as_str())
                || headers.iter().any(|(known, _)| *known == name);
            if bad {
                return Err(FrameError::BadHeader(name));
            }
            headers.push((name, value));
        }
        if rest.is_empty() {
            Ok(Self(headers))
        } else {
            Err(FrameError::BadBlock("bytes after the last header"))
        }
    }

    fn to_block(&self) -> Vec<u8> {
        let mut block = (self.0.len() as u32).to_be_bytes().to_vec();
        for field in self.0.iter().flat_map(|(name, value)| [name, value]) {
            block.extend_from_slice(&(field.len() as u32).to_be_bytes());
            block.extend_from_slice(field.as_bytes());
        }
        block
    }
}

impl<const N: usize> From<[(&str, &str); N]> for Headers {
    fn from(headers: [(&str, &str); N]) -> Self {
        Self(headers.into_iter().map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned())).collect())
    }
}

fn take_length(rest: &mut &[u8]) -> Result<usize, FrameError> {
    let (length, after) = rest.split_first_chunk::<4>().ok_or(FrameError::BadBlock("cut short"))?;
    *rest = after;
    Ok(u32::from_be_bytes(*length) as usize)
}

fn take_field(rest: &mut &[u8]) -> Result<String, FrameError> {
    let length = take_length(rest)?;
    if length > MAX_FIELD {
        return Err(FrameError::BadBlock("a name or value is too long"));
    }
    let (field, after) = rest.split_at_checked(length).ok_or(FrameError::BadBlock("cut short"))?;
    *rest = after;
    String::from_utf8(field.to_vec()).map_err(|_| FrameError::BadBlock("not UTF-8"))
}

/// Reads header blocks; each must be given, in the order of arrival, even of a stream that is refused.
pub(super) struct Inflater(Decompress);

impl Inflater {
    pub(super) fn new() -> Self {
        Self(Decompress::new(true))
    }

    pub(super) fn headers(&mut self, compressed: &[u8]) -> Result<Headers, FrameError> {
        Headers::parse(&self.inflate(compressed)?)
    }

    fn inflate(&mut self, compressed: &[u8]) -> Result<Vec<u8>, FrameError> {
        let mut block = vec![0; 1024];
        let (mut read, mut written) = (0, 0);
        loop {
            let (before_in, before_out) = (self.0.total_in(), self.0.total_out());
            let result = self.0.decompress(&compressed[read..], &mut block[written..], FlushDecompress::Sync);
            read += (self.0.total_in() - before_in) as usize;
            written += (self.0.total_out() - before_out) as usize;
            match result {
                Ok(Status::StreamEnd) => return Err(FrameError::BadBlock("the compressed stream ended")),
                Ok(_) => {}
                Err(error) if error.needs_dictionary().is_some() => {
                    self.0
                        .set_dictionary(&DICTIONARY)
                        .map_err(|_| FrameError::BadBlock("another dictionary"))?;
                    continue;
                }
                Err(_) => return Err(FrameError::BadBlock("not zlib")),
            }
            if written == block.len() {
                if written >= MAX_BLOCK {
                    return Err(FrameError::BadBlock("too large when inflated"));
                }
                block.resize(written * 4, 0);
            } else if read == compressed.len() {
                block.truncate(written);
                return Ok(block);
            } else if self.0.total_in() == before_in && self.0.total_out() == before_out {
                return Err(FrameError::BadBlock("not zlib"));
            }
        }
    }
}

/// Writes header blocks.
pub(super) struct Deflater(Option<Compress>);

impl Deflater {
    pub(super) fn new() -> Self {
        Self(None)
    }

    pub(super) fn compress(&mut self, headers: &Headers) -> Result<Vec<u8>, FrameError> {
        let broken = |_| FrameError::BadBlock("compressing failed");
        let deflate = match &mut self.0 {
            Some(deflate) => deflate,
            none => {
                let mut deflate = Compress::new(Compression::default(), true);
                deflate.set_dictionary(&DICTIONARY).map_err(broken)?;
                none.insert(deflate)
            }
        };
        let block = headers.to_block();
        let mut compressed = Vec::with_capacity(64 + block.len());
        let start = deflate.total_in();
        loop {
            let read = (deflate.total_in() - start) as usize;
            deflate.compress_vec(&block[read..], &mut compressed, FlushCompress::Sync).map_err(broken)?;
            let read = (deflate.total_in() - start) as usize;
            // Room left in the output means that the flush is complete.
            if read == block.len() && compressed.len() < compressed.capacity() {
                return Ok(compressed);
            }
            compressed.reserve(256);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_share_one_compressed_stream() {
        let (mut deflater, mut inflater) = (Deflater::new(), Inflater::new());
        for round in 0..500 {
            let id = format!("{round}-{}", "x".repeat(round * 7));
            let headers = Headers::from([("streamType", "data"), ("port", "80"), ("requestID", &id)]);
            let block = deflater.compress(&headers).unwrap();
            assert!(block.ends_with(&[0, 0, 0xff, 0xff]));
            let read = inflater.headers(&block).unwrap();
            assert_eq!(read, headers);
            assert_eq!(read.get("RequestId"), Some(id.as_str()));
        }
    }

    #[test]
    fn refuses_a_bomb() {
        let mut deflater = Deflater::new();
        let block = deflater.compress(&Headers::from([("a", &*"x".repeat(10 << 20))])).unwrap();
        assert!(block.len() < 64 * 1024);
        let error = Inflater::new().inflate(&block).unwrap_err();
        assert_eq!(error.to_string(), "header block: too large when inflated");
    }

    #[test]
    fn refuses_bad_blocks() {
        for (block, text) in [
            (&b"\0\0\0"[..], "header block: cut short"),
            (b"\0\0\0\x01", "header block: cut short"),
            (b"\xff\xff\xff\xff", "header block with 4294967295 headers"),
            (b"\0\0\0\0\0", "header block: bytes after the last header"),
            (b"\0\0\0\x01\xff\xff\xff\xff", "header block: a name or value is too long"),
            (b"\0\0\0\x01\0\0\0\x01A\0\0\0\0", "header \"A\" is not allowed"),
            (b"\0\0\0\x01\0\0\0\x04host\0\0\0\0", "header \"host\" is not allowed"),
            (b"\0\0\0\x02\0\0\0\x01a\0\0\0\0\0\0\0\x01a\0\0\0\0", "header \"a\" is not allowed"),
            (b"\0\0\0\x01\0\0\0\0\0\0\0\0", "header \"\" is not allowed"),
            (b"\0\0\0\x01\0\0\0\x01\xff\0\0\0\0", "header block: not UTF-8"),
        ] {
            assert_eq!(Headers::parse(block).unwrap_err().to_string(), text);
        }
    }

    #[test]
    fn refuses_what_is_not_our_zlib() {
        assert!(Inflater::new().inflate(b"hello, world").is_err());
        // A zlib stream with a dictionary that isn't SPDY's.
        assert!(Inflater::new().inflate(&[0x78, 0xf9, 1, 2, 3, 4, 0xa2, 2]).is_err());
        // A stream that ends.
        let mut whole = Vec::with_capacity(100);
        let mut deflate = Compress::new(Compression::default(), true);
        deflate.set_dictionary(&DICTIONARY).unwrap();
        deflate.compress_vec(&[0; 4], &mut whole, FlushCompress::Finish).unwrap();
        assert!(Inflater::new().inflate(&whole).is_err());
    }
}

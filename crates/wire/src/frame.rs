//! The bytes of a packet.

use crate::{MAX_INLINE, MAX_PAYLOAD, WireError};

const KIND_INLINE: u8 = 0;
const KIND_MEMFD: u8 = 1;
/// Kind and length.
pub(crate) const MEMFD_HEADER: usize = 9;
/// The longest packet: kind and an inline payload.
pub(crate) const MAX_PACKET: usize = 1 + MAX_INLINE;

/// What a packet says about its payload.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Frame {
    /// Everything behind the first byte.
    Inline,
    /// This many bytes, in the memfd that is the last descriptor.
    Memfd(usize),
}

/// The first byte of a packet with the payload inside.
pub(crate) const INLINE_HEADER: [u8; 1] = [KIND_INLINE];

/// The whole packet for a payload of `len` bytes in a memfd.
pub(crate) fn memfd_header(len: usize) -> [u8; MEMFD_HEADER] {
    let mut header = [KIND_MEMFD; MEMFD_HEADER];
    header[1..].copy_from_slice(&(len as u64).to_le_bytes());
    header
}

pub(crate) fn parse(packet: &[u8]) -> Result<Frame, WireError> {
    match packet.split_first() {
        None => Err(WireError::Malformed("empty")),
        Some((&KIND_INLINE, payload)) if payload.len() <= MAX_INLINE => Ok(Frame::Inline),
        Some((&KIND_INLINE, _)) => Err(WireError::Malformed("inline payload too long")),
        Some((&KIND_MEMFD, length)) => {
            let length: [u8; 8] =
                length.try_into().map_err(|_| WireError::Malformed("length field is not 8 bytes"))?;
            let length = u64::from_le_bytes(length);
            match usize::try_from(length) {
                Ok(len) if len > MAX_PAYLOAD => Err(WireError::PayloadTooLarge(length)),
                Ok(len) if len > MAX_INLINE => Ok(Frame::Memfd(len)),
                Ok(_) => Err(WireError::Malformed("a short payload in a memfd")),
                Err(_) => Err(WireError::PayloadTooLarge(length)),
            }
        }
        Some(_) => Err(WireError::Malformed("unknown kind")),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn own_headers_parse() {
        assert_eq!(parse(&INLINE_HEADER).unwrap(), Frame::Inline);
        assert_eq!(parse(&memfd_header(MAX_INLINE + 1)).unwrap(), Frame::Memfd(MAX_INLINE + 1));
        assert_eq!(parse(&memfd_header(MAX_PAYLOAD)).unwrap(), Frame::Memfd(MAX_PAYLOAD));
    }

    #[test]
    fn limits_and_nonsense() {
        assert!(matches!(parse(&[]), Err(WireError::Malformed(_))));
        assert!(matches!(parse(&[2, 0]), Err(WireError::Malformed(_))));
        assert!(matches!(parse(&[KIND_MEMFD, 1, 2]), Err(WireError::Malformed(_))));
        assert!(matches!(parse(&memfd_header(MAX_INLINE)), Err(WireError::Malformed(_))));
        assert!(matches!(parse(&memfd_header(MAX_PAYLOAD + 1)), Err(WireError::PayloadTooLarge(_))));
        assert!(matches!(parse(&[0xff; 9]), Err(WireError::Malformed(_))));
        let mut huge = [0xff; 9];
        huge[0] = KIND_MEMFD;
        assert!(matches!(parse(&huge), Err(WireError::PayloadTooLarge(u64::MAX))));
    }

    proptest! {
        #[test]
        fn any_bytes_parse_or_fail(packet in proptest::collection::vec(any::<u8>(), 0..40)) {
            match parse(&packet) {
                Ok(Frame::Inline) => prop_assert_eq!(packet[0], KIND_INLINE),
                Ok(Frame::Memfd(len)) => prop_assert!(len > MAX_INLINE && len <= MAX_PAYLOAD),
                Err(_) => {}
            }
        }
    }
}

//! SPDY/3.1 frames: bytes to [`Frame`] and back. All numbers are big-endian.
//!
//! ```text
//! control: u16 0x8000 | 3, u16 type, u8 flags, u24 length, payload
//! data:    u32 stream id (top bit 0), u8 flags, u24 length, payload
//! ```

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::headers::{Deflater, Headers, Inflater};

/// Bytes of a control frame's payload; a longer one ends the connection.
const MAX_CONTROL: usize = 64 * 1024;
const HEAD: usize = 8;
const FIN: u8 = 1;
const CONTROL: u16 = 0x8000;
const VERSION: u16 = 3;
const ID_MASK: u32 = 0x7fff_ffff;

const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const SETTINGS: u16 = 4;
const PING: u16 = 6;
const GOAWAY: u16 = 7;
const HEADERS: u16 = 8;
const WINDOW_UPDATE: u16 = 9;
/// An id of SETTINGS.
const INITIAL_WINDOW_SIZE: u32 = 7;

/// Status codes of [`Frame::Reset`].
pub mod reset {
    /// The frame broke the protocol.
    pub const PROTOCOL_ERROR: u32 = 1;
    /// The stream was refused before it did anything.
    pub const REFUSED_STREAM: u32 = 3;
    /// The sender needs the stream no longer.
    pub const CANCEL: u32 = 5;
    /// The stream got more than it was given window for.
    pub const FLOW_CONTROL_ERROR: u32 = 7;
}

/// Status codes of [`Frame::GoAway`].
pub mod goaway {
    /// A normal end.
    pub const OK: u32 = 0;
    /// The peer broke the protocol.
    pub const PROTOCOL_ERROR: u32 = 1;
}

/// One frame. `fin` closes the sender's half of the stream.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Frame {
    /// Opens a stream.
    SynStream {
        /** The new stream. */
        id: u32,
        /** Half-closed at once. */
        fin: bool,
        /** Of the stream. */
        headers: Headers,
    },
    /// Accepts a stream.
    SynReply {
        /** The stream. */
        id: u32,
        /** Half-closed at once. */
        fin: bool,
        /** Of the answer. */
        headers: Headers,
    },
    /// More headers of a stream.
    Headers {
        /** The stream. */
        id: u32,
        /** Half-closes. */
        fin: bool,
        /** The headers. */
        headers: Headers,
    },
    /// Ends a stream in both directions.
    Reset {
        /** The stream. */
        id: u32,
        /** See [`reset`]. */
        status: u32,
    },
    /// Settings, of which one is of interest.
    Settings {
        /** SETTINGS_INITIAL_WINDOW_SIZE: bytes that the sender takes on each stream to begin with. */
        initial_window: Option<u32>,
    },
    /// A ping, or the answer to one.
    Ping {
        /** Odd from a client, even from a server. */
        id: u32,
    },
    /// The sender takes no new streams.
    GoAway {
        /** The last stream that was accepted. */
        last: u32,
        /** See [`goaway`]. */
        status: u32,
    },
    /// The sender takes so much more. Go's client neither sends nor heeds it.
    WindowUpdate {
        /** The stream; 0 is the connection. */
        id: u32,
        /** Bytes. */
        delta: u32,
    },
    /// Bytes of a stream: of a long frame, the part that is there.
    Data {
        /** The stream. */
        id: u32,
        /** Half-closes. */
        fin: bool,
        /** The bytes. */
        bytes: Bytes,
    },
}

/// Bytes that are no SPDY/3.1. The connection can't go on after one.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum FrameError {
    /// A control frame's payload is over the limit.
    #[error("control frame of type {kind} with {length} bytes")]
    TooLong {
        /// The frame's type.
        kind: u16,
        /// Of the payload, in bytes.
        length: usize,
    },
    /// A control frame of a type that SPDY/3.1 doesn't have.
    #[error("control frame of unknown type {0}")]
    UnknownType(u16),
    /// A control frame whose content doesn't fit its type.
    #[error("malformed control frame of type {0}")]
    Malformed(u16),
    /// A header block that can't be inflated or parsed.
    #[error("header block: {0}")]
    BadBlock(&'static str),
    /// A header block's count is over the limit.
    #[error("header block with {0} headers")]
    TooManyHeaders(usize),
    /// A header that is forbidden, in upper case, or there twice.
    #[error("header {0:?} is not allowed")]
    BadHeader(String),
}

/// Reads frames from what has arrived.
pub struct Decoder {
    inflater: Inflater,
    /// The data frame whose payload is being read: stream, fin, bytes to come.
    data: Option<(u32, bool, usize)>,
}

impl Default for Decoder {
    fn default() -> Self {
        Self { inflater: Inflater::new(), data: None }
    }
}

impl Decoder {
    /// Takes the next frame off the front of `buffer`; `None` if it isn't all there. A data frame comes in as many
    /// parts as it arrives in, the last one with its `fin`.
    pub fn decode(&mut self, buffer: &mut BytesMut) -> Result<Option<Frame>, FrameError> {
        if let Some((id, fin, left)) = self.data {
            let length = left.min(buffer.len());
            if length == 0 && left > 0 {
                return Ok(None);
            }
            let bytes = buffer.split_to(length).freeze();
            let last = length == left;
            self.data = (!last).then_some((id, fin, left - length));
            return Ok(Some(Frame::Data { id, fin: fin && last, bytes }));
        }
        let Some(head) = buffer.first_chunk::<HEAD>() else { return Ok(None) };
        let word = u32::from_be_bytes([head[0], head[1], head[2], head[3]]);
        let flags = head[4];
        let length = u32::from_be_bytes([0, head[5], head[6], head[7]]) as usize;
        if word >> 31 == 0 {
            buffer.advance(HEAD);
            self.data = Some((word, flags & FIN != 0, length));
            return self.decode(buffer);
        }
        let kind = word as u16;
        if length > MAX_CONTROL {
            return Err(FrameError::TooLong { kind, length });
        }
        if buffer.len() < HEAD + length {
            return Ok(None);
        }
        buffer.advance(HEAD);
        let payload = buffer.split_to(length);
        self.control(kind, flags, &payload).map(Some)
    }

    fn control(&mut self, kind: u16, flags: u8, payload: &[u8]) -> Result<Frame, FrameError> {
        let malformed = FrameError::Malformed(kind);
        let word = |at: usize| -> Result<u32, FrameError> {
            let bytes = payload.get(at..).and_then(|rest| rest.first_chunk::<4>());
            bytes.map(|bytes| u32::from_be_bytes(*bytes)).ok_or(FrameError::Malformed(kind))
        };
        let id = || word(0).map(|id| id & ID_MASK);
        let stream_id =
            || id().and_then(|id| if id == 0 { Err(FrameError::Malformed(kind)) } else { Ok(id) });
        let fin = flags & FIN != 0;
        let exact =
            |length: usize| if payload.len() == length { Ok(()) } else { Err(FrameError::Malformed(kind)) };
        match kind {
            SYN_STREAM => {
                let block = payload.get(10..).ok_or(malformed)?;
                let headers = self.inflater.headers(block)?;
                Ok(Frame::SynStream { id: stream_id()?, fin, headers })
            }
            SYN_REPLY | HEADERS => {
                let block = payload.get(4..).ok_or(malformed)?;
                let headers = self.inflater.headers(block)?;
                let id = stream_id()?;
                Ok(if kind == SYN_REPLY {
                    Frame::SynReply { id, fin, headers }
                } else {
                    Frame::Headers { id, fin, headers }
                })
            }
            RST_STREAM => {
                exact(8)?;
                match word(4)? {
                    0 => Err(malformed),
                    status => Ok(Frame::Reset { id: stream_id()?, status }),
                }
            }
            SETTINGS => {
                // The count may not promise more than the frame holds.
                let count = word(0)? as usize;
                if count > (payload.len() - 4) / 8 {
                    return Err(malformed);
                }
                let mut initial_window = None;
                for entry in 0..count {
                    // Eight bits of flags, then the id. The first of an id counts.
                    if word(4 + 8 * entry)? & 0xff_ffff == INITIAL_WINDOW_SIZE && initial_window.is_none() {
                        let bytes = word(8 + 8 * entry)?;
                        initial_window = Some(if bytes > ID_MASK { return Err(malformed) } else { bytes });
                    }
                }
                Ok(Frame::Settings { initial_window })
            }
            PING => {
                exact(4)?;
                match word(0)? {
                    0 => Err(malformed),
                    _ if flags != 0 => Err(malformed),
                    id => Ok(Frame::Ping { id }),
                }
            }
            GOAWAY => {
                exact(8)?;
                Ok(Frame::GoAway { last: id()?, status: word(4)? })
            }
            WINDOW_UPDATE => {
                exact(8)?;
                Ok(Frame::WindowUpdate { id: id()?, delta: word(4)? & ID_MASK })
            }
            kind => Err(FrameError::UnknownType(kind)),
        }
    }
}

/// Writes frames.
pub struct Encoder {
    deflater: Deflater,
}

impl Default for Encoder {
    fn default() -> Self {
        Self { deflater: Deflater::new() }
    }
}

impl Encoder {
    /// Appends a frame. A data frame's bytes must be fewer than 2^24.
    pub fn encode(&mut self, frame: &Frame, out: &mut BytesMut) -> Result<(), FrameError> {
        match frame {
            Frame::SynStream { id, fin, headers } => {
                let block = self.deflater.compress(headers)?;
                control_head(SYN_STREAM, fin_flag(*fin), 10 + block.len(), out)?;
                out.put_u32(*id);
                // No associated stream, priority 0, no slot.
                out.put_bytes(0, 6);
                out.put_slice(&block);
            }
            Frame::SynReply { id, fin, headers } | Frame::Headers { id, fin, headers } => {
                let kind = if matches!(frame, Frame::SynReply { .. }) { SYN_REPLY } else { HEADERS };
                let block = self.deflater.compress(headers)?;
                control_head(kind, fin_flag(*fin), 4 + block.len(), out)?;
                out.put_u32(*id);
                out.put_slice(&block);
            }
            Frame::Reset { id, status } => {
                control_head(RST_STREAM, 0, 8, out)?;
                out.put_u32(*id);
                out.put_u32(*status);
            }
            Frame::Settings { initial_window } => {
                control_head(SETTINGS, 0, if initial_window.is_some() { 12 } else { 4 }, out)?;
                out.put_u32(u32::from(initial_window.is_some()));
                if let Some(bytes) = initial_window {
                    out.put_u32(INITIAL_WINDOW_SIZE);
                    out.put_u32(*bytes);
                }
            }
            Frame::Ping { id } => {
                control_head(PING, 0, 4, out)?;
                out.put_u32(*id);
            }
            Frame::GoAway { last, status } => {
                control_head(GOAWAY, 0, 8, out)?;
                out.put_u32(*last);
                out.put_u32(*status);
            }
            Frame::WindowUpdate { id, delta } => {
                control_head(WINDOW_UPDATE, 0, 8, out)?;
                out.put_u32(*id);
                out.put_u32(*delta);
            }
            Frame::Data { id, fin, bytes } => {
                data_head(*id, *fin, bytes.len(), out);
                out.put_slice(bytes);
            }
        }
        Ok(())
    }
}

fn fin_flag(fin: bool) -> u8 {
    if fin { FIN } else { 0 }
}

fn control_head(kind: u16, flags: u8, length: usize, out: &mut BytesMut) -> Result<(), FrameError> {
    if length > MAX_CONTROL {
        return Err(FrameError::TooLong { kind, length });
    }
    out.put_u16(CONTROL | VERSION);
    out.put_u16(kind);
    out.put_u32(u32::from(flags) << 24 | length as u32);
    Ok(())
}

/// Appends the eight bytes before a data frame's payload.
pub(super) fn data_head(id: u32, fin: bool, length: usize, out: &mut BytesMut) {
    debug_assert!(length < 1 << 24);
    out.put_u32(id & ID_MASK);
    out.put_u32(u32::from(fin_flag(fin)) << 24 | length as u32);
}

#[cfg(test)]
#[path = "frame_tests.rs"]
mod tests;

//! Just enough netlink to ask the kernel for a thing and hear whether it did it (netlink(7)).

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, bind,
    netlink::SocketAddrNetlink,
    recv, send, socket_with,
    sockopt::{Timeout, set_socket_timeout},
};

/// NETLINK_ROUTE: protocol 0, which rustix writes so.
pub(crate) const ROUTE: Option<Protocol> = None;

const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
const NLA_F_NESTED: u16 = 1 << 15;
const NLMSG_ERROR: u16 = 2;
const HEADER: usize = 16;

/// One message, its attributes appended one after the other.
pub(crate) struct Message(Vec<u8>);

impl Message {
    /// A request to make something, `family_header` being ifinfomsg or nfgenmsg.
    pub(crate) fn create(kind: u16, sequence: u32, family_header: &[u8]) -> Self {
        Self::with_flags(kind, NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, sequence, family_header)
    }

    /// The begin or end of an nf_tables batch: not acknowledged.
    pub(crate) fn batch(kind: u16, family_header: &[u8]) -> Self {
        Self::with_flags(kind, NLM_F_REQUEST, 0, family_header)
    }

    fn with_flags(kind: u16, flags: u16, sequence: u32, family_header: &[u8]) -> Self {
        let mut bytes = vec![0; 4];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(family_header);
        Self(bytes)
    }

    pub(crate) fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        self.0.extend(attribute(kind, value));
        self
    }

    fn finish(mut self) -> Vec<u8> {
        let length = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
        self.0
    }
}

/// One attribute, padded to four bytes.
pub(crate) fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    let mut bytes = Vec::with_capacity(value.len() + 8);
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// An attribute that holds attributes.
pub(crate) fn nested(kind: u16, attributes: &[Vec<u8>]) -> Vec<u8> {
    attribute(kind | NLA_F_NESTED, &attributes.concat())
}

/// Sends the messages in one datagram over a socket of `protocol` ([`ROUTE`] or another) and waits for the answers to
/// those that ask for one; the first error is returned.
pub(crate) fn request(protocol: Option<Protocol>, messages: Vec<Message>, answers: usize) -> io::Result<()> {
    let socket = open(protocol)?;
    let bytes: Vec<u8> = messages.into_iter().flat_map(Message::finish).collect();
    send(&socket, &bytes, SendFlags::empty())?;
    let mut buffer = vec![0; 16 * 1024];
    let mut heard = 0;
    while heard < answers {
        let (length, _) = recv(&socket, &mut buffer[..], RecvFlags::empty())?;
        let before = heard;
        for result in answers_in(&buffer[..length]) {
            result?;
            heard += 1;
        }
        if heard == before {
            return Err(io::Error::other("netlink: an answer of another kind"));
        }
    }
    Ok(())
}

fn open(protocol: Option<Protocol>) -> io::Result<OwnedFd> {
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, protocol)?;
    bind(&socket, &SocketAddrNetlink::new(0, 0))?;
    set_socket_timeout(&socket, Timeout::Recv, Some(Duration::from_secs(3)))?;
    Ok(socket)
}

/// The error codes (0 is an acknowledgement) of the NLMSG_ERROR messages in a datagram.
fn answers_in(mut datagram: &[u8]) -> Vec<io::Result<()>> {
    let mut answers = Vec::new();
    while let Some(header) = datagram.get(..HEADER + 4) {
        let field = |at: usize| [header[at], header[at + 1], header[at + 2], header[at + 3]];
        let length = u32::from_ne_bytes(field(0)) as usize;
        if length < HEADER {
            break;
        }
        if u16::from_ne_bytes([header[4], header[5]]) == NLMSG_ERROR {
            answers.push(match i32::from_ne_bytes(field(HEADER)) {
                0 => Ok(()),
                code => Err(io::Error::from_raw_os_error(code.saturating_neg())),
            });
        }
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    answers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_but_not_counted_so() {
        assert_eq!(attribute(3, b"ab"), [6, 0, 3, 0, b'a', b'b', 0, 0]);
        assert_eq!(nested(1, &[attribute(2, b"")]), [8, 0, 1, 0x80, 4, 0, 2, 0]);
    }

    #[test]
    fn answers_are_read_and_rubbish_ends() {
        let answer = |code: i32| {
            let mut bytes = 36u32.to_ne_bytes().to_vec();
            bytes.extend(NLMSG_ERROR.to_ne_bytes());
            bytes.extend([0; 10]);
            bytes.extend(code.to_ne_bytes());
            bytes.extend([0; 16]);
            bytes
        };
        let datagram = [answer(0), answer(-17)].concat();
        let answers = answers_in(&datagram);
        assert_eq!(answers.len(), 2);
        assert!(answers[0].is_ok());
        assert_eq!(answers[1].as_ref().unwrap_err().raw_os_error(), Some(17));
        assert!(answers_in(&[0; 64]).is_empty());
        assert!(answers_in(&[1, 2, 3]).is_empty());
        assert_eq!(answers_in(&answer(0)[..20]).len(), 1);
    }
}

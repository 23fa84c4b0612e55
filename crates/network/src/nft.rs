//! nftables batches as bytes: just the messages and expressions that the rules need. The netlink
//! crates have no nat, masquerade, fib or ct expression. Numbers: `linux/netfilter/nf_tables.h` and `nfnetlink.h`.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, setsockopt, socket,
    sockopt,
};

const SUBSYS_NFTABLES: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
pub(crate) const NEWTABLE: u16 = 0;
pub(crate) const GETTABLE: u16 = 1;
pub(crate) const DELTABLE: u16 = 2;
pub(crate) const NEWCHAIN: u16 = 3;
pub(crate) const NEWRULE: u16 = 6;
const GETRULE: u16 = 7;
pub(crate) const DELRULE: u16 = 8;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
pub(crate) const REQUEST: u16 = 0x1;
pub(crate) const ACK: u16 = 0x4;
pub(crate) const DUMP: u16 = 0x300;
const CREATE: u16 = 0x400;
const APPEND: u16 = 0x800;
const NESTED: u16 = 0x8000;

pub(crate) const DROP: i32 = 0;
pub(crate) const ACCEPT: i32 = 1;
pub(crate) const JUMP: i32 = -3;

/// NFTA_RULE_USERDATA, and what our rules bear there, in the form of libnftnl: a type that it does not know, and no value.
/// A copy that the nft program wrote and loads again is without.
const USERDATA: u16 = 7;
const MARK: [u8; 2] = [0xf5, 0];

/// Families of tables (NFPROTO_INET, NFPROTO_BRIDGE).
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Family {
    #[default]
    Inet = 1,
    Bridge = 7,
}

/// Netlink attributes, one after another.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Attrs(Vec<u8>);

impl Attrs {
    pub(crate) fn bytes(mut self, kind: u16, value: &[u8]) -> Self {
        // Values here are short: names, addresses, one rule.
        let len = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.0.extend(len.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    pub(crate) fn be32(self, kind: u16, value: u32) -> Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    fn be64(self, kind: u16, value: u64) -> Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    pub(crate) fn text(self, kind: u16, value: &str) -> Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.bytes(kind, &bytes)
    }

    pub(crate) fn nest(self, kind: u16, inner: &Self) -> Self {
        self.nested_bytes(kind, &inner.0)
    }

    pub(crate) fn nested_bytes(self, kind: u16, inner: &[u8]) -> Self {
        self.bytes(kind | NESTED, inner)
    }

    /// `nft_data_attributes`: a value.
    fn data(self, kind: u16, value: &[u8]) -> Self {
        self.nest(kind, &Self::default().bytes(1, value))
    }
}

/// The expressions of one rule.
#[derive(Debug, Default, Clone)]
pub(crate) struct Rule(Attrs);

/// Keys of `meta`.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Meta {
    Iifname = 6,
    Oifname = 7,
    Nfproto = 15,
    L4proto = 16,
}

/// Registers of 16 bytes.
const REG_1: u32 = 1;
const REG_2: u32 = 2;

impl Rule {
    fn expression(self, name: &str, data: &Attrs) -> Self {
        let one = Attrs::default().text(1, name).nest(2, data);
        Self(self.0.nest(1, &one))
    }

    fn compare(self, not: bool, value: &[u8]) -> Self {
        let data = Attrs::default().be32(1, REG_1).be32(2, u32::from(not)).data(3, value);
        self.expression("cmp", &data)
    }

    fn load_meta(self, key: Meta) -> Self {
        self.expression("meta", &Attrs::default().be32(1, REG_1).be32(2, key as u32))
    }

    /// Compares with one byte: the family (2, 10) or the transport protocol.
    pub(crate) fn meta_is(self, key: Meta, value: u8) -> Self {
        self.load_meta(key).compare(false, &[value])
    }

    /// Compares with an interface name, all of its 16 bytes.
    pub(crate) fn interface(self, key: Meta, not: bool, name: &str) -> Self {
        let mut bytes = [0u8; 16];
        for (to, from) in bytes.iter_mut().take(15).zip(name.bytes()) {
            *to = from;
        }
        self.load_meta(key).compare(not, &bytes)
    }

    /// Compares with the start of an interface name.
    pub(crate) fn interface_prefix(self, key: Meta, prefix: &str) -> Self {
        self.load_meta(key).compare(false, prefix.as_bytes())
    }

    /// Compares the first byte of the transport header: the type of an ICMPv6 message.
    pub(crate) fn icmp_type(self, value: u8) -> Self {
        self.load_payload(2, 0, 1).compare(false, &[value])
    }

    /// Loads from the network (1) or transport (2) header.
    fn load_payload(self, base: u32, offset: u32, len: u32) -> Self {
        self.expression(
            "payload",
            &Attrs::default().be32(1, REG_1).be32(2, base).be32(3, offset).be32(4, len),
        )
    }

    /// Compares bytes of the network header, such as an address.
    pub(crate) fn network(self, offset: u32, not: bool, value: &[u8]) -> Self {
        self.load_payload(1, offset, len(value)).compare(not, value)
    }

    /// Compares masked bytes of the network header, such as a subnet.
    pub(crate) fn network_masked(self, offset: u32, not: bool, mask: &[u8], value: &[u8]) -> Self {
        let bits = Attrs::default().be32(1, REG_1).be32(2, REG_1).be32(3, len(mask));
        let bits = bits.data(4, mask).data(5, &vec![0; mask.len()]);
        self.load_payload(1, offset, len(mask)).expression("bitwise", &bits).compare(not, value)
    }

    /// The destination port; at the same place in TCP, UDP and SCTP.
    pub(crate) fn destination_port(self, port: u16) -> Self {
        self.load_payload(2, 2, 2).compare(false, &port.to_be_bytes())
    }

    /// The destination is an address of this host (fib, address type, RTN_LOCAL).
    pub(crate) fn destination_is_local(self) -> Self {
        let fib = Attrs::default().be32(1, REG_1).be32(2, 3).be32(3, 2);
        self.expression("fib", &fib).compare(false, &2u32.to_ne_bytes())
    }

    /// The connection's destination was rewritten (ct status, IPS_DST_NAT).
    pub(crate) fn was_dnat(self) -> Self {
        let status = 32u32.to_ne_bytes();
        let ct = Attrs::default().be32(1, REG_1).be32(2, 2);
        let bits =
            Attrs::default().be32(1, REG_1).be32(2, REG_1).be32(3, 4).data(4, &status).data(5, &[0; 4]);
        self.expression("ct", &ct).expression("bitwise", &bits).compare(false, &status)
    }

    /// More bytes a second than this have come, after a burst (limit, NFT_LIMIT_PKT_BYTES, NFT_LIMIT_F_INV).
    pub(crate) fn exceeds(self, bytes: u64, burst: u32) -> Self {
        let data = Attrs::default().be64(1, bytes).be64(2, 1).be32(3, burst).be32(4, 1).be32(5, 1);
        self.expression("limit", &data)
    }

    /// Ends in a verdict, perhaps with the chain to jump to.
    pub(crate) fn verdict(self, code: i32, chain: Option<&str>) -> Self {
        let mut verdict = Attrs::default().bytes(1, &code.to_be_bytes());
        if let Some(chain) = chain {
            verdict = verdict.text(2, chain);
        }
        let data = Attrs::default().be32(1, 0).nest(2, &Attrs::default().nest(2, &verdict));
        self.expression("immediate", &data)
    }

    pub(crate) fn masquerade(self) -> Self {
        self.expression("masq", &Attrs::default())
    }

    /// Sends to another address and port; `family` is NFPROTO_IPV4 or NFPROTO_IPV6.
    pub(crate) fn dnat(self, family: u8, address: &[u8], port: u16) -> Self {
        let load = |register: u32, value: &[u8]| Attrs::default().be32(1, register).data(2, value);
        let nat = Attrs::default().be32(1, 1).be32(2, u32::from(family)).be32(3, REG_1).be32(5, REG_2);
        self.expression("immediate", &load(REG_1, address))
            .expression("immediate", &load(REG_2, &port.to_be_bytes()))
            .expression("nat", &nat)
    }
}

fn len(value: &[u8]) -> u32 {
    u32::try_from(value.len()).unwrap_or(u32::MAX)
}

/// Messages that the kernel applies all together or not at all.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    family: Family,
    messages: Vec<(u16, u16, Attrs)>,
}

impl Batch {
    /// One for tables of this family.
    pub(crate) fn of(family: Family) -> Self {
        Self { family, messages: Vec::new() }
    }

    pub(crate) fn new_table(&mut self, table: &str) {
        self.messages.push((NEWTABLE, CREATE, Attrs::default().text(1, table)));
    }

    pub(crate) fn delete_table(&mut self, table: &str) {
        self.messages.push((DELTABLE, 0, Attrs::default().text(1, table)));
    }

    /// A chain; `base` is its type, hook number and priority.
    pub(crate) fn chain(&mut self, table: &str, name: &str, base: Option<(&str, u32, i32)>) {
        let mut attrs = Attrs::default().text(1, table).text(3, name);
        if let Some((kind, hook, priority)) = base {
            let hook = Attrs::default().be32(1, hook).bytes(2, &priority.to_be_bytes());
            attrs = attrs.nest(4, &hook).be32(5, ACCEPT as u32).text(7, kind);
        }
        self.messages.push((NEWCHAIN, CREATE, attrs));
    }

    pub(crate) fn rule(&mut self, table: &str, chain: &str, rule: Rule) {
        let attrs = Attrs::default().text(1, table).text(2, chain).nest(4, &rule.0).bytes(USERDATA, &MARK);
        self.messages.push((NEWRULE, CREATE | APPEND, attrs));
    }

    /// Removes all rules of a chain.
    pub(crate) fn flush_chain(&mut self, table: &str, chain: &str) {
        self.messages.push((DELRULE, 0, Attrs::default().text(1, table).text(2, chain)));
    }

    /// How many rules it makes.
    pub(crate) fn rules(&self) -> usize {
        self.messages.iter().filter(|(kind, ..)| *kind == NEWRULE).count()
    }

    /// Applies the batch in the calling thread's network namespace.
    pub(crate) fn commit(self) -> io::Result<()> {
        let count = self.messages.len();
        let mut bytes = Vec::new();
        message(&mut bytes, BATCH_BEGIN, REQUEST, 0, [0, 0], SUBSYS_NFTABLES, &Attrs::default());
        for (n, (kind, flags, attrs)) in self.messages.iter().enumerate() {
            // One acknowledgement, for the last, tells that all went through; errors always come.
            let ack = if n + 1 == count { ACK } else { 0 };
            let seq = u32::try_from(n + 1).unwrap_or(u32::MAX);
            message(
                &mut bytes,
                (SUBSYS_NFTABLES << 8) | kind,
                REQUEST | flags | ack,
                seq,
                [self.family as u8, 0],
                0,
                attrs,
            );
        }
        let seq = u32::try_from(count + 1).unwrap_or(u32::MAX);
        message(&mut bytes, BATCH_END, REQUEST, seq, [0, 0], SUBSYS_NFTABLES, &Attrs::default());
        request(&bytes)
    }
}

/// Whether a table exists.
pub(crate) fn table_exists(family: Family, table: &str) -> io::Result<bool> {
    let mut bytes = Vec::new();
    let attrs = Attrs::default().text(1, table);
    message(&mut bytes, (SUBSYS_NFTABLES << 8) | GETTABLE, REQUEST | ACK, 1, [family as u8, 0], 0, &attrs);
    match request(&bytes) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

/// How many rules a table has, in all of its chains; 0 if there is no such table, or if one of them is not ours.
pub(crate) fn count_rules(family: Family, table: &str) -> io::Result<usize> {
    let mut bytes = Vec::new();
    let attrs = Attrs::default().text(1, table);
    let flags = REQUEST | DUMP;
    message(&mut bytes, (SUBSYS_NFTABLES << 8) | GETRULE, flags, 1, [family as u8, 0], 0, &attrs);
    let (mut count, mut foreign) = (0, false);
    let dumped = dump(&bytes, |kind, rule| {
        if kind == (SUBSYS_NFTABLES << 8) | NEWRULE {
            count += 1;
            foreign |= !attributes(rule).any(|(kind, value)| kind == USERDATA && value == MARK);
        }
    });
    match dumped {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        dumped => dumped.map(|()| if foreign { 0 } else { count }),
    }
}

/// Sends a request for a list, and gives each message of the answer: its type, and what follows nfgenmsg.
pub(crate) fn dump(bytes: &[u8], mut each: impl FnMut(u16, &[u8])) -> io::Result<()> {
    let fd = open()?;
    sendto(fd.as_raw_fd(), bytes, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    let mut buffer = vec![0u8; 64 << 10];
    loop {
        // The kernel works through a dump as it is read, and there is always an end.
        let n = match recv(fd.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Ok(n) => n,
            Err(nix::errno::Errno::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
        };
        let mut rest = buffer.get(..n).unwrap_or_default();
        while let Some(kind) = rest.get(4..6).and_then(|b| b.try_into().ok()).map(u16::from_ne_bytes) {
            match (kind, first_answer(rest)) {
                (NLMSG_DONE, _) | (_, None) => return Ok(()),
                (_, Some((Some(code), _))) if code != 0 => return Err(io::Error::from_raw_os_error(-code)),
                (kind, Some((_, next))) => {
                    let len = rest.len() - next.len();
                    each(kind, rest.get(20..len).unwrap_or_default());
                    rest = next;
                }
            }
        }
    }
}

/// nlmsghdr, nfgenmsg, attributes.
pub(crate) fn message(
    out: &mut Vec<u8>,
    kind: u16,
    flags: u16,
    seq: u32,
    [family, version]: [u8; 2],
    resource: u16,
    attrs: &Attrs,
) {
    let len = u32::try_from(20 + attrs.0.len()).unwrap_or(u32::MAX);
    out.extend(len.to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend(flags.to_ne_bytes());
    out.extend(seq.to_ne_bytes());
    out.extend(0u32.to_ne_bytes());
    out.extend([family, version]);
    out.extend(resource.to_be_bytes());
    out.extend(&attrs.0);
}

fn open() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkNetFilter)?)
}

/// Sends, and reads what the kernel has answered by then: it works through a batch inside `send`.
pub(crate) fn request(bytes: &[u8]) -> io::Result<()> {
    let fd = open()?;
    if bytes.len() > 64 << 10 {
        setsockopt(&fd, sockopt::SndBufForce, &(bytes.len() * 2))?;
    }
    sendto(fd.as_raw_fd(), bytes, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    let mut acknowledged = false;
    let mut buffer = vec![0u8; 64 << 10];
    loop {
        let n = match recv(fd.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Ok(n) => n,
            Err(nix::errno::Errno::EINTR) => continue,
            Err(nix::errno::Errno::EAGAIN) => break,
            Err(errno) => return Err(errno.into()),
        };
        let Some(mut rest) = buffer.get(..n) else { break };
        while let Some((code, next)) = first_answer(rest) {
            match code {
                Some(0) => acknowledged = true,
                Some(code) => return Err(io::Error::from_raw_os_error(-code)),
                None => {}
            }
            rest = next;
        }
    }
    if acknowledged { Ok(()) } else { Err(io::Error::other("the kernel did not acknowledge the batch")) }
}

/// Types, without their flags, and values; ends where the bytes make no sense.
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let number = |at: usize| bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes);
        let (len, kind) = (usize::from(number(0)?), number(2)?);
        let value = bytes.get(4..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind & 0x3fff, value))
    })
}

/// The code of the first message if it is an NLMSG_ERROR, and the bytes behind it.
fn first_answer(bytes: &[u8]) -> Option<(Option<i32>, &[u8])> {
    let word = |at: usize| bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes);
    let len = usize::try_from(word(0)?).ok()?;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    if len < 16 || len > bytes.len() {
        return None;
    }
    let code = if kind == NLMSG_ERROR { word(16).map(u32::cast_signed) } else { None };
    Some((code, bytes.get(len.next_multiple_of(4)..).unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded() {
        let attrs = Attrs::default().text(1, "ab").be32(2, 7);
        let mut expected = Vec::new();
        expected.extend(7u16.to_ne_bytes());
        expected.extend(1u16.to_ne_bytes());
        expected.extend(b"ab\0\0");
        expected.extend(8u16.to_ne_bytes());
        expected.extend(2u16.to_ne_bytes());
        expected.extend(7u32.to_be_bytes());
        assert_eq!(attrs.0, expected);
    }

    #[test]
    fn answers_are_read_safely() {
        for len in 0..40 {
            let _ = first_answer(&vec![0xff; len]);
            let _ = first_answer(&vec![0x00; len]);
            let _ = first_answer(&vec![0x10; len]);
        }
        let mut error = Vec::new();
        error.extend(20u32.to_ne_bytes());
        error.extend(NLMSG_ERROR.to_ne_bytes());
        error.extend([0; 10]);
        error.extend((-2i32).to_ne_bytes());
        assert_eq!(first_answer(&error), Some((Some(-2), &[][..])));
    }

    #[test]
    fn a_table_comes_and_goes_and_a_bad_batch_leaves_nothing() {
        let table = format!("stave-nft-test-{}", std::process::id());
        let mut batch = Batch::default();
        batch.new_table(&table);
        batch.rule(&table, "no-such-chain", Rule::default().verdict(ACCEPT, None));
        assert!(batch.commit().is_err());
        assert!(!table_exists(Family::Inet, &table).unwrap());
        let mut batch = Batch::default();
        batch.new_table(&table);
        batch.commit().unwrap();
        assert!(table_exists(Family::Inet, &table).unwrap());
        let mut batch = Batch::default();
        batch.delete_table(&table);
        batch.commit().unwrap();
        assert!(!table_exists(Family::Inet, &table).unwrap());
    }
}

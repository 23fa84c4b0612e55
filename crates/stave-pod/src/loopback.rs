//! Bringing `lo` up in a new network namespace, by rtnetlink(7).

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

/// `lo` is the first interface of every network namespace.
const LOOPBACK_INDEX: i32 = 1;

const RTM_NEWLINK: u16 = 16;
const NLM_F_REQUEST_ACK: u16 = 1 | 4;
const NLMSG_ERROR: u16 = 2;
const IFF_UP: u32 = 1;

/// Sets `lo` up in the network namespace of this thread.
pub(crate) fn set_up() -> Result<(), Errno> {
    // No protocol is protocol 0, NETLINK_ROUTE.
    let socket =
        rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    let kernel = SocketAddrNetlink::new(0, 0);
    rustix::net::sendto(&socket, &request(), SendFlags::empty(), &kernel)?;
    let mut reply = [0u8; 256];
    // The acknowledgement is in the socket's buffer when sendto returns.
    let (count, _) = rustix::net::recv(&socket, &mut reply[..], RecvFlags::DONTWAIT)?;
    acknowledged(reply.get(..count).unwrap_or_default())
}

/// struct nlmsghdr and struct ifinfomsg: set flag IFF_UP, touch no other.
fn request() -> [u8; 32] {
    let mut message = [0; 32];
    message[0..4].copy_from_slice(&32u32.to_ne_bytes());
    message[4..6].copy_from_slice(&RTM_NEWLINK.to_ne_bytes());
    message[6..8].copy_from_slice(&NLM_F_REQUEST_ACK.to_ne_bytes());
    message[8..12].copy_from_slice(&1u32.to_ne_bytes());
    message[20..24].copy_from_slice(&LOOPBACK_INDEX.to_ne_bytes());
    message[24..28].copy_from_slice(&IFF_UP.to_ne_bytes());
    message[28..32].copy_from_slice(&IFF_UP.to_ne_bytes());
    message
}

/// struct nlmsghdr and struct nlmsgerr: 0 or a negative errno.
fn acknowledged(reply: &[u8]) -> Result<(), Errno> {
    let kind = reply.get(4..6).and_then(|bytes| bytes.try_into().ok()).map(u16::from_ne_bytes);
    let error = reply.get(16..20).and_then(|bytes| bytes.try_into().ok()).map(i32::from_ne_bytes);
    match (kind, error) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(error)) => Err(Errno::from_raw_os_error(error.saturating_neg())),
        _ => Err(Errno::PROTO),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_comes_up_in_a_new_namespace() {
        // The namespace is this thread's, and goes with it.
        std::thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("unshare needs root");
            let flags = || std::fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap_or_default();
            let reach = || {
                std::net::UdpSocket::bind("127.0.0.1:0")
                    .and_then(|socket| socket.send_to(b"x", socket.local_addr()?))
            };
            assert!(reach().is_err(), "lo starts down: {}", flags());
            set_up().expect("set up");
            assert_eq!(reach().expect("lo is up"), 1);
        })
        .join()
        .expect("thread");
    }

    #[test]
    fn replies() {
        let mut reply = [0u8; 36];
        reply[4..6].copy_from_slice(&NLMSG_ERROR.to_ne_bytes());
        assert_eq!(acknowledged(&reply), Ok(()));
        reply[16..20].copy_from_slice(&(-1i32).to_ne_bytes());
        assert_eq!(acknowledged(&reply), Err(Errno::PERM));
        assert_eq!(acknowledged(&reply[..10]), Err(Errno::PROTO));
        assert_eq!(acknowledged(&[]), Err(Errno::PROTO));
    }
}

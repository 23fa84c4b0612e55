//! Puts back what others take away: an administrator's `nft flush ruleset`, a firewall that starts anew, a deleted
//! bridge; and follows the uplink's MTU. The kernel tells of each change (nfnetlink's group of nftables, rtnetlink's of
//! links and routes); between changes this costs nothing.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, PoisonError, Weak};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;

use crate::bridge::{Inner, blocking, commit, set_up_bridge};
use crate::nft::Family;
use crate::prepared::PREFIX;
use crate::{NetworkError, link, nft, rules};

/// Others may be at it still: one look after the last of their changes, but not much later than the first.
const SETTLE: Duration = Duration::from_millis(50);
/// Pauses between attempts.
const PAUSES: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));

/// NFNLGRP_NFTABLES (7), and RTNLGRP_LINK (1), RTNLGRP_IPV4_ROUTE (7) and RTNLGRP_IPV6_ROUTE (11), as bits.
const RULES_GROUP: u32 = 1 << 6;
const LINKS_GROUPS: u32 = 1 | 1 << 6 | 1 << 10;
const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
/// RTM_NEWROUTE, RTM_DELROUTE.
const ROUTES: [u16; 2] = [24, 25];
const SUBSYS_NFTABLES: u16 = 10;
/// NFT_MSG_DELTABLE, NFT_MSG_DELCHAIN, NFT_MSG_DELRULE.
const REMOVALS: [u16; 3] = [nft::DELTABLE, 5, nft::DELRULE];

/// The task that watches; it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Keeper(pub(crate) JoinHandle<()>);

impl Keeper {
    pub(crate) fn stop(&self) {
        self.0.abort();
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Sockets that hear of changes in the network namespace of the thread that made them.
#[derive(Debug)]
pub(crate) struct Watch {
    rules: AsyncFd<OwnedFd>,
    links: AsyncFd<OwnedFd>,
}

impl Watch {
    /// Starts to listen, in the network namespace of the calling thread.
    pub(crate) fn open() -> Result<Self, NetworkError> {
        let failed =
            |source| NetworkError::Netlink { what: "listen to changes of links and nftables".into(), source };
        Ok(Self {
            rules: listen(SockProtocol::NetlinkNetFilter, RULES_GROUP).map_err(failed)?,
            links: listen(SockProtocol::NetlinkRoute, LINKS_GROUPS).map_err(failed)?,
        })
    }

    /// Starts to look after what changes, and has changed since this listens.
    pub(crate) fn keep(self, inner: &Arc<Inner>) -> Keeper {
        Keeper(tokio::spawn(run(self, Arc::downgrade(inner))))
    }

    /// Waits until something of the table, or the bridge itself, may be gone, or the uplink may be another.
    async fn change(&self, table: &str, bridge: u32, uplink: &[u32]) -> io::Result<()> {
        let mut name = table.as_bytes().to_vec();
        name.push(0);
        let of_table = |message: &[u8]| {
            let kind = number(message, 4);
            kind.is_some_and(|kind| kind >> 8 == SUBSYS_NFTABLES && REMOVALS.contains(&(kind & 0xff)))
                // The first attribute of all three is the table's name.
                && message.get(24..).is_some_and(|rest| rest.starts_with(&name))
        };
        let of_links = |message: &[u8]| {
            // The family of struct ifinfomsg: that of bridges tells of a port that leaves.
            let is = |indices: &[u32]| {
                let index = message.get(20..24).and_then(|b| b.try_into().ok()).map(u32::from_ne_bytes);
                message.get(16) == Some(&0) && index.is_some_and(|index| indices.contains(&index))
            };
            match number(message, 4) {
                Some(RTM_DELLINK) => is(&[bridge]),
                Some(RTM_NEWLINK) => is(uplink),
                // Struct rtmsg: no bits of the destination count.
                Some(kind) => ROUTES.contains(&kind) && message.get(17) == Some(&0),
                None => false,
            }
        };
        loop {
            let heard = tokio::select! {
                ready = self.rules.readable() => {
                    ready?.clear_ready();
                    hear(self.rules.get_ref(), of_table)
                }
                ready = self.links.readable() => {
                    ready?.clear_ready();
                    hear(self.links.get_ref(), of_links)
                }
            };
            if heard? {
                return Ok(());
            }
        }
    }
}

/// tokio deprecated the safe constructors because a type may change its descriptor under it. An `OwnedFd` can't.
#[allow(deprecated)]
fn listen(protocol: SockProtocol, groups: u32) -> io::Result<AsyncFd<OwnedFd>> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
    bind(fd.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
    AsyncFd::with_interest(fd, Interest::READABLE)
}

fn number(message: &[u8], at: usize) -> Option<u16> {
    message.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

/// Reads all that is there. True: one of the messages is wanted, or some were lost.
fn hear(fd: &OwnedFd, wanted: impl Fn(&[u8]) -> bool) -> io::Result<bool> {
    let mut buffer = vec![0u8; 32 << 10];
    let mut heard = false;
    loop {
        let count = match recv(fd.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Ok(count) => count,
            Err(Errno::EAGAIN) => return Ok(heard),
            Err(Errno::EINTR) => continue,
            // More than the socket holds.
            Err(Errno::ENOBUFS) => {
                heard = true;
                continue;
            }
            Err(errno) => return Err(errno.into()),
        };
        let mut rest = buffer.get(..count).unwrap_or_default();
        while let Some(len) = rest.get(..4).and_then(|b| b.try_into().ok()).map(u32::from_ne_bytes) {
            let len = usize::try_from(len).unwrap_or(usize::MAX);
            let Some(message) = rest.get(..len).filter(|message| message.len() >= 16) else { break };
            heard |= wanted(message);
            rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

async fn run(watch: Watch, inner: Weak<Inner>) {
    loop {
        let what = |inner: Arc<Inner>| {
            let uplink = inner.uplink.read().unwrap_or_else(PoisonError::into_inner).clone();
            (rules::table(&inner.name), inner.link().index, uplink)
        };
        let Some((table, bridge, uplink)) = inner.upgrade().map(what) else { return };
        if let Err(error) = watch.change(&table, bridge, &uplink).await {
            tracing::error!(%error, "nobody watches the bridge network any more");
            return;
        }
        tokio::time::sleep(SETTLE).await;
        let mut pause = PAUSES.0;
        loop {
            let Some(inner) = inner.upgrade() else { return };
            match inner.restore().await {
                Ok(()) => break,
                Err(error) => tracing::error!(%error, "restoring the bridge network"),
            }
            drop(inner);
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSES.1);
        }
    }
}

impl Inner {
    /// Makes again what is gone, and only that.
    async fn restore(self: &Arc<Self>) -> Result<(), NetworkError> {
        // The rules first: the guard must be there before the first packet.
        let inner = self.clone();
        blocking(move || inner.restore_rules().and_then(|()| inner.restore_egress())).await?;
        if !self.is_there() {
            self.restore_bridge().await?;
        }
        self.follow_uplink().await
    }

    fn restore_rules(&self) -> Result<(), NetworkError> {
        let _lock = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        let whole = rules::whole(&self.name, &self.subnets, &self.leases.published());
        let table = rules::table(&self.name);
        let there = nft::count_rules(Family::Inet, &table).map_err(|source| NetworkError::Nft {
            table: table.clone(),
            what: "list rules".into(),
            source,
        })?;
        if there == whole.rules() {
            return Ok(());
        }
        tracing::warn!(table, there, wanted = whole.rules(), "somebody took rules away; they are put back");
        commit(&self.name, "restore", whole)
    }

    async fn restore_bridge(&self) -> Result<(), NetworkError> {
        tracing::warn!(bridge = self.name, "somebody deleted the bridge; it is made again");
        let bridge = link::bridge(&self.handle(), &self.name, self.link().mtu).await?;
        set_up_bridge(&self.handle(), &bridge, &self.subnets).await?;
        self.set_link(bridge.clone());
        let found = link::all(&self.handle()).await?;
        // After that: an interface has its lease before it has its name.
        let ports: Vec<String> = self.leases.all().into_iter().map(|lease| lease.link).collect();
        for port in found {
            let ours = ports.contains(&port.name) || port.name.starts_with(PREFIX);
            if ours
                && port.controller.is_none()
                && let Err(error) = link::join(&self.handle(), &port, bridge.index).await
            {
                // It may have gone meanwhile.
                tracing::warn!(%error, "a pod's interface is not in the bridge again");
            }
        }
        Ok(())
    }
}

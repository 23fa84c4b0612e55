//! Pods that claim to be routers.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::net::{Ipv6Addr, SocketAddrV6};

use common::*;
use rustix::net::{AddressFamily, SendFlags, SocketType, ipproto, sockopt};
use stave_network::Bandwidth;

/// Tells all neighbours on eth0 of the calling thread's namespace that this is a router (RFC 4861, 4.2).
fn advertise() {
    let socket = rustix::net::socket(AddressFamily::INET6, SocketType::RAW, Some(ipproto::ICMPV6)).unwrap();
    // With any other hop limit it is ignored.
    sockopt::set_ipv6_multicast_hops(&socket, 255).unwrap();
    let index = nix::net::if_::if_nametoindex("eth0").unwrap();
    let all = SocketAddrV6::new(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1), 0, 0, index);
    // Type 134, a hop limit of 64, for 1800 s. The kernel fills the checksum in.
    let advertisement =
        [134, 0, 0, 0, 64, 0, 1800u16.to_be_bytes()[0], 1800u16.to_be_bytes()[1], 0, 0, 0, 0, 0, 0, 0, 0];
    rustix::net::sendto(&socket, &advertisement, SendFlags::empty(), &all).unwrap();
}

#[test]
fn cve_2020_10749_no_pod_becomes_the_router_of_others() {
    on_a_host(|| async {
        let (bridge, _dir) = open(&[V4, V6]).await;
        let (attacker, pod, ready, listener) = (Netns::new(), Netns::new(), Netns::new(), Netns::new());
        attach(&bridge, 'a', &attacker, &[]).await;
        attach(&bridge, 'b', &pod, &[]).await;
        let link = bridge.prepare(ready.fd()).await.unwrap();
        bridge.attach_prepared("cccccccccccccccc", link, &[], Bandwidth::default()).await.unwrap();
        attach(&bridge, 'd', &listener, &[]).await;
        // One that listens, to know that there is something to be heard.
        listener.run(|| sh("echo 1 >/proc/sys/net/ipv6/conf/eth0/accept_ra"));
        let routes = || sh("ip -6 route");
        let before = [pod.run(routes), ready.run(routes), routes()];
        within_a_second("the advertisement", || {
            attacker.run(advertise);
            listener.run(routes).contains("proto ra")
        })
        .await;
        assert_eq!([pod.run(routes), ready.run(routes), routes()], before);
        assert_eq!(sh("cat /proc/sys/net/ipv6/conf/br-test/accept_ra").trim(), "0");
    });
}

//! What of the system the container has for itself, shares within the pod, or shares with the host.

use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::path::Path;

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, recv, sendto, setsockopt, socket,
    sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use stave_e2e::Config;
use stave_e2e::cri::*;

use super::{host_pid, status_line, user};
use crate::{daemon, daemon_with_pod, sleeper};

const NAMESPACES: [&str; 8] = ["mnt", "uts", "ipc", "pid", "net", "cgroup", "user", "time"];

fn namespaces(pid: &str) -> BTreeMap<&'static str, String> {
    let link = |name: &str| fs::read_link(format!("/proc/{pid}/ns/{name}")).expect("namespace");
    NAMESPACES.iter().map(|&name| (name, link(name).to_string_lossy().into_owned())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn inodes_of_the_namespaces() {
    if stave_e2e::skipped_without("time") {
        return;
    }
    let daemon = daemon().await;
    let run_pod = async |name: &str| {
        let config = user::pod(name).with(|config| {
            config.annotations.insert("stave.dev/time-offsets".into(), "boottime=1h".into());
        });
        daemon.run_pod(config).await.expect("RunPodSandbox")
    };
    let pod = run_pod("pod").await;
    let one = daemon.run(&pod, &user::inside(sleeper("one"))).await.expect("start");
    let two = daemon.run(&pod, &user::inside(sleeper("two"))).await.expect("start");
    let other = run_pod("other").await;
    let other = daemon.run(&other, &user::inside(sleeper("other"))).await.expect("start");
    let mut seen = Vec::new();
    for id in [&one, &two, &other] {
        let outside = namespaces(&host_pid(&daemon, id).await.to_string());
        for (name, inode) in &outside {
            let inside = daemon.cri.output(id, &["readlink", &format!("/proc/1/ns/{name}")]).await;
            assert_eq!(inside.trim(), inode, "{name} is the same from both sides");
        }
        seen.push(outside);
    }
    let host = namespaces("self");
    // Name, unlike the host's, the same in all containers of the pod.
    for (name, own, of_the_pod) in [
        ("mnt", true, false),
        ("uts", true, true),
        ("ipc", true, true),
        ("pid", true, false),
        ("net", true, true),
        ("cgroup", true, false),
        ("user", true, true),
        ("time", true, true),
    ] {
        assert_eq!(
            seen[0][name] != host[name],
            own,
            "{name}: {} and the host's {}",
            seen[0][name],
            host[name]
        );
        assert_eq!(seen[0][name] == seen[1][name], of_the_pod, "{name} within the pod");
        assert_eq!(seen[0][name] != seen[2][name], own, "{name} of another pod");
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn user_and_time_are_the_hosts_unless_asked_for() {
    let (daemon, pod) = daemon_with_pod().await;
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    let pid = host_pid(&daemon, &id).await;
    for map in ["uid_map", "gid_map"] {
        let inside = daemon.cri.output(&id, &["cat", &format!("/proc/1/{map}")]).await;
        assert_eq!(inside, fs::read_to_string(format!("/proc/self/{map}")).expect(map), "{map}");
    }
    // Root inside is root outside.
    assert_eq!(daemon.cri.output(&id, &["id", "-u"]).await, "0\n");
    assert_eq!(status_line(pid, "Uid"), "0\t0\t0\t0");
    let offsets = fs::read_to_string(format!("/proc/{pid}/timens_offsets")).expect("timens_offsets");
    assert!(
        offsets.split_whitespace().filter_map(|word| word.parse::<i64>().ok()).all(|n| n == 0),
        "{offsets}"
    );
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_hostname_changes_inside_only() {
    let (daemon, pod) = daemon_with_pod().await;
    let admin = sleeper("main").with(|config| {
        config.linux.as_mut().unwrap().security_context.as_mut().unwrap().capabilities =
            Some(Capability { add_capabilities: vec!["SYS_ADMIN".into()], ..Default::default() });
    });
    let id = daemon.run(&pod, &admin).await.expect("start");
    let plain = daemon.run(&pod, &sleeper("plain")).await.expect("start");
    let outside = || nix::unistd::gethostname().expect("gethostname");
    let before = outside();
    let cri = &daemon.cri;
    assert_eq!(cri.output(&id, &["hostname"]).await, "pod\n");
    assert_ne!(before, "pod");
    cri.output(&id, &["hostname", "changed-inside"]).await;
    assert_eq!(cri.output(&id, &["hostname"]).await, "changed-inside\n");
    assert_eq!(cri.output(&plain, &["hostname"]).await, "changed-inside\n", "the UTS namespace is the pod's");
    assert_eq!(outside(), before);
    let refused = cri.exec(&plain, &["hostname", "again"]).await.expect("ExecSync");
    assert_ne!(refused.exit_code, 0, "not without CAP_SYS_ADMIN");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn inside_only_its_own_processes_and_from_the_host_all() {
    let (daemon, pod) = daemon_with_pod().await;
    let id = daemon.run(&pod, &sleeper("one")).await.expect("start");
    let other = daemon.run(&pod, &sleeper("two")).await.expect("start");
    let (pid, other_pid) = (host_pid(&daemon, &id).await, host_pid(&daemon, &other).await);
    // The shell, its sleep, and the exec itself.
    let inside =
        daemon.cri.shell(&id, "ls -d /proc/[0-9]* | wc -l; tr '\\0' ' ' </proc/1/cmdline; exit 0").await;
    let (count, command) = inside.split_once('\n').expect("two lines");
    assert!((3..=6).contains(&count.trim().parse::<u32>().expect("a count")), "{inside}");
    assert!(command.starts_with("/bin/sh -c trap"), "{inside}");
    let listing = daemon.cri.output(&id, &["ps"]).await;
    assert!(!listing.contains("stave"), "{listing}");
    for (pid, id) in [(pid, &id), (other_pid, &other)] {
        // One process, two numbers.
        let numbers = status_line(pid, "NSpid");
        assert_eq!(numbers.split_whitespace().collect::<Vec<_>>(), [pid.to_string().as_str(), "1"], "{id}");
        let command = fs::read(format!("/proc/{pid}/cmdline")).expect("cmdline");
        assert!(command.starts_with(b"/bin/sh\0-c\0trap"), "{}", String::from_utf8_lossy(&command));
        assert_eq!(daemon.cri.shell(id, &format!("test -e /proc/{pid} || echo none")).await, "none\n");
    }
    daemon.finish().await;
}

fn number(path: &Path) -> u32 {
    fs::read_to_string(path).expect("a file of /sys").trim().parse().expect("a number")
}

/// An echo request from the host, and its reply.
fn ping(address: Ipv4Addr) -> bool {
    let socket = socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Icmp)
        .expect("socket");
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(1)).expect("timeout");
    let [a, b, c, d] = address.octets();
    let id = (std::process::id() as u16).to_be_bytes();
    let end = std::time::Instant::now() + stave_e2e::limit(10);
    while std::time::Instant::now() < end {
        // Type 8, code 0, checksum, id, sequence number 1.
        let mut packet = [8, 0, 0, 0, id[0], id[1], 0, 1];
        let words =
            packet.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum::<u32>();
        let sum = !((words & 0xffff) + (words >> 16)) as u16;
        packet[2..4].copy_from_slice(&sum.to_be_bytes());
        sendto(socket.as_raw_fd(), &packet, &SockaddrIn::new(a, b, c, d, 0), MsgFlags::empty())
            .expect("sendto");
        let mut buffer = [0; 256];
        // The reply comes with its IPv4 header: source at 12. A raw socket gets everybody's.
        while let Ok(count) = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            let header = usize::from(buffer[0] & 15) * 4;
            let reply = &buffer[header..count];
            if buffer[12..16] == [a, b, c, d] && reply[0] == 0 && reply[4..6] == id {
                return true;
            }
        }
    }
    false
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pair_of_devices_connects_both_sides() {
    let (daemon, pod) = daemon_with_pod().await;
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    let cri = &daemon.cri;
    let read = async |file: &str| -> u32 {
        cri.output(&id, &["cat", &format!("/sys/class/net/eth0/{file}")])
            .await
            .trim()
            .parse()
            .expect("a number")
    };
    let (own, peer) = (read("ifindex").await, read("iflink").await);
    let device = fs::read_dir("/sys/class/net")
        .expect("/sys/class/net")
        .map(|entry| entry.expect("entry").path())
        .find(|path| number(&path.join("ifindex")) == peer)
        .expect("the other end, on the host");
    assert_eq!(number(&device.join("iflink")), own, "{}", device.display());
    let bridge = fs::read_link(device.join("master")).expect("a bridge");
    assert_eq!(bridge.file_name().and_then(|name| name.to_str()), Some(daemon.bridge().as_str()));

    let address = cri.shell(&id, "ip -4 addr show eth0 | sed -n 's/.*inet \\([0-9.]*\\).*/\\1/p'").await;
    let address: Ipv4Addr = address.trim().parse().expect("an address");
    let gateway = cri.shell(&id, "ip route | sed -n 's/^default via \\([0-9.]*\\).*/\\1/p'").await;
    let answer = cri.output(&id, &["ping", "-c", "3", "-W", "5", gateway.trim()]).await;
    assert!(answer.contains("bytes from"), "{answer}");
    assert!(tokio::task::spawn_blocking(move || ping(address)).await.expect("ping"), "from the host");
    daemon.finish().await;
}

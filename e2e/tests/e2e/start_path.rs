//! The start path runs no program but the supervisor and what the container is for: told by the kernel's process
//! connector, which misses none, however short it lives.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::netlink::{CONNECTOR, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, sockopt};
use stave_e2e::cri::{PortMapping, Protocol};
use stave_e2e::{Daemon, Options, pod};

use crate::{busybox, sleeper};

/// CN_IDX_PROC, which is the group too, and CN_VAL_PROC (linux/connector.h).
const CN_PROC: [u32; 2] = [1, 1];
/// PROC_CN_MCAST_LISTEN (linux/cn_proc.h).
const LISTEN: u32 = 1;
/// PROC_EVENT_FORK and PROC_EVENT_EXEC.
const FORK: u32 = 1;
const EXEC: u32 = 2;
/// Of `struct nlmsghdr` and `struct cn_msg`; the event's own data comes after what, cpu and time.
const HEADERS: usize = 16 + 20;
const DATA: usize = HEADERS + 16;

/// What the kernel told of processes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Event {
    Fork { parent: u32, child: u32 },
    Exec(u32),
}

/// Listens until it is asked for what it heard.
struct Listener {
    done: Arc<AtomicBool>,
    thread: JoinHandle<Vec<Event>>,
}

impl Listener {
    fn start() -> Listener {
        let socket = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC,
            Some(CONNECTOR),
        )
        .expect("a socket of the process connector (CONFIG_PROC_EVENTS)");
        rustix::net::bind(&socket, &SocketAddrNetlink::new(0, CN_PROC[0])).expect("bind");
        // Other tests start processes as well.
        sockopt::set_socket_recv_buffer_size_force(&socket, 16 << 20).expect("SO_RCVBUFFORCE");
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(Duration::from_millis(100)))
            .expect("SO_RCVTIMEO");
        let words: [u32; 10] = [40, 3, 0, 0, CN_PROC[0], CN_PROC[1], 0, 0, 4, LISTEN];
        let message: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        rustix::net::send(&socket, &message, SendFlags::empty()).expect("listening to processes");
        let done = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let done = Arc::clone(&done);
            move || hear(&socket, &done)
        });
        Listener { done, thread }
    }

    fn stop(self) -> Vec<Event> {
        self.done.store(true, Ordering::Release);
        self.thread.join().expect("the listener")
    }
}

fn hear(socket: &OwnedFd, done: &AtomicBool) -> Vec<Event> {
    let mut events = Vec::new();
    let mut buffer = [0u8; 4096];
    loop {
        match rustix::net::recv(socket, &mut buffer[..], RecvFlags::empty()) {
            Ok((count, _)) => events.extend(event(&buffer[..count])),
            Err(Errno::INTR) => {}
            // Quiet for a while: all that was to be heard has been.
            Err(Errno::AGAIN) if done.load(Ordering::Acquire) => return events,
            Err(Errno::AGAIN) => {}
            Err(error) => panic!("the process connector: {error}"),
        }
    }
}

fn event(message: &[u8]) -> Option<Event> {
    let word = |at: usize| Some(u32::from_ne_bytes(message.get(at..at + 4)?.try_into().ok()?));
    match word(HEADERS)? {
        // parent_pid, parent_tgid, child_pid, child_tgid: a new thread has the tgid of its process.
        FORK if word(DATA + 8)? == word(DATA + 12)? => {
            Some(Event::Fork { parent: word(DATA + 4)?, child: word(DATA + 12)? })
        }
        // process_pid, process_tgid
        EXEC => Some(Event::Exec(word(DATA + 4)?)),
        _ => None,
    }
}

/// Who of a daemon's descendants executed a program, in order.
fn programs(daemon: u32, events: &[Event]) -> Vec<u32> {
    let mut family = BTreeSet::from([daemon]);
    let mut programs = Vec::new();
    for event in events {
        match *event {
            Event::Fork { parent, child } if family.contains(&parent) => drop(family.insert(child)),
            Event::Exec(pid) if family.contains(&pid) => programs.push(pid),
            _ => {}
        }
    }
    programs
}

#[tokio::test(flavor = "multi_thread")]
async fn the_start_path_runs_no_external_program() {
    if let Some(runtime) = stave_e2e::oci_runtime() {
        eprintln!("SKIPPED: the start path without a program: {} is one", runtime.display());
        return;
    }
    // A ready supervisor is started beside a pod; the pool has tests of its own.
    let options = Options { config: "\n[pods]\nready = 0\n".to_owned(), ..Default::default() };
    let daemon = Daemon::with(options).await;
    daemon.cri.pull(&busybox()).await.expect("PullImage");

    let listener = Listener::start();
    let mut config = pod("pod");
    // All that one might leave to `ip`, `nft`, `tc`, `sysctl` and `mount`.
    config.port_mappings = vec![PortMapping {
        protocol: Protocol::Tcp as i32,
        container_port: 80,
        host_port: 28473,
        ..Default::default()
    }];
    for direction in ["ingress", "egress"] {
        config.annotations.insert(format!("kubernetes.io/{direction}-bandwidth"), "10M".to_owned());
    }
    let sysctl = ("net.ipv4.ip_unprivileged_port_start".to_owned(), "0".to_owned());
    config.linux.as_mut().expect("linux").sysctls = [sysctl].into();
    let pod = daemon.run_pod(config).await.expect("RunPodSandbox");
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    let supervisor = crate::crash::supervisor(&pod.id).expect("supervisor").as_raw() as u32;
    let init = children(supervisor);
    let result = daemon.cri.exec(&id, &["true"]).await.expect("ExecSync");
    assert_eq!(result.exit_code, 0);
    daemon.cri.stop_pod(&pod.id).await.expect("StopPodSandbox");
    daemon.cri.remove_pod(&pod.id).await.expect("RemovePodSandbox");
    let events = listener.stop();

    let programs = programs(daemon.pid(), &events);
    // The shell of the container runs `sleep`, by itself and in its own time.
    let [init] = init[..] else { panic!("the supervisor has {init:?}") };
    let of_init: BTreeSet<u32> = descendants(init, &events);
    let ours: Vec<u32> = programs.into_iter().filter(|pid| !of_init.contains(pid)).collect();
    assert_eq!(ours.len(), 3, "supervisor {supervisor}, init {init}, an exec: {ours:?}");
    assert_eq!(ours[..2], [supervisor, init]);
    daemon.finish().await;
}

fn children(pid: u32) -> Vec<u32> {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).expect("children");
    children.split_whitespace().map(|pid| pid.parse().expect("a pid")).collect()
}

/// Without `pid` itself.
fn descendants(pid: u32, events: &[Event]) -> BTreeSet<u32> {
    let mut family = BTreeSet::from([pid]);
    for event in events {
        if let Event::Fork { parent, child } = event
            && family.contains(parent)
        {
            family.insert(*child);
        }
    }
    family.remove(&pid);
    family
}

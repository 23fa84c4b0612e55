//! Hello, set-up, and what a daemon that comes and goes sees.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use common::{Pod, failure, wait_for};
use stave_supervisor_proto::VERSION;
use stave_supervisor_proto::v1::failure::Kind;
use stave_supervisor_proto::v1::packet::Body;
use stave_supervisor_proto::v1::request::Call;
use stave_supervisor_proto::v1::*;

#[test]
fn hello_comes_first_and_in_a_version_that_both_speak() {
    let mut pod = Pod::spawn();
    pod.connect_silently();
    let refusal = pod.fails(Call::ListContainers(ListContainers {}));
    assert_eq!(refusal.kind(), Kind::FailedPrecondition);
    for version in [0, VERSION + 1, u32::MAX] {
        let refusal = pod.fails(Call::Hello(Hello { version }));
        assert_eq!(refusal.kind(), Kind::FailedPrecondition);
        assert!(refusal.message.contains(&format!("version {version}:")), "{}", refusal.message);
    }
    let refusal = pod.fails(Call::ListContainers(ListContainers {}));
    assert_eq!(refusal.kind(), Kind::FailedPrecondition, "a refused Hello is none");
    let reply = pod.connect();
    assert_eq!((reply.version, reply.pod_id.as_str(), reply.set_up), (VERSION, "pod1", false));
    assert_eq!(reply.pid as u32, pod.pid());
    assert!(!reply.build.is_empty());
    assert!(pod.list().is_empty());
}

#[test]
fn the_newest_connection_wins() {
    let mut pod = Pod::greeted();
    let old = pod.disconnect().unwrap();
    pod.connect();
    common::wait_readable(&old, common::LIMIT).expect("the old connection is closed");
    assert!(stave_wire::recv(std::os::fd::AsFd::as_fd(&old)).unwrap().is_none());
    assert!(pod.list().is_empty());
}

#[test]
fn nonsense_closes_the_connection_and_harms_nothing() {
    let mut pod = Pod::greeted();
    pod.send_raw(&[0xff; 30]);
    assert!(pod.receive(common::LIMIT).is_none());
    pod.connect();
    pod.send_raw(&[]); // a request without a number
    assert!(pod.receive(common::LIMIT).is_none());
    pod.connect();
    pod.send_raw(&[0x08, 0x07]); // number 7, no call
    assert_eq!(failure(pod.reply(7)).kind(), Kind::InvalidArgument);
    assert!(pod.list().is_empty());
}

#[test]
fn a_daemon_that_does_not_read_is_left() {
    let mut pod = Pod::ready();
    pod.run("c1", "sleep 0.1; exit 4");
    let sent = (0..100_000).find(|_| !pod.try_send(Call::ListContainers(ListContainers {})));
    assert!(sent.expect("the connection is closed") > 1000);
    pod.connect();
    assert_eq!(pod.exit("c1").exit_code, 4, "nothing that counts is lost");
    assert_eq!(pod.list().len(), 1);
}

#[test]
fn set_up_makes_namespaces() {
    let mut pod = Pod::greeted();
    let sysctls = [("net.ipv4.ip_local_port_range", "2000 3000"), ("kernel.shmmax", "123456")];
    let request = SetUpPod {
        new_network_namespace: true,
        new_ipc_namespace: true,
        new_uts_namespace: true,
        hostname: "stave-test".into(),
        sysctls: sysctls.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
        ..Default::default()
    };
    let network = std::fs::File::from(pod.set_up(request.clone()));
    let inode = network.metadata().unwrap().ino();
    let namespace =
        |process: &str, name: &str| std::fs::metadata(format!("/proc/{process}/ns/{name}")).unwrap().ino();
    let supervisor = pod.pid().to_string();
    assert_eq!(inode, namespace(&supervisor, "net"));
    for name in ["net", "ipc", "uts"] {
        assert_ne!(namespace(&supervisor, name), namespace("self", name), "{name}");
    }
    for name in ["mnt", "pid", "user", "cgroup"] {
        assert_eq!(namespace(&supervisor, name), namespace("self", name), "{name}");
    }
    let repeated = std::fs::File::from(pod.set_up(request.clone()));
    assert_eq!(repeated.metadata().unwrap().ino(), inode);
    let other = SetUpPod { hostname: "other".into(), ..request };
    assert_eq!(pod.fails(Call::SetUpPod(other)).kind(), Kind::FailedPrecondition);
    assert!(pod.connect().set_up);

    let script = "cat /proc/sys/kernel/hostname /proc/sys/kernel/shmmax /proc/sys/net/ipv4/ip_local_port_range; \
                  cat /proc/net/if_inet6 /proc/net/route; busybox ip -o link show lo; busybox ping -c1 127.0.0.1 >/dev/null && echo pinged";
    let mut plan = pod.plan("c1", &["/bin/sh", "-c", script]);
    let all = Some(Capabilities {
        bounding: 1 << 13,
        effective: 1 << 13,
        permitted: 1 << 13,
        ..Default::default()
    });
    plan.process.as_mut().unwrap().capabilities = all; // CAP_NET_RAW
    pod.create(plan);
    pod.start("c1");
    pod.exit("c1");
    let log: Vec<String> = pod.log("c1").into_iter().map(|line| line.content).collect();
    assert_eq!(log[..3], ["stave-test", "123456", "2000\t3000"]);
    assert!(log.iter().any(|line| line.contains("LOOPBACK,UP")), "{log:?}");
    assert_eq!(log.last().unwrap(), "pinged", "{log:?}");
}

#[test]
fn a_pod_on_the_node_s_namespaces() {
    let hostname = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let mut pod = Pod::greeted();
    for (key, value) in [("kernel.panic", "0"), ("net.ipv4.ip_forward", "0"), ("kernel.shmmax", "1")] {
        let sysctls = [(key.to_owned(), value.to_owned())].into();
        let refusal = pod.fails(Call::SetUpPod(SetUpPod { sysctls, ..Default::default() }));
        assert_eq!(refusal.kind(), Kind::InvalidArgument, "{key}");
        assert!(refusal.message.contains(key), "{}", refusal.message);
    }
    // A refusal has changed nothing, so the pod can still be set up.
    let network = pod.set_up(SetUpPod { hostname: "must-not-be-set".into(), ..Default::default() });
    let inode = std::fs::File::from(network).metadata().unwrap().ino();
    assert_eq!(inode, std::fs::metadata("/proc/self/ns/net").unwrap().ino());
    assert_eq!(std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap(), hostname);
}

#[test]
fn a_failed_set_up_is_final() {
    let mut pod = Pod::greeted();
    let sysctls = [("net.ipv4.no_such_thing".to_owned(), "1".to_owned())].into();
    let request = SetUpPod { new_network_namespace: true, sysctls, ..Default::default() };
    let error = pod.fails(Call::SetUpPod(request));
    assert!(error.message.contains("net.ipv4.no_such_thing") && error.errno == 2, "{error:?}");
    assert_eq!(pod.fails(Call::SetUpPod(SetUpPod::default())).kind(), Kind::FailedPrecondition);
    assert!(!pod.connect().set_up);
    let call = pod.create_call(pod.plan("c1", &["/bin/true"]));
    assert_eq!(pod.fails(call).kind(), Kind::FailedPrecondition);
}

#[test]
fn signals_and_idleness_do_not_end_it() {
    let mut pod = Pod::ready();
    pod.run("c1", "sleep 1000");
    let pidfd = rustix::process::pidfd_open(
        rustix::process::Pid::from_raw(pod.pid() as i32).unwrap(),
        rustix::process::PidfdFlags::empty(),
    )
    .unwrap();
    use rustix::process::Signal;
    for signal in [Signal::TERM, Signal::INT, Signal::HUP, Signal::PIPE, Signal::QUIT, Signal::USR1] {
        rustix::process::pidfd_send_signal(&pidfd, signal).unwrap();
    }
    drop(pod.disconnect());
    std::thread::sleep(Duration::from_millis(100));
    assert!(pod.connect().set_up);
    assert_eq!(pod.entry("c1").state(), container_entry::State::Running);
}

#[test]
fn an_idle_supervisor_is_small_and_uses_no_time() {
    let mut pod = Pod::ready();
    pod.run("c1", "yes 0123456789 | head -c 3000000; echo end; sleep 1000");
    pod.wait_for_output("c1", "end");
    let of = |name: &str| std::fs::read_to_string(format!("/proc/{}/{name}", pod.pid())).unwrap();
    let private: u64 = of("smaps_rollup")
        .lines()
        .filter(|line| line.starts_with("Private_Dirty:"))
        .filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok())
        .sum();
    assert!(private < 1024, "{private} KiB of private memory");
    // Fields 14 and 15, counted from behind the name: utime and stime.
    let ticks = || -> u64 {
        let stat = of("stat");
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    };
    let before = ticks();
    std::thread::sleep(Duration::from_millis(500));
    assert!(ticks() - before <= 1, "it spins");
}

#[test]
fn shutdown_leaves_no_process() {
    let mut pod = Pod::greeted();
    pod.set_up(SetUpPod { new_network_namespace: true, pod_pid_namespace: true, ..Default::default() });
    for (id, namespace) in
        [("own", PidNamespace::Container), ("pod", PidNamespace::Pod), ("node", PidNamespace::Node)]
    {
        let mut plan =
            pod.plan(id, &["/bin/sh", "-c", "(sleep 1000 &) ; trap '' TERM; sleep 1000 & wait; wait"]);
        plan.pid_namespace = namespace.into();
        pod.create(plan);
        pod.start(id);
    }
    pod.create(pod.plan("created", &["/bin/true"]));
    wait_for("all processes", || pod.pids().len() >= 10);
    // Its output is waited for, so that the calls behind the first Shutdown arrive before the end.
    let path = format!("/proc/{}/fd/1", pod.entry("own").pid);
    let _held = std::fs::File::options().write(true).open(path).unwrap();
    let seq = pod.send(Call::Shutdown(Shutdown {}), &[]);
    let again = pod.send(Call::Shutdown(Shutdown {}), &[]);
    let refused = pod.create_call(pod.plan("late", &["/bin/true"]));
    let refused = pod.send(refused, &[]);
    let (mut exits, mut replies) = (Vec::new(), Vec::new());
    while let Some(packet) = pod.receive(common::LIMIT) {
        match packet.body.unwrap() {
            Body::ContainerExit(exit) => exits.push((exit.container_id, exit.exit_code)),
            Body::Done(_) => replies.push(packet.seq),
            Body::Failure(failure) => {
                assert_eq!((packet.seq, failure.kind()), (refused, Kind::FailedPrecondition));
            }
            other => panic!("{other:?}"),
        }
    }
    exits.sort();
    assert_eq!(exits, ["created", "node", "own", "pod"].map(|id| (id.to_owned(), 137)));
    assert_eq!(replies, [seq, again]);
    assert!(pod.pids().is_empty());
    assert!(pod.wait().success());
    assert!(!pod.dir.path().join("supervisor.sock").exists());
    assert_eq!(pod.exit_record("own").unwrap().exit_code, 137, "nobody has acknowledged it");
}

#[test]
fn bad_starts_are_refused() {
    let run = |args: &[&str]| {
        std::process::Command::new(env!("CARGO_BIN_EXE_stave-pod"))
            .args(args)
            .stdin(std::process::Stdio::null())
            .output()
            .unwrap()
    };
    assert_eq!(run(&[]).status.code(), Some(2));
    assert!(run(&["--version"]).status.success());
    let output = run(&["--id", "x", "--dir", "/nonexistent"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("descriptor 0"));
}

//! PID namespaces: the container's, the pod's, the node's.

use std::fs;
use std::os::fd::AsFd;

use stave_supervisor_proto::v1::PidNamespace;

use crate::Case;
use crate::bundle::{Bundle, Status, kill, process, wait};

pub const CASES: &[Case] = &[
    ("of_the_container", of_the_container),
    ("of_the_pod", of_the_pod),
    ("the_pods_init_shows_nothing", the_pods_init_shows_nothing),
    ("the_pods_init_reaps", the_pods_init_reaps),
    ("the_pods_init_takes_all_with_it", the_pods_init_takes_all_with_it),
    ("of_the_node", of_the_node),
    ("of_another_container", of_another_container),
];

fn of_the_container() {
    let mut bundle = Bundle::new();
    assert_eq!(bundle.sh("echo $$; echo /proc/[0-9]*").output(), "1\n/proc/1\n");
}

fn of_the_pod() {
    let pod = stave_executor::pod_init().unwrap();
    let mut first = Bundle::new();
    let mut second = Bundle::new();
    for bundle in [&mut first, &mut second] {
        bundle.plan.pid_namespace = PidNamespace::Pod.into();
    }
    let (a, out) = first.sh("echo $$; sleep 1234").start(Some(pod.pid_ns.as_fd())).unwrap();
    assert_ne!(out.line(), "1");
    let (b, out) = second.sh("ps -o pid,args; cat /proc/1/comm").start(Some(pod.pid_ns.as_fd())).unwrap();
    let output = out.collect(&b);
    assert!(output.stdout.contains("sleep 1234"), "{}", output.stdout);
    assert!(output.stdout.ends_with("pod-init\n"), "{}", output.stdout);
    // A container in it ends alone; a further process joins it.
    let output = first.exec(&a, &process(&["ps", "-o", "args"])).unwrap();
    assert!(output.stdout.contains("sleep 1234"), "{}", output.stdout);
    kill(&a);
    assert!(rustix::process::pidfd_send_signal(&pod.pidfd, rustix::process::Signal::KILL).is_ok());
    assert_eq!(wait(pod.pidfd.as_fd()), Status::Signalled(libc::SIGKILL));
    // The namespace can't be used any more.
    let error = second.start(Some(pod.pid_ns.as_fd())).map(drop).unwrap_err();
    assert!(error.message.contains("has ended"), "{error}");
}

fn the_pods_init_shows_nothing() {
    let _leak = fs::File::open("/etc").unwrap();
    let pod = stave_executor::pod_init().unwrap();
    let dir = format!("/proc/{}", pod.pid);
    assert_eq!(fs::read_dir(format!("{dir}/fd")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(format!("{dir}/root")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(format!("{dir}/cwd")).unwrap().count(), 0);
    assert_eq!(fs::read_to_string(format!("{dir}/mountinfo")).unwrap().lines().count(), 1);
    let status = fs::read_to_string(format!("{dir}/status")).unwrap();
    for set in ["CapPrm", "CapEff", "CapInh", "CapAmb"] {
        assert_eq!(crate::bundle::field(&status, set), "0000000000000000");
    }
    // From a container that may trace.
    let mut bundle = Bundle::new();
    bundle.plan.pid_namespace = PidNamespace::Pod.into();
    let (init, out) = bundle
        .sh("readlink /proc/1/exe; ls /proc/1/fd; ls /proc/1/root; cat /proc/1/environ; kill -9 1; kill -15 1; cat /proc/1/comm")
        .start(Some(pod.pid_ns.as_fd()))
        .unwrap();
    assert_eq!(out.collect(&init).stdout, "pod-init\n");
    rustix::process::pidfd_send_signal(&pod.pidfd, rustix::process::Signal::KILL).unwrap();
    wait(pod.pidfd.as_fd());
}

fn the_pods_init_reaps() {
    let pod = stave_executor::pod_init().unwrap();
    let mut bundle = Bundle::new();
    bundle.plan.pid_namespace = PidNamespace::Pod.into();
    let script = "for i in 1 2 3 4 5 6 7 8; do (sh -c 'sleep 0.05' &) ; done; sleep 0.4; ps -o stat,args; cat /proc/[0-9]*/stat";
    let (init, out) = bundle.sh(script).start(Some(pod.pid_ns.as_fd())).unwrap();
    let output = out.collect(&init);
    assert_eq!(output.status, Status::Exited(0));
    assert!(!output.stdout.contains(") Z "), "{}", output.stdout);
    rustix::process::pidfd_send_signal(&pod.pidfd, rustix::process::Signal::KILL).unwrap();
    wait(pod.pidfd.as_fd());
}

fn the_pods_init_takes_all_with_it() {
    let pod = stave_executor::pod_init().unwrap();
    let mut bundle = Bundle::new();
    bundle.plan.pid_namespace = PidNamespace::Pod.into();
    let (init, _out) = bundle.sh("sleep 1000").start(Some(pod.pid_ns.as_fd())).unwrap();
    rustix::process::pidfd_send_signal(&pod.pidfd, rustix::process::Signal::KILL).unwrap();
    assert_eq!(wait(init.pidfd()), Status::Signalled(libc::SIGKILL));
    wait(pod.pidfd.as_fd());
}

fn of_the_node() {
    let mut bundle = Bundle::new();
    bundle.plan.pid_namespace = PidNamespace::Node.into();
    let (init, out) = bundle.sh("echo $$; readlink /proc/self/ns/pid").start(None).unwrap();
    let pid = init.pid();
    let own = fs::read_link("/proc/self/ns/pid").unwrap();
    assert_eq!(out.collect(&init).stdout, format!("{pid}\n{}\n", own.display()));
}

fn of_another_container() {
    let mut target = Bundle::new();
    let (init, _out) = target.sh("sleep 4321").start(None).unwrap();
    let mut debug = Bundle::new();
    debug.plan.pid_namespace = PidNamespace::Target.into();
    let error = debug.failure();
    assert!(error.message.contains("PID namespace"), "{error}");
    let script = "echo $$; cat /proc/1/comm; ps -o args; readlink /proc/1/root";
    let (second, out) = debug.sh(script).start(Some(init.pidfd())).unwrap();
    let output = out.collect(&second);
    assert!(!output.stdout.starts_with("1\n"), "{}", output.stdout);
    assert!(output.stdout.contains("sleep 4321"), "{}", output.stdout);
    // It does not go on without its target.
    let (third, _out) = debug.sh("sleep 1000").start(Some(init.pidfd())).unwrap();
    rustix::process::pidfd_send_signal(init.pidfd(), rustix::process::Signal::KILL).unwrap();
    // The kernel holds PID 1 back until all others are reaped.
    assert_eq!(wait(third.pidfd()), Status::Signalled(libc::SIGKILL));
    assert_eq!(wait(init.pidfd()), Status::Signalled(libc::SIGKILL));
    let error = debug.start(Some(init.pidfd())).map(drop).unwrap_err();
    assert!(error.message.contains("has ended"), "{error}");
}

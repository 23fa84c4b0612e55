//! Further processes in containers.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use common::Pod;
use stave_supervisor_proto::v1::failure::Kind;
use stave_supervisor_proto::v1::packet::Body;
use stave_supervisor_proto::v1::request::Call;
use stave_supervisor_proto::v1::*;

/// The test's ends of an exec's output.
struct Output {
    stdout: OwnedFd,
    stderr: OwnedFd,
}

impl Output {
    fn read(self) -> (String, String) {
        let text = |fd| {
            let mut text = String::new();
            std::fs::File::from(fd).read_to_string(&mut text).unwrap();
            text
        };
        (text(self.stdout), text(self.stderr))
    }
}

fn exec_with(pod: &mut Pod, exec: Exec) -> (Body, Output) {
    let null = std::fs::File::open("/dev/null").unwrap();
    let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let ((stdout, out), (stderr, err)) = (pipe(), pipe());
    let reply = pod.call_with(Call::Exec(exec), &[null.as_fd(), out.as_fd(), err.as_fd()]);
    (reply, Output { stdout, stderr })
}

fn exec_call(id: &str, container: &str, script: &str, timeout_ms: u64) -> Exec {
    Exec {
        exec_id: id.into(),
        container_id: container.into(),
        process: Some(common::process(&["/bin/sh", "-c", script])),
        timeout_ms,
        oci: None,
        reply_at_exit: false,
    }
}

fn exec(pod: &mut Pod, id: &str, script: &str, timeout_ms: u64) -> Output {
    let (reply, output) = exec_with(pod, exec_call(id, "c1", script, timeout_ms));
    assert!(matches!(reply, Body::ExecStarted(ExecStarted { pid }) if pid > 0), "{reply:?}");
    output
}

fn exit(pod: &mut Pod, id: &str) -> ExecExit {
    match pod.event() {
        Body::ExecExit(exit) if exit.exec_id == id => exit,
        other => panic!("{other:?}"),
    }
}

/// One leaf at most is kept right after the end is told, and it is empty.
fn assert_at_rest(pod: &Pod) {
    let end = std::time::Instant::now() + Duration::from_secs(2);
    let at_rest = || {
        let leaves = leaves(pod);
        let empty = |leaf: &PathBuf| {
            std::fs::read_to_string(leaf.join("cgroup.procs")).is_ok_and(|procs| procs.is_empty())
        };
        leaves.len() <= 1 && leaves.iter().all(empty)
    };
    while !at_rest() {
        assert!(std::time::Instant::now() < end, "leaves stay: {:?}", leaves(pod));
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn leaves(pod: &Pod) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(pod.cgroup.join("c1")).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with("exec-")).collect()
}

fn running() -> Pod {
    let mut pod = Pod::ready();
    pod.run("c1", "echo ready; sleep 1000");
    pod.wait_for_output("c1", "ready");
    pod
}

#[test]
fn output_and_exit_code() {
    let mut pod = running();
    let output = exec(&mut pod, "e1", "echo out; echo err >&2; readlink /proc/self/ns/pid; exit 3", 0);
    assert_eq!(exit(&mut pod, "e1"), ExecExit { exec_id: "e1".into(), exit_code: 3, timed_out: false });
    let (out, err) = output.read();
    let pid = pod.entry("c1").pid;
    let namespace = std::fs::read_link(format!("/proc/{pid}/ns/pid")).unwrap();
    assert_eq!(out, format!("out\n{}\n", namespace.display()));
    assert_eq!(err, "err\n");
    assert_eq!(pod.log("c1").len(), 1, "it is no output of the container");

    exec(&mut pod, "e1", "kill -TERM $$", 0);
    assert_eq!(exit(&mut pod, "e1").exit_code, 143, "an id can be used again");
    assert_at_rest(&pod);
    assert_eq!(pod.children().len(), 1);
}

#[test]
fn what_can_not_be_executed() {
    let mut pod = running();
    let mut call = exec_call("e1", "c1", "", 0);
    call.process = Some(common::process(&["no-such-command"]));
    let (reply, output) = exec_with(&mut pod, call.clone());
    let error = common::failure(reply);
    assert!(error.message.contains("no-such-command"), "{error:?}");
    assert_eq!(output.read(), (String::new(), String::new()));
    assert_at_rest(&pod);
    pod.assert_silent(Duration::from_millis(50));

    let missing = Exec { container_id: "nope".into(), ..call.clone() };
    assert_eq!(common::failure(exec_with(&mut pod, missing).0).kind(), Kind::NotFound);
    let bad_id = Exec { exec_id: "../x".into(), ..call.clone() };
    assert_eq!(common::failure(exec_with(&mut pod, bad_id).0).kind(), Kind::InvalidArgument);
    let no_process = Exec { process: None, ..call.clone() };
    assert_eq!(common::failure(exec_with(&mut pod, no_process).0).kind(), Kind::InvalidArgument);
    assert_eq!(pod.fails(Call::Exec(call.clone())).kind(), Kind::InvalidArgument, "no descriptors");

    pod.create(pod.plan("c2", &["/bin/true"]));
    let created = Exec { container_id: "c2".into(), ..call.clone() };
    assert_eq!(common::failure(exec_with(&mut pod, created).0).kind(), Kind::FailedPrecondition);
    pod.kill("c1");
    assert_eq!(common::failure(exec_with(&mut pod, call).0).kind(), Kind::FailedPrecondition);
}

#[test]
fn the_exit_may_be_the_reply() {
    let mut pod = running();
    let ask = |pod: &mut Pod, script: &str, timeout_ms| {
        let call = Exec { reply_at_exit: true, ..exec_call("e1", "c1", script, timeout_ms) };
        let (reply, output) = exec_with(pod, call);
        (reply, output.read().0)
    };
    let exit = |exit_code, timed_out| Body::ExecExit(ExecExit { exec_id: "e1".into(), exit_code, timed_out });
    assert_eq!(ask(&mut pod, "echo a; exit 3", 0), (exit(3, false), "a\n".into()));
    assert_eq!(ask(&mut pod, "sleep 1000 & sleep 1000", 200), (exit(137, true), String::new()));

    let missing = Exec {
        process: Some(common::process(&["no-such-command"])),
        reply_at_exit: true,
        ..exec_call("e1", "c1", "", 0)
    };
    let error = common::failure(exec_with(&mut pod, missing).0);
    assert!(error.message.contains("no-such-command"), "{error:?}");

    // It is no event as well.
    pod.assert_silent(Duration::from_millis(50));
    assert_at_rest(&pod);
    assert_eq!(pod.children().len(), 1);
}

/// What was killed would kill whatever comes into it.
#[test]
fn the_next_exec_has_the_leaf_unless_it_was_killed() {
    let mut pod = running();
    let show = "grep ^0:: /proc/self/cgroup";
    let last = |path: &str| path.trim().rsplit('/').next().unwrap().to_owned();
    let mut leaf_of = |id: &str, script: &str, timeout| {
        let output = exec(&mut pod, id, script, timeout);
        let exit = exit(&mut pod, id);
        // It is given back right after that is told, and with the next reply at the latest.
        pod.list();
        (exit.exit_code, last(&output.read().0))
    };
    for id in ["e1", "e2", "e1"] {
        assert_eq!(leaf_of(id, show, 5000), (0, "exec-e1".into()));
    }
    assert_eq!(leaf_of("e3", &format!("{show}; sleep 1000"), 200), (137, "exec-e1".into()));
    assert_eq!(leaf_of("e4", show, 5000), (0, "exec-e4".into()));
    // The name of a leaf that another process is in.
    exec(&mut pod, "e5", "sleep 1000", 0);
    let output = exec(&mut pod, "e4", show, 0);
    assert_eq!(exit(&mut pod, "e4").exit_code, 0);
    assert_eq!(last(&output.read().0), "exec-e4.1");
    pod.kill_exec_and_wait("e5");
}

#[test]
fn a_timeout_kills_the_process_and_its_descendants() {
    let mut pod = running();
    let before = pod.pids().len();
    let start = Instant::now();
    let output = exec(&mut pod, "e1", "(sleep 1000 &) ; busybox setsid sleep 1000 & sleep 1000", 400);
    common::wait_for("all processes", || pod.pids().len() >= before + 3);
    let exit = exit(&mut pod, "e1");
    assert_eq!((exit.exit_code, exit.timed_out), (137, true));
    assert!(start.elapsed() >= Duration::from_millis(400) && start.elapsed() < Duration::from_secs(3));
    output.read(); // Ends only when no descendant holds the pipe.
    // Those that have ended may still be to be reaped.
    common::wait_for("the end of all", || pod.pids().len() == before);
    assert_eq!(pod.entry("c1").state(), container_entry::State::Running);
}

#[test]
fn a_kill_does_the_same() {
    let mut pod = running();
    let output = exec(&mut pod, "e1", "sleep 1000 & sleep 1000", 0);
    pod.done(Call::KillExec(KillExec { exec_id: "e1".into() }));
    let ended = exit(&mut pod, "e1");
    assert_eq!((ended.exit_code, ended.timed_out), (137, false));
    output.read();
    pod.done(Call::KillExec(KillExec { exec_id: "e1".into() }));
    assert_at_rest(&pod);
}

/// A process with the rights for it can leave its leaf, but not its end.
#[test]
fn a_process_that_was_moved_elsewhere_is_killed() {
    let mut pod = running();
    let output = exec(&mut pod, "e1", "exec sleep 1000", 0);
    let pid = std::fs::read_to_string(pod.cgroup.join("c1/exec-e1/cgroup.procs")).unwrap();
    std::fs::write(pod.cgroup.join("c1/cgroup.procs"), pid.trim()).unwrap();
    pod.done(Call::KillExec(KillExec { exec_id: "e1".into() }));
    let ended = exit(&mut pod, "e1");
    assert_eq!((ended.exit_code, ended.timed_out), (137, false));
    output.read();
    assert_at_rest(&pod);
}

#[test]
fn background_processes_outlive_the_exec_but_not_the_container() {
    let mut pod = running();
    let before = pod.pids().len();
    exec(&mut pod, "e1", "sleep 1000 >/dev/null 2>&1 & exit 0", 5000);
    assert_eq!(exit(&mut pod, "e1").exit_code, 0);
    assert_eq!(pod.pids().len(), before + 1);
    // The next one has its leaf, whatever became of the first.
    exec(&mut pod, "e1", "exit 1", 0);
    assert_eq!(exit(&mut pod, "e1").exit_code, 1);
    pod.kill("c1");
    common::wait_for("the end of all", || pod.pids().is_empty());
    assert_eq!(pod.children(), []);
}

#[test]
fn execs_run_in_parallel() {
    let mut pod = running();
    let outputs: Vec<Output> = (0..20)
        .map(|n| exec(&mut pod, &format!("e{n}"), &format!("sleep 0.2; echo {n}; exit {n}"), 10_000))
        .collect();
    let mut exits: Vec<(String, i32)> = (0..20)
        .map(|_| match pod.event() {
            Body::ExecExit(exit) => (exit.exec_id, exit.exit_code),
            other => panic!("{other:?}"),
        })
        .collect();
    exits.sort_by_key(|(_, code)| *code);
    assert_eq!(exits, (0..20).map(|n| (format!("e{n}"), n)).collect::<Vec<_>>());
    for (n, output) in outputs.into_iter().enumerate() {
        assert_eq!(output.read().0, format!("{n}\n"));
    }
    assert_at_rest(&pod);
}

#[test]
fn an_id_is_one_exec_at_a_time() {
    let mut pod = running();
    exec(&mut pod, "e1", "sleep 1000", 0);
    let (reply, _) = exec_with(&mut pod, exec_call("e1", "c1", "true", 0));
    assert_eq!(common::failure(reply).kind(), Kind::FailedPrecondition);
    pod.kill_exec_and_wait("e1");
}

impl Pod {
    fn kill_exec_and_wait(&mut self, id: &str) {
        self.done(Call::KillExec(KillExec { exec_id: id.into() }));
        assert_eq!(exit(self, id).exit_code, 137);
    }
}

#[test]
fn a_lost_connection_leaves_execs_to_their_end_or_timeout() {
    let mut pod = running();
    let finite = exec(&mut pod, "e1", "sleep 0.3; echo end", 0);
    let endless = exec(&mut pod, "e2", "sleep 1000", 600);
    drop(pod.disconnect());
    assert_eq!(finite.read().0, "end\n");
    endless.read();
    common::wait_for("their end", || pod.children().len() == 1);
    pod.connect();
    pod.assert_silent(Duration::from_millis(50));
    assert_at_rest(&pod);
}

#[test]
fn the_end_of_a_container_ends_its_execs() {
    let mut pod = running();
    let mut plan = pod.plan("node", &["/bin/sleep", "1000"]);
    plan.pid_namespace = PidNamespace::Node.into();
    pod.create(plan);
    pod.start("node");
    for (exec_id, container) in [("e1", "c1"), ("e2", "node")] {
        let (reply, output) = exec_with(&mut pod, exec_call(exec_id, container, "sleep 1000", 0));
        assert!(matches!(reply, Body::ExecStarted(_)), "{reply:?}");
        pod.done(Pod::stop_call(container, 15, 0));
        let mut events: Vec<String> = (0..2)
            .map(|_| match pod.event() {
                Body::ExecExit(exit) => format!("{} {}", exit.exec_id, exit.exit_code),
                Body::ContainerExit(exit) => format!("{} {}", exit.container_id, exit.exit_code),
                other => panic!("{other:?}"),
            })
            .collect();
        events.sort();
        let mut expected = [format!("{exec_id} 137"), format!("{container} 137")];
        expected.sort();
        assert_eq!(events, expected);
        output.read();
    }
}

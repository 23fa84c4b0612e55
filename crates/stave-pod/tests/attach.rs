//! Attaching to running containers.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use common::{LIMIT, Pod, file_system, wait_for, wait_readable};
use stave_supervisor_proto::v1::failure::Kind;
use stave_supervisor_proto::v1::packet::Body;
use stave_supervisor_proto::v1::request::Call;
use stave_supervisor_proto::v1::*;

/// The daemon's ends of an attachment.
struct Attachment {
    console: Option<OwnedFd>,
    stdin: Option<std::fs::File>,
    stdout: Option<std::fs::File>,
    stderr: Option<std::fs::File>,
}

fn call(id: &str, container: &str, stdin: bool, stdout: bool, stderr: bool) -> Call {
    Call::Attach(Attach { attach_id: id.into(), container_id: container.into(), stdin, stdout, stderr })
}

fn attach(pod: &mut Pod, id: &str, stdin: bool, stdout: bool, stderr: bool) -> Attachment {
    let attached = match pod.call(call(id, "c1", stdin, stdout, stderr)) {
        Body::Attached(attached) => attached,
        other => panic!("{other:?}"),
    };
    let mut fds = pod.take_fds().into_iter();
    let mut next = |there: bool| there.then(|| fds.next().expect("a descriptor"));
    let attachment = Attachment {
        console: next(attached.terminal),
        stdin: next(attached.stdin).map(Into::into),
        stdout: next(attached.stdout).map(Into::into),
        stderr: next(attached.stderr).map(Into::into),
    };
    assert!(fds.next().is_none(), "as many descriptors as the reply names");
    attachment
}

/// A container with a stdin that stays open.
fn run_with_stdin(pod: &mut Pod, script: &str, stdin_once: bool) {
    let plan = pod.plan("c1", &["/bin/sh", "-c", script]);
    let Call::CreateContainer(mut create) = pod.create_call(plan) else { unreachable!() };
    create.stdin = true;
    create.stdin_once = stdin_once;
    let reply = pod.call(Call::CreateContainer(create));
    assert!(matches!(reply, Body::ContainerCreated(_)), "{reply:?}");
    pod.start("c1");
}

/// Reads until the output ends, or ends with `wanted`.
fn read_until(file: &mut std::fs::File, wanted: &str) -> String {
    let mut text = Vec::new();
    let mut buffer = vec![0; 64 << 10];
    while wanted.is_empty() || !text.ends_with(wanted.as_bytes()) {
        wait_readable(&*file, LIMIT)
            .unwrap_or_else(|| panic!("no {wanted:?} after {:?}", String::from_utf8_lossy(&text)));
        match file.read(&mut buffer).unwrap() {
            0 => break,
            count => text.extend(&buffer[..count]),
        }
    }
    String::from_utf8(text).unwrap()
}

#[test]
fn several_readers_and_the_log() {
    let mut pod = Pod::ready();
    run_with_stdin(
        &mut pod,
        "echo before; while read line; do echo out $line; echo err $line >&2; done",
        false,
    );
    pod.wait_for_output("c1", "before");
    let flat = pod.fd_count();
    let mut one = attach(&mut pod, "one", true, true, true);
    let mut two = attach(&mut pod, "two", false, true, false);
    assert!(two.stdin.is_none() && two.stderr.is_none());
    one.stdin.as_mut().unwrap().write_all(b"1\n").unwrap();
    assert_eq!(read_until(one.stdout.as_mut().unwrap(), "1\n"), "out 1\n", "nothing from before");
    assert_eq!(read_until(one.stderr.as_mut().unwrap(), "1\n"), "err 1\n");
    assert_eq!(read_until(two.stdout.as_mut().unwrap(), "1\n"), "out 1\n");

    // Detached, without anything being written.
    drop(two);
    wait_for("the copy's end", || pod.fd_count() == flat + 2);
    one.stdin.as_mut().unwrap().write_all(b"2\n").unwrap();
    assert_eq!(read_until(one.stdout.as_mut().unwrap(), "2\n"), "out 2\n");
    drop(one);
    wait_for("both copies' ends", || pod.fd_count() == flat);
    assert_eq!(pod.entry("c1").state(), container_entry::State::Running, "detaching ends nothing");

    let mut again = attach(&mut pod, "one", true, true, false);
    again.stdin.as_mut().unwrap().write_all(b"3\n").unwrap();
    assert_eq!(read_until(again.stdout.as_mut().unwrap(), "3\n"), "out 3\n");
    let log: Vec<String> = pod.log("c1").into_iter().map(|line| line.content).collect();
    assert_eq!(log.iter().filter(|line| line.starts_with("out")).count(), 3, "{log:?}");
    assert_eq!(pod.entry("c1").attachments_dropped, 0);
}

#[test]
fn a_slow_reader_is_dropped_and_counted() {
    let mut pod = Pod::ready();
    run_with_stdin(&mut pod, "read x; yes | head -c 6000000; echo END; sleep 1000", false);
    let flat = pod.fd_count();
    let mut slow = attach(&mut pod, "slow", true, true, true);
    let mut fast = attach(&mut pod, "fast", false, true, false);
    let reader = std::thread::spawn(move || {
        let text = read_until(fast.stdout.as_mut().unwrap(), "END\n");
        (fast, text.len())
    });
    slow.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    pod.wait_for_output("c1", "END");
    let (fast, count) = reader.join().unwrap();
    assert_eq!(count, 6_000_004, "who reads gets all of it");
    match pod.event() {
        Body::AttachmentDropped(dropped) => {
            assert_eq!((dropped.attach_id.as_str(), dropped.container_id.as_str()), ("slow", "c1"));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(pod.entry("c1").attachments_dropped, 1);
    let first = read_until(slow.stdout.as_mut().unwrap(), "");
    assert!(first.len() >= 64 << 10 && first.len() <= 1 << 20, "{}", first.len());
    assert_eq!(read_until(slow.stderr.as_mut().unwrap(), ""), "", "its other copy ends as well");
    drop((slow, fast));
    wait_for("the ends", || pod.fd_count() == flat);
    let entry = pod.entry("c1");
    assert_eq!((entry.log_bytes_dropped, entry.attachments_dropped), (0, 1));
}

#[test]
fn stdin_once_ends_with_the_first() {
    let mut pod = Pod::ready();
    run_with_stdin(&mut pod, "cat; echo done", true);
    let mut outputs_only = attach(&mut pod, "zero", false, true, false);
    let mut first = attach(&mut pod, "one", true, true, false);
    first.stdin.as_mut().unwrap().write_all(b"hello\n").unwrap();
    assert_eq!(read_until(first.stdout.as_mut().unwrap(), "hello\n"), "hello\n");
    let second = attach(&mut pod, "two", true, true, false);
    assert!(second.stdin.is_none(), "it is the first one's");
    drop(first.stdin.take());
    assert_eq!(read_until(first.stdout.as_mut().unwrap(), ""), "done\n", "up to the container's end");
    assert_eq!(read_until(outputs_only.stdout.as_mut().unwrap(), ""), "hello\ndone\n");
    assert_eq!(pod.exit("c1").exit_code, 0);
}

#[test]
fn stdin_once_ends_with_the_daemon() {
    let mut pod = Pod::ready();
    run_with_stdin(&mut pod, "cat; echo done; sleep 1000", true);
    let first = attach(&mut pod, "one", true, true, false);
    pod.disconnect();
    drop(first);
    pod.wait_for_output("c1", "done");
    pod.connect();
    let later = attach(&mut pod, "two", true, true, false);
    assert!(later.stdin.is_none() && later.stdout.is_some());
}

#[test]
fn over_a_new_connection() {
    let mut pod = Pod::ready();
    run_with_stdin(&mut pod, "while read line; do echo out $line; done", false);
    let flat = pod.fd_count();
    for round in 0..50 {
        let mut attachment = attach(&mut pod, "one", true, true, true);
        attachment.stdin.as_mut().unwrap().write_all(format!("{round}\n").as_bytes()).unwrap();
        let wanted = format!("out {round}\n");
        assert_eq!(read_until(attachment.stdout.as_mut().unwrap(), &wanted), wanted);
        if round % 10 == 0 {
            pod.disconnect();
            drop(attachment);
            pod.connect();
        }
    }
    wait_for("flat descriptors", || pod.fd_count() == flat);
}

#[test]
fn a_terminal() {
    let mut pod = Pod::ready();
    let script = "echo up; read x; busybox stty size; echo got $x >&2; read y";
    let mut plan = pod.plan("c1", &["/bin/sh", "-c", script]);
    plan.process.as_mut().unwrap().terminal = true;
    plan.mounts.push(file_system("devpts", "/dev/pts", &["newinstance", "ptmxmode=0666"]));
    pod.create(plan);
    pod.start("c1");
    pod.wait_for_output("c1", "up");
    let flat = pod.fd_count();
    let mut one = attach(&mut pod, "one", true, true, false);
    let mut two = attach(&mut pod, "two", false, true, true);
    assert!(one.stdin.is_none() && two.stderr.is_none(), "it is all the terminal");
    let console = one.console.take().unwrap();
    let size = rustix::termios::Winsize { ws_row: 30, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(&console, size).unwrap();
    rustix::io::write(&console, b"typed\n").unwrap();
    for output in [&mut one, &mut two] {
        let text = read_until(output.stdout.as_mut().unwrap(), "got typed\r\n");
        assert!(text.contains("30 100\r\n"), "{text:?}");
    }
    drop((one, two, console));
    wait_for("flat descriptors", || pod.fd_count() == flat);
    assert_eq!(pod.entry("c1").state(), container_entry::State::Running);
}

#[test]
fn refusals() {
    let mut pod = Pod::ready();
    assert_eq!(pod.fails(call("a", "nope", true, true, true)).kind(), Kind::NotFound);
    pod.create(pod.plan("c1", &["/bin/true"]));
    assert_eq!(pod.fails(call("a", "c1", true, true, true)).kind(), Kind::FailedPrecondition);
    assert_eq!(pod.fails(call("a", "c1", false, false, false)).kind(), Kind::InvalidArgument);
    assert_eq!(pod.fails(call("../a", "c1", true, true, true)).kind(), Kind::InvalidArgument);
    pod.start("c1");
    pod.exit("c1");
    assert_eq!(pod.fails(call("a", "c1", true, true, true)).kind(), Kind::FailedPrecondition);
    assert!(pod.take_fds().is_empty());
}

#[test]
fn not_without_end() {
    let mut pod = Pod::ready();
    pod.run("c1", "sleep 1000");
    let mut kept = Vec::new();
    let failure = loop {
        match pod.call(call("many", "c1", false, true, true)) {
            Body::Attached(_) => kept.extend(pod.take_fds()),
            Body::Failure(failure) => break failure,
            other => panic!("{other:?}"),
        }
        assert!(kept.len() < 1000);
    };
    assert_eq!(failure.kind(), Kind::ResourceExhausted);
    kept.clear();
    let pod = &mut pod;
    wait_for("room", || {
        let reply = pod.call(call("again", "c1", false, true, false));
        pod.take_fds();
        matches!(reply, Body::Attached(_))
    });
    pod.assert_silent(Duration::from_millis(20));
}

#[test]
fn exec_with_a_terminal() {
    let mut pod = Pod::ready();
    let mut plan = pod.plan("c1", &["/bin/sleep", "1000"]);
    plan.mounts.push(file_system("devpts", "/dev/pts", &["newinstance", "ptmxmode=0666"]));
    pod.create(plan);
    pod.start("c1");
    let flat = pod.fd_count();
    let mut process = common::process(&["/bin/sh", "-c", "read x; busybox stty size; echo got $x; exit 7"]);
    process.terminal = true;
    let exec =
        Exec { exec_id: "e1".into(), container_id: "c1".into(), process: Some(process), ..Exec::default() };
    let null = std::fs::File::open("/dev/null").unwrap();
    let with_fds = pod.call_with(Call::Exec(exec.clone()), &[null.as_fd(), null.as_fd(), null.as_fd()]);
    assert_eq!(common::failure(with_fds).kind(), Kind::InvalidArgument);
    let reply = pod.call(Call::Exec(exec));
    assert!(matches!(reply, Body::ExecStarted(_)), "{reply:?}");
    let console = pod.take_fds().pop().expect("the master");
    let wanted = flat + 3;
    assert_eq!(
        pod.fd_count(),
        wanted,
        "a pidfd, its copy in the event loop, a leaf, and nothing of the terminal"
    );
    let size = rustix::termios::Winsize { ws_row: 31, ws_col: 101, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(&console, size).unwrap();
    rustix::io::write(&console, b"typed\n").unwrap();
    let mut console = std::fs::File::from(console);
    let text = read_until(&mut console, "got typed\r\n");
    assert!(text.contains("31 101\r\n"), "{text:?}");
    match pod.event() {
        Body::ExecExit(exit) => assert_eq!(exit.exit_code, 7),
        other => panic!("{other:?}"),
    }
    common::wait_for("the leaf alone", || pod.fd_count() == flat + 1);
}

//! What a container writes, and where it goes.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use common::{Pod, line};
use stave_supervisor_proto::v1::failure::Kind;
use stave_supervisor_proto::v1::request::Call;
use stave_supervisor_proto::v1::*;

fn reopen_call(id: &str) -> Call {
    Call::ReopenLog(ReopenLog { container_id: id.into() })
}

#[test]
fn both_outputs_in_lines() {
    let mut pod = Pod::ready();
    pod.create(
        pod.plan(
            "c1",
            &["/bin/sh", "-c", "echo out; echo; echo err >&2; sleep 0.2; echo 'a\r'; printf rest"],
        ),
    );
    pod.start("c1");
    let log = pod.log_path("c1");
    assert!(log.exists(), "the file is there when the container runs");
    assert_eq!(std::fs::metadata(&log).unwrap().permissions().mode() & 0o777, 0o640);
    pod.exit("c1");
    let lines = pod.log("c1");
    let out: Vec<_> = lines.iter().filter(|line| line.stream == "stdout").cloned().collect();
    let expected =
        [("F", "out"), ("F", ""), ("F", "a"), ("P", "rest")].map(|(tag, text)| line("stdout", tag, text));
    assert_eq!(out, expected);
    assert!(lines.contains(&line("stderr", "F", "err")));
    assert_eq!(lines.len(), 5);
}

#[test]
fn long_lines_are_cut() {
    let mut pod = Pod::ready();
    pod.run(
        "c1",
        "head -c 40000 /dev/zero | tr '\\0' x; echo; head -c 16384 /dev/zero | tr '\\0' y; echo; echo end",
    );
    pod.exit("c1");
    let expected = [
        line("stdout", "P", &"x".repeat(16384)),
        line("stdout", "P", &"x".repeat(16384)),
        line("stdout", "F", &"x".repeat(40000 - 2 * 16384)),
        line("stdout", "F", &"y".repeat(16384)),
        line("stdout", "F", "end"),
    ];
    assert!(pod.log("c1") == expected);
}

#[test]
fn every_byte_is_logged_as_it_is() {
    let mut pod = Pod::ready();
    // All 256 and a newline, four times; octal, as printf has it.
    let all: String = (0..=255).map(|byte| format!("\\{byte:03o}")).collect();
    pod.run("c1", &format!("for n in 1 2 3 4; do printf '{all}\\n'; done"));
    pod.exit("c1");
    let log = std::fs::read(pod.log_path("c1")).unwrap();
    let contents: Vec<&[u8]> = log
        .strip_suffix(b"\n")
        .unwrap()
        .split(|byte| *byte == b'\n')
        .map(|record| record.splitn(4, |byte| *byte == b' ').nth(3).unwrap())
        .collect();
    // A newline is among the 256.
    let (first, second): (Vec<u8>, Vec<u8>) = ((0..10).collect(), (11..=255).collect());
    assert_eq!(contents, [&first[..], &second].repeat(4));
}

#[test]
fn much_output_is_whole_and_starves_nobody() {
    let mut pod = Pod::ready();
    pod.run("loud", "yes 0123456789012345678901234567890123456789012345678901234567890123456789");
    pod.run("c1", "i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); done");
    assert_eq!(pod.exit("c1").exit_code, 0);
    let lines = pod.log("c1");
    assert_eq!(lines.len(), 3000);
    assert!(lines.iter().enumerate().all(|(at, one)| one.content == format!("line {at}")));
    let start = Instant::now();
    pod.list();
    assert!(start.elapsed() < Duration::from_secs(1));
    pod.kill("loud");
    let lines = pod.log("loud");
    let (last, whole) = lines.split_last().unwrap();
    assert!(whole.iter().all(|one| one.tag == "F" && one.content.len() == 70));
    assert!(last.content.len() <= 70);
}

#[test]
fn reopen_after_rotation() {
    let mut pod = Pod::ready();
    pod.create(pod.plan("c1", &["/bin/sh", "-c", "i=0; while :; do echo $i; i=$((i+1)); sleep 0.01; done"]));
    assert_eq!(pod.fails(reopen_call("c1")).kind(), Kind::FailedPrecondition);
    pod.start("c1");
    pod.wait_for_output("c1", "F 3");
    let (path, old) = (pod.log_path("c1"), pod.log_path("c1").with_extension("log.1"));
    std::fs::rename(&path, &old).unwrap();
    pod.done(reopen_call("c1"));
    assert!(path.exists());
    let size = std::fs::metadata(&old).unwrap().len();
    common::wait_for("new lines", || pod.log("c1").len() > 5);
    assert_eq!(std::fs::metadata(&old).unwrap().len(), size, "the old file never grows");

    // A reopen that fails leaves the log where it is.
    let moved = path.with_extension("log.2");
    std::fs::rename(&path, &moved).unwrap();
    std::fs::create_dir(&path).unwrap();
    assert!(pod.fails(reopen_call("c1")).errno != 0);
    let lines = || common::parse_log(&std::fs::read_to_string(&moved).unwrap());
    let count = lines().len();
    common::wait_for("more lines in the old file", || lines().len() > count + 3);
    std::fs::remove_dir(&path).unwrap();
    std::fs::rename(&moved, &path).unwrap();
    pod.done(reopen_call("c1"));

    pod.kill("c1");
    let mut all = common::parse_log(&std::fs::read_to_string(&old).unwrap());
    all.extend(pod.log("c1"));
    let numbers: Vec<usize> = all.iter().map(|one| one.content.parse().unwrap()).collect();
    assert!(numbers.iter().enumerate().all(|(at, number)| at == *number), "no line is lost or doubled");

    std::fs::remove_file(&path).unwrap();
    assert_eq!(pod.fails(reopen_call("c1")).kind(), Kind::FailedPrecondition);
    assert!(!path.exists(), "a container that has exited gets no new file");
}

#[test]
fn a_full_disk_stops_nothing_and_is_counted() {
    let mut pod = Pod::ready();
    let disk = SmallDisk::new(pod.dir.path().join("disk"));
    let log_path = disk.0.join("0.log");
    let bytes = 1_000_000;
    let script = format!(
        "yes 12345678901234567890123456789 | head -c {bytes}; echo; while :; do echo tick; sleep 0.1; done"
    );
    let plan = pod.plan("c1", &["/bin/sh", "-c", &script]);
    let call = CreateContainer {
        plan: Some(plan),
        log_path: log_path.to_str().unwrap().into(),
        ..Default::default()
    };
    let reply = pod.call(Call::CreateContainer(call));
    assert!(matches!(reply, stave_supervisor_proto::v1::packet::Body::ContainerCreated(_)), "{reply:?}");
    pod.start("c1");
    // All of the flood: what is left of it would fill the disk again.
    let content = bytes - bytes / 30;
    common::wait_for("counted drops", || {
        let text = std::fs::read_to_string(&log_path).unwrap();
        let whole = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
        let written: usize = common::parse_log(whole).iter().map(|one| one.content.len()).sum();
        pod.entry("c1").log_bytes_dropped + written as u64 >= content
    });
    let dropped = pod.entry("c1").log_bytes_dropped;
    assert!(dropped > 900_000 && dropped < bytes, "{dropped}");
    // Once there is space, the log goes on with a line of its own.
    let text = std::fs::read_to_string(&log_path).unwrap();
    std::fs::File::options().write(true).open(&log_path).unwrap().set_len(0).unwrap();
    assert!(text.contains(" F 12345678901234567890123456789\n"));
    let read = || std::fs::read_to_string(&log_path).unwrap();
    common::wait_for("records after the drops", || read().matches(" stdout F tick\n").count() >= 3);
    let text = read();
    let lines = common::parse_log(text.trim_start());
    let all = pod.entry("c1").log_bytes_dropped;
    let note = format!("stave: {all} bytes of output were dropped: No space left on device");
    assert_eq!(lines[0], line("stderr", "F", &note), "{text}");
    assert!(lines[1..].iter().all(|one| *one == line("stdout", "F", "tick")), "{text}");
    let exit = pod.kill("c1");
    assert_eq!(exit.exit_code, 137);
    assert!(pod.entry("c1").log_bytes_dropped >= dropped, "known after the exit too");
}

/// A container that writes no more, and one that has ended: nothing but the time makes the log say it.
#[test]
fn what_a_full_disk_dropped_is_said_though_nothing_more_is_written() {
    let mut pod = Pod::ready();
    let flood = "yes 12345678901234567890123456789 | head -c 300000; echo";
    for (id, script) in [("silent", format!("{flood}; sleep 1000")), ("ended", flood.to_owned())] {
        let disk = SmallDisk::new(pod.dir.path().join(id));
        let log_path = disk.0.join("0.log");
        let call = CreateContainer {
            plan: Some(pod.plan(id, &["/bin/sh", "-c", &script])),
            log_path: log_path.to_str().unwrap().into(),
            ..Default::default()
        };
        pod.call(Call::CreateContainer(call));
        pod.start(id);
        let read = || std::fs::read_to_string(&log_path).unwrap();
        let mut last = 0;
        common::wait_for("all of the flood", || {
            let before = std::mem::replace(&mut last, pod.entry(id).log_bytes_dropped);
            std::thread::sleep(Duration::from_millis(100));
            last > 200_000 && last == before
        });
        if id == "ended" {
            pod.exit(id);
        }
        assert!(!read().contains("were dropped"), "the disk is full");
        std::fs::File::options().write(true).open(&log_path).unwrap().set_len(0).unwrap();
        let dropped = pod.entry(id).log_bytes_dropped;
        let note =
            format!(" stderr F stave: {dropped} bytes of output were dropped: No space left on device\n");
        common::wait_for("the note", || read().ends_with(&note));
        std::thread::sleep(Duration::from_millis(2500));
        assert_eq!(read().matches("were dropped").count(), 1, "said once");
        assert_eq!(pod.entry(id).log_bytes_dropped, dropped, "counted once");
    }
}

struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    fn new(dir: std::path::PathBuf) -> Self {
        use rustix::mount::{MountFlags, mount};
        std::fs::create_dir(&dir).unwrap();
        mount("tmpfs", &dir, "tmpfs", MountFlags::empty(), c"size=16k").unwrap();
        Self(dir)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

#[test]
fn output_without_a_log_is_dropped() {
    let mut pod = Pod::ready();
    let plan = pod.plan("c1", &["/bin/sh", "-c", "yes | head -c 1000000; echo fine >&2; exit 2"]);
    let reply = pod.call(Call::CreateContainer(CreateContainer { plan: Some(plan), ..Default::default() }));
    assert!(matches!(reply, packet::Body::ContainerCreated(_)), "{reply:?}");
    pod.start("c1");
    assert_eq!(pod.exit("c1").exit_code, 2);
    assert_eq!(pod.entry("c1").log_bytes_dropped, 0);
    assert_eq!(
        std::fs::read_dir(pod.dir.path())
            .unwrap()
            .filter(|entry| entry.as_ref().unwrap().file_name() == "logs")
            .count(),
        0
    );
}

#[test]
fn a_process_elsewhere_that_holds_the_pipe_delays_the_exit_only_so_long() {
    let mut pod = Pod::ready();
    let created = pod.run("c1", "echo ready; sleep 1000");
    pod.wait_for_output("c1", "ready");
    let held = std::fs::File::options().write(true).open(format!("/proc/{}/fd/1", created.pid)).unwrap();
    let start = Instant::now();
    let exit = pod.kill("c1");
    assert_eq!(exit.exit_code, 137);
    let took = start.elapsed();
    assert!(took > Duration::from_millis(500) && took < Duration::from_secs(5), "{took:?}");
    drop(held);
    assert_eq!(pod.log("c1"), [line("stdout", "F", "ready")]);
}

#[test]
fn stdin_is_empty_or_stays_open() {
    let mut pod = Pod::ready();
    pod.run("c1", "cat; echo end");
    assert_eq!(pod.exit("c1").exit_code, 0);
    assert_eq!(pod.log("c1"), [line("stdout", "F", "end")]);

    let plan = pod.plan("c2", &["/bin/cat"]);
    let log_path = pod.log_path("c2").to_str().unwrap().into();
    let call = CreateContainer { plan: Some(plan), log_path, stdin: true, ..Default::default() };
    let reply = pod.call(Call::CreateContainer(call));
    assert!(matches!(reply, packet::Body::ContainerCreated(_)), "{reply:?}");
    pod.start("c2");
    pod.assert_silent(Duration::from_millis(200));
    assert_eq!(pod.kill("c2").exit_code, 137);
}

fn with_terminal(mut plan: Plan) -> Plan {
    plan.process.as_mut().unwrap().terminal = true;
    let options = ["newinstance", "ptmxmode=0666", "mode=0620"];
    plan.mounts.push(common::file_system("devpts", "/dev/pts", &options));
    plan
}

#[test]
fn a_terminal_is_one_output() {
    let mut pod = Pod::ready();
    let script = "echo out; echo err >&2; [ -t 0 ] && [ -t 1 ] && [ -t 2 ] && echo terminal; exit 7";
    pod.create(with_terminal(pod.plan("c1", &["/bin/sh", "-c", script])));
    pod.start("c1");
    assert_eq!(pod.exit("c1").exit_code, 7);
    assert_eq!(pod.log("c1"), ["out", "err", "terminal"].map(|text| line("stdout", "F", text)));
}

/// Programs that put themselves into the background do it; nothing of the terminal may end with that.
#[test]
fn a_terminal_that_is_closed_can_be_opened_again() {
    let mut pod = Pod::ready();
    let script = "echo first; exec </dev/null >/dev/null 2>&1; sleep 0.5; echo again >/dev/pts/0; \
        sleep 0.2; echo last >/dev/console; exit 7";
    pod.create(with_terminal(pod.plan("c1", &["/bin/sh", "-c", script])));
    pod.start("c1");
    assert_eq!(pod.exit("c1").exit_code, 7);
    assert_eq!(pod.log("c1"), ["first", "again", "last"].map(|text| line("stdout", "F", text)));
}

//! Processes with a pseudo-terminal.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;

use stave_executor::{ExecTarget, Report};
use stave_supervisor_proto::v1::User;

use crate::Case;
use crate::bundle::{Bundle, Status, kill, process, report, wait, wait_for};

pub const CASES: &[Case] = &[
    ("is_the_controlling_terminal", is_the_controlling_terminal),
    ("cve_2025_52565_console_is_a_link", cve_2025_52565_console_is_a_link),
    ("no_devpts", no_devpts),
    ("of_a_further_process", of_a_further_process),
    ("of_a_further_process_without_devpts", of_a_further_process_without_devpts),
];

fn start(bundle: &Bundle) -> (stave_executor::Init, std::fs::File) {
    let mut init = stave_executor::create(&bundle.plan, None, None).unwrap();
    let console: OwnedFd = match report(&mut init) {
        Report::Ready { console: Some(console), .. } => console,
        other => panic!("{other:?}"),
    };
    init.start().unwrap();
    assert!(matches!(report(&mut init), Report::ExecDone));
    (init, console.into())
}

/// Everything up to the end: EIO, once nobody has the terminal open.
fn read_all(console: &mut std::fs::File) -> String {
    let mut text = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        wait_for(std::os::fd::AsFd::as_fd(console));
        match console.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => text.extend(&buffer[..n]),
            Err(e) => {
                assert_eq!(e.raw_os_error(), Some(libc::EIO));
                break;
            }
        }
    }
    String::from_utf8(text).unwrap()
}

fn is_the_controlling_terminal() {
    let mut bundle = Bundle::new();
    bundle.process().terminal = true;
    bundle.process().user = Some(User { uid: 1000, ..User::default() });
    bundle.sh("tty; stat -c '%u %g %a' /dev/pts/0; stat -c %t:%T /dev/console; echo x > /dev/tty; read line; echo got $line");
    let (init, mut console) = start(&bundle);
    console.write_all(b"typed\n").unwrap();
    let output = read_all(&mut console);
    assert_eq!(wait(init.pidfd()), Status::Exited(0), "{output}");
    for wanted in ["/dev/pts/0\r\n", "1000 5 620\r\n", "88:0\r\n", "x\r\n", "got typed\r\n"] {
        assert!(output.contains(wanted), "{wanted:?} in {output:?}");
    }
}

fn cve_2025_52565_console_is_a_link() {
    let mut bundle = Bundle::new();
    let (outside, victim) = (bundle.path("outside"), bundle.path("host/victim"));
    std::fs::write(&victim, "untouched").unwrap();
    std::fs::create_dir(bundle.lower("dev")).unwrap();
    bundle.process().terminal = true;
    // The image's /dev shows: the console covers what the link names in the container, and nothing outside is made.
    bundle.plan.mounts.retain(|m| !m.destination.starts_with("/dev") || m.destination == "/dev/pts");
    bundle.sh("stat -L -c %t:%T /dev/console");
    for target in [outside.join("console"), victim.clone()] {
        symlink(&target, bundle.lower("dev/console")).unwrap();
        let (init, mut console) = start(&bundle);
        assert_eq!(read_all(&mut console), "88:0\r\n", "{}", target.display());
        wait(init.pidfd());
        assert!(!outside.exists());
        assert!(
            bundle.path("upper").join(target.strip_prefix("/").unwrap()).exists(),
            "made in the container"
        );
        std::fs::remove_file(bundle.lower("dev/console")).unwrap();
    }
    assert_eq!(std::fs::read_to_string(&victim).unwrap(), "untouched");
}

fn no_devpts() {
    let mut bundle = Bundle::new();
    bundle.process().terminal = true;
    bundle.plan.mounts.retain(|m| m.destination != "/dev/pts");
    std::fs::create_dir_all(bundle.lower("dev/pts")).unwrap();
    let mut init = stave_executor::create(&bundle.plan, None, None).unwrap();
    let Report::Failed(error) = report(&mut init) else { panic!("no failure") };
    assert_eq!(error.stage, "terminal");
    wait(init.pidfd());
}

fn of_a_further_process() {
    let mut bundle = Bundle::new();
    let (init, pipes) = bundle.sh("echo up; sleep 1000").start(None).unwrap();
    assert_eq!(pipes.line(), "up");
    let script = "tty; stat -c '%u %g %a' $(tty); echo fds $(ls /proc/self/fd); echo x > /dev/tty; read line; echo got $line; exit 4";
    let mut further = process(&["sh", "-c", script]);
    further.terminal = true;
    further.user = Some(User { uid: 1000, ..User::default() });
    let target = ExecTarget {
        init: init.pidfd(),
        cgroup: bundle.plan.cgroup.as_ref().unwrap(),
        entrances: None,
        name: "tty",
    };
    let mut exec = stave_executor::exec(&target, &further, None).unwrap();
    let mut console = None;
    loop {
        wait_for(exec.control().unwrap());
        match exec.read_report().unwrap() {
            Some(Report::Ready { console: Some(fd), .. }) => console = Some(fd),
            Some(Report::ExecDone) => break,
            None => {}
            other => panic!("{other:?}"),
        }
    }
    let mut console = std::fs::File::from(console.expect("the master"));
    console.write_all(b"typed\n").unwrap();
    let output = read_all(&mut console);
    assert_eq!(wait(exec.pidfd()), Status::Exited(4), "{output}");
    exec.remove_cgroup().unwrap();
    for wanted in ["/dev/pts/0\r\n", "1000 5 620\r\n", "x\r\n", "got typed\r\n"] {
        assert!(output.contains(wanted), "{wanted:?} in {output:?}");
    }
    assert!(output.contains("fds 0 1 2 3\r\n"), "the last is that of ls: {output}");
    kill(&init);
}

fn of_a_further_process_without_devpts() {
    let mut bundle = Bundle::new();
    bundle.plan.mounts.retain(|mount| mount.destination != "/dev/pts");
    let (init, pipes) = bundle.sh("echo up; sleep 1000").start(None).unwrap();
    assert_eq!(pipes.line(), "up");
    let mut further = process(&["sh"]);
    further.terminal = true;
    let target = ExecTarget {
        init: init.pidfd(),
        cgroup: bundle.plan.cgroup.as_ref().unwrap(),
        entrances: None,
        name: "tty",
    };
    let mut exec = stave_executor::exec(&target, &further, None).unwrap();
    let mut failure = None;
    loop {
        wait_for(exec.control().unwrap());
        match exec.read_report().unwrap() {
            Some(Report::Failed(error)) => failure = Some(error),
            Some(Report::ExecDone) => break,
            None => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(failure.expect("a failure").stage, "terminal");
    wait(exec.pidfd());
    exec.remove_cgroup().unwrap();
    kill(&init);
}

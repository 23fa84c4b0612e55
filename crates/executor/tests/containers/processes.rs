//! What the payload is given: user, limits, environment, cgroup, command.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::symlink;

use stave_executor::Report;
use stave_supervisor_proto::v1::failure::Kind;
use stave_supervisor_proto::v1::{Capabilities, Rlimit, User};

use crate::Case;
use crate::bundle::{Bundle, Status, field, kill, report, stdio, wait, wait_for};

pub const CASES: &[Case] = &[
    ("runs_echo", runs_echo),
    ("exit_status", exit_status),
    ("ready_tells_the_user", ready_tells_the_user),
    ("user_forms", user_forms),
    ("user_by_name", user_by_name),
    ("environment_and_home", environment_and_home),
    ("working_directory_is_made", working_directory_is_made),
    ("limits_umask_and_signals", limits_umask_and_signals),
    ("oom_score_adj", oom_score_adj),
    ("capabilities_of_root_and_user", capabilities_of_root_and_user),
    ("no_new_privileges_and_seccomp", no_new_privileges_and_seccomp),
    ("placed_in_its_cgroups", placed_in_its_cgroups),
    ("missing_command", missing_command),
    ("command_that_is_no_program", command_that_is_no_program),
    ("an_init_without_supervisor_ends", an_init_without_supervisor_ends),
    ("bad_plans", bad_plans),
];

fn runs_echo() {
    let mut bundle = Bundle::new();
    bundle.process().args = ["echo", "hello", "world"].map(str::to_owned).to_vec();
    assert_eq!(bundle.output(), "hello world\n");
}

fn exit_status() {
    let mut bundle = Bundle::new();
    let output = bundle.sh("echo out; echo err >&2; exit 7").run();
    assert_eq!(
        (output.status, output.stdout.as_str(), output.stderr.as_str()),
        (Status::Exited(7), "out\n", "err\n")
    );
    let output = Bundle::new().sh("kill -9 $$; sleep 1; kill -11 $$; echo alive").run();
    // PID 1 of a namespace is immune to its own signals.
    assert_eq!((output.status, output.stdout.as_str()), (Status::Exited(0), "alive\n"));
}

fn ready_tells_the_user() {
    let mut bundle = Bundle::new();
    bundle.process().user = Some(User {
        name: "alice".into(),
        supplemental_groups: vec![7],
        merge_image_groups: true,
        ..User::default()
    });
    let (stdio, _pipes) = stdio();
    let mut init = stave_executor::create(&bundle.plan, Some(stdio), None).unwrap();
    let Report::Ready { uid: 1000, gid: 1001, groups, console: None } = report(&mut init) else { panic!() };
    assert_eq!(groups, [7, 50, 1001]);
    assert!(init.pid() > 1);
    // Waits, and for the start only.
    assert!(init.read_report().unwrap().is_none());
    kill(&init);
    wait_for(init.control().unwrap());
    assert!(matches!(init.read_report().unwrap(), Some(Report::ExecDone)));
    assert!(init.start().is_err());
}

/// CVE-2026-30892, CVE-2024-40635, CVE-2026-46680.
fn user_forms() {
    let mut bundle = Bundle::new();
    bundle.sh("id -u; id -g; echo $(id -G)");
    let table = [
        (User { uid: 1, ..User::default() }, "1\n0\n0\n"),
        (User { uid: 1, gid: Some(2), ..User::default() }, "1\n2\n2\n"),
        (User { uid: 1002, ..User::default() }, "1002\n0\n0\n"),
        (User { name: "alice".into(), ..User::default() }, "1000\n1001\n1001\n"),
        (User { name: "alice".into(), group_name: "staff".into(), ..User::default() }, "1000\n50\n50\n"),
        (User::default(), "0\n0\n0\n"),
    ];
    for (user, wanted) in table {
        bundle.process().user = Some(user.clone());
        assert_eq!(bundle.output(), wanted, "{user:?}");
    }
    for user in [
        User { uid: 1 << 31, ..User::default() },
        User { name: "1002".into(), ..User::default() },
        User { name: "bob".into(), ..User::default() },
        User { name: ":0".into(), ..User::default() },
        User { name: "-1".into(), ..User::default() },
        User { name: "4294967296".into(), ..User::default() },
    ] {
        bundle.process().user = Some(user.clone());
        let error = bundle.failure();
        assert_eq!((error.stage.as_str(), error.kind), ("user", Kind::InvalidArgument), "{user:?}: {error}");
    }
}

fn user_by_name() {
    let mut bundle = Bundle::new();
    bundle.process().user = Some(User { name: "alice".into(), merge_image_groups: true, ..User::default() });
    let status = bundle.sh("cat /proc/self/status").output();
    assert_eq!(field(&status, "Uid"), "1000\t1000\t1000\t1000");
    assert_eq!(field(&status, "Gid"), "1001\t1001\t1001\t1001");
    assert_eq!(field(&status, "Groups"), "50 1001");
    // As large as the limit on the file, and not a file at all.
    let passwd = bundle.lower("etc/passwd");
    fs::remove_file(&passwd).unwrap();
    symlink("/proc/self/status", &passwd).unwrap();
    assert_eq!(bundle.failure().stage, "user");
}

fn environment_and_home() {
    let mut bundle = Bundle::new();
    bundle.process().args = vec!["/bin/env".into()];
    bundle.process().env = ["PATH=/bin", "A=b=c", "EMPTY="].map(str::to_owned).to_vec();
    assert_eq!(bundle.output(), "PATH=/bin\nA=b=c\nEMPTY=\nHOME=/root\n");
    bundle.process().user = Some(User { uid: 1000, ..User::default() });
    assert!(bundle.output().ends_with("HOME=/home/alice\n"));
    bundle.process().user = Some(User { uid: 4, ..User::default() });
    assert!(bundle.output().ends_with("HOME=/\n"));
    bundle.process().env.push("HOME=/x".into());
    assert!(bundle.output().ends_with("EMPTY=\nHOME=/x\n"));
}

fn working_directory_is_made() {
    let mut bundle = Bundle::new();
    bundle.process().cwd = "/srv/a/b".into();
    assert_eq!(bundle.sh("pwd -P; stat -c %a:%u .").output(), "/srv/a/b\n755:0\n");
    // A relative command is looked up there.
    symlink("/bin/busybox", bundle.lower("echo")).unwrap();
    bundle.process().cwd = "/".into();
    bundle.process().args = vec!["./echo".into(), "x".into()];
    assert_eq!(bundle.output(), "x\n");
}

fn limits_umask_and_signals() {
    let mut bundle = Bundle::new();
    bundle.process().rlimits = vec![Rlimit { resource: 7, soft: 100, hard: 200 }];
    let script = "grep 'open files' /proc/self/limits; umask; cat /proc/self/status";
    let output = bundle.sh(script).output();
    let words: Vec<&str> = output.split_whitespace().collect();
    assert_eq!(words[3..5], ["100", "200"]);
    assert!(output.contains("\n0022\n"), "{output}");
    for set in ["SigIgn", "SigBlk"] {
        assert_eq!(u64::from_str_radix(field(&output, set), 16).unwrap() & 0x1000, 0, "{set}");
    }
    bundle.process().umask = Some(0o077);
    assert!(bundle.output().contains("\n0077\n"));
    // More than we may give: as much as there is, not a failure.
    bundle.process().rlimits = vec![Rlimit { resource: 7, soft: 1 << 30, hard: 1 << 30 }];
    let _ = bundle.run();
}

fn oom_score_adj() {
    let mut bundle = Bundle::new();
    bundle.sh("cat /proc/self/oom_score_adj");
    bundle.process().oom_score_adj = Some(500);
    assert_eq!(bundle.output(), "500\n");
    bundle.process().oom_score_adj = Some(-998);
    assert!(["-998\n", "0\n"].contains(&bundle.output().as_str()));
}

/// CVE-2022-29162, CVE-2018-1000400.
fn capabilities_of_root_and_user() {
    let mut bundle = Bundle::new();
    bundle.sh("cat /proc/self/status");
    let sets = |status: &str| {
        ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"].map(|s| field(status, s).to_owned())
    };
    let (none, default) = ("0000000000000000", "00000000a80425fb");
    assert_eq!(sets(&bundle.output()), [none, default, default, default, none]);
    bundle.process().user = Some(User { uid: 1000, ..User::default() });
    assert_eq!(sets(&bundle.output()), [none, none, none, default, none]);
    bundle.process().capabilities = Some(Capabilities::default());
    assert_eq!(sets(&bundle.output()), [none; 5]);
    bundle.process().user = None;
    assert_eq!(sets(&bundle.output()), [none; 5]);
    // All: what we have ourselves.
    let all = u64::MAX;
    bundle.process().capabilities =
        Some(Capabilities { bounding: all, effective: all, permitted: all, inheritable: 0, ambient: 0 });
    let own = fs::read_to_string("/proc/self/status").unwrap();
    let own = field(&own, "CapBnd");
    assert_eq!(sets(&bundle.output()), [none, own, own, own, none]);
    // Ambient ones reach a user that is not root.
    let net_bind = 1 << 10;
    bundle.process().user = Some(User { uid: 1000, ..User::default() });
    bundle.process().capabilities = Some(Capabilities {
        bounding: net_bind,
        effective: net_bind,
        permitted: net_bind,
        inheritable: net_bind,
        ambient: net_bind,
    });
    assert_eq!(sets(&bundle.output()), ["0000000000000400"; 5]);
}

/// A filter that lets everything through but mkdir, which gets EPERM; x86_64 alone has its number here.
fn no_new_privileges_and_seccomp() {
    let instruction = |code: u16, jt: u8, jf: u8, k: u32| {
        let mut bytes = code.to_ne_bytes().to_vec();
        bytes.extend([jt, jf]);
        bytes.extend(k.to_ne_bytes());
        bytes
    };
    let filter = [
        instruction(0x20, 0, 0, 0), // load the number
        instruction(0x15, 0, 1, libc::SYS_mkdirat as u32),
        instruction(0x06, 0, 0, 0x0005_0000 | libc::EPERM as u32),
        instruction(0x15, 0, 1, 83), // mkdir
        instruction(0x06, 0, 0, 0x0005_0000 | libc::EPERM as u32),
        instruction(0x06, 0, 0, 0x7fff_0000),
    ]
    .concat();
    for no_new_privileges in [true, false] {
        let mut bundle = Bundle::new();
        bundle.process().seccomp_filter = filter.clone();
        bundle.process().no_new_privileges = no_new_privileges;
        let script = "cat /proc/self/status; mkdir /tmp/x && echo made; echo end";
        for user in [0, 1000] {
            bundle.process().user = Some(User { uid: user, ..User::default() });
            let output = bundle.sh(script).run();
            assert_eq!(field(&output.stdout, "Seccomp"), "2");
            assert_eq!(field(&output.stdout, "NoNewPrivs"), if no_new_privileges { "1" } else { "0" });
            // CAP_SYS_ADMIN was kept for the filter, and is gone.
            assert_eq!(
                field(&output.stdout, "CapPrm"),
                if user == 0 { "00000000a80425fb" } else { "0000000000000000" }
            );
            assert!(!output.stdout.contains("made") && output.stdout.ends_with("end\n"));
            assert!(output.stderr.contains("Operation not permitted"), "{}", output.stderr);
        }
    }
    let mut bundle = Bundle::new();
    bundle.process().seccomp_filter = vec![0xff; 8];
    let error = bundle.start(None).map(drop).unwrap_err();
    assert_eq!((error.stage.as_str(), error.errno), ("seccomp", libc::EINVAL));
}

fn placed_in_its_cgroups() {
    let mut bundle = Bundle::new();
    let (init, pipes) = bundle.sh("cat /proc/self/cgroup; sleep 100").start(None).unwrap();
    pipes.line();
    let inside = fs::read_to_string(format!("/proc/{}/cgroup", init.pid())).unwrap();
    let cgroup = bundle.plan.cgroup.as_ref().unwrap();
    let expected = 1 + cgroup.v1.len();
    let name = &bundle.plan.container_id;
    assert_eq!(inside.lines().filter(|l| l.ends_with(&format!("/{name}"))).count(), expected, "{inside}");
    stave_executor::kill_cgroup(cgroup.v2_dir.as_ref()).unwrap();
    assert_eq!(wait(init.pidfd()), Status::Signalled(libc::SIGKILL));
    drop(pipes);
    // In its own namespace these are the roots.
    let output = Bundle::new().sh("cat /proc/self/cgroup").output();
    assert_eq!(output.lines().filter(|l| l.ends_with(":/")).count(), output.lines().count(), "{output}");
}

fn missing_command() {
    let mut bundle = Bundle::new();
    bundle.process().args = vec!["nope".into()];
    let error = bundle.failure();
    assert_eq!(error.message, "\"nope\": executable file not found in $PATH");
    assert_eq!(error.kind, Kind::InvalidArgument);
    bundle.process().args = vec!["/bin/nope".into()];
    assert_eq!(bundle.failure().message, "\"/bin/nope\": no such file or directory");
    bundle.process().args = vec!["/etc/passwd".into()];
    assert_eq!(bundle.failure().message, "\"/etc/passwd\": permission denied");
    // For a user without the right, and for root without CAP_DAC_OVERRIDE, alike.
    fs::set_permissions(bundle.lower("bin/busybox"), std::os::unix::fs::PermissionsExt::from_mode(0o700))
        .unwrap();
    bundle.process().args = vec!["sh".into()];
    bundle.process().user = Some(User { uid: 1000, ..User::default() });
    assert_eq!(bundle.failure().message, "\"sh\": permission denied");
}

fn command_that_is_no_program() {
    let mut bundle = Bundle::new();
    let script = bundle.lower("bin/rubbish");
    fs::write(&script, "no magic").unwrap();
    fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    bundle.process().args = vec!["rubbish".into()];
    let error = bundle.start(None).map(drop).unwrap_err();
    assert_eq!(
        (error.stage.as_str(), error.errno, error.kind),
        ("exec", libc::ENOEXEC, Kind::InvalidArgument)
    );
}

fn an_init_without_supervisor_ends() {
    let bundle = Bundle::new();
    let (stdio, _pipes) = stdio();
    let mut init = stave_executor::create(&bundle.plan, Some(stdio), None).unwrap();
    assert!(matches!(report(&mut init), Report::Ready { .. }));
    let pidfd = rustix::io::fcntl_dupfd_cloexec(init.pidfd(), 3).unwrap();
    drop(init);
    assert_eq!(wait(pidfd.as_fd()), Status::Exited(128));
}

fn bad_plans() {
    let mut bundle = Bundle::new();
    bundle.process().cwd = "relative".into();
    assert_eq!(bundle.failure().kind, Kind::InvalidArgument);
    let mut bundle = Bundle::new();
    bundle.plan.process = None;
    assert_eq!(bundle.failure().message, "process is missing");
    let mut bundle = Bundle::new();
    bundle.plan.root = None;
    assert_eq!(bundle.failure().message, "root is missing");
    let mut bundle = Bundle::new();
    bundle.process().terminal = true;
    assert!(bundle.failure().message.contains("terminal"));
    let mut bundle = Bundle::new();
    bundle.plan.pid_namespace = stave_supervisor_proto::v1::PidNamespace::Pod.into();
    assert_eq!(bundle.failure().kind, Kind::FailedPrecondition);
    let mut bundle = Bundle::new();
    bundle.plan.cgroup.as_mut().unwrap().v2_dir = "/sys/fs/cgroup/nonexistent".into();
    assert_eq!(bundle.failure().errno, libc::ENOENT);
    let mut bundle = Bundle::new();
    bundle.plan.root.as_mut().unwrap().lower_dirs = vec!["/nonexistent".into()];
    let error = bundle.failure();
    assert!(error.stage == "rootfs" && error.message.contains("/nonexistent"), "{error}");
}

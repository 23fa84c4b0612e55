//! Known holes of container runtimes, each with the test that would have caught it.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::symlink;
use std::path::Path;

use stave_executor::Report;
use stave_supervisor_proto::v1::failure::Kind;
use stave_supervisor_proto::v1::{Capabilities, PidNamespace, User};

use crate::Case;
use crate::bundle::{Bundle, Status, kill, process, report, stdio, wait};

pub const CASES: &[Case] = &[
    ("masked_paths", masked_paths),
    ("readonly_paths", readonly_paths),
    ("cve_2025_31133_dev_null_is_a_link", cve_2025_31133_dev_null_is_a_link),
    ("cve_2026_41579_dev_is_a_link", cve_2026_41579_dev_is_a_link),
    ("cve_2026_88264_no_dev_mount", cve_2026_88264_no_dev_mount),
    ("cve_2024_21626_cwd_and_descriptors", cve_2024_21626_cwd_and_descriptors),
    ("cve_2019_5736_exe_of_the_runtime", cve_2019_5736_exe_of_the_runtime),
    ("cve_2019_19921_proc_and_sys_are_links", cve_2019_19921_proc_and_sys_are_links),
    ("cve_2024_45310_destinations_stay_inside", cve_2024_45310_destinations_stay_inside),
    ("cve_2021_30465_volume_swapped_while_mounting", cve_2021_30465_volume_swapped_while_mounting),
    ("ghsa_q6r4_3wmg_fwcq_cwd_is_a_link", ghsa_q6r4_3wmg_fwcq_cwd_is_a_link),
    ("cve_2026_47262_huge_passwd", cve_2026_47262_huge_passwd),
    ("a_label_that_the_kernel_does_not_take_fails", a_label_that_the_kernel_does_not_take_fails),
    ("old_root_is_gone", old_root_is_gone),
    ("failures_leave_nothing", failures_leave_nothing),
];

fn all_capabilities(bundle: &mut Bundle) {
    let all = u64::MAX;
    bundle.process().capabilities =
        Some(Capabilities { bounding: all, effective: all, permitted: all, inheritable: 0, ambient: 0 });
}

/// Whether the kernel lacks the module or the label: nothing runs without the label that it was to have
/// (CVE-2019-16884).
fn a_label_that_the_kernel_does_not_take_fails() {
    for stage in ["apparmor", "selinux"] {
        let mut bundle = Bundle::new();
        // A /proc that would take it.
        for directory in ["attr", "attr/apparmor"] {
            let path = bundle.lower("proc/thread-self").join(directory);
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join("exec"), "").unwrap();
        }
        bundle.plan.mounts.retain(|mount| mount.destination != "/proc");
        let process = bundle.process();
        let label =
            if stage == "apparmor" { &mut process.apparmor_profile } else { &mut process.selinux_label };
        *label = "stave-test-absent".into();
        let error = bundle.sh("echo ran").start(None).map(drop).unwrap_err();
        assert_eq!(error.stage, stage, "{error}");
        assert!(error.errno != 0, "{error}");
    }
}

fn masked_paths() {
    let mut bundle = Bundle::new();
    fs::create_dir(bundle.lower("secrets")).unwrap();
    fs::write(bundle.lower("secrets/key"), "x").unwrap();
    fs::write(bundle.lower("etc/key"), "x").unwrap();
    fs::copy("/bin/busybox", bundle.lower("bin/tool")).unwrap();
    bundle.plan.masked_paths = [
        "/proc/version",
        "/proc/fs",
        "/secrets",
        "/etc/key",
        "/missing",
        "/etc/group/under-a-file",
        "/bin/tool",
    ]
    .map(str::to_owned)
    .to_vec();
    let output = bundle
        .sh("cat /proc/version /etc/key; echo * > /dev/null; cd /secrets; echo *; touch x; cd /proc/fs; echo *; touch x; \
             stat -c %t:%T /proc/version; tool")
        .run();
    assert_eq!(output.stdout, "*\n*\n1:3\n", "{}", output.stderr);
    assert_eq!(output.stderr.matches("Read-only file system").count(), 2, "{}", output.stderr);
    assert!(output.stderr.contains("tool: Permission denied"), "{}", output.stderr);
    assert!(fs::read_to_string(bundle.lower("etc/key")).unwrap() == "x");
}

fn readonly_paths() {
    let mut bundle = Bundle::new();
    all_capabilities(&mut bundle);
    bundle.plan.readonly_paths = ["/proc/sys", "/etc", "/missing"].map(str::to_owned).to_vec();
    let output = bundle
        .sh("cat /proc/sys/kernel/ostype; echo x > /proc/sys/kernel/hostname; touch /etc/x /tmp/x")
        .run();
    assert_eq!(output.stdout, "Linux\n");
    assert_eq!(output.stderr.matches("Read-only file system").count(), 2, "{}", output.stderr);
}

fn cve_2025_31133_dev_null_is_a_link() {
    // The image has no say where /dev is a tmpfs.
    let mut bundle = Bundle::new();
    fs::create_dir(bundle.lower("dev")).unwrap();
    symlink("/proc/sys/kernel/core_pattern", bundle.lower("dev/null")).unwrap();
    bundle.plan.masked_paths = vec!["/proc/version".into()];
    assert_eq!(bundle.sh("stat -c %t:%T /dev/null /proc/version").output(), "1:3\n1:3\n");
    // Without one, the start fails.
    bundle.plan.mounts.retain(|m| !m.destination.starts_with("/dev"));
    let error = bundle.failure();
    assert_eq!((error.stage.as_str(), error.kind), ("device", Kind::InvalidArgument), "{error}");
    // With the /dev of a volume no node of ours is in it: the mask is ours still.
    let mut bundle = Bundle::new();
    let host = bundle.path("host");
    symlink("/proc/sys/kernel/core_pattern", host.join("null")).unwrap();
    bundle.plan.mounts.retain(|m| !m.destination.starts_with("/dev"));
    bundle.bind(&host, "/dev", 0);
    bundle.plan.masked_paths = vec!["/proc/version".into()];
    assert_eq!(bundle.sh("stat -c %t:%T /proc/version").output(), "1:3\n");
}

fn cve_2026_41579_dev_is_a_link() {
    for target in ["/etc", "../../../../../../../../etc", "/missing/dir"] {
        let mut bundle = Bundle::new();
        symlink(target, bundle.lower("dev")).unwrap();
        let before = fs::read_dir("/etc").unwrap().count();
        let output = bundle.sh("stat -c %t:%T /dev/null").run();
        // Mounted in the container's own directory, or refused.
        if output.status == Status::Exited(0) {
            assert_eq!(output.stdout, "1:3\n");
        }
        assert_eq!(fs::read_dir("/etc").unwrap().count(), before);
        assert!(!Path::new("/etc/null").exists() && !Path::new("/etc/pts").exists());
        assert!(!Path::new("/missing").exists());
    }
}

fn cve_2026_88264_no_dev_mount() {
    let mut bundle = Bundle::new();
    bundle.plan.mounts.retain(|m| !m.destination.starts_with("/dev"));
    assert_eq!(bundle.sh("stat -c %t:%T /dev/null; readlink /dev/stdin").output(), "1:3\n/proc/self/fd/0\n");
    assert!(bundle.path("upper/dev/null").exists());
    // Where the image's own /dev is what there is, its links lead nowhere but into the image, and a console needs a
    // devpts of the container's.
    let outside = bundle.path("outside");
    let devices = |dir: &Path| fs::read_dir(dir).unwrap().count();
    for (link, to) in [
        ("dev", outside.clone()),
        ("dev/console", outside.join("console")),
        ("dev/ptmx", "/dev/ptmx".into()),
        ("dev/pts", "/dev/pts".into()),
    ] {
        let mut bundle = Bundle::new();
        bundle.plan.mounts.retain(|m| !m.destination.starts_with("/dev"));
        if link != "dev" {
            fs::create_dir(bundle.lower("dev")).unwrap();
        }
        symlink(&to, bundle.lower(link)).unwrap();
        let _ = fs::remove_dir_all(&outside);
        fs::create_dir(&outside).unwrap();
        bundle.process().terminal = true;
        let mut init = stave_executor::create(&bundle.plan, None, None).unwrap();
        let Report::Failed(error) = report(&mut init) else { panic!("{link}: a terminal from elsewhere") };
        wait(init.pidfd());
        assert_eq!(error.stage, "terminal", "{link}: {error}");
        assert_eq!(devices(&outside), 0, "{link}");
    }
}

fn cve_2024_21626_cwd_and_descriptors() {
    // What a leak would hand over: directories of the host, open in the supervisor. With and without
    // close-on-exec.
    let leaks: Vec<_> = (0..40).map(|_| fs::File::open("/").unwrap()).collect();
    for leak in &leaks[..20] {
        rustix::io::fcntl_setfd(leak, rustix::io::FdFlags::empty()).unwrap();
    }
    let mut bundle = Bundle::new();
    // The shell itself, not a child: it opens a descriptor of its own for the listing.
    bundle.process().args = vec!["ls".into(), "/proc/self/fd".into()];
    assert_eq!(bundle.output(), "0\n1\n2\n3\n");
    bundle.sh("for f in /proc/1/fd/*; do echo ${f##*/}; done");
    let fds = bundle.output();
    let fds: Vec<&str> = fds.lines().filter(|f| f.parse::<u32>().is_ok_and(|n| n < 10)).collect();
    assert!(fds.starts_with(&["0", "1", "2"]) && fds.len() <= 4, "{fds:?}");
    for n in 3..=50 {
        bundle.process().cwd = format!("/proc/self/fd/{n}");
        let error = bundle.failure();
        assert_eq!(error.stage, "cwd", "{n}: {error}");
    }
    bundle.process().cwd = "/proc/self/cwd".into();
    assert_eq!(bundle.failure().stage, "cwd");
    drop(leaks);
}

/// In a PID namespace that containers share, two kinds of process run the runtime's program: the namespace's init, and the
/// init of a container before its execve. Root of another container, without CAP_SYS_PTRACE, can't open that program.
fn cve_2019_5736_exe_of_the_runtime() {
    let pause = stave_executor::pod_init().unwrap();
    let mut waiting = Bundle::new();
    waiting.plan.pid_namespace = PidNamespace::Pod.into();
    let (stdio, _pipes) = stdio();
    let mut init = stave_executor::create(&waiting.plan, Some(stdio), Some(pause.pid_ns.as_fd())).unwrap();
    assert!(matches!(report(&mut init), Report::Ready { .. }));
    let mut bundle = Bundle::new();
    bundle.plan.pid_namespace = PidNamespace::Pod.into();
    let script = "for p in /proc/[0-9]*; do exe=$(readlink $p/exe) || exe=hidden; test \"$exe\" = /bin/busybox || \
                  { echo $exe; head -c 1 $p/exe 2>/dev/null; (echo x >>$p/exe) 2>/dev/null && echo WRITTEN; }; done; true";
    let (watcher, output) = bundle.sh(script).start(Some(pause.pid_ns.as_fd())).unwrap();
    let output = output.collect(&watcher);
    kill(&init);
    rustix::process::pidfd_send_signal(&pause.pidfd, rustix::process::Signal::KILL).unwrap();
    wait(pause.pidfd.as_fd());
    assert_eq!(output.stdout, "hidden\nhidden\n");
}

fn cve_2019_19921_proc_and_sys_are_links() {
    for name in ["proc", "sys"] {
        let bundle = Bundle::new();
        fs::create_dir(bundle.lower("elsewhere")).unwrap();
        symlink("/elsewhere", bundle.lower(name)).unwrap();
        let error = bundle.failure();
        assert_eq!((error.stage.as_str(), error.kind), ("mount", Kind::InvalidArgument), "{error}");
        assert!(error.message.contains("symbolic link"), "{error}");
    }
}

fn cve_2024_45310_destinations_stay_inside() {
    let mut bundle = Bundle::new();
    let outside = bundle.path("outside");
    symlink(&outside, bundle.lower("link")).unwrap();
    symlink("../../../../../..", bundle.lower("up")).unwrap();
    let host = bundle.path("host");
    fs::write(host.join("file"), "").unwrap();
    bundle.bind(&host, "/link/dir", 0);
    bundle.bind(&host.join("file"), "/up/stave-escape/file", 0);
    bundle.bind(&host, "/../../stave-escape2", 0);
    bundle.sh("ls /link/dir /stave-escape /stave-escape2").output();
    assert!(!outside.exists());
    assert!(!Path::new("/stave-escape").exists() && !Path::new("/stave-escape2").exists());
}

/// Another container swaps a directory of a shared volume for a link to / while we mount into it.
fn cve_2021_30465_volume_swapped_while_mounting() {
    let rounds: usize = std::env::var("STAVE_RACE_ROUNDS").map_or(300, |n| n.parse().unwrap());
    let mut bundle = Bundle::new();
    let volume = bundle.path("host");
    fs::create_dir(volume.join("dir")).unwrap();
    fs::write(volume.join("file"), "").unwrap();
    let script = "while :; do mv dir old; ln -s / dir; rm dir; mv old dir; done";
    let mut racer = std::process::Command::new("/bin/busybox")
        .args(["sh", "-c", script])
        .current_dir(&volume)
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    bundle.bind(&volume, "/volume", 0);
    bundle.bind(&volume.join("file"), "/volume/dir/stave-race/file", 0);
    let mut started = 0;
    let mut failed = Vec::new();
    for _ in 0..rounds {
        // Either way is fine: the link is followed inside the container, or the path was just missing.
        match bundle.start(None) {
            Ok((init, output)) => {
                output.collect(&init);
                started += 1;
            }
            Err(error) => failed.push(error),
        }
    }
    let _ = racer.kill();
    let _ = racer.wait();
    assert!(!Path::new("/stave-race").exists());
    assert_eq!(bundle.mounts_on_the_host(), "");
    assert!(started > 0, "{failed:?}");
    assert!(failed.iter().all(|e| e.stage == "mount"), "{failed:?}");
}

fn ghsa_q6r4_3wmg_fwcq_cwd_is_a_link() {
    let mut bundle = Bundle::new();
    let outside = bundle.path("outside");
    symlink(&outside, bundle.lower("link")).unwrap();
    bundle.process().cwd = "/link/work".into();
    bundle.process().user = Some(User { uid: 1000, ..User::default() });
    assert_eq!(bundle.sh("pwd -P").output(), format!("{}/work\n", outside.display()));
    assert!(!outside.exists());
}

fn cve_2026_47262_huge_passwd() {
    let bundle = Bundle::new();
    fs::File::options().append(true).open(bundle.lower("etc/passwd")).unwrap().set_len(1 << 40).unwrap();
    assert_eq!(bundle.failure().stage, "user");
    fs::remove_file(bundle.lower("etc/passwd")).unwrap();
    nix::unistd::mkfifo(&bundle.lower("etc/passwd"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert_eq!(bundle.failure().stage, "user");
}

fn old_root_is_gone() {
    let mut bundle = Bundle::new();
    all_capabilities(&mut bundle);
    // With all rights: unmounting everything shows no other root underneath, /.. is /.
    let output =
        bundle.sh("ls -d /.. && ls /../../ | grep -c -E '^(usr|boot|root|home)$'; umount -l /; ls /usr; stat -c %i / /..").run();
    assert!(output.stdout.starts_with("/..\n0\n"), "{} {}", output.stdout, output.stderr);
    assert!(!output.stdout.contains("bin\n"), "{}", output.stdout);
    // The root of the namespace, which is where an exec comes to, is the container's and no other.
    let (init, pipes) = bundle.sh("echo up; sleep 1000").start(None).unwrap();
    assert_eq!(pipes.line(), "up");
    let table = bundle.exec(&init, &process(&["cat", "/proc/self/mountinfo"])).unwrap().stdout;
    kill(&init);
    let root = table.lines().find(|line| line.split(' ').nth(4) == Some("/")).unwrap_or_default();
    assert!(root.contains(" - overlay "), "{table}");
}

fn failures_leave_nothing() {
    let fds = || fs::read_dir("/proc/self/fd").unwrap().count();
    let mut bundle = Bundle::new();
    bundle.process().args = vec!["nope".into()];
    let before = fds();
    for _ in 0..20 {
        bundle.failure();
    }
    assert_eq!((bundle.mounts_on_the_host(), fds()), (String::new(), before));
    assert_eq!(fs::read_dir(bundle.lower("")).unwrap().count(), 3);
}

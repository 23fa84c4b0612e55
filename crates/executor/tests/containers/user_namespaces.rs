//! User and time namespaces of a pod.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, chown};
use std::rc::Rc;

use nix::sched::{CloneFlags, setns};
use stave_executor::{OwnNamespaces, PodInitLabels, PodNamespaces};
use stave_supervisor_proto::v1::failure::Kind as FailureKind;
use stave_supervisor_proto::v1::mount::Kind;
use stave_supervisor_proto::v1::{
    IdMapping, Mount, PidNamespace, Process, TimeNamespace, User, UserNamespace,
};

use crate::Case;
use crate::bundle::{Bundle, NODEV, RDONLY, Status, field, kill, process, wait};

pub const CASES: &[Case] = &[
    ("root_inside_is_nobody_outside", root_inside_is_nobody_outside),
    ("namespaces_belong_to_it", namespaces_belong_to_it),
    ("layers_are_mapped_by_one_mount", layers_are_mapped_by_one_mount),
    ("volumes_with_and_without_idmap", volumes_with_and_without_idmap),
    ("a_file_system_that_cant_be_mapped", a_file_system_that_cant_be_mapped),
    ("devices_work_and_disks_do_not", devices_work_and_disks_do_not),
    ("devices_outside_of_dev", devices_outside_of_dev),
    ("masks_and_read_only_paths", masks_and_read_only_paths),
    ("execs_are_in_it", execs_are_in_it),
    ("labels_need_no_proc_of_the_container", labels_need_no_proc_of_the_container),
    ("no_way_to_the_host_for_a_tracer", no_way_to_the_host_for_a_tracer),
    ("a_shared_pid_namespace", a_shared_pid_namespace),
    ("ids_that_are_not_mapped", ids_that_are_not_mapped),
    ("failures_are_told", failures_are_told),
    ("a_mount_table_without_the_host", a_mount_table_without_the_host),
    ("clocks_of_the_pod", clocks_of_the_pod),
    ("clocks_in_a_user_namespace", clocks_in_a_user_namespace),
    ("bad_namespaces_are_refused", bad_namespaces_are_refused),
];

const FIRST: u32 = 200_000;
const COUNT: u32 = 65_536;

/// This process in namespaces of a pod; it comes back when dropped.
struct Pod {
    namespaces: Rc<PodNamespaces>,
    before: Vec<(CloneFlags, File)>,
}

fn mapping() -> UserNamespace {
    let maps = vec![IdMapping { container_id: 0, host_id: FIRST, length: COUNT }];
    UserNamespace { uids: maps.clone(), gids: maps }
}

impl Pod {
    fn new(user: bool, time: Option<TimeNamespace>) -> Pod {
        let kinds = [
            (CloneFlags::CLONE_NEWNET, "net"),
            (CloneFlags::CLONE_NEWIPC, "ipc"),
            (CloneFlags::CLONE_NEWUTS, "uts"),
        ];
        let open = |name: &str| File::open(format!("/proc/self/ns/{name}")).unwrap();
        let before = kinds.map(|(flag, name)| (flag, open(name))).into();
        let own = OwnNamespaces { network: true, ipc: true, uts: true };
        let user = user.then(mapping);
        let namespaces = PodNamespaces::enter(own, user.as_ref(), time.as_ref()).unwrap();
        Pod { namespaces: Rc::new(namespaces), before }
    }

    fn bundle(&self) -> Bundle {
        let mut bundle = Bundle::new();
        bundle.pod = Rc::clone(&self.namespaces);
        chown(bundle.path("upper"), Some(FIRST), Some(FIRST)).unwrap();
        // As the daemon's: /tmp/x of the host's root 0700.
        bundle
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        for (flag, namespace) in &self.before {
            setns(namespace, *flag).unwrap();
        }
    }
}

fn root_inside_is_nobody_outside() {
    let pod = Pod::new(true, None);
    let mut bundle = pod.bundle();
    let script = "id -u; id -g; cat /proc/self/uid_map /proc/self/gid_map; touch /x /dev/shm/x; mkdir /tmp/d; \
                  stat -c %u:%g / /bin/busybox /etc/passwd /x /tmp/d /dev /dev/pts /dev/shm; sleep 1000";
    let (init, out) = bundle.sh(script).start(None).unwrap();
    let map = format!("0 {FIRST} {COUNT}");
    assert_eq!([out.line(), out.line()], ["0", "0"]);
    for _ in 0..2 {
        assert_eq!(out.line().split_whitespace().collect::<Vec<_>>().join(" "), map);
    }
    for _ in 0..8 {
        assert_eq!(out.line(), "0:0");
    }
    let status = fs::read_to_string(format!("/proc/{}/status", init.pid())).unwrap();
    assert_eq!(field(&status, "Uid"), format!("{FIRST}\t{FIRST}\t{FIRST}\t{FIRST}"));
    // On the disk: the image as it was, what is new belongs to nobody that the host knows.
    assert_eq!(fs::metadata(bundle.lower("etc/passwd")).unwrap().uid(), 0);
    for file in ["x", "tmp/d"] {
        let stat = fs::metadata(bundle.path("upper").join(file)).unwrap();
        assert_eq!((stat.uid(), stat.gid()), (FIRST, FIRST), "{file}");
    }
    assert_eq!(bundle.mounts_on_the_host(), "");
    kill(&init);
}

fn namespaces_belong_to_it() {
    let pod = Pod::new(true, None);
    let mut bundle = pod.bundle();
    // Each of these needs a capability in the user namespace that owns the namespace in question.
    let caps = bundle.process().capabilities.as_mut().unwrap();
    for set in [&mut caps.bounding, &mut caps.effective, &mut caps.permitted] {
        *set |= 1 << 21 | 1 << 12;
    }
    let script = "hostname inside && hostname; mount -t tmpfs none /tmp && touch /tmp/x && umount /tmp && echo mounted; \
                  echo 7 >/proc/sys/net/ipv4/ip_default_ttl && echo ttl; \
                  for n in cgroup ipc mnt net pid user uts; do readlink /proc/self/ns/$n; done; sleep 1000";
    for mount in &mut bundle.plan.mounts {
        // For the sysctl.
        mount.attributes &= !RDONLY;
    }
    let (init, out) = bundle.sh(script).start(None).unwrap();
    assert_eq!([out.line(), out.line(), out.line()], ["inside", "mounted", "ttl"]);
    let own_user = fs::read_link(format!("/proc/{}/ns/user", init.pid())).unwrap();
    for name in ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"] {
        let path = format!("/proc/{}/ns/{name}", init.pid());
        assert_eq!(out.line(), fs::read_link(&path).unwrap().to_str().unwrap());
        if name != "user" {
            let owner = stave_sys::namespace_owner(File::open(&path).unwrap().as_fd()).unwrap();
            let inode = rustix::fs::fstat(&owner).unwrap().st_ino;
            assert_eq!(format!("user:[{inode}]"), own_user.to_str().unwrap(), "owner of {name}");
        }
    }
    assert_ne!(own_user, fs::read_link("/proc/self/ns/user").unwrap());
    kill(&init);
}

fn layers_are_mapped_by_one_mount() {
    let pod = Pod::new(true, None);
    let mut bundle = pod.bundle();
    let root = bundle.path("");
    // Fifty layers below one directory, each with a file; a uid beyond the map in one of them.
    let lower = bundle.plan.root.as_mut().unwrap();
    let base = std::mem::take(&mut lower.lower_dirs);
    for n in 0..49 {
        let dir = root.join(format!("layers/{n}/fs"));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(format!("file-{n}")), "").unwrap();
        lower.lower_dirs.push(dir.to_str().unwrap().to_owned());
    }
    fs::rename(&base[0], root.join("layers/base")).unwrap();
    lower.lower_dirs.push(root.join("layers/base").to_str().unwrap().to_owned());
    chown(root.join("layers/7/fs/file-7"), Some(1000), Some(50)).unwrap();
    chown(root.join("layers/8/fs/file-8"), Some(COUNT), Some(COUNT + 5)).unwrap();
    let script = "stat -c %u:%g /file-0 /file-7 /file-8; ls / | grep -c file-; grep -c . /proc/self/mountinfo; \
                  grep ' / / ' /proc/self/mountinfo";
    let output = bundle.sh(script).output();
    let lines: Vec<&str> = output.lines().collect();
    assert_eq!(lines[..4], ["0:0", "1000:50", "65534:65534", "49"], "{output}");
    let mounts: usize = lines[4].parse().unwrap();
    assert!(mounts < 25, "{mounts} mounts for a root file system of 50 layers");
    assert_eq!(lines.len(), 6, "one mount on /: {output}");
    assert_eq!(fs::metadata(root.join("layers/base/etc/passwd")).unwrap().uid(), 0);
}

fn volumes_with_and_without_idmap() {
    let pod = Pod::new(true, None);
    let mut bundle = pod.bundle();
    let volume = bundle.path("host");
    fs::write(volume.join("roots"), "").unwrap();
    fs::write(volume.join("alices"), "").unwrap();
    chown(volume.join("alices"), Some(1000), Some(1000)).unwrap();
    rustix::fs::chmod(&volume, rustix::fs::Mode::from_raw_mode(0o777)).unwrap();
    bundle.bind(&volume, "/mapped", 0).idmap = true;
    bundle.bind(&volume, "/plain", 0);
    bundle.bind(&volume.join("roots"), "/file", RDONLY).idmap = true;
    let script = "stat -c %u:%g /mapped/roots /mapped/alices /plain/roots /file; touch /mapped/new /plain/other; \
                  rm /plain/roots 2>/dev/null || stat -c %u /plain/new; rm /mapped/alices; touch /file 2>&1";
    let output = bundle.sh(script).run();
    let owners: Vec<&str> = output.stdout.lines().take(5).collect();
    // In a directory that all may write to, anything can be removed: what counts is whose the files are.
    assert_eq!(owners[..4], ["0:0", "1000:1000", "65534:65534", "0:0"], "{}{}", output.stdout, output.stderr);
    assert!(output.stdout.contains("Read-only file system"), "{}", output.stdout);
    assert_eq!(fs::metadata(volume.join("new")).unwrap().uid(), 0, "as root of the volume");
    assert_eq!(fs::metadata(volume.join("other")).unwrap().uid(), FIRST, "as nobody");
    assert!(!volume.join("alices").exists());
}

fn a_file_system_that_cant_be_mapped() {
    let pod = Pod::new(true, None);
    let mut bundle = pod.bundle();
    bundle.bind("/proc/sys/kernel".as_ref(), "/mnt", 0).idmap = true;
    let error = bundle.failure();
    assert!(error.message.contains("\"/mnt\": source \"/proc/sys/kernel\""), "{error}");
    assert!(error.message.contains("can't be idmapped"), "{error}");
    assert_eq!(error.kind, FailureKind::FailedPrecondition);
    // What is mounted below need not be: then it stays as it is.
    let mut bundle = pod.bundle();
    bundle.bind("/".as_ref(), "/host", RDONLY).idmap = true;
    let output = bundle.sh("stat -c %u /host/etc/passwd /host/proc/version").output();
    assert_eq!(output, "0\n65534\n");
}

fn devices_work_and_disks_do_not() {
    let pod = Pod::new(true, None);
    let mut bundle = pod.bundle();
    let disk = fs::read_dir("/dev").unwrap().flatten().find(|entry| {
        use std::os::unix::fs::FileTypeExt;
        entry.file_type().unwrap().is_block_device()
    });
    let disk = disk.expect("a block device of the host").path();
    let stat = rustix::fs::stat(&disk).unwrap();
    bundle.plan.devices.push(stave_supervisor_proto::v1::Device {
        kind: stave_supervisor_proto::v1::device::Kind::Block.into(),
        path: "/dev/sub/disk".into(),
        major: rustix::fs::major(stat.st_rdev),
        minor: rustix::fs::minor(stat.st_rdev),
        mode: 0o660,
        ..Default::default()
    });
    let caps = bundle.process().capabilities.as_mut().unwrap();
    // All there are, as a privileged container has them.
    (caps.bounding, caps.effective, caps.permitted) = (u64::MAX, u64::MAX, u64::MAX);
    let script = "echo x >/dev/null && head -c 4 /dev/zero | wc -c; ls -l /dev/fd >/dev/null && echo fd; \
                  head -c 1 /dev/sub/disk >/dev/null 2>&1 || echo denied; chown 0 /dev/sub/disk 2>/dev/null || echo kept; \
                  mknod /dev/mine b 8 0 2>/dev/null || echo none; mknod /tmp/mine c 1 3 2>/dev/null || echo none; \
                  grep -c ' /dev/' /proc/self/mountinfo; stat -c %a /dev/sub; echo out >/dev/stdout";
    let output = bundle.sh(script).output();
    assert_eq!(output, "4\nfd\ndenied\nkept\nnone\nnone\n3\n755\nout\n");
    // Without a tmpfs of ours on /dev the host's nodes are bound.
    let mut bundle = pod.bundle();
    bundle.plan.mounts.retain(|mount| mount.destination == "/proc" || mount.destination == "/sys");
    let output = bundle
        .sh("echo x >/dev/null && head -c 4 /dev/zero | wc -c; grep -c ' /dev/' /proc/self/mountinfo")
        .output();
    assert_eq!(output, "4\n6\n");
}

fn devices_outside_of_dev() {
    let pod = Pod::new(true, None);
    let zero = |path: &str| stave_supervisor_proto::v1::Device {
        path: path.into(),
        major: 1,
        minor: 5,
        mode: 0o666,
        ..Default::default()
    };
    let mut bundle = pod.bundle();
    // No path of the host, and one that is something else there.
    bundle.plan.devices.extend([zero("/opt/made/zero"), zero("/etc/hostname"), zero("/dev/sub/zero")]);
    let script = "for d in /opt/made/zero /etc/hostname /dev/sub/zero; do head -c 3 $d | wc -c; done; \
                  stat -c '%t:%T %a' /opt/made/zero; stat -c %u:%a /opt/made; grep -c zero /proc/self/mountinfo";
    assert_eq!(bundle.sh(script).output(), "3\n3\n3\n1:5 666\n0:755\n1\n");
    // On the disk there is no node, which a user of the node could open.
    let upper = fs::symlink_metadata(bundle.path("upper/opt/made/zero")).unwrap();
    assert!(upper.is_file() && upper.uid() == FIRST && upper.len() == 0, "{upper:?}");
}

fn masks_and_read_only_paths() {
    let pod = Pod::new(true, None);
    let mut bundle = pod.bundle();
    bundle.plan.masked_paths = vec!["/proc/kcore".into(), "/proc/acpi".into(), "/sys/firmware".into()];
    bundle.plan.readonly_paths = vec!["/proc/sys".into()];
    bundle.plan.root.as_mut().unwrap().read_only = true;
    let script = "cat /proc/kcore | wc -c; ls /sys/firmware | wc -l; echo 1 >/proc/sys/net/ipv4/ip_forward; touch /x; \
                  mount -o remount,rw /proc/sys; echo h >/proc/sys/kernel/core_pattern";
    let output = bundle.sh(script).run();
    assert_eq!(output.stdout, "0\n0\n");
    assert_eq!(output.stderr.matches("Read-only file system").count(), 3, "{}", output.stderr);
    assert!(output.stderr.contains("permission denied"), "{}", output.stderr);
}

fn execs_are_in_it() {
    let pod = Pod::new(true, None);
    let mut bundle = pod.bundle();
    let (init, _out) = bundle.sh("sleep 1000").start(None).unwrap();
    let script = "id -u; cat /proc/self/uid_map; readlink /proc/self/ns/user; touch /by-exec; stat -c %u /by-exec; \
                  ls /proc/self/fd | wc -l; grep CapEff /proc/self/status; echo out >/dev/stdout";
    let output = bundle.exec(&init, &process(&["sh", "-c", script])).unwrap();
    let lines: Vec<&str> = output.stdout.lines().collect();
    assert_eq!(lines.len(), 7, "{} {}", output.stdout, output.stderr);
    assert_eq!((lines[0], lines[3], lines[6]), ("0", "0", "out"));
    assert!(lines[1].contains(&FIRST.to_string()), "{}", output.stdout);
    assert_eq!(lines[2], fs::read_link(format!("/proc/{}/ns/user", init.pid())).unwrap().to_str().unwrap());
    assert_eq!(lines[4], "4", "three streams and the directory itself");
    assert!(lines[5].ends_with("a80425fb"), "{}", output.stdout);
    assert_eq!(fs::metadata(bundle.path("upper/by-exec")).unwrap().uid(), FIRST);
    // As another user, who must be able to open his streams anew.
    let mut alice = process(&["sh", "-c", "id -u; echo again >/dev/stdout"]);
    alice.user = Some(User { uid: 1000, ..User::default() });
    let output = bundle.exec(&init, &alice).unwrap();
    assert_eq!(output.stdout, "1000\nagain\n", "{}", output.stderr);
    kill(&init);
}

/// The kernel makes no procfs in a user namespace's mount namespace without one in full view. What is refused here is the
/// label, or its file where the kernel lacks the module; not the way to the file.
fn labels_need_no_proc_of_the_container() {
    let pod = Pod::new(true, None);
    let mut bundle = pod.bundle();
    bundle.plan.mounts.retain(|mount| mount.destination != "/proc");
    let (init, out) = bundle.sh("echo up; sleep 1000").start(None).unwrap();
    assert_eq!(out.line(), "up");
    for stage in ["apparmor", "selinux"] {
        let labelled = |process: &mut Process| {
            let label =
                if stage == "apparmor" { &mut process.apparmor_profile } else { &mut process.selinux_label };
            *label = "stave-test-absent".into();
        };
        let mut command = process(&["true"]);
        labelled(&mut command);
        let of_exec = bundle.exec(&init, &command).err().unwrap();
        let mut other = pod.bundle();
        other.plan.mounts.retain(|mount| mount.destination != "/proc");
        labelled(other.process());
        for error in [of_exec, other.sh("echo ran").start(None).map(drop).unwrap_err()] {
            assert_eq!(error.stage, stage, "{error}");
            assert!([libc::ENOENT, libc::EINVAL].contains(&error.errno), "{error}");
        }
    }
    kill(&init);
}

/// CVE-2016-9962: here the process of an exec is in the container's PID namespace before it is in its mount namespace.
fn no_way_to_the_host_for_a_tracer() {
    let pod = Pod::new(true, None);
    let mut bundle = pod.bundle();
    let leak = File::open(bundle.dir.path()).unwrap();
    rustix::io::fcntl_setfd(&leak, rustix::io::FdFlags::empty()).unwrap();
    let all = bundle.process().capabilities.as_mut().unwrap();
    (all.bounding, all.effective, all.permitted) = (u64::MAX, u64::MAX, u64::MAX);
    let host = bundle.dir.path().to_str().unwrap().to_owned();
    let script = format!(
        "echo up; seen=0; while test ! -e /tmp/stop; do for p in /proc/[0-9]*; do case $p in /proc/1|/proc/$$) ;; \
         *) seen=1; test -e $p/root{host} && echo ROOT $p; for f in $p/fd/* $p/cwd; do \
         case $(readlink $f) in {host}*) echo FD $f ;; esac; done ;; esac; done; done; echo seen $seen"
    );
    let (init, pipes) = bundle.sh(&script).start(None).unwrap();
    assert_eq!(pipes.line(), "up");
    for _ in 0..100 {
        bundle.exec(&init, &process(&["true"])).unwrap();
    }
    bundle.exec(&init, &process(&["touch", "/tmp/stop"])).unwrap();
    let output = pipes.collect(&init);
    assert_eq!(output.stdout, "seen 1\n");
}

fn a_shared_pid_namespace() {
    let pod = Pod::new(true, None);
    let pause = pod.namespaces.init(&PodInitLabels::default()).unwrap();
    let status = fs::read_to_string(format!("/proc/{}/status", pause.pid)).unwrap();
    assert_eq!(field(&status, "Uid"), format!("{FIRST}\t{FIRST}\t{FIRST}\t{FIRST}"));
    assert_eq!(field(&status, "CapPrm"), "0000000000000000");
    assert_eq!(fs::read_to_string(format!("/proc/{}/oom_score_adj", pause.pid)).unwrap(), "0\n");
    let owner = stave_sys::namespace_owner(pause.pid_ns.as_fd()).unwrap();
    let user = fs::metadata(format!("/proc/{}/ns/user", pause.pid)).unwrap().ino();
    assert_eq!(rustix::fs::fstat(&owner).unwrap().st_ino, user);
    let mut bundle = pod.bundle();
    bundle.plan.pid_namespace = PidNamespace::Pod.into();
    let (init, out) = bundle
        .sh("cat /proc/1/comm; ls /proc/1/root 2>/dev/null; kill -9 1; sleep 1000")
        .start(Some(pause.pid_ns.as_fd()))
        .unwrap();
    assert_eq!(out.line(), "pod-init");
    // And one that joins a container's.
    let mut debug = pod.bundle();
    debug.plan.pid_namespace = PidNamespace::Target.into();
    let (second, out) = debug.sh("ps -o args").start(Some(init.pidfd())).unwrap();
    assert!(out.collect(&second).stdout.contains("sleep 1000"));
    rustix::process::pidfd_send_signal(&pause.pidfd, rustix::process::Signal::KILL).unwrap();
    assert_eq!(wait(init.pidfd()), Status::Signalled(libc::SIGKILL));
    wait(pause.pidfd.as_fd());
    let error = bundle.start(Some(pause.pid_ns.as_fd())).map(drop).unwrap_err();
    assert!(error.message.contains("has ended"), "{error}");
}

fn ids_that_are_not_mapped() {
    let pod = Pod::new(true, None);
    for user in [
        User { uid: COUNT, ..User::default() },
        User { gid: Some(COUNT), ..User::default() },
        User { supplemental_groups: vec![COUNT], ..User::default() },
    ] {
        let mut bundle = pod.bundle();
        bundle.process().user = Some(user);
        let error = bundle.failure();
        assert_eq!(error.kind, FailureKind::InvalidArgument, "{error}");
        assert!(error.message.contains(&COUNT.to_string()), "{error}");
    }
}

fn failures_are_told() {
    let pod = Pod::new(true, None);
    let mut bundle = pod.bundle();
    bundle.bind("/no/such/path".as_ref(), "/mnt", 0);
    let error = bundle.failure();
    assert_eq!((error.errno, error.kind), (libc::ENOENT, FailureKind::InvalidArgument), "{error}");
    let mut bundle = pod.bundle();
    bundle.plan.root.as_mut().unwrap().upper_dir = "/no/upper".into();
    assert!(bundle.failure().message.contains("/no/upper"));
    let mut bundle = pod.bundle();
    bundle.process().args = vec!["no-such-command".into()];
    assert!(bundle.failure().message.contains("no-such-command"));
    let mut bundle = pod.bundle();
    bundle.plan.pid_namespace = PidNamespace::Node.into();
    assert!(bundle.failure().message.contains("user namespace"));
}

fn a_mount_table_without_the_host() {
    let pod = Pod::new(true, None);
    let mut bundle = pod.bundle();
    let second = bundle.path("second");
    fs::create_dir(&second).unwrap();
    fs::write(second.join("in-image"), "").unwrap();
    bundle.plan.mounts.push(Mount {
        kind: Kind::Image.into(),
        destination: "/image".into(),
        attributes: RDONLY | NODEV,
        lower_dirs: vec![second.to_str().unwrap().to_owned()],
        ..Mount::default()
    });
    let caps = bundle.process().capabilities.as_mut().unwrap();
    (caps.bounding, caps.effective, caps.permitted) = (u64::MAX, u64::MAX, u64::MAX);
    let script = "cut -d' ' -f5 /proc/self/mountinfo; stat -c %u:%g /image/in-image; touch /image/x; \
                  umount -l / 2>/dev/null; ls /var /root /home 2>/dev/null; cat /proc/1/root/etc/hostname 2>/dev/null";
    let output = bundle.sh(script).run();
    let mut lines: Vec<&str> = output.stdout.lines().collect();
    lines.sort_unstable();
    let mounts = lines.iter().filter(|line| line.starts_with('/') && !line.starts_with("/sys/fs/cgroup/"));
    let wanted =
        ["/", "/dev", "/dev/mqueue", "/dev/pts", "/dev/shm", "/image", "/proc", "/sys", "/sys/fs/cgroup"];
    assert_eq!(mounts.copied().collect::<Vec<_>>(), wanted, "{}", output.stdout);
    assert!(lines.contains(&"0:0"), "{}", output.stdout);
    assert!(output.stderr.contains("Read-only file system"), "{}", output.stderr);
    assert_eq!(bundle.mounts_on_the_host(), "");
}

/// Seconds of /proc/uptime.
fn uptime(text: &str) -> f64 {
    text.split(' ').next().unwrap().parse().unwrap()
}

fn clocks_of_the_pod() {
    let day = 86_400;
    let pod =
        Pod::new(false, Some(TimeNamespace { boottime: day * 1_000_000_000, monotonic: 3_600_000_000_000 }));
    let mut bundle = pod.bundle();
    let script = "cat /proc/uptime; readlink /proc/self/ns/time; cat /proc/self/timens_offsets; sleep 1000";
    let (init, out) = bundle.sh(script).start(None).unwrap();
    let inside = uptime(&out.line());
    let outside = uptime(&fs::read_to_string("/proc/uptime").unwrap());
    assert!((inside - outside - day as f64).abs() < 60.0, "{inside} {outside}");
    let namespace = out.line();
    assert_ne!(namespace, fs::read_link("/proc/self/ns/time").unwrap().to_str().unwrap());
    let offsets: Vec<Vec<String>> =
        (0..2).map(|_| out.line().split_whitespace().map(str::to_owned).collect()).collect();
    assert_eq!(offsets, [["monotonic", "3600", "0"], ["boottime", "86400", "0"]]);
    let output = bundle.exec(&init, &process(&["readlink", "/proc/self/ns/time"])).unwrap();
    assert_eq!(output.stdout.trim(), namespace);
    let mut second = pod.bundle();
    assert_eq!(second.sh("readlink /proc/self/ns/time").output().trim(), namespace);
    kill(&init);
}

fn clocks_in_a_user_namespace() {
    let pod = Pod::new(true, Some(TimeNamespace { boottime: 86_400_000_000_000, monotonic: -1 }));
    let pause = pod.namespaces.init(&PodInitLabels::default()).unwrap();
    let mut bundle = pod.bundle();
    let (init, out) =
        bundle.sh("cat /proc/uptime; readlink /proc/self/ns/time; sleep 1000").start(None).unwrap();
    let outside = uptime(&fs::read_to_string("/proc/uptime").unwrap());
    assert!(uptime(&out.line()) > outside + 86_300.0);
    let namespace = out.line();
    let output = bundle.exec(&init, &process(&["sh", "-c", "readlink /proc/self/ns/time; id -u"])).unwrap();
    assert_eq!(output.stdout, format!("{namespace}\n0\n"));
    let path = format!("/proc/{}/ns/time", init.pid());
    let owner = stave_sys::namespace_owner(File::open(path).unwrap().as_fd()).unwrap();
    let user = fs::metadata(format!("/proc/{}/ns/user", init.pid())).unwrap().ino();
    assert_eq!(rustix::fs::fstat(&owner).unwrap().st_ino, user);
    rustix::process::pidfd_send_signal(&pause.pidfd, rustix::process::Signal::KILL).unwrap();
    wait(pause.pidfd.as_fd());
    kill(&init);
}

fn bad_namespaces_are_refused() {
    let own = OwnNamespaces::default();
    let before = fs::read_link("/proc/self/ns/net").unwrap();
    let mut user = mapping();
    user.gids[0].length = 0;
    let error = PodNamespaces::enter(own, Some(&user), None).unwrap_err();
    assert_eq!(error.kind, FailureKind::InvalidArgument, "{error}");
    // The kernel's own limit: no clock goes below zero.
    let time = TimeNamespace { boottime: -i64::MAX, monotonic: 0 };
    let error = PodNamespaces::enter(OwnNamespaces { network: true, ..own }, None, Some(&time)).unwrap_err();
    assert_eq!(error.kind, FailureKind::InvalidArgument, "{error}");
    assert!(error.message.contains("boottime"), "{error}");
    assert_eq!(fs::read_link("/proc/self/ns/net").unwrap(), before);
}

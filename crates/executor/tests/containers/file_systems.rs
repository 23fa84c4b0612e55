//! Root file system, mounts, devices.

use std::fs;
use std::os::unix::fs::symlink;

use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_bind, mount_change, unmount};
use stave_supervisor_proto::v1::failure::Kind;
use stave_supervisor_proto::v1::{Device, Mount, Propagation, RootFs, mount};

use crate::Case;
use crate::bundle::{Bundle, NOEXEC, RDONLY, Status};

pub const CASES: &[Case] = &[
    ("writes_land_in_the_upper_directory", writes_land_in_the_upper_directory),
    ("many_layers", many_layers),
    ("paths_too_long_for_fsconfig", paths_too_long_for_fsconfig),
    ("plain_directory", plain_directory),
    ("overlay_options", overlay_options),
    ("nothing_of_the_host_is_mounted", nothing_of_the_host_is_mounted),
    ("read_only_root", read_only_root),
    ("standard_mounts", standard_mounts),
    ("devices_and_links", devices_and_links),
    ("bind_mounts", bind_mounts),
    ("recursive_read_only", recursive_read_only),
    ("propagation", propagation),
    ("missing_source", missing_source),
    ("bad_file_system", bad_file_system),
    ("read_only_tmpfs_is_filled_first", read_only_tmpfs_is_filled_first),
    ("volumes_are_made", volumes_are_made),
    ("bound_dev_is_left_alone", bound_dev_is_left_alone),
    ("cgroup_mount", cgroup_mount),
];

fn writes_land_in_the_upper_directory() {
    let mut bundle = Bundle::new();
    bundle.sh("echo new > /tmp/file; rm /etc/group; ls /etc").output();
    assert_eq!(fs::read_to_string(bundle.path("upper/tmp/file")).unwrap(), "new\n");
    assert!(!bundle.lower("tmp/file").exists());
    assert!(bundle.lower("etc/group").exists());
}

fn many_layers() {
    let mut bundle = Bundle::new();
    let mut dirs = Vec::new();
    for n in 0..100 {
        let dir = bundle.path(&format!("layers/{n}"));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(format!("file{n}")), "").unwrap();
        fs::write(dir.join("top"), n.to_string()).unwrap();
        dirs.push(dir.to_str().unwrap().to_owned());
    }
    let root = bundle.plan.root.as_mut().unwrap();
    dirs.append(&mut root.lower_dirs);
    root.lower_dirs = dirs;
    // However many they are, they are one mount.
    let mounts = Bundle::new().sh("wc -l </proc/self/mountinfo").output();
    let script = "cat /top; echo; ls /file* | wc -l; wc -l </proc/self/mountinfo";
    assert_eq!(bundle.sh(script).output(), format!("0\n100\n{mounts}"));
}

/// Falls back to mount(2) with names relative to the common directory.
fn paths_too_long_for_fsconfig() {
    let mut bundle = Bundle::new();
    let long = bundle.path(&format!("{}/{}", "a".repeat(200), "b,:\\".repeat(40)));
    let mut dirs = Vec::new();
    for n in 0..3 {
        let dir = long.join(n.to_string());
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("top"), n.to_string()).unwrap();
        dirs.push(dir.to_str().unwrap().to_owned());
    }
    let base = bundle.path("lower");
    let moved = long.join("base");
    fs::rename(base, &moved).unwrap();
    dirs.push(moved.to_str().unwrap().to_owned());
    bundle.plan.root.as_mut().unwrap().lower_dirs = dirs;
    assert_eq!(bundle.sh("cat /top; echo x > /tmp/y").output(), "0");
    assert!(bundle.path("upper/tmp/y").exists());
}

fn plain_directory() {
    let mut bundle = Bundle::new();
    let lower = bundle.path("lower").to_str().unwrap().to_owned();
    bundle.plan.root = Some(RootFs { lower_dirs: vec![lower], ..RootFs::default() });
    bundle.sh("echo x > /tmp/x; readlink -f /").output();
    assert!(bundle.lower("tmp/x").exists());
}

fn overlay_options() {
    let mut bundle = Bundle::new();
    bundle.plan.root.as_mut().unwrap().options = vec!["volatile".into()];
    assert!(bundle.sh("grep ' / ' /proc/self/mountinfo").output().contains("volatile"));
    bundle.plan.root.as_mut().unwrap().options = vec!["rubbish=1".into()];
    let error = bundle.failure();
    assert!(error.stage == "rootfs" && error.message.contains("rubbish"), "{error}");
}

fn nothing_of_the_host_is_mounted() {
    let mut bundle = Bundle::new();
    let mounts = bundle.sh("cat /proc/self/mountinfo; ! ls /var/tmp /usr 2>&1").output();
    let points: Vec<&str> =
        mounts.lines().filter_map(|l| l.split(' ').nth(4)).filter(|p| p.starts_with('/')).collect();
    let cgroup = |p: &&str| p.starts_with("/sys/fs/cgroup");
    let mut others: Vec<&str> = points.iter().filter(|p| !cgroup(p)).copied().collect();
    others.sort_unstable();
    assert_eq!(others, ["/", "/dev", "/dev/mqueue", "/dev/pts", "/dev/shm", "/proc", "/sys"], "{mounts}");
    // Nothing propagates.
    assert!(!mounts.contains("shared:") && !mounts.contains("master:"), "{mounts}");
    // And nothing of it on the host.
    assert_eq!(bundle.mounts_on_the_host(), "");
}

fn read_only_root() {
    let mut bundle = Bundle::new();
    bundle.plan.root.as_mut().unwrap().read_only = true;
    let host = bundle.path("host");
    bundle.bind(&host, "/data", 0);
    let output = bundle.sh("touch /test; touch /data/x && echo volume; touch /dev/shm/x && echo shm").run();
    assert_eq!(output.stdout, "volume\nshm\n");
    assert_eq!(output.stderr, "touch: /test: Read-only file system\n");
}

fn standard_mounts() {
    let mut bundle = Bundle::new();
    let output = bundle
        .sh("cat /proc/self/mountinfo; stat -c %a /dev /dev/shm; touch /sys/x; ls /proc/1/exe >&2")
        .run();
    let options = |point: &str| {
        let line = output.stdout.lines().find(|l| l.split(' ').nth(4) == Some(point)).unwrap_or_default();
        line.split(' ').nth(5).unwrap_or_default().to_owned()
    };
    assert_eq!(options("/proc"), "rw,nosuid,nodev,noexec,relatime");
    assert_eq!(options("/dev"), "rw,nosuid");
    assert_eq!(options("/sys"), "ro,nosuid,nodev,noexec,relatime");
    assert!(output.stdout.ends_with("755\n1777\n"), "{}", output.stdout);
    assert!(output.stderr.contains("Read-only"), "{}", output.stderr);
}

fn devices_and_links() {
    let mut bundle = Bundle::new();
    bundle.plan.devices.push(Device {
        path: "/dev/sub/fifo".into(),
        kind: stave_supervisor_proto::v1::device::Kind::Fifo.into(),
        mode: 0o640,
        uid: 3,
        gid: 4,
        ..Device::default()
    });
    let output = bundle
        .sh("for d in null zero full random urandom tty; do stat -c '%n %t:%T %a %F' /dev/$d; done; \
             stat -c '%n %a %u:%g %F' /dev/sub/fifo; for l in fd stdin stdout stderr ptmx; do readlink /dev/$l; done; \
             test \"$(readlink /dev/core)\" = /proc/kcore && echo core; \
             echo x > /dev/null; head -c 2 /dev/zero | wc -c")
        .output();
    let wanted = "/dev/null 1:3 666 character special file\n/dev/zero 1:5 666 character special file\n\
        /dev/full 1:7 666 character special file\n/dev/random 1:8 666 character special file\n\
        /dev/urandom 1:9 666 character special file\n/dev/tty 5:0 666 character special file\n\
        /dev/sub/fifo 640 3:4 fifo\n/proc/self/fd\n/proc/self/fd/0\n/proc/self/fd/1\n/proc/self/fd/2\npts/ptmx\n";
    // Not where the kernel has none.
    let core = if std::path::Path::new("/proc/kcore").exists() { "core\n" } else { "" };
    assert_eq!(output, format!("{wanted}{core}2\n"));
}

fn bind_mounts() {
    let mut bundle = Bundle::new();
    let host = bundle.path("host");
    fs::write(host.join("file"), "content\n").unwrap();
    symlink("file", host.join("link")).unwrap();
    fs::copy("/bin/busybox", host.join("echo")).unwrap();
    bundle.bind(&host, "/data", 0);
    bundle.bind(&host, "/ro", RDONLY | NOEXEC);
    bundle.bind(&host.join("file"), "/etc/made/file", RDONLY);
    bundle.bind(&host.join("link"), "/etc/passwd2", 0);
    // Onto a link of the image: resolved inside.
    symlink("/etc/real", bundle.lower("etc/link")).unwrap();
    bundle.bind(&host, "/etc/link", 0);
    let output = bundle
        .sh("cat /data/file /etc/made/file /etc/passwd2 /etc/real/file; touch /data/new; touch /ro/new; \
             echo x > /etc/made/file; /ro/echo hi; /data/echo hi")
        .run();
    assert_eq!(output.stdout, "content\ncontent\ncontent\ncontent\nhi\n", "{}", output.stderr);
    assert_eq!(output.stderr.matches("Read-only file system").count(), 2, "{}", output.stderr);
    assert!(output.stderr.contains("/ro/echo: Permission denied"), "{}", output.stderr);
    assert!(host.join("new").exists());
    // A file on a directory: an error that names both.
    bundle.bind(&host.join("file"), "/etc", 0);
    let error = bundle.failure();
    assert_eq!((error.stage.as_str(), error.kind), ("mount", Kind::InvalidArgument), "{error}");
    assert!(error.message.contains("/etc"), "{error}");
}

/// A mount on the host that goes away with the test.
struct HostMount(std::path::PathBuf);

impl HostMount {
    fn new(dir: &std::path::Path, propagation: MountPropagationFlags) -> HostMount {
        mount_bind(dir, dir).unwrap();
        let mount = HostMount(dir.to_owned());
        mount_change(dir, propagation).unwrap();
        mount
    }
}

impl Drop for HostMount {
    fn drop(&mut self) {
        while unmount(&self.0, UnmountFlags::DETACH).is_ok() {}
    }
}

fn recursive_read_only() {
    let mut bundle = Bundle::new();
    let host = bundle.path("host");
    fs::create_dir(host.join("sub")).unwrap();
    let _sub = HostMount::new(&host.join("sub"), MountPropagationFlags::PRIVATE);
    bundle.bind(&host, "/plain", RDONLY);
    bundle.bind(&host, "/recursive", RDONLY).recursive_attributes = true;
    bundle.bind(&host, "/single", RDONLY).recursive = false;
    let output = bundle.sh("for d in plain recursive single; do touch /$d/sub/$d && echo $d; done").run();
    assert_eq!(output.stdout, "plain\n", "{}", output.stderr);
}

fn propagation() {
    let mut bundle = Bundle::new();
    let host = bundle.path("host");
    let inner = bundle.path("inner");
    fs::create_dir_all(host.join("point")).unwrap();
    fs::create_dir_all(&inner).unwrap();
    fs::write(inner.join("seen"), "").unwrap();
    let _host = HostMount::new(&host, MountPropagationFlags::SHARED);
    bundle.bind(&host, "/private", 0);
    bundle.bind(&host, "/slave", 0).propagation = Propagation::Slave.into();
    bundle.bind(&host, "/shared", 0).propagation = Propagation::Shared.into();
    let caps = u64::MAX;
    let all = bundle.process().capabilities.as_mut().unwrap();
    (all.bounding, all.effective, all.permitted) = (caps, caps, caps);
    let script = "echo up; while ! test -e /shared/point/seen; do sleep 0.02; done; ls /private/point; echo -; \
        ls /slave/point; mkdir /shared/back; mount -t tmpfs back /shared/back; touch /shared/back/there; echo done; \
        while ! test -e /shared/stop; do sleep 0.02; done";
    let (init, pipes) = bundle.sh(script).start(None).unwrap();
    assert_eq!(pipes.line(), "up");
    let _point = HostMount::new(&host.join("point"), MountPropagationFlags::PRIVATE);
    unmount(host.join("point"), UnmountFlags::DETACH).unwrap();
    mount_bind(&inner, host.join("point")).unwrap();
    assert_eq!([pipes.line(), pipes.line(), pipes.line()], ["-", "seen", "done"]);
    let back = HostMount(host.join("back"));
    assert!(back.0.join("there").exists());
    fs::write(host.join("stop"), "").unwrap();
    assert_eq!(pipes.collect(&init).status, Status::Exited(0));
}

fn missing_source() {
    let mut bundle = Bundle::new();
    let missing = bundle.path("missing");
    bundle.bind(&missing, "/data", 0);
    let error = bundle.failure();
    assert_eq!(error.kind, Kind::InvalidArgument);
    assert_eq!(error.errno, libc::ENOENT);
    assert_eq!(error.to_string(), format!("mount: \"/data\": source {missing:?}: No such file or directory"));
}

fn bad_file_system() {
    let mut bundle = Bundle::new();
    let tmpfs = |options: &[&str], fs_type: &str| Mount {
        kind: mount::Kind::FileSystem.into(),
        destination: "/x".into(),
        fs_type: fs_type.into(),
        options: options.iter().map(|o| (*o).to_owned()).collect(),
        ..Mount::default()
    };
    bundle.plan.mounts.push(tmpfs(&["rubbish=1"], "tmpfs"));
    let error = bundle.failure();
    assert!(error.message.contains("\"/x\"") && error.message.contains("rubbish"), "{error}");
    bundle.plan.mounts.pop();
    bundle.plan.mounts.push(tmpfs(&[], "rubbishfs"));
    assert!(bundle.failure().message.contains("rubbishfs"));
}

fn read_only_tmpfs_is_filled_first() {
    let mut bundle = Bundle::new();
    bundle.plan.mounts.iter_mut().find(|m| m.destination == "/dev").unwrap().attributes |= RDONLY;
    let output = bundle.sh("ls /dev/null; touch /dev/x").run();
    assert_eq!(output.stdout, "/dev/null\n");
    assert_eq!(output.stderr, "touch: /dev/x: Read-only file system\n");
}

fn volumes_are_made() {
    let mut bundle = Bundle::new();
    bundle.plan.directories = vec!["/var/lib/volume".into(), "/../../up".into()];
    assert_eq!(bundle.sh("ls -d /var/lib/volume /up").output(), "/up\n/var/lib/volume\n");
    assert!(bundle.path("upper/up").exists());
}

fn bound_dev_is_left_alone() {
    let mut bundle = Bundle::new();
    let host = bundle.path("host");
    bundle.plan.mounts.retain(|m| !m.destination.starts_with("/dev"));
    bundle.bind(&host, "/dev", 0);
    // One that is asked for elsewhere is made.
    bundle.plan.devices.push(stave_supervisor_proto::v1::Device {
        path: "/opt/zero".into(),
        major: 1,
        minor: 5,
        mode: 0o666,
        ..Default::default()
    });
    assert_eq!(bundle.sh("ls /dev; head -c 3 /opt/zero | wc -c").output(), "3\n");
    assert_eq!(fs::read_dir(&host).unwrap().count(), 0);
}

/// CVE-2023-25809.
fn cgroup_mount() {
    let mut bundle = Bundle::new();
    let v1 = bundle.plan.cgroup.as_ref().unwrap().v1.clone();
    let script = "cd /sys/fs/cgroup; ls; echo -; for f in cgroup.procs */cgroup.procs; do \
        test -e $f && { cat $f; echo 1 > $f && echo WRITTEN $f; mkdir ${f%/*}/new && echo MADE $f; }; done; true";
    let output = bundle.sh(script).run();
    let (listing, rest) = output.stdout.split_once("-\n").unwrap();
    if v1.is_empty() {
        assert!(listing.contains("cgroup.procs"), "{listing}");
    } else {
        for hierarchy in &v1 {
            assert!(listing.lines().any(|l| l == hierarchy.name), "{listing}");
        }
        assert!(listing.lines().any(|l| l == "unified"), "{listing}");
    }
    assert!(!rest.contains("WRITTEN") && !rest.contains("MADE"), "{rest}");
    // Its own cgroup only: the processes of the container, by their pids in it.
    assert!(rest.lines().all(|pid| pid.parse::<u32>().is_ok_and(|pid| pid < 1000)), "{rest}");
    assert!(rest.lines().any(|pid| pid == "1"));

    // Without a namespace of its own: the host's, still read-only.
    bundle.plan.cgroup_namespace = false;
    let name = bundle.plan.container_id.clone();
    let find = if v1.is_empty() {
        format!("/sys/fs/cgroup/{name}")
    } else {
        format!("/sys/fs/cgroup/unified/{name}")
    };
    let output = bundle.sh(&format!("ls -d {find}; mkdir {find}/x")).run();
    assert_eq!(output.stdout, format!("{find}\n"));
    assert!(output.stderr.contains("Read-only"), "{}", output.stderr);
}

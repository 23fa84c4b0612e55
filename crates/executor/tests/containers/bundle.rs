//! A root file system, its cgroups, and the way to run a plan. Everything goes when it is dropped.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{WaitId, WaitIdOptions, waitid};
use stave_executor::{Error, ExecTarget, Init, PodNamespaces, Report, Stdio};
use stave_supervisor_proto::v1::{
    Capabilities, Cgroup, Device, Mount, Plan, Process, RootFs, User, V1Hierarchy, mount::Kind,
};

pub const RDONLY: u64 = 1;
pub const NOSUID: u64 = 2;
pub const NODEV: u64 = 4;
pub const NOEXEC: u64 = 8;
const APPLETS: &[&str] = &[
    "sh", "ls", "cat", "echo", "sleep", "id", "stat", "touch", "mount", "umount", "readlink", "mkdir",
    "grep", "true", "false", "kill", "tty", "pwd", "ps", "dd", "ln", "wc", "chmod", "head", "env", "test",
    "rm", "setsid", "hostname", "mknod", "chown", "date", "cut", "ipcs",
];
/// Docker's default set.
pub const DEFAULT_CAPS: u64 = 0xa804_25fb;
const LIMIT: Duration = Duration::from_secs(20);

pub struct Bundle {
    pub dir: tempfile::TempDir,
    pub plan: Plan,
    /// User and time namespace of the pod.
    pub pod: Rc<PodNamespaces>,
    cgroup_dirs: Vec<PathBuf>,
}

pub struct Output {
    pub status: Status,
    pub stdout: String,
    pub stderr: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Exited(i32),
    Signalled(i32),
}

fn cgroup2_mount() -> PathBuf {
    ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
        .into_iter()
        .map(PathBuf::from)
        .find(|d| d.join("cgroup.procs").exists())
        .expect("a cgroup2 mount")
}

/// The v1 hierarchies of the host; none on hosts with cgroup v2 alone.
fn v1_mounts() -> Vec<(String, PathBuf)> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    mounts
        .lines()
        .map(|l| l.split(' ').collect::<Vec<_>>())
        .filter(|f| f[2] == "cgroup")
        .map(|f| (Path::new(f[1]).file_name().unwrap().to_str().unwrap().to_owned(), PathBuf::from(f[1])))
        .collect()
}

impl Bundle {
    pub fn new() -> Bundle {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("stave-test-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        // On a disk file system: an overlay's upper directory on tmpfs behaves differently.
        let dir = tempfile::Builder::new().prefix(&name).tempdir_in("/var/tmp").unwrap();
        for sub in ["lower/bin", "lower/etc", "lower/tmp", "upper", "work", "host"] {
            fs::create_dir_all(dir.path().join(sub)).unwrap();
        }
        let lower = dir.path().join("lower");
        fs::copy("/bin/busybox", lower.join("bin/busybox")).unwrap();
        for applet in APPLETS {
            symlink("busybox", lower.join("bin").join(applet)).unwrap();
        }
        fs::write(
            lower.join("etc/passwd"),
            "root:x:0:0::/root:/bin/sh\nalice:x:1000:1001::/home/alice:\n1002:x:0:0::/:\n",
        )
        .unwrap();
        fs::write(lower.join("etc/group"), "root:x:0:\nstaff:x:50:alice\n").unwrap();

        let mut cgroup_dirs = Vec::new();
        let v2 = cgroup2_mount().join(&name);
        fs::create_dir(&v2).unwrap();
        cgroup_dirs.push(v2.clone());
        let mut v1 = Vec::new();
        for (controller, mount) in v1_mounts() {
            let dir = mount.join(&name);
            fs::create_dir(&dir).unwrap();
            cgroup_dirs.push(dir.clone());
            for file in ["cpuset.cpus", "cpuset.mems"].iter().filter(|_| controller == "cpuset") {
                fs::write(dir.join(file), fs::read(mount.join(file)).unwrap()).unwrap();
            }
            v1.push(V1Hierarchy { name: controller, dir: dir.to_str().unwrap().to_owned() });
        }
        let path = |sub: &str| dir.path().join(sub).to_str().unwrap().to_owned();
        let plan = Plan {
            container_id: name,
            root: Some(RootFs {
                lower_dirs: vec![path("lower")],
                upper_dir: path("upper"),
                work_dir: path("work"),
                ..RootFs::default()
            }),
            mounts: default_mounts(),
            devices: default_devices(),
            cgroup_namespace: true,
            process: Some(process(&["/bin/true"])),
            cgroup: Some(Cgroup { v2_dir: v2.to_str().unwrap().to_owned(), v1, oom_file: String::new() }),
            ..Plan::default()
        };
        Bundle { dir, plan, pod: Rc::default(), cgroup_dirs }
    }

    pub fn path(&self, sub: &str) -> PathBuf {
        self.dir.path().join(sub)
    }

    pub fn lower(&self, sub: &str) -> PathBuf {
        self.path("lower").join(sub)
    }

    pub fn process(&mut self) -> &mut Process {
        self.plan.process.as_mut().unwrap()
    }

    pub fn sh(&mut self, script: &str) -> &mut Bundle {
        self.process().args = ["sh", "-c", script].map(str::to_owned).to_vec();
        self
    }

    pub fn bind(&mut self, source: &Path, destination: &str, attributes: u64) -> &mut Mount {
        self.plan.mounts.push(Mount {
            source: source.to_str().unwrap().to_owned(),
            destination: destination.to_owned(),
            attributes,
            recursive: true,
            ..Mount::default()
        });
        self.plan.mounts.last_mut().unwrap()
    }

    /// What of this bundle is mounted outside of containers. (Other programs mount too.)
    pub fn mounts_on_the_host(&self) -> String {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let ours = self.dir.path().to_str().unwrap();
        mounts.lines().filter(|l| l.contains(ours) || l.contains("stave-race")).collect()
    }

    /// Runs the plan to its end.
    pub fn run(&self) -> Output {
        let (init, output) = self.start(None).unwrap();
        output.collect(&init)
    }

    /// Standard output of a plan that succeeds.
    pub fn output(&self) -> String {
        let output = self.run();
        assert_eq!(output.status, Status::Exited(0), "stdout: {}\nstderr: {}", output.stdout, output.stderr);
        output.stdout
    }

    /// The failure of a plan that can't be created, which leaves nothing running.
    pub fn failure(&self) -> Error {
        let (stdio, _pipes) = stdio();
        let mut init = match self.pod.create(&self.plan, Some(stdio), None) {
            Ok(init) => init,
            Err(error) => return error,
        };
        let report = report(&mut init);
        let error = match report {
            Report::Failed(error) => error,
            other => {
                kill(&init);
                panic!("created after all: {other:?}");
            }
        };
        let status = wait(init.pidfd());
        assert_eq!(status, Status::Exited(error.exit_code().unwrap_or(128)));
        error
    }

    pub fn start(&self, pod_pid_ns: Option<BorrowedFd<'_>>) -> Result<(Init, Pipes), Error> {
        let (stdio, pipes) = stdio();
        let mut init = self.pod.create(&self.plan, Some(stdio), pod_pid_ns)?;
        match report(&mut init) {
            Report::Ready { .. } => {}
            Report::Failed(error) => {
                wait(init.pidfd());
                return Err(error);
            }
            Report::ExecDone | Report::Staged(_) => panic!("ended: {:?}", wait(init.pidfd())),
        }
        init.start()?;
        match report(&mut init) {
            Report::ExecDone => Ok((init, pipes)),
            Report::Failed(error) => {
                wait(init.pidfd());
                Err(error)
            }
            other => panic!("{other:?}"),
        }
    }

    /// Runs a further process to its end.
    pub fn exec(&self, init: &Init, process: &Process) -> Result<Output, Error> {
        let (stdio, pipes) = stdio();
        let target = ExecTarget {
            init: init.pidfd(),
            cgroup: self.plan.cgroup.as_ref().unwrap(),
            entrances: None,
            name: "1",
        };
        let mut exec = self.pod.exec(&target, process, stdio)?;
        let mut failed = None;
        loop {
            wait_for(exec.control().unwrap());
            match exec.read_report().unwrap() {
                Some(Report::Failed(error)) => failed = Some(error),
                Some(Report::ExecDone) => break,
                Some(Report::Ready { .. } | Report::Staged(_)) | None => {}
            }
        }
        let (stdout, stderr) = pipes.read();
        let status = wait(exec.pidfd());
        let leaf = exec.cgroup_dir().unwrap().to_owned();
        exec.remove_cgroup().unwrap();
        assert!(!leaf.exists());
        match failed {
            Some(error) => Err(error),
            None => Ok(Output { status, stdout, stderr }),
        }
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        if let Some(v2) = self.cgroup_dirs.first() {
            let _ = stave_executor::kill_cgroup(v2);
        }
        // Children that a failed test left behind.
        let deadline = Instant::now() + Duration::from_secs(5);
        for dir in &self.cgroup_dirs {
            while fs::remove_dir(dir).is_err_and(|e| e.raw_os_error() == Some(libc::EBUSY))
                && Instant::now() < deadline
            {
                for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                    let _ = fs::remove_dir(entry.path());
                }
                let _ = waitid(WaitId::All, WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
                std::thread::sleep(Duration::from_millis(5));
            }
            if dir.exists() {
                println!("left behind: {dir:?}");
            }
        }
    }
}

pub fn process(args: &[&str]) -> Process {
    let caps = DEFAULT_CAPS;
    Process {
        args: args.iter().map(|a| (*a).to_owned()).collect(),
        env: vec!["PATH=/bin".to_owned()],
        cwd: "/".to_owned(),
        user: Some(User::default()),
        capabilities: Some(Capabilities {
            bounding: caps,
            effective: caps,
            permitted: caps,
            inheritable: 0,
            ambient: 0,
        }),
        ..Process::default()
    }
}

fn default_mounts() -> Vec<Mount> {
    let new = |fs_type: &str, destination: &str, attributes: u64, options: &[&str]| Mount {
        kind: Kind::FileSystem.into(),
        destination: destination.to_owned(),
        fs_type: fs_type.to_owned(),
        attributes,
        options: options.iter().map(|o| (*o).to_owned()).collect(),
        ..Mount::default()
    };
    vec![
        new("proc", "/proc", NOSUID | NODEV | NOEXEC, &[]),
        new("tmpfs", "/dev", NOSUID | 0x20, &["mode=755", "size=65536k"]),
        new("devpts", "/dev/pts", NOSUID | NOEXEC, &["newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
        new("mqueue", "/dev/mqueue", NOSUID | NODEV | NOEXEC, &[]),
        new("tmpfs", "/dev/shm", NOSUID | NODEV | NOEXEC, &["mode=1777"]),
        new("sysfs", "/sys", NOSUID | NODEV | NOEXEC | RDONLY, &[]),
        Mount {
            kind: Kind::Cgroup.into(),
            destination: "/sys/fs/cgroup".to_owned(),
            attributes: NOSUID | NODEV | NOEXEC | RDONLY,
            ..Mount::default()
        },
    ]
}

fn default_devices() -> Vec<Device> {
    [("null", 3), ("zero", 5), ("full", 7), ("random", 8), ("urandom", 9)]
        .map(|(name, minor)| Device {
            path: format!("/dev/{name}"),
            major: 1,
            minor,
            mode: 0o666,
            ..Device::default()
        })
        .into_iter()
        .chain([Device { path: "/dev/tty".into(), major: 5, minor: 0, mode: 0o666, ..Device::default() }])
        .collect()
}

/// Our ends of a process's output.
pub struct Pipes {
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
}

impl Pipes {
    /// Up to the end of both. One after the other: fine for output that fits into a pipe.
    pub fn read(self) -> (String, String) {
        let read = |fd: OwnedFd| {
            let mut text = Vec::new();
            wait_for(fd.as_fd());
            File::from(fd).read_to_end(&mut text).unwrap();
            String::from_utf8_lossy(&text).into_owned()
        };
        (read(self.stdout), read(self.stderr))
    }

    pub fn collect(self, init: &Init) -> Output {
        let (stdout, stderr) = self.read();
        Output { status: wait(init.pidfd()), stdout, stderr }
    }

    /// The next line of standard output, while the process goes on.
    pub fn line(&self) -> String {
        let mut line = Vec::new();
        let mut byte = [0];
        loop {
            wait_for(self.stdout.as_fd());
            if rustix::io::read(&self.stdout, &mut byte).unwrap() == 0 || byte == [b'\n'] {
                return String::from_utf8(line).unwrap();
            }
            line.push(byte[0]);
        }
    }
}

pub fn stdio() -> (Stdio, Pipes) {
    let (out_read, out_write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let (err_read, err_write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let stdin = File::open("/dev/null").unwrap().into();
    (Stdio { stdin, stdout: out_write, stderr: err_write }, Pipes { stdout: out_read, stderr: err_read })
}

pub fn wait_for(fd: BorrowedFd<'_>) {
    let timeout = Timespec { tv_sec: LIMIT.as_secs() as i64, tv_nsec: 0 };
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    let ready = rustix::io::retry_on_intr(|| poll(&mut fds, Some(&timeout))).unwrap();
    assert_eq!(ready, 1, "nothing happened in {LIMIT:?}");
}

pub fn report(init: &mut Init) -> Report {
    loop {
        wait_for(init.control().unwrap());
        if let Some(report) = init.read_report().unwrap() {
            return report;
        }
    }
}

pub fn wait(pidfd: BorrowedFd<'_>) -> Status {
    wait_for(pidfd);
    let status = waitid(WaitId::PidFd(pidfd), WaitIdOptions::EXITED).unwrap().unwrap();
    match status.exit_status() {
        Some(code) => Status::Exited(code),
        None => Status::Signalled(status.terminating_signal().unwrap()),
    }
}

pub fn kill(init: &Init) {
    let _ = rustix::process::pidfd_send_signal(init.pidfd(), rustix::process::Signal::KILL);
    wait(init.pidfd());
}

/// The value of a field of /proc/PID/status in `text`.
pub fn field<'a>(text: &'a str, name: &str) -> &'a str {
    text.lines()
        .find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))
        .unwrap_or_else(|| panic!("no {name} in {text}"))
        .trim()
}

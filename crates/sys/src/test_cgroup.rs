//! A cgroup2 directory for one test.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

pub(crate) struct TestCgroup(PathBuf);

impl TestCgroup {
    pub(crate) fn new(name: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let mount = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
            .into_iter()
            .find(|d| Path::new(d).join("cgroup.procs").exists())
            .expect("a cgroup2 mount");
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = Path::new(mount).join(format!("stave-sys-{name}-{}-{number}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        Self(dir)
    }

    pub(crate) fn name(&self) -> &str {
        self.0.file_name().unwrap().to_str().unwrap()
    }

    pub(crate) fn open(&self) -> File {
        File::open(&self.0).unwrap()
    }

    pub(crate) fn holds_this_process(&self) -> bool {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        own.lines().any(|line| line.strip_prefix("0::/") == Some(self.name()))
    }
}

impl Drop for TestCgroup {
    fn drop(&mut self) {
        while fs::remove_dir(&self.0).is_err_and(|e| e.raw_os_error() == Some(libc::EBUSY)) {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}

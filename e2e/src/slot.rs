use std::fs::File;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::{Condvar, LazyLock, Mutex};

use nix::fcntl::{Flock, FlockArg};

/// How many daemons of one test process run at once, unless `STAVE_E2E_AT_ONCE` says otherwise.
const AT_ONCE: usize = 4;

static FREE: LazyLock<(Mutex<usize>, Condvar)> = LazyLock::new(|| {
    let at_once = match std::env::var("STAVE_E2E_AT_ONCE") {
        Ok(text) => text.parse().expect("STAVE_E2E_AT_ONCE is a whole number"),
        Err(_) => AT_ONCE,
    };
    (Mutex::new(at_once), Condvar::new())
});

/// A number that is this daemon's alone on the whole machine, and the names and addresses made from it.
/// A lock file holds it, so a crashed test gives it back.
#[derive(Debug)]
pub(crate) struct Slot {
    number: u8,
    _lock: Flock<File>,
}

impl Slot {
    /// Waits for a turn and takes a free number.
    pub(crate) fn take() -> Slot {
        let (free, freed) = &*FREE;
        let mut count =
            freed.wait_while(free.lock().unwrap_or_else(|e| e.into_inner()), |free| *free == 0).unwrap();
        *count -= 1;
        drop(count);
        let dir = crate::registry::cache_dir().join("slots");
        std::fs::create_dir_all(&dir).expect("directory of the slots");
        for number in 1..=250u8 {
            let file = File::create(dir.join(number.to_string())).expect("lock file of a slot");
            if let Ok(lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                return Slot { number, _lock: lock };
            }
        }
        panic!("all 250 slots are taken");
    }

    pub(crate) fn bridge(&self) -> String {
        format!("stave-e2e{}", self.number)
    }

    pub(crate) fn subnet(&self, prefix: u8) -> String {
        format!("{}/{prefix}", Ipv4Addr::new(10, 252, self.number, 0))
    }

    pub(crate) fn subnet6(&self) -> String {
        format!("fd52:{:x}::/64", self.number)
    }

    pub(crate) fn cgroup_parent(&self) -> String {
        match crate::systemd_driver() {
            // A dash would nest it.
            true => format!("/stavee2e{}.slice", self.number),
            false => format!("/stave-e2e{}", self.number),
        }
    }

    /// Short, as a socket's path has room for 107 bytes.
    pub(crate) fn directory(&self) -> PathBuf {
        std::env::temp_dir().join(format!("stave-e2e{}", self.number))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let (free, freed) = &*FREE;
        *free.lock().unwrap_or_else(|e| e.into_inner()) += 1;
        freed.notify_one();
    }
}

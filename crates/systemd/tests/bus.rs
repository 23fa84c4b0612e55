//! Without systemd: a bus that is not there, that is silent, and a real one that systemd is not on. With systemd, see
//! the tests of the whole program in `e2e`.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::{BufRead as _, BufReader};
use std::os::unix::net::UnixListener;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use stave_systemd::{Scope, Systemd, SystemdError};

fn scope() -> Scope<'static> {
    let pid = std::process::id().try_into().unwrap();
    Scope { name: "stave-0.scope", slice: "x.slice", transient_slice: true, description: "test", pid }
}

#[tokio::test]
async fn a_missing_bus_is_told_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let address = format!("unix:path={}", dir.path().join("bus").display());
    let begin = Instant::now();
    let error = Systemd::at(&address, Duration::from_secs(20)).start_scope(&scope()).await.unwrap_err();
    assert!(matches!(error, SystemdError::Unreachable { .. }) && error.is_unavailable(), "{error:?}");
    assert!(error.to_string().starts_with("starting the scope stave-0.scope: "), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn a_silent_bus_is_a_deadline_with_the_stage() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bus");
    let _listener = UnixListener::bind(&path).unwrap();
    let systemd = Systemd::at(&format!("unix:path={}", path.display()), Duration::from_millis(300));
    let begin = Instant::now();
    let error = systemd.stop("stave-0.scope").await.unwrap_err();
    assert!(matches!(error, SystemdError::Deadline { .. }) && error.is_unavailable(), "{error:?}");
    assert_eq!(error.to_string(), "stopping stave-0.scope: no answer from systemd within 300ms");
    assert!(begin.elapsed() < Duration::from_secs(3));
}

/// A bus of our own.
struct DBus {
    daemon: Child,
    address: String,
}

impl DBus {
    fn start(dir: &std::path::Path) -> Self {
        let mut daemon = Command::new("dbus-daemon")
            .args(["--session", "--nofork", "--nopidfile", "--print-address"])
            .arg(format!("--address=unix:path={}", dir.join("bus").display()))
            .stdout(Stdio::piped())
            .spawn()
            .expect("dbus-daemon; on Debian the package dbus-daemon");
        let mut address = String::new();
        BufReader::new(daemon.stdout.take().unwrap()).read_line(&mut address).unwrap();
        Self { daemon, address: address.trim().to_owned() }
    }
}

impl Drop for DBus {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

#[tokio::test]
async fn a_bus_without_systemd_is_tried_for_a_while() {
    let dir = tempfile::tempdir().unwrap();
    let bus = DBus::start(dir.path());
    let systemd = Systemd::at(&bus.address, Duration::from_secs(6));
    let begin = Instant::now();
    let error = systemd.list("stave-*.scope").await.unwrap_err();
    assert!(matches!(error, SystemdError::Unreachable { .. }), "{error:?}");
    assert!(error.to_string().contains("org.freedesktop.systemd1"), "{error}");
    // systemd is gone for a moment when it is executed anew.
    let tried = begin.elapsed();
    assert!(tried >= Duration::from_millis(2900) && tried < Duration::from_secs(6), "{tried:?}");
}

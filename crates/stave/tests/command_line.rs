//! The binary as a person calls it, where no daemon is needed.
#![allow(clippy::unwrap_used, clippy::panic)] // a test program

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

fn stave(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_stave")).args(args).env_remove("STAVE_ADDRESS").output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// A configuration in a directory of its own, removed at the end.
struct Config(PathBuf);

impl Config {
    fn new(name: &str, content: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("stave-command-line-{}-{name}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("config.toml"), content).unwrap();
        Self(dir)
    }

    fn file(&self) -> String {
        self.0.join("config.toml").display().to_string()
    }
}

impl Drop for Config {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

const CHECKS: &[&str] = &[
    "cgroup layout",
    "memory controller",
    "namespaces",
    "user namespaces",
    "overlayfs",
    "idmapped mounts",
    "seccomp",
    "AppArmor",
    "SELinux",
    "capabilities",
    "netfilter",
    "CNI",
    "fuse",
    "PSI",
    "ready supervisors",
];

#[test]
fn check_prints_every_row_and_exits_by_the_worst() {
    let config = Config::new("check", "[network]\nmode = \"bridge\"\n");
    let output = stave(&["check", "--config", &config.file()]);
    let table = text(&output.stdout);
    assert!(matches!(output.status.code(), Some(0 | 1)), "{:?}\n{table}", output.status);
    assert_eq!(output.status.code() == Some(1), table.contains("  degraded  "), "{table}");
    for name in CHECKS {
        assert!(table.lines().any(|line| line.starts_with(&format!("{name}  "))), "{name}\n{table}");
    }
}

#[test]
fn check_as_json_has_the_same_rows() {
    let config = Config::new("check-json", "");
    let output = stave(&["check", "--config", &config.file(), "-o", "json"]);
    assert!(matches!(output.status.code(), Some(0 | 1)), "{:?}", output.status);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let names: Vec<&str> =
        report["checks"].as_array().unwrap().iter().map(|check| check["name"].as_str().unwrap()).collect();
    for name in CHECKS {
        assert!(names.contains(name), "{name} in {names:?}");
    }
    assert_eq!(report["features"]["user_namespaces"], true, "the probe's child process did its part");
}

#[test]
fn check_says_whether_a_daemon_answers() {
    let config = Config::new("check-daemon", "");
    let socket = config.0.join("stave.sock");
    fs::write(config.file(), format!("listen = {socket:?}\n[pods]\nready = 3\n")).unwrap();
    let check = |words: &[&str]| {
        let begin = Instant::now();
        let output = stave(&["check", "--config", &config.file(), "-o", "json"]);
        assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let pool = &report["ready_supervisors"];
        let why = pool["no_answer"].as_str().unwrap();
        assert!(
            words.iter().all(|word| why.contains(word)) && why.contains(socket.to_str().unwrap()),
            "{why}"
        );
        assert!(pool["size"] == 3 && pool["daemon"].is_null(), "{pool}");
        let rows = report["checks"].as_array().unwrap();
        let row = rows.iter().find(|row| row["name"] == "ready supervisors").unwrap();
        let found = row["found"].as_str().unwrap();
        assert!(found.contains("pods.ready = 3") && found.contains(why) && row["status"] == "ok", "{row}");
    };
    check(&["no daemon at"]);
    // One that takes connections, by its kernel, and never answers.
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    check(&["no answer", "hangs"]);
    drop(listener);
    check(&["nobody listens"]);
}

#[test]
fn config_prints_what_it_loads_and_names_what_is_wrong() {
    let config = Config::new("config", "root = \"/srv/stave\"\n[network]\nmode = \"none\"\n");
    let output = stave(&["config", "--config", &config.file()]);
    assert!(output.status.success(), "{output:?}");
    let printed = text(&output.stdout);
    assert!(printed.contains("root = \"/srv/stave\"") && printed.contains("mode = \"none\""), "{printed}");

    // What is printed is a configuration that says the same.
    let again = Config::new("config-again", &printed);
    assert_eq!(text(&stave(&["config", "--config", &again.file()]).stdout), printed);

    let bad = Config::new("config-bad", "colour = \"red\"\n");
    let output = stave(&["config", "--config", &bad.file()]);
    assert_eq!(output.status.code(), Some(1));
    let error = text(&output.stderr);
    assert!(error.contains("colour") && error.contains(&bad.file()), "{error}");
}

#[test]
fn without_a_daemon_every_verb_says_so_in_one_line() {
    for args in [
        &["ps"][..],
        &["pods"],
        &["images"],
        &["pull", "x"],
        &["run", "x"],
        &["exec", "x", "true"],
        &["logs", "x"],
        &["stop", "x"],
        &["rm", "x"],
        &["rmi", "x"],
        &["version"],
        &["info"],
    ] {
        let output = stave(&[&["--address", "/nonexistent/stave.sock"], args].concat());
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        assert!(output.stdout.is_empty(), "{args:?}");
        assert_eq!(error.lines().count(), 1, "{args:?}: {error}");
        assert!(
            error.contains("/nonexistent/stave.sock") && error.contains("stave serve"),
            "{args:?}: {error}"
        );
    }
}

#[test]
fn the_address_comes_from_the_environment_and_the_option_wins() {
    let with = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_stave"))
            .args(args)
            .env("STAVE_ADDRESS", "/nonexistent/environment.sock")
            .output()
            .unwrap();
        text(&output.stderr)
    };
    assert!(with(&["ps"]).contains("/nonexistent/environment.sock"));
    assert!(with(&["ps", "--address", "/nonexistent/option.sock"]).contains("/nonexistent/option.sock"));
}

#[test]
fn help_tells_every_verb() {
    let output = stave(&["--help"]);
    assert!(output.status.success());
    let help = text(&output.stdout);
    for verb in [
        "serve", "check", "config", "ps", "pods", "images", "pull", "run", "exec", "logs", "stop", "rm",
        "rmi", "version", "info",
    ] {
        assert!(
            help.lines().any(|line| line.trim_start().starts_with(&format!("{verb} "))),
            "{verb}\n{help}"
        );
    }
}

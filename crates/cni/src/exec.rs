//! Runs one plugin once.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use rustix::pipe::{PipeFlags, pipe_with};
use serde_json::Value;
use tokio::net::unix::pipe::Receiver;
use tokio::process::{Child, Command};
use tokio::sync::watch;

use crate::CniError;
use crate::directory::find;
use crate::result::start;

/// Most bytes of a plugin's answer.
const MAX_OUTPUT: usize = 1 << 20;
/// Most bytes of its standard error that are kept.
const MAX_STDERR: usize = 8 << 10;
/// Most bytes of it, or of an error, in a message.
const MAX_MESSAGE: usize = 2 << 10;
/// After SIGKILL a process is gone unless it hangs in the kernel; nobody waits for that.
const KILL_TIMEOUT: Duration = Duration::from_secs(2);

/// How plugins are run.
#[derive(Debug, Clone)]
pub(crate) struct Runner {
    pub(crate) bin_dirs: Vec<PathBuf>,
    /// How long a plugin has for one command.
    pub(crate) limit: Duration,
}

/// One run.
pub(crate) struct Call<'a> {
    /// The plugin's type.
    pub(crate) plugin: &'a str,
    /// `CNI_COMMAND`.
    pub(crate) command: &'static str,
    /// What is set beside `CNI_COMMAND`, `CNI_PATH` and `PATH`.
    pub(crate) environment: &'a [(&'static str, OsString)],
    /// What it reads.
    pub(crate) input: &'a [u8],
    /// The file that holds `input` and is locked as long as the plugin runs, for a daemon that comes after this one.
    pub(crate) guard: Option<&'a Path>,
    /// Once this is true, the plugin is killed.
    pub(crate) unwanted: Option<watch::Receiver<bool>>,
}

/// What a plugin printed that ended well.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) stdout: Vec<u8>,
    /// "; standard error: ...", or nothing: for an error that comes of the answer.
    pub(crate) said: String,
}

impl Call<'_> {
    fn spawn_error(&self, what: impl Into<String>) -> impl FnOnce(io::Error) -> CniError {
        let (plugin, command, what) = (self.plugin.to_owned(), self.command, what.into());
        move |source| CniError::Spawn { plugin, command, what, source }
    }
}

impl Runner {
    /// Where plugins are looked for, for people.
    pub(crate) fn dirs(&self) -> String {
        self.bin_dirs.iter().map(|dir| dir.display().to_string()).collect::<Vec<_>>().join(", ")
    }

    /// A plugin's program.
    pub(crate) fn find(&self, plugin: &str) -> Result<PathBuf, CniError> {
        find(&self.bin_dirs, plugin)
            .ok_or_else(|| CniError::Missing { plugin: plugin.to_owned(), dirs: self.dirs() })
    }

    /// Runs a plugin to its end and gives its answer, if its status is 0. It has an environment of its own, a process
    /// group of its own, and no descriptors of ours. What it leaves running in the background is not waited for.
    pub(crate) async fn run(&self, call: Call<'_>) -> Result<Answer, CniError> {
        let program = self.find(call.plugin)?;
        let began = Instant::now();
        let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(io::Error::from);
        let (out_read, out_write) = pipe().map_err(call.spawn_error("pipe"))?;
        let (err_read, err_write) = pipe().map_err(call.spawn_error("pipe"))?;
        let stdin = input(&call).map_err(call.spawn_error("its input"))?;
        let mut command = Command::new(&program);
        command
            .env_clear()
            .env("CNI_COMMAND", call.command)
            .env("CNI_PATH", self.path())
            .env("PATH", std::env::var_os("PATH").unwrap_or_else(|| DEFAULT_PATH.into()))
            .envs(call.environment.iter().map(|(name, value)| (name, value)))
            .current_dir("/")
            .process_group(0)
            .stdin(Stdio::from(stdin))
            .stdout(Stdio::from(out_write))
            .stderr(Stdio::from(err_write));
        let spawned = command.spawn();
        // Our ends of its descriptors: the pipes end, and the lock goes, when it has closed its own.
        drop(command);
        let child = spawned.map_err(call.spawn_error(format!("starting {}", program.display())))?;
        let mut plugin = Running { child, guard: call.guard };
        let mut stdout = Capture::new(out_read, MAX_OUTPUT).map_err(call.spawn_error("pipe"))?;
        let mut stderr = Capture::new(err_read, MAX_STDERR).map_err(call.spawn_error("pipe"))?;

        let deadline = tokio::time::sleep(self.limit);
        let unwanted = is_true(call.unwanted.clone());
        tokio::pin!(deadline, unwanted);
        let status = loop {
            tokio::select! {
                status = plugin.child.wait() => break status.map_err(call.spawn_error("waiting for its end"))?,
                () = stdout.more(), if !stdout.ended => {
                    if stdout.over {
                        plugin.kill().await;
                        stderr.drain();
                        let said = said(&stderr.bytes);
                        let reason = format!("it printed more than {MAX_OUTPUT} bytes, and was killed{said}");
                        return Err(CniError::Answer {
                            plugin: call.plugin.to_owned(), command: call.command, reason,
                        });
                    }
                }
                () = stderr.more(), if !stderr.ended => {}
                () = &mut unwanted => {
                    plugin.kill().await;
                    return Err(CniError::Unwanted { plugin: call.plugin.to_owned(), command: call.command });
                }
                () = &mut deadline => {
                    plugin.kill().await;
                    let said = String::from_utf8_lossy(&stderr.bytes).trim().to_owned();
                    return Err(CniError::Timeout {
                        plugin: call.plugin.to_owned(),
                        command: call.command,
                        limit: self.limit,
                        stderr: if said.is_empty() { said } else { format!("; it said: {}", shorten(&said)) },
                    });
                }
            }
        };
        plugin.ended();
        // All that it wrote is in the pipes; what it left running may keep them open for ever.
        stdout.drain();
        stderr.drain();
        tracing::debug!(plugin = call.plugin, command = call.command, %status, elapsed = ?began.elapsed(), "CNI plugin ended");
        if status.success() {
            if !stderr.bytes.is_empty() {
                let said = String::from_utf8_lossy(&stderr.bytes);
                tracing::debug!(plugin = call.plugin, command = call.command, stderr = %said.trim(), "CNI plugin says");
            }
            return Ok(Answer { stdout: stdout.bytes, said: said(&stderr.bytes) });
        }
        let (code, message) = failure(status, &stdout.bytes, &stderr.bytes);
        Err(CniError::Failed { plugin: call.plugin.to_owned(), command: call.command, code, message })
    }

    /// `CNI_PATH`.
    fn path(&self) -> OsString {
        let mut path = OsString::new();
        for dir in &self.bin_dirs {
            if !path.is_empty() {
                path.push(":");
            }
            path.push(dir);
        }
        path
    }
}

/// As login(1) has it for root.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Waits for it; for ever, where it can't come.
async fn is_true(flag: Option<watch::Receiver<bool>>) {
    if let Some(mut flag) = flag
        && flag.wait_for(|set| *set).await.is_ok()
    {
        return;
    }
    std::future::pending().await
}

/// A file instead of a pipe: a plugin that does not read it, or not to the end, holds up nobody.
fn input(call: &Call<'_>) -> io::Result<File> {
    let Some(path) = call.guard else {
        let mut file = File::from(rustix::fs::memfd_create("cni", rustix::fs::MemfdFlags::CLOEXEC)?);
        file.write_all(call.input)?;
        file.rewind()?;
        return Ok(file);
    };
    // A new file: what a plugin before it left in the background may still have the old one, and its lock.
    if let Err(error) = std::fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        return Err(error);
    }
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?.write_all(call.input)?;
    let file = File::open(path)?;
    // The lock is the open file's, which the plugin shares and keeps.
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    Ok(file)
}

/// Waits until no plugin of an earlier daemon holds the guard. False: one still does at the end of `limit`.
pub(crate) async fn wait_for_guard(path: &Path, limit: Duration) -> bool {
    let end = Instant::now() + limit;
    loop {
        let free = match File::open(path) {
            Ok(file) => rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok(),
            Err(_) => true,
        };
        if free || Instant::now() >= end {
            return free;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A plugin that has been started.
struct Running<'a> {
    child: Child,
    guard: Option<&'a Path>,
}

impl Running<'_> {
    /// Kills it, and waits for its end.
    async fn kill(&mut self) {
        self.kill_group();
        match tokio::time::timeout(KILL_TIMEOUT, self.child.wait()).await {
            Ok(_) => self.ended(),
            Err(_) => tracing::warn!(pid = self.child.id(), "a CNI plugin does not end after SIGKILL"),
        }
    }

    /// Kills it with all that is still in its process group. As long as it has not been waited for, its pid, and so the
    /// group's, is nobody else's.
    fn kill_group(&self) {
        if let Some(pid) = self.child.id().and_then(|pid| rustix::process::Pid::from_raw(pid.cast_signed())) {
            let _ = rustix::process::kill_process_group(pid, rustix::process::Signal::KILL);
        }
    }

    /// Nobody has to wait for it any more, whatever it has left in the background.
    fn ended(&self) {
        if let Some(guard) = self.guard {
            let _ = std::fs::remove_file(guard);
        }
    }
}

impl Drop for Running<'_> {
    /// Whoever asked does not wait for the answer any more. What changes a pod's network is left to the next daemon, which
    /// waits for its guard.
    fn drop(&mut self) {
        if self.guard.is_none() {
            self.kill_group();
        }
    }
}

/// One of a plugin's outputs.
struct Capture {
    pipe: Receiver,
    bytes: Vec<u8>,
    limit: usize,
    ended: bool,
    /// There was more than the limit; it is dropped.
    over: bool,
}

impl Capture {
    fn new(pipe: std::os::fd::OwnedFd, limit: usize) -> io::Result<Self> {
        let pipe = Receiver::from_owned_fd(pipe)?;
        Ok(Self { pipe, bytes: Vec::new(), limit, ended: false, over: false })
    }

    /// Waits for output and takes some. Nothing is lost when this is dropped half-way.
    async fn more(&mut self) {
        match self.pipe.readable().await {
            Ok(()) => {
                self.take();
            }
            Err(_) => self.ended = true,
        }
    }

    /// False: there is none now, as far as the reactor knows.
    fn take(&mut self) -> bool {
        let mut buffer = [0; 8192];
        let read = self.pipe.try_read(&mut buffer);
        self.took(read, &buffer)
    }

    fn took(&mut self, read: io::Result<usize>, buffer: &[u8]) -> bool {
        match read {
            Ok(0) => {
                self.ended = true;
                false
            }
            Ok(count) => {
                let room = self.limit.saturating_sub(self.bytes.len());
                self.over |= count > room;
                self.bytes.extend_from_slice(buffer.get(..count.min(room)).unwrap_or_default());
                true
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
            Err(_) => {
                self.ended = true;
                false
            }
        }
    }

    /// Takes what is there, whether or not the reactor has heard of it yet: the end of the plugin may be told first.
    /// Somebody in the background may write for ever.
    fn drain(&mut self) {
        let mut buffer = [0; 8192];
        while !self.ended && !self.over {
            let read = rustix::io::read(&self.pipe, &mut buffer).map_err(io::Error::from);
            if !self.took(read, &buffer) {
                break;
            }
        }
    }
}

/// What a plugin that failed has to say. The specification wants an error object on its standard output.
fn failure(status: ExitStatus, stdout: &[u8], stderr: &[u8]) -> (u64, String) {
    let error: Option<Value> = serde_json::from_slice(stdout).ok();
    let text =
        |key: &str| error.as_ref().and_then(|e| e.get(key)).and_then(Value::as_str).unwrap_or_default();
    let code = error.as_ref().and_then(|e| e.get("code")).and_then(Value::as_u64).unwrap_or(0);
    let mut parts: Vec<String> =
        [text("msg"), text("details")].into_iter().filter(|t| !t.is_empty()).map(shorten).collect();
    if parts.is_empty() {
        parts.push(status.to_string());
        if !stdout.iter().all(u8::is_ascii_whitespace) {
            parts.push(format!("it printed {}", start(stdout)));
        }
    }
    (code, parts.join("; ") + &said(stderr))
}

/// What it wrote on its standard error, to follow the reason of an error; nothing for nothing.
fn said(stderr: &[u8]) -> String {
    let said = String::from_utf8_lossy(stderr);
    match said.trim() {
        "" => String::new(),
        said => format!("; standard error: {}", shorten(said)),
    }
}

/// The end tells most.
fn shorten(text: &str) -> String {
    let from = text.len().saturating_sub(MAX_MESSAGE);
    let from = (from..text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    let shown = text.get(from..).unwrap_or(text);
    if from > 0 { format!("...{shown}") } else { shown.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    struct Plugins(tempfile::TempDir);

    impl Plugins {
        fn with(script: &str) -> Self {
            let plugins = Self(tempfile::tempdir().unwrap());
            let [script_path, path] = ["script", "p"].map(|name| plugins.0.path().join(name));
            fs::write(&script_path, format!("#!/bin/sh\n{script}\n")).unwrap();
            // Not by us: what another test forks at that moment would have it open for writing, and it could not be run.
            let made = std::process::Command::new("install").args([&script_path, &path]).status();
            assert!(made.unwrap().success());
            plugins
        }

        async fn run(&self, limit: Duration) -> Result<String, CniError> {
            let runner = Runner { bin_dirs: vec!["/nowhere".into(), self.0.path().into()], limit };
            let environment = [("CNI_IFNAME", OsString::from("eth0"))];
            let guard = self.0.path().join("guard");
            let call = Call {
                plugin: "p",
                command: "ADD",
                environment: &environment,
                input: b"{\"in\": 1}",
                guard: Some(&guard),
                unwanted: None,
            };
            runner.run(call).await.map(|answer| String::from_utf8(answer.stdout).unwrap())
        }
    }

    const LONG: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn what_was_written_is_taken_before_the_reactor_knows_of_it() {
        let (reader, writer) =
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC | rustix::pipe::PipeFlags::NONBLOCK)
                .unwrap();
        let mut capture = Capture::new(reader, 100).unwrap();
        rustix::io::write(&writer, b"{}").unwrap();
        capture.drain();
        assert_eq!((capture.bytes.as_slice(), capture.ended), (b"{}".as_slice(), false));
    }

    /// A process with this number of seconds to sleep.
    fn sleeps(seconds: &str) -> bool {
        fs::read_dir("/proc").unwrap().flatten().any(|entry| {
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            command.split(|b| *b == 0).any(|word| word == seconds.as_bytes())
        })
    }

    #[tokio::test]
    async fn input_environment_and_descriptors() {
        // What the test itself was started with; the daemon does the same.
        stave_sys::close_range_cloexec(3).unwrap();
        let plugins =
            Plugins::with("cat; env | sort; ls /proc/$$/fd; cut -d' ' -f5 /proc/$$/stat; echo $$; pwd");
        let output = plugins.run(LONG).await.unwrap();
        let mut lines = output.lines();
        let first = lines.next().unwrap();
        assert!(first.starts_with("{\"in\": 1}CNI_COMMAND=ADD"), "{output}");
        assert_eq!(lines.next(), Some("CNI_IFNAME=eth0"), "{output}");
        assert_eq!(lines.next().unwrap(), format!("CNI_PATH=/nowhere:{}", plugins.0.path().display()));
        let rest: Vec<_> =
            lines.filter(|l| !["PWD=", "OLDPWD=", "_=", "SHLVL="].iter().any(|p| l.starts_with(p))).collect();
        assert!(rest[0].starts_with("PATH="), "nothing else of ours: {output}");
        // 10 is where the shell keeps its script.
        assert_eq!(rest[1..5], ["0", "1", "10", "2"], "{output}");
        assert_eq!(rest[5], rest[6], "a process group of its own");
        assert_eq!(rest[7], "/");
    }

    #[tokio::test]
    async fn failures_say_all_that_the_plugin_said() {
        let json = Plugins::with(
            r#"echo '{"cniVersion": "1.0.0", "code": 11, "msg": "no luck", "details": "today"}'; echo hint >&2; exit 1"#,
        );
        let error = json.run(LONG).await.unwrap_err();
        assert!(matches!(error, CniError::Failed { code: 11, .. }), "{error:?}");
        assert_eq!(error.to_string(), "plugin type=\"p\" failed (ADD): no luck; today; standard error: hint");
        let text = Plugins::with("echo panic: nil; exit 2").run(LONG).await.unwrap_err().to_string();
        assert!(text.contains("exit status: 2; it printed \"panic: nil\""), "{text}");
        let killed = Plugins::with("kill -9 $$").run(LONG).await.unwrap_err().to_string();
        assert!(killed.contains("signal: 9"), "{killed}");
        let long = Plugins::with("head -c 100000 /dev/zero | tr '\\0' x >&2; echo end >&2; exit 1");
        let text = long.run(LONG).await.unwrap_err().to_string();
        assert!(text.len() < 3000, "{}", text.len());
    }

    #[tokio::test]
    async fn one_that_is_missing_or_can_not_run() {
        let plugins = Plugins::with("");
        fs::remove_file(plugins.0.path().join("p")).unwrap();
        let error = plugins.run(LONG).await.unwrap_err().to_string();
        assert!(error.contains("not found in /nowhere, ") && error.contains("\"p\""), "{error}");
        fs::write(plugins.0.path().join("p"), "\u{7f}ELF rubbish").unwrap();
        fs::set_permissions(plugins.0.path().join("p"), fs::Permissions::from_mode(0o755)).unwrap();
        assert!(matches!(plugins.run(LONG).await, Err(CniError::Spawn { .. })));
    }

    #[tokio::test]
    async fn one_that_hangs_is_killed_with_its_children() {
        let plugins = Plugins::with("echo waiting >&2; sleep 98101 & sleep 98101; echo {}");
        let began = Instant::now();
        let error = plugins.run(Duration::from_millis(300)).await.unwrap_err();
        assert!(
            error.to_string().contains("did not end within 300ms") && error.to_string().contains("waiting"),
            "{error}"
        );
        assert!(began.elapsed() < Duration::from_secs(2));
        let end = Instant::now() + Duration::from_secs(5);
        while sleeps("98101") {
            assert!(Instant::now() < end, "its children are still there");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    #[tokio::test]
    async fn a_child_that_keeps_stdout_is_not_waited_for() {
        let plugins = Plugins::with("sleep 5 <&- & echo '{}'");
        let began = Instant::now();
        assert_eq!(plugins.run(LONG).await.unwrap(), "{}\n");
        assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    }

    #[tokio::test]
    async fn output_has_a_limit() {
        let began = Instant::now();
        let error = Plugins::with("echo because >&2; yes").run(LONG).await.unwrap_err().to_string();
        assert!(error.contains("more than 1048576 bytes") && error.contains("because"), "{error}");
        assert!(began.elapsed() < Duration::from_secs(10));
        // Much on the standard error is no harm.
        let noisy = Plugins::with("head -c 3000000 /dev/zero >&2; echo ok");
        assert_eq!(noisy.run(LONG).await.unwrap(), "ok\n");
        // Nor is one that does not read what it is given.
        assert_eq!(Plugins::with("exec <&-; echo ok").run(LONG).await.unwrap(), "ok\n");
    }

    #[tokio::test]
    async fn the_guard_is_locked_as_long_as_the_plugin_runs() {
        let plugins = Plugins::with("sleep 0.5; echo ok");
        let guard = plugins.0.path().join("guard");
        let (free, ()) = tokio::join!(async { plugins.run(LONG).await.unwrap() }, async {
            tokio::time::sleep(Duration::from_millis(150)).await;
            assert!(!wait_for_guard(&guard, Duration::ZERO).await, "it runs");
            assert!(wait_for_guard(&guard, LONG).await);
        });
        assert_eq!(free, "ok\n");
    }
}

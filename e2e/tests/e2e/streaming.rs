//! Exec, attach and port-forward, by crictl over both transports and by our own client.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, tcgetattr};
use nix::unistd::Pid;
use stave_e2e::cri::{AttachRequest, ContainerConfig, ContainerState, ExecRequest, PortForwardRequest};
use stave_e2e::{Config as _, Crictl, Daemon, Pod, eventually};
use tonic::Code;

use crate::{daemon_with_pod, sh, sleeper};

mod our_client;
mod pods;
mod terminal;
mod tls;

const TRANSPORTS: [&str; 2] = ["spdy", "websocket"];

/// Echoes each line of its input.
fn echoing(name: &str) -> ContainerConfig {
    sh(name, "while read line; do echo out $line; echo err $line >&2; done; sleep 3600")
        .with(|c| c.stdin = true)
}

fn stave(daemon: &Daemon, arguments: &[&str]) -> Command {
    let program = std::fs::read_link(format!("/proc/{}/exe", daemon.pid())).expect("exe");
    let mut command = Command::new(program);
    command.arg("--address").arg(daemon.socket()).args(arguments);
    command
}

/// A running program whose streams are pipes of ours. Killed when the test fails.
struct Piped(Child);

impl Piped {
    fn spawn(mut command: Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Self(command.spawn().expect("spawn"))
    }

    fn write(&mut self, text: &str) {
        self.0.stdin.as_mut().expect("stdin").write_all(text.as_bytes()).expect("write");
    }

    fn close_stdin(&mut self) {
        drop(self.0.stdin.take());
    }

    /// Reads stdout until it ends with `wanted`.
    fn read_until(&mut self, wanted: &str) -> String {
        read_until(self.0.stdout.as_mut().expect("stdout"), wanted)
    }

    /// Its exit code and what is left of stdout and stderr.
    fn finish(mut self) -> (Option<i32>, String, String) {
        self.close_stdin();
        let end = Instant::now() + stave_e2e::limit(20);
        while self.0.try_wait().expect("wait").is_none() {
            assert!(Instant::now() < end, "it does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
        let (mut out, mut err) = (String::new(), String::new());
        self.0.stdout.take().expect("stdout").read_to_string(&mut out).expect("stdout");
        self.0.stderr.take().expect("stderr").read_to_string(&mut err).expect("stderr");
        (self.0.wait().expect("wait").code(), out, err)
    }

    fn kill(mut self) {
        self.0.kill().expect("SIGKILL");
        self.0.wait().expect("wait");
    }
}

impl Drop for Piped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn read_until(from: &mut (impl std::io::Read + std::os::fd::AsFd), wanted: &str) -> String {
    use nix::poll::{PollFd, PollFlags, poll};
    let mut text = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let seen = String::from_utf8_lossy(&text).into_owned();
        if seen.contains(wanted) {
            return seen;
        }
        let ready = poll(&mut [PollFd::new(from.as_fd(), PollFlags::POLLIN)], 20_000u16).expect("poll");
        assert!(ready > 0, "no {wanted:?} within 20 s: {seen:?}");
        let count = from.read(&mut chunk).unwrap_or(0);
        assert!(count > 0, "it ended without {wanted:?}: {seen:?}");
        text.extend(&chunk[..count]);
    }
}

/// A program on a terminal of ours, which is its controlling terminal.
struct OnTerminal {
    master: File,
    terminal: OwnedFd,
    child: Child,
}

impl OnTerminal {
    fn spawn(command: &Command) -> Self {
        let size = Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = openpty(&size, None).expect("openpty");
        // A copy in a child would keep the terminal from hanging up.
        for fd in [&pty.master, &pty.slave] {
            rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC).expect("FD_CLOEXEC");
        }
        let copy = || Stdio::from(pty.slave.try_clone().expect("dup"));
        let child = Command::new("setsid")
            .arg("--ctty")
            .arg(command.get_program())
            .args(command.get_args())
            .stdin(copy())
            .stdout(copy())
            .stderr(copy())
            .spawn()
            .expect("setsid");
        Self { master: File::from(pty.master), terminal: pty.slave, child }
    }

    fn is_raw(&self) -> bool {
        let flags = tcgetattr(&self.terminal).expect("tcgetattr").local_flags;
        !flags.intersects(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG)
    }

    fn write(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).expect("write");
    }

    fn read_until(&mut self, wanted: &str) -> String {
        read_until(&mut self.master, wanted)
    }

    fn resize(&self, width: u16, height: u16) {
        let size = rustix::termios::Winsize { ws_row: height, ws_col: width, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(&self.master, size).expect("TIOCSWINSZ");
    }

    async fn exit_code(&mut self) -> Option<i32> {
        eventually("the end of a program on a terminal", async || self.child.try_wait().expect("wait"))
            .await
            .code()
    }
}

impl Drop for OnTerminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The processes of a container, by their command lines.
async fn processes(daemon: &Daemon, container: &str) -> String {
    daemon
        .cri
        .shell(container, "for p in /proc/[0-9]*; do cat $p/cmdline 2>/dev/null | tr '\\0' ' '; echo; done")
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn crictl_exec() {
    let (daemon, pod) = daemon_with_pod().await;
    let Some(crictl) = Crictl::at(&daemon.socket()) else { return daemon.finish().await };
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    for transport in TRANSPORTS {
        let output =
            crictl.output(&["exec", "-r", transport, &id, "sh", "-c", "echo out; echo err >&2; exit 3"]);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(String::from_utf8_lossy(&output.stdout), "out\n", "{transport}");
        assert!(!output.status.success() && stderr.contains("err\n"), "{transport}: {stderr}");
        assert!(stderr.contains("exit code 3") || stderr.contains("exit status 3"), "{transport}: {stderr}");

        let output = crictl.output(&["exec", "-r", transport, &id, "no-such-command"]);
        let stderr = String::from_utf8_lossy(&output.stderr);
        // crictl prints it in quotes.
        let missing = r#"exec: \"no-such-command\": executable file not found in $PATH"#;
        assert!(!output.status.success() && stderr.contains(missing), "{transport}: {stderr}");

        // Half-closed: the sum can only be told after the end of the input.
        let mut piped = Piped::spawn(crictl.command(&["exec", "-r", transport, "-i", &id, "wc", "-c"]));
        for _ in 0..64 {
            piped.write(&"0123456789abcdef".repeat(1024));
        }
        piped.close_stdin();
        let (code, out, err) = piped.finish();
        assert_eq!((code, out.trim()), (Some(0), "1048576"), "{transport}: {err}");

        let script = "i=0; while [ $i -lt 20000 ]; do echo 0123456789 $i; i=$((i+1)); done";
        let output = crictl.output(&["exec", "-r", transport, &id, "sh", "-c", script]);
        let stdout = String::from_utf8(output.stdout).expect("UTF-8");
        assert!(output.status.success() && stdout.lines().count() == 20000, "{transport}: all of it");

        let mut shell = OnTerminal::spawn(&crictl.command(&["exec", "-r", transport, "-it", &id, "sh"]));
        shell.write("tty; echo $TERM; stty size; exit 0\r");
        let seen = shell.read_until("24 80");
        assert!(seen.contains("/dev/pts/") && seen.contains("xterm"), "{transport}: {seen}");
        assert_eq!(shell.exit_code().await, Some(0), "{transport}");
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn crictl_attach() {
    let (daemon, pod) = daemon_with_pod().await;
    let Some(crictl) = Crictl::at(&daemon.socket()) else { return daemon.finish().await };
    let id = daemon.run(&pod, &echoing("main")).await.expect("start");
    let mut watching = Piped::spawn(crictl.command(&["attach", &id]));
    // Output is from now on: it must be attached before something is said.
    tokio::time::sleep(Duration::from_millis(500)).await;
    for transport in TRANSPORTS {
        let mut attached = Piped::spawn(crictl.command(&["attach", "-r", transport, "-i", &id]));
        attached.write(&format!("{transport} one\n"));
        attached.read_until(&format!("out {transport} one\n"));
        attached.write(&format!("{transport} two\n"));
        attached.read_until(&format!("out {transport} two\n"));
        watching.read_until(&format!("out {transport} two\n"));
        // The end of the input detaches, and does not end the container's.
        let (code, _, err) = attached.finish();
        assert!(
            code == Some(0) && err.contains(&format!("err {transport} two")),
            "{transport}: {code:?} {err}"
        );
    }
    assert_eq!(daemon.cri.container(&id).await.expect("status").state(), ContainerState::ContainerRunning);

    let once = sh("once", "cat; echo done").with(|c| (c.stdin, c.stdin_once) = (true, true));
    let once = daemon.run(&pod, &once).await.expect("start");
    let mut attached = Piped::spawn(crictl.command(&["attach", "-i", &once]));
    attached.write("hello\n");
    attached.read_until("hello\n");
    let (code, out, err) = attached.finish();
    assert_eq!((code, out.as_str()), (Some(0), "done\n"), "{err}");
    eventually("the end of a container whose input ended", async || {
        let status = daemon.cri.container(&once).await.expect("status");
        (status.state() == ContainerState::ContainerExited).then_some(())
    })
    .await;
    watching.kill();
    daemon.finish().await;
}

async fn web_server(daemon: &Daemon, pod: &Pod) {
    let script = "mkdir /www; echo the page >/www/index.html; echo up; exec httpd -f -p 80 -h /www";
    daemon.run(pod, &sh("web", script)).await.expect("start");
    crate::logs::wait_for_line(pod, "web", "up").await;
}

fn get(port: u16) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(stave_e2e::limit(20)))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

/// The local port in a line such as `Forwarding from 127.0.0.1:41234 -> 80`.
fn local_port(line: &str) -> u16 {
    let after = line.split("127.0.0.1:").nth(1).unwrap_or_else(|| panic!("no address in {line:?}"));
    after.split(|c: char| !c.is_ascii_digit()).next().and_then(|port| port.parse().ok()).expect("a port")
}

async fn forwards(forwarding: &mut Piped, what: &str) {
    let port = local_port(&forwarding.read_until("80"));
    eventually("the web server's page", async || {
        get(port).ok().filter(|page| page.contains("the page")).map(drop)
    })
    .await;
    let threads: Vec<_> = (0..20).map(|_| std::thread::spawn(move || get(port))).collect();
    for thread in threads {
        let page = thread.join().expect("thread").expect("page");
        assert!(page.starts_with("HTTP/1") && page.contains("the page"), "{what}: {page}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn port_forward() {
    let (daemon, pod) = daemon_with_pod().await;
    web_server(&daemon, &pod).await;
    let fds = fd_count(supervisor(&pod));
    if let Some(crictl) = Crictl::at(&daemon.socket()) {
        for transport in TRANSPORTS {
            let command = crictl.command(&["port-forward", "-r", transport, &pod.id, ":80"]);
            let mut forwarding = Piped::spawn(command);
            forwards(&mut forwarding, transport).await;
            forwarding.kill();
        }
    }
    let mut forwarding = Piped::spawn(stave(&daemon, &["port-forward", "pod", ":80"]));
    forwards(&mut forwarding, "stave").await;
    forwarding.kill();

    let mut forwarding = Piped::spawn(stave(&daemon, &["port-forward", "pod", ":81"]));
    let port = local_port(&forwarding.read_until("81"));
    assert!(!get(port).is_ok_and(|page| page.contains("the page")), "nobody listens there");
    read_until(forwarding.0.stderr.as_mut().expect("stderr"), "Connection refused");
    kill(Pid::from_raw(forwarding.0.id() as i32), Signal::SIGTERM).expect("SIGTERM");
    assert_eq!(forwarding.finish().0, Some(0));
    eventually("flat descriptors of the supervisor", async || {
        (fd_count(supervisor(&pod)) == fds).then_some(())
    })
    .await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests() {
    let (daemon, pod) = daemon_with_pod().await;
    let created = daemon.create(&pod, &sleeper("created")).await.expect("create");
    let running = daemon.run(&pod, &sleeper("main")).await.expect("start");
    let mut client = daemon.cri.runtime.clone();
    let good = ExecRequest {
        container_id: running.clone(),
        cmd: vec!["true".into()],
        stdout: true,
        ..Default::default()
    };
    let url = client.exec(good.clone()).await.expect("Exec").into_inner().url;
    assert!(url.starts_with("http://127.0.0.1:") && url.contains("/exec/"), "{url}");
    for (request, code, named) in [
        (ExecRequest { container_id: String::new(), ..good.clone() }, Code::InvalidArgument, "container_id"),
        (ExecRequest { cmd: vec![], ..good.clone() }, Code::InvalidArgument, "cmd"),
        (ExecRequest { stdout: false, ..good.clone() }, Code::InvalidArgument, "stdout"),
        (ExecRequest { tty: true, stderr: true, ..good.clone() }, Code::InvalidArgument, "tty"),
        (ExecRequest { container_id: "nope".into(), ..good.clone() }, Code::NotFound, "nope"),
        (ExecRequest { container_id: created.clone(), ..good.clone() }, Code::FailedPrecondition, "created"),
    ] {
        let status = client.exec(request).await.expect_err("a bad request");
        assert!(status.code() == code && status.message().contains(named), "{status:?}");
    }
    let good = AttachRequest { container_id: running.clone(), stdout: true, ..Default::default() };
    for (request, code) in [
        (AttachRequest { container_id: String::new(), ..good.clone() }, Code::InvalidArgument),
        (AttachRequest { stdout: false, ..good.clone() }, Code::InvalidArgument),
        (AttachRequest { tty: true, stderr: true, ..good.clone() }, Code::InvalidArgument),
        (AttachRequest { container_id: "nope".into(), ..good.clone() }, Code::NotFound),
        (AttachRequest { container_id: created, ..good.clone() }, Code::FailedPrecondition),
    ] {
        assert_eq!(client.attach(request).await.expect_err("a bad request").code(), code);
    }
    for (id, port, code) in [
        ("", 80, Code::InvalidArgument),
        ("nope", 80, Code::NotFound),
        (pod.id.as_str(), 0, Code::InvalidArgument),
        (pod.id.as_str(), 65536, Code::InvalidArgument),
    ] {
        let request = PortForwardRequest { pod_sandbox_id: id.to_owned(), port: vec![port] };
        assert_eq!(
            client.port_forward(request).await.expect_err("a bad request").code(),
            code,
            "{id} {port}"
        );
    }
    daemon.cri.stop(&running, 0).await.expect("stop");
    let status = client.attach(good).await.expect_err("a stopped container");
    assert_eq!(status.code(), Code::FailedPrecondition);
    daemon.cri.stop_pod(&pod.id).await.expect("stop");
    let request = PortForwardRequest { pod_sandbox_id: pod.id.clone(), port: vec![80] };
    let status = client.port_forward(request).await.expect_err("a stopped pod");
    assert_eq!(status.code(), Code::FailedPrecondition);
    daemon.finish().await;
}

/// The pid of the pod's supervisor.
fn supervisor(pod: &Pod) -> u32 {
    std::fs::read_dir("/proc")
        .expect("/proc")
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .find(|pid: &u32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let mut words = line.split(|byte| *byte == 0);
            words.any(|word| word == b"--id") && words.next() == Some(pod.id.as_bytes())
        })
        .expect("a supervisor")
}

fn fd_count(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).expect("descriptors").count()
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_leaks() {
    let (daemon, pod) = daemon_with_pod().await;
    let ticking = sh("main", "while :; do echo tick; sleep 0.02; done").with(|c| c.stdin = true);
    let id = daemon.run(&pod, &ticking).await.expect("start");
    let supervisor = supervisor(&pod);
    daemon.cri.shell(&id, "true").await;
    // A ready supervisor has descriptors here, and is made when nothing starts.
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    let before = (fd_count(daemon.pid()), fd_count(supervisor));
    for _ in 0..500 {
        assert_eq!(daemon.cri.shell(&id, "echo x").await, "x\n");
    }
    // Clients that vanish, and some that ask for a URL and never come.
    for _ in 0..10 {
        let attached = (0..20).map(|_| Piped::spawn(stave(&daemon, &["attach", "-i", "main"])));
        let attached: Vec<Piped> = attached.collect();
        for mut attached in attached {
            attached.read_until("tick\n");
            attached.kill();
        }
    }
    for _ in 0..20 {
        let command = stave(&daemon, &["exec", "-i", "main", "sh", "-c", "echo up; sleep 4321"]);
        let mut exec = Piped::spawn(command);
        exec.read_until("up\n");
        exec.kill();
    }
    // The same of ExecSync: a client that hangs up, or gives up.
    for _ in 0..5 {
        let hung_up = daemon.cri.shell(&id, "sleep 4321");
        assert!(tokio::time::timeout(Duration::from_millis(200), hung_up).await.is_err());
    }
    eventually("flat descriptors", async || {
        let now = (fd_count(daemon.pid()), fd_count(supervisor));
        // The first count may have those of an exec that has been answered and is being cleared away.
        (now.0 <= before.0 + 2 && now.1 <= before.1).then_some(())
    })
    .await;
    eventually("the end of what vanished clients ran", async || {
        (!processes(&daemon, &id).await.contains("sleep 4321")).then_some(())
    })
    .await;
    daemon.finish().await;
}

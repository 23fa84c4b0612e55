//! Exec, attach and port-forward by Kubernetes' own client library, through the whole runtime.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use stave_e2e::cri::{AttachRequest, ExecRequest, PortForwardRequest};
use stave_e2e::{Config as _, Daemon};

use crate::{daemon_with_pod, sh, sleeper};

/// The size of the client's terminal: columns and rows.
const TERMINAL: &str = "101x31";
const TRANSPORTS: [&str; 2] = ["spdy", "websocket"];

/// The program that drives a URL with client-go; `None`, with a loud word, where there is no Go.
fn program() -> Option<&'static Path> {
    static PROGRAM: OnceLock<Option<PathBuf>> = OnceLock::new();
    let build = || {
        if Command::new("go").arg("version").output().is_err() {
            eprintln!("SKIPPED: there is no Go, so nothing here is tested against Kubernetes' client");
            return None;
        }
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let path = directory.join("e2e-client-go");
        // Not in place: another run may be using it.
        let new = directory.join(format!("e2e-client-go.{}", std::process::id()));
        let build = Command::new("go")
            .args(["build", "-o"])
            .args([new.as_os_str(), ".".as_ref()])
            .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../crates/streaming/tests/go"))
            .status();
        assert!(build.expect("go").success(), "go build");
        std::fs::rename(&new, &path).expect("rename");
        Some(path)
    };
    PROGRAM.get_or_init(build).as_deref()
}

/// Runs the program on the URL of an exec or attach; `streams` of i, o, e and t.
fn drive(program: &Path, transport: &str, url: &str, streams: &str, input: &[u8]) -> Output {
    let mut child = Command::new("timeout")
        .arg("60")
        .arg(program)
        .args(["exec", transport, url, streams])
        .args(streams.contains('t').then_some(TERMINAL))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("timeout");
    let mut stdin = child.stdin.take().expect("stdin");
    let input = input.to_vec();
    let feed = std::thread::spawn(move || {
        let _ = stdin.write_all(&input);
    });
    let output = child.wait_with_output().expect("wait");
    feed.join().expect("feed");
    output
}

async fn exec_url(daemon: &Daemon, container: &str, script: &str, streams: &str) -> String {
    let request = ExecRequest {
        container_id: container.to_owned(),
        cmd: ["sh", "-c", script].map(str::to_owned).to_vec(),
        stdin: streams.contains('i'),
        stdout: streams.contains('o'),
        stderr: streams.contains('e'),
        tty: streams.contains('t'),
    };
    daemon.cri.runtime.clone().exec(request).await.expect("Exec").into_inner().url
}

/// Bytes that don't repeat where buffers end.
fn data(length: usize) -> Vec<u8> {
    (0..length as u32).map(|n| (n / 3) as u8).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn client_go_exec() {
    let Some(program) = program() else { return };
    let (daemon, pod) = daemon_with_pod().await;
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    for transport in TRANSPORTS {
        let url = exec_url(&daemon, &id, "echo out; echo err >&2; exit 3", "oe").await;
        let output = drive(program, transport, &url, "oe", b"");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(3), "{transport}: {stderr}");
        assert_eq!(output.stdout, b"out\n", "{transport}");
        assert_eq!(stderr, "err\ncommand terminated with exit code 3\n", "{transport}");
        // The token is used up.
        assert_eq!(drive(program, transport, &url, "oe", b"").status.code(), Some(250), "{transport}");

        let url = exec_url(&daemon, &id, "cat; echo end", "ioe").await;
        let input = data(5_000_000);
        let output = drive(program, transport, &url, "ioe", &input);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{transport}: {stderr}");
        assert!(output.stdout == [&input[..], b"end\n"].concat(), "{transport}: {}", output.stdout.len());

        let url = exec_url(&daemon, &id, "yes 0123456789abcdef | head -c 20000000", "oe").await;
        let output = drive(program, transport, &url, "oe", b"");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{transport}: {stderr}");
        let intact = output.stdout.iter().eq(b"0123456789abcdef\n".iter().cycle().take(20_000_000));
        assert!(intact, "{transport}: {} bytes", output.stdout.len());
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn client_go_attach() {
    let Some(program) = program() else { return };
    let (daemon, pod) = daemon_with_pod().await;
    for transport in TRANSPORTS {
        let once =
            sh(transport, "cat; echo err >&2; echo done").with(|c| (c.stdin, c.stdin_once) = (true, true));
        let container_id = daemon.run(&pod, &once).await.expect("start");
        let request = AttachRequest { container_id, stdin: true, stdout: true, stderr: true, tty: false };
        let url = daemon.cri.runtime.clone().attach(request).await.expect("Attach").into_inner().url;
        let input = data(100_000);
        let output = drive(program, transport, &url, "ioe", &input);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), &*stderr), (Some(0), "err\n"), "{transport}");
        assert!(output.stdout == [&input[..], b"done\n"].concat(), "{transport}: {}", output.stdout.len());
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn client_go_terminal() {
    let Some(program) = program() else { return };
    let (daemon, pod) = daemon_with_pod().await;
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    for transport in TRANSPORTS {
        // The client's size comes after the start.
        let script =
            "until [ \"$(stty size 2>/dev/null)\" = '31 101' ]; do sleep 0.1; done; tty; echo $TERM; exit 7";
        let url = exec_url(&daemon, &id, script, "iot").await;
        let output = drive(program, transport, &url, "iot", b"");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(7), "{transport}: {stderr}");
        let stdout = String::from_utf8_lossy(&output.stdout);
        assert!(
            stdout.starts_with("/dev/pts/") && stdout.ends_with("\r\nxterm\r\n"),
            "{transport}: {stdout:?}"
        );
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn client_go_is_told_why_an_exec_failed() {
    let Some(program) = program() else { return };
    let (daemon, pod) = daemon_with_pod().await;
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    for transport in TRANSPORTS {
        let request = ExecRequest {
            container_id: id.clone(),
            cmd: vec!["/nope".into()],
            stdout: true,
            ..<_>::default()
        };
        let url = daemon.cri.runtime.clone().exec(request).await.expect("Exec").into_inner().url;
        let output = drive(program, transport, &url, "o", b"");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(250), "{transport}: {stderr}");
        let wanted = "error executing command in container: ";
        // A runtime has its own words.
        let missing = if stave_e2e::oci_runtime().is_some() {
            "/nope"
        } else {
            "exec: \"/nope\": no such file or directory"
        };
        assert!(stderr.contains(wanted) && stderr.contains(missing), "{transport}: {stderr}");
        // The container ends after the URL was given and before the client comes.
        let brief = daemon.run(&pod, &sleeper(transport)).await.expect("start");
        let url = exec_url(&daemon, &brief, "echo never", "oe").await;
        let request = AttachRequest { container_id: brief.clone(), stdout: true, ..<_>::default() };
        let attach = daemon.cri.runtime.clone().attach(request).await.expect("Attach").into_inner().url;
        daemon.cri.stop(&brief, 0).await.expect("stop");
        for (url, streams) in [(url, "oe"), (attach, "o")] {
            let output = drive(program, transport, &url, streams, b"");
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert_eq!((output.status.code(), output.stdout.len()), (Some(250), 0), "{transport}: {stderr}");
            assert!(stderr.contains("not running") && stderr.contains(&brief), "{transport}: {stderr}");
        }
    }
    daemon.finish().await;
}

const BIG: usize = 10_000_000;

#[tokio::test(flavor = "multi_thread")]
async fn client_go_port_forward() {
    let Some(program) = program() else { return };
    let (daemon, pod) = daemon_with_pod().await;
    // nc's own input stays open: its end would end the connection, which client-go closes then.
    let script = format!(
        "mkdir /www; yes 0123456789abcdef | head -c {BIG} >/www/big
        for port in 81 82; do
            sleep 3600 | nc -l -p $port | {{ cmp - /www/big && echo same $port; }} &
        done
        until cat /proc/net/tcp* | grep -q :0051 && cat /proc/net/tcp* | grep -q :0052; do sleep 0.1; done
        echo up; exec httpd -f -p 80 -h /www"
    );
    daemon.run(&pod, &sh("web", &script)).await.expect("start");
    crate::logs::wait_for_line(&pod, "web", "up").await;
    let expected: Vec<u8> = b"0123456789abcdef\n".iter().copied().cycle().take(BIG).collect();
    for (transport, sink) in TRANSPORTS.into_iter().zip([81, 82]) {
        let mut stream = forward(&daemon, program, &pod.id, transport, 80).await;
        stream.connection.write_all(b"GET /big HTTP/1.0\r\n\r\n").expect("request");
        let mut got = Vec::new();
        stream.connection.read_to_end(&mut got).expect("answer");
        let body = got.windows(4).position(|four| four == b"\r\n\r\n").expect("a header") + 4;
        assert!(got[body..] == expected, "{transport}: {} bytes", got.len() - body);
        stream.finish(transport);

        let mut stream = forward(&daemon, program, &pod.id, transport, sink).await;
        stream.connection.write_all(&expected).expect("data");
        stream.connection.shutdown(Shutdown::Write).expect("half-close");
        crate::logs::wait_for_line(&pod, "web", &format!("same {sink}")).await;
        stream.finish(transport);
    }
    daemon.finish().await;
}

/// A connection through a forwarder that runs. Killed when the test fails.
struct Forwarded {
    connection: TcpStream,
    forwarder: std::process::Child,
}

async fn forward(daemon: &Daemon, program: &Path, pod: &str, transport: &str, port: i32) -> Forwarded {
    // As the kubelet over either transport: over WebSocket each request names its port.
    let request = PortForwardRequest { pod_sandbox_id: pod.to_owned(), port: vec![port] };
    let url = daemon.cri.runtime.clone().port_forward(request).await.expect("PortForward").into_inner().url;
    let mut forwarder = Command::new(program)
        .args(["forward", transport, &url, &port.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the client");
    let mut line = String::new();
    BufReader::new(forwarder.stdout.take().expect("stdout")).read_line(&mut line).expect("a line");
    let local: u16 = line.trim().parse().expect("a port");
    let connection = TcpStream::connect(("127.0.0.1", local)).expect("connect");
    connection.set_read_timeout(Some(Duration::from_secs(60))).expect("timeout");
    connection.set_write_timeout(Some(Duration::from_secs(60))).expect("timeout");
    Forwarded { connection, forwarder }
}

impl Forwarded {
    /// Ends the forwarder, which must succeed.
    fn finish(mut self, what: &str) {
        drop(self.forwarder.stdin.take());
        assert!(self.forwarder.wait().expect("wait").success(), "{what}");
    }
}

impl Drop for Forwarded {
    fn drop(&mut self) {
        let _ = self.forwarder.kill();
        let _ = self.forwarder.wait();
    }
}

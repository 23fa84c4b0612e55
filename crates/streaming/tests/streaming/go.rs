//! Kubernetes' own client library drives the server. Needs Go and its modules (or a network to fetch them).

use std::{
    path::PathBuf,
    process::{Command, Stdio},
    sync::Arc,
};

use sha2::{Digest, Sha256};
use stave_streaming::Streams;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    sync::OnceCell,
    time::timeout,
};

use crate::{
    backend::{Loopback, Running, Shell, serve},
    client::LIMIT,
    port_forward::{closed_port, echo},
};

static CLIENT: OnceCell<Option<PathBuf>> = OnceCell::const_new();

/// The client's program; `None`, with a loud word, where there is no Go.
async fn program() -> Option<&'static PathBuf> {
    let build = async {
        if Command::new("go").arg("version").output().is_err() {
            eprintln!("SKIPPED: there is no Go, so nothing here is tested against Kubernetes' client");
            return None;
        }
        let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("streaming-client");
        let build = tokio::process::Command::new("go")
            .args(["build", "-o"])
            .args([path.as_os_str(), ".".as_ref()])
            .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/go"))
            .status();
        assert!(build.await.unwrap().success(), "go build");
        Some(path)
    };
    CLIENT.get_or_init(|| build).await.as_ref()
}

struct Output {
    code: i32,
    stdout: Vec<u8>,
    stderr: String,
}

/// Runs a script through the client; `flags` as the client takes them.
async fn exec(
    running: &Running,
    transport: &str,
    script: &str,
    flags: &str,
    size: &[&str],
    input: &[u8],
) -> Option<Output> {
    let program = program().await?;
    let has = |flag| flags.contains(flag);
    let streams = Streams { stdin: has('i'), stdout: has('o'), stderr: has('e'), tty: has('t') };
    let shell = if has('t') { Shell::tty(script) } else { Shell::new(script) };
    let url = running.server.exec(shell, streams).unwrap();
    let mut child = tokio::process::Command::new(program)
        .args(["exec", transport, &url, flags])
        .args(size)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let feed = tokio::spawn(async move {
        let _ = stdin.write_all(&input).await;
        // A terminal's input stays open.
        input.is_empty().then_some(stdin)
    });
    let output = timeout(LIMIT, child.wait_with_output()).await.expect("the client ends").unwrap();
    feed.await.unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    Some(Output { code: output.status.code().unwrap(), stdout: output.stdout, stderr })
}

const TRANSPORTS: [&str; 2] = ["spdy", "websocket"];

#[tokio::test(flavor = "multi_thread")]
async fn exit_code_3() {
    let running = serve().await;
    for transport in TRANSPORTS {
        for _ in 0..10 {
            let script = "echo out; echo err >&2; exit 3";
            let Some(output) = exec(&running, transport, script, "oe", &[], b"").await else { return };
            assert_eq!(output.code, 3, "{transport}: {}", output.stderr);
            assert_eq!(output.stdout, b"out\n");
            assert_eq!(output.stderr, "err\ncommand terminated with exit code 3\n");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn input_echoed_to_its_end() {
    let running = serve().await;
    let input: Vec<u8> = (0..5_000_000_u32).map(|n| (n / 3) as u8).collect();
    for transport in TRANSPORTS {
        let Some(output) = exec(&running, transport, "cat", "io", &[], &input).await else { return };
        assert_eq!(output.code, 0, "{transport}: {}", output.stderr);
        assert_eq!(Sha256::digest(&output.stdout), Sha256::digest(&input), "{transport}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn much_output() {
    let running = serve().await;
    for transport in TRANSPORTS {
        let script = "head -c 50000000 /dev/zero | tr '\\0' x";
        let Some(output) = exec(&running, transport, script, "ioe", &[], b"").await else { return };
        assert_eq!(output.code, 0, "{transport}: {}", output.stderr);
        assert_eq!(output.stdout.len(), 50_000_000, "{transport}");
        assert!(output.stdout.iter().all(|byte| *byte == b'x'));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_and_its_size() {
    let running = serve().await;
    for transport in TRANSPORTS {
        let script = "sleep 0.5; stty size";
        let Some(output) = exec(&running, transport, script, "iot", &["123x45"], b"").await else { return };
        assert_eq!(output.code, 0, "{transport}: {}", output.stderr);
        assert_eq!(String::from_utf8_lossy(&output.stdout), "45 123\r\n", "{transport}");
    }
}

/// Starts to forward; answers with the local port and the client.
async fn forward(running: &Running, transport: &str, port: u16) -> Option<(u16, tokio::process::Child)> {
    let program = program().await?;
    let url = running.server.port_forward(Arc::new(Loopback), vec![]).unwrap();
    let mut child = tokio::process::Command::new(program)
        .args(["forward", transport, &url, &port.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    timeout(LIMIT, lines.read_line(&mut line)).await.unwrap().unwrap();
    Some((line.trim().parse().unwrap(), child))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_megabytes_forwarded_each_way() {
    let running = serve().await;
    let data: Arc<Vec<u8>> = Arc::new((0..100_000_000_u32).map(|n| (n / 5) as u8).collect());
    for transport in TRANSPORTS {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let Some((port, mut client)) =
            forward(&running, transport, listener.local_addr().unwrap().port()).await
        else {
            return;
        };
        // Up, then, after the client's half-close, down.
        let expected = data.clone();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut got = Vec::new();
            stream.read_to_end(&mut got).await.unwrap();
            assert!(got == *expected, "{} bytes", got.len());
            stream.write_all(&got).await.unwrap();
        });
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        timeout(LIMIT, stream.write_all(&data)).await.unwrap().unwrap();
        stream.shutdown().await.unwrap();
        let mut got = Vec::new();
        timeout(LIMIT, stream.read_to_end(&mut got)).await.unwrap().unwrap();
        assert!(got == *data, "{transport}: {} bytes", got.len());
        server.await.unwrap();
        drop(client.stdin.take());
        assert!(timeout(LIMIT, client.wait()).await.unwrap().unwrap().success());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_connections_and_one_that_fails() {
    let running = serve().await;
    let echo = echo().await;
    for transport in TRANSPORTS {
        let Some((port, _client)) = forward(&running, transport, echo).await else { return };
        let connections = (0..40_u8).map(|n| async move {
            let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
            stream.write_all(&[n; 1000]).await.unwrap();
            stream.shutdown().await.unwrap();
            let mut got = Vec::new();
            stream.read_to_end(&mut got).await.unwrap();
            assert_eq!(got, [n; 1000]);
        });
        timeout(LIMIT, futures::future::join_all(connections)).await.unwrap();
        // A dial that fails ends the client's session, with the reason; its connection just closes.
        let Some((port, _client)) = forward(&running, transport, closed_port().await).await else { return };
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        let mut got = Vec::new();
        let _ = timeout(LIMIT, stream.read_to_end(&mut got)).await.unwrap();
        assert_eq!(got, b"");
    }
}

//! Exec and attach over SPDY.

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use stave_streaming::{
    Streams, Timeouts,
    spdy::{Frame, Headers},
};
use tokio::time::{Duration, Instant, sleep, timeout};

use crate::{
    backend::{Broken, Running, Shell, serve, serve_with},
    client::{Client, LIMIT},
};

const OUT: Streams = Streams { stdin: false, stdout: true, stderr: true, tty: false };
const IN_OUT: Streams = Streams { stdin: true, stdout: true, stderr: false, tty: false };
const TERMINAL: Streams = Streams { stdin: true, stdout: true, stderr: false, tty: true };
const V4: &str = "v4.channel.k8s.io";

async fn exec(running: &Running, script: &str, streams: Streams, version: &str) -> Client {
    let url = running.server.exec(Shell::new(script), streams).unwrap();
    Client::connect(&url, version).await
}

fn status(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|_| panic!("{text:?}"))
}

#[tokio::test]
async fn outputs_and_exit_code() {
    let running = serve().await;
    for version in ["v5.channel.k8s.io,v4.channel.k8s.io", V4] {
        let mut client = exec(&running, "echo out; echo err >&2; exit 3", OUT, version).await;
        // Any order.
        let ids = client.open_command("Eoe").await;
        let (out, err, error) = client.finish(&ids).await;
        assert_eq!((&out[..], &err[..]), (&b"out\n"[..], &b"err\n"[..]));
        let error = status(&error);
        assert_eq!(error["reason"], "NonZeroExitCode");
        assert_eq!(error["details"]["causes"], json!([{"reason": "ExitCode", "message": "3"}]));
    }
}

#[tokio::test]
async fn success_and_old_versions() {
    let running = serve().await;
    let mut client = exec(&running, "echo hi", OUT, V4).await;
    let ids = client.open_command("eoE").await;
    assert_eq!(status(&client.finish(&ids).await.2)["status"], "Success");
    for version in ["channel.k8s.io", "v2.channel.k8s.io", "v3.channel.k8s.io"] {
        for (script, text) in
            [("echo hi", ""), ("echo hi; exit 3", "command terminated with non-zero exit code: exit code 3")]
        {
            let mut client = exec(&running, script, OUT, version).await;
            let ids = client.open_command("eoE").await;
            let (out, _, error) = client.finish(&ids).await;
            assert_eq!((&out[..], error.as_str()), (&b"hi\n"[..], text));
        }
    }
}

#[tokio::test]
async fn input_to_its_end() {
    let running = serve().await;
    let mut client = exec(&running, "cat; echo done", IN_OUT, V4).await;
    let ids = client.open_command("eio").await;
    client.data(ids[&'i'], b"hello ").await;
    client.data(ids[&'i'], b"world ").await;
    client.fin(ids[&'i']).await;
    let (out, _, error) = client.finish(&ids).await;
    assert_eq!(out, b"hello world done\n");
    assert_eq!(status(&error)["status"], "Success");
}

#[tokio::test]
async fn output_that_ends_early_does_not_end_the_input() {
    let running = serve().await;
    let file = tempfile::NamedTempFile::new().unwrap();
    let script = format!("exec >&- 2>&-; sleep 0.2; cat >{}", file.path().display());
    let mut client = exec(&running, &script, IN_OUT, V4).await;
    let ids = client.open_command("eio").await;
    sleep(Duration::from_millis(100)).await;
    client.data(ids[&'i'], &[7; 100_000]).await;
    client.fin(ids[&'i']).await;
    assert_eq!(status(&client.finish(&ids).await.2)["status"], "Success");
    assert_eq!(std::fs::read(file.path()).unwrap(), vec![7; 100_000]);
}

#[tokio::test]
async fn much_output_through_a_slow_reader_that_types_and_pings() {
    let running = serve().await;
    let script = "head -c 50000000 /dev/zero | tr '\\0' x; exit 9";
    let mut client = exec(&running, script, IN_OUT, V4).await;
    let ids = client.open_command("eio").await;
    // The process has long ended, but for what doesn't fit into the pipe.
    let (mut digest, mut length, mut pongs, mut frames, mut error) = (Sha256::new(), 0, 0, 0, Vec::new());
    loop {
        match client.next().await.expect("the status comes first") {
            Frame::Data { id, fin: true, .. } if id == ids[&'e'] => break,
            Frame::Data { id, bytes, .. } if id == ids[&'o'] => {
                digest.update(&bytes);
                length += bytes.len();
            }
            Frame::Data { bytes, .. } => error.extend_from_slice(&bytes),
            Frame::Ping { id } => {
                assert_eq!(id % 2, 1);
                pongs += 1;
            }
            _ => {}
        }
        frames += 1;
        if frames % 100 == 0 {
            sleep(Duration::from_millis(2)).await;
            client.data(ids[&'i'], b"typing\n").await;
            client.send(Frame::Ping { id: frames * 2 + 1 }).await;
        }
    }
    assert_eq!(length, 50_000_000);
    assert_eq!(digest.finalize(), Sha256::digest(vec![b'x'; 50_000_000]));
    assert_eq!(status(std::str::from_utf8(&error).unwrap())["details"]["causes"][0]["message"], "9");
    assert!(pongs > 1, "{pongs}");
}

#[tokio::test]
async fn the_server_waits_for_the_client_to_close() {
    let running = serve().await;
    let mut client = exec(&running, "true", IN_OUT, V4).await;
    let ids = client.open_command("eio").await;
    client.finish(&ids).await;
    // Late input is discarded, pings are answered.
    for n in 0..20 {
        client.data(ids[&'i'], &[0; 100_000]).await;
        client.send(Frame::Ping { id: 2 * n + 1 }).await;
        loop {
            match client.next().await.expect("the connection is open") {
                Frame::Ping { id } => break assert_eq!(id, 2 * n + 1),
                Frame::Data { .. } | Frame::Reset { .. } => {}
                frame => panic!("{frame:?}"),
            }
        }
    }
}

#[tokio::test]
async fn and_cuts_it_in_the_end() {
    let running = serve_with(Timeouts { close: Duration::from_millis(300), ..Timeouts::default() }).await;
    let mut client = exec(&running, "true", OUT, V4).await;
    let ids = client.open_command("eoE").await;
    client.finish(&ids).await;
    assert!(matches!(client.next().await, Some(Frame::GoAway { status: 0, .. })));
    assert_eq!(client.next().await, None);
}

#[tokio::test]
async fn a_child_that_keeps_the_output_open() {
    // CVE-2026-53495
    let running = serve_with(Timeouts { drain: Duration::from_millis(300), ..Timeouts::default() }).await;
    let start = Instant::now();
    for script in ["sleep 20 & echo hi", "(while :; do echo y; done) & echo hi; exit 0"] {
        let shell = Shell::new(script);
        let group = shell.group();
        let mut client = Client::connect(&running.server.exec(shell, OUT).unwrap(), V4).await;
        let ids = client.open_command("eoE").await;
        let (out, _, error) = client.finish(&ids).await;
        assert!(out.windows(3).any(|line| line == b"hi\n"));
        assert_eq!(status(&error)["status"], "Success");
        assert!(group.started());
        group.kill();
    }
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_terminal_and_its_size() {
    let running = serve().await;
    let url = running
        .server
        .exec(Shell::tty("sleep 0.3; stty size; read x; stty size; echo got $x"), TERMINAL)
        .unwrap();
    let mut client = Client::connect(&url, V4).await;
    let ids = client.open_command("eior").await;
    client.data(ids[&'r'], b"{\"Width\":0,\"Height\":0}\n{\"Width\":100,\"Height\":30}\n").await;
    sleep(Duration::from_millis(600)).await;
    client.data(ids[&'r'], b"{\"Width\":81,").await;
    client.data(ids[&'r'], b"\"Height\":25}\n").await;
    sleep(Duration::from_millis(300)).await;
    client.data(ids[&'i'], b"word\n").await;
    // Ends while stdin is open.
    let (out, _, error) = client.finish(&ids).await;
    assert_eq!(String::from_utf8(out).unwrap(), "30 100\r\nword\r\n25 81\r\ngot word\r\n");
    assert_eq!(status(&error)["status"], "Success");
}

#[tokio::test]
async fn a_terminal_without_resize_in_version_2() {
    let running = serve().await;
    let streams = Streams { stdin: false, ..TERMINAL };
    let url = running.server.exec(Shell::tty("echo hello"), streams).unwrap();
    let mut client = Client::connect(&url, "v2.channel.k8s.io").await;
    let ids = client.open_command("eo").await;
    assert_eq!(client.finish(&ids).await.0, b"hello\r\n");
}

#[tokio::test]
async fn a_session_that_can_not_start() {
    let running = serve().await;
    let text = "container is not running";
    let url = running.server.exec(Box::new(Broken), IN_OUT).unwrap();
    let mut client = Client::connect(&url, V4).await;
    let ids = client.open_command("eio").await;
    let error = status(&client.finish(&ids).await.2);
    assert_eq!(
        error["message"],
        format!("Internal error occurred: error executing command in container: {text}")
    );
    let url = running.server.attach(Box::new(Broken), IN_OUT).unwrap();
    let mut client = Client::connect(&url, "channel.k8s.io").await;
    let ids = client.open_command("eio").await;
    let error = client.finish(&ids).await.2;
    assert_eq!(error, format!("Internal error occurred: error attaching to container: {text}"));
}

#[tokio::test]
async fn attach_ends_well_whatever_the_exit_code() {
    let running = serve().await;
    let url = running.server.attach(Shell::new("cat; exit 7"), IN_OUT).unwrap();
    let mut client = Client::connect(&url, V4).await;
    let ids = client.open_command("eio").await;
    client.data(ids[&'i'], b"hello").await;
    client.fin(ids[&'i']).await;
    let (out, _, error) = client.finish(&ids).await;
    assert_eq!(out, b"hello");
    assert_eq!(status(&error)["status"], "Success");
}

#[tokio::test]
async fn a_client_that_vanishes() {
    let running = serve().await;
    // At once; with output that it doesn't read; with input that nobody reads, more than the backlog holds.
    for (script, input) in [("sleep 1000", 0), ("yes", 0), ("echo up; sleep 1000", 8 << 20)] {
        let shell = Shell::new(script);
        let group = shell.group();
        let mut client = Client::connect(&running.server.exec(shell, IN_OUT).unwrap(), V4).await;
        let ids = client.open_command("eio").await;
        while !group.started() {
            sleep(Duration::from_millis(10)).await;
        }
        sleep(Duration::from_millis(300)).await;
        if input > 0 {
            let _ = timeout(Duration::from_secs(1), client.data(ids[&'i'], &vec![0; input])).await;
            // The end of the connection stands behind what the server doesn't read: only a reset tells it.
            client.reset_on_close();
        }
        drop(client);
        timeout(LIMIT, group.gone()).await.unwrap_or_else(|_| panic!("{script}"));
    }
}

#[tokio::test]
async fn an_idle_client_is_told_and_cut() {
    let running = serve_with(Timeouts { idle: Duration::from_millis(500), ..Timeouts::default() }).await;
    let shell = Shell::new("sleep 1000");
    let group = shell.group();
    let mut client = Client::connect(&running.server.exec(shell, OUT).unwrap(), V4).await;
    let ids = client.open_command("eoE").await;
    // Pings keep it.
    for n in 0..4 {
        sleep(Duration::from_millis(300)).await;
        client.send(Frame::Ping { id: 2 * n + 1 }).await;
    }
    let (.., error) = client.finish(&ids).await;
    assert_eq!(status(&error)["status"], "Failure");
    assert!(error.contains("idle for 500ms"), "{error}");
    group.gone().await;
    while client.next().await.is_some() {}
}

#[tokio::test]
async fn a_server_that_stops_says_so() {
    let mut running = serve().await;
    let shell = Shell::new("echo up; sleep 1000");
    let group = shell.group();
    let mut client = Client::connect(&running.server.exec(shell, OUT).unwrap(), V4).await;
    let ids = client.open_command("eoE").await;
    while !matches!(client.next().await.unwrap(), Frame::Data { .. }) {}
    running.stop.cancel();
    let (.., error) = client.finish(&ids).await;
    assert!(status(&error)["message"].as_str().unwrap().contains("runtime is stopping"), "{error}");
    group.gone().await;
    timeout(Duration::from_secs(10), &mut running.task).await.unwrap().unwrap();
}

#[tokio::test]
async fn streams_that_are_unknown_or_twice_there_do_not_count() {
    let running = serve().await;
    let mut client = exec(&running, "echo hi", OUT, V4).await;
    let twice = client.open(Headers::from([("streamtype", "stdout")]), false).await;
    client.open(Headers::from([("streamtype", "nonsense")]), true).await;
    client.open(Headers::default(), false).await;
    client.open(Headers::from([("streamtype", "stdin")]), false).await;
    let mut ids = client.open_command("oeE").await;
    ids.insert('o', twice);
    let (out, _, error) = client.finish(&ids).await;
    assert_eq!(out, b"hi\n");
    assert_eq!(status(&error)["status"], "Success");
}

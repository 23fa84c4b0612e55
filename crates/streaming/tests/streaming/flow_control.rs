//! One stream that nobody reads must not hold up the others.

use std::sync::Arc;

use stave_streaming::{
    Timeouts,
    spdy::{Frame, Headers},
};
use tokio::{
    io::AsyncReadExt,
    net::{TcpListener, TcpStream},
    time::{Duration, Instant, timeout},
};

use crate::{
    backend::{Loopback, Running, serve_with},
    client::Client,
    port_forward::echo,
};

const STALLED: Duration = Duration::from_millis(500);
const CHUNK: usize = 32 << 10;

async fn connect() -> (Running, Client) {
    let running = serve_with(Timeouts { stalled: STALLED, ..Timeouts::default() }).await;
    let url = running.server.port_forward(Arc::new(Loopback), vec![]).unwrap();
    let client = Client::connect(&url, "portforward.k8s.io").await;
    (running, client)
}

async fn open(client: &mut Client, port: u16, request: &str) -> u32 {
    let port = port.to_string();
    let headers =
        |kind| Headers::from([("streamtype", kind), ("port", port.as_str()), ("requestid", request)]);
    client.open(headers("error"), true).await;
    client.open(headers("data"), false).await
}

/// A server that accepts, and reads when it is told to.
async fn silent() -> (u16, TcpListener) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    // Not megabytes of the kernel's.
    rustix::net::sockopt::set_socket_recv_buffer_size(&listener, 16 << 10).unwrap();
    (listener.local_addr().unwrap().port(), listener)
}

async fn echoes(client: &mut Client, stream: u32) {
    client.data(stream, b"hello").await;
    let answer = async {
        loop {
            match client.next().await.expect("an answer") {
                Frame::Data { id, bytes, .. } if id == stream && !bytes.is_empty() => return bytes,
                Frame::Data { .. } => {}
                frame => panic!("{frame:?}"),
            }
        }
    };
    assert_eq!(timeout(Duration::from_secs(5), answer).await.expect("an echo in time"), "hello");
}

#[tokio::test]
async fn a_client_that_keeps_to_its_windows_is_held_up_by_no_stream() {
    let (_running, mut client) = connect().await;
    let (port, listener) = silent().await;
    let stalled = open(&mut client, port, "1").await;
    let other = open(&mut client, echo().await, "2").await;
    let (mut server, _): (TcpStream, _) = listener.accept().await.unwrap();
    client.tells_windows = true;
    let mut sent = 0_usize;
    loop {
        let window = client.windows.get(&stalled).copied().unwrap_or(64 << 10);
        if window >= CHUNK as i64 {
            client.data(stalled, &[7; CHUNK]).await;
            *client.windows.entry(stalled).or_insert(64 << 10) -= CHUNK as i64;
            sent += CHUNK;
        } else if timeout(Duration::from_millis(300), client.next()).await.is_err() {
            break; // No more window comes.
        }
        assert!(sent < 64 << 20, "the window has no end");
    }
    assert!(sent >= 1 << 20, "{sent} bytes");
    client.tells_windows = false;
    echoes(&mut client, other).await;
    // Longer than a stream may stand in the way, which this one does not.
    tokio::time::sleep(2 * STALLED).await;
    echoes(&mut client, other).await;
    // Once it is read it gets window again, and all that was sent is there.
    client.tells_windows = true;
    let reading = tokio::spawn(async move {
        let (mut got, mut buffer) = (0, vec![0; 64 << 10]);
        while let count @ 1.. = server.read(&mut buffer).await.unwrap() {
            assert!(buffer[..count].iter().all(|byte| *byte == 7));
            got += count;
        }
        got
    });
    match timeout(Duration::from_secs(10), client.next()).await.expect("new window") {
        Some(Frame::WindowUpdate { id, delta }) => assert!(id == stalled && delta > 0, "{id} {delta}"),
        frame => panic!("{frame:?}"),
    }
    client.fin(stalled).await;
    assert_eq!(reading.await.unwrap(), sent);
}

#[tokio::test]
async fn a_stream_that_ignores_its_window_is_reset_when_it_holds_up_others() {
    let (_running, mut client) = connect().await;
    let (port, listener) = silent().await;
    let hostile = open(&mut client, port, "1").await;
    let other = open(&mut client, echo().await, "2").await;
    let (_server, _) = listener.accept().await.unwrap();
    let start = Instant::now();
    for _ in 0..(64 << 20) / CHUNK {
        client.data(hostile, &[7; CHUNK]).await;
    }
    let reset = async {
        loop {
            match client.next().await.expect("a frame") {
                Frame::Reset { id, status } => return (id, status),
                frame => assert!(!matches!(frame, Frame::GoAway { .. }), "{frame:?}"),
            }
        }
    };
    assert_eq!(timeout(Duration::from_secs(5), reset).await.expect("a reset"), (hostile, 7));
    assert!(start.elapsed() >= STALLED, "{:?}: a slow one gets its time", start.elapsed());
    let answer = async {
        client.data(other, b"hello").await;
        loop {
            match client.next().await.expect("an answer") {
                Frame::Data { id, bytes, .. } if id == other => return bytes,
                _ => {}
            }
        }
    };
    assert_eq!(timeout(Duration::from_secs(5), answer).await.expect("an echo in time"), "hello");
}

#[tokio::test]
async fn a_slow_reader_is_not_a_stalled_one() {
    let (_running, mut client) = connect().await;
    let (port, listener) = silent().await;
    let stream = open(&mut client, port, "1").await;
    let (mut server, _) = listener.accept().await.unwrap();
    const LENGTH: usize = 16 << 20;
    let reading = tokio::spawn(async move {
        let (mut got, mut buffer, start) = (0, vec![0; 256 << 10], Instant::now());
        while let count @ 1.. = server.read(&mut buffer).await.unwrap() {
            got += count;
            // Some 8 MiB a second: longer than the limit in all.
            let due = Duration::from_secs_f64(got as f64 / f64::from(8 << 20));
            tokio::time::sleep(due.saturating_sub(start.elapsed())).await;
        }
        got
    });
    for _ in 0..LENGTH / CHUNK {
        client.data(stream, &[7; CHUNK]).await;
    }
    client.fin(stream).await;
    assert_eq!(reading.await.unwrap(), LENGTH);
}

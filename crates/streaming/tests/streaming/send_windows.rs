//! What the client gives window for is sent, and no more.

use std::{collections::HashMap, sync::Arc};

use stave_streaming::{
    Streams,
    spdy::{Frame, Headers},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    time::{Duration, timeout},
};

use crate::{
    backend::{Loopback, Running, Shell, serve},
    client::Client,
};

/// Longer than the server needs for what it has to send.
const QUIET: Duration = Duration::from_millis(300);
const CONNECTION: usize = 64 << 10;

async fn connect() -> (Running, Client) {
    let running = serve().await;
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

/// A server that sends `length` bytes, counting up, on each connection.
async fn source(length: usize) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let _ = stream.write_all(&counting(length)).await;
                let _ = stream.shutdown().await;
                let _ = stream.read(&mut [0]).await;
            });
        }
    });
    port
}

fn counting(length: usize) -> Vec<u8> {
    (0..length as u32).map(|n| (n / 3) as u8).collect()
}

/// What comes on each stream until nothing more does.
async fn all_that_comes(client: &mut Client) -> HashMap<u32, usize> {
    let mut got = HashMap::new();
    while let Ok(frame) = timeout(QUIET, client.next()).await {
        if let Frame::Data { id, bytes, .. } = frame.expect("the connection goes on") {
            *got.entry(id).or_default() += bytes.len();
        }
    }
    got
}

async fn widen(client: &mut Client, id: u32, delta: u32) {
    client.send(Frame::WindowUpdate { id, delta }).await;
}

#[tokio::test]
async fn a_stream_gets_what_it_has_window_for() {
    let (_running, mut client) = connect().await;
    client.send(Frame::Settings { initial_window: Some(1000) }).await;
    let port = source(1 << 20).await;
    let stream = open(&mut client, port, "1").await;
    assert_eq!(all_that_comes(&mut client).await, HashMap::from([(stream, 1000)]));
    widen(&mut client, stream, 500).await;
    assert_eq!(all_that_comes(&mut client).await, HashMap::from([(stream, 500)]));
    // For all that are open, too.
    client.send(Frame::Settings { initial_window: Some(1700) }).await;
    assert_eq!(all_that_comes(&mut client).await, HashMap::from([(stream, 700)]));
    client.send(Frame::Settings { initial_window: Some(1000) }).await;
    widen(&mut client, stream, 700).await;
    assert_eq!(all_that_comes(&mut client).await, HashMap::new(), "it was negative");
    // One that has window is not held up by one that has none.
    let other = open(&mut client, port, "2").await;
    assert_eq!(all_that_comes(&mut client).await, HashMap::from([(other, 1000)]));
    // Up to the connection's own window.
    widen(&mut client, other, 1 << 20).await;
    assert_eq!(all_that_comes(&mut client).await, HashMap::from([(other, CONNECTION - 3200)]));
    widen(&mut client, 0, 100).await;
    assert_eq!(all_that_comes(&mut client).await, HashMap::from([(other, 100)]));
    client.send(Frame::Ping { id: 1 }).await;
    assert_eq!(client.next().await, Some(Frame::Ping { id: 1 }));
}

#[tokio::test]
async fn without_a_word_about_windows_there_are_none_and_with_the_first_all_that_was_sent_counts() {
    let (_running, mut client) = connect().await;
    let port = source(300_000).await;
    let stream = open(&mut client, port, "1").await;
    assert_eq!(all_that_comes(&mut client).await, HashMap::from([(stream, 300_000)]));
    let stream = open(&mut client, source(40 << 20).await, "2").await;
    let mut got = 0;
    while got < 1 << 20 {
        if let Frame::Data { bytes, .. } = client.next().await.unwrap() {
            got += bytes.len();
        }
    }
    // What is on its way still comes, and then no more.
    widen(&mut client, stream, 1).await;
    got += all_that_comes(&mut client).await[&stream];
    assert!(got < 40 << 20, "{got}");
    widen(&mut client, stream, got as u32).await;
    widen(&mut client, 0, got as u32 + 300_000).await;
    assert_eq!(all_that_comes(&mut client).await, HashMap::from([(stream, CONNECTION)]));
}

#[tokio::test]
async fn all_of_it_comes_through_small_windows() {
    let (_running, mut client) = connect().await;
    client.send(Frame::Settings { initial_window: Some(7) }).await;
    let length = 3_000_000;
    let port = source(length).await;
    let streams = [open(&mut client, port, "1").await, open(&mut client, port, "2").await];
    let mut got: HashMap<u32, Vec<u8>> = HashMap::new();
    let mut ended = 0;
    let mut step = 1_u32;
    while ended < 2 {
        let Frame::Data { id, bytes, fin } = client.next().await.unwrap() else { continue };
        got.entry(id).or_default().extend_from_slice(&bytes);
        ended += u32::from(fin);
        if !bytes.is_empty() {
            // What was taken, and some more, in changing portions.
            step = step * 7 % 20_011;
            widen(&mut client, id, bytes.len() as u32 + step).await;
            widen(&mut client, 0, bytes.len() as u32).await;
        }
    }
    for stream in streams {
        assert!(got[&stream] == counting(length), "{} bytes", got[&stream].len());
    }
}

#[tokio::test]
async fn an_exec_waits_for_its_client_and_ends_with_it() {
    let running = serve().await;
    let shell = Shell::new("yes | head -c 500000; exit 3");
    let group = shell.group();
    let url = running
        .server
        .exec(shell, Streams { stdin: false, stdout: true, stderr: false, tty: false })
        .unwrap();
    let mut client = Client::connect(&url, "v4.channel.k8s.io").await;
    client.send(Frame::Settings { initial_window: Some(300) }).await;
    let ids = client.open_command("eo").await;
    assert_eq!(all_that_comes(&mut client).await, HashMap::from([(ids[&'o'], 300)]));
    widen(&mut client, ids[&'o'], 1 << 20).await;
    widen(&mut client, 0, 1 << 20).await;
    let (out, _, status) = client.finish(&ids).await;
    assert_eq!(out.len(), 500_000 - 300);
    assert!(status.contains("\"3\""), "{status}");

    let shell = Shell::new("yes");
    let endless = shell.group();
    let url = running
        .server
        .exec(shell, Streams { stdin: false, stdout: true, stderr: false, tty: false })
        .unwrap();
    let mut client = Client::connect(&url, "v4.channel.k8s.io").await;
    client.send(Frame::Settings { initial_window: Some(0) }).await;
    client.open_command("eo").await;
    assert_eq!(all_that_comes(&mut client).await, HashMap::new());
    drop(client);
    endless.gone().await;
    group.gone().await;
}

#[tokio::test]
async fn streams_that_are_reset_cost_the_connection_no_window() {
    let (_running, mut client) = connect().await;
    client.send(Frame::Settings { initial_window: Some(8 << 10) }).await;
    let port = source(1 << 20).await;
    for round in 0..40 {
        let mut streams = Vec::new();
        for n in 0..10 {
            streams.push(open(&mut client, port, &format!("{round}.{n}")).await);
        }
        for id in streams {
            client.send(Frame::Reset { id, status: 5 }).await;
        }
        // What has come all the same is taken.
        let mut got = 0;
        client.send(Frame::Ping { id: 1 }).await;
        while let Some(frame) = client.next().await {
            match frame {
                Frame::Data { bytes, .. } => got += bytes.len() as u32,
                Frame::Ping { .. } => break,
                _ => {}
            }
        }
        if got > 0 {
            widen(&mut client, 0, got).await;
        }
    }
    all_that_comes(&mut client).await;
    let stream = open(&mut client, port, "last").await;
    widen(&mut client, stream, 1 << 20).await;
    assert_eq!(all_that_comes(&mut client).await, HashMap::from([(stream, CONNECTION)]));
}

#[tokio::test]
async fn windows_that_are_too_large() {
    let (_running, mut client) = connect().await;
    let port = source(10).await;
    let stream = open(&mut client, port, "1").await;
    all_that_comes(&mut client).await;
    widen(&mut client, stream, i32::MAX as u32).await;
    assert_eq!(client.next().await, Some(Frame::Reset { id: stream, status: 7 }));
    widen(&mut client, 0, i32::MAX as u32).await;
    loop {
        match client.next().await.expect("GOAWAY") {
            Frame::GoAway { status, .. } => break assert_eq!(status, 1),
            // The end of the error stream.
            Frame::Data { bytes, .. } => assert!(bytes.is_empty()),
            frame => panic!("{frame:?}"),
        }
    }
    assert_eq!(client.next().await, None);
}

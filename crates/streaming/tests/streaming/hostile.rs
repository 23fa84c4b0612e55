//! Frames that nobody should send.

use std::sync::Arc;

use stave_streaming::{
    Streams,
    spdy::{Frame, Headers},
};
use tokio::time::{Duration, timeout};

use crate::{
    backend::{Loopback, Shell, serve},
    client::{Client, LIMIT},
};

const OUT: Streams = Streams { stdin: false, stdout: true, stderr: false, tty: false };

async fn forward() -> (crate::backend::Running, Client) {
    let running = serve().await;
    let url = running.server.port_forward(Arc::new(Loopback), vec![]).unwrap();
    let client = Client::connect(&url, "portforward.k8s.io").await;
    (running, client)
}

#[tokio::test]
async fn broken_frames_end_the_connection() {
    for bytes in [
        &b"\x80\x03\x00\x04\x00\xff\xff\xff"[..], // longer than the cap
        b"\x80\x03\x00\x04\x00\x00\x00\x04\xff\xff\xff\xff", // CVE-2026-35469
        b"\x80\x03\x00\x01\x00\x00\x00\x0e\0\0\0\x01\0\0\0\0\0\0junk", // no zlib
        b"\x80\x03\x00\x63\x00\x00\x00\x00",      // unknown type
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    ] {
        let (_running, mut client) = forward().await;
        client.send_raw(bytes).await;
        if bytes[0] == b'G' {
            // A long data frame of an unknown stream: ignored until it ends.
            client.send_raw(&vec![0; 0x20_4854 - (bytes.len() - 8)]).await;
            client.send_raw(b"\x80\x03\x00\x06\x00\x00\x00\x04\0\0\0\0").await;
        }
        match client.next().await {
            Some(Frame::GoAway { status: 1, .. }) => assert_eq!(client.next().await, None),
            None => {}
            frame => panic!("{frame:?}"),
        }
    }
}

#[tokio::test]
async fn a_header_bomb() {
    let (_running, mut client) = forward().await;
    client.syn(Headers::from([("a", &*"x".repeat(20 << 20))]), false).await;
    assert!(matches!(client.next().await, Some(Frame::GoAway { status: 1, .. })));
    assert_eq!(client.next().await, None);
}

#[tokio::test]
async fn too_many_streams() {
    let running = serve().await;
    let url = running.server.exec(Shell::new("echo hi"), OUT).unwrap();
    let mut client = Client::connect(&url, "v4.channel.k8s.io").await;
    let header = || Headers::from([("streamtype", "nonsense")]);
    let error = client.open(Headers::from([("streamtype", "error")]), false).await;
    for _ in 1..16 {
        client.open(header(), false).await;
    }
    let id = client.syn(header(), false).await;
    assert_eq!(client.next().await, Some(Frame::Reset { id, status: 3 }));
    // One that ends makes room.
    client.send(Frame::Reset { id: 3, status: 5 }).await;
    let out = client.open(Headers::from([("streamtype", "stdout")]), false).await;
    assert_eq!(client.collect(&[out, error]).await[&out], b"hi\n");
}

#[tokio::test]
async fn stream_ids_that_go_back() {
    let (_running, mut client) = forward().await;
    let headers = |n: &str| Headers::from([("streamtype", "error"), ("port", "80"), ("requestid", n)]);
    client.send(Frame::SynStream { id: 9, fin: true, headers: headers("a") }).await;
    assert!(matches!(client.next().await, Some(Frame::SynReply { id: 9, .. })));
    for id in [9, 7] {
        client.send(Frame::SynStream { id, fin: true, headers: headers("b") }).await;
        assert_eq!(client.next().await, Some(Frame::Reset { id, status: 1 }));
    }
    // What is for nobody is ignored, and so are settings and windows.
    client.data(77, b"x").await;
    client.send(Frame::Reset { id: 77, status: 1 }).await;
    client.send(Frame::Settings { initial_window: None }).await;
    client.send(Frame::WindowUpdate { id: 9, delta: 1 }).await;
    client.send(Frame::Ping { id: 2 }).await;
    client.send(Frame::Ping { id: 5 }).await;
    assert_eq!(client.next().await, Some(Frame::Ping { id: 5 }));
}

#[tokio::test]
async fn pings_that_nobody_reads_the_answers_of() {
    let (_running, mut client) = forward().await;
    let pings = b"\x80\x03\x00\x06\x00\x00\x00\x04\0\0\0\x01".repeat(100_000);
    // The server stops reading once its answers aren't read: our writes must block before long.
    let flood = async {
        for _ in 0..100 {
            client.send_raw(&pings).await;
        }
    };
    assert!(timeout(Duration::from_secs(5), flood).await.is_err());
    for _ in 0..100_000 {
        assert_eq!(timeout(LIMIT, client.next()).await.unwrap(), Some(Frame::Ping { id: 1 }));
    }
}

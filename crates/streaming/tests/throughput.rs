//! Port-forward of 1 GiB, beside a plain socket proxy in the same run: at least 0.6 of its rate.
//!
//! `cargo test --release -p stave-streaming --test throughput -- --ignored --nocapture`
#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(dead_code, reason = "the modules are shared with the other test")]

use std::sync::Arc;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::Instant,
};

#[path = "streaming/backend.rs"]
mod backend;
#[path = "streaming/client.rs"]
mod client;

use backend::{Loopback, serve};
use client::Client;
use stave_streaming::spdy::{Frame, Headers};

const LENGTH: usize = 1 << 30;

/// A server that sends [`LENGTH`] bytes to each client.
async fn source() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let block = vec![7; 1 << 20];
        while let Ok((mut stream, _)) = listener.accept().await {
            for _ in 0..LENGTH / block.len() {
                stream.write_all(&block).await.unwrap();
            }
        }
    });
    port
}

/// Seconds through a proxy that copies and does nothing else, in chunks as ours.
async fn plain(port: u16) -> f64 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut client, _) = listener.accept().await.unwrap();
        let mut server = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        let _ = tokio::io::copy_bidirectional_with_sizes(&mut client, &mut server, 32 << 10, 32 << 10).await;
    });
    let mut stream = TcpStream::connect(address).await.unwrap();
    let (start, mut total, mut buffer) = (Instant::now(), 0, vec![0; 64 << 10]);
    while total < LENGTH {
        total += stream.read(&mut buffer).await.unwrap();
    }
    start.elapsed().as_secs_f64()
}

/// Seconds through the streaming server.
async fn forwarded(port: u16) -> f64 {
    let running = serve().await;
    let url = running.server.port_forward(Arc::new(Loopback), vec![]).unwrap();
    let mut client = Client::connect(&url, "portforward.k8s.io").await;
    let port = port.to_string();
    let start = Instant::now();
    for kind in ["error", "data"] {
        let headers = Headers::from([("streamtype", kind), ("port", port.as_str()), ("requestid", "1")]);
        client.open(headers, kind == "error").await;
    }
    let mut total = 0;
    while total < LENGTH {
        if let Frame::Data { bytes, .. } = client.next().await.unwrap() {
            total += bytes.len();
        }
    }
    start.elapsed().as_secs_f64()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a figure: needs a release build and a quiet machine"]
async fn beside_a_plain_proxy() {
    let port = source().await;
    let mut ratios = Vec::new();
    for _ in 0..3 {
        let (plain, forwarded) = (plain(port).await, forwarded(port).await);
        ratios.push(plain / forwarded);
        eprintln!(
            "1 GiB: plain {plain:.2} s, forwarded {forwarded:.2} s, {:.2} of the rate",
            plain / forwarded
        );
    }
    assert!(ratios.iter().any(|ratio| *ratio >= 0.6), "{ratios:?}");
}

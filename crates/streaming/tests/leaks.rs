//! Sessions of every kind, ended in every way, many times: descriptors, tasks and memory stay flat (CVE-2025-64329,
//! CVE-2026-53495). Alone in its process, as it counts that process's descriptors.
#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(dead_code, reason = "the modules are shared with the other test")]

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use futures::future::{BoxFuture, FutureExt, pending};
use stave_streaming::{ExecSession, Process, SessionError, Streams, Timeouts};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::{Duration, sleep},
};

#[path = "streaming/backend.rs"]
mod backend;
#[path = "streaming/client.rs"]
mod client;

use backend::{Loopback, Running, Shell, serve_with};
use client::{Client, split};
use stave_streaming::spdy::{Frame, Headers};

const IN_OUT: Streams = Streams { stdin: true, stdout: true, stderr: false, tty: false };

/// An attachment to a container that says hello and then nothing.
struct Silent(Arc<AtomicUsize>);

impl ExecSession for Silent {
    fn start(self: Box<Self>) -> BoxFuture<'static, Result<Process, SessionError>> {
        let (mut container, ours) = tokio::io::duplex(1024);
        let (stdout, stdin) = tokio::io::split(ours);
        self.0.fetch_add(1, Ordering::Relaxed);
        async move {
            container.write_all(b"hello").await?;
            let attached = self.0.clone();
            Ok(Process {
                stdin: Some(Box::new(stdin)),
                stdout: Some(Box::new(stdout)),
                stderr: None,
                resize: None,
                exit: async move {
                    let _container = container;
                    pending().await
                }
                .boxed(),
                kill: Box::new(move || {
                    attached.fetch_sub(1, Ordering::Relaxed);
                }),
            })
        }
        .boxed()
    }
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/statm").unwrap();
    status.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

async fn attach_and_vanish(running: &Running, attached: &Arc<AtomicUsize>) {
    let url = running.server.attach(Box::new(Silent(attached.clone())), IN_OUT).unwrap();
    let mut client = Client::connect(&url, "v4.channel.k8s.io").await;
    client.open_command("eio").await;
    while !matches!(client.next().await.unwrap(), Frame::Data { .. }) {}
}

async fn vanish_before_the_streams(running: &Running, attached: &Arc<AtomicUsize>) {
    let url = running.server.attach(Box::new(Silent(attached.clone())), IN_OUT).unwrap();
    let mut client = Client::connect(&url, "v4.channel.k8s.io").await;
    client.open_command("ei").await;
    // And in the middle of a request, and before one.
    let mut stream = TcpStream::connect(split(&url).0).await.unwrap();
    stream.write_all(b"GET /exec/x HTTP/1.1\r\nHo").await.unwrap();
    drop(TcpStream::connect(split(&url).0).await.unwrap());
}

async fn forward_and_vanish(running: &Running, listener: &TcpListener) {
    let url = running.server.port_forward(Arc::new(Loopback), vec![]).unwrap();
    let mut client = Client::connect(&url, "portforward.k8s.io").await;
    let port = listener.local_addr().unwrap().port().to_string();
    for kind in ["error", "data"] {
        let headers = Headers::from([("streamtype", kind), ("port", &port), ("requestid", "1")]);
        client.open(headers, kind == "error").await;
    }
    let (mut stream, _) = listener.accept().await.unwrap();
    client.data(3, b"x").await;
    stream.read_exact(&mut [0]).await.unwrap();
}

async fn exec_that_leaves_a_child(running: &Running) {
    let url = running.server.exec(Shell::new("sleep 5 & exit 0"), IN_OUT).unwrap();
    let mut client = Client::connect(&url, "v4.channel.k8s.io").await;
    let ids = client.open_command("eio").await;
    assert!(client.finish(&ids).await.2.contains("Success"));
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_left_behind() {
    let running = serve_with(Timeouts { drain: Duration::from_millis(20), ..Timeouts::default() }).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let attached = Arc::new(AtomicUsize::new(0));
    let round = async |count: usize| {
        for n in 0..count {
            attach_and_vanish(&running, &attached).await;
            vanish_before_the_streams(&running, &attached).await;
            forward_and_vanish(&running, &listener).await;
            if n % 10 == 0 {
                exec_that_leaves_a_child(&running).await;
            }
        }
        // What is about to end gets the time to.
        for _ in 0..500 {
            if attached.load(Ordering::Relaxed) == 0 && descriptors() < 30 {
                break;
            }
            sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(attached.load(Ordering::Relaxed), 0);
        (descriptors(), resident())
    };
    let (descriptors_before, resident_before) = round(300).await;
    let (descriptors_after, resident_after) = round(2000).await;
    assert!(
        descriptors_after <= descriptors_before + 2,
        "{descriptors_before} then {descriptors_after} descriptors"
    );
    assert!(
        resident_after < resident_before + (6 << 20),
        "{resident_before} then {resident_after} bytes of memory"
    );
    eprintln!(
        "{descriptors_before} then {descriptors_after} descriptors, {resident_before} then {resident_after} bytes"
    );
}

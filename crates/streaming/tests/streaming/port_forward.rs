//! Port-forward over SPDY.

use std::{net::SocketAddr, sync::Arc};

use sha2::{Digest, Sha256};
use stave_streaming::{
    Timeouts,
    spdy::{Frame, Headers},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    time::{Duration, sleep},
};

use crate::{
    backend::{Loopback, Running, serve, serve_with},
    client::Client,
};

const VERSION: &str = "portforward.k8s.io";

/// A server that sends back what it gets, to the end.
pub(crate) async fn echo() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut reader, mut writer) = stream.split();
                let _ = tokio::io::copy(&mut reader, &mut writer).await;
                let _ = writer.shutdown().await;
            });
        }
    });
    port
}

/// A port that nobody listens on.
pub(crate) async fn closed_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port()
}

async fn connect(running: &Running) -> Client {
    let url = running.server.port_forward(Arc::new(Loopback), vec![]).unwrap();
    Client::connect(&url, VERSION).await
}

fn headers(kind: &str, port: u16, request: &str) -> Headers {
    Headers::from([("streamType", kind), ("port", &port.to_string()), ("requestID", request)])
}

/// Opens a pair as Go does; answers with (error, data).
async fn pair(client: &mut Client, port: u16, request: &str) -> (u32, u32) {
    let error = client.open(headers("error", port, request), false).await;
    client.fin(error).await;
    let data = client.open(headers("data", port, request), false).await;
    (error, data)
}

#[tokio::test]
async fn half_close_goes_both_ways() {
    let running = serve().await;
    let mut client = connect(&running).await;
    let (error, data) = pair(&mut client, echo().await, "0").await;
    client.data(data, b"hello").await;
    client.fin(data).await;
    let got = client.collect(&[error, data]).await;
    assert_eq!((&got[&data][..], &got[&error][..]), (&b"hello"[..], &b""[..]));

    // The pod's side ends first.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (error, data) = pair(&mut client, listener.local_addr().unwrap().port(), "1").await;
    let (mut stream, _) = listener.accept().await.unwrap();
    stream.write_all(b"bye").await.unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(client.collect(&[data]).await[&data], b"bye");
    client.data(data, b"still here").await;
    client.fin(data).await;
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "still here");
    assert_eq!(client.collect(&[error]).await[&error], b"");
}

#[tokio::test]
async fn many_at_a_time() {
    let running = serve().await;
    let mut client = connect(&running).await;
    let port = echo().await;
    for round in 0..5 {
        let mut pairs = Vec::new();
        for n in 0..300 {
            pairs.push(pair(&mut client, port, &format!("{round}-{n}")).await);
        }
        for (n, (_, data)) in pairs.iter().enumerate() {
            client.data(*data, format!("this is {n}").as_bytes()).await;
            client.fin(*data).await;
        }
        let ids: Vec<_> = pairs.iter().flat_map(|(error, data)| [*error, *data]).collect();
        let got = client.collect(&ids).await;
        for (n, (error, data)) in pairs.iter().enumerate() {
            assert_eq!(got[data], format!("this is {n}").as_bytes());
            assert_eq!(got[error], b"");
        }
    }
}

#[tokio::test]
async fn much_data_arrives_whole() {
    const LENGTH: usize = 100_000_000;
    let running = serve().await;
    let mut client = connect(&running).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let block: Vec<u8> = (0..1_000_003_u32).map(|n| (n * 7) as u8).collect();
    let sent = block.clone();
    let digest = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut digest = Sha256::new();
        let mut left = LENGTH;
        while left > 0 {
            let length = left.min(sent.len());
            stream.write_all(&sent[..length]).await.unwrap();
            digest.update(&sent[..length]);
            left -= length;
        }
        digest.finalize()
    });
    let (error, data) = pair(&mut client, port, "x").await;
    let got = client.collect(&[data]).await;
    assert_eq!(got[&data].len(), LENGTH);
    assert_eq!(Sha256::digest(&got[&data]), digest.await.unwrap());
    // As Go does at the end: then it waits for the other stream's.
    client.send(Frame::Reset { id: data, status: 5 }).await;
    assert_eq!(client.collect(&[error]).await[&error], b"");
}

#[tokio::test]
async fn a_port_that_nobody_listens_on() {
    let running = serve().await;
    let mut client = connect(&running).await;
    let port = closed_port().await;
    let (error, data) = pair(&mut client, port, "0").await;
    let got = client.collect(&[error, data]).await;
    let text = String::from_utf8(got[&error].clone()).unwrap();
    assert!(text.starts_with(&format!("error forwarding port {port} to pod testpod, uid : ")), "{text}");
    assert!(text.contains("refused"), "{text}");
    // The others go on.
    let (_, data) = pair(&mut client, echo().await, "1").await;
    client.data(data, b"hello").await;
    client.fin(data).await;
    assert_eq!(client.collect(&[data]).await[&data], b"hello");
}

#[tokio::test]
async fn a_connection_that_breaks_is_no_error_text() {
    let running = serve().await;
    let mut client = connect(&running).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (error, data) = pair(&mut client, listener.local_addr().unwrap().port(), "0").await;
    let (mut stream, _) = listener.accept().await.unwrap();
    client.data(data, b"x").await;
    stream.read_exact(&mut [0]).await.unwrap();
    rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
    drop(stream);
    let got = client.collect(&[error, data]).await;
    assert_eq!(got[&error], b"");
}

#[tokio::test]
async fn a_client_that_resets_closes_the_pod_s_connection() {
    let running = serve().await;
    let mut client = connect(&running).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (error, data) = pair(&mut client, listener.local_addr().unwrap().port(), "0").await;
    let (mut stream, _) = listener.accept().await.unwrap();
    client.data(data, b"last words").await;
    client.send(Frame::Reset { id: data, status: 5 }).await;
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "last words");
    assert_eq!(client.collect(&[error]).await[&error], b"");
    // And a client that vanishes.
    let (_, data) = pair(&mut client, listener.local_addr().unwrap().port(), "1").await;
    let (mut stream, _) = listener.accept().await.unwrap();
    client.data(data, b"last words").await;
    drop(client);
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "last words");
}

#[tokio::test]
async fn a_slow_connection_does_not_stall_the_others() {
    let running = serve().await;
    let mut client = connect(&running).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (_, slow) = pair(&mut client, listener.local_addr().unwrap().port(), "slow").await;
    let (mut stream, _) = listener.accept().await.unwrap();
    // More than the kernel may buffer wouldn't fit; this much waits in the backlog.
    client.data(slow, &vec![7; 900_000]).await;
    let (_, data) = pair(&mut client, echo().await, "fast").await;
    client.data(data, b"hello").await;
    client.fin(data).await;
    assert_eq!(client.collect(&[data]).await[&data], b"hello");
    let mut all = vec![0; 900_000];
    stream.read_exact(&mut all).await.unwrap();
    assert!(all.iter().all(|byte| *byte == 7));
}

#[tokio::test]
async fn requests_without_an_id() {
    let running = serve().await;
    let mut client = connect(&running).await;
    let port = echo().await.to_string();
    let headers = |kind| Headers::from([("streamtype", kind), ("port", port.as_str())]);
    let error = client.open(headers("error"), true).await;
    let data = client.open(headers("data"), false).await;
    client.data(data, b"old").await;
    client.fin(data).await;
    let got = client.collect(&[error, data]).await;
    assert_eq!((&got[&data][..], &got[&error][..]), (&b"old"[..], &b""[..]));
}

#[tokio::test]
async fn streams_that_are_refused() {
    let running = serve().await;
    let mut client = connect(&running).await;
    for (kind, port) in
        [("data", "0"), ("data", "65536"), ("data", "x"), ("data", ""), ("error", "-1"), ("other", "80")]
    {
        let headers = Headers::from([("streamtype", kind), ("port", port), ("requestid", "1")]);
        let id = client.syn(headers, false).await;
        assert_eq!(client.next().await, Some(Frame::Reset { id, status: 5 }), "{kind} {port}");
    }
    let id = client.syn(Headers::from([("streamtype", "data")]), false).await;
    assert_eq!(client.next().await, Some(Frame::Reset { id, status: 5 }));
}

#[tokio::test]
async fn pairs_that_are_not_complete() {
    let running = serve_with(Timeouts { setup: Duration::from_millis(300), ..Timeouts::default() }).await;
    let mut client = connect(&running).await;
    let error = client.open(headers("error", 80, "1"), true).await;
    let lonely = client.open(headers("data", 80, "2"), false).await;
    let got = client.collect(&[error, lonely]).await;
    let text = String::from_utf8(got[&error].clone()).unwrap();
    assert!(text.ends_with("the request's data stream has not come"), "{text}");
    // Twice the same type.
    let first = client.open(headers("error", 80, "3"), true).await;
    let second = client.open(headers("error", 80, "3"), true).await;
    let got = client.collect(&[first, second]).await;
    assert!(String::from_utf8(got[&first].clone()).unwrap().contains("two streams of one type"));
}

#[tokio::test]
async fn no_new_streams_after_goaway() {
    let running = serve().await;
    let mut client = connect(&running).await;
    let (error, data) = pair(&mut client, echo().await, "1").await;
    client.send(Frame::GoAway { last: 0, status: 0 }).await;
    let id = client.syn(headers("error", 80, "2"), false).await;
    assert_eq!(client.next().await, Some(Frame::Reset { id, status: 3 }));
    client.data(data, b"hello").await;
    client.fin(data).await;
    assert_eq!(client.collect(&[error, data]).await[&data], b"hello");
}

#[tokio::test]
async fn an_idle_connection_is_cut() {
    let running = serve_with(Timeouts { idle: Duration::from_millis(300), ..Timeouts::default() }).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address: SocketAddr = listener.local_addr().unwrap();
    let mut client = connect(&running).await;
    pair(&mut client, address.port(), "1").await;
    let (mut stream, _) = listener.accept().await.unwrap();
    sleep(Duration::from_millis(100)).await;
    while client.next().await.is_some() {}
    assert_eq!(stream.read(&mut [0; 1]).await.unwrap_or(0), 0);
}

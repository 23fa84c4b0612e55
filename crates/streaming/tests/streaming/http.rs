//! Requests that don't become sessions.

use stave_streaming::{Streams, Timeouts, TokenError};
use tokio::{
    io::AsyncReadExt,
    time::{Duration, sleep},
};

use crate::{
    backend::{Loopback, Running, Shell, serve, serve_with},
    client::request,
};

const OUT: Streams = Streams { stdin: false, stdout: true, stderr: false, tty: false };
const SPDY: [(&str, &str); 3] =
    [("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1"), ("X-Stream-Protocol-Version", "v4.channel.k8s.io")];
const WEBSOCKET: [(&str, &str); 4] = [
    ("Connection", "Upgrade"),
    ("Upgrade", "websocket"),
    ("Sec-WebSocket-Version", "13"),
    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
];

fn exec(running: &Running) -> String {
    running.server.exec(Shell::new("true"), OUT).unwrap()
}

/// The status and the head of the answer.
async fn status(method: &str, url: &str, headers: &[(&str, &str)]) -> (u16, String) {
    let (head, _, _) = request(method, url, headers).await;
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    assert!(status == 101 || head.to_ascii_lowercase().contains("content-length: "), "{head}");
    (status, head.to_ascii_lowercase())
}

#[tokio::test]
async fn unknown_urls() {
    let running = serve().await;
    for path in
        ["/", "/exec", "/exec/", "/exec/AAAAAAAAAAAAAAAAAAAAAA", "/nothing/x", "/exec/x/y", "/attach/x"]
    {
        let url = format!("{}{path}", running.server.base_url());
        assert_eq!(status("GET", &url, &SPDY).await.0, 404, "{path}");
    }
}

#[tokio::test]
async fn methods() {
    let running = serve().await;
    for method in ["PUT", "DELETE", "HEAD"] {
        let url = exec(&running);
        let (code, head) = status(method, &url, &SPDY).await;
        assert_eq!(code, 405);
        assert!(head.contains("allow: get, post"));
        // The token is still good.
        assert_eq!(status("GET", &url, &SPDY).await.0, 101);
    }
    let post = status("POST", &exec(&running), &WEBSOCKET).await;
    assert_eq!(post.0, 405);
}

#[tokio::test]
async fn a_token_is_for_one_use() {
    let running = serve().await;
    let url = exec(&running);
    assert_eq!(status("POST", &url, &SPDY).await.0, 101);
    assert_eq!(status("POST", &url, &SPDY).await.0, 404);
    // A request that fails uses it up, and so does the wrong verb.
    let url = exec(&running);
    assert_eq!(status("POST", &url, &[]).await.0, 400);
    assert_eq!(status("POST", &url, &SPDY).await.0, 404);
    let url = exec(&running);
    assert_eq!(status("POST", &url.replace("/exec/", "/attach/"), &SPDY).await.0, 404);
    assert_eq!(status("POST", &url, &SPDY).await.0, 404);
}

#[tokio::test]
async fn tokens_expire_and_are_limited() {
    let running = serve_with(Timeouts { token: Duration::from_millis(300), ..Timeouts::default() }).await;
    let urls: Vec<_> = (0..1000).map(|_| exec(&running)).collect();
    let error = running.server.exec(Shell::new("true"), OUT).unwrap_err();
    assert!(matches!(error, TokenError::TooMany));
    sleep(Duration::from_millis(400)).await;
    assert_eq!(status("POST", &urls[0], &SPDY).await.0, 404);
    exec(&running);
}

#[tokio::test]
async fn upgrades_that_are_refused() {
    let running = serve().await;
    let [connection, upgrade, version] = SPDY;
    assert_eq!(status("POST", &exec(&running), &[upgrade, version]).await.0, 400);
    assert_eq!(status("POST", &exec(&running), &[connection, version]).await.0, 400);
    assert_eq!(status("POST", &exec(&running), &[connection, ("Upgrade", "h2c"), version]).await.0, 400);
    assert_eq!(status("POST", &exec(&running), &[connection, upgrade]).await.0, 400);
    let none = ("X-Stream-Protocol-Version", "v9.channel.k8s.io");
    let (code, head) = status("POST", &exec(&running), &[connection, upgrade, none]).await;
    assert_eq!(code, 403);
    assert_eq!(head.matches("x-accepted-stream-protocol-versions: ").count(), 5, "{head}");

    let forward = running.server.port_forward(std::sync::Arc::new(Loopback), vec![]).unwrap();
    assert_eq!(status("POST", &forward, &SPDY).await.0, 403);
    let forward = running.server.port_forward(std::sync::Arc::new(Loopback), vec![]).unwrap();
    assert_eq!(status("GET", &forward, &WEBSOCKET).await.0, 400);
}

#[tokio::test]
async fn websocket_upgrades() {
    let running = serve().await;
    let (code, head) = status("GET", &exec(&running), &WEBSOCKET).await;
    assert_eq!(code, 101);
    assert!(head.contains("sec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo="), "{head}");
    assert!(!head.contains("sec-websocket-protocol"), "{head}");
    let offer = ("Sec-WebSocket-Protocol", "v9.channel.k8s.io, v4.base64.channel.k8s.io, v4.channel.k8s.io");
    let (code, head) = status("GET", &exec(&running), &[&WEBSOCKET[..], &[offer]].concat()).await;
    assert_eq!(code, 101);
    assert!(head.contains("sec-websocket-protocol: v4.base64.channel.k8s.io\r\n"), "{head}");
    let unknown = ("Sec-WebSocket-Protocol", "v9.channel.k8s.io");
    let (code, head) = status("GET", &exec(&running), &[&WEBSOCKET[..], &[unknown]].concat()).await;
    assert_eq!((code, head.contains("content-length: 0\r\n")), (403, true));
    let old = [WEBSOCKET[0], WEBSOCKET[1], ("Sec-WebSocket-Version", "8"), WEBSOCKET[3]];
    assert_eq!(status("GET", &exec(&running), &old).await.0, 400);
}

#[tokio::test]
async fn a_client_that_says_nothing_more_gets_nothing_and_is_cut() {
    let running = serve_with(Timeouts { setup: Duration::from_millis(300), ..Timeouts::default() }).await;
    let (head, mut rest, mut stream) = request("POST", &exec(&running), &SPDY).await;
    assert!(head.starts_with("HTTP/1.1 101 "));
    while stream.read_buf(&mut rest).await.unwrap_or(0) > 0 {}
    assert!(rest.is_empty(), "{rest:?}");
}

//! Exec and attach over WebSocket.

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use rustix::net::sockopt::set_socket_linger;
use sha2::{Digest, Sha256};
use stave_streaming::Streams;
use tokio::{
    net::TcpStream,
    time::{Duration, sleep, timeout},
};
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{
        Message, client::IntoClientRequest, http::HeaderValue, protocol::frame::coding::CloseCode,
    },
};

use crate::{
    backend::{Broken, Running, Shell, serve},
    client::{LIMIT, split},
};

const OUT: Streams = Streams { stdin: false, stdout: true, stderr: true, tty: false };
const IN_OUT: Streams = Streams { stdin: true, stdout: true, stderr: false, tty: false };

pub(crate) type Socket = WebSocketStream<TcpStream>;

pub(crate) async fn connect(url: &str, subprotocol: Option<&'static str>) -> Socket {
    let stream = TcpStream::connect(split(url).0).await.unwrap();
    let mut request = url.replace("http://", "ws://").into_client_request().unwrap();
    if let Some(subprotocol) = subprotocol {
        request.headers_mut().insert("Sec-WebSocket-Protocol", HeaderValue::from_static(subprotocol));
    }
    let (socket, answer) = client_async(request, stream).await.unwrap();
    let chosen = answer.headers().get("sec-websocket-protocol").map(|value| value.to_str().unwrap());
    assert_eq!(chosen, subprotocol);
    socket
}

async fn exec(
    running: &Running,
    script: &str,
    streams: Streams,
    subprotocol: Option<&'static str>,
) -> Socket {
    connect(&running.server.exec(Shell::new(script), streams).unwrap(), subprotocol).await
}

pub(crate) async fn next(socket: &mut Socket) -> Message {
    timeout(LIMIT, socket.next()).await.expect("no message came").expect("the connection is open").unwrap()
}

/// Reads until the close, answers with the content of each channel. The code must be 1000.
async fn finish(socket: &mut Socket) -> [Vec<u8>; 4] {
    let mut channels = [const { Vec::new() }; 4];
    loop {
        match next(socket).await {
            Message::Binary(payload) => channels[usize::from(payload[0])].extend_from_slice(&payload[1..]),
            Message::Text(text) => {
                let (channel, rest) = text.split_at(1);
                channels[channel.parse::<usize>().unwrap()].extend(STANDARD.decode(rest).unwrap());
            }
            Message::Close(frame) => {
                assert_eq!(frame.unwrap().code, CloseCode::Normal);
                return channels;
            }
            _ => {}
        }
    }
}

fn binary(channel: u8, bytes: &[u8]) -> Message {
    Message::Binary([&[channel], bytes].concat().into())
}

#[tokio::test]
async fn outputs_and_exit_code() {
    let running = serve().await;
    let json = r#""reason":"NonZeroExitCode""#;
    let text = "command terminated with non-zero exit code: exit code 3";
    for (subprotocol, expected) in [
        (Some("v5.channel.k8s.io"), json),
        (Some("v4.channel.k8s.io"), json),
        (Some("v4.base64.channel.k8s.io"), json),
        (Some("channel.k8s.io"), text),
        (Some("base64.channel.k8s.io"), text),
        (None, text),
    ] {
        let mut socket = exec(&running, "echo out; echo err >&2; exit 3", OUT, subprotocol).await;
        // An empty message on stdout says that we are connected.
        match next(&mut socket).await {
            Message::Binary(payload) => assert_eq!(&payload[..], [1]),
            Message::Text(payload) => assert_eq!(payload.as_str(), "1"),
            message => panic!("{message:?}"),
        }
        let [_, out, err, error] = finish(&mut socket).await;
        assert_eq!((&out[..], &err[..]), (&b"out\n"[..], &b"err\n"[..]));
        let error = String::from_utf8(error).unwrap();
        assert!(error.contains(expected), "{subprotocol:?}: {error}");
    }
}

#[tokio::test]
async fn success_is_said_in_version_4_and_silent_in_version_1() {
    let running = serve().await;
    let mut socket = exec(&running, "true", OUT, Some("v4.channel.k8s.io")).await;
    assert!(
        String::from_utf8(finish(&mut socket).await[3].clone()).unwrap().contains(r#""status":"Success""#)
    );
    let mut socket = exec(&running, "true", OUT, Some("channel.k8s.io")).await;
    assert_eq!(finish(&mut socket).await, [const { Vec::<u8>::new() }; 4]);
}

#[tokio::test]
async fn input_and_its_end_in_version_5() {
    let running = serve().await;
    let socket = exec(&running, "cat; echo done", IN_OUT, Some("v5.channel.k8s.io")).await;
    let input: Vec<u8> = (0..3_000_000_u32).map(|n| n as u8).collect();
    let (mut sink, mut source) = socket.split();
    let send = async {
        for piece in input.chunks(30_000) {
            sink.send(binary(0, piece)).await.unwrap();
        }
        // Channels that aren't open, and empty messages, do nothing.
        for message in [binary(9, b"x"), binary(1, b"x"), binary(0, b""), Message::Binary(Bytes::new())] {
            sink.send(message).await.unwrap();
        }
        sink.send(binary(255, &[0])).await.unwrap();
    };
    let receive = async {
        let mut out = Vec::new();
        while let Some(Ok(message)) = source.next().await {
            match message {
                Message::Binary(payload) if payload[0] == 1 => out.extend_from_slice(&payload[1..]),
                Message::Close(frame) => {
                    assert_eq!(frame.unwrap().code, CloseCode::Normal);
                    break;
                }
                _ => {}
            }
        }
        out
    };
    let ((), out) = timeout(LIMIT, futures::future::join(send, receive)).await.unwrap();
    assert_eq!(Sha256::digest(&out), Sha256::digest([&input[..], b"done\n"].concat()));
    let mut socket = exec(&running, "cat", IN_OUT, Some("v5.channel.k8s.io")).await;
    // A bad end of a channel ends the connection.
    socket.send(binary(255, &[0, 0])).await.unwrap();
    while let Some(Ok(_)) = timeout(LIMIT, socket.next()).await.unwrap() {}
}

#[tokio::test]
async fn base64_both_ways() {
    let running = serve().await;
    let mut socket = exec(&running, "read x; echo $x", IN_OUT, Some("v4.base64.channel.k8s.io")).await;
    socket.send(Message::text(format!("0{}", STANDARD.encode("hello\n")))).await.unwrap();
    assert_eq!(finish(&mut socket).await[1], b"hello\n");
}

#[tokio::test]
async fn text_messages_count_as_binary_ones() {
    // Kubernetes' Python client sends such.
    let running = serve().await;
    let mut socket = exec(&running, "read x; echo $x", IN_OUT, Some("v4.channel.k8s.io")).await;
    socket.send(Message::text("\0hello\n")).await.unwrap();
    assert_eq!(finish(&mut socket).await[1], b"hello\n");
}

#[tokio::test]
async fn a_terminal_and_its_size() {
    let running = serve().await;
    let streams = Streams { tty: true, ..IN_OUT };
    let url = running.server.exec(Shell::tty("read x; stty size"), streams).unwrap();
    let mut socket = connect(&url, Some("v5.channel.k8s.io")).await;
    socket.send(binary(4, b"{\"Width\":90,\"Height\":33}")).await.unwrap();
    sleep(Duration::from_millis(300)).await;
    socket.send(binary(0, b"\n")).await.unwrap();
    assert_eq!(String::from_utf8(finish(&mut socket).await[1].clone()).unwrap(), "\r\n33 90\r\n");
}

#[tokio::test]
async fn pings_are_answered_while_output_flows() {
    let running = serve().await;
    let mut socket = exec(&running, "head -c 20000000 /dev/zero", OUT, Some("v5.channel.k8s.io")).await;
    let (mut total, mut pongs) = (0, 0);
    loop {
        match next(&mut socket).await {
            Message::Binary(payload) if payload[0] == 1 => {
                total += payload.len() - 1;
                if total % 50 == 0 {
                    socket.send(Message::Ping(Bytes::from_static(b"x"))).await.unwrap();
                }
            }
            Message::Pong(_) => pongs += 1,
            Message::Close(_) => break,
            _ => {}
        }
    }
    assert_eq!(total, 20_000_000);
    assert!(pongs > 0);
}

#[tokio::test]
async fn a_session_that_can_not_start() {
    let running = serve().await;
    let mut socket =
        connect(&running.server.attach(Box::new(Broken), OUT).unwrap(), Some("v4.channel.k8s.io")).await;
    let error = String::from_utf8(finish(&mut socket).await[3].clone()).unwrap();
    assert!(error.contains("error attaching to container: container is not running"), "{error}");
}

#[tokio::test]
async fn a_client_that_vanishes() {
    let running = serve().await;
    for (script, input) in [("sleep 1000", 0), ("yes", 0), ("sleep 1000", 8 << 20)] {
        let shell = Shell::new(script);
        let group = shell.group();
        let mut socket =
            connect(&running.server.exec(shell, IN_OUT).unwrap(), Some("v5.channel.k8s.io")).await;
        while !group.started() {
            sleep(Duration::from_millis(10)).await;
        }
        sleep(Duration::from_millis(300)).await;
        let write = async {
            for _ in 0..input / 32_768 {
                socket.send(binary(0, &[0; 32_768])).await.unwrap();
            }
        };
        let _ = timeout(Duration::from_secs(1), write).await;
        if input > 0 {
            // The end of the connection stands behind what the server doesn't read: only a reset tells it.
            set_socket_linger(socket.get_ref(), Some(Duration::ZERO)).unwrap();
        }
        drop(socket);
        timeout(LIMIT, group.gone()).await.unwrap_or_else(|_| panic!("{script}"));
    }
}

#[tokio::test]
async fn a_message_over_the_limit_ends_the_connection() {
    let running = serve().await;
    let shell = Shell::new("sleep 1000");
    let group = shell.group();
    let mut socket = connect(&running.server.exec(shell, IN_OUT).unwrap(), Some("v5.channel.k8s.io")).await;
    while !group.started() {
        sleep(Duration::from_millis(10)).await;
    }
    sleep(Duration::from_millis(300)).await;
    let _ = socket.send(binary(0, &vec![0; 5 << 20])).await;
    timeout(LIMIT, group.gone()).await.unwrap();
}

//! Port-forward over WebSocket: numbered channels, and SPDY in a tunnel.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures::SinkExt;
use stave_streaming::spdy::{Decoder, Encoder, Frame, Headers};
use tokio_tungstenite::tungstenite::{Message, protocol::frame::coding::CloseCode};

use crate::{
    backend::{Loopback, serve},
    exec_websocket::{connect, next},
    port_forward::{closed_port, echo},
};

#[tokio::test]
async fn channels_by_port() {
    let running = serve().await;
    let (first, second) = (echo().await, closed_port().await);
    for subprotocol in [Some("v4.channel.k8s.io"), Some("channel.k8s.io"), None] {
        let url = running.server.port_forward(Arc::new(Loopback), vec![first, second]).unwrap();
        let mut socket = connect(&url, subprotocol).await;
        socket.send(Message::binary(&b"\0hello"[..])).await.unwrap();
        let mut channels = [const { Vec::new() }; 4];
        while channels[0].len() < 7 || !channels[3].ends_with(b")") {
            match next(&mut socket).await {
                Message::Binary(payload) => {
                    channels[usize::from(payload[0])].extend_from_slice(&payload[1..])
                }
                message => panic!("{message:?}"),
            }
        }
        let [first_le, second_le] = [first, second].map(u16::to_le_bytes);
        assert_eq!(channels[0], [&first_le[..], b"hello"].concat());
        assert_eq!(channels[1], first_le);
        assert_eq!(channels[2], second_le);
        let text = String::from_utf8(channels[3][2..].to_vec()).unwrap();
        assert!(
            text.starts_with(&format!("error forwarding port {second} to pod testpod, uid : ")),
            "{text}"
        );
        assert_eq!(channels[3][..2], second_le);
    }
}

#[tokio::test]
async fn the_connection_closes_when_all_ports_are_done() {
    let running = serve().await;
    let url = running.server.port_forward(Arc::new(Loopback), vec![closed_port().await]).unwrap();
    let mut socket = connect(&url, Some("v4.base64.channel.k8s.io")).await;
    loop {
        match next(&mut socket).await {
            Message::Text(text) => assert!(text.starts_with(['0', '1'])),
            Message::Close(frame) => break assert_eq!(frame.unwrap().code, CloseCode::Normal),
            message => panic!("{message:?}"),
        }
    }
}

#[tokio::test]
async fn spdy_in_a_tunnel() {
    let running = serve().await;
    let port = echo().await.to_string();
    let url = running.server.port_forward(Arc::new(Loopback), vec![]).unwrap();
    let mut socket = connect(&url, Some("SPDY/3.1+portforward.k8s.io")).await;
    let (mut encoder, mut out) = (Encoder::default(), BytesMut::new());
    let headers = |kind| Headers::from([("streamtype", kind), ("port", port.as_str()), ("requestid", "0")]);
    let payload = Bytes::from(vec![5; 100_000]);
    for frame in [
        Frame::SynStream { id: 1, fin: true, headers: headers("error") },
        Frame::SynStream { id: 3, fin: false, headers: headers("data") },
        Frame::Ping { id: 1 },
        Frame::Data { id: 3, fin: true, bytes: payload.clone() },
    ] {
        encoder.encode(&frame, &mut out).unwrap();
    }
    // The borders of messages mean nothing.
    let head = out.split_to(60);
    for byte in head.chunks(1) {
        socket.send(Message::binary(byte.to_vec())).await.unwrap();
    }
    socket.send(Message::Binary(out.freeze())).await.unwrap();
    let (mut decoder, mut buffer) = (Decoder::default(), BytesMut::new());
    let (mut got, mut replies, mut pongs, mut ended) = (Vec::new(), 0, 0, 0);
    while ended < 2 {
        match next(&mut socket).await {
            Message::Binary(bytes) => buffer.extend_from_slice(&bytes),
            message => panic!("{message:?}"),
        }
        while let Some(frame) = decoder.decode(&mut buffer).unwrap() {
            match frame {
                Frame::SynReply { .. } => replies += 1,
                Frame::Ping { id: 1 } => pongs += 1,
                Frame::WindowUpdate { .. } => {}
                Frame::Data { id, fin, bytes } => {
                    assert!(id == 3 || bytes.is_empty());
                    got.extend_from_slice(&bytes);
                    ended += u32::from(fin);
                }
                frame => panic!("{frame:?}"),
            }
        }
    }
    assert_eq!((replies, pongs), (2, 1));
    assert_eq!(got, payload);
    // Text isn't SPDY.
    socket.send(Message::text("hello")).await.unwrap();
    while let Some(Ok(_)) = futures::StreamExt::next(&mut socket).await {}
}

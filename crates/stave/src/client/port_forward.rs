//! `stave port-forward`

use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

use anyhow::{Context as _, bail};
use bytes::{Bytes, BytesMut};
use clap::Args;
use stave_cri_proto::v1::PortForwardRequest;
use stave_streaming::spdy::{Decoder, Encoder, Frame, Headers};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;

use super::connection::{Client, plain};
use super::dial::{self, Location, Transport};
use super::output;
use super::resolve::{Known, Target};

/// Over SPDY, since the WebSocket form can't say that one side of a connection has ended.
const PROTOCOL: &str = "portforward.k8s.io";
/// Streams of a connection to the daemon: each carries one forwarded connection.
const ERROR: u32 = 1;
const DATA: u32 = 3;
/// Bytes sent at once, and of an error.
const CHUNK: usize = 32 << 10;
/// Bytes of the answer to our request.
const MAX_HEAD: usize = 16 << 10;

#[derive(Debug, Args)]
pub(crate) struct PortForwardArgs {
    /// The address to listen on
    #[arg(long, value_name = "IP", default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    bind: IpAddr,
    /// The pod, or one of its containers
    pod: String,
    /// A port of the pod, and the one to listen on where that is another; ":80" takes a free one
    #[arg(required = true, value_name = "[LOCAL:]REMOTE")]
    ports: Vec<Ports>,
}

/// `8080:80`, `80`, `:80`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ports {
    /// 0: any.
    local: u16,
    remote: u16,
}

impl FromStr for Ports {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let port = |text: &str| {
            text.parse::<u16>()
                .ok()
                .filter(|port| *port != 0)
                .ok_or_else(|| format!("{text:?} is not in 1 to 65535"))
        };
        match text.split_once(':') {
            None => port(text).map(|port| Self { local: port, remote: port }),
            Some(("", remote)) => Ok(Self { local: 0, remote: port(remote)? }),
            Some((local, remote)) => Ok(Self { local: port(local)?, remote: port(remote)? }),
        }
    }
}

pub(crate) async fn run(mut client: Client, args: PortForwardArgs) -> anyhow::Result<()> {
    let known = Known::list(&mut client).await?;
    let pod = match known.target(&args.pod)? {
        Target::Pod(pod) => pod.id.clone(),
        Target::Container(container) => container.pod_sandbox_id.clone(),
    };
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let mut tasks = JoinSet::new();
    for Ports { local, remote } in args.ports {
        let listener = TcpListener::bind((args.bind, local))
            .await
            .with_context(|| format!("listening on {}:{local}", args.bind))?;
        output::print(&format!("forwarding {} to port {remote} of the pod\n", listener.local_addr()?))?;
        tasks.spawn(listen(client.clone(), pod.clone(), listener, remote));
    }
    tokio::select! {
        Some(ended) = tasks.join_next() => ended?,
        _ = interrupt.recv() => Ok(()),
        _ = terminate.recv() => Ok(()),
    }
}

/// Forwards each connection in a task of its own, until accepting fails.
async fn listen(client: Client, pod: String, listener: TcpListener, port: u16) -> anyhow::Result<()> {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let (stream, from) = accepted.context("accept")?;
                let (client, pod) = (client.clone(), pod.clone());
                connections.spawn(async move {
                    if let Err(error) = Box::pin(forward(client, pod, stream, port)).await {
                        eprintln!("stave: connection of {from}: {error:#}");
                    }
                });
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Carries one connection, and its half-closes.
async fn forward(mut client: Client, pod: String, stream: TcpStream, port: u16) -> anyhow::Result<()> {
    let request = PortForwardRequest { pod_sandbox_id: pod, port: vec![port.into()] };
    let url = client.runtime.port_forward(request).await.map_err(plain)?.into_inner().url;
    let (mut from_daemon, mut to_daemon) = tokio::io::split(upgrade(&mut client, &url).await?);
    stream.set_nodelay(true)?;
    let (mut from_local, mut to_local) = stream.into_split();
    let sending = async {
        let mut encoder = Encoder::default();
        let mut out = BytesMut::new();
        let port = port.to_string();
        let headers =
            |kind| Headers::from([("streamtype", kind), ("port", port.as_str()), ("requestid", "0")]);
        for frame in [
            Frame::SynStream { id: ERROR, fin: false, headers: headers("error") },
            Frame::Data { id: ERROR, fin: true, bytes: Bytes::new() },
            Frame::SynStream { id: DATA, fin: false, headers: headers("data") },
        ] {
            encoder.encode(&frame, &mut out)?;
        }
        let mut chunk = vec![0; CHUNK];
        loop {
            to_daemon.write_all(&out).await?;
            // TLS would hold it back.
            to_daemon.flush().await?;
            out.clear();
            // One that breaks ends the daemon's with it.
            let count = from_local.read(&mut chunk).await?;
            let bytes = Bytes::copy_from_slice(chunk.get(..count).unwrap_or_default());
            encoder.encode(&Frame::Data { id: DATA, fin: count == 0, bytes }, &mut out)?;
            if count == 0 {
                to_daemon.write_all(&out).await?;
                to_daemon.flush().await?;
                return anyhow::Ok(());
            }
        }
    };
    let receiving = async {
        let mut decoder = Decoder::default();
        let mut buffer = BytesMut::new();
        let mut failure = BytesMut::new();
        loop {
            while let Some(frame) = decoder.decode(&mut buffer)? {
                match frame {
                    Frame::Data { id: ERROR, fin, bytes } => {
                        if failure.len() + bytes.len() <= CHUNK {
                            failure.extend_from_slice(&bytes);
                        }
                        if fin && !failure.is_empty() {
                            bail!("{}", String::from_utf8_lossy(&failure));
                        }
                    }
                    Frame::Data { id: DATA, fin, bytes } => {
                        to_local.write_all(&bytes).await?;
                        if fin {
                            return Ok(to_local.shutdown().await?);
                        }
                    }
                    Frame::Reset { .. } if !failure.is_empty() => {
                        bail!("{}", String::from_utf8_lossy(&failure));
                    }
                    Frame::Reset { id: DATA, .. } => bail!("the pod's side broke the connection"),
                    Frame::GoAway { .. } => bail!("the daemon ended the connection"),
                    _ => {}
                }
            }
            if from_daemon.read_buf(&mut buffer).await? == 0 {
                bail!("the daemon ended the connection");
            }
        }
    };
    tokio::try_join!(sending, receiving).map(|_| ())
}

/// Turns a connection to a URL of the streaming server into one that speaks SPDY.
async fn upgrade(client: &mut Client, url: &str) -> anyhow::Result<Box<dyn Transport>> {
    let location = Location::of(url)?;
    let mut stream = dial::dial(client, &location).await?;
    let Location { authority, path, .. } = location;
    let context = || format!("the daemon's streaming server {authority}");
    let request = format!(
        "POST {path} HTTP/1.1\r\nHost: {authority}\r\nContent-Length: 0\r\nConnection: Upgrade\r\n\
         Upgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: {PROTOCOL}\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.with_context(context)?;
    stream.flush().await.with_context(context)?;
    // Nothing comes after the head before our first frame.
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() >= MAX_HEAD || stream.read_buf(&mut head).await.with_context(context)? == 0 {
            bail!("{}: {:?}", context(), String::from_utf8_lossy(&head));
        }
    }
    if !head.starts_with(b"HTTP/1.1 101 ") {
        let line = head.split(|&byte| byte == b'\r').next().unwrap_or_default();
        bail!("{}: {}", context(), String::from_utf8_lossy(line));
    }
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_as_kubectl_reads_them() {
        assert_eq!("80".parse(), Ok(Ports { local: 80, remote: 80 }));
        assert_eq!("8080:80".parse(), Ok(Ports { local: 8080, remote: 80 }));
        assert_eq!(":80".parse(), Ok(Ports { local: 0, remote: 80 }));
        for bad in ["", ":", "0", "80:", "x:80", "80:65536", "0:80", "1:2:3", "-1"] {
            assert!(bad.parse::<Ports>().is_err(), "{bad:?}");
        }
    }
}

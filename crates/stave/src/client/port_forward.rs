//! `stave port-forward`

use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use futures::{SinkExt as _, StreamExt as _};
use stave_cri_proto::v1::PortForwardRequest;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio_tungstenite::tungstenite::Message;

use super::connection::{Client, plain};
use super::output;
use super::resolve::{Known, Target};
use super::streams;

/// One port a connection: data on channel 0, errors on channel 1.
const PROTOCOL: &str = "v4.channel.k8s.io";
const DATA: u8 = 0;
const ERROR: u8 = 1;
/// Bytes sent at once.
const CHUNK: usize = 32 << 10;
/// The protocol can't say that our side has ended: so long may the other be silent then.
const SILENCE: Duration = Duration::from_secs(5);

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
    let (mut interrupt, mut terminate) =
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
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

async fn forward(mut client: Client, pod: String, stream: TcpStream, port: u16) -> anyhow::Result<()> {
    let request = PortForwardRequest { pod_sandbox_id: pod, port: vec![port.into()] };
    let url = client.runtime.port_forward(request).await.map_err(plain)?.into_inner().url;
    let (mut sink, mut source) = streams::connect(&url, PROTOCOL).await?.split();
    stream.set_nodelay(true)?;
    let (mut from, mut to) = stream.into_split();
    let (ended, end) = tokio::sync::oneshot::channel();
    let sending = async {
        let mut chunk = vec![0; CHUNK];
        // An error of the connection ends it as well.
        while let Ok(count @ 1..) = from.read(&mut chunk).await {
            let mut payload = vec![DATA];
            payload.extend_from_slice(chunk.get(..count).unwrap_or_default());
            sink.send(Message::binary(payload)).await?;
        }
        let _ = ended.send(());
        std::future::pending::<anyhow::Result<()>>().await
    };
    let receiving = async {
        let mut announced = [false; 2];
        let mut failure = Vec::new();
        let (mut end, mut closing) = (std::pin::pin!(end), false);
        loop {
            let message = tokio::select! {
                message = source.next() => message,
                _ = &mut end, if !closing => {
                    closing = true;
                    continue;
                }
                () = tokio::time::sleep(SILENCE), if closing => return Ok(()),
            };
            let bytes = match message {
                Some(Ok(Message::Binary(bytes))) => bytes,
                Some(Ok(_)) => continue,
                Some(Err(_)) | None if failure.is_empty() => return Ok(to.shutdown().await?),
                Some(Err(_)) | None => bail!("{}", String::from_utf8_lossy(&failure)),
            };
            let Some((channel @ (&DATA | &ERROR), bytes)) = bytes.split_first() else { continue };
            // The first message of each is the port.
            if let Some(announced) = announced.get_mut(usize::from(*channel))
                && !std::mem::replace(announced, true)
            {
                continue;
            }
            match *channel {
                DATA => to.write_all(bytes).await?,
                _ if failure.len() + bytes.len() <= CHUNK => failure.extend_from_slice(bytes),
                _ => {}
            }
        }
    };
    tokio::select! {
        result = sending => result,
        result = receiving => result,
    }
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

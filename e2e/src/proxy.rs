use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt, copy};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// What a [`Proxy`] does to the answers of the server behind it. Offsets are in bytes of a connection's answers.
#[derive(Debug, Clone, Copy)]
pub enum Fault {
    /// Closes the connection after so many bytes.
    CutAfter(u64),
    /// Passes so many bytes in all; then each connection is closed at once.
    EndAfter(u64),
    /// Inverts the bits of the byte at this offset.
    CorruptAt(u64),
    /// Nothing: the answers come as they are.
    None,
}

/// A TCP proxy that breaks what passes through it.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    task: JoinHandle<()>,
    connections: Arc<AtomicU64>,
}

impl Proxy {
    /// Listens on a free loopback port, in front of `server`.
    pub async fn start(server: SocketAddr, fault: Fault) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port on loopback");
        let address = listener.local_addr().expect("address of the proxy");
        let connections = Arc::new(AtomicU64::new(0));
        let counter = connections.clone();
        let passed = Arc::new(AtomicU64::new(0));
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                counter.fetch_add(1, Ordering::Relaxed);
                let passed = passed.clone();
                tokio::spawn(async move {
                    if let Ok(server) = TcpStream::connect(server).await {
                        pass(client, server, fault, &passed).await;
                    }
                });
            }
        });
        Proxy { address, task, connections }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How many connections it had.
    pub fn connections(&self) -> u64 {
        self.connections.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn pass(client: TcpStream, server: TcpStream, fault: Fault, passed: &AtomicU64) {
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let requests = tokio::spawn(async move {
        let _ = copy(&mut from_client, &mut to_server).await;
    });
    let mut buffer = vec![0; 64 << 10];
    let mut offset = 0u64;
    while let Ok(count @ 1..) = from_server.read(&mut buffer).await {
        let mut chunk = &mut buffer[..count];
        match fault {
            Fault::CutAfter(limit) if offset + count as u64 > limit => {
                chunk = &mut chunk[..(limit - offset) as usize];
            }
            Fault::EndAfter(limit) => {
                let before = passed.fetch_add(count as u64, Ordering::Relaxed);
                chunk = &mut chunk[..(limit.saturating_sub(before) as usize).min(count)];
            }
            Fault::CorruptAt(at) if (offset..offset + count as u64).contains(&at) => {
                chunk[(at - offset) as usize] ^= 0xff;
            }
            _ => {}
        }
        let cut = chunk.len() < count;
        if to_client.write_all(chunk).await.is_err() || cut {
            break;
        }
        offset += count as u64;
    }
    requests.abort();
}

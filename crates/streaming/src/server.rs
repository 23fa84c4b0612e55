//! The server: hands out URLs and accepts connections.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::net::sockopt;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    select,
    sync::{OwnedSemaphorePermit, Semaphore},
    task::spawn_blocking,
    time::{interval, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, warn};

use crate::{
    ExecSession, PortForwardSession, Streams,
    http::{self, Context},
    socket::Tcp,
    status::Kind,
    tls::{Tls, TlsError, TlsFiles},
    token::{TokenError, Tokens},
};

/// Connections at a time, sessions included.
const MAX_CONNECTIONS: usize = 4096;
/// How long a client may take to send its request.
const REQUEST: Duration = Duration::from_secs(30);
/// Bytes of a request's head.
const MAX_REQUEST: usize = 64 * 1024;
/// How long sessions may take to tell their clients that the server stops.
const STOP: Duration = Duration::from_secs(5);

/// Where to listen, and for how long to wait.
#[derive(Clone, Debug)]
pub struct Config {
    /// Nothing but the token authenticates a client: without TLS this should be a loopback address.
    pub address: IpAddr,
    /// 0 takes a free one.
    pub port: u16,
    /// With these files the server speaks TLS, and nothing else.
    pub tls: Option<TlsFiles>,
    /// All that is bounded in time.
    pub timeouts: Timeouts,
}

impl Config {
    /// Without TLS, with the usual timeouts.
    pub fn new(address: IpAddr, port: u16) -> Self {
        Self { address, port, tls: None, timeouts: Timeouts::default() }
    }
}

/// How long the server waits.
#[derive(Clone, Debug)]
pub struct Timeouts {
    /// For the client of a URL: 1 minute.
    pub token: Duration,
    /// For the streams of a request: 30 seconds.
    pub setup: Duration,
    /// For anything to pass on a connection: 4 hours.
    pub idle: Duration,
    /// For somebody in the pod to read on, when more than the backlog waits for that and other connections of the same
    /// port-forward wait behind it: 10 seconds.
    pub stalled: Duration,
    /// For output that children of an ended process hold open: 2 seconds.
    pub drain: Duration,
    /// For the client to take what is left and to close, after the end of its session: 15 minutes.
    pub close: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            token: Duration::from_secs(60),
            setup: Duration::from_secs(30),
            idle: Duration::from_secs(4 * 60 * 60),
            stalled: Duration::from_secs(10),
            drain: Duration::from_secs(2),
            close: Duration::from_secs(15 * 60),
        }
    }
}

/// The server can't start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It can't listen.
    #[error("streaming server: listening on {address}: {source}")]
    Listen {
        /// Where it should.
        address: SocketAddr,
        /// Why it can't.
        #[source]
        source: io::Error,
    },
    /// Its certificate can't be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// What waits for its client.
pub(crate) enum Session {
    Command { kind: Kind, session: Box<dyn ExecSession>, streams: Streams },
    PortForward { session: Arc<dyn PortForwardSession>, ports: Vec<u16> },
}

/// The streaming server.
pub struct Server {
    listener: TcpListener,
    base_url: String,
    tls: Option<Arc<Tls>>,
    tokens: Tokens<Session>,
    timeouts: Timeouts,
}

impl Server {
    /// Starts to listen. Clients are served by [`Server::serve`].
    pub async fn bind(config: Config) -> Result<Self, Error> {
        let address = SocketAddr::new(config.address, config.port);
        let error = |source| Error::Listen { address, source };
        let tls = config.tls.map(Tls::load).transpose()?.map(Arc::new);
        let listener = TcpListener::bind(address).await.map_err(error)?;
        let scheme = if tls.is_some() { "https" } else { "http" };
        let base_url = format!("{scheme}://{}", listener.local_addr().map_err(error)?);
        let tokens = Tokens::new(config.timeouts.token);
        Ok(Self { listener, base_url, tls, tokens, timeouts: config.timeouts })
    }

    /// `http://ADDRESS:PORT`, with TLS `https://ADDRESS:PORT`.
    pub fn base_url(&self) -> &str {
        &self.base_url
    }

    /// With TLS: the server's own certificate in PEM, for clients that know no authority which signed it. `None` without.
    pub async fn certificate(&self) -> Option<String> {
        let tls = self.tls.clone()?;
        // It may read files.
        spawn_blocking(move || tls.certificate()).await.ok()
    }

    /// A URL where the client may run `session` once, within the token's life.
    pub fn exec(&self, session: Box<dyn ExecSession>, streams: Streams) -> Result<String, TokenError> {
        self.url("exec", Session::Command { kind: Kind::Exec, session, streams })
    }

    /// As [`Server::exec`], for an attachment: its exit code isn't told to the client.
    pub fn attach(&self, session: Box<dyn ExecSession>, streams: Streams) -> Result<String, TokenError> {
        self.url("attach", Session::Command { kind: Kind::Attach, session, streams })
    }

    /// A URL for port-forward. `ports` is the CRI request's list, which counts for WebSocket clients alone; SPDY clients
    /// name a port per connection.
    pub fn port_forward(
        &self,
        session: Arc<dyn PortForwardSession>,
        ports: Vec<u16>,
    ) -> Result<String, TokenError> {
        self.url("portforward", Session::PortForward { session, ports })
    }

    fn url(&self, verb: &str, session: Session) -> Result<String, TokenError> {
        let token = self.tokens.insert(session)?;
        Ok(format!("{}/{verb}/{token}", self.base_url))
    }

    /// Serves until `shutdown`. Then the clients of running sessions are told that the runtime stops, the sessions are
    /// killed, and this returns within a few seconds.
    pub async fn serve(self: Arc<Self>, shutdown: impl Future<Output = ()> + Send) {
        let stopping = CancellationToken::new();
        let tasks = TaskTracker::new();
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut expire = interval(self.timeouts.token.max(Duration::from_secs(1)));
        tokio::pin!(shutdown);
        loop {
            let accept = async {
                let slot = slots.clone().acquire_owned().await;
                (slot, self.listener.accept().await)
            };
            select! {
                () = &mut shutdown => break,
                _ = expire.tick() => self.tokens.expire(),
                (Ok(slot), accepted) = accept => match accepted {
                    Ok((stream, _)) => {
                        let server = self.clone();
                        let context = Context {
                            timeouts: self.timeouts.clone(),
                            stopping: stopping.clone(),
                            tasks: tasks.clone(),
                            slot: Arc::new(slot),
                        };
                        tasks.spawn(async move { server.connection(stream, context).await });
                    }
                    Err(error) => {
                        // Most likely no file descriptors; some will be freed.
                        warn!(%error, "streaming server: accept");
                        sleep(Duration::from_millis(100)).await;
                    }
                },
            }
        }
        stopping.cancel();
        tasks.close();
        if timeout(STOP, tasks.wait()).await.is_err() {
            warn!(sessions = tasks.len(), "streaming sessions didn't end in time");
        }
    }

    async fn connection(self: Arc<Self>, stream: TcpStream, context: Context) {
        // Both are best effort: a keystroke shall not wait for its predecessor's acknowledgement, and a peer that
        // has died without a word is found out.
        let _ = stream.set_nodelay(true);
        let _ = sockopt::set_socket_keepalive(&stream, true);
        let Some(tls) = self.tls.clone() else {
            return self.http(stream, context).await;
        };
        let handshake = timeout(REQUEST, async {
            // It may read files.
            let acceptor = spawn_blocking(move || tls.acceptor()).await.map_err(io::Error::other)?;
            acceptor.accept(Tcp::new(stream)).await
        });
        let accepted = select! {
            accepted = handshake => accepted,
            () = context.stopping.cancelled() => return,
        };
        match accepted {
            Ok(Ok(stream)) => self.http(stream, context).await,
            Ok(Err(error)) => debug!(%error, "streaming server: TLS"),
            Err(_) => debug!("streaming server: no TLS handshake in time"),
        }
    }

    async fn http<S>(self: Arc<Self>, stream: S, context: Context)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let stopping = context.stopping.clone();
        let service = service_fn(|request| {
            let answer = http::answer(request, &self.tokens, &context);
            async move { Ok::<_, std::convert::Infallible>(answer) }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(REQUEST)
            .max_buf_size(MAX_REQUEST)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        select! {
            result = connection => if let Err(error) = result {
                debug!(%error, "streaming server: HTTP");
            },
            () = stopping.cancelled() => {}
        }
    }
}

/// A connection's place among [`MAX_CONNECTIONS`].
pub(crate) type Slot = Arc<OwnedSemaphorePermit>;

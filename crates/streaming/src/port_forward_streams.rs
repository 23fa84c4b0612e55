//! Port-forward over SPDY: each connection of the client is a pair of streams, `error` and `data`, with the same
//! request id.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use tokio::{
    select,
    task::JoinSet,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    PortForwardSession, SessionError, Timeouts,
    link::{Channel, Outbound},
    port_forward::{Forward, error_text},
    spdy::{Accept, Connection, Headers, NewStream},
};

/// Connections of one client at a time.
const MAX_PAIRS: usize = 1024;
/// Streams that these take.
const MAX_STREAMS: usize = 2 * MAX_PAIRS;
/// How long connections may take to end by themselves once the client has gone.
const WIND_UP: Duration = Duration::from_secs(6);

/// Which SPDY streams are taken.
pub(crate) fn accept(timeouts: &Timeouts) -> Accept {
    Accept { limit: MAX_STREAMS, check: takes_stream, stalled: Some(timeouts.stalled) }
}

fn takes_stream(headers: &Headers) -> bool {
    matches!(headers.get("streamtype"), Some("error" | "data")) && port(headers).is_some()
}

fn port(headers: &Headers) -> Option<u16> {
    headers.get("port")?.parse().ok().filter(|port| *port != 0)
}

/// What makes two streams a pair.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
enum Key {
    Request(String),
    /// Of clients that send no request id: the error stream's id. The data stream is the next.
    Stream(u32),
}

/// A pair of which one stream is missing.
struct Half {
    first: Channel,
    is_data: bool,
    port: u16,
    expires: Instant,
}

/// The connections of one client.
pub(crate) struct PortForwards {
    session: Arc<dyn PortForwardSession>,
    setup: Duration,
    halves: HashMap<Key, Half>,
    /// In the order of expiry; pairs that are complete since are not among the halves.
    expiry: VecDeque<(Instant, Key)>,
    forwards: JoinSet<()>,
    gone: CancellationToken,
}

impl PortForwards {
    pub(crate) fn new(session: Arc<dyn PortForwardSession>, timeouts: &Timeouts) -> Self {
        Self {
            session,
            setup: timeouts.setup,
            halves: HashMap::new(),
            expiry: VecDeque::new(),
            forwards: JoinSet::new(),
            gone: CancellationToken::new(),
        }
    }

    /// Serves until the client closes, is idle for too long, or the server stops.
    pub(crate) async fn run(
        mut self,
        connection: Connection,
        timeouts: &Timeouts,
        stopping: CancellationToken,
    ) {
        let Connection { mut streams, link } = connection;
        loop {
            let next_expiry = self.expiry.front().map(|(at, _)| *at);
            select! {
                Some(stream) = streams.recv() => self.add(stream).await,
                Some(_) = self.forwards.join_next() => {}
                () = sleep_until(next_expiry.unwrap_or_else(Instant::now)), if next_expiry.is_some() => {
                    self.expire().await;
                }
                () = link.gone() => break,
                () = link.idle(timeouts.idle) => return link.finish(Duration::ZERO).await,
                () = stopping.cancelled() => return link.finish(Duration::ZERO).await,
            }
        }
        self.gone.cancel();
        let _ = timeout(WIND_UP, async { while self.forwards.join_next().await.is_some() {} }).await;
    }

    async fn add(&mut self, stream: NewStream) {
        let NewStream { id, headers, channel } = stream;
        let is_data = headers.get("streamtype") == Some("data");
        let Some(port) = port(&headers) else { return };
        let key = match headers.get("requestid") {
            Some(request) => Key::Request(request.to_owned()),
            None if is_data => Key::Stream(id.saturating_sub(2)),
            None => Key::Stream(id),
        };
        match self.halves.remove(&key) {
            None => {
                let expires = Instant::now() + self.setup;
                self.expiry.push_back((expires, key.clone()));
                self.halves.insert(key, Half { first: channel, is_data, port, expires });
            }
            Some(half) if half.is_data == is_data => {
                let error = SessionError::new("two streams of one type in a request");
                for channel in [half.first, channel] {
                    self.refuse(port, !is_data, channel.outbound, &error).await;
                }
            }
            Some(half) => {
                let (data, error) = if is_data { (channel, half.first) } else { (half.first, channel) };
                let forward = Forward {
                    session: self.session.clone(),
                    port: if is_data { port } else { half.port },
                    data,
                    error: error.outbound,
                    gone: self.gone.clone(),
                };
                self.forwards.spawn(forward.run());
            }
        }
    }

    /// Drops the pairs that weren't completed in time.
    async fn expire(&mut self) {
        let now = Instant::now();
        while let Some((expires, key)) = self.expiry.pop_front_if(|(at, _)| *at <= now) {
            if self.halves.get(&key).is_none_or(|half| half.expires != expires) {
                continue;
            }
            if let Some(half) = self.halves.remove(&key) {
                let missing = if half.is_data { "error" } else { "data" };
                let error = SessionError::new(format!("the request's {missing} stream has not come"));
                self.refuse(half.port, !half.is_data, half.first.outbound, &error).await;
            }
        }
    }

    async fn refuse(&self, port: u16, is_error: bool, stream: Outbound, error: &SessionError) {
        if is_error {
            let _ = stream.write(error_text(self.session.as_ref(), port, error)).await;
        }
        let _ = stream.reset().await;
    }
}

//! The HTTP requests that become sessions.

use std::sync::Arc;

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    HeaderMap, Method, Request, Response, StatusCode,
    body::Incoming,
    header::{
        ALLOW, CONNECTION, HeaderName, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY,
        SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION, UPGRADE,
    },
};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::debug;

use crate::{
    ExecSession, PortForwardSession, Streams, Timeouts,
    negotiate::{
        ACCEPTED_VERSIONS, Choice, Encoding, PORT_FORWARD, PROTOCOL_VERSION, PortForwardForm, SPDY,
        SPDY_COMMANDS, Version, WEBSOCKET_COMMANDS, WEBSOCKET_PORT_FORWARDS, is_spdy, is_websocket,
        spdy_version, subprotocol,
    },
    port_forward_channels::{self, MAX_PORTS},
    port_forward_streams::{self, PortForwards},
    remote_command::{self, Command},
    remote_command_channels,
    server::{Session, Slot},
    socket::Socket,
    spdy,
    status::Kind,
    token::Tokens,
    tunnel::Tunnel,
    websocket,
};

type Answer = Response<Full<Bytes>>;
type Refusal = Box<Answer>;

/// What a connection's sessions need of the server.
#[derive(Clone)]
pub(crate) struct Context {
    pub(crate) timeouts: Timeouts,
    pub(crate) stopping: CancellationToken,
    pub(crate) tasks: TaskTracker,
    pub(crate) slot: Slot,
}

/// Answers a request; with an upgrade, the session starts. A token is used up even by a request that fails.
pub(crate) fn answer(request: Request<Incoming>, tokens: &Tokens<Session>, context: &Context) -> Answer {
    match route(request, tokens, context) {
        Ok(answer) => answer,
        Err(refusal) => *refusal,
    }
}

fn route(request: Request<Incoming>, tokens: &Tokens<Session>, context: &Context) -> Result<Answer, Refusal> {
    let not_found = || refuse(StatusCode::NOT_FOUND, "404 page not found\n");
    let path = request.uri().path().strip_prefix('/').ok_or_else(not_found)?;
    let (verb, token) = path.split_once('/').ok_or_else(not_found)?;
    if !["exec", "attach", "portforward"].contains(&verb) || token.is_empty() || token.contains('/') {
        return Err(not_found());
    }
    if ![Method::GET, Method::POST].contains(request.method()) {
        let mut answer = refuse(StatusCode::METHOD_NOT_ALLOWED, "405: method not allowed\n");
        answer.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, POST"));
        return Err(answer);
    }
    let session = tokens.take(token).ok_or_else(not_found)?;
    match (verb, session) {
        ("exec", Session::Command { kind: kind @ Kind::Exec, session, streams })
        | ("attach", Session::Command { kind: kind @ Kind::Attach, session, streams }) => {
            command(request, kind, session, streams, context)
        }
        ("portforward", Session::PortForward { session, ports }) => {
            port_forward(request, session, ports, context)
        }
        _ => Err(not_found()),
    }
}

fn port_forward(
    request: Request<Incoming>,
    session: Arc<dyn PortForwardSession>,
    ports: Vec<u16>,
    context: &Context,
) -> Result<Answer, Refusal> {
    let Context { timeouts, stopping, .. } = context.clone();
    if !is_websocket(request.headers()) {
        negotiate_spdy(request.headers(), &[(PORT_FORWARD, ())])?;
        return Ok(upgrade(request, spdy_answer(PORT_FORWARD), context, move |socket| async move {
            let (writer, hangup) = (socket.writer(), socket.hangup());
            let connection = spdy::start(socket, writer, hangup, port_forward_streams::accept(&timeouts));
            PortForwards::new(session, &timeouts).run(connection, &timeouts, stopping).await;
        }));
    }
    let (name, choice) =
        negotiate_websocket(&request, &WEBSOCKET_PORT_FORWARDS, PortForwardForm::Channels(Encoding::Binary))?;
    let answer = websocket_answer(&request, name.as_deref())?;
    let encoding = match choice {
        PortForwardForm::Channels(encoding) => encoding,
        PortForwardForm::Tunnel => {
            return Ok(upgrade(request, answer, context, move |socket| async move {
                let hangup = socket.hangup();
                let (reader, writer) = tokio::io::split(Tunnel::new(websocket::accept(socket).await));
                let connection = spdy::start(reader, writer, hangup, port_forward_streams::accept(&timeouts));
                PortForwards::new(session, &timeouts).run(connection, &timeouts, stopping).await;
            }));
        }
    };
    if ports.is_empty() || ports.len() > MAX_PORTS || ports.contains(&0) {
        return Err(refuse(StatusCode::BAD_REQUEST, "port-forward over WebSocket needs 1 to 32 ports\n"));
    }
    Ok(upgrade(request, answer, context, move |socket| {
        port_forward_channels::run(socket, encoding, session, ports, timeouts, stopping)
    }))
}

fn command(
    request: Request<Incoming>,
    kind: Kind,
    session: Box<dyn ExecSession>,
    streams: Streams,
    context: &Context,
) -> Result<Answer, Refusal> {
    let Context { timeouts, stopping, .. } = context.clone();
    if is_websocket(request.headers()) {
        let (name, (version, encoding)) =
            negotiate_websocket(&request, &WEBSOCKET_COMMANDS, (Version::V1, Encoding::Binary))?;
        let answer = websocket_answer(&request, name.as_deref())?;
        return Ok(upgrade(request, answer, context, move |socket| async move {
            let Some((channels, link)) =
                remote_command_channels::open(socket, version, encoding, streams).await
            else {
                return;
            };
            Command { kind, session, channels, link, timeouts, stopping }.run().await;
        }));
    }
    let (name, version) = negotiate_spdy(request.headers(), &SPDY_COMMANDS)?;
    let answer = spdy_answer(&name);
    Ok(upgrade(request, answer, context, move |socket| async move {
        let (writer, hangup) = (socket.writer(), socket.hangup());
        let mut connection = spdy::start(socket, writer, hangup, remote_command::ACCEPT);
        let collected = timeout(timeouts.setup, async {
            tokio::select! {
                channels = remote_command::collect_streams(&mut connection, streams, version) => channels,
                () = stopping.cancelled() => None,
            }
        });
        match collected.await {
            Ok(Some(channels)) => {
                let link = connection.link;
                drop(connection.streams);
                Command { kind, session, channels, link, timeouts, stopping }.run().await;
            }
            Ok(None) => debug!("the client left before its streams were there"),
            Err(_) => debug!("the client's streams didn't come in time"),
        }
    }))
}

fn negotiate_spdy<T: Copy>(headers: &HeaderMap, known: &[(&str, T)]) -> Result<(String, T), Refusal> {
    if !is_spdy(headers) {
        let text = "unable to upgrade: missing upgrade headers in request\n";
        return Err(refuse(StatusCode::BAD_REQUEST, text));
    }
    match spdy_version(headers, known) {
        Choice::Agreed(name, meaning) => Ok((name.to_owned(), meaning)),
        Choice::NoOffer => {
            Err(refuse(StatusCode::BAD_REQUEST, "unable to upgrade: X-Stream-Protocol-Version is required\n"))
        }
        Choice::NoneKnown => {
            let mut answer =
                refuse(StatusCode::FORBIDDEN, "unable to upgrade: no protocol version in common\n");
            for (name, _) in known {
                append(&mut answer, HeaderName::from_static(ACCEPTED_VERSIONS), name);
            }
            Err(answer)
        }
    }
}

fn spdy_answer(version: &str) -> Answer {
    let mut answer = switching(SPDY);
    append(&mut answer, HeaderName::from_static(PROTOCOL_VERSION), version);
    answer
}

fn negotiate_websocket<T: Copy>(
    request: &Request<Incoming>,
    known: &[(&str, T)],
    without: T,
) -> Result<(Option<String>, T), Refusal> {
    if request.method() != Method::GET {
        return Err(refuse(StatusCode::METHOD_NOT_ALLOWED, "405: WebSocket needs GET\n"));
    }
    match subprotocol(request.headers(), known) {
        Choice::Agreed(name, meaning) => Ok((Some(name.to_owned()), meaning)),
        Choice::NoOffer => Ok((None, without)),
        Choice::NoneKnown => Err(refuse(StatusCode::FORBIDDEN, "")),
    }
}

fn websocket_answer(request: &Request<Incoming>, subprotocol: Option<&str>) -> Result<Answer, Refusal> {
    let headers = request.headers();
    if headers.get(SEC_WEBSOCKET_VERSION).is_none_or(|version| version != "13") {
        let mut answer = refuse(StatusCode::BAD_REQUEST, "Sec-WebSocket-Version must be 13\n");
        append(&mut answer, SEC_WEBSOCKET_VERSION, "13");
        return Err(answer);
    }
    let Some(key) = headers.get(SEC_WEBSOCKET_KEY) else {
        return Err(refuse(StatusCode::BAD_REQUEST, "Sec-WebSocket-Key is required\n"));
    };
    let mut answer = switching("websocket");
    append(&mut answer, SEC_WEBSOCKET_ACCEPT, &derive_accept_key(key.as_bytes()));
    if let Some(subprotocol) = subprotocol {
        append(&mut answer, SEC_WEBSOCKET_PROTOCOL, subprotocol);
    }
    Ok(answer)
}

/// Runs `session` on the connection once the answer is sent.
fn upgrade<S, F>(request: Request<Incoming>, answer: Answer, context: &Context, session: S) -> Answer
where
    S: FnOnce(Socket) -> F + Send + 'static,
    F: Future<Output = ()> + Send,
{
    let upgraded = hyper::upgrade::on(request);
    let slot = context.slot.clone();
    context.tasks.spawn(async move {
        let _slot = slot;
        match upgraded.await.map_err(std::io::Error::other).and_then(Socket::from_upgraded) {
            Ok(socket) => session(socket).await,
            Err(error) => debug!(%error, "streaming server: upgrade"),
        }
    });
    answer
}

fn switching(protocol: &'static str) -> Answer {
    let mut answer = *refuse(StatusCode::SWITCHING_PROTOCOLS, "");
    append(&mut answer, CONNECTION, "Upgrade");
    append(&mut answer, UPGRADE, protocol);
    answer
}

fn refuse(status: StatusCode, text: &'static str) -> Refusal {
    let mut answer = Response::new(Full::new(Bytes::from_static(text.as_bytes())));
    *answer.status_mut() = status;
    Box::new(answer)
}

fn append(answer: &mut Answer, name: HeaderName, value: &str) {
    // The values are ours, or names from our own tables.
    if let Ok(value) = HeaderValue::from_str(value) {
        answer.headers_mut().append(name, value);
    }
}

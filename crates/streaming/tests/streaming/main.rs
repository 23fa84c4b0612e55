//! The whole server, against real processes and TCP servers: over SPDY with a small client, over WebSocket with
//! tungstenite, and with Kubernetes' own client library.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod backend;
mod client;
mod exec_spdy;
mod exec_websocket;
mod flow_control;
mod go;
mod hostile;
mod http;
mod port_forward;
mod port_forward_websocket;
mod send_windows;
mod tls;

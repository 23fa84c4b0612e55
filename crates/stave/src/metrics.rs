//! The metrics for Prometheus: text over HTTP, on an address of its own.
//!
//! No library: the figures live in records and supervisors and are asked for when somebody scrapes, so there is no
//! registry to keep, and the format is a few lines.

use std::convert::Infallible;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CONTENT_TYPE};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use stave_pods::{Metrics, Pods};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

/// Connections at a time; more wait.
const CONNECTIONS: usize = 16;
/// For the head of a request, and between requests.
const HEAD: Duration = Duration::from_secs(10);
/// A connection's life: a scraper that keeps it makes a new one then.
const LIFE: Duration = Duration::from_secs(600);
/// The text format of Prometheus.
const FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Serves `/metrics` on `address` until it is dropped.
pub(crate) async fn serve(address: SocketAddr, pods: Pods) -> anyhow::Result<()> {
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("metrics.address: listening on {address}"))?;
    tracing::info!(address = %listener.local_addr()?, "serving metrics");
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    tokio::spawn(async move {
        loop {
            let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
            let (stream, _) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "accepting a connection for metrics");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let pods = pods.clone();
            tokio::spawn(async move {
                let answer = hyper::service::service_fn(move |request| answer(request, pods.clone()));
                let connection = hyper::server::conn::http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEAD)
                    .max_buf_size(16 << 10)
                    .serve_connection(TokioIo::new(stream), answer);
                let _ = tokio::time::timeout(LIFE, connection).await;
                drop(slot);
            });
        }
    });
    Ok(())
}

async fn answer(request: Request<Incoming>, pods: Pods) -> Result<Response<Full<Bytes>>, Infallible> {
    let mut response = Response::new(Full::default());
    if request.uri().path() != "/metrics" {
        *response.status_mut() = StatusCode::NOT_FOUND;
    } else if !matches!(*request.method(), Method::GET | Method::HEAD) {
        *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
        response.headers_mut().insert(ALLOW, hyper::header::HeaderValue::from_static("GET, HEAD"));
    } else {
        response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(FORMAT));
        *response.body_mut() = Full::from(text(&pods.metrics().await));
    }
    Ok(response)
}

/// A figure of a container.
type Value = fn(&stave_pods::Drops) -> u64;

fn text(metrics: &Metrics) -> String {
    let mut text = Text(String::new());
    text.family("stave_build_info", "gauge", "1; the version is a label.");
    text.sample("stave_build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1);

    text.family("stave_pods", "gauge", "Pods by state.");
    text.sample("stave_pods", &[("state", "ready")], metrics.pods_ready);
    text.sample("stave_pods", &[("state", "notready")], metrics.pods_not_ready);

    text.family("stave_containers", "gauge", "Containers by state.");
    text.sample("stave_containers", &[("state", "created")], metrics.containers_created);
    text.sample("stave_containers", &[("state", "running")], metrics.containers_running);
    text.sample("stave_containers", &[("state", "exited")], metrics.containers_exited);

    text.family("stave_execs_total", "counter", "Commands begun in containers since the daemon's start.");
    text.sample("stave_execs_total", &[("type", "sync")], metrics.exec_sync);
    text.sample("stave_execs_total", &[("type", "stream")], metrics.exec_stream);

    text.family("stave_attachments_total", "counter", "Attachments begun since the daemon's start.");
    text.sample("stave_attachments_total", &[], metrics.attach);

    text.family(
        "stave_port_forward_connections_total",
        "counter",
        "Connections made into pods for port-forwards since the daemon's start.",
    );
    text.sample("stave_port_forward_connections_total", &[], metrics.port_forward);

    text.family("stave_supervisors_unreachable", "gauge", "Supervisors of ready pods that did not answer.");
    text.sample("stave_supervisors_unreachable", &[], metrics.unreachable);

    let name = "stave_container_oom_kills_total";
    text.family(name, "counter", "Processes of a container that the kernel's OOM killer has ended.");
    for one in &metrics.oom_kills {
        let labels = [
            ("namespace", one.namespace.as_str()),
            ("pod", &one.pod),
            ("container", &one.container),
            ("id", &one.id),
        ];
        text.sample(name, &labels, one.kills);
    }

    let drops: [(&str, &str, Value); 3] = [
        (
            "stave_log_dropped_bytes_total",
            "Bytes of a container's output that could not be written to its log.",
            |drops| drops.log_bytes,
        ),
        (
            "stave_log_dropped_records_total",
            "Records of a container's log that could not be written.",
            |drops| drops.log_records,
        ),
        (
            "stave_attachments_dropped_total",
            "Attached clients that were dropped since they read too slowly.",
            |drops| drops.attachments,
        ),
    ];
    for (name, help, value) in drops {
        text.family(name, "counter", help);
        for drops in &metrics.drops {
            let labels = [
                ("namespace", drops.namespace.as_str()),
                ("pod", &drops.pod),
                ("container", &drops.container),
                ("id", &drops.id),
            ];
            text.sample(name, &labels, value(drops));
        }
    }
    text.0
}

/// Samples in the text format; those of a family follow it.
struct Text(String);

impl Text {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: u64) {
        self.0.push_str(name);
        for (index, (label, content)) in labels.iter().enumerate() {
            self.0.push(if index == 0 { '{' } else { ',' });
            let _ = write!(self.0, "{label}=\"");
            for character in content.chars() {
                match character {
                    '\\' => self.0.push_str("\\\\"),
                    '"' => self.0.push_str("\\\""),
                    '\n' => self.0.push_str("\\n"),
                    other => self.0.push(other),
                }
            }
            self.0.push('"');
        }
        let end = if labels.is_empty() { "" } else { "}" };
        let _ = writeln!(self.0, "{end} {value}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_pods_are_quoted() {
        let drops = stave_pods::Drops {
            namespace: "default".into(),
            pod: "a\"b\\c\nd".into(),
            container: "main".into(),
            id: "0f".into(),
            log_bytes: 17,
            log_records: 2,
            attachments: 1,
        };
        let text = text(&Metrics { exec_sync: 3, drops: vec![drops], ..Metrics::default() });
        let labels = r#"{namespace="default",pod="a\"b\\c\nd",container="main",id="0f"}"#;
        for line in [
            "# TYPE stave_log_dropped_bytes_total counter",
            &format!("stave_log_dropped_bytes_total{labels} 17"),
            &format!("stave_log_dropped_records_total{labels} 2"),
            &format!("stave_attachments_dropped_total{labels} 1"),
            "stave_execs_total{type=\"sync\"} 3",
            "stave_attachments_total 0",
        ] {
            assert!(text.lines().any(|have| have == line), "{line}\nis not in\n{text}");
        }
        assert!(text.ends_with('\n'));
    }
}

//! Port-forward: TCP connections into the pod's network namespace, made by its supervisor.

use std::net;
use std::sync::Arc;

use futures::future::BoxFuture;
use stave_streaming::{PortForwardSession, SessionError};
use stave_supervisor_proto::v1::{self as proto, packet, request};
use tokio::net::TcpStream;

use crate::error::{Code, Error, Result};
use crate::metrics::Counters;
use crate::pods::{Inner, Pods};
use crate::record::PodState;
use crate::supervisor::unexpected;

impl Pods {
    /// Connections into a pod, each made when a client asks for it.
    ///
    /// Errors: NotFound, and FailedPrecondition when the pod is not ready.
    pub fn port_forward(&self, pod_id: &str) -> Result<Arc<dyn PortForwardSession>> {
        let pod = self.0.pod(pod_id).ok_or_else(|| Error::pod_not_found(pod_id))?;
        let id = pod.with(|record| record.id.clone());
        if pod.state() != PodState::Ready {
            return Err(Error::new(
                Code::FailedPrecondition,
                format!("pod_sandbox_id {pod_id:?}: the pod is not ready"),
            ));
        }
        self.0.supervisor_of(&id)?;
        Ok(Arc::new(Session { inner: Arc::clone(&self.0), id }))
    }
}

struct Session {
    inner: Arc<Inner>,
    id: String,
}

impl Session {
    async fn dial(&self, port: u16) -> Result<TcpStream> {
        // Looked up each time: the connection to it may have been renewed.
        let supervisor = self.inner.supervisor_of(&self.id)?;
        let call = request::Call::Connect(proto::Connect { port: port.into() });
        let socket = match supervisor.call(call, &[]).await? {
            (packet::Body::Connected(_), mut fds) => fds.pop(),
            (other, _) => return Err(unexpected("Connected", &other)),
        };
        let socket =
            socket.ok_or_else(|| Error::new(Code::Internal, "connect: the supervisor sent no socket"))?;
        Counters::add(&self.inner.counters.port_forward);
        let stream = net::TcpStream::from(socket);
        let made = stream.set_nonblocking(true).and_then(|()| TcpStream::from_std(stream));
        let stream = made.map_err(|e| Error::internal("socket into the pod", e))?;
        // Best effort: a keystroke shall not wait for its predecessor's acknowledgement.
        let _ = stream.set_nodelay(true);
        Ok(stream)
    }
}

impl PortForwardSession for Session {
    fn connect(&self, port: u16) -> BoxFuture<'_, std::result::Result<TcpStream, SessionError>> {
        Box::pin(async move { self.dial(port).await.map_err(|error| SessionError::new(error.message)) })
    }

    fn pod(&self) -> String {
        self.id.clone()
    }
}

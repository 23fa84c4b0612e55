//! ExecSync, and the requests that are answered with a URL of the streaming server: Exec, Attach, PortForward.

use std::time::Duration;

use stave_cri_proto::v1 as cri;
use stave_streaming::{Streams, TokenError};
use tonic::Status;

use crate::Services;
use crate::status::{missing, pod_error};

impl Services {
    pub(crate) async fn run_exec_sync(
        &self,
        request: cri::ExecSyncRequest,
    ) -> Result<cri::ExecSyncResponse, Status> {
        let seconds = u64::try_from(request.timeout)
            .map_err(|_| Status::invalid_argument(format!("timeout {}: is negative", request.timeout)))?;
        let output = self
            .0
            .pods
            .exec_sync(&request.container_id, &request.cmd, Duration::from_secs(seconds))
            .await
            .map_err(pod_error)?;
        Ok(cri::ExecSyncResponse {
            stdout: output.stdout,
            stderr: output.stderr,
            exit_code: output.exit_code,
        })
    }

    pub(crate) fn run_exec(&self, request: &cri::ExecRequest) -> Result<cri::ExecResponse, Status> {
        let cri::ExecRequest { container_id, cmd, tty, stdin, stdout, stderr } = request;
        let streams = Streams { stdin: *stdin, stdout: *stdout, stderr: *stderr, tty: *tty };
        check(container_id, streams)?;
        let session = self.0.pods.exec(container_id, cmd, streams).map_err(pod_error)?;
        let url = self.0.streaming.exec(session, streams).map_err(token_error)?;
        Ok(cri::ExecResponse { url })
    }

    pub(crate) fn run_attach(&self, request: &cri::AttachRequest) -> Result<cri::AttachResponse, Status> {
        let cri::AttachRequest { container_id, tty, stdin, stdout, stderr } = request;
        let streams = Streams { stdin: *stdin, stdout: *stdout, stderr: *stderr, tty: *tty };
        check(container_id, streams)?;
        let session = self.0.pods.attach(container_id, streams).map_err(pod_error)?;
        let url = self.0.streaming.attach(session, streams).map_err(token_error)?;
        Ok(cri::AttachResponse { url })
    }

    pub(crate) fn run_port_forward(
        &self,
        request: &cri::PortForwardRequest,
    ) -> Result<cri::PortForwardResponse, Status> {
        if request.pod_sandbox_id.is_empty() {
            return Err(missing("pod_sandbox_id"));
        }
        let ports = ports(&request.port)?;
        let session = self.0.pods.port_forward(&request.pod_sandbox_id).map_err(pod_error)?;
        let url = self.0.streaming.port_forward(session, ports).map_err(token_error)?;
        Ok(cri::PortForwardResponse { url })
    }
}

fn check(container_id: &str, streams: Streams) -> Result<(), Status> {
    if container_id.is_empty() {
        return Err(missing("container_id"));
    }
    if streams.tty && streams.stderr {
        return Err(Status::invalid_argument("tty true, stderr true: a terminal has no stderr of its own"));
    }
    if !(streams.stdin || streams.stdout || streams.stderr) {
        return Err(Status::invalid_argument("stdin, stdout, stderr: one of them must be true"));
    }
    Ok(())
}

/// May be empty: SPDY clients name the port later, with each connection.
fn ports(requested: &[i32]) -> Result<Vec<u16>, Status> {
    let port = |port: &i32| u16::try_from(*port).ok().filter(|port| *port != 0);
    requested
        .iter()
        .map(|given| {
            port(given).ok_or_else(|| Status::invalid_argument(format!("port {given}: is not in 1 to 65535")))
        })
        .collect()
}

fn token_error(error: TokenError) -> Status {
    match error {
        TokenError::TooMany => Status::resource_exhausted(error.to_string()),
        TokenError::Random(_) => Status::internal(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_must_make_sense() {
        let streams = |stdin, stdout, stderr, tty| Streams { stdin, stdout, stderr, tty };
        for good in [
            streams(true, false, false, false),
            streams(false, true, true, false),
            streams(true, true, false, true),
        ] {
            check("c1", good).unwrap();
        }
        for (id, bad, wanted) in [
            ("", streams(true, true, true, false), "container_id"),
            ("c1", streams(true, true, true, true), "tty"),
            ("c1", streams(false, false, false, false), "stdin"),
            ("c1", streams(false, false, false, true), "stdin"),
        ] {
            let refusal = check(id, bad).unwrap_err();
            assert_eq!(refusal.code(), tonic::Code::InvalidArgument);
            assert!(refusal.message().contains(wanted), "{refusal}");
        }
    }

    #[test]
    fn ports_are_ports() {
        assert_eq!(ports(&[]).unwrap(), Vec::<u16>::new());
        assert_eq!(ports(&[1, 65535]).unwrap(), [1, 65535]);
        for bad in [0, -1, 65536, i32::MAX] {
            let refusal = ports(&[80, bad]).unwrap_err();
            assert!(refusal.message().contains(&bad.to_string()), "{refusal}");
        }
    }
}

//! ExecSync.

use std::time::Duration;

use stave_cri_proto::v1 as cri;
use tonic::Status;

use crate::Services;
use crate::status::pod_error;

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
}

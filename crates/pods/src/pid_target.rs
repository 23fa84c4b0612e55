//! Containers that join the PID namespace of another one: ephemeral containers, for debugging.

use std::sync::Arc;

use stave_cri_proto::v1 as cri;

use crate::error::{Code, Error, Result};
use crate::pod::Container;
use crate::pods::Inner;
use crate::record::ContainerState;

impl Inner {
    /// The container whose PID namespace `config` asks for; it must be of the same pod, and run.
    pub(crate) fn pid_target(
        &self,
        pod_id: &str,
        config: &cri::ContainerConfig,
    ) -> Result<Option<Arc<Container>>> {
        let options = config
            .linux
            .as_ref()
            .and_then(|linux| linux.security_context.as_ref())
            .and_then(|context| context.namespace_options.as_ref())
            .filter(|options| options.pid() == cri::NamespaceMode::Target);
        let Some(options) = options else { return Ok(None) };
        let target = self.container(&options.target_id).filter(|c| c.with(|record| record.pod_id == pod_id));
        let refused = |why: &str| {
            let field = "config.linux.security_context.namespace_options.target_id";
            Error::new(Code::FailedPrecondition, format!("{field}: value {:?}: {why}", options.target_id))
        };
        match target {
            None => Err(refused("no such container in this pod")),
            Some(target) if target.state() == ContainerState::Running => Ok(Some(target)),
            Some(_) => Err(refused("the container does not run")),
        }
    }
}

//! SELinux levels of pods, and labels of their files.

use std::path::Path;

use stave_cri_proto::v1 as cri;
use stave_spec::{Code, Relabel, SpecError};

use crate::error::{Error, Result};
use crate::files;
use crate::jobs::Stage;
use crate::pods::{Inner, blocking};

impl Inner {
    /// A level for a new pod, unlike that of every other one; empty where SELinux is off.
    ///
    /// Pods that are made at the same time may find the same level: one chance in half a million.
    pub(crate) fn new_selinux_level(&self) -> Result<String> {
        if self.settings.selinux.is_none() {
            return Ok(String::new());
        }
        let pods: Vec<_> = self.pods_read().values().cloned().collect();
        let taken: std::collections::HashSet<String> =
            pods.iter().map(|pod| pod.with(|record| record.selinux_level.clone())).collect();
        stave_lsm::selinux::new_level(|level| taken.contains(level))
            .map_err(|e| Error::internal("SELinux level", e))
    }

    /// The label of the files that a pod's containers share.
    pub(crate) fn pod_file_label(&self, config: &cri::PodSandboxConfig, level: &str) -> Option<String> {
        let policy = self.settings.selinux.as_ref()?;
        Some(stave_spec::pod_mount_label(config, stave_spec::SeLinux { policy, level }))
    }
}

/// Labels the files of the pod's directory that containers see.
pub(crate) fn label_pod_files(dir: &Path, label: &str) -> Result<()> {
    for name in [files::RESOLV_CONF, files::HOSTS, files::HOSTNAME] {
        let path = dir.join(name);
        stave_lsm::relabel(&path, label)
            .map_err(|e| Error::internal(format_args!("SELinux label of {}", path.display()), e))?;
    }
    Ok(())
}

/// Gives volumes the label that their mounts ask for.
pub(crate) async fn relabel(wanted: &[Relabel], stage: &Stage) -> Result<()> {
    if wanted.is_empty() {
        return Ok(());
    }
    stage.set("relabelling volumes");
    let wanted = wanted.to_vec();
    blocking(move || {
        wanted.iter().try_for_each(|one| {
            stave_lsm::relabel(&one.path, &one.label).map_err(|error| {
                let message = format!("can't get the SELinux label {}: {error}", one.label);
                SpecError::new(Code::FailedPrecondition, &one.field, one.path.display(), message).into()
            })
        })
    })
    .await
}

//! SELinux levels of pods, and labels of their files.

use std::collections::HashSet;
use std::path::Path;

use stave_cri_proto::v1 as cri;
use stave_lsm::selinux::Label;
use stave_spec::{Code, LiveHost, Relabel, SeLinuxLabels, SpecError};

use crate::error::{Error, Result};
use crate::files;
use crate::jobs::Stage;
use crate::pods::{Inner, blocking};

impl Inner {
    /// A level for a new pod, unlike that of every other one; empty where SELinux is off.
    ///
    /// Pods that are made at the same time may find the same level: one chance in half a million.
    pub(crate) fn new_selinux_level(&self) -> Result<String> {
        let Some(policy) = &self.settings.selinux else { return Ok(String::new()) };
        // In the kernel's order, as ours are.
        let canonical = |level: &str| {
            let label = Label { level: level.to_owned(), ..policy.file.clone() }.to_string();
            let known = stave_lsm::selinux::canonical(&label).ok().flatten()?;
            Label::parse(&known).map(|label| label.level)
        };
        let pods: Vec<_> = self.pods_read().values().cloned().collect();
        let taken: HashSet<String> = pods
            .iter()
            .flat_map(|pod| pod.with(|record| levels(&record.config, &record.selinux_level, canonical)))
            .collect();
        stave_lsm::selinux::new_level(|level| taken.contains(level))
            .map_err(|e| Error::internal("SELinux level", e))
    }

    /// The labels of what a pod's containers share; none where SELinux is off.
    pub(crate) fn pod_labels(
        &self,
        config: &cri::PodSandboxConfig,
        level: &str,
    ) -> Result<Option<SeLinuxLabels>> {
        let Some(policy) = &self.settings.selinux else { return Ok(None) };
        let selinux = stave_spec::SeLinux { policy, level };
        Ok(Some(stave_spec::pod_labels(config, selinux, &LiveHost)?))
    }
}

/// The levels that a pod has: the one that was found for it, and the one that its request names.
fn levels(
    config: &cri::PodSandboxConfig,
    own: &str,
    canonical: impl Fn(&str) -> Option<String>,
) -> Vec<String> {
    let context = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    let asked = context.and_then(|context| context.selinux_options.as_ref()).map(|options| &options.level);
    let asked = asked.filter(|level| !level.is_empty()).and_then(|level| canonical(level));
    asked.into_iter().chain([own.to_owned()]).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_that_a_request_names_is_taken() {
        let canonical = |level: &str| Some(level.replace("c9,c3", "c3,c9"));
        let mut config = cri::PodSandboxConfig::default();
        assert_eq!(levels(&config, "s0:c1,c2", canonical), ["s0:c1,c2"]);
        let options = cri::SeLinuxOption { level: "s0:c9,c3".into(), ..Default::default() };
        let context =
            cri::LinuxSandboxSecurityContext { selinux_options: Some(options), ..Default::default() };
        config.linux =
            Some(cri::LinuxPodSandboxConfig { security_context: Some(context), ..Default::default() });
        assert_eq!(levels(&config, "s0:c1,c2", canonical), ["s0:c3,c9", "s0:c1,c2"]);
    }
}

//! From what a person types to a container or a pod.

use anyhow::{anyhow, bail};
use stave_cri_proto::v1::{Container, ListContainersRequest, ListPodSandboxRequest, PodSandbox};

use super::connection::{Client, plain};
use super::humanise::short_id;
use super::table::printable;

/// All pods and containers of the daemon at one moment.
#[derive(Debug, Default)]
pub(crate) struct Known {
    pub(crate) pods: Vec<PodSandbox>,
    pub(crate) containers: Vec<Container>,
}

/// What a name stands for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Target<'a> {
    Container(&'a Container),
    Pod(&'a PodSandbox),
}

impl<'a> Target<'a> {
    fn describe(&self, known: &Known) -> String {
        match self {
            Self::Container(container) => format!(
                "container {}/{} ({})",
                known.pod_name(&container.pod_sandbox_id),
                container_name(container),
                short_id(&container.id)
            ),
            Self::Pod(pod) => format!("pod {} ({})", pod_name(pod), short_id(&pod.id)),
        }
    }

    fn id(&self) -> &'a str {
        match self {
            Self::Container(container) => &container.id,
            Self::Pod(pod) => &pod.id,
        }
    }
}

pub(crate) fn container_name(container: &Container) -> String {
    printable(container.metadata.as_ref().map_or("", |metadata| &metadata.name))
}

pub(crate) fn pod_name(pod: &PodSandbox) -> String {
    printable(pod.metadata.as_ref().map_or("", |metadata| &metadata.name))
}

impl Known {
    pub(crate) async fn list(client: &mut Client) -> anyhow::Result<Self> {
        let pods = client.runtime.list_pod_sandbox(ListPodSandboxRequest::default()).await.map_err(plain)?;
        let containers =
            client.runtime.list_containers(ListContainersRequest::default()).await.map_err(plain)?;
        Ok(Self { pods: pods.into_inner().items, containers: containers.into_inner().containers })
    }

    /// The name of the pod with this id; the short id where there is no such pod.
    pub(crate) fn pod_name(&self, id: &str) -> String {
        self.pods.iter().find(|pod| pod.id == id).map_or_else(|| printable(short_id(id)), pod_name)
    }

    pub(crate) fn containers_of(&self, pod_id: &str) -> Vec<&Container> {
        self.containers.iter().filter(|container| container.pod_sandbox_id == pod_id).collect()
    }

    /// A container; the name of a pod stands for its container where it has exactly one.
    pub(crate) fn container(&self, given: &str) -> anyhow::Result<&Container> {
        let containers = self.matches(given, |target| matches!(target, Target::Container(_)))?;
        match containers.as_slice() {
            [Target::Container(container)] => return Ok(container),
            [] => {}
            many => return Err(self.ambiguous(given, many)),
        }
        match self.matches(given, |target| matches!(target, Target::Pod(_)))?.as_slice() {
            [Target::Pod(pod)] => match self.containers_of(&pod.id).as_slice() {
                [container] => Ok(container),
                [] => bail!("pod {} has no container", pod_name(pod)),
                many => {
                    let names: Vec<String> = many
                        .iter()
                        .map(|container| format!("{}/{}", pod_name(pod), container_name(container)))
                        .collect();
                    bail!(
                        "pod {} has {} containers: name one of {}",
                        pod_name(pod),
                        many.len(),
                        names.join(", ")
                    )
                }
            },
            [] => bail!("no container {given:?}: `stave ps -a` lists all"),
            many => Err(self.ambiguous(given, many)),
        }
    }

    /// A container or a pod. A pod wins over its only container of the same name, which is what
    /// `stave run` makes.
    pub(crate) fn target(&self, given: &str) -> anyhow::Result<Target<'_>> {
        let found = self.matches(given, |_| true)?;
        match found.as_slice() {
            [target] => Ok(*target),
            [] => bail!("no container or pod {given:?}: `stave ps -a` and `stave pods` list all"),
            many => {
                let pods: Vec<&PodSandbox> = many
                    .iter()
                    .filter_map(|target| if let Target::Pod(pod) = target { Some(*pod) } else { None })
                    .collect();
                match pods.as_slice() {
                    [pod]
                        if many.len() == 2
                            && matches!(self.containers_of(&pod.id).as_slice(), [only]
                                if many.contains(&Target::Container(only))) =>
                    {
                        Ok(Target::Pod(pod))
                    }
                    _ => Err(self.ambiguous(given, many)),
                }
            }
        }
    }

    /// The whole id first, then names, POD/CONTAINER, and the beginning of an id.
    fn matches(&self, given: &str, keep: impl Fn(&Target<'_>) -> bool) -> anyhow::Result<Vec<Target<'_>>> {
        if given.is_empty() {
            bail!("an empty name");
        }
        let all: Vec<Target<'_>> = self
            .pods
            .iter()
            .map(Target::Pod)
            .chain(self.containers.iter().map(Target::Container))
            .filter(keep)
            .collect();
        let by = |test: &dyn Fn(&Target<'_>) -> bool| -> Vec<Target<'_>> {
            all.iter().filter(|target| test(target)).copied().collect()
        };
        let id = by(&|target| target.id() == given);
        if !id.is_empty() {
            return Ok(id);
        }
        let name = by(&|target| match target {
            Target::Container(container) => {
                container_name(container) == given
                    || given.split_once('/').is_some_and(|(pod, name)| {
                        container_name(container) == name && self.pod_name(&container.pod_sandbox_id) == pod
                    })
            }
            Target::Pod(pod) => pod_name(pod) == given,
        });
        if !name.is_empty() {
            return Ok(name);
        }
        Ok(by(&|target| target.id().starts_with(given)))
    }

    fn ambiguous(&self, given: &str, many: &[Target<'_>]) -> anyhow::Error {
        let described: Vec<String> = many.iter().take(8).map(|target| target.describe(self)).collect();
        let more = if many.len() > 8 { ", ..." } else { "" };
        anyhow!("{given:?} may be {}{more}: use the id", described.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use stave_cri_proto::v1::{ContainerMetadata, PodSandboxMetadata};

    fn pod(id: &str, name: &str) -> PodSandbox {
        PodSandbox {
            id: id.into(),
            metadata: Some(PodSandboxMetadata { name: name.into(), ..Default::default() }),
            ..Default::default()
        }
    }

    fn container(id: &str, pod: &str, name: &str) -> Container {
        Container {
            id: id.into(),
            pod_sandbox_id: pod.into(),
            metadata: Some(ContainerMetadata { name: name.into(), ..Default::default() }),
            ..Default::default()
        }
    }

    fn known() -> Known {
        Known {
            pods: vec![pod("p1aa", "web"), pod("p1bb", "db"), pod("p2", "solo"), pod("p3", "empty")],
            containers: vec![
                container("c1aa", "p1aa", "nginx"),
                container("c1ab", "p1aa", "sidecar"),
                container("c2", "p1bb", "sidecar"),
                container("c3", "p2", "solo"),
                container("web", "p1bb", "odd"),
            ],
        }
    }

    #[test]
    fn containers_by_name_id_prefix_and_pod() {
        let known = known();
        for (given, id) in [
            ("nginx", "c1aa"),
            ("c1aa", "c1aa"),
            ("c1ab", "c1ab"),
            ("c2", "c2"),
            ("c3", "c3"),
            ("web/sidecar", "c1ab"),
            ("db/sidecar", "c2"),
            ("solo", "c3"),
            ("p2", "c3"),
            ("web", "web"),
        ] {
            assert_eq!(known.container(given).unwrap().id, id, "{given}");
        }
    }

    #[test]
    fn what_is_not_one_is_refused_and_said() {
        let known = known();
        for (given, told) in [
            ("", "empty name"),
            ("nothing", "no container \"nothing\""),
            ("sidecar", "web/sidecar"),
            ("c1", "use the id"),
            ("p1aa", "2 containers"),
            ("empty", "has no container"),
        ] {
            let error = known.container(given).unwrap_err().to_string();
            assert!(error.contains(told), "{given}: {error}");
        }
        assert!(known.target("p1").unwrap_err().to_string().contains("pod web"));
        assert!(known.target("x").is_err());
    }

    #[test]
    fn a_pod_wins_over_its_only_namesake() {
        let mut known = known();
        assert!(matches!(known.target("solo").unwrap(), Target::Pod(pod) if pod.id == "p2"));
        assert!(matches!(known.target("nginx").unwrap(), Target::Container(_)));
        assert!(matches!(known.target("p3").unwrap(), Target::Pod(_)));
        known.containers.push(container("c4", "p2", "other"));
        assert!(known.target("solo").is_err());
    }
}

//! All pods, by what a start asks for: on a node with many, it must not look at each of them.

use std::collections::HashMap;
use std::ops::Deref;
use std::sync::Arc;

use crate::pod::Pod;
use crate::record::PodRecord;

/// The pods by id, which is what it is read as. Metadata and cgroup of a pod never change.
#[derive(Default)]
pub(crate) struct PodSet {
    by_id: HashMap<String, Arc<Pod>>,
    /// Ids by [`PodRecord::key`]. Two have one key after a crash at worst.
    by_key: HashMap<String, Vec<String>>,
    /// Ids by the cgroup.
    by_cgroup: HashMap<String, Vec<String>>,
}

impl Deref for PodSet {
    type Target = HashMap<String, Arc<Pod>>;

    fn deref(&self) -> &Self::Target {
        &self.by_id
    }
}

impl PodSet {
    /// Adds a pod; one with its id must not be there.
    pub(crate) fn insert(&mut self, pod: Arc<Pod>) {
        let (id, key, cgroup) = pod.with(names);
        self.by_key.entry(key).or_default().push(id.clone());
        self.by_cgroup.entry(cgroup).or_default().push(id.clone());
        self.by_id.insert(id, pod);
    }

    /// Removes a pod, if it is there.
    pub(crate) fn remove(&mut self, id: &str) {
        let Some(pod) = self.by_id.remove(id) else { return };
        let (_, key, cgroup) = pod.with(names);
        for (index, name) in [(&mut self.by_key, key), (&mut self.by_cgroup, cgroup)] {
            if let Some(ids) = index.get_mut(&name) {
                ids.retain(|one| one != id);
                if ids.is_empty() {
                    index.remove(&name);
                }
            }
        }
    }

    /// A pod with this [`PodRecord::key`].
    pub(crate) fn with_key(&self, key: &str) -> Option<Arc<Pod>> {
        self.all(self.by_key.get(key)).next().cloned()
    }

    /// The pods whose cgroup this is.
    pub(crate) fn in_cgroup(&self, cgroup: &str) -> impl Iterator<Item = &Arc<Pod>> {
        self.all(self.by_cgroup.get(cgroup))
    }

    fn all<'a>(&'a self, ids: Option<&'a Vec<String>>) -> impl Iterator<Item = &'a Arc<Pod>> {
        ids.into_iter().flatten().filter_map(|id| self.by_id.get(id))
    }
}

fn names(record: &PodRecord) -> (String, String, String) {
    (record.id.clone(), record.key(), record.cgroup.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::PodState;
    use stave_cri_proto::v1 as cri;

    fn pod(id: &str, name: &str, cgroup: &str) -> Arc<Pod> {
        let metadata = cri::PodSandboxMetadata { name: name.to_owned(), ..Default::default() };
        Pod::new(PodRecord {
            id: id.to_owned(),
            cgroup: cgroup.to_owned(),
            config: cri::PodSandboxConfig { metadata: Some(metadata), ..Default::default() },
            runtime_handler: String::new(),
            created_at: 0,
            state: PodState::Ready,
            ips: Vec::new(),
            cgroup_is_foreign: false,
            torn_down: false,
            selinux_level: String::new(),
            overhead: None,
            resources: None,
            oci: None,
            pids_limit: None,
        })
    }

    fn ids<'a>(pods: impl Iterator<Item = &'a Arc<Pod>>) -> Vec<String> {
        pods.map(|pod| pod.with(|record| record.id.clone())).collect()
    }

    #[test]
    fn pods_are_found_by_name_and_by_cgroup() {
        let mut set = PodSet::default();
        for (id, name, cgroup) in [("1", "a", "/x"), ("2", "b", "/x"), ("3", "c", "/y")] {
            set.insert(pod(id, name, cgroup));
        }
        let key = pod("", "b", "").record().key();
        assert_eq!(ids(set.with_key(&key).iter()), ["2"]);
        assert_eq!(ids(set.in_cgroup("/x")), ["1", "2"]);
        assert_eq!(ids(set.in_cgroup("/z")), [""; 0]);
        for id in ["2", "2", "none"] {
            set.remove(id);
        }
        assert!(set.with_key(&key).is_none() && set.len() == 2);
        assert_eq!(ids(set.in_cgroup("/x")), ["1"]);
        set.remove("1");
        set.remove("3");
        assert!(set.is_empty() && set.by_key.is_empty() && set.by_cgroup.is_empty());
    }
}

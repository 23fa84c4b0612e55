use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use stave_state::Durability;

use crate::NetworkError;
use crate::ports::PortMapping;
use crate::subnet::Subnet;

/// What one pod has: a file `<pod id>.json`, there before the link and gone after it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Lease {
    pub(crate) pod_id: String,
    /// interface on the host
    pub(crate) link: String,
    pub(crate) ips: Vec<IpAddr>,
    pub(crate) ports: Vec<PortMapping>,
    /// bits per second that the pod may send
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) egress: Option<u64>,
}

#[derive(Debug, Default)]
struct State {
    leases: BTreeMap<String, Lease>,
    holders: HashMap<IpAddr, String>,
    /// the leases' interfaces
    links: HashSet<String>,
    /// pods whose host ports have their rules
    published: BTreeSet<String>,
    /// pods whose egress limit has its rule
    policed: BTreeSet<String>,
    /// per subnet, the number of the address to try next: one that was given back rests for a round
    next: Vec<u128>,
}

/// The leases of one bridge. One daemon owns the directory, so a lock in memory is what makes
/// reservations exclusive; it is held for one small write.
#[derive(Debug)]
pub(crate) struct Leases {
    dir: PathBuf,
    subnets: Vec<Subnet>,
    state: Mutex<State>,
}

impl Leases {
    /// Reads what is there. A record that can't be read is set aside and reported by `load_dir`.
    pub(crate) fn open(dir: &Path, subnets: &[Subnet]) -> Result<Self, NetworkError> {
        stave_state::private_dir(dir)?;
        let mut state = State { next: vec![0; subnets.len()], ..State::default() };
        for (stem, lease) in stave_state::load_dir::<Lease>(dir).records {
            if stem != lease.pod_id {
                tracing::warn!(
                    record = stem,
                    pod_id = lease.pod_id,
                    "network lease under another pod's name, ignored"
                );
                continue;
            }
            for ip in &lease.ips {
                if let Some(other) = state.holders.insert(*ip, stem.clone()) {
                    tracing::warn!(%ip, pod_id = stem, other, "address leased twice");
                }
                for (next, subnet) in state.next.iter_mut().zip(subnets) {
                    if let Some(n) = subnet.pod_number(*ip) {
                        *next = (*next).max(n + 1);
                    }
                }
            }
            if !lease.ports.is_empty() {
                state.published.insert(stem.clone());
            }
            state.links.insert(lease.link.clone());
            if lease.egress.is_some() {
                state.policed.insert(stem.clone());
            }
            state.leases.insert(stem, lease);
        }
        Ok(Self { dir: dir.to_path_buf(), subnets: subnets.to_vec(), state: Mutex::new(state) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn file(&self, pod_id: &str) -> PathBuf {
        self.dir.join(format!("{pod_id}.json"))
    }

    /// Leases one address of each subnet and the host ports, and stores that. Blocks on the disk.
    pub(crate) fn reserve(
        &self,
        pod_id: &str,
        link: &str,
        ports: Vec<PortMapping>,
        egress: Option<u64>,
    ) -> Result<Lease, NetworkError> {
        let mut state = self.lock();
        if state.leases.contains_key(pod_id) || state.links.contains(link) {
            return Err(NetworkError::Attached { pod_id: pod_id.to_owned() });
        }
        for port in &ports {
            let holder = state.leases.values().find(|l| l.ports.iter().any(|p| p.conflicts(port)));
            if let Some(holder) = holder {
                return Err(NetworkError::PortInUse {
                    pod_id: pod_id.to_owned(),
                    holder: holder.pod_id.clone(),
                    port: port.host_port,
                    protocol: port.protocol,
                    ip: port.host_ip,
                });
            }
        }
        let mut ips = Vec::new();
        let mut numbers = Vec::new();
        for (subnet, next) in self.subnets.iter().zip(&state.next) {
            let (n, ip) = free(subnet, *next, &state.holders)?;
            numbers.push(n);
            ips.push(ip);
        }
        let lease = Lease { pod_id: pod_id.to_owned(), link: link.to_owned(), ips, ports, egress };
        // A reboot voids it: no fsync.
        stave_state::write_json(&self.file(pod_id), &lease, Durability::Volatile)?;
        for (next, n) in state.next.iter_mut().zip(numbers) {
            *next = n + 1;
        }
        for ip in &lease.ips {
            state.holders.insert(*ip, pod_id.to_owned());
        }
        state.links.insert(lease.link.clone());
        state.leases.insert(pod_id.to_owned(), lease.clone());
        Ok(lease)
    }

    /// Stores what a pod has already, but for what another has by now. Blocks on the disk.
    pub(crate) fn restore(&self, mut lease: Lease) -> Result<Lease, NetworkError> {
        let mut state = self.lock();
        lease.ips.retain(|ip| !state.holders.contains_key(ip));
        let taken = |port: &PortMapping| {
            state.leases.values().any(|other| other.ports.iter().any(|p| p.conflicts(port)))
        };
        lease.ports.retain(|port| !taken(port));
        stave_state::write_json(&self.file(&lease.pod_id), &lease, Durability::Volatile)?;
        for ip in &lease.ips {
            state.holders.insert(*ip, lease.pod_id.clone());
        }
        state.links.insert(lease.link.clone());
        state.leases.insert(lease.pod_id.clone(), lease.clone());
        Ok(lease)
    }

    /// Gives a lease back; one that isn't there is fine. Blocks on the disk.
    pub(crate) fn release(&self, pod_id: &str) -> Result<(), NetworkError> {
        let mut state = self.lock();
        stave_state::remove(&self.file(pod_id))?;
        state.published.remove(pod_id);
        state.policed.remove(pod_id);
        if let Some(lease) = state.leases.remove(pod_id) {
            state.links.remove(&lease.link);
            for ip in &lease.ips {
                if state.holders.get(ip).is_some_and(|holder| holder == pod_id) {
                    state.holders.remove(ip);
                }
            }
        }
        Ok(())
    }

    /// Gives a pod's host ports back, and keeps its addresses; on a full disk only until the next daemon, since a record
    /// that can't be written anew has to go. Blocks on the disk.
    pub(crate) fn free_ports(&self, pod_id: &str) -> Result<(), NetworkError> {
        let mut state = self.lock();
        let Some(lease) = state.leases.get(pod_id).filter(|lease| !lease.ports.is_empty()) else {
            return Ok(());
        };
        let lease = Lease { ports: Vec::new(), ..lease.clone() };
        if let Err(error) = stave_state::write_json(&self.file(pod_id), &lease, Durability::Volatile) {
            tracing::warn!(pod_id, %error, "the lease of a pod that ends is no longer recorded");
            stave_state::remove(&self.file(pod_id))?;
        }
        state.published.remove(pod_id);
        state.leases.insert(pod_id.to_owned(), lease);
        Ok(())
    }

    /// Notes whether a pod's host ports have their rules.
    pub(crate) fn set_published(&self, pod_id: &str, published: bool) {
        let mut state = self.lock();
        if published && state.leases.contains_key(pod_id) {
            state.published.insert(pod_id.to_owned());
        } else {
            state.published.remove(pod_id);
        }
    }

    /// Notes whether a pod's egress limit has its rule.
    pub(crate) fn set_policed(&self, pod_id: &str, policed: bool) {
        let mut state = self.lock();
        if policed && state.leases.contains_key(pod_id) {
            state.policed.insert(pod_id.to_owned());
        } else {
            state.policed.remove(pod_id);
        }
    }

    pub(crate) fn get(&self, pod_id: &str) -> Option<Lease> {
        self.lock().leases.get(pod_id).cloned()
    }

    /// Another pod than this one has an interface of that name.
    pub(crate) fn is_of_another(&self, link: &str, pod_id: &str) -> bool {
        self.lock().leases.values().any(|lease| lease.link == link && lease.pod_id != pod_id)
    }

    pub(crate) fn all(&self) -> Vec<Lease> {
        self.lock().leases.values().cloned().collect()
    }

    /// The leases whose host ports have, or should keep, their rules.
    pub(crate) fn published(&self) -> Vec<Lease> {
        let state = self.lock();
        state.published.iter().filter_map(|id| state.leases.get(id)).cloned().collect()
    }

    /// The leases whose egress limit has, or should keep, its rule.
    pub(crate) fn policed(&self) -> Vec<Lease> {
        let state = self.lock();
        state.policed.iter().filter_map(|id| state.leases.get(id)).cloned().collect()
    }
}

/// The first free address from `start` on, around the end.
fn free(
    subnet: &Subnet,
    start: u128,
    holders: &HashMap<IpAddr, String>,
) -> Result<(u128, IpAddr), NetworkError> {
    let size = subnet.size();
    // Among one more address than there are leases, one is free.
    let tries = size.min(holders.len() as u128 + 1);
    (0..tries)
        .map(|i| {
            let n = (start % size + i) % size;
            (n, subnet.pod_address(n))
        })
        .find(|(_, ip)| !holders.contains_key(ip))
        .ok_or_else(|| NetworkError::Exhausted { subnet: subnet.to_string(), size })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Protocol;

    fn open(dir: &Path) -> Leases {
        let subnets = ["10.1.2.0/29", "fd00::/64"].map(|s| Subnet::parse(s).unwrap());
        Leases::open(dir, &subnets).unwrap()
    }

    fn port(host_port: u16) -> PortMapping {
        PortMapping { protocol: Protocol::Tcp, container_port: 80, host_port, host_ip: None }
    }

    #[test]
    fn goes_around_and_keeps_over_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let leases = open(dir.path());
        let first = leases.reserve("a", "la", vec![], None).unwrap();
        assert_eq!(first.ips, ["10.1.2.2".parse::<IpAddr>().unwrap(), "fd00::2".parse().unwrap()]);
        leases.release("a").unwrap();
        leases.release("a").unwrap();
        assert_eq!(
            leases.reserve("b", "lb", vec![], None).unwrap().ips[0].to_string(),
            "10.1.2.3",
            "not the one just freed"
        );
        let leases = open(dir.path());
        assert_eq!(leases.get("b").unwrap().ips[0].to_string(), "10.1.2.3");
        for (pod, last) in [("c", 4), ("d", 5), ("e", 6), ("f", 2)] {
            assert_eq!(
                leases.reserve(pod, pod, vec![], None).unwrap().ips[0].to_string(),
                format!("10.1.2.{last}")
            );
        }
        let error = leases.reserve("g", "g", vec![], None).unwrap_err();
        assert!(matches!(error, NetworkError::Exhausted { .. }), "{error}");
        assert!(leases.get("g").is_none() && !dir.path().join("g.json").exists());
        leases.release("d").unwrap();
        assert_eq!(leases.reserve("g", "g", vec![], None).unwrap().ips[0].to_string(), "10.1.2.5");
    }

    #[test]
    fn what_another_has_stays_the_others() {
        let dir = tempfile::tempdir().unwrap();
        let leases = open(dir.path());
        let other = leases.reserve("a", "la", vec![port(80)], None).unwrap();
        let lost = Lease {
            pod_id: "b".into(),
            link: "lb".into(),
            ips: vec![other.ips[0], "fd00::9".parse().unwrap()],
            ports: vec![port(80), port(81)],
            egress: None,
        };
        let restored = leases.restore(lost).unwrap();
        assert_eq!(restored.ips, ["fd00::9".parse::<IpAddr>().unwrap()]);
        assert_eq!(restored.ports, [port(81)]);
        assert_eq!(open(dir.path()).get("b"), Some(restored));
        leases.release("b").unwrap();
        assert_eq!(leases.lock().holders.get(&other.ips[0]).unwrap(), "a");
    }

    #[test]
    fn one_pod_a_port_and_one_lease_a_pod() {
        let dir = tempfile::tempdir().unwrap();
        let leases = open(dir.path());
        leases.reserve("a", "la", vec![port(80)], None).unwrap();
        let error = leases.reserve("b", "lb", vec![port(81), port(80)], None).unwrap_err().to_string();
        assert!(error.contains("80/tcp") && error.contains("pod a"), "{error}");
        assert!(matches!(leases.reserve("a", "lx", vec![], None), Err(NetworkError::Attached { .. })));
        assert!(matches!(leases.reserve("x", "la", vec![], None), Err(NetworkError::Attached { .. })));
        leases.release("a").unwrap();
        let kept = leases.reserve("b", "lb", vec![port(80)], None).unwrap();
        leases.free_ports("b").unwrap();
        leases.free_ports("unknown").unwrap();
        assert_eq!(open(dir.path()).get("b").unwrap(), Lease { ports: vec![], ..kept });
        leases.reserve("c", "lc", vec![port(80)], None).unwrap();
    }

    #[test]
    fn a_bad_record_stops_nothing() {
        let dir = tempfile::tempdir().unwrap();
        open(dir.path()).reserve("a", "la", vec![], None).unwrap();
        std::fs::write(dir.path().join("bad.json"), b"{\"pod").unwrap();
        std::fs::copy(dir.path().join("a.json"), dir.path().join("other.json")).unwrap();
        let leases = open(dir.path());
        let pods: Vec<String> = leases.all().into_iter().map(|l| l.pod_id).collect();
        assert_eq!(pods, ["a"]);
    }
}

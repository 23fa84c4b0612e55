use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use serde_json::{Value, json};
use stave_state::Durability;
use tokio::sync::{Notify, Semaphore};

use crate::attachment::{Attachment, INTERFACE, Pod};
use crate::chain::Chain;
use crate::exec::{Runner, wait_for_guard};
use crate::gc::Collected;
use crate::plugin::Versions;
use crate::ready::Readiness;
use crate::{CniError, Version, netns, result};

/// So many pods are attached at once, and so many detached. More would wait for each other's locks in the plugins.
const AT_ONCE: usize = 16;
/// How long the first look at the plugins may hold up the daemon's start.
const FIRST_LOOK: Duration = Duration::from_secs(3);
/// So often DEL of a pod whose record was lost fails for lack of a network, before the pod goes without.
const LOST_TRIES: u32 = 10;

/// How the files of network namespaces begin.
const NETNS: &str = "stave-";

/// The key of the result of the plugin before, and of all in DEL and CHECK.
pub(crate) const PREVIOUS: &str = "prevResult";

/// Where things are.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The directory of network configurations; need not exist.
    pub conf_dir: PathBuf,
    /// Where plugins are looked for, in this order.
    pub bin_dirs: Vec<PathBuf>,
    /// The template that a configuration is made from when the node's ranges for pods are known.
    pub conf_template: Option<PathBuf>,
    /// Where network namespaces are bound to files, `stave-ID` a pod. `/run/netns` is where other programs of the node
    /// look, and where agents of network plugins have it mounted.
    pub netns_dir: PathBuf,
    /// How long a plugin has for one command.
    pub timeout: Duration,
    /// One record a pod; survives reboots, since what plugins keep does.
    pub records: PathBuf,
    /// What a reboot voids: the inputs of plugins that run.
    pub run: PathBuf,
    /// The record of the node's ranges for pods, as the kubelet has told them: it tells them again only when it starts itself.
    pub ranges: PathBuf,
}

/// The CNI network of one daemon.
#[derive(Debug)]
pub struct Cni {
    inner: Arc<Inner>,
    follower: tokio::task::JoinHandle<()>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) settings: Settings,
    pub(crate) runner: Runner,
    pub(crate) versions: Versions,
    pub(crate) ready: RwLock<Arc<Readiness>>,
    pub(crate) evaluating: tokio::sync::Mutex<()>,
    /// Somebody has asked, and what is known is old.
    pub(crate) asked: Notify,
    /// The follower has looked.
    pub(crate) looked: Notify,
    attachments: Mutex<BTreeMap<String, Arc<Attachment>>>,
    /// Pods whose record was lost: what they were attached with is not known. With each, how often there was no network
    /// for its DEL.
    lost: Mutex<BTreeMap<String, u32>>,
    adds: Semaphore,
    dels: Semaphore,
    /// Read: ADD or DEL is under way. Write: GC is.
    pub(crate) collecting: tokio::sync::RwLock<()>,
    pub(crate) recovered: AtomicBool,
    pub(crate) collected: Mutex<Option<Collected>>,
    cidrs: Mutex<Vec<String>>,
}

impl Drop for Cni {
    fn drop(&mut self) {
        self.follower.abort();
    }
}

impl Cni {
    /// Reads the records, looks at the configuration and the plugins, and goes on watching.
    pub async fn open(settings: Settings) -> Result<Self, CniError> {
        stave_state::private_dir(&settings.records)?;
        stave_state::private_dir(&settings.run)?;
        let (records, ranges) = (settings.records.clone(), settings.ranges.clone());
        let (loaded, cidrs) = blocking(move || {
            let cidrs = stave_state::read_json(&ranges).unwrap_or_else(|error| {
                tracing::warn!(%error, "the node's ranges for pods");
                None
            });
            Ok((stave_state::load_dir::<Attachment>(&records), cidrs.unwrap_or_default()))
        })
        .await?;
        let attachments = loaded.records.into_iter().map(|(id, record)| (id, Arc::new(record))).collect();
        let stem = |path: &Path| path.file_stem().and_then(|stem| stem.to_str()).map(str::to_owned);
        let lost = loaded.set_aside.iter().filter_map(|aside| Some((stem(&aside.path)?, 0))).collect();
        let inner = Arc::new(Inner {
            runner: Runner { bin_dirs: settings.bin_dirs.clone(), limit: settings.timeout },
            settings,
            versions: Versions::default(),
            ready: RwLock::new(Arc::new(Readiness::unknown())),
            evaluating: tokio::sync::Mutex::default(),
            asked: Notify::new(),
            looked: Notify::new(),
            attachments: Mutex::new(attachments),
            lost: Mutex::new(lost),
            adds: Semaphore::new(AT_ONCE),
            dels: Semaphore::new(AT_ONCE),
            collecting: tokio::sync::RwLock::default(),
            recovered: AtomicBool::new(false),
            collected: Mutex::default(),
            cidrs: Mutex::new(cidrs),
        });
        let follower = tokio::spawn(Arc::clone(&inner).follow());
        // It goes on after that.
        let _ = tokio::time::timeout(FIRST_LOOK, inner.looked.notified()).await;
        Ok(Self { inner, follower })
    }

    /// Whether pods can be put on the network, from memory. The error is for the node's status.
    pub fn status(&self) -> Result<(), String> {
        self.inner.status()
    }

    /// Fails when a pod could not be attached now.
    pub async fn ready(&self) -> Result<(), CniError> {
        self.inner.network().await.map(|_| ())
    }

    /// Runs the plugins' ADD. Gives the addresses of the pod, in the plugins' order. After an error DEL has been run; where
    /// that failed too, [`Self::detach`] tries again.
    pub async fn attach(&self, pod: &Pod, netns: OwnedFd) -> Result<Vec<IpAddr>, CniError> {
        let inner = &self.inner;
        let network = inner.network().await?;
        let mut attachment = Attachment::new(pod, inner.netns_path(&pod.id), (*network).clone())?;
        let cidrs = lock(&inner.cidrs).clone();
        if !cidrs.is_empty() && !attachment.capabilities.contains_key("ipRanges") {
            let ranges: Vec<_> = cidrs.iter().map(|cidr| json!([{ "subnet": cidr }])).collect();
            attachment.capabilities.insert("ipRanges".to_owned(), ranges.into());
        }
        let turn = Arc::clone(&attachment.turn);
        let _turn = turn.busy.lock().await;
        // First the record: whatever is made from here on is found again.
        inner.save(&attachment)?;
        let added = inner.add(&mut attachment, netns).await;
        if added.is_err()
            && let Err(error) = inner.del(&attachment, false).await
        {
            tracing::warn!(pod = pod.id, %error, "undoing a failed CNI ADD");
        }
        added
    }

    /// Runs the plugins' DEL and forgets the pod; one that is not attached is success. `pod` is for a pod whose record was
    /// lost. An error means that the pod is still attached, and that this wants to be repeated; it is one
    /// only where the pod was attached in whole and its network namespace is still there: without that, DEL is for what
    /// plugins keep, and no reason to keep a pod. Where the record was lost and there is no network, it is one for a
    /// number of times.
    pub async fn detach(&self, pod_id: &str, pod: Option<&Pod>) -> Result<(), CniError> {
        let inner = &self.inner;
        if let Some(turn) = inner.get(pod_id).map(|attachment| Arc::clone(&attachment.turn)) {
            turn.leaving.send_replace(true);
            let _turn = turn.busy.lock().await;
            // Another one may have done it meanwhile.
            let Some(attachment) = inner.get(pod_id) else { return Ok(()) };
            return inner.del(&attachment, true).await;
        }
        let path = inner.netns_path(pod_id);
        // One that was lost before this daemon's time shows by its namespace.
        if !lock(&inner.lost).contains_key(pod_id) && !netns::is_bound(&path) {
            return Ok(());
        }
        tracing::warn!(
            pod = pod_id,
            "the record of its CNI network was lost: DEL goes by today's configuration"
        );
        match inner.network().await {
            Ok(network) => {
                let unknown = Pod { id: pod_id.to_owned(), ..Pod::default() };
                let attachment = Attachment::new(pod.unwrap_or(&unknown), path, (*network).clone())?;
                inner.del(&attachment, true).await?;
            }
            Err(error) => {
                let tries = {
                    let mut lost = lock(&inner.lost);
                    let tries = lost.entry(pod_id.to_owned()).or_default();
                    *tries += 1;
                    *tries
                };
                if tries < LOST_TRIES {
                    return Err(error);
                }
                tracing::warn!(pod = pod_id, %error, "DEL is not run");
                blocking(move || netns::release(&path)).await?;
            }
        }
        lock(&inner.lost).remove(pod_id);
        Ok(())
    }

    /// Pods that have something here.
    pub fn attached(&self) -> Vec<String> {
        let mut ids: Vec<_> = lock(&self.inner.attachments).keys().cloned().collect();
        ids.extend(lock(&self.inner.lost).keys().cloned());
        ids
    }

    /// To be called when the pods that are gone have been detached: GC and CHECK follow in the background.
    pub fn recovered(&self) {
        self.inner.recovered.store(true, Ordering::Release);
        self.inner.asked.notify_one();
        tokio::spawn(Arc::clone(&self.inner).check_all());
    }

    /// Runs the plugins' CHECK for a pod. One that is not attached, or that [`Self::detach`] was called for, is success.
    pub async fn check(&self, pod_id: &str) -> Result<(), CniError> {
        self.inner.check(pod_id).await
    }

    /// Takes the node's ranges for pods, and keeps them over restarts: for the capability `ipRanges`, and for the template.
    pub async fn set_pod_cidrs(&self, cidrs: &[String]) -> Result<(), CniError> {
        let (path, kept) = (self.inner.settings.ranges.clone(), cidrs.to_vec());
        blocking(move || Ok(stave_state::write_json(&path, &kept, Durability::Fsync)?)).await?;
        *lock(&self.inner.cidrs) = cidrs.to_vec();
        self.inner.generate(cidrs).await
    }

    /// The configuration in use, for people and tools.
    pub fn describe(&self) -> Value {
        self.inner.readiness().describe(&self.inner.settings.bin_dirs)
    }

    /// What the plugins answered for a pod.
    pub fn result(&self, pod_id: &str) -> Option<Value> {
        self.inner.get(pod_id)?.result.clone()
    }
}

impl Inner {
    fn netns_path(&self, pod_id: &str) -> PathBuf {
        self.settings.netns_dir.join(format!("{NETNS}{pod_id}"))
    }

    fn record_path(&self, pod_id: &str) -> PathBuf {
        self.settings.records.join(format!("{pod_id}.json"))
    }

    fn guard_path(&self, pod_id: &str) -> PathBuf {
        self.settings.run.join(pod_id)
    }

    pub(crate) fn get(&self, pod_id: &str) -> Option<Arc<Attachment>> {
        lock(&self.attachments).get(pod_id).cloned()
    }

    pub(crate) fn all(&self) -> Vec<Arc<Attachment>> {
        lock(&self.attachments).values().cloned().collect()
    }

    /// Pods that may be attached, though nobody knows to which network: their record was lost.
    pub(crate) fn unrecorded(&self) -> BTreeSet<String> {
        let bound = netns::bound(&self.settings.netns_dir);
        let mut ids: BTreeSet<_> =
            bound.iter().filter_map(|name| name.strip_prefix(NETNS)).map(str::to_owned).collect();
        ids.extend(lock(&self.lost).keys().cloned());
        let attachments = lock(&self.attachments);
        ids.retain(|id| !attachments.contains_key(id));
        ids
    }

    fn save(&self, attachment: &Attachment) -> Result<(), CniError> {
        // Not synced: a power cut may lose it, and GC is for that.
        stave_state::write_json(&self.record_path(&attachment.pod_id), attachment, Durability::Volatile)?;
        lock(&self.attachments).insert(attachment.pod_id.clone(), Arc::new(attachment.clone()));
        Ok(())
    }

    async fn add(&self, attachment: &mut Attachment, pod: OwnedFd) -> Result<Vec<IpAddr>, CniError> {
        let path = attachment.netns.clone();
        blocking(move || netns::bind(pod.as_fd(), &path)).await?;
        let _no_collection = self.collecting.read().await;
        let _turn = self.adds.acquire().await.map_err(|error| CniError::Worker(error.to_string()))?;
        let environment = attachment.environment(&attachment.netns);
        let guard = self.guard_path(&attachment.pod_id);
        let network = &attachment.network;
        let mut chain = Chain {
            runner: &self.runner,
            network,
            command: "ADD",
            environment: &environment,
            capabilities: &attachment.capabilities,
            more: BTreeMap::new(),
            guard: Some(&guard),
            unwanted: None,
        };
        let mut said = String::new();
        for plugin in &network.plugins {
            let answer = chain.run(plugin).await?;
            let result =
                result::parse(&answer.stdout, network.version).map_err(|reason| CniError::Answer {
                    plugin: plugin.kind().to_owned(),
                    command: chain.command,
                    reason: reason + &answer.said,
                })?;
            said = answer.said;
            chain.more.insert(PREVIOUS, result);
        }
        let previous = chain.more.remove(PREVIOUS);
        let ips = previous.as_ref().map(|result| result::addresses(result, INTERFACE)).unwrap_or_default();
        if ips.is_empty() {
            return Err(CniError::NoAddress { network: network.name.clone(), interface: INTERFACE, said });
        }
        attachment.result = previous;
        self.save(attachment)?;
        Ok(ips)
    }

    /// DEL of all plugins, the last first, whatever fails. `lenient`: what fails is no error where it need not be. The
    /// caller has the pod's turn.
    async fn del(&self, attachment: &Attachment, lenient: bool) -> Result<(), CniError> {
        let id = attachment.pod_id.as_str();
        let guard = self.guard_path(id);
        // An ADD that a daemon before us started must not end after our DEL.
        if !wait_for_guard(&guard, self.runner.limit).await {
            tracing::warn!(pod = id, "a CNI plugin that an earlier daemon started still runs");
        }
        let no_collection = self.collecting.read().await;
        let turn = self.dels.acquire().await.map_err(|error| CniError::Worker(error.to_string()))?;
        let bound = netns::is_bound(&attachment.netns);
        // After a reboot it is gone: plugins are to free what they can without it.
        let environment = attachment.environment(if bound { &attachment.netns } else { Path::new("") });
        let network = &attachment.network;
        let previous = attachment.result.clone().filter(|_| network.version >= Version::V0_4_0);
        let chain = Chain {
            runner: &self.runner,
            network,
            command: "DEL",
            environment: &environment,
            capabilities: &attachment.capabilities,
            more: previous.map(|result| (PREVIOUS, result)).into_iter().collect(),
            guard: Some(&guard),
            unwanted: None,
        };
        let deleted = chain.run_all(network.plugins.iter().rev()).await;
        drop((turn, no_collection));
        if let Err(error) = deleted {
            if !lenient || (bound && attachment.result.is_some()) {
                return Err(error);
            }
            tracing::warn!(pod = id, %error, namespace = bound, "CNI DEL failed; the pod goes without");
        }
        let path = attachment.netns.clone();
        blocking(move || netns::release(&path)).await?;
        let _ = std::fs::remove_file(guard);
        // The record last: as long as there is anything, it can be found and removed again.
        stave_state::remove(&self.record_path(id))?;
        lock(&self.attachments).remove(id);
        Ok(())
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs what may block off the async threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, CniError> + Send + 'static,
) -> Result<T, CniError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| CniError::Worker(error.to_string()))?
}

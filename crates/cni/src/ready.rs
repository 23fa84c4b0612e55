//! Which network there is, and whether pods can be put on it. Kept in memory and brought up to date when the directory
//! changes, and when somebody asks and it is old.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::CniError;
use crate::cni::Inner;
use crate::config::Network;
use crate::directory::{self, Loaded};
use crate::watch::Watch;
use crate::{plugin, template};

/// What is older than this is looked at again when somebody asks: plugins come and go without a change here.
const OLD: Duration = Duration::from_secs(10);
/// The same while there is no network.
const OLD_UNREADY: Duration = Duration::from_secs(2);
/// After a change others follow; one look is enough for all.
const SETTLE: Duration = Duration::from_millis(50);
/// Between looks where the directory can't be watched.
const UNWATCHED: Duration = Duration::from_secs(10);
/// The file that a template is written to.
const GENERATED: &str = "10-stave.conflist";

/// What is known.
#[derive(Debug)]
pub(crate) struct Readiness {
    loaded: Loaded,
    /// The network that pods are attached to, with its version settled.
    pub(crate) network: Option<Arc<Network>>,
    /// Why no pod can be attached, or the plugins say that none should be.
    error: Option<String>,
    /// When the look at the directory and the plugins began, and when it ended.
    at: Option<(Instant, Instant)>,
}

impl Readiness {
    /// Before the first look has come to its end.
    pub(crate) fn unknown() -> Self {
        let error = "cni plugin not initialized: the plugins have not answered yet".to_owned();
        Self { loaded: Loaded::default(), network: None, error: Some(error), at: None }
    }

    /// For people and tools.
    pub(crate) fn describe(&self, dirs: &[PathBuf]) -> Value {
        let (file, network) = self.loaded.network.clone().unzip();
        json!({
            "pluginDirs": dirs,
            "file": file,
            "network": network.map(|mut network| {
                if let Some(settled) = &self.network {
                    network.version = settled.version;
                }
                network
            }),
            "broken": self.loaded.broken.iter().map(|(path, why)| format!("{}: {why}", path.display())).collect::<Vec<_>>(),
        })
    }

    fn is_old(&self) -> bool {
        let limit = if self.error.is_some() { OLD_UNREADY } else { OLD };
        self.at.is_none_or(|(_, end)| end.elapsed() > limit)
    }
}

impl Inner {
    pub(crate) fn readiness(&self) -> Arc<Readiness> {
        Arc::clone(&self.ready.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// From memory. The text is for the node's status.
    pub(crate) fn status(&self) -> Result<(), String> {
        let ready = self.readiness();
        if ready.is_old() {
            self.asked.notify_one();
        }
        match &ready.error {
            None => Ok(()),
            Some(why) => Err(why.clone()),
        }
    }

    /// The network for a pod that is to be attached now; looks again where there was none.
    pub(crate) async fn network(&self) -> Result<Arc<Network>, CniError> {
        let mut ready = self.readiness();
        if ready.network.is_none() {
            ready = self.evaluate().await;
        }
        let why = || ready.error.clone().unwrap_or_else(|| "there is no network".to_owned());
        ready.network.clone().ok_or_else(|| CniError::NotReady(why()))
    }

    /// Looks at the directory and asks the plugins; those who ask at the same time get one answer.
    pub(crate) async fn evaluate(&self) -> Arc<Readiness> {
        let asked = Instant::now();
        let _one_at_a_time = self.evaluating.lock().await;
        let known = self.readiness();
        if known.at.is_some_and(|(begin, _)| begin >= asked) {
            return known;
        }
        let begin = Instant::now();
        let dir = self.settings.conf_dir.clone();
        let loaded = tokio::task::spawn_blocking(move || directory::load(&dir)).await.unwrap_or_default();
        let (network, error) = match &loaded.network {
            None => (None, Some(format!("cni plugin not initialized: {}", loaded.lack))),
            Some((_, network)) => self.ask(network).await,
        };
        let ready = Arc::new(Readiness { loaded, network, error, at: Some((begin, Instant::now())) });
        let before = {
            let mut current = self.ready.write().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *current, Arc::clone(&ready))
        };
        tell(&before, &ready);
        ready
    }

    async fn ask(&self, network: &Network) -> (Option<Arc<Network>>, Option<String>) {
        let version = match self.versions.settle(&self.runner, network).await {
            Ok(version) => version,
            Err(error) => return (None, Some(error.to_string())),
        };
        let network = Arc::new(Network { version, ..network.clone() });
        let error = plugin::status(&self.runner, &network).await.err().map(|error| error.to_string());
        (Some(network), error)
    }

    /// Keeps [`Self::readiness`] up to date, for ever.
    pub(crate) async fn follow(self: Arc<Self>) {
        loop {
            let watch = Watch::new(&self.settings.conf_dir)
                .inspect_err(|error| {
                    let dir = self.settings.conf_dir.display();
                    tracing::warn!(%error, %dir, "the directory of CNI configurations is not watched, but polled");
                })
                .ok();
            self.evaluate().await;
            self.looked.notify_one();
            self.collect_once().await;
            let changed = async {
                match &watch {
                    Some(watch) => {
                        if let Err(error) = watch.changed().await {
                            tracing::warn!(%error, "watching the directory of CNI configurations");
                            tokio::time::sleep(UNWATCHED).await;
                        }
                    }
                    None => tokio::time::sleep(UNWATCHED).await,
                }
            };
            tokio::pin!(changed);
            loop {
                tokio::select! {
                    () = &mut changed => {
                        tokio::time::sleep(SETTLE).await;
                        break;
                    }
                    () = self.asked.notified() => {
                        // Who asked while the last look was under way has its answer.
                        if self.readiness().is_old() {
                            break;
                        }
                        self.collect_once().await;
                    }
                }
            }
        }
    }

    /// Writes the configuration that the template makes of the node's ranges, unless there is one already.
    pub(crate) async fn generate(&self, cidrs: &[String]) -> Result<(), CniError> {
        let Some(path) = &self.settings.conf_template else { return Ok(()) };
        let ready = self.evaluate().await;
        if let Some((file, _)) = &ready.loaded.network
            && file.file_name().is_none_or(|name| name != GENERATED)
        {
            tracing::info!(file = %file.display(), "there is a CNI configuration: the template is not used");
            return Ok(());
        }
        let (template, dir) = (path.clone(), self.settings.conf_dir.clone());
        let cidrs = cidrs.to_vec();
        let written = tokio::task::spawn_blocking(move || write(&template, &dir, &cidrs));
        written.await.map_err(|error| CniError::Worker(error.to_string()))??;
        self.evaluate().await;
        Ok(())
    }
}

fn write(path: &Path, dir: &Path, cidrs: &[String]) -> Result<(), CniError> {
    let failed = |reason: String| CniError::Template { path: path.to_owned(), reason };
    let template = directory::text(path).map_err(failed)?;
    let template = String::from_utf8(template).map_err(|error| failed(error.to_string()))?;
    let text = template::render(&template, cidrs).map_err(failed)?;
    // What can't be used must not get there.
    Network::parse(text.as_bytes(), true)
        .map_err(|why| failed(format!("what it makes can't be used: {why}")))?;
    let file = dir.join(GENERATED);
    std::fs::create_dir_all(dir)
        .map_err(|error| CniError::Template { path: dir.to_owned(), reason: error.to_string() })?;
    stave_state::write_bytes(&file, text.as_bytes(), stave_state::Durability::Fsync)?;
    tracing::info!(file = %file.display(), "CNI configuration written from the template");
    Ok(())
}

/// Logs what is different now.
fn tell(before: &Readiness, now: &Readiness) {
    for (path, why) in now.loaded.broken.iter().filter(|broken| !before.loaded.broken.contains(broken)) {
        tracing::warn!(file = %path.display(), why, "a CNI configuration can't be used");
    }
    match (&now.loaded.network, &now.network) {
        (Some((file, network)), Some(settled)) if before.network.as_ref() != Some(settled) => {
            let plugins: Vec<_> = network.plugins.iter().map(|plugin| plugin.kind()).collect();
            tracing::info!(
                file = %file.display(), network = network.name, version = %settled.version, ?plugins,
                "CNI network"
            );
        }
        _ => {}
    }
    if now.error != before.error {
        match &now.error {
            Some(why) => tracing::warn!(why, "the CNI network is not ready"),
            None => tracing::info!("the CNI network is ready"),
        }
    }
}

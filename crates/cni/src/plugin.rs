//! What a plugin says of itself: VERSION, and STATUS.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde_json::{Map, Value, json};

use crate::chain::Chain;
use crate::config::{Network, Plugin};
use crate::exec::{Call, Runner};
use crate::version::joined;
use crate::{CniError, Version};

/// Device, inode, size and time of change of a program: whether it is still the same.
type Identity = (u64, u64, u64, i64, i64);

/// What a program speaks; none: it did not answer in a way that can be read. Then ADD will show.
type Spoken = Option<Vec<Version>>;

/// The versions that plugins speak, asked once a program.
#[derive(Debug, Default)]
pub(crate) struct Versions(Mutex<HashMap<PathBuf, (Identity, Spoken)>>);

impl Versions {
    /// The highest version that the configuration offers and each of its plugins speaks. An error where a program
    /// is missing that they need.
    pub(crate) async fn settle(&self, runner: &Runner, network: &Network) -> Result<Version, CniError> {
        let mut candidates = network.versions.clone();
        for plugin in &network.plugins {
            for program in plugin.programs() {
                runner.find(program)?;
            }
            let Some(spoken) = self.of(runner, plugin, network.version).await? else { continue };
            candidates.retain(|version| spoken.contains(version));
            if candidates.is_empty() {
                return Err(CniError::NotReady(format!(
                    "plugin type={:?} speaks CNI {}, network {:?} wants {}",
                    plugin.kind(),
                    joined(&spoken),
                    network.name,
                    joined(&network.versions),
                )));
            }
        }
        candidates.first().copied().ok_or_else(|| CniError::NotReady("no version of CNI".to_owned()))
    }

    async fn of(&self, runner: &Runner, plugin: &Plugin, version: Version) -> Result<Spoken, CniError> {
        let program = runner.find(plugin.kind())?;
        let identity = identity(&program);
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&program).cloned();
        if let (Some(identity), Some((of, spoken))) = (identity, known)
            && of == identity
        {
            return Ok(spoken);
        }
        let input = json!({ "cniVersion": version.as_str() }).to_string();
        // Plugins of old want these set for every command.
        let dummies = ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]
            .map(|name| (name, std::ffi::OsString::from("dummy")));
        let call = Call {
            plugin: plugin.kind(),
            command: "VERSION",
            environment: &dummies,
            input: input.as_bytes(),
            guard: None,
            unwanted: None,
        };
        let spoken = match runner.run(call).await {
            Ok(answer) => supported_versions(&answer.stdout).map_err(|reason| CniError::Answer {
                plugin: plugin.kind().to_owned(),
                command: "VERSION",
                reason: reason + &answer.said,
            }),
            // It may do better next time.
            Err(error @ (CniError::Timeout { .. } | CniError::Spawn { .. })) => return Err(error),
            Err(error) => Err(error),
        };
        let spoken = spoken.inspect_err(|error| tracing::warn!(%error, "the versions of a CNI plugin")).ok();
        if let Some(identity) = identity {
            let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            // Nobody has so many plugins; a name that changes all the time must not fill the memory.
            if known.len() > 256 {
                known.clear();
            }
            known.insert(program, (identity, spoken.clone()));
        }
        Ok(spoken)
    }
}

fn identity(program: &Path) -> Option<Identity> {
    let meta = fs::metadata(program).ok()?;
    Some((meta.dev(), meta.ino(), meta.size(), meta.ctime(), meta.ctime_nsec()))
}

/// Reads the answer to VERSION: of what it lists, what is spoken here. The error is the reason.
pub(crate) fn supported_versions(answer: &[u8]) -> Result<Vec<Version>, String> {
    let value: Value = serde_json::from_slice(answer)
        .map_err(|error| format!("no JSON: {error}; it begins with {}", crate::result::start(answer)))?;
    let list = value
        .get("supportedVersions")
        .and_then(Value::as_array)
        .ok_or_else(|| "it has no \"supportedVersions\"".to_owned())?;
    Ok(list.iter().filter_map(|version| version.as_str()?.parse().ok()).collect())
}

/// Asks each plugin whether it could put a pod on the network now. Only of versions that have STATUS.
pub(crate) async fn status(runner: &Runner, network: &Network) -> Result<(), CniError> {
    if network.version < Version::V1_1_0 {
        return Ok(());
    }
    let chain = Chain {
        runner,
        network,
        command: "STATUS",
        environment: &[],
        capabilities: &Map::new(),
        more: BTreeMap::new(),
        guard: None,
        unwanted: None,
    };
    chain.run_until_failure().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_a_plugin() {
        let answer =
            br#"{"cniVersion": "1.0.0", "supportedVersions": ["0.1.0", "0.4.0", "1.0.0", 7, "9.9.9"]}"#;
        assert_eq!(supported_versions(answer).unwrap(), [Version::V0_4_0, Version::V1_0_0]);
        assert!(supported_versions(b"usage: plugin").unwrap_err().contains("usage"));
        assert!(supported_versions(b"{}").is_err());
    }
}

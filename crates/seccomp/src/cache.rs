//! Compiled profiles, by content.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use sha2::{Digest as _, Sha256};

use crate::{Filter, SeccompError, compile, parse, read, runtime_default};

/// Filters that are kept. A node has a handful of profiles, each with few sets of capabilities.
const ENTRIES_MAX: usize = 256;

/// Content of the profile, `None` for [`runtime_default`], and capabilities.
type Key = (Option<[u8; 32]>, u64);

/// Compiled profiles. The one that was not asked for longest goes when there are more than 256.
#[derive(Debug, Default)]
pub struct Cache(Mutex<Entries>);

#[derive(Debug, Default)]
struct Entries {
    filters: HashMap<Key, (u64, Arc<Filter>)>,
    clock: u64,
}

impl Cache {
    /// The filter of [`runtime_default`] for a process with the bounding set `caps`.
    pub fn runtime_default(&self, caps: u64) -> Result<Arc<Filter>, SeccompError> {
        self.get((None, caps), || compile(runtime_default(), caps))
    }

    /// The filter of a profile; see [`parse`] and [`compile`].
    pub fn profile(&self, json: &str, source: &str, caps: u64) -> Result<Arc<Filter>, SeccompError> {
        let digest: [u8; 32] = Sha256::digest(json.as_bytes()).into();
        self.get((Some(digest), caps), || compile(&parse(json, source)?, caps))
    }

    /// The filter of a profile in a file. The file is read each time, so that a change counts. Blocks.
    pub fn file(&self, path: &Path, caps: u64) -> Result<Arc<Filter>, SeccompError> {
        self.profile(&read(path)?, &path.display().to_string(), caps)
    }

    fn get(
        &self,
        key: Key,
        make: impl FnOnce() -> Result<Filter, SeccompError>,
    ) -> Result<Arc<Filter>, SeccompError> {
        if let Some(found) = self.entries().find(&key) {
            return Ok(found);
        }
        // Not under the lock. Two at once make the same twice, and that is all.
        let made = Arc::new(make()?);
        self.entries().add(key, Arc::clone(&made));
        Ok(made)
    }

    fn entries(&self) -> std::sync::MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entries {
    fn find(&mut self, key: &Key) -> Option<Arc<Filter>> {
        self.clock += 1;
        let (used, filter) = self.filters.get_mut(key)?;
        *used = self.clock;
        Some(Arc::clone(filter))
    }

    fn add(&mut self, key: Key, filter: Arc<Filter>) {
        if self.filters.len() >= ENTRIES_MAX {
            let oldest = self.filters.iter().min_by_key(|(_, (used, _))| *used).map(|(key, _)| *key);
            oldest.and_then(|key| self.filters.remove(&key));
        }
        self.filters.insert(key, (self.clock, filter));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALLOW: &str = r#"{"defaultAction": "SCMP_ACT_ALLOW"}"#;

    #[test]
    fn the_same_content_is_compiled_once() {
        let cache = Cache::default();
        let first = cache.profile(ALLOW, "a", 0).unwrap();
        assert!(Arc::ptr_eq(&first, &cache.profile(ALLOW, "b", 0).unwrap()));
        assert!(!Arc::ptr_eq(&first, &cache.profile(ALLOW, "a", 1).unwrap()));
        assert!(!Arc::ptr_eq(&first, &cache.profile(&format!("{ALLOW} "), "a", 0).unwrap()));
        let default = cache.runtime_default(0).unwrap();
        assert!(Arc::ptr_eq(&default, &cache.runtime_default(0).unwrap()));
    }

    #[test]
    fn a_changed_file_counts_and_a_broken_one_is_not_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.json");
        let cache = Cache::default();
        assert!(cache.file(&path, 0).unwrap_err().is_not_found());
        std::fs::write(&path, ALLOW).unwrap();
        let first = cache.file(&path, 0).unwrap();
        std::fs::write(&path, "{\n\"defaultAction\": 1}").unwrap();
        assert!(cache.file(&path, 0).unwrap_err().to_string().contains("p.json: line 2, column"));
        std::fs::write(&path, r#"{"defaultAction": "SCMP_ACT_LOG"}"#).unwrap();
        assert_ne!(first.program, cache.file(&path, 0).unwrap().program);
    }

    #[test]
    fn it_stays_small_and_keeps_what_is_used() {
        let cache = Cache::default();
        let first = cache.profile(ALLOW, "a", 0).unwrap();
        for caps in 1..=600 {
            cache.profile(ALLOW, "a", caps).unwrap();
            assert!(Arc::ptr_eq(&first, &cache.profile(ALLOW, "a", 0).unwrap()));
        }
        assert_eq!(cache.entries().filters.len(), ENTRIES_MAX);
    }
}

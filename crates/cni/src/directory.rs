//! The directory of configurations.

use std::fs::{self, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use serde_json::Value;

use crate::config::Network;

/// Biggest file that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;
/// Most files that are looked at.
const MAX_FILES: usize = 1000;

/// What is in the directory.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Loaded {
    /// The first usable one, and its file.
    pub(crate) network: Option<(PathBuf, Network)>,
    /// Files before it that can't be used, and why.
    pub(crate) broken: Vec<(PathBuf, String)>,
    /// Why there is no network.
    pub(crate) lack: String,
}

/// Reads `*.conflist`, `*.conf` and `*.json` by name until one can be used.
pub(crate) fn load(dir: &Path) -> Loaded {
    let mut loaded = Loaded::default();
    let names = match names(dir, &["conflist", "conf", "json"]) {
        Ok(names) => names,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => {
            loaded.lack = format!("{}: {error}", dir.display());
            return loaded;
        }
    };
    for path in names {
        match read(dir, &path) {
            Ok(network) => {
                loaded.network = Some((path, network));
                return loaded;
            }
            Err(why) => loaded.broken.push((path, why)),
        }
    }
    loaded.lack = format!("no network configuration in {}", dir.display());
    if !loaded.broken.is_empty() {
        let broken: Vec<_> =
            loaded.broken.iter().map(|(path, why)| format!("{}: {why}", path.display())).collect();
        loaded.lack = format!("no usable network configuration: {}", broken.join("; "));
    }
    loaded
}

fn read(dir: &Path, path: &Path) -> Result<Network, String> {
    let list = path.extension().is_some_and(|extension| extension == "conflist");
    let mut network = Network::parse(&text(path)?, list)?;
    if network.more_plugins {
        // libcni appends these; a directory that isn't there has none.
        for path in names(&dir.join(&network.name), &["conf"]).unwrap_or_default() {
            let why = |error: String| format!("{}: {error}", path.display());
            let object: Value = serde_json::from_slice(&text(&path).map_err(why)?)
                .map_err(|error| why(format!("no JSON: {error}")))?;
            network.add(vec![object]).map_err(why)?;
        }
    }
    if network.plugins.is_empty() {
        return Err("\"plugins\" is empty".to_owned());
    }
    Ok(network)
}

pub(crate) fn text(path: &Path) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    // A FIFO must not hang us.
    let flags = OFlags::NONBLOCK.bits() as i32;
    let mut file =
        OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(|error| error.to_string())?;
    if !file.metadata().map_err(|error| error.to_string())?.is_file() {
        return Err("is no regular file".to_owned());
    }
    file.by_ref().take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(format!("is bigger than {MAX_FILE} bytes"));
    }
    Ok(bytes)
}

fn names(dir: &Path, extensions: &[&str]) -> io::Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(dir)?.take(MAX_FILES) {
        let path = entry?.path();
        let wanted = path.extension().is_some_and(|e| extensions.iter().any(|wanted| e == *wanted));
        // Hidden files are those of editors, and of writes under way.
        let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if wanted && !hidden && !path.is_dir() {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// A plugin's program, in the first directory that has it.
pub(crate) fn find(bin_dirs: &[PathBuf], kind: &str) -> Option<PathBuf> {
    bin_dirs.iter().map(|dir| dir.join(kind)).find(|path| {
        fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    })
}

/// What `stave check` tells of CNI.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inspection {
    /// The configuration that is used, with its network and plugins; or why there is none.
    pub found: String,
    /// What keeps pods from being put on the network.
    pub lacking: Vec<String>,
    /// Files that were passed over, and why.
    pub broken: Vec<String>,
}

/// Looks at the configuration and the plugins without running any.
pub fn inspect(conf_dir: &Path, bin_dirs: &[PathBuf]) -> Inspection {
    let loaded = load(conf_dir);
    let broken: Vec<_> =
        loaded.broken.iter().map(|(path, why)| format!("{}: {why}", path.display())).collect();
    let Some((path, network)) = loaded.network else {
        let lacking = vec![format!("no usable network configuration in {}", conf_dir.display())];
        return Inspection { found: loaded.lack, lacking, broken };
    };
    let mut lacking = Vec::new();
    let dirs = bin_dirs.iter().map(|dir| dir.display().to_string()).collect::<Vec<_>>().join(", ");
    let mut kinds: Vec<&str> = Vec::new();
    for plugin in &network.plugins {
        kinds.push(plugin.kind());
        for kind in plugin.programs() {
            if find(bin_dirs, kind).is_none() {
                lacking.push(format!("plugin {kind} is not in {dirs}"));
            }
        }
    }
    let found = format!(
        "network {} (version {}) of {}: {}",
        network.name,
        network.version,
        path.display(),
        kinds.join(", ")
    );
    Inspection { found, lacking, broken }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conf(name: &str) -> String {
        format!(r#"{{"cniVersion": "1.0.0", "name": "{name}", "type": "bridge"}}"#)
    }

    #[test]
    fn the_first_usable_file_by_name_counts() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        assert!(load(&path("none")).lack.contains("no network configuration"));
        assert!(load(dir.path()).network.is_none());
        fs::write(path("30-c.json"), conf("json")).unwrap();
        fs::write(path("20-b.conf"), conf("conf")).unwrap();
        fs::write(path("00-notes.txt"), "not ours").unwrap();
        fs::create_dir(path("00-dir.conf")).unwrap();
        assert_eq!(load(dir.path()).network.unwrap().1.name, "conf");
        fs::write(path("10-a.conflist"), "{ half").unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, path("05-fifo.conf"), 0o600.into()).unwrap();
        std::os::unix::fs::symlink("/nowhere", path("06-link.conf")).unwrap();
        fs::write(path("07-big.conf"), vec![b' '; (MAX_FILE + 1) as usize]).unwrap();
        let loaded = load(dir.path());
        assert_eq!(loaded.network.unwrap().1.name, "conf");
        let broken: Vec<_> =
            loaded.broken.iter().map(|(path, _)| path.file_name().unwrap().to_str().unwrap()).collect();
        assert_eq!(broken, ["05-fifo.conf", "06-link.conf", "07-big.conf", "10-a.conflist"]);
        fs::remove_file(path("20-b.conf")).unwrap();
        fs::remove_file(path("30-c.json")).unwrap();
        let lack = load(dir.path()).lack;
        assert!(lack.contains("10-a.conflist") && lack.contains("no JSON"), "{lack}");
    }

    #[test]
    fn a_directory_with_the_networks_name_has_more_plugins() {
        let dir = tempfile::tempdir().unwrap();
        let list = |only| {
            let text = format!(
                r#"{{"cniVersion": "1.1.0", "name": "net", "loadOnlyInlinedPlugins": {only}, "plugins": [{{"type": "a"}}]}}"#
            );
            fs::write(dir.path().join("10.conflist"), text).unwrap();
            let kinds = |network: Network| -> Vec<_> {
                network.plugins.iter().map(|plugin| plugin.kind().to_owned()).collect()
            };
            load(dir.path()).network.map(|(_, network)| kinds(network))
        };
        assert_eq!(list(false).unwrap(), ["a"]);
        fs::create_dir(dir.path().join("net")).unwrap();
        fs::write(dir.path().join("net/2.conf"), r#"{"type": "c"}"#).unwrap();
        fs::write(dir.path().join("net/1.conf"), r#"{"type": "b"}"#).unwrap();
        assert_eq!(list(false).unwrap(), ["a", "b", "c"]);
        assert_eq!(list(true).unwrap(), ["a"]);
        fs::write(dir.path().join("net/3.conf"), "x").unwrap();
        assert_eq!(list(false), None);
    }

    #[test]
    fn what_is_lacking_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let bin = dir.path().join("bin");
        fs::create_dir(&bin).unwrap();
        let bin_dirs = [dir.path().join("none"), bin.clone()];
        assert!(!inspect(dir.path(), &bin_dirs).lacking.is_empty());
        let text =
            r#"{"cniVersion": "1.0.0", "name": "n", "type": "bridge", "ipam": {"type": "host-local"}}"#;
        fs::write(dir.path().join("1.conf"), text).unwrap();
        let lacking = inspect(dir.path(), &bin_dirs).lacking;
        assert!(lacking.len() == 2 && lacking[1].contains("host-local"), "{lacking:?}");
        for name in ["bridge", "host-local"] {
            fs::write(bin.join(name), "").unwrap();
        }
        assert_eq!(inspect(dir.path(), &bin_dirs).lacking.len(), 2, "not executable");
        for name in ["bridge", "host-local"] {
            fs::set_permissions(bin.join(name), fs::Permissions::from_mode(0o755)).unwrap();
        }
        let good = inspect(dir.path(), &bin_dirs);
        assert!(good.lacking.is_empty() && good.found.contains("network n"), "{good:?}");
    }
}

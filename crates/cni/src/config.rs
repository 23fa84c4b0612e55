//! Network configurations: lists of plugins, and single plugins.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::Version;

/// Most plugins of one configuration.
const MAX_PLUGINS: usize = 32;
/// Longest name of a network or type of a plugin: that of a file.
const MAX_NAME: usize = 255;

/// A configuration, as far as the runtime reads it. Written into a pod's record as it was used.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Network {
    pub(crate) name: String,
    /// The one that plugins are spoken to in: the highest of the configuration's own, until it is settled
    /// what the plugins know.
    pub(crate) version: Version,
    /// What the configuration offers, highest first. Of no use once `version` is settled.
    #[serde(skip)]
    pub(crate) versions: Vec<Version>,
    #[serde(default)]
    pub(crate) disable_check: bool,
    #[serde(default)]
    pub(crate) disable_gc: bool,
    /// More plugins may come from the directory with the network's name.
    #[serde(skip)]
    pub(crate) more_plugins: bool,
    pub(crate) plugins: Vec<Plugin>,
}

/// One plugin of a configuration: its object, whole.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Plugin(pub(crate) Map<String, Value>);

impl Plugin {
    /// Checks an object. The error is the reason.
    pub(crate) fn new(object: Value) -> Result<Self, String> {
        let Value::Object(object) = object else { return Err("a plugin is no object".to_owned()) };
        match object.get("type") {
            Some(Value::String(kind)) => check_name("type", kind)?,
            Some(other) => return Err(format!("\"type\" {other} is no string")),
            None => return Err("a plugin has no \"type\"".to_owned()),
        }
        if let Some(Value::String(kind)) = object.get("ipam").and_then(|ipam| ipam.get("type"))
            && !kind.is_empty()
        {
            check_name("ipam.type", kind)?;
        }
        if object.get("capabilities").is_some_and(|value| !value.is_object() && !value.is_null()) {
            return Err("\"capabilities\" is no object".to_owned());
        }
        Ok(Self(object))
    }

    /// The name of the program.
    pub(crate) fn kind(&self) -> &str {
        self.0.get("type").and_then(Value::as_str).unwrap_or_default()
    }

    /// The programs that it wants: itself, and what it runs for the pod's addresses, from the same directories.
    pub(crate) fn programs(&self) -> impl Iterator<Item = &str> {
        let ipam = self.0.get("ipam").and_then(|ipam| ipam.get("type")).and_then(Value::as_str);
        std::iter::once(self.kind()).chain(ipam.filter(|kind| !kind.is_empty()))
    }

    /// Whether it takes a capability's argument.
    pub(crate) fn takes(&self, capability: &str) -> bool {
        let declared = self.0.get("capabilities").and_then(|all| all.get(capability));
        declared.and_then(Value::as_bool).unwrap_or(false)
    }

    /// What the plugin gets on its standard input: its object with what the runtime adds. `capabilities` are
    /// all that the pod has; the plugin gets those that it takes.
    pub(crate) fn input(
        &self,
        network: &Network,
        capabilities: &Map<String, Value>,
        more: BTreeMap<&str, Value>,
    ) -> Vec<u8> {
        let mut object = self.0.clone();
        object.remove("capabilities");
        object.remove("runtimeConfig");
        object.insert("name".to_owned(), network.name.clone().into());
        object.insert("cniVersion".to_owned(), network.version.as_str().into());
        let given: Map<_, _> = capabilities
            .iter()
            .filter(|(name, _)| self.takes(name))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        if !given.is_empty() {
            object.insert("runtimeConfig".to_owned(), given.into());
        }
        for (key, value) in more {
            object.insert(key.to_owned(), value);
        }
        Value::Object(object).to_string().into_bytes()
    }
}

impl Network {
    /// Reads a configuration: a list (`*.conflist`), or a single plugin. The error is the reason.
    pub(crate) fn parse(text: &[u8], list: bool) -> Result<Self, String> {
        let value: Value = serde_json::from_slice(text).map_err(|error| format!("no JSON: {error}"))?;
        let Value::Object(mut object) = value else { return Err("is no JSON object".to_owned()) };
        let name = match object.get("name") {
            Some(Value::String(name)) => name.clone(),
            Some(other) => return Err(format!("\"name\" {other} is no string")),
            None => return Err("has no \"name\"".to_owned()),
        };
        check_name("name", &name)?;
        let versions = versions(&object)?;
        let version = *versions.first().ok_or("has no \"cniVersion\"")?;
        let mut network = Self {
            name,
            version,
            versions,
            disable_check: flag(&object, "disableCheck")?,
            disable_gc: flag(&object, "disableGC")?,
            more_plugins: list && !flag(&object, "loadOnlyInlinedPlugins")?,
            plugins: Vec::new(),
        };
        if list {
            match object.remove("plugins") {
                Some(Value::Array(plugins)) => network.add(plugins)?,
                Some(_) => return Err("\"plugins\" is no array".to_owned()),
                None if network.more_plugins => {}
                None => return Err("has no \"plugins\"".to_owned()),
            }
            // Without its directory a list has its own only; the caller checks again after that.
            if network.plugins.is_empty() && !network.more_plugins {
                return Err("\"plugins\" is empty".to_owned());
            }
        } else {
            if object.contains_key("plugins") && !object.contains_key("type") {
                return Err("is a list of plugins, which is named *.conflist".to_owned());
            }
            network.add(vec![Value::Object(object)])?;
        }
        Ok(network)
    }

    /// Appends plugins.
    pub(crate) fn add(&mut self, plugins: Vec<Value>) -> Result<(), String> {
        if self.plugins.len() + plugins.len() > MAX_PLUGINS {
            return Err(format!("has more than {MAX_PLUGINS} plugins"));
        }
        for (index, object) in plugins.into_iter().enumerate() {
            self.plugins.push(Plugin::new(object).map_err(|why| format!("plugins[{index}]: {why}"))?);
        }
        Ok(())
    }
}

/// `cniVersion` and `cniVersions`, those that are spoken here, highest first.
fn versions(object: &Map<String, Value>) -> Result<Vec<Version>, String> {
    let mut texts = Vec::new();
    match object.get("cniVersion") {
        Some(Value::String(text)) => texts.push(text.as_str()),
        Some(other) => return Err(format!("\"cniVersion\" {other} is no string")),
        None => {}
    }
    match object.get("cniVersions") {
        Some(Value::Array(more)) => {
            for value in more {
                texts.push(value.as_str().ok_or("\"cniVersions\" has something that is no string")?);
            }
        }
        Some(_) => return Err("\"cniVersions\" is no array".to_owned()),
        None => {}
    }
    let Some(first) = texts.first() else { return Err("has no \"cniVersion\"".to_owned()) };
    let mut versions: Vec<Version> = texts.iter().filter_map(|text| text.parse().ok()).collect();
    if versions.is_empty() {
        return Err(format!(
            "\"cniVersion\" {first:?} {}",
            first.parse::<Version>().err().unwrap_or_default()
        ));
    }
    versions.sort_unstable();
    versions.dedup();
    versions.reverse();
    Ok(versions)
}

/// A boolean, which some write as a string.
fn flag(object: &Map<String, Value>, key: &str) -> Result<bool, String> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(value)) => Ok(*value),
        Some(Value::String(text)) if text.eq_ignore_ascii_case("true") => Ok(true),
        Some(Value::String(text)) if text.eq_ignore_ascii_case("false") => Ok(false),
        Some(other) => Err(format!("\"{key}\" {other} is no boolean")),
    }
}

/// One component of a path (CVE-2021-20206), and no word that a shell or a log could take for another.
fn check_name(key: &str, name: &str) -> Result<(), String> {
    let good = name.len() <= MAX_NAME
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'));
    if good {
        return Ok(());
    }
    let shown: String = name.chars().take(MAX_NAME).collect();
    Err(format!("\"{key}\" {shown:?} is not of letters, digits, '_', '.' and '-', a letter or digit first"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(value: &Value, list: bool) -> Result<Network, String> {
        Network::parse(value.to_string().as_bytes(), list)
    }

    #[test]
    fn a_list_and_a_single_plugin() {
        let list = json!({"cniVersion": "1.0.0", "name": "net", "disableCheck": "True", "plugins": [
            {"type": "bridge", "ipam": {"type": "host-local"}},
            {"type": "portmap", "capabilities": {"portMappings": true, "x": false}},
        ]});
        let network = parse(&list, true).unwrap();
        assert_eq!((network.name.as_str(), network.version), ("net", Version::V1_0_0));
        assert!(network.disable_check && !network.disable_gc && network.more_plugins);
        assert_eq!(network.plugins.iter().map(Plugin::kind).collect::<Vec<_>>(), ["bridge", "portmap"]);
        assert!(network.plugins[1].takes("portMappings") && !network.plugins[1].takes("x"));
        let single = json!({"cniVersion": "0.3.1", "name": "one", "type": "macvlan", "master": "eth0"});
        let network = parse(&single, false).unwrap();
        assert_eq!(network.plugins[0].0["master"], "eth0");
        assert!(parse(&list, false).unwrap_err().contains("*.conflist"));
    }

    #[test]
    fn the_highest_version_that_is_spoken_here_comes_first() {
        let with = |version: Value, versions: Value| {
            let object = json!({"cniVersion": version, "cniVersions": versions, "name": "n", "type": "t"});
            parse(&object, false).map(|network| network.versions)
        };
        use Version::*;
        assert_eq!(with("0.4.0".into(), json!(["1.1.0", "9.0.0", "0.4.0"])).unwrap(), [V1_1_0, V0_4_0]);
        assert!(with("0.2.0".into(), json!([])).unwrap_err().contains("\"0.2.0\" is not a version"));
        assert!(with(json!(1), json!([])).is_err() && with("1.0.0".into(), json!([1])).is_err());
        assert!(parse(&json!({"name": "n", "type": "t"}), false).unwrap_err().contains("cniVersion"));
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for bad in ["", "../evil", "/bin/sh", "a/b", "a b", ".hidden", "a\n", "-x"] {
            let plugin = json!({"cniVersion": "1.0.0", "name": "n", "type": bad});
            assert!(parse(&plugin, false).unwrap_err().contains("type"), "{bad:?}");
            let ipam = json!({"cniVersion": "1.0.0", "name": "n", "type": "t", "ipam": {"type": bad}});
            assert_eq!(parse(&ipam, false).is_ok(), bad.is_empty(), "{bad:?}");
            let name = json!({"cniVersion": "1.0.0", "name": bad, "type": "t"});
            assert!(parse(&name, false).unwrap_err().contains("name"), "{bad:?}");
        }
        for bad in ["", "[]", "null", "{", "{\"name\": 1}", "\u{0}"] {
            assert!(Network::parse(bad.as_bytes(), true).is_err(), "{bad:?}");
        }
        let deep = "[".repeat(100_000);
        assert!(Network::parse(deep.as_bytes(), true).is_err());
        let many = vec![json!({"type": "t"}); 33];
        assert!(parse(&json!({"cniVersion": "1.0.0", "name": "n", "plugins": many}), true).is_err());
        let none = json!({"cniVersion": "1.0.0", "name": "n", "plugins": [], "loadOnlyInlinedPlugins": true});
        assert!(parse(&none, true).unwrap_err().contains("empty"));
    }

    #[test]
    fn a_plugin_gets_what_it_takes() {
        let object = json!({"cniVersion": "1.0.0", "name": "n", "plugins": [
            {"type": "t", "keep": 1, "capabilities": {"mac": true, "dns": true}, "runtimeConfig": {"forged": 1}},
        ]});
        let network = parse(&object, true).unwrap();
        let capabilities = json!({"mac": "0a:00:00:00:00:01", "bandwidth": {}});
        let more = BTreeMap::from([("prevResult", json!({"ips": []}))]);
        let input = network.plugins[0].input(&network, capabilities.as_object().unwrap(), more);
        let input: Value = serde_json::from_slice(&input).unwrap();
        let expected = json!({
            "type": "t", "keep": 1, "name": "n", "cniVersion": "1.0.0",
            "runtimeConfig": {"mac": "0a:00:00:00:00:01"}, "prevResult": {"ips": []},
        });
        assert_eq!(input, expected);
    }
}

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use toml::Value;
use toml::de::{DeTable, DeValue};

use crate::keys::{self, KEYS, RUNTIME_KEYS};
use crate::{CgroupDriver, Config, ConfigError, LogFormat, LogLevel, Origin, Runtime, RuntimeKind, check};

/// Read when `--config` is not given; it may be absent.
pub const DEFAULT_FILE: &str = "/etc/stave/config.toml";

/// The directory of drop-ins, beside the file.
const DROP_INS: &str = "conf.d";

/// The biggest file that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// Loads `file`, or [`DEFAULT_FILE`], which alone may be absent, and then `conf.d/*.toml` beside it, sorted by name.
/// What comes later wins, key by key; an array is replaced as a whole.
pub fn load(file: Option<&Path>) -> Result<Config, ConfigError> {
    match file {
        Some(file) => load_from(file, true),
        None => load_from(Path::new(DEFAULT_FILE), false),
    }
}

pub(crate) fn load_from(file: &Path, must_exist: bool) -> Result<Config, ConfigError> {
    let mut loader = Loader::default();
    match read(file) {
        Ok(text) => loader.merge(file, &text)?,
        Err(ConfigError::Read { source, .. }) if !must_exist && source.kind() == io::ErrorKind::NotFound => {}
        Err(err) => return Err(err),
    }
    for drop_in in drop_ins(&file.parent().unwrap_or(Path::new("")).join(DROP_INS))? {
        loader.merge(&drop_in, &read(&drop_in)?)?;
    }
    loader.finish()
}

/// What the command line sets over the files.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Overrides {
    /// `--root`
    pub root: Option<PathBuf>,
    /// `--state`
    pub state: Option<PathBuf>,
    /// `--listen`
    pub listen: Option<PathBuf>,
    /// `--log-level`
    pub log_level: Option<LogLevel>,
    /// `--log-format`
    pub log_format: Option<LogFormat>,
}

impl Config {
    /// Sets what `overrides` has; on an error nothing is changed.
    pub fn apply(&mut self, overrides: Overrides) -> Result<(), ConfigError> {
        type Check = fn(&Path) -> Result<PathBuf, String>;
        let mut config = self.clone();
        let paths: [(_, _, _, _, Check); 3] = [
            ("root", "--root", overrides.root, &mut config.root, check::path),
            ("state", "--state", overrides.state, &mut config.state, check::path),
            ("listen", "--listen", overrides.listen, &mut config.listen, check::socket_path),
        ];
        for (key, option, given, target, check) in paths {
            let Some(given) = given else { continue };
            *target = check(&given).map_err(|reason| ConfigError::Value {
                origin: Origin::Option(option),
                key: key.to_owned(),
                value: format!("{given:?}"),
                reason,
            })?;
        }
        config.log.level = overrides.log_level.unwrap_or(config.log.level);
        config.log.format = overrides.log_format.unwrap_or(config.log.format);
        if config.root == config.state {
            return Err(same_directory(&config, Origin::Option("--state")));
        }
        *self = config;
        Ok(())
    }
}

fn same_directory(config: &Config, origin: Origin) -> ConfigError {
    ConfigError::Value {
        origin,
        key: "state".to_owned(),
        value: format!("{:?}", config.state),
        reason: "is the root directory of Stave too; they must differ".to_owned(),
    }
}

fn read(path: &Path) -> Result<String, ConfigError> {
    let failed = |source| ConfigError::Read { path: path.to_owned(), source };
    let mut text = String::new();
    let file = File::open(path).map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(failed(io::Error::other("is no regular file")));
    }
    file.take(MAX_FILE + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > MAX_FILE {
        return Err(failed(io::Error::other(format!("is bigger than {MAX_FILE} bytes"))));
    }
    Ok(text)
}

fn drop_ins(dir: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let failed = |source| ConfigError::Read { path: dir.to_owned(), source };
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(err) => return Err(failed(err)),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        // Editors' files begin with a dot (".#x.toml"), or end in "~".
        let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if !hidden && path.extension().is_some_and(|extension| extension == "toml") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// A runtime as far as the files read so far describe it.
#[derive(Default)]
struct Draft {
    kind: Option<RuntimeKind>,
    path: Option<PathBuf>,
    root: Option<PathBuf>,
    args: Option<Vec<String>>,
    timeout: Option<u32>,
    pids_limit: Option<i64>,
}

#[derive(Default)]
struct Loader {
    config: Config,
    runtimes: BTreeMap<String, Draft>,
    /// Where each key, and each table of a runtime, was given last.
    origins: BTreeMap<String, Origin>,
}

/// A file while it is merged.
struct Source<'a> {
    path: &'a Path,
    text: &'a str,
}

impl Source<'_> {
    fn origin(&self, offset: usize) -> Origin {
        let before = self.text.as_bytes().iter().take(offset);
        Origin::File { path: self.path.to_owned(), line: 1 + before.filter(|byte| **byte == b'\n').count() }
    }

    /// The value as it is written, on one line and not too long.
    fn quote(&self, span: std::ops::Range<usize>) -> String {
        let text = self.text.get(span).unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ");
        match text.char_indices().nth(200) {
            Some((end, _)) => format!("{}...", &text[..end]),
            None => text,
        }
    }
}

impl Loader {
    fn merge(&mut self, path: &Path, text: &str) -> Result<(), ConfigError> {
        let source = Source { path, text };
        let table = DeTable::parse(text).map_err(|err| ConfigError::Syntax {
            origin: source.origin(err.span().map_or(0, |span| span.start)),
            message: err.message().to_owned(),
        })?;
        self.walk(&source, "", table.get_ref())
    }

    /// Takes over a table; `prefix` is its dotted path, "" at the top.
    fn walk(&mut self, source: &Source<'_>, prefix: &str, table: &DeTable<'_>) -> Result<(), ConfigError> {
        for (key, value) in table {
            let origin = source.origin(key.span().start);
            let name = match prefix {
                "" => bare(key.get_ref()),
                prefix => format!("{prefix}.{}", bare(key.get_ref())),
            };
            let bad = |reason| ConfigError::Value {
                origin: source.origin(value.span().start),
                key: name.clone(),
                value: source.quote(value.span()),
                reason,
            };
            let is_table = name == "runtimes"
                || prefix == "runtimes"
                || KEYS
                    .iter()
                    .any(|key| key.name.strip_prefix(&name).is_some_and(|rest| rest.starts_with('.')));
            if let Some(runtime) = prefix.strip_prefix("runtimes.") {
                if !RUNTIME_KEYS.iter().any(|(known, _)| *known == key.get_ref()) {
                    return Err(unknown(origin, prefix, name));
                }
                let value = plain(value.get_ref()).map_err(bad)?;
                self.set_runtime(runtime, key.get_ref(), &value).map_err(bad)?;
            } else if is_table {
                let DeValue::Table(inner) = value.get_ref() else {
                    return Err(bad("is no table".to_owned()));
                };
                if prefix == "runtimes" {
                    check::handler(key.get_ref()).map_err(|reason| ConfigError::UnknownKey {
                        origin: origin.clone(),
                        key: name.clone(),
                        hint: format!("it {reason}"),
                    })?;
                    self.runtimes.entry(key.get_ref().to_string()).or_default();
                }
                self.walk(source, &name, inner)?;
            } else if let Some(key) = keys::find(&name) {
                let value = plain(value.get_ref()).map_err(bad)?;
                (key.set)(&mut self.config, &value).map_err(bad)?;
            } else {
                return Err(unknown(origin, prefix, name));
            }
            self.origins.insert(name, origin);
        }
        Ok(())
    }

    fn set_runtime(&mut self, runtime: &str, key: &str, value: &Value) -> Result<(), String> {
        let draft = self.runtimes.entry(runtime.to_owned()).or_default();
        match key {
            "type" => draft.kind = Some(keys::string(value)?.parse()?),
            "path" => draft.path = Some(keys::path(value)?),
            "args" => draft.args = Some(keys::runtime_args(value)?),
            "timeout" => draft.timeout = Some(keys::runtime_timeout(value)?),
            "pids_limit" => draft.pids_limit = Some(keys::pids_limit(value)?),
            _ => draft.root = Some(keys::path(value)?),
        }
        Ok(())
    }

    /// Checks what more than one key says.
    fn finish(self) -> Result<Config, ConfigError> {
        let Loader { mut config, runtimes, origins } = self;
        let origin = |key: &str| origins.get(key).cloned().unwrap_or(Origin::Default);
        let driver = config.cgroup.driver;
        if driver != CgroupDriver::Auto && !origins.contains_key("cgroup.parent") {
            config.cgroup.parent = config.cgroup.parent_for(driver).unwrap_or_default();
        }
        check::cgroup_parent(driver, &config.cgroup.parent).map_err(|reason| ConfigError::Value {
            origin: origin("cgroup.parent"),
            key: "cgroup.parent".to_owned(),
            value: format!("{:?}", config.cgroup.parent),
            reason,
        })?;
        if config.root == config.state {
            let given = if origins.contains_key("state") { "state" } else { "root" };
            return Err(same_directory(&config, origin(given)));
        }
        let (certificate, key) = ("streaming.tls_certificate", "streaming.tls_key");
        let (given, missing) = match (&config.streaming.tls_certificate, &config.streaming.tls_key) {
            (Some(_), None) => (Some(certificate), key),
            (None, Some(_)) => (Some(key), certificate),
            _ => (None, ""),
        };
        if let Some(given) = given {
            return Err(ConfigError::Missing {
                origin: origin(given),
                key: missing.to_owned(),
                reason: format!("{given} needs it"),
            });
        }
        for (name, draft) in runtimes {
            let table = format!("runtimes.{name}");
            let missing = |key: &str, reason: &str| ConfigError::Missing {
                origin: origin(&table),
                key: format!("{table}.{key}"),
                reason: reason.to_owned(),
            };
            let kind = draft.kind.ok_or_else(|| missing("type", "it is \"builtin\" or \"oci\""))?;
            match kind {
                RuntimeKind::Oci if draft.path.is_none() => {
                    return Err(missing("path", "with type = \"oci\" it says which program to run"));
                }
                RuntimeKind::Oci if name == Runtime::BUILT_IN => {
                    let key = format!("{table}.type");
                    return Err(ConfigError::Value {
                        origin: origin(&key),
                        key,
                        value: format!("{:?}", kind.as_str()),
                        reason: "can't be: that handler is the built-in executor".to_owned(),
                    });
                }
                RuntimeKind::Oci => {}
                RuntimeKind::Builtin => {
                    for (key, value) in [
                        ("path", draft.path.as_ref().map(|path| format!("{path:?}"))),
                        ("root", draft.root.as_ref().map(|path| format!("{path:?}"))),
                        ("args", draft.args.as_ref().map(|args| format!("{args:?}"))),
                        ("timeout", draft.timeout.map(|timeout| timeout.to_string())),
                    ] {
                        let Some(value) = value else { continue };
                        let key = format!("{table}.{key}");
                        return Err(ConfigError::Value {
                            origin: origin(&key),
                            key,
                            value,
                            reason: "has no meaning with type = \"builtin\"".to_owned(),
                        });
                    }
                }
            }
            let Draft { path, root, args, timeout, pids_limit, .. } = draft;
            let args = args.unwrap_or_default();
            config.runtimes.insert(name, Runtime { kind, path, root, args, timeout, pids_limit });
        }
        let known = |name: &str| name == Runtime::BUILT_IN || config.runtimes.contains_key(name);
        if !known(&config.default_runtime) {
            let mut names = vec![Runtime::BUILT_IN];
            names
                .extend(config.runtimes.keys().map(String::as_str).filter(|name| *name != Runtime::BUILT_IN));
            return Err(ConfigError::Value {
                origin: origin("default_runtime"),
                key: "default_runtime".to_owned(),
                value: format!("{:?}", config.default_runtime),
                reason: format!("is no runtime handler; there are {names:?}"),
            });
        }
        Ok(config)
    }
}

/// The value without its place in the file. No key takes a table, a float or a date.
fn plain(value: &DeValue<'_>) -> Result<Value, String> {
    Ok(match value {
        DeValue::String(text) => Value::String(text.to_string()),
        DeValue::Boolean(flag) => Value::Boolean(*flag),
        DeValue::Integer(digits) => i64::from_str_radix(digits.as_str(), digits.radix())
            .map(Value::Integer)
            .map_err(|_| "is out of range".to_owned())?,
        DeValue::Array(entries) => {
            Value::Array(entries.iter().map(|entry| plain(entry.get_ref())).collect::<Result<_, _>>()?)
        }
        other => return Err(format!("is of type {}, which no key takes", other.type_str())),
    })
}

/// A key as it would be written: quoted if it must be.
fn bare(key: &str) -> String {
    if !key.is_empty() && key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_') {
        key.to_owned()
    } else {
        format!("{key:?}")
    }
}

fn unknown(origin: Origin, prefix: &str, key: String) -> ConfigError {
    let mut known: Vec<&str> = Vec::new();
    if prefix.starts_with("runtimes.") {
        known.extend(RUNTIME_KEYS.iter().map(|(name, _)| *name));
    } else {
        for key in KEYS {
            let rest = match prefix {
                "" => Some(key.name),
                prefix => key.name.strip_prefix(prefix).and_then(|rest| rest.strip_prefix('.')),
            };
            let Some(name) = rest.and_then(|rest| rest.split('.').next()) else { continue };
            if known.last() != Some(&name) {
                known.push(name);
            }
        }
        if prefix.is_empty() {
            known.push("runtimes");
        }
    }
    let place = if prefix.is_empty() { "the top level".to_owned() } else { format!("[{prefix}]") };
    ConfigError::UnknownKey { origin, key, hint: format!("{place} has {}", known.join(", ")) }
}

//! From JSON to a profile. Errors know their line: everything is checked while it is read.

use std::fmt;
use std::marker::PhantomData;
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags};
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, Deserializer, MapAccess, Visitor};
use serde::{Deserialize, de::DeserializeOwned};
use stave_paths::PathError;

use crate::profile::{Action, Argument, Conditions, Operator, Profile, Rule};
use crate::{Arch, SeccompError};

/// Largest profile, in bytes. The common default profiles have some 15 KB.
pub const PROFILE_MAX: u64 = 1 << 20;

/// Most `args` of a rule: there are 6 to ask for.
const ARGS_MAX: usize = 64;

/// MAX_ERRNO: the kernel cuts larger ones.
const ERRNO_MAX: u32 = 4095;

/// Reads a profile from a file on the host: a regular one of at most [`PROFILE_MAX`] bytes.
pub fn read(path: &Path) -> Result<String, SeccompError> {
    let io = |call, source: std::io::Error| PathError::Io { call, path: path.to_owned(), source };
    // A FIFO must not keep us waiting.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let fd = rustix::fs::openat(CWD, path, flags, Mode::empty()).map_err(|e| io("open", e.into()))?;
    let bytes = stave_paths::read_regular(fd, path, PROFILE_MAX)?;
    String::from_utf8(bytes).map_err(|error| {
        let valid = error.utf8_error().valid_up_to();
        let (line, column) = position(error.as_bytes().get(..valid).unwrap_or_default());
        SeccompError::Syntax {
            source_name: path.display().to_string(),
            line,
            column,
            message: "is not UTF-8".to_owned(),
        }
    })
}

/// Reads a profile. `source` says in errors where it comes from.
pub fn parse(json: &str, source: &str) -> Result<Profile, SeccompError> {
    let raw: RawProfile = serde_json::from_str(json).map_err(|error| {
        let (line, column) = (error.line(), error.column());
        let text = error.to_string();
        let position = format!(" at line {line} column {column}");
        SeccompError::Syntax {
            source_name: source.to_owned(),
            line,
            column,
            message: text.strip_suffix(&position).unwrap_or(&text).to_owned(),
        }
    })?;
    // What can be seen of the whole only is told at the key.
    let at_key = |key: &str, message: String| {
        let before = json.find(&format!("\"{key}\"")).and_then(|at| json.get(..at)).unwrap_or_default();
        let (line, column) = position(before.as_bytes());
        SeccompError::Syntax { source_name: source.to_owned(), line, column, message }
    };
    if !raw.architectures.is_empty() && !raw.arch_map.is_empty() {
        return Err(at_key("archMap", "architectures and archMap exclude each other".to_owned()));
    }
    let default_action = raw
        .default_action
        .with("defaultErrnoRet", raw.default_errno_ret)
        .map_err(|message| at_key("defaultErrnoRet", message))?;
    let arches = |arches: Vec<RawArch>| arches.into_iter().map(|arch| arch.0).collect();
    Ok(Profile {
        default_action,
        architectures: arches(raw.architectures),
        arch_map: raw
            .arch_map
            .into_iter()
            .map(|map| (map.architecture.0, arches(map.sub_architectures)))
            .collect(),
        rules: raw.syscalls.into_iter().map(|rule| rule.0).collect(),
        flags: raw.flags.iter().fold(0, |all, flag| all | flag.0),
    })
}

/// Line and column, from 1, of what comes after `text`.
fn position(text: &[u8]) -> (usize, usize) {
    let line_start = text.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
    (1 + text.iter().filter(|b| **b == b'\n').count(), 1 + text.len() - line_start)
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawProfile {
    #[serde(deserialize_with = "action")]
    default_action: RawAction,
    #[serde(default)]
    default_errno_ret: Option<u32>,
    #[serde(default, deserialize_with = "nullable")]
    architectures: Vec<RawArch>,
    #[serde(default, deserialize_with = "nullable")]
    arch_map: Vec<RawArchMap>,
    #[serde(default, deserialize_with = "nullable")]
    syscalls: Vec<RawRule>,
    #[serde(default, deserialize_with = "nullable")]
    flags: Vec<RawFlag>,
    #[serde(default, rename = "listenerPath")]
    _listener_path: NoListener,
    #[serde(default, rename = "listenerMetadata")]
    _listener_metadata: NoListener,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawArchMap {
    architecture: RawArch,
    #[serde(default, deserialize_with = "nullable")]
    sub_architectures: Vec<RawArch>,
}

struct RawRule(Rule);

impl<'de> Deserialize<'de> for RawRule {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Raw {
            #[serde(default, deserialize_with = "nullable")]
            names: Vec<String>,
            /// Docker's older form.
            #[serde(default)]
            name: Option<String>,
            #[serde(deserialize_with = "action")]
            action: RawAction,
            #[serde(default)]
            errno_ret: Option<u32>,
            #[serde(default, deserialize_with = "nullable")]
            args: Vec<RawArgument>,
            #[serde(default, deserialize_with = "nullable")]
            includes: RawConditions,
            #[serde(default, deserialize_with = "nullable")]
            excludes: RawConditions,
        }
        object(deserializer, |raw: Raw| {
            let names = match (raw.name.filter(|name| !name.is_empty()), raw.names) {
                (None, names) if names.is_empty() => return Err("a rule needs names".to_owned()),
                (None, names) => names,
                (Some(name), names) if names.is_empty() => vec![name],
                (Some(_), _) => return Err("name and names exclude each other".to_owned()),
            };
            if raw.args.len() > ARGS_MAX {
                return Err(format!("a rule has at most {ARGS_MAX} args"));
            }
            Ok(Self(Rule {
                names,
                action: raw.action.with("errnoRet", raw.errno_ret)?,
                args: raw.args.into_iter().map(|arg| arg.0).collect(),
                includes: raw.includes.0,
                excludes: raw.excludes.0,
            }))
        })
    }
}

struct RawArgument(Argument);

impl<'de> Deserialize<'de> for RawArgument {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Raw {
            index: u8,
            value: u64,
            #[serde(default, deserialize_with = "nullable")]
            value_two: u64,
            #[serde(deserialize_with = "operator")]
            op: Operator,
        }
        object(deserializer, |Raw { index, value, value_two, op }: Raw| {
            if index > 5 {
                return Err(format!("index {index}: a system call has arguments 0 to 5"));
            }
            Ok(Self(Argument { index, operator: op, value, value_two }))
        })
    }
}

#[derive(Default)]
struct RawConditions(Conditions);

impl<'de> Deserialize<'de> for RawConditions {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Raw {
            #[serde(default, deserialize_with = "nullable")]
            caps: Vec<RawCapability>,
            #[serde(default, deserialize_with = "nullable")]
            arches: Vec<String>,
            #[serde(default, deserialize_with = "nullable")]
            min_kernel: RawKernel,
        }
        object(deserializer, |raw: Raw| {
            Ok(Self(Conditions {
                caps: raw.caps.iter().fold(0, |all, cap| all | cap.0),
                arches: raw.arches,
                min_kernel: raw.min_kernel.0,
            }))
        })
    }
}

/// An action, of which the number is still to come.
enum RawAction {
    Whole(Action),
    Errno,
    Trace,
}

impl RawAction {
    fn find(name: &str) -> Option<Self> {
        Some(match name {
            "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => Self::Whole(Action::KillThread),
            "SCMP_ACT_KILL_PROCESS" => Self::Whole(Action::KillProcess),
            "SCMP_ACT_TRAP" => Self::Whole(Action::Trap),
            "SCMP_ACT_ERRNO" => Self::Errno,
            "SCMP_ACT_TRACE" => Self::Trace,
            "SCMP_ACT_LOG" => Self::Whole(Action::Log),
            "SCMP_ACT_ALLOW" => Self::Whole(Action::Allow),
            _ => return None,
        })
    }

    fn with(self, field: &str, number: Option<u32>) -> Result<Action, String> {
        const EPERM: u32 = 1;
        let at_most = |max: u32| {
            let number = number.unwrap_or(EPERM);
            let small = u16::try_from(number).ok().filter(|_| number <= max);
            small.ok_or_else(|| format!("{field} {number} is above {max}"))
        };
        match (self, number) {
            (Self::Errno, _) => at_most(ERRNO_MAX).map(Action::Errno),
            (Self::Trace, _) => at_most(u16::MAX.into()).map(Action::Trace),
            (Self::Whole(action), None) => Ok(action),
            (Self::Whole(action), Some(number)) => {
                Err(format!("{field} {number} does not go with the action {action:?}"))
            }
        }
    }
}

fn action<'de, D: Deserializer<'de>>(deserializer: D) -> Result<RawAction, D::Error> {
    word(deserializer, "action", |name| match name {
        "SCMP_ACT_NOTIFY" => {
            Err("action SCMP_ACT_NOTIFY needs a listener, and listeners are not built yet".to_owned())
        }
        name => RawAction::find(name).ok_or_else(|| format!("unknown action {name:?}")),
    })
}

fn operator<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Operator, D::Error> {
    word(deserializer, "operator", |name| {
        Ok(match name {
            "SCMP_CMP_NE" => Operator::NotEqual,
            "SCMP_CMP_LT" => Operator::Less,
            "SCMP_CMP_LE" => Operator::LessOrEqual,
            "SCMP_CMP_EQ" => Operator::Equal,
            "SCMP_CMP_GE" => Operator::GreaterOrEqual,
            "SCMP_CMP_GT" => Operator::Greater,
            "SCMP_CMP_MASKED_EQ" => Operator::MaskedEqual,
            name => return Err(format!("unknown operator {name:?}")),
        })
    })
}

struct RawArch(Arch);

impl<'de> Deserialize<'de> for RawArch {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        word(deserializer, "architecture", |name| {
            Arch::from_scmp(name).map(Self).ok_or_else(|| format!("unknown architecture {name:?}"))
        })
    }
}

struct RawFlag(u32);

impl<'de> Deserialize<'de> for RawFlag {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        word(deserializer, "flag", |name| {
            Ok(Self(match name {
                // The process has one thread when it gets its filter.
                "SECCOMP_FILTER_FLAG_TSYNC" => 0,
                "SECCOMP_FILTER_FLAG_LOG" => 2,
                "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => 4,
                // Means something with a listener only.
                "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV" => 0,
                name => return Err(format!("unknown flag {name:?}")),
            }))
        })
    }
}

/// A capability's bit.
struct RawCapability(u64);

impl<'de> Deserialize<'de> for RawCapability {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        word(deserializer, "capability", |name| {
            let number = stave_sys::CAPABILITY_NAMES
                .iter()
                .position(|known| name.strip_prefix("CAP_") == Some(*known));
            number.map(|number| Self(1 << number)).ok_or_else(|| format!("unknown capability {name:?}"))
        })
    }
}

/// "major.minor".
#[derive(Default)]
struct RawKernel(Option<(u32, u32)>);

impl<'de> Deserialize<'de> for RawKernel {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        word(deserializer, "kernel version", |text| {
            if text.is_empty() {
                return Ok(Self(None));
            }
            let version = text
                .split_once('.')
                .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
            version
                .map(|version| Self(Some(version)))
                .ok_or_else(|| format!("minKernel {text:?} is not a version like \"4.8\""))
        })
    }
}

/// A string that has to be empty.
#[derive(Default)]
struct NoListener;

impl<'de> Deserialize<'de> for NoListener {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Option::<String>::deserialize(deserializer)?.as_deref() {
            None | Some("") => Ok(Self),
            Some(value) => Err(de::Error::custom(format!("listener {value:?}: listeners are not built yet"))),
        }
    }
}

/// Go writes null for what is empty.
fn nullable<'de, D: Deserializer<'de>, T: DeserializeOwned + Default>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

/// An object, and what is to be said about it as a whole. The parser adds the position, its end, to errors of a visitor.
fn object<'de, D, R, T, F>(deserializer: D, check: F) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    R: Deserialize<'de>,
    F: FnOnce(R) -> Result<T, String>,
{
    struct Object<R, F>(F, PhantomData<R>);
    impl<'de, R: Deserialize<'de>, T, F: FnOnce(R) -> Result<T, String>> Visitor<'de> for Object<R, F> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
            let raw = R::deserialize(MapAccessDeserializer::new(map))?;
            (self.0)(raw).map_err(de::Error::custom)
        }
    }
    deserializer.deserialize_map(Object(check, PhantomData))
}

/// A word out of a known set. Errors get their position here, too.
fn word<'de, D, T, F>(deserializer: D, what: &'static str, find: F) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    F: FnOnce(&str) -> Result<T, String>,
{
    struct Word<F>(&'static str, F);
    impl<T, F: FnOnce(&str) -> Result<T, String>> Visitor<'_> for Word<F> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "the name of the {}", self.0)
        }

        fn visit_str<E: de::Error>(self, name: &str) -> Result<T, E> {
            (self.1)(name).map_err(E::custom)
        }
    }
    deserializer.deserialize_str(Word(what, find))
}

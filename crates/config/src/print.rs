use std::fmt::Write as _;

use toml::Value;

use crate::keys::{KEYS, RUNTIME_KEYS, RUNTIMES_DOC, path_value};
use crate::{Config, Runtime};

/// The width of a comment, "# " included.
const WIDTH: usize = 100;

impl Config {
    /// The effective configuration as TOML, each key under a comment that explains it and names its default.
    /// Loading it gives this configuration again.
    pub fn to_commented_toml(&self) -> String {
        let defaults = Config::default();
        let mut out = String::new();
        let mut table = "";
        for key in KEYS {
            let (in_table, name) = key.split();
            if in_table != table {
                let _ = writeln!(out, "\n[{in_table}]");
                table = in_table;
            } else if !out.is_empty() {
                out.push('\n');
            }
            comment(&mut out, &format!("{} Default: {}.", key.doc, (key.get)(&defaults)));
            let _ = writeln!(out, "{name} = {}", (key.get)(self));
        }
        out.push('\n');
        comment(&mut out, RUNTIMES_DOC);
        if self.runtimes.is_empty() {
            let example = Runtime {
                path: Some("/usr/bin/runc".into()),
                root: Some("/run/stave/runtimes/runc".into()),
                timeout: Some(Runtime::TIMEOUT),
                pids_limit: Some(4096),
                ..Runtime::new(crate::RuntimeKind::Oci)
            };
            // Each line a comment; what is a comment already stays as it is.
            for line in runtime("runc", &example).lines() {
                let _ = match line.starts_with('#') {
                    true => writeln!(out, "{line}"),
                    false => writeln!(out, "# {line}"),
                };
            }
        }
        for (name, described) in &self.runtimes {
            out.push_str(&runtime(name, described));
        }
        out
    }
}

fn runtime(name: &str, runtime: &Runtime) -> String {
    let mut out = format!("[runtimes.{name}]\n");
    for (key, doc) in RUNTIME_KEYS {
        let value = match *key {
            "type" => Some(Value::from(runtime.kind.as_str())),
            "path" => runtime.path.as_deref().map(path_value),
            "root" => runtime.root.as_deref().map(path_value),
            "args" if runtime.args.is_empty() => None,
            "args" => Some(Value::Array(runtime.args.iter().map(|arg| arg.clone().into()).collect())),
            "timeout" => runtime.timeout.map(|seconds| i64::from(seconds).into()),
            _ => runtime.pids_limit.map(Value::from),
        };
        if let Some(value) = value {
            comment(&mut out, doc);
            let _ = writeln!(out, "{key} = {value}");
        }
    }
    out
}

/// Appends `text` as comment lines, broken at blanks.
fn comment(out: &mut String, text: &str) {
    let mut line = String::from("#");
    for word in text.split_whitespace() {
        if line.len() + 1 + word.len() > WIDTH {
            let _ = writeln!(out, "{line}");
            line.truncate(1);
        }
        line.push(' ');
        line.push_str(word);
    }
    let _ = writeln!(out, "{line}");
}

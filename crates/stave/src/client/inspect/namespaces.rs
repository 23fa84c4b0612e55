//! Namespaces: whose they should be, and whose they are.

use serde_json::Value;

use super::Asked;
use super::procfs::{Proc, own_namespace};
use super::report::Row;

/// Name under /proc/PID/ns, name in the OCI specification.
const KINDS: [(&str, &str); 8] = [
    ("mnt", "mount"),
    ("pid", "pid"),
    ("net", "network"),
    ("ipc", "ipc"),
    ("uts", "uts"),
    ("cgroup", "cgroup"),
    ("user", "user"),
    ("time", "time"),
];

pub(crate) fn rows(asked: &Asked, proc: &Proc) -> anyhow::Result<Vec<Row>> {
    let supervisor = Proc::open(asked.supervisor).ok();
    let target = Proc::open(asked.pid_target).ok();
    let mut rows = Vec::new();
    for (name, oci) in KINDS {
        let Some(own) = proc.namespace(name)? else { continue };
        let of = |other: &Option<Proc>| match other {
            Some(other) => other.namespace(name),
            None => Ok(None),
        };
        let is_pid = name == "pid";
        let kernel = if own_namespace(name)?.as_ref() == Some(&own) {
            "node"
        } else if of(&supervisor)?.as_ref() == Some(&own) {
            "pod"
        } else if is_pid && of(&target)?.as_ref() == Some(&own) {
            "target"
        } else if matches!(name, "user" | "time") {
            // The supervisor is never in these itself, and containers have none of their own.
            "pod"
        } else if is_pid && !is_first(proc) {
            // The supervisor is not in it, nor is it PID 1.
            "pod"
        } else {
            "container"
        };
        let row = Row::compare(name, wanted(asked, oci), kernel);
        // What is not the node's belongs to the user namespace that its processes are in, or root of that one has no
        // rights in it.
        let owner = if name == "user" || kernel == "node" { None } else { proc.owner(name) };
        let user = proc.namespace("user")?;
        rows.push(match owner {
            Some(owner) if Some(&owner) != user.as_ref() => {
                row.detail(format!("{own}, of another user namespace: {owner}")).differs(true)
            }
            Some(owner) => row.detail(format!("{own}, of {owner}")),
            None => row.detail(own),
        });
    }
    Ok(rows)
}

/// It is PID 1 of its PID namespace.
fn is_first(proc: &Proc) -> bool {
    proc.status("NSpid").rsplit(' ').next() == Some("1")
}

fn wanted(asked: &Asked, oci: &str) -> &'static str {
    const TARGET: i64 = 3;
    let options = &asked.config["linux"]["security_context"]["namespace_options"];
    if oci == "pid" && options["pid"].as_i64() == Some(TARGET) {
        return "target";
    }
    of_specification(&asked.spec, oci)
}

fn of_specification(spec: &Value, oci: &str) -> &'static str {
    let all = spec["linux"]["namespaces"].as_array().map(Vec::as_slice).unwrap_or_default();
    match all.iter().find(|namespace| namespace["type"] == oci) {
        None => "node",
        Some(namespace) if namespace["path"].is_string() => "pod",
        Some(_) => "container",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn words_of_the_specification() {
        let spec = json!({ "linux": { "namespaces": [
            { "type": "mount" }, { "type": "network", "path": "/proc/self/ns/net" },
        ] } });
        let words = ["mount", "network", "user"].map(|kind| of_specification(&spec, kind));
        assert_eq!(words, ["container", "pod", "node"]);
    }
}

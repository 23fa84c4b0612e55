//! Network namespaces, by the numbers that the node's own has for them. It gives one to each that a veth leads to, and takes it
//! back when that namespace ends, whether the veth is still there or not.

use std::collections::BTreeSet;
use std::process::Command;

use serde_json::Value;

/// Those behind the ports of a bridge.
pub fn namespaces_behind(bridge: &str) -> BTreeSet<i64> {
    numbers(&ip(&["link", "show", "master", bridge]), "link_netnsid")
}

/// Those that live, and that no interface of the node leads to any more. The numbers are given out again, and other tests have
/// namespaces that are about to end: what is found must be looked at again.
pub fn namespaces_without_link() -> BTreeSet<i64> {
    // In this order: one that is made meanwhile is not taken for one without.
    let living = numbers(&ip(&["netns", "list-id"]), "nsid");
    let linked = numbers(&ip(&["link", "show"]), "link_netnsid");
    living.difference(&linked).copied().collect()
}

fn ip(arguments: &[&str]) -> Value {
    let output = Command::new("ip").arg("-json").args(arguments).output().expect("ip");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("ip {arguments:?}: {e}: {text}"))
}

fn numbers(list: &Value, key: &str) -> BTreeSet<i64> {
    list.as_array().into_iter().flatten().filter_map(|one| one[key].as_i64()).collect()
}

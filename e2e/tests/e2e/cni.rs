//! Mode "cni": Debian's plugins for traffic, and plugins written for the test for all else.

mod hostile;
mod pool;
mod recovery;
mod status;
mod traffic;

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use stave_e2e::{Daemon, Options, Pod};

/// A daemon in this mode with the busybox image, and no configuration yet.
async fn start() -> Daemon {
    start_with(Options::default()).await
}

async fn start_with(options: Options) -> Daemon {
    for plugin in ["bridge", "host-local", "portmap", "bandwidth", "tuning", "loopback", "macvlan", "ipvlan"]
    {
        let path = Path::new("/usr/lib/cni").join(plugin);
        assert!(path.exists(), "{}: install containernetworking-plugins", path.display());
    }
    Daemon::with(Options { cni: true, image: Some(crate::busybox()), ..options }).await
}

fn conf_dir(daemon: &Daemon) -> PathBuf {
    daemon.directory().join("net.d")
}

/// Writes a configuration as installers do: whole.
fn configure(daemon: &Daemon, name: &str, content: &str) {
    fs::create_dir_all(conf_dir(daemon)).expect("directory of configurations");
    let tmp = daemon.directory().join("configuration");
    fs::write(&tmp, content).expect("configuration");
    fs::rename(tmp, conf_dir(daemon).join(name)).expect("configuration");
}

/// Whether the network is ready, and the condition's reason and message.
pub(crate) async fn condition(daemon: &Daemon) -> (bool, String, String) {
    let status = daemon.cri.status(Default::default()).await.expect("Status").status.expect("status");
    let network = status.conditions.into_iter().find(|condition| condition.r#type == "NetworkReady");
    let network = network.expect("NetworkReady");
    (network.status, network.reason, network.message)
}

async fn ready(daemon: &Daemon) {
    stave_e2e::eventually("NetworkReady", async || condition(daemon).await.0.then_some(())).await;
}

/// Waits until the network is not ready, with these words in the message.
async fn unready(daemon: &Daemon, words: &str) {
    stave_e2e::eventually(words, async || {
        let (ready, reason, message) = condition(daemon).await;
        (!ready && reason == "NetworkPluginNotReady" && message.contains(words)).then_some(())
    })
    .await;
}

/// A shell script as a plugin of this daemon.
fn plugin(daemon: &Daemon, name: &str, script: &str) {
    let dir = daemon.directory().join("plugins");
    fs::create_dir_all(&dir).expect("directory of plugins");
    let [text, tmp] = ["script", "plugin"].map(|name| daemon.directory().join(name));
    fs::write(&text, format!("#!/bin/sh\n{script}\n")).expect("plugin");
    // Not by us: what another test forks at that moment would have it open for writing, and it could not be run.
    let made = std::process::Command::new("install").args([&text, &tmp]).status().expect("install");
    assert!(made.success(), "{}: {made}", tmp.display());
    fs::rename(tmp, dir.join(name)).expect("plugin");
}

/// A plugin that writes down how it was called, and gives every pod the address 10.9.9.9. `more` runs first; it has
/// the command in `$CNI_COMMAND`.
fn recorder(daemon: &Daemon, name: &str, more: &str) {
    let calls = daemon.directory().join("calls");
    fs::create_dir_all(&calls).expect("directory of calls");
    let calls = calls.display();
    plugin(
        daemon,
        name,
        &format!(
            "n=$(date +%s%N); input=$(cat)\n\
             if [ \"$CNI_COMMAND\" = VERSION ]; then\n\
               echo '{{\"cniVersion\": \"1.1.0\", \"supportedVersions\": [\"0.3.1\", \"0.4.0\", \"1.0.0\", \"1.1.0\"]}}'; exit\n\
             fi\n\
             {more}\n\
             printf '{{\"at\": %s, \"plugin\": \"{name}\", \"command\": \"%s\", \"id\": \"%s\", \"netns\": \"%s\", \"args\": \"%s\", \"input\": %s}}' \
             \"$n\" \"$CNI_COMMAND\" \"$CNI_CONTAINERID\" \"$CNI_NETNS\" \"$CNI_ARGS\" \"$input\" > {calls}/.$n-$$\n\
             mv {calls}/.$n-$$ {calls}/$n-$$.json\n\
             [ \"$CNI_COMMAND\" != ADD ] || echo '{{\"cniVersion\": \"1.0.0\", \"interfaces\": [{{\"name\": \"eth0\", \"sandbox\": \"'$CNI_NETNS'\"}}], \
             \"ips\": [{{\"address\": \"10.9.9.9/24\", \"interface\": 0}}]}}'"
        ),
    );
}

/// What recorders wrote down, in order, without STATUS.
fn calls(daemon: &Daemon) -> Vec<Value> {
    let dir = fs::read_dir(daemon.directory().join("calls")).into_iter().flatten().flatten();
    let files = dir.map(|entry| entry.path()).filter(|path| path.extension().is_some());
    let mut calls: Vec<Value> = files
        .map(|path| {
            let text = fs::read_to_string(&path).expect("a call");
            serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
        })
        .filter(|call: &Value| call["command"] != "STATUS")
        .collect();
    calls.sort_by_key(|call| call["at"].as_u64());
    calls
}

/// "ADD a", "DEL b", ...: which plugins were called for what.
fn short(calls: &[Value]) -> Vec<String> {
    let word = |call: &Value, key: &str| call[key].as_str().unwrap_or_default().to_owned();
    calls.iter().map(|call| format!("{} {}", word(call, "command"), word(call, "plugin"))).collect()
}

fn list(version: &str, plugins: &[Value]) -> Value {
    json!({ "cniVersion": version, "name": format!("net-{}", std::process::id()), "plugins": plugins })
}

async fn addresses(daemon: &Daemon, pod: &Pod) -> Vec<String> {
    let network = daemon.cri.pod(&pod.id).await.expect("PodSandboxStatus").network.expect("network");
    let mut all = vec![network.ip];
    all.extend(network.additional_ips.into_iter().map(|ip| ip.ip));
    all
}

/// Nothing of CNI is left beside what the daemon itself has.
fn assert_nothing_kept(daemon: &Daemon) {
    for dir in ["root/network/cni", "state/cni", "netns"] {
        let names: Vec<_> = fs::read_dir(daemon.directory().join(dir))
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.file_name())
            .filter(|name| name != ".broken")
            .collect();
        assert!(names.is_empty(), "{dir}: {names:?}");
    }
}

//! What an OCI runtime gets: config.json of a bundle that the supervisor makes ready, and process.json.
//!
//! It differs from the specification that people see where the supervisor has done a part already: volumes and the pod's
//! PID namespace are mounted in the bundle, and the cgroup has its limits.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{Capabilities, LinuxDevice, LinuxNamespaceType, LinuxResources, Mount, Spec};
use serde_json::{Map, Value};
use stave_supervisor_proto::v1::device::Kind as DeviceKind;
use stave_supervisor_proto::v1::{self as proto, OciProcess, Plan, mount};

use crate::create::CONFIG;
use crate::error::{Code, Error, Result};
use crate::pod::Container;
use crate::pods::{Inner, blocking};
use crate::runtimes::OciRuntime;

/// The runtime's bundle, in the container's.
pub(crate) const BUNDLE: &str = "oci";
/// Where the file systems of a container in a user namespace are attached, in the mount namespace that only the runtime's
/// `create` sees: a directory that everybody may pass, every host has, and nothing there needs.
const STAGE_DIR: &str = "/dev/shm";
/// The version of the specification that config.json is written for. crun before 1.9 knows no later one.
const VERSION: &str = "1.0.2";
/// The first version with time namespaces.
const VERSION_WITH_TIME: &str = "1.1.0";
/// Most bytes of a config.json that is read back.
const CONFIG_MAX: u64 = 16 << 20;

/// What this process and its host can give to others, and so to a runtime.
#[derive(Clone, Debug)]
pub(crate) struct Rights {
    /// Names of the bounding set's capabilities, as CAP_CHOWN.
    pub(crate) bounding: Vec<String>,
    /// The least oom_score_adj that can be set.
    pub(crate) least_oom_score: i32,
    /// Names of the directories in /sys/fs/cgroup, on a host with hierarchies of cgroup v1.
    pub(crate) hierarchies: Vec<String>,
}

/// The runtime's part of CreateContainer.
///
/// Errors: FailedPrecondition for what an OCI runtime can't be asked for.
pub(crate) fn runtime(
    oci: &OciRuntime,
    pod_id: &str,
    bundle: &Path,
    spec: &Spec,
    plan: &Plan,
    rights: &Rights,
) -> Result<proto::OciRuntime> {
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let dir = bundle.join(BUNDLE);
    let stage_dir = in_user_namespace(spec).then(|| Path::new(STAGE_DIR));
    Ok(proto::OciRuntime {
        handler: oci.handler.clone(),
        program: text(&oci.program),
        args: oci.args.clone(),
        root: text(&oci.root_of(pod_id)),
        bundle: text(&dir),
        config: Some(split(config(spec, plan, &dir, stage_dir, rights)?)?),
        timeout_ms: oci.timeout_ms,
        stage_dir: stage_dir.map(text).unwrap_or_default(),
    })
}

/// The container is in a user namespace.
pub(crate) fn in_user_namespace(spec: &Spec) -> bool {
    has(spec, LinuxNamespaceType::User)
}

fn has(spec: &Spec, kind: LinuxNamespaceType) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    namespaces.is_some_and(|all| all.iter().any(|namespace| namespace.typ() == kind))
}

fn config(spec: &Spec, plan: &Plan, dir: &Path, stage_dir: Option<&Path>, rights: &Rights) -> Result<Spec> {
    let mut spec = spec.clone();
    let mapped = in_user_namespace(&spec);
    let version = if has(&spec, LinuxNamespaceType::Time) { VERSION_WITH_TIME } else { VERSION };
    spec.set_version(version.to_owned());
    if let (Some(stage_dir), Some(root)) = (stage_dir, spec.root_mut()) {
        root.set_path(stage_dir.join("rootfs"));
    }
    let places = stage_dir.unwrap_or(dir).join("mounts");
    let mounts = spec.mounts().clone().unwrap_or_default();
    if mounts.len() != plan.mounts.len() {
        return Err(Error::new(Code::Internal, "specification and plan differ in their mounts"));
    }
    let cgroups = mounts.iter().find(|mount| mount.typ().as_deref() == Some("cgroup") && is_read_only(mount));
    let cgroups = cgroups.map(|mount| mount.destination().display().to_string());
    let mounts = mounts.into_iter().zip(&plan.mounts).enumerate();
    let mut mounts: Vec<_> = mounts.map(|(n, (mount, planned))| staged(mount, planned, &places, n)).collect();
    if let Some(linux) = spec.linux_mut() {
        // runc leaves the tmpfs above the hierarchies of v1 writable, youki the hierarchies.
        if let Some(path) = cgroups.filter(|_| !rights.hierarchies.is_empty()) {
            let mut paths = linux.readonly_paths().clone().unwrap_or_default();
            paths.extend(rights.hierarchies.iter().map(|name| format!("{path}/{name}")));
            paths.push(path);
            linux.set_readonly_paths(Some(paths));
        }
        // Mounts of the container propagate to the node from what is shared itself. Recursively, newer versions of runc make
        // the private ones shared as well.
        if linux.rootfs_propagation().as_deref() == Some("rshared") {
            linux.set_rootfs_propagation(Some("shared".to_owned()));
        }
        let mut namespaces = linux.namespaces().clone().unwrap_or_default();
        for namespace in &mut namespaces {
            match namespace.typ() {
                LinuxNamespaceType::User => {
                    namespace.set_path(Some(dir.join("ns/user")));
                }
                LinuxNamespaceType::Time => {
                    namespace.set_path(Some(dir.join("ns/time")));
                }
                LinuxNamespaceType::Pid if namespace.path().is_some() => {
                    namespace.set_path(Some(dir.join("ns/pid")));
                }
                _ => {}
            }
        }
        linux.set_namespaces(Some(namespaces));
        // They are written already, and are for new namespaces only.
        linux.set_time_offsets(None);
        // In a directory of the host nothing is made.
        let mut devices = linux.devices().clone().unwrap_or_default();
        devices.retain(|device| {
            let mut all = plan.devices.iter().enumerate();
            let planned = all.find(|(_, planned)| Path::new(&planned.path) == device.path());
            let Some((n, planned)) = planned else { return false };
            // In a user namespace no runtime can make a node, and what they bind is the node's own at the same path.
            match stage_dir {
                Some(stage_dir) if planned.kind() != DeviceKind::Fifo && !is_the_nodes(device) => {
                    mounts.push(bound(device.path(), stage_dir.join("devices").join(n.to_string())));
                    false
                }
                _ => true,
            }
        });
        linux.set_devices((!devices.is_empty()).then_some(devices));
        // The limits are in the cgroup already. A runtime may convert them in other ways, or lack their controller.
        let rules = linux.resources().as_ref().and_then(|resources| resources.devices().clone());
        let mut resources = LinuxResources::default();
        resources.set_devices(rules);
        linux.set_resources(Some(resources));
    }
    spec.set_mounts(Some(mounts));
    if let Some(process) = spec.process_mut() {
        let score = process.oom_score_adj().map(|score| score.max(rights.least_oom_score));
        process.set_oom_score_adj(score);
        // In a user namespace of its own nothing is lacking (user_namespaces(7)).
        if !mapped && let Some(mut caps) = process.capabilities().clone() {
            let had = |set: &Option<Capabilities>| set.as_ref().map(|set| within(set, &rights.bounding));
            let sets =
                [caps.bounding(), caps.effective(), caps.permitted(), caps.inheritable(), caps.ambient()]
                    .map(had);
            let [bounding, effective, permitted, inheritable, ambient] = sets;
            caps.set_bounding(bounding)
                .set_effective(effective)
                .set_permitted(permitted)
                .set_inheritable(inheritable)
                .set_ambient(ambient);
            process.set_capabilities(Some(caps));
        }
    }
    Ok(spec)
}

fn is_read_only(mount: &Mount) -> bool {
    mount.options().as_ref().is_some_and(|options| options.iter().any(|option| option == "ro"))
}

/// The node has the same device at the same path.
fn is_the_nodes(device: &LinuxDevice) -> bool {
    let number = |n: i64| u32::try_from(n).ok();
    let (Some(major), Some(minor)) = (number(device.major()), number(device.minor())) else { return false };
    std::fs::symlink_metadata(device.path())
        .is_ok_and(|found| std::os::unix::fs::MetadataExt::rdev(&found) == rustix::fs::makedev(major, minor))
}

/// A device node that the supervisor makes.
fn bound(path: &Path, source: PathBuf) -> Mount {
    let mut mount = Mount::default();
    mount
        .set_destination(path.to_owned())
        .set_typ(Some("bind".to_owned()))
        .set_source(Some(source))
        .set_options(Some(["bind", "rprivate", "nosuid", "noexec"].map(str::to_owned).into()));
    mount
}

/// What we lack ourselves no container can have; some runtimes fail over it.
fn within(set: &Capabilities, bounding: &[String]) -> Capabilities {
    let has = |name: String| {
        bounding.iter().any(|has| has.trim_start_matches("CAP_") == name.trim_start_matches("CAP_"))
    };
    set.iter().filter(|capability| has(capability.to_string())).copied().collect()
}

/// A volume is where the supervisor mounts it, with its attributes.
fn staged(mut mount: Mount, planned: &proto::Mount, places: &Path, n: usize) -> Mount {
    let source = places.join(n.to_string());
    let options: Vec<String> = match planned.kind() {
        mount::Kind::Image => ["rbind", "rprivate", "ro", "nodev"].map(str::to_owned).into(),
        mount::Kind::Bind => {
            let options = mount.options().clone().unwrap_or_default();
            // Made by the supervisor, so that a runtime which does not know it will do.
            options.into_iter().map(|option| if option == "rro" { "ro".to_owned() } else { option }).collect()
        }
        mount::Kind::FileSystem | mount::Kind::Cgroup => return mount,
    };
    // It is idmapped there, so that the runtime need not know how.
    mount.set_uid_mappings(None).set_gid_mappings(None);
    mount.set_typ(Some("bind".to_owned())).set_source(Some(source)).set_options(Some(options));
    mount
}

/// The text around the user.
fn split(spec: Spec) -> Result<OciProcess> {
    let failed = |error: serde_json::Error| Error::internal("config.json", error);
    let Value::Object(mut all) = serde_json::to_value(&spec).map_err(failed)? else {
        return Err(Error::new(Code::Internal, "config.json is no object"));
    };
    let Some(Value::Object(process)) = all.remove("process") else {
        return Err(Error::new(Code::Internal, "config.json has no process"));
    };
    let mut parts = split_process(process)?;
    let mut before = Value::Object(all).to_string();
    // There is always a version before it.
    before.pop();
    before.push_str(",\"process\":");
    before.push_str(&String::from_utf8_lossy(&parts.before_user));
    parts.before_user = before.into_bytes();
    parts.after_home.push(b'}');
    Ok(parts)
}

fn split_process(mut process: Map<String, Value>) -> Result<OciProcess> {
    process.remove("user");
    let env = match process.remove("env") {
        Some(Value::Array(env)) => env,
        _ => Vec::new(),
    };
    let needs_home = !env.iter().any(|one| one.as_str().is_some_and(|one| one.starts_with("HOME=")));
    let mut before_home = format!(",\"env\":{}", Value::Array(env));
    before_home.pop();
    // args are always there.
    let rest = Value::Object(process).to_string();
    let rest = rest.strip_prefix('{').ok_or_else(|| Error::new(Code::Internal, "process is no object"))?;
    Ok(OciProcess {
        before_user: b"{\"user\":".to_vec(),
        before_home: before_home.into_bytes(),
        after_home: format!("],{rest}").into_bytes(),
        needs_home,
    })
}

impl Inner {
    /// process.json of a further process, for a container that an OCI runtime has made.
    pub(crate) async fn oci_process(
        &self,
        container: &Container,
        args: &[String],
        tty: bool,
    ) -> Result<Option<OciProcess>> {
        let (pod_id, id) = container.with(|record| (record.pod_id.clone(), record.id.clone()));
        let runtime = self.pod(&pod_id).and_then(|pod| pod.with(|record| record.oci.clone()));
        let Some(runtime) = runtime else { return Ok(None) };
        runtime.check()?;
        let path = self.bundle_dir(&pod_id, &id).join(BUNDLE).join(CONFIG);
        let config = blocking(move || read(path)).await?;
        let Some(Value::Object(process)) = config.get("process").cloned() else {
            return Err(Error::new(
                Code::Internal,
                format!("container {id}: its config.json has no process"),
            ));
        };
        exec_process(process, args, tty).map(Some)
    }
}

fn read(path: PathBuf) -> Result<Value> {
    let failed = |error: &dyn std::fmt::Display| Error::internal(path.display(), error);
    let file = std::fs::File::open(&path).map_err(|e| failed(&e))?;
    serde_json::from_reader(std::io::BufReader::new(std::io::Read::take(file, CONFIG_MAX)))
        .map_err(|e| failed(&e))
}

fn exec_process(mut process: Map<String, Value>, args: &[String], tty: bool) -> Result<OciProcess> {
    process.insert("args".to_owned(), args.into());
    process.insert("terminal".to_owned(), tty.into());
    if tty && let Some(Value::Array(env)) = process.get_mut("env") {
        let has_term = env.iter().any(|one| one.as_str().is_some_and(|one| one.starts_with("TERM=")));
        if !has_term {
            env.push("TERM=xterm".into());
        }
    }
    split_process(process)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use oci_spec::runtime::Capability;

    use super::*;

    fn whole(parts: &OciProcess) -> Value {
        let mut text = parts.before_user.clone();
        text.extend(b"{\"uid\":7}");
        text.extend(&parts.before_home);
        if parts.needs_home {
            if !parts.before_home.ends_with(b"[") {
                text.push(b',');
            }
            text.extend(b"\"HOME=/h\"");
        }
        text.extend(&parts.after_home);
        serde_json::from_slice(&text)
            .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&text)))
    }

    #[test]
    fn the_user_is_left_out_and_nothing_else() {
        let mut spec = Spec::default();
        spec.process_mut().as_mut().unwrap().set_env(Some(vec!["A=\"]}".to_owned()]));
        let mut wanted = serde_json::to_value(&spec).unwrap();
        wanted["process"]["user"] = serde_json::json!({"uid": 7});
        wanted["process"]["env"] = serde_json::json!(["A=\"]}", "HOME=/h"]);
        assert_eq!(whole(&split(spec.clone()).unwrap()), wanted);
        spec.process_mut().as_mut().unwrap().set_env(Some(vec!["HOME=/x".to_owned()]));
        wanted["process"]["env"] = serde_json::json!(["HOME=/x"]);
        assert_eq!(whole(&split(spec.clone()).unwrap()), wanted);
        spec.process_mut().as_mut().unwrap().set_env(None);
        wanted["process"]["env"] = serde_json::json!(["HOME=/h"]);
        assert_eq!(whole(&split(spec).unwrap()), wanted);
    }

    #[test]
    fn a_further_process_has_its_own_command() {
        let process = serde_json::json!({"user": {"uid": 1}, "env": ["HOME=/x"], "args": ["a"], "cwd": "/c"});
        let Value::Object(process) = process else { unreachable!() };
        let made = whole(&exec_process(process.clone(), &["b".to_owned()], true).unwrap());
        let wanted = serde_json::json!({"user": {"uid": 7}, "env": ["HOME=/x", "TERM=xterm"], "args": ["b"], "cwd": "/c", "terminal": true});
        assert_eq!(made, wanted);
        let made = whole(&exec_process(process, &["b".to_owned()], false).unwrap());
        assert_eq!((&made["terminal"], &made["env"]), (&false.into(), &serde_json::json!(["HOME=/x"])));
    }

    #[test]
    fn namespaces_of_the_pod_are_joined_by_path() {
        let mut spec: Spec = serde_json::from_value(serde_json::json!({
            "ociVersion": "1.2.0",
            "root": {"path": "rootfs"},
            "mounts": [{
                "destination": "/v", "type": "bind", "source": "/s", "options": ["rbind", "rro"],
                "uidMappings": [{"containerID": 0, "hostID": 65536, "size": 65536}],
            }],
            "linux": {
                "namespaces": [{"type": "user", "path": "/proc/self/ns/user"}, {"type": "time", "path": "/proc/self/ns/time"}],
                "uidMappings": [{"containerID": 0, "hostID": 65536, "size": 65536}],
                "timeOffsets": {"boottime": {"secs": 1, "nanosecs": 0}},
            },
        }))
        .unwrap();
        let plan =
            Plan { mounts: vec![proto::Mount { idmap: true, ..proto::Mount::default() }], ..Plan::default() };
        let rights = Rights { bounding: Vec::new(), least_oom_score: 0, hierarchies: Vec::new() };
        let (dir, stage_dir) = (Path::new("/b"), Path::new(STAGE_DIR));
        let made =
            serde_json::to_value(config(&spec, &plan, dir, Some(stage_dir), &rights).unwrap()).unwrap();
        let namespaces = serde_json::json!([{"type": "user", "path": "/b/ns/user"}, {"type": "time", "path": "/b/ns/time"}]);
        assert_eq!(made["linux"]["namespaces"], namespaces);
        assert_eq!(made["linux"]["uidMappings"][0]["hostID"], 65536);
        assert_eq!(made["linux"].get("timeOffsets"), None);
        assert_eq!(
            (&made["ociVersion"], &made["root"]["path"]),
            (&"1.1.0".into(), &"/dev/shm/rootfs".into())
        );
        // Idmapped already, and read-only.
        let mount = serde_json::json!({
            "destination": "/v", "type": "bind", "source": "/dev/shm/mounts/0", "options": ["rbind", "ro"],
        });
        assert_eq!(made["mounts"][0], mount);
        spec.linux_mut().as_mut().unwrap().set_namespaces(None);
        let made = serde_json::to_value(config(&spec, &plan, dir, None, &rights).unwrap()).unwrap();
        assert_eq!((&made["ociVersion"], &made["root"]["path"]), (&"1.0.2".into(), &"rootfs".into()));
        assert_eq!(made["mounts"][0]["source"], "/b/mounts/0");
    }

    #[test]
    fn what_runtimes_would_do_in_another_way() {
        let spec = |options: [&str; 1]| -> Spec {
            serde_json::from_value(serde_json::json!({
                "ociVersion": "1.2.0",
                "mounts": [{"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": options}],
                "linux": {
                    "rootfsPropagation": "rshared",
                    "readonlyPaths": ["/proc/sys"],
                    "devices": [
                        {"path": "/dev/null", "type": "c", "major": 1, "minor": 3},
                        {"path": "/dev/own", "type": "c", "major": 1, "minor": 5},
                        {"path": "/volume/x", "type": "c", "major": 1, "minor": 5},
                    ],
                },
            }))
            .unwrap()
        };
        let device = |path: &str| proto::Device { path: path.to_owned(), ..proto::Device::default() };
        let plan = Plan {
            mounts: vec![proto::Mount { kind: mount::Kind::Cgroup.into(), ..proto::Mount::default() }],
            devices: vec![device("/dev/null"), device("/dev/own")],
            ..Plan::default()
        };
        let made = |options, stage_dir: Option<&str>, unified: bool| {
            let hierarchies = if unified { vec![] } else { vec!["cpu".to_owned(), "memory".to_owned()] };
            let rights = Rights { bounding: Vec::new(), least_oom_score: 0, hierarchies };
            let made =
                config(&spec(options), &plan, Path::new("/b"), stage_dir.map(Path::new), &rights).unwrap();
            serde_json::to_value(made).unwrap()
        };
        let plain = made(["ro"], None, false);
        assert_eq!(plain["linux"]["rootfsPropagation"], "shared");
        let paths = ["/proc/sys", "/sys/fs/cgroup/cpu", "/sys/fs/cgroup/memory", "/sys/fs/cgroup"];
        assert_eq!(plain["linux"]["readonlyPaths"], serde_json::json!(paths));
        assert_eq!(plain["linux"]["devices"].as_array().unwrap().len(), 2, "without what is in a volume");
        assert_eq!(plain["mounts"].as_array().unwrap().len(), 1);
        for other in [made(["rw"], None, false), made(["ro"], None, true)] {
            assert_eq!(other["linux"]["readonlyPaths"], serde_json::json!(["/proc/sys"]));
        }
        // In a user namespace: the node's own by its path, others by a node that is made.
        let mapped = made(["ro"], Some("/s"), true);
        assert_eq!(mapped["linux"]["devices"].as_array().unwrap().len(), 1);
        assert_eq!(mapped["linux"]["devices"][0]["path"], "/dev/null");
        assert_eq!(
            mapped["mounts"][1],
            serde_json::json!({
                "destination": "/dev/own", "type": "bind", "source": "/s/devices/1",
                "options": ["bind", "rprivate", "nosuid", "noexec"],
            })
        );
    }

    #[test]
    fn capabilities_that_nobody_has_are_left_out() {
        let set: Capabilities = [Capability::Chown, Capability::SysResource].into_iter().collect();
        let left = within(&set, &["CAP_CHOWN".to_owned(), "CAP_KILL".to_owned()]);
        assert_eq!(left, [Capability::Chown].into_iter().collect());
    }
}

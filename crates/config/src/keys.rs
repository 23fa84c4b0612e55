//! Every key: what it means, how it is read, how it is printed. Loading, printing and the documentation all
//! go by this one list.
use std::net::SocketAddr;
use std::path::Path;

use toml::Value;

use crate::{Config, Subnet, check};

/// One key of the configuration.
pub(crate) struct Key {
    /// The full dotted path.
    pub(crate) name: &'static str,
    /// What it means: units, and what its values do.
    pub(crate) doc: &'static str,
    /// The effective value.
    pub(crate) get: fn(&Config) -> Value,
    /// Takes a value over, or says what is wrong with it.
    pub(crate) set: fn(&mut Config, &Value) -> Result<(), String>,
}

impl Key {
    /// The table that it is in ("" for the top) and its name there.
    pub(crate) fn split(&self) -> (&'static str, &'static str) {
        self.name.rsplit_once('.').unwrap_or(("", self.name))
    }
}

/// The key with this dotted path.
pub(crate) fn find(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name)
}

/// In the order in which they are printed.
pub(crate) const KEYS: &[Key] = &[
    Key {
        name: "root",
        doc: "The directory for what must outlive a reboot: images, layers, records. Made 0700. One daemon a root.",
        get: |c| path_value(&c.root),
        set: |c, v| put(&mut c.root, path(v)?),
    },
    Key {
        name: "state",
        doc: "The directory for what a reboot voids: sockets, mounts, the supervisors' files. Made 0700; best on a tmpfs.",
        get: |c| path_value(&c.state),
        set: |c, v| put(&mut c.state, path(v)?),
    },
    Key {
        name: "listen",
        doc: "The socket that the kubelet and crictl connect to (mode 0600), at most 107 bytes. \
              The kubelet's --container-runtime-endpoint is this path after unix://.",
        get: |c| path_value(&c.listen),
        set: |c, v| put(&mut c.listen, check::socket_path(Path::new(string(v)?))?),
    },
    Key {
        name: "default_runtime",
        doc: "The runtime handler of pods that name none: \"stave\", the built-in executor, or NAME of a [runtimes.NAME]. \
              Pods that run stay with theirs.",
        get: |c| c.default_runtime.clone().into(),
        set: |c, v| put(&mut c.default_runtime, string(v)?.to_owned()),
    },
    Key {
        name: "log.level",
        doc: "The least severe level that is logged: \"error\", \"warn\", \"info\", \"debug\" or \"trace\".",
        get: |c| c.log.level.as_str().into(),
        set: |c, v| put(&mut c.log.level, string(v)?.parse()?),
    },
    Key {
        name: "log.format",
        doc: "How a line looks: \"text\" for people and the journal, \"json\" for machines. Logs go to standard error.",
        get: |c| c.log.format.as_str().into(),
        set: |c, v| put(&mut c.log.format, string(v)?.parse()?),
    },
    Key {
        name: "cgroup.driver",
        doc: "Who makes the cgroups: \"cgroupfs\" (Stave itself), \"systemd\" (over D-Bus; needs pure cgroup v2), or \
              \"auto\": systemd where it is PID 1 and can be used, else cgroupfs; `stave check` tells which. \
              Must be the kubelet's cgroupDriver; a kubelet of 1.28 or later asks Stave for it.",
        get: |c| c.cgroup.driver.as_str().into(),
        set: |c, v| put(&mut c.cgroup.driver, string(v)?.parse()?),
    },
    Key {
        name: "cgroup.parent",
        doc: "The parent of pods whose configuration names none; the kubelet names one for each. \
              With cgroupfs a path below the root of the hierarchy, as \"/stave\"; with systemd a slice, as \"stave.slice\". \
              These two are the defaults; with \"auto\" and \"\" it is that of the driver that is found.",
        get: |c| c.cgroup.parent.clone().into(),
        set: |c, v| put(&mut c.cgroup.parent, string(v)?.to_owned()),
    },
    Key {
        name: "cgroup.blockio",
        doc: "A file with classes of block I/O, which the annotation blockio.resources.beta.kubernetes.io/pod, or \
              .../container.NAME, of a pod names. Read at the start. \"\" is none, and a pod that names a class is refused.",
        get: |c| optional_path_value(c.cgroup.blockio.as_deref()),
        set: |c, v| put(&mut c.cgroup.blockio, optional_path(v)?),
    },
    Key {
        name: "pods.ready",
        doc: "How many supervisors wait for pods to come, with network, IPC and UTS namespace and, with the built-in bridge, \
              the interface made: 0 to 64. A pod that gets one starts sooner; each takes some 100 KiB, and as \
              much in the kernel. Pods on the node's network or with a user namespace start without. 0 is off.",
        get: |c| i64::try_from(c.pods.ready).unwrap_or_default().into(),
        set: |c, v| {
            let ready = v.as_integer().ok_or_else(|| wrong(v, "an integer"))?;
            let ready = usize::try_from(ready).ok().filter(|n| *n <= 64);
            put(&mut c.pods.ready, ready.ok_or("is out of range: 0 to 64")?)
        },
    },
    Key {
        name: "network.mode",
        doc: "Who gives pods their network: \"cni\" (the administrator's CNI plugins), \"bridge\" (built in, no program \
              executed; for a single machine) or \"none\" (loopback only). Never chosen by guess.",
        get: |c| c.network.mode.as_str().into(),
        set: |c, v| put(&mut c.network.mode, string(v)?.parse()?),
    },
    Key {
        name: "network.bridge.name",
        doc: "The bridge's interface name, 1 to 15 bytes. Stave makes it if it is missing.",
        get: |c| c.network.bridge.name.clone().into(),
        set: |c, v| put(&mut c.network.bridge.name, check::interface(string(v)?)?),
    },
    Key {
        name: "network.bridge.subnets",
        doc: "Where pods get their addresses: one IPv4 subnet (/8 to /30), one IPv6 subnet (/32 to /126), or one of each. \
              The first address of each is the bridge's. []: those that the kubelet tells (UpdateRuntimeConfig); the \
              network is not ready before.",
        get: |c| Value::Array(c.network.bridge.subnets.iter().map(|s| s.to_string().into()).collect()),
        set: |c, v| {
            let subnets = strings(v)?
                .into_iter()
                .map(|text| text.parse::<Subnet>().map_err(|err| format!("has {text:?}, which {err}")))
                .collect::<Result<Vec<_>, _>>()?;
            check::subnets(&subnets)?;
            put(&mut c.network.bridge.subnets, subnets)
        },
    },
    Key {
        name: "network.cni.conf_dir",
        doc: "The directory of CNI network configurations; the first *.conflist, *.conf or *.json by name is used. \
              Watched for changes.",
        get: |c| path_value(&c.network.cni.conf_dir),
        set: |c, v| put(&mut c.network.cni.conf_dir, path(v)?),
    },
    Key {
        name: "network.cni.bin_dirs",
        doc: "Where CNI plugins are looked for, in this order.",
        get: |c| Value::Array(c.network.cni.bin_dirs.iter().map(|dir| path_value(dir)).collect()),
        set: |c, v| {
            let dirs = strings(v)?
                .into_iter()
                .map(|dir| check::path(Path::new(dir)).map_err(|err| format!("has {dir:?}, which {err}")))
                .collect::<Result<Vec<_>, _>>()?;
            if dirs.is_empty() {
                return Err("has no directory".to_owned());
            }
            put(&mut c.network.cni.bin_dirs, dirs)
        },
    },
    Key {
        name: "network.cni.conf_template",
        doc: "A template of a configuration list, in the form that containerd has: with {{.PodCIDR}}, {{range}} over \
              .PodCIDRRanges and .Routes. When the kubelet tells the node's ranges and conf_dir has no configuration, it is \
              filled in and written there as 10-stave.conflist. \"\" is none.",
        get: |c| optional_path_value(c.network.cni.conf_template.as_deref()),
        set: |c, v| put(&mut c.network.cni.conf_template, optional_path(v)?),
    },
    Key {
        name: "network.cni.netns_dir",
        doc: "Where the network namespaces of pods are bound to files (stave-ID) for plugins. Agents of network plugins have \
              /run/netns mounted, so leave it unless they don't.",
        get: |c| path_value(&c.network.cni.netns_dir),
        set: |c, v| put(&mut c.network.cni.netns_dir, path(v)?),
    },
    Key {
        name: "network.cni.timeout",
        doc: "How long a plugin has for one command, in seconds, 1 to 600; then it is killed. The kubelet gives a pod's start \
              4 minutes in all, and its stop 2.",
        get: |c| i64::from(c.network.cni.timeout).into(),
        set: |c, v| {
            let seconds = v.as_integer().ok_or_else(|| wrong(v, "an integer"))?;
            let seconds = u32::try_from(seconds).ok().filter(|seconds| (1..=600).contains(seconds));
            put(&mut c.network.cni.timeout, seconds.ok_or_else(|| "is not between 1 and 600".to_owned())?)
        },
    },
    Key {
        name: "registries.config_dir",
        doc: "Mirrors, certificates and plain http by registry: HOST[:PORT]/hosts.toml under this directory, \
              and _default/hosts.toml, in containerd's form. Read at each pull.",
        get: |c| path_value(&c.registries.config_dir),
        set: |c, v| put(&mut c.registries.config_dir, path(v)?),
    },
    Key {
        name: "streaming.address",
        doc: "The IP address of the server for exec, attach and port-forward. The kubelet on this node connects to it, \
              so loopback is right but for unusual set-ups.",
        get: |c| c.streaming.address.to_string().into(),
        set: |c, v| {
            put(&mut c.streaming.address, string(v)?.parse().map_err(|_| "is no IP address".to_owned())?)
        },
    },
    Key {
        name: "streaming.port",
        doc: "Its TCP port, 0 to 65535; 0 lets the kernel choose one.",
        get: |c| i64::from(c.streaming.port).into(),
        set: |c, v| {
            let port = v.as_integer().ok_or_else(|| wrong(v, "an integer"))?;
            put(&mut c.streaming.port, port.try_into().map_err(|_| "is no port: 0 to 65535".to_owned())?)
        },
    },
    Key {
        name: "streaming.tls_certificate",
        doc: "The file of its certificate chain, in PEM: with it and tls_key, which go together, the server speaks TLS; \
              \"\" is off. Set both where address is no loopback address. Read again when they change.",
        get: |c| optional_path_value(c.streaming.tls_certificate.as_deref()),
        set: |c, v| put(&mut c.streaming.tls_certificate, optional_path(v)?),
    },
    Key {
        name: "streaming.tls_key",
        doc: "The file of the certificate's private key, in PEM; \"\" is off.",
        get: |c| optional_path_value(c.streaming.tls_key.as_deref()),
        set: |c, v| put(&mut c.streaming.tls_key, optional_path(v)?),
    },
    Key {
        name: "apparmor.profile",
        doc: "A file that is loaded at the start as the AppArmor profile of containers that ask for RuntimeDefault or \
              for nothing, where the host has AppArmor. It must define the profile stave-default. \"\" is the built-in one.",
        get: |c| optional_path_value(c.apparmor.profile.as_deref()),
        set: |c, v| put(&mut c.apparmor.profile, optional_path(v)?),
    },
    Key {
        name: "metrics.address",
        doc: "Where Prometheus may scrape, as \"127.0.0.1:9095\" or \"[::1]:9095\"; \"\" is off.",
        get: |c| c.metrics.address.map(|address| address.to_string()).unwrap_or_default().into(),
        set: |c, v| {
            let address = match string(v)? {
                "" => None,
                text => Some(
                    text.parse::<SocketAddr>()
                        .map_err(|_| "is no IP address with a port, as \"127.0.0.1:9095\"".to_owned())?,
                ),
            };
            put(&mut c.metrics.address, address)
        },
    },
    Key {
        name: "nri.enable",
        doc: "Whether NRI plugins may connect. They can change any container: true or false.",
        get: |c| c.nri.enable.into(),
        set: |c, v| put(&mut c.nri.enable, v.as_bool().ok_or_else(|| wrong(v, "true or false"))?),
    },
    Key {
        name: "nri.socket",
        doc: "The socket that NRI plugins connect to, at most 107 bytes.",
        get: |c| path_value(&c.nri.socket),
        set: |c, v| put(&mut c.nri.socket, check::socket_path(Path::new(string(v)?))?),
    },
];

/// A key of `[runtimes.NAME]`: its name there, and what it means.
pub(crate) const RUNTIME_KEYS: &[(&str, &str)] = &[
    (
        "type",
        "What runs the pods: \"builtin\" (Stave's own executor) or \"oci\" (a program with runc's command line). Required.",
    ),
    ("path", "The program, for \"oci\": an absolute path. Required there."),
    (
        "root",
        "The directory for its --root, for \"oci\"; each pod has one of its own in it. Default: runtimes/NAME under the state \
         directory.",
    ),
    (
        "args",
        "Arguments before the program's command, for \"oci\". Stave itself gives --root, --log and --log-format. Default: [].",
    ),
    ("timeout", "How long one call of the program may take, for \"oci\": 1 to 50 seconds. Default: 30."),
    (
        "pids_limit",
        "Most processes and threads of a container, 1 to 4194304. Default: as many as the pod's cgroup allows.",
    ),
];

/// What `[runtimes.NAME]` is for.
pub(crate) const RUNTIMES_DOC: &str = "Runtime handlers, one table each: NAME is the handler of a RuntimeClass. \
     \"stave\" is always there: the built-in executor.";

fn put<T>(slot: &mut T, value: T) -> Result<(), String> {
    *slot = value;
    Ok(())
}

pub(crate) fn path_value(path: &Path) -> Value {
    // Paths are checked to be UTF-8 when they are set, so nothing is lost.
    path.to_string_lossy().into_owned().into()
}

pub(crate) fn string(value: &Value) -> Result<&str, String> {
    value.as_str().ok_or_else(|| wrong(value, "a string"))
}

pub(crate) fn path(value: &Value) -> Result<std::path::PathBuf, String> {
    check::path(Path::new(string(value)?))
}

/// `""` for none.
fn optional_path_value(path: Option<&Path>) -> Value {
    path.map_or_else(|| "".into(), path_value)
}

fn optional_path(value: &Value) -> Result<Option<std::path::PathBuf>, String> {
    if string(value)?.is_empty() { Ok(None) } else { path(value).map(Some) }
}

/// Longest call of a runtime, in seconds: what waits for it gives up after 60.
const TIMEOUTS: std::ops::RangeInclusive<i64> = 1..=50;
/// `PID_MAX_LIMIT` of 64-bit kernels.
const PIDS: std::ops::RangeInclusive<i64> = 1..=4_194_304;

pub(crate) fn runtime_timeout(value: &Value) -> Result<u32, String> {
    let seconds = value.as_integer().ok_or_else(|| wrong(value, "an integer"))?;
    let fits = TIMEOUTS.contains(&seconds).then(|| u32::try_from(seconds).ok()).flatten();
    fits.ok_or_else(|| format!("is not {} to {} seconds", TIMEOUTS.start(), TIMEOUTS.end()))
}

pub(crate) fn pids_limit(value: &Value) -> Result<i64, String> {
    let limit = value.as_integer().ok_or_else(|| wrong(value, "an integer"))?;
    PIDS.contains(&limit).then_some(limit).ok_or_else(|| format!("is not {} to {}", PIDS.start(), PIDS.end()))
}

/// Arguments of a runtime, without those that are Stave's to give.
pub(crate) fn runtime_args(value: &Value) -> Result<Vec<String>, String> {
    const OURS: [&str; 4] = ["--root", "--log", "--log-format", "--systemd-cgroup"];
    let args = strings(value)?;
    for arg in &args {
        let name = arg.split('=').next().unwrap_or_default();
        // One dash does as well for some.
        if OURS.iter().any(|ours| name == *ours || ours.strip_prefix('-') == Some(name)) {
            return Err(format!("has {arg:?}, which is not for the configuration to give"));
        }
        if arg.is_empty() || arg.chars().any(char::is_control) || arg.len() > 4096 {
            return Err(format!(
                "has {arg:?}, which is no argument: empty, too long or with control characters"
            ));
        }
    }
    Ok(args.into_iter().map(str::to_owned).collect())
}

fn strings(value: &Value) -> Result<Vec<&str>, String> {
    let array = value.as_array().ok_or_else(|| wrong(value, "an array of strings"))?;
    if array.len() > 16 {
        return Err(format!("has {} entries; at most 16 are taken", array.len()));
    }
    array.iter().map(|entry| entry.as_str().ok_or_else(|| wrong(value, "an array of strings"))).collect()
}

fn wrong(value: &Value, expected: &str) -> String {
    match value {
        Value::Array(_) => format!("is not {expected}"),
        other => format!("is of type {}, not {expected}", other.type_str()),
    }
}

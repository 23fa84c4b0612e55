use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use crate::Subnet;

/// The effective configuration. Every path is absolute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// What must outlive a reboot: images, layers, records.
    pub root: PathBuf,
    /// What a reboot voids: sockets, mounts, supervisors' files.
    pub state: PathBuf,
    /// The CRI socket.
    pub listen: PathBuf,
    /// `[log]`
    pub log: LogConfig,
    /// `[cgroup]`
    pub cgroup: CgroupConfig,
    /// `[pods]`
    pub pods: PodsConfig,
    /// `[network]`
    pub network: NetworkConfig,
    /// `[registries]`
    pub registries: RegistriesConfig,
    /// `[streaming]`
    pub streaming: StreamingConfig,
    /// `[apparmor]`
    pub apparmor: AppArmorConfig,
    /// `[metrics]`
    pub metrics: MetricsConfig,
    /// `[nri]`
    pub nri: NriConfig,
    /// The runtime handler of pods that name none.
    pub default_runtime: String,
    /// `[runtimes.NAME]`, by the name of the runtime handler.
    pub runtimes: BTreeMap<String, Runtime>,
}

/// `[log]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogConfig {
    /// The least severe level that is logged.
    pub level: LogLevel,
    /// How a line looks.
    pub format: LogFormat,
}

/// `[cgroup]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CgroupConfig {
    /// Who makes the cgroups; must be the kubelet's `cgroupDriver`.
    pub driver: CgroupDriver,
    /// The parent of pods whose configuration names none: a cgroup path, absolute in its hierarchy. For the systemd
    /// driver the name of a slice. Empty: the default of the driver that `auto` finds.
    pub parent: String,
    /// The file of the classes of block I/O; `None` (written `""`): there are none.
    pub blockio: Option<PathBuf>,
}

impl CgroupConfig {
    /// The parent for the driver in force; `auto` is taken for cgroupfs. An error names a parent in the other
    /// driver's form, which only `auto` lets through.
    pub fn parent_for(&self, driver: CgroupDriver) -> Result<String, String> {
        let parent = match (self.parent.as_str(), driver) {
            ("", CgroupDriver::Systemd) => DEFAULT_SLICE,
            ("", _) => DEFAULT_PARENT,
            (given, _) => given,
        };
        crate::check::cgroup_parent(driver, parent)
            .map(|()| parent.to_owned())
            .map_err(|reason| format!("cgroup.parent = {parent:?} {reason}"))
    }
}

/// `cgroup.parent` of the cgroupfs driver.
const DEFAULT_PARENT: &str = "/stave";

/// `cgroup.parent` of the systemd driver.
const DEFAULT_SLICE: &str = "stave.slice";

/// `[pods]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodsConfig {
    /// How many supervisors wait for pods to come, with their namespaces made.
    pub ready: usize,
}

/// `[network]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkConfig {
    /// Who gives pods their network.
    pub mode: NetworkMode,
    /// `[network.bridge]`, for mode `bridge`.
    pub bridge: BridgeConfig,
    /// `[network.cni]`, for mode `cni`.
    pub cni: CniConfig,
}

/// `[network.bridge]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BridgeConfig {
    /// The bridge's interface name, 1 to 15 bytes.
    pub name: String,
    /// One subnet of IPv4, one of IPv6, or one of each; pods get an address of each. None: those that the kubelet tells.
    pub subnets: Vec<Subnet>,
}

/// `[network.cni]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CniConfig {
    /// The directory of the network configurations; the first by name is used.
    pub conf_dir: PathBuf,
    /// Where plugins are looked for, in this order.
    pub bin_dirs: Vec<PathBuf>,
    /// A template of a configuration, filled in when the kubelet tells the node's ranges for pods; `None` (written `""`)
    /// is none.
    pub conf_template: Option<PathBuf>,
    /// Where network namespaces are bound to files.
    pub netns_dir: PathBuf,
    /// How long a plugin has for one command, in seconds.
    pub timeout: u32,
}

/// `[registries]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegistriesConfig {
    /// Holds `HOST[:PORT]/hosts.toml` a registry, in containerd's form.
    pub config_dir: PathBuf,
}

/// `[streaming]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamingConfig {
    /// The address of the server for exec, attach and port-forward.
    pub address: IpAddr,
    /// Its port; 0 lets the kernel choose.
    pub port: u16,
    /// Its certificate chain in PEM; set if and only if `tls_key` is. `None` (written `""`) is plain HTTP.
    pub tls_certificate: Option<PathBuf>,
    /// The private key of the certificate in PEM.
    pub tls_key: Option<PathBuf>,
}

/// `[apparmor]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AppArmorConfig {
    /// The file that is loaded as the default profile; `None` (written `""`) is the built-in one.
    pub profile: Option<PathBuf>,
}

/// `[metrics]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetricsConfig {
    /// Where Prometheus may scrape; `None` (written `""`) is off.
    pub address: Option<SocketAddr>,
}

/// `[nri]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NriConfig {
    /// Whether NRI plugins may connect.
    pub enable: bool,
    /// The socket they connect to.
    pub socket: PathBuf,
}

/// `[runtimes.NAME]`: what a runtime handler runs pods with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Runtime {
    /// Built-in executor or OCI command line.
    pub kind: RuntimeKind,
    /// The OCI runtime's binary; set if and only if `kind` is [`RuntimeKind::Oci`].
    pub path: Option<PathBuf>,
    /// The directory for its `--root`; `None` is `<state>/runtimes/NAME`. Only for [`RuntimeKind::Oci`].
    pub root: Option<PathBuf>,
    /// Arguments before the runtime's command. Only for [`RuntimeKind::Oci`].
    pub args: Vec<String>,
    /// How long one call of the runtime may take, in seconds; `None` is [`Runtime::TIMEOUT`]. Only for
    /// [`RuntimeKind::Oci`].
    pub timeout: Option<u32>,
    /// Most processes and threads of a container; `None`: as many as the pod's cgroup allows.
    pub pids_limit: Option<i64>,
}

impl Runtime {
    /// The handler that is always there: the built-in executor.
    pub const BUILT_IN: &str = "stave";
    /// Seconds that a call of a runtime may take.
    pub const TIMEOUT: u32 = 30;

    /// A runtime with nothing but its kind.
    pub fn new(kind: RuntimeKind) -> Self {
        Self { kind, path: None, root: None, args: Vec::new(), timeout: None, pids_limit: None }
    }
}

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$vdoc])* $variant),+ }

        impl $name {
            /// All words, in the order in which errors and help list them.
            pub const WORDS: &[&str] = &[$($word),+];

            /// The word in the configuration.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl FromStr for $name {
            type Err = String;

            fn from_str(word: &str) -> Result<Self, String> {
                match word {
                    $($word => Ok(Self::$variant),)+
                    _ => {
                        let words: Vec<_> = Self::WORDS.iter().map(|word| format!("{word:?}")).collect();
                        Err(format!("is none of {}", words.join(", ")))
                    }
                }
            }
        }
    };
}

words! {
    /// `log.level`
    LogLevel {
        /// Only what failed.
        Error = "error",
        /// And what looks wrong.
        Warn = "warn",
        /// And what was done.
        Info = "info",
        /// And how.
        Debug = "debug",
        /// And every step.
        Trace = "trace",
    }
}

words! {
    /// `log.format`
    LogFormat {
        /// For people and the journal.
        Text = "text",
        /// One JSON object a line.
        Json = "json",
    }
}

words! {
    /// `cgroup.driver`
    CgroupDriver {
        /// Systemd where it runs the host, on pure cgroup v2 and with a D-Bus; else cgroupfs.
        Auto = "auto",
        /// Directories in the cgroup file system.
        Cgroupfs = "cgroupfs",
        /// Slices and scopes, by systemd over D-Bus.
        Systemd = "systemd",
    }
}

words! {
    /// `network.mode`
    NetworkMode {
        /// The built-in bridge network.
        Bridge = "bridge",
        /// The administrator's CNI plugins.
        Cni = "cni",
        /// Loopback only.
        None = "none",
    }
}

words! {
    /// `runtimes.NAME.type`
    RuntimeKind {
        /// Stave's own executor.
        Builtin = "builtin",
        /// A program with the command line of an OCI runtime (runc, crun, kata).
        Oci = "oci",
    }
}

impl Default for Config {
    fn default() -> Self {
        Config {
            root: "/var/lib/stave".into(),
            state: "/run/stave".into(),
            listen: "/run/stave/stave.sock".into(),
            log: LogConfig { level: LogLevel::Info, format: LogFormat::Text },
            cgroup: CgroupConfig { driver: CgroupDriver::Auto, parent: String::new(), blockio: None },
            network: NetworkConfig {
                // Never the built-in network by accident: on a cluster node its addresses would clash.
                mode: NetworkMode::Cni,
                bridge: BridgeConfig {
                    name: "stave0".into(),
                    subnets: vec![Subnet::v4(Ipv4Addr::new(10, 88, 0, 0), 16)],
                },
                cni: CniConfig {
                    conf_dir: "/etc/cni/net.d".into(),
                    bin_dirs: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()],
                    conf_template: None,
                    netns_dir: "/run/netns".into(),
                    timeout: 60,
                },
            },
            registries: RegistriesConfig { config_dir: "/etc/stave/certs.d".into() },
            pods: PodsConfig { ready: 2 },
            streaming: StreamingConfig {
                address: Ipv4Addr::LOCALHOST.into(),
                port: 0,
                tls_certificate: None,
                tls_key: None,
            },
            apparmor: AppArmorConfig { profile: None },
            metrics: MetricsConfig { address: None },
            nri: NriConfig { enable: false, socket: "/var/run/nri/nri.sock".into() },
            default_runtime: Runtime::BUILT_IN.to_owned(),
            runtimes: BTreeMap::new(),
        }
    }
}

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::time::Instant;

use k8s_cri::v1::{ContainerConfig, PodSandboxConfig};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tonic::Status;

use crate::client::Cri;
use crate::leftovers::Leftovers;
use crate::registry::Registry;
use crate::requests::Pod;
use crate::seed;
use crate::slot::Slot;

/// How a test's daemon differs from the usual one.
#[derive(Debug, Default)]
pub struct Options {
    /// The registry that `registry.test` mirrors to; the shared one when none is given.
    pub registry: Option<SocketAddr>,
    /// The size of a tmpfs for the daemon's root, in bytes: a disk that gets full.
    pub root_size: Option<u64>,
    /// The prefix length of the pods' subnet; 24 when none is given.
    pub prefix: Option<u8>,
    /// An IPv6 subnet for pods, too.
    pub dual_stack: bool,
    /// No subnets for pods in the configuration: the test plays the kubelet and tells them.
    pub told_ranges: bool,
    /// Mode "cni" instead of the built-in bridge: configurations are in `net.d` of the daemon's directory, plugins in its
    /// `plugins` and where Debian has them, and a plugin has 5 s (see [`crate::limit`]).
    pub cni: bool,
    /// This image is there when the daemon is: pulled, or, with `STAVE_E2E_SEED`, taken from the test that pulled it first.
    pub image: Option<String>,
    /// Variables for the daemon's environment.
    pub environment: Vec<(String, String)>,
    /// TOML to append to the configuration.
    pub config: String,
    /// TOML for a drop-in, which may have tables that the configuration has already.
    pub drop_in: String,
    /// The runtime handler of pods that name none, from `config`.
    pub default_runtime: Option<String>,
    /// A script that takes the supervisor's place beside the daemon's program.
    pub supervisor: Option<String>,
}

/// A daemon with root, state, socket, bridge, subnet and cgroup parent of its own.
///
/// A test ends with [`Daemon::finish`], which removes its pods and panics when anything of them is left.
/// When a test fails before that, dropping this takes everything down by force.
#[derive(Debug)]
pub struct Daemon {
    /// The client of the daemon's socket. A restart makes a new one.
    pub cri: Cri,
    directory: PathBuf,
    child: Option<Child>,
    leftovers: Leftovers,
    environment: Vec<(String, String)>,
    slot: Slot,
    small_disk: bool,
    /// Ids and addresses that were given out, and must be named nowhere in the end.
    given: Mutex<BTreeSet<String>>,
}

impl Daemon {
    /// Starts a daemon with the shared registry behind `registry.test`.
    pub async fn start() -> Daemon {
        Daemon::with(Options::default()).await
    }

    /// Starts a daemon.
    pub async fn with(options: Options) -> Daemon {
        assert!(nix::unistd::geteuid().is_root(), "the tests of the whole program must run as root");
        let slot = tokio::task::spawn_blocking(Slot::take).await.expect("a slot");
        let directory = slot.directory();
        let leftovers = Leftovers::of(&directory, &slot.cgroup_parent(), &slot.bridge());
        // Of a run that was killed.
        leftovers.sweep();
        let _ = nix::mount::umount2(&directory.join("root"), nix::mount::MntFlags::MNT_DETACH);
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir_all(directory.join("logs")).expect("directory of the daemon");

        let registry = match options.registry {
            Some(address) => address,
            None => tokio::task::spawn_blocking(Registry::shared).await.expect("a registry").address(),
        };
        let hosts = directory.join("certs.d/registry.test");
        fs::create_dir_all(&hosts).expect("directory of hosts.toml");
        fs::write(
            hosts.join("hosts.toml"),
            format!("server = \"http://{registry}\"\n\n[host.\"http://{registry}\"]\n  capabilities = [\"pull\", \"resolve\"]\n"),
        )
        .expect("hosts.toml");
        let (default_runtime, runtimes) = runtimes(&options);
        let network = if options.cni {
            let dir = directory.display();
            format!(
                "mode = \"cni\"\n\n[network.cni]\nconf_dir = \"{dir}/net.d\"\nbin_dirs = [\"{dir}/plugins\", \"/usr/lib/cni\"]\n\
                 netns_dir = \"{dir}/netns\"\nconf_template = \"{dir}/template\"\ntimeout = {}",
                crate::limit(5).as_secs()
            )
        } else {
            let mut subnets = Vec::new();
            if !options.told_ranges {
                subnets.push(slot.subnet(options.prefix.unwrap_or(24)));
            }
            if options.dual_stack {
                subnets.push(slot.subnet6());
            }
            format!(
                "mode = \"bridge\"\n\n[network.bridge]\nname = \"{}\"\nsubnets = {subnets:?}",
                slot.bridge(),
            )
        };
        let parent = slot.cgroup_parent();
        // With systemd the name of the slice, without a path.
        let parent = if crate::systemd_driver() { &parent[1..] } else { &parent };
        let config = format!(
            "{default_runtime}[cgroup]\ndriver = \"{}\"\nparent = \"{parent}\"\n\n[network]\n{network}\n\n[registries]\nconfig_dir = \"{}\"\n\n[streaming]\naddress = \
             \"127.0.0.1\"\nport = 0\n{}{runtimes}",
            if crate::systemd_driver() { "systemd" } else { "cgroupfs" },
            directory.join("certs.d").display(),
            options.config,
        );
        fs::write(directory.join("config.toml"), config).expect("configuration");
        if !options.drop_in.is_empty() {
            fs::create_dir(directory.join("conf.d")).expect("directory of drop-ins");
            fs::write(directory.join("conf.d/test.toml"), &options.drop_in).expect("drop-in");
        }
        if let Some(size) = options.root_size {
            let root = directory.join("root");
            fs::create_dir(&root).expect("mount point");
            let (data, none) = (format!("size={size},mode=700"), nix::mount::MsFlags::empty());
            nix::mount::mount(Some("small-disk"), &root, Some("tmpfs"), none, Some(data.as_str()))
                .expect("a small tmpfs");
        }

        if let Some(script) = &options.supervisor {
            let own = directory.join("bin");
            fs::create_dir(&own).expect("directory of programs");
            fs::copy(bin_dir().join("stave"), own.join("stave")).expect("a copy of stave");
            fs::write(own.join("stave-pod"), script).expect("stave-pod");
            fs::set_permissions(own.join("stave-pod"), std::os::unix::fs::PermissionsExt::from_mode(0o755))
                .expect("mode of stave-pod");
        }

        let (child, cri) = if let Some(socket) = peer_socket() {
            (None, Cri::connect(&socket, crate::limit(60)).await.expect("the peer's socket"))
        } else {
            let seeded =
                options.image.as_ref().is_some_and(|image| seed::take(image, &directory.join("root")));
            let child = spawn(&directory, &options.environment);
            let cri = connect(&directory).await;
            if let Some(image) = options.image.as_ref().filter(|_| seeded) {
                assert!(cri.image(image).await.expect("ImageStatus").is_some(), "{image} from the seed");
            }
            (Some(child), cri)
        };
        if let Some(image) = &options.image
            && cri.image(image).await.expect("ImageStatus").is_none()
        {
            cri.pull(image).await.expect("PullImage");
            seed::give(image, &directory.join("root"));
        }
        let small_disk = options.root_size.is_some();
        let environment = options.environment;
        Daemon { cri, directory, child, leftovers, environment, slot, small_disk, given: Mutex::default() }
    }

    /// The socket.
    pub fn socket(&self) -> PathBuf {
        peer_socket().unwrap_or_else(|| self.directory.join("stave.sock"))
    }

    /// The directory that is this daemon's alone; root and state are in it, and room for a test's own files.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The program with its arguments.
    pub fn command(&self) -> Vec<String> {
        command(&self.directory)
    }

    /// The subnet of the pods, as `10.252.1.0/24`.
    pub fn subnet(&self) -> String {
        self.slot.subnet(24)
    }

    /// The one of IPv6, as `fd52:1::/64`.
    pub fn subnet6(&self) -> String {
        self.slot.subnet6()
    }

    /// The name of the bridge.
    pub fn bridge(&self) -> String {
        self.slot.bridge()
    }

    /// The cgroup that pods without a parent of their own are in, as `/stave-e2e1` or `/stavee2e1.slice`.
    pub fn cgroup_parent(&self) -> String {
        self.slot.cgroup_parent()
    }

    /// The daemon's pid.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("the daemon runs").id()
    }

    /// What the daemon has logged so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.join("stave.log")).unwrap_or_default()
    }

    /// Runs a pod with a log directory of its own, and remembers what must be gone in the end.
    pub async fn run_pod(&self, config: PodSandboxConfig) -> Result<Pod, Status> {
        let config = self.with_log_directory(config);
        let id = self.cri.run_pod(&config).await?;
        let status = self.cri.pod(&id).await?;
        let mut given = self.given.lock().expect("given");
        given.insert(id.clone());
        given.extend(status.network.into_iter().map(|network| network.ip).filter(|ip| !ip.is_empty()));
        drop(given);
        Ok(Pod { config, id })
    }

    /// Ids and addresses that must be named nowhere in the end.
    pub fn remember(&self, words: impl IntoIterator<Item = String>) {
        self.given.lock().expect("given").extend(words.into_iter().filter(|word| !word.is_empty()));
    }

    /// The same configuration, with a log directory when it has none.
    pub fn with_log_directory(&self, mut config: PodSandboxConfig) -> PodSandboxConfig {
        if config.log_directory.is_empty() {
            let metadata = config.metadata.clone().unwrap_or_default();
            let name = format!("logs/{}_{}_{}", metadata.name, metadata.uid, metadata.attempt);
            config.log_directory = self.directory.join(name).to_string_lossy().into_owned();
        }
        config
    }

    /// Creates and starts a container; gives its id.
    pub async fn run(&self, pod: &Pod, config: &ContainerConfig) -> Result<String, Status> {
        let id = self.create(pod, config).await?;
        self.cri.start(&id).await?;
        Ok(id)
    }

    /// Creates a container; gives its id.
    pub async fn create(&self, pod: &Pod, config: &ContainerConfig) -> Result<String, Status> {
        let id = self.cri.create(&pod.id, config, &pod.config).await?;
        self.given.lock().expect("given").insert(id.clone());
        Ok(id)
    }

    /// Kills the daemon with SIGKILL. Its pods go on.
    pub fn kill(&mut self) {
        let mut child = self.child.take().expect("the daemon runs");
        child.kill().expect("SIGKILL");
        child.wait().expect("wait");
    }

    /// Stops the daemon with SIGTERM and gives its exit status.
    pub async fn terminate(&mut self) -> ExitStatus {
        let mut child = self.child.take().expect("the daemon runs");
        kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).expect("SIGTERM");
        crate::eventually("the daemon's end after SIGTERM", async || child.try_wait().expect("wait")).await
    }

    /// Starts the daemon again after [`Daemon::kill`] or [`Daemon::terminate`].
    pub async fn restart(&mut self) {
        assert!(self.child.is_none(), "the daemon still runs");
        let _ = fs::remove_file(self.directory.join("stave.sock"));
        self.child = Some(spawn(&self.directory, &self.environment));
        self.cri = connect(&self.directory).await;
    }

    /// Whatever is left of pods now, in words.
    pub fn left(&self) -> Vec<String> {
        let words: Vec<_> = self.given.lock().expect("given").iter().cloned().collect();
        self.leftovers.find(&words, self.child.as_ref().map(Child::id))
    }

    /// Panics when anything of a pod is left: process, mount, cgroup, network device, rule, lease, file.
    pub async fn assert_clean(&self) {
        if peer_socket().is_some() {
            return;
        }
        // The kernel takes some things away with a delay: namespaces, and the devices in them.
        let end = Instant::now() + crate::limit(3);
        loop {
            let left = self.left();
            if left.is_empty() {
                return;
            }
            assert!(Instant::now() < end, "left behind:\n  {}", left.join("\n  "));
            tokio::time::sleep(crate::pause(50)).await;
        }
    }

    /// Removes all pods, checks that nothing is left of them, and stops the daemon.
    pub async fn finish(mut self) {
        self.cri.remove_all().await.expect("removal of all pods");
        self.assert_clean().await;
        if self.child.is_some() {
            let status = self.terminate().await;
            assert!(status.success(), "the daemon ended with {status}; its log:\n{}", self.log());
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<_> = log.lines().collect();
            let tail = &lines[lines.len().saturating_sub(40)..];
            eprintln!("the daemon's log ends with:\n  {}", tail.join("\n  "));
        }
        self.leftovers.sweep();
        if self.small_disk {
            let _ = nix::mount::umount2(&self.directory.join("root"), nix::mount::MntFlags::MNT_DETACH);
        }
        if std::thread::panicking() && std::env::var_os("STAVE_E2E_KEEP").is_some() {
            eprintln!("kept: {}", self.directory.display());
        } else {
            let _ = fs::remove_dir_all(&self.directory);
        }
    }
}

/// What the configuration begins and ends with for runtime handlers.
fn runtimes(options: &Options) -> (String, String) {
    let key = |name: &str| format!("default_runtime = \"{name}\"\n");
    if let Some(name) = &options.default_runtime {
        return (key(name), String::new());
    }
    match crate::oci_runtime() {
        Some(path) => {
            let table = format!("\n[runtimes.under-test]\ntype = \"oci\"\npath = \"{}\"\n", path.display());
            (key("under-test"), table)
        }
        None => Default::default(),
    }
}

fn peer_socket() -> Option<PathBuf> {
    std::env::var_os("STAVE_E2E_PEER_SOCKET").map(PathBuf::from)
}

/// Where `stave` and `stave-pod` are: `STAVE_BIN_DIR`, or beside the directory of the test programs.
fn bin_dir() -> PathBuf {
    if let Some(directory) = std::env::var_os("STAVE_BIN_DIR").filter(|directory| !directory.is_empty()) {
        return PathBuf::from(directory);
    }
    let program = std::env::current_exe().expect("path of the test program");
    program.ancestors().nth(2).expect("target directory").to_owned()
}

/// The daemon's program and arguments.
fn command(directory: &Path) -> Vec<String> {
    let own = directory.join("bin/stave");
    let program = if own.exists() { own } else { bin_dir().join("stave") };
    let text = |path: PathBuf| path.to_string_lossy().into_owned();
    let mut command = vec![text(program), "serve".to_owned()];
    for (option, name) in
        [("--config", "config.toml"), ("--root", "root"), ("--state", "state"), ("--listen", "stave.sock")]
    {
        command.extend([option.to_owned(), text(directory.join(name))]);
    }
    command.extend(["--log-level", "debug"].map(str::to_owned));
    command
}

fn spawn(directory: &Path, environment: &[(String, String)]) -> Child {
    let command = command(directory);
    let log = fs::File::options()
        .create(true)
        .append(true)
        .open(directory.join("stave.log"))
        .expect("the daemon's log");
    let mut daemon = Command::new(&command[0]);
    daemon
        .args(&command[1..])
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("the daemon's log"))
        .stderr(log);
    let end = Instant::now() + crate::limit(5);
    loop {
        match daemon.spawn() {
            // A copy that was just written: a child of another test, on its way to its own program, still has it open.
            Err(e) if e.kind() == ErrorKind::ExecutableFileBusy && Instant::now() < end => {
                std::thread::sleep(crate::pause(10));
            }
            result => {
                return result.unwrap_or_else(|e| {
                    panic!("{}: {e}; build it with: cargo build -p stave -p stave-pod", command[0])
                });
            }
        }
    }
}

async fn connect(directory: &Path) -> Cri {
    let socket = directory.join("stave.sock");
    let end = Instant::now() + crate::limit(20);
    loop {
        // Most of the wait, and an attempt takes longer than a look.
        if !socket.exists() && Instant::now() < end {
            tokio::time::sleep(crate::pause(10)).await;
            continue;
        }
        let result = match Cri::connect(&socket, crate::limit(60)).await {
            Ok(cri) => match cri.version(Default::default()).await {
                Ok(_) => return cri,
                Err(error) => error.to_string(),
            },
            Err(error) => error.to_string(),
        };
        if Instant::now() > end {
            let log = fs::read_to_string(directory.join("stave.log")).unwrap_or_default();
            panic!("no answer at {}: {result}; the daemon's log:\n{log}", socket.display());
        }
        tokio::time::sleep(crate::pause(10)).await;
    }
}

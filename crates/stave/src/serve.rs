//! `stave serve`: the daemon.

use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use sd_notify::NotifyState;
use stave_config::{CgroupDriver, Config, LogFormat, NetworkMode};
use stave_images::Images;
use stave_pods::{Network, Pods, Settings};
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::UnixListenerStream;

/// Requests that are under way at SIGTERM have this long to end. Their jobs are found again.
const SHUTDOWN: Duration = Duration::from_secs(5);

/// What goes on in the background has this long. The next daemon finds what is left.
const DRAIN: Duration = Duration::from_secs(2);

/// What a killed daemon was just starting holds its lock for no longer than this.
const LOCK_PATIENCE: Duration = Duration::from_secs(3);

/// How long the start waits for systemd to tell its cgroup.
const BUS_TIMEOUT: Duration = Duration::from_secs(3);

/// Runs until SIGTERM or SIGINT. Pods go on without the daemon.
pub(crate) async fn run(config: Config) -> anyhow::Result<()> {
    start_log(&config);
    // What we were started with is not for the programs that we start.
    stave_sys::close_range_cloexec(3).context("descriptors at the start")?;
    refuse_unbuilt(&config)?;
    stave_state::private_dir(&config.root)?;
    stave_state::private_dir(&config.state)?;
    let _lock = stave_state::RootLock::acquire(&config.root, LOCK_PATIENCE)?;

    let report = tokio::task::spawn_blocking({
        let config = config.clone();
        // The profile is loaded below, which says as much.
        move || crate::check::probe(&config, false)
    })
    .await?;
    for check in report.checks.iter().filter(|check| check.status != stave_host::Status::Ok) {
        tracing::warn!(
            check = check.name,
            found = check.found,
            cost = check.cost,
            "the host lacks something"
        );
    }
    let layout = stave_cgroup::detect().context("cgroup layout")?;
    let unified_cgroup = matches!(layout, stave_cgroup::Layout::Unified { .. });
    let systemd = stave_systemd::Systemd::default();
    let cgroups = cgroups(&config, layout, &report.features, &systemd).await?;
    let systemd_cgroup = cgroups.uses_systemd();
    let images = Images::open(&config.root, &config.registries.config_dir).await.context("image store")?;
    let supervisor = supervisor_binary()?;
    let block_io = config.cgroup.blockio.as_deref().map(stave_pods::BlockIoClasses::read).transpose()?;
    let pods = Pods::new(Settings {
        root: config.root.clone(),
        state: config.state.clone(),
        images: images.clone(),
        unified_cgroup,
        cgroups,
        systemd,
        network: network(&config).await,
        supervisor: stave_sys::sealed_copy(&supervisor)
            .with_context(|| format!("sealed copy of {}", supervisor.display()))?,
        ready: config.pods.ready,
        runtimes: crate::runtimes::probe(&config).await,
        bounding_set: report.features.bounding_set.clone(),
        lowers_oom_score: report.features.cap_sys_resource,
        block_io: block_io.unwrap_or_default(),
        overlay_volatile: report.features.overlay_volatile,
        user_namespaces: report.features.user_namespaces && report.features.idmapped_mounts,
        apparmor: apparmor(&report.features, config.apparmor.profile.clone()).await?,
        selinux: report.features.selinux.then(stave_lsm::selinux::Policy::of_host),
    })?;
    pods.recover().await;

    let streaming = streaming_config(&config);
    let streaming = Arc::new(stave_streaming::Server::bind(streaming).await?);
    let listener = listen(&config.listen)?;
    let services = stave_cri::Services::new(stave_cri::State {
        pods: pods.clone(),
        images,
        streaming: Arc::clone(&streaming),
        features: report.features,
        systemd_cgroup,
        config_json: effective(&config).to_string(),
    });
    if let Some(address) = config.metrics.address {
        crate::metrics::serve(address, pods.clone()).await?;
    }
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let server = tonic::transport::Server::builder()
        .layer(crate::deadline::Deadlines)
        .add_service(services.runtime())
        .add_service(services.image())
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener).filter_map(admit), async {
            let _ = stopped.await;
        });
    let server = tokio::spawn(server);
    let (stop_streaming, streaming_stopped) = tokio::sync::oneshot::channel::<()>();
    let url = streaming.base_url().to_owned();
    let streaming = tokio::spawn(streaming.serve(async {
        let _ = streaming_stopped.await;
    }));
    tracing::info!(
        listen = %config.listen.display(),
        streaming = url,
        version = env!("CARGO_PKG_VERSION"),
        "serving CRI v1"
    );
    // Without systemd there is no NOTIFY_SOCKET, and this does nothing.
    if let Err(error) = sd_notify::notify(&[NotifyState::Ready]) {
        tracing::warn!(%error, "sd_notify");
    }
    crate::watchdog::start(config.listen.clone());
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping; pods go on");
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
    let _ = stop.send(());
    let _ = stop_streaming.send(());
    // The streaming server ends its sessions, and itself, within a bounded time.
    let (server, streaming) = tokio::join!(tokio::time::timeout(SHUTDOWN, server), streaming);
    pods.drain(DRAIN).await;
    streaming.context("streaming server")?;
    match server {
        Ok(ended) => ended?.context("CRI server")?,
        Err(_) => tracing::warn!("some requests did not end within {SHUTDOWN:?}"),
    }
    std::fs::remove_file(&config.listen).with_context(|| config.listen.display().to_string())
}

fn start_log(config: &Config) {
    // The libraries' debug messages tell frames and packets; those are for their authors.
    let level = config.log.level.as_str();
    let filter = tracing_subscriber::EnvFilter::new(format!(
        "{level},h2=warn,hyper=warn,hyper_util=warn,reqwest=warn,rustls=warn,tonic=info,tower=warn,netlink_proto=error"
    ));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match config.log.format {
        LogFormat::Text => log.with_ansi(false).init(),
        LogFormat::Json => log.json().init(),
    }
}

/// What the configuration asks for and this version can't do is refused, and not ignored.
fn refuse_unbuilt(config: &Config) -> anyhow::Result<()> {
    if config.nri.enable {
        bail!("nri.enable true: NRI is not built yet");
    }
    Ok(())
}

/// Loads the default profile where the kernel has AppArmor. Why that failed is for the pods that ask for it.
async fn apparmor(
    features: &stave_host::Features,
    file: Option<PathBuf>,
) -> anyhow::Result<stave_pods::AppArmor> {
    if !features.apparmor {
        return Ok(stave_pods::AppArmor::Off);
    }
    let loaded =
        tokio::task::spawn_blocking(move || stave_lsm::apparmor::load_default(file.as_deref())).await?;
    Ok(match loaded {
        Ok(()) => stave_pods::AppArmor::On,
        Err(error) => {
            tracing::error!(%error, "the default AppArmor profile is not loaded; pods that ask for it are refused");
            stave_pods::AppArmor::NoDefault(error.to_string())
        }
    })
}

/// With the driver that the configuration names, or that `auto` finds.
async fn cgroups(
    config: &Config,
    layout: stave_cgroup::Layout,
    features: &stave_host::Features,
    systemd: &stave_systemd::Systemd,
) -> anyhow::Result<stave_cgroup::Cgroups> {
    let driver = match config.cgroup.driver {
        CgroupDriver::Auto if features.systemd_cgroup => CgroupDriver::Systemd,
        CgroupDriver::Auto => CgroupDriver::Cgroupfs,
        given => given,
    };
    let parent = config.cgroup.parent_for(driver).map_err(anyhow::Error::msg)?;
    tracing::info!(driver = driver.as_str(), parent, "cgroup driver");
    if driver != CgroupDriver::Systemd {
        return Ok(stave_cgroup::Cgroups::new(layout, &parent));
    }
    if !features.systemd_cgroup {
        bail!(
            "cgroup.driver \"systemd\": systemd can't make cgroups on this host, see `stave check`; use \"cgroupfs\""
        );
    }
    // A bus that is not up yet must not keep the daemon, and what runs, from coming up: it is asked again with each
    // pod. On a host this is "".
    let root = match tokio::time::timeout(BUS_TIMEOUT, systemd.control_group()).await {
        Ok(Ok(root)) => root,
        Ok(Err(error)) => {
            tracing::error!(%error, "systemd's cgroup is taken for the root");
            String::new()
        }
        Err(_) => {
            tracing::error!(
                "no answer from systemd within {BUS_TIMEOUT:?}; its cgroup is taken for the root"
            );
            String::new()
        }
    };
    stave_cgroup::Cgroups::with_systemd(layout, &parent, &root).context("cgroup.parent")
}

/// A network that can't be set up is no reason not to run: pods on the host's network do, and Status says why.
async fn network(config: &Config) -> Network {
    match config.network.mode {
        NetworkMode::None => Network::None,
        NetworkMode::Cni => {
            let cni = &config.network.cni;
            let settings = stave_cni::Settings {
                conf_dir: cni.conf_dir.clone(),
                bin_dirs: cni.bin_dirs.clone(),
                conf_template: cni.conf_template.clone(),
                netns_dir: cni.netns_dir.clone(),
                timeout: Duration::from_secs(cni.timeout.into()),
                records: config.root.join("network/cni"),
                run: config.state.join("cni"),
                // As with the bridge: one node, one truth.
                ranges: config.root.join("network/ranges"),
            };
            match stave_cni::Cni::open(settings).await {
                Ok(cni) => Network::Cni(cni),
                Err(error) => {
                    tracing::error!(%error, "the CNI network can't be set up");
                    Network::Unready(error.to_string())
                }
            }
        }
        NetworkMode::Bridge => {
            let bridge = stave_network::BridgeConfig {
                name: config.network.bridge.name.clone(),
                subnets: config.network.bridge.subnets.iter().map(ToString::to_string).collect(),
            };
            match stave_network::BridgeNetwork::open(bridge, &config.root.join("network")).await {
                Ok(bridge) => Network::Bridge(bridge),
                Err(error) => {
                    tracing::error!(%error, "the bridge network can't be set up");
                    Network::Unready(error.to_string())
                }
            }
        }
    }
}

/// `stave-pod` beside this binary, else in PATH.
fn supervisor_binary() -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("own path")?;
    let beside = own.with_file_name("stave-pod");
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::iter::once(beside.clone())
        .chain(std::env::split_paths(&path).map(|dir| dir.join("stave-pod")))
        .find(|candidate| candidate.is_file())
        .with_context(|| {
            format!("the supervisor: neither {} nor stave-pod in PATH {path:?}", beside.display())
        })
}

fn listen(path: &Path) -> anyhow::Result<UnixListener> {
    let context = || format!("listening on {}", path.display());
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).with_context(context)?;
    }
    // The root is locked: whatever is there is of a daemon that ended without cleaning up, unless
    // somebody listens: then it is another daemon's, with another root.
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => bail!("{}: another process listens there", context()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(_) => std::fs::remove_file(path).with_context(context)?,
    }
    let listener = UnixListener::bind(path).with_context(context)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).with_context(context)?;
    Ok(listener)
}

/// Only root and our own user may speak to the daemon, whatever became of the socket's mode.
fn admit(connection: std::io::Result<UnixStream>) -> Option<std::io::Result<UnixStream>> {
    let stream = match connection {
        Ok(stream) => stream,
        Err(error) => return Some(Err(error)),
    };
    match rustix::net::sockopt::socket_peercred(stream.as_fd()) {
        Ok(peer) if peer.uid.is_root() || peer.uid == rustix::process::geteuid() => Some(Ok(stream)),
        Ok(peer) => {
            tracing::warn!(uid = peer.uid.as_raw(), "refused a connection");
            None
        }
        Err(error) => {
            tracing::warn!(%error, "peer credentials of a connection");
            None
        }
    }
}

/// Where to serve exec, attach and port-forward, and how.
fn streaming_config(config: &Config) -> stave_streaming::Config {
    let given = &config.streaming;
    let mut streaming = stave_streaming::Config::new(given.address, given.port);
    // Loading has checked that there are both or none.
    if let (Some(certificate), Some(key)) = (given.tls_certificate.clone(), given.tls_key.clone()) {
        streaming.tls = Some(stave_streaming::TlsFiles { certificate, key });
    } else if !given.address.is_loopback() {
        tracing::warn!(
            address = %given.address,
            "the streaming server is no loopback address and has no TLS: whoever sees the traffic can read it and take \
             over sessions; set streaming.tls_certificate and streaming.tls_key"
        );
    }
    streaming
}

/// The effective configuration, for verbose Status; the names are those that tools look for.
fn effective(config: &Config) -> serde_json::Value {
    serde_json::json!({
        "root": config.root,
        "stateDir": config.state,
        "listen": config.listen,
        "cgroup": { "driver": config.cgroup.driver.as_str(), "parent": config.cgroup.parent },
        "pods": { "ready": config.pods.ready },
        "network": {
            "mode": config.network.mode.as_str(),
            "bridge": {
                "name": config.network.bridge.name,
                "subnets": config.network.bridge.subnets.iter().map(ToString::to_string).collect::<Vec<_>>(),
            },
            "cni": {
                "confDir": config.network.cni.conf_dir,
                "binDirs": config.network.cni.bin_dirs,
                "confTemplate": config.network.cni.conf_template,
                "netnsDir": config.network.cni.netns_dir,
                "timeout": config.network.cni.timeout,
            },
        },
        "streaming": {
            "address": config.streaming.address,
            "port": config.streaming.port,
            "tls_certificate": config.streaming.tls_certificate,
            "tls_key": config.streaming.tls_key,
        },
        "default_runtime": config.default_runtime,
        "registries": { "config_dir": config.registries.config_dir },
    })
}

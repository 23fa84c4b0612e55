//! `stave run`

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, anyhow, bail};
use clap::{Args, ValueEnum};
use serde::Serialize;
use stave_cri_proto::v1::{
    ContainerConfig, ContainerMetadata, CreateContainerRequest, ImageSpec, ImageStatusRequest, KeyValue,
    LinuxContainerConfig, LinuxContainerSecurityContext, LinuxPodSandboxConfig, LinuxSandboxSecurityContext,
    NamespaceMode, NamespaceOption, PodSandbox, PodSandboxConfig, PodSandboxMetadata,
    PodSandboxStatusRequest, RemovePodSandboxRequest, RunPodSandboxRequest, StartContainerRequest,
    StopPodSandboxRequest,
};
use tokio::signal::unix::{SignalKind, signal};

use super::connection::{Client, plain};
use super::exec::exit_code;
use super::humanise::short_id;
use super::list::addresses;
use super::logs::{self, Printer, status_of};
use super::output::{self, Format};
use super::pull::pull;
use super::resolve::{Known, pod_name};
use super::stop::stop_container;

/// The logs of the pods that are made here: one directory a pod.
const LOGS: &str = "/var/log/stave";
/// Marks the pods that are made here.
const MADE_BY_RUN: &str = "stave.run";

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// The name of the pod and of its container [default: the image's name and five letters]
    #[arg(long)]
    name: Option<String>,
    /// Follow the logs, and remove the pod when its container ends or on Ctrl-C
    #[arg(long)]
    rm: bool,
    /// Follow the logs until the container ends, and exit as it did; Ctrl-C leaves it running
    #[arg(short, long)]
    follow: bool,
    /// The pod's network
    #[arg(long, value_enum, default_value_t)]
    net: Net,
    /// Set an environment variable
    #[arg(short, long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// How to print the ids
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    /// The image
    image: String,
    /// What to run instead of the image's command; the image's entrypoint stays before it
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "CMD")]
    command: Vec<String>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum Net {
    /// Interfaces and an address of its own
    #[default]
    Pod,
    /// The node's
    Host,
}

#[derive(Serialize)]
struct Started<'a> {
    pod: &'a str,
    container: &'a str,
    name: &'a str,
    addresses: &'a [String],
}

pub(crate) async fn run(mut client: Client, args: RunArgs) -> anyhow::Result<ExitCode> {
    let envs = args.env.iter().map(|text| variable(text)).collect::<anyhow::Result<Vec<KeyValue>>>()?;
    let image = image_id(&mut client, &args.image).await?;
    let known = Known::list(&mut client).await?;
    let name = match &args.name {
        Some(name) => valid_name(name)?.to_owned(),
        None => generated_name(&args.image)?,
    };
    if known.pods.iter().any(|pod| pod_name(pod) == name) {
        bail!("there is a pod {name:?} already: remove it with `stave rm {name}`, or use another name");
    }
    let logs = Path::new(LOGS).join(&name);
    make_private(&logs).with_context(|| format!("log directory {}", logs.display()))?;

    let made = Made { name, logs };
    let config = made.pod_config(args.net)?;
    let request = RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: String::new() };
    let pod = match client.runtime.run_pod_sandbox(request).await {
        Ok(answer) => answer.into_inner().pod_sandbox_id,
        Err(status) => {
            let _ = made.remove_logs();
            return Err(plain(status));
        }
    };
    let container = ContainerConfig {
        metadata: Some(ContainerMetadata { name: made.name.clone(), attempt: 0 }),
        image: Some(ImageSpec { image, user_specified_image: args.image.clone(), ..Default::default() }),
        args: args.command.clone(),
        envs,
        log_path: "0.log".to_owned(),
        labels: [(MADE_BY_RUN, "true"), ("io.kubernetes.container.name", &made.name)]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into(),
        linux: Some(LinuxContainerConfig {
            security_context: Some(LinuxContainerSecurityContext {
                namespace_options: Some(namespaces(args.net)),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    };
    let container = match Box::pin(start(&mut client, &pod, container, config)).await {
        Ok(container) => container,
        Err(error) => {
            return Err(match made.remove(&mut client, &pod).await {
                Ok(()) => error,
                Err(left) => anyhow!("{error:#}; and pod {} is left behind: {left:#}", made.name),
            });
        }
    };
    if !(args.rm || args.follow) {
        made.tell(&mut client, &pod, &container, args.output).await?;
        return Ok(ExitCode::SUCCESS);
    }
    let followed = follow(&mut client, &made, &container, args.rm).await;
    if args.rm {
        made.remove(&mut client, &pod).await.with_context(|| format!("pod {} is left behind", made.name))?;
    }
    followed
}

/// Creates and starts the container; returns its id.
async fn start(
    client: &mut Client,
    pod: &str,
    config: ContainerConfig,
    sandbox_config: PodSandboxConfig,
) -> anyhow::Result<String> {
    let request = CreateContainerRequest {
        pod_sandbox_id: pod.to_owned(),
        config: Some(config),
        sandbox_config: Some(sandbox_config),
    };
    let container = client.runtime.create_container(request).await.map_err(plain)?.into_inner().container_id;
    let request = StartContainerRequest { container_id: container.clone() };
    client.runtime.start_container(request).await.map_err(plain)?;
    Ok(container)
}

/// Prints what the container writes until it ends; then its exit code is ours. A signal stops the
/// container if it is to be removed, a second one kills it; otherwise it is left alone.
async fn follow(client: &mut Client, made: &Made, container: &str, rm: bool) -> anyhow::Result<ExitCode> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let path = made.logs.join("0.log");
    let mut reader = client.clone();
    let following = logs::follow(&mut reader, container, &path, Printer::default());
    tokio::pin!(following);
    let mut stops = tokio::task::JoinSet::new();
    let mut signals = 0;
    loop {
        tokio::select! {
            followed = &mut following => {
                followed?;
                break;
            }
            Some(stopped) = stops.join_next() => stopped??,
            _ = async { tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} } } => {
                if !rm {
                    eprintln!("{} goes on; `stave logs -f {}` shows it again", made.name, made.name);
                    // 128 and the number of SIGINT, as shells have it.
                    return Ok(ExitCode::from(130));
                }
                let timeout = if signals == 0 { 10 } else { 0 };
                signals += 1;
                let (mut client, container) = (client.clone(), container.to_owned());
                stops.spawn(async move { stop_container(&mut client, &container, timeout).await });
            }
        }
    }
    match status_of(client, container).await? {
        Some(status) => Ok(exit_code(status.exit_code)),
        None => bail!("container {} was removed while it ran", made.name),
    }
}

/// The id of an image, which is pulled if it is not there.
async fn image_id(client: &mut Client, image: &str) -> anyhow::Result<String> {
    let spec = ImageSpec { image: image.to_owned(), ..Default::default() };
    let request = ImageStatusRequest { image: Some(spec), verbose: false };
    match client.images.image_status(request).await.map_err(plain)?.into_inner().image {
        Some(image) => Ok(image.id),
        None => pull(client, image, None, false).await,
    }
}

/// A pod that is being made here.
struct Made {
    name: String,
    logs: PathBuf,
}

/// For the pod and for its container, as the kubelet sends them.
fn namespaces(net: Net) -> NamespaceOption {
    let network = match net {
        Net::Pod => NamespaceMode::Pod,
        Net::Host => NamespaceMode::Node,
    };
    NamespaceOption {
        network: network.into(),
        pid: NamespaceMode::Container.into(),
        ipc: NamespaceMode::Pod.into(),
        ..Default::default()
    }
}

impl Made {
    fn pod_config(&self, net: Net) -> anyhow::Result<PodSandboxConfig> {
        let uid = random(16)?.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        Ok(PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: self.name.clone(),
                uid: uid.clone(),
                namespace: "default".to_owned(),
                attempt: 0,
            }),
            // A pod on the node's network has the node's name.
            hostname: if net == Net::Host { String::new() } else { self.name.clone() },
            log_directory: self.logs.display().to_string(),
            // The labels of the kubelet, so that `crictl` shows the names.
            labels: [
                (MADE_BY_RUN, "true"),
                ("io.kubernetes.pod.name", &self.name),
                ("io.kubernetes.pod.namespace", "default"),
                ("io.kubernetes.pod.uid", &uid),
            ]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into(),
            linux: Some(LinuxPodSandboxConfig {
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(namespaces(net)),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        })
    }

    async fn tell(
        &self,
        client: &mut Client,
        pod: &str,
        container: &str,
        format: Format,
    ) -> anyhow::Result<()> {
        let request = PodSandboxStatusRequest { pod_sandbox_id: pod.to_owned(), verbose: false };
        let status = client.runtime.pod_sandbox_status(request).await.map_err(plain)?.into_inner();
        let addresses = addresses(&status.status.unwrap_or_default());
        if format == Format::Json {
            return output::print_json(&Started { pod, container, name: &self.name, addresses: &addresses });
        }
        let address = if addresses.is_empty() { String::new() } else { format!("  {}", addresses.join(",")) };
        output::print(&format!(
            "pod        {}  {}{address}\ncontainer  {}  {}\n",
            self.name,
            short_id(pod),
            self.name,
            short_id(container)
        ))
    }

    async fn remove(&self, client: &mut Client, pod: &str) -> anyhow::Result<()> {
        let request = StopPodSandboxRequest { pod_sandbox_id: pod.to_owned() };
        client.runtime.stop_pod_sandbox(request).await.map_err(plain)?;
        let request = RemovePodSandboxRequest { pod_sandbox_id: pod.to_owned() };
        client.runtime.remove_pod_sandbox(request).await.map_err(plain)?;
        self.remove_logs()
    }

    fn remove_logs(&self) -> anyhow::Result<()> {
        match fs::remove_dir_all(&self.logs) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("log directory {}", self.logs.display()))
            }
            _ => Ok(()),
        }
    }
}

/// Removes the logs of a pod, if it was made here.
pub(crate) fn remove_logs_of(pod: &PodSandbox) -> anyhow::Result<()> {
    let name = pod_name(pod);
    // The name becomes a path: anybody may set the label, and a pod's name comes over the socket.
    if !pod.labels.contains_key(MADE_BY_RUN) || valid_name(&name).is_err() {
        return Ok(());
    }
    Made { logs: Path::new(LOGS).join(&name), name }.remove_logs()
}

fn make_private(dir: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

/// A name that is good as a host name too (RFC 1123 label), as Kubernetes wants it of pods.
fn valid_name(name: &str) -> anyhow::Result<&str> {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    let good = (1..=63).contains(&name.len())
        && name.bytes().all(inner)
        && !name.starts_with('-')
        && !name.ends_with('-');
    if good {
        return Ok(name);
    }
    bail!("--name {name:?}: at most 63 lower case letters, digits and inner hyphens")
}

/// The last part of the image's name and five random letters.
fn generated_name(image: &str) -> anyhow::Result<String> {
    // No vowels: no words by accident.
    const LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    let suffix: String =
        random(5)?.iter().map(|byte| char::from(LETTERS[usize::from(*byte) % LETTERS.len()])).collect();
    Ok(format!("{}-{suffix}", base_name(image)))
}

/// What of an image's reference can be part of a name.
fn base_name(image: &str) -> String {
    let path = image.split('@').next().unwrap_or_default();
    let last = path.rsplit('/').next().unwrap_or_default();
    let last = last.split(':').next().unwrap_or_default();
    let cleaned: String = last
        .chars()
        .map(|character| if character.is_ascii_alphanumeric() { character.to_ascii_lowercase() } else { '-' })
        .take(40)
        .collect();
    match cleaned.trim_matches('-') {
        "" => "pod".to_owned(),
        name => name.to_owned(),
    }
}

fn random(count: usize) -> anyhow::Result<Vec<u8>> {
    let mut bytes = vec![0; count];
    let got = rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty())?;
    if got != count {
        bail!("the kernel gave {got} random bytes of {count}");
    }
    Ok(bytes)
}

fn variable(text: &str) -> anyhow::Result<KeyValue> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => {
            Ok(KeyValue { key: key.to_owned(), value: value.as_bytes().to_owned() })
        }
        _ => bail!("--env {text:?}: must be NAME=VALUE"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_from_the_image() {
        for (image, name) in [
            ("busybox", "busybox"),
            ("quay.io/podman/Hello_World:v1", "hello-world"),
            ("localhost:5000/a/b@sha256:0123", "b"),
            ("", "pod"),
            ("x/___", "pod"),
        ] {
            assert_eq!(base_name(image), name, "{image}");
        }
        let generated = generated_name("busybox:1.36").unwrap();
        assert!(generated.starts_with("busybox-") && generated.len() == 13, "{generated}");
        assert!(valid_name(&generated).is_ok());
        assert_ne!(generated, generated_name("busybox:1.36").unwrap());
    }

    #[test]
    fn names_that_would_be_paths_or_no_host_names_are_refused() {
        for bad in ["", "-a", "a-", "..", "a/b", "A", "a.b", &"a".repeat(64)] {
            assert!(valid_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn variables_are_pairs() {
        let pair = variable("A=b=c").unwrap();
        assert_eq!((pair.key.as_str(), pair.value.as_slice()), ("A", &b"b=c"[..]));
        assert!(variable("A").is_err());
        assert!(variable("=b").is_err());
    }
}

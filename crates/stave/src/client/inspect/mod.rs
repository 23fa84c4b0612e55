//! `stave inspect`: what the kernel has of a container, beside what was asked for.
//!
//! What was asked for is the OCI specification and the resources that the daemon tells. What the kernel
//! has is read here, from /proc and the cgroup file systems, so this runs on the node, as root.

mod limits;
mod mounts;
mod namespaces;
mod process;
mod procfs;
mod report;

use anyhow::{Context as _, bail};
use clap::Args;
use serde_json::Value;
use stave_cri_proto::v1::{ContainerState, ContainerStatus, ContainerStatusRequest, PodSandboxStatusRequest};

use super::connection::{Client, plain};
use super::output::{self, Format};
use super::resolve::Known;
use procfs::Proc;
use report::{Report, Section};

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// The container, or a pod that has only one
    container: String,
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

/// All that the daemon tells of a container.
struct Asked {
    status: ContainerStatus,
    /// The OCI runtime specification.
    spec: Value,
    /// The config of CreateContainer.
    config: Value,
    /// Below the root of each cgroup hierarchy.
    cgroup: String,
    /// Host pid of the pod's supervisor, which is in the pod's namespaces.
    supervisor: i32,
    /// Host pid of the container whose PID namespace it joins; 0: none.
    pid_target: i32,
    /// The init waits for StartContainer: what execve brings is not there yet.
    waiting: bool,
    /// The runtime handler that made it, and its program.
    runtime: String,
}

pub(crate) async fn run(mut client: Client, args: InspectArgs) -> anyhow::Result<()> {
    let known = Known::list(&mut client).await?;
    let container = known.container(&args.container)?;
    let pod = known.pod_name(&container.pod_sandbox_id);
    let (asked, pid, bundle) = Box::pin(ask(&mut client, &container.id)).await?;
    let name = format!("{pod}/{}", super::resolve::container_name(container));
    if pid == 0 {
        let state = super::list::state_word(asked.status.state);
        bail!("container {name} is {state}: the kernel has nothing of it");
    }
    if !rustix::process::geteuid().is_root() {
        bail!("only root may look at the processes of containers");
    }
    let proc = Proc::open(pid)
        .with_context(|| format!("process {pid} of container {name}: is this the node that it runs on?"))?;
    let cgroups = proc.cgroups()?;
    if !cgroups.values().any(|path| path.contains(&container.id)) {
        bail!(
            "process {pid} is in none of the container's cgroups: the container has ended meanwhile, try again"
        );
    }
    let sections = vec![
        Section { title: "namespaces", rows: namespaces::rows(&asked, &proc)? },
        Section { title: "process", rows: process::rows(&asked, &proc)? },
        Section { title: "mounts", rows: mounts::rows(&asked, &proc)? },
        Section { title: "limits", rows: limits::rows(&asked, &cgroups)? },
    ];
    // All of it was read from one process, or it is worth nothing.
    Proc::open(pid)?.same_as(&proc)?;
    let report = Report {
        container: container.id.clone(),
        name,
        pod: container.pod_sandbox_id.clone(),
        state: super::list::state_word(asked.status.state),
        pid,
        runtime: asked.runtime,
        bundle,
        cgroup: asked.cgroup,
        differences: sections.iter().flat_map(|section| &section.rows).filter(|row| row.differs).count(),
        sections,
    };
    match args.output {
        Format::Json => output::print_json(&report),
        Format::Table => output::print(&report.to_string()),
    }
}

/// What was asked for, the init's pid, the bundle.
async fn ask(client: &mut Client, id: &str) -> anyhow::Result<(Asked, i32, String)> {
    let (status, mut info) = container_info(client, id).await?;
    let pod_id = info["sandboxID"].as_str().unwrap_or_default().to_owned();
    let request = PodSandboxStatusRequest { pod_sandbox_id: pod_id, verbose: true };
    let answer = client.runtime.pod_sandbox_status(request).await.map_err(plain)?.into_inner();
    let pod = verbose(&answer.info)?;
    let options = &info["config"]["linux"]["security_context"]["namespace_options"];
    let target = options["target_id"].as_str().unwrap_or_default().to_owned();
    let pid_target = match target.as_str() {
        "" => 0,
        // It may be gone; then there is nothing to compare with.
        target => container_info(client, target).await.map_or(0, |(_, info)| number(&info["pid"])),
    };
    let cgroup = info["cgroup"].as_str().context("the daemon tells no cgroup of the container")?.to_owned();
    let asked = Asked {
        waiting: status.state() == ContainerState::ContainerCreated,
        status,
        spec: info["runtimeSpec"].take(),
        config: info["config"].take(),
        cgroup,
        supervisor: number(&pod["pid"]),
        pid_target,
        runtime: match (pod["oci"]["handler"].as_str(), pod["oci"]["program"].as_str()) {
            (Some(handler), Some(program)) => format!("{handler} ({program})"),
            _ => "built-in executor".to_owned(),
        },
    };
    if !asked.spec.is_object() {
        bail!("the daemon has no specification of container {id}");
    }
    Ok((asked, number(&info["pid"]), info["bundle"].as_str().unwrap_or_default().to_owned()))
}

async fn container_info(client: &mut Client, id: &str) -> anyhow::Result<(ContainerStatus, Value)> {
    let request = ContainerStatusRequest { container_id: id.to_owned(), verbose: true };
    let answer = client.runtime.container_status(request).await.map_err(plain)?.into_inner();
    Ok((answer.status.unwrap_or_default(), verbose(&answer.info)?))
}

fn verbose(info: &std::collections::HashMap<String, String>) -> anyhow::Result<Value> {
    let text = info.get("info").context("the daemon tells nothing more about it (no verbose info)")?;
    serde_json::from_str(text).context("verbose info of the daemon")
}

fn number(value: &Value) -> i32 {
    value.as_i64().and_then(|number| i32::try_from(number).ok()).unwrap_or(0)
}

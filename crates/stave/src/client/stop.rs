//! `stave stop`

use clap::Args;
use stave_cri_proto::v1::{ContainerState, StopContainerRequest, StopPodSandboxRequest};

use super::connection::{Client, plain};
use super::resolve::{Known, Target};
use super::{output, sum_up};

#[derive(Debug, Args)]
pub(crate) struct StopArgs {
    /// How long a container may take after its stop signal before it is killed
    #[arg(short, long, value_name = "SECONDS", default_value_t = 10)]
    timeout: u32,
    /// Containers and pods
    #[arg(required = true, value_name = "CONTAINER|POD")]
    names: Vec<String>,
}

pub(crate) async fn run(mut client: Client, args: StopArgs) -> anyhow::Result<()> {
    let known = Known::list(&mut client).await?;
    let mut errors = Vec::new();
    for name in &args.names {
        let stopped = match known.target(name) {
            Ok(Target::Container(container)) => {
                stop_container(&mut client, &container.id, args.timeout).await
            }
            Ok(Target::Pod(pod)) => stop_pod(&mut client, &known, &pod.id, args.timeout).await,
            Err(error) => Err(error),
        };
        match stopped {
            Ok(()) => output::print(&format!("{name}\n"))?,
            Err(error) => {
                if args.names.len() > 1 {
                    eprintln!("stave: {name}: {error:#}");
                }
                errors.push(error);
            }
        }
    }
    sum_up(errors, args.names.len(), "stopped")
}

pub(crate) async fn stop_container(client: &mut Client, id: &str, timeout: u32) -> anyhow::Result<()> {
    let request = StopContainerRequest { container_id: id.to_owned(), timeout: i64::from(timeout) };
    client.runtime.stop_container(request).await.map(drop).map_err(plain)
}

/// Stops the containers that run, all at once, each with its time; then the pod.
pub(crate) async fn stop_pod(
    client: &mut Client,
    known: &Known,
    id: &str,
    timeout: u32,
) -> anyhow::Result<()> {
    let mut stops = tokio::task::JoinSet::new();
    for container in known.containers_of(id) {
        if container.state == i32::from(ContainerState::ContainerRunning) {
            let (mut client, id) = (client.clone(), container.id.clone());
            stops.spawn(async move { stop_container(&mut client, &id, timeout).await });
        }
    }
    // StopPodSandbox kills what is left, so a stop that failed is told only if that fails, too.
    let failed: Vec<anyhow::Error> = stops.join_all().await.into_iter().filter_map(Result::err).collect();
    let request = StopPodSandboxRequest { pod_sandbox_id: id.to_owned() };
    match client.runtime.stop_pod_sandbox(request).await {
        Ok(_) => Ok(()),
        Err(status) => Err(failed.into_iter().fold(plain(status), |all, error| all.context(error))),
    }
}

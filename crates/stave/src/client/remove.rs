//! `stave rm`, `stave rmi`

use anyhow::bail;
use clap::Args;
use stave_cri_proto::v1::{
    Container, ContainerState, ImageSpec, ImageStatusRequest, PodSandbox, RemoveContainerRequest,
    RemoveImageRequest, RemovePodSandboxRequest,
};

use super::connection::{Client, plain};
use super::resolve::{Known, Target, container_name, pod_name};
use super::stop::{stop_container, stop_pod};
use super::{output, run, sum_up};

#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    /// Kill what still runs
    #[arg(short, long)]
    force: bool,
    /// Containers and pods
    #[arg(required = true, value_name = "CONTAINER|POD")]
    names: Vec<String>,
}

pub(crate) async fn rm(mut client: Client, args: RmArgs) -> anyhow::Result<()> {
    let known = Known::list(&mut client).await?;
    let mut errors = Vec::new();
    for name in &args.names {
        let removed = match known.target(name) {
            Ok(Target::Container(container)) => remove_container(&mut client, container, args.force).await,
            Ok(Target::Pod(pod)) => remove_pod(&mut client, &known, pod, args.force).await,
            Err(error) => Err(error),
        };
        match removed {
            Ok(()) => output::print(&format!("{name}\n"))?,
            Err(error) => {
                if args.names.len() > 1 {
                    eprintln!("stave: {name}: {error:#}");
                }
                errors.push(error);
            }
        }
    }
    sum_up(errors, args.names.len(), "removed")
}

fn runs(container: &Container) -> bool {
    container.state == i32::from(ContainerState::ContainerRunning)
}

async fn remove_container(client: &mut Client, container: &Container, force: bool) -> anyhow::Result<()> {
    if runs(container) {
        if !force {
            bail!("container {} is running: stop it first, or use -f", container_name(container));
        }
        stop_container(client, &container.id, 0).await?;
    }
    let request = RemoveContainerRequest { container_id: container.id.clone() };
    client.runtime.remove_container(request).await.map(drop).map_err(plain)
}

/// Removes a pod with its containers; and its logs, if `stave run` made it.
pub(crate) async fn remove_pod(
    client: &mut Client,
    known: &Known,
    pod: &PodSandbox,
    force: bool,
) -> anyhow::Result<()> {
    let running: Vec<String> = known
        .containers_of(&pod.id)
        .into_iter()
        .filter(|container| runs(container))
        .map(container_name)
        .collect();
    if !running.is_empty() && !force {
        bail!(
            "pod {} has running containers ({}): stop it first, or use -f",
            pod_name(pod),
            running.join(", ")
        );
    }
    // The CRI removes only what is stopped.
    stop_pod(client, known, &pod.id, 0).await?;
    let request = RemovePodSandboxRequest { pod_sandbox_id: pod.id.clone() };
    client.runtime.remove_pod_sandbox(request).await.map_err(plain)?;
    run::remove_logs_of(pod)
}

#[derive(Debug, Args)]
pub(crate) struct RmiArgs {
    /// References or ids of images
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<String>,
}

pub(crate) async fn rmi(mut client: Client, args: RmiArgs) -> anyhow::Result<()> {
    let mut errors = Vec::new();
    for image in &args.images {
        match remove_image(&mut client, image).await {
            Ok(()) => output::print(&format!("{image}\n"))?,
            Err(error) => {
                if args.images.len() > 1 {
                    eprintln!("stave: {image}: {error:#}");
                }
                errors.push(error);
            }
        }
    }
    sum_up(errors, args.images.len(), "removed")
}

async fn remove_image(client: &mut Client, image: &str) -> anyhow::Result<()> {
    let image = ImageSpec { image: image.to_owned(), ..Default::default() };
    // RemoveImage of what is not there is a success; a person wants to hear of it.
    let request = ImageStatusRequest { image: Some(image.clone()), verbose: false };
    if client.images.image_status(request).await.map_err(plain)?.into_inner().image.is_none() {
        bail!("no image {:?}: `stave images` lists all", image.image);
    }
    client.images.remove_image(RemoveImageRequest { image: Some(image) }).await.map(drop).map_err(plain)
}

//! `stave ps`, `stave pods`, `stave images`

use std::collections::BTreeMap;

use clap::Args;
use serde::Serialize;
use stave_cri_proto::v1::{
    Container, ContainerState, Image, ListImagesRequest, PodSandboxState, PodSandboxStatus,
    PodSandboxStatusRequest,
};
use tonic::Code;

use super::connection::{Client, plain};
use super::humanise::{age, short_id, size};
use super::output::{self, Format};
use super::resolve::{Known, container_name, pod_name};
use super::table::Table;

#[derive(Debug, Args)]
pub(crate) struct PsArgs {
    /// Show the containers that don't run, too
    #[arg(short, long)]
    all: bool,
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Serialize)]
struct ContainerRow {
    id: String,
    name: String,
    attempt: u32,
    pod_id: String,
    pod: String,
    image: String,
    image_id: String,
    state: &'static str,
    /// Nanoseconds since the epoch.
    created_at: i64,
    labels: BTreeMap<String, String>,
}

pub(crate) fn state_word(state: i32) -> &'static str {
    match ContainerState::try_from(state) {
        Ok(ContainerState::ContainerCreated) => "created",
        Ok(ContainerState::ContainerRunning) => "running",
        Ok(ContainerState::ContainerExited) => "exited",
        _ => "unknown",
    }
}

/// The image as the pod's author wrote it, where the daemon knows that; else a name of the image.
fn image_name(container: &Container, images: &[Image]) -> String {
    let spec = container.image.clone().unwrap_or_default();
    if !spec.user_specified_image.is_empty() {
        return spec.user_specified_image;
    }
    let known = images.iter().find(|image| image.id == spec.image);
    known.and_then(|image| image.repo_tags.first().cloned()).unwrap_or(spec.image)
}

/// An image's name for a column: an id is cut.
fn short_image(image: &str) -> &str {
    let digits = image.strip_prefix("sha256:").unwrap_or(image);
    let is_id = digits.len() == 64 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    if is_id { short_id(image) } else { image }
}

pub(crate) async fn ps(mut client: Client, args: PsArgs) -> anyhow::Result<()> {
    let known = Known::list(&mut client).await?;
    let images =
        client.images.list_images(ListImagesRequest::default()).await.map_err(plain)?.into_inner().images;
    let mut rows: Vec<ContainerRow> = known
        .containers
        .iter()
        .filter(|container| args.all || container.state == i32::from(ContainerState::ContainerRunning))
        .map(|container| ContainerRow {
            id: container.id.clone(),
            name: container_name(container),
            attempt: container.metadata.as_ref().map_or(0, |metadata| metadata.attempt),
            pod_id: container.pod_sandbox_id.clone(),
            pod: known.pod_name(&container.pod_sandbox_id),
            image: image_name(container, &images),
            image_id: container.image_id.clone(),
            state: state_word(container.state),
            created_at: container.created_at,
            labels: container.labels.clone().into_iter().collect(),
        })
        .collect();
    rows.sort_by_key(|row| std::cmp::Reverse(row.created_at));
    if args.output == Format::Json {
        return output::print_json(&rows);
    }
    let mut table = Table::new(&["CONTAINER ID", "NAME", "POD", "IMAGE", "STATE", "AGE"]);
    for row in &rows {
        table.row([
            short_id(&row.id),
            &row.name,
            &row.pod,
            short_image(&row.image),
            row.state,
            &age(row.created_at),
        ]);
    }
    output::print(&table.to_string())
}

#[derive(Debug, Args)]
pub(crate) struct PodsArgs {
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Serialize)]
struct PodRow {
    id: String,
    name: String,
    namespace: String,
    uid: String,
    state: &'static str,
    addresses: Vec<String>,
    containers: usize,
    /// Nanoseconds since the epoch.
    created_at: i64,
    labels: BTreeMap<String, String>,
}

/// A pod's addresses, the first one the primary.
pub(crate) fn addresses(status: &PodSandboxStatus) -> Vec<String> {
    let Some(network) = &status.network else { return Vec::new() };
    std::iter::once(&network.ip)
        .chain(network.additional_ips.iter().map(|address| &address.ip))
        .filter(|address| !address.is_empty())
        .cloned()
        .collect()
}

pub(crate) async fn pods(mut client: Client, args: PodsArgs) -> anyhow::Result<()> {
    let known = Known::list(&mut client).await?;
    let mut rows = Vec::new();
    for pod in &known.pods {
        let request = PodSandboxStatusRequest { pod_sandbox_id: pod.id.clone(), verbose: false };
        let status = match client.runtime.pod_sandbox_status(request).await {
            Ok(answer) => answer.into_inner().status.unwrap_or_default(),
            // Removed in between.
            Err(status) if status.code() == Code::NotFound => continue,
            Err(status) => return Err(plain(status)),
        };
        let metadata = pod.metadata.clone().unwrap_or_default();
        rows.push(PodRow {
            id: pod.id.clone(),
            name: pod_name(pod),
            namespace: metadata.namespace,
            uid: metadata.uid,
            state: if pod.state == i32::from(PodSandboxState::SandboxReady) { "ready" } else { "not ready" },
            addresses: addresses(&status),
            containers: known.containers_of(&pod.id).len(),
            created_at: pod.created_at,
            labels: pod.labels.clone().into_iter().collect(),
        });
    }
    rows.sort_by_key(|row| std::cmp::Reverse(row.created_at));
    if args.output == Format::Json {
        return output::print_json(&rows);
    }
    let mut table = Table::new(&["POD ID", "NAME", "NAMESPACE", "STATE", "ADDRESS", "CONTAINERS", "AGE"]);
    for row in &rows {
        table.row([
            short_id(&row.id),
            &row.name,
            &row.namespace,
            row.state,
            &row.addresses.join(","),
            &row.containers.to_string(),
            &age(row.created_at),
        ]);
    }
    output::print(&table.to_string())
}

#[derive(Debug, Args)]
pub(crate) struct ImagesArgs {
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Serialize)]
struct ImageRow {
    id: String,
    tags: Vec<String>,
    digests: Vec<String>,
    /// Bytes.
    size: u64,
    pinned: bool,
}

pub(crate) async fn images(mut client: Client, args: ImagesArgs) -> anyhow::Result<()> {
    let answer = client.images.list_images(ListImagesRequest::default()).await.map_err(plain)?;
    let mut rows: Vec<ImageRow> = answer
        .into_inner()
        .images
        .into_iter()
        .map(|Image { id, repo_tags, repo_digests, size, pinned, .. }| ImageRow {
            id,
            tags: repo_tags,
            digests: repo_digests,
            size,
            pinned,
        })
        .collect();
    rows.sort_by(|a, b| (&a.tags, &a.digests).cmp(&(&b.tags, &b.digests)));
    if args.output == Format::Json {
        return output::print_json(&rows);
    }
    output::print(&images_table(&rows).to_string())
}

/// One line a tag; an image without a tag is shown by its digest.
fn images_table(rows: &[ImageRow]) -> Table {
    let mut table = Table::new(&["IMAGE", "IMAGE ID", "SIZE"]);
    for row in rows {
        let names: Vec<&str> = match (row.tags.as_slice(), row.digests.as_slice()) {
            ([], []) => vec!["-"],
            ([], [digest, ..]) => vec![digest],
            (tags, _) => tags.iter().map(String::as_str).collect(),
        };
        for name in names {
            table.row([name, short_id(&row.id), &size(row.size)]);
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use stave_cri_proto::v1::{PodIp, PodSandboxNetworkStatus};

    #[test]
    fn images_have_a_line_for_each_tag() {
        let row = |tags: &[&str], digests: &[&str]| ImageRow {
            id: format!("sha256:{}", "ab".repeat(32)),
            tags: tags.iter().map(|tag| (*tag).to_owned()).collect(),
            digests: digests.iter().map(|digest| (*digest).to_owned()).collect(),
            size: 2048,
            pinned: false,
        };
        let table =
            images_table(&[row(&["a:1", "a:2"], &["a@sha256:1"]), row(&[], &["b@sha256:2"]), row(&[], &[])]);
        assert_eq!(
            table.to_string(),
            "IMAGE       IMAGE ID      SIZE\n\
             a:1         abababababab  2.0 KiB\n\
             a:2         abababababab  2.0 KiB\n\
             b@sha256:2  abababababab  2.0 KiB\n\
             -           abababababab  2.0 KiB\n"
        );
    }

    #[test]
    fn ids_of_images_are_cut_and_names_are_not() {
        let id = "0123456789ab".repeat(6);
        assert_eq!(short_image(&format!("sha256:{}", &id[..64])), "0123456789ab");
        assert_eq!(short_image("docker.io/library/busybox:latest"), "docker.io/library/busybox:latest");
    }

    #[test]
    fn addresses_start_with_the_primary() {
        let status = PodSandboxStatus {
            network: Some(PodSandboxNetworkStatus {
                ip: "10.0.0.2".into(),
                additional_ips: vec![PodIp { ip: "fd00::2".into() }],
            }),
            ..Default::default()
        };
        assert_eq!(addresses(&status), ["10.0.0.2", "fd00::2"]);
        assert!(addresses(&PodSandboxStatus::default()).is_empty());
    }
}

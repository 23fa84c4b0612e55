//! `stave pull`

use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use serde::{Deserialize, Serialize};
use stave_cri_proto::v1::{AuthConfig, ImageSpec, PullImageRequest, StatusRequest};

use super::connection::{Client, plain};
use super::humanise::size;
use super::output::{self, Format};
use super::table::printable;

#[derive(Debug, Args)]
pub(crate) struct PullArgs {
    /// User and password for the registry; the daemon does not keep them
    #[arg(long, value_name = "USER:PASSWORD")]
    creds: Option<String>,
    /// Say nothing until it is done
    #[arg(short, long)]
    quiet: bool,
    /// How to print the result
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    /// The image, such as busybox, quay.io/podman/hello:latest or name@sha256:...
    image: String,
}

#[derive(Serialize)]
struct Pulled<'a> {
    image: &'a str,
    id: &'a str,
}

pub(crate) async fn run(mut client: Client, args: PullArgs) -> anyhow::Result<()> {
    let auth = args.creds.as_deref().map(credentials).transpose()?;
    let id = pull(&mut client, &args.image, auth, args.quiet).await?;
    match args.output {
        Format::Json => output::print_json(&Pulled { image: &args.image, id: &id }),
        Format::Table => output::print(&format!("{id}\n")),
    }
}

fn credentials(given: &str) -> anyhow::Result<AuthConfig> {
    // Never show the value: it holds a password.
    let (user, password) = given.split_once(':').context("--creds must be USER:PASSWORD")?;
    Ok(AuthConfig { username: user.to_owned(), password: password.to_owned(), ..Default::default() })
}

/// One running pull, from the key `pulls` of the verbose Status.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
struct Progress {
    reference: String,
    stage: String,
    bytes_done: u64,
    bytes_total: u64,
    layers_done: u64,
    layers_total: u64,
}

/// Pulls an image and shows its progress on standard error; returns the image's id.
pub(crate) async fn pull(
    client: &mut Client,
    image: &str,
    auth: Option<AuthConfig>,
    quiet: bool,
) -> anyhow::Result<String> {
    let request = PullImageRequest {
        image: Some(ImageSpec { image: image.to_owned(), ..Default::default() }),
        auth,
        sandbox_config: None,
    };
    let mut images = client.images.clone();
    let pulling = images.pull_image(request);
    tokio::pin!(pulling);
    let mut shown = Display::new(quiet);
    let mut ticks = tokio::time::interval(Duration::from_millis(250));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let answer = loop {
        tokio::select! {
            biased;
            answer = &mut pulling => break answer,
            _ = ticks.tick(), if !quiet => {
                if let Some(progress) = progress_of(client, image).await {
                    shown.show(&progress);
                }
            }
        }
    };
    shown.end();
    Ok(answer.map_err(plain)?.into_inner().image_ref)
}

/// How far the pull is; a Status that fails or has no such key is no reason to stop pulling.
async fn progress_of(client: &mut Client, image: &str) -> Option<Progress> {
    let status = client.runtime.status(StatusRequest { verbose: true }).await.ok()?.into_inner();
    let pulls: Vec<Progress> = serde_json::from_str(status.info.get("pulls")?).ok()?;
    pulls.into_iter().find(|progress| is_for(&progress.reference, image))
}

/// Whether a full reference is that of a short one: docker.io/library/busybox:latest of busybox.
fn is_for(reference: &str, image: &str) -> bool {
    let ends_with = |reference: &str| {
        reference.strip_suffix(image).is_some_and(|rest| rest.is_empty() || rest.ends_with('/'))
    };
    ends_with(reference) || reference.strip_suffix(":latest").is_some_and(ends_with)
}

fn line(progress: &Progress) -> String {
    let mut parts = vec![printable(&progress.stage)];
    if progress.bytes_total > 0 {
        parts.push(format!("{} of {}", size(progress.bytes_done), size(progress.bytes_total)));
    }
    if progress.layers_total > 0 {
        parts.push(format!("{} of {} layers done", progress.layers_done, progress.layers_total));
    }
    format!("{}: {}", printable(&progress.reference), parts.join(", "))
}

/// One line that changes, on a terminal; elsewhere a line whenever the stage changes.
struct Display {
    quiet: bool,
    terminal: bool,
    last_stage: String,
    drawn: bool,
}

impl Display {
    fn new(quiet: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        Self { quiet, terminal, last_stage: String::new(), drawn: false }
    }

    fn show(&mut self, progress: &Progress) {
        if self.quiet {
            return;
        }
        let mut out = std::io::stderr().lock();
        // What can't be shown is no reason to stop pulling.
        if self.terminal {
            let _ = write!(out, "\r\x1b[2K{}", line(progress));
            let _ = out.flush();
            self.drawn = true;
        } else if progress.stage != self.last_stage {
            let _ = writeln!(out, "{}", line(progress));
            self.last_stage.clone_from(&progress.stage);
        }
    }

    fn end(&mut self) {
        if self.drawn {
            eprint!("\r\x1b[2K");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_match_what_was_typed() {
        for (reference, image, same) in [
            ("docker.io/library/busybox:latest", "busybox", true),
            ("docker.io/library/busybox:latest", "docker.io/library/busybox:latest", true),
            ("docker.io/library/busybox:1.36", "busybox:1.36", true),
            ("docker.io/library/mybusybox:latest", "busybox", false),
            ("docker.io/library/busybox:1.36", "busybox", false),
        ] {
            assert_eq!(is_for(reference, image), same, "{reference} {image}");
        }
    }

    #[test]
    fn lines_tell_what_is_known() {
        let mut progress =
            Progress { reference: "a/b:1".into(), stage: "resolving".into(), ..Default::default() };
        assert_eq!(line(&progress), "a/b:1: resolving");
        progress = Progress {
            stage: "downloading layer 2/3".into(),
            bytes_done: 1024,
            bytes_total: 4096,
            layers_done: 1,
            layers_total: 3,
            ..progress
        };
        assert_eq!(line(&progress), "a/b:1: downloading layer 2/3, 1.0 KiB of 4.0 KiB, 1 of 3 layers done");
    }

    #[test]
    fn credentials_are_two_and_never_shown() {
        let auth = credentials("user:pass:word").unwrap();
        assert_eq!((auth.username.as_str(), auth.password.as_str()), ("user", "pass:word"));
        assert!(!credentials("secret").unwrap_err().to_string().contains("secret"));
    }
}

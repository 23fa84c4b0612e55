//! `stave attach`

use std::process::ExitCode;

use clap::Args;
use stave_cri_proto::v1::AttachRequest;

use super::connection::{Client, plain};
use super::resolve::Known;
use super::streams::{self, Interactive};

#[derive(Debug, Args)]
pub(crate) struct AttachArgs {
    /// Send standard input to the container
    #[arg(short = 'i', long)]
    stdin: bool,
    /// The container has a terminal; with --stdin, Ctrl-P Ctrl-Q detaches
    #[arg(short, long)]
    tty: bool,
    /// The container, or a pod that has only one
    container: String,
}

pub(crate) async fn run(mut client: Client, args: AttachArgs) -> anyhow::Result<ExitCode> {
    let container_id = Known::list(&mut client).await?.container(&args.container)?.id.clone();
    let request =
        AttachRequest { container_id, stdin: args.stdin, tty: args.tty, stdout: true, stderr: !args.tty };
    let url = client.runtime.attach(request).await.map_err(plain)?.into_inner().url;
    streams::run(&mut client, &url, Interactive { stdin: args.stdin, tty: args.tty, detach_keys: true }).await
}

//! The command-line client for people: every verb is a few calls over the daemon's CRI socket.

mod about;
mod attach;
mod connection;
mod dial;
mod exec;
mod humanise;
mod inspect;
mod list;
mod log_file;
mod log_line;
mod logs;
mod logs_rotated;
mod logs_since;
pub(crate) mod output;
mod port_forward;
mod pull;
mod remove;
mod resolve;
mod run;
mod stop;
mod streams;
pub(crate) mod table;
mod terminal;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Subcommand;

pub(crate) use connection::{Client, named, plain};

/// The verbs. Containers and pods are named by name, POD/CONTAINER, id, or the beginning of an id.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// List containers
    Ps(list::PsArgs),
    /// List pods
    Pods(list::PodsArgs),
    /// List images
    Images(list::ImagesArgs),
    /// Pull an image and show how far it is
    Pull(pull::PullArgs),
    /// Run a container in a pod of its own; the image is pulled when it is not there
    Run(run::RunArgs),
    /// Run a command in a container, print what it wrote, exit as it did
    Exec(exec::ExecArgs),
    /// Connect with the streams of a running container
    Attach(attach::AttachArgs),
    /// Forward local ports to those of a pod
    PortForward(port_forward::PortForwardArgs),
    /// Compare what the kernel has of a container with what was asked for; on its node, as root
    Inspect(inspect::InspectArgs),
    /// Print what a container wrote
    Logs(logs::LogsArgs),
    /// Stop containers, or pods with all their containers
    Stop(stop::StopArgs),
    /// Remove containers, or pods with all their containers
    Rm(remove::RmArgs),
    /// Remove images
    Rmi(remove::RmiArgs),
    /// Print the versions of client, daemon and CRI
    Version(about::VersionArgs),
    /// Print the daemon's state
    Info(about::InfoArgs),
}

/// Runs a verb against the daemon at `address`.
pub(crate) fn run(verb: Verb, address: Option<PathBuf>) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let client = Client::connect(&connection::address(address)?).await?;
        match verb {
            Verb::Ps(args) => list::ps(client, args).await.map(success),
            Verb::Pods(args) => list::pods(client, args).await.map(success),
            Verb::Images(args) => list::images(client, args).await.map(success),
            Verb::Pull(args) => pull::run(client, args).await.map(success),
            Verb::Run(args) => Box::pin(run::run(client, args)).await,
            Verb::Exec(args) => Box::pin(exec::run(client, args)).await,
            Verb::Attach(args) => Box::pin(attach::run(client, args)).await,
            Verb::PortForward(args) => Box::pin(port_forward::run(client, args)).await.map(success),
            Verb::Inspect(args) => Box::pin(inspect::run(client, args)).await.map(success),
            Verb::Logs(args) => logs::run(client, args).await.map(success),
            Verb::Stop(args) => stop::run(client, args).await.map(success),
            Verb::Rm(args) => remove::rm(client, args).await.map(success),
            Verb::Rmi(args) => remove::rmi(client, args).await.map(success),
            Verb::Version(args) => about::version(client, args).await.map(success),
            Verb::Info(args) => about::info(client, args).await.map(success),
        }
    })
}

fn success((): ()) -> ExitCode {
    ExitCode::SUCCESS
}

/// One error for all: the only one where one thing was asked for; else (they are printed as they
/// happen) how many there were.
fn sum_up(errors: Vec<anyhow::Error>, of: usize, what: &str) -> anyhow::Result<()> {
    let count = errors.len();
    match errors.into_iter().next() {
        None => Ok(()),
        Some(error) if of == 1 => Err(error),
        Some(_) => Err(anyhow::anyhow!("{count} of {of} not {what}")),
    }
}

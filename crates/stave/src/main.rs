//! The stave binary: the daemon, the check of the host, and a command-line client for people.
#![forbid(unsafe_code)]

mod check;
mod client;
mod config_command;
mod deadline;
mod metrics;
mod pool;
mod runtimes;
mod serve;
mod watchdog;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use stave_config::{LogFormat, LogLevel, Overrides};

/// A Kubernetes container runtime: the daemon that serves CRI v1, a check of the host, and a
/// client for people that talks to the daemon's socket.
#[derive(Debug, Parser)]
#[command(name = "stave", version, arg_required_else_help = true)]
struct Cli {
    /// The daemon's socket. Without it: $STAVE_ADDRESS, else `listen` of the configuration
    /// (/run/stave/stave.sock).
    #[arg(long, global = true, value_name = "PATH", help_heading = "Global options")]
    address: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon. Pods go on running when it stops.
    Serve(ServeArgs),
    /// Say what this host offers to pods, and what is lacking; of a daemon that runs, how many supervisors it has
    /// ready. Exit status: 0 all there, 1 something is lacking, 2 pods can't run.
    Check(check::CheckArgs),
    /// Print the configuration in effect, each key with a comment.
    Config(config_command::ConfigArgs),
    #[command(flatten)]
    Client(client::Verb),
}

#[derive(Debug, Args)]
struct ServeArgs {
    /// The configuration file; *.toml in conf.d beside it is read after it [default:
    /// /etc/stave/config.toml, which may be absent]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The directory of images and records; overrides `root` of the configuration
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// The directory of what a reboot voids; overrides `state`
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// The path of the CRI socket; overrides `listen`
    #[arg(long, value_name = "PATH")]
    listen: Option<PathBuf>,
    /// error, warn, info, debug or trace; overrides `log.level`
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<LogLevel>,
    /// text or json; overrides `log.format`
    #[arg(long, value_name = "FORMAT")]
    log_format: Option<LogFormat>,
}

fn main() -> ExitCode {
    // First of all: the probes of the host need processes with a single thread.
    if let Some(code) = stave_host::run_child_if_asked() {
        return code;
    }
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Serve(args) => serve(args).map(|()| ExitCode::SUCCESS),
        Command::Check(args) => check::run(&args, cli.address),
        Command::Config(args) => config_command::run(&args).map(|()| ExitCode::SUCCESS),
        Command::Client(verb) => client::run(verb, cli.address),
    };
    result.unwrap_or_else(|error| {
        // A reader that has gone away is no error worth a word.
        if !client::output::is_broken_pipe(&error) {
            eprintln!("stave: {error:#}");
        }
        ExitCode::FAILURE
    })
}

fn serve(args: ServeArgs) -> anyhow::Result<()> {
    let mut config = stave_config::load(args.config.as_deref())?;
    config.apply(Overrides {
        root: args.root,
        state: args.state,
        listen: args.listen,
        log_level: args.log_level,
        log_format: args.log_format,
    })?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let served = runtime.block_on(serve::run(config));
    // A thread that looks at a file system which hangs would be waited for.
    runtime.shutdown_background();
    served
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn levels_and_formats_are_words() {
        let cli =
            Cli::try_parse_from(["stave", "serve", "--log-level", "debug", "--log-format", "json"]).unwrap();
        let Command::Serve(args) = cli.command else { panic!("not serve") };
        assert_eq!((args.log_level, args.log_format), (Some(LogLevel::Debug), Some(LogFormat::Json)));
        assert!(Cli::try_parse_from(["stave", "serve", "--log-level", "loud"]).is_err());
    }
}

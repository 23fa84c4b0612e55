//! `stave exec`

use std::io::Write as _;
use std::process::ExitCode;

use clap::Args;
use stave_cri::EXIT_CODE;
use stave_cri_proto::v1::{ExecRequest, ExecSyncRequest};
use stave_pods::OUTPUT_MAX;

use super::connection::{Client, plain};
use super::output;
use super::resolve::Known;
use super::streams::{self, Interactive};

#[derive(Debug, Args)]
pub(crate) struct ExecArgs {
    /// Kill the command after this many seconds, and print what it wrote then, up to 16 MiB; 0 lets it run
    #[arg(long, value_name = "SECONDS", default_value_t = 0, conflicts_with_all = ["stdin", "tty"])]
    timeout: u32,
    /// Send standard input to the command
    #[arg(short = 'i', long)]
    stdin: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    tty: bool,
    /// The container, or a pod that has only one
    container: String,
    /// The command and its arguments; no shell is put before it
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "CMD")]
    command: Vec<String>,
}

pub(crate) async fn run(mut client: Client, args: ExecArgs) -> anyhow::Result<ExitCode> {
    let container = Known::list(&mut client).await?.container(&args.container)?.id.clone();
    if args.timeout == 0 {
        let request = ExecRequest {
            container_id: container,
            cmd: args.command,
            tty: args.tty,
            stdin: args.stdin,
            stdout: true,
            stderr: !args.tty,
        };
        let url = client.runtime.exec(request).await.map_err(plain)?.into_inner().url;
        let interactive = Interactive { stdin: args.stdin, tty: args.tty, detach_keys: false };
        return streams::run(&mut client, &url, interactive).await;
    }
    let request =
        ExecSyncRequest { container_id: container, cmd: args.command, timeout: i64::from(args.timeout) };
    let answer = match client.runtime.exec_sync(request).await {
        Ok(answer) => answer.into_inner(),
        Err(status) => {
            let code = status.metadata().get(EXIT_CODE).and_then(|code| code.to_str().ok()?.parse().ok());
            return match code {
                Some(code) => Ok(not_executed(status.message(), code)),
                None => Err(plain(status)),
            };
        }
    };
    output::write(&answer.stdout)?;
    std::io::stderr().lock().write_all(&answer.stderr)?;
    if answer.stdout.len() + answer.stderr.len() >= OUTPUT_MAX {
        eprintln!("stave: the output may be cut: with --timeout no more than {OUTPUT_MAX} bytes are kept");
    }
    Ok(exit_code(answer.exit_code))
}

/// The command can't be executed: the reason, and the exit code that a shell has for it.
pub(crate) fn not_executed(message: &str, code: i32) -> ExitCode {
    eprintln!("stave: {message}");
    exit_code(code)
}

/// A process's exit code as ours; what does not fit is a plain failure.
pub(crate) fn exit_code(code: i32) -> ExitCode {
    u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from)
}

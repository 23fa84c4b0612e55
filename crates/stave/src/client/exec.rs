//! `stave exec`

use std::io::Write as _;
use std::process::ExitCode;

use clap::Args;
use stave_cri_proto::v1::ExecSyncRequest;

use super::connection::{Client, plain};
use super::output;
use super::resolve::Known;

#[derive(Debug, Args)]
pub(crate) struct ExecArgs {
    /// Kill the command after this many seconds; 0 lets it run
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    timeout: u32,
    /// The container, or a pod that has only one
    container: String,
    /// The command and its arguments; no shell is put before it
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "CMD")]
    command: Vec<String>,
}

pub(crate) async fn run(mut client: Client, args: ExecArgs) -> anyhow::Result<ExitCode> {
    let container = Known::list(&mut client).await?.container(&args.container)?.id.clone();
    let request =
        ExecSyncRequest { container_id: container, cmd: args.command, timeout: i64::from(args.timeout) };
    let answer = client.runtime.exec_sync(request).await.map_err(plain)?.into_inner();
    output::write(&answer.stdout)?;
    std::io::stderr().lock().write_all(&answer.stderr)?;
    Ok(exit_code(answer.exit_code))
}

/// A process's exit code as ours; what does not fit is a plain failure.
pub(crate) fn exit_code(code: i32) -> ExitCode {
    u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from)
}

//! The supervisor of one pod: holds its namespaces, is the parent of its processes, writes their
//! logs, keeps stop deadlines, and records exits. It runs for as long as its pod, with or without
//! a daemon, on one thread.
#![forbid(unsafe_code)]

mod args;
mod attach;
mod calls;
mod clock;
mod connect;
mod connection;
mod container;
mod container_calls;
mod container_events;
mod event_loop;
mod exec;
mod exits;
mod failure;
mod ids;
mod log_file;
mod log_lines;
mod loopback;
mod oci_runtime;
mod oom;
mod output;
mod pod;
mod process;
mod ready;
mod reaper;
mod report;
mod supervisor;
mod sysctl;

use std::io::Write;
use std::process::ExitCode;

use crate::args::Command;
use crate::report::report;
use crate::supervisor::Supervisor;

fn main() -> ExitCode {
    let args = match args::parse(std::env::args_os().skip(1)) {
        Ok(Command::Supervise(args)) => args,
        Ok(Command::Ready(sysctls)) => {
            return match ready::run(&sysctls) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    report!("ready supervisor: {error}");
                    ExitCode::FAILURE
                }
            };
        }
        Ok(Command::Version) => {
            let _ = writeln!(std::io::stdout(), "stave-pod {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "stave-pod: {error}\n{}", args::USAGE);
            return ExitCode::from(2);
        }
    };
    let pod_id = args.pod_id.clone();
    let result = process::prepare().and_then(|listener| Supervisor::new(args, listener)?.run());
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report!("pod {pod_id}: {error}");
            ExitCode::FAILURE
        }
    }
}

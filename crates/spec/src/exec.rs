//! A further process in a container.

use stave_supervisor_proto::v1::{Plan, Process};

/// A process with the container's user, groups, environment, directory and capabilities. With a
/// terminal, TERM is xterm unless the container has one.
pub fn exec_process(plan: &Plan, args: &[String], tty: bool) -> Process {
    let mut process = plan.process.clone().unwrap_or_default();
    process.args = args.to_vec();
    process.terminal = tty;
    if tty && !process.env.iter().any(|e| e.starts_with("TERM=")) {
        process.env.push("TERM=xterm".to_owned());
    }
    process
}

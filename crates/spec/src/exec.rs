//! A further process in a container.

use stave_supervisor_proto::v1::Process;

/// A process with the user of the container's own process, groups, environment, directory and capabilities. With a
/// terminal, TERM is xterm unless the container has one.
pub fn exec_process(own: &Process, args: &[String], tty: bool) -> Process {
    let mut process = own.clone();
    process.args = args.to_vec();
    process.terminal = tty;
    if tty && !process.env.iter().any(|e| e.starts_with("TERM=")) {
        process.env.push("TERM=xterm".to_owned());
    }
    process
}

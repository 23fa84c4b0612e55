//! Runs a command under a seccomp profile, as a container with the default capabilities would be:
//! `cargo run -p stave-seccomp --example under -- PROFILE.json|default COMMAND [ARG]…`
#![allow(clippy::print_stdout)]

use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, ExitCode};

use stave_seccomp::Cache;

/// The capabilities of a container that asks for none.
const CAPS: u64 = 0xa804_25fb;

fn main() -> ExitCode {
    match run() {
        Ok(never) => match never {},
        Err(error) => {
            eprintln!("under: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<std::convert::Infallible, Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(profile), Some(command)) = (args.next(), args.next()) else {
        return Err("usage: under PROFILE.json|default COMMAND [ARG]…".into());
    };
    let cache = Cache::default();
    let filter = match profile.as_str() {
        "default" => cache.runtime_default(CAPS)?,
        path => cache.file(Path::new(path), CAPS)?,
    };
    for name in &filter.unknown {
        eprintln!("under: {profile}: no such system call: {name}");
    }
    rustix::thread::set_no_new_privs(true)?;
    stave_sys::install_seccomp_filter(&filter.program, filter.flags)?;
    Err(Command::new(command).args(args).exec().into())
}

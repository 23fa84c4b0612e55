//! `stave check`

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use stave_config::{Config, NetworkMode};
use stave_host::{Check, HostReport, ProbeOptions, Status};
use stave_pods::{Handler, Runtimes};

use crate::client::output::{self, Format};
use crate::client::{self, table::Table};
use crate::pool::Pool;

#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// The configuration file, for the directories to look in [default: /etc/stave/config.toml, which may be
    /// absent]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// How to print
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

/// What the host offers, and what the configuration asks of it. Blocks for some tens of milliseconds.
///
/// `compile_profile`: whether the default AppArmor profile is tried.
pub(crate) fn probe(config: &Config, compile_profile: bool) -> HostReport {
    let mut report = stave_host::probe_with(&ProbeOptions {
        root: config.root.clone(),
        apparmor_profile: config.apparmor.profile.clone(),
        compile_profile,
    });
    report.checks.push(cni(config));
    report
}

/// The CNI configuration and its plugins, which are not run here.
fn cni(config: &Config) -> Check {
    let settings = &config.network.cni;
    let seen = stave_cni::inspect(&settings.conf_dir, &settings.bin_dirs);
    let wanted = config.network.mode == NetworkMode::Cni;
    let mut found = vec![seen.found];
    found.extend(seen.lacking.iter().cloned());
    found.extend(seen.broken.iter().map(|file| format!("passed over: {file}")));
    let (status, cost) = match (seen.lacking.is_empty(), seen.broken.is_empty()) {
        (true, true) => (Status::Ok, ""),
        (true, false) if wanted => (Status::Degraded, "the next configuration by name is used"),
        (false, _) if wanted => {
            (Status::Degraded, "the node's network stays not ready: only hostNetwork pods run")
        }
        _ => (Status::Ok, "the network mode \"cni\" can't be used as it is"),
    };
    Check { name: "CNI", status, found: found.join("; "), cost: cost.to_owned() }
}

/// `address`: the daemon's socket, where it is not the one of the configuration.
pub(crate) fn run(args: &CheckArgs, address: Option<PathBuf>) -> anyhow::Result<ExitCode> {
    let config = stave_config::load(args.config.as_deref())?;
    let address = client::named(address).unwrap_or_else(|| config.listen.clone());
    let mut report = probe(&config, true);
    let (handlers, pool) =
        tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
            tokio::join!(crate::runtimes::probe_quietly(&config), Pool::ask(&config, &address))
        });
    report.checks.push(pool.check());
    let worst = report.worst().max(worst(&handlers));
    match args.output {
        Format::Json => {
            let mut all = serde_json::to_value(&report)?;
            all["runtimes"] = handlers.describe();
            all["ready_supervisors"] = serde_json::to_value(&pool)?;
            output::print_json(&all)?;
        }
        Format::Table => output::print(&as_text(&report, &handlers, worst))?,
    }
    Ok(ExitCode::from(match worst {
        Status::Ok => 0,
        Status::Degraded => 1,
        Status::Missing => 2,
    }))
}

/// A runtime handler that can't be used costs its pods, and all pods where it is the default.
fn worst(handlers: &Runtimes) -> Status {
    let broken = |handler: &&Handler| handler.found.error.is_some();
    let default = handlers.find("").filter(broken).map(|_| Status::Missing);
    default.or_else(|| handlers.all().iter().find(broken).map(|_| Status::Degraded)).unwrap_or(Status::Ok)
}

fn as_text(report: &HostReport, handlers: &Runtimes, worst: Status) -> String {
    let mut table = Table::new(&["NAME", "STATUS", "FOUND", "WHAT ITS LACK COSTS"]);
    for check in &report.checks {
        table.row([check.name, check.status.as_str(), &check.found, &check.cost]);
    }
    let default = handlers.find("").map(|handler| handler.name.as_str());
    for handler in handlers.all() {
        let Some(oci) = &handler.oci else { continue };
        let name = format!("runtime {}", handler.name);
        let (status, found, cost) = match &handler.found.error {
            None => (Status::Ok, format!("{}: {}", oci.program.display(), handler.found.version), ""),
            Some(error) if default == Some(&handler.name) => {
                (Status::Missing, error.clone(), "pods that name no runtime handler are refused")
            }
            Some(error) => (Status::Degraded, error.clone(), "pods with this runtime handler are refused"),
        };
        table.row([&name, status.as_str(), &found, cost]);
    }
    let summary = match worst {
        Status::Ok => "All that pods may ask for is there.",
        Status::Degraded => "Pods run; what is degraded costs what the last column says.",
        Status::Missing => "Pods can't run before what is missing is there.",
    };
    format!("{table}\n{summary}\n")
}

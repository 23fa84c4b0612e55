//! `stave check`

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use stave_config::{Config, NetworkMode};
use stave_host::{HostReport, ProbeOptions, Status};

use crate::client::output::{self, Format};
use crate::client::table::Table;

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

/// What the probe needs of the configuration.
pub(crate) fn probe_options(config: &Config) -> ProbeOptions {
    ProbeOptions {
        root: config.root.clone(),
        cni_conf_dir: config.network.cni.conf_dir.clone(),
        cni_bin_dirs: config.network.cni.bin_dirs.clone(),
        cni_wanted: config.network.mode == NetworkMode::Cni,
        apparmor_profile: config.apparmor.profile.clone(),
    }
}

pub(crate) fn run(args: &CheckArgs) -> anyhow::Result<ExitCode> {
    let config = stave_config::load(args.config.as_deref())?;
    let report = stave_host::probe_with(&probe_options(&config));
    match args.output {
        Format::Json => output::print_json(&report)?,
        Format::Table => output::print(&as_text(&report))?,
    }
    Ok(ExitCode::from(match report.worst() {
        Status::Ok => 0,
        Status::Degraded => 1,
        Status::Missing => 2,
    }))
}

fn as_text(report: &HostReport) -> String {
    let mut table = Table::new(&["NAME", "STATUS", "FOUND", "WHAT ITS LACK COSTS"]);
    for check in &report.checks {
        table.row([check.name, check.status.as_str(), &check.found, &check.cost]);
    }
    let summary = match report.worst() {
        Status::Ok => "All that pods may ask for is there.",
        Status::Degraded => "Pods run; what is degraded costs what the last column says.",
        Status::Missing => "Pods can't run before what is missing is there.",
    };
    format!("{table}\n{summary}\n")
}

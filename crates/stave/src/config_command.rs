//! `stave config`

use std::path::PathBuf;

use clap::Args;

use crate::client::output;

#[derive(Debug, Args)]
pub(crate) struct ConfigArgs {
    /// The configuration file [default: /etc/stave/config.toml, which may be absent]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

pub(crate) fn run(args: &ConfigArgs) -> anyhow::Result<()> {
    let config = stave_config::load(args.config.as_deref())?;
    output::print(&config.to_commented_toml())
}

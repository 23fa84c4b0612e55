//! One command for the plugins of a network, one after another.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;

use serde_json::{Map, Value};
use tokio::sync::watch;

use crate::CniError;
use crate::config::{Network, Plugin};
use crate::exec::{Answer, Call, Runner};

/// What is the same for all plugins of a network.
pub(crate) struct Chain<'a> {
    pub(crate) runner: &'a Runner,
    pub(crate) network: &'a Network,
    /// `CNI_COMMAND`.
    pub(crate) command: &'static str,
    pub(crate) environment: &'a [(&'static str, OsString)],
    pub(crate) capabilities: &'a Map<String, Value>,
    /// Keys that the specification adds to the input, such as `prevResult`.
    pub(crate) more: BTreeMap<&'static str, Value>,
    pub(crate) guard: Option<&'a Path>,
    /// Once this is true, nobody wants the answer any more: see [`Call::unwanted`].
    pub(crate) unwanted: Option<watch::Receiver<bool>>,
}

impl Chain<'_> {
    /// Runs one plugin, and gives what it answered.
    pub(crate) async fn run(&self, plugin: &Plugin) -> Result<Answer, CniError> {
        let input = plugin.input(self.network, self.capabilities, self.more.clone());
        let call = Call {
            plugin: plugin.kind(),
            command: self.command,
            environment: self.environment,
            input: &input,
            guard: self.guard,
            unwanted: self.unwanted.clone(),
        };
        self.runner.run(call).await
    }

    /// Runs all in order, up to the first that fails.
    pub(crate) async fn run_until_failure(&self) -> Result<(), CniError> {
        for plugin in &self.network.plugins {
            self.run(plugin).await?;
        }
        Ok(())
    }

    /// Runs these whatever fails. The error has all that went wrong.
    pub(crate) async fn run_all(&self, plugins: impl Iterator<Item = &Plugin>) -> Result<(), CniError> {
        let mut errors = Vec::new();
        for plugin in plugins {
            errors.extend(self.run(plugin).await.err());
        }
        CniError::gathered(errors)
    }
}

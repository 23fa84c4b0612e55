//! The runtime handlers of the configuration.

use std::time::Duration;

use stave_config::{Config, Runtime};
use stave_pods::{Found, Handler, OciRuntime, Runtimes};

/// All handlers, with what asking their programs found. One that can't be used is reported, and stops nothing: its pods
/// are refused.
pub(crate) async fn probe(config: &Config) -> Runtimes {
    let runtimes = probe_quietly(config).await;
    for handler in runtimes.all() {
        if let Some(error) = &handler.found.error {
            tracing::warn!(handler = handler.name, error, "a runtime handler can't be used");
        }
    }
    runtimes
}

/// The same, and nothing is logged.
pub(crate) async fn probe_quietly(config: &Config) -> Runtimes {
    let handlers = futures::future::join_all(handlers(config).into_iter().map(Handler::probe)).await;
    Runtimes::new(&config.default_runtime, handlers)
}

/// The built-in executor first, then those of the configuration by name.
fn handlers(config: &Config) -> Vec<Handler> {
    let built_in = Runtime::new(stave_config::RuntimeKind::Builtin);
    let first = config.runtimes.get(Runtime::BUILT_IN).unwrap_or(&built_in);
    let others = config.runtimes.iter().filter(|(name, _)| *name != Runtime::BUILT_IN);
    let all =
        std::iter::once((Runtime::BUILT_IN, first)).chain(others.map(|(name, one)| (name.as_str(), one)));
    all.map(|(name, runtime)| handler(config, name, runtime)).collect()
}

fn handler(config: &Config, name: &str, runtime: &Runtime) -> Handler {
    let timeout = Duration::from_secs(runtime.timeout.unwrap_or(Runtime::TIMEOUT).into());
    // Loading has checked that an OCI runtime has a path, and that no other has.
    let oci = runtime.path.as_ref().map(|program| OciRuntime {
        handler: name.to_owned(),
        program: program.clone(),
        args: runtime.args.clone(),
        root: runtime.root.clone().unwrap_or_else(|| config.state.join("runtimes").join(name)),
        timeout_ms: u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX),
    });
    Handler { name: name.to_owned(), oci, pids_limit: runtime.pids_limit, found: Found::default() }
}

//! The ready supervisors of a daemon that runs, for `stave check`.

use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use stave_config::Config;
use stave_cri_proto::v1::StatusRequest;
use stave_host::{Check, Status};

use crate::client::{Client, plain};

/// For the daemon's answer. Status itself waits for the kernel's network for two seconds at most.
const LIMIT: Duration = Duration::from_secs(3);

/// What `stave check` knows of the pool, and prints as JSON.
#[derive(Debug, Serialize)]
pub(crate) struct Pool {
    /// How many the configuration wants.
    size: usize,
    /// What the daemon says.
    daemon: Option<State>,
    /// Why there is no word of a daemon.
    no_answer: Option<String>,
}

/// `ready_supervisors` of a verbose Status.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    /// How many the daemon wants: the configuration may have changed since it started.
    wanted: usize,
    ready: usize,
    used: u64,
    missed: u64,
    /// Why the last one could not be made, until one can.
    #[serde(default)]
    error: Option<String>,
}

impl Pool {
    /// Asks the daemon at `address`. Takes [`LIMIT`] at most.
    pub(crate) async fn ask(config: &Config, address: &Path) -> Self {
        let answer = tokio::time::timeout(LIMIT, state(address)).await.unwrap_or_else(|_| {
            Err(anyhow::anyhow!("no answer at {} within {LIMIT:?}: the daemon hangs", address.display()))
        });
        let (daemon, no_answer) = match answer {
            Ok(state) => (Some(state), None),
            Err(error) => (None, Some(format!("{error:#}"))),
        };
        Self { size: config.pods.ready, daemon, no_answer }
    }

    /// The row of the table. That no daemon runs is no lack of the host, and a pool that is being filled is none at all.
    pub(crate) fn check(&self) -> Check {
        let found = match (&self.daemon, &self.no_answer) {
            (Some(state), _) => state.words(self.size),
            (None, no_answer) => {
                format!("pods.ready = {}; {}", self.size, no_answer.as_deref().unwrap_or_default())
            }
        };
        let broken = self.daemon.as_ref().is_some_and(State::is_broken);
        let (status, cost) =
            if broken { (Status::Degraded, "pods start without, more slowly") } else { (Status::Ok, "") };
        Check { name: "ready supervisors", status, found, cost: cost.to_owned() }
    }
}

impl State {
    /// None is there, and none can be made.
    fn is_broken(&self) -> bool {
        self.wanted > 0 && self.ready == 0 && self.error.is_some()
    }

    fn words(&self, size: usize) -> String {
        let Self { wanted, ready, used, missed, error } = self;
        let mut words = format!("{ready} of {wanted} ready; used {used}, missed {missed}");
        if *wanted > 0 && *ready == 0 && error.is_none() {
            words += "; being made";
        }
        if let Some(error) = error {
            words += &format!("; the last could not be made: {error}");
        }
        if *wanted != size {
            words += &format!("; pods.ready = {size} counts when the daemon starts again");
        }
        words
    }
}

async fn state(address: &Path) -> anyhow::Result<State> {
    let mut client = Client::connect(address).await?;
    let answer = client.runtime.status(StatusRequest { verbose: true }).await.map_err(plain)?.into_inner();
    let text = answer.info.get("ready_supervisors").map(String::as_str).unwrap_or_default();
    serde_json::from_str(text)
        .map_err(|_| anyhow::anyhow!("the daemon at {} does not tell of them", address.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(size: usize, daemon: State) -> Check {
        Pool { size, daemon: Some(daemon), no_answer: None }.check()
    }

    fn state(wanted: usize, ready: usize, error: Option<&str>) -> State {
        State { wanted, ready, used: 7, missed: 1, error: error.map(str::to_owned) }
    }

    #[test]
    fn an_empty_pool_is_a_lack_only_where_it_can_not_be_filled() {
        let filling = pool(2, state(2, 0, None));
        assert_eq!((filling.status, filling.cost.as_str()), (Status::Ok, ""));
        assert!(filling.found.contains("0 of 2 ready") && filling.found.ends_with("being made"));
        let broken = pool(2, state(2, 0, Some("no descriptors")));
        assert_eq!(broken.status, Status::Degraded);
        assert!(broken.found.ends_with("no descriptors") && !broken.cost.is_empty(), "{}", broken.found);
        let half = pool(2, state(2, 1, Some("no descriptors")));
        assert!(half.status == Status::Ok && half.found.contains("no descriptors"), "{}", half.found);
        let off = pool(0, state(0, 0, None));
        assert!(off.status == Status::Ok && !off.found.contains("being made"), "{}", off.found);
    }

    #[test]
    fn a_configuration_that_the_daemon_has_not_read_is_told() {
        let found = pool(4, state(2, 2, None)).found;
        assert!(found.contains("2 of 2") && found.contains("pods.ready = 4"), "{found}");
    }
}

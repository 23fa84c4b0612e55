//! systemd's watchdog: a ping (sd_notify(3)) after each check that requests are answered.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use stave_cri_proto::v1::VersionRequest;

use crate::client::Client;

/// Checks and pings for as long as the daemon runs, where the unit has `WatchdogSec` (systemd.service(5)). Without
/// pings systemd ends the daemon with SIGABRT and starts it again; pods go on.
pub(crate) fn start(listen: PathBuf) {
    let Some(limit) = sd_notify::watchdog_enabled() else { return };
    tokio::spawn(async move {
        // Twice in the time, as sd_watchdog_enabled(3) has it; a check may take as long as there is until the next.
        let interval = limit / 2;
        loop {
            let begin = tokio::time::Instant::now();
            match tokio::time::timeout(interval, check(&listen)).await {
                Ok(Ok(())) => {
                    if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]) {
                        tracing::warn!(%error, "the watchdog's ping");
                    }
                }
                Ok(Err(error)) => tracing::error!(error = format!("{error:#}"), "no ping for the watchdog"),
                Err(_) => {
                    tracing::error!("no ping for the watchdog: a request was not answered in {interval:?}");
                }
            }
            tokio::time::sleep_until(begin + interval).await;
        }
    });
}

/// What all requests need: the socket takes a connection, a call is answered, and a thread for blocking work is to
/// be had. Not asked: disk, network and supervisors, whose troubles a restart does not end.
async fn check(listen: &Path) -> anyhow::Result<()> {
    let mut client = Client::connect(listen).await?;
    client.runtime.version(VersionRequest::default()).await.context("Version")?;
    tokio::task::spawn_blocking(|| ()).await.context("a thread for blocking work")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_daemon_that_does_not_answer_fails_the_check() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let error = check(&socket).await.unwrap_err();
        assert!(error.to_string().contains("no daemon"), "{error:#}");
        // Connections are taken by the kernel, and then nothing comes.
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let result = tokio::time::timeout(Duration::from_millis(300), check(&socket)).await;
        assert!(result.is_err(), "a silent daemon: {result:?}");
    }
}

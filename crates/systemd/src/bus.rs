//! The connection to the bus, and the ends of jobs.

use std::time::Duration;

use futures::StreamExt as _;
use tokio::sync::broadcast;
use zbus::{Connection, MatchRule, MessageStream, OwnedObjectPath};

pub(crate) const NAME: &str = "org.freedesktop.systemd1";
pub(crate) const PATH: &str = "/org/freedesktop/systemd1";
pub(crate) const MANAGER: &str = "org.freedesktop.systemd1.Manager";

/// Ends of jobs that may wait to be looked at; whoever misses some looks at the unit instead.
const JOBS: usize = 512;

/// One call may take this long; then the connection is given up, and another one tried.
const CALL: Duration = Duration::from_secs(5);

/// A job that has ended: its path, and "done" or why not.
pub(crate) type Ended = (OwnedObjectPath, String);

/// A connection to the system bus on which systemd tells the ends of its jobs.
pub(crate) struct Bus {
    pub(crate) connection: Connection,
    jobs: broadcast::Sender<Ended>,
    reader: tokio::task::JoinHandle<()>,
}

impl Bus {
    /// Connects to `address`, or to the system bus (`DBUS_SYSTEM_BUS_ADDRESS`, or its usual socket).
    pub(crate) async fn connect(address: Option<&str>) -> zbus::Result<Self> {
        let builder = match address {
            Some(address) => zbus::connection::Builder::address(address),
            None => zbus::connection::Builder::system(),
        };
        let connection = builder.method_timeout(CALL).build().await?;
        let rule = MatchRule::builder()
            .msg_type(zbus::message::Type::Signal)
            .sender(NAME)
            .path(PATH)
            .interface(MANAGER)
            .member("JobRemoved")
            .build()?;
        let mut stream = MessageStream::for_match_rule(rule, &connection, None).await?;
        // systemd sends signals to nobody before somebody has asked for them. It keeps that over a daemon-reexec.
        connection.call_method(Some(NAME), PATH, Some(MANAGER), "Subscribe", &()).await?;
        let (jobs, _) = broadcast::channel(JOBS);
        let sender = jobs.clone();
        let reader = tokio::spawn(async move {
            while let Some(message) = stream.next().await {
                let Ok(message) = message else { continue };
                let body = message.body();
                match body.deserialize::<(u32, OwnedObjectPath, &str, &str)>() {
                    // Nobody waits: an error that is none.
                    Ok((_, job, _, result)) => drop(sender.send((job, result.to_owned()))),
                    Err(error) => tracing::warn!(%error, "systemd's signal JobRemoved"),
                }
            }
        });
        Ok(Self { connection, jobs, reader })
    }

    /// The ends of all jobs from now on.
    pub(crate) fn jobs(&self) -> broadcast::Receiver<Ended> {
        self.jobs.subscribe()
    }

    /// False: the connection is at its end, and what was subscribed to with it.
    pub(crate) fn is_open(&self) -> bool {
        !self.reader.is_finished() && !self.connection.is_closed()
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        // The reader's stream holds the connection.
        self.reader.abort();
    }
}

/// Name and message of an error that came over the bus; none for what happened on this side.
pub(crate) fn answer(error: &zbus::Error) -> Option<(String, String)> {
    use zbus::DBusError as _;
    match error {
        zbus::Error::MethodError(name, message, _) => {
            Some((name.to_string(), message.clone().unwrap_or_default()))
        }
        zbus::Error::FDO(error) => match error.as_ref() {
            zbus::fdo::Error::ZBus(error) => answer(error),
            other => Some((other.name().to_string(), other.description().unwrap_or_default().to_owned())),
        },
        _ => None,
    }
}

/// True if the bus says that systemd is not there, or has gone with the call: it restarts.
pub(crate) fn is_absence(name: &str) -> bool {
    const ABSENT: [&str; 5] = ["NoReply", "ServiceUnknown", "NameHasNoOwner", "Disconnected", "TimedOut"];
    // Spawn: the bus tried to start it, on a host where something else is PID 1.
    name.strip_prefix("org.freedesktop.DBus.Error.")
        .is_some_and(|rest| ABSENT.contains(&rest) || rest.starts_with("Spawn."))
}

//! The command line: `stave-pod --id POD_ID --dir DIR`, with the listening socket as descriptor 0.

use std::ffi::OsString;
use std::path::PathBuf;

use crate::ids;

/// What the daemon starts a supervisor with.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Args {
    /// Id of the pod.
    pub(crate) pod_id: String,
    /// The pod's state directory, absolute.
    pub(crate) dir: PathBuf,
}

/// A command line that asks for something.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Command {
    /// Supervise a pod.
    Supervise(Args),
    /// Print the version.
    Version,
}

/// The text for a command line that can't be understood.
pub(crate) const USAGE: &str = "usage: stave-pod --id POD_ID --dir DIR <LISTENING-SOCKET";

/// Reads the arguments after the program's name.
pub(crate) fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, String> {
    let mut args = args.into_iter();
    let (mut id, mut dir) = (None, None);
    while let Some(name) = args.next() {
        match name.to_str() {
            Some("--version") => return Ok(Command::Version),
            Some("--id") => id = Some(args.next().ok_or("--id needs a value")?),
            Some("--dir") => dir = Some(args.next().ok_or("--dir needs a value")?),
            _ => return Err(format!("unknown argument {name:?}")),
        }
    }
    let id = id.ok_or("--id is missing")?;
    let pod_id = id
        .to_str()
        .filter(|id| ids::is_valid(id))
        .ok_or_else(|| format!("--id {id:?} is not a valid id"))?
        .to_owned();
    let dir = PathBuf::from(dir.ok_or("--dir is missing")?);
    if !dir.is_absolute() {
        return Err(format!("--dir {dir:?} is not an absolute path"));
    }
    Ok(Command::Supervise(Args { pod_id, dir }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(args: &[&str]) -> Result<Command, String> {
        parse(args.iter().map(OsString::from))
    }

    #[test]
    fn both_arguments_in_any_order() {
        let expected = Command::Supervise(Args { pod_id: "p1".into(), dir: "/run/p1".into() });
        assert_eq!(parsed(&["--id", "p1", "--dir", "/run/p1"]), Ok(expected));
        assert!(parsed(&["--dir", "/run/p1", "--id", "p1"]).is_ok());
        assert_eq!(parsed(&["--version"]), Ok(Command::Version));
    }

    #[test]
    fn bad_lines_are_named() {
        for (args, why) in [
            (&["--id", "p1"][..], "--dir is missing"),
            (&["--dir", "/x"], "--id is missing"),
            (&["--id"], "--id needs a value"),
            (&["--id", "../x", "--dir", "/x"], "not a valid id"),
            (&["--id", "x", "--dir", "x"], "not an absolute path"),
            (&["--help"], "unknown argument"),
        ] {
            let error = parsed(args).expect_err("refused");
            assert!(error.contains(why), "{args:?}: {error}");
        }
    }
}

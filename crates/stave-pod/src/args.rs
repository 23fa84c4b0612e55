//! The command line: `stave-pod --id POD_ID --dir DIR`, with the listening socket as descriptor 0; or `stave-pod --ready`,
//! with a socket of the daemon's, and `--sysctl KEY=VALUE` for each that the pod's namespaces are to have.

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
    /// It was started in network, IPC and UTS namespaces that were made for the pod.
    pub(crate) in_namespaces: bool,
}

/// The option for that.
pub(crate) const IN_NAMESPACES: &str = "--in-namespaces";

/// A command line that asks for something.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Command {
    /// Supervise a pod.
    Supervise(Args),
    /// Make namespaces, write these sysctls in them, and wait for a pod.
    Ready(Vec<(String, String)>),
    /// Print the version.
    Version,
}

/// The text for a command line that can't be understood.
pub(crate) const USAGE: &str = "usage: stave-pod --id POD_ID --dir DIR [--in-namespaces] <LISTENING-SOCKET\n       stave-pod --ready [--sysctl KEY=VALUE]... <SOCKET";

/// Reads the arguments after the program's name.
pub(crate) fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, String> {
    let mut args = args.into_iter();
    let (mut id, mut dir) = (None, None);
    let mut in_namespaces = false;
    let mut ready = None;
    while let Some(name) = args.next() {
        match name.to_str() {
            Some("--version") => return Ok(Command::Version),
            Some("--ready") => ready = Some(Vec::new()),
            Some("--sysctl") => {
                let value = args.next().ok_or("--sysctl needs a value")?;
                let pair = value.to_str().and_then(|text| text.split_once('='));
                let (key, value) = pair.ok_or_else(|| format!("--sysctl {value:?} is not KEY=VALUE"))?;
                let sysctls = ready.as_mut().ok_or("--sysctl goes with --ready")?;
                sysctls.push((key.to_owned(), value.to_owned()));
            }
            Some(IN_NAMESPACES) => in_namespaces = true,
            Some("--id") => id = Some(args.next().ok_or("--id needs a value")?),
            Some("--dir") => dir = Some(args.next().ok_or("--dir needs a value")?),
            _ => return Err(format!("unknown argument {name:?}")),
        }
    }
    if let Some(sysctls) = ready {
        return Ok(Command::Ready(sysctls));
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
    Ok(Command::Supervise(Args { pod_id, dir, in_namespaces }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(args: &[&str]) -> Result<Command, String> {
        parse(args.iter().map(OsString::from))
    }

    #[test]
    fn both_arguments_in_any_order() {
        let expected = |in_namespaces| {
            Ok(Command::Supervise(Args { pod_id: "p1".into(), dir: "/run/p1".into(), in_namespaces }))
        };
        assert_eq!(parsed(&["--id", "p1", "--dir", "/run/p1"]), expected(false));
        assert_eq!(parsed(&["--in-namespaces", "--id", "p1", "--dir", "/run/p1"]), expected(true));
        assert_eq!(parsed(&["--ready"]), Ok(Command::Ready(vec![])));
        let sysctls = vec![("net.a".to_owned(), "0 1".to_owned()), ("net.b".to_owned(), "=".to_owned())];
        assert_eq!(
            parsed(&["--ready", "--sysctl", "net.a=0 1", "--sysctl", "net.b=="]),
            Ok(Command::Ready(sysctls))
        );
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
            (&["--ready", "--sysctl"], "--sysctl needs a value"),
            (&["--ready", "--sysctl", "net.a"], "not KEY=VALUE"),
            (&["--sysctl", "net.a=1"], "goes with --ready"),
        ] {
            let error = parsed(args).expect_err("refused");
            assert!(error.contains(why), "{args:?}: {error}");
        }
    }
}

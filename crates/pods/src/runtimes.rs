//! Runtime handlers: the built-in executor, and OCI runtimes as they were found at the start.

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::io::AsyncReadExt as _;

use crate::error::{Code, Error, Result};

/// How long a runtime may take to tell its version or its features.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);
/// Most bytes that are read of what it tells.
const PROBE_MAX: u64 = 1 << 20;

/// An OCI runtime's command line. Kept in the record of each pod, which stays with it whatever becomes of the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OciRuntime {
    /// Name of the handler.
    pub handler: String,
    /// The program, absolute.
    pub program: PathBuf,
    /// Arguments before the command.
    pub args: Vec<String>,
    /// Each pod has a directory of its own in it, for the runtime's state.
    pub root: PathBuf,
    /// How long one call may take.
    pub timeout_ms: u32,
}

/// What probing a runtime found.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Found {
    /// The first line of `--version`.
    pub version: String,
    /// What `features` printed; none where the runtime does not know the command.
    pub features: Option<Value>,
    /// Why the runtime can't be used.
    pub error: Option<String>,
}

/// One runtime handler.
#[derive(Clone, Debug)]
pub struct Handler {
    /// Name, as RunPodSandbox gives it.
    pub name: String,
    /// `None`: the built-in executor.
    pub oci: Option<OciRuntime>,
    /// Most processes and threads of a container.
    pub pids_limit: Option<i64>,
    /// For an OCI runtime.
    pub found: Found,
}

impl Handler {
    /// It makes recursive read-only mounts, where the host does.
    pub fn recursive_read_only(&self) -> bool {
        let known = |features: &Value| {
            let options = features.get("mountOptions").and_then(Value::as_array);
            options.is_some_and(|options| options.iter().any(|option| option == "rro"))
        };
        self.oci.is_none() || self.found.features.as_ref().is_some_and(known)
    }

    /// It can put containers into namespaces of this kind ("user", "time") that the pod has already.
    pub fn joins(&self, namespace: &str) -> bool {
        let known = |features: &Value| {
            let all = features.pointer("/linux/namespaces").and_then(Value::as_array);
            all.is_some_and(|all| all.iter().any(|one| one == namespace))
        };
        self.oci.is_none() || self.found.features.as_ref().is_some_and(known)
    }

    /// Asks an OCI runtime what it is. What it does not tell, or not in time, is in [`Found::error`].
    pub async fn probe(mut self) -> Self {
        let Some(oci) = &self.oci else { return self };
        self.found = match oci.check() {
            Err(error) => Found { error: Some(error.message), ..Found::default() },
            Ok(()) => match ask(oci, "--version").await {
                Err(error) => Found { error: Some(error), ..Found::default() },
                Ok(version) => Found {
                    version: line(&version),
                    features: ask(oci, "features")
                        .await
                        .ok()
                        .and_then(|json| serde_json::from_str(&json).ok()),
                    error: None,
                },
            },
        };
        self
    }
}

impl OciRuntime {
    /// The program is there and can be executed. Cheap: nothing is executed.
    ///
    /// Errors: FailedPrecondition with its path.
    pub fn check(&self) -> Result<()> {
        let refused = |why: String| {
            let (handler, program) = (&self.handler, self.program.display());
            Err(Error::new(
                Code::FailedPrecondition,
                format!("runtime handler {handler:?}: program {program}: {why}"),
            ))
        };
        match std::fs::metadata(&self.program) {
            Err(error) => refused(error.to_string()),
            Ok(file) if !file.is_file() => refused("is no file".to_owned()),
            Ok(file) if file.permissions().mode() & 0o111 == 0 => refused("is not executable".to_owned()),
            Ok(_) => Ok(()),
        }
    }

    /// The directory of a pod's own, for its `--root`.
    pub(crate) fn root_of(&self, pod_id: &str) -> PathBuf {
        self.root.join(pod_id)
    }
}

/// All runtime handlers.
#[derive(Clone, Debug)]
pub struct Runtimes {
    default: String,
    handlers: Vec<Handler>,
}

impl Runtimes {
    /// `default` is the name of one of them.
    pub fn new(default: &str, handlers: Vec<Handler>) -> Self {
        Self { default: default.to_owned(), handlers }
    }

    /// The handler with this name; "" is the default.
    pub fn find(&self, name: &str) -> Option<&Handler> {
        let name = if name.is_empty() { &self.default } else { name };
        self.handlers.iter().find(|handler| handler.name == name)
    }

    /// All of them.
    pub fn all(&self) -> &[Handler] {
        &self.handlers
    }

    /// For people: name, kind, program, version.
    pub fn describe(&self) -> Value {
        let all = self.handlers.iter().map(|handler| {
            serde_json::json!({
                "name": handler.name,
                "default": handler.name == self.default,
                "type": if handler.oci.is_some() { "oci" } else { "builtin" },
                "path": handler.oci.as_ref().map(|oci| &oci.program),
                "root": handler.oci.as_ref().map(|oci| &oci.root),
                "pids_limit": handler.pids_limit,
                "found": handler.oci.as_ref().map(|_| &handler.found),
            })
        });
        all.collect()
    }
}

/// The output of one call of the runtime.
async fn ask(oci: &OciRuntime, command: &str) -> std::result::Result<String, String> {
    let what = format!("{} {command}", oci.program.display());
    let mut child = tokio::process::Command::new(&oci.program)
        .args(&oci.args)
        .arg(command)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| format!("{what}: {error}"))?;
    let Some(stdout) = child.stdout.take() else { return Err(format!("{what}: no output")) };
    let run = async {
        let mut output = Vec::new();
        stdout.take(PROBE_MAX).read_to_end(&mut output).await?;
        Ok::<_, std::io::Error>((child.wait().await?, output))
    };
    match tokio::time::timeout(PROBE_TIMEOUT, run).await {
        Err(_) => Err(format!("{what}: did not end within {PROBE_TIMEOUT:?}")),
        Ok(Err(error)) => Err(format!("{what}: {error}")),
        Ok(Ok((status, _))) if !status.success() => Err(format!("{what}: {status}")),
        Ok(Ok((_, output))) => Ok(String::from_utf8_lossy(&output).into_owned()),
    }
}

/// The first line, without what a terminal would obey.
fn line(text: &str) -> String {
    text.lines().next().unwrap_or_default().chars().filter(|c| !c.is_control()).take(200).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn handler(program: PathBuf) -> Handler {
        let oci = OciRuntime {
            handler: "h".into(),
            program,
            args: vec![],
            root: "/nonexistent".into(),
            timeout_ms: 1000,
        };
        Handler { name: "h".into(), oci: Some(oci), pids_limit: None, found: Found::default() }
    }

    fn script(dir: &std::path::Path, text: &str) -> PathBuf {
        let path = dir.join("runtime");
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[tokio::test]
    async fn what_a_runtime_tells_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let text = "#!/bin/sh\ncase $1 in\n--version) printf 'run\\033[31m 1.0\\nmore\\n';;\nfeatures) echo '{\"mountOptions\": [\"ro\", \"rro\"], \"linux\": {\"namespaces\": [\"pid\", \"user\"]}}';;\nesac\n";
        let found = handler(script(dir.path(), text)).probe().await;
        assert_eq!(found.found.version, "run[31m 1.0");
        assert!(found.recursive_read_only());
        assert_eq!(["user", "time"].map(|kind| found.joins(kind)), [true, false]);
        let old = "#!/bin/sh\n[ $1 = --version ] && echo old 0.9\n";
        let found = handler(script(dir.path(), old)).probe().await;
        assert_eq!((found.found.version.as_str(), found.found.features.as_ref()), ("old 0.9", None));
        assert!(!found.recursive_read_only() && !found.joins("user"));
    }

    #[tokio::test]
    async fn a_runtime_that_cannot_be_used_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let error = |found: Handler| found.found.error.unwrap();
        assert!(
            error(handler("/nonexistent/runc".into()).probe().await)
                .contains("/nonexistent/runc: No such file")
        );
        assert!(error(handler(dir.path().into()).probe().await).contains("is no file"));
        let path = dir.path().join("data");
        std::fs::write(&path, "").unwrap();
        assert!(error(handler(path).probe().await).contains("is not executable"));
        assert!(
            error(handler(script(dir.path(), "#!/bin/sh\nexit 3\n")).probe().await)
                .contains("exit status: 3")
        );
        let hanging = handler(script(dir.path(), "#!/bin/sh\nexec sleep 60\n")).probe().await;
        assert!(error(hanging).contains("did not end within 5s"));
    }

    #[test]
    fn the_default_goes_by_no_name() {
        let builtin = Handler { name: "stave".into(), oci: None, ..handler("/x".into()) };
        let all = Runtimes::new("h", vec![builtin, handler("/x".into())]);
        assert_eq!(all.find("").map(|found| found.name.as_str()), Some("h"));
        assert!(all.find("stave").is_some_and(|found| found.oci.is_none() && found.recursive_read_only()));
        assert!(all.find("nope").is_none());
    }
}

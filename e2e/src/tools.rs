use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

/// The directory of the programs that hack/tools builds with Go; `None` where there is no Go, which it says loudly.
pub fn go_tools() -> Option<&'static Path> {
    static TOOLS: OnceLock<Option<PathBuf>> = OnceLock::new();
    TOOLS
        .get_or_init(|| {
            let output = Command::new(crate::repo_root().join("hack/tools")).output().expect("hack/tools");
            let stderr = String::from_utf8_lossy(&output.stderr);
            eprint!("{stderr}");
            match output.status.code() {
                Some(0) => Some(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim())),
                Some(3) => None,
                _ => panic!("hack/tools: {}: {stderr}", output.status),
            }
        })
        .as_deref()
}

/// The real crictl at a daemon's socket.
#[derive(Debug, Clone)]
pub struct Crictl {
    program: PathBuf,
    endpoint: String,
}

impl Crictl {
    /// At `socket`; `None` where there is no Go to build crictl with.
    pub fn at(socket: &Path) -> Option<Crictl> {
        let program = go_tools()?.join("crictl");
        Some(Crictl { program, endpoint: format!("unix://{}", socket.display()) })
    }

    /// The command, to be run.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(["--config", "/dev/null", "--timeout", "30s"])
            .args(["--runtime-endpoint", &self.endpoint, "--image-endpoint", &self.endpoint])
            .args(arguments);
        command
    }

    /// Runs it and gives what came of it.
    pub fn output(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("crictl")
    }

    /// Its stdout, without the white space around it; it must succeed.
    pub fn run(&self, arguments: &[&str]) -> String {
        let output = self.output(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "crictl {arguments:?}: {}: {stderr}", output.status);
        String::from_utf8(output.stdout).expect("crictl's output is UTF-8").trim().to_owned()
    }

    /// Its stdout as JSON.
    pub fn json(&self, arguments: &[&str]) -> serde_json::Value {
        let stdout = self.run(arguments);
        serde_json::from_str(&stdout).unwrap_or_else(|e| panic!("crictl {arguments:?}: {e}: {stdout}"))
    }
}

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

/// The plugins of a CNI configuration list, run by hand, to know what they take by themselves.
#[derive(Debug)]
pub struct Chain {
    list: Value,
}

impl Chain {
    /// Reads a configuration list.
    pub fn read(path: &Path) -> Result<Chain> {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        Ok(Chain { list: serde_json::from_str(&text)? })
    }

    /// ADD and DEL in a network namespace made for it; how long each took.
    pub fn run(&self, id: &str) -> Result<(Duration, Duration)> {
        let ip = |verb: &str| Command::new("ip").args(["netns", verb, id]).status();
        ensure!(ip("add")?.success(), "ip netns add {id}");
        let result = self.times(id);
        ip("delete")?;
        result
    }

    fn times(&self, id: &str) -> Result<(Duration, Duration)> {
        let plugins = self.list["plugins"].as_array().context("no plugins")?;
        let began = Instant::now();
        let mut result = None;
        for plugin in plugins {
            let answer = self.call("ADD", id, plugin, result.as_ref())?;
            result = Some(serde_json::from_slice(&answer)?);
        }
        let add = began.elapsed();
        let began = Instant::now();
        for plugin in plugins.iter().rev() {
            self.call("DEL", id, plugin, result.as_ref())?;
        }
        Ok((add, began.elapsed()))
    }

    fn call(&self, command: &str, id: &str, plugin: &Value, result: Option<&Value>) -> Result<Vec<u8>> {
        let mut input = plugin.clone();
        for key in ["name", "cniVersion"] {
            input[key] = self.list[key].clone();
        }
        if let Some(result) = result {
            input["prevResult"] = result.clone();
        }
        let kind = plugin["type"].as_str().context("no type")?;
        let mut child = Command::new(Path::new("/usr/lib/cni").join(kind))
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", id)
            .env("CNI_NETNS", format!("/run/netns/{id}"))
            .env("CNI_IFNAME", "eth0")
            .env("CNI_ARGS", "IgnoreUnknown=1")
            .env("CNI_PATH", "/usr/lib/cni")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .with_context(|| kind.to_owned())?;
        child.stdin.take().context("no stdin")?.write_all(input.to_string().as_bytes())?;
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("{kind} {command}: {}", String::from_utf8_lossy(&output.stdout));
        }
        Ok(output.stdout)
    }
}

//! A node with plugins that are scripts.
#![allow(dead_code)] // each test program uses its part

use std::fs;
use std::time::Duration;

use stave_cni::{Cni, Pod, Settings};

pub(crate) struct Node(pub(crate) tempfile::TempDir);

impl Node {
    pub(crate) fn new(script: &str) -> Self {
        assert!(rustix::process::geteuid().is_root(), "this test must run as root");
        let node = Self(tempfile::tempdir().unwrap());
        for dir in ["conf", "bin"] {
            fs::create_dir(node.0.path().join(dir)).unwrap();
        }
        node.plugin(script);
        node.configure(r#"{"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "p"}]}"#);
        node
    }

    pub(crate) fn plugin(&self, script: &str) {
        let version = r#"{"cniVersion": "1.0.0", "supportedVersions": ["1.0.0"]}"#;
        self.program(
            "p",
            &format!(
                "[ $CNI_COMMAND != VERSION ] || {{ echo '{version}'; exit; }}\n{script}\n\
                 echo '{{\"ips\": [{{\"address\": \"10.9.9.9/24\"}}]}}'"
            ),
        );
    }

    /// A plugin that is this script and nothing else, run in the node's directory.
    pub(crate) fn program(&self, name: &str, script: &str) {
        let path = self.0.path().join("bin").join(name);
        let [text, tmp] = ["script", "new"].map(|name| self.0.path().join(name));
        fs::write(&text, format!("#!/bin/sh\ncd {}\n{script}\n", self.0.path().display())).unwrap();
        // Not by us: what another test forks at that moment would have it open for writing, and it could not be run.
        let made = std::process::Command::new("install").args([&text, &tmp]).status();
        assert!(made.unwrap().success());
        fs::rename(tmp, path).unwrap();
    }

    /// Its only configuration.
    pub(crate) fn configure(&self, text: &str) {
        let tmp = self.0.path().join("new");
        fs::write(&tmp, text).unwrap();
        fs::rename(tmp, self.0.path().join("conf/10.conflist")).unwrap();
    }

    pub(crate) async fn open(&self) -> Cni {
        self.open_with(Duration::from_secs(20)).await
    }

    pub(crate) async fn open_with(&self, timeout: Duration) -> Cni {
        let path = |name: &str| self.0.path().join(name);
        let settings = Settings {
            conf_dir: path("conf"),
            bin_dirs: vec![path("bin")],
            conf_template: None,
            netns_dir: path("netns"),
            timeout,
            records: path("records"),
            run: path("run"),
            ranges: path("ranges"),
        };
        Cni::open(settings).await.unwrap()
    }

    pub(crate) fn names(&self, dir: &str) -> Vec<String> {
        let entries = fs::read_dir(self.0.path().join(dir)).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().into_string().unwrap()).collect()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for name in self.names("netns") {
            let path = self.0.path().join("netns").join(name);
            let _ = rustix::mount::unmount(path, rustix::mount::UnmountFlags::DETACH);
        }
    }
}

pub(crate) fn pod(id: &str) -> Pod {
    Pod { id: id.to_owned(), ..Pod::default() }
}

pub(crate) fn netns() -> std::os::fd::OwnedFd {
    fs::File::open("/proc/self/ns/net").unwrap().into()
}

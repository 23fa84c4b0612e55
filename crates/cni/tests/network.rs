//! Attaching with plugins that are scripts. Namespaces are bound to files, so this runs as root.
#![allow(clippy::unwrap_used, clippy::panic)] // a test program

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use stave_cni::{Cni, Pod, Settings};

struct Node(tempfile::TempDir);

impl Node {
    fn new(script: &str) -> Self {
        assert!(rustix::process::geteuid().is_root(), "this test must run as root");
        let node = Self(tempfile::tempdir().unwrap());
        for dir in ["conf", "bin"] {
            fs::create_dir(node.0.path().join(dir)).unwrap();
        }
        node.plugin(script);
        let text = r#"{"cniVersion": "1.0.0", "name": "net", "type": "p"}"#;
        fs::write(node.0.path().join("conf/10.conf"), text).unwrap();
        node
    }

    fn plugin(&self, script: &str) {
        let version = r#"{"cniVersion": "1.0.0", "supportedVersions": ["1.0.0"]}"#;
        let text = format!(
            "#!/bin/sh\ncd {}\n[ $CNI_COMMAND != VERSION ] || {{ echo '{version}'; exit; }}\n{script}\n\
             echo '{{\"ips\": [{{\"address\": \"10.9.9.9/24\"}}]}}'\n",
            self.0.path().display()
        );
        let path = self.0.path().join("bin/p");
        let tmp = self.0.path().join("p");
        fs::write(&tmp, text).unwrap();
        fs::set_permissions(&tmp, fs::Permissions::from_mode(0o755)).unwrap();
        fs::rename(tmp, path).unwrap();
    }

    async fn open(&self) -> Cni {
        let path = |name: &str| self.0.path().join(name);
        let settings = Settings {
            conf_dir: path("conf"),
            bin_dirs: vec![path("bin")],
            conf_template: None,
            netns_dir: path("netns"),
            timeout: Duration::from_secs(20),
            records: path("records"),
            run: path("run"),
        };
        Cni::open(settings).await.unwrap()
    }

    fn names(&self, dir: &str) -> Vec<String> {
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

fn pod(id: &str) -> Pod {
    Pod { id: id.to_owned(), ..Pod::default() }
}

fn netns() -> std::os::fd::OwnedFd {
    File::open("/proc/self/ns/net").unwrap().into()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_number_of_pods_at_once_and_no_more() {
    // Each says how many there are with it.
    let count = "mkdir -p at now; touch now/$$; ls now | wc -l > at/$CNI_COMMAND.$CNI_CONTAINERID; sleep 0.2; rm now/$$";
    let node = Node::new(count);
    let cni = std::sync::Arc::new(node.open().await);
    let most = |command: &str| {
        let at = node.names("at").into_iter().filter(|name| name.starts_with(command));
        let counts = at.map(|name| {
            let text = fs::read_to_string(node.0.path().join("at").join(name)).unwrap();
            text.trim().parse::<usize>().unwrap()
        });
        counts.max().unwrap()
    };
    let tasks = (0..40).map(|number| {
        let cni = cni.clone();
        tokio::spawn(async move { cni.attach(&pod(&format!("pod{number}")), netns()).await.unwrap() })
    });
    for task in tasks.collect::<Vec<_>>() {
        assert_eq!(task.await.unwrap(), ["10.9.9.9".parse::<std::net::IpAddr>().unwrap()]);
    }
    assert!((2..=16).contains(&most("ADD")), "{}", most("ADD"));
    assert_eq!((cni.attached().len(), node.names("netns").len(), node.names("records").len()), (40, 40, 40));
    let tasks = (0..40).map(|number| {
        let cni = cni.clone();
        tokio::spawn(async move { cni.detach(&format!("pod{number}"), None).await.unwrap() })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.unwrap();
    }
    assert!((2..=16).contains(&most("DEL")), "{}", most("DEL"));
    for dir in ["netns", "records", "run"] {
        assert!(node.names(dir).is_empty(), "{dir}: {:?}", node.names(dir));
    }
}

#[tokio::test]
async fn a_failing_del_keeps_the_pod_as_long_as_its_namespace_is_there() {
    let node = Node::new("[ $CNI_COMMAND != DEL ] || { echo gone away; exit 1; }");
    let cni = node.open().await;
    cni.attach(&pod("one"), netns()).await.unwrap();
    for _ in 0..2 {
        let error = cni.detach("one", None).await.unwrap_err().to_string();
        assert!(error.contains("gone away"), "{error}");
        assert_eq!((cni.attached().len(), node.names("netns").len()), (1, 1));
    }
    // The node was started again.
    drop(cni);
    let path = node.0.path().join("netns/stave-one");
    rustix::mount::unmount(&path, rustix::mount::UnmountFlags::DETACH).unwrap();
    let cni = node.open().await;
    assert_eq!(cni.attached(), ["one"]);
    cni.detach("one", None).await.unwrap();
    cni.detach("one", None).await.unwrap();
    assert!(cni.attached().is_empty() && node.names("netns").is_empty() && node.names("records").is_empty());
}

#[tokio::test]
async fn a_failing_add_leaves_nothing_that_detach_does_not_take() {
    let node = Node::new("echo no; exit 1");
    let cni = node.open().await;
    assert!(cni.attach(&pod("one"), netns()).await.unwrap_err().to_string().contains("(ADD)"));
    assert_eq!(cni.attached(), ["one"], "DEL failed too: it is tried again");
    cni.detach("one", None).await.unwrap();
    assert!(cni.attached().is_empty() && node.names("netns").is_empty() && node.names("records").is_empty());
    // A name that would be another key reaches no plugin.
    let smuggler = Pod { name: "a;b=c".to_owned(), ..pod("two") };
    assert!(cni.attach(&smuggler, netns()).await.unwrap_err().to_string().contains("config.metadata.name"));
    assert!(cni.attached().is_empty());
    // With a configuration that names an address, all is well.
    node.plugin("");
    cni.attach(&pod("three"), netns()).await.unwrap();
    assert_eq!(cni.result("three").unwrap()["cniVersion"], "1.0.0");
    cni.check("three").await.unwrap();
    cni.detach("three", None).await.unwrap();
}

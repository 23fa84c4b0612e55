//! Attaching with plugins that are scripts. Namespaces are bound to files, so this runs as root.
#![allow(clippy::unwrap_used, clippy::panic)] // a test program

mod node;

use std::fs;
use std::time::{Duration, Instant};

use node::{Node, netns, pod};
use stave_cni::Pod;

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

/// What a plugin leaves in the background may have its descriptors, also that of its input.
#[tokio::test]
async fn what_a_plugin_leaves_in_the_background_holds_up_nobody() {
    let node = Node::new("exec 3<&0; sleep 30 <&3 & echo $! >>left");
    node.program("q", &fs::read_to_string(node.0.path().join("bin/p")).unwrap());
    node.configure(r#"{"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "p"}, {"type": "q"}]}"#);
    let cni = node.open().await;
    let began = Instant::now();
    cni.attach(&pod("one"), netns()).await.unwrap();
    cni.detach("one", None).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    assert!(cni.attached().is_empty() && node.names("run").is_empty() && node.names("netns").is_empty());
    for pid in fs::read_to_string(node.0.path().join("left")).unwrap().lines() {
        let pid = rustix::process::Pid::from_raw(pid.parse().unwrap()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    }
}

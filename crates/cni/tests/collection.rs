//! Garbage collection, and records that are lost.
#![allow(clippy::unwrap_used, clippy::panic)] // a test program

mod node;

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use node::{Node, netns, pod};

/// A node whose plugin speaks 1.1.0, writes the input of each command but ADD down as `COMMAND-ID`, and runs `more`.
fn node(more: &str) -> Node {
    let node = Node::new("");
    let script = format!(
        "case $CNI_COMMAND in\n\
         VERSION) echo '{{\"cniVersion\": \"1.1.0\", \"supportedVersions\": [\"1.1.0\"]}}'; exit ;;\n\
         ADD) ;;\n\
         *) cat >new-$$; mv new-$$ $CNI_COMMAND-$CNI_CONTAINERID ;;\n\
         esac\n\
         {more}\n\
         echo '{{\"ips\": [{{\"address\": \"10.9.9.9/24\"}}]}}'"
    );
    node.program("p", &script);
    node.configure(r#"{"cniVersion": "1.1.0", "name": "net", "plugins": [{"type": "p"}]}"#);
    node
}

async fn input(node: &Node, name: &str) -> serde_json::Value {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        if let Ok(text) = fs::read_to_string(node.0.path().join(name)) {
            return serde_json::from_str(&text).unwrap();
        }
        assert!(Instant::now() < end, "{name}: not called");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_pod_whose_record_is_lost_is_spared_and_detached_later() {
    let node = node("");
    let cni = node.open().await;
    for id in ["kept", "lost", "gone"] {
        cni.attach(&pod(id), netns()).await.unwrap();
    }
    drop(cni);
    fs::write(node.0.path().join("records/lost.json"), "{ half").unwrap();
    fs::remove_file(node.0.path().join("records/gone.json")).unwrap();
    // The second of these finds no trace of the record.
    for round in ["first", "second"] {
        let cni = node.open().await;
        cni.recovered();
        let gc = input(&node, "GC-").await;
        let ids: Vec<_> = gc["cni.dev/valid-attachments"]
            .as_array()
            .unwrap()
            .iter()
            .map(|entry| entry["containerID"].as_str().unwrap())
            .collect();
        assert_eq!(ids, ["gone", "kept", "lost"], "{round}");
        fs::remove_file(node.0.path().join("GC-")).unwrap();
    }
    let cni = node.open().await;
    for id in ["kept", "lost", "gone", "never"] {
        cni.detach(id, None).await.unwrap();
    }
    assert!(node.names("netns").is_empty(), "{:?}", node.names("netns"));
    let called = |id: &str| node.0.path().join(format!("DEL-{id}")).exists();
    assert!(["kept", "lost", "gone"].iter().all(|id| called(id)) && !called("never"));
}

/// Without a network nobody knows how to run DEL, which may be so for a moment only.
#[tokio::test]
async fn a_pod_whose_record_is_lost_waits_for_a_network_but_not_for_ever() {
    let node = node("");
    let cni = node.open().await;
    for id in ["lost", "gone"] {
        cni.attach(&pod(id), netns()).await.unwrap();
    }
    drop(cni);
    fs::write(node.0.path().join("records/lost.json"), "{ half").unwrap();
    fs::remove_file(node.0.path().join("records/gone.json")).unwrap();
    let (plugin, away) = (node.0.path().join("bin/p"), node.0.path().join("away"));
    for id in ["lost", "gone"] {
        fs::rename(&plugin, &away).unwrap();
        let cni = node.open().await;
        for _ in 0..3 {
            let error = cni.detach(id, None).await.unwrap_err().to_string();
            assert!(
                error.contains("type=\"p\": not found") && cni.attached().contains(&id.to_owned()),
                "{error}"
            );
        }
        assert!(node.names("netns").contains(&format!("stave-{id}")));
        fs::rename(&away, &plugin).unwrap();
        cni.detach(id, None).await.unwrap();
        assert!(node.0.path().join(format!("DEL-{id}")).exists() && !cni.attached().contains(&id.to_owned()));
    }
    let cni = node.open().await;
    cni.attach(&pod("last"), netns()).await.unwrap();
    drop(cni);
    fs::remove_file(node.0.path().join("records/last.json")).unwrap();
    fs::rename(&plugin, &away).unwrap();
    let cni = node.open().await;
    let mut failed = 0;
    while cni.detach("last", None).await.is_err() {
        failed += 1;
        assert!(failed < 20);
    }
    assert!(failed > 2 && node.names("netns").is_empty() && cni.attached().is_empty(), "{failed}");
}

/// Keeps asking for the status, as the kubelet does.
fn asking(cni: &Arc<stave_cni::Cni>) -> tokio::task::JoinHandle<()> {
    let cni = Arc::clone(cni);
    tokio::spawn(async move {
        loop {
            let _ = cni.status();
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    })
}

#[tokio::test]
async fn it_is_run_for_a_network_that_gets_a_version_with_it_and_again_where_it_failed() {
    let node = node("[ $CNI_COMMAND != GC ] || [ ! -e sick ] || { mv GC- failed; echo sick; exit 1; }");
    node.configure(r#"{"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "p"}]}"#);
    let both = fs::read_to_string(node.0.path().join("bin/p")).unwrap();
    node.program("p", &both.replace(r#"["1.1.0"]"#, r#"["1.0.0", "1.1.0"]"#));
    fs::write(node.0.path().join("sick"), "").unwrap();
    let cni = Arc::new(node.open().await);
    cni.status().unwrap();
    cni.recovered();
    tokio::time::sleep(Duration::from_millis(300)).await;
    node.configure(r#"{"cniVersion": "1.1.0", "name": "net", "plugins": [{"type": "p"}]}"#);
    input(&node, "failed").await;
    fs::remove_file(node.0.path().join("sick")).unwrap();
    let asking = asking(&cni);
    input(&node, "GC-").await;
    asking.abort();
    // Once is enough.
    fs::remove_file(node.0.path().join("GC-")).unwrap();
    cni.recovered();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!node.0.path().join("GC-").exists());
    // Each network has its own garbage.
    node.configure(r#"{"cniVersion": "1.1.0", "name": "other", "plugins": [{"type": "p"}]}"#);
    assert_eq!(input(&node, "GC-").await["name"], "other");
}

/// GC excludes ADD and DEL: while it waits for one that hangs, the others must not wait for it.
#[tokio::test(flavor = "multi_thread")]
async fn it_waits_for_an_add_without_holding_up_the_others() {
    let node = node(
        "[ $CNI_COMMAND$CNI_CONTAINERID != ADDslow ] || { touch begun; while [ ! -e go ]; do sleep 0.1; done; }",
    );
    let cni = Arc::new(node.open().await);
    let slow = tokio::spawn({
        let cni = Arc::clone(&cni);
        async move { cni.attach(&pod("slow"), netns()).await }
    });
    while !node.0.path().join("begun").exists() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    cni.recovered();
    tokio::time::sleep(Duration::from_millis(300)).await;
    let began = Instant::now();
    cni.attach(&pod("quick"), netns()).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert!(!node.0.path().join("GC-").exists());
    fs::write(node.0.path().join("go"), "").unwrap();
    slow.await.unwrap().unwrap();
    let asking = asking(&cni);
    assert_eq!(input(&node, "GC-").await["cni.dev/valid-attachments"].as_array().unwrap().len(), 2);
    asking.abort();
    for id in ["slow", "quick"] {
        cni.detach(id, None).await.unwrap();
    }
}

#[tokio::test]
async fn the_nodes_ranges_are_known_after_a_restart() {
    let node = node("[ $CNI_COMMAND != ADD ] || cat >added");
    node.configure(
        r#"{"cniVersion": "1.1.0", "name": "net", "plugins": [{"type": "p", "capabilities": {"ipRanges": true}}]}"#,
    );
    let ranges = ["10.1.0.0/24".to_owned(), "fd00:1::/64".to_owned()];
    node.open().await.set_pod_cidrs(&ranges).await.unwrap();
    let cni = node.open().await;
    cni.attach(&pod("one"), netns()).await.unwrap();
    let expected = serde_json::json!([[{ "subnet": ranges[0] }], [{ "subnet": ranges[1] }]]);
    assert_eq!(input(&node, "added").await["runtimeConfig"]["ipRanges"], expected);
    cni.detach("one", None).await.unwrap();
}

//! CHECK, beside what else is asked of plugins.
#![allow(clippy::unwrap_used, clippy::panic)] // a test program

mod node;

use std::fs;
use std::time::{Duration, Instant};

use node::{Node, netns, pod};

async fn exists(node: &Node, name: &str) {
    let end = Instant::now() + Duration::from_secs(10);
    while !node.0.path().join(name).exists() {
        assert!(Instant::now() < end, "{name}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The specification: no two commands for one container at the same time.
#[tokio::test(flavor = "multi_thread")]
async fn a_check_under_way_ends_before_del_begins_and_does_not_hold_it_up() {
    let node = Node::new(
        "case $CNI_COMMAND in\n\
         CHECK) trap '' TERM; echo $$ >checking; mv checking CHECK-$CNI_CONTAINERID\n\
           while [ ! -e go ]; do sleep 0.1; done ;;\n\
         DEL) touch DEL-$CNI_CONTAINERID\n\
           ! kill -0 $(cat CHECK-$CNI_CONTAINERID) || touch together ;;\n\
         esac",
    );
    let cni = node.open().await;
    for id in ["a", "b", "c"] {
        cni.attach(&pod(id), netns()).await.unwrap();
    }
    cni.recovered();
    exists(&node, "CHECK-a").await;
    // Those that wait for their turn are not asked any more.
    cni.detach("b", None).await.unwrap();
    let began = Instant::now();
    cni.detach("a", None).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert!(node.0.path().join("DEL-a").exists() && !node.0.path().join("together").exists());
    // The others have their turn.
    exists(&node, "CHECK-c").await;
    assert!(!node.0.path().join("CHECK-b").exists());
    fs::write(node.0.path().join("go"), "").unwrap();
    cni.check("c").await.unwrap();
    cni.detach("c", None).await.unwrap();
    assert!(!node.0.path().join("together").exists() && cni.attached().is_empty());
}

/// A node whose plugin speaks 1.1.0 and writes each command but VERSION down in `calls`. `more` runs after that.
fn writing(keys: &str, more: &str) -> Node {
    let node = Node::new("");
    node.program(
        "p",
        &format!(
            "[ $CNI_COMMAND != VERSION ] || {{ echo '{{\"supportedVersions\": [\"1.1.0\"]}}'; exit; }}\n\
             echo $CNI_COMMAND >>calls\n\
             {more}\n\
             echo '{{\"ips\": [{{\"address\": \"10.9.9.9/24\"}}]}}'"
        ),
    );
    node.configure(&format!(
        r#"{{"cniVersion": "1.1.0", "name": "net", {keys} "plugins": [{{"type": "p"}}]}}"#
    ));
    node
}

fn calls(node: &Node) -> Vec<String> {
    let text = fs::read_to_string(node.0.path().join("calls")).unwrap_or_default();
    text.lines().filter(|line| *line != "STATUS").map(str::to_owned).collect()
}

#[tokio::test]
async fn a_check_that_fails_changes_nothing() {
    let node = writing(
        "",
        "[ $CNI_COMMAND != CHECK ] || { echo '{\"msg\": \"eth0 is gone\"}'; echo really >&2; exit 1; }",
    );
    let cni = node.open().await;
    cni.attach(&pod("one"), netns()).await.unwrap();
    let (before, record) = (cni.result("one"), node.names("records"));
    let error = cni.check("one").await.unwrap_err().to_string();
    assert_eq!(error, "plugin type=\"p\" failed (CHECK): eth0 is gone; standard error: really");
    assert_eq!(calls(&node), ["ADD", "CHECK"]);
    assert_eq!(
        (cni.attached(), cni.result("one"), node.names("records")),
        (vec!["one".to_owned()], before, record)
    );
    assert_eq!(node.names("netns"), ["stave-one"]);
    cni.status().unwrap();
    cni.detach("one", None).await.unwrap();
}

#[tokio::test]
async fn a_configuration_can_do_without_check_and_gc() {
    let all = ["ADD", "CHECK", "CHECK", "GC"];
    for (keys, expected) in [
        ("", &all[..]),
        (r#""disableCheck": true,"#, &["ADD", "GC"]),
        (r#""disableGC": "true","#, &["ADD", "CHECK", "CHECK"]),
        (r#""disableCheck": true, "disableGC": true,"#, &["ADD"]),
    ] {
        let node = writing(keys, "");
        let cni = node.open().await;
        cni.attach(&pod("one"), netns()).await.unwrap();
        cni.recovered();
        cni.check("one").await.unwrap();
        let end = Instant::now() + Duration::from_secs(10);
        while calls(&node).len() < expected.len() && Instant::now() < end {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // One too many would come now.
        tokio::time::sleep(Duration::from_millis(300)).await;
        let mut calls = calls(&node);
        calls.sort();
        assert_eq!(calls, expected, "{keys}");
        cni.detach("one", None).await.unwrap();
    }
}

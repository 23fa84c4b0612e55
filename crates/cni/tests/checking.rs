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

use std::path::Path;

use stave_e2e::cri::ImageFsInfoRequest;
use stave_e2e::{Daemon, Fault, Options, Proxy, Registry, image};

async fn registry() -> std::net::SocketAddr {
    tokio::task::spawn_blocking(Registry::shared).await.expect("a registry").address()
}

/// Points `registry.test` to another address; hosts.toml is read at each pull.
fn mirror(daemon: &Daemon, address: std::net::SocketAddr) {
    let text = format!(
        "server = \"http://{address}\"\n\n[host.\"http://{address}\"]\n  capabilities = [\"pull\", \"resolve\"]\n"
    );
    std::fs::write(daemon.directory().join("certs.d/registry.test/hosts.toml"), text).expect("hosts.toml");
}

fn size(path: &Path) -> u64 {
    let Ok(meta) = std::fs::symlink_metadata(path) else { return 0 };
    let entries = meta.is_dir().then(|| std::fs::read_dir(path)).into_iter().flatten().flatten().flatten();
    // What it takes on disk: a file may have holes.
    std::os::unix::fs::MetadataExt::blocks(&meta) * 512
        + entries.map(|entry| size(&entry.path())).sum::<u64>()
}

/// A pull that failed left no image and next to no bytes, and works when the way is free.
async fn nothing_then_all(daemon: &Daemon) {
    let images = daemon.cri.list_images(Default::default()).await.expect("ListImages").images;
    assert!(images.is_empty(), "a half-pulled image is listed: {images:?}");
    assert_eq!(daemon.cri.image(&image("stave/big")).await.expect("ImageStatus"), None);
    mirror(daemon, registry().await);
    daemon.cri.pull(&image("stave/big")).await.expect("the same pull, unbroken");
    let pod = daemon.run_pod(stave_e2e::pod("pod")).await.expect("RunPodSandbox");
    let config = stave_e2e::container("main", &image("stave/big"), &["/bin/sh", "-c", "ls /big-3 && exit 0"]);
    let id = daemon.run(&pod, &config).await.expect("start");
    assert_eq!(daemon.cri.exited(&id).await.exit_code, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_connection_is_cut() {
    let proxy = Proxy::start(registry().await, Fault::EndAfter(10 << 20)).await;
    let daemon = Daemon::with(Options { registry: Some(proxy.address()), ..Default::default() }).await;
    let error = daemon.cri.pull(&image("stave/big")).await.expect_err("a pull that is cut");
    assert!(error.message().contains("stave/big"), "{error:?}");
    assert!(proxy.connections() > 0);
    nothing_then_all(&daemon).await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_break_now_and_then_are_made_again() {
    // A layer has 8 MiB: each takes several connections.
    let proxy = Proxy::start(registry().await, Fault::CutAfter(3 << 20)).await;
    let daemon = Daemon::with(Options { registry: Some(proxy.address()), ..Default::default() }).await;
    daemon.cri.pull(&image("stave/big")).await.expect("a pull over bad connections");
    assert!(proxy.connections() > 8, "{} connections", proxy.connections());
    let pod = daemon.run_pod(stave_e2e::pod("pod")).await.expect("RunPodSandbox");
    let config = stave_e2e::container("main", &image("stave/big"), &["/bin/sh", "-c", "ls /big-3 && exit 0"]);
    let id = daemon.run(&pod, &config).await.expect("start");
    assert_eq!(daemon.cri.exited(&id).await.exit_code, 0);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_byte_is_wrong() {
    let proxy = Proxy::start(registry().await, Fault::CorruptAt(2 << 20)).await;
    let daemon = Daemon::with(Options { registry: Some(proxy.address()), ..Default::default() }).await;
    let error = daemon.cri.pull(&image("stave/big")).await.expect_err("a pull with a wrong byte");
    assert!(error.message().contains("sha256:"), "the message names the digest: {error:?}");
    nothing_then_all(&daemon).await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_listens() {
    let nobody =
        std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port");
    let daemon = Daemon::with(Options { registry: Some(nobody), ..Default::default() }).await;
    let error = daemon.cri.pull(&image("stave/big")).await.expect_err("a registry that is not there");
    assert_eq!(error.code(), tonic::Code::Unknown, "{error:?}");
    assert!(
        error.message().starts_with("RegistryUnavailable"),
        "the kubelet looks for the prefix: {error:?}"
    );
    nothing_then_all(&daemon).await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_disk_is_full() {
    // The image has 32 MiB that don't compress.
    let daemon = Daemon::with(Options { root_size: Some(24 << 20), ..Default::default() }).await;
    let error = daemon.cri.pull(&image("stave/big")).await.expect_err("a pull to a full disk");
    assert_eq!(error.code(), tonic::Code::ResourceExhausted, "{error:?}");
    let images = daemon.cri.list_images(Default::default()).await.expect("ListImages").images;
    assert!(images.is_empty(), "a half-pulled image is listed: {images:?}");
    stave_e2e::eventually("the space of the failed pull to be free again", async || {
        let disk = nix::sys::statvfs::statvfs(&daemon.directory().join("root")).expect("statvfs");
        ((disk.blocks() - disk.blocks_free()) * disk.fragment_size() < 1 << 20).then_some(())
    })
    .await;
    // What fits still works.
    daemon.cri.pull(&image("stave/busybox")).await.expect("a pull that fits");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_daemon_is_killed_in_the_middle() {
    let mut daemon = Daemon::start().await;
    let cri = daemon.cri.clone();
    let pull = tokio::spawn(async move { cri.pull(&image("stave/big")).await });
    tokio::time::sleep(std::time::Duration::from_millis(60)).await;
    daemon.kill();
    let _ = pull.await;
    daemon.restart().await;
    for found in daemon.cri.list_images(Default::default()).await.expect("ListImages").images {
        // Quick machines may be done by then; what is listed must be whole.
        assert_eq!(found.repo_tags, [image("stave/big:latest")]);
    }
    daemon.cri.pull(&image("stave/big")).await.expect("the same pull, unbroken");
    daemon.cri.remove_image_named(&image("stave/big")).await.expect("RemoveImage");
    let info = daemon.cri.image_fs_info(ImageFsInfoRequest::default()).await.expect("ImageFsInfo");
    assert!(!info.image_filesystems.is_empty());
    stave_e2e::eventually("the space of the broken pull to be free again", async || {
        (size(&daemon.directory().join("root")) < 4 << 20).then_some(())
    })
    .await;
    daemon.finish().await;
}

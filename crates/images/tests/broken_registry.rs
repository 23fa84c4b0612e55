//! Registries that break off, lie, stall or flood: no image, nothing left, and the next pull works.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use common::{Answer, BrokenRegistry, Built, GZIP, MANIFEST, Node, noise, tar};
use rustix::mount::{MountFlags, UnmountFlags};
use serde_json::json;
use stave_images::{Auth, Digest, ErrorKind, Images, LayerStage};

fn two_layers() -> Built {
    let layers = [(GZIP, tar(&[("a", &noise(200_000, 3))])), (GZIP, tar(&[("b", &noise(50_000, 4))]))];
    Built::new(&layers, json!({}))
}

fn layer(built: &Built, at: usize) -> (String, Vec<u8>) {
    (Digest::of(&built.layers[at].1).to_string(), built.layers[at].1.clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn cut_connections() {
    let (registry, node) = (BrokenRegistry::start().await, Node::new().await);
    let built = two_layers();
    registry.image("app", "1", &built);
    node.serve("reg.example", &[registry.address]);
    let (digest, body) = layer(&built, 0);
    registry.blob(
        "app",
        &digest,
        Answer { body: body.clone(), cut: Some(0), cuts: usize::MAX, ..Answer::default() },
    );
    let error = node.images.pull("reg.example/app:1", None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::RegistryUnavailable, "{error}");
    assert!(error.to_string().contains(&digest), "{error}");
    node.assert_empty().await;

    // Cut half-way it is resumed where it broke.
    registry.blob(
        "app",
        &digest,
        Answer { body: body.clone(), cut: Some(100_000), cuts: 1, ..Answer::default() },
    );
    node.images.pull("reg.example/app:1", None).await.unwrap();
    let ranges: Vec<_> = registry.asked().into_iter().filter_map(|a| a.range).collect();
    assert_eq!(ranges, ["bytes=100000-"]);
    assert_eq!(node.names("layers/fs").len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_digests() {
    let (registry, good, node) =
        (BrokenRegistry::start().await, BrokenRegistry::start().await, Node::new().await);
    let built = two_layers();
    good.image("app", "1", &built);
    registry.image("app", "1", &built);
    let (digest, mut body) = layer(&built, 1);
    let other = common::gzip(&tar(&[("evil", b"evil")]));
    let middle = body.len() / 2;
    body[middle] ^= 1;
    let (_, whole) = layer(&built, 1);
    let longer = [&whole[..], b"more"].concat();
    let shorter = whole[..whole.len() - 1].to_vec();
    for (wrong, kind) in [
        (body, ErrorKind::DigestMismatch),
        (longer, ErrorKind::DigestMismatch),
        (other, ErrorKind::RegistryUnavailable),
        (shorter, ErrorKind::RegistryUnavailable),
    ] {
        registry.blob("app", &digest, Answer { body: wrong, ..Answer::default() });
        node.serve("reg.example", &[registry.address]);
        let error = node.images.pull("reg.example/app:1", None).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        node.assert_empty().await;
        // As a mirror it is passed over.
        node.serve("reg.example", &[registry.address, good.address]);
        node.images.pull("reg.example/app:1", None).await.unwrap();
        node.images.remove("reg.example/app:1").await.unwrap();
        node.assert_empty().await;
    }

    // Manifest and config.
    node.serve("reg.example", &[registry.address]);
    registry.image("app", "1", &built);
    let changed = [&built.config[..], b" "].concat();
    registry.blob("app", &built.id(), Answer { body: changed, ..Answer::default() });
    let error = node.images.pull("reg.example/app:1", None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::DigestMismatch, "{error}");
    let wanted = format!("reg.example/app@{}", Digest::of(b"wanted"));
    let path = format!("/v2/app/manifests/{}", Digest::of(b"wanted"));
    registry.answer(
        &path,
        Answer { status: 200, content_type: MANIFEST, body: built.manifest, ..Answer::default() },
    );
    let error = node.images.pull(&wanted, None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::DigestMismatch, "{error}");
    node.assert_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn content_that_is_not_what_the_config_says() {
    let (registry, node) = (BrokenRegistry::start().await, Node::new().await);
    node.serve("reg.example", &[registry.address]);
    // The digests of the blobs are right; the diffID, the archive or the count of layers is not.
    let mut built = two_layers();
    let lie = |from: &Built, layers: Vec<(&'static str, Vec<u8>)>, diff_ids: Vec<String>| {
        let mut config: serde_json::Value = serde_json::from_slice(&from.config).unwrap();
        config["rootfs"]["diff_ids"] = json!(diff_ids);
        let config = serde_json::to_vec(&config).unwrap();
        let descriptors: Vec<_> = layers
            .iter()
            .map(|(kind, b)| json!({"mediaType": kind, "digest": Digest::of(b).to_string(), "size": b.len()}))
            .collect();
        let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST, "layers": descriptors,
            "config": {"mediaType": "c", "digest": Digest::of(&config).to_string(), "size": config.len()}});
        Built { manifest: serde_json::to_vec(&manifest).unwrap(), config, layers }
    };
    let id = Digest::of(b"?").to_string();
    let zstd = "application/vnd.oci.image.layer.v1.tar+zstd";
    let junk = vec![(GZIP, common::gzip(b"this is no tar at all"))];
    let junk_id = Digest::of(b"this is no tar at all").to_string();
    for (image, kind) in [
        (lie(&built, built.layers.clone(), vec![id.clone(), id.clone()]), ErrorKind::DigestMismatch),
        (lie(&built, built.layers.clone(), vec![id.clone()]), ErrorKind::InvalidImage),
        (lie(&built, vec![(GZIP, b"junk".to_vec())], vec![id.clone()]), ErrorKind::RegistryUnavailable),
        (lie(&built, junk, vec![junk_id]), ErrorKind::InvalidImage),
        (lie(&built, vec![(zstd, b"zstd".to_vec())], vec![id.clone()]), ErrorKind::InvalidImage),
    ] {
        registry.image("app", "1", &image);
        let error = node.images.pull("reg.example/app:1", None).await.unwrap_err();
        if kind == ErrorKind::RegistryUnavailable {
            assert_ne!(error.kind(), ErrorKind::Internal, "{error}");
        } else {
            assert_eq!(error.kind(), kind, "{error}");
        }
        node.assert_empty().await;
    }
    built.manifest = b"{}".to_vec();
    registry.image("app", "1", &built);
    assert_eq!(
        node.images.pull("reg.example/app:1", None).await.unwrap_err().kind(),
        ErrorKind::InvalidImage
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn stalls() {
    let (registry, good, node) =
        (BrokenRegistry::start().await, BrokenRegistry::start().await, Node::new().await);
    let built = two_layers();
    registry.image("app", "1", &built);
    good.image("app", "1", &built);
    let (digest, body) = layer(&built, 0);
    registry.blob("app", &digest, Answer { body, stall: Some(50_000), ..Answer::default() });
    node.serve("reg.example", &[registry.address]);
    let began = Instant::now();
    let error = node.images.pull("reg.example/app:1", None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::RegistryUnavailable);
    assert!(error.to_string().contains("stalled"), "{error}");
    assert!(began.elapsed() < Duration::from_secs(20));
    node.assert_empty().await;
    node.serve("reg.example", &[registry.address, good.address]);
    node.images.pull("reg.example/app:1", None).await.unwrap();
}

/// CVE-2023-25153, CVE-2020-1702
#[tokio::test(flavor = "multi_thread")]
async fn cve_2023_25153_floods_are_cut_off() {
    let (registry, node) = (BrokenRegistry::start().await, Node::new().await);
    let built = two_layers();
    node.serve("reg.example", &[registry.address]);
    let endless = Answer { status: 200, content_type: MANIFEST, endless: true, ..Answer::default() };
    let huge =
        Answer { status: 200, content_type: MANIFEST, body: vec![b' '; (4 << 20) + 1], ..Answer::default() };
    for answer in [endless.clone(), huge] {
        registry.answer("/v2/app/manifests/1", answer);
        let error = node.images.pull("reg.example/app:1", None).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidImage, "{error}");
    }
    registry.image("app", "1", &built);
    registry.blob("app", &built.id(), endless.clone());
    let error = node.images.pull("reg.example/app:1", None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidImage, "{error}");
    // An endless layer, and an endless body of an error.
    registry.image("app", "1", &built);
    registry.blob("app", &layer(&built, 0).0, endless.clone());
    let error = node.images.pull("reg.example/app:1", None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::DigestMismatch, "{error}");
    registry.answer("/v2/app/manifests/1", Answer { status: 500, ..endless });
    let error = node.images.pull("reg.example/app:1", None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::RegistryUnavailable, "{error}");
    node.assert_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn waiters_share_one_pull_and_the_last_one_ends_it() {
    let (registry, node) = (BrokenRegistry::start().await, Node::new().await);
    let built = two_layers();
    registry.image("app", "1", &built);
    let (digest, body) = layer(&built, 0);
    registry.blob("app", &digest, Answer { body, stall: Some(50_000), ..Answer::default() });
    node.serve("reg.example", &[registry.address]);
    let pull = |images: &Images| {
        let images = images.clone();
        tokio::spawn(async move { images.pull("reg.example/app:1", None).await })
    };
    let (first, second) = (pull(&node.images), pull(&node.images));
    let progress = loop {
        let pulls = node.images.pulls();
        if let Some(pull) = pulls.iter().find(|p| p.layers.iter().any(|l| l.done >= 50_000)) {
            break pull.clone();
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    assert_eq!(node.images.pulls().len(), 1);
    assert_eq!(progress.reference, "reg.example/app:1");
    assert_eq!(progress.stage, "downloading layer 1/2");
    assert_eq!(progress.layers[0].stage, LayerStage::Downloading);
    assert!(progress.done >= 50_000 && progress.total > progress.done);
    first.abort();
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(node.images.pulls().len(), 1, "the other one still waits");
    assert_eq!(registry.asked().iter().filter(|a| a.path == "/v2/app/manifests/1").count(), 1);
    second.abort();
    node.assert_empty().await;
    registry.image("app", "1", &built);
    let all = futures::future::join_all((0..4).map(|_| node.images.pull("reg.example/app:1", None))).await;
    assert!(all.iter().all(|image| image.as_ref().unwrap().id == built.id()));
    assert_eq!(registry.asked().iter().filter(|a| a.path == "/v2/app/manifests/1").count(), 2);
}

/// CVE-2020-15157: credentials stay with their host.
#[tokio::test(flavor = "multi_thread")]
async fn cve_2020_15157_credentials_do_not_travel() {
    let (mirror, origin, storage, node) = (
        BrokenRegistry::start().await,
        BrokenRegistry::start().await,
        BrokenRegistry::start().await,
        Node::new().await,
    );
    let built = two_layers();
    origin.image("app", "1", &built);
    storage.image("app", "1", &built);
    // The mirror has nothing; the origin wants a token and sends one layer's readers elsewhere.
    let ask = "www-authenticate: Basic realm=\"x\"\r\n".to_owned();
    mirror.answer("/v2/", Answer { status: 401, headers: ask.clone(), ..Answer::default() });
    origin.answer("/v2/", Answer { status: 401, headers: ask, ..Answer::default() });
    let (digest, _) = layer(&built, 0);
    let location = format!("location: http://{}/v2/app/blobs/{digest}\r\n", storage.address);
    origin.answer(
        &format!("/v2/app/blobs/{digest}"),
        Answer { status: 307, headers: location, ..Answer::default() },
    );
    node.serve("reg.example", &[mirror.address, origin.address]);
    let auth = Auth { registry_token: "secret-token".into(), ..Auth::default() };
    node.images.pull("reg.example/app:1", Some(auth)).await.unwrap();
    let sent = |registry: &BrokenRegistry| -> Vec<_> {
        registry.asked().into_iter().filter_map(|asked| asked.authorization).collect()
    };
    assert!(!mirror.asked().is_empty() && !storage.asked().is_empty());
    assert_eq!(sent(&mirror), Vec::<String>::new());
    assert_eq!(sent(&storage), Vec::<String>::new());
    assert!(sent(&origin).iter().all(|value| value == "Bearer secret-token") && !sent(&origin).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn hosts_that_do_not_answer() {
    let node = Node::new().await;
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    node.serve("reg.example", &[free]);
    let error = node.images.pull("reg.example/app:1", None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::RegistryUnavailable, "{error}");
    node.hosts("reg.example", "[host.\"http://x\"]\nclient = \"cert.pem\"");
    let error = node.images.pull("reg.example/app:1", None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Configuration, "{error}");
    assert!(error.to_string().contains("hosts.toml") && error.to_string().contains("client"), "{error}");
}

/// A small file system, unmounted when dropped.
struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    fn mount(options: &std::ffi::CStr) -> Tmpfs {
        let dir = tempfile::tempdir().unwrap();
        rustix::mount::mount("tmpfs", dir.path(), "tmpfs", MountFlags::empty(), options).unwrap();
        Tmpfs(dir)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.0.path(), UnmountFlags::DETACH);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk() {
    let (registry, config) = (BrokenRegistry::start().await, Node::new().await);
    let layers = [(GZIP, tar(&[("a", &noise(20_000, 5))])), (GZIP, tar(&[("b", &noise(2 << 20, 6))]))];
    let built = Built::new(&layers, json!({}));
    registry.image("app", "1", &built);
    config.serve("reg.example", &[registry.address]);
    let disk = Tmpfs::mount(c"size=1m");
    let certs = config.dir.path().join("certs.d");
    let images = Images::open_with(disk.0.path(), &certs, common::quick()).await.unwrap();
    let error = images.pull("reg.example/app:1", None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
    let empty = |dir: &Path| std::fs::read_dir(dir).unwrap().next().is_none();
    for _ in 0..100 {
        if ["images", "layers/fs", "layers/records", "layers/staging", "layers/trash"]
            .iter()
            .all(|dir| empty(&disk.0.path().join(dir)))
        {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for dir in ["images", "layers/fs", "layers/records", "layers/staging", "layers/trash"] {
        assert!(empty(&disk.0.path().join(dir)), "{dir}");
    }
    rustix::mount::mount_remount(disk.0.path(), MountFlags::empty(), c"size=16m").unwrap();
    assert_eq!(images.pull("reg.example/app:1", None).await.unwrap().id, built.id());
}

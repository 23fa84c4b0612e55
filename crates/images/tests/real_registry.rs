//! Pulls from the docker-registry package.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::fs;
use std::os::unix::fs::FileTypeExt;

use common::{Built, GZIP, INDEX, MANIFEST, Node, PASSWORD, PLAIN, RealRegistry, arch, noise, tar};
use serde_json::json;
use stave_images::{Auth, Digest, ErrorKind};

fn application() -> Built {
    let layers = [
        (GZIP, tar(&[("bin/app", &noise(300_000, 1)), ("etc/old", b"old")])),
        (PLAIN, tar(&[("etc/.wh.old", b""), ("etc/new", b"new")])),
        (GZIP, tar(&[("data/file", &noise(100_000, 2))])),
    ];
    let config = json!({"Entrypoint": ["/bin/app"], "Cmd": ["--serve"], "Env": ["PATH=/bin", "A=b"],
        "User": "1002:1003", "WorkingDir": "/data", "Volumes": {"/data": {}}, "ExposedPorts": {"80/tcp": {}},
        "StopSignal": "SIGQUIT", "Labels": {"maintainer": "nobody"}});
    Built::new(&layers, config)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_from_index_to_layers_and_back() {
    let (registry, mut node) = (RealRegistry::start().await, Node::new().await);
    let built = application();
    registry.push("team/app", "plain", &built).await;
    let entry = |digest: &str, size: usize, arch: &str| {
        json!({"mediaType": MANIFEST, "digest": digest, "size": size,
            "platform": {"os": "linux", "architecture": arch}})
    };
    let foreign = Built::small("foreign");
    registry.push("team/app", "foreign", &foreign).await;
    let index = serde_json::to_vec(&json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [
        entry(&foreign.digest(), foreign.manifest.len(), "s390x"),
        entry(&built.digest(), built.manifest.len(), arch())]}))
    .unwrap();
    registry.manifest("team/app", "v1", INDEX, &index).await;
    node.serve("reg.example", &[registry.address]);

    let image = node.images.pull("reg.example/team/app:v1", None).await.unwrap();
    assert_eq!(image.id, built.id());
    assert_eq!(image.repo_tags, ["reg.example/team/app:v1"]);
    assert_eq!(image.repo_digests, [format!("reg.example/team/app@{}", Digest::of(&index))]);
    assert_eq!(image.size, 400_000 + 6 + built.config.len() as u64);
    assert_eq!(image.raw_config.as_bytes(), built.config);
    assert_eq!(image.chain.len(), 3);
    let config = &image.config;
    assert_eq!(
        (&config.entrypoint[..], &config.cmd[..]),
        (&["/bin/app".to_owned()][..], &["--serve".to_owned()][..])
    );
    assert_eq!((config.user.as_str(), config.working_dir.as_str()), ("1002:1003", "/data"));
    assert_eq!((&config.volumes[0], &config.exposed_ports[0]), (&"/data".to_owned(), &"80/tcp".to_owned()));
    assert_eq!((config.stop_signal.as_str(), config.labels["maintainer"].as_str()), ("SIGQUIT", "nobody"));
    assert_eq!((image.os.as_str(), image.architecture.as_str()), ("linux", arch()));

    let dirs = node.images.layer_dirs(&image);
    assert_eq!(fs::read(dirs[0].join("data/file")).unwrap(), noise(100_000, 2));
    assert_eq!(fs::read(dirs[2].join("bin/app")).unwrap(), noise(300_000, 1));
    assert!(fs::symlink_metadata(dirs[1].join("etc/old")).unwrap().file_type().is_char_device());
    assert_eq!(node.images.volume_dirs(&image.chain).unwrap(), dirs);
    let single = node.images.volume_dirs(&image.chain[..1]).unwrap();
    assert_eq!(single[..1], dirs[2..]);
    assert_eq!(fs::read_dir(&single[1]).unwrap().count(), 0, "overlayfs wants two");

    // Every name finds it, and another daemon on the same root finds the same.
    let hex = &image.id[7..];
    let names =
        [&image.id, hex, &hex[..12], &image.id[..20], "reg.example/team/app:v1", &image.repo_digests[0]];
    for name in names {
        assert_eq!(node.images.find(name), Some(image.clone()), "{name}");
    }
    for name in ["", "a", hex[..2].into(), "reg.example/team/app:v2", "team/app:v1", "reg.example/team/app"] {
        assert_eq!(node.images.find(name), None, "{name}");
    }
    let info = node.images.fs_info();
    assert_eq!(info.used_bytes, image.size);
    assert!(info.inodes_used >= 9 && info.mountpoint.is_dir());
    node.reopen().await;
    assert_eq!(node.images.list(), std::slice::from_ref(&image));
    assert_eq!(node.images.fs_info(), info);

    // Pulled again it is the same; removed by five at once it is gone, and removing goes on to succeed.
    assert_eq!(node.images.pull("reg.example/team/app:v1", None).await.unwrap(), image);
    let removals = (0..5).map(|_| async {
        node.images.remove(&image.id).await.unwrap();
        assert!(node.images.find(&image.id).is_none());
    });
    futures::future::join_all(removals).await;
    node.images.remove("reg.example/team/app:v1").await.unwrap();
    node.assert_empty().await;
    assert_eq!(node.images.fs_info().used_bytes, 0);
    let again = node.images.pull("reg.example/team/app:v1", None).await.unwrap();
    assert_eq!(again, image);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_image_under_two_registries_is_one_image() {
    let (registry, mut node) = (RealRegistry::start().await, Node::new().await);
    let pause = Built::small("pause");
    registry.push("pause", "3.9", &pause).await;
    // Mirrors for both: the host is dropped, the path kept. The servers themselves do not exist.
    for domain in ["registry.k8s.invalid", "k8s.gcr.invalid"] {
        node.hosts(domain, &format!("[host.\"http://{}\"]", registry.address));
    }
    let first = node.images.pull("registry.k8s.invalid/pause:3.9", None).await.unwrap();
    let second = node.images.pull("k8s.gcr.invalid/pause:3.9", None).await.unwrap();
    assert_eq!(first.id, second.id);
    assert_eq!(second.repo_tags, ["k8s.gcr.invalid/pause:3.9", "registry.k8s.invalid/pause:3.9"]);
    assert_eq!(second.repo_digests.len(), 2);
    node.reopen().await;
    assert_eq!(node.images.list(), std::slice::from_ref(&second));
    node.images.remove("registry.k8s.invalid/pause:3.9").await.unwrap();
    assert!(node.images.find("k8s.gcr.invalid/pause:3.9").is_none());
    node.assert_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tags_move_and_digests_stay() {
    let (registry, mut node) = (RealRegistry::start().await, Node::new().await);
    let (old, new) = (Built::small("old"), Built::small("new"));
    registry.push("app", "latest", &old).await;
    node.serve("reg.example:5000", &[registry.address]);
    let by_digest = format!("reg.example:5000/app@{}", old.digest());
    let image = node.images.pull(&by_digest, None).await.unwrap();
    assert!(image.repo_tags.is_empty());
    assert_eq!(image.repo_digests, std::slice::from_ref(&by_digest));
    node.images.pull("reg.example:5000/app", None).await.unwrap();
    registry.push("app", "latest", &new).await;
    let image = node.images.pull("reg.example:5000/app:latest", None).await.unwrap();
    assert_eq!(image.id, new.id());
    for _ in 0..2 {
        assert_eq!(node.images.find("reg.example:5000/app").unwrap().id, new.id());
        let old_image = node.images.find(&by_digest).unwrap();
        assert_eq!(old_image.id, old.id());
        assert!(old_image.repo_tags.is_empty());
        assert_eq!(node.images.list().len(), 2);
        node.reopen().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_containers_use_stays() {
    let (registry, mut node) = (RealRegistry::start().await, Node::new().await);
    let (app, base) = (application(), Built::small("x"));
    registry.push("app", "1", &app).await;
    registry.push("base", "1", &base).await;
    node.serve("reg.example", &[registry.address]);
    let image = node.images.pull("reg.example/app:1", None).await.unwrap();
    node.images.pull("reg.example/base:1", None).await.unwrap();
    node.images.hold("container", &image).unwrap();
    node.images.remove(&image.id).await.unwrap();
    assert!(node.images.find(&image.id).is_none());
    assert!(node.images.layer_dirs(&image).iter().all(|dir| dir.is_dir()));
    // After a restart: the image is gone, the layers are there to be held again.
    node.reopen().await;
    node.images.hold_chain("container", &image.chain).unwrap();
    node.images.remove("reg.example/base:1").await.unwrap();
    assert_eq!(node.names("layers/fs").len(), 3);
    node.images.release("container").await;
    node.images.release("container").await;
    node.assert_empty().await;
    assert_eq!(node.images.hold("late", &image).unwrap_err().kind(), ErrorKind::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn passwords() {
    let (registry, node) = (RealRegistry::start_with(true).await, Node::new().await);
    registry.push("app", "1", &application()).await;
    node.serve("reg.example", &[registry.address]);
    let auth = |password: &str, address: &str| Auth {
        username: "user".into(),
        password: password.into(),
        server_address: address.into(),
        ..Auth::default()
    };
    for wrong in [None, Some(auth("wrong", "")), Some(auth(PASSWORD, "other.example"))] {
        let error = node.images.pull("reg.example/app:1", wrong).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error}");
        assert!(!error.to_string().contains(PASSWORD));
    }
    node.assert_empty().await;
    node.images.pull("reg.example/app:1", Some(auth(PASSWORD, "https://reg.example/v2/"))).await.unwrap();
    let encoded = Auth { auth: "dXNlcjpVKlU=".into(), ..Auth::default() };
    node.images.pull("reg.example/app:1", Some(encoded)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn cve_2019_10214_plain_http_only_by_hosts_toml() {
    let (registry, node) = (RealRegistry::start().await, Node::new().await);
    registry.push("app", "1", &Built::small("x")).await;
    let reference = format!("{}/app:1", registry.address);
    let error = node.images.pull(&reference, None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::RegistryUnavailable, "{error}");
    node.assert_empty().await;
    node.serve(&registry.address.to_string(), &[registry.address]);
    node.images.pull(&reference, None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_not_found() {
    let (registry, node) = (RealRegistry::start().await, Node::new().await);
    node.serve("reg.example", &[registry.address]);
    for reference in ["reg.example/none:1", &format!("reg.example/none@{}", Digest::of(b"none"))] {
        let error = node.images.pull(reference, None).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(error.to_string().contains(reference), "{error}");
    }
    let error = node.images.pull("Not A Reference", None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidReference);
    node.assert_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_records_stop_nothing() {
    let (registry, mut node) = (RealRegistry::start().await, Node::new().await);
    node.serve("reg.example", &[registry.address]);
    let (good, lost) = (Built::small("good"), Built::small("lost"));
    registry.push("good", "1", &good).await;
    registry.push("lost", "1", &lost).await;
    let good = node.images.pull("reg.example/good:1", None).await.unwrap();
    let lost = node.images.pull("reg.example/lost:1", None).await.unwrap();
    let records = node.dir.path().join("root/images");
    fs::write(records.join(format!("{}.json", Digest::of(b"1").hex())), "{").unwrap();
    let text = fs::read_to_string(records.join(format!("{}.json", &good.id[7..]))).unwrap();
    fs::write(records.join(format!("{}.json", Digest::of(b"2").hex())), text).unwrap();
    fs::remove_dir_all(&node.images.layer_dirs(&lost)[0]).unwrap();
    node.reopen().await;
    assert_eq!(node.images.list(), std::slice::from_ref(&good));
    assert_eq!(node.names("images").len(), 1);
    assert_eq!(fs::read_dir(records.join(".broken")).unwrap().count(), 3);
    // A pull repairs.
    assert_eq!(node.images.pull("reg.example/lost:1", None).await.unwrap(), lost);
}

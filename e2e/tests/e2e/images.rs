use std::collections::BTreeSet;

use stave_e2e::cri::{ImageFsInfoRequest, ImageSpec, ImageStatusRequest, Int64Value};
use stave_e2e::{Config, Daemon, container, image, pod};

use crate::{busybox, daemon_with_pod, sleeper};

async fn names(daemon: &Daemon) -> BTreeSet<String> {
    let images = daemon.cri.list_images(Default::default()).await.expect("ListImages").images;
    images.into_iter().flat_map(|image| image.repo_tags).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_name_of_an_image_gives_the_same_status() {
    let daemon = Daemon::start().await;
    let cri = &daemon.cri;
    let reference = cri.pull(&busybox()).await.expect("PullImage");
    let by_name = cri.image(&busybox()).await.expect("ImageStatus").expect("the image");
    assert_eq!(by_name.id, reference, "PullImage answers with the image's id");
    assert!(by_name.id.starts_with("sha256:") && by_name.id.len() == 71, "id {}", by_name.id);
    assert_eq!(by_name.repo_tags, [busybox()]);
    assert_eq!(by_name.repo_digests.len(), 1);
    let digest = &by_name.repo_digests[0];
    assert!(digest.starts_with("registry.test/e2e-test-images/busybox@sha256:"), "{digest}");
    assert!(by_name.size > 1_000_000);
    assert_eq!((&by_name.uid, by_name.username.as_str()), (&None, ""), "no user in the image");
    let hex = by_name.id.strip_prefix("sha256:").expect("an id").to_owned();
    for name in [&by_name.id, digest, &hex] {
        assert_eq!(cri.image(name).await.expect("ImageStatus").as_ref(), Some(&by_name), "{name}");
    }
    let listed = cri.list_images(Default::default()).await.expect("ListImages").images;
    assert_eq!(listed, std::slice::from_ref(&by_name));
    // Again: nothing changes.
    assert_eq!(cri.pull(&busybox()).await.expect("PullImage"), reference);
    assert_eq!(cri.list_images(Default::default()).await.expect("ListImages").images, [by_name]);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_tag_is_latest_and_a_digest_has_no_tag() {
    let daemon = Daemon::start().await;
    let cri = &daemon.cri;
    cri.pull(&image("stave/busybox")).await.expect("PullImage");
    let first = cri.image(&image("stave/busybox")).await.expect("ImageStatus").expect("the image");
    assert_eq!(first.repo_tags, [image("stave/busybox:latest")]);
    let digest = first.repo_digests[0].clone();
    cri.remove_image_named(&first.id).await.expect("RemoveImage");
    assert_eq!(cri.image(&digest).await.expect("ImageStatus"), None);
    cri.pull(&digest).await.expect("PullImage by digest");
    let second = cri.image(&digest).await.expect("ImageStatus").expect("the image");
    assert_eq!((second.id, second.repo_tags, second.repo_digests), (first.id, vec![], vec![digest]));
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn several_tags_of_one_image() {
    let daemon = Daemon::start().await;
    let cri = &daemon.cri;
    let tags: Vec<_> =
        (1..=3).map(|tag| image(&format!("k8s-staging-cri-tools/test-image-tags:{tag}"))).collect();
    let mut ids = BTreeSet::new();
    for tag in &tags {
        ids.insert(cri.pull(tag).await.expect("PullImage"));
    }
    assert_eq!(ids.len(), 1);
    let images = cri.list_images(Default::default()).await.expect("ListImages").images;
    assert_eq!(images.len(), 1);
    let mut found = images[0].repo_tags.clone();
    found.sort();
    assert_eq!(found, tags);
    assert_eq!(images[0].repo_digests.len(), 1, "no digest twice");
    cri.remove_image_named(&tags[0]).await.expect("RemoveImage");
    assert_eq!(names(&daemon).await, BTreeSet::new(), "all names go at once");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_images_user_is_told() {
    let daemon = Daemon::start().await;
    let cri = &daemon.cri;
    let cases = [
        ("uid", Some(1002), ""),
        ("username", None, "www-data"),
        ("uid-group", Some(1003), ""),
        ("username-group", None, "www-data"),
    ];
    for (suffix, uid, username) in cases {
        let name = image(&format!("k8s-staging-cri-tools/test-image-user-{suffix}"));
        cri.pull(&name).await.expect("PullImage");
        let status = cri.image(&name).await.expect("ImageStatus").expect("the image");
        assert_eq!(
            (status.uid, status.username.as_str()),
            (uid.map(|value| Int64Value { value }), username),
            "{suffix}"
        );
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_kinds_of_manifests() {
    let daemon = Daemon::start().await;
    let cri = &daemon.cri;
    // Docker's manifest; an index for several platforms; a layer without compression.
    for name in ["stave/docker", "stave/index", "stave/layers"] {
        cri.pull(&image(name)).await.unwrap_or_else(|e| panic!("PullImage of {name}: {e:?}"));
        assert!(cri.image(&image(name)).await.expect("ImageStatus").is_some(), "{name}");
    }
    let pod = daemon.run_pod(pod("pod")).await.expect("RunPodSandbox");
    for name in ["docker", "index"] {
        let config = container(name, &image(&format!("stave/{name}")), &["/bin/sh", "-c", "exit 0"]);
        let id = daemon.run(&pod, &config).await.expect("start");
        assert_eq!(cri.exited(&id).await.exit_code, 0);
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_replace_and_take_away() {
    let (daemon, pod) = daemon_with_pod().await;
    let cri = &daemon.cri;
    cri.pull(&image("stave/layers")).await.expect("PullImage");
    let config = sleeper("main").with(|config| config.image.as_mut().unwrap().image = image("stave/layers"));
    let id = daemon.run(&pod, &config).await.expect("start");
    assert_eq!(cri.shell(&id, "ls -A /d /opaque").await, "/d:\nkept\n\n/opaque:\nnew\n");
    assert_eq!(cri.shell(&id, "cat /changed /swap /to-dir/kept").await, "upper\na file now\nlower\n");
    assert_eq!(cri.shell(&id, "stat -c '%a %u %g %Y' /changed").await, "600 1000 1000 1700000000\n");
    assert_eq!(cri.shell(&id, "stat -c '%a %u %g' /setuid").await, "4755 7 8\n");
    assert_eq!(
        cri.shell(&id, "stat -c '%h' /hardlink; [ /hardlink -ef /changed ] && echo same").await,
        "2\nsame\n"
    );
    assert_eq!(
        cri.shell(&id, "stat -c '%F' /fifo /null /to-dir").await,
        "fifo\ncharacter special file\nsymbolic link\n"
    );
    assert_eq!(cri.shell(&id, "stat -c '%F %t:%T' /null").await, "character special file 1:3\n");
    assert_eq!(cri.shell(&id, "find / -xdev -name '.wh.*'").await, "");
    // What the container writes is its own.
    cri.shell(&id, "echo mine >/changed; rm /d/kept; mkdir /new").await;
    let config = config.with(|config| config.metadata.as_mut().unwrap().name = "second".into());
    let second = daemon.run(&pod, &config).await.expect("start");
    assert_eq!(
        cri.shell(&second, "cat /changed /d/kept; ls -d /new 2>/dev/null || echo none").await,
        "upper\nlower\nnone\n"
    );
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_container_survives_the_removal_of_its_image() {
    let (daemon, pod) = daemon_with_pod().await;
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    daemon.cri.remove_image_named(&busybox()).await.expect("RemoveImage");
    assert_eq!(daemon.cri.image(&busybox()).await.expect("ImageStatus"), None);
    assert_eq!(
        daemon.cri.shell(&id, "ls /bin/ls && cat /etc/passwd | head -n 1").await,
        "/bin/ls\nroot:x:0:0:root:/root:/bin/sh\n"
    );
    let status = daemon.cri.container(&id).await.expect("ContainerStatus");
    assert!(!status.image_ref.is_empty() && !status.image_id.is_empty(), "its image stays named: {status:?}");
    // And it can be pulled again beside it.
    daemon.cri.pull(&busybox()).await.expect("PullImage");
    daemon.run(&pod, &sleeper("second")).await.expect("start");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn verbose_status_has_the_configuration() {
    let daemon = Daemon::start().await;
    daemon.cri.pull(&image("stave/configured")).await.expect("PullImage");
    let spec = ImageSpec { image: image("stave/configured"), ..Default::default() };
    let request = ImageStatusRequest { image: Some(spec), verbose: true };
    let info = daemon.cri.image_status(request).await.expect("ImageStatus").info;
    let value: serde_json::Value = serde_json::from_str(&info["info"]).expect("info is JSON");
    assert_eq!(value["imageSpec"]["config"]["WorkingDir"], "/work", "{value}");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_image_file_system_is_told() {
    let daemon = Daemon::start().await;
    let used = async || {
        let info = daemon.cri.image_fs_info(ImageFsInfoRequest::default()).await.expect("ImageFsInfo");
        let filesystem = info.image_filesystems.into_iter().next().expect("an image file system");
        let mountpoint = filesystem.fs_id.expect("fs_id").mountpoint;
        assert!(std::path::Path::new(&mountpoint).is_dir(), "{mountpoint}");
        assert!(filesystem.timestamp > 0 && filesystem.inodes_used.is_some());
        filesystem.used_bytes.expect("used_bytes").value
    };
    let before = used().await;
    daemon.cri.pull(&image("stave/big")).await.expect("PullImage");
    stave_e2e::eventually("used_bytes to grow by the image", async || {
        (used().await >= before + (32 << 20)).then_some(())
    })
    .await;
    daemon.cri.remove_image_named(&image("stave/big")).await.expect("RemoveImage");
    stave_e2e::eventually("used_bytes to shrink again", async || {
        (used().await < before + (16 << 20)).then_some(())
    })
    .await;
    daemon.finish().await;
}

//! Images mounted into containers as volumes.

use stave_e2e::cri::{ContainerConfig, ImageSpec, Mount};
use stave_e2e::{Config, Daemon, Pod, eventually, image, newer_client, newer_cri, translate};
use tonic::{Code, Status};

use crate::{busybox, daemon_with_pod, sleeper};

fn volume(name: &str, path: &str) -> Mount {
    Mount {
        container_path: path.to_owned(),
        readonly: true,
        image: Some(ImageSpec { image: name.to_owned(), ..Default::default() }),
        ..Default::default()
    }
}

/// CreateContainer with a sub path for the first mount: a field that came later.
async fn create_with_sub_path(
    daemon: &Daemon,
    pod: &Pod,
    config: &ContainerConfig,
    sub_path: &str,
) -> Result<String, Status> {
    let mut config: newer_cri::ContainerConfig = translate(config);
    config.mounts[0].image_sub_path = sub_path.to_owned();
    let request = newer_cri::CreateContainerRequest {
        pod_sandbox_id: pod.id.clone(),
        config: Some(config),
        sandbox_config: Some(translate(&pod.config)),
    };
    let mut client = newer_client(&daemon.socket()).await;
    Ok(Box::pin(client.create_container(request)).await?.into_inner().container_id)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_mounted_read_only_and_outlives_its_removal() {
    let (mut daemon, pod) = daemon_with_pod().await;
    // Three layers, of which the upper two change what is below.
    let name = image("stave/layers");
    let image_id = daemon.cri.pull(&name).await.expect("PullImage");
    let config = sleeper("main").with(|config| config.mounts = vec![volume(&name, "/volume")]);
    let id = daemon.run(&pod, &config).await.expect("start");
    assert_eq!(
        daemon.cri.shell(&id, "cat /volume/changed /volume/d/kept; ls /volume/opaque").await,
        "upper\nlower\nnew\n"
    );
    // Programs in it may be run.
    assert_eq!(daemon.cri.output(&id, &["/volume/bin/busybox", "echo", "ran"]).await, "ran\n");
    for script in
        ["touch /volume/new", "rm /volume/changed", "echo x >/volume/changed", "mount -o remount,rw /volume"]
    {
        let result = daemon.cri.exec(&id, &["/bin/sh", "-c", script]).await.expect("ExecSync");
        assert_ne!(result.exit_code, 0, "{script}");
    }
    // A device of the image is no device here.
    let result = daemon.cri.exec(&id, &["/bin/sh", "-c", "cat /volume/null"]).await.expect("ExecSync");
    assert_ne!(result.exit_code, 0);

    let status = daemon.cri.container(&id).await.expect("ContainerStatus");
    assert_eq!(status.mounts.len(), 1);
    assert_eq!((status.mounts[0].container_path.as_str(), status.mounts[0].readonly), ("/volume", true));
    assert_eq!(status.mounts[0].image.as_ref().map(|image| image.image.as_str()), Some(image_id.as_str()));
    let request = newer_cri::ContainerStatusRequest { container_id: id.clone(), verbose: false };
    let status =
        newer_client(&daemon.socket()).await.container_status(request).await.expect("ContainerStatus");
    let status = status.into_inner().status.expect("status");
    assert_eq!(
        status.mounts[0].image.as_ref().map(|image| image.image_ref.as_str()),
        Some(image_id.as_str())
    );

    daemon.cri.remove_image_named(&name).await.expect("RemoveImage");
    assert!(daemon.cri.image(&name).await.expect("ImageStatus").is_none());
    assert_eq!(daemon.cri.output(&id, &["cat", "/volume/changed"]).await, "upper\n");
    // A new daemon knows which layers are in use.
    daemon.kill();
    daemon.restart().await;
    daemon.cri.pull(&image("stave/none")).await.expect("PullImage");
    daemon.cri.remove_image_named(&image("stave/none")).await.expect("RemoveImage");
    assert_eq!(
        daemon.cri.shell(&id, "cat /volume/d/kept; ls /volume/bin | wc -l").await.lines().next(),
        Some("lower")
    );
    // Gone with the last user.
    let layers = daemon.directory().join("root/layers/fs");
    let before = std::fs::read_dir(&layers).expect("layers").count();
    daemon.cri.stop(&id, 0).await.expect("StopContainer");
    daemon.cri.remove(&id).await.expect("RemoveContainer");
    eventually("the layers' removal", async || {
        (std::fs::read_dir(&layers).expect("layers").count() + 2 <= before).then_some(())
    })
    .await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sub_paths_of_an_image() {
    let (daemon, pod) = daemon_with_pod().await;
    let name = image("stave/layers");
    daemon.cri.pull(&name).await.expect("PullImage");
    let with =
        |container: &str| sleeper(container).with(|config| config.mounts = vec![volume(&name, "/volume")]);
    for (sub_path, show, shown) in [
        ("d", "ls /volume", "kept\n"),
        ("to-dir", "ls /volume", "kept\n"),
        ("d/kept", "cat /volume", "lower\n"),
    ] {
        let container = sub_path.replace('/', "-");
        let id = create_with_sub_path(&daemon, &pod, &with(&container), sub_path).await.expect(sub_path);
        daemon.cri.start(&id).await.expect("StartContainer");
        assert_eq!(daemon.cri.shell(&id, show).await, shown, "{sub_path}");
        let result = daemon.cri.exec(&id, &["/bin/sh", "-c", "echo x >/volume || echo x >/volume/x"]).await;
        assert_ne!(result.expect("ExecSync").exit_code, 0, "{sub_path}");
    }
    for sub_path in ["missing", "d/../../etc", "/etc", "fifo", "changed/below"] {
        let error = create_with_sub_path(&daemon, &pod, &with("bad"), sub_path).await.expect_err(sub_path);
        assert!(error.message().starts_with("ImageVolumeMountFailed"), "{error:?}");
        assert!(error.message().contains(sub_path), "{error:?}");
        assert_eq!(error.code(), Code::InvalidArgument, "{error:?}");
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_image_of_the_container_itself() {
    let (daemon, pod) = daemon_with_pod().await;
    let config = sleeper("main")
        .with(|config| config.mounts = vec![volume(&busybox(), "/one"), volume(&busybox(), "/one/tmp")]);
    let id = daemon.run(&pod, &config).await.expect("start");
    daemon.cri.shell(&id, "echo mine >/etc/group").await;
    assert_ne!(daemon.cri.output(&id, &["cat", "/one/etc/group"]).await, "mine\n");
    assert_eq!(daemon.cri.shell(&id, "ls /one/tmp/bin/sh").await, "/one/tmp/bin/sh\n");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_image_volumes() {
    let (daemon, pod) = daemon_with_pod().await;
    let good = volume(&busybox(), "/volume");
    for (bad, code, word) in [
        (Mount { readonly: false, ..good.clone() }, Code::InvalidArgument, "readonly"),
        (Mount { host_path: "/etc".into(), ..good.clone() }, Code::InvalidArgument, "host_path"),
        (volume("registry.test/not/pulled", "/volume"), Code::NotFound, "registry.test/not/pulled"),
    ] {
        let config = sleeper("bad").with(|config| config.mounts = vec![bad]);
        let error = daemon.create(&pod, &config).await.expect_err(word);
        assert_eq!(error.code(), code, "{error:?}");
        assert!(error.message().starts_with("ImageVolumeMountFailed"), "{error:?}");
        assert!(error.message().contains(word), "{error:?}");
    }
    daemon.finish().await;
}

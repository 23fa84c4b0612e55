//! Classes of block I/O, which an annotation of the pod names.

use std::fs;

use stave_e2e::cri::*;
use stave_e2e::{Config, Daemon, Options, Pod};
use tonic::Code;

use crate::resources::cgroup;
use crate::{busybox, sleeper};

const KEY: &str = "blockio.resources.beta.kubernetes.io";

/// A block device of the host, and its number.
fn device() -> (String, String) {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let found = fs::read_dir("/dev").expect("/dev").flatten().find_map(|entry| {
        let is = entry.metadata().ok()?;
        let number = (rustix::fs::major(is.rdev()), rustix::fs::minor(is.rdev()));
        // A whole disk: the kernel limits no partition.
        let disk = is.file_type().is_block_device()
            && fs::exists(format!("/sys/block/{}", entry.file_name().display())).ok()?;
        disk.then(|| (entry.path().display().to_string(), format!("{}:{}", number.0, number.1)))
    });
    found.expect("a disk, if only a loop device")
}

async fn daemon(classes: &str) -> Daemon {
    // Beside the daemon's own directory, which it empties at the start.
    let file = std::env::temp_dir().join(format!("stave-blockio-{}.toml", std::process::id()));
    fs::write(&file, classes).expect("classes");
    let drop_in = format!("[cgroup]\nblockio = \"{}\"\n", file.display());
    let daemon = Daemon::with(Options { drop_in, ..Default::default() }).await;
    fs::remove_file(&file).expect("classes");
    daemon.cri.pull(&busybox()).await.expect("PullImage");
    daemon
}

async fn pod(daemon: &Daemon, name: &str, annotations: &[(&str, &str)]) -> Pod {
    let config = stave_e2e::pod(name).with(|config| {
        config.annotations =
            annotations.iter().map(|(key, class)| (format!("{KEY}/{key}"), (*class).into())).collect();
    });
    daemon.run_pod(config).await.expect("RunPodSandbox")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_class_limits_the_containers_of_a_pod() {
    let (disk, number) = device();
    let classes = format!(
        "[slow]\n[[slow.devices]]\npath = \"{disk}\"\nread_bps = 1048576\nwrite_iops = 50\n[free]\n\
         [lost]\n[[lost.devices]]\npath = \"/dev/no-such-disk\"\nread_bps = 1\n"
    );
    let daemon = daemon(&classes).await;
    let limits = |id: &str| {
        let (directory, is_v1) = cgroup(&daemon, id, "blkio");
        let read =
            |file: &str| fs::read_to_string(directory.join(file)).unwrap_or_default().trim().to_owned();
        if is_v1 {
            let files = ["read_bps", "write_bps", "read_iops", "write_iops"];
            files.map(|file| read(&format!("blkio.throttle.{file}_device")))
        } else {
            let line = read("io.max");
            let value = |key: &str| {
                let words =
                    line.split(' ').find_map(|word| word.strip_prefix(key)).filter(|value| *value != "max");
                words.map(|value| format!("{number} {value}")).unwrap_or_default()
            };
            ["rbps=", "wbps=", "riops=", "wiops="].map(value)
        }
    };
    let pod_of_all = pod(&daemon, "all", &[("pod", "slow"), ("container.free", "free")]).await;
    let id = daemon.run(&pod_of_all, &sleeper("main")).await.expect("start");
    let none = String::new();
    assert_eq!(
        limits(&id),
        [format!("{number} 1048576"), none.clone(), none.clone(), format!("{number} 50")]
    );
    let free = daemon.run(&pod_of_all, &sleeper("free")).await.expect("start");
    assert_eq!(limits(&free), [none.clone(), none.clone(), none.clone(), none]);
    // An update leaves them alone.
    let request = UpdateContainerResourcesRequest {
        container_id: id.clone(),
        linux: Some(LinuxContainerResources { cpu_shares: 512, ..Default::default() }),
        ..Default::default()
    };
    daemon.cri.runtime.clone().update_container_resources(request).await.expect("UpdateContainerResources");
    assert_eq!(limits(&id)[0], format!("{number} 1048576"));

    for (name, class, words) in
        [("unknown", "gold", "[\"free\", \"lost\", \"slow\"]"), ("lost", "lost", "/dev/no-such-disk")]
    {
        let pod = pod(&daemon, name, &[("pod", class)]).await;
        let error = daemon.create(&pod, &sleeper("main")).await.expect_err(class);
        assert_eq!(error.code(), Code::FailedPrecondition, "{error:?}");
        assert!(
            error.message().contains(words) && error.message().contains(&format!("{KEY}/pod")),
            "{error:?}"
        );
    }
    daemon.finish().await;
}

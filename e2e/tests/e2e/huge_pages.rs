//! Huge pages: volumes of hugetlbfs, as the kubelet makes them for emptyDir, and their limits.

use std::fs;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use stave_e2e::Config;
use stave_e2e::cri::*;

use crate::container_anatomy::user::{self, inside, mapping};
use crate::{daemon, sleeper};

const PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
const PAGE: u64 = 2 << 20;

/// Some pages more in the node's pool, and a file system of them.
struct HugePages {
    path: PathBuf,
    before: u64,
}

impl HugePages {
    fn new(path: &Path, count: u64) -> HugePages {
        let number = || {
            fs::read_to_string(PAGES).expect("huge pages of 2 MiB").trim().parse::<u64>().expect("a number")
        };
        let before = number();
        fs::create_dir(path).expect("mount point");
        let pages = HugePages { path: path.to_owned(), before };
        fs::write(PAGES, (before + count).to_string()).expect("nr_hugepages");
        assert!(number() >= before + count, "the kernel has no {count} huge pages to give");
        mount(Some("huge"), path, Some("hugetlbfs"), MsFlags::empty(), Some("pagesize=2M"))
            .expect("hugetlbfs");
        pages
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
        let _ = fs::write(PAGES, self.before.to_string());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_and_limits() {
    let daemon = daemon().await;
    let path = daemon.directory().join("huge");
    let pages = HugePages::new(&path, 4);
    let plain = daemon.run_pod(stave_e2e::pod("plain")).await.expect("RunPodSandbox");
    let mapped = daemon.run_pod(user::pod("mapped")).await.expect("RunPodSandbox");
    for (pod, is_mapped) in [(&plain, false), (&mapped, true)] {
        let maps = if is_mapped { mapping() } else { Vec::new() };
        let config = sleeper("main").with(|config| {
            config.mounts = vec![Mount {
                host_path: path.display().to_string(),
                container_path: "/huge".into(),
                uid_mappings: maps.clone(),
                gid_mappings: maps,
                ..Default::default()
            }];
            config.linux.as_mut().unwrap().resources.as_mut().unwrap().hugepage_limits = vec![
                HugepageLimit { page_size: "2MB".into(), limit: PAGE },
                HugepageLimit { page_size: "1GB".into(), limit: 0 },
            ];
        });
        let config = if is_mapped { inside(config) } else { config };
        let id = daemon.run(pod, &config).await.expect("start");
        let script = format!(
            "grep -c ' /huge hugetlbfs ' /proc/mounts; fallocate -l {PAGE} /huge/one && stat -c '%u %s' /huge/one; \
             fallocate -l {PAGE} /huge/two 2>/dev/null || echo over the limit"
        );
        assert_eq!(
            daemon.cri.shell(&id, &script).await,
            format!("1\n0 {PAGE}\nover the limit\n"),
            "{is_mapped}"
        );
        // The limit can be raised while it runs.
        let request = UpdateContainerResourcesRequest {
            container_id: id.clone(),
            linux: Some(LinuxContainerResources {
                hugepage_limits: vec![HugepageLimit { page_size: "2MB".into(), limit: 2 * PAGE }],
                ..Default::default()
            }),
            ..Default::default()
        };
        daemon
            .cri
            .runtime
            .clone()
            .update_container_resources(request)
            .await
            .expect("UpdateContainerResources");
        daemon.cri.shell(&id, &format!("fallocate -l {PAGE} /huge/two && rm /huge/one /huge/two")).await;
    }
    drop(pages);
    daemon.finish().await;
}

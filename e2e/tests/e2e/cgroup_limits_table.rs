//! Each limit: what was asked for, and what the kernel's file says. With --nocapture the table is printed.

use std::path::PathBuf;

use stave_e2e::cri::HugepageLimit;
use stave_e2e::{Config, Daemon, cgroup_directories, systemd_driver};

use crate::{daemon_with_pod, sleeper};

/// What was asked for; the file of cgroup v1 with its value; that of cgroup v2 with its value.
type Row = (&'static str, (&'static str, &'static str), (&'static str, &'static str));

const ROWS: &[Row] = &[
    ("cpu_shares 512", ("cpu.shares", "512"), ("cpu.weight", "59")),
    ("cpu_quota 20000", ("cpu.cfs_quota_us", "20000"), ("cpu.max", "20000 50000")),
    ("cpu_period 50000", ("cpu.cfs_period_us", "50000"), ("cpu.max", "20000 50000")),
    ("cpuset_cpus 0", ("cpuset.cpus", "0"), ("cpuset.cpus", "0")),
    ("cpuset_mems 0", ("cpuset.mems", "0"), ("cpuset.mems", "0")),
    ("memory_limit_in_bytes 64 MiB", ("memory.limit_in_bytes", "67108864"), ("memory.max", "67108864")),
    (
        "memory_swap_limit_in_bytes 96 MiB",
        ("memory.memsw.limit_in_bytes", "100663296"),
        ("memory.swap.max", "33554432"),
    ),
    ("hugepage_limits 2MB: 4 MiB", ("hugetlb.2MB.limit_in_bytes", "4194304"), ("hugetlb.2MB.max", "4194304")),
];

/// `unified`, on pure cgroup v2 only: file, what was asked for, what it says then.
const UNIFIED: &[(&str, &str, &str)] = &[
    ("memory.high", "50331648", "50331648"),
    ("memory.min", "4194304", "4194304"),
    ("memory.low", "8388608", "8388608"),
    ("memory.oom.group", "1", "1"),
    ("pids.max", "33", "33"),
    ("cpu.max.burst", "1000", "1000"),
    ("io.weight", "50", "default 50"),
];

/// [`UNIFIED`], and a limit on the disk where the VM has it.
fn unified_rows() -> Vec<(&'static str, String, String)> {
    let mut rows: Vec<_> =
        UNIFIED.iter().map(|(file, asked, says)| (*file, (*asked).to_owned(), (*says).to_owned())).collect();
    if let Ok(disk) = std::fs::read_to_string("/sys/block/vda/dev") {
        let asked = format!("{} rbps=1048576 wiops=100", disk.trim());
        rows.push(("io.max", asked, format!("{} rbps=1048576 wbps=max riops=max wiops=100", disk.trim())));
    }
    rows
}

/// The container's file of that name, where its hierarchy is; and what it says.
fn read(directories: &[PathBuf], file: &str) -> Option<(PathBuf, String)> {
    directories.iter().map(|directory| directory.join(file)).find_map(|path| {
        let value = std::fs::read_to_string(&path).ok()?;
        Some((path, value.trim().to_owned()))
    })
}

fn row(asked: &str, path: &std::path::Path, value: &str) {
    eprintln!("| {asked} | {} | {value} |", path.file_name().expect("a name").to_string_lossy());
}

#[tokio::test(flavor = "multi_thread")]
async fn each_limit_is_in_its_file() {
    let (daemon, pod) = daemon_with_pod().await;
    let unified = !std::path::Path::new("/sys/fs/cgroup/memory/cgroup.procs").exists();
    let config = sleeper("limited").with(|config| {
        let resources = config.linux.get_or_insert_default().resources.get_or_insert_default();
        resources.cpu_shares = 512;
        resources.cpu_quota = 20_000;
        resources.cpu_period = 50_000;
        resources.cpuset_cpus = "0".into();
        resources.cpuset_mems = "0".into();
        resources.memory_limit_in_bytes = 64 << 20;
        resources.memory_swap_limit_in_bytes = 96 << 20;
        resources.hugepage_limits = vec![HugepageLimit { page_size: "2MB".into(), limit: 4 << 20 }];
        if unified {
            resources.unified =
                unified_rows().into_iter().map(|(file, asked, _)| (file.to_owned(), asked)).collect();
        }
    });
    let id = daemon.run(&pod, &config).await.expect("start");
    eprintln!(
        "\n{}, {} driver\n\n| asked for | file | the kernel's value |\n|---|---|---|",
        if unified { "pure cgroup v2" } else { "hybrid host" },
        if systemd_driver() { "systemd" } else { "cgroupfs" }
    );
    table(&daemon, &pod.id, &id, unified);
    if unified {
        // A cgroup that is idle has no weight, so this is for a container of its own.
        let config = sleeper("idle").with(|config| {
            let resources = config.linux.get_or_insert_default().resources.get_or_insert_default();
            resources.unified = [("cpu.idle".to_owned(), "1".to_owned())].into();
        });
        let id = daemon.run(&pod, &config).await.expect("start");
        let directories = cgroup_directories(&format!("{}/{id}", daemon.pod_cgroup(&pod.id)));
        let (path, value) = read(&directories, "cpu.idle").expect("there is a cpu.idle");
        row("unified cpu.idle: 1", &path, &value);
        assert_eq!(value, "1");
    }
    daemon.finish().await;
}

fn table(daemon: &Daemon, pod: &str, id: &str, unified: bool) {
    let directories = cgroup_directories(&format!("{}/{id}", daemon.pod_cgroup(pod)));
    for (asked, v1, v2) in ROWS {
        let found = [v1, v2].into_iter().find_map(|(file, value)| Some((read(&directories, file)?, value)));
        let Some(((path, value), wanted)) = found else {
            // The only one that kernels may lack, without swap accounting.
            assert_eq!(v2.0, "memory.swap.max", "{asked}: there is neither {} nor {}", v1.0, v2.0);
            eprintln!("| {asked} | | no swap accounting |");
            continue;
        };
        row(asked, &path, &value);
        assert_eq!(value, **wanted, "{asked}: {}", path.display());
    }
    for (file, asked, says) in unified_rows().into_iter().filter(|_| unified) {
        let (path, value) = read(&directories, file).unwrap_or_else(|| panic!("there is no {file}"));
        row(&format!("unified {file}: {asked}"), &path, &value);
        assert_eq!(value, says, "{}", path.display());
    }
}

//! The systemd cgroup driver, and which driver it is. Where systemd is not PID 1 most of this is left out, and says so.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use stave_e2e::cri::{
    CgroupDriver, LinuxContainerResources, RuntimeConfigRequest, UpdateContainerResourcesRequest,
};
use stave_e2e::{
    Config, Cri, Daemon, Options, cgroup_directories, eventually, limit, make_cgroup, pod, remove_cgroup,
    repo_root, systemctl, systemd_driver,
};
use tonic::Code;

use crate::{busybox, daemon, daemon_with_pod, sleeper};

fn systemd(what: &str) -> bool {
    if !systemd_driver() {
        eprintln!("SKIPPED: {what}: needs systemd as PID 1; `hack/vm-tests --systemd` runs this");
    }
    systemd_driver()
}

/// Held by the test that restarts systemd, and by those whose programs would not bear it.
static SYSTEMD: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// A property of a unit, as `systemctl show` prints it. Asked again for a while when there is no answer: a test restarts systemd.
fn show(unit: &str, property: &str) -> String {
    for _ in 0..10 {
        let output = Command::new("systemctl").args(["show", "--value", "-p", property, unit]).output();
        let output = output.expect("systemctl");
        if output.status.success() {
            return String::from_utf8(output.stdout).expect("UTF-8").trim().to_owned();
        }
        std::thread::sleep(Duration::from_millis(500));
    }
    panic!("systemctl show {unit}: no answer");
}

fn read(cgroup: &str, file: &str) -> String {
    let path = cgroup_directories(cgroup)[0].join(file);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())).trim().to_owned()
}

fn limits(cgroup: &str) -> [String; 4] {
    ["memory.max", "cpu.max", "cpu.weight", "cpuset.cpus"].map(|file| read(cgroup, file))
}

fn limited(resources: &mut LinuxContainerResources) {
    resources.memory_limit_in_bytes = 64 << 20;
    (resources.cpu_quota, resources.cpu_period, resources.cpu_shares) = (20_000, 50_000, 512);
    resources.cpuset_cpus = "0".into();
}

/// The driver that the kubelet is told of.
async fn told(daemon: &Daemon) -> CgroupDriver {
    let config = daemon.cri.runtime_config(RuntimeConfigRequest {}).await.expect("RuntimeConfig");
    config.linux.expect("linux").cgroup_driver()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_kubelet_is_told_the_driver_that_is_given_or_found() {
    // sd_booted(3)
    if Path::new("/run/systemd/system").is_dir() && !systemd_driver() {
        eprintln!(
            "SKIPPED: cgroup.driver \"auto\": systemd runs here, and the tests' cgroups are for cgroupfs"
        );
        return;
    }
    let with = |keys: &str| Options {
        image: Some(busybox()),
        drop_in: format!("[cgroup]\n{keys}\n"),
        ..Options::default()
    };
    // Systemd where it is PID 1 on cgroup v2.
    let found = if systemd_driver() { CgroupDriver::Systemd } else { CgroupDriver::Cgroupfs };
    let daemon = Daemon::with(with("driver = \"auto\"")).await;
    assert_eq!(told(&daemon).await, found);
    let pod = daemon.run_pod(pod("auto")).await.expect("RunPodSandbox");
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    let cgroup = format!("{}/{id}", daemon.pod_cgroup(&pod.id));
    assert!(cgroup_directories(&cgroup).iter().any(|dir| dir.is_dir()), "{cgroup}");
    daemon.finish().await;
    let given = Daemon::with(Options::default()).await;
    assert_eq!(told(&given).await, found);
    given.finish().await;
    // Whatever runs as PID 1.
    let cgroupfs = Daemon::with(with("driver = \"cgroupfs\"\nparent = \"/stave-e2e-told\"")).await;
    assert_eq!(told(&cgroupfs).await, CgroupDriver::Cgroupfs);
    cgroupfs.finish().await;
    for dir in cgroup_directories("/stave-e2e-told") {
        let _ = fs::remove_dir(dir);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_is_a_delegated_scope_in_the_kubelets_slice() {
    if !systemd("scopes") {
        return;
    }
    let daemon = daemon().await;
    let slice = daemon.kubelet_parent("scope", "pod1");
    make_cgroup(&slice);
    let config =
        pod("named").with(|config| config.linux.as_mut().expect("linux").cgroup_parent.clone_from(&slice));
    let pod = daemon.run_pod(config).await.expect("RunPodSandbox");
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    let unit = format!("stave-{}.scope", pod.id);
    let scope = format!("{slice}/{unit}");
    for (property, value) in [
        ("ActiveState", "active"),
        ("ControlGroup", scope.as_str()),
        ("Slice", slice.rsplit('/').next().expect("a name")),
        ("Delegate", "yes"),
        ("DefaultDependencies", "no"),
        ("TasksMax", "infinity"),
        ("MemoryMax", "infinity"),
    ] {
        assert_eq!(show(&unit, property), value, "{property}");
    }
    assert!(show(&unit, "Description").contains("/named of Stave at "), "{}", show(&unit, "Description"));
    assert_eq!(read(&scope, "cgroup.procs"), "", "processes are in the leaves only");
    assert_eq!(read(&format!("{scope}/stave-pod"), "cgroup.procs").lines().count(), 1);
    assert!(!read(&format!("{scope}/{id}"), "cgroup.procs").is_empty());
    // An exec has its leaf below, and ends with its descendants; the device filter works in the scope.
    assert_eq!(daemon.cri.shell(&id, "echo alive").await, "alive\n");
    let mknod = daemon.cri.exec(&id, &["/bin/sh", "-c", "mknod /d b 8 0 && : < /d"]).await.expect("ExecSync");
    assert_ne!(mknod.exit_code, 0, "a disk of the node");
    daemon.cri.stop_pod(&pod.id).await.expect("StopPodSandbox");
    assert_eq!(show(&unit, "LoadState"), "not-found", "systemd has forgotten it");
    assert!(cgroup_directories(&slice)[0].exists(), "the slice is the kubelet's");
    daemon.cri.remove_pod(&pod.id).await.expect("RemovePodSandbox");
    remove_cgroup(&slice);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_and_pods_survive_a_reload_and_a_restart_of_systemd() {
    if !systemd("daemon-reload and daemon-reexec") {
        return;
    }
    let _alone = SYSTEMD.lock().await;
    let (daemon, pod_) = daemon_with_pod().await;
    let config = sleeper("main").with(|config| {
        limited(config.linux.get_or_insert_default().resources.get_or_insert_default());
    });
    let id = daemon.run(&pod_, &config).await.expect("start");
    let cgroup = format!("{}/{id}", daemon.pod_cgroup(&pod_.id));
    let asked = ["67108864", "20000 50000", "59", "0"].map(str::to_owned);
    assert_eq!(limits(&cgroup), asked);
    for verb in ["daemon-reload", "daemon-reexec", "daemon-reload"] {
        assert!(systemctl(&[verb]), "{verb}");
        assert_eq!(limits(&cgroup), asked, "{verb}");
        // Another property of the slice makes systemd write it anew.
        let slice = daemon.cgroup_parent();
        assert!(systemctl(&["set-property", "--runtime", &slice[1..], "CPUWeight=77"]));
        assert_eq!(limits(&cgroup), asked, "set-property after {verb}");
        // While it starts anew, and after.
        let other = daemon.run_pod(pod(&format!("after-{verb}-{}", now()))).await.expect("RunPodSandbox");
        daemon.run(&other, &sleeper("main")).await.expect("start");
        daemon.cri.remove_pod(&other.id).await.expect("RemovePodSandbox");
    }
    let update = UpdateContainerResourcesRequest {
        container_id: id.clone(),
        linux: Some(LinuxContainerResources { memory_limit_in_bytes: 96 << 20, ..Default::default() }),
        ..Default::default()
    };
    daemon.cri.runtime.clone().update_container_resources(update).await.expect("UpdateContainerResources");
    assert!(systemctl(&["daemon-reload"]));
    assert_eq!(read(&cgroup, "memory.max"), (96 << 20).to_string());
    assert_eq!(daemon.cri.shell(&id, "echo alive").await, "alive\n");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bus_that_is_killed_is_connected_to_again() {
    if !systemd("a restart of the bus") {
        return;
    }
    let _alone = SYSTEMD.lock().await;
    let daemon = daemon().await;
    let one = daemon.run_pod(pod("one")).await.expect("RunPodSandbox");
    let bus = || show("dbus.service", "MainPID").parse::<i32>().expect("a pid");
    let other = pod("other");
    for turn in 0..3 {
        let pid = bus();
        assert!(pid > 0, "no bus");
        // At once, and while systemd starts it again.
        let kill = async {
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)
                .expect("SIGKILL");
        };
        let ((), run) = tokio::join!(kill, daemon.run_pod(other.clone()));
        let run = run.unwrap_or_else(|e| panic!("{turn}: RunPodSandbox: {e:?}"));
        daemon.run(&run, &sleeper("main")).await.expect("start");
        eventually("a new bus", async || (bus() != pid && bus() > 0).then_some(())).await;
        daemon.cri.remove_pod(&run.id).await.expect("RemovePodSandbox");
    }
    daemon.cri.remove_pod(&one.id).await.expect("RemovePodSandbox");
    daemon.finish().await;
}

/// Pods come and go in a slice that is made with the first of them and goes with the last, while systemd starts anew.
#[tokio::test(flavor = "multi_thread")]
async fn a_slice_comes_and_goes_while_systemd_starts_anew() {
    if !systemd("slices that come and go") {
        return;
    }
    let _alone = SYSTEMD.lock().await;
    let daemon = Arc::new(daemon().await);
    let end = std::time::Instant::now() + Duration::from_secs(20);
    let workers: Vec<_> = (0..4)
        .map(|worker| {
            let daemon = Arc::clone(&daemon);
            tokio::spawn(async move {
                for turn in 0.. {
                    if std::time::Instant::now() > end {
                        break;
                    }
                    let made = daemon.run_pod(pod(&format!("w{worker}-{turn}"))).await;
                    let made = made.unwrap_or_else(|e| panic!("{worker}, {turn}: RunPodSandbox: {e:?}"));
                    daemon.cri.remove_pod(&made.id).await.expect("RemovePodSandbox");
                }
            })
        })
        .collect();
    let anew = tokio::task::spawn_blocking(move || {
        for verb in ["daemon-reexec", "daemon-reload"].iter().cycle() {
            if std::time::Instant::now() > end {
                break;
            }
            assert!(systemctl(&[verb]), "{verb}");
            std::thread::sleep(Duration::from_millis(700));
        }
    });
    for worker in workers {
        worker.await.expect("a worker");
    }
    anew.await.expect("systemctl");
    Arc::into_inner(daemon).expect("the only one").finish().await;
}

fn now() -> u128 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("a clock").as_nanos()
}

#[tokio::test(flavor = "multi_thread")]
async fn scopes_that_belong_to_no_pod_are_ended_at_the_start() {
    if !systemd("leftover scopes") {
        return;
    }
    let _alone = SYSTEMD.lock().await;
    let mut daemon = daemon().await;
    let kept = daemon.run_pod(pod("kept")).await.expect("RunPodSandbox");
    let lost = daemon.run_pod(pod("lost")).await.expect("RunPodSandbox");
    let main = daemon.run(&lost, &sleeper("main")).await.expect("start");
    let unread = daemon.run_pod(pod("unread")).await.expect("RunPodSandbox");
    daemon.kill();
    let records = daemon.directory().join("root/records");
    // A record that can't be read now, nor set aside, as on a disk with errors.
    let path = records.join(format!("pods/{}.json", unread.id));
    let whole = fs::read(&path).expect("a record");
    fs::write(&path, &whole[..whole.len() / 2]).expect("write");
    fs::write(records.join("pods/.broken"), "").expect("write");
    fs::remove_file(records.join(format!("pods/{}.json", lost.id))).expect("the pod's record");
    fs::remove_file(records.join(format!("containers/{main}.json"))).expect("the container's record");
    // Another daemon's, on another root, is none of its business.
    let foreign = format!("stave-foreign{}.scope", std::process::id());
    let mut sleep = Command::new("systemd-run")
        .args([
            "--scope",
            "--unit",
            &foreign,
            "--description",
            "Pod a/b of Stave at /elsewhere",
            "sleep",
            "600",
        ])
        .spawn()
        .expect("systemd-run");
    eventually("the foreign scope", async || (show(&foreign, "ActiveState") == "active").then_some(())).await;
    daemon.restart().await;
    eventually("the end of the lost pod's scope", async || {
        (show(&format!("stave-{}.scope", lost.id), "LoadState") == "not-found").then_some(())
    })
    .await;
    tokio::time::sleep(limit(1)).await;
    for pod in [&kept, &unread] {
        assert_eq!(show(&format!("stave-{}.scope", pod.id), "ActiveState"), "active");
    }
    daemon.kill();
    fs::write(&path, &whole).expect("write");
    fs::remove_file(records.join("pods/.broken")).expect("removal");
    daemon.restart().await;
    assert_eq!(show(&foreign, "ActiveState"), "active");
    sleep.kill().expect("SIGKILL");
    sleep.wait().expect("wait");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parent_in_the_other_drivers_form_is_refused() {
    let daemon = daemon().await;
    let parents: &[&str] = match systemd_driver() {
        true => &["/kubepods/burstable/pod1", "/", "a--b.slice", "/x.slice/a-b.slice", "/a.slice/b.scope"],
        false => &["kubepods-pod1.slice", "/kubepods.slice/kubepods-pod1.slice", "/test.slice"],
    };
    for parent in parents {
        let config =
            pod("bad").with(|config| config.linux.as_mut().expect("linux").cgroup_parent = (*parent).into());
        let error = daemon.run_pod(config).await.expect_err("the other driver's");
        assert_eq!(error.code(), Code::InvalidArgument, "{error:?}");
        for word in ["config.linux.cgroup_parent", parent, "cgroupDriver"] {
            assert!(error.message().contains(word), "{word}: {error:?}");
        }
    }
    daemon.assert_clean().await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bus_that_does_not_answer_is_unavailable_and_leaves_nothing() {
    if !systemd("a silent D-Bus") {
        return;
    }
    let socket = std::env::temp_dir().join(format!("stave-silent-bus-{}", std::process::id()));
    let _ = fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).expect("a socket");
    let bus = ("DBUS_SYSTEM_BUS_ADDRESS".to_owned(), format!("unix:path={}", socket.display()));
    let daemon = Daemon::with(Options { environment: vec![bus], ..Default::default() }).await;
    let config = daemon.with_log_directory(pod("stuck"));
    let error = daemon.cri.run_pod(&config).await.expect_err("no systemd");
    assert_eq!(error.code(), Code::Unavailable, "{error:?}");
    for word in ["starting the pod's scope: starting the scope stave-", "within 20s"] {
        assert!(error.message().contains(word), "{word}: {error:?}");
    }
    // One that hangs up is told at once.
    drop(listener);
    fs::remove_file(&socket).expect("the socket");
    let begin = std::time::Instant::now();
    let error = daemon.cri.run_pod(&config).await.expect_err("no bus");
    assert_eq!(error.code(), Code::Unavailable, "{error:?}");
    assert!(begin.elapsed() < limit(5), "{:?}", begin.elapsed());
    daemon.assert_clean().await;
    daemon.finish().await;
}

/// The packaged unit, with the program and the directories of the test.
struct Unit(String);

impl Unit {
    fn start(daemon: &Daemon, watchdog: &str) -> Self {
        let packaged = fs::read_to_string(repo_root().join("packaging/stave.service")).expect("the unit");
        let command = daemon.command().join(" ");
        assert!(
            packaged.contains("ExecStart=/usr/local/bin/stave serve\n")
                && packaged.contains("WatchdogSec=60\n")
        );
        let text = packaged
            .replace("ExecStart=/usr/local/bin/stave serve\n", &format!("ExecStart={command}\n"))
            .replace("WatchdogSec=60\n", &format!("WatchdogSec={watchdog}\n"));
        let name = format!("stave-e2e-{}.service", std::process::id());
        let path = format!("/run/systemd/system/{name}");
        fs::write(&path, text).expect("the unit");
        let verify = Command::new("systemd-analyze").args(["verify", "--man=no", &path]).output();
        let verify = verify.expect("systemd-analyze");
        let said = String::from_utf8_lossy(&verify.stderr).into_owned();
        assert!(verify.status.success() && !said.contains(&name), "systemd-analyze verify: {said}");
        assert!(systemctl(&["daemon-reload"]) && systemctl(&["start", &name]), "systemctl start {name}");
        Self(name)
    }

    fn show(&self, property: &str) -> String {
        show(&self.0, property)
    }
}

impl Drop for Unit {
    fn drop(&mut self) {
        systemctl(&["stop", &self.0]);
        let _ = fs::remove_file(format!("/run/systemd/system/{}", self.0));
        systemctl(&["daemon-reload"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_outlive_a_restart_of_the_unit_and_its_watchdog() {
    if !systemd("the packaged unit") {
        return;
    }
    let _alone = SYSTEMD.lock().await;
    let mut daemon = daemon().await;
    assert!(daemon.terminate().await.success());
    // A daemon that lives pings twice in this time, also in the VM.
    let watchdog = limit(3).min(Duration::from_secs(12));
    let unit = Unit::start(&daemon, &watchdog.as_secs().to_string());
    // Type=notify: it answers by now.
    let cri = Cri::connect(&daemon.socket(), limit(20)).await.expect("the socket");
    assert!(cri.image(&busybox()).await.expect("ImageStatus").is_some());
    let config = daemon.with_log_directory(pod("unit"));
    let id = cri.run_pod(&config).await.expect("RunPodSandbox");
    let main = cri.create(&id, &sleeper("main"), &config).await.expect("CreateContainer");
    cri.start(&main).await.expect("StartContainer");
    let service = unit.show("ControlGroup");
    let supervisor = read(&format!("{}/stave-pod", daemon.pod_cgroup(&id)), "cgroup.procs");
    assert!(!supervisor.is_empty() && !read(&service, "cgroup.procs").lines().any(|pid| pid == supervisor));
    assert_eq!(unit.show("KillMode"), "process");
    assert_eq!(read_oom_score(&unit.show("MainPID")), "-999");

    assert!(systemctl(&["restart", &unit.0]));
    let cri = Cri::connect(&daemon.socket(), limit(20)).await.expect("the socket");
    assert_eq!(cri.shell(&main, "echo alive").await, "alive\n");
    // Twice its time: the pings come.
    tokio::time::sleep(watchdog * 2).await;
    assert_eq!((unit.show("ActiveState"), unit.show("NRestarts")), ("active".into(), "0".into()));
    // A daemon that hangs is ended and started again, and the pod goes on.
    let pid = nix::unistd::Pid::from_raw(unit.show("MainPID").parse().expect("a pid"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).expect("SIGSTOP");
    let end = std::time::Instant::now() + watchdog * 2 + Duration::from_secs(60);
    while unit.show("NRestarts") == "0" || unit.show("ActiveState") != "active" {
        assert!(
            std::time::Instant::now() < end,
            "the watchdog has not restarted it: {}",
            unit.show("ActiveState")
        );
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let cri = Cri::connect(&daemon.socket(), limit(20)).await.expect("the socket");
    assert_eq!(cri.shell(&main, "echo alive").await, "alive\n");
    drop(unit);
    daemon.restart().await;
    assert_eq!(daemon.cri.shell(&main, "echo alive").await, "alive\n");
    daemon.finish().await;
}

fn read_oom_score(pid: &str) -> String {
    fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).expect("oom_score_adj").trim().to_owned()
}

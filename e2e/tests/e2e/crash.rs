//! Crash drills: daemon, supervisors and inits are killed at random moments, and nothing is lost or left.
//!
//! `STAVE_E2E_SEED` repeats the choices of a run, `STAVE_E2E_SECONDS` sets how long the random drills go on.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use stave_e2e::cri::{ContainerState, ContainerStatusRequest, PodSandboxConfig, PodSandboxState};
use stave_e2e::{Cri, Daemon, Pod, cgroup_directories, eventually, make_cgroup, pod, remove_cgroup};
use tokio::sync::watch;
use tonic::{Code, Status};

use crate::faults::children;
use crate::{daemon, daemon_with_pod, sh, sleeper};

/// Small and repeatable: a linear congruential generator (the constants are Knuth's).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }

    async fn pause(&mut self, most_ms: u64) {
        tokio::time::sleep(Duration::from_millis(self.below(most_ms))).await;
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// How long a drill goes on.
pub(crate) fn seconds() -> u64 {
    number("STAVE_E2E_SECONDS", 40)
}

fn seed() -> u64 {
    let seed = number("STAVE_E2E_SEED", crate::now() as u64 % 1_000_000);
    eprintln!("STAVE_E2E_SEED={seed}");
    seed
}

/// The answer was lost with the daemon; what a daemon answers has another code.
fn is_lost(error: &Status) -> bool {
    matches!(error.code(), Code::Unavailable | Code::Cancelled)
        || ["transport", "h2 protocol", "connection"].iter().any(|word| error.message().contains(word))
}

/// The current daemon's client; it changes with each restart.
#[derive(Clone)]
struct Current(watch::Receiver<Cri>);

impl Current {
    fn cri(&self) -> Cri {
        self.0.borrow().clone()
    }

    /// Repeats a request until it is answered.
    async fn ask<T>(&self, mut request: impl AsyncFnMut(Cri) -> Result<T, Status>) -> Result<T, Status> {
        let end = Instant::now() + stave_e2e::limit(30);
        loop {
            match request(self.cri()).await {
                Err(error) if is_lost(&error) => {
                    assert!(Instant::now() < end, "no answer in time: {error:?}");
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                answer => return answer,
            }
        }
    }
}

/// What a worker knows of a container whose start was acknowledged.
struct Started {
    id: String,
    /// How it ends by itself.
    code: Option<i32>,
}

/// Runs pods until `end`; gives all ids and addresses that it got, and the pods that it left.
async fn worker(
    name: String,
    current: Current,
    end: Instant,
    mut random: Random,
    configure: impl Fn(PodSandboxConfig) -> PodSandboxConfig,
) -> (Vec<String>, Vec<String>) {
    let mut given = Vec::new();
    let mut left = Vec::new();
    for turn in 0.. {
        if Instant::now() > end {
            break;
        }
        let config = configure(pod(&format!("{name}-{turn}")));
        let id = current.ask(async |cri| cri.run_pod(&config).await).await.expect("RunPodSandbox");
        given.push(id.clone());
        let status = current.ask(async |cri| cri.pod(&id).await).await.expect("PodSandboxStatus");
        assert_eq!(status.state(), PodSandboxState::SandboxReady, "an acknowledged pod is ready");
        given.push(status.network.expect("network").ip);
        let pod = Pod { config, id };
        let mut started = Vec::new();
        for number in 0..1 + random.below(3) {
            let container = one_container(&current, &pod, number, &mut random).await;
            given.push(container.id.clone());
            started.push(container);
        }
        random.pause(100).await;
        for container in &started {
            check(&current, container, &mut random).await;
        }
        let pods = current.ask(async |cri| cri.pods(None).await).await.expect("ListPodSandbox");
        assert!(pods.iter().any(|listed| listed.id == pod.id), "an acknowledged pod is listed");
        if random.below(4) == 0 {
            left.push(pod.id);
            continue;
        }
        if random.below(2) == 0 {
            current.ask(async |cri| cri.stop_pod(&pod.id).await).await.expect("StopPodSandbox");
        }
        current.ask(async |cri| cri.remove_pod(&pod.id).await).await.expect("RemovePodSandbox");
        let pods = current.ask(async |cri| cri.pods(None).await).await.expect("ListPodSandbox");
        assert!(pods.iter().all(|listed| listed.id != pod.id), "a removed pod is not listed");
    }
    (given, left)
}

async fn one_container(current: &Current, pod: &Pod, number: u64, random: &mut Random) -> Started {
    let code = (random.below(3) > 0).then(|| random.below(100) as i32);
    let config = match code {
        Some(code) => sh(&format!("c{number}"), &format!("sleep 0.{}; exit {code}", random.below(4))),
        None => sleeper(&format!("c{number}")),
    };
    let id = current.ask(async |cri| cri.create(&pod.id, &config, &pod.config).await).await;
    let id = id.expect("CreateContainer");
    random.pause(20).await;
    match current.ask(async |cri| cri.start(&id).await).await {
        Ok(()) => {}
        // A repeat, when the first one did it.
        Err(error) => {
            assert_eq!(error.code(), Code::FailedPrecondition, "StartContainer: {error:?}");
            let status = current.ask(async |cri| cri.container(&id).await).await.expect("ContainerStatus");
            assert!(status.started_at > 0, "StartContainer: {error:?}: {status:?}");
        }
    }
    Started { id, code }
}

/// Looks at a container, and acts on it.
async fn check(current: &Current, started: &Started, random: &mut Random) {
    let Started { id, code } = started;
    let status = current.ask(async |cri| cri.container(id).await).await.expect("ContainerStatus");
    assert!(status.started_at > 0, "the start was acknowledged: {status:?}");
    match code {
        Some(code) => {
            let end = Instant::now() + stave_e2e::limit(20);
            let status = loop {
                let status = current.ask(async |cri| cri.container(id).await).await.expect("ContainerStatus");
                if status.state() == ContainerState::ContainerExited {
                    break status;
                }
                assert!(Instant::now() < end, "exit lost: {status:?}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            };
            assert_eq!(status.exit_code, *code, "{status:?}");
            assert!(status.finished_at >= status.started_at, "{status:?}");
        }
        None => {
            assert_eq!(status.state(), ContainerState::ContainerRunning, "{status:?}");
            let out =
                current.ask(async |cri| cri.exec(id, &["echo", "alive"]).await).await.expect("ExecSync");
            assert_eq!(out.stdout, b"alive\n");
            if random.below(2) == 0 {
                let timeout = random.below(2) as i64;
                current.ask(async |cri| cri.stop(id, timeout).await).await.expect("StopContainer");
                let status = current.ask(async |cri| cri.container(id).await).await.expect("ContainerStatus");
                assert_eq!(status.state(), ContainerState::ContainerExited, "{status:?}");
                let codes = [0, 137, 143];
                assert!(codes.contains(&status.exit_code), "{status:?}");
            }
        }
    }
    if random.below(3) == 0 {
        current.ask(async |cri| cri.remove(id).await).await.expect("RemoveContainer");
        let error = current.ask(async |cri| cri.container(id).await).await.expect_err("it is removed");
        assert_eq!(error.code(), Code::NotFound, "{error:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_or_left_when_the_daemon_is_killed_at_random() {
    let daemon = daemon().await;
    tokio::task::LocalSet::new().run_until(kill_daemons(daemon, seconds(), |_| {})).await;
}

/// Kills and restarts the daemon for some seconds while pods come and go, and removes them all. `check` looks for what is
/// left in the end.
pub(crate) async fn kill_daemons(mut daemon: Daemon, seconds: u64, check: impl FnOnce(&Daemon)) {
    let seed = seed();
    let mut random = Random(seed);
    let end = Instant::now() + Duration::from_secs(seconds);
    let (sender, receiver) = watch::channel(daemon.cri.clone());
    let logs = daemon.directory().join("logs");
    // Half of them as the kubelet does it: in a cgroup that is there before, and stays.
    let parent = |number: u64| daemon.kubelet_parent("crash", &format!("pod{number}"));
    let cgroups = [parent(1), parent(3)];
    for cgroup in &cgroups {
        make_cgroup(cgroup);
    }
    let workers: Vec<_> = (0..4)
        .map(|number| {
            let (logs, cgroup) = (logs.clone(), parent(number));
            let cgroup = if cgroups.contains(&cgroup) { cgroup } else { String::new() };
            let configure = move |mut config: PodSandboxConfig| {
                let name = config.metadata.clone().unwrap_or_default().name;
                config.linux.get_or_insert_default().cgroup_parent.clone_from(&cgroup);
                config.log_directory = logs.join(name).to_string_lossy().into_owned();
                config
            };
            let random = Random(seed + 1000 * (number + 1));
            tokio::task::spawn_local(worker(
                format!("w{number}"),
                Current(receiver.clone()),
                end,
                random,
                configure,
            ))
        })
        .collect();
    let mut kills = 0;
    while Instant::now() < end {
        random.pause(1200).await;
        daemon.kill();
        kills += 1;
        random.pause(50).await;
        daemon.restart().await;
        sender.send(daemon.cri.clone()).expect("workers");
    }
    let mut left = Vec::new();
    for worker in workers {
        let (given, pods) = worker.await.expect("a worker");
        daemon.remember(given);
        left.extend(pods);
    }
    eprintln!("{kills} kills; {} pods left", left.len());
    let mut listed: Vec<_> =
        daemon.cri.pods(None).await.expect("ListPodSandbox").into_iter().map(|pod| pod.id).collect();
    left.sort();
    listed.sort();
    assert_eq!(listed, left, "the pods that nobody removed, and no others");
    daemon.cri.remove_all().await.expect("removal of all pods");
    let full: Vec<_> = cgroups
        .iter()
        .flat_map(|cgroup| cgroup_directories(cgroup))
        .filter(|dir| children(dir) > 0)
        .map(|dir| {
            fs::read_dir(&dir).expect("cgroup").flatten().map(|entry| entry.path()).collect::<Vec<_>>()
        })
        .map(|paths| paths.into_iter().filter(|path| path.is_dir()).collect::<Vec<_>>())
        .collect();
    for cgroup in &cgroups {
        remove_cgroup(cgroup);
    }
    assert!(full.is_empty(), "left in the kubelet's cgroups: {full:?}");
    check(&daemon);
    daemon.finish().await;
}

/// The supervisor of a pod, by its command line.
pub(crate) fn supervisor(pod: &str) -> Option<Pid> {
    fs::read_dir("/proc").expect("/proc").flatten().find_map(|entry| {
        let pid = entry.file_name().to_str()?.parse::<i32>().ok()?;
        let cmdline = fs::read_to_string(entry.path().join("cmdline")).ok()?;
        (cmdline.starts_with("stave-pod\0") && cmdline.contains(pod)).then(|| Pid::from_raw(pid))
    })
}

/// Waits until a pod is not ready, and its containers are over.
async fn ended(daemon: &Daemon, pod: &Pod) -> BTreeMap<String, i32> {
    eventually("the pod to be not ready", async || {
        let status = daemon.cri.pod(&pod.id).await.expect("PodSandboxStatus");
        (status.state() == PodSandboxState::SandboxNotready).then_some(())
    })
    .await;
    let containers = daemon.cri.containers(None).await.expect("ListContainers");
    let mut codes = BTreeMap::new();
    for container in containers.into_iter().filter(|one| one.pod_sandbox_id == pod.id) {
        let status = daemon.cri.container(&container.id).await.expect("ContainerStatus");
        assert_eq!(status.state(), ContainerState::ContainerExited, "{status:?}");
        codes.insert(status.metadata.expect("metadata").name, status.exit_code);
    }
    codes
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_supervisor_ends_its_pod_and_no_other_and_leaves_nothing() {
    let mut daemon = daemon().await;
    let seed = seed();
    let mut random = Random(seed);
    let other = daemon.run_pod(pod("other")).await.expect("RunPodSandbox");
    let bystander = daemon.run(&other, &sleeper("main")).await.expect("start");
    let end = Instant::now() + Duration::from_secs(seconds() / 4);
    for turn in 0.. {
        if Instant::now() > end {
            break;
        }
        let victim = daemon.run_pod(pod(&format!("victim-{turn}"))).await.expect("RunPodSandbox");
        daemon.run(&victim, &sh("ended", "exit 7")).await.expect("start");
        let done = daemon.cri.containers(None).await.expect("ListContainers");
        let done = done.iter().find(|one| one.pod_sandbox_id == victim.id).expect("it").id.clone();
        daemon.cri.exited(&done).await;
        let main = daemon.run(&victim, &sleeper("main")).await.expect("start");
        let pid = supervisor(&victim.id).expect("supervisor");
        // While containers come and go.
        let (cri, busy) = (daemon.cri.clone(), victim.clone());
        let work = tokio::spawn(async move {
            for number in 0..50 {
                let config = sh(&format!("busy{number}"), "exit 0");
                let Ok(id) = cri.create(&busy.id, &config, &busy.config).await else { return };
                if cri.start(&id).await.is_err() || cri.exec(&id, &["true"]).await.is_err() {
                    return;
                }
            }
        });
        random.pause(150).await;
        let with_daemon = random.below(2) == 0;
        if with_daemon {
            daemon.kill();
        }
        kill(pid, Signal::SIGKILL).expect("SIGKILL");
        if with_daemon {
            daemon.restart().await;
        } else {
            // At the same time as its end is noticed.
            match random.below(4) {
                0 => daemon.cri.remove_pod(&victim.id).await.expect("RemovePodSandbox"),
                1 => daemon.cri.stop(&main, 0).await.expect("StopContainer"),
                2 => daemon.cri.remove(&main).await.expect("RemoveContainer"),
                _ => {}
            }
        }
        work.await.expect("work");
        if daemon.cri.pods(None).await.expect("ListPodSandbox").iter().any(|pod| pod.id == victim.id) {
            let codes = ended(&daemon, &victim).await;
            assert_eq!(codes["ended"], 7, "an exit that was told stays");
            assert!(codes.get("main").is_none_or(|code| *code != 0), "{codes:?}");
            daemon.cri.stop_pod(&victim.id).await.expect("StopPodSandbox");
            daemon.cri.remove_pod(&victim.id).await.expect("RemovePodSandbox");
        }
        assert_eq!(daemon.cri.pods(None).await.expect("ListPodSandbox").len(), 1);
        assert_eq!(daemon.cri.shell(&bystander, "echo alive").await, "alive\n");
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_init_that_is_killed_before_its_start_is_an_exited_container() {
    let (mut daemon, pod) = daemon_with_pod().await;
    for (turn, restart) in [false, true].into_iter().enumerate() {
        let name = format!("doomed{turn}");
        let id = daemon.create(&pod, &sh(&name, "exit 0")).await.expect("CreateContainer");
        let request = ContainerStatusRequest { container_id: id.clone(), verbose: true };
        let info = daemon.cri.container_status(request).await.expect("ContainerStatus").info;
        let info: serde_json::Value = serde_json::from_str(&info["info"]).expect("JSON");
        let pid = Pid::from_raw(info["pid"].as_i64().expect("pid") as i32);
        if restart {
            daemon.kill();
        }
        kill(pid, Signal::SIGKILL).expect("SIGKILL");
        if restart {
            daemon.restart().await;
        }
        let status = daemon.cri.exited(&id).await;
        assert_eq!((status.exit_code, status.started_at), (137, 0), "{status:?}");
        let error = daemon.cri.start(&id).await.expect_err("it is over");
        assert_eq!(error.code(), Code::FailedPrecondition, "{error:?}");
        daemon.cri.remove(&id).await.expect("RemoveContainer");
        // The name is free again.
        let again = daemon.run(&pod, &sh(&name, "exit 3")).await.expect("start");
        assert_eq!(daemon.cri.exited(&again).await.exit_code, 3);
    }
    daemon.finish().await;
}

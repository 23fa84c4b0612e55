//! The life of containers, from create to the acknowledged exit.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::time::{Duration, Instant};

use common::Pod;
use stave_supervisor_proto::v1::container_entry::State;
use stave_supervisor_proto::v1::failure::Kind;
use stave_supervisor_proto::v1::packet::Body;
use stave_supervisor_proto::v1::request::Call;
use stave_supervisor_proto::v1::*;

fn start_call(id: &str) -> Call {
    Call::StartContainer(StartContainer { container_id: id.into() })
}

fn remove_call(id: &str) -> Call {
    Call::RemoveContainer(RemoveContainer { container_id: id.into() })
}

#[test]
fn create_start_exit_acknowledge_remove() {
    let mut pod = Pod::ready();
    let mut plan = pod.plan("c1", &["/bin/sh", "-c", "exit 3"]);
    let user = User { uid: 1000, gid: Some(1001), supplemental_groups: vec![7, 5], ..Default::default() };
    plan.process.as_mut().unwrap().user = Some(user);
    let created = pod.create(plan);
    assert_eq!((created.uid, created.gid, created.groups), (1000, 1001, vec![5, 7, 1001]));
    assert!(pod.pids().contains(&(created.pid as u32)));
    let entry = pod.entry("c1");
    assert_eq!((entry.state(), entry.pid, entry.started_at), (State::Created, created.pid, 0));

    let before =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as i64;
    let started = pod.start("c1");
    assert!(started.started_at > before && started.started_at - before < 10_000_000_000);
    let exit = pod.exit("c1");
    assert_eq!((exit.exit_code, exit.signal, exit.oom_killed, exit.start_error.as_str()), (3, 0, false, ""));
    assert_eq!(exit.started_at, started.started_at);
    assert!(exit.finished_at >= exit.started_at);
    assert_eq!(pod.exit_record("c1").as_ref(), Some(&exit));
    let entry = pod.entry("c1");
    assert_eq!((entry.state(), entry.exit), (State::Exited, Some(exit)));
    assert!(pod.pids().is_empty());

    assert_eq!(pod.fails(start_call("c1")).kind(), Kind::FailedPrecondition);
    pod.done(Pod::stop_call("c1", 15, 1000));
    pod.acknowledge("c1");
    assert_eq!(pod.exit_record("c1"), None);
    pod.acknowledge("c1");
    pod.acknowledge("never-seen");
    pod.remove("c1");
    pod.remove("c1");
    assert!(pod.list().is_empty());
    assert!(pod.log_path("c1").exists(), "the log is the kubelet's to remove");
    assert_eq!(pod.children(), []);
}

#[test]
fn ids_are_checked_and_unique() {
    let mut pod = Pod::ready();
    pod.create(pod.plan("c1", &["/bin/true"]));
    let again = pod.create_call(pod.plan("c1", &["/bin/true"]));
    let refusal = pod.fails(again);
    assert_eq!(refusal.kind(), Kind::FailedPrecondition);
    assert!(refusal.message.contains("\"c1\""));
    for id in ["", "..", "a/b", ".tmp"] {
        let mut plan = pod.plan("c1", &["/bin/true"]);
        plan.container_id = id.into();
        let call = Call::CreateContainer(CreateContainer { plan: Some(plan), ..Default::default() });
        assert_eq!(pod.fails(call).kind(), Kind::InvalidArgument, "{id:?}");
    }
    for call in [
        start_call("nope"),
        Pod::stop_call("nope", 15, 1),
        Call::ReopenLog(ReopenLog { container_id: "nope".into() }),
    ] {
        assert_eq!(pod.fails(call).kind(), Kind::NotFound);
    }
    let call = Call::CreateContainer(CreateContainer::default());
    assert_eq!(pod.fails(call).kind(), Kind::InvalidArgument);
}

#[test]
fn what_can_not_be_created_leaves_nothing() {
    let mut pod = Pod::ready();
    let mut plan = pod.plan("c1", &["/bin/true"]);
    plan.mounts.push(Mount {
        kind: mount::Kind::Bind.into(),
        source: "/no/such/volume".into(),
        destination: "/data".into(),
        ..Default::default()
    });
    let call = pod.create_call(plan);
    let error = pod.fails(call);
    assert!(error.message.contains("/no/such/volume") && error.errno == 2, "{error:?}");
    assert!(pod.list().is_empty());
    assert!(pod.pids().is_empty());
    assert_eq!(pod.children(), []);
    assert!(!pod.log_path("c1").exists());
    assert_eq!(pod.exit_record("c1"), None);

    // A log that can't be opened is found at create as well.
    let plan = pod.plan("c1", &["/bin/true"]);
    let log_path = "/proc/no/such/0.log".into();
    let error = pod.fails(Call::CreateContainer(CreateContainer {
        plan: Some(plan),
        log_path,
        ..Default::default()
    }));
    assert!(error.message.contains("log_path"), "{error:?}");
    assert!(pod.list().is_empty());
    assert!(pod.pids().is_empty());

    pod.create(pod.plan("c1", &["/bin/true"]));
    pod.start("c1");
    assert_eq!(pod.exit("c1").exit_code, 0, "the id can be used");
    pod.assert_silent(Duration::from_millis(50));
}

#[test]
fn a_command_that_can_not_be_executed() {
    let mut pod = Pod::ready();
    let file = pod.dir.path().join("root/bin/no-program");
    std::fs::write(&file, "\u{7f}ELF, but not really").unwrap();
    std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    for (id, command) in [("c1", "/no/such/command"), ("c2", "/bin/no-program")] {
        // Found at create or at start; at start it is also an exit.
        let call = pod.create_call(pod.plan(id, &[command]));
        match pod.call(call) {
            Body::Failure(error) => {
                assert!(error.message.contains(command), "{error:?}");
                assert!(pod.list().iter().all(|entry| entry.container_id != id));
            }
            Body::ContainerCreated(_) => {
                let error = pod.fails(start_call(id));
                assert!(error.message.contains(command) && error.errno != 0, "{error:?}");
                let exit = pod.exit(id);
                assert_eq!((exit.exit_code, exit.signal, exit.started_at), (128, 0, 0));
                assert_eq!(exit.start_error, error.message);
                assert!(exit.finished_at > 0);
                assert_eq!(pod.exit_record(id), Some(exit));
                assert_eq!(pod.entry(id).state(), State::Exited);
            }
            other => panic!("{other:?}"),
        }
        assert!(pod.pids().is_empty());
        pod.remove(id);
    }
    assert_eq!(pod.children(), []);
}

#[test]
fn exits_are_told_until_acknowledged() {
    let mut pod = Pod::ready();
    pod.run("c1", "exit 1");
    let first = pod.exit("c1");
    pod.connect();
    assert_eq!(pod.exit("c1"), first);
    pod.connect();
    assert_eq!(pod.exit("c1"), first);
    pod.acknowledge("c1");
    pod.connect();
    pod.assert_silent(Duration::from_millis(50));
    assert_eq!(pod.entry("c1").exit, Some(first), "known until it is removed");
}

#[test]
fn exits_are_recorded_while_there_is_no_daemon() {
    let mut pod = Pod::ready();
    pod.run("c1", "sleep 0.2; echo done; exit 9");
    drop(pod.disconnect());
    common::wait_for("the exit record", || pod.exit_record("c1").is_some());
    let record = pod.exit_record("c1").unwrap();
    assert_eq!(record.exit_code, 9);
    assert_eq!(pod.log("c1"), [common::line("stdout", "F", "done")]);
    pod.connect();
    assert_eq!(pod.exit("c1"), record);
}

#[test]
fn a_stop_is_one_signal_and_a_deadline() {
    let mut pod = Pod::ready();
    pod.run("c1", "trap 'echo got; n=$((n+1))' TERM; echo ready; while :; do sleep 0.05; [ \"$n\" ] && sleep 0.3 && exit 4$n; done");
    pod.wait_for_output("c1", "ready");
    pod.done(Pod::stop_call("c1", 15, 10_000));
    pod.wait_for_output("c1", "got");
    pod.done(Pod::stop_call("c1", 15, 10_000));
    let exit = pod.exit("c1");
    assert_eq!((exit.exit_code, exit.signal), (41, 0), "a second stop sends no second signal");
}

#[test]
fn a_stop_ends_in_sigkill() {
    let mut pod = Pod::ready();
    pod.run("c1", "trap '' TERM; echo ready; sleep 1000");
    pod.wait_for_output("c1", "ready");
    let start = Instant::now();
    pod.done(Pod::stop_call("c1", 15, 300));
    let exit = pod.exit("c1");
    assert_eq!((exit.exit_code, exit.signal, exit.oom_killed), (137, 9, false));
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(300) && took < Duration::from_secs(3), "{took:?}");
}

#[test]
fn a_second_stop_only_brings_the_deadline_forward() {
    let mut pod = Pod::ready();
    pod.run("c1", "trap '' TERM; echo ready; sleep 1000");
    pod.wait_for_output("c1", "ready");
    let start = Instant::now();
    pod.done(Pod::stop_call("c1", 15, 400));
    pod.done(Pod::stop_call("c1", 15, u64::MAX));
    assert_eq!(pod.exit("c1").exit_code, 137);
    assert!(start.elapsed() < Duration::from_secs(3));

    pod.run("c2", "trap '' TERM; echo ready; sleep 1000");
    pod.wait_for_output("c2", "ready");
    pod.done(Pod::stop_call("c2", 15, 1_000_000));
    // The deadline is the supervisor's: it holds with no daemon there.
    pod.done(Pod::stop_call("c2", 15, 200));
    drop(pod.disconnect());
    common::wait_for("the exit record", || pod.exit_record("c2").is_some());
    pod.connect();
    pod.exit("c1");
    assert_eq!(pod.exit("c2").exit_code, 137);
}

#[test]
fn stops_at_once_and_with_any_signal() {
    let mut pod = Pod::ready();
    pod.run("c1", "trap '' TERM; sleep 1000");
    let start = Instant::now();
    assert_eq!(pod.kill("c1").exit_code, 137);
    assert!(start.elapsed() < Duration::from_secs(1));

    pod.run("c2", "trap 'exit 5' 37; echo ready; while :; do sleep 0.05; done");
    pod.wait_for_output("c2", "ready");
    pod.done(Pod::stop_call("c2", 37, 10_000)); // SIGRTMIN+3
    assert_eq!(pod.exit("c2").exit_code, 5);

    pod.create(pod.plan("c3", &["/bin/true"]));
    pod.done(Pod::stop_call("c3", 15, 10_000));
    let exit = pod.exit("c3");
    assert_eq!((exit.exit_code, exit.started_at), (137, 0), "a created container has nothing to wait for");
    for signal in [0, -1, 65] {
        assert_eq!(pod.fails(Pod::stop_call("c3", signal, 1)).kind(), Kind::InvalidArgument);
    }
}

#[test]
fn signals_of_the_supervisor_are_not_inherited() {
    let mut pod = Pod::ready();
    let mut plan = pod.plan("c1", &["/bin/cat", "/proc/self/status", "/proc/self/oom_score_adj"]);
    plan.process.as_mut().unwrap().oom_score_adj = Some(100);
    pod.create(plan);
    pod.start("c1");
    pod.exit("c1");
    let log: Vec<String> = pod.log("c1").into_iter().map(|line| line.content).collect();
    for name in ["SigBlk", "SigIgn"] {
        assert!(log.contains(&format!("{name}:\t{}", "0".repeat(16))), "{name}: {log:?}");
    }
    assert_eq!(log.last().unwrap(), "100");
}

#[test]
fn a_running_container_can_not_be_removed_and_a_created_one_can() {
    let mut pod = Pod::ready();
    pod.run("c1", "sleep 1000");
    assert_eq!(pod.fails(remove_call("c1")).kind(), Kind::FailedPrecondition);
    pod.create(pod.plan("c2", &["/bin/true"]));
    pod.remove("c2");
    assert_eq!(pod.list().len(), 1);
    pod.assert_silent(Duration::from_millis(50));
    assert_eq!(pod.exit_record("c2"), None);
    pod.kill("c1");
    assert!(pod.exit_record("c1").is_some());
    pod.remove("c1");
    assert!(pod.exit_record("c1").is_none(), "what is removed is known");
    assert!(pod.list().is_empty());
}

#[test]
fn removed_or_stopped_while_it_is_created() {
    let mut pod = Pod::ready();
    for round in 0..10 {
        let id = format!("c{round}");
        let call = pod.create_call(pod.plan(&id, &["/bin/true"]));
        let create = pod.send(call, &[]);
        let remove = pod.send(remove_call(&id), &[]);
        // The create may have been the faster one.
        let mut created = false;
        let mut replies = Vec::new();
        while replies.len() < 2 {
            let packet = pod.receive(common::LIMIT).unwrap();
            match packet.body.unwrap() {
                Body::ContainerCreated(_) => created = true,
                Body::Failure(error) => assert!(!created && error.message.contains("removed"), "{error:?}"),
                Body::Done(_) => assert_eq!(packet.seq, remove),
                other => panic!("{other:?}"),
            }
            replies.push(packet.seq);
        }
        replies.sort();
        assert_eq!(replies, [create, remove]);
        assert!(pod.list().is_empty());
        assert!(pod.pids().is_empty());
    }
    assert_eq!(pod.children(), []);
}

#[test]
fn containers_share_the_pod_s_pid_namespace() {
    let mut pod = Pod::greeted();
    pod.set_up(SetUpPod { pod_pid_namespace: true, ..Default::default() });
    for id in ["c1", "c2"] {
        let script = "readlink /proc/self/ns/pid; echo pid $$; (sleep 1000 &); echo ready; sleep 1000";
        let mut plan = pod.plan(id, &["/bin/sh", "-c", script]);
        plan.pid_namespace = PidNamespace::Pod.into();
        pod.create(plan);
        pod.start(id);
        pod.wait_for_output(id, "ready");
    }
    let (first, second) = (pod.log("c1"), pod.log("c2"));
    assert_eq!(first[0], second[0], "one namespace");
    assert_ne!(first[1], second[1], "one of them is not pid 1");
    let own = std::fs::read_link("/proc/self/ns/pid").unwrap();
    assert_ne!(first[0].content, own.to_str().unwrap());
    assert!(pod.children().iter().all(|(_, state)| *state != 'Z'), "{:?}", pod.children());
    // The end of one takes its own processes along, and no others.
    let others = pod.pids().len() / 2;
    pod.kill("c1");
    common::wait_for("the end of c1's processes", || pod.pids().len() == others);
    assert_eq!(pod.entry("c2").state(), State::Running);
}

#[test]
fn the_first_container_that_asks_for_the_pod_s_pid_namespace_gets_it_made() {
    let mut pod = Pod::ready();
    let mut plan = pod.plan("c1", &["/bin/sh", "-c", "echo pid $$; sleep 1000"]);
    plan.pid_namespace = PidNamespace::Pod.into();
    pod.create(plan);
    pod.start("c1");
    pod.wait_for_output("c1", "pid");
    assert_ne!(pod.log("c1")[0].content, "pid 1");
    // Its init is no container, and in none of their cgroups: it must go with the supervisor by itself.
    let comm = |pid: u32| std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let children = pod.children();
    let (init, _) = children.into_iter().find(|(pid, _)| comm(*pid) == "pod-init\n").expect("the pod's init");
    pod.kill_supervisor();
    // Its new parent reaps it when it gets to it.
    let state = |pid: u32| std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    common::wait_for("the end of the pod's init", || state(init).is_empty() || state(init).contains(") Z "));
}

#[test]
fn orphans_on_the_node_s_pid_namespace_are_reaped_and_killed() {
    let mut pod = Pod::ready();
    let script = "(sleep 0.3 & sleep 0.1 & (sleep 0.2 &)); (sleep 1000 &); echo ready; sleep 1; exit 6";
    let mut plan = pod.plan("c1", &["/bin/sh", "-c", script]);
    plan.pid_namespace = PidNamespace::Node.into();
    pod.create(plan);
    pod.start("c1");
    pod.wait_for_output("c1", "ready");
    common::wait_for("an orphan that came to the supervisor", || pod.children().len() > 1);
    assert_eq!(pod.exit("c1").exit_code, 6);
    common::wait_for("the end of all", || pod.pids().is_empty() && pod.children().is_empty());
}

#[test]
fn many_short_containers_lose_no_exit() {
    let mut pod = Pod::ready();
    let count = 30;
    for number in 0..count {
        let id = format!("c{number}");
        pod.create(pod.plan(&id, &["/bin/sh", "-c", &format!("echo {number}; exit {number}")]));
    }
    for number in 0..count {
        pod.send(start_call(&format!("c{number}")), &[]);
    }
    let (mut started, mut exits) = (0, Vec::new());
    while started < count || exits.len() < count as usize {
        match pod.receive(common::LIMIT).unwrap().body.unwrap() {
            Body::ContainerStarted(_) => started += 1,
            Body::ContainerExit(exit) => exits.push((exit.container_id, exit.exit_code)),
            other => panic!("{other:?}"),
        }
    }
    exits.sort();
    let mut expected: Vec<_> = (0..count).map(|number| (format!("c{number}"), number)).collect();
    expected.sort();
    assert_eq!(exits, expected);
    assert!((0..count).all(|number| pod.log(&format!("c{number}"))[0].content == number.to_string()));
    assert_eq!(pod.children(), []);
}

#[test]
fn the_oom_killer_is_told_apart() {
    let mut pod = Pod::ready();
    let mut plan = pod.plan("c1", &["/bin/dd", "if=/dev/zero", "of=/dev/null", "bs=200M", "count=1"]);
    let memory = MemoryCgroup::new(&pod, &mut plan, 20 << 20);
    pod.create(plan);
    pod.start("c1");
    let exit = pod.exit("c1");
    assert_eq!((exit.exit_code, exit.oom_killed), (137, true));
    drop(memory);

    let mut plan = pod.plan("c2", &["/bin/sh", "-c", "echo $$; sleep 1000"]);
    let _memory = MemoryCgroup::new(&pod, &mut plan, 20 << 20);
    pod.create(plan);
    pod.start("c2");
    let exit = pod.kill("c2");
    assert_eq!((exit.exit_code, exit.oom_killed), (137, false), "a SIGKILL of ours");

    let script = "dd if=/dev/zero of=/dev/null bs=200M count=1; echo $?; sleep 1000";
    let mut plan = pod.plan("c3", &["/bin/sh", "-c", script]);
    let _memory = MemoryCgroup::new(&pod, &mut plan, 20 << 20);
    pod.create(plan);
    pod.start("c3");
    pod.wait_for_output("c3", "137");
    let exit = pod.kill("c3");
    assert_eq!(
        (exit.exit_code, exit.oom_killed),
        (137, false),
        "only a child was killed for memory, long ago"
    );
}

/// A memory limit for a container, in whichever hierarchy has the controller.
struct MemoryCgroup(Option<std::path::PathBuf>);

impl MemoryCgroup {
    fn new(pod: &Pod, plan: &mut Plan, limit: u64) -> Self {
        let cgroup = plan.cgroup.as_mut().unwrap();
        let v1 = std::path::Path::new("/sys/fs/cgroup/memory");
        if v1.join("memory.limit_in_bytes").exists() {
            let name = format!("{}-{}", pod.cgroup.file_name().unwrap().to_str().unwrap(), plan.container_id);
            let dir = v1.join(name);
            std::fs::create_dir(&dir).unwrap();
            std::fs::write(dir.join("memory.limit_in_bytes"), limit.to_string()).unwrap();
            cgroup.oom_file = dir.join("memory.oom_control").to_str().unwrap().into();
            cgroup.v1.push(V1Hierarchy { name: "memory".into(), dir: dir.to_str().unwrap().into() });
            return Self(Some(dir));
        }
        let root = common::cgroup2_mount();
        for dir in [&root, &pod.cgroup] {
            std::fs::write(dir.join("cgroup.subtree_control"), "+memory").unwrap();
        }
        std::fs::write(format!("{}/memory.max", cgroup.v2_dir), limit.to_string()).unwrap();
        cgroup.oom_file = format!("{}/memory.events", cgroup.v2_dir);
        Self(None)
    }
}

impl Drop for MemoryCgroup {
    fn drop(&mut self) {
        let Some(dir) = &self.0 else { return };
        let deadline = Instant::now() + common::LIMIT;
        while dir.exists() && Instant::now() < deadline {
            if let Ok(pids) = std::fs::read_to_string(dir.join("cgroup.procs")) {
                // After a failed assertion the container still runs: the pod's own cleanup comes later.
                for pid in pids.lines() {
                    let _ = std::fs::write("/sys/fs/cgroup/memory/cgroup.procs", pid);
                }
            }
            let _ = std::fs::remove_dir(dir);
        }
    }
}

/// What holds an output open delays the news, never the record.
#[test]
fn an_exit_is_recorded_before_the_output_is_drained() {
    let mut pod = Pod::ready();
    let created = pod.run("c1", "sleep 1000");
    let held = std::fs::OpenOptions::new().write(true).open(format!("/proc/{}/fd/1", created.pid)).unwrap();
    pod.done(Pod::stop_call("c1", 15, 0));
    let told_after = Instant::now() + Duration::from_secs(1);
    while pod.exit_record("c1").is_none() && Instant::now() < told_after - Duration::from_millis(300) {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(pod.exit_record("c1").expect("a record").exit_code, 137);
    pod.assert_silent(Duration::ZERO);
    let exit = pod.exit("c1");
    assert_eq!(pod.exit_record("c1"), Some(exit));
    drop(held);
}

/// A disk that is full keeps no exit from being told, and the record follows.
#[test]
fn an_exit_record_that_fails_is_written_later() {
    let mut pod = Pod::ready();
    let (exits, away) = (pod.dir.path().join("exits"), pod.dir.path().join("away"));
    std::fs::rename(&exits, &away).unwrap();
    pod.run("c1", "exit 3");
    let exit = pod.exit("c1");
    assert_eq!(exit.exit_code, 3);
    assert_eq!(pod.exit_record("c1"), None);
    std::fs::rename(&away, &exits).unwrap();
    common::wait_for("the exit record", || pod.exit_record("c1").is_some());
    assert_eq!(pod.exit_record("c1"), Some(exit));
    pod.acknowledge("c1");
    assert_eq!(pod.exit_record("c1"), None);
    pod.assert_silent(Duration::from_millis(1200));
    assert_eq!(pod.exit_record("c1"), None, "acknowledged: it is not written again");
}

/// The init must live to see its program; then the signal is for that.
#[test]
fn a_stop_while_a_container_starts_waits_for_execve() {
    let mut pod = Pod::ready();
    let mut plan = pod.plan("c1", &["/bin/sleep", "1000"]);
    plan.pid_namespace = PidNamespace::Pod.into();
    pod.create(plan);
    let freezer = pod.cgroup.join("c1/cgroup.freeze");
    std::fs::write(&freezer, "1").unwrap();
    let events = pod.cgroup.join("c1/cgroup.events");
    common::wait_for("the freezer", || std::fs::read_to_string(&events).unwrap().contains("frozen 1"));
    let start = pod.send(start_call("c1"), &[]);
    pod.done(Pod::stop_call("c1", 15, 20_000));
    pod.assert_silent(Duration::from_millis(50));
    std::fs::write(&freezer, "0").unwrap();
    let reply = pod.reply(start);
    assert!(matches!(reply, Body::ContainerStarted(_)), "{reply:?}");
    let exit = pod.exit("c1");
    assert_eq!((exit.exit_code, exit.signal, exit.start_error.as_str()), (143, 15, ""));
}

/// A cgroup in a v1 hierarchy, which goes with this.
struct V1(std::path::PathBuf);

impl V1 {
    fn make() -> Self {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let line = mounts.lines().find(|line| line.contains(" - cgroup ") && line.contains("pids"));
        let mount =
            line.expect("this test needs a host with the v1 controller pids").split(' ').nth(4).unwrap();
        let dir = std::path::Path::new(mount).join(format!("stave-test-v1-{}", std::process::id()));
        std::fs::create_dir(&dir).unwrap();
        Self(dir)
    }

    fn is_empty(&self) -> bool {
        std::fs::read_to_string(self.0.join("cgroup.procs")).unwrap().is_empty()
    }
}

impl Drop for V1 {
    fn drop(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(5);
        while std::fs::remove_dir(&self.0).is_err() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Nothing but its cgroup tells what belongs to a container that shares its PID namespace.
#[test]
fn without_cgroup2_no_process_outlives_its_container() {
    let v1 = V1::make();
    let mut pod = Pod::ready();
    let hierarchy = V1Hierarchy { name: "pids".into(), dir: v1.0.to_str().unwrap().into() };
    for (id, script, code) in [("c1", "", 0), ("c2", "; exec sleep 1000", 137)] {
        let script = format!("busybox setsid sleep 1000 & (sleep 1000 &) ; sleep 0.3 {script}");
        let mut plan = pod.plan(id, &["/bin/sh", "-c", &script]);
        plan.cgroup = Some(Cgroup { v1: vec![hierarchy.clone()], ..Default::default() });
        plan.pid_namespace = PidNamespace::Pod.into();
        pod.create(plan);
        pod.start(id);
        let exit = if code == 0 { pod.exit(id) } else { pod.kill(id) };
        assert_eq!(exit.exit_code, code);
        common::wait_for("the end of all", || v1.is_empty());
    }
}

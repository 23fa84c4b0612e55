//! Further processes in a running container.

use std::fs;
use std::path::{Path, PathBuf};

use stave_executor::{Entrances, ExecTarget, Init, Report};
use stave_supervisor_proto::v1::User;
use stave_supervisor_proto::v1::failure::Kind;

use crate::Case;
use crate::bundle::{Bundle, Pipes, Status, field, kill, process, stdio, wait, wait_for};

pub const CASES: &[Case] = &[
    ("sees_the_container", sees_the_container),
    ("descriptors_and_capabilities", descriptors_and_capabilities),
    ("user_and_directory", user_and_directory),
    ("failures", failures),
    ("background_children_die_with_a_kill", background_children_die_with_a_kill),
    ("background_children_may_stay", background_children_may_stay),
    ("a_leaf_that_is_like_new_is_used_again", a_leaf_that_is_like_new_is_used_again),
    ("oom_score_adj_is_the_processs_own", oom_score_adj_is_the_processs_own),
    ("the_supervisor_stays_where_it_is", the_supervisor_stays_where_it_is),
    ("cve_2016_9962_hidden_from_tracers", cve_2016_9962_hidden_from_tracers),
    ("cve_2016_9962_no_way_to_the_host_for_a_tracer", cve_2016_9962_no_way_to_the_host_for_a_tracer),
    ("after_the_end", after_the_end),
];

fn running(bundle: &mut Bundle) -> (Init, Pipes) {
    let (init, pipes) = bundle.sh("echo mark > /tmp/mark; echo up; sleep 1000").start(None).unwrap();
    assert_eq!(pipes.line(), "up");
    (init, pipes)
}

fn sees_the_container() {
    let mut bundle = Bundle::new();
    let (init, _pipes) = running(&mut bundle);
    let script = "cat /tmp/mark; readlink /proc/self/ns/mnt; readlink /proc/self/ns/cgroup; readlink /proc/self/ns/pid; \
        ps -o pid,args; cat /proc/self/cgroup";
    let output = bundle.exec(&init, &process(&["sh", "-c", script])).unwrap();
    assert_eq!(output.status, Status::Exited(0), "{}", output.stderr);
    let mut lines = output.stdout.lines();
    assert_eq!(lines.next(), Some("mark"));
    for ns in ["mnt", "cgroup", "pid"] {
        let inits = fs::read_link(format!("/proc/{}/ns/{ns}", init.pid())).unwrap();
        assert_eq!(lines.next(), inits.to_str());
    }
    assert!(output.stdout.contains("sleep 1000"), "{}", output.stdout);
    // In a leaf of its own on cgroup2, in the container's cgroup on v1.
    for line in output
        .stdout
        .lines()
        .filter(|l| l.split(':').count() == 3 && l.starts_with(|c: char| c.is_ascii_digit()))
    {
        assert!(line.ends_with(if line.starts_with("0::") { "/exec-1" } else { ":/" }), "{line}");
    }
    let output = bundle.exec(&init, &process(&["sh", "-c", "exit 3"])).unwrap();
    assert_eq!(output.status, Status::Exited(3));
    kill(&init);
}

/// CVE-2022-29162 and CVE-2024-21626 for further processes.
fn descriptors_and_capabilities() {
    let leak = fs::File::open("/").unwrap();
    rustix::io::fcntl_setfd(&leak, rustix::io::FdFlags::empty()).unwrap();
    let mut bundle = Bundle::new();
    let (init, _pipes) = running(&mut bundle);
    let output = bundle.exec(&init, &process(&["ls", "/proc/self/fd"])).unwrap();
    assert_eq!(output.stdout, "0\n1\n2\n3\n");
    let output = bundle.exec(&init, &process(&["cat", "/proc/self/status"])).unwrap();
    assert_eq!(field(&output.stdout, "CapInh"), "0000000000000000");
    assert_eq!(field(&output.stdout, "CapBnd"), "00000000a80425fb");
    for n in 3..=20 {
        let mut bad = process(&["pwd"]);
        bad.cwd = format!("/proc/self/fd/{n}");
        assert_eq!(bundle.exec(&init, &bad).err().unwrap().stage, "cwd");
    }
    kill(&init);
}

fn user_and_directory() {
    let mut bundle = Bundle::new();
    let (init, _pipes) = running(&mut bundle);
    let mut command = process(&["sh", "-c", "id -u; id -g; pwd; echo $HOME"]);
    command.user = Some(User { name: "alice".into(), ..User::default() });
    command.cwd = "/made/now".into();
    assert_eq!(bundle.exec(&init, &command).unwrap().stdout, "1000\n1001\n/made/now\n/home/alice\n");
    command.user = Some(User { name: "1002".into(), ..User::default() });
    assert_eq!(bundle.exec(&init, &command).err().unwrap().kind, Kind::InvalidArgument);
    kill(&init);
}

fn failures() {
    let mut bundle = Bundle::new();
    let (init, _pipes) = running(&mut bundle);
    let error = bundle.exec(&init, &process(&["nope"])).err().unwrap();
    assert_eq!(error.message, "\"nope\": executable file not found in $PATH");
    assert_eq!(error.kind, Kind::InvalidArgument);
    let (stdio, _output) = stdio();
    let target = ExecTarget {
        init: init.pidfd(),
        cgroup: bundle.plan.cgroup.as_ref().unwrap(),
        entrances: None,
        name: "../x",
    };
    assert_eq!(
        stave_executor::exec(&target, &process(&["true"]), stdio).unwrap_err().kind,
        Kind::InvalidArgument
    );
    kill(&init);
}

/// Runs a shell that leaves a child behind, up to its end.
fn with_background_child(bundle: &Bundle, init: &Init) -> stave_executor::Exec {
    let (stdio, pipes) = stdio();
    let target = ExecTarget {
        init: init.pidfd(),
        cgroup: bundle.plan.cgroup.as_ref().unwrap(),
        entrances: None,
        name: "bg",
    };
    let command = process(&["sh", "-c", "setsid sleep 1000 > /dev/null 2>&1 & echo left"]);
    let mut exec = stave_executor::exec(&target, &command, stdio).unwrap();
    while let Some(control) = exec.control() {
        wait_for(control);
        assert!(!matches!(exec.read_report().unwrap(), Some(Report::Failed(_))));
    }
    assert_eq!(pipes.line(), "left");
    assert_eq!(wait(exec.pidfd()), Status::Exited(0));
    exec
}

fn procs(dir: &Path) -> usize {
    fs::read_to_string(dir.join("cgroup.procs")).unwrap().lines().count()
}

fn background_children_die_with_a_kill() {
    let mut bundle = Bundle::new();
    let (init, _pipes) = running(&mut bundle);
    let exec = with_background_child(&bundle, &init);
    let leaf = exec.cgroup_dir().unwrap().to_owned();
    assert_eq!(procs(&leaf), 1);
    exec.kill().unwrap();
    // Its parent in there is the container's init, a shell, which reaps it some time.
    let start = std::time::Instant::now();
    while procs(&leaf) > 0 && start.elapsed().as_secs() < 5 {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    exec.remove_cgroup().unwrap();
    assert!(!leaf.exists());
    kill(&init);
}

fn background_children_may_stay() {
    let mut bundle = Bundle::new();
    let (init, _pipes) = running(&mut bundle);
    let exec = with_background_child(&bundle, &init);
    let container = Path::new(&bundle.plan.cgroup.as_ref().unwrap().v2_dir).to_owned();
    let before = procs(&container);
    exec.remove_cgroup().unwrap();
    exec.remove_cgroup().unwrap();
    assert!(!exec.cgroup_dir().unwrap().exists());
    assert_eq!(procs(&container), before + 1);
    kill(&init);
}

fn a_leaf_that_is_like_new_is_used_again() {
    let mut bundle = Bundle::new();
    let (init, _pipes) = running(&mut bundle);
    let cgroup = bundle.plan.cgroup.clone().unwrap();
    let entrances = Entrances::open(&cgroup).unwrap();
    let count = std::cell::Cell::new(0);
    let run = |script: &str| {
        count.set(count.get() + 1);
        let (stdio, pipes) = stdio();
        let name = count.get().to_string();
        let target =
            ExecTarget { init: init.pidfd(), cgroup: &cgroup, entrances: Some(&entrances), name: &name };
        let exec = stave_executor::exec(&target, &process(&["sh", "-c", script]), stdio).unwrap();
        let leaf = exec.cgroup_dir().unwrap().to_owned();
        (exec, pipes, leaf)
    };
    let finish = |(exec, pipes, leaf): (stave_executor::Exec, Pipes, PathBuf), disturb: &dyn Fn(&Path)| {
        let output = pipes.read().0;
        assert_eq!(wait(exec.pidfd()), Status::Exited(0));
        disturb(&leaf);
        let left = exec.give_back_cgroup(&entrances);
        (leaf, output, left)
    };
    let nothing = |_: &Path| {};
    let (first, output, left) = finish(run("cat /proc/self/cgroup"), &nothing);
    left.unwrap();
    assert!(output.contains("0::/exec-1\n"), "{output}");
    let second = run("cat /proc/self/cgroup");
    // Two at once: the second has its own, of which only one is kept.
    let third = run("true");
    assert_eq!(second.2, first);
    assert!(third.2.ends_with("exec-3"), "{:?}", third.2);
    let (_, output, left) = finish(second, &nothing);
    left.unwrap();
    assert!(output.contains("0::/exec-1\n"), "{output}");
    finish(third, &nothing).2.unwrap();
    assert!(first.exists() && !first.with_file_name("exec-3").exists());

    // What was killed would kill the next one: it is removed.
    let (exec, _pipes, leaf) = run("sleep 1000");
    assert_eq!(leaf, first);
    exec.kill().unwrap();
    assert_eq!(wait(exec.pidfd()), Status::Signalled(9));
    exec.give_back_cgroup(&entrances).unwrap();
    assert!(!first.exists());
    let (leaf, _, left) = finish(run("true"), &nothing);
    left.unwrap();
    assert!(leaf.ends_with("exec-5"));

    // One in which somebody lives on.
    let container = Path::new(&cgroup.v2_dir);
    let before = procs(container);
    let (leaf, _, left) = finish(run("setsid sleep 1000 > /dev/null 2>&1 & true"), &nothing);
    left.unwrap();
    assert!(!leaf.exists());
    assert_eq!(procs(container), before + 1);

    // What a container with a writable cgroup2 mount may have done.
    let (leaf, _, left) = finish(run("true"), &|leaf| fs::write(leaf.join("cgroup.freeze"), "1").unwrap());
    left.unwrap();
    assert!(!leaf.exists());
    let (leaf, _, left) = finish(run("true"), &|leaf| fs::create_dir(leaf.join("below")).unwrap());
    left.unwrap_err();
    fs::remove_dir(leaf.join("below")).unwrap();
    fs::remove_dir(leaf).unwrap();
    assert_eq!(finish(run("echo on"), &nothing).1, "on\n");
    kill(&init);
}

/// It is set on the supervisor for the moment of the clone.
fn oom_score_adj_is_the_processs_own() {
    let own = || fs::read_to_string("/proc/self/oom_score_adj").unwrap();
    let before = own();
    let mut bundle = Bundle::new();
    let (init, _pipes) = running(&mut bundle);
    let mut command = process(&["cat", "/proc/self/oom_score_adj"]);
    for (wanted, found) in [(Some(700), "700\n"), (Some(1000), "1000\n"), (None, "0\n")] {
        command.oom_score_adj = wanted;
        assert_eq!(bundle.exec(&init, &command).unwrap().stdout, found);
        assert_eq!(own(), before);
    }
    command.args = vec!["nope".into()];
    command.oom_score_adj = Some(500);
    bundle.exec(&init, &command).err().unwrap();
    assert_eq!(own(), before);
    kill(&init);
}

fn the_supervisor_stays_where_it_is() {
    let namespaces = || {
        ["mnt", "pid", "pid_for_children", "cgroup", "net"]
            .map(|ns| fs::read_link(format!("/proc/self/ns/{ns}")).unwrap())
    };
    let before = namespaces();
    let mut bundle = Bundle::new();
    let (init, _pipes) = running(&mut bundle);
    bundle.exec(&init, &process(&["true"])).unwrap();
    assert_eq!(namespaces(), before);
    kill(&init);
}

/// CVE-2016-9962: nothing of the process can be reached from the container before its execve.
fn cve_2016_9962_hidden_from_tracers() {
    let mut bundle = Bundle::new();
    // The watcher has the container's rights (no CAP_SYS_PTRACE) and looks for descriptors, the root and
    // the working directory of each new process.
    let script = "echo up; while :; do for p in /proc/[0-9]*; do case $p in /proc/1|/proc/$$) ;; \
        *) r=$(readlink $p/exe) && case $r in *busybox) ;; *) echo LEAK $p $r ;; esac ;; esac; done; done";
    let (init, pipes) = bundle.sh(script).start(None).unwrap();
    assert_eq!(pipes.line(), "up");
    for _ in 0..40 {
        bundle.exec(&init, &process(&["true"])).unwrap();
    }
    kill(&init);
    let (stdout, _) = pipes.read();
    assert_eq!(stdout, "");
}

/// The same with CAP_SYS_PTRACE, which reaches even what is not dumpable: no process in the container's
/// PID namespace ever has the host's root, or the supervisor's descriptors.
fn cve_2016_9962_no_way_to_the_host_for_a_tracer() {
    let mut bundle = Bundle::new();
    let leak = fs::File::open(bundle.dir.path()).unwrap();
    rustix::io::fcntl_setfd(&leak, rustix::io::FdFlags::empty()).unwrap();
    let all = bundle.process().capabilities.as_mut().unwrap();
    (all.bounding, all.effective, all.permitted) = (u64::MAX, u64::MAX, u64::MAX);
    let host = bundle.dir.path().to_str().unwrap().to_owned();
    let script = format!(
        "echo up; seen=0; while test ! -e /tmp/stop; do for p in /proc/[0-9]*; do case $p in /proc/1|/proc/$$) ;; \
         *) seen=1; test -e $p/root{host} && echo ROOT $p; for f in $p/fd/*; do \
         case $(readlink $f) in {host}*) echo FD $f ;; esac; done ;; esac; done; done; echo seen $seen"
    );
    let (init, pipes) = bundle.sh(&script).start(None).unwrap();
    assert_eq!(pipes.line(), "up");
    for _ in 0..100 {
        bundle.exec(&init, &process(&["true"])).unwrap();
    }
    bundle.exec(&init, &process(&["touch", "/tmp/stop"])).unwrap();
    let output = pipes.collect(&init);
    assert_eq!(output.stdout, "seen 1\n");
}

fn after_the_end() {
    let mut bundle = Bundle::new();
    let (init, pipes) = bundle.sh("true").start(None).unwrap();
    let target = ExecTarget {
        init: init.pidfd(),
        cgroup: bundle.plan.cgroup.as_ref().unwrap(),
        entrances: None,
        name: "late",
    };
    pipes.read();
    wait(init.pidfd());
    let (stdio, _output) = stdio();
    let error = stave_executor::exec(&target, &process(&["true"]), stdio).unwrap_err();
    assert_eq!(error.kind, Kind::FailedPrecondition, "{error}");
    assert!(!Path::new(&target.cgroup.v2_dir).join("exec-late").exists());
}

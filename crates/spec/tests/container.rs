//! Whole containers: what reaches the specification and the plan.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::*;
use oci_spec::runtime::LinuxNamespaceType as Type;
use stave_cri_proto::v1 as cri;
use stave_spec::{AppArmor, Code, ContainerSpec, Seccomp, exec_process};
use stave_supervisor_proto::v1::PidNamespace;

const AT: &str = "config.linux.security_context";

fn namespaces(spec: &ContainerSpec) -> Vec<(Type, bool)> {
    let linux = spec.oci.linux().as_ref().unwrap();
    let all = linux.namespaces().as_ref().unwrap();
    all.iter().map(|ns| (ns.typ(), ns.path().is_some())).collect()
}

fn options(network: i32, pid: i32, ipc: i32) -> Option<cri::NamespaceOption> {
    Some(cri::NamespaceOption { network, pid, ipc, ..Default::default() })
}

#[test]
fn a_plain_container() {
    let spec = spec_of(|c| c.config.tty = true);
    let plan = &spec.plan;
    assert_eq!(plan.container_id, "c1");
    let root = plan.root.as_ref().unwrap();
    assert_eq!((root.lower_dirs.len(), root.upper_dir.as_str(), root.read_only), (2, "/c1/upper", false));
    assert_eq!(root.lower_dirs[0], "/layers/2");
    assert_eq!(plan.cgroup.as_ref().unwrap().v2_dir, "/sys/fs/cgroup/c1");
    assert!(plan.cgroup_namespace);
    let process = plan.process.as_ref().unwrap();
    assert_eq!(process.args, ["/bin/true"]);
    assert_eq!(process.env[1..], ["TERM=xterm", "HOSTNAME=web-0"]);
    assert_eq!((process.cwd.as_str(), process.terminal, process.no_new_privileges), ("/", true, false));
    assert_eq!(process.oom_score_adj, Some(0));
    let caps = process.capabilities.unwrap();
    assert_eq!((caps.effective.count_ones(), caps.inheritable, caps.ambient), (14, 0, 0));
    assert!(process.rlimits.is_empty() && process.seccomp_filter.is_empty());
    assert!(process.user.as_ref().unwrap().merge_image_groups);
    assert_eq!((spec.stop_signal, spec.stop_signal_cri), (15, cri::Signal::Sigterm));
    assert_eq!(spec.log_path.unwrap().to_str(), Some("/var/log/pods/web/main/0.log"));
}

#[test]
fn the_specification_survives_json() {
    let spec = spec_of(|c| c.context().readonly_rootfs = true);
    let json = serde_json::to_string(&spec.oci).unwrap();
    let back: oci_spec::runtime::Spec = serde_json::from_str(&json).unwrap();
    assert_eq!(back, spec.oci);
    // Nothing of the library's defaults.
    assert!(!json.contains("youki") && !json.contains("rlimits") && !json.contains("maskedPaths"));
}

#[test]
fn namespace_modes() {
    for (mode, want) in [
        (None, PidNamespace::Pod),
        (Some(0), PidNamespace::Pod),
        (Some(1), PidNamespace::Container),
        (Some(2), PidNamespace::Node),
    ] {
        let spec = spec_of(|c| c.context().namespace_options = mode.and_then(|pid| options(0, pid, 0)));
        assert_eq!(spec.plan.pid_namespace(), want);
        let pid = namespaces(&spec).into_iter().find(|(kind, _)| *kind == Type::Pid);
        let path = match want {
            PidNamespace::Pod | PidNamespace::Target => Some((Type::Pid, true)),
            PidNamespace::Container => Some((Type::Pid, false)),
            PidNamespace::Node => None,
        };
        assert_eq!(pid, path);
    }
    let pod = spec_of(|_| {});
    let want = [
        (Type::Mount, false),
        (Type::Pid, true),
        (Type::Ipc, true),
        (Type::Uts, true),
        (Type::Network, true),
        (Type::Cgroup, false),
    ];
    assert_eq!(namespaces(&pod), want);
    let host = spec_of(|c| {
        c.pod_context().namespace_options = options(2, 2, 2);
        c.context().namespace_options = options(2, 2, 2);
    });
    assert_eq!(namespaces(&host), [(Type::Mount, false), (Type::Cgroup, false)]);
}

#[test]
fn bad_namespace_modes() {
    let userns = |mode, uids: usize| {
        let map = cri::IdMapping { host_id: 65536, container_id: 0, length: 65536 };
        let maps = vec![map; uids];
        let options = cri::UserNamespace { mode, uids: maps.clone(), gids: maps };
        Some(cri::NamespaceOption { userns_options: Some(options), ..Default::default() })
    };
    let target = Some(cri::NamespaceOption { target_id: "x".into(), ..Default::default() });
    for (bad, code, field) in [
        (options(0, 3, 0), Code::InvalidArgument, "target_id"),
        (options(0, 4, 0), Code::InvalidArgument, "pid"),
        (options(1, 0, 0), Code::InvalidArgument, "network"),
        (options(3, 0, 0), Code::InvalidArgument, "network"),
        (options(0, 0, 1), Code::InvalidArgument, "ipc"),
        (options(2, 0, 0), Code::FailedPrecondition, "network"),
        (options(0, 0, 2), Code::FailedPrecondition, "ipc"),
        (target, Code::InvalidArgument, "target_id"),
        (userns(0, 1), Code::InvalidArgument, "userns_options"),
        (userns(0, 0), Code::InvalidArgument, "userns_options.uids"),
        (userns(0, 2), Code::InvalidArgument, "userns_options.uids"),
        (userns(1, 1), Code::InvalidArgument, "userns_options.mode"),
        (userns(3, 1), Code::InvalidArgument, "userns_options.mode"),
        (userns(2, 1), Code::InvalidArgument, "userns_options"),
    ] {
        let got = error_of(|c| c.context().namespace_options = bad.clone());
        assert_eq!(got, (code, format!("{AT}.namespace_options.{field}")), "{bad:?}");
    }
    spec_of(|c| c.context().namespace_options = userns(2, 0));
}

#[test]
fn pid_of_another_container() {
    let spec = spec_of(|c| {
        let options = cri::NamespaceOption { target_id: "c0".into(), ..options(0, 3, 0).unwrap_or_default() };
        c.context().namespace_options = Some(options);
    });
    assert_eq!(spec.plan.pid_namespace(), PidNamespace::Target);
    assert_eq!(spec.plan.pid_target, "c0");
}

#[test]
fn privileged() {
    assert_eq!(
        error_of(|c| c.context().privileged = true),
        (Code::FailedPrecondition, format!("{AT}.privileged"))
    );
    let spec = spec_of(|c| {
        c.privileged();
        c.context().masked_paths = vec!["/proc/kcore".into()];
        c.context().readonly_paths = vec!["/proc/sys".into()];
        c.context().seccomp = Some(cri::SecurityProfile::default());
    });
    assert!(spec.plan.masked_paths.is_empty() && spec.plan.readonly_paths.is_empty());
    assert!(!spec.plan.cgroup_namespace);
    let caps = spec.plan.process.unwrap().capabilities.unwrap();
    assert_eq!((caps.effective.count_ones(), caps.inheritable, caps.ambient), (41, 0, 0));
}

#[test]
fn masked_and_readonly_paths() {
    let spec = spec_of(|c| {
        c.context().masked_paths = vec!["/proc/kcore".into(), "/proc//keys/".into()];
        c.context().readonly_paths = vec!["/proc/sys".into()];
    });
    assert_eq!(spec.plan.masked_paths, ["/proc/kcore", "/proc/keys"]);
    assert_eq!(spec.plan.readonly_paths, ["/proc/sys"]);
    for bad in ["", "proc", "/", "/proc/../etc", "/\0"] {
        let got = error_of(|c| c.context().masked_paths = vec![bad.into()]);
        assert_eq!(got, (Code::InvalidArgument, format!("{AT}.masked_paths[0]")), "{bad:?}");
        let got = error_of(|c| c.context().readonly_paths = vec!["/ok".into(), bad.into()]);
        assert_eq!(got, (Code::InvalidArgument, format!("{AT}.readonly_paths[1]")), "{bad:?}");
    }
}

#[test]
fn security_profiles() {
    let runtime_default = Some(cri::SecurityProfile::default());
    let local = Some(cri::SecurityProfile { profile_type: 2, localhost_ref: "localhost/web".into() });
    assert_eq!(spec_of(|_| {}).seccomp, Seccomp::Unconfined);
    assert_eq!(spec_of(|c| c.context().seccomp = runtime_default.clone()).seccomp, Seccomp::RuntimeDefault);
    assert_eq!(
        error_of(|c| c.context().seccomp = local.clone()),
        (Code::InvalidArgument, format!("{AT}.seccomp.localhost_ref"))
    );
    let file = Some(cri::SecurityProfile { profile_type: 2, localhost_ref: "/srv/p.json".into() });
    assert_eq!(
        spec_of(|c| c.context().seccomp = file.clone()).seccomp,
        Seccomp::Localhost { field: format!("{AT}.seccomp.localhost_ref"), path: "/srv/p.json".into() }
    );
    let privileged = spec_of(|c| {
        c.privileged();
        c.context().seccomp = file.clone();
    });
    assert_eq!(privileged.seccomp, Seccomp::Unconfined);
    let unconfined = spec_of(|c| c.context().apparmor = runtime_default.clone());
    assert_eq!(unconfined.plan.process.unwrap().apparmor_profile, "");
    for (profile, want) in [(&None, "stave-default"), (&runtime_default, "stave-default"), (&local, "web")] {
        let confined = spec_of(|c| {
            c.apparmor = AppArmor::On;
            c.context().apparmor = profile.clone();
        });
        let process = confined.oci.process().as_ref().unwrap();
        assert_eq!(process.apparmor_profile().as_deref(), Some(want));
        // An exec takes it from the same plan.
        let exec = exec_process(confined.plan.process.as_ref().unwrap(), &["x".into()], false);
        assert_eq!(
            (confined.plan.process.unwrap().apparmor_profile, exec.apparmor_profile),
            (want.into(), want.into())
        );
    }
    assert_eq!(
        error_of(|c| c.context().apparmor = local.clone()),
        (Code::FailedPrecondition, format!("{AT}.apparmor"))
    );
    for (set, selinux, level, want) in [
        (true, false, "s0:c1,c2", None),
        (true, true, "s0:c1,c2", None),
        (true, true, "", None),
        (true, false, "nonsense", Some(Code::InvalidArgument)),
        (false, true, "", None),
    ] {
        let mut case = Case { selinux, ..Case::default() };
        let options = cri::SeLinuxOption { level: level.into(), ..Default::default() };
        case.context().selinux_options = set.then_some(options);
        assert_eq!(case.run().err().map(|e| e.code), want, "{selinux} {level}");
    }
}

#[test]
fn limits_of_a_container() {
    let with = |change: fn(&mut cri::LinuxContainerResources), v2| {
        let mut case = Case { v2, ..Case::default() };
        change(case.config.linux.get_or_insert_default().resources.get_or_insert_default());
        case
    };
    let spec = with(|r| (r.memory_limit_in_bytes, r.cpu_shares, r.oom_score_adj) = (1 << 20, 512, -5), true)
        .run()
        .unwrap();
    assert_eq!((spec.resources.memory_limit, spec.resources.cpu_shares), (Some(1 << 20), Some(512)));
    assert_eq!(spec.plan.process.unwrap().oom_score_adj, Some(-5));
    let oci = spec.oci.linux().as_ref().unwrap().resources().as_ref().unwrap();
    assert_eq!(oci.memory().unwrap().limit(), Some(1 << 20));
    let unified =
        |r: &mut cri::LinuxContainerResources| drop(r.unified.insert("memory.high".into(), "1".into()));
    assert!(with(unified, true).run().is_ok());
    assert_eq!(with(unified, false).error().0, Code::FailedPrecondition);
    let swap = with(|r| r.memory_swap_limit_in_bytes = 1, true);
    assert_eq!(swap.error().1, "config.linux.resources.memory_swap_limit_in_bytes");
}

#[test]
fn cve_2026_53488() {
    // Annotations of pod, container and image stay out of the specification's.
    let spec = spec_of(|c| {
        c.pod.annotations.insert("io.kubernetes.cri.sandbox-id".into(), "evil".into());
        c.config.annotations.insert("io.kubernetes.cri.container-type".into(), "sandbox".into());
        c.config.labels.insert("run.oci.hooks".into(), "/bin/sh".into());
        c.config.image.as_mut().unwrap().annotations.insert("x".into(), "evil".into());
        c.config.image.as_mut().unwrap().user_specified_image = "busybox".into();
    });
    let annotations = spec.oci.annotations().clone().unwrap();
    let mut all: Vec<_> = annotations.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    all.sort_unstable();
    assert_eq!(
        all,
        [
            ("io.kubernetes.cri.container-name", "main"),
            ("io.kubernetes.cri.container-type", "container"),
            ("io.kubernetes.cri.image-name", "busybox"),
            ("io.kubernetes.cri.sandbox-id", "p1"),
            ("io.kubernetes.cri.sandbox-name", "web"),
            ("io.kubernetes.cri.sandbox-namespace", "default"),
            ("io.kubernetes.cri.sandbox-uid", "u1"),
        ]
    );
    assert!(spec.oci.hooks().is_none());
}

#[test]
fn exec_takes_after_the_container() {
    let spec = spec_of(|c| {
        c.context().run_as_username = "web".into();
        c.context().no_new_privs = true;
        c.config.working_dir = "/app".into();
    });
    let args = vec!["ls".to_owned()];
    let mut plan = spec.plan.clone();
    let process = plan.process.as_mut().unwrap();
    (process.seccomp_filter, process.seccomp_flags) = (vec![6; 8], 2);
    let exec = exec_process(plan.process.as_ref().unwrap(), &args, true);
    assert_eq!((exec.seccomp_filter.as_slice(), exec.seccomp_flags), ([6; 8].as_slice(), 2));
    let init = spec.plan.process.clone().unwrap();
    assert_eq!((&exec.user, &exec.capabilities, &exec.cwd), (&init.user, &init.capabilities, &init.cwd));
    assert!(exec.no_new_privileges && exec.terminal);
    assert_eq!(exec.args, args);
    assert_eq!(exec.env.iter().filter(|e| *e == "TERM=xterm").count(), 1);
    assert_eq!(exec_process(spec.plan.process.as_ref().unwrap(), &args, false).env, init.env);
    let own_term = spec_of(|c| c.image.env = vec!["TERM=vt100".into()]);
    let exec = exec_process(own_term.plan.process.as_ref().unwrap(), &args, true);
    assert_eq!(exec.env.iter().filter(|e| e.starts_with("TERM=")).collect::<Vec<_>>(), ["TERM=vt100"]);
}

#[test]
fn errors_name_the_field_and_the_value() {
    assert_eq!(error_of(|c| c.config.metadata = None).1, "config.metadata");
    assert_eq!(error_of(|c| c.config.metadata = Some(Default::default())).1, "config.metadata.name");
    assert_eq!(error_of(|c| c.config.log_path = "../x".into()).1, "config.log_path");
    let mut case = Case::default();
    case.config.working_dir = "a\nb".into();
    let error = case.run().unwrap_err();
    assert_eq!(error.to_string(), "config.working_dir: value \"a\\nb\": must be an absolute path");
    case.config.working_dir = "é".repeat(500);
    assert!(case.run().unwrap_err().to_string().len() < 400);
}

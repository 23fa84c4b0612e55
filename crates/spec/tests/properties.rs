//! Arbitrary requests: an answer or an error, never a panic, and nothing of one container in another.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::Case;
use proptest::collection::{hash_map, vec};
use proptest::prelude::*;
use stave_cri_proto::v1 as cri;
use stave_spec::{AppArmor, log_path, resolv_conf, signal, validate_pod};

/// Text that means something somewhere, and text that means nothing.
fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        Just(String::new()),
        "[a-z0-9./:=_-]{0,12}",
        "(/[a-z.]{0,3}){0,4}",
        any::<String>(),
        prop::sample::select(vec![
            "/dev",
            "/srv/data",
            "ALL",
            "KILL",
            "runtime/default",
            "1:2",
            "SIGTERM",
            "s0:c1,c2",
            "/dev/kvm",
            "rwm",
            "0-3"
        ])
        .prop_map(str::to_owned),
    ]
}

fn small() -> impl Strategy<Value = i32> {
    prop_oneof![0..4i32, any::<i32>()]
}

fn number() -> impl Strategy<Value = i64> {
    prop_oneof![-2..4i64, 0..70_000i64, any::<i64>()]
}

prop_compose! {
    fn mounts()(paths in vec((text(), text(), small(), any::<[bool; 3]>(), any::<bool>()), 0..4)) -> Vec<cri::Mount> {
        paths.into_iter().map(|(container_path, host_path, propagation, [ro, rro, image], sub)| cri::Mount {
            container_path, host_path, propagation, readonly: ro, recursive_read_only: rro,
            image: image.then(cri::ImageSpec::default),
            image_sub_path: if sub { "x".into() } else { String::new() },
            ..Default::default()
        }).collect()
    }
}

prop_compose! {
    fn context()(
        names in vec(text(), 10), numbers in vec(number(), 4), modes in vec(small(), 9),
        sets in any::<[bool; 8]>(), lists in (vec(text(), 0..3), vec(text(), 0..3), vec(text(), 0..3)),
    ) -> cri::LinuxContainerSecurityContext {
        let id = |on: bool, value| on.then_some(cri::Int64Value { value });
        let profile = |i: usize| cri::SecurityProfile { profile_type: modes[i], localhost_ref: names[i].clone() };
        #[allow(deprecated)]
        cri::LinuxContainerSecurityContext {
            run_as_user: id(sets[0], numbers[0]),
            run_as_group: id(sets[1], numbers[1]),
            run_as_username: names[3].clone(),
            supplemental_groups: numbers[2..].to_vec(),
            supplemental_groups_policy: modes[3],
            privileged: sets[2],
            seccomp: sets[3].then(|| profile(0)),
            apparmor: sets[4].then(|| profile(1)),
            seccomp_profile_path: names[4].clone(),
            apparmor_profile: names[5].clone(),
            capabilities: Some(cri::Capability {
                add_capabilities: lists.0.clone(), drop_capabilities: lists.1.clone(),
                add_ambient_capabilities: lists.2,
            }),
            masked_paths: lists.0,
            readonly_paths: lists.1,
            namespace_options: sets[5].then(|| cri::NamespaceOption {
                network: modes[4], pid: modes[5], ipc: modes[6], target_id: names[6].clone(),
                userns_options: sets[6].then(|| cri::UserNamespace { mode: modes[7], ..Default::default() }),
            }),
            selinux_options: sets[7].then(|| cri::SeLinuxOption { level: names[7].clone(), ..Default::default() }),
            ..Default::default()
        }
    }
}

prop_compose! {
    fn case()(
        context in context(), mounts in mounts(), texts in vec(text(), 12), numbers in vec(number(), 7),
        envs in vec((text(), vec(any::<u8>(), 0..6)), 0..4), image in (vec(text(), 0..3), vec(text(), 0..3), vec(text(), 0..3)),
        unified in hash_map(text(), text(), 0..2), flags in any::<[bool; 6]>(), stop in 0..70i32,
    ) -> Case {
        let mut case = Case { v2: flags[0], apparmor: if flags[1] { AppArmor::On } else { AppArmor::Off }, selinux: flags[2], ..Case::default() };
        let pod = case.pod_context();
        pod.privileged = flags[3];
        case.config.command = if flags[4] { vec![texts[0].clone()] } else { vec![] };
        case.config.working_dir = texts[1].clone();
        case.config.log_path = texts[2].clone();
        case.config.envs = envs.into_iter().map(|(key, value)| cri::KeyValue { key, value }).collect();
        case.config.mounts = mounts;
        case.config.stop_signal = stop;
        if flags[5] {
            case.config.devices = vec![cri::Device {
                container_path: texts[3].clone(), host_path: texts[4].clone(), permissions: texts[5].clone(),
            }];
        }
        let linux = case.config.linux.get_or_insert_default();
        linux.security_context = Some(context);
        linux.resources = Some(cri::LinuxContainerResources {
            cpu_period: numbers[0], cpu_quota: numbers[1], cpu_shares: numbers[2], memory_limit_in_bytes: numbers[3],
            memory_swap_limit_in_bytes: numbers[4], oom_score_adj: numbers[5], cpuset_cpus: texts[6].clone(),
            cpuset_mems: texts[7].clone(), unified, ..Default::default()
        });
        case.image.entrypoint = image.0;
        case.image.env = image.1;
        case.image.volumes = image.2;
        case.image.user = texts[8].clone();
        case.image.stop_signal = texts[9].clone();
        case.image.working_dir = texts[10].clone();
        case
    }
}

/// Changes that leave a request valid: each alone hits its checks, all together hardly ever pass.
fn valid_or_not() -> impl Strategy<Value = Case> {
    (case(), 0..8usize).prop_map(|(wild, part)| {
        let mut case = Case::default();
        let linux = wild.config.linux.unwrap_or_default();
        match part {
            0 => case.config.mounts = wild.config.mounts,
            1 => case.config.linux.get_or_insert_default().security_context = linux.security_context,
            2 => case.config.linux.get_or_insert_default().resources = linux.resources,
            3 => case.config.envs = wild.config.envs,
            4 => case.config.devices = wild.config.devices,
            5 => case.image = wild.image,
            6 => case.config.log_path = wild.config.log_path,
            _ => case.config.working_dir = wild.config.working_dir,
        }
        case
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_request_panics(case in prop_oneof![case(), valid_or_not()]) {
        let privileged = case.config.linux.as_ref().and_then(|l| l.security_context.as_ref()).is_some_and(|c| c.privileged);
        match case.run() {
            Ok(spec) => {
                let plan = &spec.plan;
                let process = plan.process.as_ref().unwrap();
                prop_assert!(!process.args.is_empty() && process.cwd.starts_with('/'));
                prop_assert!(!process.args.iter().chain(&process.env).any(|s| s.contains('\0')));
                prop_assert!(process.env.iter().all(|e| e.find('=').is_some_and(|i| i > 0)));
                let clean = |path: &str| path.starts_with('/') && path != "/" && !path.split('/').any(|p| p == "..");
                prop_assert!(plan.mounts.iter().all(|m| clean(&m.destination)));
                prop_assert!(plan.devices.iter().all(|d| clean(&d.path)));
                prop_assert!(plan.directories.iter().chain(&plan.masked_paths).all(|p| clean(p)));
                let user = process.user.as_ref().unwrap();
                prop_assert!(user.uid <= i32::MAX as u32 && user.gid.is_none_or(|g| g <= i32::MAX as u32));
                prop_assert!(user.name.is_empty() || !user.name.bytes().all(|b| b.is_ascii_digit()));
                prop_assert!(!privileged || case.pod.linux.as_ref().unwrap().security_context.as_ref().unwrap().privileged);
                prop_assert!((1..=64).contains(&spec.stop_signal));
                if let Some(path) = &spec.log_path {
                    prop_assert!(path.starts_with("/var/log/pods/web"));
                    prop_assert!(!path.components().any(|c| c == std::path::Component::ParentDir));
                }
            }
            Err(error) => {
                let text = error.to_string();
                prop_assert!(!error.field.is_empty() && !error.message.is_empty());
                prop_assert!(!text.chars().any(char::is_control), "{text:?}");
            }
        }
    }

    // CVE-2021-21334
    #[test]
    fn cve_2021_21334(keys in vec("[A-Z]{1,8}", 1..8), secret in "[a-z]{24}") {
        let mut first = Case::default();
        first.image.env = vec!["SHARED=1".into()];
        let second = first.clone();
        first.config.envs = keys.iter().map(|k| cri::KeyValue { key: k.clone(), value: secret.clone().into_bytes() }).collect();
        let alone = second.run().unwrap();
        // Side by side, from the same image.
        let (with, without) = std::thread::scope(|scope| {
            let with = scope.spawn(|| first.run().unwrap());
            let without = scope.spawn(|| second.run().unwrap());
            (with.join().unwrap(), without.join().unwrap())
        });
        prop_assert!(with.plan.process.as_ref().unwrap().env.iter().any(|e| e.contains(&secret)));
        prop_assert_eq!(&without.plan, &alone.plan);
        let all = format!("{:?}{:?}", without.plan, without.oci);
        prop_assert!(!all.contains(&secret));
    }

    #[test]
    fn no_pod_panics(
        texts in vec(text(), 8), modes in vec(small(), 6), sysctls in hash_map(text(), text(), 0..3), id in number(),
    ) {
        let mut case = Case::default();
        case.pod.hostname = texts[0].clone();
        case.pod.log_directory = texts[1].clone();
        let dns = cri::DnsConfig { servers: vec![texts[2].clone()], searches: vec![texts[3].clone()], options: vec![] };
        case.pod.port_mappings = vec![cri::PortMapping { protocol: modes[0], container_port: modes[1], host_port: modes[2], host_ip: texts[4].clone() }];
        case.pod.labels.insert(texts[5].clone(), texts[6].clone());
        case.pod_context().run_as_user = Some(cri::Int64Value { value: id });
        case.pod_context().namespace_options = Some(cri::NamespaceOption { network: modes[3], pid: modes[4], ipc: modes[5], ..Default::default() });
        let _ = resolv_conf(Some(&dns), "host");
        case.pod.dns_config = Some(dns);
        case.pod.linux.as_mut().unwrap().sysctls = sysctls;
        if validate_pod(&case.pod).is_ok() {
            for (name, value) in stave_spec::default_sysctls(&case.pod) {
                prop_assert!(!name.contains('/') && !value.contains('\n'));
            }
        }
        let _ = signal(&texts[7]);
    }

    #[test]
    fn logs_stay_in_their_directory(path in prop_oneof![text(), "[a./]{0,12}"]) {
        if let Ok(Some(file)) = log_path("/logs", &path) {
            prop_assert!(file.starts_with("/logs") && file != std::path::Path::new("/logs"));
            prop_assert!(file.components().all(|c| c != std::path::Component::ParentDir));
        }
    }
}

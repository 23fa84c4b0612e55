//! What a filter answers, with the numbers of x86_64 unless something else is said: read 0, write 1, mkdir 83.

use stave_seccomp::{Action, Arch, SeccompError, compile_for, parse};

use crate::machine::{
    AARCH64, ALLOW, ARM, Call, I386, KILL, X86_64, code, errno, filter, filter_for, run, target,
};

fn ask(json: &str, nr: u32, args: [u64; 6]) -> u32 {
    run(&filter(json).program, Call { arch: X86_64, nr, args })
}

/// A profile that allows all but what `rules` say.
fn allowing(rules: &str) -> String {
    format!(r#"{{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{rules}]}}"#)
}

/// A profile that allows nothing but what `rules` say.
fn refusing(rules: &str) -> String {
    format!(r#"{{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{rules}]}}"#)
}

#[test]
fn every_action_as_default_and_as_rule() {
    for (name, number, want) in [
        ("SCMP_ACT_KILL", "", Action::KillThread),
        ("SCMP_ACT_KILL_THREAD", "", Action::KillThread),
        ("SCMP_ACT_KILL_PROCESS", "", Action::KillProcess),
        ("SCMP_ACT_TRAP", "", Action::Trap),
        ("SCMP_ACT_ERRNO", "", Action::Errno(1)),
        ("SCMP_ACT_ERRNO", "13", Action::Errno(13)),
        ("SCMP_ACT_ERRNO", "0", Action::Errno(0)),
        ("SCMP_ACT_TRACE", "", Action::Trace(1)),
        ("SCMP_ACT_TRACE", "65535", Action::Trace(65535)),
        ("SCMP_ACT_LOG", "", Action::Log),
        ("SCMP_ACT_ALLOW", "", Action::Allow),
    ] {
        let number = if number.is_empty() { "null" } else { number };
        let default = format!(r#"{{"defaultAction": "{name}", "defaultErrnoRet": {number}}}"#);
        assert_eq!(ask(&default, 83, [0; 6]), code(want), "{name}");
        let other = if want == Action::Allow { "SCMP_ACT_LOG" } else { "SCMP_ACT_ALLOW" };
        let rule = format!(
            r#"{{"defaultAction": "{other}", "syscalls": [{{"names": ["mkdir"], "action": "{name}", "errnoRet": {number}}}]}}"#
        );
        assert_eq!(ask(&rule, 83, [0; 6]), code(want), "{name}");
        assert_eq!(ask(&rule, 82, [0; 6]), if want == Action::Allow { code(Action::Log) } else { ALLOW });
        assert_eq!(ask(&rule, 84, [0; 6]), if want == Action::Allow { code(Action::Log) } else { ALLOW });
    }
}

#[test]
fn comparisons_are_of_64_bits_and_unsigned() {
    const SAMPLES: [u64; 12] = [
        0,
        1,
        7,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
        0x1_0000_0000,
        0x1_0000_0007,
        0x7_0000_0001,
        i64::MAX as u64,
        1 << 63,
        u64::MAX,
    ];
    type Compare = fn(u64, u64) -> bool;
    let operators: [(&str, Compare); 6] = [
        ("NE", |a, b| a != b),
        ("LT", |a, b| a < b),
        ("LE", |a, b| a <= b),
        ("EQ", |a, b| a == b),
        ("GE", |a, b| a >= b),
        ("GT", |a, b| a > b),
    ];
    for (name, compare) in operators {
        for value in SAMPLES {
            for index in [0, 5] {
                let arg = format!(r#"{{"index": {index}, "value": {value}, "op": "SCMP_CMP_{name}"}}"#);
                let filter = filter(&allowing(&format!(
                    r#"{{"names": ["mkdir"], "action": "SCMP_ACT_TRAP", "args": [{arg}]}}"#
                )));
                for sample in SAMPLES {
                    // Other arguments are there to be confused with.
                    let mut args = SAMPLES[..6].iter().map(|s| !s).collect::<Vec<_>>();
                    args[index] = sample;
                    let got =
                        run(&filter.program, Call { arch: X86_64, nr: 83, args: args.try_into().unwrap() });
                    let want = if compare(sample, value) { Action::Trap } else { Action::Allow };
                    assert_eq!(got, code(want), "{sample:#x} {name} {value:#x}");
                }
            }
        }
    }
    for mask in SAMPLES {
        for value in SAMPLES {
            let arg = format!(
                r#"{{"index": 2, "value": {mask}, "valueTwo": {value}, "op": "SCMP_CMP_MASKED_EQ"}}"#
            );
            let json =
                allowing(&format!(r#"{{"names": ["mkdir"], "action": "SCMP_ACT_TRAP", "args": [{arg}]}}"#));
            let filter = filter(&json);
            for sample in SAMPLES {
                let got = run(&filter.program, Call { arch: X86_64, nr: 83, args: [9, 9, sample, 9, 9, 9] });
                let want = if sample & mask == value { Action::Trap } else { Action::Allow };
                assert_eq!(got, code(want), "{sample:#x} & {mask:#x} == {value:#x}");
            }
        }
    }
}

#[test]
fn args_are_all_needed_or_alternatives() {
    let both = r#"{"names": ["mkdir"], "action": "SCMP_ACT_TRAP", "args": [
        {"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}, {"index": 1, "value": 2, "op": "SCMP_CMP_EQ"}]}"#;
    let either = r#"{"names": ["mkdir"], "action": "SCMP_ACT_TRAP", "args": [
        {"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}, {"index": 0, "value": 2, "op": "SCMP_CMP_EQ"}]}"#;
    let trap = code(Action::Trap);
    for (json, args, want) in [
        (both, [1, 2], trap),
        (both, [1, 1], ALLOW),
        (both, [2, 2], ALLOW),
        (either, [1, 0], trap),
        (either, [2, 0], trap),
        (either, [3, 0], ALLOW),
    ] {
        assert_eq!(ask(&allowing(json), 83, [args[0], args[1], 0, 0, 0, 0]), want, "{json} {args:?}");
    }
}

#[test]
fn the_most_restrictive_rule_wins() {
    let allow = r#"{"names": ["mkdir"], "action": "SCMP_ACT_ALLOW"}"#;
    let refuse = r#"{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13}"#;
    let refuse_later = r#"{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 14}"#;
    let refuse_one = r#"{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO",
        "args": [{"index": 1, "value": 1, "op": "SCMP_CMP_EQ"}]}"#;
    let like_default = r#"{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO"}"#;
    let kill_one = r#"{"names": ["mkdir"], "action": "SCMP_ACT_KILL_PROCESS",
        "args": [{"index": 1, "value": 1, "op": "SCMP_CMP_EQ"}]}"#;
    for (rules, one, other) in [
        (vec![allow, refuse], errno(13), errno(13)),
        (vec![refuse, allow], errno(13), errno(13)),
        (vec![refuse, refuse_later], errno(13), errno(13)),
        // It is the same as the default, but conditions are meant.
        (vec![allow, refuse_one], errno(1), ALLOW),
        (vec![refuse_one, allow], errno(1), ALLOW),
        // Without conditions it only repeats the default, which the other rule is an exception of.
        (vec![like_default, allow], ALLOW, ALLOW),
        (vec![refuse, kill_one], KILL, errno(13)),
    ] {
        let json = refusing(&rules.join(","));
        assert_eq!(ask(&json, 83, [0, 1, 0, 0, 0, 0]), one, "{rules:?}");
        assert_eq!(ask(&json, 83, [0, 2, 0, 0, 0, 0]), other, "{rules:?}");
    }
}

#[test]
fn newer_calls_are_not_there() {
    let json = refusing(r#"{"names": ["read", "mkdir"], "action": "SCMP_ACT_ALLOW"}"#);
    for (nr, want) in
        [(0, ALLOW), (1, errno(1)), (82, errno(1)), (83, ALLOW), (84, errno(38)), (500, errno(38))]
    {
        assert_eq!(ask(&json, nr, [0; 6]), want, "{nr}");
    }
    // A call that is refused by name is known, too.
    let json = refusing(
        r#"{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO"}, {"names": ["read"], "action": "SCMP_ACT_ALLOW"}"#,
    );
    assert_eq!([ask(&json, 83, [0; 6]), ask(&json, 84, [0; 6])], [errno(1), errno(38)]);
    // Permissive defaults permit, and a profile that names nothing knows nothing.
    let json = allowing(r#"{"names": ["read"], "action": "SCMP_ACT_ERRNO"}"#);
    assert_eq!([ask(&json, 0, [0; 6]), ask(&json, 500, [0; 6])], [errno(1), ALLOW]);
    assert_eq!(ask(&refusing(""), 500, [0; 6]), errno(1));
    let json = r#"{"defaultAction": "SCMP_ACT_KILL_PROCESS", "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ALLOW"}]}"#;
    assert_eq!([ask(json, 82, [0; 6]), ask(json, 84, [0; 6])], [KILL, errno(38)]);
}

#[test]
fn other_architectures() {
    let rules = r#""syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_TRAP"}]"#;
    let profile = |arches: &str| format!(r#"{{"defaultAction": "SCMP_ACT_ALLOW", {arches} {rules}}}"#);
    let trap = code(Action::Trap);
    let ask = |json: &str, native, arch, nr| {
        run(&filter_for(json, &target(0, native)).program, Call { arch, nr, args: [0; 6] })
    };
    // Nothing said: the native one, and it is always in.
    for arches in ["", r#""architectures": null,"#, r#""architectures": ["SCMP_ARCH_S390X"],"#] {
        let json = profile(arches);
        assert_eq!(ask(&json, Arch::X86_64, X86_64, 83), trap);
        assert_eq!(ask(&json, Arch::X86_64, I386, 39), KILL);
        assert_eq!(ask(&json, Arch::X86_64, X86_64, 0x4000_0000 + 83), KILL);
        assert_eq!(ask(&json, Arch::X86_64, X86_64, u32::MAX), ALLOW);
        assert_eq!(ask(&json, Arch::X86_64, AARCH64, 83), KILL);
        assert_eq!(ask(&json, Arch::Aarch64, AARCH64, 83), ALLOW);
        assert_eq!(ask(&json, Arch::Aarch64, ARM, 39), KILL);
    }
    for arches in [
        r#""architectures": ["SCMP_ARCH_X86", "SCMP_ARCH_X32", "SCMP_ARCH_ARM"],"#,
        r#""archMap": [{"architecture": "SCMP_ARCH_S390X", "subArchitectures": ["SCMP_ARCH_S390"]},
            {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86", "SCMP_ARCH_X32"]},
            {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": ["SCMP_ARCH_ARM"]}],"#,
    ] {
        let json = profile(arches);
        for (native, arch, nr, want) in [
            (Arch::X86_64, X86_64, 83, trap),
            (Arch::X86_64, X86_64, 39, ALLOW),
            (Arch::X86_64, I386, 39, trap),
            (Arch::X86_64, I386, 83, ALLOW),
            (Arch::X86_64, X86_64, 0x4000_0000 + 83, trap),
            (Arch::X86_64, X86_64, 0x4000_0000 + 84, ALLOW),
            (Arch::X86_64, X86_64, u32::MAX, ALLOW),
            (Arch::X86_64, ARM, 39, KILL),
            (Arch::Aarch64, AARCH64, 34, ALLOW),
            (Arch::Aarch64, ARM, 39, trap),
            (Arch::Aarch64, I386, 39, KILL),
        ] {
            assert_eq!(ask(&json, native, arch, nr), want, "{native:?} {arch:#x} {nr} {arches}");
        }
    }
}

#[test]
fn in_32_bits_the_lower_half_counts() {
    let json = r#"{"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86"], "syscalls": [
        {"names": ["mkdir"], "action": "SCMP_ACT_TRAP", "args": [{"index": 0, "value": 18446744073709551615, "op": "SCMP_CMP_EQ"}]},
        {"names": ["rmdir"], "action": "SCMP_ACT_TRAP", "args": [{"index": 0, "value": 4294967296, "op": "SCMP_CMP_GE"}]}]}"#;
    let filter = filter(json);
    let ask = |arch, nr, arg| run(&filter.program, Call { arch, nr, args: [arg, 0, 0, 0, 0, 0] });
    assert_eq!(ask(X86_64, 83, 0xffff_ffff), ALLOW);
    assert_eq!(ask(X86_64, 83, u64::MAX), code(Action::Trap));
    assert_eq!(ask(I386, 39, 0xffff_ffff), code(Action::Trap));
    assert_eq!(ask(I386, 39, 0xffff_fffe), ALLOW);
    assert_eq!(ask(I386, 40, 0), code(Action::Trap));
}

#[test]
fn i386_multiplexers() {
    let with = |default: &str, rules: &str| {
        let json = format!(
            r#"{{"defaultAction": "{default}", "architectures": ["SCMP_ARCH_X86"], "syscalls": [{rules}]}}"#
        );
        filter(&json)
    };
    let ask = |filter: &stave_seccomp::Filter, nr, arg| {
        run(&filter.program, Call { arch: I386, nr, args: [arg, 0, 0, 0, 0, 0] })
    };
    const SOCKET: u32 = 359;
    const SOCKETCALL: u32 = 102;
    const IPC: u32 = 117;
    // Refused by either way.
    let filter = with("SCMP_ACT_ALLOW", r#"{"names": ["socket", "shmget"], "action": "SCMP_ACT_ERRNO"}"#);
    assert_eq!([ask(&filter, SOCKET, 2), ask(&filter, SOCKETCALL, 1)], [errno(1); 2]);
    assert_eq!(ask(&filter, SOCKETCALL, 2), ALLOW);
    // The version in the upper half is no way around.
    assert_eq!(
        [ask(&filter, IPC, 23), ask(&filter, IPC, 0x1_0017), ask(&filter, IPC, 24)],
        [errno(1), errno(1), ALLOW]
    );
    // Allowed by either way.
    let filter = with("SCMP_ACT_ERRNO", r#"{"names": ["socket"], "action": "SCMP_ACT_ALLOW"}"#);
    assert_eq!([ask(&filter, SOCKETCALL, 1), ask(&filter, SOCKETCALL, 2)], [ALLOW, errno(1)]);
    // Conditions can't be checked there.
    let args = r#""args": [{"index": 0, "value": 16, "op": "SCMP_CMP_EQ"}]"#;
    let filter =
        with("SCMP_ACT_ERRNO", &format!(r#"{{"names": ["socket"], "action": "SCMP_ACT_ALLOW", {args}}}"#));
    assert_eq!(
        [ask(&filter, SOCKET, 16), ask(&filter, SOCKETCALL, 1), ask(&filter, SOCKETCALL, 16)],
        [ALLOW, errno(1), errno(1)]
    );
    let filter =
        with("SCMP_ACT_ALLOW", &format!(r#"{{"names": ["socket"], "action": "SCMP_ACT_TRAP", {args}}}"#));
    assert_eq!([ask(&filter, SOCKET, 2), ask(&filter, SOCKETCALL, 1)], [ALLOW, code(Action::Trap)]);
    // A profile that speaks of socketcall itself is taken by its word.
    let filter = with(
        "SCMP_ACT_ERRNO",
        r#"{"names": ["socket"], "action": "SCMP_ACT_ALLOW"},
           {"names": ["socketcall"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}"#,
    );
    assert_eq!([ask(&filter, SOCKET, 2), ask(&filter, SOCKETCALL, 1)], [ALLOW, errno(38)]);
}

#[test]
fn includes_and_excludes() {
    let rule = |conditions: &str| {
        refusing(&format!(r#"{{"names": ["mkdir"], "action": "SCMP_ACT_ALLOW", {conditions}}}"#))
    };
    const SYS_ADMIN: u64 = 1 << 21;
    const SYS_TIME: u64 = 1 << 25;
    for (conditions, caps, want) in [
        (r#""includes": {}, "excludes": {}"#, 0, true),
        (r#""includes": null, "excludes": null"#, 0, true),
        (r#""includes": {"caps": ["CAP_SYS_ADMIN"]}"#, 0, false),
        (r#""includes": {"caps": ["CAP_SYS_ADMIN"]}"#, SYS_ADMIN, true),
        (r#""includes": {"caps": ["CAP_SYS_ADMIN", "CAP_SYS_TIME"]}"#, SYS_ADMIN, false),
        (r#""includes": {"caps": ["CAP_SYS_ADMIN", "CAP_SYS_TIME"]}"#, SYS_ADMIN | SYS_TIME, true),
        (r#""excludes": {"caps": ["CAP_SYS_ADMIN", "CAP_SYS_TIME"]}"#, SYS_TIME, false),
        (r#""excludes": {"caps": ["CAP_SYS_ADMIN"]}"#, SYS_TIME, true),
        (r#""includes": {"arches": ["amd64"]}"#, 0, true),
        (r#""includes": {"arches": ["s390x", "arm64"]}"#, 0, false),
        (r#""excludes": {"arches": ["s390x", "amd64"]}"#, 0, false),
        (r#""excludes": {"arches": ["s390x"]}"#, 0, true),
        (r#""includes": {"minKernel": "4.8"}"#, 0, true),
        (r#""includes": {"minKernel": "6.12"}"#, 0, true),
        (r#""includes": {"minKernel": "6.13"}"#, 0, false),
        (r#""includes": {"minKernel": "7.0"}"#, 0, false),
        (r#""excludes": {"minKernel": "4.8"}"#, 0, false),
    ] {
        let filter = filter_for(&rule(conditions), &target(caps, Arch::X86_64));
        let got = run(&filter.program, Call { arch: X86_64, nr: 83, args: [0; 6] });
        assert_eq!(got == ALLOW, want, "{conditions} {caps:#x}");
    }
}

#[test]
fn unknown_names_are_skipped_and_told() {
    let json = refusing(
        r#"{"names": ["mkdir", "frobnicate", "s390_pci_mmio_read", "frobnicate"], "action": "SCMP_ACT_ALLOW"},
           {"names": ["frobnicate"], "action": "SCMP_ACT_KILL_PROCESS"}"#,
    );
    let filter = filter(&json);
    assert_eq!(filter.unknown, ["frobnicate", "s390_pci_mmio_read"]);
    assert_eq!(run(&filter.program, Call { arch: X86_64, nr: 83, args: [0; 6] }), ALLOW);
    let oci = filter.oci.syscalls().as_ref().unwrap();
    assert_eq!((oci.len(), oci[0].names().as_slice()), (1, ["mkdir".to_owned()].as_slice()));
}

#[test]
fn flags() {
    let json = r#"{"defaultAction": "SCMP_ACT_LOG", "flags": ["SECCOMP_FILTER_FLAG_TSYNC", "SECCOMP_FILTER_FLAG_LOG"]}"#;
    assert_eq!(filter(json).flags, 2);
    assert_eq!(filter(&allowing("")).flags, 0);
}

/// Numbers from 0 on with the same conditions are one range of one chain; with different ones they are not.
#[test]
fn a_profile_can_be_too_large() {
    let rule = |i: usize| {
        let args = format!(r#"[{{"index": 0, "value": {i}, "op": "SCMP_CMP_EQ"}}]"#);
        format!(r#"{{"names": ["mkdir"], "action": "SCMP_ACT_TRAP", "args": {args}}}"#)
    };
    let json = |count: usize| allowing(&(0..count).map(rule).collect::<Vec<_>>().join(","));
    // Far jumps: each comparison has 4 instructions.
    let filter = filter(&json(1000));
    for (arg, want) in
        [(0, Action::Trap), (999, Action::Trap), (1000, Action::Allow), (1 << 32, Action::Allow)]
    {
        let call = Call { arch: X86_64, nr: 83, args: [arg, 0, 0, 0, 0, 0] };
        assert_eq!(run(&filter.program, call), code(want), "{arg}");
    }
    let error = compile_for(&parse(&json(1100), "test").unwrap(), &target(0, Arch::X86_64)).unwrap_err();
    assert!(
        matches!(error, SeccompError::TooLarge { what: "instructions", needed: 4097.., max: 4096, .. }),
        "{error}"
    );
    // What would take long is not tried: some 120 calls, 64 conditions, 20 rules.
    let names: Vec<String> = include_str!("../../src/syscalls.txt")
        .lines()
        .filter(|l| !l.starts_with('#'))
        .map(|l| format!("{:?}", l.split(' ').next().unwrap()))
        .collect();
    let args: Vec<String> =
        (0..64).map(|i| format!(r#"{{"index": 0, "value": {i}, "op": "SCMP_CMP_EQ"}}"#)).collect();
    let rule = format!(
        r#"{{"names": [{}], "action": "SCMP_ACT_TRAP", "args": [{}]}}"#,
        names.join(","),
        args.join(",")
    );
    let error =
        compile_for(&parse(&allowing(&vec![rule; 20].join(",")), "test").unwrap(), &target(0, Arch::X86_64))
            .unwrap_err();
    assert!(matches!(error, SeccompError::TooLarge { what: "rules with conditions", .. }), "{error}");
}

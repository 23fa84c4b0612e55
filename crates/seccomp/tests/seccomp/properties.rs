//! The filter and a plain reading of the profile agree on any call.

use proptest::prelude::*;
use stave_seccomp::{Action, Arch, Argument, Operator, Profile, Rule, compile_for, parse};

use crate::machine::{Call, X86_64, code, run, target};

/// Calls with numbers close together, far apart, and none on x86_64.
const CALLS: [(&str, Option<u32>); 8] = [
    ("read", Some(0)),
    ("write", Some(1)),
    ("open", Some(2)),
    ("mkdir", Some(83)),
    ("rmdir", Some(84)),
    ("file_setattr", Some(469)),
    ("fstat64", None),
    ("frobnicate", None),
];

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        Just(Action::Allow),
        Just(Action::Errno(1)),
        Just(Action::Errno(2)),
        Just(Action::Log),
        Just(Action::Trap),
        Just(Action::KillThread),
        Just(Action::KillProcess),
        Just(Action::Trace(1)),
    ]
}

/// Numbers that are likely to meet each other.
fn value() -> impl Strategy<Value = u64> {
    prop_oneof![0..4_u64, (0..4_u64).prop_map(|n| n << 32 | n), Just(u64::MAX), any::<u64>()]
}

fn argument() -> impl Strategy<Value = Argument> {
    let operator = prop_oneof![
        Just(Operator::NotEqual),
        Just(Operator::Less),
        Just(Operator::LessOrEqual),
        Just(Operator::Equal),
        Just(Operator::GreaterOrEqual),
        Just(Operator::Greater),
        Just(Operator::MaskedEqual),
    ];
    (0..3_u8, operator, value(), value()).prop_map(|(index, operator, value, value_two)| Argument {
        index,
        operator,
        value,
        value_two,
    })
}

fn rule() -> impl Strategy<Value = Rule> {
    let names = proptest::collection::vec(0..CALLS.len(), 1..5);
    (names, action(), proptest::collection::vec(argument(), 0..4)).prop_map(|(names, action, args)| Rule {
        names: names.into_iter().map(|i| CALLS[i].0.to_owned()).collect(),
        action,
        args,
        includes: Default::default(),
        excludes: Default::default(),
    })
}

fn matches(arg: &Argument, args: &[u64; 6]) -> bool {
    let (got, value) = (args[usize::from(arg.index)], arg.value);
    match arg.operator {
        Operator::NotEqual => got != value,
        Operator::Less => got < value,
        Operator::LessOrEqual => got <= value,
        Operator::Equal => got == value,
        Operator::GreaterOrEqual => got >= value,
        Operator::Greater => got > value,
        Operator::MaskedEqual => got & value == arg.value_two,
    }
}

/// What the crate's documentation says.
fn expected(profile: &Profile, nr: u32, args: &[u64; 6]) -> Action {
    let default = profile.default_action;
    let number = |name: &String| CALLS.iter().find(|(n, _)| n == name).and_then(|(_, nr)| *nr);
    let strictness = [
        Action::Log,
        Action::Trace(1),
        Action::Errno(0),
        Action::Trap,
        Action::KillThread,
        Action::KillProcess,
    ];
    let strictness = |action: Action| {
        strictness
            .iter()
            .position(|a| std::mem::discriminant(a) == std::mem::discriminant(&action))
            .map_or(0, |i| i + 1)
    };
    let mut best: Option<Action> = None;
    for rule in &profile.rules {
        let repeated = (0..6).any(|index| rule.args.iter().filter(|arg| arg.index == index).count() > 1);
        let all = rule.args.iter().all(|arg| matches(arg, args));
        let any = rule.args.iter().any(|arg| matches(arg, args));
        let is_default = rule.args.is_empty() && rule.action == default;
        let about = rule.names.iter().filter_map(number).any(|number| number == nr);
        if about
            && !is_default
            && (if repeated { any } else { all })
            && best.is_none_or(|b| strictness(rule.action) > strictness(b))
        {
            best = Some(rule.action);
        }
    }
    let newest = profile.rules.iter().flat_map(|rule| &rule.names).filter_map(number).max();
    let refuses = !matches!(default, Action::Allow | Action::Log | Action::Trace(_));
    best.unwrap_or(match newest {
        Some(newest) if nr > newest && refuses => Action::Errno(38),
        _ => default,
    })
}

proptest! {
    #[test]
    fn the_filter_does_what_the_profile_says(
        default_action in action(),
        rules in proptest::collection::vec(rule(), 0..12),
        calls in proptest::collection::vec((0..6_usize, -1..2_i64, proptest::array::uniform6(value())), 1..60),
    ) {
        let profile = Profile { default_action, architectures: vec![], arch_map: vec![], rules, flags: 0 };
        let filter = compile_for(&profile, &target(0, Arch::X86_64)).unwrap();
        for (call, offset, args) in calls {
            let nr = u32::try_from((i64::from(CALLS[call].1.unwrap()) + offset).max(0)).unwrap();
            let got = run(&filter.program, Call { arch: X86_64, nr, args });
            prop_assert_eq!(got, code(expected(&profile, nr, &args)), "{} {:?}", nr, args);
        }
    }

    #[test]
    fn no_text_makes_it_panic(text in "[ -~\n]{0,200}", at in 0..3000_usize, cut in 0..100_usize) {
        let _ = parse(&text, "p");
        let default = include_str!("../../default.json");
        let mut broken = default.to_owned();
        broken.replace_range(at..(at + cut), &text);
        if let Ok(profile) = parse(&broken, "p") {
            let _ = compile_for(&profile, &target(0, Arch::X86_64));
        }
    }
}

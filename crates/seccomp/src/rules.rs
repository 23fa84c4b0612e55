//! A profile's rules for one architecture, by number.

use std::collections::{BTreeMap, HashSet};

use crate::filter::Target;
use crate::profile::{Action, Argument, Conditions, Operator, Profile, Rule};
use crate::syscalls::{ARM_PRIVATE, is_known, multiplexed, number};
use crate::{Arch, SeccompError};

/// Most rules with conditions, counted for each call that they are about. Each takes at least one instruction
/// and a filter has 4096, but calls with the same rules share theirs.
const CONDITIONAL_MAX: usize = 1 << 16;

/// An action, and the conditions that all have to hold.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Step {
    pub(crate) args: Vec<Argument>,
    pub(crate) action: Action,
}

/// What is done about a call: the first step that matches. The default comes last, without conditions.
pub(crate) type Chain = Vec<Step>;

/// The calls of an architecture that are treated in some way of their own.
#[derive(Debug)]
pub(crate) struct Calls {
    pub(crate) chains: BTreeMap<u32, Chain>,
    /// The highest number that the profile names.
    pub(crate) newest: Option<u32>,
}

/// Whether the rule is there.
pub(crate) fn applies(rule: &Rule, target: &Target) -> bool {
    let arch = |conditions: &Conditions| conditions.arches.iter().any(|name| target.native.is_go(name));
    let (includes, excludes) = (&rule.includes, &rule.excludes);
    let included = includes.caps & !target.caps == 0
        && (includes.arches.is_empty() || arch(includes))
        && includes.min_kernel.is_none_or(|version| target.kernel >= version);
    let excluded = excludes.caps & target.caps != 0
        || arch(excludes)
        || excludes.min_kernel.is_some_and(|version| target.kernel >= version);
    included && !excluded
}

/// The architectures of a filter: the native one, and those of the profile that can run beside it.
pub(crate) fn arches(profile: &Profile, native: Arch) -> Vec<Arch> {
    let mut all = vec![native];
    let mapped = profile.arch_map.iter().filter(|(arch, _)| *arch == native).flat_map(|(_, sub)| sub);
    for arch in profile.architectures.iter().chain(mapped) {
        if native.runs(*arch) && !all.contains(arch) {
            all.push(*arch);
        }
    }
    all
}

/// Names that are in no table of ours, each once.
pub(crate) fn unknown(rules: &[&Rule]) -> Vec<String> {
    let mut seen = HashSet::new();
    let names = rules.iter().flat_map(|rule| &rule.names);
    names.filter(|name| !is_known(name) && seen.insert(*name)).cloned().collect()
}

/// Sorts the rules by number.
pub(crate) fn calls(rules: &[&Rule], default: Action, arch: Arch) -> Result<Calls, SeccompError> {
    let own: HashSet<&str> = rules
        .iter()
        .flat_map(|rule| &rule.names)
        .map(String::as_str)
        .filter(|name| matches!(*name, "socketcall" | "ipc"))
        .collect();
    let mut calls = Calls { chains: BTreeMap::new(), newest: None };
    let mut conditional = 0;
    for rule in rules {
        let steps = steps(rule);
        for name in &rule.names {
            if let Some(nr) = number(arch, name) {
                if nr < ARM_PRIVATE || arch == Arch::X32 {
                    calls.newest = calls.newest.max(Some(nr));
                }
                conditional += steps.iter().filter(|step| !step.args.is_empty()).count();
                calls.add(nr, &steps, default);
            }
            if let Some(call) = multiplexed(arch, name).filter(|call| !own.contains(call.name))
                && let Some(nr) = number(arch, call.name)
            {
                // Its arguments can't be seen: what is allowed under conditions is not allowed.
                if rule.args.is_empty() || !rule.action.permits() {
                    let which = Argument {
                        index: 0,
                        operator: Operator::MaskedEqual,
                        value: call.mask.into(),
                        value_two: call.value.into(),
                    };
                    conditional += 1;
                    calls.add(nr, &[Step { args: vec![which], action: rule.action }], default);
                }
            }
        }
        if conditional > CONDITIONAL_MAX {
            let what = "rules with conditions";
            return Err(SeccompError::TooLarge { what, arch, needed: conditional, max: CONDITIONAL_MAX });
        }
    }
    for chain in calls.chains.values_mut() {
        // Stable: of equals the first stays first.
        chain.sort_by_key(|step| step.action.rank());
        chain.push(Step { args: Vec::new(), action: default });
        let end = chain.iter().position(|step| step.args.is_empty()).map_or(chain.len(), |at| at + 1);
        chain.truncate(end);
    }
    Ok(calls)
}

impl Calls {
    fn add(&mut self, nr: u32, steps: &[Step], default: Action) {
        let says_something = |step: &&Step| !(step.args.is_empty() && step.action == default);
        let mut steps = steps.iter().filter(says_something).peekable();
        if steps.peek().is_some() {
            self.chains.entry(nr).or_default().extend(steps.cloned());
        }
    }
}

/// One step, or one for each condition where several are about the same argument.
fn steps(rule: &Rule) -> Vec<Step> {
    let mut seen = HashSet::new();
    let action = rule.action;
    if rule.args.iter().all(|arg| seen.insert(arg.index)) {
        return vec![Step { args: rule.args.clone(), action }];
    }
    rule.args.iter().map(|arg| Step { args: vec![*arg], action }).collect()
}

//! Containers in the PID namespace of another container.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod common;

use common::{Pod, failure};
use stave_supervisor_proto::v1::PidNamespace;
use stave_supervisor_proto::v1::failure::Kind;

const SCRIPT: &str = "readlink /proc/self/ns/pid; echo pid $$; sleep 1000";

#[test]
fn a_container_joins_a_running_one_and_ends_with_it() {
    let mut pod = Pod::ready();
    let plan = pod.plan("target", &["/bin/sh", "-c", SCRIPT]);
    pod.create(plan);
    let guest = |pod: &mut Pod, id: &str, target: &str| {
        let mut plan = pod.plan(id, &["/bin/sh", "-c", SCRIPT]);
        plan.pid_namespace = PidNamespace::Target.into();
        plan.pid_target = target.to_owned();
        plan
    };
    // Created is not running, and unknown is neither.
    for target in ["target", "unknown", ""] {
        let plan = guest(&mut pod, "early", target);
        let call = pod.create_call(plan);
        assert_eq!(failure(pod.call(call)).kind(), Kind::FailedPrecondition, "{target:?}");
    }
    pod.start("target");
    pod.wait_for_output("target", "pid ");
    let plan = guest(&mut pod, "guest", "target");
    pod.create(plan);
    pod.start("guest");
    pod.wait_for_output("guest", "pid ");
    let (target, guest_log) = (pod.log("target"), pod.log("guest"));
    assert_eq!(target[0], guest_log[0], "one namespace");
    assert_eq!(target[1].content, "pid 1");
    assert_ne!(guest_log[1].content, "pid 1");
    pod.done(Pod::stop_call("target", 15, 0));
    // PID 1 is not gone before all others of its namespace are.
    assert_eq!(pod.exit("guest").signal, 9);
    assert_eq!(pod.exit("target").signal, 9);
    let plan = guest(&mut pod, "late", "target");
    let call = pod.create_call(plan);
    assert_eq!(failure(pod.call(call)).kind(), Kind::FailedPrecondition);
    common::wait_for("the end of all", || pod.pids().is_empty() && pod.children().is_empty());
}

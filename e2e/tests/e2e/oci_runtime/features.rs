//! What is told of handlers, and refused when they do not offer it.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use stave_e2e::cri::*;
use stave_e2e::{Config as _, pod};
use tonic::Code;

use super::failures::handler;
use super::{daemon_with, own_root, run_pod, runc};
use crate::sleeper;

#[tokio::test(flavor = "multi_thread")]
async fn handlers_are_listed_with_what_probing_found() {
    let programs = tempfile::tempdir().expect("directory");
    let old = programs.path().join("old");
    fs::write(&old, "#!/bin/sh\n[ \"$1\" = --version ] && echo old runtime 0.1\n").expect("script");
    fs::set_permissions(&old, fs::Permissions::from_mode(0o755)).expect("mode");
    let daemon =
        daemon_with(&(handler("old", &old) + &handler("absent", Path::new("/nonexistent/runtime")))).await;
    let status = daemon.cri.status(StatusRequest { verbose: true }).await.expect("Status");
    let names: Vec<&str> = status.runtime_handlers.iter().map(|handler| handler.name.as_str()).collect();
    assert_eq!(names, ["", "stave", "absent", "old", "runc"]);
    let rro = |name: &str| {
        let found = status.runtime_handlers.iter().find(|handler| handler.name == name).expect("handler");
        found.features.as_ref().is_some_and(|features| features.recursive_read_only_mounts)
    };
    // As it says itself: not all have `features`, and not all of them name it.
    let options = super::features()["mountOptions"].as_array().cloned().unwrap_or_default();
    let known = options.iter().any(|option| option == "rro");
    assert_eq!(["stave", "runc", "old", "absent"].map(rro), [true, known, false, false]);
    let info: serde_json::Value = serde_json::from_str(&status.info["runtimes"]).expect("runtimes");
    let found = |name: &str| {
        info.as_array().expect("a list").iter().find(|one| one["name"] == name).expect("handler").clone()
    };
    let version = std::process::Command::new(runc()).arg("--version").output().expect("--version").stdout;
    let version = String::from_utf8_lossy(&version).lines().next().expect("a line").to_owned();
    assert_eq!(found("runc")["found"]["version"], version);
    assert_eq!(found("old")["found"]["version"], "old runtime 0.1");
    assert!(
        found("absent")["found"]["error"]
            .as_str()
            .expect("error")
            .contains("/nonexistent/runtime: No such file")
    );

    let error = run_pod(&daemon, "nope", pod("nope")).await.expect_err("no such handler");
    assert_eq!(error.code(), Code::NotFound);
    assert!(error.message().contains("known are [\"stave\", \"absent\", \"old\", \"runc\"]"), "{error:?}");
    let pod = run_pod(&daemon, "old", crate::pod("old")).await.expect("RunPodSandbox");
    let config = sleeper("main").with(|c| {
        c.mounts = vec![Mount {
            host_path: "/usr".into(),
            container_path: "/usr2".into(),
            readonly: true,
            recursive_read_only: true,
            ..Default::default()
        }];
    });
    let error = daemon.create(&pod, &config).await.expect_err("not offered");
    assert_eq!(error.code(), Code::FailedPrecondition, "{error:?}");
    assert!(
        error.message().contains("config.mounts[0].recursive_read_only")
            && error.message().contains("\"old\""),
        "{error:?}"
    );
    daemon.finish().await;
}

/// The built-in executor under another name, with options.
#[tokio::test(flavor = "multi_thread")]
async fn a_builtin_handler_has_options_of_its_own() {
    let daemon = daemon_with("[runtimes.small]\ntype = \"builtin\"\npids_limit = 33\n").await;
    let status = daemon.cri.status(StatusRequest { verbose: false }).await.expect("Status");
    let features = |name: &str| {
        let handler = status.runtime_handlers.iter().find(|handler| handler.name == name);
        handler.unwrap_or_else(|| panic!("no {name}")).features.expect("features")
    };
    assert_eq!(features("small"), features("stave"));
    for (handler, limit) in [("small", "33"), ("stave", "max")] {
        let pod = run_pod(&daemon, handler, pod(handler)).await.expect("RunPodSandbox");
        let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
        assert_eq!(daemon.cri.pod(&pod.id).await.expect("PodSandboxStatus").runtime_handler, handler);
        assert!(!own_root(&daemon, handler, &pod).exists(), "{handler} is no OCI runtime");
        let max = crate::resources::cgroup(&daemon, &id, "pids").0.join("pids.max");
        assert_eq!(fs::read_to_string(&max).expect("pids.max").trim(), limit, "{handler}");
        // What it can't have: the shell says so itself.
        let script = "i=0; while [ $i -lt 40 ]; do sleep 60 >/dev/null 2>&1 & i=$((i + 1)); done";
        let forked = daemon.cri.exec(&id, &["sh", "-c", script]).await.expect("ExecSync");
        let refused = String::from_utf8_lossy(&forked.stderr).contains("fork");
        assert_eq!(refused, handler == "small", "{forked:?}");
    }
    daemon.finish().await;
}

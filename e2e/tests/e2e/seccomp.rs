//! Seccomp profiles of containers.

use stave_e2e::Config;
use stave_e2e::cri::*;
use tonic::Code;

use crate::{daemon_with_pod, sleeper};

fn with_profile(config: ContainerConfig, kind: i32, localhost_ref: &str) -> ContainerConfig {
    config.with(|config| {
        let context = config.linux.as_mut().unwrap().security_context.get_or_insert_default();
        context.seccomp =
            Some(SecurityProfile { profile_type: kind, localhost_ref: localhost_ref.to_owned() });
    })
}

const RUNTIME_DEFAULT: i32 = 0;
const UNCONFINED: i32 = 1;
const LOCALHOST: i32 = 2;

#[tokio::test(flavor = "multi_thread")]
async fn a_profile_blocks_a_named_call_with_its_errno() {
    let (daemon, pod) = daemon_with_pod().await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.json");
    let profile = r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28, "excludes": {"caps": ["CAP_SYS_TIME"]}}]}"#;
    std::fs::write(&path, profile).unwrap();
    for user in [0, 1000] {
        let config =
            with_profile(sleeper(&format!("u{user}")), LOCALHOST, path.to_str().unwrap()).with(|config| {
                let context = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
                context.run_as_user = Some(Int64Value { value: user });
            });
        let id = daemon.run(&pod, &config).await.expect("start");
        let status = daemon.cri.output(&id, &["cat", "/proc/1/status", "/proc/self/status"]).await;
        assert_eq!(status.matches("Seccomp:\t2").count(), 2, "{status}");
        assert_eq!(status.matches("NoNewPrivs:\t0").count(), 2, "{status}");
        // What is executed later is under the same filter.
        let made = daemon.cri.exec(&id, &["mkdir", "/tmp/x"]).await.expect("ExecSync");
        assert_eq!(made.exit_code, 1);
        let stderr = String::from_utf8_lossy(&made.stderr).into_owned();
        assert!(stderr.contains("No space left on device"), "{stderr}");
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_default_profile() {
    let (daemon, pod) = daemon_with_pod().await;
    let add = |config: ContainerConfig, capability: &str| {
        config.with(|config| {
            let context = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
            let add_capabilities = vec![capability.to_owned()];
            context.capabilities = Some(Capability { add_capabilities, ..Default::default() });
        })
    };
    // unshare(1) of a user namespace needs no capability: only the filter is in its way.
    let unshare = ["sh", "-c", "unshare -U true && echo done"];
    for (config, filtered, allowed) in [
        (with_profile(sleeper("unconfined"), UNCONFINED, ""), false, true),
        (with_profile(sleeper("default"), RUNTIME_DEFAULT, ""), true, false),
        (add(with_profile(sleeper("admin"), RUNTIME_DEFAULT, ""), "SYS_ADMIN"), true, true),
    ] {
        let id = daemon.run(&pod, &config).await.expect("start");
        let status = daemon.cri.output(&id, &["cat", "/proc/1/status"]).await;
        assert!(status.contains(if filtered { "Seccomp:\t2" } else { "Seccomp:\t0" }), "{status}");
        let answer = daemon.cri.exec(&id, &unshare).await.expect("ExecSync");
        assert_eq!(answer.stdout == b"done\n", allowed, "{answer:?}");
        if !allowed {
            let stderr = String::from_utf8_lossy(&answer.stderr).into_owned();
            assert!(stderr.contains("Operation not permitted"), "{stderr}");
        }
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_profile_is_refused_with_its_line() {
    let (daemon, pod) = daemon_with_pod().await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.json");
    let file = path.to_str().unwrap();
    let at = "config.linux.security_context.seccomp.localhost_ref";
    let config = with_profile(sleeper("main"), LOCALHOST, file);
    let error = daemon.create(&pod, &config).await.expect_err("a profile that is not there");
    assert_eq!(error.code(), Code::FailedPrecondition, "{error:?}");
    assert!(error.message().contains(at) && error.message().contains(file), "{error:?}");
    std::fs::write(
        &path,
        "{\"defaultAction\": \"SCMP_ACT_ALLOW\",\n \"syscalls\": [\n{\"names\": [\"mkdir\"],}]}",
    )
    .unwrap();
    let error = daemon.create(&pod, &config).await.expect_err("a broken profile");
    assert_eq!(error.code(), Code::InvalidArgument, "{error:?}");
    assert!(error.message().contains(at) && error.message().contains("line 3, column 21"), "{error:?}");
    assert_eq!(daemon.cri.containers(None).await.unwrap().len(), 0);
    // Mended, it is taken; nothing of the first try is in the way.
    std::fs::write(&path, r#"{"defaultAction": "SCMP_ACT_ALLOW"}"#).unwrap();
    daemon.run(&pod, &config).await.expect("start");
    daemon.finish().await;
}

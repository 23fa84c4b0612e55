//! A capability less, a system call less.

use stave_e2e::cri::*;
use stave_e2e::{Config, image};

use super::{host_pid, status_line};
use crate::{daemon_with_pod, sleeper};

fn context(
    config: ContainerConfig,
    change: impl FnOnce(&mut LinuxContainerSecurityContext),
) -> ContainerConfig {
    config.with(|config| change(config.linux.as_mut().unwrap().security_context.get_or_insert_default()))
}

#[tokio::test(flavor = "multi_thread")]
async fn without_cap_chown_only_chown_fails() {
    let (daemon, pod) = daemon_with_pod().await;
    let cri = &daemon.cri;
    // The image whose busybox has su.
    let name = image("stave/busybox");
    cri.pull(&name).await.expect("PullImage");
    let of_image = |label: &str| {
        sleeper(label)
            .with(|config| config.image = Some(ImageSpec { image: name.clone(), ..Default::default() }))
    };
    let whole = daemon.run(&pod, &of_image("whole")).await.expect("start");
    let less = context(of_image("less"), |context| {
        context.capabilities =
            Some(Capability { drop_capabilities: vec!["CHOWN".into()], ..Default::default() });
    });
    let less = daemon.run(&pod, &less).await.expect("start");
    cri.shell(&whole, "touch /tmp/file && chown 1000:1000 /tmp/file").await;
    let refused = cri.exec(&less, &["/bin/sh", "-c", "touch /tmp/file && chown 1000:1000 /tmp/file"]).await;
    let refused = refused.expect("ExecSync");
    let stderr = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.exit_code != 0 && stderr.contains("Operation not permitted"), "{refused:?}");
    // The others still do their work: SETUID and SETGID, DAC_OVERRIDE, FOWNER, MKNOD, SYS_CHROOT, NET_RAW, KILL.
    let script = "set -e; su -s /bin/sh nobody -c 'umask 777; echo theirs >/tmp/theirs; id -u'; cat /tmp/theirs; \
        chmod 600 /tmp/theirs; mknod /tmp/null c 1 3; echo x >/tmp/null; chroot / true; \
        ping -c 1 -W 5 127.0.0.1 >/dev/null; su -s /bin/sh nobody -c 'exec sleep 100' & sleep 0.3; kill $!; echo done";
    assert_eq!(cri.shell(&less, script).await, "65534\ntheirs\ndone\n");
    // From the host: bit 0 is what is missing.
    let mask = |text: String| u64::from_str_radix(&text, 16).expect("a mask");
    let (whole, less) = (host_pid(&daemon, &whole).await, host_pid(&daemon, &less).await);
    for set in ["CapEff", "CapPrm", "CapBnd"] {
        let (whole, less) = (mask(status_line(whole, set)), mask(status_line(less, set)));
        assert_eq!(whole & !less, 1, "{set}");
        assert_eq!(less & !whole, 0, "{set}");
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seccomp_profile_blocks_a_call_with_its_errno() {
    let (daemon, pod) = daemon_with_pod().await;
    let profile = daemon.directory().join("no-links.json");
    // 95 is EOPNOTSUPP: nothing else here answers with it.
    let json = r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        {"names": ["symlink", "symlinkat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]}"#;
    std::fs::write(&profile, json).expect("profile");
    let config = context(sleeper("main"), |context| {
        let localhost_ref = profile.to_string_lossy().into_owned();
        context.seccomp = Some(SecurityProfile { profile_type: 2, localhost_ref });
    });
    let id = daemon.run(&pod, &config).await.expect("start");
    let plain = daemon.run(&pod, &sleeper("plain")).await.expect("start");
    let refused = daemon.cri.exec(&id, &["ln", "-s", "target", "/tmp/link"]).await.expect("ExecSync");
    let stderr = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.exit_code != 0 && stderr.contains("Operation not supported"), "{refused:?}");
    daemon.cri.shell(&id, "touch /tmp/file && ln /tmp/file /tmp/hard && mkdir /tmp/dir").await;
    daemon.cri.output(&plain, &["ln", "-s", "target", "/tmp/link"]).await;
    assert_eq!(status_line(host_pid(&daemon, &id).await, "Seccomp"), "2");
    assert_eq!(status_line(host_pid(&daemon, &plain).await, "Seccomp"), "0");
    daemon.finish().await;
}

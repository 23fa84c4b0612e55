//! What an OCI runtime that misbehaves leaves behind. The runtime is a script.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::Pod;
use stave_supervisor_proto::v1::packet::Body;
use stave_supervisor_proto::v1::request::Call;
use stave_supervisor_proto::v1::*;

/// Each process that it makes sleeps, and its pid is in `made-<verb>`. It never sends a terminal.
const RUNTIME: &str = r#"#!/bin/sh
for word; do
  [ "$last" = --pid-file ] && file=$word
  case $word in create|start|exec|kill|delete) verb=${verb:-$word};; esac
  last=$word
done
case $verb in create|exec)
  sleep 30 </dev/null >/dev/null 2>&1 &
  echo $! >made-$verb
  echo $! >$file;;
delete)
  [ -e slow ] && sleep 1.5
esac
exit 0
"#;

/// A container of the script's; gives its bundle.
fn create(pod: &mut Pod, id: &str) -> PathBuf {
    let path = |name: &str| pod.dir.path().join(name);
    let (program, bundle) = (path("runtime"), path("bundle"));
    std::fs::write(&program, RUNTIME).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::create_dir(&bundle).unwrap();
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let oci = OciRuntime {
        handler: "script".into(),
        program: text(&program),
        root: text(&path("runtime-root")),
        bundle: text(&bundle),
        config: Some(OciProcess::default()),
        ..Default::default()
    };
    let plan = Some(pod.plan(id, &["/bin/true"]));
    let call = CreateContainer { plan, oci: Some(oci), ..Default::default() };
    let reply = pod.call(Call::CreateContainer(call));
    assert!(matches!(reply, Body::ContainerCreated(_)), "{reply:?}");
    bundle
}

#[test]
fn an_exec_whose_terminal_does_not_arrive_is_ended() {
    let mut pod = Pod::ready();
    let bundle = create(&mut pod, "c1");
    pod.start("c1");
    let mut process = common::process(&["/bin/true"]);
    process.terminal = true;
    let call = Exec {
        exec_id: "e1".into(),
        container_id: "c1".into(),
        process: Some(process),
        timeout_ms: 0,
        oci: Some(OciProcess::default()),
        reply_at_exit: false,
    };
    let error = pod.fails(Call::Exec(call));
    assert!(error.message.contains("console socket"), "{error:?}");
    let pid = std::fs::read_to_string(bundle.join("made-exec")).unwrap();
    common::wait_for("the process's end", || !Path::new("/proc").join(pid.trim()).exists());
    assert_eq!(pod.entry("c1").state(), container_entry::State::Running);
    assert_eq!(pod.kill("c1").exit_code, 137);
}

#[test]
fn a_container_that_never_ran_has_no_exit_however_long_its_deletion_takes() {
    let mut pod = Pod::ready();
    let bundle = create(&mut pod, "c1");
    std::fs::write(bundle.join("slow"), "").unwrap();
    let removal = pod.send(Call::RemoveContainer(RemoveContainer { container_id: "c1".into() }), &[]);
    pod.assert_silent(Duration::from_millis(1300));
    assert_eq!(pod.exit_record("c1"), None);
    let reply = pod.reply(removal);
    assert!(matches!(reply, Body::Done(_)), "{reply:?}");
    assert!(pod.list().is_empty());
    pod.assert_silent(Duration::from_millis(50));
}

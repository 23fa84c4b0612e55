use std::path::PathBuf;

use stave_e2e::cri::ReopenContainerLogRequest;
use stave_e2e::{Config, Pod, eventually, parse_log, read_log};

use crate::{daemon_with_pod, sh};

/// The path of a container's log.
pub(crate) fn log_path(pod: &Pod, name: &str) -> PathBuf {
    PathBuf::from(&pod.config.log_directory).join(format!("{name}.log"))
}

/// Waits until a container's log has a line with this text.
pub(crate) async fn wait_for_line(pod: &Pod, name: &str, text: &str) {
    let path = log_path(pod, name);
    eventually(&format!("the line {text:?} in {}", path.display()), async || {
        let content = std::fs::read_to_string(&path).ok()?;
        // A line may be half written when we look.
        let whole = &content[..content.rfind('\n').map_or(0, |end| end + 1)];
        parse_log(whole).iter().any(|line| line.text == text).then_some(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_file_is_there_when_the_start_returns() {
    let (daemon, pod) = daemon_with_pod().await;
    let config = sh("nested", "sleep 60").with(|config| config.log_path = "deep/er/0.log".into());
    let id = daemon.run(&pod, &config).await.expect("start");
    let path = PathBuf::from(&pod.config.log_directory).join("deep/er/0.log");
    assert!(path.is_file());
    let status = daemon.cri.container(&id).await.expect("ContainerStatus");
    assert_eq!(PathBuf::from(status.log_path), path);
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(path.metadata().expect("log").permissions().mode() & 0o777, 0o640);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_log_path_means_no_log() {
    let (daemon, pod) = daemon_with_pod().await;
    let config = sh("silent", "echo lost").with(|config| config.log_path.clear());
    let id = daemon.run(&pod, &config).await.expect("start");
    let status = daemon.cri.exited(&id).await;
    assert_eq!((status.exit_code, status.log_path.as_str()), (0, ""));
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn long_lines_come_in_pieces_and_the_last_without_newline_is_kept() {
    let (daemon, pod) = daemon_with_pod().await;
    let script = "head -c 40000 /dev/zero | tr '\\0' x; echo; echo; echo 'tab\there'; printf 'no newline'";
    let id = daemon.run(&pod, &sh("long", script)).await.expect("start");
    daemon.cri.exited(&id).await;
    let log = read_log(log_path(&pod, "long"));
    let mut lines = vec![String::new()];
    for (index, entry) in log.iter().enumerate() {
        assert!(entry.text.len() <= 16 << 10, "an entry of {} bytes", entry.text.len());
        lines.last_mut().unwrap().push_str(&entry.text);
        if !entry.partial && index + 1 < log.len() {
            lines.push(String::new());
        }
    }
    assert_eq!(lines, ["x".repeat(40000), String::new(), "tab\there".into(), "no newline".into()]);
    assert!(log.windows(2).all(|pair| pair[0].time <= pair[1].time), "times grow");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn reopening_goes_on_in_a_new_file_and_loses_nothing() {
    let (daemon, pod) = daemon_with_pod().await;
    let script = "i=0; while [ $i -lt 400 ]; do i=$((i+1)); echo $i; [ $((i % 20)) = 0 ] && sleep 0.02; done";
    let id = daemon.run(&pod, &sh("counter", script)).await.expect("start");
    let path = log_path(&pod, "counter");
    let mut rotated = Vec::new();
    wait_for_line(&pod, "counter", "20").await;
    for number in 0..3 {
        let old = path.with_extension(number.to_string());
        std::fs::rename(&path, &old).expect("rename");
        rotated.push(old);
        let request = ReopenContainerLogRequest { container_id: id.clone() };
        match daemon.cri.reopen_container_log(request).await {
            Ok(_) => assert!(path.exists(), "the new file is there when the call returns"),
            // It has ended meanwhile; the test's machine was slow.
            Err(error) => {
                assert_eq!(error.code(), tonic::Code::FailedPrecondition, "{error:?}");
                break;
            }
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert_eq!(daemon.cri.exited(&id).await.exit_code, 0);
    if path.exists() {
        rotated.push(path);
    }
    let all: Vec<_> = rotated.iter().flat_map(read_log).map(|line| line.text).collect();
    let expected: Vec<_> = (1..=400).map(|number| number.to_string()).collect();
    assert_eq!(all, expected);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_reopen_makes_no_file() {
    let (daemon, pod) = daemon_with_pod().await;
    let id = daemon.run(&pod, &sh("ended", "exit 0")).await.expect("start");
    daemon.cri.exited(&id).await;
    let path = log_path(&pod, "ended");
    std::fs::remove_file(&path).expect("removal of the log");
    let request = ReopenContainerLogRequest { container_id: id };
    let error = daemon.cri.reopen_container_log(request).await.expect_err("a container that has ended");
    assert_eq!(error.code(), tonic::Code::FailedPrecondition, "{error:?}");
    assert!(!path.exists());
    let request = ReopenContainerLogRequest { container_id: "unknown".into() };
    let error = daemon.cri.reopen_container_log(request).await.expect_err("an unknown container");
    assert_eq!(error.code(), tonic::Code::NotFound, "{error:?}");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn much_output_passes_whole() {
    let (daemon, pod) = daemon_with_pod().await;
    let id = daemon.run(&pod, &sh("much", "seq 1 100000")).await.expect("start");
    assert_eq!(daemon.cri.exited(&id).await.exit_code, 0);
    // The last of it may be written a moment after the end is told.
    wait_for_line(&pod, "much", "100000").await;
    let log = read_log(log_path(&pod, "much"));
    assert_eq!(log.len(), 100_000);
    assert!(log.iter().enumerate().all(|(index, line)| line.text == (index + 1).to_string()));
    daemon.finish().await;
}

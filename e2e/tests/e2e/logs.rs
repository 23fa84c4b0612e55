use std::io::{Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::{Signal, kill};
use stave_e2e::cri::{Mount, ReopenContainerLogRequest};
use stave_e2e::{Config, Pod, eventually, parse_log, read_log};

use crate::container_anatomy::{host_pid, status_line};
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

/// For some seconds, or `STAVE_E2E_SECONDS`: output without a pause on both streams and lines of several records, while the
/// file is exchanged over and over.
#[tokio::test(flavor = "multi_thread")]
async fn rotation_under_full_load_loses_and_doubles_no_line() {
    let seconds = std::env::var("STAVE_E2E_SECONDS").map_or(5, |text| text.parse().expect("seconds"));
    let (daemon, pod) = daemon_with_pod().await;
    // awk counts fast, and its long lines end in the middle of a pipe's buffer.
    let script = "count() { awk 'BEGIN { for (l = \"-\"; length(l) < 40000; l = l l);
            for (n = 1; ; n++) print n (n % 5000 ? \"\" : l) }'; }
        count & count >&2";
    let id = daemon.run(&pod, &sh("load", script)).await.expect("start");
    let path = log_path(&pod, "load");
    // What was read, so that the disk holds one old file at most.
    let mut next = [1_u64, 1];
    let mut joined = [String::new(), String::new()];
    let mut read = |path: &PathBuf| {
        let (mut lines, size) = (0_u64, path.metadata().expect("log").len());
        for line in read_log(path) {
            let stream = usize::from(line.stream == "stderr");
            joined[stream].push_str(&line.text);
            if line.partial {
                assert_eq!(line.text.len(), 16 << 10);
                continue;
            }
            let whole = std::mem::take(&mut joined[stream]);
            let number = next[stream];
            let wanted = number.to_string();
            assert!(
                whole.starts_with(&wanted),
                "{wanted} expected, {:?} found",
                &whole[..whole.len().min(40)]
            );
            let rest = &whole.as_bytes()[wanted.len()..];
            assert_eq!(rest.len(), if number.is_multiple_of(5000) { 65536 } else { 0 }, "line {number}");
            assert!(rest.iter().all(|byte| *byte == b'-'), "line {number}");
            next[stream] += 1;
            lines += 1;
        }
        std::fs::remove_file(path).expect("removal");
        (lines, size)
    };
    let end = Instant::now() + Duration::from_secs(seconds);
    let (mut rotations, mut lines, mut bytes) = (0, 0, 0);
    let mut old: Option<PathBuf> = None;
    while Instant::now() < end {
        let rotated = path.with_extension(rotations.to_string());
        std::fs::rename(&path, &rotated).expect("rename");
        // The runtime writes on into the renamed file until it is told.
        tokio::time::sleep(Duration::from_millis(rotations % 7)).await;
        let request = ReopenContainerLogRequest { container_id: id.clone() };
        daemon.cri.reopen_container_log(request).await.expect("ReopenContainerLog");
        assert!(path.exists());
        if let Some(old) = old.replace(rotated) {
            let (more, size) = read(&old);
            (lines, bytes) = (lines + more, bytes + size);
        }
        rotations += 1;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    daemon.cri.stop(&id, 0).await.expect("stop");
    lines += read(&old.expect("rotations")).0;
    // The last may have been cut off by the end.
    let text = std::fs::read_to_string(&path).expect("log");
    assert!(parse_log(&text).len() as u64 + lines > 10_000, "{lines} lines");
    eprintln!("{rotations} rotations, {lines} lines, {bytes} bytes, none lost, none doubled");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stave_logs_follows_and_selects() {
    let (daemon, pod) = daemon_with_pod().await;
    let script = "echo one; echo two >&2; sleep 3; echo three; until [ -e /go ]; do sleep 0.1; done; \
                  seq 4 2000; printf '\\377\\376end'";
    let id = daemon.run(&pod, &sh("main", script)).await.expect("start");
    wait_for_line(&pod, "main", "three").await;
    let program = std::fs::read_link(format!("/proc/{}/exe", daemon.pid())).expect("exe");
    let command = |arguments: &[&str]| {
        let mut command = Command::new(&program);
        command.arg("--address").arg(daemon.socket()).arg("logs").args(arguments).arg("main");
        command
    };
    let text = |arguments: &[&str]| {
        let output = command(arguments).output().expect("stave logs");
        let (out, err) = (String::from_utf8(output.stdout), String::from_utf8(output.stderr));
        assert!(output.status.success(), "{err:?}");
        (out.expect("UTF-8"), err.expect("UTF-8"))
    };
    assert_eq!(text(&[]), ("one\nthree\n".into(), "two\n".into()));
    assert_eq!(text(&["--tail", "2"]), ("three\n".into(), "two\n".into()));
    assert_eq!(text(&["--tail", "0"]), (String::new(), String::new()));
    let stamp = read_log(log_path(&pod, "main"))[2].time.clone();
    assert_eq!(text(&["--since", &stamp]), ("three\n".into(), String::new()));
    assert_eq!(text(&["--since", "1h"]), ("one\nthree\n".into(), "two\n".into()));
    let (stamped, _) = text(&["--timestamps", "--tail", "1"]);
    assert!(stamped.ends_with("Z three\n") || stamped.contains('+'), "{stamped}");
    assert_eq!(stamped.find('T'), Some(10), "{stamped}");
    assert!(!command(&["--since", "soon"]).output().expect("stave logs").status.success());

    // Follows through a rotation, to the container's end.
    let following = command(&["-f", "--tail", "1"]).stdout(Stdio::piped()).spawn().expect("stave logs");
    tokio::time::sleep(Duration::from_millis(300)).await;
    let path = log_path(&pod, "main");
    std::fs::rename(&path, path.with_extension("old")).expect("rename");
    let request = ReopenContainerLogRequest { container_id: id.clone() };
    daemon.cri.reopen_container_log(request).await.expect("ReopenContainerLog");
    daemon.cri.shell(&id, "touch /go").await;
    let output = tokio::task::spawn_blocking(|| following.wait_with_output()).await;
    let output = output.expect("join").expect("stave logs");
    assert!(output.status.success());
    let mut expected: Vec<u8> = b"three\n".to_vec();
    (4..=2000).for_each(|n| expected.extend_from_slice(format!("{n}\n").as_bytes()));
    expected.extend_from_slice(b"\xff\xfeend");
    assert!(output.stdout.starts_with(&expected), "{} bytes", output.stdout.len());
    daemon.finish().await;
}

/// The processes that write and read are never at work at the same time, so the order is known.
#[tokio::test(flavor = "multi_thread")]
async fn the_log_keeps_the_order_in_which_the_streams_became_readable() {
    let (daemon, pod) = daemon_with_pod().await;
    let volume = daemon.directory().join("volume");
    std::fs::create_dir(&volume).expect("volume");
    let [go, done] = ["go", "done"].map(|name| {
        let path = volume.join(name);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)).expect("fifo");
        // For both directions, so that no side waits for the other to open it.
        std::fs::File::options().read(true).write(true).open(path).expect("fifo")
    });
    let script = "exec 3<>/volume/go 4<>/volume/done; while read n order <&3; do for stream in $order; do
        case $stream in stdout) echo $n ;; stderr) echo $n >&2 ;; esac; done; echo >&4; done";
    let config = sh("order", script).with(|config| {
        config.mounts = vec![Mount {
            host_path: volume.to_string_lossy().into_owned(),
            container_path: "/volume".into(),
            ..Default::default()
        }];
    });
    let id = daemon.run(&pod, &config).await.expect("start");
    let supervisor = status_line(host_pid(&daemon, &id).await, "PPid").parse().expect("a pid");
    let supervisor = nix::unistd::Pid::from_raw(supervisor);
    let path = log_path(&pod, "order");
    let mut expected = Vec::new();
    for n in 0..40 {
        // Both before the supervisor looks; one after the other; both, after one was read alone.
        let orders: &[&[&str]] = match n % 4 {
            0 => &[&["stderr", "stdout"]],
            1 => &[&["stdout", "stderr"]],
            2 => &[&["stdout"], &["stderr"], &["stdout"]],
            _ => &[&["stdout"], &["stderr", "stdout"], &["stdout", "stderr"]],
        };
        for order in orders {
            kill(supervisor, Signal::SIGSTOP).expect("SIGSTOP");
            stopped(supervisor);
            writeln!(&go, "{n} {}", order.join(" ")).expect("go");
            let mut fds = [PollFd::new(done.as_fd(), PollFlags::POLLIN)];
            let answered = poll(&mut fds, 20_000u16);
            kill(supervisor, Signal::SIGCONT).expect("SIGCONT");
            assert_eq!(answered, Ok(1), "the container writes");
            (&done).read_exact(&mut [0]).expect("done");
            expected.extend(order.iter().map(|stream| (stream.to_string(), n.to_string())));
            eventually("all that was written in the log", async || {
                let text = std::fs::read_to_string(&path).ok()?;
                (text.lines().count() >= expected.len() && text.ends_with('\n')).then_some(())
            })
            .await;
        }
    }
    let log: Vec<_> = read_log(&path).into_iter().map(|line| (line.stream, line.text)).collect();
    assert_eq!(log, expected);
    daemon.finish().await;
}

/// Waits until the kernel has stopped a process.
fn stopped(pid: nix::unistd::Pid) {
    let end = Instant::now() + stave_e2e::limit(10);
    while !status_line(pid.as_raw().unsigned_abs(), "State").starts_with('T') {
        assert!(Instant::now() < end, "process {pid} does not stop");
        std::thread::sleep(Duration::from_millis(1));
    }
}

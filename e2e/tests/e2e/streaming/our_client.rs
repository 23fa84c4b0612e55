//! `stave exec` and `stave attach`.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn on_a_terminal() {
    let (daemon, pod) = daemon_with_pod().await;
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    let mut shell = OnTerminal::spawn(&stave(&daemon, &["exec", "-it", "main", "sh"]));
    shell.write("tty; stty size\r");
    assert!(shell.read_until("24 80").contains("/dev/pts/"));
    assert!(shell.is_raw());
    shell.resize(132, 43);
    eventually("the new size", async || {
        // Not the echo: the shell's line editor puts escape sequences into it as it likes.
        shell.write("echo \"size=$(stty size)=\"\r");
        shell.read_until("=\r\n").contains("size=43 132=").then_some(())
    })
    .await;
    // Ctrl-C is the process's, not ours.
    shell.write("sleep 1000\r");
    eventually("sleep runs", async || processes(&daemon, &id).await.contains("sleep 1000").then_some(()))
        .await;
    shell.write("\x03");
    shell.write("echo st''ill there; exit 7\r");
    shell.read_until("still there");
    assert_eq!(shell.exit_code().await, Some(7));
    assert!(!shell.is_raw(), "restored");

    for signal in [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGINT] {
        let mut shell = OnTerminal::spawn(&stave(&daemon, &["exec", "-it", "main", "sleep", "1234"]));
        eventually("raw mode", async || shell.is_raw().then_some(())).await;
        kill(Pid::from_raw(shell.child.id() as i32), signal).expect("signal");
        assert_eq!(shell.exit_code().await, Some(128 + signal as i32));
        assert!(!shell.is_raw(), "restored after {signal}");
        eventually("the end of what it ran", async || {
            (!processes(&daemon, &id).await.contains("sleep 1234")).then_some(())
        })
        .await;
    }

    let tty = sh("tty", "while read line; do echo got $line; done").with(|c| (c.stdin, c.tty) = (true, true));
    let tty = daemon.run(&pod, &tty).await.expect("start");
    for round in ["one", "two"] {
        let mut attached = OnTerminal::spawn(&stave(&daemon, &["attach", "-it", "pod/tty"]));
        attached.write(&format!("{round}\r"));
        attached.read_until(&format!("got {round}"));
        attached.write("\x10\x11");
        assert_eq!(attached.exit_code().await, Some(0), "detached");
        assert!(!attached.is_raw());
    }
    assert_eq!(daemon.cri.container(&tty).await.expect("status").state(), ContainerState::ContainerRunning);
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn in_a_pipe() {
    let (mut daemon, pod) = daemon_with_pod().await;
    daemon.run(&pod, &echoing("main")).await.expect("start");
    let mut exec =
        Piped::spawn(stave(&daemon, &["exec", "-i", "main", "sh", "-c", "cat; echo err >&2; exit 9"]));
    exec.write("through\n");
    exec.close_stdin();
    assert_eq!(exec.finish(), (Some(9), "through\n".into(), "err\n".into()));
    let exec = Piped::spawn(stave(&daemon, &["exec", "-it", "main", "sh"]));
    let (code, _, err) = exec.finish();
    assert!(code == Some(1) && err.contains("needs a terminal"), "{err}");
    // As a shell has it, by each way there is.
    for way in [&["exec", "-i"][..], &["exec"], &["exec", "--timeout", "9"]] {
        for (command, exit, reason) in [
            ("no-such-command", 127, "exec: \"no-such-command\": executable file not found in $PATH"),
            ("/no/such/command", 127, "exec: \"/no/such/command\": no such file or directory"),
            ("/etc/passwd", 126, "exec: \"/etc/passwd\": permission denied"),
            ("/etc", 126, "exec: \"/etc\": is a directory"),
        ] {
            let exec = Piped::spawn(stave(&daemon, &[way, &["main", command]].concat()));
            let (code, _, err) = exec.finish();
            assert!(code == Some(exit) && err.contains(reason), "{way:?}: {code:?} {err}");
        }
    }

    // Across a restart: this attachment ends, the next one works.
    let mut attached = Piped::spawn(stave(&daemon, &["attach", "-i", "main"]));
    attached.write("before\n");
    attached.read_until("out before\n");
    daemon.kill();
    let (code, _, err) = attached.finish();
    assert!(code == Some(1) && err.contains("daemon"), "{err}");
    daemon.restart().await;
    let mut attached = Piped::spawn(stave(&daemon, &["attach", "-i", "main"]));
    attached.write("after\n");
    attached.read_until("out after\n");
    attached.close_stdin();
    assert_eq!(attached.finish().0, Some(0));
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn prints_all_of_it_or_says_that_it_does_not() {
    let (daemon, pod) = daemon_with_pod().await;
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    // More than a message of the CRI may hold.
    let script = "yes 0123456789abcdef | head -c 20000000; echo err >&2; exit 9";
    let output = stave(&daemon, &["exec", "main", "sh", "-c", script]).output().expect("stave exec");
    assert_eq!((output.status.code(), &*output.stderr), (Some(9), &b"err\n"[..]));
    assert!(
        output.stdout.iter().eq(b"0123456789abcdef\n".iter().cycle().take(20_000_000)),
        "{} bytes",
        output.stdout.len()
    );
    let limited = ["exec", "--timeout", "60", "main", "sh", "-c", script];
    let output = stave(&daemon, &limited).output().expect("stave exec");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.stdout.len() < 20_000_000 && stderr.contains("may be cut"), "{stderr}");
    // It is there when it is written, and what nobody reads any more ends.
    let mut exec = Piped::spawn(stave(&daemon, &["exec", "main", "sh", "-c", "echo now; exec yes and on"]));
    exec.read_until("now\n");
    exec.0.stdout = None;
    eventually("the end of what nobody reads", async || {
        (!processes(&daemon, &id).await.contains("yes and on")).then_some(())
    })
    .await;
    daemon.finish().await;
}

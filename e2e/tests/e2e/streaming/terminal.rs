//! The user's terminal: what our client, and crictl, make of it, and in which state they leave it.

use super::*;

/// `stave exec -it main COMMAND`, once the terminal is raw.
async fn raw(daemon: &Daemon, command: &[&str]) -> OnTerminal {
    let shell = OnTerminal::spawn(&stave(daemon, &[&["exec", "-it", "main"], command].concat()));
    eventually("raw mode", async || shell.is_raw().then_some(())).await;
    shell
}

async fn ends(daemon: &Daemon, id: &str, command: &str) {
    eventually("the end of what it ran", async || {
        (!processes(daemon, id).await.contains(command)).then_some(())
    })
    .await;
}

/// The state of a process: R, S, T.
fn state(pid: u32) -> char {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()).unwrap_or('-')
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_restored_after_every_signal_that_ends_us() {
    let (daemon, pod) = daemon_with_pod().await;
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    for signal in [Signal::SIGTERM, Signal::SIGQUIT, Signal::SIGALRM, Signal::SIGUSR1, Signal::SIGUSR2] {
        let mut shell = raw(&daemon, &["sleep", "1234"]).await;
        kill(Pid::from_raw(shell.child.id() as i32), signal).expect("signal");
        assert_eq!(shell.exit_code().await, Some(128 + signal as i32));
        assert!(!shell.is_raw(), "restored after {signal}");
    }
    // Its screen stands still: nobody reads what is to be shown, and the signal counts all the same.
    let mut shell = raw(&daemon, &["yes", "on and on"]).await;
    tokio::time::sleep(Duration::from_millis(700)).await;
    kill(Pid::from_raw(shell.child.id() as i32), Signal::SIGTERM).expect("signal");
    assert_eq!(shell.exit_code().await, Some(128 + 15));
    assert!(!shell.is_raw());
    ends(&daemon, &id, "yes on").await;
    // The terminal itself goes.
    let mut shell = raw(&daemon, &["sleep", "1234"]).await;
    let nothing = || File::open("/dev/null").expect("/dev/null");
    (shell.master, shell.terminal) = (nothing(), nothing().into());
    assert_eq!(shell.exit_code().await, Some(128 + 1));
    ends(&daemon, &id, "sleep 1234").await;
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_restored_when_the_other_side_goes() {
    let (mut daemon, pod) = daemon_with_pod().await;
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    let mut shell = raw(&daemon, &["sleep", "1234"]).await;
    let mut attached = {
        let tty = sh("tty", "sleep 1000").with(|c| (c.stdin, c.tty) = (true, true));
        daemon.run(&pod, &tty).await.expect("start");
        OnTerminal::spawn(&stave(&daemon, &["attach", "-it", "pod/tty"]))
    };
    eventually("raw mode", async || attached.is_raw().then_some(())).await;
    daemon.kill();
    for program in [&mut shell, &mut attached] {
        assert_eq!(program.exit_code().await, Some(1));
        assert!(!program.is_raw());
        let said = program.read_until("daemon");
        assert!(said.contains("stave: "), "{said}");
    }
    daemon.restart().await;
    // Of the same command in a container that is stopped under it.
    let mut shell = raw(&daemon, &["sleep", "4321"]).await;
    eventually("the command", async || processes(&daemon, &id).await.contains("sleep 4321").then_some(()))
        .await;
    daemon.cri.stop(&id, 0).await.expect("stop");
    assert_eq!(shell.exit_code().await, Some(137));
    assert!(!shell.is_raw());
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_restored_while_we_are_stopped_and_raw_again_after() {
    let (daemon, pod) = daemon_with_pod().await;
    daemon.run(&pod, &sleeper("main")).await.expect("start");
    let mut shell = raw(&daemon, &["sh"]).await;
    let pid = Pid::from_raw(shell.child.id() as i32);
    for _ in 0..2 {
        kill(pid, Signal::SIGTSTP).expect("SIGTSTP");
        eventually("a stop", async || (state(shell.child.id()) == 'T').then_some(())).await;
        assert!(!shell.is_raw(), "restored");
        shell.resize(99, 33);
        kill(pid, Signal::SIGCONT).expect("SIGCONT");
        eventually("raw mode", async || shell.is_raw().then_some(())).await;
    }
    eventually("the size that the terminal got meanwhile", async || {
        shell.write("echo \"size=$(stty size)=\"\r");
        shell.read_until("=\r\n").contains("size=33 99=").then_some(())
    })
    .await;
    shell.write("exit 5\r");
    assert_eq!(shell.exit_code().await, Some(5));
    assert!(!shell.is_raw());
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn crictl_attaches_to_a_terminal() {
    let (daemon, pod) = daemon_with_pod().await;
    let Some(crictl) = Crictl::at(&daemon.socket()) else { return daemon.finish().await };
    let tty = sh("tty", "while read line; do echo got $line $(stty size) e''nd; done; sleep 1000")
        .with(|c| (c.stdin, c.tty) = (true, true));
    let id = daemon.run(&pod, &tty).await.expect("start");
    for transport in TRANSPORTS {
        let mut attached = OnTerminal::spawn(&crictl.command(&["attach", "-r", transport, "-it", &id]));
        attached.resize(111, 44);
        eventually("the client's size", async || {
            attached.write(&format!("{transport}\r"));
            attached.read_until(" end\r\n").contains("44 111 end").then_some(())
        })
        .await;
        // It has no keys to detach; its end leaves the container alone.
        attached.child.kill().expect("SIGKILL");
        assert_eq!(
            daemon.cri.container(&id).await.expect("status").state(),
            ContainerState::ContainerRunning
        );
    }
    daemon.finish().await;
}

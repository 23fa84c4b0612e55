//! Streams of pods that are not as most: user namespaces, the node's network, servers on one family alone.

use std::net::{Shutdown, TcpListener};

use stave_e2e::cri::NamespaceMode;
use stave_e2e::{Options, pod};

use super::*;
use crate::container_anatomy::user::{daemon_with_user_namespace, inside};
use crate::{busybox, daemon};

#[tokio::test(flavor = "multi_thread")]
async fn in_a_user_namespace() {
    let (daemon, pod) = daemon_with_user_namespace().await;
    let id = daemon.run(&pod, &inside(echoing("main"))).await.expect("start");
    let script = "mkdir /www; echo the page >/www/index.html; echo up; exec httpd -f -p 80 -h /www";
    daemon.run(&pod, &inside(sh("web", script))).await.expect("start");
    crate::logs::wait_for_line(&pod, "web", "up").await;
    let tty = sh("tty", "while read line; do echo got $line; done").with(|c| (c.stdin, c.tty) = (true, true));
    daemon.run(&pod, &inside(tty)).await.expect("start");

    let mut exec = Piped::spawn(stave(&daemon, &["exec", "-i", "main", "sh", "-c", "cat; id -u; exit 9"]));
    exec.write("through\n");
    exec.close_stdin();
    assert_eq!(exec.finish(), (Some(9), "through\n0\n".into(), String::new()));
    // The namespaces of the exec are the container's.
    let of = |name: &str| format!("readlink /proc/self/ns/{name}; readlink /proc/1/ns/{name}");
    for name in ["user", "mnt", "pid", "net", "cgroup", "ipc", "uts"] {
        let links = daemon.cri.shell(&id, &of(name)).await;
        let (one, two) = links.split_once('\n').expect("two lines");
        assert_eq!(one, two.trim(), "{name}");
    }
    // A terminal in the container's own devpts, which it owns.
    let mut shell = OnTerminal::spawn(&stave(&daemon, &["exec", "-it", "main", "sh"]));
    shell.write("tty; stty size; stat -c %u $(tty); echo >$(tty) writ''able; exit 7\r");
    let seen = shell.read_until("writable");
    assert!(seen.contains("/dev/pts/") && seen.contains("24 80"), "{seen}");
    assert_eq!(shell.exit_code().await, Some(7));
    let mut attached = Piped::spawn(stave(&daemon, &["attach", "-i", "main"]));
    attached.write("hello\n");
    attached.read_until("out hello\n");
    let (code, _, err) = attached.finish();
    assert!(code == Some(0) && err.contains("err hello"), "{err}");
    let mut attached = OnTerminal::spawn(&stave(&daemon, &["attach", "-it", "pod/tty"]));
    attached.write("mapped\r");
    attached.read_until("got mapped");
    attached.write("\x10\x11");
    assert_eq!(attached.exit_code().await, Some(0));
    let mut forwarding = Piped::spawn(stave(&daemon, &["port-forward", "pod", ":80"]));
    forwards(&mut forwarding, "stave").await;
    forwarding.kill();
    if let Some(crictl) = Crictl::at(&daemon.socket()) {
        for transport in TRANSPORTS {
            let mut shell = OnTerminal::spawn(&crictl.command(&["exec", "-r", transport, "-it", &id, "sh"]));
            shell.write("tty; stty size; exit 0\r");
            assert!(shell.read_until("24 80").contains("/dev/pts/"), "{transport}");
            assert_eq!(shell.exit_code().await, Some(0), "{transport}");
            let mut attached = Piped::spawn(crictl.command(&["attach", "-r", transport, "-i", &id]));
            attached.write(&format!("{transport}\n"));
            attached.read_until(&format!("out {transport}\n"));
            assert_eq!(attached.finish().0, Some(0), "{transport}");
            let mut forwarding =
                Piped::spawn(crictl.command(&["port-forward", "-r", transport, &pod.id, ":80"]));
            forwards(&mut forwarding, transport).await;
            forwarding.kill();
        }
    }
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn on_the_nodes_network() {
    let daemon = daemon().await;
    let node = |config: &mut stave_e2e::cri::PodSandboxConfig| {
        config.namespaces().network = NamespaceMode::Node as i32;
        config.hostname.clear();
    };
    let pod = daemon.run_pod(pod("host").with(node)).await.expect("RunPodSandbox");
    // What listens on the node's loopback is the pod's.
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let port = listener.local_addr().expect("address").port().to_string();
    let server = std::thread::spawn(move || {
        for _ in 0..3 {
            let (mut stream, _) = listener.accept().expect("accept");
            let mut text = String::new();
            stream.read_to_string(&mut text).expect("request");
            write!(stream, "got {text}").expect("answer");
        }
    });
    let spec = format!(":{port}");
    let mut commands = vec![stave(&daemon, &["port-forward", "host", &spec])];
    if let Some(crictl) = Crictl::at(&daemon.socket()) {
        commands.extend(
            TRANSPORTS.map(|transport| crictl.command(&["port-forward", "-r", transport, &pod.id, &spec])),
        );
    }
    let missing = 3 - commands.len();
    for (n, command) in commands.into_iter().enumerate() {
        let mut forwarding = Piped::spawn(command);
        let mut stream = connect(local_port(&forwarding.read_until("\n")));
        write!(stream, "hello").expect("write");
        // Half-closed: the answer comes after the end of the question. crictl ends the whole connection then.
        let mut text = String::new();
        if n == 0 {
            stream.shutdown(Shutdown::Write).expect("shutdown");
            stream.read_to_string(&mut text).expect("read");
            assert_eq!(text, "got hello");
        }
        drop(stream);
        tokio::time::sleep(Duration::from_millis(200)).await;
        forwarding.kill();
    }
    assert!(missing == 0 || missing == 2, "{missing}");
    if missing == 0 {
        server.join().expect("all three came");
    }
    daemon.finish().await;
}

fn connect(port: u16) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", port)).expect("connect");
    stream.set_read_timeout(Some(stave_e2e::limit(20))).expect("timeout");
    stream
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_on_the_loopback_of_version_6_alone_and_a_half_close() {
    let (daemon, pod) = daemon_with_pod().await;
    let script = "mkdir /www; echo the page >/www/index.html; httpd -p [::1]:80 -h /www || exit 1; echo up; \
                  while :; do nc -l -p 81 -e sh -c 'echo sum $(wc -c)'; done";
    daemon.run(&pod, &sh("web", script)).await.expect("start");
    crate::logs::wait_for_line(&pod, "web", "up").await;
    let mut commands = vec![("stave", stave(&daemon, &["port-forward", "pod", ":80"]))];
    if let Some(crictl) = Crictl::at(&daemon.socket()) {
        commands.extend(TRANSPORTS.map(|transport| {
            (transport, crictl.command(&["port-forward", "-r", transport, &pod.id, ":80"]))
        }));
    }
    for (what, command) in commands {
        let mut forwarding = Piped::spawn(command);
        forwards(&mut forwarding, what).await;
        forwarding.kill();
    }
    // The sum can only be told after the end of the input.
    let mut forwarding = Piped::spawn(stave(&daemon, &["port-forward", "pod", ":81"]));
    let port = local_port(&forwarding.read_until("\n"));
    let mut text = String::new();
    for _ in 0..50 {
        let mut stream = connect(port);
        stream.write_all(&[b'x'; 300_000]).expect("write");
        stream.shutdown(Shutdown::Write).expect("shutdown");
        text.clear();
        // Between two connections nobody listens there for a moment.
        if stream.read_to_string(&mut text).is_ok() && !text.is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(text, "sum 300000\n");
    forwarding.kill();
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_for_one_use_and_nobody_else_s() {
    let (daemon, pod) = daemon_with_pod().await;
    let id = daemon.run(&pod, &sleeper("main")).await.expect("start");
    let request = ExecRequest {
        container_id: id.clone(),
        cmd: ["touch", "/ran"].map(str::to_owned).to_vec(),
        stdout: true,
        ..ExecRequest::default()
    };
    let url = daemon.cri.runtime.clone().exec(request).await.expect("Exec").into_inner().url;
    let (address, path) = url.strip_prefix("http://").and_then(|url| url.split_once('/')).expect("a URL");
    let ask = |path: &str| {
        let mut stream = TcpStream::connect(address).expect("connect");
        stream.set_read_timeout(Some(stave_e2e::limit(20))).expect("timeout");
        write!(stream, "GET /{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").expect("request");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("answer");
        text.split(' ').nth(1).and_then(|code| code.parse::<u16>().ok()).expect("a status")
    };
    let token = path.rsplit('/').next().expect("a token");
    let forged: String = token.chars().rev().collect();
    assert_eq!(ask(&format!("exec/{forged}")), 404);
    assert_eq!(ask(path), 400, "no upgrade, and the token is used up");
    assert_eq!(ask(path), 404);
    let found = daemon.cri.exec(&id, &["test", "-e", "/ran"]).await.expect("ExecSync").exit_code;
    assert_eq!(found, 1, "nothing ran");
    daemon.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_reads_an_attachment_too_slowly_is_dropped_and_told_and_the_container_never_waits() {
    let port = TcpListener::bind("127.0.0.1:0").expect("a free port").local_addr().expect("address").port();
    let config = format!("\n[metrics]\naddress = \"127.0.0.1:{port}\"\n");
    let daemon = Daemon::with(Options { config, ..Options::default() }).await;
    daemon.cri.pull(&busybox()).await.expect("PullImage");
    let pod = daemon.run_pod(pod("pod")).await.expect("RunPodSandbox");
    let script = "read x; yes 0123456789abcdef | head -c 60000000; touch /through; sleep 1000";
    let id = daemon.run(&pod, &sh("main", script).with(|c| c.stdin = true)).await.expect("start");
    let mut slow = Piped::spawn(stave(&daemon, &["attach", "-i", "main"]));
    slow.write("go\n");
    eventually("the container's end of writing", async || {
        let answer = daemon.cri.exec(&id, &["test", "-e", "/through"]).await.expect("ExecSync");
        (answer.exit_code == 0).then_some(())
    })
    .await;
    let stdout = slow.0.stdout.take().expect("stdout");
    let got = std::io::read_to_string(stdout).expect("stdout");
    assert!(got.len() < 60_000_000 && got.len() > 100_000, "{} bytes", got.len());
    let mut said = String::new();
    slow.0.stderr.take().expect("stderr").read_to_string(&mut said).expect("stderr");
    assert!(said.contains("slower than the container writes"), "{said}");
    assert_eq!(slow.0.wait().expect("wait").code(), Some(1));
    let counted = crate::metrics::sample(port, "stave_attachments_dropped_total");
    assert_eq!(counted, Some(1));
    daemon.finish().await;
}

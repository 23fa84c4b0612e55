//! A streaming server with TLS.

use stave_e2e::Options;

use super::*;
use crate::busybox;

/// Makes `NAME.crt` and `NAME.key` in the directory: self-signed, for localhost.
fn certificate(directory: &std::path::Path, name: &str) {
    let file = |suffix: &str| directory.join(format!("{name}.{suffix}"));
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"])
        .args(["-days", "2", "-subj", "/CN=test", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"])
        .arg("-out")
        .arg(file("crt"))
        .arg("-keyout")
        .arg(file("key"))
        .output()
        .expect("this test needs the openssl command");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_clients_speak_tls_and_take_no_other_certificate() {
    let files = tempfile::tempdir().expect("tempdir");
    let files = files.path();
    certificate(files, "used");
    certificate(files, "new");
    let dir = files.display();
    let config = format!("tls_certificate = \"{dir}/used.crt\"\ntls_key = \"{dir}/used.key\"\n");
    let daemon = Daemon::with(Options { config, ..Options::default() }).await;
    daemon.cri.pull(&busybox()).await.expect("PullImage");
    let pod = daemon.run_pod(stave_e2e::pod("pod")).await.expect("RunPodSandbox");
    let id = daemon.run(&pod, &echoing("main")).await.expect("start");
    web_server(&daemon, &pod).await;
    let request = ExecRequest {
        container_id: id.clone(),
        cmd: vec!["true".into()],
        stdout: true,
        ..ExecRequest::default()
    };
    let url = daemon.cri.runtime.clone().exec(request).await.expect("Exec").into_inner().url;
    assert!(url.starts_with("https://127.0.0.1:"), "{url}");

    // Twice: with another certificate the second time, which the daemon takes over while it runs.
    for _ in 0..2 {
        let mut exec =
            Piped::spawn(stave(&daemon, &["exec", "-i", "main", "sh", "-c", "cat; echo err >&2; exit 9"]));
        let sent = "through\n".repeat(100_000);
        let mut stdin = exec.0.stdin.take().expect("stdin");
        let text = sent.clone();
        let feed = std::thread::spawn(move || stdin.write_all(text.as_bytes()).expect("write"));
        let stdout = exec.0.stdout.take().expect("stdout");
        let got = std::io::read_to_string(stdout).expect("stdout");
        feed.join().expect("feed");
        assert!(got == sent, "{} bytes", got.len());
        assert_eq!(exec.0.wait().expect("wait").code(), Some(9));

        let mut shell = OnTerminal::spawn(&stave(&daemon, &["exec", "-it", "main", "sh"]));
        shell.write("stty size; exit 3\r");
        shell.read_until("24 80");
        assert_eq!(shell.exit_code().await, Some(3));

        let mut attached = Piped::spawn(stave(&daemon, &["attach", "-i", "main"]));
        attached.write("hello\n");
        attached.read_until("out hello\n");
        assert_eq!(attached.finish().0, Some(0));

        let mut forwarding = Piped::spawn(stave(&daemon, &["port-forward", "pod", ":80"]));
        forwards(&mut forwarding, "stave").await;
        forwarding.kill();

        if let Some(crictl) = Crictl::at(&daemon.socket()) {
            for transport in TRANSPORTS {
                let (ca, key) = (format!("{dir}/used.crt"), format!("{dir}/used.key"));
                // It wants a certificate of its own as well, which nobody asks it for.
                let own = ["--tls-cert", &ca, "--tls-key", &key, "--tls-sni", "localhost"];
                let exec = |ca: &str| {
                    let first = ["exec", "-r", transport, "--tls-ca", ca];
                    crictl.output(&[&first[..], &own, &[&id, "echo", "hi"]].concat())
                };
                let output = exec(&ca);
                let stderr = String::from_utf8_lossy(&output.stderr);
                assert_eq!(String::from_utf8_lossy(&output.stdout), "hi\n", "{transport}: {stderr}");
                let other = format!("{dir}/new.crt");
                if std::fs::read(&ca).expect("ca") != std::fs::read(&other).expect("ca") {
                    let output = exec(&other);
                    let stderr = String::from_utf8_lossy(&output.stderr);
                    assert!(
                        !output.status.success() && stderr.contains("certificate"),
                        "{transport}: {stderr}"
                    );
                }
            }
        }
        for suffix in ["crt", "key"] {
            std::fs::copy(files.join(format!("new.{suffix}")), files.join(format!("used.{suffix}")))
                .expect("copy");
        }
        // Longer than the daemon goes without a look at the files.
        tokio::time::sleep(Duration::from_millis(3300)).await;
    }
    daemon.finish().await;
}

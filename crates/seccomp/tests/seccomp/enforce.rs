//! Filters in the kernel. A filter is for the thread that installs it and for what that thread starts.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use stave_seccomp::{Cache, compile, parse, runtime_default};

const DEFAULT_CAPS: u64 = 0xa804_25fb;

/// Runs `body` under a filter, in a thread of its own.
fn under<T: Send>(program: &[u8], body: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            rustix::thread::set_no_new_privs(true).unwrap();
            stave_sys::install_seccomp_filter(program, 0).unwrap();
            body()
        });
        thread.join().unwrap()
    })
}

fn profile(json: &str) -> Vec<u8> {
    compile(&parse(json, "test").unwrap(), 0).unwrap().program
}

fn default() -> Vec<u8> {
    compile(runtime_default(), DEFAULT_CAPS).unwrap().program
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// A call by number, with arguments, by a program whose libc has no say: its errno, 0 for success.
fn call_errno(nr: i64, args: &[u64]) -> i32 {
    let args: Vec<String> = args.iter().map(u64::to_string).collect();
    let call = [vec![nr.to_string()], args].concat().join(", ");
    let script = format!("$r = syscall({call}); print $r == -1 ? $! + 0 : 0");
    stdout(&Command::new("perl").args(["-e", &script]).output().unwrap()).parse().unwrap()
}

#[test]
fn a_named_call_fails_with_its_errno() {
    let dir = tempfile::tempdir().unwrap();
    let filter = profile(
        r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28},
            {"names": ["sethostname"], "action": "SCMP_ACT_ERRNO"}]}"#,
    );
    under(&filter, || {
        assert_eq!(rustix::fs::mkdir(dir.path().join("a"), 0o700.into()), Err(Errno::NOSPC));
        assert_eq!(rustix::system::sethostname(b"x"), Err(Errno::PERM));
        fs::write(dir.path().join("b"), "b").unwrap();
        let status = fs::read_to_string("/proc/thread-self/status").unwrap();
        assert!(status.contains("Seccomp:\t2"), "{status}");
    });
    // This thread has none.
    rustix::fs::mkdir(dir.path().join("a"), 0o700.into()).unwrap();
}

#[test]
fn arguments_are_compared() {
    // socketpair: family 1, and types by each operator.
    for (op, value, two, refused) in [
        ("EQ", 2, 0, [false, true, false]),
        ("NE", 2, 0, [true, false, true]),
        ("LT", 2, 0, [true, false, false]),
        ("LE", 2, 0, [true, true, false]),
        ("GT", 2, 0, [false, false, true]),
        ("GE", 2, 0, [false, true, true]),
        ("MASKED_EQ", 4, 4, [false, false, true]),
    ] {
        let filter = profile(&format!(
            r#"{{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{{"names": ["socketpair"], "action": "SCMP_ACT_ERRNO",
                "errnoRet": 95, "args": [{{"index": 1, "value": {value}, "valueTwo": {two}, "op": "SCMP_CMP_{op}"}}]}}]}}"#
        ));
        let types = [SocketType::STREAM, SocketType::DGRAM, SocketType::SEQPACKET];
        let got = under(&filter, || {
            types.map(|kind| {
                let made = rustix::net::socketpair(AddressFamily::UNIX, kind, SocketFlags::empty(), None);
                assert!(made.is_ok() || made.as_ref().err() == Some(&Errno::OPNOTSUPP), "{made:?}");
                made.is_err()
            })
        });
        assert_eq!(got, refused, "{op}");
    }
}

/// With jumps further than a branch can go.
#[test]
fn the_kernel_takes_a_large_filter() {
    let rule = |i: u32| {
        format!(
            r#"{{"names": ["socketpair"], "action": "SCMP_ACT_ERRNO", "errnoRet": {},
                "args": [{{"index": 2, "value": {i}, "op": "SCMP_CMP_EQ"}}]}}"#,
            i + 1
        )
    };
    let rules: Vec<String> = (900..1700).map(rule).collect();
    let filter =
        profile(&format!(r#"{{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{}]}}"#, rules.join(",")));
    assert!(filter.len() / 8 > 3000);
    under(&filter, || {
        for (protocol, want) in [(900, 901), (1300, 1301), (1699, 1700), (1700, libc::EFAULT)] {
            let call = [1, 1, protocol, 0];
            assert_eq!(call_errno(libc::SYS_socketpair, &call), want);
        }
    });
}

#[test]
fn killing_and_trapping() {
    use std::os::unix::process::ExitStatusExt as _;
    for action in ["KILL_PROCESS", "KILL_THREAD", "TRAP"] {
        let filter = profile(&format!(
            r#"{{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_{action}"}}]}}"#
        ));
        let status =
            under(&filter, || Command::new("busybox").args(["mkdir", "/nonexistent/x"]).status().unwrap());
        assert_eq!(status.signal(), Some(libc::SIGSYS), "{action}");
    }
}

#[test]
fn the_default_refuses_what_breaks_out() {
    under(&default(), || {
        for (family, want) in
            [(38, Err(Errno::PERM)), (40, Err(Errno::PERM)), (1, Ok(())), (2, Ok(())), (16, Ok(()))]
        {
            let kind = if family == 16 { SocketType::RAW } else { SocketType::DGRAM };
            let made = rustix::net::socket(AddressFamily::from_raw(family), kind, None).map(drop);
            assert_eq!(made, want, "family {family}");
        }
        assert_eq!(rustix::system::sethostname(b"x"), Err(Errno::PERM));
        // All of these with arguments that do no harm where they are let through. Number, arguments, errno.
        let shell = 0x7fff_0000;
        for (nr, args, want) in [
            (libc::SYS_unshare, [libc::CLONE_NEWUSER as u64, 0, 0], libc::EPERM),
            (libc::SYS_setns, [shell, 0, 0], libc::EPERM),
            (libc::SYS_mount, [0, 0, 0], libc::EPERM),
            (libc::SYS_umount2, [0, 0, 0], libc::EPERM),
            (libc::SYS_pivot_root, [0, 0, 0], libc::EPERM),
            (libc::SYS_fsopen, [0, 0, 0], libc::EPERM),
            (libc::SYS_open_tree, [shell, 0, 0], libc::EPERM),
            (libc::SYS_keyctl, [shell, 0, 0], libc::EPERM),
            (libc::SYS_add_key, [0, 0, 0], libc::EPERM),
            (libc::SYS_bpf, [shell, 0, 0], libc::EPERM),
            (libc::SYS_perf_event_open, [0, 0, 0], libc::EPERM),
            (libc::SYS_kexec_load, [0, shell, 0], libc::EPERM),
            (libc::SYS_init_module, [0, 0, 0], libc::EPERM),
            (libc::SYS_open_by_handle_at, [shell, 0, 0], libc::EPERM),
            (libc::SYS_userfaultfd, [shell, 0, 0], libc::EPERM),
            (libc::SYS_io_uring_setup, [0, 0, 0], libc::EPERM),
            (libc::SYS_swapon, [0, 0, 0], libc::EPERM),
            (libc::SYS_reboot, [0, 0, 0], libc::EPERM),
            (libc::SYS_syslog, [shell, 0, 0], libc::EPERM),
            (libc::SYS_personality, [0x4_0000, 0, 0], libc::EPERM),
            (libc::SYS_clone, [libc::CLONE_NEWUSER as u64, 0, 0], libc::EPERM),
            (libc::SYS_clone3, [0, 0, 0], libc::ENOSYS),
            (600, [0, 0, 0], libc::ENOSYS),
            // The family with a bit that the kernel doesn't look at.
            (libc::SYS_socket, [38 | 1 << 32, 5, 0], libc::EPERM),
            (libc::SYS_personality, [0xffff_ffff, 0, 0], 0),
            (libc::SYS_getpid, [0, 0, 0], 0),
        ] {
            assert_eq!(call_errno(nr, &args), want, "call {nr} {args:x?}");
        }
    });
    // With the capability it is the kernel that answers.
    let admin = compile(runtime_default(), 1 << 21).unwrap().program;
    under(&admin, || {
        assert_eq!(call_errno(libc::SYS_setns, &[0x7fff_0000, 0]), libc::EBADF);
        assert_eq!(call_errno(libc::SYS_fsopen, &[0, 0]), libc::EFAULT);
    });
}

#[test]
fn programs_work_under_the_default() {
    let dir = tempfile::tempdir().unwrap();
    let script = r#"
        set -e
        mkdir -p a/b; echo one > a/b/f; ln -s f a/b/l; ln a/b/f a/b/h; cp -a a c; mv c d; chmod 640 d/b/f; chown 0:0 d/b/f
        touch -d 2020-01-01 d/b/f; stat -c %a d/b/f; cat d/b/l | sort | wc -l
        tar czf x.tgz a d; mkdir e; tar xzf x.tgz -C e; find e -type l | wc -l; du -s e >/dev/null; df . >/dev/null
        dd if=/dev/urandom of=r bs=1k count=8 2>/dev/null; sha256sum r | cut -c 65-; gzip r; gunzip r.gz; truncate -s 0 r
        mkfifo p; (echo through > p &); cat p; mknod n c 1 3; cat n; sync
        seq 9 | awk '{ s += $1 } END { print s }'; seq 3 | sed s/2/two/ | xargs echo
        ip addr show lo | grep -c LOOPBACK; hostname >/dev/null; id -u; ps >/dev/null; free >/dev/null; uptime >/dev/null
        date >/dev/null; sleep 0.01; nice -n 5 true; ulimit -n >/dev/null; timeout 5 true
        (trap 'echo caught' TERM; kill -TERM $(sh -c 'echo $PPID'); true)
        rm -r a d e; env -i sh -c 'echo end'
    "#;
    let expected = "640\n1\n2\n  r\nthrough\n45\n1 two 3\n1\n0\ncaught\nend\n";
    let filter = default();
    let run = |shell: &[&str]| {
        let work = dir.path().join(shell.len().to_string());
        fs::create_dir(&work).unwrap();
        let mut command = Command::new(shell[0]);
        command.args(&shell[1..]).args(["-c", script]).current_dir(&work);
        let output = under(&filter, || command.output().unwrap());
        assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{shell:?}");
        assert_eq!(stdout(&output), expected, "{shell:?}");
    };
    // Static, and the same with what a distribution links dynamically.
    run(&["busybox", "sh"]);
    run(&["sh"]);
    // Threads: glibc takes clone where clone3 isn't there.
    under(&filter, || {
        let threads: Vec<_> = (0..8).map(|i| std::thread::spawn(move || i)).collect();
        assert_eq!(threads.into_iter().map(|t| t.join().unwrap()).sum::<i32>(), 28);
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let client = std::thread::spawn(move || std::net::TcpStream::connect(address).unwrap());
        listener.accept().unwrap();
        client.join().unwrap();
    });
}

/// A profile that was seen must not be felt. Times are many times what they should be, for busy machines.
#[test]
fn times() {
    let cache = Cache::default();
    let start = Instant::now();
    let first = cache.runtime_default(DEFAULT_CAPS).unwrap();
    let compiled = start.elapsed();
    let text = include_str!("../../default.json");
    cache.profile(text, "default.json", DEFAULT_CAPS).unwrap();
    let time = |f: &dyn Fn()| {
        let mut times: Vec<Duration> = (0..101)
            .map(|_| {
                let start = Instant::now();
                f();
                start.elapsed()
            })
            .collect();
        times.sort();
        times[50]
    };
    let cached = time(&|| drop(cache.runtime_default(DEFAULT_CAPS).unwrap()));
    let by_content = time(&|| drop(cache.profile(text, "default.json", DEFAULT_CAPS).unwrap()));
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("default.json");
    let by_file = time(&|| drop(cache.file(&path, DEFAULT_CAPS).unwrap()));
    println!(
        "{} instructions; first {compiled:?}; seen {cached:?}, by content {by_content:?}, by file {by_file:?}",
        first.program.len() / 8
    );
    assert!(by_file < Duration::from_millis(1), "{by_file:?}");
}

//! Real containers, from a busybox root file system. Needs root, and the package busybox-static.
//!
//! Usage: `containers [FILTER]`, or `containers --bench` for times (median of 200). One thread: the executor forks.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, missing_docs, unreachable_pub)]

mod bundle;
mod exec;
mod file_systems;
mod images;
mod pid_namespaces;
mod processes;
mod security;
mod terminals;
mod user_namespaces;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

pub type Case = (&'static str, fn());

fn main() {
    assert!(rustix::process::geteuid().is_root(), "these tests need root");
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.iter().any(|a| a == "--bench") {
        return bench();
    }
    let list = args.iter().any(|a| a == "--list");
    let filter = args.iter().find(|a| !a.starts_with("--")).cloned().unwrap_or_default();
    let groups: [(&str, &[Case]); 8] = [
        ("processes", processes::CASES),
        ("file_systems", file_systems::CASES),
        ("images", images::CASES),
        ("security", security::CASES),
        ("exec", exec::CASES),
        ("pid_namespaces", pid_namespaces::CASES),
        ("terminals", terminals::CASES),
        ("user_namespaces", user_namespaces::CASES),
    ];
    let mut failed = Vec::new();
    let mut count = 0;
    for (group, cases) in groups {
        for (name, case) in cases {
            let name = format!("{group}::{name}");
            if !name.contains(&filter) {
                continue;
            }
            if list {
                println!("{name}: test");
                continue;
            }
            count += 1;
            let start = Instant::now();
            let passed = catch_unwind(AssertUnwindSafe(case)).is_ok();
            println!(
                "test {name} ... {} ({} ms)",
                if passed { "ok" } else { "FAILED" },
                start.elapsed().as_millis()
            );
            if !passed {
                failed.push(name);
            }
        }
    }
    if !list {
        println!("\ntest result: {} passed; {} failed", count - failed.len(), failed.len());
        assert!(count > 0, "no test matches {filter:?}");
    }
    if !failed.is_empty() {
        println!("failed: {}", failed.join(", "));
        std::process::exit(1);
    }
}

fn bench() {
    use stave_executor::Report;
    let mut times: [Vec<u128>; 3] = Default::default();
    for _ in 0..200 {
        let bundle = bundle::Bundle::new();
        let (stdio, _pipes) = bundle::stdio();
        let begin = Instant::now();
        let mut init = stave_executor::create(&bundle.plan, Some(stdio), None).unwrap();
        times[0].push(begin.elapsed().as_micros());
        assert!(matches!(bundle::report(&mut init), Report::Ready { .. }));
        times[1].push(begin.elapsed().as_micros());
        let begin = Instant::now();
        init.start().unwrap();
        assert!(matches!(bundle::report(&mut init), Report::ExecDone));
        times[2].push(begin.elapsed().as_micros());
        bundle::wait(init.pidfd());
    }
    let names = ["create returns", "create to ready", "start to execve"];
    for (name, times) in names.iter().zip(&mut times) {
        times.sort_unstable();
        println!("{name}: {} us, p99 {} us", times[times.len() / 2], times[times.len() * 99 / 100]);
    }
    let mut bundle = bundle::Bundle::new();
    let (init, _pipes) = bundle.sh("sleep 1000").start(None).unwrap();
    let mut times: Vec<u128> = (0..200)
        .map(|_| {
            let begin = Instant::now();
            bundle.exec(&init, &bundle::process(&["true"])).unwrap();
            begin.elapsed().as_micros()
        })
        .collect();
    times.sort_unstable();
    println!("exec of true to its end: {} us, p99 {} us", times[100], times[198]);
    bundle::kill(&init);
}

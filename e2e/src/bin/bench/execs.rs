//! ExecSync: how long one takes when nothing else goes on, and whether many leave anything behind.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use stave_e2e::container;
use stave_e2e::cri::VersionRequest;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use crate::procfs::{children, cpu_time, descriptors, processes, pss};
use crate::{Runtime, floor, pod_config, remove, start};

/// Execs one after the other, of each runtime.
const SERIAL: usize = 300;
const WARM_UP: usize = 30;
/// Of the sustained execs.
const A_SECOND: u32 = 200;
/// That may run at once.
const AT_ONCE: usize = 64;

/// First the idle latency of each runtime, turn by turn; then `count` execs at [`A_SECOND`], runtime by runtime.
pub(crate) async fn run(count: usize, image: &str, directory: &str, runtimes: &[Runtime]) -> Result<()> {
    let main = container("main", image, &["sleep", "36000"]);
    let mut started = Vec::new();
    for runtime in runtimes {
        started.push(start(runtime, &pod_config(directory, &runtime.name, 0), &main).await?);
    }
    let mut times = vec![Vec::new(); runtimes.len()];
    let mut cpu = vec![Duration::ZERO; runtimes.len()];
    for round in 0..WARM_UP + SERIAL {
        for (index, (runtime, (_, id, supervisor))) in runtimes.iter().zip(&started).enumerate() {
            let begin = Instant::now();
            let result = runtime.cri.exec(id, &["true"]).await?;
            ensure!(result.exit_code == 0, "{}: true ended with {}", runtime.name, result.exit_code);
            times[index].push(begin.elapsed());
            if round + 1 == WARM_UP {
                times[index].clear();
                cpu[index] = used(runtime.pid, *supervisor);
            }
        }
    }
    let mut calls = vec![Vec::new(); runtimes.len()];
    for _ in 0..SERIAL {
        for (runtime, times) in runtimes.iter().zip(&mut calls) {
            let begin = Instant::now();
            runtime.cri.version(VersionRequest::default()).await?;
            times.push(begin.elapsed());
        }
    }
    let mut floors = Vec::new();
    for (_, _, supervisor) in &started {
        floors.push(floor::measure(*supervisor, SERIAL)?);
    }
    println!("ExecSync(true), one after the other, {SERIAL} times; ms");
    for (index, (runtime, (_, _, supervisor))) in runtimes.iter().zip(&started).enumerate() {
        let spent = used(runtime.pid, *supervisor).saturating_sub(cpu[index]);
        print!("{:<12} {}", runtime.name, quantiles(&mut times[index]));
        print!(", processor {:.2} an exec", spent.as_secs_f64() * 1e3 / SERIAL as f64);
        let floor = floors[index].get(SERIAL / 2).copied().unwrap_or_default();
        println!("; the same process by system calls alone: p50 {floor:.2}");
        println!("{:<12} a call that does nothing (Version): {}", "", quantiles(&mut calls[index]));
    }
    for (runtime, (pod, id, supervisor)) in runtimes.iter().zip(&started) {
        sustained(runtime, id, *supervisor, count).await?;
        remove(runtime, pod).await?;
    }
    Ok(())
}

async fn sustained(runtime: &Runtime, id: &str, supervisor: u32, count: usize) -> Result<()> {
    println!("\n{}: {count} times ExecSync(true), {A_SECOND} a second", runtime.name);
    println!(
        "{:>8} {:>12} {:>9} {:>15} {:>9} {:>9} {:>10}",
        "execs", "daemon KiB", "its fds", "supervisor KiB", "its fds", "children", "processes"
    );
    let print = |done: usize| {
        let kib = |pid| pss(pid).unwrap_or_default();
        println!(
            "{done:>8} {:>12} {:>9} {:>15} {:>9} {:>9} {:>10}",
            kib(runtime.pid),
            descriptors(runtime.pid),
            kib(supervisor),
            descriptors(supervisor),
            children(supervisor).len(),
            processes().len()
        );
    };
    print(0);
    let (begin, cpu) = (Instant::now(), used(runtime.pid, supervisor));
    let slots = Arc::new(Semaphore::new(AT_ONCE));
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / A_SECOND);
    // Those that came too late are caught up with: the rate is what is promised.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut running = JoinSet::new();
    let mut times = Vec::with_capacity(count);
    for number in 0..count {
        if number > 0 && number % (count / 5).max(1) == 0 {
            // At rest, so that what runs at the moment is not counted.
            while let Some(done) = running.join_next().await {
                times.push(done??);
            }
            print(number);
        }
        ticks.tick().await;
        let slot = Arc::clone(&slots).acquire_owned().await?;
        let (cri, id) = (runtime.cri.clone(), id.to_owned());
        running.spawn(async move {
            let begin = Instant::now();
            let result = cri.exec(&id, &["true"]).await?;
            ensure!(result.exit_code == 0, "true ended with {}", result.exit_code);
            drop(slot);
            Ok(begin.elapsed())
        });
    }
    while let Some(done) = running.join_next().await {
        times.push(done??);
    }
    let wall = begin.elapsed();
    tokio::time::sleep(Duration::from_millis(200)).await;
    print(count);
    let cpu = used(runtime.pid, supervisor).saturating_sub(cpu);
    println!(
        "{:.0} a second; ms {}, processor {:.2} an exec",
        count as f64 / wall.as_secs_f64(),
        quantiles(&mut times),
        cpu.as_secs_f64() * 1e3 / count as f64
    );
    Ok(())
}

/// Processor time of the daemon, and of the supervisor with what it has reaped.
fn used(daemon: u32, supervisor: u32) -> Duration {
    cpu_time(daemon).unwrap_or_default() + cpu_time(supervisor).unwrap_or_default()
}

fn quantiles(times: &mut [Duration]) -> String {
    times.sort();
    let at = |part: usize| {
        times.get(times.len().saturating_sub(1) * part / 100).copied().unwrap_or_default().as_secs_f64() * 1e3
    };
    format!("p50 {:.2}, p95 {:.2}, p99 {:.2}", at(50), at(95), at(99))
}

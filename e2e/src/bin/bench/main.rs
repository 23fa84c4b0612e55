//! How long the calls of a pod's life take, for several runtimes in one run, turn by turn; and the memory that a
//! daemon and a pod's supervisor take. `hack/bench` starts the runtimes and this.
//!
//! ```text
//! bench life:ROUNDS|execs:COUNT|logs:MIB|forward:MIB|up:COUNT|seccomp:ROUNDS IMAGE DIRECTORY NAME=SOCKET:PID [NAME=SOCKET:PID...]
//! ```
//!
//! With `BENCH_CNI` naming a CNI configuration list, its plugins are run by themselves in each round too, and what the first
//! runtime takes beside them is told.
//!
//! The first runtime is the one that the others are compared with. DIRECTORY is for logs.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "a table on stdout is what it is for")]

mod execs;
mod floor;
mod forward;
mod logs;
mod procfs;
mod seccomp;
mod up;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use stave_e2e::cri::PodSandboxConfig;
use stave_e2e::{Chain, Cri, container, pod};

use crate::procfs::{processes, program, pss};

/// Rounds before those that count.
const WARM_UP: usize = 3;
/// Pods that are up at once while memory is measured.
const PODS: usize = 10;

const STEPS: [&str; 8] = [
    "RunPodSandbox",
    "CreateContainer",
    "StartContainer",
    "pod and container to running",
    "ExecSync(true)",
    "StopContainer(0)",
    "StopPodSandbox",
    "RemovePodSandbox",
];

struct Runtime {
    name: String,
    socket: PathBuf,
    pid: u32,
    cri: Cri,
    times: BTreeMap<&'static str, Vec<Duration>>,
}

fn main() -> Result<()> {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    // Before there are threads.
    if arguments.first().is_some_and(|first| first == floor::ARGUMENT) {
        return floor::main(&arguments.split_off(1));
    }
    // What is measured is the runtime: a client with several threads wakes two more of its own for each call.
    let threads =
        arguments.first().is_some_and(|mode| mode.starts_with("logs:") || mode.starts_with("forward:"));
    let mut runtime = match threads {
        true => tokio::runtime::Builder::new_multi_thread(),
        false => tokio::runtime::Builder::new_current_thread(),
    };
    runtime.enable_all().build()?.block_on(run(arguments))
}

async fn run(arguments: Vec<String>) -> Result<()> {
    let mut arguments = arguments.into_iter();
    let (Some(mode), Some(image), Some(directory)) = (arguments.next(), arguments.next(), arguments.next())
    else {
        bail!("usage: bench MODE:NUMBER IMAGE DIRECTORY NAME=SOCKET:PID...");
    };
    let (mode, number) = mode.split_once(':').with_context(|| format!("{mode}: no MODE:NUMBER"))?;
    let number: usize = number.parse().with_context(|| format!("{mode}:{number}"))?;
    let mut runtimes = Vec::new();
    for argument in arguments {
        runtimes.push(connect(&argument).await?);
    }
    for runtime in &runtimes {
        runtime.cri.pull(&image).await.with_context(|| format!("{}: pull of {image}", runtime.name))?;
    }
    match mode {
        "life" => lives(number, &image, &directory, runtimes).await,
        "execs" => execs::run(number, &image, &directory, &runtimes).await,
        "logs" => logs::run(number, &image, &directory, &runtimes).await,
        "forward" => forward::run(number, &image, &directory, &runtimes).await,
        "seccomp" => seccomp::run(number, &image, &directory, &runtimes).await,
        "up" => up::run(number, &directory, &runtimes).await,
        _ => bail!("unknown mode {mode}"),
    }
}

async fn lives(rounds: usize, image: &str, directory: &str, mut runtimes: Vec<Runtime>) -> Result<()> {
    let fresh: Vec<_> = runtimes.iter().map(|runtime| pss(runtime.pid)).collect();
    let chain = std::env::var_os("BENCH_CNI").map(|path| Chain::read(Path::new(&path))).transpose()?;
    let mut alone = [Vec::new(), Vec::new()];
    for round in 0..WARM_UP + rounds {
        if let Some(chain) = &chain {
            let (add, del) = chain.run(&format!("stave-bench-{}-{round}", std::process::id()))?;
            if round >= WARM_UP {
                alone[0].push(add);
                alone[1].push(del);
            }
        }
        // Nobody is always the first.
        let first = round % runtimes.len().max(1);
        runtimes.rotate_left(first);
        for runtime in &mut runtimes {
            if round == WARM_UP {
                runtime.times.clear();
            }
            let config = pod_config(directory, &runtime.name, round);
            life(runtime, &config, image)
                .await
                .with_context(|| format!("{}, round {round}", runtime.name))?;
        }
        runtimes.rotate_right(first);
    }
    println!("{rounds} rounds, turn by turn; times in ms");
    print_times(&runtimes);
    if let Some(first) = runtimes.first().filter(|_| chain.is_some()) {
        for (step, plugins) in ["RunPodSandbox", "StopPodSandbox"].into_iter().zip(&alone) {
            let own = median(first.times.get(step).map_or(&[], Vec::as_slice));
            let plugins = median(plugins);
            println!(
                "{step}: the plugins by themselves {plugins:.2}, {} beside them {:.2} (p50)",
                first.name,
                own - plugins
            );
        }
    }
    println!("\nmemory in KiB (PSS), with {PODS} pods of one container up");
    for (runtime, fresh) in runtimes.iter().zip(fresh) {
        print_memory(runtime, image, directory, fresh).await?;
    }
    Ok(())
}

async fn connect(argument: &str) -> Result<Runtime> {
    let (name, rest) = argument.split_once('=').with_context(|| format!("{argument}: no NAME=SOCKET:PID"))?;
    let (socket, pid) = rest.rsplit_once(':').with_context(|| format!("{argument}: no NAME=SOCKET:PID"))?;
    let socket = PathBuf::from(socket);
    let cri = Cri::connect(&socket, Duration::from_secs(60))
        .await
        .with_context(|| format!("{}", socket.display()))?;
    let pid = pid.parse().with_context(|| format!("PID {pid}"))?;
    Ok(Runtime { name: name.to_owned(), socket, pid, cri, times: BTreeMap::new() })
}

/// A pod with one container, started: their ids, and the process that supervises the container.
async fn start(
    runtime: &Runtime,
    config: &PodSandboxConfig,
    main: &stave_e2e::cri::ContainerConfig,
) -> Result<(String, String, u32)> {
    let before = processes();
    let pod = runtime.cri.run_pod(config).await?;
    let id = runtime.cri.create(&pod, main, config).await?;
    runtime.cri.start(&id).await?;
    let supervises = |pid: &u32| {
        !before.contains(pid)
            && program(*pid)
                .is_some_and(|name| name.starts_with("stave-pod") || name.starts_with("containerd-shim"))
    };
    let supervisor = processes().into_iter().find(supervises).context("the pod has no supervisor")?;
    Ok((pod, id, supervisor))
}

async fn remove(runtime: &Runtime, pod: &str) -> Result<()> {
    runtime.cri.stop_pod(pod).await?;
    runtime.cri.remove_pod(pod).await?;
    Ok(())
}

fn pod_config(directory: &str, runtime: &str, number: usize) -> PodSandboxConfig {
    let mut config = pod(&format!("bench-{number}"));
    config.log_directory = format!("{directory}/logs/{runtime}-{number}");
    config
}

/// A pod's whole life, each call timed.
async fn life(runtime: &mut Runtime, pod: &PodSandboxConfig, image: &str) -> Result<()> {
    let cri = runtime.cri.clone();
    let mut times = Vec::with_capacity(STEPS.len());
    let begin = Instant::now();
    let mut last = begin;
    let mut lap = |times: &mut Vec<Duration>| {
        let now = Instant::now();
        times.push(now - last);
        last = now;
    };
    let id = cri.run_pod(pod).await?;
    lap(&mut times);
    let config = container("main", image, &["sleep", "3600"]);
    let container = cri.create(&id, &config, pod).await?;
    lap(&mut times);
    cri.start(&container).await?;
    lap(&mut times);
    times.push(begin.elapsed());
    let result = cri.exec(&container, &["true"]).await?;
    anyhow::ensure!(result.exit_code == 0, "true: exit code {}", result.exit_code);
    lap(&mut times);
    cri.stop(&container, 0).await?;
    lap(&mut times);
    cri.stop_pod(&id).await?;
    lap(&mut times);
    cri.remove_pod(&id).await?;
    lap(&mut times);
    for (step, time) in STEPS.into_iter().zip(times) {
        runtime.times.entry(step).or_default().push(time);
    }
    Ok(())
}

/// In ms.
fn median(times: &[Duration]) -> f64 {
    let mut times = times.to_vec();
    times.sort();
    times.get(times.len().saturating_sub(1) / 2).copied().unwrap_or_default().as_secs_f64() * 1e3
}

fn print_times(runtimes: &[Runtime]) {
    print!("{:<30}", "");
    for runtime in runtimes {
        print!(" {:>11} p50 {:>7}", runtime.name, "p95");
    }
    println!(" {:>9}", "ratio");
    for step in STEPS {
        print!("{step:<30}");
        let mut medians = Vec::new();
        for runtime in runtimes {
            let mut times = runtime.times.get(step).cloned().unwrap_or_default();
            times.sort();
            let at = |part: usize| {
                times.get((times.len().saturating_sub(1)) * part / 100).copied().unwrap_or_default()
            };
            medians.push(at(50).as_secs_f64());
            print!(" {:>15.2} {:>7.2}", at(50).as_secs_f64() * 1e3, at(95).as_secs_f64() * 1e3);
        }
        match medians[..] {
            [own, other, ..] if own > 0.0 => println!(" {:>8.1}x", other / own),
            _ => println!(),
        }
    }
}

/// Prints what the daemon takes, and what a pod takes beside its payload: supervisor or shim, and pause process.
async fn print_memory(runtime: &Runtime, image: &str, directory: &str, fresh: Option<u64>) -> Result<()> {
    let before = processes();
    let mut pods = Vec::new();
    for number in 0..PODS {
        let config = pod_config(directory, &runtime.name, 1_000_000 + number);
        let id = runtime.cri.run_pod(&config).await?;
        let container =
            runtime.cri.create(&id, &container("main", image, &["sleep", "3600"]), &config).await?;
        runtime.cri.start(&container).await?;
        pods.push(id);
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    let mut helpers: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for pid in processes().into_iter().filter(|pid| !before.contains(pid)) {
        let Some(name) = program(pid) else { continue };
        // The payload itself is a sleep.
        if name.starts_with("stave-pod") || name.starts_with("containerd-shim") || name == "pause" {
            helpers.entry(name).or_default().extend(pss(pid));
        }
    }
    let shown = |value: Option<u64>| value.map_or("?".to_owned(), |value| value.to_string());
    println!("{:<12} daemon {:>7} (fresh {})", runtime.name, shown(pss(runtime.pid)), shown(fresh));
    for (name, mut sizes) in helpers {
        sizes.sort();
        let median = sizes.get(sizes.len() / 2).copied();
        println!(
            "{:<12} {name}: {} a process, {} processes, {} in all",
            "",
            shown(median),
            sizes.len(),
            sizes.iter().sum::<u64>()
        );
    }
    for id in pods {
        runtime.cri.stop_pod(&id).await?;
        runtime.cri.remove_pod(&id).await?;
    }
    if !runtime.socket.exists() {
        bail!("{}: the socket is gone", runtime.name);
    }
    Ok(())
}

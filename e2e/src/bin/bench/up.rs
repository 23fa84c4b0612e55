//! What a sandbox costs as they get more.

use std::time::{Duration, Instant};

use anyhow::Result;

use crate::{Runtime, median, pod_config};

/// Sandboxes that stay up all the time.
const FEW: usize = 10;

/// Sandboxes from which a number is taken: those after the first few, and the last.
const SAMPLE: usize = 20;

/// How often they go up and down: within one turn the machine itself may get slower or faster by as much as is measured.
const TURNS: usize = 6;

/// Between two sandboxes: a node starts them one by one, too, and what is made in advance is made again in between.
const PAUSE: Duration = Duration::from_millis(100);

/// The same between sandboxes that are not measured.
const SHORT_PAUSE: Duration = Duration::from_millis(30);

/// The kernel takes namespaces away in the background.
const SETTLE: Duration = Duration::from_secs(3);

/// More than a sandbox takes of the machine's memory, the kernel's part included.
const MEMORY: usize = 8 << 20;

const STEPS: [&str; 3] = ["RunPodSandbox", "StopPodSandbox", "RemovePodSandbox"];

/// The sandboxes of one runtime, and what those that were measured took.
struct Sandboxes<'a> {
    runtime: &'a Runtime,
    directory: &'a str,
    ids: Vec<String>,
    /// Started so far; no two have the same name.
    started: usize,
}

/// By step.
type Times = [Vec<Duration>; 3];

/// Takes `count` sandboxes up and down, several times, and compares the first and the last of them.
pub(crate) async fn run(count: usize, directory: &str, runtimes: &[Runtime]) -> Result<()> {
    anyhow::ensure!(count >= FEW + 2 * SAMPLE, "up:{count}: less than {} sandboxes", FEW + 2 * SAMPLE);
    touch_memory((count * MEMORY).min(4 << 30));
    for runtime in runtimes {
        let mut sandboxes = Sandboxes { runtime, directory, ids: Vec::new(), started: 0 };
        let (mut few, mut many) = (Times::default(), Times::default());
        sandboxes.up(FEW, SHORT_PAUSE).await?;
        println!(
            "{}: {FEW} to {count} sandboxes; p50 in ms of the {SAMPLE} after the first {FEW}, and of the last {SAMPLE}",
            runtime.name
        );
        for _ in 0..TURNS {
            tokio::time::sleep(SETTLE).await;
            let first = sandboxes.up(FEW + SAMPLE, PAUSE).await?;
            sandboxes.up(count - SAMPLE, SHORT_PAUSE).await?;
            tokio::time::sleep(SETTLE).await;
            let last = sandboxes.up(count, PAUSE).await?;
            println!(
                "  RunPodSandbox {:>7.2} {:>7.2} {:>6.2}x",
                median(&first),
                median(&last),
                ratio(&first, &last)
            );
            few[0].extend(first);
            many[0].extend(last);
            sandboxes.down(count - SAMPLE, PAUSE, &mut many).await?;
            sandboxes.down(FEW + SAMPLE, Duration::ZERO, &mut Times::default()).await?;
            tokio::time::sleep(SETTLE).await;
            sandboxes.down(FEW, PAUSE, &mut few).await?;
        }
        sandboxes.down(0, Duration::ZERO, &mut Times::default()).await?;
        println!("{TURNS} turns:");
        for (step, (few, many)) in STEPS.into_iter().zip(few.iter().zip(&many)) {
            println!("{step:<18} {:>7.2} {:>7.2} {:>6.2}x", median(few), median(many), ratio(few, many));
        }
    }
    Ok(())
}

impl Sandboxes<'_> {
    /// Starts sandboxes until there are `count`: what each took.
    async fn up(&mut self, count: usize, pause: Duration) -> Result<Vec<Duration>> {
        let mut times = Vec::new();
        while self.ids.len() < count {
            tokio::time::sleep(pause).await;
            let config = pod_config(self.directory, &self.runtime.name, self.started);
            self.started += 1;
            let begin = Instant::now();
            self.ids.push(self.runtime.cri.run_pod(&config).await?);
            times.push(begin.elapsed());
        }
        Ok(times)
    }

    /// Stops and removes the youngest until there are `count`.
    async fn down(&mut self, count: usize, pause: Duration, times: &mut Times) -> Result<()> {
        for id in self.ids.drain(count..).rev() {
            tokio::time::sleep(pause).await;
            let begin = Instant::now();
            self.runtime.cri.stop_pod(&id).await?;
            times[1].push(begin.elapsed());
            let begin = Instant::now();
            self.runtime.cri.remove_pod(&id).await?;
            times[2].push(begin.elapsed());
        }
        Ok(())
    }
}

fn ratio(few: &[Duration], many: &[Duration]) -> f64 {
    median(many) / median(few)
}

/// A virtual machine gets its memory from its host when it first writes to it, which takes a multiple of what the write takes
/// later: the last sandboxes, in memory that nobody has used since the boot, would seem slow.
fn touch_memory(bytes: usize) {
    let mut memory = vec![0u8; bytes];
    memory.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
    std::hint::black_box(&memory);
}

//! What a sandbox costs as they get more.

use std::time::{Duration, Instant};

use anyhow::Result;

use crate::{Runtime, pod_config};

/// Sandboxes from which a number is taken: those around the 10th, and the last.
const SAMPLE: usize = 20;

/// More than a sandbox takes of the machine's memory, the kernel's part included.
const MEMORY: usize = 8 << 20;

/// Starts `count` sandboxes one after another, which stay until all are up; then stops and removes them.
pub(crate) async fn run(count: usize, directory: &str, runtimes: &[Runtime]) -> Result<()> {
    touch_memory((count * MEMORY).min(4 << 30));
    for runtime in runtimes {
        let mut times: [Vec<Duration>; 3] = Default::default();
        let mut ids = Vec::with_capacity(count);
        for number in 0..count {
            // A node starts them one by one, too: what is made in advance is made again in between.
            tokio::time::sleep(Duration::from_millis(100)).await;
            let config = pod_config(directory, &runtime.name, number);
            let begin = Instant::now();
            ids.push(runtime.cri.run_pod(&config).await?);
            times[0].push(begin.elapsed());
        }
        for id in ids {
            let begin = Instant::now();
            runtime.cri.stop_pod(&id).await?;
            times[1].push(begin.elapsed());
            let begin = Instant::now();
            runtime.cri.remove_pod(&id).await?;
            times[2].push(begin.elapsed());
        }
        println!("{}: {count} sandboxes up, then down; p50 in ms of each tenth", runtime.name);
        for (step, times) in ["RunPodSandbox", "StopPodSandbox", "RemovePodSandbox"].into_iter().zip(&times) {
            print!("{step:<18}");
            for tenth in times.chunks(count.div_ceil(10).max(1)) {
                print!(" {:>7.2}", median(tenth));
            }
            println!();
        }
        let (first, last) =
            (median(&times[0][..SAMPLE.min(count)]), median(&times[0][count.saturating_sub(SAMPLE)..]));
        println!("RunPodSandbox: the last {SAMPLE} take {:.2} times the first {SAMPLE}", last / first);
    }
    Ok(())
}

/// A virtual machine gets its memory from its host when it first writes to it, which takes a multiple of what the write takes
/// later: the last sandboxes, in memory that nobody has used since the boot, would seem slow.
fn touch_memory(bytes: usize) {
    let mut memory = vec![0u8; bytes];
    memory.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
    std::hint::black_box(&memory);
}

/// In ms.
fn median(times: &[Duration]) -> f64 {
    let mut times = times.to_vec();
    times.sort();
    times.get(times.len() / 2).copied().unwrap_or_default().as_secs_f64() * 1e3
}

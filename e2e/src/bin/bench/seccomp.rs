//! What a seccomp profile that has been seen before costs a container's start.

use std::time::{Duration, Instant};

use anyhow::Result;
use stave_e2e::container;
use stave_e2e::cri::{ContainerConfig, SecurityProfile};

use crate::{Runtime, median, pod_config, remove};

const WARM_UP: usize = 5;
/// ProfileType of the CRI, and how it is called here.
const KINDS: [(i32, &str); 2] = [(1, "Unconfined"), (0, "RuntimeDefault")];

/// CreateContainer and StartContainer, `rounds` times with and without the default profile, turn by turn.
pub(crate) async fn run(rounds: usize, image: &str, directory: &str, runtimes: &[Runtime]) -> Result<()> {
    for runtime in runtimes {
        let config = pod_config(directory, &runtime.name, 0);
        let pod = runtime.cri.run_pod(&config).await?;
        let mut times: [Vec<Duration>; 2] = Default::default();
        for round in 0..WARM_UP + rounds {
            for (times, (kind, name)) in times.iter_mut().zip(KINDS) {
                let main =
                    with_profile(container(&format!("{name}-{round}"), image, &["sleep", "3600"]), kind);
                let begin = Instant::now();
                let id = runtime.cri.create(&pod, &main, &config).await?;
                runtime.cri.start(&id).await?;
                if round >= WARM_UP {
                    times.push(begin.elapsed());
                }
                runtime.cri.stop(&id, 0).await?;
                runtime.cri.remove(&id).await?;
            }
        }
        let [without, with] = times.map(|times| median(&times));
        println!(
            "{:<12} create and start, {rounds} times, p50 in ms: {} {without:.2}, {} {with:.2}: {:+.2}",
            runtime.name,
            KINDS[0].1,
            KINDS[1].1,
            with - without
        );
        remove(runtime, &pod).await?;
    }
    Ok(())
}

fn with_profile(mut config: ContainerConfig, kind: i32) -> ContainerConfig {
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default().seccomp =
        Some(SecurityProfile { profile_type: kind, ..Default::default() });
    config
}

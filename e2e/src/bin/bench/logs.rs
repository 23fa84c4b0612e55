//! How long the output of a container takes to its log, beside `cat >file` of the same bytes.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use stave_e2e::container;

use crate::procfs::private;
use crate::{Runtime, pod_config, remove, start};

const ROUNDS: usize = 7;
const LINE: &str =
    "the quick brown fox jumps over the lazy dog, and again 0123456789 0123456789 0123456789 012345\n";
/// Containers of one pod that log.
const CONTAINERS: usize = 100;

/// `mib` MiB of lines of some hundred bytes, turn by turn with cat; then the supervisor of a hundred containers.
pub(crate) async fn run(mib: usize, image: &str, directory: &str, runtimes: &[Runtime]) -> Result<()> {
    let lines = (mib << 20) / LINE.len();
    let text = LINE.repeat(lines);
    let prefixed = format!("2026-01-01T00:00:00.000000000Z stdout F {LINE}").repeat(lines);
    fs::create_dir_all(directory)?;
    let source = Path::new(directory).join("prefixed");
    fs::write(&source, &prefixed)?;
    for (number, runtime) in runtimes.iter().enumerate() {
        let (mut ours, mut cats) = (Vec::new(), Vec::new());
        for round in 0..ROUNDS {
            cats.push(cat(&source, &Path::new(directory).join("copy"))?);
            ours.push(logged(runtime, image, directory, 1000 * number + round, &text).await?);
        }
        let (ours, cat) = (median(&mut ours), median(&mut cats));
        println!(
            "{:<12} {mib} MiB in {lines} lines: {:.0} ms to the log; cat of the same bytes with prefix {:.0} ms; ratio {:.2}",
            runtime.name,
            ours.as_secs_f64() * 1e3,
            cat.as_secs_f64() * 1e3,
            ours.as_secs_f64() / cat.as_secs_f64()
        );
        hundred(runtime, image, directory, 1000 * number + 500).await?;
    }
    Ok(())
}

/// From a pipe that a program fills, as a container does.
fn cat(source: &Path, target: &Path) -> Result<Duration> {
    let _ = fs::remove_file(target);
    let mut feed = Command::new("cat").arg(source).stdout(Stdio::piped()).spawn()?;
    let begin = Instant::now();
    let pipe = feed.stdout.take().context("a pipe")?;
    let mut cat = Command::new("cat").stdin(pipe).stdout(fs::File::create(target)?).spawn()?;
    ensure!(cat.wait()?.success() && feed.wait()?.success(), "cat");
    Ok(begin.elapsed())
}

/// From the first byte to the last in the log. The container prints a file, of which the last line is `done`.
async fn logged(
    runtime: &Runtime,
    image: &str,
    directory: &str,
    number: usize,
    text: &str,
) -> Result<Duration> {
    let config = pod_config(directory, &runtime.name, number);
    fs::create_dir_all(&config.log_directory)?;
    let shared = Path::new(directory).join("text");
    fs::write(&shared, text)?;
    let mut main = container("main", image, &["cat", "/text"]);
    main.mounts = vec![stave_e2e::cri::Mount {
        container_path: "/text".into(),
        host_path: shared.to_string_lossy().into_owned(),
        readonly: true,
        ..Default::default()
    }];
    let log = Path::new(&config.log_directory).join("main.log");
    main.log_path = "main.log".into();
    let pod = runtime.cri.run_pod(&config).await?;
    let id = runtime.cri.create(&pod, &main, &config).await?;
    let begin = Instant::now();
    runtime.cri.start(&id).await?;
    let expected = text.len() + text.len() / LINE.len() * "2026-01-01T00:00:00.000000000Z stdout F ".len();
    let took = loop {
        // A runtime may write shorter times of day.
        let length = fs::metadata(&log).map_or(0, |log| log.len() as usize);
        if length + text.len() / LINE.len() * 10 >= expected
            && runtime.cri.container(&id).await?.finished_at > 0
        {
            break begin.elapsed();
        }
        ensure!(begin.elapsed() < Duration::from_secs(60), "{length} of {expected} bytes in the log");
        tokio::time::sleep(Duration::from_millis(1)).await;
    };
    remove(runtime, &pod).await?;
    let _ = fs::remove_dir_all(&config.log_directory);
    Ok(took)
}

/// The memory of a supervisor while all containers of its pod log.
async fn hundred(runtime: &Runtime, image: &str, directory: &str, number: usize) -> Result<()> {
    let config = pod_config(directory, &runtime.name, number);
    let script = "while :; do echo a line of output; echo another >&2; sleep 0.2; done";
    let logging = |name: &str| {
        let mut config = container(name, image, &["sh", "-c", script]);
        config.log_path = format!("{name}.log");
        config
    };
    let (pod, _, supervisor) = start(runtime, &config, &logging("c0")).await?;
    for number in 1..CONTAINERS {
        let id = runtime.cri.create(&pod, &logging(&format!("c{number}")), &config).await?;
        runtime.cri.start(&id).await?;
    }
    tokio::time::sleep(Duration::from_secs(3)).await;
    let logs = fs::read_dir(&config.log_directory)?.count();
    ensure!(logs == CONTAINERS, "{logs} logs");
    let shown = |kib: Option<u64>| kib.map_or("?".to_owned(), |kib| kib.to_string());
    println!(
        "{:<12} supervisor of {CONTAINERS} containers that log: {} KiB private, {} KiB PSS",
        runtime.name,
        shown(private(supervisor)),
        shown(crate::procfs::pss(supervisor))
    );
    remove(runtime, &pod).await
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

//! Any /proc/self/mountinfo: with a shared volume a container names mounts of the host as it likes.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: (&[u8], &str)| {
    let (mountinfo, path) = data;
    stave_spec::fuzz_mountinfo(mountinfo, Path::new(path));
    stave_cgroup::fuzz_mountinfo(mountinfo);
});

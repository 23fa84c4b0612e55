//! Any bytes as a CNI configuration, as the answer of a plugin, and as a template of a configuration.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| stave_cni::fuzz(data));

//! Any message, in each encoding; and any resize text.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| stave_streaming::fuzz_message(data));

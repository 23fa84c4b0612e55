//! Any bytes, in pieces: no panic, and no more is held back than a control frame.
#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use stave_streaming::spdy::Decoder;

fuzz_target!(|data: (u8, &[u8])| {
    let (step, wire) = data;
    let mut decoder = Decoder::default();
    let mut buffer = BytesMut::new();
    for piece in wire.chunks(usize::from(step) + 1) {
        buffer.extend_from_slice(piece);
        loop {
            match decoder.decode(&mut buffer) {
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(_) => return,
            }
        }
        assert!(buffer.len() < 8 + 64 * 1024);
    }
});

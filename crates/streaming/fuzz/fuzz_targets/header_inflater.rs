//! Any header blocks, one after another in one connection.
#![no_main]

use bytes::{BufMut, BytesMut};
use libfuzzer_sys::fuzz_target;
use stave_streaming::spdy::Decoder;

fuzz_target!(|blocks: Vec<&[u8]>| {
    let mut decoder = Decoder::default();
    for (n, block) in blocks.into_iter().enumerate() {
        // A SYN_STREAM whose frame is in order.
        let mut frame = BytesMut::new();
        frame.put_u32(0x8003_0001);
        frame.put_u32(10 + block.len().min(60_000) as u32);
        frame.put_u32(2 * n as u32 + 1);
        frame.put_bytes(0, 6);
        frame.put_slice(&block[..block.len().min(60_000)]);
        if decoder.decode(&mut frame).is_err() {
            return;
        }
    }
});

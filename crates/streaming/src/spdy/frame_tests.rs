use proptest::prelude::*;

use super::*;

fn bytes(hex: &str) -> BytesMut {
    let digits: Vec<_> = hex.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}

fn one(hex: &str) -> Result<Option<Frame>, FrameError> {
    Decoder::default().decode(&mut bytes(hex))
}

#[test]
fn reads_what_go_writes() {
    let syn = "80030001 00000028 00000001 00000000 0000 78f9e3c6a7c202a62346703a2b294a4dcc851625aca9a08006000000ffff";
    let headers = Headers::from([("streamtype", "error")]);
    assert_eq!(one(syn), Ok(Some(Frame::SynStream { id: 1, fin: false, headers })));
    let reply = "80030002 00000014 00000001 78f9e3c6a7c202a6230600000000ffff";
    assert_eq!(one(reply), Ok(Some(Frame::SynReply { id: 1, fin: false, headers: Headers::default() })));
}

#[test]
fn reads_the_other_frames() {
    assert_eq!(one("80030003 00000008 00000003 00000005"), Ok(Some(Frame::Reset { id: 3, status: 5 })));
    let settings = |initial_window| Ok(Some(Frame::Settings { initial_window }));
    assert_eq!(one("80030004 0000000c 00000001 01000004 00010000"), settings(None));
    assert_eq!(one("80030004 0000000c 00000001 01000007 00010000"), settings(Some(1 << 16)));
    let twice = "80030004 0000001c 00000003 00000004 00000001 00000007 7fffffff 00000007 00000001";
    assert_eq!(one(twice), settings(Some(0x7fff_ffff)), "the first counts");
    assert_eq!(one("80030006 00000004 00000007"), Ok(Some(Frame::Ping { id: 7 })));
    assert_eq!(one("80030007 00000008 00000009 00000001"), Ok(Some(Frame::GoAway { last: 9, status: 1 })));
    assert_eq!(
        one("80030009 00000008 00000001 00000100"),
        Ok(Some(Frame::WindowUpdate { id: 1, delta: 256 }))
    );
    // The version isn't checked.
    assert_eq!(one("80020006 00000004 00000007"), Ok(Some(Frame::Ping { id: 7 })));
    assert_eq!(one("80030006 00000004 0000"), Ok(None));
    assert_eq!(one("800300"), Ok(None));
}

#[test]
fn refuses_malformed_frames() {
    for hex in [
        "80030003 00000008 00000003 00000000", // status 0
        "80030003 00000008 00000000 00000001", // stream 0
        "80030003 00000004 00000003",          // short
        "80030004 00000004 00000001",          // CVE-2026-35469: a count beyond the frame
        "80030004 00000004 ffffffff",
        "80030004 00000000",
        "80030006 00000004 00000000", // ping 0
        "80030006 01000004 00000001", // ping with flags
        "80030007 00000004 00000001",
        "80030009 0000000c 00000001 00000001 00000000",
        "80030001 00000004 00000001",
        "80030002 00000002 0000",
        "80030005 00000000", // a type of SPDY/2
        "80030063 00000000",
        "80030001 00010001", // longer than the cap
        "80030004 00ffffff",
    ] {
        assert!(one(hex).is_err(), "{hex}: {:?}", one(hex));
    }
}

#[test]
fn long_data_comes_in_parts() {
    let mut decoder = Decoder::default();
    let mut buffer = bytes("00000005 01ffffff 0102");
    let data = |fin, bytes: &[u8]| Frame::Data { id: 5, fin, bytes: Bytes::copy_from_slice(bytes) };
    assert_eq!(decoder.decode(&mut buffer), Ok(Some(data(false, &[1, 2]))));
    assert_eq!(decoder.decode(&mut buffer), Ok(None));
    buffer.extend_from_slice(&vec![3; 0xff_ffff - 2]);
    buffer.extend_from_slice(&bytes("00000005 00000000"));
    assert_eq!(decoder.decode(&mut buffer), Ok(Some(data(true, &vec![3; 0xff_ffff - 2]))));
    assert_eq!(decoder.decode(&mut buffer), Ok(Some(data(false, &[]))));
    assert_eq!(decoder.decode(&mut buffer), Ok(None));
    assert!(buffer.is_empty());
}

fn frames() -> impl Strategy<Value = Frame> {
    let id = 1..0x7fff_ffff_u32;
    let headers = proptest::collection::btree_map("[a-z-]{1,12}x", ".{0,40}", 0..6)
        .prop_map(|map| Headers::from_pairs(map.into_iter().collect()));
    prop_oneof![
        (id.clone(), any::<bool>(), headers.clone()).prop_map(|(id, fin, headers)| Frame::SynStream {
            id,
            fin,
            headers
        }),
        (id.clone(), any::<bool>(), headers.clone()).prop_map(|(id, fin, headers)| Frame::SynReply {
            id,
            fin,
            headers
        }),
        (id.clone(), any::<bool>(), headers).prop_map(|(id, fin, headers)| Frame::Headers {
            id,
            fin,
            headers
        }),
        (id.clone(), 1..12_u32).prop_map(|(id, status)| Frame::Reset { id, status }),
        proptest::option::of(0..1_u32 << 31).prop_map(|initial_window| Frame::Settings { initial_window }),
        id.clone().prop_map(|id| Frame::Ping { id }),
        (id.clone(), 0..3_u32).prop_map(|(last, status)| Frame::GoAway { last, status }),
        (id.clone(), id.clone()).prop_map(|(id, delta)| Frame::WindowUpdate { id, delta }),
        (id, any::<bool>(), proptest::collection::vec(any::<u8>(), 0..300))
            .prop_map(|(id, fin, bytes)| Frame::Data { id, fin, bytes: bytes.into() }),
    ]
}

/// Decodes in pieces of `step` bytes, and joins the parts of data frames.
fn decode_all(wire: &[u8], step: usize) -> Result<Vec<Frame>, FrameError> {
    let mut decoder = Decoder::default();
    let mut buffer = BytesMut::new();
    let mut frames = Vec::new();
    let mut open = false;
    for piece in wire.chunks(step) {
        buffer.extend_from_slice(piece);
        while let Some(frame) = decoder.decode(&mut buffer)? {
            let unfinished = decoder.data.is_some();
            match (frame, frames.last_mut()) {
                (Frame::Data { fin, bytes, .. }, Some(Frame::Data { fin: all_fin, bytes: all, .. }))
                    if open =>
                {
                    *all = [all.as_ref(), &bytes].concat().into();
                    *all_fin = fin;
                }
                (frame, _) => frames.push(frame),
            }
            open = unfinished;
        }
        assert!(buffer.len() < HEAD + MAX_CONTROL, "no more is held back than a control frame");
    }
    Ok(frames)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_written_is_read(frames in proptest::collection::vec(frames(), 0..20), step in 1..500_usize) {
        let mut encoder = Encoder::default();
        let mut wire = BytesMut::new();
        for frame in &frames {
            encoder.encode(frame, &mut wire).unwrap();
        }
        prop_assert_eq!(decode_all(&wire, step).unwrap(), frames);
    }

    #[test]
    fn any_bytes_do_no_harm(wire in proptest::collection::vec(any::<u8>(), 0..2000), step in 1..500_usize) {
        let _ = decode_all(&wire, step);
    }

    #[test]
    fn damaged_frames_do_no_harm(
        frames in proptest::collection::vec(frames(), 1..10),
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut encoder = Encoder::default();
        let mut wire = BytesMut::new();
        for frame in &frames {
            encoder.encode(frame, &mut wire).unwrap();
        }
        for (at, byte) in damage {
            let at = at.index(wire.len());
            wire[at] = byte;
        }
        let _ = decode_all(&wire, 100);
    }
}

//! Any packet on the socket between daemon and supervisor, and what is in it.
#![no_main]

use std::os::fd::AsFd as _;

use libfuzzer_sys::fuzz_target;
use prost::Message as _;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType};
use stave_supervisor_proto::v1::{ContainerExit, Packet, Plan, Request};

fuzz_target!(|data: &[u8]| {
    let (ours, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .expect("socketpair");
    if data.is_empty() || rustix::net::send(&ours, data, SendFlags::DONTWAIT).is_err() {
        return;
    }
    let Ok(Some(message)) = stave_wire::recv(theirs.as_fd()) else { return };
    assert!(message.fds.is_empty() && message.payload.len() < data.len());
    let payload = &message.payload[..];
    if let Ok(request) = Request::decode(payload) {
        assert_eq!(Request::decode(&request.encode_to_vec()[..]).expect("our own"), request);
    }
    if let Ok(Plan { process: Some(process), .. }) = Plan::decode(payload) {
        let _ = stave_spec::exec_process(&process, &["/bin/true".to_owned()], false);
    }
    let _ = Packet::decode(payload);
    let _ = ContainerExit::decode(payload);
});

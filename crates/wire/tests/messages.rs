//! Messages over real sockets: sizes, descriptors, and packets that no well-behaved peer sends.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::{IoSlice, Read, Seek, SeekFrom, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use proptest::prelude::*;
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use stave_wire::{MAX_FDS, MAX_INLINE, MAX_PAYLOAD, WireError, accept, connect, listen, recv, send};

fn pair() -> (OwnedFd, OwnedFd) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listener = listen(&path).unwrap();
    let client = connect(&path).unwrap();
    let server = accept(listener.as_fd()).unwrap().unwrap();
    (client, server)
}

fn raw_send(socket: &OwnedFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(40))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    }
    rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::empty()).unwrap();
}

fn memfd(content: &[u8], seals: SealFlags) -> File {
    named_memfd("test", content, seals)
}

fn named_memfd(name: &str, content: &[u8], seals: SealFlags) -> File {
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    let mut file = File::from(fd);
    file.write_all(content).unwrap();
    rustix::fs::fcntl_add_seals(&file, seals).unwrap();
    file
}

fn memfd_frame(len: u64) -> Vec<u8> {
    let mut frame = vec![1];
    frame.extend(len.to_le_bytes());
    frame
}

fn sealed() -> SealFlags {
    SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK
}

#[test]
fn payloads_of_every_size_arrive() {
    let (client, server) = pair();
    for size in [0, 1, 100, MAX_INLINE - 1, MAX_INLINE, MAX_INLINE + 1, 1 << 20, MAX_PAYLOAD] {
        let payload: Vec<u8> = (0..size).map(|at| (at % 251) as u8).collect();
        send(client.as_fd(), &payload, &[]).unwrap();
        let message = recv(server.as_fd()).unwrap().unwrap();
        assert!(message.payload == payload, "{size} bytes arrive unchanged");
        assert!(message.fds.is_empty());
    }
    let too_long = vec![0; MAX_PAYLOAD + 1];
    assert!(matches!(send(client.as_fd(), &too_long, &[]), Err(WireError::PayloadTooLarge(_))));
}

#[test]
fn descriptors_arrive_in_order_and_close_on_exec() {
    let (client, server) = pair();
    for payload in [vec![7; 3], vec![7; MAX_INLINE + 5]] {
        let files: Vec<File> =
            (0..MAX_FDS).map(|at| memfd(format!("file {at}").as_bytes(), SealFlags::empty())).collect();
        let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        send(client.as_fd(), &payload, &fds).unwrap();
        let message = recv(server.as_fd()).unwrap().unwrap();
        assert_eq!(message.payload, payload);
        assert_eq!(message.fds.len(), MAX_FDS);
        for (at, fd) in message.fds.into_iter().enumerate() {
            assert!(rustix::io::fcntl_getfd(&fd).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
            let mut file = File::from(fd);
            file.seek(SeekFrom::Start(0)).unwrap();
            let mut content = String::new();
            file.read_to_string(&mut content).unwrap();
            assert_eq!(content, format!("file {at}"));
        }
    }
    let file = memfd(b"", SealFlags::empty());
    let many = vec![file.as_fd(); MAX_FDS + 1];
    assert!(matches!(send(client.as_fd(), b"", &many), Err(WireError::TooManyFds(17))));
}

#[test]
fn an_empty_socket_would_block_and_a_full_one_too() {
    let (client, server) = pair();
    assert!(matches!(recv(server.as_fd()), Err(WireError::WouldBlock)));
    let mut sent = 0;
    loop {
        match send(client.as_fd(), &[1; 4096], &[]) {
            Ok(()) => sent += 1,
            Err(WireError::WouldBlock) => break,
            Err(error) => panic!("{error}"),
        }
        assert!(sent < 10_000, "the buffer never fills");
    }
    for _ in 0..sent {
        assert_eq!(recv(server.as_fd()).unwrap().unwrap().payload.len(), 4096);
    }
    assert!(matches!(recv(server.as_fd()), Err(WireError::WouldBlock)));
}

#[test]
fn a_closed_peer_is_seen_on_both_sides() {
    let (client, server) = pair();
    send(client.as_fd(), b"last words", &[]).unwrap();
    drop(client);
    assert_eq!(recv(server.as_fd()).unwrap().unwrap().payload, b"last words");
    assert!(recv(server.as_fd()).unwrap().is_none());
    assert!(matches!(send(server.as_fd(), b"hello?", &[]), Err(WireError::Closed)));

    let (client, server) = pair();
    send(client.as_fd(), b"unread", &[]).unwrap();
    drop(server);
    assert!(recv(client.as_fd()).unwrap().is_none(), "a reset is a close");

    let (client, server) = pair();
    send(client.as_fd(), b"unread", &[]).unwrap();
    send(server.as_fd(), b"first", &[]).unwrap();
    send(server.as_fd(), b"second", &[server.as_fd()]).unwrap();
    drop(server);
    assert_eq!(recv(client.as_fd()).unwrap().unwrap().payload, b"first", "a reset loses no packet");
    assert_eq!(recv(client.as_fd()).unwrap().unwrap().fds.len(), 1);
    assert!(recv(client.as_fd()).unwrap().is_none());
}

#[test]
fn the_socket_file_is_private_and_may_have_a_long_path() {
    let dir = tempfile::tempdir().unwrap();
    let mut deep = dir.path().to_path_buf();
    for _ in 0..4 {
        deep.push("d".repeat(60));
    }
    std::fs::create_dir_all(&deep).unwrap();
    let path = deep.join("supervisor.sock");
    assert!(path.as_os_str().len() > 200);
    let listener = listen(&path).unwrap();
    let metadata = std::fs::metadata(&path).unwrap();
    assert_eq!(metadata.permissions().mode() & 0o7777, 0o600);
    assert_eq!(metadata.uid(), rustix::process::geteuid().as_raw());
    assert!(accept(listener.as_fd()).unwrap().is_none(), "nobody waits");
    let client = connect(&path).unwrap();
    let server = accept(listener.as_fd()).unwrap().unwrap();
    send(client.as_fd(), b"x", &[]).unwrap();
    assert_eq!(recv(server.as_fd()).unwrap().unwrap().payload, b"x");
    for fd in [&listener, &client, &server] {
        assert!(rustix::io::fcntl_getfd(fd).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
        assert!(rustix::fs::fcntl_getfl(fd).unwrap().contains(rustix::fs::OFlags::NONBLOCK));
    }
    // Nothing is unlinked, not even a socket that nobody listens on any more.
    drop(listener);
    assert!(matches!(listen(&path), Err(WireError::SystemAt { what: "bind", .. })));
    assert!(path.exists());
    assert!(connect(&path).is_err());
    assert!(matches!(listen(std::path::Path::new("/")), Err(WireError::Path(..))));
}

/// CVE-2020-15257
#[test]
fn cve_2020_15257_other_users_are_hung_up_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listener = listen(&path).unwrap();
    // Whatever becomes of the modes.
    for (path, mode) in [(dir.path(), 0o755), (&path, 0o666)] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }
    let client = std::thread::spawn(move || {
        // A thread's user is its own (setresuid(2)).
        let nobody = rustix::thread::Uid::from_raw(65534);
        rustix::thread::set_thread_res_uid(nobody, nobody, nobody).expect("these tests need root");
        let kind = rustix::net::SocketType::SEQPACKET;
        let socket = rustix::net::socket(rustix::net::AddressFamily::UNIX, kind, None).unwrap();
        rustix::net::connect(&socket, &rustix::net::SocketAddrUnix::new(&path).unwrap()).unwrap();
        socket
    });
    let client = client.join().unwrap();
    assert!(matches!(accept(listener.as_fd()), Err(WireError::ForeignPeer(65534))));
    assert!(matches!(recv(client.as_fd()), Ok(None)), "closed");
}

#[test]
fn hostile_packets_are_refused() {
    let (client, server) = pair();
    let good = named_memfd("hostile", &[0; MAX_INLINE + 1], sealed());
    let len = (MAX_INLINE + 1) as u64;
    // (packet, descriptors, why it is refused)
    let unsealed = named_memfd("hostile", &[0; MAX_INLINE + 1], SealFlags::GROW);
    let short = named_memfd("hostile", &[0; 10], sealed());
    let (pipe, _writer) = rustix::pipe::pipe().unwrap();
    let cases: [(Vec<u8>, Vec<BorrowedFd<'_>>, &str); 7] = [
        (vec![9], vec![], "unknown kind"),
        (memfd_frame(len), vec![], "memfd is missing"),
        (memfd_frame(len), vec![unsealed.as_fd()], "not sealed"),
        (memfd_frame(len), vec![short.as_fd()], "another length"),
        (memfd_frame(len), vec![pipe.as_fd()], "not a memfd"),
        (vec![0, 1], vec![good.as_fd(); 17], "over the limit"),
        (vec![0, 1], vec![good.as_fd(); 40], "truncated"),
    ];
    for (packet, fds, why) in cases {
        let before = open_fds();
        raw_send(&client, &packet, &fds);
        let error = recv(server.as_fd()).unwrap_err().to_string();
        assert!(error.contains(why), "{why}: {error}");
        assert_eq!(open_fds(), before, "{why}: received descriptors are closed");
    }
    raw_send(&client, &vec![0; MAX_INLINE + 2], &[]);
    assert!(matches!(recv(server.as_fd()), Err(WireError::Truncated(_))));
}

/// Descriptors of this process that are memfds named "hostile": those of no other test.
fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok())
        .filter(|target| target.to_string_lossy().starts_with("/memfd:hostile"))
        .count()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_packet_is_a_message_or_an_error(packet in proptest::collection::vec(any::<u8>(), 1..200)) {
        let (client, server) = pair();
        raw_send(&client, &packet, &[]);
        match recv(server.as_fd()) {
            Ok(Some(message)) => {
                prop_assert_eq!(packet[0], 0);
                prop_assert_eq!(&message.payload[..], &packet[1..]);
            }
            Ok(None) => prop_assert!(false, "a packet is not the end"),
            Err(_) => prop_assert_ne!(packet[0], 0),
        }
        prop_assert!(matches!(recv(server.as_fd()), Err(WireError::WouldBlock)), "one packet, one message");
    }
}

//! CRI v1 as of Kubernetes 1.36: messages, client and server. The definition is
//! `proto/runtime/v1/api.proto`; names, numbers and types are the API's.
#![forbid(unsafe_code)]

mod redact;

/// Package `runtime.v1`.
#[allow(missing_docs, clippy::all)]
pub mod v1 {
    tonic::include_proto!("runtime.v1");
}

/// The compiled descriptors (a serialised `FileDescriptorSet`), for tests that compare definitions.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/cri.descriptors.bin"));

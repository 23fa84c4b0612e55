//! The CRI services: one file per RPC group. They translate, validate what the domain crates don't, and delegate.
#![forbid(unsafe_code)]
#![allow(clippy::result_large_err)] // tonic::Status is what it is
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod containers;
mod exec;
mod image_service;
mod images;
mod info;
mod node;
mod pods;
mod runtime_service;
mod status;

use std::sync::Arc;

use stave_cri_proto::v1::image_service_server::ImageServiceServer;
use stave_cri_proto::v1::runtime_service_server::RuntimeServiceServer;
use stave_host::Features;
use stave_images::Images;
use stave_pods::Pods;
use stave_streaming::Server;

pub use status::EXIT_CODE;

/// What all services work with. Cheap to clone.
#[derive(Clone)]
pub struct Services(Arc<State>);

/// See [`Services::new`].
pub struct State {
    /// Pods and containers.
    pub pods: Pods,
    /// Images.
    pub images: Images,
    /// Where the clients of Exec, Attach and PortForward are sent.
    pub streaming: Arc<Server>,
    /// What the host was found to offer.
    pub features: Features,
    /// The systemd cgroup driver is in use; false: cgroupfs.
    pub systemd_cgroup: bool,
    /// The effective configuration as JSON, for verbose Status.
    pub config_json: String,
}

impl Services {
    /// The services over this state.
    pub fn new(state: State) -> Self {
        Self(Arc::new(state))
    }

    /// The CRI's RuntimeService.
    pub fn runtime(&self) -> RuntimeServiceServer<Self> {
        RuntimeServiceServer::new(self.clone()).max_decoding_message_size(MESSAGE_MAX)
    }

    /// The CRI's ImageService.
    pub fn image(&self) -> ImageServiceServer<Self> {
        ImageServiceServer::new(self.clone()).max_decoding_message_size(MESSAGE_MAX)
    }
}

/// What clients of the CRI accept, in bytes; the same limit the other way.
const MESSAGE_MAX: usize = 16 << 20;

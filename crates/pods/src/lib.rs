//! Pods and containers as the daemon knows them: records, jobs, supervisors, and what each request does.
//!
//! Knows nothing of gRPC. What runs belongs to the supervisors; this crate may be gone at any moment and
//! finds everything again in [`Pods::recover`].
#![forbid(unsafe_code)]

mod attach;
mod bandwidth;
mod block_io;
mod cni;
mod console;
mod create;
mod devices;
mod error;
mod events;
mod exec;
mod fd;
mod files;
mod host_ports;
mod id;
mod image_volumes;
mod jobs;
mod launch;
mod lifecycle;
mod list;
mod metrics;
mod net_sysctls;
mod network;
mod oci_bundle;
mod oom;
mod pid_target;
mod pod;
mod pod_set;
mod pods;
mod pool;
mod port_forward;
mod quantity;
mod ready;
mod record;
mod recover;
mod run;
mod runtimes;
mod scope;
mod seccomp;
mod selinux;
mod shm;
mod stop;
mod stream_exec;
mod supervisor;
mod update;

pub use block_io::{BlockIoClasses, BlockIoError};
pub use error::{Code, Error, Result};
pub use exec::{ExecOutput, OUTPUT_MAX};
pub use list::{ContainerFilter, PodFilter};
pub use metrics::{Drops, Metrics, OomKills};
pub use network::Network;
pub use pods::{Pods, Settings};
pub use pool::PoolState;
pub use record::{ContainerRecord, ContainerState, ImageVolume, PodRecord, PodState};
pub use runtimes::{Found, Handler, OciRuntime, Runtimes};
pub use stave_spec::AppArmor;

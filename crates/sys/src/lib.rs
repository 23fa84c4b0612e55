//! System calls that no library wraps safely.
//!
//! The only crate with `unsafe` code. Each function is safe to call; where the kernel's interface
//! has a precondition that memory safety rests on, the function checks it.
#![allow(unsafe_code)] // leaf crate: system calls without a safe wrapper

mod capabilities;
mod device_filter;
mod fork;
mod helper;
mod memfd;
mod mount;
mod placeholder;
mod process;
mod spawn;
mod stack;

pub use capabilities::CAPABILITY_NAMES;
pub use device_filter::{ACCESS_MKNOD, ACCESS_READ, ACCESS_WRITE, DeviceFilter, DeviceRule};
pub use fork::{CLONE_INTO_CGROUP, Fork, ForkArgs, fork};
pub use helper::help;
pub use memfd::sealed_copy;
pub use mount::{MountAttr, mount_setattr, namespace_owner};
pub use placeholder::Placeholder;
pub use process::{
    close_all, close_all_but, close_range_cloexec, execve, exit_now, install_seccomp_filter,
    join_session_keyring, make_controlling_terminal, note_signals, pidfd_send_signal, reset_signals,
    set_rlimit,
};
pub use spawn::{SpawnArgs, spawn, spawn_into_cgroup};

#[cfg(test)]
mod test_cgroup;

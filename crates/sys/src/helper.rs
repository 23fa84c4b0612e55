//! A child that works on its parent's memory while the parent waits: vfork(2) with a stack of its own.

use std::cell::UnsafeCell;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};

use libc::{c_int, c_void};

/// For the child, and for what it forks: that runs on on a copy of this.
const STACK: usize = 512 << 10;
const GUARD: usize = 64 << 10;

/// Runs `body` in a child that has descriptors, credentials, namespaces and signal handlers of its own, but the
/// caller's memory, and waits until it has ended. What `body` leaves in memory is there afterwards. No page table is
/// copied and no page is copied on write, so it costs a fraction of a fork.
///
/// A descriptor that `body` closes stays open here. `body` should not allocate: a child that is killed in the middle of
/// that would leave the allocator in disorder. It may [`fork`](crate::fork()) a process with memory of its own, which must never
/// return from `body`.
///
/// Errors: the caller has several threads, or is a helper itself, or the child could not be made. A `body` that panicked, or
/// was killed, is no error: it shows in what it has not left behind.
pub fn help<F: FnOnce()>(body: F) -> io::Result<()> {
    // As in `fork`: another thread would run on in the memory that the child changes.
    // SAFETY: no memory is passed.
    if unsafe { libc::unshare(libc::CLONE_THREAD) } != 0 {
        return Err(io::Error::other("help: the process has several threads"));
    }
    let stack = Stack::take()?;
    let mut slot = Some(body);
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    // SAFETY: the child runs `start` on a stack that nobody else uses and that outlives it, as does `slot`: with CLONE_VFORK
    // this thread, the only one, goes on when the child has ended. So it is a call on another stack to the memory, and
    // `body` is used as a call would use it.
    let pid = unsafe { libc::clone(start::<F>, stack.top(), flags, (&raw mut slot).cast::<c_void>()) };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    loop {
        // A child of ours that nobody has reaped, so the number is still its own.
        // SAFETY: no status is asked for.
        if unsafe { libc::waitpid(pid, ptr::null_mut(), 0) } == pid {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

extern "C" fn start<F: FnOnce()>(slot: *mut c_void) -> c_int {
    // SAFETY: it is the address of `slot` in `help`, which waits meanwhile.
    let slot = unsafe { &mut *slot.cast::<Option<F>>() };
    // Nothing may unwind out of here: there is no caller on this stack.
    let body = AssertUnwindSafe(|| slot.take().map(|body| body()));
    c_int::from(catch_unwind(body).is_err())
}

/// Memory for a stack, with a guard at its end. It is part of the program and not mapped for each helper: to do that, and to
/// touch new pages each time, took 17 µs, and a fork from it copies fewer page tables.
#[repr(C, align(65536))]
struct Memory(UnsafeCell<[u8; GUARD + STACK]>);

// SAFETY: only reached through `Stack`, of which there is one at a time.
unsafe impl Sync for Memory {}

static MEMORY: Memory = Memory(UnsafeCell::new([0; GUARD + STACK]));
static IN_USE: AtomicBool = AtomicBool::new(false);
static GUARDED: AtomicBool = AtomicBool::new(false);

/// The right to use [`MEMORY`].
struct Stack(());

impl Stack {
    fn take() -> io::Result<Self> {
        if IN_USE.swap(true, Ordering::Acquire) {
            return Err(io::Error::other("help: called in a helper, or in what it has forked"));
        }
        let stack = Self(());
        if !GUARDED.load(Ordering::Relaxed) {
            // SAFETY: the first part of the memory, aligned to pages, which nobody uses: the stack is above it.
            if unsafe { libc::mprotect(MEMORY.0.get().cast(), GUARD, libc::PROT_NONE) } != 0 {
                return Err(io::Error::last_os_error());
            }
            GUARDED.store(true, Ordering::Relaxed);
        }
        Ok(stack)
    }

    /// Stacks grow downwards. Aligned as a page.
    fn top(&self) -> *mut c_void {
        MEMORY.0.get().cast::<c_void>().wrapping_byte_add(GUARD + STACK)
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        IN_USE.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refused_with_several_threads() {
        // The test harness itself is a second thread.
        let error = help(|| {}).unwrap_err();
        assert!(error.to_string().contains("several threads"), "{error}");
    }
}

//! Memory for the stack of a child that shares its parent's.

use std::io;
use std::ptr;

use libc::c_void;

/// Ample for a few system calls.
const STACK: usize = 64 << 10;
const GUARD: usize = 64 << 10;

/// A stack of its own for each call, with a guard at its end.
pub(crate) struct Stack(*mut c_void);

impl Stack {
    pub(crate) fn new() -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_STACK;
        // SAFETY: new memory, at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(ptr::null_mut(), GUARD + STACK, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let stack = Self(base);
        // SAFETY: the first part of the memory made above, which nobody uses yet.
        if unsafe { libc::mprotect(base, GUARD, libc::PROT_NONE) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(stack)
    }

    /// Stacks grow downwards. Aligned as a page.
    pub(crate) fn top(&self) -> *mut c_void {
        self.0.wrapping_byte_add(GUARD + STACK)
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        // SAFETY: made by `new`; nobody runs on it any more.
        unsafe { libc::munmap(self.0, GUARD + STACK) };
    }
}

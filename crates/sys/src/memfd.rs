//! Sealed copies of programs.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{MemfdFlags, Mode, SealFlags, fchmod, fcntl_add_seals, memfd_create};
use rustix::io::Errno;

/// A sealed, executable copy of a file in memory: nothing can change it any more, not even a
/// process that reaches it through /proc/PID/exe (CVE-2019-5736).
pub fn sealed_copy(path: &Path) -> io::Result<OwnedFd> {
    /// MFD_EXEC (Linux 6.3): asks for an executable file even where sysctl vm.memfd_noexec is set.
    const MFD_EXEC: MemfdFlags = MemfdFlags::from_bits_retain(0x10);
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut source = File::open(path)?;
    let memfd = match memfd_create(c"stave-pod", flags | MFD_EXEC) {
        Err(Errno::INVAL) => memfd_create(c"stave-pod", flags)?,
        other => other?,
    };
    let mut copy = File::from(memfd);
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let n = match source.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        copy.write_all(buffer.get(..n).unwrap_or_default())?;
    }
    fchmod(&copy, Mode::from_raw_mode(0o555))?;
    fcntl_add_seals(&copy, SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE)?;
    Ok(copy.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::io::write;

    #[test]
    fn a_copy_is_whole_and_cannot_be_written() {
        let copy = sealed_copy(Path::new("/bin/true")).unwrap();
        assert_eq!(write(&copy, b"x"), Err(Errno::PERM));
        assert_eq!(rustix::fs::ftruncate(&copy, 0), Err(Errno::PERM));
        let mut content = Vec::new();
        let mut file = File::from(copy);
        std::io::Seek::rewind(&mut file).unwrap();
        file.read_to_end(&mut content).unwrap();
        assert_eq!(content, std::fs::read("/bin/true").unwrap());
    }

    #[test]
    fn a_missing_file_is_an_error() {
        assert_eq!(sealed_copy(Path::new("/nonexistent")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}

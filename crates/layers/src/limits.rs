//! Limits on what a layer may hold.

/// Limits on one layer's archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Entries, whiteouts included.
    pub entries: u64,
    /// Bytes of the uncompressed archive.
    pub total_bytes: u64,
    /// Bytes of one entry's headers: long names and extended attributes.
    pub header_bytes: u64,
    /// Components of a path.
    pub path_depth: usize,
    /// Bytes of one extended attribute's value (the kernel's own limit is 64 KiB).
    pub xattr_bytes: usize,
    /// Extended attributes of one entry.
    pub xattrs: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            entries: 4_000_000,
            total_bytes: 256 << 30,
            header_bytes: 1 << 20,
            path_depth: 256,
            xattr_bytes: 64 << 10,
            xattrs: 128,
        }
    }
}

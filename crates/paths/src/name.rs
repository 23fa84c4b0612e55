//! Single path components.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::PathError;

/// Longest file name, in bytes (`NAME_MAX`).
pub(crate) const NAME_MAX: usize = 255;
/// Longest path, in bytes (`PATH_MAX`, with its NUL).
pub(crate) const PATH_MAX: usize = 4096;

/// Accepts `name` only if it is exactly one path component: not empty, not `.` or `..`, without
/// `/` and NUL, at most 255 bytes. Check with it whatever becomes part of a path that is created or
/// removed: an empty component turns "remove this" into "remove its parent".
pub fn check_component<S: AsRef<OsStr> + ?Sized>(name: &S) -> Result<&OsStr, PathError> {
    let name = name.as_ref();
    let bytes = name.as_bytes();
    let reason = if bytes.is_empty() {
        "empty component"
    } else if bytes == b"." || bytes == b".." {
        "not a name"
    } else if bytes.contains(&b'/') {
        "contains a slash"
    } else if bytes.contains(&0) {
        "contains a NUL byte"
    } else if bytes.len() > NAME_MAX {
        "longer than 255 bytes"
    } else {
        return Ok(name);
    };
    Err(PathError::invalid(Path::new(name), reason))
}

/// Refuses what no lookup should see: the empty path, NUL bytes, more than `PATH_MAX`.
pub(crate) fn check_path(path: &Path) -> Result<(), PathError> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.is_empty() {
        return Err(PathError::invalid(path, "empty"));
    }
    if bytes.contains(&0) {
        return Err(PathError::invalid(path, "contains a NUL byte"));
    }
    if bytes.len() >= PATH_MAX {
        return Err(PathError::invalid(path, "longer than 4095 bytes"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_single_components_are_names() {
        for bad in ["", ".", "..", "a/b", "/", "a/", "a\0b"] {
            assert!(check_component(bad).is_err(), "{bad:?}");
        }
        assert!(check_component(&"x".repeat(256)).is_err());
        for good in ["a", "...", ".wh.x", "ü", &"x".repeat(255)] {
            assert!(check_component(good).is_ok(), "{good:?}");
        }
    }
}

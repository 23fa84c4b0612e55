//! Checks of strings and paths, shared by all fields.

use crate::SpecError;

/// Longest path that the kernel takes, without its NUL (PATH_MAX).
pub(crate) const PATH_MAX: usize = 4095;

/// No NUL: the string ends up as a C string.
pub(crate) fn no_nul(field: &str, value: &str) -> Result<(), SpecError> {
    if value.contains('\0') {
        return Err(SpecError::invalid(field, value, "contains a NUL byte"));
    }
    Ok(())
}

/// No control character: the string ends up in a line of a file or of a log.
pub(crate) fn no_control(field: &str, value: &str) -> Result<(), SpecError> {
    if value.chars().any(char::is_control) {
        return Err(SpecError::invalid(field, value, "contains a control character"));
    }
    Ok(())
}

/// An absolute path that fits the kernel.
pub(crate) fn absolute(field: &str, path: &str) -> Result<(), SpecError> {
    no_nul(field, path)?;
    if !path.starts_with('/') {
        return Err(SpecError::invalid(field, path, "must be an absolute path"));
    }
    if path.len() > PATH_MAX {
        return Err(SpecError::invalid(field, path, format!("is longer than {PATH_MAX} bytes")));
    }
    if path.split('/').any(|part| part.len() > 255) {
        return Err(SpecError::invalid(field, path, "has a component of more than 255 bytes"));
    }
    Ok(())
}

/// An absolute path without "..".
pub(crate) fn absolute_without_dotdot(field: &str, path: &str) -> Result<(), SpecError> {
    absolute(field, path)?;
    if path.split('/').any(|part| part == "..") {
        return Err(SpecError::invalid(field, path, "must not contain \"..\""));
    }
    Ok(())
}

/// The path without empty components, "." and "..": "/a//b/../c/" is "/a/c". A relative path is taken from "/".
pub(crate) fn clean(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

/// `path` is `parent` or below it; both cleaned.
pub(crate) fn is_at_or_below(path: &str, parent: &str) -> bool {
    parent == "/" || path.strip_prefix(parent).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// At most `max` entries.
pub(crate) fn at_most(field: &str, count: usize, max: usize) -> Result<(), SpecError> {
    if count > max {
        return Err(SpecError::invalid(field, count, format!("has more than {max} entries")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cleans_paths() {
        for (path, want) in [
            ("/", "/"),
            ("", "/"),
            ("/a//b/", "/a/b"),
            ("/a/./b/../c", "/a/c"),
            ("/../../a", "/a"),
            ("a/b", "/a/b"),
            ("/a/...", "/a/..."),
        ] {
            assert_eq!(clean(path), want, "{path}");
        }
    }

    #[test]
    fn compares_whole_components() {
        assert!(is_at_or_below("/dev/shm", "/dev"));
        assert!(is_at_or_below("/dev", "/dev"));
        assert!(is_at_or_below("/x", "/"));
        assert!(!is_at_or_below("/device", "/dev"));
        assert!(!is_at_or_below("/dev", "/dev/shm"));
    }

    #[test]
    fn refuses_bad_paths() {
        let long = format!("/{}", "a/".repeat(2048));
        let component = format!("/{}", "a".repeat(256));
        for path in ["", "a", "./a", "/a\0b", &long, &component] {
            let error = absolute("f", path).unwrap_err();
            assert_eq!((error.code, error.field.as_str()), (crate::Code::InvalidArgument, "f"));
        }
        absolute("f", "/a/../b").unwrap();
        absolute_without_dotdot("f", "/a/..b").unwrap();
        absolute_without_dotdot("f", "/a/../b").unwrap_err();
    }
}

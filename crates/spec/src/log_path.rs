//! Where a container's log goes.

use std::path::{Path, PathBuf};

use crate::SpecError;
use crate::text::{PATH_MAX, absolute_without_dotdot, no_control};

/// The log file inside the pod's log directory; `None` where either is empty. Errors: a directory that
/// is not absolute, a path that is absolute, and empty, "." or ".." components.
pub fn log_path(log_directory: &str, log_path: &str) -> Result<Option<PathBuf>, SpecError> {
    validate_log_directory(log_directory)?;
    let field = "config.log_path";
    if log_path.is_empty() {
        return Ok(None);
    }
    no_control(field, log_path)?;
    if log_path.starts_with('/') {
        return Err(SpecError::invalid(field, log_path, "must be relative to the pod's log directory"));
    }
    for part in log_path.split('/') {
        match part {
            "" => return Err(SpecError::invalid(field, log_path, "has an empty component")),
            "." | ".." => {
                return Err(SpecError::invalid(field, log_path, format!("must not contain {part:?}")));
            }
            part if part.len() > 255 => {
                return Err(SpecError::invalid(field, log_path, "has a component of more than 255 bytes"));
            }
            _ => {}
        }
    }
    if log_directory.is_empty() {
        return Ok(None);
    }
    if log_directory.len() + 1 + log_path.len() > PATH_MAX {
        return Err(SpecError::invalid(
            field,
            log_path,
            format!("makes a path of more than {PATH_MAX} bytes"),
        ));
    }
    Ok(Some(Path::new(log_directory).join(log_path)))
}

/// Empty, or absolute without "..".
pub(crate) fn validate_log_directory(directory: &str) -> Result<(), SpecError> {
    let field = "config.log_directory";
    if directory.is_empty() {
        return Ok(());
    }
    no_control(field, directory)?;
    absolute_without_dotdot(field, directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stays_inside_the_directory() {
        for (directory, path, want) in [
            ("/var/log/pods/x", "web/0.log", Some("/var/log/pods/x/web/0.log")),
            ("/var/log/pods/x/", "0.log", Some("/var/log/pods/x/0.log")),
            ("/l", "..a/b..", Some("/l/..a/b..")),
            ("", "0.log", None),
            ("/l", "", None),
            ("", "", None),
        ] {
            assert_eq!(log_path(directory, path).unwrap(), want.map(PathBuf::from), "{directory} {path}");
        }
    }

    #[test]
    fn cve_2024_5154() {
        let long = "a".repeat(256);
        for (directory, path, field) in [
            ("/l", "../x", "config.log_path"),
            ("/l", "a/../../x", "config.log_path"),
            ("/l", "..", "config.log_path"),
            ("/l", ".", "config.log_path"),
            ("/l", "a//b", "config.log_path"),
            ("/l", "a/", "config.log_path"),
            ("/l", "/etc/passwd", "config.log_path"),
            ("/l", "a\nb", "config.log_path"),
            ("/l", "a\0b", "config.log_path"),
            ("/l", long.as_str(), "config.log_path"),
            // Refused although there is no directory to put it in.
            ("", "../x", "config.log_path"),
            ("l", "x", "config.log_directory"),
            ("/l/../m", "x", "config.log_directory"),
            ("/l\n", "x", "config.log_directory"),
        ] {
            assert_eq!(log_path(directory, path).unwrap_err().field, field, "{directory} {path}");
        }
    }
}

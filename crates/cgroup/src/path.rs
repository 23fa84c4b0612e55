use crate::CgroupError;

/// Checks an absolute cgroup path of the cgroupfs driver.
pub(crate) fn check_cgroupfs(path: &str) -> Result<(), CgroupError> {
    if path.split('/').any(|part| part.ends_with(".slice") || part.ends_with(".scope")) {
        return Err(CgroupError::SystemdSlice { path: path.chars().take(300).collect() });
    }
    check(path)
}

/// Checks an absolute cgroup path of either driver.
pub(crate) fn check(path: &str) -> Result<(), CgroupError> {
    let invalid = |reason| Err(CgroupError::InvalidPath { path: path.chars().take(300).collect(), reason });
    if path.len() > 2048 {
        return invalid("longer than 2048 bytes");
    }
    let Some(rest) = path.strip_prefix('/') else { return invalid("not absolute") };
    if path.chars().any(char::is_control) {
        return invalid("control characters");
    }
    for part in rest.split('/') {
        match part {
            "" => return invalid("empty part"),
            "." | ".." => return invalid("\".\" or \"..\" part"),
            part if part.len() > 255 => return invalid("part longer than 255 bytes"),
            _ => {}
        }
    }
    Ok(())
}

/// Checks an id that becomes one path component.
pub(crate) fn check_name(what: &'static str, value: &str) -> Result<(), CgroupError> {
    let good = !value.is_empty()
        && value.len() <= 255
        && value != "."
        && value != ".."
        && value.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
    if good {
        Ok(())
    } else {
        Err(CgroupError::InvalidName { what, value: value.chars().take(300).collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        assert!(check_cgroupfs("/kubepods/burstable/pod12-3").is_ok());
        assert!(check("/kubepods.slice/kubepods-pod1.slice/stave-1.scope").is_ok());
        for bad in
            ["", "/", "a/b", "/a//b", "/a/", "/a/../b", "/a/./b", "/a\n", &format!("/{}", "a".repeat(256))]
        {
            assert!(matches!(check_cgroupfs(bad), Err(CgroupError::InvalidPath { .. })), "{bad:?}");
        }
        for slice in ["kubepods-burstable-podx.slice", "/kubepods.slice/kubepods-podx.slice", "/test.slice"] {
            let error = check_cgroupfs(slice).unwrap_err().to_string();
            assert!(error.contains("systemd") && error.contains(slice), "{error}");
        }
    }

    #[test]
    fn names() {
        assert!(check_name("pod id", "0a1b_x.y-z").is_ok());
        for bad in ["", ".", "..", "a/b", "a b", "ä"] {
            assert!(check_name("pod id", bad).is_err(), "{bad:?}");
        }
    }
}

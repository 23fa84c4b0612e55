//! Slices and scopes of systemd: their names, and where it puts them.
//!
//! Source: systemd.slice(5), systemd.unit(5); `UNIT_NAME_MAX` and `unit_name_is_valid` of systemd.

use crate::CgroupError;

/// How the scope of a pod sandbox begins; its id and `.scope` follow.
const SCOPE_PREFIX: &str = "stave-";
const SCOPE: &str = ".scope";
const SLICE: &str = ".slice";

/// `UNIT_NAME_MAX` is 256, with the NUL.
const MAX_NAME: usize = 255;

/// The scope of a pod sandbox.
pub(crate) fn scope_name(pod_id: &str) -> String {
    format!("{SCOPE_PREFIX}{pod_id}{SCOPE}")
}

/// The scope that a pod's cgroup path ends in; none for a path of the cgroupfs driver.
pub(crate) fn scope_of(pod_path: &str) -> Option<&str> {
    let name = pod_path.rsplit('/').next()?;
    let id = name.strip_prefix(SCOPE_PREFIX)?.strip_suffix(SCOPE)?;
    (!id.is_empty()).then_some(name)
}

/// The slice that a scope's cgroup path is in: the part before the last.
pub(crate) fn slice_of(pod_path: &str) -> Option<&str> {
    pod_path.rsplit('/').nth(1).filter(|name| name.ends_with(SLICE))
}

/// The name of the slice that a cgroup parent means: `a-b.slice`, `/a-b.slice` or, as the kubelet writes it,
/// `/a.slice/a-b.slice`.
pub(crate) fn slice_name(parent: &str) -> Result<&str, CgroupError> {
    let invalid =
        |reason: String| Err(CgroupError::NotASlice { path: parent.chars().take(300).collect(), reason });
    let path = parent.strip_prefix('/').unwrap_or(parent);
    let name = path.rsplit('/').next().unwrap_or(path);
    let Some(stem) = name.strip_suffix(SLICE) else {
        return invalid("its last part does not end in .slice".into());
    };
    if name.len() > MAX_NAME {
        return invalid(format!("the name of a unit has up to {MAX_NAME} bytes"));
    }
    if !stem.bytes().all(|b| b.is_ascii_alphanumeric() || b":-_.\\".contains(&b)) {
        return invalid(
            "letters, digits, ':', '-', '_', '.' and '\\' are allowed in the name of a unit".into(),
        );
    }
    // Each dash is a level; the root slice, -.slice, is no place for a pod.
    if stem.split('-').any(str::is_empty) {
        return invalid("it begins or ends with a dash, or has two in a row, or nothing between".into());
    }
    // A name alone is enough; a path must be the one that systemd makes of the name.
    let expanded = expand(name);
    if path.contains('/') && path != expanded.trim_start_matches('/') {
        return invalid(format!("systemd puts {name} at {expanded}"));
    }
    Ok(name)
}

/// Where systemd puts a slice, below its own cgroup: `a-b-c.slice` is `/a.slice/a-b.slice/a-b-c.slice`.
pub(crate) fn expand(slice: &str) -> String {
    let stem = slice.strip_suffix(SLICE).unwrap_or(slice);
    let mut path = String::new();
    for (dash, _) in stem.match_indices('-').chain([(stem.len(), "")]) {
        path.push('/');
        path.push_str(&stem[..dash]);
        path.push_str(SLICE);
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_nested_by_their_dashes() {
        assert_eq!(expand("stave.slice"), "/stave.slice");
        assert_eq!(
            expand("kubepods-burstable-pod12_3.slice"),
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod12_3.slice"
        );
    }

    #[test]
    fn what_the_kubelet_and_people_write() {
        for parent in [
            "kubepods-pod1.slice",
            "/kubepods-pod1.slice",
            "/kubepods.slice/kubepods-pod1.slice",
            "kubepods.slice/kubepods-pod1.slice",
        ] {
            assert_eq!(slice_name(parent).unwrap(), "kubepods-pod1.slice", "{parent}");
        }
        assert_eq!(slice_name("/test.slice").unwrap(), "test.slice");
    }

    #[test]
    fn what_is_no_slice_is_refused_and_named() {
        let long = format!("{}.slice", "a".repeat(250));
        for (parent, why) in [
            ("/kubepods/burstable/pod1", "does not end in .slice"),
            ("/", "does not end in .slice"),
            ("/a.slice/x.scope", "does not end in .slice"),
            (".slice", "nothing between"),
            ("-.slice", "dash"),
            ("a--b.slice", "dash"),
            ("-a.slice", "dash"),
            ("a-.slice", "dash"),
            ("a b.slice", "letters"),
            ("../a.slice", "systemd puts a.slice at /a.slice"),
            ("/x.slice/a-b.slice", "/a.slice/a-b.slice"),
            ("/a-b.slice/", "does not end in .slice"),
            ("//a.slice", "systemd puts"),
            ("a\n.slice", "letters"),
            (long.as_str(), "255 bytes"),
        ] {
            let error = slice_name(parent).unwrap_err().to_string();
            assert!(error.contains(why) && error.contains("systemd"), "{parent:?}: {error}");
        }
    }

    #[test]
    fn scopes_are_told_from_paths_of_the_other_driver() {
        let path = format!("/a.slice/{}", scope_name("12ab"));
        assert_eq!(path, "/a.slice/stave-12ab.scope");
        assert_eq!((scope_of(&path), slice_of(&path)), (Some("stave-12ab.scope"), Some("a.slice")));
        for other in ["/stave/12ab", "/a.slice", "/a/stave-.scope", "/a/crio-12.scope", "/stave-x.scope/c1"] {
            assert_eq!(scope_of(other), None, "{other}");
        }
        assert_eq!(slice_of("/stave/12ab"), None);
    }
}

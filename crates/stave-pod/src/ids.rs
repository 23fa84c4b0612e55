//! Ids of pods, containers and exec'd processes. They become names of files and cgroups.

use stave_supervisor_proto::v1::Failure;

use crate::failure;

const MAX_LEN: usize = 128;

/// Letters, digits, `_`, `-` and `.`, not with a dot in front.
pub(crate) fn is_valid(id: &str) -> bool {
    (1..=MAX_LEN).contains(&id.len())
        && !id.starts_with('.')
        && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.'))
}

/// Refuses an id that could be more than a plain file name.
pub(crate) fn check(field: &str, id: &str) -> Result<(), Failure> {
    if is_valid(id) { Ok(()) } else { Err(failure::invalid(format!("{field} {id:?} is not a valid id"))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_names() {
        for id in ["a", "0f3c", "a.b-c_D", &"x".repeat(128)] {
            assert!(is_valid(id), "{id}");
        }
        for id in ["", ".", "..", ".tmp", "a/b", "a\0b", "ä", "a b", &"x".repeat(129)] {
            assert!(!is_valid(id), "{id}");
        }
    }
}

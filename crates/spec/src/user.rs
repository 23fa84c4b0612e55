//! Who the process of a container is.

use stave_cri_proto::v1::{Int64Value, LinuxContainerSecurityContext, SupplementalGroupsPolicy};
use stave_supervisor_proto::v1::User;

use crate::SpecError;
use crate::text::at_most;

/// Highest uid and gid. More would come out negative, and so as root, wherever an id is an int (CVE-2024-40635).
const ID_MAX: i64 = i32::MAX as i64;

/// Most supplementary groups of a process (NGROUPS_MAX).
const GROUPS_MAX: usize = 65536;

/// The user: `run_as_username`, else `run_as_user`, else the image's, else root.
pub(crate) fn user(context: &LinuxContainerSecurityContext, image: &str) -> Result<User, SpecError> {
    let at = "config.linux.security_context";
    let uid = id(&format!("{at}.run_as_user"), context.run_as_user.as_ref())?;
    let gid = id(&format!("{at}.run_as_group"), context.run_as_group.as_ref())?;
    let mut user = if !context.run_as_username.is_empty() {
        name_or_id(&format!("{at}.run_as_username"), &context.run_as_username)?
    } else if let Some(uid) = uid {
        User { uid, ..User::default() }
    } else if let Some(gid) = gid {
        let message = "needs run_as_user or run_as_username";
        return Err(SpecError::invalid(format!("{at}.run_as_group"), gid, message));
    } else {
        image_user(image)?
    };
    if gid.is_some() {
        user.gid = gid;
        user.group_name.clear();
    }
    user.supplemental_groups = groups(&format!("{at}.supplemental_groups"), &context.supplemental_groups)?;
    user.merge_image_groups =
        policy(&format!("{at}.supplemental_groups_policy"), context.supplemental_groups_policy)?
            == SupplementalGroupsPolicy::Merge;
    Ok(user)
}

/// An image's `User`: "", "uid", "name", each with ":gid" or ":group".
fn image_user(image: &str) -> Result<User, SpecError> {
    let field = "image.user";
    if image.is_empty() {
        return Ok(User::default());
    }
    let Some((name, group)) = image.split_once(':') else { return name_or_id(field, image) };
    let mut user = name_or_id(field, name).map_err(|e| SpecError::invalid(field, image, e.message))?;
    let group = name_or_id(field, group).map_err(|e| SpecError::invalid(field, image, e.message))?;
    if group.name.is_empty() {
        user.gid = Some(group.uid);
    } else {
        user.group_name = group.name;
    }
    Ok(user)
}

/// Digits are always an id, never a name: a passwd file of the image may call root "1000" (CVE-2026-46680).
fn name_or_id(field: &str, text: &str) -> Result<User, SpecError> {
    if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
        let id = text.parse::<i64>().ok().filter(|id| *id <= ID_MAX);
        let id = id.and_then(|id| u32::try_from(id).ok());
        let id = id.ok_or_else(|| SpecError::invalid(field, text, format!("is larger than {ID_MAX}")))?;
        return Ok(User { uid: id, ..User::default() });
    }
    let is_name = !text.is_empty()
        && text.len() <= 256
        // "-1" and "+1" are no names either.
        && !text.starts_with(['-', '+'])
        && !text.contains([':', '/'])
        && !text.chars().any(|c| c.is_control() || c.is_whitespace());
    if !is_name {
        return Err(SpecError::invalid(field, text, "is neither an id nor a name"));
    }
    Ok(User { name: text.to_owned(), ..User::default() })
}

/// A uid or gid of a request.
pub(crate) fn id(field: &str, value: Option<&Int64Value>) -> Result<Option<u32>, SpecError> {
    value.map(|value| one_id(field, value.value)).transpose()
}

fn one_id(field: &str, value: i64) -> Result<u32, SpecError> {
    u32::try_from(value)
        .ok()
        .filter(|_| value <= ID_MAX)
        .ok_or_else(|| SpecError::invalid(field, value, format!("must be between 0 and {ID_MAX}")))
}

/// Supplementary groups of a request.
pub(crate) fn groups(field: &str, groups: &[i64]) -> Result<Vec<u32>, SpecError> {
    at_most(field, groups.len(), GROUPS_MAX)?;
    groups.iter().enumerate().map(|(i, group)| one_id(&format!("{field}[{i}]"), *group)).collect()
}

/// A policy of a request.
pub(crate) fn policy(field: &str, value: i32) -> Result<SupplementalGroupsPolicy, SpecError> {
    SupplementalGroupsPolicy::try_from(value)
        .map_err(|_| SpecError::invalid(field, value, "is not a policy for supplementary groups"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context(name: &str, uid: Option<i64>, gid: Option<i64>) -> LinuxContainerSecurityContext {
        LinuxContainerSecurityContext {
            run_as_username: name.to_owned(),
            run_as_user: uid.map(|value| Int64Value { value }),
            run_as_group: gid.map(|value| Int64Value { value }),
            ..Default::default()
        }
    }

    type Expected = (u32, &'static str, Option<u32>, &'static str);

    fn brief(user: &User) -> (u32, &str, Option<u32>, &str) {
        (user.uid, &user.name, user.gid, &user.group_name)
    }

    #[test]
    fn cve_2026_30892() {
        // Every form of an image's user.
        let table: &[(&str, Option<Expected>)] = &[
            ("", Some((0, "", None, ""))),
            ("1", Some((1, "", None, ""))),
            ("1:2", Some((1, "", Some(2), ""))),
            ("1:0", Some((1, "", Some(0), ""))),
            ("0:0", Some((0, "", Some(0), ""))),
            ("name", Some((0, "name", None, ""))),
            ("name:group", Some((0, "name", None, "group"))),
            ("name:5", Some((0, "name", Some(5), ""))),
            ("1:group", Some((1, "", None, "group"))),
            ("2147483647", Some((2147483647, "", None, ""))),
            ("007", Some((7, "", None, ""))),
            (":0", None),
            (":", None),
            ("1:", None),
            ("name:", None),
            ("-1", None),
            ("+1", None),
            ("2147483648", None),
            ("4294967295", None),
            ("4294967296", None),
            ("18446744073709551616", None),
            ("1:4294967296", None),
            ("1:2:3", None),
            ("1:-2", None),
            ("na me", None),
            ("name\n", None),
            ("na/me", None),
            ("nul\0", None),
        ];
        for (text, want) in table {
            let got = user(&context("", None, None), text);
            match want {
                Some(want) => assert_eq!(brief(&got.unwrap()), *want, "{text:?}"),
                None => assert_eq!(got.unwrap_err().field, "image.user", "{text:?}"),
            }
        }
    }

    #[test]
    fn cve_2026_46680() {
        // An all-digit name is an id for every source.
        assert_eq!(brief(&user(&context("1000", None, None), "").unwrap()), (1000, "", None, ""));
        assert_eq!(brief(&user(&context("", None, None), "1000").unwrap()), (1000, "", None, ""));
    }

    #[test]
    fn cve_2024_40635() {
        for (uid, gid, field) in [
            (Some(-1), None, "run_as_user"),
            (Some(1 << 31), None, "run_as_user"),
            (Some(1 << 32), None, "run_as_user"),
            (Some(i64::MIN), None, "run_as_user"),
            (Some(0), Some(-1), "run_as_group"),
            (Some(0), Some(1 << 31), "run_as_group"),
        ] {
            let error = user(&context("", uid, gid), "").unwrap_err();
            assert_eq!(error.field, format!("config.linux.security_context.{field}"));
        }
        let mut groups = context("", None, None);
        groups.supplemental_groups = vec![1, 1 << 31];
        let error = user(&groups, "").unwrap_err();
        assert_eq!(error.field, "config.linux.security_context.supplemental_groups[1]");
    }

    #[test]
    fn precedence() {
        for (name, uid, gid, image, want) in [
            ("web", Some(5), None, "1:2", (0, "web", None, "")),
            ("", Some(5), None, "1:2", (5, "", None, "")),
            ("", Some(5), Some(6), "name:group", (5, "", Some(6), "")),
            ("web", None, Some(6), "1:2", (0, "web", Some(6), "")),
            ("", Some(0), Some(0), "1:2", (0, "", Some(0), "")),
            ("", None, None, "name:group", (0, "name", None, "group")),
        ] {
            assert_eq!(brief(&user(&context(name, uid, gid), image).unwrap()), want);
        }
        // A group alone is an error, also with a user in the image.
        for image in ["", "1:2"] {
            let error = user(&context("", None, Some(6)), image).unwrap_err();
            assert_eq!(error.field, "config.linux.security_context.run_as_group");
        }
        for name in ["1:2", "-1", "a b", "a:b", "4294967296"] {
            let error = user(&context(name, None, None), "").unwrap_err();
            assert_eq!(error.field, "config.linux.security_context.run_as_username");
        }
    }

    #[test]
    fn cve_2023_25173() {
        for (policy, merge) in [(0, Some(true)), (1, Some(false)), (2, None), (-1, None)] {
            for groups in [vec![], vec![1234, 50000]] {
                let mut context = context("", Some(1000), None);
                context.supplemental_groups_policy = policy;
                context.supplemental_groups = groups.clone();
                match (user(&context, "9:9"), merge) {
                    (Ok(user), Some(merge)) => {
                        assert_eq!(user.merge_image_groups, merge);
                        assert_eq!(user.supplemental_groups.len(), groups.len());
                        assert_eq!(user.gid, None);
                    }
                    (Err(error), None) => {
                        assert_eq!(error.field, "config.linux.security_context.supplemental_groups_policy");
                    }
                    (got, _) => panic!("{policy}: {got:?}"),
                }
            }
        }
    }
}

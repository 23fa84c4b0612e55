//! Security profiles, seccomp and SELinux of a security context.

use std::path::PathBuf;

use stave_cri_proto::v1::security_profile::ProfileType;
use stave_cri_proto::v1::{SeLinuxOption, SecurityProfile};

use crate::SpecError;

/// A profile, whichever field asked for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Profile {
    /// Nothing was asked for.
    Unset,
    RuntimeDefault,
    Unconfined,
    /// File of a seccomp profile, name of an AppArmor profile.
    Localhost(String),
}

/// The seccomp profile: `seccomp`, else the deprecated `seccomp_profile_path`. `at`: the security context's field.
pub(crate) fn seccomp(at: &str, profile: Option<&SecurityProfile>, path: &str) -> Result<Profile, SpecError> {
    let field = format!("{at}.seccomp_profile_path");
    let found = match profile {
        Some(profile) => security_profile(&format!("{at}.seccomp"), profile)?,
        None => match path {
            "" => Profile::Unset,
            "unconfined" => Profile::Unconfined,
            "runtime/default" | "docker/default" => Profile::RuntimeDefault,
            path => match path.strip_prefix("localhost/") {
                Some(file) => Profile::Localhost(file.to_owned()),
                None => return Err(SpecError::invalid(field, path, "is not a seccomp profile")),
            },
        },
    };
    if let Profile::Localhost(file) = &found {
        let field = if profile.is_some() { format!("{at}.seccomp.localhost_ref") } else { field };
        crate::text::absolute_without_dotdot(&field, file)?;
    }
    Ok(found)
}

pub(crate) fn security_profile(field: &str, profile: &SecurityProfile) -> Result<Profile, SpecError> {
    let kind = ProfileType::try_from(profile.profile_type).map_err(|_| {
        SpecError::invalid(format!("{field}.profile_type"), profile.profile_type, "is not a profile type")
    })?;
    if kind != ProfileType::Localhost && !profile.localhost_ref.is_empty() {
        let message = format!("does not go with the profile type {}", kind.as_str_name());
        return Err(SpecError::invalid(format!("{field}.localhost_ref"), &profile.localhost_ref, message));
    }
    Ok(match kind {
        ProfileType::RuntimeDefault => Profile::RuntimeDefault,
        ProfileType::Unconfined => Profile::Unconfined,
        ProfileType::Localhost if profile.localhost_ref.is_empty() => {
            let message = "is required with the profile type Localhost";
            return Err(SpecError::invalid(format!("{field}.localhost_ref"), "", message));
        }
        ProfileType::Localhost => Profile::Localhost(profile.localhost_ref.clone()),
    })
}

/// The seccomp filter of a container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Seccomp {
    /// None. Also: nothing was asked for, or the container is privileged.
    #[default]
    Unconfined,
    /// The runtime's own profile.
    RuntimeDefault,
    /// A profile on the host.
    Localhost {
        /// The field of the request that names it.
        field: String,
        /// Absolute, without `..`.
        path: PathBuf,
    },
}

/// The filter of a container. Privileged containers have none, whatever they ask for.
/// `new_field`: the profile comes from `seccomp`, not from the deprecated `seccomp_profile_path`.
pub(crate) fn seccomp_of_container(
    at: &str,
    profile: &Profile,
    new_field: bool,
    privileged: bool,
) -> Seccomp {
    let field = if new_field { "seccomp.localhost_ref" } else { "seccomp_profile_path" };
    match profile {
        _ if privileged => Seccomp::Unconfined,
        Profile::Unset | Profile::Unconfined => Seccomp::Unconfined,
        Profile::RuntimeDefault => Seccomp::RuntimeDefault,
        Profile::Localhost(path) => {
            Seccomp::Localhost { field: format!("{at}.{field}"), path: PathBuf::from(path) }
        }
    }
}

/// Checks the syntax of SELinux options. True: one of them is set.
pub(crate) fn selinux(field: &str, options: &SeLinuxOption) -> Result<bool, SpecError> {
    for (name, value) in [("user", &options.user), ("role", &options.role), ("type", &options.r#type)] {
        if !value.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'.' || b == b'-') {
            return Err(SpecError::invalid(format!("{field}.{name}"), value, "is not an SELinux name"));
        }
    }
    if !options.level.is_empty() && !is_level_range(&options.level) {
        let message = "is not an SELinux level, such as \"s0:c1,c2\"";
        return Err(SpecError::invalid(format!("{field}.level"), &options.level, message));
    }
    Ok([&options.user, &options.role, &options.r#type, &options.level].iter().any(|v| !v.is_empty()))
}

/// `level` or `level-level`, with `level` = `sN` or `sN:cN,cN.cN`.
fn is_level_range(text: &str) -> bool {
    text.len() <= 4096 && text.splitn(2, '-').all(is_level)
}

fn is_level(text: &str) -> bool {
    let (sensitivity, categories) = match text.split_once(':') {
        Some((sensitivity, categories)) => (sensitivity, Some(categories)),
        None => (text, None),
    };
    number(sensitivity, 's', 15).is_some()
        && categories.is_none_or(|list| {
            list.split(',').all(|item| match item.split_once('.') {
                Some((low, high)) => {
                    matches!((number(low, 'c', 1023), number(high, 'c', 1023)), (Some(l), Some(h)) if l < h)
                }
                None => number(item, 'c', 1023).is_some(),
            })
        })
}

fn number(text: &str, prefix: char, max: u32) -> Option<u32> {
    let digits = text.strip_prefix(prefix)?;
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok().filter(|n| *n <= max)
}

#[cfg(test)]
mod tests {
    use super::*;
    fn profile(kind: ProfileType, localhost: &str) -> SecurityProfile {
        SecurityProfile { profile_type: kind as i32, localhost_ref: localhost.to_owned() }
    }

    #[test]
    fn the_new_field_wins_over_the_old() {
        let unconfined = profile(ProfileType::Unconfined, "");
        assert_eq!(seccomp("c", Some(&unconfined), "runtime/default").unwrap(), Profile::Unconfined);
        assert_eq!(seccomp("c", None, "").unwrap(), Profile::Unset);
        assert_eq!(seccomp("c", None, "docker/default").unwrap(), Profile::RuntimeDefault);
        assert_eq!(seccomp("c", None, "localhost//a").unwrap(), Profile::Localhost("/a".into()));
        let empty = SecurityProfile::default();
        assert_eq!(seccomp("c", Some(&empty), "").unwrap(), Profile::RuntimeDefault);
    }

    #[test]
    fn bad_profiles_name_their_field() {
        let with_ref = profile(ProfileType::RuntimeDefault, "/x");
        let no_ref = profile(ProfileType::Localhost, "");
        let relative = profile(ProfileType::Localhost, "x/../y");
        let unknown = SecurityProfile { profile_type: 9, ..Default::default() };
        assert_eq!(seccomp("c", Some(&with_ref), "").unwrap_err().field, "c.seccomp.localhost_ref");
        assert_eq!(seccomp("c", Some(&no_ref), "").unwrap_err().field, "c.seccomp.localhost_ref");
        assert_eq!(seccomp("c", Some(&relative), "").unwrap_err().field, "c.seccomp.localhost_ref");
        assert_eq!(seccomp("c", Some(&unknown), "").unwrap_err().field, "c.seccomp.profile_type");
        assert_eq!(seccomp("c", None, "nonsense").unwrap_err().field, "c.seccomp_profile_path");
        assert_eq!(seccomp("c", None, "localhost/x").unwrap_err().field, "c.seccomp_profile_path");
    }

    #[test]
    fn privileged_containers_have_no_filter() {
        let local = Profile::Localhost("/p".into());
        for profile in [&Profile::Unset, &Profile::Unconfined, &Profile::RuntimeDefault, &local] {
            assert_eq!(seccomp_of_container("c", profile, true, true), Seccomp::Unconfined);
        }
        for profile in [&Profile::Unset, &Profile::Unconfined] {
            assert_eq!(seccomp_of_container("c", profile, true, false), Seccomp::Unconfined);
        }
        assert_eq!(seccomp_of_container("c", &Profile::RuntimeDefault, true, false), Seccomp::RuntimeDefault);
        for (new, field) in [(true, "c.seccomp.localhost_ref"), (false, "c.seccomp_profile_path")] {
            let want = Seccomp::Localhost { field: field.into(), path: "/p".into() };
            assert_eq!(seccomp_of_container("c", &local, new, false), want);
        }
    }

    #[test]
    fn reads_selinux_levels() {
        for good in ["s0", "s0:c1", "s0:c1,c2", "s0:c0.c1023", "s0-s0:c0.c1023", "s0:c1,c3.c5-s15:c1023"] {
            assert!(is_level_range(good), "{good}");
        }
        for bad in
            ["", "s", "s16", "s0:", "s0:c1024", "s0:c1,", "s0:c2.c1", "c1", "s0-", "s0:c1,c2\n", "s0-s1-s2"]
        {
            assert!(!is_level_range(bad), "{bad:?}");
        }
        let options = SeLinuxOption { r#type: "spc_t;".into(), ..Default::default() };
        assert_eq!(selinux("f", &options).unwrap_err().field, "f.type");
        let options = SeLinuxOption { level: "nonsense".into(), ..Default::default() };
        assert_eq!(selinux("f", &options).unwrap_err().field, "f.level");
        assert!(!selinux("f", &SeLinuxOption::default()).unwrap());
        let options = SeLinuxOption { level: "s0:c1,c2".into(), ..Default::default() };
        assert!(selinux("f", &options).unwrap());
    }
}

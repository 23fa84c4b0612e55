//! Security profiles and seccomp of a security context.

use std::path::PathBuf;

use stave_cri_proto::v1::SecurityProfile;
use stave_cri_proto::v1::security_profile::ProfileType;

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
}

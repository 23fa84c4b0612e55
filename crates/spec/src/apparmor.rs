//! AppArmor of a security context.

use stave_cri_proto::v1::SecurityProfile;
use stave_lsm::apparmor::DEFAULT_PROFILE;

use crate::security::{Profile, security_profile};
use crate::text::no_control;
use crate::{AppArmor, Host, SpecError};

/// Checks what a pod asks for. No program of an image runs in the sandbox itself, so that is all.
pub(crate) fn validate(at: &str, profile: Option<&SecurityProfile>) -> Result<(), SpecError> {
    wanted(at, profile, "").map(drop)
}

/// The profile that a container gets, by its name; none: it is not confined.
///
/// As containerd and CRI-O have it: nothing asked for is the default; on a host without AppArmor the default is none,
/// and a named profile is an error; a privileged container has only what it names.
pub(crate) fn of_container(
    at: &str,
    profile: Option<&SecurityProfile>,
    name: &str,
    privileged: bool,
    apparmor: &AppArmor,
    host: &dyn Host,
) -> Result<Option<String>, SpecError> {
    let field = match profile {
        Some(_) => format!("{at}.apparmor"),
        None => format!("{at}.apparmor_profile"),
    };
    let loaded = |name: &str| {
        let loaded = host.apparmor_loaded(name);
        loaded.map_err(|e| SpecError::precondition(&field, name, format!("can't be looked up: {e}")))
    };
    match (wanted(at, profile, name)?, apparmor) {
        (Profile::Unconfined, _) => Ok(None),
        (Profile::Unset | Profile::RuntimeDefault, _) if privileged => Ok(None),
        (Profile::Unset | Profile::RuntimeDefault, AppArmor::Off) => Ok(None),
        // Nobody asked, and the host's administrator was told at the daemon's start.
        (Profile::Unset, AppArmor::NoDefault(_)) => Ok(None),
        (Profile::RuntimeDefault, AppArmor::NoDefault(why)) => {
            let message = format!("the default AppArmor profile is not loaded: {why}");
            Err(SpecError::precondition(field, "RuntimeDefault", message))
        }
        (Profile::Unset | Profile::RuntimeDefault, AppArmor::On) => {
            if loaded(DEFAULT_PROFILE)? {
                return Ok(Some(DEFAULT_PROFILE.to_owned()));
            }
            let message = "the profile has been unloaded since the daemon's start; a restart loads it again";
            Err(SpecError::precondition(field, DEFAULT_PROFILE, message))
        }
        (Profile::Localhost(name), AppArmor::Off) => {
            Err(SpecError::precondition(field, name, "AppArmor is not enabled on this host"))
        }
        (Profile::Localhost(name), _) => match loaded(&name)? {
            true => Ok(Some(name)),
            false => Err(SpecError::precondition(field, name, "no AppArmor profile of that name is loaded")),
        },
    }
}

/// The AppArmor profile: `apparmor`, else the deprecated `apparmor_profile`.
fn wanted(at: &str, profile: Option<&SecurityProfile>, name: &str) -> Result<Profile, SpecError> {
    let field = format!("{at}.apparmor_profile");
    let found = match profile {
        Some(profile) => match security_profile(&format!("{at}.apparmor"), profile)? {
            // Clients send the old form in the new field, too.
            Profile::Localhost(name) => {
                Profile::Localhost(name.strip_prefix("localhost/").unwrap_or(&name).to_owned())
            }
            profile => profile,
        },
        None => match name {
            "" => Profile::Unset,
            "unconfined" => Profile::Unconfined,
            "runtime/default" => Profile::RuntimeDefault,
            name => match name.strip_prefix("localhost/") {
                Some(name) => Profile::Localhost(name.to_owned()),
                None => return Err(SpecError::invalid(field, name, "is not an AppArmor profile")),
            },
        },
    };
    if let Profile::Localhost(name) = &found {
        let field = if profile.is_some() { format!("{at}.apparmor.localhost_ref") } else { field };
        no_control(&field, name)?;
        if name.is_empty() || name.len() > 4096 {
            return Err(SpecError::invalid(field, name, "is not the name of a profile"));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::path::Path;

    use stave_cri_proto::v1::security_profile::ProfileType;

    use super::*;
    use crate::{Code, HostDevice, MountPeers};

    /// A host with the profiles `web` and, if so, the default one.
    struct Loaded(bool);

    impl Host for Loaded {
        fn devices(&self, _: &Path) -> io::Result<Vec<HostDevice>> {
            Ok(Vec::new())
        }
        fn all_devices(&self) -> io::Result<Vec<HostDevice>> {
            Ok(Vec::new())
        }
        fn exists(&self, _: &Path) -> io::Result<bool> {
            Ok(false)
        }
        fn selinux_label(&self, _: &str) -> io::Result<Option<String>> {
            Ok(None)
        }

        fn apparmor_loaded(&self, name: &str) -> io::Result<bool> {
            match name {
                "broken" => Err(io::ErrorKind::PermissionDenied.into()),
                name => Ok(name == "web" || self.0 && name == DEFAULT_PROFILE),
            }
        }
        fn mount_peers(&self, _: &Path) -> io::Result<MountPeers> {
            Ok(MountPeers::default())
        }
    }

    fn profile(kind: ProfileType, localhost: &str) -> SecurityProfile {
        SecurityProfile { profile_type: kind as i32, localhost_ref: localhost.to_owned() }
    }

    #[test]
    fn both_fields_and_the_prefix() {
        let local = |name| Some(profile(ProfileType::Localhost, name));
        for (new, old, want) in [
            (None, "", Profile::Unset),
            (None, "unconfined", Profile::Unconfined),
            (None, "runtime/default", Profile::RuntimeDefault),
            (None, "localhost/web", Profile::Localhost("web".into())),
            (None, "localhost//usr/bin/x y", Profile::Localhost("/usr/bin/x y".into())),
            (local("web"), "", Profile::Localhost("web".into())),
            (local("localhost/web"), "unconfined", Profile::Localhost("web".into())),
            (Some(SecurityProfile::default()), "unconfined", Profile::RuntimeDefault),
        ] {
            assert_eq!(wanted("c", new.as_ref(), old).unwrap(), want, "{new:?} {old}");
        }
        assert_eq!(wanted("c", None, "nonsense").unwrap_err().field, "c.apparmor_profile");
        assert_eq!(wanted("c", None, "localhost/").unwrap_err().field, "c.apparmor_profile");
        assert_eq!(wanted("c", None, "localhost/a\nb").unwrap_err().field, "c.apparmor_profile");
        let long = "x".repeat(5000);
        assert_eq!(wanted("c", local(&long).as_ref(), "").unwrap_err().field, "c.apparmor.localhost_ref");
    }

    #[test]
    fn what_a_container_gets() {
        let of = |old: &str, privileged, apparmor: &AppArmor, loaded| {
            of_container("c", None, old, privileged, apparmor, &Loaded(loaded)).map_err(|e| {
                assert_eq!(e.field, "c.apparmor_profile");
                e.code
            })
        };
        let default = || Ok(Some(DEFAULT_PROFILE.to_owned()));
        let refused = || Err(Code::FailedPrecondition);
        let (on, off, without) = (AppArmor::On, AppArmor::Off, AppArmor::NoDefault("no parser".into()));
        for old in ["", "runtime/default"] {
            assert_eq!(of(old, false, &on, true), default());
            // Unloaded behind our back: not a reason to run without.
            assert_eq!(of(old, false, &on, false), refused());
            assert_eq!(of(old, false, &off, false), Ok(None));
            for apparmor in [&on, &off, &without] {
                assert_eq!(of(old, true, apparmor, true), Ok(None));
            }
        }
        assert_eq!(of("", false, &without, false), Ok(None));
        assert_eq!(of("runtime/default", false, &without, false), refused());
        for privileged in [false, true] {
            for apparmor in [&on, &without] {
                assert_eq!(of("localhost/web", privileged, apparmor, true), Ok(Some("web".into())));
                assert_eq!(of("localhost/we", privileged, apparmor, true), refused());
                assert_eq!(of("localhost/broken", privileged, apparmor, true), refused());
            }
            assert_eq!(of("localhost/web", privileged, &off, true), refused());
            for apparmor in [&on, &off, &without] {
                assert_eq!(of("unconfined", privileged, apparmor, true), Ok(None));
            }
        }
    }
}

//! Seccomp filters of containers.

use std::path::Path;
use std::sync::Arc;

use stave_seccomp::{Cache, Filter, SeccompError};
use stave_spec::{ContainerSpec, Seccomp, SpecError};

use crate::error::{Error, Result};
use crate::pods::{Inner, blocking};

impl Inner {
    /// Puts the filter that the container asked for into its plan, for it and for all that is executed in
    /// it later, and the profile into its specification.
    ///
    /// Errors: InvalidArgument for a broken profile, FailedPrecondition where the file is missing.
    pub(crate) async fn set_seccomp(self: &Arc<Self>, spec: &mut ContainerSpec) -> Result<()> {
        if spec.seccomp == Seccomp::Unconfined {
            return Ok(());
        }
        let Some(process) = spec.plan.process.as_mut() else { return Ok(()) };
        // A program may gain what is in the bounding set: setuid programs do.
        let caps = process.capabilities.unwrap_or_default().bounding;
        let (inner, wanted) = (Arc::clone(self), spec.seccomp.clone());
        let Some(filter) = blocking(move || find(&inner.seccomp, &wanted, caps)).await? else {
            return Ok(());
        };
        process.seccomp_filter.clone_from(&filter.program);
        process.seccomp_flags = filter.flags;
        if let Some(linux) = spec.oci.linux_mut() {
            linux.set_seccomp(Some(filter.oci.clone()));
        }
        Ok(())
    }
}

fn find(cache: &Cache, wanted: &Seccomp, caps: u64) -> Result<Option<Arc<Filter>>> {
    let (field, path) = match wanted {
        Seccomp::Unconfined => return Ok(None),
        Seccomp::RuntimeDefault => {
            let filter = cache.runtime_default(caps);
            return filter.map(Some).map_err(|e| Error::internal("the default seccomp profile", e));
        }
        Seccomp::Localhost { field, path } => (field, path),
    };
    let filter = stave_seccomp::read(path).and_then(|json| cache.profile(&json, "the profile", caps));
    let filter = filter.map_err(|error| refused(field, path, &error))?;
    if !filter.unknown.is_empty() {
        tracing::info!(profile = %path.display(), unknown = ?filter.unknown, "seccomp: no such system calls");
    }
    Ok(Some(filter))
}

fn refused(field: &str, path: &Path, error: &SeccompError) -> Error {
    let code = if error.is_not_found() {
        stave_spec::Code::FailedPrecondition
    } else {
        stave_spec::Code::InvalidArgument
    };
    SpecError::new(code, field, path.display(), error.to_string()).into()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::Code;

    #[test]
    fn a_filter_for_each_wish() {
        let cache = Cache::default();
        assert!(find(&cache, &Seccomp::Unconfined, 0).unwrap().is_none());
        let default = find(&cache, &Seccomp::RuntimeDefault, 0).unwrap().unwrap();
        let admin = find(&cache, &Seccomp::RuntimeDefault, 1 << 21).unwrap().unwrap();
        assert_ne!(default.program, admin.program);

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.json");
        let field = "config.linux.security_context.seccomp.localhost_ref".to_owned();
        let wanted = Seccomp::Localhost { field: field.clone(), path: path.clone() };
        let refused = || find(&cache, &wanted, 0).map(drop).unwrap_err();
        let start = format!("{field}: value {path:?}: ");

        assert_eq!(refused().code, Code::FailedPrecondition);
        assert!(refused().message.starts_with(&start), "{}", refused().message);
        std::fs::write(&path, "{\n\"defaultAction\": \"SCMP_ACT_ALOW\"}").unwrap();
        assert_eq!(refused().code, Code::InvalidArgument);
        let wrong = "the profile: line 2, column 32: unknown action \"SCMP_ACT_ALOW\"";
        assert_eq!(refused().message, format!("{start}{wrong}"));
        std::fs::write(&path, r#"{"defaultAction": "SCMP_ACT_LOG", "flags": ["SECCOMP_FILTER_FLAG_LOG"]}"#)
            .unwrap();
        assert_eq!(find(&cache, &wanted, 0).unwrap().unwrap().flags, 2);
    }
}

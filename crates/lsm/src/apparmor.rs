//! AppArmor: the profiles that the kernel has, and the one that we load.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use crate::parser;

/// The name of the profile of containers that ask for RuntimeDefault.
pub const DEFAULT_PROFILE: &str = "stave-default";

/// The text of it, in the form that apparmor_parser(8) reads.
pub const DEFAULT_TEXT: &str = include_str!("../default.apparmor");

/// Says "Y" where AppArmor is compiled in and switched on.
const ENABLED: &str = "/sys/module/apparmor/parameters/enabled";

/// All loaded profiles: "NAME (MODE)", one a line.
const PROFILES: &str = "/sys/kernel/security/apparmor/profiles";

/// Most bytes of [`PROFILES`] that are read, and of a file with a profile.
const MAX: u64 = 16 << 20;

/// Why a profile is not there.
#[derive(Debug, thiserror::Error)]
pub enum AppArmorError {
    /// A file could not be read.
    #[error("{path}: {source}")]
    Read {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// apparmor_parser is not installed.
    #[error("apparmor_parser is not installed (looked in {0}); Debian has it in the package apparmor")]
    NoParser(String),
    /// apparmor_parser could not be run, or did not end in time.
    #[error("apparmor_parser: {0}")]
    Run(io::Error),
    /// The parser or the kernel did not take it.
    #[error("the profile of {origin} is not taken: {message}")]
    Refused {
        /// Where the profile is from.
        origin: String,
        /// In the words of the parser, with the line.
        message: String,
    },
    /// The file was taken and has no profile of the name that is needed.
    #[error("{0} defines no profile \"{DEFAULT_PROFILE}\"")]
    NoDefault(String),
}

/// Whether the kernel has AppArmor, switched on.
pub fn enabled() -> bool {
    std::fs::read_to_string(ENABLED).is_ok_and(|text| text.trim() == "Y")
}

/// Whether a profile of this name is loaded, in whichever mode.
pub fn is_loaded(name: &str) -> Result<bool, AppArmorError> {
    let failed = |source| AppArmorError::Read { path: PROFILES.into(), source };
    let mut text = Vec::new();
    File::open(PROFILES).and_then(|file| file.take(MAX).read_to_end(&mut text)).map_err(failed)?;
    Ok(lists(&text, name))
}

/// Names may have blanks and brackets in them: the last " (" of a line ends the name.
fn lists(profiles: &[u8], name: &str) -> bool {
    profiles.split(|b| *b == b'\n').any(|line| {
        let end = line.windows(2).rposition(|pair| pair == b" (");
        end.and_then(|end| line.get(..end)) == Some(name.as_bytes())
    })
}

/// The text of the default profile and where it is from: `file`, else the built-in one.
fn text(file: Option<&Path>) -> Result<(String, String), AppArmorError> {
    let Some(path) = file else {
        return Ok((DEFAULT_TEXT.to_owned(), "the built-in default".to_owned()));
    };
    let failed = |source| AppArmorError::Read { path: path.to_owned(), source };
    let open = || -> io::Result<String> {
        let file = File::open(path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("is no regular file"));
        }
        let mut text = String::new();
        file.take(MAX).read_to_string(&mut text)?;
        Ok(text)
    };
    Ok((open().map_err(failed)?, path.display().to_string()))
}

/// Loads the default profile into the kernel, over an older one of that name. `file` takes the place of the built-in
/// text. Runs apparmor_parser, which takes some tenths of a second.
pub fn load_default(file: Option<&Path>) -> Result<(), AppArmorError> {
    let (text, origin) = text(file)?;
    parser::run(&["--replace", "--skip-cache"], &text, &origin)?;
    if is_loaded(DEFAULT_PROFILE)? { Ok(()) } else { Err(AppArmorError::NoDefault(origin)) }
}

/// Whether [`load_default`] would work, as far as that can be told without the kernel.
pub fn check_default(file: Option<&Path>) -> Result<(), AppArmorError> {
    let (text, origin) = text(file)?;
    let names = parser::run(&["--names", "--skip-kernel-load", "--skip-cache"], &text, &origin)?;
    if names.lines().any(|line| line.trim() == DEFAULT_PROFILE) {
        Ok(())
    } else {
        Err(AppArmorError::NoDefault(origin))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_whole() {
        let list = b"stave-default (enforce)\n/usr/bin/a b (complain)\nodd (1) name (enforce)\nx//y (kill)\n";
        for name in ["stave-default", "/usr/bin/a b", "odd (1) name", "x//y"] {
            assert!(lists(list, name), "{name}");
        }
        for name in
            ["stave", "stave-default (enforce)", "odd", "", "y", "default", "stave-default\n/usr/bin/a b"]
        {
            assert!(!lists(list, name), "{name}");
        }
        assert!(!lists(b"", "x") && !lists(b"x", "x") && !lists(b" (", "x"));
    }
}

//! Arguments, environment and working directory.

use stave_cri_proto::v1::{ContainerConfig, KeyValue};

use crate::text::{absolute, at_most, clean, no_nul};
use crate::{ImageDefaults, SpecError};

/// Longest argument or "NAME=value" that execve(2) takes, without its NUL (MAX_ARG_STRLEN).
const STRING_MAX: usize = 128 * 1024 - 1;

/// Bytes of all arguments and of the environment together: what execve(2) takes with the usual stack
/// limit of 8 MiB.
const TOTAL_MAX: usize = 2 << 20;

/// PATH where neither the image nor the request has one.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The command line: a command in the request replaces the image's entrypoint and cmd, arguments alone
/// replace its cmd.
pub(crate) fn args(config: &ContainerConfig, image: &ImageDefaults) -> Result<Vec<String>, SpecError> {
    let (mut args, source): (Vec<String>, _) = if !config.command.is_empty() {
        ([config.command.as_slice(), &config.args].concat(), "config.command")
    } else {
        // Images that reset their entrypoint have one empty string.
        let entrypoint: &[String] = match image.entrypoint.as_slice() {
            [only] if only.is_empty() => &[],
            entrypoint => entrypoint,
        };
        let rest = if config.args.is_empty() { &image.cmd } else { &config.args };
        let source = match (entrypoint.is_empty(), config.args.is_empty()) {
            (false, _) => "image.entrypoint",
            (true, false) => "config.args",
            (true, true) => "image.cmd",
        };
        ([entrypoint, rest].concat(), source)
    };
    if args.is_empty() {
        let message = "is required: neither the request nor the image has a command";
        return Err(SpecError::invalid("config.command", "", message));
    }
    validate_args(source, &args)?;
    args.shrink_to_fit();
    Ok(args)
}

/// Checks the command line of ExecSync or Exec; `field` is its name in the request.
pub fn validate_args(field: &str, args: &[String]) -> Result<(), SpecError> {
    match args.first() {
        None => return Err(SpecError::invalid(field, "", "is required")),
        Some(first) if first.is_empty() => return Err(SpecError::invalid(field, "", "names no program")),
        Some(_) => {}
    }
    strings(field, args)
}

fn strings(field: &str, strings: &[String]) -> Result<(), SpecError> {
    let mut total = 0;
    for (i, string) in strings.iter().enumerate() {
        let field = format!("{field}[{i}]");
        no_nul(&field, string)?;
        if string.len() > STRING_MAX {
            return Err(SpecError::invalid(field, string, format!("is longer than {STRING_MAX} bytes")));
        }
        total += string.len() + 1;
    }
    if total > TOTAL_MAX {
        let message = format!("is larger than {TOTAL_MAX} bytes");
        return Err(SpecError::invalid(field, format!("{total} bytes"), message));
    }
    Ok(())
}

/// The environment: defaults, then the image, then the request; a later value replaces an earlier one in its place.
pub(crate) fn env(
    config: &ContainerConfig,
    image: &ImageDefaults,
    hostname: &str,
) -> Result<Vec<String>, SpecError> {
    let mut env = Env::default();
    env.set("PATH", PATH);
    if config.tty {
        env.set("TERM", "xterm");
    }
    if !hostname.is_empty() {
        env.set("HOSTNAME", hostname);
    }
    at_most("image.env", image.env.len(), 65536)?;
    for (i, entry) in image.env.iter().enumerate() {
        no_nul(&format!("image.env[{i}]"), entry)?;
        // Entries that name nothing come from broken builders; no program could see them.
        if let Some((name, value)) = entry.split_once('=').filter(|(name, _)| !name.is_empty()) {
            env.set(name, value);
        }
    }
    at_most("config.envs", config.envs.len(), 65536)?;
    for (i, KeyValue { key, value }) in config.envs.iter().enumerate() {
        let field = format!("config.envs[{i}].key");
        no_nul(&field, key)?;
        if key.is_empty() || key.contains('=') {
            return Err(SpecError::invalid(field, key, "must be a name without \"=\""));
        }
        let field = format!("config.envs[{i}].value");
        let value = std::str::from_utf8(value).map_err(|_| {
            let shown = String::from_utf8_lossy(value).into_owned();
            SpecError::unimplemented(&field, shown, "values that are not UTF-8 are not built yet")
        })?;
        no_nul(&field, value)?;
        env.set(key, value);
    }
    strings("env", &env.entries)?;
    Ok(env.entries)
}

/// "NAME=value" entries in the order that their names first came up.
#[derive(Default)]
struct Env {
    entries: Vec<String>,
    index: std::collections::HashMap<String, usize>,
}

impl Env {
    fn set(&mut self, name: &str, value: &str) {
        let entry = format!("{name}={value}");
        match self.index.get(name).and_then(|i| self.entries.get_mut(*i)) {
            Some(old) => *old = entry,
            None => {
                self.index.insert(name.to_owned(), self.entries.len());
                self.entries.push(entry);
            }
        }
    }
}

/// The working directory: the request's, else the image's, else "/".
pub(crate) fn cwd(config: &ContainerConfig, image: &ImageDefaults) -> Result<String, SpecError> {
    let (field, path) = match (config.working_dir.as_str(), image.working_dir.as_str()) {
        ("", "") => return Ok("/".to_owned()),
        ("", path) => ("image.working_dir", path),
        (path, _) => ("config.working_dir", path),
    };
    absolute(field, path)?;
    // Cleaned here, so that no ".." is left to be walked through a symlink of the image.
    Ok(clean(path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Code;

    fn own(strings: &[&str]) -> Vec<String> {
        strings.iter().map(|s| (*s).to_owned()).collect()
    }

    #[test]
    fn args_precedence() {
        type Row = (
            &'static [&'static str],
            &'static [&'static str],
            &'static [&'static str],
            &'static [&'static str],
        );
        // entrypoint, cmd, command, args
        let table: &[(Row, &[&str])] = &[
            ((&["e"], &["c"], &[], &[]), &["e", "c"]),
            ((&["e"], &["c"], &[], &["a"]), &["e", "a"]),
            ((&["e"], &["c"], &["x"], &[]), &["x"]),
            ((&["e"], &["c"], &["x"], &["a", ""]), &["x", "a", ""]),
            ((&[], &["c"], &[], &[]), &["c"]),
            ((&[], &["c"], &[], &["a"]), &["a"]),
            ((&[""], &["c"], &[], &[]), &["c"]),
            ((&["e"], &[], &[], &[]), &["e"]),
        ];
        for ((entrypoint, cmd, command, args_), want) in table {
            let image = ImageDefaults { entrypoint: own(entrypoint), cmd: own(cmd), ..Default::default() };
            let config = ContainerConfig { command: own(command), args: own(args_), ..Default::default() };
            assert_eq!(args(&config, &image).unwrap(), own(want));
        }
    }

    #[test]
    fn bad_args_name_their_source() {
        let long = "x".repeat(STRING_MAX + 1);
        let many = vec!["y".repeat(STRING_MAX); 17];
        let config = |command: Vec<String>, args| ContainerConfig { command, args, ..Default::default() };
        let none = ImageDefaults::default();
        for (config, image, field) in [
            (config(vec![], vec![]), none.clone(), "config.command"),
            (config(own(&[""]), vec![]), none.clone(), "config.command"),
            (config(own(&["a", "b\0"]), vec![]), none.clone(), "config.command[1]"),
            (config(own(&["a"]), own(&[&long])), none.clone(), "config.command[1]"),
            (config(own(&["a"]), many), none.clone(), "config.command"),
            (config(vec![], own(&["", "a"])), none.clone(), "config.args"),
            (config(vec![], vec![]), ImageDefaults { cmd: own(&[""]), ..none.clone() }, "image.cmd"),
            (
                config(vec![], vec![]),
                ImageDefaults { entrypoint: own(&["\0"]), ..none },
                "image.entrypoint[0]",
            ),
        ] {
            assert_eq!(args(&config, &image).unwrap_err().field, field);
        }
    }

    fn envs(pairs: &[(&str, &[u8])]) -> Vec<KeyValue> {
        pairs.iter().map(|(k, v)| KeyValue { key: (*k).to_owned(), value: v.to_vec() }).collect()
    }

    #[test]
    fn env_precedence() {
        let image = ImageDefaults {
            env: own(&["A=1", "B=b=c", "PATH=/p", "junk", "=x", "HOSTNAME=i"]),
            ..Default::default()
        };
        let config = ContainerConfig {
            envs: envs(&[("A", b"2"), ("C", b""), ("TERM", b"vt100"), ("C", b"3")]),
            tty: true,
            ..Default::default()
        };
        assert_eq!(
            env(&config, &image, "h").unwrap(),
            own(&["PATH=/p", "TERM=vt100", "HOSTNAME=i", "A=2", "B=b=c", "C=3"])
        );
        let plain = env(&ContainerConfig::default(), &ImageDefaults::default(), "h").unwrap();
        assert_eq!(plain, own(&[&format!("PATH={PATH}"), "HOSTNAME=h"]));
        assert_eq!(env(&ContainerConfig::default(), &ImageDefaults::default(), "").unwrap().len(), 1);
    }

    #[test]
    fn bad_env() {
        let pairs: &[(&str, &[u8], &str, Code)] = &[
            ("", b"x", "config.envs[0].key", Code::InvalidArgument),
            ("A=B", b"x", "config.envs[0].key", Code::InvalidArgument),
            ("A\0", b"x", "config.envs[0].key", Code::InvalidArgument),
            ("A", b"x\0", "config.envs[0].value", Code::InvalidArgument),
            ("A", b"\xff", "config.envs[0].value", Code::Unimplemented),
        ];
        for (key, value, field, code) in pairs {
            let config = ContainerConfig { envs: envs(&[(key, value)]), ..Default::default() };
            let error = env(&config, &ImageDefaults::default(), "h").unwrap_err();
            assert_eq!((error.field.as_str(), error.code), (*field, *code));
        }
        let image = ImageDefaults { env: own(&["A=\0"]), ..Default::default() };
        assert_eq!(env(&ContainerConfig::default(), &image, "h").unwrap_err().field, "image.env[0]");
    }

    #[test]
    fn cwd_precedence() {
        for (request, image, want) in [
            ("", "", Ok("/")),
            ("", "/app", Ok("/app")),
            ("/w", "/app", Ok("/w")),
            ("/w/../../x/", "", Ok("/x")),
            ("w", "/app", Err("config.working_dir")),
            ("", "app", Err("image.working_dir")),
            ("/w\0", "", Err("config.working_dir")),
        ] {
            let config = ContainerConfig { working_dir: request.to_owned(), ..Default::default() };
            let image = ImageDefaults { working_dir: image.to_owned(), ..Default::default() };
            let got = cwd(&config, &image);
            assert_eq!(got.as_deref().map_err(|e| e.field.as_str()), want);
        }
    }
}

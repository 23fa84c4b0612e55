//! Image references.

use std::fmt;
use std::str::FromStr;

use stave_layers::Digest;

use crate::{ErrorKind, ImageError};

/// The domain of references that name none.
const DEFAULT_DOMAIN: &str = "docker.io";
/// The tag of references with neither tag nor digest.
const DEFAULT_TAG: &str = "latest";
/// Longest repository name (domain and path), in bytes, as Docker has it.
const MAX_NAME: usize = 255;
/// Longest reference that is looked at.
const MAX_REFERENCE: usize = 1024;

/// A normalised image reference: `busybox` is `docker.io/library/busybox:latest`.
///
/// The grammar is that of github.com/distribution/reference. With a digest and no tag there is no
/// tag; with both the digest decides what is pulled.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    domain: String,
    path: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl Reference {
    /// Reads and normalises a reference.
    pub fn parse(text: &str) -> Result<Reference, ImageError> {
        parse(text).map_err(|reason| {
            let shown: String = text.chars().take(256).collect();
            ImageError::new(
                ErrorKind::InvalidReference,
                format!("invalid image reference {shown:?}: {reason}"),
            )
        })
    }

    /// Host, with port if there is one: `docker.io`, `localhost:5000`.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// Path of the repository in its registry: `library/busybox`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The tag, if one was given or implied.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, if one was given.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// `domain/path`.
    pub fn repository(&self) -> String {
        format!("{}/{}", self.domain, self.path)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.domain, self.path)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl FromStr for Reference {
    type Err = ImageError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Reference::parse(text)
    }
}

fn parse(text: &str) -> Result<Reference, String> {
    if text.is_empty() {
        return Err("empty".into());
    }
    if text.len() > MAX_REFERENCE {
        return Err(format!("longer than {MAX_REFERENCE} bytes"));
    }
    if text.len() == 64 && Digest::from_hex(text).is_ok() {
        return Err("64 hexadecimal digits are an image id, not a repository".into());
    }
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest.parse::<Digest>().map_err(|e| e.to_string())?)),
        None => (text, None),
    };
    let (domain, rest) = split_domain(rest);
    // A colon after the domain can only begin a tag.
    let (path, tag) = match rest.split_once(':') {
        Some((path, tag)) => (path, Some(tag)),
        None => (rest, None),
    };
    check_domain(&domain)?;
    check_path(path)?;
    if let Some(tag) = tag {
        check_tag(tag)?;
    }
    let path = if domain == DEFAULT_DOMAIN && !path.contains('/') {
        format!("library/{path}")
    } else {
        path.to_owned()
    };
    if domain.len() + 1 + path.len() > MAX_NAME {
        return Err(format!("repository name longer than {MAX_NAME} bytes"));
    }
    let tag = match (tag, digest) {
        (Some(tag), _) => Some(tag.to_owned()),
        (None, None) => Some(DEFAULT_TAG.to_owned()),
        (None, Some(_)) => None,
    };
    Ok(Reference { domain, path, tag, digest })
}

/// The part before the first slash is a domain if it looks like one, as Docker decides it: it has a
/// dot, a colon or an upper-case letter, or is `localhost`.
fn split_domain(text: &str) -> (String, &str) {
    match text.split_once('/') {
        Some((first, rest))
            if first.contains(['.', ':'])
                || first == "localhost"
                || first.bytes().any(|b| b.is_ascii_uppercase()) =>
        {
            let domain = if first == "index.docker.io" { DEFAULT_DOMAIN } else { first };
            (domain.to_owned(), rest)
        }
        _ => (DEFAULT_DOMAIN.to_owned(), text),
    }
}

/// `host[:port]`: DNS labels, or an IPv6 address in brackets.
fn check_domain(domain: &str) -> Result<(), String> {
    let bad = || Err(format!("bad domain {domain:?}"));
    let (host, port) = if let Some(rest) = domain.strip_prefix('[') {
        let Some((address, rest)) = rest.split_once(']') else { return bad() };
        if address.parse::<std::net::Ipv6Addr>().is_err() {
            return bad();
        }
        match rest.strip_prefix(':') {
            Some(port) => (None, Some(port)),
            None if rest.is_empty() => (None, None),
            None => return bad(),
        }
    } else {
        match domain.split_once(':') {
            Some((host, port)) => (Some(host), Some(port)),
            None => (Some(domain), None),
        }
    };
    if let Some(host) = host {
        let label_ok = |label: &str| {
            !label.is_empty()
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        if !host.split('.').all(label_ok) {
            return bad();
        }
    }
    match port {
        Some(port) if !port.bytes().all(|b| b.is_ascii_digit()) || port.parse::<u16>().is_err() => bad(),
        _ => Ok(()),
    }
}

/// Components of lower-case letters and digits, separated inside by one `.`, one or two `_`, or any
/// number of `-`.
fn check_path(path: &str) -> Result<(), String> {
    if path.is_empty() {
        return Err("no repository name".into());
    }
    for component in path.split('/') {
        let bad = |why: &str| Err(format!("repository component {component:?} {why}"));
        if component.is_empty() {
            return Err(format!("empty component in repository {path:?}"));
        }
        if let Some(c) = component
            .chars()
            .find(|c| !(c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '_' | '-')))
        {
            return bad(&format!("has the character {c:?}"));
        }
        let separators = component.split(|c: char| c.is_ascii_alphanumeric()).collect::<Vec<_>>();
        if !separators.first().is_some_and(|s| s.is_empty())
            || !separators.last().is_some_and(|s| s.is_empty())
        {
            return bad("begins or ends with a separator");
        }
        let known = |s: &&str| matches!(*s, "" | "." | "_" | "__") || s.bytes().all(|b| b == b'-');
        if !separators.iter().all(known) {
            return bad("has a bad separator");
        }
    }
    Ok(())
}

/// `[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}`
fn check_tag(tag: &str) -> Result<(), String> {
    let ok = !tag.is_empty()
        && tag.len() <= 128
        && !tag.starts_with(['.', '-'])
        && tag.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'));
    if ok { Ok(()) } else { Err(format!("bad tag {tag:?}")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn normalises_as_docker_does() {
        let d = format!("sha256:{HEX}");
        for (text, wanted) in [
            ("busybox", "docker.io/library/busybox:latest".to_owned()),
            ("busybox:1.36", "docker.io/library/busybox:1.36".to_owned()),
            ("docker.io/busybox", "docker.io/library/busybox:latest".to_owned()),
            ("index.docker.io/busybox", "docker.io/library/busybox:latest".to_owned()),
            ("user/app", "docker.io/user/app:latest".to_owned()),
            ("localhost/app", "localhost/app:latest".to_owned()),
            ("localhost:5000/app", "localhost:5000/app:latest".to_owned()),
            ("Host/app", "Host/app:latest".to_owned()),
            ("127.0.0.1:5000/a/b:t", "127.0.0.1:5000/a/b:t".to_owned()),
            ("[::1]:5000/app", "[::1]:5000/app:latest".to_owned()),
            ("[::1]/app:v", "[::1]/app:v".to_owned()),
            ("registry.k8s.io/pause:3.9", "registry.k8s.io/pause:3.9".to_owned()),
            (&format!("busybox@{d}"), format!("docker.io/library/busybox@{d}")),
            (&format!("a.b/c:t@{d}"), format!("a.b/c:t@{d}")),
            ("a.b/x__y--z.w_v", "a.b/x__y--z.w_v:latest".to_owned()),
        ] {
            let parsed = Reference::parse(text).unwrap();
            assert_eq!(parsed.to_string(), wanted, "{text}");
            assert_eq!(Reference::parse(&wanted).unwrap(), parsed, "{text}");
        }
    }

    #[test]
    fn refuses_and_names_the_value() {
        let long = format!("a.b/{}", "x".repeat(260));
        for bad in [
            "",
            ":",
            "/",
            "a:",
            "busybox:",
            "a@",
            "a@sha256:12",
            "Busybox",
            "a//b",
            "a.b//c",
            "a.b/",
            "-a",
            "a..b/c/d_",
            "a/../b",
            "../a",
            "a/b:t/c",
            "a b",
            "a\nb",
            "a:t t",
            "a.b:x/c",
            "a.b:99999/c",
            "[::g]/a",
            "http://a.b/c",
            "a___b",
            "a/.b",
            "a@md5:abc",
            HEX,
            &long,
            "a:.t",
        ] {
            let error = Reference::parse(bad).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidReference, "{bad:?}");
            let shown: String = bad.chars().take(256).collect();
            assert!(error.to_string().contains(&format!("{shown:?}")), "{error}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_parses_or_fails_and_the_normal_form_is_stable(text in "\\PC{0,80}") {
            if let Ok(parsed) = Reference::parse(&text) {
                assert_eq!(Reference::parse(&parsed.to_string()).unwrap(), parsed);
            }
        }
    }
}

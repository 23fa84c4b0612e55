//! Hosts to pull from, as `hosts.toml` files name them.
//!
//! The form is containerd's (docs/hosts.md there): `<config_dir>/<host>/hosts.toml`, where the
//! directory of `host:port` may also be `host_port_`, and `_default` is for hosts without their own.

use std::path::{Path, PathBuf};

use reqwest::Url;
use toml::{Table, Value};

use crate::{ErrorKind, ImageError};

/// Largest `hosts.toml` and CA file that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// One place to pull from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Host {
    /// `http` or `https`, the host with its port, and a path prefix.
    pub(crate) url: Url,
    /// Pulls of content by digest.
    pub(crate) pull: bool,
    /// Turns tags into digests.
    pub(crate) resolve: bool,
    pub(crate) skip_verify: bool,
    /// PEM files of certificate authorities to trust beside the system's.
    pub(crate) ca: Vec<PathBuf>,
    pub(crate) headers: Vec<(String, String)>,
    /// The path of `url` is the whole API prefix, in place of `/v2`.
    pub(crate) override_path: bool,
    /// The registry itself, not a mirror: credentials without an address are for it.
    pub(crate) origin: bool,
}

impl Host {
    fn new(url: Url) -> Host {
        Host {
            url,
            pull: true,
            resolve: true,
            skip_verify: false,
            ca: Vec::new(),
            headers: Vec::new(),
            override_path: false,
            origin: false,
        }
    }

    /// `host` or `host:port`.
    pub(crate) fn authority(&self) -> String {
        let host = self.url.host_str().unwrap_or_default();
        match self.url.port() {
            Some(port) => format!("{host}:{port}"),
            None => host.to_owned(),
        }
    }

    /// The URL of a manifest or blob of a repository.
    pub(crate) fn endpoint(&self, repository: &str, kind: &str, what: &str) -> String {
        let base = self.url.as_str().trim_end_matches('/');
        let api = if self.override_path { "" } else { "/v2" };
        format!("{base}{api}/{repository}/{kind}/{what}")
    }
}

/// The hosts for a registry, in the order in which to try them: the mirrors, then the registry.
pub(crate) fn hosts(config_dir: &Path, domain: &str) -> Result<Vec<Host>, ImageError> {
    for dir in directories(config_dir, domain) {
        let file = dir.join("hosts.toml");
        let Some(text) = read(&file)? else { continue };
        return parse(&text, &file, domain);
    }
    Ok(vec![origin(domain)?])
}

/// Directory names to look for, the first that has a hosts.toml counts.
fn directories(config_dir: &Path, domain: &str) -> Vec<PathBuf> {
    // The domain is that of a parsed reference: no slash, and not "..".
    let mut names = vec![domain.to_owned()];
    if let Some((host, port)) = domain.rsplit_once(':')
        && port.bytes().all(|b| b.is_ascii_digit())
    {
        names.insert(0, format!("{host}_{port}_"));
    }
    names.push("_default".to_owned());
    names.into_iter().map(|name| config_dir.join(name)).collect()
}

fn read(file: &Path) -> Result<Option<String>, ImageError> {
    use std::io::Read as _;
    let fail = |e: std::io::Error| config_error(file, "", &e.to_string());
    let opened = match std::fs::File::open(file) {
        Ok(opened) => opened,
        Err(e) if matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(e) => return Err(fail(e)),
    };
    let mut text = String::new();
    opened.take(MAX_FILE + 1).read_to_string(&mut text).map_err(fail)?;
    if text.len() as u64 > MAX_FILE {
        return Err(config_error(file, "", "larger than 1 MiB"));
    }
    Ok(Some(text))
}

fn config_error(file: &Path, key: &str, what: &str) -> ImageError {
    let place = if key.is_empty() { String::new() } else { format!("key {key}: ") };
    ImageError::new(ErrorKind::Configuration, format!("{}: {place}{what}", file.display()))
}

/// Docker Hub answers under another name than its images have.
fn origin(domain: &str) -> Result<Host, ImageError> {
    let host = if domain == "docker.io" { "registry-1.docker.io" } else { domain };
    let url = Url::parse(&format!("https://{host}"))
        .map_err(|e| ImageError::new(ErrorKind::InvalidReference, format!("registry {domain:?}: {e}")))?;
    Ok(Host { origin: true, ..Host::new(url) })
}

pub(crate) fn parse(text: &str, file: &Path, domain: &str) -> Result<Vec<Host>, ImageError> {
    let table: Table = text.parse().map_err(|e: toml::de::Error| config_error(file, "", e.message()))?;
    let mut mirrors = Vec::new();
    let mut server = None;
    let mut own = Table::new();
    for (key, value) in table {
        match (key.as_str(), value) {
            ("server", Value::String(url)) => server = Some(url),
            ("host", Value::Table(hosts)) => {
                for (name, value) in hosts {
                    let place = format!("host.{name:?}");
                    let Value::Table(settings) = value else {
                        return Err(config_error(file, &place, "must be a table"));
                    };
                    let mut host = Host::new(url(file, &place, &name)?);
                    configure(&mut host, settings, file, &format!("{place}."))?;
                    mirrors.push(host);
                }
            }
            ("server" | "host", _) => return Err(config_error(file, &key, "wrong type")),
            (_, value) => {
                own.insert(key, value);
            }
        }
    }
    let mut last = match server {
        Some(server) => Host { origin: true, ..Host::new(url(file, "server", &server)?) },
        None => origin(domain)?,
    };
    configure(&mut last, own, file, "")?;
    mirrors.push(last);
    Ok(mirrors)
}

fn url(file: &Path, key: &str, text: &str) -> Result<Url, ImageError> {
    let bad = |what: &str| config_error(file, key, &format!("{what}: {text:?}"));
    let full = if text.contains("://") { text.to_owned() } else { format!("https://{text}") };
    let url = Url::parse(&full).map_err(|e| bad(&e.to_string()))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(bad("only http and https"));
    }
    if url.host_str().is_none_or(str::is_empty) {
        return Err(bad("no host"));
    }
    if !url.username().is_empty()
        || url.password().is_some()
        || url.query().is_some()
        || url.fragment().is_some()
    {
        return Err(bad("no user, password, query or fragment allowed"));
    }
    Ok(url)
}

fn configure(host: &mut Host, settings: Table, file: &Path, place: &str) -> Result<(), ImageError> {
    for (key, value) in settings {
        let fail = |what: &str| config_error(file, &format!("{place}{key}"), what);
        match (key.as_str(), value) {
            ("capabilities", Value::Array(values)) => {
                (host.pull, host.resolve) = (false, false);
                for value in values {
                    match value.as_str() {
                        Some("pull") => host.pull = true,
                        Some("resolve") => host.resolve = true,
                        Some("push" | "referrers") => {}
                        _ => return Err(fail(&format!("unknown capability {value}"))),
                    }
                }
            }
            ("skip_verify", Value::Boolean(skip)) => host.skip_verify = skip,
            ("override_path", Value::Boolean(path)) => host.override_path = path,
            ("ca", value) => {
                let dir = file.parent().unwrap_or(Path::new("/"));
                for ca in strings(value).ok_or_else(|| fail("must be a path or a list of paths"))? {
                    host.ca.push(dir.join(ca));
                }
            }
            ("header", Value::Table(headers)) => {
                for (name, value) in headers {
                    let values =
                        strings(value).ok_or_else(|| fail("values must be texts or lists of them"))?;
                    host.headers.extend(values.into_iter().map(|value| (name.clone(), value)));
                }
            }
            ("client", _) => return Err(fail("client certificates are not supported")),
            ("dial_timeout", _) => return Err(fail("is not supported")),
            ("capabilities" | "skip_verify" | "override_path" | "header", _) => {
                return Err(fail("wrong type"));
            }
            _ => return Err(fail("unknown key")),
        }
    }
    Ok(())
}

fn strings(value: Value) -> Option<Vec<String>> {
    match value {
        Value::String(text) => Some(vec![text]),
        Value::Array(values) => {
            values.into_iter().map(|v| if let Value::String(text) = v { Some(text) } else { None }).collect()
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &Path, host: &str, text: &str) {
        std::fs::create_dir_all(dir.join(host)).unwrap();
        std::fs::write(dir.join(host).join("hosts.toml"), text).unwrap();
    }

    #[test]
    fn without_a_file_only_https() {
        let dir = tempfile::tempdir().unwrap();
        for domain in ["localhost", "localhost:5000", "127.0.0.1:5000", "example.com", "[::1]:80"] {
            let hosts = hosts(dir.path(), domain).unwrap();
            assert_eq!(hosts.len(), 1);
            assert_eq!(hosts[0].url.scheme(), "https", "{domain}");
        }
        let hub = hosts(&dir.path().join("missing"), "docker.io").unwrap();
        assert_eq!(hub[0].url.as_str(), "https://registry-1.docker.io/");
    }

    #[test]
    fn mirrors_in_their_order_then_the_server() {
        let dir = tempfile::tempdir().unwrap();
        let text = r#"
            server = "https://real.example"
            [host."https://z.example/prefix"]
            capabilities = ["pull"]
            skip_verify = true
            ca = ["a.pem", "/b.pem"]
            [host."http://a.example:5000"]
            override_path = true
            [host."http://a.example:5000".header]
            x-one = "1"
            x-two = ["2", "3"]
            [host."m.example"]
        "#;
        write(dir.path(), "real.example", text);
        let hosts = hosts(dir.path(), "real.example").unwrap();
        let urls: Vec<_> = hosts.iter().map(|h| h.url.as_str()).collect();
        assert_eq!(
            urls,
            [
                "https://z.example/prefix",
                "http://a.example:5000/",
                "https://m.example/",
                "https://real.example/"
            ]
        );
        assert!(hosts[0].pull && !hosts[0].resolve && hosts[0].skip_verify && !hosts[0].origin);
        assert_eq!(hosts[0].ca, [dir.path().join("real.example/a.pem"), PathBuf::from("/b.pem")]);
        assert_eq!(hosts[0].endpoint("a/b", "blobs", "x"), "https://z.example/prefix/v2/a/b/blobs/x");
        assert_eq!(hosts[1].endpoint("a", "manifests", "t"), "http://a.example:5000/a/manifests/t");
        assert_eq!(hosts[1].headers.len(), 3);
        assert!(hosts[3].origin);
    }

    #[test]
    fn directory_names() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "_default", "[host.\"http://default.example\"]");
        write(dir.path(), "host_5000_", "[host.\"http://port.example\"]");
        let first = |domain: &str| hosts(dir.path(), domain).unwrap()[0].authority();
        assert_eq!(first("host:5000"), "port.example");
        assert_eq!(first("other"), "default.example");
        assert_eq!(hosts(dir.path(), "other").unwrap()[1].authority(), "other");
    }

    #[test]
    fn errors_name_file_and_key() {
        let dir = tempfile::tempdir().unwrap();
        for (text, key) in [
            ("sever = 'x'", "sever"),
            ("server = 1", "server"),
            ("server = 'ftp://x'", "server"),
            ("server = 'https://u:p@x'", "server"),
            ("[host.'http://x']\nclient = 'x'", "client"),
            ("[host.'http://x']\ncapabilities = ['fly']", "capabilities"),
            ("[host.'http://x']\nskip_verify = 'yes'", "skip_verify"),
            ("[host.'http://x']\nca = 5", "ca"),
            ("not toml", ""),
        ] {
            write(dir.path(), "h", text);
            let error = hosts(dir.path(), "h").unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Configuration);
            let message = error.to_string();
            assert!(message.contains("h/hosts.toml") && message.contains(key), "{message}");
        }
    }
}

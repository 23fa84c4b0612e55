//! Credentials of a pull.

use oci_distribution::secrets::RegistryAuth;

use crate::hosts::Host;
use crate::{ErrorKind, ImageError};

/// Credentials as the CRI's `AuthConfig` has them; empty strings are absent ones.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct Auth {
    /// User name.
    pub username: String,
    /// Password.
    pub password: String,
    /// Base64 of `user:password`; used where `username` is empty.
    pub auth: String,
    /// The host these credentials are for. Another registry gets none of them.
    pub server_address: String,
    /// An OAuth2 refresh token.
    pub identity_token: String,
    /// A bearer token sent as it is.
    pub registry_token: String,
}

impl std::fmt::Debug for Auth {
    /// Secrets stay out of logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Auth")
            .field("username", &self.username)
            .field("server_address", &self.server_address)
            .finish_non_exhaustive()
    }
}

impl Auth {
    /// What to show to `host` when pulling an image of `domain`. Credentials go to the registry that
    /// they are for; mirrors see them only if they are named by `server_address`.
    pub(crate) fn for_host(&self, host: &Host, domain: &str) -> Result<RegistryAuth, ImageError> {
        let address = server(&self.server_address);
        let wanted = match address {
            None => host.origin,
            Some(address) => {
                address == server_name(&host.authority()) || (host.origin && address == server_name(domain))
            }
        };
        if !wanted {
            return Ok(RegistryAuth::Anonymous);
        }
        let bad = |what: &str| Err(ImageError::new(ErrorKind::Unauthorized, format!("credentials: {what}")));
        if !self.username.is_empty() {
            return Ok(RegistryAuth::Basic(self.username.clone(), self.password.clone()));
        }
        if !self.identity_token.is_empty() {
            return bad("identity_token is not supported");
        }
        if !self.auth.is_empty() {
            let decoded = base64(&self.auth).and_then(|bytes| String::from_utf8(bytes).ok());
            return match decoded.as_deref().and_then(|text| text.split_once(':')) {
                Some((user, password)) => {
                    Ok(RegistryAuth::Basic(user.to_owned(), password.trim_end_matches('\0').to_owned()))
                }
                None => bad("auth is not the base64 of user:password"),
            };
        }
        if !self.registry_token.is_empty() {
            if self.registry_token.bytes().any(|b| !b.is_ascii_graphic()) {
                return bad("registry_token has characters that no token may have");
            }
            return Ok(RegistryAuth::Bearer(self.registry_token.clone()));
        }
        Ok(RegistryAuth::Anonymous)
    }
}

/// The host of a server address, which may be a URL with a path; `None` if there is none.
fn server(address: &str) -> Option<String> {
    let address = address.split_once("://").map_or(address, |(_, rest)| rest);
    let host = address.split('/').next().unwrap_or_default();
    (!host.is_empty()).then(|| server_name(host))
}

/// Docker Hub has several names.
fn server_name(host: &str) -> String {
    match host {
        "index.docker.io" | "registry-1.docker.io" => "docker.io".to_owned(),
        other => other.to_ascii_lowercase(),
    }
}

/// Standard base64 (RFC 4648), padding optional.
fn base64(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3 + 2);
    let (mut bits, mut count) = (0u32, 0);
    let text = text.trim();
    let body = text.trim_end_matches('=');
    if text.len() - body.len() > 2 || body.len() % 4 == 1 {
        return None;
    }
    for c in body.bytes() {
        let value = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = (bits << 6 | u32::from(value)) & 0xff_ffff;
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count & 0xff) as u8);
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(url: &str, origin: bool) -> Host {
        let dir = tempfile::tempdir().unwrap();
        let mut host = crate::hosts::hosts(dir.path(), "x").unwrap().remove(0);
        host.url = url.parse().unwrap();
        host.origin = origin;
        host
    }

    /// CVE-2020-15157
    #[test]
    fn cve_2020_15157_credentials_go_only_where_they_belong() {
        let basic = RegistryAuth::Basic("u".into(), "p".into());
        let auth = |address: &str| Auth {
            username: "u".into(),
            password: "p".into(),
            server_address: address.into(),
            ..Auth::default()
        };
        let origin = host("https://reg.example", true);
        let mirror = host("http://mirror.example:5000", false);
        for (address, host, wanted) in [
            ("", &origin, &basic),
            ("", &mirror, &RegistryAuth::Anonymous),
            ("reg.example", &origin, &basic),
            ("https://REG.example/v1/", &origin, &basic),
            ("other.example", &origin, &RegistryAuth::Anonymous),
            ("reg.example:444", &origin, &RegistryAuth::Anonymous),
            ("reg.example", &mirror, &RegistryAuth::Anonymous),
            ("mirror.example:5000", &mirror, &basic),
        ] {
            assert_eq!(auth(address).for_host(host, "reg.example").unwrap(), *wanted, "{address}");
        }
        let hub = host("https://registry-1.docker.io", true);
        assert_eq!(auth("https://index.docker.io/v1/").for_host(&hub, "docker.io").unwrap(), basic);
    }

    #[test]
    fn every_form() {
        let origin = host("https://reg.example", true);
        let get = |auth: Auth| auth.for_host(&origin, "reg.example");
        let auth = |text: &str| Auth { auth: text.into(), ..Auth::default() };
        assert_eq!(get(auth("dTpwOnc=")).unwrap(), RegistryAuth::Basic("u".into(), "p:w".into()));
        assert!(get(auth("dTpw!")).is_err() && get(auth("dXA=")).is_err());
        let token = Auth { registry_token: "t".into(), ..Auth::default() };
        assert_eq!(get(token).unwrap(), RegistryAuth::Bearer("t".into()));
        assert!(get(Auth { registry_token: "a\nb".into(), ..Auth::default() }).is_err());
        assert!(get(Auth { identity_token: "t".into(), ..Auth::default() }).is_err());
        assert_eq!(get(Auth::default()).unwrap(), RegistryAuth::Anonymous);
        assert!(!format!("{:?}", Auth { password: "secret".into(), ..Auth::default() }).contains("secret"));
    }

    #[test]
    fn base64_of_all_lengths() {
        for (text, wanted) in [("", ""), ("Zg==", "f"), ("Zm8", "fo"), ("Zm9v", "foo"), ("Zm9vYg==", "foob")]
        {
            assert_eq!(base64(text).unwrap(), wanted.as_bytes());
        }
        assert!(base64("Z").is_none() && base64("Zg===").is_none() && base64("Z g=").is_none());
    }
}

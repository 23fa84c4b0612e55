//! Credentials stay out of logs: `Debug` of the messages that carry them says only that they are there.
use std::fmt;

use crate::v1::AuthConfig;

impl fmt::Debug for AuthConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let AuthConfig { username, password, auth, server_address, identity_token, registry_token } = self;
        f.debug_struct("AuthConfig")
            .field("username", username)
            .field("password", &Secret(password))
            .field("auth", &Secret(auth))
            .field("server_address", server_address)
            .field("identity_token", &Secret(identity_token))
            .field("registry_token", &Secret(registry_token))
            .finish()
    }
}

struct Secret<'a>(&'a str);

impl fmt::Debug for Secret<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "\"\"" } else { "[redacted]" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1::PullImageRequest;

    #[test]
    fn credentials_are_neither_printed_nor_recorded() {
        let secret = || "s3cret".to_owned();
        let auth = AuthConfig {
            username: "someone".to_owned(),
            password: secret(),
            auth: secret(),
            server_address: "registry.example".to_owned(),
            identity_token: secret(),
            registry_token: secret(),
        };
        let request = PullImageRequest { auth: Some(auth), ..PullImageRequest::default() };
        for text in
            [format!("{request:?}"), format!("{request:#?}"), serde_json::to_string(&request).unwrap()]
        {
            assert!(!text.contains("s3cret"), "{text}");
            assert!(text.contains("someone") && text.contains("registry.example"), "{text}");
        }
    }
}

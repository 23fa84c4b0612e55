//! The pod's resolv.conf.

use std::fmt::Write as _;
use std::net::IpAddr;

use stave_cri_proto::v1::DnsConfig;

use crate::SpecError;
use crate::text::{at_most, no_control};

/// Longest search domain, server or option.
const WORD_MAX: usize = 2048;

/// The content of a pod's /etc/resolv.conf. Without a config, or with an empty one, it is `host`, the node's.
pub fn resolv_conf(dns: Option<&DnsConfig>, host: &str) -> String {
    let mut text = String::new();
    if let Some(dns) = dns {
        // Writing to a String does not fail.
        if !dns.searches.is_empty() {
            let _ = writeln!(text, "search {}", dns.searches.join(" "));
        }
        for server in &dns.servers {
            let _ = writeln!(text, "nameserver {server}");
        }
        if !dns.options.is_empty() {
            let _ = writeln!(text, "options {}", dns.options.join(" "));
        }
    }
    if text.is_empty() { host.to_owned() } else { text }
}

/// Each entry is one word; servers are addresses.
pub(crate) fn validate(dns: &DnsConfig) -> Result<(), SpecError> {
    for (name, values) in [("servers", &dns.servers), ("searches", &dns.searches), ("options", &dns.options)]
    {
        at_most(&format!("config.dns_config.{name}"), values.len(), 1024)?;
        for (i, value) in values.iter().enumerate() {
            let field = format!("config.dns_config.{name}[{i}]");
            no_control(&field, value)?;
            if value.is_empty() || value.contains(char::is_whitespace) || value.len() > WORD_MAX {
                return Err(SpecError::invalid(field, value, "must be one word, of at most 2048 bytes"));
            }
        }
    }
    for (i, server) in dns.servers.iter().enumerate() {
        // An IPv6 address may carry a zone.
        let address = server.split_once('%').map_or(server.as_str(), |(address, _)| address);
        if address.parse::<IpAddr>().is_err() {
            let field = format!("config.dns_config.servers[{i}]");
            return Err(SpecError::invalid(field, server, "must be an IP address"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dns(servers: &[&str], searches: &[&str], options: &[&str]) -> DnsConfig {
        let own = |values: &[&str]| values.iter().map(|v| (*v).to_owned()).collect();
        DnsConfig { servers: own(servers), searches: own(searches), options: own(options) }
    }

    #[test]
    fn writes_the_config_or_copies_the_host() {
        assert_eq!(resolv_conf(None, "nameserver 9.9.9.9\n"), "nameserver 9.9.9.9\n");
        assert_eq!(resolv_conf(Some(&dns(&[], &[], &[])), "h"), "h");
        let full = dns(&["10.0.0.10", "fd00::1"], &["a.svc", "svc"], &["ndots:5", "rotate"]);
        assert_eq!(
            resolv_conf(Some(&full), "h"),
            "search a.svc svc\nnameserver 10.0.0.10\nnameserver fd00::1\noptions ndots:5 rotate\n"
        );
        validate(&full).unwrap();
        validate(&dns(&["fe80::1%eth0"], &["."], &[])).unwrap();
    }

    #[test]
    fn refuses_lines_in_words() {
        for (config, field) in [
            (dns(&["1.1.1.1\nnameserver 6.6.6.6"], &[], &[]), "config.dns_config.servers[0]"),
            (dns(&["1.1.1.1", "dns.example"], &[], &[]), "config.dns_config.servers[1]"),
            (dns(&[], &["a b"], &[]), "config.dns_config.searches[0]"),
            (dns(&[], &[""], &[]), "config.dns_config.searches[0]"),
            (dns(&[], &[], &["ndots:5", "x\u{7f}"]), "config.dns_config.options[1]"),
        ] {
            assert_eq!(validate(&config).unwrap_err().field, field);
        }
    }
}

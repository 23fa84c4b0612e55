//! What ADD answers.

use std::net::IpAddr;

use serde_json::{Map, Value};

use crate::Version;

/// Most addresses, and most interfaces, of one result.
const MAX_ENTRIES: usize = 256;

/// Reads a result and brings it into the form of `version`, for the next plugin and the record. The error is the
/// reason.
pub(crate) fn parse(text: &[u8], version: Version) -> Result<Value, String> {
    if text.iter().all(u8::is_ascii_whitespace) {
        return Err("it printed nothing".to_owned());
    }
    let value: Value = serde_json::from_slice(text)
        .map_err(|error| format!("no JSON: {error}; it begins with {}", start(text)))?;
    let Value::Object(mut object) = value else {
        return Err(format!("no JSON object; it begins with {}", start(text)));
    };
    match object.get("cniVersion") {
        None => {}
        Some(Value::String(own)) => {
            own.parse::<Version>().map_err(|why| format!("\"cniVersion\" {own:?} {why}"))?;
        }
        Some(other) => return Err(format!("\"cniVersion\" {other} is no string")),
    }
    object.insert("cniVersion".to_owned(), version.as_str().into());
    if let Some(Value::Array(ips)) = object.get_mut("ips") {
        for ip in ips.iter_mut().filter_map(Value::as_object_mut) {
            set_family(ip, version);
        }
    }
    let value = Value::Object(object);
    // So that a bad one fails where it is from.
    entries(&value)?;
    Ok(value)
}

/// From 1.0.0 on an address tells its family by itself.
fn set_family(ip: &mut Map<String, Value>, version: Version) {
    if version >= Version::V1_0_0 {
        ip.remove("version");
    } else if !ip.contains_key("version") {
        let six = ip.get("address").and_then(Value::as_str).is_some_and(|text| text.contains(':'));
        ip.insert("version".to_owned(), if six { "6" } else { "4" }.into());
    }
}

/// The addresses of the pod's interface, in the plugins' order.
pub(crate) fn addresses(result: &Value, interface: &str) -> Vec<IpAddr> {
    let mut found: Vec<IpAddr> = Vec::new();
    for (ip, on) in entries(result).unwrap_or_default() {
        if on.is_none_or(|name| name == interface) && !found.contains(&ip) {
            found.push(ip);
        }
    }
    found
}

/// Each address, with the name of its interface; none is said where it has none. Not all plugins say which interfaces are
/// in the sandbox, so the name decides, as in other runtimes.
fn entries(result: &Value) -> Result<Vec<(IpAddr, Option<&str>)>, String> {
    let list = |key: &str| match result.get(key) {
        None | Some(Value::Null) => Ok(&[] as &[Value]),
        Some(Value::Array(list)) if list.len() <= MAX_ENTRIES => Ok(list.as_slice()),
        Some(Value::Array(_)) => Err(format!("\"{key}\" has more than {MAX_ENTRIES} entries")),
        Some(_) => Err(format!("\"{key}\" is no array")),
    };
    let interfaces = list("interfaces")?;
    let mut entries = Vec::new();
    for (index, ip) in list("ips")?.iter().enumerate() {
        let bad = |what: String| format!("ips[{index}].{what}");
        let text =
            ip.get("address").and_then(Value::as_str).ok_or_else(|| bad("address is missing".into()))?;
        let address = address(text).ok_or_else(|| bad(format!("address {text:?} is not ADDRESS/PREFIX")))?;
        let on = match ip.get("interface") {
            None | Some(Value::Null) => None,
            Some(number) => {
                let interface = number
                    .as_u64()
                    .and_then(|number| interfaces.get(usize::try_from(number).ok()?))
                    .ok_or_else(|| bad(format!("interface {number} is not in \"interfaces\"")))?;
                Some(interface.get("name").and_then(Value::as_str).unwrap_or_default())
            }
        };
        entries.push((address, on));
    }
    Ok(entries)
}

fn address(text: &str) -> Option<IpAddr> {
    let (ip, prefix) = text.split_once('/')?;
    let ip: IpAddr = ip.parse().ok()?;
    let prefix: u8 = prefix.parse().ok()?;
    (prefix <= if ip.is_ipv4() { 32 } else { 128 }).then_some(ip)
}

/// The start of what a plugin printed, for an error.
pub(crate) fn start(text: &[u8]) -> String {
    const SHOWN: usize = 200;
    let shown = String::from_utf8_lossy(text.get(..SHOWN).unwrap_or(text));
    format!("{:?}", shown.trim())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const TWO: &str = r#"{"cniVersion": "1.0.0", "interfaces": [{"name": "veth1"}, {"name": "eth0", "sandbox": "/x"}],
        "ips": [{"address": "10.1.0.5/16", "interface": 1}, {"address": "10.1.0.1/16", "interface": 0},
                {"address": "fd00::5/64", "interface": 1, "gateway": "fd00::1"}, {"address": "10.1.0.5/16"}]}"#;

    #[test]
    fn addresses_are_those_of_the_pods_interface() {
        let result = parse(TWO.as_bytes(), Version::V1_0_0).unwrap();
        assert_eq!(
            addresses(&result, "eth0"),
            ["10.1.0.5", "fd00::5"].map(|ip| ip.parse::<IpAddr>().unwrap())
        );
        assert_eq!(
            addresses(&result, "net1"),
            ["10.1.0.5".parse::<IpAddr>().unwrap()],
            "that without an interface"
        );
        assert!(addresses(&json!({}), "eth0").is_empty());
    }

    #[test]
    fn an_interface_may_lack_its_sandbox() {
        let text = r#"{"cniVersion": "0.3.1", "interfaces": [{"name": "eth0"}], "ips": [{"version": "4", "address": "10.1.0.5/16", "interface": 0}]}"#;
        let result = parse(text.as_bytes(), Version::V0_3_1).unwrap();
        assert_eq!(addresses(&result, "eth0"), ["10.1.0.5".parse::<IpAddr>().unwrap()]);
    }

    #[test]
    fn a_result_gets_the_form_of_the_configurations_version() {
        let old = parse(TWO.as_bytes(), Version::V0_4_0).unwrap();
        assert_eq!(old["cniVersion"], "0.4.0");
        assert_eq!((&old["ips"][0]["version"], &old["ips"][2]["version"]), (&json!("4"), &json!("6")));
        let new = parse(old.to_string().as_bytes(), Version::V1_1_0).unwrap();
        assert!(new["ips"][0].get("version").is_none());
        assert_eq!(new["ips"][2]["gateway"], "fd00::1");
    }

    #[test]
    fn rubbish_is_named() {
        let reason = |text: &str| parse(text.as_bytes(), Version::V1_0_0).unwrap_err();
        assert_eq!(reason(" \n"), "it printed nothing");
        assert!(reason("Segmentation fault").contains("begins with \"Segmentation fault\""));
        assert!(reason("[1]").contains("no JSON object"));
        assert!(reason(r#"{"cniVersion": "0.2.0"}"#).contains("0.2.0"));
        assert!(reason(r#"{"ips": [{"address": "10.0.0.1"}]}"#).contains("ips[0].address \"10.0.0.1\""));
        assert!(reason(r#"{"ips": [{"address": "10.0.0.1/8", "interface": 3}]}"#).contains("interface 3"));
        assert!(reason(r#"{"ips": {}}"#).contains("no array"));
        assert!(reason(r#"{"ips": [{"address": "10.0.0.1/8", "interface": -1}]}"#).contains("interface -1"));
    }
}

//! Which transport and which subprotocol a client asks for.

use hyper::{
    HeaderMap,
    header::{AsHeaderName, CONNECTION, SEC_WEBSOCKET_PROTOCOL, UPGRADE},
};

/// How streams or channels are named, per version.
pub(crate) const PROTOCOL_VERSION: &str = "x-stream-protocol-version";
/// Sent with a refusal.
pub(crate) const ACCEPTED_VERSIONS: &str = "x-accepted-stream-protocol-versions";
/// The value of `Upgrade`.
pub(crate) const SPDY: &str = "SPDY/3.1";
/// Port-forward over SPDY.
pub(crate) const PORT_FORWARD: &str = "portforward.k8s.io";
/// The version of the exec and attach protocol.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Version {
    V1,
    V2,
    V3,
    V4,
    /// As 4, and on WebSocket the end of a stream can be told.
    V5,
}

/// Exec and attach over SPDY, newest first. Version 5 is of WebSocket, and the same as 4 here.
pub(crate) const SPDY_COMMANDS: [(&str, Version); 5] = [
    ("v5.channel.k8s.io", Version::V5),
    ("v4.channel.k8s.io", Version::V4),
    ("v3.channel.k8s.io", Version::V3),
    ("v2.channel.k8s.io", Version::V2),
    ("channel.k8s.io", Version::V1),
];

/// How bytes travel in WebSocket messages.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Encoding {
    /// Byte 0 is the channel.
    Binary,
    /// Character 0 is the channel as a digit, the rest base64.
    Base64,
}

/// Exec and attach over WebSocket.
pub(crate) const WEBSOCKET_COMMANDS: [(&str, (Version, Encoding)); 5] = [
    ("v5.channel.k8s.io", (Version::V5, Encoding::Binary)),
    ("v4.channel.k8s.io", (Version::V4, Encoding::Binary)),
    ("v4.base64.channel.k8s.io", (Version::V4, Encoding::Base64)),
    ("channel.k8s.io", (Version::V1, Encoding::Binary)),
    ("base64.channel.k8s.io", (Version::V1, Encoding::Base64)),
];

/// What a port-forward over WebSocket looks like inside.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum PortForwardForm {
    /// Two channels a port.
    Channels(Encoding),
    /// SPDY.
    Tunnel,
}

/// Port-forward over WebSocket.
pub(crate) const WEBSOCKET_PORT_FORWARDS: [(&str, PortForwardForm); 5] = [
    ("SPDY/3.1+portforward.k8s.io", PortForwardForm::Tunnel),
    ("v4.channel.k8s.io", PortForwardForm::Channels(Encoding::Binary)),
    ("v4.base64.channel.k8s.io", PortForwardForm::Channels(Encoding::Base64)),
    ("channel.k8s.io", PortForwardForm::Channels(Encoding::Binary)),
    ("base64.channel.k8s.io", PortForwardForm::Channels(Encoding::Base64)),
];

/// The elements of a header that may be repeated and holds comma lists.
fn elements(headers: &HeaderMap, name: impl AsHeaderName) -> impl Iterator<Item = &str> {
    let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim).filter(|element| !element.is_empty())
}

fn upgrades_to(headers: &HeaderMap, protocol: &str) -> bool {
    elements(headers, CONNECTION).any(|option| option.eq_ignore_ascii_case("upgrade"))
        && elements(headers, UPGRADE).any(|offered| offered.eq_ignore_ascii_case(protocol))
}

/// Whether this is an upgrade to WebSocket.
pub(crate) fn is_websocket(headers: &HeaderMap) -> bool {
    upgrades_to(headers, "websocket")
}

/// Whether this is an upgrade to SPDY/3.1.
pub(crate) fn is_spdy(headers: &HeaderMap) -> bool {
    upgrades_to(headers, SPDY)
}

/// What came of an offer.
#[derive(Debug, Eq, PartialEq)]
pub(crate) enum Choice<'a, T> {
    /// The client's first that we know.
    Agreed(&'a str, T),
    /// Nothing was offered.
    NoOffer,
    /// Nothing that we know was offered.
    NoneKnown,
}

fn choose<'a, T: Copy>(offers: impl Iterator<Item = &'a str>, known: &[(&str, T)]) -> Choice<'a, T> {
    let mut result = Choice::NoOffer;
    for offer in offers {
        if let Some((_, meaning)) = known.iter().find(|(name, _)| *name == offer) {
            return Choice::Agreed(offer, *meaning);
        }
        result = Choice::NoneKnown;
    }
    result
}

/// Chooses the version of streams over SPDY.
pub(crate) fn spdy_version<'a, T: Copy>(headers: &'a HeaderMap, known: &[(&str, T)]) -> Choice<'a, T> {
    choose(elements(headers, PROTOCOL_VERSION), known)
}

/// Chooses the WebSocket subprotocol.
pub(crate) fn subprotocol<'a, T: Copy>(headers: &'a HeaderMap, known: &[(&str, T)]) -> Choice<'a, T> {
    choose(elements(headers, SEC_WEBSOCKET_PROTOCOL), known)
}

#[cfg(test)]
mod tests {
    use hyper::header::HeaderValue;

    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_static(value));
        }
        headers
    }

    #[test]
    fn transports() {
        let spdy = headers(&[("connection", "keep-alive, upgrade"), ("upgrade", "spdy/3.1")]);
        assert!(is_spdy(&spdy) && !is_websocket(&spdy));
        let websocket = headers(&[("connection", "Upgrade"), ("upgrade", "WebSocket")]);
        assert!(is_websocket(&websocket) && !is_spdy(&websocket));
        assert!(!is_spdy(&headers(&[("upgrade", "SPDY/3.1")])));
        assert!(!is_spdy(&headers(&[("connection", "Upgrade"), ("upgrade", "SPDY/3")])));
    }

    #[test]
    fn the_first_of_the_client_that_we_know() {
        for (offers, choice) in [
            (
                &["v5.channel.k8s.io", "v4.channel.k8s.io"][..],
                Choice::Agreed("v5.channel.k8s.io", Version::V5),
            ),
            (
                &["v9.channel.k8s.io, v2.channel.k8s.io,v4.channel.k8s.io"],
                Choice::Agreed("v2.channel.k8s.io", Version::V2),
            ),
            (&["channel.k8s.io"], Choice::Agreed("channel.k8s.io", Version::V1)),
            (&["v9.channel.k8s.io", "V4.channel.k8s.io"], Choice::NoneKnown),
            (&["", " , "], Choice::NoOffer),
            (&[], Choice::NoOffer),
        ] {
            let pairs: Vec<_> = offers.iter().map(|offer| (PROTOCOL_VERSION, *offer)).collect();
            assert_eq!(spdy_version(&headers(&pairs), &SPDY_COMMANDS), choice);
        }
    }
}

//! How much a pod may send and receive: two annotations.

use std::collections::HashMap;

use crate::error::{Code, Error, Result};
use crate::quantity::quantity;

const INGRESS: &str = "kubernetes.io/ingress-bandwidth";
const EGRESS: &str = "kubernetes.io/egress-bandwidth";

/// What Kubernetes takes for reasonable, in bits a second: 1k to 1P.
const REASONABLE: std::ops::RangeInclusive<u64> = 1_000..=1_000_000_000_000_000;

/// In bits a second; none: no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Bandwidth {
    /// To the pod.
    pub(crate) ingress: Option<u64>,
    /// From the pod.
    pub(crate) egress: Option<u64>,
}

impl Bandwidth {
    /// Reads the annotations of a pod.
    pub(crate) fn of(annotations: &HashMap<String, String>) -> Result<Self> {
        let read = |key: &str| {
            let Some(text) = annotations.get(key) else { return Ok(None) };
            let bad = |why: &str| {
                Error::new(Code::InvalidArgument, format!("config.annotations[{key:?}] {text:?}: {why}"))
            };
            let bits = quantity(text).ok_or_else(|| bad("is no quantity, such as 10M"))?;
            if !REASONABLE.contains(&bits) {
                return Err(bad("is not between 1k and 1P bits a second"));
            }
            Ok(Some(bits))
        };
        Ok(Self { ingress: read(INGRESS)?, egress: read(EGRESS)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unreasonable_ones_are_refused_by_name() {
        let with = |text: &str| {
            Bandwidth::of(&HashMap::from([("kubernetes.io/egress-bandwidth".to_owned(), text.to_owned())]))
        };
        assert_eq!(with("1M").unwrap(), Bandwidth { ingress: None, egress: Some(1_000_000) });
        assert_eq!(Bandwidth::of(&HashMap::new()).unwrap(), Bandwidth::default());
        for bad in ["fast", "999", "2P"] {
            let error = with(bad).unwrap_err();
            assert_eq!(error.code, Code::InvalidArgument);
            assert!(error.message.contains("egress-bandwidth") && error.message.contains(bad), "{error}");
        }
    }
}

//! Capability sets.

use std::sync::OnceLock;

use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set, clear_ambient_capability_set,
    configure_capability_in_ambient_set, remove_capability_from_bounding_set, set_capabilities,
};
use stave_supervisor_proto::v1::Capabilities;

use crate::error::{Context, Result};

const STAGE: &str = "capabilities";
pub(crate) const SYS_ADMIN: u64 = CapabilitySet::SYS_ADMIN.bits();

/// What a process ends up with: the wanted sets as far as this host and our own bounding set allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sets {
    /// What is in the bounding set and must not stay.
    excess: u64,
    effective: u64,
    permitted: u64,
    inheritable: u64,
    ambient: u64,
}

impl Sets {
    /// `bounding`: the caller's own, where it is known.
    pub(crate) fn new(wanted: &Capabilities, bounding: Option<u64>) -> Result<Sets> {
        let own = capabilities(None).at(STAGE, || "capget".to_owned())?.permitted.bits();
        Ok(Sets::within(wanted, own, bounding.unwrap_or_else(self::bounding)))
    }

    fn within(wanted: &Capabilities, own: u64, bounding: u64) -> Sets {
        let possible = own & bounding;
        let permitted = wanted.permitted & possible;
        let ambient = wanted.ambient & permitted;
        Sets {
            excess: bounding & !(wanted.bounding & possible),
            permitted,
            effective: wanted.effective & permitted,
            // An ambient capability has to be inheritable as well (capabilities(7)).
            inheritable: (wanted.inheritable & possible) | ambient,
            ambient,
        }
    }

    /// Drops what is not in the bounding set. Needs CAP_SETPCAP.
    pub(crate) fn drop_bounding(&self) -> Result<()> {
        for bit in bits(self.excess) {
            remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(bit))
                .at(STAGE, || format!("drop capability {}", bit.trailing_zeros()))?;
        }
        Ok(())
    }

    /// Sets all but the bounding set, and `keep` in the permitted set alone, for [`Sets::raise`].
    pub(crate) fn apply(&self, keep: u64) -> Result<()> {
        set(self.effective, self.permitted | keep, self.inheritable)?;
        clear_ambient_capability_set().at(STAGE, || "clear ambient".to_owned())?;
        for bit in bits(self.ambient) {
            configure_capability_in_ambient_set(CapabilitySet::from_bits_retain(bit), true)
                .at(STAGE, || format!("raise ambient capability {}", bit.trailing_zeros()))?;
        }
        Ok(())
    }

    /// Makes a kept capability effective.
    pub(crate) fn raise(&self, keep: u64) -> Result<()> {
        set(self.effective | keep, self.permitted | keep, self.inheritable)
    }

    /// Gives up what [`Sets::apply`] kept.
    pub(crate) fn drop_kept(&self) -> Result<()> {
        set(self.effective, self.permitted, self.inheritable)
    }
}

fn set(effective: u64, permitted: u64, inheritable: u64) -> Result<()> {
    let sets = CapabilitySets {
        effective: CapabilitySet::from_bits_retain(effective),
        permitted: CapabilitySet::from_bits_retain(permitted),
        inheritable: CapabilitySet::from_bits_retain(inheritable),
    };
    set_capabilities(None, sets).at(STAGE, || "capset".to_owned())
}

/// The supervisor's bounding set, which never changes, and which all that it clones has until it joins a user namespace.
pub(crate) fn supervisors_bounding() -> u64 {
    static KNOWN: OnceLock<u64> = OnceLock::new();
    *KNOWN.get_or_init(bounding)
}

/// Our own bounding set. The kernel refuses the first number that it doesn't know.
fn bounding() -> u64 {
    (0..64)
        .map(|n| 1_u64 << n)
        .map_while(|bit| match capability_is_in_bounding_set(CapabilitySet::from_bits_retain(bit)) {
            Ok(true) => Some(bit),
            Ok(false) => Some(0),
            Err(_) => None,
        })
        .sum()
}

fn bits(set: u64) -> impl Iterator<Item = u64> {
    (0..64).map(|n| 1 << n).filter(move |bit| set & bit != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_beyond_our_own() {
        let wanted = Capabilities {
            bounding: 0b1111,
            effective: 0b1110,
            permitted: 0b0110,
            inheritable: 0,
            ambient: 0,
        };
        let sets = Sets::within(&wanted, 0b0101, 0b1_0101);
        let expected =
            Sets { excess: 0b1_0000, permitted: 0b0100, effective: 0b0100, inheritable: 0, ambient: 0 };
        assert_eq!(sets, expected);
        let ambient = Sets::within(&Capabilities { ambient: 0b0110, ..wanted }, 0b0101, u64::MAX);
        assert_eq!((ambient.inheritable, ambient.ambient), (0b0100, 0b0100));
    }

    #[test]
    fn the_bounding_set_is_that_of_proc() {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let line = status.lines().find_map(|l| l.strip_prefix("CapBnd:")).unwrap();
        assert_eq!(bounding(), u64::from_str_radix(line.trim(), 16).unwrap());
    }
}

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A version of the CNI specification. Older ones have results of another form and are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Version {
    /// As 0.3.1, which only corrects its text.
    #[serde(rename = "0.3.0")]
    V0_3_0,
    /// Lists of plugins.
    #[serde(rename = "0.3.1")]
    V0_3_1,
    /// CHECK, and the result for DEL.
    #[serde(rename = "0.4.0")]
    V0_4_0,
    /// No single configurations, no family beside an address.
    #[serde(rename = "1.0.0")]
    V1_0_0,
    /// GC, STATUS, and several versions in a configuration.
    #[serde(rename = "1.1.0")]
    V1_1_0,
}

/// All that are spoken here, lowest first.
pub(crate) const ALL: &[Version] =
    &[Version::V0_3_0, Version::V0_3_1, Version::V0_4_0, Version::V1_0_0, Version::V1_1_0];

impl Version {
    /// As in configurations.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V0_3_0 => "0.3.0",
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Version {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        ALL.iter().copied().find(|version| version.as_str() == text).ok_or_else(|| {
            let known: Vec<_> = ALL.iter().map(|version| version.as_str()).collect();
            format!("is not a version that is spoken here ({})", known.join(", "))
        })
    }
}

/// Versions with commas between.
pub(crate) fn joined(versions: &[Version]) -> String {
    versions.iter().map(|version| version.as_str()).collect::<Vec<_>>().join(", ")
}

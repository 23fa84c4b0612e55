//! The profile behind `RuntimeDefault`.

use std::sync::LazyLock;

use crate::{Profile, parse};

const NAME: &str = "default.json";

/// The profile that a container gets when it asks for `RuntimeDefault`: the file `default.json` of this crate.
pub fn runtime_default() -> &'static Profile {
    #[expect(clippy::expect_used, reason = "the profile is part of the program, and the tests read it")]
    static PROFILE: LazyLock<Profile> =
        LazyLock::new(|| parse(include_str!("../default.json"), NAME).expect("the default profile"));
    &PROFILE
}

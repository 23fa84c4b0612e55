//! Profiles read, compiled, interpreted and enforced.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

mod compile;
mod default_profile;
mod enforce;
mod machine;
mod parse;
mod properties;

//! The daemon's configuration: `/etc/stave/config.toml`, the drop-ins of `conf.d/` beside it, and the
//! command line, over built-in defaults. Unknown keys, wrong types and bad values are errors that name the
//! key, the value, the file and the line.
#![forbid(unsafe_code)]

mod check;
mod error;
mod keys;
mod load;
mod print;
mod subnet;
mod types;

pub use error::{ConfigError, Origin};
pub use load::{DEFAULT_FILE, Overrides, load};
pub use subnet::Subnet;
pub use types::{
    AppArmorConfig, BridgeConfig, CgroupConfig, CgroupDriver, CniConfig, Config, LogConfig, LogFormat,
    LogLevel, MetricsConfig, NetworkConfig, NetworkMode, NriConfig, RegistriesConfig, Runtime, RuntimeKind,
    StreamingConfig,
};

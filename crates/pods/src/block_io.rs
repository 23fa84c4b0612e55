//! Classes of block I/O: what the annotation `blockio.resources.beta.kubernetes.io/…` of a pod names.

use std::collections::BTreeMap;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use stave_cgroup::{BlockIo, DeviceIo};
use toml::{Table, Value};

use crate::error::{Code, Error, Result as PodResult};

/// Weights that the kernel's BFQ scheduler has in both hierarchies (kernel: block/bfq-iosched.rst).
const WEIGHT: std::ops::RangeInclusive<u64> = 1..=1000;
const DEVICES_MAX: usize = 256;

/// The classes of the node's configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BlockIoClasses {
    file: Option<PathBuf>,
    classes: BTreeMap<String, Class>,
}

/// Why a file of classes can't be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {message}", path.display())]
pub struct BlockIoError {
    path: PathBuf,
    message: String,
}

/// Limits for all devices, and for single ones.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Class {
    weight: Option<u64>,
    devices: Vec<Device>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Device {
    path: PathBuf,
    /// Its number is found out when it is used.
    io: DeviceIo,
}

impl BlockIoClasses {
    /// Reads a TOML file: a table a class. Errors name the file, the line or the key, and the value.
    pub fn read(path: &Path) -> Result<Self, BlockIoError> {
        let failed = |message: String| BlockIoError { path: path.to_owned(), message };
        let text = std::fs::read_to_string(path).map_err(|e| failed(e.to_string()))?;
        let table: Table = text.parse().map_err(|error: toml::de::Error| {
            let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
            failed(format!("line {}: {}", before.matches('\n').count() + 1, error.message()))
        })?;
        let classes = table.iter().map(|(name, value)| Ok((name.clone(), class(name, value)?)));
        let classes = classes.collect::<Result<_, String>>().map_err(failed)?;
        Ok(Self { file: Some(path.to_owned()), classes })
    }

    /// The limits of a class. `field`: what names it. Errors: FailedPrecondition, for a class that the node does not have,
    /// and for a device that is not there.
    pub(crate) fn find(&self, field: &str, name: &str) -> PodResult<BlockIo> {
        let refused = |why: String| {
            Err(Error::new(Code::FailedPrecondition, format!("{field}: value {name:?}: {why}")))
        };
        let Some(file) = &self.file else {
            return refused("this node has no classes of block I/O (cgroup.blockio)".to_owned());
        };
        let Some(class) = self.classes.get(name) else {
            let known: Vec<&String> = self.classes.keys().collect();
            return refused(format!("{} has no such class, but {known:?}", file.display()));
        };
        let mut devices = Vec::new();
        for Device { path, io } in &class.devices {
            match std::fs::metadata(path) {
                Ok(found) if found.file_type().is_block_device() => {
                    let (major, minor) = (rustix::fs::major(found.rdev()), rustix::fs::minor(found.rdev()));
                    devices.push(DeviceIo { major, minor, ..io.clone() });
                }
                Ok(_) => return refused(format!("its device {} is no block device", path.display())),
                Err(error) => return refused(format!("its device {}: {error}", path.display())),
            }
        }
        Ok(BlockIo { weight: class.weight, devices })
    }
}

fn class(name: &str, value: &Value) -> Result<Class, String> {
    let table = value.as_table().ok_or_else(|| format!("{name}: is no table"))?;
    let mut class = Class::default();
    for (key, value) in table {
        let at = format!("{name}.{key}");
        match key.as_str() {
            "weight" => class.weight = Some(weight(&at, value)?),
            "devices" => {
                let devices = value.as_array().ok_or_else(|| format!("{at}: is no array of tables"))?;
                if devices.len() > DEVICES_MAX {
                    return Err(format!("{at}: has more than {DEVICES_MAX}"));
                }
                let devices =
                    devices.iter().enumerate().map(|(n, value)| device(&format!("{at}[{n}]"), value));
                class.devices = devices.collect::<Result<_, _>>()?;
            }
            _ => return Err(format!("unknown key {at}; a class has weight, devices")),
        }
    }
    Ok(class)
}

fn device(at: &str, value: &Value) -> Result<Device, String> {
    let table = value.as_table().ok_or_else(|| format!("{at}: is no table"))?;
    let mut device = Device::default();
    for (key, value) in table {
        let at = format!("{at}.{key}");
        let limit = match key.as_str() {
            "path" => {
                let path = value.as_str().map(PathBuf::from).filter(|path| path.is_absolute());
                device.path = path.ok_or_else(|| format!("{at} = {value}: is no absolute path"))?;
                continue;
            }
            "weight" => {
                device.io.weight = Some(weight(&at, value)?);
                continue;
            }
            "read_bps" => &mut device.io.read_bps,
            "write_bps" => &mut device.io.write_bps,
            "read_iops" => &mut device.io.read_iops,
            "write_iops" => &mut device.io.write_iops,
            _ => {
                let known = "path, weight, read_bps, write_bps, read_iops, write_iops";
                return Err(format!("unknown key {at}; a device has {known}"));
            }
        };
        // The kernel takes 0 for "no limit" in one hierarchy and refuses it in the other.
        let number = value.as_integer().and_then(|n| u64::try_from(n).ok()).filter(|n| *n > 0);
        *limit = Some(number.ok_or_else(|| format!("{at} = {value}: is no number above 0"))?);
    }
    if device.path.as_os_str().is_empty() {
        return Err(format!("{at}.path is missing"));
    }
    Ok(device)
}

fn weight(at: &str, value: &Value) -> Result<u64, String> {
    let number = value.as_integer().and_then(|n| u64::try_from(n).ok()).filter(|n| WEIGHT.contains(n));
    number.ok_or_else(|| format!("{at} = {value}: is out of range: 1 to 1000"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<BlockIoClasses, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("blockio.toml");
        std::fs::write(&path, text).unwrap();
        BlockIoClasses::read(&path).map_err(|e| e.to_string())
    }

    #[test]
    fn classes_and_devices() {
        let text = "[slow]\nweight = 80\n[[slow.devices]]\npath = \"/dev/no-disk\"\nread_bps = 1_000_000\nweight = 10\n\
                    [fast]\n[[odd.devices]]\npath = \"/dev/null\"\nwrite_iops = 7\n";
        let classes = read(text).unwrap();
        let slow = &classes.classes["slow"];
        assert_eq!((slow.weight, slow.devices[0].path.as_path()), (Some(80), Path::new("/dev/no-disk")));
        assert_eq!((slow.devices[0].io.read_bps, slow.devices[0].io.weight), (Some(1_000_000), Some(10)));
        assert_eq!(classes.find("at", "fast").unwrap(), BlockIo::default());
        for (class, words) in [
            ("slow", "/dev/no-disk: No such file"),
            ("odd", "/dev/null is no block device"),
            ("gold", "no such class, but [\"fast\", \"odd\", \"slow\"]"),
        ] {
            let error = classes.find("at", class).unwrap_err();
            assert_eq!(error.code, Code::FailedPrecondition);
            assert!(error.message.contains(words) && error.message.starts_with("at: value"), "{error}");
        }
        let error = BlockIoClasses::default().find("at", "fast").unwrap_err();
        assert!(error.message.contains("cgroup.blockio"), "{error}");
    }

    #[test]
    fn mistakes_are_named() {
        for (text, words) in [
            ("[slow\n", "line 1"),
            ("a = 1\n", "a: is no table"),
            ("[a]\nwait = 1\n", "unknown key a.wait"),
            ("[a]\nweight = 0\n", "a.weight = 0"),
            ("[a]\nweight = 1001\n", "a.weight = 1001"),
            ("[[a.devices]]\nread_bps = 1\n", "a.devices[0].path is missing"),
            ("[[a.devices]]\npath = \"dev\"\n", "a.devices[0].path"),
            ("[[a.devices]]\npath = \"/d\"\nread_bps = 0\n", "a.devices[0].read_bps = 0"),
            ("[[a.devices]]\npath = \"/d\"\nread = 1\n", "unknown key a.devices[0].read;"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(words) && error.contains("blockio.toml: "), "{text:?}: {error}");
        }
        assert!(BlockIoClasses::read(Path::new("/no/file")).unwrap_err().to_string().contains("/no/file"));
    }
}

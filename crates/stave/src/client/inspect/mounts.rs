//! Mounts, masked and read-only paths.

use std::path::Path;

use rustix::fs::{AtFlags, StatxFlags};
use serde_json::Value;
use stave_paths::Root;

use super::Asked;
use super::procfs::{MountPoint, Proc};
use super::report::Row;

/// Attributes that a mount must have when they are asked for. It may have more: a bind mount keeps those of
/// its source.
const ATTRIBUTES: [&str; 4] = ["nosuid", "nodev", "noexec", "nosymfollow"];

/// Owners are mapped for the user namespace.
const IDMAPPED: &str = "idmapped";

pub(crate) fn rows(asked: &Asked, proc: &Proc) -> anyhow::Result<Vec<Row>> {
    let view = View { mounts: proc.mounts()?, root: Root::open(&proc.root()).ok() };
    let spec = &asked.spec;
    let mut rows = vec![root(spec, &view)];
    let mut seen = vec!["/".to_owned()];
    for mount in spec["mounts"].as_array().into_iter().flatten() {
        rows.push(row(mount, &view, &mut seen));
    }
    let linux = &spec["linux"];
    rows.extend(
        linux["devices"].as_array().into_iter().flatten().filter_map(|d| device(d, &view, &mut seen)),
    );
    for (field, wanted) in [("maskedPaths", "masked"), ("readonlyPaths", "ro")] {
        for path in linux[field].as_array().into_iter().flatten().filter_map(Value::as_str) {
            rows.extend(covered(path, wanted, &view, &mut seen));
        }
    }
    rows.extend(not_asked(&view, &seen));
    Ok(rows)
}

/// What the init sees.
struct View {
    mounts: Vec<MountPoint>,
    root: Option<Root>,
}

impl View {
    /// The mount whose root a path is, through links of the container where there is none at the path itself.
    fn at(&self, path: &str) -> Option<&MountPoint> {
        if let Some(found) = self.mounts.iter().rev().find(|mount| mount.point == path) {
            return Some(found);
        }
        let fd = self.root.as_ref()?.resolve(Path::new(path)).ok()?;
        let stat = rustix::fs::statx(&fd, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID).ok()?;
        let is_root = stat.stx_attributes.contains(rustix::fs::StatxAttributes::MOUNT_ROOT);
        self.mounts.iter().find(|mount| is_root && mount.id == stat.stx_mnt_id)
    }

    fn exists(&self, path: &str) -> bool {
        self.root.as_ref().is_some_and(|root| root.resolve(Path::new(path)).is_ok())
    }
}

fn root(spec: &Value, view: &View) -> Row {
    let mode = if spec["root"]["readonly"] == true { "ro" } else { "rw" };
    match view.at("/") {
        Some(mount) => Row::compare("/", mode, mode_of(mount)).detail(mount.fs_type.clone()),
        None => Row::compare("/", mode, "not mounted"),
    }
}

/// One mount of the specification.
fn row(mount: &Value, view: &View, seen: &mut Vec<String>) -> Row {
    let text = |field: &str| mount[field].as_str().unwrap_or_default();
    let path = clean(text("destination"));
    let options: Vec<&str> =
        mount["options"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let has = |option: &str| options.contains(&option);
    let bind = text("type") == "bind" || has("bind") || has("rbind");
    let mut wanted = vec![if bind { "bind" } else { text("type") }.to_owned()];
    wanted.push(
        if has("rro") {
            "rro"
        } else if has("ro") {
            "ro"
        } else {
            "rw"
        }
        .to_owned(),
    );
    wanted.extend(ATTRIBUTES.iter().filter(|a| has(a)).map(|a| (*a).to_owned()));
    wanted.push(propagation_asked(&options).to_owned());
    if mount["uidMappings"].is_array() {
        wanted.push(IDMAPPED.to_owned());
    }
    let Some(found) = view.at(&path) else {
        return Row::compare(path, wanted.join(","), "not mounted");
    };
    let mut mode = mode_of(found);
    if has("rro") && mode == "ro" && all_below_are_read_only(&path, view) {
        mode = "rro";
    }
    let attribute = |name: &str| found.options.iter().any(|option| option == name);
    let mut kernel =
        vec![if bind { "bind".to_owned() } else { kind(text("type"), &found.fs_type) }, mode.to_owned()];
    kernel.extend(ATTRIBUTES.iter().filter(|a| attribute(a)).map(|a| (*a).to_owned()));
    kernel.push(propagation(found).to_owned());
    kernel.extend(attribute(IDMAPPED).then(|| IDMAPPED.to_owned()));
    let differs = !wanted.iter().all(|word| kernel.contains(word));
    let source = if bind { format!("{} of {}", found.root, found.fs_type) } else { found.fs_type.clone() };
    seen.push(found.point.clone());
    Row::compare(path, wanted.join(","), kernel.join(",")).differs(differs).detail(source)
}

/// A device node that is a mount of its own, as those outside of /dev are in a user namespace.
fn device(device: &Value, view: &View, seen: &mut Vec<String>) -> Option<Row> {
    let path = clean(device["path"].as_str().unwrap_or_default());
    view.mounts.iter().find(|mount| mount.point == path && path != "/")?;
    let number = |field: &str| device[field].as_i64().unwrap_or_default();
    let wanted =
        format!("{} {}:{}", device["type"].as_str().unwrap_or_default(), number("major"), number("minor"));
    let stat =
        view.root.as_ref().and_then(|root| rustix::fs::fstat(root.resolve(Path::new(&path)).ok()?).ok());
    let kernel = stat.map_or_else(
        || "not there".to_owned(),
        |stat| {
            let kind = match rustix::fs::FileType::from_raw_mode(stat.st_mode) {
                rustix::fs::FileType::CharacterDevice => "c",
                rustix::fs::FileType::BlockDevice => "b",
                _ => "no device",
            };
            format!("{kind} {}:{}", rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev))
        },
    );
    seen.push(path.clone());
    Some(Row::compare(path, wanted, kernel).detail("device"))
}

/// A path that something is mounted over, if it is there at all.
fn covered(path: &str, wanted: &str, view: &View, seen: &mut Vec<String>) -> Option<Row> {
    let path = clean(path);
    match view.at(&path) {
        Some(mount) => {
            let masked = mount.root == "/null" || (mount.fs_type == "tmpfs" && mode_of(mount) == "ro");
            let kernel = if wanted == "masked" && masked { "masked" } else { mode_of(mount) };
            seen.push(mount.point.clone());
            Some(Row::compare(path, wanted, kernel))
        }
        None if view.exists(&path) => Some(Row::compare(path, wanted, "open")),
        // Covered only where the kernel has it.
        None => None,
    }
}

/// Mounts that no line of the specification accounts for. What is below a mount that was asked for came with it.
fn not_asked(view: &View, seen: &[String]) -> Vec<Row> {
    let below = |point: &str| {
        seen.iter().any(|path| {
            point == path
                || (path != "/"
                    && point.strip_prefix(path.as_str()).is_some_and(|rest| rest.starts_with('/')))
        })
    };
    let mut rows = Vec::new();
    for mount in view.mounts.iter().filter(|mount| !below(&mount.point)) {
        let kernel = format!("{},{}", mode_of(mount), propagation(mount));
        let detail = format!("{} of {}", mount.root, mount.fs_type);
        rows.push(Row::compare(mount.point.clone(), "nothing", kernel).detail(detail));
    }
    rows
}

fn mode_of(mount: &MountPoint) -> &'static str {
    if mount.options.iter().any(|option| option == "ro") { "ro" } else { "rw" }
}

fn propagation(mount: &MountPoint) -> &'static str {
    let has = |prefix: &str| mount.tags.iter().any(|tag| tag.starts_with(prefix));
    match (has("shared:"), has("master:")) {
        (true, _) => "shared",
        (false, true) => "slave",
        (false, false) => "private",
    }
}

fn propagation_asked(options: &[&str]) -> &'static str {
    for option in options.iter().rev() {
        match *option {
            "shared" | "rshared" => return "shared",
            "slave" | "rslave" => return "slave",
            "private" | "rprivate" => return "private",
            _ => {}
        }
    }
    "private"
}

/// The specification's word for what the kernel has. The cgroup mount is one of v2, or on hosts with v1
/// controllers a tmpfs with a directory for each hierarchy.
fn kind(asked: &str, fs_type: &str) -> String {
    match asked {
        "cgroup" if matches!(fs_type, "cgroup2" | "tmpfs" | "cgroup") => asked.to_owned(),
        _ => fs_type.to_owned(),
    }
}

fn all_below_are_read_only(path: &str, view: &View) -> bool {
    let below =
        |mount: &&MountPoint| mount.point.strip_prefix(path).is_some_and(|rest| rest.starts_with('/'));
    view.mounts.iter().filter(below).all(|mount| mode_of(mount) == "ro")
}

/// Without doubled and trailing slashes.
fn clean(path: &str) -> String {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    format!("/{}", parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn mount(point: &str, options: &str, tags: &[&str], fs_type: &str) -> MountPoint {
        MountPoint {
            id: 1,
            root: "/".into(),
            point: point.into(),
            options: options.split(',').map(str::to_owned).collect(),
            tags: tags.iter().map(|tag| (*tag).to_owned()).collect(),
            fs_type: fs_type.into(),
        }
    }

    fn view() -> View {
        let mounts = vec![
            mount("/", "rw", &[], "overlay"),
            mount("/proc", "rw,nosuid,nodev,noexec,relatime", &[], "proc"),
            mount("/data", "ro,nosuid", &["master:4"], "ext4"),
            mount("/data/sub", "rw", &["master:5"], "tmpfs"),
            mount("/proc/kcore", "ro", &[], "devtmpfs"),
            mount("/mnt", "rw", &[], "tmpfs"),
        ];
        View { mounts, root: None }
    }

    fn one(spec: Value) -> Row {
        row(&spec, &view(), &mut Vec::new())
    }

    #[test]
    fn mounts_are_compared() {
        let proc =
            one(json!({ "destination": "/proc/", "type": "proc", "options": ["nosuid", "noexec", "nodev"] }));
        assert!(!proc.differs, "{proc:?}");
        let data =
            |options: &[&str]| one(json!({ "destination": "/data", "type": "bind", "options": options }));
        // More attributes than were asked for are no difference.
        assert!(!data(&["rbind", "rslave", "ro"]).differs);
        assert!(data(&["rbind", "rprivate", "ro"]).differs);
        assert!(data(&["rbind", "rslave", "rw"]).differs);
        assert!(data(&["rbind", "rslave", "ro", "noexec"]).differs);
        // What is mounted below is writable.
        assert!(data(&["rbind", "rslave", "rro"]).differs);
        let missing = one(json!({ "destination": "/missing", "type": "tmpfs" }));
        assert_eq!((missing.differs, missing.kernel.as_str()), (true, "not mounted"));
    }

    #[test]
    fn mounts_that_nobody_asked_for_are_told() {
        let view = view();
        let mut seen: Vec<String> = ["/", "/proc", "/data"].map(String::from).to_vec();
        let row = covered("/proc/kcore", "ro", &view, &mut seen).unwrap();
        assert!(!row.differs);
        assert!(covered("/proc/missing", "masked", &view, &mut seen).is_none());
        assert!(covered("/data/sub", "ro", &view, &mut seen).unwrap().differs);
        let rows = not_asked(&view, &seen);
        assert_eq!(rows.len(), 1, "{rows:?}");
        assert_eq!((rows[0].what.as_str(), rows[0].differs), ("/mnt", true));
    }
}

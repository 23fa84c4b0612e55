//! The init itself: identity, capabilities, filters, labels, user maps.

use rustix::thread::CapabilitySet;
use serde_json::Value;

use super::Asked;
use super::procfs::Proc;
use super::report::Row;

/// Of a process in the node's user namespace.
const NODE_MAP: &str = "0 0 4294967295";

pub(crate) fn rows(asked: &Asked, proc: &Proc) -> anyhow::Result<Vec<Row>> {
    let process = &asked.spec["process"];
    let linux = &asked.spec["linux"];
    let mut rows = vec![Row::tell("pids", proc.status("NSpid")).detail("from the node's namespace inwards")];
    rows.extend(identity(asked, proc));
    rows.extend(capabilities(asked, proc)?);

    let no_new_privs = |on: bool| if on { "on" } else { "off" };
    let at_execve = |text: &str| (!asked.waiting).then(|| text.to_owned());
    let wanted = no_new_privs(process["noNewPrivileges"] == true);
    rows.push(Row::maybe("no_new_privs", at_execve(wanted), no_new_privs(proc.status("NoNewPrivs") == "1")));
    let wanted = if linux["seccomp"].is_object() { "filter" } else { "none" };
    let kernel = match proc.status("Seccomp") {
        "0" => "none",
        "1" => "strict",
        "2" => "filter",
        _ => "unknown",
    };
    let filters = match proc.status("Seccomp_filters") {
        "" | "0" => String::new(),
        count => format!("{count} of them"),
    };
    rows.push(Row::maybe("seccomp", at_execve(wanted), kernel).detail(filters));
    rows.push(label(process, proc, asked.waiting));
    let wanted = process["oomScoreAdj"].as_i64().map(|n| n.to_string());
    rows.push(Row::maybe("oom_score_adj", wanted, proc.text("oom_score_adj")?));
    for (file, field) in [("uid_map", "uidMappings"), ("gid_map", "gidMappings")] {
        rows.push(Row::compare(file, map(&linux[field]), lines(&proc.text(file)?)));
    }
    if let Ok(kernel) = proc.text("timens_offsets") {
        rows.push(Row::compare("time offsets", clocks(&linux["timeOffsets"]), offsets(&kernel)));
    }
    Ok(rows)
}

/// `boottime 86400s 0ns, monotonic 0s 0ns`.
fn clocks(offsets: &Value) -> String {
    let one = |clock: &str| {
        let number = |field: &str| offsets[clock][field].as_i64().unwrap_or_default();
        format!("{clock} {}s {}ns", number("secs"), number("nanosecs"))
    };
    format!("{}, {}", one("boottime"), one("monotonic"))
}

/// The same of /proc/PID/timens_offsets.
fn offsets(text: &str) -> String {
    let mut all: Vec<String> = text
        .lines()
        .filter_map(|line| match line.split_whitespace().collect::<Vec<_>>().as_slice() {
            [clock, seconds, nanos] => Some(format!("{clock} {seconds}s {nanos}ns")),
            _ => None,
        })
        .collect();
    all.sort();
    all.join(", ")
}

/// As resolved in the container: the specification may only have a name.
fn identity(asked: &Asked, proc: &Proc) -> Vec<Row> {
    let Some(user) = asked.status.user.as_ref().and_then(|user| user.linux.as_ref()) else {
        return Vec::new();
    };
    let linux = &asked.spec["linux"];
    // The kernel shows them as the node has them.
    let (uids, gids) = (&linux["uidMappings"], &linux["gidMappings"]);
    let mut groups: Vec<String> =
        user.supplemental_groups.iter().map(|group| on_the_node(gids, *group).to_string()).collect();
    // The kernel keeps them sorted.
    groups.sort_by_key(|group| group.parse().unwrap_or(u64::MAX));
    let row = |what: &str, id: i64, maps: &Value, field: &str| {
        let ids: Vec<&str> = proc.status(field).split(' ').collect();
        let same = ids.windows(2).all(|pair| pair.first() == pair.last());
        // Real, effective, saved, file system.
        let kernel = if same { ids.first().copied().unwrap_or_default().to_owned() } else { ids.join(" ") };
        let on_the_node = on_the_node(maps, id);
        let row = Row::compare(what, on_the_node.to_string(), kernel);
        if on_the_node == id { row } else { row.detail(format!("{id} in the container")) }
    };
    vec![
        row("uid", user.uid, uids, "Uid"),
        row("gid", user.gid, gids, "Gid"),
        Row::compare("groups", groups.join(" "), proc.status("Groups")),
    ]
}

/// What an id of the container is on the node.
fn on_the_node(mappings: &Value, id: i64) -> i64 {
    let all = mappings.as_array().map(Vec::as_slice).unwrap_or_default();
    let number = |map: &Value, field: &str| map[field].as_i64().unwrap_or_default();
    let found = all.iter().find_map(|map| {
        let offset = id.checked_sub(number(map, "containerID"))?;
        (0..number(map, "size")).contains(&offset).then_some(number(map, "hostID").checked_add(offset)?)
    });
    found.unwrap_or(id)
}

/// The five sets of capabilities(7).
#[derive(Debug, Clone, Copy, PartialEq)]
struct Sets {
    bounding: CapabilitySet,
    permitted: CapabilitySet,
    effective: CapabilitySet,
    inheritable: CapabilitySet,
    ambient: CapabilitySet,
}

fn capabilities(asked: &Asked, proc: &Proc) -> anyhow::Result<Vec<Row>> {
    let process = &asked.spec["process"];
    let uid = asked.status.user.as_ref().and_then(|user| user.linux.as_ref()).map_or(0, |user| user.uid);
    let before = Sets::of(&process["capabilities"]);
    let expected = if asked.waiting {
        before
    } else {
        before.after_execve(uid == 0, process["noNewPrivileges"] == true)
    };
    let kernel = |field| proc.mask(field).map(CapabilitySet::from_bits_retain);
    // A kernel may not know all that were asked for.
    let known =
        CapabilitySet::from_bits_retain(last_capability().map_or(u64::MAX, |last| u64::MAX >> (63 - last)));
    let row = |what: &str, asked: CapabilitySet, kernel: CapabilitySet| {
        let (asked, all) = (asked & known, known);
        Row::compare(format!("capabilities: {what}"), names(asked, all), names(kernel, all))
            .detail(change(asked, kernel))
    };
    Ok(vec![
        row("bounding", expected.bounding, kernel("CapBnd")?),
        row("permitted", expected.permitted, kernel("CapPrm")?),
        row("effective", expected.effective, kernel("CapEff")?),
        row("inheritable", expected.inheritable, kernel("CapInh")?),
        row("ambient", expected.ambient, kernel("CapAmb")?),
    ])
}

impl Sets {
    fn of(spec: &Value) -> Self {
        let set = |name: &str| {
            let names = spec[name].as_array().map(Vec::as_slice).unwrap_or_default();
            names
                .iter()
                .filter_map(Value::as_str)
                .map(named)
                .fold(CapabilitySet::empty(), |all, one| all | one)
        };
        Self {
            bounding: set("bounding"),
            permitted: set("permitted"),
            effective: set("effective"),
            inheritable: set("inheritable"),
            ambient: set("ambient"),
        }
    }

    /// What execve(2) of a plain program leaves (capabilities(7), "Transformation of capabilities during execve()").
    fn after_execve(self, root: bool, no_new_privs: bool) -> Self {
        let mut permitted = self.ambient;
        if root {
            permitted = self.inheritable | self.bounding;
            if no_new_privs {
                permitted &= self.permitted;
            }
        }
        Self { permitted, effective: permitted, ..self }
    }
}

/// `CAP_CHOWN`; nothing where the name is unknown.
fn named(name: &str) -> CapabilitySet {
    let name = name.strip_prefix("CAP_").unwrap_or(name);
    CapabilitySet::all()
        .iter_names()
        .find(|(known, _)| *known == name)
        .map_or(CapabilitySet::empty(), |(_, set)| set)
}

fn names(set: CapabilitySet, all: CapabilitySet) -> String {
    if set.is_empty() {
        return "none".to_owned();
    }
    if set.contains(all & CapabilitySet::all()) {
        return "all".to_owned();
    }
    let mut names: Vec<String> = set.iter_names().map(|(name, _)| name.to_lowercase()).collect();
    let rest = set.difference(CapabilitySet::all());
    if !rest.is_empty() {
        names.push(format!("{:#x}", rest.bits()));
    }
    names.join(" ")
}

/// `+sys_admin -chown`.
fn change(asked: CapabilitySet, kernel: CapabilitySet) -> String {
    let list = |sign: char, set: CapabilitySet| {
        set.iter_names().map(|(name, _)| format!("{sign}{}", name.to_lowercase())).collect::<Vec<_>>()
    };
    [list('+', kernel.difference(asked)), list('-', asked.difference(kernel))].concat().join(" ")
}

fn last_capability() -> Option<u32> {
    std::fs::read_to_string("/proc/sys/kernel/cap_last_cap")
        .ok()?
        .trim()
        .parse()
        .ok()
        .filter(|last| *last < 64)
}

/// AppArmor profile or SELinux label.
fn label(process: &Value, proc: &Proc, waiting: bool) -> Row {
    let asked = [&process["apparmorProfile"], &process["selinuxLabel"]]
        .into_iter()
        .filter_map(Value::as_str)
        .find(|label| !label.is_empty());
    let kernel = proc.text("attr/current").ok().filter(|label| !label.is_empty());
    // AppArmor: "cri-default (enforce)".
    let name = |label: &str| label.split(" (").next().unwrap_or_default().to_owned();
    match (asked, kernel) {
        (None, None) => Row::tell("LSM label", "none").detail("no AppArmor or SELinux on this host"),
        (None, Some(kernel)) => Row::tell("LSM label", kernel),
        (Some(asked), None) => Row::compare("LSM label", asked, "none"),
        (Some(asked), Some(kernel)) if waiting => {
            Row::tell("LSM label", kernel).detail(format!("{asked} at its start"))
        }
        (Some(asked), Some(kernel)) => {
            let differs = asked != name(&kernel);
            Row::compare("LSM label", asked, kernel).differs(differs)
        }
    }
}

/// Container id, host id, length; of several separated by commas.
fn map(mappings: &Value) -> String {
    let all = mappings.as_array().map(Vec::as_slice).unwrap_or_default();
    if all.is_empty() {
        return NODE_MAP.to_owned();
    }
    let one = |map: &Value| {
        let number = |field: &str| map[field].as_u64().unwrap_or_default();
        format!("{} {} {}", number("containerID"), number("hostID"), number("size"))
    };
    all.iter().map(one).collect::<Vec<_>>().join(", ")
}

fn lines(text: &str) -> String {
    let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    text.lines().map(words).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn capabilities_over_execve() {
        let names = json!(["CAP_CHOWN", "CAP_KILL"]);
        let sets = Sets::of(
            &json!({ "bounding": names, "permitted": ["CAP_KILL"], "effective": ["CAP_KILL"], "ambient": [] }),
        );
        let both = CapabilitySet::CHOWN | CapabilitySet::KILL;
        assert_eq!((sets.bounding, sets.permitted), (both, CapabilitySet::KILL));
        // Root gains what the bounding set allows, unless that is forbidden.
        assert_eq!(sets.after_execve(true, false).effective, both);
        assert_eq!(sets.after_execve(true, true).effective, CapabilitySet::KILL);
        assert!(sets.after_execve(false, false).permitted.is_empty());
        let ambient = Sets { ambient: CapabilitySet::KILL, ..sets };
        assert_eq!(ambient.after_execve(false, false).effective, CapabilitySet::KILL);
    }

    #[test]
    fn capabilities_in_words() {
        let all = CapabilitySet::all();
        assert_eq!(names(all, all), "all");
        assert_eq!(names(CapabilitySet::empty(), all), "none");
        assert_eq!(names(CapabilitySet::CHOWN | CapabilitySet::SYS_ADMIN, all), "chown sys_admin");
        assert_eq!(change(CapabilitySet::CHOWN, CapabilitySet::SYS_ADMIN), "+sys_admin -chown");
        assert_eq!(named("CAP_NO_SUCH"), CapabilitySet::empty());
    }

    #[test]
    fn user_maps() {
        assert_eq!(map(&Value::Null), NODE_MAP);
        assert_eq!(lines("         0          0 4294967295"), NODE_MAP);
        let mapped = json!([{ "containerID": 0, "hostID": 65536, "size": 10 }]);
        assert_eq!(map(&mapped), lines("0 65536 10\n"));
    }
}

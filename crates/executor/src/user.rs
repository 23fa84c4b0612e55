//! Users and groups, looked up in the container's own files.
//!
//! The files come from the image and are hostile: regular files only, with a limit on size. A
//! string of digits is never a name (CVE-2026-46680).

use std::path::Path;

use stave_paths::Root;
use stave_supervisor_proto::v1::User;
use stave_supervisor_proto::v1::failure::Kind;

use crate::error::{Error, Result};

const STAGE: &str = "user";
/// Larger passwd or group files are refused.
pub(crate) const MAX_FILE: u64 = 10 << 20;
/// Ids above wrap to negative numbers in other programs (CVE-2024-40635).
const MAX_ID: u32 = i32::MAX as u32;
/// Groups of a process. (The kernel's NGROUPS_MAX is 65536.)
pub(crate) const MAX_GROUPS: usize = 8192;
/// As the longest name in utmp, doubled twice.
const MAX_NAME: usize = 128;

/// A user as resolved in the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// All groups, `gid` included, sorted.
    pub(crate) groups: Vec<u32>,
    pub(crate) home: String,
}

#[derive(Debug, PartialEq, Eq)]
struct Entry {
    name: String,
    uid: u32,
    gid: u32,
    home: String,
}

/// Resolves `user` with the container's /etc/passwd and /etc/group.
pub(crate) fn resolve(root: &Root, user: &User) -> Result<Identity> {
    let passwd = read(root, "/etc/passwd")?;
    let needs_group = user.merge_image_groups || (user.gid.is_none() && !user.group_name.is_empty());
    let group = if needs_group { read(root, "/etc/group")? } else { Vec::new() };
    resolve_in(user, &passwd, &group)
}

/// A passwd or group file; one that is missing is empty.
pub(crate) fn read(root: &Root, path: &str) -> Result<Vec<u8>> {
    match root.read_limited(Path::new(path), MAX_FILE) {
        Ok(content) => Ok(content),
        Err(e) if e.is_not_found() => Ok(Vec::new()),
        Err(e) => Err(Error::path(STAGE, path, &e)),
    }
}

pub(crate) fn resolve_in(user: &User, passwd: &[u8], group: &[u8]) -> Result<Identity> {
    let entry = if user.name.is_empty() {
        find_user(passwd, |e| e.uid == user.uid)
    } else {
        check_name("user", &user.name)?;
        let entry = find_user(passwd, |e| e.name == user.name);
        Some(entry.ok_or_else(|| Error::invalid(STAGE, format!("no user {:?} in /etc/passwd", user.name)))?)
    };
    let uid = check_id("uid", entry.as_ref().map_or(user.uid, |e| e.uid))?;
    let gid = if let Some(gid) = user.gid {
        gid
    } else if user.group_name.is_empty() {
        entry.as_ref().map_or(0, |e| e.gid)
    } else {
        check_name("group", &user.group_name)?;
        groups_in(group)
            .find(|g| g.name == user.group_name)
            .map(|g| g.gid)
            .ok_or_else(|| Error::invalid(STAGE, format!("no group {:?} in /etc/group", user.group_name)))?
    };
    let gid = check_id("gid", gid)?;

    let mut groups = vec![gid];
    for supplemental in &user.supplemental_groups {
        groups.push(check_id("supplemental group", *supplemental)?);
    }
    if let (true, Some(entry)) = (user.merge_image_groups, &entry) {
        for group in groups_in(group).filter(|g| g.members.split(',').any(|m| m == entry.name)) {
            groups.push(check_id("group of the image", group.gid)?);
            if groups.len() > 2 * MAX_GROUPS {
                break;
            }
        }
    }
    groups.sort_unstable();
    groups.dedup();
    if groups.len() > MAX_GROUPS {
        let message = format!("user {uid} is in more than {MAX_GROUPS} groups");
        return Err(Error::new(STAGE, Kind::InvalidArgument, message));
    }
    let home = entry.map(|e| e.home).filter(|h| h.starts_with('/') && !h.contains(char::is_control));
    let home = home.unwrap_or_else(|| if uid == 0 { "/root" } else { "/" }.to_owned());
    Ok(Identity { uid, gid, groups, home })
}

fn check_id(what: &str, id: u32) -> Result<u32> {
    if id > MAX_ID {
        return Err(Error::invalid(STAGE, format!("{what} {id} is above {MAX_ID}")));
    }
    Ok(id)
}

fn check_name(what: &str, name: &str) -> Result<()> {
    let reason = if name.bytes().all(|b| b.is_ascii_digit()) {
        "a number is not a name"
    } else if name.contains([':', ',', '/'])
        || name.contains(char::is_control)
        || name.contains(char::is_whitespace)
    {
        "invalid character"
    } else if name.starts_with(['-', '+']) {
        "a name does not start with - or +"
    } else if name.len() > MAX_NAME {
        "too long"
    } else {
        return Ok(());
    };
    Err(Error::invalid(STAGE, format!("{what} {name:?}: {reason}")))
}

fn find_user(passwd: &[u8], wanted: impl Fn(&Entry) -> bool) -> Option<Entry> {
    lines(passwd).find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?.to_owned();
        let (uid, gid) = (fields.nth(1)?.parse().ok()?, fields.next()?.parse().ok()?);
        let home = fields.nth(1).unwrap_or_default().to_owned();
        Some(Entry { name, uid, gid, home }).filter(&wanted)
    })
}

struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

fn groups_in(group: &[u8]) -> impl Iterator<Item = Group<'_>> {
    lines(group).filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let gid = fields.nth(1)?.parse().ok()?;
        Some(Group { name, gid, members: fields.next().unwrap_or_default() })
    })
}

/// Lines that are UTF-8; comments and others can't name a user.
fn lines(content: &[u8]) -> impl Iterator<Item = &str> {
    content
        .split(|b| *b == b'\n')
        .filter_map(|line| std::str::from_utf8(line).ok())
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] = b"# users\nroot:x:0:0:root:/root:/bin/sh\nalice:x:1000:1001::/home/alice:\n\
        1002:x:0:0::/evil:\nbad\xff:x:0:0::/:\nbroken:x:no:0\nbig:x:2147483648:0::/:\nlf:x:7:7::relative:\n";
    const GROUP: &[u8] = b"root:x:0:\nstaff:x:50:alice,bob\nextra:x:60:bob,alice\n77:x:0:alice\n";

    fn user(name: &str) -> User {
        User { name: name.to_owned(), ..User::default() }
    }

    fn ids(user: &User) -> std::result::Result<(u32, u32), String> {
        resolve_in(user, PASSWD, GROUP).map(|i| (i.uid, i.gid)).map_err(|e| e.message)
    }

    #[test]
    fn every_form_of_a_user() {
        let table = [
            (User { uid: 1, ..User::default() }, Ok((1, 0))),
            (User { uid: 1, gid: Some(2), ..User::default() }, Ok((1, 2))),
            (User { uid: 1000, ..User::default() }, Ok((1000, 1001))),
            (User { uid: 1000, gid: Some(0), ..User::default() }, Ok((1000, 0))),
            (user(""), Ok((0, 0))),
            (user("alice"), Ok((1000, 1001))),
            (User { group_name: "staff".into(), ..user("alice") }, Ok((1000, 50))),
            (User { group_name: "staff".into(), gid: Some(9), ..user("alice") }, Ok((1000, 9))),
            (User { group_name: "staff".into(), ..user("") }, Ok((0, 50))),
            // The numeric uid 1002 does not match the *name* "1002".
            (User { uid: 1002, ..User::default() }, Ok((1002, 0))),
        ];
        for (user, wanted) in table {
            assert_eq!(ids(&user), wanted, "{user:?}");
        }
        let refused = [
            (user("1002"), "a number is not a name"),
            (user("4294967296"), "a number is not a name"),
            (user("-1"), "start with -"),
            (user(":0"), "invalid character"),
            (user("alice:staff"), "invalid character"),
            (user("root\nx"), "invalid character"),
            (user("nobody"), "no user \"nobody\" in /etc/passwd"),
            (user("big"), "uid 2147483648 is above"),
            (User { uid: 1 << 31, ..User::default() }, "uid 2147483648 is above"),
            (User { gid: Some(u32::MAX), ..User::default() }, "gid 4294967295 is above"),
            (User { supplemental_groups: vec![1 << 31], ..User::default() }, "supplemental group"),
            (User { group_name: "77".into(), ..user("alice") }, "a number is not a name"),
            (User { group_name: "nogroup".into(), ..user("alice") }, "no group \"nogroup\""),
        ];
        for (user, wanted) in refused {
            let error = ids(&user).unwrap_err();
            assert!(error.contains(wanted), "{user:?}: {error}");
        }
    }

    #[test]
    fn groups_of_the_image_are_added_only_when_asked() {
        let strict = User { supplemental_groups: vec![1234, 5, 5], ..user("alice") };
        assert_eq!(resolve_in(&strict, PASSWD, GROUP).unwrap().groups, [5, 1001, 1234]);
        let merge = User { merge_image_groups: true, ..strict };
        assert_eq!(resolve_in(&merge, PASSWD, GROUP).unwrap().groups, [0, 5, 50, 60, 1001, 1234]);
        let by_uid = User { uid: 1000, name: String::new(), ..merge.clone() };
        assert_eq!(resolve_in(&by_uid, PASSWD, GROUP).unwrap().groups, [0, 5, 50, 60, 1001, 1234]);
        let unknown = User { uid: 4, name: String::new(), ..merge };
        assert_eq!(resolve_in(&unknown, PASSWD, GROUP).unwrap().groups, [0, 5, 1234]);
    }

    #[test]
    fn home() {
        let home = |user: &User| resolve_in(user, PASSWD, GROUP).unwrap().home;
        assert_eq!(home(&user("alice")), "/home/alice");
        assert_eq!(home(&User { uid: 7, ..User::default() }), "/");
        assert_eq!(home(&User { uid: 8, ..User::default() }), "/");
        assert_eq!(resolve_in(&user(""), b"", b"").unwrap().home, "/root");
    }

    #[test]
    fn too_many_groups() {
        let user = User { supplemental_groups: (1..=MAX_GROUPS as u32).collect(), ..User::default() };
        assert!(ids(&user).unwrap_err().contains("more than"));
    }

    #[test]
    fn hostile_files() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        let root = Root::open(dir.path()).unwrap();
        assert_eq!(resolve(&root, &user("")).unwrap().uid, 0);
        let passwd = dir.path().join("etc/passwd");
        std::os::unix::fs::symlink("/proc/self/status", &passwd).unwrap();
        assert!(resolve(&root, &user("")).is_err());
        std::fs::remove_file(&passwd).unwrap();
        nix::unistd::mkfifo(&passwd, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(resolve(&root, &user("")).is_err());
        std::fs::remove_file(&passwd).unwrap();
        std::fs::File::create(&passwd).unwrap().set_len(MAX_FILE + 1).unwrap();
        assert!(resolve(&root, &user("")).is_err());
    }
}

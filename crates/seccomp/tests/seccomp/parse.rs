//! Reading of profiles: what is wrong, and where.

use std::time::Duration;

use stave_seccomp::{Action, Operator, PROFILE_MAX, SeccompError, parse, read};

fn error(json: &str) -> (usize, usize, String) {
    match parse(json, "/p.json").unwrap_err() {
        SeccompError::Syntax { source_name, line, column, message } => {
            assert_eq!(source_name, "/p.json");
            (line, column, message)
        }
        other => panic!("{other}"),
    }
}

#[test]
fn all_of_a_profile() {
    let profile = parse(
        r#"{
            "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38, "unknownKey": {"a": []},
            "architectures": [], "flags": null, "listenerPath": "", "listenerMetadata": null,
            "syscalls": [
                {"name": "clone", "names": [], "action": "SCMP_ACT_ALLOW", "comment": "x", "args": [
                    {"index": 1, "value": 2114060288, "valueTwo": 3, "op": "SCMP_CMP_MASKED_EQ"}], "includes": {"caps": ["CAP_KILL"]}},
                {"names": ["a", "b"], "name": "", "action": "SCMP_ACT_TRACE", "errnoRet": 7, "args": null,
                    "excludes": {"minKernel": "4.8", "arches": ["x"], "caps": null}}
            ]
        }"#,
        "p",
    )
    .unwrap();
    assert_eq!(profile.default_action, Action::Errno(38));
    let [clone, both] = profile.rules.as_slice() else { panic!("{profile:?}") };
    assert_eq!(
        (clone.names.as_slice(), clone.action, clone.includes.caps),
        (["clone".to_owned()].as_slice(), Action::Allow, 1 << 5)
    );
    let arg = clone.args[0];
    assert_eq!(
        (arg.index, arg.operator, arg.value, arg.value_two),
        (1, Operator::MaskedEqual, 0x7e02_0000, 3)
    );
    assert_eq!(
        (both.names.len(), both.action, both.excludes.min_kernel),
        (2, Action::Trace(7), Some((4, 8)))
    );
}

#[test]
fn what_is_wrong_and_where() {
    let rule =
        |rule: &str| format!("{{\"defaultAction\": \"SCMP_ACT_ALLOW\",\n \"syscalls\": [\n{rule}\n]}}");
    let table = [
        (String::new(), 1, "EOF while parsing"),
        ("[1]".to_owned(), 1, "invalid type"),
        ("{\n}".to_owned(), 2, "missing field `defaultAction`"),
        ("{\"defaultAction\":\n\n  \"SCMP_ACT_ALOW\"}".to_owned(), 3, "unknown action \"SCMP_ACT_ALOW\""),
        ("{\"defaultAction\": \"SCMP_ACT_ALLOW\",\n\"flags\": [1]}".to_owned(), 2, "expected the name of the flag"),
        ("{\"defaultAction\": \"SCMP_ACT_ALLOW\",\n\"flags\": [\"X\"]}".to_owned(), 2, "unknown flag \"X\""),
        (
            "{\"defaultAction\": \"SCMP_ACT_ALLOW\",\n\"architectures\": [\n\"SCMP_ARCH_VAX\"]}".to_owned(),
            3,
            "unknown architecture \"SCMP_ARCH_VAX\"",
        ),
        (
            "{\"defaultAction\": \"SCMP_ACT_ALLOW\", \"architectures\": [\"SCMP_ARCH_X86\"],\n\"archMap\": [{\"architecture\": \"SCMP_ARCH_X86\"}]}".to_owned(),
            2,
            "exclude each other",
        ),
        ("{\"defaultAction\": \"SCMP_ACT_ALLOW\", \"defaultErrnoRet\": 1}".to_owned(), 1, "does not go with the action Allow"),
        ("{\"defaultAction\": \"SCMP_ACT_ERRNO\", \"defaultErrnoRet\": 4096}".to_owned(), 1, "4096 is above 4095"),
        ("{\"defaultAction\": \"SCMP_ACT_NOTIFY\"}".to_owned(), 1, "not built yet"),
        ("{\"defaultAction\": \"SCMP_ACT_ALLOW\",\n\"listenerPath\": \"/run/x\"}".to_owned(), 2, "not built yet"),
        ("{\"defaultAction\": \"SCMP_ACT_ALLOW\"} x".to_owned(), 1, "trailing characters"),
        ("{\"defaultAction\": \"SCMP_ACT_ALLOW\", \"defaultAction\": \"SCMP_ACT_LOG\"}".to_owned(), 1, "duplicate field"),
        (rule("{\"action\": \"SCMP_ACT_ALLOW\"}"), 3, "a rule needs names"),
        (rule("{\"names\": [\"a\"]}"), 3, "missing field `action`"),
        (rule("{\"names\": [\"a\"], \"name\": \"b\", \"action\": \"SCMP_ACT_ALLOW\"}"), 3, "exclude each other"),
        (rule("{\"names\": [\"a\"],\n\"action\": \"SCMP_ACT_ALLOW\",\n\"args\": [{\"index\": 0, \"value\": 1, \"op\": \"==\"}]}"), 5, "unknown operator \"==\""),
        (rule("{\"names\": [\"a\"], \"action\": \"SCMP_ACT_ALLOW\",\n\"args\": [{\"index\": 6, \"value\": 1, \"op\": \"SCMP_CMP_EQ\"}]}"), 4, "arguments 0 to 5"),
        (rule("{\"names\": [\"a\"], \"action\": \"SCMP_ACT_ALLOW\",\n\"args\": [{\"index\": 0, \"value\": -1, \"op\": \"SCMP_CMP_EQ\"}]}"), 4, "expected u64"),
        (rule("{\"names\": [\"a\"], \"action\": \"SCMP_ACT_TRAP\",\n\"errnoRet\": 5}"), 4, "does not go with the action Trap"),
        (rule("{\"names\": [\"a\"], \"action\": \"SCMP_ACT_ERRNO\", \"errnoRet\": 70000}"), 3, "70000 is above 4095"),
        (rule("{\"names\": [\"a\"], \"action\": \"SCMP_ACT_ALLOW\",\n\"includes\": {\n\"caps\": [\"CAP_FLY\"]}}"), 5, "unknown capability \"CAP_FLY\""),
        (rule("{\"names\": [\"a\"], \"action\": \"SCMP_ACT_ALLOW\",\n\"includes\": {\"minKernel\": \"new\"}}"), 4, "is not a version"),
    ];
    for (json, line, wanted) in table {
        let (got, column, message) = error(&json);
        assert_eq!(got, line, "{json}: {message}");
        assert!(message.contains(wanted) && !message.contains("at line"), "{json}: {message}");
        let width = json.lines().nth(line - 1).unwrap_or_default().len();
        assert!(column <= width + 1, "{json}: column {column}");
    }
    let many: Vec<String> =
        (0..65).map(|i| format!(r#"{{"index": 0, "value": {i}, "op": "SCMP_CMP_EQ"}}"#)).collect();
    let json = rule(&format!(
        "{{\"names\": [\"a\"], \"action\": \"SCMP_ACT_TRAP\", \"args\": [{}]}}",
        many.join(",")
    ));
    assert!(error(&json).2.contains("at most 64 args"));
    // Unknown values are skipped without recursion.
    let deep = format!("{{\"x\": {}", "[".repeat(1_000_000));
    assert!(error(&deep).2.contains("EOF while parsing"));
    let shown = parse("{\n  \"defaultAction\": 1}", "/etc/p.json").unwrap_err().to_string();
    assert!(shown.starts_with("/etc/p.json: line 2, column 20: "), "{shown}");
}

#[test]
fn files_that_are_no_profiles() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.json");
    assert!(read(&path).unwrap_err().is_not_found());
    assert!(!read(dir.path()).unwrap_err().is_not_found());

    std::fs::write(&path, vec![b' '; PROFILE_MAX as usize]).unwrap();
    assert_eq!(read(&path).unwrap().len() as u64, PROFILE_MAX);
    std::fs::write(&path, vec![b' '; PROFILE_MAX as usize + 1]).unwrap();
    assert!(read(&path).unwrap_err().to_string().contains("larger than 1048576 bytes"));
    assert!(read(std::path::Path::new("/dev/zero")).unwrap_err().to_string().contains("not a regular file"));

    std::fs::write(&path, b"{\n  \"a\xff\"}").unwrap();
    assert!(read(&path).unwrap_err().to_string().ends_with("line 2, column 5: is not UTF-8"));

    // Nobody writes to it: reading must not wait.
    let fifo = dir.path().join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let (done, wait) = std::sync::mpsc::channel();
    std::thread::spawn(move || done.send(read(&fifo).unwrap_err().to_string()));
    assert!(wait.recv_timeout(Duration::from_secs(10)).unwrap().contains("not a regular file"));
}

//! Our definition of the CRI against those of others: k8s-cri (Kubernetes 1.32) for all that it has, and
//! k8s.io/cri-api of Kubernetes 1.36 for all of it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use prost::Message as _;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet,
};

fn ours() -> FileDescriptorProto {
    let mut set = FileDescriptorSet::decode(stave_cri_proto::DESCRIPTORS).unwrap();
    assert_eq!(set.file.len(), 1, "the definition is one file");
    set.file.remove(0)
}

/// All that the wire and the JSON form depend on, one line each: what it is, and its facts.
fn facts(file: &FileDescriptorProto) -> BTreeMap<String, String> {
    let mut facts = BTreeMap::new();
    facts.insert(
        "file".to_owned(),
        format!(
            "package {} syntax {} imports {:?} extensions {}",
            file.package(),
            file.syntax(),
            file.dependency,
            file.extension.len()
        ),
    );
    for service in &file.service {
        facts.insert(format!("service {}", service.name()), format!("{} methods", service.method.len()));
        for method in &service.method {
            facts.insert(
                format!("rpc {}.{}", service.name(), method.name()),
                format!(
                    "({}{}) returns ({}{})",
                    if method.client_streaming() { "stream " } else { "" },
                    method.input_type(),
                    if method.server_streaming() { "stream " } else { "" },
                    method.output_type()
                ),
            );
        }
    }
    for message in &file.message_type {
        message_facts(message, "", &mut facts);
    }
    for definition in &file.enum_type {
        enum_facts(definition, "", &mut facts);
    }
    facts
}

fn message_facts(message: &DescriptorProto, scope: &str, facts: &mut BTreeMap<String, String>) {
    let name = format!("{scope}{}", message.name());
    let ranges: Vec<_> = message.reserved_range.iter().map(|range| (range.start(), range.end())).collect();
    let oneofs: Vec<_> = message.oneof_decl.iter().map(|oneof| oneof.name()).collect();
    facts.insert(
        format!("message {name}"),
        format!(
            "map entry {} reserved {ranges:?} {:?} oneofs {oneofs:?} extensions {} {}",
            message.options.as_ref().is_some_and(|options| options.map_entry()),
            message.reserved_name,
            message.extension_range.len(),
            message.extension.len()
        ),
    );
    for field in &message.field {
        facts.insert(format!("field {name}.{}", field.name()), field_facts(field, message));
    }
    let scope = format!("{name}.");
    for nested in &message.nested_type {
        message_facts(nested, &scope, facts);
    }
    for nested in &message.enum_type {
        enum_facts(nested, &scope, facts);
    }
}

fn field_facts(field: &FieldDescriptorProto, message: &DescriptorProto) -> String {
    let oneof = field
        .oneof_index
        .map(|index| message.oneof_decl[usize::try_from(index).unwrap()].name().to_owned())
        .unwrap_or_default();
    let options = field.options.clone().unwrap_or_default();
    format!(
        "{} {} {} = {} json {} oneof {oneof:?} optional {} default {:?} packed {:?} deprecated {}",
        Label::try_from(field.label.unwrap()).unwrap().as_str_name(),
        Type::try_from(field.r#type.unwrap()).unwrap().as_str_name(),
        field.type_name(),
        field.number(),
        field.json_name(),
        field.proto3_optional(),
        field.default_value(),
        options.packed,
        options.deprecated(),
    )
}

fn enum_facts(definition: &EnumDescriptorProto, scope: &str, facts: &mut BTreeMap<String, String>) {
    let name = format!("{scope}{}", definition.name());
    let ranges: Vec<_> = definition.reserved_range.iter().map(|range| (range.start(), range.end())).collect();
    facts.insert(
        format!("enum {name}"),
        format!(
            "alias {} reserved {ranges:?} {:?}",
            definition.options.as_ref().is_some_and(|options| options.allow_alias()),
            definition.reserved_name
        ),
    );
    for value in &definition.value {
        facts.insert(format!("value {name}.{}", value.name()), value.number().to_string());
    }
}

/// What differs, one line each; `all` asks that ours has nothing that theirs lacks.
fn differences(ours: &FileDescriptorProto, theirs: &FileDescriptorProto, all: bool) -> Vec<String> {
    let (ours, theirs) = (facts(ours), facts(theirs));
    let mut differences = Vec::new();
    for (what, fact) in &theirs {
        match ours.get(what) {
            None => differences.push(format!("{what} is missing in ours: {fact}")),
            // Services grow; what they have is compared one by one.
            Some(_) if !all && what.starts_with("service ") => {}
            Some(our) if our != fact => differences.push(format!("{what}: ours {our}, theirs {fact}")),
            Some(_) => {}
        }
    }
    if all {
        let more = ours.iter().filter(|(what, _)| !theirs.contains_key(*what));
        differences.extend(more.map(|(what, fact)| format!("{what} is in ours only: {fact}")));
    }
    differences
}

#[test]
fn has_41_calls() {
    let ours = ours();
    let calls: BTreeMap<_, _> =
        ours.service.iter().map(|service| (service.name(), service.method.len())).collect();
    assert_eq!(calls, BTreeMap::from([("RuntimeService", 35), ("ImageService", 6)]));
}

#[test]
fn agrees_with_kubernetes_1_32() {
    let proto = k8s_cri().join("proto");
    let set = protox::compile(["v1.proto"], [&proto]).unwrap();
    let theirs = set.file.iter().find(|file| file.package() == "runtime.v1").unwrap();
    assert!(facts(theirs).len() > 500, "that is not the whole CRI");
    let differences = differences(&ours(), theirs, false);
    // Since Kubernetes 1.34 the value of an environment variable is bytes; on the wire that is the same.
    let [one] = differences.as_slice() else { panic!("one difference is known: {differences:#?}") };
    assert!(one.starts_with("field KeyValue.value: "), "{one}");
    assert_eq!(one.replace("TYPE_BYTES", "TYPE_STRING").matches("TYPE_STRING").count(), 2, "{one}");
}

#[test]
fn equals_kubernetes_1_36() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/go");
    let go = match Command::new("go").arg("version").stdout(Stdio::null()).status() {
        Err(err) if err.kind() == std::io::ErrorKind::NotFound => {
            // Not eprintln!: the harness would keep that to itself.
            let line = "\nSKIPPED: equals_kubernetes_1_36 needs Go, and there is no `go` in PATH. \
                        The definition was NOT compared with k8s.io/cri-api.\n";
            std::io::stderr().write_all(line.as_bytes()).unwrap();
            return;
        }
        _ => Command::new("go").args(["run", "-mod=readonly", "."]).current_dir(&dir).output().unwrap(),
    };
    assert!(go.status.success(), "go run in {}: {}", dir.display(), String::from_utf8_lossy(&go.stderr));
    let theirs = FileDescriptorProto::decode(go.stdout.as_slice()).unwrap();
    assert!(facts(&theirs).len() > 800, "that is not the whole CRI");
    let differences = differences(&ours(), &theirs, true);
    assert!(differences.is_empty(), "{differences:#?}");
}

/// A comparison that finds nothing proves nothing until it is known to find something.
#[test]
fn the_comparison_sees_each_kind_of_difference() {
    type Change = fn(&mut FileDescriptorProto);
    let changes: [(&str, Change); 12] = [
        ("message VersionRequest is missing", |file| drop(file.message_type.remove(0))),
        ("field VersionRequest.version: ", |file| file.message_type[0].field[0].number = Some(9)),
        ("field VersionRequest.version: ", |file| {
            file.message_type[0].field[0].set_type(Type::Bytes);
        }),
        ("field VersionRequest.version: ", |file| {
            file.message_type[0].field[0].set_label(Label::Repeated);
        }),
        ("field VersionRequest.version: ", |file| {
            file.message_type[0].field[0].json_name = Some("v".to_owned());
        }),
        ("field VersionRequest.version is missing", |file| {
            file.message_type[0].field[0].name = Some("v".to_owned());
        }),
        ("message VersionRequest: ", |file| {
            file.message_type[0].reserved_name.push("old".to_owned());
        }),
        ("rpc RuntimeService.Version is missing", |file| drop(file.service[0].method.remove(0))),
        ("rpc RuntimeService.Version: ", |file| {
            file.service[0].method[0].server_streaming = Some(true);
        }),
        ("rpc RuntimeService.Version: ", |file| {
            file.service[0].method[0].input_type = Some(".runtime.v1.StatusRequest".to_owned());
        }),
        ("value Protocol.TCP: ", |file| file.enum_type[0].value[0].number = Some(9)),
        ("enum Protocol is missing", |file| drop(file.enum_type.remove(0))),
    ];
    let theirs = ours();
    assert!(differences(&theirs, &theirs, true).is_empty());
    for (expected, change) in changes {
        let mut changed = theirs.clone();
        change(&mut changed);
        for all in [false, true] {
            let found = differences(&changed, &theirs, all);
            assert!(found.iter().any(|line| line.starts_with(expected)), "{expected}: {found:?}");
        }
    }
    // The other way round: more than theirs is a difference only where all is compared.
    let mut less = theirs.clone();
    less.message_type.remove(0);
    assert!(differences(&theirs, &less, false).is_empty());
    assert!(differences(&theirs, &less, true)[0].starts_with("field VersionRequest.version is in ours only"));
}

/// Where cargo has the source of k8s-cri, which the workspace's e2e tests depend on.
fn k8s_cri() -> PathBuf {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    // For this platform only: the whole lock file would have to be downloaded otherwise.
    let output = Command::new(cargo)
        .args(["metadata", "--format-version=1", "--filter-platform", env!("STAVE_TEST_TARGET")])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let package = metadata["packages"]
        .as_array()
        .unwrap()
        .iter()
        .find(|package| package["name"] == "k8s-cri")
        .expect("the workspace depends on k8s-cri");
    assert!(package["version"].as_str().unwrap().starts_with("0.11."), "0.11 is Kubernetes 1.32");
    Path::new(package["manifest_path"].as_str().unwrap()).parent().unwrap().to_owned()
}

//! What files, drop-ins and the command line make of the configuration, and what errors say.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};

use stave_config::{
    CgroupDriver, Config, ConfigError, LogFormat, LogLevel, NetworkMode, Overrides, Runtime, RuntimeKind,
    load,
};
use tempfile::TempDir;

struct Etc(TempDir);

impl Etc {
    fn new(config: &str) -> Etc {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.toml"), config).unwrap();
        Etc(dir)
    }

    fn file(&self) -> PathBuf {
        self.0.path().join("config.toml")
    }

    fn drop_in(self, name: &str, text: &str) -> Etc {
        let dir = self.0.path().join("conf.d");
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join(name), text).unwrap();
        self
    }

    fn load(&self) -> Result<Config, ConfigError> {
        load(Some(&self.file()))
    }
}

/// The error of this file, with the directory taken out of it.
fn error(text: &str) -> String {
    let etc = Etc::new(text);
    let err = etc.load().expect_err(text).to_string();
    err.replace(&format!("{}/", etc.0.path().display()), "")
}

#[test]
fn empty_file_gives_the_defaults() {
    assert_eq!(Etc::new("").load().unwrap(), Config::default());
    assert_eq!(Config::default().network.mode, NetworkMode::Cni, "never the built-in network by accident");
}

#[test]
fn named_file_must_exist() {
    let etc = Etc::new("");
    let missing = etc.0.path().join("other.toml");
    let err = load(Some(&missing)).unwrap_err();
    assert!(matches!(err, ConfigError::Read { .. }), "{err}");
    assert!(err.to_string().contains("other.toml"), "{err}");
}

#[test]
fn all_keys_are_read() {
    let config = Etc::new(
        r#"
        root = "/data/stave/"
        state = "/run/s"
        listen = "/run/s/s.sock"
        default_runtime = "runc"
        log = { level = "debug", format = "json" }
        network.mode = "bridge"
        network.bridge = { name = "br-1", subnets = ["10.1.0.0/16", "fd00::/64"] }
        [cgroup]
        driver = "systemd"
        parent = "a-b.slice"
        [network.cni]
        conf_dir = "/c"
        bin_dirs = ["/b"]
        conf_template = "/t"
        netns_dir = "/n"
        timeout = 5
        [registries]
        config_dir = "/r"
        [streaming]
        address = "::1"
        port = 0xffff
        [metrics]
        address = "[::1]:9095"
        [nri]
        enable = true
        socket = "/n"
        [runtimes.runc]
        type = "oci"
        path = "/usr/bin/runc"
        root = "/run/runc"
        args = ["--debug", "--criu=/x"]
        timeout = 50
        [runtimes.own]
        type = "builtin"
        pids_limit = 100
        "#,
    )
    .load()
    .unwrap();
    assert_eq!(config.root, Path::new("/data/stave"));
    assert_eq!(config.state, Path::new("/run/s"));
    assert_eq!(config.listen, Path::new("/run/s/s.sock"));
    assert_eq!((config.log.level, config.log.format), (LogLevel::Debug, LogFormat::Json));
    assert_eq!((config.cgroup.driver, config.cgroup.parent.as_str()), (CgroupDriver::Systemd, "a-b.slice"));
    assert_eq!(config.network.mode, NetworkMode::Bridge);
    assert_eq!(config.network.bridge.name, "br-1");
    let subnets: Vec<_> = config.network.bridge.subnets.iter().map(|subnet| subnet.to_string()).collect();
    assert_eq!(subnets, ["10.1.0.0/16", "fd00::/64"]);
    assert_eq!(config.network.cni.conf_dir, Path::new("/c"));
    assert_eq!(config.network.cni.bin_dirs, [Path::new("/b")]);
    assert_eq!(config.network.cni.conf_template.as_deref(), Some(Path::new("/t")));
    assert_eq!((config.network.cni.netns_dir.as_path(), config.network.cni.timeout), (Path::new("/n"), 5));
    assert_eq!(config.registries.config_dir, Path::new("/r"));
    assert_eq!((config.streaming.address.to_string().as_str(), config.streaming.port), ("::1", 65535));
    assert_eq!(config.metrics.address, Some("[::1]:9095".parse().unwrap()));
    assert_eq!((config.nri.enable, config.nri.socket.as_path()), (true, Path::new("/n")));
    let oci = Runtime {
        path: Some("/usr/bin/runc".into()),
        root: Some("/run/runc".into()),
        args: vec!["--debug".into(), "--criu=/x".into()],
        timeout: Some(50),
        ..Runtime::new(RuntimeKind::Oci)
    };
    let own = Runtime { pids_limit: Some(100), ..Runtime::new(RuntimeKind::Builtin) };
    assert_eq!(config.default_runtime, "runc");
    assert_eq!(config.runtimes.into_iter().collect::<Vec<_>>(), [("own".into(), own), ("runc".into(), oci)]);
}

#[test]
fn drop_ins_merge_key_by_key_in_order() {
    let config = Etc::new("[network.bridge]\nname = \"one\"\nsubnets = [\"10.1.0.0/16\", \"fd00::/64\"]\n")
        .drop_in("20.toml", "[network.bridge]\nname = \"three\"\n[runtimes.runc]\npath = \"/bin/runc\"\n")
        .drop_in("10.toml", "[network.bridge]\nname = \"two\"\nsubnets = [\"10.2.0.0/16\"]\n")
        .drop_in("15.toml", "[runtimes.runc]\ntype = \"oci\"\npath = \"/bin/false\"\n")
        .drop_in(".99.toml", "no TOML")
        .drop_in("99.toml~", "no TOML")
        .load()
        .unwrap();
    assert_eq!(config.network.bridge.name, "three");
    assert_eq!(config.network.bridge.subnets.len(), 1, "an array is replaced as a whole");
    assert_eq!(config.runtimes["runc"].path.as_deref(), Some(Path::new("/bin/runc")));
}

#[test]
fn an_error_names_the_drop_in() {
    let err = Etc::new("").drop_in("10.toml", "\n[log]\nlevel = \"loud\"\n").load().unwrap_err().to_string();
    assert!(
        err.ends_with(
            r#"/conf.d/10.toml:3: log.level = "loud" is none of "error", "warn", "info", "debug", "trace""#
        ),
        "{err}"
    );
}

#[test]
fn unknown_keys_are_errors() {
    for (text, expected) in [
        (
            "rot = 1",
            "config.toml:1: unknown key rot; the top level has root, state, listen, default_runtime, log,",
        ),
        (
            "\n[network.bridge]\nmtu = 1",
            "config.toml:3: unknown key network.bridge.mtu; [network.bridge] has name, subnets",
        ),
        ("network.bridge.mtu = 1", "unknown key network.bridge.mtu; [network.bridge] has name, subnets"),
        ("[networks]\nmode = 1", "unknown key networks; the top level has"),
        ("[network]\nmod = 1", "unknown key network.mod; [network] has mode, bridge, cni"),
        (
            "[runtimes.a]\ntype = \"oci\"\narg = 1",
            "config.toml:3: unknown key runtimes.a.arg; [runtimes.a] has type, path, root, args, timeout, pids_limit",
        ),
        ("\"a\\nb\" = 1", r#"unknown key "a\nb"; "#),
        ("\"log.level\" = \"info\"", r#"unknown key "log.level"; "#),
        (
            "[runtimes.\"A b\"]\ntype = \"builtin\"",
            r#"unknown key runtimes."A b"; it can't be a runtime handler"#,
        ),
    ] {
        let err = error(text);
        assert!(err.contains(expected), "{text}\n gave {err}");
    }
}

#[test]
fn bad_values_name_key_value_file_and_line() {
    let long = "x".repeat(107);
    for (text, expected) in [
        ("root = 1", "config.toml:1: root = 1 is of type integer, not a string"),
        ("root = \"var\"", "config.toml:1: root = \"var\" is no absolute path"),
        ("root = \"/a/../b\"", "has \".\" or \"..\" in it"),
        ("root = \"/a/./b\"", "has \".\" or \"..\" in it"),
        ("root = \"//\"", "is the root directory"),
        ("root = \"/a\\u0000b\"", "has control characters"),
        (
            "state = \"/var/lib/stave\"",
            "config.toml:1: state = \"/var/lib/stave\" is the root directory of Stave too",
        ),
        ("root = \"/run/stave\"", "is the root directory of Stave too"),
        (&format!("listen = \"/{long}\""), "has 108 bytes; the path of a socket may have 107"),
        ("log = \"info\"", "config.toml:1: log = \"info\" is no table"),
        ("log.level = \"Info\"", "log.level = \"Info\" is none of"),
        ("log.format = true", "log.format = true is of type boolean, not a string"),
        ("\n\n[cgroup]\nparent = \"stave\"", "config.toml:4: cgroup.parent = \"stave\" is no absolute path"),
        ("[cgroup]\ndriver = \"systemd\"\nparent = \"/stave\"", "cgroup.parent = \"/stave\" is no slice"),
        ("cgroup.parent = \"a--b.slice\"", "cgroup.parent = \"a--b.slice\" is no slice"),
        (
            "cgroup.driver = \"Systemd\"",
            "cgroup.driver = \"Systemd\" is none of \"auto\", \"cgroupfs\", \"systemd\"",
        ),
        ("network.mode = \"host\"", "network.mode = \"host\" is none of \"bridge\", \"cni\", \"none\""),
        ("network.bridge.name = \"sixteen-letters-\"", "has 16 bytes; an interface name has 1 to 15"),
        ("network.bridge.name = \"a/b\"", "is no interface name"),
        ("network.bridge.subnets = \"10.0.0.0/8\"", "not an array of strings"),
        ("network.bridge.subnets = [1]", "network.bridge.subnets = [1] is not an array of strings"),
        (
            "network.bridge.subnets = [\"10.0.0.0\"]",
            "has \"10.0.0.0\", which is no subnet: it lacks a prefix",
        ),
        ("network.bridge.subnets = [\"10.0.0.0/31\"]", "for IPv4 the prefix length is 8 to 30"),
        (
            "network.bridge.subnets = [\"10.0.0.0/16\", \"10.1.0.0/16\"]",
            "has a second subnet of IPv4: 10.1.0.0/16",
        ),
        ("network.bridge.subnets = [\"127.0.0.0/8\"]", "which is no network for pods"),
        ("network.cni.timeout = 0", "network.cni.timeout = 0 is not between 1 and 600"),
        ("network.cni.bin_dirs = [\"bin\"]", "has \"bin\", which is no absolute path"),
        ("streaming.address = \"localhost\"", "is no IP address"),
        ("streaming.port = 65536", "streaming.port = 65536 is no port: 0 to 65535"),
        ("streaming.port = -1", "is no port"),
        ("streaming.port = 1.5", "streaming.port = 1.5 is of type float"),
        ("streaming.port = 99999999999999999999", "is out of range"),
        ("metrics.address = \":9095\"", "is no IP address with a port"),
        ("nri.enable = \"yes\"", "nri.enable = \"yes\" is of type string, not true or false"),
        ("nri.enable = {}", "nri.enable = {} is of type table"),
        ("runtimes = 1", "runtimes = 1 is no table"),
        ("[[runtimes.a]]", "is no table"),
        ("runtimes.a = 1", "runtimes.a = 1 is no table"),
        ("\n[runtimes.a]", "config.toml:2: runtimes.a.type is missing"),
        ("[runtimes.a]\ntype = \"oci\"", "config.toml:1: runtimes.a.path is missing: with type = \"oci\""),
        (
            "[runtimes.a]\ntype = \"builtin\"\npath = \"/x\"",
            "config.toml:3: runtimes.a.path = \"/x\" has no meaning",
        ),
        (
            "[runtimes.a]\ntype = \"builtin\"\ntimeout = 5",
            "config.toml:3: runtimes.a.timeout = 5 has no meaning",
        ),
        ("[runtimes.a]\ntimeout = 0", "runtimes.a.timeout = 0 is not 1 to 50 seconds"),
        ("[runtimes.a]\ntimeout = 51", "runtimes.a.timeout = 51 is not"),
        ("[runtimes.a]\ntimeout = \"1\"", "is of type string, not an integer"),
        ("[runtimes.a]\npids_limit = 0", "runtimes.a.pids_limit = 0 is not 1 to 4194304"),
        ("[runtimes.a]\nargs = 1", "is of type integer, not an array of strings"),
        ("[runtimes.a]\nargs = [\"--root=/x\"]", "has \"--root=/x\", which is not for the configuration"),
        ("[runtimes.a]\nargs = [\"-log\", \"/x\"]", "has \"-log\", which is not for the configuration"),
        ("[runtimes.a]\nargs = [\"\"]", "is no argument"),
        ("[runtimes.stave]\ntype = \"oci\"\npath = \"/x\"", "that handler is the built-in executor"),
        (
            "default_runtime = \"runc\"\n[runtimes.a]\ntype = \"builtin\"",
            "default_runtime = \"runc\" is no runtime handler; there are [\"stave\", \"a\"]",
        ),
        ("[runtimes.a]\ntype = \"kvm\"", "runtimes.a.type = \"kvm\" is none of \"builtin\", \"oci\""),
        ("[log]\nlevel = ", "config.toml:2: "),
        ("[log]\nlevel = \"info\"\nlevel = \"warn\"", "config.toml:3: duplicate key"),
    ] {
        let err = error(text);
        assert!(err.contains(expected), "{text}\n gave {err}");
    }
}

#[test]
fn files_have_limits() {
    let err = error(&format!("#{}", "x".repeat(1 << 20)));
    assert!(err.contains("is bigger than 1048576 bytes"), "{err}");
    let deep = format!("root = {}1{}", "[".repeat(5000), "]".repeat(5000));
    assert!(error(&deep).contains("config.toml:1: "));
    let etc = Etc::new("");
    std::fs::create_dir_all(etc.0.path().join("conf.d/dir.toml")).unwrap();
    let err = etc.load().unwrap_err().to_string();
    assert!(err.ends_with("conf.d/dir.toml: is no regular file"), "{err}");
}

#[test]
fn systemd_has_a_default_parent_of_its_own() {
    let config = Etc::new("cgroup.driver = \"systemd\"").load().unwrap();
    assert_eq!(config.cgroup.parent, "stave.slice");
    let config = Etc::new("cgroup.driver = \"cgroupfs\"").load().unwrap();
    assert_eq!(config.cgroup.parent, "/stave");
}

#[test]
fn auto_takes_the_parent_of_either_driver_and_the_driver_decides() {
    let parent = |text: &str, driver| Etc::new(text).load().unwrap().cgroup.parent_for(driver);
    let (cgroupfs, systemd) = (CgroupDriver::Cgroupfs, CgroupDriver::Systemd);
    assert_eq!(Config::default().cgroup.driver, CgroupDriver::Auto);
    assert_eq!(parent("", cgroupfs).unwrap(), "/stave");
    assert_eq!(parent("", systemd).unwrap(), "stave.slice");
    assert_eq!(parent("cgroup.parent = \"/own\"", cgroupfs).unwrap(), "/own");
    assert_eq!(parent("cgroup.parent = \"own.slice\"", systemd).unwrap(), "own.slice");
    let error = parent("cgroup.parent = \"/own\"", systemd).unwrap_err();
    assert!(error.contains("cgroup.parent = \"/own\" is no slice"), "{error}");
    let error = parent("cgroup.parent = \"own.slice\"", cgroupfs).unwrap_err();
    assert!(error.contains("cgroup.parent = \"own.slice\" is no absolute path"), "{error}");
}

#[test]
fn overrides_win_and_are_checked() {
    let mut config = Etc::new("root = \"/a\"\nlog.level = \"warn\"").load().unwrap();
    config
        .apply(Overrides {
            root: Some("/b".into()),
            log_format: Some(LogFormat::Json),
            ..Overrides::default()
        })
        .unwrap();
    assert_eq!(config.root, Path::new("/b"));
    assert_eq!((config.log.level, config.log.format), (LogLevel::Warn, LogFormat::Json));

    let before = config.clone();
    for (overrides, expected) in [
        (
            Overrides { root: Some("/c".into()), state: Some("run".into()), ..Overrides::default() },
            "--state: state = \"run\" is no absolute path",
        ),
        (
            Overrides { state: Some("/b".into()), ..Overrides::default() },
            "--state: state = \"/b\" is the root",
        ),
        (
            Overrides { listen: Some(format!("/{}", "x".repeat(107)).into()), ..Overrides::default() },
            "has 108 bytes",
        ),
    ] {
        let err = config.apply(overrides).unwrap_err().to_string();
        assert!(err.contains(expected), "{err}");
        assert_eq!(config, before, "an error changes nothing");
    }
}

#[test]
fn tls_files_go_together() {
    let both = Etc::new("[streaming]\ntls_certificate = \"/tls.crt\"\n")
        .drop_in("key.toml", "streaming.tls_key = \"/tls.key\"\n");
    let streaming = both.load().unwrap().streaming;
    assert_eq!(streaming.tls_certificate, Some("/tls.crt".into()));
    assert_eq!(streaming.tls_key, Some("/tls.key".into()));
    for (given, missing) in [("tls_certificate", "tls_key"), ("tls_key", "tls_certificate")] {
        let error = error(&format!("[streaming]\n{given} = \"/a\"\n"));
        assert!(error.contains(&format!("streaming.{missing}")), "{error}");
        assert!(error.contains(&format!("streaming.{given} needs it")), "{error}");
    }
    let error = error("[streaming]\ntls_key = \"tls.key\"\n");
    assert!(error.contains("config.toml:2: streaming.tls_key = \"tls.key\" is no absolute path"), "{error}");
    // A drop-in takes them back.
    let off =
        both.drop_in("off.toml", "[streaming]\ntls_certificate = \"\"\ntls_key = \"\"\n").load().unwrap();
    assert_eq!(off.streaming, Config::default().streaming);
}

#[test]
fn printed_configuration_loads_to_the_same() {
    let rich = Etc::new(
        "root = \"/with \\\"quotes\\\" and \\\\\"\nnetwork.bridge.subnets = [\"10.1.0.0/16\", \"fd00::/64\"]\n\
         metrics.address = \"127.0.0.1:9095\"\nstreaming.tls_certificate = \"/tls.crt\"\n\
         streaming.tls_key = \"/tls.key\"\ncgroup.driver = \"systemd\"\nnri.enable = true\n\
         [runtimes.runc]\ntype = \"oci\"\npath = \"/usr/bin/runc\"\nroot = \"/r\"\n\
         args = [\"--debug\"]\ntimeout = 3\npids_limit = 7\n\
         [runtimes.crun]\ntype = \"oci\"\npath = \"/usr/bin/crun\"\n[runtimes.own]\ntype = \"builtin\"\n",
    )
    .load()
    .unwrap();
    for config in [Config::default(), rich] {
        let printed = config.to_commented_toml();
        let again = Etc::new(&printed).load().unwrap_or_else(|err| panic!("{err}\n{printed}"));
        assert_eq!(again, config, "{printed}");
    }
}

#[test]
fn every_printed_key_has_a_comment_with_its_default() {
    let printed = Config::default().to_commented_toml();
    let lines: Vec<_> = printed.lines().collect();
    let mut keys = 0;
    for (at, line) in lines.iter().enumerate() {
        assert!(line.len() <= 100, "{line}");
        if line.starts_with(['#', '[']) || line.is_empty() {
            continue;
        }
        keys += 1;
        assert!(at > 0 && lines[at - 1].starts_with('#'), "{line} has no comment");
        let (_, value) = line.split_once(" = ").unwrap();
        let comment: Vec<_> =
            lines[..at].iter().rev().take_while(|line| line.starts_with('#')).map(|l| &l[2..]).collect();
        let comment = comment.into_iter().rev().collect::<Vec<_>>().join(" ");
        assert!(comment.ends_with(&format!("Default: {value}.")), "{line}: {comment}");
    }
    assert_eq!(keys, 27);
}

#[test]
fn the_manual_shows_the_printed_defaults() {
    let manual = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/configuration.md");
    let text = std::fs::read_to_string(manual).unwrap();
    let printed = Config::default().to_commented_toml();
    assert!(
        text.contains(&format!("```toml\n{printed}```")),
        "docs/configuration.md must hold this:\n```toml\n{printed}```"
    );
}

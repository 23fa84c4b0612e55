//! Images mounted as volumes.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use stave_supervisor_proto::v1::failure::Kind;
use stave_supervisor_proto::v1::{Mount, mount};

use crate::Case;
use crate::bundle::{Bundle, NODEV, RDONLY};

pub const CASES: &[Case] = &[
    ("layers_are_merged_and_read_only", layers_are_merged_and_read_only),
    ("one_layer", one_layer),
    ("sub_paths", sub_paths),
    ("sub_paths_stay_inside", sub_paths_stay_inside),
    ("the_same_layers_as_the_root", the_same_layers_as_the_root),
    ("an_image_is_never_writable", an_image_is_never_writable),
];

/// Two layers: the upper one changes a file of the lower one.
fn image(bundle: &Bundle, destination: &str, sub_path: &str) -> Mount {
    for layer in ["image/0", "image/1"] {
        fs::create_dir_all(bundle.path(layer).join("dir")).unwrap();
    }
    let (lower, upper) = (bundle.path("image/0"), bundle.path("image/1"));
    fs::write(lower.join("dir/below"), "below\n").unwrap();
    fs::write(lower.join("changed"), "old\n").unwrap();
    fs::write(upper.join("changed"), "new\n").unwrap();
    fs::write(upper.join("dir/run"), "#!/bin/sh\necho ran\n").unwrap();
    fs::set_permissions(upper.join("dir/run"), fs::Permissions::from_mode(0o755)).unwrap();
    Mount {
        kind: mount::Kind::Image.into(),
        destination: destination.to_owned(),
        attributes: RDONLY | NODEV,
        lower_dirs: [upper, lower].map(|dir| dir.to_str().unwrap().to_owned()).to_vec(),
        sub_path: sub_path.to_owned(),
        ..Mount::default()
    }
}

fn layers_are_merged_and_read_only() {
    let mut bundle = Bundle::new();
    let volume = image(&bundle, "/made/volume", "");
    bundle.plan.mounts.push(volume);
    let script = "cd /made/volume; cat changed dir/below; dir/run; touch new; echo x >changed; rm changed; \
                  mount -o remount,rw /made/volume";
    let output = bundle.sh(script).run();
    assert_eq!(output.stdout, "new\nbelow\nran\n");
    assert_eq!(output.stderr.matches("Read-only file system").count(), 3, "{}", output.stderr);
    assert_eq!(fs::read_dir(bundle.path("image/1")).unwrap().count(), 2);
    assert_eq!(bundle.mounts_on_the_host(), "");
}

fn one_layer() {
    let mut bundle = Bundle::new();
    let mut volume = image(&bundle, "/volume", "");
    volume.lower_dirs.remove(0);
    bundle.plan.mounts.push(volume);
    let output = bundle.sh("cat /volume/changed; touch /volume/new").run();
    assert_eq!(output.stdout, "old\n");
    assert!(output.stderr.contains("Read-only file system"), "{}", output.stderr);
    assert!(!bundle.path("image/0/new").exists());
}

fn sub_paths() {
    let mut bundle = Bundle::new();
    let volumes =
        [("/dir", "dir"), ("/file", "changed"), ("/linked", "link")].map(|(to, sub)| image(&bundle, to, sub));
    // Absolute in the image, and through its upper layer.
    symlink("/dir", bundle.path("image/1/link")).unwrap();
    bundle.plan.mounts.extend(volumes);
    let output = bundle.sh("ls /dir; cat /file; /linked/run; echo x >/file").run();
    assert_eq!(output.stdout, "below\nrun\nnew\nran\n");
    assert!(output.stderr.contains("Read-only file system"), "{}", output.stderr);
}

fn sub_paths_stay_inside() {
    let mut bundle = Bundle::new();
    fs::write(bundle.path("secret"), "of the host").unwrap();
    let secret = bundle.path("secret");
    image(&bundle, "/", "");
    symlink(&secret, bundle.path("image/1/absolute")).unwrap();
    symlink("../../../../../../../../etc", bundle.path("image/1/relative")).unwrap();
    symlink("/proc/self/root", bundle.path("image/1/magic")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        bundle.path("image/1/fifo"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    for sub_path in ["absolute", "relative", "magic", "missing", "dir/../../../secret", "fifo", "changed/x"] {
        let volume = image(&bundle, "/volume", sub_path);
        bundle.plan.mounts.push(volume);
        let error = bundle.failure();
        bundle.plan.mounts.pop();
        assert_eq!(error.stage, "ImageVolumeMountFailed", "{sub_path}: {error}");
        assert_eq!(error.kind, Kind::InvalidArgument, "{sub_path}: {error}");
        assert!(error.message.contains("/volume") && error.message.contains(sub_path), "{error}");
    }
}

/// Each is a view of its own, and no mount of one is seen through the other.
fn the_same_layers_as_the_root() {
    let mut bundle = Bundle::new();
    let layers = bundle.plan.root.as_ref().unwrap().lower_dirs.clone();
    for destination in ["/one", "/two"] {
        let volume = Mount { lower_dirs: layers.clone(), ..image(&bundle, destination, "") };
        bundle.plan.mounts.push(volume);
    }
    let script =
        "echo mine >/etc/group; ls /one/proc /one/dev 2>&1 | grep -c . ; cat /one/etc/group /two/etc/group";
    let output = bundle.sh(script).run();
    let lines: Vec<_> = output.stdout.lines().collect();
    assert_eq!(lines[1..], ["root:x:0:", "staff:x:50:alice", "root:x:0:", "staff:x:50:alice"], "{lines:?}");
    assert_eq!(fs::read_to_string(bundle.path("upper/etc/group")).unwrap(), "mine\n");
}

fn an_image_is_never_writable() {
    let mut bundle = Bundle::new();
    let good = image(&bundle, "/volume", "");
    for bad in [
        Mount { attributes: NODEV, ..good.clone() },
        Mount { lower_dirs: Vec::new(), ..good.clone() },
        Mount { lower_dirs: vec!["relative".to_owned()], ..good },
    ] {
        bundle.plan.mounts.push(bad);
        assert_eq!(bundle.failure().kind, Kind::InvalidArgument);
        bundle.plan.mounts.pop();
    }
}

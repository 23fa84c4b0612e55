use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, OnceLock, mpsc};
use std::time::{Duration, Instant};

/// Debian's docker-registry on a loopback port, with the images of hack/images.
/// One serves all tests of a process, and ends with it.
#[derive(Debug, Clone, Copy)]
pub struct Registry {
    address: SocketAddr,
}

static SHARED: OnceLock<Registry> = OnceLock::new();

impl Registry {
    /// The registry that all tests of this process share.
    pub fn shared() -> Registry {
        *SHARED.get_or_init(|| {
            // One that was filled elsewhere: hack/images takes minutes in an emulated machine.
            if let Some(storage) = std::env::var_os("STAVE_E2E_REGISTRY") {
                return Registry::start(Path::new(&storage));
            }
            let registry = Registry::start(&cache_dir().join("registry"));
            registry.push_images();
            registry
        })
    }

    /// A registry with a storage of its own, empty at first.
    pub fn start(storage: &Path) -> Registry {
        std::fs::create_dir_all(storage).expect("storage of the registry");
        for _ in 0..3 {
            let address = free_address();
            let config = format!(
                "version: 0.1\nlog:\n  level: error\n  accesslog:\n    disabled: true\nstorage:\n  filesystem:\n    \
                 rootdirectory: {}\n  delete:\n    enabled: true\n  maintenance:\n    uploadpurging:\n      \
                 enabled: false\nhttp:\n  addr: {address}\n",
                storage.display()
            );
            let file = Arc::new(tempfile::NamedTempFile::new().expect("configuration of the registry"));
            std::fs::write(file.path(), config).expect("configuration of the registry");
            let (told, heard) = mpsc::channel();
            // The parent-death signal comes when the thread ends that made the child: one thread stays for it.
            std::thread::spawn(move || {
                let child = Command::new("setpriv")
                    .args(["--pdeathsig", "KILL", "docker-registry", "serve"])
                    .arg(file.path())
                    .env("OTEL_TRACES_EXPORTER", "none")
                    .stdout(Stdio::null())
                    .stderr(Stdio::null())
                    .spawn();
                match child {
                    Ok(mut child) => drop(child.wait()),
                    Err(error) => drop(told.send(error)),
                }
            });
            let end = Instant::now() + crate::limit(10);
            while Instant::now() < end {
                if let Ok(error) = heard.try_recv() {
                    panic!("docker-registry (of Debian's package of that name) does not start: {error}");
                }
                if TcpStream::connect(address).is_ok() {
                    return Registry { address };
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        panic!("docker-registry did not answer on three ports in a row");
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    fn push_images(&self) {
        let status = Command::new(repo_root().join("hack/images"))
            .args(["push", &format!("http://{}", self.address)])
            .status()
            .expect("hack/images");
        assert!(status.success(), "hack/images push: {status}");
    }
}

/// The name of one of hack/images' images as the tests' daemons know it, under a host that mirrors to the registry.
pub fn image(name: &str) -> String {
    format!("registry.test/{name}")
}

/// The root of the checkout.
pub fn repo_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("e2e is in the checkout").to_owned()
}

pub(crate) fn cache_dir() -> PathBuf {
    let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).unwrap_or_else(|| {
        PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".cache")
    });
    base.join("stave")
}

fn free_address() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port on loopback");
    listener.local_addr().expect("address of a listener")
}

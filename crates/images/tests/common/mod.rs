//! Images to pull, a real registry to pull them from, and one that misbehaves.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used, clippy::expect_used)]

use std::collections::HashMap;
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use stave_images::{Digest, Images, Patience};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

pub const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
pub const PLAIN: &str = "application/vnd.oci.image.layer.v1.tar";
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";

pub fn arch() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

pub fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(1_700_000_000);
        builder.append_data(&mut header, name, *content).unwrap();
    }
    builder.into_inner().unwrap()
}

pub fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

/// Bytes that do not compress.
pub fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

/// An image with its blobs.
#[derive(Clone)]
pub struct Built {
    pub manifest: Vec<u8>,
    pub config: Vec<u8>,
    /// Media type, bytes.
    pub layers: Vec<(&'static str, Vec<u8>)>,
}

impl Built {
    pub fn new(layers: &[(&'static str, Vec<u8>)], config: Value) -> Built {
        let diff_ids: Vec<String> = layers.iter().map(|(_, tar)| Digest::of(tar).to_string()).collect();
        let config = json!({"architecture": arch(), "os": "linux", "created": "2024-01-02T03:04:05Z",
            "config": config, "rootfs": {"type": "layers", "diff_ids": diff_ids}});
        let config = serde_json::to_vec(&config).unwrap();
        let layers: Vec<_> = layers
            .iter()
            .map(|(kind, tar)| (*kind, if *kind == GZIP { gzip(tar) } else { tar.clone() }))
            .collect();
        let descriptors: Vec<Value> = layers
            .iter()
            .map(|(kind, blob)| json!({"mediaType": kind, "digest": Digest::of(blob).to_string(), "size": blob.len()}))
            .collect();
        let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": Digest::of(&config).to_string(), "size": config.len()},
            "layers": descriptors});
        Built { manifest: serde_json::to_vec(&manifest).unwrap(), config, layers }
    }

    /// One layer with one file.
    pub fn small(content: &str) -> Built {
        Built::new(&[(GZIP, tar(&[("file", content.as_bytes())]))], json!({"Cmd": ["/file"]}))
    }

    pub fn id(&self) -> String {
        Digest::of(&self.config).to_string()
    }

    pub fn digest(&self) -> String {
        Digest::of(&self.manifest).to_string()
    }
}

pub fn quick() -> Patience {
    Patience {
        connect: Duration::from_secs(2),
        response: Duration::from_secs(3),
        stall: Duration::from_millis(600),
        stall_bytes: 1024,
        attempts: 2,
        backoff: Duration::from_millis(20),
    }
}

/// A store and its hosts.toml files.
pub struct Node {
    pub dir: TempDir,
    pub images: Images,
}

impl Node {
    pub async fn new() -> Node {
        let dir = TempDir::new().unwrap();
        let images = open(dir.path()).await;
        Node { dir, images }
    }

    pub async fn reopen(&mut self) {
        self.images = open(self.dir.path()).await;
    }

    pub fn hosts(&self, domain: &str, text: &str) {
        let dir = self.dir.path().join("certs.d").join(domain);
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("hosts.toml"), text).unwrap();
    }

    /// `domain` is served at these addresses, by plain http, mirrors first.
    pub fn serve(&self, domain: &str, addresses: &[SocketAddr]) {
        let (server, mirrors) = addresses.split_last().unwrap();
        let mut text = format!("server = \"http://{server}\"\n");
        for mirror in mirrors {
            text.push_str(&format!("[host.\"http://{mirror}\"]\n"));
        }
        self.hosts(domain, &text);
    }

    pub fn names(&self, dir: &str) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(self.dir.path().join("root").join(dir))
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .filter(|name| name != ".broken")
            .collect();
        names.sort();
        names
    }

    /// No image, layer or leftover, after what runs in the background has ended.
    pub async fn assert_empty(&self) {
        for _ in 0..100 {
            let left: usize = ["images", "layers/fs", "layers/records", "layers/staging", "layers/trash"]
                .iter()
                .map(|dir| self.names(dir).len())
                .sum();
            if left == 0 && self.images.list().is_empty() && self.images.pulls().is_empty() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!(
            "left: {:?} {:?} {:?}",
            self.names("images"),
            self.names("layers/fs"),
            self.names("layers/staging")
        );
    }
}

async fn open(dir: &Path) -> Images {
    Images::open_with(&dir.join("root"), &dir.join("certs.d"), quick()).await.unwrap()
}

/// The docker-registry package, on a free port of loopback.
pub struct RealRegistry {
    process: Child,
    dir: TempDir,
    pub address: SocketAddr,
}

/// Of the bcrypt test vectors of openwall's crypt_blowfish.
pub const PASSWORD: &str = "U*U";
const HTPASSWD: &str = "user:$2a$05$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW\n";

impl RealRegistry {
    pub async fn start() -> RealRegistry {
        RealRegistry::start_with(false).await
    }

    pub async fn start_with(password: bool) -> RealRegistry {
        // Between our closing the port and the registry's opening it another may take it.
        for _ in 0..5 {
            if let Some(registry) = RealRegistry::try_start(password).await {
                return registry;
            }
        }
        panic!("docker-registry does not start (package docker-registry)");
    }

    async fn try_start(password: bool) -> Option<RealRegistry> {
        let dir = TempDir::new().unwrap();
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: \"{address}\"}}\n",
            dir.path().join("data").display()
        );
        if password {
            let file = dir.path().join("htpasswd");
            std::fs::write(&file, HTPASSWD).unwrap();
            config.push_str(&format!("auth: {{htpasswd: {{realm: test, path: {}}}}}\n", file.display()));
        }
        std::fs::write(dir.path().join("config.yml"), config).unwrap();
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(dir.path().join("config.yml"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry (package docker-registry)");
        let mut registry = RealRegistry { process, dir, address };
        for _ in 0..200 {
            if registry.process.try_wait().unwrap().is_some() {
                return None;
            }
            if TcpStream::connect(address).await.is_ok() {
                return Some(registry);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        None
    }

    fn request(&self, method: reqwest::Method, path: &str) -> reqwest::RequestBuilder {
        let url =
            if path.starts_with("http") { path.to_owned() } else { format!("http://{}{path}", self.address) };
        reqwest::Client::new().request(method, url).basic_auth("user", Some(PASSWORD))
    }

    pub async fn blob(&self, repository: &str, data: &[u8]) {
        let upload = self.request(reqwest::Method::POST, &format!("/v2/{repository}/blobs/uploads/"));
        let upload = upload.send().await.unwrap();
        let location = upload.headers()["location"].to_str().unwrap().to_owned();
        let joint = if location.contains('?') { '&' } else { '?' };
        let url = format!("{location}{joint}digest={}", Digest::of(data));
        let put = self.request(reqwest::Method::PUT, &url).body(data.to_vec()).send().await.unwrap();
        assert!(put.status().is_success(), "{}", put.status());
    }

    pub async fn manifest(&self, repository: &str, tag: &str, media_type: &str, data: &[u8]) {
        let put = self
            .request(reqwest::Method::PUT, &format!("/v2/{repository}/manifests/{tag}"))
            .header("content-type", media_type)
            .body(data.to_vec())
            .send()
            .await
            .unwrap();
        let status = put.status();
        assert!(status.is_success(), "{status} {}", put.text().await.unwrap());
    }

    pub async fn push(&self, repository: &str, tag: &str, image: &Built) {
        for (_, layer) in &image.layers {
            self.blob(repository, layer).await;
        }
        self.blob(repository, &image.config).await;
        self.manifest(repository, tag, MANIFEST, &image.manifest).await;
    }

    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }
}

impl Drop for RealRegistry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What the misbehaving registry answers for a path.
#[derive(Clone, Default)]
pub struct Answer {
    pub status: u16,
    pub content_type: &'static str,
    pub body: Vec<u8>,
    /// Close the connection after so many bytes of the body.
    pub cut: Option<usize>,
    /// How often to cut; then all is well.
    pub cuts: usize,
    /// Send so many bytes and then nothing, the connection open.
    pub stall: Option<usize>,
    /// Go on sending for ever, with no length told.
    pub endless: bool,
    pub headers: String,
}

#[derive(Clone, Debug)]
pub struct Asked {
    pub path: String,
    pub authorization: Option<String>,
    pub range: Option<String>,
}

#[derive(Default)]
struct Shared {
    answers: HashMap<String, Answer>,
    asked: Vec<Asked>,
}

pub struct BrokenRegistry {
    pub address: SocketAddr,
    shared: Arc<Mutex<Shared>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for BrokenRegistry {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl BrokenRegistry {
    pub async fn start() -> BrokenRegistry {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Mutex::new(Shared::default()));
        let task = tokio::spawn({
            let shared = shared.clone();
            async move {
                loop {
                    let (stream, _) = listener.accept().await.unwrap();
                    let shared = shared.clone();
                    tokio::spawn(async move {
                        let _ = serve(stream, shared).await;
                    });
                }
            }
        });
        BrokenRegistry { address, shared, task }
    }

    pub fn answer(&self, path: &str, answer: Answer) {
        self.shared.lock().unwrap().answers.insert(path.to_owned(), answer);
    }

    /// Serves an image well, under any tag and its digest.
    pub fn image(&self, repository: &str, tag: &str, image: &Built) {
        let manifest =
            Answer { status: 200, content_type: MANIFEST, body: image.manifest.clone(), ..Answer::default() };
        for name in [tag, &image.digest()] {
            self.answer(&format!("/v2/{repository}/manifests/{name}"), manifest.clone());
        }
        for blob in image.layers.iter().map(|(_, blob)| blob).chain([&image.config]) {
            self.blob(
                repository,
                &Digest::of(blob).to_string(),
                Answer { body: blob.clone(), ..Answer::default() },
            );
        }
    }

    pub fn blob(&self, repository: &str, digest: &str, answer: Answer) {
        let answer = Answer { status: 200, content_type: "application/octet-stream", ..answer };
        self.answer(&format!("/v2/{repository}/blobs/{digest}"), answer);
    }

    pub fn asked(&self) -> Vec<Asked> {
        self.shared.lock().unwrap().asked.clone()
    }
}

async fn serve(mut stream: TcpStream, shared: Arc<Mutex<Shared>>) -> std::io::Result<()> {
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        if stream.read(&mut byte).await? == 0 {
            return Ok(());
        }
        request.push(byte[0]);
    }
    let text = String::from_utf8_lossy(&request).into_owned();
    let path = text.split(' ').nth(1).unwrap_or("").to_owned();
    let header = |name: &str| {
        text.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
        })
    };
    let asked = Asked { path: path.clone(), authorization: header("authorization"), range: header("range") };
    let (answer, cut_now) = {
        let mut shared = shared.lock().unwrap();
        shared.asked.push(asked.clone());
        let mut cut_now = false;
        let answer = match shared.answers.get_mut(&path) {
            Some(answer) => {
                if answer.cut.is_some() && answer.cuts > 0 {
                    answer.cuts -= 1;
                    cut_now = true;
                }
                answer.clone()
            }
            None if path == "/v2/" => Answer { status: 200, ..Answer::default() },
            None => Answer { status: 404, ..Answer::default() },
        };
        (answer, cut_now)
    };
    let mut body = &answer.body[..];
    let mut status = answer.status;
    if let Some(from) =
        asked.range.as_deref().and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok())
    {
        let from: usize = from;
        body = &body[from.min(body.len())..];
        status = 206;
    }
    let mut head = format!("HTTP/1.1 {status} X\r\nconnection: close\r\n{}", answer.headers);
    if !answer.content_type.is_empty() {
        head.push_str(&format!("content-type: {}\r\n", answer.content_type));
    }
    if !answer.endless {
        head.push_str(&format!("content-length: {}\r\n", body.len()));
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes()).await?;
    if answer.endless {
        loop {
            stream.write_all(&[b' '; 4096]).await?;
        }
    }
    if let Some(after) = answer.stall {
        stream.write_all(&body[..after.min(body.len())]).await?;
        stream.flush().await?;
        tokio::time::sleep(Duration::from_secs(60)).await;
        return Ok(());
    }
    if let (Some(after), true) = (answer.cut, cut_now) {
        stream.write_all(&body[..after.min(body.len())]).await?;
        stream.flush().await?;
        return Ok(());
    }
    stream.write_all(body).await?;
    stream.shutdown().await
}

//! A store in a temporary directory, and archives written byte by byte, as no honest tool would.
#![allow(dead_code, missing_docs, clippy::unwrap_used, unreachable_pub)]

use std::io::Write;
use std::path::{Path, PathBuf};

use stave_layers::{Cancel, ChainId, Compression, Digest, LayerError, Limits, Staged, Store};
use tar::{EntryType, Header};
use tempfile::TempDir;

pub struct Fixture {
    pub dir: TempDir,
    pub store: Store,
}

impl Fixture {
    pub fn new() -> Fixture {
        Fixture::with(Limits::default())
    }

    pub fn with(limits: Limits) -> Fixture {
        let dir = TempDir::new().unwrap();
        std::fs::create_dir(dir.path().join("outside")).unwrap();
        std::fs::write(dir.path().join("outside/secret"), "secret").unwrap();
        let store = Store::open_with(&dir.path().join("root"), limits).unwrap();
        Fixture { dir, store }
    }

    pub fn outside(&self) -> PathBuf {
        self.dir.path().join("outside")
    }

    pub fn unpack(&self, archive: &Archive) -> Result<Staged, LayerError> {
        let tar = archive.finish();
        self.store.unpack(&tar[..], Compression::None, &Digest::of(&tar), &Cancel::new())
    }

    /// Unpacks and commits on `parents`.
    pub fn layer(&self, archive: &Archive, parents: &[ChainId]) -> Result<ChainId, LayerError> {
        self.store.commit(self.unpack(archive)?, parents)
    }

    pub fn one(&self, archive: &Archive) -> PathBuf {
        let chain = self.layer(archive, &[]).unwrap();
        self.store.dir(&chain)
    }

    /// Nothing beside the store and `outside`, which is as it was; no staging or trash left.
    pub fn assert_contained(&self) {
        let names = |path: &Path| {
            let mut names: Vec<_> =
                std::fs::read_dir(path).unwrap().map(|e| e.unwrap().file_name()).collect();
            names.sort();
            names
        };
        assert_eq!(names(self.dir.path()), ["outside", "root"]);
        assert_eq!(names(&self.dir.path().join("root")), ["layers"]);
        let layers = self.dir.path().join("root/layers");
        assert_eq!(names(&layers), ["empty", "fs", "records", "staging", "trash"]);
        assert!(names(&layers.join("staging")).is_empty());
        assert!(names(&layers.join("trash")).is_empty());
        assert!(names(&layers.join("empty")).is_empty());
        assert_eq!(names(&layers.join("fs")).len(), self.store.list().len());
        let outside = self.outside();
        assert_eq!(names(&outside), ["secret"]);
        assert_eq!(std::fs::read(outside.join("secret")).unwrap(), b"secret");
        use std::os::unix::fs::MetadataExt;
        assert_eq!(std::fs::metadata(outside.join("secret")).unwrap().nlink(), 1);
        assert_eq!(std::fs::metadata(outside.join("secret")).unwrap().mode() & 0o7777, 0o644);
    }
}

#[derive(Default, Clone)]
pub struct Archive(pub Vec<u8>);

impl Archive {
    pub fn new() -> Archive {
        Archive::default()
    }

    pub fn raw(&mut self, kind: EntryType, name: &[u8], link: &[u8], content: &[u8], mode: u32) -> &mut Self {
        self.entry(kind, name, link, content, mode, 0, 0, 1_700_000_000)
    }

    #[allow(clippy::too_many_arguments)]
    pub fn entry(
        &mut self,
        kind: EntryType,
        name: &[u8],
        link: &[u8],
        content: &[u8],
        mode: u32,
        uid: u64,
        gid: u64,
        mtime: u64,
    ) -> &mut Self {
        if name.len() > 100 {
            self.raw(EntryType::GNULongName, b"././@LongLink", b"", &[name, b"\0"].concat(), 0);
        }
        if link.len() > 100 {
            self.raw(EntryType::GNULongLink, b"././@LongLink", b"", &[link, b"\0"].concat(), 0);
        }
        let mut header = Header::new_gnu();
        {
            let old = header.as_old_mut();
            let n = name.len().min(100);
            old.name[..n].copy_from_slice(&name[..n]);
            let n = link.len().min(100);
            old.linkname[..n].copy_from_slice(&link[..n]);
        }
        header.set_entry_type(kind);
        header.set_size(content.len() as u64);
        header.set_mode(mode);
        header.set_uid(uid);
        header.set_gid(gid);
        header.set_mtime(mtime);
        if matches!(kind, EntryType::Char | EntryType::Block) {
            header.set_device_major(1).unwrap();
            header.set_device_minor(3).unwrap();
        }
        if kind == EntryType::GNUSparse {
            header.as_gnu_mut().unwrap().realsize = *b"00000000000\0";
        }
        header.set_cksum();
        self.0.write_all(header.as_bytes()).unwrap();
        self.0.write_all(content).unwrap();
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub fn file(&mut self, name: &str, content: &str) -> &mut Self {
        self.raw(EntryType::Regular, name.as_bytes(), b"", content.as_bytes(), 0o644)
    }

    pub fn dir(&mut self, name: &str) -> &mut Self {
        self.raw(EntryType::Directory, name.as_bytes(), b"", b"", 0o755)
    }

    pub fn symlink(&mut self, name: &str, target: &str) -> &mut Self {
        self.raw(EntryType::Symlink, name.as_bytes(), target.as_bytes(), b"", 0o777)
    }

    pub fn hardlink(&mut self, name: &str, target: &str) -> &mut Self {
        self.raw(EntryType::Link, name.as_bytes(), target.as_bytes(), b"", 0o644)
    }

    pub fn pax(&mut self, records: &[(&str, &[u8])]) -> &mut Self {
        let mut body = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let mut length = rest + 1;
            while length != rest + length.to_string().len() {
                length = rest + length.to_string().len();
            }
            write!(body, "{length} {key}=").unwrap();
            body.extend_from_slice(value);
            body.push(b'\n');
        }
        self.raw(EntryType::XHeader, b"PaxHeaders/x", b"", &body, 0o644)
    }

    pub fn finish(&self) -> Vec<u8> {
        let mut bytes = self.0.clone();
        bytes.resize(bytes.len() + 1024, 0);
        bytes
    }
}

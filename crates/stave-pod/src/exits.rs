//! Exit records: one file a container, whole or not there, until the daemon has acknowledged it.

use std::fs::{DirBuilder, File};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use prost::Message;
use stave_supervisor_proto::v1::ContainerExit;

/// Where a record is written before it has its name. Ids never start with a dot.
const TEMPORARY: &str = ".tmp";

/// The directory `exits` in the pod's state directory.
#[derive(Debug)]
pub(crate) struct ExitRecords {
    dir: PathBuf,
}

impl ExitRecords {
    /// Makes the directory when it is missing.
    pub(crate) fn open(pod_dir: &Path) -> std::io::Result<Self> {
        let dir = pod_dir.join("exits");
        DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
        Ok(Self { dir })
    }

    /// Writes the record of a container. Not synced: a reboot ends the pod and voids the record.
    pub(crate) fn write(&self, exit: &ContainerExit) -> std::io::Result<()> {
        let temporary = self.dir.join(TEMPORARY);
        let mut file: File = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(&exit.encode_to_vec())?;
        std::fs::rename(&temporary, self.dir.join(&exit.container_id))
    }

    /// Deletes the record of a container, if there is one.
    pub(crate) fn delete(&self, container_id: &str) -> std::io::Result<()> {
        match std::fs::remove_file(self.dir.join(container_id)) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_whole_and_replaced_and_deleted() {
        let dir = tempfile::tempdir().expect("directory");
        let records = ExitRecords::open(dir.path()).expect("open");
        let mut exit = ContainerExit { container_id: "c1".into(), exit_code: 3, ..Default::default() };
        records.write(&exit).expect("write");
        exit.exit_code = 4;
        records.write(&exit).expect("replace");
        let bytes = std::fs::read(dir.path().join("exits/c1")).expect("read");
        assert_eq!(ContainerExit::decode(&bytes[..]).expect("decode"), exit);
        records.delete("c1").expect("delete");
        records.delete("c1").expect("what is gone is success");
        assert_eq!(std::fs::read_dir(dir.path().join("exits")).expect("list").count(), 0);
        ExitRecords::open(dir.path()).expect("an existing directory is fine");
    }
}

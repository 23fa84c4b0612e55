//! Manifests, indexes and configs, read with suspicion.

use oci_distribution::manifest::{
    IMAGE_MANIFEST_LIST_MEDIA_TYPE, IMAGE_MANIFEST_MEDIA_TYPE, OCI_IMAGE_INDEX_MEDIA_TYPE,
    OCI_IMAGE_MEDIA_TYPE, OciDescriptor, OciImageIndex, OciImageManifest,
};
use serde::{Deserialize, Deserializer};
use stave_layers::{ChainId, Compression, Digest};

use crate::{ErrorKind, ImageConfig, ImageError};

/// Largest manifest, index or config, in bytes.
pub(crate) const MAX_MANIFEST: u64 = 4 << 20;
/// Layers of one image; overlayfs takes at most 500 lower directories.
const MAX_LAYERS: usize = 480;

/// Media types to ask for.
pub(crate) const ACCEPT: &str = concat!(
    "application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json, ",
    "application/vnd.oci.image.index.v1+json, application/vnd.docker.distribution.manifest.list.v2+json"
);

/// A layer to download.
#[derive(Debug, Clone)]
pub(crate) struct LayerBlob {
    pub(crate) digest: Digest,
    /// Compressed size in bytes.
    pub(crate) size: u64,
    pub(crate) compression: Compression,
}

#[derive(Debug)]
pub(crate) struct Manifest {
    pub(crate) config: Digest,
    pub(crate) config_size: u64,
    pub(crate) layers: Vec<LayerBlob>,
}

#[derive(Debug)]
pub(crate) enum Document {
    Manifest(Manifest),
    /// The manifest of an index that fits this platform.
    Index(Digest),
}

fn invalid(what: impl Into<String>) -> ImageError {
    ImageError::new(ErrorKind::InvalidImage, what)
}

/// serde would also take the fields of a struct from a list.
fn is_object(bytes: &[u8]) -> bool {
    bytes.trim_ascii_start().starts_with(b"{")
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Shape {
    schema_version: Option<i64>,
    media_type: Option<String>,
    manifests: Option<serde::de::IgnoredAny>,
    config: Option<serde::de::IgnoredAny>,
    layers: Option<serde::de::IgnoredAny>,
}

/// Reads a manifest or an index. What it is must be clear (CVE-2021-41190): the shape, its own
/// `mediaType` and the `Content-Type` that it came with must agree.
pub(crate) fn parse(bytes: &[u8], content_type: Option<&str>) -> Result<Document, ImageError> {
    if !is_object(bytes) {
        return Err(invalid("manifest: not a JSON object"));
    }
    let shape: Shape = serde_json::from_slice(bytes).map_err(|e| invalid(format!("manifest: {e}")))?;
    if shape.schema_version != Some(2) {
        return Err(invalid(format!("manifest: unsupported schemaVersion {:?}", shape.schema_version)));
    }
    let is_index = shape.manifests.is_some();
    if is_index && (shape.config.is_some() || shape.layers.is_some()) {
        return Err(invalid("manifest: both a manifest and an index"));
    }
    let wanted = if is_index {
        [OCI_IMAGE_INDEX_MEDIA_TYPE, IMAGE_MANIFEST_LIST_MEDIA_TYPE]
    } else {
        [OCI_IMAGE_MEDIA_TYPE, IMAGE_MANIFEST_MEDIA_TYPE]
    };
    if let Some(media_type) = shape.media_type.as_deref().filter(|m| !wanted.contains(m)) {
        return Err(invalid(format!("manifest: mediaType {media_type:?} does not fit its content")));
    }
    let content_type = content_type.map(|c| c.split(';').next().unwrap_or(c).trim());
    // Static file servers send general types.
    let known = |c: &&str| c.contains("manifest") || c.contains("image.index");
    if let Some(content_type) = content_type.filter(known).filter(|c| !wanted.contains(c)) {
        return Err(invalid(format!("manifest: Content-Type {content_type:?} does not fit its content")));
    }
    if is_index { index(bytes) } else { manifest(bytes) }
}

fn manifest(bytes: &[u8]) -> Result<Document, ImageError> {
    let manifest: OciImageManifest =
        serde_json::from_slice(bytes).map_err(|e| invalid(format!("manifest: {e}")))?;
    if manifest.layers.len() > MAX_LAYERS {
        return Err(invalid(format!("manifest: {} layers, more than {MAX_LAYERS}", manifest.layers.len())));
    }
    let size = |d: &OciDescriptor| {
        u64::try_from(d.size).map_err(|_| invalid(format!("manifest: size {} of {:?}", d.size, d.digest)))
    };
    let layers = manifest
        .layers
        .iter()
        .map(|layer| {
            Ok(LayerBlob {
                digest: layer.digest.parse()?,
                size: size(layer)?,
                compression: Compression::from_media_type(&layer.media_type)?,
            })
        })
        .collect::<Result<_, ImageError>>()?;
    let config_size = size(&manifest.config)?;
    if config_size > MAX_MANIFEST {
        return Err(invalid(format!("manifest: config of {config_size} bytes, more than {MAX_MANIFEST}")));
    }
    Ok(Document::Manifest(Manifest { config: manifest.config.digest.parse()?, config_size, layers }))
}

/// Architecture of this build in the terms of Go, and its variants, best first.
fn platform() -> (&'static str, &'static [&'static str]) {
    match std::env::consts::ARCH {
        "x86_64" => ("amd64", &["", "v1"]),
        "aarch64" => ("arm64", &["v8", ""]),
        "arm" => ("arm", &["v7", "v6", "", "v5"]),
        "powerpc64" => ("ppc64le", &[""]),
        "riscv64" => ("riscv64", &[""]),
        other => (other, &[""]),
    }
}

fn index(bytes: &[u8]) -> Result<Document, ImageError> {
    let index: OciImageIndex = serde_json::from_slice(bytes).map_err(|e| invalid(format!("index: {e}")))?;
    let (arch, variants) = platform();
    let best = index
        .manifests
        .iter()
        .filter_map(|entry| {
            let platform = entry.platform.as_ref()?;
            let variant = platform.variant.as_deref().unwrap_or("");
            let fits = platform.os.to_string() == "linux" && platform.architecture.to_string() == arch;
            let rank = variants.iter().position(|v| *v == variant)?;
            fits.then_some((rank, entry))
        })
        .min_by_key(|(rank, _)| *rank)
        .map(|(_, entry)| entry);
    // An index that names no platforms at all is for the only one it has.
    let only = || match index.manifests.as_slice() {
        [entry] if entry.platform.is_none() => Some(entry),
        _ => None,
    };
    match best.or_else(only) {
        Some(entry) => Ok(Document::Index(entry.digest.parse()?)),
        None => Err(ImageError::new(
            ErrorKind::NotFound,
            format!("no image for platform linux/{arch} in the index"),
        )),
    }
}

/// Absent, `null` and a value: the first two are the default.
fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(d: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(d)?.unwrap_or_default())
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct File {
    #[serde(deserialize_with = "or_default")]
    architecture: String,
    #[serde(deserialize_with = "or_default")]
    os: String,
    #[serde(deserialize_with = "or_default")]
    created: String,
    #[serde(deserialize_with = "or_default")]
    config: FileConfig,
    #[serde(deserialize_with = "or_default")]
    rootfs: RootFs,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RootFs {
    #[serde(deserialize_with = "or_default")]
    diff_ids: Vec<String>,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "PascalCase")]
struct FileConfig {
    #[serde(deserialize_with = "or_default")]
    entrypoint: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    cmd: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    env: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    user: String,
    #[serde(deserialize_with = "or_default")]
    working_dir: String,
    #[serde(deserialize_with = "or_default")]
    volumes: std::collections::BTreeMap<String, serde::de::IgnoredAny>,
    #[serde(deserialize_with = "or_default")]
    exposed_ports: std::collections::BTreeMap<String, serde::de::IgnoredAny>,
    #[serde(deserialize_with = "or_default")]
    stop_signal: String,
    #[serde(deserialize_with = "or_default")]
    labels: std::collections::BTreeMap<String, String>,
}

/// An image config (OCI image spec, config.md), as far as it concerns us.
#[derive(Debug)]
pub(crate) struct Config {
    pub(crate) config: ImageConfig,
    pub(crate) diff_ids: Vec<Digest>,
    pub(crate) chain: Vec<ChainId>,
    pub(crate) os: String,
    pub(crate) architecture: String,
    pub(crate) created: String,
}

pub(crate) fn config(text: &str) -> Result<Config, ImageError> {
    if !is_object(text.as_bytes()) {
        return Err(invalid("image config: not a JSON object"));
    }
    let file: File = serde_json::from_str(text).map_err(|e| invalid(format!("image config: {e}")))?;
    let (arch, _) = platform();
    if (!file.os.is_empty() && file.os != "linux")
        || (!file.architecture.is_empty() && file.architecture != arch)
    {
        let found = format!("{}/{}", file.os, file.architecture);
        return Err(ImageError::new(
            ErrorKind::NotFound,
            format!("image is for {found:?}, not linux/{arch}"),
        ));
    }
    let diff_ids: Vec<Digest> = file.rootfs.diff_ids.iter().map(|d| d.parse()).collect::<Result<_, _>>()?;
    let from = file.config;
    let config = ImageConfig {
        entrypoint: from.entrypoint,
        cmd: from.cmd,
        env: from.env,
        user: from.user,
        working_dir: from.working_dir,
        volumes: from.volumes.into_keys().collect(),
        exposed_ports: from.exposed_ports.into_keys().collect(),
        stop_signal: from.stop_signal,
        labels: from.labels,
    };
    let chain = ChainId::chain(&diff_ids);
    Ok(Config {
        config,
        diff_ids,
        chain,
        os: file.os,
        architecture: file.architecture,
        created: file.created,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const D: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn text(manifest: serde_json::Value) -> Vec<u8> {
        serde_json::to_vec(&manifest).unwrap()
    }

    fn image() -> serde_json::Value {
        serde_json::json!({"schemaVersion": 2, "mediaType": OCI_IMAGE_MEDIA_TYPE,
            "config": {"mediaType": "x", "digest": D, "size": 2},
            "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": D, "size": 3}]})
    }

    fn entry(arch: &str, variant: Option<&str>, n: u8) -> serde_json::Value {
        let digest = Digest::of(&[n]).to_string();
        serde_json::json!({"mediaType": OCI_IMAGE_MEDIA_TYPE, "digest": digest, "size": 1,
            "platform": {"os": "linux", "architecture": arch, "variant": variant}})
    }

    #[test]
    fn cve_2021_41190_manifest_and_index_are_not_confused() {
        assert!(parse(&text(image()), Some(OCI_IMAGE_MEDIA_TYPE)).is_ok());
        assert!(parse(&text(image()), Some("application/json; charset=utf-8")).is_ok());
        assert!(parse(&text(image()), None).is_ok());
        assert!(parse(b"[2]", None).is_err());
        assert!(parse(&text(image()), Some(OCI_IMAGE_INDEX_MEDIA_TYPE)).is_err());
        let mut both = image();
        both["manifests"] = serde_json::json!([]);
        assert!(parse(&text(both), None).is_err());
        let mut lying = image();
        lying["mediaType"] = OCI_IMAGE_INDEX_MEDIA_TYPE.into();
        assert!(parse(&text(lying), None).is_err());
        let mut old = image();
        old["schemaVersion"] = 1.into();
        assert!(parse(&text(old), None).is_err());
    }

    /// CVE-2024-3727
    #[test]
    fn cve_2024_3727_digests_are_checked() {
        for bad in ["sha256:../../etc", "../x", "sha256:", "sha512:00"] {
            for place in ["/config/digest", "/layers/0/digest"] {
                let mut manifest = image();
                *manifest.pointer_mut(place).unwrap() = bad.into();
                let error = parse(&text(manifest), None).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::InvalidImage);
                assert!(error.to_string().contains(bad), "{error}");
            }
            let config = format!("{{\"rootfs\":{{\"diff_ids\":[{bad:?}]}}}}");
            assert!(super::config(&config).is_err());
        }
        let mut manifest = image();
        manifest["layers"][0]["size"] = (-1).into();
        assert!(parse(&text(manifest), None).is_err());
    }

    #[test]
    fn the_best_platform_wins() {
        let (arch, variants) = platform();
        let index = |entries: Vec<serde_json::Value>| {
            let index = serde_json::json!({"schemaVersion": 2, "mediaType": OCI_IMAGE_INDEX_MEDIA_TYPE,
                "manifests": entries});
            parse(&text(index), None)
        };
        let chosen = |entries| match index(entries).unwrap() {
            Document::Index(digest) => digest,
            other => panic!("{other:?}"),
        };
        let best = Some(variants[0]).filter(|v| !v.is_empty());
        assert_eq!(
            chosen(vec![entry("s390x", None, 1), entry(arch, Some("v99"), 2), entry(arch, best, 3)]),
            Digest::of(&[3])
        );
        let unknown = entry("unknown", None, 4);
        assert_eq!(index(vec![unknown]).unwrap_err().kind(), ErrorKind::NotFound);
        let mut bare = entry(arch, None, 5);
        bare.as_object_mut().unwrap().remove("platform");
        assert_eq!(chosen(vec![bare]), Digest::of(&[5]));
    }

    #[test]
    fn configs_of_all_builders() {
        let (arch, _) = platform();
        let parsed = config(&format!(
            r#"{{"architecture":"{arch}","os":"linux","config":{{"Entrypoint":null,"Cmd":["sh"],"Env":["A=b"],
            "Volumes":{{"/data":{{}}}},"ExposedPorts":{{"80/tcp":{{}}}},"Labels":null,"User":"1:2","ArgsEscaped":true}},
            "rootfs":{{"type":"layers","diff_ids":["{D}"]}}}}"#
        ))
        .unwrap();
        assert_eq!(parsed.config.cmd, ["sh"]);
        assert_eq!(parsed.config.volumes, ["/data"]);
        assert_eq!(parsed.config.exposed_ports, ["80/tcp"]);
        assert_eq!(parsed.chain.len(), 1);
        assert!(config("{}").is_ok() && config("[]").is_err() && config("").is_err());
        let other = config(r#"{"architecture":"pdp11","os":"linux"}"#).unwrap_err();
        assert_eq!(other.kind(), ErrorKind::NotFound);
    }
}

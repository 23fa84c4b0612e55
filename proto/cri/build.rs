//! Compiles the CRI definition with protox: no protoc to install.
use prost::Message as _;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=proto");
    let descriptors = protox::compile(["runtime/v1/api.proto"], ["proto"])?;
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("cri.descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        // Records on disk and verbose answers show CRI messages as JSON.
        .message_attribute(".", "#[derive(serde::Serialize, serde::Deserialize)]")
        .message_attribute(".", "#[serde(default)]")
        // What the API marks debug_redact: in no log (see src/redact.rs), in no record.
        .skip_debug([".runtime.v1.AuthConfig"])
        .field_attribute(".runtime.v1.AuthConfig.password", "#[serde(skip_serializing)]")
        .field_attribute(".runtime.v1.AuthConfig.auth", "#[serde(skip_serializing)]")
        .field_attribute(".runtime.v1.AuthConfig.identity_token", "#[serde(skip_serializing)]")
        .field_attribute(".runtime.v1.AuthConfig.registry_token", "#[serde(skip_serializing)]")
        .compile_fds(descriptors)?;
    // For the tests, which ask cargo where a package is.
    println!("cargo::rustc-env=STAVE_TEST_TARGET={}", std::env::var("TARGET")?);
    Ok(())
}

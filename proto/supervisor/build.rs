//! Compiles the protocol definition with protox: no protoc to install.
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = [
        "stave/supervisor/v1/supervisor.proto",
        "stave/supervisor/v1/executor.proto",
        "stave/supervisor/v1/ready.proto",
    ];
    println!("cargo::rerun-if-changed=proto");
    let descriptors = protox::compile(files, ["proto"])?;
    prost_build::Config::new().compile_fds(descriptors)?;
    Ok(())
}

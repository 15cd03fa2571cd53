//! Generates the contract's Rust types from `proto/` without an installed protoc.

use std::error::Error;
use std::path::PathBuf;

use prost::Message as _;

const ROOT: &str = "../../proto";
const FILES: [&str; 10] = [
    "attune/v1/artifacts.proto",
    "attune/v1/audit.proto",
    "attune/v1/fleet.proto",
    "attune/v1/jobs.proto",
    "attune/v1/methods.proto",
    "attune/v1/spec.proto",
    "attune/v1/tokens.proto",
    "attune/v1/workers.proto",
    "google/rpc/error_details.proto",
    "google/rpc/status.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed={ROOT}");
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    let mut compiler = protox::Compiler::new([ROOT])?;
    // Comments travel: they become rustdoc, and a test checks that every field has one.
    let descriptors = compiler.include_source_info(true).include_imports(true).open_files(FILES)?.file_descriptor_set();
    std::fs::write(out.join("attune_descriptor.bin"), descriptors.encode_to_vec())?;
    // Without `connect` on generated clients, which would collide with the RPC of that name: channels are made in `client`.
    tonic_prost_build::configure()
        .build_transport(false)
        .extern_path(".google.rpc", "::tonic_types::pb")
        .bytes(".attune.v1")
        .btree_map(".attune.v1")
        .compile_fds(descriptors)?;
    Ok(())
}

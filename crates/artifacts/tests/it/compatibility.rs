//! Formats that were released are read for ever: what stands here may be added to, not changed.

use attune_artifacts::{Kind, Manifest, hash};

const FORMAT_1: &[u8] = include_bytes!("fixtures/manifest-1.json");
const FORMAT_1_DIGEST: &str = "blake3:4f92c0a2790fdaedfa5bd548c8401ff71afbf26b97781769733c5a7d7760d7a5";
const FORMAT_1_PLAIN: &[u8] = include_bytes!("fixtures/manifest-1-plain.json");
const FORMAT_1_PLAIN_DIGEST: &str = "blake3:88b700846e963df8e2195faff5949a8263a285d26adc184eff7cf938fab25121";

#[test]
fn a_manifest_of_format_1_with_causes_is_read() {
    let manifest = Manifest::parse(FORMAT_1).unwrap();
    assert_eq!(manifest.digest().to_string(), FORMAT_1_DIGEST);
    assert_eq!(manifest.bytes(), FORMAT_1);
    assert_eq!(manifest.kind(), Kind::Adapter);
    let paths: Vec<_> = manifest.files().iter().map(|file| file.path.as_str()).collect();
    assert_eq!(paths, ["README.md", "adapter_config.json", "adapter_model.safetensors", "extra/notes.txt"]);
    assert_eq!(manifest.file("extra/notes.txt").unwrap().digest, hash::bytes(b""));
    assert_eq!(manifest.size_bytes(), 1_234_567 + 890 + 12);
    let causes = manifest.causes();
    assert_eq!(causes.code_version.as_deref(), Some("attune 0.1.0"));
    assert_eq!(causes.inputs.keys().collect::<Vec<_>>(), ["base", "data.manual", "data.packages"]);
    assert_eq!(causes.kernel_profile.as_deref(), Some("x86_64 avx2 fma"));
    assert_eq!(causes.logical_shards, Some(8));
    assert_eq!(causes.plan, Some(hash::bytes(b"plan")));
}

#[test]
fn a_manifest_of_format_1_without_causes_is_read() {
    let manifest = Manifest::parse(FORMAT_1_PLAIN).unwrap();
    assert_eq!(manifest.digest().to_string(), FORMAT_1_PLAIN_DIGEST);
    assert_eq!((manifest.kind(), manifest.files().len()), (Kind::Dataset, 1));
    assert_eq!(manifest.causes(), &attune_artifacts::Causes::default());
}

//! A whole tune of a real base on real chat data against PyTorch and PEFT on the same tokens. The figures are what
//! `benches/peers/tune_lora.py` printed (torch 2.15.0, transformers 5.24.0, peft 0.21.2) for the steps, the validation
//! documents and the starting adapter that this wrote:
//!
//! `reference BASE packages.train.jsonl packages.valid.jsonl OUT tune.steps=8 tune.batch_tokens=512 data.validation[0].rows=20`

use std::path::PathBuf;

use attune_spec::job::plan::Input;
use attune_spec::job::{Plan, read_value, read_yaml, set_path};
use attune_spec::method::Catalogue;
use attune_trainer::run::{End, run};

use crate::support::{Outside, Small, metric};

const TRAIN_LOSSES: [f64; 8] =
    [6.543_368_8, 6.500_875_0, 6.527_066_7, 6.230_085_4, 6.203_151_7, 5.855_767_7, 6.339_219_1, 5.988_391_4];
const VALIDATION_LOSSES: [f64; 2] = [6.368_411_8, 5.920_303_7];

#[test]
fn a_tune_of_the_reference_base_has_pytorchs_losses() {
    let Some(reference) = std::env::var_os("ATTUNE_REFERENCE").map(PathBuf::from) else {
        println!("skipped: ATTUNE_REFERENCE names no folder with models/base and data");
        return;
    };
    let mut value = read_yaml(include_str!("../../examples/reference.yaml")).unwrap();
    for (field, text) in [("tune.steps", "8"), ("tune.batch_tokens", "512"), ("data.validation[0].rows", "20")] {
        set_path(&mut value, field, text).unwrap();
    }
    let spec = read_value(&value, Catalogue::embedded()).unwrap_or_else(|error| panic!("{error}"));
    let resolve = |place: &attune_spec::job::Reference| {
        let path = match place.to_string().as_str() {
            "./base" => "models/base",
            "./train" => "data/packages.train.jsonl",
            _ => "data/packages.valid.jsonl",
        };
        Ok(Input::Path(reference.join(path).display().to_string()))
    };
    let plan = Plan::resolve(&spec, Catalogue::embedded(), resolve).unwrap();
    let (request, _work) = Small::new().request(plan, 2, None);
    let outside = Outside::default();
    let End::Finished(summary) = run(&request, &outside).unwrap() else { panic!("stopped unasked") };
    let events = outside.events.into_inner().unwrap();
    for (name, expected) in [("train/loss", &TRAIN_LOSSES[..]), ("eval/validation/loss", &VALIDATION_LOSSES)] {
        let found = metric(&events, name);
        assert_eq!(found.len(), expected.len());
        // Eight AdamW steps from f32 sums in another order; 1e-7 was seen.
        assert!(
            found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-5),
            "{name}: {found:?}, PyTorch {expected:?}"
        );
    }
    assert_eq!(summary.trained_parameters, 443_904);
}

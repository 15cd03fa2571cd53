//! Passes on an NVIDIA device against those on the processor. Where there is no device the tests say so and end, unless
//! `ATTUNE_CUDA` asks for one.

use attune_models::pass::walk::Keep;
use attune_models::{Base, Model, Pass, Stack};
use attune_spec::job::Precision;
use attune_tensor::kernels::Kernels as _;
use attune_tensor::testing::cuda_device as device;
use candle_core::DType;

use crate::passes::{
    MIXTURE, TINY, TOLERANCE, base, documents, low_rank, model_over, off, rescaled, run, theta, turned,
};
use crate::support::{CrossEntropy, Golden, all_trained, golden};

#[test]
fn gradients_of_every_family_are_the_processors() {
    let Some(device) = device() else { return };
    for case in crate::golden::CASES {
        let Some(expected) = Golden::open(case, "expected.safetensors") else { continue };
        let open = || Base::open(&golden(case), Precision::F32).unwrap();
        let here = Model::new(open(), Stack::default());
        let there = Model::new(open().on(device).unwrap(), Stack::default());
        let (layout, (theta, _)) = (expected.layout(), all_trained(&here));
        let pass = Pass { theta: &theta, layout: &layout, dropout: None };
        let (found, expected) = (run(&there, &[pass], Keep::All), run(&here, &[pass], Keep::All));
        let apart = off(&found[0].0, &expected[0].0);
        assert!(apart < TOLERANCE, "{case}: gradients are off by {apart}");
        assert!((found[0].1.mean() - expected[0].1.mean()).abs() < TOLERANCE, "{case}: losses differ");
    }
}

#[test]
fn adapters_parts_and_dropout_are_the_processors() {
    let Some(device) = device() else { return };
    for config in [TINY, MIXTURE] {
        // Twice their rounding in bf16, where the two sides' sums may round to neighbours.
        for (dtype, bound) in [(DType::F32, TOLERANCE), (DType::BF16, 0.05)] {
            let components =
                || vec![low_rank(4, 0.25, true), low_rank(3, 0.0, false), rescaled(2), turned(true), turned(false)];
            let here = model_over(base(config, dtype), components());
            let there = model_over(base(config, dtype).on(device).unwrap(), components());
            let (first, second) = (documents(&[0, 1, 2, 3]), documents(&[4, 5]));
            let theta = theta(&here, 5);
            let pass = |layout| Pass { theta: &theta, layout, dropout: crate::passes::DROPOUT };
            let passes = [pass(&first), pass(&second)];
            let expected = run(&here, &passes, Keep::All);
            for keep in [Keep::All, Keep::Inputs] {
                for (found, expected) in run(&there, &passes, keep).iter().zip(&expected) {
                    let apart = off(&found.0, &expected.0);
                    assert!(apart < bound, "{dtype:?}, {keep:?}: gradients are off by {apart}");
                }
            }
        }
    }
}

#[test]
fn a_fault_of_the_device_ends_the_pass() {
    let Some(device) = device() else { return };
    let model = model_over(base(TINY, DType::F32).on(device).unwrap(), vec![low_rank(4, 0.0, true)]);
    let (layout, theta) = (documents(&[0, 1]), theta(&model, 1));
    assert!(device.memory(usize::MAX / 2).is_none());
    let pass = Pass { theta: &theta, layout: &layout, dropout: None };
    let error = model.score_parts(&[pass], &CrossEntropy).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("bytes were asked for"), "{error}");
}

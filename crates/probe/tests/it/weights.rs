//! Gradients by frozen weights.

use std::sync::Arc;

use attune_models::pass::walk::Keep;
use attune_models::{Model, Pass, Stack};
use attune_points::stats::What;
use attune_points::{Bank, BankKind, Grads, Params, StatsRequest, TensorName, Theta};
use candle_core::DType;

use crate::support::{CrossEntropy, GPT2, LLAMA, OLMOE, base, data, linears, measured, values};

/// Weights that train in the place of the base's have the same gradient, bit for bit.
#[test]
fn gradients_are_those_of_full_tuning() {
    let data = data();
    for (config, dtype) in [(LLAMA, DType::F32), (GPT2, DType::F32), (OLMOE, DType::F32), (LLAMA, DType::BF16)] {
        let base = base(config, dtype);
        let request = StatsRequest { what: What::Gradient, examples: 1000, domains: None };
        let stats = measured(&base, std::slice::from_ref(&request), &data, 1000);
        let name = |site: &attune_architecture::Site| base.tensor_name(site.id.as_str(), "weight");
        let weights: Params = linears(&base)
            .iter()
            .map(|site| {
                let name: TensorName = name(site);
                let weight = base.tensor(&name, DType::F32).unwrap();
                (name, weight)
            })
            .collect();
        let theta = Theta::single([Bank {
            slot: "full".into(),
            kind: BankKind::Weights,
            sets: vec![Arc::new(weights)],
            train: true,
        }]);
        let model = Model::new(Arc::clone(&base), Stack::default());
        let mut sum = Grads::wanting(theta.trained().map(|(id, _)| id));
        let mut tokens = 0;
        for layout in &data {
            let mut sink = Grads::wanting(theta.trained().map(|(id, _)| id));
            let pass = Pass { theta: &theta, layout, dropout: None };
            model.grad_parts(&[pass], &CrossEntropy, 1.0, Keep::All, &mut [&mut sink]).unwrap();
            sum.add(&sink).unwrap();
            tokens += layout.counts().tokens;
        }
        for site in linears(&base) {
            let (id, _) = theta.weight(&name(&site)).unwrap();
            let found = stats.gradient(&request, &site.id).unwrap();
            assert_eq!(found.denominator, tokens as f64);
            assert!(values(&found.sum_oi) == values(sum.get(&id).unwrap()), "{} of {dtype:?}", site.id);
        }
    }
}

//! Gradients by frozen weights, and the squares of those of single examples.

use std::sync::Arc;

use attune_models::pass::walk::Keep;
use attune_models::{Model, Pass, Stack};
use attune_points::stats::What;
use attune_points::{Bank, BankKind, Grads, Params, StatsRequest, TensorName, Theta};
use candle_core::DType;

use crate::support::{CrossEntropy, GPT2, LLAMA, OLMOE, agree, base, data, linears, measured, values};

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

/// Each example's gradient by itself, squared and added, is the diagonal of the Fisher information; that of all together is not.
#[test]
fn squares_are_those_of_single_examples() {
    let data = data();
    for (config, dtype) in [(LLAMA, DType::F32), (GPT2, DType::F32), (OLMOE, DType::F32), (LLAMA, DType::BF16)] {
        let base = base(config, dtype);
        let of = |what| StatsRequest { what, examples: 1000, domains: None };
        let stats = measured(&base, &[of(What::Fisher)], &data, 1000);
        let mut sums: std::collections::BTreeMap<_, Vec<f64>> = std::collections::BTreeMap::new();
        let mut examples = 0;
        for layout in &data {
            for at in 0..layout.docs().len() {
                examples += 1;
                let own = Arc::new(layout.of_docs(|doc, _| doc == at));
                let alone = measured(&base, &[of(What::Gradient)], &[own], 1000);
                for (_, site, _) in alone.iter() {
                    let gradient = values(&alone.gradient(&of(What::Gradient), site).unwrap().sum_oi);
                    let sum = sums.entry(site.clone()).or_insert_with(|| vec![0.0; gradient.len()]);
                    sum.iter_mut().zip(gradient).for_each(|(sum, g)| *sum += g * g);
                }
            }
        }
        for site in linears(&base) {
            let found = stats.fisher(&of(What::Fisher), &site.id).unwrap();
            assert_eq!(found.examples, examples);
            assert!(agree(&values(&found.sum_oi), &sums[&site.id], 1e-6), "{} of {dtype:?}", site.id);
        }
    }
}

/// The bits do not depend on what else is measured, nor on how many rows go through the model together.
#[test]
fn squares_have_the_same_bits_whatever_goes_together() {
    let (base, data) = (base(LLAMA, DType::F32), data());
    let of = |what, examples| StatsRequest { what, examples, domains: None };
    let fisher = of(What::Fisher, 9);
    let alone = measured(&base, std::slice::from_ref(&fisher), &data, 1);
    let among = measured(&base, &[of(What::Gradient, 9), fisher.clone(), of(What::Fisher, 4)], &data, 1000);
    for site in linears(&base) {
        let [one, other] = [&alone, &among].map(|stats| stats.fisher(&fisher, &site.id).unwrap());
        assert_eq!((one.examples, other.examples), (9, 9));
        assert!(values(&one.sum_oi) == values(&other.sum_oi), "{}", site.id);
    }
}

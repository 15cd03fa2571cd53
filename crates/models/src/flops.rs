//! How many floating-point operations a pass needs, whatever it makes of them: the numerator of model FLOP utilisation.

use attune_points::{BankKind, Layout};

use crate::model::{Model, Pass};

impl Model {
    /// Floating-point operations of the loss of a pass and its gradient, a multiplication and an addition counted apart:
    /// each product forward and by its input, and by its weight where that trains; attention's gradient twice its forward;
    /// six for each trained number of a component and row. What is computed again to save memory is not counted.
    pub fn flops(&self, pass: &Pass<'_>) -> f64 {
        let architecture = self.base().architecture();
        let rows = pass.layout.n_rows().max(1) as f64;
        let [products, attention] = self.per_row(pass.layout);
        let trained = |kind: BankKind| -> f64 {
            let banks = pass.theta.banks.iter().filter(|bank| bank.kind == kind && bank.train);
            // Of several sets a row uses one.
            let sets = banks.filter_map(|bank| bank.sets.first());
            sets.flat_map(|set| set.iter()).map(|(_, tensor)| tensor.elem_count() as f64).sum()
        };
        let share = (trained(BankKind::Weights) / architecture.parameters() as f64).min(1.0);
        rows * ((2.0 + share) * products + 3.0 * attention + 6.0 * trained(BankKind::Adapter))
    }

    /// The same of the loss of a batch alone, without what components take.
    pub fn forward_flops(&self, layout: &Layout) -> f64 {
        layout.n_rows() as f64 * self.per_row(layout).into_iter().sum::<f64>()
    }

    /// Operations of a row forward: of products, and of attention.
    fn per_row(&self, layout: &Layout) -> [f64; 2] {
        let (architecture, rows) = (self.base().architecture(), layout.n_rows().max(1) as f64);
        let supervised = layout.counts().tokens as f64 / rows;
        let products = architecture.forward_flops_per_token(0.0, supervised);
        let context = pairs(layout, architecture.causal) / rows;
        [products, architecture.forward_flops_per_token(context, supervised) - products]
    }
}

/// Pairs of rows that see each other.
fn pairs(layout: &Layout, causal: bool) -> f64 {
    let of_doc = |rows: f64| if causal { rows * (rows + 1.0) / 2.0 } else { rows * rows };
    layout.docs().iter().map(|doc| of_doc(doc.n_rows() as f64)).sum()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use attune_architecture::Architecture;
    use attune_points::layout::{NO_LABEL, Row, Source};
    use attune_points::{Bank, Params, TensorName, Theta};
    use candle_core::{DType, Device, Tensor};

    use super::*;
    use crate::{Base, Stack};

    const CONFIG: &str = r#"{
        "model_type": "llama", "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 5, "max_position_embeddings": 8, "tie_word_embeddings": false
    }"#;

    /// By hand: 4×4 + 2×4 + 2×4 + 4×4 of attention and 3×6×4 of the MLP make 120 products a row, the head 20 for the one
    /// supervised row; three rows see 6 pairs, each 2 × 4 products forward.
    #[test]
    fn operations_are_those_counted_by_hand() {
        let base = Base::random(Architecture::from_json(CONFIG.as_bytes()).unwrap(), 1, DType::F32).unwrap();
        let parameters = base.architecture().parameters() as usize;
        let model = Model::new(base, Stack::default());
        let mut layout = Layout::new();
        layout.push(Source::default(), [(Row::Token(1), NO_LABEL), (Row::Token(2), NO_LABEL), (Row::Token(3), 4)]);
        let (products, attention) = (2.0 * (3.0 * 120.0 + 20.0), 2.0 * 6.0 * 8.0);
        let flops = |banks: Vec<Bank>| {
            let theta = Theta::single(banks);
            model.flops(&Pass { theta: &theta, layout: &layout, dropout: None })
        };
        let bank = |kind, n: usize| {
            let tensor = Tensor::zeros(n, DType::F32, &Device::Cpu).unwrap();
            let params: Params = [(TensorName::from_path("x"), tensor)].into_iter().collect();
            Bank { slot: "x".into(), kind, sets: vec![Arc::new(params)], train: true }
        };
        let near = |found: f64, expected: f64| assert!((found - expected).abs() < 1e-6, "{found} against {expected}");
        near(flops(Vec::new()), 2.0 * products + 3.0 * attention);
        near(model.forward_flops(&layout), products + attention);
        near(flops(vec![bank(BankKind::Weights, parameters)]), 3.0 * products + 3.0 * attention);
        near(flops(vec![bank(BankKind::Adapter, 10)]), 2.0 * products + 3.0 * attention + 6.0 * 10.0 * 3.0);
    }
}

//! Where a mixture of experts sends its rows, and losses on that.
//!
//! # Update
//! ```text
//! share_e   = rows of all layers that e is among the k likeliest of / N       N = layers × rows
//! prob_e    = sum of probs_te over rows and layers / N
//! balance   = E sum_e share_e prob_e                 least when both are even: then it is k
//! ```
//! The shares are counts and have no gradient: `d balance / d probs_te = E share_e / N`. Rows of different lanes are
//! counted apart.
//!
//! # Paper
//! Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity; William Fedus, Barret
//! Zoph, Noam Shazeer; 2021. As in Hugging Face's models, shares and probabilities are averaged over all layers first.

use std::collections::BTreeMap;

use attune_architecture::Architecture;
use attune_points::{Layout, Result};
use candle_core::{DType, Device, Tensor};

/// The routing of one layer in one pass.
#[derive(Debug, Clone)]
pub struct Routing {
    /// The layer.
    pub layer: u32,
    /// Each expert's probability for each row, `[T, E]`.
    pub probs_te: Tensor,
    /// Experts that each row goes through.
    pub per_token: usize,
}

impl Routing {
    /// The experts of each row, likeliest first, row after row: `T × K`.
    ///
    /// # Errors
    /// Probabilities that cannot be read.
    pub fn chosen(&self) -> Result<Vec<u32>> {
        likeliest(&self.probs_te, self.per_token)
    }
}

/// A loss on the routing of all layers, beside the objective's.
pub trait Auxiliary: Send + Sync {
    /// The loss as a sum over supervised rows: a mean over rows counts as often as rows are supervised, so that the scale
    /// that makes the objective's sum a mean does so here.
    ///
    /// # Errors
    /// Whatever its operations raise.
    fn loss(&self, routing: &[Routing], layout: &Layout) -> Result<AuxiliaryLoss>;
}

/// What an [`Auxiliary`] found.
#[derive(Debug, Clone)]
pub struct AuxiliaryLoss {
    /// The loss.
    pub loss_sum: f64,
    /// Its gradient by each layer's probabilities, `[T, E]`, in the order in which the routings came.
    pub dprobs: Vec<Tensor>,
}

/// The load-balancing loss times a coefficient.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoadBalance {
    /// What the loss is multiplied by.
    pub coefficient: f64,
}

impl LoadBalance {
    /// With the coefficient that the model's configuration names; `None` for a model without experts.
    pub fn of(architecture: &Architecture) -> Option<Self> {
        architecture.experts.map(|experts| Self { coefficient: experts.balance })
    }
}

/// Sums over one lane's rows and all layers.
#[derive(Default, Clone)]
struct Lane {
    rows: f64,
    supervised: f64,
    chosen_e: Vec<f64>,
    probs_e: Vec<f64>,
}

impl Auxiliary for LoadBalance {
    fn loss(&self, routing: &[Routing], layout: &Layout) -> Result<AuxiliaryLoss> {
        let lane_t: Vec<u16> =
            layout.docs().iter().flat_map(|doc| std::iter::repeat_n(doc.lane, doc.n_rows())).collect();
        let mut lanes: BTreeMap<u16, Lane> = BTreeMap::new();
        for row in layout.supervised() {
            lanes.entry(lane_t[row.row as usize]).or_default().supervised += 1.0;
        }
        for Routing { probs_te, per_token, .. } in routing {
            let (probs, experts) = (probs_te.to_dtype(DType::F64)?.to_vec2::<f64>()?, probs_te.dim(1)?);
            for ((lane, probs_e), chosen) in
                lane_t.iter().zip(&probs).zip(likeliest(probs_te, *per_token)?.chunks(*per_token))
            {
                let lane = lanes.entry(*lane).or_default();
                lane.chosen_e.resize(experts, 0.0);
                lane.probs_e.resize(experts, 0.0);
                lane.rows += 1.0;
                lane.probs_e.iter_mut().zip(probs_e).for_each(|(sum, prob)| *sum += prob);
                chosen.iter().for_each(|&expert| lane.chosen_e[expert as usize] += 1.0);
            }
        }
        let weight = |lane: &Lane| self.coefficient * lane.supervised * lane.chosen_e.len() as f64 / lane.rows;
        let loss = |lane: &Lane| -> f64 {
            let product: f64 = lane.chosen_e.iter().zip(&lane.probs_e).map(|(chosen, prob)| chosen * prob).sum();
            weight(lane) * product / lane.rows
        };
        let dprobs_te: Vec<f64> = lane_t
            .iter()
            .flat_map(|lane| {
                let lane = &lanes[lane];
                lane.chosen_e.iter().map(move |chosen| weight(lane) * chosen / lane.rows)
            })
            .collect();
        let dprobs = routing.iter().map(|Routing { probs_te, .. }| {
            Ok(Tensor::from_slice(&dprobs_te, probs_te.dims(), &Device::Cpu)?.to_dtype(probs_te.dtype())?)
        });
        Ok(AuxiliaryLoss { loss_sum: lanes.values().map(loss).sum(), dprobs: dprobs.collect::<Result<_>>()? })
    }
}

/// The `k` likeliest experts of each row, likeliest first; of equals the first.
pub(crate) fn likeliest(probs_te: &Tensor, k: usize) -> Result<Vec<u32>> {
    let probs = probs_te.detach().to_dtype(DType::F64)?.to_vec2::<f64>()?;
    Ok(likeliest_of(probs.into_iter(), k))
}

/// The same of rows of probabilities.
pub(crate) fn likeliest_of(rows: impl ExactSizeIterator<Item = Vec<f64>>, k: usize) -> Vec<u32> {
    let mut chosen = Vec::with_capacity(rows.len() * k);
    for probs_e in rows {
        let mut order: Vec<u32> = (0..probs_e.len() as u32).collect();
        // A stable sort leaves equals in their order.
        order.sort_by(|&a, &b| probs_e[b as usize].total_cmp(&probs_e[a as usize]));
        chosen.extend(&order[..k]);
    }
    chosen
}

#[cfg(test)]
mod tests {
    use attune_points::Row;
    use attune_points::layout::{NO_LABEL, Source};

    use super::*;

    fn routing(probs: &[[f64; 3]]) -> Routing {
        Routing {
            layer: 0,
            probs_te: Tensor::from_slice(probs.as_flattened(), (probs.len(), 3), &Device::Cpu).unwrap(),
            per_token: 2,
        }
    }

    #[test]
    fn the_likeliest_come_first_and_of_equals_the_first() {
        assert_eq!(routing(&[[0.2, 0.5, 0.3], [0.4, 0.2, 0.4]]).chosen().unwrap(), [1, 2, 0, 2]);
    }

    /// Two lanes of two rows, the second without a supervised row.
    #[test]
    fn balance_is_least_when_even_and_lanes_are_counted_apart() {
        let mut layout = Layout::new();
        layout.push(Source::default(), [(Row::Token(1), 2), (Row::Token(2), 3)]);
        layout.push(Source { lane: 1, ..Source::default() }, [(Row::Token(1), NO_LABEL), (Row::Token(2), NO_LABEL)]);
        let balance = LoadBalance { coefficient: 0.5 };
        let loss = |rows: &[[f64; 3]]| balance.loss(&[routing(rows)], &layout).unwrap();
        let uneven = loss(&[[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.0, 0.5, 0.5], [0.0, 0.5, 0.5]]);
        // E (2/2 (0.7 + 0.6)/2 + 2/2 (0.2 + 0.3)/2), half of it, for two supervised rows.
        assert!((uneven.loss_sum - 3.0 * (0.65 + 0.25)).abs() < 1e-12);
        let expected = [[1.5, 1.5, 0.0], [1.5, 1.5, 0.0], [0.0; 3], [0.0; 3]];
        assert_eq!(uneven.dprobs[0].to_vec2::<f64>().unwrap(), expected);
        let third = 1.0 / 3.0;
        let even = loss(&[[third; 3]; 4]);
        assert!((even.loss_sum - 2.0).abs() < 1e-12, "k times the coefficient times two rows");
    }
}

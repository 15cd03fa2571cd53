//! Gives more rank to the linears on whose weights the loss depends most, by the second derivative of what they answer on some
//! examples, before anything trains; for a fixed number of ranks over linears that matter unequally.
//!
//! # Update
//! ```text
//! H_ii = 2/T Σ_t x_t x_t^T                      q_oi = 1/2 H_ii W_oi²            the loss of answers if a weight were 0
//! F_oi = 1/E Σ_e (dL_e/dW_oi)²                  q_oi = 1/2 F_oi W_oi²            `curvature: fisher`: that of the job's loss
//! G = Σ q_oi  (`measure: inputs`: tr H)         the whole linear
//! T = Σ of the largest `top_share` of q / Σ q   how few weights hold it
//! E = exp(-Σ_k p_k ln p_k) / i                  effective rank of inputs, p the eigenvalues of H, or Σ_o F_oi, over their sum
//! S = w_G Ĝ + w_T T̂ + w_E Ê                     ^: over the mean of the linears of this shape
//! r = least + (R - N least) S / Σ S             rounded by largest remainders to Σ r = R = N rank, least <= r <= most
//! ```
//!
//! # Symbols
//! `x_t` what the linear reads, at the T rows that count; `W_oi` its weight; `L_e` the loss of one of E examples; N the linears of the
//! slot, `rank` the slot's own. The sums are in 64 bits.
//!
//! # Cost
//! One pass over `examples` examples, up to the last block with such a linear, and an eigendecomposition of an `i` by `i` matrix for each
//! of its inputs: queries, keys and values have one between them, and so do the halves of a gated MLP. While it is measured, four bytes for
//! each number of a covariance, and for each weight of one linear at a time. With `curvature: fisher` it is a pass forward and back for
//! each example by itself, and eight bytes for each weight of all its linears. What trains has N `rank` ranks as without it: as many
//! parameters where linears have one shape. A forecast counts `rank` everywhere.
//!
//! # Limits
//! Linears that score alike get `rank` each. What trains is the slot's method with `rank_pattern` and `alpha_pattern`, written as PEFT reads them; the factor on its products is `alpha / rank` everywhere.
//!
//! # Departures
//! The paper names its measures, a whole loss, the largest entries and the effective rank of second derivatives; how they are put
//! together here is our own. Scores are compared by the mean of their shape: `compare: by_range`, from the least to the largest, stretches
//! what differs by chance alone over the whole range, and a linear a hundred times as sensitive as others does not stand out by it.
//!
//! # Paper
//! Sensitivity-LoRA: Low-Load Sensitivity-Based Fine-Tuning for Large Language Models. Zhang et al., 2025.

use std::collections::BTreeMap;

use attune_points::adapter::{Attachment, WeightOf};
use attune_points::budget::{Budget, Share};
use attune_points::stats::{Covariance, Fisher, What};
use attune_points::{Result, Stats, StatsRequest};
use attune_spec::method::{BuildCx, Card, Method, Paper, Point};
use attune_spec::{Fault, FieldPath};
use attune_tensor::linalg;
use candle_core::{DType, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::calibration::{self, Rows};
use crate::parts::shares::{self, Shared};

/// What the loss of a whole linear is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Measure {
    /// The sum over its weights of what the loss would be without each.
    #[default]
    Weights,
    /// The trace of the second derivative, which its inputs alone make.
    Inputs,
}

/// What a score is compared with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Compare {
    /// The mean of the linears of its shape.
    #[default]
    ByMean,
    /// The least and the largest of them, as 0 and 1.
    ByRange,
}

/// Which second derivative is looked at.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Curvature {
    /// That of the squares of what a linear answers, which its inputs make.
    #[default]
    Inputs,
    /// That of the job's loss, by the squares of its gradients: the diagonal of the empirical Fisher information.
    Fisher,
}

/// Parameters of the budget.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// How many examples of the training data are looked at, the first ones that are trained on.
    #[schemars(range(min = 1, max = 1_000_000))]
    examples: u64,
    /// Which second derivative is looked at.
    curvature: Curvature,
    /// Which of their rows count; with `curvature: fisher` those that are learned, whatever stands here.
    rows: Rows,
    /// The least rank of a linear.
    #[schemars(range(min = 1, max = 4096))]
    least: u32,
    /// The largest one; four times the slot's if left out.
    #[schemars(range(min = 1, max = 4096))]
    most: Option<u32>,
    /// What the loss of a whole linear is.
    measure: Measure,
    /// What a score is compared with.
    compare: Compare,
    /// Weight of the loss of a whole linear in its score.
    #[schemars(range(min = 0.0, max = 1e6))]
    global_weight: f64,
    /// Weight of the share that its most sensitive weights have of that loss.
    #[schemars(range(min = 0.0, max = 1e6))]
    top_weight: f64,
    /// Weight of the effective rank of its inputs.
    #[schemars(range(min = 0.0, max = 1e6))]
    effective_rank_weight: f64,
    /// Share of the weights that are counted as the most sensitive ones.
    #[schemars(range(min = 1e-6, max = 1.0))]
    top_share: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            examples: 128,
            curvature: Curvature::default(),
            rows: Rows::Tokens,
            least: 2,
            most: None,
            measure: Measure::default(),
            compare: Compare::default(),
            global_weight: 0.5,
            top_weight: 0.25,
            effective_rank_weight: 0.25,
            top_share: 0.01,
        }
    }
}

pub(super) struct SensitivityLora {
    config: Config,
    request: StatsRequest,
}

impl Method for SensitivityLora {
    const CARD: Card = Card {
        paper: Some(Paper {
            title: "Sensitivity-LoRA: Low-Load Sensitivity-Based Fine-Tuning for Large Language Models",
            authors: "Hao Zhang, Bo Huang, Zhenjia Li, Xi Xiao, Hui Yi Leong, Zumeng Zhang, Xinwei Long, Tianyang Wang, Hao Xu",
            year: 2025,
        }),
        input_statistics: "if(curvature == \"inputs\", 4*i*(i+3), 0)",
        weight_statistics: "if(curvature == \"fisher\", 8*i*o, 0)",
        ..Card::new(
            "sensitivity-lora",
            Point::Budget,
            "Gives more rank to the linears on whose weights the loss depends most, by the second derivative of what they answer on \
             some examples, before anything trains; for a fixed number of ranks over linears that matter unequally.",
        )
    };
    type Config = Config;
    type Object = dyn Budget;

    fn build(config: Config, _: &BuildCx<'_>) -> std::result::Result<Box<dyn Budget>, Vec<Fault>> {
        let mut faults = Vec::new();
        if let Some(most) = config.most.filter(|most| *most < config.least) {
            let message = format!("is {most}; expected at least `least`, {}", config.least);
            faults.push(Fault::new("most", message));
        }
        if config.global_weight + config.top_weight + config.effective_rank_weight <= 0.0 {
            let message = "is 0, and so are the weights of all else; expected one above";
            faults.push(Fault::new(FieldPath::from("global_weight"), message));
        }
        if !faults.is_empty() {
            return Err(faults);
        }
        let what = match config.curvature {
            Curvature::Inputs => What::InputCovariance { rows: config.rows.counted(), scaled: false },
            Curvature::Fisher => What::Fisher,
        };
        let request = StatsRequest { what, examples: config.examples, domains: None };
        Ok(Box::new(Self { config, request }))
    }
}

impl Budget for SensitivityLora {
    fn calibrate(&self) -> Vec<StatsRequest> {
        vec![self.request.clone()]
    }

    fn share(&self, mean: u32, at: &[Attachment], weight: &WeightOf<'_, '_>, stats: &Stats) -> Result<Vec<Share>> {
        let found = at.iter().map(|at| self.found(at, stats)).collect::<Result<Vec<_>>>()?;
        let effective = effective_ranks(&found)?;
        let mut linears = Vec::with_capacity(at.len());
        // A linear's sensitivities are as large as its weight: one at a time.
        for ((at, found), effective_rank) in at.iter().zip(&found).zip(effective) {
            let weight = weight(at)?;
            let curvature = found.curvature()?;
            let (loss, top_share) = sensitivities(&weight.dense(DType::F32)?, &curvature, self.config.top_share)?;
            let global = match self.config.measure {
                Measure::Weights => loss,
                Measure::Inputs => curvature.iter().sum(),
            };
            let name = at.site.as_str();
            linears.push(Linear { name, shape: weight.shape(), values: [global, top_share, effective_rank] });
        }
        let scores = scores(&linears, &self.config);
        let shared = Shared { mean, least: self.config.least, most: self.config.most };
        let among: Vec<_> = linears.iter().map(|linear| (linear.name, linear.shape)).collect();
        let ranks = shared.among(&among, &scores)?;
        let share = |((linear, score), rank): ((&Linear<'_>, f64), u32)| {
            let [sensitivity, top_share, effective_rank] = linear.values;
            let scores = vec![
                ("sensitivity", sensitivity),
                ("top_share", top_share),
                ("effective_rank", effective_rank),
                ("score", score),
            ];
            Share { rank, scores }
        };
        Ok(linears.iter().zip(scores).zip(ranks).map(share).collect())
    }
}

/// What was found at a linear: the loss of the whole, the share of its most sensitive weights, the effective rank of its inputs.
struct Linear<'a> {
    name: &'a str,
    shape: (usize, usize),
    values: [f64; 3],
}

impl SensitivityLora {
    fn found<'s>(&self, at: &Attachment, stats: &'s Stats) -> Result<Found<'s>> {
        Ok(match self.config.curvature {
            Curvature::Inputs => Found::Inputs(stats.covariance(&self.request, &at.site)?),
            Curvature::Fisher => Found::Fisher(stats.fisher(&self.request, &at.site)?),
        })
    }
}

/// What was measured at a linear.
#[derive(Clone, Copy)]
enum Found<'s> {
    Inputs(&'s Covariance),
    Fisher(&'s Fisher),
}

impl Found<'_> {
    /// The diagonal of the second derivative by the weight: of `1/T Σ_t |W x_t - y_t|²` by one row of it, `2/T Σ_t x_t²`, which is that
    /// of every row; or that of the loss by every entry, row after row.
    fn curvature(&self) -> Result<Vec<f64>> {
        match self {
            Self::Inputs(found) => {
                let width = found.sum_ii.dim(0)?;
                let values = found.sum_ii.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
                Ok((0..width).map(|i| 2.0 * values[i * (width + 1)] / found.rows as f64).collect())
            }
            Self::Fisher(found) => {
                let sum = found.sum_oi.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
                Ok(sum.into_iter().map(|square| square / found.examples as f64).collect())
            }
        }
    }

    /// The tensor that linears share which read the same rows.
    fn tensor(&self) -> &Tensor {
        match self {
            Self::Inputs(found) => &found.sum_ii,
            Self::Fisher(found) => &found.sum_oi,
        }
    }

    /// How much there is in each direction of the inputs; those that are 0 come out a little beside it.
    fn directions(&self) -> Result<Vec<f64>> {
        match self {
            Self::Inputs(found) => Ok(linalg::eigen(&found.sum_ii.to_dtype(DType::F64)?)?.values.to_vec1()?),
            Self::Fisher(found) => Ok(found.sum_oi.to_dtype(DType::F64)?.sum(0)?.to_vec1()?),
        }
    }
}

/// The sum of `1/2 H W_oi²`, and the share that its largest entries have of it: this share of them, at least one. `h` is that of a row,
/// or of every entry.
fn sensitivities(w_oi: &Tensor, h: &[f64], top: f64) -> Result<(f64, f64)> {
    let mut q = w_oi.flatten_all()?.to_vec1::<f32>()?;
    let mut all = 0.0;
    for row in q.chunks_mut(h.len().max(1)) {
        for (entry, h) in row.iter_mut().zip(h) {
            let sensitivity = 0.5 * h * f64::from(*entry).powi(2);
            all += sensitivity;
            *entry = sensitivity as f32;
        }
    }
    if all <= 0.0 {
        return Ok((0.0, 0.0));
    }
    let count = ((top * q.len() as f64).ceil() as usize).clamp(1, q.len());
    q.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a));
    // What is largest is known, and not in which order it comes: the sum is made in one of its own.
    let top = &mut q[..count];
    top.sort_unstable_by(f32::total_cmp);
    Ok((all, top.iter().map(|entry| f64::from(*entry)).sum::<f64>() / all))
}

/// How many directions inputs vary in alike, over how many there are. Linears that read the same rows have it between them.
fn effective_ranks(found: &[Found<'_>]) -> Result<Vec<f64>> {
    calibration::once_for_each(
        found,
        |found| found.tensor().id(),
        |found| {
            let values = found.directions()?;
            let sum: f64 = values.iter().filter(|value| **value > 0.0).sum();
            let parts = values.iter().map(|value| value / sum).filter(|part| *part > 0.0);
            let entropy: f64 = parts.map(|part| -part * part.ln()).sum();
            Ok(if sum > 0.0 { entropy.exp() / values.len() as f64 } else { 0.0 })
        },
    )
}

/// What each linear scores.
fn scores(linears: &[Linear<'_>], config: &Config) -> Vec<f64> {
    let mut alike: BTreeMap<(usize, usize), Vec<[f64; 3]>> = BTreeMap::new();
    linears.iter().for_each(|linear| alike.entry(linear.shape).or_default().push(linear.values));
    let compared = |linear: &Linear<'_>, which: usize| {
        let values = || alike[&linear.shape].iter().map(|values| values[which]);
        let value = linear.values[which];
        match config.compare {
            Compare::ByMean => {
                let mean = shares::sum(values()) / values().count() as f64;
                if mean > 0.0 { value / mean } else { 1.0 }
            }
            Compare::ByRange => {
                let (least, most) = (values().fold(f64::MAX, f64::min), values().fold(f64::MIN, f64::max));
                // Where all are the same, none is the least.
                if most > least { (value - least) / (most - least) } else { 0.5 }
            }
        }
    };
    let weights = [config.global_weight, config.top_weight, config.effective_rank_weight];
    let score =
        |linear: &Linear<'_>| weights.iter().zip(0..).map(|(weight, which)| weight * compared(linear, which)).sum();
    linears.iter().map(score).collect()
}

#[cfg(test)]
mod tests {
    use attune_points::stats::Stat;
    use attune_points::{TensorSpec, Weight};
    use attune_tensor::Rng;
    use candle_core::Device;

    use super::*;

    fn normal(name: &str, shape: (usize, usize), std: f64) -> Tensor {
        Rng::new(3, name).normal_tensor(shape, std, DType::F64).unwrap()
    }

    fn number(tensor: &Tensor) -> f64 {
        tensor.to_dtype(DType::F64).unwrap().sum_all().unwrap().to_scalar().unwrap()
    }

    /// Linears with their weights and what they read.
    #[derive(Default)]
    struct Toy {
        names: Vec<String>,
        weights: BTreeMap<String, Tensor>,
        rows: BTreeMap<String, Tensor>,
    }

    impl Toy {
        fn with(mut self, name: &str, w_oi: &Tensor, x_ti: Tensor) -> Self {
            self.names.push(name.to_owned());
            self.weights.insert(name.to_owned(), w_oi.to_dtype(DType::F32).unwrap());
            self.rows.insert(name.to_owned(), x_ti);
            self
        }

        /// Many that differ by chance alone.
        fn alike(count: usize, rows: usize) -> Self {
            let of = |toy: Self, at: usize| {
                let (w, x) = (normal(&format!("w{at}"), (24, 20), 1.0), normal(&format!("x{at}"), (rows, 20), 1.0));
                toy.with(&format!("{at:02}"), &w, x)
            };
            (0..count).fold(Self::default(), of)
        }

        fn covariance(x_ti: &Tensor) -> Covariance {
            let sum_ii = x_ti.t().unwrap().matmul(x_ti).unwrap().to_dtype(DType::F32).unwrap();
            Covariance { sum_ii, sum_i: x_ti.sum(0).unwrap(), rows: x_ti.dim(0).unwrap() as u64, documents: 1 }
        }

        fn ranks(&self, mean: u32, config: Config) -> Result<Vec<u32>> {
            let budget =
                SensitivityLora::build(config, &BuildCx { steps: attune_spec::id::Step(1), domains: &[], words: None });
            let budget = budget.unwrap();
            let mut stats = Stats::none();
            let attachment = |name: &String| {
                let (o, i) = Weight::shape(&self.weights[name]);
                let rank = mean as usize;
                let tensors = vec![TensorSpec::trained("a", [rank, i]), TensorSpec::trained("b", [o, rank])];
                Attachment { site: attune_architecture::SiteId::new(name.clone()), tensors }
            };
            let at: Vec<Attachment> = self.names.iter().map(attachment).collect();
            for at in &at {
                let found = Self::covariance(&self.rows[at.site.as_str()]);
                stats.insert(budget.calibrate().remove(0), at.site.clone(), Stat::Covariance(found));
            }
            let weight = |at: &Attachment| Ok(Box::new(self.weights[at.site.as_str()].clone()) as Box<dyn Weight>);
            Ok(budget.share(mean, &at, &weight, &stats)?.into_iter().map(|share| share.rank).collect())
        }
    }

    /// A linear that answers as it does, without one of its weights: the mean of squares off is that weight's sensitivity, and the
    /// second difference of it by the weight is the second derivative.
    #[test]
    fn the_second_derivative_is_that_of_a_linear_s_squared_error() {
        let (x_ti, w_oi) = (normal("x", (50, 6), 1.3), normal("w", (4, 6), 0.7));
        let w_oi = w_oi.to_dtype(DType::F32).unwrap().to_dtype(DType::F64).unwrap();
        let y_to = x_ti.matmul(&w_oi.t().unwrap()).unwrap();
        let found = Toy::covariance(&x_ti);
        let h_i = Found::Inputs(&found).curvature().unwrap();
        let values = w_oi.to_vec2::<f64>().unwrap();
        let loss = |o: usize, i: usize, moved: f64| {
            let mut at = values.clone();
            at[o][i] += moved;
            let w = Tensor::new(at, &Device::Cpu).unwrap();
            number(&(x_ti.matmul(&w.t().unwrap()).unwrap() - &y_to).unwrap().sqr().unwrap()) / 50.0
        };
        let mut all = 0.0;
        for (o, row) in values.iter().enumerate() {
            for (i, value) in row.iter().enumerate() {
                let second = loss(o, i, 0.5) - 2.0 * loss(o, i, 0.0) + loss(o, i, -0.5);
                assert!((second / 0.25 - h_i[i]).abs() < 1e-5 * h_i[i], "{second} at {o}, {i}");
                let without = loss(o, i, -value);
                assert!((without - 0.5 * h_i[i] * value * value).abs() < 1e-5 * (1e-3 + without));
                all += without;
            }
        }
        let (sum, top) = sensitivities(&w_oi.to_dtype(DType::F32).unwrap(), &h_i, 1.0 / 24.0).unwrap();
        assert!((sum / all - 1.0).abs() < 1e-5, "{sum} of {all}");
        let largest =
            values.iter().flat_map(|row| row.iter().zip(&h_i)).map(|(w, h)| 0.5 * h * w * w).fold(0.0, f64::max);
        assert!((top - largest / all).abs() < 1e-5, "one of 24 entries");
    }

    /// A logistic unit: what its weights' squared gradients say is what the second derivative of its expected loss is.
    #[test]
    fn squared_gradients_are_the_second_derivative_of_a_loss_of_likelihood() {
        let (x_ti, w_oi) = (normal("x", (4000, 3), 1.0), normal("w", (1, 3), 0.6));
        let rows = x_ti.to_vec2::<f64>().unwrap();
        let w = w_oi.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let p = |x: &[f64]| 1.0 / (1.0 + (-x.iter().zip(&w).map(|(x, w)| x * w).sum::<f64>()).exp());
        let mut rng = Rng::new(2, "answers");
        let (mut squares, mut second) = (vec![0.0; 3], vec![0.0; 3]);
        for x in &rows {
            let (p, answer) = (p(x), if rng.uniform() < p(x) { 1.0 } else { 0.0 });
            for (i, x) in x.iter().enumerate() {
                squares[i] += ((p - answer) * x).powi(2);
                second[i] += p * (1.0 - p) * x * x / rows.len() as f64;
            }
        }
        let fisher =
            Fisher { sum_oi: Tensor::new(squares, &Device::Cpu).unwrap().reshape((1, 3)).unwrap(), examples: 4000 };
        let found = Found::Fisher(&fisher).curvature().unwrap();
        for (found, second) in found.iter().zip(&second) {
            assert!((found / second - 1.0).abs() < 0.1, "{found} {second}");
        }
        let (sum, top) = sensitivities(&w_oi.to_dtype(DType::F32).unwrap(), &found, 0.3).unwrap();
        let q: Vec<f64> = found.iter().zip(&w).map(|(f, w)| 0.5 * f * w * w).collect();
        assert!(
            (sum - q.iter().sum::<f64>()).abs() < 1e-6
                && (top - q.iter().fold(0.0, |a: f64, b| a.max(*b)) / sum).abs() < 1e-5
        );
    }

    #[test]
    fn directions_that_inputs_vary_in_alike_are_counted() {
        let eye = |n: usize| Tensor::eye(n, DType::F64, &Device::Cpu).unwrap();
        let four = (eye(8) * 3.0).unwrap().narrow(0, 0, 4).unwrap();
        let found = [eye(8), four].map(|x| Toy::covariance(&x));
        let [eight, four] = [0, 1].map(|which| Found::Inputs(&found[which]));
        let ranks = effective_ranks(&[eight, four, eight]).unwrap();
        for (found, expected) in ranks.iter().zip([1.0, 0.5, 1.0]) {
            assert!((found - expected).abs() < 1e-9, "{ranks:?}");
        }
    }

    #[test]
    fn equal_scores_give_equal_ranks() {
        let (w, x) = (normal("w", (24, 20), 1.0), normal("x", (90, 20), 1.0));
        for config in [Config::default(), Config { compare: Compare::ByRange, ..Config::default() }] {
            let toy = (0..7).fold(Toy::default(), |toy, at| toy.with(&at.to_string(), &w, x.clone()));
            assert_eq!(toy.ranks(8, config).unwrap(), [8; 7]);
        }
        assert_eq!(Toy::alike(1, 40).ranks(5, Config::default()).unwrap(), [5], "one has all");
    }

    #[test]
    fn what_is_a_hundred_times_as_sensitive_has_the_largest_rank() {
        let mut toy = Toy::alike(14, 200);
        toy.weights.insert("05".to_owned(), (&toy.weights["05"] * 10.0).unwrap());
        let ranks = toy.ranks(4, Config::default()).unwrap();
        assert_eq!(ranks[5], 16, "{ranks:?}");
        assert!(ranks.iter().enumerate().all(|(at, rank)| at == 5 || *rank <= 4), "{ranks:?}");
        // By what is read, its weight does not matter.
        let by_inputs = toy.ranks(4, Config { measure: Measure::Inputs, ..Config::default() }).unwrap();
        assert!(by_inputs[5] < 6, "{by_inputs:?}");
        // Stretched over their range, differences by chance weigh as much.
        let by_range = toy.ranks(4, Config { compare: Compare::ByRange, ..Config::default() }).unwrap();
        assert!(by_range[5] < 16, "{by_range:?}");
    }

    #[test]
    fn ranks_go_with_linears_in_whatever_order_these_come() {
        for config in [Config::default(), Config { compare: Compare::ByRange, ..Config::default() }] {
            let toy = Toy::alike(11, 30);
            let ranks = toy.ranks(6, config.clone()).unwrap();
            assert!(ranks.iter().any(|rank| *rank != ranks[0]), "{ranks:?}");
            // The same under other names, in another order: ranks go with what a linear is.
            let order = [7usize, 3, 10, 0, 5, 1, 9, 2, 8, 6, 4];
            let moved = order.iter().enumerate().fold(Toy::default(), |moved, (at, from)| {
                let from = format!("{from:02}");
                moved.with(&format!("{at:02}"), &toy.weights[&from], toy.rows[&from].clone())
            });
            let expected: Vec<u32> = order.iter().map(|from| ranks[*from]).collect();
            assert_eq!(moved.ranks(6, config).unwrap(), expected);
        }
    }

    /// Two halves of what one source gives.
    #[test]
    fn two_sets_of_examples_of_a_source_say_nearly_the_same() {
        let mut halves = [Toy::default(), Toy::default()];
        for at in 0..12 {
            // Each varies in other directions, and by another size.
            let directions = normal(&format!("d{at}"), (20, 20), 0.1 * f64::from(at + 3));
            let w = normal(&format!("w{at}"), (24, 20), 1.0);
            halves = std::array::from_fn(|half| {
                let x = normal(&format!("x{at}/{half}"), (3000, 20), 1.0).matmul(&directions).unwrap();
                std::mem::take(&mut halves[half]).with(&format!("{at:02}"), &w, x)
            });
        }
        let [one, other] = halves.map(|toy| toy.ranks(8, Config::default()).unwrap());
        assert!(one.iter().zip(&other).all(|(a, b)| a.abs_diff(*b) <= 1), "{one:?} and {other:?}");
        assert!(one[0] < 6 && one[11] > 11, "what varies more has more: {one:?}");
    }

    /// What the best change of each rank leaves of what a linear answers, over all linears: equal ranks leave more of it.
    #[test]
    fn ranks_by_sensitivity_reach_more_of_the_answers_than_equal_ranks() {
        let mut toy = Toy::alike(10, 400);
        for (at, name) in toy.names.clone().iter().enumerate() {
            toy.rows.insert(name.clone(), (&toy.rows[name] * 1.3f64.powi(at as i32)).unwrap());
        }
        let left = |ranks: &[u32]| -> f64 {
            let of = |(name, rank): (&String, &u32)| {
                let w = toy.weights[name].to_dtype(DType::F64).unwrap();
                let y = toy.rows[name].matmul(&w.t().unwrap()).unwrap();
                let s = linalg::svd(&y).unwrap().s.to_vec1::<f64>().unwrap();
                s[*rank as usize..].iter().map(|s| s * s).sum::<f64>() / 400.0
            };
            toy.names.iter().zip(ranks).map(of).sum()
        };
        let ranks = toy.ranks(6, Config::default()).unwrap();
        let (shared, equal) = (left(&ranks), left(&[6; 10]));
        assert!(shared < 0.85 * equal, "{shared} is left with {ranks:?}, {equal} with equal ranks");
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let toy = Toy::alike(3, 30);
        let error = toy.ranks(1, Config::default()).unwrap_err().to_string();
        assert!(error.contains("ranks are 1 on average; expected a rank from `least`, 2, to `most`, 4"), "{error}");
        let error = toy.ranks(21, Config::default()).unwrap_err().to_string();
        assert!(error.contains("rank 21 is beyond what 00, 24 by 20, can have"), "{error}");
        let cx = BuildCx { steps: attune_spec::id::Step(1), domains: &[], words: None };
        for (config, field) in [
            (Config { least: 5, most: Some(4), ..Config::default() }, "most"),
            (
                Config { global_weight: 0.0, top_weight: 0.0, effective_rank_weight: 0.0, ..Config::default() },
                "global_weight",
            ),
        ] {
            let faults = SensitivityLora::build(config, &cx).err().unwrap();
            assert_eq!(faults[0].path.to_string(), field);
        }
    }
}

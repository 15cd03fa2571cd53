//! A library of LoRAs that were trained one by one, of which each row is sent to those that look its way: nothing trains, and no
//! data of the new task is needed.
//!
//! # Update
//! ```text
//! D_n   = Δ_n - mean_g Δ_g                    Δ: what an adapter adds to the weight; g: those of general knowledge, if there are any
//! v_n   = the first right singular vector of D_n
//! s_tn  = |v_n · x_t|
//! ω_t   = softmax over the k largest of s_t / τ, 0 for the others
//! y_to  = x_ti W_oi^T + Σ_n ω_tn (z_tn - mean_g z_tg)             z: what an adapter would add for the row
//! ```
//!
//! # Symbols
//! `prototypes` `[n, i]` holds the v_n, f32, fixed. `top_k` is k, `temperature` τ. The adapters are those of slots before this one at the
//! same linear, the last `general` of them those of general knowledge.
//!
//! # Cost
//! No trained parameter; `n i` numbers per linear. Every adapter sees every row, and `2 n i` extra FLOPs per token forward.
//!
//! # Limits
//! With one adapter it is that adapter. It depends neither on the order of the adapters nor on the signs of singular vectors. An adapter
//! that adds nothing has no direction and scores 0.
//!
//! # Departures
//! Directions are exact where PEFT's are those of 15 steps of power iteration from a random start. General knowledge is taken out of changes
//! of weights; PEFT takes the mean of factors out of factors, whose product is another. All adapters are at each of its linears.
//!
//! # Paper
//! Towards Modular LLMs by Building and Reusing a Library of LoRAs. Ostapenko et al., 2024. General knowledge: GenKnowSub: Improving
//! Modularity and Reusability of LLMs through General Knowledge Subtraction. Bagherifard et al., 2025.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, BlendMap, Blended, Merged, Peft, Port, RowCx};
use attune_points::{Error, Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, Paper, Point, Rule, SiteKind};
use attune_tensor::rng::Rng;
use attune_tensor::{linalg, ops};
use candle_core::{DType, Device, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::starts::{self, Start};
use crate::parts::{linears, mixing, own};

const PROTOTYPES: &str = "prototypes";

/// Parameters of Arrow.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Adapters that it sends rows to, those of general knowledge among them: as many slots before it add to each of its linears.
    #[schemars(range(min = 1, max = 1024))]
    adapters: u32,
    /// How many of them, the last ones, are of general knowledge, which is taken out of the others.
    #[schemars(range(min = 0, max = 1023))]
    general: u32,
    /// Adapters that a row is sent to; 0 for all.
    #[schemars(range(min = 0, max = 1024))]
    top_k: u32,
    /// What scores are divided by.
    #[schemars(range(min = 1e-6, max = 1e6))]
    temperature: f64,
}

impl Default for Config {
    /// The paper's temperature, and all of two adapters.
    fn default() -> Self {
        Self { adapters: 2, general: 0, top_k: 0, temperature: 1.0 }
    }
}

pub(super) struct Arrow {
    config: Config,
}

impl Method for Arrow {
    const CARD: Card = Card {
        category: Some(Category::Hybrid),
        paper: Some(Paper {
            title: "Towards Modular LLMs by Building and Reusing a Library of LoRAs",
            authors: "Oleksiy Ostapenko, Zhan Su, Edoardo Maria Ponti, Laurent Charlin, Nicolas Le Roux, et al.",
            year: 2024,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "0",
        moves: Some("the adapters that it sends rows to are there from the start"),
        merges: Merges::No,
        rules: &[
            Rule {
                when: "true",
                require: "general < adapters",
                message: "leaves no adapter to send rows to; expected fewer than `adapters`",
                path: "general",
            },
            Rule {
                when: "true",
                require: "top_k <= adapters - general",
                message: "is more than there are to send rows to; expected `adapters` less `general` at most",
                path: "top_k",
            },
        ],
        ..Card::new(
            "arrow",
            Point::Adapter,
            "Sends each row to those of some trained LoRAs whose own direction it has, without any training: where a library of LoRAs \
             shall serve tasks that none of them was made for.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Arrow {
    /// How many adapters rows are sent to, and how many are of general knowledge.
    const fn parted(&self) -> (usize, usize) {
        let Config { adapters, general, .. } = self.config;
        (adapters.saturating_sub(general) as usize, general as usize)
    }

    /// How much of each adapter each row gets, `[T, N]`.
    fn shares(&self, x_ti: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        let Config { top_k, temperature, .. } = self.config;
        let s_tn = (ops::linear(x_ti, tensors.get(PROTOTYPES)?, None)?.abs()? / temperature)?;
        match top_k as usize {
            0 => Ok(ops::softmax(&s_tn)?),
            k => mixing::softmax(&s_tn, &mixing::largest(&s_tn, k)?),
        }
    }
}

impl Adapter for Arrow {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let (routed, _) = self.parted();
        linears::attach(sites, |_, _, input| Ok(vec![TensorSpec::fixed(PROTOTYPES, [routed, input])]))
    }

    /// No direction of any, until what it blends is known.
    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        starts::each(at, rng, |_| Start::Constant(0.0))
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Blend(self)
    }

    fn merge(&self, _: &Attachment, _: &Locals, _: &dyn Weight) -> attune_points::Result<Merged> {
        Ok(Merged::No("each row is sent by itself"))
    }

    fn peft(&self) -> Option<Peft> {
        Some(own::peft(Self::CARD.name, &self.config))
    }
}

/// Terms of a change of a weight, `left right`, `[o, r]` and `[r, i]` in f64.
type Terms = (Vec<Tensor>, Vec<Tensor>);

/// What an adapter adds to a weight as a term.
fn term(at: &Attachment, change: &Merged, factor: f64) -> attune_points::Result<(Tensor, Tensor)> {
    match change {
        Merged::Factors { left, right, scale } => {
            Ok(((left.to_dtype(DType::F64)? * (scale * factor))?, right.to_dtype(DType::F64)?))
        }
        _ => Err(Error::Refused(format!(
            "what is added at {} is no product of two factors, so it has no direction to send rows by: expected LoRAs",
            at.site
        ))),
    }
}

/// The first right singular vector of a sum of terms, `[1, i]`; zeros if the sum is nothing.
fn direction((left, right): &Terms) -> attune_points::Result<Tensor> {
    let (left_or, right_ri) = (Tensor::cat(left, 1)?, Tensor::cat(right, 0)?);
    // With orthonormal rows q of the second factor, left right = (left t) q, and its vectors are those of the small matrix, turned.
    let (q_ik, t_kr) = linalg::qr(&right_ri.t()?.contiguous()?)?;
    let small = linalg::svd(&ops::matmul(&left_or, &t_kr.t()?.contiguous()?)?)?;
    let largest = small.s.get(0)?.to_scalar::<f64>()?;
    if largest == 0.0 {
        return Ok(Tensor::zeros((1, right_ri.dim(1)?), DType::F64, &Device::Cpu)?);
    }
    Ok(ops::matmul(&small.v.narrow(0, 0, 1)?.contiguous()?, &q_ik.t()?.contiguous()?)?)
}

impl BlendMap for Arrow {
    fn blends(&self) -> usize {
        self.config.adapters as usize
    }

    fn made_of(&self, at: &Attachment, blended: &[Merged]) -> attune_points::Result<Option<Locals>> {
        let (routed, general) = self.parted();
        if blended.len() != routed + general {
            let message = format!("{} adapters add to {}; expected {}", blended.len(), at.site, routed + general);
            return Err(Error::Refused(message));
        }
        let (tasks, general) = blended.split_at(routed);
        let of_general = general.iter().map(|change| term(at, change, -1.0 / general.len() as f64));
        let of_general = of_general.collect::<attune_points::Result<Vec<_>>>()?;
        let directions = tasks.iter().map(|task| {
            let terms: Terms = std::iter::once(term(at, task, 1.0)?).chain(of_general.iter().cloned()).unzip();
            direction(&terms)
        });
        let directions = directions.collect::<attune_points::Result<Vec<_>>>()?;
        let prototypes = Tensor::cat(&directions, 0)?.to_dtype(DType::F32)?;
        Ok(Some(Locals::new(at.site.as_str(), [(PROTOTYPES, prototypes)])))
    }

    fn graph(&self, of: &Blended<'_>, tensors: &Locals, _: &RowCx<'_>) -> attune_points::Result<Tensor> {
        mixing::check(self, of)?;
        let (tasks, general) = of.added.split_at(self.parted().0);
        let mixed_to = mixing::mixed(&self.shares(of.x_ti, tensors)?, tasks)?;
        // Shares add up to 1, so that what all have taken out is taken out once.
        let Some((first, others)) = general.split_first() else { return Ok(mixed_to) };
        let sum_to = others.iter().try_fold(first.clone(), |sum, z_to| sum + z_to)?;
        Ok((mixed_to - (sum_to / general.len() as f64)?)?)
    }
}

#[cfg(test)]
mod tests {
    use attune_architecture::SiteId;
    use attune_points::Layout;

    use super::*;

    const INPUT: usize = 7;
    const OUTPUT: usize = 5;

    fn random(name: &str, shape: &[usize]) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap()
    }

    /// A change of rank 2.
    fn change(name: &str) -> Merged {
        let (left, right) = (format!("{name} left"), format!("{name} right"));
        Merged::Factors { left: random(&left, &[OUTPUT, 2]), right: random(&right, &[2, INPUT]), scale: 0.5 }
    }

    fn dense(change: &Merged) -> Tensor {
        let Merged::Factors { left, right, scale } = change else { panic!("a product of factors") };
        (left.matmul(right).unwrap() * *scale).unwrap()
    }

    fn arrow(adapters: u32, general: u32, top_k: u32) -> Arrow {
        Arrow { config: Config { adapters, general, top_k, temperature: 0.7 } }
    }

    fn at() -> Attachment {
        Attachment { site: SiteId::from("q_proj"), tensors: Vec::new() }
    }

    fn prototypes(of: &Arrow, changes: &[Merged]) -> Tensor {
        let made = of.made_of(&at(), changes).unwrap().unwrap();
        made.get(PROTOTYPES).unwrap().to_dtype(DType::F64).unwrap()
    }

    /// What it adds for rows, with the directions of these changes.
    fn blended(of: &Arrow, changes: &[Merged], x_ti: &Tensor) -> Tensor {
        let added: Vec<Tensor> =
            changes.iter().map(|change| ops::linear(x_ti, &dense(change), None).unwrap()).collect();
        let tensors = Locals::new("q_proj", [(PROTOTYPES, prototypes(of, changes))]);
        let (site, layout) = (SiteId::from("q_proj"), Layout::new());
        let cx = RowCx { site: &site, output: OUTPUT, dropout: None, layout: &layout, rows: None };
        of.graph(&Blended { x_ti, added: &added, base_td: None }, &tensors, &cx).unwrap()
    }

    fn off(a: &Tensor, b: &Tensor) -> f64 {
        (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    #[test]
    fn directions_are_the_first_right_singular_vectors_of_changes_less_the_general_one() {
        let changes = ["a", "b", "g", "h"].map(change);
        for general in [0, 2] {
            let found = prototypes(&arrow(4, general, 0), &changes);
            let mean = ((dense(&changes[2]) + dense(&changes[3])).unwrap() * 0.5).unwrap();
            for (n, change) in changes[..2].iter().enumerate() {
                let own = dense(change);
                let own = if general == 0 { own } else { (own - &mean).unwrap() };
                let expected = linalg::svd(&own).unwrap().v.narrow(0, 0, 1).unwrap();
                let found = found.narrow(0, n, 1).unwrap();
                // Up to the sign, and the precision of 32 bits in which they are kept.
                let aligned = (&found * &expected).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap().abs();
                assert!((aligned - 1.0).abs() < 1e-6, "{aligned}");
            }
        }
        let none = Merged::Factors {
            left: random("l", &[OUTPUT, 2]).zeros_like().unwrap(),
            right: random("r", &[2, INPUT]),
            scale: 1.0,
        };
        assert_eq!(
            off(&prototypes(&arrow(1, 0, 0), &[none]), &Tensor::zeros((1, INPUT), DType::F64, &Device::Cpu).unwrap()),
            0.0
        );
    }

    /// By hand: the scores of a row, the two largest of three, their softmax, and the sum.
    #[test]
    fn rows_go_to_those_whose_direction_they_have() {
        let (of, changes, x_ti) = (arrow(4, 1, 2), ["a", "b", "c", "g"].map(change), random("x", &[6, INPUT]));
        let (found, v) = (blended(&of, &changes, &x_ti), prototypes(&of, &changes));
        let scores: Vec<Vec<f64>> = x_ti.matmul(&v.t().unwrap()).unwrap().abs().unwrap().to_vec2().unwrap();
        let rows =
            |change: &Merged| -> Vec<Vec<f64>> { ops::linear(&x_ti, &dense(change), None).unwrap().to_vec2().unwrap() };
        let (z, found): (Vec<_>, Vec<Vec<f64>>) = (changes.iter().map(rows).collect(), found.to_vec2().unwrap());
        for (t, scores) in scores.iter().enumerate() {
            let least = (0..3).min_by(|a, b| scores[*a].total_cmp(&scores[*b])).unwrap();
            let weight = |n: usize| if n == least { 0.0 } else { (scores[n] / 0.7).exp() };
            let all: f64 = (0..3).map(weight).sum();
            for o in 0..OUTPUT {
                let expected: f64 = (0..3).map(|n| weight(n) / all * (z[n][t][o] - z[3][t][o])).sum();
                assert!((found[t][o] - expected).abs() < 1e-12, "row {t}");
            }
        }
    }

    #[test]
    fn one_adapter_by_itself_is_that_adapter_and_the_order_of_several_is_nothing() {
        let x_ti = random("x", &[6, INPUT]);
        let [a, b, c] = ["a", "b", "c"].map(change);
        let alone = blended(&arrow(1, 0, 1), std::slice::from_ref(&a), &x_ti);
        assert!(off(&alone, &ops::linear(&x_ti, &dense(&a), None).unwrap()) < 1e-12);
        let expected = blended(&arrow(3, 0, 2), &[a.clone(), b.clone(), c.clone()], &x_ti);
        assert!(off(&blended(&arrow(3, 0, 2), &[c, a.clone(), b.clone()], &x_ti), &expected) < 1e-12);
        assert!(off(&blended(&arrow(2, 0, 2), &[a, b], &x_ti), &expected) > 0.1, "each of them counts");
    }

    #[test]
    fn what_has_no_direction_and_another_number_are_refused() {
        let message = |of: &Arrow, changes: &[Merged]| of.made_of(&at(), changes).unwrap_err().to_string();
        let whole = Merged::Weight { weight: random("w", &[OUTPUT, INPUT]), bias: None };
        let told = message(&arrow(1, 0, 0), &[whole]);
        assert_eq!(
            told,
            "what is added at q_proj is no product of two factors, so it has no direction to send rows by: expected LoRAs"
        );
        assert_eq!(message(&arrow(3, 0, 0), &[change("a")]), "1 adapters add to q_proj; expected 3");
    }
}

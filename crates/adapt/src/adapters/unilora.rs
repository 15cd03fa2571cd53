//! One vector is all that trains: every number of LoRA's factors at all linears is one of its numbers, which one is drawn once; where an adapter
//! shall be of a size of its own, whatever the model's.
//!
//! # Update
//! ```text
//! A_ri = θ_d[p_ri] / sqrt(n[p_ri])          B_or = θ_d[q_or] / sqrt(n[q_or])
//! y_to = x_ti W_oi^T + (drop(x_ti) A_ri^T) B_or^T
//! ```
//! `n` counts how often each number is taken at all linears together, so that the numbers of all factors have the length of θ.
//!
//! # Symbols
//! `unilora_theta_d` `θ_d`, f32, trained, one for the whole slot, uniform in ±`bound` at the start. At each linear the places `unilora_indices_A` `p_ri` and `unilora_indices_B` `q_or`, whole
//! numbers, and `unilora_scales_A` and `unilora_scales_B`, one over the roots of the counts; they never train and are kept with the adapter.
//!
//! # Cost
//! `numbers` parameters in all. `2 rank (i+o)` extra FLOPs per token forward, and a gather of the factors. A place and a scale for each number of the factors beside them.
//!
//! # Limits
//! It does not start as the base: its factors are small, and their product is much smaller. With as many numbers as the factors have it is LoRA with a start of its own.
//!
//! # Departures
//! none in what is computed; agrees with PEFT. Places are drawn from `seed` in a way of our own: each number is taken as often as any other but for one, as there. They are
//! in our files, and a folder without them is refused.
//!
//! # Paper
//! Uni-LoRA: One Vector Is All You Need. Li, Han, Su, Li, Cai, Ji, 2025.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use attune_architecture::{Architecture, Site, SiteKind as Kind};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, PeftTensors, Port, RowCx, RowMap};
use attune_points::params::Scope;
use attune_points::{Error, Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, MethodRef, Paper, Point, SiteKind};
use attune_tensor::ops;
use attune_tensor::permutation::Permutation;
use attune_tensor::rng::Rng;
use candle_core::{Device, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::parts::dropout::dropped;
use crate::parts::keys::{self, Keys};
use crate::parts::starts::{self, Start};
use crate::parts::{factors, linears, sparse};

const THETA: &str = "unilora_theta_d";
const PLACES_A: &str = "unilora_indices_A";
const PLACES_B: &str = "unilora_indices_B";
const SCALES_A: &str = "unilora_scales_A";
const SCALES_B: &str = "unilora_scales_B";

/// Parameters of Uni-LoRA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Rank of the change.
    #[schemars(range(min = 1, max = 4096))]
    rank: u32,
    /// Numbers that train, in all.
    #[schemars(range(min = 1, max = 100_000_000))]
    numbers: u32,
    /// What the places are drawn from.
    seed: u32,
    /// The numbers start uniform in plus and minus this.
    #[schemars(range(min = 1e-9, max = 1e3))]
    bound: f64,
    /// Share of the component's input that is dropped in training.
    #[schemars(range(min = 0.0, max = 0.99))]
    dropout: f64,
}

impl Default for Config {
    /// PEFT's values.
    fn default() -> Self {
        Self { rank: 4, numbers: 256, seed: 42, bound: 0.02, dropout: 0.0 }
    }
}

pub(super) struct Unilora {
    config: Config,
    /// What the sites that it was attached to last have of all numbers.
    shares: Mutex<Shares>,
}

/// Which of the numbers of all factors, one after the other, are a site's.
#[derive(Debug, Default)]
struct Shares {
    /// How many come before a site's.
    before: BTreeMap<String, u64>,
    all: u64,
}

impl Method for Unilora {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "Uni-LoRA: One Vector Is All You Need",
            authors: "Kaiyang Li, Shaobo Han, Qing Su, Wei Li, Zhipeng Cai, Shihao Ji",
            year: 2025,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "0",
        shared: "numbers",
        moves: Some("its factors start small, neither of them at 0"),
        fixed: "2*rank*(i+o)",
        merges: Merges::Factors,
        peft_type: Some("UNILORA"),
        ..Card::new(
            "unilora",
            Point::Adapter,
            "One vector is all that trains: every number of LoRA's factors at all linears is one of its numbers, which one is drawn \
             once; where an adapter shall be of a size of its own, whatever the model's.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config, shares: Mutex::default() }))
    }
}

/// Which number each of `count` entries from `before` on takes, of `numbers`, where `all` take some; and one over the root of how many take
/// the same.
fn places(config: &Config, shares: &Shares, before: u64, count: usize) -> (Vec<i64>, Vec<f32>) {
    let numbers = u64::from(config.numbers);
    let order = Permutation::new(shares.all, &Rng::new(u64::from(config.seed), THETA));
    let place = |entry: u64| order.at(entry) % numbers;
    // Places go round: those below the remainder come once more.
    let taken = |place: u64| shares.all / numbers + u64::from(place < shares.all % numbers);
    let places = (before..before + count as u64).map(place);
    places.map(|place| (place as i64, 1.0 / (taken(place) as f32).sqrt())).unzip()
}

impl Adapter for Unilora {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let Config { rank, numbers, .. } = self.config;
        let attachments = linears::attach(sites, |site, o, i| {
            let r = factors::within(rank, site, (o, i))?;
            let theta = TensorSpec { scope: Scope::Model, ..TensorSpec::trained(THETA, [numbers as usize]) };
            let kept = [(PLACES_A, [r, i]), (PLACES_B, [o, r]), (SCALES_A, [r, i]), (SCALES_B, [o, r])];
            Ok([theta].into_iter().chain(kept.map(|(local, shape)| TensorSpec::fixed(local, shape))).collect())
        })?;
        let mut shares = Shares::default();
        for site in sites {
            if let Kind::Linear { output, input, .. } = site.kind {
                shares.before.insert(site.id.as_str().to_owned(), shares.all);
                shares.all += u64::from(rank) * (output + input) as u64;
            }
        }
        if shares.all < u64::from(numbers) {
            let message = format!("is {numbers}, more than the {} that the factors have in all", shares.all);
            return Err(vec![Fault::new("numbers", message)]);
        }
        *self.shares.lock().unwrap_or_else(PoisonError::into_inner) = shares;
        Ok(attachments)
    }

    fn init(&self, at: &Attachment, weight: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        let ((o, i), r) = (weight.shape(), self.config.rank as usize);
        let shares = self.shares.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(before) = shares.before.get(at.site.as_str()).copied() else {
            return Err(Error::Refused(format!("{} is not among the sites that it was attached to", at.site)));
        };
        let (places_a, scales_a) = places(&self.config, &shares, before, r * i);
        let (places_b, scales_b) = places(&self.config, &shares, before + (r * i) as u64, o * r);
        let cpu = &Device::Cpu;
        let (a, b) = (Tensor::from_vec(places_a, (r, i), cpu)?, Tensor::from_vec(places_b, (o, r), cpu)?);
        let (of_a, of_b) = (Tensor::from_vec(scales_a, (r, i), cpu)?, Tensor::from_vec(scales_b, (o, r), cpu)?);
        starts::each(at, rng, |spec| match spec.local {
            THETA => Start::Uniform(self.config.bound),
            PLACES_A => Start::Is(a.clone()),
            PLACES_B => Start::Is(b.clone()),
            SCALES_A => Start::Is(of_a.clone()),
            _ => Start::Is(of_b.clone()),
        })
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Delta(self)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, _: &dyn Weight) -> attune_points::Result<Merged> {
        let [right, left] = pair(tensors)?;
        Ok(Merged::Factors { left, right, scale: 1.0 })
    }

    fn peft(&self) -> Option<Peft> {
        let Config { rank, numbers, seed, bound, dropout } = self.config;
        let config = keys::written(
            Self::CARD.peft_type.unwrap_or_default(),
            [
                ("r", json!(rank)),
                ("theta_d_length", json!(numbers)),
                ("proj_seed", json!(seed)),
                ("init_theta_d_bound", json!(bound)),
                ("unilora_dropout", json!(dropout)),
                ("save_indices", json!(true)),
                ("fan_in_fan_out", json!(false)),
                ("bias", json!("none")),
                ("init_weights", json!(true)),
            ],
        );
        Some(Peft { config, tensors: PeftTensors::Each(vec![(THETA, "base_model.unilora_theta_d")]) })
    }
}

/// `A_ri` and `B_or`.
fn pair(tensors: &Locals) -> attune_points::Result<[Tensor; 2]> {
    let theta_d = tensors.get(THETA)?;
    let factor = |places: &str, scales: &str| -> attune_points::Result<Tensor> {
        let scales = tensors.get(scales)?;
        let places = sparse::places(&tensors.get(places)?.flatten_all()?, theta_d.elem_count())?;
        Ok((theta_d.index_select(&places, 0)?.reshape(scales.shape())? * scales)?)
    };
    Ok([factor(PLACES_A, SCALES_A)?, factor(PLACES_B, SCALES_B)?])
}

impl RowMap for Unilora {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let [a_ri, b_or] = pair(tensors)?;
        let h_tr = ops::linear(&dropped(x_ti, self.config.dropout, cx)?, &a_ri, None)?;
        Ok(ops::linear(&h_tr, &b_or, None)?)
    }
}

/// What `adapter_config.json` of a PEFT Uni-LoRA says in our words.
pub(super) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let mut keys = Keys::of(config);
    let own = Config::default();
    if !keys.get("save_indices", false) {
        keys.fault("save_indices", "is false, so the places are not in the folder; save it with them");
    }
    let params = [
        ("rank", json!(keys.get("r", own.rank))),
        ("numbers", json!(keys.get("theta_d_length", own.numbers))),
        ("seed", json!(keys.get("proj_seed", own.seed))),
        ("bound", json!(keys.get("init_theta_d_bound", own.bound))),
        ("dropout", json!(keys.get("unilora_dropout", own.dropout))),
    ];
    keys.finish()?;
    let params = params.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    Ok((MethodRef { method: Unilora::CARD.name.to_owned(), params }, Targets::Many(modules.to_vec())))
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;

    #[test]
    fn each_number_is_taken_as_often_as_any_other_but_for_one() {
        let config = Config { numbers: 7, ..Config::default() };
        let shares = Shares { before: BTreeMap::new(), all: 60 };
        let (all, scales) = places(&config, &shares, 0, 60);
        let mut counts = [0u32; 7];
        all.iter().for_each(|place| counts[*place as usize] += 1);
        assert!(counts.iter().all(|count| (8..=9).contains(count)), "{counts:?}");
        assert!(
            all.iter()
                .zip(&scales)
                .all(|(place, scale)| (scale - (counts[*place as usize] as f32).powf(-0.5)).abs() < 1e-6)
        );
        // Sites have parts of one and the same.
        let (part, _) = places(&config, &shares, 20, 11);
        assert_eq!(part, all[20..31]);
        assert_ne!(places(&Config { seed: 1, ..config }, &shares, 0, 60).0, all);
    }

    #[test]
    fn the_numbers_of_all_factors_have_the_length_of_the_vector() {
        let config = Config { numbers: 7, ..Config::default() };
        let shares = Shares { before: BTreeMap::new(), all: 60 };
        let theta = Rng::new(1, "theta").normal_tensor(&[7][..], 1.0, DType::F64).unwrap();
        let mut sum = 0.0;
        // Two sites of rank 2: 9 by 6 and 10 by 5.
        for (before, o, i) in [(0, 9, 6), (30, 10, 5)] {
            let (a, of_a) = places(&config, &shares, before, 2 * i);
            let (b, of_b) = places(&config, &shares, before + 2 * i as u64, 2 * o);
            let ints = |x: Vec<i64>, shape: (usize, usize)| Tensor::from_vec(x, shape, &Device::Cpu).unwrap();
            let floats = |x: Vec<f32>, shape: (usize, usize)| {
                Tensor::from_vec(x, shape, &Device::Cpu).unwrap().to_dtype(DType::F64).unwrap()
            };
            let locals = Locals::new(
                "up",
                [
                    (THETA, theta.clone()),
                    (PLACES_A, ints(a, (2, i))),
                    (PLACES_B, ints(b, (o, 2))),
                    (SCALES_A, floats(of_a, (2, i))),
                    (SCALES_B, floats(of_b, (o, 2))),
                ],
            );
            let square = |x: &Tensor| x.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
            sum += pair(&locals).unwrap().iter().map(square).sum::<f64>();
        }
        let length = theta.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
        assert!((sum - length).abs() < 1e-6 * length, "{sum} {length}");
    }

    #[test]
    fn a_folder_without_its_places_is_refused() {
        let config = json!({"peft_type": "UNILORA", "r": 2});
        let faults = from_peft(config.as_object().unwrap(), &[]).unwrap_err();
        assert_eq!(faults[0].path.to_string(), "save_indices");
    }
}

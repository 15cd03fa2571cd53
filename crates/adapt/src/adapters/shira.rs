//! Sparse high-rank adaptation: trains as many single entries of a weight as a LoRA has numbers, at places that are drawn once; all
//! others stay as they are, and the change has full rank.
//!
//! # Update
//! ```text
//! W'_oi = W_oi + Σ_k v_k e_p(k) e_q(k)^T                     k = 1 … rank (i + o)                 y_to = x_ti W'_oi^T
//! ```
//!
//! # Symbols
//! `shira_weight` `v_k`, f32, trained, 0 at the start; `shira_indices` the places `(p, q)`, `[2, rank (i + o)]`, never trained: different ones,
//! all sets of them alike, in the order of rows.
//!
//! # Cost
//! `rank (i + o)` parameters per linear, and places of twice as many values beside them. Each pass makes `W'` twice, forward and
//! reverse, in one pass over `o i` values each, and the gradient by it, `2 i o` FLOPs per token, of which most is dropped.
//!
//! # Limits
//! With v = 0 it is the base, bit for bit. With as many places as entries it is any change of the weight.
//!
//! # Departures
//! none; agrees with PEFT, which keeps places in the adapter as well, as integers; ours are written as floats, which PEFT
//! reads as well. Places by the size of weights or gradients are not here: a folder that has such is read.
//!
//! # Paper
//! Sparse High Rank Adapters. Bhardwaj, Pandey, Priyadarshi, Ganapathy, Esteves, Kadambi, Borse, Whatmough, Garrepalli, van
//! Baalen, Teague, Nagel, 2024.

use std::collections::BTreeSet;

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, WeightMap};
use attune_points::{Error, Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, MethodRef, Paper, Point, SiteKind};
use attune_tensor::rng::Rng;
use candle_core::{DType, Device, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::parts::starts::{self, Start};
use crate::parts::{foreign, linears};

const VALUES: &str = "shira_weight";
const PLACES: &str = "shira_indices";
const PEFT_TYPE: &str = "SHIRA";

/// Parameters of SHiRA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// As many entries train as a LoRA of this rank has numbers; it does not bound the rank of the change.
    #[schemars(range(min = 1, max = 4096))]
    rank: u32,
}

impl Default for Config {
    /// PEFT's value.
    fn default() -> Self {
        Self { rank: 32 }
    }
}

pub(super) struct Shira {
    config: Config,
}

impl Method for Shira {
    const CARD: Card = Card {
        category: Some(Category::Selective),
        paper: Some(Paper {
            title: "Sparse High Rank Adapters",
            authors: "Kartikeya Bhardwaj, Nilesh Prasad Pandey, Sweta Priyadarshi, Viswanath Ganapathy, Rafael Esteves, Shreya Kadambi, et al.",
            year: 2024,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "rank*(i+o)",
        fixed: "2*rank*(i+o)",
        merges: Merges::Weight,
        peft_type: Some(PEFT_TYPE),
        ..Card::new(
            "shira",
            Point::Adapter,
            "Sparse high-rank adaptation: trains as many single entries of a weight as a LoRA has numbers, at places that are \
             drawn once; all others stay as they are, and the change has full rank.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Adapter for Shira {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let rank = self.config.rank as usize;
        linears::attach(sites, |site, output, input| {
            let count = rank * (input + output);
            if count > input * output {
                let message = format!(
                    "is {rank}, which makes {count} entries of {}, {output} by {input}; expected at most {}",
                    site.id,
                    input * output / (input + output)
                );
                return Err(Fault::new("rank", message));
            }
            Ok(vec![TensorSpec::trained(VALUES, [count]), TensorSpec::fixed(PLACES, [2, count])])
        })
    }

    fn init(&self, at: &Attachment, weight: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        let (o, i) = weight.shape();
        let count = at.tensors.first().map_or(0, |spec| spec.shape[0]);
        let places = draw((o * i) as u64, count, &mut rng.named(PLACES));
        let both = places.iter().map(|place| place / i as u64).chain(places.iter().map(|place| place % i as u64));
        let places = Tensor::from_vec(both.map(|at| at as f32).collect::<Vec<_>>(), (2, count), &Device::Cpu)?;
        starts::each(
            at,
            rng,
            |spec| {
                if spec.local == PLACES { Start::Is(places.clone()) } else { Start::Constant(0.0) }
            },
        )
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Weight(self)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        let w_oi = weight.dense(tensors.get(VALUES)?.dtype())?;
        Ok(Merged::Weight { weight: self.graph(&w_oi, tensors)?, bias: None })
    }

    fn peft(&self) -> Option<Peft> {
        let layout = Layout { r: self.config.rank, ..Layout::default() };
        Some(foreign::peft(PEFT_TYPE, &layout, vec![(VALUES, VALUES), (PLACES, PLACES)]))
    }
}

/// `count` of the numbers below n, each set of them alike, in order (Floyd's way: no list of all is made).
fn draw(n: u64, count: usize, rng: &mut Rng) -> Vec<u64> {
    let mut drawn = BTreeSet::new();
    for last in n - count as u64..n {
        let place = rng.below(last + 1);
        if !drawn.insert(place) {
            drawn.insert(last);
        }
    }
    drawn.into_iter().collect()
}

impl WeightMap for Shira {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        let (o, i) = w_oi.dims2()?;
        let places = tensors.get(PLACES)?.to_dtype(DType::F64)?.to_vec2::<f64>()?;
        // They may come from a file.
        let within = |at: f64, width: usize| (at >= 0.0 && at < width as f64).then_some(at as usize);
        let flat = places[0].iter().zip(&places[1]).map(|(&p, &q)| match (within(p, o), within(q, i)) {
            (Some(p), Some(q)) => Ok((p * i + q) as u32),
            _ => Err(Error::Refused(format!("{PLACES} has the place ({p}, {q}); the weight is {o} by {i}"))),
        });
        let flat = flat.collect::<attune_points::Result<Vec<u32>>>()?;
        let flat = Tensor::new(flat, w_oi.device())?;
        Ok(w_oi.contiguous()?.flatten_all()?.index_add(&flat, tensors.get(VALUES)?, 0)?.reshape((o, i))?)
    }
}

/// The keys of `adapter_config.json`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(default)]
struct Layout {
    r: u32,
    mask_type: String,
    random_seed: Option<i64>,
    fan_in_fan_out: bool,
    init_weights: bool,
}

impl Default for Layout {
    fn default() -> Self {
        Self { r: 32, mask_type: "random".to_owned(), random_seed: None, fan_in_fan_out: false, init_weights: true }
    }
}

/// What `adapter_config.json` of a PEFT SHiRA says in our words. How its places were chosen does not matter: they are in the folder.
pub(super) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let layout: Layout = foreign::parse(config)?;
    let params = json!({"rank": layout.r});
    let params = params.as_object().cloned().unwrap_or_default();
    Ok((MethodRef { method: Shira::CARD.name.to_owned(), params }, Targets::Many(modules.to_vec())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_as_many_as_asked_for_and_come_once_each_in_order() {
        for (n, count) in [(1, 1), (30, 30), (1000, 1), (1000, 400)] {
            let places = draw(n, count, &mut Rng::new(1, "places"));
            assert_eq!(places.len(), count);
            assert!(places.is_sorted_by(|a, b| a < b) && places.iter().all(|place| *place < n));
        }
        assert_ne!(draw(1000, 5, &mut Rng::new(1, "places")), draw(1000, 5, &mut Rng::new(2, "places")));
    }

    /// Each of 20 numbers is one of 5 in a quarter of 4000 draws; bounds at five standard errors.
    #[test]
    fn each_place_is_drawn_as_often_as_the_others() {
        let mut rng = Rng::new(3, "places");
        let mut counts = [0u32; 20];
        (0..4000).for_each(|_| draw(20, 5, &mut rng).into_iter().for_each(|place| counts[place as usize] += 1));
        let error = 5.0 * (4000.0f64 * 0.25 * 0.75).sqrt();
        assert!(counts.iter().all(|&count| (f64::from(count) - 1000.0).abs() < error), "{counts:?}");
    }

    #[test]
    fn values_are_added_at_their_places_and_nowhere_else() {
        let w = Tensor::zeros((2, 3), DType::F64, &Device::Cpu).unwrap();
        let of = |places: &[[f32; 2]; 2]| {
            let values = Tensor::new(&[5.0f64, 7.0], &Device::Cpu).unwrap();
            let locals =
                Locals::new("q_proj", [(VALUES, values), (PLACES, Tensor::new(places, &Device::Cpu).unwrap())]);
            Shira { config: Config::default() }.graph(&w, &locals)
        };
        let made = of(&[[0.0, 1.0], [2.0, 0.0]]).unwrap();
        assert_eq!(made.to_vec2::<f64>().unwrap(), [[0.0, 0.0, 5.0], [7.0, 0.0, 0.0]]);
        for wrong in [
            [[0.0, 2.0], [2.0, 0.0]],
            [[0.0, 1.0], [3.0, 0.0]],
            [[-1.0, 1.0], [2.0, 0.0]],
            [[f32::NAN, 1.0], [2.0, 0.0]],
        ] {
            let error = of(&wrong).unwrap_err().to_string();
            assert!(error.contains("the weight is 2 by 3"), "{error}");
        }
    }
}

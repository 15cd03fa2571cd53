//! Trains the largest single entries of a weight, or its smallest, and if asked a low-rank change beside them; sparse like a few words of
//! advice to a weight where it already says most, without a look at data.
//!
//! # Update
//! ```text
//! W'_oi = W_oi + Σ_k v_k e_p(k) + (alpha / rank) · B_or A_ri           k = 1 … (1 - sparsity) i o            y_to = x_ti W'_oi^T
//! ```
//!
//! # Symbols
//! `supertuning_values` `v_k`, f32, trained, 0 at the start; `supertuning_indices` `p(k)`, places in the weight row by row, never trained: where `|W_oi|` is largest, or smallest.
//! With a rank `supertuning_lora_A` `A_ri`, uniform in ±1/sqrt(i), and `supertuning_lora_B` `B_or`, 0 at the start; f32, trained.
//!
//! # Cost
//! `(1-sparsity)*i*o` parameters per linear, rounded down, and places of twice as many values beside them; `rank (i+o)` more with a rank. Each pass makes `W'` twice, forward and
//! reverse, and the gradient by it, `2 i o` FLOPs per token, of which most is dropped.
//!
//! # Limits
//! With v = 0 and B = 0 it is the base, bit for bit. Without a rank all other entries stay, bit for bit.
//!
//! # Departures
//! none; agrees with PEFT, but for its dropout before the low-rank part: input goes through one weight here. Places by activations, which the
//! paper has as well, are not in PEFT either. Which of several entries of one size is taken may differ: the first ones here.
//!
//! # Paper
//! Supra-Tuning: Combining Outlier and Low-Rank Adaptation for Sparse and Efficient LLM Fine-Tuning. ICLR submission 25479, 2025.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, WeightMap};
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, MethodRef, Paper, Point, SiteKind};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::{DType, Device, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::parts::keys::Keys;
use crate::parts::starts::{self, Start};
use crate::parts::{factors, foreign, keys, linears, sparse};

const VALUES: &str = "supertuning_values";
const PLACES: &str = "supertuning_indices";
const A: &str = "supertuning_lora_A";
const B: &str = "supertuning_lora_B";
const PEFT_TYPE: &str = "SUPERTUNING";

/// Which entries train.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Support {
    /// Those of the largest size.
    #[default]
    Largest,
    /// Those of the smallest size.
    Smallest,
}

/// Parameters of Super-Tuning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Share of a weight's entries that stay.
    #[schemars(range(min = 0.0, max = 0.999999))]
    sparsity: f64,
    /// Which entries train.
    support: Support,
    /// Rank of the change beside them; 0 for none.
    #[schemars(range(min = 0, max = 4096))]
    rank: u32,
    /// Numerator of that change's scaling; twice the rank if left out.
    #[schemars(range(min = 0.0, max = 1e6))]
    alpha: Option<f64>,
}

impl Default for Config {
    /// PEFT's values.
    fn default() -> Self {
        Self { sparsity: 0.99, support: Support::Largest, rank: 0, alpha: None }
    }
}

impl Config {
    fn alpha(&self) -> f64 {
        self.alpha.unwrap_or_else(|| 2.0 * f64::from(self.rank))
    }
}

pub(super) struct Supertuning {
    config: Config,
}

impl Method for Supertuning {
    const CARD: Card = Card {
        category: Some(Category::Selective),
        paper: Some(Paper {
            title: "Supra-Tuning: Combining Outlier and Low-Rank Adaptation for Sparse and Efficient LLM Fine-Tuning",
            authors: "authors of ICLR submission 25479",
            year: 2025,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "floor(i*o*(1-sparsity)) + rank*(i+o)",
        fixed: "floor(i*o*(1-sparsity))",
        start_numbers: "34*o*i",
        merges: Merges::Weight,
        peft_type: Some(PEFT_TYPE),
        ..Card::new(
            "supertuning",
            Point::Adapter,
            "Trains the largest single entries of a weight, or its smallest, and if asked a low-rank change beside them; sparse like a \
             few words of advice to a weight where it already says most, without a look at data.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        if config.rank == 0 && config.alpha.is_some() {
            let message = "scales a low-rank change, and `rank` is 0: expected a rank with it, or no alpha";
            return Err(vec![Fault::new("alpha", message)]);
        }
        Ok(Box::new(Self { config }))
    }
}

impl Adapter for Supertuning {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let Config { sparsity, rank, .. } = self.config;
        linears::attach(sites, |site, o, i| {
            let count = ((o * i) as f64 * (1.0 - sparsity)) as usize;
            if count == 0 {
                let most = 1.0 - 1.0 / (o * i) as f64;
                let message = format!(
                    "is {sparsity}, which leaves none of the {} entries of {}, {o} by {i}; expected at most {most:.6}",
                    o * i,
                    site.id
                );
                return Err(Fault::new("sparsity", message));
            }
            let mut tensors = vec![TensorSpec::trained(VALUES, [count]), TensorSpec::fixed(PLACES, [count])];
            if rank > 0 {
                let r = factors::within(rank, site, (o, i))?;
                tensors.extend([TensorSpec::trained(A, [r, i]), TensorSpec::trained(B, [o, r])]);
            }
            Ok(tensors)
        })
    }

    fn init(&self, at: &Attachment, weight: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        let count = at.tensors.first().map_or(0, |spec| spec.shape[0]);
        let mut scores = weight.dense(DType::F32)?.abs()?.flatten_all()?.to_vec1::<f32>()?;
        if self.config.support == Support::Smallest {
            scores.iter_mut().for_each(|score| *score = -*score);
        }
        let places: Vec<i64> = sparse::largest(&scores, count).into_iter().map(|place| place as i64).collect();
        let places = Tensor::new(places, &Device::Cpu)?;
        starts::each(at, rng, |spec| match spec.local {
            PLACES => Start::Is(places.clone()),
            A => Start::kaiming(spec),
            _ => Start::Constant(0.0),
        })
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Weight(self)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        let w_oi = weight.dense(tensors.get(VALUES)?.dtype())?;
        Ok(Merged::Weight { weight: self.graph(&w_oi, tensors)?, bias: None })
    }

    fn peft(&self) -> Option<Peft> {
        let Config { sparsity, support, rank, .. } = self.config;
        let low_rank = rank > 0;
        let own = json!({
            "sparsity": sparsity,
            "select_top": support == Support::Largest,
            "r": low_rank.then_some(rank),
            "lora_alpha": low_rank.then(|| keys::number(self.config.alpha())),
            "lora_dropout": 0.0,
            "init_weights": true,
            "save_precomputed_indices": true,
        });
        let factors = [(A, "supertuning_lora_A.weight"), (B, "supertuning_lora_B.weight")];
        Some(foreign::peft(PEFT_TYPE, &own, [(VALUES, VALUES), (PLACES, PLACES)].into_iter().chain(factors).collect()))
    }
}

impl WeightMap for Supertuning {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        let rank = self.config.rank;
        let w_oi = if rank == 0 {
            w_oi.contiguous()?
        } else {
            // The scaling goes on the thin side.
            let a_ri = (tensors.get(A)? * (self.config.alpha() / f64::from(rank)))?;
            (w_oi + ops::matmul(tensors.get(B)?, &a_ri)?)?
        };
        sparse::added(&w_oi, &sparse::places(tensors.get(PLACES)?, w_oi.elem_count())?, tensors.get(VALUES)?)
    }
}

/// What `adapter_config.json` of a PEFT Super-Tuning says in our words.
pub(super) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let mut keys = Keys::of(config);
    let own = Config::default();
    keys.only("save_precomputed_indices", true, "so the places are not in the folder; save it with them");
    keys.no_dropout("lora_dropout");
    let support = if keys.get("select_top", true) { Support::Largest } else { Support::Smallest };
    let mut params = Map::from_iter([
        ("sparsity".to_owned(), json!(keys.get("sparsity", own.sparsity))),
        ("support".to_owned(), json!(support)),
    ]);
    let rank: u32 = keys.get("r", 0);
    if rank > 0 {
        params.insert("rank".to_owned(), json!(rank));
        params.insert("alpha".to_owned(), json!(keys.get("lora_alpha", 2.0 * f64::from(rank))));
    }
    keys.finish()?;
    Ok((MethodRef { method: Supertuning::CARD.name.to_owned(), params }, Targets::Many(modules.to_vec())))
}

#[cfg(test)]
mod tests {
    use attune_architecture::SiteId;
    use attune_tensor::autograd;

    use super::*;

    fn of(support: Support, rank: u32) -> Supertuning {
        Supertuning { config: Config { sparsity: 0.5, support, rank, alpha: None } }
    }

    fn places(support: Support) -> Vec<i64> {
        let w = Tensor::new(&[[0.1f32, -3.0, 0.2], [2.0, -0.05, 1.0]], &Device::Cpu).unwrap();
        let tensors = vec![TensorSpec::trained(VALUES, [3]), TensorSpec::fixed(PLACES, [3])];
        let at = Attachment { site: SiteId::new("up"), tensors };
        let (locals, _) = of(support, 0).init(&at, &w, &mut Rng::new(1, "init")).unwrap();
        locals.get(PLACES).unwrap().to_vec1().unwrap()
    }

    #[test]
    fn the_entries_of_the_largest_or_smallest_size_train_whatever_their_sign() {
        assert_eq!(places(Support::Largest), [1, 3, 5]);
        assert_eq!(places(Support::Smallest), [4, 0, 2]);
    }

    #[test]
    fn other_entries_stay_and_the_gradient_is_that_of_the_weight_at_the_places() {
        let normal = |name: &str, shape: &[usize]| Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap();
        let (w, dw, leaf) = (normal("w", &[3, 4]), normal("dw", &[3, 4]), autograd::leaf(&normal("v", &[2])).unwrap());
        let at = Tensor::new(&[7i64, 2], &Device::Cpu).unwrap();
        let locals = Locals::new("up", [(VALUES, leaf.as_tensor().clone()), (PLACES, at)]);
        let made = of(Support::Largest, 0).graph(&w, &locals).unwrap();
        let flat = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let (made_flat, w, values) = (flat(&made), flat(&w), flat(leaf.as_tensor()));
        for (place, (made, w)) in made_flat.iter().zip(&w).enumerate() {
            let added = [(7, values[0]), (2, values[1])].iter().find(|(at, _)| *at == place).map_or(0.0, |(_, v)| *v);
            assert_eq!(*made, w + added);
        }
        let gradient = autograd::pull(&[&leaf], &[(&made, &dw)]).unwrap().remove(0).unwrap();
        assert_eq!(flat(&gradient), [flat(&dw)[7], flat(&dw)[2]]);
    }

    #[test]
    fn places_beyond_the_weight_are_refused() {
        let w = Tensor::zeros((2, 2), DType::F64, &Device::Cpu).unwrap();
        for place in [-1i64, 4] {
            let at = Tensor::new(&[place], &Device::Cpu).unwrap();
            let value = Tensor::zeros(1, DType::F64, &Device::Cpu).unwrap();
            let error = of(Support::Largest, 0).graph(&w, &Locals::new("up", [(VALUES, value), (PLACES, at)]));
            assert!(error.unwrap_err().to_string().contains("expected 0 to 3"));
        }
    }

    #[test]
    fn an_alpha_without_a_rank_and_a_folder_without_places_are_refused() {
        let cx = BuildCx { steps: attune_spec::id::Step(1), domains: &[], words: None };
        let faults = Supertuning::build(Config { alpha: Some(4.0), ..Config::default() }, &cx).map(|_| ()).unwrap_err();
        assert_eq!(faults[0].path.to_string(), "alpha");
        let config =
            json!({"peft_type": "SUPERTUNING", "save_precomputed_indices": false, "lora_dropout": 0.1, "r": 2});
        let faults = from_peft(config.as_object().unwrap(), &[]).unwrap_err();
        let paths: Vec<String> = faults.iter().map(|fault| fault.path.to_string()).collect();
        assert_eq!(paths, ["save_precomputed_indices", "lora_dropout"]);
    }
}

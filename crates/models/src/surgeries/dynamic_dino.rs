//! Makes a mixture of fine-grained experts of every MLP without changing what the model computes, for a base that is to grow
//! while each row costs what it did.
//!
//! # Update
//! ```text
//! dense     y_td = f(x_td) W2_dmᵀ              f_j = act(x G_jᵀ) (x U_jᵀ), hidden unit j of m
//! expert    e = copy c, segment s              has the m/k hidden units of segment s, and k W2 of them
//! mixture   y_td = sum over the k likeliest e of  w_te E_e(x)        w = softmax over those k of x R_edᵀ
//! start     R_(c,s) = r_c for every s, r_c ~ normal(0, std²)
//! ```
//! The segments of a copy have one logit, so that the `k` likeliest experts are all those of one copy (of equals the first
//! counts), each with the weight `1/k`: `sum_s 1/k (k W2_s) f_s` is the dense MLP.
//!
//! # Symbols
//! `k` the granularity, `N` the copies; `m` the hidden units of the dense MLP. `G`, `U` and `W2` of `N k` experts, copies of
//! the base's, and `R` of as many rows; what of them trains says the stack (`w1`, `w2`, `w3` and `gate` are all of them where
//! the base is of Llama's or Mistral's kind).
//!
//! # Cost
//! `N` times the parameters of the MLPs; a row goes through as many of them as before, and through the router. Copies share
//! their memory until they train.
//!
//! # Limits
//! At the start the model is the base, for any input. One copy of granularity 1 is the base for good: a single expert whose weight
//! is 1. With router rows that are drawn one by one it would not be: then the likeliest experts are segments of several copies.
//!
//! # Departures
//! The paper's detector sums its experts with weights that add up to 1; its factor `k`, which makes the start exact, stands in W2
//! here, so that the result is a Mixtral (of Llama and Mistral) or a Qwen3-MoE (of Qwen3), and any program that knows those
//! computes it. W2 of 16 bits is exact where `k` is a power of two, and rounded once elsewhere. Experts of these kinds have no
//! biases, so that none has to be shared out; a base with such is refused. The balance loss (Switch's, over all layers) counts
//! while the job of the surgery trains, and no longer in jobs on its result.
//!
//! # Paper
//! Dynamic-DINO: Fine-Grained Mixture of Experts Tuning for Real-time Open-Vocabulary Object Detection. Lu et al., 2025.

use std::collections::BTreeMap;

use attune_architecture::{Architecture, Place, Site, SiteId, TensorInfo, TensorPart};
use attune_points::surgery::{Derivation, Surgery};
use attune_points::{Error, TensorName, Weight};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Method, Paper, Point};
use attune_tensor::rng::Rng;
use candle_core::{DType, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::surgery::by_place;

/// Parameters of the surgery.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Copies of each MLP.
    #[schemars(range(min = 1, max = 256))]
    copies: u32,
    /// Experts that a copy is split into, and that each row goes through; divides the width inside the MLP.
    #[schemars(range(min = 1, max = 64))]
    granularity: u32,
    /// Standard deviation of the router's rows, one a copy.
    #[schemars(range(min = 0.0, max = 10.0))]
    router_std: f64,
    /// What the loss that spreads rows over the experts is multiplied by; 0 for none.
    #[schemars(range(min = 0.0, max = 1000.0))]
    balance: f64,
}

impl Default for Config {
    /// As many copies as Mixtral has experts, each in two; the router's deviation and the loss's weight are those of OLMoE.
    fn default() -> Self {
        Self { copies: 8, granularity: 2, router_std: 0.02, balance: 0.01 }
    }
}

pub(super) struct DynamicDino {
    config: Config,
}

impl Method for DynamicDino {
    const CARD: Card = Card {
        paper: Some(Paper {
            title: "Dynamic-DINO: Fine-Grained Mixture of Experts Tuning for Real-time Open-Vocabulary Object Detection",
            authors: "Yehao Lu et al.",
            year: 2025,
        }),
        becomes: &[
            ("inner", "inner / granularity"),
            ("experts", "copies * granularity"),
            ("experts_per_token", "granularity"),
            ("experts_balance", "balance"),
        ],
        ..Card::new(
            "dynamic-dino",
            Point::Surgery,
            "Makes a mixture of fine-grained experts of every MLP without changing what the model computes, for a base that \
             is to grow while each row costs what it did.",
        )
    };
    type Config = Config;
    type Object = dyn Surgery;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Surgery>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl DynamicDino {
    /// The segment of an expert: those of the first copy come first, then those of the second.
    const fn segment(&self, expert: u32) -> u32 {
        expert % self.config.granularity
    }
}

impl Surgery for DynamicDino {
    fn plan(&self, from: &Architecture, to: &Architecture) -> Result<BTreeMap<TensorName, Derivation>, Vec<Fault>> {
        let (old, sites) = (from.sites(), to.sites());
        let (old, new) = (by_place(&old), by_place(&sites));
        let by_id: BTreeMap<&SiteId, &Site> = sites.iter().map(|site| (&site.id, site)).collect();
        let mut plan = BTreeMap::new();
        let mut faults = Vec::new();
        for TensorInfo { name, site, part, .. } in to.tensors() {
            let name = TensorName::from_path(&name);
            let Some(at) = by_id.get(&site) else { continue };
            if at.place == Place::Router {
                plan.insert(name, Derivation::Fresh);
                continue;
            }
            let Some(&of) = old.get(&(at.place, at.layer, None)) else {
                faults.push(Fault::new("", format!("finds nothing in the base that {name} could be made of")));
                continue;
            };
            let derivation = match at.expert {
                None => Derivation::Kept(TensorName::new(of.id.as_str(), local(part))),
                Some(expert) if expert < self.config.granularity => Derivation::Made(of.clone()),
                Some(expert) => {
                    let first = new.get(&(at.place, at.layer, Some(self.segment(expert)))).unwrap_or(at);
                    Derivation::Same(TensorName::new(first.id.as_str(), local(part)))
                }
            };
            plan.insert(name, derivation);
        }
        if faults.is_empty() { Ok(plan) } else { Err(faults) }
    }

    fn tensor(
        &self,
        at: &Site,
        part: TensorPart,
        of: Option<&dyn Weight>,
        rng: &mut Rng,
    ) -> attune_points::Result<Tensor> {
        let refused = || Error::Refused(format!("{} is no expert or router of this surgery", at.id));
        let Config { copies, granularity, router_std, .. } = self.config;
        let k = granularity as usize;
        if at.place == Place::Router {
            let (_, width) = at.out_in().ok_or_else(refused)?;
            let rows_nd = rng.normal_tensor((copies as usize, 1, width), router_std, DType::F32)?;
            let rows_nkd = rows_nd.broadcast_as((copies as usize, k, width))?;
            return Ok(rows_nkd.reshape((copies as usize * k, width))?);
        }
        let (Some(expert), Some(of), TensorPart::Weight) = (at.expert, of, part) else { return Err(refused()) };
        let segment = self.segment(expert) as usize;
        let (o, i) = of.shape();
        match at.place {
            Place::Gate | Place::Up => {
                let units = o / k;
                of.rows(segment * units..(segment + 1) * units, DType::F32)
            }
            Place::Down => {
                let units = i / k;
                let w_dm = of.dense(DType::F32)?.narrow(1, segment * units, units)?;
                Ok((w_dm * f64::from(granularity))?)
            }
            _ => Err(refused()),
        }
    }
}

/// What the name of a site's tensor ends in.
const fn local(part: TensorPart) -> &'static str {
    match part {
        TensorPart::Weight => "weight",
        TensorPart::Bias => "bias",
    }
}

#[cfg(test)]
mod tests {
    use attune_points::{Layout, Theta};
    use attune_spec::method::MethodRef;
    use serde_json::json;

    use super::*;
    use crate::{Base, Model, Pass, Stack, surgery};

    const LLAMA: &str = r#"{
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 30, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "initializer_range": 0.4
    }"#;

    fn named(copies: u32, granularity: u32, router_std: f64) -> MethodRef {
        let params = json!({"copies": copies, "granularity": granularity, "router_std": router_std});
        MethodRef { method: DynamicDino::CARD.name.to_owned(), params: params.as_object().unwrap().clone() }
    }

    fn dense(config: &str) -> Base {
        Base::random(Architecture::from_json(config.as_bytes()).unwrap(), 5, DType::F32).unwrap()
    }

    fn made(copies: u32, granularity: u32, router_std: f64) -> Base {
        surgery::operate(&dense(LLAMA), &named(copies, granularity, router_std), 9).unwrap()
    }

    /// A base with some of its tensors changed.
    fn changed(base: &Base, change: impl Fn(&Site, &Tensor, u64) -> Option<Tensor>) -> Base {
        let sites = base.architecture().sites();
        let mut tensors = BTreeMap::new();
        for (number, info) in (0..).zip(base.architecture().tensors()) {
            let site = sites.iter().find(|site| site.id == info.site).unwrap();
            let tensor = base.tensor(&TensorName::from_path(&info.name), DType::F32).unwrap();
            tensors.insert(info.name, change(site, &tensor, number).unwrap_or(tensor));
        }
        Base::from_tensors(base.architecture().clone(), &tensors).unwrap()
    }

    fn logits(model: &Model) -> Vec<f64> {
        let layout = Layout::single(&(0..40).map(|i| (i * 7 + i * i) % 30).collect::<Vec<u32>>());
        let logits = model.logits(&Pass { theta: &Theta::default(), layout: &layout, dropout: None }).unwrap();
        logits.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    fn off(a: &[f64], b: &[f64]) -> f64 {
        assert_eq!(a.len(), b.len());
        a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
    }

    fn model(base: Base) -> Model {
        Model::new(base, Stack::default())
    }

    #[test]
    fn at_the_start_the_mixture_is_the_dense_model_for_every_row() {
        let (exact, fast) = (logits(&model(dense(LLAMA)).in_f64()), logits(&model(dense(LLAMA))));
        for (copies, granularity) in [(1u32, 1u32), (1, 4), (3, 1), (4, 2), (3, 3), (5, 4), (8, 6), (2, 24)] {
            for router_std in [0.02, 3.0] {
                let what = format!("{copies} copies in {granularity}, routers of {router_std}");
                // A third of a weight has no exact value; a factor that is a power of two has.
                let bound = if granularity.is_power_of_two() { 1e-12 } else { 1e-5 };
                let found = off(&exact, &logits(&model(made(copies, granularity, router_std)).in_f64()));
                assert!(found < bound, "{what}: off by {found} in f64");
                let found = off(&fast, &logits(&model(made(copies, granularity, router_std))));
                assert!(found < 1e-5, "{what}: off by {found} in f32");
            }
        }
    }

    /// All logits are equal where the router is zero, and where what it reads is: the likeliest are then one copy's segments.
    #[test]
    fn ties_of_all_experts_give_the_dense_model_too() {
        let silent = |site: &Site, tensor: &Tensor, _| {
            (site.place == Place::MlpNorm && site.layer == Some(1)).then(|| tensor.zeros_like().unwrap())
        };
        for (dense, mixture) in
            [(dense(LLAMA), made(4, 3, 0.0)), (changed(&dense(LLAMA), silent), changed(&made(4, 3, 1.0), silent))]
        {
            let found = off(&logits(&model(dense)), &logits(&model(mixture)));
            assert!(found < 1e-5, "off by {found}");
        }
    }

    #[test]
    fn one_copy_in_one_piece_is_the_dense_model_bit_by_bit() {
        assert!(logits(&model(dense(LLAMA))) == logits(&model(made(1, 1, 0.02))));
    }

    /// What keeps the start exact: one logit for the segments of a copy, and the factor in W2.
    #[test]
    fn without_grouped_rows_or_the_factor_the_start_is_another_model() {
        let exact = logits(&model(dense(LLAMA)).in_f64());
        let alone = |site: &Site, tensor: &Tensor, number| {
            let drawn = || Rng::new(number, "alone").normal_tensor(tensor.dims(), 0.02, DType::F32).unwrap();
            (site.place == Place::Router).then(drawn)
        };
        let found = off(&exact, &logits(&model(changed(&made(4, 2, 0.02), alone)).in_f64()));
        assert!(found > 0.1, "off by {found} with rows of their own");
        let plain = |site: &Site, tensor: &Tensor, _| (site.place == Place::Down).then(|| (tensor / 2.0).unwrap());
        let found = off(&exact, &logits(&model(changed(&made(4, 2, 0.02), plain)).in_f64()));
        assert!(found > 0.1, "off by {found} without the factor");
    }

    #[test]
    fn a_row_costs_what_it_did_and_the_router() {
        let (old, new) = (dense(LLAMA), made(8, 2, 0.02));
        let router = 2.0 * 2.0 * (16 * 16) as f64;
        let flops = |base: &Base| base.architecture().forward_flops_per_token(20.0, 1.0);
        assert_eq!(flops(&old) + router, flops(&new));
        let mlps = 2 * 3 * 16 * 24;
        assert_eq!(new.architecture().parameters(), old.architecture().parameters() + 7 * mlps + 2 * 16 * 16);
    }

    #[test]
    fn what_cannot_be_cut_or_has_no_kind_with_experts_is_refused() {
        let refused =
            |config: &str, granularity| match surgery::operate(&dense(config), &named(2, granularity, 0.02), 9) {
                Ok(_) => panic!("done"),
                Err(error) => error.to_string(),
            };
        assert_eq!(refused(LLAMA, 5), "`tune.surgery` makes `inner` 4.8 of 24; expected parameters that make it whole");
        assert!(refused(&LLAMA.replace("llama", "qwen2"), 2).contains("no known kind of model is qwen2 with experts"));
        let biased = LLAMA.replace("\"vocab_size\"", "\"mlp_bias\": true, \"vocab_size\"");
        assert!(refused(&biased, 2).contains("which has no biases in its experts"));
        let mixture = LLAMA.replace("llama", "mixtral");
        assert!(refused(&mixture, 2).contains("needs a base without experts"));
    }
}

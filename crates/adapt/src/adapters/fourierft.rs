//! Fourier fine-tuning: a change whose spectrum is 0 but for a few entries at random places, which all linears share; where an adapter
//! has to be as small as can be, down to one number per wave over the whole weight.
//!
//! # Update
//! ```text
//! y_to = x_ti (W_oi + C_oi)^T
//! C_pq = scaling / (o i) · Σ_k c_k cos(2π (p u_k / o + q v_k / i))                        k = 1 … frequencies
//! ```
//!
//! # Symbols
//! `fourierft_spectrum` `c_k`, f32, trained, normal with standard deviation 1 at the start, or 0 with `start` `zero`. (u_k, v_k) are the first
//! places of a random order of all o · i, of torch's generator with `seed`; linears of one shape have the same.
//!
//! # Cost
//! `frequencies` parameters per linear. Each pass makes `C` twice, forward and reverse, by a fast transform of some
//! `5 o i log2(o i) / 2` FLOPs, and each logical shard's gradient is transformed once, after the gradient by the weight, `2 i o` FLOPs
//! per token.
//!
//! # Limits
//! With c = 0 it is the base, bit for bit. With all frequencies it reaches every change that is symmetric under (p, q) → (-p, -q).
//!
//! # Departures
//! none; agrees with PEFT, places included. `frequencies_pattern` names whole paths, not patterns: reading a PEFT folder
//! resolves its patterns. Weights of 214748364 entries and more are refused: torch draws their places in another way.
//!
//! # Paper
//! Parameter-Efficient Fine-Tuning with Discrete Fourier Transform. Gao, Wang, Chen, Liu, Wu, Chen, Li, 2024.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, WeightMap};
use attune_points::{Locals, Weight};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, MethodRef, Paper, Point, SiteKind};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::parts::scaling::Scaling;
use crate::parts::starts::{self, Start};
use crate::parts::{foreign, spectrum, torch};

const SPECTRUM: &str = "fourierft_spectrum";
const PEFT_TYPE: &str = "FOURIERFT";

/// Parameters of FourierFT.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Entries of the spectrum that train.
    #[schemars(range(min = 1, max = 65536))]
    frequencies: u32,
    /// Factor on the change.
    #[schemars(range(min = 0.0, max = 1e6))]
    scaling: f64,
    /// Seed of the places of these entries.
    #[schemars(range(min = 0))]
    seed: u64,
    /// Entries at single sites, by whole path.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    frequencies_pattern: BTreeMap<String, u32>,
    /// What the entries start as.
    start: Entries,
}

/// What the entries of a spectrum start as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Entries {
    /// Normal with standard deviation 1.
    Normal,
    /// 0, so that the model starts as the base.
    Zero,
}

impl Default for Config {
    /// PEFT's values.
    fn default() -> Self {
        Self {
            frequencies: 1000,
            scaling: 150.0,
            seed: 777,
            frequencies_pattern: BTreeMap::new(),
            start: Entries::Normal,
        }
    }
}

/// Places by the sizes of a weight and their number.
type Known = BTreeMap<((usize, usize), usize), Places>;

/// The frequencies of waves, by rows and by columns.
type Places = Arc<[(usize, usize)]>;

pub(super) struct Fourierft {
    config: Config,
    /// Those that were drawn for a shape: all linears of it have the same.
    places: Mutex<Known>,
}

impl Fourierft {
    fn new(config: Config) -> Self {
        Self { config, places: Mutex::default() }
    }
}

impl Method for Fourierft {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform",
            authors: "Ziqi Gao, Qichao Wang, Aochuan Chen, Zijing Liu, Bingzhe Wu, Liang Chen, Jia Li",
            year: 2024,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "frequencies",
        moves: Some("entries of the spectrum start at random, unless `start` is `zero`"),
        merges: Merges::Weight,
        peft_type: Some(PEFT_TYPE),
        ..Card::new(
            "fourierft",
            Point::Adapter,
            "Fourier fine-tuning: a change whose spectrum is 0 but for a few entries at random places, which all linears share; \
             where an adapter has to be as small as can be, down to one number per wave over the whole weight.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        let faults = Scaling::faults_of("frequencies_pattern", &config.frequencies_pattern, 1..=65_536);
        if faults.is_empty() { Ok(Box::new(Self::new(config))) } else { Err(faults) }
    }
}

impl Adapter for Fourierft {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let Config { frequencies, frequencies_pattern, .. } = &self.config;
        spectrum::attach(SPECTRUM, (*frequencies, frequencies_pattern), sites)
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        starts::each(at, rng, |_| match self.config.start {
            Entries::Normal => Start::Normal(1.0),
            Entries::Zero => Start::Constant(0.0),
        })
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Weight(self)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        let w_oi = weight.dense(tensors.get(SPECTRUM)?.dtype())?;
        Ok(Merged::Weight { weight: self.graph(&w_oi, tensors)?, bias: None })
    }

    fn peft(&self) -> Option<Peft> {
        let config = self.config.clone();
        let layout = Layout {
            n_frequency: config.frequencies,
            scaling: config.scaling,
            random_loc_seed: config.seed,
            n_frequency_pattern: config.frequencies_pattern,
            init_weights: config.start == Entries::Zero,
            ..Layout::default()
        };
        Some(foreign::peft(PEFT_TYPE, &layout, vec![(SPECTRUM, SPECTRUM)]))
    }
}

impl Fourierft {
    /// The frequencies (u, v) of the first `count` entries of the spectrum of a weight.
    fn places(&self, (o, i): (usize, usize), count: usize) -> Places {
        let mut known = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let drawn = || {
            let places = torch::permutation((o * i) as u64, count, self.config.seed);
            places.into_iter().map(|place| (place as usize / i, place as usize % i)).collect()
        };
        Arc::clone(known.entry(((o, i), count)).or_insert_with(drawn))
    }
}

impl WeightMap for Fourierft {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        let (spectrum_k, shape) = (tensors.get(SPECTRUM)?, w_oi.dims2()?);
        let places = self.places(shape, spectrum_k.elem_count());
        let scaled_k = (spectrum_k * (self.config.scaling / (shape.0 * shape.1) as f64))?;
        Ok((w_oi + ops::waves(&scaled_k, places.to_vec(), shape)?)?)
    }
}

/// The keys of `adapter_config.json`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(default)]
struct Layout {
    n_frequency: u32,
    scaling: f64,
    random_loc_seed: u64,
    n_frequency_pattern: BTreeMap<String, u32>,
    init_weights: bool,
    fan_in_fan_out: bool,
    bias: String,
}

impl Default for Layout {
    fn default() -> Self {
        Self {
            n_frequency: 1000,
            scaling: 150.0,
            random_loc_seed: 777,
            n_frequency_pattern: BTreeMap::new(),
            init_weights: false,
            fan_in_fan_out: false,
            bias: "none".to_owned(),
        }
    }
}

/// What `adapter_config.json` of a PEFT FourierFT says in our words.
pub(super) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let layout: Layout = foreign::parse(config)?;
    let own = foreign::by_pattern("n_frequency_pattern", layout.n_frequency, layout.n_frequency_pattern, modules)?;
    let params = json!({
        "frequencies": layout.n_frequency,
        "scaling": layout.scaling,
        "seed": layout.random_loc_seed,
        "frequencies_pattern": own,
        "start": if layout.init_weights { Entries::Zero } else { Entries::Normal },
    });
    let params = params.as_object().cloned().unwrap_or_default();
    Ok((MethodRef { method: Fourierft::CARD.name.to_owned(), params }, Targets::Many(modules.to_vec())))
}

#[cfg(test)]
mod tests {
    use std::f64::consts::TAU;

    use candle_core::{DType, Device};

    use super::*;

    fn change(config: Config, (o, i): (usize, usize), spectrum: &[f64]) -> Vec<Vec<f64>> {
        let zero = Tensor::zeros((o, i), DType::F64, &Device::Cpu).unwrap();
        let spectrum = Tensor::new(spectrum, &Device::Cpu).unwrap();
        let made = Fourierft::new(config).graph(&zero, &Locals::new("q_proj", [(SPECTRUM, spectrum)])).unwrap();
        made.to_vec2().unwrap()
    }

    /// The real part of the inverse transform of a spectrum with these entries, sum by sum.
    #[test]
    fn the_change_is_the_inverse_transform_of_the_spectrum() {
        let (o, i, spectrum) = (4, 6, [0.5, -2.0, 1.0, 3.0, 0.25]);
        let found = change(Config { scaling: 24.0, ..Config::default() }, (o, i), &spectrum);
        let places = torch::permutation(24, 5, 777);
        for (p, q) in (0..o).flat_map(|p| (0..i).map(move |q| (p, q))) {
            let wave = |place: u64| {
                let (u, v) = (place as usize / i, place as usize % i);
                (TAU * ((p * u) as f64 / o as f64 + (q * v) as f64 / i as f64)).cos()
            };
            let expected: f64 = places.iter().zip(&spectrum).map(|(&place, c)| c * wave(place)).sum();
            assert!((found[p][q] - expected).abs() < 1e-12);
        }
    }

    #[test]
    fn places_depend_on_the_seed_and_the_shape_alone() {
        let made = |seed: u64| change(Config { seed, ..Config::default() }, (4, 6), &[1.0, 2.0, 3.0]);
        assert_eq!(made(1), made(1));
        assert_ne!(made(1), made(2));
    }

    #[test]
    fn counts_of_single_sites_are_read_from_patterns() {
        let config = json!({"n_frequency": 8, "n_frequency_pattern": {"q_.*": 4}, "init_weights": true});
        let modules = ["layers.0.q_proj".to_owned(), "layers.0.k_proj".to_owned()];
        let (method, _) = from_peft(config.as_object().unwrap(), &modules).unwrap();
        assert_eq!(method.params["frequencies_pattern"], json!({"layers.0.q_proj": 4}));
        assert_eq!(method.params["start"], "zero");
    }
}

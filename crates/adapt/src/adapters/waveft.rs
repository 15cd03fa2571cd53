//! Wavelet fine-tuning: a change whose wavelet transform is 0 but for a few entries at random places, each of which changes a small patch of the
//! weight; where an adapter has to be small and its change of high rank.
//!
//! # Update
//! ```text
//! y_to = x_ti (W_oi + C_oi)^T
//! C_pq = scaling · Σ_k c_k f_k(p) g_k(q)                                     k = 1 … frequencies
//! f(p) = h(p - 2 a + L - 2)        a of the place's half, h the low-pass or the high-pass filter of L taps
//! ```
//!
//! # Symbols
//! `waveft_spectrum` `c_k`, f32, trained, 0 at the start. Their places are the first of a random order of all o · i, of torch's generator with
//! `seed`; linears of one shape have the same. The matrix of coefficients is wider than the weight by L - 2 on both sides together, and one more
//! where that is odd, with the places in its middle; its upper and lower, left and right halves are the four bands of one level.
//!
//! # Cost
//! `frequencies` parameters per linear. Each pass makes `W'` twice, forward and reverse, by a copy of the weight and L² additions for each
//! parameter, and the gradient by it, `2 i o` FLOPs per token.
//!
//! # Limits
//! With c = 0 it is the base, bit for bit. With all frequencies and `haar` it is any change of the weight.
//!
//! # Departures
//! none; agrees with PEFT, places included, for its `db1` (`haar`) to `db4`. In its bands, as there, a place in the right half has the high-pass
//! filter along rows and one in the lower half along columns. `frequencies_pattern` names whole paths, not patterns: reading a PEFT folder
//! resolves its patterns. Numbers of entries in proportion to sizes are said by that pattern. Weights of 214748364 entries and more are refused:
//! torch draws their places in another way.
//!
//! # Paper
//! Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets. Bilican, Yılmaz, Tekalp, Cinbiş, 2025.

use std::collections::BTreeMap;

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, WeightMap};
use attune_points::{Locals, Weight};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, MethodRef, Paper, Point, SiteKind};
use attune_tensor::rng::Rng;
use candle_core::{Device, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::parts::scaling::Scaling;
use crate::parts::starts::{self, Start};
use crate::parts::{foreign, sparse, spectrum, torch};

const SPECTRUM: &str = "waveft_spectrum";
const PEFT_TYPE: &str = "WAVEFT";

/// What an entry changes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Wavelet {
    /// The entry of the weight at its own place, without a transform.
    None,
    /// Two by two entries.
    #[default]
    Haar,
    /// Four by four, by Daubechies' wavelet of two vanishing moments.
    Db2,
    /// Six by six, of three.
    Db3,
    /// Eight by eight, of four.
    Db4,
}

/// Low-pass filters of reconstruction, by Daubechies: of norm 1, orthogonal to their own even shifts, and with as many vanishing moments as
/// they have pairs of taps.
const HAAR: [f64; 2] = [std::f64::consts::FRAC_1_SQRT_2; 2];
const DB2: [f64; 4] = [0.48296291314453416, 0.8365163037378079, 0.2241438680420134, -0.12940952255126037];
const DB3: [f64; 6] = [
    0.33267055295008263,
    0.8068915093110925,
    0.45987750211849154,
    -0.13501102001025458,
    -0.08544127388202666,
    0.03522629188570954,
];
const DB4: [f64; 8] = [
    0.2303778133088965,
    0.7148465705529157,
    0.6308807679298589,
    -0.027983769416859854,
    -0.18703481171909309,
    0.030841381835560764,
    0.0328830116668852,
    -0.010597401785069032,
];

impl Wavelet {
    /// The taps of its low-pass filter; none without a transform.
    fn low(self) -> &'static [f64] {
        match self {
            Self::None => &[],
            Self::Haar => &HAAR,
            Self::Db2 => &DB2,
            Self::Db3 => &DB3,
            Self::Db4 => &DB4,
        }
    }

    /// PEFT's name of its family, that of the first where there is no transform.
    fn family(self) -> &'static str {
        match self {
            Self::None | Self::Haar => "db1",
            Self::Db2 => "db2",
            Self::Db3 => "db3",
            Self::Db4 => "db4",
        }
    }

    /// By PEFT's names; the first symlets are Daubechies' own.
    fn of_family(family: &str) -> Option<Self> {
        match family {
            "db1" | "haar" => Some(Self::Haar),
            "db2" | "sym2" => Some(Self::Db2),
            "db3" | "sym3" => Some(Self::Db3),
            "db4" => Some(Self::Db4),
            _ => None,
        }
    }
}

/// Parameters of WaveFT.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Entries of the transform that train.
    #[schemars(range(min = 1, max = 1_000_000))]
    frequencies: u32,
    /// Factor on the change.
    #[schemars(range(min = 0.0, max = 1e6))]
    scaling: f64,
    /// What an entry changes.
    wavelet: Wavelet,
    /// Seed of the places of these entries.
    #[schemars(range(min = 0))]
    seed: u64,
    /// Entries at single sites, by whole path.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    frequencies_pattern: BTreeMap<String, u32>,
}

impl Default for Config {
    /// PEFT's values.
    fn default() -> Self {
        Self {
            frequencies: 2592,
            scaling: 25.0,
            wavelet: Wavelet::Haar,
            seed: 777,
            frequencies_pattern: BTreeMap::new(),
        }
    }
}

pub(super) struct Waveft {
    config: Config,
}

impl Method for Waveft {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets",
            authors: "Ahmet Bilican, M. Akın Yılmaz, A. Murat Tekalp, R. Gökberk Cinbiş",
            year: 2025,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "frequencies",
        merges: Merges::Weight,
        peft_type: Some(PEFT_TYPE),
        ..Card::new(
            "waveft",
            Point::Adapter,
            "Wavelet fine-tuning: a change whose wavelet transform is 0 but for a few entries at random places, each of which changes \
             a small patch of the weight; where an adapter has to be small and its change of high rank.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        let faults = Scaling::faults_of("frequencies_pattern", &config.frequencies_pattern, 1..=1_000_000);
        if faults.is_empty() { Ok(Box::new(Self { config })) } else { Err(faults) }
    }
}

/// One side of the matrix of coefficients, for a weight this wide.
struct Side {
    width: usize,
    /// Of the first place.
    offset: usize,
    /// Where the high band begins.
    half: usize,
}

impl Side {
    fn of(width: usize, taps: usize) -> Self {
        let padded = (width + taps - 2).next_multiple_of(2);
        Self { width, offset: (padded - width) / 2, half: padded / 2 }
    }

    /// Whether a place is in the high band, and which of its band it is.
    fn band(&self, place: usize) -> (bool, usize) {
        let at = place + self.offset;
        if at < self.half { (false, at) } else { (true, at - self.half) }
    }

    /// Where coefficient `at` of a band comes to with this filter, and with which factors: nothing beyond the weight.
    fn taps<'a>(&self, at: usize, filter: &'a [f64]) -> impl Iterator<Item = (usize, f64)> + use<'a> {
        let (width, skipped) = (self.width, filter.len() - 2);
        let place = move |tap: usize| (2 * at + tap).checked_sub(skipped).filter(|place| *place < width);
        filter.iter().enumerate().filter_map(move |(tap, factor)| Some((place(tap)?, *factor)))
    }
}

/// What each number of a spectrum adds to a weight: entry by entry its index, a flat place and a factor.
struct Patches {
    numbers: Vec<u32>,
    places: Vec<i64>,
    factors: Vec<f64>,
}

impl Patches {
    fn of(places: &[u64], (o, i): (usize, usize), low: &[f64]) -> Self {
        let mut patches = Self { numbers: Vec::new(), places: Vec::new(), factors: Vec::new() };
        if low.is_empty() {
            patches.numbers = (0..places.len() as u32).collect();
            patches.places = places.iter().map(|place| *place as i64).collect();
            patches.factors = vec![1.0; places.len()];
            return patches;
        }
        let sign = |tap: usize| if tap.is_multiple_of(2) { 1.0 } else { -1.0 };
        let high: Vec<f64> = low.iter().rev().enumerate().map(|(tap, factor)| sign(tap) * factor).collect();
        let filter = |is_high: bool| if is_high { high.as_slice() } else { low };
        let (rows, cols) = (Side::of(o, low.len()), Side::of(i, low.len()));
        for (number, place) in places.iter().enumerate() {
            let (lower, row) = rows.band(*place as usize / i);
            let (right, col) = cols.band(*place as usize % i);
            // Right is high along rows, and below is high along columns.
            for (p, along_rows) in rows.taps(row, filter(right)) {
                for (q, along_cols) in cols.taps(col, filter(lower)) {
                    patches.numbers.push(number as u32);
                    patches.places.push((p * i + q) as i64);
                    patches.factors.push(along_rows * along_cols);
                }
            }
        }
        patches
    }
}

impl Adapter for Waveft {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let Config { frequencies, frequencies_pattern, .. } = &self.config;
        spectrum::attach(SPECTRUM, (*frequencies, frequencies_pattern), sites)
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        starts::each(at, rng, |_| Start::Constant(0.0))
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
            wavelet_family: config.wavelet.family().to_owned(),
            use_idwt: config.wavelet != Wavelet::None,
            random_loc_seed: config.seed,
            n_frequency_pattern: config.frequencies_pattern,
            ..Layout::default()
        };
        Some(foreign::peft(PEFT_TYPE, &layout, vec![(SPECTRUM, SPECTRUM)]))
    }
}

impl WeightMap for Waveft {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        let spectrum_k = tensors.get(SPECTRUM)?;
        let (o, i) = w_oi.dims2()?;
        let places = torch::permutation((o * i) as u64, spectrum_k.elem_count(), self.config.seed);
        let Patches { numbers, places, factors } = Patches::of(&places, (o, i), self.config.wavelet.low());
        let factors = factors.into_iter().map(|factor| factor * self.config.scaling).collect::<Vec<f64>>();
        let factors = Tensor::new(factors, &Device::Cpu)?.to_dtype(spectrum_k.dtype())?;
        let values = (spectrum_k.index_select(&Tensor::new(numbers, &Device::Cpu)?, 0)? * factors)?;
        sparse::added(&w_oi.contiguous()?, &Tensor::new(places, &Device::Cpu)?, &values)
    }
}

/// The keys of `adapter_config.json`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(default)]
struct Layout {
    n_frequency: u32,
    scaling: f64,
    wavelet_family: String,
    use_idwt: bool,
    random_loc_seed: u64,
    n_frequency_pattern: BTreeMap<String, u32>,
    proportional_parameters: bool,
    init_weights: bool,
    fan_in_fan_out: bool,
    bias: String,
}

impl Default for Layout {
    fn default() -> Self {
        Self {
            n_frequency: 2592,
            scaling: 25.0,
            wavelet_family: "db1".to_owned(),
            use_idwt: true,
            random_loc_seed: 777,
            n_frequency_pattern: BTreeMap::new(),
            proportional_parameters: false,
            init_weights: true,
            fan_in_fan_out: false,
            bias: "none".to_owned(),
        }
    }
}

/// What `adapter_config.json` of a PEFT WaveFT says in our words.
pub(super) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let layout: Layout = foreign::parse(config)?;
    let mut faults = Vec::new();
    if layout.proportional_parameters {
        let message = "is true, with numbers of entries that the file does not say; expected `n_frequency_pattern` with one for each \
                       module";
        faults.push(Fault::new("proportional_parameters", message));
    }
    let wavelet = if layout.use_idwt { Wavelet::of_family(&layout.wavelet_family) } else { Some(Wavelet::None) };
    let Some(wavelet) = wavelet.filter(|_| faults.is_empty()) else {
        if wavelet.is_none() {
            let message =
                format!("is {:?}; this version knows db1, db2, db3, db4, sym2 and sym3", layout.wavelet_family);
            faults.push(Fault::new("wavelet_family", message));
        }
        return Err(faults);
    };
    let own = foreign::by_pattern("n_frequency_pattern", layout.n_frequency, layout.n_frequency_pattern, modules)?;
    let params = json!({
        "frequencies": layout.n_frequency,
        "scaling": layout.scaling,
        "wavelet": wavelet,
        "seed": layout.random_loc_seed,
        "frequencies_pattern": own,
    });
    let params = params.as_object().cloned().unwrap_or_default();
    Ok((MethodRef { method: Waveft::CARD.name.to_owned(), params }, Targets::Many(modules.to_vec())))
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;

    const ALL: [Wavelet; 4] = [Wavelet::Haar, Wavelet::Db2, Wavelet::Db3, Wavelet::Db4];

    #[test]
    fn filters_are_daubechies_own_by_what_defines_them() {
        for wavelet in ALL {
            let low = wavelet.low();
            for shift in (0..low.len()).step_by(2) {
                let product: f64 = low.iter().zip(&low[shift..]).map(|(a, b)| a * b).sum();
                assert!((product - f64::from(u8::from(shift == 0))).abs() < 1e-14, "{wavelet:?}");
            }
            assert!((low.iter().sum::<f64>() - 2f64.sqrt()).abs() < 1e-14);
            for moment in 0..low.len() / 2 {
                let sign = |tap: usize| if tap.is_multiple_of(2) { 1.0 } else { -1.0 };
                let sum: f64 =
                    low.iter().enumerate().map(|(tap, h)| sign(tap) * (tap as f64).powi(moment as i32) * h).sum();
                assert!(sum.abs() < 1e-11, "{wavelet:?} has moment {moment} of {sum}");
            }
        }
    }

    fn change(wavelet: Wavelet, (o, i): (usize, usize), spectrum: &[f64]) -> Tensor {
        let config = Config { wavelet, scaling: 2.0, ..Config::default() };
        let zero = Tensor::zeros((o, i), DType::F64, &Device::Cpu).unwrap();
        let spectrum = Tensor::new(spectrum, &Device::Cpu).unwrap();
        Waveft { config }.graph(&zero, &Locals::new("q_proj", [(SPECTRUM, spectrum)])).unwrap()
    }

    /// By the whole matrix of coefficients, of which `synthesis · bands · synthesisᵀ` is made.
    #[test]
    fn the_change_is_the_inverse_transform_of_the_four_bands() {
        for (wavelet, (o, i)) in ALL.into_iter().zip([(6, 8), (7, 10), (9, 5), (12, 11)]) {
            let low = wavelet.low();
            let numbers: Vec<f64> = (0..9).map(|k| f64::from(k) - 3.5).collect();
            let found = change(wavelet, (o, i), &numbers);
            let places = torch::permutation((o * i) as u64, 9, 777);
            let padded = |width: usize| (width + low.len() - 2).next_multiple_of(2);
            // Row after row, a place's own half along the other side says which filter it has.
            let mut expected = vec![vec![0.0; i]; o];
            let tap = |high: bool, tap: usize| match high {
                false => low[tap],
                true => low[low.len() - 1 - tap] * if tap.is_multiple_of(2) { 1.0 } else { -1.0 },
            };
            for (place, number) in places.iter().zip(&numbers) {
                let row = *place as usize / i + (padded(o) - o) / 2;
                let col = *place as usize % i + (padded(i) - i) / 2;
                let (lower, right) = (row >= padded(o) / 2, col >= padded(i) / 2);
                let (a, b) = (row % (padded(o) / 2), col % (padded(i) / 2));
                for (u, v) in (0..low.len()).flat_map(|u| (0..low.len()).map(move |v| (u, v))) {
                    let (p, q) = ((2 * a + u) as i64 - low.len() as i64 + 2, (2 * b + v) as i64 - low.len() as i64 + 2);
                    if (0..o as i64).contains(&p) && (0..i as i64).contains(&q) {
                        expected[p as usize][q as usize] += 2.0 * number * tap(right, u) * tap(lower, v);
                    }
                }
            }
            for (found, expected) in found.to_vec2::<f64>().unwrap().iter().flatten().zip(expected.iter().flatten()) {
                assert!((found - expected).abs() < 1e-12, "{wavelet:?}");
            }
        }
    }

    /// With an orthogonal transform lengths are kept; at the edges of longer filters some of it is beyond the weight.
    #[test]
    fn all_entries_of_haars_wavelet_reach_every_change() {
        let numbers: Vec<f64> = (0..48).map(|k| (f64::from(k) * 0.7).sin()).collect();
        let square = |values: &[f64]| values.iter().map(|value| value * value).sum::<f64>();
        let made = change(Wavelet::Haar, (6, 8), &numbers).flatten_all().unwrap().to_vec1::<f64>().unwrap();
        assert!((square(&made) - 4.0 * square(&numbers)).abs() < 1e-10);
        let plain = change(Wavelet::None, (6, 8), &[1.0]).flatten_all().unwrap().to_vec1::<f64>().unwrap();
        assert_eq!(plain.iter().filter(|value| **value == 2.0).count(), 1);
        assert_eq!(plain.iter().filter(|value| **value == 0.0).count(), 47);
    }

    #[test]
    fn a_wavelet_that_is_not_known_is_refused_with_those_that_are() {
        let config = |family: &str, transforms: bool, proportional: bool| {
            json!({
                "peft_type": "WAVEFT", "n_frequency": 8, "wavelet_family": family, "use_idwt": transforms,
                "proportional_parameters": proportional, "n_frequency_pattern": {"q_.*": 4}
            })
        };
        let read = |config: Value| from_peft(config.as_object().unwrap(), &["layers.0.q_proj".to_owned()]);
        let (method, _) = read(config("sym3", true, false)).unwrap();
        assert_eq!(method.params["wavelet"], "db3");
        assert_eq!(method.params["frequencies_pattern"], json!({"layers.0.q_proj": 4}));
        assert_eq!(read(config("coif7", false, false)).unwrap().0.params["wavelet"], "none");
        let faults = read(config("coif7", true, true)).unwrap_err();
        assert!(faults[0].to_string().starts_with("`proportional_parameters` is true"), "{}", faults[0]);
        assert!(faults[1].to_string().contains("this version knows db1"), "{}", faults[1]);
    }
}

//! Holds each weight in four bits, as one of sixteen values that normal numbers fall on alike often: a quarter of a base of bf16,
//! for adapters on models that do not fit otherwise (QLoRA).
//!
//! # Update
//! ```text
//! a_b = max |w| over block b of 64 neighbours        q = the k of the nearest c_k to w / a_b        W'_oi = c_q a_b
//! double_quant:  m = mean_b a_b        a_b' = d(a_b - m) + m,  d in eight bits by blocks of 256 scales
//! ```
//!
//! # Symbols
//! `w` the numbers of a matrix, row after row; `c` the sixteen values, quantiles of the normal distribution between -1 and 1, one of them
//! 0. W' is what the model computes with: forward and back a product widens it piece by piece, rounded to the type that it
//! multiplies in. Biases, norms, tables, heads and routers stay as they are.
//!
//! # Cost
//! Half a byte a weight and 4 bytes a block, 0.5625 bytes in all; with `double_quant` 0.5159. A product widens the weight as many times as
//! it is cut into blocks of rows.
//!
//! # Limits
//! A weight whose blocks hold multiples of the values by one number each is exactly what it was. Nothing trains a quantised weight.
//!
//! # Departures
//! Values and code words are those of bitsandbytes (`quant_type: nf4`, `blocksize: 64`, `compress_statistics`); the mean of the scales is
//! summed in 64 bits, so that with `double_quant` numbers differ in the last bits. In bf16 W' is rounded once.
//!
//! # Paper
//! QLoRA: Efficient Finetuning of Quantized LLMs. Dettmers, Pagnoni, Holtzman, Zettlemoyer, 2023.

use std::ops::Range;
use std::sync::Arc;

use attune_points::quantization::Quantization;
use attune_points::{Error, Weight};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Method, Paper, Point};
use attune_tensor::Quantized;
use attune_tensor::mapped::Stored;
use candle_core::DType;
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::dynamic::{self, Dynamic};

/// Numbers of a block.
const BLOCK: usize = 64;
/// Numbers that are read at a time, about: few, for they lie in memory with 32 bits each.
const SLAB: usize = 1 << 20;

/// The sixteen values.
const VALUES: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Parameters of the format.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Whether the scales of blocks are held in eight bits themselves.
    double_quant: bool,
}

#[derive(Debug)]
pub(super) struct Nf4 {
    config: Config,
}

impl Method for Nf4 {
    const CARD: Card = Card {
        paper: Some(Paper {
            title: "QLoRA: Efficient Finetuning of Quantized LLMs",
            authors: "Tim Dettmers, Artidoro Pagnoni, Ari Holtzman, Luke Zettlemoyer",
            year: 2023,
        }),
        stored_bytes: "ceil(o*i/2) + if(double_quant, ceil(o*i/64) + 4*ceil(o*i/16384) + 4, 4*ceil(o*i/64))",
        ..Card::new(
            "nf4",
            Point::Quantization,
            "Holds each weight in four bits, as one of sixteen values that normal numbers fall on alike often: a quarter of a base \
             of bf16, for adapters on models that do not fit otherwise (QLoRA).",
        )
    };
    type Config = Config;
    type Object = dyn Quantization;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Quantization>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Quantization for Nf4 {
    fn quantize(&self, weight: &dyn Weight, dtype: DType) -> attune_points::Result<Arc<dyn Quantized>> {
        let shape @ (output, input) = weight.shape();
        let mut held =
            Held { shape, codes: Vec::with_capacity((output * input).div_ceil(2)), scales: Scales::Wide(Vec::new()) };
        let mut scales = Vec::with_capacity((output * input).div_ceil(BLOCK));
        // Whole rows, as many as are whole blocks, so that a block lies in one slab.
        let together = BLOCK / gcd(BLOCK, input.max(1));
        let rows = (SLAB / input.max(1) / together).max(1) * together;
        for start in (0..output).step_by(rows) {
            let end = (start + rows).min(output);
            let values = weight.rows(start..end, dtype)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
            let blocks: Vec<(f32, [u8; BLOCK / 2])> = values.par_chunks(BLOCK).map(block).collect();
            if let Some(at) = blocks.iter().position(|(scale, _)| !scale.is_finite()) {
                let (row, of) = (start + at * BLOCK / input.max(1), output);
                return Err(Error::Refused(format!("a weight has a number near row {row} of {of} that is not finite")));
            }
            scales.extend(blocks.iter().map(|(scale, _)| scale));
            held.codes.extend(blocks.iter().flat_map(|(_, codes)| codes));
        }
        held.codes.truncate((output * input).div_ceil(2));
        held.codes.shrink_to_fit();
        held.scales = if self.config.double_quant { Scales::twice(&scales) } else { Scales::Wide(scales) };
        Ok(Arc::new(held))
    }

    fn stored<'f>(
        &self,
        shape: (usize, usize),
        part: &dyn Fn(&str) -> Option<Stored<'f>>,
    ) -> attune_points::Result<Arc<dyn Quantized>> {
        let refused = |message: String| Error::Refused(message);
        let Some(state) = part(STATE) else {
            return Err(refused("is held in another format of few bits than `tune.quantization` says".to_owned()));
        };
        let state: State = serde_json::from_slice(state.bytes)
            .map_err(|error| refused(format!("is described in {STATE} by what cannot be read: {error}")))?;
        let double_quant = state.nested_blocksize.is_some();
        if double_quant != self.config.double_quant {
            let message = format!(
                "has scales {}; expected `tune.quantization.double_quant: {double_quant}`",
                match double_quant {
                    true => "in eight bits",
                    false => "in 32 bits",
                }
            );
            return Err(refused(message));
        }
        if state.blocksize != BLOCK || state.nested_blocksize.is_some_and(|nested| nested != dynamic::BLOCK) {
            let message = format!("is held in blocks of {} numbers; expected {BLOCK}, as usual", state.blocksize);
            return Err(refused(message));
        }
        let (numbers, is) = (shape.0 * shape.1, [shape.0, shape.1]);
        if state.shape != is {
            return Err(refused(format!("has shape {:?}; config.json makes it {is:?}", state.shape)));
        }
        let of = |name: &str, dtype: &str, length: usize| {
            let found =
                part(name).filter(|found| found.dtype == dtype && found.shape.iter().product::<usize>() == length);
            found.ok_or_else(|| refused(format!("has no {length} numbers of {dtype} as {name:?}")))
        };
        let floats = |name: &str, length: usize| -> attune_points::Result<Vec<f32>> {
            let found = of(name, "F32", length)?;
            Ok(found.bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
        };
        let values = floats(".quant_map", VALUES.len())?;
        if values.iter().zip(VALUES).any(|(a, b)| (a - b).abs() > 1e-6) {
            return Err(refused("is of other values than those of its format".to_owned()));
        }
        let blocks = numbers.div_ceil(BLOCK);
        let scales = if double_quant {
            if !Dynamic::has_values(&floats(".nested_quant_map", 256)?) {
                return Err(refused("has scales of other values than those of its format".to_owned()));
            }
            let codes = of(".absmax", "U8", blocks)?.bytes.to_vec();
            let scales = floats(".nested_absmax", blocks.div_ceil(dynamic::BLOCK))?;
            let rest =
                Dynamic::stored(codes, scales).ok_or_else(|| refused("has scales of another number".to_owned()))?;
            Scales::Narrow { mean: state.nested_offset.unwrap_or_default(), rest }
        } else {
            Scales::Wide(floats(".absmax", blocks)?)
        };
        let codes = of("", "U8", numbers.div_ceil(2))?.bytes.to_vec();
        Ok(Arc::new(Held { shape, codes, scales }))
    }
}

/// The part of a stored matrix that describes it.
const STATE: &str = ".quant_state.bitsandbytes__nf4";

/// That description, as bitsandbytes writes it.
#[derive(Debug, Deserialize)]
struct State {
    blocksize: usize,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_offset: Option<f32>,
}

const fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// The scale and the code words of a block, the first of two in the upper half of a byte. A scale is not finite where a number is not.
fn block(values: &[f32]) -> (f32, [u8; BLOCK / 2]) {
    let most = |most: f32, x: &f32| {
        if x.is_nan() {
            f32::NAN
        } else if most.is_nan() {
            most
        } else {
            most.max(x.abs())
        }
    };
    let scale = values.iter().fold(0.0, most);
    let (inverse, full) = (1.0 / scale.max(1e-38), values.len() == BLOCK);
    let mut codes = [0u8; BLOCK / 2];
    for (at, x) in values.iter().enumerate() {
        // A last block that is not full is divided, as in the original.
        let x = if full { x * inverse } else { x / scale.max(1e-38) };
        let code = nearest(x.clamp(-1.0, 1.0));
        codes[at / 2] |= if at % 2 == 0 { code << 4 } else { code };
    }
    (scale, codes)
}

/// The number of the nearest value; of two the lower one.
fn nearest(x: f32) -> u8 {
    VALUES.windows(2).map(|pair| u8::from(x > (pair[0] + pair[1]) / 2.0)).sum()
}

/// The scales of blocks.
#[derive(Debug)]
enum Scales {
    /// In 32 bits.
    Wide(Vec<f32>),
    /// In eight, less their mean.
    Narrow { mean: f32, rest: Dynamic },
}

impl Scales {
    fn twice(scales: &[f32]) -> Self {
        let mean = (scales.iter().map(|scale| f64::from(*scale)).sum::<f64>() / scales.len().max(1) as f64) as f32;
        let rest: Vec<f32> = scales.iter().map(|scale| scale - mean).collect();
        Self::Narrow { mean, rest: Dynamic::new(&rest) }
    }

    fn at(&self, block: usize) -> f32 {
        match self {
            Self::Wide(scales) => scales[block],
            Self::Narrow { mean, rest } => rest.at(block) + mean,
        }
    }

    const fn bytes(&self) -> usize {
        match self {
            Self::Wide(scales) => 4 * scales.len(),
            Self::Narrow { rest, .. } => rest.bytes() + 4,
        }
    }
}

/// A matrix in four bits.
#[derive(Debug)]
struct Held {
    shape: (usize, usize),
    codes: Vec<u8>,
    scales: Scales,
}

impl Quantized for Held {
    fn shape(&self) -> (usize, usize) {
        self.shape
    }

    fn bytes(&self) -> usize {
        self.codes.len() + self.scales.bytes()
    }

    fn widen(&self, row: usize, cols: Range<usize>, to: &mut [f32]) {
        let (mut at, mut to) = (row * self.shape.1 + cols.start, &mut to[..cols.len()]);
        while !to.is_empty() {
            let n = (BLOCK - at % BLOCK).min(to.len());
            let (some, rest) = to.split_at_mut(n);
            let values = VALUES.map({
                let scale = self.scales.at(at / BLOCK);
                move |value| value * scale
            });
            let code = |at: usize| {
                let byte = self.codes[at / 2];
                values[usize::from(if at.is_multiple_of(2) { byte >> 4 } else { byte & 15 })]
            };
            let (odd, some) = some.split_at_mut(at % 2);
            odd.iter_mut().for_each(|to| *to = code(at));
            let first = at + odd.len();
            let bytes = &self.codes[first / 2..];
            let (pairs, last) = some.as_chunks_mut::<2>();
            for (to, byte) in pairs.iter_mut().zip(bytes) {
                *to = [values[usize::from(byte >> 4)], values[usize::from(byte & 15)]];
            }
            last.iter_mut().for_each(|to| *to = code(first + 2 * pairs.len()));
            (at, to) = (at + n, rest);
        }
    }
}

#[cfg(test)]
mod tests {
    use attune_tensor::testing::assert_same_bits;
    use attune_tensor::{FrozenWeight, Mapped, Rng};
    use candle_core::{Device, Tensor};

    use super::*;

    fn quantized(weight: &Tensor, double_quant: bool, dtype: DType) -> FrozenWeight {
        let few = Nf4 { config: Config { double_quant } }.quantize(weight, dtype).unwrap();
        FrozenWeight::quantized(few, dtype).unwrap()
    }

    fn whole(of: &FrozenWeight) -> Tensor {
        of.rows(0..of.shape().0, DType::F32).unwrap()
    }

    /// The numbers of a case whose weight is not kept.
    fn many(shape: &[usize]) -> Tensor {
        let number = |k: i64| ((k * 7919 + k / 64 * 104_729) % 2001 - 1000) * (1 + k / 64 % 17);
        let count: usize = shape.iter().product();
        let values: Vec<f32> = (0..count as i64).map(|k| number(k) as f32 / 16384.0).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap()
    }

    /// What bitsandbytes makes of the same numbers, bit for bit; with scales in eight bits up to the mean's rounding.
    #[test]
    fn numbers_are_those_of_bitsandbytes() {
        let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/nf4/matrices.safetensors");
        let golden = Mapped::open(&file).unwrap();
        let cases: Vec<&str> = golden.names().filter_map(|name| name.strip_suffix(".double")).collect();
        assert!(cases.len() >= 6, "{cases:?}");
        for case in cases {
            let read = |name: &str| golden.get(&format!("{case}.{name}")).unwrap();
            let double = read("double").unwrap();
            let dtype = double.dtype();
            let weight = read("weight").map_or_else(|| many(double.shape()), |weight| weight.to_tensor(dtype).unwrap());
            if let Some(expected) = read("plain") {
                let expected = expected.to_tensor(DType::F32).unwrap();
                assert_same_bits(case, &whole(&quantized(&weight, false, dtype)), &expected);
            }
            let (found, expected) = (whole(&quantized(&weight, true, dtype)), double.to_tensor(DType::F32).unwrap());
            let off = (found - &expected).unwrap().abs().unwrap().flatten_all().unwrap();
            let (off, size) =
                (off.to_vec1::<f32>().unwrap(), expected.flatten_all().unwrap().to_vec1::<f32>().unwrap());
            let ulp = if dtype == DType::BF16 { 1.0 / 128.0 } else { 1e-6 };
            for (off, size) in off.iter().zip(size) {
                assert!(*off <= ulp * size.abs().max(1e-6), "{case}: {off} of {size}");
            }
        }
    }

    /// Half a byte a weight and the scales, as the card says; pieces are those of the whole, wherever they begin.
    #[test]
    fn it_takes_what_its_card_says_and_gives_any_piece() {
        for (output, input, double_quant) in
            [(6, 64, false), (5, 21, false), (7, 33, true), (300, 70, true), (1, 1, false)]
        {
            let weight = Rng::new(3, "w").normal_tensor((output, input), 1.0, DType::F32).unwrap();
            let few = Nf4 { config: Config { double_quant } }.quantize(&weight, DType::F32).unwrap();
            let names = [("o", output.into()), ("i", input.into()), ("double_quant", double_quant.into())];
            let names = names.map(|(name, value): (&str, serde_json::Value)| (name.to_owned(), value));
            let said = attune_spec::method::expression::number(Nf4::CARD.stored_bytes, &names.into_iter().collect());
            assert_eq!(said.unwrap(), few.bytes() as f64, "{output} by {input}");
            let mut all = vec![0.0; output * input];
            all.chunks_exact_mut(input).enumerate().for_each(|(row, to)| few.widen(row, 0..input, to));
            for row in [0, output / 2, output - 1] {
                for cols in [0..input, input / 3..input, 0..input / 2, input - 1..input, 1..input.min(18)] {
                    let mut some = vec![0.0; cols.len()];
                    few.widen(row, cols.clone(), &mut some);
                    assert_eq!(some, all[row * input..][cols], "row {row}");
                }
            }
        }
    }

    #[test]
    fn what_consists_of_the_values_is_exact_and_zeros_stay_zeros() {
        let values: Vec<f32> = (0..128).map(|i| VALUES[i * 7 % 16] * if i < 64 { 0.5 } else { 3.0 }).collect();
        let weight = Tensor::from_vec(values, (2, 64), &Device::Cpu).unwrap();
        assert_same_bits("values", &whole(&quantized(&weight, false, DType::F32)), &weight);
        let zeros = Tensor::zeros((3, 70), DType::F32, &Device::Cpu).unwrap();
        for double_quant in [false, true] {
            assert_same_bits("zeros", &whole(&quantized(&zeros, double_quant, DType::F32)), &zeros);
        }
    }

    /// A number is off by at most half of the widest gap between values, times the scale of its block.
    #[test]
    fn no_number_is_further_off_than_half_a_gap_and_threads_change_nothing() {
        let weight = Rng::new(4, "w").normal_tensor((40, 96), 0.02, DType::F32).unwrap();
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| whole(&quantized(&weight, true, DType::BF16)))
        };
        assert_same_bits("threads", &run(1), &run(3));
        let found = whole(&quantized(&weight, false, DType::F32)).flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let values = weight.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (found, values) in found.chunks(BLOCK).zip(values.chunks(BLOCK)) {
            let most = values.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            assert!(found.iter().zip(values).all(|(a, b)| (a - b).abs() <= 0.152 * most));
        }
    }

    #[test]
    fn what_is_not_finite_is_refused() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = vec![0.5f32; 192];
            values[100] = bad;
            let weight = Tensor::from_vec(values, (2, 96), &Device::Cpu).unwrap();
            let few = Nf4 { config: Config::default() }.quantize(&weight, DType::F32);
            assert!(few.unwrap_err().to_string().contains("near row 0 of 2 that is not finite"));
        }
    }

    #[test]
    fn scales_in_eight_bits_keep_their_mean() {
        let scales: Vec<f32> = (0..700).map(|i| 1.0 + (i % 13) as f32 * 0.01).collect();
        let Scales::Narrow { mean, rest } = Scales::twice(&scales) else { panic!() };
        assert!((f64::from(mean) - scales.iter().map(|x| f64::from(*x)).sum::<f64>() / 700.0).abs() < 1e-6);
        assert_eq!(rest.codes().len(), 700);
        let held = Scales::Narrow { mean, rest };
        assert!(scales.iter().enumerate().all(|(at, scale)| (held.at(at) - scale).abs() < 0.001));
    }
}

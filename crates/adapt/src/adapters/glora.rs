//! A linear's weight and bias, scaled and shifted by small tensors of a form that is chosen for each: more ways to change a
//! linear than a low-rank sum has, for bases whose rows or biases are off as a whole.
//!
//! # Update
//! ```text
//! W'_oi = W_oi + W_oi ∘ A_oi + B_oi
//! b'_o  = b_o + b_o ∘ D_o + E_o + W_oi C_i          where the linear has a bias
//! y_to  = x_ti W'_oi^T + b'_o
//! A, B  = Xd_or Xu_ri (`low_rank`), a column X_o1 (`vector`), a number (`constant`) or 0 (`none`);  C = Xd_ir Xu_r1, X_i1 or 0
//! D, E  = X_o, a number or 0
//! ```
//!
//! # Symbols
//! `glora_A_Xd` and `glora_A_Xu`, or `glora_A_X`, and so for B to E; f32, trained. `Xu` starts uniform in ±1/sqrt of its last
//! width (Kaiming with a = sqrt(5)), all others at 0.
//!
//! # Cost
//! By default `2 r (o + i)` parameters per linear, and `r (i + 1) + 2` more where it has a bias. Each pass makes `W'` twice,
//! forward and reverse: `4 r i o` FLOPs and two more passes over `o i` values each.
//!
//! # Limits
//! As it starts it is the base, bit for bit. With A = 0 and no bias it is LoRA with alpha = r. With A a vector alone it scales
//! what the linear gives.
//!
//! # Departures
//! none; agrees with PEFT, of whose folders the zeros that stand for what is off are read and not written. PEFT does not put it
//! on GPT-2's transposed linears; here they are linears like others.
//!
//! # Paper
//! One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning. Chavan, Liu, Gupta, Xing, Shen, 2023. The supports are
//! chosen for all linears at once: the paper's search over those of each layer is not here.

use attune_architecture::{Architecture, Site, SiteKind as Kind};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, WeightMap};
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, MethodRef, Paper, Point, SiteKind};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::parts::keys::{self, Keys};
use crate::parts::starts::{self, Start};
use crate::parts::{factors, foreign, linears};

const PEFT_TYPE: &str = "GLORA";

/// The local names of what one of the letters is made of.
struct Names {
    down: &'static str,
    up: &'static str,
    whole: &'static str,
}

const A: Names = Names { down: "glora_A_Xd", up: "glora_A_Xu", whole: "glora_A_X" };
const B: Names = Names { down: "glora_B_Xd", up: "glora_B_Xu", whole: "glora_B_X" };
const C: Names = Names { down: "glora_C_Xd", up: "glora_C_Xu", whole: "glora_C_X" };
const D: Names = Names { down: "glora_D_Xd", up: "glora_D_Xu", whole: "glora_D_X" };
const E: Names = Names { down: "glora_E_Xd", up: "glora_E_Xu", whole: "glora_E_X" };

/// What a matrix is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum OfMatrix {
    /// A product of two thin matrices.
    LowRank,
    /// A column: a number for each row.
    Vector,
    /// One number.
    Constant,
    /// Nothing.
    None,
}

/// What a column that the weight is multiplied with is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum OfColumn {
    /// A product of a thin matrix and a short column.
    LowRank,
    /// The column itself.
    Vector,
    /// Nothing.
    None,
}

/// What a vector as long as the bias is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum OfBias {
    /// The vector itself.
    Vector,
    /// One number.
    Constant,
    /// Nothing.
    None,
}

/// Parameters of GLoRA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Rank of what is `low_rank`.
    #[schemars(range(min = 1, max = 4096))]
    rank: u32,
    /// What scales the weight and what is added to it are (A and B).
    weight: OfMatrix,
    /// What the weight gives the bias by is (C).
    coupling: OfColumn,
    /// What scales the bias and what is added to it are (D and E).
    bias: OfBias,
}

impl Default for Config {
    /// PEFT's values.
    fn default() -> Self {
        Self { rank: 8, weight: OfMatrix::LowRank, coupling: OfColumn::LowRank, bias: OfBias::Constant }
    }
}

pub(super) struct Glora {
    config: Config,
}

impl Method for Glora {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning",
            authors: "Arnav Chavan, Zhuang Liu, Deepak Gupta, Eric Xing, Zhiqiang Shen",
            year: 2023,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "2*(if(weight == \"low_rank\", rank*(i + o), 0) + o*(weight == \"vector\") + (weight == \"constant\")) \
                     + b*(if(coupling == \"low_rank\", rank*(i + 1), 0) + i*(coupling == \"vector\") \
                     + 2*(o*(bias == \"vector\") + (bias == \"constant\")))",
        graph_numbers: "rows*(i+o) + 15*o*i",
        merges: Merges::Weight,
        peft_type: Some(PEFT_TYPE),
        ..Card::new(
            "glora",
            Point::Adapter,
            "A linear's weight and bias, scaled and shifted by small tensors of a form that is chosen for each: more ways to change \
             a linear than a low-rank sum has, for bases whose rows or biases are off as a whole.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        if (config.weight, config.coupling, config.bias) == (OfMatrix::None, OfColumn::None, OfBias::None) {
            let message =
                "is `none`, and so are `coupling` and `bias`: nothing would train; expected a form for one of them";
            return Err(vec![Fault::new("weight", message)]);
        }
        Ok(Box::new(Self { config }))
    }
}

impl Glora {
    /// The tensors at a linear of this shape.
    fn tensors(&self, site: &Site, (o, i): (usize, usize)) -> Result<Vec<TensorSpec>, Fault> {
        let Config { weight, coupling, bias, .. } = self.config;
        let has_bias = matches!(site.kind, Kind::Linear { bias: true, .. });
        let mut tensors = Vec::new();
        for of in [A, B] {
            match weight {
                OfMatrix::LowRank => {
                    let r = factors::within(self.config.rank, site, (o, i))?;
                    tensors.push(TensorSpec::trained(of.down, [o, r]));
                    tensors.push(TensorSpec::trained(of.up, [r, i]));
                }
                OfMatrix::Vector => tensors.push(TensorSpec::trained(of.whole, [o, 1])),
                OfMatrix::Constant => tensors.push(TensorSpec::trained(of.whole, [1])),
                OfMatrix::None => {}
            }
        }
        match coupling {
            _ if !has_bias => {}
            OfColumn::LowRank => {
                let r = self.config.rank as usize;
                tensors.push(TensorSpec::trained(C.down, [i, r]));
                tensors.push(TensorSpec::trained(C.up, [r, 1]));
            }
            OfColumn::Vector => tensors.push(TensorSpec::trained(C.whole, [i, 1])),
            OfColumn::None => {}
        }
        for of in [D, E] {
            match bias {
                _ if !has_bias => {}
                OfBias::Vector => tensors.push(TensorSpec::trained(of.whole, [o])),
                OfBias::Constant => tensors.push(TensorSpec::trained(of.whole, [1])),
                OfBias::None => {}
            }
        }
        if tensors.is_empty() {
            let message = format!("is `none`, and {} has no bias: nothing would train there", site.id);
            return Err(Fault::new("weight", message));
        }
        Ok(tensors)
    }

    /// What scales the weight, or is added to it; none if it is off.
    fn matrix(&self, of: &Names, tensors: &Locals) -> attune_points::Result<Option<Tensor>> {
        Ok(match self.config.weight {
            OfMatrix::LowRank => Some(ops::matmul(tensors.get(of.down)?, tensors.get(of.up)?)?),
            OfMatrix::Vector | OfMatrix::Constant => Some(tensors.get(of.whole)?.clone()),
            OfMatrix::None => None,
        })
    }
}

impl Adapter for Glora {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        linears::attach(sites, |site, output, input| self.tensors(site, (output, input)))
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        let drawn = [A.up, B.up, C.up];
        starts::each(
            at,
            rng,
            |spec| {
                if drawn.contains(&spec.local) { Start::kaiming(spec) } else { Start::Constant(0.0) }
            },
        )
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Weight(self)
    }

    fn merge(&self, at: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        let Some(spec) = at.tensors.first() else { return Ok(Merged::No("nothing is attached there")) };
        let dtype = tensors.get(spec.local)?.dtype();
        let w_oi = weight.dense(dtype)?;
        let bias = weight.bias(dtype)?.map(|b_o| self.bias(&b_o, &w_oi, tensors)).transpose()?;
        Ok(Merged::Weight { weight: self.graph(&w_oi, tensors)?, bias })
    }

    fn peft(&self) -> Option<Peft> {
        let Config { rank, weight, coupling, bias } = self.config;
        let config = json!({
            "r": rank,
            "config_A_B": of_matrix(weight),
            "config_C": of_column(coupling),
            "config_D_E": of_bias(bias),
            "bias": "none",
            "init_weights": true,
        });
        let spelt = vec![
            (A.down, "glora_A.Xd"),
            (A.up, "glora_A.Xu"),
            (A.whole, "glora_A.X"),
            (B.down, "glora_B.Xd"),
            (B.up, "glora_B.Xu"),
            (B.whole, "glora_B.X"),
            (C.down, "glora_C.Xd"),
            (C.up, "glora_C.Xu"),
            (C.whole, "glora_C.X"),
            (D.whole, "glora_D.X"),
            (E.whole, "glora_E.X"),
        ];
        Some(foreign::peft(PEFT_TYPE, &config, spelt))
    }
}

impl WeightMap for Glora {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        let mut made = w_oi.clone();
        if let Some(a) = self.matrix(&A, tensors)? {
            let whole = a.shape() == w_oi.shape();
            made = (made + if whole { ops::scale_entries(w_oi, &a)? } else { w_oi.broadcast_mul(&a)? })?;
        }
        if let Some(b) = self.matrix(&B, tensors)? {
            made = made.broadcast_add(&b)?;
        }
        Ok(made)
    }

    fn bias(&self, b_o: &Tensor, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        let mut made = b_o.clone();
        if self.config.bias != OfBias::None {
            made = (made + b_o.broadcast_mul(tensors.get(D.whole)?)?)?.broadcast_add(tensors.get(E.whole)?)?;
        }
        let c_i1 = match self.config.coupling {
            OfColumn::LowRank => ops::matmul(tensors.get(C.down)?, tensors.get(C.up)?)?,
            OfColumn::Vector => tensors.get(C.whole)?.clone(),
            OfColumn::None => return Ok(made),
        };
        Ok((made + ops::matmul(w_oi, &c_i1)?.flatten_all()?)?)
    }
}

/// A form as PEFT names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Form {
    Lora,
    Vector,
    Constant,
    None,
}

const fn of_matrix(form: OfMatrix) -> Form {
    match form {
        OfMatrix::LowRank => Form::Lora,
        OfMatrix::Vector => Form::Vector,
        OfMatrix::Constant => Form::Constant,
        OfMatrix::None => Form::None,
    }
}

const fn of_column(form: OfColumn) -> Form {
    match form {
        OfColumn::LowRank => Form::Lora,
        OfColumn::Vector => Form::Vector,
        OfColumn::None => Form::None,
    }
}

const fn of_bias(form: OfBias) -> Form {
    match form {
        OfBias::Vector => Form::Vector,
        OfBias::Constant => Form::Constant,
        OfBias::None => Form::None,
    }
}

/// What is named so in a configuration, among those that there are.
fn read<T: Copy>(keys: &mut Keys<'_>, key: &str, default: T, all: &[T], named: impl Fn(T) -> Form) -> T {
    let form = keys.get(key, named(default));
    match all.iter().find(|own| named(**own) == form) {
        Some(own) => *own,
        None => {
            let all: Vec<String> = all.iter().map(|own| json!(named(*own)).to_string()).collect();
            keys.fault(key, format!("is {}; expected one of {}", json!(form), all.join(", ")));
            default
        }
    }
}

/// What `adapter_config.json` of a PEFT GLoRA says in our words.
pub(super) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let mut keys = Keys::of(config);
    let own = Config::default();
    let matrices = [OfMatrix::LowRank, OfMatrix::Vector, OfMatrix::Constant, OfMatrix::None];
    let columns = [OfColumn::LowRank, OfColumn::Vector, OfColumn::None];
    let biases = [OfBias::Vector, OfBias::Constant, OfBias::None];
    let params = [
        ("rank", json!(keys.get("r", own.rank))),
        ("weight", json!(read(&mut keys, "config_A_B", own.weight, &matrices, of_matrix))),
        ("coupling", json!(read(&mut keys, "config_C", own.coupling, &columns, of_column))),
        ("bias", json!(read(&mut keys, "config_D_E", own.bias, &biases, of_bias))),
    ];
    let params = params.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    keys.finish()?;
    let modules = keys::without_inner(modules, "glora_");
    Ok((MethodRef { method: Glora::CARD.name.to_owned(), params }, Targets::Many(modules)))
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;

    fn normal(name: &str, shape: &[usize]) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap()
    }

    fn all() -> Locals {
        let shapes: [(&'static str, &[usize]); 7] = [
            (A.down, &[4, 2]),
            (A.up, &[2, 3]),
            (B.down, &[4, 2]),
            (B.up, &[2, 3]),
            (C.whole, &[3, 1]),
            (D.whole, &[4]),
            (E.whole, &[4]),
        ];
        Locals::new("up", shapes.map(|(local, shape)| (local, normal(local, shape))))
    }

    #[test]
    fn weight_and_bias_are_scaled_and_shifted_and_the_weight_reaches_the_bias() {
        let config = Config { rank: 2, weight: OfMatrix::LowRank, coupling: OfColumn::Vector, bias: OfBias::Vector };
        let (glora, locals) = (Glora { config }, all());
        let (w, b) = (normal("w", &[4, 3]), normal("b", &[4]));
        let made_w = glora.graph(&w, &locals).unwrap().to_vec2::<f64>().unwrap();
        let made_b = glora.bias(&b, &w, &locals).unwrap().to_vec1::<f64>().unwrap();
        let matrix = |name: &str| locals.get(name).unwrap().to_vec2::<f64>().unwrap();
        let vector = |name: &str| locals.get(name).unwrap().to_vec1::<f64>().unwrap();
        let product = |of: &Names, o: usize, i: usize| -> f64 {
            (0..2).map(|r| matrix(of.down)[o][r] * matrix(of.up)[r][i]).sum()
        };
        let (w, b) = (w.to_vec2::<f64>().unwrap(), b.to_vec1::<f64>().unwrap());
        for o in 0..4 {
            for i in 0..3 {
                let expected = w[o][i] * (1.0 + product(&A, o, i)) + product(&B, o, i);
                assert!((made_w[o][i] - expected).abs() < 1e-12);
            }
            let through: f64 = (0..3).map(|i| w[o][i] * matrix(C.whole)[i][0]).sum();
            let expected = b[o] * (1.0 + vector(D.whole)[o]) + vector(E.whole)[o] + through;
            assert!((made_b[o] - expected).abs() < 1e-12);
        }
    }

    #[test]
    fn without_what_scales_it_is_a_low_rank_sum_and_a_vector_scales_rows() {
        let w = normal("w", &[4, 3]);
        let low_rank = Glora { config: Config { rank: 2, ..Config::default() } };
        let mut tensors: Vec<(&'static str, Tensor)> =
            all().iter().map(|(local, tensor)| (local, tensor.clone())).collect();
        tensors.iter_mut().filter(|(local, _)| *local == A.down).for_each(|(_, x)| *x = x.zeros_like().unwrap());
        let locals = Locals::new("up", tensors);
        let sum = (&w + locals.get(B.down).unwrap().matmul(locals.get(B.up).unwrap()).unwrap()).unwrap();
        let largest = |x: Tensor| x.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f64>().unwrap();
        assert!(largest((low_rank.graph(&w, &locals).unwrap() - sum).unwrap()) < 1e-12);
        let rows = Glora { config: Config { weight: OfMatrix::Vector, ..Config::default() } };
        let (scale, shift) = (normal("scale", &[4, 1]), Tensor::zeros((4, 1), DType::F64, w.device()).unwrap());
        let made = rows.graph(&w, &Locals::new("up", [(A.whole, scale.clone()), (B.whole, shift)])).unwrap();
        let expected = w.broadcast_mul(&(scale + 1.0).unwrap()).unwrap();
        assert!(largest((made - expected).unwrap()) < 1e-12);
    }

    #[test]
    fn what_trains_nothing_and_forms_that_are_not_there_are_refused() {
        let config =
            Config { weight: OfMatrix::None, coupling: OfColumn::None, bias: OfBias::None, ..Config::default() };
        let cx = BuildCx { steps: attune_spec::id::Step(1), domains: &[], words: None };
        assert_eq!(Glora::build(config, &cx).err().unwrap()[0].path.to_string(), "weight");
        let read = |value: Value| from_peft(value.as_object().unwrap(), &[]);
        let faults = read(json!({"config_C": Form::Constant, "bias": "all"})).unwrap_err();
        let paths: Vec<String> = faults.iter().map(|fault| fault.path.to_string()).collect();
        assert_eq!(paths, ["bias", "config_C"]);
        let (method, _) = read(json!({"r": 4, "config_A_B": "vector"})).unwrap();
        assert_eq!(serde_json::to_value(method).unwrap()["coupling"], "low_rank");
    }
}

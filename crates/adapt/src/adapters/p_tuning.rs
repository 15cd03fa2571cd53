//! Rows before those of every document that a small network makes of trained ones, so that they move together: steadier to train than
//! rows by themselves, and no dearer once it is done.
//!
//! # Update
//! ```text
//! x_td = [R_pd; E_td]                                             p < length, E_td the embeddings of a document's tokens
//! R_pd = W2_dh relu(W1_hh relu(W0_hd E_pd + b0) + b1) + b2        encoder: mlp
//! R_pd = W1_dg relu(W0_gg H_pg + b0) + b1, H_pg = lstm(E_pd)      encoder: lstm, g = 2h, both directions side by side
//! ```
//! A layer of the LSTM has, in each direction, `i, f, o = sigmoid`, `c' = tanh` of `A x + B s + a`, then `c = f c + i c'`,
//! `s = o tanh(c)`, from zeros.
//!
//! # Symbols
//! `embedding` `E_pd`, `[length, d]`, normal; `linear_0`, `linear_1`, `linear_2` `W` with their biases `b`, and of the LSTM
//! `lstm_first` (`A` of the first layer, `[8h, d]`), `lstm_further` (`A` of the others), `lstm_state` `B` and `lstm_bias` `a`, layer
//! after layer, forwards before backwards, in each `i, f, c', o`. All are f32, trained, once for the whole base, and start as PyTorch's.
//!
//! # Cost
//! `length*d + h*d + h*h + d*h + 2*h + d` parameters in all with an MLP of width `h`, where the stream is `d` wide; with an LSTM
//! `8*h*(d+h+1)` and `8*h*(3*h+1)` for each further layer, then `4*h*h + 2*h + 2*h*d + d`. The network runs once a pass and part.
//! `length` rows more in each document. It does not merge.
//!
//! # Limits
//! Once trained it is its rows, to the last bit: the network is not kept with an adapter. With constant rows it is trained rows.
//!
//! # Departures
//! Rows stand before documents, as in PEFT, not within a template. The LSTM has one bias a gate, where PyTorch adds two, and no
//! dropout between layers (PEFT's default). An adapter that is trained further trains its rows. `hidden` 0 is the width of the stream.
//!
//! # Paper
//! GPT Understands, Too. Liu, Zheng, Du, Ding, Qian, Yang, Tang, 2021.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, SequenceMap};
use attune_points::{Locals, Result, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, Paper, Point, SiteKind};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::parts::prompt;
use crate::parts::starts::{self, Start};

const EMBEDDING: &str = "embedding";
/// Weight and bias of each linear.
const LINEARS: [(&str, &str); 3] =
    [("linear_0", "linear_0_bias"), ("linear_1", "linear_1_bias"), ("linear_2", "linear_2_bias")];
const FIRST: &str = "lstm_first";
const FURTHER: &str = "lstm_further";
const STATE: &str = "lstm_state";
const BIAS: &str = "lstm_bias";

/// What makes the rows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Encoder {
    /// A perceptron of three layers, row by row.
    #[default]
    Mlp,
    /// An LSTM over the rows in both directions, and a perceptron of two layers.
    Lstm,
}

/// Parameters of P-tuning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Rows before each document.
    #[schemars(range(min = 1, max = 4096))]
    length: u32,
    /// What makes them.
    encoder: Encoder,
    /// Its width, of an LSTM in each direction; 0 for that of the base's rows.
    #[schemars(range(max = 65536))]
    hidden: u32,
    /// Layers of the LSTM.
    #[schemars(range(min = 1, max = 16))]
    layers: u32,
}

impl Default for Config {
    /// PEFT's encoder.
    fn default() -> Self {
        Self { length: 20, encoder: Encoder::default(), hidden: 0, layers: 2 }
    }
}

pub(super) struct PTuning {
    config: Config,
}

impl Method for PTuning {
    const CARD: Card = Card {
        category: Some(Category::Prompt),
        paper: Some(Paper {
            title: "GPT Understands, Too",
            authors: "Xiao Liu, Yanan Zheng, Zhengxiao Du, Ming Ding, Yujie Qian, Zhilin Yang, Jie Tang",
            year: 2021,
        }),
        applies: &[SiteKind::Embedding],
        targets: prompt::TARGETS,
        parameters: "0",
        shared: "length*o + if(encoder == \"mlp\", \
                 if(hidden < 1, o, hidden)*(if(hidden < 1, o, hidden) + 2*o + 2) + o, \
                 8*if(hidden < 1, o, hidden)*(o + if(hidden < 1, o, hidden) + 1) \
                 + (layers - 1)*8*if(hidden < 1, o, hidden)*(3*if(hidden < 1, o, hidden) + 1) \
                 + if(hidden < 1, o, hidden)*(4*if(hidden < 1, o, hidden) + 2 + 2*o) + o)",
        rows_before: "length",
        moves: Some("documents come after rows that are no part of them"),
        merges: Merges::No,
        peft_type: Some("P_TUNING"),
        ..Card::new(
            "p-tuning",
            Point::Adapter,
            "Rows before those of every document that a small network makes of trained ones, so that they move together: steadier to \
             train than rows by themselves, and no dearer once it is done.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> std::result::Result<Box<dyn Adapter>, Vec<Fault>> {
        if config.encoder == Encoder::Lstm && config.length < 2 {
            let message = "is 1; an LSTM goes from row to row: expected 2 or more, or `encoder: mlp`";
            return Err(vec![Fault::new("length", message)]);
        }
        Ok(Box::new(Self { config }))
    }
}

impl PTuning {
    /// Output and input width of each linear, for a stream `d` wide.
    fn linears(&self, d: usize) -> Vec<(usize, usize)> {
        let h = self.hidden(d);
        match self.config.encoder {
            Encoder::Mlp => vec![(h, d), (h, h), (d, h)],
            Encoder::Lstm => vec![(2 * h, 2 * h), (d, 2 * h)],
        }
    }

    fn hidden(&self, d: usize) -> usize {
        if self.config.hidden == 0 { d } else { self.config.hidden as usize }
    }

    fn tensors(&self, d: usize) -> Vec<TensorSpec> {
        let (h, layers) = (self.hidden(d), self.config.layers as usize);
        let mut tensors = vec![prompt::trained(EMBEDDING, [self.config.length as usize, d])];
        if self.config.encoder == Encoder::Lstm {
            tensors.push(prompt::trained(FIRST, [8 * h, d]));
            if layers > 1 {
                tensors.push(prompt::trained(FURTHER, [(layers - 1) * 8 * h, 2 * h]));
            }
            tensors.push(prompt::trained(STATE, [layers * 8 * h, h]));
            tensors.push(prompt::trained(BIAS, [layers * 8 * h]));
        }
        for ((weight, bias), (output, input)) in LINEARS.iter().zip(self.linears(d)) {
            tensors.push(prompt::trained(weight, [output, input]));
            tensors.push(prompt::trained(bias, [output]));
        }
        tensors
    }

    /// The rows that the LSTM's last layer gives, both directions side by side.
    fn lstm(&self, rows_pd: &Tensor, tensors: &Locals) -> Result<Tensor> {
        let (state, bias) = (tensors.get(STATE)?, tensors.get(BIAS)?);
        let h = state.dim(1)?;
        let mut x_pi = rows_pd.clone();
        for layer in 0..self.config.layers as usize {
            let weights = if layer == 0 {
                tensors.get(FIRST)?.clone()
            } else {
                tensors.get(FURTHER)?.narrow(0, (layer - 1) * 8 * h, 8 * h)?
            };
            let mut sides = Vec::with_capacity(2);
            for backwards in [false, true] {
                let of = |x: &Tensor, first: usize| x.narrow(0, first + if backwards { 4 * h } else { 0 }, 4 * h);
                let gates_pg =
                    ops::linear(&x_pi, &of(&weights, 0)?.contiguous()?, Some(&of(bias, layer * 8 * h)?.contiguous()?))?;
                sides.push(direction(&gates_pg, &of(state, layer * 8 * h)?.contiguous()?, backwards)?);
            }
            x_pi = Tensor::cat(&sides, 1)?;
        }
        Ok(x_pi)
    }
}

/// The states of one direction of a layer, `[P, h]`, from what its rows add to the gates, `i, f, c', o`.
fn direction(gates_pg: &Tensor, state_gh: &Tensor, backwards: bool) -> Result<Tensor> {
    let (length, h) = (gates_pg.dim(0)?, state_gh.dim(1)?);
    let mut states = Vec::with_capacity(length);
    // Of the row before: its state and its memory.
    let mut before: Option<(Tensor, Tensor)> = None;
    for step in 0..length {
        let row = if backwards { length - 1 - step } else { step };
        let mut gates_1g = gates_pg.narrow(0, row, 1)?;
        if let Some((state_1h, _)) = &before {
            gates_1g = (gates_1g + ops::linear(state_1h, state_gh, None)?)?;
        }
        let gate = |at: usize| gates_1g.narrow(1, at * h, h);
        let mut memory_1h = (sigmoid(&gate(0)?)? * gate(2)?.tanh()?)?;
        if let Some((_, last_1h)) = &before {
            memory_1h = (memory_1h + (sigmoid(&gate(1)?)? * last_1h)?)?;
        }
        let state_1h = (sigmoid(&gate(3)?)? * memory_1h.tanh()?)?;
        states.push(state_1h.clone());
        before = Some((state_1h, memory_1h));
    }
    if backwards {
        states.reverse();
    }
    Ok(Tensor::cat(&states, 0)?)
}

/// `1 / (1 + e^-x)` by the hyperbolic tangent, which has a gradient in candle and no overflow.
fn sigmoid(x: &Tensor) -> Result<Tensor> {
    Ok((((x * 0.5)?.tanh()? * 0.5)? + 0.5)?)
}

impl Adapter for PTuning {
    fn attach(&self, arch: &Architecture, sites: &[Site]) -> std::result::Result<Vec<Attachment>, Vec<Fault>> {
        prompt::attach(arch, sites, self.config.length, self.tensors(arch.hidden))
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> Result<(Locals, BaseEdit)> {
        let input = |local: &str| at.tensors.iter().find(|spec| spec.local == local).and_then(|spec| spec.shape.last());
        starts::each(at, rng, |spec| {
            // A bias starts as the numbers of its linear do; all of an LSTM by its width.
            let of = match LINEARS.iter().find(|(_, bias)| *bias == spec.local) {
                Some((weight, _)) => input(weight),
                None if [FIRST, FURTHER, STATE, BIAS].contains(&spec.local) => input(STATE),
                None if spec.local == EMBEDDING => return Start::Normal(1.0),
                None => spec.shape.last(),
            };
            Start::Uniform(1.0 / (of.copied().unwrap_or(1) as f64).sqrt())
        })
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Sequence(self)
    }

    fn merge(&self, _: &Attachment, _: &Locals, _: &dyn Weight) -> Result<Merged> {
        Ok(Merged::No(prompt::UNMERGED))
    }

    fn peft(&self) -> Option<Peft> {
        let mut own = json!({
            "encoder_reparameterization_type": match self.config.encoder {
                Encoder::Mlp => "MLP",
                Encoder::Lstm => "LSTM",
            },
            "encoder_num_layers": self.config.layers,
            "encoder_dropout": 0.0,
        });
        if self.config.hidden > 0 {
            own["encoder_hidden_size"] = self.config.hidden.into();
        }
        Some(prompt::peft("P_TUNING", self.config.length, &own))
    }
}

impl SequenceMap for PTuning {
    fn length(&self) -> usize {
        self.config.length as usize
    }

    fn graph(&self, tensors: &Locals) -> Result<Tensor> {
        let embedding_pd = tensors.get(EMBEDDING)?;
        let mut x_pi = match self.config.encoder {
            Encoder::Mlp => embedding_pd.clone(),
            Encoder::Lstm => self.lstm(embedding_pd, tensors)?,
        };
        let n = self.linears(embedding_pd.dim(1)?).len();
        for (at, (weight, bias)) in LINEARS.iter().take(n).enumerate() {
            x_pi = ops::linear(&x_pi, tensors.get(weight)?, Some(tensors.get(bias)?))?;
            if at + 1 < n {
                x_pi = x_pi.relu()?;
            }
        }
        Ok(x_pi)
    }
}

#[cfg(test)]
mod tests {
    use attune_tensor::autograd;
    use candle_core::{DType, Device};

    use super::*;

    fn encoder(config: Config, d: usize) -> (PTuning, Locals) {
        let method = PTuning { config };
        let at = Attachment { site: "wte".into(), tensors: method.tensors(d) };
        let none = Tensor::zeros((0, 0), DType::F32, &Device::Cpu).unwrap();
        let (locals, _) = method.init(&at, &none, &mut Rng::new(3, "init")).unwrap();
        let wide = locals.iter().map(|(local, tensor)| (local, tensor.to_dtype(DType::F64).unwrap()));
        let wide = wide.collect::<Vec<_>>();
        (method, Locals::new("wte", wide))
    }

    fn values(x: &Tensor) -> Vec<Vec<f64>> {
        x.to_vec2().unwrap()
    }

    /// By loops over numbers, as the equations are written.
    #[test]
    fn an_lstm_is_its_equations() {
        let (method, tensors) = encoder(Config { length: 4, encoder: Encoder::Lstm, hidden: 3, layers: 2 }, 5);
        let (first, further) = (values(tensors.get(FIRST).unwrap()), values(tensors.get(FURTHER).unwrap()));
        let (state, bias) = (values(tensors.get(STATE).unwrap()), tensors.get(BIAS).unwrap().to_vec1::<f64>().unwrap());
        let h = 3;
        let mut x = values(tensors.get(EMBEDDING).unwrap());
        for layer in 0..2 {
            let a = if layer == 0 { &first } else { &further };
            let mut y = vec![vec![0.0; 2 * h]; 4];
            for side in 0..2 {
                let (mut s, mut c) = (vec![0.0; h], vec![0.0; h]);
                for step in 0..4 {
                    let row = if side == 0 { step } else { 3 - step };
                    let gate = |g: usize, j: usize| -> f64 {
                        let (own, all) = (side * 4 * h + g * h + j, layer * 8 * h + side * 4 * h + g * h + j);
                        let of = |w: &[f64], x: &[f64]| w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>();
                        of(&a[own], &x[row]) + of(&state[all], &s) + bias[all]
                    };
                    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
                    let next: Vec<(f64, f64)> = (0..h)
                        .map(|j| {
                            let c = sigmoid(gate(1, j)) * c[j] + sigmoid(gate(0, j)) * gate(2, j).tanh();
                            (sigmoid(gate(3, j)) * c.tanh(), c)
                        })
                        .collect();
                    (s, c) = next.into_iter().unzip();
                    y[row][side * h..][..h].copy_from_slice(&s);
                }
            }
            x = y;
        }
        let found = values(&method.lstm(tensors.get(EMBEDDING).unwrap(), &tensors).unwrap());
        for (found, expected) in found.iter().flatten().zip(x.iter().flatten()) {
            assert!((found - expected).abs() < 1e-14, "{found} against {expected}");
        }
    }

    /// An entry of a trained row moves its own row alone through the perceptron, and all of them through the LSTM.
    #[test]
    fn an_lstm_ties_rows_together_and_a_perceptron_does_not() {
        for (encoder_of, moved) in [(Encoder::Mlp, 1), (Encoder::Lstm, 4)] {
            let (method, tensors) = encoder(Config { length: 4, encoder: encoder_of, hidden: 3, layers: 1 }, 5);
            let mut found = 0;
            for row in 0..4 {
                let leaf = autograd::leaf(tensors.get(EMBEDDING).unwrap()).unwrap();
                let with = tensors.iter().map(|(local, tensor)| {
                    (local, if local == EMBEDDING { leaf.as_tensor().clone() } else { tensor.clone() })
                });
                let rows = method.graph(&Locals::new("wte", with.collect::<Vec<_>>())).unwrap();
                let one = rows.narrow(0, row, 1).unwrap();
                let gradient =
                    autograd::pull(&[&leaf], &[(&one, &one.ones_like().unwrap())]).unwrap().remove(0).unwrap();
                found += usize::from(values(&gradient)[1].iter().any(|g| *g != 0.0));
            }
            assert_eq!(found, moved, "{encoder_of:?}");
        }
    }

    #[test]
    fn a_single_row_has_no_lstm() {
        let cx = BuildCx { steps: attune_spec::id::Step(1), domains: &[], words: None };
        let config = Config { length: 1, encoder: Encoder::Lstm, ..Config::default() };
        let faults = PTuning::build(config, &cx).map(|_| ()).unwrap_err();
        assert!(faults[0].to_string().starts_with("`length` is 1; an LSTM goes from row to row"), "{}", faults[0]);
    }
}

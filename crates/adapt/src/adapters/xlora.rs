//! LoRAs that were trained one by one, mixed row by row by a small network on what the base alone makes of the text: skills of several
//! LoRAs in one answer, and none of them is changed.
//!
//! # Update
//! ```text
//! h_t    = the base's rows behind its last norm, without any adapter; a constant to gradients
//! u_t    = drop(relu(W_k … drop(relu(W_1 h_t + b_1)) … + b_k))           k = depth - 1; h_t itself with depth 1
//! s_tn   = softmax_n((V u_t + c) / τ)                                    V, c: one for all linears, or one for each
//! y_to   = x_ti W_oi^T + λ Σ_n s_tn z_tn                                 z: what adapter n would add for the row
//! ```
//! With `top_k` the scores beyond the k largest are 0. Without `softmax` they are what the network gives, and with `softmax_top` those that
//! are left are softened among themselves.
//!
//! # Symbols
//! `last` V `[n, size]` (`[n, D]` with depth 1) and `last_bias` c `[n]`; `first` W_1 `[size, D]` and `first_bias` `[size]`; `inner` and
//! `inner_bias`, W_2 … W_k and their biases one below the other; f32, trained, uniform in ±1/sqrt(inputs) at the start. `scaling` is λ,
//! `temperature` τ. The adapters are those of slots before this one at the same linear.
//!
//! # Cost
//! `n (size + 1)` parameters for V and c, once or at each linear, `size (D + 1) + (depth - 2) size (size + 1)` for the rest of the network. A
//! forward pass of the base alone goes before each pass, in training and while it writes, where that has keys and values of its own.
//! The network runs at each linear anew.
//!
//! # Limits
//! With one adapter, softmax and λ = 1 it is that adapter. What the adapters add counts, not their order in the stack, if V's rows are put in the
//! same order.
//!
//! # Departures
//! none for the pass whose adapters are off (`scaling_pass_value` 0); agrees with PEFT. There is no other scale in that pass. All adapters are
//! at each of its linears; in PEFT some may be elsewhere. Folders are in our own layout: PEFT's say where the adapters lie and not at which linears they are.
//!
//! # Paper
//! X-LoRA: Mixture of Low-Rank Adapter Experts, a Flexible Framework for Large Language Models with Applications in Protein Mechanics and
//! Molecular Design. Buehler, Buehler, 2024.

use attune_architecture::{Architecture, Site, SiteId};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, BlendMap, Blended, Merged, Peft, Port, RowCx};
use attune_points::params::Scope;
use attune_points::{Error, Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, Paper, Point, Rule, SiteKind};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::starts::{self, Start};
use crate::parts::{linears, mixing, own};

const FIRST: &str = "first";
const FIRST_BIAS: &str = "first_bias";
const INNER: &str = "inner";
const INNER_BIAS: &str = "inner_bias";
const LAST: &str = "last";
const LAST_BIAS: &str = "last_bias";

/// Parameters of X-LoRA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Adapters that it mixes: as many slots before it add to each of its linears.
    #[schemars(range(min = 1, max = 1024))]
    adapters: u32,
    /// Linears of the network, the one that gives scores among them.
    #[schemars(range(min = 1, max = 16))]
    depth: u32,
    /// Width of the network between them.
    #[schemars(range(min = 1, max = 65_536))]
    size: u32,
    /// Share of what it has between them that is dropped in training.
    #[schemars(range(min = 0.0, max = 0.99))]
    dropout: f64,
    /// Whether scores of a row add up to 1.
    softmax: bool,
    /// Whether those that `top_k` leaves are softened among themselves.
    softmax_top: bool,
    /// What scores are divided by before the softmax.
    #[schemars(range(min = 1e-6, max = 1e6))]
    temperature: f64,
    /// Whether each linear has scores of its own.
    layerwise: bool,
    /// Adapters that count for a row; 0 for all.
    #[schemars(range(min = 0, max = 1024))]
    top_k: u32,
    /// Factor on what is added.
    #[schemars(range(min = 0.0, max = 1e6))]
    scaling: f64,
}

impl Default for Config {
    /// PEFT's values, and two adapters.
    fn default() -> Self {
        Self {
            adapters: 2,
            depth: 1,
            size: 2048,
            dropout: 0.2,
            softmax: true,
            softmax_top: false,
            temperature: 1.0,
            layerwise: false,
            top_k: 0,
            scaling: 1.0,
        }
    }
}

pub(super) struct Xlora {
    config: Config,
}

impl Method for Xlora {
    const CARD: Card = Card {
        category: Some(Category::Hybrid),
        aliases: &["x-lora"],
        paper: Some(Paper {
            title: "X-LoRA: Mixture of Low-Rank Adapter Experts, a Flexible Framework for Large Language Models with Applications in \
                    Protein Mechanics and Molecular Design",
            authors: "Eric L. Buehler, Markus J. Buehler",
            year: 2024,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "if(layerwise, adapters*(if(depth > 1, size, d) + 1), 0)",
        shared: "if(depth > 1, size*(d + 1) + (depth - 2)*size*(size + 1), 0) \
                 + if(layerwise, 0, adapters*(if(depth > 1, size, d) + 1))",
        moves: Some("the adapters that it mixes are there from the start"),
        merges: Merges::No,
        rules: &[
            Rule {
                when: "true",
                require: "top_k <= adapters",
                message: "is more than there are; expected `adapters` at most",
                path: "top_k",
            },
            Rule {
                when: "softmax_top",
                require: "top_k > 0",
                message: "is for those that `top_k` leaves; expected `top_k` beside it",
                path: "softmax_top",
            },
        ],
        ..Card::new(
            "xlora",
            Point::Adapter,
            "Mixes trained LoRAs row by row by a small network on what the base alone makes of the text, and leaves them as they are: where \
             an answer needs the skills of several.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

/// A weight and a bias that read so many numbers.
fn linear(
    names: [&'static str; 2],
    rows: usize,
    input: usize,
    scope: &Scope,
    quiet: Option<&'static str>,
) -> [TensorSpec; 2] {
    let own = |spec: TensorSpec| TensorSpec { scope: scope.clone(), quiet, ..spec };
    let [weight, bias] = names;
    [
        own(TensorSpec::trained(weight, [rows, input])),
        own(TensorSpec { decay: false, ..TensorSpec::trained(bias, [rows]) }),
    ]
}

impl Adapter for Xlora {
    fn attach(&self, of: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let Config { adapters, depth, size, softmax, layerwise, .. } = self.config;
        let (n, size) = (adapters as usize, size as usize);
        // What one adapter has of a sum of 1 is always all of it.
        let quiet = (n == 1 && softmax).then_some("there is one adapter, which has all");
        let mut shared = Vec::new();
        if depth > 1 {
            shared.extend(linear([FIRST, FIRST_BIAS], size, of.hidden, &Scope::Model, quiet));
        }
        if depth > 2 {
            shared.extend(linear([INNER, INNER_BIAS], (depth as usize - 2) * size, size, &Scope::Model, quiet));
        }
        let scope = if layerwise { Scope::Site } else { Scope::Model };
        shared.extend(linear([LAST, LAST_BIAS], n, if depth > 1 { size } else { of.hidden }, &scope, quiet));
        linears::attach(sites, |_, _, _| Ok(shared.clone()))
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        // A bias has the bound of the weight that stands before it.
        let bound = |spec: &TensorSpec| {
            let place = at.tensors.iter().position(|other| other.local == spec.local).unwrap_or_default();
            let weight = if spec.shape.len() == 1 { place.saturating_sub(1) } else { place };
            Start::kaiming(&at.tensors[weight])
        };
        starts::each(at, rng, bound)
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Blend(self)
    }

    fn merge(&self, _: &Attachment, _: &Locals, _: &dyn Weight) -> attune_points::Result<Merged> {
        Ok(Merged::No("each row is mixed by itself"))
    }

    fn peft(&self) -> Option<Peft> {
        Some(own::peft(Self::CARD.name, &self.config))
    }
}

impl Xlora {
    /// What the network makes of rows of the base before it scores them.
    fn read(&self, base_td: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let Config { depth, size, dropout, .. } = self.config;
        let mut u = base_td.clone();
        for layer in 0..depth.saturating_sub(1) {
            let (weight, bias) = match layer {
                0 => (tensors.get(FIRST)?.clone(), tensors.get(FIRST_BIAS)?.clone()),
                _ => {
                    let cut = |all: &Tensor| all.narrow(0, ((layer - 1) * size) as usize, size as usize)?.contiguous();
                    (cut(tensors.get(INNER)?)?, cut(tensors.get(INNER_BIAS)?)?)
                }
            };
            u = ops::relu(&ops::linear(&u, &weight, Some(&bias))?)?;
            if let Some(masks) = cx.dropout.filter(|_| dropout > 0.0) {
                // One network: all linears see it drop the same.
                let of_network = SiteId::new(format!("{}.{layer}", Self::CARD.name));
                u = (&u * masks.mask(&of_network, size as usize, dropout, &u)?)?;
            }
        }
        Ok(u)
    }

    /// How much of each adapter each row gets, `[T, N]`.
    fn scores(&self, base_td: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let Config { softmax, softmax_top, temperature, top_k, .. } = self.config;
        let u = self.read(base_td, tensors, cx)?;
        let s_tn = ops::linear(&u, tensors.get(LAST)?, Some(tensors.get(LAST_BIAS)?))?;
        let s_tn = if softmax { ops::softmax(&(s_tn / temperature)?)? } else { s_tn };
        match (top_k as usize, softmax_top) {
            (0, _) => Ok(s_tn),
            (k, false) => Ok((&s_tn * mixing::largest(&s_tn, k)?)?),
            (k, true) => mixing::softmax(&s_tn, &mixing::largest(&s_tn, k)?),
        }
    }
}

impl BlendMap for Xlora {
    fn blends(&self) -> usize {
        self.config.adapters as usize
    }

    fn reads_base(&self) -> bool {
        true
    }

    fn graph(&self, of: &Blended<'_>, tensors: &Locals, cx: &RowCx<'_>) -> attune_points::Result<Tensor> {
        mixing::check(self, of)?;
        let unread = || Error::Refused(format!("what the base alone makes of the rows at {} is not there", cx.site));
        let s_tn = self.scores(of.base_td.ok_or_else(unread)?, tensors, cx)?;
        Ok((mixing::mixed(&s_tn, of.added)? * self.config.scaling)?)
    }
}

#[cfg(test)]
mod tests {
    use attune_points::Layout;
    use candle_core::DType;

    use super::*;

    const HIDDEN: usize = 6;
    const OUTPUT: usize = 5;

    fn random(name: &str, shape: &[usize]) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap()
    }

    fn of(config: Config) -> Xlora {
        Xlora { config }
    }

    fn tensors(of: &Xlora) -> Locals {
        let Config { adapters, depth, size, .. } = of.config;
        let (n, size) = (adapters as usize, size as usize);
        let read = if depth > 1 { size } else { HIDDEN };
        let inner = depth.saturating_sub(2) as usize * size;
        let tensors = [
            (FIRST, random("w", &[size, HIDDEN])),
            (FIRST_BIAS, random("b", &[size])),
            (INNER, random("wi", &[inner.max(1), size])),
            (INNER_BIAS, random("bi", &[inner.max(1)])),
            (LAST, random("v", &[n, read])),
            (LAST_BIAS, random("c", &[n])),
        ];
        Locals::new("q_proj", tensors)
    }

    /// What it adds for rows of the base and for what adapters would add.
    fn blended(of: &Xlora, base_td: Option<&Tensor>, added: &[Tensor]) -> attune_points::Result<Tensor> {
        let (site, layout, x_ti) = (SiteId::from("q_proj"), Layout::new(), random("x", &[4, 3]));
        let cx = RowCx { site: &site, output: OUTPUT, dropout: None, layout: &layout, rows: None };
        of.graph(&Blended { x_ti: &x_ti, added, base_td }, &tensors(of), &cx)
    }

    fn added(n: usize) -> Vec<Tensor> {
        (0..n).map(|n| random(&format!("z{n}"), &[4, OUTPUT])).collect()
    }

    fn rows(x: &Tensor) -> Vec<Vec<f64>> {
        x.to_vec2().unwrap()
    }

    /// By hand: two layers below the scores, the two largest of three, softened before, after, both or not at all.
    #[test]
    fn rows_are_mixed_by_their_scores() {
        let (h, z) = (random("h", &[4, HIDDEN]), added(3));
        for (softmax, softmax_top) in [(true, false), (false, true), (true, true), (false, false)] {
            let of = of(Config {
                adapters: 3,
                depth: 3,
                size: 5,
                softmax,
                softmax_top,
                temperature: 0.5,
                top_k: 2,
                scaling: 1.5,
                ..Config::default()
            });
            let all = tensors(&of);
            let map = |x: &[f64], weight: &str, bias: &str| -> Vec<f64> {
                let (w, b) = (rows(all.get(weight).unwrap()), all.get(bias).unwrap().to_vec1::<f64>().unwrap());
                w.iter().zip(b).map(|(w, b)| b + w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>()).collect()
            };
            let relu = |x: Vec<f64>| x.into_iter().map(|x| x.max(0.0)).collect::<Vec<_>>();
            let soft = |s: &[f64], by: f64| -> Vec<f64> {
                let all: f64 = s.iter().map(|s| (s / by).exp()).sum();
                s.iter().map(|s| (s / by).exp() / all).collect()
            };
            let found = rows(&blended(&of, Some(&h), &z).unwrap());
            for (t, h) in rows(&h).iter().enumerate() {
                let u = relu(map(&relu(map(h, FIRST, FIRST_BIAS)), INNER, INNER_BIAS));
                let s = map(&u, LAST, LAST_BIAS);
                let s = if softmax { soft(&s, 0.5) } else { s };
                let least = (0..3).min_by(|a, b| s[*a].total_cmp(&s[*b])).unwrap();
                let kept: Vec<usize> = (0..3).filter(|n| *n != least).collect();
                let left: Vec<f64> = kept.iter().map(|n| s[*n]).collect();
                let left = if softmax_top { soft(&left, 1.0) } else { left };
                for (o, found) in found[t].iter().enumerate() {
                    let sum: f64 = kept.iter().zip(&left).map(|(n, s)| s * rows(&z[*n])[t][o]).sum();
                    assert!((found - 1.5 * sum).abs() < 1e-12, "row {t}, {softmax} and {softmax_top}");
                }
            }
        }
    }

    #[test]
    fn one_adapter_by_itself_is_that_adapter() {
        let z = added(1);
        let found = blended(&of(Config { adapters: 1, ..Config::default() }), Some(&random("h", &[4, HIDDEN])), &z);
        assert_eq!(rows(&found.unwrap()), rows(&z[0]));
    }

    #[test]
    fn another_number_of_adapters_and_rows_that_are_not_there_are_refused() {
        let (of, h) = (of(Config::default()), random("h", &[4, HIDDEN]));
        let told = |base_td, n: usize| blended(&of, base_td, &added(n)).unwrap_err().to_string();
        assert_eq!(told(Some(&h), 3), "3 components are blended; expected 2");
        assert_eq!(told(None, 2), "what the base alone makes of the rows at q_proj is not there");
    }
}

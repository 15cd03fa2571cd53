//! Low-rank changes that layers share: neighbours the factor that reads, all of one kind the factors that write, which a router mixes for each
//! document; a larger rank than LoRA's from as many parameters.
//!
//! # Update
//! ```text
//! h_tr  = x_ti A_ri^T
//! π_te  = softmax(h_tr R_er^T)                      or, with `route: document`, its mean over the rows of a document
//! y_to  = x_ti W_oi^T + scaling · Σ_e π_te (h_tr B_ero)
//! ```
//!
//! # Symbols
//! `lily_A` `A_ri`, one for `stride` linears of one name and shape that follow each other in depth, uniform in ±1/sqrt(i) at the start; `lily_B` `B_ero` as `[experts rank, o]`, one for all of that name
//! and shape, 0 at the start; `lily_router` `R_er` at each, uniform in ±1/sqrt(rank); f32, trained.
//!
//! # Cost
//! `experts rank` parameters per linear, and `rank (i + experts o)` that linears share. `2 rank (i + experts o)` extra FLOPs per token forward.
//!
//! # Limits
//! With B = 0 it is the base, bit for bit. With `stride` 1 and all `B_e` alike it is LoRA with one B for all layers.
//!
//! # Departures
//! none with `route: document`; agrees with PEFT, which takes the mean over all tokens of a batch, for batches of one document. By it what a token reads depends
//! on those that follow it, and a text that is generated on those that are there: `route: token`, which is ours, mixes each row by itself.
//!
//! # Paper
//! Low-Rank Interconnected Adaptation across Layers. Zhong, Zhao, Zhou, 2024.

use std::collections::BTreeMap;

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, PeftTensors, Port, RowCx, RowMap};
use attune_points::params::Scope;
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, MethodRef, Paper, Point, SiteKind};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::{D, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::parts::keys::{self, Keys};
use crate::parts::starts::{self, Start};
use crate::parts::{linears, own};

const A: &str = "lily_A";
const B: &str = "lily_B";
const ROUTER: &str = "lily_router";
const PEFT_TYPE: &str = "LILY";

/// What a mixture is for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Route {
    /// All rows of a document have their mean.
    #[default]
    Document,
    /// Each row has its own.
    Token,
}

/// Parameters of Lily.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Rank of the change.
    #[schemars(range(min = 1, max = 4096))]
    rank: u32,
    /// How many linears of one name share the factor that reads.
    #[schemars(range(min = 1, max = 4096))]
    stride: u32,
    /// How many factors that write are mixed.
    #[schemars(range(min = 2, max = 256))]
    experts: u32,
    /// Factor on the change.
    #[schemars(range(min = 0.0, max = 1e6))]
    scaling: f64,
    /// What a mixture is for.
    route: Route,
}

impl Default for Config {
    /// PEFT's values.
    fn default() -> Self {
        Self { rank: 32, stride: 1, experts: 2, scaling: 1.0, route: Route::Document }
    }
}

pub(super) struct Lily {
    config: Config,
}

impl Method for Lily {
    const CARD: Card = Card {
        category: Some(Category::Hybrid),
        paper: Some(Paper {
            title: "Low-Rank Interconnected Adaptation across Layers",
            authors: "Yibo Zhong, Jinman Zhao, Yao Zhou",
            year: 2024,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "experts*rank",
        shared: "rank*(i + experts*o)",
        merges: Merges::No,
        peft_type: Some(PEFT_TYPE),
        ..Card::new(
            "lily",
            Point::Adapter,
            "Low-rank changes that layers share: neighbours the factor that reads, all of one kind the factors that write, which a \
             router mixes for each document; a larger rank than LoRA's from as many parameters.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

/// For each site the first of those that it shares the factor that reads with, and the first of all of its name and shape.
fn leaders(sites: &[Site], stride: usize) -> BTreeMap<&str, [&str; 2]> {
    let mut kinds: BTreeMap<_, Vec<&str>> = BTreeMap::new();
    for site in sites {
        let path = site.id.as_str();
        kinds.entry((path.rsplit('.').next().unwrap_or(path), site.out_in())).or_default().push(path);
    }
    let mut leaders = BTreeMap::new();
    for paths in kinds.into_values() {
        for (index, path) in paths.iter().enumerate() {
            leaders.insert(*path, [paths[index / stride * stride], paths[0]]);
        }
    }
    leaders
}

impl Adapter for Lily {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let (r, experts) = (self.config.rank as usize, self.config.experts as usize);
        let leaders = leaders(sites, self.config.stride as usize);
        linears::attach(sites, |site, o, i| {
            let own = site.id.as_str();
            let [reads, writes] = leaders.get(own).copied().unwrap_or([own; 2]);
            let of = |leader: &str| Scope::Group(leader.to_owned());
            Ok(vec![
                TensorSpec { scope: of(reads), ..TensorSpec::trained(A, [r, i]) },
                TensorSpec { scope: of(writes), ..TensorSpec::trained(B, [experts * r, o]) },
                TensorSpec::trained(ROUTER, [experts, r]),
            ])
        })
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        starts::each(at, rng, |spec| if spec.local == B { Start::Constant(0.0) } else { Start::kaiming(spec) })
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Delta(self)
    }

    fn merge(&self, _: &Attachment, _: &Locals, _: &dyn Weight) -> attune_points::Result<Merged> {
        Ok(Merged::No("what is read decides how its factors are mixed"))
    }

    fn peft(&self) -> Option<Peft> {
        let Config { rank, stride, experts, scaling, route } = self.config;
        if route == Route::Token {
            // PEFT would mix by the mean.
            let mut peft = own::peft(Self::CARD.name, &self.config);
            peft.config.insert("peft_type".to_owned(), "ATTUNE_LILY".into());
            return Some(peft);
        }
        let config = keys::written(
            PEFT_TYPE,
            [
                ("r", json!(rank)),
                ("stride_A", json!(stride)),
                ("num_B", json!(experts)),
                ("scaling", json!(scaling)),
                ("init_weights", json!(true)),
            ],
        );
        let tensors = vec![(A, "lily_A.weight"), (B, "lily_B.weight"), (ROUTER, "lily_router.weight")];
        Some(Peft { config, tensors: PeftTensors::Repeated(tensors) })
    }
}

impl Lily {
    /// The mixture of each row, `[T, E]`.
    fn mixtures(&self, h_tr: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let own_te = ops::softmax(&ops::linear(h_tr, tensors.get(ROUTER)?, None)?)?;
        if self.config.route == Route::Token {
            return Ok(own_te);
        }
        let (t, e) = own_te.dims2()?;
        let mut means = Vec::new();
        for (_, places) in cx.docs() {
            let mean_1e = own_te.narrow(0, places.start, places.len())?.mean_keepdim(0)?;
            means.push(mean_1e.broadcast_as((places.len(), e))?);
        }
        if means.is_empty() {
            // Rows of no document are of one.
            return Ok(own_te.mean_keepdim(0)?.broadcast_as((t, e))?.contiguous()?);
        }
        Ok(Tensor::cat(&means, 0)?)
    }
}

impl RowMap for Lily {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let h_tr = ops::linear(x_ti, tensors.get(A)?, None)?;
        let pi_te = self.mixtures(&h_tr, tensors, cx)?;
        let ((t, r), e) = (h_tr.dims2()?, pi_te.dim(D::Minus1)?);
        let mixed = (h_tr.unsqueeze(1)?.broadcast_mul(&pi_te.unsqueeze(2)?)? * self.config.scaling)?;
        Ok(ops::linear(&mixed.reshape((t, e * r))?, &tensors.get(B)?.t()?.contiguous()?, None)?)
    }
}

/// What `adapter_config.json` of a PEFT Lily says in our words.
pub(super) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let mut keys = Keys::of(config);
    let own = Config::default();
    let targets = config.get("target_modules");
    if let Some(pattern) = targets.and_then(Value::as_str).filter(|pattern| *pattern != "all-linear") {
        let message = format!(
            "is {pattern:?}, a pattern whose linears share factors whatever they are called; expected a list of names"
        );
        keys.fault("target_modules", message);
    }
    let params = [
        ("rank", json!(keys.get("r", own.rank))),
        ("stride", json!(keys.get("stride_A", own.stride))),
        ("experts", json!(keys.get("num_B", own.experts))),
        ("scaling", json!(keys.get("scaling", own.scaling))),
    ];
    keys.finish()?;
    let params = params.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    Ok((MethodRef { method: Lily::CARD.name.to_owned(), params }, Targets::Many(modules.to_vec())))
}

#[cfg(test)]
mod tests {
    use attune_architecture::SiteId;
    use attune_points::Layout;
    use attune_points::layout::{NO_LABEL, Row, Source};
    use candle_core::DType;

    use super::*;

    fn tensor(name: &str, shape: &[usize]) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap()
    }

    fn added(route: Route, x: &Tensor, docs: &[usize]) -> Vec<Vec<f64>> {
        let lily = Lily { config: Config { rank: 2, experts: 3, scaling: 0.5, route, ..Config::default() } };
        let locals =
            Locals::new("up", [(A, tensor("a", &[2, 4])), (B, tensor("b", &[6, 5])), (ROUTER, tensor("r", &[3, 2]))]);
        let mut layout = Layout::new();
        for length in docs {
            layout.push(Source::default(), vec![(Row::Token(1), NO_LABEL); *length]);
        }
        let site = SiteId::new("up");
        let cx = RowCx { site: &site, output: 5, dropout: None, layout: &layout, rows: None };
        lily.graph(x, &locals, &cx).unwrap().to_vec2().unwrap()
    }

    fn by_hand(x: &Tensor, docs: &[usize]) -> Vec<Vec<f64>> {
        let [x, a, b, router] = [x.clone(), tensor("a", &[2, 4]), tensor("b", &[6, 5]), tensor("r", &[3, 2])]
            .map(|x| x.to_vec2::<f64>().unwrap());
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let h: Vec<Vec<f64>> = x.iter().map(|x| a.iter().map(|a| dot(a, x)).collect()).collect();
        let own: Vec<Vec<f64>> = h
            .iter()
            .map(|h| {
                let powers: Vec<f64> = router.iter().map(|row| dot(row, h).exp()).collect();
                powers.iter().map(|power| power / powers.iter().sum::<f64>()).collect()
            })
            .collect();
        let (mut start, mut rows) = (0, Vec::new());
        for length in docs {
            let mean = |e: usize| own[start..start + length].iter().map(|own| own[e]).sum::<f64>() / *length as f64;
            for h in &h[start..start + length] {
                let of = |o: usize| {
                    (0..3).map(|e| mean(e) * (0..2).map(|r| h[r] * b[2 * e + r][o]).sum::<f64>()).sum::<f64>()
                };
                rows.push((0..5).map(|o| 0.5 * of(o)).collect());
            }
            start += length;
        }
        rows
    }

    fn close(a: &[Vec<f64>], b: &[Vec<f64>]) -> bool {
        a.iter().flatten().zip(b.iter().flatten()).all(|(a, b)| (a - b).abs() < 1e-12)
    }

    #[test]
    fn a_document_is_mixed_by_the_mean_of_its_rows_and_a_row_by_itself() {
        let x = tensor("x", &[5, 4]);
        assert!(close(&added(Route::Document, &x, &[2, 3]), &by_hand(&x, &[2, 3])));
        assert!(close(&added(Route::Document, &x, &[]), &by_hand(&x, &[5])));
        assert!(close(&added(Route::Token, &x, &[2, 3]), &by_hand(&x, &[1; 5])));
        assert!(!close(&by_hand(&x, &[2, 3]), &by_hand(&x, &[1; 5])));
    }

    #[test]
    fn neighbours_share_what_reads_and_all_of_a_kind_what_writes() {
        let architecture = Architecture::from_json(
            br#"{"model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3,
                "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 11, "max_position_embeddings": 8,
                "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": false}"#,
        );
        let sites = architecture.unwrap().sites();
        let some =
            sites.into_iter().filter(|site| ["q_proj", "k_proj"].iter().any(|name| site.id.as_str().ends_with(name)));
        let some: Vec<Site> = some.collect();
        let leaders = leaders(&some, 2);
        let path = |layer: usize, name: &str| format!("model.layers.{layer}.self_attn.{name}");
        for (layer, name, [reads, writes]) in
            [(0, "q_proj", [0, 0]), (1, "q_proj", [0, 0]), (2, "q_proj", [2, 0]), (2, "k_proj", [2, 0])]
        {
            assert_eq!(leaders[path(layer, name).as_str()], [path(reads, name), path(writes, name)]);
        }
    }

    #[test]
    fn a_pattern_of_targets_is_refused() {
        let of = |targets: Value| from_peft(json!({"target_modules": targets}).as_object().unwrap(), &[]);
        assert_eq!(of(json!(".*q_proj")).unwrap_err()[0].path.to_string(), "target_modules");
        assert!(of(json!(["q_proj"])).is_ok());
    }
}

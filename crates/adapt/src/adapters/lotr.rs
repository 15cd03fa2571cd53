//! Low tensor rank adaptation: the changes of all layers' linears of a role as one tensor, of two factors that they share and a small
//! core each; for deep models, where most of a LoRA's numbers would be the same in every layer.
//!
//! # Update
//! ```text
//! y_to = x_ti W_oi^T + s · ((x_ti R_ri^T) M_rr^T) L_or^T                  s = alpha / r
//! ```
//!
//! # Symbols
//! `lotr_left` `L_or` and `lotr_right` `R_ri`, one pair for each group of sites, and of each site `lotr_core` `M_rr`; f32, trained. L and R
//! start normal with standard deviation 1, M at 0.
//!
//! # Cost
//! `r²` parameters per linear and `r (i + o)` per group; `2 r (i + o + r)` extra FLOPs per token forward.
//!
//! # Limits
//! With M = 0 it is the base, bit for bit. With one site in a group it is any change of rank r, as LoRA is.
//!
//! # Departures
//! Groups are sites of the same path but for its numbers (layers, experts), or of the same shape; the paper also puts queries
//! and values together by hand, which `shape` does.
//!
//! # Paper
//! LoTR: Low Tensor Rank Weight Adaptation. Bershatsky, Cherniuk, Daulbaev, Mikhalev, Oseledets, 2024.

use std::collections::BTreeMap;

use attune_architecture::{Architecture, Site, SiteKind};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, RowCx, RowMap};
use attune_points::params::Scope;
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::method::{self, BuildCx, Card, Category, Merges, Method, Paper, Point};
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::parts::starts::{self, Start};
use crate::parts::{linears, own};

const LEFT: &str = "lotr_left";
const RIGHT: &str = "lotr_right";
const CORE: &str = "lotr_core";

/// Parameters of LoTR.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Rank of each change, and width of the cores.
    #[schemars(range(min = 1, max = 4096))]
    rank: u32,
    /// Numerator of the scaling.
    #[schemars(range(min = 0.0, max = 1e6))]
    alpha: f64,
    /// Which sites share their outer factors.
    groups: Groups,
}

/// Which sites share their outer factors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Groups {
    /// Those of all layers whose path is the same but for its numbers: all queries, all values.
    Role,
    /// All of the same output and input width.
    Shape,
}

impl Default for Config {
    /// The paper's values.
    fn default() -> Self {
        Self { rank: 32, alpha: 1.0, groups: Groups::Role }
    }
}

pub(super) struct Lotr {
    config: Config,
}

impl Method for Lotr {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "LoTR: Low Tensor Rank Weight Adaptation",
            authors: "Daniel Bershatsky, Daria Cherniuk, Talgat Daulbaev, Aleksandr Mikhalev, Ivan Oseledets",
            year: 2024,
        }),
        applies: &[method::SiteKind::Linear],
        targets: "all-linear",
        parameters: "rank*rank",
        shared: "rank*(i+o)",
        merges: Merges::Factors,
        ..Card::new(
            "lotr",
            Point::Adapter,
            "Low tensor rank adaptation: the changes of all layers' linears of a role as one tensor, of two factors that they \
             share and a small core each; for deep models, where most of a LoRA's numbers would be the same in every layer.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Lotr {
    fn scale(&self) -> f64 {
        self.config.alpha / f64::from(self.config.rank)
    }

    fn group(&self, site: &Site, (output, input): (usize, usize)) -> String {
        match self.config.groups {
            Groups::Shape => format!("shape_{output}x{input}"),
            Groups::Role => {
                let parts = site.id.as_str().split('.').filter(|part| part.parse::<u32>().is_err());
                parts.collect::<Vec<_>>().join(".")
            }
        }
    }
}

impl Adapter for Lotr {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let rank = self.config.rank as usize;
        // The first site of each group, and its widths.
        let mut groups: BTreeMap<String, (&Site, (usize, usize))> = BTreeMap::new();
        for site in sites {
            if let SiteKind::Linear { output, input, .. } = site.kind {
                groups.entry(self.group(site, (output, input))).or_insert((site, (output, input)));
            }
        }
        linears::attach(sites, |site, output, input| {
            if rank > output.min(input) {
                let message = format!("is {rank}; {} is {output} by {input}, so its rank is smaller", site.id);
                return Err(Fault::new("rank", message));
            }
            let group = self.group(site, (output, input));
            if let Some((first, widths)) = groups.get(&group)
                && *widths != (output, input)
            {
                let (o, i) = widths;
                let message = format!(
                    "is role, but {} is {output} by {input} and {} is {o} by {i}; expected shape, or one of them alone",
                    site.id, first.id
                );
                return Err(Fault::new("groups", message));
            }
            let shared = |local, shape: [usize; 2]| TensorSpec {
                scope: Scope::Group(group.clone()),
                ..TensorSpec::trained(local, shape)
            };
            let core = TensorSpec::trained(CORE, [rank, rank]);
            Ok(vec![shared(LEFT, [output, rank]), core, shared(RIGHT, [rank, input])])
        })
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        starts::each(at, rng, |spec| if spec.local == CORE { Start::Constant(0.0) } else { Start::Normal(1.0) })
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Delta(self)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, _: &dyn Weight) -> attune_points::Result<Merged> {
        let left = ops::matmul(tensors.get(LEFT)?, tensors.get(CORE)?)?;
        Ok(Merged::Factors { left, right: tensors.get(RIGHT)?.clone(), scale: self.scale() })
    }

    fn peft(&self) -> Option<Peft> {
        Some(own::peft(Self::CARD.name, &self.config))
    }
}

impl RowMap for Lotr {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, _: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let h_tr = ops::linear(x_ti, tensors.get(RIGHT)?, None)?;
        let h_tr = (ops::linear(&h_tr, tensors.get(CORE)?, None)? * self.scale())?;
        Ok(ops::linear(&h_tr, tensors.get(LEFT)?, None)?)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;

    fn architecture() -> Architecture {
        let config = r#"{"model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 16, "max_position_embeddings": 16,
            "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": false}"#;
        Architecture::from_json(config.as_bytes()).unwrap()
    }

    fn sites(architecture: &Architecture, ends: &[&str]) -> Vec<Site> {
        let all = architecture.sites().into_iter();
        all.filter(|site| ends.iter().any(|end| site.id.as_str().ends_with(end))).collect()
    }

    fn groups(groups: Groups, ends: &[&str]) -> Vec<String> {
        let architecture = architecture();
        let lotr = Lotr { config: Config { rank: 2, groups, ..Config::default() } };
        let attachments = lotr.attach(&architecture, &sites(&architecture, ends)).unwrap();
        attachments.iter().map(|at| at.tensors[0].name(at.site.as_str()).to_string()).collect()
    }

    #[test]
    fn sites_of_a_role_or_of_a_shape_share_their_outer_factors() {
        let queries = "model.layers.self_attn.q_proj.lotr_left";
        let ups = "model.layers.mlp.up_proj.lotr_left";
        assert_eq!(groups(Groups::Role, &["q_proj", "up_proj"]), [queries, ups, queries, ups]);
        let (square, wide) = ("shape_8x8.lotr_left", "shape_12x8.lotr_left");
        assert_eq!(
            groups(Groups::Shape, &["q_proj", "v_proj", "up_proj"]),
            [square, square, wide, square, square, wide]
        );
    }

    #[test]
    fn a_role_of_two_shapes_is_refused_with_both_sites() {
        let architecture = architecture();
        let mut sites = sites(&architecture, &["up_proj"]);
        if let SiteKind::Linear { output, .. } = &mut sites[1].kind {
            *output = 16;
        }
        let faults =
            Lotr { config: Config { rank: 2, ..Config::default() } }.attach(&architecture, &sites).unwrap_err();
        let expected =
            "`groups` is role, but model.layers.1.mlp.up_proj is 16 by 8 and model.layers.0.mlp.up_proj is 12 by 8";
        assert!(faults[0].to_string().starts_with(expected), "{}", faults[0]);
    }

    /// A core of 1 leaves LoRA's product of two factors; any core can be taken into one of them.
    #[test]
    fn at_a_single_site_it_is_a_product_of_two_factors() {
        let normal =
            |name: &str, shape: [usize; 2]| Rng::new(1, name).normal_tensor(&shape[..], 1.0, DType::F64).unwrap();
        let (left, core, right) = (normal("l", [5, 3]), normal("m", [3, 3]), normal("r", [3, 4]));
        let lotr = Lotr { config: Config { rank: 3, alpha: 6.0, ..Config::default() } };
        let (site, layout) = (attune_architecture::SiteId::new("q_proj"), attune_points::Layout::new());
        let cx = RowCx { site: &site, output: 0, dropout: None, layout: &layout, rows: None };
        let x = normal("x", [7, 4]);
        let locals = Locals::new("q_proj", [(LEFT, left.clone()), (CORE, core.clone()), (RIGHT, right.clone())]);
        let found = lotr.graph(&x, &locals, &cx).unwrap();
        let b = (left.matmul(&core).unwrap() * 2.0).unwrap();
        let expected = x.matmul(&right.t().unwrap()).unwrap().matmul(&b.t().unwrap()).unwrap();
        let off = (found - expected).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
        assert!(off.to_scalar::<f64>().unwrap() < 1e-12);
    }
}

//! Trains the part of a weight that says least, its smallest singular triples, by gradients without what its largest ones span; where a model
//! learns one thing after the other and shall keep what it knows.
//!
//! # Update
//! ```text
//! W'_oi = W_oi - U⁰_ok diag(S⁰_k) V⁰_ki + U_ok diag(S_k) V_ki              y_to = x_ti W'_oi^T
//! ∂U ← ∂U - H H^T ∂U          ∂V ← ∂V - ∂V G^T G                            with `project`
//! ```
//! `H` and `G` are the left and right singular vectors of the largest singular values.
//!
//! # Symbols
//! `osf_U` `U_ok`, `osf_S` `S_k` and `osf_V` `V_ki`, f32, trained, start at the weight's smallest triples, which `osf_U_start`, `osf_S_start` and `osf_V_start` keep. `osf_U_high` `H` is kept where the
//! weight has more rows than columns, `osf_V_high` `G` where it has fewer: else `1 - H H^T` is `U⁰ U⁰^T`, and the like.
//!
//! # Cost
//! `(i+o+1) k` parameters per linear, with `k` the smaller width less what is preserved, and as many numbers beside them that never train; `4 k (i+o)` extra FLOPs per token
//! forward. A decomposition of each weight before the first step.
//! Where that costs less, a pass makes another weight in place of it, forward and in reverse, at `4 k o i` FLOPs each, and the gradient by it.
//!
//! # Limits
//! It starts as the base, bit for bit. By plain gradient descent `H^T U` and `V G^T` stay 0: what trains has no part in the leading directions. An optimiser that
//! scales numbers one by one, as Adam does, leaves them slowly.
//!
//! # Departures
//! none in what is computed; agrees with PEFT, but that single linears do not have shares of their own. PEFT's folders do not have the
//! starts, which are found again where they are read, by a decomposition of each weight. Ours have them beside what PEFT reads.
//!
//! # Paper
//! Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning. Nayak, Killamsetty, Han, Bhandwaldar, Chanda, Xu, Wang, Pareja, Oleg, Peng,
//! Srivastava, 2025.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, Port, RowCx, RowMap, WeightMap};
use attune_points::forms::{AsWeight, Cost};
use attune_points::{Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, MethodRef, Paper, Point, SiteKind};
use attune_tensor::linalg;
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::{DType, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::parts::keys::{self, Keys};
use crate::parts::masks::optional;
use crate::parts::starts::{self, Start};
use crate::parts::{foreign, linears, own};

const U: &str = "osf_U";
const S: &str = "osf_S";
const V: &str = "osf_V";
const U_START: &str = "osf_U_start";
const S_START: &str = "osf_S_start";
const V_START: &str = "osf_V_start";
const U_HIGH: &str = "osf_U_high";
const V_HIGH: &str = "osf_V_high";

const PEFT_TYPE: &str = "OSF";
/// The key of what is preserved in PEFT's configuration.
const RANK: &str = "effective_rank";
/// What trains, as PEFT spells it.
const SPELT: [(&str, &str); 3] =
    [(U, "osf_svd_params.U_low"), (S, "osf_svd_params.S_low"), (V, "osf_svd_params.V_low")];

/// Parameters of OSF.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Share of a weight's singular triples, the largest, that are preserved.
    #[schemars(range(min = 0.0, max = 1.0))]
    preserved: f64,
    /// How many are, in place of a share; 0 for the share.
    #[schemars(range(min = 0, max = 65536))]
    preserved_rank: u32,
    /// Takes out of gradients what lies in the preserved directions.
    project: bool,
}

impl Default for Config {
    /// PEFT's values.
    fn default() -> Self {
        Self { preserved: 0.5, preserved_rank: 0, project: true }
    }
}

pub(super) struct Osf {
    config: Config,
}

impl Method for Osf {
    const CARD: Card = Card {
        category: Some(Category::Selective),
        paper: Some(Paper {
            title: "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning",
            authors: "Nikhil Shivakumar Nayak, Krishnateja Killamsetty, Ligong Han, Abhishek Bhandwaldar, Prateek Chanda, Kai Xu, Hao Wang, et al.",
            year: 2025,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "(i+o+1)*(min(o, i) - if(preserved_rank > 0, min(min(o, i), preserved_rank), floor(min(o, i)*preserved)))",
        fixed: "(i+o+1)*(min(o, i) - if(preserved_rank > 0, min(min(o, i), preserved_rank), floor(min(o, i)*preserved))) + \
                if(o == i, 0, max(o, i)*if(preserved_rank > 0, min(min(o, i), preserved_rank), floor(min(o, i)*preserved)))",
        merges: Merges::Weight,
        peft_type: Some("OSF"),
        ..Card::new(
            "osf",
            Point::Adapter,
            "Trains the part of a weight that says least, its smallest singular triples, by gradients without what its largest ones \
             span; where a model learns one thing after the other and shall keep what it knows.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

impl Osf {
    /// How many triples of so many are preserved.
    fn preserved(&self, of: usize) -> usize {
        match self.config.preserved_rank {
            0 => (of as f64 * self.config.preserved) as usize,
            rank => of.min(rank as usize),
        }
    }

    /// `x` itself, whose gradient is `project` of what is its own.
    fn projected(
        &self,
        x: &Tensor,
        project: impl Fn(Tensor) -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<Tensor> {
        if !self.config.project {
            return Ok(x.clone());
        }
        // A difference of 0, which the projection leaves 0.
        let still = x.detach();
        &still + project((x - &still)?)?
    }

    /// The factors that train, `U_ok` and `V_ki`, with gradients as they shall be.
    fn factors(&self, tensors: &Locals) -> attune_points::Result<(Tensor, Tensor)> {
        let u_ok = self.projected(tensors.get(U)?, |d_ok| match optional(tensors, U_HIGH) {
            Some(h_op) => &d_ok - ops::matmul(h_op, &ops::matmul(&h_op.t()?.contiguous()?, &d_ok)?)?,
            None => {
                let own_ok = tensors.get(U_START).map_err(candle_core::Error::wrap)?;
                ops::matmul(own_ok, &ops::matmul(&own_ok.t()?.contiguous()?, &d_ok)?)
            }
        })?;
        let v_ki = self.projected(tensors.get(V)?, |d_ki| match optional(tensors, V_HIGH) {
            Some(g_pi) => &d_ki - ops::matmul(&ops::matmul(&d_ki, &g_pi.t()?.contiguous()?)?, g_pi)?,
            None => {
                let own_ki = tensors.get(V_START).map_err(candle_core::Error::wrap)?;
                ops::matmul(&ops::matmul(&d_ki, &own_ki.t()?.contiguous()?)?, own_ki)
            }
        })?;
        Ok((u_ok, v_ki))
    }
}

impl Adapter for Osf {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        linears::attach(sites, |site, o, i| {
            let all = o.min(i);
            let high = self.preserved(all);
            if high == 0 || high == all {
                let field = if self.config.preserved_rank > 0 { "preserved_rank" } else { "preserved" };
                let message = format!(
                    "makes {high} of the {all} singular triples of {}, {o} by {i}; expected some of them, and not all",
                    site.id
                );
                return Err(Fault::new(field, message));
            }
            let k = all - high;
            // What decays would leave the weight's own.
            let trained = |local, shape: Vec<usize>| TensorSpec { decay: false, ..TensorSpec::trained(local, shape) };
            let mut tensors = vec![
                trained(U, vec![o, k]),
                trained(S, vec![k]),
                trained(V, vec![k, i]),
                TensorSpec::fixed(U_START, [o, k]),
                TensorSpec::fixed(S_START, [k]),
                TensorSpec::fixed(V_START, [k, i]),
            ];
            if o > i {
                tensors.push(TensorSpec::fixed(U_HIGH, [o, high]));
            }
            if o < i {
                tensors.push(TensorSpec::fixed(V_HIGH, [high, i]));
            }
            Ok(tensors)
        })
    }

    fn init(&self, at: &Attachment, weight: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        let all = linalg::svd(&weight.dense(DType::F64)?)?;
        let count = all.s.dim(0)?;
        let high = self.preserved(count);
        let (leading, low) = (all.triples(0, high)?, all.triples(high, count - high)?);
        starts::each(at, rng, |spec| {
            let of = match spec.local {
                U | U_START => &low.u,
                S | S_START => &low.s,
                V | V_START => &low.v,
                U_HIGH => &leading.u,
                _ => &leading.v,
            };
            Start::Is(of.clone())
        })
    }

    fn said_by_base(&self) -> &'static [&'static str] {
        &[U_START, S_START, V_START, U_HIGH, V_HIGH]
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Delta(self)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        let product = |[u, s, v]: [&str; 3]| -> attune_points::Result<Tensor> {
            Ok(ops::matmul(&tensors.get(u)?.broadcast_mul(tensors.get(s)?)?, tensors.get(v)?)?)
        };
        let change = (product([U, S, V])? - product([U_START, S_START, V_START])?)?;
        Ok(Merged::Weight { weight: (weight.dense(change.dtype())? + change)?, bias: None })
    }

    fn peft(&self) -> Option<Peft> {
        let Config { preserved, preserved_rank, project } = self.config;
        let rank = if preserved_rank > 0 { json!(preserved_rank) } else { json!(preserved) };
        let mut peft =
            foreign::peft(PEFT_TYPE, &json!({RANK: rank, "rank_pattern": null, "init_weights": true}), SPELT.to_vec());
        if !project {
            // PEFT always does, which a finished adapter does not depend on.
            peft.config.extend(own::peft(Self::CARD.name, &self.config).config.remove_entry(own::KEY));
        }
        Some(peft)
    }
}

impl RowMap for Osf {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, _: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let (u_ok, v_ki) = self.factors(tensors)?;
        let rows = |[u_ok, s_k, v_ki]: [&Tensor; 3]| -> attune_points::Result<Tensor> {
            Ok(ops::linear(&ops::scale_columns(&ops::linear(x_ti, v_ki, None)?, s_k)?, u_ok, None)?)
        };
        // One after the other, so that equal ones leave nothing, to the bit.
        let now = rows([&u_ok, tensors.get(S)?, &v_ki])?;
        Ok((now - rows([tensors.get(U_START)?, tensors.get(S_START)?, tensors.get(V_START)?])?)?)
    }

    fn as_weight(&self, (o, i): (usize, usize)) -> Option<AsWeight<'_>> {
        let all = o.min(i);
        let k = all - self.preserved(all).min(all);
        let (row, weight) = (Cost::new(2 * k * (o + i), 2 * k + o), Cost::new(2 * k * o * i, o * i));
        Some(AsWeight { map: self, row, weight, product_again: false })
    }
}

impl WeightMap for Osf {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> attune_points::Result<Tensor> {
        let (u_ok, v_ki) = self.factors(tensors)?;
        let product = |[u_ok, s_k, v_ki]: [&Tensor; 3]| ops::matmul(&ops::scale_columns(u_ok, s_k)?, v_ki);
        // One after the other here as well.
        let now = product([&u_ok, tensors.get(S)?, &v_ki])?;
        let start = product([tensors.get(U_START)?, tensors.get(S_START)?, tensors.get(V_START)?])?;
        Ok((w_oi + (now - start)?)?)
    }
}

/// The adapter that PEFT's configuration describes, by the modules that tensors speak of.
pub(super) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let mut keys = Keys::of(config);
    keys.only("rank_pattern", json!({}), "other shares at single linears; this version does not read them");
    let rank = config.get(RANK).filter(|rank| !rank.is_null());
    let mut params = Map::new();
    match rank.map(|rank| (rank.as_u64(), rank.as_f64(), rank)) {
        None => {}
        // As PEFT has it: whole numbers count triples, others are a share of them.
        Some((Some(rank), ..)) if rank > 0 => {
            params.insert("preserved_rank".to_owned(), json!(rank));
        }
        Some((None, Some(share), _)) if share > 0.0 && share <= 1.0 => {
            params.insert("preserved".to_owned(), json!(share));
        }
        Some((.., rank)) => {
            keys.fault(RANK, format!("is {rank}; expected how many triples, or a share of them of 1 at most"))
        }
    }
    keys.finish()?;
    let method = MethodRef { method: Osf::CARD.name.to_owned(), params };
    Ok((method, Targets::Many(keys::without_inner(modules, "osf_svd_params"))))
}

#[cfg(test)]
mod tests {
    use attune_architecture::SiteId;
    use attune_points::Layout;
    use attune_tensor::autograd;

    use super::*;

    fn normal(name: &str, shape: &[usize]) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap()
    }

    fn largest(x: &Tensor) -> f64 {
        x.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    /// An OSF of two preserved triples at a weight of this shape, in f64, moved from its start.
    fn moved(shape: (usize, usize)) -> (Osf, Attachment, Locals, Tensor) {
        let osf = Osf { config: Config { preserved_rank: 2, ..Config::default() } };
        let (w, (o, i)) = (normal("w", &[shape.0, shape.1]), shape);
        let k = o.min(i) - 2;
        let trained = [(U, vec![o, k]), (S, vec![k]), (V, vec![k, i])];
        let fixed = [(U_START, vec![o, k]), (S_START, vec![k]), (V_START, vec![k, i])];
        let high = [(U_HIGH, vec![o, 2]), (V_HIGH, vec![2, i])];
        let kept = high.into_iter().filter(|(local, _)| if *local == U_HIGH { o > i } else { o < i });
        let tensors = trained.into_iter().map(|(local, shape)| TensorSpec::trained(local, shape));
        let tensors =
            tensors.chain(fixed.into_iter().chain(kept).map(|(local, shape)| TensorSpec::fixed(local, shape)));
        let at = Attachment { site: SiteId::new("up"), tensors: tensors.collect() };
        let (locals, _) = osf.init(&at, &w, &mut Rng::new(1, "init")).unwrap();
        let wide = |(local, tensor): (&'static str, &Tensor)| (local, tensor.to_dtype(DType::F64).unwrap());
        let locals = Locals::new("up", locals.iter().map(wide));
        (osf, at, locals, w)
    }

    #[test]
    fn gradients_have_no_part_in_the_leading_directions_whichever_side_is_wider() {
        for shape in [(7, 5), (5, 7), (5, 5)] {
            let (osf, at, locals, w) = moved(shape);
            let leading = linalg::svd(&w).unwrap().truncated(2).unwrap();
            let leaves = [U, V].map(|local| (local, autograd::leaf(locals.get(local).unwrap()).unwrap()));
            let others =
                locals.iter().filter(|(local, _)| ![U, V].contains(local)).map(|(local, x)| (local, x.clone()));
            let tracked = leaves.iter().map(|(local, leaf)| (*local, leaf.as_tensor().clone()));
            let tensors = Locals::new("up", others.chain(tracked));
            let (layout, x) = (Layout::new(), normal("x", &[4, shape.1]));
            let cx = RowCx { site: &at.site, output: shape.0, dropout: None, layout: &layout, rows: None };
            let made = RowMap::graph(&osf, &x, &tensors, &cx).unwrap();
            assert_eq!(largest(&made), 0.0);
            let dy = normal("dy", &[4, shape.0]);
            let of: Vec<&candle_core::Var> = leaves.iter().map(|(_, leaf)| leaf).collect();
            let mut gradients = autograd::pull(&of, &[(&made, &dy)]).unwrap();
            let dv = gradients.pop().flatten().unwrap();
            let du = gradients.pop().flatten().unwrap();
            assert!(largest(&du) > 0.1 && largest(&dv) > 0.1);
            // The vectors are kept in 32 bits.
            assert!(largest(&leading.u.t().unwrap().matmul(&du).unwrap()) < 1e-5 * largest(&du));
            assert!(largest(&dv.matmul(&leading.v.t().unwrap()).unwrap()) < 1e-5 * largest(&dv));
        }
    }

    #[test]
    fn the_leading_triples_stay_whatever_the_others_become_within_their_own() {
        let (osf, at, locals, w) = moved((5, 7));
        let mut tensors: Vec<(&'static str, Tensor)> = locals.iter().map(|(local, x)| (local, x.clone())).collect();
        for (local, tensor) in &mut tensors {
            if *local == S {
                *tensor = (&*tensor * 0.5).unwrap();
            }
        }
        let Merged::Weight { weight, .. } = osf.merge(&at, &Locals::new("up", tensors), &w).unwrap() else {
            panic!("no weight")
        };
        let (before, after) = (linalg::svd(&w).unwrap(), linalg::svd(&weight).unwrap());
        let off = (&after.s - &before.s).unwrap().to_vec1::<f64>().unwrap();
        assert!(off[..2].iter().all(|off| off.abs() < 1e-5) && off[2..].iter().all(|off| off.abs() > 0.05), "{off:?}");
    }

    #[test]
    fn whole_numbers_count_triples_and_others_are_a_share_of_them() {
        let read = |rank: Value| {
            let config = json!({"peft_type": "OSF", "effective_rank": rank, "rank_pattern": null});
            let modules = ["model.layers.0.mlp.up_proj.osf_svd_params".to_owned()];
            let (method, targets) =
                from_peft(config.as_object().unwrap(), &modules).map_err(|faults| faults[0].to_string())?;
            assert_eq!(targets.entries(), ["model.layers.0.mlp.up_proj"]);
            Ok::<_, String>(serde_json::from_value::<Config>(Value::Object(method.params)).unwrap())
        };
        for (rank, preserved, preserved_rank) in
            [(json!(9), 0.5, 9), (json!(0.75), 0.75, 0), (json!(1), 0.5, 1), (Value::Null, 0.5, 0)]
        {
            let config = read(rank.clone()).unwrap();
            assert_eq!((config.preserved, config.preserved_rank), (preserved, preserved_rank));
            let peft = Osf { config }.peft().unwrap();
            assert_eq!(peft.config[RANK], if rank.is_null() { json!(0.5) } else { rank });
        }
        for rank in [json!(0), json!(-1), json!(1.5), json!("half")] {
            assert!(read(rank).unwrap_err().contains("expected how many triples"));
        }
        let pattern = json!({"peft_type": "OSF", "rank_pattern": {"q_proj": 3}});
        assert!(from_peft(pattern.as_object().unwrap(), &[]).unwrap_err()[0].to_string().contains("rank_pattern"));
    }
}

//! Low-rank changes of groups of outputs, in the span of what a weight reads most: rows of the weight that are alike have one; as
//! many parameters as a LoRA of small rank for a change of the rank of all groups together.
//!
//! # Update
//! ```text
//! [W b]_oi ≈ U_or S_r V_ri                          the largest triples of the weight, with the bias as one more column
//! g(o)     = the group of row o of U, of `subspaces`, by k-means
//! z_tr     = [x 1]_ti V_ri^T
//! y_to     = x_ti W_oi^T + b_o + Σ_j B_oj (A_g(o)j · z_t)
//! ```
//! With `active`, from step `t0` to `t1`, subspaces are weighed as AdaLoRA's parts are, by the mean of sensitivity times
//! uncertainty over A's numbers plus that over B's, from one choice, every `every` steps, to the next; those that are worth least
//! rest from then on.
//! ```text
//! at step t   active + (all - active) (1 - (t - t0) / (t1 - t0))^exponent   go on
//! ```
//!
//! # Symbols
//! `adamss_newB` `V_ri` and `adamss_groups` `g`, f32, never train. `adamss_A` `A`, `[subspaces subspace_rank, r]`, starts as the
//! leading right singular vectors of each group's rows of U; `adamss_B` `B`, `[o, subspace_rank]`, at 0; f32, trained. A group of
//! fewer rows than `subspace_rank` has as many directions as rows, and with `least` only those whose squared singular value is
//! more than this share of its largest; others are 0 and stay so. `t0` and `t1` are the shares `before` and `until` of the steps.
//!
//! # Cost
//! `subspaces subspace_rank r + o subspace_rank` parameters per linear, and `r i` numbers that never train; `2 r i + 2 subspaces
//! subspace_rank (r + o)` extra FLOPs per token forward. A decomposition of each weight before the first step.
//!
//! # Limits
//! With B = 0 it is the base, bit for bit. With one subspace it is LoRA whose A stays in the span of V.
//!
//! # Departures
//! PEFT decomposes by random directions and groups by scikit-learn, and keeps neither with the adapter: folders with one
//! subspace, for which this does not matter, are read and written as PEFT's, others in our own layout with their groups. Exactly
//! as many subspaces go on as are due; PEFT compares with the score of the last of them and loses that one too. When choices
//! begin and end is said by shares of the job.
//!
//! # Paper
//! AdaMSS: Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning. Zheng, Lu, Dong, Ji, Cao, Lin, 2025.

use attune_architecture::{Architecture, Site, SiteKind as Kind};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, PeftTensors, Port, RowCx, RowMap, Trained};
use attune_points::engine::StepRule;
use attune_points::{Error, Locals, TensorSpec, Weight};
use attune_spec::Fault;
use attune_spec::job::Targets;
use attune_spec::method::{BuildCx, Card, Category, Merges, Method, MethodRef, Paper, Point, Rule, SiteKind};
use attune_tensor::rng::Rng;
use attune_tensor::{linalg, ops};
use candle_core::{DType, Device, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::parts::keys::{self, Keys};
use crate::parts::starts::{self, Start};
use crate::parts::subspaces::{Names, Resting, Weighing};
use crate::parts::{clusters, linears, own};

const A: &str = "adamss_A";
const B: &str = "adamss_B";
const V: &str = "adamss_newB";
const GROUPS: &str = "adamss_groups";
const PEFT_TYPE: &str = "ADAMSS";

/// Rounds of k-means; PEFT's number.
const ROUNDS: usize = 10;

/// Parameters of AdaMSS.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Singular triples of each weight; all, where it has fewer.
    #[schemars(range(min = 1, max = 4096))]
    rank: u32,
    /// Groups of outputs; as many as outputs, where there are fewer.
    #[schemars(range(min = 1, max = 1024))]
    subspaces: u32,
    /// Rank of the change of each group.
    #[schemars(range(min = 1, max = 256))]
    subspace_rank: u32,
    /// Share of the largest squared singular value of a group's rows below which a direction is left out; 0 for none.
    #[schemars(range(min = 0.0, max = 1.0))]
    least: f64,
    /// Subspaces, of all linears together, that go on in the end; 0 for all.
    #[schemars(range(min = 0, max = 1_000_000))]
    active: u32,
    /// Share of the steps before any rests.
    #[schemars(range(min = 0.0, max = 1.0))]
    before: f64,
    /// Share of the steps until as many rest as have to.
    #[schemars(range(min = 0.0, max = 1.0))]
    until: f64,
    /// Steps from one choice to the next.
    #[schemars(range(min = 1, max = 1_000_000))]
    every: u64,
    /// What stays of the mean of sensitivities at each step.
    #[schemars(range(min = 0.0, max = 1.0))]
    sensitivity: f64,
    /// What stays of the mean of their uncertainty at each step.
    #[schemars(range(min = 0.0, max = 1.0))]
    uncertainty: f64,
    /// How much faster the number falls at first than later; 1 for a straight line.
    #[schemars(range(min = 0.1, max = 10.0))]
    exponent: f64,
}

impl Default for Config {
    /// PEFT's values; when choices begin and end is ours.
    fn default() -> Self {
        Self {
            rank: 100,
            subspaces: 5,
            subspace_rank: 1,
            least: 0.0,
            active: 0,
            before: 0.05,
            until: 0.5,
            every: 100,
            sensitivity: 0.85,
            uncertainty: 0.85,
            exponent: 3.0,
        }
    }
}

pub(super) struct Adamss {
    config: Config,
}

impl Method for Adamss {
    const CARD: Card = Card {
        category: Some(Category::Reparameterisation),
        paper: Some(Paper {
            title: "AdaMSS: Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning",
            authors: "Jingjing Zheng, Wanglong Lu, Yiming Dong, Chaojie Ji, Yankai Cao, Zhouchen Lin",
            year: 2025,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "subspace_rank*(min(subspaces, o)*min(rank, o, i + b) + o)",
        fixed: "(i + b)*min(rank, o, i + b)",
        start_numbers: "41*o*i",
        merges: Merges::Weight,
        peft_type: Some(PEFT_TYPE),
        rules: &[Rule {
            when: "active > 0",
            require: "before < until",
            message: "is no later than `before`, which leaves no steps in which subspaces come to rest; expected more",
            path: "until",
        }],
        ..Card::new(
            "adamss",
            Point::Adapter,
            "Low-rank changes of groups of outputs, in the span of what a weight reads most: rows of the weight that are alike have \
             one; as many parameters as a LoRA of small rank for a change of the rank of all groups together.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, _: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

/// The weight with the bias, where there is one, as one more column; f64.
fn whole(weight: &dyn Weight) -> attune_points::Result<Tensor> {
    let w_oi = weight.dense(DType::F64)?;
    match weight.bias(DType::F64)? {
        Some(b_o) => Ok(Tensor::cat(&[&w_oi, &b_o.unsqueeze(1)?], 1)?),
        None => Ok(w_oi),
    }
}

impl Adamss {
    /// The leading directions of a group's rows of U, `[subspace_rank, r]`; those that are left out are 0.
    fn directions(&self, rows_nr: &Tensor) -> attune_points::Result<Tensor> {
        let most = self.config.subspace_rank as usize;
        let of = linalg::svd(rows_nr)?;
        let squares: Vec<f64> = of.s.sqr()?.to_vec1()?;
        let largest = squares.first().copied().unwrap_or(0.0);
        let enough = squares.iter().take(most).filter(|square| **square > self.config.least * largest).count();
        let kept = of.v.narrow(0, 0, enough.max(1).min(squares.len()))?;
        let none = Tensor::zeros((most - kept.dim(0)?, kept.dim(1)?), kept.dtype(), kept.device())?;
        Ok(Tensor::cat(&[&kept, &none], 0)?)
    }

    /// What each output is made of, `[o, subspaces subspace_rank]`: its numbers in the columns of its group.
    fn left(tensors: &Locals) -> attune_points::Result<Tensor> {
        let b_oj = tensors.get(B)?;
        let (o, j) = b_oj.dims2()?;
        let groups = tensors.get(A)?.dim(0)? / j.max(1);
        if groups == 1 {
            return Ok(b_oj.clone());
        }
        let of = tensors.get(GROUPS)?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        let mut mask = vec![0.0f64; o * groups * j];
        for (row, group) in of.iter().enumerate() {
            // They may come from a file.
            if *group < 0.0 || *group >= groups as f64 || group.fract() != 0.0 {
                return Err(Error::Refused(format!("{GROUPS} has {group}; expected 0 to {}", groups - 1)));
            }
            mask[(row * groups + *group as usize) * j..][..j].fill(1.0);
        }
        let mask = Tensor::from_vec(mask, (o, groups * j), &Device::Cpu)?.to_dtype(b_oj.dtype())?;
        Ok((b_oj.repeat((1, groups))? * mask)?)
    }
}

impl Adapter for Adamss {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let Config { rank, subspaces, subspace_rank, .. } = self.config;
        linears::attach(sites, |site, o, i| {
            let width = i + usize::from(matches!(site.kind, Kind::Linear { bias: true, .. }));
            let r = (rank as usize).min(o).min(width);
            let (groups, j) = ((subspaces as usize).min(o), subspace_rank as usize);
            if j > r {
                let message = format!(
                    "is {j}; of the weight of {} {r} triples are kept, so its subspaces have rank {r} at most",
                    site.id
                );
                return Err(Fault::new("subspace_rank", message));
            }
            let mut tensors = vec![
                TensorSpec::trained(A, [groups * j, r]),
                TensorSpec::trained(B, [o, j]),
                TensorSpec::fixed(V, [r, width]),
            ];
            if groups > 1 {
                tensors.push(TensorSpec::fixed(GROUPS, [o]));
            }
            Ok(tensors)
        })
    }

    fn init(&self, at: &Attachment, weight: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        let whole_oi = whole(weight)?;
        let (o, i) = whole_oi.dims2()?;
        let r = (self.config.rank as usize).min(o).min(i);
        let triples = linalg::svd(&whole_oi)?.truncated(r)?;
        let rows: Vec<Vec<f64>> = triples.u.to_vec2()?;
        let k = (self.config.subspaces as usize).min(o);
        let groups = clusters::of(&rows, k, ROUNDS, &mut rng.named(GROUPS));
        let directions = (0..k).map(|group| {
            let own: Vec<u32> = (0..).zip(&groups).filter(|(_, of)| **of == group).map(|(row, _)| row).collect();
            self.directions(&triples.u.index_select(&Tensor::new(own, &Device::Cpu)?, 0)?)
        });
        let directions = Tensor::cat(&directions.collect::<attune_points::Result<Vec<_>>>()?, 0)?;
        let groups = Tensor::new(groups.iter().map(|group| *group as f32).collect::<Vec<_>>(), &Device::Cpu)?;
        starts::each(at, rng, |spec| match spec.local {
            A => Start::Is(directions.clone()),
            V => Start::Is(triples.v.clone()),
            GROUPS => Start::Is(groups.clone()),
            _ => Start::Constant(0.0),
        })
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Delta(self)
    }

    fn step_rule(&self, of: &Trained<'_>) -> Option<Box<dyn StepRule>> {
        let Config { active, before, until, every, sensitivity, uncertainty, exponent, .. } = self.config;
        let at = |share: f64| (share * of.steps.0 as f64).round() as u64;
        let weighing = Weighing {
            active: active as usize,
            begins: at(before),
            ends: at(until),
            every,
            keeps: (sensitivity, uncertainty),
            exponent,
        };
        let names = Names { rows: A, outputs: B, groups: GROUPS };
        (active > 0).then(|| Box::new(Resting::new(weighing, &names, of)) as Box<dyn StepRule>)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, weight: &dyn Weight) -> attune_points::Result<Merged> {
        let (w_oi, v_ri) = (weight.dense(tensors.get(B)?.dtype())?, tensors.get(V)?);
        let change = ops::matmul(&Self::left(tensors)?, &ops::matmul(tensors.get(A)?, v_ri)?)?;
        let i = w_oi.dim(1)?;
        let merged = (w_oi + change.narrow(1, 0, i)?)?;
        let bias = match weight.bias(change.dtype())? {
            Some(b_o) if v_ri.dim(1)? > i => Some((b_o + change.narrow(1, i, 1)?.flatten_all()?)?),
            _ => None,
        };
        Ok(Merged::Weight { weight: merged, bias })
    }

    fn peft(&self) -> Option<Peft> {
        let Config { rank, subspaces, subspace_rank, least, .. } = self.config;
        if subspaces > 1 {
            // PEFT would group anew, by numbers of its own.
            let mut peft = own::peft(Self::CARD.name, &self.config);
            peft.config.insert("peft_type".to_owned(), "ATTUNE_ADAMSS".into());
            return Some(peft);
        }
        let config = keys::written(
            PEFT_TYPE,
            [
                ("r", json!(rank)),
                ("num_subspaces", json!(1)),
                ("subspace_rank", json!(subspace_rank)),
                ("init_weights", json!("orthogonal")),
                ("use_asa", json!(false)),
                ("use_dynamic_rank", json!(least > 0.0)),
                ("svd_threshold", json!(if least > 0.0 { least } else { 0.1 })),
                ("random_seed", json!(0)),
            ],
        );
        Some(Peft { config, tensors: PeftTensors::Each(vec![(A, "adamss_A.0"), (B, "adamss_B.0"), (V, V)]) })
    }
}

impl RowMap for Adamss {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, _: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let (v_rw, i) = (tensors.get(V)?, x_ti.dim(1)?);
        let z_tr = if v_rw.dim(1)? > i {
            let ones_r = v_rw.narrow(1, i, 1)?.flatten_all()?;
            ops::linear(x_ti, &v_rw.narrow(1, 0, i)?.contiguous()?, Some(&ones_r))?
        } else {
            ops::linear(x_ti, v_rw, None)?
        };
        Ok(ops::linear(&ops::linear(&z_tr, tensors.get(A)?, None)?, &Self::left(tensors)?, None)?)
    }
}

/// What `adapter_config.json` of a PEFT AdaMSS says in our words.
pub(super) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let mut keys = Keys::of(config);
    let own = Config::default();
    let subspaces = keys.get("num_subspaces", own.subspaces);
    if subspaces != 1 {
        let message = format!(
            "is {subspaces}; which outputs belong to which subspace is not in the folder, and depends on random numbers of PEFT and scikit-learn: \
             expected 1"
        );
        keys.fault("num_subspaces", message);
    }
    let (dynamic, least) = (keys.get("use_dynamic_rank", false), keys.get("svd_threshold", 0.1));
    let params = [
        ("rank", json!(keys.get("r", own.rank))),
        ("subspaces", json!(1)),
        ("subspace_rank", json!(keys.get("subspace_rank", own.subspace_rank))),
        ("least", json!(if dynamic { least } else { 0.0 })),
    ];
    keys.finish()?;
    let params = params.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    let modules = keys::without_inner(modules, "adamss_");
    Ok((MethodRef { method: Adamss::CARD.name.to_owned(), params }, Targets::Many(modules)))
}

#[cfg(test)]
mod tests {
    use attune_architecture::SiteId;
    use attune_points::Layout;

    use super::*;

    fn normal(name: &str, shape: &[usize]) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap()
    }

    fn largest(x: &Tensor) -> f64 {
        x.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    fn of(config: Config) -> Adamss {
        Adamss { config }
    }

    fn groups(of: &[u32]) -> Tensor {
        Tensor::new(of, &Device::Cpu).unwrap().to_dtype(DType::F64).unwrap()
    }

    fn added(adamss: &Adamss, x: &Tensor, locals: &Locals) -> Tensor {
        let (site, layout) = (SiteId::new("up"), Layout::new());
        let cx = RowCx { site: &site, output: 5, dropout: None, layout: &layout, rows: None };
        adamss.graph(x, locals, &cx).unwrap()
    }

    #[test]
    fn each_output_has_the_directions_of_its_group_and_the_bias_is_a_column() {
        let adamss = of(Config { rank: 3, subspaces: 2, subspace_rank: 2, ..Config::default() });
        let (a, b, v, x) = (normal("a", &[4, 3]), normal("b", &[5, 2]), normal("v", &[3, 5]), normal("x", &[2, 4]));
        let own = [0, 1, 1, 0, 1];
        let tensors = [(A, a.clone()), (B, b.clone()), (V, v.clone()), (GROUPS, groups(&own))];
        let made = added(&adamss, &x, &Locals::new("up", tensors)).to_vec2::<f64>().unwrap();
        let [a, b, v, x] = [a, b, v, x].map(|x| x.to_vec2::<f64>().unwrap());
        for (t, o) in (0..2).flat_map(|t| (0..5).map(move |o| (t, o))) {
            let z = |r: usize| (0..4).map(|i| x[t][i] * v[r][i]).sum::<f64>() + v[r][4];
            let direction = |j: usize| (0..3).map(|r| a[2 * own[o] as usize + j][r] * z(r)).sum::<f64>();
            let expected: f64 = (0..2).map(|j| b[o][j] * direction(j)).sum();
            assert!((made[t][o] - expected).abs() < 1e-12);
        }
    }

    #[test]
    fn it_starts_with_the_leading_directions_of_each_group_of_rows() {
        let adamss = of(Config { rank: 4, subspaces: 3, subspace_rank: 2, ..Config::default() });
        let w = normal("w", &[9, 6]);
        let tensors = vec![
            TensorSpec::trained(A, [6, 4]),
            TensorSpec::trained(B, [9, 2]),
            TensorSpec::fixed(V, [4, 6]),
            TensorSpec::fixed(GROUPS, [9]),
        ];
        let at = Attachment { site: SiteId::new("up"), tensors };
        let (locals, _) = adamss.init(&at, &w, &mut Rng::new(1, "init")).unwrap();
        let again = adamss.init(&at, &w, &mut Rng::new(1, "init")).unwrap().0;
        assert!(
            largest(&(locals.get(GROUPS).unwrap() - again.get(GROUPS).unwrap()).unwrap().to_dtype(DType::F64).unwrap())
                == 0.0
        );
        let u = linalg::svd(&w).unwrap().truncated(4).unwrap().u;
        let own: Vec<f32> = locals.get(GROUPS).unwrap().to_vec1().unwrap();
        for group in 0..3u32 {
            let rows: Vec<u32> = (0..9u32).filter(|row| own[*row as usize] == group as f32).collect();
            assert!(!rows.is_empty());
            let n = rows.len();
            let rows = u.index_select(&Tensor::new(rows, &Device::Cpu).unwrap(), 0).unwrap();
            let a = locals.get(A).unwrap().narrow(0, 2 * group as usize, 2).unwrap().to_dtype(DType::F64).unwrap();
            // What of the rows lies outside of the directions is no more than the further singular values.
            let along = rows.matmul(&a.t().unwrap()).unwrap().matmul(&a).unwrap();
            let left = (&rows - along).unwrap().sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
            let values: Vec<f64> = linalg::svd(&rows).unwrap().s.sqr().unwrap().to_vec1().unwrap();
            assert!((left - values.iter().skip(2).sum::<f64>()).abs() < 1e-6);
            if n == 1 {
                assert_eq!(largest(&a.narrow(0, 1, 1).unwrap()), 0.0);
            }
        }
    }

    #[test]
    fn directions_that_matter_little_are_left_out() {
        let rows = Tensor::new(&[[3.0f64, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.1]], &Device::Cpu).unwrap();
        let kept = |least: f64, subspace_rank: u32| {
            let made = of(Config { least, subspace_rank, ..Config::default() }).directions(&rows).unwrap();
            let sizes: Vec<f64> = made.sqr().unwrap().sum(1).unwrap().to_vec1().unwrap();
            (sizes.len(), sizes.iter().filter(|size| **size > 0.5).count())
        };
        assert_eq!([kept(0.0, 3), kept(0.1, 3), kept(0.2, 3), kept(0.1, 1)], [(3, 3), (3, 2), (3, 1), (1, 1)]);
    }

    #[test]
    fn groups_that_are_none_and_folders_without_them_are_refused() {
        let adamss = of(Config { rank: 3, subspaces: 2, subspace_rank: 2, ..Config::default() });
        let tensors = [(A, normal("a", &[4, 3])), (B, normal("b", &[2, 2])), (V, normal("v", &[3, 4]))];
        let locals = Locals::new("up", tensors.into_iter().chain([(GROUPS, groups(&[0, 2]))]));
        let x = normal("x", &[2, 4]);
        let (site, layout) = (SiteId::new("up"), Layout::new());
        let cx = RowCx { site: &site, output: 2, dropout: None, layout: &layout, rows: None };
        assert!(adamss.graph(&x, &locals, &cx).unwrap_err().to_string().contains("has 2; expected 0 to 1"));
        let read = |config: Value| from_peft(config.as_object().unwrap(), &[]);
        assert_eq!(read(json!({"num_subspaces": 3})).unwrap_err()[0].path.to_string(), "num_subspaces");
        assert!(read(json!({})).is_err());
        let (method, _) = read(json!({"num_subspaces": 1, "r": 7, "use_dynamic_rank": true})).unwrap();
        assert_eq!(serde_json::to_value(method).unwrap()["least"], 0.1);
    }
}

//! A library of low-rank changes that tasks mix, each in shares of its own: the domains of a job learn apart what sets them
//! apart, and together what they have in common.
//!
//! # Update
//! ```text
//! w_qs  = σ_qs / Σ_s σ_qs                σ_qs = sigmoid(logits_task,qs), in training sigmoid(logits_task,qs + ln u / (1 - u))
//! A_ir  = Σ_s w_qs A_qsdr, split by split q of the input        B_ro = Σ_s w_qs B_qsrd, split by split of the output
//! y_to  = x_ti W_oi^T + b_o + (x_ti A_ir) B_ro / r
//! ```
//!
//! # Symbols
//! `poly_lora_A` `A_qsdr`, `[splits, skills, i/splits, r]`, uniform in ±1/sqrt(i/splits) at the start; `poly_lora_B` `B_qsrd`,
//! `[splits, skills, r, o/splits]`, 0; `module_logits`, `[tasks, splits skills]`, uniform in ±0.001; f32, trained. `u` is uniform
//! noise, of each document anew. A document's task is the number of its domain; where the component does not train, `task`, if
//! that is given.
//!
//! # Cost
//! `skills r (i + o) + tasks splits skills` parameters per linear; `2 r (i + o)` extra FLOPs per token forward, and `2 skills r
//! (i + o)` per document.
//!
//! # Limits
//! With B = 0 it is the base, bit for bit. With one skill it is LoRA with alpha = 1. With one task it is a low-rank change and
//! merges; with several it merges as `task`.
//!
//! # Departures
//! none; agrees with PEFT, whose documents come with the number of their task. Where only some rows of a document go through a
//! linear, as to an expert, its noise is that of the first of them. A validation set is of the first domain.
//!
//! # Paper
//! Combining Parameter-efficient Modules for Task-level Generalisation. Ponti, Sordoni, Bengio, Reddy, 2022. Splits: Multi-Head
//! Adapter Routing for Cross-Task Generalization. Caccia, Ponti, Su, Pereira, Le Roux, Sordoni, 2022.

use attune_architecture::{Architecture, Site};
use attune_points::adapter::{Adapter, Attachment, BaseEdit, Merged, Peft, PeftTensors, Port, RowCx, RowMap};
use attune_points::{Doc, Error, Locals, TensorSpec, Weight};
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
use crate::parts::{linears, own};

const A: &str = "poly_lora_A";
const B: &str = "poly_lora_B";
const LOGITS: &str = "module_logits";
const PEFT_TYPE: &str = "POLY";

/// What keeps a sum of shares from 0; PEFT's number.
const EPS: f64 = 1e-12;

/// Parameters of Poly.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// Rank of a skill.
    #[schemars(range(min = 1, max = 4096))]
    rank: u32,
    /// Tasks: the domains of the job, in their order; with 1 all documents are of one.
    #[schemars(range(min = 1, max = 65_536))]
    tasks: u32,
    /// Changes that they mix.
    #[schemars(range(min = 1, max = 1024))]
    skills: u32,
    /// Parts of a linear's input and output that are mixed apart.
    #[schemars(range(min = 1, max = 1024))]
    splits: u32,
    /// The task of all documents where it does not train; that of their domain, if it is not given.
    #[schemars(range(min = 0, max = 65_535))]
    task: Option<u32>,
}

impl Default for Config {
    /// PEFT's values.
    fn default() -> Self {
        Self { rank: 8, tasks: 1, skills: 4, splits: 1, task: None }
    }
}

pub(super) struct Poly {
    config: Config,
}

impl Method for Poly {
    const CARD: Card = Card {
        category: Some(Category::Hybrid),
        paper: Some(Paper {
            title: "Combining Parameter-efficient Modules for Task-level Generalisation",
            authors: "Edoardo M. Ponti, Alessandro Sordoni, Yoshua Bengio, Siva Reddy",
            year: 2022,
        }),
        applies: &[SiteKind::Linear],
        targets: "all-linear",
        parameters: "skills*rank*(i + o) + tasks*splits*skills",
        merges: Merges::Factors,
        stays_beside: "tasks > 1 and task == null",
        peft_type: Some(PEFT_TYPE),
        ..Card::new(
            "poly",
            Point::Adapter,
            "A library of low-rank changes that tasks mix, each in shares of its own: the domains of a job learn apart what sets them \
             apart, and together what they have in common.",
        )
    };
    type Config = Config;
    type Object = dyn Adapter;

    fn build(config: Config, cx: &BuildCx<'_>) -> Result<Box<dyn Adapter>, Vec<Fault>> {
        let (tasks, domains) = (config.tasks, cx.domains.len());
        let mut faults = Vec::new();
        if tasks > 1 && domains > tasks as usize {
            let message = format!(
                "is {tasks}; the job has {domains} domains, each a task of its own: expected {domains}, or 1 for all"
            );
            faults.push(Fault::new("tasks", message));
        }
        if let Some(task) = config.task.filter(|task| *task >= tasks) {
            faults.push(Fault::new("task", format!("is {task}; expected 0 to {}, one of `tasks`", tasks - 1)));
        }
        if faults.is_empty() { Ok(Box::new(Self { config })) } else { Err(faults) }
    }
}

impl Poly {
    /// The task of a document.
    fn task(&self, doc: Option<&Doc>, trains: bool) -> attune_points::Result<usize> {
        let Config { tasks, task, .. } = self.config;
        let of_domain = doc.map_or(0, |doc| u32::from(doc.domain));
        let task = if tasks == 1 { 0 } else { task.filter(|_| !trains).unwrap_or(of_domain) };
        if task < tasks {
            return Ok(task as usize);
        }
        let message = format!(
            "a document is of domain {task}, and tasks are {tasks}: its component knows domains 0 to {}",
            tasks - 1
        );
        Err(Error::Refused(message))
    }

    /// The shares of a task in the skills of each split, `[splits, skills]`; `noise_n` is standard normal.
    fn shares(&self, task: usize, tensors: &Locals, noise_n: Option<&Tensor>) -> attune_points::Result<Tensor> {
        let mut logits_n = tensors.get(LOGITS)?.narrow(0, task, 1)?.flatten_all()?;
        if let Some(noise_n) = noise_n {
            logits_n = (logits_n + logistic(noise_n)?)?;
        }
        let open_n = (logits_n.neg()?.exp()? + 1.0)?.recip()?;
        let open_qs = open_n.reshape((self.config.splits as usize, self.config.skills as usize))?;
        Ok(open_qs.broadcast_div(&(open_qs.sum_keepdim(1)? + EPS)?)?)
    }

    /// The factors `A_ir` and `B_ro` of these shares.
    fn factors(shares_qs: &Tensor, tensors: &Locals) -> attune_points::Result<(Tensor, Tensor)> {
        let (a, b) = (tensors.get(A)?, tensors.get(B)?);
        let shares = shares_qs.unsqueeze(2)?.unsqueeze(3)?;
        let (q, _, d, r) = a.dims4()?;
        let a_ir = a.broadcast_mul(&shares)?.sum(1)?.reshape((q * d, r))?;
        let b_qrd = b.broadcast_mul(&shares)?.sum(1)?;
        let d = b_qrd.dim(2)?;
        Ok((a_ir, b_qrd.transpose(0, 1)?.contiguous()?.reshape((r, q * d))?))
    }

    fn scale(&self) -> f64 {
        1.0 / f64::from(self.config.rank)
    }
}

/// Logistic noise of standard normal noise: what has the same share of all numbers below it.
fn logistic(noise_n: &Tensor) -> attune_points::Result<Tensor> {
    let below = ((noise_n.detach() * std::f64::consts::FRAC_1_SQRT_2)?.erf()? + 1.0)?;
    // The ends of what 32 bits tell from 0 and 1.
    let below = (below * 0.5)?.clamp(1e-6, 1.0 - 1e-6)?;
    Ok((below.log()? - (below.neg()? + 1.0)?.log()?)?)
}

impl Adapter for Poly {
    fn attach(&self, _: &Architecture, sites: &[Site]) -> Result<Vec<Attachment>, Vec<Fault>> {
        let Config { rank, tasks, skills, splits, .. } = self.config;
        let [r, tasks, s, q] = [rank, tasks, skills, splits].map(|number| number as usize);
        linears::attach(sites, |site, o, i| {
            if o % q != 0 || i % q != 0 {
                let message = format!("is {q}; {} is {o} by {i}: expected a divisor of both", site.id);
                return Err(Fault::new("splits", message));
            }
            Ok(vec![
                TensorSpec::trained(A, [q, s, i / q, r]),
                TensorSpec::trained(B, [q, s, r, o / q]),
                TensorSpec { decay: false, ..TensorSpec::trained(LOGITS, [tasks, q * s]) },
            ])
        })
    }

    fn init(&self, at: &Attachment, _: &dyn Weight, rng: &mut Rng) -> attune_points::Result<(Locals, BaseEdit)> {
        starts::each(at, rng, |spec| match spec.local {
            A => Start::Uniform(1.0 / (spec.shape[2] as f64).sqrt()),
            LOGITS => Start::Uniform(1e-3),
            _ => Start::Constant(0.0),
        })
    }

    fn port(&self, _: &Attachment) -> Port<'_> {
        Port::Delta(self)
    }

    fn merge(&self, _: &Attachment, tensors: &Locals, _: &dyn Weight) -> attune_points::Result<Merged> {
        if self.config.tasks > 1 && self.config.task.is_none() {
            return Ok(Merged::No("each of its tasks has another weight; `task` says which one is meant"));
        }
        let (a_ir, b_ro) = Self::factors(&self.shares(self.task(None, false)?, tensors, None)?, tensors)?;
        Ok(Merged::Factors { left: b_ro.t()?.contiguous()?, right: a_ir.t()?.contiguous()?, scale: self.scale() })
    }

    fn peft(&self) -> Option<Peft> {
        let Config { rank, tasks, skills, splits, task } = self.config;
        let mut config = keys::written(
            PEFT_TYPE,
            [
                ("r", json!(rank)),
                ("n_tasks", json!(tasks)),
                ("n_skills", json!(skills)),
                ("n_splits", json!(splits)),
                ("poly_type", json!("poly")),
                ("init_weights", json!(true)),
            ],
        );
        if task.is_some() {
            // PEFT is told with each batch.
            let mut ours = own::peft(Self::CARD.name, &self.config).config;
            config.extend(ours.remove_entry(own::KEY));
        }
        let tensors = vec![(A, A), (B, B), (LOGITS, "poly_router.module_logits")];
        Some(Peft { config, tensors: PeftTensors::Each(tensors) })
    }
}

impl RowMap for Poly {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> attune_points::Result<Tensor> {
        let width = (self.config.splits * self.config.skills) as usize;
        let noise_tn = cx.dropout.map(|masks| masks.noise(cx.site, width, x_ti)).transpose()?;
        let mut docs: Vec<_> = cx.docs().into_iter().map(|(doc, rows)| (Some(doc), rows)).collect();
        if docs.is_empty() {
            // Rows of no document are of one.
            docs.push((None, 0..x_ti.dim(0)?));
        }
        let mut made = Vec::with_capacity(docs.len());
        for (doc, rows) in docs {
            let noise_n = noise_tn.as_ref().map(|noise| noise.narrow(0, rows.start, 1)?.flatten_all()).transpose()?;
            let shares_qs = self.shares(self.task(doc, cx.dropout.is_some())?, tensors, noise_n.as_ref())?;
            let (a_ir, b_ro) = Self::factors(&shares_qs, tensors)?;
            let h_tr = (ops::matmul(&x_ti.narrow(0, rows.start, rows.len())?.contiguous()?, &a_ir)? * self.scale())?;
            made.push(ops::matmul(&h_tr, &b_ro)?);
        }
        Ok(Tensor::cat(&made, 0)?)
    }
}

/// What `adapter_config.json` of a PEFT Poly says in our words.
pub(super) fn from_peft(config: &Map<String, Value>, modules: &[String]) -> Result<(MethodRef, Targets), Vec<Fault>> {
    let mut keys = Keys::of(config);
    let own = Config::default();
    keys.only("poly_type", "poly", "a router that is not known here");
    let params = [
        ("rank", json!(keys.get("r", own.rank))),
        ("tasks", json!(keys.get("n_tasks", own.tasks))),
        ("skills", json!(keys.get("n_skills", own.skills))),
        ("splits", json!(keys.get("n_splits", own.splits))),
    ];
    keys.finish()?;
    let params = params.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    let modules = keys::without_inner(modules, "poly_");
    Ok((MethodRef { method: Poly::CARD.name.to_owned(), params }, Targets::Many(modules)))
}

#[cfg(test)]
mod tests {
    use attune_architecture::SiteId;
    use attune_points::Layout;
    use attune_points::adapter::DropoutMask;
    use attune_points::layout::{NO_LABEL, Row, Source};
    use candle_core::{DType, Device};

    use super::*;

    fn normal(name: &str, shape: &[usize]) -> Tensor {
        Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap()
    }

    fn locals() -> Locals {
        let tensors =
            [(A, normal("a", &[2, 3, 2, 2])), (B, normal("b", &[2, 3, 2, 3])), (LOGITS, normal("l", &[2, 6]))];
        Locals::new("up", tensors)
    }

    fn of(task: Option<u32>) -> Poly {
        Poly { config: Config { rank: 2, tasks: 2, skills: 3, splits: 2, task } }
    }

    fn layout(domains: &[u16]) -> Layout {
        let mut layout = Layout::new();
        for domain in domains {
            layout.push(Source { domain: *domain, ..Source::default() }, vec![(Row::Token(1), NO_LABEL); 2]);
        }
        layout
    }

    fn added(
        poly: &Poly,
        x: &Tensor,
        layout: &Layout,
        noise: Option<&dyn DropoutMask>,
    ) -> attune_points::Result<Vec<Vec<f64>>> {
        let site = SiteId::new("up");
        let cx = RowCx { site: &site, output: 6, dropout: noise, layout, rows: None };
        Ok(poly.graph(x, &locals(), &cx)?.to_vec2()?)
    }

    #[test]
    fn each_document_mixes_the_skills_of_each_split_as_its_domain_does() {
        let x = normal("x", &[4, 4]);
        let made = added(&of(None), &x, &layout(&[1, 0]), None).unwrap();
        let four = |name: &str| -> Vec<Vec<Vec<Vec<f64>>>> {
            let tensor = locals().get(name).unwrap().clone();
            (0..2).map(|q| tensor.get(q).unwrap().to_vec3().unwrap()).collect()
        };
        let (a, b, x) = (four(A), four(B), x.to_vec2::<f64>().unwrap());
        let logits = locals().get(LOGITS).unwrap().to_vec2::<f64>().unwrap();
        for (t, task) in [(0, 1), (1, 1), (2, 0), (3, 0)] {
            let open = |q: usize, s: usize| 1.0 / (1.0 + (-logits[task][3 * q + s]).exp());
            let share = |q: usize, s: usize| open(q, s) / (0..3).map(|s| open(q, s)).sum::<f64>();
            let h = |r: usize| -> f64 {
                let of = |i: usize| (0..3).map(|s| share(i / 2, s) * a[i / 2][s][i % 2][r]).sum::<f64>();
                (0..4).map(|i| x[t][i] * of(i)).sum()
            };
            for o in 0..6 {
                let up = |r: usize| (0..3).map(|s| share(o / 3, s) * b[o / 3][s][r][o % 3]).sum::<f64>();
                let expected: f64 = (0..2).map(|r| h(r) * up(r)).sum::<f64>() / 2.0;
                assert!((made[t][o] - expected).abs() < 1e-10);
            }
        }
    }

    #[test]
    fn a_task_that_is_said_counts_where_it_does_not_train_and_is_what_merges() {
        let x = normal("x", &[4, 4]);
        let by_domain = added(&of(None), &x, &layout(&[1, 1]), None).unwrap();
        assert_eq!(added(&of(Some(1)), &x, &layout(&[0, 0]), None).unwrap(), by_domain);
        let at = Attachment { site: SiteId::new("up"), tensors: Vec::new() };
        let weight = Tensor::zeros((6, 4), DType::F64, &Device::Cpu).unwrap();
        assert!(matches!(of(None).merge(&at, &locals(), &weight).unwrap(), Merged::No(_)));
        let merged = of(Some(1)).merge(&at, &locals(), &weight).unwrap();
        let Merged::Factors { left, right, scale } = merged else { panic!("no factors") };
        let product = (x.matmul(&right.t().unwrap()).unwrap().matmul(&left.t().unwrap()).unwrap() * scale).unwrap();
        for (found, expected) in product.to_vec2::<f64>().unwrap().iter().flatten().zip(by_domain.iter().flatten()) {
            assert!((found - expected).abs() < 1e-12);
        }
        let beyond = added(&of(None), &x, &layout(&[0, 2]), None).unwrap_err();
        assert!(beyond.to_string().contains("of domain 2, and tasks are 2"), "{beyond}");
    }

    struct Noise(Tensor);

    impl DropoutMask for Noise {
        fn mask(&self, _: &SiteId, _: usize, _: f64, like: &Tensor) -> attune_points::Result<Tensor> {
            Ok(like.ones_like()?)
        }

        fn noise(&self, _: &SiteId, width: usize, _: &Tensor) -> attune_points::Result<Tensor> {
            assert_eq!(width, 6);
            Ok(self.0.clone())
        }
    }

    #[test]
    fn a_document_has_one_draw_of_noise_and_its_own_domain_in_training() {
        let x = normal("x", &[4, 4]);
        let none = Noise(Tensor::zeros((4, 6), DType::F64, &Device::Cpu).unwrap());
        let with = |noise: &Noise, domains: &[u16]| added(&of(Some(1)), &x, &layout(domains), Some(noise)).unwrap();
        let plain = added(&of(None), &x, &layout(&[0, 1]), None).unwrap();
        for (found, expected) in with(&none, &[0, 1]).iter().flatten().zip(plain.iter().flatten()) {
            assert!((found - expected).abs() < 1e-12, "noise in the middle is none");
        }
        // Another draw at the second row of a document changes nothing, at its first both rows.
        let drawn = |row: usize| {
            let mut values = vec![0.0; 24];
            values[6 * row] = 1.0;
            with(&Noise(Tensor::from_vec(values, (4, 6), &Device::Cpu).unwrap()), &[0, 1])
        };
        assert_eq!(drawn(1), with(&none, &[0, 1]));
        let first = drawn(0);
        assert!(first[0] != plain[0] && first[1] != plain[1] && first[2] == with(&none, &[0, 1])[2]);
    }

    /// A fifth of logistic noise lies below -ln 4, and as much above ln 4; bounds at five standard errors of 4000 draws.
    #[test]
    fn normal_noise_becomes_logistic() {
        let noise = logistic(&Rng::new(3, "noise").normal_tensor(4000, 1.0, DType::F64).unwrap()).unwrap();
        let values = noise.to_vec1::<f64>().unwrap();
        let error = 5.0 * (4000.0f64 * 0.2 * 0.8).sqrt();
        let below = values.iter().filter(|value| **value < -(4f64.ln())).count() as f64;
        let above = values.iter().filter(|value| **value > 4f64.ln()).count() as f64;
        assert!((below - 800.0).abs() < error && (above - 800.0).abs() < error, "{below} and {above}");
    }

    #[test]
    fn numbers_that_do_not_fit_are_refused() {
        let domains = ["a", "b", "c"].map(|name| (attune_spec::id::Name::new(name).unwrap(), 1.0));
        let cx = BuildCx { steps: attune_spec::id::Step(1), domains: &domains, words: None };
        let refused = |config: Config| Poly::build(config, &cx).err().unwrap()[0].to_string();
        assert!(refused(Config { tasks: 2, ..Config::default() }).starts_with("`tasks` is 2; the job has 3 domains"));
        assert_eq!(
            refused(Config { tasks: 3, task: Some(3), ..Config::default() }),
            "`task` is 3; expected 0 to 2, one of `tasks`"
        );
        assert!(Poly::build(Config::default(), &cx).is_ok());
    }
}

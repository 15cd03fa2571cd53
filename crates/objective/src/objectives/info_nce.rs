//! Contrastive learning of vectors: each query is nearer to what belongs to it than to what belongs to the others of the step, and to
//! texts that only look alike. For embedding models: search, clustering, duplicates.
//!
//! # Update
//! ```text
//! s(a, b) = a·b / (|a| |b|)  |  a·b                                      by `similarity`
//! p_i  = e^(s(q_i, d_i) / τ) / Σ_j e^(s(q_i, d_j) / τ)                   d_i belongs to q_i, j runs over what q_i is compared with
//! L_i  = -(1 - p_i)^γ log p_i                                            the power is no part of the gradient
//! L    = mean over queries;  symmetric: of L_i and the same with queries and what belongs to them in each other's place, halved
//! dims: Σ_k w_k L(first k numbers of each vector)
//! ```
//!
//! # Symbols
//! `temperature` τ, `focus` γ, `dims` k with `weights` w. A query is compared with what belongs to it, with the negatives of its row
//! and, unless `in_batch` is false, with every passage of the step: of all micro-batches on all ranks. Texts equal to what belongs to
//! it are no negatives of it.
//!
//! # Cost
//! One more forward pass, unless a step is one micro-batch; similarities of all queries and passages of a step, some queries at a time.
//!
//! # Limits
//! With nothing to compare with, `L_i = 0`. With γ = 0 and all numbers of a vector it is the softmax cross-entropy over similarities.
//!
//! # Departures
//! The gradient of a step in many micro-batches is that of the whole step in one: vectors first, then their gradients.
//!
//! # Paper
//! Representation Learning with Contrastive Predictive Coding. van den Oord, Li, Vinyals, 2018; `dims` is Matryoshka Representation
//! Learning (Kusupati et al., 2022), `focus` and duplicates that count for nothing as in KaLM-Embedding-V2 (2025).

use std::collections::BTreeMap;
use std::ops::Range;

use attune_points::layout::{Doc, View};
use attune_points::objective::{Denominator, Level, Needs, Objective, VectorsLoss, VectorsView};
use attune_points::{Error, Layout, Result, Row};
use attune_spec::Fault;
use attune_spec::method::{BuildCx, Card, Method, Paper, Point, Rule};
use attune_tensor::{autograd, ops};
use candle_core::{D, DType, Device, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How alike two vectors are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Similarity {
    /// By their directions.
    #[default]
    Cosine,
    /// By their inner product.
    Dot,
}

/// Parameters of the objective.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(deny_unknown_fields)]
pub(super) struct Config {
    /// What similarities are divided by.
    #[schemars(range(min = 0.001, max = 100.0))]
    temperature: f64,
    /// How alike two vectors are.
    similarity: Similarity,
    /// Whether what belongs to a query is also asked for it.
    symmetric: bool,
    /// Whether queries are compared with what belongs to others; with the negatives of their own rows only where not.
    in_batch: bool,
    /// Whether queries are compared with texts of other domains of the mixture.
    across_domains: bool,
    /// How much less queries count that have found what belongs to them.
    #[schemars(range(min = 0.0, max = 10.0))]
    focus: f64,
    /// How many numbers of each vector are to be enough: the loss is one of the first so many, for each of these. All when it is empty.
    #[schemars(length(max = 16), inner(range(min = 1, max = 65_536)))]
    dims: Vec<u32>,
    /// What the loss of each of `dims` counts; 1 when it is empty.
    #[schemars(length(max = 16), inner(range(min = 0.0, max = 1000.0)))]
    weights: Vec<f64>,
}

impl Default for Config {
    /// The scale of sentence-transformers' losses, 20.
    fn default() -> Self {
        Self {
            temperature: 0.05,
            similarity: Similarity::Cosine,
            symmetric: false,
            in_batch: true,
            across_domains: true,
            focus: 0.0,
            dims: Vec::new(),
            weights: Vec::new(),
        }
    }
}

pub(super) struct InfoNce {
    config: Config,
}

impl Method for InfoNce {
    const CARD: Card = Card {
        aliases: &["multiple-negatives-ranking", "contrastive"],
        paper: Some(Paper {
            title: "Representation Learning with Contrastive Predictive Coding",
            authors: "Aaron van den Oord, Yazhe Li, Oriol Vinyals",
            year: 2018,
        }),
        compares_vectors: true,
        rules: &[
            Rule {
                when: "symmetric",
                require: "in_batch",
                message: "is true, but `in_batch` is false, and passages have no queries of other rows to be compared with",
                path: "symmetric",
            },
            Rule {
                when: "count(weights) > 0",
                require: "count(weights) == count(dims)",
                message: "has another number of entries than `dims`; expected one for each, or none",
                path: "weights",
            },
        ],
        ..Card::new(
            "info-nce",
            Point::Objective,
            "Contrastive learning of vectors: each query is nearer to what belongs to it than to what belongs to the others of the \
             step, and to texts that only look alike. For embedding models: search, clustering, duplicates.",
        )
    };
    type Config = Config;
    type Object = dyn Objective;

    fn build(config: Config, _: &BuildCx<'_>) -> std::result::Result<Box<dyn Objective>, Vec<Fault>> {
        Ok(Box::new(Self { config }))
    }
}

/// A query: its document, the place of what belongs to it among the passages, and those of its row.
struct Query {
    doc: usize,
    positive: usize,
    own: Range<usize>,
}

/// What is compared in a step.
struct Compared {
    queries: Vec<Query>,
    /// The documents of all passages.
    passages: Vec<usize>,
    /// For each document, which text it is.
    texts: Vec<usize>,
    /// For each document, its domain.
    domains: Vec<u16>,
}

impl Compared {
    fn of(layout: &Layout) -> Result<Self> {
        let docs = layout.docs();
        let (mut queries, mut passages) = (Vec::new(), Vec::new());
        let mut first = 0;
        for group in docs.chunk_by(|a, b| a.group == b.group) {
            let start = passages.len();
            let views = |doc: &Doc| matches!(doc.view, View::Passage(_));
            let is_whole = group.len() > 1 && group[0].view == View::Query && group[1..].iter().all(views);
            if !is_whole {
                let found: Vec<View> = group.iter().map(|doc| doc.view).collect();
                return Err(Error::Refused(format!("a group of {found:?} is no query with its passages")));
            }
            passages.extend(first + 1..first + group.len());
            queries.push(Query { doc: first, positive: start, own: start..passages.len() });
            first += group.len();
        }
        let mut known: BTreeMap<Vec<u32>, usize> = BTreeMap::new();
        let text = |doc: &Doc| {
            let rows = &layout.rows()[doc.rows.start as usize..doc.rows.end as usize];
            let token = |row: &Row| if let Row::Token(token) = row { Some(*token) } else { None };
            let next = known.len();
            *known.entry(rows.iter().filter_map(token).collect()).or_insert(next)
        };
        let texts = docs.iter().map(text).collect();
        Ok(Self { queries, passages, texts, domains: docs.iter().map(|doc| doc.domain).collect() })
    }

    /// Which passages a query is compared with, in order; what belongs to it is one of them.
    fn passages_of<'c>(&'c self, query: &'c Query, config: &'c Config) -> impl Iterator<Item = bool> + 'c {
        let positive = self.texts[self.passages[query.positive]];
        self.passages.iter().enumerate().map(move |(at, &doc)| {
            let is_near = query.own.contains(&at) || config.in_batch && self.may_meet(query.doc, doc, config);
            at == query.positive || is_near && self.texts[doc] != positive
        })
    }

    /// Which queries what belongs to a query is compared with.
    fn queries_of<'c>(&'c self, query: &'c Query, config: &'c Config) -> impl Iterator<Item = bool> + 'c {
        self.queries.iter().map(move |other| {
            let is_another = self.texts[other.doc] != self.texts[query.doc];
            other.doc == query.doc || is_another && self.may_meet(query.doc, other.doc, config)
        })
    }

    fn may_meet(&self, a: usize, b: usize, config: &Config) -> bool {
        config.across_domains || self.domains[a] == self.domains[b]
    }
}

/// Most similarities that are there at once.
const AT_ONCE: usize = 1 << 21;

/// A similarity that counts for nothing.
const NOTHING: f64 = -1e30;

/// What asks, what is asked for, and the answers.
struct Asking<'a> {
    /// The documents that ask.
    from: Vec<usize>,
    /// The documents that are asked for.
    to: Vec<usize>,
    /// For each that asks, the place of what belongs to it in `to`.
    own: Vec<usize>,
    /// For each that asks, whether it is compared with each of `to`.
    compared: &'a dyn Fn(usize) -> Vec<bool>,
}

/// What came of asking.
struct Answered {
    /// The loss of each that asked.
    losses: Vec<f64>,
    /// How many found what belongs to them.
    found: usize,
    /// How many they were compared with that do not belong to them.
    negatives: usize,
}

impl InfoNce {
    /// Asks, with vectors `u_nd` of all documents; the gradient of the sum of losses is added to `du_nd`.
    fn ask(&self, u_nd: &Tensor, asking: &Asking<'_>, du_nd: &mut Tensor) -> Result<Answered> {
        let ids = |docs: &[usize]| Tensor::from_iter(docs.iter().map(|&doc| doc as u32), &Device::Cpu);
        let (n, to) = (asking.to.len(), ids(&asking.to)?);
        let mut answered = Answered { losses: Vec::new(), found: 0, negatives: 0 };
        let places: Vec<usize> = (0..asking.from.len()).collect();
        for places in places.chunks((AT_ONCE / n.max(1)).max(1)) {
            let c = places.len();
            let mut apart = Vec::with_capacity(c * n);
            for &at in places {
                let compared = (asking.compared)(at);
                answered.negatives += compared.iter().filter(|is| **is).count() - 1;
                apart.extend(compared.into_iter().map(|is| if is { 0.0 } else { NOTHING }));
            }
            let leaf = autograd::leaf(u_nd)?;
            let from = ids(&places.iter().map(|&at| asking.from[at]).collect::<Vec<_>>())?;
            let (a_cd, b_nd) = (leaf.index_select(&from, 0)?, leaf.index_select(&to, 0)?);
            let s_cn = (ops::linear(&a_cd, &b_nd, None)? / self.config.temperature)?;
            let s_cn = (s_cn + Tensor::from_vec(apart, (c, n), &Device::Cpu)?)?;
            let own: Vec<u32> = places.iter().map(|&at| asking.own[at] as u32).collect();
            let likeliest = s_cn.argmax(D::Minus1)?.to_vec1::<u32>()?;
            answered.found += likeliest.iter().zip(&own).filter(|(a, b)| a == b).count();
            let logp_c = ops::log_softmax(&s_cn)?.gather(&Tensor::from_vec(own, (c, 1), &Device::Cpu)?, 1)?;
            let logp_c = logp_c.squeeze(1)?;
            let found = logp_c.detach().to_vec1::<f64>()?;
            let weight: Vec<f64> =
                found.iter().map(|logp| (1.0 - logp.exp()).max(0.0).powf(self.config.focus)).collect();
            answered.losses.extend(found.iter().zip(&weight).map(|(logp, weight)| -weight * logp));
            let dlogp_c = Tensor::from_iter(weight.into_iter().map(|weight| -weight), &Device::Cpu)?;
            if let Some(du) = autograd::pull(&[&leaf], &[(&logp_c, &dlogp_c)])?.pop().flatten() {
                *du_nd = (&*du_nd + du)?;
            }
        }
        Ok(answered)
    }

    /// The numbers of a vector that are to be enough, each with what its loss counts.
    fn dims(&self, width: usize) -> Result<Vec<(usize, f64)>> {
        let Config { dims, weights, .. } = &self.config;
        if dims.is_empty() {
            return Ok(vec![(width, 1.0)]);
        }
        let dim = |(at, &dim): (usize, &u32)| {
            if dim as usize > width {
                let message = format!("the model's vectors have {width} numbers; `tune.objective.dims` names {dim}");
                return Err(Error::Refused(message));
            }
            Ok((dim as usize, weights.get(at).copied().unwrap_or(1.0)))
        };
        dims.iter().enumerate().map(dim).collect()
    }
}

impl Objective for InfoNce {
    fn level(&self) -> Level {
        Level::Step
    }

    fn needs(&self) -> Needs {
        Needs { vectors: true, ..Needs::default() }
    }

    fn denominator(&self) -> Denominator {
        Denominator::Groups
    }

    fn vectors(&self, VectorsView { layout, y_nd }: &VectorsView<'_>) -> Result<VectorsLoss> {
        let compared = Compared::of(layout)?;
        let (n, width) = y_nd.dims2()?;
        let y_leaf = autograd::leaf(&y_nd.to_dtype(DType::F64)?)?;
        let mut loss = VectorsLoss { loss_n: vec![0.0; n], dy_nd: y_nd.zeros_like()?, beside: Vec::new() };
        let Compared { queries, passages, .. } = &compared;
        if queries.is_empty() {
            return Ok(loss);
        }
        let docs = || queries.iter().map(|query| query.doc).collect::<Vec<_>>();
        let of_queries = |at: usize| compared.passages_of(&queries[at], &self.config).collect();
        let of_passages = |at: usize| compared.queries_of(&queries[at], &self.config).collect();
        let mut asking = vec![Asking {
            from: docs(),
            to: passages.clone(),
            own: queries.iter().map(|query| query.positive).collect(),
            compared: &of_queries,
        }];
        if self.config.symmetric {
            let from = queries.iter().map(|query| passages[query.positive]).collect();
            asking.push(Asking { from, to: docs(), own: (0..queries.len()).collect(), compared: &of_passages });
        }
        let dims = self.dims(width)?;
        let longest = dims.iter().map(|(dim, _)| *dim).max();
        let mut dy_nd = y_leaf.zeros_like()?;
        for (dim, weight) in dims {
            let v_nd = y_leaf.narrow(1, 0, dim)?;
            let u_nd = match self.config.similarity {
                // A vector of nothing has no direction, and is like no other.
                Similarity::Cosine => v_nd.broadcast_div(&(v_nd.sqr()?.sum_keepdim(1)? + 1e-24)?.sqrt()?)?,
                Similarity::Dot => v_nd,
            };
            let (u, share) = (u_nd.detach(), weight / asking.len() as f64);
            let mut du_nd = u.zeros_like()?;
            for (at, asking) in asking.iter().enumerate() {
                let Answered { losses, found, negatives } = self.ask(&u, asking, &mut du_nd)?;
                for (query, one) in queries.iter().zip(losses) {
                    loss.loss_n[query.doc] += share * one;
                }
                if at == 0 && Some(dim) == longest && loss.beside.is_empty() {
                    loss.beside = vec![("accuracy", found as f64), ("negatives", negatives as f64)];
                }
            }
            if let Some(dy) = autograd::pull(&[&y_leaf], &[(&u_nd, &(du_nd * share)?)])?.pop().flatten() {
                dy_nd = (dy_nd + dy)?;
            }
        }
        loss.dy_nd = dy_nd.to_dtype(y_nd.dtype())?;
        Ok(loss)
    }
}

#[cfg(test)]
mod tests {
    use attune_points::layout::{NO_LABEL, Source};
    use attune_tensor::Rng;

    use super::*;

    /// Rows of a query, what belongs to it and so many negatives, in a domain each; every text another.
    fn layout(rows: &[(u16, usize)]) -> Layout {
        let (mut layout, mut token) = (Layout::new(), 0);
        for (group, &(domain, negatives)) in rows.iter().enumerate() {
            let views = std::iter::once(View::Query).chain((0..=negatives as u16).map(View::Passage));
            for view in views {
                let label = if view == View::Query { 0 } else { NO_LABEL };
                let source = Source { view, domain, group: Some(group as u32), ..Source::default() };
                layout.push(source, [(Row::Token(token), label)]);
                token += 1;
            }
        }
        layout
    }

    fn vectors(n: usize, width: usize) -> Tensor {
        Rng::new(3, "vectors").normal_tensor([n, width].as_slice(), 1.0, DType::F64).unwrap()
    }

    fn loss(config: Config, layout: &Layout, y_nd: &Tensor) -> VectorsLoss {
        InfoNce { config }.vectors(&VectorsView { layout, y_nd }).unwrap()
    }

    fn numbers(tensor: &Tensor) -> Vec<Vec<f64>> {
        tensor.to_vec2().unwrap()
    }

    /// The loss of each query, number by number.
    fn by_hand(config: &Config, layout: &Layout, y: &[Vec<f64>]) -> Vec<f64> {
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let docs = layout.docs();
        let of = |n: usize, width: usize| {
            let v = &y[n][..width];
            let norm = if config.similarity == Similarity::Cosine { dot(v, v).sqrt() } else { 1.0 };
            v.iter().map(|x| x / norm).collect::<Vec<_>>()
        };
        let widths = if config.dims.is_empty() { vec![y[0].len() as u32] } else { config.dims.clone() };
        let mut losses = vec![0.0; docs.len()];
        for (k, width) in widths.into_iter().map(|width| width as usize).enumerate() {
            let weight = config.weights.get(k).copied().unwrap_or(1.0);
            let s = |a: usize, b: usize| dot(&of(a, width), &of(b, width)) / config.temperature;
            for (at, query) in docs.iter().enumerate().filter(|(_, doc)| doc.view == View::Query) {
                let others = |wanted: &dyn Fn(&Doc) -> bool| {
                    let met = |doc: &&Doc| config.across_domains || doc.domain == query.domain;
                    let all = docs.iter().filter(met).filter(|doc| wanted(doc));
                    all.map(|doc| docs.iter().position(|other| other.rows == doc.rows).unwrap()).collect::<Vec<_>>()
                };
                let passages = others(&|doc| doc.view != View::Query && (config.in_batch || doc.group == query.group));
                let of_pair = |from: usize, to: usize, all: &[usize]| {
                    let sum: f64 = all.iter().map(|&other| s(from, other).exp()).sum();
                    let p = s(from, to).exp() / sum;
                    -(1.0 - p).powf(config.focus) * p.ln()
                };
                let forth = of_pair(at, at + 1, &passages);
                let back = of_pair(at + 1, at, &others(&|doc| doc.view == View::Query));
                losses[at] += weight * if config.symmetric { (forth + back) / 2.0 } else { forth };
            }
        }
        losses
    }

    fn configs() -> Vec<Config> {
        let plain = Config { temperature: 0.3, ..Config::default() };
        vec![
            plain.clone(),
            Config { similarity: Similarity::Dot, temperature: 2.0, ..plain.clone() },
            Config { symmetric: true, ..plain.clone() },
            Config { in_batch: false, ..plain.clone() },
            Config { across_domains: false, symmetric: true, ..plain.clone() },
            Config { focus: 0.5, ..plain.clone() },
            Config { dims: vec![6, 2], weights: vec![1.0, 0.3], focus: 2.0, ..plain },
        ]
    }

    #[test]
    fn losses_are_those_of_the_equations() {
        let layout = layout(&[(0, 1), (1, 0), (0, 2), (1, 1)]);
        let y = vectors(layout.docs().len(), 6);
        for config in configs() {
            let found = loss(config.clone(), &layout, &y).loss_n;
            for (found, expected) in found.iter().zip(by_hand(&config, &layout, &numbers(&y))) {
                assert!((found - expected).abs() < 1e-12, "{found} against {expected}: {config:?}");
            }
        }
    }

    /// The power of `focus` is taken as it is: its loss is compared with one whose power stays.
    #[test]
    fn gradients_agree_with_central_differences() {
        let layout = layout(&[(0, 1), (1, 0), (0, 2)]);
        let (n, width, step) = (layout.docs().len(), 6, 1e-6);
        let y = vectors(n, width);
        for config in configs() {
            let dy = numbers(&loss(config.clone(), &layout, &y).dy_nd);
            // d/dy of Σ_i w_i · L_i at weights that stay: of each direction and width its own, so one at a time.
            if config.focus > 0.0 {
                continue;
            }
            for (at, x) in (0..n).flat_map(|at| (0..width).map(move |x| (at, x))) {
                let moved = |by: f64| {
                    let mut numbers = numbers(&y);
                    numbers[at][x] += by;
                    let moved = Tensor::new(numbers, &Device::Cpu).unwrap();
                    loss(config.clone(), &layout, &moved).loss_n.iter().sum::<f64>()
                };
                let numeric = (moved(step) - moved(-step)) / (2.0 * step);
                assert!((numeric - dy[at][x]).abs() < 1e-7, "{numeric} against {}: {config:?}", dy[at][x]);
            }
        }
    }

    /// Of one query the weight is a factor on the whole gradient.
    #[test]
    fn focus_weighs_what_was_not_found() {
        let layout = layout(&[(0, 2)]);
        let y = vectors(4, 6);
        let plain = Config { temperature: 0.3, in_batch: false, ..Config::default() };
        let (all, focused) = (loss(plain.clone(), &layout, &y), loss(Config { focus: 2.0, ..plain }, &layout, &y));
        let weight = (1.0 - (-all.loss_n[0]).exp()).powi(2);
        assert!((focused.loss_n[0] - weight * all.loss_n[0]).abs() < 1e-12 && weight < 1.0);
        for (focused, all) in numbers(&focused.dy_nd).concat().iter().zip(numbers(&all.dy_nd).concat()) {
            assert!((focused - weight * all).abs() < 1e-12);
        }
    }

    #[test]
    fn texts_equal_to_what_belongs_to_a_query_are_no_negatives_of_it() {
        let plain = layout(&[(0, 1), (0, 1)]);
        let mut twice = Layout::new();
        // The second row's passage is the first one's, and so is a negative of the first.
        for (doc, token) in plain.docs().iter().zip([0, 1, 1, 3, 1, 5]) {
            let label = if doc.view == View::Query { 0 } else { NO_LABEL };
            let source = Source { view: doc.view, group: Some(doc.group), ..Source::default() };
            twice.push(source, [(Row::Token(token), label)]);
        }
        let y = vectors(6, 4);
        let found = loss(Config::default(), &twice, &y);
        let s = |a: usize, b: usize| {
            let y = numbers(&y);
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            dot(&y[a], &y[b]) / (dot(&y[a], &y[a]) * dot(&y[b], &y[b])).sqrt() / 0.05
        };
        let expected = (1.0 + (s(0, 5) - s(0, 1)).exp()).ln();
        assert!((found.loss_n[0] - expected).abs() < 1e-9, "{} against {expected}", found.loss_n[0]);
        assert_eq!(found.beside[1], ("negatives", 2.0));
        // Nothing but the one that counts has a gradient of the first query's loss.
        assert_eq!(numbers(&found.dy_nd)[2], [0.0; 4]);
    }

    #[test]
    fn what_is_found_is_counted() {
        let layout = layout(&[(0, 0), (0, 0)]);
        let y = Tensor::new(&[[1.0f64, 0.0], [2.0, 0.1], [1.0, 0.1], [0.0, 1.0]], &Device::Cpu).unwrap();
        let found = loss(Config { dims: vec![1, 2], ..Config::default() }, &layout, &y);
        assert_eq!(found.beside, [("accuracy", 1.0), ("negatives", 2.0)]);
        let all = loss(Config { dims: vec![2], ..Config::default() }, &layout, &y);
        assert_eq!(all.loss_n, loss(Config::default(), &layout, &y).loss_n);
    }

    #[test]
    fn what_cannot_be_compared_is_refused() {
        let say = |config: Config, layout: &Layout, n: usize| {
            let refused = InfoNce { config }.vectors(&VectorsView { layout, y_nd: &vectors(n, 4) });
            refused.unwrap_err().to_string()
        };
        let single = Layout::single(&[1, 2]);
        assert!(say(Config::default(), &single, 1).contains("no query with its passages"));
        let wide = Config { dims: vec![5], ..Config::default() };
        assert!(say(wide, &layout(&[(0, 0)]), 2).contains("vectors have 4 numbers; `tune.objective.dims` names 5"));
        let alone = loss(Config::default(), &layout(&[(0, 0)]), &vectors(2, 4));
        assert_eq!((alone.loss_n, numbers(&alone.dy_nd).concat()), (vec![0.0; 2], vec![0.0; 8]));
    }
}

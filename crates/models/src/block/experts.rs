//! Norm, router, the experts that each row is sent to, residual.
//!
//! Rows are grouped by expert: each expert sees its rows in row order, and the experts are added up in their order, so
//! that nothing depends on the number of threads. Axes: T rows, E experts, K experts of a row, N rows of one expert, A all
//! N after each other.
//!
//! ```text
//! p_te = softmax(router(n_td))        w_tk = p_te of the K likeliest, over their sum where the model says so
//! y_td = sum_k w_tk f_k(n_td)         dw_tk = dy_td f_k(n_td)ᵀ
//! ```

use std::ops::Range;

use attune_architecture::{Experts as Mixture, Place, Site};
use attune_points::{BankKind, Error, Owner, Result};
use attune_tensor::ops;
use candle_core::{D, DType, Device, Tensor};

use super::mlp::Opened;
use super::{Block, mlp, residual, site};
use crate::block;
use crate::context::GraphCx;
use crate::pass::linear::Thin;
use crate::pass::parts::{Given, wanted};
use crate::pass::times::Work;
use crate::pass::walk::Run;
use crate::pass::{Mat, PassCx, Rows, Sinks};
use crate::regions;
use crate::routing::{likeliest, likeliest_of};

/// What the reverse pass needs.
pub struct Saved {
    router: Thin,
    sent: Sent,
    opened: Opened<Mat>,
    /// What the experts gave, `[A, D]`.
    y_ad: Rows<f32>,
    /// Of the last linear of each expert that was sent rows.
    downs: Vec<Thin>,
    sum: Option<Rows<f32>>,
    /// What the mixture gave, where components make something else of it.
    given: Option<Rows<f32>>,
}

/// Where the rows of a pass go.
struct Sent {
    probs_te: Rows<f32>,
    /// Weights of each row's experts, likeliest first, `T × K`.
    weights: Vec<f32>,
    /// Which of the weights each of the rows that experts see goes by, expert after expert: `A` numbers below `T K`.
    places: Vec<u32>,
    /// The experts that were sent rows.
    to: Vec<Visit>,
}

/// The rows of one expert.
struct Visit {
    expert: usize,
    /// Which of the `A`.
    at: Range<usize>,
    /// Their numbers in the layout of each part.
    ids: Vec<(usize, Vec<u32>)>,
}

impl Sent {
    /// By the probabilities of a router.
    fn new(probs_te: Rows<f32>, mixture: Mixture, cx: &PassCx<'_>) -> Self {
        let (k, experts) = (mixture.per_token, probs_te.n_cols());
        let of_rows = probs_te.values().chunks_exact(experts).map(|row| row.iter().map(|&p| f64::from(p)).collect());
        let chosen = likeliest_of(of_rows, k);
        let mut weights: Vec<f32> = Vec::with_capacity(chosen.len());
        for (row, chosen) in chosen.chunks_exact(k).enumerate() {
            let probs_e = probs_te.view().row(row);
            let sum = if mixture.normalised { chosen.iter().map(|&e| probs_e[e as usize]).sum() } else { 1.0 };
            weights.extend(chosen.iter().map(|&e| probs_e[e as usize] / sum));
        }
        let mut of_expert: Vec<Vec<u32>> = vec![Vec::new(); experts];
        (0u32..).zip(&chosen).for_each(|(place, &expert)| of_expert[expert as usize].push(place));
        let mut sent = Self { probs_te, weights, places: Vec::with_capacity(chosen.len()), to: Vec::new() };
        for (expert, places) in of_expert.into_iter().enumerate().filter(|(_, places)| !places.is_empty()) {
            let start = sent.places.len();
            let mut ids: Vec<(usize, Vec<u32>)> = Vec::new();
            for (part, rows) in cx.parts_of(Given::All) {
                let row = |place: &u32| *place as usize / k;
                let (from, to) =
                    (places.partition_point(|p| row(p) < rows.start), places.partition_point(|p| row(p) < rows.end));
                if from < to {
                    ids.push((part, places[from..to].iter().map(|place| (row(place) - rows.start) as u32).collect()));
                }
            }
            sent.places.extend(&places);
            sent.to.push(Visit { expert, at: start..sent.places.len(), ids });
        }
        sent
    }

    /// The row of each of the `A`, and its weight.
    fn rows(&self, k: usize) -> impl Iterator<Item = (usize, f32)> + '_ {
        self.places.iter().map(move |&place| (place as usize / k, self.weights[place as usize]))
    }

    /// The gradient by the router's logits, from those by the weights and, beside that, by the probabilities.
    fn vjp(&self, mixture: Mixture, dweights: &[f32], mut dprobs_te: Rows<f32>) -> Rows<f32> {
        let k = mixture.per_token;
        let experts = self.probs_te.n_cols();
        // Which expert each weight is of.
        let mut chosen = vec![0; self.weights.len()];
        for Visit { expert, at, .. } in &self.to {
            self.places[at.clone()].iter().for_each(|&place| chosen[place as usize] = *expert);
        }
        for (row, dp_e) in dprobs_te.values_mut().chunks_exact_mut(experts).enumerate() {
            let (p_e, of_row) = (self.probs_te.view().row(row), row * k..(row + 1) * k);
            let (w_k, dw_k, chosen) = (&self.weights[of_row.clone()], &dweights[of_row.clone()], &chosen[of_row]);
            // Weights over their sum: d w_i / d p_j = (1[i = j] - w_i) / sum.
            let (mean, sum) = match mixture.normalised {
                true => (dot(w_k, dw_k), chosen.iter().map(|&e| p_e[e]).sum()),
                false => (0.0, 1.0),
            };
            chosen.iter().zip(dw_k).for_each(|(&e, dw)| dp_e[e] += (dw - mean) / sum);
            let mean = dot(p_e, dp_e);
            dp_e.iter_mut().zip(p_e).for_each(|(d, p)| *d = p * (*d - mean));
        }
        dprobs_te
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Each row's probabilities, in place of its logits.
fn softmax(logits_te: &mut Rows<f32>) {
    let experts = logits_te.n_cols();
    for row in logits_te.values_mut().chunks_exact_mut(experts) {
        let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        row.iter_mut().for_each(|x| *x = (*x - most).exp());
        let sum: f32 = row.iter().sum();
        row.iter_mut().for_each(|x| *x /= sum);
    }
}

pub(super) struct Experts {
    /// Norm and router, then the linears of each expert.
    pub(super) sites: Vec<Site>,
    pub(super) mixture: Mixture,
    pub(super) layer: u32,
}

impl Experts {
    /// Each row's experts, mixed by their weights: `h_td` and `probs_te` to `[T, D]`.
    fn mix(&self, h_td: &Tensor, probs_te: &Tensor, cx: &GraphCx<'_>) -> Result<Tensor> {
        let (t, k) = (h_td.dim(0)?, self.mixture.per_token);
        let chosen_tk = likeliest(probs_te, k)?;
        let ids_tk = Tensor::from_vec(chosen_tk.clone(), (t, k), &Device::Cpu)?;
        let weights_tk = probs_te.gather(&ids_tk, D::Minus1)?;
        let weights_tk = match self.mixture.normalised {
            true => weights_tk.broadcast_div(&weights_tk.sum_keepdim(D::Minus1)?)?,
            false => weights_tk,
        };
        let weights = weights_tk.flatten_all()?;
        let mut y_td = h_td.zeros_like()?;
        for (expert, sites) in (0u32..).zip(self.experts()) {
            let places: Vec<u32> = (0u32..).zip(&chosen_tk).filter(|(_, e)| **e == expert).map(|(at, _)| at).collect();
            if places.is_empty() {
                continue;
            }
            let rows: Vec<u32> = places.iter().map(|place| place / k as u32).collect();
            let (places_n, rows_n) = (Tensor::new(places, &Device::Cpu)?, Tensor::new(rows.as_slice(), &Device::Cpu)?);
            // Dropout and lanes go by the row of the batch, not by its place among the expert's.
            let y_nd = mlp::graph(sites, &h_td.index_select(&rows_n, 0)?, &cx.with(cx.tracked, Some(&rows)))?;
            let weights_n1 = weights.index_select(&places_n, 0)?.unsqueeze(1)?;
            y_td = y_td.index_add(&rows_n, &y_nd.broadcast_mul(&weights_n1)?, 0)?;
        }
        Ok(y_td)
    }

    /// The rows of `x_td` that experts see, one after the other.
    fn sent(&self, x_td: &Mat, sent: &Sent, cx: &PassCx<'_>) -> Mat {
        let rows: Vec<u32> = sent.rows(self.mixture.per_token).map(|(row, _)| row as u32).collect();
        let width = x_td.view().cols();
        let mut to = cx.arena.mat(sent.places.len(), width, cx.dtype);
        cx.meter.time(Work::Elementwise, || cx.kernels.gather(x_td.view(), &rows, to.view_mut(), false));
        to
    }

    /// Zeros for the tensors of experts that no row of theirs went to: the loss does not depend on them.
    fn unvisited(&self, sent: &Sent, cx: &PassCx<'_>, sinks: &mut Sinks<'_>) -> Result<()> {
        for (expert, sites) in self.experts().enumerate() {
            let ids = sent.to.iter().find(|visit| visit.expert == expert).map_or(&[][..], |visit| &visit.ids);
            for site in sites {
                let placed = cx.placed(&site.id, Given::Among(ids));
                for (index, _) in cx.parts_of(Given::All) {
                    let part = &cx.parts[index];
                    for id in wanted(cx.base, part, std::slice::from_ref(site), &*sinks[index]) {
                        let visited = match id.owner {
                            Owner::Bank { slot, set } if part.theta.banks[slot as usize].kind == BankKind::Adapter => {
                                placed.iter().any(|at| (at.part, at.slot, at.set) == (index, slot, set))
                            }
                            _ => ids.iter().any(|(other, _)| *other == index),
                        };
                        if visited {
                            continue;
                        }
                        let zeros = match part.theta.get(&id) {
                            Some(tensor) => tensor.zeros_like()?,
                            None => cx.base.tensor(&id.name, DType::F32)?.zeros_like()?,
                        };
                        regions::put(&mut *sinks[index], &id, &zeros)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// The sites of each expert, in order.
    fn experts(&self) -> impl Iterator<Item = &[Site]> {
        self.sites.chunk_by(|a, b| a.expert == b.expert).filter(|sites| sites[0].expert.is_some())
    }
}

impl Block for Experts {
    fn sites(&self) -> &[Site] {
        &self.sites
    }

    fn routes(&self) -> Option<u32> {
        Some(self.layer)
    }

    /// The stream, then `probs_te`.
    fn graph(&self, x: &[Tensor], cx: &GraphCx<'_>) -> Result<Vec<Tensor>> {
        let mut routing = None;
        let (norm, block) = (site(&self.sites, Place::MlpNorm)?, site(&self.sites, Place::Mlp)?);
        let y_td = residual(&x[0], norm, block, cx, |h_td| {
            let probs_te = ops::softmax(&cx.linear(site(&self.sites, Place::Router)?, h_td)?)?;
            let y_td = self.mix(h_td, &probs_te, cx)?;
            routing = Some(probs_te);
            Ok(y_td)
        })?;
        let probs_te = routing.ok_or_else(|| Error::Refused(format!("layer {} routed nothing", self.layer)))?;
        debug_assert!(matches!(probs_te.dtype(), DType::F32 | DType::F64));
        Ok(vec![y_td, probs_te])
    }

    fn forward(&self, x: &[Rows<f32>], cx: &PassCx<'_>, run: Run) -> Result<(Vec<Rows<f32>>, Option<block::Saved>)> {
        let (norm, k) = (site(&self.sites, Place::MlpNorm)?, self.mixture.per_token);
        let n_td = residual::read(norm, &x[0], cx)?;
        let mut probs_te = cx.arena.rows(cx.n_rows(), self.mixture.count);
        let router = site(&self.sites, Place::Router)?;
        let router = cx.linear(router, n_td.view(), Given::All, probs_te.view_mut(), false)?;
        cx.meter.time(Work::Elementwise, || softmax(&mut probs_te));
        let sent = Sent::new(probs_te, self.mixture, cx);
        let n_ad = self.sent(&n_td, &sent, cx);
        drop(n_td);
        let experts: Vec<&[Site]> = self.experts().collect();
        let mut opened = Opened::room(sent.places.len(), cx);
        for Visit { expert, at, ids } in &sent.to {
            let n_nd = n_ad.view().sub_rows(at.start, at.end);
            opened.open(experts[*expert], n_nd, Given::Among(ids), at.clone(), cx)?;
        }
        drop(n_ad);
        let inner_ai = opened.inner(cx);
        let mut y_ad = cx.arena.rows(sent.places.len(), x[0].n_cols());
        let mut downs = Vec::with_capacity(sent.to.len());
        for Visit { expert, at, ids } in &sent.to {
            let (down, inner_ni) = (site(experts[*expert], Place::Down)?, inner_ai.view().sub_rows(at.start, at.end));
            let to = y_ad.view_mut().into_sub_rows(at.start, at.end);
            downs.push(cx.linear(down, inner_ni, Given::Among(ids), to, false)?);
        }
        drop(inner_ai);
        let block = site(&self.sites, Place::Mlp)?;
        let mut sum = cx.arena.zeros(x[0].n_rows(), x[0].n_cols());
        cx.meter.time(Work::Elementwise, || {
            let mut to = sum.view_mut();
            for ((row, w), y_d) in sent.rows(k).zip(y_ad.values().chunks_exact(x[0].n_cols())) {
                to.row(row).iter_mut().zip(y_d).for_each(|(sum, y)| *sum += w * y);
            }
        });
        let (mut y, sum, given) = if cx.is_branched(block) {
            residual::part(norm, block, &x[0], sum, cx, run)?
        } else {
            cx.kernels.add(x[0].view().into(), sum.view_mut());
            let (y, sum) = residual::close(norm, sum, cx, run)?;
            (y, sum, None)
        };
        let mut probs_te = cx.arena.rows(sent.probs_te.n_rows(), sent.probs_te.n_cols());
        probs_te.values_mut().copy_from_slice(sent.probs_te.values());
        y.push(probs_te);
        let saved = run.saves().then(|| {
            let opened = opened.narrowed(cx);
            block::Saved::Experts(Box::new(Saved { router, sent, opened, y_ad, downs, sum, given }))
        });
        Ok((y, saved))
    }

    fn vjp(
        &self,
        x: &[Rows<f32>],
        saved: Option<block::Saved>,
        dy: Vec<Rows<f32>>,
        below: bool,
        cx: &PassCx<'_>,
        sinks: &mut Sinks<'_>,
    ) -> Result<Vec<Rows<f32>>> {
        let Some(block::Saved::Experts(saved)) = saved else { return Err(super::nothing_saved("a mixture")) };
        let Saved { router, sent, opened, y_ad, downs, sum, given } = *saved;
        let (norm, k, width) = (site(&self.sites, Place::MlpNorm)?, self.mixture.per_token, x[0].n_cols());
        let mut dy = dy.into_iter();
        let dy_td = dy.next().ok_or_else(|| Error::Refused("a mixture was given no gradient".to_owned()))?;
        let dprobs_te = dy.next().unwrap_or_else(|| cx.arena.zeros(cx.n_rows(), self.mixture.count));
        let dsum = residual::join_vjp(norm, sum.as_ref(), dy_td, cx, sinks)?;
        let through = residual::reads(norm, below, cx, sinks);
        let block = site(&self.sites, Place::Mlp)?;
        let parted = residual::part_vjp(norm, block, &x[0], given.as_ref(), (&dsum, through), cx, sinks)?;
        drop(given);
        let dgiven = parted.as_ref().map_or(&dsum, |(dgiven, _)| dgiven);
        let mut dy_ad = cx.arena.rows(sent.places.len(), width);
        let mut dweights = vec![0.0; sent.weights.len()];
        cx.meter.time(Work::Elementwise, || {
            let experts = y_ad.values().chunks_exact(width).zip(dy_ad.values_mut().chunks_exact_mut(width));
            for (((row, w), place), (y_d, to)) in sent.rows(k).zip(&sent.places).zip(experts) {
                let dy_d = dgiven.view().row(row);
                dweights[*place as usize] = dot(dy_d, y_d);
                to.iter_mut().zip(dy_d).for_each(|(to, dy)| *to = w * dy);
            }
        });
        drop(y_ad);
        let experts: Vec<&[Site]> = self.experts().collect();
        let mut dinner_ai = cx.arena.rows(sent.places.len(), cx.architecture().inner);
        {
            let (inner_ai, narrowed) = (opened.inner(cx), cx.as_activations(dy_ad.view()));
            let dy_ad = narrowed.view(dy_ad.view());
            for (Visit { expert, at, ids }, thin) in sent.to.iter().zip(&downs) {
                let (inner_ni, dy_nd) = (inner_ai.view().sub_rows(at.start, at.end), dy_ad.sub_rows(at.start, at.end));
                let to = Some((dinner_ai.view_mut().into_sub_rows(at.start, at.end), false));
                let down = site(experts[*expert], Place::Down)?;
                cx.linear_vjp(down, inner_ni, Given::Among(ids), thin, dy_nd, to, sinks)?;
            }
        }
        drop((dy_ad, downs));
        let dopened = opened.vjp(&dinner_ai, cx);
        drop(dinner_ai);
        let n_td = residual::read(norm, &x[0], cx)?;
        let n_ad = self.sent(&n_td, &sent, cx);
        let mut dn_ad = through.then(|| cx.arena.rows(sent.places.len(), width));
        for (thin, Visit { expert, at, ids }) in sent.to.iter().enumerate() {
            let n_nd = n_ad.view().sub_rows(at.start, at.end);
            let dn = dn_ad.as_mut().map(|dn| dn.view_mut().into_sub_rows(at.start, at.end));
            dopened.open_vjp(thin, experts[*expert], n_nd, Given::Among(ids), at.clone(), dn, cx, sinks)?;
        }
        drop((n_ad, dopened));
        self.unvisited(&sent, cx, sinks)?;
        let dlogits_te = cx.meter.time(Work::Elementwise, || sent.vjp(self.mixture, &dweights, dprobs_te));
        let narrowed = cx.as_activations(dlogits_te.view());
        let mut dn_td = dn_ad.is_some().then(|| cx.arena.rows(cx.n_rows(), width));
        let to = dn_td.as_mut().map(|dn| (dn.view_mut(), false));
        let linear = site(&self.sites, Place::Router)?;
        cx.linear_vjp(linear, n_td.view(), Given::All, &router, narrowed.view(dlogits_te.view()), to, sinks)?;
        if let (Some(dn_td), Some((_, Some(beside)))) = (&mut dn_td, &parted) {
            cx.kernels.add(beside.view().into(), dn_td.view_mut());
        }
        if let (Some(dn_td), Some(dn_ad)) = (&mut dn_td, &dn_ad) {
            cx.meter.time(Work::Elementwise, || {
                let mut to = dn_td.view_mut();
                for ((row, _), dn_d) in sent.rows(k).zip(dn_ad.values().chunks_exact(width)) {
                    to.row(row).iter_mut().zip(dn_d).for_each(|(sum, dn)| *sum += dn);
                }
            });
        }
        Ok(vec![residual::read_vjp(norm, &x[0], dsum, dn_td, cx, sinks)?])
    }
}

//! Steps in which a part of a component learns, a random one of each group's: of pairs of factors the first ranks, of MLPs the first channels.

use attune_points::adapter::WeightMap;
use attune_points::engine::{Engine, Source, StepReport, StepRule};
use attune_points::{Locals, Result, TensorId, Theta};
use attune_spec::id::Step;
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::{Device, Tensor};

use crate::parts::gates::OPEN;
use crate::parts::{anew, masks};

/// The local name of the factor `[r, i]`.
pub(crate) const A: &str = "lora_A";

/// The local name of the factor `[o, r]`.
pub(crate) const B: &str = "lora_B";

/// A product of factors within a weight, some of whose entries may be pruned and some of whose rows closed.
#[derive(Clone, Copy)]
pub(crate) struct Within {
    /// The factor on the product.
    pub(crate) scale: f64,
    /// Whether the product, too, is 0 where the weight is.
    pub(crate) masked: bool,
}

/// A pair of factors.
pub(crate) struct Pair {
    /// Its site.
    pub(crate) site: String,
    /// The first site that reads the same rows.
    pub(crate) group: String,
    /// The factor `[r, i]`.
    pub(crate) a: TensorId,
    /// The factor `[o, r]`.
    pub(crate) b: TensorId,
    /// The rank that is left after the last step.
    pub(crate) left: usize,
}

/// The channels of an MLP, which a tensor at the site that leads into it opens and closes.
pub(crate) struct Mlp {
    /// That site.
    pub(crate) site: String,
    /// The tensor, as long as there are channels: 1 for those that are open.
    pub(crate) open: TensorId,
    /// How many are open after the last step.
    pub(crate) left: usize,
    /// How many may be open.
    pub(crate) widths: Vec<usize>,
}

/// Steps of which each trains some ranks, and channels, of each group.
pub(crate) struct Elastic {
    /// The ranks that may be drawn.
    pub(crate) ranks: Vec<usize>,
    /// The steps of the job.
    pub(crate) steps: u64,
    /// All pairs.
    pub(crate) pairs: Vec<Pair>,
    /// All MLPs whose widths are drawn.
    pub(crate) mlps: Vec<Mlp>,
}

impl WeightMap for Within {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> Result<Tensor> {
        let kept_oi = masks::kept(w_oi, tensors)?;
        let mut change_oi = (ops::matmul(tensors.get(B)?, tensors.get(A)?)? * self.scale)?;
        if self.masked {
            change_oi = masks::within(&change_oi, &kept_oi)?;
        }
        let made_oi = (kept_oi + change_oi)?;
        Ok(match tensors.iter().find(|(local, _)| *local == OPEN) {
            Some((_, open_o)) => made_oi.broadcast_mul(&open_o.unsqueeze(1)?)?,
            None => made_oi,
        })
    }

    fn bias(&self, b_o: &Tensor, _: &Tensor, tensors: &Locals) -> Result<Tensor> {
        Ok(match tensors.iter().find(|(local, _)| *local == OPEN) {
            Some((_, open_o)) => (b_o * open_o)?,
            None => b_o.clone(),
        })
    }
}

/// The first `rank` rows or columns of a matrix, and 0 behind them.
///
/// # Errors
/// Whatever the operations raise.
pub(crate) fn first(tensor: &Tensor, dim: usize, rank: usize) -> Result<Tensor> {
    let all = tensor.dim(dim)?;
    if rank >= all {
        return Ok(tensor.clone());
    }
    let none = tensor.narrow(dim, rank, all - rank)?.zeros_like()?;
    Ok(Tensor::cat(&[&tensor.narrow(dim, 0, rank)?, &none], dim)?)
}

/// Whether a matrix has nothing behind its first `rank` rows or columns.
///
/// # Errors
/// Whatever the operations raise.
pub(crate) fn is_cut(tensor: &Tensor, dim: usize, rank: usize) -> Result<bool> {
    let all = tensor.dim(dim)?;
    let behind = tensor.narrow(dim, rank.min(all), all - rank.min(all))?.flatten_all()?.to_vec1::<f32>()?;
    Ok(behind.iter().all(|value| *value == 0.0))
}

/// The first `open` of `all` channels.
fn open(open: usize, all: usize) -> Result<Tensor> {
    let channels: Vec<f32> = (0..all).map(|at| if at < open { 1.0 } else { 0.0 }).collect();
    Ok(Tensor::new(channels, &Device::Cpu)?)
}

fn one_of(from: &[usize], rng: &mut Rng) -> usize {
    from[rng.below(from.len().max(1) as u64) as usize]
}

impl Elastic {
    /// The rank of each pair, drawn once for each group.
    fn drawn(&self, rng: &Rng) -> Vec<usize> {
        self.pairs.iter().map(|pair| one_of(&self.ranks, &mut rng.named(&pair.group))).collect()
    }
}

impl StepRule for Elastic {
    fn step(&mut self, step: Step, engine: &mut dyn Engine) -> Result<StepReport> {
        let batch = engine.batch(Source::Train)?;
        let (ranks, widths) = (self.drawn(&engine.rng("ranks")), engine.rng("widths"));
        let mut part = engine.theta().clone();
        // Rows of A behind columns of B that are 0 neither matter nor have a gradient.
        for (pair, rank) in self.pairs.iter().zip(&ranks) {
            let b_or = first(&anew::held(&part, &pair.b)?, 1, *rank)?;
            part.put(&pair.b, b_or);
        }
        let mut open_sum = 0.0;
        for mlp in &self.mlps {
            let (all, drawn) = (mlp.widths.first().copied(), one_of(&mlp.widths, &mut widths.named(&mlp.site)));
            part.put(&mlp.open, open(drawn, all.unwrap_or(drawn))?);
            open_sum += drawn as f64;
        }
        let objective = engine.objective();
        let scale = 1.0 / objective.denominator().of(batch.counts);
        let parts = engine.grads(&part, &batch.parts, &*objective, scale)?;
        let (mut gradients, loss) = engine.reduce(parts)?;
        for (pair, rank) in self.pairs.iter().zip(&ranks) {
            if let Some(gradient) = gradients.get(&pair.b).cloned() {
                gradients.set(&pair.b, first(&gradient, 1, *rank)?);
            }
        }
        let grad_norm = engine.update(gradients)?;
        let mut report = StepReport { loss, grad_norm, n_rows: batch.n_rows, ..StepReport::default() };
        let is_last = step.next().0 == self.steps;
        if is_last {
            let mut theta: Theta = engine.theta().clone();
            for pair in &self.pairs {
                for (id, dim) in [(&pair.a, 0), (&pair.b, 1)] {
                    let cut = first(&anew::held(&theta, id)?, dim, pair.left)?;
                    theta.put(id, cut);
                }
                report.metrics.push((format!("rank/{}", pair.site), pair.left as f64));
            }
            for mlp in &self.mlps {
                let all = anew::held(&theta, &mlp.open)?.elem_count();
                theta.put(&mlp.open, open(mlp.left, all)?);
                report.metrics.push((format!("width/{}", mlp.site), mlp.left as f64));
            }
            engine.set(theta);
        }
        let mean = |sum: f64, n: usize| sum / n.max(1) as f64;
        let of_pairs = |pair: (&Pair, &usize)| if is_last { pair.0.left } else { *pair.1 } as f64;
        let rank_sum: f64 = self.pairs.iter().zip(&ranks).map(of_pairs).sum();
        report.metrics.push(("rank".to_owned(), mean(rank_sum, ranks.len())));
        if !self.mlps.is_empty() {
            let left_sum = self.mlps.iter().map(|mlp| mlp.left as f64).sum();
            report.metrics.push(("width".to_owned(), mean(if is_last { left_sum } else { open_sum }, self.mlps.len())));
        }
        Ok(report)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use attune_architecture::SiteId;
    use attune_points::TensorSpec;
    use attune_points::adapter::Attachment;
    use candle_core::DType;

    use super::*;
    use crate::parts::toy::{self, Toy};

    /// Channels that are closed give nothing: neither their weight, nor their bias, nor their change.
    #[test]
    fn a_closed_channel_gives_nothing_and_an_open_one_what_it_gave() {
        let within = Within { scale: 2.0, masked: false };
        let normal = |name: &str, shape: &[usize]| Rng::new(1, name).normal_tensor(shape, 1.0, DType::F64).unwrap();
        let size = |x: &Tensor| x.abs().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
        let (w, bias) = (normal("w", &[4, 3]), normal("bias", &[4]));
        let of = |open: [f64; 4]| {
            let open = Tensor::new(&open, &Device::Cpu).unwrap();
            let locals = Locals::new("up", [(A, normal("a", &[2, 3])), (B, normal("b", &[4, 2])), (OPEN, open)]);
            (within.graph(&w, &locals).unwrap(), within.bias(&bias, &w, &locals).unwrap())
        };
        let (whole, narrow) = (of([1.0; 4]), of([1.0, 1.0, 0.0, 0.0]));
        let halves = |x: &Tensor| [x.narrow(0, 0, 2).unwrap(), x.narrow(0, 2, 2).unwrap()];
        for (whole, narrow) in [(whole.0, narrow.0), (whole.1, narrow.1)] {
            let ([first, _], [same, none]) = (halves(&whole), halves(&narrow));
            assert_eq!((size(&(first - same).unwrap()), size(&none)), (0.0, 0.0));
        }
    }

    const SITES: [&str; 3] = ["a.q", "a.k", "a.o"];

    fn at(site: &str) -> Attachment {
        let mut tensors = vec![TensorSpec::trained(A, [4, 3]), TensorSpec::trained(B, [2, 4])];
        if site == "a.o" {
            tensors.push(TensorSpec::fixed(OPEN, [8]));
        }
        Attachment { site: SiteId::new(site), tensors }
    }

    /// Three sites, of which the first two are a group and the last is before an MLP, whose gradients are 1 everywhere, but of A where B is 0.
    fn toy() -> Toy {
        let start = |site: &str, local: &str| match local {
            OPEN => Tensor::ones(8, DType::F32, &Device::Cpu).unwrap(),
            _ => {
                let shape = if local == A { [4, 3] } else { [2, 4] };
                Rng::new(1, site).named(local).normal_tensor(&shape[..], 1.0, DType::F32).unwrap()
            }
        };
        let gradient = |theta: &Theta, id: &TensorId| {
            let b = theta.get(&toy::id(id.name.owner(), B)).unwrap();
            let seen = b.ne(0.0).unwrap().to_dtype(DType::F32).unwrap().narrow(0, 0, 1).unwrap();
            Some(match id.name.local() {
                A => seen.t().unwrap().broadcast_as((4, 3)).unwrap().contiguous().unwrap(),
                _ => Tensor::ones((2, 4), DType::F32, &Device::Cpu).unwrap(),
            })
        };
        Toy::new(SITES.map(at).to_vec(), start, 1.0, gradient)
    }

    fn rule(left: usize, steps: u64) -> Elastic {
        let pair = |(site, group): (&str, &str)| Pair {
            site: site.to_owned(),
            group: group.to_owned(),
            a: toy::id(site, A),
            b: toy::id(site, B),
            left,
        };
        let pairs = SITES.into_iter().zip(["a.q", "a.q", "a.o"]).map(pair).collect();
        let mlp = Mlp { site: "a.o".to_owned(), open: toy::id("a.o", OPEN), left: 6, widths: vec![8, 6, 4] };
        Elastic { ranks: vec![4, 3, 2, 1], steps, pairs, mlps: vec![mlp] }
    }

    /// How many columns of B, and rows of A, a step has moved.
    fn moved(toy: &Toy, before: &Theta, site: &str) -> [usize; 2] {
        [(B, 0), (A, 1)].map(|(local, dim)| {
            let then = before.get(&toy::id(site, local)).unwrap();
            let by = (toy.value(site, local) - then).unwrap().abs().unwrap().max(dim).unwrap();
            by.to_vec1::<f32>().unwrap().iter().filter(|by| **by > 0.0).count()
        })
    }

    #[test]
    fn a_group_learns_in_one_rank_a_step_and_all_ranks_have_their_turn() {
        let (mut toy, mut rule) = (toy(), rule(4, 60));
        let (mut counts, mut widths) = (BTreeMap::<usize, usize>::new(), BTreeMap::<u64, usize>::new());
        let mut apart = 0;
        for step in 0..60 {
            let before = toy.theta.clone();
            let report = rule.step(Step(step), &mut toy).unwrap();
            let [q, k, o] = SITES.map(|site| moved(&toy, &before, site));
            assert!(q == k && q[0] == q[1] && o[0] == o[1], "{q:?} {k:?} {o:?}");
            *counts.entry(q[0]).or_default() += 1;
            apart += usize::from(q != o);
            if step < 59 {
                assert_eq!(report.metrics[0], ("rank".to_owned(), (2 * q[0] + o[0]) as f64 / 3.0));
                *widths.entry(report.metrics[1].1 as u64).or_default() += 1;
                // What is drawn is of the step alone: what is there stays whole.
                assert_eq!(toy.value("a.o", OPEN).to_vec1::<f32>().unwrap(), [1.0; 8]);
            }
        }
        assert!(counts.len() == 4 && counts.values().all(|count| *count >= 8), "{counts:?}");
        assert!(widths.keys().eq(&[4, 6, 8]) && widths.values().all(|count| *count >= 10), "{widths:?}");
        assert!(apart > 20, "groups are drawn by themselves");
    }

    #[test]
    fn after_the_last_step_nothing_is_behind_what_is_left() {
        let (mut toy, mut rule) = (toy(), rule(3, 3));
        (0..2).for_each(|step| drop(rule.step(Step(step), &mut toy).unwrap()));
        assert!(!is_cut(&toy.value("a.o", B), 1, 3).unwrap());
        let report = rule.step(Step(2), &mut toy).unwrap();
        let told: Vec<(&str, f64)> = report.metrics.iter().map(|(name, number)| (name.as_str(), *number)).collect();
        let expected = [
            ("rank/a.q", 3.0),
            ("rank/a.k", 3.0),
            ("rank/a.o", 3.0),
            ("width/a.o", 6.0),
            ("rank", 3.0),
            ("width", 6.0),
        ];
        assert_eq!(told, expected);
        for site in SITES {
            assert!(is_cut(&toy.value(site, A), 0, 3).unwrap() && is_cut(&toy.value(site, B), 1, 3).unwrap());
            assert!(!is_cut(&toy.value(site, B), 1, 2).unwrap());
        }
        let open = toy.value("a.o", OPEN).to_vec1::<f32>().unwrap();
        assert_eq!(open, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]);
    }
}

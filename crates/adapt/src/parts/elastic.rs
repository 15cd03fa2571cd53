//! Steps in which a part of a component learns, a random one of each group's: of pairs of factors the first ranks, of MLPs the first channels.

use std::collections::BTreeMap;

use attune_points::adapter::{Attachment, FusedRows, RowCx, RowMap, Trained, WeightMap};
use attune_points::engine::{Engine, Source, StepReport, StepRule, Tensors};
use attune_points::{Error, Locals, Owner, Params, Result, TensorId, TensorName, Theta};
use attune_spec::id::Step;
use attune_tensor::ops;
use attune_tensor::rng::Rng;
use candle_core::{Device, Tensor};
use serde_json::Value;

use crate::parts::dropout::dropped;
use crate::parts::gates::OPEN;
use crate::parts::grid::Grid;
use crate::parts::subnetworks::{Found, Search};
use crate::parts::supernet::{About, Ranks};
use crate::parts::{anew, masks};

/// The local name of the factor `[r, i]`.
pub(crate) const A: &str = "lora_A";

/// The local name of the factor `[o, r]`.
pub(crate) const B: &str = "lora_B";

/// A product of factors within a weight, some of whose entries may be pruned and some of whose rows closed, and whose sum may be of few bits.
#[derive(Clone, Copy)]
pub(crate) struct Within {
    /// The factor on the product.
    pub(crate) scale: f64,
    /// Whether the product, too, is 0 where the weight is.
    pub(crate) masked: bool,
    /// What the sum is held in, if in few bits.
    pub(crate) grid: Option<Grid>,
}

/// A product of factors beside a weight.
#[derive(Clone, Copy)]
pub(crate) struct Beside {
    /// The factor on the product.
    pub(crate) scale: f64,
    /// Share of the input that is dropped.
    pub(crate) dropout: f64,
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
    /// The rank that is left after the last step, unless it is searched for.
    pub(crate) left: usize,
    /// Numbers of each rank.
    pub(crate) numbers: u64,
}

/// The channels of an MLP, which a tensor at the site that leads into it opens and closes.
pub(crate) struct Mlp {
    /// That site.
    pub(crate) site: String,
    /// The tensor, as long as there are channels: 1 for those that are open.
    pub(crate) open: TensorId,
    /// How many are open after the last step, unless that is searched for.
    pub(crate) left: usize,
    /// How many may be open.
    pub(crate) widths: Vec<usize>,
    /// Numbers of each channel, in all weights of the MLP.
    pub(crate) numbers: u64,
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
    /// How what is left is searched for, if it is.
    pub(crate) search: Option<Search>,
    /// What was found.
    pub(crate) found: Option<Found>,
}

impl RowMap for Beside {
    fn graph(&self, x_ti: &Tensor, tensors: &Locals, cx: &RowCx<'_>) -> Result<Tensor> {
        let h_tr = ops::linear(&dropped(x_ti, self.dropout, cx)?, tensors.get(A)?, None)?;
        Ok(ops::linear(&(h_tr * self.scale)?, tensors.get(B)?, None)?)
    }

    fn fused(&self) -> Option<FusedRows> {
        Some(FusedRows::LowRank { down: A, up: B, scale: self.scale, dropout: self.dropout })
    }
}

impl WeightMap for Within {
    fn graph(&self, w_oi: &Tensor, tensors: &Locals) -> Result<Tensor> {
        let kept_oi = masks::kept(w_oi, tensors)?;
        let mut change_oi = (ops::matmul(tensors.get(B)?, tensors.get(A)?)? * self.scale)?;
        if self.masked {
            change_oi = masks::within(&change_oi, &kept_oi)?;
        }
        let made_oi = (kept_oi + change_oi)?;
        let made_oi = match self.grid {
            Some(grid) => grid.onto(&made_oi, tensors)?,
            None => made_oi,
        };
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

/// The smallest of `all` ranks, which come with the largest first, behind which nothing is left of each pair.
///
/// # Errors
/// Parameters that are not those of `at`.
pub(crate) fn ranks_of(all: &[usize], at: &[Attachment], params: &Params) -> Result<BTreeMap<String, u32>> {
    let mut found = BTreeMap::new();
    for at in at {
        let site = at.site.as_str();
        let held = |local: &str| {
            let name = TensorName::new(site, local);
            params.get(&name).ok_or_else(|| Error::Refused(format!("{name} has no value")))
        };
        let (a_ri, b_or) = (held(A)?, held(B)?);
        for rank in all.iter().rev() {
            if is_cut(a_ri, 0, *rank)? && is_cut(b_or, 1, *rank)? {
                found.insert(site.to_owned(), *rank as u32);
                break;
            }
        }
    }
    Ok(found)
}

/// The first `open` of `all` channels.
fn open(open: usize, all: usize) -> Result<Tensor> {
    let channels: Vec<f32> = (0..all).map(|at| if at < open { 1.0 } else { 0.0 }).collect();
    Ok(Tensor::new(channels, &Device::Cpu)?)
}

fn one_of(from: &[usize], rng: &mut Rng) -> usize {
    from[rng.below(from.len().max(1) as u64) as usize]
}

/// The widths that an MLP of so many channels may have, and the one that is left.
type Widths<'w> = dyn Fn(usize) -> Option<(Vec<usize>, usize)> + 'w;

impl Elastic {
    /// The steps of a component of these ranks, about whose sites this is known.
    pub(crate) fn of(
        of: &Trained<'_>,
        ranks: &Ranks,
        sites: &BTreeMap<String, About>,
        widths: &Widths<'_>,
        search: Option<Search>,
    ) -> Self {
        let id = |site: &str, local: &str| TensorId {
            owner: Owner::Bank { slot: of.slot, set: 0 },
            name: TensorName::new(site, local),
        };
        let pair = |at: &&Attachment| {
            let site = at.site.as_str();
            let group = sites.get(site).map_or(site, |about| &about.group).to_owned();
            let factors = at.tensors.iter().filter(|spec| [A, B].contains(&spec.local));
            let all: usize = factors.map(|spec| spec.shape.iter().product::<usize>()).sum();
            let (left, numbers) = (ranks.left_at(site), all as u64 / u64::from(ranks.rank.max(1)));
            Pair { site: site.to_owned(), group, a: id(site, A), b: id(site, B), left, numbers }
        };
        let mlp = |at: &&Attachment| {
            let site = at.site.as_str();
            let spec = at.tensors.iter().find(|spec| spec.local == OPEN)?;
            let (widths, left) = widths(spec.shape[0])?;
            let numbers = sites.get(site).map_or(0, |about| about.channel);
            Some(Mlp { site: site.to_owned(), open: id(site, OPEN), left, widths, numbers })
        };
        let pairs = of.attachments.iter().map(pair).collect();
        let mlps = of.attachments.iter().filter_map(mlp).collect();
        Self { ranks: ranks.all(), steps: of.steps.0, pairs, mlps, search, found: None }
    }

    /// The rank of each pair, drawn once for each group.
    fn drawn(&self, rng: &Rng) -> Vec<usize> {
        self.pairs.iter().map(|pair| one_of(&self.ranks, &mut rng.named(&pair.group))).collect()
    }

    /// The groups, in the order of their first pairs.
    fn groups(&self) -> Vec<&str> {
        let mut groups: Vec<&str> = Vec::new();
        for pair in &self.pairs {
            if !groups.contains(&pair.group.as_str()) {
                groups.push(&pair.group);
            }
        }
        groups
    }

    /// How many sizes each group may have, and then each MLP.
    pub(crate) fn values(&self) -> Vec<usize> {
        let groups = self.groups().len();
        vec![self.ranks.len(); groups].into_iter().chain(self.mlps.iter().map(|mlp| mlp.widths.len())).collect()
    }

    /// The rank of each pair, and how many channels of each MLP are open, where a size is chosen for each group and MLP by its number.
    pub(crate) fn sizes(&self, chosen: &[usize]) -> (Vec<usize>, Vec<usize>) {
        let groups = self.groups();
        let rank = |pair: &Pair| {
            let at = groups.iter().position(|group| *group == pair.group).and_then(|group| chosen.get(group));
            at.and_then(|at| self.ranks.get(*at)).copied().unwrap_or(pair.left)
        };
        let widths = self.mlps.iter().zip(chosen.iter().skip(groups.len()));
        let width = |(mlp, at): (&Mlp, &usize)| mlp.widths.get(*at).copied().unwrap_or(mlp.left);
        (self.pairs.iter().map(rank).collect(), widths.map(width).collect())
    }

    /// The numbers of such a choice: of its ranks, and of the MLPs that may have other widths.
    pub(crate) fn numbers(&self, chosen: &[usize]) -> u64 {
        let (ranks, widths) = self.sizes(chosen);
        let of_ranks: u64 = self.pairs.iter().zip(ranks).map(|(pair, rank)| pair.numbers * rank as u64).sum();
        let of_widths: u64 = self.mlps.iter().zip(widths).map(|(mlp, width)| mlp.numbers * width as u64).sum();
        of_ranks + of_widths
    }

    /// The parameters of such a choice.
    ///
    /// # Errors
    /// Whatever the operations raise.
    pub(crate) fn cut(&self, theta: &Theta, chosen: &[usize]) -> Result<Theta> {
        let ((ranks, widths), mut cut) = (self.sizes(chosen), theta.clone());
        for (pair, rank) in self.pairs.iter().zip(ranks) {
            self.cut_pair(&mut cut, pair, rank)?;
        }
        for (mlp, width) in self.mlps.iter().zip(widths) {
            let all = anew::held(theta, &mlp.open)?.elem_count();
            cut.put(&mlp.open, open(width, all)?);
        }
        Ok(cut)
    }

    fn cut_pair(&self, theta: &mut Theta, pair: &Pair, rank: usize) -> Result<()> {
        for (id, dim) in [(&pair.a, 0), (&pair.b, 1)] {
            let cut = first(&anew::held(theta, id)?, dim, rank)?;
            theta.put(id, cut);
        }
        Ok(())
    }
}

impl StepRule for Elastic {
    fn step(&mut self, step: Step, engine: &mut dyn Engine) -> Result<StepReport> {
        if let (Some(search), 0) = (self.search, step.0) {
            search.can(engine)?;
        }
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
        let (mut left_ranks, mut left_widths) = (Vec::new(), Vec::new());
        if is_last {
            (left_ranks, left_widths) = self.left(engine)?;
            let mut theta: Theta = engine.theta().clone();
            for (pair, left) in self.pairs.iter().zip(&left_ranks) {
                self.cut_pair(&mut theta, pair, *left)?;
                report.metrics.push((format!("rank/{}", pair.site), *left as f64));
            }
            for (mlp, left) in self.mlps.iter().zip(&left_widths) {
                let all = anew::held(&theta, &mlp.open)?.elem_count();
                theta.put(&mlp.open, open(*left, all)?);
                report.metrics.push((format!("width/{}", mlp.site), *left as f64));
            }
            engine.set(theta);
        }
        let mean = |sum: f64, n: usize| sum / n.max(1) as f64;
        let of = |sizes: &[usize]| sizes.iter().map(|size| *size as f64).sum::<f64>();
        let rank_sum = of(if is_last { &left_ranks } else { &ranks });
        report.metrics.push(("rank".to_owned(), mean(rank_sum, ranks.len())));
        if !self.mlps.is_empty() {
            let width_sum = if is_last { of(&left_widths) } else { open_sum };
            report.metrics.push(("width".to_owned(), mean(width_sum, self.mlps.len())));
        }
        Ok(report)
    }

    fn state(&self) -> Tensors {
        // What was found is of shapes that fit.
        self.found.as_ref().and_then(|found| found.tensors().ok()).unwrap_or_default()
    }

    fn restore(&mut self, state: Tensors, _: &Theta) -> Result<()> {
        self.found = Found::kept(state, self)?;
        Ok(())
    }

    fn found(&self) -> Option<Value> {
        self.found.as_ref().map(|found| found.told(self))
    }
}

impl Elastic {
    /// What is left of each pair and each MLP, which is searched for first where it has to be.
    fn left(&mut self, engine: &mut dyn Engine) -> Result<(Vec<usize>, Vec<usize>)> {
        let Some(search) = self.search else {
            let ranks = self.pairs.iter().map(|pair| pair.left).collect();
            return Ok((ranks, self.mlps.iter().map(|mlp| mlp.left).collect()));
        };
        let found = search.run(self, engine)?;
        let sizes = self.sizes(found.chosen()?);
        self.found = Some(found);
        Ok(sizes)
    }
}

#[cfg(test)]
mod tests {
    use attune_architecture::SiteId;
    use attune_points::TensorSpec;
    use candle_core::DType;

    use super::*;
    use crate::parts::toy::{self, Toy};

    /// Channels that are closed give nothing: neither their weight, nor their bias, nor their change.
    #[test]
    fn a_closed_channel_gives_nothing_and_an_open_one_what_it_gave() {
        let within = Within { scale: 2.0, masked: false, grid: None };
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
            numbers: 5,
        };
        let pairs = SITES.into_iter().zip(["a.q", "a.q", "a.o"]).map(pair).collect();
        let mlp =
            Mlp { site: "a.o".to_owned(), open: toy::id("a.o", OPEN), left: 6, widths: vec![8, 6, 4], numbers: 9 };
        Elastic { ranks: vec![4, 3, 2, 1], steps, pairs, mlps: vec![mlp], search: None, found: None }
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

    /// Toys whose loss is known: what the first rank of the second group adds is worth much, and all else little.
    fn searched(most: f64) -> (Toy, Elastic) {
        let worth = |theta: &Theta| {
            let columns = |site: &str| {
                let b = theta.get(&toy::id(site, B)).unwrap();
                let seen = b.ne(0.0).unwrap().to_dtype(DType::F32).unwrap().narrow(0, 0, 1).unwrap();
                seen.sum_all().unwrap().to_scalar::<f32>().unwrap()
            };
            let open = theta.get(&toy::id("a.o", OPEN)).unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
            f64::from(10.0 - 4.0 * columns("a.o").min(2.0) - 0.1 * columns("a.q") - 0.01 * open)
        };
        let mut toy = toy();
        toy.loss = Some(Box::new(worth));
        (toy, Elastic { search: Some(Search { evaluations: 48, population: 8, most }), ..rule(3, 2) })
    }

    #[test]
    fn what_is_left_is_on_the_front_is_no_worse_than_the_middle_and_is_kept() {
        let (mut toy, mut rule) = searched(0.8);
        rule.step(Step(0), &mut toy).unwrap();
        assert!(rule.found().is_none() && rule.state().is_empty());
        let report = rule.step(Step(1), &mut toy).unwrap();
        let found = rule.found().unwrap();
        // There are 4 x 4 x 3 choices, and all were tried.
        assert_eq!(found["evaluations"], 48);
        let front = found["front"].as_array().unwrap();
        let of = |choice: &Value| (choice["loss"].as_f64().unwrap(), choice["parameters"].as_u64().unwrap());
        assert!(front.windows(2).all(|two| of(&two[0]).0 < of(&two[1]).0 && of(&two[0]).1 > of(&two[1]).1));
        // The largest has 4 ranks of three pairs and 8 channels, the smallest one each and 4.
        let numbers = |ranks: u64, width: u64| 5 * ranks + 9 * width;
        assert!(of(&front[0]).1 <= numbers(12, 8) && of(&front[front.len() - 1]).1 == numbers(3, 4));
        let chosen = &front[found["chosen"].as_u64().unwrap() as usize];
        assert!(of(chosen).1 as f64 <= 0.8 * numbers(12, 8) as f64);
        // Two ranks of the last pair are what counts.
        assert_eq!(chosen["ranks"]["a.o"], 2, "{chosen}");
        let (middle, loss) = (numbers(9, 6), 10.0 - 8.0 - 0.3 - 0.06);
        assert!(middle as f64 <= 0.8 * numbers(12, 8) as f64 && of(chosen).0 <= loss + 1e-6);
        // What is left is what was chosen, and a pair of a group has the rank of the other.
        for site in SITES {
            let rank = chosen["ranks"][site].as_u64().unwrap() as usize;
            assert!(is_cut(&toy.value(site, A), 0, rank).unwrap() && is_cut(&toy.value(site, B), 1, rank).unwrap());
            assert!(report.metrics.contains(&(format!("rank/{site}"), rank as f64)));
        }
        assert_eq!(chosen["ranks"]["a.q"], chosen["ranks"]["a.k"]);
        let open: f32 = toy.value("a.o", OPEN).sum_all().unwrap().to_scalar().unwrap();
        assert_eq!(Value::from(open as u64), chosen["widths"]["a.o"]);
        // Who goes on after it knows the same, and a search of something else is refused.
        let (_, mut again) = searched(0.8);
        again.restore(rule.state(), &toy.theta).unwrap();
        assert_eq!(again.found().unwrap(), found);
        let mut other = Elastic { mlps: Vec::new(), ..searched(0.8).1 };
        assert!(other.restore(rule.state(), &toy.theta).is_err());
        // The same numbers find the same.
        let (mut toy, mut rule) = searched(0.8);
        (0..2).for_each(|step| drop(rule.step(Step(step), &mut toy).unwrap()));
        assert_eq!(rule.found().unwrap(), found);
    }

    #[test]
    fn a_search_without_validation_data_or_numbers_is_refused() {
        let (mut toy, mut rule) = searched(1.0);
        toy.is_validated = false;
        let why = rule.step(Step(0), &mut toy).unwrap_err().to_string();
        assert!(why.contains("expected `data.validation`, or another `left`"), "{why}");
        let (mut toy, mut rule) = searched(1.0);
        toy.loss = Some(Box::new(|_| f64::NAN));
        rule.step(Step(0), &mut toy).unwrap();
        assert!(rule.step(Step(1), &mut toy).unwrap_err().to_string().contains("found nothing"));
    }
}

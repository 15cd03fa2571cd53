//! The engine of one rank: batches, passes, sums over shards, updates.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::BitOrAssign;
use std::sync::Arc;
use std::time::Duration;

use attune_collective::owns;
use attune_data::Loader;
use attune_models::dropout::Dropout;
use attune_models::pass::walk::Keep;
use attune_models::pass::{Stopwatch, Times};
use attune_models::{Model, Pass};
use attune_points::engine::{Batch, Engine, LossReport, Renewed, Source, Tensors};
use attune_points::layout::REFERENCE;
use attune_points::objective::{Level, Objective};
use attune_points::optimizer::Optimizer;
use attune_points::schedule::Schedule;
use attune_points::{Entries, Error, GradSink, Grads, Layout, Params, Result, Tap, TensorId, TensorSpec, Theta};
use attune_spec::id::Step;
use attune_tensor::Rng;
use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use crate::agreement::Waits;
use crate::answers::{Judge, Judged};
use crate::checkpoint::{self, Buffers};
use crate::gang::Ranks;
use crate::guard::Guard;
use crate::scope::ByColumn;
use crate::spent::Spent;
use crate::together::{self, Asked, Company, Piece, Purpose, Wanted};
use crate::turns::Turns;
use crate::update::of_ranks;

/// What a rank was asked for from outside, of which all must know.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Wishes {
    /// To stop after the step.
    pub(crate) stop: bool,
    /// To write a checkpoint after the step.
    pub(crate) checkpoint: bool,
}

impl BitOrAssign for Wishes {
    fn bitor_assign(&mut self, other: Self) {
        self.stop |= other.stop;
        self.checkpoint |= other.checkpoint;
    }
}

/// What ranks send one another.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Message {
    /// The loss of a part of a validation set.
    Report(LossReport),
    /// The losses of a micro-batch at several parameters, and what the rank was asked for.
    Reports { reports: Vec<LossReport>, wishes: Wishes },
    /// A micro-batch with the log-probabilities of its labels.
    Scored(Arc<Layout>),
    /// What a step rule has to say.
    Said(#[serde(with = "crate::gang::said")] Tensors),
    /// What the answers to a micro-batch are worth.
    Judged(Judged),
    /// What a rank's parameters have hashed to, and how long its process has waited for each.
    Values { digest: [u8; 32], waits: Vec<Duration> },
    /// A micro-batch's gradient and loss, and what the rank was asked for. Between processes it goes in pieces. The
    /// last: what is skipped has no number in the format.
    #[serde(skip)]
    Part { gradients: Grads, report: LossReport, wishes: Wishes },
}

/// What all ranks of a run share.
pub(crate) struct Shared {
    pub(crate) model: Arc<Model>,
    pub(crate) objective: Arc<dyn Objective>,
    pub(crate) optimizer: Box<dyn Optimizer>,
    pub(crate) schedule: Box<dyn Schedule>,
    /// How each trained tensor was declared.
    pub(crate) specs: BTreeMap<TensorId, TensorSpec>,
    /// Validation sets: name, and batches in file order.
    pub(crate) validation: Vec<(String, Vec<Arc<Layout>>)>,
    pub(crate) total_steps: Step,
    pub(crate) max_grad_norm: Option<f64>,
    pub(crate) logical_shards: u32,
    /// Micro-batches of each shard in a step.
    pub(crate) accumulation: u32,
    pub(crate) seed: u64,
    /// What a forward pass keeps for the reverse one.
    pub(crate) keep: Keep,
    /// What judges the answers that the objective needs, if it needs any.
    pub(crate) judge: Option<Judge>,
    /// What stands beside documents of some domains.
    pub(crate) turns: Turns,
}

impl Shared {
    /// How many numbers train; what a component holds beside them does not count.
    pub(crate) fn trained_parameters(&self) -> u64 {
        self.specs.values().map(|spec| spec.shape.iter().product::<usize>() as u64).sum()
    }
}

/// The objective of a pass.
pub(crate) enum Asking<'o> {
    /// One that may outlive the pass: lanes wait for each other with it.
    Shared(Arc<dyn Objective>),
    /// One that may not.
    Lent(&'o dyn Objective),
}

impl Asking<'_> {
    fn objective(&self) -> &dyn Objective {
        match self {
            Self::Shared(objective) => &**objective,
            Self::Lent(objective) => *objective,
        }
    }
}

/// One rank's engine.
pub(crate) struct RankEngine<'a> {
    pub(crate) shared: &'a Shared,
    pub(crate) loader: Loader,
    pub(crate) collective: Box<dyn Ranks + 'a>,
    pub(crate) theta: Theta,
    pub(crate) buffers: Buffers,
    pub(crate) guard: Guard,
    /// How many rows a pass takes at most, unless a single micro-batch has more. It changes speed and memory, and no bit.
    pub(crate) rows_per_pass: usize,
    /// Where time went since it was last looked at.
    pub(crate) spent: Spent,
    /// What the answers of the last batch are worth.
    pub(crate) judged: Judged,
    /// What its passes are for.
    pub(crate) purpose: Purpose,
    /// The lanes beside which it runs.
    pub(crate) company: Option<Company<'a>>,
    /// Steps done.
    pub(crate) step: Step,
    /// Where the next step stands in the schedule, and how many steps that has.
    pub(crate) scheduled: (Step, Step),
    /// What this rank was asked for; told to the others with the next gradients.
    pub(crate) wishes: Wishes,
    /// What any rank was, by the last sum: all ranks agree on it.
    pub(crate) agreed: Wishes,
    /// What the parameters of all steps so far hash to, where others have the same.
    pub(crate) witnessed: [u8; 32],
    /// How long this process has waited for each since all last showed theirs.
    pub(crate) waits: Waits,
}

impl RankEngine<'_> {
    /// The optimiser's buffers of every trained tensor, whichever rank has them.
    pub(crate) fn all_buffers(&self) -> Vec<checkpoint::Buffer> {
        let optimizer = &*self.shared.optimizer;
        checkpoint::buffers(self.shared.specs.iter().map(|(id, spec)| (id, buffers_of(optimizer, spec))))
    }

    /// Exchanges parts with the other ranks.
    pub(crate) fn exchange(&mut self, parts: Vec<(u32, Message)>) -> Result<Vec<(u32, Message)>> {
        let watch = Stopwatch::start();
        let all = self.collective.exchange(parts).map_err(|error| of_ranks(&error));
        self.spent.collective += watch.elapsed();
        all
    }

    /// One pass over some micro-batches: for each its gradients, if they are wanted, and its loss. Beside other lanes it is
    /// made with theirs.
    pub(crate) fn pass(
        &mut self,
        at: &Theta,
        group: &[(u32, Arc<Layout>)],
        dropout: Option<Dropout>,
        of: &Asking<'_>,
        wanted: Option<Wanted>,
    ) -> Result<Vec<(Grads, LossReport)>> {
        let shared = self.shared;
        let with;
        let group = if of.objective().needs().reference {
            let layouts: Vec<Arc<Layout>> = group.iter().map(|(_, layout)| Arc::clone(layout)).collect();
            let (layouts, times) = shared.model.with_logp(REFERENCE, &at.untrained(), None, &layouts)?;
            self.spent.passes += times;
            with = group.iter().map(|(part, _)| *part).zip(layouts).collect::<Vec<_>>();
            with.as_slice()
        } else {
            group
        };
        let (found, times) = if let (Some(company), Asking::Shared(objective)) = (self.company, of) {
            company.pass(Piece {
                model: Arc::clone(&shared.model),
                objective: Arc::clone(objective),
                theta: at.clone(),
                layouts: group.iter().map(|(_, layout)| Arc::clone(layout)).collect(),
                dropout,
                wanted,
                purpose: self.purpose,
            })?
        } else {
            let layouts = group.iter().map(|(_, layout)| &**layout).collect();
            let asked = Asked {
                model: &shared.model,
                objective: of.objective(),
                theta: at,
                layouts,
                dropout,
                wanted: wanted.as_ref(),
                purpose: self.purpose,
            };
            together::pass(&[asked])?.pop().unwrap_or_default()
        };
        self.spent.passes += times;
        Ok(found)
    }

    /// Finds the gradients of some micro-batches and their losses, and hands them on as they are made, by their numbers.
    pub(crate) fn each_gradient(
        &mut self,
        at: &Theta,
        parts: &[(u32, Arc<Layout>)],
        of: &dyn Objective,
        (scale, beside): (f64, &Entries),
        take: &mut dyn FnMut(&mut Self, u32, Grads, LossReport) -> Result<()>,
    ) -> Result<()> {
        let dropout = Some(Dropout { seed: self.shared.seed, step: self.step.0 });
        // Vectors of a step that is one micro-batch are all there in one pass.
        let is_one = of.needs().vectors && self.shared.logical_shards * self.shared.accumulation == 1;
        if of.level() == Level::Step && !is_one {
            // Its loss is reported with the step's first micro-batch.
            let (parts, loss) = self.scope(at, parts, dropout, of)?;
            let by_column: Arc<dyn Objective> = Arc::new(ByColumn { vectors: of.needs().vectors });
            let mut take = |engine: &mut Self, number: u32, gradients: Grads, mut report: LossReport| {
                report.loss_sum = 0.0;
                report.by_domain.iter_mut().for_each(|(loss, _)| *loss = 0.0);
                if number == 0 {
                    report.add(&loss);
                }
                take(engine, number, gradients, report)
            };
            return self.by_passes(at, &parts, || Asking::Shared(Arc::clone(&by_column)), (scale, beside), &mut take);
        }
        // The run's own objective is known by its place.
        let is_own = std::ptr::addr_eq(of, Arc::as_ptr(&self.shared.objective));
        let own = is_own.then(|| Arc::clone(&self.shared.objective));
        self.by_passes(at, parts, || own.clone().map_or(Asking::Lent(of), Asking::Shared), (scale, beside), take)
    }

    fn by_passes<'o>(
        &mut self,
        at: &Theta,
        parts: &[(u32, Arc<Layout>)],
        of: impl Fn() -> Asking<'o>,
        (scale, beside): (f64, &Entries),
        take: &mut dyn FnMut(&mut Self, u32, Grads, LossReport) -> Result<()>,
    ) -> Result<()> {
        let dropout = Some(Dropout { seed: self.shared.seed, step: self.step.0 });
        let sink = Grads::wanting(self.wanted()).and_entries(beside);
        for group in groups(parts, self.rows_per_pass) {
            let passes = group.iter().map(|(_, layout)| Pass { theta: at, layout, dropout });
            self.spent.flops += passes.map(|pass| self.shared.model.flops(&pass)).sum::<f64>();
            let wanted = Wanted { scale, sink: sink.clone(), keep: self.shared.keep };
            let found = self.pass(at, group, dropout, &of(), Some(wanted))?;
            for ((part, _), (gradients, report)) in group.iter().zip(found) {
                take(self, *part, gradients, report)?;
            }
        }
        Ok(())
    }

    /// A pass over one micro-batch that nobody else takes part in.
    fn grad_alone(
        &self,
        pass: Pass<'_>,
        of: &dyn Objective,
        scale: f64,
        sink: &mut dyn GradSink,
    ) -> Result<(Vec<LossReport>, Times)> {
        let model = &self.shared.model;
        if !of.needs().reference {
            return model.grad_parts(&[pass], of, scale, self.shared.keep, &mut [sink]);
        }
        let layout = Arc::new(pass.layout.clone());
        let (with, took) = model.with_logp(REFERENCE, &pass.theta.untrained(), None, &[layout])?;
        let parts: Vec<Pass<'_>> = with.iter().map(|layout| Pass { layout, ..pass }).collect();
        let (reports, mut times) = model.grad_parts(&parts, of, scale, self.shared.keep, &mut [sink])?;
        times += took;
        Ok((reports, times))
    }
}

/// Micro-batches that go through the model together: as many as have no more than `rows` rows, at least one.
pub(crate) fn groups(parts: &[(u32, Arc<Layout>)], rows: usize) -> impl Iterator<Item = &[(u32, Arc<Layout>)]> {
    let mut rest = parts;
    std::iter::from_fn(move || {
        let mut sum = 0;
        let fits = |(_, layout): &&(u32, Arc<Layout>)| {
            sum += layout.n_rows();
            sum <= rows
        };
        let n = rest.iter().take_while(fits).count().max(1).min(rest.len());
        let (group, others) = rest.split_at(n);
        rest = others;
        (!group.is_empty()).then_some(group)
    })
}

/// The optimiser's buffers of a tensor, by name and length; of one whose entries come and go, when each came as well.
fn buffers_of(optimizer: &dyn Optimizer, spec: &TensorSpec) -> Vec<(&'static str, usize)> {
    let born = spec.comes_and_goes.then(|| ("born", spec.shape.iter().product()));
    optimizer.buffers(&spec.shape).into_iter().chain(born).collect()
}

/// The optimiser's buffers of the trained tensors that a rank updates, at zero.
pub(crate) fn empty_buffers(
    optimizer: &dyn Optimizer,
    specs: &BTreeMap<TensorId, TensorSpec>,
    mut has: impl FnMut(&TensorId) -> bool,
) -> Buffers {
    let zeros = |spec| buffers_of(optimizer, spec).into_iter().map(|(_, length)| vec![0.0; length]).collect();
    specs.iter().filter(|(id, _)| has(id)).map(|(id, spec)| (id.clone(), zeros(spec))).collect()
}

impl Engine for RankEngine<'_> {
    fn theta(&self) -> &Theta {
        &self.theta
    }

    fn set(&mut self, theta: Theta) {
        self.theta = theta;
    }

    fn batch(&mut self, source: Source) -> Result<Batch> {
        // What is measured is what is made: nothing takes turns there.
        self.shared.turns.bind(&mut self.theta, (source == Source::Train).then_some(self.step));
        match source {
            Source::Train => {
                let watch = Stopwatch::start();
                let mut batch = self.loader.batch(self.step)?;
                self.spent.data += watch.elapsed();
                batch.parts.retain(|(part, layout)| self.owns(*part) && layout.n_rows() > 0);
                let Some(how) = self.shared.objective.needs().answers else { return Ok(batch) };
                let (batch, judged) = self.answered(&self.theta.clone(), &batch, &how)?;
                self.judged = judged;
                Ok(batch)
            }
            Source::Validation(index) => {
                let layouts = self.shared.validation.get(usize::from(index)).map(|(_, layouts)| layouts.as_slice());
                let layouts = layouts.ok_or_else(|| Error::Refused(format!("there is no validation set {index}")))?;
                let parts = (0u32..).zip(layouts.iter().cloned()).collect();
                let counts = layouts.iter().map(|layout| layout.counts()).sum();
                let n_rows = layouts.iter().map(|layout| layout.n_rows() as u64).sum();
                Ok(Batch { parts, counts, n_rows })
            }
            _ => Err(Error::Refused("this engine has training and validation batches only".to_owned())),
        }
    }

    fn score(&mut self, at: &Theta, on: &Layout, of: &dyn Objective) -> Result<LossReport> {
        self.shared.model.score(&Pass { theta: at, layout: on, dropout: None }, of)
    }

    fn scores(&mut self, at: &[Theta], parts: &[(u32, Arc<Layout>)], of: &dyn Objective) -> Result<Vec<LossReport>> {
        self.scored(at, parts, of)
    }

    fn look(&mut self, at: &Theta, on: &Layout, tap: &dyn Tap) -> Result<()> {
        self.shown(at, on, tap)
    }

    fn grad(
        &mut self,
        at: &Theta,
        on: &Layout,
        of: &dyn Objective,
        scale: f64,
        sink: &mut dyn GradSink,
    ) -> Result<LossReport> {
        let dropout = Some(Dropout { seed: self.shared.seed, step: self.step.0 });
        let pass = Pass { theta: at, layout: on, dropout };
        self.spent.flops += self.shared.model.flops(&pass);
        // A pass of its own: lanes beside it need not wait.
        self.company.inspect(Company::leave);
        let found = self.grad_alone(pass, of, scale, sink);
        self.company.inspect(Company::enter);
        let (mut reports, times) = found?;
        self.spent.passes += times;
        Ok(reports.pop().unwrap_or_default())
    }

    fn grads_beside(
        &mut self,
        at: &Theta,
        parts: &[(u32, Arc<Layout>)],
        of: &dyn Objective,
        scale: f64,
        beside: &Entries,
    ) -> Result<Vec<(u32, Grads, LossReport)>> {
        // A rank that is alone adds up as it goes, in the order in which all are added. What several ranks have is added in
        // turns, so each keeps its own apart until then.
        let alone = self.collective.size() == 1;
        let mut made: Vec<(u32, Grads, LossReport)> = Vec::new();
        let mut take = |_: &mut Self, part: u32, gradients: Grads, report: LossReport| {
            match made.last_mut().filter(|_| alone) {
                Some((_, sum, total)) => {
                    sum.add(&gradients)?;
                    total.add(&report);
                }
                None => made.push((part, gradients, report)),
            }
            Ok(())
        };
        self.each_gradient(at, parts, of, (scale, beside), &mut take)?;
        Ok(made)
    }

    fn with_logp(&mut self, column: &str, at: &Theta, parts: &[(u32, Arc<Layout>)]) -> Result<Vec<(u32, Arc<Layout>)>> {
        // A pass of its own: lanes beside it need not wait.
        self.company.inspect(Company::leave);
        let found = groups(parts, self.rows_per_pass).map(|group| {
            let layouts: Vec<Arc<Layout>> = group.iter().map(|(_, layout)| Arc::clone(layout)).collect();
            let (with, times) = self.shared.model.with_logp(column, at, None, &layouts)?;
            self.spent.passes += times;
            Ok(group.iter().map(|(part, _)| *part).zip(with).collect::<Vec<_>>())
        });
        let found: Result<Vec<_>> = found.collect();
        self.company.inspect(Company::enter);
        Ok(found?.into_iter().flatten().collect())
    }

    fn owns(&self, part: u32) -> bool {
        owns(self.collective.rank(), self.collective.size(), part)
    }

    fn objective(&self) -> Arc<dyn Objective> {
        Arc::clone(&self.shared.objective)
    }

    fn wanted(&self) -> Vec<TensorId> {
        self.shared.specs.keys().cloned().collect()
    }

    fn reduce(&mut self, parts: Vec<(u32, Grads, LossReport)>) -> Result<(Grads, LossReport)> {
        self.added_up(parts)
    }

    fn update(&mut self, gradients: Grads) -> Result<f64> {
        self.updated(&gradients, &BTreeSet::new())
    }

    fn update_but(&mut self, gradients: Grads, resting: &BTreeSet<TensorId>) -> Result<f64> {
        self.updated(&gradients, resting)
    }

    fn weight(&self, site: &str) -> Result<Tensor> {
        let base = self.shared.model.base();
        base.tensor(&base.tensor_name(site, "weight"), DType::F32)
    }

    fn update_by(&mut self, batch: &Batch) -> Result<(f64, LossReport)> {
        let (gradients, loss) = self.added_up_for_update(batch)?;
        Ok((self.updated(&gradients, &BTreeSet::new())?, loss))
    }

    fn gather(&mut self, mine: Vec<(u32, Tensors)>) -> Result<Vec<(u32, Tensors)>> {
        let messages = mine.into_iter().map(|(number, said)| (number, Message::Said(said))).collect();
        let said = |(number, message)| match message {
            Message::Said(said) => Ok((number, said)),
            _ => Err(Error::Refused("a rank sent something else where a word of its step rule was due".to_owned())),
        };
        self.exchange(messages)?.into_iter().map(said).collect()
    }

    fn renew(&mut self, tensor: &TensorId, entries: &[Renewed]) -> Result<()> {
        self.renewed(tensor, entries)
    }

    fn hidden(&self) -> usize {
        self.shared.model.base().architecture().hidden
    }

    fn rng(&self, purpose: &'static str) -> Rng {
        Rng::new(self.shared.seed, purpose).sub(self.step.0)
    }
}

/// The parameters of a slot that trains or not, for export.
pub(crate) fn params(theta: &Theta, slot: usize) -> Option<&Params> {
    theta.banks.get(slot)?.sets.first().map(|set| &**set)
}

//! The loop of a run: rehearse, evaluate, step, save, write the results.

mod gate;
mod kept;
mod told;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use attune_collective::local;
use attune_data::Packing;
use attune_data::loader::largest;
use attune_models::pass::Stopwatch;
use attune_points::engine::{Engine, LossReport};
use attune_points::mixing::Feedback;
use attune_points::{Owner, TensorId, TensorName, View};
use attune_spec::id::{Step, Tokens};
use attune_spec::job::plan::ROWS_PER_PASS;

use crate::agreement::{self, Waits};
use crate::answers::{self, Judged};
use crate::checkpoint::{self, Measured, State};
use crate::control::Control;
use crate::engine::{Message, RankEngine, Wishes, empty_buffers};
use crate::error::Error;
use crate::evaluate;
use crate::gang::{self, Gang, Ranks};
use crate::guard::{self, Guard};
use crate::kernel;
use crate::output;
use crate::protocol::{Event, FailureClass, Metric, Phase, Request, Summary};
use crate::resident;
use crate::setup::{self, Bases, Prepared};
use crate::spent::{Spent, where_time_went};
use crate::together::{Company, Purpose};
use crate::trained;

/// How long a rank waits for the others in one exchange. A rank that dies ends the others at once; this is for one that
/// hangs.
const EXCHANGE_DEADLINE: Duration = Duration::from_secs(600);

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub enum End {
    /// It is done, and its outputs are announced.
    Finished(Summary),
    /// It was asked to stop, and its last checkpoint is announced unless it was asked to leave.
    Stopped(Step),
}

/// Runs a request to its end.
///
/// # Errors
/// [`Error`], by whose class the caller knows what can be done.
pub fn run(request: &Request, control: &dyn Control) -> Result<End, Error> {
    run_over(&Bases::default(), None, request, control)
}

/// Runs a request to its end, over a base that other runs of this process may use as well, and in their company.
pub(crate) fn run_over(
    bases: &Bases,
    company: Option<Company<'_>>,
    request: &Request,
    control: &dyn Control,
) -> Result<End, Error> {
    check_ranks(request)?;
    // Before anything that takes time: whoever is missing is known at once, and nobody is taken for dead while it reads.
    let wire = match &request.seat {
        None => None,
        Some(seat) => match gang::join(seat, request.card, control)? {
            Some(wire) => Some(wire),
            None => {
                // Nothing was done: what it would have gone on from stands.
                control.emit(Event::Stopped { step: Step(0) });
                return Ok(End::Stopped(Step(0)));
            }
        },
    };
    let prepared = setup::prepare(request, control, bases, company.map_or(0, |company| company.largest_pass))?;
    let resumed = match &request.resume {
        Some(folder) => Some(checkpoint::load_state(folder, prepared.plan_digest, &prepared.pinned)?),
        None => None,
    };
    let profile = kernel::profile_of(prepared.shared.model.base().arena().kernels());
    let gang = |wire| Gang::new(wire, &prepared.shared.specs, request, (prepared.plan_digest, profile));
    let gang = wire.map(gang).transpose()?;
    let threads = |outer| {
        let group = local::group_within::<Message>(request.ranks, EXCHANGE_DEADLINE, outer);
        group.into_iter().map(|rank| Box::new(rank) as Box<dyn Ranks>).collect()
    };
    let ranks: Vec<Box<dyn Ranks>> = match gang {
        Some(gang) if request.ranks == 1 => vec![Box::new(gang)],
        Some(gang) => threads(Some(Box::new(gang))),
        None => threads(None),
    };
    let mut ends: Vec<Result<Option<End>, Error>> = std::thread::scope(|scope| {
        let threads: Vec<_> = ranks
            .into_iter()
            .map(|rank| {
                let (prepared, resumed) = (&prepared, resumed.clone());
                scope.spawn(move || Rank::new(request, prepared, control, rank, resumed, company)?.run())
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| Err(Error::Panic(words(&*panic)))))
            .collect()
    });
    // The first error that is not "another rank is gone" is the cause.
    if let Some(index) = ends.iter().position(|end| matches!(end, Err(error) if !is_echo(error))) {
        return ends.swap_remove(index).map(|_| unreachable!("an error was found"));
    }
    let ends = ends.into_iter().collect::<Result<Vec<_>, _>>()?;
    ends.into_iter().flatten().next().ok_or_else(|| Error::Panic("no rank reported the end".to_owned()))
}

fn check_ranks(request: &Request) -> Result<(), Error> {
    let (shards, ranks) = (request.plan.logical_shards, request.all_ranks());
    if ranks == 0 || !shards.is_multiple_of(ranks) {
        let message = format!("makes {ranks} ranks, which do not divide the {shards} logical shards");
        return Err(Error::Faults(vec![attune_spec::Fault::new("resources.devices_per_worker", message)]));
    }
    Ok(())
}

/// Whether an error only says that another rank has failed.
fn is_echo(error: &Error) -> bool {
    error.class() == FailureClass::LostRank
}

/// What a panic said.
pub(crate) fn words(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".to_owned())
}

/// One rank of a run.
struct Rank<'a> {
    request: &'a Request,
    prepared: &'a Prepared,
    control: &'a dyn Control,
    engine: RankEngine<'a>,
    rule: Box<dyn attune_points::engine::StepRule>,
    tokens: Tokens,
    validation: Vec<Measured>,
    kernel_profiles: Vec<String>,
    watch: Stopwatch,
    /// Tokens of this attempt's steps, and the time that they took.
    speed: (u64, Duration),
    /// Where that time went.
    spent: Spent,
    /// Whether the last thing done was a step: all ranks begin the next one at once then.
    is_settled: bool,
    /// The rank that was last said to hold the others up.
    straggler: Option<u32>,
}

impl<'a> Rank<'a> {
    fn new(
        request: &'a Request,
        prepared: &'a Prepared,
        control: &'a dyn Control,
        mut rank: Box<dyn Ranks>,
        resumed: Option<State>,
        company: Option<Company<'a>>,
    ) -> Result<Self, Error> {
        let shared = &prepared.shared;
        let profile = kernel::profile_of(shared.model.base().arena().kernels());
        let mut engine = RankEngine {
            shared,
            loader: setup::loader(&request.plan, prepared.domains.clone(), prepared.packing.clone())?,
            buffers: {
                let has = |id: &TensorId| rank.gang().is_none_or(|gang| gang.has(id));
                empty_buffers(&*shared.optimizer, &shared.specs, has)
            },
            collective: rank,
            theta: prepared.theta.clone(),
            guard: Guard::default(),
            rows_per_pass: ROWS_PER_PASS as usize,
            spent: Spent::default(),
            judged: Judged::default(),
            purpose: Purpose::default(),
            company,
            step: Step(0),
            scheduled: (Step(0), shared.total_steps),
            wishes: Wishes::default(),
            agreed: Wishes::default(),
            witnessed: [0; 32],
            waits: Waits::default(),
        };
        let mut made = Self {
            request,
            prepared,
            control,
            rule: {
                let mut rule = trained::step_rule(&request.plan, shared.total_steps, &shared.model)?;
                if let (Some(_), Some(folder)) = (&resumed, &request.resume) {
                    let state = checkpoint::load_rule(folder)?;
                    let restored = rule.restore(state, &prepared.theta);
                    restored.map_err(|error| checkpoint::wrong(folder, format!("the step rule's state: {error}")))?;
                }
                rule
            },
            tokens: Tokens(0),
            validation: Vec::new(),
            kernel_profiles: vec![profile.clone()],
            watch: Stopwatch::start(),
            speed: (0, Duration::ZERO),
            spent: Spent::default(),
            is_settled: false,
            straggler: None,
            engine: {
                if let (Some(state), Some(folder)) = (&resumed, &request.resume) {
                    kept::restore(&mut engine, state, folder)?;
                }
                engine
            },
        };
        if let Some(state) = resumed {
            made.tokens = state.tokens;
            made.validation = state.validation;
            made.kernel_profiles = state.kernel_profiles;
            if made.kernel_profiles.last() != Some(&profile) {
                made.kernel_profiles.push(profile);
            }
        }
        Ok(made)
    }

    /// Whether it writes for all ranks.
    fn leads(&self) -> bool {
        self.engine.collective.rank() == 0
    }

    /// Whether it speaks for its process.
    fn speaks(&self) -> bool {
        self.engine.collective.rank().is_multiple_of(self.request.ranks)
    }

    fn emit(&self, event: Event) {
        if self.speaks() {
            self.control.emit(event);
        }
    }

    /// Runs to the end. The leading rank returns it.
    fn run(mut self) -> Result<Option<End>, Error> {
        output::check(self.request, self.prepared, &self.engine.theta)?;
        // From here to its outputs it computes; what it reads and writes before and after holds up nobody.
        self.engine.company.inspect(Company::enter);
        self.rehearse()?;
        let total = self.prepared.shared.total_steps;
        if self.validation.is_empty() {
            self.emit(Event::Starting { phase: Phase::Evaluation });
            self.measure()?;
        }
        self.emit(Event::Running {
            step: self.engine.step,
            total_steps: total,
            kernel_profile: self.kernel_profiles.join(", "),
            pinned: self.prepared.pinned.clone(),
        });
        while self.engine.step < total {
            let leaves = self.control.leave_requested();
            if leaves && self.engine.collective.size() == 1 {
                self.emit(Event::Stopped { step: self.engine.step });
                return Ok(Some(End::Stopped(self.engine.step)));
            }
            // Several ranks leave together, like those that stop.
            self.engine.wishes = Wishes {
                stop: self.leads() && (leaves || self.control.stop_requested()),
                checkpoint: self.leads() && self.control.take_checkpoint_request(),
            };
            self.step()?;
            let (done, plan) = (self.engine.step, &self.request.plan);
            let due = |every: Option<u64>| every.is_some_and(|every| done.0.is_multiple_of(every));
            let agreed = self.engine.agreed;
            let is_kept = agreed.stop || agreed.checkpoint || due(plan.checkpoint_every) || done == total;
            if is_kept || due(Some(agreement::EVERY)) {
                let waits = self.engine.agree()?;
                self.tell_waits(&waits);
            }
            if due(plan.evaluate_every) && done < total {
                fail::fail_point!("trainer::before_evaluation", |_| std::process::abort());
                self.measure()?;
                self.is_settled = false;
            }
            if agreed.stop && done < total {
                // One that leaves is alone, or all would have to know.
                if self.engine.collective.size() > 1 || !self.control.leave_requested() {
                    self.save()?;
                }
                self.emit(Event::Stopped { step: done });
                return Ok(self.speaks().then_some(End::Stopped(done)));
            }
            if (due(plan.checkpoint_every) || agreed.checkpoint) && done < total {
                self.save()?;
                self.is_settled = false;
            }
        }
        if self.validation.last().is_none_or(|last| last.step != total) {
            self.measure()?;
        }
        // What is let through is for all ranks to know: they measured the same.
        gate::pass(&self.request.plan.gate, self.validation.first(), self.validation.last()).map_err(Error::Gate)?;
        self.finish()
    }

    /// Runs the largest pass that can occur, forward and, if steps take gradients, backward, and writes a checkpoint, so that a lack of memory shows
    /// now. Nothing of it is kept. Where the kernels can, it is made without products, in a fraction of a step's time.
    fn rehearse(&mut self) -> Result<(), Error> {
        // While nothing else runs yet.
        self.gemm_peak();
        self.emit(Event::Starting { phase: Phase::Rehearsal });
        let views = self.prepared.domains.first().map_or_else(|| vec![View::Main], |domain| domain.data.views());
        let layout = answers::unjudged(largest(&self.prepared.packing, &views))?;
        let layout = Arc::new(layout.with_copies(self.rule.copies()));
        let Packing { logical_shards, accumulation, .. } = self.prepared.packing;
        let micro_batches = logical_shards / self.request.all_ranks() * accumulation;
        // What holds a micro-batch several times goes through by itself.
        let takes_gradients = self.rule.takes_gradients();
        let most = match self.rule.copies() {
            // Nor does it go alone where losses at several parameters are found side by side.
            1 if !takes_gradients => self.engine.rows_per_pass,
            1 => micro_batches as usize,
            _ => 1,
        };
        let at_once = (self.engine.rows_per_pass / layout.n_rows().max(1)).clamp(1, most);
        // Each rank has numbers of its own: an objective that sees the whole step has them all put together.
        let first = self.engine.collective.rank() * at_once as u32;
        let parts: Vec<_> = (first..).take(at_once).map(|part| (part, Arc::clone(&layout))).collect();
        let (mut theta, objective) = (self.engine.theta.clone(), self.engine.objective());
        self.engine.shared.turns.bind(&mut theta, Some(self.engine.step));
        let base = self.engine.shared.model.base();
        // Where rows of nothing but zeros go in a mixture of experts says little of where others will.
        let is_hollow = base.architecture().experts.is_none() && base.arena().without_products().is_some();
        self.engine.purpose = if is_hollow { Purpose::Memory } else { Purpose::Numbers };
        let reports: Vec<LossReport> = if takes_gradients {
            let found = self.engine.grads(&theta, &parts, &*objective, 1.0)?;
            found.into_iter().map(|(_, _, report)| report).collect()
        } else {
            self.engine.scores(&[theta], &parts, &*objective)?
        };
        self.engine.purpose = Purpose::Numbers;
        for report in reports.iter().filter(|_| !is_hollow) {
            self.finite("loss of the rehearsal", report.loss_sum)?;
        }
        let folder = self.request.work.join("rehearsal");
        self.write(&folder)?;
        if self.leads() {
            std::fs::remove_dir_all(&folder).map_err(Error::io(folder))?;
        }
        Ok(())
    }

    /// Refuses a measured number that is none. Before the first step it is the base that is at fault.
    fn finite(&self, what: &str, number: f64) -> Result<(), Error> {
        if number.is_finite() {
            return Ok(());
        }
        let step = self.engine.step;
        if step == Step(0)
            && let Some(name) = guard::not_finite(self.engine.shared.model.base())?
        {
            let message = format!("tensor {name} holds a value that is not finite");
            return Err(Error::Input { input: self.prepared.base_folder.display().to_string(), message });
        }
        let tensor = TensorId { owner: Owner::Base, name: TensorName::new("", what) };
        Err(attune_points::Error::NotFinite { what: "value", tensor, step: step.0 }.into())
    }

    fn step(&mut self) -> Result<(), Error> {
        let before = self.watch.elapsed();
        self.engine.spent = Spent::default();
        self.engine.scheduled = self.rule.scheduled(self.engine.step, self.engine.shared.total_steps);
        let lr = self.engine.lr();
        let report = self.rule.step(self.engine.step, &mut self.engine)?;
        self.engine.step = self.engine.step.next();
        self.finite("loss", report.loss.loss_sum)?;
        self.tokens = Tokens(self.tokens.0 + report.n_rows);
        self.engine.loader.hear(Feedback::of(&report.loss));
        fail::fail_point!("trainer::after_step");
        let took = self.watch.elapsed() - before;
        self.engine.count_waits(took, std::mem::replace(&mut self.is_settled, true));
        self.speed = (self.speed.0 + report.n_rows, self.speed.1 + took);
        self.spent += self.engine.spent;
        self.report(&report, lr, took);
        Ok(())
    }

    /// Measures the validation loss and keeps it.
    fn measure(&mut self) -> Result<(), Error> {
        let evaluate::Found { loss, accuracy } = evaluate::validation(&mut self.engine)?;
        for (set, loss) in &loss {
            self.finite(&format!("validation loss of {set}"), *loss)?;
        }
        let step = self.engine.step;
        let metrics = loss
            .iter()
            .map(|(set, loss)| Metric { name: format!("eval/{set}/loss"), value: *loss })
            .chain(accuracy.iter().map(|(set, share)| Metric { name: format!("eval/{set}/accuracy"), value: *share }))
            .collect::<Vec<_>>();
        if !metrics.is_empty() {
            self.emit(Event::Metrics { step, tokens: self.tokens, metrics });
        }
        self.validation.push(Measured { step, loss, accuracy });
        Ok(())
    }

    fn finish(self) -> Result<Option<End>, Error> {
        if !self.speaks() {
            return Ok(None);
        }
        self.engine.company.inspect(Company::leave);
        fail::fail_point!("trainer::before_outputs");
        if self.leads() {
            let (state, found) = (self.state(), self.rule.found());
            for output in output::write(self.request, self.prepared, &self.engine.theta, &state, found.as_ref())? {
                let output::Output { role, kind, folder } = output;
                self.emit(Event::Output { role, kind, folder, peak_memory_bytes: resident::peak_bytes() });
            }
        }
        if let Some(message) = where_time_went(&self.spent, self.speed.1) {
            let percent = 100.0 * self.utilisation(self.spent.flops, self.speed.1);
            let message = format!("{message}; model FLOP utilisation {percent:.0} % of the fastest product here");
            self.emit(Event::Note { topic: "time".to_owned(), message });
        }
        let ends = (self.validation.first(), self.validation.last());
        for message in checkpoint::accuracies(ends) {
            self.emit(Event::Note { topic: "accuracy".to_owned(), message });
        }
        let losses = |measured: Option<&Measured>| measured.map(|measured| measured.loss.clone()).unwrap_or_default();
        let summary = Summary {
            steps: self.engine.step,
            tokens: self.tokens,
            trained_parameters: self.prepared.shared.trained_parameters(),
            tokens_per_second: self.speed.0 as f64 / self.speed.1.as_secs_f64().max(1e-9),
            peak_memory_bytes: resident::peak_bytes(),
            before: losses(self.validation.first()),
            after: losses(self.validation.last()),
        };
        self.emit(Event::Finished { summary: summary.clone() });
        Ok(Some(End::Finished(summary)))
    }
}

/// Losses before and after, by set: what most callers want of a summary.
pub fn change(summary: &Summary) -> BTreeMap<String, (f64, f64)> {
    let after = |set: &String| summary.after.get(set).copied();
    summary.before.iter().filter_map(|(set, before)| Some((set.clone(), (*before, after(set)?)))).collect()
}

#[cfg(test)]
mod tests {
    use attune_points::{Grads, TensorSpec};
    use candle_core::{DType, Device, Tensor};

    use super::*;
    use crate::control::Quiet;
    use crate::protocol::FailureClass;
    use crate::support::Small;

    /// The one rank of a run of the small job, with something done to it before it starts.
    fn with_rank<T>(plant: impl FnOnce(&mut Prepared), then: impl FnOnce(Rank<'_>) -> T) -> T {
        let small = Small::new();
        let (request, _work) = small.request(small.plan(&[]), 1, None);
        let mut prepared = setup::prepare(&request, &Quiet, &Bases::default(), 0).unwrap();
        plant(&mut prepared);
        let rank = local::group::<Message>(1, EXCHANGE_DEADLINE).pop().unwrap();
        then(Rank::new(&request, &prepared, &Quiet, Box::new(rank), None, None).unwrap())
    }

    fn failure(plant: impl FnOnce(&mut Prepared)) -> (FailureClass, String) {
        let error = with_rank(plant, |rank| rank.run()).unwrap_err();
        (error.class(), error.to_string())
    }

    fn ghost() -> TensorId {
        TensorId {
            owner: Owner::Bank { slot: 0, set: 0 },
            name: TensorName::new("model.layers.1.mlp.up_proj", "lora_C"),
        }
    }

    /// A tensor beside the component's own, which no graph reads.
    fn plant_ghost(prepared: &mut Prepared) {
        prepared.shared.specs.insert(ghost(), TensorSpec::trained("lora_C", [3]));
        let params = Arc::make_mut(&mut prepared.theta.banks[0].sets[0]);
        params.insert(ghost().name, Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap());
    }

    #[test]
    fn a_trained_tensor_that_no_pass_writes_ends_the_run_and_is_named() {
        let (class, message) = failure(plant_ghost);
        assert_eq!(class, FailureClass::NoGradient);
        assert!(message.contains("model.layers.1.mlp.up_proj.lora_C"), "{message}");
    }

    #[test]
    fn a_trained_value_that_is_not_finite_ends_the_run_with_its_first_loss() {
        let name = TensorName::new("model.layers.1.mlp.up_proj", "lora_A");
        let (class, message) = failure(|prepared| {
            let params = Arc::make_mut(&mut prepared.theta.banks[0].sets[0]);
            let like = params.get(&name).unwrap().clone();
            params.insert(name.clone(), Tensor::full(f32::NAN, like.shape(), &Device::Cpu).unwrap());
        });
        assert_eq!(class, FailureClass::NotFinite);
        assert!(message.contains("is not finite at step 0"), "{message}");
    }

    #[test]
    fn a_gradient_that_is_not_finite_names_its_tensor() {
        let id = TensorId { name: TensorName::new("model.layers.0.mlp.up_proj", "lora_A"), ..ghost() };
        let error = with_rank(
            |_| {},
            |mut rank| {
                let mut gradients = Grads::wanting(rank.engine.wanted());
                for wanted in rank.engine.wanted() {
                    let value = if wanted == id { f32::INFINITY } else { 1.0 };
                    let like = rank.engine.theta.get(&wanted).unwrap();
                    let gradient = Tensor::full(value, like.shape(), &Device::Cpu).unwrap();
                    attune_points::GradSink::put(&mut gradients, &wanted, &gradient).unwrap();
                }
                rank.engine.update(gradients).unwrap_err()
            },
        );
        let message = error.to_string();
        assert!(
            message.starts_with("gradient of model.layers.0.mlp.up_proj.lora_A is not finite at step 1"),
            "{message}"
        );
    }

    /// All files of a checkpoint.
    fn everything(rank: &mut Rank<'_>) -> [Vec<u8>; 3] {
        let folder = tempfile::tempdir().unwrap();
        rank.write(folder.path()).unwrap();
        let files = ["state.json", "values.safetensors", "optimizer.safetensors"];
        files.map(|file| std::fs::read(folder.path().join(file)).unwrap())
    }

    #[test]
    fn how_many_micro_batches_a_pass_takes_changes_no_bit() {
        let after_two_steps = |rows: usize| {
            let steps = |mut rank: Rank<'_>| {
                rank.engine.rows_per_pass = rows;
                rank.measure().unwrap();
                rank.step().unwrap();
                rank.step().unwrap();
                // The state names the folder of this one run.
                let [_, values, buffers] = everything(&mut rank);
                (values, buffers, rank.validation)
            };
            with_rank(|_| {}, steps)
        };
        let one = after_two_steps(1);
        assert!([40, 100, 100_000].map(after_two_steps).iter().all(|several| *several == one));
    }

    #[test]
    fn after_the_rehearsal_no_step_needs_another_buffer() {
        with_rank(
            |_| {},
            |mut rank| {
                rank.rehearse().unwrap();
                let arena = rank.engine.shared.model.arena().clone();
                let (rehearsed, like) = (arena.idle_bytes(), arena.without_products().is_some());
                assert!(rehearsed > 0 && like, "the processor rehearses without products");
                (0..3).for_each(|_| rank.step().unwrap());
                assert_eq!(arena.idle_bytes(), rehearsed);
            },
        );
    }

    #[test]
    fn the_rehearsal_changes_no_bit() {
        with_rank(
            |_| {},
            |mut rank| {
                rank.step().unwrap();
                let before = everything(&mut rank);
                rank.rehearse().unwrap();
                assert!(everything(&mut rank) == before);
                rank.step().unwrap();
                assert!(everything(&mut rank) != before, "what is compared holds the state of a step");
            },
        );
    }
}

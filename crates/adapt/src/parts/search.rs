//! Steps without gradients: some of a component's tensors are searched for, one of them a step in turn, each by a search of its own.

use attune_points::engine::{Batch, Engine, StepReport, Tensors};
use attune_points::{Error, Result, TensorId, Theta};
use attune_spec::id::Step;
use attune_tensor::cma_es::CmaEs;
use candle_core::{Device, Tensor};

use crate::parts::anew::held;

/// The name of the number of passes in a state.
const CALLS: &str = "calls";

/// Searches that take turns. A tensor is what the best candidate of all was: one that is better than it, on the data of the turn, takes
/// its place, and all others stay.
pub(crate) struct Turns {
    sought: Vec<Sought>,
    /// Passes over a step's data so far.
    calls: u64,
}

/// A tensor that is searched for.
struct Sought {
    id: TensorId,
    search: CmaEs,
    /// What the loss was when it last had its turn, at the best candidate; none before.
    best: Option<f64>,
}

impl Turns {
    /// Searches for these tensors of so many numbers each, `step` far from where they start by `population` candidates a turn.
    ///
    /// # Errors
    /// Nothing to search for, or with.
    pub(crate) fn new(
        tensors: impl IntoIterator<Item = TensorId>,
        numbers: usize,
        step: f64,
        population: usize,
    ) -> Result<Self> {
        let sought = tensors
            .into_iter()
            .map(|id| Ok(Sought { id, search: CmaEs::new(vec![0.0; numbers], step, population)?, best: None }));
        let sought = sought.collect::<Result<Vec<_>>>()?;
        match sought.is_empty() {
            true => Err(Error::Refused("there is nothing to search for".to_owned())),
            false => Ok(Self { sought, calls: 0 }),
        }
    }

    /// Passes over a step's data so far.
    pub(crate) const fn calls(&self) -> u64 {
        self.calls
    }

    /// Counts a pass that was made beside the turns.
    pub(crate) const fn count(&mut self) {
        self.calls += 1;
    }

    /// One generation of the search whose turn it is: a pass at what is there, and one for each candidate.
    ///
    /// # Errors
    /// Whatever the engine raises; a search that is lost.
    pub(crate) fn turn(&mut self, step: Step, engine: &mut dyn Engine, batch: &Batch) -> Result<StepReport> {
        let at = (step.0 % self.sought.len() as u64) as usize;
        let Sought { id, search, best } = &mut self.sought[at];
        let now = engine.theta().clone();
        let held = held(&now, id)?;
        if search.generation() == 0 {
            // What is there already, where a component goes on from what was found before, is where its search begins.
            let start = held.flatten_all()?.to_vec1::<f32>()?;
            *search = CmaEs::new(start.into_iter().map(f64::from).collect(), search.step(), search.population())?;
        }
        let mut asked = search.ask(&mut engine.rng("search"));
        let mut thetas = vec![now.clone()];
        for candidate in &mut asked {
            // The search is told of what was tried, and that has 32 bits.
            let tried: Vec<f32> = candidate.iter().map(|number| *number as f32).collect();
            candidate.iter_mut().zip(&tried).for_each(|(number, tried)| *number = f64::from(*tried));
            let mut theta = now.clone();
            theta.put(id, Tensor::from_vec(tried, held.shape(), &Device::Cpu)?);
            thetas.push(theta);
        }
        let objective = engine.objective();
        let reports = engine.scores(&thetas, &batch.parts, &*objective)?;
        self.calls += thetas.len() as u64;
        let denominator = objective.denominator().of(batch.counts);
        let losses: Vec<f64> = reports.iter().map(|report| report.loss_sum / denominator).collect();
        search.tell(&asked, &losses[1..])?;
        // What is there stays unless something is less; what is no number is not.
        let kept = (1..losses.len()).fold(0, |kept, at| if losses[at] < losses[kept] { at } else { kept });
        if kept > 0 {
            engine.set(thetas.swap_remove(kept));
        }
        *best = Some(losses[kept]);
        let site = id.name.owner();
        let metrics = vec![
            (format!("best/{site}"), losses[kept]),
            (format!("reach/{site}"), search.step()),
            (CALLS.to_owned(), self.calls as f64),
        ];
        let n_rows = batch.n_rows * losses.len() as u64;
        Ok(StepReport { loss: reports[kept].clone(), n_rows, metrics, ..StepReport::default() })
    }

    /// Everything that they go on from. Numbers of 64 bits are kept as their bits.
    pub(crate) fn state(&self) -> Tensors {
        let of = |Sought { id, search, best }: &Sought| {
            let numbers = best.iter().copied().chain(search.numbers());
            (id.to_string(), numbers.map(|number| number.to_bits().cast_signed()).collect::<Vec<i64>>())
        };
        let calls = (CALLS.to_owned(), vec![self.calls.cast_signed()]);
        let all = std::iter::once(calls).chain(self.sought.iter().map(of));
        all.filter_map(|(name, bits)| Some((name, Tensor::new(bits, &Device::Cpu).ok()?))).collect()
    }

    /// Goes on from a state.
    ///
    /// # Errors
    /// One of other searches.
    pub(crate) fn restore(&mut self, mut state: Tensors, theta: &Theta) -> Result<()> {
        let refused = |message: String| Err(Error::Refused(message));
        let mut take = |name: &str| {
            let found = state.remove(name).ok_or_else(|| Error::Refused(format!("lacks {name:?}")))?;
            Ok::<_, Error>(found.flatten_all()?.to_vec1::<i64>()?)
        };
        let calls = take(CALLS)?;
        let [calls] = calls.as_slice() else { return refused(format!("has {} numbers of calls", calls.len())) };
        self.calls = calls.cast_unsigned();
        for Sought { id, search, best } in &mut self.sought {
            if theta.get(id).is_none() {
                return refused(format!("has {id}, which is not among the parameters"));
            }
            let numbers: Vec<f64> =
                take(&id.to_string())?.into_iter().map(|bits| f64::from_bits(bits.cast_unsigned())).collect();
            // Before its first turn nothing was best.
            let had_turn = numbers.len() > search.numbers().len();
            *best = numbers.first().copied().filter(|_| had_turn);
            search.restore(&numbers[usize::from(had_turn)..])?;
        }
        state.keys().next().map_or(Ok(()), |name| refused(format!("has {name:?}, which is not searched for")))
    }
}

//! A search, once everything has trained, for what is left of a component of many sizes: what nothing beats in both the validation loss and the
//! numbers that it takes.

use attune_points::engine::{Engine, Source, Tensors};
use attune_points::{Error, Result, Theta};
use attune_tensor::nsga2::{Genome, Nsga2};
use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};

use crate::parts::elastic::Elastic;

/// How it is searched.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Search {
    /// Choices that are tried, all in all.
    pub(crate) evaluations: usize,
    /// How many of them are tried at a time.
    pub(crate) population: usize,
    /// What is chosen has at most this share of the numbers of the largest choice.
    pub(crate) most: f64,
}

/// A choice for each group of pairs and each MLP, with what came of it.
#[derive(Debug, Clone, PartialEq)]
struct Choice {
    /// The number, among all ranks or widths, of what each has.
    genome: Genome,
    loss: f32,
    numbers: i64,
}

/// What was found.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Found {
    evaluations: i64,
    /// What nothing beats, the smallest loss first.
    front: Vec<Choice>,
    /// The number of the one that is left among these.
    chosen: usize,
}

impl Found {
    /// The choice that is left.
    pub(crate) fn chosen(&self) -> Result<&Genome> {
        let chosen = self.front.get(self.chosen).map(|choice| &choice.genome);
        chosen.ok_or_else(|| Error::Refused("a search found nothing: no validation loss is a number".to_owned()))
    }

    /// For people and programs.
    pub(crate) fn told(&self, of: &Elastic) -> Value {
        let choice = |choice: &Choice| {
            let (ranks, widths) = of.sizes(&choice.genome);
            let ranks: serde_json::Map<String, Value> =
                of.pairs.iter().zip(ranks).map(|(pair, rank)| (pair.site.clone(), rank.into())).collect();
            let widths: serde_json::Map<String, Value> =
                of.mlps.iter().zip(widths).map(|(mlp, width)| (mlp.site.clone(), width.into())).collect();
            json!({"loss": choice.loss, "parameters": choice.numbers, "ranks": ranks, "widths": widths})
        };
        let front: Vec<Value> = self.front.iter().map(choice).collect();
        json!({"evaluations": self.evaluations, "chosen": self.chosen, "front": front})
    }

    /// As a checkpoint keeps it.
    pub(crate) fn tensors(&self) -> Result<Tensors> {
        let genes = self.front.first().map_or(0, |choice| choice.genome.len());
        let of = |numbers: Vec<i64>| Tensor::new(numbers, &Device::Cpu);
        let genomes: Vec<i64> =
            self.front.iter().flat_map(|choice| choice.genome.iter().map(|value| *value as i64)).collect();
        let losses: Vec<f32> = self.front.iter().map(|choice| choice.loss).collect();
        Ok(Tensors::from([
            ("front.genomes".to_owned(), of(genomes)?.reshape((self.front.len(), genes))?),
            ("front.losses".to_owned(), Tensor::new(losses, &Device::Cpu)?),
            ("front.numbers".to_owned(), of(self.front.iter().map(|choice| choice.numbers).collect())?),
            ("searched".to_owned(), of(vec![self.evaluations, self.chosen as i64])?),
        ]))
    }

    /// As it was kept; none of a run that has not searched yet.
    pub(crate) fn kept(mut state: Tensors, of: &Elastic) -> Result<Option<Self>> {
        if state.is_empty() {
            return Ok(None);
        }
        let mut take = |name: &str| state.remove(name).ok_or_else(|| Error::Refused(format!("has no {name:?}")));
        let (genomes, losses, numbers, searched) =
            (take("front.genomes")?, take("front.losses")?, take("front.numbers")?, take("searched")?);
        let other = || Error::Refused("has a search of another component".to_owned());
        let genomes: Vec<Vec<i64>> = genomes.to_vec2()?;
        let (losses, numbers) = (losses.to_dtype(DType::F32)?.to_vec1::<f32>()?, numbers.to_vec1::<i64>()?);
        let &[evaluations, chosen] = searched.to_vec1::<i64>()?.as_slice() else { return Err(other()) };
        let values = of.values();
        let fits = |genome: &Vec<i64>| {
            genome.len() == values.len()
                && genome
                    .iter()
                    .zip(&values)
                    .all(|(value, values)| usize::try_from(*value).is_ok_and(|at| at < *values))
        };
        let chosen = usize::try_from(chosen).ok().filter(|chosen| *chosen < genomes.len()).ok_or_else(other)?;
        if genomes.len() != losses.len() || genomes.len() != numbers.len() || !genomes.iter().all(fits) {
            return Err(other());
        }
        let front = genomes.into_iter().zip(losses.into_iter().zip(numbers)).map(|(genome, (loss, numbers))| Choice {
            genome: genome.into_iter().map(|value| value as usize).collect(),
            loss,
            numbers,
        });
        Ok(Some(Self { evaluations, front: front.collect(), chosen }))
    }
}

impl Search {
    /// Whether there is something to search on.
    ///
    /// # Errors
    /// A job without validation data, by what it lacks.
    pub(crate) fn can(self, engine: &mut dyn Engine) -> Result<()> {
        engine.batch(Source::Validation(0)).map(drop).map_err(|error| {
            Error::Refused(format!(
                "what is left is searched for by its validation loss, and {error}: expected `data.validation`, or another `left`"
            ))
        })
    }

    /// Tries choices at the parameters that are there, on the first validation set. Every rank finds the same.
    ///
    /// # Errors
    /// Whatever a pass raises; losses of which none is a number.
    pub(crate) fn run(self, of: &Elastic, engine: &mut dyn Engine) -> Result<Found> {
        let batch = engine.batch(Source::Validation(0))?;
        let parts: Vec<_> = batch.parts.iter().filter(|(part, _)| engine.owns(*part)).cloned().collect();
        let (objective, rng) = (engine.objective(), engine.rng("subnetworks"));
        let divisor = objective.denominator().of(batch.counts);
        let values = of.values();
        let all_at = |at: fn(usize) -> usize| values.iter().map(|values| at(*values)).collect::<Genome>();
        // The largest, the one in the middle, and the smallest: what is found is never worse than these.
        let first = vec![
            all_at(|_| 0),
            all_at(|values| values.saturating_sub(1) / 2),
            all_at(|values| values.saturating_sub(1)),
        ];
        let mut search = Nsga2::new(values.clone(), self.population, first);
        let mut generation = 0;
        while search.told().len() < self.evaluations {
            let asked = search.ask(self.evaluations - search.told().len(), &rng.sub(generation));
            generation += 1;
            if asked.is_empty() {
                break;
            }
            let theta = engine.theta().clone();
            let at = asked.iter().map(|genome| of.cut(&theta, genome)).collect::<Result<Vec<Theta>>>()?;
            let losses = engine.scores(&at, &parts, &*objective)?;
            // Losses are compared as they are kept.
            let outcome =
                |(genome, loss): (&Genome, f64)| [f64::from((loss / divisor) as f32), of.numbers(genome) as f64];
            let outcomes: Vec<[f64; 2]> =
                asked.iter().zip(losses.iter().map(|report| report.loss_sum)).map(outcome).collect();
            search.tell(&outcomes);
        }
        let front = search.front().into_iter().map(|(genome, outcome)| Choice {
            genome: genome.clone(),
            loss: outcome[0] as f32,
            numbers: of.numbers(genome) as i64,
        });
        let front: Vec<Choice> = front.collect();
        let most = self.most * of.numbers(&all_at(|_| 0)) as f64;
        // The smallest loss comes first, the fewest numbers last.
        let fits = front.iter().position(|choice| choice.numbers as f64 <= most * (1.0 + 1e-9));
        let chosen = fits.unwrap_or_else(|| front.len().saturating_sub(1));
        let found = Found { evaluations: search.told().len() as i64, front, chosen };
        found.chosen()?;
        Ok(found)
    }
}

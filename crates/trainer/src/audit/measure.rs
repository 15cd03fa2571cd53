//! What a trained model makes of texts, and how its weights differ from the base's.

use std::path::{Path, PathBuf};

use attune_architecture::SiteKind;
use attune_data::loader::in_order;
use attune_data::{Dataset, Message};
use attune_models::generate::{Request, generate_all};
use attune_models::{Base, Model, Pass, Stack, stack};
use attune_points::adapter::Merged;
use attune_points::generate::Sampling;
use attune_points::layout::{NO_LABEL, Source};
use attune_points::objective::{ChunkLoss, ChunkView, Denominator, Objective};
use attune_points::{Layout, Row, TensorName, Theta};
use attune_spec::job::Precision;
use candle_core::{DType, Tensor};

use super::Words;
use crate::component;
use crate::error::Error;
use crate::few;

/// Rows of one pass.
const ROWS: usize = 2048;

/// What was trained.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Folder {
    /// A whole model.
    Model(PathBuf),
    /// An adapter on the base.
    Adapter(PathBuf),
}

/// A model with what it computes with.
pub(super) struct Trained {
    model: Model,
    theta: Theta,
}

/// The plain loss of every token that is learned.
struct Loss;

impl Objective for Loss {
    fn denominator(&self) -> Denominator {
        Denominator::Tokens
    }

    fn chunk(&self, chunk: &ChunkView<'_>) -> attune_points::Result<ChunkLoss> {
        Ok(ChunkLoss::CrossEntropy { weight_t: vec![1.0; chunk.rows.len()] })
    }
}

/// The loss of a text's tokens, and how many they are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Scored {
    pub(super) sum: f64,
    pub(super) tokens: f64,
}

impl Trained {
    /// The base, or what was trained of it.
    ///
    /// # Errors
    /// [`Error`] naming the folder or file at fault.
    pub(super) fn open(base: &Path, trained: Option<&Folder>) -> Result<Self, Error> {
        let (base, stack, theta) = match trained {
            None => (Base::open(base, Precision::F32)?, Stack::default(), Theta::default()),
            Some(Folder::Model(folder)) => (Base::open(folder, Precision::F32)?, Stack::default(), Theta::default()),
            Some(Folder::Adapter(folder)) => {
                let opened = few::open_for(base, std::slice::from_ref(folder), Precision::F32)?;
                component::frozen(opened, [folder.as_path()])?
            }
        };
        Ok(Self { model: Model::new(base, stack), theta })
    }

    fn pass<'p>(&'p self, layout: &'p Layout) -> Pass<'p> {
        Pass { theta: &self.theta, layout, dropout: None }
    }

    /// The texts of a set as this model reads them, each alone.
    pub(super) fn texts(&self, data: &Dataset) -> Vec<Layout> {
        in_order(data, 1, &self.model.rows_before(&self.theta))
    }

    /// The loss of each text.
    pub(super) fn losses(&self, texts: &[Layout]) -> Result<Vec<Scored>, Error> {
        let mut losses = Vec::with_capacity(texts.len());
        let mut rest = texts;
        while !rest.is_empty() {
            let mut rows = 0;
            let fits = |text: &&Layout| {
                rows += text.n_rows();
                rows <= ROWS
            };
            let (group, others) = rest.split_at(rest.iter().take_while(fits).count().max(1));
            let passes: Vec<Pass<'_>> = group.iter().map(|text| self.pass(text)).collect();
            let (reports, _) = self.model.score_parts(&passes, &Loss)?;
            losses.extend(
                reports.iter().map(|report| Scored { sum: report.loss_sum, tokens: report.counts.tokens as f64 }),
            );
            rest = others;
        }
        Ok(losses)
    }

    /// `KL(this ‖ base)` of the next token, summed over the tokens of each text that are learned. The other's texts may have other rows
    /// before them.
    pub(super) fn divergences(&self, texts: &[Layout], base: &Self, of_base: &[Layout]) -> Result<Vec<Scored>, Error> {
        let each = texts.iter().zip(of_base).map(|(own, other)| {
            let (p, q) = (self.log_probabilities(own)?, base.log_probabilities(other)?);
            let tokens = p.dim(0)? as f64;
            let sum = (p.exp()? * (&p - q)?)?.sum_all()?.to_scalar::<f64>()?;
            Ok(Scored { sum, tokens })
        });
        each.collect()
    }

    /// Of the rows that are learned, `[T, V]` in 64 bits.
    fn log_probabilities(&self, text: &Layout) -> Result<Tensor, Error> {
        let rows: Vec<u32> =
            (0u32..).zip(text.labels()).filter(|(_, label)| **label != NO_LABEL).map(|(row, _)| row).collect();
        let logits = self.model.logits(&self.pass(text))?.to_dtype(DType::F64)?;
        let rows = Tensor::new(rows, logits.device())?;
        Ok(attune_tensor::ops::log_softmax(&logits.index_select(&rows, 0)?)?)
    }

    /// The number of the option that is likeliest after each prompt; of equals the first.
    pub(super) fn choices(&self, words: &Words<'_>, prompts: &[&str], options: &[String]) -> Result<Vec<usize>, Error> {
        let before = self.model.rows_before(&self.theta);
        let mut texts = Vec::with_capacity(prompts.len() * options.len());
        for prompt in prompts {
            let prompt = words.prompt(prompt)?;
            for option in options {
                let option = words.tokenizer.encode(option, false)?;
                let all: Vec<u32> = prompt.iter().chain(&option).copied().collect();
                let label = |row: usize| all.get(row + 1).copied().filter(|_| row + 1 >= prompt.len());
                let rows = all.iter().enumerate().map(|(row, id)| (Row::Token(*id), label(row).unwrap_or(NO_LABEL)));
                let mut text = Layout::new();
                text.push(Source::default(), rows.collect::<Vec<_>>());
                texts.push(text.begun_with(&before));
            }
        }
        let losses = self.losses(&texts)?;
        let likeliest = |losses: &[Scored]| {
            let best = losses.iter().enumerate().min_by(|(_, a), (_, b)| a.sum.total_cmp(&b.sum));
            best.map_or(0, |(option, _)| option)
        };
        Ok(losses.chunks(options.len().max(1)).map(likeliest).collect())
    }

    /// Several texts after each prompt.
    pub(super) fn said(
        &self,
        words: &Words<'_>,
        prompts: &[&str],
        (each, max_tokens, seed): (u32, u32, u64),
    ) -> Result<Vec<Vec<String>>, Error> {
        let stop = words.tokenizer.stops(words.template);
        let mut all = Vec::with_capacity(prompts.len());
        for (number, prompt) in (0u64..).zip(prompts) {
            let prompt = words.prompt(prompt)?;
            // The same numbers for every model: what differs is the models'.
            let draw = |draw: u32| Sampling {
                temperature: 1.0,
                seed: seed.wrapping_add(number.wrapping_mul(u64::from(each)) + u64::from(draw)),
                max_tokens: max_tokens as usize,
                stop: stop.clone(),
                ..Sampling::default()
            };
            let draws: Vec<Sampling> = (0..each).map(draw).collect();
            let requests: Vec<Request<'_>> =
                draws.iter().map(|sampling| Request { prompt: &prompt, sampling }).collect();
            let made = generate_all(&self.model, &self.theta, &requests, |_, _| true)?;
            let texts =
                made.iter().map(|made| words.tokenizer.decode(&made.tokens, false)).collect::<Result<_, _>>()?;
            all.push(texts);
        }
        Ok(all)
    }

    /// How the weight of each linear differs from the base's, site by site; nothing of a site whose component has no weight that would
    /// do the same.
    pub(super) fn changes(&self, base: &Self) -> Result<Vec<(String, Tensor)>, Error> {
        let (own, other) = (self.model.base(), base.model.base());
        let mut changes = Vec::new();
        for site in own.architecture().sites() {
            let SiteKind::Linear { .. } = site.kind else { continue };
            let name = own.tensor_name(site.id.as_str(), "weight");
            // A head that is tied has the table's weight, which no linear has changed by itself.
            let Some(before) = weight(other, &name)?.filter(|_| name.owner() == site.id.as_str()) else { continue };
            let mut now = own.tensor(&name, DType::F32)?;
            let mut knows = true;
            for (slot, bank) in self.model.stack().slots().iter().zip(&self.theta.banks) {
                let (Some(at), Some(set)) = (slot.at(&site.id), bank.sets.first()) else { continue };
                match slot.adapter().merge(at, &stack::locals(at, set)?, &own.weight(&site))? {
                    Merged::Factors { left, right, scale } => now = (now + (left.matmul(&right)? * scale)?)?,
                    Merged::Weight { weight, .. } => now = weight,
                    _ => knows = false,
                }
            }
            if knows && now.dims() == before.dims() {
                changes.push((site.id.to_string(), (now - before)?));
            }
        }
        Ok(changes)
    }
}

/// A weight of the base, where it has one of this name.
fn weight(base: &Base, name: &TensorName) -> Result<Option<Tensor>, Error> {
    Ok(match base.dtype(name) {
        Some(_) => Some(base.tensor(name, DType::F32)?),
        None => None,
    })
}

impl Words<'_> {
    /// A prompt's tokens: as a user's message where the model has a template, else as it stands.
    fn prompt(&self, prompt: &str) -> Result<Vec<u32>, Error> {
        Ok(match self.template {
            Some(template) => self.tokenizer.encode(&template.prompt(&[Message::new("user", prompt)])?, false)?,
            None => self.tokenizer.encode(prompt, true)?,
        })
    }
}

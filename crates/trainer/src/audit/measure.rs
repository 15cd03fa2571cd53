//! What a trained model makes of texts, and how its weights differ from the base's.

use std::path::{Path, PathBuf};

use attune_architecture::SiteKind;
use attune_data::loader::in_order;
use attune_data::{ChatTemplate, Dataset, Encoder, Message, Reading, Source as Lines, Tokenizer};
use attune_models::generate::{Request, generate_all};
use attune_models::{Base, Model, Pass, Stack, stack};
use attune_points::adapter::Merged;
use attune_points::generate::Sampling;
use attune_points::layout::{NO_LABEL, Source};
use attune_points::objective::{ChunkLoss, ChunkView, Denominator, Objective};
use attune_points::{Layout, Row, TensorName, Theta};
use attune_spec::job::{OnBadRow, Precision};
use candle_core::{DType, Tensor};

use crate::component;
use crate::error::Error;
use crate::few;

/// Rows of one pass.
const ROWS: usize = 2048;
/// Texts that are made side by side.
const AT_ONCE: usize = 16;

/// What was trained.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Folder {
    /// A whole model.
    Model(PathBuf),
    /// An adapter on the base.
    Adapter(PathBuf),
}

/// How prompts become tokens.
pub(super) struct Words<'w> {
    pub(super) tokenizer: &'w Tokenizer,
    pub(super) template: Option<&'w ChatTemplate>,
}

/// Which texts a model is to make of each prompt.
#[derive(Debug, Clone, Copy)]
pub(super) struct Draws {
    /// How many.
    pub(super) each: u32,
    /// The most tokens of one.
    pub(super) max_tokens: u32,
    /// 0 takes the likeliest token each time.
    pub(super) temperature: f64,
    /// What is drawn by.
    pub(super) seed: u64,
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

    /// The loss of each option after each prompt.
    fn options(&self, words: &Words<'_>, prompts: &[&str], options: &[String]) -> Result<Vec<Scored>, Error> {
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
        self.losses(&texts)
    }

    /// The number of the option that is likeliest after each prompt; of equals the first.
    pub(super) fn choices(&self, words: &Words<'_>, prompts: &[&str], options: &[String]) -> Result<Vec<usize>, Error> {
        let losses = self.options(words, prompts, options)?;
        let likeliest = |losses: &[Scored]| {
            let best = losses.iter().enumerate().min_by(|(_, a), (_, b)| a.sum.total_cmp(&b.sum));
            best.map_or(0, |(option, _)| option)
        };
        Ok(losses.chunks(options.len().max(1)).map(likeliest).collect())
    }

    /// How likely each option is after each prompt, of these options: their shares add up to 1.
    pub(super) fn likely(
        &self,
        words: &Words<'_>,
        prompts: &[&str],
        options: &[String],
    ) -> Result<Vec<Vec<f64>>, Error> {
        let losses = self.options(words, prompts, options)?;
        let shares = |losses: &[Scored]| {
            let least = losses.iter().map(|loss| loss.sum).fold(f64::INFINITY, f64::min);
            let weights: Vec<f64> = losses.iter().map(|loss| (least - loss.sum).exp()).collect();
            let all: f64 = weights.iter().sum();
            weights.into_iter().map(|weight| weight / all).collect()
        };
        Ok(losses.chunks(options.len().max(1)).map(shares).collect())
    }

    /// Several texts after each prompt.
    pub(super) fn said(&self, words: &Words<'_>, prompts: &[&str], draws: Draws) -> Result<Vec<Vec<String>>, Error> {
        let stop = words.tokenizer.stops(words.template);
        let prompts = prompts.iter().map(|prompt| words.prompt(prompt)).collect::<Result<Vec<_>, _>>()?;
        // The same numbers for every model: what differs is the models'.
        let sampling = |seed: u64| Sampling {
            temperature: draws.temperature,
            seed: draws.seed.wrapping_add(seed),
            max_tokens: draws.max_tokens as usize,
            stop: stop.clone(),
            ..Sampling::default()
        };
        let samplings: Vec<Sampling> = (0..).take(prompts.len() * draws.each as usize).map(sampling).collect();
        let each_prompt = prompts.iter().flat_map(|prompt| std::iter::repeat_n(prompt, draws.each as usize));
        let requests: Vec<Request<'_>> =
            each_prompt.zip(&samplings).map(|(prompt, sampling)| Request { prompt, sampling }).collect();
        let mut texts = Vec::with_capacity(requests.len());
        for some in requests.chunks(AT_ONCE) {
            for made in generate_all(&self.model, &self.theta, some, |_, _| true)? {
                texts.push(words.tokenizer.decode(&made.tokens, false)?);
            }
        }
        Ok(texts.chunks(draws.each.max(1) as usize).map(<[String]>::to_vec).collect())
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

/// The texts with what they give in the place of what is learned of them: each token that is not learned, but the first of a document.
pub(super) fn inputs(texts: &[Layout]) -> Vec<Layout> {
    let given = |text: &Layout| {
        let (rows, labels) = (text.rows(), text.labels());
        let mut given = Layout::new();
        for doc in text.docs() {
            let end = doc.rows.end as usize;
            let own = (doc.rows.start as usize..end).map(|at| {
                let next = match (rows[at], rows[..end].get(at + 1)) {
                    (Row::Token(_), Some(Row::Token(next))) if labels[at] == NO_LABEL => *next,
                    _ => NO_LABEL,
                };
                (rows[at], next)
            });
            let source = Source { group: Some(doc.group), ..Source::default() };
            given.push(source, own);
        }
        given
    };
    texts.iter().map(given).collect()
}

/// The texts of a file, the first `rows` of them if that says how many.
///
/// # Errors
/// [`Error`] naming the file and line at fault; a file without texts is one.
pub(super) fn texts(file: &Path, encoder: &Encoder, rows: Option<u64>) -> Result<Dataset, Error> {
    let name = file.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let reading = Reading { form: None, on_bad_row: OnBadRow::Fail, rows };
    let data = Dataset::read(&Lines::cached(file, &name)?, encoder, reading)?;
    if data.is_empty() {
        let message = "has no rows".to_owned();
        return Err(Error::Input { input: file.display().to_string(), message });
    }
    Ok(data)
}

/// The mean over tokens of some texts, or of all.
pub(super) fn mean(of: &[Scored], items: Option<&[usize]>) -> Option<f64> {
    let (mut sum, mut tokens) = (0.0, 0.0);
    let mut add = |scored: &Scored| {
        sum += scored.sum;
        tokens += scored.tokens;
    };
    match items {
        None => of.iter().for_each(&mut add),
        Some(items) => items.iter().for_each(|&item| add(&of[item])),
    }
    (tokens > 0.0).then(|| sum / tokens)
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

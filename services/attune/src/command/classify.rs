//! `attune classify`: asks a model for classes.

use std::io::BufRead as _;

use attune_data::classes::Asked;
use attune_data::{Encoder, Labelled, Tokenizer};
use attune_models::{Model, Pass, export};
use attune_points::Theta;
use attune_spec::job::{HeadSpec, HeadTask, Precision, TooLong};
use attune_trainer::{classes, component, few};
use serde_json::json;

use crate::print::{Failure, Out, note};
use crate::remote::{Place, Server, folders};

/// Asks a model for the classes of texts, or of their words.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Texts that are not named are read from standard input, one a line. Where words have classes, what stands between
white space is a word.

Examples:
  attune classify --base ./base --adapter ./adapter \"Which river runs through Velmora?\"
  attune classify --base ./merged --json < texts.txt"
)]
pub(crate) struct Arguments {
    /// The base: a model folder, or the digest or tag of one that the server has.
    #[arg(long, value_name = "REF")]
    base: Place,
    /// An adapter that was trained under a head over classes: a folder, digest or tag; several apply in order, the first innermost.
    #[arg(long = "adapter", value_name = "REF")]
    adapters: Vec<Place>,
    /// A second text that is looked at together with the one that is named.
    #[arg(long, value_name = "TEXT", requires = "texts")]
    pair: Option<String>,
    /// The texts.
    #[arg(value_name = "TEXT")]
    texts: Vec<String>,
}

pub(super) fn run(arguments: &Arguments, server: &Server, out: &mut Out) -> Result<(), Failure> {
    if arguments.pair.is_some() && arguments.texts.len() != 1 {
        return Err(Failure::usage(format!("--pair is for one text; {} are named", arguments.texts.len())));
    }
    let (base, adapters) = folders(&arguments.base, &arguments.adapters, server)?;
    let weights = few::open_for(&base, &adapters, Precision::F32)?;
    let architecture = weights.architecture();
    let head = match few::head_of(&adapters)? {
        Some(head) => head,
        None => own_head(architecture.head.labels(), &base)?,
    };
    let Some(known) = classes::of(&head, architecture).filter(|known| known.of != Labelled::Queries) else {
        let hint = "give the adapter that was trained under one, or a model that it was merged into";
        let class = architecture.class_name();
        return Err(Failure::usage(format!("{class} has no head over classes")).with_hint(hint));
    };
    let max_length = u32::try_from(architecture.max_position).unwrap_or(u32::MAX);
    let encoder = Encoder::new(Tokenizer::open(&base)?, None, max_length, TooLong::Truncate)?.with_classes(Some(known));
    let folders = adapters.iter().map(std::path::PathBuf::as_path);
    let (weights, stack, theta) = component::frozen(weights, folders)?;
    let judge = Judge { model: Model::new(weights, stack), theta, encoder, names: head.labels };
    if arguments.texts.is_empty() {
        for line in std::io::stdin().lock().lines() {
            judge.tell(&line.map_err(|error| Failure::usage(format!("standard input: {error}")))?, None, out)?;
        }
        return Ok(());
    }
    for text in &arguments.texts {
        judge.tell(text, arguments.pair.as_deref(), out)?;
    }
    Ok(())
}

/// The head that a model folder has by itself, of so many classes, with the names that it gives them.
fn own_head(labels: Option<usize>, base: &std::path::Path) -> Result<HeadSpec, Failure> {
    let labels = labels.unwrap_or_default();
    let named = export::named_classes(base)?;
    let names = if named.len() == labels { named } else { (0..labels).map(|label| label.to_string()).collect() };
    // What has a class the model says.
    Ok(HeadSpec::of_classes(HeadTask::Classification, names))
}

/// A model with a head over classes.
struct Judge {
    model: Model,
    theta: Theta,
    encoder: Encoder,
    names: Vec<String>,
}

impl Judge {
    /// Tells the classes of a text.
    fn tell(&self, text: &str, pair: Option<&str>, out: &mut Out) -> Result<(), Failure> {
        let asked = self.encoder.ask(text, pair)?;
        if asked.truncated {
            note("the text is longer than the model's context; its end was left out");
        }
        let found = self.shares(&asked)?;
        let likeliest = |shares: &[f64]| {
            let best = (0..shares.len()).max_by(|a, b| shares[*a].total_cmp(&shares[*b])).unwrap_or_default();
            (self.names.get(best).map_or("?", String::as_str), shares.get(best).copied().unwrap_or_default())
        };
        if out.is_json() {
            let of = |(of, shares): (&String, &Vec<f64>)| {
                let (label, probability) = likeliest(shares);
                let scores: serde_json::Map<_, _> =
                    self.names.iter().cloned().zip(shares.iter().map(|share| json!(share))).collect();
                json!({"of": of, "label": label, "probability": probability, "scores": scores})
            };
            let classes: Vec<_> = asked.of.iter().zip(&found).map(of).collect();
            return out.record(&json!({"text": text, "classes": classes}));
        }
        for (of, shares) in asked.of.iter().zip(&found) {
            let (label, probability) = likeliest(shares);
            out.line(&format!("{label}\t{probability:.4}\t{of}"))?;
        }
        Ok(())
    }

    /// The probabilities of all classes at each of the rows that have one.
    fn shares(&self, Asked { layout, rows, .. }: &Asked) -> Result<Vec<Vec<f64>>, Failure> {
        let before = self.model.rows_before(&self.theta);
        let layout = layout.begun_with(&before);
        let pass = Pass { theta: &self.theta, layout: &layout, dropout: None };
        // A document's class is asked of its first row whatever that is, or of its last; a word's of its own.
        let is_document =
            matches!(self.model.base().architecture().head, attune_architecture::HeadKind::Sequence { .. });
        let logits = if is_document { self.model.classify(&pass)? } else { self.model.logits(&pass)? };
        let logits: Vec<Vec<f32>> = logits.to_vec2().map_err(attune_points::Error::from)?;
        let of = |row: &u32| {
            let row = if is_document { 0 } else { *row as usize + before.len() };
            softmax(logits.get(row).map_or(&[], Vec::as_slice))
        };
        Ok(rows.iter().map(of).collect())
    }
}

fn softmax(logits: &[f32]) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let powers: Vec<f64> = logits.iter().map(|logit| f64::from(logit - largest).exp()).collect();
    let sum: f64 = powers.iter().sum();
    powers.into_iter().map(|power| power / sum).collect()
}

//! `attune answers`: how useful, how faithful and how safe the answers of a model are.

use std::path::{Path, PathBuf};

use attune_proto::v1::ArtifactKind;
use attune_trainer::audit::answers::refusal::Phrases;
use attune_trainer::audit::answers::report::Report;
use attune_trainer::audit::answers::{Answered, Item, Speakers};
use attune_trainer::audit::bootstrap::Bootstrap;

use super::looks;
use crate::print::{Failure, Out, note};
use crate::remote::{self, Place, Server, block_on};

/// What was said, in the folder of the report.
const KEPT: &str = "answers.jsonl";

/// Lets a model answer, and says how useful, how faithful and how safe its answers are, beside those of another.
#[derive(Debug, clap::Args)]
#[command(after_help = "ITEMS is JSON lines, of which all but `prompt` may be left out:

  {\"prompt\": \"When was the mill built?\", \"context\": \"The mill was built in 1842.\", \"reference\": \"1842\",
   \"ask\": \"benign\", \"slices\": {\"language\": \"en\", \"domain\": \"history\"}}

Useful is what says what the reference says (exactly, or how much of it), faithful what rests on the context by its pairs of words, safe
what refuses where `ask` is harmful and answers where it is benign. A judge (--judge) reads each pair of answers in both orders.

Writes `answers.jsonl`, `report.json` and `report.md`. With --kept no model speaks: the report is made again of the answers that are there.

Examples:
  attune answers items.jsonl --base ./base --adapter ./adapter --against-base --to ./looked-at
  attune answers items.jsonl --kept --to ./looked-at --refusals phrases.txt")]
pub(crate) struct Arguments {
    /// What is asked.
    #[arg(value_name = "ITEMS")]
    items: PathBuf,
    /// The base: a model folder, or the digest or tag of one that the server has.
    #[arg(long, value_name = "REF", required_unless_present = "kept")]
    base: Option<Place>,
    /// The adapter that answers; the base itself without either.
    #[arg(long, value_name = "REF", conflicts_with = "model")]
    adapter: Option<Place>,
    /// The model that was trained of the base and answers.
    #[arg(long, value_name = "REF")]
    model: Option<Place>,
    /// The adapter beside which it stands.
    #[arg(long, value_name = "REF", group = "against")]
    against_adapter: Option<Place>,
    /// The model beside which it stands.
    #[arg(long, value_name = "REF", group = "against")]
    against_model: Option<Place>,
    /// Stands beside the base.
    #[arg(long, group = "against")]
    against_base: bool,
    /// The model that says of two answers which is better: a folder, digest or tag.
    #[arg(long, value_name = "REF", requires = "against")]
    judge: Option<Place>,
    /// What refusals begin with, a phrase a line, in the place of the usual English ones.
    #[arg(long, value_name = "FILE")]
    refusals: Option<PathBuf>,
    /// The most tokens of an answer.
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: u32,
    /// Makes the report again of the answers in the folder.
    #[arg(long, conflicts_with_all = ["base", "adapter", "model", "against", "judge"])]
    kept: bool,
    /// The folder of the answers and of the report.
    #[arg(long, value_name = "FOLDER")]
    to: PathBuf,
}

pub(super) fn run(arguments: &Arguments, server: &Server, out: &mut Out) -> Result<(), Failure> {
    let items: Vec<Item> = looks::rows(&arguments.items)?;
    let phrases = match &arguments.refusals {
        None => Phrases::default(),
        Some(file) => {
            let text = std::fs::read_to_string(file).map_err(|error| Failure::file(file, &error))?;
            let phrases = Phrases::new(text.lines());
            if phrases.is_empty() {
                return Err(Failure::usage(format!("{}: has no phrases", file.display())));
            }
            phrases
        }
    };
    let answered = match &arguments.base {
        Some(base) => {
            let answered = said(arguments, base, &items, server)?;
            let lines: Vec<String> = answered.iter().filter_map(|said| serde_json::to_string(said).ok()).collect();
            looks::write(&arguments.to, &[(KEPT, &(lines.join("\n") + "\n"))])?;
            answered
        }
        None => kept(&arguments.to.join(KEPT), &arguments.items, &items)?,
    };
    let bootstrap = Bootstrap { resamples: 2000, level: 0.95, seed: 0 };
    let report = Report::of(&items, &answered, &phrases, &bootstrap);
    looks::tell(&report, &report.markdown(), Some(&arguments.to), out)
}

fn said(arguments: &Arguments, base: &Place, items: &[Item], server: &Server) -> Result<Vec<Answered>, Failure> {
    let (base, own, other, judge) = block_on(async {
        let base = remote::folder(base, ArtifactKind::Model, server).await?;
        let own = looks::trained(arguments.model.as_ref(), arguments.adapter.as_ref(), server).await?;
        let (model, adapter) = (arguments.against_model.as_ref(), arguments.against_adapter.as_ref());
        let other = looks::trained(model, adapter, server).await?;
        let judge = match &arguments.judge {
            None => None,
            Some(judge) => Some(remote::folder(judge, ArtifactKind::Model, server).await?),
        };
        Ok((base, own, other, judge))
    })?;
    let beside = (other.is_some() || arguments.against_base).then_some(other.as_ref());
    let max_tokens = arguments.max_tokens;
    let speakers = Speakers { base: &base, own: own.as_ref(), other: beside, judge: judge.as_deref(), max_tokens };
    Ok(speakers.answer(items, |who| note(&format!("asking {who}")))?)
}

/// The answers that were kept, if they are to these items.
fn kept(file: &Path, of: &Path, items: &[Item]) -> Result<Vec<Answered>, Failure> {
    let answered: Vec<Answered> = looks::rows(file)?;
    let asked = |at: usize| items.get(at).map(|item| item.prompt.as_str());
    let said = |at: usize| answered.get(at).map(|answered| answered.prompt.as_str());
    let differs = (0..items.len().max(answered.len())).find(|at| asked(*at) != said(*at));
    match differs {
        None => Ok(answered),
        Some(at) => {
            let message =
                format!("{}: answer {} is not to item {} of {}", file.display(), at + 1, at + 1, of.display());
            Err(Failure::usage(message).with_hint("let the model answer again: leave out --kept and name --base"))
        }
    }
}

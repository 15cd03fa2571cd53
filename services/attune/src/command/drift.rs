//! `attune drift`: whether texts are still like those that a model learned.

use std::path::PathBuf;

use attune_proto::v1::ArtifactKind;
use attune_trainer::audit::bootstrap::Bootstrap;
use attune_trainer::audit::drift::Drift;

use super::looks;
use crate::print::{FAILED, Failure, Out, USAGE};
use crate::remote::{self, Place, Server, block_on};

/// Says whether texts of now are still like those that a model learned.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Files are those that jobs read: chats, prompts with completions, texts. Of each the model says how likely it holds what it is given
(inputs) and what it was to learn (answers). A kind of tokens has drifted whose perplexity is surely more than so many times that of the slice
(--most); the distance also shows texts that are as hard as before and other ones.

Example:
  attune drift --base ./base --adapter served:latest --slice train.jsonl --seen today.jsonl --most 1.25

Exit status: 1 where anything has drifted, so that a schedule can tell."
)]
pub(crate) struct Arguments {
    /// The base: a model folder, or the digest or tag of one that the server has.
    #[arg(long, value_name = "REF")]
    base: Place,
    /// The adapter that is looked at; the base itself without either.
    #[arg(long, value_name = "REF", conflicts_with = "model")]
    adapter: Option<Place>,
    /// The model that was trained of the base and is looked at.
    #[arg(long, value_name = "REF")]
    model: Option<Place>,
    /// Texts that were learned, or better ones like these that were held out.
    #[arg(long, value_name = "FILE")]
    slice: PathBuf,
    /// Texts of now.
    #[arg(long, value_name = "FILE")]
    seen: PathBuf,
    /// The largest ratio of perplexities that is no drift.
    #[arg(long, value_name = "RATIO", default_value_t = 1.2, value_parser = ratio)]
    most: f64,
    /// The most texts of either file.
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..))]
    rows: u64,
    /// The longest text, in tokens.
    #[arg(long, value_name = "TOKENS", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(2..))]
    max_length: u32,
    /// The folder of the report, where it is to be kept: `report.json` and `report.md`.
    #[arg(long, value_name = "FOLDER")]
    to: Option<PathBuf>,
}

fn ratio(text: &str) -> Result<f64, String> {
    let ratio = text.parse().ok().filter(|ratio: &f64| ratio.is_finite() && *ratio >= 1.0);
    ratio.ok_or_else(|| "expected 1 or more, such as 1.2".to_owned())
}

pub(super) fn run(arguments: &Arguments, server: &Server, out: &mut Out) -> Result<(), Failure> {
    let (base, trained) = block_on(async {
        let base = remote::folder(&arguments.base, ArtifactKind::Model, server).await?;
        let trained = looks::trained(arguments.model.as_ref(), arguments.adapter.as_ref(), server).await?;
        Ok((base, trained))
    })?;
    let drift = Drift {
        base: &base,
        trained: trained.as_ref(),
        slice: arguments.slice.clone(),
        seen: arguments.seen.clone(),
        rows: Some(arguments.rows),
        max_length: arguments.max_length,
        most: arguments.most,
        bootstrap: Bootstrap { resamples: 2000, level: 0.95, seed: 0 },
    };
    // Whatever fails is about what was named here: a schedule has to tell that from a drift.
    let report = drift.run().map_err(|error| Failure { status: USAGE, ..error.into() })?;
    looks::tell(&report, &report.markdown(), arguments.to.as_ref(), out)?;
    if report.is_drifted() { Err(Failure::silent(FAILED)) } else { Ok(()) }
}

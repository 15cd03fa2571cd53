//! `attune convert`: an adapter of whatever method becomes plain LoRA.

use std::path::PathBuf;

use attune_spec::id::Digest;
use attune_trainer::to_lora::{Converted, Keep, ToLora};
use serde_json::json;

use super::made::{self, Goes, Made};
use crate::print::{Failure, Out};
use crate::remote::{Place, Server, folders};

/// Makes plain LoRA of an adapter of any method that merges, for servers that know nothing else.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "What the adapter adds to each weight is kept by its largest singular directions: a rank for all linears, or a share of
the sum of the squares of each linear's singular values. The root of what is missing of 1 is how far the LoRA is from the adapter, by the
length of the change. Of LoRA's relatives most have few directions and are kept whole.

Examples:
  attune convert turned:latest --base base:latest --rank 16 --to ./lora
  attune convert ./adapter --base ./base --share 0.99 --tag served:latest

`attune methods list --point adapter --merges` says which methods can be converted."
)]
pub(crate) struct Arguments {
    /// The adapter: a folder, digest or tag.
    #[arg(value_name = "REF")]
    adapter: Place,
    /// The base that it was trained on: a model folder, or the digest or tag of one that the server has.
    #[arg(long, value_name = "REF")]
    base: Place,
    /// Directions at each linear; where a change has fewer, as many as it has.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), required_unless_present = "share", conflicts_with = "share")]
    rank: Option<u32>,
    /// Share of each change that is kept, by as few directions as hold it.
    #[arg(long, value_name = "SHARE", value_parser = share)]
    share: Option<f64>,
    #[command(flatten)]
    goes: Goes,
}

fn share(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|share: &f64| *share > 0.0 && *share <= 1.0);
    share.ok_or_else(|| "expected more than 0, and 1 at most, such as 0.99".to_owned())
}

pub(super) fn run(arguments: &Arguments, server: &Server, out: &mut Out) -> Result<(), Failure> {
    arguments.goes.check()?;
    let (base, found) = folders(&arguments.base, [&arguments.adapter], server)?;
    let folder = found.first().ok_or_else(|| Failure::usage("no adapter is named"))?;
    let keep = match (arguments.rank, arguments.share) {
        (_, Some(share)) => Keep::Share(share),
        (rank, None) => Keep::Rank(rank.unwrap_or(1) as usize),
    };
    let name = made::name(&arguments.adapter, "adapter");
    let convert = ToLora { base: &base, name: &name, folder, keep };
    let scratch = tempfile::tempdir().map_err(|error| Failure::failed(format!("no folder can be made: {error}")))?;
    let made_at = scratch.path().join("adapter");
    let made = convert.run(&made_at)?;
    if arguments.goes.dry_run {
        return tell(&made, None, None, out);
    }
    let of = vec![("adapter".to_owned(), &arguments.adapter), ("base".to_owned(), &arguments.base)];
    let kept = Made { folder: &made_at, of, plan: json!({"convert": {"keep": keep}}) };
    let stored = kept.keep(&arguments.goes, server)?;
    tell(&made, arguments.goes.to.as_ref(), stored, out)
}

fn tell(made: &Converted, to: Option<&PathBuf>, stored: Option<Digest>, out: &mut Out) -> Result<(), Failure> {
    if out.is_json() {
        let digest = stored.map(|digest| digest.to_string());
        return out.document(&json!({
            "folder": to, "digest": digest, "method": made.method, "sites": made.sites, "rank": made.rank,
            "parameters": made.parameters,
        }));
    }
    made::places(to.map(PathBuf::as_path), stored, out)?;
    let Converted { method, sites, rank, parameters } = made;
    out.line(&format!("{method} as LoRA: {} sites, rank {rank} at most, {parameters} parameters", sites.len()))?;
    let Some((site, kept)) = made.least() else { return Ok(()) };
    out.line(&format!("kept of each change: {:.4} or more, least at {site} by {} directions", kept.share, kept.rank))
}

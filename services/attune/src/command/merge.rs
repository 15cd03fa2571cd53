//! `attune merge`: several adapters become one.

use std::path::PathBuf;
use std::str::FromStr;

use attune_merge::{MERGES, words};
use attune_spec::id::{Digest, Step};
use attune_spec::method::BuildCx;
use attune_trainer::combine::{Combine, Combined, Part};
use serde_json::json;

use super::made::{self, Goes, Made};
use crate::print::{Failure, Out};
use crate::remote::{Place, Server, folders};

/// Combines adapters of one base into one, each with a weight of its own.
#[derive(Debug, clap::Args)]
#[command(after_help = "Combination types and what else they are told are those of PEFT's `add_weighted_adapter`:

  linear, ties, dare_linear, dare_ties, magnitude_prune    factors of one rank, each kind by itself: cheap and rough
  cat                                                      factors side by side: exact, and ranks add up
  svd, and the others with _svd                            changes of weights, made factors again by their largest directions

Examples:
  attune merge ./polite=0.7 ./swears=-0.5 --base ./base --combination-type cat --to ./both
  attune merge sums:latest proofs:latest --base base:latest --combination-type ties_svd --density 0.3 --tag maths:latest

`attune methods show ties` has the equations.")]
pub(crate) struct Arguments {
    /// An adapter in PEFT's layout and its weight: a folder, digest or tag, then `=` and a number, 1 if they are left out.
    #[arg(value_name = "REF[=WEIGHT]", required = true)]
    of: Vec<Named>,
    /// The base that they were trained on: a model folder, or the digest or tag of one that the server has.
    #[arg(long, value_name = "REF")]
    base: Place,
    /// How they are combined.
    #[arg(long, value_name = "TYPE", default_value = "svd", value_parser = clap::builder::PossibleValuesParser::new(words::all()))]
    combination_type: String,
    /// Share of the numbers that is kept, where some are left out.
    #[arg(long, value_name = "SHARE")]
    density: Option<f64>,
    /// Whose sign counts where numbers differ: that of their sum, or that of most of them.
    #[arg(long, value_name = "BY")]
    majority_sign_method: Option<MajoritySign>,
    /// Rank of what is made of changes; the largest of the adapters' if it is left out.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    svd_rank: Option<u32>,
    /// Share of the numbers of factors that is made of changes, beyond which they are clamped; none are if it is left out.
    #[arg(long, value_name = "SHARE")]
    svd_clamp: Option<f64>,
    /// The seed of what is drawn at random.
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    goes: Goes,
}

/// Whose sign counts.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum MajoritySign {
    /// That of their sum.
    Total,
    /// That of most of them.
    Frequency,
}

/// An adapter with its weight.
#[derive(Debug, Clone)]
struct Named {
    place: Place,
    weight: f64,
}

impl FromStr for Named {
    type Err = String;

    /// What follows the last `=` is the weight, unless the whole is something on this machine.
    fn from_str(text: &str) -> Result<Self, String> {
        if let (Ok(place @ Place::Local(_)), true) = (text.parse(), std::path::Path::new(text).is_dir()) {
            return Ok(Self { place, weight: 1.0 });
        }
        let (place, weight) = text.rsplit_once('=').unwrap_or((text, "1"));
        let number = weight.parse().ok().filter(|weight: &f64| weight.is_finite());
        let weight =
            number.ok_or_else(|| format!("the weight is {weight:?}; expected a number, such as {place}=0.5"))?;
        Ok(Self { place: place.parse()?, weight })
    }
}

pub(super) fn run(arguments: &Arguments, server: &Server, out: &mut Out) -> Result<(), Failure> {
    let sign = arguments.majority_sign_method.map(|sign| match sign {
        MajoritySign::Total => words::MajoritySign::Total,
        MajoritySign::Frequency => words::MajoritySign::Frequency,
    });
    let rank = arguments.svd_rank.map(|rank| rank as usize);
    let (density, clamp) = (arguments.density, arguments.svd_clamp);
    let (method, space) = words::of(&arguments.combination_type, density, sign, rank, clamp)
        .map_err(|fault| Failure::usage(fault.to_string()))?;
    let cx = BuildCx { steps: Step(0), domains: &[], words: None };
    MERGES
        .build(&method, &"".into(), &cx)
        .map_err(|faults| Failure::usage(faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")))?;
    arguments.goes.check()?;
    let (base, folders) = folders(&arguments.base, arguments.of.iter().map(|named| &named.place), server)?;
    let part = |(number, (named, folder)): (usize, (&Named, PathBuf))| Part {
        name: made::name(&named.place, &format!("adapter {number}")),
        folder,
        weight: named.weight,
    };
    let of: Vec<Part> = arguments.of.iter().zip(folders).enumerate().map(part).collect();
    let combine = Combine { base: &base, of: &of, method: &method, space, seed: arguments.seed };
    // What is asked for is known to be right when it has been made.
    let scratch = tempfile::tempdir().map_err(|error| Failure::failed(format!("no folder can be made: {error}")))?;
    let made_at = scratch.path().join("adapter");
    let made = combine.run(&made_at)?;
    if arguments.goes.dry_run {
        return tell(&made, None, None, out);
    }
    let of = arguments.of.iter().enumerate().map(|(number, named)| (format!("adapter.{number}"), &named.place));
    let of = of.chain([("base".to_owned(), &arguments.base)]).collect();
    let kept = Made { folder: &made_at, of, plan: plan(&combine, arguments) };
    let stored = kept.keep(&arguments.goes, server)?;
    tell(&made, arguments.goes.to.as_ref(), stored, out)
}

/// What the plan of what was made says.
fn plan(combine: &Combine<'_>, arguments: &Arguments) -> serde_json::Value {
    let weights: Vec<f64> = arguments.of.iter().map(|named| named.weight).collect();
    json!({
        "method": combine.method, "space": combine.space, "seed": combine.seed, "weights": weights,
    })
}

fn tell(made: &Combined, to: Option<&PathBuf>, stored: Option<Digest>, out: &mut Out) -> Result<(), Failure> {
    if out.is_json() {
        let digest = stored.map(|digest| digest.to_string());
        return out.document(&json!({
            "folder": to, "digest": digest, "sites": made.sites, "rank": made.rank, "parameters": made.parameters,
        }));
    }
    made::places(to.map(PathBuf::as_path), stored, out)?;
    out.line(&format!("{} sites, rank {} at most, {} parameters", made.sites, made.rank, made.parameters))
}
